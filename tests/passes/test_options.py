"""Options as values: defaults, checks, JSON, and what conversion makes of each."""

from __future__ import annotations

import dataclasses
import inspect
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import mfpsn_fx
from mfpsn_fx import ConvertOptions, MeasureOptions, MulFreePSN
from mfpsn_fx.model import capture
from mfpsn_fx.passes import Autoselect, Example, PassContext


def quick(model, *x, **options):
    return mfpsn_fx.convert(model, *x, repeats=1, progress=False, kernels="shifted-add", **options)


def found(model):
    return {path: m for path, m in model.named_modules() if isinstance(m, MulFreePSN)}


OPTIONS = {
    "layout": st.sampled_from(["auto", "uniform", "keep", "time_first", "time_last"]),
    "kernels": st.sampled_from(["auto", "shifted-add", {"a.b": "conv2d"}]),
    "repeats": st.integers(1, 9),
    "budget_s": st.floats(0, 100),
    "progress": st.sampled_from([None, True, False]),
    "cache": st.booleans(),
    "verify": st.sampled_from([False, True, "eager", "compiled"]),
    "order": st.one_of(st.integers(1, 32), st.dictionaries(st.text("ab.", min_size=1), st.integers(1, 9))),
    "dilation": st.one_of(st.just("sawtooth"), st.integers(1, 9), st.lists(st.integers(1, 9), min_size=1)),
    "init": st.sampled_from(["source", "random"]),
    "strict": st.booleans(),
    "only": st.one_of(st.none(), st.sets(st.text("ab."))),
    "surrogate": st.sampled_from([None, mfpsn_fx.ATan(3.0), mfpsn_fx.Sigmoid(1.5)]),
    "gradient": st.sampled_from(["straight-through", "round-only", "none"]),
    "channel_dims": st.sampled_from([None, {"a": 3, "b": (2, 3), "c": -1}]),
    "fold_norms": st.booleans(),
    "eps": st.floats(1e-8, 1),
    "momentum": st.floats(0, 1),
    "min_exponent": st.integers(-126, 0),
    "max_exponent": st.integers(1, 127),
}


class TestValues:
    def test_the_test_knows_every_option(self):
        assert set(OPTIONS) | {"selection", "calibrate"} == {f.name for f in dataclasses.fields(ConvertOptions)}

    @given(st.fixed_dictionaries({}, optional=OPTIONS))
    def test_json_both_ways(self, chosen):
        options = ConvertOptions(**chosen)
        assert ConvertOptions.from_json(options.to_json()) == options

    def test_a_selection_goes_into_json(self, net, example):
        selection = mfpsn_fx.selection(quick(net, example))
        options = ConvertOptions.from_json(ConvertOptions(selection=selection).to_json())
        again = mfpsn_fx.convert(net, example, options=options, progress=False)
        assert [r.kernel for r in mfpsn_fx.selection(again).rows] == [r.kernel for r in selection.rows]

    def test_what_has_no_json(self):
        for name, value in (("calibrate", [torch.ones(1)]), ("only", lambda path, module: True)):
            with pytest.raises(ValueError, match=rf"{name}=\w+ has no JSON form"):
                ConvertOptions(**{name: value}).to_json()
        with pytest.raises(ValueError, match="no options written by to_json"):
            ConvertOptions.from_json("[]")
        with pytest.raises(TypeError, match="no option 'ordre'"):
            ConvertOptions.from_json('{"ordre": 3}')

    @pytest.mark.parametrize(
        ("name", "value", "error", "message"),
        [
            ("layout", "sideways", ValueError, "unknown layout 'sideways'"),
            ("kernels", "fast", ValueError, "unknown kernel 'fast'"),
            ("kernels", {"a": "fast"}, ValueError, "a: unknown kernel 'fast'"),
            ("kernels", 3, TypeError, "a name or a mapping"),
            ("repeats", 0, ValueError, "at least 1"),
            ("budget_s", -1, ValueError, "at least 0"),
            ("budget_s", float("nan"), ValueError, "at least 0"),
            ("cache", "yes", ValueError, "cache must be True or False"),
            ("progress", 1, ValueError, "progress must be"),
            ("verify", "fast", ValueError, "unknown verify"),
            ("order", 0, ValueError, "order must be"),
            ("order", {"a": 2.0}, ValueError, "order of a must be"),
            ("dilation", "saw", ValueError, "unknown dilation"),
            ("dilation", [], ValueError, "empty"),
            ("init", "zeros", ValueError, "unknown init"),
            ("calibrate", torch.ones(2), TypeError, "iterable of batches"),
            ("strict", None, ValueError, "strict must be"),
            ("only", "features.2", TypeError, "several paths"),
            ("surrogate", "atan", TypeError, "takes a Surrogate"),
            ("gradient", "ste", ValueError, "gradient 'ste'"),
            ("channel_dims", {"a": 0}, ValueError, "a: "),
            ("eps", 0.0, ValueError, "eps must be positive"),
            ("momentum", 1.5, ValueError, "momentum in"),
            ("min_exponent", -200, ValueError, "exponent bounds"),
        ],
    )
    def test_they_check_themselves(self, name, value, error, message):
        with pytest.raises(error, match=message):
            ConvertOptions(**{name: value})

    def test_frozen_and_replaced(self):
        options = MeasureOptions(repeats=3)
        with pytest.raises(dataclasses.FrozenInstanceError):
            options.repeats = 4
        assert options.replace(layout="time_first") == MeasureOptions(repeats=3, layout="time_first")
        with pytest.raises(TypeError, match=r"no option 'repeat'; the options are layout, kernels"):
            options.replace(repeat=4)

    @pytest.mark.parametrize(
        ("function", "kind"), [(mfpsn_fx.convert, ConvertOptions), (mfpsn_fx.plan, MeasureOptions)]
    )
    def test_functions_show_their_options(self, function, kind):
        parameters = inspect.signature(function).parameters
        for field in dataclasses.fields(kind):
            assert parameters[field.name].default == field.default
            assert field.metadata["doc"] in function.__doc__
            assert field.metadata["doc"] in kind.__doc__


