"""NIR graphs as time-first networks: numbers against plain loops and against other libraries, conversion, refusals."""

from __future__ import annotations

import importlib.util
import pathlib
import pickle
import re

import nir
import numpy as np
import pytest
import torch
from spikingjelly.activation_based import functional, layer, neuron
from spikingjelly.activation_based.nir_exchange import export_to_nir
from torch import nn

import mfpsn_fx
from mfpsn_fx import ConversionError, MulFreePSN
from mfpsn_fx.model import LeakyIntegrator
from mfpsn_fx.model.sources.description import describe
from mfpsn_fx.model.sources.nir_neurons import NIRNeuron
from mfpsn_fx.model.sources.simulate import simulate

DT = 1e-4
STEPS, BATCH = 12, 3


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def lif(*shape, tau=4e-4, r=2.0, v_leak=0.0, v_threshold=0.5, v_reset=0.0):
    return nir.LIF(
        tau=np.full(shape, tau), r=np.full(shape, r), v_leak=np.full(shape, v_leak),
        v_threshold=np.full(shape, v_threshold), v_reset=np.full(shape, v_reset),
    )  # fmt: skip


def through_a_file(graph, tmp_path):
    nir.write(tmp_path / "graph.nir", graph)
    return mfpsn_fx.from_nir(tmp_path / "graph.nir", dtype=torch.float64)


def stepped(node, x, dt=DT):
    """NIR's equations by forward Euler in float64, unit by unit: spikes and membranes (T, N, *) of x (T, N, *)."""
    kind = type(node).__name__
    shape = x.shape[2:]
    field = lambda name: np.broadcast_to(getattr(node, name), shape)  # noqa: E731
    tau = "tau_mem" if kind.startswith("Cuba") else "tau"
    rest = field("v_leak") if hasattr(node, "v_leak") else field("v_reset") if kind == "IF" else np.zeros(shape)
    spikes, membranes = np.zeros_like(x), np.zeros_like(x)
    for n in range(x.shape[1]):
        for unit in np.ndindex(shape):
            current, v = 0.0, rest[unit]
            for t in range(x.shape[0]):
                current_now = x[(t, n, *unit)]
                if kind.startswith("Cuba"):
                    change = field("w_in")[unit] * current_now - current
                    current = current + dt / field("tau_syn")[unit] * change
                    current_now = current
                if kind in ("I", "IF"):
                    v = v + dt * field("r")[unit] * current_now
                else:
                    change = field("v_leak")[unit] - v + field("r")[unit] * current_now
                    v = v + dt / field(tau)[unit] * change
                membranes[(t, n, *unit)] = v
                if "F" in kind and v > field("v_threshold")[unit]:
                    spikes[(t, n, *unit)] = 1
                    v = field("v_reset")[unit]
    return spikes, membranes


def neurons(shape):
    """One node of each kind, its constants different in each channel."""

    def draw(low, high):
        values = np.random.default_rng(1).permutation(np.linspace(low, high, shape[0]))
        return np.ones(shape) * values.reshape(-1, *[1] * (len(shape) - 1))

    times = {"tau": draw(1.5e-4, 1e-3), "r": draw(1.0, 3.0), "v_leak": draw(-0.1, 0.1)}
    firing = {"v_threshold": draw(0.3, 0.6), "v_reset": draw(-0.2, 0.05)}
    two = {"tau_mem": times["tau"], "tau_syn": draw(1e-4, 5e-4), "r": draw(2.0, 5.0), "v_leak": times["v_leak"],
           "w_in": draw(1.0, 3.0)}  # fmt: skip
    return [
        nir.LIF(**times, **firing),
        nir.CubaLIF(**two, **firing),
        nir.IF(r=draw(5e3, 2e4), **firing),
        nir.LI(**times),
        nir.CubaLI(**two),
        nir.I(r=draw(5e3, 2e4)),
    ]


