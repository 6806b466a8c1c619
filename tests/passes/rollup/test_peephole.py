"""Each peephole: the graph that it makes, its result against the original's, and graphs that it must not change."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from mfpsn_fx.model.time_axis import with_item
from mfpsn_fx.passes.rollup import peephole
from mfpsn_fx.passes.rollup.peephole import simplify

fx.wrap("with_item")


def traced(function, *inputs, sequences=("x",)):
    """The graph of ``function``, each node with its value on the inputs."""
    gm = fx.symbolic_trace(function)

    class Noted(fx.Interpreter):
        def run_node(self, n):
            n.meta["val"] = super().run_node(n)
            return n.meta["val"]

    Noted(gm).run(*inputs)
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            node.meta["zero"] = not bool((node.meta["val"] != 0).any())
        elif node.target in sequences:
            node.meta["steps"] = len(node.meta["val"])
    return gm


def words(gm):
    return [getattr(n.target, "__name__", n.target) for n in gm.graph.nodes if n.op in ("call_function", "call_method")]


def simplified(function, *inputs, exact=True):
    """What is left of a function's calls; it must give what it gave."""
    gm = traced(function, *inputs)
    wanted = function(*inputs)
    simplify(gm)
    gm.graph.lint()
    found = gm(*inputs)
    tolerance = {"rtol": 0, "atol": 0} if exact else {}
    torch.testing.assert_close(found, wanted, **tolerance)
    return words(gm)


S = torch.randn(4, 2, 3)
Z = torch.zeros(2, 3)


def written(x, order, base=None, along=0):
    out = torch.zeros(4, 2, 3) if base is None else base
    for t, step in enumerate(order):
        out = with_item(out, step if along == 0 else (slice(None), step), x[t])
    return out


def nested(x):
    out = x[0]
    for t in range(1, 4):
        out = torch.cat([out, x[t]])
    return out


def stacked_rows(x):
    return torch.stack([x[t] for t in range(4)])


def added(x, start, order=range(4)):
    for t in order:
        start = start + x[t]
    return start


FIRES = {
    "writes": (lambda x: written(x, range(4)), []),
    "writes in any order": (lambda x: written(x, [2, 0, 3, 1]), [*["getitem"] * 4, "stack"]),
    "writes along another dim": (lambda x: written(x, range(4), torch.zeros(2, 4, 3), along=1), ["movedim"]),
    "stack": (lambda x: torch.stack([x[t] for t in range(4)]), []),
    "stack along dim 1": (lambda x: torch.stack([x[t] for t in range(4)], dim=1), ["movedim"]),
    "stack along the last dim": (lambda x: torch.stack([x[t] for t in range(4)], -1), ["movedim"]),
    "stack of negative steps": (lambda x: torch.stack([x[t - 4] for t in range(4)]), []),
    "stack of a window": (lambda x: torch.stack([x[1], x[2]]), ["getitem"]),
    "stack of every other": (lambda x: torch.stack([x[0], x[2]]), ["getitem"]),
    "cat": (lambda x: torch.cat([x[t] for t in range(4)]), ["flatten"]),
    "cat along dim 1": (lambda x: torch.cat([x[t] for t in range(4)], 1), ["movedim", "flatten"]),
    "cat of a window": (lambda x: torch.cat([x[2], x[3]]), ["getitem", "flatten"]),
    "nested cat": (lambda x: nested(x), ["flatten"]),
    "cat of unsqueezed": (lambda x: torch.cat([x[t].unsqueeze(1) for t in range(4)], 1), ["movedim"]),
    "cat of x[None]": (lambda x: torch.cat([x[t][None] for t in range(4)]), []),
    "sum": (lambda x: sum(x[t] for t in range(4)), ["sum"]),
    "sum of a window": (lambda x: x[1] + x[2], ["getitem", "sum"]),
    "sum from zeros": (lambda x: added(x, torch.zeros(2, 3)), ["sum"]),
    "sum from something": (lambda x: added(x, x.mean(0)), ["mean", "sum", "add"]),
    "mean": (lambda x: sum(x[t] for t in range(4)) / 4, ["mean"]),
    "mean of a window": (lambda x: (x[1] + x[2]) / 2, ["getitem", "mean"]),
    "last step": (lambda x: 2 * x[3], ["getitem", "mul"]),
}  # fmt: skip

