"""The planner: the minimum cut against brute force, labels in graphs, inserted conversions against planned ones."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import operator
import pathlib
import pickle
import re
import types

import pytest
import snntorch
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import mfpsn_fx
from mfpsn_fx.kernels import Layout, to_layout
from mfpsn_fx.kernels.autotune import race as engine
from mfpsn_fx.model import capture
from mfpsn_fx.model.results import Plan, record_of
from mfpsn_fx.model.time_axis import expect_steps
from mfpsn_fx.model.time_last import run_time_last
from mfpsn_fx.passes import (
    Autoselect,
    BindKernels,
    CancelConversions,
    Example,
    InsertConversions,
    PassContext,
    Pipeline,
    PlanLayout,
    PropagateShapes,
    conversion_nodes,
    neurons,
)
from mfpsn_fx.passes.layout.graph import layout_graph
from mfpsn_fx.passes.layout.min_cut import Costs, Tensor, best_labels, crossings, total_cost
from mfpsn_fx.passes.layout.regions import remove_conversions
from mfpsn_fx.passes.planning import measure_layers as measure_layers
from mfpsn_fx.passes.planning import measure_neurons as autoselect
from mfpsn_fx.passes.planning import verify_plan

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
    options = {"layout": "time_first", "kernels": "shifted-add", "fold_norms": False}
    return mfpsn_fx.convert(Branching(), x, progress=False, repeats=1, **options), x


def twin(gm):
    return copy.deepcopy(gm)


def distort(distorted, cheap):
    """Set the times of neurons and layers to ``cheap(layout, shape)`` ms; a conversion costs 0.5 ms each time."""

    def times(problem, name):
        ms = cheap(problem.layout, Layout.TIME_FIRST.shape_from(problem.shape, problem.layout))
        return ms / 2, ms / 2, ms

    distorted(times, 0.5)


def planned(gm, x, distorted, cheap, **options):
    distort(distorted, cheap)
    options = {"kernels": "shifted-add", "repeats": 1, "progress": False, **options}
    return mfpsn_fx.plan(gm, x, **options)


@pytest.fixture
def engine_time(monkeypatch):
    """``engine_time(cheap, conversion, noise)``: kernels run in the real engine, on a clock that shows given times.

    ``cheap`` and ``conversion`` are those of :func:`distort`. Of four runs of a neuron's part the first takes as long,
    and the others longer by ``noise``, relative.
    """

    def use(cheap, conversion, noise=0.0):
        now = [0.0]

        def slowed(variant):
            facts = types.SimpleNamespace(**variant.key)

            def times():
                if facts.op in ("layer", "to_layout"):
                    return dict.fromkeys(("training", "forward", "backward"), (conversion,))
                ms = cheap(facts.layout, Layout.TIME_FIRST.shape_from(facts.shape, Layout.parse(facts.layout)))
                parts = {"forward": ms / 2, "backward": ms / 2, "eval": ms}
                return {part: (ms, *[ms * (1 + noise)] * 3) for part, ms in parts.items()}

            def prepare():
                return {
                    part: functools.partial(run_for, run, itertools.cycle(times()[part]))
                    for part, run in variant.prepare().items()
                }

            return dataclasses.replace(variant, prepare=prepare)

        def run_for(run, times):
            run()
            now[0] += next(times) * 1e6

        def run_races(races, **options):
            slow = [dataclasses.replace(c, variants=tuple(map(slowed, c.variants))) for c in races]
            return engine.run_races(slow, **{**options, "cache": None}, clock=lambda: now[0])

        monkeypatch.setattr(engine, "time", types.SimpleNamespace(monotonic=lambda: now[0] / 1e9))
        for module in (autoselect, measure_layers):
            monkeypatch.setattr(module, "run_races", run_races)

    return use


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
    def test_a_mixed_plan_stands_inside_and_computes_the_same(self, converted, distorted):
        """With costs that favor it, conversions stand inside; outputs and gradients equal those of a uniform layout."""
        gm, x = converted
        gm, x = gm.double().train(), x.double()
        uniform = twin(gm)
        names, trained = list(gm.state_dict()), [name for name, _ in gm.named_parameters()]
        planned(gm, x, distorted, mixed)
        planned(uniform, x, distorted, mixed, layout="time_first")
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

    def test_what_was_inserted_is_what_was_planned(self, converted, distorted):
        gm, x = converted
        planned(gm, x, distorted, mixed)
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
        plan = record_of(gm).plan
        assert (plan.conversions, plan.conversion_bytes) == (len(nodes), table.conversion_bytes)
        # each is read once at least, and cancelling finds nothing to do
        assert not CancelConversions()(gm).modified

    def test_again_and_back(self, converted, distorted):
        """Idempotent; replanned to a uniform layout, and to what it was."""
        gm, x = converted
        before = gm.code
        gm.eval()
        expected = gm(x)
        planned(gm, x, distorted, mixed)
        shape = lambda: re.sub(r"_\d+", "", gm.code)  # noqa: E731
        once, count = shape(), len(conversion_nodes(gm))
        planned(gm, x, distorted, mixed)
        assert shape() == once
        assert len(conversion_nodes(gm)) == count
        again = pickle.loads(pickle.dumps(gm))
        torch.testing.assert_close(again(x), expected)
        for one in (gm, again):
            planned(one, x, distorted, mixed, layout="time_last")
            assert {row.layout for row in mfpsn_fx.selection(one).rows} == {"time_last"}
            torch.testing.assert_close(one(x), expected)
            planned(one, x, distorted, mixed, layout="time_first")
            assert conversion_nodes(one) == []
            assert torch.equal(one(x), expected)
        after = shape().replace(", layout = 'time_first'", "").replace(", end_dim = 4", "")
        assert after == re.sub(r"_\d+", "", before)

    def test_rules(self, converted, distorted):
        gm, x = converted
        found = {}
        for rule in ("auto", "uniform", "time_first", "time_last"):
            planned(gm, x, distorted, mixed, layout=rule)
            found[rule] = mfpsn_fx.selection(gm)
        assert {rule: table.layout for rule, table in found.items()} == {
            "auto": "mixed", "uniform": "time_last", "time_first": "time_first", "time_last": "time_last",
        }  # fmt: skip
        assert [name for name, _ in found["auto"].totals_ms] == ["time_first", "time_last", "plan"]
        assert [name for name, _ in found["uniform"].totals_ms] == ["time_first", "time_last"]
        assert found["uniform"].totals_ms == found["auto"].totals_ms[:2]
        code = gm.code
        planned(gm, x, distorted, mixed, layout="keep")
        assert gm.code == code
        assert mfpsn_fx.selection(gm).layout == "keep"
        with pytest.raises(ValueError, match="unknown layout 'best'"):
            planned(gm, x, distorted, mixed, layout="best")

    def test_the_table_tells(self, converted, distorted):
        gm, x = converted
        planned(gm, x, distorted, mixed)
        table = mfpsn_fx.selection(gm)
        text = table.table()
        assert "layout chosen: mixed" in text
        assert f"layout conversions inserted: {table.conversions} ({table.conversion_bytes} bytes)" in text
        assert "stays time-first: 2 x .view(): unknown operator" in text
        assert re.search(r"total plan: [\d.]+ ms forward and backward \(neurons 5.000, other layers", text)
        assert mfpsn_fx.Selection.from_json(table.to_json()) == table

    def test_through_the_engine_it_plans_the_same(self, converted, distorted, engine_time):
        """Warm-ups, rounds, samples and their lowest lead to the plan, and the totals, of the times themselves."""
        gm, x = converted
        expected = planned(twin(gm), x, distorted, mixed)
        engine_time(mixed, 0.5)
        mfpsn_fx.plan(gm, x, kernels="shifted-add", progress=False, budget_s=1e6)
        table, wanted = mfpsn_fx.selection(gm), mfpsn_fx.selection(expected)
        assert table.layout == "mixed"
        assert [(r.layer, r.layout) for r in table.rows] == [(r.layer, r.layout) for r in wanted.rows]
        assert dict(table.totals_ms) == pytest.approx(dict(wanted.totals_ms), rel=1e-5)
        assert table.conversions == wanted.conversions

    @pytest.mark.parametrize(("noise", "layout"), [(0.0, "time_last"), (0.5, "time_first")])
    def test_all_time_first_stays_in_doubt(self, converted, engine_time, noise, layout):
        """Neurons take 4 % less time-last: more than the spread of a quiet machine, less than that of a noisy one."""
        gm, x = converted
        expected = gm.eval()(x)
        engine_time(lambda where, shape: 10.0 if where == "time_first" else 9.6, 1e-3, noise)
        mfpsn_fx.plan(gm, x, kernels="shifted-add", progress=False, budget_s=1e6)
        table = mfpsn_fx.selection(gm)
        totals = dict(table.totals_ms)
        assert {row.layout for row in table.rows if row.layer != "sn3"} == {layout}
        assert totals["time_last"] < totals["time_first"]  # it is the doubt that decides
        assert (totals["plan"] == totals["time_first"]) is (layout == "time_first")
        torch.testing.assert_close(gm(x), expected)

    def test_compiled(self, converted, distorted):
        """One graph, no break, with forms and conversions inside."""
        gm, x = converted
        planned(gm, x, distorted, mixed)
        gm.drop.p = 0.0
        expected, wanted = training_step(twin(gm), x)
        found, grads = training_step(torch.compile(gm, backend="aot_eager", fullgraph=True), x)
        torch.testing.assert_close(found, expected)
        assert len(grads) == len(wanted)


def passed(gm, *xs, layout="time_last"):
    Pipeline([PropagateShapes(), InsertConversions(layout)], given=["neurons"])(gm, PassContext(Example(xs)))
    return gm


LINES = (
    "self.sn{i}(a)", "self.sn{i}(a)", "self.conv{i}(a)", "self.bn{i}(a)", "a + b", "torch.cat((a, b), 2)[:, :, :3]",
    "torch.cat((a, b), 2).mean(2, keepdim=True) * a", "a.flatten(3).view(a.shape)", "torch.relu(a) - b",
    "a.transpose(3, 4)", "a * a.mean(0, keepdim=True)", "self.relu(a.clone())", "a.clone().add_(b)", "a.add_(b * 0.5)",
    "add(a, b)", "torch.where(a > 0, a, b)", "torch.lerp(a, b, 0.3).abs()", "a.clamp(-1, 1) * torch.sigmoid(b)",
    "b + a.std(0, keepdim=True)", "torch.mul(a, b, out=a)", "a.contiguous().masked_fill_(b > 0, 0.5)",
)  # fmt: skip


@st.composite
def networks(draw):
    """A network of neurons, layers, joins, views and writes in place, as lines; and which nodes to have time-last."""
    lines, names = [], ["x", "y"]
    for index in range(draw(st.integers(2, 9))):
        a, b = (draw(st.sampled_from(names)) for _ in "ab")
        line = draw(st.sampled_from(LINES))
        text = line.replace("{i}", str(index))
        for word, name in (("a", a), ("b", b)):
            text = re.sub(rf"(?<![\w.]){word}(?=[\s,).\[]|$)", name, text)
        lines.append(f"v{index} = {text}")
        names.append(f"v{index}")
    outs = draw(st.sets(st.sampled_from(names), min_size=1, max_size=3))
    lines.append("return " + ", ".join([*sorted(outs), f"{names[-1]}.mean(0)"]))
    return lines, draw(st.integers(0, 2**20))


def built(lines):
    scope = {"torch": torch, "add": lambda a, b: operator.iadd(a, b * 0.5)}
    exec("def forward(self, x, y):\n" + "\n".join(f"    {line}" for line in lines), scope)
    model = type("Random", (nn.Module,), {"forward": scope["forward"]})()
    for index in range(len(lines)):
        setattr(model, f"sn{index}", mfpsn_fx.MulFreePSN(3))
        setattr(model, f"conv{index}", layer.Conv2d(3, 3, 3, padding=1, step_mode="m"))
        setattr(model, f"bn{index}", layer.BatchNorm2d(3, step_mode="m"))
    model.relu = nn.ReLU(inplace=True)
    return model.double().eval()


class TestGraphs:
    @settings(max_examples=40, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
    @given(networks())
    def test_any_labels_compute_the_same(self, network):
        """Random networks under random labels, then all time-last, then time-first: the same values throughout."""
        lines, bits = network
        model = built(lines)
        xs = torch.randn(3, 2, 3, 4, 4).double(), torch.randn(3, 2, 3, 4, 4).double()
        run = lambda one: one(*(x.clone() for x in xs))  # noqa: E731
        with torch.no_grad():
            gm = capture(model)[0]
            expected = run(model)
            PropagateShapes()(gm, PassContext(Example(xs)))
            names = [node.name for node in gm.graph.nodes]
            planned = {name: "" for index, name in enumerate(names) if bits >> (index % 20) & 1}
            for layout in ("auto", "auto", "time_last", "auto", "time_first"):
                InsertConversions(layout)(gm, PassContext(plan=Plan(planned)))
                for found, value in zip(run(gm), expected, strict=True):
                    torch.testing.assert_close(found, value, rtol=1e-10, atol=1e-10)
            assert conversion_nodes(gm) == []

    def test_no_neuron(self):
        gm = capture(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))[0]
        x = torch.randn(3, 2, 4)
        pipeline = mfpsn_fx.planning_pipeline(repeats=1, progress=False)
        expected, code = gm(x), gm.code
        assert torch.equal(pipeline(gm, PassContext(Example((x,))))(x), expected)
        assert gm.code == code

    @pytest.mark.parametrize("layout", ["auto", "time_last"])
    def test_a_neuron_between_input_and_output(self, layout, distorted):
        gm = capture(nn.Sequential(mfpsn_fx.MulFreePSN(3)))[0].eval()
        x = torch.randn(4, 2, 3, 5)
        expected = gm(x)
        distort(distorted, lambda where, shape: 1.0 if where == "time_last" else 20.0)
        mfpsn_fx.plan(gm, x, layout=layout, repeats=1, progress=False)
        assert [n.args[1:] for n in conversion_nodes(gm)] == [
            ("time_first", "time_last"), ("time_last", "time_first"),
        ]  # fmt: skip
        assert torch.equal(gm(x), expected)
        distort(distorted, lambda where, shape: 1.0 if where == "time_last" else 1.5)  # less than the conversions
        mfpsn_fx.plan(gm, x, repeats=1, progress=False)
        assert conversion_nodes(gm) == []

    def test_two_outputs_in_different_layouts(self, distorted):
        class Two(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.b = mfpsn_fx.MulFreePSN(3), mfpsn_fx.MulFreePSN(5)

            def forward(self, x, y):
                first = self.a(x)
                return {"first": first, "second": (self.b(y), first + 1), "rate": first.mean(0)}

        gm = capture(Two().eval())[0]
        xs = torch.randn(4, 2, 3, 5), torch.randn(4, 2, 5, 2)
        expected = gm(*xs)
        distort(distorted, lambda where, shape: 1.0 if (where == "time_last") == (shape[2] == 3) else 20.0)
        mfpsn_fx.plan(gm, *xs, repeats=1, progress=False)
        assert [str(n.layout) for n in neurons(gm)] == ["time_last", "time_first"]
        found = gm(*xs)
        for got, value in zip(pytree.tree_leaves(found), pytree.tree_leaves(expected), strict=True):
            torch.testing.assert_close(got, value)

    def test_writes_in_place_are_seen_by_the_same_readers(self):
        """A tensor, and a view of it, that others read after it was written into."""

        class Writes(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.b, self.c = (mfpsn_fx.MulFreePSN(3) for _ in range(3))

            def forward(self, x):
                out = self.a(x) * 2
                seen = out.transpose(3, 4)
                out += self.b(x)
                count = x.shape[0]
                count += 1
                return self.c(seen) + out / count

        model = Writes().eval()
        gm = capture(model)[0]
        x = torch.randn(4, 2, 3, 5, 5)
        expected = model(x)
        passed(gm, x)
        assert torch.equal(gm(x), expected)
        layouts = {n.name: str(n.layout) for n in neurons(gm)}
        assert layouts == {"a": "time_last", "b": "time_last", "c": "time_first"}
        table = layout_graph(passed(gm, x, layout="time_first")).pinned()
        assert table[("iadd", "shares memory that is written in place")] == 1

    def test_a_neuron_that_stays_is_measured_where_it_stays(self, distorted):
        """Also where all others are time-last; and not where it cannot go."""

        class Writes(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.b = mfpsn_fx.MulFreePSN(3), mfpsn_fx.MulFreePSN(3)

            def forward(self, x):
                out = self.a(x) * 2
                seen = out.transpose(3, 4)
                out += 1
                return self.b(seen)

        gm, x = capture(Writes().eval())[0], torch.randn(4, 2, 3, 5, 6)
        quick = {"kernels": "shifted-add", "repeats": 1, "progress": False}
        for layout, a in (("time_last", "time_last"), ("time_first", "time_first")):
            mfpsn_fx.plan(gm, x, layout=layout, **quick)
            rows = {row.layer: (row.layout, row.kernel) for row in mfpsn_fx.selection(gm).rows}
            assert rows == {"a": (a, "shifted-add"), "b": ("time_first", "shifted-add")}
        asked = distorted(lambda problem, kernel: [1.0] * 3)
        mfpsn_fx.plan(gm, x, repeats=1, progress=False)
        assert {str(p.layout) for p, _ in asked if p.shape == (4, 2, 3, 6, 5)} == {"time_first"}
        assert {str(p.layout) for p, _ in asked if p.shape == (2, 3, 5, 6, 4)} == {"time_last"}
        with pytest.raises(
            ValueError, match=r"b: no kernel can serve .* stays time-first \(shares memory that is"
        ) as e:
            mfpsn_fx.plan(gm, x, kernels={"b": "conv2d"}, repeats=1, progress=False)
        assert "conv2d (time_first): not applicable" in str(e.value)

    def test_the_callers_tensor_is_still_written_into(self):
        class Writes(nn.Module):
            def __init__(self):
                super().__init__()
                self.a = mfpsn_fx.MulFreePSN(3)

            def forward(self, x):
                x += 1
                return self.a(x)

        gm = capture(Writes().eval())[0]
        x = torch.randn(4, 2, 3, 5)
        passed(gm, x)
        given_in, before = x.clone(), x.clone()
        gm(given_in)
        assert torch.equal(given_in, before + 1)

    def test_a_network_written_time_last_is_left_alone(self):
        """Its neurons are time-last on their own; where it converts by hand and goes on as we do not, that stays."""

        class ByHand(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.b = (mfpsn_fx.MulFreePSN(3, layout="time_last") for _ in "ab")

            def forward(self, x, y):
                last = self.a(to_layout(x, "time_first", "time_last"))
                return to_layout(last[..., 1:], "time_last", "time_first"), self.b(y)

        gm = capture(ByHand().eval())[0]
        xs = torch.randn(4, 2, 3, 5), torch.randn(2, 3, 5, 4)
        expected = gm(*xs)
        for layout in ("time_last", "time_first", "auto"):
            mfpsn_fx.plan(gm, *xs, layout=layout, repeats=1, progress=False)
            for found, value in zip(gm(*xs), expected, strict=True):
                torch.testing.assert_close(found, value)
            assert {str(n.layout) for n in neurons(gm)} == {"time_last"}

    def test_a_network_that_was_rolled_up(self):
        """Its layers stand between folds of time and stay; the loop's length is looked for where T is."""

        class Loop(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.linear, self.b = snntorch.Leaky(0.5), nn.Linear(4, 3), snntorch.Leaky(0.9)

            def forward(self, x):
                first, second, out = self.a.init_leaky(), self.b.init_leaky(), []
                for step in range(5):
                    spikes, first = self.a(x[step], first)
                    spikes, second = self.b(self.linear(spikes), second)
                    out.append(spikes)
                return torch.stack(out)

        x = torch.rand(5, 2, 4)
        gm = mfpsn_fx.convert(Loop(), x, layout="time_first", kernels="shifted-add", repeats=1, progress=False).eval()
        expected = gm(x)
        (length,) = (n for n in gm.graph.nodes if n.target is expect_steps)
        mfpsn_fx.plan(gm, x, layout="time_last", kernels="shifted-add", repeats=1, progress=False)
        assert {str(n.layout) for n in neurons(gm)} == {"time_last"}
        assert torch.equal(gm(x), expected)
        assert {name for name, _, _ in mfpsn_fx.selection(gm).pinned} == {"fold_time", "unfold_time"}
        with pytest.raises(ValueError, match="a loop over 5 steps"):
            gm(torch.rand(6, 2, 4))
        assert length.args[1] in (0, -1)

    def test_layers_with_hooks_and_parametrizations_stay(self):
        model = nn.Sequential(
            layer.Conv2d(3, 3, 1, step_mode="m"), mfpsn_fx.MulFreePSN(3),
            nn.utils.parametrizations.weight_norm(layer.Conv2d(3, 3, 1, step_mode="m")), mfpsn_fx.MulFreePSN(3),
            layer.Conv2d(3, 3, 1, step_mode="m"),
        ).eval()  # fmt: skip
        gm = capture(model)[0]
        seen = []
        x = torch.randn(4, 2, 3, 5, 5)
        gm.get_submodule("0").register_forward_hook(lambda m, args, y: seen.append(tuple(y.shape)))
        expected = gm(x)
        passed(gm, x)
        assert torch.allclose(gm(x), expected)
        assert seen[-1] == (4, 2, 3, 5, 5)
        kinds = {n.target: n.op for n in gm.graph.nodes if n.op == "call_module"}
        assert {"0", "2"} < set(kinds)
        assert "4" not in kinds
        whys = {why for _, why in layout_graph(passed(gm, x, layout="time_first")).pinned()}
        assert whys == {"has hooks or a forward of its own", "unknown layer"}


class TestOperators:
    def test_a_module_of_the_users_own(self):
        class Scale(nn.Module):  # per channel: (C, 1, 1) against (T, N, C, H, W)
            def __init__(self):
                super().__init__()
                self.factor = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))

            def forward(self, x):
                return x * self.factor.view(3, 1, 1)

        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.scale, self.b = mfpsn_fx.MulFreePSN(3), Scale(), mfpsn_fx.MulFreePSN(3)

            def forward(self, x):
                return self.b(self.scale(self.a(x)))

        model, x = Net().eval(), torch.randn(4, 2, 3, 5, 5)
        expected = model(x)
        seen_through = passed(capture(model)[0], x)
        assert len(conversion_nodes(seen_through)) == 4  # its product is pinned, so between two of its own
        mfpsn_fx.register_operator_layout(
            Scale, "forms", {"channels": lambda m, x: x * m.factor.view(3, 1, 1, 1)}
        )  # fmt: skip
        try:
            gm = capture(model)[0]
            assert len(conversion_nodes(passed(gm, x))) == 2
            assert torch.equal(gm(x), expected)
            assert [n.args[2] for n in gm.graph.nodes if n.target is run_time_last] == [""]
        finally:
            mfpsn_fx.unregister_operator_layout(Scale)
        assert torch.equal(gm(x), expected)  # called as it is, between two conversions
        InsertConversions("time_first")(gm)
        assert torch.equal(gm(x), expected)

    def test_functions_and_methods(self):
        def known(function):
            class Net(nn.Module):
                def __init__(self):
                    super().__init__()
                    self.a, self.b = mfpsn_fx.MulFreePSN(3), mfpsn_fx.MulFreePSN(3)

                def forward(self, x):
                    return self.b(function(self.a(x)))

            gm, x = capture(Net().eval())[0], torch.randn(4, 2, 3, 5)
            return len(conversion_nodes(passed(gm, x))) == 2

        assert known(torch.special.expit)
        assert known(lambda x: x.erfc())
        quantize = torch.fake_quantize_per_tensor_affine
        assert not known(lambda x: quantize(x, 0.1, 0, 0, 255))
        mfpsn_fx.register_operator_layout(quantize, "neutral")
        mfpsn_fx.register_operator_layout(torch.Tensor.type, "neutral")
        mfpsn_fx.register_operator_layout(torch.relu, "pinned")
        try:
            assert known(lambda x: quantize(x, 0.1, 0, 0, 255))
            assert known(lambda x: x.type(torch.float32))
            assert not known(torch.relu)
        finally:
            for one in (quantize, torch.Tensor.type, torch.relu):
                mfpsn_fx.unregister_operator_layout(one)
        assert known(torch.relu)
        assert not known(lambda x: x.type(torch.float32))

    def test_pointwise_operators_that_nobody_listed(self):
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.b, self.c = (mfpsn_fx.MulFreePSN(3) for _ in range(3))
                self.act, self.shrink = nn.CELU(), nn.Tanhshrink()

            def forward(self, x):
                y = self.a(x)
                y = torch.clamp(F.gelu(y) * torch.sigmoid(x), -2, 2) + torch.where(y > 0, x, 0.25).abs()
                y = torch.maximum(F.hardtanh(y), torch.lerp(x, y, 0.5)).masked_fill(x > 1, 0.0)
                y = torch.multiply(self.shrink(self.act(self.b(y))), 2.0) + F.softsign(x).square() // 0.5
                return self.c(torch.addcmul(y, x.sinc(), F.threshold(x, 0.0, 0.5)))

        gm, x = capture(Net().eval())[0], torch.randn(4, 2, 3, 5)
        expected = gm(x)
        passed(gm, x)
        nodes = conversion_nodes(gm)
        assert len(nodes) == 2
        assert all(
            "placeholder" in (n.args[0].op, *(r.op for r in n.users)) or "output" in {r.op for r in n.users}
            for n in nodes
        )
        torch.testing.assert_close(gm(x), expected)

    @pytest.mark.parametrize("function", [torch.argmax, torch.argmin, lambda x: x.argmax()])
    def test_places_counted_over_all_dims(self, function):
        """They count in the order of dims, which another layout changes."""

        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.a = mfpsn_fx.MulFreePSN(3)

            def forward(self, x):
                return function(self.a(x) + x)

        torch.manual_seed(0)
        gm, x = capture(Net().eval())[0], torch.randn(4, 2, 3, 5)
        expected = gm(x)
        passed(gm, x)
        assert [str(n.layout) for n in neurons(gm)] == ["time_last"]
        assert torch.equal(gm(x), expected)

    @pytest.mark.parametrize(
        "function",
        [
            lambda x: x.std(0), lambda x: x.var(2, keepdim=True), lambda x: torch.prod(x, 0),
            lambda x: x.nansum((0, 3)), lambda x: torch.std(x, 3, True, True), lambda x: x.std(True),
            lambda x: x.norm(), lambda x: x.norm(2), lambda x: x.argmax(0),
            lambda x: torch.logsumexp(x, (1, -1)), lambda x: torch.linalg.vector_norm(x, 2, 0), lambda x: x.max(0)[0],
            lambda x: torch.count_nonzero(x, 0), lambda x: x.all(), lambda x: x.norm(dim=0), lambda x: x.amax((0, -1)),
        ],
    )  # fmt: skip
    def test_reductions(self, function):
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.a = mfpsn_fx.MulFreePSN(3)

            def forward(self, x):
                y = self.a(x) * x
                return y, function(y)

        gm, x = capture(Net().eval())[0], torch.randn(4, 2, 3, 5)
        expected = gm(x)
        passed(gm, x)
        torch.testing.assert_close(gm(x), expected)
        assert conversion_nodes(gm)
        remove_conversions(gm)
        gm.recompile()
        torch.testing.assert_close(gm(x), expected)
        assert {str(n.layout) for n in neurons(gm)} == {"time_first"}

    @torch.no_grad()
    def test_a_result_that_is_written_into_a_given_tensor(self):
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.b = mfpsn_fx.MulFreePSN(3), mfpsn_fx.MulFreePSN(3)

            def forward(self, x):
                y = self.a(x) - 0.5
                seen = y.transpose(3, 4)
                torch.mul(y, x, out=y)
                return self.b(seen)

        gm, x = capture(Net().eval())[0], torch.randn(4, 2, 3, 5, 5)
        expected = gm(x)
        passed(gm, x)
        assert torch.equal(gm(x), expected)

    def test_faults(self):
        register = mfpsn_fx.register_operator_layout
        with pytest.raises(ValueError, match="unknown kind 'both'"):
            register(nn.Conv2d, "both")
        with pytest.raises(ValueError, match="kind 'forms' needs"):
            register(nn.Conv2d, "forms")
        with pytest.raises(ValueError, match="no other kind takes them"):
            register(nn.Conv2d, "neutral", {"a": lambda m, x: x})
        with pytest.raises(ValueError, match="are for module classes"):
            register(torch.relu, "forms", {"a": lambda m, x: x})
        with pytest.raises(TypeError, match="no module class"):
            register(int, "neutral")
        with pytest.raises(TypeError, match="no qualified class name"):
            register("Conv2d", "neutral")
        with pytest.raises(ValueError, match="was not registered"):
            mfpsn_fx.unregister_operator_layout(nn.Conv2d)


