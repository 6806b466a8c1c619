"""convert, plan and the selection, on a SpikingJelly network."""

from __future__ import annotations

import copy
import logging
import pickle
import re

import pytest
import torch
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn

import mfpsn_fx
from mfpsn_fx import MulFreePSN
from mfpsn_fx.kernels import Layout, kernels
from mfpsn_fx.model.results import record_of
from mfpsn_fx.passes import conversion_nodes, neurons

PATHS = ["features.2", "features.4", "features.7"]


def quick(model, *example, **options):
    return mfpsn_fx.convert(model, *example, repeats=1, progress=False, **options)


def test_every_neuron_is_replaced_and_runs(net, example):
    converted = quick(net, example)
    assert [n.name for n in neurons(converted)] == PATHS
    assert [n.dilation for n in neurons(converted)] == [1, 2, 3]
    assert not any(isinstance(m, neuron.LIFNode) for m in converted.modules())
    out = converted(example)
    assert out.shape == (5, 3)
    out.sum().backward()
    assert all(p.grad is not None for p in converted.parameters())


def test_source_is_untouched(net, example):
    before = copy.deepcopy(net.state_dict())
    kinds = [type(m) for m in net.modules()]
    quick(net, example)
    assert [type(m) for m in net.modules()] == kinds
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(m.v == 0.0 for m in net.modules() if isinstance(m, neuron.LIFNode))


def test_random_generator_is_left_alone_by_source_init(net, example):
    rng = torch.get_rng_state()
    quick(net, example)
    assert torch.equal(torch.get_rng_state(), rng)


def test_names_of_parameters_and_buffers(net, example):
    state = quick(net, example).state_dict()
    for path in PATHS:
        for name in ("weight", "gamma", "beta", "running_mean", "running_var"):
            assert f"{path}.{name}" in state
    assert set(net.state_dict()) <= set(state)


def test_without_example_channels_come_from_the_graph(net, example):
    converted = mfpsn_fx.convert(net)
    assert [n.channels for n in neurons(converted)] == [4, 4, 6]
    table = mfpsn_fx.selection(converted)
    assert table.autoselect_s is None
    highest = MulFreePSN(4).default_kernel()
    assert {row.kernel for row in table.rows} == {row.eval_kernel for row in table.rows} == {highest}
    assert all("not bound: the kernel of highest rank" in row.notes for row in table.rows)
    assert {(n.kernel, n.eval_kernel) for n in neurons(converted)} == {("", "")}
    converted(example)
    mfpsn_fx.plan(converted, example, repeats=1, progress=False)
    assert mfpsn_fx.selection(converted).autoselect_s > 0
    assert not any("not bound" in note for row in mfpsn_fx.selection(converted).rows for note in row.notes)
    assert all(row.forward_ms > 0 and row.backward_ms > 0 for row in mfpsn_fx.selection(converted).rows)


def test_the_model_may_repeat_its_input_over_time(example):
    class Repeats(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.lif = layer.Conv1d(1, 4, 3, padding=1, step_mode="m"), neuron.LIFNode(step_mode="m")

        def forward(self, x):
            return self.lif(self.conv(x.unsqueeze(0).repeat(4, 1, 1, 1))).mean(0)

    for layout, shape in (("time_first", (4, 2, 4, 8)), ("time_last", (2, 4, 8, 4))):
        converted = quick(Repeats(), torch.randn(2, 1, 8), layout=layout)
        assert mfpsn_fx.selection(converted).rows[0].shape == shape
    assert converted(torch.randn(2, 1, 8)).shape == (2, 4, 8)


def test_inplace_shares_layers_with_the_source(net, example):
    converted = quick(net, example, inplace=True)
    assert converted.get_parameter("head.weight") is net.head.weight
    assert isinstance(net.features[2], MulFreePSN)
    assert converted.get_submodule("features.2") is net.features[2]


def test_inplace_failure_leaves_the_source_as_it_was(net):
    with pytest.raises(ValueError, match="empty"):
        quick(net, torch.randn(0, 5, 1, 8), inplace=True)
    with pytest.raises(ValueError, match="unknown kernel"):
        quick(net, torch.randn(6, 5, 1, 8), inplace=True, kernels={"features.2": "nonsense"})
    assert type(net.features[2]) is neuron.LIFNode


def test_layouts_and_kernels_agree(net, example):
    """Whatever is forced, output and gradients are the same (float64: rounding flips no spike)."""
    net, example = net.double(), example.double()
    plain = quick(net, example, layout="time_first", kernels="shifted-add")
    target = torch.randn(5, 3, dtype=torch.float64)

    def run(model):
        model.zero_grad()
        out = model(example)
        (out * target).sum().backward()
        return out.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}

    state = copy.deepcopy(plain.state_dict())
    reference, gradients = run(plain)
    for layout in Layout:
        for kernel in kernels(layout):
            if kernel.devices is not None and "cpu" not in kernel.devices:
                continue
            other = quick(net, example, layout=layout, kernels=kernel.name)
            other.load_state_dict(state)
            rows = mfpsn_fx.selection(other).rows
            assert {(row.layout, row.kernel) for row in rows} == {(str(layout), kernel.name)}
            found, theirs = run(other)
            torch.testing.assert_close(found, reference, rtol=1e-12, atol=1e-12)
            for name, gradient in gradients.items():
                torch.testing.assert_close(
                    theirs[name], gradient, rtol=1e-9, atol=1e-10, msg=f"{layout} {kernel.name} {name}"
                )
            assert torch.equal(other.eval()(example), plain.eval()(example))
            plain.train()


