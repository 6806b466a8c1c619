"""Which of nine speakers says /ae/: networks of snnTorch and SpikingJelly on real speech, and ours converted from each.

The Japanese Vowels data: 12 cepstral coefficients of an utterance, 7 to 29 steps long; 270 utterances to train on, 370
to test. The PyPI package ``aeon`` carries it (``pip install --no-deps aeon``: its files are read, nothing of it is
imported). Run ``python examples/japanese_vowels/japanese_vowels.py``; needs the extras ``spikingjelly`` and
``snntorch``, and ``plot`` for ``--png``.
"""

from __future__ import annotations

import argparse
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
ORDER, OURS_LR = 4, 1e-2  # of our neurons; chosen as the sources' are


# ---- data


@dataclasses.dataclass
class Utterances:
    """x (T, N, 12), standardized, zero behind each utterance's end; mask (T, N) of its valid steps; y (N,)."""

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
    """The cases side by side in time-first order, each coefficient standardized."""
    cases = [((case - mean) / deviation).float() for case in series.cases]
    lengths = torch.tensor([len(case) for case in cases])
    x = torch.zeros(STEPS, len(cases), COEFFICIENTS)
    for n, case in enumerate(cases):
        x[: len(case), n] = case
    return Utterances(x, torch.arange(STEPS)[:, None] < lengths, series.labels)


