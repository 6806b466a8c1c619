"""What runs for all steps at once, what is left at single steps, and what can be neither."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, fx, nn

from mfpsn_fx.model.capturing.steps import BATCH_LAYERS, has_batch_statistics
from mfpsn_fx.model.neuron import MulFreePSN
from mfpsn_fx.model.sources.description import is_source, looks_like_a_neuron

from .chains import input_of
from .errors import RollUpError
from .fused_axis import FusedAxis
from .value_numbering import ValueNumbering
from .values import Feed, Fixed, Group, Output, TimeSlice, Value

__all__ = ["Legality", "carries_batch"]


def carries_batch(numbering: ValueNumbering, number: int) -> bool:
    """Return True if a value that belongs to no single step comes from the input, batch and all."""
    group = numbering.groups[number]
    value = numbering.recorded.get(group.node.name)
    return group.from_input and isinstance(value, Tensor) and value.ndim > 0


class Legality:
    """Decides, from what is returned, what has to be computed, and what of it runs for all steps at once.

    What a neuron is fed has to run at once: on T·N samples a layer must give what it gives step by step. What is only
    read out may as well run step by step: so does what mixes samples, what is read at a single step, and what sees no
    evenly spaced steps.

    Args:
        numbering: of the unrolled graph.
        feeds: what its chains are fed.
        returned: the values that are returned.
        accept_batch_statistics: let batch norms see T·N samples.

    Attributes:
        needed: nodes that have to be computed; one for each value.
        at_once: by the number of a group, the indices at which it runs at once.
        outputs: what of its neurons is needed.

    Raises:
        RollUpError: what a neuron is fed cannot run at once, or a neuron cannot run over time.
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
            if call in self.needed and feeds[chain].stride  # else it is fed one value at all steps
        )
        self.at_once: dict[int, range] = {}
        self._fused = FusedAxis(numbering)
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
        """Everything that ``nodes`` are made of, each value once."""
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
            if node in calls:  # not the state: that is its chain's own
                stack.append(input_of(node))
                number = calls[node][0]
                if number not in whole:
                    whole.add(number)
                    stack.extend(self.numbering.chains.chains[number].calls)
            else:
                stack.extend(node.all_input_nodes)
        return reached

    def _feeds(self, group: Group) -> bool:
        """Whether it has to run at once: it feeds a neuron, or there is but one step to be seen."""
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
        """A membrane is a readout: nothing that it reaches feeds a neuron, unless it never resets."""
        chains = self.numbering.chains.chains
        membrane = self.numbering.groups[self.feeds[output.chain].number].membrane
        if membrane is not None:
            raise RollUpError(
                f"{chains[membrane].path}: its membrane feeds {chains[output.chain].path!r}, but with its reset gone "
                "that membrane is another one; a membrane may be read out, or come from a neuron without reset"
            )

    def _check_channels(self, output: Output) -> None:
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
                    f"{chain.path}: its {name} of shape {tuple(value.shape)} meets dim {places[-1] % len(shape)} of "
                    f"its input {shape}, but channels are dim 1: give it as {(shape[1], *[1] * (len(shape) - 2))}"
                )

    def _check_memory(self, group: Group) -> None:
        """No layer on the fused axis may remember: its steps would be other samples."""
        for path, module in self.gm.get_submodule(group.node.target).named_modules():
            layer = ".".join(filter(None, (group.node.target, path)))
            if isinstance(module, MulFreePSN) or (isinstance(module, nn.RNNBase) and self._feeds(group)):
                raise RollUpError(f"{layer}: a {type(module).__name__} in a loop over steps already runs over time")
            if is_source(module) or looks_like_a_neuron(module):
                raise RollUpError(
                    f"{layer}: how a {type(module).__name__} is stepped is not known: tell with "
                    "mfpsn_fx.model.register_stepping"
                )

    # -- layers

    def _check_batch_statistics(self, indices: Mapping[int, list[int]]) -> None:
        if self.accept:
            return
        found = list(self.gm.graph.output_node().meta.get(BATCH_LAYERS, ()))
        for number in sorted(indices):
            group = self.numbering.groups[number]
            often = group.count > max(1, len(group.at))  # of several calls one is left
            if often or (group.at and self._feeds(group)):
                found += self._with_batch_statistics(group, indices[number])
        if found:
            raise RollUpError(
                f"{', '.join(dict.fromkeys(found))}: normalized with the statistics of one step's batch of N, and "
                "would be with those of all T·N samples; pass accept=('batch_statistics',) to convert if that is meant"
            )

    def _with_batch_statistics(self, group: Group, indices: list[int]) -> list[str]:
        """The layers of a group that, in training, normalize with the statistics of what they see."""
        if group.node.op != "call_module":
            return []
        modules = dict(self.gm.get_submodule(group.node.target).named_modules())
        found = [
            ".".join(filter(None, (group.node.target, path))) for path, m in modules.items() if has_batch_statistics(m)
        ]
        own = any(not type(m).__module__.startswith("torch.nn.") for m in modules.values())  # those are known
        if own and indices and self._fused.mixes_in_training(group.node):
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
        if not feeds and self._remembers(group.node):
            return
        reason = self._fused.differs(group.node)
        if reason is None:
            self.at_once[number] = steps
        elif feeds:
            raise RollUpError(reason)

    def _arguments_at_once(self, group: Group, steps: range) -> bool:
        """Whether all that a group reads at these steps runs at once."""
        read = (self.numbering.values[node] for node in group.at[steps[0]].all_input_nodes)
        offsets = {(value.number, value.index - steps[0]) for value in read if value.index is not None}
        return all(step + offset in self.at_once.get(number, ()) for number, offset in offsets for step in steps)

    def _remembers(self, node: fx.Node) -> bool:
        return node.op == "call_module" and any(
            isinstance(m, nn.RNNBase) for m in self.gm.get_submodule(node.target).modules()
        )


def _evenly(indices: list[int]) -> range | None:
    """The indices as a range, if they are evenly spaced."""
    if not indices:
        return None
    stride = indices[1] - indices[0] if len(indices) > 1 else 1
    steps = range(indices[0], indices[-1] + 1, stride)
    return steps if list(steps) == indices else None
