"""Compile the CUDA kernels on first use, into PyTorch's extension cache; or for given architectures, to see what they use.

``python -m mfpsn_fx.kernels.cuda_build --arch sm_80 sm_90 sm_100`` compiles for each, with or without a GPU, and prints
registers and spills.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import hashlib
import logging
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import NamedTuple

import torch
from tabulate import tabulate
from torch.utils import cpp_extension

__all__ = ["BuildError", "Usage", "library", "unavailable", "usage"]

_log = logging.getLogger("mfpsn_fx")
_FOLDER = pathlib.Path(__file__).resolve().parent / "csrc"
_SOURCE = _FOLDER / "fused_cuda.cu"
_FLAGS = ("-std=c++17", "-O3", "--split-compile=2")
_LEAST = (8, 0)


class BuildError(RuntimeError):
    """The CUDA kernels cannot be built or loaded here; the message says why."""


def compiler() -> str:
    """The path of nvcc: of the toolkit that PyTorch would use, else the one on the path; :class:`BuildError` if none."""
    home = cpp_extension.CUDA_HOME
    for name in (None if home is None else os.path.join(home, "bin", "nvcc"), "nvcc"):
        if name and (found := shutil.which(name)):
            return found
    raise BuildError("no nvcc was found; install the CUDA toolkit or set CUDA_HOME")


def _run(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line or "fatal" in line]
        lines = lines or done.stderr.splitlines() or ["no message"]
        raise BuildError(f"{command[0]} failed: {lines[0].strip()}")
    return done.stdout + done.stderr


def _identity(nvcc: str, arch: str) -> str:
    sources = sorted([_SOURCE, *_FOLDER.glob("fused_cuda*.cuh")])
    parts = [*(path.read_text(encoding="utf-8") for path in sources), *_FLAGS, arch, _run([nvcc, "--version"])]
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
        _run([nvcc, *_FLAGS, f"-arch={arch}", "-shared", "-Xcompiler", "-fPIC", "-o", output, str(_SOURCE)])
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


class Usage(NamedTuple):
    """What one kernel needs of an architecture. ``window`` and ``vector`` are template arguments, None where none."""

    arch: str
    kernel: str
    dtype: str
    window: int | None
    vector: int | None
    lanes: str | None
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int


_ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\S+)' for.*?(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill "
    r"stores, (?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)
_NAME = re.compile(
    r"mfpsn\d+(?P<kernel>\w+?)_kernelI(?P<dtype>f|d|6__half|13__nv_bfloat16)"
    r"(?:Li(?P<window>\d+)ELi(?P<vector>\d+)ELb(?P<shared>[01])E)?E"
)
_DTYPES = {"f": "float32", "d": "float64", "6__half": "float16", "13__nv_bfloat16": "bfloat16"}


def usage(arch: str, defines: Sequence[str] = ()) -> list[Usage]:
    """Compile for ``arch`` (such as ``"sm_90"``; needs no GPU) and give every kernel's registers and spills.

    Raises:
        BuildError: there is no nvcc, or it fails.
    """
    with tempfile.TemporaryDirectory() as scratch:
        said = _run(
            [compiler(), *_FLAGS, *(f"-D{d}" for d in defines), f"-arch={arch}", "-cubin", "-Xptxas", "-v",
             "-o", os.path.join(scratch, "kernels.cubin"), str(_SOURCE)]
        )  # fmt: skip
    rows = []
    for entry in _ENTRY.finditer(said):
        name = _NAME.search(entry["name"])
        if name is None:
            raise BuildError(f"cannot read the kernel's name {entry['name']!r}")
        lanes = {None: None, "1": "one channel", "0": "one channel each"}[name["shared"]]
        window, vector = (None if v is None else int(v) for v in (name["window"], name["vector"]))
        numbers = (int(entry[field]) for field in ("registers", "stack", "stores", "loads"))
        rows.append(Usage(arch, name["kernel"], _DTYPES[name["dtype"]], window, vector, lanes, *numbers))
    return sorted(rows, key=str)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: prints a row for every kernel."""
    parser = argparse.ArgumentParser(description="Compile the CUDA kernels and print registers and spills.")
    parser.add_argument("--arch", nargs="+", default=["sm_80", "sm_90", "sm_100"], help="architectures, such as sm_90")
    parser.add_argument("--dtype", help="rows of this dtype only")
    options = parser.parse_args(arguments)
    try:
        rows = [row for arch in options.arch for row in usage(arch)]
    except BuildError as error:
        print(error, file=sys.stderr)
        return 1
    rows = [row for row in rows if options.dtype in (None, row.dtype)]
    print(tabulate(rows, headers=Usage._fields, tablefmt="github", missingval="-"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
