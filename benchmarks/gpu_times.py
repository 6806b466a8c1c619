"""One neuron layer on a GPU: the device's own time, by CUDA-graph replay, beside the time of eager calls.

Run with ``python benchmarks/gpu_times.py [--device cuda] [--seconds 0.4] [--json FILE] [--markdown FILE]``.
Small layers are bound by Python and launches, which a graph takes away; large ones by memory. A cell is a shape, an
order and a dtype, with a mask or time-last where it says so; a variant is a neuron, or a batch norm and a neuron after
it. Replays are timed by events, interleaved, and their medians reported; JSON is written after every cell. On a CPU
the same runs without graphs, as a rehearsal. ``--render FILE`` makes tables and picture of an earlier run's JSON.

The yardstick is ``clone``, two passes over the tensor: passes = time / (clone / 2), as in ``neuron.py``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import pathlib
import random
import re
import statistics
import sys
import time
from collections.abc import Callable

import checkout  # noqa: F401  (first: it makes mfpsn_fx importable from a bare checkout)
import rivals
import torch
from common import (
    checked_device,
    environment,
    first_line,
    geometric_mean,
    markdown_table,
    output_options,
    preamble,
    pyplot,
    ratio,
    three,
    write,
)
from torch import nn

import mfpsn_fx
from mfpsn_fx.kernels import Layout, Problem, kernels

STEP, FORWARD, EVAL = "forward+backward", "training forward", "eval forward"
BUDGET = {STEP: 8, FORWARD: 3, EVAL: 2}  # passes over a tensor the size of X
NORM = "norm + "
_LEAST_ROUNDS, _MOST_ROUNDS = 5, 40
_SHORTEST_MS = 1.0  # of a sample: many replays of a short graph, so that an event's own grain does not show


@dataclasses.dataclass(frozen=True)
class Cell:
    """A layer's input (T, N, C, *), and the neuron that it meets."""

    shape: tuple[int, ...]
    order: int = 2
    dtype: torch.dtype = torch.float32
    masked: bool = False
    layout: Layout = Layout.TIME_FIRST

    @property
    def name(self) -> str:
        size = "×".join(map(str, self.shape))
        notes = [str(self.dtype).removeprefix("torch.")] * (self.dtype is not torch.float32)
        notes += ["mask"] * self.masked + ["time-last"] * (self.layout is Layout.TIME_LAST)
        return " ".join([size, *notes])

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


# The ones that are wanted most first: a run may be cut short.
CELLS = (
    Cell((4, 32, 64, 56, 56)),
    Cell((4, 32, 128, 28, 28)),
    Cell((16, 64, 128, 2048)),  # 1 GiB
    Cell((4, 32, 512, 7, 7)),
    Cell((4, 32, 64, 56, 56), dtype=torch.bfloat16),
    Cell((16, 32, 128, 16, 16), order=4),
    Cell((16, 32, 128, 16, 16), order=8),
    Cell((16, 32, 128, 16, 16), order=16),
    Cell((4, 32, 64, 56, 56), masked=True),
    Cell((16, 32, 128, 16, 16), layout=Layout.TIME_LAST),
    *(Cell((steps, 32, 128, 32)) for steps in (2, 4, 8, 16, 32)),
)
QUICK = (Cell((4, 2, 8, 4, 4)), Cell((4, 2, 8, 3), order=4, dtype=torch.bfloat16), Cell((4, 2, 8, 4), masked=True))

Run = Callable[[], object]


class NormThen(nn.Module):
    """Batch norm over (T·N, C, *) and a neuron behind it, as SpikingJelly's multi-step layers do it."""

    def __init__(self, channels: int, neuron: nn.Module, cell: Cell) -> None:
        super().__init__()
        kinds = {3: nn.BatchNorm1d, 4: nn.BatchNorm1d, 5: nn.BatchNorm2d}
        self.norm, self.neuron = kinds[len(cell.shape)](channels), neuron

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.neuron(self.norm(x.flatten(0, 1)).unflatten(0, x.shape[:2]))


