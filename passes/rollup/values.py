"""What the nodes of an unrolled loop are: values with a number and a place in time, in groups of one number."""

from __future__ import annotations

import dataclasses

from torch import fx

__all__ = ["Call", "Drawn", "Feed", "Fixed", "Group", "Output", "State", "TimeSlice", "Value"]


@dataclasses.dataclass(frozen=True)
class Value:
    """What a node is: a number, and its index in time; None where it belongs to no single step."""

    number: int
    index: int | None = None


@dataclasses.dataclass(frozen=True)
class Call:
    """What a neuron's call returned, before it is taken apart."""

    chain: int
    index: int | None


@dataclasses.dataclass(frozen=True)
class State:
    """A state that is no tensor of its own: something to hand to the next step."""

    chain: int
    index: int | None
    position: int


@dataclasses.dataclass(frozen=True)
class TimeSlice:
    """Of a group: one position of ``source`` along ``dim``."""

    source: fx.Node
    dim: int


@dataclasses.dataclass(frozen=True)
class Output:
    """Of a group: what a neuron puts out, ``"spikes"`` or ``"membrane"``."""

    chain: int
    name: str


@dataclasses.dataclass(frozen=True)
class Fixed:
    """Of a group: one step of a neuron's output, read by another loop at all of its own steps."""

    value: Value


@dataclasses.dataclass(frozen=True)
class Drawn:
    """Of a group: random numbers, drawn at every step from what is the same at all of them."""


@dataclasses.dataclass(eq=False)
class Group:
    """Nodes with one number.

    Attributes:
        node: the first of them.
        at: the first of each index; empty where they belong to no single step.
        kind: what the group is, if it is no plain operation.
        count: how many nodes there are.
        reach: how far before and after its own index it reads, through all that it is made of.
        from_input: it comes from an input of the graph.
        from_steps: it comes from single steps, or from a neuron.
        membrane: a chain whose membrane it is made of, which would be another one without its reset.
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
    """What a chain is fed: at step t the index ``start + stride * t`` of a number, or one value at all steps."""

    number: int
    start: int | None
    stride: int = 0
