"""Layouts, surrogates, the quantizer, and the reference itself."""

from __future__ import annotations

import dataclasses
import math
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from mfpsn_fx import MulFreePSN
from mfpsn_fx.kernels import (
    ATan,
    Layout,
    Rational,
    Sigmoid,
    Surrogate,
    dequantize,
    exponents,
    power_of_two,
    quantize,
    reference,
    register_surrogate,
    spike,
    to_layout,
)
from mfpsn_fx.kernels.surrogate import _SURROGATES, get_surrogate


class TestLayout:
    def test_shapes_and_round_trip(self):
        x = torch.randn(5, 2, 3, 4, 6)
        y = to_layout(x, "time_first", "time_last")
        assert y.shape == (2, 3, 4, 6, 5)
        assert y.is_contiguous()
        assert y[1, 2, 3, 4, 0] == x[0, 1, 2, 3, 4]
        assert torch.equal(to_layout(y, "time_last", "time_first"), x)
        assert to_layout(x, "time_first", "time_first") is x
        assert Layout.TIME_LAST.shape_from((5, 2, 3), Layout.TIME_FIRST) == (2, 3, 5)
        assert Layout.TIME_FIRST.shape_from((2, 3, 5), Layout.TIME_LAST) == (5, 2, 3)

    def test_unknown(self):
        with pytest.raises(ValueError, match="unknown layout 'sideways': choose one of 'time_first', 'time_last'"):
            Layout.parse("sideways")

    def test_is_differentiable(self):
        x = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda x: to_layout(x, "time_first", "time_last"), x)


class TestSurrogate:
    @pytest.mark.parametrize(
        ("surrogate", "formula"),
        [
            (ATan(2.0), lambda x, a: a / (2 * (1 + (math.pi * a * x / 2) ** 2))),
            (ATan(5.0), lambda x, a: a / (2 * (1 + (math.pi * a * x / 2) ** 2))),
            (Rational(10.0), lambda x, a: 1 / (1 + a * x * x)),
            (Sigmoid(4.0), lambda x, a: a * math.exp(-a * x) / (1 + math.exp(-a * x)) ** 2),
        ],
    )
    def test_forward_and_derivative(self, surrogate, formula):
        x = torch.tensor([-2.0, -0.3, -0.0, 0.0, 0.1, 3.0], dtype=torch.float64, requires_grad=True)
        y = spike(x, surrogate)
        assert y.tolist() == [0, 0, 1, 1, 1, 1]
        y.sum().backward()
        expected = torch.tensor([formula(v, surrogate.alpha) for v in x.tolist()], dtype=torch.float64)
        torch.testing.assert_close(x.grad, expected)

    def test_a_user_adds_one(self):
        @register_surrogate("triangle")
        @dataclasses.dataclass(frozen=True)
        class Triangle(Surrogate):
            alpha: float = 1.0

            def derivative(self, x):
                return (1 - self.alpha * x.abs()).clamp(min=0)

        try:
            x = torch.tensor([0.25], requires_grad=True)
            spike(x, get_surrogate("triangle", 1.0)).backward()
            assert x.grad.item() == 0.75
            neuron = MulFreePSN(1, surrogate=get_surrogate("triangle", 1.0)).eval()
            neuron(x.expand(2, 2, 1)).sum().backward()
            before = neuron.beta.grad.clone()

            @register_surrogate("triangle")
            @dataclasses.dataclass(frozen=True)
            class Triangle(Surrogate):  # as when a notebook's cell runs again
                alpha: float = 1.0

                def derivative(self, x):
                    return 5 * (1 - self.alpha * x.abs()).clamp(min=0)

            neuron.beta.grad = None
            neuron(x.expand(2, 2, 1)).sum().backward()
            assert torch.equal(neuron.beta.grad, 5 * before)
            assert bool(before.any())
        finally:
            del _SURROGATES["triangle"]

    def test_faults(self):
        with pytest.raises(ValueError, match="alpha must be finite and positive"):
            ATan(0.0)
        with pytest.raises(ValueError, match="unknown surrogate"):
            get_surrogate("nope", 1.0)
        with pytest.raises(TypeError, match="define derivative"):
            register_surrogate("empty")(type("Empty", (Surrogate,), {}))


def bits(value: int) -> float:
    return struct.unpack("<f", struct.pack("<I", value))[0]


