"""Define the op ``mfpsn::neuron``, its backward and its parts, and dispatch them to kernels.

Every neuron of a graph is one call of this op, computed by the kernel bound to it, else by the one of highest rank.
Appendix C of the paper: the temporal filter runs once with W for the batch statistics and once with
W_q = Q(γ/√(σ²+ε)·W) for the spikes.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .constants import ALL, COMMON, SURROGATE, NeuronConstants
from .kernel import Call
from .layout import Layout
from .registry import FALLBACK_KERNEL, Kernel, Problem, default_kernel, get_kernel, version

__all__ = ["backward_input", "backward_reductions", "fire", "neuron", "statistics"]

_log = logging.getLogger("mfpsn_fx")
_warned: set[tuple[str, str, str]] = set()

_AFFINE = "Tensor? scale=None, Tensor? shift=None, Tensor? mask=None"

# Kernels accept X with any strides and return results with the strides of X. Without flexible_layout Inductor copies an
# input in another memory format (such as channels-last) to the strides seen in tracing: 7 copies in a training step of
# SEW-ResNet-18.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout)

# Library.define and impl instead of torch.library.custom_op: a call then has about 0.8 times the overhead (14 against
# 18 us, benchmarks/op_overhead.py)
_lib = torch.library.Library("mfpsn", "DEF")
for _name, _tensors, _constants, _results in (
    (
        "neuron",
        f"Tensor x, Tensor weight, Tensor gamma, Tensor beta, Tensor running_mean, Tensor running_var, {_AFFINE}",
        NeuronConstants.schema(ALL),
        "(Tensor spikes, Tensor mean, Tensor var)",
    ),
    (
        "neuron_backward",
        f"Tensor grad, Tensor x, Tensor weight, Tensor gamma, Tensor beta, Tensor mean, Tensor var, {_AFFINE}",
        f"{NeuronConstants.schema(ALL)}, bool input_grad=True",
        "(Tensor dx, Tensor dweight, Tensor dgamma, Tensor dbeta, Tensor dscale, Tensor dshift)",
    ),
    (
        "statistics",
        f"Tensor x, Tensor weight, {_AFFINE}",
        NeuronConstants.schema(COMMON),
        "(Tensor mean, Tensor var)",
    ),
    (
        "fire",
        f"Tensor x, Tensor taps, Tensor bias, {_AFFINE}",
        NeuronConstants.schema(COMMON),
        "Tensor",
    ),
    (
        "backward_reductions",
        f"Tensor grad, Tensor x, Tensor taps, Tensor bias, {_AFFINE}",
        NeuronConstants.schema(SURROGATE + COMMON),
        "(Tensor dtaps, Tensor dbias)",
    ),
    (
        "backward_input",
        "Tensor grad, Tensor x, Tensor taps, Tensor bias, Tensor weight, Tensor? offset=None, Tensor? slope=None, "
        f"{_AFFINE}",
        f"{NeuronConstants.schema(SURROGATE + COMMON)}, bool input_grad=True",
        "(Tensor dx, Tensor dweight, Tensor dscale, Tensor dshift)",
    ),
):
    _lib.define(f"{_name}({_tensors}, *, {_constants}) -> {_results}", tags=_TAGS)

neuron = torch.ops.mfpsn.neuron
statistics = torch.ops.mfpsn.statistics
fire = torch.ops.mfpsn.fire
backward_reductions = torch.ops.mfpsn.backward_reductions
backward_input = torch.ops.mfpsn.backward_input


def _prefix(layer: str) -> str:
    """Return the start of an error message: the layer's name, if it has one."""
    return f"{layer}: " if layer else ""


def _sum_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """Return the dtype of sums and statistics: float64 if an operand is, else float32."""
    return torch.float64 if torch.float64 in (x.dtype, weight.dtype) else torch.float32


