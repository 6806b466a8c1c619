"""One neuron layer: each of our kernels, and what a user would take instead, beside ``clone`` of the same tensor.

Run with ``python benchmarks/neuron.py [--device cuda] [--quick] [--json FILE] [--markdown FILE] [--png FILE]``.
``--march x86-64-v3`` measures as on a processor of that level: our kernels are compiled for it, torch is held to it.
Variants are interleaved in one run, and medians reported. SpikingJelly's PSN, SlidingPSN and LIF are there if it is
installed.

The yardstick is ``clone``, two passes over the tensor: passes = time / (clone / 2). The budget of the fused kernels is
2 passes in evaluation (read X, write S), 3 forward in training (read X for the statistics; X, S) and 5 backward
(X, dS; X, dS, dX), so 8 for forward and backward; the share of it that is reached is budget / passes.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
from collections.abc import Callable

import checkout  # noqa: F401  (first: it makes mfpsn_fx importable from a bare checkout)
import rivals
import torch
from runner import (
    Benchmark,
    Compiler,
    Timing,
    check_kernels,
    each,
    environment,
    geometric_mean,
    interleave,
    markdown_table,
    plain_ticks,
    pyplot,
    ratio,
    restart_for,
    save,
    three,
)
from vanilla import VanillaMulFreePSN

import mfpsn_fx
from mfpsn_fx.kernels import Layout, Problem, kernels

STEP, FORWARD, EVAL = "forward+backward", "training forward", "eval forward"
BUDGET = {STEP: 8, FORWARD: 3, EVAL: 2}  # passes over a tensor the size of X
PAST_CACHE_BYTES = {"cpu": 256 << 20, "other": 1 << 30}
VANILLA, COMPILED = "vanilla module", " compiled"


@dataclasses.dataclass
class Settings:
    """The grid, and how long to measure: ``seconds`` a cell beyond ``rounds`` rounds."""

    device: torch.device = dataclasses.field(default_factory=lambda: torch.device("cpu"))
    steps: tuple[int, ...] = (2, 4, 8, 16, 32)
    orders: tuple[int, ...] = (2, 4, 8)
    dilations: tuple[int, ...] = (1, 3)
    batch: int = 32
    channels: int = 128
    length: int = 32
    past_cache: bool = True
    kernels: tuple[str, ...] = ()  # () for all
    rounds: int = 7
    seconds: float = 4.0
    compile_seconds: float = 900.0

    def cells(self) -> list[tuple[int, int, int, int]]:
        """(T, k, d, N). The largest first: what compiling is budgeted for is wanted there most."""
        grid = [(t, k, d, self.batch) for t in self.steps for k in self.orders for d in self.dilations if k <= t]
        if self.past_cache:
            size = PAST_CACHE_BYTES["cpu" if self.device.type == "cpu" else "other"]
            steps = max(self.steps)
            batch = -(-size // (steps * self.channels * self.length * 4))
            grid.append((steps, self.orders[0], 1, batch))
        return sorted(grid, key=lambda cell: (-cell[0] * cell[3], cell[1:3]))


Run = Callable[[], object]


def step(module: torch.nn.Module, x: torch.Tensor, grad: torch.Tensor, reset: Run | None = None) -> Run:
    """Forward and backward in training; every gradient is fresh, as after ``zero_grad``."""
    leaves = [x, *module.parameters()]

    def run() -> None:
        for leaf in leaves:
            leaf.grad = None
        module(x).backward(grad)
        if reset is not None:
            reset()

    return run


def forward(module: torch.nn.Module, x: torch.Tensor, training: bool) -> Run:
    """Forward alone: in training it keeps what backward needs, in evaluation nothing."""
    module.train(training)

    def run() -> None:
        with torch.set_grad_enabled(training):
            module(x)

    return run


class Cell:
    """One cell of the grid: its tensors, its variants, and those of them that could not be made."""

    def __init__(self, settings: Settings, compiler: Compiler, cell: tuple[int, int, int, int]) -> None:
        self.settings, self.compiler = settings, compiler
        self.steps, self.order, self.dilation, self.batch = cell
        device = settings.device
        shape = (self.steps, self.batch, settings.channels, settings.length)
        self.x = torch.randn(shape, device=device, requires_grad=True)
        self.grad = torch.randn(shape, device=device)
        self.variants: dict[tuple[str, str], Run] = {}
        self.errors: dict[tuple[str, str], str] = {}
        problem = Problem(shape, Layout.TIME_FIRST, self.x.dtype, device.type, self.order, self.dilation)
        allowed = [k for k in kernels("time_first") if not settings.kernels or k.name in settings.kernels]
        refusals = {k.name: k.refusal(problem) for k in allowed}
        self.ours = [name for name, reason in refusals.items() if reason is None]
        self.errors |= {(STEP, name): reason for name, reason in refusals.items() if reason is not None}

    def neuron(self, kernel: str) -> mfpsn_fx.MulFreePSN:
        module = mfpsn_fx.MulFreePSN(self.settings.channels, self.order, self.dilation, device=self.settings.device)
        module.bind(kernel=kernel, eval_kernel=kernel)
        return module

    def add(self, name: str, module: torch.nn.Module, compiled: bool = True, reset: bool = False) -> None:
        """Training steps of ``module``, eager and, if the budget allows, compiled."""
        module = module.to(self.settings.device)
        forget = (lambda: rivals.reset(module)) if reset else None
        self.variants[STEP, name] = step(module, self.x, self.grad, forget)
        if compiled:
            self._add_compiled(STEP, name, module, lambda m: step(m, self.x, self.grad, forget))

    def _add_compiled(self, measure: str, name: str, module: torch.nn.Module, make: Callable) -> None:
        made = lambda: make(self.compiler.compile(module))  # noqa: E731
        self.compiler.add((measure, name + COMPILED), made, self.variants, self.errors)

    def fill(self) -> None:
        """All variants, the ones that are wanted most compiled first."""
        data, x = self.x.detach(), self.x
        for measure in BUDGET:
            self.variants[measure, "clone"] = data.clone
        if not rivals.MISSING:
            self.add("PSN", rivals.psn(self.steps))
            self.variants[EVAL, "PSN"] = forward(rivals.psn(self.steps).to(x.device), data, False)
            self.variants[FORWARD, "PSN"] = forward(rivals.psn(self.steps).to(x.device), x, True)
        for name in self.ours:
            self.add(name, self.neuron(name), compiled=False)
            self.variants[FORWARD, name] = forward(self.neuron(name), x, True)
            self.variants[EVAL, name] = forward(self.neuron(name), data, False)
        if self.ours:
            self._compile_best(data)
        if not rivals.MISSING:
            self.add("SlidingPSN", rivals.sliding_psn(self.order))
        self.add(VANILLA, VanillaMulFreePSN(self.settings.channels, self.order, self.dilation))
        if not rivals.MISSING:
            self.add("LIF", rivals.lif(), reset=True)

    def _compile_best(self, data: torch.Tensor) -> None:
        """Of ours only the kernel that is fastest here, which autoselect would bind, is compiled."""
        if self.compiler.refusal() is None:
            trial = interleave(
                {n: self.variants[STEP, n] for n in self.ours}, self.settings.device, seconds=0.0, least=2
            )
            best = min(trial.ms, key=trial.ms.get, default=self.ours[0])
        else:
            best = self.ours[0]
        self._add_compiled(STEP, best, self.neuron(best), lambda m: step(m, self.x, self.grad))
        self._add_compiled(EVAL, best, self.neuron(best).eval(), lambda m: forward(m, data, False))
        for key in [key for key in self.errors if key[1] == best + COMPILED]:
            self.errors[key[0], "ours" + COMPILED] = self.errors.pop(key)

    def measured(self) -> dict[str, object]:
        """Milliseconds by measure and variant, rounds and spread of the steps, and what could not be measured."""
        found = {measure: self._interleaved(measure) for measure in BUDGET}
        errors = self.errors | {(measure, n): why for measure, one in found.items() for n, why in one.errors.items()}
        size = self.x.numel() * self.x.element_size()
        return {
            "T": self.steps, "k": self.order, "d": self.dilation, "N": self.batch, "C": self.settings.channels,
            "L": self.settings.length, "bytes": size, "past_cache": self.batch != self.settings.batch,
            "rounds": found[STEP].rounds, "spread": found[STEP].spread, "ours": self.ours,
            "ms": {measure: one.ms for measure, one in found.items()},
            "errors": {f"{name}, {measure}": why for (measure, name), why in errors.items()},
        }  # fmt: skip

    def _interleaved(self, measure: str) -> Timing:
        """Of one measure, with its own ``clone``: in the time of one round of steps a forward can be run many times."""
        variants = {name: run for (of, name), run in self.variants.items() if of == measure}
        return interleave(variants, self.settings.device, self.settings.seconds, self.settings.rounds)


def derived(cell: dict) -> dict:
    """``cell`` with what follows from its times: ratios to PSN, passes, shares of the budget, the best of ours."""
    times = cell["ms"][STEP]
    ours = {name: times[name] for name in cell["ours"] if name in times}
    psn = {name: times[name] for name in ("PSN", "PSN" + COMPILED) if name in times}
    cell["best_ours"] = min(ours, key=ours.get) if ours else None
    cell["best_psn"] = min(psn, key=psn.get) if psn else None
    cell["ratio_to_psn"] = {n: ms / psn["PSN"] for n, ms in times.items()} if "PSN" in psn else {}
    cell["passes"], cell["share"] = {}, {}
    for measure, budget in BUDGET.items():
        unit = cell["ms"][measure].get("clone", 0) / 2
        names = [n for n in cell["ms"][measure] if n.removesuffix(COMPILED) in cell["ours"]]
        cell["passes"][measure] = {n: cell["ms"][measure][n] / unit for n in names}
        cell["share"][measure] = {n: budget / passes for n, passes in cell["passes"][measure].items()}
    return cell


def fused(cells: list[dict]) -> list[str]:
    """Our fused kernels among those measured, all kernels if none is."""
    names = list(dict.fromkeys(name for cell in cells for name in cell["ours"]))
    return [name for name in names if name.startswith("fused")] or names


def summary(cells: list[dict]) -> dict[str, object]:
    """Geometric means over the cells: the best fused kernel of each cell against PSN and the vanilla module."""
    names, ratios = fused(cells), {}
    for cell in cells:
        times = cell["ms"][STEP]
        best = min((times[name] for name in names if name in times), default=None)
        for rival in ("PSN", VANILLA):
            eager, compiled = times.get(rival), times.get(rival + COMPILED)
            if best is None or eager is None:
                continue
            ratios.setdefault(rival, []).append(best / eager)
            if compiled is not None:
                label = f"the better of {rival} eager and compiled"
                ratios.setdefault(label, []).append(best / min(eager, compiled))
    return {
        "fused": names,
        "ours_to": {label: geometric_mean(values) for label, values in ratios.items()},
        "cells_of": {label: len(values) for label, values in ratios.items()},
        "slower_than_PSN": sum(r > 1 for r in ratios.get("PSN", [])),
        "cells": len(cells),
    }


def measure(settings: Settings, progress: bool | None = None, keep=lambda found: None) -> dict[str, object]:
    """Run the whole grid; what ``--json`` writes, after each cell: a run that is cut short keeps what it measured."""
    compiler = Compiler(settings.compile_seconds)
    torch.manual_seed(0)
    previous = None

    def found(cells: list[dict]) -> dict[str, object]:
        cells = sorted(cells, key=lambda c: (c["past_cache"], c["T"], c["k"], c["d"]))
        return {
            "environment": environment(settings.device),
            "measures": BUDGET,
            "compile_seconds": compiler.spent,
            "missing": rivals.MISSING,
            "cells": cells,
            "summary": summary(cells),
        }

    def one(shape: tuple[int, int, int, int]) -> dict:
        nonlocal previous
        if previous != (shape[0], shape[3]):
            torch._dynamo.reset()
            previous = (shape[0], shape[3])
        cell = Cell(settings, compiler, shape)
        cell.fill()
        return derived(cell.measured())

    # 64: one module is compiled at up to 6 pairs of order and dilation, in training and in evaluation
    with torch._dynamo.config.patch(recompile_limit=64):
        label = lambda shape: "T = {}, k = {}, d = {}, N = {}".format(*shape)  # noqa: E731
        return found(each(settings.cells(), one, label, progress, lambda some: keep(found(some))))


def _compiled_of_ours(times: dict[str, float], ours: list[str]) -> float | None:
    return min((times[n + COMPILED] for n in ours if n + COMPILED in times), default=None)


def tables(found: dict) -> str:
    """The results in Markdown: ratios to PSN, then passes and shares of the budget."""
    cells, names = found["cells"], list(dict.fromkeys(n for c in found["cells"] for n in c["ours"]))
    others = [n for n in ("SlidingPSN", "LIF", VANILLA) if any(n in c["ms"][STEP] for c in cells)]
    base = "PSN" if any("PSN" in c["ms"][STEP] for c in cells) else "clone"
    pairs = {name: (name, name + COMPILED) for name in others}  # eager and compiled share a column
    columns: dict[str, Callable[[dict], list[float | None]]] = {}
    if any("PSN" + COMPILED in c["ms"][STEP] for c in cells):
        columns["PSN" + COMPILED] = lambda c: [c["ms"][STEP].get("PSN" + COMPILED)]
    for name, pair in pairs.items():
        both = pair if any(pair[1] in c["ms"][STEP] for c in cells) else pair[:1]
        columns[" / ".join([name, "compiled"][: len(both)])] = lambda c, both=both: [c["ms"][STEP].get(n) for n in both]
    for name in names:
        columns[name] = lambda c, name=name: [c["ms"][STEP].get(name)]
    if any(_compiled_of_ours(c["ms"][STEP], c["ours"]) is not None for c in cells):
        columns["best of ours" + COMPILED] = lambda c: [_compiled_of_ours(c["ms"][STEP], c["ours"])]
    rows = []
    for cell in cells:
        unit = cell["ms"][STEP].get(base)
        values = [" / ".join(ratio(value, unit) for value in column(cell)) for column in columns.values()]
        rows.append([*_place(cell), three(unit) if unit else "–", *values])
    means = []
    for column in columns.values():
        series = zip(*(
            [None if value is None or base not in c["ms"][STEP] else value / c["ms"][STEP][base] for value in column(c)]
            for c in cells
        ), strict=True)  # fmt: skip
        means.append(" / ".join(three(geometric_mean(v for v in values if v is not None)) for values in series))
    rows.append(["geometric mean", "", "", "", *means])
    headers = ["T", "k", "d", f"{base} ms", *columns]
    shape = f"(T, N, C, L) = (T, {cells[0]['N']}, {cells[0]['C']}, {cells[0]['L']}), float32" if cells else ""
    parts = [
        f"Forward and backward in training, time as a ratio to that of {base} (below 1 is faster); {shape}.",
        markdown_table(headers, rows),
        "\n".join(conclusions(found)),
        "Passes over a tensor the size of X, a `clone` being 2, and the share of the budget reached (8 passes forward "
        "and backward, 3 forward in training, 2 in evaluation), of the fastest kernel of ours in each cell:",
        markdown_table(
            [
                "T",
                "k",
                "d",
                "kernel",
                "clone ms",
                *(f"{name}{what}" for name in BUDGET for what in (", passes", ", share")),
            ],
            [_passes(cell) for cell in cells],
        ),
    ]
    return "\n\n".join(part for part in parts if part)


def _place(cell: dict) -> list[object]:
    return [f"{cell['T']}, N = {cell['N']}" if cell["past_cache"] else cell["T"], cell["k"], cell["d"]]


def _passes(cell: dict) -> list[object]:
    best = cell["best_ours"]
    row = [*_place(cell), best]
    row.append(f"{cell['ms'][STEP]['clone']:.3f}")
    for name in BUDGET:
        passes = cell["passes"][name].get(best)
        row += ["–", "–"] if passes is None else [three(passes), f"{cell['share'][name][best]:.0%}"]
    return row


def conclusions(found: dict) -> list[str]:
    """The geometric means in words, and what is missing from the tables and why."""
    total, lines = found["summary"], []
    if total["ours_to"]:
        names = ", ".join(total["fused"])
        means = "; ".join(
            f"{three(value)} of {label} ({total['cells_of'][label]} cells)" for label, value in total["ours_to"].items()
        )
        lines.append(f"Geometric means of the time of the fastest of {names} in each cell: {means}.")
        if "PSN" in total["ours_to"]:
            lines.append(f"Slower than PSN in {total['slower_than_PSN']} of {total['cells']} cells.")
    rounds = [cell["rounds"] for cell in found["cells"]]
    if rounds:
        spread = statistics.median(cell["spread"] for cell in found["cells"])
        lines.append(f"Medians of {min(rounds)} or more interleaved rounds; their middle half spans {spread:.0%}.")
    if found["missing"]:
        lines.append(f"{found['missing']}.")
    return lines


def failures(found: dict):
    for cell in found["cells"]:
        yield from cell["errors"].items()


def draw(found: dict, path) -> None:
    """Time as a ratio to PSN by cell, on a logarithmic axis."""
    plt = pyplot()
    cells = [cell for cell in found["cells"] if cell["ratio_to_psn"]]
    if not cells:
        print("nothing to draw: without PSN there is no ratio to it")
        return
    style = {"LIF": ("tab:gray", "s"), "SlidingPSN": ("tab:olive", "D"), VANILLA: ("tab:red", "^"),
             "PSN" + COMPILED: ("black", "x")}  # fmt: skip
    names = [name for name in style if any(name in cell["ratio_to_psn"] for cell in cells)]
    ours = fused(cells)
    palette = ["tab:blue", "tab:cyan", "tab:purple", "tab:green", "tab:orange", "tab:pink", "tab:brown"]
    style |= {name: (palette[i % len(palette)], "o") for i, name in enumerate(ours)}
    figure, axes = plt.subplots(figsize=(10, 4.2), layout="constrained")
    for name in names + ours:
        points = [(i, cell["ratio_to_psn"][name]) for i, cell in enumerate(cells) if name in cell["ratio_to_psn"]]
        color, marker = style[name]
        axes.plot(*zip(*points, strict=True), marker, color=color, label=name, ms=6 if name in ours else 4.5)
    axes.axhline(1, color="black", lw=1)
    axes.text(-0.7, 1.04, "PSN", va="bottom", ha="left", fontsize=8)
    groups = [(cell["T"], cell["past_cache"]) for cell in cells]
    for i in range(1, len(cells)):
        if groups[i] != groups[i - 1]:
            axes.axvline(i - 0.5, color="0.85", lw=1)
    for group in dict.fromkeys(groups):
        places = [i for i, other in enumerate(groups) if other == group]
        label = f"T = {group[0]}" + ("\npast cache" if group[1] else "")
        where = (sum(places) / len(places), -0.215)
        axes.annotate(label, where, xycoords=("data", "axes fraction"), ha="center", va="top")
    axes.set_xticks(range(len(cells)), [f"k={cell['k']} d={cell['d']}" for cell in cells], rotation=90, fontsize=7)
    axes.set(yscale="log", xlim=(-0.8, len(cells) - 0.2), ylabel="time / PSN's time (lower is faster)",
             title="One neuron layer, forward and backward in training")  # fmt: skip
    plain_ticks(axes.yaxis)
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)
    axes.legend(ncols=len(names + ours), loc="upper center", bbox_to_anchor=(0.5, -0.31), frameon=False)
    save(figure, path)


def extend(parser) -> None:
    parser.add_argument("--no-past-cache", action="store_true", help="leave out the tensors past the last-level cache")
    parser.add_argument("--march", metavar="LEVEL", help="as on a processor of this level, such as x86-64-v3")


def check(parser, options, settings: Settings) -> None:
    if options.march:
        restart_for(options.march, __file__, options.argv)
    if options.no_past_cache:
        settings.past_cache = False
    check_kernels(parser, settings.kernels)
    if not settings.cells():
        parser.error("the grid is empty: orders above T are left out")


BENCHMARK = Benchmark(
    __file__,
    __doc__,
    "One neuron layer",
    Settings,
    measure,
    tables,
    options={
        "kernels": "of ours, only these", "steps": "restrict the grid to these", "orders": "restrict the grid to these",
        "dilations": "restrict the grid to these", "batch": "", "channels": "", "length": "",
    },
    quick={"orders": (2,), "dilations": (1,), "past_cache": False, "seconds": 1.0, "compile_seconds": 0.0},
    accelerator={"seconds": 1.0},
    failures=failures,
    draw=draw,
    missing=lambda: rivals.MISSING,
    extend=extend,
    check=check,
)  # fmt: skip
main = BENCHMARK.main

if __name__ == "__main__":
    sys.exit(not main()["cells"])  # nothing measured is a failure
