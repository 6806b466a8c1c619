"""Training steps of SpikingJelly's SEW-ResNet-18, eager and compiled: does compiling pay, neurons and all?

Run with ``python benchmarks/compiled.py [--device cuda] [--quick] [--json FILE] [--markdown FILE]``. Users have met
networks of this kind that were slower compiled than eager, since Inductor lays convolutions out channels last and
converts around what stands between them. Measured are the network as SpikingJelly has it, converted, and without its
neurons: in eager mode, under Inductor's own settings, and under the backend ``mfpsn_fx`` (for what has no neuron of
ours: under Inductor with the one setting that the backend changes). All are interleaved, and medians reported.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import sys

import checkout  # noqa: F401  (first: it makes mfpsn_fx importable from a bare checkout)
import torch
from common import (
    Compiler,
    checked_device,
    environment,
    first_line,
    interleave,
    load_example,
    markdown_table,
    output_options,
    preamble,
    ratio,
    write,
)
from layout import training_step
from torch import nn
from tqdm import tqdm

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
            if (reason := compiler.refusal()) is None:
                twin = copy.deepcopy(net)
                step = _step(twin, compiler.compile(twin, **options), x, y)
                reason = compiler.warm(step)
            if reason is None:
                runs[name, way] = step
            else:
                errors[f"{name}, {way}"] = reason
    found = interleave(runs, settings.device, settings.seconds, settings.rounds)
    return {
        "input": list(x.shape),
        "rounds": found.rounds,
        "spread": found.spread,
        "ms": {name: {way: found.ms[n, way] for n, way in found.ms if n == name} for name in nets},
        "kernels": sorted({neuron.kernel for neuron in neurons(ours)}),
        "errors": errors | {", ".join(key): reason for key, reason in found.errors.items()},
    }


def _step(net: nn.Module, run, x: torch.Tensor, y: torch.Tensor):
    step = training_step(net, run, x, y)

    def with_reset() -> None:
        step()
        spikingjelly.functional.reset_net(net)

    return with_reset


def measure(settings: Settings, progress: bool | None = None) -> dict[str, object]:
    """Every batch size; what ``--json`` writes."""
    compiler, results = Compiler(settings.compile_seconds), []
    for batch in tqdm(settings.batches, desc="N", disable=None if progress is None else not progress):
        try:
            results.append(measure_batch(settings, compiler, batch))
        except (RuntimeError, MemoryError) as error:  # such as out of memory: the others still count
            print(f"N = {batch}: {first_line(error)}")
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


def parsed(argv: list[str]) -> tuple[argparse.Namespace, Settings]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    output_options(parser, png=False)
    parser.add_argument("--batches", type=int, nargs="+", help="N")
    for name in ("steps", "size", "rounds"):
        parser.add_argument(f"--{name}", type=int, help=f"default {getattr(Settings, name)}")
    options = parser.parse_args(argv)
    settings = Settings(checked_device(options.device))
    if options.quick:
        settings.batches, settings.rounds, settings.seconds, settings.compile_seconds = (2,), 3, 2.0, 0.0
    for name in ("steps", "size", "rounds", "seconds", "compile_seconds"):
        if getattr(options, name) is not None:
            setattr(settings, name, getattr(options, name))
    settings.batches = tuple(options.batches or settings.batches)
    return options, settings


def main(argv: list[str] | None = None) -> dict[str, object]:
    argv = sys.argv[1:] if argv is None else argv
    options, settings = parsed(argv)
    found = measure(settings)
    found["made_by"] = preamble("compiled.py", argv, found["environment"])
    text = f"{found['made_by']}\n\n{table(found)}"
    print(text)
    for result in found["results"]:
        for name, reason in result["errors"].items():
            print(f"not measured ({reason}): N = {result['input'][1]}, {name}")
    write(options.json, found)
    write(options.markdown, "# SEW-ResNet-18, eager and compiled\n\n" + text)
    return found


if __name__ == "__main__":
    main()
