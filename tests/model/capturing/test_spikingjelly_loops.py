"""SpikingJelly's networks in step mode 's' whose own forward loops over time."""

from __future__ import annotations

import copy

import pytest
import torch
from spikingjelly.activation_based import encoding, functional, layer, neuron
from torch import nn

import mfpsn_fx
from mfpsn_fx.passes import ConversionError

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS = 4


class Net(nn.Module):
    """(N, 8) → (N, 3), summed over steps of the same input, the most common form."""

    def __init__(self, **extra: nn.Module):
        super().__init__()
        self.fc1, self.n1 = nn.Linear(8, 6), neuron.LIFNode()
        self.fc2, self.n2 = nn.Linear(6, 3), neuron.ParametricLIFNode()
        for name, module in extra.items():
            setattr(self, name, module)

    def step(self, x):
        return self.n2(self.fc2(self.n1(self.fc1(x))))

    def forward(self, x):
        out = 0.0
        for _ in range(STEPS):
            out += self.step(x)
        return out / STEPS


class OverSteps(Net):
    """(T, N, 8) → (T, N, 3)"""

    def forward(self, x):
        functional.reset_net(self)
        return torch.stack([self.step(x[t]) for t in range(x.shape[0])])


def quick(net, x, **options):
    return mfpsn_fx.convert(net, x, repeats=1, progress=False, kernels="shifted-add", **options)


def in_parallel(converted, x):
    """Expected output of ``converted`` (of :class:`OverSteps`): layer after layer over all time steps."""
    return converted.n2(converted.fc2(converted.n1(converted.fc1(x))))


class TestLoops:
    def test_over_a_sequence(self):
        net, x = OverSteps(), torch.randn(STEPS, 2, 8)
        before = copy.deepcopy(net.state_dict())
        converted = quick(net, x)
        assert torch.equal(converted.eval()(x), in_parallel(converted, x))
        assert converted(torch.cat([x, x], 1)).shape == (STEPS, 4, 3)
        assert [(r.layer, r.source) for r in mfpsn_fx.selection(converted).rows] == [
            ("n1", "LIFNode"), ("n2", "ParametricLIFNode"),
        ]  # fmt: skip
        assert not any(isinstance(m, neuron.BaseNode) for m in converted.modules())
        converted.train()(x).sum().backward()
        assert all(p.grad is not None for p in converted.parameters())
        assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
        assert net.n1.step_mode == net.n2.step_mode == "s"
        assert net.n1.v == 0.0

    def test_over_one_input(self):
        net, x = Net(), torch.randn(2, 8)
        converted = quick(net, x).eval()
        wanted = in_parallel(converted, x.expand(STEPS, 2, 8)).mean(0)
        torch.testing.assert_close(converted(x), wanted)

    def test_a_poisson_encoder_draws_at_every_step(self):
        class Fed(Net):
            def step(self, x):
                return super().step(self.enc(x))

        x = torch.full((2, 8), 0.5)
        converted = quick(Fed(enc=encoding.PoissonEncoder()), x)
        seen = []
        converted.fc1.register_forward_hook(lambda m, args, out: seen.append(args[0]))
        converted(x)
        drawn = seen[0].unflatten(0, (STEPS, 2))
        assert not any(torch.equal(drawn[0], later) for later in drawn[1:])
        assert set(drawn.unique().tolist()) == {0.0, 1.0}

    def test_a_dropout_keeps_its_mask_over_time(self):
        net, x = Net(), 5 * torch.randn(3, 8)
        net.fc2 = nn.Sequential(layer.Dropout(0.5), net.fc2)
        converted = quick(net, x).train()
        dropout, seen = converted.get_submodule("fc2.0"), []
        converted.get_submodule("fc2.1").register_forward_hook(lambda m, args, out: seen.append(args[0]))
        dropout.register_forward_hook(lambda m, args, out: seen.append(args[0]))
        masks = []
        for _ in range(2):
            functional.reset_net(converted)
            seen.clear()
            converted(x)
            spikes, dropped = seen
            assert spikes.shape == (STEPS, 3, 6)
            assert bool(spikes.any())
            assert torch.equal(dropped.unflatten(0, (STEPS, 3)), spikes * dropout.mask)
            masks.append(dropout.mask)
        assert masks[0].unique().tolist() == [0.0, 2.0]
        assert not torch.equal(*masks)
        converted.eval()(x)
        assert torch.equal(seen[3].unflatten(0, (STEPS, 3)), seen[2])

    def test_a_dropout_of_one_input_draws_once(self):
        net, x = Net(), torch.randn(3, 8)
        net.fc1 = nn.Sequential(layer.Dropout(0.5), net.fc1)
        converted, seen = quick(net, x).train(), []
        converted.get_submodule("fc1.1").register_forward_hook(lambda m, args, out: seen.append(args[0]))
        converted(x)
        assert torch.equal(seen[0], x * converted.get_submodule("fc1.0").dropout.mask)

    def test_a_dropout_of_sequences_and_of_single_steps(self):
        class Twice(Net):
            def forward(self, x):
                steps = [self.n2(self.drop(self.fc2(self.n1(self.fc1(x))))) for _ in range(STEPS)]
                return self.drop(steps[-1])

        with pytest.raises(ConversionError, match="drop: it keeps one mask for all steps at once in one place"):
            quick(Twice(drop=layer.Dropout(0.5)), torch.randn(3, 8))

    def test_batch_norms_have_to_be_accepted(self):
        net, x = Net(bn=layer.BatchNorm1d(6)), torch.randn(2, 8)
        net.fc1 = nn.Sequential(net.fc1, net.bn)
        with pytest.raises(ConversionError, match=r"statistics of one step's batch of N.*accept="):
            quick(net, x)
        assert quick(net, x, accept=("batch_statistics",))(x).shape == (2, 3)

    def test_calibration_and_checkpoints(self):
        x = torch.randn(STEPS, 2, 8)
        converted = quick(OverSteps(), x, calibrate=[x])
        other = OverSteps()
        nn.init.constant_(other.n2.w, 1.5)
        mfpsn_fx.load_source_checkpoint(converted, other.state_dict(), x, source=OverSteps())
        torch.testing.assert_close(converted.eval()(x), quick(other, x).eval()(x))


