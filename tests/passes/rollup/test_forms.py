"""Ways to read a loop's input and to read out its steps: rolled up, each equals the loop, gradients included."""

from __future__ import annotations

import logging

import pytest
import snntorch
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import mfpsn_fx
from mfpsn_fx.model.capturing.steps import capture_steps
from mfpsn_fx.passes import Example, PassContext, RollUp, RollUpError

STEPS = 4
QUICK = {"kernels": "shifted-add", "layout": "time_first", "repeats": 1, "progress": False}
pytestmark = pytest.mark.usefixtures("one_thread")


class Net(nn.Module):
    """Two layers of neurons; how they are looped over, and what is made of their spikes, is ``form``."""

    def __init__(self, form):
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.lif1 = nn.Linear(3, 6), snntorch.Leaky(beta=0.9)
        self.fc2, self.lif2 = nn.Linear(6, 4), snntorch.Leaky(beta=0.8)
        nn.init.uniform_(self.fc2.weight, 0, 1)  # so that the last layer fires
        self.head, self.norm = nn.Linear(4, 2), nn.BatchNorm1d(4)
        self.share = nn.Parameter(torch.rand(STEPS))
        self.form = form

    def forward(self, x):
        return self.form(self, x)

    def step(self, x, states):
        first, state1 = self.lif1(self.fc1(x), states[0])
        second, state2 = self.lif2(self.fc2(first), states[1])
        return second, (state1, state2)

    def looped(self, inputs):
        """The spikes of each step."""
        states, spikes = self.fresh(), []
        for x in inputs:
            spike, states = self.step(x, states)
            spikes.append(spike)
        return spikes

    def fresh(self):
        return self.lif1.init_leaky(), self.lif2.init_leaky()


def spikes_of(net, x):
    return net.looped([x[t] for t in range(STEPS)])


READOUTS = {}
INPUTS = {}


def readout(form):
    READOUTS[form.__name__] = lambda net, x: form(net, x, spikes_of(net, x))
    return form


def reads(form):
    INPUTS[form.__name__] = form
    return form


@readout
def differences_of_steps(net, x, s):
    return torch.stack([s[t] - s[t - 1] for t in range(1, STEPS)])


@readout
def weighted_by_constants(net, x, s):
    return sum(0.5**t * s[t] for t in range(STEPS))


@readout
def weighted_by_a_parameter(net, x, s):
    return sum(net.share[t] * s[t] for t in range(STEPS))


@readout
def windows(net, x, s):
    return torch.stack(s[2:]), sum(s[1:3]), torch.stack(s[::2], 1), torch.cat(s[1:], 1)


@readout
def containers(net, x, s):
    return {"all": s, "tuple": tuple(s), "some": [s[0], {"last": s[-1]}]}


@readout
def conditions_on_the_step(net, x, s):
    out = None
    for t in range(STEPS):
        if t == 0:
            out = s[t]
        elif t % 2:
            out = out + 2 * s[t]
        else:
            out = torch.maximum(out, s[t])
    return out


@readout
def layers_of_some_steps(net, x, s):
    return torch.stack([net.head(v) for v in s[2:]]), net.head(s[0]) + net.head(s[1]) + net.head(s[3])


@readout
def orders(net, x, s):
    return torch.stack(s[::-1]), sum(reversed(s)), s[0] + s[0] + s[1], torch.stack([s[2], s[0], s[3], s[1]])


@readout
def first_spike(net, x, s):
    first = torch.full_like(s[0], float(STEPS))
    for t in range(STEPS):
        first = torch.where((s[t] > 0) & (first == STEPS), torch.full_like(first, float(t)), first)
    return first


@readout
def running_values(net, x, s):
    average, largest = 0.0, s[0]
    for v in s:
        average, largest = 0.9 * average + 0.1 * v, torch.max(largest, v)
    return average, largest


