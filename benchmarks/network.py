"""Training steps of the paper's sequential-CIFAR network on random data, with each kind of neuron.

Run with ``python benchmarks/network.py [--device cuda] [--quick] [--json FILE] [--markdown FILE] [--png FILE]``. A step
is forward, cross entropy, backward and AdamW on one batch. Variants are interleaved in one run, and medians reported.
Convolutions dominate on a CPU, so the same network without neurons is measured as well: what a step takes beyond that
is the neurons' share.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import sys
from collections.abc import Callable

import checkout  # noqa: F401  (first: it makes mfpsn_fx importable from a bare checkout)
import rivals
import torch
from runner import (
    Benchmark,
    Compiler,
    Timing,
    each,
    environment,
    geometric_mean,
    interleave,
    load_example,
    markdown_table,
    plain_ticks,
    pyplot,
    ratio,
    save,
    three,
)
from torch import nn
from torch.nn import functional as F
from vanilla import VanillaMulFreePSN

import mfpsn_fx
from mfpsn_fx.kernels import kernels
from mfpsn_fx.passes import Example, FuseNorms, PassContext, Pipeline, PropagateShapes, neurons

sequential_cifar = load_example("networks").sequential_cifar

BARE, OURS, VANILLA, COMPILED = "no neurons", "ours", "vanilla module", " compiled"
FOLDED = "ours, BN folded"
ORDER = 2
SAWTOOTH = (1, 2, 3)  # dilations, in the order of the layers (paper, equation 11)
_PLANNED = 256  # steps times batch at which kernels are chosen on a CPU: autoselect times slow ones too


@dataclasses.dataclass
class Settings:
    """What is trained, and how long to measure: ``seconds`` a T beyond ``rounds`` rounds."""

    device: torch.device = dataclasses.field(default_factory=lambda: torch.device("cpu"))
    steps: tuple[int, ...] = (2, 4, 8, 16, 32)
    batch: int = 128
    channels: int = 128
    classes: int = 100
    kernel: str = "auto"
    rounds: int = 3
    seconds: float = 12.0
    compile_seconds: float = 120.0


def training_step(model: nn.Module, x: torch.Tensor, y: torch.Tensor, reset: bool) -> Callable[[], None]:
    """One step of AdamW on the batch (x, y)."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def run() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        if reset:
            rivals.reset(model)

    return run


