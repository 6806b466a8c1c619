"""Training steps of whole networks under each layout rule: all time-first, all time-last, uniform, planned.

Run with ``python benchmarks/layout.py [--device cuda] [--quick] [--json FILE] [--markdown FILE] [--png FILE]``. A step
is forward, cross entropy, backward and SGD on one batch of random data, in eager mode and compiled by the backend
``mfpsn_fx``, which keeps what was chosen. The rules start from the same weights, kernels are chosen under each, all are
interleaved in one run, and medians are reported.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import itertools
import sys
from collections.abc import Callable

import checkout  # noqa: F401  (first: it makes mfpsn_fx importable from a bare checkout)
import torch
from common import (
    Compiler,
    checked_device,
    environment,
    first_line,
    geometric_mean,
    interleave,
    load_example,
    markdown_table,
    output_options,
    preamble,
    pyplot,
    ratio,
    three,
    write,
)
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

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
    networks: tuple[str, ...] = ()
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
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-3)

    def step() -> None:
        optimiser.zero_grad()
        scores = run(x)
        F.cross_entropy(scores.mean(0) if scores.ndim == 3 else scores, y).backward()
        optimiser.step()

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
        if (reason := compiler.refusal()) is None:
            # a copy: compiling shares no gradients with the eager variant
            twin = copy.deepcopy(models[rule])
            step = training_step(twin, compiler.compile(twin, backend="mfpsn_fx"), x, y)
            reason = compiler.warm(step)
        if reason is None:
            runs[rule + COMPILED] = step
        else:
            errors[rule + COMPILED] = reason
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


def measure(settings: Settings, progress: bool | None = None) -> dict[str, object]:
    """Every network; what ``--json`` writes."""
    compiler, results = Compiler(settings.compile_seconds), []
    for name in tqdm(settings.networks or tuple(NETWORKS), disable=None if progress is None else not progress):
        try:
            results.append(measure_network(settings, compiler, name))
        except (RuntimeError, MemoryError) as error:  # such as out of memory: the others still count
            print(f"{name}: {first_line(error)}")
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


def draw(found: dict, path, title: str) -> None:
    """Ratios to all time-first, a bar a rule, eager and compiled side by side."""
    plt = pyplot()
    results = found["results"]
    colours = {"time-last": "tab:red", "uniform": "tab:gray", "planned": "tab:blue"}
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained", sharey=True)
    for axes, suffix in zip(panels, ("", COMPILED), strict=True):
        for index, (rule, colour) in enumerate(colours.items()):
            points = [(k, r["ratio"][rule + suffix]) for k, r in enumerate(results) if rule + suffix in r["ratio"]]
            if points:
                places, values = zip(*points, strict=True)
                axes.bar([p + (index - 1) * 0.27 for p in places], values, 0.25, color=colour, label=rule)
        axes.axhline(1, color="black", lw=0.8)
        axes.set_xticks(range(len(results)), [r["network"].replace(" ", "\n", 1) for r in results])
        axes.set_title("compiled" if suffix else "eager", fontsize=9)
    panels[0].set_ylabel("time of a step / all time-first (lower is faster)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)


def parsed(argv: list[str]) -> tuple[argparse.Namespace, Settings]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    output_options(parser)
    parser.add_argument("--networks", nargs="+", metavar="NAME", help=f"of {', '.join(NETWORKS)}")
    parser.add_argument("--rules", nargs="+", choices=tuple(RULES), help="default: all")
    for name in ("steps", "batch", "size", "channels", "repeats", "rounds"):
        parser.add_argument(f"--{name}", type=int, help=f"default {getattr(Settings, name)}")
    options = parser.parse_args(argv)
    settings = Settings(checked_device(options.device))
    if options.quick:
        settings.batch, settings.channels, settings.repeats, settings.rounds = 2, 16, 1, 3
        settings.seconds, settings.compile_seconds = 2.0, 0.0
    for name in ("steps", "batch", "size", "channels", "repeats", "rounds", "seconds", "compile_seconds"):
        if getattr(options, name) is not None:
            setattr(settings, name, getattr(options, name))
    settings.networks, settings.rules = tuple(options.networks or NETWORKS), tuple(options.rules or RULES)
    if unknown := [name for name in settings.networks if name not in NETWORKS]:
        parser.error(f"unknown networks {unknown}; there are {', '.join(map(repr, NETWORKS))}")
    return options, settings


def main(argv: list[str] | None = None) -> dict[str, object]:
    argv = sys.argv[1:] if argv is None else argv
    options, settings = parsed(argv)
    if options.png is not None:
        pyplot()  # that it is missing is to be known before, not after, the measuring
    if MISSING:
        print(MISSING)
    found = measure(settings)
    found["made_by"] = preamble("layout.py", argv, found["environment"])
    text = f"{found['made_by']}\n\n{tables(found)}"
    print(text)
    missed: dict[str, list[str]] = {}
    for result in found["results"]:
        for name, reason in result["errors"].items():
            missed.setdefault(reason, []).append(f"{result['network']} {name}")
    for reason, names in missed.items():
        print(f"not measured ({reason}): {', '.join(names)}")
    write(options.json, found)
    write(options.markdown, "# A training step of whole networks under each layout rule\n\n" + text)
    if options.png is not None:
        draw(found, options.png, "Layout rules, one training step")
    return found


if __name__ == "__main__":
    main()
