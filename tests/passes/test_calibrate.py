"""Simulated source neurons, and neurons that are fitted to them."""

from __future__ import annotations

import copy
import json
import logging
import pickle

import pytest
import snntorch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import nn

import mfpsn_fx
from mfpsn_fx import Batch, Geometric, MulFreePSN, SourceNeuron, Taps
from mfpsn_fx.model.response import TwoPole
from mfpsn_fx.model.sources.description import describe
from mfpsn_fx.model.sources.simulate import SimulatedNeuron, charging, simulate
from mfpsn_fx.passes import Calibrate, Pipeline, conversion_nodes
from mfpsn_fx.passes.fit_taps import Moments, Tail, filtered, fit_taps

STEPS = 12
ONE = torch.ones((), dtype=torch.float64)


def quick(model, *example, **options):
    options = {"kernels": "shifted-add", "layout": "time_first", **options}
    return mfpsn_fx.convert(model, *example, repeats=1, progress=False, **options)


def stepped(m, x):
    """Spikes and membranes of an snnTorch neuron, its own loop."""
    state, spikes, membranes = m.reset_mem(), [], []
    state = state if isinstance(state, tuple) else (state,)
    for step in x:
        spike, *state = m(step, *state)
        spikes.append(spike)
        membranes.append(state[-1])
    return torch.stack(membranes), torch.stack(spikes)


