"""The Triton kernel; without a GPU on Triton's interpreter: run with TRITON_INTERPRET=1, as `make test` does."""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mfpsn_fx.kernels import ATan, Layout, Rational, Sigmoid, fire, get_kernel, neuron, power_of_two, reference
from mfpsn_fx.kernels.constants import NeuronConstants
from mfpsn_fx.kernels.kernel import Call, NeuronKernel
from mfpsn_fx.kernels.registry import FLOATS, Problem

NAME = "fused-triton"
OPS = torch.ops.mfpsn
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CAN_RUN = get_kernel(NAME).refusal(Problem((4, 2, 3), Layout.TIME_FIRST, torch.float32, DEVICE, 2, 1))
runs = pytest.mark.skipif(CAN_RUN is not None, reason=f"{NAME}: {CAN_RUN} (TRITON_INTERPRET=1 runs it on the CPU)")
# The interpreter takes milliseconds for each operation of each program
OPTIONS = settings(max_examples=30, deadline=None, derandomize=True)


@st.composite
def problems(draw):
    return {
        "shape": (draw(st.integers(1, 9)), draw(st.integers(1, 4)), draw(st.integers(1, 5)), draw(st.integers(1, 6))),
        "order": draw(st.sampled_from([1, 2, 3, 4, 8, 17])),
        "dilation": draw(st.integers(1, 4)),
        "memory": draw(st.sampled_from(["dense", "channels_last", "batch_first", "sliced", "expanded"])),
        "layout": draw(st.sampled_from(list(Layout))),
        "mask": draw(st.booleans()),
        "affine": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**16)),
    }


def make(p, dtype):
    """x with its strides, scale, shift, mask, and a generator for the rest; x is NaN where the mask is false."""
    g = torch.Generator().manual_seed(p["seed"])
    steps, batch, channels, positions = p["shape"]
    x = torch.randn(steps, batch, channels, positions, generator=g, dtype=torch.float64).to(dtype)
    scale = shift = mask = None
    if p["mask"]:
        mask = torch.rand(steps, batch, generator=g) < 0.7
        x = x.masked_fill(~mask[:, :, None, None], math.nan)
    if p["memory"] == "channels_last":
        x = x.movedim(2, 3).contiguous().movedim(3, 2)
    elif p["memory"] == "batch_first":
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    elif p["memory"] == "sliced":
        x = torch.stack([x, x], -1).flatten(-2)[..., ::2]
    elif p["memory"] == "expanded":
        x = x[..., :1].expand(x.shape)
    if p["layout"] is Layout.TIME_LAST:
        x = x.movedim(0, -1) if p["memory"] != "dense" else x.movedim(0, -1).contiguous()
    if p["affine"]:
        scale = torch.randint(1, 4, (channels,), generator=g).float()
        shift = torch.randint(-2, 3, (channels,), generator=g).float()
    return tuple(t if t is None else t.to(DEVICE) for t in (x, scale, shift, mask)), g


@runs
def test_spikes_equal_the_default_kernels_to_the_bit():
    """Both sum taps in order, and products with powers of two are exact; an affine may be contracted, so none here."""

    @OPTIONS
    @given(problems(), st.sampled_from(FLOATS))
    def check(p, dtype):
        (x, _, _, mask), g = make(p, dtype)
        channels = p["shape"][2]
        taps = power_of_two(torch.randn(channels, p["order"], generator=g)).to(DEVICE)
        bias = torch.randn(channels, generator=g).to(DEVICE)
        options = {"dilation": p["dilation"], "layout": str(p["layout"])}
        ours = fire(x, taps, bias, None, None, mask, **options, method=NAME)
        theirs = fire(x, taps, bias, None, None, mask, **options)
        assert torch.equal(ours, theirs)
        assert ours.dtype is dtype
        assert ours.stride() == theirs.stride()

    check()


