"""Which networks of other libraries convert, run, train and compile: ``python -m mfpsn_fx compatibility``.

The networks are listed in the files ``*_networks.py`` of this folder, one a library. To add some, write such a file
with a list ``NETWORKS`` of what :class:`Network` takes::

    example = lambda: (torch.rand(4, 2, 3, 8, 8),)
    NETWORKS = [{"library": "mylib", "name": "MyNet", "build": lambda: MyNet(8), "example": example}]

Every file here is found by its name; nothing has to be registered. A network that is rightly refused names a part
of the message in ``refusal``: its row shows the reason, and the command fails if it is not refused so.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from tabulate import tabulate
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from tqdm import tqdm

from mfpsn_fx import MulFreePSN, convert, selection
from mfpsn_fx.model import LeakyIntegrator
from mfpsn_fx.model.sources.description import source_paths
from mfpsn_fx.passes import neurons

FOLDER = Path(__file__).resolve().parent
HEADERS = ("library", "network", "neurons", "converted", "captured", "forward", "backward", "compiled",
           "graph breaks", "kernels", "refused, or what failed")  # fmt: skip

_INTRODUCTION = """\
# Compatibility

Made by `python -m mfpsn_fx compatibility --markdown docs/guide/compatibility.md`; `--only "norse/*"` redoes one
library, `--backend inductor` compiles with another backend. The networks are listed in
[examples/compatibility](../examples/compatibility); a list of your own is a file beside them.

* **neurons**, **converted**: source neurons found, and those that became multiplication-free ones.
* **captured**: traced; or with leaves, modules that run their own code with the neurons inside them converted; *one
  leaf* is a model whose own `forward` looks at its input. Neurons inside leaves are measured and bound like the
  others, in time-first.
* **forward**, **backward**: finite outputs in training and in evaluation; a finite gradient for every converted neuron.
* **compiled**, **graph breaks**: outputs and gradients in evaluation are those of the network as it is, and how often
  Dynamo broke the graph.
* **kernels**: those that were the fastest for some layer on the machine that made the table.
"""


@dataclasses.dataclass(frozen=True)
class Network:
    """A network to examine.

    Attributes:
        library, name: what its row says.
        build: makes it, with weights from the default generator.
        example: makes the arguments of one batch for ``convert`` and for the converted network.
        options: further keyword arguments of :func:`mfpsn_fx.convert`.
        refusal: for a network that must be refused, a part of the message; empty for one that must convert.
        unused: neurons that its forward never calls stay as they are (with ``options={"strict": False}``).
    """

    library: str
    name: str
    build: Callable[[], nn.Module]
    example: Callable[[], tuple]
    options: Mapping[str, object] = dataclasses.field(default_factory=dict)
    refusal: str = ""
    unused: bool = False


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
        raise FileNotFoundError(f"there is no list of networks, *_networks.py, in {folder}")
    found: list[Network] = []
    for path in files:
        spec = importlib.util.spec_from_file_location(f"mfpsn_compatibility_{path.stem}", path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        found += [Network(**fields) for fields in module.NETWORKS]
    return [n for n in found if fnmatch.fnmatchcase(f"{n.library}/{n.name}".lower(), pattern.lower())]


def examine(network: Network, backend: str = "aot_eager") -> Outcome:
    """Convert ``network``, run it forward and backward, compile it with ``backend`` and compare."""
    outcome = Outcome(network.library, network.name)
    torch.manual_seed(0)
    model, example = network.build(), network.example()
    outcome.found = len({id(m) for m in source_paths(model).values()})
    try:
        options = {"repeats": 1, "progress": False, **network.options}
        gm = convert(model, *example, **options)
    except (ValueError, TypeError) as error:
        outcome.reason = _grouped(str(error))
        outcome.expected = bool(network.refusal) and network.refusal in outcome.reason
        return outcome
    outcome.converted = _converted(gm)
    outcome.captured = _captured(gm)
    chosen = selection(gm)
    outcome.kernels = tuple(sorted({row.kernel for row in chosen.rows}))
    outcome.reason = _grouped("\n".join(f"  {path}: {why}" for path, why in chosen.unconverted))
    try:
        outcome.backward, _ = _gradients(gm.train(), gm(*example), every=True)
        # Evaluation: what may differ between two runs of the same network (dropout) is off.
        expected = gm.eval()(*example)
        outcome.forward = all(bool(torch.isfinite(t).all()) for t in _tensors(expected))
        outcome.graph_breaks, compiled = _compile(gm, example, backend)
        _, theirs = _gradients(gm, expected)
        _, ours = _gradients(gm, compiled)
        outcome.compiled = _close(_tensors(compiled), _tensors(expected)) and _close(ours, theirs)
    except Exception as error:  # whatever it is, it is what the row is for
        outcome.reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        return outcome
    done = outcome.forward and outcome.backward and outcome.compiled and outcome.graph_breaks == 0
    outcome.expected = done and not network.refusal and (network.unused or outcome.converted == outcome.found)
    return outcome


def _converted(gm: fx.GraphModule) -> int:
    """Neurons that became ours; one whose spikes and membrane are both used became two modules, and counts once."""
    paths = {path for path, m in gm.named_modules() if isinstance(m, MulFreePSN)}
    readouts = {path for path, m in gm.named_modules() if isinstance(m, LeakyIntegrator)}
    return len(paths) + sum(path.removesuffix("_membrane") not in paths for path in readouts)


def _grouped(text: str) -> str:
    """A refusal's lines ``path: reason`` with the paths of each reason counted."""
    paths: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line.startswith("  "):
            path, _, reason = line.strip().partition(": ")
            paths.setdefault(reason, []).append(path)
    if not paths:
        return " ".join(text.split())
    return "; ".join(
        f"{found[0]}{f' and {len(found) - 1} more' * (len(found) > 1)}: {reason}" for reason, found in paths.items()
    )