class TestSimulate:
    @pytest.mark.parametrize("v_reset", [None, 0.0, -0.5, 0.3])
    @pytest.mark.parametrize("kind", ["IF", "LIF", "LIF, input not decaying", "PLIF"])
    def test_spikingjelly(self, kind, v_reset):
        common = {"v_reset": v_reset, "v_threshold": 0.7, "step_mode": "m", "store_v_seq": True}
        m = {
            "IF": lambda: neuron.IFNode(**common),
            "LIF": lambda: neuron.LIFNode(tau=3.0, **common),
            "LIF, input not decaying": lambda: neuron.LIFNode(tau=1.5, decay_input=False, **common),
            "PLIF": lambda: neuron.ParametricLIFNode(init_tau=1.7, **common).double(),
        }[kind]()
        x = 1.5 * torch.randn(STEPS, 3, 4, 2, dtype=torch.float64) + (1.0 if kind in ("LIF", "PLIF") else 0.1)
        expected = m(x).detach()
        h, spikes = simulate(describe(m), x)
        assert 0.05 < expected.mean() < 0.8
        assert torch.equal(spikes, expected)
        # V after the reset is H where it did not fire
        silent = expected == 0
        torch.testing.assert_close(h[silent] + (v_reset or 0.0), m.v_seq.detach()[silent].double())

    @pytest.mark.parametrize(
        ("mechanism", "reset"), [("subtract", "late-subtract"), ("zero", "zero"), ("none", "none")]
    )
    def test_snntorch_leaky(self, mechanism, reset):
        m = snntorch.Leaky(beta=torch.tensor([0.6, 0.9, 0.8]), threshold=0.7, reset_mechanism=mechanism).double()
        x = torch.randn(STEPS, 4, 3, dtype=torch.float64)
        source = SourceNeuron("Leaky", Geometric(ONE, m.beta), m.threshold, strict=True, reset=reset)
        membrane, expected = stepped(m, x)
        h, spikes = simulate(source, x)
        assert torch.equal(spikes, expected)
        assert 0.05 < expected.mean() < 0.8
        torch.testing.assert_close(h, membrane)

    @pytest.mark.parametrize("mechanism", ["subtract", "zero"])
    def test_snntorch_synaptic(self, mechanism):
        m = snntorch.Synaptic(alpha=0.6, beta=0.8, threshold=0.7, reset_mechanism=mechanism).double()
        x = torch.randn(STEPS, 4, 3, dtype=torch.float64)
        source = SourceNeuron(
            "Synaptic", TwoPole(ONE, m.alpha, m.beta), m.threshold, strict=True, reset=f"late-{mechanism}"
        )
        membrane, expected = stepped(m, x)
        h, spikes = simulate(source, x)
        assert torch.equal(spikes, expected)
        torch.testing.assert_close(h, membrane)

    def test_strict_at_equality(self):
        x = torch.tensor([0.5, 1.0, 1.5]).reshape(1, 1, 3)
        for strict, wanted in ((False, [0, 1, 1]), (True, [0, 0, 1])):
            source = SourceNeuron("IF", Geometric(ONE, ONE), ONE, strict=strict, reset="zero")
            assert simulate(source, x)[1].flatten().tolist() == wanted

    @pytest.mark.parametrize(
        "response",
        [Geometric(ONE * 0.5, torch.tensor([0.5, 0.9])), TwoPole(ONE, ONE * 0.3, torch.tensor([0.5, 0.9]), delay=1),
         Taps(torch.randn(2, 5))],
        ids=["geometric", "two-pole", "taps"],
    )  # fmt: skip
    def test_without_reset_it_is_the_filter(self, response):
        x = torch.randn(STEPS, 3, 2, dtype=torch.float64)
        h, _ = simulate(SourceNeuron("any", response, ONE), x)
        taps = response(torch.arange(STEPS))
        wanted = torch.stack([sum(taps[:, j] * x[t - j] for j in range(t + 1)) for t in range(STEPS)])
        torch.testing.assert_close(h, wanted)

    def test_delayed_current(self):
        """Norse's order: the membrane reads the current of the step before."""
        x = torch.randn(STEPS, 2, 3, dtype=torch.float64)
        source = SourceNeuron("delayed", TwoPole(ONE * 0.4, ONE * 0.7, ONE * 0.9, delay=1), ONE * 0.3, reset="zero")
        v = i = torch.zeros_like(x[0])
        wanted = []
        for step in x:
            v = 0.9 * v + 0.4 * i
            i = 0.7 * i + step
            wanted.append((v >= 0.3).double())
            v = v * (1 - wanted[-1])
        assert torch.equal(simulate(source, x)[1], torch.stack(wanted))

    def test_what_it_cannot_do(self):
        x = torch.randn(3, 2, 2)
        with pytest.raises(ValueError, match=r"Odd: its response Taps has no recursion that its reset 'zero'"):
            simulate(SourceNeuron("Odd", Taps(ONE[None]), ONE, reset="zero"), x)
        with pytest.raises(ValueError, match="Odd: unknown reset 'later'"):
            simulate(SourceNeuron("Odd", Geometric(ONE, ONE), ONE, reset="later"), x)
        assert charging(object(), x[0]) is None
        assert simulate(SourceNeuron("IF", Geometric(ONE, ONE), ONE, reset="zero"), x[:0])[1].shape == (0, 2, 2)

    def test_in_a_network(self):
        """Either layout, and steps that a mask excludes."""
        x, mask = torch.randn(STEPS, 3, 2, 4), torch.rand(STEPS, 3) > 0.3
        m = SimulatedNeuron(SourceNeuron("IF", Geometric(ONE, ONE), ONE, reset="subtract"))
        first = m(x, mask, kernel="shifted-add")
        last = m(x.movedim(0, -1), mask, layout="time_last")
        assert torch.equal(first, last.movedim(-1, 0))
        assert first[~mask].sum() == 0
        assert torch.equal(first, m(x.masked_fill(~mask[..., None, None], float("nan")), mask))


