"""Run a graph on a real example without leaving a trace in it."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import fx, nn
from torch.fx.node import map_aggregate

from mfpsn_fx.model.capture import preserved_rng
from mfpsn_fx.model.neuron import MulFreePSN
from mfpsn_fx.model.source import source_paths

__all__ = ["Example", "run_copy"]

Example = tuple[tuple, dict]


class _Recorder(fx.Interpreter):
    """Records shape, dtype and device of each node's result, by node name."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.tensors: dict[str, tuple] = {}

    def run_node(self, n: fx.Node):
        result = super().run_node(n)
        if isinstance(result, torch.Tensor):
            self.tensors[n.name] = (tuple(result.shape), result.dtype, result.device)
        return result


def run_copy(
    gm: fx.GraphModule, example: Example, prepare: Callable[[nn.Module], None] | None = None
) -> tuple[fx.GraphModule, dict[str, tuple], dict[str, tuple]]:
    """Run a deep copy of ``gm`` on ``example`` without gradients, random generators preserved.

    ``prepare`` may hook the copy first. Neurons run in evaluation, other layers in the mode that they are in.

    Returns:
        The copy; for each node by name (shape, dtype, device) of its tensor; the same of the input of each neuron,
        converted or not, by path (``path@2`` for the second call of one), in the order of execution.
    """
    copied = copy.deepcopy(gm)
    inside: dict[str, tuple] = {}
    calls: dict[str, int] = {}
    watched = source_paths(copied)
    for path, module in copied.named_modules():
        if isinstance(module, MulFreePSN):
            watched[path] = module.eval()
    for path, module in watched.items():

        def record(_module, args, path=path):
            x = args[0]
            calls[path] = calls.get(path, 0) + 1
            name = path if calls[path] == 1 else f"{path}@{calls[path]}"
            inside[name] = (tuple(x.shape), x.dtype, x.device)

        # A user's monitor shall not see this run.
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            hooks.clear()
        module.register_forward_pre_hook(record)
    if prepare is not None:
        prepare(copied)
    args, kwargs = example
    args, kwargs = map_aggregate((tuple(args), dict(kwargs)), lambda a: a.clone() if torch.is_tensor(a) else a)
    recorder = _Recorder(copied)
    with torch.no_grad(), preserved_rng():
        recorder.run(*bind_arguments(copied, args, kwargs))
    return copied, recorder.tensors, inside


def bind_arguments(gm: fx.GraphModule, args: tuple, kwargs: dict) -> list:
    """One value for each placeholder, defaults filled in; ``TypeError`` if they do not fit."""
    values, left = [], dict(kwargs)
    given = list(args)
    for node in gm.graph.nodes:
        if node.op != "placeholder":
            continue
        name = str(node.target).lstrip("*")
        if given:
            values.append(given.pop(0))
        elif name in left:
            values.append(left.pop(name))
        elif node.args:
            values.append(node.args[0])
        else:
            raise TypeError(f"the example lacks an argument for {name!r}")
    if given or left:
        extra = [*(type(value).__name__ for value in given), *left]
        raise TypeError(f"the example has arguments that the model does not take: {', '.join(extra)}")
    return values
