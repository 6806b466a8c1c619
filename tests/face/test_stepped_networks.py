"""Networks that step through time: what their neurons are, and that the rolled-up network is the looped one."""

from __future__ import annotations

import copy
import inspect
import itertools
import pathlib
import pickle
import re
import runpy
import warnings

import norse.torch as norse
import pytest
import snntorch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from norse.torch.functional.izhikevich import tonic_spiking
from snntorch import surrogate
from torch import nn
from torch.utils._pytree import tree_leaves

import mfpsn_fx
from mfpsn_fx import ConversionError, MulFreePSN, NotAFilterError
from mfpsn_fx.model import LeakyIntegrator, Stepping, register_stepping, unregister_stepping
from mfpsn_fx.model.capturing.split_layers import split_inner_layers
from mfpsn_fx.model.capturing.steps import capture_steps
from mfpsn_fx.model.sources.description import describe
from mfpsn_fx.model.sources.stepping import stepping_of
from mfpsn_fx.passes import Example, PassContext, RollUp, RollUpError

FOLDER = pathlib.Path(__file__).resolve().parents[2] / "examples" / "compatibility"
LISTED = runpy.run_path(str(FOLDER / "report.py"))["load_networks"]()
NETWORKS = [n for n in LISTED if n.library in ("snnTorch", "Norse")]
STEPS = 8
QUICK = {"kernels": "shifted-add", "layout": "time_first", "repeats": 1, "progress": False}


pytestmark = pytest.mark.usefixtures("one_thread")


def rolled(model, *args, accept=()):
    unrolled, one_step = capture_steps(model, args)
    return RollUp(one_step=one_step, accept=accept)(unrolled, PassContext(Example(args))).graph_module


def converted(model, *args, **options):
    return mfpsn_fx.convert(model, *args, **{**QUICK, **options})


def stepped(m, x):
    """(spikes, membrane) of a neuron of one step, over all of x."""
    how = stepping_of(m)
    spikes, membranes, result = [], [], None
    for t, step in enumerate(x):
        result = how.first(m, step) if t == 0 else m(step, *how.next_states(result))
        spikes.append(how.output(result, "spikes") if "spikes" in how.outputs else torch.zeros_like(step))
        membranes.append(how.output(result, "membrane"))
    return torch.stack(spikes), torch.stack(membranes)


def convolved(response, x):
    taps = response(torch.arange(len(x)))
    taps = taps.expand(x.shape[2], -1) if taps.ndim == 1 else taps
    return torch.stack([sum(taps[:, j] * x[t - j] for j in range(t + 1)) for t in range(len(x))])


def lif_parameters(**changes):
    return norse.LIFParameters(**{name: torch.as_tensor(value) for name, value in changes.items()})


class TestSources:
    """What the adapters tell, against the libraries' own neurons."""

    @pytest.mark.parametrize(
        ("make", "reset"),
        [
            (lambda: snntorch.Leaky(beta=0.8, threshold=1e9), "late-subtract"),
            (lambda: snntorch.Leaky(beta=torch.tensor([0.5, 0.9, 1.7]), threshold=1e9, reset_mechanism="zero"), "zero"),
            (lambda: snntorch.Leaky(beta=0.8, threshold=1e9, reset_delay=False), "subtract"),
            (lambda: snntorch.Leaky(beta=0.8, learn_beta=True, threshold=1e9, reset_mechanism="none"), "none"),
            (lambda: snntorch.Lapicque(beta=0.6, threshold=1e9), "late-subtract"),
            (lambda: snntorch.Lapicque(R=2, C=3, time_step=0.5, threshold=1e9, reset_mechanism="zero"), "late-zero"),
            (lambda: snntorch.Synaptic(alpha=0.7, beta=0.9, threshold=1e9), "late-subtract"),
            (lambda: snntorch.Synaptic(alpha=0.8, beta=0.8, threshold=1e9, reset_mechanism="zero"), "late-zero"),
            (lambda: norse.LIFCell(lif_parameters(v_th=1e9)), "zero"),
            (lambda: norse.LIFCell(lif_parameters(v_th=1e9, v_leak=0.3, tau_mem_inv=300.0)), "zero"),
            (lambda: norse.LIFBoxCell(norse.LIFBoxParameters(v_th=torch.tensor(1e9))), "zero"),
            (lambda: norse.IAFCell(norse.IAFParameters(v_th=torch.tensor(1e9), v_reset=torch.tensor(0.2))), "zero"),
        ],
    )
    def test_membrane_without_reset(self, make, reset):
        m = make()
        x = torch.randn(STEPS, 2, 3)
        source = describe(m)
        assert source.strict
        assert source.reset == reset
        _, membrane = stepped(m, x)
        rest = 1e9 - source.threshold
        torch.testing.assert_close(
            convolved(source.response, x.double()) + rest, membrane.double(), rtol=1e-4, atol=1e-4
        )

    def test_state_leaky(self):
        x = torch.randn(STEPS, 2, 3)
        for beta, cut in ((0.9, None), (torch.tensor([0.5, 0.8, 0.9]), 3)):
            m = snntorch.StateLeaky(beta=beta, channels=3, kernel_truncation_steps=cut)
            spikes, membrane = m(x)
            source = describe(m)
            h = convolved(source.response, x.double())
            torch.testing.assert_close(h, membrane.double(), rtol=1e-5, atol=1e-5)
            assert torch.equal((h > source.threshold).float(), spikes)
            assert source.channels == (3 if cut else None)

    def test_norse_over_a_sequence_is_its_cell(self):
        x = torch.randn(STEPS, 2, 3)
        cell, layer = describe(norse.LIFCell()), describe(norse.LIF())
        lags = torch.arange(STEPS)
        assert torch.equal(cell.response(lags), layer.response(lags))
        torch.testing.assert_close(stepped(norse.LIFCell(), x)[0], norse.LIF()(x)[0])

    @pytest.mark.parametrize(
        "make",
        [lambda: snntorch.Leaky(beta=0.5), lambda: norse.IAFCell(), lambda: snntorch.Synaptic(alpha=0.0, beta=0.0)],
    )
    def test_none_fires_at_its_threshold(self, make):
        """Of inputs 1 and just above, the source fires at the second only; so does the converted neuron."""
        m = make()
        x = torch.tensor([1.0, 1.0 + 2**-10])[None, :, None].expand(2, 2, 3) * torch.tensor([1.0, 0.0])[:, None, None]
        spikes, _ = stepped(m, x)
        assert spikes[0].tolist() == [[0.0] * 3, [1.0] * 3]
        model = nn.Sequential(make())
        if isinstance(m, norse.IAFCell):
            model = norse.SequentialState(make())
        else:
            model[0].init_hidden = True
        out = converted(model, x)(x)
        assert torch.equal((out[0] if isinstance(out, tuple) else out)[0], spikes[0])

    def test_surrogates(self):
        def of(function):
            return describe(snntorch.Leaky(beta=0.5, spike_grad=function))

        assert of(None).surrogate == mfpsn_fx.ATan(2.0)
        assert of(surrogate.atan(alpha=5.0)).surrogate == mfpsn_fx.ATan(5.0)
        assert of(surrogate.sigmoid(slope=7)).surrogate == mfpsn_fx.Sigmoid(7.0)
        assert "surrogate fast_sigmoid replaced by ATan(2)" in of(surrogate.fast_sigmoid()).notes
        assert any("no surrogate" in n for n in describe(snntorch.Leaky(beta=0.5, surrogate_disable=True)).notes)
        assert "surrogate 'super' replaced by ATan(2)" in describe(norse.LIFCell()).notes
        x = torch.linspace(-2, 2, 9, dtype=torch.float64, requires_grad=True)
        for theirs, ours in ((surrogate.atan(3.0), mfpsn_fx.ATan(3.0)), (surrogate.sigmoid(4), mfpsn_fx.Sigmoid(4.0))):
            (want,) = torch.autograd.grad(theirs(x).sum(), x)
            torch.testing.assert_close(ours.derivative(x.detach()), want)

    @pytest.mark.parametrize(
        ("make", "reason"),
        [
            (lambda: snntorch.Leaky(beta=0.5, inhibition=True), "suppress each other"),
            (lambda: snntorch.Leaky(beta=0.5, state_quant=lambda v: v), "rounded at every step"),
            (lambda: snntorch.Leaky(beta=0.5, graded_spikes_factor=2.0), "graded spikes"),
            (lambda: snntorch.Leaky(beta=torch.rand(3, 4, 5)), r"shape \(3, 4, 5\)"),
            (
                lambda: snntorch.Leaky(beta=torch.rand(3), threshold=torch.rand(4)),
                r"different numbers of channels: \[3, 4",
            ),
            (lambda: snntorch.Leaky(beta=0.5, threshold=float("nan")), "threshold of its Leaky is NaN or infinite"),
            (lambda: snntorch.RLeaky(beta=0.5, linear_features=3), "its spikes feed back"),
            (lambda: snntorch.RSynaptic(alpha=0.5, beta=0.5, linear_features=3), "its spikes feed back"),
            (lambda: snntorch.Alpha(alpha=0.9, beta=0.5), "use Synaptic"),
            (
                lambda: snntorch.LinearLeaky(beta=0.5, in_features=3, out_features=3),
                "use torch.nn.Linear and StateLeaky",
            ),
            (lambda: snntorch.SLSTM(3, 3), "LSTM"),
            (lambda: snntorch.StateLeaky(beta=0.5, channels=3, output=False), "its output is its membrane"),
            (lambda: norse.LIFRecurrentCell(3, 3), "its spikes feed back"),
            (lambda: norse.LSNNCell(), "adapts to its own spikes"),
            (lambda: norse.IzhikevichCell(tonic_spiking), "quadratic"),
            (lambda: norse.LIFAdExCell(), "exponential"),
            (lambda: norse.LICell(), "its output is its membrane"),
            (lambda: norse.LILinearCell(3, 3), "use torch.nn.Linear and LICell"),
            (lambda: norse.LIFCell(lif_parameters(tau_mem_inv=2000.0)), "it oscillates"),
        ],
    )
    def test_refusals(self, make, reason):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            m = make()
        with pytest.raises(NotAFilterError, match=reason):
            describe(m)


