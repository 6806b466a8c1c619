"""SpikingJelly's neurons as filters, compared with the neurons themselves."""

from __future__ import annotations

import pickle

import pytest
import torch
from spikingjelly.activation_based import functional, neuron, surrogate
from torch import nn

import mfpsn_fx
from mfpsn_fx import ATan, Geometric, NotAFilterError, Sigmoid, SourceNeuron, Taps
from mfpsn_fx.model.sources.description import describe, is_source, looks_like_a_neuron
from mfpsn_fx.model.sources.simulate import simulate

STEPS = 10


def convolved(source: SourceNeuron, x: torch.Tensor) -> torch.Tensor:
    """Σ_j response(j)·x[t−j] over all of the past, in float64."""
    taps = source.response(torch.arange(len(x)))
    taps = taps.expand(x.shape[2], -1) if taps.ndim == 1 else taps
    return torch.stack([sum(taps[:, j] * x[t - j] for j in range(t + 1)) for t in range(len(x))])


def membrane_without_reset(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Return the neuron's own membrane with a threshold at which it never fires."""
    m.v_threshold, m.store_v_seq = 1e9, True
    m(x)
    return m.v_seq.double()


@pytest.mark.parametrize("decay_input", [True, False])
@pytest.mark.parametrize("v_reset", [0.0, None, -0.5, 0.3])
@pytest.mark.parametrize("kind", ["IF", "LIF", "PLIF"])
def test_charge_without_reset(kind, v_reset, decay_input):
    x = torch.randn(STEPS, 2, 3, dtype=torch.float64)
    settings = {"v_reset": v_reset, "v_threshold": 0.7, "step_mode": "m"}
    if kind == "IF":
        m = neuron.IFNode(**settings)
    elif kind == "LIF":
        m = neuron.LIFNode(tau=3.0, decay_input=decay_input, **settings)
    else:
        m = neuron.ParametricLIFNode(init_tau=1.7, decay_input=decay_input, **settings).double()
    source = describe(m)
    assert "reset dropped" in source.notes
    h = convolved(source, x)
    # V − v_reset is linear, so comparing it with threshold − v_reset is comparing V with the threshold
    expected = membrane_without_reset(m, x)
    torch.testing.assert_close(h - source.threshold, expected - 0.7, rtol=1e-6, atol=1e-6)


def test_lif_with_tau_2_has_exact_powers_of_two():
    source = describe(neuron.LIFNode(tau=2.0, step_mode="m"))
    assert source.response(torch.arange(4)).tolist() == [0.5, 0.25, 0.125, 0.0625]


@pytest.mark.parametrize("inplane", [None, 3])
def test_gated(inplane):
    torch.manual_seed(1)
    m = neuron.GatedLIFNode(T=STEPS, inplane=inplane, init_v_threshold=0.9).double()
    for p in m.parameters():
        nn.init.normal_(p)
    with torch.no_grad():
        m.conduct.copy_(m.conduct[:1].expand_as(m.conduct))
    source = describe(m)
    assert source.channels == inplane
    x = torch.randn(STEPS, 2, 3, 1, 1, dtype=torch.float64)
    with torch.no_grad():
        m.v_threshold.fill_(40.0)  # sigmoid → 1: with inputs this small it never fires
        m(x * 1e-3)
    last = m.v[..., 0, 0]
    h = convolved(source, x[..., 0, 0] * 1e-3)[-1]
    alpha, tau, leak = (torch.sigmoid(p.detach()) for p in (m.alpha, m.tau, m.linear_decay))
    ratio = 1 - alpha * (1 - tau)
    drift = (1 - alpha) * leak * (1 - ratio**STEPS) / (1 - ratio)
    torch.testing.assert_close(last, h - drift, rtol=1e-6, atol=1e-9)
    m.conduct.data[0] += 1
    assert any("conduct averaged" in note for note in describe(m).notes)


def test_psn_family():
    x = torch.randn(STEPS, 2, 3)
    sliding = neuron.SlidingPSN(k=4, step_mode="m")
    nn.init.normal_(sliding.weight)
    source = describe(sliding)
    h = convolved(source, x.double()) - source.threshold
    assert torch.equal((h >= 0).float(), sliding(x))
    assert source.response(torch.arange(6))[4:].tolist() == [0, 0]

    causal = torch.randn(STEPS)
    toeplitz = torch.stack([torch.cat([causal[: t + 1].flip(0), torch.zeros(STEPS - t - 1)]) for t in range(STEPS)])
    psn = neuron.PSN(T=STEPS)
    masked = neuron.MaskedPSN(k=3, T=STEPS, lambda_init=1.0, step_mode="m")
    for m in (psn, masked):
        m.weight.data.copy_(toeplitz)
        m.bias.data.fill_(-0.3)
        source = describe(m)
        h = convolved(source, x.double()) - source.threshold
        assert torch.equal((h >= 0).float(), m(x)), type(m)
        assert "averaged along diagonals" in source.notes[0]


@pytest.mark.parametrize("name", ["PSN", "MaskedPSN"])
def test_calibration_aims_at_what_weights_of_their_own_for_each_step_do(name):
    """Their filter is a mean, but the simulation is exactly the neuron itself."""
    m = neuron.PSN(T=STEPS) if name == "PSN" else neuron.MaskedPSN(k=3, T=STEPS, lambda_init=0.5, step_mode="m")
    nn.init.normal_(m.weight)
    nn.init.normal_(m.bias)
    m = m.double()
    source = describe(m)
    x = torch.randn(STEPS, 4, 3, 2, dtype=torch.float64)
    spikes = simulate(source, x)[1]
    assert 0.2 < float(spikes.mean()) < 0.8
    assert torch.equal(spikes, m(x))
    with pytest.raises(ValueError, match=f"{name}: there are weights for {STEPS} steps, found 3"):
        simulate(source, x[:3])
    pickled = pickle.loads(pickle.dumps(source))
    assert torch.equal(pickled.response(torch.arange(3)), source.response(torch.arange(3)))


def test_surrogates():
    assert describe(neuron.LIFNode(step_mode="m")).surrogate == Sigmoid(4.0)
    assert describe(neuron.LIFNode(surrogate_function=surrogate.ATan(3.0), step_mode="m")).surrogate == ATan(3.0)
    other = describe(neuron.LIFNode(surrogate_function=surrogate.Erf(), step_mode="m"))
    assert other.surrogate == ATan(2.0)
    assert "surrogate Erf replaced by ATan(2)" in other.notes
    # a new object: the default is shared by all neurons
    m = neuron.LIFNode(surrogate_function=surrogate.Sigmoid(), step_mode="m")
    m.surrogate_function.set_spiking_mode(False)
    with pytest.raises(NotAFilterError, match="spiking=False"):
        describe(m)


def test_derivatives_are_spikingjellys():
    x = torch.linspace(-2, 2, 9, dtype=torch.float64, requires_grad=True)
    for theirs, ours in ((surrogate.ATan(2.0), ATan(2.0)), (surrogate.Sigmoid(4.0), Sigmoid(4.0))):
        (want,) = torch.autograd.grad(theirs(x).sum(), x)
        torch.testing.assert_close(ours.derivative(x.detach()), want)


def test_memory_is_not_shared_with_the_source():
    m = neuron.SlidingPSN(k=2, step_mode="m")
    source = describe(m)
    before = source.response(torch.arange(2))
    m.weight.data.add_(1)
    assert torch.equal(source.response(torch.arange(2)), before)


class Leaky(nn.Module):
    """A user's own neuron."""

    decay = 0.75

    def forward(self, x):
        v, out = torch.zeros_like(x[0]), []
        for step in x:
            v = self.decay * v + step
            fired = (v > 1).to(x.dtype)
            out.append(fired)
            v = v * (1 - fired)
        return torch.stack(out)


def test_a_users_neuron_in_a_few_lines():
    x = torch.randn(6, 2, 3)
    model = nn.Sequential(nn.Linear(3, 3), Leaky())
    with pytest.raises(ValueError, match="no spiking neuron found"):
        mfpsn_fx.convert(model, x)

    @mfpsn_fx.register_source(Leaky)
    def leaky(m):
        return SourceNeuron("Leaky", Geometric(torch.ones(()), torch.tensor(m.decay)), torch.tensor(1.0), strict=True)

    try:
        converted = mfpsn_fx.convert(model, x, order=2, repeats=1, progress=False)
        assert mfpsn_fx.selection(converted).rows[0].source == "Leaky"
        assert torch.equal(converted.get_submodule("1").weight[0], torch.tensor([0.75, 1.0]))
    finally:
        mfpsn_fx.unregister_source(Leaky)
    assert not is_source(Leaky())


def test_strict_sources_do_not_fire_at_equality():
    class Strict(nn.Module):
        def forward(self, x):
            return (x > 1).to(x.dtype)

    x = torch.randint(-2, 4, (4, 5, 3)).float()
    for strict in (True, False):
        mfpsn_fx.register_source(Strict)(
            lambda m, strict=strict: SourceNeuron("Strict", Taps(torch.ones(1)), torch.tensor(1.0), strict=strict)
        )
        try:
            converted = mfpsn_fx.convert(nn.Sequential(Strict()), x, order=1, repeats=1, progress=False)
        finally:
            mfpsn_fx.unregister_source(Strict)
        assert torch.equal(converted(x), (x > 1 if strict else x >= 1).float())


def test_looks():
    class Mine(neuron.LIFNode):
        pass

    assert looks_like_a_neuron(Mine())
    assert looks_like_a_neuron(neuron.KLIFNode())
    assert not looks_like_a_neuron(surrogate.ATan())
    assert not looks_like_a_neuron(nn.ReLU())
    functional.reset_net(Mine())
    with pytest.raises(ValueError, match="at least one class"):
        mfpsn_fx.register_source()


def test_numbers_will_do_and_resets_are_checked():
    source = SourceNeuron("Mine", Geometric(1.0, 0.5), 1.0, reset="zero")
    assert torch.equal(source.response(torch.arange(3)), torch.tensor([1, 0.5, 0.25], dtype=torch.float64))
    assert torch.equal(source.threshold, torch.tensor(1.0))
    with pytest.raises(ValueError, match="Mine: unknown reset 'substract'; choose one of 'none', 'zero', 'subtract'"):
        SourceNeuron("Mine", Geometric(1.0, 0.5), 1.0, reset="substract")
