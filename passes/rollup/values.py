"""Data types of value numbering: a value has a number and an index in time; nodes of one number form a group."""

from __future__ import annotations

import dataclasses

from torch import fx

__all__ = ["Call", "Drawn", "Feed", "Fixed", "Group", "Output", "State", "TimeSlice", "Value"]


@dataclasses.dataclass(frozen=True)
class Value:
    """A node's value: its number, and its index in time, None where it belongs to no single step."""

    number: int
    index: int | None = None


@dataclasses.dataclass(frozen=True)
class Call:
    """All results of a neuron's call, before its items are taken."""

    chain: int
    index: int | None


@dataclasses.dataclass(frozen=True)
class State:
    """A state of a neuron, of use only to be passed to the next step."""

    chain: int
    index: int | None
    position: int


@dataclasses.dataclass(frozen=True)
class TimeSlice:
    """Kind of a group: one position of ``source`` along ``dim``."""

    source: fx.Node
    dim: int


@dataclasses.dataclass(frozen=True)
class Output:
    """Kind of a group: the output of a neuron, ``"spikes"`` or ``"membrane"``."""

    chain: int
    name: str


@dataclasses.dataclass(frozen=True)
class Fixed:
    """Kind of a group: one step of a neuron's output, read by another loop at all of its own steps."""

    value: Value


@dataclasses.dataclass(frozen=True)
class Drawn:
    """Kind of a group: random numbers, drawn at every step from an input that all steps share."""


@dataclasses.dataclass(eq=False)
class Group:
    """Nodes with one number.

    Attributes:
        node: the first of them.
        at: by index, the first node; empty where they belong to no single step.
        kind: the kind of the group; None for a plain operation.
        count: the number of nodes.
        reach: how far before and after its own index it reads, arguments of arguments included.
        from_input: it depends on an input of the graph.
        from_steps: it depends on single steps, or on a neuron.
        membrane: the chain on whose membrane it depends, if that membrane changes when the reset is dropped.
    """

    node: fx.Node
    kind: TimeSlice | Output | Fixed | Drawn | None = None
    at: dict[int, fx.Node] = dataclasses.field(default_factory=dict)
    count: int = 0
    reach: tuple[int, int] = (0, 0)
    from_input: bool = False
    from_steps: bool = False
    membrane: int | None = None


@dataclasses.dataclass(frozen=True)
class Feed:
    """The input of a chain: at step t the index ``start + stride * t`` of a number, or one value at all steps."""

    number: int
    start: int | None
    stride: int = 0
