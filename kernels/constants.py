"""The constants of the neuron op as one dataclass, from which its schema, its calls and cache keys are made."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Iterable, Mapping, Sequence

import torch

from .layout import Layout
from .quantizer import MAX_EXPONENT, MIN_EXPONENT, Gradient, check_exponent_bounds
from .surrogate import get_surrogate

__all__ = ["ALL", "COMMON", "FOLDING", "SURROGATE", "NeuronConstants", "bind"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class NeuronConstants:
    """The keyword arguments of ``mfpsn::neuron``, in the order of its schema; the other ops take a subset.

    A field added here becomes part of the ops' schemas, of every call made by :meth:`arguments`, and of the keys of
    cached measurements. The constructor checks nothing, since Dynamo passes it symbolic numbers; :meth:`checked` does.
    """

    eps: float = 1e-5
    surrogate: str = "atan"
    alpha: float = 2.0
    gradient: str = "straight-through"
    min_exponent: int = MIN_EXPONENT
    max_exponent: int = MAX_EXPONENT
    training: bool = False
    dilation: int = 1
    layout: str = "time_first"
    # The bound kernel's name; not called "kernel", a name that Inductor's fallback for custom ops uses for a parameter.
    # "" stands for the kernel of highest rank, selected when the op runs, so that a graph compiled or exported on one
    # machine does not depend on the kernels of that machine.
    method: str = ""
    # for error messages only: neither results nor times depend on it
    layer: str = dataclasses.field(default="", metadata={"label": True})

    @staticmethod
    @functools.lru_cache(maxsize=4096)
    def checked(**fields: object) -> NeuronConstants:
        """Return the checked constants with these fields; equal fields give the same object.

        Raises:
            ValueError: a field is out of range or an unknown name.
        """
        found = NeuronConstants(**fields)
        check_exponent_bounds(found.min_exponent, found.max_exponent)
        Gradient.parse(found.gradient)
        Layout.parse(found.layout)
        get_surrogate(found.surrogate, found.alpha)
        if found.dilation < 1:
            prefix = f"{found.layer}: " if found.layer else ""
            raise ValueError(f"{prefix}dilation must be at least 1, found {found.dilation}")
        return found

    @classmethod
    def schema(cls, names: Iterable[str]) -> str:
        """Return the fields ``names`` as arguments of an op schema: type, name and default of each."""
        fields = {field.name: field for field in dataclasses.fields(cls)}
        return ", ".join(f"{fields[name].type} {name}={fields[name].default!r}" for name in names)

    @classmethod
    def of_call(cls, op: object, args: Sequence[object], kwargs: Mapping[str, object]) -> NeuronConstants:
        """Return the constants of a call of one of the ops; those that the op does not take have their defaults."""
        bound = bind(op, args, kwargs)
        return cls(**{field.name: bound[field.name] for field in dataclasses.fields(cls) if field.name in bound})

    def arguments(self, names: Iterable[str]) -> dict[str, object]:
        """Return the keyword arguments ``names`` for a call of an op."""
        return {name: getattr(self, name) for name in names}

    def key(self) -> dict[str, object]:
        """Return all fields that results or times depend on, as JSON-able data."""
        fields = dataclasses.fields(self)
        return {field.name: getattr(self, field.name) for field in fields if not field.metadata.get("label")}

    @property
    def parsed_layout(self) -> Layout:
        """The layout as an enum member."""
        return _LAYOUTS.get(self.layout) or Layout.parse(self.layout)  # parse takes eight times as long


_LAYOUTS = {layout.value: layout for layout in Layout}
ALL = tuple(field.name for field in dataclasses.fields(NeuronConstants))
FOLDING = ("eps", "gradient", "min_exponent", "max_exponent")
SURROGATE = ("surrogate", "alpha")
COMMON = ("dilation", "layout", "method", "layer")


def bind(op: object, args: Sequence[object], kwargs: Mapping[str, object]) -> dict[str, object]:
    """Return the arguments of a call of ``op`` by the names of its schema, defaults included.

    Args:
        op: an ``OpOverload``, or an ``OpOverloadPacket`` whose default overload is called.
        args, kwargs: of the call.

    Raises:
        TypeError: the arguments do not fit the schema.
    """
    bound = _signature(getattr(op, "default", op)).bind(*args, **kwargs)
    bound.apply_defaults()
    return bound.arguments


@functools.cache
def _signature(overload: torch._ops.OpOverload) -> inspect.Signature:
    """Return the schema of ``overload`` as a Python signature."""
    return inspect.Signature(
        [
            inspect.Parameter(
                argument.name,
                inspect.Parameter.KEYWORD_ONLY if argument.kwarg_only else inspect.Parameter.POSITIONAL_OR_KEYWORD,
                default=argument.default_value if argument.has_default_value() else inspect.Parameter.empty,
            )
            for argument in overload._schema.arguments
        ]
    )
