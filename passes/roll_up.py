"""One graph over all of time in the place of a loop over steps."""

from __future__ import annotations

import logging
import operator
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate
from torch.utils._pytree import tree_leaves

from mfpsn_fx.model.capturing.capture import copied, preserved_rng
from mfpsn_fx.model.capturing.over_time import OverTime
from mfpsn_fx.model.capturing.shared_mask import SharedMask
from mfpsn_fx.model.capturing.steps import has_batch_statistics
from mfpsn_fx.model.integrator import LeakyIntegrator
from mfpsn_fx.model.neuron import MulFreePSN
from mfpsn_fx.model.sources.description import NotAFilterError, is_source, looks_like_a_neuron
from mfpsn_fx.model.sources.stepping import Stepping
from mfpsn_fx.model.time_axis import expect_steps, fold_time, repeat_in_time, unfold_time

from .base import Pass, Result
from .context import PassContext
from .fused_axis import FusedAxis, without_batch
from .time_slices import Expr, Ref, RollUpError, Slices, read_slices, references

__all__ = ["ACCEPTABLE", "RollUp", "check_accept"]

_log = logging.getLogger("mfpsn_fx")

ACCEPTABLE = ("batch_statistics",)
WITHOUT_RESET = "mfpsn_without_reset"  # gm.meta: paths of membranes that are read out without the reset they had


def check_accept(accept: Collection[str]) -> None:
    """``ValueError`` if something in ``accept`` is not of :data:`ACCEPTABLE`."""
    given = {accept} if isinstance(accept, str) else set(accept)
    if isinstance(accept, str) or given - set(ACCEPTABLE):
        unknown = ", ".join(map(repr, sorted(given)))
        raise ValueError(f"accept is a tuple of {', '.join(map(repr, ACCEPTABLE))}, found {unknown}")


class RollUp(Pass):
    """Fold an unrolled loop over time into one graph that takes the whole sequence (T, N, *) at once.

    Before, at T = 2::

        %getitem : call_function[target=operator.getitem](args = (%x, 0))
        %fc : call_module[target=fc](args = (%getitem,))
        %lif : call_module[target=lif](args = (%fc, %lif_mem))
        %getitem_1 : call_function[target=operator.getitem](args = (%lif, 0))
        %getitem_2 : call_function[target=operator.getitem](args = (%lif, 1))
        %getitem_3 : call_function[target=operator.getitem](args = (%x, 1))
        %fc_1 : call_module[target=fc](args = (%getitem_3,))
        %lif_1 : call_module[target=lif](args = (%fc_1, %getitem_2))
        %getitem_4 : call_function[target=operator.getitem](args = (%lif_1, 0))
        %stack : call_function[target=torch.stack](args = ([%getitem_1, %getitem_4],))

    After::

        %x_1 : call_function[target=expect_steps](args = (%x, 0, 2))
        %fold_time : call_function[target=fold_time](args = (%x_1,))
        %fc : call_module[target=fc](args = (%fold_time,))
        %unfold_time : call_function[target=unfold_time](args = (%fc, 2))
        %lif : call_module[target=lif](args = (%unfold_time,))

    Layers run on the fused T·N axis; each neuron (:class:`OverTime` until it is replaced) once over all of T; what
    is stacked, added up or averaged over steps is the same operation over the T axis. A membrane that is read out
    becomes a :class:`LeakyIntegrator`. Each layer is run both ways (:class:`FusedAxis`), and must agree.

    Args:
        args, kwargs: the example, whole.
        one_step: the graph is one step, not a loop; ``args`` are then sequences (T, N, *) of its inputs.
        accept: of :data:`ACCEPTABLE`: ``"batch_statistics"`` lets batch norms see T·N instead of N samples.

    Raises:
        RollUpError: steps differ, a state or membrane feeds something else than its own neuron or a readout, batch
            statistics would change, or a layer mixes the samples of a batch.
    """

    name = "roll_up"

    def __init__(
        self, args: tuple = (), kwargs: Mapping | None = None, *, one_step: bool = False, accept: Collection[str] = ()
    ) -> None:
        check_accept(accept)
        self.args, self.kwargs = tuple(args), dict(kwargs or {})
        self.one_step, self.accept = one_step, tuple(accept)

    def call(self, gm: fx.GraphModule, context: PassContext) -> Result:
        slices, recorded = read_slices(
            gm, self.one_step, lambda linked: _record(gm, linked, self.args, self.kwargs, self.one_step)
        )
        rolled = _Emitter(gm, slices, recorded, self.accept).emit()
        changes = [f"{c.path}: {len(c.calls)} calls -> 1" for c in slices.chains]
        changes += [f"{name}: state argument dropped" for name in slices.dropped]
        return Result(rolled, changes)


