"""From a module to a graph with leaves, baking nothing in."""

from __future__ import annotations

import contextlib
import copy
import inspect
import itertools
import operator
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.fx.graph import inplace_methods
from torch.utils import _pytree as pytree

from ..neuron import MulFreePSN
from ..sources.description import is_source, qualified_name
from ..sources.stepping import is_stepping
from ..time_axis import fold_time, unfold_time
from ..time_last import has_hooks as _has_hooks
from ..time_last import has_own_forms

__all__ = ["ROOT_LEAF", "capture", "copied", "preserved_rng", "user_path", "value_for_path"]

# The name of the one child of a graph whose source's own forward cannot be traced.
ROOT_LEAF = "model"

# Their layers look at shapes (step modes) before they call torch, ours at the mask: leaves, as torch.nn's own are.
_LEAF_PACKAGES = ("mfpsn_fx", "torch.nn", "torch.ao.nn", "spikingjelly.activation_based.layer", "snntorch", "norse")


@contextlib.contextmanager
def preserved_rng() -> Iterator[None]:
    """Leave the random generators of all devices as they were found."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if torch.cuda.is_available() else []):
        yield


class _Untraceable(Exception):
    """Module ``path`` cannot be traced through, because of ``reason``."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path, self.reason = path, reason


class _InPlaceProxy(fx.Proxy):
    """Records ``x += y`` as what it is: FX's own makes an addition of it, which a view of ``x`` does not see."""


def _recording(function):
    def record(self, other):
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return record


for _name in inplace_methods:
    if hasattr(torch.Tensor, f"__{_name}__") and _name != "setitem":
        setattr(_InPlaceProxy, f"__{_name}__", _recording(getattr(operator, _name)))


class _LeafTracer(fx.Tracer):
    """Trace a model with leaves and log which module's forward does what.

    Attributes:
        leaves: paths of modules to call, not to trace through, each with the reason. Those that bear hooks are added.
        inside: the paths of the modules whose forwards are running, the innermost last; the root's is ``""``.
        log: one entry for each node, for each call of a module that is traced through, and for what each of these and
            the root return: ``inside`` at that time, the kind, and the rest. A call, of a leaf or of another module,
            belongs to the caller; what a module returns belongs to that module.
        caught: set if a child cannot be traced; raised at the end of a trace, which only gets there if that was caught.
    """

    def __init__(self, leaves: dict[str, str] | None = None) -> None:  # FX makes one of its own when unpickling
        super().__init__(autowrap_functions=(fold_time, unfold_time))
        self.leaves = {} if leaves is None else leaves
        self.inside: list[str] = [""]
        self.log: list[tuple] = []
        self.caught: _Untraceable | None = None

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if module_qualified_name in self.leaves or is_source(m) or isinstance(m, MulFreePSN) or has_own_forms(m):
            return True
        if _has_hooks(m):
            self.leaves[module_qualified_name] = "has hooks or a forward of its own"
            return True
        if type(m).forward is nn.Sequential.forward:  # nothing of its own that could defeat tracing
            return False
        return qualified_name(type(m)).startswith(tuple(f"{package}." for package in _LEAF_PACKAGES))

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _InPlaceProxy(node, self)

    def call_module(self, m, forward, args, kwargs):
        path = self.path_of_module(m)
        if self.is_leaf_module(m, path):  # its code does not run: the node, or the failure to make it, is the caller's
            return super().call_module(m, forward, args, kwargs)
        self._note("call", path, _outline((args, kwargs)))
        self.inside.append(path)
        try:
            result = super().call_module(m, forward, args, kwargs)
            self._note("return", _outline(result))
        except Exception as error:
            known = isinstance(error, _Untraceable)
            reason = error.reason if known else f"{type(error).__name__}: {_first_line(error)}"
            # If the caller catches it, the trace goes on with what the model does on failure. Only the caller's own
            # code can do both.
            self.caught = _Untraceable(self.inside[-2], f"it catches an exception of tracing: {reason}")
            if known:
                raise
            raise _Untraceable(path, reason) from error
        finally:
            self.inside.pop()
        return result

    def trace(self, *args, **kwargs):
        graph = super().trace(*args, **kwargs)
        if self.caught is not None:
            raise self.caught
        return graph

    def create_node(self, kind, target, args, *rest, **kwargs):
        node = super().create_node(kind, target, args, *rest, **kwargs)
        if kind == "output":
            self._note("return", _outline(args[0]))
        else:
            named = [fx.map_arg(given, lambda n: n.name) for given in (node.args, node.kwargs)]
            self._note(kind, node.name, node.target, *named)
        return node

    def _note(self, *what: object) -> None:
        self.log.append((tuple(self.inside), *what))