@pytest.mark.parametrize("shape", [(5,), (3, 3, 2)])
@pytest.mark.parametrize("kind", range(6))
def test_neurons_are_their_equations(rng, tmp_path, shape, kind):
    node = neurons(shape)[kind]
    x = rng.standard_normal((STEPS, BATCH, *shape))
    net = through_a_file(nir.NIRGraph.from_list(node), tmp_path)
    found = net(torch.tensor(x))
    spikes, membranes = stepped(node, x)
    if isinstance(node, (nir.LIF, nir.CubaLIF, nir.IF)):
        assert 0.05 < spikes.mean() < 0.6
        assert np.array_equal(found.numpy(), spikes)
    else:
        np.testing.assert_allclose(found.numpy(), membranes, rtol=1e-12, atol=1e-12)


def test_thresholds_are_exceeded_not_reached():
    net = mfpsn_fx.from_nir(nir.NIRGraph.from_list(nir.Threshold(np.array([0.5, 1.0]))))
    x = torch.tensor([[[0.5, 1.25]], [[0.75, 1.0]]])
    assert torch.equal(net(x), torch.tensor([[[0.0, 1.0]], [[1.0, 0.0]]]))
    model = mfpsn_fx.convert(net, x, repeats=1, progress=False)
    assert torch.equal(model.eval()(x), net(x))
    at = mfpsn_fx.from_nir(nir.NIRGraph.from_list(lif(1, tau=2 * DT, r=2.0, v_threshold=1.0)))
    assert float(at(torch.ones(1, 1, 1))) == 0


def layers(rng):
    """Every stateless node, and what they are in torch."""
    draw = rng.standard_normal
    convolution = nir.Conv2d((8, 6), draw((4, 1, 3, 3)), (2, 1), (1, 1), (1, 1), 2, draw(4))
    return nir.NIRGraph.from_list(
        nir.Input(np.array([2, 8, 6])),
        convolution,
        nir.AvgPool2d(np.array([2, 2]), np.array([2, 2]), np.array([1, 1])),
        nir.SumPool2d(np.array([2, 2]), np.array([1, 1]), np.array([0, 0])),
        nir.Scale(draw((4, 2, 3))),
        nir.Flatten(np.array([4, 2, 3]), 1, -1),
        nir.Conv1d(6, draw((3, 4, 3)), 1, "same", 1, 1, draw(3)),
        nir.Flatten(np.array([3, 6]), 0, -1),
        nir.Linear(draw((5, 18))),
        nir.Affine(draw((4, 5)), draw(4)),
        type_check=False,  # of a grouped convolution it takes the channels of one group for the input's
    )


def test_layers_are_torchs(rng, tmp_path):
    graph = layers(rng)
    net = through_a_file_unchecked(graph, tmp_path)
    x = torch.tensor(rng.standard_normal((STEPS, BATCH, 2, 8, 6)))
    node, t = graph.nodes, torch.as_tensor
    F = nn.functional
    y = F.conv2d(x.flatten(0, 1), t(node["conv2d"].weight), t(node["conv2d"].bias), (2, 1), 1, 1, 2)
    y = F.avg_pool2d(y, 2, 2, 1)
    y = F.avg_pool2d(y, 2, 1) * 4 * t(node["scale"].scale)
    y = F.conv1d(y.flatten(2), t(node["conv1d"].weight), t(node["conv1d"].bias), padding=1)
    y = y.flatten(1) @ t(node["linear"].weight).T @ t(node["affine"].weight).T + t(node["affine"].bias)
    torch.testing.assert_close(net(x), y.unflatten(0, (STEPS, BATCH)))
    assert sum("fold_time" in str(n.target) for n in net.graph.nodes if n.op == "call_function") == 2


def through_a_file_unchecked(graph, tmp_path):
    nir.write(tmp_path / "graph.nir", graph)
    return mfpsn_fx.from_nir(nir.read(tmp_path / "graph.nir", type_check=False), dtype=torch.float64)


