"""All of SpikingJelly: its neurons against our filters, its step modes, attention heads, models and tools."""

from __future__ import annotations

import copy
import importlib.util
import math
import pickle
import sys
import types

import pytest
import torch
from spikingjelly.activation_based import functional, layer, model, neuron, surrogate
from spikingjelly.activation_based.model import sew_resnet, spiking_resnet
from torch import nn
from torch.nn.utils import parametrize

import mfpsn_fx
from mfpsn_fx import ConversionError, MulFreePSN, NotAFilterError, TwoPole
from mfpsn_fx.kernels import Layout
from mfpsn_fx.model.channel_dims import channels_back, channels_together, check_dims, shape_together
from mfpsn_fx.model.sources.description import describe, looks_like_a_neuron
from mfpsn_fx.passes import neurons

STEPS = 8


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def compatibility(script):
    return script("examples/compatibility/report.py")


def quick(net, *example, **options):
    """Converted without measuring every kernel."""
    return mfpsn_fx.convert(
        net, *example, **{"kernels": "shifted-add", "layout": "time_first", "repeats": 1, "progress": False, **options}
    )


def potential(source, x: torch.Tensor) -> torch.Tensor:
    """Σ_j response(j)·x[t−j] − threshold, in float64."""
    taps = source.response(torch.arange(len(x)))
    taps = taps if taps.ndim == 2 else taps.expand(x.shape[2], -1)
    h = torch.stack([sum(taps[:, j] * x[t - j] for j in range(t + 1)) for t in range(len(x))])
    return h - source.threshold


def first_spikes(spikes: torch.Tensor) -> torch.Tensor:
    """Up to each neuron's first spike nothing was reset: there a source is what its filter says."""
    return (spikes.cumsum(0) - spikes == 0) & (spikes > 0)


def test_two_pole_is_its_recursion():
    gain, current, membrane = torch.tensor([1.0, 0.3]), torch.tensor([0.9, 0.5]), torch.tensor(0.5)
    for delay in (0, 1, 3):
        response = TwoPole(gain, current, membrane, delay)(torch.arange(12))
        i = v = torch.zeros(2, dtype=torch.float64)
        currents, expected = [], []
        for t in range(12):
            i = current.double() * i + (t == 0)
            currents.append(i)
            v = membrane.double() * v + (gain.double() * currents[t - delay] if t >= delay else 0)
            expected.append(v)
        torch.testing.assert_close(response, torch.stack(expected, -1))
    assert torch.equal(TwoPole(gain, current, membrane)(torch.tensor([5, 0, 2])), TwoPole(gain, current, membrane)(
        torch.arange(6))[:, [5, 0, 2]])  # fmt: skip
    assert TwoPole(gain, current, membrane, 1)(torch.tensor([0])).tolist() == [[0.0], [0.0]]


def klif(k: float, **settings):
    m = neuron.KLIFNode(step_mode="m", **settings)
    m.k.data.fill_(k)
    return m


def folded_mpbn():
    m = neuron.MPBNLIFNode(out_features=3, step_mode="m").double()
    m.vbn.running_mean.copy_(torch.tensor([0.1, -0.2, 0.3]))
    m.vbn.running_var.copy_(torch.tensor([0.5, 2.0, 1.0]))
    m.vbn.weight.data.copy_(torch.tensor([1.0, 0.5, 2.0]))
    m.re_parameterize_v_threshold()
    return m.eval()


def current_based(**settings):
    m = neuron.CUBALIFNode(**settings)
    m.step_mode = "m"
    return m


def flexible():
    def core(x, v):
        h = v + (x - v) / 3.0
        spike = surrogate.heaviside(h - 0.4)
        return spike, h * (1 - spike)

    return neuron.FlexSN(core, 1)


