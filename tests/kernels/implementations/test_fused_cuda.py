"""The CUDA kernel: its source compiled by g++ and run on the host, compiled by nvcc, run on a GPU if there is one.

"host" runs cuda_on_host.h, beside this file, in the place of CUDA, through the same launcher, on CPU tensors.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import ctypes
import logging
import os
import pathlib
import shutil
import subprocess
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mfpsn_fx import MulFreePSN
from mfpsn_fx.kernels import (
    ATan,
    Layout,
    Rational,
    Sigmoid,
    fire,
    get_kernel,
    neuron,
    power_of_two,
    reference,
    register_kernel,
    unregister_kernel,
)
from mfpsn_fx.kernels.build import cuda as cuda_build
from mfpsn_fx.kernels.constants import NeuronConstants
from mfpsn_fx.kernels.implementations import fused_cuda, fused_cuda_plan
from mfpsn_fx.kernels.kernel import Call, NeuronKernel
from mfpsn_fx.kernels.registry import FLOATS, Problem

OPS = torch.ops.mfpsn
ROOT = pathlib.Path(__file__).resolve().parents[3]
NO_GPU = "needs a CUDA device"
EXAMPLES = 1000  # of spikes; of gradients, whose reference takes its time, fewer
SURROGATES = {"atan": ATan, "rational": Rational, "sigmoid": Sigmoid}


class Emulation(fused_cuda.Device):
    """A device of few multiprocessors whose library runs on the host."""

    def __init__(self, path: pathlib.Path) -> None:
        self._library = fused_cuda._declare_functions(ctypes.CDLL(str(path)))
        self.count, self.runs = 2, 0

    def library(self, device):
        self.runs += 1
        return self._library

    def processors(self, device):
        return self.count

    def stream(self, device):
        return 0

    def guard(self, device):
        return contextlib.nullcontext()


@pytest.fixture(scope="session")
def emulation(tmp_path_factory):
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    path = tmp_path_factory.mktemp("cuda") / "fused_cuda_on_host.so"
    subprocess.run(
        [compiler, "-x", "c++", "-std=c++20", "-O1", "-ffp-contract=off", "-fPIC", "-shared", "-Wall", "-Werror",
         "-Wno-unknown-pragmas", "-Wno-maybe-uninitialized", f"-I{pathlib.Path(__file__).parent}",
         str(cuda_build.SOURCE), "-o", str(path)],
        check=True,
    )  # fmt: skip
    return Emulation(path)


@pytest.fixture(
    params=["host", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_GPU))]
)
def place(request):
    """(method, device type) of what is tested."""
    if request.param == "cuda":
        assert cuda_build.unavailable() is None
        yield "fused-cuda", "cuda"
        return
    machine = request.getfixturevalue("emulation")
    register_kernel("fused-cuda-host", devices=["cpu"], supports=fused_cuda._supports)(fused_cuda.FusedCuda(machine))
    before = machine.runs
    try:
        yield "fused-cuda-host", "cpu"
        assert machine.runs > before, "the test tested the default kernel"
    finally:
        machine.count, machine.grid_limit = 2, fused_cuda_plan.LIMIT
        unregister_kernel("fused-cuda-host")


MEMORY = ["contiguous", "channels_last", "batch_first", "other_layout", "sliced", "shifted", "permuted", "expanded"]


def format_table(shape, layout, memory, dtype, device):
    """Values of ``shape`` = (T, N, C, *) in ``layout``, in memory as its name says."""
    wanted = layout.shape_from(shape, Layout.TIME_FIRST)

    def values(*size):
        return torch.randn(size, dtype=torch.float64).to(dtype).to(device)

    if memory == "channels_last":
        c = layout.channel_dim
        return values(*wanted[:c], *wanted[c + 1 :], wanted[c]).movedim(-1, c)
    if memory == "batch_first":
        order = [1, 0, *range(2, len(wanted))]
        return values(*(wanted[i] for i in order)).permute(order)
    if memory == "other_layout":
        other = values(*layout.other.shape_from(shape, Layout.TIME_FIRST))
        return other.movedim(layout.other.time_dim, layout.time_dim)
    if memory == "sliced":
        return values(*wanted[:-1], 2 * wanted[-1])[..., ::2]
    if memory == "shifted":  # one element past what 16-byte loads could take
        return values(1 + torch.Size(wanted).numel())[1:].view(wanted)
    if memory == "permuted":
        order = torch.randperm(len(wanted)).tolist()
        return values(*(wanted[i] for i in order)).permute([order.index(i) for i in range(len(wanted))])
    if memory == "expanded":
        return values(*wanted[:-1], 1).expand(wanted)
    return values(*wanted)


@st.composite
def cases(draw):
    dtype = draw(st.sampled_from(FLOATS))
    most = fused_cuda_plan.MAX_ORDER_FLOAT64 if dtype is torch.float64 else fused_cuda_plan.MAX_ORDER
    return {
        "shape": (
            draw(st.sampled_from([1, 2, 3, 4, 8, 9, 16, 17, 64, 97])),
            draw(st.integers(1, 3)),
            draw(st.sampled_from([1, 2, 3, 4, 8, 12, 64])),
            *draw(st.sampled_from([(), (1,), (4,), (8,), (5,), (2, 4), (3, 5), (64,)])),
        ),
        "order": draw(st.sampled_from([k for k in (1, 2, 3, 4, 5, 6, 7, 8, 8, 11, 32) if k <= most])),
        "dilation": draw(st.sampled_from([1, 1, 2, 3, 50])),
        "layout": draw(st.sampled_from(list(Layout))),
        "memory": draw(st.sampled_from(["contiguous", *MEMORY])),
        "dtype": dtype,
        "mask": draw(st.booleans()),
        "affine": draw(st.booleans()),
        "processors": draw(st.sampled_from([1, 2, 132])),
        "blocks": draw(st.sampled_from([1, 3, fused_cuda_plan.LIMIT])),
        "seed": draw(st.integers(0, 2**16)),
    }


def drawn(case, place):
    """(x, weight, γ, β, μ, σ², options) of a case."""
    method, device = place
    torch.manual_seed(case["seed"])
    machine = get_kernel(method).parts.device
    if device == "cpu":
        machine.count, machine.grid_limit = case["processors"], case["blocks"]
    x = format_table(case["shape"], case["layout"], case["memory"], case["dtype"], device)
    c, k = case["shape"][2], case["order"]
    kept = torch.float64 if case["dtype"] is torch.float64 else torch.float32
    weight, gamma, beta, mean = (torch.randn(*s, dtype=kept, device=device) for s in ((c, k), (c,), (c,), (c,)))
    var = torch.rand(c, dtype=kept, device=device) + 0.5
    scale = shift = mask = None
    if case["affine"]:
        scale, shift = torch.randn(c, dtype=kept, device=device), torch.randn(c, dtype=kept, device=device)
    if case["mask"]:
        mask = torch.rand(case["shape"][:2], device=device) < 0.7
    return x, weight, gamma, beta, mean, var, scale, shift, mask


def host(*tensors):
    return [None if t is None else t.detach().cpu() for t in tensors]


def test_spikes_equal_the_default_kernels_to_the_bit(place, monkeypatch):
    """Both sum taps in order in float32, and products with powers of two are exact."""
    method, device = place
    seen = []
    cut = fused_cuda.plan
    monkeypatch.setattr(fused_cuda, "plan", lambda *a: seen.append(cut(*a)) or seen[-1])

    @settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
    @given(cases())
    def check(case):
        x, weight, _, bias, _, _, scale, shift, mask = drawn(case, place)
        taps = power_of_two(weight)
        options = {"dilation": case["dilation"], "layout": str(case["layout"])}
        ours = fire(x, taps, bias, scale, shift, mask, method=method, **options)
        theirs = fire(*host(x, taps, bias, scale, shift, mask), **options)
        assert torch.equal(ours.cpu(), theirs)
        assert ours.stride() == torch.empty_like(x).stride()

    check()
    # every way to cut a problem was among the examples
    assert {(p.lanes, p.vector) for p in seen} == {(0, 1), (0, 4), (0, 8), (1, 1), (1, 2), (1, 4), (1, 8)}
    assert {p.wide_tile for p in seen if p.tile} >= {1, 4, 8}
    assert any(p.tile and p.segments > 1 for p in seen)
    if device == "cpu":  # small problems, on a device of 132 multiprocessors
        assert any(p.phases > 1 for p in seen)
        assert any(p.segments > 1 and not p.tile for p in seen)
        assert {p.width for p in seen} == {1, 2, 4, 8, 16, 32}


def test_training_and_gradients(place):
    """Forward, statistics and every gradient, against the float64 reference, and the whole against its parts."""
    method, _ = place

    @settings(max_examples=EXAMPLES // 4, deadline=None, derandomize=True)
    @given(
        cases(),
        st.sampled_from(["straight-through", "round-only", "none"]),
        st.booleans(),
        st.sampled_from(sorted(SURROGATES)),
    )
    def check(case, gradient, training, surrogate):
        x, *rest = drawn(case, place)
        layout, kept = case["layout"], rest[0].dtype
        weight, *_, scale, shift, mask = rest
        training = training and x.numel() > weight.shape[0]
        grad = torch.randn_like(x.double()).to(x.dtype)
        constants = NeuronConstants(
            eps=1e-2, surrogate=surrogate, alpha=1.5, gradient=gradient, training=training, dilation=case["dilation"],
            layout=str(layout),
        )  # fmt: skip
        call = Call(constants, kept, scale, shift, mask)
        parts = get_kernel(method).parts
        given = (None, None) if training else tuple(rest[3:5])
        spikes, mean, var = parts.forward(call, x, *rest[:3], *given)
        found = parts.backward(call, grad, x, *rest[:3], mean, var, True)
        apart = NeuronKernel.forward(parts, call, x, *rest[:3], *given)
        assert all(torch.equal(a, b) for a, b in zip((spikes, mean, var), apart, strict=True))
        options = {"eps": 1e-2, "gradient": gradient, "dilation": case["dilation"], "layout": layout,
                   "training": training}  # fmt: skip
        arguments, extras = host(x, *rest[:5]), dict(zip(("scale", "shift", "mask"), host(*rest[5:]), strict=True))
        expected = reference.forward(*arguments, **options, **extras)
        wanted = reference.backward(grad.cpu(), *arguments, surrogate=call.surrogate, **options, **extras)
        tolerance = {torch.float64: 1e-9, torch.float32: 2e-3}.get(case["dtype"], 3e-2)
        # a fused weight within rounding of 2^(n+½) may fall to either side: such channels are left out
        fused = (arguments[2].double() / torch.sqrt(expected.var + 1e-2))[:, None] * arguments[1].double()
        near = 1e-4 if kept is torch.float32 else 1e-12
        sure = (torch.log2(fused.abs() + 1e-300) % 1 - 0.5).abs().amin(1) > near
        if gradient == "none":
            sure = torch.ones_like(sure)
        torch.testing.assert_close(mean.cpu().double(), expected.mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(var.cpu().double(), expected.var, rtol=1e-4, atol=1e-5)
        whole = [v for v in found if v is not None]
        pieces = [v for v in NeuronKernel.backward(parts, call, grad, x, *rest[:3], mean, var, True)
                  if v is not None]  # fmt: skip
        for value, piece, want in zip(whole, pieces, [w for w in wanted if w is not None], strict=True):
            channel = layout.channel_dim if value.ndim > 2 else 0
            value, piece, want = (v.cpu().double().movedim(channel, 0)[sure] for v in (value, piece, want))
            bound = tolerance * max(1.0, float(want.abs().max()) if want.numel() else 1.0)
            torch.testing.assert_close(value, want, rtol=tolerance, atol=bound)
            torch.testing.assert_close(value, piece, rtol=1e-3, atol=1e-3 * bound / tolerance)
        assert found[0].stride() == torch.empty_like(x).stride()

    check()


def test_the_folds_bias_is_equal_to_the_bit(place, at_the_threshold):
    method, device = place
    spikes, *_ = neuron(*(t.to(device) for t in at_the_threshold), method=method)
    assert spikes[0].all()
    assert not spikes[1].any()


def test_backward_is_frugal(place):
    """Nothing the size of X is allocated beside the gradient of X."""
    method, device = place
    if device != "cpu":
        pytest.skip("the host's allocations are counted")
    x, grad = torch.randn(8, 16, 64, 32), torch.randn(8, 16, 64, 32)
    weight, one = torch.randn(64, 2), torch.ones(64)
    _, mean, var = neuron(x, weight, one, -one, 0 * one, one, training=True, method=method)
    with torch.profiler.profile(profile_memory=True) as profile:
        OPS.neuron_backward(grad, x, weight, one, -one, mean, var, training=True, method=method)
    size = x.numel() * 4
    assert size <= sum(max(0, e.self_cpu_memory_usage) for e in profile.events()) < 1.1 * size
    assert not any("autograd" in e.name.lower() for e in profile.events())


SIZES = [(8, 3, 32, 32), (4, 5, 130), (33, 2, 5, 9), (130, 2, 3, 4), (100, 1, 1, 1), (2, 70, 3, 1), (16, 2, 64, 33)]


@pytest.mark.parametrize("layout", list(Layout))
@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_sizes_past_a_block_and_bit_equal_runs(place, layout, shape):
    """More than a block of everything; runs agree to the bit, whatever the grid; poisoned memory changes nothing."""
    method, device = place
    x = format_table(shape, layout, "contiguous", torch.float32, device)
    grad = torch.randn_like(x)
    weight, one = torch.randn(shape[2], 3, device=device), torch.ones(shape[2], device=device)
    options = {"dilation": 2, "training": True, "layout": str(layout), "method": method}

    def run():
        spikes, mean, var = neuron(x, weight, one, -one, 0 * one, one, **options)
        return [spikes, mean, var, *OPS.neuron_backward(grad, x, weight, one, -one, mean, var, **options)[:4]]

    first = run()
    if device == "cpu":
        get_kernel(method).parts.device.grid_limit = 2
    torch.use_deterministic_algorithms(True)  # fills what torch.empty gives with NaN
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        second = run()
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    arguments = host(x, weight, one, -one, 0 * one, one)
    wanted = reference.backward(
        host(grad)[0], *arguments, surrogate=ATan(2.0), dilation=2, training=True, layout=layout
    )
    fused = weight.cpu().double() / torch.sqrt(first[2].cpu().double() + 1e-5)[:, None]
    sure = (torch.log2(fused.abs()) % 1 - 0.5).abs().amin(1) > 1e-4
    for value, want in zip(first[3:], wanted[:4], strict=True):
        channel = layout.channel_dim if value.ndim > 2 else 0
        value, want = (v.cpu().double().movedim(channel, 0)[sure] for v in (value, want))
        torch.testing.assert_close(value, want, rtol=2e-4, atol=2e-4 * max(1.0, float(want.abs().max())))


@pytest.mark.parametrize("layout", list(Layout))
@pytest.mark.parametrize("first", [0.0, 1e3, 5e3])
def test_variance_is_stable_at_a_large_mean(place, layout, first):
    """Also where the value that deviations are taken from lies far out."""
    method, device = place
    x = torch.randn(8, 16, 4, 9, device=device) + 1e3
    x[0, 0] = first
    ours = x if layout is Layout.TIME_FIRST else x.movedim(0, -1).contiguous()
    mean, var = OPS.statistics(ours, torch.ones(4, 1, device=device), layout=str(layout), method=method)
    exact = x.double().transpose(0, 2).reshape(4, -1).cpu()
    torch.testing.assert_close(mean.cpu().double(), exact.mean(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(var.cpu().double(), exact.var(1, correction=0), rtol=1e-3, atol=0)


@pytest.mark.parametrize("layout", list(Layout))
def test_what_stands_in_padding_is_never_read(place, layout):
    method, device = place
    x = format_table((5, 2, 4, 8), layout, "contiguous", torch.float32, device)
    mask = torch.rand(5, 2, device=device) < 0.6
    dead = ~mask if layout is Layout.TIME_FIRST else ~mask.t()
    spoilt, grad = x.clone(), torch.randn_like(x)
    spoilt_grad = grad.clone()
    for t in (spoilt, spoilt_grad):
        (t.movedim(-1, 1) if layout is Layout.TIME_LAST else t)[dead] = float("nan")
    weight, one = torch.randn(4, 2, device=device), torch.ones(4, device=device)
    options = {"training": True, "layout": str(layout), "method": method}
    results = []
    for value, g in ((x, grad), (spoilt, spoilt_grad)):
        s, mean, var = neuron(value, weight, one, -one, 0 * one, one, one, one, mask, **options)
        results.append([s, mean, var, *OPS.neuron_backward(g, value, weight, one, -one, mean, var, one, one, mask,
                                                           **options)])  # fmt: skip
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_infinite_values_stay_within_the_order(place):
    """A window of 4 holds 3 taps: what is older than the order may not turn up as 0·∞."""
    method, device = place
    x = torch.randn(9, 2, 4, 8, device=device)
    x[2, :, :, ::3] = float("inf")
    taps, bias = power_of_two(torch.randn(4, 3, device=device)), torch.zeros(4, device=device)
    assert torch.equal(fire(x, taps, bias, method=method).cpu(), fire(*host(x, taps, bias)))


def test_a_module_trains_on_it(place):
    method, device = place
    x = torch.randn(6, 3, 8, 16, device=device)
    found = []
    for name in (method, "shifted-add"):
        torch.manual_seed(1)
        sn = MulFreePSN(8, 3, 2).to(device)
        sn.bind(kernel=name)
        leaf = x.clone().requires_grad_()
        sn(leaf).square().sum().backward()
        found.append([leaf.grad, sn.running_mean, sn.running_var, *(p.grad for p in sn.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def plan_of(x, layout=Layout.TIME_FIRST, order=2, dilation=1, processors=132):
    geometries = tuple(fused_cuda._geometry(t, layout) for t in (x, torch.empty_like(x)))
    steps, batch, channels = (x.shape[d] for d in (layout.time_dim, layout.batch_dim, layout.channel_dim))
    shape = (steps, batch, channels, x.numel() // (steps * batch * channels))
    return fused_cuda_plan.plan(shape, order, dilation, x.element_size(), geometries, processors)


class TestPlan:
    def test_16_bytes_a_load_where_memory_allows(self):
        x = torch.empty(8, 32, 128, 32)
        assert plan_of(x)[:3] == (0, 8, 4)
        assert plan_of(x.half())[:3] == (0, 4, 8)
        assert plan_of(x.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2))[:3] == (1, 32, 4)
        assert plan_of(torch.empty(8, 32, 128))[:3] == (1, 32, 4)

    def test_misaligned_and_odd_memory_takes_the_scalar_path(self):
        x = torch.empty(8 * 32 * 128 * 32 + 1)[1:].view(8, 32, 128, 32)
        assert plan_of(x).vector == 1
        assert plan_of(torch.empty(8, 32, 128, 33)).vector == 1
        assert plan_of(torch.empty(8, 32, 128, 64)[..., ::2]).vector == 1
        assert plan_of(torch.empty(8, 32, 128, 1).expand(8, 32, 128, 32)).vector == 1
        assert plan_of(torch.empty(8, 32, 128, 33)[..., :32]).vector == 1  # rows are not all aligned

    def test_time_last_goes_through_shared_memory(self):
        last = plan_of(torch.empty(32, 128, 32, 64), Layout.TIME_LAST)
        assert (last.tile, last.wide_tile, last.span) == (65, 4, 64)
        long = plan_of(torch.empty(2, 3, 4, 1024), Layout.TIME_LAST)
        assert long.tile <= 95
        assert long.segments > 1
        assert not plan_of(torch.empty(2, 3, 4, 1024), Layout.TIME_LAST, order=32, dilation=9).tile

    def test_small_batches_fill_the_device(self):
        assert plan_of(torch.empty(1024, 1, 64, 4), dilation=3).segments > 8
        assert plan_of(torch.empty(8, 32, 16, 8)).chunks == 32  # a group for every n

    def test_partials_stay_small(self):
        for shape in ((2, 4096, 512), (32, 512, 64, 16), (4, 1, 8, 65536), (4, 65536, 16)):
            x = torch.empty(shape)
            cut = plan_of(x, order=4)
            assert 6 * shape[2] * cut.partials < max(x.numel() / 10, 2**19)


class TestFaults:
    def test_an_error_from_a_launch(self, emulation):
        parts = fused_cuda.FusedCuda(emulation)
        call = Call(NeuronConstants(), torch.float32)
        emulation._library.cuda_on_host_fail(9)
        with pytest.raises(RuntimeError, match=r"fused-cuda: .* on cpu failed with CUDA error 9 \(invalid conf"):
            parts.fire(call, torch.randn(4, 2, 3), torch.ones(3, 2), torch.zeros(3))
        assert parts.fire(call, torch.ones(4, 2, 3), torch.ones(3, 2), torch.zeros(3)).sum() == 24

    def test_out_of_memory_is_torchs_own_error(self, emulation, monkeypatch):
        def refuse(*args, **kwargs):
            raise torch.OutOfMemoryError("CUDA out of memory")

        parts = fused_cuda.FusedCuda(emulation)
        call = Call(NeuronConstants(), torch.float32)
        x = torch.randn(4, 2, 3)
        monkeypatch.setattr(torch, "empty", refuse)
        with pytest.raises(torch.OutOfMemoryError):
            parts.statistics(call, x, torch.ones(3, 2))

    def test_a_library_of_other_arguments(self):
        class Size:
            def __call__(self):
                return 8

        class Other:
            mfpsn_cuda_run, mfpsn_cuda_error = types.SimpleNamespace(), types.SimpleNamespace()
            mfpsn_cuda_arguments_size = Size()

        with pytest.raises(RuntimeError, match="takes 8 bytes of arguments"):
            fused_cuda._declare_functions.__wrapped__(Other)

    def test_what_it_refuses(self):
        problem = Problem((4, 2, 3), Layout.TIME_FIRST, torch.float32, "cuda", 2, 1)
        kernel = get_kernel("fused-cuda")
        assert "surrogates atan, rational, sigmoid, not triangle" in kernel.refusal(
            problem._replace(surrogate="triangle")
        )
        assert kernel.refusal(problem._replace(order=33)) == "takes up to 32 taps, not 33"
        wide = problem._replace(order=9, dtype=torch.float64)
        assert kernel.refusal(wide) == "takes up to 8 taps in float64, not 9"
        assert "not on cpu" in kernel.refusal(problem._replace(device="cpu"))
        if not torch.cuda.is_available():
            assert kernel.refusal(problem) == "no CUDA device was found"


class TestBuild:
    @pytest.fixture(autouse=True)
    def _fresh(self, monkeypatch, tmp_path):
        monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
        cuda_build._library.cache_clear()
        yield
        cuda_build._library.cache_clear()

    def fake_nvcc(self, tmp_path, monkeypatch, then):
        """A compiler that knows its version, and does ``then`` instead of compiling."""
        path = tmp_path / "nvcc"
        path.write_text(f'#!/bin/sh\nif [ "$1" = --version ]; then echo 13; exit 0; fi\n{then}\n')
        path.chmod(0o755)
        monkeypatch.setattr(cuda_build, "compiler", lambda: str(path))

    def test_no_nvcc(self, monkeypatch, script):
        monkeypatch.setattr(cuda_build.shutil, "which", lambda name: None)
        with pytest.raises(cuda_build.BuildError, match="no nvcc was found"):
            cuda_build.library((9, 0))
        with pytest.raises(cuda_build.BuildError, match="no nvcc was found"):
            script("benchmarks/gpu_registers.py").usage("sm_90")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
        assert cuda_build.unavailable() == "no nvcc was found; install the CUDA toolkit or set CUDA_HOME"

    def test_an_architecture_too_old(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
        assert cuda_build.unavailable() == ("compute capability 7.5 is not supported: the kernels need 8.0 or newer")

    def test_a_compiler_that_fails(self, monkeypatch, tmp_path):
        self.fake_nvcc(tmp_path, monkeypatch, "echo 'x.cu(1): error: no such thing' >&2; exit 2")
        with pytest.raises(cuda_build.BuildError, match=r"failed: x\.cu\(1\): error: no such thing"):
            cuda_build.library((9, 0))
        assert not list((tmp_path / "mfpsn_fx").iterdir())

    def test_a_whole_file_or_none(self, monkeypatch, tmp_path, caplog):
        """What the compiler leaves is renamed in one step, once; a second process finds it."""
        empty = tmp_path / "empty.so"
        (tmp_path / "empty.c").write_text("int nothing;\n")
        subprocess.run(["g++", "-shared", "-o", empty, tmp_path / "empty.c"], check=True)
        self.fake_nvcc(
            tmp_path, monkeypatch, f'echo . >> {tmp_path}/calls; while [ "$1" != -o ]; do shift; done; cp {empty} "$2"'
        )
        with caplog.at_level(logging.WARNING, "mfpsn_fx"):
            cuda_build.library((9, 0))
        assert "compiling the CUDA kernels for sm_90" in caplog.text
        cuda_build._library.cache_clear()
        cuda_build.library((9, 0))
        assert len((tmp_path / "calls").read_text().split()) == 1
        (built,) = (tmp_path / "mfpsn_fx").iterdir()
        assert built.name.startswith("fused_cuda_sm_90_")

    def test_two_builds_at_once(self, monkeypatch, tmp_path):
        """One compiles, the other waits for it."""
        (tmp_path / "empty.c").write_text("int nothing;\n")
        self.fake_nvcc(
            tmp_path,
            monkeypatch,
            f"echo . >> {tmp_path}/calls; "
            f'while [ "$1" != -o ]; do shift; done; exec g++ -shared -o "$2" {tmp_path}/empty.c',
        )
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            found = list(pool.map(cuda_build._library.__wrapped__, [(9, 0)] * 2))
        assert all(isinstance(library, ctypes.CDLL) for library in found)
        assert len((tmp_path / "calls").read_text().split()) == 1
        assert len(list((tmp_path / "mfpsn_fx").iterdir())) == 1


def _nvcc() -> bool:
    try:
        cuda_build.compiler()
    except cuda_build.BuildError:
        return False
    return True


# nvcc takes a quarter of a minute for each architecture
in_ci = pytest.mark.skipif(os.environ.get("CI") != "true", reason="compiled in CI (CI=true)")


@pytest.mark.skipif(not _nvcc(), reason="needs nvcc")
@pytest.mark.parametrize(
    ("arch", "dtypes"),
    [
        pytest.param("sm_80", ["float32"], marks=in_ci),
        ("sm_90", ["float32", "bfloat16", "float64"]),
        pytest.param("sm_100", ["float32"], marks=in_ci),
    ],
    ids=["sm_80", "sm_90", "sm_100"],
)
def test_compiles_without_spills(arch, dtypes, script):
    """`python benchmarks/gpu_registers.py` compiles all dtypes for all architectures, and takes minutes."""
    rows = script("benchmarks/gpu_registers.py").usage(arch, dtypes)
    assert {row.dtype for row in rows} == set(dtypes)
    assert {row.kernel for row in rows} == {
        "statistics", "fire", "reductions", "input", "fold", "finish_statistics", "finish_reductions", "finish_input",
    }  # fmt: skip
    ours = [row for row in rows if row.dtype == "float32" and (row.window or 0) <= 8]
    assert len(ours) == 4 * 3 * 3 + 4
    assert [row for row in ours if row.spill_stores or row.spill_loads or row.stack] == []


def test_the_table_of_registers(monkeypatch, capsys, script):
    report = script("benchmarks/gpu_registers.py")
    row = report.Usage("sm_90", "fire", "float32", 4, 4, "one channel", 64, 0, 0, 0)
    monkeypatch.setattr(report, "usage", lambda arch, dtypes: [row._replace(arch=arch)])
    assert report.main(["--arch", "sm_80", "sm_90"]) == 0
    assert capsys.readouterr().out.count("float32") == 2

    def fail(arch, dtypes):
        raise cuda_build.BuildError("nvcc failed: no sm_1")

    monkeypatch.setattr(report, "usage", fail)
    assert report.main(["--arch", "sm_1"]) == 1
    assert "no sm_1" in capsys.readouterr().err


@pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_GPU)
class TestOnDevice:
    def test_the_current_stream_is_used(self):
        x, taps = torch.full((8, 4, 16, 32), 0.75, device="cuda"), torch.ones(16, 1, device="cuda")
        bias = torch.full((16,), -1.0, device="cuda")
        assert not fire(x, taps, bias, method="fused-cuda").any()  # and the library is loaded
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda._sleep(50_000_000)
            x.mul_(2)  # on another stream, the kernel would read x before this
            spikes = fire(x, taps, bias, method="fused-cuda")
        torch.cuda.synchronize()
        assert spikes.all()

    def test_a_cuda_graph(self):
        x, weight = torch.randn(8, 4, 16, 32, device="cuda"), torch.randn(16, 2, device="cuda")
        one = torch.ones(16, device="cuda")
        run = lambda: neuron(x, weight, one, -one, 0 * one, one, training=True, method="fused-cuda")  # noqa: E731
        run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run()
        x.normal_()
        graph.replay()
        for a, b in zip(captured, run(), strict=True):
            assert torch.equal(a, b)

    def test_more_than_2_to_the_31_elements(self):
        size = 2**31 + 2**22
        if torch.cuda.mem_get_info()[0] < 2.5 * size * 2:
            pytest.skip("needs 11 GB of free device memory")
        x = torch.zeros(2, size // 2 // 1024, 1024, dtype=torch.float16, device="cuda")
        x[1, -1, -1] = 1
        taps, bias = torch.ones(1024, 1, device="cuda"), -torch.ones(1024, device="cuda")
        spikes = fire(x, taps, bias, method="fused-cuda")
        assert spikes[1, -1, -1] == 1
        assert int(spikes.view(-1, 1024).sum(0, dtype=torch.float32).sum()) == 1