class _Recorder(fx.Interpreter):
    """Runs the unrolled graph and keeps what every node made; states that were not given start afresh."""

    def __init__(self, gm: fx.GraphModule, slices: Slices) -> None:
        super().__init__(gm)
        self.first = {chain.calls[0].name: chain for chain in slices.chains}
        self.made: dict[str, object] = {}

    def run_node(self, n: fx.Node) -> object:
        if n.name in self.first:
            x = n.args[0] if n.args else next(iter(n.kwargs.values()))
            chain = self.first[n.name]
            module = self.fetch_attr(n.target)
            value = self.map_nodes_to_values(x, n)
            if chain.sequence and not chain.stepping.sequence:
                result = _lifted(chain.stepping, module, value)
            else:
                result = chain.stepping.first(module, value)
        elif n.target is operator.getitem and self.env[n.args[0]] is None:  # a state, in a list of them not given
            result = None
        else:
            result = super().run_node(n)
        self.made[n.name] = result
        return result


def _lifted(stepping: Stepping, module: nn.Module, x: Tensor) -> object:
    """What Norse's Lift returns for a cell: its first output at all steps, stacked, and the last state."""
    results = [stepping.first(module, x[0])]
    for step in x[1:]:
        results.append(module(step, *stepping.next_states(results[-1])))
    if len(stepping.outputs) == 1:
        return torch.stack(results)
    return (torch.stack([result[0] for result in results]), *results[-1][1:])


def _record(gm: fx.GraphModule, slices: Slices, args: tuple, kwargs: dict, one_step: bool) -> dict[str, object]:
    """What each node makes of the example, by name; of its first step where the graph is one step."""
    given = [n for n in gm.graph.nodes if n.op == "placeholder"]
    values: dict[str, object] = dict(zip((n.target for n in given), args, strict=False)) | kwargs
    for name in slices.dropped:
        if any(isinstance(v, Tensor) and bool((v != 0).any()) for v in tree_leaves(values.pop(name, None))):
            raise RollUpError(
                f"the example's {name!r} carries a state in that is not zero; the converted network starts every "
                "sequence from rest: give zeros, or nothing"
            )
    shapes = [tuple(value.shape) for value in values.values() if isinstance(value, Tensor)]
    lengths = {shape[:1] for shape in shapes}
    if one_step and (len(lengths) != 1 or not shapes[0]):
        raise RollUpError(
            "the network sees one step a call, so the example is the sequences of its inputs, (T, N, *), of one "
            f"length T; found shapes {shapes}"
        )
    inputs = []
    for node in given:
        value = values.get(node.target, node.args[0] if node.args else None)
        if isinstance(value, Tensor):
            value = (value[0] if one_step else value).clone()
        inputs.append(value)
    recorder = _Recorder(copied(gm).eval(), slices)
    with torch.no_grad(), preserved_rng():
        try:
            recorder.run(*inputs)
        except Exception as error:
            what = f"an example of shape {', '.join(map(str, shapes))}"
            if one_step:
                what = f"one step of {what}; it sees one step a call, and convert takes the whole sequence, (T, N, *)"
            why = (str(error).splitlines() or [type(error).__name__])[0]
            raise RollUpError(f"the network does not run on {what}: {why}") from error
    return recorder.made