def ours(settings: Settings, x: torch.Tensor) -> nn.Module:
    """The network with our neurons, a kernel chosen for each, and batch norms as the layers that they are."""
    dilations = itertools.cycle(SAWTOOTH)
    source = build(settings, lambda channels: mfpsn_fx.MulFreePSN(channels, ORDER, next(dilations)))
    if settings.device.type == "cpu":
        x = x[:, : max(1, _PLANNED // x.shape[0])]
    # time-first: the convolutions want it, and conversions are not what is measured here
    return mfpsn_fx.convert(
        source, x, order=ORDER, layout="time_first", kernels=settings.kernel, fold_norms=False, repeats=3,
        progress=False,
    )  # fmt: skip


def folded(model: nn.Module, x: torch.Tensor) -> nn.Module:
    """A copy of ``model`` whose neurons apply the batch norms in front of them on load; kernels as they are."""
    pipeline = Pipeline([PropagateShapes(), FuseNorms()], given=("neurons",))
    found = pipeline(copy.deepcopy(model), PassContext(Example((x[:, :2],))))
    found.meta.clear()
    return found


def build(settings: Settings, make_neuron: Callable[[int], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return sequential_cifar(make_neuron, settings.classes, settings.channels).to(settings.device)


def variants(settings: Settings, x: torch.Tensor) -> dict[str, nn.Module]:
    """The network with each kind of neuron."""
    steps, dilations = x.shape[0], itertools.cycle(SAWTOOTH)
    made = {
        BARE: build(settings, lambda _: nn.Identity()),
        OURS: (model := ours(settings, x)),
        FOLDED: folded(model, x),
        VANILLA: build(settings, lambda channels: VanillaMulFreePSN(channels, ORDER, next(dilations))),
    }
    if not rivals.MISSING:
        made |= {
            "PSN": build(settings, lambda _: rivals.psn(steps)),
            "SlidingPSN": build(settings, lambda _: rivals.sliding_psn(ORDER)),
            "LIF": build(settings, lambda _: rivals.lif()),
        }
    return made


def measure_steps(settings: Settings, compiler: Compiler, steps: int) -> dict[str, object]:
    """All variants at one T."""
    device = settings.device
    x = torch.rand(steps, settings.batch, 3, 32, device=device)
    y = torch.randint(settings.classes, (settings.batch,), device=device)
    models = variants(settings, x)
    runs = {name: training_step(model, x, y, reset=name == "LIF") for name, model in models.items()}
    errors: dict[str, str] = {}
    for name in (OURS, FOLDED, "PSN"):
        if name not in models:
            continue
        backend = "inductor" if name == "PSN" else mfpsn_fx.Backend()  # each at its best

        def make(model=models[name], backend=backend) -> Callable[[], None]:
            return training_step(compiler.compile(model, backend=backend), x, y, reset=False)

        compiler.add(name + COMPILED, make, runs, errors)
    found: Timing = interleave(runs, device, settings.seconds, settings.rounds)
    bare = found.ms.get(BARE)
    return {
        "T": steps,
        "batch": settings.batch,
        "rounds": found.rounds,
        "spread": found.spread,
        "ms": found.ms,
        "ratio_to_psn": {n: ms / found.ms["PSN"] for n, ms in found.ms.items()} if "PSN" in found.ms else {},
        # against the bare network in eager: for the compiled variants, whose convolutions are compiled too, a bound
        "neuron_share": {n: max(0.0, 1 - bare / ms) for n, ms in found.ms.items() if n != BARE} if bare else {},
        "kernels": [neuron.kernel for neuron in neurons(models[OURS])],
        "errors": errors | found.errors,
    }


def measure(settings: Settings, progress: bool | None = None, keep=lambda found: None) -> dict[str, object]:
    """Every T; ``--json`` is written after each. The longest come first: compiling is wanted there most."""
    compiler = Compiler(settings.compile_seconds)

    def found(results: list[dict]) -> dict[str, object]:
        ordered = sorted(results, key=lambda result: result["T"])
        means = {}
        for name in dict.fromkeys(name for result in ordered for name in result["ratio_to_psn"]):
            means[name] = geometric_mean(r["ratio_to_psn"][name] for r in ordered if name in r["ratio_to_psn"])
        return {
            "environment": environment(settings.device),
            "network": {
                "batch": settings.batch, "channels": settings.channels, "classes": settings.classes, "k": ORDER,
            },
            "compile_seconds": compiler.spent,
            "missing": rivals.MISSING,
            "results": ordered,
            "geometric_mean_to_psn": means,
        }  # fmt: skip

    def one(steps: int) -> dict[str, object]:
        torch._dynamo.reset()
        return measure_steps(settings, compiler, steps)

    longest_first = sorted(settings.steps, reverse=True)
    return found(each(longest_first, one, lambda steps: f"T = {steps}", progress, lambda some: keep(found(some))))


def tables(found: dict) -> str:
    """Ratios to PSN, the neurons' share of a step, and the kernels that were chosen, in Markdown."""
    results, shape = found["results"], found["network"]
    known = ("PSN" + COMPILED, "SlidingPSN", "LIF", VANILLA, OURS, OURS + COMPILED, FOLDED, FOLDED + COMPILED, BARE)
    names = [name for name in known if any(name in result["ms"] for result in results)]
    base = "PSN" if any("PSN" in result["ms"] for result in results) else BARE
    names = [name for name in names if name != base]
    rows = [
        [r["T"], f"{r['ms'][base]:.1f}", *(ratio(r["ms"].get(name), r["ms"][base]) for name in names), r["rounds"]]
        for r in results
    ]
    if base == "PSN":
        means = (found["geometric_mean_to_psn"].get(name) for name in names)
        rows.append(["geometric mean", "", *("–" if mean is None else three(mean) for mean in means), ""])
    kinds = [
        name for name in ("PSN", "SlidingPSN", "LIF", VANILLA, OURS, FOLDED) if any(name in r["ms"] for r in results)
    ]
    shares = [[r["T"], *(f"{r['neuron_share'][n]:.0%}" if n in r["neuron_share"] else "–" for n in kinds)]
              for r in results]  # fmt: skip
    chosen = "; ".join(f"T = {r['T']}: {', '.join(dict.fromkeys(r['kernels']))}" for r in results)
    parts = [
        f"A training step of the sequential-CIFAR network ({shape['channels']} channels, {shape['classes']} classes, "
        f"random data, batch {shape['batch']}, k = {shape['k']}), time as a ratio to that of {base} (below 1 is "
        "faster); medians over interleaved rounds, as many as the last column says.",
        markdown_table(["T", f"{base} ms", *names, "rounds"], rows),
        "Share of the step that the neurons take: what it takes beyond the same network without neurons.",
        markdown_table(["T", *kinds], shares),
        f"Kernels of ours: {chosen}." if results else "",
        f"{found['missing']}." if found["missing"] else "",
    ]
    return "\n\n".join(part for part in parts if part)


def draw(found: dict, path) -> None:
    """Time as a ratio to PSN by T, and the neurons' share of the step."""
    plt = pyplot()
    results = [result for result in found["results"] if result["ratio_to_psn"]]
    if not results:
        print("nothing to draw: without PSN there is no ratio to it")
        return
    style = {
        "PSN": ("black", "-"), "PSN" + COMPILED: ("black", ":"), "SlidingPSN": ("tab:olive", "-"),
        "LIF": ("tab:gray", "-"), VANILLA: ("tab:red", "-"), OURS: ("tab:blue", "-"),
        OURS + COMPILED: ("tab:blue", ":"), FOLDED: ("tab:green", "-"), FOLDED + COMPILED: ("tab:green", ":"),
    }  # fmt: skip
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    steps = [result["T"] for result in results]
    for name, (color, line) in style.items():
        for axes, key in ((left, "ratio_to_psn"), (right, "neuron_share")):
            points = [(r["T"], r[key][name]) for r in results if name in r[key]]
            if points and not (axes is right and name.endswith(COMPILED)):
                axes.plot(*zip(*points, strict=True), line, color=color, marker="o", ms=4, label=name)
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(steps, [str(t) for t in steps])
        axes.set_xlabel("T")
        axes.grid(color="0.9")
        axes.set_axisbelow(True)
    left.set(yscale="log", ylabel="time of a step / PSN's (lower is faster)")
    plain_ticks(left.yaxis, "235")
    right.set(ylabel="neurons' share of the step", ylim=(0, 1))
    right.yaxis.set_major_formatter(plt.FuncFormatter(lambda value, _: f"{value:.0%}"))
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=7, frameon=False)
    figure.suptitle("Sequential-CIFAR network, one training step")
    save(figure, path)


def failures(found: dict):
    for result in found["results"]:
        for name, reason in result["errors"].items():
            yield f"T = {result['T']}, {name}", reason


def check(parser, options, settings: Settings) -> None:
    known = [kernel.name for kernel in kernels("time_first")]
    if settings.kernel != "auto" and settings.kernel not in known:
        parser.error(f"unknown time-first kernel {settings.kernel}; there are {', '.join(known)}")


BENCHMARK = Benchmark(
    __file__,
    __doc__,
    "A training step of the sequential-CIFAR network",
    Settings,
    measure,
    tables,
    options={
        "kernel": "of ours, for all layers; default: chosen by autoselect", "steps": "T, restricted to these",
        "batch": "", "channels": "",
    },
    quick={"steps": (4,), "batch": 16, "seconds": 2.0, "compile_seconds": 0.0},
    accelerator={"rounds": 7, "seconds": 2.0},
    failures=failures,
    draw=draw,
    missing=lambda: rivals.MISSING,
    check=check,
)  # fmt: skip
main = BENCHMARK.main

if __name__ == "__main__":
    sys.exit(not main()["results"])  # nothing measured is a failure