def test_spikingjellys_export_runs_as_spikingjelly(tmp_path):
    """The discretization: its own networks, exported and read, fire as they do there."""
    net = nn.Sequential(
        layer.Conv2d(2, 3, 3, padding=1),
        neuron.LIFNode(tau=3.0, decay_input=False, v_threshold=0.8),
        layer.AvgPool2d(2),
        neuron.IFNode(v_threshold=0.4),
        layer.Flatten(),
        layer.Linear(12, 6),
        neuron.CUBALIFNode(c_decay=0.5, v_decay=0.75, v_threshold=0.3),
        layer.Linear(6, 4, bias=False),
        neuron.LIFNode(tau=2.0, v_threshold=0.05, v_reset=-0.1),
    ).double()
    functional.set_step_mode(net, "m")
    x = torch.randn(STEPS, BATCH, 2, 4, 4, dtype=torch.float64)
    graph = export_to_nir(net, x, save_path=tmp_path / "net.nir")
    functional.reset_net(net)
    ours = mfpsn_fx.from_nir(tmp_path / "net.nir", dtype=torch.float64)
    with torch.no_grad():
        want = net(x)
        assert 0.05 < float(want.mean()) < 0.95
        assert torch.equal(ours(x), want)
    assert len(graph.nodes) == len(list(ours.children())) + 2


def test_snntorchs_export_runs_as_snntorch():
    """Leaky's membrane with reset to zero in the step of the spike, constants of shape ()."""
    snntorch = pytest.importorskip("snntorch")
    from snntorch.export_nir import _extract_snntorch_module as extracted

    leaky = snntorch.Leaky(beta=0.75, threshold=0.5, reset_mechanism="zero", reset_delay=False)
    synaptic = snntorch.Synaptic(alpha=0.5, beta=0.75, threshold=0.5, reset_mechanism="zero", reset_delay=False)
    for cell, states in ((leaky, 1), (synaptic, 2)):
        graph = nir.NIRGraph(
            {"in": nir.Input(np.array([4])), "cell": extracted(cell), "out": nir.Output(np.array([4]))},
            [("in", "cell"), ("cell", "out")],
            type_check=False,
        )
        x = torch.randn(STEPS, BATCH, 4) / 2
        state, want = [torch.zeros(BATCH, 4)] * states, []
        for step in x:
            spikes, *state = cell(step, *state)
            want.append(spikes)
        want = torch.stack(want)
        assert 0.02 < float(want.mean()) < 0.6
        assert torch.equal(mfpsn_fx.from_nir(graph)(x), want)


@pytest.mark.parametrize("kind", range(3))
def test_norse_reads_the_same(kind):
    """Its own cells, at its own step of a millisecond; it takes v_reset for zero and IF's r for 1."""
    pytest.importorskip("norse")
    from norse.torch.utils.import_nir import _import_norse_module as imported

    ones = np.ones(5)
    node = (
        nir.LIF(tau=3e-3 * ones, r=ones, v_leak=0.1 * ones, v_threshold=0.3 * ones),
        nir.CubaLIF(
            tau_mem=3e-3 * ones, tau_syn=2e-3 * ones, r=3 * ones, v_leak=0 * ones, v_threshold=0.4 * ones,
            w_in=2 * ones,
        ),
        nir.IF(r=1e3 * ones, v_threshold=0.9 * ones),
    )[kind]  # fmt: skip
    cell, state, want = imported(node, ignore_warnings=True, dt=1e-3), None, []
    x = torch.randn(STEPS, BATCH, 5)
    for step in x:
        spikes, state = cell(step, state)
        want.append(spikes.detach())
    want = torch.stack(want)
    assert 0.02 < float(want.mean()) < 0.6
    assert torch.equal(mfpsn_fx.from_nir(nir.NIRGraph.from_list(node), dt=1e-3)(x), want)


def branching(rng):
    """input -> a -> lif -> b, and input -> c beside it; both meet in the output."""
    draw = rng.standard_normal
    return nir.NIRGraph(
        {
            "input": nir.Input(np.array([3])),
            "a.0": nir.Affine(draw((4, 3)), draw(4)),
            "train": lif(4),
            "class": nir.Linear(draw((2, 4))),
            "2": nir.Linear(draw((2, 3))),
            "output": nir.Output(np.array([2])),
        },
        [("input", "a.0"), ("a.0", "train"), ("train", "class"), ("class", "output"), ("input", "2"), ("2", "output")],
    )


