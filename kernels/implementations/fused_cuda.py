"""Fused CUDA kernel: H is never written to memory, each launch reads its tensors once, sums are deterministic."""

from __future__ import annotations

import contextlib
import ctypes
import functools

import torch
from torch import Tensor

from ..build import cuda as cuda_build
from ..constants import NeuronConstants
from ..kernel import Call, NeuronKernel
from ..layout import Layout, uniform_stride
from ..quantizer import Gradient
from ..registry import Problem, register_kernel
from .fused_cuda_plan import LIMIT, MAX_ORDER, MAX_ORDER_FLOAT64, Geometry, Plan, plan

_SURROGATES = {"atan": 0, "rational": 1, "sigmoid": 2}
_QUANTIZERS = {Gradient.NONE: 0, Gradient.STRAIGHT_THROUGH: 1, Gradient.ROUND_ONLY: 2}
_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}
_MAX_STEPS = 2**24  # the kernels count steps, and dilations up to their number, in 32 bits
_STATISTICS, _FINISH_STATISTICS, _FOLD, _FIRE = 1, 2, 4, 8
_REDUCTIONS, _FINISH_REDUCTIONS, _INPUT, _FINISH_INPUT = 16, 32, 64, 128


# Called through ctypes instead of torch ops, unlike the C++ library: its sources include no PyTorch header, so that one
# build, even one made on another machine (``build --arch``), serves every release of PyTorch.
class _View(ctypes.Structure):
    """Strides of a tensor in elements."""

    _fields_ = [(name, ctypes.c_int64) for name in ("time", "batch", "channel", "position")]


_VECTORS = ("scale", "shift", "weight", "gamma", "beta", "mean", "var", "taps", "bias", "offset", "slope", "dtaps",
            "dbias", "dweight", "dgamma", "dbeta", "dscale", "dshift", "partial")  # fmt: skip


class _Arguments(ctypes.Structure):
    """Arguments of the library's entry point, with the fields of csrc/cuda/types.cuh."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("dtype", "device", "steps", "batch", "channels", "positions", "order",
                                              "dilation", *Plan._fields, "grid_limit", "surrogate", "quantizer",
                                              "min_exponent", "max_exponent", "chain", "training", "input_grad")),
        *((name, ctypes.c_double) for name in ("alpha", "eps")),
        *((name, _View) for name in ("x_view", "grad_view", "out_view")),
        *((name, ctypes.c_void_p) for name in ("x", "grad", "out", "mask", *_VECTORS)),
    ]  # fmt: skip


class Device:
    """Access to the GPU and the compiled library; tests replace it by an emulation on the host."""

    grid_limit = LIMIT

    def library(self, device: torch.device) -> ctypes.CDLL:
        """Return the compiled kernels for ``device``."""
        return _declare_functions(cuda_build.library(torch.cuda.get_device_capability(device)))

    def processors(self, device: torch.device) -> int:
        """Return the number of multiprocessors of ``device``."""
        return torch.cuda.get_device_properties(device).multi_processor_count

    def stream(self, device: torch.device) -> int:
        """Return the handle of PyTorch's current stream."""
        return torch.cuda.current_stream(device).cuda_stream

    def guard(self, device: torch.device) -> contextlib.AbstractContextManager:
        """Return a context in which ``device`` is the current device."""
        return torch.cuda.device(device)


@functools.cache
def _declare_functions(library: ctypes.CDLL) -> ctypes.CDLL:
    """Declare the types of the library's functions; ``RuntimeError`` if its arguments differ from ``_Arguments``."""
    library.mfpsn_cuda_run.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p]
    library.mfpsn_cuda_run.restype = ctypes.c_int
    library.mfpsn_cuda_error.argtypes, library.mfpsn_cuda_error.restype = [ctypes.c_int], ctypes.c_char_p
    library.mfpsn_cuda_arguments_size.restype = ctypes.c_int64
    if (size := library.mfpsn_cuda_arguments_size()) != ctypes.sizeof(_Arguments):
        raise RuntimeError(f"fused-cuda: the library takes {size} bytes of arguments, not {ctypes.sizeof(_Arguments)}")
    return library


def _geometry(x: Tensor, layout: Layout) -> Geometry | None:
    """Return strides and alignment of ``x``; None if its positions do not have one constant stride."""
    sizes, strides = x.shape, x.stride()
    if layout is Layout.TIME_FIRST:
        rest, heads = slice(3, None), (0, 1, 2)
    else:
        rest, heads = slice(2, -1), (-1, 0, 1)
    position = uniform_stride(sizes[rest], strides[rest])
    if position is None:
        return None
    address = 16 if x.is_meta else x.data_ptr() | 16
    return Geometry((*(0 if sizes[d] == 1 else strides[d] for d in heads), position), address & -address)


