"""Reject neurons that cannot be converted, before anything is run."""

from __future__ import annotations

from torch import fx, nn

from mfpsn_fx.model.capturing.capture import user_path, value_for_path
from mfpsn_fx.model.capturing.over_time import OverTime
from mfpsn_fx.model.capturing.stepped_neuron import SteppedNeuron
from mfpsn_fx.model.sources.description import NotAFilterError, describe, source_paths

from .base import Pass, Result
from .context import PassContext
from .errors import ConversionError, refusal_message
from .options import ConvertOptions, first_use

__all__ = ["LEFT_OUT", "CheckSources", "source_of_use"]

LEFT_OUT = "left out by only="


class CheckSources(Pass):
    """Raise for neurons that are no filter of any input, before anything is run; the graph is unchanged.

    Before and after: ``conv -> lif -> linear``. ``context.refusals`` holds the reason for each neuron that stays, those
    that ``only=`` leaves out included.

    Args:
        strict: overrides the context's option.

    Raises:
        ConversionError: with ``strict``, naming each neuron that is no filter, and why.
        ValueError: ``only`` names what is no neuron.
    """

    name = "check_sources"

    def __init__(self, strict: bool | None = None) -> None:
        super().__init__(strict=strict)

    def call(self, gm: fx.GraphModule, context: PassContext) -> Result:
        options, failed = context.options, {}
        paths = source_paths(gm)
        if options.only is not None and not callable(options.only):
            known = {user_path(gm, path) for path in paths}
            if unknown := sorted(path for path in options.only if first_use(path) not in known | set(paths)):
                raise ValueError(f"only= names layers that are no neurons: {unknown}; the neurons are {sorted(known)}")
        for path, neuron in paths.items():
            if not _used(gm, path, neuron, options):
                context.refusals[path] = LEFT_OUT
                continue
            try:
                describe(neuron)
            except NotAFilterError as error:
                failed[path] = context.refusals[path] = value_for_path(gm, context.refusals, path) or str(error)
        if failed and options.strict:
            raise ConversionError(refusal_message(failed, len(paths)))
        return Result(gm, [f"{path}: {reason}" for path, reason in failed.items()])


def _used(gm: fx.GraphModule, path: str, neuron: nn.Module, options: ConvertOptions) -> bool:
    """Return True if ``only`` names a use of the neuron: uses are told apart later, by ``separate_uses``."""
    own = user_path(gm, path)
    if options.only is None or callable(options.only):
        return not options.excludes(own, source_of_use(neuron))
    return any(first_use(one) in (own, path) for one in options.only)


def source_of_use(module: nn.Module) -> nn.Module:
    """Return the user's own neuron, without the wrappers that run it over all steps."""
    while isinstance(module, (OverTime, SteppedNeuron)):
        module = module.neuron
    return module
