"""Which networks of other libraries convert, run, train and compile: ``python -m mfpsn_fx compatibility``.

The networks are listed in ``examples/compatibility/*_networks.py`` of a checkout, one file a library, since building
them needs that library and this package imports none. To add some, write such a file with a list ``NETWORKS``::

    from mfpsn_fx.compatibility import Network

    NETWORKS = [Network("mylib", "MyNet", build=lambda: MyNet(8), example=lambda: (torch.rand(4, 2, 3, 8, 8),))]

Every file there is found by its name; nothing has to be registered. A network that is rightly refused names a part
of the message in ``refusal``: its row shows the reason, and the command fails if it is not refused so.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import importlib.util
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from tabulate import tabulate
from torch import Tensor, fx, nn
from tqdm import tqdm

from mfpsn_fx.model.neuron import MulFreePSN
from mfpsn_fx.model.source import source_paths
from mfpsn_fx.passes import neurons

from .conversion import convert
from .selection import selection

__all__ = ["FOLDER", "Network", "Outcome", "examine", "load_networks", "main", "table"]

FOLDER = Path(__file__).resolve().parent.parent / "examples" / "compatibility"
HEADERS = ("library", "network", "neurons", "converted", "captured", "forward", "backward", "compiled",
           "graph breaks", "kernels", "refused, or what failed")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Network:
    """A network to examine.

    Attributes:
        library, name: what its row says.
        build: makes it, with weights from the default generator.
        example: makes the arguments of one batch for ``convert`` and for the converted network.
        options: further keyword arguments of :func:`mfpsn_fx.convert`.
        refusal: for a network that must be refused, a part of the message; empty for one that must convert.
    """

    library: str
    name: str
    build: Callable[[], nn.Module]
    example: Callable[[], tuple]
    options: Mapping[str, object] = dataclasses.field(default_factory=dict)
    refusal: str = ""


@dataclasses.dataclass
class Outcome:
    """What became of a network; a step that was not reached is None.

    ``captured`` is "traced", "traced, n leaves" (modules that run their own code with the neurons inside them
    converted), or "one leaf". ``backward``: every converted neuron's weight has a finite gradient. ``compiled``:
    outputs and gradients are those of the network as it is. ``expected`` says whether the row is as its network says.
    """

    library: str
    name: str
    found: int = 0
    converted: int = 0
    captured: str = ""
    forward: bool | None = None
    backward: bool | None = None
    compiled: bool | None = None
    graph_breaks: int | None = None
    kernels: tuple[str, ...] = ()
    reason: str = ""
    expected: bool = False


def load_networks(folder: Path = FOLDER, pattern: str = "*") -> list[Network]:
    """The networks of every ``*_networks.py`` in ``folder`` whose "library/name" fits ``pattern``.

    Raises:
        FileNotFoundError: there is no such file.
    """
    files = sorted(folder.glob("*_networks.py"))
    if not files:
        raise FileNotFoundError(
            f"no network lists in {folder}: they are part of the repository, not of the installed package; run it from "
            "a checkout that is installed with pip install -e ."
        )
    found: list[Network] = []
    for path in files:
        spec = importlib.util.spec_from_file_location(f"mfpsn_compatibility_{path.stem}", path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        found += [n for n in module.NETWORKS if fnmatch.fnmatchcase(f"{n.library}/{n.name}".lower(), pattern.lower())]
    return found


def examine(network: Network, backend: str = "aot_eager", repeats: int = 1) -> Outcome:
    """Convert ``network``, run it forward and backward, compile it and compare.

    Args:
        network: what to examine.
        backend: of ``torch.compile``.
        repeats: as in :func:`mfpsn_fx.convert`.
    """
    outcome = Outcome(network.library, network.name)
    torch.manual_seed(0)
    model, example = network.build(), network.example()
    outcome.found = len({id(m) for m in source_paths(model).values()})
    try:
        options = {"repeats": repeats, "progress": False, **network.options}
        gm = convert(model, *example, **options)
    except (ValueError, TypeError) as error:
        outcome.reason = " ".join(str(error).split())
        outcome.expected = bool(network.refusal) and network.refusal in outcome.reason
        return outcome
    outcome.converted = len({id(m) for m in gm.modules() if isinstance(m, MulFreePSN)})
    outcome.captured = _captured(gm)
    chosen = selection(gm)
    outcome.kernels = tuple(sorted({row.kernel for row in chosen.rows}))
    outcome.reason = "; ".join(f"{path}: {why}" for path, why in chosen.unconverted)
    try:
        # Evaluation: what may differ between two runs of the same network (dropout) is off.
        gm.eval()
        expected = _first_tensor(gm(*example))
        outcome.forward = bool(torch.isfinite(expected).all())
        outcome.backward, theirs = _gradients(gm, expected)
        outcome.graph_breaks, compiled = _compile(gm, example, backend)
        same, ours = _gradients(gm, compiled)
        outcome.compiled = same and _close(compiled, expected) and all(map(_close, ours, theirs))
        gm.train()
        outcome.forward &= bool(torch.isfinite(_first_tensor(gm(*example))).all())
    except Exception as error:  # whatever it is, it is what the row is for
        outcome.reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        return outcome
    done = outcome.forward and outcome.backward and outcome.compiled and outcome.graph_breaks == 0
    outcome.expected = done and not network.refusal and outcome.converted == outcome.found
    return outcome


def _captured(gm: fx.GraphModule) -> str:
    leaves = {n.node is None for n in neurons(gm)}
    if leaves == {False}:
        return "traced"
    calls = [gm.get_submodule(n.target) for n in gm.graph.nodes if n.op == "call_module"]
    count = sum(
        not isinstance(m, MulFreePSN) and any(isinstance(child, MulFreePSN) for child in m.modules()) for m in calls
    )
    return "one leaf" if len(calls) == 1 else f"traced, {count} {'leaf' if count == 1 else 'leaves'}"


def _first_tensor(value: object) -> Tensor:
    while not isinstance(value, Tensor):
        value = next(iter(value.values() if isinstance(value, Mapping) else value))
    return value


def _gradients(model: nn.Module, output: Tensor) -> tuple[bool, list[Tensor]]:
    """Whether every converted neuron has a finite gradient, and the gradients."""
    weights = [m.weight for m in model.modules() if isinstance(m, MulFreePSN)]
    found = torch.autograd.grad(output.float().square().sum(), weights, allow_unused=True)
    ours = [g for g in found if g is not None]
    return len(ours) == len(weights) and all(bool(torch.isfinite(g).all()) for g in ours), ours


def _compile(gm: fx.GraphModule, example: tuple, backend: str) -> tuple[int, Tensor]:
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    output = _first_tensor(torch.compile(gm, backend=backend)(*example))
    return sum(counters["graph_break"].values()), output


def _close(a: Tensor, b: Tensor) -> bool:
    a, b = a.detach(), b.detach()
    return torch.allclose(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max().clamp(min=1)))


def table(outcomes: Iterable[Outcome], style: str = "simple") -> str:
    """The rows as text; ``style`` is any of tabulate's formats."""
    rows = [
        [
            o.library, o.name, o.found, o.converted, o.captured, *map(_word, (o.forward, o.backward, o.compiled)),
            "-" if o.graph_breaks is None else o.graph_breaks, ", ".join(o.kernels), o.reason.replace("|", "/"),
        ]
        for o in outcomes
    ]  # fmt: skip
    return tabulate(rows, HEADERS, tablefmt=style, disable_numparse=True)


def _word(value: bool | None) -> str:
    return "-" if value is None else "yes" if value else "no"


def main(only: str = "*", markdown: str | None = None, backend: str = "aot_eager") -> int:
    """Examine the networks that fit ``only``, print their table, and write it to ``markdown`` if that is given.

    Returns 1 if a network is not as its list says, or none fits.
    """
    try:
        networks = load_networks(pattern=only)
    except (FileNotFoundError, ImportError) as error:
        print(error, file=sys.stderr)
        return 1
    if not networks:
        print(f"no network fits {only!r}", file=sys.stderr)
        return 1
    outcomes = [
        examine(network, backend) for network in tqdm(networks, disable=not sys.stderr.isatty(), desc="compatibility")
    ]
    print(table(outcomes))
    if markdown:
        Path(markdown).write_text(table(outcomes, "github") + "\n", encoding="utf-8")
    unexpected = [o.name for o in outcomes if not o.expected]
    if unexpected:
        print(f"not as expected: {', '.join(unexpected)}", file=sys.stderr)
    return int(bool(unexpected))
