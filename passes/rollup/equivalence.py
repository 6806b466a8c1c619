"""Check that a network that was rolled up over time computes what the source network computes."""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from mfpsn_fx.model.capturing.capture import copied, preserved_rng
from mfpsn_fx.model.capturing.over_time import OverTime
from mfpsn_fx.model.capturing.state_flow import StateArguments, state_arguments
from mfpsn_fx.model.capturing.steps import NotSteppedError
from mfpsn_fx.model.integrator import LeakyIntegrator
from mfpsn_fx.model.sources.stepping import stepping_of
from mfpsn_fx.model.time_axis import expect_steps

from ..errors import RollUpError
from ..op_traits import draws_random
from .emit import WITHOUT_RESET

__all__ = ["check_rolled"]

_log = logging.getLogger("mfpsn_fx")


def check_rolled(rolled: fx.GraphModule, model: nn.Module, example: Mapping[str, object], one_step: bool) -> None:
    """Raise if ``rolled`` and ``model`` differ on the example, on random values, or with one sample more.

    Both run in evaluation and in float64. This finds what tracing does not see: an operation in place whose result is
    not used, an attribute that is read or written between steps, the example's batch size as a number. A single step
    that takes its states as arguments is given those that its last call returned. Not compared: networks that draw
    random numbers, and membranes that are read out without their reset.

    Args:
        rolled: the rolled-up graph, with the source's own neurons in it, resets included.
        model: the source; both are left as they are.
        example: by the names of ``model``'s arguments.
        one_step: True if ``model`` sees one step in each call.

    Raises:
        RollUpError: their outputs, or the inputs of their neurons, differ.
    """
    if any(n.op != "call_module" and draws_random(rolled, n) for n in rolled.graph.nodes):
        return
    given = [n.target for n in rolled.graph.nodes if n.op == "placeholder"]
    name = type(model).__name__
    try:
        states = _states(model, example, given) if one_step else None
    except NotSteppedError as error:
        _log.warning("%s was not compared with its rolled-up graph, which may differ: %s", name, error)
        return
    with preserved_rng(), torch.no_grad(), _Float64():
        torch.manual_seed(0)
        values = {k: _double(v) for k, v in example.items()}
        drawn = [{k: _redrawn(v, factor) if k in given else v for k, v in values.items()} for factor in (1, 4, 16)]
        for inputs in (values, *drawn):
            try:
                found = _difference(rolled, model, inputs, given, one_step, states)
            except _RolledError as error:
                found = f"it does not run: {error}"
            if found is not None:
                raise RollUpError(
                    f"{name} rolled up over time does not give what its own code gives ({found}): something that its "
                    "forward does is not seen when it is traced, such as an operation in place whose result is not "
                    "used (write c = c.clamp(min=0), not c.clamp_(min=0)), an attribute that is read or written "
                    "between steps (keep it in a variable), or a reset of its neurons within the loop"
                )
        larger = [_one_sample_more(rolled, inputs, one_step) for inputs in drawn]
        try:
            each = (
                _difference(rolled, model, inputs, given, one_step, states) for inputs in larger if inputs is not None
            )
            found = next((difference for difference in each if difference is not None), None)
        except _RolledError as error:
            _log.warning(
                "%s: the converted network takes batches of the example's size alone, since its forward uses that "
                "size as a number (such as x.view(x.size(0), -1); write x.flatten(1)): %s", name, error,
            )  # fmt: skip
            return
        if found is not None:
            raise RollUpError(
                f"{name} rolled up over time gives something else than its own code for batches of another size than "
                f"the example's ({found}): its forward counts with the batch size; take a mean instead"
            )


