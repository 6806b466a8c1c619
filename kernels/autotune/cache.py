"""What was measured, kept for later: one small JSON file for each race, in a folder of the user's."""

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
_PATIENCE_S = 120.0  # what has not returned by then is taken to hang


def cache_folder() -> pathlib.Path | None:
    """Where times are kept: ``MFPSN_FX_CACHE``, or the platform's place for caches; None if it is ``off``."""
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
    """Records by what they depend on: a key, and the machine (:func:`~.machine.machine`).

    Each record is a file of its own, named by a hash of its key and written beside its place and renamed: processes
    that write at once each leave whole files, and the last one's stands. What cannot be read is measured anew and
    written over, what cannot be written is not kept; there is one warning of each kind, never an error.

    Args:
        folder: where; it is made when something is written.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = pathlib.Path(folder)
        self._said: set[str] = set()
        self._writable = True

    @classmethod
    def of_user(cls) -> SelectionCache | None:
        """The cache in :func:`cache_folder`; None where it is switched off."""
        folder = cache_folder()
        return None if folder is None else cls(folder)

    def get(self, key: object, device: torch.device, read: Callable[[Mapping], object] = lambda data: data) -> object:
        """What ``read`` makes of the record of ``key`` on ``device``; None if there is none, or none that is whole.

        ``read`` may raise KeyError, TypeError, ValueError, AttributeError for data that it does not understand.
        """
        whole = _whole(key, device)
        path = self._path("times", whole)
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as error:
            self._say("read", "%s cannot be read (%s): measuring anew", path, error)
            return None
        try:
            data = json.loads(text)
            if data["format"] != FORMAT:
                raise ValueError(f"format {data['format']!r}, not {FORMAT}")
            if data["key"] != json.loads(json.dumps(whole)):
                raise ValueError("another key than its name says")
            return read(data["record"])
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            self._say(
                "read", "%s is damaged or of another version (%s): measuring anew, and writing it again", path, error
            )
            return None

    def put(self, key: object, device: torch.device, record: Mapping) -> None:
        """Keep ``record``, JSON-able data, for ``key`` on ``device``."""
        whole = _whole(key, device)
        self._write(self._path("times", whole), {"format": FORMAT, "key": whole, "record": record})

    @contextlib.contextmanager
    def first_run(self, key: object, device: torch.device) -> Iterator[None]:
        """Mark ``key`` as being run for the first time while the body runs; a process that is killed leaves the mark.

        Another process's mark is not written again, so that its age is that of the oldest run.
        """
        whole = _whole(key, device)
        path = self._path("started", whole)
        if not path.exists():
            self._write(path, {"format": FORMAT, "key": whole, "started": time.time()})
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)

    def unfinished(self, key: object, device: torch.device) -> str | None:
        """Return why ``key`` must not be run: its first run began over two minutes ago and did not end; or None.

        A younger mark may be that of a process which is running it now.
        """
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            data = json.loads(self._path("started", _whole(key, device)).read_text(encoding="utf-8"))
            if time.time() - (started := float(data["started"])) > _PATIENCE_S:
                date = time.strftime("%Y-%m-%d %H:%M", time.localtime(started))
                return (
                    f"its first run, on {date}, did not return: it hangs, or ends its process "
                    "(python -m mfpsn_fx cache --clear forgets that)"
                )
        return None

    def files(self) -> list[pathlib.Path]:
        """All files of ours, whatever version wrote them."""
        return sorted(path for kind in ("times", "started") for path in self.folder.glob(f"{kind}-*.json*"))

    def clear(self) -> int:
        """Remove all files of ours; how many there were. ``OSError`` if one cannot be removed."""
        found = self.files()
        for path in found:
            path.unlink(missing_ok=True)
        return len(found)

    def _path(self, kind: str, whole: dict) -> pathlib.Path:
        digest = hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:32]
        return self.folder / f"{kind}-{digest}.json"

    def _write(self, path: pathlib.Path, data: Mapping) -> None:
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
            self._say("write", "times cannot be kept in %s (%s): going on without", self.folder, error)
            if scratch is not None:
                with contextlib.suppress(OSError):
                    os.unlink(scratch)

    def _say(self, kind: str, message: str, *arguments: object) -> None:
        if kind not in self._said:
            self._said.add(kind)
            _log.warning(message, *arguments)


def _whole(key: object, device: torch.device) -> dict:
    return {"what": key, "machine": machine(device)}