class TestFit:
    def moments(self, x, target, order, dilation, mask=None):
        found = Moments(x.shape[2], order, dilation, x.device)
        half = x.shape[1] // 2
        for part in (slice(0, half), slice(half, None)):
            m = None if mask is None else mask[:, part]
            found.add(x[:, part], target[:, part], (target[:, part] > 0).to(x), m)
        return found

    @settings(max_examples=20, deadline=None)
    @given(order=st.integers(1, 4), dilation=st.integers(1, 3), seed=st.integers(0, 1000))
    def test_powers_of_two_are_found(self, order, dilation, seed):
        """If the target is a filter with powers of two, scaled and shifted, its taps come out and R² is 1."""
        torch.manual_seed(seed)
        x = torch.randn(20, 8, 3, 2, dtype=torch.float64)
        taps = torch.exp2(torch.randint(-3, 2, (3, order)).double()) * torch.sign(torch.randn(3, order).double())
        target = 1.3 * filtered(x, taps, dilation) + 0.7
        fit = fit_taps(self.moments(x, target, order, dilation), torch.full_like(taps, 0.25))
        torch.testing.assert_close(fit.taps / fit.taps[:, :1], taps / taps[:, :1])
        torch.testing.assert_close(fit.r2, torch.ones_like(fit.r2))
        assert (fit.slope.log2().abs() <= 0.5 + 1e-9).all()
        torch.testing.assert_close(fit.offset, torch.full_like(fit.offset, 0.7))
        u = filtered(x, fit.taps, dilation)
        torch.testing.assert_close(fit.mean, u.mean((0, 1, 3)))
        torch.testing.assert_close(fit.var, u.var((0, 1, 3), correction=0))
        assert (fit.least <= u.amin((0, 1, 3))).all()
        assert (fit.most >= u.amax((0, 1, 3))).all()

    def test_no_quantized_taps_correlate_better(self):
        """Two taps: against every pair of exponents within four octaves."""
        x = torch.randn(30, 20, 4, dtype=torch.float64)
        target = simulate(SourceNeuron("LIF", Geometric(ONE * 0.3, ONE * 0.7), ONE * 0.5, reset="zero"), x)[0]
        fit = fit_taps(self.moments(x, target, 2, 1), torch.full((4, 2), 0.5, dtype=torch.float64))
        for sign in (1, -1):
            for octave in range(-4, 5):
                other = torch.tensor([sign * 2.0**octave, 1.0]).expand(4, 2)
                u, y = filtered(x, other, 1), target
                for c in range(4):
                    r = torch.corrcoef(torch.stack([u[:, :, c].flatten(), y[:, :, c].flatten()]))[0, 1]
                    assert fit.r2[c] >= r.clamp(min=0).square() - 1e-3

    def test_masked_steps_do_not_count(self):
        x, target, mask = torch.randn(9, 6, 2), torch.randn(9, 6, 2), torch.rand(9, 6) > 0.4
        x = x * mask[..., None]
        fit = fit_taps(self.moments(x, target, 2, 1, mask), torch.full((2, 2), 0.5))
        other = fit_taps(
            self.moments(x, target.masked_fill(~mask[..., None], 9.0), 2, 1, mask), torch.full((2, 2), 0.5)
        )
        assert torch.equal(fit.taps, other.taps)
        u = filtered(x, fit.taps, 1)[mask]
        torch.testing.assert_close(fit.mean, u.double().mean(0))
        tail = Tail(fit.least, fit.most)
        tail.add(filtered(x, fit.taps, 1), mask)
        assert tail.counts.sum() == 2 * mask.sum()

    def test_data_that_determine_nothing(self):
        """A channel whose inputs are zeros, and one whose target is constant, keep the source's taps."""
        x = torch.randn(9, 6, 2)
        x[:, :, 0] = 0
        target = torch.randn(9, 6, 2)
        target[:, :, 1] = 3.0
        start = torch.tensor([[0.25, 0.5], [0.125, 0.3]])
        fit = fit_taps(self.moments(x, target, 2, 1), start)
        assert torch.equal(fit.taps[0], start[0].double())
        assert torch.equal(fit.taps[1], torch.tensor([0.125, 0.25]).double())
        assert torch.isfinite(fit.slope).all()
        assert fit.r2[0] == 0

    @pytest.mark.parametrize("kind", ["normal", "spikes"])
    def test_rates_are_matched(self, kind):
        u = torch.randn(50, 40, 3)
        if kind == "spikes":
            u = (u > 0.5).float() + 0.5 * (torch.randn_like(u) > 0).float()
        tail = Tail(u.amin((0, 1)).double(), u.amax((0, 1)).double())
        tail.add(u[:, :20], None)
        tail.add(u[:, 20:], None)
        wish = torch.tensor([0.3, 0.6, 1.2]).double()
        for rate in (0.0, 0.1, 0.5, 1.0):
            theta = tail.threshold(torch.full((3,), rate).double(), wish)
            reached = (u >= theta.float()).double().mean((0, 1))
            levels = torch.cat([u.unique(), u.max()[None] + 1])
            if kind == "spikes":  # as near as the few values allow
                best = torch.stack([((u >= v).double().mean((0, 1)) - rate).abs() for v in levels]).amin(0)
            else:
                best = torch.full((3,), 2e-3).double()
            assert ((reached - rate).abs() <= best + 1e-9).all()


