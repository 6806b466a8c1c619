"""The layer in one call of its kernel: as the op to the bit, and out of the way wherever somebody looks at the op."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from mfpsn_fx import MulFreePSN
from mfpsn_fx.kernels import neuron, register_kernel, unregister_kernel
from mfpsn_fx.kernels.build import cpu as cpu_build
from mfpsn_fx.kernels.constants import ALL, NeuronConstants
from mfpsn_fx.kernels.eager import run_layer
from mfpsn_fx.kernels.implementations.fused_cpu import FusedCpu

pytestmark = pytest.mark.skipif(cpu_build.unavailable() is not None, reason="no C++ compiler")

CONSTANTS = NeuronConstants(training=True, method="fused-cpp", layer="lif")


def leaf(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def operands(channels=3, order=2, dtype=torch.float32, affine=False):
    kept = torch.float64 if dtype is torch.float64 else torch.float32
    weight, gamma, beta = (
        leaf(*s, dtype=kept, seed=i).requires_grad_()
        for i, s in enumerate([(channels, order), (channels,), (channels,)])
    )
    statistics = leaf(channels, dtype=kept, seed=4), leaf(channels, dtype=kept, seed=5).abs() + 0.5
    pair = [leaf(channels, dtype=kept, seed=6 + i).requires_grad_() for i in range(2)] if affine else [None, None]
    return [weight, gamma, beta, *statistics, *pair]


def by_op(x, others, momentum, update, constants):
    """What MulFreePSN does with the op."""
    spikes, mean, var = neuron(x, *others, None, **constants.arguments(ALL))
    if update:
        count = x.numel() // others[1].numel()
        others[3].lerp_(mean, momentum)
        others[4].lerp_(var * (count / (count - 1)), momentum)
    return spikes


def outcome(run, x, others, grad):
    """Spikes, gradients, running statistics."""
    x = x.detach().requires_grad_()
    spikes = run(x, others)
    spikes.backward(grad)
    wanted = [t for t in (x, *others[:3], *others[5:]) if t is not None]
    results = [spikes.detach(), *(t.grad.clone() for t in wanted), others[3].clone(), others[4].clone()]
    return results, [r.stride() for r in results]


def test_results_do_not_depend_on_where_memory_lies():
    """A loop of the fold, vectorized up to an aligned address, rounded otherwise beyond: some runs differed."""
    stored = leaf(6, 6, 2, 10, 6, dtype=torch.float64)
    x = stored.permute(3, 0, 2, 4, 1)[::2, ::2, ::2, ::2, ::2]
    grad = leaf(*x.shape, dtype=torch.float64, seed=9)
    constants = dataclasses.replace(CONSTANTS, training=False, dilation=2)
    kept, first = [], None
    for i in range(1000):
        kept = [*kept[-20:], torch.empty(i % 7 * 8 + 1)]
        others = operands(1, 5, torch.float64, affine=True)
        found, _ = outcome(lambda x, o: by_op(x, o, 0.1, False, constants), x, others, grad)
        first = first or found
        for a, b in zip(first, found, strict=True):
            assert torch.equal(a, b)


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(st.integers(2, 6), st.integers(2, 3), st.sampled_from([1, 3, 17]), st.integers(1, 4), st.integers(1, 3)),
    st.permutations(range(5)),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    st.sampled_from(["time_first", "time_last"]),
    st.sampled_from(["straight-through", "round-only", "none"]),
    st.booleans(), st.booleans(), st.integers(1, 5), st.integers(1, 3), st.integers(1, 2),
)  # fmt: skip
def test_layer_is_the_op_to_the_bit(
    sizes, order_in_memory, dtype, layout, gradient, training, affine, order, dilation, gap
):
    """Any strides, also with gaps between elements."""
    wide = [s * gap for s in sizes]
    stored = leaf(*(wide[d] for d in order_in_memory), dtype=dtype)
    x = stored.permute([order_in_memory.index(d) for d in range(5)])[tuple(slice(None, None, gap) for _ in sizes)]
    channels = x.shape[2 if layout == "time_first" else 1]
    grad = leaf(*x.shape, dtype=dtype, seed=9)
    constants = dataclasses.replace(CONSTANTS, training=training, layout=layout, dilation=dilation, gradient=gradient)

    def layer(x, others):
        spikes = run_layer(x, *others, 0.1, training, constants)
        assert spikes is not None
        assert type(spikes.grad_fn).__name__ != "_NeuronBackward"
        return spikes

    make = functools.partial(operands, channels, order, dtype, affine)
    ours, our_strides = outcome(layer, x, make(), grad)
    theirs, strides = outcome(lambda x, o: by_op(x, o, 0.1, training, constants), x, make(), grad)
    assert our_strides == strides
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops.append(str(func))
        return func(*args, **(kwargs or {}))


def module():
    made = MulFreePSN(3)
    made.bind(kernel="fused-cpp", eval_kernel="fused-cpp")
    made.path = "net.lif"
    return made


def test_a_mode_sees_the_op():
    with Seen() as seen:
        module()(leaf(4, 2, 3))
    assert "mfpsn.neuron.default" in seen.ops


def test_a_profiler_sees_the_op():
    with torch.profiler.profile() as profile:
        module()(leaf(4, 2, 3))
    assert "mfpsn::neuron" in {event.name for event in profile.events()}


def test_a_tensor_of_another_class_sees_the_op():
    class Own(torch.Tensor):
        pass

    assert type(module()(leaf(4, 2, 3).as_subclass(Own))) is Own


def test_autocast_applies():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert module()(leaf(4, 2, 3)).dtype is torch.bfloat16


def test_forward_mode_is_refused():
    with (
        forward_ad.dual_level(),
        pytest.raises(RuntimeError, match=r"net\.lif: the neuron has no forward-mode derivative"),
    ):
        module()(forward_ad.make_dual(leaf(4, 2, 3), leaf(4, 2, 3)))


def test_second_derivatives_are_refused():
    x = leaf(4, 2, 3).requires_grad_()
    spikes = module()(x)
    with pytest.raises(RuntimeError, match=r"net\.lif: a surrogate gradient has no derivative"):
        torch.autograd.grad(spikes.sum(), x, create_graph=True)


def test_vmap_takes_the_op():
    made, x = module().eval(), leaf(2, 4, 2, 3)
    batched = torch.func.vmap(lambda x: made(x))(x)
    for one, alone in zip(batched, x, strict=True):
        assert torch.equal(one, made(alone))


def test_backward_twice_and_saved_tensor_hooks():
    made, x, grad = module(), leaf(4, 2, 3).requires_grad_(), leaf(4, 2, 3)
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        spikes = made(x)
    assert packed
    first = torch.autograd.grad(spikes, (x, made.weight), grad, retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(spikes, (x, made.weight), grad), strict=True):
        assert torch.equal(a, b)


def test_what_backward_needs_may_not_change():
    made, x = module(), leaf(4, 2, 3)
    spikes = made(x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        spikes.sum().backward()


def test_the_running_statistics_may_change_and_say_so():
    made = module()
    version = made.running_mean._version
    spikes = made(leaf(4, 2, 3))
    assert made.running_mean._version > version
    made(leaf(4, 2, 3, seed=1))
    spikes.sum().backward()


def test_no_gradient_where_none_is_wanted():
    made, x = module(), leaf(4, 2, 3)
    made.weight.requires_grad_(False)
    made(x).sum().backward()
    assert made.weight.grad is None
    assert made.gamma.grad is not None
    with torch.no_grad():
        assert made(x).grad_fn is None
    with torch.inference_mode():
        assert made.eval()(x).is_inference()


def test_parameters_that_do_not_fit_are_named():
    made = module()
    made.gamma = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=r"net\.lif: gamma must have shape \(3,\)"):
        made(leaf(4, 2, 3))


def test_one_value_per_channel_is_refused():
    with pytest.raises(ValueError, match=r"net\.lif: expected more than 1 value per channel"):
        module()(leaf(1, 1, 3))


def test_a_narrower_input_of_a_float64_layer_goes_through_the_op():
    made, x = module().double(), leaf(4, 2, 3)
    torch.testing.assert_close(made(x), made(x.double()).float(), rtol=0, atol=0)


def test_statistics_of_another_dtype_go_through_the_op():
    made = module()
    made.running_mean = made.running_mean.double()
    assert made(leaf(4, 2, 3)).dtype is torch.float32


def test_a_neuron_that_is_not_bound_takes_the_short_way_too():
    """A module written by hand is as fast as a converted one: it runs the layer of the kernel of highest rank."""
    x, runs = torch.randn(6, 4, 3, 2), []
    for method in ("", "fused-cpp"):
        constants = dataclasses.replace(CONSTANTS, method=method)
        others = [None if t is None else t.detach() for t in operands()]
        runs.append((run_layer(x, *others, 0.1, True, constants), *others))
    assert runs[0][0] is not None
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True) if a is not None)


def test_a_kernel_of_ones_own_may_have_a_layer():
    calls = []

    @register_kernel("counting-layer", devices=["cpu"])
    class Counting(FusedCpu):
        """Counts."""

        def layer(self, *args):
            calls.append(args[-1].method)
            return super().layer(*args)

    try:
        made = module()
        made.bind(kernel="counting-layer")
        made(leaf(4, 2, 3))
        assert calls == ["counting-layer"]
    finally:
        unregister_kernel("counting-layer")
