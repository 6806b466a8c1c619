"""Every kernel x layout x dtype x dilation x order against the float64 reference, and which ATen calls each makes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from mfpsn_fx.kernels import ATan, Layout, fire, kernels, neuron, power_of_two, reference
from mfpsn_fx.kernels.constants import NeuronConstants
from mfpsn_fx.kernels.implementations import vmap as vmapping_module
from mfpsn_fx.kernels.registry import FLOATS

ON_CPU = [k for k in kernels() if k.devices is None or "cpu" in k.devices]
PAIRS = [pytest.param(k.name, layout, id=f"{k.name}-{layout}") for k in ON_CPU for layout in k.layouts]
OPTIONS = settings(max_examples=60, deadline=None, derandomize=True)


@pytest.fixture(autouse=True)
def _poisoned():
    """Fresh memory is full of NaN: a kernel that reads what nothing has written fails every comparison here."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@st.composite
def problems(draw):
    """Sizes, order, dilation, how the memory is laid out, extras, and a seed for the values."""
    return {
        "steps": draw(st.integers(1, 9)),
        "batch": draw(st.integers(1, 3)),
        "channels": draw(st.integers(1, 4)),
        "rest": draw(st.lists(st.integers(1, 3), max_size=2)),
        "order": draw(st.integers(1, 5)),
        "dilation": draw(st.integers(1, 4)),
        "memory": draw(st.sampled_from(["contiguous", "permuted", "sliced", "expanded"])),
        "extras": draw(st.sampled_from(["", "mask", "affine", "mask+affine"])),
        "seed": draw(st.integers(0, 2**16)),
    }


def place(p: dict, layout: Layout, dtype: torch.dtype, generator: torch.Generator, integers: bool) -> torch.Tensor:
    """An input of the problem with its strides."""
    time_first = (p["steps"], p["batch"], p["channels"], *p["rest"])
    shape = layout.shape_from(time_first, Layout.TIME_FIRST)

    def values(*size):
        if integers:
            return torch.randint(-8, 9, size, generator=generator).to(dtype)
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

    if p["memory"] == "permuted":
        order = torch.randperm(len(shape), generator=generator).tolist()
        x = values(*(shape[i] for i in order)).permute([order.index(i) for i in range(len(shape))])
    elif p["memory"] == "sliced":
        x = values(*shape[:-1], 2 * shape[-1] + 1)[..., 1::2]
    elif p["memory"] == "expanded":
        x = values(*shape[:-1], 1).expand(shape)
    else:
        x = values(*shape)
    assert x.shape == shape
    return x


def extras(p: dict, generator: torch.Generator, dtype=torch.float64):
    c = p["channels"]
    scale = shift = mask = None
    if "affine" in p["extras"]:
        scale = torch.randint(1, 4, (c,), generator=generator).to(dtype)
        shift = torch.randint(-2, 3, (c,), generator=generator).to(dtype)
    if "mask" in p["extras"]:
        mask = torch.rand(p["steps"], p["batch"], generator=generator) < 0.7
    return scale, shift, mask


@pytest.mark.parametrize(("name", "layout"), PAIRS)
@pytest.mark.parametrize("integers", [True, False], ids=["integers", "reals"])
def test_spikes_given_the_same_taps(name, layout, integers):
    doubtful = total = 0

    @OPTIONS
    @given(problems(), st.sampled_from(FLOATS))
    def check(p, dtype):
        nonlocal doubtful, total
        g = torch.Generator().manual_seed(p["seed"])
        x = place(p, layout, dtype, g, integers)
        taps = power_of_two(torch.randn(p["channels"], p["order"], generator=g))
        taps = taps.clamp(-4, 4) if integers else taps
        bias = torch.randint(-16, 17, (p["channels"],), generator=g).float() / 4
        scale, shift, mask = extras(p, g, torch.float32)
        before = x.clone()
        spikes = fire(x, taps, bias, scale, shift, mask, dilation=p["dilation"], layout=str(layout), method=name)
        assert torch.equal(x, before)
        assert spikes.dtype is dtype
        assert spikes.shape == x.shape
        assert spikes.stride() == torch.empty_like(x).stride()
        one = torch.ones(p["channels"], dtype=torch.float64)
        # running statistics (0, 1 − ε), γ = 1 and no quantizer: the reference fires with these taps and this bias
        found = reference.forward(
            x, taps, one, bias, 0 * one, one, eps=0.0, dilation=p["dilation"], gradient="none", layout=layout,
            scale=scale, shift=shift, mask=mask,
        )  # fmt: skip
        size = 1 + float(x.double().abs().max()) * (4 if scale is not None else 1) + 3
        bound = 0.0 if integers else 1e-6 * size * float(taps.abs().sum(1).max() + bias.abs().max() + 1)
        close = found.membrane.abs() <= bound
        wrong = spikes.double() != found.spikes
        assert not bool((wrong & ~close).any() if not integers else wrong.any())
        doubtful, total = doubtful + int(close.sum()), total + wrong.numel()

    check()
    assert doubtful <= 0.02 * total, f"{doubtful} of {total} membranes within rounding of 0: too many to tell"


