"""FX tracer that keeps modules as leaves and logs what each module's forward does, and the comparison of two logs."""

from __future__ import annotations

import itertools
import operator

import torch
from torch import fx, nn
from torch.fx.graph import inplace_methods
from torch.utils import _pytree as pytree

from ..neuron import MulFreePSN
from ..sources.description import is_source, qualified_name
from ..time_axis import fold_time, unfold_time
from ..time_last import has_hooks, has_registered_forms

__all__ = [
    "LeafTracer",
    "Untraceable",
    "differing_owner",
    "first_line",
    "owner_of_differing_constant",
    "same_tensor",
]

# Their layers look at shapes (step modes) before they call torch, ours at the mask: leaves, as torch.nn's own are.
_LEAF_PACKAGES = ("mfpsn_fx", "torch.nn", "torch.ao.nn", "spikingjelly.activation_based.layer", "snntorch", "norse")


class Untraceable(Exception):
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


class LeafTracer(fx.Tracer):
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
        self.caught: Untraceable | None = None

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if module_qualified_name in self.leaves or is_source(m) or isinstance(m, MulFreePSN) or has_registered_forms(m):
            return True
        if has_hooks(m):
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
            known = isinstance(error, Untraceable)
            reason = error.reason if known else f"{type(error).__name__}: {first_line(error)}"
            # If the caller catches it, the trace goes on with what the model does on failure. Only the caller's own
            # code can do both.
            self.caught = Untraceable(self.inside[-2], f"it catches an exception of tracing: {reason}")
            if known:
                raise
            raise Untraceable(path, reason) from error
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


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]


def _same(a: object, b: object) -> bool:
    try:
        if bool(operator.eq(a, b)):
            return True
    except (RuntimeError, ValueError, TypeError):  # tensors and the like among the arguments
        pass
    return repr(a) == repr(b)  # NaN, too


def differing_owner(training: LeafTracer, evaluation: LeafTracer) -> str | None:
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


def owner_of_differing_constant(training: LeafTracer, evaluation: LeafTracer) -> str | None:
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