class TestQuantizer:
    @settings(max_examples=300, deadline=None)
    @given(st.floats(width=32, allow_nan=False, allow_infinity=False))
    def test_float32_is_exact(self, w):
        assert power_of_two(torch.tensor([w])).item() == reference.quantized(w)

    @settings(max_examples=300, deadline=None)
    @given(st.floats(allow_nan=False, allow_infinity=False))
    def test_float64_is_exact(self, w):
        assert power_of_two(torch.tensor([w], dtype=torch.float64)).item() == reference.quantized(w)

    @pytest.mark.parametrize("exponent", [-126, -60, -1, 0, 1, 77, 126])
    def test_at_the_turn(self, exponent):
        """The floats around 2^(n+½) fall to their own sides."""
        turn = struct.unpack("<I", struct.pack("<f", math.sqrt(2) * 2.0**exponent))[0]
        for offset in (-2, -1, 0, 1, 2):
            w = bits(turn + offset)
            expected = 2.0 ** (exponent + (1 if w * w > 2 * 4.0**exponent else 0))
            assert power_of_two(torch.tensor([w, -w])).tolist() == [expected, -expected]

    def test_special_values(self):
        w = torch.tensor([0.0, -0.0, float("nan"), 3.4e38, 1e-45, 1.0, -3.0])
        q = power_of_two(w)
        assert q[0] == 0
        assert q[1] == 0
        assert q[2].isnan()
        assert q[3:].tolist() == [2.0**127, 2.0**-126, 1.0, -4.0]

    def test_bounds_clamp_exponents(self):
        w = torch.tensor([100.0, -1.0, 0.001, 0.0])
        assert power_of_two(w, -3, 2).tolist() == [4.0, -1.0, 0.125, 0.0]
        with pytest.raises(ValueError, match="exponent bounds"):
            quantize(w, min_exponent=3, max_exponent=2)
        with pytest.raises(ValueError, match="exponent bounds"):
            exponents(w, min_exponent=-200)

    def test_gradients(self):
        w = torch.tensor([0.3, -1.7, 0.0, 6.0], dtype=torch.float64, requires_grad=True)
        quantize(w).sum().backward()
        assert w.grad.tolist() == [1, 1, 1, 1]
        w.grad = None
        q = quantize(w, "round-only")
        assert torch.equal(q, power_of_two(w.detach()))
        q.sum().backward()
        torch.testing.assert_close(w.grad, torch.tensor([0.25 / 0.3, 2 / 1.7, 0.0, 8 / 6], dtype=torch.float64))
        assert quantize(w, "none") is w
        with pytest.raises(ValueError, match="unknown quantizer gradient"):
            quantize(w, "magic")

    @settings(max_examples=100, deadline=None)
    @given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=8))
    def test_exponents_round_trip(self, values):
        w = torch.tensor(values)
        exponent, sign = exponents(w)
        assert exponent.dtype is sign.dtype is torch.int8
        assert torch.equal(dequantize(exponent, sign), power_of_two(w))

    def test_exponents_refuse_what_has_none(self):
        with pytest.raises(ValueError, match="2 of 3 weights are NaN or infinite"):
            exponents(torch.tensor([1.0, float("nan"), float("inf")]))


class TestReference:
    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("gradient", ["none", "straight-through", "round-only"])
    @pytest.mark.parametrize("layout", list(Layout))
    @pytest.mark.parametrize("extras", [False, True])
    def test_against_autograd(self, training, gradient, layout, extras):
        """An expression of the paper's formulas in torch calls, differentiated by autograd."""
        g = torch.Generator().manual_seed(3)
        draw = lambda *s: torch.randn(s, generator=g, dtype=torch.float64)  # noqa: E731
        steps, batch, channels, order, dilation, eps = 6, 3, 2, 3, 2, 1e-3
        x = draw(steps, batch, channels, 4)
        parameters = [draw(channels, order), draw(channels), draw(channels)]
        mean, var = draw(channels), draw(channels).abs()
        scale, shift = (draw(channels), draw(channels)) if extras else (None, None)
        mask = (draw(steps, batch) > -0.8) if extras else None
        leaves = [t.requires_grad_() for t in [x, *parameters, *([scale, shift] if extras else [])]]
        weight, gamma, beta = parameters

        lifted = x if not extras else x * scale[:, None] + shift[:, None]
        valid = torch.ones(steps, batch, dtype=torch.bool) if mask is None else mask
        lifted = lifted * valid[:, :, None, None]

        def convolve(w):
            rows = lifted.permute(1, 3, 2, 0).reshape(-1, channels, steps)
            rows = F.conv1d(F.pad(rows, ((order - 1) * dilation, 0)), w[:, None], dilation=dilation, groups=channels)
            return rows.reshape(batch, 4, channels, steps).permute(3, 0, 2, 1)

        used_mean, used_var = mean, var
        if training:
            chosen = convolve(weight).permute(2, 0, 1, 3)[:, valid]
            used_mean = chosen.mean(dim=(1, 2))
            used_var = chosen.var(dim=(1, 2), correction=0)
        std = torch.sqrt(used_var + eps)
        taps = quantize((gamma / std)[:, None] * weight, gradient)
        u = convolve(taps) + (beta - gamma * used_mean / std)[:, None]
        expected = spike(u, ATan(2.0)) * valid[:, :, None, None]
        grad = draw(*expected.shape)
        wanted = torch.autograd.grad(expected, leaves, grad)

        options = {"eps": eps, "dilation": dilation, "gradient": gradient, "layout": layout, "training": training,
                   "scale": scale, "shift": shift, "mask": mask}  # fmt: skip
        with torch.no_grad():
            given_x = to_layout(x, "time_first", layout)
            given_grad = to_layout(grad, "time_first", layout)
            arguments = (given_x, weight, gamma, beta, mean, var)
            forward = reference.forward(*arguments, **options)
            found = reference.backward(given_grad, *arguments, surrogate=ATan(2.0), **options)
        assert torch.equal(to_layout(forward.spikes, layout, "time_first"), expected)
        found = [to_layout(found.x, layout, "time_first"), *(v for v in found[1:] if v is not None)]
        for value, want in zip(found, wanted, strict=True):
            torch.testing.assert_close(value, want, rtol=1e-9, atol=1e-10)

    def test_equation_10_by_hand(self):
        x = torch.arange(1.0, 6.0, dtype=torch.float64).reshape(5, 1, 1, 1)
        h = reference.filtered(x, torch.tensor([[10.0, 1.0]], dtype=torch.float64), 2)
        assert h.flatten().tolist() == [1, 2, 13, 24, 35]
