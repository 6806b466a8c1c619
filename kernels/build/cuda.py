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
_LEAST = (8, 0)


def compiler() -> str:
    """The path of nvcc: of PyTorch's toolkit, else the one on the path; :class:`BuildError` if there is none."""
    home = cpp_extension.CUDA_HOME
    for name in (None if home is None else os.path.join(home, "bin", "nvcc"), "nvcc"):
        if name and (found := shutil.which(name)):
            return found
    raise BuildError("no nvcc was found; install the CUDA toolkit or set CUDA_HOME")


def _identity(nvcc: str, arch: str) -> list[str]:
    sources = sorted([SOURCE, *_FOLDER.glob("*.cuh")])
    return [*(path.read_text(encoding="utf-8") for path in sources), *FLAGS, arch, run([nvcc, "--version"])]


def _command(nvcc: str, arch: str, output: str) -> list[str]:
    return [nvcc, *FLAGS, f"-arch={arch}", "-shared", "-Xcompiler", "-fPIC", "-o", output, str(SOURCE)]


@functools.cache
def _library(capability: tuple[int, int]) -> ctypes.CDLL | BuildError:
    """The library for devices of ``capability``, or why there is none: both are found out once a process."""
    try:
        if capability < _LEAST:
            raise BuildError(
                f"compute capability {capability[0]}.{capability[1]} is not supported: the kernels need "
                f"{_LEAST[0]}.{_LEAST[1]} or newer"
            )
        nvcc, arch = compiler(), f"sm_{capability[0]}{capability[1]}"
        note = f"compiling the CUDA kernels for {arch} with {nvcc} (once, about a minute)"
        path = cached(f"fused_cuda_{arch}", _identity(nvcc, arch), lambda output: _command(nvcc, arch, output), note)
        return ctypes.CDLL(str(path))
    except (OSError, BuildError) as error:
        return error if isinstance(error, BuildError) else BuildError(f"{type(error).__name__}: {error}")


def library(capability: tuple[int, int]) -> ctypes.CDLL:
    """The compiled kernels for devices of ``capability``; :class:`BuildError` if there are none."""
    found = _library(tuple(capability))
    if isinstance(found, BuildError):
        raise found
    return found


def unbuildable(arch: str) -> str | None:
    """Compile for ``arch``, such as ``"sm_90"``, with or without such a device; the reason if it fails, or None."""
    if (named := re.fullmatch(r"sm_(\d+)(\d)", arch)) is None:
        return f"an architecture is named like sm_90, not {arch!r}"
    found = _library((int(named[1]), int(named[2])))
    return str(found) if isinstance(found, BuildError) else None


def unavailable() -> str | None:
    """Why the CUDA kernels cannot run on the current device, or None; builds them if that has not been tried."""
    if not torch.cuda.is_available():
        return "no CUDA device was found"
    found = _library(torch.cuda.get_device_capability())
    return str(found) if isinstance(found, BuildError) else None