def test_branches_are_summed(rng):
    graph = branching(rng)
    net = mfpsn_fx.from_nir(graph, dtype=torch.float64)
    x = rng.standard_normal((STEPS, BATCH, 3))
    node = graph.nodes
    spikes, _ = stepped(node["train"], x @ node["a.0"].weight.T + node["a.0"].bias)
    np.testing.assert_allclose(
        net(torch.tensor(x)).detach().numpy(), spikes @ node["class"].weight.T + x @ node["2"].weight.T
    )
    assert sorted(name for name, _ in net.named_children()) == ["2", "a_0", "class_", "train_"]


def test_graphs_within_a_graph(rng):
    inner = nir.NIRGraph.from_list(nir.Affine(rng.standard_normal((4, 3)), rng.standard_normal(4)), lif(4))
    last = nir.Linear(rng.standard_normal((2, 4)))
    flat = mfpsn_fx.from_nir(
        nir.NIRGraph.from_list(*(n for k, n in inner.nodes.items() if k in ("affine", "lif")), last)
    )
    net = mfpsn_fx.from_nir(
        nir.NIRGraph(
            {"in": nir.Input(np.array([3])), "block": inner, "last": last, "out": nir.Output(np.array([2]))},
            [("in", "block"), ("block", "last"), ("last", "out")],
            type_check=False,
        )
    )
    x = torch.randn(STEPS, BATCH, 3)
    assert torch.equal(net(x), flat(x))
    assert isinstance(net.get_submodule("block_lif"), NIRNeuron)


def test_several_inputs_and_outputs(rng):
    net = mfpsn_fx.from_nir(
        nir.NIRGraph(
            {
                "left": nir.Input(np.array([3])), "right": nir.Input(np.array([3])), "lif": lif(3),
                "spikes": nir.Output(np.array([3])), "raw": nir.Output(np.array([3])),
            },
            [("left", "lif"), ("right", "lif"), ("lif", "spikes"), ("right", "raw")],
            type_check=False,
        )
    )  # fmt: skip
    left, right = torch.randn(2, STEPS, BATCH, 3)
    spikes, raw = net(left, right)
    assert torch.equal(raw, right)
    assert torch.equal(spikes, net.lif(left + right))


def test_gradients_reach_the_first_layer(rng):
    net = mfpsn_fx.from_nir(branching(rng))
    net(torch.randn(STEPS, BATCH, 3)).square().sum().backward()
    assert all(float(p.grad.abs().sum()) > 0 for p in net.parameters())


# ---- converted


def network(rng, **constants):
    draw = rng.standard_normal
    return nir.NIRGraph.from_list(
        nir.Input(np.array([2, 5, 4])),
        nir.Conv2d(None, draw((3, 2, 3, 3)), 1, 1, 1, 1, draw(3)),
        lif(3, 5, 4, **constants),
        nir.SumPool2d(np.array([2, 2]), np.array([2, 2]), np.array([0, 0])),
        nir.Flatten(None, 0, -1),
        nir.Affine(draw((6, 12)), draw(6)),
        nir.CubaLIF(tau_mem=np.full(6, 4e-4), tau_syn=np.full(6, 2e-4), r=np.full(6, 4.0), v_leak=np.full(6, 0.1),
                    v_threshold=np.full(6, 0.5), w_in=np.full(6, 2.0)),
        nir.Linear(draw((4, 6))),
        nir.LI(np.full(4, 1e-3), np.ones(4), np.zeros(4)),
    )  # fmt: skip


