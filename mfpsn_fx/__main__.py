"""The command line: ``python -m mfpsn_fx kernels``, ``build``, ``cache``, ``demo`` and ``compatibility``."""

from __future__ import annotations

import argparse
import functools
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from tabulate import tabulate

from mfpsn_fx.kernels import Layout, Problem, kernels
from mfpsn_fx.kernels.autotune.cache import SelectionCache
from mfpsn_fx.kernels.build import cpu as cpu_build
from mfpsn_fx.kernels.build import cuda as cuda_build

__all__ = ["main"]

# Examples are part of the repository, not of the package.
_EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
_SCRIPTS = {"demo": "digits.py", "compatibility": "compatibility/report.py"}


def kernel_rows() -> list[list[str]]:
    """Return a row for each registered kernel: name, layouts, dtypes, devices here (or why not), summary."""
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    rows = []
    for kernel in kernels():
        here, reasons = [], []
        for device in devices:
            layout = kernel.layouts[0]
            shape = layout.shape_from((4, 2, 8, 8), Layout.TIME_FIRST)
            reason = kernel.refusal(Problem(shape, layout, kernel.dtypes[0], device, 2, 1))
            if reason is None:
                here.append(device)
            else:
                reasons.append(f"not on {device}: {reason}")
        dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in kernel.dtypes)
        place = "; ".join([", ".join(here)] * bool(here) + reasons)
        rows.append([kernel.name, ", ".join(map(str, kernel.layouts)), dtypes, place, kernel.summary])
    return rows


def build(archs: Sequence[str] = ()) -> int:
    """Compile the C++ kernels, and the CUDA ones for ``archs`` or this device; return 1 if one fails, else 0."""
    status = 0
    builds = {"fused-cpp": cpu_build.unavailable}
    if archs:
        for arch in archs:
            builds[f"fused-cuda for {arch}"] = functools.partial(cuda_build.unbuildable, arch)
    elif torch.cuda.is_available():
        builds["fused-cuda"] = cuda_build.unavailable
    for name, unavailable in builds.items():
        reason = unavailable()
        print(f"{name}: {'built' if reason is None else reason}")
        status = status or int(reason is not None)
    return status


def cache(clear: bool) -> int:
    """Print where measured times are kept and how many there are, or remove them; return 1 if that fails, else 0."""
    kept = SelectionCache.of_user()
    if kept is None:
        print("measured times are not kept: MFPSN_FX_CACHE is off, or there is no home folder")
        return 0
    if clear:
        try:
            print(f"{kept.folder}: removed {kept.clear()} files")
        except OSError as error:
            print(f"cannot clear {kept.folder}: {error}", file=sys.stderr)
            return 1
        return 0
    files = kept.files()
    marks = sum(path.name.startswith("started-") for path in files)
    size = sum(path.stat().st_size for path in files) / 1024
    print(f"{kept.folder}: {len(files) - marks} records of times, {marks} kernels that did not return, {size:.0f} KiB")
    return 0


def example(name: str, arguments: list[str]) -> int:
    """Run the script ``examples/<name>`` of this checkout; return 1 if there is no checkout, else 0."""
    script = _EXAMPLES / name
    if not script.exists():
        print(
            f"examples/{name} is part of the repository, not of the installed package: run it from a checkout that is "
            "installed with pip install -e .",
            file=sys.stderr,
        )
        return 1
    sys.argv = [str(script), *arguments]
    runpy.run_path(str(script), run_name="__main__")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m mfpsn_fx", description="Multiplication-free spiking networks.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("kernels", help="list every registered kernel, where it can run here, and if not, why")
    builds = commands.add_parser("build", help="compile the C++ and CUDA kernels now, rather than on first use")
    builds.add_argument("--arch", nargs="+", default=(), metavar="ARCH",
                        help="compile the CUDA kernels for these, such as sm_90; needs nvcc, but no GPU")  # fmt: skip
    commands.add_parser("demo", help="convert, compile and train a network on digits (see --help of the example)",
                        add_help=False)  # fmt: skip
    times = commands.add_parser("cache", help="show where times of kernels are kept, and how many")
    times.add_argument("--clear", action="store_true", help="remove them")
    commands.add_parser("compatibility", help="convert, train and compile other libraries' networks", add_help=False)
    options, rest = parser.parse_known_args(argv)
    if options.command in _SCRIPTS:
        return example(_SCRIPTS[options.command], rest)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if options.command == "cache":
        return cache(options.clear)
    if options.command == "build":
        return build(options.arch)
    print(tabulate(kernel_rows(), ["kernel", "layouts", "input dtypes", "runs here", "how"]))
    if cpu_build.unavailable() is None:
        level = cpu_build.level()
        print(f"\nfused-cpp is compiled for {level}: vectors of {level.register_bytes} bytes ({cpu_build.VARIABLE})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
