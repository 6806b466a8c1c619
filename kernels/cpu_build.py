"""Compile the C++ kernels on first use, into PyTorch's extension cache."""

from __future__ import annotations

import ctypes
import functools
import os
import pathlib
import platform
import shlex
import shutil
import sys

import torch
from torch.utils import cpp_extension

from .build_cache import BuildError, cached, run

__all__ = ["BuildError", "library", "unavailable"]

_SOURCE = pathlib.Path(__file__).resolve().parent / "csrc" / "fused_cpu.cpp"


def _compiler() -> list[str]:
    """The compiler and the arguments that CXX gives it, such as ``ccache g++``."""
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        words = shlex.split(name or "")
        if words and (found := shutil.which(words[0])):
            return [found, *words[1:]]
    raise BuildError("no C++ compiler was found; install one or set CXX")


def _processor() -> str:
    """What -march=native depends on, so that a cache shared between machines serves each its own."""
    if not os.path.exists("/proc/cpuinfo"):
        return platform.processor()
    with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        lines = [line for line in file if line.startswith(("model name", "flags", "Features"))]
    return "".join(sorted(set(lines)))


def _command(compiler: list[str], output: str) -> list[str]:
    lib = pathlib.Path(torch.__file__).parent / "lib"
    openmp = [] if sys.platform == "darwin" else ["-fopenmp"]
    # torch's own OpenMP runtime before the compiler's: two thread pools in a process would fight for the cores
    runtime = [str(path) for path in sorted(lib.glob("libgomp*.so*"))]
    include = [f"-I{path}" for path in cpp_extension.include_paths()]
    return [
        *compiler, "-std=c++20", "-O3", "-march=native", "-fPIC", "-shared", "-Wno-psabi", *openmp, *include,
        str(_SOURCE), "-o", output, *runtime, f"-L{lib}", f"-Wl,-rpath,{lib}", "-ltorch_cpu", "-lc10",
    ]  # fmt: skip


@functools.cache
def _library() -> ctypes.CDLL | BuildError:
    """The library, or why there is none: both are found out once a process."""
    try:
        compiler = _compiler()
        sources = [path.read_text(encoding="utf-8") for path in (_SOURCE, *sorted(_SOURCE.parent.glob("cpu_*.h")))]
        # by content, not by path: another checkout, or an environment made anew, finds what is there
        flags = [part for part in _command(compiler, "") if part != str(_SOURCE)]
        identity = [*sources, *flags, torch.__version__, run([*compiler, "--version"]), _processor()]
        note = f"compiling the C++ kernels with {' '.join(compiler)} (once, about half a minute)"
        path = cached("fused_cpu", identity, lambda output: _command(compiler, output), note)
        return ctypes.CDLL(str(path))
    except (OSError, BuildError) as error:
        return error if isinstance(error, BuildError) else BuildError(f"{type(error).__name__}: {error}")


def library() -> ctypes.CDLL:
    """The compiled kernels; :class:`BuildError` if there are none."""
    found = _library()
    if isinstance(found, BuildError):
        raise found
    return found


def unavailable() -> str | None:
    """Why the C++ kernels cannot run here, or None; builds them if that has not been tried."""
    found = _library()
    return str(found) if isinstance(found, BuildError) else None
