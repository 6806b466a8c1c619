"""The canonical op ``mfpsn::neuron``, its backward, and its parts, on the kernel that is bound or of highest rank.

Every neuron of every graph is one call of this op, whatever computes it. Appendix C of the paper: the temporal
filter runs once with W for the batch statistics and once with W_q = Q(γ/√(σ²+ε)·W) for the spikes.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .constants import ALL, PLACE, SURROGATE, NeuronConstants
from .kernel import Call
from .layout import Layout
from .registry import FALLBACK_KERNEL, Kernel, Problem, default_kernel, get_kernel, version

__all__ = ["backward_input", "backward_reductions", "fire", "neuron", "statistics"]

_log = logging.getLogger("mfpsn_fx")
_warned: set[tuple[str, str, str]] = set()

_AFFINE = "Tensor? scale=None, Tensor? shift=None, Tensor? mask=None"

# Kernels take X with any strides, and results have X's. Without the tag Inductor copies what it has laid out otherwise
# (channels last, say) to the strides that tracing saw: 7 copies in a training step of SEW-ResNet-18.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout)

# define/impl, not custom_op: beyond the work itself a call then costs about 0.8 of what it costs through the
# convenience (14 against 18 us, benchmarks/op_overhead.py)
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
        NeuronConstants.schema(PLACE),
        "(Tensor mean, Tensor var)",
    ),
    (
        "fire",
        f"Tensor x, Tensor taps, Tensor bias, {_AFFINE}",
        NeuronConstants.schema(PLACE),
        "Tensor",
    ),
    (
        "backward_reductions",
        f"Tensor grad, Tensor x, Tensor taps, Tensor bias, {_AFFINE}",
        NeuronConstants.schema(SURROGATE + PLACE),
        "(Tensor dtaps, Tensor dbias)",
    ),
    (
        "backward_input",
        "Tensor grad, Tensor x, Tensor taps, Tensor bias, Tensor weight, Tensor? offset=None, Tensor? slope=None, "
        f"{_AFFINE}",
        f"{NeuronConstants.schema(SURROGATE + PLACE)}, bool input_grad=True",
        "(Tensor dx, Tensor dweight, Tensor dscale, Tensor dshift)",
    ),
):
    _lib.define(f"{_name}({_tensors}, *, {_constants}) -> {_results}", tags=_TAGS)

neuron = torch.ops.mfpsn.neuron
statistics = torch.ops.mfpsn.statistics
fire = torch.ops.mfpsn.fire
backward_reductions = torch.ops.mfpsn.backward_reductions
backward_input = torch.ops.mfpsn.backward_input


def _named(layer: str) -> str:
    return f"{layer}: " if layer else ""


def _sum_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in (x.dtype, weight.dtype) else torch.float32


def _check(shape: tuple[int, ...], dtype: torch.dtype, weight: tuple[int, ...], constants: NeuronConstants) -> None:
    """Raise unless ``shape`` and ``weight``, those of the input and of W, fit each other and the layout."""
    place, layer = constants.place, constants.layer
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


def _check_mask(mask: Tensor, x: Tensor, constants: NeuronConstants) -> None:
    place, layer = constants.place, constants.layer
    wanted = (x.shape[place.time_dim], x.shape[place.batch_dim])
    if tuple(mask.shape) != wanted or mask.dtype != torch.bool:
        raise ValueError(
            f"{_named(layer)}the mask must be bool of shape (T, N) = {wanted}, "
            f"found {mask.dtype} of shape {tuple(mask.shape)}"
        )
    if mask.device != x.device:
        raise ValueError(f"{_named(layer)}the mask must be on {x.device} as the input is, found {mask.device}")


def _check_fake(x: Tensor, weight: Tensor, mask: Tensor | None, constants: NeuronConstants) -> None:
    _check(x.shape, x.dtype, weight.shape, constants)
    if mask is not None:
        _check_mask(mask, x, constants)


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


# What follows from shapes and constants is found once for all calls that have them: found in each call it took a fifth
# of a training step's time in Python
@functools.lru_cache(maxsize=1024)
def _resolve_kernel(
    registered: int,  # changes with the registry, and with it the answer
    shape: torch.Size,
    weight: torch.Size,
    dtype: torch.dtype,
    wide: bool,
    device: torch.device,  # not its type alone: GPUs of one machine may differ in what they can run
    masked: bool,
    affine: bool,
    constants: NeuronConstants,
) -> tuple[object, torch.dtype]:
    """Return the parts that serve such a call, and the dtype of its weights and sums."""
    _check(shape, dtype, weight, constants)
    sums = torch.float64 if wide or dtype is torch.float64 else torch.float32
    # with float64 weights it is a kernel for float64 that has to serve, whatever the input
    problem = Problem.of(constants, shape, sums if wide else dtype, device.type, weight[1], masked, affine)
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        return _kernel(constants.method, problem, constants.layer).parts, sums


def _to(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    # asked first: a call of Tensor.to that has nothing to do takes ten times as long as the question
    return x if x is None or x.dtype is dtype else x.to(dtype)


def _bind(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    mask: Tensor | None,
    constants: NeuronConstants,
    grad: Tensor | None = None,
    **vectors: Tensor | None,
) -> tuple[object, Call]:
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
    return parts, Call(constants, dtype, _to(scale, dtype), _to(shift, dtype), mask)


def _neuron(
    x, weight, gamma, beta, running_mean, running_var, scale=None, shift=None, mask=None, *,
    constants: NeuronConstants,
):  # fmt: skip
    parts, call = _bind(
        x, weight, scale, shift, mask, constants,
        gamma=gamma, beta=beta, running_mean=running_mean, running_var=running_var,
    )  # fmt: skip
    dtype, training = call.dtype, constants.training
    if training:
        _check_training(x, weight, constants.layer)
        used = None, None
    else:
        used = _to(running_mean, dtype), _to(running_var, dtype)
    if x.numel() == 0:
        return torch.empty_like(x), weight.new_empty(0, dtype=dtype), weight.new_empty(0, dtype=dtype)
    spikes, mean, var = parts.forward(call, x, _to(weight, dtype), _to(gamma, dtype), _to(beta, dtype), *used)
    if not training:
        mean, var = weight.new_empty(0, dtype=dtype), weight.new_empty(0, dtype=dtype)
    return spikes, mean, var


def _neuron_backward(
    grad, x, weight, gamma, beta, mean, var, scale=None, shift=None, mask=None, *,
    constants: NeuronConstants, input_grad=True,
):  # fmt: skip
    parts, call = _bind(x, weight, scale, shift, mask, constants, grad=grad, gamma=gamma, beta=beta, mean=mean, var=var)
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
        *(_to(p, dtype) for p in (weight, gamma, beta, mean, var)),
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
    """Return ``NeuronKernel.layer`` of the kernel that serves this call, all checks done; None if there is none."""
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
    # what has to be cast goes through the op: float32 sums for a float32 or narrower input, float64 for float64
    if (x.dtype is torch.float64) is not (dtype is torch.float64):
        return None
    if weight.dtype is not dtype or any(v is not None and v.dtype is not dtype for v in vectors.values()):
        return None
    return parts.layer


def _statistics(x, weight, scale=None, shift=None, mask=None, *, constants: NeuronConstants):
    parts, call = _bind(x, weight, scale, shift, mask, constants)
    if x.numel() == 0:
        return tuple(weight.new_zeros(weight.shape[0], dtype=call.dtype) for _ in range(2))
    return parts.statistics(call, x, _to(weight, call.dtype))


def _fire(x, taps, bias, scale=None, shift=None, mask=None, *, constants: NeuronConstants):
    parts, call = _bind(x, taps, scale, shift, mask, constants, bias=bias)
    if x.numel() == 0:
        return torch.empty_like(x)
    return parts.fire(call, x, _to(taps, call.dtype), _to(bias, call.dtype))


def _backward_reductions(
    grad, x, taps, bias, scale=None, shift=None, mask=None, *, constants: NeuronConstants
):  # fmt: skip
    parts, call = _bind(x, taps, scale, shift, mask, constants, grad=grad, bias=bias)
    if x.numel() == 0:
        return taps.new_zeros(taps.shape, dtype=call.dtype), taps.new_zeros(taps.shape[0], dtype=call.dtype)
    dtaps, dbias, _ = parts.backward_reductions(call, grad, x, _to(taps, call.dtype), _to(bias, call.dtype))
    return dtaps, dbias


def _backward_input(
    grad, x, taps, bias, weight, offset=None, slope=None, scale=None, shift=None, mask=None, *,
    constants: NeuronConstants, input_grad=True,
):  # fmt: skip
    parts, call = _bind(
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
    constants: NeuronConstants,
):  # fmt: skip
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


def _with_value(function: Callable, **implied: object) -> Callable:
    """``function`` as the dispatcher calls it: with keyword arguments, defaults left out, in place of their value."""
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
    _lib.impl(_name, _with_value(_run, **_implied), "CompositeExplicitAutograd")
    torch.library.register_fake(f"mfpsn::{_name}", _with_value(_fake, **_implied), lib=_lib)


_PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None)))


def unwatched(*tensors: Tensor | None) -> bool:
    """Return True if no dispatch mode, tensor subclass or profiler is active, so that the dispatcher can be bypassed.

    For neurons with a mask, and kernels without a layer (see eager.py): through it once more, forward and backward,
    a training step takes 1.13 times as long on the least input, 1.02 times at T = 2 of ``benchmarks/neuron.py``, and at
    T = 4 no longer.
    """
    return (
        torch._C._len_torch_dispatch_stack() == 0
        and not torch.autograd._profiler_enabled()
        and _PLAIN.issuperset(map(type, tensors))
    )


class _Neuron(torch.autograd.Function):
    """Autograd of ``mfpsn::neuron``.

    Not through torch.library.register_autograd: for each call it walks the schema's arguments in Python, in quadratic
    time, which at twenty arguments takes three times as long as the call itself (140 us against 50 us).
    """

    @staticmethod
    def forward(ctx, constants, *tensors):
        x, weight, gamma, beta, running_mean, running_var, scale, shift, mask = tensors
        with torch._C._AutoDispatchBelowAutograd():
            if unwatched(x, weight):
                spikes, mean, var = _neuron(*tensors, constants=constants)
            else:
                spikes, mean, var = neuron(*tensors, **constants.arguments(ALL))
        ctx.constants = constants
        # in training the running statistics are not saved: the caller updates them in place afterwards
        used = (mean, var) if constants.training else (running_mean, running_var)
        ctx.save_for_backward(x, weight, gamma, beta, *used, scale, shift, mask)
        ctx.mark_non_differentiable(mean, var)
        ctx.set_materialize_grads(False)
        return spikes, mean, var

    @staticmethod
    def backward(ctx, grad, _mean_grad, _var_grad):
        if grad is None:
            return (None,) * 10
        constants = ctx.constants
        if torch.is_grad_enabled():  # create_graph=True: what would come of it is a gradient of zero, without a word
            raise RuntimeError(
                f"{_named(constants.layer)}a surrogate gradient has no derivative; take gradients without create_graph"
            )
        _, *needs = ctx.needs_input_grad
        saved = ctx.saved_tensors
        if unwatched(grad, *saved[:2]):
            found = _neuron_backward(grad, *saved, constants=constants, input_grad=needs[0])
        else:
            found = torch.ops.mfpsn.neuron_backward(grad, *saved, **constants.arguments(ALL), input_grad=needs[0])
        dx, dweight, dgamma, dbeta, dscale, dshift = found
        grads = (dx, dweight, dgamma, dbeta, None, None, dscale, dshift, None)
        return None, *(g if wanted else None for g, wanted in zip(grads, needs, strict=True))


def _differentiable(x, weight, gamma, beta, running_mean, running_var, scale=None, shift=None, mask=None, **keywords):
    tensors = (x, weight, gamma, beta, running_mean, running_var, scale, shift, mask)
    # a dual tensor requires no grad: without this its tangent would be dropped, and zero stand for the derivative
    if forward_ad._current_level >= 0 and any(
        t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors
    ):
        raise RuntimeError(f"{_named(keywords.get('layer', ''))}the neuron has no forward-mode derivative: Θ has none")
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        if torch._C._functorch.peek_interpreter_stack() is not None:  # it would want the derivative's derivative, too
            raise RuntimeError(
                f"{_named(keywords.get('layer', ''))}a neuron cannot be differentiated by torch.func; "
                "call backward(), or torch.autograd.grad"
            )
        return _Neuron.apply(NeuronConstants.checked(**keywords), *tensors)
    with torch._C._AutoDispatchBelowAutograd():
        return neuron(*tensors, **keywords)


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
