"""The op: opcheck, compiling, autocast, its parts, its faults."""

from __future__ import annotations

import contextlib
import logging
import os

import pytest
import torch

from mfpsn_fx import MulFreePSN
from mfpsn_fx.kernels import (
    Layout,
    Problem,
    default_kernel,
    fold,
    get_kernel,
    kernels,
    neuron,
    register_kernel,
    unregister_kernel,
)
from mfpsn_fx.kernels.implementations.shifted_add import ShiftedAdd
from mfpsn_fx.kernels.op import _warned

OPS = torch.ops.mfpsn
# "fused-cpp", or "shifted-add" where there is no compiler
DEFAULT = default_kernel(Problem((5, 2, 3), Layout.TIME_FIRST, torch.float32, "cpu", 2, 1)).name


def sample(layout="time_first", dtype=torch.float64, extras=False, grad=True):
    shape = (5, 2, 3, 4) if layout == "time_first" else (2, 3, 4, 5)
    x = torch.randn(shape, dtype=dtype, requires_grad=grad)
    w, g, b, m = (torch.randn(*s, dtype=torch.float64) for s in ((3, 2), (3,), (3,), (3,)))
    v = torch.rand(3, dtype=torch.float64)
    more = ()
    if extras:
        more = (torch.rand(3, dtype=torch.float64), torch.rand(3, dtype=torch.float64), torch.rand(5, 2) < 0.8)
        more[0].requires_grad_(grad)
        more[1].requires_grad_(grad)
    for t in (w, g, b):
        t.requires_grad_(grad)
    return (x, w, g, b, m, v, *more)


@pytest.mark.parametrize("layout", list(Layout))
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("extras", [True, False])
def test_opcheck_neuron(layout, training, extras):
    constants = {"training": training, "layout": str(layout), "dilation": 2, "layer": "here"}
    torch.library.opcheck(OPS.neuron.default, sample(layout, extras=extras), constants)


@pytest.mark.parametrize("name", [k.name for k in kernels()])
def test_opcheck_each_kernel(name):
    layout = str(next(k for k in kernels() if k.name == name).layouts[0])
    torch.library.opcheck(OPS.neuron.default, sample(layout), {"training": True, "layout": layout, "method": name})


@pytest.mark.parametrize("layout", list(Layout))
@pytest.mark.parametrize("extras", [True, False])
def test_opcheck_parts(layout, extras):
    place = {"layout": str(layout), "dilation": 2}
    x, w, g, b, m, v, *more = sample(layout, extras=extras, grad=False)
    grad = torch.randn_like(x)
    torch.library.opcheck(OPS.statistics.default, (x, w, *more), place)
    torch.library.opcheck(OPS.fire.default, (x, w, b, *more), place)
    torch.library.opcheck(OPS.backward_reductions.default, (grad, x, w, b, *more), place)
    torch.library.opcheck(OPS.backward_input.default, (grad, x, w, b, w, m, v, *more), place)
    torch.library.opcheck(OPS.backward_input.default, (grad, x, w, b, w, None, None, *more), place)
    for training in (True, False):
        for input_grad in (True, False):
            constants = {**place, "training": training, "input_grad": input_grad}
            torch.library.opcheck(OPS.neuron_backward.default, (grad, x, w, g, b, m, v, *more), constants)


def test_parts_make_up_the_whole():
    """Statistics and gradients of two halves of a batch, added up by hand, are those of the whole batch."""
    x, w, g, b, m, v = sample(grad=False)
    x = torch.randn(5, 6, 3, 4, dtype=torch.float64)
    grad = torch.randn_like(x)
    whole, mean, var = neuron(x, w, g, b, m, v, training=True)
    expected = OPS.neuron_backward(grad, x, w, g, b, mean, var, training=True)
    halves = [x[:, :3], x[:, 3:]]
    stats = [OPS.statistics(half, w) for half in halves]
    mu = (stats[0][0] + stats[1][0]) / 2
    sigma = sum(s[1] + (s[0] - mu) ** 2 for s in stats) / 2
    torch.testing.assert_close(mu, mean)
    torch.testing.assert_close(sigma, var)
    taps, bias, _, gain, std = fold(w, g, b, mu, sigma, 1e-5)
    assert torch.equal(torch.cat([OPS.fire(half, taps, bias) for half in halves], 1), whole)
    grads = [grad[:, :3], grad[:, 3:]]
    sums = [OPS.backward_reductions(d, half, taps, bias) for d, half in zip(grads, halves, strict=True)]
    dtaps, dbias = sums[0][0] + sums[1][0], sums[0][1] + sums[1][1]
    dgain = (dtaps * w).sum(1) - dbias * mu
    count = x.numel() // 3
    slope = -dgain * g / std**3 / count
    offset = -gain * dbias / count - slope * mu
    parts = [OPS.backward_input(d, half, taps, bias, w, offset, slope) for d, half in zip(grads, halves, strict=True)]
    torch.testing.assert_close(torch.cat([p[0] for p in parts], 1), expected[0])
    torch.testing.assert_close(dtaps * gain[:, None] + parts[0][1] + parts[1][1], expected[1])
    torch.testing.assert_close(dgain / std, expected[2])
    torch.testing.assert_close(dbias, expected[3])