@pytest.mark.parametrize(
    "make",
    [
        lambda: neuron.SimpleIFNode(step_mode="m"),
        lambda: neuron.SimpleIFNode(v_reset=None, step_mode="m"),
        lambda: neuron.SimpleLIFNode(3.0, True, v_threshold=0.5, step_mode="m"),
        lambda: neuron.SimpleLIFNode(3.0, False, step_mode="m"),
        lambda: klif(1.0),
        lambda: klif(1.5, scale_reset=True, tau=3.0),
        lambda: klif(1.5, v_reset=None, decay_input=False, tau=3.0),
        lambda: klif(0.8, v_reset=0.25, scale_reset=True),
        lambda: neuron.ComplementaryLIFNode(tau=3.0, step_mode="m"),
        lambda: current_based(c_decay=0.6, v_decay=0.8),
        lambda: current_based(v_reset=None, v_threshold=1.0),
        lambda: neuron.HalfThresholdIFNode(v_threshold=1.5, step_mode="m"),
        lambda: neuron.ActivationAwareIFNode(torch.tensor([0.5, 1.0, 2.0]), torch.tensor([0.1, 0.0, -0.2]),
                                             channel_dim=1, step_mode="m"),
        lambda: neuron.RAFNode(omega=0.7, step_mode="m"),
        lambda: neuron.MPBNLIFNode(out_features=3, mpbn=False, step_mode="m"),
        folded_mpbn,
        flexible,
    ],
)  # fmt: skip
def test_filters_fire_as_their_neurons_until_the_first_reset(make):
    m = make()
    torch.manual_seed(3)
    # positive inputs: KLIF's ReLU, which the filter lacks, has nothing to do
    x = torch.rand(STEPS, 64, 3, dtype=torch.float64) * torch.linspace(0.1, 4, 64)[:, None]
    with torch.no_grad():
        spikes = m(x)
    source = describe(m)
    h = potential(source, x)
    ours = (h >= 0).double()
    ours[(h.abs() < 1e-6)] = spikes[h.abs() < 1e-6].double()
    silent = spikes.cumsum(0) - spikes == 0  # nothing has been reset yet
    assert torch.equal(spikes[silent].double(), ours[silent])
    assert (first_spikes(spikes).sum((1, 2)) > 0).sum() >= 3  # early ones and late ones
    assert any("reset dropped" in note for note in source.notes)
    lags = torch.arange(5)
    assert torch.equal(pickle.loads(pickle.dumps(source)).response(lags), source.response(lags))


def test_klif_says_that_the_relu_is_dropped():
    assert "ReLU on the membrane dropped" in describe(klif(1.2)).notes
    assert any("rest 0.25 subtracted" in note for note in describe(klif(1.0, v_reset=0.25)).notes)
    with pytest.raises(NotAFilterError, match="its membrane has no resting value"):
        describe(klif(3.0, v_reset=0.25))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: neuron.ILIFNode(step_mode="m"), "it fires integers"),
        (lambda: neuron.TernaryIFNode(step_mode="m"), "it fires -1, 0 and 1"),
        (lambda: neuron.TernaryLIFNode(step_mode="m"), "it fires -1, 0 and 1"),
        (lambda: neuron.STBIFNode(1.0, 4), "it fires -1, 0 and 1"),
        (lambda: neuron.EIFNode(step_mode="m"), "its membrane is exponential"),
        (lambda: neuron.QIFNode(step_mode="m"), "its membrane is quadratic"),
        (lambda: neuron.IzhikevichNode(step_mode="m"), "quadratic and adapts"),
        (lambda: neuron.OTTTLIFNode(), "it trains online"),
        (lambda: neuron.SLTTLIFNode(), "it trains online"),
        (lambda: neuron.LIAFNode(torch.tanh, False, step_mode="m"), "its activation, not spikes"),
        (lambda: neuron.NonSpikingIFNode(), "its membrane, not spikes"),
        (lambda: neuron.NonSpikingLIFNode(), "its membrane, not spikes"),
        (lambda: neuron.DSRIFNode(), "through firing rates"),
        (lambda: neuron.DSRLIFNode(), "through firing rates"),
        (lambda: neuron.ILCIFNode(2, 2), "feed back into its own input"),
        (lambda: neuron.MPBNLIFNode(out_features=3, step_mode="m"), r"re_parameterize_v_threshold\(\)"),
        (lambda: neuron.ActivationAwareIFNode(torch.ones(3), step_mode="m"), "set channel_dim=1"),
        (lambda: neuron.SimpleLIFNode(2.0, True, v_reset=None, step_mode="m"), "its v_reset is None"),
        (lambda: neuron.FlexSN(lambda x, v: (surrogate.heaviside(v + x - 1), v + x + 0.1 * v * v), 1), "linear"),
        (lambda: neuron.FlexSN(lambda x, v: (x + v, v), 1), "other values than 0 and 1"),
        (lambda: neuron.FlexSN(lambda x, y, v: (x * 0, v), 1), "2 inputs and 1 outputs"),
        (lambda: neuron.FlexSN(lambda x, v: (x * 0, v), 1), "did not fire on any probe"),
    ],
)
def test_what_is_no_filter_says_why(make, reason):
    m = make()
    assert looks_like_a_neuron(m)
    with pytest.raises(NotAFilterError, match=reason):
        describe(m)


