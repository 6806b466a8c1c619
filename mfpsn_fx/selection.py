"""The selection table: each layer's neuron, its measured times, and the chosen layout and kernel."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence

from torch import fx, nn

from mfpsn_fx.kernels.autotune.race import NOT_REACHED
from mfpsn_fx.model.integrator import LeakyIntegrator
from mfpsn_fx.model.neuron import MulFreePSN
from mfpsn_fx.model.results import Candidate, ConversionRecord, Measured, record_of
from mfpsn_fx.model.sources.description import qualified_name, source_paths
from mfpsn_fx.passes import Neuron, conversion_nodes, neurons
from mfpsn_fx.passes.check_sources import source_of_use

from .tables import check_style, format_table

__all__ = ["Row", "Selection", "print_selection", "selection"]

BASELINE = ("vanilla-conv1d", "time_first")


@dataclasses.dataclass(frozen=True)
class Row:
    """One call of one neuron. Times are milliseconds; ``shape`` is that of the input in its layout.

    ``ratio`` is the time of the baseline (the kernel ``vanilla-conv1d``) over the chosen kernel's, forward and backward
    together: above 1 is faster than the baseline. None stands for values that were not measured. The kernel of an
    unbound neuron is the one of highest rank, and a note states it.
    """

    layer: str
    source: str
    shape: tuple[int, ...] | None
    order: int
    dilation: int
    layout: str
    kernel: str
    eval_kernel: str
    forward_ms: float | None = None
    backward_ms: float | None = None
    eval_ms: float | None = None
    ratio: float | None = None
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Selection:
    """All rows, predicted totals for each layout, the conversions in the graph, and the unconverted neurons.

    Totals are predicted milliseconds of forward and backward of the whole network; ``verified_ms`` are times that were
    measured end to end: (mode, name as in the totals, milliseconds, spread). ``conversion_bytes`` is the size of the
    tensors that are converted in one forward. ``pinned``: (operator, reason, count) of operators that stay time-first.
    ``readouts``: (layer, response) of each membrane that is read out, which has no kernel to choose. Comparison ignores
    whether times were measured now (``measured`` of them, in ``autoselect_s``) or known from earlier (``kept``).
    """

    rows: tuple[Row, ...]
    totals_ms: tuple[tuple[str, float], ...] = ()
    neuron_totals_ms: tuple[tuple[str, float], ...] = ()
    conversions: int = 0
    conversion_totals_ms: tuple[tuple[str, float], ...] = ()
    conversion_bytes: int = 0
    layout: str = ""
    pinned: tuple[tuple[str, str, int], ...] = ()
    verified_ms: tuple[tuple[str, str, float, float], ...] = ()
    verdict: str = ""
    autoselect_s: float | None = dataclasses.field(default=None, compare=False)
    repeats: int | None = None
    noise: float | None = None
    measured: int | None = dataclasses.field(default=None, compare=False)
    kept: int | None = dataclasses.field(default=None, compare=False)
    unconverted: tuple[tuple[str, str], ...] = ()
    readouts: tuple[tuple[str, str], ...] = ()

    def to_json(self) -> str:
        """Return the selection as JSON text; :meth:`from_json` returns an equal one."""
        return json.dumps({"format": 1, **dataclasses.asdict(self)}, indent=2)

    @classmethod
    def from_json(cls, text: str) -> Selection:
        """Return the selection that :meth:`to_json` wrote.

        Raises:
            ValueError: ``text`` is not JSON, or not a selection in this format.
        """
        try:
            data = json.loads(text)
            if data.pop("format") != 1:
                raise ValueError("unknown format")
            rows = tuple(
                Row(
                    **{
                        **row,
                        "shape": None if row["shape"] is None else tuple(row["shape"]),
                        "notes": tuple(row["notes"]),
                    }
                )
                for row in data.pop("rows")
            )
            pairs = (
                "totals_ms",
                "neuron_totals_ms",
                "conversion_totals_ms",
                "pinned",
                "verified_ms",
                "unconverted",
                "readouts",
            )
            return cls(rows, **{k: tuple(map(tuple, v)) if k in pairs else v for k, v in data.items()})
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"this is not a selection written by to_json: {error}") from error

    def table(self, style: str = "plain") -> str:
        """Return the table as text, with a footer about the whole network.

        Args:
            style: ``"plain"``, ``"github"`` (Markdown), ``"html"``, or any other of tabulate's formats.

        Raises:
            ValueError: there is no such style.
        """
        check_style(style)
        headers = [
            "layer", "source neuron", "input shape", "k", "d", "layout", "kernel", "forward ms", "backward ms",
            "x vanilla", "notes",
        ]  # fmt: skip
        body = [
            [
                row.layer,
                row.source,
                "" if row.shape is None else "x".join(map(str, row.shape)),
                row.order,
                row.dilation,
                row.layout,
                row.kernel if row.eval_kernel in ("", row.kernel) else f"{row.kernel} (eval: {row.eval_kernel})",
                _number(row.forward_ms, ".3f"),
                _number(row.backward_ms, ".3f"),
                _number(row.ratio, ".2f"),
                "; ".join(row.notes),
            ]
            for row in self.rows
        ]
        return format_table(body, headers, style, self._footer(), _ALIGN)

    def _repr_html_(self) -> str:
        return self.table("html")

    def _footer(self) -> list[str]:
        lines = []
        alone, between = dict(self.neuron_totals_ms), dict(self.conversion_totals_ms)
        for name, total in self.totals_ms:
            neurons_ms, conversions_ms = alone.get(name, total), between.get(name, 0.0)
            lines.append(
                f"total {name}: {total:.3f} ms forward and backward (neurons {neurons_ms:.3f}, "
                f"other layers {max(0.0, total - neurons_ms - conversions_ms):.3f}, conversions {conversions_ms:.3f})"
            )
        if self.layout:
            lines.append(f"layout chosen: {self.layout}")
        lines.append(f"layout conversions inserted: {self.conversions} ({self.conversion_bytes} bytes)")
        lines += [f"measured {mode}, {name}: {ms:.3f} ms ± {spread:.3f}" for mode, name, ms, spread in self.verified_ms]
        if self.verdict:
            lines.append(self.verdict)
        lines += [f"stays time-first: {count} x {name}: {why}" for name, why, count in self.pinned]
        if self.autoselect_s is not None:
            lines.append(f"autoselect took {self.autoselect_s:.2f} s ({self._how()})")
        else:
            lines.append("nothing measured yet: mfpsn_fx.plan(model, *example_args) measures and chooses")
        lines += [
            f"reads out a membrane, without reset: {path} (LeakyIntegrator, {kind})" for path, kind in self.readouts
        ]
        lines += [f"not converted: {path}: {reason}" for path, reason in self.unconverted]
        return lines

    def _how(self) -> str:
        now = f"{self.measured} cases measured" if self.measured else "nothing measured"
        kept = f", {self.kept} known from earlier" if self.kept else ""
        noise = f"; noise: {self.noise:.1%}" if self.noise is not None else ""
        return f"{now}{kept}, lowest of their samples{noise}"

    def __str__(self) -> str:
        return self.table()


_ALIGN = ("left", "left", "left", "right", "right", "left", "left", "right", "right", "right", "left")


def _number(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)


def selection(model: nn.Module) -> Selection:
    """Return the layouts and kernels of ``model`` (possibly compiled) as they are in its graph now, with their times.

    Raises:
        TypeError: ``model`` is not a converted network.
    """
    gm = graph_of(model)
    found = neurons(gm)
    record = record_of(gm)
    plan = record.plan
    return Selection(
        tuple(_row(neuron, record.measured.get(neuron.name)) for neuron in found),
        totals_ms=plan.totals if plan else (),
        neuron_totals_ms=plan.neuron_totals if plan else (),
        conversions=len(conversion_nodes(gm)),
        conversion_totals_ms=plan.conversion_totals if plan else (),
        conversion_bytes=plan.conversion_bytes if plan else 0,
        layout=plan.layout if plan else "",
        pinned=plan.pinned if plan else (),
        verified_ms=plan.verified if plan else (),
        verdict=plan.verdict if plan else "",
        autoselect_s=plan.seconds if plan else None,
        repeats=plan.repeats if plan else None,
        noise=plan.noise if plan else None,
        measured=plan.measured if plan else None,
        kept=plan.kept if plan else None,
        unconverted=tuple(_unconverted(gm, record)),
        readouts=tuple((p, m.kind.__name__) for p, m in gm.named_modules() if isinstance(m, LeakyIntegrator)),
    )


def print_selection(model: nn.Module, style: str = "plain") -> None:
    """Print :func:`selection`; ``style`` as in :meth:`Selection.table`: ``"plain"``, ``"github"``, ``"html"``, …"""
    print(selection(model).table(style))


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the network inside wrappers of torch.compile, DataParallel and DistributedDataParallel."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        else:
            return model


def graph_of(model: nn.Module) -> fx.GraphModule:
    """Return the converted graph in ``model``, unwrapped; raise ``TypeError`` if there is none."""
    model = unwrapped(model)
    if not isinstance(model, fx.GraphModule) or not any(isinstance(m, MulFreePSN) for m in model.modules()):
        raise TypeError(f"{type(model).__name__} is not a network that mfpsn_fx.convert returned")
    return model


def _row(neuron: Neuron, measured: Measured | None) -> Row:
    module = neuron.module
    row = Row(
        layer=neuron.name,
        source=module.source.name if module is not None and module.source else "MulFreePSN",
        shape=None if measured is None else neuron.layout.shape_from(measured.shape, "time_first"),
        order=neuron.order,
        dilation=neuron.dilation,
        layout=str(neuron.layout),
        kernel=neuron.kernel or _default_kernel(neuron, training=True),
        eval_kernel=neuron.eval_kernel or _default_kernel(neuron, training=False),
        notes=tuple(_notes(neuron, measured)),
    )
    if measured is None:
        return row
    times = _find(measured.candidates, row.kernel, row.layout)
    baseline = _find(measured.candidates, *BASELINE)
    ratio = None
    if times and baseline and times.training_ms and baseline.training_ms:
        ratio = baseline.training_ms / times.training_ms
    evaluated = _find(measured.candidates, row.eval_kernel, row.layout)
    return dataclasses.replace(
        row,
        forward_ms=times.forward_ms if times else None,
        backward_ms=times.backward_ms if times else None,
        eval_ms=evaluated.eval_ms if evaluated else None,
        ratio=ratio,
    )


def _default_kernel(neuron: Neuron, training: bool) -> str:
    return "" if neuron.module is None else neuron.module.default_kernel(neuron.layout, training)


def _find(candidates: Sequence[Candidate], kernel: str, layout: str) -> Candidate | None:
    return next((c for c in candidates if (c.kernel, c.layout) == (kernel, layout) and c.error is None), None)


def _notes(neuron: Neuron, measured: Measured | None):
    if neuron.node is None:
        yield "inside a leaf"
    if not (neuron.kernel and neuron.eval_kernel):
        yield "not bound: the kernel of highest rank"
    if neuron.module is not None and neuron.module.source is not None:
        yield from neuron.module.source.notes
    failed = [c for c in (measured.candidates if measured else ()) if c.error is not None]
    if unmeasured := [f"{c.kernel} ({c.layout})" for c in failed if c.error.startswith(NOT_REACHED)]:
        yield f"not reached within the budget: {', '.join(unmeasured)}"
    for candidate in failed:
        if not candidate.error.startswith(("not applicable", NOT_REACHED)):
            yield f"{candidate.kernel} failed in {candidate.layout}: {candidate.error}"


def _unconverted(gm: fx.GraphModule, record: ConversionRecord):
    for path, module in source_paths(gm).items():
        why = record.unconverted.get(path, "it was left as it was")
        yield path, f"{qualified_name(type(source_of_use(module)))}: {why}"
