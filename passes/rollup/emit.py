"""Emit the rolled-up graph: one node for what runs for all steps at once, and every other node as it was."""

from __future__ import annotations

import logging
import operator

import torch
from torch import Tensor, fx, nn

from mfpsn_fx.model.capturing.over_time import OverTime
from mfpsn_fx.model.capturing.shared_mask import SharedMask
from mfpsn_fx.model.integrator import LeakyIntegrator
from mfpsn_fx.model.sources.description import NotAFilterError
from mfpsn_fx.model.time_axis import expect_steps, fold_time, repeat_in_time, unfold_time, with_item

from ..errors import RollUpError
from .flattened_axis import without_batch
from .legality import Legality, carries_batch
from .value_numbering import ValueNumbering
from .values import Drawn, Fixed, Group, Output, TimeSlice, Value

__all__ = ["WITHOUT_RESET", "emit"]

_log = logging.getLogger("mfpsn_fx")

WITHOUT_RESET = "without_reset"  # node.meta: a membrane is read out without the reset of its source
_WRAPPED = (expect_steps, fold_time, repeat_in_time, unfold_time, with_item)


def emit(numbering: ValueNumbering, legality: Legality, outputs: object) -> fx.GraphModule:
    """Return the rolled-up graph module.

    A group that runs at once is emitted at the place of its first node, on the flattened T·N axis; a neuron over all of
    T; every other node as it is, reading step t of a sequence s as ``s[t]``. For the peepholes, ``node.meta["val"]`` is
    the node's value on the example, and ``node.meta["steps"]`` the length of a sequence.
    """
    return _Emitter(numbering, legality).emit(outputs)