def test_kernel_mapping(net, example):
    converted = quick(net, example, kernels={"features.4": "vanilla-conv1d"})
    assert {r.layer: r.kernel for r in mfpsn_fx.selection(converted).rows}["features.4"] == "vanilla-conv1d"


def test_a_time_last_network_is_converted_at_its_ends(net, example, distorted):
    distorted(lambda problem, kernel: [1.0] * 3)  # on a busy machine a mean may be the faster in the other layout
    converted = quick(net, example, layout="time_last")
    # at the example only: the mean over time leaves nothing to be converted back
    assert [n.args[0].op for n in conversion_nodes(converted)] == ["placeholder"]
    assert mfpsn_fx.selection(converted).conversions == 1
    mfpsn_fx.plan(converted, example, layout="time_first", repeats=1, progress=False)
    assert conversion_nodes(converted) == []
    assert {row.layout for row in mfpsn_fx.selection(converted).rows} == {"time_first"}


def test_planning_twice_changes_nothing(net, example):
    converted = quick(net, example, layout="time_last", kernels="shifted-add")

    def code():  # but for numbers in names, and which of a layer's two forms was the faster
        return re.sub(r"_\d+|'(wide|fold|matmul)'", "", converted.code)

    before = code()
    assert (before.count("run_time_last("), before.count("norm_affine(")) == (5, 1)
    mfpsn_fx.plan(converted, example, layout="time_last", kernels="shifted-add", repeats=1, progress=False)
    assert code() == before


