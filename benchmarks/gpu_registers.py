"""What the CUDA kernels need of an architecture: compile them, with or without a GPU, and read the compiler's report.

``python benchmarks/gpu_registers.py --arch sm_80 sm_90 sm_100`` prints a row for every kernel.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from typing import NamedTuple

import checkout  # noqa: F401  (first: it makes mfpsn_fx importable from a bare checkout)
from tabulate import tabulate

from mfpsn_fx.kernels.build import cuda as cuda_build
from mfpsn_fx.kernels.build.cuda import FLAGS, SOURCE, BuildError, run


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


_BITS = {"float32": 1, "float16": 2, "bfloat16": 4, "float64": 8}
ALL = tuple(_BITS)
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


def usage(arch: str, dtypes: Sequence[str] = ALL) -> list[Usage]:
    """Compile for ``arch`` (such as ``"sm_90"``; needs no GPU) and give the registers and spills of every kernel.

    ``dtypes`` are those of the input that are compiled; fewer take less time.

    Raises:
        BuildError: there is no nvcc, or it fails.
    """
    with tempfile.TemporaryDirectory() as scratch:
        output, bits = os.path.join(scratch, "kernels.cubin"), sum(_BITS[dtype] for dtype in dtypes)
        said = run(
            [cuda_build.compiler(), *FLAGS, f"-DMFPSN_DTYPES={bits}", f"-arch={arch}", "-cubin", "-Xptxas", "-v", "-o",
             output, str(SOURCE)]
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
    parser.add_argument("--dtype", nargs="+", default=list(ALL), choices=ALL, help="dtypes of the input")
    options = parser.parse_args(arguments)
    try:
        rows = [row for arch in options.arch for row in usage(arch, options.dtype)]
    except BuildError as error:
        print(error, file=sys.stderr)
        return 1
    print(tabulate(rows, headers=Usage._fields, tablefmt="github", missingval="-"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