class LifNet(nn.Module):
    """(T, N, 1, 8) → (N, 3), three layers of neurons."""

    def __init__(self, make) -> None:
        super().__init__()
        self.features = nn.Sequential(
            layer.Conv1d(1, 4, 3, padding=1), nn.Identity(), make(), layer.Conv1d(4, 4, 3, padding=1), make(),
            layer.Flatten(), layer.Linear(32, 6), make(),
        )  # fmt: skip
        self.head = layer.Linear(6, 3)
        functional.set_step_mode(self, "m")

    def forward(self, x):
        return self.head(self.features(x)).mean(0)


@pytest.fixture
def hot(net):
    """The network with neurons that fire and an untrained norm."""
    with torch.no_grad():
        for p in net.parameters():
            if p.ndim > 1:
                p.mul_(2)
    for m in net.modules():
        if isinstance(m, neuron.LIFNode):
            m.v_threshold = 0.3
    return net.eval()


def data(count=3, n=16):
    return [torch.randn(6, n, 1, 8) for _ in range(count)]


@pytest.mark.parametrize("drive", ["source", "own"])
def test_rates_match_and_more_spikes_agree(drive):
    """Integrators that spikes lower by their threshold: without the reset they would hardly ever stop firing."""
    net = LifNet(lambda: neuron.IFNode(v_reset=None, v_threshold=0.5)).eval()
    batches = data(4, 32)
    converted = quick(net, batches[0], order=4)
    taken = mfpsn_fx.calibrate(converted, batches, drive=drive, progress=False)
    assert list(taken.layers) == ["features.2", "features.4", "features.7"]
    for row in taken.layers.values():
        assert 0.01 < row.source_rate < 0.9
        assert row.steps > 0
        assert row.spikes_after > row.spikes_before
        assert abs(row.rate_after - row.source_rate) < (0.01 if drive == "source" else 0.1)
        assert abs(row.rate_after - row.source_rate) < abs(row.rate_before - row.source_rate)
    first = taken.layers["features.2"]
    assert first.agreement_after > 0.8


def test_more_spikes_than_the_source(hot):
    batches = data(4, 32)
    taken = mfpsn_fx.calibrate(quick(hot, batches[0]), batches, rate=1.5, progress=False)
    for row in taken.layers.values():
        assert row.rate_after / row.source_rate == pytest.approx(1.5, rel=0.1)


def test_the_source_is_the_source(hot):
    """Rates of the simulated source are those of SpikingJelly's own neurons."""
    batches = data(2)
    taken = mfpsn_fx.calibrate(quick(hot, batches[0]), batches, progress=False)
    fired: dict[str, list] = {}
    for path, m in hot.named_modules():
        if isinstance(m, neuron.LIFNode):
            m.register_forward_hook(lambda m, a, out, path=path: fired.setdefault(path, []).append(out.detach().mean()))
    for x in batches:
        functional.reset_net(hot)
        hot(x)
    for path, row in taken.layers.items():
        assert float(torch.stack(fired[path]).mean()) == pytest.approx(row.source_rate, abs=2e-3)


