"""Find the outputs of the rolled-up network: those of the unrolled one, without states."""

from __future__ import annotations

import operator

from torch import fx

from .value_numbering import ValueNumbering
from .values import Call, Output, State, Value

__all__ = ["outputs_of"]


def outputs_of(numbering: ValueNumbering) -> object:
    """Return the structure that the graph returns, with a :class:`Value` for each node; states are None.

    A network that is one step returns its membranes so that they are passed to its next call: such a membrane is a
    state too, unless it is the network's readout.
    """
    return _Outputs(numbering).structure()


class _Outputs:
    def __init__(self, numbering: ValueNumbering) -> None:
        self.numbering = numbering
        self.remaining: dict[fx.Node, int] = {}  # how often a node is returned after the current place
        (self.output,) = (n for n in numbering.gm.graph.nodes if n.op == "output")

    def structure(self) -> object:
        def count(node: fx.Node) -> fx.Node:
            self.remaining[node] = self.remaining.get(node, 0) + 1
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
        if isinstance(value, Call):  # the whole tuple of a neuron's results
            outputs = self.numbering.chains.chains[value.chain].stepping.outputs
            values = [
                self.numbering.output_of(value, name, position, node) for position, name in enumerate(outputs)
            ]  # fmt: skip
            return tuple(None if self._is_state(v) else v for v in values)
        self.remaining[node] -= 1
        again = self.remaining[node] > 0  # a node that is returned several times is a state the last time
        return None if self._is_state(value, again) else value

    def _is_state(self, value: Value | State, again: bool = False) -> bool:
        """Return True if ``value`` is returned as a state; ``again``: it is returned once more after this."""
        if isinstance(value, State):
            return True
        chains, kind = self.numbering.chains, self.numbering.groups[value.number].kind
        if again or not chains.one_step or not isinstance(kind, Output) or kind.name != "membrane":
            return False
        chain = chains.chains[kind.chain]
        stepping = chain.stepping
        position = stepping.outputs.index("spikes") if "spikes" in stepping.outputs else None
        users = [user for call in chain.calls for user in call.users]
        fires = any(u.op == "output" for u in users) or any(
            u.target is operator.getitem and u.args[1] == position and u.users for u in users
        )
        if not fires:  # its spikes are not used: the membrane is the readout
            return False
        return bool(stepping.states) and not (stepping.reads_out or stepping.outputs[0] == "membrane")
