"""The planner: the cut against brute force, labels in graphs, what is inserted against what was planned."""

from __future__ import annotations

import copy
import itertools
import pickle
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn

import mfpsn_fx
from mfpsn_fx.kernels import Layout
from mfpsn_fx.kernels.timing import Times
from mfpsn_fx.passes import CancelConversions, autoselect, conversion_nodes, neurons, stateless_times
from mfpsn_fx.passes.layout_cut import Costs, Tensor, best_labels, crossings, total_cost

pytestmark = pytest.mark.usefixtures("one_thread")


@st.composite
def problems(draw):
    """Up to 12 nodes: chains, skips, branches, concatenations, several inputs and outputs, random costs."""
    count = draw(st.integers(1, 12))
    inputs = draw(st.integers(1, max(1, count // 3)))
    cost = st.integers(0, 20)
    readers: dict[int, set[int]] = {index: set() for index in range(count)}
    for index in range(inputs, count):
        # one producer makes a chain, a near and a far one a skip, several a concatenation
        for producer in draw(st.sets(st.integers(0, index - 1), min_size=1, max_size=3)):
            readers[producer].add(index)
    nodes = {}
    for index in range(count):
        kind = draw(st.sampled_from(["both", "both", "both", "first", "last"]))
        if index < inputs or not readers[index]:
            kind = draw(st.sampled_from(["first", "both"]))  # what the user passes and expects is mostly pinned
        nodes[index] = Costs(None if kind == "last" else draw(cost), None if kind == "first" else draw(cost))
    tensors = [Tensor(p, tuple(sorted(r)), draw(cost), draw(cost)) for p, r in readers.items() if r]
    return nodes, tensors


class TestCut:
    @settings(max_examples=120, deadline=None)
    @given(problems())
    def test_equals_brute_force(self, problem):
        nodes, tensors = problem
        labels = best_labels(nodes, tensors)
        every = (
            total_cost(nodes, tensors, dict(zip(nodes, choice, strict=True)))
            for choice in itertools.product(
                *[[layout for layout in Layout if nodes[name].under(layout) is not None] for name in nodes]
            )
        )
        assert total_cost(nodes, tensors, labels) == min(every)

    def test_a_conversion_is_paid_once_for_all_readers(self):
        nodes = {"x": Costs(0, None), "a": Costs(5, 0), "b": Costs(5, 0), "c": Costs(5, 0)}
        tensors = [Tensor("x", ("a", "b", "c"), to_last=12, to_first=0)]
        labels = best_labels(nodes, tensors)
        assert [labels[name] for name in "abc"] == [Layout.TIME_LAST] * 3
        assert len(crossings(tensors, labels)) == 1
        assert total_cost(nodes, tensors, labels) == 12

    def test_ties_stay_time_first(self):
        nodes = {"x": Costs(0, None), "a": Costs(3, 3), "b": Costs(4, 2)}
        tensors = [Tensor("x", ("a",), 1, 1), Tensor("a", ("b",), 1, 1), Tensor("b", (), 0, 0)]
        assert best_labels(nodes, tensors) == {"x": "time_first", "a": "time_first", "b": "time_last"}

    def test_faults(self):
        with pytest.raises(ValueError, match="a cannot run in any layout"):
            best_labels({"a": Costs(None, None)}, [])
        with pytest.raises(ValueError, match=r"not there: \['b'\]"):
            best_labels({"a": Costs()}, [Tensor("a", ("b",))])
        with pytest.raises(ValueError, match="a whole number of at least 0"):
            Costs(0.5, 1)
        assert best_labels({}, []) == {}


class Branching(nn.Module):
    """Two branches of convolutions, one with a view in it, joined twice; the head is a mean over time."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = layer.Conv2d(2, 4, 3, padding=1, bias=False)
        self.bn1, self.sn1 = layer.BatchNorm2d(4), neuron.LIFNode()
        self.conv2, self.sn2 = layer.Conv2d(4, 4, 3, padding=1), neuron.LIFNode()
        self.conv3, self.sn3 = layer.Conv2d(4, 4, 1), neuron.LIFNode()
        self.sn4, self.sn5 = neuron.LIFNode(), neuron.LIFNode()
        self.pool, self.drop, self.head = layer.AvgPool2d(2), layer.Dropout(0.2), layer.Linear(8 * 9, 3)
        functional.set_step_mode(self, "m")

    def forward(self, x):
        trunk = self.sn1(self.bn1(self.conv1(x)))
        left = self.sn2(self.conv2(trunk))
        right = self.sn3(self.conv3(trunk).view(x.shape[0], x.shape[1], 4, 36)).view(trunk.shape)
        right += self.sn4(trunk)
        joined = self.pool(torch.cat((left + trunk, right), 2))
        return self.head(self.drop(self.sn5(joined)).flatten(2)).mean(0)


@pytest.fixture
def converted():
    x = torch.randn(4, 2, 2, 6, 6)
    return mfpsn_fx.convert(Branching(), x, layout="time_first", kernels="shifted-add", progress=False, repeats=1), x


def twin(gm):
    return copy.deepcopy(gm)


def distort(monkeypatch, cheap):
    """Times of neurons and layers as ``cheap(layout, shape) -> ms`` says; a conversion costs 0.5 ms one way."""

    def time_kernel(problem, name, repeats, alpha):
        ms = cheap(problem.layout, Layout.TIME_FIRST.shape_from(problem.shape, problem.layout))
        return Times(ms / 2, ms / 2, ms)

    monkeypatch.setattr(autoselect, "time_kernel", time_kernel)
    monkeypatch.setattr(stateless_times, "measure", lambda run, repeats, device: 0.5)


def planned(gm, x, monkeypatch, cheap, **options):
    distort(monkeypatch, cheap)
    options = {"kernels": "shifted-add", "repeats": 1, "progress": False, **options}
    return mfpsn_fx.plan(gm, x, **options)


def mixed(layout, shape):
    """Spikes after the first convolution are cheap time-last, those of the right branch time-first."""
    if shape[2:] in ((4, 6, 6), (8, 3, 3)):
        return 1.0 if layout == "time_last" else 20.0
    return 1.0 if layout == "time_first" else 20.0


def training_step(gm, x):
    gm.zero_grad()
    for module in gm.modules():
        if hasattr(module, "reset"):
            module.reset()
    torch.manual_seed(3)
    y = gm(x)
    (y * torch.arange(y.numel(), dtype=y.dtype).view(y.shape)).sum().backward()
    return y.detach(), {name: p.grad.clone() for name, p in gm.named_parameters() if p.grad is not None}


class TestPlan:
    def test_a_mixed_plan_stands_inside_and_computes_the_same(self, converted, monkeypatch):
        """Issue's own: with costs that favour it, conversions stand inside; outputs and gradients are uniform's."""
        gm, x = converted
        gm, x = gm.double().train(), x.double()
        uniform = twin(gm)
        names, trained = list(gm.state_dict()), [name for name, _ in gm.named_parameters()]
        planned(gm, x, monkeypatch, mixed)
        planned(uniform, x, monkeypatch, mixed, layout="time_first")
        table = mfpsn_fx.selection(gm)
        assert {row.layer: row.layout for row in table.rows} == {
            "sn1": "time_last", "sn2": "time_last", "sn3": "time_first", "sn4": "time_last", "sn5": "time_last",
        }  # fmt: skip
        assert table.layout == "mixed"
        inside = [n for n in conversion_nodes(gm) if n.args[0].op != "placeholder"]
        assert len(inside) >= 2
        assert all("output" not in {user.op for user in node.users} for node in inside)
        assert mfpsn_fx.selection(uniform).layout == "time_first"
        assert conversion_nodes(uniform) == []
        totals = dict(table.totals_ms)
        assert totals["plan"] < min(totals["time_first"], totals["time_last"])
        for _ in range(2):
            (found, grads), (expected, wanted) = training_step(gm, x), training_step(uniform, x)
            torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)
            assert grads.keys() == wanted.keys() == set(trained)
            for name, grad in wanted.items():
                torch.testing.assert_close(grads[name], grad, rtol=1e-9, atol=1e-10, msg=name)
        for (name, a), b in zip(gm.named_buffers(), uniform.buffers(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12, msg=name)
        assert list(gm.state_dict()) == names
        torch.testing.assert_close(gm.eval()(x), uniform.eval()(x), rtol=1e-11, atol=1e-12)
        assert not gm.bn1.training

    def test_what_was_inserted_is_what_was_planned(self, converted, monkeypatch):
        gm, x = converted
        planned(gm, x, monkeypatch, mixed)
        table = mfpsn_fx.selection(gm)
        nodes = conversion_nodes(gm)
        assert table.conversions == len(nodes) > 0
        sizes = {}

        class Watch(torch.fx.Interpreter):
            def run_node(self, n):
                result = super().run_node(n)
                sizes[n] = result.nbytes if isinstance(result, torch.Tensor) else 0
                return result

        Watch(gm.eval()).run(x)
        assert table.conversion_bytes == sum(sizes[n] for n in nodes)
        plan = neurons(gm)[0].module.plan
        assert (plan.conversions, plan.conversion_bytes) == (len(nodes), table.conversion_bytes)
        # each is read once at least, and cancelling finds nothing to do
        assert not CancelConversions()(gm).modified

    def test_again_and_back(self, converted, monkeypatch):
        """Idempotent; replanned to a uniform layout, and to what it was."""
        gm, x = converted
        before = gm.code
        gm.eval()
        expected = gm(x)
        planned(gm, x, monkeypatch, mixed)
        shape = lambda: re.sub(r"_\d+", "", gm.code)  # noqa: E731
        once, count = shape(), len(conversion_nodes(gm))
        planned(gm, x, monkeypatch, mixed)
        assert shape() == once
        assert len(conversion_nodes(gm)) == count
        again = pickle.loads(pickle.dumps(gm))
        torch.testing.assert_close(again(x), expected)
        for one in (gm, again):
            planned(one, x, monkeypatch, mixed, layout="time_last")
            assert {row.layout for row in mfpsn_fx.selection(one).rows} == {"time_last"}
            torch.testing.assert_close(one(x), expected)
            planned(one, x, monkeypatch, mixed, layout="time_first")
            assert conversion_nodes(one) == []
            assert torch.equal(one(x), expected)
        assert re.sub(r"_\d+", "", before) == shape()

    def test_rules(self, converted, monkeypatch):
        gm, x = converted
        found = {}
        for rule in ("auto", "uniform", "time_first", "time_last"):
            planned(gm, x, monkeypatch, mixed, layout=rule)
            found[rule] = mfpsn_fx.selection(gm)
        assert {rule: table.layout for rule, table in found.items()} == {
            "auto": "mixed", "uniform": "time_last", "time_first": "time_first", "time_last": "time_last",
        }  # fmt: skip
        assert [name for name, _ in found["auto"].totals_ms] == ["time_first", "time_last", "plan"]
        assert [name for name, _ in found["uniform"].totals_ms] == ["time_first", "time_last"]
        assert found["uniform"].totals_ms == found["auto"].totals_ms[:2]
        code = gm.code
        planned(gm, x, monkeypatch, mixed, layout="keep")
        assert gm.code == code
        assert mfpsn_fx.selection(gm).layout == "keep"
        with pytest.raises(ValueError, match="unknown layout 'best'"):
            planned(gm, x, monkeypatch, mixed, layout="best")

    def test_the_table_tells(self, converted, monkeypatch):
        gm, x = converted
        planned(gm, x, monkeypatch, mixed)
        table = mfpsn_fx.selection(gm)
        text = table.table()
        assert "layout chosen: mixed" in text
        assert f"layout conversions inserted: {table.conversions} ({table.conversion_bytes} bytes)" in text
        assert "stays time-first: 2 x .view(): unknown operator" in text
        assert re.search(r"total plan: [\d.]+ ms forward and backward \(neurons 5.000, other layers", text)
        assert mfpsn_fx.Selection.from_json(table.to_json()) == table

    def test_with_real_times(self, converted):
        """Whatever is chosen here: it is no dearer than either uniform layout, and computes the same."""
        gm, x = converted
        expected = gm.eval()(x)
        mfpsn_fx.plan(gm, x, repeats=1, progress=False)
        totals = dict(mfpsn_fx.selection(gm).totals_ms)
        assert totals["plan"] <= min(totals["time_first"], totals["time_last"]) + 1e-9
        torch.testing.assert_close(gm(x), expected)

    def test_compiled(self, converted, monkeypatch):
        """One graph, no break, with forms and conversions inside."""
        gm, x = converted
        planned(gm, x, monkeypatch, mixed)
        gm.drop.p = 0.0
        expected, wanted = training_step(twin(gm), x)
        found, grads = training_step(torch.compile(gm, backend="aot_eager", fullgraph=True), x)
        torch.testing.assert_close(found, expected)
        assert len(grads) == len(wanted)