def test_weights_are_powers_of_two_and_fold_to_themselves(hot):
    batches = data()
    converted = quick(hot, batches[0], calibrate=batches, order=3)
    for m in converted.modules():
        if isinstance(m, MulFreePSN):
            folded = m.folded()
            assert torch.equal(folded.taps, m.weight)
            assert (torch.frexp(m.weight).mantissa.abs() == 0.5).all()
    # the statistics are those of the filter on the data: spikes of the first training step are nearly the same
    x = torch.cat(batches, 1)
    quiet = copy.deepcopy(converted).train()
    quiet.get_submodule("features.1").eval()
    with torch.no_grad(), mfpsn_fx.monitor(quiet) as seen:
        quiet(x)
    for path, row in mfpsn_fx.calibration(converted).layers.items():
        assert seen.layers()[path].rate == pytest.approx(row.rate_after, abs=0.02)


def test_data_as_the_user_has_them(hot):
    """Tensors, tuples, dicts and Batches are one and the same; convert and calibrate too; and so is time-last."""
    xs = data(2)
    states = []
    for batches in (xs, [(x,) for x in xs], [{"x": x} for x in xs], [Batch(x) for x in xs]):
        states.append(quick(hot, xs[0], calibrate=batches).state_dict())
    later = quick(hot, xs[0], layout="time_last")
    assert conversion_nodes(later)
    code = later.code
    mfpsn_fx.calibrate(later, xs, progress=False)
    assert later.code == code
    states.append(later.state_dict())
    for state in states[1:]:
        for key, value in states[0].items():
            torch.testing.assert_close(state[key], value, msg=key)


def test_without_an_example(hot):
    xs = data(2)
    converted = mfpsn_fx.convert(hot, calibrate=xs, progress=False)
    wanted = quick(hot, xs[0], calibrate=xs)
    for (key, a), (_, b) in zip(converted.state_dict().items(), wanted.state_dict().items(), strict=True):
        torch.testing.assert_close(a, b, msg=key)


def test_padding_of_any_content_changes_nothing(hot):
    x, mask = torch.randn(6, 10, 1, 8), mfpsn_fx.lengths_to_mask(torch.randint(2, 7, (10,)), 6)
    states = []
    for junk in (0.0, 37.0):
        padded = x.masked_fill(~mask[..., None, None], junk)
        converted = quick(hot, x)
        mfpsn_fx.calibrate(converted, [Batch(padded, mask=mask)], progress=False)
        states.append((converted.state_dict(), mfpsn_fx.calibration(converted)))
    assert states[0][1] == states[1][1]
    for key, value in states[0][0].items():
        assert torch.equal(value, states[1][0][key]), key


def test_inside_leaves_and_at_several_places():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.lif = nn.Linear(4, 4), neuron.LIFNode(v_threshold=0.2, step_mode="m")

        def forward(self, x):
            if x.max() > 1e6:
                return x
            return self.lif(self.fc(self.lif(self.fc(x))))

    x = torch.randn(6, 9, 4)
    converted = quick(Branches(), x, calibrate=[x])
    assert converted.get_submodule("model.lif").calibrated is not None
    (row,) = mfpsn_fx.calibration(converted).layers.values()
    assert row.steps == 2 * 6 * 9


