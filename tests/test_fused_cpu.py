"""The C++ kernel: built, really used, independent of threads, frugal; and what happens where it cannot be built."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest
import torch

from mfpsn_fx import MulFreePSN
from mfpsn_fx.kernels import ATan, Layout, cpu_build, fire, get_kernel, neuron, power_of_two, reference
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

    def test_two_processes_at_once(self, tmp_path):
        code = (
            "import torch; from mfpsn_fx.kernels import fire\n"
            "from mfpsn_fx.kernels.cpu_build import library; library()\n"
            "print(int(fire(torch.ones(3, 2, 2), torch.ones(2, 1), torch.zeros(2), method='fused-cpp').sum()))"
        )
        both = [
            subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for _ in range(2)
        ]
        for process in both:
            out, err = process.communicate(timeout=300)
            assert out.strip() == "12", err
        assert len(list((tmp_path / "mfpsn_fx").iterdir())) == 1


def test_unknown_surrogates_are_refused():
    problem = TestBuild.problem._replace(surrogate="triangle")
    assert get_kernel("fused-cpp").refusal(problem) == "knows the surrogates atan, rational, sigmoid, not triangle"
