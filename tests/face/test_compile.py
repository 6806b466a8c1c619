"""torch.compile: no breaks, few recompiles, the backend."""

from __future__ import annotations

import pytest
import torch
from spikingjelly.activation_based import layer, neuron, surrogate
from spikingjelly.activation_based.model import parametric_lif_net, sew_resnet, spiking_resnet, spiking_vgg
from torch import nn
from torch._dynamo.utils import counters

import mfpsn_fx
from mfpsn_fx import MulFreePSN
from mfpsn_fx.passes import neurons


def quick(model, *example, **options):
    return mfpsn_fx.convert(model, *example, repeats=1, progress=False, **options)


def results(model, x):
    out = model(x)
    model.zero_grad()
    out.square().sum().backward()
    return [out.detach(), *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("layout", ["time_first", "time_last"])
def test_inductor_trains_and_evaluates(net, example, layout):
    net, x = net.double(), example.double()
    converted = quick(net, x, layout=layout)
    state = {k: v.clone() for k, v in converted.state_dict().items()}
    compiled = torch.compile(converted, fullgraph=True)
    ours = results(compiled, x)
    after = {k: v.clone() for k, v in converted.state_dict().items()}
    converted.load_state_dict(state)
    for a, b in zip(ours, results(converted, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    for name, value in converted.state_dict().items():
        torch.testing.assert_close(value, after[name], rtol=1e-9, atol=1e-9)
    converted.eval()
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), converted(x), rtol=1e-9, atol=1e-9)
    assert mfpsn_fx.selection(compiled) == mfpsn_fx.selection(converted)


def test_recompiles(net, example):
    converted = quick(net, example)
    compiled = torch.compile(converted, backend="aot_eager", fullgraph=True)
    counters.clear()
    for _ in range(3):
        compiled(example).sum().backward()
    assert counters["stats"]["unique_graphs"] == 1
    # T·N stays at 16 and above: below, torch's own convolution takes another path, with a guard of its own
    for batch in (3, 7, 4):
        compiled(torch.randn(6, batch, 1, 8)).sum().backward()
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]


def test_eager_equals_aot_eager_to_the_bit(net, example):
    converted = quick(net, example)
    state = {k: v.clone() for k, v in converted.state_dict().items()}
    ours = results(torch.compile(converted, backend="aot_eager", fullgraph=True), example)
    converted.load_state_dict(state)
    for a, b in zip(ours, results(converted, example), strict=True):
        assert torch.equal(a, b)


def test_twenty_neurons_do_not_run_into_the_recompile_limit():
    layers = [m for _ in range(20) for m in (layer.Linear(3, 3, step_mode="m"), neuron.LIFNode(step_mode="m"))]
    x = torch.randn(4, 2, 3)
    converted = quick(nn.Sequential(*layers), x, kernels="shifted-add")
    compiled = torch.compile(converted, backend="aot_eager", fullgraph=True)
    counters.clear()
    for mode in (True, False, True):
        converted.train(mode)
        compiled(x)
    assert counters["stats"]["unique_graphs"] == 2
    assert len(neurons(converted)) == 20


