"""Replace every spiking neuron by a MulFreePSN."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn

from mfpsn_fx.kernels.quantizer import Gradient
from mfpsn_fx.kernels.surrogate import Surrogate
from mfpsn_fx.model.capturing.capture import preserved_rng, user_path, value_for_path
from mfpsn_fx.model.channel_dims import DEFAULT_DIMS, check_dims
from mfpsn_fx.model.neuron import MulFreePSN
from mfpsn_fx.model.results import keep_record, record_of
from mfpsn_fx.model.sources.description import NotAFilterError, describe, source_paths

from .base import Pass, Result
from .channel_inference import channels_before, heads_note
from .check_sources import LEFT_OUT, source_of_use
from .context import PassContext
from .errors import ConversionError, refusal_message
from .options import DEFAULT_ORDER, ConvertOptions, first_use
from .separate_uses import has_state

__all__ = ["ReplaceNeurons"]


class ReplaceNeurons(Pass):
    """Replace each source neuron by a MulFreePSN at the same path, inside leaves too.

    Before: ``%lif : call_module[target=lif](args = (%conv,))`` with an ``LIFNode`` at ``lif``.
    After: the same node; ``lif`` is a ``MulFreePSN`` of dilation 1 that keeps its source's description (``.source``).

    The number of channels is taken from the example (:class:`ObserveInputs`), from the neuron itself, or from the last
    convolution, linear layer or norm before it.

    Args:
        order, surrogate, gradient, strict, channel_dims, eps, momentum, min_exponent, max_exponent, only: override the
            context's options.

    Raises:
        ValueError: ``channel_dims`` or ``order`` name what is no neuron, or dims that its input does not have.
        ConversionError: with ``strict``, naming every neuron that stays and why.
    """

    name = "replace_neurons"
    gives = ("neurons",)

    def __init__(
        self,
        order: int | Mapping[str, int] | None = None,
        *,
        surrogate: Surrogate | None = None,
        gradient: Gradient | str | None = None,
        strict: bool | None = None,
        channel_dims: Mapping[str, int | tuple[int, ...]] | None = None,
        **options,
    ) -> None:
        super().__init__(
            order=order, surrogate=surrogate, gradient=gradient, strict=strict, channel_dims=channel_dims, **options
        )

    def call(self, gm: fx.GraphModule, context: PassContext) -> Result:
        options: ConvertOptions = context.options
        made: dict[tuple[int, str] | int, MulFreePSN] = {}
        swaps: list[tuple[str, MulFreePSN]] = []
        failed: dict[str, str] = {}
        paths = source_paths(gm)
        known = sorted(user_path(gm, path) for path in paths)
        named = {"channel_dims": options.channel_dims or {}, "order": options.order}
        for name, by_layer in named.items():
            if isinstance(by_layer, Mapping) and (unknown := sorted(set(by_layer) - set(known) - set(paths))):
                raise ValueError(f"{name} names layers that are no neurons: {unknown}; the neurons are {known}")
        for path, old in paths.items():
            if (reason := value_for_path(gm, context.refusals, path)) is not None or (
                _excluded(gm, path, old, options) and (reason := LEFT_OUT)
            ):
                failed[path] = reason
                continue
            parent, _, child = path.rpartition(".")
            # A membrane belongs to its place; a PSN that stands in several shares its weights between them.
            place = (id(gm.get_submodule(parent)), child) if has_state(old) else id(old)
            if place not in made:
                try:
                    made[place] = _make(gm, context, path, old)
                except NotAFilterError as error:
                    failed[path] = str(error)
                    continue
            swaps.append((path, made[place]))
        unfit = {path: reason for path, reason in failed.items() if reason != LEFT_OUT}
        if unfit and options.strict:
            raise ConversionError(refusal_message(unfit, len(failed) + len(swaps)))
        context.refusals |= failed
        context.converted = True
        for path, new in swaps:
            gm.set_submodule(path, new)
        keep_record(gm, dataclasses.replace(record_of(gm), unconverted=failed))
        return Result(gm, [f"{path}: {new.source.name} -> {new!r}" for path, new in swaps])


def _make(gm: fx.GraphModule, context: PassContext, path: str, old: nn.Module) -> MulFreePSN:
    source, options = describe(old), context.options
    given = _by_use(gm, options.channel_dims or {}, path)
    shape = _observed_shape(gm, context.inputs, path)
    dims = DEFAULT_DIMS if given is None else _checked(path, given, None if shape is None else len(shape))
    channels = source.channels or channels_before(gm, path)
    if shape is not None:
        channels = math.prod(shape[d] for d in dims)
        if given is None and (note := heads_note(gm, path, shape)):
            source = dataclasses.replace(source, notes=(*source.notes, note))
    if source.channels not in (None, channels):
        raise NotAFilterError(
            f"it has {source.channels} channels, but its input {shape} has {channels} in dims {dims}: "
            "give their dims as channel_dims={path: dim}"
        )
    if channels is None:
        raise NotAFilterError(
            "its number of channels is not known from the graph (no convolution, linear layer or norm before it); "
            "give convert an example input"
        )
    place = next((t for t in [*old.parameters(), *old.buffers(), *gm.parameters()]), torch.empty(0))
    with preserved_rng():  # initialize_neurons draws the weights of init="random"
        new = MulFreePSN(
            channels,
            _order(gm, options.order, path),
            surrogate=options.surrogate or source.surrogate,
            gradient=options.gradient,
            eps=options.eps,
            momentum=options.momentum,
            min_exponent=options.min_exponent,
            max_exponent=options.max_exponent,
            channel_dims=dims,
            device=place.device,
            dtype=place.dtype if place.is_floating_point() else None,
        )
    new.source, new.path = source, path
    return new.train(old.training)


def _checked(path: str, dims: object, rank: int | None) -> tuple[int, ...]:
    try:
        return check_dims(dims, rank)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _excluded(gm: fx.GraphModule, path: str, old: nn.Module, options: ConvertOptions) -> bool:
    source = source_of_use(old)
    return options.excludes(user_path(gm, path), source) and (callable(options.only) or options.excludes(path, source))


def _order(gm: fx.GraphModule, order: int | Mapping[str, int], path: str) -> int:
    if not isinstance(order, Mapping):
        return order
    found = _by_use(gm, order, path)
    return DEFAULT_ORDER if found is None else found


def _by_use(gm: fx.GraphModule, by_path: Mapping[str, Any], path: str) -> Any:
    """Return the value for the neuron at ``path``; of a further use without one of its own, that of the first."""
    found = value_for_path(gm, by_path, path)
    return value_for_path(gm, by_path, first_use(path)) if found is None else found


def _observed_shape(gm: fx.GraphModule, seen: Mapping[str, tuple], path: str) -> tuple[int, ...] | None:
    if path not in seen:
        if seen:
            raise NotAFilterError("the example does not reach it; remove it, or give an example that does")
        return None
    shape, dtype, _ = seen[path]
    modules, use = dict(gm.named_modules(remove_duplicate=False)), 2
    while (name := f"{path}@{use}") in seen:
        if name not in modules and seen[name][0][2:3] != shape[2:3]:
            raise NotAFilterError(
                f"it is used at several places, with inputs {shape} and {seen[name][0]}, that cannot be distinguished: "
                "give each place a neuron of its own"
            )
        use += 1
    if len(shape) < 3:
        raise NotAFilterError(
            f"its input has shape {shape}, but time, batch and channels are needed: (T, N, C, *), time first"
        )
    if not dtype.is_floating_point:
        raise NotAFilterError(f"its input is {dtype}, but a floating-point tensor is needed")
    return shape
