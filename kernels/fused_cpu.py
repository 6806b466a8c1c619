"""The fused C++ kernel for the CPU: H is never written, each part reads its inputs once."""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from .cpu_build import library, unavailable
from .fold import Folding
from .layout import Layout, uniform_stride
from .parts import Call, Parts
from .quantiser import Gradient
from .registry import Problem, register_kernel

_SURROGATES = {"atan": 0, "rational": 1, "sigmoid": 2}
_GRADIENTS = {str(Gradient.STRAIGHT_THROUGH): 0, str(Gradient.ROUND_ONLY): 1, str(Gradient.NONE): 2}
_SUFFIX = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}


class _View(ctypes.Structure):
    _fields_ = [
        ("st", ctypes.c_int64),
        ("sn", ctypes.c_int64),
        ("offset", ctypes.c_void_p),
        ("sj", ctypes.c_int64),
    ]


class _Problem(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("steps", "batch", "elements", "channels", "inner", "order", "dilation")),
        ("surrogate", ctypes.c_int64),
        ("alpha", ctypes.c_double),
        ("scale", ctypes.c_void_p),
        ("shift", ctypes.c_void_p),
        ("mask", ctypes.c_void_p),
    ]


class _Folding(ctypes.Structure):
    _fields_ = [
        ("eps", ctypes.c_double),
        *((name, ctypes.c_int64) for name in ("gradient", "min_exponent", "max_exponent", "training")),
    ]


class _Geometry:
    """A tensor's elements (all dims but T and N) in the order in which they lie in memory: no strides are refused."""

    def __init__(self, shape: tuple[int, ...], strides: tuple[int, ...], layout: Layout) -> None:
        time, batch = layout.time_dim % len(shape), layout.batch_dim
        self.steps, self.batch, self.channels = shape[time], shape[batch], shape[layout.channel_dim]
        dims = sorted((d for d in range(len(shape)) if d not in (time, batch)), key=lambda d: -strides[d])
        self.dims = tuple(dims)
        inside = self.dims[self.dims.index(layout.channel_dim) + 1 :]
        self.inner = torch.Size(shape[d] for d in inside).numel()
        self.elements = torch.Size(shape[d] for d in dims).numel()


class _Operand:
    """A tensor of given strides as the C++ side sees it; keeps the table of offsets alive."""

    def __init__(self, shape: tuple[int, ...], strides: tuple[int, ...], layout: Layout, dims: tuple[int, ...]) -> None:
        sizes, steps = [shape[d] for d in dims], [strides[d] for d in dims]
        uniform, self.table = uniform_stride(sizes, steps), None
        if uniform is None:
            self.table = torch.zeros(1, dtype=torch.int64, device="cpu")
            for size, step in zip(sizes, steps, strict=True):
                self.table = (self.table[:, None] + torch.arange(size, device="cpu") * step).flatten()
        self.view = _View(
            strides[layout.time_dim],
            strides[layout.batch_dim],
            None if self.table is None else self.table.data_ptr(),
            0 if uniform is None else uniform,
        )
        self.address = ctypes.addressof(self.view)


# A table of offsets is as large as one step of one sample; few are kept
_operand = functools.lru_cache(maxsize=64)(_Operand)


class _Prepared:
    """What calls with the same sizes and constants share, so that it is found once."""

    def __init__(
        self,
        shape: torch.Size,
        strides: tuple[int, ...],
        layout: Layout,
        order: int,
        dilation: int,
        surrogate: str,
        alpha: float,
    ) -> None:
        g = self.geometry = _Geometry(tuple(shape), strides, layout)
        self.sizes = (g.steps, g.batch, g.elements, g.channels, g.inner, order, dilation, _SURROGATES[surrogate], alpha)
        self.problem = _Problem(*self.sizes)
        self.address = ctypes.addressof(self.problem)


_prepared = functools.lru_cache(maxsize=256)(_Prepared)