def run(function, arguments):
    leaves = [a for a in arguments if a.requires_grad]
    spikes, mean, var = function(*arguments)
    gradients = torch.autograd.grad((spikes * torch.arange(spikes.numel()).view(spikes.shape)).sum(), leaves)
    return [spikes, mean, var, *gradients]


@pytest.mark.parametrize("layout", list(Layout))
@pytest.mark.parametrize("training", [True, False])
def test_aot_eager_is_equal_to_the_bit(layout, training):
    for kernel in kernels(layout):
        torch._dynamo.reset()
        arguments = sample(str(layout), dtype=torch.float32)

        def call(*a, name=kernel.name):
            return neuron(*a, training=training, layout=str(layout), method=name, dilation=2)

        compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
        for ours, theirs in zip(run(call, arguments), run(compiled, arguments), strict=True):
            assert torch.equal(ours, theirs), kernel.name


@pytest.mark.parametrize("name", ["shifted-add", "vmap-mm"])
def test_inductor_is_close_in_float64(name):
    arguments = sample()

    def call(*a):
        spikes, mean, var = neuron(a[0] * 2 + 1, *a[1:], training=True, method=name)
        return spikes * 3, mean, var

    for ours, theirs in zip(run(call, arguments), run(torch.compile(call, fullgraph=True), arguments), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_x_alone(dtype):
    x, w, g, b, m, v = (t.detach().float() for t in sample())
    w.requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        spikes, mean, _ = neuron(x, w, g, b, m, v, training=True)
        exact, *_ = neuron(x.double(), w.double(), g.double(), b.double(), m, v, training=True)
    assert spikes.dtype is dtype
    assert mean.dtype is torch.float32
    assert exact.dtype is torch.float64
    expected, wanted, _ = neuron(x.to(dtype), w, g, b, m, v, training=True)
    assert torch.equal(spikes, expected)
    assert torch.equal(mean, wanted)
    spikes.sum().backward()
    assert w.grad.dtype is torch.float32


def test_half_precision_keeps_sums_in_float32():
    x, w, g, b, m, v = (t.detach().float() for t in sample())
    low = neuron(x.bfloat16(), w, g, b, m, v, training=True)
    high = neuron(x.bfloat16().float(), w, g, b, m, v, training=True)
    assert torch.equal(low[0].float(), high[0])
    assert torch.equal(low[1], high[1])


def test_running_statistics_may_change_between_forward_and_backward():
    arguments = sample()
    spikes, mean, _ = neuron(*arguments, training=True)
    arguments[4].lerp_(mean, 0.1)
    arguments[5].mul_(0.5)
    spikes.sum().backward()
    assert arguments[1].grad is not None


@pytest.mark.parametrize("method", ["shifted-add", "fused-cpp"])
class TestOperands:
    """Kernels read through pointers: what does not fit is refused before they see it."""

    def test_lengths(self, method):
        x, w, g, b, m, v = sample(grad=False)
        for wrong in range(2, 6):
            arguments = [x, w, g, b, m, v]
            arguments[wrong] = arguments[wrong][:1]
            with pytest.raises(ValueError, match=r"must have shape \(3,\)"):
                neuron(*arguments, method=method)

    def test_gradient(self, method):
        x, w, g, b, m, v = sample(grad=False)
        with pytest.raises(ValueError, match="the gradient must be shaped as the input"):
            torch.ops.mfpsn.neuron_backward(x[:1], x, w, g, b, m, v, method=method)

    def test_offset_and_slope_of_another_dtype(self, method):
        x, w, _, b, m, v = (t.float() for t in sample(grad=False))
        call = (torch.ones_like(x), x, w, b, w)
        wanted = torch.ops.mfpsn.backward_input(*call, m, v, method=method)
        found = torch.ops.mfpsn.backward_input(*call, m.double(), v.double(), method=method)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))

    def test_second_derivatives_are_refused(self, method):
        arguments = sample()
        spikes, *_ = neuron(*arguments, training=True, method=method)
        with pytest.raises(RuntimeError, match="surrogate gradient has no derivative"):
            torch.autograd.grad(spikes.sum(), arguments[0], create_graph=True)

    def test_forward_mode_is_refused(self, method):
        x, *rest = sample(grad=False)
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
            with pytest.raises(RuntimeError, match="no forward-mode derivative"):
                neuron(dual, *rest, method=method)

    def test_functional_gradients_are_refused(self, method):
        x, *rest = sample(grad=False)
        with pytest.raises(RuntimeError, match=r"cannot be differentiated by torch\.func; call backward"):
            torch.func.grad(lambda x: neuron(x, *rest, method=method)[0].sum())(x)


