"""Registry of the kernels that can compute the neuron op, extensible by users."""

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

# Runs wherever PyTorch runs, in both layouts, on every dtype, without a compiler: used where no other kernel can serve
FALLBACK_KERNEL = "shifted-add"

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

_KERNELS: dict[str, Kernel] = {}
_version = 0
_availability: dict[str, str | None] = {}  # by name: why a kernel cannot run on this machine, None if it can
_reported: set[tuple[str, str]] = set()


class Problem(NamedTuple):
    """What a kernel is to compute: the facts by which it accepts or refuses a call.

    ``shape`` is that of the input, in ``layout``; ``device`` a device type such as ``"cpu"``; ``surrogate`` a name;
    ``masked`` and ``affine`` are True if the call has a mask, or a scale or shift.
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
        """Return the problem that a call with these constants poses."""
        shared = {name: getattr(constants, name) for name in _SHARED_WITH_CONSTANTS}
        shared |= {"layout": constants.parsed_layout, "gradient": str(constants.gradient)}
        return cls(shape=tuple(shape), dtype=dtype, device=device, order=order, masked=masked, affine=affine, **shared)

    def constants(self, others: NeuronConstants | None = None) -> NeuronConstants:
        """Return the constants of such a call; the others are those of ``others``, by default the op's defaults."""
        shared = {name: getattr(self, name) for name in _SHARED_WITH_CONSTANTS} | {"layout": str(self.layout)}
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


_SHARED_WITH_CONSTANTS = tuple(name for name in Problem._fields if name in ALL)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A registered implementation of the op: the problems that it supports, and the object whose methods compute it.

    ``parts`` has the methods ``statistics``, ``fire``, ``backward_reductions``, ``backward_input``, and ``forward`` and
    ``backward``, which combine them (see :class:`mfpsn_fx.kernels.kernel.NeuronKernel`). ``supports(problem)`` returns
    None or the reason for a refusal; ``unavailable()`` returns None or the reason why the kernel cannot run on this
    machine. Where no kernel is bound, the one of highest ``rank`` that can serve runs. ``one_read`` is True if its
    ``statistics`` read the input once and write no tensor of its size.
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
        """Return why this kernel cannot serve ``problem`` on this machine, or None if it can."""
        reason = self.unsupported(problem)
        return self.missing() if reason is None else reason

    def unsupported(self, problem: Problem) -> str | None:
        """Return why this kernel cannot serve ``problem`` on any machine, or None if it can."""
        if problem.layout not in self.layouts:
            return f"serves {' and '.join(map(str, self.layouts))}, not {problem.layout}"
        if self.devices is not None and problem.device not in self.devices:
            return f"runs on {', '.join(self.devices)}, not on {problem.device}"
        if problem.dtype not in self.dtypes:
            names = ", ".join(str(d).removeprefix("torch.") for d in self.dtypes)
            return f"takes {names}, not {str(problem.dtype).removeprefix('torch.')}"
        return self.supports(problem) if self.supports is not None else None

    def missing(self) -> str | None:
        """Return why this kernel cannot run on this machine, or None if it can; may compile it to find out."""
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
    """Class decorator: register a kernel for the op and for autoselect.

    Args:
        name: the kernel's name in options and selection tables.
        layouts: the layouts it computes.
        devices: device types it runs on; None for all.
        dtypes: dtypes of the input that it takes.
        supports: ``problem -> None`` or the reason for a refusal. Results are cached until the registry changes.
        unavailable: ``() -> None`` or the reason why it cannot run on this machine (on GPUs: on the current device);
            cached, too.
        rank: the kernel of highest rank that can serve runs where none is bound, and wins where measured times do not
            decide. Built-in ranks are 50 (``fused-cuda``), 40 (``fused-triton``), 30 (``fused-cpp``), 10
            (``shifted-add``, which serves every problem) and lower. None: 0, so that a new kernel runs only where it is
            measured or bound; or, with ``replace``, the rank of the kernel that it replaces. Among equal ranks the one
            registered first takes precedence.
        one_read: its ``statistics`` read the input once and write no tensor of its size, so that folded batch norms may
            take their mean and variance from it.
        replace: replace a registered kernel of that name.

    Raises:
        ValueError: the name is taken (and ``replace`` is false), empty, or a layout is unknown.
        TypeError: a method is missing, or the rank is not an integer.
    """
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int)):
        raise TypeError(f"kernel {name!r}: rank must be an integer, found {rank!r}")
    places = tuple(Layout.parse(layout) for layout in layouts)
    if not name:
        raise ValueError("a kernel needs a name")

    def decorate(cls):
        parts = cls() if isinstance(cls, type) else cls
        required = ("statistics", "fire", "backward_reductions", "backward_input", "forward", "backward")
        if missing := [method for method in required if not callable(getattr(parts, method, None))]:
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
        _increment_version()
        return cls

    return decorate


def _increment_version() -> None:
    global _version
    _version += 1


def version() -> int:
    """Return a number that changes whenever a kernel is registered or unregistered, for keys of caches."""
    return _version


def unregister_kernel(name: str) -> None:
    """Unregister a kernel; nodes bound to it run the one of highest rank. ``ValueError`` for ``shifted-add``."""
    if name == FALLBACK_KERNEL:
        raise ValueError(f"{name!r} runs where no other kernel can; it cannot be unregistered")
    get_kernel(name)
    del _KERNELS[name]
    _availability.pop(name, None)
    _increment_version()


def get_kernel(name: str) -> Kernel:
    """Return the kernel called ``name``; ``ValueError`` naming all kernels if there is none."""
    try:
        return _KERNELS[name]
    except KeyError:
        raise ValueError(f"unknown kernel {name!r}: choose one of {', '.join(map(repr, _KERNELS))}") from None


def kernels(layout: Layout | str | None = None) -> tuple[Kernel, ...]:
    """Return all registered kernels, or those that serve ``layout``, in the order of registration."""
    if layout is None:
        return tuple(_KERNELS.values())
    layout = Layout.parse(layout)
    return tuple(kernel for kernel in _KERNELS.values() if layout in kernel.layouts)


def rank_of(name: str) -> float:
    """Return the rank of the kernel called ``name``; −∞ if it is not registered."""
    return _KERNELS[name].rank if name in _KERNELS else float("-inf")


def default_kernel(problem: Problem, *, build: bool = True) -> Kernel:
    """Return the kernel of highest rank that can serve ``problem``, which runs where none is bound.

    A kernel that supports the problem but cannot run on this machine is logged once.

    Args:
        problem: what is to be computed.
        build: compile a kernel if needed to find out if it can run. False: assume that a kernel not tried yet can.
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