def test_every_neuron_of_the_library_is_decided():
    """A class that a later version adds fails here until it is taken or refused."""
    bases = {"AdaptBaseNode", "BaseNode", "ILCBaseNode", "MPBNBaseNode", "NoisyBaseNode", "NoisyILCBaseNode",
             "NoisyNonSpikingBaseNode", "NonSpikingBaseNode", "SimpleBaseNode", "FewSpikeTable"}  # fmt: skip
    from mfpsn_fx.model.sources import description as sources

    classes = {
        n: c for n, c in vars(neuron).items() if isinstance(c, type) and c.__module__.startswith(neuron.__name__)
    }
    undecided = [n for n, c in classes.items() if sources.qualified_name(c) not in sources._ADAPTERS]
    assert len(classes) > 40
    assert set(undecided) <= bases


class Stepwise(nn.Module):
    """(N, 1, 8) a step → (N, 3)."""

    def __init__(self, flatten=None):
        super().__init__()
        self.net = nn.Sequential(
            layer.Conv1d(1, 4, 3, padding=1), layer.BatchNorm1d(4), neuron.LIFNode(),
            layer.Flatten() if flatten is None else flatten, layer.Linear(32, 3), neuron.LIFNode(),
        )  # fmt: skip

    def forward(self, x):
        return self.net(x)