@functools.cache
def _function(part: str, dtype: torch.dtype, arguments: int) -> ctypes._CFuncPtr:
    function = getattr(library(), f"mfpsn_{part}_{_SUFFIX[dtype]}")
    # addresses are passed as they are, None as a null pointer
    function.argtypes = [ctypes.c_void_p] * arguments
    return function


def _error() -> str:
    """What the library met when a call failed on this thread, other than that memory ran out."""
    tell = library().mfpsn_error
    tell.restype = ctypes.c_char_p
    return (tell() or b"").decode(errors="replace")


class _Run:
    """One call into the library: sizes, constants, and what has to stay alive meanwhile."""

    def __init__(self, call: Call, x: Tensor, order: int) -> None:
        self.layout, self.order, self.dtype = call.layout, order, x.dtype
        surrogate = call.surrogate
        shared = _prepared(x.shape, x.stride(), call.layout, order, call.dilation, surrogate.name, surrogate.alpha)
        # kept while the call runs: the cache may drop it meanwhile, in another thread
        self.dims, self.problem, self.alive = shared.geometry.dims, shared.address, [shared]
        if call.scale is not None or call.shift is not None or call.mask is not None:
            own = _Problem(*shared.sizes, *self.vectors(call.scale, call.shift, call.mask))
            self.problem = ctypes.addressof(own)
            self.alive.append(own)

    def operand(self, x: Tensor) -> tuple[int, int]:
        """Addresses of the view of ``x`` and of its values."""
        operand = _operand(x.shape, x.stride(), self.layout, self.dims)
        self.alive.append(operand)
        return operand.address, x.data_ptr()

    def vectors(self, *tensors: Tensor | None) -> list[int | None]:
        """Addresses of parameters, made contiguous."""
        dense = [t if t is None or t.is_contiguous() else t.contiguous() for t in tensors]
        self.alive.append(dense)
        return [None if t is None else t.data_ptr() for t in dense]

    def __call__(self, part: str, *addresses: int | None) -> None:
        code = _function(part, self.dtype, 1 + len(addresses))(self.problem, *addresses)
        if code == 1:
            raise MemoryError(f"fused-cpp: no memory for the scratch space of {part}, order {self.order}")
        if code:
            raise RuntimeError(f"fused-cpp: {part} of order {self.order} failed: {_error()}")


def _supports(problem: Problem) -> str | None:
    if problem.surrogate not in _SURROGATES:
        return f"knows the surrogates {', '.join(_SURROGATES)}, not {problem.surrogate}"
    return None