def test_the_manuals_example():
    """docs/design/layout.md: a custom operator runs in its registered form."""
    text = (pathlib.Path(__file__).parents[3] / "docs" / "design" / "layout.md").read_text(encoding="utf-8")
    (block,) = (b for b in re.findall(r"```python\n(import.*?)```", text, flags=re.DOTALL) if "class ChannelScale" in b)
    names: dict = {"__name__": "manual"}
    exec(compile(block, "docs/design/layout.md", "exec"), names)
    scale = names["ChannelScale"]
    try:
        net = nn.Sequential(neuron.LIFNode(step_mode="m"), scale(3), neuron.LIFNode(step_mode="m")).eval()
        nn.init.uniform_(net[1].factor)
        x = torch.randn(4, 2, 3, 5, 5)
        gm = mfpsn_fx.convert(net, x, layout="time_last", kernels="shifted-add", progress=False, repeats=1)
        assert [n.args[2] for n in gm.graph.nodes if n.target is run_time_last] == ["broadcast"]
        assert len(conversion_nodes(gm)) == 2
        found = gm(x)
        mfpsn_fx.plan(gm, x, layout="time_first", kernels="shifted-add", progress=False, repeats=1)
        assert torch.equal(gm(x), found)
    finally:
        for one in (scale, torch.special.expit, torch.Tensor.cumsum):
            mfpsn_fx.unregister_operator_layout(one)


