"""Loops over time with custom batch norms, random draws after layers, code under no_grad, and writes step by step."""

from __future__ import annotations

import pytest
import snntorch
import torch
from torch import nn

import mfpsn_fx
from mfpsn_fx import ConversionError
from mfpsn_fx.model.capturing.steps import capture_steps
from mfpsn_fx.passes import Example, PassContext, RollUp, RollUpError

QUICK = {"kernels": "shifted-add", "layout": "time_first", "repeats": 1, "progress": False}
pytestmark = pytest.mark.usefixtures("one_thread")


class OwnNorm(nn.Module):
    """A batch norm that is no torch.nn.BatchNorm."""

    def __init__(self, channels):
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))

    def forward(self, x):
        if self.training:
            mean = x.mean(0)
            self.mean = 0.9 * self.mean + 0.1 * mean.detach()
            return x - mean
        return x - self.mean


class OwnDropout(nn.Module):
    """Code that differs in training, but sees each sample by itself."""

    def forward(self, x):
        return x * (torch.rand_like(x) > 0.5) if self.training else 0.5 * x


class AfterLayer(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.fc, self.layer, self.lif = nn.Linear(3, 4), layer, snntorch.Leaky(beta=0.9)

    def forward(self, x):
        mem, spikes = None, []
        for t in range(4):
            spike, mem = self.lif(self.layer(self.fc(x[t])), mem)
            spikes.append(spike)
        return torch.stack(spikes)


def test_a_custom_batch_norm():
    x = torch.randn(4, 2, 3)
    with pytest.raises(RollUpError, match=r"layer: normalized with .* pass accept=\('batch_statistics',\)"):
        mfpsn_fx.convert(AfterLayer(OwnNorm(4)), x, **QUICK)
    ours = mfpsn_fx.convert(AfterLayer(OwnNorm(4)), x, accept=("batch_statistics",), **QUICK)
    assert ours(x).shape == (4, 2, 4)
    assert mfpsn_fx.convert(AfterLayer(OwnDropout()), x, **QUICK)(x).shape == (4, 2, 4)


@pytest.mark.parametrize("draw", [nn.Dropout(0.5), lambda c: torch.bernoulli(c.sigmoid().clamp(0.1, 0.9))])
def test_draws_after_layers_on_a_static_input(draw):
    class Static(AfterLayer):
        def forward(self, x):
            mem, spikes = None, []
            for _ in range(20):
                current = self.layer(self.fc(x)) if isinstance(self.layer, nn.Module) else draw(self.fc(x))
                spike, mem = self.lif(3 * current, mem)
                spikes.append(spike)
            return torch.stack(spikes)

    net = Static(draw if isinstance(draw, nn.Module) else nn.Identity())
    if not isinstance(draw, nn.Module):
        net.layer = None
    x = torch.rand(6, 3)
    unrolled, one_step = capture_steps(net, (x,))
    ours = RollUp(one_step=one_step)(unrolled, PassContext(Example((x,)))).graph_module.train()
    assert sum(n.target == "fc" for n in ours.graph.nodes) == 1
    spikes = ours(x)
    assert not all(torch.equal(spikes[0], later) for later in spikes[1:])


def test_no_grad_within_a_forward():
    class Frozen(AfterLayer):
        def forward(self, x):
            with torch.no_grad():
                x = 2 * x
            return super().forward(x)

    with pytest.raises(ConversionError, match=r"under torch\.no_grad\(\), .* detach"):
        mfpsn_fx.convert(Frozen(nn.Identity()), torch.randn(4, 2, 3), **QUICK)
    with torch.no_grad():
        assert isinstance(
            mfpsn_fx.convert(AfterLayer(nn.Identity()), torch.randn(4, 2, 3), **QUICK), torch.fx.GraphModule
        )


@pytest.mark.parametrize("make", [lambda x, *shape: x.new_zeros(*shape), lambda x, *shape: torch.zeros(*shape)])
@pytest.mark.parametrize("along", [0, 1])
def test_written_step_by_step(make, along):
    """out[t] = … and out[:, t] = … into zeros like the input, which are not there any more."""

    class Written(AfterLayer):
        fault = None

        def forward(self, x):
            mem, out = self.lif.reset_mem(), make(x, *((4, x.shape[1], 4) if along == 0 else (x.shape[1], 4, 4)))
            for t in range(4):
                spike, mem = self.lif(self.layer(self.fc(x[t])), mem)
                if self.fault == "early" and t == 2:
                    spike = spike + out.sum()
                at = 3 - t if self.fault == "backwards" else t
                if along == 0:
                    out[at] = spike
                else:
                    out[:, at] = spike
            return out

    net, x = Written(nn.Identity()), 3 * torch.randn(4, 2, 3)
    unrolled, one_step = capture_steps(net, (x,))
    ours = RollUp(one_step=one_step)(unrolled, PassContext(Example((x,)))).graph_module
    assert torch.equal(ours(x), net(x))
    assert ours(torch.cat([x, x], 1)).shape[1 - along] == 4
    for net.fault in ("backwards", "early"):
        unrolled, one_step = capture_steps(net, (x,))
        ours = RollUp(one_step=one_step)(unrolled, PassContext(Example((x,)))).graph_module
        if net.fault == "early" and "torch" in make.__code__.co_names:  # zeros that tracing does not see being read
            with pytest.raises(RollUpError, match="Written rolled up over time does not give what its own code gives"):
                mfpsn_fx.convert(net, x, **QUICK)
        else:
            torch.testing.assert_close(ours(x), net(x))
