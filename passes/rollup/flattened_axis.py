"""Check that a layer computes on the flattened T·N axis what it computes step by step."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate

from mfpsn_fx.model.capturing.capture import copied, preserved_rng

from ..op_traits import draws_random
from .value_numbering import ValueNumbering

__all__ = ["FlattenedAxis", "without_batch"]

_STEPS = 3


class FlattenedAxis:
    """Runs single layers on the flattened axis and step by step, on random values of the example's shapes.

    The values are random, not the example's: on a constant example a mean over the batch looks like a layer that treats
    each sample by itself.
    """

    def __init__(self, numbering: ValueNumbering) -> None:
        self.gm, self.numbering, self.recorded = numbering.gm, numbering, numbering.recorded

    def differs(self, node: fx.Node) -> str | None:
        """Return the reason why ``node`` on T·N samples is not ``node`` on N samples, T times; None if it is."""
        # layers run in evaluation here, where a dropout within them is off
        draws = node.op != "call_module" and draws_random(self.gm, node)
        if draws or not _tensors(self.recorded[node.name]):
            return None
        why = ""
        try:
            with torch.no_grad(), preserved_rng():
                torch.manual_seed(0)
                if self._agrees(node):
                    return None
        except Exception as error:
            why = f" ({error})"
        layer = f"layer {node.target!r}" if node.op == "call_module" else f"{node.name} ({_word(node.target)})"
        return (
            f"{layer} does not give on T·N samples at once what it gives step by step{why}: it mixes the samples of a "
            "batch, or looks at their number. Make it work on each sample by itself"
        )

    def mixes_in_training(self, node: fx.Node) -> bool:
        """Return True if a layer's output for a sample depends on the other samples in training.

        The layer runs twice on the flattened axis with the same random numbers, the second time with its first sample
        changed: the outputs for the other samples must be equal.
        """
        try:
            with torch.no_grad(), preserved_rng():
                torch.manual_seed(0)
                flattened = self._random_arguments(node)[0]
                inputs = [t for t in _tensors(flattened) if t.ndim]
                samples = {len(t) for t in inputs}
                changed = map_aggregate(flattened, _first_changed)
                results = []
                for args, kwargs in (flattened, changed):
                    torch.manual_seed(1)
                    module = copied(self.gm.get_submodule(node.target), share=True).train()
                    results.append(_tensors(module(*args, **kwargs)))
        except Exception:  # it runs in evaluation, but not in training
            return False
        before, after = results
        return len(samples) == 1 and any(
            len(a) in samples and not _close(a[1:], b[1:])
            for a, b in zip(before, after, strict=True)
            if a.ndim and b.shape == a.shape
        )

    def _agrees(self, node: fx.Node) -> bool:
        flattened, *steps = self._random_arguments(node)
        stepwise = [_tensors(self._apply(node, *step)) for step in steps]
        args, kwargs = without_batch(node, *flattened, self.recorded.get(_name(node.args)))
        together = _tensors(self._apply(node, args, kwargs))
        return len(together) == len(stepwise[0]) and all(
            _close(whole, torch.cat([p if p.ndim else p.unsqueeze(0) for p in parts]))
            for whole, *parts in zip(together, *stepwise, strict=True)
        )

    def _random_arguments(self, node: fx.Node) -> list[tuple]:
        """Return arguments of ``node`` on the flattened axis, and at each of ``_STEPS`` steps."""
        values = [self._random_argument(argument) for argument in _nodes(node)]
        arguments = []
        for position in range(_STEPS + 1):
            each = iter(values)
            arguments.append(_replaced(node, lambda _, each=each, position=position: next(each)[position]))
        return arguments

    def _random_argument(self, argument: fx.Node) -> list[object]:
        """Return an argument on the flattened axis, and at each step."""
        value, read = self.recorded[argument.name], self.numbering.values[argument]
        if not _tensors(value):
            return [self._number(argument), *[value] * _STEPS]
        if read.index is None:
            group = self.numbering.groups[read.number]
            batch = group.from_input and isinstance(value, Tensor) and value.ndim > 0
            part = _random(value, 0) if batch else value
            return [torch.cat([part] * _STEPS) if batch else value, *[part] * _STEPS]
        parts = [map_aggregate(value, lambda v, step=step: _random(v, step)) for step in range(_STEPS)]
        return [_joined(parts), *parts]

    def _number(self, node: fx.Node) -> object:
        """Return the value on the flattened axis of a number or shape that was computed from one step."""
        if self.numbering.values[node].index is None:
            return self.recorded[node.name]

        def flattened(argument: fx.Node) -> object:
            shown = self.recorded[argument.name]
            if isinstance(shown, Tensor):
                return torch.empty(_STEPS * len(shown), *shown.shape[1:], device="meta")
            return self._number(argument)

        return self._apply(node, *_replaced(node, flattened))

    def _apply(self, node: fx.Node, args: tuple, kwargs: dict) -> object:
        args, kwargs = map_aggregate((args, kwargs), lambda a: a.clone() if isinstance(a, Tensor) else a)
        if node.op == "call_module":
            return copied(self.gm.get_submodule(node.target), share=True).eval()(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], node.target)(*args[1:], **kwargs)
        return node.target(*args, **kwargs)


def without_batch(node: fx.Node, args: tuple, kwargs: dict, source: object) -> tuple[tuple, dict]:
    """Return the arguments of ``view(N, …)``, with N the batch size of one step, as those of ``view(-1, …)``.

    On the flattened axis, and for other inputs than the example, that size is another number.

    Args:
        source: the viewed value at one step of the example.
    """
    if node.target not in ("view", "reshape", torch.reshape) or kwargs or not isinstance(source, Tensor):
        return args, kwargs
    sizes = args[1] if len(args) == 2 and isinstance(args[1], (tuple, list)) else args[1:]
    if not sizes or not all(isinstance(size, int) for size in sizes) or not source.ndim or sizes[0] != len(source):
        return args, kwargs
    rest, known = list(sizes[1:]), 1
    for size in rest:
        known *= size if size != -1 else 1
    if not known or not source.numel():
        return args, kwargs
    rest = [source[0].numel() // known if size == -1 else size for size in rest]
    return (args[0], (-1, *rest)), {}


def _random(value: object, step: int) -> object:
    """Return another value of the same kind: random if it is floating point, else the samples in another order."""
    if not isinstance(value, Tensor) or not value.ndim:
        return value
    return torch.randn_like(value) if value.is_floating_point() else value.roll(step, 0)


def _first_changed(value: object) -> object:
    if not isinstance(value, Tensor) or not value.ndim or not value.is_floating_point():
        return value
    return torch.cat([3 * value[:1] + 5, value[1:]])


def _joined(parts: list) -> object:
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(parts) if first.ndim else first
    if isinstance(first, (tuple, list)):
        return tuple(_joined(list(items)) for items in zip(*parts, strict=True))
    return first


def _nodes(node: fx.Node) -> list[fx.Node]:
    """Return the arguments that are nodes, with repetitions."""
    found: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), found.append)
    return found


def _replaced(node: fx.Node, function: Callable[[fx.Node], object]) -> tuple[tuple, dict]:
    """Return the arguments with nodes replaced, in plain containers: fx.map_arg returns FX's own list types."""
    return tuple(fx.map_arg(tuple(node.args), function)), dict(fx.map_arg(dict(node.kwargs), function))


def _tensors(value: object) -> list[Tensor]:
    return list(_walk(value))


def _walk(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)) and not isinstance(value, torch.Size):
        for part in value:
            yield from _walk(part)


def _close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    if not b.is_floating_point():
        return torch.equal(a, b.to(a.dtype))
    tolerance = max(1e-3, 100 * torch.finfo(b.dtype).eps)
    return torch.allclose(a.to(b.dtype), b, rtol=tolerance, atol=tolerance, equal_nan=True)


def _name(args: tuple) -> str:
    return args[0].name if args and isinstance(args[0], fx.Node) else ""


def _word(target: object) -> str:
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))
