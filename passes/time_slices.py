"""Reads an unrolled loop over time as one step: every value is either the same at all steps, or one of T slices.

The graph is interpreted once, node by node. Each value is interned by *what computes it*, the step left open: op,
target, constants and, through its arguments, all that it is wired to. Slices of two steps are slices of one value
exactly if they are interned as one, so names play no part, and a constant that differs at one step makes another value.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate

from mfpsn_fx.model.sources.stepping import Stepping, is_stepping, stepping_of

from .replace_neurons import ConversionError

__all__ = ["Chain", "Expr", "Ref", "RollUpError", "Slices", "is_random", "read_slices"]


class RollUpError(ConversionError):
    """A loop over time that is not the same at every step; the message names the layer and what differs."""


@dataclasses.dataclass(frozen=True)
class Ref:
    """The value of expression ``index``: a whole one, or the slice of a timed one that belongs to the reader's step."""

    index: int


@dataclasses.dataclass(eq=False)
class Expr:
    """What computes a value.

    ``op`` is a node's (placeholder, get_attr, call_function, call_method, call_module), or ``neuron`` (``target``: its
    path), ``select`` (one step of a timed value), ``sequence`` (all of them, stacked), ``of_sequence`` (the steps of a
    whole value, by its leading dim) or ``repeat`` (a whole value at every step). A timed value has a slice for each
    step; ``at`` has the nodes that compute them in the unrolled graph, ``node`` the first that computes a whole value.
    """

    op: str
    target: object
    args: tuple
    kwargs: dict
    timed: bool
    name: str
    at: dict[int, fx.Node] = dataclasses.field(default_factory=dict)
    node: fx.Node | None = None


@dataclasses.dataclass(frozen=True)
class _Whole:
    index: int


@dataclasses.dataclass(frozen=True)
class _Slice:
    index: int
    step: int


@dataclasses.dataclass(frozen=True)
class _Sum:
    """The first ``count`` slices of timed ``index`` added up, onto ``start``."""

    index: int
    count: int
    start: int | None


@dataclasses.dataclass(frozen=True)
class _Call:
    """What a neuron's call returned, before it is taken apart."""

    chain: int
    step: int | None


@dataclasses.dataclass(frozen=True)
class _State:
    """A state that is no tensor of its own: something to hand to the next step."""

    chain: int
    step: int | None
    position: int


@dataclasses.dataclass(frozen=True)
class _Half:
    """A tensor that only some steps have been written into."""

    name: str


@dataclasses.dataclass
class Chain:
    """One neuron through all steps: its calls, linked by the state that each hands to the next."""

    path: str
    stepping: Stepping
    calls: list[fx.Node] = dataclasses.field(default_factory=list)
    input: int | None = None
    lifted: bool = False

    @property
    def sequence(self) -> bool:
        return self.stepping.sequence or self.lifted


@dataclasses.dataclass
class Slices:
    """What :func:`read_slices` finds: expressions in the order of their arguments, and the output in terms of them."""

    exprs: list[Expr]
    chains: list[Chain]
    steps: int | None
    output: object = None
    dropped: tuple[str, ...] = ()

    def full(self, index: int) -> bool:
        """Whether a timed expression has its slice at every step."""
        expr = self.exprs[index]
        return expr.op in ("of_sequence", "repeat", "neuron") or len(expr.at) == (self.steps or 1)


_ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")
_MAKES_ZEROS = (torch.zeros_like, torch.zeros, "new_zeros")
_RANDOM = (
    torch.bernoulli, torch.rand_like, torch.randn_like, torch.poisson, torch.normal, torch.dropout,
    nn.functional.dropout, nn.functional.dropout1d, nn.functional.dropout2d, nn.functional.dropout3d,
    nn.functional.alpha_dropout, nn.functional.feature_alpha_dropout, torch.randint_like, torch.multinomial,
    torch.binomial, nn.functional.gumbel_softmax, "bernoulli", "bernoulli_", "normal_", "uniform_", "multinomial",
    "exponential_", "geometric_", "random_",
)  # fmt: skip


