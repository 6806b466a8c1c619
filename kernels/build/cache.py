"""Compiled libraries in PyTorch's extension cache: built once, whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import pathlib
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence

from torch.utils import cpp_extension

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

__all__ = ["BuildError", "cached", "run"]

_log = logging.getLogger("mfpsn_fx")


class BuildError(RuntimeError):
    """Kernels cannot be built or loaded here; the message says why."""


def run(command: Sequence[str]) -> str:
    """What ``command`` prints; :class:`BuildError` with its first complaint if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line or "fatal" in line]
        lines = lines or done.stderr.splitlines() or ["no message"]
        raise BuildError(f"{command[0]} failed: {lines[0].strip()}")
    return done.stdout + done.stderr


def cached(stem: str, identity: Iterable[str], command: Callable[[str], Sequence[str]], note: str) -> pathlib.Path:
    """The library ``stem``, compiled by ``command(output)`` unless one of the same identity is there.

    It is compiled beside its place and renamed, so that what is there is whole. Of processes that need it at once one
    compiles and the others wait.

    Args:
        stem: of the file's name.
        identity: all that the result depends on: sources, flags, versions.
        command: the compiler's command line for an output path.
        note: what is logged before compiling.

    Raises:
        BuildError: the compiler failed.
        OSError: the cache cannot be written.
    """
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root()
    folder = pathlib.Path(root) / "mfpsn_fx"
    folder.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256("\n".join(identity).encode()).hexdigest()[:16]
    path = folder / f"{stem}_{digest}.so"
    if path.exists():
        return path
    with _locked(folder):
        if not path.exists():
            _log.warning("%s", note)
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                output = os.path.join(scratch, path.name)
                run(command(output))
                os.replace(output, path)
    return path


@contextlib.contextmanager
def _locked(folder: pathlib.Path) -> Iterator[None]:
    """Keep other processes from building in ``folder`` meanwhile, where the system has locks on folders."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # as on some network file systems: then each builds for itself
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
