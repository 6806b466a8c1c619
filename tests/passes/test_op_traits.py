"""Declared traits of operators against their observed effects on tensors."""

from __future__ import annotations

import functools
import operator

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from mfpsn_fx.passes import op_traits as op_traits_module
from mfpsn_fx.passes.neurons import fake_tensor
from mfpsn_fx.passes.op_traits import draws_random, op_traits, queries_shape

X, Y, Z = object(), object(), object()  # stand for tensors in the calls below
IN_PLACE = [
    getattr(operator, name)
    for name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor")
]
COPIES = ("float", "double", "half", "bfloat16", "bool", "int", "long")
UNARY = (
    "neg", "abs", "exp", "log", "sqrt", "rsqrt", "square", "sign", "relu", "sigmoid", "tanh", "detach", "clone",
    "round", "floor", "ceil", "reciprocal", "erf", "logical_not", "absolute", "positive", "sinc",
)  # fmt: skip
BINARY = (
    "add", "sub", "mul", "div", "pow", "maximum", "minimum", "eq", "ne", "lt", "le", "gt", "ge", "logical_and",
    "logical_or", "multiply", "divide", "subtract", "floor_divide", "remainder", "atan2",
)  # fmt: skip
POINTWISE = [
    *((getattr(torch, name), X) for name in UNARY),
    *((name, X) for name in (*UNARY, *COPIES, "contiguous", "relu_", "neg_", "zero_")),
    *((getattr(torch, name), X, Y) for name in BINARY),
    *((name, X, Y) for name in (*BINARY, "add_", "sub_", "mul_", "div_", "type_as", "copy_")),
    (torch.clamp, X, 0.2, 0.6), ("clamp", X, Y, Z), ("clamp_", X, 0.2), (torch.where, X, Y, Z),
    (torch.where, X, Y, 0.0), (torch.zeros_like, X), (torch.ones_like, X), (torch.max, X, Y),
    ("to", X, torch.float64), ("to", X, Y),
    *((getattr(operator, name), X, Y) for name in ("add", "sub", "mul", "truediv", "pow", "floordiv", "mod")),
    *((getattr(operator, name), X, Y) for name in ("eq", "ne", "lt", "le", "gt", "ge", "and_", "or_", "xor")),
    *((getattr(operator, name), X) for name in ("neg", "abs", "pos", "invert")),
    *((function, X, Y) for function in IN_PLACE),
    (operator.add, 2, X), (operator.pow, 2, X), (operator.sub, X, 2), (operator.imul, X, 2.0),
    *((f, X) for f in (
        F.relu, F.gelu, F.silu, F.sigmoid, F.tanh, F.elu, F.selu, F.celu, F.leaky_relu, F.relu6, F.hardtanh,
        F.hardswish, F.hardsigmoid, F.softplus, F.softsign, F.mish, F.logsigmoid, F.tanhshrink, F.hardshrink,
        torch.special.expit,
    )),
    (F.hardtanh_, X), (F.relu, X, True), (F.elu, X, 1.0, True), (F.threshold, X, 0.5, 0.0), ("masked_fill", X, Y, 0.5),
    *((module, X) for module in (
        nn.ReLU(), nn.ReLU(inplace=True), nn.Identity(), nn.GELU(), nn.SiLU(), nn.LeakyReLU(), nn.Sigmoid(), nn.Tanh(),
        nn.ELU(), nn.SELU(), nn.CELU(), nn.ReLU6(), nn.Hardtanh(), nn.Hardtanh(inplace=True), nn.Hardswish(),
        nn.Hardsigmoid(), nn.Softplus(), nn.Softsign(), nn.Mish(), nn.LogSigmoid(), nn.Threshold(0.5, 0.0),
        nn.Softshrink(), nn.Dropout().eval(), nn.AlphaDropout().eval(),
    )),
    (F.dropout, X, 0.5, False), (F.dropout, X, 0.0), (torch.dropout, X, 0.5, False),
]  # fmt: skip
MIXING = [  # an element of the result depends on others, or on where it stands
    (torch.softmax, X, 0), (F.softmax, X, 0), (F.log_softmax, X, 0), (torch.cumsum, X, 0), (torch.cumprod, X, 0),
    (torch.flip, X, (0,)), (torch.roll, X, 1, 0), (torch.matmul, X, Y), (operator.matmul, X, Y), ("sort", X, 0),
    (torch.tril, X), (F.normalize, X, 2.0, 0), (F.layer_norm, X, (3,)), (nn.Softmax(0), X), ("cummax", X, 0),
    (F.prelu, X, 0), (torch.logcumsumexp, X, 0), (F.max_pool1d, X, 3, 1, 1),
]  # fmt: skip
REDUCTIONS = [
    *((getattr(torch, name), X, 0) for name in ("mean", "sum", "amax", "logsumexp", "argmax", "any", "all", "std")),
    *((name, X) for name in ("mean", "sum", "amin", "argmin", "var", "prod", "max")), ("max", X, 1), ("norm", X),
]  # fmt: skip
VIEWS = [
    ("view", X, -1), ("view", X, 3, 9), (torch.reshape, X, (-1,)), ("transpose", X, 0, 1), ("permute", X, 2, 0, 1),
    (torch.unsqueeze, X, 0), ("flatten", X), ("expand_as", X, Y), (operator.getitem, X, 0), ("chunk", X, 3),
    (torch.split, X, 1), ("detach", X), (nn.Flatten(), X), ("select", X, 0, 1), ("narrow", X, 0, 0, 2),
    ("contiguous", X), ("unflatten", X, 0, (1, 3)), (torch.atleast_1d, X), (F.dropout, X, 0.5, False), ("float", X),
    ("type_as", X, Y), (nn.Identity(), X), (nn.Dropout(0.0), X),
]  # fmt: skip
RANDOM = [
    (F.dropout, X), (F.dropout1d, X), (F.alpha_dropout, X, 0.5, True), (F.feature_alpha_dropout, X, 0.5, True),
    (torch.bernoulli, X), ("bernoulli", X), ("bernoulli_", X, 0.5), (torch.rand_like, X), (torch.randn_like, X),
    (torch.poisson, X), (torch.normal, X, Y), (torch.dropout, X, 0.5, True), (F.gumbel_softmax, X), ("normal_", X),
    ("uniform_", X), ("exponential_", X), ("geometric_", X, 0.5), (torch.randint_like, X, 1000), (nn.Dropout(), X),
    (F.rrelu, X, -1.0, 1.0, True), (nn.RReLU(-1.0, 1.0), X), (nn.Dropout1d(), X), ("random_", X),
    (F.fractional_max_pool2d, X, 2, 5), (torch.multinomial, 0, 30, True), (torch.rand, 5), (torch.randperm, 50),
]  # fmt: skip