def load() -> tuple[Utterances, Utterances]:
    """Training and test utterances, standardized by what the valid steps of the training set show."""
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
        membrane1, membrane2 = self.sn1.reset_mem(), self.sn2.reset_mem()
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

    ``setting`` are its neurons' own hyper-parameters (called ``symbols``), ``settings`` and ``RATES`` are what
    ``--tune`` looks through, and ``setting`` and ``lr`` what it found: the best mean accuracy on held-out parts of the
    training set.
    """

    name: str
    net: type[nn.Module]
    neuron: Callable[..., nn.Module]
    symbols: tuple[str, ...]
    setting: tuple
    lr: float
    settings: tuple[tuple, ...]

    def build(self, seed: int, setting: tuple | None = None) -> nn.Module:
        """The network, its synapses drawn from ``seed`` (alike for all sources)."""
        torch.manual_seed(seed)
        synapses = LoopNet(nn.Identity).state_dict()
        net = self.net(lambda: self.neuron(*(self.setting if setting is None else setting)))
        net.load_state_dict(synapses, strict=False)
        return net

    def chosen(self, setting: tuple | None = None) -> str:
        pairs = zip(self.symbols, self.setting if setting is None else setting, strict=True)
        return ", ".join(f"{symbol} = {value}" for symbol, value in pairs)


RATES = (2e-3, 5e-3, 1e-2, 2e-2)
_TAUS = tuple(itertools.product((1.25, 2.0, 4.0), (True, False)))

SOURCES = {
    source.name: source
    for source in (
        Source(
            "snnTorch Leaky", LoopNet,
            lambda beta, learned: snntorch.Leaky(
                beta=beta, learn_beta=learned, spike_grad=snntorch_surrogate.atan(alpha=2.0)
            ),
            ("beta", "learn_beta"), (0.5, True), 5e-3, tuple(itertools.product((0.25, 0.5, 0.75, 0.9), (False, True))),
        ),
        Source(
            "LIF", MultiStepNet,
            lambda tau, decay_input: neuron.LIFNode(
                tau=tau, decay_input=decay_input, surrogate_function=_atan(), detach_reset=True
            ),
            ("tau", "decay_input"), (4.0, False), 2e-2, _TAUS,
        ),
        Source(
            "PLIF", MultiStepNet,
            lambda tau, decay_input: neuron.ParametricLIFNode(
                init_tau=tau, decay_input=decay_input, surrogate_function=_atan(), detach_reset=True
            ),
            ("init_tau", "decay_input"), (2.0, False), 5e-3, _TAUS,
        ),
        Source(
            "PSN", MultiStepNet, lambda: neuron.PSN(T=STEPS, surrogate_function=_atan()),
            (), (), 2e-3, ((),),
        ),
        Source(
            "SlidingPSN", MultiStepNet, lambda k: neuron.SlidingPSN(k=k, surrogate_function=_atan()),
            ("k",), (2,), 2e-3, ((2,), (4,), (8,)),
        ),
    )
}  # fmt: skip


# ---- training and testing


def scores(model: nn.Module, data: Utterances) -> Tensor:
    """(N, 9): the mean of each step's scores over the valid steps."""
    with mfpsn_fx.valid_steps(data.mask):  # only our neurons take notice: the others are causal, or know no mask
        return mfpsn_fx.masked_mean(model(data.x))


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
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    course = Course([], [])
    for epoch in range(epochs):
        started = time.perf_counter()
        for part in data.batches(batch, seed * 1000 + epoch):
            loss = F.cross_entropy(scores(model, part), part.y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            forget(model)
        schedule.step()
        course.seconds.append(time.perf_counter() - started)
        if every_epoch or epoch == epochs - 1:
            course.accuracies.append(accuracy(model, test))
    return course


def converted(net: nn.Module, data: Utterances, calibrated: bool, batch: int = 27, order: int = ORDER) -> nn.Module:
    """Ours, started where ``net`` is: by its neurons' description, or fitted to what they do on all of ``data``.

    Kernels are measured on one batch of the size that training takes.
    """
    example = next(data.batches(batch, seed=0))
    whole = [mfpsn_fx.Batch(data.x, mask=data.mask)] if calibrated else None
    with mfpsn_fx.valid_steps(example.mask):
        return mfpsn_fx.convert(net, example.x, order=order, calibrate=whole, repeats=2, progress=False)


@dataclasses.dataclass
class Result:
    """One source network and one seed; accuracies on the test set in percent.

    ``source`` is its training, ``longer`` its training for as long again; ``plain`` and ``calibrated`` the accuracies
    of ours converted from the trained network; ``after`` the calibrated one's training, as long as ``longer``; and
    ``first`` the training of ours converted from the untrained network, as long as ``source``.
    """

    name: str
    seed: int
    source: Course
    longer: Course
    plain: float
    calibrated: float
    after: Course
    first: Course


def run(source: Source, seed: int, data: Utterances, test: Utterances, epochs: int, batch: int) -> Result:
    net = source.build(seed)
    first = train(converted(net, data, False, batch), data, test, epochs, seed, batch, OURS_LR)
    course = train(net, data, test, epochs, seed, batch, source.lr)
    plain = accuracy(converted(net, data, False, batch), test)
    ours = converted(net, data, True, batch)
    calibrated = accuracy(ours, test)
    after = train(ours, data, test, epochs, seed + 500, batch, OURS_LR)
    longer = train(net, data, test, epochs, seed + 500, batch, source.lr)
    return Result(source.name, seed, course, longer, plain, calibrated, after, first)


def tune(names: list[str], epochs: int, folds: int, batch: int) -> None:
    """Print the accuracy of each setting and learning rate on held-out parts of the training set."""
    data, _ = load()
    for name in names:
        settings = ((2,), (4,), (8,)) if name == "ours" else SOURCES[name].settings
        found = []
        for setting, lr in tqdm(list(itertools.product(settings, RATES)), desc=name, leave=False):
            held_out = []
            for k in range(folds):
                rest, part = fold(data, k)
                if name == "ours":
                    net = converted(SOURCES["LIF"].build(k), rest, False, batch, order=setting[0])
                else:
                    net = SOURCES[name].build(k, setting)
                held_out += train(net, rest, part, epochs, k, batch, lr, every_epoch=False).accuracies
            shown = f"order = {setting[0]}" if name == "ours" else SOURCES[name].chosen(setting)
            found.append((statistics.mean(held_out), shown, lr))
        found.sort(reverse=True)
        print(tabulate(found, ["held-out accuracy %", name, "learning rate"], floatfmt=".4g"), flush=True)


# ---- what is shown


def spread(values: list[float]) -> str:
    """Mean ± standard deviation."""
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation}"


