"""Capture of networks that step through time: the graph of their unrolled loop, with one call of each neuron a step."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from ..sources.description import qualified_name
from ..sources.stepping import is_stepping, stepping_of
from ..time_axis import fold_time, unfold_time
from ..time_last import has_hooks
from .capture import copied, preserved_rng, submodule_or_none, with_constants
from .split_layers import LinearThenCell
from .tracer import LeafTracer, Untraceable, differing_owner, first_line, same_tensor

__all__ = ["BATCH_LAYERS", "NotSteppedError", "bound_example", "capture_steps", "has_batch_statistics", "has_steps"]

# key in the output node's meta: paths of layers in the loop that normalize with the statistics of one step's batch
BATCH_LAYERS = "batch_layers"

_LIFT = "norse.torch.module.lift.Lift"
_TRACED = ("norse.torch.module.sequential.SequentialState",)


class NotSteppedError(ValueError):
    """Raised for a network that steps through time, but whose steps cannot be traced from its code."""


def has_steps(model: nn.Module) -> bool:
    """Return True if a neuron of ``model`` is called step by step, or takes and returns its state."""
    return any(is_stepping(m) for m in model.modules())


class _ShapedProxy(fx.Proxy):
    """Proxy with the shape of the example, which loops over it and constructors such as ``zeros`` need."""

    def __init__(self, node: fx.Node, tracer: fx.Tracer, meta: object) -> None:
        super().__init__(node, tracer)
        self.__dict__["_meta"] = meta

    shape = property(lambda self: self._meta.shape)
    ndim = property(lambda self: self._meta.ndim)
    dtype = property(lambda self: self._meta.dtype)
    device = property(lambda self: self.tracer.device_of(self.node))

    def size(self, dim: int | None = None) -> object:
        return self._meta.size() if dim is None else self._meta.size(dim)

    def dim(self) -> int:
        return self._meta.dim()

    def numel(self) -> int:
        return self._meta.numel()

    def __len__(self) -> int:
        return len(self._meta)

    def __setitem__(self, key: object, value: object) -> None:
        self.tracer.create_proxy("call_method", "__setitem__", (self, key, value), {})

    def __iter__(self) -> Iterator:
        return iter([self[index] for index in range(len(self._meta))])


class _ArgumentProxy(fx.Proxy):
    """Proxy of a non-tensor argument, such as a list of states: items that are assigned are read back."""

    def __init__(self, node: fx.Node, tracer: fx.Tracer) -> None:
        super().__init__(node, tracer)
        self.__dict__["_items"] = {}

    def __setitem__(self, key: object, value: object) -> None:
        self._items[key] = value

    def __getitem__(self, key: object) -> object:
        if key in self._items:
            return self._items[key]
        return fx.Proxy(self.node, self.tracer)[key]  # create_arg would replace ``self`` by its assigned items

    def structure(self) -> object:
        """Return the assigned items as a list or a dict."""
        if all(isinstance(key, int) for key in self._items):
            return [self[key] for key in range(max(self._items) + 1)]
        return dict(self._items)


class _StepTracer(LeafTracer):
    """Trace a forward that steps through time, with tensor arguments that have the shapes of ``example``."""

    def __init__(self, leaves: dict[str, str] | None = None, example: Mapping | None = None) -> None:
        super().__init__(leaves)
        self.example = dict(example or {})
        self.metas: dict[fx.Node, object] = {}
        self.batch_layers: dict[str, None] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if is_stepping(m):
            return True
        traced = isinstance(m, LinearThenCell) or qualified_name(type(m)) in _TRACED
        if traced and not has_hooks(m):
            return module_qualified_name in self.leaves
        return super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m, forward, args, kwargs):
        if qualified_name(type(m)) == _LIFT and not has_hooks(m):
            return self._lift(m, *args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def _lift(self, m: nn.Module, x):
        """Trace Norse's Lift: run the module inside on all steps at once, a neuron inside over the sequence."""
        if isinstance(x, tuple):
            x, state = x
            if state is not None:
                raise ValueError("Lift has a state as input, but a sequence starts from the initial one")
        inner = m.lifted_module
        if is_stepping(inner):
            node = self.create_proxy("call_module", self.path_of_module(inner), (x, None), {})
            node.node.meta["lifted"] = True
            return node
        if any(is_stepping(child) for child in inner.modules()):
            raise ValueError("Lift around several stateful layers: lift each of them, in a SequentialState")
        for child in inner.modules():
            if has_batch_statistics(child):
                self.batch_layers[self.path_of_module(child)] = None
        folded = self.create_proxy("call_function", fold_time, (x,), {})
        steps = self.create_proxy("call_method", "size", (x, 0), {})
        return self.create_proxy("call_function", unfold_time, (inner(folded), steps), {})

    def create_node(self, *args, **kwargs):
        if not torch.is_grad_enabled():
            raise Untraceable(
                self.inside[-1],
                "part of it runs under torch.no_grad(), which a graph does not keep: call detach() on its results",
            )
        node = super().create_node(*args, **kwargs)
        if node.op == "placeholder" and node.target in self.example:
            value = self.example[node.target]
            if isinstance(value, Tensor):
                self.metas[node] = torch.empty_like(value, device="meta")
                node.meta["device"] = value.device
        elif node.op == "get_attr":
            value = _attribute(self.root, node.target)
            if isinstance(value, Tensor):
                trained = isinstance(value, nn.Parameter)
                node.meta["zero"] = not trained and not bool((value != 0).any())
        elif node.op in ("call_function", "call_method"):
            self._propagate_shapes(node)
        return node

    def _propagate_shapes(self, node: fx.Node) -> None:
        """Run the op on meta tensors if all of its inputs have known shapes."""
        if not node.all_input_nodes or any(
            n not in self.metas and n.op != "get_attr" for n in node.all_input_nodes
        ):  # shapes after layers are not tracked
            return
        if not any(n in self.metas for n in node.all_input_nodes):
            return

        def meta(n: fx.Node) -> object:
            if n in self.metas:
                return self.metas[n]
            return torch.empty_like(_attribute(self.root, n.target), device="meta")

        args, kwargs = fx.map_arg((node.args, node.kwargs), meta)
        if "device" in kwargs:
            kwargs = {**kwargs, "device": "meta"}
        try:
            if node.op == "call_method":
                result = getattr(args[0], node.target)(*args[1:], **kwargs)
            else:
                result = node.target(*args, **kwargs)
        except Exception:  # an error of the op, if it is one, is raised when the graph runs
            return
        if isinstance(result, (Tensor, tuple, list)):
            self.metas[node] = result

    def proxy(self, node: fx.Node) -> fx.Proxy:
        if node in self.metas:
            return _ShapedProxy(node, self, self.metas[node])
        if node.op == "placeholder":
            return _ArgumentProxy(node, self)
        return fx.Proxy(node, self)  # not in-place: the roll-up reads ``total += x`` as an addition

    def create_arg(self, a):
        return super().create_arg(a.structure() if isinstance(a, _ArgumentProxy) and a._items else a)

    def device_of(self, node: fx.Node) -> torch.device:
        devices = [v.device for v in self.example.values() if isinstance(v, Tensor)]
        return node.meta.get("device") or devices[0]