def _outline(value: object) -> tuple:
    """Return what of arguments or results can be compared between copies of a model; of other objects, the types."""
    leaves, structure = pytree.tree_flatten(value)
    return structure, [_outlined(leaf) for leaf in leaves]


def _outlined(leaf: object) -> object:
    if isinstance(leaf, (fx.Proxy, fx.Node)):
        return ((leaf.node if isinstance(leaf, fx.Proxy) else leaf).name,)
    return leaf if isinstance(leaf, (bool, int, float, str, torch.dtype, torch.device)) else type(leaf)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]


def _trace(model: nn.Module, leaves: dict[str, str]) -> _LeafTracer:
    tracer = _LeafTracer(leaves)
    try:
        with preserved_rng():  # each trace draws the same numbers, so that these make no difference
            tracer.trace(model)
    except _Untraceable:
        raise
    except Exception as error:
        raise _Untraceable("", f"{type(error).__name__}: {_first_line(error)}") from error
    return tracer


def _same(a: object, b: object) -> bool:
    try:
        if bool(operator.eq(a, b)):
            return True
    except (RuntimeError, ValueError, TypeError):  # tensors and the like among the arguments
        pass
    return repr(a) == repr(b)  # NaN, too


def _differing_owner(training: _LeafTracer, evaluation: _LeafTracer) -> str | None:
    """Return the path of the innermost module in whose forward the traces first differ; None if they are equal.

    Up to the first difference both traces ran the same forwards, so it is in one and the same module that they differ.
    Others may differ as well: that shows in the next traces, with this one a leaf. A leaf returns a proxy, in which
    its caller cannot see what it returns in each mode. If that is a tuple in one and a tensor in the other, a caller
    that does more than return it is the one to become the leaf.
    """
    logs = (training.log, evaluation.log)
    pairs = itertools.zip_longest(*logs)
    first = next((index for index, (ours, theirs) in enumerate(pairs) if not _same(ours, theirs)), None)
    if first is None:
        return None
    forwards = next(log[first][0] for log in logs if first < len(log))
    owner = forwards[-1]
    while len(forwards) > 1:
        ends = [_end_of(forwards, log, first) for log in logs]
        ours, theirs = (log[end][2] for log, end in zip(logs, ends, strict=True))
        if _kinds(ours) == _kinds(theirs):
            break
        forwards = forwards[:-1]
        if any(log[end + 1] != (forwards, *log[end][1:]) for log, end in zip(logs, ends, strict=True)):
            owner = forwards[-1]
    return owner


def _end_of(forwards: tuple[str, ...], log: list[tuple], start: int) -> int:
    """Return where in ``log``, from ``start`` on, the innermost of the running ``forwards`` returns."""
    return next(index for index in range(start, len(log)) if log[index][:2] == (forwards, "return"))


def _kinds(outline: tuple) -> tuple:
    structure, leaves = outline
    return structure, [type(leaf) for leaf in leaves]


def _owner_of_differing_constant(training: _LeafTracer, evaluation: _LeafTracer) -> str | None:
    """Return the path of a module whose forward makes different tensor constants in two traces with equal logs."""
    for forwards, kind, *what in training.log:
        if kind != "get_attr" or not what[1].startswith("_tensor_constant"):
            continue
        if not same_tensor(getattr(training.root, what[1]), getattr(evaluation.root, what[1])):
            return forwards[-1]
    return None


def same_tensor(a: object, b: object) -> bool:
    """Return True if two tensors have equal values, shape, dtype, layout and device, or if ``a`` is no tensor.

    NaN equals NaN. Of tensors on the meta device there are no values. Kinds of tensors whose values cannot be compared
    count as different.
    """
    if not isinstance(a, torch.Tensor):
        return True
    if not isinstance(b, torch.Tensor) or any(
        getattr(a, f) != getattr(b, f) for f in ("shape", "dtype", "layout", "device")
    ):
        return False
    if a.is_meta:
        return True
    try:
        if a.layout is not torch.strided:
            a, b = a.to_dense(), b.to_dense()
        return torch.equal(a, b) or bool(((a == b) | ((a != a) & (b != b))).all())
    except (RuntimeError, NotImplementedError):
        return False


def _next_leaf(owner: str, leaves: Mapping[str, str]) -> str:
    """Return ``owner``, or its nearest ancestor if that is a leaf already; finally the root, ``""``, which never is."""
    while owner in leaves:
        owner = owner.rpartition(".")[0]
    return owner


