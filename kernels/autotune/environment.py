"""Describe what measured times depend on: the device, the libraries, PyTorch's settings, this package's sources."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import inspect
import pathlib
import platform

import torch

from ..build.cpu import march

__all__ = ["machine", "source_of", "sources_hash"]

_SUFFIXES = frozenset({".py", ".cpp", ".h", ".cu", ".cuh"})
_PACKAGE = pathlib.Path(__file__).resolve().parent.parent


def machine(device: torch.device) -> dict[str, object]:
    """Return the JSON-able facts that the time of a kernel on ``device`` depends on besides its own problem."""
    return {**_constant_facts(device), **_current_settings(device)}


@functools.cache
def _constant_facts(device: torch.device) -> dict[str, object]:
    """Return the facts that do not change while the process runs."""
    found: dict[str, object] = {
        "device": device.type,
        "cpu": _cpu_model(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "triton": _version("triton") or _version("pytorch-triton"),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "sources": sources_hash(),
    }
    if device.type == "cpu":
        found["march"] = march()
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "name": properties.name,
            "capability": [properties.major, properties.minor],
            "multiprocessors": properties.multi_processor_count,
        }
    return found


def _current_settings(device: torch.device) -> dict[str, object]:
    """Return the facts that a program may change between two measurements."""
    found: dict[str, object] = {
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "precision": torch.get_float32_matmul_precision(),
    }
    if device.type == "cuda":
        found |= {"benchmark": torch.backends.cudnn.benchmark, "tf32": torch.backends.cudnn.allow_tf32}
    else:
        found["mkldnn"] = torch.backends.mkldnn.enabled
    return found


def _cpu_model() -> str:
    """Return the CPU's model, family and stepping, from /proc/cpuinfo if there is one."""
    try:
        text = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor() or platform.machine()
    facts = dict.fromkeys(("model name", "cpu family", "model", "stepping"), "")
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if facts.get(name.strip()) == "":
            facts[name.strip()] = value.strip()
    return " ".join([value for value in facts.values() if value] or [platform.machine()])


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def sources_hash() -> str:
    """Return a hash of the paths and contents of all sources of ``mfpsn_fx.kernels``: Python, C++ and CUDA."""
    digest = hashlib.sha256()
    for path in sorted(path for path in _PACKAGE.rglob("*") if path.suffix in _SUFFIXES):
        digest.update(path.relative_to(_PACKAGE).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def source_of(thing: object) -> str | None:
    """Return a hash of the source of ``thing``'s class and of its base classes outside this package and PyTorch.

    ``""`` if there are none (:func:`machine` covers this package and PyTorch); None if the source of one is not found.
    """
    return _source_of(type(thing))


@functools.lru_cache(maxsize=256)
def _source_of(cls: type) -> str | None:
    digest, hashed_any = hashlib.sha256(), False
    for base in cls.__mro__[:-1]:
        if base.__module__.startswith(("mfpsn_fx.kernels.", "torch.")):
            continue
        try:
            digest.update(inspect.getsource(base).encode() + b"\0")
        except (OSError, TypeError):
            return None
        hashed_any = True
    return digest.hexdigest()[:16] if hashed_any else ""
