"""What machine this is, which kernels can run on it, and how fast its memory copies.

Run with ``python benchmarks/gpu_facts.py [--device cuda]``. It builds what has to be compiled, so that what runs after
it finds it built, and exits with 1 if no kernel of ours that is written for the device can run.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import statistics
import sys
import time

import checkout  # noqa: F401  (first: it makes mfpsn_fx importable from a bare checkout)
import torch
from runner import checked_device, device_sample, environment

from mfpsn_fx.kernels import kernels

_COPIED = {"cpu": 64 << 20, "cuda": 2 << 30}  # bytes


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written, of a copy on the device that no cache holds: the median of 20."""
    x = torch.randn(_COPIED[device.type] // 4, device=device)
    y = torch.empty_like(x)
    times = [device_sample(lambda: y.copy_(x), 1, device) for _ in range(22)]
    return 2 * x.numel() * 4 / statistics.median(times[2:])


def versions() -> str:
    found = [f"Python {platform.python_version()}"]
    for package in ("torch", "triton", "numpy", "spikingjelly"):
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"no {package}")
    return ", ".join(found)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    device = checked_device(parser.parse_args(argv).device)
    print(versions())
    print(environment(device)["text"])
    if device.type == "cuda":
        p = torch.cuda.get_device_properties(device)
        print(
            f"compute capability {p.major}.{p.minor}, {p.multi_processor_count} multiprocessors, "
            f"{p.total_memory / 2**30:.0f} GiB, L2 {p.L2_cache_size / 2**20:.0f} MiB"
        )
    print(f"copy: {copy_bandwidth(device) / 1e12:.3g} TB/s read and written")
    able = 0
    for kernel in kernels():
        if kernel.devices is None or device.type not in kernel.devices:
            continue
        started = time.perf_counter()
        reason = kernel.unavailable() if kernel.unavailable is not None else None
        able += reason is None
        print(f"{kernel.name}: {reason or 'can run'} ({time.perf_counter() - started:.1f} s)")
    return int(not able)


if __name__ == "__main__":
    sys.exit(main())
