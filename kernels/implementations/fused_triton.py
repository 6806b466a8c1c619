"""Fused Triton kernel for GPUs: H is never written to memory, and each part reads its inputs once.

The programs are in ``triton_programs`` and ``triton_channels``, imported on first use, since they need Triton.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
from types import ModuleType

import torch
from torch import Tensor

from ..constants import NeuronConstants
from ..kernel import Call, NeuronKernel
from ..layout import Layout, uniform_stride
from ..quantizer import Gradient
from ..registry import Problem, register_kernel

_SURROGATES = {"atan": 0, "rational": 1, "sigmoid": 2}
MAX_ORDER = 32
_MAX_WINDOW = 24  # (k − 1)·d + 1 values held in registers, twice in backward
_MAX_UNROLLED_ORDER = 8  # up to which backward without WALK holds 2k − 1 values of X at once
_MAX_TILE_STEPS = 32  # of a tile if time is dense in memory
_TILE_CHANNELS = 32  # of a tile if channels are dense in memory: a cache line
_MAX_PROGRAMS = 2048  # of a reduction: one or two waves on the largest GPUs; also bounds the partials
_LANES = 128  # columns of partials that the second stage adds at a time
_WINDOW_REGISTERS = 16  # per thread for its window of X; backward holds two windows
_WARPS = 4  # of a program of the first stage
_MIN_PROGRAMS = 512  # with fewer programs tiles shrink, for a few programs per multiprocessor


def _interpreted() -> bool:
    """Return True if TRITON_INTERPRET=1: programs then run on CPU tensors, uncompiled. Triton reads it on import."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def _module(name: str) -> ModuleType:
    """Import a sibling module that needs Triton."""
    return importlib.import_module(f".{name}", __package__)


def unavailable() -> str | None:
    """Return why the kernel cannot run here, or None."""
    try:
        importlib.import_module("triton")
    except ImportError as error:
        if getattr(error, "name", None) == "triton":
            return "triton is not installed; it comes with PyTorch's CUDA builds, or: pip install 'mfpsn_fx[triton]'"
        return f"triton cannot be imported: {error}"
    return None


def _supports(problem: Problem) -> str | None:
    if problem.surrogate not in _SURROGATES:
        return f"knows the surrogates {', '.join(_SURROGATES)}, not {problem.surrogate}"
    if problem.order > MAX_ORDER:
        return f"takes orders up to {MAX_ORDER}, not {problem.order}"
    return None


def _next_power_of_two(n: int) -> int:
    """Return the smallest power of two that is at least ``n``."""
    return 1 << max(0, n - 1).bit_length()


