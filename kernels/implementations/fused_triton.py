"""The fused Triton kernel for GPUs: H is never written, each part reads its inputs once.

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
# (k − 1)·d + 1 values that may sit in registers, twice over in backward
_WINDOW = 24
# The order up to which backward's 2k − 1 values of X are held at once where steps are not walked
_UNROLLED = 8
_STEPS = 32  # at most, in a tile of time-dense memory
_CHANNELS = 32  # in a tile of channel-dense memory: a line of cache
_PROGRAMS = 2048  # of a reduction: a wave or two of the largest GPUs, and a bound for the partials
_LANES = 128  # columns of partials that the second stage takes at a time
_REGISTERS = 16  # for a thread's window of X, of which backward holds two
_WARPS = 4  # of a program of the first stage
_FEWEST = 512  # programs below which tiles shrink: a few for each multiprocessor


def _interpreted() -> bool:
    """Triton reads this when the programs are imported; from then on CPU tensors work and nothing is compiled."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def _module(name: str) -> ModuleType:
    return importlib.import_module(f".{name}", __package__)


def unavailable() -> str | None:
    """Why the kernel cannot run here, or None."""
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


def _power(n: int) -> int:
    """The least power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()


def _block(window: int, itemsize: int, lanes: int) -> int:
    """Elements of a tile: 16 bytes a thread and load where the window leaves registers for them.

    A function of shape and dtype alone: the tile decides in which order sums are taken, so an autotuned one would give
    other bits in another process. It would also have to be measured before a CUDA graph is captured.
    """
    each = max(1, 16 // itemsize)
    while each > 1 and each * window > _REGISTERS:
        each //= 2
    while each > 1 and lanes < _FEWEST * each * 32 * _WARPS:
        each //= 2
    return each * 32 * _WARPS


class _Geometry:
    """How x is cut into tiles, and the arguments that all programs share."""

    def __init__(self, call: Call, x: Tensor, order: int) -> None:
        self.layout, self.x = call.layout, x
        first = 3 if call.layout is Layout.TIME_FIRST else 2
        places = range(first, first + x.ndim - 3)
        # Positions may be counted in any order: with x's densest dim last, more strides are uniform
        self.places = sorted(places, key=lambda dim: -x.stride(dim))
        self.steps, self.batch = x.shape[call.layout.time_dim], x.shape[call.layout.batch_dim]
        self.channels, self.order = x.shape[call.layout.channel_dim], order
        self.per_sample = x.numel() // (self.steps * self.batch * self.channels)
        self.positions = self.batch * self.per_sample
        # the mask is shared by all channels; bytes, since the width of a Boolean is the language's affair
        self.mask = None if call.mask is None else call.mask.contiguous().view(torch.uint8)
        self.scale, self.shift = (None if v is None else v.contiguous() for v in (call.scale, call.shift))
        _, (xt, _, xc, xp) = self.operand(x)
        window = (order - 1) * call.dilation + 1
        interpreted = _module("triton_programs").INTERPRETED
        self.walk = window <= _WINDOW and (xt != 1 or self.steps == 1)
        lanes = x.numel() if xt == 1 else x.numel() // self.steps
        # the interpreter pays by the program, not by the lane
        self.block = 256 if interpreted else _block(window, x.element_size(), lanes)
        self.BT = 1 if self.walk or xt != 1 else min(_power(self.steps), _STEPS, self.block)
        row = _power(self.per_sample) * self.BT
        wanted = _CHANNELS if self.per_sample == 1 or xc < xp else _CHANNELS // row
        # lanes that positions cannot fill go to channels
        wanted = max(1, wanted if self.BT == 1 else 1, self.block // _power(self.positions * self.BT))
        self.BC = min(_power(self.channels), wanted, self.block // self.BT)
        self.tiles = -(-self.channels // self.BC)
        per_block = self.block // self.BC // self.BT
        most = 8 if interpreted else _PROGRAMS
        self.columns = max(1, min(-(-self.positions // per_block), most // self.tiles))
        self.constants = {
            "K": order,
            "D": call.dilation,
            "WALK": self.walk,
            "BC": self.BC,
            "BT": self.BT,
            "ACC": _acc(call.dtype),
            "BLOCK": self.block,
            "num_warps": _WARPS,
        }
        self.surrogate = {"SURROGATE": _SURROGATES[call.surrogate.name], "ALPHA": float(call.surrogate.alpha)}
        self.sizes = (self.steps, self.batch, self.channels, self.per_sample, self.positions, self.tiles)

    def operand(self, x: Tensor, copy: bool = True) -> tuple[Tensor | None, tuple[int, int, int, int]]:
        """x, or a copy where its positions cannot be reached with one stride, and its strides (t, n, c, p).

        Without ``copy`` the tensor is None in that case.
        """
        sizes, strides = [x.shape[d] for d in self.places], [x.stride(d) for d in self.places]
        uniform = uniform_stride(sizes, strides)
        if uniform is None:
            if not copy:
                return None, (0, 0, 0, 0)
            x = self.dense(x)
            return self.operand(x)
        layout = self.layout
        return x, (x.stride(layout.time_dim), x.stride(layout.batch_dim), x.stride(layout.channel_dim), uniform)

    def dense(self, x: Tensor, values: bool = True) -> Tensor:
        """Memory shaped as x, its positions dense in our order; with x's values or without."""
        order = [d for d in range(x.ndim) if d not in self.places]
        at = order.index(2 if self.layout is Layout.TIME_FIRST else 1) + 1
        order[at:at] = self.places
        empty = torch.empty([x.shape[d] for d in order], dtype=x.dtype, device=x.device)
        empty = empty.permute([order.index(d) for d in range(x.ndim)])
        return empty.copy_(x) if values else empty

    def output(self) -> tuple[Tensor, Tensor, tuple[int, int, int, int]]:
        """(what to return, what the program writes, its strides); they differ only for strides it cannot reach."""
        out = torch.empty_like(self.x)
        target, strides = self.operand(out, copy=False)
        if target is None:
            target, strides = self.operand(self.dense(out, values=False))
        return out, target, strides

    def partials(self, rows: int, dtype: torch.dtype) -> Tensor:
        """(rows, C, G); a row that a program is asked for is written in full."""
        return torch.empty(rows, self.channels, self.columns, dtype=dtype, device=self.x.device)

    def wide(self, *tensors: Tensor | None) -> bool:
        """Whether any offset, lanes past the end included, may pass 2³¹."""
        reach = (self.positions + 4096) * 2
        for x in tensors:
            if x is not None:
                reach = max(reach, 1 + sum((n - 1) * abs(s) for n, s in zip(x.shape, x.stride(), strict=True)))
        return reach >= 2**31

    def launch(self, name: str, programs: int | None, *arguments, **constants) -> None:
        """Run a program over tiles: ``programs`` columns of them, or as many as there are positions."""
        columns = programs or -(-self.positions // (self.block // self.BC // self.BT))
        program = getattr(_module("triton_programs"), name)
        with _on(self.x):
            program[(columns * self.tiles,)](*arguments, **constants, **self.constants, enable_fp_fusion=False)


def _acc(dtype: torch.dtype):
    language = importlib.import_module("triton.language")
    return language.float64 if dtype is torch.float64 else language.float32


def _on(x: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def _channels(name: str, x: Tensor, *arguments, channels: int, **constants) -> None:
    """Run a program of the second stage, one a channel."""
    with _on(x):
        getattr(_module("triton_channels"), name)[(channels,)](
            *arguments, **constants, LANES=_LANES, num_warps=4, enable_fp_fusion=False
        )


def _order(weight: Tensor) -> dict[str, int]:
    return {"K": weight.shape[1], "KP": _power(weight.shape[1])}


def _quantized(constants: NeuronConstants) -> dict[str, object]:
    return {
        "EPS": float(constants.eps),
        "QUANTIZED": str(constants.gradient) != Gradient.NONE,
        "LEAST": constants.min_exponent,
        "MOST": constants.max_exponent,
    }


def _statistics(call: Call, x: Tensor, weight: Tensor) -> tuple[_Geometry, Tensor]:
    """Count, mean and squared deviations of H by program."""
    g = _Geometry(call, x, weight.shape[1])
    x, strides = g.operand(x)
    partials = g.partials(3, call.dtype)
    g.launch(
        "statistics_program", g.columns, x, weight, g.scale, g.shift, g.mask, partials, *strides, *g.sizes, g.columns,
        WIDE=g.wide(x),
    )  # fmt: skip
    return g, partials


def _reductions(call: Call, grad: Tensor, x: Tensor, taps: Tensor, bias: Tensor) -> tuple[_Geometry, Tensor]:
    g = _Geometry(call, x, taps.shape[1])
    (grad, grad_strides), (x, strides) = g.operand(grad), g.operand(x)
    partials = g.partials(g.order + 1, call.dtype)
    g.launch(
        "reductions_program", g.columns, grad, x, taps, bias, g.scale, g.shift, g.mask, partials, *grad_strides,
        *strides, *g.sizes, g.columns, WIDE=g.wide(x, grad), **g.surrogate,
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
    """What ``NeuronKernel.backward_input`` gives, with ``dweight`` added to dW."""
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
        WIDE=g.wide(given, grad, target), UNROLL=g.order <= _UNROLLED, **g.surrogate,
    )  # fmt: skip
    if out is not target:
        out.copy_(target)
    dscale, dshift = (None if v is None else torch.empty_like(v) for v in (g.scale, g.shift))
    through = None if offset is None else torch.empty_like(weight)
    if affine or offset is not None:
        _channels("sums_program", x, partials, through, dweight, dscale, dshift, g.channels, g.columns,
                  channels=g.channels, **_order(weight))  # fmt: skip
    return out, dweight if through is None else through, dscale, dshift


@register_kernel(
    "fused-triton",
    devices=["cuda", "cpu"] if _interpreted() else ["cuda"],
    supports=_supports,
    unavailable=unavailable,
    rank=-1 if _interpreted() else 40,  # the interpreter is for tests
    one_read=True,
)
class FusedTriton(NeuronKernel):
    """Triton, for GPUs: a tile of positions walks T, taps summed in order, H never written; any strides."""

    def statistics(self, call, x, weight):
        weight = weight.contiguous()
        g, partials = _statistics(call, x, weight)
        mean, var = (torch.empty(g.channels, dtype=call.dtype, device=x.device) for _ in range(2))
        _channels("fold_program", x, partials, mean, var, None, None, None, None, None, g.channels, g.columns,
                  channels=g.channels, EPS=0.0, QUANTIZED=False, LEAST=0, MOST=0, **_order(weight))  # fmt: skip
        return mean, var

    def fire(self, call, x, taps, bias):
        g = _Geometry(call, x, taps.shape[1])
        given, strides = g.operand(x)
        out, target, target_strides = g.output()
        g.launch(
            "fire_program", None, given, taps.contiguous(), bias.contiguous(), g.scale, g.shift, g.mask, target,
            *strides, *target_strides, *g.sizes, WIDE=g.wide(given, target),
        )  # fmt: skip
        return out if out is target else out.copy_(target)

    def backward_reductions(self, call, grad, x, taps, bias):
        taps, bias = taps.contiguous(), bias.contiguous()
        g, partials = _reductions(call, grad, x, taps, bias)
        dtaps, dbias = torch.empty_like(taps), torch.empty_like(bias)
        _channels("sums_program", x, partials, dtaps, None, dbias, None, g.channels, g.columns, channels=g.channels,
                  **_order(taps))  # fmt: skip
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
        _channels("fold_program", x, partials, mean, var, weight, gamma, beta, taps, bias, channels, columns,
                  channels=channels, **_order(weight), **_quantized(call.constants))  # fmt: skip
        return self.fire(call, x, taps, bias), mean, var

    def backward(self, call, grad, x, weight, gamma, beta, mean, var, input_grad):
        weight, gamma, beta, mean, var = (v.contiguous() for v in (weight, gamma, beta, mean, var))
        channels, constants = weight.shape[0], {**_order(weight), **_quantized(call.constants)}
        taps, bias = torch.empty_like(weight), torch.empty_like(gamma)
        _channels("fold_program", x, None, mean, var, weight, gamma, beta, taps, bias, channels, 0, channels=channels,
                  **constants)  # fmt: skip
        g, partials = _reductions(call, grad, x, taps, bias)
        dweight, dgamma, dbeta = torch.empty_like(weight), torch.empty_like(gamma), torch.empty_like(gamma)
        offset = slope = valid = None
        count = 0
        if call.constants.training:
            offset, slope = torch.empty_like(gamma), torch.empty_like(gamma)
            found = self._count(call, x)
            valid, count = (found, 0) if isinstance(found, Tensor) else (None, found)
        _channels("chain_program", x, partials, weight, gamma, beta, mean, var, valid, dweight, dgamma, dbeta, offset,
                  slope, channels, g.columns, count, channels=channels,
                  ROUND_ONLY=str(call.constants.gradient) == Gradient.ROUND_ONLY, **constants)  # fmt: skip
        del partials
        dx, dweight, dscale, dshift = _input(call, grad, x, taps, bias, weight, offset, slope, dweight, input_grad)
        return dx, dweight, dgamma, dbeta, dscale, dshift