class TestStepMode:
    def test_switched_where_stepping_and_running_at_once_agree(self):
        net, x = Stepwise(), torch.randn(STEPS, 2, 1, 8)
        converted = quick(net, x)
        for row in mfpsn_fx.selection(converted).rows:
            assert "step mode 's' switched to 'm'" in row.notes
        assert converted(x).shape == (STEPS, 2, 3)
        assert {m.step_mode for m in net.modules() if hasattr(m, "step_mode")} == {"s"}
        functional.set_step_mode(net, "m")
        told = quick(net, x)
        assert torch.equal(told.eval()(x), converted.eval()(x))
        assert not any("switched" in note for row in mfpsn_fx.selection(told).rows for note in row.notes)

    def test_a_forward_written_for_one_step_is_refused(self):
        class Flattens(Stepwise):
            def forward(self, x):
                return self.net[5](self.net[4](self.net[2](self.net[1](self.net[0](x))).flatten(1)))

        with pytest.raises(ConversionError, match=r"(?s)2 of 2.*net\.2: it is in single-step mode, .*one step"):
            quick(Flattens(), torch.randn(STEPS, 2, 1, 8))

        class Centres(Stepwise):
            def forward(self, x):
                return self.net(x - x.mean(0, keepdim=True))

        with pytest.raises(ConversionError, match="computes something else on the example"):
            quick(Centres(), torch.randn(STEPS, 2, 1, 8))

    def test_layers_of_torch_nn_do_not_follow(self):
        with pytest.raises(ConversionError, match=r"net\.3 \(torch\.nn\.modules\.flatten\.Flatten\) has no step mode"):
            quick(Stepwise(nn.Flatten()), torch.randn(STEPS, 2, 1, 8))

    def test_one_step_is_no_sequence(self):
        with pytest.raises(ConversionError, match=r"the example is no sequence \(T, N, C, \*\)"):
            quick(Stepwise(), torch.randn(2, 1, 8))

    def test_inplace(self):
        net, x = Stepwise(), torch.randn(STEPS, 2, 1, 8)
        with pytest.raises(ValueError, match="unknown kernel"):
            quick(net, x, inplace=True, kernels={"net.2": "nonsense"})
        assert {m.step_mode for m in net.modules() if hasattr(m, "step_mode")} == {"s"}
        assert type(net.net[2]) is neuron.LIFNode
        converted = quick(net, x, inplace=True)
        assert net.net[0].step_mode == "m"
        assert torch.equal(net.eval()(x), converted.eval()(x))

    @pytest.mark.parametrize(
        ("container", "reason"),
        [
            (lambda n: layer.MultiStepContainer(n), "inside a MultiStepContainer, which steps it through time"),
            (lambda n: layer.SeqToANNContainer(n), "inside a SeqToANNContainer, which flattens time into the batch"),
            (lambda n: layer.LinearRecurrentContainer(n, 4, 4, step_mode="m"), "feeds its output back into its input"),
            (lambda n: layer.ElementWiseRecurrentContainer(n, torch.add, step_mode="m"), "feeds its output back"),
        ],
    )
    def test_containers(self, container, reason):
        net = nn.Sequential(layer.Linear(3, 4, step_mode="m"), container(neuron.LIFNode()))
        with pytest.raises(ConversionError, match=rf"1\..*{reason}"):
            quick(net, torch.randn(STEPS, 2, 3))


