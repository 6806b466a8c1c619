"""Batch norms fused with the load of the neurons after them: the same network, one tensor less."""

from __future__ import annotations

import contextlib
import copy
import pickle

import pytest
import torch
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn
from torch.utils.checkpoint import checkpoint

import mfpsn_fx
from mfpsn_fx.kernels.registry import get_kernel, unregister_kernel
from mfpsn_fx.model.norms.affine import norm_affine
from mfpsn_fx.passes import (
    Example,
    FuseNorms,
    PassContext,
    Pipeline,
    PropagateShapes,
    fused_norms,
    neurons,
    unfuse_norms,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def spiking(*layers, mode="m"):
    net = nn.Sequential(*layers)
    functional.set_step_mode(net, mode)
    return net


def conv_net(norm=None, channels=4):
    return spiking(
        layer.Conv2d(2, channels, 3, padding=1),
        norm or layer.BatchNorm2d(channels),
        neuron.LIFNode(v_threshold=0.3),
        layer.Flatten(),
        layer.Linear(channels * 9, 5),
        layer.BatchNorm1d(5),
        neuron.LIFNode(v_threshold=0.3),
    )


class OverTime(nn.Module):
    """(T, N, 2, 3, 3) → (T, N, 4, 3, 3): torch's own layers with T flattened into N, and ``apart`` to undo that."""

    def __init__(self, apart):
        super().__init__()
        self.conv, self.bn, self.sn = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), neuron.LIFNode(step_mode="m")
        self.apart = apart

    def forward(self, x):
        return self.sn(self.apart(self.bn(self.conv(x.flatten(0, 1))), x))


def converted(net, x, **options):
    options = {"kernels": "shifted-add", "layout": "time_first", "fold_norms": False, **options}
    return mfpsn_fx.convert(net, x, repeats=1, progress=False, **options)


def fused(model, *x):
    """Return a copy of ``model`` with its norms fused."""
    pipeline = Pipeline([PropagateShapes(), FuseNorms()], given=("neurons",))
    return pipeline(copy.deepcopy(model), PassContext(Example(x)))


@pytest.fixture
def x():
    return torch.randn(4, 3, 2, 3, 3, dtype=torch.float64)


def run(model, x, mask=None):
    """(spikes, dx) of a training step, gradients left in the parameters."""
    x = x.clone().requires_grad_()
    with contextlib.nullcontext() if mask is None else mfpsn_fx.valid_steps(mask):
        out = model(x)
        out.backward(torch.linspace(-1, 2, out.numel(), dtype=x.dtype).view_as(out))
    return out.detach(), x.grad


def assert_equivalent(one, other, x, mask=None, batches=2):
    """Outputs, gradients and running statistics over some training steps and an evaluation."""
    for step in range(batches):
        (out, dx), (out2, dx2) = run(one, x + 0.1 * step, mask), run(other, x + 0.1 * step, mask)
        assert torch.equal(out, out2)
        assert 0 < out.mean() < 1
        torch.testing.assert_close(dx, dx2)
    grads = {name: p.grad for name, p in one.named_parameters()}
    assert any(g.abs().max() > 1e-3 for n, g in grads.items() if n.startswith(("0", "1", "conv", "bn")))
    for name, p in other.named_parameters():
        torch.testing.assert_close(p.grad, grads.pop(name), msg=lambda m, name=name: f"{name}: {m}")
    assert not grads
    assert list(one.state_dict()) == list(other.state_dict())
    for name, value in one.state_dict().items():
        torch.testing.assert_close(value, other.state_dict()[name], msg=lambda m, name=name: f"{name}: {m}")
    one.eval(), other.eval()
    assert torch.equal(one(x), other(x))
    one.train(), other.train()


NORMS = {
    "plain": {},
    "not affine": {"affine": False},
    "no running statistics": {"track_running_stats": False},
    "cumulative average": {"momentum": None},
    "large momentum, large eps": {"momentum": 0.7, "eps": 0.1},
}