def test_nothing_is_altered_or_aliased():
    arguments = sample(extras=True)
    before = [a.clone() for a in arguments]
    outputs = neuron(*arguments, training=True)
    outputs[0].sum().backward()
    assert all(torch.equal(a, c) for a, c in zip(arguments, before, strict=True))
    storages = {a.untyped_storage().data_ptr() for a in arguments}
    assert not storages & {o.untyped_storage().data_ptr() for o in outputs}


def test_only_what_is_needed_is_computed(monkeypatch):
    """No input gradient: the first layer's backward writes none."""
    x, *rest = sample()
    x = x.detach()
    spikes, *_ = neuron(x, *rest, training=True)
    spikes.sum().backward()
    assert x.grad is None
    assert rest[0].grad is not None


class TestFaults:
    def call(self, x=None, **constants):
        torch.manual_seed(0)
        arguments = list(sample(grad=False))
        if x is not None:
            arguments[0] = x
        mask = constants.pop("mask", None)
        return neuron(*arguments, None, None, mask, layer="net.lif", **constants)

    def test_integer_input(self):
        with pytest.raises(TypeError, match=r"net\.lif: the input must be floating point, found torch.int64"):
            self.call(torch.ones(5, 2, 3, dtype=torch.int64))

    def test_rank(self):
        with pytest.raises(ValueError, match=r"net\.lif: the input must have at least 3 dims, \(T, N, C, \*\)"):
            self.call(torch.ones(5, 3))

    def test_channels(self):
        with pytest.raises(ValueError, match=r"net\.lif: expected 3 channels in dim 2 .* found 4"):
            self.call(torch.ones(5, 2, 4))
        with pytest.raises(ValueError, match=r"expected 3 channels in dim 1 of the time_last input"):
            self.call(torch.ones(5, 2, 3), layout="time_last")

    @pytest.mark.parametrize(
        ("constants", "message"),
        [
            ({"dilation": 0}, "dilation must be at least 1"),
            ({"layout": "sideways"}, "unknown layout"),
            ({"surrogate": "none"}, "unknown surrogate"),
            ({"gradient": "guess"}, "unknown quantizer gradient"),
            ({"min_exponent": 5, "max_exponent": 1}, "exponent bounds"),
            ({"mask": torch.ones(2, 5, dtype=torch.bool)}, r"mask must be bool of shape \(T, N\) = \(5, 2\)"),
            ({"mask": torch.ones(5, 2)}, "mask must be bool"),
        ],
    )
    def test_constants(self, constants, message):
        with pytest.raises(ValueError, match=message):
            self.call(**constants)

    def test_one_value_per_channel(self):
        with pytest.raises(ValueError, match=r"net\.lif: expected more than 1 value per channel when training"):
            self.call(torch.ones(1, 1, 3, dtype=torch.float64), training=True)
        assert self.call(torch.ones(1, 1, 3, dtype=torch.float64))[0].shape == (1, 1, 3)
        with pytest.raises(ValueError, match="more than 1 value"):
            self.call(torch.ones(0, 2, 3, dtype=torch.float64), training=True)

    @pytest.mark.parametrize("name", ["no such kernel", "conv2d"])
    def test_a_kernel_that_cannot_serve_gives_way(self, name, caplog):
        _warned.clear()
        with caplog.at_level(logging.WARNING, "mfpsn_fx"):
            found = [self.call(torch.full((5, 2, 3), 0.5), method=name)[0] for _ in range(3)]
        assert torch.equal(found[0], self.call(torch.full((5, 2, 3), 0.5))[0])
        assert len(caplog.records) == 1
        assert "net.lif" in caplog.text
        assert f"gives way to '{DEFAULT}'" in caplog.text


