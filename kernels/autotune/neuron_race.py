"""Races of the kernels that can serve one neuron in one layout, and measurements of layout conversions."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch

from ..constants import ALL, NeuronConstants
from ..layout import Layout, to_layout
from ..op import neuron
from ..registry import Problem, get_kernel
from .buffers import Pool, extent
from .environment import source_of
from .race import Race, Variant

__all__ = ["EVALUATION", "TRAINING", "conversion_race", "kernel_race"]

TRAINING, EVALUATION = ("forward", "backward"), ("eval",)


def kernel_race(
    problem: Problem,
    kernels: Iterable[str],
    pool: Pool,
    *,
    name: str,
    constants: NeuronConstants | None = None,
    strides: Sequence[int] | None = None,
) -> Race:
    """Return the race of ``kernels`` on random data of ``problem``: training forward and backward, evaluation forward.

    Inputs are windows of ``pool``. Where a channel has a single value only evaluation is measured.

    Args:
        problem: shape, layout, dtype, order, dilation and so on.
        kernels: names of registered kernels that support it.
        pool: of the device on which they run.
        name: of the race in messages.
        constants: those that ``problem`` does not fix, such as the surrogate's alpha; None for the op's defaults.
        strides: of the input as the network produces it; None: contiguous.
    """
    strides = tuple(torch.empty(problem.shape, device="meta").stride() if strides is None else strides)
    trainable = torch.Size(problem.shape).numel() > problem.channels
    constants = dataclasses.replace(problem.constants(constants), training=trainable)
    facts = {
        "op": "mfpsn.neuron",
        "shape": list(problem.shape),
        "strides": list(strides),
        "dtype": _dtype_name(problem.dtype),
        "order": problem.order,
        "masked": problem.masked,
        "affine": problem.affine,
    }
    variants = []
    for name_of_kernel in kernels:
        kernel = get_kernel(name_of_kernel)
        source = source_of(kernel.parts)
        bound = dataclasses.replace(constants, method=kernel.name)
        prepare = functools.partial(_prepare_parts, problem, bound, strides, pool)
        key = {**facts, **bound.key(), "source": source}
        variants.append(Variant(kernel.name, key, prepare, source is not None, kernel.rank))
    # All neurons form one group, whose samples are interleaved: a busy process may disturb whole seconds, in which all
    # samples of one layer would fall if they were taken one after the other
    group = "mfpsn.neuron"
    objectives = (TRAINING, EVALUATION) if trainable else (EVALUATION,)
    setup = functools.partial(_reserve, pool, problem.shape, strides, problem.dtype)
    return Race(name, tuple(variants), objectives=objectives, device=pool.device, group=group, setup=setup)


def _reserve(pool: Pool, shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> None:
    pool.reserve(max(extent(shape, strides), torch.Size(shape).numel()), dtype)


def _prepare_parts(
    problem: Problem, constants: NeuronConstants, strides: tuple[int, ...], pool: Pool
) -> Mapping[str, Callable[[], object]]:
    """Return the parts of a kernel's variant as callables on random data; on GPUs each has run once."""
    device = pool.device
    parameter_dtype = torch.float64 if problem.dtype is torch.float64 else torch.float32
    inputs = pool.windows(problem.shape, strides, problem.dtype)
    # the gradient has the strides of the spikes: dense, in the input's order of dims
    like = torch.empty_strided(problem.shape, strides, device="meta")
    gradients = pool.windows(problem.shape, torch.empty_like(like).stride(), problem.dtype)
    generator = torch.Generator(device).manual_seed(0)
    weight = torch.randn(problem.channels, problem.order, generator=generator, device=device, dtype=parameter_dtype)
    ones, zeros = weight.new_ones(problem.channels), weight.new_zeros(problem.channels)
    mask = None
    if problem.masked:
        mask = torch.ones(problem.steps, problem.batch, dtype=torch.bool, device=device)
    keywords = {training: {**constants.arguments(ALL), "training": training} for training in (True, False)}
    affine = (ones, zeros) if problem.affine else (None, None)

    @torch.no_grad()
    def forward(training: bool):
        return neuron(next(inputs), weight, ones, -ones, zeros, ones, *affine, mask, **keywords[training])

    parts = {"eval": lambda: forward(False)}
    if constants.training:
        _, mean, var = forward(True)

        @torch.no_grad()
        def backward():
            return torch.ops.mfpsn.neuron_backward(
                next(gradients), next(inputs), weight, ones, -ones, mean, var, *affine, mask, **keywords[True]
            )

        parts = {"forward": lambda: forward(True), "backward": backward, **parts}
    if device.type != "cpu":  # kernels compiled on their first call are compiled before the clock runs
        for run in parts.values():
            run()
    return parts


def conversion_race(
    shape: Sequence[int], dtype: torch.dtype, pool: Pool, *, name: str, strides: Sequence[int] | None = None
) -> Race:
    """Return the race of one layout conversion: ``"forward"`` to time-last, ``"backward"`` of its gradient back."""
    shape = tuple(shape)
    strides = tuple(torch.empty(shape, device="meta").stride() if strides is None else strides)
    time_last_shape = Layout.TIME_LAST.shape_from(shape, Layout.TIME_FIRST)

    def prepare() -> Mapping[str, Callable[[], object]]:
        first = pool.windows(shape, strides, dtype)
        last = pool.windows(time_last_shape, torch.empty(time_last_shape, device="meta").stride(), dtype)
        return {
            "forward": lambda: to_layout(next(first), "time_first", "time_last"),
            "backward": lambda: to_layout(next(last), "time_last", "time_first"),
        }

    key = {"op": "to_layout", "shape": list(shape), "strides": list(strides), "dtype": _dtype_name(dtype)}
    setup = functools.partial(_reserve, pool, shape, strides, dtype)
    return Race(name, (Variant("to_layout", key, prepare),), device=pool.device, setup=setup)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
