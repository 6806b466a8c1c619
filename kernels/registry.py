"""The kernels that can compute the neuron's op: data plus a function, open to users."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

from .layout import Layout

__all__ = [
    "DEFAULT_KERNEL",
    "FLOATS",
    "Kernel",
    "Problem",
    "get_kernel",
    "kernels",
    "register_kernel",
    "unregister_kernel",
    "version",
]

# Runs wherever torch runs, in both layouts, on every dtype, and needs no compiler.
DEFAULT_KERNEL = "shifted-add"

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

_KERNELS: dict[str, Kernel] = {}
_changes = 0


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

    @property
    def steps(self) -> int:
        return self.shape[self.layout.time_dim]

    @property
    def batch(self) -> int:
        return self.shape[self.layout.batch_dim]

    @property
    def channels(self) -> int:
        return self.shape[self.layout.channel_dim]


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A way to compute the op: what it serves, and the object whose methods do the work.

    ``parts`` gives ``statistics``, ``fire``, ``backward_reductions``, ``backward_input``, and ``forward`` and
    ``backward``, which put them together (see :class:`mfpsn_fx.kernels.parts.Parts`, which documents their shapes).
    ``supports(problem)`` returns None or the reason why not; ``unavailable()`` returns None or the reason why the
    kernel cannot run on this machine.
    """

    name: str
    parts: object
    layouts: tuple[Layout, ...]
    devices: tuple[str, ...] | None = None
    dtypes: tuple[torch.dtype, ...] = FLOATS
    supports: Callable[[Problem], str | None] | None = None
    unavailable: Callable[[], str | None] | None = None
    summary: str = ""

    def refusal(self, problem: Problem) -> str | None:
        """Why this kernel cannot serve ``problem`` here, or None if it can."""
        if problem.layout not in self.layouts:
            return f"serves {' and '.join(map(str, self.layouts))}, not {problem.layout}"
        if self.devices is not None and problem.device not in self.devices:
            return f"runs on {', '.join(self.devices)}, not on {problem.device}"
        if problem.dtype not in self.dtypes:
            names = ", ".join(str(d).removeprefix("torch.") for d in self.dtypes)
            return f"takes {names}, not {str(problem.dtype).removeprefix('torch.')}"
        if self.supports is not None and (reason := self.supports(problem)) is not None:
            return reason
        return self.unavailable() if self.unavailable is not None else None


def register_kernel(
    name: str,
    *,
    layouts: Iterable[Layout | str] = tuple(Layout),
    devices: Iterable[str] | None = None,
    dtypes: Iterable[torch.dtype] = FLOATS,
    supports: Callable[[Problem], str | None] | None = None,
    unavailable: Callable[[], str | None] | None = None,
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
        replace: take the place of a kernel of that name.

    Raises:
        ValueError: the name is taken (and ``replace`` is false), empty, or a layout is unknown.
        TypeError: one of the parts is missing.
    """
    places = tuple(Layout.parse(layout) for layout in layouts)
    if not name:
        raise ValueError("a kernel needs a name")

    def decorate(cls):
        parts = cls() if isinstance(cls, type) else cls
        wanted = ("statistics", "fire", "backward_reductions", "backward_input", "forward", "backward")
        if missing := [part for part in wanted if not callable(getattr(parts, part, None))]:
            raise TypeError(f"kernel {name!r} lacks {', '.join(missing)}; derive it from mfpsn_fx.kernels.parts.Parts")
        if name in _KERNELS and not replace:
            raise ValueError(f"a kernel called {name!r} is registered already; pass replace=True to replace it")
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
        )
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
    """Take a kernel out again; nodes bound to it give way to the default. The default itself stays."""
    if name == DEFAULT_KERNEL:
        raise ValueError(f"{name!r} is the default kernel, which unbound neurons run; it cannot be unregistered")
    get_kernel(name)
    del _KERNELS[name]
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
