"""Training steps of SpikingJelly's SEW-ResNet-18, eager and compiled: does compiling pay, neurons and all?

Run with ``python benchmarks/compiled.py [--device cuda] [--quick] [--json FILE] [--markdown FILE]``. Users have met
networks of this kind that were slower compiled than eager, since Inductor lays convolutions out channels last and
converts around what stands between them. Measured are the network as SpikingJelly has it, converted, and without its
neurons: in eager mode, under Inductor's own settings, and under the backend ``mfpsn_fx`` (for what has no neuron of
ours: under Inductor with the one setting that the backend changes). All are interleaved, and medians reported.
"""

from __future__ import annotations

import copy
import dataclasses

import checkout  # noqa: F401  (first: it makes mfpsn_fx importable from a bare checkout)
import torch
from layout import training_step
from runner import Benchmark, Compiler, each, environment, interleave, load_example, markdown_table, ratio
from torch import nn

import mfpsn_fx
from mfpsn_fx.passes import neurons

try:
    spikingjelly = load_example("compatibility/spikingjelly_networks")
except ImportError as error:
    raise SystemExit(f"SpikingJelly's networks are measured here: it cannot be imported ({error})") from None

CLASSES = 10
OURS, SOURCE, BARE = "ours", "SpikingJelly's LIF", "no neurons"
EAGER, INDUCTOR, KEPT, BACKEND = "eager", "Inductor", "Inductor, layout_optimization=False", "backend mfpsn_fx"
WAYS = {
    OURS: {INDUCTOR: {}, BACKEND: {"backend": "mfpsn_fx"}},
    SOURCE: {INDUCTOR: {}, KEPT: {"options": {"layout_optimization": False}}},
    BARE: {INDUCTOR: {}, KEPT: {"options": {"layout_optimization": False}}},
}


@dataclasses.dataclass
class Settings:
    """What is trained, and how long to measure: ``seconds`` a batch size beyond ``rounds`` rounds."""

    device: torch.device = dataclasses.field(default_factory=lambda: torch.device("cpu"))
    steps: int = 4
    batches: tuple[int, ...] = (2, 16)
    size: int = 32
    rounds: int = 7
    seconds: float = 20.0
    compile_seconds: float = 900.0


def source() -> nn.Module:
    torch.manual_seed(0)
    build = spikingjelly.sew_resnet.sew_resnet18
    return spikingjelly.multi_step(build, **(spikingjelly.LIF | {"num_classes": CLASSES, "cnf": "ADD"}))()


def without_neurons(net: nn.Module) -> nn.Module:
    for parent in list(net.modules()):
        for name, child in parent.named_children():
            if isinstance(child, spikingjelly.neuron.BaseNode):
                setattr(parent, name, nn.Identity())
    return net


def measure_batch(settings: Settings, compiler: Compiler, batch: int) -> dict[str, object]:
    """All networks at one batch size, eager and compiled."""
    torch._dynamo.reset()
    x = torch.rand(settings.steps, batch, 3, settings.size, settings.size, device=settings.device)
    y = torch.randint(CLASSES, (batch,), device=settings.device)
    ours = mfpsn_fx.convert(source().to(settings.device), x, layout="time_first", progress=False)
    nets = {OURS: ours, SOURCE: source(), BARE: without_neurons(source())}
    runs, errors = {}, {}
    for name, net in nets.items():
        net = net.to(settings.device).train()
        runs[name, EAGER] = _step(net, net, x, y)
        for way, options in WAYS[name].items():

            def make(net=net, options=options):
                twin = copy.deepcopy(net)
                return _step(twin, compiler.compile(twin, **options), x, y)

            compiler.add((name, way), make, runs, errors)
    found = interleave(runs, settings.device, settings.seconds, settings.rounds)
    return {
        "input": list(x.shape),
        "rounds": found.rounds,
        "spread": found.spread,
        "ms": {name: {way: found.ms[n, way] for n, way in found.ms if n == name} for name in nets},
        "kernels": sorted({neuron.kernel for neuron in neurons(ours)}),
        "errors": {", ".join(key): reason for key, reason in (errors | found.errors).items()},
    }


def _step(net: nn.Module, run, x: torch.Tensor, y: torch.Tensor):
    step = training_step(net, run, x, y)

    def with_reset() -> None:
        step()
        spikingjelly.functional.reset_net(net)

    return with_reset


def measure(settings: Settings, progress: bool | None = None, keep=None) -> dict[str, object]:
    """Every batch size; what ``--json`` writes."""
    compiler = Compiler(settings.compile_seconds)
    results = each(
        settings.batches, lambda batch: measure_batch(settings, compiler, batch), lambda batch: f"N = {batch}", progress
    )
    return {"environment": environment(settings.device), "compile_seconds": compiler.spent, "results": results}


def table(found: dict) -> str:
    """Ratios to eager mode, in Markdown."""
    rows = [
        [
            "×".join(map(str, result["input"])),
            name,
            f"{ms[EAGER]:.1f}",
            ratio(ms.get(INDUCTOR), ms[EAGER]),
            ratio(ms.get(BACKEND, ms.get(KEPT)), ms[EAGER]),
            result["rounds"],
            f"{result['spread']:.0%}",
        ]
        for result in found["results"]
        for name, ms in result["ms"].items()
        if EAGER in ms
    ]
    headers = ["input", "network", "eager ms", INDUCTOR, "the backend, or its setting", "rounds", "spread"]
    return (
        "A training step of SEW-ResNet-18, compiled, as a ratio to the same in eager mode (below 1 is faster); medians "
        f"over interleaved rounds.\n\n{markdown_table(headers, rows)}"
    )


def failures(found: dict):
    for result in found["results"]:
        for name, reason in result["errors"].items():
            yield f"N = {result['input'][1]}, {name}", reason


BENCHMARK = Benchmark(
    __file__,
    __doc__,
    "SEW-ResNet-18, eager and compiled",
    Settings,
    measure,
    table,
    options={"batches": "N", "steps": "", "size": "", "rounds": ""},
    quick={"batches": (2,), "rounds": 3, "seconds": 2.0, "compile_seconds": 0.0},
    failures=failures,
)
main = BENCHMARK.main

if __name__ == "__main__":
    main()
