"""Compile the C++ kernels on first use, into PyTorch's extension cache."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import tempfile

import torch
from torch.utils import cpp_extension

__all__ = ["BuildError", "library", "unavailable"]

_log = logging.getLogger("mfpsn_fx")
_SOURCE = pathlib.Path(__file__).resolve().parent / "csrc" / "fused_cpu.cpp"


class BuildError(RuntimeError):
    """The C++ kernels cannot be built or loaded here; the message says why."""


def _compiler() -> str:
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and (found := shutil.which(name.split()[0])):
            return found
    raise BuildError("no C++ compiler was found; install one or set CXX")


def _processor() -> str:
    """What -march=native depends on, so that a cache shared between machines serves each its own."""
    with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        lines = [line for line in file if line.startswith(("model name", "flags", "Features"))]
    return "".join(sorted(set(lines)))


def _command(compiler: str, output: str) -> list[str]:
    lib = pathlib.Path(torch.__file__).parent / "lib"
    openmp = [] if sys.platform == "darwin" else ["-fopenmp"]
    include = [f"-I{path}" for path in cpp_extension.include_paths()]
    return [
        compiler, "-std=c++20", "-O3", "-march=native", "-fPIC", "-shared", "-Wno-psabi", *openmp, *include, str(_SOURCE),
        "-o", output, f"-L{lib}", f"-Wl,-rpath,{lib}", "-ltorch_cpu", "-lc10",
    ]  # fmt: skip


@functools.cache
def _library() -> ctypes.CDLL | BuildError:
    """The library, or why there is none: both are found out once a process."""
    try:
        compiler = _compiler()
        command = _command(compiler, "")
        version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
        processor = _processor() if os.path.exists("/proc/cpuinfo") else platform.processor()
        sources = [path.read_text(encoding="utf-8") for path in (_SOURCE, *sorted(_SOURCE.parent.glob("cpu_*.h")))]
        identity = "\n".join([*sources, *command, torch.__version__, version, processor])
        digest = hashlib.sha256(identity.encode()).hexdigest()[:16]
        root = os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root()
        folder = pathlib.Path(root) / "mfpsn_fx"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"fused_cpu_{digest}.so"
        if not path.exists():
            _compile(compiler, path)
        return ctypes.CDLL(str(path))
    except (OSError, BuildError) as error:
        return error if isinstance(error, BuildError) else BuildError(f"{type(error).__name__}: {error}")


def _compile(compiler: str, path: pathlib.Path) -> None:
    """Compile beside ``path`` and rename: two processes that build at once each leave a whole file."""
    _log.warning("compiling the C++ kernels with %s (once, some seconds)", compiler)
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        output = os.path.join(scratch, path.name)
        done = subprocess.run(_command(compiler, output), capture_output=True, text=True, check=False)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
            raise BuildError(f"{compiler} failed: {(lines or ['no message'])[0].strip()}")
        os.replace(output, path)


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
