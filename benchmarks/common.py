"""What the benchmarks share: an interleaving timer, the environment in general terms, and how results are written."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import math
import os
import pathlib
import random
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from types import ModuleType

import torch

from mfpsn_fx.kernels.build import cpu as cpu_build

__all__ = [
    "Compiler",
    "Timing",
    "environment",
    "geometric_mean",
    "interleave",
    "load_example",
    "markdown_table",
    "output_options",
    "preamble",
    "pyplot",
    "write",
]

ROOT = pathlib.Path(__file__).resolve().parent.parent
_SHORTEST = 1e-3  # seconds that a sample should last on an accelerator, where a call is launched and not awaited
_MOST_CALLS = 20


@dataclasses.dataclass
class Timing:
    """Median milliseconds of one call by variant, the rounds they were taken over, and why a variant has none.

    ``spread`` tells a quiet machine from a busy one: the interquartile range over the median, of the median variant.
    """

    ms: dict[Hashable, float]
    rounds: int
    spread: float
    errors: dict[Hashable, str]


def first_line(error: BaseException) -> str:
    """One line that says what went wrong."""
    text = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {text}"[:200]


def synchronise(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _sample(run: Callable[[], object], calls: int, device: torch.device) -> float:
    synchronise(device)
    started = time.perf_counter()
    for _ in range(calls):
        run()
    synchronise(device)
    return (time.perf_counter() - started) / calls


def interleave(
    variants: dict[Hashable, Callable[[], object]],
    device: torch.device,
    seconds: float,
    least: int = 7,
    most: int = 60,
) -> Timing:
    """Measure all variants in turn, round by round, so that what disturbs the machine disturbs all of them.

    There are at least ``least`` rounds (3 where one alone takes longer than ``seconds``) and at most ``most``; between
    them it ends when ``seconds`` are over. The order
    within a round is drawn anew (seeded): none always finds the cache as the same neighbour left it. A variant that
    raises has an error instead of a time, and the others go on. Two calls of each come first and do not count.
    """
    errors: dict[Hashable, str] = {}
    calls: dict[Hashable, int] = {}
    for name, run in variants.items():
        try:
            run()
            once = _sample(run, 1, device)
        except Exception as error:  # whatever a variant raises is a finding about that variant
            errors[name] = first_line(error)
            continue
        calls[name] = 1 if device.type == "cpu" else max(1, min(_MOST_CALLS, math.ceil(_SHORTEST / max(once, 1e-7))))
    samples: dict[Hashable, list[float]] = {name: [] for name in calls}
    order, draw = list(calls), random.Random(0)
    started, rounds = time.perf_counter(), 0
    while order and rounds < most and (rounds < least or time.perf_counter() - started < seconds):
        draw.shuffle(order)
        for name in order:
            samples[name].append(_sample(variants[name], calls[name], device))
        rounds += 1
        if rounds == 1 and time.perf_counter() - started > seconds > 0:
            least = min(least, 3)
    medians = {name: statistics.median(values) for name, values in samples.items()}
    spread = statistics.median(_spread(values) / medians[name] for name, values in samples.items()) if samples else 0.0
    return Timing({name: value * 1e3 for name, value in medians.items()}, rounds, spread, errors)


def _spread(values: list[float]) -> float:
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return high - low


class Compiler:
    """``torch.compile`` within a budget: compiling can take longer than all that is measured.

    ``warm`` makes the first call, which compiles, and charges its time; what comes when the budget is spent is
    refused, and said to be.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds, self.spent = seconds, 0.0

    def refusal(self) -> str | None:
        if self.seconds <= 0:
            return "not compiled: compiling was not asked for"
        if self.spent >= self.seconds:
            return f"not compiled: the {self.seconds:g} s for compiling were spent"
        return None

    def compile(self, module: torch.nn.Module, **options: object) -> torch.nn.Module:
        # fullgraph: half compiled is not compiled; not dynamic: each cell has one shape, as a training run has
        return torch.compile(module, fullgraph=True, dynamic=False, **options)

    def warm(self, run: Callable[[], object]) -> str | None:
        """Why there is nothing to measure, or None."""
        started = time.perf_counter()
        try:
            run()
        except Exception as error:
            return f"does not compile: {first_line(error)}"
        finally:
            self.spent += time.perf_counter() - started
        return None


def geometric_mean(values: Iterable[float]) -> float:
    """NaN of nothing."""
    logs = [math.log(value) for value in values]
    return math.exp(statistics.mean(logs)) if logs else math.nan


