"""Run a copy of a graph on a real example, without side effects on the graph."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from mfpsn_fx.model.capturing.capture import copied, preserved_rng
from mfpsn_fx.model.neuron import MulFreePSN
from mfpsn_fx.model.sources.description import source_paths

from .context import Example
from .neurons import NeuronInput, fake_tensor

__all__ = ["Run", "bind_arguments", "run_copy"]


class Run(NamedTuple):
    """The record of a run.

    Attributes:
        graph: the copy that ran; neurons that only the other mode reaches are those of a copy that ran in that mode.
        values: for each node by name, a fake tensor of its result.
        inside: for each neuron by path, converted or not, the (shape, dtype, device) of its input (``path@2`` for the
            second call of one), in the order of execution.
        operands: for each converted neuron, named as in ``inside``, its input.
        calls: for each node by name, the neurons of ``operands`` that it called.
    """

    graph: fx.GraphModule
    values: dict[str, FakeTensor]
    inside: dict[str, tuple]
    operands: dict[str, NeuronInput]
    calls: dict[str, list[str]]


class _Recorder(fx.Interpreter):
    """Records the result of each node, by node name."""

    def __init__(self, gm: fx.GraphModule, operands: dict[str, NeuronInput]) -> None:
        super().__init__(gm)
        self.values: dict[str, FakeTensor] = {}
        self.calls: dict[str, list[str]] = {}
        self._operands = operands

    def run_node(self, n: fx.Node):
        before = len(self._operands)
        result = super().run_node(n)
        self.calls[n.name] = list(self._operands)[before:]
        if isinstance(result, torch.Tensor):
            self.values[n.name] = fake_tensor(tuple(result.shape), result.dtype, result.device, result.stride())
        return result


def run_copy(gm: fx.GraphModule, example: Example, prepare: Callable[[nn.Module], None] | None = None) -> Run:
    """Run a copy of ``gm`` on ``example`` without gradients, random generators preserved.

    ``prepare`` may hook the copy first. Neurons run in evaluation, other layers in the mode that they are in. If some
    neurons are not called, a second copy runs in the other mode and shows their inputs: a leaf's forward may call a
    child in one mode only.
    """
    run, calls = _run(_copy(gm), example, prepare)
    if 0 in calls.values():
        # not every network runs in both modes: such neurons then count as not reached
        with contextlib.suppress(Exception):
            other, others = _run(_copy(gm).train(not gm.training), example, prepare)
            for path in (path for path, count in others.items() if count and not calls[path]):
                run.graph.set_submodule(path, other.graph.get_submodule(path))
                for name in (path, *(f"{path}@{use}" for use in range(2, others[path] + 1))):
                    run.inside[name] = other.inside[name]
                    if name in other.operands:
                        run.operands[name] = other.operands[name]
            for node, names in other.calls.items():
                run.calls[node] += [name for name in names if name not in run.calls[node] and name in run.operands]
    return run


def _copy(gm: fx.GraphModule) -> fx.GraphModule:
    return copied(gm, share=True, but=MulFreePSN)  # what prepares a copy sets its neurons' parameters


def _run(
    copied: fx.GraphModule, example: Example, prepare: Callable[[nn.Module], None] | None
) -> tuple[Run, dict[str, int]]:
    """Run ``copied`` itself; return the record, and how often each neuron was called."""
    inside: dict[str, tuple] = {}
    operands: dict[str, NeuronInput] = {}
    observed = source_paths(copied)
    for path, module in copied.named_modules():
        if isinstance(module, MulFreePSN):
            observed[path] = module.eval()
    calls = dict.fromkeys(observed, 0)
    for module in observed.values():  # a user's monitor must not record this run
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    for path, module in observed.items():

        def record(module, args, path=path):
            x = args[0]
            calls[path] += 1
            name = path if calls[path] == 1 else f"{path}@{calls[path]}"
            inside[name] = (tuple(x.shape), x.dtype, x.device)
            if isinstance(module, MulFreePSN):
                operands[name] = NeuronInput(*inside[name], tuple(x.stride()), _autocast(x))

        module.register_forward_pre_hook(record)
    if prepare is not None:
        prepare(copied)
    given = (tuple(example.args), dict(example.kwargs))
    args, kwargs = pytree.tree_map_only(torch.Tensor, torch.clone, given)
    recorder = _Recorder(copied, operands)
    with torch.no_grad(), preserved_rng():
        recorder.run(*bind_arguments(copied, args, kwargs))
    return Run(copied, recorder.values, inside, operands, recorder.calls), calls


def _autocast(x: torch.Tensor) -> torch.dtype:
    """Return the dtype in which the neuron's op takes ``x`` under the current autocast state."""
    if x.dtype is torch.float64 or not x.is_floating_point() or not torch.is_autocast_enabled(x.device.type):
        return x.dtype
    return torch.get_autocast_dtype(x.device.type)


def bind_arguments(gm: fx.GraphModule, args: tuple, kwargs: dict) -> list:
    """Return one value for each placeholder, defaults filled in; ``TypeError`` if they do not fit."""
    try:
        bound = inspect.signature(gm.forward).bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(f"the example does not fit the network's arguments: {error}") from None
    bound.apply_defaults()
    return list(bound.args)
