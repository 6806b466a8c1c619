"""Every kernel on a device against the float64 reference on the CPU, with nothing but torch: no pytest, no hypothesis.

Run with ``python benchmarks/gpu_kernels.py [--device cuda] [--kernels NAME …] [--seconds 150] [--shard 1/4] [--tiny]``.
It prints how many checks passed and failed by kernel, and exits with 1 if one failed. ``tests/kernels/test_kernels.py``
says more, where pytest is. A fault of the device poisons its process, so ``gpu_check.sh`` runs a process a kernel.

What is checked, over layouts, dtypes, orders, dilations, mask and affine, contiguous and channels-last memory:

* spikes for given taps: equal to the bit to ``shifted-add`` on the CPU, on inputs whose sums are exact for all kernels,
  and on real ones for those that sum their taps in order;
* spikes, statistics and gradients in training and in evaluation: within rounding of the reference;
* repeated runs: equal to the bit, for the kernels that sum in order.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import functools
import itertools
import math
import pathlib
import random
import sys
import time
import zlib

import checkout  # noqa: F401  (first: it makes mfpsn_fx importable from a bare checkout)
import torch
from runner import check_kernels, checked_device, environment, first_line, write

from mfpsn_fx.kernels import ATan, Kernel, Layout, Problem, fire, kernels, neuron, power_of_two, reference
from mfpsn_fx.kernels.implementations import fused_cuda, fused_cuda_plan

# Convolution and matrix-product kernels leave the order of the sum to their libraries (docs/guide/kernels.md); every
# other kernel sums taps i = 0 … k−1, then the bias.
INEXACT = frozenset({"vanilla-conv1d", "vmap-conv1d", "conv2d", "vmap-mm"})
DTYPES = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-3, torch.float16: 3e-2, torch.bfloat16: 3e-2}
EXTRAS = ("", "mask", "affine", "mask+affine")
EPS = 1e-2


@dataclasses.dataclass(frozen=True)
class Case:
    """One problem; all kernels meet the same values."""

    layout: Layout
    dtype: torch.dtype
    order: int
    dilation: int
    extras: str
    memory: str  # contiguous or channels-last
    shape: tuple[int, ...]  # (T, N, C, *)
    training: bool

    def __str__(self) -> str:
        return (
            f"{self.layout} {str(self.dtype).removeprefix('torch.')} k={self.order} d={self.dilation} "
            f"{self.extras or 'plain'} {self.memory} {self.shape} {'training' if self.training else 'evaluation'}"
        )

    @property
    def problem_shape(self) -> tuple[int, ...]:
        return self.layout.shape_from(self.shape, Layout.TIME_FIRST)


class Data:
    """The values of a case, on the CPU."""

    def __init__(self, case: Case) -> None:
        draw = torch.Generator().manual_seed(zlib.crc32(str(case).encode()))
        kept = torch.float64 if case.dtype is torch.float64 else torch.float32
        channels = case.shape[2]

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=draw, dtype=torch.float64)

        def integers(low: int, high: int, *shape: int) -> torch.Tensor:
            return torch.randint(low, high, shape, generator=draw)

        self.x, self.grad = (self.place(case, normal(*case.shape).to(case.dtype)) for _ in range(2))
        self.exact_x = self.place(case, integers(-8, 9, *case.shape).to(case.dtype))
        self.weight = normal(channels, case.order).to(kept)
        self.gamma, self.beta, self.mean = (normal(channels).to(kept) for _ in range(3))
        self.var = torch.rand(channels, generator=draw, dtype=torch.float64).to(kept) + 0.5
        self.taps = power_of_two(normal(channels, case.order).to(kept)).clamp(-4, 4)
        self.bias = normal(channels).to(kept)
        self.exact_bias = integers(-16, 17, channels).to(kept) / 4
        self.scale = self.shift = self.mask = None
        if "affine" in case.extras:
            self.scale, self.shift = integers(1, 4, channels).to(kept), integers(-2, 3, channels).to(kept)
        if "mask" in case.extras:
            self.mask = torch.rand(case.shape[:2], generator=draw) < 0.7
            self.mask[0, 0] = self.mask[-1, -1] = True

    @staticmethod
    def place(case: Case, x: torch.Tensor) -> torch.Tensor:
        if case.layout is Layout.TIME_LAST:
            x = x.movedim(0, -1)
        if case.memory == "contiguous":
            return x.contiguous()
        return channels_last(x, case.layout)

    def extras(self, device: torch.device) -> tuple[torch.Tensor | None, ...]:
        return tuple(None if t is None else on(device, t) for t in (self.scale, self.shift, self.mask))


def channels_last(x: torch.Tensor, layout: Layout) -> torch.Tensor:
    """The same values with channels innermost in memory."""
    return x.movedim(layout.channel_dim, -1).contiguous().movedim(-1, layout.channel_dim)


def on(device: torch.device, x: torch.Tensor) -> torch.Tensor:
    """A copy of ``x`` on the device, in the strides that it has."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device).copy_(x)