def _check_shapes(
    shape: tuple[int, ...], dtype: torch.dtype, weight: tuple[int, ...], constants: NeuronConstants
) -> None:
    """Raise unless the shapes of the input and of W fit each other and the layout, and ``dtype`` is floating point."""
    layout, layer = constants.parsed_layout, constants.layer
    if not dtype.is_floating_point:
        raise TypeError(
            f"{_prefix(layer)}the input must be floating point, found {dtype}; convert it, e.g. with x.float()"
        )
    if len(shape) < 3:
        raise ValueError(
            f"{_prefix(layer)}the input must have at least 3 dims, "
            f"{'(T, N, C, *)' if layout is Layout.TIME_FIRST else '(N, C, *, T)'}, found shape {tuple(shape)}"
        )
    if len(weight) != 2 or weight[1] < 1:
        raise ValueError(f"{_prefix(layer)}the weight must be (C, k) with k >= 1, found {tuple(weight)}")
    if shape[layout.channel_dim] != weight[0]:
        raise ValueError(
            f"{_prefix(layer)}expected {weight[0]} channels in dim {layout.channel_dim} of the {layout} input, "
            f"found {shape[layout.channel_dim]} in shape {tuple(shape)}"
        )


def _check_mask(mask: Tensor, x: Tensor, constants: NeuronConstants) -> None:
    """Raise unless ``mask`` is bool, of shape (T, N) and on the device of ``x``."""
    layout, layer = constants.parsed_layout, constants.layer
    expected = (x.shape[layout.time_dim], x.shape[layout.batch_dim])
    if tuple(mask.shape) != expected or mask.dtype != torch.bool:
        raise ValueError(
            f"{_prefix(layer)}the mask must be bool of shape (T, N) = {expected}, "
            f"found {mask.dtype} of shape {tuple(mask.shape)}"
        )
    if mask.device != x.device:
        raise ValueError(f"{_prefix(layer)}the mask must be on {x.device} as the input is, found {mask.device}")


def _check_fake(x: Tensor, weight: Tensor, mask: Tensor | None, constants: NeuronConstants) -> None:
    """Check what fake tensors have: shapes, dtypes and devices of input, weight and mask."""
    _check_shapes(x.shape, x.dtype, weight.shape, constants)
    if mask is not None:
        _check_mask(mask, x, constants)


def _check_operands(x: Tensor, weight: Tensor, grad: Tensor | None, layer: str, vectors: dict) -> None:
    """Raise unless all tensors have the shape and device that kernels assume, which read them through raw pointers."""
    device, per_tap, per_channel = x.device, weight.shape, weight.shape[:1]
    for name, other in vectors.items():
        if other is None:
            continue
        expected = per_tap if name == "taps" else per_channel
        if other.shape != expected or other.device != device:
            raise ValueError(
                f"{_prefix(layer)}{name} must have shape {tuple(expected)} on {device} as weight and input have, "
                f"found {tuple(other.shape)} on {other.device}"
            )
    if weight.device != device:
        raise ValueError(f"{_prefix(layer)}the input is on {device}, the neuron on {weight.device}; move one of them")
    if grad is not None and (grad.shape != x.shape or grad.device != device):
        raise ValueError(
            f"{_prefix(layer)}the gradient must be shaped as the input, {tuple(x.shape)} on {device}, "
            f"found {tuple(grad.shape)} on {grad.device}"
        )


def _check_training(x: Tensor, weight: Tensor, layer: str) -> None:
    """Raise if a channel has a single value, whose batch variance would be 0."""
    if x.numel() <= weight.shape[0]:
        raise ValueError(
            f"{_prefix(layer)}expected more than 1 value per channel when training, found input of shape "
            f"{tuple(x.shape)}; give a larger batch or call .eval()"
        )


def _select_kernel(name: str, problem: Problem, layer: str) -> Kernel:
    """Return the kernel ``name``, or the default kernel for ``""`` and, with a warning, where ``name`` cannot serve."""
    if not name:
        return default_kernel(problem)
    try:
        kernel = get_kernel(name)
        # the fallback serves every problem, so its predicate need not run
        refusal = None if name == FALLBACK_KERNEL else kernel.refusal(problem)
    except ValueError as error:
        kernel, refusal = None, str(error)
    if refusal is None:
        return kernel
    default = default_kernel(problem)
    if (layer, name, refusal) not in _warned:
        _warned.add((layer, name, refusal))
        _log.warning(
            "%skernel %r gives way to %r for input %s: %s",
            _prefix(layer),
            name,
            default.name,
            tuple(problem.shape),
            refusal,
        )
    return default