def _captured(gm: fx.GraphModule) -> str:
    leaves = {n.node is None for n in neurons(gm)}
    if leaves == {False}:
        return "traced"
    calls = [gm.get_submodule(n.target) for n in gm.graph.nodes if n.op == "call_module"]
    count = sum(
        not isinstance(m, MulFreePSN) and any(isinstance(child, MulFreePSN) for child in m.modules()) for m in calls
    )
    return "one leaf" if len(calls) == 1 else f"traced, {count} {'leaf' if count == 1 else 'leaves'}"


def _tensors(value: object) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def _gradients(model: nn.Module, output: object, every: bool = False) -> tuple[bool, list[Tensor]]:
    """Whether the converted neurons' gradients are finite, of ``every`` one of them; and the gradients."""
    weights = [m.weight for m in model.modules() if isinstance(m, MulFreePSN)]
    loss = sum(t.float().square().sum() for t in _tensors(output))
    found = torch.autograd.grad(loss, weights, allow_unused=True)
    ours = [g for g in found if g is not None]
    complete = len(ours) == len(weights) or not every
    return complete and all(bool(torch.isfinite(g).all()) for g in ours), ours


def _compile(gm: fx.GraphModule, example: tuple, backend: str) -> tuple[int, object]:
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    output = torch.compile(gm, backend=backend)(*example)
    return sum(counters["graph_break"].values()), output


def _close(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    def close(a: Tensor, b: Tensor) -> bool:
        return torch.allclose(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max().clamp(min=1)))

    return len(ours) == len(theirs) and all(close(a.detach(), b.detach()) for a, b in zip(ours, theirs, strict=True))


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


def document(outcomes: Iterable[Outcome], backend: str, before: str = "") -> str:
    """A markdown page with a section for each library; sections of other libraries in ``before`` are kept."""
    sections = dict(part.split("\n", 1) for part in before.split("\n## ")[1:])
    for library in dict.fromkeys(o.library for o in outcomes):
        rows = [o for o in outcomes if o.library == library]
        done = sum(0 < o.converted == o.found and o.expected for o in rows)
        sections[library] = (
            f"\n{library}{_version(library)}, torch {torch.__version__}, `torch.compile(backend={backend!r})`: "
            f"{done} of {len(rows)} networks convert whole.\n\n{table(rows, 'github')}\n"
        )
    body = "\n".join(f"## {library}\n{text.rstrip()}\n" for library, text in sorted(sections.items()))
    return f"{_INTRODUCTION}\n{body}"


def _version(library: str) -> str:
    try:
        return f" {importlib.metadata.version(library.lower())}"
    except importlib.metadata.PackageNotFoundError:
        return ""


def _word(value: bool | None) -> str:
    return "-" if value is None else "yes" if value else "no"


def main(argv: Sequence[str] | None = None) -> int:
    """Examine networks and print their table; return 1 if one is not as its list says, or none fits."""
    parser = argparse.ArgumentParser(
        prog="python -m mfpsn_fx compatibility", description="Convert, train and compile other libraries' networks."
    )
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table to FILE as well")
    parser.add_argument("--only", metavar="PATTERN", default="*", help="of library/network, as a shell pattern")
    parser.add_argument("--backend", default="aot_eager", help="of torch.compile (default: %(default)s)")
    options = parser.parse_args(argv)
    backend, target = options.backend, options.markdown
    try:
        networks = load_networks(pattern=options.only)
    except (FileNotFoundError, ImportError) as error:
        print(error, file=sys.stderr)
        return 1
    if not networks:
        print(f"no network fits {options.only!r}", file=sys.stderr)
        return 1
    before = target.read_text(encoding="utf-8") if target is not None and target.exists() else ""
    outcomes: list[Outcome] = []
    for network in tqdm(networks, disable=not sys.stderr.isatty(), desc="compatibility"):
        outcomes.append(examine(network, backend))
        if target is not None:  # each time: all of them take a while, and may be stopped
            target.write_text(document(outcomes, backend, before), encoding="utf-8")
    print(table(outcomes))
    unexpected = [o.name for o in outcomes if not o.expected]
    if unexpected:
        print(f"not as expected: {', '.join(unexpected)}", file=sys.stderr)
    return int(bool(unexpected))


if __name__ == "__main__":
    sys.exit(main())