@runs
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("surrogate", [ATan(2.0), Rational(10.0), Sigmoid(4.0)], ids=lambda s: s.name)
def test_whole_against_the_reference(training, surrogate):
    """Forward and backward, affine and mask; where quantizers agree, and that is nearly everywhere."""
    compared = total = 0

    @settings(OPTIONS, max_examples=10)
    @given(problems(), st.sampled_from(["straight-through", "round-only", "none"]))
    def check(p, gradient):
        nonlocal compared, total
        (x, scale, shift, mask), g = make(p, torch.float32)
        channels = p["shape"][2]
        if x.numel() == channels and training:
            return
        weight, gamma, beta = (
            torch.randn(*s, generator=g).to(DEVICE) for s in ((channels, p["order"]), (channels,), (channels,))
        )
        running = torch.randn(channels, generator=g).to(DEVICE), torch.rand(channels, generator=g).to(DEVICE) + 0.5
        constants = {
            "gradient": gradient, "dilation": p["dilation"], "layout": str(p["layout"]), "training": training,
        }  # fmt: skip
        chosen = {"surrogate": surrogate.name, "alpha": surrogate.alpha, "method": NAME}
        arguments = (weight, gamma, beta, *running)
        _, mean, var = neuron(x, *arguments, scale, shift, mask, **constants, **chosen)
        cpu = [t if t is None else t.cpu() for t in (x, *arguments)]
        extra = {k: t if t is None else t.cpu() for k, t in (("scale", scale), ("shift", shift), ("mask", mask))}
        found = reference.forward(*cpu, **constants, **extra)
        if training:
            torch.testing.assert_close(mean.double().cpu(), found.mean, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(var.double().cpu(), found.var, rtol=1e-4, atol=1e-4)
        used = (mean, var) if training else running
        total += 1
        # a weight on the edge of two powers of two may flip; a variance of almost nothing makes gradients of any size
        folded = neuron_taps(weight, gamma, *used, gradient)
        if not torch.equal(folded.double().cpu(), found.taps.float().double()) and gradient != "none":
            return
        if float(found.var.min()) < 1e-3:
            return
        compared += 1
        grad = torch.randn(x.shape, generator=g).to(DEVICE)
        ours = OPS.neuron_backward(grad, x, weight, gamma, beta, *used, scale, shift, mask, **constants, **chosen)
        wanted = reference.backward(grad.cpu(), *cpu, surrogate=surrogate, **constants, **extra)
        for a, b in zip(ours, wanted, strict=True):
            if b is not None:
                torch.testing.assert_close(a.double().cpu(), b, rtol=2e-3, atol=2e-3 * max(1.0, float(b.abs().max())))

    check()
    assert compared >= total // 2


def neuron_taps(weight, gamma, mean, var, gradient):
    fused = weight * (gamma / torch.sqrt(var + 1e-5))[:, None]
    return fused if gradient == "none" else power_of_two(fused)


@runs
@pytest.mark.parametrize("layout", list(Layout))
def test_whole_equals_its_parts(layout):
    """The fold on the device is the fold in tensor operations: spikes equal to the bit."""
    x = torch.randn(layout.shape_from((7, 3, 20, 5), "time_first")).to(DEVICE)
    weight, gamma, beta = (torch.randn(*s).to(DEVICE) for s in ((20, 4), (20,), (20,)))
    constants = NeuronConstants(
        gradient="round-only", min_exponent=-5, max_exponent=3, training=True, dilation=2, layout=str(layout)
    )
    call, kernel = Call(constants, torch.float32), get_kernel(NAME).parts
    whole = kernel.forward(call, x, weight, gamma, beta, None, None)
    parts = NeuronKernel.forward(kernel, call, x, weight, gamma, beta, None, None)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))
    arguments = (torch.randn_like(x), x, weight, gamma, beta, *whole[1:], True)
    for training in (True, False):
        call = Call(dataclasses.replace(constants, training=training), torch.float32)
        ours = kernel.backward(call, *arguments)
        theirs = NeuronKernel.backward(kernel, call, *arguments)
        for a, b in zip(ours[:4], theirs[:4], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


@runs
def test_the_folds_bias_is_equal_to_the_bit(at_the_threshold):
    spikes, *_ = neuron(*(t.to(DEVICE) for t in at_the_threshold), method=NAME)
    assert spikes[0].all()
    assert not spikes[1].any()


@runs
def test_variance_is_stable_at_a_large_mean():
    x = torch.randn(8, 16, 4, 9).to(DEVICE) + 1e3
    mean, var = OPS.statistics(x, torch.ones(4, 1, device=DEVICE), method=NAME)
    exact = x.double().transpose(0, 2).reshape(4, -1)
    torch.testing.assert_close(mean.double(), exact.mean(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(var.double(), exact.var(1, correction=0), rtol=1e-3, atol=0)


@runs
def test_determinism_and_poisoned_memory():
    """Bit-equal over runs, the second of them on allocations full of NaN."""
    x, grad = torch.randn(6, 5, 20, 7).to(DEVICE), torch.randn(6, 5, 20, 7).to(DEVICE)
    weight, one = torch.randn(20, 3).to(DEVICE), torch.ones(20, device=DEVICE)

    def run():
        spikes, mean, var = neuron(x, weight, one, -one, 0 * one, one, training=True, dilation=2, method=NAME)
        back = OPS.neuron_backward(grad, x, weight, one, -one, mean, var, training=True, dilation=2, method=NAME)
        return spikes, mean, var, *back[:4]

    first = run()
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    try:
        second = run()
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.isfinite(t).all() for t in second)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_refusals():
    problem = Problem((4, 2, 3), Layout.TIME_FIRST, torch.float32, "cuda", 33, 1)
    assert get_kernel(NAME).refusal(problem) == "takes orders up to 32, not 33"
    assert get_kernel(NAME).refusal(problem._replace(order=2, surrogate="triangle")).startswith("knows the surrogates")


@pytest.mark.parametrize("found", [True, False])
def test_without_triton_it_says_so(found):
    """Importing us needs no Triton; without one the kernel is listed with the reason."""
    hide = "" if found else "import sys; sys.modules['triton'] = None\n"
    code = f"{hide}from mfpsn_fx.kernels import get_kernel; print(get_kernel('{NAME}').unavailable())"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert ("triton is not installed" in done.stdout) is not found


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the run without the interpreter has done it")
def test_programs_compile_for_a_gpu(tmp_path):
    """The interpreter takes what the compiler refuses; no GPU is needed to compile. Order 8 has room in registers."""
    pytest.importorskip("triton", reason="triton has wheels for Linux only")
    script = pathlib.Path(__file__).with_name("triton_offline.py")
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, script, "80"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    programs = ("statistics", "fire", "reductions", "input", "fold", "chain", "sums")
    assert {line[0] for line in lines} == {f"{name}_program" for name in programs}
    assert [line for line in lines if int(line[2])] == []