def test_everything_else_is_left_alone(hot, example):
    hot.train()
    hot.features.insert(2, nn.Dropout(0.5))
    converted = quick(hot, example)
    rng, meta = torch.get_rng_state(), dict(converted.meta)
    before = {k: v.clone() for k, v in converted.state_dict().items()}
    mfpsn_fx.calibrate(converted, [example], progress=False)
    assert torch.equal(torch.get_rng_state(), rng)
    assert converted.meta == meta
    assert all(m.training for m in converted.modules())
    assert not any(m._forward_hooks for m in converted.modules())
    for key, value in converted.state_dict().items():
        ours = key.rpartition(".")[2] in ("gamma", "beta", "weight", "running_mean", "running_var")
        neurons = isinstance(converted.get_submodule(key.rpartition(".")[0]), MulFreePSN)
        assert (ours and neurons) or torch.equal(value, before[key]), key
    with pytest.raises(RuntimeError):
        mfpsn_fx.calibrate(converted, [example, torch.randn(6, 5, 2, 8)], progress=False)
    after = converted.state_dict()
    with pytest.raises(RuntimeError):
        mfpsn_fx.calibrate(converted, [example, torch.randn(6, 5, 2, 8)], progress=False)
    assert all(torch.equal(v, after[k]) for k, v in converted.state_dict().items())


def test_the_result_is_kept_and_printed(hot, example, capsys):
    converted = quick(hot, example, calibrate=[example])
    found = mfpsn_fx.calibration(converted)
    assert mfpsn_fx.calibration(pickle.loads(pickle.dumps(copy.deepcopy(converted)))) == found
    print(found)
    text = capsys.readouterr().out
    for word in ("features.4", "source's rate", "rate before", "common spikes after"):
        assert word in text
    assert json.loads(found.to_json())["features.2"]["source_rate"] == found.layers["features.2"].source_rate
    assert found.table("github").startswith("|")


def test_progress_bar(hot, example, capsys):
    converted = quick(hot, example)
    mfpsn_fx.calibrate(converted, [example], progress=True)
    assert "calibrate" in capsys.readouterr().err
    mfpsn_fx.calibrate(converted, [example], progress=False)
    assert capsys.readouterr().err == ""


def test_a_silent_source_is_logged(hot, example, caplog):
    hot.features[2].v_threshold = 1e6
    with caplog.at_level(logging.WARNING, "mfpsn_fx"):
        converted = quick(hot, example, calibrate=[example])
    (message,) = [r.getMessage() for r in caplog.records if r.getMessage().startswith("features.2")]
    assert "its source never fired on the calibration data" in message
    assert mfpsn_fx.calibration(converted).layers["features.2"].rate_after == 0


def test_bad_input(hot, example):
    converted = quick(hot, example)
    for wrong, message in (
        ((x for x in [example]), r"this generator can be run through once only.*list\(batches\)"),
        (iter([example]), "can be run through once only"),
        (example, "an iterable of batches, found Tensor; put a single batch into a list"),
        (3, "found int"),
        ([3], "a batch must be a tensor, a tuple or a dict.*found int"),
    ):
        with pytest.raises(TypeError, match=message):
            mfpsn_fx.calibrate(converted, wrong, progress=False)
    for wrong, kinds in (([(example, torch.zeros(5))], "Tensor, Tensor"), ([{"image": example}], "image")):
        with pytest.raises(
            TypeError, match=rf"a batch of {kinds} does not fit what the network takes.*labels are not part"
        ):
            mfpsn_fx.calibrate(converted, wrong, progress=False)
        with pytest.raises(TypeError, match=rf"a batch of {kinds} does not fit"):
            mfpsn_fx.recompute_statistics(converted, wrong)
    with pytest.raises(TypeError, match="can be run through once only"):
        quick(hot, example, calibrate=iter([example]))
    with pytest.raises(ValueError, match="calibration was given no batch"):
        mfpsn_fx.calibrate(converted, [], progress=False)
    with pytest.raises(ValueError, match="unknown drive 'mine': choose 'source' or 'own'"):
        mfpsn_fx.calibrate(converted, [example], drive="mine")
    for rate in (0, -1.0, True, "often", float("inf"), float("nan")):
        with pytest.raises(ValueError, match="rate must be a positive number"):
            mfpsn_fx.calibrate(converted, [example], rate=rate)
    with pytest.raises(ValueError, match="this network was not calibrated"):
        mfpsn_fx.calibration(converted)
    with pytest.raises(TypeError, match=r"not a network that mfpsn_fx.convert returned"):
        mfpsn_fx.calibrate(hot, [example])
    for m in converted.modules():
        if isinstance(m, MulFreePSN):
            m.source = None
    with pytest.raises(ValueError, match="no neuron of LifNet has a source neuron"):
        mfpsn_fx.calibrate(converted, [example])


