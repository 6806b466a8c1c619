"""Switch of SpikingJelly networks from single-step to multi-step mode, where both compute the same."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..sources.description import qualified_name, source_paths
from .capture import copied, preserved_rng

__all__ = ["Switched", "to_multi_step"]

_LAYERS = "spikingjelly.activation_based.layer"
_MEMORY = "spikingjelly.activation_based.base.MemoryModule"
_NET = "spikingjelly.activation_based.functional"
# Containers whose children stay in step mode 's', and what a message says about a neuron in them.
_CONTAINERS = {
    "MultiStepContainer": "which steps it through time; take it out and set its step_mode to 'm'",
    "TLastMultiStepContainer": "which steps it through time; take it out and set its step_mode to 'm'",
    "StepModeContainer": "which steps it through time; take it out and set its step_mode to 'm'",
    "SeqToANNContainer": "which flattens time into the batch, so that a neuron in it sees no steps; take it out",
    "TLastSeqToANNContainer": "which flattens time into the batch, so that a neuron in it sees no steps; take it out",
    "ElementWiseRecurrentContainer": "which feeds its output back into its input: no filter",
    "LinearRecurrentContainer": "which feeds its output back into its input: no filter",
}
# Layers of torch.nn that depend on the number of dims; set_step_mode does not reach them.
_WITHOUT_STEP_MODE = (
    nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.GroupNorm,
    nn.modules.pooling._MaxPoolNd, nn.modules.pooling._AvgPoolNd, nn.modules.pooling._AdaptiveAvgPoolNd,
    nn.modules.pooling._AdaptiveMaxPoolNd, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d,
    nn.Upsample, nn.PixelShuffle,
)  # fmt: skip
NOTE = "step mode 's' switched to 'm'"


@dataclasses.dataclass(frozen=True)
class Switched:
    """Result of :func:`to_multi_step`: path → note of switched neurons, and path → reason of the others.

    ``looped``: the reason is that the model's own forward calls neurons several times, as a loop over time does.
    """

    notes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    refusals: Mapping[str, str] = dataclasses.field(default_factory=dict)
    looped: bool = False


def to_multi_step(model: nn.Module, args: tuple, kwargs: Mapping) -> Switched:
    """Set ``model``, in place, to step mode 'm' if its neurons are in 's' and both modes agree on the example.

    The example is a whole sequence: each tensor in it has T first. Two copies run it, one step by step and one in step
    mode 'm', both in evaluation mode, in float64 and from reset states. The model is switched only if the outputs and
    the inputs of each neuron are the same.

    Args:
        model: neurons of other libraries than SpikingJelly are ignored.
        args, kwargs: the example. Without one, a model in step mode 's' is unchanged, and its neurons' adapters refuse.
    """
    stepping = {p: m for p, m in source_paths(model).items() if _mode(m) == "s"}
    if not stepping:
        return Switched()
    refusals = {p: reason for p in stepping if (reason := _inside_container(model, p)) is not None}
    switchable = [p for p in stepping if p not in refusals]
    set_mode = getattr(sys.modules.get(_NET), "set_step_mode", None)
    if not switchable or set_mode is None or not (args or kwargs):
        return Switched(refusals=refusals)
    if (calls := _most_calls(model, switchable, args, kwargs)) > 1:
        reason = (
            "it is in single-step mode, and the model's own forward steps through time: it calls this neuron "
            f"{calls} times (or shares it between places); move the loop out of the forward, or set step mode 'm' "
            "and feed (T, N, C, *)"
        )
        return Switched(refusals={**refusals, **dict.fromkeys(switchable, reason)}, looped=not refusals)
    reason = _disagreement(model, switchable, args, dict(kwargs), set_mode)
    if reason is not None:
        return Switched(refusals={**refusals, **dict.fromkeys(switchable, reason)})
    set_mode(model, "m")
    return Switched(dict.fromkeys(switchable, NOTE), refusals)


def _mode(m: nn.Module) -> str | None:
    return getattr(m, "step_mode", None)


def _container_class(m: nn.Module) -> str | None:
    """Return the name of the SpikingJelly container that ``m`` is or derives from; None if there is none."""
    for cls in type(m).__mro__:
        if cls.__name__ in _CONTAINERS and qualified_name(cls).startswith(f"{_LAYERS}."):
            return cls.__name__
    return None


def _inside_container(model: nn.Module, path: str) -> str | None:
    parts = path.split(".")
    for end in range(len(parts)):
        kind = _container_class(model.get_submodule(".".join(parts[:end])))
        if kind is not None:
            return f"it is inside a {kind}, {_CONTAINERS[kind]}"
    return None


def _layer_without_step_mode(model: nn.Module) -> str | None:
    """Return a message naming a layer that does not follow set_step_mode; None if all do."""
    for path, m in model.named_modules():
        fixed = isinstance(m, _WITHOUT_STEP_MODE) or (type(m) is nn.Flatten and m.start_dim >= 0)
        if fixed and _mode(m) is None and path and _inside_container(model, path) is None:
            return (
                f"it is in single-step mode, and {path} ({qualified_name(type(m))}) has no step mode to follow: take "
                f"spikingjelly.activation_based.layer.{type(m).__name__}, or feed the neurons (T, N, C, *) yourself"
            )
    return None


def _disagreement(
    model: nn.Module, paths: list[str], args: tuple, kwargs: dict, set_mode: Callable[[nn.Module, str], None]
) -> str | None:
    """Return why single-step and multi-step mode differ on the example; None if they agree."""
    flat, spec = _to_double(args, kwargs)
    tensors = [v for v in flat if isinstance(v, Tensor) and v.ndim]
    steps = {len(v) for v in tensors}
    with preserved_rng(), torch.no_grad():
        if (reason := _layer_without_step_mode(model)) is not None:
            return reason
        if len(steps) != 1:
            return (
                "it is in single-step mode, and the example's tensors do not share their first dim, T: give a whole "
                "sequence (T, N, C, *), or call functional.set_step_mode(net, 'm') yourself"
            )
        try:
            stepped = _run_step_by_step(_reset_copy(model), paths, flat, spec, steps.pop())
        except Exception as error:
            return (
                "it is in single-step mode, and the example is no sequence (T, N, C, *) of what the model takes at "
                f"each step ({type(error).__name__}: {_first_line(error)}); give one"
            )
        whole = _reset_copy(model)
        try:
            set_mode(whole, "m")
            args, kwargs = pytree.tree_unflatten(flat, spec)
            with _recorded_inputs(whole, paths) as seen:
                at_once = pytree.tree_leaves(whole(*args, **kwargs))
            at_once += [x for path in paths for x in seen[path]]
        except Exception as error:
            return (
                f"it is in single-step mode, and the model does not run in step mode 'm' ({type(error).__name__}: "
                f"{_first_line(error)}): its forward is written for one step"
            )
    if len(at_once) != len(stepped) or not all(map(_equal, stepped, at_once)):
        return (
            "it is in single-step mode, and in step mode 'm' the model computes something else on the example: its "
            "forward is written for one step (it may flatten or average over dims that move)"
        )
    return None


def _to_double(args: tuple, kwargs: Mapping) -> tuple[list, pytree.TreeSpec]:
    flat, spec = pytree.tree_flatten((args, dict(kwargs)))
    return [v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for v in flat], spec


def _reset_copy(model: nn.Module) -> nn.Module:
    """Return a copy in evaluation mode and float64, its states reset, without the user's hooks on its neurons."""
    copy = copied(model, share=True).eval().double()
    for m in copy.modules():
        if any(qualified_name(cls) == _MEMORY for cls in type(m).__mro__):
            m.reset()
    for m in source_paths(copy).values():
        m._forward_hooks.clear()
        m._forward_pre_hooks.clear()
    return copy