class TestChannelDims:
    def test_where_they_are_makes_no_difference_to_what_is_computed(self):
        x = torch.randn(STEPS, 2, 3, 4, 5, dtype=torch.float64)
        plain = MulFreePSN(12).double()
        grouped = MulFreePSN(12, channel_dims=(2, 4)).double()
        grouped.load_state_dict(plain.state_dict())
        moved = x.reshape(STEPS, 2, 12, 5).unflatten(2, (3, 4)).transpose(3, 4)  # (T, N, 3, 5, 4)
        expected = plain(x.reshape(STEPS, 2, 12, 5)).unflatten(2, (3, 4)).transpose(3, 4)
        assert torch.equal(grouped(moved), expected)
        assert torch.equal(grouped.running_mean, plain.running_mean)
        last = moved.permute(1, 2, 3, 4, 0)
        grouped.load_state_dict(plain.state_dict())
        torch.testing.assert_close(grouped(last, layout="time_last"), grouped(moved).permute(1, 2, 3, 4, 0))
        with pytest.raises(ValueError, match=r"its channels are dims \(2, 4\)"):
            grouped(torch.randn(STEPS, 2, 12))

    @pytest.mark.parametrize("layout", Layout)
    @pytest.mark.parametrize("dims", [(3,), (2, 3), (4, 2), (4,)])
    def test_back_and_forth(self, layout, dims):
        shape = layout.shape_from((2, 3, 4, 5, 6), "time_first")
        x = torch.arange(720.0).reshape(shape)
        together = channels_together(x, dims, layout)
        assert together.shape == shape_together(shape, dims, layout)
        assert together.shape[layout.shape_from(tuple(range(5)), "time_first").index(2)] == math.prod(
            (2, 3, 4, 5, 6)[d] for d in dims
        )
        assert torch.equal(channels_back(together, dims, layout, shape), x)

    @pytest.mark.parametrize("dims", [1, (2, 2), (), "3", 7, 2.0, True, (2, 1)])
    def test_wrong_ones(self, dims):
        with pytest.raises(ValueError, match="channel dims must be"):
            check_dims(dims, 5)

    def test_convert_takes_them(self):
        net = nn.Sequential(layer.Linear(3, 6, step_mode="m"), neuron.LIFNode(step_mode="m"))
        x = torch.randn(STEPS, 2, 5, 3)  # tokens (T, N, L, C)
        converted = quick(net, x)
        assert converted.get_submodule("1").channels == 5
        assert "if channels are dim 3, give channel_dims={'1': 3}" in " ".join(
            mfpsn_fx.selection(converted).rows[0].notes
        )
        for dim, layout in ((3, "time_first"), (-1, "time_last")):
            converted = quick(net, x, channel_dims={"1": dim}, layout=layout)
            (found,) = neurons(converted)
            assert (found.channels, found.module.channel_dims) == (6, (3,))
            assert mfpsn_fx.selection(converted).rows[0].shape == Layout.parse(layout).shape_from(
                (STEPS, 2, 6, 5), "time_first"
            )
            assert converted(x).shape == (STEPS, 2, 5, 6)
            converted(x).sum().backward()
            compiled = torch.compile(converted.eval(), backend="eager", fullgraph=True)
            assert torch.equal(compiled(x), converted(x))
            assert mfpsn_fx.selection(copy.deepcopy(converted)) == mfpsn_fx.selection(converted)
        with pytest.raises(ValueError, match=r"channel_dims names layers that are no neurons: \['0'\].*\['1'\]"):
            quick(net, x, channel_dims={"0": 3})
        with pytest.raises(ValueError, match=r"1: channel dims must be .* below 4; found 4"):
            quick(net, x, channel_dims={"1": 4})

    def test_attention_heads_are_found(self):
        net = model.Spikformer(T=2, img_size_h=16, img_size_w=16, patch_size=4, num_classes=3, embed_dims=16,
                               num_heads=2, depths=1, mlp_ratio=1.0)  # fmt: skip
        x = torch.rand(2, 2, 3, 16, 16)
        converted = quick(net, x)
        table = {row.layer: row for row in mfpsn_fx.selection(converted).rows}
        (path,) = [name for name in table if name.endswith("attn_lif")]
        assert "dim 2 of its input (2, 2, 2, 8, 16) is not the channels" in " ".join(table[path].notes)
        assert not any("dim 2" in note for name, row in table.items() if name != path for note in row.notes)
        path = path.removeprefix("model.")
        assert f"channel_dims={{'{path}': (2, 3)}}" in " ".join(table[f"model.{path}"].notes)
        converted = quick(net, x, channel_dims={path: (2, 3)})
        assert converted.get_submodule(f"model.{path}").channels == 16
        converted(x).sum().backward()


class TestModels:
    """One of each kind; ``python -m mfpsn_fx compatibility`` examines them all."""

    @pytest.fixture
    def listed(self, compatibility):
        found = compatibility.load_networks()
        return {n.name: n for n in found if n.library == "SpikingJelly"}

    def test_every_public_model_is_listed(self, listed):
        names = " ".join(listed)
        for name in model.__all__:
            assert name.removesuffix("ResNet") in names or name in ("AttMSResNet", "MSResNet", "MaxResNet"), name
        for module in (spiking_resnet, sew_resnet):
            for name in module.__all__:
                assert name in names or name.endswith("ResNet") or "Config" in name or "Builder" in name, name

    @pytest.mark.parametrize("step_mode", ["s", "m"])
    def test_resnets(self, compatibility, step_mode):
        def made():
            if step_mode == "s":
                return spiking_resnet.SpikingResNet(spiking_resnet.BasicBlock, [1] * 4, 3, spiking_neuron=neuron.IFNode)
            net = sew_resnet.SEWResNet(sew_resnet.BasicBlock, [1] * 4, 3, cnf="IAND",
                                       spiking_neuron=neuron.ParametricLIFNode)  # fmt: skip
            functional.set_step_mode(net, "m")
            return net

        x = torch.rand(2, 2, 3, 32, 32)
        outcome = compatibility.examine(compatibility.Network("", "", made, lambda: (x,), OPTIONS), "eager")
        assert outcome.expected, outcome
        assert outcome.captured == "traced"

    @pytest.mark.parametrize("name", ["QKFormer, token", "SpikeDrivenTransformer", "MASNN"])
    def test_untraceable_models_are_leaves_with_the_neurons_inside_converted(self, listed, name):
        network = listed[name]
        converted = quick(network.build(), *network.example())
        rows = mfpsn_fx.selection(converted).rows
        assert len(rows) >= 5
        assert {row.layer.rpartition(".")[2] for row in rows if "not the channels" in " ".join(row.notes)} <= {
            "attn_lif"
        }
        assert all(row.kernel == "shifted-add" and row.forward_ms > 0 for row in rows)
        converted(*network.example()).sum().backward()

    def test_online_models_are_refused(self, compatibility, listed):
        outcome = compatibility.examine(listed["ottt_spiking_vggws"])
        assert outcome.expected
        assert outcome.converted == 0
        assert "it trains online, step by step" in outcome.reason


