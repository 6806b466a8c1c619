"""One neuron layer on a GPU: the device's own time, by CUDA-graph replay, beside the time of eager calls.

Run with ``python benchmarks/gpu_times.py [--device cuda] [--seconds 0.4] [--json FILE] [--markdown FILE]``.
Small layers are bound by Python and launches, which a graph takes away; large ones by memory. A cell is a shape, an
order and a dtype, with a mask or time-last where it says so; a variant is a neuron, or a batch norm and a neuron after
it. Replays are timed by events, interleaved, and their medians reported; JSON is written after every cell. On a CPU
the same runs without graphs, as a rehearsal. ``--render FILE`` makes tables and picture of an earlier run's JSON.

The yardstick is ``clone``, two passes over the tensor: passes = time / (clone / 2), as in ``neuron.py``.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
import re
import sys
import time
from collections.abc import Callable

import checkout  # noqa: F401  (first: it makes mfpsn_fx importable from a bare checkout)
import rivals
import torch
from runner import (
    Benchmark,
    check_kernels,
    device_sample,
    each,
    environment,
    first_line,
    geometric_mean,
    interleave,
    markdown_table,
    plain_ticks,
    pyplot,
    ratio,
    save,
    synchronize,
    three,
)
from torch import nn

import mfpsn_fx
from mfpsn_fx.kernels import Layout, Problem, kernels

STEP, FORWARD, EVAL = "forward+backward", "training forward", "eval forward"
BUDGET = {STEP: 8, FORWARD: 3, EVAL: 2}  # passes over a tensor the size of X
NORM = "norm + "
_ROUNDS = {"least": 5, "most": 40}


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


@dataclasses.dataclass
class Settings:
    """What is measured, and how long: ``seconds`` a cell for each way to measure it."""

    device: torch.device = dataclasses.field(default_factory=lambda: torch.device("cuda"))
    kernels: tuple[str, ...] = ("fused-cuda", "fused-triton")
    seconds: float = 0.4
    limit: float | None = None  # seconds after which no cell is begun
    cut: bool = False  # to a few small cells


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


def host_ms(run: Run, device: torch.device, calls: int = 20) -> float:
    """Milliseconds until an eager call returns: Python and launches, whatever the device still has to do."""
    synchronize(device)
    started = time.perf_counter()
    for _ in range(calls):
        run()
    taken = (time.perf_counter() - started) * 1e3 / calls
    synchronize(device)
    return taken


def launches(run: Run, device: torch.device) -> list[tuple[str, float]]:
    """Each kernel that a call runs on the device, in order, with its microseconds, as the profiler sees them."""
    if device.type == "cpu":
        return []
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        synchronize(device)
    found = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return [(_short(e.name), e.time_range.elapsed_us()) for e in sorted(found, key=lambda e: e.time_range.start)]


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
    timed = {key: interleave(v, device, seconds, **_ROUNDS, sample=device_sample) for key, v in replays.items()}
    called = interleave(eager, device, seconds, **_ROUNDS, sample=device_sample)
    for one in (*timed.values(), called):
        errors |= one.errors
    eager = {name: run for name, run in eager.items() if name in called.ms}
    traced = {name: launches(run, device) for name, run in eager.items()}
    return {
        "cell": cell.name,
        "shape": list(cell.shape),
        "order": cell.order,
        "dtype": str(cell.dtype),
        "masked": cell.masked,
        "layout": str(cell.layout),
        "bytes": cell.bytes,
        "graph_ms": {key: one.ms for key, one in timed.items()},
        "eager_ms": called.ms,
        "host_ms": {name: host_ms(run, device) for name, run in eager.items()},
        "launches": traced,
        "errors": errors,
    }


def measure(settings: Settings, progress: bool | None = None, keep=lambda found: None) -> dict[str, object]:
    """All cells, or as many as ``--limit`` seconds allow; what ``--json`` writes after each."""
    torch.manual_seed(0)
    device, started = settings.device, time.perf_counter()
    found: dict[str, object] = {"environment": environment(device), "missing": rivals.MISSING, "cells": []}
    if device.type == "cuda":
        found["l2_bytes"] = torch.cuda.get_device_properties(device).L2_cache_size

    def one(cell: Cell) -> dict[str, object]:
        if settings.limit is not None and time.perf_counter() - started > settings.limit:
            raise RuntimeError(f"not measured: the {settings.limit:g} s were used up")
        if device.type == "cuda":
            torch.cuda.empty_cache()
        return measure_cell(cell, device, settings.kernels, settings.seconds)

    def after(cells: list[dict]) -> None:
        found["cells"] = cells
        keep(found)

    each(QUICK if settings.cut else CELLS, one, lambda cell: f"{cell.name}, k = {cell.order}", progress, after)
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


def failures(found: dict):
    for cell in found["cells"]:
        for name, reason in cell["errors"].items():
            yield f"{cell['cell']}, k = {cell['order']}: {name}", reason


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
        plain_ticks(axes.yaxis, "235")
        axes.grid(axis="y", color="0.9", which="both")
        axes.set_axisbelow(True)
    panels[1].set_xticks(range(len(cells)), [f"{c['cell']}, k={c['order']}" for c in cells], rotation=60, ha="right")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=6, frameon=False)
    save(figure, path)


def check(parser, options, settings: Settings) -> None:
    check_kernels(parser, settings.kernels)


BENCHMARK = Benchmark(
    __file__,
    __doc__,
    "One neuron layer on a GPU",
    Settings,
    measure,
    tables,
    options={"limit": "begin no cell after so many seconds", "kernels": ""},
    quick={"cut": True},
    failures=failures,
    draw=draw,
    missing=lambda: rivals.MISSING,
    check=check,
)
main = BENCHMARK.main

if __name__ == "__main__":
    sys.exit(not main()["cells"])  # nothing measured is a failure