@pytest.mark.parametrize("options", NORMS.values(), ids=NORMS)
def test_it_computes_what_the_layers_did(x, options):
    net = conv_net(layer.BatchNorm2d(4, **options)).double()
    if options.get("affine", True):
        nn.init.uniform_(net[1].weight, 0.5, 2)
        nn.init.uniform_(net[1].bias, -1, 1)
    model = converted(net, x)
    twin = fused(model, x)
    assert [node.args[0].target for node in fused_norms(twin)] == ["1", "5"]
    assert not [n for n in twin.graph.nodes if n.op == "call_module" and n.target in ("1", "5")]
    assert_equivalent(model, twin, x)


APART = {
    "unflatten": lambda y, x: y.unflatten(0, x.shape[:2]),
    "view": lambda y, x: y.view(x.size(0), x.size(1), 4, 3, 3),
    "reshape": lambda y, x: torch.reshape(y, (x.shape[0], -1, 4, 3, 3)),
    "two views": lambda y, x: y.unflatten(2, (3, 1)).reshape(x.shape[0], -1, 4, 3, 3),
}


@pytest.mark.parametrize("apart", APART.values(), ids=APART)
def test_views_between_norm_and_neuron_stay(x, apart):
    model = converted(OverTime(apart).double(), x)
    twin = fused(model, x)
    assert [node.args[0].target for node in fused_norms(twin)] == ["bn"]
    assert_equivalent(model, twin, x)
    more = torch.randn(5, 2, 2, 3, 3, dtype=torch.float64)
    assert torch.equal(model(more), twin(more))


@pytest.mark.parametrize(
    ("kernel", "layout"),
    [("fused-cpp", "time_first"), ("fused-cpp", "time_last"), ("conv2d", "time_last"), ("vmap-mm", "time_last")],
)
def test_kernels_and_layouts(x, kernel, layout):
    net = conv_net().double()
    options = {"kernels": kernel, "layout": layout}
    model = converted(copy.deepcopy(net), x, **options)
    twin = converted(net, x, fold_norms=True, **options)
    assert len(fused_norms(twin)) == 2
    assert {(n.kernel, str(n.layout)) for n in neurons(twin)} == {(kernel, layout)}
    assert all(n.affine and n.problem().affine for n in neurons(twin))
    assert_equivalent(model, twin, x)


