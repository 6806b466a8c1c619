"""Selections as they come from outside: an object, JSON text, or a file."""

from __future__ import annotations

import os
import pathlib

from mfpsn_fx.passes.planning.replay import Choice

from .selection import Selection

__all__ = ["choices_of"]


def choices_of(selection: Selection | str | os.PathLike) -> dict[str, Choice]:
    """What ``selection``, or the JSON text or file that :meth:`Selection.to_json` made of it, chose for each layer.

    Raises:
        TypeError: it is none of these.
        ValueError: there is no such file, or it is no selection.
    """
    if not isinstance(selection, Selection):
        selection = Selection.from_json(_text(selection))
    return {
        row.layer: Choice(
            row.layout,
            row.kernel,
            row.eval_kernel,
            row.order,
            row.dilation,
            row.shape,
            row.forward_ms,
            row.backward_ms,
            row.eval_ms,
        )
        for row in selection.rows
    }


def _text(selection: str | os.PathLike) -> str:
    if isinstance(selection, str) and selection.lstrip().startswith("{"):
        return selection
    if not isinstance(selection, (str, os.PathLike)):
        raise TypeError(f"selection= takes a Selection, its JSON text or a path, found {type(selection).__name__}")
    try:
        return pathlib.Path(selection).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"selection={str(selection)!r} is neither JSON text nor a file to be read: {error}") from error