def test_conversion(rng):
    net = mfpsn_fx.from_nir(network(rng))
    x = torch.randn(STEPS, BATCH, 2, 5, 4)
    model = mfpsn_fx.convert(net, x, repeats=1, progress=False)
    rows = mfpsn_fx.selection(model).rows
    assert [(row.layer, row.source) for row in rows] == [("lif", "NIR LIF"), ("cubalif", "NIR CubaLIF")]
    assert "v_leak subtracted from the threshold" in str(rows[1].notes)
    assert isinstance(model.li, LeakyIntegrator)
    model(x).sum().backward()
    assert float(model.conv2d.weight.grad.abs().sum()) > 0
    compiled = torch.compile(model.eval(), backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), model(x))
    for network_of in (net, model, pickle.loads(pickle.dumps(net)), pickle.loads(pickle.dumps(model))):
        names = [getattr(node.target, "__name__", "") for node in network_of.graph.nodes]
        assert (names.count("fold_time"), names.count("unfold_time")) == (3, 3)


def test_converted_neurons_fire_as_their_source_without_reset(rng):
    """All taps in reach, no quantizer: LIF, CubaLIF and IF agree with their equations, reset left out."""
    shape = (40,)
    for node in neurons(shape)[:3]:
        net = mfpsn_fx.from_nir(nir.NIRGraph.from_list(node), dtype=torch.float64)
        x = rng.standard_normal((STEPS, BATCH, *shape))
        model = mfpsn_fx.convert(
            net, torch.tensor(x), order=STEPS, dilation=1, gradient="none", repeats=1, progress=False
        )
        (ours,) = (m for m in model.modules() if isinstance(m, MulFreePSN))
        free = type(node)(**{**vars_of(node), "v_threshold": np.full(shape, np.inf)})
        membranes = stepped(free, x)[1]
        assert np.array_equal(
            model.eval()(torch.tensor(x)).detach().numpy(), (membranes > node.v_threshold).astype(float)
        )
        assert len(torch.unique(ours.weight[:, 0])) > 1 or isinstance(node, nir.IF)


def vars_of(node):
    return {k: v for k, v in vars(node).items() if k not in ("input_type", "output_type", "metadata")}


def test_powers_of_two_are_exact(rng):
    node = lif(6, tau=2 * DT, r=1.0, v_threshold=0.25)
    x = torch.tensor(rng.integers(-2, 3, (STEPS, BATCH, 6)).astype(np.float32))
    net = mfpsn_fx.from_nir(nir.NIRGraph.from_list(node))
    model = mfpsn_fx.convert(net, x, order=STEPS, dilation=1, repeats=1, progress=False).eval()
    free = lif(6, tau=2 * DT, r=1.0, v_threshold=np.inf)
    assert np.array_equal(model(x).detach().numpy(), stepped(free, x.double().numpy())[1] > 0.25)


# ---- refused


def test_recurrence_is_refused_by_name(rng):
    graph = branching(rng)
    graph.nodes["back"] = nir.Linear(np.eye(4))
    graph.edges += [("train", "back"), ("back", "train")]
    with pytest.raises(
        ValueError, match=r"the graph is recurrent: (train -> back -> train|back -> train -> back)\. A pa"
    ):
        mfpsn_fx.from_nir(graph)


def altered(rng, nodes=None, edges=(), without=()):
    graph = branching(rng)
    graph.nodes |= nodes or {}
    graph.edges = [edge for edge in graph.edges if edge not in without] + list(edges)
    return graph


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nodes": {"train": nir.Delay(np.ones(4))}}, "'train' is a Delay, which is not supported; supported are A"),
        ({"nodes": {"train": lif(4, tau=5e-5)}}, r"'train' \(LIF\): tau is 5e-05 s, but a step is dt = 0.0001 s"),
        ({"nodes": {"train": lif(4, v_threshold=np.inf)}}, r"'train' \(LIF\): v_threshold is NaN or infinite: a node"),
        ({"nodes": {"train": lif(4, r=np.nan)}}, r"'train' \(LIF\): r is NaN or infinite"),
        ({"nodes": {"2": nir.Linear(np.ones((2, 2, 3)))}}, r"'2' \(Linear\): weight must be \(out, in\), found"),
        ({"nodes": {"a.0": nir.Affine(np.ones((4, 3)), np.ones(3))}}, r"'a.0' \(Affine\): bias must be \(4,\), found"),
        ({"without": [("input", "2")]}, r"node '2' \(Linear\) has no input: connect it, or remove it"),
        ({"without": [("2", "output")]}, r"node '2' \(Linear\) leads to no Output: connect it, or remove it"),
        ({"edges": [("2", "nowhere")]}, "the edge 2 -> nowhere names 'nowhere', which is not a node"),
        ({"edges": [("2", "output")]}, "the graph has duplicate edges: 2 -> output"),
    ],
)  # fmt: skip
def test_what_is_refused(rng, change, message):
    with pytest.raises(ValueError, match=message):
        mfpsn_fx.from_nir(altered(rng, **change))