class TestDynamo:
    def test_bare_ops(self, distorted):
        """The same passes on Dynamo's graph: forward and gradients of the compiled network."""
        distort(distorted, lambda where, shape: 1.0 if where == "time_last" else 20.0)
        seen = []

        def backend(gm, inputs):
            passes = [
                PropagateShapes(), Autoselect("auto", "shifted-add", 1, False),
                PlanLayout("auto", "shifted-add", 1, False), InsertConversions(), BindKernels("shifted-add"),
            ]  # fmt: skip
            gm = Pipeline(passes, given=["neurons"])(gm)
            seen.append(gm)
            return gm.forward

        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.b, self.conv = mfpsn_fx.MulFreePSN(3), mfpsn_fx.MulFreePSN(3), nn.Conv1d(3, 3, 1)

            def forward(self, x):
                y = self.a(x)
                y = self.b(torch.relu(y + x) * 0.5)
                return self.conv(y.flatten(0, 1)).sum()

        model = Net().double()
        other = copy.deepcopy(model)
        x = torch.randn(4, 2, 3, 5).double()
        loss = torch.compile(model, backend=backend, fullgraph=True)(x)
        loss.backward()
        expected = other(x)
        expected.backward()
        torch.testing.assert_close(loss, expected)
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)
        (gm,) = seen
        assert [str(n.layout) for n in neurons(gm)] == ["time_last"] * 2
        assert len(conversion_nodes(gm)) == 2
        torch.testing.assert_close(model.b.running_mean, other.b.running_mean)


