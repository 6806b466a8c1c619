"""What the rolled-up network returns, where the unrolled one also hands out states."""

from __future__ import annotations

import operator

from torch import fx

from .value_numbering import ValueNumbering
from .values import Call, Output, State, Value

__all__ = ["outputs_of"]


def outputs_of(numbering: ValueNumbering) -> object:
    """Return the structure that the graph returns, with a :class:`Value` for each node; states are None.

    A network that is one step returns its membranes so that they are given to it again: such a membrane is a state
    too, unless it is what the network is for.
    """
    return _Outputs(numbering).structure()


class _Outputs:
    def __init__(self, numbering: ValueNumbering) -> None:
        self.numbering = numbering
        self.places: dict[fx.Node, int] = {}  # how many places are left in which a node is returned
        (self.output,) = (n for n in numbering.gm.graph.nodes if n.op == "output")

    def structure(self) -> object:
        def count(node: fx.Node) -> fx.Node:
            self.places[node] = self.places.get(node, 0) + 1
            return node

        fx.map_arg(self.output.args, count)
        return self._mapped(self.output.args[0])

    def _mapped(self, structure: object) -> object:
        if isinstance(structure, fx.Node):
            return self._returned(structure)
        if isinstance(structure, dict):
            return {key: self._mapped(value) for key, value in structure.items()}
        if isinstance(structure, tuple):
            return tuple(map(self._mapped, structure))
        if isinstance(structure, list):
            return list(map(self._mapped, structure))
        return structure

    def _returned(self, node: fx.Node) -> object:
        value = self.numbering.values[node]
        if isinstance(value, Call):  # a tuple, as it came
            outputs = self.numbering.chains.chains[value.chain].stepping.outputs
            values = [
                self.numbering.output_of(value, name, position, node) for position, name in enumerate(outputs)
            ]  # fmt: skip
            return tuple(None if self._is_state(v) else v for v in values)
        self.places[node] -= 1
        elsewhere = self.places[node] > 0  # of several places the last is the state's
        return None if self._is_state(value, elsewhere) else value

    def _is_state(self, value: Value | State, elsewhere: bool = False) -> bool:
        if isinstance(value, State):
            return True
        chains, kind = self.numbering.chains, self.numbering.groups[value.number].kind
        if elsewhere or not chains.one_step or not isinstance(kind, Output) or kind.name != "membrane":
            return False
        chain = chains.chains[kind.chain]
        stepping = chain.stepping
        position = stepping.outputs.index("spikes") if "spikes" in stepping.outputs else None
        users = [user for call in chain.calls for user in call.users]
        fires = any(u.op == "output" for u in users) or any(
            u.target is operator.getitem and u.args[1] == position and u.users for u in users
        )
        if not fires:  # nobody looks at its spikes: the membrane is what it is for
            return False
        return bool(stepping.states) and not (stepping.reads_out or stepping.outputs[0] == "membrane")