class _Run:
    """One call of the library: its arguments and plan, and references that keep its tensors alive."""

    def __init__(self, device: Device, call: Call, x: Tensor, order: int, grad: Tensor | None, out: Tensor | None):
        self.machine, self.device, self.result, self.references = device, x.device, out, []
        layout, a = call.layout, _Arguments()
        self.arguments, self.out, geometries = a, out, []
        for name, tensor in (("x", x), ("grad", grad), ("out", out)):
            if tensor is None:
                continue
            geometry = _geometry(tensor, layout)
            if geometry is None:  # inputs are copied first, the output is copied to its tensor at the end
                tensor = torch.empty(x.shape, dtype=x.dtype, device=x.device) if name == "out" else tensor.contiguous()
                geometry = _geometry(tensor, layout)
                self.out = tensor if name == "out" else self.out
            self.references.append(tensor)
            geometries.append(geometry)
            setattr(a, name, tensor.data_ptr())
            setattr(a, f"{name}_view", _View(*geometry.strides))
        if out is None:  # partitioned as if there were one, so that a part sums in the same order as the whole op
            like = torch.empty_like(x, device="meta")
            geometries.append(_geometry(like, layout) or _geometry(like.contiguous(), layout))
        steps, batch = x.shape[layout.time_dim], x.shape[layout.batch_dim]
        channels = x.shape[layout.channel_dim]
        positions = x.numel() // (steps * batch * channels)
        # lags of T steps and more read only zeros, so all longer dilations are equivalent
        dilation = min(call.dilation, steps)
        shape = (steps, batch, channels, positions)
        partitioning = plan(shape, order, dilation, x.element_size(), tuple(geometries), device.processors(x.device))
        for name, value in zip(Plan._fields, partitioning, strict=True):
            setattr(a, name, value)
        a.dtype, a.device = _DTYPES[x.dtype], x.device.index or 0
        a.steps, a.batch, a.channels, a.positions, a.order, a.dilation = *shape, order, dilation
        a.grid_limit, a.surrogate, a.alpha = device.grid_limit, _SURROGATES[call.surrogate.name], call.surrogate.alpha
        if call.mask is not None:
            self.references.append(call.mask.contiguous())
            a.mask = self.references[-1].data_ptr()
        self.dtype, self.channels, self.order = call.dtype, channels, order
        self.set_vectors(scale=call.scale, shift=call.shift)

    def set_vectors(self, **vectors: Tensor | None) -> None:
        """Set vectors as arguments; None leaves a null pointer."""
        for name, vector in vectors.items():
            if vector is None:
                continue
            vector = vector.to(self.dtype).contiguous()
            self.references.append(vector)
            setattr(self.arguments, name, vector.data_ptr())

    def fold(self, constants: NeuronConstants, weight: Tensor, gamma: Tensor, beta: Tensor) -> None:
        """Set the arguments of the fold, and allocate its results."""
        a = self.arguments
        a.eps, a.quantizer = constants.eps, _QUANTIZERS[Gradient.parse(constants.gradient)]
        a.min_exponent, a.max_exponent = constants.min_exponent, constants.max_exponent
        self.set_vectors(weight=weight, gamma=gamma, beta=beta)
        self.allocate("taps", self.order)
        self.allocate("bias")

    def allocate(self, name: str, *more: int) -> Tensor:
        """Allocate a result (C, *more) that the kernels write, and set it as an argument."""
        vector = torch.empty(self.channels, *more, dtype=self.dtype, device=self.device)
        self.set_vectors(**{name: vector})
        return vector

    def partials(self, quantities: int) -> None:
        """Allocate the partial sums of the first stage."""
        count = (quantities, self.channels, self.arguments.partials)
        self.set_vectors(partial=torch.empty(count, dtype=self.dtype, device=self.device))

    def __call__(self, stages: int) -> None:
        """Launch the stages given as bits."""
        library = self.machine.library(self.device)
        with self.machine.guard(self.device):
            code = library.mfpsn_cuda_run(ctypes.byref(self.arguments), stages, self.machine.stream(self.device))
        if code:
            text = (library.mfpsn_cuda_error(code) or b"unknown error").decode()
            raise RuntimeError(f"fused-cuda: a launch on {self.device} failed with CUDA error {code} ({text})")
        if self.out is not self.result:
            self.result.copy_(self.out)


def _to_sum_dtype(call: Call, x: Tensor) -> Tensor:
    """Return ``x``, cast to float64 if the sums are float64."""
    return x.double() if call.dtype is torch.float64 else x


def _supports(problem: Problem) -> str | None:
    if problem.surrogate not in _SURROGATES:
        return f"knows the surrogates {', '.join(_SURROGATES)}, not {problem.surrogate}"
    most = MAX_ORDER_FLOAT64 if problem.dtype is torch.float64 else MAX_ORDER
    if problem.order > most:
        return f"takes up to {most} taps{' in float64' if most < MAX_ORDER else ''}, not {problem.order}"
    if problem.steps > _MAX_STEPS:
        return f"takes up to {_MAX_STEPS} steps, not {problem.steps}"
    return None