def accuracy_table(results: list[Result], epochs: int) -> tuple[list[str], list[list[str]]]:
    headers = [
        "source", f"source, {epochs} epochs", f"source, {epochs} more", "ours at conversion", "ours calibrated",
        "and 1 epoch", f"and {epochs} epochs", f"ours converted untrained, {epochs} epochs",
    ]  # fmt: skip
    rows = []
    for name, runs in by_source(results).items():
        columns = (
            [run.source.accuracies[-1] for run in runs],
            [run.longer.accuracies[-1] for run in runs],
            [run.plain for run in runs],
            [run.calibrated for run in runs],
            [run.after.accuracies[0] for run in runs],
            [run.after.accuracies[-1] for run in runs],
            [run.first.accuracies[-1] for run in runs],
        )
        rows.append([name, *map(spread, columns)])
    return headers, rows


def time_table(results: list[Result]) -> tuple[list[str], list[list[str]]]:
    rows = []
    for name, runs in by_source(results).items():
        theirs, ours = (
            statistics.median(s for run in runs for course in pair(run) for s in course.seconds)
            for pair in (lambda run: (run.source, run.longer), lambda run: (run.first, run.after))
        )
        rows.append([name, f"{theirs * 1e3:.0f}", f"{ours * 1e3:.0f}", f"{ours / theirs:.2f}"])
    return ["source", "source, ms an epoch", "ours, ms an epoch", "ratio"], rows


def by_source(results: list[Result]) -> dict[str, list[Result]]:
    found: dict[str, list[Result]] = {}
    for result in results:
        found.setdefault(result.name, []).append(result)
    return found


def kept(results: list[Result]) -> str:
    """One sentence on what of the sources' accuracy is there right after conversion."""
    shares = []
    for name, runs in by_source(results).items():
        source, plain, calibrated = (
            statistics.mean(values)
            for values in zip(*((run.source.accuracies[-1], run.plain, run.calibrated) for run in runs), strict=True)
        )
        shares.append(f"{name} {plain / source:.0%}, {calibrated / source:.0%}")
    return f"Share of the source's accuracy right after conversion, without and with calibration: {'; '.join(shares)}."


def markdown(results: list[Result], options: argparse.Namespace, command: str) -> str:
    seeds = len({run.seed for run in results})
    chosen = "\n".join(
        f"| {source.name} | {source.chosen() or '-'} | {source.lr:g} |"
        for source in SOURCES.values()
        if source.name in by_source(results)
    )
    accuracies, times = (
        tabulate(rows, headers, tablefmt="github", disable_numparse=True)
        for headers, rows in (accuracy_table(results, options.epochs), time_table(results))
    )
    picture = f"![Accuracy after conversion]({options.png.name})\n\n" if options.png else ""
    return f"""# Real speech: nine speakers say /ae/

Made by `{command}` (torch {torch.__version__}, CPU, threads: {torch.get_num_threads()}; seeds: {seeds}).

The Japanese Vowels data: 12 cepstral coefficients, 7 to 29 steps, 270 utterances to train on and 370 to test.
Every network is {COEFFICIENTS} -> {HIDDEN} -> {HIDDEN} -> {SPEAKERS} with two layers of neurons; the scores are
averaged over the valid steps of each utterance. A (T, N) mask (`mfpsn_fx.valid_steps`) keeps the padding out of our
neurons' statistics and spikes. All networks of a seed start from the same synapses and are trained alike: AdamW
(weight decay 0.01), cosine schedule, batches of {options.batch}, arctangent surrogate with alpha = 2.
Hyper-parameters were chosen on held-out fifths of the training set (`--tune --seeds 2`), never on the test set; of
equals the one in better company:

| network | neurons | learning rate |
|---|---|---|
{chosen}
| ours | order = {ORDER} | {OURS_LR:g} |

## Test accuracy %

Mean ± standard deviation over the seeds; each the last epoch's. "Calibrated" is fitted to what the source's neurons do
on the training utterances, without labels (`convert(..., calibrate=...)`); it is then trained for as long as the
source that goes on beside it. The last column started from the untrained source and was trained for as long as the
source of the first.

{accuracies}

{kept(results)}
PSN has weights of its own for each pair of steps, ahead too, and a filter of k taps keeps little of them: what is left
right after conversion is calibration's.

{picture}## Time of an epoch in training

Medians, uncompiled; each of ours was timed beside its source. The sources' neurons step through time (snnTorch in
Python, LIF and PLIF inside the neuron), or multiply by T x T matrices (PSN, SlidingPSN); ours see all steps at once.

{times}
"""


