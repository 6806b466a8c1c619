"""The C++ kernel: built, really used, independent of threads, frugal; and what happens where it cannot be built."""

from __future__ import annotations

import dataclasses
import logging
import os
import subprocess
import sys

import pytest
import torch

from mfpsn_fx import MulFreePSN
from mfpsn_fx.kernels import ATan, Layout, fire, get_kernel, neuron, power_of_two, reference
from mfpsn_fx.kernels.build import cpu as cpu_build
from mfpsn_fx.kernels.constants import NeuronConstants
from mfpsn_fx.kernels.kernel import Call, NeuronKernel
from mfpsn_fx.kernels.registry import Problem

OPS = torch.ops.mfpsn


def test_it_is_available_and_is_what_runs(monkeypatch):
    """A C++ compiler is a stated need of the suite; without this the other tests would test the default kernel."""
    assert cpu_build.unavailable() is None
    calls = []
    parts = get_kernel("fused-cpp").parts
    original = type(parts).fire
    monkeypatch.setattr(type(parts), "fire", lambda self, *a: calls.append(1) or original(self, *a))
    fire(torch.randn(4, 2, 3), torch.ones(3, 2), torch.zeros(3), method="fused-cpp")
    assert calls == [1]


@pytest.mark.parametrize("layout", list(Layout))
def test_spikes_equal_the_default_kernels_to_the_bit(layout):
    """Real inputs: both sum taps in order in float32, and products with powers of two are exact."""
    for seed in range(5):
        torch.manual_seed(seed)
        x = torch.randn(Layout.shape_from(layout, (9, 4, 6, 5), Layout.TIME_FIRST))
        taps, bias = power_of_two(torch.randn(6, 4)), torch.randn(6)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            ours = fire(x.to(dtype), taps, bias, dilation=2, layout=str(layout), method="fused-cpp")
            assert torch.equal(ours, fire(x.to(dtype), taps, bias, dilation=2, layout=str(layout)))


@pytest.mark.parametrize("memory", ["channels_last", "batch_first", "rows_apart"])
def test_strides_are_taken_as_they_are(memory):
    x = torch.randn(5, 3, 8, 4, 6)
    if memory == "channels_last":
        x = x.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    elif memory == "batch_first":
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    else:
        x = torch.randn(5, 3, 8, 4, 12)[..., ::2]
    one = torch.ones(8)
    weight = torch.randn(8, 3)
    for training in (True, False):
        ours, theirs = (
            neuron(x, weight, one, 0 * one, 0 * one, one, dilation=2, training=training, method=name)[0]
            for name in ("fused-cpp", "shifted-add")
        )
        assert torch.equal(ours, theirs)
        assert ours.stride() == theirs.stride()