OPTIONS = {"kernels": "shifted-add", "layout": "time_first"}


def small():
    net = nn.Sequential(layer.Linear(3, 4), neuron.LIFNode(), layer.Linear(4, 2), neuron.LIFNode())
    functional.set_step_mode(net, "m")
    return net


class TestCompatibilityTable:
    def test_rows(self, compatibility, tmp_path, monkeypatch, capsys):
        (tmp_path / "mine_networks.py").write_text(
            "import torch\nfrom torch import nn\nfrom spikingjelly.activation_based import neuron\n"
            "example = lambda: (torch.rand(4, 2, 3),)\n"
            "lif = lambda: nn.Sequential(nn.Linear(3, 3), neuron.LIFNode(step_mode='m'))\n"
            "qif = lambda: nn.Sequential(neuron.QIFNode(step_mode='m'))\n"
            "rows = ('LIF', lif, ''), ('QIF', qif, 'quadratic'), ('wrong', qif, '')\n"
            "NETWORKS = [{'library': 'Mine', 'name': name, 'build': build, 'example': example, 'refusal': refusal}\n"
            "            for name, build, refusal in rows]\n",
            encoding="utf-8",
        )
        monkeypatch.setattr(compatibility.load_networks, "__defaults__", (tmp_path, "*"))
        target = tmp_path / "table.md"
        options = ["--markdown", str(target), "--backend", "eager"]
        assert compatibility.main(["--only", "mine/[lq]if", *options]) == 0
        text = target.read_text(encoding="utf-8")
        assert "## Mine\n" in text
        assert "1 of 2 networks convert whole" in text
        lines = [line for line in text.splitlines() if line.startswith("| Mine")]
        row = [cell.strip() for cell in lines[0].split("|")[1:-1]]
        assert row[:9] == ["Mine", "LIF", "1", "1", "traced", "yes", "yes", "yes", "0"]
        assert "0: its membrane is quadratic" in lines[1]
        # another library's section is kept when one is made anew
        target.write_text(text + "\n## Other\n\nkept\n", encoding="utf-8")
        assert compatibility.main(["--only", "mine/lif", *options]) == 0
        text = target.read_text(encoding="utf-8")
        assert "## Other\n\nkept\n" in text
        assert "1 of 1 networks" in text
        capsys.readouterr()
        assert compatibility.main(["--only", "*wrong"]) == 1
        assert "not as expected: wrong" in capsys.readouterr().err
        assert compatibility.main(["--only", "nothing"]) == 1

    def test_an_empty_folder(self, compatibility, tmp_path):
        with pytest.raises(FileNotFoundError, match="there is no list of networks"):
            compatibility.load_networks(tmp_path)


