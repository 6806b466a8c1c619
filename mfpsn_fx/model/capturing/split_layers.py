"""Split neurons that contain a linear layer into that layer and the neuron."""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

from ..sources.description import NotAFilterError, qualified_name
from .over_time import OverTime

__all__ = ["LinearThenCell", "has_inner_layers", "split_inner_layers"]

_LEAKY_PARALLEL = "snntorch._neurons.leakyparallel.LeakyParallel"
_LINEAR_LEAKY = "snntorch._neurons.linearleaky.LinearLeaky"
_LI_LINEAR = "norse.torch.module.leaky_integrator.LILinearCell"


class LinearThenCell(nn.Module):
    """A linear layer followed by a cell with explicit state, with the call signature of the cell."""

    def __init__(self, linear: nn.Linear, cell: nn.Module) -> None:
        super().__init__()
        self.linear, self.cell = linear, cell

    def forward(self, x: Tensor, state=None):
        return self.cell(self.linear(x), state)


def has_inner_layers(model: nn.Module) -> bool:
    """Return True if ``model`` has neurons that :func:`split_inner_layers` splits."""
    return any(qualified_name(type(m)) in _SPLIT for m in model.modules())


def split_inner_layers(model: nn.Module) -> None:
    """Replace neurons with a linear layer inside by that layer and a neuron, in place.

    These are snnTorch's LeakyParallel and LinearLeaky, and Norse's LILinearCell. The layer's weights are the source's
    own parameters.

    Raises:
        NotAFilterError: the neurons inside are connected to each other.
    """
    for path, module in list(model.named_modules()):
        split = _SPLIT.get(qualified_name(type(module)))
        if split is not None and path:
            model.set_submodule(path, split(path, module))


def _linear(weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device=weight.device, dtype=weight.dtype)
    layer.weight = weight
    if bias is not None:
        layer.bias = bias
    return layer


def _leaky_parallel(path: str, m: nn.Module) -> nn.Module:
    """Split ReLU(β·h[t−1] + W·x[t] + b) into W·x[t] + b and a Leaky without reset; its ReLU is dropped."""
    recurrent = m.rnn.weight_hh_l0.detach()
    decay = recurrent.diagonal().clone()
    if bool((recurrent != torch.diag(decay)).any()):
        raise NotAFilterError(f"{path}: its weight_hh_l0 is not diagonal: its neurons feed back into each other")
    bias = None
    if m.rnn.bias:
        bias = nn.Parameter((m.rnn.bias_ih_l0 + m.rnn.bias_hh_l0).detach())
    leaky = sys.modules["snntorch"].Leaky(
        beta=decay, threshold=m.threshold.detach().clone(), spike_grad=m.spike_grad, reset_mechanism="none",
        surrogate_disable=m.surrogate_disable, graded_spikes_factor=m.graded_spikes_factor.detach().clone(),
    )  # fmt: skip
    leaky.to(recurrent.device)
    neuron = OverTime(leaky, ("ReLU on its membrane dropped",))
    return nn.Sequential(_linear(m.rnn.weight_ih_l0, bias), neuron).train(m.training)


def _linear_leaky(path: str, m: nn.Module) -> nn.Module:
    leaky = sys.modules["snntorch"].StateLeaky(
        beta=0.5, channels=m.linear.out_features, threshold=m.threshold, spike_grad=m.spike_grad,
        state_quant=m.state_quant, output=m.output, kernel_truncation_steps=m.kernel_truncation_steps,
    )  # fmt: skip
    leaky.tau, leaky.threshold, leaky.graded_spikes_factor = m.tau, m.threshold, m.graded_spikes_factor
    return nn.Sequential(m.linear, leaky).train(m.training)


def _li_linear(path: str, m: nn.Module) -> nn.Module:
    cell = sys.modules["norse.torch"].LICell(m.p, dt=m.dt)
    return LinearThenCell(_linear(m.input_weights, None), cell).train(m.training)


_SPLIT = {_LEAKY_PARALLEL: _leaky_parallel, _LINEAR_LEAKY: _linear_leaky, _LI_LINEAR: _li_linear}