class Expected:
    """What the reference makes of a case, and the channels where it is sure of it."""

    def __init__(self, case: Case) -> None:
        self.data = data = Data(case)
        arguments = (data.x, data.weight, data.gamma, data.beta, data.mean, data.var)
        options = {
            "eps": EPS, "layout": case.layout, "dilation": case.dilation, "training": case.training,
            "scale": data.scale, "shift": data.shift, "mask": data.mask,
        }  # fmt: skip
        self.forward = reference.forward(*arguments, **options)
        self.backward = reference.backward(data.grad, *arguments, surrogate=ATan(2.0), **options)
        # a weight within rounding of 2^(n+½) may fall to either side: such channels are left out
        fused = (data.gamma.double() / torch.sqrt(self.forward.var + EPS))[:, None] * data.weight.double()
        near = 1e-12 if case.dtype is torch.float64 else 1e-4
        self.sure = ((torch.log2(fused.abs() + 1e-300) % 1) - 0.5).abs().amin(1) > near
        constants = {"dilation": case.dilation, "layout": str(case.layout), "method": "shifted-add"}
        extras = (data.scale, data.shift, data.mask)
        self.exact_spikes = fire(data.exact_x, data.taps, data.exact_bias, *extras, **constants)
        self.spikes = fire(data.x, data.taps, data.bias, *extras, **constants)


expected = functools.lru_cache(maxsize=64)(Expected)


def equal(found: torch.Tensor, wanted: torch.Tensor, what: str) -> None:
    wrong = int((found.cpu() != wanted.cpu()).sum())
    if wrong or found.stride() != wanted.stride():
        raise AssertionError(f"{what}: {wrong} of {wanted.numel()} differ, strides {found.stride()}, {wanted.stride()}")


def given_taps(name: str, case: Case, device: torch.device) -> None:
    """Spikes for given taps, equal to the bit where the sums are exact, or summed in the promised order."""
    want = expected(case)
    data, constants = want.data, {"dilation": case.dilation, "layout": str(case.layout), "method": name}
    taps, extras = data.taps.to(device), data.extras(device)
    found = fire(on(device, data.exact_x), taps, data.exact_bias.to(device), *extras, **constants)
    equal(found, want.exact_spikes, "spikes on exact sums")
    # scale · X + shift may be one fused operation or two: there the last bit is no one's promise
    if name not in INEXACT and data.scale is None:
        found = fire(on(device, data.x), taps, data.bias.to(device), *extras, **constants)
        equal(found, want.spikes, "spikes against shifted-add")