class TestLeakyIntegrator:
    @pytest.mark.parametrize(
        "make",
        [
            lambda: snntorch.Leaky(beta=0.8, reset_mechanism="none"),
            lambda: snntorch.Leaky(beta=torch.tensor([0.5, 0.8, 0.9]), reset_mechanism="none"),
            lambda: snntorch.Leaky(beta=0.8, threshold=float("inf"), reset_mechanism="zero"),
            lambda: snntorch.Synaptic(alpha=0.8, beta=0.9, reset_mechanism="none"),
            lambda: snntorch.Lapicque(R=2, C=3, reset_mechanism="none"),
            lambda: norse.LICell(),
            lambda: norse.LICell(norse.LIParameters(v_leak=torch.tensor(0.4))),
            lambda: norse.LIBoxCell(),
        ],
    )
    def test_is_the_membrane(self, make):
        x = torch.randn(STEPS, 2, 3)
        m = make()
        torch.testing.assert_close(stepping_of(m).leaky_integrator(m)(x), stepped(m, x)[1], rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("delay", [0, 1, 3])
    def test_two_poles(self, delay):
        response = mfpsn_fx.TwoPole(torch.tensor([2.0, 1.0]), torch.tensor([0.5, 0.9]), torch.tensor(0.5), delay)
        x = torch.randn(STEPS, 3, 2, dtype=torch.float64)
        torch.testing.assert_close(LeakyIntegrator(response)(x), convolved(response, x), rtol=1e-6, atol=1e-6)

    def test_trains_its_decay(self):
        m = snntorch.Leaky(beta=torch.tensor([0.5, 0.9]), learn_beta=True, reset_mechanism="none")
        ours = stepping_of(m).leaky_integrator(m)
        assert [name for name, _ in ours.named_parameters()] == ["ratio"]
        x = torch.randn(STEPS, 3, 2)
        stepped(m, x)[1].square().sum().backward()
        ours(x).square().sum().backward()
        torch.testing.assert_close(ours.ratio.grad, m.beta.grad, rtol=1e-4, atol=1e-4)

    def test_bad_use(self):
        response = mfpsn_fx.Geometric(torch.ones(2), torch.full((2,), 0.5))
        with pytest.raises(ValueError, match=r"decay cannot be trained: Geometric has gain, ratio"):
            LeakyIntegrator(response, trainable=("decay",))
        with pytest.raises(ValueError, match=r"each of 2 channels .* found shape \(4, 1, 3\)"):
            LeakyIntegrator(response)(torch.zeros(4, 1, 3))
        assert LeakyIntegrator(response)(torch.zeros(4, 1, 2, 5)).shape == (4, 1, 2, 5)


class Stateless(nn.Module):
    """Stands in for a spiking neuron: its steps are independent, so that its parallel form is itself."""

    def forward(self, x, mem=None):
        return (x > 1).to(x.dtype), 3 * x


@pytest.fixture
def _stateless():
    register_stepping(Stateless)(
        lambda m: Stepping(
            ("mem",),
            ("spikes", "membrane"),
            integrator=lambda m: LeakyIntegrator(mfpsn_fx.Taps(torch.tensor([3.0])), dtype=torch.float64),
            reads_out=True,
        )
    )
    yield
    unregister_stepping(Stateless)


class Looped(nn.Module):
    """A loop over time as people write them: ways to read the input, and ways to gather the output."""

    INPUTS = ("x[t]", "for x_t in x", "x[:, t]", "static", "unbind")
    READOUTS = (
        "stack spikes", "stack membrane", "stack dim 1", "sum from 0", "sum from zeros", "builtin sum", "mean", "last",
        "last membrane", "cat", "decaying sum", "through a layer", "dict of both", "only odd steps", "the first two",
    )  # fmt: skip

    def __init__(self, widths, steps, how, readout, skip):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))
        self.neurons = nn.ModuleList(Stateless() for _ in self.layers)
        self.head = nn.Linear(widths[-1], 2)
        self.steps, self.how, self.readout, self.skip = steps, how, readout, skip

    def inputs(self, x):
        if self.how == "for x_t in x":
            yield from x
        elif self.how == "unbind":
            yield from torch.unbind(x, 0)
        else:
            for t in range(self.steps):
                yield {"x[t]": lambda t: x[t], "x[:, t]": lambda t: x[:, t], "static": lambda t: x}[self.how](t)

    def forward(self, x):
        memories = [None] * len(self.layers)
        spikes, membranes = [], []
        count = torch.zeros(2, dtype=torch.float64) if self.readout == "sum from zeros" else 0
        for step in self.inputs(x):
            for i, (layer, neuron) in enumerate(zip(self.layers, self.neurons, strict=True)):
                current = layer(step)
                before = step
                step, memories[i] = neuron(current, memories[i])
                if self.skip and layer.in_features == layer.out_features:
                    step = step + before
            spikes.append(step)
            membranes.append(memories[-1])
            if self.readout == "decaying sum":
                count = count * 2 + step
            elif self.readout == "sum from zeros":
                count = count + self.head(step)
            else:
                count = count + step
        return self.gathered(spikes, membranes, count)

    def gathered(self, spikes, membranes, count):
        match self.readout:
            case "stack spikes":
                return torch.stack(spikes)
            case "stack membrane":
                return torch.stack(membranes, dim=0)
            case "stack dim 1":
                return torch.stack(spikes, 1).sum(1)
            case "builtin sum":
                return sum(spikes) / len(spikes)
            case "mean":
                return torch.stack(spikes).mean(0)
            case "last":
                return spikes[-1]
            case "last membrane":
                return membranes[-1]
            case "cat":
                return torch.cat(spikes, 0)
            case "through a layer":
                return self.head(spikes[-1]) + self.head(membranes[0])
            case "dict of both":
                return {"spikes": torch.stack(spikes), "count": count}
            case "the first two":
                return self.head(spikes[0]) + self.head(spikes[1])
            case "only odd steps":
                return torch.stack(spikes[1::2])
            case _:
                return count