class TestLivingWithIt:
    """SpikingJelly's own tools on a converted network."""

    def test_reset_and_step_mode(self):
        net, x = small(), torch.rand(STEPS, 2, 3)
        functional.reset_net(net)
        converted = quick(net, x)
        before = converted.eval()(x)
        functional.reset_net(converted)
        functional.set_step_mode(converted, "m")
        functional.detach_net(converted)
        assert torch.equal(converted(x), before)
        # a network that was changed in place must not be reset by the list made before
        inplace = quick(net, x, inplace=True, strict=True)
        functional.reset_net(net)
        assert torch.equal(inplace.eval()(x), before)

    def test_step_mode_s_fails_loudly(self):
        net = nn.Sequential(layer.Conv2d(1, 2, 3), neuron.LIFNode())
        functional.set_step_mode(net, "m")
        x = torch.rand(STEPS, 2, 1, 5, 5)
        converted = quick(net, x)
        functional.set_step_mode(converted, "s")
        with pytest.raises((ValueError, RuntimeError)):
            converted(x)

    @pytest.fixture
    def monitor(self, monkeypatch):
        """SpikingJelly's monitors; their module imports tensorboard for one of them that is not used here."""
        if importlib.util.find_spec("tensorboard") is None:
            stub = types.ModuleType("torch.utils.tensorboard")
            stub.SummaryWriter = None
            monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", stub)
        return importlib.import_module("spikingjelly.activation_based.monitor")

    def test_monitors(self, monitor):
        net, x = small(), torch.rand(STEPS, 2, 3)
        converted = quick(net, x)
        seen = monitor.OutputMonitor(converted, MulFreePSN)
        converted(x)
        assert [tuple(r.shape) for r in seen.records] == [(STEPS, 2, 4), (STEPS, 2, 2)]
        seen.remove_hooks()

    def test_a_monitor_on_the_source_sees_nothing_of_the_conversion(self, monitor):
        net, x = small(), torch.rand(STEPS, 2, 3)
        seen = monitor.OutputMonitor(net, neuron.LIFNode)
        converted = quick(net, x)
        assert seen.records == []
        assert "1 hook not carried over" in " ".join(mfpsn_fx.selection(converted).rows[0].notes)
        net(x)
        assert len(seen.records) == 2
        functional.reset_net(net)
        functional.set_step_mode(net, "s")
        quick(net, x)
        assert len(seen.records) == 2