def tensors(dtype=torch.float32):
    torch.manual_seed(0)
    found = [torch.rand(3, 3, 3) - 0.2 * i for i in range(3)]
    if dtype is torch.float32:
        return found
    return [(9 * x.abs()).to(dtype) + (dtype is torch.int64) for x in found]


def traced(target, args):
    """A graph of one call on ``X``, ``Y``, ``Z``, of which the shapes are known."""
    graph, root = fx.Graph(), nn.Module()
    nodes = {key: graph.placeholder(name) for key, name in zip((X, Y, Z), "xyz", strict=True)}
    for node in nodes.values():
        node.meta["val"] = fake_tensor((3, 3, 3), torch.float32, torch.device("cpu"))
    given = tuple(nodes.get(a, a) if type(a) is object else a for a in args)
    if isinstance(target, nn.Module):
        root.layer = target
        call = graph.call_module("layer", given)
    elif isinstance(target, str):
        call = graph.call_method(target, given)
    else:
        call = graph.call_function(target, given)
    graph.output(call)
    return fx.GraphModule(root, graph), call, tuple(nodes.values())


def run(target, args, values):
    """The result on ``values``, and which of these were written into or share memory with it."""
    values = [v.clone(memory_format=torch.preserve_format) for v in values]
    kept = [v.clone() for v in values]
    given = [values[(X, Y, Z).index(a)] if type(a) is object else a for a in args]
    result = getattr(given[0], target)(*given[1:]) if isinstance(target, str) else target(*given)
    leaves = [r for r in (result if isinstance(result, (tuple, list)) else [result]) if isinstance(r, Tensor)]
    written = [not torch.equal(v, k) for v, k in zip(values, kept, strict=True)]
    places = {r.untyped_storage().data_ptr() for r in leaves}
    shared = [v.untyped_storage().data_ptr() in places for v in values]
    return leaves[0], written, shared