class _Emitter:
    def __init__(self, gm, slices: Slices, recorded: dict, accept: tuple[str, ...]) -> None:
        self.gm, self.slices, self.recorded = gm, slices, recorded
        self.accept = accept
        self.graph = fx.Graph()
        self.modules: dict[str, object] = {}
        self.without_reset: list[str] = []
        self.whole: dict[int, object] = {}  # a value that is the same for all steps, or a timed one as (T, N, *)
        self.folded: dict[int, object] = {}  # a timed one as (T·N, *)
        self.late: dict[tuple[int, int], fx.Node] = {}
        self.steps_node: object = slices.steps

    def emit(self) -> fx.GraphModule:
        self.needed = needed = self._needed()
        self._check(needed)
        for index, expr in enumerate(self.slices.exprs):  # placeholders come first, needed or not
            if expr.op == "placeholder" and expr.target not in self.slices.dropped:
                self.whole[index] = self.graph.create_node(
                    "placeholder", expr.target, expr.args, {}, name=expr.name
                )  # fmt: skip
        for index in sorted(needed):
            expr = self.slices.exprs[index]
            if expr.op != "placeholder":
                self._emit(index, expr)
        self.graph.output(self._output(self.slices.output))
        for node in self.graph.nodes:
            if node.target in (expect_steps, fold_time, repeat_in_time, unfold_time):
                node.meta["is_wrapped"] = True  # FX traces its own code again when it unpickles: leave them calls
        rolled = fx.GraphModule(self._root(), self.graph, type(self.gm).__name__)
        rolled.training = self.gm.training
        for path, child in rolled.named_modules():
            source = _submodule(self.gm, path)
            if source is not None and source is not child and not isinstance(child, (OverTime, LeakyIntegrator)):
                child.training = source.training
        rolled.graph.lint()
        rolled.meta[WITHOUT_RESET] = tuple(self.without_reset)
        return rolled

    def _needed(self) -> set[int]:
        stack = [leaf.index for leaf in _refs(self.slices.output)]
        needed: set[int] = set()
        while stack:
            index = stack.pop()
            if index in needed:
                continue
            expr = self.slices.exprs[index]
            if expr.op == "select" and not self.slices.full(expr.args[0].index):
                # a slice that only one step has (what comes after the loop): what it reads is read at that step
                stack.extend(self._read_late(expr.args[0].index))
                needed.add(index)
                continue
            needed.add(index)
            stack.extend(references(expr))
        return needed

    def _read_late(self, index: int) -> list[int]:
        """The full expressions behind a value that is computed at one step alone."""
        found = []
        for ref in references(self.slices.exprs[index]):
            if self.slices.exprs[ref].timed and not self.slices.full(ref):
                found += self._read_late(ref)
            else:
                found.append(ref)
        return found

    # -- what must not be

    def _check(self, needed: set[int]) -> None:
        exprs = self.slices.exprs
        for index in sorted(needed):
            expr = exprs[index]
            if expr.op == "neuron":
                self._check_membrane(index)
                self._check_channels(expr)
            elif expr.op == "call_module":
                self._check_memory(expr)
        fused = FusedAxis(self.gm, self.slices, self.recorded, self._carries_batch)
        if "batch_statistics" not in self.accept:
            found = list(self.gm.meta.get("mfpsn_batch_layers", ()))
            for index in sorted(needed):
                expr = exprs[index]
                if expr.op == "call_module" and self._seen_often(expr):
                    module = self.gm.get_submodule(expr.target)
                    found += [
                        ".".join(filter(None, (expr.target, path)))
                        for path, m in module.named_modules()
                        if has_batch_statistics(m)
                    ]
                    own = any(
                        not type(m).__module__.startswith("torch.nn.") for m in module.modules()
                    )  # those are known
                    if own and expr.timed and self.slices.full(index) and fused.mixes_in_training(expr):
                        found.append(expr.target)
            if found:
                raise RollUpError(
                    f"{', '.join(dict.fromkeys(found))}: normalised with the statistics of one step's batch of N, and "
                    "would be with those of all T·N samples; pass accept=('batch_statistics',) to convert if that is "
                    "meant"
                )
        for index in sorted(needed):
            known = exprs[index].op in ("neuron", "of_sequence", "repeat")
            if exprs[index].timed and not known and self.slices.full(index):
                fused.check(exprs[index])

    def _check_memory(self, expr: Expr) -> None:
        """No layer on the fused axis may remember: its steps would be other samples."""
        if not expr.timed:
            return
        for path, module in self.gm.get_submodule(expr.target).named_modules():
            layer = ".".join(filter(None, (expr.target, path)))
            if isinstance(module, (nn.RNNBase, MulFreePSN)):
                raise RollUpError(f"{layer}: a {type(module).__name__} in a loop over steps already runs over time")
            if is_source(module) or looks_like_a_neuron(module):
                raise RollUpError(
                    f"{layer}: how a {type(module).__name__} is stepped is not known: tell with "
                    "mfpsn_fx.model.register_stepping"
                )

    def _seen_often(self, expr: Expr) -> bool:
        if expr.timed:
            return True
        return sum(n.op == "call_module" and n.target == expr.target for n in self.gm.graph.nodes) > 1

    def _check_membrane(self, index: int) -> None:
        """A membrane is a readout: nothing that it reaches feeds a neuron, unless it never resets."""
        expr = self.slices.exprs[index]
        for ancestor in self._before(expr.args[0].index):
            other = self.slices.exprs[ancestor]
            chain = self.slices.chains[other.args[2]] if other.op == "neuron" else None
            if chain is not None and other.args[1] == "membrane" and not chain.stepping.reads_out:
                raise RollUpError(
                    f"{chain.path}: its membrane feeds {expr.target!r}, but with its reset gone that membrane is "
                    "another one; a membrane may be read out, or come from a neuron without reset"
                )

    def _before(self, index: int) -> set[int]:
        seen: set[int] = set()
        stack = [index]
        while stack:
            at = stack.pop()
            if at not in seen:
                seen.add(at)
                stack.extend(references(self.slices.exprs[at]))
        return seen

    def _check_channels(self, expr: Expr) -> None:
        chain = self.slices.chains[expr.args[2]]
        call = chain.calls[0]
        x = self.recorded[(call.args[0] if call.args else next(iter(call.kwargs.values()))).name]
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

    def _carries_batch(self, index: int) -> bool:
        """Whether a value that all steps share comes from the input, batch and all."""
        if not any(self.slices.exprs[i].op == "placeholder" for i in self._before(index)):
            return False
        if self.slices.exprs[index].node is None:  # made of steps (a sum over time): a batch it has
            return True
        value = self._shown(index)
        return isinstance(value, Tensor) and value.ndim > 0

    def _shown(self, index: int) -> object:
        """What a value that all steps share was on the example, if one node made it."""
        node = self.slices.exprs[index].node
        return None if node is None else self.recorded.get(node.name)

    # -- nodes

    def _emit(self, index: int, expr: Expr) -> None:
        if expr.op == "neuron":
            self._neuron(index, expr)
        elif expr.op == "of_sequence":
            self._of_sequence(index, expr)
        elif expr.op == "repeat":
            source = self.whole[expr.args[0].index]
            self.whole[index] = self._function(repeat_in_time, (source, self._steps()))
        elif expr.op == "sequence":
            self.whole[index] = self._as_whole(expr.args[0].index)
        elif expr.op == "select":
            self.whole[index] = self._select(expr.args[0].index, expr.args[1])
        elif expr.timed and self._is_shared_mask(expr):
            self.modules[expr.target] = self.gm.get_submodule(expr.target).dropout
            source = self._as_whole(expr.args[0].index)
            self.whole[index] = self.graph.call_module(expr.target, (source,))
        elif expr.timed:
            if self.slices.full(index):
                args, kwargs = _replaced(expr, self._as_folded)
                source = next(iter(expr.at.values())).args
                source = self.recorded.get(source[0].name) if source and isinstance(source[0], fx.Node) else None
                args, kwargs = without_batch(expr, args, kwargs, source)
                self.folded[index] = self._node(expr, args, kwargs)
        elif self._adds_to_zeros(expr):
            self.whole[index] = self.whole[expr.args[1].index]
        else:
            args, kwargs = _replaced(expr, lambda i: self.whole[i])
            if self._is_static(index):  # its first dim is N, which is the example's only in the example
                args, kwargs = without_batch(expr, args, kwargs, self._shown(expr.args[0].index))
            self.whole[index] = self._node(expr, args, kwargs)

    def _is_shared_mask(self, expr: Expr) -> bool:
        return expr.op == "call_module" and isinstance(self.gm.get_submodule(expr.target), SharedMask)

    def _is_static(self, index: int) -> bool:
        """Whether a value comes from the input as all steps see it, (N, *), and has no T."""
        if not self._carries_batch(index) or not isinstance(self.slices.exprs[index].args[0], Ref):
            return False
        timed = ("neuron", "of_sequence", "repeat", "sequence", "select")
        if any(self.slices.exprs[i].op in timed for i in self._before(index)):
            return False
        sliced = (i for i, expr in enumerate(self.slices.exprs) if expr.op == "of_sequence")
        return not any(index in self._before(i) for i in sliced)

    def _adds_to_zeros(self, expr: Expr) -> bool:
        """A sum that was started from zeros of its own shape needs no zeros, which have the example's N."""
        if expr.target is not operator.add or expr.node is not None or not isinstance(expr.args[0], Ref):
            return False
        start, total = (self.slices.exprs[ref.index] for ref in expr.args)
        if start.op != "get_attr" or not start.node.meta.get("mfpsn_zero") or total.target != "sum":
            return False
        behind = self.slices.exprs[self.slices.exprs[total.args[0].index].args[0].index]
        if not behind.at:
            return False
        summand = self.recorded.get(behind.at[0].name)
        zeros = self.recorded[start.node.name]
        return isinstance(summand, Tensor) and (summand.shape, summand.dtype) == (zeros.shape, zeros.dtype)

    def _node(self, expr: Expr, args: tuple, kwargs: dict) -> fx.Node:
        if expr.op == "call_module":
            self.modules[expr.target] = self.gm.get_submodule(expr.target)
        elif expr.op == "get_attr":
            owner, _, name = expr.target.rpartition(".")
            value = getattr(self.gm.get_submodule(owner), name)
            if any(
                owner == chain.path for chain in self.slices.chains
            ):  # the neuron will be gone, its threshold read on
                path = expr.target.replace(".", "_")
                self.modules[path] = value
                return self.graph.get_attr(path)
            self.modules[expr.target] = value
        return self.graph.create_node(expr.op, expr.target, args, kwargs, name=expr.name or None)

    def _function(self, target, args: tuple) -> fx.Node:
        return self.graph.call_function(target, args)

    def _steps(self) -> object:
        """T: a number where a loop was rolled up; read from the input where the network was one step."""
        if self.steps_node is None:
            source = next(self.whole[i] for i, e in enumerate(self.slices.exprs) if e.op == "of_sequence")
            self.steps_node = self.graph.call_method("size", (source, 0))
        return self.steps_node

    def _of_sequence(self, index: int, expr: Expr) -> None:
        source, dim = self.whole[expr.args[0].index], expr.args[1]
        steps = self.slices.steps
        if steps is not None:
            shown = self._shown(expr.args[0].index)
            if isinstance(shown, Tensor) and shown.shape[dim] > steps:  # a loop over the first of them
                source = self._function(torch.narrow, (source, dim, 0, steps))
            else:
                source = self._function(expect_steps, (source, dim, steps))
        if dim:
            source = self._function(torch.movedim, (source, dim, 0))
        self.whole[index] = source

    def _as_whole(self, index: int) -> fx.Node:
        """A timed value as (T, N, *)."""
        if index not in self.whole:
            self.whole[index] = self._function(unfold_time, (self.folded[index], self._steps()))
        return self.whole[index]

    def _as_folded(self, index: int) -> object:
        """An argument of a layer on the fused axis."""
        if not self.slices.exprs[index].timed:
            if not self._carries_batch(index):
                return self.whole[index]
            if index not in self.folded:
                repeated = self._function(repeat_in_time, (self.whole[index], self._steps()))
                self.folded[index] = self._function(fold_time, (repeated,))
            return self.folded[index]
        if index not in self.folded:
            self.folded[index] = self._function(fold_time, (self.whole[index],))
        return self.folded[index]

    def _select(self, index: int, step: int) -> object:
        if (index, step) not in self.late:
            expr = self.slices.exprs[index]
            if not expr.timed:
                return self.whole[index]
            if self.slices.full(index):
                node = self._function(operator.getitem, (self._as_whole(index), step))
            else:
                args, kwargs = _replaced(expr, lambda i: self._select(i, step))
                node = self._node(expr, args, kwargs)
            self.late[index, step] = node
        return self.late[index, step]

    def _neuron(self, index: int, expr: Expr) -> None:
        source, output, number = expr.args
        chain = self.slices.chains[number]
        x = self.whole[source.index] if chain.sequence else self._as_whole(source.index)
        module = self.gm.get_submodule(chain.path)
        uses = [i for i, c in enumerate(self.slices.chains) if c.path == chain.path]
        suffix = "" if uses.index(number) == 0 else f"@{uses.index(number) + 1}"  # each use is its own neuron
        if output == "spikes":
            path = chain.path + suffix
            self.modules[path] = OverTime(module)
        else:
            path = chain.path + suffix
            needed = (self.slices.exprs[i] for i in self.needed)
            if any(e.op == "neuron" and e.args[1:] == ("spikes", number) for e in needed):
                path += "_membrane"
            try:
                integrator = chain.stepping.leaky_integrator(module)
            except NotAFilterError as error:
                raise RollUpError(
                    f"{chain.path}: its membrane is read out, but cannot be run at once: {error}"
                ) from None
            place = next((t for t in [*module.parameters(), *module.buffers(), *self.gm.parameters()]), None)
            self.modules[path] = integrator.to(place.device if place is not None else None).train(module.training)
            if not chain.stepping.reads_out:
                self.without_reset.append(path)
                _log.warning("%s: its membrane is read out without its reset", chain.path)
        name = path.replace(".", "_").replace("@", "_")
        self.whole[index] = self.graph.create_node("call_module", path, (x,), {}, name=name)

    def _output(self, structure: object) -> object:
        if isinstance(structure, Ref):
            return self.whole[structure.index]
        if isinstance(structure, dict):
            return {key: self._output(value) for key, value in structure.items()}
        if isinstance(structure, (tuple, list)):
            return type(structure)(self._output(value) for value in structure)
        return structure

    def _root(self) -> nn.Module:
        """Layers, neurons and constants at the paths that the source has them."""
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


def _submodule(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _refs(structure: object) -> list[Ref]:
    found: list[Ref] = []
    map_aggregate(structure, lambda leaf: found.append(leaf) if isinstance(leaf, Ref) else None)
    return found


def _replaced(expr: Expr, function) -> tuple[tuple, dict]:
    replace = lambda a: function(a.index) if isinstance(a, Ref) else a  # noqa: E731
    return map_aggregate(expr.args, replace), map_aggregate(expr.kwargs, replace)
