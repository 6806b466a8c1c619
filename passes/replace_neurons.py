"""Put a MulFreePSN in the place of every spiking neuron."""

from __future__ import annotations

import torch
from torch import fx, nn

from mfpsn_fx.kernels.quantiser import Gradient
from mfpsn_fx.kernels.surrogate import Surrogate
from mfpsn_fx.model.capture import preserved_rng
from mfpsn_fx.model.neuron import MulFreePSN
from mfpsn_fx.model.source import NotAFilterError, describe, source_paths

from .base import Pass, Result
from .neurons import INPUTS

__all__ = ["ConversionError", "ReplaceNeurons"]


class ConversionError(ValueError):
    """Neurons that could not be converted; the message names each with the reason."""


class ReplaceNeurons(Pass):
    """Swap each source neuron for a MulFreePSN of the same path, inside leaves too.

    Before: ``%lif : call_module[target=lif](args = (%conv,))`` with an ``LIFNode`` at ``lif``.
    After: the same node; ``lif`` is a ``MulFreePSN`` of dilation 1 that remembers its source (``.source``).

    Channels are what an example showed (:class:`ObserveInputs`), what the neuron itself knows, or those of the last
    convolution, linear layer or norm in front of it.

    Args:
        order: k of the new neurons.
        surrogate: None keeps the source's.
        gradient, momentum, eps, min_exponent, max_exponent: as in ``MulFreePSN``.
        strict: raise where a neuron cannot be converted; otherwise it stays and is listed in the selection.

    Raises:
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
        **settings,
    ) -> None:
        self.order, self.surrogate = order, surrogate
        self.gradient, self.strict, self.settings = gradient, strict, settings

    def call(self, gm: fx.GraphModule) -> Result:
        made: dict[int, MulFreePSN] = {}
        swaps: list[tuple[str, MulFreePSN]] = []
        failed: dict[str, str] = {}
        for path, old in source_paths(gm).items():
            if id(old) not in made:
                try:
                    made[id(old)] = self._make(gm, path, old)
                except NotAFilterError as error:
                    failed[path] = str(error)
                    continue
            swaps.append((path, made[id(old)]))
        if failed and self.strict:
            lines = "\n".join(f"  {path}: {reason}" for path, reason in failed.items())
            raise ConversionError(
                f"{len(failed)} of {len(failed) + len(swaps)} neurons cannot be converted:\n{lines}\n"
                "With strict=False they stay as they are and are listed in the selection."
            )
        for path, new in swaps:
            parent, _, child = path.rpartition(".")
            setattr(gm.get_submodule(parent), child, new)
        return Result(gm, [f"{path}: {new.source.name} -> {new!r}" for path, new in swaps])

    def _make(self, gm: fx.GraphModule, path: str, old: nn.Module) -> MulFreePSN:
        source = describe(old)
        channels = _observed_channels(gm, path) or source.channels or _channels_before(gm, path)
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
                device=place.device,
                dtype=place.dtype if place.is_floating_point() else None,
                **self.settings,
            )
        new.source, new.path = source, path
        return new.train(old.training)


def _observed_channels(gm: fx.GraphModule, path: str) -> int | None:
    seen = gm.meta.get(INPUTS, {})
    if path not in seen:
        if seen:
            raise NotAFilterError("the example does not reach it; remove it, or give an example that does")
        return None
    shape, dtype, _ = seen[path]
    if len(shape) < 3:
        raise NotAFilterError(
            f"its input has shape {shape}, but time, batch and channels are needed: (T, N, C, *), time first"
        )
    if not dtype.is_floating_point:
        raise NotAFilterError(f"its input is {dtype}, but a floating-point tensor is needed")
    return shape[2]


def _width(module: nn.Module) -> int | None:
    """Channels that ``module`` puts out, if it is a layer that knows."""
    if isinstance(module, nn.Sequential) or type(module).__name__.endswith("Container"):
        widths = [w for child in module.children() if (w := _width(child)) is not None]
        return widths[-1] if widths else None
    for attribute in ("out_channels", "out_features", "num_features"):
        if isinstance(value := getattr(module, attribute, None), int):
            return value
    return None


def _channels_before(gm: fx.GraphModule, path: str) -> int | None:
    node = next((n for n in gm.graph.nodes if n.op == "call_module" and n.target == path), None)
    if node is None:  # inside a leaf: the last such layer that is registered before the neuron
        last = None
        for name, module in gm.named_modules():
            if name == path:
                return last
            last = _width(module) if _width(module) is not None and not list(module.children()) else last
        return None
    while node.all_input_nodes:
        node = node.all_input_nodes[0]
        if node.op != "call_module":
            if node.op == "call_method" or "flatten" in str(node.target):
                return None
            continue
        module = gm.get_submodule(node.target)
        if (width := _width(module)) is not None:
            return width
        if isinstance(module, MulFreePSN):
            return module.channels
        if "Flatten" in type(module).__name__:
            return None
    return None