LEFT = {
    "writes of some steps": (lambda x: written(x, range(3)), "with_item"),
    "writes to one step twice": (lambda x: written(x, [0, 1, 2, 2]), "with_item"),
    "writes with readers between": (
        lambda x: with_item(y := with_item(torch.zeros(2, 2, 3), 0, x[0]), 1, x[1] + y.sum()), "with_item",
    ),
    "writes that broadcast": (lambda x: written(x, range(4), torch.zeros(4, 5, 2, 3)), "with_item"),
    "writes of another dtype": (lambda x: written(x, range(4), torch.zeros(4, 2, 3).double()), "with_item"),
    "writes of many steps": (lambda x: with_item(torch.zeros(4, 2, 3), slice(0, 2), x[0]), "with_item"),
    "stack in another order": (lambda x: torch.stack([x[0], x[2], x[1], x[3]]), "stack"),
    "stack backwards": (lambda x: torch.stack([x[3 - t] for t in range(4)]), "stack"),
    "stack of uneven steps": (lambda x: torch.stack([x[0], x[1], x[3]]), "stack"),
    "stack with a repeated step": (lambda x: torch.stack([x[0], x[1], x[1], x[3]]), "stack"),
    "stack of two sequences": (lambda x: torch.stack([x[0], x.exp()[1], x[2], x[3]]), "stack"),
    "stack of rows along another dim": (lambda x: torch.stack([x[:, t] for t in range(2)]), "stack"),
    "stack of one step": (lambda x: torch.stack([x[0]]), "stack"),
    "cat in another order": (lambda x: torch.cat([x[1], x[0], x[2], x[3]]), "cat"),
    "cat along the last dim": (lambda x: torch.cat([x[t] for t in range(4)], -1), "cat"),
    "nested cat of two dims": (lambda x: torch.cat([torch.cat([x[1], x[0]], 1), torch.cat([x[3], x[2]], 1)]), "cat"),
    "cat of unsqueezed along another dim": (lambda x: torch.cat([x[0].unsqueeze(0), x[1].unsqueeze(0)], 1), "cat"),
    "sum with a repeated step": (lambda x: added(x, 0, [0, 1, 1, 2]), "add"),
    "sum of uneven steps": (lambda x: added(x, 0, [0, 1, 3]), "add"),
    "sum in another order": (lambda x: added(x, 0, [3, 2, 1, 0]), "add"),
    "weighted sum": (lambda x: x[0] + 0.5 * x[1] + 0.25 * x[2], "add"),
    "scaled addition": (lambda x: torch.add(x[0], x[1], alpha=2), "add"),
    "sum that another start widens": (lambda x: added(x, torch.ones(2, 3).double()), "add"),
    "division by another number": (lambda x: x.sum(0) / 3, "truediv"),
    "sum of what is no sequence": (lambda x: x.exp().sum(0) / 4, "truediv"),
    "stack of what is no sequence": (lambda x: stacked_rows(x.exp()), "stack"),
    "sum along another dim": (lambda x: x.sum(1) / 2, "truediv"),
}  # fmt: skip


@pytest.mark.parametrize("name", FIRES)
def test_fires(name):
    function, left = FIRES[name]
    assert simplified(function, S, exact=not any(word in name for word in ("sum", "mean"))) == left


@pytest.mark.parametrize("name", LEFT)
def test_leaves_alone(name):
    function, left = LEFT[name]
    assert words(traced(function, S)) == simplified(function, S)
    assert left in words(traced(function, S))


def test_sums_of_whole_numbers_keep_their_dtype():
    for kind in (torch.bool, torch.uint8, torch.int32):
        x = S.to(kind)
        assert simplified(lambda x: sum(x[t] for t in range(4)), x) == ["sum"]
        assert simplified(lambda x: added(x, 0.0), x) == ["sum"]
    assert simplified(lambda x: x[0] + x[1], S > 0) == ["getitem", "getitem", "add"]  # which is an or


def test_sums_from_zeros_that_broadcast():
    assert simplified(lambda x: added(x, torch.zeros(5, 2, 3)), S, exact=False) == ["sum", "add"]


def test_readers_between():
    """What others read stays; the sum of all is one sum."""

    def function(x):
        stacked = torch.stack([x[t] for t in range(4)])
        return stacked, stacked[3], sum(x[t] for t in range(4)) / 4, x[1]

    assert simplified(function, S, exact=False) == ["getitem", "mean", "getitem"]


def test_sums_that_are_read_on_the_way():
    def function(x):
        two = x[0] + x[1]
        return two, two + x[2] + x[3]

    assert simplified(function, S, exact=False) == ["getitem", "sum", "getitem", "sum", "add"]


def test_values_and_constants_of_the_example_are_gone():
    gm = traced(lambda x: added(x, torch.zeros(2, 3)), S)
    assert any(name.startswith("_tensor_constant") for name in dir(gm))
    for name in [n for n in vars(gm) if n.startswith("_tensor_constant")]:
        value = getattr(gm, name)
        delattr(gm, name)
        gm.register_buffer(name, value)
    simplify(gm)
    assert not dict(gm.named_buffers())
    assert not any("val" in node.meta for node in gm.graph.nodes)


def test_all_are_tried():
    names = {name for name in dir(peephole) if "_to_" in name or name == "last_step"}
    assert {one.__name__ for one in peephole.PEEPHOLES} == names