class _Float64(TorchFunctionMode):
    """Mode in which explicit casts to float32, such as those of snnTorch's spikes, give float64."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is Tensor.float:
            return args[0].double()
        swap = lambda a: torch.float64 if a is torch.float32 else a  # noqa: E731
        return func(*map(swap, args), **{k: swap(v) for k, v in (kwargs or {}).items()})


class _RolledError(Exception):
    """The rolled-up network does not run where the source does."""


def _double(value: object) -> object:
    # in float64 rounding does not flip a spike where layers see T·N samples instead of N
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _redrawn(value: object, factor: float) -> object:
    """Return random values with the same mean and ``factor`` times the deviation, to make neurons fire that rest."""
    if not isinstance(value, Tensor) or not value.is_floating_point() or not value.numel():
        return value
    spread = value.std(correction=0) if bool((value != value.flatten()[0]).any()) else value.abs().mean() + 1
    return value.mean() + factor * spread * torch.randn_like(value)


def _one_sample_more(rolled: fx.GraphModule, inputs: dict[str, object], one_step: bool) -> dict[str, object] | None:
    """Return the inputs with their first sample repeated at the end, or None if the graph does not show N's dim."""
    larger = dict(inputs)
    timed = [n for n in rolled.graph.nodes if n.target in (expect_steps, torch.narrow)]
    for node in (n for n in rolled.graph.nodes if n.op == "placeholder"):
        value = inputs.get(node.target)
        if not isinstance(value, Tensor):
            continue
        time = {n.args[1] for n in timed if n.args[0] is node} or ({0} if one_step else set())
        if len(time) > 1 or (not time and timed) or value.ndim <= len(time):
            return None
        batch = 1 if time == {0} else 0
        larger[node.target] = torch.cat([value, value.narrow(batch, 0, 1)], batch)
    return larger


def _difference(
    rolled: fx.GraphModule,
    model: nn.Module,
    inputs: dict[str, object],
    given: list[str],
    one_step: bool,
    states: StateArguments | None,
) -> str | None:
    """Describe the first output that differs; return None where all are the same, or the source itself fails."""
    try:
        expected, source_inputs = _run_source(model, inputs, one_step, states)
    except Exception as error:  # the source does not run in float64, or not at this size: nothing to compare with
        _log.debug("%s does not run beside its rolled-up graph: %s", type(model).__name__, error)
        return None
    copy = copied(rolled, share=True).eval().double()
    try:
        with _inputs_of(copy, (OverTime, LeakyIntegrator)) as rolled_inputs:
            found = copy(**{k: _cloned(v) for k, v in inputs.items() if k in given})
    except Exception as error:
        raise _RolledError(str(error).strip().splitlines()[0]) from error
    output = next(n for n in rolled.graph.nodes if n.op == "output").args[0]
    # inputs of neurons come first: networks that hardly fire give the same output even if they differ
    pairs = [
        *_neuron_inputs(rolled, rolled_inputs, source_inputs), *_leaves("", output, found, expected, one_step)
    ]  # fmt: skip
    for path, node, ours, theirs in pairs:
        if _reads_without_reset(node, tuple(n.target for n in rolled.graph.nodes if WITHOUT_RESET in n.meta)):
            continue
        where = path if path.startswith("the input of ") else f"output{path}" if path else "its output"
        if theirs is None:
            return f"{where} is a tensor, where the source returns something else"
        if ours.shape != theirs.shape:
            return f"{where} has shape {tuple(ours.shape)} instead of {tuple(theirs.shape)}"
        if ours.is_floating_point() != theirs.is_floating_point():
            return f"{where} is {ours.dtype} instead of {theirs.dtype}"
        # some libraries round decays and kernels to float32; spikes are 0 and 1
        apart = ~torch.isclose(ours.double(), theirs.double(), rtol=1e-4, atol=1e-5, equal_nan=True)
        if bool(apart.any()):
            return f"{where} differs in {float(apart.double().mean()):.0%} of its values"
    return None


def _states(model: nn.Module, example: Mapping[str, object], given: list[str]) -> StateArguments | None:
    """Return how states are passed from call to call, or None if ``model`` does not take them as arguments."""
    if not set(inspect.signature(model.forward).parameters) - set(given):
        return None
    states = state_arguments(model, example)
    for argument, layer in states.lost.items():
        raise RollUpError(
            f"{layer}: its state goes in as {argument!r} and is not returned, so that no step can pass it to the next: "
            "return it beside the output"
        )
    return states


def _run_source(
    model: nn.Module, inputs: dict[str, object], one_step: bool, states: StateArguments | None
) -> tuple[object, dict[str, list]]:
    """Return the source's result (one for each step, if it is one step), and the inputs of each neuron's calls."""
    source = copied(model, share=True).eval().double()
    kinds = []
    for m in source.modules():
        if (stepping := stepping_of(m)) is not None:
            kinds.append(type(m))
            if stepping.reset is not None:
                stepping.reset(m)
    with _inputs_of(source, tuple(kinds)) as neuron_inputs:
        return _results(source, model, inputs, one_step, states), neuron_inputs


