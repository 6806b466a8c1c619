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

# Layers of these packages are leaves, as torch.nn's are for FX: they branch on shapes (step modes) or on the mask.
_LEAF_PACKAGES = ("mfpsn_fx", "torch.nn", "torch.ao.nn", "spikingjelly.activation_based.layer", "snntorch", "norse")


class Untraceable(Exception):
    """Raised if module ``path`` cannot be traced through, because of ``reason``."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path, self.reason = path, reason


class _InPlaceProxy(fx.Proxy):
    """Proxy that records ``x += y`` as in-place: FX records an addition, which does not reach other views of ``x``."""


def _recording(function):
    def record(self, other):
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return record


for _name in inplace_methods:
    if hasattr(torch.Tensor, f"__{_name}__") and _name != "setitem":
        setattr(_InPlaceProxy, f"__{_name}__", _recording(getattr(operator, _name)))


class LeafTracer(fx.Tracer):
    """Trace a model with leaves and log the operations of each module's forward.

    Attributes:
        leaves: path → reason of modules that are called, not traced through. Modules with hooks are added in tracing.
        inside: paths of the modules whose forwards are running, the innermost last; the root is ``""``.
        log: one tuple (``inside``, kind, details …) for each node, for each call of a module that is traced through,
            and for each return of such a module and of the root. A call, of a leaf or of another module, is logged
            in its caller; a return in the module that returns.
        caught: the error of a child that cannot be traced. The trace only reaches its end if the model caught that
            error; it is then raised.
    """

    # the default serves FX, which constructs a tracer without arguments in unpickling
    def __init__(self, leaves: dict[str, str] | None = None) -> None:
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
        if type(m).forward is nn.Sequential.forward:  # traceable, although its package is in the list
            return False
        return qualified_name(type(m)).startswith(tuple(f"{package}." for package in _LEAF_PACKAGES))

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _InPlaceProxy(node, self)

    def call_module(self, m, forward, args, kwargs):
        path = self.path_of_module(m)
        if self.is_leaf_module(m, path):  # its code does not run: a failure to create the node is the caller's
            return super().call_module(m, forward, args, kwargs)
        self._note("call", path, _outline((args, kwargs)))
        self.inside.append(path)
        try:
            result = super().call_module(m, forward, args, kwargs)
            self._note("return", _outline(result))
        except Exception as error:
            known = isinstance(error, Untraceable)
            reason = error.reason if known else f"{type(error).__name__}: {first_line(error)}"
            # If the model catches this error, the trace goes on along the path that the model takes on failure, which
            # is wrong. Only running the caller's own code, as a leaf, is right in both cases.
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
    """Reduce arguments or results to what can be compared between copies of a model; other objects to their types."""
    leaves, structure = pytree.tree_flatten(value)
    return structure, [_outlined(leaf) for leaf in leaves]


def _outlined(leaf: object) -> object:
    if isinstance(leaf, (fx.Proxy, fx.Node)):
        return ((leaf.node if isinstance(leaf, fx.Proxy) else leaf).name,)
    return leaf if isinstance(leaf, (bool, int, float, str, torch.dtype, torch.device)) else type(leaf)


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, of 200 characters at most."""
    return (str(error).strip().splitlines() or [""])[0][:200]


def _same(a: object, b: object) -> bool:
    try:
        if bool(operator.eq(a, b)):
            return True
    except (RuntimeError, ValueError, TypeError):  # comparison of tensors among the arguments
        pass
    return repr(a) == repr(b)  # equal for NaN, too


def differing_owner(training: LeafTracer, evaluation: LeafTracer) -> str | None:
    """Return the path of the innermost module in whose forward the traces first differ; None if they are equal.

    Up to the first difference both traces ran the same forwards, so that the difference is in one module. Others may
    differ as well; that is found by the next traces, in which this module is a leaf. A leaf returns one proxy in both
    modes. If the module returns a tuple in one mode and a tensor in the other, a caller that does more than return it
    has to be the leaf instead.
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
    """Return the index in ``log``, from ``start`` on, at which the innermost of the running ``forwards`` returns."""
    return next(index for index in range(start, len(log)) if log[index][:2] == (forwards, "return"))


def _kinds(outline: tuple) -> tuple:
    structure, leaves = outline
    return structure, [type(leaf) for leaf in leaves]


def owner_of_differing_constant(training: LeafTracer, evaluation: LeafTracer) -> str | None:
    """Return the path of a module whose forward creates different tensor constants in two traces with equal logs."""
    for forwards, kind, *what in training.log:
        if kind != "get_attr" or not what[1].startswith("_tensor_constant"):
            continue
        if not same_tensor(getattr(training.root, what[1]), getattr(evaluation.root, what[1])):
            return forwards[-1]
    return None


def same_tensor(a: object, b: object) -> bool:
    """Return True if two tensors have equal values, shape, dtype, layout and device, or if ``a`` is no tensor.

    NaN equals NaN. Tensors on the meta device have no values to compare. Tensors whose values cannot be compared
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
    except RuntimeError:  # of tensors that torch cannot compare nothing is known: they count as different
        return False
