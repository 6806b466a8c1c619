"""Whether a layer gives on the fused T·N axis what it gives step by step."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate

from mfpsn_fx.model.capturing.capture import copied, preserved_rng

from .time_slices import Expr, Ref, RollUpError, Slices, is_random

__all__ = ["FusedAxis"]

_STEPS = 3


class FusedAxis:
    """Runs single layers both ways, on random values of the shapes that the example showed.

    The values are drawn, not the example's: on a constant example a mean over the batch looks like a layer that treats
    each sample by itself.

    Args:
        gm: the unrolled graph.
        slices: what was read from it.
        recorded: what each of its nodes made of the example, by name.
        carries_batch: whether a whole value, by its index, has a batch axis and is repeated over time.
    """

    def __init__(
        self, gm: fx.GraphModule, slices: Slices, recorded: dict[str, object], carries_batch: Callable[[int], bool]
    ) -> None:
        self.gm, self.slices, self.recorded, self.carries_batch = gm, slices, recorded, carries_batch

    def check(self, expr: Expr) -> None:
        """``RollUpError`` unless ``expr`` on T·N samples is ``expr`` on N samples, T times."""
        node = expr.at[0]
        # layers run in evaluation here, where a dropout inside draws nothing
        draws = node.op != "call_module" and is_random(self.gm, node)
        if draws or not _tensors(self.recorded[node.name]):
            return
        why = ""
        try:
            with torch.no_grad(), preserved_rng():
                torch.manual_seed(0)
                alike = self._alike(expr, node)
        except Exception as error:
            alike, why = False, f" ({error})"
        if not alike:
            layer = f"layer {expr.target!r}" if expr.op == "call_module" else f"{node.name} ({_word(expr.target)})"
            raise RollUpError(
                f"{layer} does not give on T·N samples at once what it gives step by step{why}: it mixes the samples "
                "of a batch, or looks at their number. Make it work on each sample by itself"
            )

    def mixes_in_training(self, expr: Expr) -> bool:
        """Whether in training, where it normalises, a layer's output for a sample depends on the other samples.

        The layer runs twice on the fused axis, with the same draws, and with its first sample changed: outputs for the
        others must stay.
        """
        node = expr.at[0]
        try:
            with torch.no_grad(), preserved_rng():
                torch.manual_seed(0)
                drawn: list[list[object]] = []
                fused = _zipped(
                    (node.args, node.kwargs), (expr.args, expr.kwargs), lambda a, ref: self._draw(a, ref, drawn)
                )
                inputs = [t for t in _tensors(fused) if t.ndim]
                samples = {len(t) for t in inputs}
                changed = map_aggregate(fused, _first_changed)
                results = []
                for args, kwargs in (fused, changed):
                    torch.manual_seed(1)
                    module = copied(self.gm.get_submodule(node.target)).train()
                    results.append(_tensors(module(*args, **kwargs)))
        except Exception:  # in evaluation it ran; in training it cannot be asked
            return False
        before, after = results
        return len(samples) == 1 and any(
            len(a) in samples and not _close(a[1:], b[1:])
            for a, b in zip(before, after, strict=True)
            if a.ndim and b.shape == a.shape
        )

    def _alike(self, expr: Expr, node: fx.Node) -> bool:
        drawn: list[list[object]] = []  # for each argument that is a value: what it is at each step
        fused = _zipped((node.args, node.kwargs), (expr.args, expr.kwargs), lambda a, ref: self._draw(a, ref, drawn))
        stepwise = []
        for step in range(_STEPS):
            each = iter(drawn)
            args, kwargs = _zipped(
                (node.args, node.kwargs), (expr.args, expr.kwargs), lambda _, __, each=each, step=step: next(each)[step]
            )
            stepwise.append(_tensors(self._apply(node, args, kwargs)))
        args, kwargs = without_batch(expr, *fused, self.recorded.get(_name(node.args)))
        together = _tensors(self._apply(node, args, kwargs))
        return len(together) == len(stepwise[0]) and all(
            _close(whole, torch.cat([p if p.ndim else p.unsqueeze(0) for p in parts]))
            for whole, *parts in zip(together, *stepwise, strict=True)
        )

    def _draw(self, argument: fx.Node, ref: Ref, drawn: list[list[object]]) -> object:
        """An argument on the fused axis, and in ``drawn`` its parts."""
        value, timed = self.recorded[argument.name], self.slices.exprs[ref.index].timed
        if not _tensors(value):
            drawn.append([value] * _STEPS)
            return self._number(ref, value)
        if not timed:
            part = _random(value, 0) if self.carries_batch(ref.index) else value
            drawn.append([part] * _STEPS)
            return torch.cat([part] * _STEPS) if self.carries_batch(ref.index) else value
        parts = [map_aggregate(value, lambda v, step=step: _random(v, step)) for step in range(_STEPS)]
        drawn.append(parts)
        return _joined(parts)

    def _number(self, ref: Ref, value: object) -> object:
        """A number or shape that was worked out from a slice, as it comes out on the fused axis."""
        expr = self.slices.exprs[ref.index]
        if not expr.timed:
            return value

        def fused(part: object) -> object:
            if not isinstance(part, Ref):
                return part
            inner = self.slices.exprs[part.index]
            shown = self.recorded[(inner.at[0] if inner.at else inner.node).name]
            if isinstance(shown, Tensor):
                return torch.empty(_STEPS * len(shown), *shown.shape[1:], device="meta")
            return self._number(part, shown)

        args, kwargs = map_aggregate(expr.args, fused), map_aggregate(expr.kwargs, fused)
        return self._apply(expr.at[0], args, kwargs)

    def _apply(self, node: fx.Node, args: tuple, kwargs: dict) -> object:
        args, kwargs = map_aggregate((args, kwargs), lambda a: a.clone() if isinstance(a, Tensor) else a)
        if node.op == "call_module":
            return copied(self.gm.get_submodule(node.target)).eval()(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], node.target)(*args[1:], **kwargs)
        return node.target(*args, **kwargs)


def without_batch(expr: Expr, args: tuple, kwargs: dict, source: object) -> tuple[tuple, dict]:
    """``view(N, …)`` with the N of one step, which on the fused axis is another number, as ``view(-1, …)``.

    Args:
        source: what is viewed, as one step of the example has it.
    """
    if expr.target not in ("view", "reshape", torch.reshape) or kwargs or not isinstance(source, Tensor):
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
    """Another value of the same kind: drawn if it is floating point, else the samples in another order."""
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


def _zipped(given: object, refs: object, function) -> object:
    """Arguments, with those that are values mapped through ``function(node, ref)``."""
    if isinstance(refs, Ref):
        return function(given, refs)
    if isinstance(refs, dict):
        return {key: _zipped(given[key], value, function) for key, value in refs.items()}
    if isinstance(refs, (tuple, list)):
        parts = [_zipped(g, value, function) for g, value in zip(given, refs, strict=True)]
        return tuple(parts) if isinstance(refs, tuple) else parts
    return refs


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