@pytest.mark.parametrize(("name", "layout"), PAIRS)
@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d).removeprefix("torch."))
def test_training_and_gradients(name, layout, dtype):
    flipped = total = 0

    @OPTIONS
    @given(problems(), st.sampled_from(["straight-through", "round-only", "none"]), st.booleans())
    def check(p, gradient, training):
        nonlocal flipped, total
        if p["steps"] * p["batch"] * math.prod(p["rest"]) == 1:
            training = False
        g = torch.Generator().manual_seed(p["seed"])
        kept = torch.float64 if dtype is torch.float64 else torch.float32
        x = place(p, layout, dtype, g, False).requires_grad_()
        c, k = p["channels"], p["order"]
        weight, gamma, beta, mean = (torch.randn(*s, generator=g, dtype=kept) for s in ((c, k), (c,), (c,), (c,)))
        var = torch.rand(c, generator=g, dtype=kept) + 0.5
        scale, shift, mask = extras(p, g, kept)
        learned = [weight, gamma, beta] + ([scale, shift] if scale is not None else [])
        for parameter in learned:
            parameter.requires_grad_()
        constants = {"dilation": p["dilation"], "gradient": gradient, "training": training}
        spikes, _, _ = neuron(
            x, weight, gamma, beta, mean, var, scale, shift, mask, alpha=2.0, layout=str(layout), method=name,
            eps=1e-2, **constants,
        )  # fmt: skip
        grad = torch.randn(spikes.shape, generator=g, dtype=torch.float64).to(dtype)
        gradients = torch.autograd.grad(spikes, [x, *learned], grad)
        assert gradients[0].stride() == torch.empty_like(x).stride()
        with torch.no_grad():
            arguments = (x, weight, gamma, beta, mean, var)
            options = {"eps": 1e-2, "layout": layout, "scale": scale, "shift": shift, "mask": mask, **constants}
            expected = reference.forward(*arguments, **options)
            found = reference.backward(grad, *arguments, surrogate=ATan(2.0), **options)
            # a fused weight within rounding of 2^(n+½) may fall to either side: such channels are counted apart
            std = torch.sqrt(expected.var + 1e-2)
            fused = (gamma.double() / std)[:, None] * weight.double()
            near = 1e-4 if kept is torch.float32 else 1e-12
            sure = (torch.log2(fused.abs() + 1e-300) % 1 - 0.5).abs().amin(1) > near
            if gradient == "none":
                sure = torch.ones_like(sure)
        flipped, total = flipped + int((~sure).sum()), total + c
        ours = spikes.detach().double().movedim(layout.channel_dim, 0)[sure]
        theirs = expected.spikes.movedim(layout.channel_dim, 0)[sure]
        close = expected.membrane.movedim(layout.channel_dim, 0)[sure].abs() <= 1e-3 * (1 + x.detach().abs().max())
        assert bool(((ours == theirs) | close).all())
        tolerance = {torch.float64: 1e-9, torch.float32: 2e-3}.get(dtype, 3e-2)
        for value, want in zip(gradients, [g for g in found if g is not None], strict=True):
            channel = layout.channel_dim if value.ndim > 2 else 0
            value, want = value.double().movedim(channel, 0)[sure], want.movedim(channel, 0)[sure]
            scaled = tolerance * max(1.0, float(want.abs().max()) if want.numel() else 1.0)
            torch.testing.assert_close(value, want, rtol=tolerance, atol=scaled)

    check()
    assert flipped <= 0.02 * total, (
        f"{flipped} of {total} channels within rounding of a quantizer step: too many to tell"
    )


@pytest.mark.parametrize(("name", "layout"), PAIRS)
def test_kernels_agree_to_the_bit_given_the_same_taps(name, layout):
    """Powers of two and dyadic inputs: sums are exact, so the order of summing cannot show."""
    x = torch.randint(-64, 64, (7, 2, 3, 4)).float() / 8
    x = x if layout is Layout.TIME_FIRST else x.movedim(0, -1).contiguous()
    taps, bias = power_of_two(torch.randn(3, 4)), torch.tensor([-0.5, 0.0, 0.25])
    ours = fire(x, taps, bias, dilation=2, layout=str(layout), method=name)
    assert torch.equal(ours, fire(x, taps, bias, dilation=2, layout=str(layout)))


