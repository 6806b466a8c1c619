"""The whole path once: a SpikingJelly LIF network on handwritten digits, converted, compiled, trained, compared.

Each 8x8 digit of scikit-learn is fed column by column: T = 8 steps of 8 rows, one channel. Run it with
``python examples/digits.py`` or ``python -m mfpsn_fx demo``; needs the extras ``test`` and ``spikingjelly``.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import statistics
import time

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import mfpsn_fx
from mfpsn_fx.passes import neurons

STEPS, ROWS, CLASSES = 8, 8, 10


class DigitNet(nn.Module):
    """Two 1-D convolutions over the rows, one hidden layer; (T, N, 1, rows) → (N, 10), rates over time."""

    def __init__(self, make_neuron, channels: int = 32) -> None:
        super().__init__()
        self.features = nn.Sequential(
            layer.Conv1d(1, channels, 3, padding=1, bias=False),
            layer.BatchNorm1d(channels),
            make_neuron(),
            layer.Conv1d(channels, channels, 3, padding=1, bias=False),
            layer.BatchNorm1d(channels),
            make_neuron(),
            layer.AvgPool1d(2),
            layer.Flatten(),
            layer.Linear(channels * ROWS // 2, 128),
            make_neuron(),
        )
        self.head = layer.Linear(128, CLASSES)
        functional.set_step_mode(self, "m")

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x)).mean(0)


def lif() -> nn.Module:
    return neuron.LIFNode(tau=2.0, surrogate_function=surrogate.ATan(), detach_reset=True)


def psn() -> nn.Module:
    return neuron.PSN(T=STEPS, surrogate_function=surrogate.ATan())


@dataclasses.dataclass
class Data:
    """x (T, N, 1, rows) in [0, 1], y (N,)."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


def load(test_share: float = 0.25) -> Data:
    """Scikit-learn's 1797 digits, columns as time; the split is the same for every seed."""
    digits = load_digits()
    columns = torch.tensor(digits.images / 16.0, dtype=torch.float32).permute(2, 0, 1).unsqueeze(2)
    labels = torch.tensor(digits.target)
    train, test = train_test_split(range(len(labels)), test_size=test_share, random_state=0, stratify=digits.target)
    return Data(columns[:, train].contiguous(), labels[train], columns[:, test].contiguous(), labels[test])


