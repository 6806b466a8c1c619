"""Find each neuron's chain of calls through time, linked by the state that each call passes to the next."""

from __future__ import annotations

import dataclasses
import operator

from torch import fx

from mfpsn_fx.model.sources.stepping import Stepping, is_stepping, stepping_of

from ..errors import RollUpError
from .ops import MAKES_ZEROS

__all__ = ["Chain", "Chains", "find_chains", "input_of", "used_at_all_steps"]


@dataclasses.dataclass
class Chain:
    """One neuron through all steps: its calls, in order."""

    path: str
    stepping: Stepping
    calls: list[fx.Node] = dataclasses.field(default_factory=list)
    lifted: bool = False

    @property
    def sequence(self) -> bool:
        """True if one call runs over all of time."""
        return self.stepping.sequence or self.lifted


@dataclasses.dataclass
class Chains:
    """The chains of a graph, as :func:`find_chains` returns them.

    Attributes:
        chains: one for each place of a neuron in the network.
        calls: for each call, the number of its chain and its step (None where it runs over all of time).
        carried: inputs of the graph that carry a state in.
        steps: steps of the loop; None where the graph is one step, or none of its neurons is called step by step.
        one_step: True if the graph is one step, not a loop.
    """

    chains: list[Chain]
    calls: dict[fx.Node, tuple[int, int | None]]
    carried: dict[fx.Node, None]
    steps: int | None
    one_step: bool


def input_of(call: fx.Node) -> fx.Node:
    """Return the input of a neuron's call."""
    return call.args[0] if call.args else next(iter(call.kwargs.values()))


def find_chains(gm: fx.GraphModule, one_step: bool) -> Chains:
    """Find each neuron's calls in an unrolled graph, and link those that follow each other.

    Raises:
        RollUpError: a state is changed between two steps or does not start from zero, or neurons run for different
            numbers of steps.
    """
    return _Linker(gm, one_step).link()


def used_at_all_steps(gm: fx.GraphModule, chains: Chains) -> set[fx.Node]:
    """Return the items (``x[i]``) that some neuron reads at each of its steps, not through other neurons.

    ``x[0]`` in ``x[t] - x[0]`` is no step of the loop, but a value that all steps share.
    """
    if chains.steps is None:
        return set()
    every = (1 << chains.steps) - 1
    used: dict[fx.Node, dict[int, int]] = {}  # by chain, a bit for each step
    mentions: dict[tuple, list[fx.Node]] = {}
    for node in reversed(gm.graph.nodes):
        at: dict[int, int] = {}
        for user in node.users:
            if user not in chains.calls:
                for chain, bits in used.get(user, {}).items():
                    at[chain] = at.get(chain, 0) | bits
            elif input_of(user) is node and (step := chains.calls[user][1]) is not None:
                chain = chains.calls[user][0]
                at[chain] = at.get(chain, 0) | 1 << step
        used[node] = at
        if node.target is operator.getitem and at:
            mentions.setdefault((node.args[0], repr(node.args[1])), []).append(node)
    found = {node for nodes in mentions.values() for node in nodes if every in used[node].values()}
    for nodes in mentions.values():  # x[-1] has a node for each step
        for chain in used[nodes[0]]:
            bits = [used[node].get(chain, 0) for node in nodes]
            if len(nodes) == chains.steps and len(set(bits)) == len(bits) and sum(bits) == every:
                found.update(nodes)
    return found