def gradients(x, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        torch.manual_seed(1)
        sn = MulFreePSN(x.shape[2], 3, 2)
        sn.bind(kernel="fused-cpp")
        x = x.clone().requires_grad_()
        out = sn(x)
        out.backward(torch.linspace(-1, 1, out.numel()).view(out.shape))
        return [out, x.grad, sn.running_mean, sn.running_var, *(p.grad for p in sn.parameters())]
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("shape", [(4, 7, 3), (8, 16, 64, 40), (40, 3, 5, 7)])
def test_determinism(shape):
    """Bit-equal over repeated runs and numbers of threads."""
    x = torch.randn(shape)
    first = gradients(x, 1)
    for threads in (1, 2, 2):
        for a, b in zip(first, gradients(x, threads), strict=True):
            assert torch.equal(a, b)


def test_variance_is_stable_at_a_large_mean():
    x = torch.randn(8, 64, 4, 9) + 1e3
    mean, var = OPS.statistics(x, torch.ones(4, 1), method="fused-cpp")
    exact = x.double().transpose(0, 2).reshape(4, -1)
    torch.testing.assert_close(mean.double(), exact.mean(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(var.double(), exact.var(1, correction=0), rtol=1e-3, atol=0)


def test_memory_is_not_read_where_nothing_was_written(monkeypatch):
    """Every value of every buffer is written before it is read: poisoned allocations change nothing."""
    x, grad = torch.randn(5, 3, 4, 6), torch.randn(5, 3, 4, 6)
    weight, one = torch.randn(4, 3), torch.ones(4)
    options = {"surrogate": ATan(2.0), "dilation": 2, "training": True}
    expected = reference.backward(grad, x, weight, one, -one, 0 * one, one, **options)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    try:
        spikes, mean, var = neuron(x, weight, one, -one, 0 * one, one, training=True, dilation=2, method="fused-cpp")
        found = OPS.neuron_backward(
            grad, x, weight, one, -one, mean, var, training=True, dilation=2, method="fused-cpp"
        )
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.isfinite(spikes).all()
    for ours, want in zip(found, expected[:4], strict=False):
        torch.testing.assert_close(ours.double(), want, rtol=1e-4, atol=1e-4)


def test_backward_is_one_op_and_frugal():
    """Nothing the size of X is allocated beside the gradient of X."""
    x, grad = torch.randn(8, 64, 64, 32), torch.randn(8, 64, 64, 32)
    weight, one = torch.randn(64, 2), torch.ones(64)
    _, mean, var = neuron(x, weight, one, -one, 0 * one, one, training=True, method="fused-cpp")
    with torch.profiler.profile(profile_memory=True) as profile:
        OPS.neuron_backward(grad, x, weight, one, -one, mean, var, training=True, method="fused-cpp")
    size = x.numel() * 4
    allocated = sum(max(0, e.self_cpu_memory_usage) for e in profile.events())
    assert size <= allocated < 1.1 * size
    assert not any("autograd" in e.name.lower() for e in profile.events())


EXTENSIONS = os.environ.get("TORCH_EXTENSIONS_DIR")


class TestBuild:
    problem = Problem((4, 2, 3), Layout.TIME_FIRST, torch.float32, "cpu", 2, 1)

    @pytest.fixture(autouse=True)
    def _fresh(self, monkeypatch, tmp_path):
        monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
        cpu_build._library.cache_clear()
        yield
        cpu_build._library.cache_clear()

    def test_no_compiler(self, monkeypatch, caplog):
        monkeypatch.setattr(cpu_build.shutil, "which", lambda name: None)
        assert cpu_build.unavailable() == "no C++ compiler was found; install one or set CXX"
        assert get_kernel("fused-cpp").refusal(self.problem) == "no C++ compiler was found; install one or set CXX"
        with pytest.raises(cpu_build.BuildError, match="no C\\+\\+ compiler"):
            cpu_build.library()
        with caplog.at_level(logging.WARNING, "mfpsn_fx"):
            sn = MulFreePSN(3)
            sn.path = "the.layer"
            sn.bind(kernel="fused-cpp")
            sn(torch.randn(4, 2, 3))
        assert "the.layer: kernel 'fused-cpp' gives way to 'shifted-add'" in caplog.text

    def test_a_compiler_that_fails(self, monkeypatch, tmp_path):
        source = tmp_path / "broken.cpp"
        source.write_text("this is no C++\n")
        monkeypatch.setattr(cpu_build, "_SOURCE", source)
        assert "failed" in cpu_build.unavailable()
        assert not list((tmp_path / "mfpsn_fx").glob("*.so"))

    def test_two_processes_at_once(self, tmp_path, monkeypatch):
        """One compiles, the other waits. Their compiler hands out what is built already: compiling takes its time."""
        with monkeypatch.context() as outside:
            outside.delenv("TORCH_EXTENSIONS_DIR")
            if EXTENSIONS is not None:
                outside.setenv("TORCH_EXTENSIONS_DIR", EXTENSIONS)
            built, compiler = cpu_build.library(), cpu_build._compiler()
        cpu_build._library.cache_clear()
        script = tmp_path / "c++"
        script.write_text(
            f'#!/bin/sh\ncase " $* " in\n*" -shared "*) echo . >>{tmp_path}/calls; '
            f'while [ "$1" != -o ]; do shift; done; exec cp {built} "$2" ;;\nesac\nexec {" ".join(compiler)} "$@"\n'
        )
        script.chmod(0o755)
        code = (
            "import torch; from mfpsn_fx.kernels import fire\n"
            "from mfpsn_fx.kernels.build.cpu import library; library()\n"
            "print(int(fire(torch.ones(3, 2, 2), torch.ones(2, 1), torch.zeros(2), method='fused-cpp').sum()))"
        )
        environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path / "cache"), "CXX": str(script)}
        both = [
            subprocess.Popen(
                [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
            )
            for _ in range(2)
        ]
        for process in both:
            out, err = process.communicate(timeout=300)
            assert out.strip() == "12", err
        assert len((tmp_path / "calls").read_text().split()) == 1
        assert len(list((tmp_path / "cache" / "mfpsn_fx").iterdir())) == 1


OVERLAPPING = {
    "expanded over T": lambda: torch.randn(1, 3, 4, 6).expand(5, 3, 4, 6),
    "expanded over N": lambda: torch.randn(5, 1, 4, 6).expand(5, 3, 4, 6),
    "expanded over C": lambda: torch.randn(5, 3, 1, 6).expand(5, 3, 4, 6),
    "windows": lambda: torch.randn(5, 3, 4, 9).unfold(3, 4, 1).flatten(3)[..., :20],
    "windows of one tensor": lambda: torch.randn(100).as_strided((5, 3, 4, 6), (7, 5, 3, 1)),
    "misaligned": lambda: torch.randn(5 * 3 * 4 * 16 + 1)[1:].view(5, 3, 4, 16),
}


@pytest.mark.parametrize("view", OVERLAPPING)
def test_overlapping_and_misaligned_views(view):
    x, one = OVERLAPPING[view](), torch.ones(4)
    weight, grad = torch.randn(4, 3), torch.randn(x.shape)
    options = {"dilation": 2, "training": True}
    expected = reference.backward(grad, x, weight, one, -one, 0 * one, one, surrogate=ATan(2.0), **options)
    spikes, mean, var = neuron(x, weight, one, -one, 0 * one, one, **options, method="fused-cpp")
    dense = neuron(x.contiguous(), weight, one, -one, 0 * one, one, **options, method="fused-cpp")
    # statistics are summed in the order of memory, so a weight on the edge of two powers could flip: none does here
    assert torch.equal(spikes, dense[0])
    found = OPS.neuron_backward(grad, x, weight, one, -one, mean, var, **options, method="fused-cpp")
    for ours, want in zip(found, expected[:4], strict=False):
        torch.testing.assert_close(ours.double(), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(1, 64, 130), (3, 5, 70, 1, 1), (2, 9, 3, 700), (70, 2, 2, 33), (5, 300, 3, 4, 4)])
@pytest.mark.parametrize("memory", ["contiguous", "channels_last", "time_last"])
@pytest.mark.parametrize("gradient", ["straight-through", "round-only", "none"])
def test_whole_equals_its_parts_however_the_work_is_cut(shape, memory, gradient):
    """Blocks, chunks of the batch, groups of blocks and tails; the fold in C++ is the fold in tensor operations."""
    x = torch.randn(shape) * 2 + 1
    layout = "time_first"
    if memory == "channels_last":
        x = x.movedim(2, -1).contiguous().movedim(-1, 2)
    elif memory == "time_last":
        x, layout = x.movedim(0, -1).contiguous(), "time_last"
    channels, kernel = shape[2], get_kernel("fused-cpp").parts
    weight, gamma, beta = torch.randn(channels, 9), torch.randn(channels), torch.randn(channels)
    constants = NeuronConstants(
        gradient=gradient, min_exponent=-6, max_exponent=3, training=True, dilation=2, layout=layout
    )
    call = Call(constants, torch.float32)
    whole = kernel.forward(call, x, weight, gamma, beta, None, None)
    for ours, parts in zip(whole, NeuronKernel.forward(kernel, call, x, weight, gamma, beta, None, None), strict=True):
        assert torch.equal(ours, parts)
    _, mean, var = whole
    exact = reference.forward(x, weight, gamma, beta, mean, var, dilation=2, layout=layout, training=True)
    torch.testing.assert_close(mean.double(), exact.mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(var.double(), exact.var, rtol=1e-5, atol=1e-5)
    grad = torch.randn_like(x)
    arguments = (grad, x, weight, gamma, beta, mean, var, True)
    for training in (True, False):
        call = Call(dataclasses.replace(constants, training=training), torch.float32)
        ours = kernel.backward(call, *arguments)
        parts = NeuronKernel.backward(kernel, call, *arguments)
        for a, b in zip(ours[:4], parts[:4], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


def test_the_folds_bias_is_equal_to_the_bit(at_the_threshold):
    spikes, *_ = neuron(*at_the_threshold, method="fused-cpp")
    assert spikes[0].all()
    assert not spikes[1].any()


@pytest.mark.parametrize("length", [65536, 65543])
def test_results_that_are_written_past_the_caches(length):
    """From 64 MB on, rows at multiples of 64 bytes or not: the same bits as sample by sample, in small results."""
    x, grad = torch.randn(3, 6, 16, length), torch.randn(3, 6, 16, length)
    weight, gamma, beta, mean, var = torch.randn(16, 2), *torch.randn(2, 16), torch.zeros(16), torch.rand(16)
    assert x.numel() * 4 >= 64 << 20 > x[:, :1].numel() * 4
    eval_only = (weight, gamma, beta, mean, var)
    spikes = neuron(x, *eval_only, method="fused-cpp")[0]
    dx = OPS.neuron_backward(grad, x, *eval_only, method="fused-cpp")[0]
    for n in range(6):
        one, its = x[:, n : n + 1], grad[:, n : n + 1]
        assert torch.equal(spikes[:, n : n + 1], neuron(one, *eval_only, method="fused-cpp")[0])
        assert torch.equal(dx[:, n : n + 1], OPS.neuron_backward(its, one, *eval_only, method="fused-cpp")[0])


@pytest.mark.parametrize("width", [16, 60, 1040])
@pytest.mark.parametrize("steps", [8, 9, 64, 65])
def test_rows_of_many_steps(steps, width):
    """Where a line of the caches is several registers spikes of more than 8 steps are put together to lines first."""
    x, w, bias = torch.randn(steps, 2, 4, width), power_of_two(torch.randn(4, 3)), torch.randn(4)
    for memory in (x, torch.randn(x.numel() + 1)[1:].view(x.shape), x[..., 1:]):
        assert torch.equal(fire(memory, w, bias, method="fused-cpp"), fire(memory, w, bias))


def test_offsets_of_many_views_in_turn():
    """More tables of offsets than are kept, each used again after it was dropped; and after another of its sizes."""
    x, w, bias = torch.randn(3, 2, 4, 3, 90), power_of_two(torch.randn(4, 2)), torch.randn(4)
    views = [wide[..., :width] for width in range(2, 72) for wide in (x, x[..., :80].contiguous())]
    for _ in range(2):
        for view in views:
            found = fire(view, w, bias, method="fused-cpp")
            assert torch.equal(found, fire(view.contiguous(), w, bias, method="fused-cpp"))


@pytest.mark.parametrize("alpha", [0.5, 4.0, 50.0])
def test_sigmoid_surrogate(alpha):
    """Its exponential is the kernel's own: far from the threshold too."""
    x = torch.linspace(-40, 40, 997).view(1, 1, 1, -1)
    one, zero = torch.ones(1), torch.zeros(1)
    for dtype in (torch.float32, torch.float64):
        w = one[:, None].to(dtype)
        dx, *_ = OPS.backward_input(
            torch.ones_like(x, dtype=dtype), x.to(dtype), w, zero.to(dtype), w, surrogate="sigmoid", alpha=alpha,
            method="fused-cpp",
        )  # fmt: skip
        s = torch.sigmoid(x.double().abs() * -alpha)  # the small side keeps its digits
        # rounding α·x moves the result by as many units as α·x is large; below e^−87 float32 holds its least value
        tolerance = (1e-5, 1e-36) if dtype is torch.float32 else (1e-12, 1e-300)
        torch.testing.assert_close(dx.double(), alpha * s * (1 - s), rtol=tolerance[0], atol=tolerance[1])


@pytest.mark.parametrize("shape", [(0, 3, 4, 2), (3, 0, 4, 2), (3, 2, 4, 0)])
def test_empty_inputs_of_the_parts(shape):
    x, one, w = torch.empty(shape), torch.ones(4), torch.ones(4, 2)
    assert fire(x, w, one, method="fused-cpp").shape == shape
    assert all(v.tolist() == [0] * 4 for v in OPS.statistics(x, w, method="fused-cpp"))
    assert not any(v.any() for v in OPS.backward_reductions(x, x, w, one, method="fused-cpp"))
    dx, dw, *_ = OPS.backward_input(x, x, w, one, w, one, one, method="fused-cpp")
    assert dx.shape == shape
    assert not dw.any()


@pytest.mark.parametrize("positions", [1031, 97, 64])
@pytest.mark.parametrize("channels", [1, 2, 3, 17])
def test_few_channels_last(channels, positions):
    x = torch.randn(4, 3, positions, channels).movedim(-1, 2)
    weight, one = torch.randn(channels, 2), torch.ones(channels)
    mean, var = OPS.statistics(x, weight, method="fused-cpp")
    found = reference.forward(x, weight, one, one, one, one, training=True)
    torch.testing.assert_close(mean.double(), found.mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(var.double(), found.var, rtol=1e-5, atol=1e-5)


def repeated(steps):
    """So many steps that share their memory; weights for them."""
    return torch.randn(1, 2, 3).expand(steps, 2, 3), torch.ones(3, 2)


def test_out_of_memory_is_told():
    """Scratch space beyond the address space: it is raised, not answered with a wrong result."""
    with pytest.raises(MemoryError, match="fused-cpp: no memory for the scratch space of statistics, order 2"):
        OPS.statistics(*repeated(2**44), method="fused-cpp")


def test_other_errors_are_told_as_they_are():
    """Scratch space of more entries than a vector can have: that is not std::bad_alloc."""
    values = cpu_build.level().register_bytes // 4
    with pytest.raises(RuntimeError, match=r"fused-cpp: statistics of order 2 failed: \w"):
        OPS.statistics(*repeated(2**60 // values), method="fused-cpp")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_of_the_process():
    """Scratch space of the library's own counts too: beyond dX, backward takes under a tenth of X."""
    code = (
        "import re, torch\n"
        "from mfpsn_fx.kernels import neuron\n"
        # not getrusage: what that gives a child begins with its parent's peak
        "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) * 1024\n"
        "torch.set_num_threads(2)\n"
        "w, one = torch.randn(64, 4), torch.ones(64)\n"
        "for x in (torch.randn(4, 2, 64, 8), torch.randn(16, 128, 64, 256)):\n"
        "    grad = torch.ones_like(x)\n"
        "    _, mean, var = neuron(x, w, one, -one, one, one, training=True, method='fused-cpp')\n"
        "    del _\n"
        "    reserve = torch.ones_like(x).add_(1); del reserve\n"
        "    before = peak()\n"
        "    keep = torch.ones_like(x)\n"
        "    out = torch.ops.mfpsn.neuron_backward(\n"
        "        grad, x, w, one, -one, mean, var, training=True, method='fused-cpp')\n"
        "    print(peak() - before, x.numel() * 4)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    grown, size = map(int, done.stdout.splitlines()[-1].split())
    # `keep` fills what the peak of the forward pass left, so dX is new memory
    assert 0.9 * size < grown < 1.1 * size


def test_unknown_surrogates_are_refused():
    problem = TestBuild.problem._replace(surrogate="triangle")
    assert get_kernel("fused-cpp").refusal(problem) == "knows the surrogates atan, rational, sigmoid, not triangle"
