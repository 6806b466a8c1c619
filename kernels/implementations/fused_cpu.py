"""Fused C++ kernel for the CPU: H is never written to memory, and each part reads its inputs once."""

from __future__ import annotations

import operator

import torch

from ..build.cpu import OPS, unavailable
from ..constants import ALL, NeuronConstants
from ..kernel import Call, NeuronKernel
from ..registry import Problem, register_kernel

_SURROGATES = ("atan", "rational", "sigmoid")

# Constants of the operators of csrc/cpu/layer.h. They are passed by position, in the order of these names, from which
# the schemas are made, too: as keywords they added 2.4 us to the 7 us that ``layer`` takes on the smallest input.
_FILTER = ("dilation", "layout")
_SURROGATE = ("surrogate", "alpha", *_FILTER)
_LAYER = tuple(name for name in ALL if name != "method")
_ALL = tuple(name for name in _LAYER if name != "layer")
_AFFINE = "Tensor? scale, Tensor? shift, Tensor? mask"

for _name, _tensors, _constants, _results in (
    ("statistics", f"Tensor x, Tensor weight, {_AFFINE}", _FILTER, "(Tensor, Tensor)"),
    ("fire", f"Tensor x, Tensor taps, Tensor bias, {_AFFINE}", _FILTER, "Tensor"),
    (
        "backward_reductions",
        f"Tensor grad, Tensor x, Tensor taps, Tensor bias, {_AFFINE}",
        _SURROGATE,
        "(Tensor, Tensor)",
    ),
    (
        "backward_input",
        "Tensor grad, Tensor x, Tensor taps, Tensor bias, Tensor weight, Tensor? offset, Tensor? slope, "
        f"{_AFFINE}, bool input_grad",
        _SURROGATE,
        "(Tensor, Tensor, Tensor, Tensor)",
    ),
    (
        "forward",
        f"Tensor x, Tensor weight, Tensor gamma, Tensor beta, Tensor? mean, Tensor? var, {_AFFINE}",
        _ALL,
        "(Tensor, Tensor, Tensor)",
    ),
    (
        "backward",
        f"Tensor grad, Tensor x, Tensor weight, Tensor gamma, Tensor beta, Tensor mean, Tensor var, {_AFFINE}, "
        "bool input_grad",
        _ALL,
        "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    ),
    (
        "layer",
        "Tensor x, Tensor weight, Tensor gamma, Tensor beta, Tensor(a!) running_mean, Tensor(b!) running_var, "
        "Tensor? scale, Tensor? shift, float momentum, bool update",
        _LAYER,
        "Tensor",
    ),
):
    OPS.define(f"{_name}({_tensors}, {NeuronConstants.schema(_constants)}) -> {_results}")

_cpu = torch.ops.mfpsn_cpu
_filter_args, _surrogate_args, _all_args, _layer_args = (
    operator.attrgetter(*names) for names in (_FILTER, _SURROGATE, _ALL, _LAYER)
)


def _supports(problem: Problem) -> str | None:
    if problem.surrogate not in _SURROGATES:
        return f"knows the surrogates {', '.join(_SURROGATES)}, not {problem.surrogate}"
    return None


@register_kernel("fused-cpp", devices=["cpu"], supports=_supports, unavailable=unavailable, rank=30, one_read=True)
class FusedCpu(NeuronKernel):
    """C++: tiles of T steps in cache, taps summed in order, H never written; any strides, both layouts."""

    def layer(
        self, x, weight, gamma, beta, running_mean, running_var, scale, shift, momentum, update, constants
    ):  # fmt: skip
        return _cpu.layer.default(
            x,
            weight,
            gamma,
            beta,
            running_mean,
            running_var,
            scale,
            shift,
            momentum,
            update,
            *_layer_args(constants),
        )

    def statistics(self, call, x, weight):
        return _cpu.statistics.default(x, weight, *_affine(call), *_filter_args(call.constants))

    def fire(self, call, x, taps, bias):
        return _cpu.fire.default(x, taps, bias, *_affine(call), *_filter_args(call.constants))

    def backward_reductions(self, call, grad, x, taps, bias):
        sums = _cpu.backward_reductions.default(grad, x, taps, bias, *_affine(call), *_surrogate_args(call.constants))
        return *sums, None

    def backward_input(self, call, grad, x, taps, bias, weight, offset, slope, cache=None, input_grad=True):
        affine = call.scale is not None or call.shift is not None
        if not (input_grad or affine or offset is not None):
            return None, None, None, None
        return _cpu.backward_input.default(
            grad,
            x,
            taps,
            bias,
            weight,
            offset,
            slope,
            *_affine(call),
            input_grad,
            *_surrogate_args(call.constants),
        )

    def forward(self, call, x, weight, gamma, beta, mean, var):
        spikes, *found = _cpu.forward.default(
            x, weight, gamma, beta, mean, var, *_affine(call), *_all_args(call.constants)
        )
        return spikes, *(found if mean is None else (mean, var))

    def backward(self, call, grad, x, weight, gamma, beta, mean, var, input_grad):
        return _cpu.backward.default(
            grad, x, weight, gamma, beta, mean, var, *_affine(call), input_grad, *_all_args(call.constants)
        )


def _affine(call: Call) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    return call.scale, call.shift, call.mask
