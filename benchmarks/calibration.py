"""Accuracy right after conversion, with and without calibration, on scikit-learn's digits.

Run with ``python benchmarks/calibration.py [--quick] [--json FILE] [--markdown FILE]``. The network of
``examples/digits.py`` is trained with each kind of source neuron, converted, calibrated on the training digits (no
labels) with both drives, and trained for one more epoch. Accuracies are of the test digits, in the mean over seeds.
"""

from __future__ import annotations

import dataclasses
import statistics

import checkout  # noqa: F401  (first: it makes mfpsn_fx importable from a bare checkout)
import torch
from runner import Benchmark, load_example, markdown_table
from spikingjelly.activation_based import neuron, surrogate
from tqdm import tqdm

import mfpsn_fx

digits = load_example("digits")

SETTINGS = {"surrogate_function": surrogate.ATan(), "detach_reset": True}
SOURCES = {
    "LIF, tau 2, reset to zero": digits.lif,
    "leaky, decay 0.9, lowered by the threshold": lambda: neuron.LIFNode(
        tau=10.0, decay_input=False, v_reset=None, **SETTINGS
    ),
    "IF, lowered by the threshold": lambda: neuron.IFNode(v_reset=None, **SETTINGS),
}
STARTS = ("not calibrated", "own", "source", "source, 1.25")


@dataclasses.dataclass
class Settings:
    """What is trained: ``epochs`` of the source, from each of ``seeds``; ``samples`` of the digits, None for all."""

    epochs: int = 8
    seeds: int = 3
    orders: tuple[int, ...] = (2, 4)
    names: tuple[str, ...] = tuple(SOURCES)
    samples: int | None = None


def convert(source: torch.nn.Module, data, order: int, start: str, batches: list) -> torch.nn.Module:
    """Converted on one batch; calibrated unless ``start`` says otherwise."""
    model = mfpsn_fx.convert(source, data.train_x[:, :128], order=order, kernels="shifted-add", layout="time_first",
                             repeats=1, progress=False)  # fmt: skip
    if start != "not calibrated":
        drive, _, rate = start.partition(", ")
        mfpsn_fx.calibrate(model, batches, drive=drive, rate=float(rate or 1), progress=False)
    return model


def measure(settings: Settings, keep=None) -> dict[str, object]:
    """Every network from every seed; what ``--json`` writes."""
    data = digits.load()
    data.train_x, data.train_y = data.train_x[:, : settings.samples], data.train_y[: settings.samples]
    batches = [x.contiguous() for x in data.train_x.split(256, 1)]
    results = []
    for name, seed in tqdm([(n, seed) for n in settings.names for seed in range(settings.seeds)], unit="network"):
        torch.manual_seed(seed)
        source = digits.DigitNet(SOURCES[name])
        trained = digits.train(source, data, settings.epochs, seed, 64, 4e-3, compiled=False)
        for order in settings.orders:
            for start in STARTS:
                model = convert(source, data, order, start, batches)
                row = {"source": name, "seed": seed, "order": order, "start": start, "trained": trained.accuracy}
                row["at once"] = digits.accuracy(model, data)
                later = digits.train(model, data, 1, seed + 100, 64, 1e-3, compiled=False)
                results.append({**row, "after an epoch": later.accuracy})
    return {"results": results}


def tables(found: dict) -> str:
    """Per cent, one row for each source neuron and order, in Markdown."""

    def mean(rows: list[dict], key: str) -> str:
        return f"{100 * statistics.mean(row[key] for row in rows):.1f}"

    body, results = [], found["results"]
    for name, order in dict.fromkeys((row["source"], row["order"]) for row in results):
        rows = [row for row in results if (row["source"], row["order"]) == (name, order)]
        by_start = [[row for row in rows if row["start"] == start] for start in STARTS]
        body.append(
            [name, order, mean(rows, "trained"), *(mean(some, "at once") for some in by_start)]
            + [mean(some, "after an epoch") for some in by_start]
        )
    headers = ["source neuron", "k", "source", "converted", "own drive", "source drive", "at 1.25 of its rate"]
    headers += ["an epoch later: converted", "own drive", "source drive", "at 1.25 of its rate"]
    legend = (
        "Test accuracy in per cent, mean over seeds: of the source; right after conversion without calibration, with "
        "own drive, with source drive, and with source drive at 1.25 of the source's rates; and of each an epoch later."
    )
    return f"{legend}\n\n{markdown_table(headers, body)}"


BENCHMARK = Benchmark(
    __file__,
    __doc__,
    "Accuracy right after conversion",
    Settings,
    measure,
    tables,
    options={"epochs": "that the source is trained for", "seeds": ""},
    quick={"epochs": 1, "seeds": 1, "orders": (2,), "names": ("IF, lowered by the threshold",), "samples": 128},
)
main = BENCHMARK.main

if __name__ == "__main__":
    main()
