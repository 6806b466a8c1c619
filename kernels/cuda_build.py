"""Compile the CUDA kernels on first use, into PyTorch's extension cache."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import pathlib
import shutil
import subprocess
import tempfile
from collections.abc import Sequence

import torch
from torch.utils import cpp_extension

__all__ = ["FLAGS", "SOURCE", "BuildError", "compiler", "library", "run", "unavailable"]

_log = logging.getLogger("mfpsn_fx")
_FOLDER = pathlib.Path(__file__).resolve().parent / "csrc"
SOURCE = _FOLDER / "fused_cuda.cu"
FLAGS = ("-std=c++17", "-O3", "--split-compile=2")
_LEAST = (8, 0)


class BuildError(RuntimeError):
    """The CUDA kernels cannot be built or loaded here; the message says why."""


def compiler() -> str:
    """The path of nvcc: of PyTorch's toolkit, else the one on the path; :class:`BuildError` if there is none."""
    home = cpp_extension.CUDA_HOME
    for name in (None if home is None else os.path.join(home, "bin", "nvcc"), "nvcc"):
        if name and (found := shutil.which(name)):
            return found
    raise BuildError("no nvcc was found; install the CUDA toolkit or set CUDA_HOME")


def run(command: Sequence[str]) -> str:
    """What ``command`` prints; :class:`BuildError` with its first complaint if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line or "fatal" in line]
        lines = lines or done.stderr.splitlines() or ["no message"]
        raise BuildError(f"{command[0]} failed: {lines[0].strip()}")
    return done.stdout + done.stderr


def _identity(nvcc: str, arch: str) -> str:
    sources = sorted([SOURCE, *_FOLDER.glob("fused_cuda*.cuh")])
    parts = [*(path.read_text(encoding="utf-8") for path in sources), *FLAGS, arch, run([nvcc, "--version"])]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


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
        root = os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root()
        folder = pathlib.Path(root) / "mfpsn_fx"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"fused_cuda_{arch}_{_identity(nvcc, arch)}.so"
        if not path.exists():
            _compile(nvcc, arch, path)
        return ctypes.CDLL(str(path))
    except (OSError, BuildError) as error:
        return error if isinstance(error, BuildError) else BuildError(f"{type(error).__name__}: {error}")


def _compile(nvcc: str, arch: str, path: pathlib.Path) -> None:
    """Compile beside ``path`` and rename: two processes that build at once each leave a whole file."""
    _log.warning("compiling the CUDA kernels for %s with %s (once, about a minute)", arch, nvcc)
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        output = os.path.join(scratch, path.name)
        run([nvcc, *FLAGS, f"-arch={arch}", "-shared", "-Xcompiler", "-fPIC", "-o", output, str(SOURCE)])
        os.replace(output, path)


def library(capability: tuple[int, int]) -> ctypes.CDLL:
    """The compiled kernels for devices of ``capability``; :class:`BuildError` if there are none."""
    found = _library(tuple(capability))
    if isinstance(found, BuildError):
        raise found
    return found


def unavailable() -> str | None:
    """Why the CUDA kernels cannot run on the current device, or None; builds them if that has not been tried."""
    if not torch.cuda.is_available():
        return "no CUDA device was found"
    found = _library(torch.cuda.get_device_capability())
    return str(found) if isinstance(found, BuildError) else None
