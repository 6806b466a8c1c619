"""Training steps of whole networks under each layout rule: all time-first, all time-last, uniform, planned.

Run with ``python benchmarks/layout.py [--device cuda] [--quick] [--json FILE] [--markdown FILE] [--png FILE]``. A step
is forward, cross entropy, backward and SGD on one batch of random data, in eager mode and compiled by the backend
``mfpsn_fx``, which keeps what was chosen. The rules start from the same weights, kernels are chosen under each, all are
interleaved in one run, and medians are reported.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable

import checkout  # noqa: F401  (first: it makes mfpsn_fx importable from a bare checkout)
import torch
from runner import (
    Benchmark,
    Compiler,
    each,
    environment,
    first_line,
    geometric_mean,
    interleave,
    load_example,
    markdown_table,
    pyplot,
    ratio,
    save,
    three,
)
from torch import nn
from torch.nn import functional as F

import mfpsn_fx
from mfpsn_fx.passes import conversion_nodes, neurons

try:
    spikingjelly = load_example("compatibility/spikingjelly_networks")
    MISSING = ""
except ImportError as error:
    spikingjelly, MISSING = None, f"SpikingJelly's networks are missing: it cannot be imported ({error})"

RULES = {"time-first": "time_first", "time-last": "time_last", "uniform": "uniform", "planned": "auto"}
BASE, COMPILED = "time-first", " compiled"
CLASSES = 10
SAWTOOTH = (1, 2, 3)


@dataclasses.dataclass
class Settings:
    """What is trained, and how long to measure: ``seconds`` a network beyond ``rounds`` rounds."""

    device: torch.device = dataclasses.field(default_factory=lambda: torch.device("cpu"))
    networks: tuple[str, ...] = ()  # () for all
    rules: tuple[str, ...] = tuple(RULES)
    steps: int = 4
    batch: int = 8
    size: int = 32
    channels: int = 128
    repeats: int = 5
    rounds: int = 7
    seconds: float = 30.0
    compile_seconds: float = 1200.0


def _resnet() -> nn.Module:
    return _spikingjelly(spikingjelly.spiking_resnet.spiking_resnet18)


def _vgg() -> nn.Module:
    return _spikingjelly(spikingjelly.spiking_vgg.spiking_vgg11_bn)


def _spikingjelly(build: Callable[..., nn.Module]) -> nn.Module:
    return spikingjelly.multi_step(build, **(spikingjelly.LIF | {"num_classes": CLASSES}))()


def _images(settings: Settings) -> torch.Tensor:
    return torch.rand(settings.steps, settings.batch, 3, settings.size, settings.size)


def _spikformer(settings: Settings) -> nn.Module:
    # patches of a fourth of what the model takes for ImageNet, width and depth of a small one
    arguments = {"img_size_h": settings.size, "img_size_w": settings.size, "patch_size": 4, "num_classes": CLASSES,
                 "embed_dims": 64, "num_heads": 4, "depths": 2}  # fmt: skip
    return spikingjelly.multi_step(spikingjelly.model.Spikformer, **arguments)()


def _sequential_cifar(settings: Settings) -> nn.Module:
    dilations = itertools.cycle(SAWTOOTH)
    build = load_example("networks").sequential_cifar
    return build(lambda channels: mfpsn_fx.MulFreePSN(channels, 2, next(dilations)), CLASSES, settings.channels)


# name -> (network, input); (T, N, …) → (T, N, classes) or (N, classes)
NETWORKS: dict[str, tuple[Callable[[Settings], nn.Module], Callable[[Settings], torch.Tensor]]] = {
    "sequential CIFAR": (_sequential_cifar, lambda settings: torch.rand(32, settings.batch, 3, 32)),
}
if spikingjelly is not None:
    NETWORKS |= {
        "spiking ResNet-18": (lambda settings: _resnet(), _images),
        "spiking VGG-11": (lambda settings: _vgg(), _images),
        "Spikformer": (_spikformer, _images),
    }


def training_step(model: nn.Module, run: Callable, x: torch.Tensor, y: torch.Tensor) -> Callable[[], None]:
    """One step of SGD on the batch (x, y); ``run`` is the model or what it was compiled to."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def step() -> None:
        optimizer.zero_grad()
        scores = run(x)
        F.cross_entropy(scores.mean(0) if scores.ndim == 3 else scores, y).backward()
        optimizer.step()

    return step