class TestRegistry:
    def test_refusals(self):
        problem = Problem((5, 2, 3), Layout.TIME_FIRST, torch.float32, "cpu", 2, 1)
        assert get_kernel("shifted-add").refusal(problem) is None
        assert get_kernel("conv2d").refusal(problem) == "serves time_last, not time_first"
        register_kernel("picky", devices=["cuda"], dtypes=[torch.float16], unavailable=lambda: "no compiler was found")(
            ShiftedAdd
        )
        try:
            picky = get_kernel("picky")
            assert picky.refusal(problem) == "runs on cuda, not on cpu"
            assert picky.refusal(problem._replace(device="cuda")) == "takes float16, not float32"
            served = problem._replace(device="cuda", dtype=torch.float16)
            assert picky.refusal(served) == "no compiler was found"
            with pytest.raises(ValueError, match="registered already"):
                register_kernel("picky")(ShiftedAdd)
            register_kernel("picky", replace=True, supports=lambda p: "k is even" if p.order % 2 == 0 else None)(
                ShiftedAdd
            )
            assert get_kernel("picky").refusal(problem) == "k is even"
        finally:
            unregister_kernel("picky")

    def test_faults(self):
        with pytest.raises(TypeError, match="lacks statistics, fire"):
            register_kernel("half")(type("Half", (), {}))
        with pytest.raises(ValueError, match="unknown kernel 'nope': choose one of 'vanilla-conv1d'"):
            get_kernel("nope")
        with pytest.raises(ValueError, match="'shifted-add' runs where no other kernel can"):
            unregister_kernel("shifted-add")
        for rank in (1.5, True, "high"):
            with pytest.raises(TypeError, match=f"kernel 'half': rank must be an integer, found {rank!r}"):
                register_kernel("half", rank=rank)
        with pytest.raises(ValueError, match="needs a name"):
            register_kernel("")


