"""MulFreePSN as a module."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from mfpsn_fx import ATan, MulFreePSN
from mfpsn_fx.kernels import power_of_two, reference, register_kernel, unregister_kernel
from mfpsn_fx.kernels.implementations.shifted_add import ShiftedAdd


def test_starts_as_documented():
    sn = MulFreePSN(4, order=3, dilation=2)
    assert sn.weight.shape == (4, 3)
    assert torch.equal(sn.gamma, torch.ones(4))
    assert torch.equal(sn.beta, -torch.ones(4))
    assert sn.weight.abs().max() <= 3**-0.5
    assert set(dict(sn.named_buffers())) == {"running_mean", "running_var"}
    text = repr(sn)
    assert f"kernel={sn.default_kernel()!r} by rank" in text
    for word in ("4, order=3, dilation=2", "ATan(2)", "straight-through", "time_first", "eps=1e-05", "momentum=0.1"):
        assert word in text
    sn.bind(layout="time_last", kernel="vmap-mm", eval_kernel="conv2d")
    for word in ("layout='time_last'", "kernel='vmap-mm'", "eval_kernel='conv2d'"):
        assert word in repr(sn)
    assert "by rank" not in repr(sn)
    assert "max_exponent=3" in repr(MulFreePSN(2, max_exponent=3))


@pytest.mark.parametrize("layout", ["time_first", "time_last"])
def test_training_is_appendix_c(layout):
    sn = MulFreePSN(3, order=3, dilation=2, layout=layout).double()
    x = torch.randn((6, 4, 3, 2) if layout == "time_first" else (4, 3, 2, 6), dtype=torch.float64)
    found = reference.forward(
        x, sn.weight.detach(), sn.gamma.detach(), sn.beta.detach(), sn.running_mean.clone(), sn.running_var.clone(),
        dilation=2, layout=layout, training=True,
    )  # fmt: skip
    assert torch.equal(sn(x), found.spikes)
    count = x.numel() // 3
    torch.testing.assert_close(sn.running_mean, 0.1 * found.mean)
    torch.testing.assert_close(sn.running_var, 0.9 + 0.1 * found.var * count / (count - 1))
    sn.eval()
    before = copy.deepcopy(sn.state_dict())
    taps, bias, *_ = sn.folded()
    assert torch.equal(taps, power_of_two(taps))
    expected = reference.forward(
        x, sn.weight.detach(), sn.gamma.detach(), sn.beta.detach(), sn.running_mean, sn.running_var, dilation=2,
        layout=layout,
    )  # fmt: skip
    assert torch.equal(sn(x), expected.spikes)
    torch.testing.assert_close(bias, expected.bias)
    assert all(torch.equal(v, before[k]) for k, v in sn.state_dict().items())


def test_statistics_count_valid_steps_only():
    sn, x = MulFreePSN(2, order=1), torch.randn(5, 3, 2)
    mask = torch.rand(5, 3) < 0.6
    out = sn(x, mask)
    assert not out[~mask].any()
    h = (x * sn.weight.detach()[:, 0])[mask]
    torch.testing.assert_close(sn.running_mean, 0.1 * h.mean(0))
    torch.testing.assert_close(sn.running_var, 0.9 + 0.1 * h.var(0))


def test_batches_of_padding_alone_keep_everything_finite():
    sn = MulFreePSN(2)
    out = sn(torch.randn(5, 3, 2), torch.zeros(5, 3, dtype=torch.bool))
    assert not out.any()
    out.sum().backward()
    assert all(torch.isfinite(v).all() for v in [*sn.state_dict().values(), *(p.grad for p in sn.parameters())])


def test_weights_follow_the_device_and_stay_wide():
    sn = MulFreePSN(2, dtype=torch.float16)
    assert sn.weight.dtype is torch.float32
    assert sn.half().weight.dtype is torch.float32
    assert sn.double().weight.dtype is torch.float64
    assert sn.float().weight.dtype is torch.float32
    assert sn.to("meta").weight.device.type == "meta"


def test_gradients_flow_through_the_statistics():
    """With equal statistics training and evaluation fire the same; gradients differ by those through the statistics."""
    sn, x = MulFreePSN(2).double(), torch.randn(6, 3, 2, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(6, 3, 2, dtype=torch.float64)
    mean, var = torch.ops.mfpsn.statistics(x.detach(), sn.weight.detach())
    spikes = sn(x)
    training = torch.autograd.grad(spikes, [x, sn.weight], grad)
    sn.running_mean.copy_(mean)
    sn.running_var.copy_(var)
    sn.eval()
    again = sn(x)
    assert torch.equal(spikes, again)
    fixed = torch.autograd.grad(again, [x, sn.weight], grad)
    options = {"training": True, "surrogate": ATan(2.0)}
    arguments = [t.detach() for t in (x, sn.weight, sn.gamma, sn.beta, sn.running_mean, sn.running_var)]
    expected = reference.backward(grad, *arguments, **options)
    for ours, constant, want in zip(training, fixed, expected, strict=False):
        torch.testing.assert_close(ours, want)
        assert not torch.allclose(ours, constant)


def test_the_kernel_that_is_shown_is_the_one_that_runs():
    """No kernel is built for the display, which depends on the dtype, the device and the registry."""
    asked = []

    @register_kernel("shown", rank=99, devices=["cpu"], dtypes=[torch.float32], unavailable=lambda: asked.append(1))
    class Shown(ShiftedAdd):
        def filter(self, call, x, w):
            asked.append("run")
            return super().filter(call, x, w)

    try:
        sn = MulFreePSN(2)
        assert "kernel='shown' by rank" in repr(sn)
        assert asked == []
        sn(torch.randn(5, 3, 2))
        assert "run" in asked
        assert "kernel='shown' by rank" not in repr(sn.double())
        assert "kernel='shifted-add' by rank" in repr(MulFreePSN(2, device="meta"))
    finally:
        unregister_kernel("shown")
    assert "shown" not in repr(MulFreePSN(2))


def test_round_trips():
    sn = MulFreePSN(2, order=3, dilation=2, surrogate=ATan(5.0), gradient="round-only")
    x = torch.randn(6, 3, 2)
    sn(x)
    for twin in (copy.deepcopy(sn), pickle.loads(pickle.dumps(sn))):
        assert repr(twin) == repr(sn)
        assert torch.equal(twin.eval()(x), sn.eval()(x))
    other = MulFreePSN(2, order=3)
    other.load_state_dict(sn.state_dict(), strict=True)