class TestRefusals:
    @pytest.mark.parametrize("strict", [True, False])
    def test_layers_that_remember(self, strict):
        net = Net()
        net.fc2 = nn.Sequential(layer.SynapseFilter(tau=2.0), net.fc2)
        with pytest.raises(ConversionError, match=r"fc2\.0: a SynapseFilter keeps a state from step to step"):
            quick(net, torch.randn(2, 8), strict=strict)

    def test_a_reset_within_the_loop(self):
        class Resets(Net):
            def step(self, x):
                functional.reset_net(self)
                return super().step(x)

        torch.manual_seed(0)
        with pytest.raises(
            ConversionError, match=r"the input of n2 differs in .* a reset of its neurons within the loop"
        ):
            quick(Resets(), torch.rand(2, 8))

    def test_a_membrane_that_is_read(self):
        class Reads(Net):
            def forward(self, x):
                super().forward(x)
                return self.n2.v

        with pytest.raises(ConversionError, match=r"'v' of a ParametricLIFNode is read by code outside of it"):
            quick(Reads(), torch.randn(2, 8))

    def test_spikes_that_are_fed_back(self):
        class Recurrent(Net):
            def forward(self, x):
                spikes = torch.zeros_like(x)
                for _ in range(STEPS):
                    out = self.step(x + spikes)
                    spikes = torch.cat([out, out, out[:, :2]], 1)
                return out

        with pytest.raises(ConversionError, match="n1: at step 1 it is fed what belongs to step 0"):
            quick(Recurrent(), torch.randn(2, 8))

    def test_a_subclass(self):
        class Own(neuron.LIFNode):
            pass

        net = Net()
        net.n1 = Own()
        with pytest.raises(ConversionError, match=r"n1: .*Own has no adapter"):
            quick(net, torch.randn(2, 8))

    def test_in_place(self):
        net, x = OverSteps(), torch.randn(STEPS, 2, 8)
        with pytest.raises(ValueError, match="inplace=True is not possible: OverSteps steps through time"):
            quick(net, x, inplace=True)
        assert isinstance(net.n1, neuron.LIFNode)
        assert net.n1.step_mode == "s"
