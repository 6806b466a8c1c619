"""The canonical op ``mfpsn::neuron``, its backward, and its parts, on the kernel that is bound or of highest rank.

Every neuron of every graph is one call of this op, whatever computes it. Appendix C of the paper: the temporal
filter runs once with W for the batch statistics and once with W_q = Q(γ/√(σ²+ε)·W) for the spikes.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .bn_fold import Folding
from .kernel import Call
from .layout import Layout
from .quantizer import MAX_EXPONENT, MIN_EXPONENT, Gradient, check_exponent_bounds
from .registry import FALLBACK_KERNEL, Kernel, Problem, default_kernel, get_kernel, version
from .surrogate import get_surrogate

__all__ = ["backward_input", "backward_reductions", "fire", "neuron", "statistics"]

_log = logging.getLogger("mfpsn_fx")
_warned: set[tuple[str, str, str]] = set()

# The kernel's name travels as "method": Inductor's fallback for custom ops has a parameter of its own called "kernel".
# "" stands for the kernel of highest rank, which is found when the op runs: a graph that was compiled or exported on
# one machine says nothing of the kernels of another.
_AFFINE = "Tensor? scale=None, Tensor? shift=None, Tensor? mask=None"
_PLACE = "int dilation=1, str layout='time_first', str method='', str layer=''"
_SURROGATE = "str surrogate='atan', float alpha=2.0"
_QUANTISER = f"str gradient='straight-through', int min_exponent={MIN_EXPONENT}, int max_exponent={MAX_EXPONENT}"

# Kernels take X with any strides, and results have X's. Without the tag Inductor copies what it has laid out otherwise
# (channels last, say) to the strides that tracing saw: 7 copies in a training step of SEW-ResNet-18.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout)

# define/impl, not custom_op: beyond the work itself a call then costs about 0.8 of what it costs through the
# convenience (14 against 18 us, benchmarks/op_overhead.py)
_lib = torch.library.Library("mfpsn", "DEF")
_lib.define(
    f"neuron(Tensor x, Tensor weight, Tensor gamma, Tensor beta, Tensor running_mean, Tensor running_var, {_AFFINE}, "
    f"*, float eps=1e-5, {_SURROGATE}, {_QUANTISER}, bool training=False, {_PLACE}) "
    "-> (Tensor spikes, Tensor mean, Tensor var)",
    tags=_TAGS,
)
_lib.define(
    "neuron_backward(Tensor grad, Tensor x, Tensor weight, Tensor gamma, Tensor beta, Tensor mean, Tensor var, "
    f"{_AFFINE}, *, float eps=1e-5, {_SURROGATE}, {_QUANTISER}, bool training=False, bool input_grad=True, {_PLACE}) "
    "-> (Tensor dx, Tensor dweight, Tensor dgamma, Tensor dbeta, Tensor dscale, Tensor dshift)",
    tags=_TAGS,
)
_lib.define(
    f"statistics(Tensor x, Tensor weight, {_AFFINE}, *, {_PLACE}) -> (Tensor mean, Tensor var)",
    tags=_TAGS,
)
_lib.define(
    f"fire(Tensor x, Tensor taps, Tensor bias, {_AFFINE}, *, {_PLACE}) -> Tensor",
    tags=_TAGS,
)
_lib.define(
    f"backward_reductions(Tensor grad, Tensor x, Tensor taps, Tensor bias, {_AFFINE}, *, {_SURROGATE}, {_PLACE}) "
    "-> (Tensor dtaps, Tensor dbias)",
    tags=_TAGS,
)
_lib.define(
    "backward_input(Tensor grad, Tensor x, Tensor taps, Tensor bias, Tensor weight, Tensor? offset=None, "
    f"Tensor? slope=None, {_AFFINE}, *, bool input_grad=True, {_SURROGATE}, {_PLACE}) "
    "-> (Tensor dx, Tensor dweight, Tensor dscale, Tensor dshift)",
    tags=_TAGS,
)

neuron = torch.ops.mfpsn.neuron
statistics = torch.ops.mfpsn.statistics
fire = torch.ops.mfpsn.fire
backward_reductions = torch.ops.mfpsn.backward_reductions
backward_input = torch.ops.mfpsn.backward_input


def _named(layer: str) -> str:
    return f"{layer}: " if layer else ""


def _sum_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in (x.dtype, weight.dtype) else torch.float32


def _check(
    shape: tuple[int, ...], dtype: torch.dtype, weight: tuple[int, ...], dilation: int, layout: str, layer: str
) -> Layout:
    """What shapes and constants must satisfy, ``shape`` and ``weight`` being those of the input and of W."""
    place = Layout.parse(layout)
    if not dtype.is_floating_point:
        raise TypeError(
            f"{_named(layer)}the input must be floating point, found {dtype}; convert it, e.g. with x.float()"
        )
    if len(shape) < 3:
        raise ValueError(
            f"{_named(layer)}the input must have at least 3 dims, "
            f"{'(T, N, C, *)' if place is Layout.TIME_FIRST else '(N, C, *, T)'}, found shape {tuple(shape)}"
        )
    if len(weight) != 2 or weight[1] < 1:
        raise ValueError(f"{_named(layer)}the weight must be (C, k) with k >= 1, found {tuple(weight)}")
    if shape[place.channel_dim] != weight[0]:
        raise ValueError(
            f"{_named(layer)}expected {weight[0]} channels in dim {place.channel_dim} of the {place} input, "
            f"found {shape[place.channel_dim]} in shape {tuple(shape)}"
        )
    if dilation < 1:
        raise ValueError(f"{_named(layer)}dilation must be at least 1, found {dilation}")
    return place


def _check_mask(mask: Tensor, x: Tensor, place: Layout, layer: str) -> None:
    wanted = (x.shape[place.time_dim], x.shape[place.batch_dim])
    if tuple(mask.shape) != wanted or mask.dtype != torch.bool:
        raise ValueError(
            f"{_named(layer)}the mask must be bool of shape (T, N) = {wanted}, "
            f"found {mask.dtype} of shape {tuple(mask.shape)}"
        )
    if mask.device != x.device:
        raise ValueError(f"{_named(layer)}the mask must be on {x.device} as the input is, found {mask.device}")


def _check_fake(x: Tensor, weight: Tensor, mask: Tensor | None, dilation: int, layout: str, layer: str) -> None:
    place = _check(x.shape, x.dtype, weight.shape, dilation, layout, layer)
    if mask is not None:
        _check_mask(mask, x, place, layer)


def _check_operands(x: Tensor, weight: Tensor, grad: Tensor | None, layer: str, vectors: dict) -> None:
    """Shapes and devices of what a kernel reads through bare pointers, for all kernels alike."""
    device, whole, channels = x.device, weight.shape, weight.shape[:1]
    for name, other in vectors.items():
        if other is None:
            continue
        wanted = whole if name == "taps" else channels
        if other.shape != wanted or other.device != device:
            raise ValueError(
                f"{_named(layer)}{name} must have shape {tuple(wanted)} on {device} as weight and input have, "
                f"found {tuple(other.shape)} on {other.device}"
            )
    if weight.device != device:
        raise ValueError(f"{_named(layer)}the input is on {device}, the neuron on {weight.device}; move one of them")
    if grad is not None and (grad.shape != x.shape or grad.device != device):
        raise ValueError(
            f"{_named(layer)}the gradient must be shaped as the input, {tuple(x.shape)} on {device}, "
            f"found {tuple(grad.shape)} on {grad.device}"
        )


def _check_training(x: Tensor, weight: Tensor, layer: str) -> None:
    if x.numel() <= weight.shape[0]:
        raise ValueError(
            f"{_named(layer)}expected more than 1 value per channel when training, found input of shape "
            f"{tuple(x.shape)}; give a larger batch or call .eval()"
        )


def _kernel(name: str, problem: Problem, layer: str) -> Kernel:
    """The kernel that is bound; else, and with one warning a layer where it cannot serve, the default kernel."""
    if not name:
        return default_kernel(problem)
    try:
        kernel = get_kernel(name)
        # the fallback is not asked: whoever names it gets it
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
            _named(layer),
            name,
            default.name,
            tuple(problem.shape),
            refusal,
        )
    return default


class _Bound(NamedTuple):
    parts: object
    call: Call


class _Settled(NamedTuple):
    parts: object
    layout: Layout
    dtype: torch.dtype


# What follows from shapes and constants is found once for all calls alike: found anew it took a fifth of a training
# step's time in Python
@functools.lru_cache(maxsize=1024)
def _settled(
    registered: int,  # changes with the registry, and with it the answer
    shape: torch.Size,
    weight: torch.Size,
    dtype: torch.dtype,
    wide: bool,
    device: torch.device,  # not its type alone: GPUs of one machine may differ in what they can run
    surrogate: str,
    gradient: str,
    training: bool,
    masked: bool,
    affine: bool,
    dilation: int,
    layout: str,
    method: str,
    layer: str,
) -> _Settled:
    place = _check(shape, dtype, weight, dilation, layout, layer)
    sums = torch.float64 if wide or dtype is torch.float64 else torch.float32
    # with float64 weights it is a kernel for float64 that has to serve, whatever the input
    problem = Problem(
        tuple(shape), place, sums if wide else dtype, device.type, weight[1], dilation, surrogate,
        str(Gradient.parse(gradient)), training, masked, affine,
    )  # fmt: skip
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        return _Settled(_kernel(method, problem, layer).parts, place, sums)


def _to(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    # asked first: a call of Tensor.to that has nothing to do takes ten times as long as the question
    return x if x is None or x.dtype is dtype else x.to(dtype)


def _bind(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    mask: Tensor | None,
    *,
    dilation: int,
    layout: str,
    method: str,
    layer: str,
    surrogate: str = "atan",
    alpha: float = 2.0,
    gradient: str = "straight-through",
    training: bool = False,
    grad: Tensor | None = None,
    **vectors: Tensor | None,
) -> _Bound:
    affine = scale is not None or shift is not None
    parts, place, dtype = _settled(
        version(), x.shape, weight.shape, x.dtype, weight.dtype is torch.float64, x.device, surrogate,
        gradient, training, mask is not None, affine, dilation, layout, method, layer,
    )  # fmt: skip
    if affine:
        vectors |= {"scale": scale, "shift": shift}
    _check_operands(x, weight, grad, layer, vectors)
    if mask is not None:
        _check_mask(mask, x, place, layer)
    return _Bound(
        parts, Call(place, dilation, dtype, get_surrogate(surrogate, alpha), _to(scale, dtype), _to(shift, dtype), mask)
    )


def _neuron(
    x,
    weight,
    gamma,
    beta,
    running_mean,
    running_var,
    scale=None,
    shift=None,
    mask=None,
    *,
    eps=1e-5,
    surrogate="atan",
    alpha=2.0,
    gradient="straight-through",
    min_exponent=MIN_EXPONENT,
    max_exponent=MAX_EXPONENT,
    training=False,
    dilation=1,
    layout="time_first",
    method="",
    layer="",
):
    check_exponent_bounds(min_exponent, max_exponent)
    parts, call = _bind(
        x, weight, scale, shift, mask,
        dilation=dilation, layout=layout, method=method, layer=layer, surrogate=surrogate, alpha=alpha,
        gradient=gradient, training=training, gamma=gamma, beta=beta, running_mean=running_mean,
        running_var=running_var,
    )  # fmt: skip
    dtype = call.dtype
    if training:
        _check_training(x, weight, layer)
        used = None, None
    else:
        used = _to(running_mean, dtype), _to(running_var, dtype)
    if x.numel() == 0:
        return torch.empty_like(x), weight.new_empty(0, dtype=dtype), weight.new_empty(0, dtype=dtype)
    folding = Folding(eps, gradient, min_exponent, max_exponent)
    spikes, mean, var = parts.forward(call, folding, x, _to(weight, dtype), _to(gamma, dtype), _to(beta, dtype), *used)
    if not training:
        mean, var = weight.new_empty(0, dtype=dtype), weight.new_empty(0, dtype=dtype)
    return spikes, mean, var


def _neuron_backward(
    grad,
    x,
    weight,
    gamma,
    beta,
    mean,
    var,
    scale=None,
    shift=None,
    mask=None,
    *,
    eps=1e-5,
    surrogate="atan",
    alpha=2.0,
    gradient="straight-through",
    min_exponent=MIN_EXPONENT,
    max_exponent=MAX_EXPONENT,
    training=False,
    input_grad=True,
    dilation=1,
    layout="time_first",
    method="",
    layer="",
):
    parts, call = _bind(
        x, weight, scale, shift, mask,
        dilation=dilation, layout=layout, method=method, layer=layer, surrogate=surrogate, alpha=alpha,
        gradient=gradient, training=training, grad=grad, gamma=gamma, beta=beta, mean=mean, var=var,
    )  # fmt: skip
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
        Folding(eps, gradient, min_exponent, max_exponent),
        grad,
        x,
        *(_to(p, dtype) for p in (weight, gamma, beta, mean, var)),
        training,
        input_grad,
    )
    return (
        x.new_empty(0) if dx is None else dx,
        _to(dweight, given[0].dtype),
        _to(dgamma, given[1].dtype),
        _to(dbeta, given[2].dtype),
        x.new_empty(0) if scale is None else dscale.to(scale.dtype),
        x.new_empty(0) if shift is None else dshift.to(shift.dtype),
    )


def settled_layer(
    x, weight, gamma, beta, running_mean, running_var, scale, shift, *, surrogate, gradient, min_exponent, max_exponent,
    training, dilation, layout, method, layer, **constants,
):  # fmt: skip
    """``Parts.layer`` of the kernel that serves this call, all checks done; None if there is none."""
    affine = scale is not None or shift is not None
    parts, _, dtype = _settled(
        version(), x.shape, weight.shape, x.dtype, weight.dtype is torch.float64, x.device, surrogate,
        gradient, training, False, affine, dilation, layout, method, layer,
    )  # fmt: skip
    if parts.layer is None or x.numel() == 0:
        return None
    check_exponent_bounds(min_exponent, max_exponent)
    vectors = {"gamma": gamma, "beta": beta, "running_mean": running_mean, "running_var": running_var}
    if affine:
        vectors |= {"scale": scale, "shift": shift}
    _check_operands(x, weight, None, layer, vectors)
    if training:
        _check_training(x, weight, layer)
    # what has to be cast goes through the op: float32 sums for a float32 or narrower input, float64 for float64
    if (x.dtype is torch.float64) is not (dtype is torch.float64):
        return None
    if weight.dtype is not dtype or any(v is not None and v.dtype is not dtype for v in vectors.values()):
        return None
    return parts.layer


def _statistics(x, weight, scale=None, shift=None, mask=None, *, dilation=1, layout="time_first", method="", layer=""):
    parts, call = _bind(
        x, weight, scale, shift, mask, dilation=dilation, layout=layout, method=method, layer=layer, training=True
    )
    if x.numel() == 0:
        return tuple(weight.new_zeros(weight.shape[0], dtype=call.dtype) for _ in range(2))
    return parts.statistics(call, x, _to(weight, call.dtype))


def _fire(x, taps, bias, scale=None, shift=None, mask=None, *, dilation=1, layout="time_first", method="", layer=""):
    parts, call = _bind(
        x, taps, scale, shift, mask, dilation=dilation, layout=layout, method=method, layer=layer, bias=bias
    )
    if x.numel() == 0:
        return torch.empty_like(x)
    return parts.fire(call, x, _to(taps, call.dtype), _to(bias, call.dtype))


def _backward_reductions(
    grad,
    x,
    taps,
    bias,
    scale=None,
    shift=None,
    mask=None,
    *,
    surrogate="atan",
    alpha=2.0,
    dilation=1,
    layout="time_first",
    method="",
    layer="",
):
    parts, call = _bind(
        x, taps, scale, shift, mask,
        dilation=dilation, layout=layout, method=method, layer=layer, surrogate=surrogate, alpha=alpha, training=True,
        grad=grad, bias=bias,
    )  # fmt: skip
    if x.numel() == 0:
        return taps.new_zeros(taps.shape, dtype=call.dtype), taps.new_zeros(taps.shape[0], dtype=call.dtype)
    dtaps, dbias, _ = parts.backward_reductions(call, grad, x, _to(taps, call.dtype), _to(bias, call.dtype))
    return dtaps, dbias


def _backward_input(
    grad,
    x,
    taps,
    bias,
    weight,
    offset=None,
    slope=None,
    scale=None,
    shift=None,
    mask=None,
    *,
    input_grad=True,
    surrogate="atan",
    alpha=2.0,
    dilation=1,
    layout="time_first",
    method="",
    layer="",
):
    parts, call = _bind(
        x, weight, scale, shift, mask,
        dilation=dilation, layout=layout, method=method, layer=layer, surrogate=surrogate, alpha=alpha, training=True,
        grad=grad, taps=taps, bias=bias, offset=offset, slope=slope,
    )  # fmt: skip
    if x.numel() == 0:
        none = weight.new_empty(0)
        zero = weight.new_zeros(weight.shape[0], dtype=call.dtype)
        return (
            torch.empty_like(x) if input_grad else x.new_empty(0),
            none if offset is None else weight.new_zeros(weight.shape, dtype=call.dtype),
            none if scale is None else zero,
            none.clone() if shift is None else zero.clone(),
        )
    offset, slope = _to(offset, call.dtype), _to(slope, call.dtype)
    results = parts.backward_input(
        call,
        grad,
        x,
        _to(taps, call.dtype),
        _to(bias, call.dtype),
        _to(weight, call.dtype),
        offset,
        slope,
        None,
        input_grad,
    )
    none = (x, weight, weight, weight)
    return tuple(like.new_empty(0) if r is None else r for r, like in zip(results, none, strict=True))


def _fake_neuron(
    x, weight, gamma, beta, running_mean, running_var, scale=None, shift=None, mask=None, *,
    training=False, dilation=1, layout="time_first", layer="", **constants,
):  # fmt: skip
    _check_fake(x, weight, mask, dilation, layout, layer)
    if training:
        _check_training(x, weight, layer)
    size = weight.shape[0] if training else 0
    dtype = _sum_dtype(x, weight)
    return torch.empty_like(x), weight.new_empty(size, dtype=dtype), weight.new_empty(size, dtype=dtype)


def _fake_neuron_backward(
    grad, x, weight, gamma, beta, mean, var, scale=None, shift=None, mask=None, *, input_grad=True, **constants
):
    return (
        torch.empty_like(x) if input_grad else x.new_empty(0),
        weight.new_empty(weight.shape),
        gamma.new_empty(gamma.shape),
        beta.new_empty(beta.shape),
        x.new_empty(0) if scale is None else scale.new_empty(scale.shape),
        x.new_empty(0) if shift is None else shift.new_empty(shift.shape),
    )


def _fake_statistics(
    x, weight, scale=None, shift=None, mask=None, *, dilation=1, layout="time_first", method="", layer=""
):
    _check_fake(x, weight, mask, dilation, layout, layer)
    channel = weight.new_empty(weight.shape[0], dtype=_sum_dtype(x, weight))
    return channel, torch.empty_like(channel)


def _fake_fire(x, taps, bias, scale=None, shift=None, mask=None, *, dilation=1, layout="time_first", layer="", **rest):
    _check_fake(x, taps, mask, dilation, layout, layer)
    return torch.empty_like(x)


def _fake_backward_reductions(grad, x, taps, bias, *rest, **constants):
    dtype = _sum_dtype(x, taps)
    return taps.new_empty(taps.shape, dtype=dtype), taps.new_empty(taps.shape[0], dtype=dtype)


def _fake_backward_input(
    grad, x, taps, bias, weight, offset=None, slope=None, scale=None, shift=None, mask=None, *,
    input_grad=True, **constants,
):  # fmt: skip
    dtype, channels = _sum_dtype(x, weight), weight.shape[0]
    return (
        torch.empty_like(x) if input_grad else x.new_empty(0),
        weight.new_empty(0) if offset is None else weight.new_empty(weight.shape, dtype=dtype),
        weight.new_empty(0) if scale is None else weight.new_empty(channels, dtype=dtype),
        weight.new_empty(0) if shift is None else weight.new_empty(channels, dtype=dtype),
    )


for _name, _run, _fake in (
    ("neuron", _neuron, _fake_neuron),
    ("neuron_backward", _neuron_backward, _fake_neuron_backward),
    ("statistics", _statistics, _fake_statistics),
    ("fire", _fire, _fake_fire),
    ("backward_reductions", _backward_reductions, _fake_backward_reductions),
    ("backward_input", _backward_input, _fake_backward_input),
):
    _lib.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"mfpsn::{_name}", _fake, lib=_lib)


def unwatched(*tensors: Tensor) -> bool:
    """Whether nobody would notice that the dispatcher is passed by: no mode, no subclass of Tensor, no profiler.

    Through it once more, with twenty arguments, takes a tenth of a training step's time in Python.
    """
    return (
        torch._C._len_torch_dispatch_stack() == 0
        and not torch.autograd._profiler_enabled()
        and all(type(t) in (Tensor, torch.nn.Parameter) for t in tensors)
    )


class _Neuron(torch.autograd.Function):
    """Autograd of ``mfpsn::neuron``.

    Not through torch.library.register_autograd: for each call it walks the schema's arguments in Python, in quadratic
    time, which at twenty arguments takes three times as long as the call itself (140 us against 50 us).
    """

    @staticmethod
    def forward(ctx, constants, x, weight, gamma, beta, running_mean, running_var, scale, shift, mask):
        with torch._C._AutoDispatchBelowAutograd():
            run = _neuron if unwatched(x, weight) else neuron
            spikes, mean, var = run(x, weight, gamma, beta, running_mean, running_var, scale, shift, mask, **constants)
        ctx.constants = constants
        # in training the running statistics are not saved: the caller updates them in place afterwards
        used = (mean, var) if constants.get("training", False) else (running_mean, running_var)
        ctx.save_for_backward(x, weight, gamma, beta, *used, scale, shift, mask)
        ctx.mark_non_differentiable(mean, var)
        ctx.set_materialize_grads(False)
        return spikes, mean, var

    @staticmethod
    def backward(ctx, grad, _mean_grad, _var_grad):
        if grad is None:
            return (None,) * 10
        if torch.is_grad_enabled():  # create_graph=True: what would come of it is a gradient of zero, without a word
            layer = _named(ctx.constants.get("layer", ""))
            raise RuntimeError(f"{layer}a surrogate gradient has no derivative; take gradients without create_graph")
        _, *needs = ctx.needs_input_grad
        saved = ctx.saved_tensors
        run = _neuron_backward if unwatched(grad, *saved[:2]) else torch.ops.mfpsn.neuron_backward
        dx, dweight, dgamma, dbeta, dscale, dshift = run(grad, *saved, input_grad=needs[0], **ctx.constants)
        grads = (dx, dweight, dgamma, dbeta, None, None, dscale, dshift, None)
        return None, *(g if wanted else None for g, wanted in zip(grads, needs, strict=True))


def _differentiable(x, weight, gamma, beta, running_mean, running_var, scale=None, shift=None, mask=None, **constants):
    tensors = (x, weight, gamma, beta, running_mean, running_var, scale, shift, mask)
    # a dual tensor requires no grad: without this its tangent would be dropped, and zero stand for the derivative
    if forward_ad._current_level >= 0 and any(
        t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors
    ):
        raise RuntimeError(f"{_named(constants.get('layer', ''))}the neuron has no forward-mode derivative: Θ has none")
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        if torch._C._functorch.peek_interpreter_stack() is not None:  # it would want the derivative's derivative, too
            raise RuntimeError(
                f"{_named(constants.get('layer', ''))}a neuron cannot be differentiated by torch.func; "
                "call backward(), or torch.autograd.grad"
            )
        return _Neuron.apply(constants, *tensors)
    with torch._C._AutoDispatchBelowAutograd():
        return neuron(*tensors, **constants)


_lib.impl("neuron", _differentiable, "Autograd")


def _autocast(device: str, key: str):
    def cast(x, *args, **constants):
        # X alone takes the autocast dtype; weights, statistics and fold stay as they are. float64 stays, as
        # autocast itself leaves it.
        if x.is_floating_point() and x.dtype is not torch.float64:
            x = x.to(torch.get_autocast_dtype(device))
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))):
            return neuron(x, *args, **constants)

    return cast


for _device, _key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
    _lib.impl("neuron", _autocast(_device, _key), _key)