def numbers_for(target, args):
    """Tensors of the first dtypes that the operator takes: conditions are of bool, bits are whole numbers."""
    floats, bools = tensors(), tensors(torch.int64)
    conditions = [tensors()[0] > 0.5, *floats[1:]], [floats[0], floats[1] > 0.3, floats[2]]
    for values in (floats, *conditions, bools):
        try:
            run(target, args, values)
        except (RuntimeError, TypeError, NotImplementedError):
            continue
        return values
    return None


def check(target, args, values):
    """Compare what is declared with what is done; return both."""
    gm, call, nodes = traced(target, args)
    traits = op_traits(gm, call)
    result, written, shared = run(target, args, values)
    assert traits is not None
    for node, changed, same in zip(nodes, written, shared, strict=True):
        assert not changed or node in traits.writes
        assert not same or node in traits.aliases
    return traits, result, written, shared, nodes


def is_pointwise(target, args, values):
    there = run(target, args, values)[0]
    back = run(target, args, [v.transpose(0, 2) for v in values])[0]
    same = back.shape == there.shape[::-1] and there.ndim == 3
    return same and torch.allclose(back.transpose(0, 2), there, equal_nan=True, rtol=1e-5, atol=1e-6)


def named(case):
    target, *_ = case
    return target if isinstance(target, str) else getattr(target, "__name__", repr(target))


@pytest.mark.parametrize("case", POINTWISE, ids=named)
def test_pointwise(case):
    target, *args = case
    values = numbers_for(target, args)
    traits, _, written, _, nodes = check(target, args, values)
    used = {node for node, key in zip(nodes, (X, Y, Z), strict=True) if key in args}
    assert set(traits.pointwise) == used
    assert is_pointwise(target, args, values)
    assert not traits.reduction
    assert not traits.random
    if written[0]:
        assert traits.writes == nodes[:1]
    in_place = target in IN_PLACE or "inplace=True" in repr(target) or True in args
    if isinstance(target, str) or getattr(target, "__module__", "") != "_operator":
        in_place = in_place or named(case).endswith("_")
    assert bool(traits.writes) == in_place


@pytest.mark.parametrize("case", MIXING, ids=named)
def test_not_pointwise(case):
    target, *args = case
    gm, call, _ = traced(target, args)
    traits = op_traits(gm, call)
    assert traits is None or not traits.pointwise
    if target is not F.prelu:
        assert not is_pointwise(target, args, tensors())


@pytest.mark.parametrize("case", REDUCTIONS, ids=named)
def test_reductions(case):
    target, *args = case
    traits, result, *_ = check(target, args, tensors())
    assert traits.reduction
    assert not traits.pointwise
    assert not traits.aliases
    assert result.ndim < 3


@pytest.mark.parametrize("case", VIEWS, ids=named)
def test_views(case):
    target, *args = case
    traits, _, written, shared, nodes = check(target, args, tensors())
    assert shared[0]
    assert nodes[0] in traits.aliases
    assert not any(written)
    assert not traits.writes


@pytest.mark.parametrize("case", RANDOM, ids=named)
def test_random(case):
    target, *args = case
    gm, call, _ = traced(target, args)
    assert draws_random(gm, call)
    args = [torch.ones(3) if target is torch.multinomial and a == 0 else a for a in args]
    sign = -1 if "relu" in named(case).lower() else 1
    values = [sign * torch.rand(3, 12, 12) for _ in range(3)]
    torch.manual_seed(1)
    first, second = (run(target, args, values)[0] for _ in range(2))
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    "call",
    [
        (F.dropout, X, 0.0), (F.dropout, X, 0.5, False), (F.rrelu, X), (torch.dropout, X, 0.5, False),
        (F.scaled_dot_product_attention, X, Y, Z), (F.relu, X), (torch.empty_like, X),
    ],
    ids=named,
)  # fmt: skip
def test_nothing_is_drawn(call):
    target, *args = call
    assert not op_traits(*traced(target, args)[:2]).random


def test_writes_that_have_no_return():
    gm, call, (x, y, _) = traced(operator.setitem, (X, 0, Y))
    assert op_traits(gm, call).writes == (x,)
    graph = fx.Graph()
    x, y, out = map(graph.placeholder, ("x", "y", "out"))
    call = graph.call_function(torch.add, (x, y), {"out": out})
    assert op_traits(fx.GraphModule(nn.Module(), graph), call).writes == (out,)
    mean, var = map(graph.placeholder, ("mean", "var"))
    call = graph.call_function(F.batch_norm, (x, mean, var), {"training": True})
    traits = op_traits(fx.GraphModule(nn.Module(), graph), call)
    assert set(traits.writes) == {mean, var}
    assert not traits.aliases