def draw(results: list[Result], path: pathlib.Path) -> None:
    """Accuracy over the epochs after conversion, ours beside the source that is trained on; mean over the seeds."""
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("--png needs matplotlib: pip install matplotlib, or leave --png out") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    groups = by_source(results)
    # where all networks come to more than 85 %, what is below 80 % would squeeze what there is to see
    bottom = 80.0 if min(run.after.accuracies[-1] for run in results) > 85 else 0.0
    figure, axes = plt.subplots(1, len(groups), figsize=(2.6 * len(groups) + 0.6, 2.8), sharey=True, squeeze=False)
    for axis, (name, runs) in zip(axes[0], groups.items(), strict=True):
        courses = {
            "ours, calibrated": [[run.calibrated, *run.after.accuracies] for run in runs],
            "source, trained on": [[run.source.accuracies[-1], *run.longer.accuracies] for run in runs],
        }
        for label, lines in courses.items():
            mean = [statistics.mean(values) for values in zip(*lines, strict=True)]
            axis.plot(mean, label=label, color="C0" if label.startswith("ours") else "0.55")
        plain = statistics.mean(run.plain for run in runs)
        axis.plot(0, max(plain, bottom), "x", color="C0", label="ours, not calibrated", clip_on=False)
        if plain < bottom:
            axis.annotate(f"at {plain:.0f}", (0, bottom), xytext=(6, 3), textcoords="offset points", color="C0")
        axis.set_title(name, fontsize=9)
        axis.set_xlabel("epochs after conversion")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set(ylabel="test accuracy %", ylim=(bottom, 100))
    axes[0][-1].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=27)
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=[*SOURCES, "ours"], default=[*SOURCES],
                        help=f"sources to take: {', '.join(SOURCES)} (and with --tune: ours)")  # fmt: skip
    parser.add_argument("--threads", type=int, default=1, help="of torch; tensors are too small for more to help")
    parser.add_argument("--quick", action="store_true", help="one seed, two epochs: whether it runs, not how well")
    parser.add_argument("--tune", action="store_true", help="choose hyper-parameters on parts of the training set")
    parser.add_argument("--json", type=pathlib.Path, help="write all figures to this file")
    parser.add_argument("--markdown", type=pathlib.Path, help="write the tables to this file")
    parser.add_argument("--png", type=pathlib.Path, help="draw the accuracy over the epochs into this file")
    options = parser.parse_args(argv)
    if options.quick:
        options.epochs, options.seeds = 2, 1
    if min(options.epochs, options.seeds, options.threads) < 1 or not 1 <= options.batch <= 200:
        parser.error("--epochs, --seeds and --threads must be at least 1, --batch 1 to 200")
    torch.set_num_threads(options.threads)
    if options.tune:
        tune(options.only, options.epochs, options.seeds, options.batch)
        return
    names = [name for name in options.only if name in SOURCES]
    if not names:
        parser.error("ours can be tuned by itself, but not converted from nothing: name a source")
    data, test = load()
    command = shlex.join(
        ["python", "examples/japanese_vowels/japanese_vowels.py", *(sys.argv[1:] if argv is None else argv)]
    )
    results: list[Result] = []
    for seed, name in tqdm(list(itertools.product(range(options.seeds), names)), desc="training", unit="network"):
        results.append(run(SOURCES[name], seed, data, test, options.epochs, options.batch))
        if name == names[-1]:  # after each seed: a run that is broken off leaves what it has
            write(results, options, command)
    for headers, rows in (accuracy_table(results, options.epochs), time_table(results)):
        print("\n" + tabulate(rows, headers, disable_numparse=True))
    print("\n" + kept(results))


def write(results: list[Result], options: argparse.Namespace, command: str) -> None:
    """The files that were asked for."""
    if options.json:
        options.json.write_text(json.dumps([dataclasses.asdict(result) for result in results], indent=1) + "\n")
    if options.png:
        draw(results, options.png)
    if options.markdown:
        options.markdown.write_text(markdown(results, options, command), encoding="utf-8")


if __name__ == "__main__":
    main()
