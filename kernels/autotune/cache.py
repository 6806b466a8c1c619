"""Cache of measured times across processes: one small JSON file for each race, in the user's cache folder."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping

import torch

from .environment import machine

__all__ = ["FORMAT", "SelectionCache", "cache_folder"]

_log = logging.getLogger("mfpsn_fx")

FORMAT = 1
VARIABLE = "MFPSN_FX_CACHE"
_HANG_TIMEOUT_S = 120.0  # a first run that has not returned by then is taken to hang


def cache_folder() -> pathlib.Path | None:
    """Return the folder of cached times: ``MFPSN_FX_CACHE``, or the platform's cache folder; None if it is ``off``."""
    given = os.environ.get(VARIABLE, "")
    if given.lower() in ("off", "0", "none"):
        return None
    if given:
        return pathlib.Path(given).expanduser()
    try:
        if sys.platform == "win32":
            root = pathlib.Path(os.environ.get("LOCALAPPDATA") or pathlib.Path.home() / "AppData" / "Local")
        elif sys.platform == "darwin":
            root = pathlib.Path.home() / "Library" / "Caches"
        else:
            root = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    except RuntimeError:  # a user without a home, as in some containers
        return None
    return root / "mfpsn_fx" / "selections"


class SelectionCache:
    """Records on disk, looked up by a key and the machine (:func:`~.environment.machine`).

    Each record is a file named by a hash of its key. It is written to a temporary file and renamed, so that concurrent
    writers leave complete files and the last one wins. A record that cannot be read counts as absent and is later
    overwritten; one that cannot be written is dropped. Either is logged as one warning, never raised as an error.

    Args:
        folder: of the files; created on the first write.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = pathlib.Path(folder)
        self._warned: set[str] = set()
        self._writable = True

    @classmethod
    def of_user(cls) -> SelectionCache | None:
        """Return the cache in :func:`cache_folder`; None where it is switched off."""
        folder = cache_folder()
        return None if folder is None else cls(folder)

    def get(self, key: object, device: torch.device, read: Callable[[Mapping], object] = lambda data: data) -> object:
        """Return ``read(record)`` of the record of ``key`` on ``device``; None if there is none, or it is damaged.

        ``read`` may raise KeyError, TypeError, ValueError, AttributeError for data that it does not understand.
        """
        full_key = _full_key(key, device)
        path = self._path("times", full_key)
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as error:
            self._warn_once("read", "%s cannot be read (%s): measuring again", path, error)
            return None
        try:
            data = json.loads(text)
            if data["format"] != FORMAT:
                raise ValueError(f"format {data['format']!r}, not {FORMAT}")
            if data["key"] != json.loads(json.dumps(full_key)):
                raise ValueError("its key does not match its file name")
            return read(data["record"])
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            self._warn_once(
                "read", "%s is damaged or of another version (%s): measuring again and replacing it", path, error
            )
            return None

    def put(self, key: object, device: torch.device, record: Mapping) -> None:
        """Write ``record``, JSON-able data, for ``key`` on ``device``."""
        full_key = _full_key(key, device)
        self._write(self._path("times", full_key), {"format": FORMAT, "key": full_key, "record": record})

    @contextlib.contextmanager
    def first_run(self, key: object, device: torch.device) -> Iterator[None]:
        """Mark ``key`` as being run for the first time while the body runs; a killed process leaves the mark.

        A mark of another process is not overwritten, so that its age is that of the oldest run.
        """
        full_key = _full_key(key, device)
        path = self._path("started", full_key)
        if not path.exists():
            self._write(path, {"format": FORMAT, "key": full_key, "started": time.time()})
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)

    def unfinished(self, key: object, device: torch.device) -> str | None:
        """Return why ``key`` must not be run: its first run began over two minutes ago and did not end; or None.

        A younger mark may belong to a process that is running it now.
        """
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            data = json.loads(self._path("started", _full_key(key, device)).read_text(encoding="utf-8"))
            if time.time() - (started := float(data["started"])) > _HANG_TIMEOUT_S:
                date = time.strftime("%Y-%m-%d %H:%M", time.localtime(started))
                return (
                    f"its first run, on {date}, did not return: it hangs, or ends its process "
                    "(python -m mfpsn_fx cache --clear forgets that)"
                )
        return None

    def files(self) -> list[pathlib.Path]:
        """Return all files of this cache, written by any version."""
        return sorted(path for kind in ("times", "started") for path in self.folder.glob(f"{kind}-*.json*"))

    def clear(self) -> int:
        """Remove all files of this cache and return their number; ``OSError`` if one cannot be removed."""
        found = self.files()
        for path in found:
            path.unlink(missing_ok=True)
        return len(found)

    def _path(self, kind: str, full_key: dict) -> pathlib.Path:
        """Return the path of the file of ``kind``, ``"times"`` or ``"started"``, for a key."""
        digest = hashlib.sha256(json.dumps(full_key, sort_keys=True).encode()).hexdigest()[:32]
        return self.folder / f"{kind}-{digest}.json"

    def _write(self, path: pathlib.Path, data: Mapping) -> None:
        """Write ``data`` atomically; after the first failure warn and write nothing more."""
        if not self._writable:
            return
        scratch = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            handle, scratch = tempfile.mkstemp(prefix=f"{path.name}.", dir=self.folder)
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(data, file)
            os.replace(scratch, path)
        except OSError as error:
            self._writable = False
            self._warn_once("write", "times cannot be cached in %s (%s): continuing without", self.folder, error)
            if scratch is not None:
                with contextlib.suppress(OSError):
                    os.unlink(scratch)

    def _warn_once(self, kind: str, message: str, *arguments: object) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            _log.warning(message, *arguments)


def _full_key(key: object, device: torch.device) -> dict:
    """Return ``key`` together with the machine."""
    return {"what": key, "machine": machine(device)}