class _Linker:
    def __init__(self, gm: fx.GraphModule, one_step: bool) -> None:
        self.gm, self.one_step = gm, one_step
        self.chains: list[Chain] = []
        self.calls: dict[fx.Node, tuple[int, int | None]] = {}
        self.carried: dict[fx.Node, None] = {}

    def link(self) -> Chains:
        own: dict[str, int] = {}  # neurons that keep their state themselves have one chain each
        for node in self.gm.graph.nodes:
            if node.op != "call_module":
                continue
            stepping = stepping_of(self.gm.get_submodule(node.target))
            if stepping is None:
                self._check_no_neuron_inside(node)
                continue
            before = self._predecessor(node, stepping)
            if before is None and not stepping.states and not stepping.sequence:
                before = own.get(node.target)
            if before is None:
                before = len(self.chains)
                self.chains.append(Chain(node.target, stepping, lifted=bool(node.meta.get("lifted"))))
                if not stepping.states:
                    own[node.target] = before
            chain = self.chains[before]
            self.calls[node] = (before, None if chain.sequence else len(chain.calls))
            chain.calls.append(node)
        self._check_carried()
        return Chains(self.chains, self.calls, self.carried, self._steps(), self.one_step)

    def _check_no_neuron_inside(self, node: fx.Node) -> None:
        module = self.gm.get_submodule(node.target)
        inside = [path for path, m in module.named_modules() if is_stepping(m)]
        if inside:
            raise RollUpError(
                f"{node.target}.{inside[0]}: {node.target} ({type(module).__name__}) runs its own code (it has hooks, "
                "or cannot be traced), in which its neurons cannot be followed from step to step"
            )

    def _steps(self) -> int | None:
        lengths = {len(c.calls): c for c in self.chains if not c.sequence}
        if len(lengths) > 1:
            listed = ", ".join(f"{chain.path!r} {count}" for count, chain in sorted(lengths.items()))
            raise RollUpError(
                f"neurons run for different numbers of steps ({listed}): give each place its own neuron, and each "
                "neuron one call a step"
            )
        if 1 in lengths and not self.one_step:
            raise RollUpError(
                f"{lengths[1].path}: every call starts from the initial state, so nothing runs through time: pass each "
                "step's state to the next, and use an example of at least two steps"
            )
        return None if self.one_step else next(iter(lengths), None)

    def _check_carried(self) -> None:
        for node in self.carried:
            for user in node.users:
                if user.target is not operator.getitem and (user not in self.calls or user.args[:1] == (node,)):
                    raise RollUpError(
                        f"the argument {node.target!r} carries a state in, and is used by {user.name} too, which is "
                        "not its neuron"
                    )

    def _predecessor(self, node: fx.Node, stepping: Stepping) -> int | None:
        """Return the chain that a call continues; None if it begins one."""
        found: set[fx.Node] = set()
        fresh = 0
        for name, state in zip(stepping.states, _state_arguments(node, stepping), strict=False):
            if self._is_initial(state):
                fresh += 1
                continue
            call = _taken_from(state, stepping.position(name))
            if call is None or call not in self.calls or call.target != node.target:
                raise RollUpError(
                    f"{node.target}: its state {name!r} is not passed on unchanged from its own last step, but comes "
                    f"from {_described(state)}: what changes a state between steps is no filter of the input"
                )
            found.add(call)
        if not found:
            return None
        number = self.calls[next(iter(found))][0]
        if fresh or len(found) > 1 or self.chains[number].calls[-1] not in found:
            raise RollUpError(f"{node.target}: its states come from different steps")
        return number

    def _is_initial(self, state: object) -> bool:
        if state is None:
            return True
        if not isinstance(state, fx.Node):
            return False
        if state.op == "placeholder":
            self.carried[state] = None
            return True
        if state.op == "get_attr":
            if not state.meta.get("zero", False):
                raise RollUpError(f"{state.target}: a state that starts from other values than zeros is not supported")
            return True
        if state.op in ("call_function", "call_method") and state.target in MAKES_ZEROS:
            return True
        source = state
        while source.op == "call_function" and source.target is operator.getitem:
            source = source.args[0]  # a list of states, given from outside
        if source.op == "placeholder" and source is not state and self.one_step:
            self.carried[source] = None
            return True
        return False


def _state_arguments(node: fx.Node, stepping: Stepping) -> list:
    given = [*node.args[1:], *[None] * len(stepping.states)]
    return [node.kwargs.get(name, given[position]) for position, name in enumerate(stepping.states)]


def _taken_from(state: object, position: int) -> fx.Node | None:
    """Return the call whose result's item ``position`` is ``state``."""
    if not isinstance(state, fx.Node) or state.target is not operator.getitem:
        return None
    call, item = state.args
    return call if item == position and isinstance(call, fx.Node) else None


def _described(state: object) -> str:
    if not isinstance(state, fx.Node):
        return repr(state)
    return state.format_node() if state.op in ("get_attr", "placeholder") else f"{state.name} ({state.target})"