def _results(
    source: nn.Module, model: nn.Module, inputs: dict[str, object], one_step: bool, states: StateArguments | None
) -> object:
    if not one_step:
        return source(**{k: _cloned(v) for k, v in inputs.items()})
    held = {} if states is None else {name: states.first(name) for name in states.links}
    held = {k: v for k, v in held.items() if k in inputs or not _has_default(model, k)}
    inputs = {k: v for k, v in inputs.items() if k not in held}
    steps = min(len(v) for v in inputs.values() if isinstance(v, Tensor) and v.ndim)
    results = []
    for t in range(steps):
        each = {k: _cloned(v[t]) if isinstance(v, Tensor) and v.ndim else v for k, v in inputs.items()}
        result = source(**each, **held)
        results.append(_cloned(result))  # a state may be changed in place by the next step
        held = {} if states is None else states.following(result)
    return results


@contextlib.contextmanager
def _inputs_of(model: nn.Module, kinds: tuple[type, ...]) -> Iterator[dict[str, list]]:
    """Record the first arguments of all calls of modules of these classes, by path."""
    inputs: dict[str, list] = {}

    def note(path: str):
        return lambda _module, args: inputs.setdefault(path, []).append(_cloned(args[0]) if args else None)

    handles = [
        m.register_forward_pre_hook(note(path)) for path, m in model.named_modules() if path and isinstance(m, kinds)
    ]
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()


def _neuron_inputs(
    rolled: fx.GraphModule, rolled_inputs: dict[str, list], source_inputs: dict[str, list]
) -> Iterator[tuple[str, fx.Node, Tensor, Tensor]]:
    """Yield (description, node, input, source's input) of each neuron that is called once a step, or once in all."""
    nodes = {n.target: n for n in rolled.graph.nodes if n.op == "call_module"}
    for path, calls in source_inputs.items():
        if path not in nodes or path not in rolled_inputs or f"{path}@2" in nodes or len(rolled_inputs[path]) != 1:
            continue  # a neuron at several places: its calls cannot be matched
        ours = rolled_inputs[path][0]
        if not all(isinstance(value, Tensor) for value in (ours, *calls)) or len({c.shape for c in calls}) > 1:
            continue
        theirs = calls[0] if len(calls) == 1 and calls[0].ndim == ours.ndim else torch.stack(calls)
        if ours.shape == theirs.shape:
            yield f"the input of {path}", nodes[path].args[0], ours, theirs


def _has_default(model: nn.Module, name: str) -> bool:
    parameter = inspect.signature(model.forward).parameters[name]
    return parameter.default is not parameter.empty


def _cloned(value: object) -> object:
    """Clone tensors and their containers: a forward may put its states into the list that it was given."""
    return pytree.tree_map_only(Tensor, torch.clone, value)


def _leaves(
    path: str, node: object, ours: object, theirs: object, one_step: bool
) -> Iterator[tuple[str, fx.Node, Tensor, Tensor]]:
    """Yield (path, node, value, source's value) of each tensor that the rolled-up network returns.

    The source's value is None where it is no tensor.
    """
    steps = theirs if one_step else [theirs]
    for keys, value in pytree.tree_flatten_with_path(ours)[0]:
        try:
            made = pytree.key_get(node, keys)
            found = [pytree.key_get(step, keys) for step in steps]
        except (LookupError, TypeError, AttributeError):  # a state of another kind
            continue
        if isinstance(value, Tensor) and isinstance(made, fx.Node):
            tensors = all(isinstance(step, Tensor) for step in found)
            expected = torch.stack(found) if tensors and one_step else found[0]
            yield path + pytree.keystr(keys), made, value, expected if tensors else None


def _reads_without_reset(node: fx.Node, paths: tuple[str, ...]) -> bool:
    """Return True if ``node`` depends on a module at one of ``paths``."""
    seen, stack = set(), [node]
    while stack:
        at = stack.pop()
        if at in seen:
            continue
        seen.add(at)
        if at.op == "call_module" and at.target in paths:
            return True
        stack.extend(at.all_input_nodes)
    return False