class TestRoundTrips:
    @pytest.fixture
    def converted(self, net, example):
        return quick(net, example, layout="time_last")

    @pytest.mark.parametrize("trip", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
    def test_copies(self, converted, example, trip):
        twin = trip(trip(converted))
        assert mfpsn_fx.selection(twin) == mfpsn_fx.selection(converted)
        assert torch.equal(twin.eval()(example), converted.eval()(example))
        twin.train()(example).sum().backward()

    def test_modes(self, converted, example):
        table = mfpsn_fx.selection(converted)
        converted.eval()
        assert not any(m.training for m in converted.modules())
        first = converted(example)
        assert torch.equal(first, converted(example))
        converted.train()
        assert all(m.training for m in converted.modules())
        assert mfpsn_fx.selection(converted) == table

    def test_dtypes(self, converted, example):
        table = mfpsn_fx.selection(converted)
        converted.double()(example.double()).sum().backward()
        assert converted.get_parameter("features.2.weight").dtype is torch.float64
        converted.to(torch.bfloat16)
        assert converted.get_parameter("features.2.weight").dtype is torch.float32
        assert converted(example.bfloat16()).dtype is torch.bfloat16
        assert mfpsn_fx.selection(converted) == table

    def test_state_dict_into_another_selection(self, net, converted, example):
        other = quick(net, example, layout="time_first", kernels="vanilla-conv1d")
        other.load_state_dict(converted.state_dict(), strict=True)
        torch.testing.assert_close(other.double().eval()(example.double()), converted.double().eval()(example.double()))
        assert {row.kernel for row in mfpsn_fx.selection(other).rows} == {"vanilla-conv1d"}

    def test_json(self, converted):
        table = mfpsn_fx.selection(converted)
        assert mfpsn_fx.Selection.from_json(table.to_json()) == table
        for text in ("{", "[]", "{}", '{"format": 2, "rows": []}'):
            with pytest.raises(ValueError, match="not a selection"):
                mfpsn_fx.Selection.from_json(text)


def test_print_selection(net, example, capsys):
    converted = quick(net, example)
    mfpsn_fx.print_selection(converted)
    text = capsys.readouterr().out
    for word in (
        "features.2",
        "LIFNode",
        "reset dropped",
        "total time_first",
        "total time_last",
        "conversions",
        "autoselect took",
    ):
        assert word in text


@pytest.mark.parametrize("error", [RuntimeError, MemoryError, torch.OutOfMemoryError])
def test_table_says_what_failed_and_it_is_not_chosen(net, example, error):
    from mfpsn_fx.kernels import registry
    from mfpsn_fx.kernels.implementations.shifted_add import ShiftedAdd

    @mfpsn_fx.register_kernel("breaks")
    class Breaks(ShiftedAdd):
        def filter(self, call, x, w):
            raise error("out of luck")

    try:
        rows = mfpsn_fx.selection(quick(net, example)).rows
    finally:
        registry.unregister_kernel("breaks")
    assert all("out of luck" in " ".join(row.notes) for row in rows)
    assert "breaks" not in {row.kernel for row in rows}


def test_a_users_kernel_is_picked_up(net, example):
    from mfpsn_fx.kernels import registry
    from mfpsn_fx.kernels.implementations.shifted_add import ShiftedAdd

    mfpsn_fx.register_kernel("mine", layouts=["time_first"])(ShiftedAdd)
    try:
        converted = quick(net, example, layout="time_first", kernels="mine")
        assert {row.kernel for row in mfpsn_fx.selection(converted).rows} == {"mine"}
        measured = record_of(quick(net, example)).measured
        assert "mine" in {c.kernel for m in measured.values() for c in m.candidates}
    finally:
        registry.unregister_kernel("mine")


def test_an_unregistered_kernel_gives_way_with_one_warning_a_layer(net, example, caplog):
    from mfpsn_fx.kernels import registry
    from mfpsn_fx.kernels.implementations.shifted_add import ShiftedAdd

    mfpsn_fx.register_kernel("gone")(ShiftedAdd)
    converted = quick(net, example, layout="time_first", kernels="gone")
    expected = converted.eval()(example)
    registry.unregister_kernel("gone")
    with caplog.at_level(logging.WARNING, "mfpsn_fx"):
        assert torch.equal(converted(example), expected)
        converted(example)
    assert [r.getMessage().split(":")[0] for r in caplog.records] == PATHS


class TestSourceInit:
    """With taps that are powers of two and fit into k, we fire exactly as LIF without its reset does."""

    @staticmethod
    def reset_free(x, threshold=1.0):
        v, spikes = torch.zeros_like(x[0]), []
        for step in x:
            v = v + (step - v) / 2
            spikes.append((v >= threshold).to(x.dtype))
        return torch.stack(spikes)

    @pytest.mark.parametrize("shift", [0.0, -3.0, 40.0])
    @pytest.mark.parametrize("kind", ["spikes", "normal"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_exact(self, kind, dtype, shift):
        x = torch.randn(8, 16, 3, 5, dtype=dtype)
        if kind == "spikes":
            x = (x > 0.3).to(dtype) * 2
        x = x + (shift if kind == "normal" else round(shift))
        source = nn.Sequential(neuron.LIFNode(tau=2.0, step_mode="m")).to(dtype)
        converted = quick(source, x, order=8, dilation=1)
        expected = self.reset_free(x)
        assert torch.equal(converted.train()(x), expected)
        converted = quick(source, x, order=8, dilation=1)
        assert torch.equal(converted.eval()(x), expected)
        if kind == "spikes" and shift == 0:
            assert 0.05 < expected.mean() < 0.95

    def test_layer_by_layer_in_the_order_of_data(self, net, example):
        """The second layer is measured on the first converted layer's spikes."""
        converted = quick(net.eval(), example, order=6, dilation=1)
        conv, norm, first, conv2, second = (converted.get_submodule(f"features.{i}") for i in range(5))
        x = norm(conv(example))
        spikes = self.reset_free(x)
        assert torch.equal(first(x), spikes)
        assert torch.equal(second(conv2(spikes)), self.reset_free(conv2(spikes)))

    def test_weights_are_sampled_at_the_lags(self, net, example):
        converted = quick(net, example, order=3, dilation=[1, 2])
        first, second, _ = (n.module for n in neurons(converted))
        assert torch.equal(first.weight[0], torch.tensor([0.125, 0.25, 0.5]))
        assert torch.equal(second.weight[0], torch.tensor([0.5**5, 0.5**3, 0.5]))

    def test_random(self, net, example):
        converted = quick(net, example, init="random")
        first = converted.get_submodule("features.2")
        assert torch.equal(first.gamma, torch.ones(4))
        assert torch.equal(first.beta, -torch.ones(4))
        assert first.weight.unique().numel() > 2

    def test_batch_norm_statistics_are_not_touched(self, net, example):
        converted = quick(net, example)
        assert torch.equal(converted.get_buffer("features.1.running_mean"), torch.zeros(4))
        assert converted.get_buffer("features.1.num_batches_tracked") == 0


@pytest.mark.parametrize("inplace", [False, True])
def test_reset_net_still_works(net, example, inplace):
    """It keeps a list of modules to reset: what has no state computes the same after it, the source starts afresh."""
    first = copy.deepcopy(net)(example)
    functional.reset_net(net)
    converted = quick(net, example, inplace=inplace).eval()
    expected = converted(example)
    functional.reset_net(converted)
    assert torch.equal(converted(example), expected)
    if not inplace:
        net(example)
        functional.reset_net(net)
        assert torch.equal(net(example), first)


def test_shared_neuron_serves_several_nodes(example):
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.lif = layer.Conv1d(1, 1, 3, padding=1, step_mode="m"), neuron.LIFNode(step_mode="m")

        def forward(self, x):
            return self.lif(self.conv(self.lif(self.conv(x))))

    converted = quick(Shared(), example)
    assert [row.layer for row in mfpsn_fx.selection(converted).rows] == ["lif", "lif@2"]
    twin = pickle.loads(pickle.dumps(converted))
    assert mfpsn_fx.selection(twin) == mfpsn_fx.selection(converted)
    converted(example).sum().backward()
