"""Decide what runs for all steps at once and what runs step by step; reject what can be neither."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, fx, nn

from mfpsn_fx.model.capturing.steps import BATCH_LAYERS, has_batch_statistics
from mfpsn_fx.model.neuron import MulFreePSN
from mfpsn_fx.model.sources.description import is_source, looks_like_a_neuron

from ..errors import RollUpError
from .chains import input_of
from .flattened_axis import FlattenedAxis
from .value_numbering import ValueNumbering
from .values import Feed, Fixed, Group, Output, TimeSlice, Value

__all__ = ["Legality", "carries_batch"]


def carries_batch(numbering: ValueNumbering, number: int) -> bool:
    """Return True if a value that belongs to no single step is computed from the input and has its batch dim."""
    group = numbering.groups[number]
    value = numbering.recorded.get(group.node.name)
    return group.from_input and isinstance(value, Tensor) and value.ndim > 0


class Legality:
    """Decides, from what is returned, which nodes have to be computed, and which of them run for all steps at once.

    Inputs of neurons have to be computed at once: a layer must give on T·N samples what it gives step by step. What is
    only read out may run step by step: layers that mix samples, and values that are read at a single step or at steps
    that are not evenly spaced.

    Args:
        numbering: of the unrolled graph.
        feeds: the inputs of its chains.
        returned: the values that are returned.
        accept_batch_statistics: let batch norms see T·N samples.

    Attributes:
        needed: nodes that have to be computed; one for each value.
        at_once: by the number of a group, the indices at which it runs at once.
        outputs: the outputs of neurons that are needed.

    Raises:
        RollUpError: the input of a neuron cannot be computed at once, or a neuron cannot run over time.
    """

    def __init__(
        self,
        numbering: ValueNumbering,
        feeds: Mapping[int, Feed],
        returned: Iterable[Value],
        accept_batch_statistics: bool,
    ) -> None:
        self.numbering, self.gm, self.accept = numbering, numbering.gm, accept_batch_statistics
        self.feeds = feeds
        returned = list(returned)
        self.needed = self._reached(map(numbering.member, returned))
        self._feeding = self._reached(
            input_of(call)
            for call, (chain, _) in numbering.chains.calls.items()
            if call in self.needed and feeds[chain].stride  # else its input is one value at all steps
        )
        self.at_once: dict[int, range] = {}
        self._flattened_axis = FlattenedAxis(numbering)
        values = [v for node in self.needed if isinstance(v := numbering.values[node], Value)]
        indices: dict[int, list[int]] = {}
        values += [g.kind.value for v in values if isinstance((g := numbering.groups[v.number]).kind, Fixed)]
        for value in dict.fromkeys([*returned, *values]):
            indices.setdefault(value.number, [])
            if value.index is not None:
                indices[value.number].append(value.index)
        kinds = (numbering.groups[number].kind for number in indices)
        self.outputs = {kind for kind in kinds if isinstance(kind, Output)}
        self._check_neurons(sorted(indices))
        self._check_batch_statistics(indices)
        for number in sorted(indices):
            if indices[number]:
                self._decide(number, sorted(indices[number]))

    def _reached(self, nodes: Iterable[fx.Node]) -> dict[fx.Node, None]:
        """Return everything that ``nodes`` are computed from, with ``nodes`` themselves, each value once."""
        values, calls = self.numbering.values, self.numbering.chains.calls
        reached: dict[fx.Node, None] = {}
        whole: set[int] = set()  # chains of which one call was reached, and so all
        stack = list(nodes)
        while stack:
            node = stack.pop()
            value = values[node]
            if isinstance(value, Value):
                node = self.numbering.member(value)
            if node in reached:
                continue
            reached[node] = None
            if node in calls:  # its state is internal to its chain
                stack.append(input_of(node))
                number = calls[node][0]
                if number not in whole:
                    whole.add(number)
                    stack.extend(self.numbering.chains.chains[number].calls)
            else:
                stack.extend(node.all_input_nodes)
        return reached

    def _feeds(self, group: Group) -> bool:
        """Return True if a group has to run at once: it feeds a neuron, or the graph is one step."""
        return (
            self.numbering.chains.one_step
            or group.node in self._feeding
            or any(node in self._feeding for node in group.at.values())
        )

    # -- neurons

    def _check_neurons(self, numbers: list[int]) -> None:
        for number in numbers:
            group = self.numbering.groups[number]
            if isinstance(group.kind, Output):
                self._check_fed_membrane(group.kind)
                self._check_channels(group.kind)
            elif group.node.op == "call_module" and group.at:
                self._check_memory(group)

    def _check_fed_membrane(self, output: Output) -> None:
        """Raise if a neuron's input depends on the membrane of a neuron that resets, which can only be read out."""
        chains = self.numbering.chains.chains
        membrane = self.numbering.groups[self.feeds[output.chain].number].membrane
        if membrane is not None:
            raise RollUpError(
                f"{chains[membrane].path}: its membrane feeds {chains[output.chain].path!r}, but without its reset "
                "that membrane is another one; a membrane may be read out, or come from a neuron without reset"
            )

    def _check_channels(self, output: Output) -> None:
        """Raise if a neuron's input has no channels, or its parameters are not along dim 1."""
        chain = self.numbering.chains.chains[output.chain]
        x = self.numbering.recorded[input_of(chain.calls[0]).name]
        if x.ndim < 2 + chain.sequence:
            raise RollUpError(
                f"{chain.path}: at one step its input has shape {tuple(x.shape)}, but batch and channels are needed: "
                "convert takes the whole sequence, (T, N, *)"
            )
        module = self.gm.get_submodule(chain.path)
        shape = tuple(x.shape[1:] if chain.sequence else x.shape)
        kept = {name: getattr(module, name, None) for name in ("alpha", "beta", "threshold")}
        fields = getattr(module, "p", None)  # Norse's parameters
        kept |= {name: getattr(fields, name) for name in getattr(fields, "_fields", ())}
        for name, value in kept.items():
            if not isinstance(value, Tensor) or value.numel() == 1 or value.ndim > len(shape):
                continue
            places = [dim - value.ndim for dim, size in enumerate(value.shape) if size > 1]
            if [place % len(shape) for place in places] != [1]:
                raise RollUpError(
                    f"{chain.path}: its {name} of shape {tuple(value.shape)} broadcasts along dim "
                    f"{places[-1] % len(shape)} of its input {shape}, but channels are dim 1: give it as "
                    f"{(shape[1], *[1] * (len(shape) - 2))}"
                )

    def _check_memory(self, group: Group) -> None:
        """Raise if a layer on the flattened axis keeps a state: its next step would be another sample."""
        for path, module in self.gm.get_submodule(group.node.target).named_modules():
            layer = ".".join(filter(None, (group.node.target, path)))
            if isinstance(module, MulFreePSN) or (isinstance(module, nn.RNNBase) and self._feeds(group)):
                raise RollUpError(f"{layer}: a {type(module).__name__} in a loop over steps already runs over time")
            if is_source(module) or looks_like_a_neuron(module):
                raise RollUpError(
                    f"{layer}: how a {type(module).__name__} is stepped is not known: register it with "
                    "mfpsn_fx.model.register_stepping"
                )

    # -- layers

    def _check_batch_statistics(self, indices: Mapping[int, list[int]]) -> None:
        if self.accept:
            return
        found = list(self.gm.graph.output_node().meta.get(BATCH_LAYERS, ()))
        for number in sorted(indices):
            group = self.numbering.groups[number]
            repeated = group.count > max(1, len(group.at))  # identical calls become one
            if repeated or (group.at and self._feeds(group)):
                found += self._with_batch_statistics(group, indices[number])
        if found:
            raise RollUpError(
                f"{', '.join(dict.fromkeys(found))}: normalized with the statistics of one step's batch of N, and "
                "would be with those of all T·N samples; pass accept=('batch_statistics',) to convert if that is meant"
            )

    def _with_batch_statistics(self, group: Group, indices: list[int]) -> list[str]:
        """Return the layers of a group that normalize with batch statistics in training."""
        if group.node.op != "call_module":
            return []
        modules = dict(self.gm.get_submodule(group.node.target).named_modules())
        found = [
            ".".join(filter(None, (group.node.target, path))) for path, m in modules.items() if has_batch_statistics(m)
        ]
        custom = any(not type(m).__module__.startswith("torch.nn.") for m in modules.values())
        if custom and indices and self._flattened_axis.mixes_in_training(group.node):
            found.append(group.node.target)
        return found

    def _decide(self, number: int, indices: list[int]) -> None:
        group = self.numbering.groups[number]
        feeds, all_steps = self._feeds(group), range(self.numbering.chains.steps or 1)
        if isinstance(group.kind, Output):
            self.at_once[number] = all_steps
            return
        if isinstance(group.kind, TimeSlice):
            if feeds or (len(indices) > 1 and indices[: len(all_steps)] == list(all_steps)):
                self.at_once[number] = range(indices[-1] + 1)
            return
        fed = [i for i in indices if group.at[i] in self._feeding]
        candidates = [steps for which in (indices, fed) if (steps := _evenly(which)) is not None]
        steps = next((steps for steps in candidates if self._arguments_at_once(group, steps)), None)
        if steps is None and feeds:
            raise RollUpError(f"{group.node.name} feeds a neuron, but cannot run at once at the steps {indices}")
        if steps is None or (len(steps) == 1 and not feeds):
            return
        if not feeds and not self.accept and self._with_batch_statistics(group, indices):
            return
        if not feeds and self._has_state(group.node):
            return
        reason = self._flattened_axis.differs(group.node)
        if reason is None:
            self.at_once[number] = steps
        elif feeds:
            raise RollUpError(reason)

    def _arguments_at_once(self, group: Group, steps: range) -> bool:
        """Return True if everything that a group reads at these steps runs at once."""
        read = (self.numbering.values[node] for node in group.at[steps[0]].all_input_nodes)
        offsets = {(value.number, value.index - steps[0]) for value in read if value.index is not None}
        return all(step + offset in self.at_once.get(number, ()) for number, offset in offsets for step in steps)

    def _has_state(self, node: fx.Node) -> bool:
        return node.op == "call_module" and any(
            isinstance(m, nn.RNNBase) for m in self.gm.get_submodule(node.target).modules()
        )


def _evenly(indices: list[int]) -> range | None:
    """Return the indices as a range, or None if they are not evenly spaced."""
    if not indices:
        return None
    stride = indices[1] - indices[0] if len(indices) > 1 else 1
    steps = range(indices[0], indices[-1] + 1, stride)
    return steps if list(steps) == indices else None
