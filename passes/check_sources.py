"""Refuse what cannot be converted before anything is run."""

from __future__ import annotations

from torch import fx

from mfpsn_fx.model.capturing.capture import said_of
from mfpsn_fx.model.sources.description import NotAFilterError, describe, source_paths

from .base import Pass, Result
from .replace_neurons import REFUSED, ConversionError, refusal_message

__all__ = ["CheckSources"]


class CheckSources(Pass):
    """Raise for neurons that are no filter, whatever they would meet (the graph is unchanged).

    Raises:
        ConversionError: with ``strict``, naming each of them and why.
    """

    name = "check_sources"

    def __init__(self, strict: bool = True) -> None:
        self.strict = strict

    def call(self, gm: fx.GraphModule) -> Result:
        failed = {}
        paths = source_paths(gm)
        for path, neuron in paths.items():
            try:
                describe(neuron)
            except NotAFilterError as error:
                failed[path] = said_of(gm, gm.meta.get(REFUSED, {}), path) or str(error)
        if failed and self.strict:
            raise ConversionError(refusal_message(failed, len(paths)))
        return Result(gm, [f"{path}: {reason}" for path, reason in failed.items()])
