"""The constants of the neuron's op as one value, from which its schema, its calls and cache keys are made."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Iterable, Mapping, Sequence

import torch

from .layout import Layout
from .quantizer import MAX_EXPONENT, MIN_EXPONENT, Gradient, check_exponent_bounds
from .surrogate import get_surrogate

__all__ = ["ALL", "FOLDING", "PLACE", "SURROGATE", "NeuronConstants", "bind"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class NeuronConstants:
    """The keyword arguments of ``mfpsn::neuron``, in the order of its schema; the other ops take some of them.

    A field that is added here is in the ops' schemas, in every call that is made from a value, and in the keys under
    which measurements are kept. Nothing is checked when a value is made, since Dynamo makes some with symbolic numbers;
    :meth:`checked` checks.
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
    # The kernel's name travels as "method": Inductor's fallback for custom ops has a parameter of its own called
    # "kernel". "" stands for the kernel of highest rank, which is found when the op runs: a graph that was compiled or
    # exported on one machine says nothing of the kernels of another.
    method: str = ""
    # for messages alone: neither results nor times depend on it
    layer: str = dataclasses.field(default="", metadata={"label": True})

    @staticmethod
    @functools.lru_cache(maxsize=4096)
    def checked(**fields: object) -> NeuronConstants:
        """Return the constants with these fields, the same object for the same fields.

        Raises:
            ValueError: a field is out of range or names what is unknown.
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
        """Return the fields ``names`` as a schema has arguments: type, name and default of each."""
        fields = {field.name: field for field in dataclasses.fields(cls)}
        return ", ".join(f"{fields[name].type} {name}={fields[name].default!r}" for name in names)

    @classmethod
    def of_call(cls, op: object, args: Sequence[object], kwargs: Mapping[str, object]) -> NeuronConstants:
        """Return the constants of a call of one of the ops; of those that it does not take, the defaults."""
        bound = bind(op, args, kwargs)
        return cls(**{field.name: bound[field.name] for field in dataclasses.fields(cls) if field.name in bound})

    def arguments(self, names: Iterable[str]) -> dict[str, object]:
        """Return the keyword arguments ``names`` for a call of an op."""
        return {name: getattr(self, name) for name in names}

    def key(self) -> dict[str, object]:
        """Return every field that results or times depend on, for JSON."""
        fields = dataclasses.fields(self)
        return {field.name: getattr(self, field.name) for field in fields if not field.metadata.get("label")}

    @property
    def place(self) -> Layout:
        """The layout, parsed."""
        return _LAYOUTS.get(self.layout) or Layout.parse(self.layout)  # parsing takes eight times as long


_LAYOUTS = {layout.value: layout for layout in Layout}
ALL = tuple(field.name for field in dataclasses.fields(NeuronConstants))
FOLDING = ("eps", "gradient", "min_exponent", "max_exponent")
SURROGATE = ("surrogate", "alpha")
PLACE = ("dilation", "layout", "method", "layer")


def bind(op: object, args: Sequence[object], kwargs: Mapping[str, object]) -> dict[str, object]:
    """Return the arguments of a call of ``op`` by the names of its schema, defaults included.

    Args:
        op: an overload, or a packet whose default overload is called.
        args, kwargs: of the call.

    Raises:
        TypeError: they do not fit the schema.
    """
    bound = _signature(getattr(op, "default", op)).bind(*args, **kwargs)
    bound.apply_defaults()
    return bound.arguments


@functools.cache
def _signature(overload: torch._ops.OpOverload) -> inspect.Signature:
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
