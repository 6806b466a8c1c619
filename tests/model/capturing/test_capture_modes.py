"""Forwards that differ between training and evaluation: their modules become leaves, and tracing terminates."""

from __future__ import annotations

import copy
import sys

import pytest
import snntorch
import torch
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn
from torch.utils import _pytree as pytree

import mfpsn_fx
from mfpsn_fx.kernels.registry import FALLBACK_KERNEL
from mfpsn_fx.model import capture

CAPTURE = sys.modules["mfpsn_fx.model.capturing.capture"]  # mfpsn_fx.model.capture is the function


@pytest.fixture(autouse=True)
def traces(monkeypatch):
    """A list that grows by one with each trace; a loop over traces that does not end fails at the hundredth."""
    made, trace = [], CAPTURE._trace

    def counted(*args):
        made.append(args)
        assert len(made) < 100, "capture goes on tracing"
        return trace(*args)

    monkeypatch.setattr(CAPTURE, "_trace", counted)
    return made


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.lif, self.drop = layer.Linear(8, 8), neuron.IFNode(), nn.Dropout(0.5)

    def forward(self, h, gain=1.0):
        return self.lif(self.fc(h) * gain)


class DroppingBlock(Block):
    def forward(self, h):
        return super().forward(self.drop(h) if self.training else h)


class Net(nn.Module):
    """Two neurons and a head, with layers for the forwards that derive from it."""

    def __init__(self):
        super().__init__()
        self.fc, self.lif = layer.Linear(6, 8), neuron.IFNode()
        self.fc2, self.lif2 = layer.Linear(8, 8), neuron.LIFNode()
        self.out, self.aux = layer.Linear(8, 3), layer.Linear(8, 3)
        self.drop, self.softmax = nn.Dropout(0.5), nn.Softmax(-1)
        self.shift = nn.Parameter(torch.ones(3))
        self.add()
        functional.set_step_mode(self, "m")

    def add(self):
        pass

    def hidden(self, x):
        return self.lif2(self.fc2(self.lif(self.fc(x))))


class WithBlock(Net):
    block_class = Block

    def add(self):
        self.block = self.block_class()

    def forward(self, x):
        return self.out(self.block(self.hidden(x)))


class AuxiliaryHead(Net):
    def forward(self, x):
        h = self.hidden(x)
        return (self.out(h), self.aux(h)) if self.training else self.out(h)


class NamedHeads(Net):
    def forward(self, x):
        h = self.hidden(x)
        heads = {"out": self.out(h)}
        return {**heads, "aux": self.aux(h)} if self.training else heads


class DropoutInTraining(Net):
    def forward(self, x):
        h = self.hidden(x)
        if self.training:
            h = self.drop(h)
        return self.out(h)


class SoftmaxInEvaluation(Net):
    def forward(self, x):
        y = self.out(self.hidden(x))
        return y if self.training else self.softmax(y)


class InABlock(WithBlock):
    block_class = DroppingBlock


