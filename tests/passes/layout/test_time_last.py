"""Stateless layers in time-last form: the same values, gradients, statistics and draws as time-first."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from spikingjelly.activation_based import layer
from torch import fx, nn

from mfpsn_fx import MulFreePSN
from mfpsn_fx.kernels import to_layout
from mfpsn_fx.model import capture
from mfpsn_fx.model.time_last import run_time_last, time_last_methods
from mfpsn_fx.passes import (
    Example,
    InsertConversions,
    PassContext,
    Pipeline,
    PropagateShapes,
    conversion_nodes,
    neurons,
)
from mfpsn_fx.passes.layout.operators import describe

pytestmark = pytest.mark.usefixtures("one_thread")

# Each with the shape of one step's (C, *).
LAYERS = {
    "conv1d": (lambda: layer.Conv1d(4, 6, 3, padding=1, stride=2), (4, 9)),
    "conv1d groups": (lambda: layer.Conv1d(4, 6, 3, groups=2, bias=False), (4, 9)),
    "conv2d": (lambda: layer.Conv2d(2, 4, (3, 5), padding=(1, 2), stride=(2, 1), dilation=(2, 1)), (2, 9, 8)),
    "conv2d same": (lambda: layer.Conv2d(2, 3, 4, padding="same"), (2, 6, 5)),
    "conv2d valid": (lambda: layer.Conv2d(2, 3, 3, padding="valid"), (2, 6, 5)),
    "conv2d circular": (lambda: layer.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), (2, 6, 5)),
    "conv3d": (lambda: layer.Conv3d(2, 3, 3), (2, 4, 5, 3)),
    "transposed 1d": (lambda: layer.ConvTranspose1d(2, 3, 3, stride=2, output_padding=1), (2, 5)),
    "transposed 2d": (lambda: layer.ConvTranspose2d(4, 6, 3, stride=2, padding=1, groups=2), (4, 5, 4)),
    "max pool 1d": (lambda: layer.MaxPool1d(3, 2, padding=1, ceil_mode=True), (2, 8)),
    "max pool 2d": (lambda: layer.MaxPool2d((3, 2), stride=2, padding=1, dilation=(2, 1)), (2, 9, 8)),
    "max pool 3d": (lambda: layer.MaxPool3d(2), (2, 4, 4, 4)),
    "avg pool 1d": (lambda: layer.AvgPool1d(3, padding=1, count_include_pad=False), (2, 8)),
    "avg pool 2d": (lambda: layer.AvgPool2d(3, 2, padding=1, ceil_mode=True), (2, 8, 7)),
    "avg pool 2d divisor": (lambda: layer.AvgPool2d(2, divisor_override=3), (2, 8, 6)),
    "adaptive 1d": (lambda: layer.AdaptiveAvgPool1d(3), (2, 8)),
    "adaptive 2d": (lambda: layer.AdaptiveAvgPool2d((2, None)), (2, 8, 6)),
    "adaptive 2d, 1": (lambda: layer.AdaptiveAvgPool2d(1), (2, 8, 6)),
    "adaptive 3d": (lambda: layer.AdaptiveAvgPool3d(2), (2, 4, 4, 4)),
    "batch norm 1d, no dims": (lambda: layer.BatchNorm1d(4), (4,)),
    "batch norm 1d": (lambda: layer.BatchNorm1d(4, momentum=None), (4, 5)),
    "batch norm 2d": (lambda: layer.BatchNorm2d(4), (4, 5, 3)),
    "batch norm 3d": (lambda: layer.BatchNorm3d(4, affine=False), (4, 2, 3, 2)),
    "batch norm without statistics": (lambda: layer.BatchNorm2d(4, track_running_stats=False), (4, 5, 3)),
    "group norm": (lambda: layer.GroupNorm(2, 4), (4, 5)),
    "upsample": (lambda: layer.Upsample(scale_factor=2, mode="bilinear"), (2, 4, 3)),
    "linear": (lambda: layer.Linear(4, 6), (4,)),
    "linear over the last dim": (lambda: nn.Linear(5, 3, bias=False), (4, 5)),
    "flatten": (lambda: layer.Flatten(), (4, 5, 3)),
    "flatten some": (lambda: layer.Flatten(2, 3), (4, 5, 3, 2)),
    "torch's flatten": (lambda: nn.Flatten(2), (4, 5, 3)),
    "dropout": (lambda: layer.Dropout(0.5), (4, 5)),
    "dropout 2d": (lambda: layer.Dropout2d(0.5), (4, 5, 3)),
}


def made(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    make, shape = LAYERS[name]
    built = make().double()
    if hasattr(built, "step_mode"):
        built.step_mode = "m"
    return built, shape


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_every_form_is_the_layer(name, training):
    built, shape = made(name)
    built.train(training)
    methods = time_last_methods(built)
    assert methods, name
    x = torch.randn(5, 3, *shape, dtype=torch.float64)
    for method in methods:
        first, last = copy.deepcopy(built), copy.deepcopy(built)
        a, b = x.clone().requires_grad_(), to_layout(x, "time_first", "time_last").requires_grad_()
        torch.manual_seed(1)
        expected = first(a)
        torch.manual_seed(1)
        found = run_time_last(last, b, method)
        assert found.is_contiguous()
        back = to_layout(found, "time_last", "time_first")
        tight = {"rtol": 1e-12, "atol": 1e-13}
        if "pool" in name or "dropout" in name or "flatten" in name:
            assert torch.equal(back, expected) or "avg" in name
        torch.testing.assert_close(back, expected, **tight)
        grad = torch.randn_like(expected)
        expected.backward(grad)
        found.backward(to_layout(grad, "time_first", "time_last"))
        torch.testing.assert_close(to_layout(b.grad, "time_last", "time_first"), a.grad, **tight)
        for (key, p), q in zip(first.named_parameters(), last.parameters(), strict=True):
            torch.testing.assert_close(q.grad, p.grad, **tight, msg=key)
        for (key, p), q in zip(first.named_buffers(), last.buffers(), strict=True):
            torch.testing.assert_close(q, p, **tight, msg=key)


def test_methods_by_kind():
    assert time_last_methods(made("conv2d")[0]) == ("wide", "fold")
    assert time_last_methods(made("conv2d circular")[0]) == ("fold",)
    assert time_last_methods(made("conv3d")[0]) == ("fold",)
    assert time_last_methods(made("linear")[0]) == ("matmul", "fold")
    assert time_last_methods(made("batch norm 2d")[0]) == ("direct",)
    assert time_last_methods(layer.Conv2d(2, 2, 3)) == ()  # step mode 's' knows no T
    assert time_last_methods(nn.Conv2d(2, 2, 3)) == ()
    assert time_last_methods(layer.MaxPool2d(2, return_indices=True, step_mode="m")) == ()
    assert time_last_methods(nn.Flatten()) == ()  # it would fuse T's neighbor, the batch


def test_a_layer_that_lost_its_form_is_called_as_it_is():
    """With hooks, a parametrization or another setting since: right all the same, and hooks fire on time-first."""
    conv, _ = made("conv2d same")
    x = torch.randn(5, 3, 2, 6, 5, dtype=torch.float64)
    last, seen = to_layout(x, "time_first", "time_last"), []
    for change in (
        lambda: conv.register_forward_hook(lambda m, args, y: seen.append(tuple(args[0].shape))),
        lambda: nn.utils.parametrizations.weight_norm(conv),
    ):
        change()
        expected = to_layout(conv(x), "time_first", "time_last")
        torch.testing.assert_close(run_time_last(conv, last, "wide"), expected, rtol=1e-12, atol=1e-13)
    assert set(seen) == {(5, 3, 2, 6, 5)}
    other, _ = made("conv2d same")
    other.padding_mode, other._reversed_padding_repeated_twice = "circular", [1, 2, 1, 2]
    expected = to_layout(other(x), "time_first", "time_last")
    torch.testing.assert_close(run_time_last(other, last, "wide"), expected, rtol=1e-12, atol=1e-13)


def test_dropout_keeps_its_mask_until_reset():
    drop, _ = made("dropout")
    x = torch.ones(2, 3, 4, 5, dtype=torch.float64)
    first = run_time_last(drop, x)
    assert torch.equal(first, first[..., :1].expand_as(first))  # one mask for all steps
    assert 0 < (first == 0).sum() < first.numel()
    assert torch.equal(run_time_last(drop, x), first)
    drop.reset()
    assert not torch.equal(run_time_last(drop, x), first)


class Between(nn.Module):
    """``function`` of what two neurons make, so that its tensors are known to have a T axis."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function, self.a, self.b = function, MulFreePSN(3), MulFreePSN(3)

    def forward(self, x, y):
        return self.function(self.a(x) * 2 - x, self.b(y) + y)


