"""Compile the CUDA kernels on first use, into PyTorch's extension cache."""

from __future__ import annotations

import ctypes
import functools
import os
import pathlib
import re
import shutil

import torch
from torch.utils import cpp_extension

from .cache import BuildError, cached, run

__all__ = ["FLAGS", "SOURCE", "BuildError", "compiler", "library", "unavailable", "unbuildable"]

_FOLDER = pathlib.Path(__file__).resolve().parent.parent / "csrc" / "cuda"
SOURCE = _FOLDER / "fused_cuda.cu"
FLAGS = ("-std=c++17", "-O3", "--split-compile=2")
_MIN_CAPABILITY = (8, 0)


def compiler() -> str:
    """Return the path of nvcc: of PyTorch's CUDA_HOME, else the one on PATH; :class:`BuildError` if there is none."""
    home = cpp_extension.CUDA_HOME
    for name in (None if home is None else os.path.join(home, "bin", "nvcc"), "nvcc"):
        if name and (found := shutil.which(name)):
            return found
    raise BuildError("no nvcc was found; install the CUDA toolkit or set CUDA_HOME")


def _identity(nvcc: str, arch: str) -> list[str]:
    """Return everything that the library depends on."""
    sources = sorted([SOURCE, *_FOLDER.glob("*.cuh")])
    return [*(path.read_text(encoding="utf-8") for path in sources), *FLAGS, arch, run([nvcc, "--version"])]


def _command(nvcc: str, arch: str, output: str) -> list[str]:
    """Return the command line that compiles the library to ``output``."""
    return [nvcc, *FLAGS, f"-arch={arch}", "-shared", "-Xcompiler", "-fPIC", "-o", output, str(SOURCE)]


@functools.cache
def _library(capability: tuple[int, int]) -> ctypes.CDLL | BuildError:
    """Load the library for devices of ``capability``, compiled if needed, or return the error; cached."""
    try:
        if capability < _MIN_CAPABILITY:
            raise BuildError(
                f"compute capability {capability[0]}.{capability[1]} is not supported: the kernels need "
                f"{_MIN_CAPABILITY[0]}.{_MIN_CAPABILITY[1]} or newer"
            )
        nvcc, arch = compiler(), f"sm_{capability[0]}{capability[1]}"
        note = f"compiling the CUDA kernels for {arch} with {nvcc} (once, about a minute)"
        path = cached(f"fused_cuda_{arch}", _identity(nvcc, arch), lambda output: _command(nvcc, arch, output), note)
        return ctypes.CDLL(str(path))
    except (OSError, BuildError) as error:
        return error if isinstance(error, BuildError) else BuildError(f"{type(error).__name__}: {error}")


def library(capability: tuple[int, int]) -> ctypes.CDLL:
    """Return the compiled kernels for devices of ``capability``; :class:`BuildError` if there are none."""
    found = _library(tuple(capability))
    if isinstance(found, BuildError):
        raise found
    return found


def unbuildable(arch: str) -> str | None:
    """Compile for ``arch``, such as ``"sm_90"``, which needs no such device; return the error if it fails, or None."""
    if (named := re.fullmatch(r"sm_(\d+)(\d)", arch)) is None:
        return f"an architecture is named like sm_90, not {arch!r}"
    found = _library((int(named[1]), int(named[2])))
    return str(found) if isinstance(found, BuildError) else None


def unavailable() -> str | None:
    """Return why the CUDA kernels cannot run on the current device, or None; builds them if that has not been tried."""
    if not torch.cuda.is_available():
        return "no CUDA device was found"
    found = _library(torch.cuda.get_device_capability())
    return str(found) if isinstance(found, BuildError) else None
