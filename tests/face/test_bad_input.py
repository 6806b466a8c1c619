"""Each wrong thing gives one clear error, or defined behavior."""

from __future__ import annotations

import pytest
import torch
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn

import mfpsn_fx
from mfpsn_fx import ConversionError, MulFreePSN


def quick(model, *example, **options):
    return mfpsn_fx.convert(model, *example, repeats=1, progress=False, **options)


def test_non_module():
    with pytest.raises(TypeError, match=r"convert takes a torch.nn.Module, found function"):
        mfpsn_fx.convert(lambda x: x)


def test_no_neurons():
    with pytest.raises(ValueError, match=r"no spiking neuron found in Sequential; .*register_source"):
        mfpsn_fx.convert(nn.Sequential(nn.Linear(2, 2)))


class Recurrent(neuron.LIFNode):
    """A subclass, which may do anything."""


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Recurrent(step_mode="m"), "a subclass of a known neuron may behave otherwise"),
        (lambda: neuron.EIFNode(step_mode="m"), "its membrane is exponential"),
        (lambda: neuron.QIFNode(step_mode="m"), "its membrane is quadratic"),
    ],
)
def test_neurons_that_are_no_filters(net, example, make, reason):
    net.features[4] = make()
    with pytest.raises(ConversionError, match=rf"(?s)1 of 3 neurons cannot be converted:\n  features\.4: .*{reason}"):
        quick(net, example)
    converted = quick(net, example, strict=False)
    table = mfpsn_fx.selection(converted)
    assert [row.layer for row in table.rows] == ["features.2", "features.7"]
    assert [path for path, _ in table.unconverted] == ["features.4"]
    assert reason in table.unconverted[0][1]
    assert "not converted: features.4" in table.table()
    assert mfpsn_fx.Selection.from_json(table.to_json()) == table
    converted(example)


def test_nothing_can_be_converted(example):
    with pytest.raises(ConversionError, match="no neuron of Sequential could be converted"):
        quick(nn.Sequential(neuron.EIFNode(step_mode="m")), example, strict=False)


def test_step_by_step_mode(net, example):
    functional.set_step_mode(net, "s")
    with pytest.raises(ConversionError, match=r"features\.2: it is in single-step mode.*set_step_mode\(net, 'm'\)"):
        mfpsn_fx.convert(net)


def test_rank_without_channels():
    model = nn.Sequential(neuron.LIFNode(step_mode="m"))
    with pytest.raises(ConversionError, match=r"0: its input has shape \(4, 3\), .*\(T, N, C, \*\)"):
        quick(model, torch.randn(4, 3))
    with pytest.raises(ConversionError, match=r"0: its number of channels is not known from the graph"):
        mfpsn_fx.convert(model)


def test_wrong_rank_and_channels_at_run_time(net, example):
    converted = quick(net, example)
    first = converted.get_submodule("features.2")
    with pytest.raises(ValueError, match=r"features\.2: the input must have at least 3 dims"):
        first(torch.randn(4, 3))
    with pytest.raises(ValueError, match=r"features\.2: expected 4 channels in dim 2"):
        first(torch.randn(6, 5, 3, 8))
    with pytest.raises(TypeError, match=r"features\.2: the input must be floating point"):
        first(torch.ones(6, 5, 4, 8, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"features\.2: expected more than 1 value per channel"):
        first(torch.randn(1, 1, 4))


def test_fewer_steps_than_the_dilation_reaches(net):
    """Allowed, and right: the taps read zeros."""
    x = torch.randn(2, 5, 1, 8)
    converted = quick(net, x, order=4, dilation=9)
    shorter = quick(net, x, order=1, dilation=1)
    for longer, short in zip(converted.modules(), shorter.modules(), strict=True):
        if isinstance(longer, MulFreePSN):
            with torch.no_grad():
                short.weight.copy_(longer.weight[:, -1:])
                for name in ("gamma", "beta", "running_mean", "running_var"):
                    getattr(short, name).copy_(getattr(longer, name))
    assert torch.equal(converted.eval()(x), shorter.eval()(x))


@pytest.mark.parametrize("shape", [(6, 0, 1, 8), (0, 5, 1, 8)])
def test_empty(net, example, shape):
    with pytest.raises(ValueError, match="the example is empty"):
        quick(net, torch.zeros(shape))
    sn = MulFreePSN(3)
    assert sn.eval()(torch.zeros(0, 2, 3)).shape == (0, 2, 3)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        sn.train()(torch.zeros(0, 2, 3))


def test_nan_weights(net, example):
    net.features[3].weight.data[0] = float("nan")
    with pytest.raises(ValueError, match=r"features\.3\.weight: the weights contain NaN"):
        quick(net, example)


def test_nan_in_a_neuron(net, example):
    net.features[2] = neuron.ParametricLIFNode(step_mode="m")
    net.features[2].w.data.fill_(float("inf"))
    with pytest.raises(ConversionError, match=r"features\.2: w of its ParametricLIFNode is NaN or infinite"):
        quick(net, example)


def test_integer_example():
    model = nn.Sequential(neuron.LIFNode(step_mode="m"))
    with pytest.raises(ConversionError, match=r"0: its input is torch.int64, but a floating-point tensor is needed"):
        quick(model, torch.ones(4, 2, 3, dtype=torch.int64))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "sideways"}, "unknown layout 'sideways'"),
        ({"kernels": "fastest"}, "unknown kernel 'fastest'"),
        ({"kernels": {"features.2": "fastest"}}, "features.2: unknown kernel 'fastest'"),
        ({"kernels": {"features.3": "shifted-add"}}, r"no neurons: \['features.3'\]; the neurons are \['features.2'"),
        ({"dilation": "triangle"}, "unknown dilation 'triangle'"),
        ({"dilation": 0}, "dilation must be an integer of at least 1, found 0"),
        ({"dilation": [1, -1]}, "dilation must be an integer of at least 1, found -1"),
        ({"dilation": []}, "sequence of dilations is empty"),
        ({"dilation": 1.5}, "unknown dilation 1.5"),
        ({"order": 0}, "order must be an integer of at least 1, found 0"),
        ({"order": 2.0}, "order must be an integer"),
        ({"init": "zero"}, "unknown init 'zero'"),
        ({"gradient": "guess"}, "unknown quantizer gradient"),
        (
            {"layout": "time_first", "kernels": "conv2d"},
            r"(?s)features\.2: no kernel can serve.*conv2d.*serves time_last",
        ),
    ],
)
def test_options(net, example, options, message):
    with pytest.raises(ValueError, match=message):
        quick(net, example, **options)


