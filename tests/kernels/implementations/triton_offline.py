"""Compile the Triton kernel's programs as its real launches would, with no GPU: run by ``test_fused_triton``.

Triton's interpreter is more lenient than its compiler. Here the kernel is called on CPU tensors without the
interpreter, and each launch is caught and compiled for the architecture given as argument, by the arguments it was
launched with: ones and ``None`` become constants and multiples of 16 are known as such, as at a launch.

    python tests/kernels/implementations/triton_offline.py 90 [--all]

takes the tiles of small tensors, with ``--all`` those of large ones too and more cases, and prints a line each: name,
registers per thread, bytes spilled, elements of a tile, and how it was called.
"""

from __future__ import annotations

import pathlib
import re
import subprocess
import sys
import tempfile
import unittest.mock

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource, compile
from triton.runtime.jit import JITFunction

from mfpsn_fx.kernels import Layout, get_kernel
from mfpsn_fx.kernels.constants import NeuronConstants
from mfpsn_fx.kernels.kernel import Call

TYPES = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.uint8: "*u8",
}


def usage(ptx: str, architecture: int) -> tuple[int, int]:
    """(registers, bytes of spill stores), as ptxas reports them."""
    name = re.search(r"^\.target (\w+)", ptx, re.M)[1]
    with tempfile.TemporaryDirectory() as folder:
        source = pathlib.Path(folder) / "program.ptx"
        source.write_text(ptx, encoding="utf-8")
        command = [get_ptxas(architecture).path, "-v", "--gpu-name", name, str(source), "-o", str(source) + ".cubin"]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    # a division in float64 is a function of its own, with registers of its own
    return tuple(
        max(map(int, re.findall(what, told))) for what in (r"Used (\d+) registers", r"(\d+) bytes spill stores")
    )


class Catcher:
    """Stands in for a launch: compiles, runs nothing."""

    def __init__(self, architecture: int) -> None:
        self.architecture, self.seen, self.about = architecture, set(), ""

    def launched(self, program: JITFunction, *args, grid=None, warmup=False, **kwargs) -> None:
        names = program.arg_names
        given = dict(zip(names, args, strict=False))
        options = {key: kwargs.pop(key) for key in ("num_warps", "enable_fp_fusion") if key in kwargs}
        assert not given.keys() & kwargs.keys()
        given |= kwargs
        assert given.keys() == set(names), (program.__name__, given.keys() ^ set(names))
        signature, constants, aligned = {}, {}, {}
        for index, name in enumerate(names):
            value = given[name]
            if isinstance(value, torch.Tensor):
                signature[name] = TYPES[value.dtype]
                whole = value.data_ptr() % 16 == 0
            elif program.params[index].is_constexpr or value is None or value == 1:
                signature[name], constants[(index,)] = "constexpr", value
                continue
            else:
                signature[name] = "i32" if abs(value) < 2**31 else "i64"
                whole = value % 16 == 0
            if whole:
                aligned[(index,)] = [["tt.divisibility", 16]]
        key = (program.__name__, str(signature), str(constants), str(aligned), str(options))
        if key in self.seen:
            return
        self.seen.add(key)
        source = ASTSource(fn=program, signature=signature, constexprs=constants, attrs=aligned)
        made = compile(source, target=GPUTarget("cuda", self.architecture, 32), options=options)
        registers, spilled = usage(made.asm["ptx"], self.architecture)
        print(program.__name__, registers, spilled, given.get("BLOCK", "-"), self.about, flush=True)


def call(catcher, layout, dtype, order, dilation, shape=(8, 4, 16, 64), extras=False, wide=False) -> None:
    """One forward and backward in training, and fire alone."""
    catcher.about = f"{layout},{str(dtype).removeprefix('torch.')},k={order},d={dilation},{shape},{extras=},{wide=}"
    x = torch.zeros(Layout.parse(layout).shape_from(shape, "time_first"), dtype=dtype)
    kept = torch.float64 if dtype is torch.float64 else torch.float32
    one, weight = torch.ones(shape[2], dtype=kept), torch.ones(shape[2], order, dtype=kept)
    more = (one, one, torch.ones(shape[:2], dtype=torch.bool)) if extras else ()
    kernel = get_kernel("fused-triton").parts
    training, evaluation = (
        Call(NeuronConstants(gradient="round-only", training=t, dilation=dilation, layout=layout), kept, *more)
        for t in (True, False)
    )
    kernel.forward(training, x, weight, one, one, None, None)
    kernel.backward(training, x, x, weight, one, one, one, one, True)
    kernel.backward(evaluation, x, x, weight, one, one, one, one, False)


def main(architecture: int, everything: bool) -> None:
    from mfpsn_fx.kernels.implementations import fused_triton

    catcher = Catcher(architecture)
    JITFunction.run = lambda self, *args, **kwargs: catcher.launched(self, *args, **kwargs)
    compile_cases(catcher, everything)
    if everything:
        fused_triton._MIN_PROGRAMS = 0  # no tensor is too small for the largest tile
        compile_cases(catcher, everything)


def compile_cases(catcher: Catcher, everything: bool) -> None:
    from mfpsn_fx.kernels.implementations import fused_triton

    single, half = torch.float32, torch.bfloat16
    call(catcher, "time_first", half, 4, 1)
    call(catcher, "time_first", single, 8, 1, extras=True)
    call(catcher, "time_first", single, 1, 1, shape=(1, 1, 1, 1))
    call(catcher, "time_last", single, 4, 2, extras=True)
    if everything:
        for dtype in (single, torch.float16, torch.float64):
            call(catcher, "time_first", dtype, 4, 1)
        call(catcher, "time_first", single, 8, 3, extras=True)
        call(catcher, "time_first", single, 2, 1, shape=(4, 8, 64, 1))  # channels innermost
        call(catcher, "time_first", half, 32, 1)
        call(catcher, "time_last", half, 8, 1)
        call(catcher, "time_last", single, 32, 1)
    with unittest.mock.patch.object(fused_triton._Geometry, "needs_wide_offsets", return_value=True):
        call(catcher, "time_first", single, 2, 1, extras=True, wide=True)
        if everything:
            call(catcher, "time_last", single, 2, 1, extras=True, wide=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), "--all" in sys.argv[2:])