class Around(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.fc = inner, layer.Linear(8, 8)

    def forward(self, h):
        return self.fc(self.inner(h))


class TwoDeep(WithBlock):
    @staticmethod
    def block_class():
        return Around(Around(DroppingBlock()))


class TracedChildInTraining(WithBlock):
    def forward(self, x):
        h = self.hidden(x)
        return self.out(self.block(h) if self.training else h)


class TracedChildInEvaluation(WithBlock):
    def forward(self, x):
        h = self.hidden(x)
        return self.out(h if self.training else self.block(h))


class NeuronInTraining(Net):
    def forward(self, x):
        h = self.fc2(self.lif(self.fc(x)))
        return self.out(self.lif2(h) if self.training else h)


class NeuronInEvaluation(Net):
    def forward(self, x):
        h = self.fc2(self.lif(self.fc(x)))
        return self.out(h if self.training else self.lif2(h))


class AnotherNeuronInEachMode(Net):
    def forward(self, x):
        h = self.fc(x)
        return self.out(self.lif(h) if self.training else self.lif2(h))


class LayerTwiceInTraining(Net):
    def forward(self, x):
        h = self.fc2(self.lif(self.fc(x)))
        return self.out(self.lif2(self.fc2(h) if self.training else h))


class BlockTwiceInTraining(WithBlock):
    def forward(self, x):
        h = self.block(self.hidden(x))
        return self.out(self.block(h) if self.training else h)


class OtherOrder(Net):
    def forward(self, x):
        h = self.hidden(x)
        return self.out(self.drop(self.softmax(h)) if self.training else self.softmax(self.drop(h)))


class OtherOrderOfBlocks(Net):
    def add(self):
        self.a, self.b = Block(), Block()

    def forward(self, x):
        h = self.hidden(x)
        return self.out(self.b(self.a(h)) if self.training else self.a(self.b(h)))


class OtherArguments(WithBlock):
    def forward(self, x):
        h = self.hidden(x)
        return self.out(self.block(h, 2.0) if self.training else self.block(h, gain=3.0))


class OtherInputOfABlock(WithBlock):
    def forward(self, x):
        h = self.lif(self.fc(x))
        s = self.lif2(self.fc2(h))
        return self.out(self.block(s if self.training else h))


class OtherInputOfALayer(Net):
    def forward(self, x):
        h = self.lif(self.fc(x))
        s = self.lif2(self.fc2(h))
        return self.out(s if self.training else h)


class SkippingSequential(nn.Sequential):
    def forward(self, h):
        for child in self if self.training else self[2:]:
            h = child(h)
        return h


class OwnSequential(WithBlock):
    @staticmethod
    def block_class():
        return SkippingSequential(nn.Dropout(0.5), layer.Linear(8, 8), neuron.IFNode(), layer.Linear(8, 8))


class SlicedModuleList(Net):
    def add(self):
        self.blocks = nn.ModuleList([Block(), nn.Dropout(0.5), Block()])

    def forward(self, x):
        h = self.hidden(x)
        for block in self.blocks if self.training else self.blocks[::2]:
            h = block(h)
        return self.out(h)


class ParameterInTraining(Net):
    def forward(self, x):
        y = self.out(self.hidden(x))
        return y + self.shift if self.training else y


class Bias(nn.Module):
    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.ones(8))

    def forward(self, h):
        return h if self.training else h + self.bias


class ParameterInABlock(WithBlock):
    block_class = Bias


class OtherBuffer(Net):
    def add(self):
        self.register_buffer("two", torch.full((3,), 2.0))
        self.register_buffer("three", torch.full((3,), 3.0))

    def forward(self, x):
        return self.out(self.hidden(x)) * (self.two if self.training else self.three)


class Skip(Block):
    """The same nodes in both modes, of which another one is returned."""

    def forward(self, h):
        s = super().forward(h)
        return s if self.training else h


class OtherNodeReturned(WithBlock):
    block_class = Skip


class UnderTwoNames(Net):
    def add(self):
        self.first = DroppingBlock()
        self.second = self.first

    def forward(self, x):
        return self.out(self.second(self.first(self.hidden(x))))


class OneMoreInEvaluation(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, h):
        return self.inner(h) if self.training else self.inner(h) + 1


class InTwoModules(Net):
    def add(self):
        shared = DroppingBlock()
        self.first, self.second = OneMoreInEvaluation(shared), Around(shared)

    def forward(self, x):
        return self.out(self.second(self.first(self.hidden(x))))