def _attribute(root: nn.Module, path: str) -> object:
    """Return the value of a ``get_attr`` node without ``getattr``, which FX patches while tracing."""
    owner = root
    *outer, name = path.split(".")
    for part in outer:
        owner = owner._modules[part]
    for kept in (owner._parameters, owner._buffers, owner._modules, vars(owner)):
        if name in kept:
            return kept[name]
    raise AttributeError(path)


def has_batch_statistics(m: nn.Module) -> bool:
    """Return True if the layer normalizes with, or tracks, statistics over the batch."""
    if isinstance(m, nn.modules.instancenorm._InstanceNorm):
        return m.track_running_stats
    return isinstance(m, nn.modules.batchnorm._NormBase)


def bound_example(model: nn.Module, args: tuple, kwargs: Mapping) -> dict[str, object]:
    """Return the example as parameter name → value of ``forward``; ``TypeError`` if it does not fit."""
    try:
        bound = inspect.signature(model.forward).bind_partial(*args, **kwargs)
    except TypeError as error:
        raise TypeError(f"the example does not fit {type(model).__name__}.forward: {error}") from None
    return dict(bound.arguments)


def capture_steps(model: nn.Module, args: tuple = (), kwargs: Mapping | None = None) -> tuple[fx.GraphModule, bool]:
    """Trace ``model`` with its loops over time unrolled, and with its neurons, including their states, as leaves.

    Args:
        model: unchanged; the graph shares its submodules.
        args, kwargs: one real batch. A forward that is one step is traced with the first step of each tensor.

    Returns:
        The graph module, and True if it is one step of time. Otherwise its inputs are whole sequences, and each neuron
        is called once a step, or once for a sequence; one step has inputs (N, *), and calls each neuron once.

    Raises:
        NotSteppedError: it cannot be traced, or its code differs between training and evaluation.
        TypeError: the example does not fit the arguments.
        ValueError: the model cannot be copied for tracing.
    """
    example = bound_example(model, args, dict(kwargs or {}))
    try:
        gm = trace_steps(model, example)
    except NotSteppedError as whole:
        try:
            gm = trace_steps(model, first_step(example))
        except (NotSteppedError, IndexError):
            raise whole from None
        if _is_one_step(gm):
            return gm, True
        raise
    if not _is_one_step(gm):
        return gm, False
    gm = trace_steps(model, first_step(example))
    if not _is_one_step(gm):
        raise NotSteppedError(
            f"{type(model).__name__} ran one step only, from which a loop cannot be inferred: use an example of at "
            "least two steps"
        )
    return gm, True


def first_step(example: Mapping) -> dict[str, object]:
    """Return the example with the first step of each tensor, T being its first dim."""
    return {name: value[0] if isinstance(value, Tensor) and value.ndim else value for name, value in example.items()}


