"""Functionalized writes: the graph after, its results against the graph before, and writes that stay."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import fx

from mfpsn_fx.model.time_axis import with_item
from mfpsn_fx.passes.errors import RollUpError
from mfpsn_fx.passes.rollup.functionalize import functionalize


def unrolled(build):
    """A graph module of ``build(graph, x)``, with a constant that tracing made."""
    root = torch.nn.Module()
    root.register_buffer("_tensor_constant0", torch.zeros(4, 2))
    root.register_buffer("kept", torch.zeros(2))
    graph = fx.Graph()
    graph.output(build(graph, graph.placeholder("x")))
    return fx.GraphModule(root, graph)


def targets(gm):
    return [n.target for n in gm.graph.nodes if n.op in ("call_function", "call_method")]


def test_writes():
    def build(graph, x):
        for t in range(4):
            step = graph.call_function(operator.getitem, (x, t))
            graph.call_method("__setitem__", (graph.get_attr("_tensor_constant0"), t, step))
        return graph.call_method("mul", (graph.get_attr("_tensor_constant0"), 2))

    gm, x = unrolled(build), torch.randn(4, 2)
    functional = functionalize(gm)
    assert torch.equal(functional(x), 2 * x)
    assert not functional._tensor_constant0.any()  # nothing is left there for the next call
    assert [t for t in targets(functional) if t is not operator.getitem] == [with_item] * 4 + ["mul"]
    assert torch.equal(gm(x), 2 * x)


@pytest.mark.parametrize(("target", "left"), [(operator.iadd, operator.add), ("mul_", "mul"), ("clamp_", "clamp_")])
def test_in_place(target, left):
    def build(graph, x):
        total = graph.call_function(torch.abs, (x,))
        create = graph.call_method if isinstance(target, str) else graph.call_function
        return create(target, (total, 2))

    x = torch.randn(4, 2)
    functional = functionalize(unrolled(build))
    assert targets(functional) == [torch.abs, left]
    assert torch.equal(functional(x), unrolled(build)(x))


def test_what_others_see_changing():
    """A tensor that is read beside, an input, and what the network keeps are changed as they were."""

    def build(graph, x):
        read = graph.call_function(torch.abs, (x,))
        changed = graph.call_function(operator.iadd, (read, 1))
        kept = graph.call_method("add_", (graph.get_attr("kept"), 1))
        return read, changed, kept, graph.call_function(operator.imul, (x, 2))

    gm = unrolled(build)
    assert functionalize(gm) is gm
    assert targets(gm) == [torch.abs, operator.iadd, "add_", operator.imul]


def test_a_step_and_a_part_of_it():
    def build(graph, x):
        return [
            graph.call_function(operator.getitem, (x, item))
            for item in ((0, slice(1, None)), (slice(1, 3), 1), (slice(None), 1), (0, 1), (Ellipsis, 0, slice(1)))
        ]

    gm, x = unrolled(build), torch.randn(4, 2, 2)
    functional = functionalize(gm)
    assert targets(functional).count(torch.select) == 2
    for one, other in zip(functional(x), gm(x), strict=True):
        assert torch.equal(one, other)


def test_a_constant_that_another_method_changes():
    def build(graph, x):
        graph.call_method("lerp_", (graph.get_attr("_tensor_constant0"), x, 0.5))
        return graph.get_attr("_tensor_constant0")

    with pytest.raises(RollUpError, match=r"_tensor_constant0 is changed in place \(lerp_\) and used again"):
        functionalize(unrolled(build))