@pytest.mark.usefixtures("_stateless")
class TestRollingUp:
    @settings(max_examples=60, deadline=None)
    @given(
        widths=st.lists(st.integers(1, 5), min_size=2, max_size=4),
        steps=st.integers(2, 5),
        batch=st.integers(1, 3),
        how=st.sampled_from(Looped.INPUTS),
        readout=st.sampled_from(Looped.READOUTS),
        skip=st.booleans(),
        whole_numbers=st.booleans(),
        seed=st.integers(0, 2**16),
    )
    def test_is_the_loop(self, widths, steps, batch, how, readout, skip, whole_numbers, seed):
        torch.manual_seed(seed)
        net = Looped(widths, steps, how, readout, skip).double()
        shape = {"static": (batch, widths[0]), "x[:, t]": (batch, steps, widths[0])}.get(how, (steps, batch, widths[0]))
        draw = (lambda *s: torch.randint(-3, 4, s).double()) if whole_numbers else (lambda *s: torch.randn(*s).double())
        with torch.no_grad():
            for p in net.parameters():
                p.copy_(draw(*p.shape))
        x = draw(*shape)
        ours, theirs = rolled(net, x)(x), net(x)
        if not isinstance(theirs, dict):
            ours, theirs = {"": ours}, {"": theirs}
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            if whole_numbers:
                assert torch.equal(ours[key], value)
            else:
                torch.testing.assert_close(ours[key], value)

    def test_each_layer_and_neuron_is_called_once(self):
        net = Looped([3, 4, 2], 5, "x[t]", "mean", False)
        graph = rolled(net, torch.randn(5, 2, 3)).graph
        calls = [n.target for n in graph.nodes if n.op == "call_module"]
        assert calls == ["layers.0", "neurons.0", "layers.1", "neurons.1"]
        functions = [n.target.__name__ for n in graph.nodes if n.op == "call_function"]
        assert functions.count("fold_time") == functions.count("unfold_time") == 2

    def test_names_play_no_part(self):
        """Two layers that take turns have the same shape, type and position in their step; they are two layers."""

        class Alternating(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.b, self.lif = nn.Linear(3, 3), nn.Linear(3, 3), Stateless()

            def forward(self, x):
                mem, spikes = None, []
                for t in range(4):
                    spk, mem = self.lif((self.a, self.b)[t % 2](x[t]), mem)
                    spikes.append(spk)
                return torch.stack(spikes)

        with pytest.raises(RollUpError, match=r"lif: step 1 is not like step 0: layer 'b' stands where layer 'a' was"):
            rolled(Alternating(), torch.randn(4, 2, 3))


class Net(nn.Module):
    """A loop over two Leaky layers; ``step`` is what its subclasses change."""

    def __init__(self, channels=3, **settings):
        super().__init__()
        self.fc1, self.lif1 = nn.Linear(3, channels), snntorch.Leaky(beta=0.9, **settings)
        self.fc2, self.lif2 = nn.Linear(channels, 2), snntorch.Leaky(beta=0.8, **settings)

    def step(self, t, x_t, mem1, mem2, spk1):
        spk1, mem1 = self.lif1(self.fc1(x_t), mem1)
        spk2, mem2 = self.lif2(self.fc2(spk1), mem2)
        return spk2, mem1, mem2, spk1

    def forward(self, x):
        mem1, mem2 = self.lif1.init_leaky(), self.lif2.init_leaky()
        spk1 = torch.zeros(x.shape[1], 3)
        spikes = []
        for t in range(x.shape[0]):
            spk2, mem1, mem2, spk1 = self.step(t, x[t], mem1, mem2, spk1)
            spikes.append(spk2)
        return torch.stack(spikes)


def changed(step, **layers):
    """A :class:`Net` of another step."""

    class Changed(Net):
        pass

    Changed.step = step
    net = Changed()
    for name, layer in layers.items():
        net.add_module(name, layer)
    return net


def constant_at_step_2(self, t, x_t, mem1, mem2, spk1):
    spk1, mem1 = self.lif1(self.fc1(x_t) * (3.0 if t == 2 else 2.0), mem1)
    spk2, mem2 = self.lif2(self.fc2(spk1), mem2)
    return spk2, mem1, mem2, spk1


def tensor_constant_at_step_2(self, t, x_t, mem1, mem2, spk1):
    return Net.step(self, t, x_t + torch.tensor([1.0, 2.0, 3.0 + (t == 2)]), mem1, mem2, spk1)


def op_at_step_1(self, t, x_t, mem1, mem2, spk1):
    return Net.step(self, t, torch.relu(x_t) if t != 1 else torch.tanh(x_t), mem1, mem2, spk1)


def recurrent(self, t, x_t, mem1, mem2, spk1):
    spk1, mem1 = self.lif1(self.fc1(x_t) + spk1, mem1)
    spk2, mem2 = self.lif2(self.fc2(spk1), mem2)
    return spk2, mem1, mem2, spk1


def delayed(self, t, x_t, mem1, mem2, spk1):
    before = spk1
    spk1, mem1 = self.lif1(self.fc1(x_t), mem1)
    spk2, mem2 = self.lif2(self.fc2(before), mem2)
    return spk2, mem1, mem2, spk1


def membrane_onwards(self, t, x_t, mem1, mem2, spk1):
    spk1, mem1 = self.lif1(self.fc1(x_t), mem1)
    spk2, mem2 = self.lif2(self.fc2(mem1), mem2)
    return spk2, mem1, mem2, spk1


def membrane_to_an_integrator(self, t, x_t, mem1, mem2, spk1):
    spk1, mem1 = self.lif1(self.fc1(x_t), mem1)
    _, mem2 = self.li(self.fc2(mem1), mem2)
    return mem2, mem1, mem2, spk1


def threshold_read(self, t, x_t, mem1, mem2, spk1):
    return Net.step(self, t, x_t * self.lif1.threshold, mem1, mem2, spk1)


def membrane_halved(self, t, x_t, mem1, mem2, spk1):
    return Net.step(self, t, x_t, mem1 if t == 0 else mem1 * 0.5, mem2, spk1)


def membranes_swapped(self, t, x_t, mem1, mem2, spk1):
    spk2, mem1, mem2, spk1 = Net.step(self, t, x_t, mem1, mem2, spk1)
    return spk2, mem2, mem1, spk1


def normed(self, t, x_t, mem1, mem2, spk1):
    return Net.step(self, t, self.norm(x_t), mem1, mem2, spk1)


def norm_of_each_step(self, t, x_t, mem1, mem2, spk1):
    return Net.step(self, t, self.norms[t](x_t), mem1, mem2, spk1)


def across_the_batch(self, t, x_t, mem1, mem2, spk1):
    return Net.step(self, t, x_t - x_t.mean(0), mem1, mem2, spk1)


def split_and_joined(self, t, x_t, mem1, mem2, spk1):
    """By channels, which is as good as any layer; the numbers of rows are asked for on the way."""
    a, b = x_t.unsqueeze(1).expand(-1, 2, -1).chunk(2, dim=1)
    x_t = torch.cat([a, b], 1).mean(1).reshape(self.fc1(x_t).size(0), x_t.shape[1])
    return Net.step(self, t, x_t * self.scale[0], mem1, mem2, spk1)


def rows_of_the_batch(self, t, x_t, mem1, mem2, spk1):
    a, b = x_t.chunk(2, dim=0)
    return Net.step(self, t, torch.cat([b, a], 0), mem1, mem2, spk1)


def branching(self, t, x_t, mem1, mem2, spk1):
    return Net.step(self, t, self.fc1(x_t) if spk1.sum() > 0 and t else x_t, mem1, mem2, spk1)


def detached(self, t, x_t, mem1, mem2, spk1):
    return Net.step(self, t, x_t, mem1 if t == 0 else mem1.detach(), mem2, spk1)


def twice(self, t, x_t, mem1, mem2, spk1):
    spk1, mem1 = self.lif1(self.fc1(x_t), mem1)
    spk1, mem1 = self.lif1(spk1, mem1)
    return Net.step(self, t, spk1, mem1, mem2, spk1)


def zeros_of_the_inputs_shape(self, x):
    steps, batch, _ = x.shape
    mem1, mem2 = torch.zeros(batch, 3, device=x.device, dtype=x.dtype), torch.zeros((batch, 2))
    record = torch.zeros(steps, batch, 2)
    for t in range(steps):
        record[t], mem1, mem2, _ = self.step(t, x[t], mem1, mem2, None)
    return record


def time_last(self, x):
    mem1, mem2, spikes = None, None, []
    x = x.permute(1, 2, 0)
    for t in range(x.shape[-1]):
        spk2, mem1, mem2, _ = self.step(t, x[..., t], mem1, mem2, None)
        spikes.append(spk2)
    return torch.stack(spikes, dim=-1).mean(-1)


def enumerated(self, x):
    mem1, mem2, record, hidden = None, None, {"spk": [], "last": None}, 0
    for t, x_t in enumerate(x.transpose(0, 1).transpose(1, 0)):
        spk2, mem1, mem2, spk1 = self.step(t, x_t.view(x_t.size(0), -1).float(), mem1, mem2, None)
        hidden += spk1
        record["spk"].append(spk2.unsqueeze(0))
        record["last"] = spk2
    return {"spk": torch.cat(record["spk"]), "last": record["last"], "rate": hidden / len(x)}


def scores(self, x):
    mem1, mem2, spikes = None, None, []
    for t in range(x.size(0)):
        spk2, mem1, mem2, _ = self.step(t, x.select(0, t), mem1, mem2, None)
        spikes += [spk2]
    out = torch.stack(spikes)
    return nn.functional.log_softmax(out.sum(0) / out.shape[0], dim=1), out.max(0)[0], torch.stack(spikes[2:]), out[-1]


def layer_by_layer(self, x):
    mem1, mem2, hidden, spikes = None, None, [], []
    current = self.fc1(x)
    for t in range(4):
        spk1, mem1 = self.lif1(current[t], mem1)
        hidden.append(spk1)
    current = self.fc2(torch.stack(hidden))
    for t in range(4):
        spk2, mem2 = self.lif2(current[t], mem=mem2)
        spikes.append(spk2)
    return torch.stack(spikes)


def states_kept_as_attributes(self, x):
    self.mem1, self.mem2, out = self.lif1.reset_mem(), self.lif2.reset_mem(), []
    for t in range(4):
        spk1, self.mem1 = self.lif1(self.fc1(x[t]), self.mem1)
        spk2, self.mem2 = self.lif2(self.fc2(spk1), self.mem2)
        out.append(spk2)
    return torch.stack(out)


def counted_as_it_goes(self, x):
    mem1, mem2, count, counts = None, None, torch.zeros(x.shape[1], 2), []
    for t in range(4):
        spk2, mem1, mem2, _ = self.step(t, x[t], mem1, mem2, None)
        count = count + spk2
        counts.append(count)
    return torch.stack(counts)


@pytest.mark.parametrize(
    "forward",
    [
        zeros_of_the_inputs_shape, time_last, enumerated, scores, layer_by_layer, states_kept_as_attributes,
        counted_as_it_goes,
    ],
)  # fmt: skip
def test_ways_to_write_a_loop(forward):
    """With the source's own neurons, that is, before they are replaced."""

    class Written(Net):
        pass

    Written.forward = forward
    net, x = Written(), 4 * torch.randn(4, 5, 3)
    nn.init.uniform_(net.fc2.weight, 0, 2)  # so that the last layer fires
    ours = rolled(net, x)
    assert sum(n.op == "call_module" for n in ours.graph.nodes) == 4
    theirs = tensors(net(x))
    assert theirs[0].detach().abs().sum() > 0
    for one, other in zip(tensors(ours(x)), theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


class TestRefusals:
    @pytest.mark.parametrize(
        ("step", "layers", "message"),
        [
            (constant_at_step_2, {}, r"lif1: step 2 is not like step 0: mul\(...\) has 3.0 where it had 2.0"),
            (tensor_constant_at_step_2, {}, r"lif1: step 2 is not like step 0: '_tensor_constant\w*' stands where"),
            (op_at_step_1, {}, r"lif1: step 1 is not like step 0: tanh\(...\) stands where relu\(...\) was"),
            (recurrent, {}, r"lif1: at step 1 its input depends on what 'lif1' put out at another step"),
            (delayed, {}, r"lif2: .*(step 0|another step)"),
            (membrane_onwards, {}, r"lif1: its membrane feeds 'lif2', but without its reset"),
            (membrane_to_an_integrator, {"li": snntorch.Leaky(beta=0.5, reset_mechanism="none")},
             r"lif1: its membrane feeds 'li', but without its reset"),
            (membrane_halved, {}, r"lif1: its state 'mem' is not passed on unchanged .* but comes from mul"),
            (membranes_swapped, {}, r"lif1: its state 'mem' is not passed on unchanged from its own last step"),
            (normed, {"norm": nn.BatchNorm1d(3)}, r"norm: normalized with .* pass accept=\('batch_statistics',\)"),
            (norm_of_each_step, {"norms": nn.ModuleList(map(nn.BatchNorm1d, [3] * 4))},
             r"lif1: step 1 is not like step 0: layer 'norms.1' stands where"),
            (across_the_batch, {}, r"mean\w* \(mean\) does not give on T·N samples at once what it gives step by step"),
            (rows_of_the_batch, {}, r"chunk\w* \(chunk\) does not give on T·N samples at once"),
            (branching, {}, r"steps cannot be read from its code: .*control flow"),
            (detached, {}, r"lif1: its state 'mem' is not passed on unchanged .* but comes from detach"),
            (twice, {}, r"different numbers of steps \('lif2' 4, 'lif1' 12\)"),
        ],
    )  # fmt: skip
    def test_steps(self, step, layers, message):
        net = changed(step, **layers)
        with pytest.raises(ConversionError, match=message):
            converted(net, torch.randn(4, 2, 3))

    def test_a_constant_example_hides_nothing(self):
        with pytest.raises(RollUpError, match="mixes the samples of a batch"):
            converted(changed(across_the_batch), torch.zeros(4, 2, 3))

    def test_what_is_no_reason_to_refuse(self):
        net, x = changed(split_and_joined), 3 * torch.randn(4, 2, 3)
        net.scale = nn.Parameter(torch.tensor([2.0, 1.0, 1.0, 1.0]))
        torch.testing.assert_close(rolled(net, x)(x), net(x))
        net = changed(threshold_read)
        assert converted(net, x)(x).shape == (4, 2, 2)

    def test_states_from_elsewhere(self):
        class Given(Net):
            def forward(self, x, mem1, mem2):
                spikes = []
                for t in range(4):
                    spk2, mem1, mem2, _ = self.step(t, x[t], mem1, mem2, None)
                    spikes.append(spk2)
                return torch.stack(spikes)

        x = torch.randn(4, 2, 3)
        ours = converted(Given(), x, torch.zeros(2, 3), torch.zeros(2, 2))
        assert ours(x).shape == (4, 2, 2)
        with pytest.raises(RollUpError, match=r"'mem2' carries a state in that is not zero; .* give zeros, or nothing"):
            converted(Given(), x, torch.zeros(2, 3), torch.ones(2, 2))

        class Learned(Given):
            def __init__(self):
                super().__init__()
                self.start = nn.Parameter(torch.zeros(3))

            def forward(self, x):
                return super().forward(x, self.start, None)

        with pytest.raises(RollUpError, match="start: a state that starts from other values than zeros"):
            converted(Learned(), x)

        class Seen(nn.Sequential):
            def forward(self, x, mem):
                spk, after = self[0](x + mem, mem)
                return spk, after

        with pytest.raises(RollUpError, match="'mem' carries a state in, and is used by add"):
            converted(Seen(snntorch.Leaky(beta=0.5)), x, torch.zeros(4, 2, 3))

    def test_random_numbers_of_a_fixed_shape(self):
        class Coded(Net):
            def forward(self, x):
                return super().forward((torch.rand(4, 2, 3) < x).float())

        with pytest.raises(ConversionError, match=r"draws random numbers of a fixed shape, .*torch\.rand_like"):
            converted(Coded(), torch.rand(4, 2, 3))

    def test_time_backwards(self):
        class Backwards(Net):
            def forward(self, x):
                mem1, mem2, spikes = None, None, []
                for t in range(4):
                    spk2, mem1, mem2, _ = self.step(t, x[3 - t], mem1, mem2, None)
                    spikes.append(spk2)
                return torch.stack(spikes)

        net, x = Backwards(), 3 * torch.randn(4, 2, 3)
        wanted = net(x)
        assert torch.equal(rolled(net, x)(x), wanted)

    def test_batch_statistics_are_accepted_if_asked_for(self):
        net = changed(normed, norm=nn.BatchNorm1d(3))
        x = torch.randn(4, 2, 3)
        ours = converted(net, x, accept=("batch_statistics",))
        ours(x)
        assert int(ours.norm.num_batches_tracked) == 1
        assert int(net.norm.num_batches_tracked) == 0
        for wrong in (("all",), "batch_statistics"):
            with pytest.raises(ValueError, match=r"accept is a tuple of 'batch_statistics', found '"):
                converted(net, x, accept=wrong)

    def test_a_layer_that_remembers(self):
        net = changed(lambda self, t, x, a, b, c: Net.step(self, t, self.norm(x)[0], a, b, c), norm=nn.GRU(3, 3))
        with pytest.raises(RollUpError, match="norm: a GRU in a loop over steps already runs over time"):
            converted(net, torch.randn(4, 2, 3))

    def test_hooks(self):
        net = Net()
        net.register_forward_hook(lambda *a: None)
        with pytest.raises(ConversionError, match="Net has hooks or a forward of its own"):
            converted(net, torch.randn(4, 2, 3))
        block = norse.SequentialState(nn.Linear(3, 3), norse.LIFCell())
        block.register_forward_hook(lambda *a: None)
        with pytest.raises(ConversionError, match=r"0.1: 0 \(SequentialState\) runs its own code \(it has hooks"):
            converted(norse.SequentialState(block, nn.Linear(3, 3), norse.LIFCell()), torch.randn(4, 2, 3))

    def test_training_that_differs(self):
        def step(self, t, x_t, *rest):
            return Net.step(self, t, nn.functional.dropout(x_t, 0.5, self.training), *rest)

        with pytest.raises(
            ConversionError, match=r"differs between training and evaluation; use layers \(torch.nn.Dropout"
        ):
            converted(changed(step), torch.randn(4, 2, 3))

    def test_examples(self):
        net = Net()
        with pytest.raises(ValueError, match=r"give convert an example, the whole sequence \(T, N, \*\)"):
            mfpsn_fx.convert(net)
        with pytest.raises(ConversionError, match="use an example of at least two steps"):
            converted(net, torch.randn(1, 2, 3))
        with pytest.raises(TypeError, match=r"the example does not fit Net\.forward"):
            converted(net, torch.randn(4, 2, 3), torch.randn(4, 2, 3))
        with pytest.raises(ConversionError, match=r"does not run on an example of shape \(4, 2, 5\)"):
            converted(net, torch.randn(4, 2, 5))
        one_step = nn.Sequential(nn.Linear(3, 3), snntorch.Leaky(beta=0.5, init_hidden=True))
        with pytest.raises(ConversionError, match=r"input has shape \(3,\), but .* the whole sequence, \(T, N, \*\)"):
            converted(one_step, torch.randn(2, 3))
        with pytest.raises(ValueError, match="inplace=True is not possible: Net steps through time"):
            converted(net, torch.randn(4, 2, 3), inplace=True)
        longer = torch.randn(5, 2, 3)
        with pytest.raises(ValueError, match=r"loop over 4 steps, but dim 0 of its input has 5: convert it again"):
            converted(net, torch.randn(4, 2, 3))(longer)

    def test_neurons_that_are_no_filters_are_named(self):
        class Recurrent(nn.Module):
            def __init__(self):
                super().__init__()
                self.lif = snntorch.RLeaky(beta=0.5, linear_features=3)

            def forward(self, x):
                spk, mem = self.lif.init_rleaky()
                out = []
                for t in range(4):
                    spk, mem = self.lif(x[t], spk, mem)
                    out.append(spk)
                return torch.stack(out)

        with pytest.raises(ConversionError, match="lif: its spikes feed back into it"):
            converted(Recurrent(), torch.randn(4, 2, 3))

    @pytest.mark.parametrize("shape", [(4,), (4, 1), (1, 4, 1)])
    def test_parameters_of_other_dims_than_channels(self, shape):
        """On images whose height and width are as many as their channels: only the place tells them apart."""
        x = torch.randn(3, 2, 1, 4, 4)
        leaky = snntorch.Leaky(beta=torch.linspace(0.1, 0.9, 4).reshape(shape), init_hidden=True)
        with pytest.raises(
            RollUpError, match=r"1: its beta of shape .* broadcasts along dim [23] .* give it as \(4, 1, 1\)"
        ):
            converted(nn.Sequential(nn.Conv2d(1, 4, 1), leaky), x)
        cell = norse.LIFBoxCell(norse.LIFBoxParameters(v_th=torch.linspace(0.1, 0.9, 4).reshape(shape)))
        with pytest.raises(
            RollUpError, match=r"1: its v_th of shape .* broadcasts along dim [23] .* give it as \(4, 1, 1\)"
        ):
            converted(norse.SequentialState(nn.Conv2d(1, 4, 1), cell), x)

    def test_parameters_of_channels(self):
        thresholds = torch.linspace(0.1, 0.9, 4)
        cell = norse.LIFBoxCell(norse.LIFBoxParameters(v_th=thresholds.reshape(4, 1, 1)))
        model = converted(norse.SequentialState(nn.Conv2d(1, 4, 1), cell), torch.randn(3, 2, 1, 4, 4))
        (neuron,) = (m for m in model.modules() if isinstance(m, MulFreePSN))
        torch.testing.assert_close(neuron.source.threshold.float(), thresholds)

    def test_random_whole_numbers_are_drawn_at_every_step(self):
        class Draws(nn.Module):
            def __init__(self):
                super().__init__()
                self.lif = snntorch.Leaky(beta=0.5)

            def forward(self, x):
                mem, spikes = None, []
                for _ in range(6):
                    spike, mem = self.lif(3.0 * torch.randint_like(x, 0, 2), mem)
                    spikes.append(spike)
                return torch.stack(spikes)

        spikes = rolled(Draws(), torch.rand(3, 40))(torch.rand(3, 40))
        assert not all(torch.equal(spikes[0], later) for later in spikes[1:])

    def test_decay_of_the_last_dim(self):
        net = nn.Sequential(nn.Conv2d(1, 2, 3), snntorch.Leaky(beta=torch.tensor([0.5, 0.6]), init_hidden=True))
        with pytest.raises(ConversionError, match=r"beta of shape \(2,\) broadcasts along dim 3 .* as \(2, 1, 1\)"):
            converted(net, torch.randn(4, 2, 1, 4, 4))
        net[1] = snntorch.Leaky(beta=torch.tensor([0.5, 0.6]).reshape(2, 1, 1), init_hidden=True)
        ours = converted(net, torch.randn(4, 2, 1, 4, 4))
        torch.testing.assert_close(ours.get_submodule("1").weight[:, 0], torch.tensor([0.5, 0.6]))


class Unseen(nn.Module):
    """A loop with something in it that its graph does not show."""

    def __init__(self, what, **options):
        super().__init__()
        torch.manual_seed(0)
        self.what = what
        self.fc1, self.lif1 = nn.Linear(3, 6), snntorch.Leaky(beta=0.9, **options)
        self.fc2, self.lif2 = nn.Linear(6, 4), snntorch.Leaky(beta=0.8, **options)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        mem1 = torch.zeros_like(self.fc1(x[0]))
        mem2, spikes, total, count = None, [], 0.0, 0.0
        if self.what == "start":
            mem1.fill_(0.7)
        for t in range(x.shape[0]):
            current = self.fc1(x[t])
            if self.what == "method":
                current.mul_(0.2)
            elif self.what == "layer":
                self.act(current)
            spike, mem1 = self.lif1(current, mem1)
            if self.what == "membrane":
                mem1.mul_(0.5)
            spike, mem2 = self.lif2(self.fc2(spike), mem2)
            total += spike
            count = count + (spike > 0.5)
            spikes.append(total if self.what == "alias" else spike)
        if self.what == "dtype":
            return count
        out = torch.stack(spikes)
        if self.what == "view":
            return torch.cat(spikes).view(x.shape[0], x.shape[1], -1).mean(0)
        return out / x.shape[1] if self.what == "quotient" else out


class Kept(nn.Module):
    """One step; what it keeps in an attribute is no state of a neuron."""

    def __init__(self, what):
        super().__init__()
        torch.manual_seed(0)
        self.what, self.before, self.steps = what, None, 0
        self.fc, self.back = nn.Linear(3, 6), nn.Linear(6, 6)
        self.lif = snntorch.Leaky(beta=0.9, init_hidden=True)

    def forward(self, x):
        current = self.fc(x)
        if self.what == "recurrent" and self.before is not None:
            current = current + self.back(self.before)
        if self.what == "counter":
            self.steps += 1
            current = current * self.steps
        self.before = self.lif(current)
        return self.before


class TestWhatTheGraphDoesNotShow:
    @pytest.mark.parametrize("what", ["start", "method", "layer", "membrane", "alias"])
    def test_loops(self, what):
        with pytest.raises(RollUpError, match="Unseen rolled up over time does not give what its own code gives"):
            converted(Unseen(what), torch.randn(4, 2, 3))

    def test_a_count_of_booleans(self):
        net, x = Unseen("dtype"), 3 * torch.randn(4, 2, 3)
        wanted = net(x)
        assert wanted.dtype == torch.float32
        assert torch.equal(rolled(net, x)(x), wanted)

    @pytest.mark.parametrize("what", ["recurrent", "counter"])
    def test_attributes_of_one_step(self, what):
        with pytest.raises(RollUpError, match="Kept rolled up over time does not give what its own code gives"):
            converted(Kept(what), torch.randn(4, 2, 3))

    @pytest.mark.parametrize("what", ["view", "quotient"])
    def test_the_batch_size_as_a_number(self, what):
        with pytest.raises(RollUpError, match="gives something else than its own code for batches of another size"):
            converted(Unseen(what), torch.randn(4, 2, 3))

    @pytest.mark.parametrize("what", ["view", "zeros", "rows"])
    def test_a_batch_size_from_before_the_loop(self, what, caplog):
        class Images(nn.Module):
            def __init__(self):
                super().__init__()
                self.fc, self.lif = nn.Linear(4, 3), snntorch.Leaky(beta=0.9)

            def forward(self, x):
                mem, spikes = None, []
                # rows: (T, N, 2, 2), whose first dim is not N
                x = x.view(3, x.size(1), -1) if what == "rows" else x.view(x.size(0), -1)
                if what == "zeros":
                    x = x + torch.zeros(x.size(0), 4)
                for t in range(3):
                    spike, mem = self.lif(self.fc(x[t] if what == "rows" else x), mem)
                    spikes.append(spike)
                return torch.stack(spikes)

        shape = (3, 5, 2, 2) if what == "rows" else (5, 2, 2)
        model = converted(Images(), torch.randn(shape))
        assert model(torch.randn(shape)).shape == (3, 5, 3)
        told = "Images: the converted network takes batches of the example's size alone" in caplog.text
        assert told == (what == "zeros")
        if what == "view":
            assert model(torch.randn(7, 2, 2)).shape == (3, 7, 3)

    def test_neurons_that_nobody_described(self):
        class Own(snntorch.Leaky):
            pass

        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.own, self.lif = Own(beta=0.9), snntorch.Leaky(beta=0.9)

            def forward(self, x):
                first, second, spikes = None, None, []
                for t in range(3):
                    spike, first = self.own(x[t], first)
                    spike, second = self.lif(spike, second)
                    spikes.append(spike)
                return torch.stack(spikes)

        with pytest.raises(ConversionError, match=r"own: .*Own has no adapter"):
            converted(Net(), torch.randn(3, 2, 4))

    def test_without_any_of_it(self, caplog):
        model = converted(Unseen(""), torch.randn(4, 2, 3))
        assert model(torch.randn(4, 7, 3)).shape == (4, 7, 4)
        assert "size alone" not in caplog.text

    def test_layers_that_mix_samples_behind_a_dropout(self):
        layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.1)
        net = nn.Sequential(layer, nn.Linear(4, 3), snntorch.Leaky(beta=0.9, init_hidden=True))
        with pytest.raises(RollUpError, match=r"layer '0' does not give on T·N samples at once"):
            converted(net, torch.randn(4, 2, 5, 4))


class TestNetworks:
    """The tutorials' networks: as the source says before neurons are replaced, and trainable after."""

    @staticmethod
    def listed(name):
        return next(n for n in NETWORKS if n.name == name)

    @pytest.mark.parametrize("name", [n.name for n in NETWORKS if not n.refusal])
    def test_rolled_up_is_the_source(self, name):
        """With the source's own neurons, resets and all, one after the other over time."""
        network = self.listed(name)
        model = network.build().eval()
        split_inner_layers(model)
        args = network.example()
        example = dict(zip(inspect.signature(model.forward).parameters, args, strict=False))
        unrolled, one_step = capture_steps(model, args)
        ours = RollUp(one_step=one_step)(unrolled, PassContext(Example(args))).graph_module(*args)
        with torch.no_grad():
            theirs = steps_by_hand(model, example) if one_step else model(*args)
        compare(ours, theirs, model)

    @pytest.mark.parametrize("name", [n.name for n in NETWORKS if not n.refusal])
    def test_converts_and_trains(self, name):
        network = self.listed(name)
        model, args = network.build(), network.example()
        model(*(args if "one step" not in name and "stepped" not in name else [a[0] for a in args]))  # leaves states
        before = {key: value.clone() for key, value in model.state_dict().items()}
        ours = converted(model, *args)
        assert before.keys() == model.state_dict().keys()
        assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
        out = ours(*args)
        sum(o.square().mean() for o in tensors(out)).backward()
        for path, m in ours.named_modules():
            if isinstance(m, MulFreePSN):
                assert m.weight.grad is not None, path
                assert bool(m.weight.grad.isfinite().all()), path
        assert mfpsn_fx.selection(ours).unconverted == ()

    @pytest.mark.parametrize(
        "name",
        [
            "convolutional Leaky, loop over a sequence",
            "Sequential with init_hidden, stepped by the caller",
            "SequentialState with Lift",
            "fully connected LIFCell, loop over a sequence",
        ],
    )
    def test_compiles_without_breaks(self, name):
        network = self.listed(name)
        args = network.example()
        ours = converted(network.build(), *args).eval()
        compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
        for one, other in zip(tensors(compiled(*args)), tensors(ours(*args)), strict=True):
            torch.testing.assert_close(one, other)

    @pytest.mark.parametrize("name", [n.name for n in NETWORKS if n.refusal])
    def test_refusals(self, name):
        network = self.listed(name)
        with pytest.raises(ConversionError, match=network.refusal):
            converted(network.build(), *network.example())


def tensors(structure):
    return [leaf for leaf in tree_leaves(structure) if isinstance(leaf, torch.Tensor)]


def steps_by_hand(model, example):
    """What a training loop does: call the model step by step, states in and out."""
    for m in model.modules():
        if hasattr(m, "reset_mem"):
            m.reset_mem()
    (x,) = example.values()
    outputs, states = [], ()
    for step in x:
        out = model(step, *states)
        if isinstance(model, norse.SequentialState):
            states = (out[1],)
        elif len(inspect.signature(model.forward).parameters) > 1:
            states = out[1:]
        outputs.append(out[0] if isinstance(out, tuple) else out)
    return torch.stack(outputs)


def compare(ours, theirs, model):
    """Spikes to the bit; a membrane that is read out beside spikes has lost its reset, and is left out."""
    (first, *rest), (expected, *_) = tensors(ours), tensors(theirs)
    torch.testing.assert_close(first, expected, rtol=1e-4, atol=1e-5)
    assert all(other.isfinite().all() for other in rest)


class TestConverted:
    def test_state_arguments_are_gone(self):
        network = TestNetworks.listed("Leaky and Lapicque, one step a call")
        (x,) = network.example()
        ours = converted(network.build(), x)
        spikes, *states = ours(x)
        assert spikes.shape == (*x.shape[:2], 5)
        assert states == [None, None]
        assert [n.target for n in ours.graph.nodes if n.op == "placeholder"] == ["x"]
        assert ours(torch.randn(7, 5, 16))[0].shape == (7, 5, 5)  # one step a call knows no number of steps
        with pytest.raises(TypeError):
            ours(x, torch.zeros(3, 12))
        given = converted(network.build(), x, torch.zeros(3, 12), torch.zeros(3, 5))
        assert [n.target for n in given.graph.nodes if n.op == "placeholder"] == ["x"]

    def test_other_batch_sizes(self):
        network = TestNetworks.listed("convolutional Leaky, loop over a sequence")
        ours = converted(network.build(), *network.example()).eval()
        (x,) = network.example()
        wide = torch.cat([x, x, x], 1)
        torch.testing.assert_close(ours(wide), torch.cat([ours(x)] * 3))

    def test_a_shared_neuron_becomes_two(self):
        """One module at two places of a step, a state for each: each use is a neuron of its own."""

        def step(self, t, x_t, mem1, mem2, spk1):
            spk1, mem1 = self.lif1(self.fc1(x_t), mem1)
            spk2, mem2 = self.lif1(self.fc2(spk1), mem2)
            return spk2, mem1, mem2, spk1

        ours = converted(changed(step), torch.randn(4, 2, 3))
        assert [row.layer for row in mfpsn_fx.selection(ours).rows] == ["lif1", "lif1@2"]

    def test_rate_coding_draws_at_every_step(self):
        class Coded(nn.Module):
            def __init__(self):
                super().__init__()
                self.lif = snntorch.Leaky(beta=0.5)

            def forward(self, x):
                mem, spikes = None, []
                for _ in range(50):
                    spk, mem = self.lif(2 * torch.bernoulli(x), mem)
                    spikes.append(spk)
                return torch.stack(spikes)

        x = torch.full((2, 3), 0.5)
        ours = rolled(Coded(), x)
        assert [n.target.__name__ for n in ours.graph.nodes if n.op == "call_function"][:2] == [
            "repeat_in_time",
            "fold_time",
        ]
        rate = ours(x).flatten(1)
        assert len({tuple(step.tolist()) for step in rate}) > 10  # the steps draw for themselves
        assert 0.2 < float(rate.mean()) < 0.8

    def test_written_step_by_step_into_a_tensor(self):
        def forward(self, x):
            out, mem1, mem2 = torch.empty(4, 2, 2), None, None
            for t in range(4):
                out[t], mem1, mem2, _ = self.step(t, x[t], mem1, mem2, None)
            return out

        class Written(Net):
            pass

        Written.forward = forward
        net, x = Written(), 3 * torch.randn(4, 2, 3)
        assert torch.equal(rolled(net, x)(x), net(x))

        def backwards(self, x):
            out, mem1, mem2 = torch.empty(4, 2, 2), None, None
            for t in range(4):
                out[3 - t], mem1, mem2, _ = self.step(t, x[t], mem1, mem2, None)
            return out

        Written.forward = backwards
        net = Written()
        wanted = net(x)  # before anything leaves a state in it
        assert torch.equal(rolled(net, x)(x), wanted)

    def test_membranes_beside_spikes_lose_their_reset_with_a_warning(self, caplog):
        network = TestNetworks.listed("fully connected Leaky, loop over a constant input")
        ours = converted(network.build(), *network.example())
        assert "lif2: its membrane is read out without its reset" in caplog.text
        assert isinstance(ours.get_submodule("lif2_membrane"), LeakyIntegrator)
        table = mfpsn_fx.selection(ours)
        assert table.readouts == (("lif2_membrane", "Geometric"),)
        assert "reads out a membrane, without reset: lif2_membrane (LeakyIntegrator, Geometric)" in str(table)
        assert mfpsn_fx.Selection.from_json(table.to_json()) == table

    @pytest.mark.parametrize("name", ["Leaky and Lapicque, one step a call", "SequentialState with Lift"])
    def test_time_last_and_calibrated(self, name):
        network = TestNetworks.listed(name)
        (x,) = network.example()
        ours = converted(network.build().eval(), x, layout="time_last", calibrate=[x, *network.example()]).eval()
        assert {row.layout for row in mfpsn_fx.selection(ours).rows} == {"time_last"}
        plain = copy.deepcopy(ours)
        mfpsn_fx.plan(plain, x, layout="time_first", kernels="shifted-add", repeats=1, progress=False)
        torch.testing.assert_close(tensors(ours(x))[0], tensors(plain(x))[0])

    @pytest.mark.parametrize("name", ["membrane readout", "fully connected Leaky, loop over a constant input"])
    def test_source_checkpoints(self, name):
        """Loaded into the converted network, they give what converting the checkpoint's own network gives."""
        network = TestNetworks.listed(name)
        args = network.example()
        trained = network.build()
        with torch.no_grad():
            for p in trained.parameters():
                p.mul_(0.9)
        ours, wanted = converted(network.build(), *args), converted(trained, *args)
        mfpsn_fx.load_source_checkpoint(ours, trained.state_dict(), *args, source=network.build())
        for one, other in zip(tensors(ours.eval()(*args)), tensors(wanted.eval()(*args)), strict=True):
            torch.testing.assert_close(one, other)

    def test_notes(self):
        network = TestNetworks.listed("LeakyParallel")
        ours = converted(network.build(), *network.example())
        rows = mfpsn_fx.selection(ours).rows
        assert [row.layer for row in rows] == ["0.1", "1.1"]
        assert all(row.notes == ("ReLU on its membrane dropped",) for row in rows)

    def test_copies_and_checkpoints(self):
        net, x = Net(), torch.randn(4, 2, 3)
        ours = converted(net, x).eval()
        for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            assert torch.equal(other(x), ours(x))
            assert [n.target for n in other.graph.nodes] == [n.target for n in ours.graph.nodes]
        layers = {k: v for k, v in ours.state_dict().items() if k.startswith("fc")}
        assert layers.keys() == {k for k in net.state_dict() if k.startswith("fc")}
        assert all(torch.equal(v, net.state_dict()[k]) for k, v in layers.items())

    def test_the_first_steps_of_a_longer_sequence(self):
        def forward(self, x):
            mem1, mem2, spk2 = None, None, None
            for t in range(3):
                spk2, mem1, mem2, _ = self.step(t, x[t], mem1, mem2, None)
            return spk2

        class First(Net):
            pass

        First.forward = forward
        net, x = First(), 3 * torch.randn(5, 2, 3)
        assert torch.equal(rolled(net, x)(x), net(x))

    def test_lifted_cells_and_voltages(self):
        """Lift around a cell returns its spikes over time; the voltage of a cell is read from its state."""

        class Lifted(nn.Module):
            def __init__(self):
                super().__init__()
                self.fc, self.lif, self.cell = nn.Linear(3, 3), norse.Lift(norse.LIFCell()), norse.LIFCell()

            def forward(self, x):
                z, _ = self.lif(self.fc(x))
                state, voltages = None, []
                for t in range(4):
                    _, state = self.cell(z[t], state)
                    voltages.append(state.v)
                return z, torch.stack(voltages)

        net, x = Lifted(), 50 * torch.randn(4, 2, 3)
        ours, theirs = rolled(net, x), net(x)
        assert torch.equal(ours(x)[0], theirs[0])
        assert theirs[0].sum() > 0
        # without its reset: the same until it first fires, which it does at no step here
        torch.testing.assert_close(ours(x)[1], theirs[1])
        assert isinstance(ours.cell, LeakyIntegrator)
        assert [row.layer for row in mfpsn_fx.selection(converted(net, x)).rows] == ["lif.lifted_module"]

    def test_unconverted_neurons_run_over_time(self):
        """With strict=False what is no filter stays, and steps through the sequence inside its wrapper."""
        net = nn.Sequential(
            nn.Linear(3, 3),
            snntorch.Leaky(beta=0.5, init_hidden=True, inhibition=True),
            nn.Linear(3, 2),
            snntorch.Leaky(beta=0.5, init_hidden=True),
        )
        x = torch.randn(4, 2, 3)
        ours = converted(net, x, strict=False)
        ((path, why),) = mfpsn_fx.selection(ours).unconverted
        assert path == "1"
        assert "suppress each other" in why
        assert ours(x).shape == (4, 2, 2)


def test_the_manual():
    """docs/guide/stepped_networks.md: what it shows runs, and the graph after is the one that it prints."""
    text = (FOLDER.parent.parent / "docs" / "guide" / "stepped_networks.md").read_text(encoding="utf-8")
    names: dict = {}
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    for block in blocks:
        exec(compile(block, "docs/guide/stepped_networks.md", "exec"), names)
    unregister_stepping("mypackage.MyCell")
    graph = text.split("```\n")[2]
    printed = re.findall(r"^.{55}%(\w+) : ", graph, flags=re.MULTILINE)
    kept = rolled(names["Net"](), names["x"]).graph.nodes  # before layouts are chosen, which measuring does
    assert printed == [n.name for n in kept if n.op != "output"]
    unrolled, _ = capture_steps(names["Net"](), (names["x"],))
    left = re.findall(r"^%(\w+) : ", graph, flags=re.MULTILINE)
    met = [n.name for n in unrolled.graph.nodes if n.op not in ("output", "get_attr") and n.users]
    assert left == met
