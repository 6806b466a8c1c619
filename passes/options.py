"""The options of conversion and measurement: default, check and description of each in one place."""

# ruff: noqa: RUF009  (the fields' defaults are calls of _option)
from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Self

from torch import nn

from mfpsn_fx.kernels.layout import Layout
from mfpsn_fx.kernels.quantizer import MAX_EXPONENT, MIN_EXPONENT, Gradient, check_exponent_bounds
from mfpsn_fx.kernels.registry import get_kernel
from mfpsn_fx.kernels.surrogate import Surrogate, get_surrogate
from mfpsn_fx.model.batch import check_repeatable
from mfpsn_fx.model.channel_dims import check_dims

__all__ = ["DEFAULT_ORDER", "LAYOUTS", "ConvertOptions", "MeasureOptions", "dilation_sequence", "first_use"]

LAYOUTS = ("auto", "uniform", "keep", *map(str, Layout))
DEFAULT_ORDER = 2
_SAWTOOTH = 3  # the sawtooth's period (paper, equation 11)


def _option(default: object, doc: str) -> Any:
    return dataclasses.field(default=default, metadata={"doc": doc})


def _documented(cls: type) -> type:
    """Append the fields' descriptions to the class's docstring."""
    lines = [f"    {field.name}: {field.metadata['doc']}" for field in dataclasses.fields(cls)]
    cls.__doc__ = "\n".join([cls.__doc__.rstrip(), "", "Attributes:", *lines, ""])
    return cls


