"""Capture makes no values of the example constants, and leaves the source unchanged."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from spikingjelly.activation_based import layer, neuron
from torch import fx, nn
from torch.nn import functional as F

import mfpsn_fx
from mfpsn_fx.model import capture


def targets(gm: fx.GraphModule) -> list[str]:
    return [node.target for node in gm.graph.nodes if node.op == "call_module"]


class DropPath(nn.Module):
    def forward(self, x):
        return x * 2 if self.training else x


class Functional(nn.Module):
    def forward(self, x):
        return F.dropout(x, 0.5, self.training)


class Branches(nn.Module):
    """Untraceable, since it branches on values. It has a neuron inside."""

    def __init__(self):
        super().__init__()
        self.lif = neuron.LIFNode(step_mode="m")

    def forward(self, x):
        return self.lif(x) if x.sum() > 0 else self.lif(-x)


class Around(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.before, self.inner, self.lif = nn.Linear(4, 3), inner, neuron.LIFNode(step_mode="m")

    def forward(self, x, scale: float = 2.0):
        return self.lif(self.inner(self.before(x)) * scale)


@pytest.mark.parametrize("inner", [DropPath, Functional])
def test_what_differs_between_modes_stays_a_leaf(inner):
    model = Around(inner())
    gm, reasons = capture(model)
    assert targets(gm) == ["before", "inner", "lif"]
    assert "differs between training and evaluation" in reasons["inner"]
    x = torch.randn(2, 3, 4)
    for mode in (True, False):
        model.train(mode)
        gm.train(mode)
        torch.manual_seed(1)
        expected = model.inner(x)
        torch.manual_seed(1)
        assert torch.equal(gm.inner(x), expected)


def test_what_cannot_be_traced_stays_a_leaf_with_its_neurons_swapped():
    model, x = Around(Branches()), torch.randn(5, 2, 4)
    gm, reasons = capture(model)
    assert targets(gm) == ["before", "inner", "lif"]
    assert "TraceError" in reasons["inner"]
    converted = mfpsn_fx.convert(model, x, repeats=1, progress=False)
    rows = {row.layer: row for row in mfpsn_fx.selection(converted).rows}
    assert list(rows) == ["inner.lif", "lif"]
    assert "inside a leaf" in rows["inner.lif"].notes
    assert rows["inner.lif"].forward_ms > 0
    assert rows["inner.lif"].layout == "time_first"
    assert [m.dilation for m in converted.modules() if isinstance(m, mfpsn_fx.MulFreePSN)] == [1, 2]
    converted(x).sum().backward()
    twin = copy.deepcopy(converted)
    assert mfpsn_fx.selection(twin) == mfpsn_fx.selection(converted)


def test_an_untraceable_root_is_one_leaf():
    model, x = Branches(), torch.randn(5, 2, 3)
    gm, reasons = capture(model)
    assert targets(gm) == ["model"]
    assert list(reasons) == [""]
    converted = mfpsn_fx.convert(model, x, repeats=1, progress=False)
    assert [row.layer for row in mfpsn_fx.selection(converted).rows] == ["model.lif"]
    assert converted(x).shape == x.shape
    assert type(model.lif) is neuron.LIFNode


def test_hooks_run_as_before():
    model = Around(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)))
    seen = []
    model.inner.register_forward_hook(lambda m, args, out: seen.append(out.shape))
    gm, reasons = capture(model)
    assert reasons == {"inner": "has hooks or a forward of its own"}
    gm(torch.randn(2, 3, 4))
    assert seen == [(2, 3, 3)]


def test_defaults_and_keywords_stay_arguments():
    model = Around(nn.Identity())
    gm, _ = capture(model)
    x = torch.randn(3, 2, 4)
    converted = mfpsn_fx.convert(model, x, example_kwargs={"scale": 3.0}, repeats=1, progress=False)
    assert torch.equal(converted.eval()(x), converted(x, scale=2.0))
    assert [n.target for n in gm.graph.nodes if n.op == "placeholder"] == ["x", "scale"]
    with pytest.raises(TypeError, match="missing a required argument: 'x'"):
        mfpsn_fx.convert(model, example_kwargs={"scale": 3.0}, repeats=1, progress=False)
    with pytest.raises(TypeError, match="unexpected keyword argument 'nonsense'"):
        mfpsn_fx.convert(model, x, example_kwargs={"nonsense": 3.0}, repeats=1, progress=False)


def test_modes_parameters_and_random_state_are_left_alone():
    class Draws(Around):
        def forward(self, x):
            return super().forward(x) + torch.rand(1)

    model = Draws(nn.Identity())
    model.before.eval()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    gm, _ = capture(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert not model.before.training
    assert not gm.before.training
    assert gm.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_tensor_constants_survive():
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.lif = neuron.LIFNode(step_mode="m")
            self.shift = torch.arange(3.0)

        def forward(self, x):
            return self.lif(x + self.shift + torch.tensor([1.0, 2.0, 3.0]))

    model = Constant()
    gm, reasons = capture(model)
    assert reasons == {}
    x = torch.randn(2, 2, 3)
    from spikingjelly.activation_based import functional

    expected = model(x)
    functional.reset_net(model)
    assert torch.equal(gm(x), expected)


def test_step_mode_layers_are_leaves():
    model = nn.Sequential(layer.Conv2d(1, 2, 3, step_mode="m"), layer.SeqToANNContainer(nn.Conv2d(2, 2, 1)),
                          neuron.IFNode(step_mode="m"))  # fmt: skip
    gm, reasons = capture(model)
    assert targets(gm) == ["0", "1", "2"]
    assert reasons == {}


def test_writes_in_place_are_captured_as_such():
    """FX's own tracer records ``x += y`` as ``x + y``, which does not change views of ``x``."""

    class Writes(nn.Module):
        def forward(self, x):
            y = x * 2
            view, count = y.transpose(0, 1), x.shape[0]
            y += 1
            count += 2
            y -= count
            y **= 2
            y //= 3
            return view + y.transpose(0, 1)

    model, x = Writes(), torch.randn(3, 4)
    gm = capture(model)[0]
    assert torch.equal(gm(x), model(x))
    assert torch.equal(pickle.loads(pickle.dumps(gm))(x), model(x))


def test_shifts_in_place_are_captured_as_such():
    class Writes(nn.Module):
        def forward(self, x):
            y = x + 1
            view = y.transpose(0, 1)
            y <<= 2
            y >>= 1
            return view

    model, x = Writes(), torch.arange(12).reshape(3, 4)
    gm = capture(model)[0]
    assert torch.equal(gm(x), model(x))
    assert torch.equal(gm(x), (2 * (x + 1)).T)
