"""Capture of a module as an FX graph with leaves, valid for training and for evaluation."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx, nn

from ..sources.stepping import is_stepping
from ..time_last import has_hooks
from .tracer import LeafTracer, Untraceable, differing_owner, first_line, owner_of_differing_constant

__all__ = [
    "ROOT_LEAF",
    "capture",
    "copied",
    "preserved_rng",
    "submodule_or_none",
    "user_path",
    "value_for_path",
    "with_constants",
]

# Name of the only child of a graph module whose root forward cannot be traced.
ROOT_LEAF = "model"


@contextlib.contextmanager
def preserved_rng() -> Iterator[None]:
    """Restore the states of the random generators of all devices on exit."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if torch.cuda.is_available() else []):
        yield


def _trace(model: nn.Module, leaves: dict[str, str]) -> LeafTracer:
    tracer = LeafTracer(leaves)
    try:
        with preserved_rng():  # each trace draws the same numbers, so that traces do not differ by them
            tracer.trace(model)
    except Untraceable:
        raise
    except Exception as error:
        raise Untraceable("", f"{type(error).__name__}: {first_line(error)}") from error
    return tracer


def _next_leaf(owner: str, leaves: Mapping[str, str]) -> str:
    """Return ``owner`` or its nearest ancestor that is not a leaf yet; at last the root, ``""``, which never is one."""
    while owner in leaves:
        owner = owner.rpartition(".")[0]
    return owner


def capture(model: nn.Module) -> tuple[fx.GraphModule, dict[str, str]]:
    """Trace ``model`` into a graph whose leaves are neurons, library layers and modules that cannot be traced.

    A copy is traced in training and in evaluation mode. A module whose two graphs differ, that cannot be traced, or
    that has hooks or an instance attribute ``forward`` is a leaf, and runs its own code as before. The returned graph
    module shares the submodules of ``model``; the model and the random generators are unchanged.

    Returns:
        The graph module; and path → reason of each leaf that is neither a neuron nor a library layer. If the root
        itself cannot be traced, it is the child ``model`` of the returned graph module, at path ``""`` in the reasons.

    Raises:
        ValueError: the model cannot be copied for tracing.
    """
    leaves: dict[str, str] = {}
    if has_hooks(model):
        return _root_leaf(model), {"": "has hooks or a forward of its own"}
    with preserved_rng():
        # Each turn ends the loop or adds a new path to the leaves. The tracer knows the paths that its copy had before
        # any forward ran, so these are paths of the model's modules, which are finitely many: the loop terminates even
        # if the model's forwards do something else each time.
        while True:
            # A new copy for each trace: tracing leaves proxies in attributes and tensor constants behind.
            scratch = copied(model, share=True)
            try:
                evaluation = _trace(copied(model, share=True).eval(), leaves)
                training = _trace(scratch.train(), leaves)
                owner = differing_owner(training, evaluation)
                if owner is None:
                    owner = owner_of_differing_constant(training, evaluation)
                reason = "its graph differs between training and evaluation"
            except Untraceable as error:
                owner, reason = error.path, error.reason
            if owner is None:
                break
            owner = _next_leaf(owner, leaves)
            if owner == "":
                return _root_leaf(model), {"": reason}
            leaves[owner] = reason
    gm = fx.GraphModule(with_constants(model, scratch, training.graph), training.graph, type(model).__name__)
    # FX creates new containers, which lack the training flag; the layers in them are the source's own
    for name, child in gm.named_modules():
        source = submodule_or_none(model, name)
        if source is not None and source is not child:
            child.training = source.training
    return gm, leaves


