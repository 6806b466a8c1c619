"""The race of the kernels that can serve one neuron in one layout, and that of one layout conversion."""

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
    """Kernels on random data of ``problem``: forward and backward in training, forward in evaluation.

    The input moves through ``pool``. Where a channel has a single value there is only the evaluation.

    Args:
        problem: shape, layout, dtype, order, dilation and so on.
        kernels: names of registered kernels that support it.
        pool: of the device on which they run.
        name: what messages call the race.
        constants: what ``problem`` leaves open, such as the surrogate's alpha; None for the op's defaults.
        strides: of the input as the network makes it; None: contiguous.
    """
    strides = tuple(torch.empty(problem.shape, device="meta").stride() if strides is None else strides)
    trainable = torch.Size(problem.shape).numel() > problem.channels
    constants = dataclasses.replace(problem.constants(constants), training=trainable)
    facts = {
        "op": "mfpsn.neuron",
        "shape": list(problem.shape),
        "strides": list(strides),
        "dtype": _plain(problem.dtype),
        "order": problem.order,
        "masked": problem.masked,
        "affine": problem.affine,
    }
    variants = []
    for name_of_kernel in kernels:
        kernel = get_kernel(name_of_kernel)
        source = source_of(kernel.parts)
        bound = dataclasses.replace(constants, method=kernel.name)
        prepare = functools.partial(_prepare, problem, bound, strides, pool)
        key = {**facts, **bound.key(), "source": source}
        variants.append(Variant(kernel.name, key, prepare, source is not None, kernel.rank))
    # All neurons are measured together: beside a busy process whole seconds may be disturbed, and with the samples of a
    # layer one after the other all of them
    group = "mfpsn.neuron"
    objectives = (TRAINING, EVALUATION) if trainable else (EVALUATION,)
    setup = functools.partial(_reserve, pool, problem.shape, strides, problem.dtype)
    return Race(name, tuple(variants), objectives=objectives, device=pool.device, group=group, setup=setup)


def _reserve(pool: Pool, shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> None:
    pool.reserve(max(extent(shape, strides), torch.Size(shape).numel()), dtype)


def _prepare(
    problem: Problem, constants: NeuronConstants, strides: tuple[int, ...], pool: Pool
) -> Mapping[str, Callable[[], object]]:
    device = pool.device
    kept = torch.float64 if problem.dtype is torch.float64 else torch.float32
    inputs = pool.windows(problem.shape, strides, problem.dtype)
    # the gradient comes as the spikes went: dense, in the input's order of dims
    like = torch.empty_strided(problem.shape, strides, device="meta")
    gradients = pool.windows(problem.shape, torch.empty_like(like).stride(), problem.dtype)
    generator = torch.Generator(device).manual_seed(0)
    weight = torch.randn(problem.channels, problem.order, generator=generator, device=device, dtype=kept)
    ones, zeros = torch.ones(problem.channels, device=device, dtype=kept), weight.new_zeros(problem.channels)
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
    if device.type != "cpu":  # what is compiled at the first call is compiled before the clock runs
        for run in parts.values():
            run()
    return parts


def conversion_race(
    shape: Sequence[int], dtype: torch.dtype, pool: Pool, *, name: str, strides: Sequence[int] | None = None
) -> Race:
    """The conversion of a time-first tensor to time-last (``"forward"``), and of its gradient back (``"backward"``)."""
    shape = tuple(shape)
    strides = tuple(torch.empty(shape, device="meta").stride() if strides is None else strides)
    late = Layout.TIME_LAST.shape_from(shape, Layout.TIME_FIRST)

    def prepare() -> Mapping[str, Callable[[], object]]:
        first = pool.windows(shape, strides, dtype)
        last = pool.windows(late, torch.empty(late, device="meta").stride(), dtype)
        return {
            "forward": lambda: to_layout(next(first), "time_first", "time_last"),
            "backward": lambda: to_layout(next(last), "time_last", "time_first"),
        }

    key = {"op": "to_layout", "shape": list(shape), "strides": list(strides), "dtype": _plain(dtype)}
    setup = functools.partial(_reserve, pool, shape, strides, dtype)
    return Race(name, (Variant("to_layout", key, prepare),), device=pool.device, setup=setup)


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
