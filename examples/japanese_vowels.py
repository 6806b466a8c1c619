"""Which of nine speakers says /ae/: networks of snnTorch and SpikingJelly on real speech, and ours converted from each.

The Japanese Vowels data: 12 cepstral coefficients of an utterance, 7 to 29 steps long; 270 utterances to train on, 370
to test. The PyPI package ``aeon`` carries it (``pip install --no-deps aeon``: its files are read, nothing of it is
imported). Run ``python examples/japanese_vowels.py``; needs the extras ``spikingjelly`` and ``snntorch``, and ``plot``
for ``--png``.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import importlib.util
import itertools
import json
import pathlib
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator

import snntorch
import torch
from snntorch import surrogate as snntorch_surrogate
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from ts_format import TimeSeries, read_ts

import mfpsn_fx

STEPS, COEFFICIENTS, SPEAKERS = 29, 12, 9
HIDDEN = 128


# ---- data


@dataclasses.dataclass
class Utterances:
    """x (T, N, 12), standardised, zero behind each utterance's end; mask (T, N) of its valid steps; y (N,)."""

    x: Tensor
    mask: Tensor
    y: Tensor

    def part(self, index: Tensor) -> Utterances:
        return Utterances(self.x[:, index].contiguous(), self.mask[:, index].contiguous(), self.y[index])

    def batches(self, size: int, seed: int) -> Iterator[Utterances]:
        """Whole batches in an order that ``seed`` fixes."""
        order = torch.randperm(len(self.y), generator=torch.Generator().manual_seed(seed))
        for index in order[: len(order) // size * size].split(size):
            yield self.part(index)


def data_files() -> tuple[pathlib.Path, pathlib.Path]:
    """Where the installed package ``aeon`` keeps the training and the test file; exits with what to do if it is not."""
    spec = importlib.util.find_spec("aeon")  # finds it without running it
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("the data comes with the package aeon, which is not installed: pip install --no-deps aeon")
    folder = pathlib.Path(spec.submodule_search_locations[0], "datasets", "data", "JapaneseVowels")
    files = folder / "JapaneseVowels_TRAIN.ts", folder / "JapaneseVowels_TEST.ts"
    if missing := [str(file) for file in files if not file.is_file()]:
        raise SystemExit(f"this version of aeon has no {', '.join(missing)}: pip install --no-deps aeon==1.6.0")
    return files


def padded(series: TimeSeries, mean: Tensor, deviation: Tensor) -> Utterances:
    """The cases side by side in time-first order, each coefficient standardised."""
    cases = [((case - mean) / deviation).float() for case in series.cases]
    lengths = torch.tensor([len(case) for case in cases])
    x = torch.zeros(STEPS, len(cases), COEFFICIENTS)
    for n, case in enumerate(cases):
        x[: len(case), n] = case
    return Utterances(x, torch.arange(STEPS)[:, None] < lengths, series.labels)


def load() -> tuple[Utterances, Utterances]:
    """Training and test utterances, standardised by what the valid steps of the training set show."""
    train, test = (read_ts(file) for file in data_files())
    steps = torch.cat(train.cases)
    mean, deviation = steps.mean(0), steps.std(0)
    return padded(train, mean, deviation), padded(test, mean, deviation)


def fold(data: Utterances, k: int, folds: int = 5) -> tuple[Utterances, Utterances]:
    """Training set without every 5th utterance, and these; the same share of each speaker (they come in order)."""
    held_out = torch.arange(len(data.y)) % folds == k
    return data.part((~held_out).nonzero().flatten()), data.part(held_out.nonzero().flatten())


# ---- the networks: 12 -> 128 -> 128 -> 9, a score for each speaker at each step


class MultiStepNet(nn.Module):
    """SpikingJelly's way: each layer sees all steps at once. (T, N, 12) → (T, N, 9)."""

    def __init__(self, make_neuron: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.fc1, self.sn1 = layer.Linear(COEFFICIENTS, HIDDEN), make_neuron()
        self.fc2, self.sn2 = layer.Linear(HIDDEN, HIDDEN), make_neuron()
        self.fc3 = layer.Linear(HIDDEN, SPEAKERS)
        functional.set_step_mode(self, "m")

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(self.sn2(self.fc2(self.sn1(self.fc1(x)))))


class LoopNet(nn.Module):
    """snnTorch's way: a loop over the steps that threads each neuron's membrane. (T, N, 12) → (T, N, 9)."""

    def __init__(self, make_neuron: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.fc1, self.sn1 = nn.Linear(COEFFICIENTS, HIDDEN), make_neuron()
        self.fc2, self.sn2 = nn.Linear(HIDDEN, HIDDEN), make_neuron()
        self.fc3 = nn.Linear(HIDDEN, SPEAKERS)

    def forward(self, x: Tensor) -> Tensor:
        membrane1, membrane2 = self.sn1.init_leaky(), self.sn2.init_leaky()
        scores = []
        for step in range(x.shape[0]):
            spikes, membrane1 = self.sn1(self.fc1(x[step]), membrane1)
            spikes, membrane2 = self.sn2(self.fc2(spikes), membrane2)
            scores.append(self.fc3(spikes))
        return torch.stack(scores)


def _atan() -> surrogate.ATan:
    return surrogate.ATan(2.0)


@dataclasses.dataclass(frozen=True)
class Source:
    """One network to train and to convert.

    ``setting`` is its neurons' own hyper-parameter, ``settings`` and ``rates`` are what ``--tune`` looks through, and
    ``setting`` and ``lr`` what it found: the best mean accuracy on held-out parts of the training set.
    """

    name: str
    net: type[nn.Module]
    neuron: Callable[[float], nn.Module]
    symbol: str
    setting: float
    lr: float
    settings: tuple[float, ...]
    rates: tuple[float, ...] = (1e-3, 2e-3, 5e-3, 1e-2)

    def build(self, seed: int, setting: float | None = None) -> nn.Module:
        """The network, its synapses drawn from ``seed`` (alike for all sources)."""
        setting = self.setting if setting is None else setting
        torch.manual_seed(seed)
        reference = LoopNet(nn.Identity)
        net = self.net(lambda: self.neuron(setting))
        net.load_state_dict(reference.state_dict(), strict=False)
        return net


SOURCES = {
    source.name: source
    for source in (
        Source(
            "snnTorch Leaky", LoopNet,
            lambda beta: snntorch.Leaky(beta=beta, spike_grad=snntorch_surrogate.atan(alpha=2.0)),
            "β", 0.5, 5e-3, (0.5, 0.75, 0.9, 0.95),
        ),
        Source(
            "LIF", MultiStepNet,
            lambda tau: neuron.LIFNode(tau=tau, surrogate_function=_atan(), detach_reset=True),
            "τ", 2.0, 5e-3, (1.25, 2.0, 4.0, 8.0),
        ),
        Source(
            "PLIF", MultiStepNet,
            lambda tau: neuron.ParametricLIFNode(init_tau=tau, surrogate_function=_atan(), detach_reset=True),
            "τ at the start", 2.0, 5e-3, (1.25, 2.0, 4.0, 8.0),
        ),
        Source("PSN", MultiStepNet, lambda steps: neuron.PSN(T=int(steps), surrogate_function=_atan()),
               "T", STEPS, 5e-3, (STEPS,)),
        Source("SlidingPSN", MultiStepNet, lambda k: neuron.SlidingPSN(k=int(k), surrogate_function=_atan()),
               "k", 4, 5e-3, (2, 4, 8)),
    )
}  # fmt: skip


# ---- training and testing


def scores(model: nn.Module, data: Utterances) -> Tensor:
    """(N, 9): the mean of each step's scores over the valid steps."""
    return masked_mean(model(data.x), data.mask)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    mask = mask.to(x.dtype).unsqueeze(-1)
    return (x * mask).sum(0) / mask.sum(0)


def forget(model: nn.Module) -> None:
    """Reset the state that SpikingJelly's neurons keep between calls; the others keep none."""
    if any(isinstance(m, neuron.BaseNode) for m in model.modules()):
        functional.reset_net(model)


@torch.no_grad()
def accuracy(model: nn.Module, data: Utterances) -> float:
    """Percent of the utterances whose speaker is named rightly."""
    training = model.training
    model.eval()
    right = (scores(model, data).argmax(1) == data.y).float().mean()
    forget(model)
    model.train(training)
    return float(right) * 100


@dataclasses.dataclass
class Course:
    """What training came to: test accuracy after each epoch in percent, seconds of each epoch without the testing."""

    accuracies: list[float]
    seconds: list[float]


def train(
    model: nn.Module, data: Utterances, test: Utterances, epochs: int, seed: int, batch: int, lr: float,
    every_epoch: bool = True,
) -> Course:  # fmt: skip
    """AdamW with a cosine schedule over ``epochs``; the same for every network."""
    model.train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs)
    course = Course([], [])
    for epoch in range(epochs):
        started = time.perf_counter()
        for part in data.batches(batch, seed * 1000 + epoch):
            loss = F.cross_entropy(scores(model, part), part.y)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            forget(model)
        schedule.step()
        course.seconds.append(time.perf_counter() - started)
        if every_epoch or epoch == epochs - 1:
            course.accuracies.append(accuracy(model, test))
    return course


def tune(names: list[str], epochs: int, folds: int, batch: int) -> None:
    """Print the accuracy of each setting and learning rate on held-out parts of the training set."""
    data, _ = load()
    for name in names:
        source = SOURCES[name]
        found = []
        for setting, lr in tqdm(list(itertools.product(source.settings, source.rates)), desc=name, leave=False):
            held_out = []
            for k in range(folds):
                rest, part = fold(data, k)
                course = train(source.build(k, setting), rest, part, epochs, k, batch, lr, every_epoch=False)
                held_out.append(course.accuracies[-1])
            found.append((statistics.mean(held_out), setting, lr))
        found.sort(reverse=True)
        print(tabulate(found, [f"{name}: accuracy %", source.symbol, "learning rate"], floatfmt="g"), flush=True)