@register_kernel(
    "fused-cuda",
    devices=["cuda"],
    supports=_supports,
    unavailable=cuda_build.unavailable,
    rank=50,
    one_read=True,
)
class FusedCuda(NeuronKernel):
    """CUDA C++: a window of X in registers, taps summed in order, H never written; any strides, both layouts."""

    def __init__(self, device: Device | None = None) -> None:
        self.device = Device() if device is None else device

    def _run(self, call: Call, x: Tensor, order: int, grad: Tensor | None = None, out: Tensor | None = None) -> _Run:
        return _Run(self.device, call, x, order, grad, out)

    def statistics(self, call, x, weight):
        run = self._run(call, _to_sum_dtype(call, x), weight.shape[1])
        run.set_vectors(weight=weight)
        mean, var = run.allocate("mean"), run.allocate("var")
        run.partials(3)
        run(_STATISTICS | _FINISH_STATISTICS)
        return mean, var

    def fire(self, call, x, taps, bias):
        original, x = x, _to_sum_dtype(call, x)
        run = self._run(call, x, taps.shape[1], out=torch.empty_like(x))
        run.set_vectors(taps=taps, bias=bias)
        run(_FIRE)
        return _to_input_dtype(run.result, original)

    def forward(self, call, x, weight, gamma, beta, mean, var):
        original, x = x, _to_sum_dtype(call, x)
        run = self._run(call, x, weight.shape[1], out=torch.empty_like(x))
        run.fold(call.constants, weight, gamma, beta)
        if mean is None:
            mean, var = run.allocate("mean"), run.allocate("var")
            run.partials(3)
            run(_STATISTICS | _FINISH_STATISTICS | _FIRE)
        else:
            run.set_vectors(mean=mean, var=var)
            run(_FOLD | _FIRE)
        return _to_input_dtype(run.result, original), mean, var

    def backward_reductions(self, call, grad, x, taps, bias):
        x, grad = _to_sum_dtype(call, x), _to_sum_dtype(call, grad.to(x.dtype))
        run = self._run(call, x, taps.shape[1], grad)
        run.set_vectors(taps=taps, bias=bias)
        dtaps, dbias = run.allocate("dtaps", run.order), run.allocate("dbias")
        run.partials(run.order + 2)
        run(_REDUCTIONS | _FINISH_REDUCTIONS)
        return dtaps, dbias, None

    def backward_input(self, call, grad, x, taps, bias, weight, offset, slope, cache=None, input_grad=True):
        affine = call.scale is not None or call.shift is not None
        if not (input_grad or affine or offset is not None):
            return None, None, None, None
        original, x = x, _to_sum_dtype(call, x)
        run = self._run(call, x, taps.shape[1], _to_sum_dtype(call, grad.to(original.dtype)),
                        torch.empty_like(x) if input_grad else None)  # fmt: skip
        run.set_vectors(taps=taps, bias=bias, weight=weight, offset=offset, slope=slope)
        run.arguments.training, run.arguments.input_grad = offset is not None, input_grad
        dweight = None if offset is None else run.allocate("dweight", run.order)
        dscale, dshift = _affine_gradients(run, call)
        run.partials(run.order + 2)
        run(_INPUT | _FINISH_INPUT)
        return _to_input_dtype(run.result, original) if input_grad else None, dweight, dscale, dshift

    def backward(self, call, grad, x, weight, gamma, beta, mean, var, input_grad):
        training = call.constants.training
        original, x = x, _to_sum_dtype(call, x)
        run = self._run(call, x, weight.shape[1], _to_sum_dtype(call, grad.to(original.dtype)),
                        torch.empty_like(x) if input_grad else None)  # fmt: skip
        run.fold(call.constants, weight, gamma, beta)
        run.set_vectors(mean=mean, var=var)
        run.arguments.chain, run.arguments.training, run.arguments.input_grad = True, training, input_grad
        dweight, dgamma, dbeta = run.allocate("dweight", run.order), run.allocate("dgamma"), run.allocate("dbeta")
        dscale, dshift = _affine_gradients(run, call)
        stages = _FOLD | _REDUCTIONS | _FINISH_REDUCTIONS
        if training:
            run.allocate("offset"), run.allocate("slope")
        if training or input_grad or dscale is not None or dshift is not None:
            stages |= _INPUT | _FINISH_INPUT
        run.partials(run.order + 2)
        run(stages)
        return _to_input_dtype(run.result, original) if input_grad else None, dweight, dgamma, dbeta, dscale, dshift


def _affine_gradients(run: _Run, call: Call) -> tuple[Tensor | None, Tensor | None]:
    """Allocate dscale and dshift, None where the call has no scale or shift."""
    return (
        None if call.scale is None else run.allocate("dscale"),
        None if call.shift is None else run.allocate("dshift"),
    )


def _to_input_dtype(result: Tensor, like: Tensor) -> Tensor:
    """Return ``result`` in the dtype and with the strides of ``like``."""
    return result if result.dtype is like.dtype else torch.empty_like(like).copy_(result)