@register_kernel("fused-cpp", devices=["cpu"], supports=_supports, unavailable=unavailable, rank=30, one_read=True)
class FusedCpu(Parts):
    """C++: tiles of T steps in cache, taps summed in order, H never written; any strides, both layouts."""

    def layer(
        self, x, weight, gamma, beta, running_mean, running_var, scale, shift, momentum, update, *, eps, surrogate,
        alpha, gradient, min_exponent, max_exponent, training, dilation, layout, method, layer,
    ):  # fmt: skip
        return torch.ops.mfpsn_cpu.layer.default(
            x, weight, gamma, beta, running_mean, running_var, scale, shift, momentum, update, eps,
            _SURROGATES[surrogate], alpha, _GRADIENTS[gradient], min_exponent, max_exponent, training, dilation,
            layout == "time_last", layer,
        )  # fmt: skip

    def statistics(self, call, x, weight):
        x = _wide(call, x)
        run = _Run(call, x, weight.shape[1])
        mean, var = (weight.new_empty(weight.shape[0], dtype=call.dtype) for _ in range(2))
        run("statistics", *run.operand(x), *run.vectors(weight, mean, var))
        return mean, var

    def fire(self, call, x, taps, bias):
        given, x = x, _wide(call, x)
        run = _Run(call, x, taps.shape[1])
        spikes = torch.empty_like(x)
        run("fire", *run.operand(x), *run.vectors(taps, bias), *run.operand(spikes))
        return _narrow(given, spikes)

    def backward_reductions(self, call, grad, x, taps, bias):
        x, grad = _wide(call, x), _wide(call, grad.to(x.dtype))
        run = _Run(call, x, taps.shape[1])
        dtaps, dbias = taps.new_empty(taps.shape), bias.new_empty(bias.shape)
        run("backward_reductions", *run.operand(x), *run.operand(grad), *run.vectors(taps, bias, dtaps, dbias))
        return dtaps, dbias, None

    def backward_input(self, call, grad, x, taps, bias, weight, offset, slope, cache=None, input_grad=True):
        affine = call.scale is not None or call.shift is not None
        if not (input_grad or affine or offset is not None):
            return None, None, None, None
        given, x = x, _wide(call, x)
        grad = _wide(call, grad.to(given.dtype))
        run = _Run(call, x, taps.shape[1])
        dx = torch.empty_like(x) if input_grad else None
        dweight = None if offset is None else torch.empty_like(weight, memory_format=torch.contiguous_format)
        dscale, dshift = _like(call.scale), _like(call.shift)
        run(
            "backward_input", *run.operand(x), *run.operand(grad),
            *run.vectors(taps, bias, weight, offset, slope), *_target(run, x, dx),
            *run.vectors(dweight, dscale, dshift),
        )  # fmt: skip
        return None if dx is None else _narrow(given, dx), dweight, dscale, dshift

    def forward(self, call, folding, x, weight, gamma, beta, mean, var):
        given, x, training = x, _wide(call, x), mean is None
        run = _Run(call, x, weight.shape[1])
        if training:
            mean, var = torch.empty_like(gamma), torch.empty_like(gamma)
        spikes = torch.empty_like(x)
        constants = _folding(folding, training)
        run(
            "forward", ctypes.addressof(constants), *run.operand(x), *run.vectors(weight, gamma, beta, mean, var),
            *run.operand(spikes),
        )  # fmt: skip
        return _narrow(given, spikes), mean, var

    def backward(self, call, folding, grad, x, weight, gamma, beta, mean, var, training, input_grad):
        given, x = x, _wide(call, x)
        grad = _wide(call, grad.to(given.dtype))
        run = _Run(call, x, weight.shape[1])
        dx = torch.empty_like(x) if input_grad else None
        dweight = torch.empty_like(weight, memory_format=torch.contiguous_format)
        dgamma, dbeta = torch.empty_like(gamma), torch.empty_like(gamma)
        dscale, dshift = _like(call.scale), _like(call.shift)
        constants = _folding(folding, training)
        run(
            "backward", ctypes.addressof(constants), *run.operand(x), *run.operand(grad),
            *run.vectors(weight, gamma, beta, mean, var), *_target(run, x, dx),
            *run.vectors(dweight, dgamma, dbeta, dscale, dshift),
        )  # fmt: skip
        return None if dx is None else _narrow(given, dx), dweight, dgamma, dbeta, dscale, dshift


def _wide(call: Call, x: Tensor) -> Tensor:
    """float64 sums of a narrower input: it is lifted first."""
    return x.double() if call.dtype is torch.float64 else x


def _narrow(given: Tensor, out: Tensor) -> Tensor:
    return out if out.dtype is given.dtype else torch.empty_like(given).copy_(out)


def _like(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else torch.empty_like(vector, memory_format=torch.contiguous_format)


def _target(run: _Run, x: Tensor, dx: Tensor | None) -> tuple[int, int | None]:
    """View and address for dX; no address where it is not wanted."""
    return run.operand(dx) if dx is not None else (run.operand(x)[0], None)


def _folding(folding: Folding, training: bool) -> _Folding:
    eps, gradient, min_exponent, max_exponent = folding
    return _Folding(eps, _GRADIENTS[str(gradient)], min_exponent, max_exponent, training)
