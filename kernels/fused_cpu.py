"""The fused C++ kernel for the CPU: H is never written, each part reads its inputs once."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from .cpu_build import library, unavailable
from .layout import Layout
from .parts import Call, Parts
from .registry import Problem, register_kernel

_SURROGATES = {"atan": 0, "rational": 1, "sigmoid": 2}
_SUFFIX = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}
# Values of a slab (T, B) that share the first-level cache with the two or three others of a task. At large T long rows
# matter more than that cache, up to a second bound: at T = 32, k = 4 a slab of 8192 values took 0.8 of the time that
# one of 4096 took, and one of 1024 took 2.1 times it.
_SLAB, _ROW, _MOST = 4096, 256, 65536
# Tasks below which the batch is cut into chunks too: enough for the threads of a desktop
_TASKS = 16


class _View(ctypes.Structure):
    _fields_ = [
        ("st", ctypes.c_int64),
        ("sn", ctypes.c_int64),
        ("offset", ctypes.c_void_p),
        ("sj", ctypes.c_int64),
    ]


class _Problem(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("steps", "batch", "elements", "positions", "order", "dilation")),
        ("block", ctypes.c_int64),
        ("chunks", ctypes.c_int64),
        ("scale", ctypes.c_void_p),
        ("shift", ctypes.c_void_p),
        ("mask", ctypes.c_void_p),
        ("surrogate", ctypes.c_int64),
        ("alpha", ctypes.c_double),
    ]


def _uniform(sizes: Sequence[int], strides: Sequence[int]) -> int | None:
    """The one stride by which all elements of these dims, in row-major order, follow each other; or None."""
    step, expected = None, None
    for size, stride in zip(reversed(sizes), reversed(strides), strict=True):
        if size == 1:
            continue
        if step is None:
            step = stride
        elif stride != expected:
            return None
        expected = stride * size
    return 1 if step is None else step


class _Operand:
    """A tensor as the C++ side sees it; keeps the table of offsets alive."""

    def __init__(self, x: Tensor, layout: Layout) -> None:
        elements = slice(2, None) if layout is Layout.TIME_FIRST else slice(1, -1)
        sizes, strides = x.shape[elements], x.stride()[elements]
        uniform, self.table = _uniform(sizes, strides), None
        if uniform is None:
            self.table = torch.zeros(1, dtype=torch.int64)
            for size, stride in zip(sizes, strides, strict=True):
                self.table = (self.table[:, None] + torch.arange(size) * stride).flatten()
        self.view = _View(
            x.stride(layout.time_dim),
            x.stride(layout.batch_dim),
            None if self.table is None else self.table.data_ptr(),
            0 if uniform is None else uniform,
        )
        self.pointer = ctypes.c_void_p(x.data_ptr())


def _pointer(t: Tensor | None) -> ctypes.c_void_p | None:
    return None if t is None else ctypes.c_void_p(t.data_ptr())


class _Run:
    """One call into the library: sizes, constants, and what has to stay alive meanwhile."""

    def __init__(self, call: Call, x: Tensor, order: int) -> None:
        layout = call.layout
        self.steps, self.batch = x.shape[layout.time_dim], x.shape[layout.batch_dim]
        self.channels, self.order = x.shape[layout.channel_dim], order
        self.elements = x.numel() // (self.steps * self.batch)
        block = max(_SLAB // self.steps, min(_ROW, _MOST // self.steps))
        block = max(16, min(1024, block // 16 * 16, -(-self.elements // 16) * 16))
        blocks = -(-self.elements // block)
        self.chunks = min(self.batch, max(1, _TASKS // blocks))
        # the mask is shared by all channels; anything that is not plain memory is made so
        self.alive = [None if t is None else t.contiguous() for t in (call.scale, call.shift, call.mask)]
        name = call.surrogate.name
        self.problem = _Problem(
            self.steps, self.batch, self.elements, self.elements // self.channels, order, call.dilation, block,
            self.chunks, *(_pointer(t) for t in self.alive), _SURROGATES[name], call.surrogate.alpha,
        )  # fmt: skip
        self.suffix = _SUFFIX[x.dtype]

    def __call__(self, part: str, *arguments) -> None:
        passed = [ctypes.byref(a) if isinstance(a, ctypes.Structure) else a for a in arguments]
        getattr(library(), f"mfpsn_{part}_{self.suffix}")(ctypes.byref(self.problem), *passed)

    def partials(self, rows: int, dtype: torch.dtype) -> Tensor:
        """(chunks, rows, C, P), every entry of which a task writes."""
        return torch.empty(self.chunks, rows, self.channels, self.elements // self.channels, dtype=dtype)


def _sums(partials: Tensor) -> Tensor:
    """(rows, C); torch sums by cascade, so float32 will do, and no wider copy is made."""
    return partials.sum((0, 3))


def _supports(problem: Problem) -> str | None:
    if problem.surrogate not in _SURROGATES:
        return f"knows the surrogates {', '.join(_SURROGATES)}, not {problem.surrogate}"
    return None


@register_kernel("fused-cpp", devices=["cpu"], supports=_supports, unavailable=unavailable)
class FusedCpu(Parts):
    """C++: slabs of T steps in cache, taps summed in order, H never written; any strides, both layouts."""

    def statistics(self, call, x, weight):
        x = _wide(call, x)
        run, view, weight = _Run(call, x, weight.shape[1]), _Operand(x, call.layout), weight.contiguous()
        out = run.partials(3, call.dtype)
        run("statistics", view.view, view.pointer, _pointer(weight), _pointer(out))
        count, mean, square = (part.transpose(0, 1).flatten(1) for part in out.double().unbind(1))
        total = count.sum(1)
        safe = total.clamp(min=1)
        centre = (count * mean).sum(1) / safe
        # Chan's update once more, over elements and chunks: no difference of large sums
        square = square.sum(1) + (count * (mean - centre[:, None]).square()).sum(1)
        return centre.to(call.dtype), (square / safe).to(call.dtype)

    def fire(self, call, x, taps, bias):
        given, x = x, _wide(call, x)
        run, view, taps = _Run(call, x, taps.shape[1]), _Operand(x, call.layout), taps.contiguous()
        spikes = torch.empty_like(x)
        out = _Operand(spikes, call.layout)
        run("fire", view.view, view.pointer, _pointer(taps), _pointer(bias.contiguous()), out.view, out.pointer)
        return spikes if given is x else torch.empty_like(given).copy_(spikes)

    def backward_reductions(self, call, grad, x, taps, bias):
        x, grad = _wide(call, x), _wide(call, grad.to(x.dtype))
        run, taps, bias = _Run(call, x, taps.shape[1]), taps.contiguous(), bias.contiguous()
        view, grads, out = (
            _Operand(x, call.layout),
            _Operand(grad, call.layout),
            run.partials(run.order + 1, call.dtype),
        )
        run("backward_reductions", view.view, view.pointer, grads.view, grads.pointer, _pointer(taps), _pointer(bias),
            _pointer(out))  # fmt: skip
        sums = _sums(out)
        return sums[:-1].t().contiguous(), sums[-1].contiguous(), None

    def backward_input(self, call, grad, x, taps, bias, weight, offset, slope, cache=None, input_grad=True):
        affine = call.scale is not None or call.shift is not None
        if not (input_grad or affine or offset is not None):
            return None, None, None, None
        given, x = x, _wide(call, x)
        grad = _wide(call, grad.to(given.dtype))
        run, view, grads = _Run(call, x, taps.shape[1]), _Operand(x, call.layout), _Operand(grad, call.layout)
        vectors = [None if t is None else t.contiguous() for t in (taps, bias, weight, offset, slope)]
        dx = torch.empty_like(x) if input_grad else None
        target = _Operand(dx if input_grad else x, call.layout)
        out = run.partials(run.order + 2, call.dtype)
        run("backward_input", view.view, view.pointer, grads.view, grads.pointer, *map(_pointer, vectors), target.view,
            target.pointer if input_grad else None, _pointer(out))  # fmt: skip
        sums = _sums(out)
        if input_grad and given is not x:
            dx = torch.empty_like(given).copy_(dx)
        return (
            dx,
            None if offset is None else sums[:-2].t().contiguous(),
            None if call.scale is None else sums[-2].contiguous(),
            None if call.shift is None else sums[-1].contiguous(),
        )


def _wide(call: Call, x: Tensor) -> Tensor:
    """float64 sums of a narrower input: it is lifted first."""
    return x.double() if call.dtype is torch.float64 else x