def test_a_tag_that_is_wrong():
    """``torch.equal`` has the tag, and gives one bool."""
    assert not op_traits(*traced(torch.equal, (X, Y))[:2]).pointwise


def test_what_torch_does_not_know():
    def relu(x):
        return x

    class ReLU(nn.ReLU):
        pass

    for target in (relu, ReLU(), nn.Linear(3, 3), F.normalize, "no_such_method"):
        gm, call, _ = traced(target, (X,))
        assert op_traits(gm, call) is None, target
    gm, _, (x, *_) = traced(torch.relu, (X,))
    assert op_traits(gm, x) is None


def test_types_of_arguments_tell_overloads_apart():
    """``torch.max`` of two tensors is pointwise, of one and a dim a reduction, of two unknowns one or the other."""
    gm, call, nodes = traced(torch.max, (X, Y))
    assert op_traits(gm, call).pointwise == nodes[:2]
    for node in nodes:
        node.meta.clear()
    traits = op_traits(gm, call)
    assert not traits.pointwise
    assert not traits.reduction
    assert op_traits(*traced(torch.where, (X,))[:2]).pointwise == ()


def test_operators_of_torch_library():
    library = torch.library.Library("mfpsn_test_traits", "DEF")
    library.define("twice(Tensor x) -> Tensor", tags=torch.Tag.pointwise)
    library.define("fill(Tensor(a!) x, Tensor y) -> ()")
    try:
        gm, call, (x, *_) = traced(torch.ops.mfpsn_test_traits.twice, (X,))
        assert op_traits(gm, call).pointwise == (x,)
        gm, call, (x, *_) = traced(torch.ops.mfpsn_test_traits.fill.default, (X, Y))
        assert op_traits(gm, call).writes == (x,)
    finally:
        library._destroy()


def test_composites_are_looked_into_in_any_mode():
    for mode in (FakeTensorMode(), torch.device("meta"), torch.inference_mode()):
        op_traits_module._is_pointwise.cache_clear()
        with mode:
            assert op_traits(*traced(torch.multiply, (X, Y))[:2]).pointwise
            assert not op_traits(*traced(torch.outer, (X, Y))[:2]).pointwise


def test_questions_of_shape():
    graph = fx.Graph()
    x = graph.placeholder("x")
    assert queries_shape(graph.call_function(getattr, (x, "shape")))
    assert queries_shape(graph.call_method("size", (x, 0)))
    assert not queries_shape(graph.call_function(getattr, (x, "T")))
    assert not queries_shape(graph.call_method("sum", (x,)))


@functools.cache
def tagged():
    """ATen's operators with the tag of pointwise ones that need tensors and numbers only."""
    found = []
    for name in sorted(torch._C._dispatch_get_all_op_names()):
        space, _, rest = name.partition("::")
        packet, _, overload = rest.partition(".")
        if space != "aten" or packet.startswith("_") or "backward" in packet:
            continue
        op = getattr(getattr(torch.ops.aten, packet), overload or "default", None)
        if op is None or torch.Tag.pointwise not in op.tags or any(a.is_out for a in op._schema.arguments):
            continue
        if [str(result.type) for result in op._schema.returns] != ["Tensor"]:
            continue
        wanted = [str(a.type) for a in op._schema.arguments if not a.has_default_value()]
        if set(wanted) <= {"Tensor", "number"} and 0 < wanted.count("Tensor") <= 3:
            found.append(op)
    return found


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_operators_with_the_tag(data):
    op = data.draw(st.sampled_from(tagged()))
    number = data.draw(st.sampled_from([1, 2, 0.5]))
    keys = iter((X, Y, Z))
    wanted = [str(a.type) for a in op._schema.arguments if not a.has_default_value()]
    args = [next(keys) if kind == "Tensor" else number for kind in wanted]
    values = numbers_for(op, args)
    assume(values is not None)
    traits, result, *_, nodes = check(op, args, values)
    assert set(traits.pointwise) == {n for n, key in zip(nodes, (X, Y, Z), strict=True) if key in args}
    assert is_pointwise(op, args, values)
    assert bool(traits.writes) == op._schema.is_mutable
    if not op._schema.is_mutable:
        assert torch.allclose(run(op, args, values)[0], result, equal_nan=True)