def _run(name: str, case: Case, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Spikes, μ, σ² and the gradients of all that is learned."""
    data = expected(case).data
    x = on(device, data.x).requires_grad_()
    learned = [on(device, t).requires_grad_() for t in (data.weight, data.gamma, data.beta)]
    scale, shift, mask = data.extras(device)
    affine = [] if scale is None else [scale.requires_grad_(), shift.requires_grad_()]
    spikes, mean, var = neuron(
        x, *learned, data.mean.to(device), data.var.to(device), scale, shift, mask, eps=EPS, alpha=2.0,
        training=case.training, dilation=case.dilation, layout=str(case.layout), method=name,
    )  # fmt: skip
    gradients = torch.autograd.grad(spikes, [x, *learned, *affine], on(device, data.grad))
    return spikes.detach(), mean, var, *gradients


def whole(name: str, case: Case, device: torch.device) -> None:
    """Spikes, statistics and gradients within rounding of the reference; x's gradient in x's strides."""
    want = expected(case)
    spikes, mean, var, *gradients = _run(name, case, device)
    channel, tolerance = case.layout.channel_dim, TOLERANCE[case.dtype]

    def sure(t: torch.Tensor) -> torch.Tensor:
        return t.double().cpu().movedim(channel if t.ndim > 2 else 0, 0)[want.sure]

    near = 1e-3 * (1 + float(want.data.x.abs().max()))
    wrong = (sure(spikes) != sure(want.forward.spikes)) & (sure(want.forward.membrane).abs() > near)
    if bool(wrong.any()):
        raise AssertionError(f"{int(wrong.sum())} of {wrong.numel()} spikes differ from the reference's")
    if case.training:
        torch.testing.assert_close(mean.double().cpu(), want.forward.mean, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(var.double().cpu(), want.forward.var, rtol=1e-3, atol=1e-4)
    if gradients[0].stride() != torch.empty_like(want.data.x).stride():
        raise AssertionError(f"dX has strides {gradients[0].stride()}, X has {want.data.x.stride()}")
    names = ("dX", "dW", "dgamma", "dbeta", "dscale", "dshift")
    for label, found, wanted in zip(names, gradients, [g for g in want.backward if g is not None], strict=False):
        found, wanted = sure(found), sure(wanted)
        scaled = tolerance * max(1.0, float(wanted.abs().max()) if wanted.numel() else 1.0)
        torch.testing.assert_close(found, wanted, rtol=tolerance, atol=scaled, msg=lambda m, s=label: f"{s}: {m}")


def repeated(name: str, case: Case, device: torch.device) -> None:
    """The same bits each time."""
    first = _run(name, case, device)
    for _ in range(2):
        for a, b in zip(first, _run(name, case, device), strict=True):
            if not torch.equal(a, b):
                raise AssertionError("results differ between runs")


SHAPES = ((9, 3, 5, 7), (12, 2, 64, 4, 4), (16, 2, 8, 8), (4, 2, 16, 7, 7), (97, 1, 4, 3), (1, 2, 3))  # (T, N, C, *)


def cases(tiny: bool = False, layout: str | None = None) -> list[Case]:
    """The product of everything, ordered so that a prefix covers as much as it can.

    First come cases that each add the most of what none before has covered: above all combinations of memory access
    with dtype and with mask, then pairs of any settings. When all is covered come the rest, shuffled (seeded), so that
    what a time limit leaves out is spread over all of it.
    """
    product = itertools.product(
        Layout if layout is None else [Layout.parse(layout)],
        DTYPES.values() if not tiny else (torch.float32, torch.bfloat16),
        (1, 2, 4, 8, 17) if not tiny else (2, 4),
        (1, 2, 3) if not tiny else (1, 2),
        EXTRAS if not tiny else ("", "mask+affine"),
        ("contiguous", "channels-last"),
        SHAPES if not tiny else ((8, 2, 8, 8),),
        (True, False),
    )
    found = [Case(*values) for values in product]
    random.Random(0).shuffle(found)
    covered = {case: (accesses(case), pairs(case)) for case in found}
    new_accesses, new_pairs = (set().union(*kind) for kind in zip(*covered.values(), strict=True))
    first = []
    while new_pairs or new_accesses:
        best = max(found, key=lambda c: (len(covered[c][0] & new_accesses), len(covered[c][1] & new_pairs)))
        first.append(best)
        new_accesses -= covered[best][0]
        new_pairs -= covered[best][1]
    chosen = set(first)
    return first + [case for case in found if case not in chosen]


def pairs(case: Case) -> frozenset:
    """Each pair of the settings of ``case``."""
    return frozenset(itertools.combinations(enumerate(dataclasses.astuple(case)), 2))


def accesses(case: Case) -> frozenset:
    """How ``case`` goes through memory, with its dtype and with its mask."""
    return frozenset([(access(case), case.dtype), (access(case), "mask" in case.extras)])


def access(case: Case) -> tuple[bool, int, bool, int]:
    """How the CUDA kernel would go through memory.

    Returns:
        Whether threads stand along channels, elements of a load, whether time goes through shared memory, and elements
        of a load of that.
    """
    x = Data.place(case, torch.empty(case.shape, dtype=case.dtype, device="meta"))
    geometries = (fused_cuda._geometry(x, case.layout),) * 3
    steps, batch, channels, *places = case.shape
    shape = (steps, batch, channels, math.prod(places))
    dilation, size = min(case.dilation, steps), case.dtype.itemsize
    plan = fused_cuda_plan.plan(shape, case.order, dilation, size, geometries, 132)
    return bool(plan.lanes), plan.vector, plan.tile > 0, plan.wide_tile


def allowed(kernel: Kernel, case: Case, device: torch.device) -> str | None:
    """Why the kernel does not serve the case, or None."""
    return kernel.refusal(
        Problem(
            case.problem_shape, case.layout, case.dtype, device.type, case.order, case.dilation,
            training=case.training, masked="mask" in case.extras, affine="affine" in case.extras,
        )
    )  # fmt: skip


FAULTS = ("illegal memory access", "misaligned address", "unspecified launch failure", "device-side assert")


def check(
    names: tuple[str, ...],
    device: torch.device,
    seconds: float | None,
    selected: list[Case],
    shown: int = 5,
    json_file: pathlib.Path | None = None,
) -> int:
    """Run the checks on ``selected`` and print what was found; return how many failed, 1 if nothing was checked.

    The counts are written to ``json_file`` after each case. It ends at a fault of the device, since every call after it
    fails.
    """
    chosen = [kernel for kernel in kernels() if not names or kernel.name in names]
    counts: dict[str, collections.Counter] = {kernel.name: collections.Counter() for kernel in chosen}
    refusals: dict[str, collections.Counter] = {kernel.name: collections.Counter() for kernel in chosen}
    failures: list[str] = []
    started = time.perf_counter()
    done, fault = 0, False
    for case in selected:
        if fault or (seconds is not None and time.perf_counter() - started > seconds):
            break
        done += 1
        for kernel in chosen:
            if (reason := allowed(kernel, case, device)) is not None:
                refusals[kernel.name][reason] += 1
                continue
            checks = [given_taps, whole] + ([] if kernel.name in INEXACT else [repeated])
            for one in checks:
                try:
                    one(kernel.name, case, device)
                except Exception as error:  # a kernel that raises has failed; the others are still to be checked
                    counts[kernel.name]["failed"] += 1
                    failures.append(f"{kernel.name} {one.__name__}, {case}: {first_line(error)}")
                    if counts[kernel.name]["failed"] <= shown:
                        print(f"FAILED {failures[-1]}", flush=True)
                    fault = any(text in str(error) for text in FAULTS)
                    if fault:
                        break
                else:
                    counts[kernel.name]["passed"] += 1
            if fault:
                break
        write(json_file, {"cases": done, "of": len(selected), "counts": counts, "failures": failures})
    print(f"{done} of {len(selected)} cases in {time.perf_counter() - started:.0f} s")
    if fault:
        print("ended at a fault of the device, after which every call fails")
    for name, count in counts.items():
        print(f"{name}: {count['passed']} checks passed, {count['failed']} failed")
        for reason, times in refusals[name].most_common(3):
            print(f"    not run in {times} cases: {reason}")
    passed = sum(count["passed"] for count in counts.values())
    if not passed:
        print("FAILED: no check passed")
    return sum(count["failed"] for count in counts.values()) or int(not passed)


def shard(text: str) -> tuple[int, int]:
    """``"2/4"`` as (2, 4): every fourth case, from the second on."""
    index, _, count = text.partition("/")
    if not (index.isdigit() and count.isdigit() and 1 <= int(index) <= int(count)):
        raise argparse.ArgumentTypeError(f"a shard is I/N with 1 <= I <= N, such as 2/4, not {text}")
    return int(index), int(count)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--kernels", nargs="+", default=(), metavar="NAME")
    parser.add_argument("--seconds", type=float, help="stop after so many; default: when all is done")
    parser.add_argument(
        "--shard", type=shard, default=(1, 1), metavar="I/N", help="only each N-th case, from the I-th on"
    )
    parser.add_argument("--layout", choices=[str(layout) for layout in Layout], help="only this one")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose description, as in a failure, has TEXT")
    parser.add_argument("--tiny", action="store_true", help="a few small cases, as for compute-sanitizer")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the counts, after each case")
    options = parser.parse_args(argv)
    device = checked_device(options.device)
    check_kernels(parser, options.kernels)
    # TF32 is a choice of PyTorch's for convolutions and products, not an error of the kernels that call them
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    print(environment(device)["text"])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the reference's tensors are small: on a busy machine threads wait for each other
    index, count = options.shard
    selected = [case for case in cases(options.tiny, options.layout) if options.only in str(case)][index - 1 :: count]
    try:
        return int(check(tuple(options.kernels), device, options.seconds, selected, json_file=options.json) > 0)
    finally:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    sys.exit(main())