def _most_calls(model: nn.Module, paths: list[str], args: tuple, kwargs: Mapping) -> int:
    """Return the maximal number of calls of a neuron in one forward of the unchanged model."""
    counts, copy = dict.fromkeys(paths, 0), _reset_copy(model)

    def count(path: str):
        def hook(_module, _args):
            counts[path] += 1

        return hook

    for path in paths:
        copy.get_submodule(path).register_forward_pre_hook(count(path))
    args, kwargs = pytree.tree_unflatten(*_to_double(args, kwargs))
    # The model may take one step and fail on the whole sequence: the calls before that are counted.
    with preserved_rng(), torch.no_grad(), contextlib.suppress(Exception):
        copy(*args, **kwargs)
    return max(counts.values())


@contextlib.contextmanager
def _recorded_inputs(model: nn.Module, paths: list[str]) -> Iterator[dict[str, list[Tensor]]]:
    """Record the inputs of each neuron: spikes alone would agree between networks that hardly fire."""
    seen: dict[str, list[Tensor]] = {path: [] for path in paths}
    handles = [
        model.get_submodule(path).register_forward_pre_hook(lambda _m, args, path=path: seen[path].append(args[0]))
        for path in paths
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _run_step_by_step(model: nn.Module, paths: list[str], flat: list, spec, steps: int) -> list[object]:
    """Run the sequence step by step; return the outputs of all steps, then the inputs of each neuron."""
    results = []
    for t in range(steps):
        args, kwargs = pytree.tree_unflatten([v[t] if isinstance(v, Tensor) and v.ndim else v for v in flat], spec)
        with _recorded_inputs(model, paths) as seen:
            outputs = pytree.tree_leaves(model(*args, **kwargs))
        results.append(outputs + [x for path in paths for x in seen[path]])
    return [
        torch.stack(values) if isinstance(values[0], Tensor) else values[0] for values in zip(*results, strict=True)
    ]


def _equal(a: object, b: object) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and torch.allclose(a, b.to(a.dtype), rtol=1e-6, atol=1e-9)
    return not isinstance(a, Tensor) and not isinstance(b, Tensor)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:160]
