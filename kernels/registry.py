"""The kernels that can compute the neuron's op: data plus a function, open to users."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch

from .constants import ALL, NeuronConstants
from .layout import Layout

__all__ = [
    "FALLBACK_KERNEL",
    "FLOATS",
    "Kernel",
    "Problem",
    "default_kernel",
    "get_kernel",
    "kernels",
    "rank_of",
    "register_kernel",
    "unregister_kernel",
    "version",
]

_log = logging.getLogger("mfpsn_fx")

# Runs wherever torch runs, in both layouts, on every dtype, and needs no compiler: what is left if nothing else can.
FALLBACK_KERNEL = "shifted-add"

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

_KERNELS: dict[str, Kernel] = {}
_changes = 0
_availability: dict[str, str | None] = {}  # why a kernel cannot run on this machine, of those that were asked
_reported: set[tuple[str, str]] = set()


class Problem(NamedTuple):
    """What a kernel is asked to compute; its predicate decides on this.

    ``shape`` is the input's, in ``layout``; ``device`` a device type such as ``"cpu"``; ``surrogate`` a name.
    """

    shape: tuple[int, ...]
    layout: Layout
    dtype: torch.dtype
    device: str
    order: int
    dilation: int
    surrogate: str = "atan"
    gradient: str = "straight-through"
    training: bool = True
    masked: bool = False
    affine: bool = False

    @classmethod
    def of(
        cls,
        constants: NeuronConstants,
        shape: Sequence[int],
        dtype: torch.dtype,
        device: str,
        order: int,
        masked: bool = False,
        affine: bool = False,
    ) -> Problem:
        """Return what a call with these constants asks of its kernel."""
        shared = {name: getattr(constants, name) for name in _SHARED}
        shared |= {"layout": constants.place, "gradient": str(constants.gradient)}
        return cls(shape=tuple(shape), dtype=dtype, device=device, order=order, masked=masked, affine=affine, **shared)

    def constants(self, others: NeuronConstants | None = None) -> NeuronConstants:
        """Return the constants of such a call; what a problem leaves open is as in ``others`` (default: the op's)."""
        shared = {name: getattr(self, name) for name in _SHARED} | {"layout": str(self.layout)}
        return dataclasses.replace(NeuronConstants() if others is None else others, **shared)

    @property
    def steps(self) -> int:
        return self.shape[self.layout.time_dim]

    @property
    def batch(self) -> int:
        return self.shape[self.layout.batch_dim]

    @property
    def channels(self) -> int:
        return self.shape[self.layout.channel_dim]


_SHARED = tuple(name for name in Problem._fields if name in ALL)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A way to compute the op: what it serves, and the object whose methods do the work.

    ``parts`` gives ``statistics``, ``fire``, ``backward_reductions``, ``backward_input``, and ``forward`` and
    ``backward``, which put them together (:class:`mfpsn_fx.kernels.kernel.NeuronKernel` documents their shapes).
    ``supports(problem)`` returns None or the reason why not; ``unavailable()`` returns None or the reason why the
    kernel cannot run on this machine. Where no kernel is bound, the one of highest ``rank`` that can serve runs.
    ``one_read``: its ``statistics`` read the input once and write no tensor of its size.
    """

    name: str
    parts: object
    layouts: tuple[Layout, ...]
    devices: tuple[str, ...] | None = None
    dtypes: tuple[torch.dtype, ...] = FLOATS
    supports: Callable[[Problem], str | None] | None = None
    unavailable: Callable[[], str | None] | None = None
    summary: str = ""
    rank: int = 0
    one_read: bool = False

    def refusal(self, problem: Problem) -> str | None:
        """Why this kernel cannot serve ``problem`` here, or None if it can."""
        reason = self.unsupported(problem)
        return self.missing() if reason is None else reason

    def unsupported(self, problem: Problem) -> str | None:
        """Why this kernel cannot serve ``problem`` on any machine, or None if it can."""
        if problem.layout not in self.layouts:
            return f"serves {' and '.join(map(str, self.layouts))}, not {problem.layout}"
        if self.devices is not None and problem.device not in self.devices:
            return f"runs on {', '.join(self.devices)}, not on {problem.device}"
        if problem.dtype not in self.dtypes:
            names = ", ".join(str(d).removeprefix("torch.") for d in self.dtypes)
            return f"takes {names}, not {str(problem.dtype).removeprefix('torch.')}"
        return self.supports(problem) if self.supports is not None else None

    def missing(self) -> str | None:
        """Why this kernel cannot run on this machine, or None if it can; may compile it to find out."""
        reason = _availability[self.name] = self.unavailable() if self.unavailable is not None else None
        return reason


def register_kernel(
    name: str,
    *,
    layouts: Iterable[Layout | str] = tuple(Layout),
    devices: Iterable[str] | None = None,
    dtypes: Iterable[torch.dtype] = FLOATS,
    supports: Callable[[Problem], str | None] | None = None,
    unavailable: Callable[[], str | None] | None = None,
    rank: int | None = None,
    one_read: bool = False,
    replace: bool = False,
):
    """Class decorator: offer a kernel to the op and to autoselect.

    Args:
        name: what users and selection tables call it.
        layouts: the layouts it computes.
        devices: device types it runs on; None for all.
        dtypes: dtypes of the input that it takes.
        supports: ``problem -> None`` or the reason why not. Its answers are remembered until the registry changes.
        unavailable: ``() -> None`` or the reason why it cannot run on this machine (on GPUs: on the current device);
            remembered too.
        rank: the highest that can serve runs where nobody has chosen a kernel, and wins where times leave a doubt.
            Ours have 50 (``fused-cuda``), 40 (``fused-triton``), 30 (``fused-cpp``), 10 (``shifted-add``, which always
            can) and less. None: 0, so that a new kernel runs only where it is measured or bound; or, with
            ``replace``, the rank of the kernel that it replaces. Of equal ranks the one registered first.
        one_read: its ``statistics`` read the input once and write no tensor of its size, so that folded batch norms may
            take their mean and variance from it.
        replace: take the place of a kernel of that name.

    Raises:
        ValueError: the name is taken (and ``replace`` is false), empty, or a layout is unknown.
        TypeError: one of the parts is missing, or the rank is no integer.
    """
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int)):
        raise TypeError(f"kernel {name!r}: rank must be an integer, found {rank!r}")
    places = tuple(Layout.parse(layout) for layout in layouts)
    if not name:
        raise ValueError("a kernel needs a name")

    def decorate(cls):
        parts = cls() if isinstance(cls, type) else cls
        wanted = ("statistics", "fire", "backward_reductions", "backward_input", "forward", "backward")
        if missing := [part for part in wanted if not callable(getattr(parts, part, None))]:
            raise TypeError(
                f"kernel {name!r} lacks {', '.join(missing)}; derive it from mfpsn_fx.kernels.kernel.NeuronKernel"
            )
        if name in _KERNELS and not replace:
            raise ValueError(f"a kernel called {name!r} is registered already; pass replace=True to replace it")
        old = _KERNELS.get(name)
        doc = (parts.__doc__ or "").strip().splitlines()
        _KERNELS[name] = Kernel(
            name,
            parts,
            places,
            None if devices is None else tuple(devices),
            tuple(dtypes),
            supports,
            unavailable,
            doc[0] if doc else "",
            rank if rank is not None else old.rank if old is not None else 0,
            one_read,
        )
        _availability.pop(name, None)
        _changed()
        return cls

    return decorate


def _changed() -> None:
    global _changes
    _changes += 1


def version() -> int:
    """A number that changes whenever a kernel is registered or taken out: for what is remembered about kernels."""
    return _changes


def unregister_kernel(name: str) -> None:
    """Take a kernel out again; nodes bound to it give way to the one of highest rank. ``shifted-add`` stays."""
    if name == FALLBACK_KERNEL:
        raise ValueError(f"{name!r} runs where no other kernel can; it cannot be unregistered")
    get_kernel(name)
    del _KERNELS[name]
    _availability.pop(name, None)
    _changed()


def get_kernel(name: str) -> Kernel:
    """The kernel called ``name``; ``ValueError`` naming all kernels if there is none."""
    try:
        return _KERNELS[name]
    except KeyError:
        raise ValueError(f"unknown kernel {name!r}: choose one of {', '.join(map(repr, _KERNELS))}") from None


def kernels(layout: Layout | str | None = None) -> tuple[Kernel, ...]:
    """All registered kernels, or those that serve ``layout``, in the order of registration."""
    if layout is None:
        return tuple(_KERNELS.values())
    layout = Layout.parse(layout)
    return tuple(kernel for kernel in _KERNELS.values() if layout in kernel.layouts)


def rank_of(name: str) -> float:
    """The rank of the kernel called ``name``; below all others if it is not registered (any more)."""
    return _KERNELS[name].rank if name in _KERNELS else float("-inf")


def default_kernel(problem: Problem, *, build: bool = True) -> Kernel:
    """The kernel of highest rank that can serve ``problem``: it runs where none is bound.

    A kernel that fits, but cannot run on this machine, is reported once on the log.

    Args:
        problem: what is to be computed.
        build: find out whether a kernel can run here even if that means to compile it. False: take it that one that
            was not asked yet can.
    """
    for kernel in sorted(_KERNELS.values(), key=lambda kernel: -kernel.rank):
        if kernel.unsupported(problem) is not None:
            continue
        reason = kernel.missing() if build else _availability.get(kernel.name)
        if reason is None:
            return kernel
        if build and (kernel.name, reason) not in _reported:
            _reported.add((kernel.name, reason))
            _log.warning("kernel %r cannot run here, the next one runs in its place: %s", kernel.name, reason)
    return _KERNELS[FALLBACK_KERNEL]