def capture(model: nn.Module) -> tuple[fx.GraphModule, dict[str, str]]:
    """A graph of ``model`` in which neurons, library layers and whatever resists tracing are leaves.

    The graph is traced in training and in evaluation mode on a copy; a module whose two graphs differ, that cannot
    be traced, or that has hooks or a forward of its own stays a leaf, and runs its own code as before. The returned
    graph module shares the submodules of ``model``, which is left as it was, as are the random generators.

    Returns:
        The graph module, and for each leaf that is not one by nature its path and the reason. If the root itself
        cannot be traced, it is the child ``model`` of the returned graph module, at path ``""`` in the reasons.

    Raises:
        ValueError: the model cannot be copied for tracing.
    """
    leaves: dict[str, str] = {}
    if _has_hooks(model):
        return _root_leaf(model), {"": "has hooks or a forward of its own"}
    with preserved_rng():
        # Each turn ends the loop or adds a path to the leaves that was not there. The tracer knows the paths that its
        # copy had before any forward ran, so these are paths of the model's modules, which are finitely many: the loop
        # ends, even if the model's forwards do something else each time.
        while True:
            # A fresh copy for each trace: what tracing leaves behind (proxies in attributes, tensor constants) must
            # not be met again.
            scratch = copied(model, share=True)
            try:
                evaluation = _trace(copied(model, share=True).eval(), leaves)
                training = _trace(scratch.train(), leaves)
                owner = _differing_owner(training, evaluation)
                if owner is None:
                    owner = _owner_of_differing_constant(training, evaluation)
                reason = "its graph differs between training and evaluation"
            except _Untraceable as error:
                owner, reason = error.path, error.reason
            if owner is None:
                break
            owner = _next_leaf(owner, leaves)
            if owner == "":
                return _root_leaf(model), {"": reason}
            leaves[owner] = reason
    gm = fx.GraphModule(_with_constants(model, scratch, training.graph), training.graph, type(model).__name__)
    # FX makes the containers anew; the layers in them are the source's own, with their modes
    for name, child in gm.named_modules():
        source = _submodule(model, name)
        if source is not None and source is not child:
            child.training = source.training
    return gm, leaves


def copied(
    model: nn.Module, *, share: bool = False, but: type[nn.Module] | tuple[type[nn.Module], ...] = ()
) -> nn.Module:
    """Return a deep copy of ``model``.

    Args:
        model: left as it is.
        share: let the copy's parameters have the model's memory: for trying a network. Buffers, hooks, flags and
            gradients are the copy's own; the weights, nearly all of its memory, are not copied.
        but: with ``share``, modules of these types have parameters of their own.

    Raises:
        ValueError: it cannot be copied; the message says what stands in the way.
    """
    memo: dict[int, object] = {}
    if share:
        own = {id(p) for m in model.modules() if isinstance(m, but) for p in m.parameters()}
        for p in model.parameters():
            if type(p) is nn.Parameter and id(p) not in own:
                memo[id(p)] = nn.Parameter(p.detach(), p.requires_grad)
    if any(is_stepping(m) for m in model.modules()):
        # The states that stepping neurons keep after a batch hang on that batch's graph. They start afresh anyway.
        for m in model.modules():
            for value in (*m._buffers.values(), *vars(m).values()):
                if isinstance(value, torch.Tensor) and not value.is_leaf:
                    memo[id(value)] = value.detach().clone()
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise ValueError(
            f"{type(model).__name__} cannot be copied with copy.deepcopy, which is needed to leave it untouched: "
            f"{_first_line(error)}. Detach tensors that are kept as attributes (reset the network's state) and retry"
        ) from error


def _with_constants(model: nn.Module, scratch: nn.Module, graph: fx.Graph) -> nn.Module:
    """``model``, or a shallow stand-in that also has the tensor constants which tracing put into the copy."""
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


def _submodule(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _root_leaf(model: nn.Module) -> fx.GraphModule:
    """A graph of one call: the model's own forward, with the arguments that it takes."""
    holder = nn.Module()
    holder.add_module(ROOT_LEAF, model)
    graph = fx.Graph()
    arguments = _placeholders(model, graph)
    graph.output(graph.call_module(ROOT_LEAF, *arguments))
    gm = fx.GraphModule(holder, graph, type(model).__name__)
    gm.training = model.training
    return gm


def user_path(gm: fx.GraphModule, path: str) -> str:
    """The path in the captured model of a module at ``path`` in its graph: the same but behind a root leaf."""
    calls = {node.target for node in gm.graph.nodes if node.op == "call_module"}
    return path.removeprefix(f"{ROOT_LEAF}.") if calls == {ROOT_LEAF} else path


def value_for_path(gm: fx.GraphModule, by_path: Mapping[str, Any], path: str) -> Any:
    """What ``by_path`` says of the module at ``path`` in the graph, by that path or by its own in the model."""
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
