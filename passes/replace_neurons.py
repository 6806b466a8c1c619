"""Put a MulFreePSN in the place of every spiking neuron."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import torch
from torch import fx, nn

from mfpsn_fx.kernels.quantiser import Gradient
from mfpsn_fx.kernels.surrogate import Surrogate
from mfpsn_fx.model.capture import preserved_rng, said_of, user_path
from mfpsn_fx.model.channel_dims import DEFAULT_DIMS, check_dims
from mfpsn_fx.model.neuron import MulFreePSN
from mfpsn_fx.model.source import NotAFilterError, describe, source_paths

from .base import Pass, Result
from .channel_widths import channels_before, heads_note
from .neurons import INPUTS
from .separate_uses import has_state

__all__ = ["REFUSED", "ConversionError", "ReplaceNeurons", "refusal_message"]

REFUSED = "mfpsn_refused"  # gm.meta: path -> reason, of neurons that were found unfit before the graph was captured


class ConversionError(ValueError):
    """Neurons that could not be converted; the message names each with the reason."""


def refusal_message(failed: Mapping[str, str], total: int) -> str:
    lines = "\n".join(f"  {path}: {reason}" for path, reason in failed.items())
    return (
        f"{len(failed)} of {total} neurons cannot be converted:\n{lines}\n"
        "With strict=False they stay as they are and are listed in the selection."
    )


class ReplaceNeurons(Pass):
    """Swap each source neuron for a MulFreePSN of the same path, inside leaves too.

    Before: ``%lif : call_module[target=lif](args = (%conv,))`` with an ``LIFNode`` at ``lif``.
    After: the same node; ``lif`` is a ``MulFreePSN`` of dilation 1 that remembers its source (``.source``).

    Channels are what an example showed (:class:`ObserveInputs`), what the neuron itself knows, or those of the last
    convolution, linear layer or norm in front of it.

    Args:
        order: k of the new neurons.
        channel_dims: for neurons by path, the dim or dims of their input (time-first order) that hold the channels,
            where that is not dim 2.
        surrogate: None keeps the source's.
        gradient, momentum, eps, min_exponent, max_exponent: as in ``MulFreePSN``.
        strict: raise where a neuron cannot be converted; otherwise it stays and is listed in the selection.

    Raises:
        ValueError: ``channel_dims`` names what is no neuron, or dims that are none of its input's.
        ConversionError: with ``strict``, naming every neuron that stays and why.
    """

    name = "replace_neurons"
    gives = ("neurons",)

    def __init__(
        self,
        order: int = 2,
        *,
        surrogate: Surrogate | None = None,
        gradient: Gradient | str = Gradient.STRAIGHT_THROUGH,
        strict: bool = True,
        channel_dims: Mapping[str, int | tuple[int, ...]] | None = None,
        **settings,
    ) -> None:
        self.order, self.surrogate = order, surrogate
        self.gradient, self.strict, self.settings = gradient, strict, settings
        self.channel_dims = dict(channel_dims or {})

    def call(self, gm: fx.GraphModule) -> Result:
        made: dict[tuple[int, str] | int, MulFreePSN] = {}
        swaps: list[tuple[str, MulFreePSN]] = []
        failed: dict[str, str] = {}
        refused, paths = gm.meta.get(REFUSED, {}), source_paths(gm)
        known = sorted(user_path(gm, path) for path in paths)
        if unknown := sorted(set(self.channel_dims) - set(known) - set(paths)):
            raise ValueError(f"channel_dims names layers that are no neurons: {unknown}; the neurons are {known}")
        for path, old in paths.items():
            if (reason := said_of(gm, refused, path)) is not None:
                failed[path] = reason
                continue
            parent, _, child = path.rpartition(".")
            # A membrane belongs to its place; a PSN that stands in several shares its weights between them.
            place = (id(gm.get_submodule(parent)), child) if has_state(old) else id(old)
            if place not in made:
                try:
                    made[place] = self._make(gm, path, old)
                except NotAFilterError as error:
                    failed[path] = str(error)
                    continue
            swaps.append((path, made[place]))
        if failed and self.strict:
            raise ConversionError(refusal_message(failed, len(failed) + len(swaps)))
        for path, reason in failed.items():
            gm.get_submodule(path).mfpsn_unconverted = reason  # for the selection, through copies and pickles
        for path, new in swaps:
            gm.set_submodule(path, new)
        return Result(gm, [f"{path}: {new.source.name} -> {new!r}" for path, new in swaps])

    def _make(self, gm: fx.GraphModule, path: str, old: nn.Module) -> MulFreePSN:
        source = describe(old)
        said = said_of(gm, self.channel_dims, path)
        shape = _observed_shape(gm, path)
        dims = DEFAULT_DIMS if said is None else _checked(path, said, None if shape is None else len(shape))
        channels = source.channels or channels_before(gm, path)
        if shape is not None:
            channels = math.prod(shape[d] for d in dims)
            if said is None and (note := heads_note(gm, path, shape)):
                source = dataclasses.replace(source, notes=(*source.notes, note))
        if source.channels not in (None, channels):
            raise NotAFilterError(
                f"it has {source.channels} channels, but its input {shape} has {channels} in dims {dims}: "
                "channel_dims={path: dim} says where they are"
            )
        if channels is None:
            raise NotAFilterError(
                "its number of channels is not told by the graph (no convolution, linear layer or norm in front of "
                "it); give convert an example input"
            )
        place = next((t for t in [*old.parameters(), *old.buffers(), *gm.parameters()]), torch.empty(0))
        with preserved_rng():  # initialise_neurons draws where that is wanted
            new = MulFreePSN(
                channels,
                self.order,
                surrogate=self.surrogate or source.surrogate,
                gradient=self.gradient,
                channel_dims=dims,
                device=place.device,
                dtype=place.dtype if place.is_floating_point() else None,
                **self.settings,
            )
        new.source, new.path = source, path
        return new.train(old.training)


def _checked(path: str, dims: object, rank: int | None) -> tuple[int, ...]:
    try:
        return check_dims(dims, rank)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _observed_shape(gm: fx.GraphModule, path: str) -> tuple[int, ...] | None:
    seen = gm.meta.get(INPUTS, {})
    if path not in seen:
        if seen:
            raise NotAFilterError("the example does not reach it; remove it, or give an example that does")
        return None
    shape, dtype, _ = seen[path]
    again, use = dict(gm.named_modules(remove_duplicate=False)), 2
    while (name := f"{path}@{use}") in seen:
        if name not in again and seen[name][0][2:3] != shape[2:3]:
            raise NotAFilterError(
                f"it is used at several places, with inputs {shape} and {seen[name][0]}, that cannot be told apart: "
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
