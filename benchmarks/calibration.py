"""Accuracy right after conversion, with and without calibration, on scikit-learn's digits.

Run with ``python benchmarks/calibration.py [--quick] [--json FILE] [--markdown FILE]``. The network of
``examples/digits.py`` is trained with each kind of source neuron, converted, calibrated on the training digits (no
labels) with both drives, and trained for one more epoch. Accuracies are of the test digits, in the mean over seeds.
"""

from __future__ import annotations

import argparse
import pathlib
import statistics
import sys

import checkout  # noqa: F401  (first: it makes mfpsn_fx importable from a bare checkout)
import torch
from common import environment, load_example, markdown_table, preamble, write
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


def convert(source: torch.nn.Module, data, order: int, start: str, batches: list) -> torch.nn.Module:
    """Converted on one batch; calibrated unless ``start`` says otherwise."""
    model = mfpsn_fx.convert(source, data.train_x[:, :128], order=order, kernels="shifted-add", layout="time_first",
                             repeats=1, progress=False)  # fmt: skip
    if start != "not calibrated":
        drive, _, rate = start.partition(", ")
        mfpsn_fx.calibrate(model, batches, drive=drive, rate=float(rate or 1), progress=False)
    return model


def measure(epochs: int, seeds: int, orders: tuple[int, ...], names: list[str], samples: int | None) -> list[dict]:
    data = digits.load()
    data.train_x, data.train_y = data.train_x[:, :samples], data.train_y[:samples]
    batches = [x.contiguous() for x in data.train_x.split(256, 1)]
    results = []
    for name, seed in tqdm([(name, seed) for name in names for seed in range(seeds)], unit="network"):
        torch.manual_seed(seed)
        source = digits.DigitNet(SOURCES[name])
        trained = digits.train(source, data, epochs, seed, 64, 4e-3, compiled=False)
        for order in orders:
            for start in STARTS:
                model = convert(source, data, order, start, batches)
                row = {"source": name, "seed": seed, "order": order, "start": start, "trained": trained.accuracy}
                row["at once"] = digits.accuracy(model, data)
                later = digits.train(model, data, 1, seed + 100, 64, 1e-3, compiled=False)
                results.append({**row, "after an epoch": later.accuracy})
    return results


def tables(results: list[dict]) -> str:
    """Per cent, one row for each source neuron and order."""

    def mean(rows: list[dict], key: str) -> str:
        return f"{100 * statistics.mean(row[key] for row in rows):.1f}"

    body = []
    for name, order in dict.fromkeys((row["source"], row["order"]) for row in results):
        rows = [row for row in results if (row["source"], row["order"]) == (name, order)]
        by_start = [[row for row in rows if row["start"] == start] for start in STARTS]
        body.append(
            [name, order, mean(rows, "trained"), *(mean(some, "at once") for some in by_start)]
            + [mean(some, "after an epoch") for some in by_start]
        )
    headers = ["source neuron", "k", "source", "converted", "own drive", "source drive", "at 1.25 of its rate"]
    headers += ["an epoch later: converted", "own drive", "source drive", "at 1.25 of its rate"]
    return markdown_table(headers, body)


def main(argv: list[str] | None = None) -> list[dict]:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=8, help="that the source is trained for")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one neuron, one seed, one epoch, 128 digits")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write everything that was measured")
    parser.add_argument("--markdown", type=pathlib.Path, metavar="FILE", help="write the table")
    options = parser.parse_args(argv)
    if options.quick:
        results = measure(1, 1, (2,), ["IF, lowered by the threshold"], 128)
    else:
        results = measure(options.epochs, options.seeds, (2, 4), list(SOURCES), None)
    made_by = preamble("calibration.py", argv, environment(torch.device("cpu")))
    legend = (
        "Test accuracy in per cent, mean over seeds: of the source; right after conversion without calibration, with "
        "own drive, with source drive, and with source drive at 1.25 of the source's rates; and of each an epoch later."
    )
    text = f"{made_by}\n\n{legend}\n\n{tables(results)}"
    print(text)
    write(options.json, results)
    write(options.markdown, "# Accuracy right after conversion\n\n" + text)
    return results


if __name__ == "__main__":
    main()