FUNCTIONS = {
    "mean over time": (lambda a, b: a.mean(0), 0),
    "mean over space": (lambda a, b: a.mean((3, -1)), 1),
    "mean over time, kept": (lambda a, b: a.mean(0, keepdim=True) + b, 1),
    "sum of all": (lambda a, b: a.sum(), 0),
    "sum over time and batch": (lambda a, b: torch.sum(a, dim=(0, 1)), 0),
    "amax over channels": (lambda a, b: torch.amax(a, 2, keepdim=True) * b, 1),
    "softmax": (lambda a, b: torch.softmax(a, dim=-1), 1),
    "softmax over time": (lambda a, b: nn.functional.log_softmax(a, 0), 1),
    "cumsum over time": (lambda a, b: a.cumsum(0), 1),
    "concatenation of channels": (lambda a, b: torch.cat((a, b), 2).mean(2), 1),
    "concatenation in time": (lambda a, b: torch.cat([a, b]).amax(3), 1),
    "flatten": (lambda a, b: a.flatten(2), 1),
    "flatten batch and channels": (lambda a, b: torch.flatten(a, 1, -2), 1),
    "unsqueeze": (lambda a, b: a.unsqueeze(-1).squeeze(5) + b.unsqueeze(1).squeeze(1), 1),
    "transpose": (lambda a, b: a.transpose(-1, -2).transpose(3, 4), 1),
    "permute": (lambda a, b: a.permute(0, 2, 1, 4, 3) * b.permute((0, 2, 1, 4, 3)), 1),
    "size": (lambda a, b: a * a.size(0) + b / b.size(-1), 1),
    "shape": (lambda a, b: (a * a.shape[0]).mean(0) * b.shape[-1], 0),
    "elementwise": (lambda a, b: torch.where(a > 0, a, b).clamp(min=-1) + torch.maximum(a, b) ** 2, 1),
    "attention of channels": (lambda a, b: a * torch.sigmoid(b.mean((3, 4), keepdim=True)), 1),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_with_mapped_dims(name):
    """The same bits in time-last, no conversion inside, and back again."""
    function, outputs = FUNCTIONS[name]
    x, y = torch.randn(4, 2, 3, 5, 6, dtype=torch.float64), torch.randn(4, 2, 3, 5, 6, dtype=torch.float64)
    gm, _ = capture(Between(function).double().eval())
    expected, code = gm(x, y), gm.code
    pipeline = Pipeline([PropagateShapes(), InsertConversions("time_last")], given=["neurons"])
    for _ in range(2):
        pipeline(gm, PassContext(Example((x, y))))
        torch.testing.assert_close(gm(x, y), expected, rtol=1e-13, atol=1e-13)
        assert {str(n.layout) for n in neurons(gm)} == {"time_last"}
        # both inputs, and the output if it has a T axis
        assert [n.args[0].op for n in conversion_nodes(gm)].count("placeholder") == 2
        assert len(conversion_nodes(gm)) == 2 + outputs
        seen = {}
        Watch(gm, seen).run(x, y)
        noted = {n.name: tuple(n.meta["val"].shape) for n in gm.graph.nodes if "val" in n.meta}
        assert {name: shape for name, shape in noted.items() if name in seen} == seen  # of each edge as it is now
    # a pickled graph has lost all notes, and still can be made time-first
    again = pickle.loads(pickle.dumps(gm))
    Pipeline([PropagateShapes(), InsertConversions("time_first")], given=["neurons"])(
        again, PassContext(Example((x, y)))
    )
    assert conversion_nodes(again) == []
    assert torch.equal(again(x, y), expected)
    InsertConversions("time_first")(gm)
    assert torch.equal(gm(x, y), expected)
    assert len(gm.code.splitlines()) == len(code.splitlines())


class Watch(fx.Interpreter):
    """Notes the shape of what each node makes."""

    def __init__(self, gm, seen) -> None:
        super().__init__(gm)
        self.seen = seen

    def run_node(self, n):
        result = super().run_node(n)
        if isinstance(result, torch.Tensor):
            self.seen[n.name] = tuple(result.shape)
        return result


PINNED = {
    "view": (lambda a, b: a.view(4, 2, 3, 30), "unknown operator"),
    "flatten of time": (lambda a, b: a.flatten(0, 1), "its dims involve T"),
    "permute of time": (lambda a, b: a.permute(1, 0, 2, 3, 4), "its dims involve T"),
    "broadcast of a lower rank": (lambda a, b: a * torch.ones(6, dtype=a.dtype), None),
    "matmul": (lambda a, b: a @ b.transpose(-1, -2), "unknown operator"),
    "indexing": (lambda a, b: a[1:], "unknown operator"),
}


@pytest.mark.parametrize("name", PINNED)
def test_what_has_no_form_stays_time_first(name):
    function, why = PINNED[name]
    x, y = torch.randn(4, 2, 3, 5, 6, dtype=torch.float64), torch.randn(4, 2, 3, 5, 6, dtype=torch.float64)
    gm, _ = capture(Between(function).double().eval())
    expected = gm(x, y)
    Pipeline([PropagateShapes(), InsertConversions("time_last")], given=["neurons"])(gm, PassContext(Example((x, y))))
    assert torch.equal(gm(x, y), expected)
    assert {str(n.layout) for n in neurons(gm)} == {"time_last"}
    if why is not None:
        InsertConversions("time_first")(gm)
        whys = [describe(gm, n).why for n in gm.graph.nodes if n.target not in ("a", "b")]
        assert any(why in found for found in whys)
