"""Cache of compiled libraries in PyTorch's extension folder: each is built once and written atomically."""

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
    """Raised where kernels cannot be built or loaded; the message is the reason."""


def run(command: Sequence[str]) -> str:
    """Run ``command`` and return its output; :class:`BuildError` with its first error message if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line or "fatal" in line]
        lines = lines or done.stderr.splitlines() or ["no message"]
        raise BuildError(f"{command[0]} failed: {lines[0].strip()}")
    return done.stdout + done.stderr


def cached(stem: str, identity: Iterable[str], command: Callable[[str], Sequence[str]], note: str) -> pathlib.Path:
    """Return the path of the library ``stem``; compile it unless one of the same identity is cached.

    It is compiled to a temporary path and renamed, so that a cached file is complete. If several processes need it at
    the same time, one compiles and the others wait.

    Args:
        stem: of the file's name.
        identity: everything that the result depends on: sources, flags, versions.
        command: returns the compiler's command line for an output path.
        note: logged as a warning before compiling.

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
    """Hold a lock on ``folder`` against builds of other processes, where the system can lock folders."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems have no locks: then each process builds
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
