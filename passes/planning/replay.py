"""Reuse layouts and kernels of a saved selection for the layers that it fits."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from mfpsn_fx.kernels.layout import Layout
from mfpsn_fx.kernels.registry import get_kernel
from mfpsn_fx.model.results import Candidate, Measured

from ..neurons import Neuron

__all__ = ["Choice", "choices_of", "replayed"]

_log = logging.getLogger("mfpsn_fx")


@dataclasses.dataclass(frozen=True)
class Choice:
    """Layout and kernels that were chosen for a layer; ``shape`` is the input's in ``layout``, times are in ms."""

    layout: str
    kernel: str
    eval_kernel: str
    order: int
    dilation: int
    shape: tuple[int, ...] | None = None
    forward_ms: float | None = None
    backward_ms: float | None = None
    eval_ms: float | None = None

    def misfit(self, neuron: Neuron, layouts: Sequence[Layout]) -> str | None:
        """Return the reason why ``neuron``, which may run in ``layouts``, cannot take the choice; None if it can."""
        for what, there, here in (("k", self.order, neuron.order), ("d", self.dilation, neuron.dilation)):
            if there != here:
                return f"{what} = {there} in the selection, {here} here"
        try:
            layout = Layout.parse(self.layout)
            kernels = [get_kernel(self.kernel), get_kernel(self.eval_kernel)]
        except ValueError as error:
            return str(error)
        if layout not in layouts:
            return f"it was {layout}, and can only be {' or '.join(layouts)} here"
        if self.shape is None or self.eval_ms is None:
            return "the selection has no times for it: nothing had been measured"
        shape = layout.shape_from(neuron.meta[0], neuron.layout)
        if tuple(self.shape) != shape:
            return f"input of shape {tuple(self.shape)} in the selection, {shape} here"
        for kernel, training in zip(kernels, (True, False), strict=True):
            if (reason := kernel.refusal(neuron.problem(layout, training=training))) is not None:
                return f"kernel {kernel.name!r} {reason}"
        return None

    def measured(self, neuron: Neuron) -> Measured:
        """Return the choice as a measurement of ``neuron`` that has no other candidates."""
        shape, _, device = neuron.meta
        shape = Layout.TIME_FIRST.shape_from(shape, neuron.layout)
        training = Candidate(self.layout, self.kernel, self.forward_ms, self.backward_ms)
        if self.kernel == self.eval_kernel:
            candidates = (dataclasses.replace(training, eval_ms=self.eval_ms),)
        else:
            candidates = (training, Candidate(self.layout, self.eval_kernel, eval_ms=self.eval_ms))
        return Measured(shape, str(neuron.dtype).removeprefix("torch."), str(device), candidates)


def replayed(
    found: Sequence[Neuron], choices: Mapping[str, Choice], layouts: Mapping[str, Sequence[Layout]]
) -> dict[str, Measured]:
    """Return measurements made from ``choices`` for the neurons that these fit; name the others in a warning.

    Args:
        found: the neurons of a graph.
        choices: by name of the layer.
        layouts: by name of the layer, those in which it may run.
    """
    taken, misfits = {}, []
    for neuron in found:
        choice = choices.get(neuron.name)
        reason = "the selection does not have it" if choice is None else choice.misfit(neuron, layouts[neuron.name])
        if reason is None:
            taken[neuron.name] = choice.measured(neuron)
        else:
            misfits.append(f"{neuron.name}: {reason}")
    if misfits:
        _log.warning("the selection does not fit these layers, which are measured here:\n  %s", "\n  ".join(misfits))
    if missing := sorted(set(choices) - {neuron.name for neuron in found}):
        _log.warning("the selection has layers that this network does not have: %s", ", ".join(missing))
    return taken


def choices_of(selection: Any) -> dict[str, Choice]:
    """Return the choice of a selection for each layer, by name.

    Args:
        selection: a ``Selection``, the JSON text that its ``to_json`` wrote, or the path of it.

    Raises:
        TypeError: it is none of these.
        ValueError: there is no such file, or it is no selection.
    """
    names = [field.name for field in dataclasses.fields(Choice)]
    if hasattr(selection, "rows"):
        return {row.layer: Choice(**{name: getattr(row, name) for name in names}) for row in selection.rows}
    text = _text(selection)
    try:
        data = json.loads(text)
        if data["format"] != 1:
            raise ValueError("unknown format")
        return {row["layer"]: Choice(**{name: row[name] for name in names}) for row in data["rows"]}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"this is not a selection written by to_json: {error}") from error


def _text(selection: str | os.PathLike) -> str:
    if isinstance(selection, str) and selection.lstrip().startswith("{"):
        return selection
    if not isinstance(selection, (str, os.PathLike)):
        raise TypeError(f"selection= takes a Selection, its JSON text or a path, found {type(selection).__name__}")
    try:
        return pathlib.Path(selection).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"selection={str(selection)!r} is neither JSON text nor a file to be read: {error}") from error
