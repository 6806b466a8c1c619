"""Batch statistics over the ranks of a process group."""

from __future__ import annotations

import copy
import os
import pathlib
import pickle
import subprocess
import sys

import pytest
import torch
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn

import mfpsn_fx
from mfpsn_fx.model.distributed.group import Group

pytestmark = pytest.mark.usefixtures("one_thread")


def test_two_ranks():
    """DDP and FSDP2 on two gloo ranks agree with one process on the whole batch; see two_ranks.py."""
    script = pathlib.Path(__file__).with_name("two_ranks.py")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launcher, str(script)], capture_output=True, text=True, timeout=240, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert "ranks agree" in done.stdout


@pytest.fixture
def net():
    net = nn.Sequential(
        layer.Linear(3, 4), layer.BatchNorm1d(4), neuron.LIFNode(v_threshold=0.3), layer.Linear(4, 2), neuron.LIFNode()
    )
    functional.set_step_mode(net, "m")
    return net.double()


@pytest.mark.parametrize("fold", [False, True])
def test_alone_it_changes_nothing(net, fold):
    x = torch.randn(5, 3, 3, dtype=torch.float64)
    options = {"kernels": "shifted-add", "layout": "time_first", "repeats": 1, "progress": False, "fold_norms": fold}
    model = mfpsn_fx.convert(net, x, **options)
    twin = copy.deepcopy(model)
    held = dict(twin.named_parameters())
    assert mfpsn_fx.synchronize_statistics(twin) == mfpsn_fx.synchronize_statistics(twin) == 3
    assert all(held[name] is p for name, p in twin.named_parameters())
    for one in (model, twin):
        one(x).sum().backward()
        one(x + 1).square().sum().backward()
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=lambda m, name=name: f"{name}: {m}")
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, twin.state_dict()[name])
    assert torch.equal(model.eval()(x), twin.eval()(x))


def test_moments_are_combined_about_the_common_mean(monkeypatch):
    """Far from zero, ranks with different numbers of values, one with none."""
    parts = [torch.randn(n, 3) * 1e-2 + 1000 for n in (40, 1, 0, 7)]
    rows = []
    for part in parts:
        some = part if len(part) else torch.zeros(1, 3)
        rows.append(torch.cat([some.mean(0), some.var(0, correction=0), torch.tensor([float(len(part))])]))

    def all_gather(found, mine, group):
        assert torch.equal(mine, rows[0])
        for to, row in zip(found, rows, strict=True):
            to.copy_(row)

    monkeypatch.setattr(torch.distributed, "all_gather", all_gather)
    monkeypatch.setattr(Group, "size", len(parts))
    mean, var, count = Group().moments(rows[0][:3], rows[0][3:6], 40)
    every = torch.cat(parts).double()
    assert count == 48
    torch.testing.assert_close(mean.double(), every.mean(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(var.double(), every.var(0, correction=0), rtol=0.03, atol=0)


def test_norms_that_are_not_known(net):
    class Mine(nn.BatchNorm1d):
        pass

    for bad, found in ((Mine(4), "Mine is not a batch norm"), (net[1], "1: it has hooks")):
        model = nn.Sequential(layer.Linear(3, 4), bad, mfpsn_fx.MulFreePSN(4))
        net[1].register_forward_hook(lambda *_: None)
        with pytest.raises(TypeError, match=found):
            mfpsn_fx.synchronize_statistics(model)
        assert model[2].ranks is None


def test_copies_and_pickles():
    neuron = mfpsn_fx.MulFreePSN(3)
    mfpsn_fx.synchronize_statistics(neuron)
    assert pickle.loads(pickle.dumps(neuron)).ranks.process_group is None
    neuron.ranks = Group(process_group := object())
    assert copy.deepcopy(neuron).ranks.process_group is process_group
    with pytest.raises(TypeError, match="save its state_dict"):
        pickle.dumps(neuron)


def test_a_synchronized_norm_says_what_does_not_fit():
    norm = mfpsn_fx.SynchronizedBatchNorm(nn.BatchNorm1d(3))
    with pytest.raises(ValueError, match=r"expected 3 channels in dim 1, found shape \(5, 4\)"):
        norm(torch.randn(5, 4))