class TestRank:
    """Where no kernel is bound, the one of highest rank that can serve runs."""

    problem = Problem((5, 2, 3), Layout.TIME_FIRST, torch.float32, "cpu", 2, 1)

    @pytest.fixture
    def offered(self):
        """Register a kernel that notes its calls: ``offered(name, **options)`` returns the notes."""
        names = []

        def offer(name, **options):
            calls = []

            class Noted(ShiftedAdd):
                def filter(self, call, x, w):
                    calls.append(1)
                    return super().filter(call, x, w)

            register_kernel(name, **options)(Noted)
            names.append(name)
            return calls

        yield offer
        for name in names:
            with contextlib.suppress(ValueError):
                unregister_kernel(name)

    def call(self, method=""):
        return neuron(*(t.float() for t in sample(grad=False)), training=True, method=method)

    def test_ours(self):
        ranks = {kernel.name: kernel.rank for kernel in kernels()}
        order = ["fused-cuda", "fused-triton", "fused-cpp", "shifted-add", "conv2d", "vanilla-conv1d"]
        if os.environ.get("TRITON_INTERPRET") != "1":
            assert [name for name in sorted(ranks, key=lambda name: -ranks[name]) if name in order] == order
        assert default_kernel(self.problem).name == DEFAULT
        # where no fused kernel serves
        assert default_kernel(self.problem._replace(device="meta")).name == "shifted-add"

    def test_a_new_kernel_has_to_be_chosen_and_a_ranked_one_has_not(self, offered):
        plain, high = offered("plain"), offered("high", rank=99, dtypes=[torch.float32])
        self.call()
        assert (bool(plain), bool(high)) == (False, True)
        neuron(*sample(grad=False))  # float64: it does not serve that
        count = len(high)
        unregister_kernel("high")
        self.call()
        assert (len(plain), len(high)) == (0, count)
        self.call("plain")
        assert plain

    def test_of_equal_ranks_the_first_registered(self, offered):
        first, second = offered("first", rank=99), offered("second", rank=99)
        self.call()
        assert (bool(first), bool(second)) == (True, False)

    def test_a_replacement_takes_the_rank_over(self, offered):
        offered("mine", rank=7)
        for options, rank in (({}, 7), ({"rank": 3}, 3), ({}, 3)):
            offered("mine", replace=True, **options)
            assert get_kernel("mine").rank == rank

    def test_one_that_cannot_run_here_is_reported_once(self, offered, caplog):
        asked = []
        offered("built", rank=99, unavailable=lambda: asked.append(1) or "no compiler was found")
        assert default_kernel(self.problem, build=False).name == "built"  # it would be
        assert asked == []
        for _ in range(3):
            neuron(*(t.float() for t in sample(grad=False)), dilation=len(asked) + 1)
        assert caplog.messages == [
            "kernel 'built' cannot run here, the next one runs in its place: no compiler was found"
        ]
        assert default_kernel(self.problem, build=False).name == DEFAULT

    def test_the_answer_is_remembered_until_the_registry_changes(self, offered):
        asked = []
        offered("asks", rank=99, supports=lambda problem: asked.append(problem) or "never")
        for _ in range(3):
            self.call()
        assert len(asked) == 1
        offered("other")
        self.call()
        assert len(asked) == 2

    def test_backward_runs_it_too(self, offered):
        calls = offered("high", rank=99)
        spikes, *_ = neuron(*sample(), training=True)
        before = len(calls)
        spikes.sum().backward()
        assert len(calls) > before

    def test_a_compiled_graph_holds_none(self, offered):
        """What was compiled runs the highest rank of the machine and the moment at which it runs."""
        arguments = [t.float() for t in sample(grad=False)]

        def call(*a):
            return neuron(*a, training=True)[0]

        compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
        wanted = compiled(*arguments)
        calls = offered("high", rank=99)
        assert torch.equal(compiled(*arguments), wanted)
        assert calls
        program = torch.export.export(_Exported(), (arguments[0],))
        text = str(program.graph)
        assert not any(kernel.name in text for kernel in kernels())

    def test_a_bound_kernel_gives_way_to_it(self, offered, caplog):
        _warned.clear()
        calls = offered("high", rank=99)
        for _ in range(2):
            self.call("conv2d")
        assert calls
        assert [message.split(" for ")[0] for message in caplog.messages] == ["kernel 'conv2d' gives way to 'high'"]

    def test_float64_weights_ask_for_a_kernel_of_float64(self, offered):
        """Sums are in float64 then, whatever the input: a kernel that refuses that is not run."""
        calls = offered("single", rank=99, dtypes=[torch.float32])
        x, weight, one = torch.randn(4, 2, 3), torch.randn(3, 2), torch.ones(3)
        OPS.neuron(x, weight, one, -one, 0 * one, one, training=True)
        assert calls
        calls.clear()
        weight, one = weight.double(), one.double()
        spikes, mean, _ = OPS.neuron(x, weight, one, -one, 0 * one, one, training=True)
        assert not calls
        assert spikes.dtype is torch.float32
        assert mean.dtype is torch.float64

    def test_whoever_names_the_fallback_gets_it(self, offered):
        calls = offered("high", rank=99)
        self.call("shifted-add")
        assert not calls


class _Exported(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.sn = MulFreePSN(3)

    def forward(self, x):
        return self.sn(x)


def test_timing_leaves_the_generator_alone_and_measures_all():
    from mfpsn_fx.kernels.autotune.buffers import Pool
    from mfpsn_fx.kernels.autotune.neuron_race import kernel_race
    from mfpsn_fx.kernels.autotune.race import run_races

    def times(problem):
        race = kernel_race(problem, ["shifted-add"], Pool("cpu"), name="one")
        return run_races([race], repeats=1, progress=False).outcomes[0]["shifted-add"]

    state = torch.get_rng_state()
    for layout, dtype in ((Layout.TIME_FIRST, torch.float32), (Layout.TIME_LAST, torch.bfloat16)):
        outcome = times(Problem((4, 2, 3), layout, dtype, "cpu", 2, 1, masked=True, affine=True))
        assert min(outcome.ms(part) for part in ("forward", "backward", "eval")) > 0
    assert torch.equal(torch.get_rng_state(), state)
    single = times(Problem((1, 1, 3), Layout.TIME_FIRST, torch.float32, "cpu", 2, 1))
    assert single.ms("forward") is None
    assert single.ms("eval") > 0
