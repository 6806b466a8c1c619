"""Networks whose forward is one step with the states as arguments, compared with their own code run step by step."""

from __future__ import annotations

import norse.torch as norse
import pytest
import snntorch
import torch
from torch import nn

import mfpsn_fx
from mfpsn_fx import ConversionError
from mfpsn_fx.passes import RollUpError

QUICK = {"kernels": "shifted-add", "layout": "time_first", "repeats": 1, "progress": False}
pytestmark = pytest.mark.usefixtures("one_thread")


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.lif1 = nn.Linear(3, 6), snntorch.Leaky(beta=0.9)
        self.fc2, self.lif2 = nn.Linear(6, 4), snntorch.Leaky(beta=0.8)
        self.before = None

    def current(self, x):
        return self.fc1(x)

    def step(self, x, mem1, mem2):
        spk1, mem1 = self.lif1(self.current(x), mem1)
        spk2, mem2 = self.lif2(self.fc2(spk1), mem2)
        return spk2, mem1, mem2


class Defaults(Layers):
    def forward(self, x, mem1=None, mem2=None):
        return self.step(x, mem1, mem2)


class Required(Layers):
    def forward(self, x, mem1, mem2):
        return self.step(x, mem1, mem2)


class Listed(Layers):
    def forward(self, x, mems=None):
        mem1, mem2 = (None, None) if mems is None else mems
        spk, *mems = self.step(x, mem1, mem2)
        return spk, mems


class Named(Layers):
    def forward(self, x, state):
        spk, mem1, mem2 = self.step(x, state["first"], state["second"])
        return {"spikes": spk, "state": {"first": mem1, "second": mem2}}


class Overwritten(Layers):
    def forward(self, x, mems):
        spk, mems[0], mems[1] = self.step(x, mems[0], mems[1])
        return spk, mems


def in_place(self, x):
    current = self.fc1(x)
    current.mul_(0.2)
    return current


def kept(self, x):
    current = self.fc1(x)
    if self.before is not None:
        current = current + self.before
    self.before = current
    return current


@pytest.mark.parametrize("cls", [Defaults, Required, Listed, Named, Overwritten])
@pytest.mark.parametrize("current", [None, in_place, kept])
def test_compared(cls, current, caplog):
    net = type(cls.__name__, (cls,), {} if current is None else {"current": current})()
    x = 3 * torch.randn(4, 2, 3)
    if current is None:
        out = mfpsn_fx.convert(net, x, **QUICK)(torch.randn(6, 5, 3))
        assert (out["spikes"] if cls is Named else out[0]).shape == (6, 5, 4)
        assert "not compared" not in caplog.text
    else:
        with pytest.raises(RollUpError, match=f"{cls.__name__} rolled up over time does not give what its own code"):
            mfpsn_fx.convert(net, x, **QUICK)


def test_a_list_of_states_with_gaps(caplog):
    """Norse's SequentialState assigns states in its list only at the indices of its neurons."""
    net = norse.SequentialState(nn.Linear(3, 4), norse.LIFCell(), nn.Linear(4, 2), norse.LIFCell())
    converted = mfpsn_fx.convert(net, 20 * torch.randn(4, 2, 3), **QUICK)
    assert [row.layer for row in mfpsn_fx.selection(converted).rows] == ["1", "3"]
    assert "not compared" not in caplog.text


@pytest.mark.parametrize("kind", [list, dict])
def test_states_given_to_a_loop(kind):
    """None for each, in a container that the forward writes into and returns; outputs keep their structure."""

    class Loops(Layers):
        def forward(self, x, states):
            spikes = []
            for step in x:
                spike, states[0] = self.lif1(self.fc1(step), states[0])
                spike, states[1] = self.lif2(self.fc2(spike), states[1])
                spikes.append(spike)
            return {"spikes": torch.stack(spikes), "states": states}

    x, states = 3 * torch.randn(4, 2, 3), [None, None] if kind is list else {0: None, 1: None}
    converted = mfpsn_fx.convert(Loops(), x, states, **QUICK)
    assert states == ([None, None] if kind is list else {0: None, 1: None})
    found = converted(x)
    assert isinstance(found["states"], kind)
    assert found["spikes"].shape == (4, 2, 4)
    assert found["states"][1].shape == (2, 4)


def test_states_that_are_given():
    net, x = type("Kept", (Required,), {"current": kept})(), 3 * torch.randn(4, 2, 3)
    zeros = torch.zeros(2, 6), torch.zeros(2, 4)
    with pytest.raises(RollUpError, match="Kept rolled up over time does not give"):
        mfpsn_fx.convert(net, x, *zeros, **QUICK)
    assert mfpsn_fx.convert(Required(), x, *zeros, **QUICK)(x)[0].shape == (4, 2, 4)
    listed = Listed()
    assert mfpsn_fx.convert(listed, x, list(zeros), **QUICK)(x)[0].shape == (4, 2, 4)


def test_a_state_that_does_not_come_back():
    class Lost(Layers):
        def forward(self, x, mem1=None, mem2=None):
            return self.step(x, mem1, mem2)[:2]

    with pytest.raises(RollUpError, match="lif2: its state goes in as 'mem2' and is not returned"):
        mfpsn_fx.convert(Lost(), torch.randn(4, 2, 3), **QUICK)


@pytest.mark.parametrize(
    ("returned", "places"),
    [
        (lambda spk, mem1, mem2: (mem2, mem1), (0,)),
        (lambda spk, mem1, mem2: (mem2, (mem1, mem2)), (0,)),
        (lambda spk, mem1, mem2: (spk, mem2, (mem1, mem2)), (1,)),
        (lambda spk, mem1, mem2: (spk, mem1, mem2), ()),
    ],
)
def test_membranes_that_are_read_out(returned, places, caplog):
    """A membrane is a readout if the spikes are not used, or if it is returned together with its own state."""

    class Read(Layers):
        def forward(self, x, mem1=None, mem2=None):
            return returned(*self.step(x, mem1, mem2))

    x = torch.randn(4, 2, 3)
    out = mfpsn_fx.convert(Read(), x, **QUICK)(x)
    for place in places:
        assert out[place].shape == (4, 2, 4)
        assert "lif2: its membrane is read out without its reset" in caplog.text
    if not places:
        assert out[1:] == (None, None)


def test_a_network_of_one_neuron():
    x = 3 * torch.randn(4, 2, 3)
    for neuron in (snntorch.Leaky(beta=0.9), snntorch.Leaky(beta=0.9, init_hidden=True), norse.LIFCell()):
        ours = mfpsn_fx.convert(neuron, x, **QUICK)
        assert ours(x).shape == x.shape
        assert [row.source for row in mfpsn_fx.selection(ours).rows] == [type(neuron).__name__]


def test_membranes_alone():
    class Membrane(Layers):
        def forward(self, x, mem=None):
            return self.lif1(self.fc1(x), mem)[1]

    with pytest.raises(ConversionError, match="its membranes are read out, and none of its spikes"):
        mfpsn_fx.convert(Membrane(), torch.randn(4, 2, 3), **QUICK)
