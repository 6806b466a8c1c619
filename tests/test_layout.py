"""The planner: the cut against brute force, labels in graphs, what is inserted against what was planned."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mfpsn_fx.kernels import Layout
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