def _block(window: int, itemsize: int, lanes: int) -> int:
    """Return the number of elements of a tile: 16 bytes per thread and load if the window leaves enough registers.

    It depends on shape and dtype only: the tile determines the order of sums, so autotuning it would make results
    differ between processes, and would need measurements before a CUDA graph is captured.
    """
    per_thread = max(1, 16 // itemsize)
    while per_thread > 1 and per_thread * window > _WINDOW_REGISTERS:
        per_thread //= 2
    while per_thread > 1 and lanes < _MIN_PROGRAMS * per_thread * 32 * _WARPS:
        per_thread //= 2
    return per_thread * 32 * _WARPS


class _Geometry:
    """Partition of ``x`` into tiles, and the arguments that all programs share."""

    def __init__(self, call: Call, x: Tensor, order: int) -> None:
        self.layout, self.x = call.layout, x
        first = 3 if call.layout is Layout.TIME_FIRST else 2
        dims = range(first, first + x.ndim - 3)
        # Positions may be enumerated in any order: with the densest dim of x last, more tensors have one uniform stride
        self.position_dims = sorted(dims, key=lambda dim: -x.stride(dim))
        self.steps, self.batch = x.shape[call.layout.time_dim], x.shape[call.layout.batch_dim]
        self.channels, self.order = x.shape[call.layout.channel_dim], order
        self.per_sample = x.numel() // (self.steps * self.batch * self.channels)
        self.positions = self.batch * self.per_sample
        # passed as bytes, since how Triton stores a bool is an implementation detail
        self.mask = None if call.mask is None else call.mask.contiguous().view(torch.uint8)
        self.scale, self.shift = (None if v is None else v.contiguous() for v in (call.scale, call.shift))
        _, (xt, _, xc, xp) = self.operand(x)
        window = (order - 1) * call.dilation + 1
        interpreted = _module("triton_programs").INTERPRETED
        self.walk = window <= _MAX_WINDOW and (xt != 1 or self.steps == 1)
        lanes = x.numel() if xt == 1 else x.numel() // self.steps
        # the interpreter's time is per program, not per lane
        self.block = 256 if interpreted else _block(window, x.element_size(), lanes)
        self.BT = 1 if self.walk or xt != 1 else min(_next_power_of_two(self.steps), _MAX_TILE_STEPS, self.block)
        row = _next_power_of_two(self.per_sample) * self.BT
        tile_channels = _TILE_CHANNELS if self.per_sample == 1 or xc < xp else _TILE_CHANNELS // row
        # channels take the lanes that positions cannot fill
        unfilled = self.block // _next_power_of_two(self.positions * self.BT)
        tile_channels = max(1, tile_channels if self.BT == 1 else 1, unfilled)
        self.BC = min(_next_power_of_two(self.channels), tile_channels, self.block // self.BT)
        self.tiles = -(-self.channels // self.BC)
        per_block = self.block // self.BC // self.BT
        max_programs = 8 if interpreted else _MAX_PROGRAMS
        self.columns = max(1, min(-(-self.positions // per_block), max_programs // self.tiles))
        self.constants = {
            "K": order,
            "D": call.dilation,
            "WALK": self.walk,
            "BC": self.BC,
            "BT": self.BT,
            "ACC": _sum_dtype(call.dtype),
            "BLOCK": self.block,
            "num_warps": _WARPS,
        }
        self.surrogate = {"SURROGATE": _SURROGATES[call.surrogate.name], "ALPHA": float(call.surrogate.alpha)}
        self.sizes = (self.steps, self.batch, self.channels, self.per_sample, self.positions, self.tiles)

    def operand(self, x: Tensor, copy: bool = True) -> tuple[Tensor | None, tuple[int, int, int, int]]:
        """Return ``x`` and its strides (t, n, c, p); a copy of ``x`` if its positions have no uniform stride.

        Without ``copy`` the tensor is None in that case.
        """
        sizes, strides = [x.shape[d] for d in self.position_dims], [x.stride(d) for d in self.position_dims]
        uniform = uniform_stride(sizes, strides)
        if uniform is None:
            if not copy:
                return None, (0, 0, 0, 0)
            x = self.dense(x)
            return self.operand(x)
        layout = self.layout
        return x, (x.stride(layout.time_dim), x.stride(layout.batch_dim), x.stride(layout.channel_dim), uniform)

    def dense(self, x: Tensor, values: bool = True) -> Tensor:
        """Return a copy of ``x``, or an empty tensor, whose positions are dense in the order of ``position_dims``."""
        order = [d for d in range(x.ndim) if d not in self.position_dims]
        at = order.index(2 if self.layout is Layout.TIME_FIRST else 1) + 1
        order[at:at] = self.position_dims
        empty = torch.empty([x.shape[d] for d in order], dtype=x.dtype, device=x.device)
        empty = empty.permute([order.index(d) for d in range(x.ndim)])
        return empty.copy_(x) if values else empty

    def output(self) -> tuple[Tensor, Tensor, tuple[int, int, int, int]]:
        """Return (result, tensor to write, its strides); they differ if the result has no uniform stride."""
        out = torch.empty_like(self.x)
        target, strides = self.operand(out, copy=False)
        if target is None:
            target, strides = self.operand(self.dense(out, values=False))
        return out, target, strides

    def partials(self, rows: int, dtype: torch.dtype) -> Tensor:
        """Allocate partials (rows, C, G); a program writes every row that it computes in full."""
        return torch.empty(rows, self.channels, self.columns, dtype=dtype, device=self.x.device)

    def needs_wide_offsets(self, *tensors: Tensor | None) -> bool:
        """Return True if an offset may reach 2³¹, those of lanes past the end included."""
        reach = (self.positions + 4096) * 2
        for x in tensors:
            if x is not None:
                reach = max(reach, 1 + sum((n - 1) * abs(s) for n, s in zip(x.shape, x.stride(), strict=True)))
        return reach >= 2**31

    def launch(self, name: str, programs: int | None, *arguments, **constants) -> None:
        """Launch a program of the first stage on ``programs`` columns of tiles; None: enough for all positions."""
        columns = programs or -(-self.positions // (self.block // self.BC // self.BT))
        program = getattr(_module("triton_programs"), name)
        with _device_guard(self.x):
            program[(columns * self.tiles,)](*arguments, **constants, **self.constants, enable_fp_fusion=False)


def _sum_dtype(dtype: torch.dtype):
    """Return the Triton dtype of sums."""
    language = importlib.import_module("triton.language")
    return language.float64 if dtype is torch.float64 else language.float32


def _device_guard(x: Tensor) -> contextlib.AbstractContextManager:
    """Return a context in which the device of ``x`` is current, since Triton launches on the current device."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def _per_channel(name: str, x: Tensor, *arguments, channels: int, **constants) -> None:
    """Launch a program of the second stage, one instance per channel."""
    with _device_guard(x):
        getattr(_module("triton_channels"), name)[(channels,)](
            *arguments, **constants, LANES=_LANES, num_warps=4, enable_fp_fusion=False
        )


def _order_constants(weight: Tensor) -> dict[str, int]:
    """Return the order and its padding to a power of two as constexpr arguments."""
    return {"K": weight.shape[1], "KP": _next_power_of_two(weight.shape[1])}


def _fold_constants(constants: NeuronConstants) -> dict[str, object]:
    """Return the constants of the fold as constexpr arguments."""
    return {
        "EPS": float(constants.eps),
        "QUANTIZED": str(constants.gradient) != Gradient.NONE,
        "LEAST": constants.min_exponent,
        "MOST": constants.max_exponent,
    }


def _statistics(call: Call, x: Tensor, weight: Tensor) -> tuple[_Geometry, Tensor]:
    """Launch the first stage of the statistics; partials are count, mean and squared deviations of H per program."""
    g = _Geometry(call, x, weight.shape[1])
    x, strides = g.operand(x)
    partials = g.partials(3, call.dtype)
    g.launch(
        "statistics_program", g.columns, x, weight, g.scale, g.shift, g.mask, partials, *strides, *g.sizes, g.columns,
        WIDE=g.needs_wide_offsets(x),
    )  # fmt: skip
    return g, partials


def _reductions(call: Call, grad: Tensor, x: Tensor, taps: Tensor, bias: Tensor) -> tuple[_Geometry, Tensor]:
    """Launch the first stage of ``backward_reductions``."""
    g = _Geometry(call, x, taps.shape[1])
    (grad, grad_strides), (x, strides) = g.operand(grad), g.operand(x)
    partials = g.partials(g.order + 1, call.dtype)
    g.launch(
        "reductions_program", g.columns, grad, x, taps, bias, g.scale, g.shift, g.mask, partials, *grad_strides,
        *strides, *g.sizes, g.columns, WIDE=g.needs_wide_offsets(x, grad), **g.surrogate,
    )  # fmt: skip
    return g, partials


def _input(
    call: Call,
    grad: Tensor,
    x: Tensor,
    taps: Tensor,
    bias: Tensor,
    weight: Tensor,
    offset: Tensor | None,
    slope: Tensor | None,
    dweight: Tensor | None,
    input_grad: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Compute ``NeuronKernel.backward_input``, with ``dweight`` added to dW."""
    affine = call.scale is not None or call.shift is not None
    if not (input_grad or affine or offset is not None):
        return None, dweight, None, None
    g = _Geometry(call, x, taps.shape[1])
    (grad, grad_strides), (given, strides) = g.operand(grad), g.operand(x)
    out, target, target_strides = g.output() if input_grad else (None, None, (0, 0, 0, 0))
    partials = g.partials(g.order + 2, call.dtype)
    g.launch(
        "input_program", g.columns, grad, given, taps, bias, weight, offset, slope, g.scale, g.shift, g.mask, target,
        partials, *grad_strides, *strides, *target_strides, *g.sizes, g.columns,
        WIDE=g.needs_wide_offsets(given, grad, target), UNROLL=g.order <= _MAX_UNROLLED_ORDER, **g.surrogate,
    )  # fmt: skip
    if out is not target:
        out.copy_(target)
    dscale, dshift = (None if v is None else torch.empty_like(v) for v in (g.scale, g.shift))
    through = None if offset is None else torch.empty_like(weight)
    if affine or offset is not None:
        _per_channel("sums_program", x, partials, through, dweight, dscale, dshift, g.channels, g.columns,
                     channels=g.channels, **_order_constants(weight))  # fmt: skip
    return out, dweight if through is None else through, dscale, dshift


@register_kernel(
    "fused-triton",
    devices=["cuda", "cpu"] if _interpreted() else ["cuda"],
    supports=_supports,
    unavailable=unavailable,
    rank=-1 if _interpreted() else 40,  # interpreted it serves tests only
    one_read=True,
)
class FusedTriton(NeuronKernel):
    """Triton, for GPUs: a tile of positions loops over T, taps summed in order, H never written; any strides."""

    def statistics(self, call, x, weight):
        weight = weight.contiguous()
        g, partials = _statistics(call, x, weight)
        mean, var = (torch.empty(g.channels, dtype=call.dtype, device=x.device) for _ in range(2))
        _per_channel("fold_program", x, partials, mean, var, None, None, None, None, None, g.channels, g.columns,
                     channels=g.channels, EPS=0.0, QUANTIZED=False, LEAST=0, MOST=0,
                     **_order_constants(weight))  # fmt: skip
        return mean, var

    def fire(self, call, x, taps, bias):
        g = _Geometry(call, x, taps.shape[1])
        given, strides = g.operand(x)
        out, target, target_strides = g.output()
        g.launch(
            "fire_program", None, given, taps.contiguous(), bias.contiguous(), g.scale, g.shift, g.mask, target,
            *strides, *target_strides, *g.sizes, WIDE=g.needs_wide_offsets(given, target),
        )  # fmt: skip
        return out if out is target else out.copy_(target)

    def backward_reductions(self, call, grad, x, taps, bias):
        taps, bias = taps.contiguous(), bias.contiguous()
        g, partials = _reductions(call, grad, x, taps, bias)
        dtaps, dbias = torch.empty_like(taps), torch.empty_like(bias)
        _per_channel("sums_program", x, partials, dtaps, None, dbias, None, g.channels, g.columns, channels=g.channels,
                     **_order_constants(taps))  # fmt: skip
        return dtaps, dbias, None

    def backward_input(self, call, grad, x, taps, bias, weight, offset, slope, cache=None, input_grad=True):
        vectors = (None if v is None else v.contiguous() for v in (taps, bias, weight, offset, slope))
        return _input(call, grad, x, *vectors, None, input_grad)

    def forward(self, call, x, weight, gamma, beta, mean, var):
        weight, gamma, beta = weight.contiguous(), gamma.contiguous(), beta.contiguous()
        partials, columns, channels = None, 0, weight.shape[0]
        if mean is None:
            g, partials = _statistics(call, x, weight)
            columns = g.columns
            mean, var = torch.empty_like(gamma), torch.empty_like(gamma)
        else:
            mean, var = mean.contiguous(), var.contiguous()
        taps, bias = torch.empty_like(weight), torch.empty_like(gamma)
        _per_channel("fold_program", x, partials, mean, var, weight, gamma, beta, taps, bias, channels, columns,
                     channels=channels, **_order_constants(weight), **_fold_constants(call.constants))  # fmt: skip
        return self.fire(call, x, taps, bias), mean, var

    def backward(self, call, grad, x, weight, gamma, beta, mean, var, input_grad):
        weight, gamma, beta, mean, var = (v.contiguous() for v in (weight, gamma, beta, mean, var))
        channels, constants = weight.shape[0], {**_order_constants(weight), **_fold_constants(call.constants)}
        taps, bias = torch.empty_like(weight), torch.empty_like(gamma)
        _per_channel("fold_program", x, None, mean, var, weight, gamma, beta, taps, bias, channels, 0,
                     channels=channels, **constants)  # fmt: skip
        g, partials = _reductions(call, grad, x, taps, bias)
        dweight, dgamma, dbeta = torch.empty_like(weight), torch.empty_like(gamma), torch.empty_like(gamma)
        offset = slope = valid = None
        count = 0
        if call.constants.training:
            offset, slope = torch.empty_like(gamma), torch.empty_like(gamma)
            found = self._count(call, x)
            valid, count = (found, 0) if isinstance(found, Tensor) else (None, found)
        _per_channel("chain_program", x, partials, weight, gamma, beta, mean, var, valid, dweight, dgamma, dbeta,
                     offset, slope, channels, g.columns, count, channels=channels,
                     ROUND_ONLY=str(call.constants.gradient) == Gradient.ROUND_ONLY, **constants)  # fmt: skip
        del partials
        dx, dweight, dscale, dshift = _input(call, grad, x, taps, bias, weight, offset, slope, dweight, input_grad)
        return dx, dweight, dgamma, dbeta, dscale, dshift