def measure_network(settings: Settings, compiler: Compiler, name: str) -> dict[str, object]:
    """One network under all rules, eager and compiled."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    build, example = NETWORKS[name]
    source, x = build(settings).to(settings.device), example(settings).to(settings.device)
    y = torch.randint(CLASSES, (x.shape[1],), device=settings.device)
    runs, errors, models = {}, {}, {}
    for rule in settings.rules:
        try:
            models[rule] = mfpsn_fx.convert(
                copy.deepcopy(source), x, layout=RULES[rule], repeats=settings.repeats, progress=False
            )
        except (ValueError, RuntimeError) as error:  # such as a network that cannot be time-last
            errors[rule] = first_line(error)
            continue
        runs[rule] = training_step(models[rule], models[rule], x, y)

        def make(model=models[rule]) -> Callable[[], None]:
            twin = copy.deepcopy(model)  # compiling shares no gradients with the eager variant
            return training_step(twin, compiler.compile(twin, backend="mfpsn_fx"), x, y)

        compiler.add(rule + COMPILED, make, runs, errors)
    found = interleave(runs, settings.device, settings.seconds, settings.rounds)
    return {
        "network": name,
        "input": list(x.shape),
        "ms": found.ms,
        "ratio": {n: ms / found.ms[base] for n, ms in found.ms.items() if (base := _base(n)) in found.ms},
        "rounds": found.rounds,
        "spread": found.spread,
        "rules": {rule: _described(model) for rule, model in models.items()},
        "errors": errors | found.errors,
    }


def _base(name: str) -> str:
    return BASE + COMPILED if name.endswith(COMPILED) else BASE


def _described(model: nn.Module) -> dict[str, object]:
    """What became of the network: the neurons by layout and kernel, conversions."""
    found = neurons(model)
    return {
        "neurons": len(found),
        "time_last": sum(neuron.layout == "time_last" for neuron in found),
        "conversions": len(conversion_nodes(model)),
        "kernels": sorted({neuron.kernel for neuron in found}),
        "predicted_ms": dict(mfpsn_fx.selection(model).totals_ms),
    }


def measure(settings: Settings, progress: bool | None = None, keep=None) -> dict[str, object]:
    """Every network; what ``--json`` writes."""
    compiler, names = Compiler(settings.compile_seconds), settings.networks or tuple(NETWORKS)
    results = each(names, lambda name: measure_network(settings, compiler, name), str, progress)
    names = dict.fromkeys(variant for result in results for variant in result["ratio"])
    means = {
        variant: geometric_mean(r["ratio"][variant] for r in results if variant in r["ratio"]) for variant in names
    }
    return {
        "environment": environment(settings.device),
        "compile_seconds": compiler.spent,
        "missing": MISSING,
        "results": results,
        "geometric_mean": means,
    }


def tables(found: dict) -> str:
    """Ratios to all time-first, and what the rules made of the networks, in Markdown."""
    results, parts = found["results"], []
    for suffix, mode in (("", "eager"), (COMPILED, "compiled")):
        names = [rule + suffix for rule in RULES if any(rule + suffix in r["ms"] for r in results)]
        base = BASE + suffix
        if base not in names:
            continue
        names.remove(base)
        rows = [
            [
                r["network"],
                f"{r['ms'][base]:.1f}",
                *(ratio(r["ms"].get(name), r["ms"][base]) for name in names),
                f"{r['spread']:.1%}",
                r["rounds"],
            ]
            for r in results
            if base in r["ms"]
        ]
        rows.append(["geometric mean", "", *(three(found["geometric_mean"][name]) for name in names), "", ""])
        headers = ["network", f"{BASE} ms", *(name.removesuffix(COMPILED) for name in names), "spread", "rounds"]
        parts += [
            f"A training step, {mode}, as a ratio to all time-first (below 1 is faster); medians over interleaved "
            "rounds.",
            markdown_table(headers, rows),
        ]
    rows = [
        [
            r["network"],
            "×".join(map(str, r["input"])),
            rule,
            f"{made['time_last']} of {made['neurons']}",
            made["conversions"],
            ", ".join(made["kernels"]),
        ]
        for r in results
        for rule, made in r["rules"].items()
    ]
    parts += [
        "What each rule made of them:",
        markdown_table(["network", "input", "rule", "neurons time-last", "conversions", "kernels"], rows),
    ]
    if found["missing"]:
        parts.append(f"{found['missing']}.")
    return "\n\n".join(parts)


def draw(found: dict, path) -> None:
    """Ratios to all time-first, a bar a rule, eager and compiled side by side."""
    plt = pyplot()
    results = found["results"]
    colors = {"time-last": "tab:red", "uniform": "tab:gray", "planned": "tab:blue"}
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained", sharey=True)
    for axes, suffix in zip(panels, ("", COMPILED), strict=True):
        for index, (rule, color) in enumerate(colors.items()):
            points = [(k, r["ratio"][rule + suffix]) for k, r in enumerate(results) if rule + suffix in r["ratio"]]
            if points:
                places, values = zip(*points, strict=True)
                axes.bar([p + (index - 1) * 0.27 for p in places], values, 0.25, color=color, label=rule)
        axes.axhline(1, color="black", lw=0.8)
        axes.set_xticks(range(len(results)), [r["network"].replace(" ", "\n", 1) for r in results])
        axes.set_title("compiled" if suffix else "eager", fontsize=9)
    panels[0].set_ylabel("time of a step / all time-first (lower is faster)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle("Layout rules, one training step")
    save(figure, path)


def failures(found: dict):
    for result in found["results"]:
        for name, reason in result["errors"].items():
            yield f"{result['network']} {name}", reason


def check(parser, options, settings: Settings) -> None:
    if unknown := [name for name in settings.networks if name not in NETWORKS]:
        parser.error(f"unknown networks {unknown}; there are {', '.join(map(repr, NETWORKS))}")
    if unknown := [rule for rule in settings.rules if rule not in RULES]:
        parser.error(f"unknown rules {unknown}; there are {', '.join(RULES)}")


BENCHMARK = Benchmark(
    __file__,
    __doc__,
    "A training step of whole networks under each layout rule",
    Settings,
    measure,
    tables,
    options={
        "networks": f"of {', '.join(NETWORKS)}", "rules": "", "steps": "", "batch": "", "size": "", "channels": "",
        "repeats": "", "rounds": "",
    },
    quick={"batch": 2, "channels": 16, "repeats": 1, "rounds": 3, "seconds": 2.0, "compile_seconds": 0.0},
    failures=failures,
    draw=draw,
    missing=lambda: MISSING,
    check=check,
)  # fmt: skip
main = BENCHMARK.main

if __name__ == "__main__":
    main()