@_documented
@dataclasses.dataclass(frozen=True, kw_only=True)
class MeasureOptions:
    """Options for measuring and choosing kernels and layouts; frozen, and checked on construction.

    Raises:
        TypeError, ValueError: an option does not take its value.
    """

    layout: str = _option(
        "auto",
        '``"auto"``: time-first or time-last for every part of the network, by the least sum of measured times, '
        'conversions included; ``"uniform"``: the better one for all; ``"time_first"``, ``"time_last"``: that one; '
        '``"keep"``: layouts stay (docs/design/layout.md).',
    )
    kernels: str | Mapping[str, str] = _option(
        "auto", '``"auto"`` (measured), one name for all neurons, or a mapping from layer to name.'
    )
    repeats: int = _option(5, "The least number of samples of a kernel that may be chosen.")
    budget_s: float = _option(10.0, "Seconds for measuring, all layers together.")
    progress: bool | None = _option(None, "Show progress bars; None: if stderr is a terminal.")
    cache: bool = _option(
        True, "Use times measured earlier on this machine, and keep new ones (docs/design/measurement.md)."
    )
    selection: Any = _option(
        None,
        "An earlier ``Selection``, its JSON text or the path of a file with it: layouts and kernels are taken from it "
        "instead of measured; layers that it does not fit are named in a warning and measured.",
    )
    verify: bool | str = _option(
        False,
        "Measure a training step of the planned network and of the uniform ones end to end, and use another if it is "
        'faster by more than the noise: ``True``: eager and compiled; ``"eager"`` or ``"compiled"``: one of the two.',
    )

    _NOT_JSON: ClassVar[dict[str, str]] = {}

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            Layout.parse(self.layout)  # raises with the known layouts
        self._set(layout=str(self.layout))
        if isinstance(self.kernels, str):
            if self.kernels != "auto":
                get_kernel(self.kernels)
        elif isinstance(self.kernels, Mapping):
            self._set(kernels=dict(self.kernels))
            for layer, name in self.kernels.items():
                try:
                    get_kernel(name)
                except ValueError as error:
                    raise ValueError(f"{layer}: {error}") from None
        else:
            raise TypeError(f"kernels takes a name or a mapping from layer to name, found {self.kernels!r}")
        if isinstance(self.repeats, bool) or not isinstance(self.repeats, int) or self.repeats < 1:
            raise ValueError(f"repeats must be an integer of at least 1, found {self.repeats!r}")
        number = isinstance(self.budget_s, (int, float)) and not isinstance(self.budget_s, bool)
        if not number or not self.budget_s >= 0:
            raise ValueError(f"budget_s must be a number of seconds, at least 0, found {self.budget_s!r}")
        self._set(budget_s=float(self.budget_s))
        self._check_flag("cache")
        if self.progress is not None:
            self._check_flag("progress")
        if not isinstance(self.verify, bool) and self.verify not in ("eager", "compiled"):
            raise ValueError(f"unknown verify {self.verify!r}: choose True, 'eager' or 'compiled'")
        if self.selection is not None and (self.layout != "auto" or self.kernels != "auto"):
            raise ValueError("selection= sets layouts and kernels: leave layout= and kernels= at 'auto'")

    def replace(self, **changes: object) -> Self:
        """Return these options with some changed.

        Raises:
            TypeError: there is no such option; the message names those that there are.
        """
        known = [field.name for field in dataclasses.fields(self)]
        if unknown := sorted(set(changes) - set(known)):
            raise TypeError(f"there is no option {', '.join(map(repr, unknown))}; the options are {', '.join(known)}")
        return dataclasses.replace(self, **changes)

    def to_json(self) -> str:
        """Return the options as JSON text, which :meth:`from_json` reads.

        Raises:
            ValueError: an option's value has no JSON form: data, a function, an object.
        """
        return json.dumps({field.name: self._plain(field.name) for field in dataclasses.fields(self)}, indent=2)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Return the options that :meth:`to_json` wrote; options that the text leaves out have their defaults.

        Raises:
            ValueError: ``text`` is no JSON object, or an option does not take its value.
            TypeError: ``text`` names an unknown option.
        """
        try:
            given = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"these are no options written by to_json: {error}") from error
        if not isinstance(given, dict):
            raise ValueError(f"these are no options written by to_json: an object is needed, found {given!r}")
        try:
            return cls().replace(**{name: cls._parsed(name, value) for name, value in given.items()})
        except KeyError as error:
            raise ValueError(f"these are no options written by to_json: {error} is missing") from error

    def _plain(self, name: str) -> object:
        value = getattr(self, name)
        if name == "selection" and hasattr(value, "to_json"):
            return value.to_json()
        if isinstance(value, os.PathLike):
            return os.fspath(value)
        if reason := self._NOT_JSON.get(name) if value is not None else None:
            if name != "only" or callable(value):
                raise ValueError(f"{name}={type(value).__name__} has no JSON form: {reason}")
            return sorted(value)
        if isinstance(value, Surrogate):
            return {"name": value.name, "alpha": value.alpha}
        return value

    @classmethod
    def _parsed(cls, name: str, value: object) -> object:
        if name == "surrogate" and isinstance(value, dict):
            return get_surrogate(value["name"], value["alpha"])
        if name == "channel_dims" and isinstance(value, dict):
            return {path: tuple(dims) if isinstance(dims, list) else dims for path, dims in value.items()}
        if isinstance(value, list):
            return tuple(value)
        return value

    def _check_flag(self, name: str) -> None:
        if not isinstance(getattr(self, name), bool):
            raise ValueError(f"{name} must be True or False, found {getattr(self, name)!r}")

    def _set(self, **values: object) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)


@_documented
@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvertOptions(MeasureOptions):
    """Options for converting a network and for choosing its kernels and layouts; frozen, checked on construction.

    Raises:
        TypeError, ValueError: an option does not take its value.
    """

    order: int | Mapping[str, int] = _option(
        DEFAULT_ORDER,
        f"k, the number of taps of each neuron, or a mapping from layer to k; other layers have {DEFAULT_ORDER}.",
    )
    dilation: str | int | Sequence[int] = _option(
        "sawtooth",
        'The distance of taps in time steps: ``"sawtooth"`` (1, 2, 3, 1, …), one integer, or a sequence in the order '
        "of execution, which repeats if it is too short.",
    )
    init: str = _option(
        "source",
        '``"source"``: initialize each neuron as its source without reset; ``"random"``: at random, as in the paper.',
    )
    calibrate: Iterable | None = _option(
        None,
        "Batches on which the new neurons are fitted to their sources' behavior, resets included, layer by layer: a "
        "list or a DataLoader of the model's inputs (docs/guide/calibration.md).",
    )
    strict: bool = _option(True, "Raise if a neuron cannot be converted; False: it stays, and the selection lists it.")
    only: Iterable[str] | Callable[[str, nn.Module], bool] | None = _option(
        None,
        "Which neurons to convert: their paths in the model, or a function of path and module; the others stay, and "
        "the selection lists them. None: all.",
    )
    surrogate: Surrogate | None = _option(
        None, "Surrogate gradient of all new neurons, such as ``mfpsn_fx.ATan(5.0)``; None keeps each source's."
    )
    gradient: str = _option(
        str(Gradient.STRAIGHT_THROUGH),
        'Gradient of the power-of-two quantizer: ``"straight-through"``, ``"round-only"``; ``"none"``: no quantizer.',
    )
    channel_dims: Mapping[str, int | tuple[int, ...]] | None = _option(
        None,
        "For neurons whose channels are not dim 2 of (T, N, C, *), by path in the model: the dim, or several dims that "
        'are channels together: ``{"attn_lif": (2, 3)}`` for (T, N, heads, width, L).',
    )
    fold_norms: bool = _option(
        True,
        "With an example, fuse batch norms into the neurons after them, which apply them on load "
        "(:class:`mfpsn_fx.passes.FuseNorms`): the same network, with one tensor less for each.",
    )
    eps: float = _option(1e-5, "As in ``torch.nn.BatchNorm1d``, of each neuron's statistics.")
    momentum: float = _option(0.1, "As in ``torch.nn.BatchNorm1d``, of each neuron's running statistics.")
    min_exponent: int = _option(MIN_EXPONENT, "The least exponent of a quantized weight.")
    max_exponent: int = _option(MAX_EXPONENT, "The largest exponent of a quantized weight.")

    _NOT_JSON: ClassVar[dict[str, str]] = {
        "calibrate": "it is data; leave it out and give it to convert",
        "only": "it is a function; give the neurons' paths",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.order, Mapping):
            self._set(order=dict(self.order))
        for layer, order in self.order.items() if isinstance(self.order, dict) else [("", self.order)]:
            if isinstance(order, bool) or not isinstance(order, int) or order < 1:
                at = f" of {layer}" if layer else ""
                raise ValueError(f"order{at} must be an integer of at least 1, found {order!r}")
        dilation_sequence(self.dilation)
        if not isinstance(self.dilation, (str, int)):
            self._set(dilation=tuple(self.dilation))
        if self.init not in ("source", "random"):
            raise ValueError(f"unknown init {self.init!r}: choose 'source' or 'random'")
        if self.calibrate is not None:
            check_repeatable(self.calibrate, "calibration")
        self._check_flag("strict")
        self._check_flag("fold_norms")
        if isinstance(self.only, str):
            raise TypeError(f"only takes several paths or a function of path and module, found the text {self.only!r}")
        if self.only is not None and not callable(self.only):
            self._set(only=frozenset(self.only))
        if self.surrogate is not None and not isinstance(self.surrogate, Surrogate):
            raise TypeError(f"surrogate takes a Surrogate such as mfpsn_fx.ATan(), found {self.surrogate!r}")
        self._set(gradient=str(Gradient.parse(self.gradient)))
        if self.channel_dims is not None:
            self._set(channel_dims=dict(self.channel_dims))
            for path, dims in self.channel_dims.items():
                one = dims if isinstance(dims, (tuple, list)) else (dims,)
                if any(isinstance(dim, int) and dim < 0 for dim in one):  # counted from the back: the rank is needed
                    continue
                try:
                    check_dims(dims)
                except ValueError as error:
                    raise ValueError(f"{path}: {error}") from None
        if not all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in (self.eps, self.momentum)):
            raise TypeError(f"eps and momentum are numbers, found {self.eps!r} and {self.momentum!r}")
        if not (self.eps > 0 and math.isfinite(self.eps) and 0 <= self.momentum <= 1):
            raise ValueError(f"eps must be positive and momentum in [0, 1], found {self.eps} and {self.momentum}")
        check_exponent_bounds(self.min_exponent, self.max_exponent)

    def excludes(self, path: str, module: nn.Module) -> bool:
        """Return True if ``only`` leaves out the neuron at ``path`` of the model (``path@2``: its second use)."""
        if self.only is None:
            return False
        if callable(self.only):
            return not self.only(path, module)
        return path not in self.only and first_use(path) not in self.only


def first_use(path: str) -> str:
    """Return the path in the user's model of the neuron whose further use is called ``path@2``, ``path@3``, …"""
    return path.partition("@")[0]


def dilation_sequence(dilation: str | int | Sequence[int], period: int = _SAWTOOTH) -> tuple[int, ...]:
    """Return the dilations that repeat over the layers (paper, equation 11).

    Raises:
        ValueError: ``dilation`` is not ``"sawtooth"``, an integer of at least 1, or a sequence of them.
    """
    wanted = f"unknown dilation {dilation!r}: give 'sawtooth', an integer, or a sequence of integers"
    if isinstance(dilation, str):
        if dilation != "sawtooth":
            raise ValueError(wanted)
        dilation = range(1, _positive(period) + 1)
    elif isinstance(dilation, int):
        dilation = [dilation]
    try:
        sequence = tuple(_positive(d) for d in dilation)
    except TypeError:
        raise ValueError(wanted) from None
    if not sequence:
        raise ValueError("the sequence of dilations is empty")
    return sequence


def _positive(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"a dilation must be an integer of at least 1, found {value!r}")
    return value