def is_random(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node draws random numbers."""
    if node.op == "call_module":
        return any(
            isinstance(m, (nn.modules.dropout._DropoutNd, nn.RReLU)) for m in gm.get_submodule(node.target).modules()
        )
    return node.op in ("call_function", "call_method") and node.target in _RANDOM


def read_slices(
    gm: fx.GraphModule, one_step: bool, run: Callable[[Slices], dict[str, object]]
) -> tuple[Slices, dict[str, object]]:
    """Read an unrolled graph, as :func:`~mfpsn_fx.model.capturing.steps.capture_steps` makes it.

    Args:
        one_step: the graph is one step; its inputs are slices, and so is what it returns.
        run: runs the graph on an example, once neurons and states are known; gives each node's value by name.

    Returns:
        The slices, and what ``run`` gave.

    Raises:
        RollUpError: the steps are not the same, a neuron's state is touched between steps, or what is fed back does
            not stay in its own neuron.
    """
    reader = _Reader(gm, one_step)
    reader.link()
    reader.shown = run(reader.slices)
    return reader.read(), reader.shown


class _Reader:
    def __init__(self, gm: fx.GraphModule, one_step: bool) -> None:
        self.gm, self.one_step = gm, one_step
        self.slices = Slices([], [], None)
        self.known: dict[tuple, int] = {}
        self.values: dict[fx.Node, object] = {}
        self.called: dict[fx.Node, tuple[int, int | None]] = {}
        self.fed_back: set[fx.Node] = set()  # placeholders that carry a state in
        self.drawn: dict[tuple, int] = {}
        self.output_uses: dict[fx.Node, int] = {}  # in how many places each is returned, and how many were met
        self.returned: dict[fx.Node, int] = {}
        self.draw_keys: dict[fx.Node, int] = {}  # nodes that do the same to the same have the same
        self.static_draws: dict[int, int] = {}
        self.shown: dict[str, object] = {}
        self.filled: dict[str, list[tuple[_Slice, int]]] = {}  # tensors made before the loop, written to step by step

    # -- neurons through time

    def link(self) -> None:
        """Find each neuron's calls, and which of them follow each other."""
        chains = self.slices.chains
        own: dict[str, int] = {}
        for node in self.gm.graph.nodes:
            if node.op != "call_module":
                continue
            module = self.gm.get_submodule(node.target)
            stepping = stepping_of(module)
            if stepping is None:
                inside = [path for path, m in module.named_modules() if is_stepping(m)]
                if inside:
                    raise RollUpError(
                        f"{node.target}.{inside[0]}: {node.target} ({type(module).__name__}) runs its own code (it "
                        "has hooks, or cannot be traced), in which its neurons cannot be told from step to step"
                    )
                continue
            lifted = bool(node.meta.get("mfpsn_lifted"))
            states = self._state_arguments(node, stepping)
            before = self._before(node, stepping, states)
            if before is None and not stepping.states and not stepping.sequence and node.target in own:
                before = own[node.target]
            if before is None:
                before = len(chains)
                chains.append(Chain(node.target, stepping, lifted=lifted))
                if not stepping.states:
                    own[node.target] = before
            chain = chains[before]
            self.called[node] = (before, None if chain.sequence else len(chain.calls))
            chain.calls.append(node)
        lengths = {len(c.calls): c for c in chains if not c.sequence}
        if len(lengths) > 1:
            listed = ", ".join(f"{chain.path!r} {count}" for count, chain in sorted(lengths.items()))
            raise RollUpError(
                f"neurons run for different numbers of steps ({listed}): give each place its own neuron, and each "
                "neuron one call a step"
            )
        if 1 in lengths and not self.one_step:
            raise RollUpError(
                f"{lengths[1].path}: every call starts from the initial state, so nothing runs through time: hand each "
                "step's state to the next, and use an example of at least two steps"
            )
        if lengths:
            self.slices.steps = None if self.one_step else next(iter(lengths))
        self.slices.dropped = tuple(n.target for n in self.gm.graph.nodes if n in self.fed_back)
        for node in self.fed_back:
            for user in node.users:
                if user.target is not operator.getitem and (user not in self.called or user.args[:1] == (node,)):
                    raise RollUpError(
                        f"the argument {node.target!r} carries a state in, and is used by {user.name} too, which is "
                        "not its neuron"
                    )

    def _state_arguments(self, node: fx.Node, stepping: Stepping) -> list:
        given = [*node.args[1:], *[None] * len(stepping.states)]
        states = given[: len(stepping.states)]
        for position, name in enumerate(stepping.states):
            if name in node.kwargs:
                states[position] = node.kwargs[name]
        return states

    def _before(self, node: fx.Node, stepping: Stepping, states: list) -> int | None:
        """The chain that a call goes on; None if it begins one."""
        found: set[fx.Node] = set()
        fresh = 0
        for name, state in zip(stepping.states, states, strict=False):
            if self._is_initial(state):
                fresh += 1
                continue
            call = _taken_from(state, stepping.position(name))
            if call is None or call not in self.called or call.target != node.target:
                raise RollUpError(
                    f"{node.target}: its state {name!r} is not handed on from its own last step untouched, but comes "
                    f"from {_described(state)}: what changes a state between steps is no filter of the input"
                )
            found.add(call)
        if not found:
            return None
        if fresh or len(found) > 1 or not self._is_last(next(iter(found))):
            raise RollUpError(f"{node.target}: its states come from different steps")
        return self.called[next(iter(found))][0]

    def _is_last(self, call: fx.Node) -> bool:
        chain = self.slices.chains[self.called[call][0]]
        return chain.calls[-1] is call

    def _is_initial(self, state: object) -> bool:
        if state is None:
            return True
        if not isinstance(state, fx.Node):
            return False
        if state.op == "placeholder":
            self.fed_back.add(state)
            return True
        if state.op == "get_attr":
            if not state.meta.get("mfpsn_zero", False):
                raise RollUpError(f"{state.target}: a state that starts from other values than zeros is not taken over")
            return True
        if state.op in ("call_function", "call_method") and state.target in _MAKES_ZEROS:
            return True
        source = state
        while source.op == "call_function" and source.target is operator.getitem:
            source = source.args[0]  # a list of states, given from outside
        if source.op == "placeholder" and source is not state and self.one_step:
            self.fed_back.add(source)
            return True
        return False

    # -- values

    def _key(self, part: object) -> object:
        if isinstance(part, (tuple, list)):
            return (type(part).__name__, *map(self._key, part))
        if isinstance(part, dict):
            return ("dict", *((k, self._key(v)) for k, v in sorted(part.items())))
        if isinstance(part, slice):
            return ("slice", *map(self._key, (part.start, part.stop, part.step)))
        if isinstance(part, Ref):
            return part
        return (type(part).__name__, repr(part))  # 1, 1.0 and True are three constants

    def _intern(
        self, op: str, target: object, args: tuple = (), kwargs: dict | None = None, *, timed: bool, name: str = "",
        extra: object = None,
    ) -> int:  # fmt: skip
        kwargs = kwargs or {}
        key = (op, target if op != "get_attr" else self._constant(target), self._key(args), self._key(kwargs), extra)
        if key not in self.known:
            self.known[key] = len(self.slices.exprs)
            self.slices.exprs.append(Expr(op, target, args, kwargs, timed, name))
        return self.known[key]

    def _constant(self, path: str) -> object:
        """A parameter or buffer by its path; a constant that tracing made by its contents, not its name."""
        owner, _, name = path.rpartition(".")
        value = getattr(self.gm.get_submodule(owner), name)
        if not isinstance(value, Tensor) or not name.startswith("_tensor_constant"):
            return path
        return (value.dtype, tuple(value.shape), value.detach().cpu().contiguous().view(-1).tolist().__repr__())

    def _whole(self, value: object) -> object:
        """``value`` as an argument of something that is the same for all steps."""
        if isinstance(value, _Whole):
            return Ref(value.index)
        if isinstance(value, _Slice):
            if self.one_step:
                return Ref(self._intern("sequence", None, (Ref(value.index),), timed=False))
            return Ref(self._intern("select", None, (Ref(value.index), value.step), timed=False))
        if isinstance(value, _Sum):
            if value.count == self.slices.steps:
                whole = Ref(self._intern("sequence", None, (Ref(value.index),), timed=False))
                total = Ref(self._intern("call_method", "sum", (whole, 0), timed=False, name="sum"))
            else:  # the value may not be there at later steps
                total = self._whole(_Slice(value.index, 0))
                for step in range(1, value.count):
                    terms = (total, self._whole(_Slice(value.index, step)))
                    total = Ref(self._intern("call_function", operator.add, terms, timed=False, name="add"))
            if value.start is None:
                return total
            return Ref(self._intern("call_function", operator.add, (Ref(value.start), total), timed=False, name="add"))
        if isinstance(value, _Half):
            raise RollUpError(
                f"{value.name} is read before all its steps have been written into it: append to a list and "
                "torch.stack it"
            )
        if isinstance(value, (_Call, _State)):
            chain = self.slices.chains[value.chain]
            raise RollUpError(
                f"{chain.path}: its state is used by something else than its own next step, which no filter of the "
                "input does"
            )
        return value

    def _seen(self, index: int, step: int, node: fx.Node) -> _Slice:
        self.slices.exprs[index].at.setdefault(step, node)
        return _Slice(index, step)

    # -- the walk

    def read(self) -> Slices:
        self._count_static_draws()
        self._check_in_place()
        for node in self.gm.graph.nodes:
            if node.op == "output":
                for leaf in _leaves(node.args[0]):
                    if isinstance(leaf, fx.Node):
                        self.output_uses[leaf] = self.output_uses.get(leaf, 0) + 1
                self.slices.output = self._output(node.args[0])
            else:
                self.values[node] = self._read(node)
        return self.slices

    def _read(self, node: fx.Node) -> object:
        if node.op == "placeholder":
            index = self._intern("placeholder", node.target, node.args, timed=False, name=node.name)
            if self.one_step and node not in self.fed_back:
                whole = Ref(index)
                timed = self._intern("of_sequence", None, (whole, 0), timed=True, name=node.name)
                return self._seen(timed, 0, node)
            return self._first_seen(index, node)
        if node.op == "get_attr":
            if node.target in self.filled and not all(_is_filling(user) for user in node.users):
                return self._filled(node.target)
            return self._first_seen(self._intern("get_attr", node.target, timed=False, name=node.name), node)
        if node in self.called:
            return self._neuron(node)
        if _is_filling(node):
            return self._fill(node)
        if node.target is operator.getitem:
            taken = self._item(node)
            if taken is not None:
                return taken
        if node.op == "call_function" and node.target is getattr and isinstance(node.args[0], fx.Node):
            taken = self._state_attribute(node)
            if taken is not None:
                return taken
        if node.target in _ADDITIONS and len(node.args) == 2 and not node.kwargs:
            added = self._addition(node)
            if added is not None:
                return added
        if node.target in (torch.stack, torch.cat):
            joined = self._joined(node)
            if joined is not None:
                return joined
        if node.target in ("select", torch.select) and len(node.args) == 3:
            taken = self._slice_of(node, node.args[0], node.args[1], node.args[2])
            if taken is not None:
                return taken
        return self._plain(node)

    def _plain(self, node: fx.Node) -> object:
        met: list[object] = []

        def value(n: fx.Node) -> fx.Node:
            met.append(self.values[n])
            return n

        fx.map_arg((node.args, node.kwargs), value)
        steps = {v.step for v in met if isinstance(v, _Slice)}
        together = len(steps) == 1 and not any(isinstance(v, (_Sum, _Call, _State)) for v in met)
        random = is_random(self.gm, node)
        if together:
            step = next(iter(steps))
            args, kwargs = self._mapped(node, lambda n: Ref(self.values[n].index))
            extra = self._nth_draw(node, args, step) if random else None
            index = self._intern(node.op, node.target, args, kwargs, timed=True, name=node.name, extra=extra)
            return self._seen(index, step, node)
        args, kwargs = self._mapped(node, lambda n: self._whole(self.values[n]))
        if random and self.slices.steps and not steps:
            drawn = self._drawn_each_step(node, args, kwargs)
            if drawn is not None:
                return drawn
        extra = node.name if random else None
        return self._first_seen(
            self._intern(node.op, node.target, args, kwargs, timed=False, name=node.name, extra=extra), node
        )

    def _first_seen(self, index: int, node: fx.Node) -> _Whole:
        if self.slices.exprs[index].node is None:
            self.slices.exprs[index].node = node
        return _Whole(index)

    def _mapped(self, node: fx.Node, function) -> tuple[tuple, dict]:
        """Arguments with nodes replaced. (fx.map_arg would freeze what it maps into its own list types.)"""
        replace = lambda a: function(a) if isinstance(a, fx.Node) else a  # noqa: E731
        return map_aggregate(tuple(node.args), replace), map_aggregate(dict(node.kwargs), replace)

    def _nth_draw(self, node: fx.Node, args: tuple, step: int) -> int:
        """Two draws in one step are two values; the first of each step belong together."""
        key = (node.target, self._key(args), step)
        self.drawn[key] = self.drawn.get(key, -1) + 1
        return self.drawn[key]

    def _count_static_draws(self) -> None:
        """How often each random op on something constant is met: T times is once a step."""
        made: dict[tuple, int] = {}
        for node in self.gm.graph.nodes:
            args, kwargs = self._mapped(node, lambda n: Ref(self.draw_keys[n]))
            key = (node.op, node.target, self._key(args), self._key(kwargs))
            self.draw_keys[node] = made.setdefault(key, len(made))
            if is_random(self.gm, node):
                self.static_draws[made[key]] = self.static_draws.get(made[key], 0) + 1

    def _drawn_each_step(self, node: fx.Node, args: tuple, kwargs: dict) -> object | None:
        """A random op on the same input at every step (rate coding): the steps are the order of the draws."""
        key = self.draw_keys[node]
        if self.static_draws[key] == 1 or not node.all_input_nodes:
            return None
        if self.static_draws[key] != self.slices.steps:
            raise RollUpError(
                f"{node.name} draws from one input {self.static_draws[key]} times in {self.slices.steps} steps: "
                "draw once a step"
            )
        step = self._nth_draw(node, args, -1)
        repeated = lambda a: (  # noqa: E731
            Ref(self._intern("repeat", None, (a,), timed=True)) if isinstance(a, Ref) else a
        )
        args, kwargs = map_aggregate(args, repeated), map_aggregate(kwargs, repeated)
        index = self._intern(node.op, node.target, args, kwargs, timed=True, name=node.name, extra="drawn")
        return self._seen(index, step, node)

    def _fill(self, node: fx.Node) -> None:
        """``out[t] = …`` into a tensor made before the loop: by the last step it is the steps, stacked."""
        tensor, index, value = node.args
        value = self.values.get(value) if isinstance(value, fx.Node) else None
        parts = list(index) if isinstance(index, tuple) else [index]
        steps = [i for i in parts if isinstance(i, int)]
        dim = next((d for d, i in enumerate(parts) if isinstance(i, int)), 0)
        before = self.filled.setdefault(tensor.name if tensor.op != "get_attr" else tensor.target, [])
        if (
            not (tensor.op == "get_attr" or tensor.target in _MAKES_ZEROS)
            or not isinstance(value, _Slice)
            or len(steps) != 1
            or any(i != slice(None) for i in parts if not isinstance(i, int))
            or steps[0] != len(before)
            or value.step != steps[0]
            or any((other.index, at) != (value.index, dim) for other, at in before)
        ):
            raise RollUpError(
                f"{node.format_node()} writes into a tensor in another way than out[t] or out[:, t] = what belongs to "
                "step t; append to a list and torch.stack it"
            )
        before.append((value, dim))
        if tensor.op == "get_attr":  # of which each mention has a node of its own
            return
        written = len(before) == self.slices.steps == self.shown[tensor.name].shape[dim]
        self.values[tensor] = self._steps_along(before[0][0].index, dim) if written else _Half(tensor.name)

    def _filled(self, path: str) -> _Whole:
        done = self.filled[path]
        owner, _, name = path.rpartition(".")
        length = getattr(self.gm.get_submodule(owner), name).shape[done[0][1]]
        if len(done) != self.slices.steps or length != self.slices.steps:
            raise RollUpError(
                f"a tensor of length {length} is read when {len(done)} of {self.slices.steps} steps have been written "
                "into it: append to a list and torch.stack it"
            )
        return self._steps_along(done[0][0].index, done[0][1])

    def _steps_along(self, index: int, dim: int) -> _Whole:
        """All slices of a value, stacked along ``dim``."""
        whole = Ref(self._intern("sequence", None, (Ref(index),), timed=False))
        if dim != 0:
            whole = Ref(self._intern("call_function", torch.movedim, (whole, 0, dim), timed=False, name="movedim"))
        return _Whole(whole.index)

    def _check_in_place(self) -> None:
        """A tensor from before the loop that is changed in place and met again would be met unchanged."""
        for node in self.gm.graph.nodes:
            name = node.target if node.op == "call_method" else ""
            if not name.endswith("_") or name.endswith("__") or node.args[0].op != "get_attr":
                continue
            met = [n for n in self.gm.graph.nodes if n.op == "get_attr" and n.target == node.args[0].target]
            if len(met) > 1:
                raise RollUpError(
                    f"{node.args[0].target} is changed in place ({name}) and used again: assign the result, x = x + …"
                )

    def _slice_of(self, node: fx.Node, source: fx.Node, dim: int, step: int) -> object | None:
        """``source`` at position ``step`` of ``dim``, if that dim can be time; None if it cannot."""
        value, shown = self.values[source], self.shown.get(source.name)
        if not isinstance(value, _Whole) or not isinstance(shown, Tensor) or self.slices.steps is None:
            return None
        if all(self.slices.exprs[i].op != "placeholder" for i in self._ancestors(value.index)):
            return None  # a row of a parameter, whatever the number of rows
        dim = dim + shown.ndim if dim < 0 else dim
        step = step + shown.shape[dim] if step < 0 else step
        if not step < self.slices.steps <= shown.shape[dim]:
            return None
        index = self._intern("of_sequence", None, (Ref(value.index), dim), timed=True, name=node.name)
        return self._seen(index, step, node)

    def _item(self, node: fx.Node) -> object | None:
        source, item = self.values[node.args[0]], node.args[1]
        if isinstance(source, _Call):
            return self._result(source, item, node)
        if not isinstance(source, _Whole):
            return None
        if isinstance(item, int):
            unbound = self.slices.exprs[source.index]
            if unbound.target in ("unbind", torch.unbind) and unbound.node is not None:
                dim = (*unbound.args[1:], *unbound.kwargs.values(), 0)[0]
                return self._slice_of(node, unbound.node.args[0], dim, item)
            return self._slice_of(node, node.args[0], 0, item)
        shown = self.shown.get(node.args[0].name)
        if not isinstance(item, tuple) or not isinstance(shown, Tensor):
            return None
        given = sum(i is not Ellipsis for i in item)
        item = [
            part
            for i in item
            for part in ([slice(None)] * (shown.ndim - given) if i is Ellipsis else [i])
        ]  # fmt: skip
        ints = [position for position, i in enumerate(item) if isinstance(i, int)]
        if len(ints) != 1 or any(i != slice(None) for i in item if not isinstance(i, int)):
            return None
        return self._slice_of(node, node.args[0], ints[0], item[ints[0]])

    def _result(self, call: _Call, position: object, node: fx.Node) -> object:
        chain = self.slices.chains[call.chain]
        outputs = chain.stepping.outputs
        if not isinstance(position, int) or not -len(outputs) <= position < len(outputs):
            raise RollUpError(f"{chain.path}: it returns {', '.join(outputs)}, but item {position!r} of that is used")
        return self._output_of(call, outputs[position], position % len(outputs), node)

    def _output_of(self, call: _Call, name: str, position: int, node: fx.Node) -> object:
        if name not in ("spikes", "membrane"):
            return _State(call.chain, call.step, position)
        chain = self.slices.chains[call.chain]
        whole = call.step is None
        if chain.input is None:
            raise RollUpError(f"{chain.path}: it is used before it is called")
        index = self._intern("neuron", chain.path, (Ref(chain.input), name, call.chain), timed=not whole)
        return _Whole(index) if whole else self._seen(index, call.step, node)

    def _state_attribute(self, node: fx.Node) -> object | None:
        state = self.values[node.args[0]]
        if not isinstance(state, _State):
            return None
        stepping = self.slices.chains[state.chain].stepping
        if stepping.membrane_of is None or node.args[1] != stepping.membrane_of:
            return None
        return self._output_of(_Call(state.chain, state.step), "membrane", state.position, node)

    def _neuron(self, node: fx.Node) -> object:
        number, step = self.called[node]
        chain = self.slices.chains[number]
        argument = node.args[0] if node.args else next(iter(node.kwargs.values()))
        value = self.values[argument]
        if isinstance(value, (_Call, _State)):
            raise RollUpError(
                f"{chain.path}: it is fed all that {self.slices.chains[value.chain].path!r} returns, but needs its "
                "spikes alone"
            )
        if chain.sequence:
            if not isinstance(value, _Whole):
                raise RollUpError(f"{chain.path}: it runs over sequences, but is called step by step")
            chain.input = value.index
        else:
            self._feed(chain, value, step, node)
        call = _Call(number, step)
        outputs = chain.stepping.outputs
        return self._output_of(call, outputs[0], 0, node) if len(outputs) == 1 else call

    def _feed(self, chain: Chain, value: object, step: int, node: fx.Node) -> None:
        if isinstance(value, _Whole):
            same = self._intern("repeat", None, (Ref(value.index),), timed=True)
            # a constant input is a timed value too, unless it was made of single steps
            if self._depends_on_steps(value.index):
                raise RollUpError(self._mixed(chain, value.index, step))
            value = _Slice(same, step)
        if not isinstance(value, _Slice):
            raise RollUpError(
                f"{chain.path}: at step {step} it is fed a sum over steps, which is not there when all run at once"
            )
        if value.step != step and not self.one_step:
            raise RollUpError(
                f"{chain.path}: at step {step} it is fed what belongs to step {value.step}"
                + ("" if not self._has_neuron(value.index) else ", fed back from a neuron")
            )
        if chain.input is None:
            chain.input = value.index
        elif chain.input != value.index:
            raise RollUpError(
                f"{chain.path}: step {step} is not like step 0: {self._difference(chain.input, value.index)}"
            )

    def _depends_on_steps(self, index: int) -> bool:
        return any(self.slices.exprs[i].op == "select" for i in self._ancestors(index))

    def _has_neuron(self, index: int) -> bool:
        return any(self.slices.exprs[i].op == "neuron" for i in self._ancestors(index))

    def _ancestors(self, index: int) -> Iterator[int]:
        seen, stack = set(), [index]
        while stack:
            at = stack.pop()
            if at in seen:
                continue
            seen.add(at)
            yield at
            stack.extend(references(self.slices.exprs[at]))

    def _mixed(self, chain: Chain, index: int, step: int) -> str:
        sources = sorted(
            {
                self.slices.exprs[ref].target
                for i in self._ancestors(index)
                if self.slices.exprs[i].op == "select"
                for ref in references(self.slices.exprs[i])
                if self.slices.exprs[ref].op == "neuron"
            }
        )
        what = f"what {', '.join(map(repr, sources))} put out at another step" if sources else "more than one step"
        return (
            f"{chain.path}: at step {step} its input depends on {what}: a connection back in time cannot run for all "
            "steps at once"
        )

    def _difference(self, one: int, other: int) -> str:
        """Where two expressions first part, in words."""
        a, b = self.slices.exprs[one], self.slices.exprs[other]
        if (a.op, a.target if a.op != "get_attr" else self._constant(a.target)) != (
            b.op,
            b.target if b.op != "get_attr" else self._constant(b.target),
        ):
            return f"{_spoken(b)} stands where {_spoken(a)} was"
        ours, theirs = list(_leaves((a.args, a.kwargs))), list(_leaves((b.args, b.kwargs)))
        if len(ours) != len(theirs):
            return f"{_spoken(b)} has {len(theirs)} arguments where it had {len(ours)}"
        for mine, yours in zip(ours, theirs, strict=True):
            if isinstance(mine, Ref) and isinstance(yours, Ref):
                if mine != yours:
                    return self._difference(mine.index, yours.index)
            elif self._key(mine) != self._key(yours):
                return f"{_spoken(b)} has {yours!r} where it had {mine!r}"
        return f"{_spoken(b)} differs"

    def _addition(self, node: fx.Node) -> object | None:
        values = [self.values[a] if isinstance(a, fx.Node) else a for a in node.args]
        for left, right in (values, values[::-1]):
            if isinstance(left, _Sum) and isinstance(right, _Slice) and right.index == left.index:
                if right.step == left.count:
                    return _Sum(left.index, left.count + 1, left.start)
            elif isinstance(left, (int, float)) and not isinstance(left, bool) and left == 0:
                if isinstance(right, _Slice) and right.step == 0 and not self.one_step:
                    return right
            elif isinstance(left, _Slice) and isinstance(right, _Slice) and (left.step, right.step) == (0, 1):
                if left.index == right.index:
                    if node.target in (operator.iadd, "add_") and len(node.args[0].users) > 1:
                        return None
                    return _Sum(right.index, 2, None)
                first = self.slices.exprs[left.index]
                if first.target in _ADDITIONS and Ref(right.index) in first.args and len(first.args) == 2:
                    start = next((a for a in first.args if a != Ref(right.index)), None)
                    if isinstance(start, Ref) and not self.slices.exprs[start.index].timed:
                        return _Sum(right.index, 2, start.index)
        return None

    def _joined(self, node: fx.Node) -> object | None:
        """stack and cat of all slices of one value, in order, are that value itself."""
        parts = node.args[0]
        if not isinstance(parts, (list, tuple)) or not all(isinstance(p, fx.Node) for p in parts):
            return None
        values = [self.values[p] for p in parts]
        if self.one_step or len(values) != self.slices.steps or not all(isinstance(v, _Slice) for v in values):
            return None
        if [v.step for v in values] != list(range(len(values))) or len({v.index for v in values}) > 1:
            return None
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", node.kwargs.get("axis", 0))
        if not isinstance(dim, int):
            return None
        index, target = values[0].index, node.target
        lengthened = self.slices.exprs[index]
        lengthens = lengthened.target in ("unsqueeze", torch.unsqueeze) and lengthened.args[1:] == (0,)
        if target is torch.cat and dim == 0 and lengthens:  # cat of x.unsqueeze(0) is stack of x
            index, target = lengthened.args[0].index, torch.stack
        whole = Ref(self._intern("sequence", None, (Ref(index),), timed=False))
        if target is torch.stack:
            return self._steps_along(index, dim)
        if dim < 0:
            return None
        moved = whole
        if dim:
            moved = Ref(self._intern("call_function", torch.movedim, (whole, 0, dim), timed=False, name="movedim"))
        return _Whole(self._intern("call_method", "flatten", (moved, dim, dim + 1), timed=False, name="flatten"))

    def _output(self, structure: object) -> object:
        if isinstance(structure, fx.Node):
            return self._returned(structure)
        if isinstance(structure, dict):
            return {key: self._output(value) for key, value in structure.items()}
        if isinstance(structure, tuple) and hasattr(structure, "_fields"):
            return tuple(self._output(v) for v in structure)
        if isinstance(structure, (tuple, list)):
            return type(structure)(self._output(v) for v in structure) if type(structure) in (tuple, list) else [
                self._output(v) for v in structure
            ]  # fmt: skip
        return structure

    def _returned(self, node: fx.Node) -> object:
        value = self.values[node]
        if isinstance(value, _State):
            return None
        if isinstance(value, _Call):  # a tuple, as it came
            chain = self.slices.chains[value.chain]
            return tuple(
                self._returned_output(value, name, position, node)
                for position, name in enumerate(chain.stepping.outputs)
            )  # fmt: skip
        self.returned[node] = self.returned.get(node, 0) + 1
        again = self.returned[node] < self.output_uses.get(node, 1)  # of several places the last is the state's
        if self.one_step and isinstance(value, _Slice) and not again and self._is_handed_on(value):
            return None
        return self._whole(value)

    def _returned_output(self, call: _Call, name: str, position: int, node: fx.Node) -> object:
        value = self._output_of(call, name, position, node)
        if isinstance(value, _State) or (self.one_step and isinstance(value, _Slice) and self._is_handed_on(value)):
            return None
        return self._whole(value)

    def _is_handed_on(self, value: _Slice) -> bool:
        """Whether a one-step network returns it only to be given it again: a membrane that is no readout."""
        expr = self.slices.exprs[value.index]
        if expr.op != "neuron" or expr.args[1] != "membrane":
            return False
        chain = self.slices.chains[expr.args[2]]
        stepping = chain.stepping
        position = stepping.outputs.index("spikes") if "spikes" in stepping.outputs else None
        spikes = [u for call in chain.calls for u in call.users if u.target is operator.getitem]
        fires = any(u.users for u in spikes if u.args[1] == position) or any(
            u.op == "output" for call in chain.calls for u in call.users
        )
        if not fires:  # nobody looks at its spikes: the membrane is what it is for
            return False
        return bool(stepping.states) and not (stepping.reads_out or stepping.outputs[0] == "membrane")


def _is_filling(node: fx.Node) -> bool:
    return node.op == "call_method" and node.target == "__setitem__"


def references(expr: Expr) -> list[int]:
    """The expressions that it reads."""
    return [leaf.index for leaf in _leaves((expr.args, expr.kwargs)) if isinstance(leaf, Ref)]


def _leaves(structure: object) -> Iterator[object]:
    if isinstance(structure, (tuple, list)):
        for part in structure:
            yield from _leaves(part)
    elif isinstance(structure, dict):
        for part in structure.values():
            yield from _leaves(part)
    else:
        yield structure


def _taken_from(state: object, position: int) -> fx.Node | None:
    """The call whose result's item ``position`` is ``state``."""
    if not isinstance(state, fx.Node) or state.target is not operator.getitem:
        return None
    call, item = state.args
    return call if item == position and isinstance(call, fx.Node) else None


def _described(state: object) -> str:
    if not isinstance(state, fx.Node):
        return repr(state)
    return state.format_node() if state.op in ("get_attr", "placeholder") else f"{state.name} ({state.target})"


def _spoken(expr: Expr) -> str:
    if expr.op in ("call_module", "neuron"):
        return f"layer {expr.target!r}"
    if expr.op in ("of_sequence", "repeat", "sequence", "select"):
        return {"of_sequence": "a step of the input", "repeat": "the same value at every step"}.get(
            expr.op, "another step's value"
        )
    if expr.op in ("placeholder", "get_attr"):
        return f"{expr.target!r}"
    return f"{getattr(expr.target, '__name__', expr.target)}(...)"