def test_neurons_that_stay_forget_between_batches(example):
    class Mine(neuron.LIFNode):
        pass

    net = nn.Sequential(
        nn.Linear(8, 5), Mine(step_mode="m", v_threshold=0.2), nn.Linear(5, 4),
        neuron.LIFNode(step_mode="m", v_threshold=0.1, surrogate_function=surrogate.ATan()),
    )  # fmt: skip
    xs = [torch.randn(6, 7, 8), torch.randn(6, 4, 8)]
    converted = quick(net, xs[0], strict=False, calibrate=xs)
    assert list(mfpsn_fx.calibration(converted).layers) == ["3"]


def test_the_pass_states_its_needs(hot, example):
    pipeline = mfpsn_fx.conversion_pipeline(calibrate=[example])
    names = [p.name for p in pipeline]
    assert names.index("calibrate") == names.index("initialize_neurons") + 1
    with pytest.raises(mfpsn_fx.PipelineError, match="calibrate needs 'neurons'"):
        Pipeline([Calibrate([example])])


def test_the_benchmark_in_small(script, tmp_path, capsys):
    found = script("benchmarks/calibration.py").main(["--quick", "--markdown", str(tmp_path / "table.md")])
    results = found["results"]
    assert [row["start"] for row in results] == ["not calibrated", "own", "source", "source, 1.25"]
    text = (tmp_path / "table.md").read_text()
    assert "Made by `python benchmarks/calibration.py --quick" in text
    assert "| IF, lowered by the threshold | 2 |" in text


def test_channels_elsewhere():
    """Heads and width together are the channels, for the simulated source, the fit and the monitor."""

    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.lif = nn.Linear(4, 4), neuron.IFNode(v_reset=None, v_threshold=0.3, step_mode="m")

        def forward(self, x):
            return self.lif(self.fc(x))

    x = torch.randn(6, 9, 2, 3, 4)  # (T, N, heads, tokens, width)
    for layout in ("time_first", "time_last"):
        converted = quick(Heads(), x, channel_dims={"lif": (2, 4)}, calibrate=[x], layout=layout)
        assert converted.get_submodule("lif").weight.shape == (8, 2)
        with mfpsn_fx.monitor(converted.eval()) as seen:
            converted(x)
        row = mfpsn_fx.calibration(converted).layers["lif"]
        assert seen.layers()["lif"].rates.shape == (8,)
        assert seen.layers()["lif"].rate == pytest.approx(row.rate_after, abs=1e-6)
        assert row.steps == 6 * 9 * 3
        assert abs(row.rate_after - row.source_rate) < 0.02


def test_each_use_of_a_shared_neuron_is_fitted(example):
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.lif = nn.Linear(8, 5), nn.Linear(5, 4), neuron.ParametricLIFNode(step_mode="m")

        def forward(self, x):
            return self.lif(self.b(self.lif(self.a(x))))

    net, x = Shared(), 4 * torch.randn(6, 9, 8)
    converted = quick(net, x, calibrate=[x])
    assert list(mfpsn_fx.calibration(converted).layers) == ["lif", "lif@2"]
    mfpsn_fx.load_source_checkpoint(converted, net.state_dict(), x, source=net)
    wanted = quick(net, x)
    for (key, a), b in zip(converted.state_dict().items(), wanted.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, msg=key)