class TestVerify:
    def clock(self, monkeypatch, ms):
        """Make a step of each network take ``ms`` of its neurons' layouts, with a little noise."""

        def step(gm, run, example, devices):
            layouts = "".join("l" if n.layout == "time_last" else "f" for n in neurons(gm))
            run(*example.args)
            index = 0
            while True:
                index += 1
                yield ms(layouts) + 0.01 * (index % 3)

        monkeypatch.setattr(verify_plan, "_step", step)

    @pytest.mark.parametrize(
        ("first", "used", "words"),
        [
            (9.0, "mixed", "plan is the fastest, as predicted"),
            (4.995, "mixed", "time_first is ahead of plan by 0.005 ms, within the spread"),
            (3.0, "time_first", "time_first is faster than plan by 2.000 ms, more than the spread of 0.010 ms"),
        ],
    )
    def test_the_better_one_is_used(self, converted, monkeypatch, first, used, words, distorted):
        gm, x = converted
        expected = gm.eval()(x)
        self.clock(monkeypatch, lambda layouts: {"fffff": first, "lllll": 12.0}.get(layouts, 5.0))
        planned(gm, x, distorted, mixed, verify="eager")
        table = mfpsn_fx.selection(gm)
        assert table.layout == used
        assert [(mode, name) for mode, name, _, _ in table.verified_ms] == [
            ("eager", "plan"), ("eager", "time_first"), ("eager", "time_last"),
        ]  # fmt: skip
        assert words in table.verdict
        assert table.verdict in table.table()
        assert f"measured eager, time_first: {first + 0.01:.3f} ms" in table.table()
        assert table.conversions == len(conversion_nodes(gm)) == (0 if used == "time_first" else table.conversions)
        assert {row.layout for row in table.rows} == ({"time_first"} if used == "time_first" else set(map(str, Layout)))
        assert mfpsn_fx.Selection.from_json(table.to_json()) == table
        torch.testing.assert_close(gm(x), expected)

    def test_for_real(self, converted, distorted, monkeypatch):
        """Nothing of the network moves, and all three are measured, eager and compiled."""
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))  # in less time
        gm, x = converted
        gm.train()
        before = copy.deepcopy(gm.state_dict())
        state = torch.get_rng_state()
        planned(gm, x, distorted, mixed, verify=True)
        assert torch.equal(torch.get_rng_state(), state)
        assert all(torch.equal(value, before[key]) for key, value in gm.state_dict().items())
        table = mfpsn_fx.selection(gm)
        assert [mode for mode, _, _, _ in table.verified_ms] == ["eager"] * 3 + ["compiled"] * 3
        assert all(ms > 0 and spread >= 0 for _, _, ms, spread in table.verified_ms)
        assert table.verdict.startswith("end to end (eager)")
        assert "end to end (compiled)" in table.verdict
        assert all(p.grad is None for p in gm.parameters())

    @pytest.mark.parametrize(
        ("verify", "eager", "used", "words"),
        [
            # ms in eager mode of time_first, time_last and the plan; compiled they take 3, 1 and 2
            ("compiled", (9, 9, 1), "time_last", "(compiled) time_last is faster than plan by 1.000 ms"),
            (True, (9, 2, 2), "time_last", "and time_last is used"),
            (True, (9, 3, 2), "mixed", "(compiled) time_last is faster than plan by 1.000 ms, more than the spread"),
            (True, (1, 3, 2), "mixed", "end to end (eager) time_first is faster than plan by 1.000 ms"),
            ("eager", (1, 3, 2), "time_first", "the prediction was wrong, and time_first is used"),
        ],
    )
    def test_it_must_lose_in_one_mode_and_win_in_none(
        self, converted, monkeypatch, distorted, verify, eager, used, words
    ):
        gm, x = converted
        monkeypatch.setattr(torch, "compile", lambda gm: types.SimpleNamespace(gm=gm, compiled=True))

        def step(gm, run, example, devices):
            ms = (3, 1, 2) if getattr(run, "compiled", False) else eager
            layouts = {str(n.layout) for n in neurons(gm)}
            while True:
                yield float(ms[2 if len(layouts) > 1 else int(layouts == {"time_last"})])

        monkeypatch.setattr(verify_plan, "_step", step)
        planned(gm, x, distorted, mixed, verify=verify)
        table = mfpsn_fx.selection(gm)
        modes = ["eager", "compiled"] if verify is True else [verify]
        assert [mode for mode, _, _, _ in table.verified_ms] == [mode for mode in modes for _ in range(3)]
        assert table.layout == used
        assert words in table.verdict
        assert table.verdict.endswith("plan stays") == (used == "mixed")

    @pytest.mark.parametrize("verify", [True, "compiled"])
    def test_what_does_not_compile_is_measured_eager(self, converted, monkeypatch, distorted, verify):
        gm, x = converted

        def broken(gm):
            raise RuntimeError("no compiler\nat all")

        monkeypatch.setattr(torch, "compile", broken)
        planned(gm, x, distorted, mixed, verify=verify)
        table = mfpsn_fx.selection(gm)
        assert {mode for mode, _, _, _ in table.verified_ms} == {"eager"}
        assert table.verdict.endswith("; not measured compiled: RuntimeError: no compiler")

    def test_unknown_mode(self, converted):
        gm, x = converted
        with pytest.raises(ValueError, match="unknown verify 'fast'"):
            mfpsn_fx.plan(gm, x, verify="fast")
