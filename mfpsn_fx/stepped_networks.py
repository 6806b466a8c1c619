"""Rolling up networks that step through time into ones that take the whole sequence at once."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import fx, nn

from mfpsn_fx.model.capturing import steps as unrolled
from mfpsn_fx.model.capturing.capture import copied
from mfpsn_fx.model.capturing.shared_mask import wrap_dropouts
from mfpsn_fx.model.capturing.split_layers import has_inner_layers, split_inner_layers
from mfpsn_fx.model.capturing.stepped_neuron import memory_layers, wrap_stepping_neurons
from mfpsn_fx.model.sources.description import NotAFilterError, describe, is_source, source_paths
from mfpsn_fx.passes import ConversionError, Example, PassContext, RollUp
from mfpsn_fx.passes.rollup.equivalence import check_rolled

__all__ = ["has_steps", "rolled_loop", "rolled_up"]


def has_steps(model: nn.Module) -> bool:
    """Return True if ``model`` has neurons that are called step by step, or take and return their state."""
    return unrolled.has_steps(model) or has_inner_layers(model)


def rolled_up(
    model: nn.Module, args: tuple, kwargs: Mapping, accept: Collection[str] = ()
) -> tuple[fx.GraphModule, tuple, dict]:
    """Return a graph of ``model`` that takes (T, N, *) with the source's neurons run over time, and its example.

    ``model`` is changed: layers that contain a neuron are split.

    Returns:
        The graph, and the positional and keyword arguments of its example.

    Raises:
        ValueError: there is no example.
        ConversionError: the steps of the network cannot be captured, differ, or cannot run at once.
    """
    if not (args or kwargs):
        raise ValueError(
            f"{type(model).__name__} has neurons that see one step a call: give convert an example, the whole sequence "
            "(T, N, *), from which its steps are captured"
        )
    example = unrolled.bound_example(model, args, kwargs)
    try:
        split_inner_layers(model)
        _check_known(model)
        steps, one_step = unrolled.capture_steps(model, (), example)
    except (unrolled.NotSteppedError, NotAFilterError) as error:
        raise ConversionError(str(error)) from error
    roll_up = RollUp(one_step=one_step, accept=accept)
    rolled = roll_up(steps, PassContext(Example((), example))).graph_module
    check_rolled(rolled, model, example, one_step)
    kept = {node.target for node in rolled.graph.nodes if node.op == "placeholder"}
    return rolled, (), {name: value for name, value in example.items() if name in kept}


def _check_known(model: nn.Module) -> None:
    """Raise for neurons without a description, whose states would be ignored as if their layer had none."""
    for path, neuron in source_paths(model).items():
        if not is_source(neuron):
            try:
                describe(neuron)
            except NotAFilterError as error:
                raise ConversionError(f"{path}: {error}") from error


def rolled_loop(
    model: nn.Module, args: tuple, kwargs: Mapping, accept: Collection[str] = ()
) -> tuple[fx.GraphModule, tuple, dict]:
    """Return what :func:`rolled_up` does for a ``model`` whose forward loops over single-step SpikingJelly neurons.

    ``model`` is not changed.

    Raises:
        ConversionError: its steps cannot be captured, differ, or cannot run at once.
    """
    _check_known(model)
    work = copied(model, share=True)
    wrap_dropouts(work)
    if layers := memory_layers(work):
        path, kind = next(iter(layers.items()))
        raise ConversionError(
            f"{path}: a {kind} keeps a state from step to step, and its steps cannot run at once where the forward "
            "loops over time: use step mode 'm' and whole sequences (T, N, *)"
        )
    wrap_stepping_neurons(work)
    return rolled_up(work, args, kwargs, accept)
