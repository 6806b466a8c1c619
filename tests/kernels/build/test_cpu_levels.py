"""MFPSN_FX_MARCH: the C++ kernels compiled for another level of instructions, and what is refused."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest
import torch

from mfpsn_fx.__main__ import main
from mfpsn_fx.kernels.autotune import environment as machine
from mfpsn_fx.kernels.autotune.cache import SelectionCache
from mfpsn_fx.kernels.build import cpu as cpu_build

CPU = torch.device("cpu")
x86 = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="levels of x86-64")


def printed(code: str, march: str) -> str:
    """What ``code`` prints in a process of its own, its kernels compiled for ``march``."""
    environment = {**os.environ, cpu_build.VARIABLE: march}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@x86
def test_vectors_are_as_wide_as_the_levels_registers():
    widths = {"x86-64-v2": 16, "sandybridge": 32, "x86-64-v3": 32, "x86-64-v4": 64}
    assert {march: cpu_build.register_bytes(march) for march in widths} == widths


def test_the_library_says_what_it_was_compiled_for(another_level):
    assert cpu_build.level().register_bytes == cpu_build.register_bytes(cpu_build.march())
    code = "from mfpsn_fx.kernels.build import cpu; print(*cpu.level(), sep='; ')"
    width = cpu_build.register_bytes(another_level)
    assert printed(code, another_level).strip() == f"{another_level}; { {32: 'AVX2', 16: 'SSE4.2'}[width] }; {width}"


SPIKES = """
import hashlib, itertools, torch
from mfpsn_fx.kernels import fire, neuron, power_of_two
digest = hashlib.sha256()
# 9 steps and more are written by the line; 131 positions end within a line, and 5 within a register
for steps, order, positions, dtype in itertools.product(
    (1, 3, 8, 9, 40), (1, 2, 4, 8, 9), (5, 131), (torch.float32, torch.float64, torch.bfloat16)
):
    for layout, extras in itertools.product(("time_first", "time_last"), (False, True)):
        torch.manual_seed(steps + order)
        x = torch.randn(steps, 3, 7, positions).to(dtype)
        x = x.movedim(0, -1).contiguous() if layout == "time_last" else x
        kept = torch.float64 if dtype is torch.float64 else torch.float32
        taps, bias, scale, shift = power_of_two(torch.randn(7, order)).to(kept), *torch.randn(3, 7).to(kept)
        mask = torch.rand(steps, 3) < 0.7
        options = {"dilation": 2, "layout": layout, "method": "fused-cpp"}
        given = (x, taps, bias, scale, shift, mask) if extras else (x, taps, bias)
        digest.update(fire(*given, **options).float().numpy().tobytes())
        whole, *_ = neuron(x, taps, scale, bias, shift, scale.abs(), **options)
        digest.update(whole.float().numpy().tobytes())
print(digest.hexdigest())
"""


def test_spikes_are_equal_to_the_bit_at_all_levels(another_level):
    """Given the taps: products with powers of two are exact, so fused multiply-adds change nothing."""
    assert printed(SPIKES, "native") == printed(SPIKES, another_level)


@pytest.fixture
def at(monkeypatch):
    """``at(march)``: as a process that starts with this MFPSN_FX_MARCH; nothing is compiled."""
    monkeypatch.setattr(cpu_build, "cached", lambda stem, identity, *rest: pytest.fail("compiled"))
    caches = (cpu_build.march, cpu_build._library, machine._constant_facts)

    def clear():
        for cache in caches:
            cache.cache_clear()

    def start(march):
        monkeypatch.setenv(cpu_build.VARIABLE, march)
        clear()

    yield start
    monkeypatch.undo()
    clear()


def test_unknown_levels_are_told(at, capsys):
    at("nonsense")
    reason = cpu_build.unavailable()
    assert reason.startswith("MFPSN_FX_MARCH=nonsense is not known to the compiler (")
    assert "; unset MFPSN_FX_MARCH to compile for this processor, or name a level that it has" in reason
    with pytest.raises(cpu_build.BuildError, match="MFPSN_FX_MARCH=nonsense"):
        cpu_build.library()
    assert main(["build"]) == 1
    assert main(["kernels"]) == 0
    assert capsys.readouterr().out.count("MFPSN_FX_MARCH=nonsense") == 2


@x86
def test_levels_that_the_processor_lacks_are_told(at, monkeypatch):
    """Instead of an illegal instruction."""
    at("x86-64-v3")
    flags = "fpu sse sse2 pni ssse3 sse4_1 sse4_2 popcnt avx f16c movbe abm bmi1"
    monkeypatch.setattr(cpu_build, "_processor", lambda: f"model name\t: Some CPU\nflags\t\t: {flags}\n")
    assert cpu_build.unavailable().startswith(
        "MFPSN_FX_MARCH=x86-64-v3 needs fma, bmi2, avx2, which this processor lacks;"
    )
    assert cpu_build.refusal("x86-64-v2") is None
    assert cpu_build.refusal("native") is None


def test_each_level_has_a_library_of_its_own(at, monkeypatch):
    identities = []

    def cached(stem, identity, *rest):
        identities.append("\n".join(identity))
        raise cpu_build.BuildError("not compiled")

    for march in ("", "native", "x86-64-v2", "x86-64-v3"):
        at(march)
        monkeypatch.setattr(cpu_build, "cached", cached)
        monkeypatch.setattr(cpu_build, "refusal", lambda march: None)
        assert cpu_build.unavailable() == "not compiled"
    assert identities[0] == identities[1]
    assert len(set(identities)) == 3


def test_each_level_has_selections_of_its_own(at, tmp_path):
    cache = SelectionCache(tmp_path)
    at("x86-64-v2")
    cache.put("key", CPU, {"a": 1})
    at("x86-64-v3")
    assert cache.get("key", CPU) is None
    at("x86-64-v2")
    assert cache.get("key", CPU) == {"a": 1}


def test_the_command_line_names_the_level(capsys):
    assert main(["kernels"]) == 0
    level = cpu_build.level()
    assert f"fused-cpp is compiled for {level}: vectors of {level.register_bytes} bytes" in capsys.readouterr().out