class Wrapper(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = AuxiliaryHead()

    def forward(self, x):
        return self.net(x)


CASES = {
    AuxiliaryHead: "", NamedHeads: "", DropoutInTraining: "", SoftmaxInEvaluation: "", InABlock: "block",
    TwoDeep: "block.inner.inner", TracedChildInTraining: "", TracedChildInEvaluation: "", NeuronInTraining: "",
    NeuronInEvaluation: "", AnotherNeuronInEachMode: "", LayerTwiceInTraining: "", BlockTwiceInTraining: "",
    OtherOrder: "", OtherOrderOfBlocks: "", OtherArguments: "", OtherInputOfABlock: "", OtherInputOfALayer: "",
    OwnSequential: "block", SlicedModuleList: "", ParameterInTraining: "", ParameterInABlock: "block", OtherBuffer: "",
    OtherNodeReturned: "block", UnderTwoNames: "first", InTwoModules: "first, first.inner", Wrapper: "net",
}  # fmt: skip


def batch():
    return torch.randn(4, 3, 6)


def converted(model, *example, **options):
    gm = mfpsn_fx.convert(
        model, *example, layout="time_first", kernels=FALLBACK_KERNEL, repeats=1, budget_s=1, progress=False, **options
    )
    for m in gm.modules():
        if isinstance(m, mfpsn_fx.MulFreePSN):
            nn.init.zeros_(m.beta)  # about every other step fires, so that the outputs depend on upstream layers
    return gm


def outputs(model, x, training):
    torch.manual_seed(3)
    return model.train(training)(x)


def assert_same_outputs(gm, model):
    for training in (True, False):
        x = batch()
        expected, found = outputs(model, x, training), outputs(gm, x, training)
        assert all(y.flatten(0, 1).std(0).min() > 0 for y in pytree.tree_leaves(expected)), "the neurons are silent"
        assert pytree.tree_structure(found) == pytree.tree_structure(expected)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("net", "leaves"), CASES.items(), ids=[net.__name__ for net in CASES])
def test_the_module_whose_forward_differs_is_the_leaf(net, leaves):
    model = net()
    _, reasons = capture(model)
    assert ", ".join(sorted(reasons)) == leaves
    assert all("differs between training and evaluation" in reason for reason in reasons.values())


@pytest.mark.parametrize("example", [True, False], ids=["example", "no example"])
@pytest.mark.parametrize("net", CASES)
def test_converted_network_does_in_each_mode_what_the_code_says(net, example):
    """The model's own code, run with the new neurons, gives the expected result."""
    model = net()
    assert_same_outputs(converted(model, *([batch()] if example else []), inplace=True), model)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize(
    "net",
    [AuxiliaryHead, NeuronInTraining, NeuronInEvaluation, AnotherNeuronInEachMode, TracedChildInTraining,
     TracedChildInEvaluation],
)  # fmt: skip
def test_an_example_serves_neurons_of_both_modes(net, training):
    model = net().train(training)
    gm = converted(model, batch(), inplace=True)
    for m in gm.modules():
        if isinstance(m, mfpsn_fx.MulFreePSN):
            assert not torch.equal(m.running_mean, torch.zeros(8)), "it was not measured on the example"
    assert all(module.training is training for module in gm.modules())
    assert_same_outputs(gm, model)


@pytest.mark.parametrize("example", [True, False])
def test_outputs_of_the_two_modes(example):
    def twice(net):
        gm, x = converted(net(), *([batch()] if example else [])), batch()
        return [[gm.train(training)(x) for _ in range(2)] for training in (True, False)]

    training, evaluation = twice(AuxiliaryHead)
    assert isinstance(training[0], tuple)
    assert [y.shape for y in training[0]] == [(4, 3, 3)] * 2
    assert evaluation[0].shape == (4, 3, 3)
    training, evaluation = twice(NamedHeads)
    assert list(training[0]) == ["out", "aux"]
    assert list(evaluation[0]) == ["out"]
    for net in (DropoutInTraining, InABlock):
        training, evaluation = twice(net)
        assert not torch.equal(*training)
        assert torch.equal(*evaluation)
    training, evaluation = twice(SoftmaxInEvaluation)
    assert not torch.allclose(training[0].sum(-1), torch.ones(4, 3))
    assert torch.allclose(evaluation[0].sum(-1), torch.ones(4, 3))


@pytest.mark.parametrize("net", [AuxiliaryHead, InABlock, NeuronInEvaluation, InTwoModules])
def test_source_is_left_as_it_was(net):
    model, x = net(), batch()
    model.fc2.eval()
    tensors, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    state, expected = torch.get_rng_state(), outputs(copy.deepcopy(model), x, False)
    torch.set_rng_state(state)
    converted(model, x)
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items())
    torch.testing.assert_close(outputs(model, x, False), expected)