def test_repeats(net, example):
    with pytest.raises(ValueError, match="repeats must be an integer of at least 1"):
        mfpsn_fx.convert(net, example, repeats=0)


def test_forced_kernel_without_example(net):
    with pytest.raises(
        ValueError, match=r"(?s)features\.2: kernel 'conv2d' serves time_last, not time_first.*features\.7"
    ):
        mfpsn_fx.convert(net, kernels="conv2d")
    with pytest.raises(ValueError, match="layout='time_last' needs an example"):
        mfpsn_fx.convert(net, layout="time_last")


class Chooses(nn.Module):
    def __init__(self):
        super().__init__()
        self.calm, self.wild = neuron.LIFNode(step_mode="m"), neuron.LIFNode(step_mode="m")

    def forward(self, x):
        return self.calm(x) if x.max() < 10 else self.wild(x)


def test_example_that_misses_a_neuron(example):
    with pytest.raises(ConversionError, match=r"model\.wild: the example does not reach it"):
        quick(Chooses(), example)
    assert [r.layer for r in mfpsn_fx.selection(quick(Chooses(), example, strict=False)).rows] == ["model.calm"]


def test_a_neuron_that_nothing_calls_is_no_part_of_the_graph(net, example):
    net.unused = neuron.LIFNode(step_mode="m")
    assert len(mfpsn_fx.selection(quick(net, example)).rows) == 3


def test_plan_and_selection_want_a_converted_network(net, example):
    for function in (mfpsn_fx.plan, lambda m, *a: mfpsn_fx.selection(m)):
        with pytest.raises(TypeError, match=r"LifNet is not a network that mfpsn_fx.convert returned"):
            function(net, example)
    with pytest.raises(ValueError, match="plan needs an example"):
        mfpsn_fx.plan(mfpsn_fx.convert(net))


def test_a_model_that_cannot_be_copied(net, example):
    net.features[4].held = (x for x in ())
    with pytest.raises(ValueError, match=r"LifNet cannot be copied with copy.deepcopy"):
        quick(net, example)


@pytest.mark.parametrize(
    "arguments",
    [{"channels": 0}, {"channels": 2.0}, {"channels": 2, "order": 0}, {"channels": 2, "dilation": True},
     {"channels": 2, "eps": 0.0}, {"channels": 2, "momentum": 2.0}, {"channels": 2, "gradient": "x"},
     {"channels": 2, "layout": "x"}, {"channels": 2, "min_exponent": 1, "max_exponent": 0}],
)  # fmt: skip
def test_module_arguments(arguments):
    with pytest.raises(ValueError):
        MulFreePSN(**arguments)


def test_layer_in_user_terms():
    """Containers of layers keep working: names in errors are the model's own."""
    model = nn.Sequential(nn.Sequential(layer.Linear(3, 2, step_mode="m"), neuron.IFNode(step_mode="m")))
    converted = quick(model, torch.randn(4, 2, 3))
    assert mfpsn_fx.selection(converted).rows[0].layer == "0.1"