class _Emitter:
    def __init__(self, numbering: ValueNumbering, legality: Legality) -> None:
        self.gm, self.numbering, self.legality = numbering.gm, numbering, legality
        self.groups, self.recorded, self.chains = numbering.groups, numbering.recorded, numbering.chains
        self.graph = fx.Graph()
        self.modules: dict[str, object] = {}  # modules and attributes that the graph uses, by path
        self.without_reset: list[str] = []
        self.single: dict[fx.Node, fx.Node] = {}  # by node of the unrolled graph: those emitted as they are
        self.sequences: dict[int, fx.Node] = {}  # (T, N, *), by the number of the group that runs at once
        self.flattened: dict[int, fx.Node] = {}  # (T·N, *)
        self.shared_flattened: dict[tuple[int, object], fx.Node] = {}
        self.selected: dict[Value, fx.Node] = {}
        self.length: fx.Node | None = None  # T, where the unrolled graph is one step
        self.sliced = self._made_into_slices()

    def emit(self, outputs: object) -> fx.GraphModule:
        for node in self.gm.graph.nodes:  # inputs come first, needed or not
            if node.op == "placeholder" and node not in self.chains.carried:
                self.single[node] = self.graph.create_node("placeholder", node.target, node.args, {}, name=node.name)
                self.single[node].meta["val"] = self.recorded[node.name]
        for node in self.gm.graph.nodes:
            value = self.numbering.values.get(node)
            if node not in self.legality.needed or not isinstance(value, Value):
                continue
            if value.index is not None and value.index in self.legality.at_once.get(value.number, ()):
                self._at_once(value.number)
            elif node not in self.single:
                self._as_it_is(node, value)
        self.graph.output(self._returned(outputs))
        for node in self.graph.nodes:
            if node.op == "call_module" and node.target in self.without_reset:
                node.meta[WITHOUT_RESET] = True
            if node.target in _WRAPPED:
                node.meta["is_wrapped"] = True  # unpickling traces the generated code again: keep these as calls
        rolled = fx.GraphModule(self._root(), self.graph, type(self.gm).__name__)
        rolled.training = self.gm.training
        sources = dict(self.gm.named_modules())
        for path, child in rolled.named_modules():
            source = sources.get(path)
            if source is not None and source is not child and not isinstance(child, (OverTime, LeakyIntegrator)):
                child.training = source.training
        rolled.graph.lint()
        return rolled

    def _made_into_slices(self) -> set[fx.Node]:
        """Return the nodes that have a T axis: the sequences that are read step by step, and their inputs."""
        reached: set[fx.Node] = set()
        stack = [group.kind.source for group in self.groups if isinstance(group.kind, TimeSlice)]
        while stack:
            node = stack.pop()
            if node not in reached:
                reached.add(node)
                stack.extend(node.all_input_nodes)
        return reached

    # -- single values

    def _as_it_is(self, node: fx.Node, value: Value) -> None:
        group = self.groups[value.number]
        if isinstance(group.kind, Fixed):
            self.single[node] = self._select(group.kind.value)
            return
        if isinstance(group.kind, Output):  # of a neuron whose own call runs over the sequence
            self.single[node] = self._neuron(group.kind)
            self.single[node].meta["val"] = self.recorded.get(node.name)
            return
        args, kwargs = self._arguments(node, self._value)
        source = self.recorded.get(node.args[0].name) if node.args and isinstance(node.args[0], fx.Node) else None
        if value.index is not None or self._has_samples_first(node, group):
            args, kwargs = without_batch(node, args, kwargs, source)  # other inputs have another N than the example
        self.single[node] = self._create(node, args, kwargs)
        self.single[node].meta["val"] = self.recorded.get(node.name)

    def _has_samples_first(self, node: fx.Node, group: Group) -> bool:
        """Return True if a value is computed from an input (N, *) that all steps share, and has no T."""
        number = self.numbering.values[node].number
        return carries_batch(self.numbering, number) and not group.from_steps and node not in self.sliced

    def _value(self, node: fx.Node) -> fx.Node:
        return self._select(self.numbering.values[node])

    def _select(self, value: Value) -> fx.Node:
        """Return the node of a value that is the same for all steps, or of one step."""
        if value.index is None or value.index not in self.legality.at_once.get(value.number, ()):
            return self.single[self.numbering.member(value)]
        if value not in self.selected:
            position = self.legality.at_once[value.number].index(value.index)
            selected = self._call(operator.getitem, (self._sequence(value.number), position))
            selected.meta["val"] = self.recorded.get(self.numbering.member(value).name)
            self.selected[value] = selected
        return self.selected[value]

    # -- all steps at once

    def _at_once(self, number: int) -> None:
        group = self.groups[number]
        if number in self.sequences or number in self.flattened or isinstance(group.kind, (TimeSlice, Output)):
            return
        steps = self.legality.at_once[number]
        node = group.at[steps[0]]
        module = self.gm.get_submodule(node.target) if node.op == "call_module" else None
        if isinstance(module, SharedMask):
            (argument,) = node.all_input_nodes
            self._keep(node.target, module.dropout)
            self.sequences[number] = self.graph.call_module(node.target, (self._rows(argument, node, steps),))
            return
        repeats = isinstance(group.kind, Drawn)
        args, kwargs = self._arguments(node, lambda n: self._flattened_argument(n, node, steps, repeats))
        source = self.recorded.get(node.args[0].name) if node.args and isinstance(node.args[0], fx.Node) else None
        args, kwargs = without_batch(node, args, kwargs, source)
        self.flattened[number] = self._create(node, args, kwargs)

    def _flattened_argument(self, argument: fx.Node, node: fx.Node, steps: range, repeats: bool) -> fx.Node:
        """Return an argument of a layer on the flattened axis, (len(steps)·N, *)."""
        value = self.numbering.values[argument]
        if value.index is not None:
            if self._indices(argument, node, steps) != self.legality.at_once[value.number]:
                return self._call(fold_time, (self._rows(argument, node, steps),))
            if value.number not in self.flattened:
                self.flattened[value.number] = self._call(fold_time, (self._sequence(value.number),))
            return self.flattened[value.number]
        if not repeats and not carries_batch(self.numbering, value.number):
            return self.single[self.numbering.member(value)]
        key = (value.number, len(steps))
        if key not in self.shared_flattened:
            repeated = self._call(repeat_in_time, (self._select(value), self._length(steps)))
            self.shared_flattened[key] = self._call(fold_time, (repeated,))
        return self.shared_flattened[key]

    def _indices(self, argument: fx.Node, node: fx.Node, steps: range) -> range:
        """Return the indices at which ``argument`` is read if ``node`` runs at ``steps``."""
        offset = self.numbering.values[argument].index - self.numbering.values[node].index
        return range(steps.start + offset, steps.stop + offset, steps.step)

    def _rows(self, argument: fx.Node, node: fx.Node, steps: range) -> fx.Node:
        return self._steps_of(self.numbering.values[argument].number, self._indices(argument, node, steps))

    def _steps_of(self, number: int, indices: range) -> fx.Node:
        """Return some steps of a sequence, (len(indices), N, *), in this order."""
        sequence, steps = self._sequence(number), self.legality.at_once[number]
        if indices == steps:
            return sequence
        if indices.step < 0:
            return self._call(torch.flip, (self._steps_of(number, indices[::-1]), (0,)))
        positions = range(steps.index(indices[0]), steps.index(indices[-1]) + 1, max(1, indices.step // steps.step))
        return self._call(operator.getitem, (sequence, slice(positions.start, positions.stop, positions.step)))

    def _sequence(self, number: int) -> fx.Node:
        """Return the output of a group that runs at once, as (T, N, *)."""
        if number not in self.sequences:
            group = self.groups[number]
            if isinstance(group.kind, TimeSlice):
                made = self._time_first(number, group.kind)
            elif isinstance(group.kind, Output):
                made = self._neuron(group.kind)
            else:
                steps = self._length(self.legality.at_once[number])
                made = self._call(unfold_time, (self.flattened[number], steps))
            shown = self.recorded.get(group.node.name)
            if isinstance(shown, Tensor) and not self.chains.one_step:
                made.meta["steps"] = len(self.legality.at_once[number])
                made.meta["val"] = shown.expand(made.meta["steps"], *shown.shape)
            self.sequences[number] = made
        return self.sequences[number]

    def _length(self, steps: range) -> object:
        """Return T: a number where a loop was rolled up; a node that reads it from the input for a one-step graph."""
        if not self.chains.one_step:
            return len(steps)
        if self.length is None:
            number = next(i for i, group in enumerate(self.groups) if isinstance(group.kind, TimeSlice))
            self.length = self.graph.call_method("size", (self._sequence(number), 0))
        return self.length

    def _time_first(self, number: int, kind: TimeSlice) -> fx.Node:
        value = self.numbering.values[kind.source]
        if self.chains.one_step:
            return self.single[kind.source]
        source, steps = self._select(value), len(self.legality.at_once[number])
        if self.recorded[kind.source.name].shape[kind.dim] > steps:  # the loop runs over the first steps alone
            source = self._call(torch.narrow, (source, kind.dim, 0, steps))
        elif not self.groups[value.number].from_steps:
            source = self._call(expect_steps, (source, kind.dim, steps))
        return self._call(torch.movedim, (source, kind.dim, 0)) if kind.dim else source

    # -- neurons

    def _neuron(self, output: Output) -> fx.Node:
        chain = self.chains.chains[output.chain]
        module = self.gm.get_submodule(chain.path)
        uses = [i for i, c in enumerate(self.chains.chains) if c.path == chain.path]
        place = uses.index(output.chain)
        path = chain.path + (f"@{place + 1}" if place else "")  # each use is its own neuron
        if output.name == "spikes":
            self.modules[path] = OverTime(module)
        else:
            if Output(output.chain, "spikes") in self.legality.outputs:
                path += "_membrane"
            self.modules[path] = self._integrator(path, output.chain)
        name = path.replace(".", "_").replace("@", "_")
        return self.graph.create_node("call_module", path, (self._fed(output.chain),), {}, name=name)

    def _fed(self, number: int) -> fx.Node:
        feed, steps = self.legality.feeds[number], self.chains.steps
        if self.chains.chains[number].sequence:
            return self._select(Value(feed.number))
        if feed.start is None or (feed.stride == 0 and not self.chains.one_step):
            value = self._select(Value(feed.number, feed.start))
            return self._call(repeat_in_time, (value, self._length(range(steps or 1))))
        if self.chains.one_step:
            return self._sequence(feed.number)
        indices = range(feed.start, feed.start + feed.stride * steps, feed.stride)
        return self._steps_of(feed.number, indices)

    def _integrator(self, path: str, number: int) -> LeakyIntegrator:
        chain = self.chains.chains[number]
        module = self.gm.get_submodule(chain.path)
        try:
            integrator = chain.stepping.leaky_integrator(module)
        except NotAFilterError as error:
            raise RollUpError(f"{chain.path}: its membrane is read out, but cannot be run at once: {error}") from None
        place = next((t for t in [*module.parameters(), *module.buffers(), *self.gm.parameters()]), None)
        if not chain.stepping.reads_out:
            self.without_reset.append(path)
            _log.warning("%s: its membrane is read out without its reset", chain.path)
        return integrator.to(place.device if place is not None else None).train(module.training)

    # -- nodes and modules

    def _arguments(self, node: fx.Node, function) -> tuple[tuple, dict]:
        return fx.map_arg(tuple(node.args), function), fx.map_arg(dict(node.kwargs), function)

    def _call(self, target, args: tuple) -> fx.Node:
        return self.graph.call_function(target, args)

    def _keep(self, path: str, value: object) -> None:
        """Register the module or attribute that the graph uses at ``path``."""
        if self.modules.setdefault(path, value) is not value:
            raise RollUpError(
                f"{path}: it keeps one mask for all steps at once in one place, and for single steps in another: give "
                "each place its own"
            )

    def _create(self, node: fx.Node, args: tuple, kwargs: dict) -> fx.Node:
        if node.op == "call_module":
            self._keep(node.target, self.gm.get_submodule(node.target))
        elif node.op == "get_attr":
            owner, _, name = node.target.rpartition(".")
            value = getattr(self.gm.get_submodule(owner), name)
            path = node.target
            if any(owner == chain.path for chain in self.chains.chains):  # the neuron is replaced, its parameter stays
                path = path.replace(".", "_")
            self._keep(path, value)
            attribute = self.graph.get_attr(path)
            attribute.meta["zero"] = node.meta.get("zero", False)
            return attribute
        return self.graph.create_node(node.op, node.target, args, kwargs, name=node.name)

    def _returned(self, structure: object) -> object:
        if isinstance(structure, Value):
            if self.chains.one_step and structure.index is not None:
                return self._sequence(structure.number)
            return self._select(structure)
        if isinstance(structure, dict):
            return {key: self._returned(value) for key, value in structure.items()}
        if isinstance(structure, (tuple, list)):
            return type(structure)(map(self._returned, structure))
        return structure

    def _root(self) -> nn.Module:
        """Return a module that holds layers, neurons and constants at their paths in the source."""
        root = nn.Module()
        for path, value in self.modules.items():
            owner = root
            *outer, name = path.split(".")
            for part in outer:
                if part not in owner._modules:
                    owner.add_module(part, nn.Module())
                owner = owner._modules[part]
            if isinstance(value, nn.Module):
                owner.add_module(name, value)
            elif isinstance(value, nn.Parameter):
                owner.register_parameter(name, value)
            elif isinstance(value, Tensor):
                owner.register_buffer(name, value)
            else:
                setattr(owner, name, value)
        return root
