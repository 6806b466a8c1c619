"""Kernels chosen on a busy machine: how many of them are the wrong ones?

Run with ``python benchmarks/selection_under_load.py [--load 2] [--conversions 2] [--quick] [--json FILE] [--markdown
FILE]``. SpikingJelly's SEW-ResNet-18 is converted from an empty cache while busy processes of its own compete for the
processor; they end by themselves. Then, without them, every kernel of every layer is measured with many interleaved
samples, of which the lowest counts. A decision is wrong if the chosen kernel takes more than 1.3 times as long as the
best in the same layout.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

import checkout  # noqa: F401  (first: it makes mfpsn_fx importable from a bare checkout)
import torch
from runner import Benchmark, environment, load_example, markdown_table, three
from torch import nn
from tqdm import tqdm

import mfpsn_fx
from mfpsn_fx.kernels import Layout, Problem, get_kernel, kernels
from mfpsn_fx.kernels.autotune.buffers import Pool
from mfpsn_fx.kernels.autotune.clock import sample
from mfpsn_fx.kernels.autotune.neuron_race import kernel_race
from mfpsn_fx.kernels.constants import NeuronConstants
from mfpsn_fx.model.results import record_of
from mfpsn_fx.passes import neurons

try:
    spikingjelly = load_example("compatibility/spikingjelly_networks")
except ImportError as error:
    raise SystemExit(f"SpikingJelly's network is converted here: it cannot be imported ({error})") from None

WRONG = 1.3  # times the best
MODES = {"training": ("forward", "backward"), "evaluation": ("eval",)}
_BUSY = """
import os, sys, time
ends, parent = time.monotonic() + float(sys.argv[1]), os.getppid()
while time.monotonic() < ends and os.getppid() == parent:
    sum(range(10_000))