def environment(device: torch.device) -> dict[str, object]:
    """torch and the device in general terms; no name of a machine, no path."""
    found: dict[str, object] = {"torch": torch.__version__}
    if device.type == "cuda":
        found |= {"device": torch.cuda.get_device_name(device), "cuda": torch.version.cuda or torch.version.hip}
        found["text"] = f"torch {found['torch']}, {found['device']}, CUDA {found['cuda']}"
    elif device.type == "cpu":
        ours = "none (not built)" if cpu_build.unavailable() is not None else str(cpu_build.level())
        vectors = f"{torch.backends.cpu.get_cpu_capability()} in torch, {ours} in fused-cpp"
        if limit := os.environ.get("MKL_ENABLE_INSTRUCTIONS"):
            vectors += f", {limit} in MKL"
        found |= {"device": "CPU", "threads": torch.get_num_threads(), "vectors": vectors}
        found["text"] = f"torch {found['torch']}, CPU, threads: {found['threads']}, vectors: {vectors}"
    else:
        found |= {"device": device.type, "text": f"torch {found['torch']}, {device.type}"}
    return found


# What holds torch, MKL and oneDNN to the vectors of a processor whose registers have so many bytes
_LIBRARIES = {
    16: {"ATEN_CPU_CAPABILITY": "default", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2", "ONEDNN_MAX_CPU_ISA": "SSE41"},
    32: {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    64: {},
}


def restart_for(march: str, script: str, argv: Sequence[str]) -> None:
    """Start the benchmark anew with our kernels and torch held to ``march``, unless it was; exit if it cannot run here.

    The libraries read these settings when they are loaded, which they are by now.
    """
    if (reason := cpu_build.refusal(march)) is not None:
        raise SystemExit(reason)
    wanted = {cpu_build.VARIABLE: march, **_LIBRARIES[cpu_build.register_bytes(march)]}
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        os.execve(sys.executable, [sys.executable, script, *argv], {**os.environ, **wanted})


def output_options(parser: argparse.ArgumentParser, png: bool = True) -> None:
    """The options that all benchmarks have, ``--png`` where they draw."""
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="a small grid, few rounds, nothing compiled")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write everything that was measured")
    parser.add_argument("--markdown", type=pathlib.Path, metavar="FILE", help="write the tables")
    if png:
        parser.add_argument("--png", type=pathlib.Path, metavar="FILE", help="draw a picture (needs matplotlib)")
    parser.add_argument("--seconds", type=float, help="to measure for, a cell, beyond the fewest rounds")
    parser.add_argument("--compile-seconds", type=float, help="to spend on torch.compile in all; 0: never compile")


def checked_device(name: str) -> torch.device:
    """The device called ``name``; exits with a message if it is not there."""
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device is available: torch.cuda.is_available() is False; use --device cpu")
    return device


def preamble(script: str, argv: Sequence[str], found: dict[str, object]) -> str:
    """The line that says how a table was made, and on what."""
    command = shlex.join(["python", f"benchmarks/{script}", *argv])
    return f"Made by `{command}` ({found['text']})."


def markdown_table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table in GitHub's Markdown; numbers as given, right-aligned but for the first column."""
    lines = ["| " + " | ".join(headers) + " |", "|" + "|".join(["---"] + ["---:"] * (len(headers) - 1)) + "|"]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def ratio(value: float | None, base: float | None) -> str:
    """``value / base`` to three figures; a dash where one of them is missing."""
    if value is None or base is None:
        return "–"
    return three(value / base)


def three(number: float) -> str:
    """To about three figures, without exponents."""
    if math.isnan(number):
        return "–"
    return f"{number:.2f}" if number < 10 else f"{number:.1f}" if number < 100 else f"{number:.0f}"


def write(path: pathlib.Path | None, content: str | object) -> None:
    """Write text, or anything else as JSON; nothing without a path."""
    if path is None:
        return
    text = content if isinstance(content, str) else json.dumps(content, indent=2, ensure_ascii=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text.rstrip("\n") + "\n", encoding="utf-8")


def pyplot() -> ModuleType:
    """matplotlib's pyplot, drawing into files; exits with a message where matplotlib is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        raise SystemExit("--png needs matplotlib: pip install matplotlib, or leave --png out")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "savefig.dpi": 150})
    return plt


def load_example(name: str) -> ModuleType:
    """``examples/<name>.py`` as a module: examples are files, not a package."""
    spec = importlib.util.spec_from_file_location(f"mfpsn_example_{name}", ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module