def test_padding_is_never_read():
    x = torch.randn(5, 2, 3)
    mask = torch.ones(5, 2, dtype=torch.bool)
    mask[3:, 1] = False
    spoilt = x.clone()
    spoilt[3:, 1] = float("nan")
    weight, one = torch.randn(3, 2, requires_grad=True), torch.ones(3)
    for kernel in kernels("time_first"):
        results = []
        for value in (x, spoilt):
            spikes, mean, var = neuron(value, weight, one, -one, 0 * one, one, None, None, mask, training=True,
                                       method=kernel.name)  # fmt: skip
            (dw,) = torch.autograd.grad(spikes.sum(), weight)
            results.append((spikes, mean, var, dw))
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b), kernel.name


class _Calls(TorchDispatchMode):
    """Records the ATen calls under a custom op, with the rank of their first tensor."""

    def __init__(self):
        super().__init__()
        self.seen: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        first = next((a for a in args if isinstance(a, torch.Tensor)), None)
        self.seen.append((func.overloadpacket.__name__, -1 if first is None else first.ndim))
        return func(*args, **(kwargs or {}))


def _calls(name, layout, monkeypatch):
    """(ATen calls of filter, of filter_backward, how often vmap was entered)."""
    from mfpsn_fx.kernels import get_kernel
    from mfpsn_fx.kernels.implementations import conv1d, toeplitz
    from mfpsn_fx.kernels.kernel import Call

    entered = []

    def spy(*args, **kwargs):
        entered.append(args[0])
        return vmapping_module.vmap(*args, **kwargs)

    for module in (conv1d, toeplitz):
        monkeypatch.setattr(module, "vmap", spy)
    parts = get_kernel(name).parts
    x = torch.randn(Layout.shape_from(layout, (6, 2, 3, 4), Layout.TIME_FIRST))
    call, w = Call(NeuronConstants(dilation=2, layout=str(layout)), torch.float32), torch.randn(3, 2)
    with _Calls() as forward:
        parts.filter(call, x, w)
    with _Calls() as backward:
        parts.filter_backward(call, torch.randn_like(x), x, w, True)
    return forward.seen, backward.seen, len(entered)


COPIES = {"clone", "copy_", "_to_copy", "contiguous"}


@pytest.mark.parametrize(
    ("name", "layout", "works", "rank", "copies", "vmaps"),
    [
        ("vanilla-conv1d", Layout.TIME_FIRST, "convolution", 3, True, False),
        ("vanilla-conv1d", Layout.TIME_LAST, "convolution", 3, True, False),
        ("vmap-conv1d", Layout.TIME_LAST, "convolution", 3, True, True),
        ("conv2d", Layout.TIME_LAST, "convolution", 4, False, False),
        ("vmap-mm", Layout.TIME_FIRST, "bmm", 3, True, True),
        ("vmap-mm", Layout.TIME_LAST, "bmm", 3, True, True),
        ("shifted-add", Layout.TIME_FIRST, "addcmul_", 4, False, False),
        ("shifted-add", Layout.TIME_LAST, "addcmul_", 4, False, False),
    ],
)
def test_aten_calls(name, layout, works, rank, copies, vmaps, monkeypatch):
    """Each name is an implementation of its own: the calls that do the work, on which rank, with or without copies."""
    forward, backward, entered = _calls(name, layout, monkeypatch)
    ours = [call for call in forward if call[0] in ("convolution", "bmm", "addcmul_", "mm")]
    assert {op for op, _ in ours} == {works}
    assert {r for _, r in ours} == {rank}
    if name != "conv2d":  # its output, cut to T steps, is reshaped to X's shape by a copy
        assert any(op in COPIES for op, _ in forward) is copies
    else:
        before = [op for op, _ in forward[: forward.index(("convolution", 4))]]
        assert not COPIES & set(before)
    assert bool(entered) is vmaps
    theirs = {"convolution": "convolution_backward"}.get(works, works)
    assert theirs in {op for op, _ in backward}


def test_steps_beyond_the_reach_read_zeros():
    x, taps = torch.ones(2, 1, 1), torch.tensor([[8.0, 4.0, 1.0]])
    for kernel in kernels("time_first"):
        assert fire(x, taps, torch.tensor([-2.0]), dilation=5, method=kernel.name).sum() == 0, kernel.name
        assert fire(x, taps, torch.tensor([-1.0]), dilation=5, method=kernel.name).sum() == 2, kernel.name


@pytest.mark.parametrize("shape", [(0, 2, 3), (4, 0, 3), (4, 2, 3, 0)])
def test_nothing_in_nothing_out(shape):
    one = torch.ones(3)
    for kernel in kernels("time_first"):
        x = torch.zeros(shape, requires_grad=True)
        spikes, _, _ = neuron(x, torch.ones(3, 2), one, -one, 0 * one, one, method=kernel.name)
        assert spikes.shape == shape
        spikes.sum().backward()
        assert x.grad.shape == shape
