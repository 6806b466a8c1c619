"""Run a graph on a real example without leaving a trace in it."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import fx, nn
from torch.fx.node import map_aggregate

from mfpsn_fx.model.capture import preserved_rng
from mfpsn_fx.model.neuron import MulFreePSN
from mfpsn_fx.model.source import source_paths

__all__ = ["Example", "Run", "run_copy"]

Example = tuple[tuple, dict]


class Run(NamedTuple):
    """What a run showed.

    Attributes:
        graph: the copy that ran; neurons that only the other mode reaches are those of a copy that ran in that mode.
        tensors: for each node by name, (shape, dtype, device) of its tensor.
        inside: the same of the input of each neuron, converted or not, by path (``path@2`` for the second call of
            one), in the order of execution.
        strides: for each node by name, the strides of its tensor.
        operands: for each converted neuron, named as in ``inside``, the strides of its input, and the dtype in which
            its op takes it: that of autocast, where the neuron stands in one.
    """

    graph: fx.GraphModule
    tensors: dict[str, tuple]
    inside: dict[str, tuple]
    strides: dict[str, tuple[int, ...]]
    operands: dict[str, tuple[tuple[int, ...], torch.dtype]]


class _Recorder(fx.Interpreter):
    """Records shape, dtype, device and strides of each node's result, by node name."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.tensors: dict[str, tuple] = {}
        self.strides: dict[str, tuple[int, ...]] = {}

    def run_node(self, n: fx.Node):
        result = super().run_node(n)
        if isinstance(result, torch.Tensor):
            self.tensors[n.name] = (tuple(result.shape), result.dtype, result.device)
            self.strides[n.name] = tuple(result.stride())
        return result


def run_copy(gm: fx.GraphModule, example: Example, prepare: Callable[[nn.Module], None] | None = None) -> Run:
    """Run a deep copy of ``gm`` on ``example`` without gradients, random generators preserved.

    ``prepare`` may hook the copy first. Neurons run in evaluation, other layers in the mode that they are in. If some
    neurons are not called, a second copy runs in the other mode and shows their inputs: a leaf's forward may call a
    child in one mode only.
    """
    run, calls = _run(copy.deepcopy(gm), example, prepare)
    if 0 in calls.values():
        # not every network runs in both modes: such neurons then count as not reached
        with contextlib.suppress(Exception):
            other, others = _run(copy.deepcopy(gm).train(not gm.training), example, prepare)
            for path in (path for path, count in others.items() if count and not calls[path]):
                run.graph.set_submodule(path, other.graph.get_submodule(path))
                for name in (path, *(f"{path}@{use}" for use in range(2, others[path] + 1))):
                    run.inside[name] = other.inside[name]
                    if name in other.operands:
                        run.operands[name] = other.operands[name]
    return run


def _run(
    copied: fx.GraphModule, example: Example, prepare: Callable[[nn.Module], None] | None
) -> tuple[Run, dict[str, int]]:
    """Run ``copied`` itself; return what it showed, and how often each neuron was called."""
    inside: dict[str, tuple] = {}
    operands: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    watched = source_paths(copied)
    for path, module in copied.named_modules():
        if isinstance(module, MulFreePSN):
            watched[path] = module.eval()
    calls = dict.fromkeys(watched, 0)
    for module in watched.values():  # a user's monitor shall not see this run
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    for path, module in watched.items():

        def record(module, args, path=path):
            x = args[0]
            calls[path] += 1
            name = path if calls[path] == 1 else f"{path}@{calls[path]}"
            inside[name] = (tuple(x.shape), x.dtype, x.device)
            if isinstance(module, MulFreePSN):
                operands[name] = (tuple(x.stride()), _autocast(x))

        module.register_forward_pre_hook(record)
    if prepare is not None:
        prepare(copied)
    args, kwargs = example
    args, kwargs = map_aggregate((tuple(args), dict(kwargs)), lambda a: a.clone() if torch.is_tensor(a) else a)
    recorder = _Recorder(copied)
    with torch.no_grad(), preserved_rng():
        recorder.run(*bind_arguments(copied, args, kwargs))
    return Run(copied, recorder.tensors, inside, recorder.strides, operands), calls


def _autocast(x: torch.Tensor) -> torch.dtype:
    """The dtype in which the neuron's op takes ``x`` here and now."""
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
