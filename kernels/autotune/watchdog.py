"""A time limit for code that may not return."""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Callable, Iterator

__all__ = ["Hung", "Watchdog"]

_TICK = 0.25  # seconds


class Hung(BaseException):
    """Raised inside code that ran past its limit; no ``Exception``, so that what it is raised in cannot swallow it."""


class Watchdog:
    """Watches one stretch of code at a time, from a thread of its own.

    Past the limit it calls ``on_hang`` and raises :class:`Hung` in the watched thread. Python delivers that between
    two bytecodes: a loop in Python is broken off, a call into native code that never comes back is not, and neither
    is one that holds the interpreter lock (then not even ``on_hang`` runs). The time counted is that in which this
    thread ran: a process that was stopped or a machine that slept hangs nothing.
    """

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        self._lock = threading.Lock()
        self._watched: tuple[object, int, Callable[[], None]] | None = None
        self._fired = False
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    @contextlib.contextmanager
    def watching(self, on_hang: Callable[[], None]) -> Iterator[None]:
        """Watch the body; :class:`Hung` leaves it if it took longer than the limit, even if it came to its end."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._watch, name="mfpsn_fx watchdog", daemon=True)
            self._thread.start()
        ident = threading.get_ident()
        with self._lock:
            self._fired, self._watched = False, (object(), ident, on_hang)
        try:
            yield
        finally:
            # a Hung that is under way may arrive here, before the lock is held: then it leaves as any other does
            with self._lock:
                self._watched, fired, self._fired = None, self._fired, False
                if fired:  # perhaps still pending
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(ident), None)
        if fired:
            raise Hung

    def close(self) -> None:
        """End the thread."""
        self._closed.set()

    def _watch(self) -> None:
        seen, ticks = None, 0
        while not self._closed.wait(_TICK):
            with self._lock:
                watched = self._watched
                if watched is None or watched[0] is not seen:
                    seen, ticks = (watched[0] if watched else None), 0
                    continue
                ticks += 1
                if ticks * _TICK < self.limit_s or self._fired:
                    continue
                self._fired = True
                try:
                    watched[2]()
                finally:
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(watched[1]), ctypes.py_object(Hung))