"""


@dataclasses.dataclass
class Settings:
    """What is converted, how often, beside how many busy processes, and how carefully it is measured afterwards."""

    device: torch.device = dataclasses.field(default_factory=lambda: torch.device("cpu"))
    load: int = 2
    conversions: int = 2
    steps: int = 4
    batch: int = 4
    size: int = 32
    layout: str = "time_first"
    budget_s: float | None = None  # convert's own
    load_seconds: float = 600.0  # after which a busy process ends, whatever happens to this one
    samples: int = 60  # of each part of each kernel in the quiet measurement, three calls in a row each
    seconds: float = 120.0  # of the quiet measurement, after which a quarter of them is enough


@contextlib.contextmanager
def busy(count: int, seconds: float) -> Iterator[None]:
    """``count`` processes that compute while the body runs; each ends after ``seconds``, or with this process."""
    command = [sys.executable, "-c", _BUSY, str(seconds)]
    running = [subprocess.Popen(command) for _ in range(count)]
    try:
        yield
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait()


@contextlib.contextmanager
def empty_cache() -> Iterator[None]:
    """Times are kept in a folder that is new and goes away."""
    before = os.environ.get("MFPSN_FX_CACHE")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MFPSN_FX_CACHE"] = folder
        try:
            yield
        finally:
            if before is None:
                del os.environ["MFPSN_FX_CACHE"]
            else:
                os.environ["MFPSN_FX_CACHE"] = before


def source() -> nn.Module:
    torch.manual_seed(0)
    build = spikingjelly.sew_resnet.sew_resnet18
    return spikingjelly.multi_step(build, **(spikingjelly.LIF | {"num_classes": 10, "cnf": "ADD"}))()


def chosen(settings: Settings) -> dict[str, object]:
    """One conversion under load: seconds, and for each layer its problem and the kernels chosen."""
    net = source().to(settings.device)
    x = torch.rand(settings.steps, settings.batch, 3, settings.size, settings.size, device=settings.device)
    with empty_cache(), busy(settings.load, settings.load_seconds):
        started = time.perf_counter()
        budget = {} if settings.budget_s is None else {"budget_s": settings.budget_s}
        model = mfpsn_fx.convert(net, x, layout=settings.layout, progress=False, **budget)
        seconds = time.perf_counter() - started
    rows = []
    for neuron in neurons(model):
        measured = record_of(model).measured[neuron.name]
        constants = dataclasses.replace(neuron.constants, training=True, layer="")
        problem = Problem.of(
            constants, neuron.layout.shape_from(measured.shape, Layout.TIME_FIRST), getattr(torch, measured.dtype),
            settings.device.type, neuron.order, affine=neuron.affine,
        )  # fmt: skip
        rows.append({"layer": neuron.name, "problem": problem, "constants": constants, "training": neuron.kernel,
                     "evaluation": neuron.eval_kernel})  # fmt: skip
    table = mfpsn_fx.selection(model)
    return {"seconds": seconds, "autoselect_s": table.autoselect_s, "rows": rows}


def quiet_times(
    settings: Settings, problems: list[tuple[Problem, NeuronConstants]]
) -> list[dict[str, dict[str, float]]]:
    """For each problem, milliseconds by mode and kernel: the lowest of many samples.

    A round samples all kernels of all problems, so that a few disturbed seconds are none of any kernel's last ones.
    """
    pool, runs = Pool(settings.device), {}
    for index, (problem, constants) in enumerate(problems):
        able = [kernel.name for kernel in kernels() if kernel.refusal(problem) is None]
        for variant in kernel_race(problem, able, pool, name="quiet", constants=constants).variants:
            runs |= {(index, part, variant.name): run for part, run in variant.prepare().items()}
    for run in runs.values():
        run()
    lowest = dict.fromkeys(runs, math.inf)
    draw, started = random.Random(0), time.perf_counter()
    for count in range(settings.samples):
        if count > settings.samples // 4 and time.perf_counter() - started > settings.seconds:
            break
        best = {}
        for (index, part, _), ms in lowest.items():
            best[index, part] = min(ms, best.get((index, part), math.inf))
        # what is far behind after ten rounds keeps the time that it has
        turns = [turn for turn, ms in lowest.items() if count < 10 or ms < 8 * best[turn[:2]]]
        draw.shuffle(turns)
        for turn in turns:
            for _ in range(3):  # in a row: what follows a disturbed call is less often disturbed itself
                calls = max(1, min(20, int(0.2 / lowest[turn])))
                lowest[turn] = min(lowest[turn], sample(runs[turn], calls, settings.device))
    found = []
    for index in range(len(problems)):
        names = list(dict.fromkeys(name for number, _, name in runs if number == index))
        found.append({
            mode: {
                name: sum(lowest[index, part, name] for part in wanted)
                for name in names if (index, wanted[0], name) in runs
            }
            for mode, wanted in MODES.items()
        })  # fmt: skip
    return found


def measure(settings: Settings, progress: bool | None = None, keep=None) -> dict[str, object]:
    """All conversions, then what their decisions cost; what ``--json`` writes."""
    silent = None if progress is None else not progress
    found = [chosen(settings) for _ in tqdm(range(settings.conversions), desc="convert", disable=silent)]
    problems = list({(row["problem"], row["constants"]): None for one in found for row in one["rows"]})
    times = dict(zip(problems, quiet_times(settings, problems), strict=True))
    conversions = []
    for one in found:
        rows = []
        for row in one["rows"]:
            for mode, ms in times[row["problem"], row["constants"]].items():
                if ms:
                    best = min(ms, key=ms.get)
                    rows.append({
                        "layer": row["layer"], "shape": list(row["problem"].shape), "mode": mode, "kernel": row[mode],
                        "best": best, "ratio": ms[get_kernel(row[mode]).name] / ms[best],
                    })  # fmt: skip
        conversions.append({"seconds": one["seconds"], "autoselect_s": one["autoselect_s"], "rows": rows})
    return {"environment": environment(settings.device), "load": settings.load, "conversions": conversions}


def table(found: dict) -> str:
    """A line for each conversion, in Markdown, and the wrong decisions."""
    rows, wrong = [], []
    for index, one in enumerate(found["conversions"], 1):
        line = [index, f"{one['autoselect_s']:.1f}"]
        for mode in MODES:
            ratios = [row["ratio"] for row in one["rows"] if row["mode"] == mode]
            bad = [row for row in one["rows"] if row["mode"] == mode and row["ratio"] > WRONG]
            line += [f"{len(bad)} of {len(ratios)}", three(max(ratios)), three(statistics.mean(ratios))]
            wrong += [
                [index, row["layer"], mode, "×".join(map(str, row["shape"])), row["kernel"], row["best"],
                 three(row["ratio"])]
                for row in bad
            ]  # fmt: skip
        rows.append(line)
    headers = ["conversion", "autoselect s"]
    for mode in MODES:
        headers += [f"wrong in {mode}", "worst ratio", "mean ratio"]
    text = (
        f"Kernels of SEW-ResNet-18 chosen beside {found['load']} busy processes: decisions that took more than "
        f"{WRONG} times as long as the best kernel, each time the lowest of many samples on the machine left alone.\n\n"
        f"{markdown_table(headers, rows)}"
    )
    if wrong:
        headers = ["conversion", "layer", "mode", "input", "chosen", "best", "ratio"]
        text += f"\n\n{markdown_table(headers, wrong)}"
    return text


BENCHMARK = Benchmark(
    __file__,
    __doc__,
    "Kernels chosen on a busy machine",
    Settings,
    measure,
    table,
    options={
        "load": "", "conversions": "", "steps": "", "batch": "", "size": "", "samples": "",
        "budget_s": "default: convert's own", "load_seconds": "",
        "layout": f"as convert takes it (default: {Settings.layout})",
    },
    quick={"load": 1, "conversions": 1, "steps": 2, "batch": 2, "size": 8, "budget_s": 2.0, "samples": 3,
           "load_seconds": 60.0},
)  # fmt: skip
main = BENCHMARK.main

if __name__ == "__main__":
    main()