def test_half_and_single_precision(x):
    x = x.float()
    model = converted(conv_net(), x)
    twin = fused(model, x)
    (out, dx), (out2, dx2) = run(model, x), run(twin, x)
    assert (out != out2).double().mean() < 0.01  # a value at the threshold may fall to the other side
    assert (dx - dx2).norm() < 0.05 * dx.norm()  # also with spikes that differ
    if torch.equal(out, out2):
        torch.testing.assert_close(dx, dx2, rtol=1e-3, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        spikes = twin(x)
    assert spikes.dtype is torch.bfloat16
    spikes.float().mean().backward()
    half = twin.to(torch.bfloat16)
    out, dx = run(half, x.bfloat16())
    assert out.dtype is dx.dtype is torch.bfloat16
    assert dx.isfinite().all()
    assert half.get_submodule("1").weight.grad.dtype is torch.bfloat16


def test_statistics_of_values_far_from_zero():
    """Not E[x²] − E[x]²: at a mean of a thousand deviations that would be noise in float32."""
    norm = nn.BatchNorm1d(3)
    x = torch.randn(64, 3, 50) + 1000
    for kernel in ("", "fused-cpp", "shifted-add"):
        _, scale, shift = norm_affine(norm, x, kernel)
        wanted = x.double()
        var, mean = torch.var_mean(wanted, (0, 2), correction=0)
        torch.testing.assert_close(scale.double(), torch.rsqrt(var + norm.eps), rtol=1e-4, atol=0)
        torch.testing.assert_close(shift.double(), -mean * torch.rsqrt(var + norm.eps), rtol=1e-4, atol=0)


def test_gradients_are_those_of_finite_differences():
    norm = nn.BatchNorm1d(3, track_running_stats=False).double()
    nn.init.uniform_(norm.weight, 0.5, 2)
    x = torch.randn(5, 3, 4, dtype=torch.float64, requires_grad=True)

    def out(x, weight, bias):
        norm.weight.data, norm.bias.data = weight.detach(), bias.detach()
        y, scale, shift = torch.func.functional_call(
            _Affine(norm), {"norm.weight": weight, "norm.bias": bias}, (x,)
        )  # fmt: skip
        return y * scale[:, None] + shift[:, None]

    weight, bias = (p.detach().clone().requires_grad_() for p in (norm.weight, norm.bias))
    assert torch.autograd.gradcheck(out, (x, weight, bias))


class _Affine(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        return norm_affine(self.norm, x)


class TestMasks:
    """valid_steps, with norms that count padding (as torch's do) and with masked ones."""

    mask = mfpsn_fx.lengths_to_mask(torch.tensor([4, 1, 2]))

    @pytest.mark.parametrize("masked", [False, True])
    @pytest.mark.parametrize("own_layers", [False, True])
    def test_equivalent(self, x, masked, own_layers):
        net = OverTime(APART["unflatten"]) if own_layers else conv_net()
        model = converted(net.double(), x)
        twin = fused(model, x)
        if masked:
            assert mfpsn_fx.mask_batch_norms(model) == mfpsn_fx.mask_batch_norms(twin) > 0
            assert fused_norms(twin)
            again = fused(model, x)  # masked first, fused then
            assert len(fused_norms(again)) == len(fused_norms(twin))
            assert_equivalent(copy.deepcopy(model), again, x, self.mask)
        assert_equivalent(model, twin, x, self.mask)

    def test_padding_is_not_read(self, x):
        twin = fused(converted(conv_net().double(), x), x)
        mfpsn_fx.mask_batch_norms(twin)
        bad = x.masked_fill(~self.mask[..., None, None, None], torch.nan)
        with mfpsn_fx.valid_steps(self.mask):
            _, scale, shift = norm_affine(twin.get_submodule("1"), twin.get_submodule("0")(bad))
            out, wanted = twin(bad), twin(x)
        assert scale.isfinite().all()
        assert shift.isfinite().all()
        assert torch.equal(out, wanted)

    def test_checkpointed(self, x):
        """A masked norm counts a batch once; the second run, in backward, has the mask of the first."""
        model = converted(conv_net().double(), x)
        mfpsn_fx.mask_batch_norms(model)
        plain, twin = fused(model, x), fused(model, x)
        run(plain, x, self.mask)
        run(lambda v: checkpoint(twin, v, use_reentrant=False), x, self.mask)
        for name, value in plain.state_dict().items():
            torch.testing.assert_close(value, twin.state_dict()[name])
        for p, q in zip(plain.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)


class TestLeftAlone:
    def count(self, net, x):
        model = converted(net, x, fold_norms=True)
        out = run(model, x)[0]
        assert out.shape[0] == x.shape[0]
        return len(fused_norms(model))

    def test_read_elsewhere(self, x):
        class Both(OverTime):
            def forward(self, x):
                y = self.apart(self.bn(self.conv(x.flatten(0, 1))), x)
                return self.sn(y) + y

        assert self.count(Both(APART["view"]).double(), x) == 0

    def test_something_between_alters_its_input(self, x):
        class Altered(OverTime):
            def forward(self, x):
                h = self.conv(x.flatten(0, 1))
                y = self.bn(h)
                h.mul_(3)
                return self.sn(self.apart(y, x))

        model = converted(Altered(APART["view"]).double().eval(), x, fold_norms=True)
        assert len(fused_norms(model)) == 0

    def test_hooks(self, x):
        net, seen = conv_net().double(), []
        net[1].register_forward_hook(lambda *_: seen.append(1))
        assert self.count(net, x) == 1
        assert seen

    def test_a_class_of_its_own(self, x):
        class Mine(layer.BatchNorm2d):
            def forward(self, x):
                return super().forward(x) * 2

        assert self.count(conv_net(Mine(4)).double(), x) == 1

    def test_channels_elsewhere(self):
        """A norm over dim 1 of (T, N, C) sees N as channels, also where N = C."""
        net = nn.Sequential(nn.BatchNorm1d(4), neuron.LIFNode(step_mode="m")).double()
        assert self.count(net, torch.randn(5, 4, 4, dtype=torch.float64)) == 0


class TestAfterwards:
    """Operations on a network whose norms are fused."""

    @pytest.fixture
    def pair(self, x):
        model = converted(conv_net().double(), x)
        return model, fused(model, x)

    def test_idempotent_and_back(self, pair, x):
        model, twin = pair
        again = fused(twin, x)
        assert str(again.graph) == str(twin.graph)
        assert unfuse_norms(again) == ["1", "5"]
        assert not fused_norms(again)
        assert_equivalent(model, again, x)

    @pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
    def test_copies_and_pickles(self, pair, x, copy_of):
        model, twin = pair
        other = copy_of(twin)
        assert len(fused_norms(other)) == 2
        assert_equivalent(model, other, x)

    def test_state_dicts_go_both_ways(self, pair, x):
        model, twin = pair
        run(model, x)
        twin.load_state_dict(model.state_dict())
        model.eval(), twin.eval()
        assert torch.equal(model(x), twin(x))

    def test_planned_again(self, pair, x):
        model, twin = pair
        mfpsn_fx.plan(twin, x, layout="time_last", kernels="shifted-add", repeats=1, progress=False)
        assert len(fused_norms(twin)) == 2
        assert_equivalent(model, twin, x)
        assert len(mfpsn_fx.selection(twin).rows) == 2

    def test_hooks_and_other_classes_that_come_later(self, pair, x):
        model, twin = pair
        seen = []
        handle = twin.get_submodule("1").register_forward_hook(lambda *_: seen.append(1))
        assert_equivalent(model, twin, x)
        assert len(seen) == 3
        handle.remove()
        # as libraries do that wrap a layer: the instance gets a forward of its own
        for one in pair:
            norm = one.get_submodule("1")
            norm.forward = lambda x, norm=norm: 2 * type(norm).forward(norm, x)
        assert_equivalent(model, twin, x)
        for one in pair:
            del one.get_submodule("1").forward

        class Doubled(nn.BatchNorm1d):
            def forward(self, x):
                return 2 * super().forward(x.flatten(0, 1)).unflatten(0, x.shape[:2])

        for one in pair:
            other = Doubled(5).double()
            other.load_state_dict(one.get_submodule("5").state_dict())
            one.set_submodule("5", other)
        assert_equivalent(model, twin, x)

    def test_one_value_per_channel(self, pair):
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            norm_affine(nn.BatchNorm1d(5), torch.randn(1, 5))

    def test_calibrated(self, pair, x):
        model, twin = pair
        for one in pair:
            mfpsn_fx.calibrate(one, [x], progress=False)
        for name, value in model.state_dict().items():
            torch.testing.assert_close(value, twin.state_dict()[name])

    def test_statistics_recomputed(self, pair, x):
        model, twin = pair
        for one in pair:
            mfpsn_fx.recompute_statistics(one, [x, 2 * x])
        for name, value in model.state_dict().items():
            torch.testing.assert_close(value, twin.state_dict()[name])

    def test_compiled(self, x):
        pair = model, twin = (net := converted(OverTime(APART["unflatten"]).double(), x)), fused(net, x)
        compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
        for mask in (None, TestMasks.mask):
            (out, dx), (out2, dx2) = run(model, x, mask), run(compiled, x, mask)
            assert torch.equal(out, out2)
            torch.testing.assert_close(dx, dx2)
            for one, other in zip(model.parameters(), twin.parameters(), strict=True):
                torch.testing.assert_close(one.grad, other.grad)
            for name, value in model.state_dict().items():
                torch.testing.assert_close(value, twin.state_dict()[name])
            for one in pair:
                mfpsn_fx.mask_batch_norms(one)


def test_statistics_come_from_the_kernel_of_highest_rank_that_reads_once(x):
    """Which kernels do is stated where they are registered."""
    names = ["reads-once", "reads-once-in-double", "reads-twice"]
    parts = get_kernel("shifted-add").parts
    register = mfpsn_fx.register_kernel
    register(names[0], rank=-5, one_read=True)(parts)
    register(names[1], rank=70, one_read=True, dtypes=[torch.float64])(parts)
    register(names[2], rank=80)(parts)
    try:
        model = converted(conv_net().double(), x)
        kernels = [node.kwargs["kernel"] for node in fused_norms(fused(model, x))]
        assert set(kernels) == {names[1]}
        unregister_kernel(names.pop(1))
        kernels = {node.kwargs["kernel"] for node in fused_norms(fused(model, x))}
        assert kernels <= {"fused-cpp", "reads-once"}
        torch.testing.assert_close(fused(model, x).train()(x), copy.deepcopy(model).train()(x))
    finally:
        for name in names:
            unregister_kernel(name)