# Cached, since the result depends on shapes, dtypes and constants only: computed in each call it took a fifth of a
# training step's time in Python
@functools.lru_cache(maxsize=1024)
def _resolve_kernel(
    registry_version: int,  # part of the cache key
    shape: torch.Size,
    weight: torch.Size,
    dtype: torch.dtype,
    float64_weight: bool,
    device: torch.device,  # not only its type: GPUs of one machine may differ in the kernels that they can run
    masked: bool,
    affine: bool,
    constants: NeuronConstants,
) -> tuple[object, torch.dtype]:
    """Return the ``parts`` of the kernel that serves such a call, and the dtype of its weights and sums."""
    _check_shapes(shape, dtype, weight, constants)
    sums = torch.float64 if float64_weight or dtype is torch.float64 else torch.float32
    # float64 weights need a kernel that supports float64 even if the input is narrower
    problem = Problem.of(constants, shape, sums if float64_weight else dtype, device.type, weight[1], masked, affine)
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        return _select_kernel(constants.method, problem, constants.layer).parts, sums


def _cast(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return ``x`` in ``dtype``; None stays None."""
    # compared first: a call of Tensor.to that changes nothing takes ten times as long as the comparison
    return x if x is None or x.dtype is dtype else x.to(dtype)


def _prepare_call(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    mask: Tensor | None,
    constants: NeuronConstants,
    grad: Tensor | None = None,
    **vectors: Tensor | None,
) -> tuple[object, Call]:
    """Check all operands and return the ``parts`` of the kernel to call, and its first argument."""
    affine = scale is not None or shift is not None
    parts, dtype = _resolve_kernel(
        version(), x.shape, weight.shape, x.dtype, weight.dtype is torch.float64, x.device, mask is not None, affine,
        constants,
    )  # fmt: skip
    if affine:
        vectors |= {"scale": scale, "shift": shift}
    _check_operands(x, weight, grad, constants.layer, vectors)
    if mask is not None:
        _check_mask(mask, x, constants)
    return parts, Call(constants, dtype, _cast(scale, dtype), _cast(shift, dtype), mask)


def _neuron(
    x, weight, gamma, beta, running_mean, running_var, scale=None, shift=None, mask=None, *,
    constants: NeuronConstants,
):  # fmt: skip
    """Implement ``mfpsn::neuron`` on real tensors."""
    parts, call = _prepare_call(
        x, weight, scale, shift, mask, constants,
        gamma=gamma, beta=beta, running_mean=running_mean, running_var=running_var,
    )  # fmt: skip
    dtype, training = call.dtype, constants.training
    if training:
        _check_training(x, weight, constants.layer)
        given_statistics = None, None
    else:
        given_statistics = _cast(running_mean, dtype), _cast(running_var, dtype)
    if x.numel() == 0:
        return torch.empty_like(x), weight.new_empty(0, dtype=dtype), weight.new_empty(0, dtype=dtype)
    parameters = (_cast(weight, dtype), _cast(gamma, dtype), _cast(beta, dtype))
    spikes, mean, var = parts.forward(call, x, *parameters, *given_statistics)
    if not training:
        mean, var = weight.new_empty(0, dtype=dtype), weight.new_empty(0, dtype=dtype)
    return spikes, mean, var


def _neuron_backward(
    grad, x, weight, gamma, beta, mean, var, scale=None, shift=None, mask=None, *,
    constants: NeuronConstants, input_grad=True,
):  # fmt: skip
    """Implement ``mfpsn::neuron_backward`` on real tensors."""
    parts, call = _prepare_call(
        x, weight, scale, shift, mask, constants, grad=grad, gamma=gamma, beta=beta, mean=mean, var=var
    )
    dtype, given = call.dtype, (weight, gamma, beta)
    if x.numel() == 0:
        return (
            torch.empty_like(x) if input_grad else x.new_empty(0),
            *(torch.zeros_like(p) for p in given),
            x.new_empty(0) if scale is None else torch.zeros_like(scale),
            x.new_empty(0) if shift is None else torch.zeros_like(shift),
        )
    dx, dweight, dgamma, dbeta, dscale, dshift = parts.backward(
        call,
        grad,
        x,
        *(_cast(p, dtype) for p in (weight, gamma, beta, mean, var)),
        input_grad,
    )
    return (
        x.new_empty(0) if dx is None else dx,
        _cast(dweight, given[0].dtype),
        _cast(dgamma, given[1].dtype),
        _cast(dbeta, given[2].dtype),
        x.new_empty(0) if scale is None else dscale.to(scale.dtype),
        x.new_empty(0) if shift is None else dshift.to(shift.dtype),
    )


def resolve_layer(
    x: Tensor,
    weight: Tensor,
    gamma: Tensor,
    beta: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    constants: NeuronConstants,
) -> Callable[..., Tensor] | None:
    """Check all operands and return ``NeuronKernel.layer`` of the kernel that serves this call; None if it has none."""
    affine = scale is not None or shift is not None
    parts, dtype = _resolve_kernel(
        version(), x.shape, weight.shape, x.dtype, weight.dtype is torch.float64, x.device, False, affine, constants
    )
    if parts.layer is None or x.numel() == 0:
        return None
    vectors = {"gamma": gamma, "beta": beta, "running_mean": running_mean, "running_var": running_var}
    if affine:
        vectors |= {"scale": scale, "shift": shift}
    _check_operands(x, weight, None, constants.layer, vectors)
    if constants.training:
        _check_training(x, weight, constants.layer)
    # operands that need a cast go through the op: sums are float32 for float32 and narrower inputs, else float64
    if (x.dtype is torch.float64) is not (dtype is torch.float64):
        return None
    if weight.dtype is not dtype or any(v is not None and v.dtype is not dtype for v in vectors.values()):
        return None
    return parts.layer


def _statistics(x, weight, scale=None, shift=None, mask=None, *, constants: NeuronConstants):
    parts, call = _prepare_call(x, weight, scale, shift, mask, constants)
    if x.numel() == 0:
        return tuple(weight.new_zeros(weight.shape[0], dtype=call.dtype) for _ in range(2))
    return parts.statistics(call, x, _cast(weight, call.dtype))


def _fire(x, taps, bias, scale=None, shift=None, mask=None, *, constants: NeuronConstants):
    parts, call = _prepare_call(x, taps, scale, shift, mask, constants, bias=bias)
    if x.numel() == 0:
        return torch.empty_like(x)
    return parts.fire(call, x, _cast(taps, call.dtype), _cast(bias, call.dtype))


def _backward_reductions(
    grad, x, taps, bias, scale=None, shift=None, mask=None, *, constants: NeuronConstants
):  # fmt: skip
    parts, call = _prepare_call(x, taps, scale, shift, mask, constants, grad=grad, bias=bias)
    if x.numel() == 0:
        return taps.new_zeros(taps.shape, dtype=call.dtype), taps.new_zeros(taps.shape[0], dtype=call.dtype)
    dtaps, dbias, _ = parts.backward_reductions(call, grad, x, _cast(taps, call.dtype), _cast(bias, call.dtype))
    return dtaps, dbias


def _backward_input(
    grad, x, taps, bias, weight, offset=None, slope=None, scale=None, shift=None, mask=None, *,
    constants: NeuronConstants, input_grad=True,
):  # fmt: skip
    """Implement ``mfpsn::backward_input`` on real tensors; results that were not requested are empty."""
    parts, call = _prepare_call(
        x, weight, scale, shift, mask, constants, grad=grad, taps=taps, bias=bias, offset=offset, slope=slope
    )
    if x.numel() == 0:
        none = weight.new_empty(0)
        zero = weight.new_zeros(weight.shape[0], dtype=call.dtype)
        return (
            torch.empty_like(x) if input_grad else x.new_empty(0),
            none if offset is None else weight.new_zeros(weight.shape, dtype=call.dtype),
            none if scale is None else zero,
            none.clone() if shift is None else zero.clone(),
        )
    offset, slope = _cast(offset, call.dtype), _cast(slope, call.dtype)
    results = parts.backward_input(
        call,
        grad,
        x,
        _cast(taps, call.dtype),
        _cast(bias, call.dtype),
        _cast(weight, call.dtype),
        offset,
        slope,
        None,
        input_grad,
    )
    none = (x, weight, weight, weight)
    return tuple(like.new_empty(0) if r is None else r for r, like in zip(results, none, strict=True))


def _fake_neuron(
    x, weight, gamma, beta, running_mean, running_var, scale=None, shift=None, mask=None, *,
    constants: NeuronConstants,
):  # fmt: skip
    """Implement ``mfpsn::neuron`` on fake tensors: shapes, dtypes and checks."""
    _check_fake(x, weight, mask, constants)
    if constants.training:
        _check_training(x, weight, constants.layer)
    size = weight.shape[0] if constants.training else 0
    dtype = _sum_dtype(x, weight)
    return torch.empty_like(x), weight.new_empty(size, dtype=dtype), weight.new_empty(size, dtype=dtype)


def _fake_neuron_backward(
    grad, x, weight, gamma, beta, mean, var, scale=None, shift=None, mask=None, *,
    constants: NeuronConstants, input_grad=True,
):  # fmt: skip
    return (
        torch.empty_like(x) if input_grad else x.new_empty(0),
        weight.new_empty(weight.shape),
        gamma.new_empty(gamma.shape),
        beta.new_empty(beta.shape),
        x.new_empty(0) if scale is None else scale.new_empty(scale.shape),
        x.new_empty(0) if shift is None else shift.new_empty(shift.shape),
    )


def _fake_statistics(x, weight, scale=None, shift=None, mask=None, *, constants: NeuronConstants):
    _check_fake(x, weight, mask, constants)
    channel = weight.new_empty(weight.shape[0], dtype=_sum_dtype(x, weight))
    return channel, torch.empty_like(channel)


def _fake_fire(x, taps, bias, scale=None, shift=None, mask=None, *, constants: NeuronConstants):
    _check_fake(x, taps, mask, constants)
    return torch.empty_like(x)


def _fake_backward_reductions(
    grad, x, taps, bias, scale=None, shift=None, mask=None, *, constants: NeuronConstants
):  # fmt: skip
    dtype = _sum_dtype(x, taps)
    return taps.new_empty(taps.shape, dtype=dtype), taps.new_empty(taps.shape[0], dtype=dtype)


def _fake_backward_input(
    grad, x, taps, bias, weight, offset=None, slope=None, scale=None, shift=None, mask=None, *,
    constants: NeuronConstants, input_grad=True,
):  # fmt: skip
    dtype, channels = _sum_dtype(x, weight), weight.shape[0]
    return (
        torch.empty_like(x) if input_grad else x.new_empty(0),
        weight.new_empty(0) if offset is None else weight.new_empty(weight.shape, dtype=dtype),
        weight.new_empty(0) if scale is None else weight.new_empty(channels, dtype=dtype),
        weight.new_empty(0) if shift is None else weight.new_empty(channels, dtype=dtype),
    )


def _with_constants(function: Callable, **implied: object) -> Callable:
    """Return ``function`` with the dispatcher's signature: constants as keywords, instead of one NeuronConstants."""
    make = functools.partial(NeuronConstants.checked, **implied) if implied else NeuronConstants.checked

    def call(*tensors, **keywords):
        if "input_grad" in keywords:
            own = {"input_grad": keywords.pop("input_grad")}
            return function(*tensors, constants=make(**keywords), **own)
        return function(*tensors, constants=make(**keywords))

    return call


for _name, _run, _fake, _implied in (
    ("neuron", _neuron, _fake_neuron, {}),
    ("neuron_backward", _neuron_backward, _fake_neuron_backward, {}),
    ("statistics", _statistics, _fake_statistics, {"training": True}),
    ("fire", _fire, _fake_fire, {}),
    ("backward_reductions", _backward_reductions, _fake_backward_reductions, {"training": True}),
    ("backward_input", _backward_input, _fake_backward_input, {"training": True}),
):
    _lib.impl(_name, _with_constants(_run, **_implied), "CompositeExplicitAutograd")
    torch.library.register_fake(f"mfpsn::{_name}", _with_constants(_fake, **_implied), lib=_lib)


_PLAIN_TYPES = frozenset((Tensor, torch.nn.Parameter, type(None)))


def can_bypass_dispatcher(*tensors: Tensor | None) -> bool:
    """Return True if no dispatch mode, tensor subclass or profiler is active, so that the dispatcher can be bypassed.

    This is for the inner calls of neurons with a mask and of kernels without ``layer`` (see eager.py). If these went
    through the dispatcher, forward and backward, a training step would take 1.13 times as long on the smallest input of
    ``benchmarks/neuron.py``, 1.02 times at T = 2, and the same at T = 4.
    """
    return (
        torch._C._len_torch_dispatch_stack() == 0
        and not torch.autograd._profiler_enabled()
        and _PLAIN_TYPES.issuperset(map(type, tensors))
    )


class _Neuron(torch.autograd.Function):
    """Autograd function of ``mfpsn::neuron``.

    torch.library.register_autograd is not used: in each call it walks the schema's arguments in Python, in quadratic
    time, which for twenty arguments takes three times as long as the call itself (140 us against 50 us).
    """

    @staticmethod
    def forward(ctx, constants, *tensors):
        x, weight, gamma, beta, running_mean, running_var, scale, shift, mask = tensors
        with torch._C._AutoDispatchBelowAutograd():
            if can_bypass_dispatcher(x, weight):
                spikes, mean, var = _neuron(*tensors, constants=constants)
            else:
                spikes, mean, var = neuron(*tensors, **constants.arguments(ALL))
        ctx.constants = constants
        # in training the running statistics are not saved, since the caller updates them in place afterwards
        statistics = (mean, var) if constants.training else (running_mean, running_var)
        ctx.save_for_backward(x, weight, gamma, beta, *statistics, scale, shift, mask)
        ctx.mark_non_differentiable(mean, var)
        ctx.set_materialize_grads(False)
        return spikes, mean, var

    @staticmethod
    def backward(ctx, grad, _mean_grad, _var_grad):
        if grad is None:
            return (None,) * 10
        constants = ctx.constants
        if torch.is_grad_enabled():  # create_graph=True would silently give a second derivative of zero
            raise RuntimeError(
                f"{_prefix(constants.layer)}a surrogate gradient has no derivative; take gradients without create_graph"
            )
        _, *needs = ctx.needs_input_grad
        saved = ctx.saved_tensors
        if can_bypass_dispatcher(grad, *saved[:2]):
            found = _neuron_backward(grad, *saved, constants=constants, input_grad=needs[0])
        else:
            found = torch.ops.mfpsn.neuron_backward(grad, *saved, **constants.arguments(ALL), input_grad=needs[0])
        dx, dweight, dgamma, dbeta, dscale, dshift = found
        grads = (dx, dweight, dgamma, dbeta, None, None, dscale, dshift, None)
        return None, *(g if needed else None for g, needed in zip(grads, needs, strict=True))


def _autograd_neuron(x, weight, gamma, beta, running_mean, running_var, scale=None, shift=None, mask=None, **keywords):
    """Implement ``mfpsn::neuron`` for the Autograd key; raise for forward mode and torch.func, which it lacks."""
    tensors = (x, weight, gamma, beta, running_mean, running_var, scale, shift, mask)
    # a dual tensor need not require grad: unchecked, its tangent would silently be dropped
    if forward_ad._current_level >= 0 and any(
        t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors
    ):
        raise RuntimeError(f"{_prefix(keywords.get('layer', ''))}the neuron has no forward-mode derivative: Θ has none")
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        if torch._C._functorch.peek_interpreter_stack() is not None:  # it needs second derivatives, too
            raise RuntimeError(
                f"{_prefix(keywords.get('layer', ''))}a neuron cannot be differentiated by torch.func; "
                "call backward(), or torch.autograd.grad"
            )
        return _Neuron.apply(NeuronConstants.checked(**keywords), *tensors)
    with torch._C._AutoDispatchBelowAutograd():
        return neuron(*tensors, **keywords)


_lib.impl("neuron", _autograd_neuron, "Autograd")


def _autocast(device: str, key: str):
    """Return the implementation of ``mfpsn::neuron`` for the autocast key of ``device``."""

    def cast(x, *args, **constants):
        # Only X is cast; weights, statistics and the fold keep their dtypes. A float64 X is left alone, as autocast
        # does elsewhere.
        if x.is_floating_point() and x.dtype is not torch.float64:
            x = x.to(torch.get_autocast_dtype(device))
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))):
            return neuron(x, *args, **constants)

    return cast


for _device, _key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
    _lib.impl("neuron", _autocast(_device, _key), _key)
