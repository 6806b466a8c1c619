"""A network is tried on copies that share its weights: one deep copy, the result's, is all that is made."""

from __future__ import annotations

import collections

import pytest
import torch
from torch import nn

import mfpsn_fx


@pytest.fixture
def copies(monkeypatch):
    """How often the parameters of each shape were deep-copied."""
    counts, real = collections.Counter(), nn.Parameter.__deepcopy__

    def counted(self, memo):
        if id(self) not in memo:
            counts[tuple(self.shape)] += 1
        return real(self, memo)

    monkeypatch.setattr(nn.Parameter, "__deepcopy__", counted)
    return counts


OPTIONS = {"kernels": "shifted-add", "repeats": 1, "progress": False}


@pytest.mark.parametrize(
    "options",
    [{}, {"layout": "time_first"}, {"verify": "eager"}, {"calibrate": [torch.randn(6, 5, 1, 8)]}, {"init": "random"}],
    ids=lambda options: next(iter(options), "plain"),
)
def test_convert_copies_the_weights_once(net, example, copies, options):
    before = {name: p.clone() for name, p in net.named_parameters()}
    converted = mfpsn_fx.convert(net, example, **OPTIONS, **options)
    # vectors are as long as the neurons' own, which each trial has for itself
    weights = [tuple(p.shape) for p in net.parameters() if p.ndim > 1]
    assert {shape: copies[shape] for shape in weights} == collections.Counter(weights)
    converted(example).sum().backward()
    for name, p in net.named_parameters():
        assert torch.equal(p, before[name])
        assert p.grad is None
        assert p.data_ptr() != dict(converted.named_parameters())[name].data_ptr()


def test_plan_and_inplace_copy_none(net, example, copies):
    converted = mfpsn_fx.convert(net, example, inplace=True, **OPTIONS)
    mfpsn_fx.plan(converted, example, verify="eager", **OPTIONS)
    assert not [shape for shape in (tuple(p.shape) for p in net.parameters() if p.ndim > 2) if copies[shape]]
    assert all(p.grad is None for p in converted.parameters())


@pytest.mark.parametrize("options", [{}, {"verify": "eager"}], ids=["plain", "verify"])
def test_what_a_trial_writes_stays_in_the_copy(net, example, options):
    """Buffers, gradients and the generators are as a network has them that nobody tried."""
    net.features[1].momentum = 0.5
    gradient = torch.ones_like(net.head.weight)
    net.head.weight.grad = gradient.clone()
    buffers = {name: b.clone() for name, b in net.named_buffers()}
    state = torch.get_rng_state()
    converted = mfpsn_fx.convert(net, example, **OPTIONS, **options)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(net.head.weight.grad, gradient)
    for name, b in buffers.items():
        assert torch.equal(dict(net.named_buffers())[name], b), name
        if name.startswith("features.1."):
            assert torch.equal(dict(converted.named_buffers())[name], b), name