class TestShapesOfCode:
    def test_one_neuron_at_several_places_becomes_one_for_each(self):
        class Shared(nn.Module):
            def __init__(self, make):
                super().__init__()
                self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 4)
                self.lif = make()

            def forward(self, x):
                return self.lif(self.second(self.lif(self.first(x))))

        x = torch.randn(STEPS, 2, 3)
        converted = quick(Shared(lambda: neuron.LIFNode(step_mode="m")), x)
        assert [row.layer for row in mfpsn_fx.selection(converted).rows] == ["lif", "lif@2"]
        one, two = converted.get_submodule("lif"), converted.get_submodule("lif@2")
        assert one is not two
        assert not torch.equal(one.beta, two.beta)
        assert "lif@2.gamma" in converted.state_dict()
        twin = copy.deepcopy(converted)
        assert torch.equal(twin.eval()(x), converted.eval()(x))
        # a PSN has weights to share, and no state to part
        converted = quick(Shared(lambda: neuron.SlidingPSN(k=2, step_mode="m")), x)
        assert [row.layer for row in mfpsn_fx.selection(converted).rows] == ["lif", "lif@2"]
        assert sum(isinstance(m, MulFreePSN) for m in converted.modules()) == 1

    def test_one_neuron_with_other_channels_at_each_place(self):
        class Shared(nn.Module):
            def __init__(self, untraceable):
                super().__init__()
                self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 5)
                self.lif, self.untraceable = neuron.LIFNode(step_mode="m"), untraceable

            def forward(self, x):
                if self.untraceable and x.sum() == 0:
                    return x
                return self.lif(self.second(self.lif(self.first(x))))

        x = torch.randn(STEPS, 2, 3)
        assert [n.channels for n in neurons(quick(Shared(False), x))] == [4, 5]
        with pytest.raises(ConversionError, match=r"model\.lif: it is used at several places, .*\(8, 2, 5\)"):
            quick(Shared(True), x)

    def test_tied_layers_stay_tied(self):
        net = small()
        net[2] = layer.Linear(3, 4, step_mode="m")
        net[2].weight = net[0].weight
        net = nn.Sequential(nn.Sequential(*list(net)[:2]), nn.Linear(4, 3), net[2], net[3])
        converted = quick(net, torch.rand(STEPS, 2, 3))
        assert converted.get_submodule("2").weight is converted.get_submodule("0.0").weight

    def test_lists_and_nested_sequentials(self):
        class Listed(nn.Module):
            def __init__(self):
                super().__init__()
                self.blocks = nn.ModuleList(
                    nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Sequential(neuron.IFNode(step_mode="m"))))
                    for _ in range(2)
                )

            def forward(self, x):
                for block in self.blocks:
                    x = block(x) + x
                return x

        rows = mfpsn_fx.selection(quick(Listed(), torch.rand(STEPS, 2, 3))).rows
        assert [row.layer for row in rows] == ["blocks.0.1.0.0", "blocks.1.1.0.0"]

    @pytest.mark.parametrize("wrap", [nn.DataParallel, lambda m: torch.compile(m, backend="eager")])
    def test_wrappers(self, wrap):
        net, x = small(), torch.rand(STEPS, 2, 3)
        expected = quick(net, x).eval()(x)
        converted = quick(wrap(net), x)
        assert [row.layer for row in mfpsn_fx.selection(converted).rows] == ["1", "3"]
        assert torch.equal(converted.eval()(x), expected)
        assert mfpsn_fx.selection(wrap(converted)) == mfpsn_fx.selection(converted)
        inner = quick(nn.Sequential(wrap(net)), x)
        assert len(mfpsn_fx.selection(inner).rows) == 2
        assert torch.equal(inner.eval()(x), expected)

    def test_parametrizations(self):
        class Double(nn.Module):
            def forward(self, w):
                return 2 * w

        net, x = small(), torch.rand(STEPS, 2, 3)
        net[1] = neuron.ParametricLIFNode(step_mode="m")
        nn.utils.parametrizations.weight_norm(net[0])
        parametrize.register_parametrization(net[1], "w", Double())
        expected = describe(net[1]).response(torch.arange(2))
        assert float(expected[0]) == pytest.approx(torch.sigmoid(net[1].w).item())
        converted = quick(net, x)
        assert parametrize.is_parametrized(converted.get_submodule("0"))
        assert "parametrization dropped, its current value taken" in mfpsn_fx.selection(converted).rows[0].notes
        converted(x).sum().backward()
        assert converted.get_submodule("0").parametrizations.weight.original1.grad is not None

    def test_hooks_on_layers_run_as_before(self):
        net, x = small(), torch.rand(STEPS, 2, 3) * 9
        net[2].register_forward_hook(lambda m, args, output: output + 2)
        converted = quick(net, x)
        plain = quick(small(), x)
        plain.load_state_dict(converted.state_dict())
        assert not torch.equal(plain.eval()(x), converted.eval()(x))

    def test_an_error_half_way_leaves_the_source_as_it_was(self):
        net, x = small(), torch.rand(STEPS, 2, 3)
        net[3] = neuron.QIFNode(step_mode="m")
        state = copy.deepcopy(net.state_dict())
        for inplace in (False, True):
            with pytest.raises(ConversionError, match="1 of 2 neurons cannot be converted"):
                quick(net, x, inplace=inplace)
            assert type(net[1]) is neuron.LIFNode
            assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())


def test_the_page_has_a_row_for_each_network(compatibility):
    page = (compatibility.FOLDER.parent.parent / "docs" / "guide" / "compatibility.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| Sp")]
    listed = {n.name: n for n in compatibility.load_networks() if n.library == "SpikingJelly"}
    assert {row[1] for row in rows} == set(listed)
    for row in rows:
        network = listed[row[1]]
        if network.refusal:
            assert row[3] == "0"
            assert network.refusal in row[-1]
        else:
            assert row[5:9] == ["yes", "yes", "yes", "0"]
            assert network.unused or row[2] == row[3]
