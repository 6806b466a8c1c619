"""Compile the C++ kernels on first use, into PyTorch's extension cache, for this processor or a given ``-march``."""

from __future__ import annotations

import functools
import os
import pathlib
import platform
import shlex
import shutil
import sys
from typing import NamedTuple

import torch
from torch.utils import cpp_extension

from .cache import BuildError, cached, run

__all__ = [
    "OPS",
    "VARIABLE",
    "BuildError",
    "Level",
    "level",
    "library",
    "march",
    "refusal",
    "register_bytes",
    "unavailable",
]

# The schemas of the operators that the library implements. They are defined in Python, so that they can be derived from
# NeuronConstants, and so that a second library can be loaded in the same process.
OPS = torch.library.Library("mfpsn_cpu", "DEF")
OPS.define("level() -> (str, int)")

VARIABLE = "MFPSN_FX_MARCH"
_SOURCE = pathlib.Path(__file__).resolve().parent.parent / "csrc" / "cpu" / "fused_cpu.cpp"

# Instruction sets that a compiler may use for a given -march, named as in /proc/cpuinfo. The compiler's macros have the
# same names except for underscores and _MACROS.
_FLAGS = (
    "pni", "ssse3", "sse4_1", "sse4_2", "sse4a", "popcnt", "avx", "f16c", "fma", "fma4", "xop", "tbm", "bmi1", "bmi2",
    "abm", "movbe", "avx2", "avx_vnni", "gfni", "avx512f", "avx512cd", "avx512bw", "avx512dq", "avx512vl", "avx512er",
    "avx512pf", "avx512ifma", "avx512vbmi", "avx512_vbmi2", "avx512_vnni", "avx512_bitalg", "avx512_vpopcntdq",
    "avx512_bf16", "avx512_fp16",
)  # fmt: skip
_MACROS = {"pni": "SSE3", "bmi1": "BMI", "abm": "LZCNT"}


class Level(NamedTuple):
    """What the library was compiled for: a value of ``-march=``, its vector instructions, bytes of one register."""

    march: str
    instructions: str
    register_bytes: int

    def __str__(self) -> str:
        return f"{self.instructions} (-march={self.march})"


@functools.cache
def march() -> str:
    """Return the value of ``-march=`` for this process: MFPSN_FX_MARCH, or ``native``."""
    return os.environ.get(VARIABLE) or "native"


def _compiler() -> list[str]:
    """Return the compiler and its arguments from CXX, such as ``ccache g++``, or the first common one on the path."""
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        words = shlex.split(name or "")
        if words and (found := shutil.which(words[0])):
            return [found, *words[1:]]
    raise BuildError("no C++ compiler was found; install one or set CXX")


def _processor() -> str:
    """Return what -march=native depends on, so that machines that share a cache get libraries of their own."""
    if not os.path.exists("/proc/cpuinfo"):
        return platform.processor()
    with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        lines = [line for line in file if line.startswith(("model name", "flags", "Features"))]
    return "".join(sorted(set(lines)))


def _macros(compiler: list[str], march: str) -> set[str]:
    """Return the names that ``compiler`` predefines for ``march``, stripped of the outer underscores."""
    text = run([*compiler, f"-march={march}", "-dM", "-E", "-x", "c++", os.devnull])
    return {line.split()[1].strip("_") for line in text.splitlines() if line.startswith("#define ")}


def register_bytes(march: str) -> int:
    """Return the width of the vectors under ``march``, as in csrc/cpu/vectors.h; :class:`BuildError` if unknown."""
    macros = _macros(_compiler(), march)
    return 64 if "AVX512F" in macros else 32 if "AVX" in macros else 16


def _lacking(compiler: list[str], march: str) -> list[str]:
    """Return the instruction sets of ``march`` that this processor lacks, as far as /proc/cpuinfo lists them."""
    macros = {name.replace("_", "") for name in _macros(compiler, march)}
    has = {flag for line in _processor().splitlines() if line.startswith("flags") for flag in line.split()[2:]}
    if not has:
        return []
    return [f for f in _FLAGS if f not in has and _MACROS.get(f, f.upper().replace("_", "")) in macros]


def refusal(march: str) -> str | None:
    """Return why the kernels cannot be compiled for ``march`` and run here, or None.

    On x86 under Linux missing instruction sets are detected before the library is loaded, since they would end the
    process by an illegal instruction. Elsewhere only the compiler is asked.
    """
    if march == "native":
        return None
    remedy = f"unset {VARIABLE} to compile for this processor, or name a level that it has, such as x86-64-v2 on x86"
    try:
        lacking = _lacking(_compiler(), march)
    except BuildError as error:
        return f"{VARIABLE}={march} is not known to the compiler ({error}); {remedy}"
    return f"{VARIABLE}={march} needs {', '.join(lacking)}, which this processor lacks; {remedy}" if lacking else None


def _command(compiler: list[str], output: str) -> list[str]:
    """Return the command line that compiles the library to ``output``."""
    lib = pathlib.Path(torch.__file__).parent / "lib"
    openmp = [] if sys.platform == "darwin" else ["-fopenmp"]
    # torch's own OpenMP runtime before the compiler's: two thread pools in a process would compete for the cores
    runtime = [str(path) for path in sorted(lib.glob("libgomp*.so*"))]
    include = [f"-I{path}" for path in cpp_extension.include_paths()]
    return [
        *compiler, "-std=c++20", "-O3", f"-march={march()}", "-fPIC", "-shared", "-Wno-psabi", *openmp, *include,
        str(_SOURCE), "-o", output, *runtime, f"-L{lib}", f"-Wl,-rpath,{lib}", "-ltorch_cpu", "-lc10",
    ]  # fmt: skip


@functools.cache
def _library() -> pathlib.Path | BuildError:
    """Load the library, compiled if needed, and return its path or the error; cached for the process."""
    try:
        compiler = _compiler()
        if (reason := refusal(march())) is not None:
            raise BuildError(reason)
        sources = [path.read_text(encoding="utf-8") for path in (_SOURCE, *sorted(_SOURCE.parent.glob("*.h")))]
        # sources by content, not by path, so that another checkout shares the cache. The flags contain the folders of
        # torch, so another environment compiles its own.
        flags = [argument for argument in _command(compiler, "") if argument != str(_SOURCE)]
        identity = [*sources, *flags, torch.__version__, run([*compiler, "--version"]), _processor()]
        note = f"compiling the C++ kernels with {' '.join(compiler)} (once, about half a minute)"
        path = cached("fused_cpu", identity, lambda output: _command(compiler, output), note)
        torch.ops.load_library(path)
        return path
    except (OSError, BuildError) as error:
        return error if isinstance(error, BuildError) else BuildError(f"{type(error).__name__}: {error}")


def library() -> pathlib.Path:
    """Load the compiled kernels and return the library's path; :class:`BuildError` if it cannot be built or loaded."""
    found = _library()
    if isinstance(found, BuildError):
        raise found
    return found


def level() -> Level:
    """Return what the library was compiled for, as it reports; :class:`BuildError` if there is none."""
    library()
    return Level(march(), *torch.ops.mfpsn_cpu.level())


def unavailable() -> str | None:
    """Return why the C++ kernels cannot run here, or None; builds them if that has not been tried."""
    found = _library()
    return str(found) if isinstance(found, BuildError) else None