def test_wrong_arguments(rng, monkeypatch, tmp_path):
    with pytest.raises(TypeError, match=r"from_nir takes a nir\.NIRGraph or the path of a file, found LIF"):
        mfpsn_fx.from_nir(lif(3))
    for dt in (0, -1e-4, float("nan"), "1"):
        with pytest.raises(ValueError, match="dt must be a positive number of seconds"):
            mfpsn_fx.from_nir(branching(rng), dt=dt)
    empty = nir.NIRGraph({"lif": lif(3), "out": nir.Output(np.array([3]))}, [("lif", "out")], type_check=False)
    with pytest.raises(ValueError, match="the graph has no Input node"):
        mfpsn_fx.from_nir(empty)
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "nir" else found(name, *a))
    with pytest.raises(ImportError, match="reading an NIR file needs the package nir: pip install nir"):
        mfpsn_fx.from_nir(tmp_path / "graph.nir")


def test_inputs_of_another_shape(rng):
    net = mfpsn_fx.from_nir(nir.NIRGraph.from_list(lif(3)))
    for shape in ((STEPS, BATCH, 1), (STEPS, BATCH, 3, 2), (STEPS, 3)):
        with pytest.raises(ValueError, match=r"lif: NIR's LIF takes \(T, N, 3\), time first, found"):
            net(torch.zeros(shape))


def test_constants_that_vary_within_a_channel(rng):
    graph = network(rng)
    graph.nodes["lif"].v_threshold[1, 2, 3] = 0.75
    net = mfpsn_fx.from_nir(graph)
    x = rng.standard_normal((STEPS, BATCH, 3, 5, 4))
    assert np.array_equal(net.lif(torch.tensor(x)).numpy(), stepped(graph.nodes["lif"], x)[0])  # for reference it runs
    x = torch.randn(STEPS, BATCH, 2, 5, 4)
    with pytest.raises(ConversionError, match=r"lif: threshold of this NIR LIF of shape \(3, 5, 4\) varies within ch"):
        mfpsn_fx.convert(net, x, repeats=1, progress=False)
    uneven = nir.LI(np.linspace(1e-3, 2e-3, 6).reshape(2, 3), np.ones((2, 3)), np.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"node 'li' \(LI\): decay of this NIR LI of shape \(2, 3\) varies within"):
        mfpsn_fx.from_nir(nir.NIRGraph.from_list(uneven))


# ---- calibration and the manual


@pytest.mark.parametrize("kind", range(3))
def test_descriptions_simulate_the_neuron(rng, kind):
    """What calibration aims at is the neuron itself, reset included, where v_reset is v_leak."""
    node = neurons((6,))[kind]
    node.v_reset = node.v_reset if kind == 2 else node.v_leak
    net = mfpsn_fx.from_nir(nir.NIRGraph.from_list(node), dtype=torch.float64)
    x = torch.tensor(rng.standard_normal((STEPS, BATCH, 6)))
    (neuron_module,) = net.children()
    assert torch.equal(simulate(describe(neuron_module), x)[1], net(x))


def test_the_manual(rng):
    text = (pathlib.Path(__file__).parents[2] / "docs" / "guide" / "nir.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    names: dict = {}
    exec(compile(block, "docs/guide/nir.md", "exec"), names)
    assert names["model"](names["x"]).shape == (32, 8, 4)
