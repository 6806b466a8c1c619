"""What a conversion remembers, and what it leaves untouched."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from spikingjelly.activation_based import functional, layer, neuron
from torch import fx, nn

import mfpsn_fx
from mfpsn_fx import Backend, MulFreePSN
from mfpsn_fx.model.results import Plan, record_of
from mfpsn_fx.passes import ApplyPlan, Canonicalize, Example, PassContext, Pipeline, apply, fused_norms, neurons

OPTIONS = {"kernels": "shifted-add", "repeats": 1, "progress": False}


class Normed(nn.Sequential):
    """(6, 5, 4, 8): as many channels as samples, so that a wrong layout raises nothing."""

    def __init__(self):
        super().__init__(
            layer.Conv1d(4, 5, 3, padding=1), layer.BatchNorm1d(5), neuron.LIFNode(),
            layer.Conv1d(5, 5, 3, padding=1), neuron.LIFNode(),
        )  # fmt: skip
        functional.set_step_mode(self, "m")


@pytest.fixture
def x():
    return torch.randn(6, 5, 4, 8)


COPIES = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda gm: pickle.loads(pickle.dumps(gm)),
    "deepcopy of a pickle": lambda gm: copy.deepcopy(pickle.loads(pickle.dumps(gm))),
    "transform": lambda gm: fx.Transformer(gm).transform(),
    "graph module": lambda gm: fx.GraphModule(gm, gm.graph),
}


@pytest.mark.parametrize("how", COPIES)
def test_the_record_goes_along(net, example, how):
    gm = mfpsn_fx.convert(net, example, only=["features.2", "features.7"], **OPTIONS)
    again = COPIES[how](gm)
    assert record_of(again).measured.keys() == {"features.2", "features.7"}
    assert mfpsn_fx.selection(again) == mfpsn_fx.selection(gm)
    assert "left out" in mfpsn_fx.selection(again).unconverted[0][1]


@pytest.mark.parametrize("layout", ["time_first", "time_last"])
def test_a_loaded_network_is_planned_anew(x, layout):
    gm = mfpsn_fx.convert(Normed(), x, layout=layout, **OPTIONS).eval()
    assert fused_norms(gm)
    file = io.BytesIO()
    torch.save(gm, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    expected = gm(x)
    for other in ("time_first", "time_last", layout):
        mfpsn_fx.plan(again, x, layout=other, **OPTIONS)
        assert {str(n.layout) for n in neurons(again)} == {other}
        torch.testing.assert_close(again(x), expected)
        assert len(fused_norms(again)) == 1


class Writing(nn.Module):
    """Its forward writes into its own parameters, in three ways."""

    def __init__(self):
        super().__init__()
        self.weight, self.scale = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(()))
        self.table = nn.Embedding(3, 4, max_norm=0.1)
        self.lif = neuron.LIFNode(step_mode="m")

    def forward(self, x):
        if float(x.detach().abs().max()) > 1e9:  # asks for values: it runs as it is written
            return x
        self.weight.data.mul_(0.9)
        with torch.no_grad():
            self.scale.fill_(2)
        return self.lif(x * self.weight[:, None] * self.scale + self.table(torch.zeros(1, dtype=torch.long))[..., None])


@pytest.mark.parametrize("options", [{}, {"verify": "eager"}], ids=["plain", "verify"])
@pytest.mark.parametrize("inplace", [False, True])
def test_trials_do_not_write_into_the_weights(x, options, inplace):
    net = Writing()
    before = {name: p.clone() for name, p in net.named_parameters()}
    gm = mfpsn_fx.convert(net, x, inplace=inplace, **OPTIONS, **options)
    mfpsn_fx.plan(gm, x, **OPTIONS, **options)
    found = dict(gm.named_parameters())
    for name, p in before.items():
        (ours,) = (q for other, q in found.items() if other.removeprefix("model.") == name)
        assert torch.equal(ours, p), name
        assert torch.equal(dict(net.named_parameters())[name], p), name


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_plan_that_fails_leaves_the_one_before(x, error, monkeypatch):
    from mfpsn_fx.passes.planning import measure_neurons

    gm = mfpsn_fx.convert(Normed(), x, layout="time_last", **OPTIONS).eval()
    expected, code, table = gm(x), gm.code, mfpsn_fx.selection(gm)

    def broken(*args, **options):
        raise error("no")

    monkeypatch.setattr(measure_neurons, "run_races", broken)
    with pytest.raises(error):
        mfpsn_fx.plan(gm, x, layout="time_first", **OPTIONS)
    assert gm.code == code
    assert mfpsn_fx.selection(gm) == table
    assert torch.equal(gm(x), expected)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.sn = neuron.LIFNode(step_mode="m")

    def forward(self, x):
        return self.sn(self.b(self.sn(self.a(x))))


def test_options_by_layer_hold_for_further_uses():
    x = torch.randn(5, 2, 4)
    gm = mfpsn_fx.convert(Twice(), x, order={"sn": 4}, **OPTIONS)
    assert {n.name: n.order for n in neurons(gm)} == {"sn": 4, "sn@2": 4}
    gm = mfpsn_fx.convert(Twice(), x, order={"sn": 4}, only=["sn"], **OPTIONS)
    assert [n.name for n in neurons(gm)] == ["sn", "sn@2"]
    gm = mfpsn_fx.convert(Twice(), x, only=["sn@2"], **OPTIONS)
    assert [n.name for n in neurons(gm)] == ["sn@2"]


def test_only_is_asked_of_the_users_own_neurons():
    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.lif = nn.Linear(4, 3), neuron.LIFNode(step_mode="s")

        def forward(self, x):
            return torch.stack([self.lif(self.fc(x_t)) for x_t in x])

    asked = []
    gm = mfpsn_fx.convert(
        Loop(), torch.randn(5, 2, 4), only=lambda path, m: asked.append(type(m)) or isinstance(m, neuron.LIFNode),
        **OPTIONS,
    )  # fmt: skip
    assert set(asked) == {neuron.LIFNode}
    assert any(isinstance(m, MulFreePSN) for m in gm.modules())


def test_a_plan_is_checked_before_it_is_written(x):
    gm = mfpsn_fx.convert(Normed(), x, layout="time_first", **OPTIONS)
    code = gm.code
    bad = Plan({}, {"2": ("nonsense", "nonsense"), "4": ("conv2d", "conv2d"), "9": ("", "")})
    with pytest.raises(ValueError, match=r"(?s)2: unknown kernel 'nonsense'.*4: kernel 'conv2d' .*9: there is no such"):
        apply(bad, gm)
    assert gm.code == code
    record = record_of(gm)
    assert apply(record.plan, gm) == []


def test_norms_stay_as_they_are_where_a_pipeline_of_ones_own_plans(x):
    plain = mfpsn_fx.convert(Normed(), x, fold_norms=False, **OPTIONS)
    fused = mfpsn_fx.convert(Normed(), x, **OPTIONS)
    passes = [*mfpsn_fx.planning_pipeline()]
    assert isinstance(passes[0], Canonicalize)
    assert isinstance(passes[-1], ApplyPlan)
    options = mfpsn_fx.MeasureOptions(**OPTIONS)
    for gm, count in ((plain, 0), (fused, 1)):
        Pipeline([Pipeline(passes, given=("neurons",))], given=("neurons",))(gm, PassContext(Example((x,)), options))
        assert len(fused_norms(gm)) == count
        assert record_of(gm).measured.keys() == {"2", "4"}


def test_backends_with_mappings_hash():
    one = Backend(passes=mfpsn_fx.planning_pipeline(kernels={"lif": "shifted-add"}))
    assert hash(one) == hash(copy.copy(one))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn, torch.float32, torch.int8])
def test_nan_is_found_in_any_dtype(dtype):
    net = nn.Sequential(nn.Linear(4, 4), neuron.LIFNode(step_mode="m"))
    value = torch.zeros(3).to(dtype)
    net[0].extra = nn.Parameter(value, requires_grad=False)
    mfpsn_fx.convert(net, torch.randn(5, 2, 4), **OPTIONS)
    if dtype is torch.int8:
        return
    net[0].extra.data = torch.tensor([0, float("nan"), 1]).to(dtype)
    with pytest.raises(ValueError, match=r"0\.extra: the weights contain NaN"):
        mfpsn_fx.convert(net, torch.randn(5, 2, 4), **OPTIONS)