@readout
def pairs(net, x, s):
    return torch.stack([torch.cat([s[2 * i], s[2 * i + 1]], 1) for i in range(STEPS // 2)])


@readout
def over_a_stack(net, x, s):
    out = torch.stack(s)
    return torch.stack([net.head(out[t]) for t in range(STEPS)], 1), out[-1], out[1:3].sum(0)


@readout
def written_backwards(net, x, s):
    out = torch.zeros(STEPS, x.shape[1], 4)
    for t in range(STEPS):
        out[STEPS - 1 - t] = s[t]
    return out


@readout
def unsqueezed(net, x, s):
    grown = None
    for v in s:
        grown = v[None] if grown is None else torch.cat([grown, v[None]])
    return torch.cat([v.unsqueeze(0) for v in s], 0), torch.cat([v.unsqueeze(1) for v in s], 1), grown


@readout
def normalized_step_by_step(net, x, s):
    return torch.stack([net.norm(v) for v in s])


@readout
def across_the_batch(net, x, s):
    return torch.stack([v.softmax(0) for v in s])


@readout
def counted_booleans(net, x, s):
    count, either = 0, s[0] > 0.5
    for v in s:
        count = count + (v > 0.5)
    for v in s[1:]:
        either = either + (v > 0.5)
    return count, either


@readout
def added_in_place(net, x, s):
    total, zeros, others = s[0].clone(), torch.zeros(x.shape[1], 4), torch.zeros(x.shape[1], 4)
    for v in s[1:]:
        total += v
    for v in s:
        zeros += v
        others.add_(v)
    return total, zeros / STEPS, others


@reads
def from_the_second_step(net, x):
    return torch.stack(net.looped([x[t] for t in range(1, STEPS)]))


@reads
def backwards(net, x):
    return torch.stack(net.looped([x[t] for t in reversed(range(STEPS))]))


@reads
def every_other(net, x):
    return torch.stack(net.looped([x[t] for t in range(0, STEPS, 2)]))


@reads
def differences_of_frames(net, x):
    return torch.stack(net.looped([x[t] - x[t - 1] for t in range(1, STEPS)]))


@reads
def against_a_reference(net, x):
    reference = x[0]
    return torch.stack(net.looped([x[t] - reference for t in range(STEPS)]))


@reads
def against_the_last(net, x):
    return torch.stack(net.looped([x[t] - x[-1] for t in range(STEPS - 1)]))


@reads
def parts_of_steps(net, x):
    return torch.stack(net.looped([torch.cat([x[t, :, :2], x[t, :, 2:]], 1) for t in range(STEPS)]))


def in_two_loops(between):
    """The first layer runs over all of time before the second begins."""

    def form(net, x):
        state1, state2 = net.fresh()
        hidden, spikes = [], []
        for t in range(STEPS):
            spike, state1 = net.lif1(net.fc1(x[t]), state1)
            hidden.append(spike)
        for current in between(net, x, hidden):
            spike, state2 = net.lif2(current, state2)
            spikes.append(spike)
        return torch.stack(spikes)

    return form


INPUTS["last of another loop"] = in_two_loops(lambda net, x, h: [net.fc2(h[-1]) for _ in range(STEPS)])
INPUTS["last and a step"] = in_two_loops(lambda net, x, h: [net.fc2(h[-1]) + x[t, :, :1] for t in range(STEPS)])


@reads
def mean_of_another_loop(net, x):
    def between(net, x, h):
        mean = torch.stack(h).mean(0)
        return [net.fc2(mean) + x[t, :, :1] for t in range(STEPS)]

    return in_two_loops(between)(net, x)


INPUTS["another loop backwards"] = in_two_loops(lambda net, x, h: [net.fc2(h[-1 - t]) for t in range(STEPS)])


@reads
def both_directions(net, x):
    (state1, state2), forth, back = net.fresh(), [], []
    for t in range(STEPS):
        spike, state1 = net.lif1(net.fc1(x[t]), state1)
        forth.append(spike)
    for t in reversed(range(STEPS)):
        spike, state2 = net.lif2(net.fc1(x[t]), state2)
        back.insert(0, spike)
    return torch.cat([torch.stack(forth), torch.stack(back)], -1)


def rolled(net, x):
    unrolled, one_step = capture_steps(net, (x,))
    return RollUp(one_step=one_step)(unrolled, PassContext(Example((x,)))).graph_module


@pytest.mark.parametrize("form", [*READOUTS.values(), *INPUTS.values()], ids=[*READOUTS, *INPUTS])
def test_is_the_loop(form, caplog):
    net, x = Net(form), 3 * torch.randn(STEPS, 5, 3)
    ours = rolled(net, x)
    for batch in (x, torch.cat([x, -x[:, :2]], 1)):
        found, wanted = (tree_leaves(model(batch)) for model in (ours, net))
        assert any((leaf != 0).any() for leaf in wanted)
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
        net.zero_grad()
        if not any(leaf.requires_grad for leaf in wanted):
            continue
        gradients = []
        for leaves in (found, wanted):
            torch.manual_seed(1)
            loss = sum((torch.randn(leaf.shape) * leaf).sum() for leaf in leaves if leaf.requires_grad)
            gradients.append(torch.autograd.grad(loss, [net.fc1.weight, net.fc2.weight], allow_unused=True))
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)
    with caplog.at_level(logging.WARNING, "mfpsn_fx"):
        assert isinstance(mfpsn_fx.convert(net, x, **QUICK), torch.fx.GraphModule)
    assert "not compared" not in caplog.text
    assert "size alone" not in caplog.text


def calls(graph):
    return [n.target for n in graph.nodes if n.op == "call_module"]


def test_what_runs_at_once():
    """A layer after the loop runs once for the steps that are read, and by itself for one."""
    x = torch.randn(STEPS, 2, 3)
    loop = ["fc1", "lif1", "fc2", "lif2"]
    assert calls(rolled(Net(lambda net, x: torch.stack([net.head(v) for v in spikes_of(net, x)])), x).graph) == [
        *loop, "head",
    ]  # fmt: skip
    graph = rolled(Net(lambda net, x: net.head(spikes_of(net, x)[-1])), x).graph
    assert calls(graph) == [*loop, "head"]
    (head,) = (n for n in graph.nodes if n.target == "head")
    assert head.args[0].args[1] == -1
    normalized = rolled(Net(READOUTS["normalized_step_by_step"]), x)
    assert calls(normalized.graph) == [*loop, *["norm"] * STEPS]  # each with the statistics of its own step
    differences = rolled(Net(READOUTS["differences_of_steps"]), x).graph
    assert sum(getattr(n.target, "__name__", "") == "sub" for n in differences.nodes) == 1


def test_batch_statistics_of_single_steps():
    """A batch norm that is only read out sees the steps one by one, so nothing has to be accepted."""
    net, x = Net(READOUTS["normalized_step_by_step"]), 3 * torch.randn(STEPS, 5, 3)
    ours = rolled(net, x).train()
    found = ours(x)
    running = ours.norm.running_mean.clone()
    ours.norm.reset_running_stats()
    torch.testing.assert_close(found, net.train()(x))
    torch.testing.assert_close(net.norm.running_mean, running)


def test_writes_past_the_steps():
    """Some zeros are left, so that their batch size is too; what is written is what the loop writes."""

    def form(net, x):
        shifted, columns = x.new_zeros(STEPS + 1, x.shape[1], 4), x.new_zeros(x.shape[1], STEPS, 5)
        parity, total = x.new_zeros(2, x.shape[1], 4), x.new_zeros(x.shape[1], 4)
        for t, spike in enumerate(spikes_of(net, x)):
            shifted[t + 1], columns[:, t, :4] = spike, spike
            parity[t % 2] += spike
            total[:] = total + spike
        return shifted, columns, parity, total

    net, x = Net(form), 3 * torch.randn(STEPS, 5, 3)
    ours = rolled(net, x)
    for _ in range(2):  # what was written is not there the next time
        for one, other in zip(ours(x), net(x), strict=True):
            torch.testing.assert_close(one, other)


class TestRefusals:
    @pytest.mark.parametrize(
        ("form", "message"),
        [
            (lambda net, x, s, before: (s[0] if before is None else before, x), r"lif2: at step 2 .* fed back from"),
            (lambda net, x, s, before: (sum(s), x), "lif2: at step 1 its input depends on what 'lif1' put out at anot"),
            (lambda net, x, s, before: (s[-1] * (1.0 if len(s) < 3 else 2.0), x), "lif2: step 2 is not like step 0: m"),
        ],
    )  # fmt: skip
    def test_the_past_of_other_neurons(self, form, message):
        def loop(net, x):
            state1, state2 = net.fresh()
            hidden, spikes, before = [], [], None
            for t in range(STEPS):
                spike, state1 = net.lif1(net.fc1(x[t]), state1)
                hidden.append(spike)
                fed, _ = form(net, x, hidden, before)
                before = spike
                spike, state2 = net.lif2(net.fc2(fed), state2)
                spikes.append(spike)
            return torch.stack(spikes)

        with pytest.raises(RollUpError, match=message):
            rolled(Net(loop), torch.randn(STEPS, 2, 3))

    def test_steps_of_the_input_in_no_order(self):
        with pytest.raises(RollUpError, match="lif1: at step 2 it is fed what belongs to step 1"):
            rolled(Net(lambda net, x: torch.stack(net.looped([x[0], x[2], x[1], x[3]]))), torch.randn(STEPS, 2, 3))

    def test_what_a_method_changes_in_place(self):
        def form(net, x):
            average = torch.zeros(x.shape[1], 4)
            for spike in spikes_of(net, x):
                average.lerp_(spike, 0.5)
            return average

        with pytest.raises(RollUpError, match=r"_constant0 is changed in place \(lerp_\) and used again"):
            rolled(Net(form), torch.randn(STEPS, 2, 3))