def copied(
    model: nn.Module, *, share: bool = False, but: type[nn.Module] | tuple[type[nn.Module], ...] = ()
) -> nn.Module:
    """Return a deep copy of ``model``.

    Args:
        model: left as it is.
        share: let the copy's parameters have the model's memory until one of the two is written: for trying a network.
            Buffers, hooks, flags and gradients are the copy's own; the weights, nearly all of its memory, are not
            copied, unless a forward writes into them.
        but: with ``share``, modules of these types have parameters of their own.

    Raises:
        ValueError: it cannot be copied; the message says what stands in the way.
    """
    memo: dict[int, object] = {}
    if share:
        own = {id(p) for m in model.modules() if isinstance(m, but) for p in m.parameters()}
        for p in model.parameters():
            if type(p) is nn.Parameter and id(p) not in own:
                with contextlib.suppress(RuntimeError):  # torch clones no sparse tensor lazily: it is copied
                    memo[id(p)] = nn.Parameter(torch._lazy_clone(p.detach()), p.requires_grad)
    if any(is_stepping(m) for m in model.modules()):
        # States that stepping neurons keep after a batch are non-leaf tensors of that batch's autograd graph, which
        # deepcopy refuses. They are reset before use, so that detached copies serve.
        for m in model.modules():
            for value in (*m._buffers.values(), *vars(m).values()):
                if isinstance(value, torch.Tensor) and not value.is_leaf:
                    memo[id(value)] = value.detach().clone()
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise ValueError(
            f"{type(model).__name__} cannot be copied with copy.deepcopy, which is needed to leave it untouched: "
            f"{first_line(error)}. Detach tensors that are kept as attributes (reset the network's state) and retry"
        ) from error


def with_constants(model: nn.Module, scratch: nn.Module, graph: fx.Graph) -> nn.Module:
    """Return ``model``, or a shallow copy of it with the tensor constants that tracing put into ``scratch``."""
    made = [
        node.target
        for node in graph.nodes
        if node.op == "get_attr" and "." not in node.target and not hasattr(model, node.target)
    ]
    if not made:
        return model
    stand_in = copy.copy(model)
    stand_in.__dict__ = dict(model.__dict__)
    for name in ("_parameters", "_buffers", "_modules"):
        stand_in.__dict__[name] = dict(model.__dict__[name])
    for name in made:
        stand_in.__dict__[name] = getattr(scratch, name)
    return stand_in


def submodule_or_none(model: nn.Module, path: str) -> nn.Module | None:
    """Return the submodule of ``model`` at ``path``, or None if there is none."""
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _root_leaf(model: nn.Module) -> fx.GraphModule:
    """Return a graph module whose graph is one call of ``model``, with the arguments that it takes."""
    holder = nn.Module()
    holder.add_module(ROOT_LEAF, model)
    graph = fx.Graph()
    arguments = _placeholders(model, graph)
    graph.output(graph.call_module(ROOT_LEAF, *arguments))
    gm = fx.GraphModule(holder, graph, type(model).__name__)
    gm.training = model.training
    return gm


def user_path(gm: fx.GraphModule, path: str) -> str:
    """Return the path in the captured model of the module at ``path`` in its graph; they differ under a root leaf."""
    calls = {node.target for node in gm.graph.nodes if node.op == "call_module"}
    return path.removeprefix(f"{ROOT_LEAF}.") if calls == {ROOT_LEAF} else path


def value_for_path(gm: fx.GraphModule, by_path: Mapping[str, Any], path: str) -> Any:
    """Look up the module at ``path`` in the graph by that path or its path in the captured model; None if absent."""
    return by_path.get(path, by_path.get(user_path(gm, path)))


def _placeholders(model: nn.Module, graph: fx.Graph) -> tuple[tuple[fx.Node, ...], dict[str, fx.Node]]:
    positional, keyword = [], {}
    for parameter in inspect.signature(model.forward).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        default = () if parameter.default is parameter.empty else (parameter.default,)
        node = graph.create_node("placeholder", parameter.name, default)
        if parameter.kind is parameter.KEYWORD_ONLY:
            keyword[parameter.name] = node
        else:
            positional.append(node)
    return tuple(positional), keyword