class TestBackend:
    def test_a_plain_network_of_our_modules(self):
        model = nn.Sequential(nn.Linear(4, 4), MulFreePSN(3), nn.Linear(4, 4), MulFreePSN(3, dilation=2)).double()
        x = torch.randn(6, 5, 3, 4, dtype=torch.float64)
        expected = results(model, x)
        for m in model:
            if isinstance(m, MulFreePSN):
                m.running_mean.zero_()
                m.running_var.fill_(1)
        compiled = torch.compile(model, backend="mfpsn_fx", fullgraph=True)
        for a, b in zip(results(compiled, x), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
        model.eval()
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), model(x))

    def test_it_measures_and_binds(self, monkeypatch, distorted):
        """A kernel that is made the fastest is the one that runs."""
        asked = distorted(lambda problem, name: [1.0 if name == "vmap-mm" else 9.0] * 3)
        graphs = []
        monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", lambda gm, inputs, **_: graphs.append(gm) or gm)
        model = nn.Sequential(MulFreePSN(3), MulFreePSN(3, dilation=2))
        compiled = torch.compile(model, backend="mfpsn_fx")
        for mode in (True, False):
            model.train(mode)
            compiled(torch.randn(6, 5, 3, 4))
        assert len(graphs) == 2
        for graph, mode in zip(graphs, (True, False), strict=True):
            assert [n.kernel if mode else n.eval_kernel for n in neurons(graph)] == ["vmap-mm"] * 2
            assert [n.dilation for n in neurons(graph)] == [1, 2]
            assert [n.order for n in neurons(graph)] == [2, 2]
        assert {problem.shape for problem, _ in asked} == {(6, 5, 3, 4), (5, 3, 4, 6)}  # both layouts

    def test_bound_neurons_keep_their_kernels(self, net, example, monkeypatch):
        converted = quick(net, example, layout="time_first", kernels="vanilla-conv1d")
        graphs = []
        monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", lambda gm, inputs, **_: graphs.append(gm) or gm)
        torch.compile(converted, backend="mfpsn_fx")(example)
        assert [n.kernel for n in neurons(graphs[0])] == ["vanilla-conv1d"] * 3
        assert [n.name for n in neurons(graphs[0])] == ["features.2", "features.4", "features.7"]

    def test_it_is_found_by_name_without_import(self):
        assert "mfpsn_fx" in torch._dynamo.list_backends(exclude_tags=None)

    def test_a_network_without_our_neurons(self):
        compiled = torch.compile(nn.Linear(3, 2), backend="mfpsn_fx")
        assert compiled(torch.randn(4, 3)).shape == (4, 2)


def _settings():
    return {"spiking_neuron": neuron.LIFNode, "surrogate_function": surrogate.ATan()}


MODELS = {
    "CIFAR10Net": (lambda: parametric_lif_net.CIFAR10Net(channels=8, **_settings()), 8),
    "spiking_resnet18": (lambda: spiking_resnet.spiking_resnet18(num_classes=10, **_settings()), 17),
    "sew_resnet18": (lambda: sew_resnet.sew_resnet18(num_classes=10, cnf="ADD", **_settings()), 17),
    "spiking_vgg11_bn": (lambda: spiking_vgg.spiking_vgg11_bn(num_classes=10, **_settings()), 10),
}


@pytest.mark.parametrize("name", MODELS)
def test_spikingjelly_models(name):
    from spikingjelly.activation_based import functional

    make, least = MODELS[name]
    model, x = make(), torch.rand(4, 2, 3, 32, 32)
    functional.set_step_mode(model, "m")
    converted = quick(model, x, kernels="shifted-add", layout="time_first")
    assert len(neurons(converted)) >= least
    assert not any("inside a leaf" in row.notes for row in mfpsn_fx.selection(converted).rows)
    assert not any(isinstance(m, neuron.LIFNode) for m in converted.modules())
    out = converted(x)
    out.sum().backward()
    assert all(p.grad is not None for p in converted.parameters())
    counters.clear()
    compiled = torch.compile(converted, backend="aot_eager", fullgraph=True)
    compiled(x).sum().backward()
    converted.eval()
    with torch.no_grad():
        assert torch.equal(compiled(x), converted(x))
    assert not counters["graph_break"]


@pytest.mark.parametrize("backend", ["aot_eager", "mfpsn_fx"])
def test_dynamic_from_the_start(backend):
    """Dynamo then makes the module's numbers (α, ε) inputs of the graph."""
    model = nn.Sequential(nn.Linear(4, 4), MulFreePSN(3, dilation=2)).double()
    compiled = torch.compile(model, backend=backend, dynamic=True, fullgraph=True)
    for batch in (5, 2, 9):
        x = torch.randn(6, batch, 3, 4, dtype=torch.float64)
        for a, b in zip(results(compiled, x), results(model, x), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