class TestConvert:
    def test_by_name_comes_before_by_value(self, net, example):
        options = ConvertOptions(order=3, dilation=2, kernels="shifted-add", repeats=1, progress=False)
        converted = mfpsn_fx.convert(net, example, options=options, dilation=4)
        assert {(m.order, m.dilation) for m in found(converted).values()} == {(3, 4)}

    def test_options_are_no_example(self, net, example):
        with pytest.raises(TypeError, match="give ConvertOptions by keyword"):
            mfpsn_fx.convert(net, example, ConvertOptions())
        with pytest.raises(TypeError, match="no option 'ordre'"):
            mfpsn_fx.convert(net, example, ordre=3)
        with pytest.raises(TypeError, match="options takes ConvertOptions"):
            mfpsn_fx.convert(net, example, options={"order": 3})

    def test_settings_of_the_neurons(self, net, example):
        converted = quick(net, example, eps=1e-3, momentum=0.5, min_exponent=-4, max_exponent=2)
        for m in found(converted).values():
            assert (m.eps, m.momentum, m.min_exponent, m.max_exponent) == (1e-3, 0.5, -4, 2)
            taps = m.folded().taps
            assert set(taps[taps != 0].abs().log2().tolist()) <= set(range(-4, 3))

    def test_order_by_layer(self, net, example):
        converted = quick(net, example, order={"features.4": 5})
        assert {path: m.order for path, m in found(converted).items()} == {
            "features.2": 2, "features.4": 5, "features.7": 2,
        }  # fmt: skip
        with pytest.raises(ValueError, match=r"order names layers that are no neurons: \['features.3'\]"):
            quick(net, example, order={"features.3": 5})

    @pytest.mark.parametrize("example_given", [True, False])
    @pytest.mark.parametrize(
        "only", [["features.4"], lambda path, module: path.endswith("4"), lambda path, m: path == "features.4"]
    )
    def test_only_some_neurons(self, net, example, only, example_given):
        expected = net(example)
        for m in net.modules():
            if hasattr(m, "reset"):
                m.reset()
        converted = quick(net, *([example] if example_given else []), only=only)
        assert list(found(converted)) == ["features.4"]
        table = mfpsn_fx.selection(converted)
        assert [path for path, _ in table.unconverted] == ["features.2", "features.7"]
        assert all("left out by only=" in why for _, why in table.unconverted)
        assert converted(example).shape == expected.shape

    def test_only_must_name_neurons_and_leave_one(self, net, example):
        with pytest.raises(ValueError, match=r"only= names layers that are no neurons: \['features.1'\]"):
            quick(net, example, only=["features.1"])
        with pytest.raises(mfpsn_fx.ConversionError, match="no neuron of LifNet could be converted"):
            quick(net, example, only=[])

    def test_what_only_leaves_out_need_not_be_a_filter(self, net, example):
        class Odd(nn.Module):
            """A neuron by its looks that is no filter."""

            def __init__(self):
                super().__init__()
                self.v_threshold, self.v, self.step_mode = 1.0, 0.0, "m"

            def forward(self, x):
                return (x.sin() > 0).to(x)

        net.features[4] = Odd()
        converted = quick(net, example, only=["features.2", "features.7"])
        assert list(found(converted)) == ["features.2", "features.7"]


class TestPipelines:
    def test_one_pipeline_serves_any_network(self, net, example):
        pipeline = mfpsn_fx.conversion_pipeline(repeats=1, progress=False, kernels="shifted-add", order=3)
        other = nn.Sequential(nn.Linear(4, 5), type(net.features[2])(step_mode="m"))
        networks = [(net, example, 3, 3), (other, torch.randn(5, 2, 4), 1, 5), (type(net)(), example[:4], 3, 3)]
        for model, x, count, width in networks:
            gm = pipeline(capture(model)[0], PassContext(Example((x,))))
            assert len(found(gm)) == count
            assert {m.order for m in found(gm).values()} == {3}
            assert gm(x).shape[-1] == width

    def test_a_passes_own_options_come_before_the_contexts(self, net, example):
        asked = Autoselect(kernels="conv2d")
        assert asked.overrides == {"kernels": "conv2d"}
        gm = quick(net, example)
        context = PassContext(Example((example,)), MeasureOptions(repeats=1, progress=False, cache=False))
        pipeline = mfpsn_fx.planning_pipeline().replaced("autoselect", asked).without("plan_layout")
        pipeline(gm, context)
        kernels = {c.kernel for m in context.measurements.values() for c in m.candidates}
        assert kernels == {"conv2d", "vanilla-conv1d"}
        assert context.options.kernels == "auto"

    def test_nothing_is_left_in_the_graphs_meta(self, net, example):
        gm = quick(net, example)
        mfpsn_fx.plan(gm, example, repeats=1, progress=False, kernels="shifted-add")
        assert not [key for key in gm.meta if "mfpsn" in key]
        assert not [key for node in gm.graph.nodes for key in node.meta if "mfpsn" in key]


def test_every_options_docs_are_one_sentence_at_least():
    for field in dataclasses.fields(ConvertOptions):
        assert field.metadata["doc"].endswith((".", "all."))
    assert json.loads(ConvertOptions().to_json())["order"] == 2