def _is_one_step(gm: fx.GraphModule) -> bool:
    calls: dict[str, int] = {}
    for node in gm.graph.nodes:
        if node.op != "call_module" or node.meta.get("lifted"):
            continue
        stepping = stepping_of(gm.get_submodule(node.target))
        if stepping is not None and not stepping.sequence:
            calls[node.target] = calls.get(node.target, 0) + 1
    return bool(calls) and max(calls.values()) == 1


def trace_steps(model: nn.Module, example: Mapping) -> fx.GraphModule:
    """Trace ``model`` in training and evaluation mode on the example; ``NotSteppedError`` if that fails or differs."""
    name = type(model).__name__
    if has_hooks(model):
        raise NotSteppedError(
            f"{name} has hooks or a forward of its own, which a graph of all steps at once would call once: remove them"
        )
    leaves: dict[str, str] = {}
    concrete = _concrete_arguments(model, example)
    with preserved_rng(), torch.enable_grad():
        while True:
            tracers, scratches = [], []
            owner = None
            try:
                for training in (True, False):
                    scratch = copied(model, share=True).train(training)
                    for m in scratch.modules():  # states of earlier batches do not belong to this one
                        if (stepping := stepping_of(m)) is not None and stepping.reset is not None:
                            stepping.reset(m)
                    tracer = _StepTracer(leaves, example)
                    try:
                        tracer.trace(scratch, concrete)
                    except Untraceable:
                        raise
                    except Exception as error:
                        reason = f"{type(error).__name__}: {first_line(error)}"
                        raise Untraceable("", reason) from error
                    tracers.append(tracer)
                    scratches.append(scratch)
                owner = differing_owner(*tracers)
                reason = "its code differs between training and evaluation; use layers (torch.nn.Dropout) for that"
            except Untraceable as error:
                owner, reason = error.path, error.reason
            if owner is None:
                break
            module = model.get_submodule(owner)
            if owner == "" or owner in leaves or has_steps(module):
                place = f"layer {owner!r} ({type(module).__name__})" if owner else f"{name}'s forward"
                raise NotSteppedError(
                    f"{place} steps through time, but its steps cannot be read from its code: {reason}. Write it "
                    "without branches on values, with a loop over a range or over the input"
                )
            leaves[owner] = reason
    graph = tracers[0].graph
    _restore_output(graph)
    written = {n.args[0].target for n in graph.nodes if n.op == "call_method" and n.target == "__setitem__"}
    for node in graph.nodes:
        if node.op == "get_attr" and node.target.startswith("_tensor_constant") and node.target not in written:
            ours, theirs = (_attribute(scratch, node.target) for scratch in scratches)
            if not same_tensor(ours, theirs):
                raise NotSteppedError(
                    f"{name}'s forward draws random numbers of a fixed shape, which the graph would keep as constants: "
                    "draw them like a tensor (torch.rand_like(x), torch.bernoulli(x))"
                )
    _drop_specializations(graph, concrete)
    gm = fx.GraphModule(with_constants(model, scratches[0], graph), graph, name)
    # facts about the graph as a whole are kept at its output node
    gm.graph.output_node().meta[BATCH_LAYERS] = tuple(tracers[0].batch_layers)
    gm.training = model.training
    for path, child in gm.named_modules():
        source = submodule_or_none(model, path)
        if source is not None and source is not child:
            child.training = source.training
    return gm


def _restore_output(graph: fx.Graph) -> None:
    """Restore the output's structure, which FX flattens if an argument is a list or a dict of constants."""
    codegen = graph._codegen
    if isinstance(codegen, fx.graph._PyTreeCodeGen):
        (output,) = (node for node in graph.nodes if node.op == "output")
        output.args = (pytree.tree_unflatten(list(output.args[0]), codegen.pytree_info.out_spec),)
        graph.set_codegen(fx.graph.CodeGen())


def _concrete_arguments(model: nn.Module, example: Mapping) -> dict[str, object]:
    """Return arguments without tensors, and defaults of omitted ones: Python may branch on them while tracing."""
    concrete = {}
    for parameter in inspect.signature(model.forward).parameters.values():
        if parameter.name in example:
            value = example[parameter.name]
            if not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value)):
                concrete[parameter.name] = value
        elif parameter.default is not parameter.empty:
            concrete[parameter.name] = parameter.default
    return concrete


def _drop_specializations(graph: fx.Graph, concrete: Mapping) -> None:
    """Remove arguments that were traced as constants, and FX's assertions on their values."""
    for node in reversed(list(graph.nodes)):
        if node.users:
            continue
        asserts = node.op == "call_function" and node.target in (torch._assert, fx._symbolic_trace._assert_is_none)
        compared = node.op == "call_function" and getattr(node.target, "__name__", "") == "eq"
        placeholder = node.op == "placeholder" and node.target.rpartition("_")[0] in concrete
        if asserts or compared or placeholder:
            graph.erase_node(node)