def batches(data: Data, size: int, seed: int):
    """Whole batches in an order that ``seed`` fixes (equal sizes: nothing to recompile for)."""
    order = torch.randperm(len(data.train_y), generator=torch.Generator().manual_seed(seed))
    for index in order[: len(order) // size * size].split(size):
        yield data.train_x[:, index], data.train_y[index]


@dataclasses.dataclass
class Outcome:
    accuracy: float
    seconds_per_epoch: float


def train(model: nn.Module, data: Data, epochs: int, seed: int, batch: int, lr: float, compiled: bool) -> Outcome:
    """AdamW with a cosine schedule; test accuracy at the end, the median epoch's seconds."""
    model.train()
    step = torch.compile(model, fullgraph=True, backend="mfpsn_fx") if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    seconds = []
    for epoch in range(epochs):
        started = time.perf_counter()
        for x, y in batches(data, batch, seed * 1000 + epoch):
            loss = F.cross_entropy(step(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            functional.reset_net(model)
        schedule.step()
        seconds.append(time.perf_counter() - started)
    return Outcome(accuracy(model, data), statistics.median(seconds))


@torch.no_grad()
def accuracy(model: nn.Module, data: Data) -> float:
    """Share of the test digits that ``model`` names rightly."""
    model.eval()
    right = (model(data.test_x).argmax(1) == data.test_y).float().mean()
    functional.reset_net(model)
    return float(right)


def neuron_multiplications(model: nn.Module, data: Data) -> int:
    """Multiplications in the neurons for one digit (T steps), counted as the paper does (table 1).

    LIF multiplies by 1/τ at each step (its reset is a choice, not a product); PSN by a T×T matrix; ours not at all
    in evaluation, if every folded weight is a power of two, which is checked.
    """
    seen: list[tuple[nn.Module, int]] = []
    kinds = (neuron.LIFNode, neuron.PSN, mfpsn_fx.MulFreePSN)
    handles = [
        module.register_forward_pre_hook(lambda m, args: seen.append((m, args[0][0].numel())))
        for module in model.modules()
        if type(module) in kinds
    ]
    with torch.no_grad():
        model.eval()(data.test_x[:, :1])
    functional.reset_net(model)
    for handle in handles:
        handle.remove()
    total = 0
    for module, units in seen:
        if isinstance(module, neuron.LIFNode):
            total += units * STEPS
        elif isinstance(module, neuron.PSN):
            total += units * STEPS * STEPS
        else:
            taps = module.folded().taps
            exact = torch.frexp(taps.abs()).mantissa
            total += int(((exact != 0.5) & (taps != 0)).any()) * units * module.order * STEPS
    return total


def build(kind: str, seed: int, data: Data, order: int) -> nn.Module:
    """The network of ``kind``, synapses drawn from ``seed`` alike for all kinds."""
    torch.manual_seed(seed)
    source = DigitNet(lif)
    if kind == "lif":
        return source
    if kind == "psn":
        net = DigitNet(psn)
        synapses = {k: v for k, v in source.state_dict().items() if k in net.state_dict()}
        net.load_state_dict(synapses, strict=False)
        return net
    torch.manual_seed(seed)
    return mfpsn_fx.convert(source, data.train_x[:, :128], order=order, progress=False)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--order", type=int, default=2, help="taps of our neurons")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--eager", action="store_true", help="do not compile ours (compiling takes a C++ compiler)")
    options = parser.parse_args(argv)
    data = load()
    settings = {"batch": options.batch, "lr": options.lr}
    print(f"torch {torch.__version__}, CPU with {torch.get_num_threads()} threads; {options.epochs} epochs, "
          f"{options.seeds} seeds, batch {options.batch}\n")  # fmt: skip

    ours = build("ours", 0, data, options.order)
    mfpsn_fx.print_selection(ours)
    print(f"\nreceptive field: {mfpsn_fx.passes.receptive_field(ours)} of {STEPS} steps; "
          f"{len(neurons(ours))} neuron layers\n")  # fmt: skip

    runs: dict[str, list[Outcome]] = {}
    products: dict[str, int] = {}
    jobs = [(kind, seed) for seed in range(options.seeds) for kind in ("lif", "psn", "ours", "after")]
    for kind, seed in tqdm(jobs, desc="training", unit="network"):
        if kind == "after":
            half = options.epochs // 2
            trained = build("lif", seed, data, options.order)
            train(trained, data, half, seed, compiled=False, **settings)
            model = mfpsn_fx.convert(trained, data.train_x[:, :128], order=options.order, progress=False)
            outcome = train(model, data, options.epochs - half, seed + 100, compiled=False, **settings)
            longer = copy.deepcopy(trained)
            runs.setdefault("longer", []).append(
                train(longer, data, options.epochs - half, seed + 100, compiled=False, **settings)
            )
        else:
            model = build(kind, seed, data, options.order)
            compiled = kind == "ours" and not options.eager
            outcome = train(model, data, options.epochs, seed, compiled=compiled, **settings)
        runs.setdefault(kind, []).append(outcome)
        products.setdefault(kind, neuron_multiplications(model, data))
    products["longer"] = products["lif"]

    half = options.epochs // 2
    names = {
        "lif": f"LIF, {options.epochs} epochs",
        "psn": f"PSN (SpikingJelly), {options.epochs} epochs",
        "ours": f"ours, converted first, {options.epochs} epochs" + ("" if options.eager else ", compiled"),
        "longer": f"LIF {half} epochs, then LIF {options.epochs - half} more",
        "after": f"LIF {half} epochs, converted, then {options.epochs - half} more",
    }
    rows = []
    for kind, name in names.items():
        scores = [outcome.accuracy * 100 for outcome in runs[kind]]
        spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
        pace = statistics.median(outcome.seconds_per_epoch for outcome in runs[kind])
        rows.append([name, f"{statistics.mean(scores):.2f} ± {spread:.2f}", f"{pace:.2f}", products[kind]])
    print()
    print(tabulate(rows, ["network", "test accuracy %", "s per epoch", "multiplications in neurons, one digit"]))
    mean = {kind: statistics.mean(outcome.accuracy for outcome in runs[kind]) for kind in runs}
    better = mean["ours"] > max(mean["lif"], mean["psn"])
    print(f"\nours is {'more' if better else 'NOT more'} accurate than both LIF and PSN in the mean over the seeds")


if __name__ == "__main__":
    main()