@pytest.mark.parametrize(("net", "leaf"), [(TwoDeep, "block.inner.inner"), (UnderTwoNames, "first")])
def test_neurons_inside_are_swapped(net, leaf):
    gm = converted(net(), batch())
    assert type(gm.get_submodule(leaf)) is DroppingBlock
    assert isinstance(gm.get_submodule(leaf).lif, mfpsn_fx.MulFreePSN)
    assert not any(isinstance(m, neuron.BaseNode) for m in gm.modules())


class Opaque:
    pass


class TakesAnything(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = layer.Linear(8, 8)

    def forward(self, h, anything):
        return self.fc(h)


class UnfitArgumentOfALeaf(WithBlock):
    """The leaf's argument cannot be an argument of a node, so that its caller cannot be traced."""

    block_class = TakesAnything

    def forward(self, x):
        return self.out(self.block(self.hidden(x), Opaque()))


def test_a_call_of_a_leaf_that_cannot_be_recorded_is_its_callers():
    model = UnfitArgumentOfALeaf()
    model.block.register_forward_hook(lambda module, args, output: output + 1)
    _, reasons = capture(model)
    assert list(reasons) == [""]
    assert "Opaque" in reasons[""]
    assert_same_outputs(converted(model, batch(), inplace=True), model)


@pytest.mark.parametrize("owner", ["block", "block.inner", "block.inner.fc", "fc"])
def test_each_turn_adds_a_leaf_whatever_is_found(owner, traces, monkeypatch):
    monkeypatch.setattr(CAPTURE, "differing_owner", lambda *_: owner)
    model = TwoDeep()
    _, reasons = capture(model)
    assert list(reasons) == [""]
    assert len(traces) <= 2 * len(list(model.modules()))
    traces.clear()

    def untraceable(model, leaves):
        traces.append(leaves)
        assert len(traces) < 100
        raise CAPTURE.Untraceable(owner, "of a test")

    monkeypatch.setattr(CAPTURE, "_trace", untraceable)
    assert capture(model)[1] == {"": "of a test"}


class Random(Net):
    """Another graph with every trace."""

    count = 0

    def forward(self, x):
        Random.count += 1
        return self.out(self.hidden(x)) * Random.count


def test_a_forward_that_is_never_the_same_is_a_leaf():
    assert list(capture(Random())[1]) == [""]


class AuxiliaryBlock(Block):
    def forward(self, h):
        s = super().forward(h)
        return (s, h) if self.training else s


class PairInEvaluation(Block):
    def forward(self, h):
        s = super().forward(h)
        return s if self.training else (s, h + s)


class NothingInEvaluation(Block):
    def forward(self, h):
        return super().forward(h) if self.training else None


class LooksAtTheType(WithBlock):
    block_class = AuxiliaryBlock

    def forward(self, x):
        h, aux = self.block(self.hidden(x)), None
        if isinstance(h, tuple):
            h, aux = h
        y = self.out(h)
        return y if aux is None else (y, self.aux(aux))


class TakesTheFirst(WithBlock):
    block_class = PairInEvaluation

    def forward(self, x):
        out = self.block(self.hidden(x))
        return out[0] if isinstance(out, tuple) else out


class LooksForNone(WithBlock):
    block_class = NothingInEvaluation

    def forward(self, x):
        h = self.hidden(x)
        more = self.block(h)
        return self.out(h if more is None else more)


class HandsOn(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = PairInEvaluation()

    def forward(self, h):
        return self.block(h)


class LooksAtWhatIsHandedOn(TakesTheFirst):
    block_class = HandsOn


@pytest.mark.parametrize("net", [LooksAtTheType, TakesTheFirst, LooksForNone, LooksAtWhatIsHandedOn])
def test_a_caller_that_may_look_at_a_result_of_two_kinds_is_the_leaf(net):
    """As a leaf's result it would be a proxy, which hides tuples and None."""
    model = net()
    assert list(capture(model)[1]) == [""]
    assert_same_outputs(converted(model, batch(), inplace=True), model)


class Doubles(nn.Module):
    def forward(self, h):
        return h * 2 if h.sum() > -1e9 else h


class Catches(WithBlock):
    block_class = Doubles

    def forward(self, x):
        h = self.hidden(x)
        try:
            h = self.block(h)
        except Exception:
            h = h * 3
        return self.out(h)


class CatchesInside(WithBlock):
    @staticmethod
    def block_class():
        return Around(Catching())


class Catching(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Around(Doubles())

    def forward(self, h):
        try:
            return self.inner(h)
        except Exception:
            return h


@pytest.mark.parametrize(("net", "leaf"), [(Catches, ""), (CatchesInside, "block.inner")])
def test_a_forward_that_catches_what_a_child_raises_while_traced_is_a_leaf(net, leaf):
    model = net()
    assert list(capture(model)[1]) == [leaf]
    assert_same_outputs(converted(model, batch(), inplace=True), model)


class OtherConstant(Net):
    def forward(self, x):
        return self.out(self.hidden(x)) * torch.tensor(2.0 if self.training else 3.0)


class OtherConstantInABlock(WithBlock):
    class block_class(nn.Module):
        def forward(self, h):
            return h + torch.arange(8) * (2 if self.training else 3)


class OtherDtype(Net):
    """Equal values, but the result is of another precision."""

    def forward(self, x):
        dtype = torch.float32 if self.training else torch.float64
        return self.out(self.hidden(x)) * torch.tensor([2.0, 0.5, 1.0], dtype=dtype)


@pytest.mark.parametrize(("net", "leaf"), [(OtherConstant, ""), (OtherConstantInABlock, "block"), (OtherDtype, "")])
def test_another_tensor_constant_in_each_mode_makes_a_leaf(net, leaf):
    model = net()
    assert list(capture(model)[1]) == [leaf]
    assert_same_outputs(converted(model, batch(), inplace=True), model)


class SparseConstant(Net):
    def forward(self, x):
        mixed = torch.sparse.mm(torch.eye(3).to_sparse(), self.out(self.hidden(x)).flatten(0, 1).t())
        return mixed.t()


class MetaConstant(Net):
    def forward(self, x):
        return self.out(self.hidden(x)).expand_as(torch.empty(4, 3, 3, device="meta"))


class NanConstant(Net):
    def forward(self, x):
        y = self.out(self.hidden(x))
        nothing = torch.tensor([0.0, 0.0, 0.0]).masked_fill(torch.tensor([False]), 1)
        return y.masked_fill(y > 1e9, float("nan")) + nothing


@pytest.mark.parametrize("net", [SparseConstant, MetaConstant, NanConstant])
def test_constants_of_any_kind_are_equal_in_both_modes(net):
    model = net()
    assert capture(model)[1] == {}
    assert_same_outputs(converted(model, batch(), inplace=True), model)


class DropsInTraining(nn.Module):
    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, h):
        return self.drop(h) if self.training else h


class StepsThroughTime(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.fc, self.lif, self.inner = nn.Linear(6, 8), snntorch.Leaky(beta=0.9), inner

    def forward(self, x):
        mem, steps = self.lif.init_leaky(), []
        for step in range(x.shape[0]):
            spikes, mem = self.lif(self.fc(x[step]), mem)
            steps.append(self.inner(spikes))
        return torch.stack(steps)


class StepsAndDrops(StepsThroughTime):
    def forward(self, x):
        y = super().forward(x)
        return self.inner(y) if self.training else y


def test_the_caller_is_the_leaf_in_networks_that_step_through_time():
    gm = converted(StepsThroughTime(DropsInTraining()), batch())
    assert isinstance(gm.inner, DropsInTraining)
    assert outputs(gm, batch(), training=True).max() == 2
    assert outputs(gm, batch(), training=False).max() == 1
    with pytest.raises(mfpsn_fx.ConversionError, match=r"StepsAndDrops's forward .* differs between training"):
        converted(StepsAndDrops(nn.Dropout(0.5)), batch())