class Layer:
    """The tensors of a cell and the modules that are compared on it."""

    def __init__(self, cell: Cell, device: torch.device, names: tuple[str, ...]) -> None:
        self.cell, self.device = cell, device
        shape = Layout.parse(cell.layout).shape_from(cell.shape, Layout.TIME_FIRST)
        self.x = torch.randn(shape, device=device, dtype=cell.dtype, requires_grad=True)
        self.grad = torch.randn(shape, device=device, dtype=cell.dtype)
        steps, batch, self.channels = cell.shape[:3]
        self.mask = None
        if cell.masked:
            self.mask = torch.ones(steps, batch, dtype=torch.bool, device=device)
            self.mask[steps // 2 :, ::2] = False
        problem = Problem(shape, cell.layout, cell.dtype, device.type, cell.order, 1, masked=cell.masked)
        self.refused = {k.name: k.refusal(problem) for k in kernels() if k.name in names}
        self.ours = [name for name in names if self.refused.get(name, "") is None]

    def neuron(self, kernel: str) -> nn.Module:
        module = mfpsn_fx.MulFreePSN(self.channels, self.cell.order, device=self.device)
        module.bind(layout=str(self.cell.layout), kernel=kernel, eval_kernel=kernel)
        return module

    def modules(self) -> dict[str, Callable[[], nn.Module]]:
        """What makes each variant; rivals know neither masks nor time-last."""
        made: dict[str, Callable[[], nn.Module]] = {n: (lambda n=n: self.neuron(n)) for n in self.ours}
        if self.cell.masked or self.cell.layout is Layout.TIME_LAST:
            return made
        for name in self.ours:
            made[NORM + name] = lambda name=name: NormThen(self.channels, self.neuron(name), self.cell)
            made["folded " + NORM + name] = lambda name=name: self.folded(name)
        if not rivals.MISSING:
            steps = self.cell.shape[0]
            for name, rival in {"PSN": lambda: rivals.psn(steps), "LIF": rivals.lif}.items():
                make = lambda rival=rival: rival().to(self.cell.dtype)  # noqa: E731
                made[name] = make
                made[NORM + name] = lambda make=make: NormThen(self.channels, make(), self.cell)
        return {name: lambda make=make: make().to(self.device) for name, make in made.items()}

    def folded(self, kernel: str) -> nn.Module:
        """Norm and neuron as ``convert`` leaves them: the neuron applies the norm on load."""
        source = NormThen(self.channels, self.neuron(kernel), self.cell).to(self.device)
        x = self.x.detach()[:, :2]
        return mfpsn_fx.convert(
            source, x, order=self.cell.order, layout="time_first", kernels=kernel, fold_norms=True, repeats=1,
            budget_s=1.0, progress=False, calibrate=None,
        )  # fmt: skip

    def runs(self, module: nn.Module) -> dict[str, Run]:
        """Each measure of ``module``: gradients are returned, not accumulated."""
        arguments = () if self.mask is None else (self.mask,)
        parameters = list(module.parameters())

        def step() -> None:
            module.train()
            torch.autograd.grad(module(self.x, *arguments), [self.x, *parameters], self.grad)
            rivals.reset(module)

        def forward(training: bool) -> None:
            module.train(training)
            with torch.set_grad_enabled(training):
                module(self.x, *arguments)
            rivals.reset(module)

        return {STEP: step, FORWARD: lambda: forward(True), EVAL: lambda: forward(False)}


def captured(run: Run, device: torch.device, pool: object) -> Run:
    """``run`` as a CUDA graph's replay; itself on a CPU.

    Three calls come first, on a side stream as PyTorch asks for it: they load modules and compile what is compiled at
    the first call, which a capture forbids. ``pool`` is shared by graphs that are replayed one at a time: what one
    leaves in memory the next may overwrite.
    """
    if device.type == "cpu":
        run()
        return run
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        run()
    return graph.replay


def device_ms(run: Run, calls: int, device: torch.device) -> float:
    """Milliseconds of one of ``calls`` calls on the device, by events; by a clock on a CPU."""
    if device.type == "cpu":
        started = time.perf_counter()
        for _ in range(calls):
            run()
        return (time.perf_counter() - started) * 1e3 / calls
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    for _ in range(calls):
        run()
    after.record()
    after.synchronize()
    return before.elapsed_time(after) / calls


def interleaved(variants: dict, device: torch.device, seconds: float) -> dict:
    """Median milliseconds of each variant: rounds in an order drawn anew (seeded), until ``seconds`` are over."""
    calls = {
        name: max(1, math.ceil(_SHORTEST_MS / max(device_ms(run, 1, device), 1e-4))) for name, run in variants.items()
    }
    calls = {name: min(count, 50) for name, count in calls.items()}
    samples: dict = {name: [] for name in variants}
    order, draw, started, rounds = list(variants), random.Random(0), time.perf_counter(), 0
    while rounds < _MOST_ROUNDS and (rounds < _LEAST_ROUNDS or time.perf_counter() - started < seconds):
        draw.shuffle(order)
        for name in order:
            samples[name].append(device_ms(variants[name], calls[name], device))
        rounds += 1
    return {name: statistics.median(values) for name, values in samples.items()}


def host_ms(run: Run, device: torch.device, calls: int = 20) -> float:
    """Milliseconds until an eager call returns: Python and launches, whatever the device still has to do."""
    _synchronize(device)
    started = time.perf_counter()
    for _ in range(calls):
        run()
    taken = (time.perf_counter() - started) * 1e3 / calls
    _synchronize(device)
    return taken


def launches(run: Run, device: torch.device) -> list[tuple[str, float]]:
    """Each kernel that a call runs on the device, in order, with its microseconds, as the profiler sees them."""
    if device.type == "cpu":
        return []
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        _synchronize(device)
    found = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return [(_short(e.name), e.time_range.elapsed_us()) for e in sorted(found, key=lambda e: e.time_range.start)]


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def measure_cell(cell: Cell, device: torch.device, names: tuple[str, ...], seconds: float) -> dict[str, object]:
    """One cell: by measure and variant, milliseconds by graph, milliseconds eager, and of the host alone."""
    layer = Layer(cell, device, names)
    errors: dict[str, str] = {name: why for name, why in layer.refused.items() if why is not None}
    pool = None if device.type == "cpu" else torch.cuda.graph_pool_handle()
    data = layer.x.detach()
    replays: dict[str, dict[str, Run]] = {measure: {"clone": captured(data.clone, device, pool)} for measure in BUDGET}
    eager: dict[str, Run] = {}
    for name, make in layer.modules().items():
        try:
            runs = layer.runs(make())
            for measure, run in runs.items():
                if measure == STEP or name in layer.ours or name == "PSN":
                    replays[measure][name] = captured(run, device, pool)
            eager[name] = runs[STEP]
        except Exception as error:  # whatever a variant raises is a finding about that variant
            errors[name] = first_line(error)
    by_graph = {measure: interleaved(variants, device, seconds) for measure, variants in replays.items()}
    by_call = interleaved(eager, device, seconds)
    traced = {name: launches(run, device) for name, run in eager.items()}
    return {
        "cell": cell.name, "shape": list(cell.shape), "order": cell.order, "dtype": str(cell.dtype),
        "masked": cell.masked, "layout": str(cell.layout), "bytes": cell.bytes, "graph_ms": by_graph,
        "eager_ms": by_call, "host_ms": {name: host_ms(run, device) for name, run in eager.items()},
        "launches": traced, "errors": errors,
    }  # fmt: skip


def measure(settings: argparse.Namespace, device: torch.device, argv: list[str]) -> dict[str, object]:
    """All cells, or as many as ``--limit`` seconds allow; what ``--json`` writes after each."""
    torch.manual_seed(0)
    found: dict[str, object] = {"environment": environment(device), "missing": rivals.MISSING, "cells": []}
    found["made_by"] = preamble("gpu_times.py", argv, found["environment"])
    if device.type == "cuda":
        found["l2_bytes"] = torch.cuda.get_device_properties(device).L2_cache_size
    started = time.perf_counter()
    for cell in QUICK if settings.quick else CELLS:
        if settings.limit is not None and time.perf_counter() - started > settings.limit:
            print(f"{cell.name}, k = {cell.order}: not measured: the {settings.limit:g} s were spent")
            continue
        try:
            found["cells"].append(measure_cell(cell, device, tuple(settings.kernels), settings.seconds))
        except (RuntimeError, MemoryError) as error:  # such as out of memory: the other cells still count
            print(f"{cell.name}: {first_line(error)}", flush=True)
        write(settings.json, found)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return found


def names_of(cells: list[dict], key: str) -> list[str]:
    """Variants that have a time in some cell, ours first, then rivals, then those with a norm."""
    tables = [cell[key] if key != "graph_ms" else cell[key][STEP] for cell in cells]
    names = dict.fromkeys(name for table in tables for name in table if name != "clone")
    return sorted(
        names, key=lambda n: (NORM in n, not n.removeprefix("folded ").removeprefix(NORM).startswith("fused"))
    )


def tables(found: dict) -> str:
    """Steps by graph and eager as ratios to PSN, then the passes of ours, in Markdown."""
    cells = found["cells"]
    if not cells:
        return "Nothing was measured."
    graph, eager = names_of(cells, "graph_ms"), names_of(cells, "eager_ms")

    def rows(names: list[str], times: Callable[[dict], dict]) -> list[list[object]]:
        made = []
        for cell in cells:
            ms = times(cell)
            base = ms.get("PSN")
            values = [three(ms[n] * 1e3) if base is None and n in ms else ratio(ms.get(n), base) for n in names]
            made.append([cell["cell"], cell["order"], *([] if base is None else [three(base * 1e3)]), *values])
            if base is None:
                made[-1].insert(2, "– (µs)")
        means = [
            three(geometric_mean(times(c)[n] / times(c)["PSN"] for c in cells if n in times(c) and "PSN" in times(c)))
            for n in names
        ]
        return [*made, ["geometric mean", "", "", *means]]

    headers = ["(T, N, C, *)", "k", "PSN µs"]
    passes = []
    for cell in cells:
        for name in [n for n in cell["graph_ms"][STEP] if n.startswith("fused")]:
            row: list[object] = [cell["cell"], cell["order"], name]
            for measure, budget in BUDGET.items():
                times = cell["graph_ms"][measure]
                if name not in times:
                    row += ["–", "–"]
                    continue
                unit = times["clone"] / 2
                row += [three(times[name] * 1e3), f"{three(times[name] / unit)} of {budget}"]
            row.append(f"{2 * cell['bytes'] / cell['graph_ms'][EVAL]['clone'] / 1e9:.2f}")
            passes.append(row)
    parts = [
        "Forward and backward in training by CUDA-graph replay, time as a ratio to PSN's (below 1 is faster; µs where "
        "PSN cannot take the cell):",
        markdown_table([*headers, *graph], rows(graph, lambda c: c["graph_ms"][STEP])),
        "The same by eager calls, the way from Python to the device included:",
        markdown_table([*headers, *eager], rows(eager, lambda c: c["eager_ms"])),
        "Launches of a step, as the profiler counts them (copies and fills among them):",
        markdown_table(
            ["(T, N, C, *)", "k", *eager],
            [[c["cell"], c["order"], *(len(c["launches"].get(n, ())) or "–" for n in eager)] for c in cells],
        ),
        "Microseconds of each launch of ours in a step:",
        markdown_table(
            ["(T, N, C, *)", "k", "kernel", "launches"],
            [
                [c["cell"], c["order"], n, "; ".join(f"{what} {us:.0f}" for what, us in c["launches"][n])]
                for c in cells
                for n in c["launches"]
                if n.startswith("fused") and c["launches"][n]
            ],
        ),
        "Until an eager step returns, the device's work not awaited (Python, autograd and launches):",
        markdown_table([*headers, *eager], rows(eager, lambda c: c["host_ms"])),
        "By graph, µs and passes over a tensor the size of X (half a `clone` of the same cell), and the bandwidth of "
        "that clone:",
        markdown_table(
            ["(T, N, C, *)", "k", "kernel", *(t for m in BUDGET for t in (f"{m} µs", "passes")), "clone TB/s"], passes
        ),
        f"{found['missing']}." if found["missing"] else "",
    ]
    return "\n\n".join(part for part in parts if part)


def _short(name: str) -> str:
    """A kernel's name without its template arguments and namespaces."""
    return re.sub(r"^void ", "", name).split("<")[0].split("(")[0].split("::")[-1]


def main(argv: list[str] | None = None) -> dict[str, object]:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    output_options(parser)
    parser.add_argument("--render", type=pathlib.Path, metavar="JSON", help="measure nothing: show what this run found")
    parser.set_defaults(device="cuda", seconds=0.4)
    parser.add_argument("--limit", type=float, metavar="SECONDS", help="begin no cell after so many")
    parser.add_argument("--kernels", nargs="+", metavar="NAME", default=["fused-cuda", "fused-triton"])
    settings = parser.parse_args(argv)
    if settings.png is not None:
        pyplot()  # that it is missing is to be known before, not after, the measuring
    if settings.render is not None:
        found = json.loads(settings.render.read_text(encoding="utf-8"))
    else:
        found = run(settings, argv, parser)
    text = f"{found['made_by']}\n\n{tables(found)}"
    print(text)
    for cell in found["cells"]:
        for name, reason in cell["errors"].items():
            print(f"{cell['cell']}, k = {cell['order']}: {name} was not measured: {reason}")
    write(settings.markdown, "# One neuron layer on a GPU\n\n" + text)
    if settings.png is not None:
        draw(found, settings.png)
    return found


def run(settings: argparse.Namespace, argv: list[str], parser: argparse.ArgumentParser) -> dict[str, object]:
    """Check the options and measure."""
    device = checked_device(settings.device)
    known = {kernel.name for kernel in kernels()}
    if unknown := sorted(set(settings.kernels) - known):
        parser.error(f"unknown kernels {', '.join(unknown)}; there are {', '.join(sorted(known))}")
    if rivals.MISSING:
        print(rivals.MISSING)
    found = measure(settings, device, argv)
    write(settings.json, found)
    return found


def draw(found: dict, path: pathlib.Path) -> None:
    """Time of a step as a ratio to PSN's by cell: by graph above, eager below."""
    plt = pyplot()
    cells = [cell for cell in found["cells"] if "PSN" in cell["graph_ms"][STEP]]
    if not cells:
        print("nothing to draw: without PSN there is no ratio to it")
        return
    style = {
        "fused-cuda": ("tab:blue", "o"), "fused-triton": ("tab:cyan", "o"), "LIF": ("tab:gray", "s"),
        "norm + fused-cuda": ("tab:blue", "^"), "norm + fused-triton": ("tab:cyan", "^"),
        "norm + LIF": ("tab:gray", "^"),
    }  # fmt: skip
    figure, panels = plt.subplots(2, 1, figsize=(9, 6.5), sharex=True, layout="constrained")
    for axes, key, title in zip(panels, ("graph_ms", "eager_ms"), ("by CUDA graph", "eager"), strict=True):
        tables = [cell[key][STEP] if key == "graph_ms" else cell[key] for cell in cells]
        for name, (color, marker) in style.items():
            points = [(i, ms[name] / ms["PSN"]) for i, ms in enumerate(tables) if name in ms]
            if points:
                axes.plot(*zip(*points, strict=True), marker, color=color, label=name, ms=5)
        axes.axhline(1, color="black", lw=1)
        axes.set(yscale="log", ylabel="time / PSN's (lower is faster)", title=f"forward and backward, {title}")
        axes.yaxis.set_major_formatter(plt.FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(
            plt.FuncFormatter(lambda value, _: f"{value:g}" if f"{value:g}".strip("0.") in "235" else "")
        )
        axes.grid(axis="y", color="0.9", which="both")
        axes.set_axisbelow(True)
    panels[1].set_xticks(range(len(cells)), [f"{c['cell']}, k={c['order']}" for c in cells], rotation=60, ha="right")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=6, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(not main()["cells"])  # nothing measured is a failure
