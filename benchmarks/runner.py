"""What all benchmarks share: options, interleaved timing, compiling within a budget, tables, pictures and files.

A benchmark's file holds its question: a dataclass of settings, what is measured, and how the tables are made of it.
:class:`Benchmark` does the rest.
"""

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
import typing
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any

import checkout  # noqa: F401  (first: it makes mfpsn_fx importable from a bare checkout)
import torch
from tqdm import tqdm

from mfpsn_fx.kernels import kernels
from mfpsn_fx.kernels.build import cpu as cpu_build

ROOT = pathlib.Path(__file__).resolve().parent.parent
_SHORTEST = 1e-3  # seconds that a sample should last on an accelerator, where a call is launched and not awaited
_MOST_CALLS = 50


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


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def sample(run: Callable[[], object], calls: int, device: torch.device) -> float:
    """Seconds of one of ``calls`` calls, Python and launches included."""
    synchronize(device)
    started = time.perf_counter()
    for _ in range(calls):
        run()
    synchronize(device)
    return (time.perf_counter() - started) / calls


def device_sample(run: Callable[[], object], calls: int, device: torch.device) -> float:
    """Seconds of one of ``calls`` calls on a CUDA device alone, by its events; elsewhere as :func:`sample`."""
    if device.type != "cuda":
        return sample(run, calls, device)
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    for _ in range(calls):
        run()
    after.record()
    after.synchronize()
    return before.elapsed_time(after) / 1e3 / calls


def interleave(
    variants: dict[Hashable, Callable[[], object]],
    device: torch.device,
    seconds: float,
    least: int = 7,
    most: int = 60,
    sample: Callable[[Callable[[], object], int, torch.device], float] = sample,
) -> Timing:
    """Measure all variants in turn, round by round, so that what disturbs the machine disturbs all of them.

    There are at least ``least`` rounds (3 where one alone takes longer than ``seconds``) and at most ``most``; between
    them it ends when ``seconds`` are over. Each round has an order of its own (seeded): none always finds the cache as
    the same neighbor left it. A variant that raises has an error instead of a time, and the others go on. Two calls of
    each come first and do not count.
    """
    errors: dict[Hashable, str] = {}
    calls: dict[Hashable, int] = {}
    for name, run in variants.items():
        try:
            run()
            once = sample(run, 1, device)
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
            samples[name].append(sample(variants[name], calls[name], device))
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

    ``warm`` makes the first call, which compiles, and charges its time; what comes when the budget is used up is
    refused, with that reason. ``add`` does all of it for one variant.
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

    def add(
        self,
        key: Hashable,
        make: Callable[[], Callable[[], object]],
        runs: dict[Hashable, Callable[[], object]],
        errors: dict[Hashable, str],
    ) -> None:
        """Make and warm up a compiled variant, into ``runs``; or the reason why there is none, into ``errors``."""
        if (reason := self.refusal()) is None:
            run = make()
            reason = self.warm(run)
        if reason is None:
            runs[key] = run
        else:
            errors[key] = reason


def each(
    items: Iterable,
    measure: Callable[[Any], dict],
    label: Callable[[Any], str],
    progress: bool | None = None,
    after: Callable[[list[dict]], None] | None = None,
) -> list[dict]:
    """Measure one item after the other; one that fails, such as for want of memory, is printed, and the others go on.

    ``after`` gets the results so far after each item, so that a run which is cut short keeps what it measured.
    """
    results: list[dict] = []
    for item in tqdm(list(items), disable=None if progress is None else not progress):
        try:
            results.append(measure(item))
        except (RuntimeError, MemoryError) as error:
            print(f"{label(item)}: {first_line(error)}", flush=True)
            continue
        if after is not None:
            after(results)
    return results


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


# What settings of several benchmarks have
_COMMON = {
    "seconds": "to measure for, a cell, beyond the fewest rounds",
    "compile_seconds": "to spend on torch.compile in all; 0: never compile",
}


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """One question: its options, what is measured, and how the tables are made of it.

    Attributes:
        file, doc: ``__file__`` and ``__doc__`` of the script.
        title: heading of the Markdown page.
        settings: a dataclass. A field ``device`` is ``--device``; ``seconds`` and ``compile_seconds`` are options, too.
        measure: called with the settings and with ``keep``, which writes ``--json`` of what was found so far; returns
            what was found.
        tables: what was found → Markdown.
        options: further fields of the settings that are options, with their help; "": what the default is.
        quick, accelerator: values of fields under ``--quick``, and on a device that is not a CPU.
        failures: what was found → (what, why) of all that could not be measured.
        draw: (what was found, path) → a picture, for ``--png``.
        missing: what cannot be compared here, printed before the measuring.
        extend: adds options that are no fields.
        check: (parser, options, settings): raises the errors of options, and may change the settings.
    """

    file: str
    doc: str
    title: str
    settings: type
    measure: Callable[..., dict[str, Any]]
    tables: Callable[[dict[str, Any]], str]
    options: Mapping[str, str] = dataclasses.field(default_factory=dict)
    quick: Mapping[str, object] = dataclasses.field(default_factory=dict)
    accelerator: Mapping[str, object] = dataclasses.field(default_factory=dict)
    failures: Callable[[dict[str, Any]], Iterable[tuple[str, str]]] = lambda found: ()
    draw: Callable[[dict[str, Any], pathlib.Path], None] | None = None
    missing: Callable[[], str] = lambda: ""
    extend: Callable[[argparse.ArgumentParser], None] = lambda parser: None
    check: Callable[[argparse.ArgumentParser, argparse.Namespace, Any], None] = lambda parser, options, settings: None

    def parse(self, argv: Sequence[str]) -> tuple[argparse.Namespace, Any]:
        """The options, and the settings: the defaults, then what device, ``--quick`` and single options say."""
        parser = argparse.ArgumentParser(description=self.doc.splitlines()[0])
        types, settings = typing.get_type_hints(self.settings), self.settings()
        if "device" in types:
            parser.add_argument("--device", default=str(settings.device))
        parser.add_argument("--quick", action="store_true", help="a small grid, few rounds, nothing compiled")
        parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write everything that was measured")
        parser.add_argument("--markdown", type=pathlib.Path, metavar="FILE", help="write the tables")
        parser.add_argument(
            "--render", type=pathlib.Path, metavar="FILE", help="measure nothing: show an earlier --json"
        )
        if self.draw is not None:
            parser.add_argument("--png", type=pathlib.Path, metavar="FILE", help="draw a picture (needs matplotlib)")
        fields = {**self.options, **{name: text for name, text in _COMMON.items() if name in types}}
        for name, text in fields.items():
            several, default = typing.get_origin(types[name]) is tuple, getattr(settings, name)
            kind = next(one for one in (*typing.get_args(types[name]), types[name]) if isinstance(one, type))
            text = text or f"default {' '.join(map(str, default)) if several else default}"
            parser.add_argument(f"--{name.replace('_', '-')}", type=kind, nargs="+" if several else None, help=text)
        self.extend(parser)
        options = parser.parse_args(argv, argparse.Namespace(argv=argv))
        if options.render is not None:
            return options, settings
        values: dict[str, object] = {}
        if "device" in types:
            settings.device = checked_device(options.device)
            values |= self.accelerator if settings.device.type != "cpu" else {}
        values |= self.quick if options.quick else {}
        given = {name: getattr(options, name) for name in fields if getattr(options, name) is not None}
        values |= {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
        for name, value in values.items():
            setattr(settings, name, value)
        self.check(parser, options, settings)
        return options, settings

    def main(self, argv: Sequence[str] | None = None) -> dict[str, Any]:
        """Measure, print the tables and write the files that are asked for; returns what was found."""
        argv = sys.argv[1:] if argv is None else argv
        options, settings = self.parse(argv)
        picture = getattr(options, "png", None)
        if picture is not None:
            pyplot()  # that it is missing is to be known before, not after, the measuring
        if options.render is not None:
            found = json.loads(options.render.read_text(encoding="utf-8"))
        else:
            found = self._measured(options, settings)
        text = f"{found['made_by']}\n\n{self.tables(found)}"
        print(text)
        reasons: dict[str, list[str]] = {}
        for what, why in self.failures(found):
            reasons.setdefault(why, []).append(what)
        for why, names in reasons.items():
            print(f"not measured ({why}): {'; '.join(dict.fromkeys(names))}")
        write(options.markdown, f"# {self.title}\n\n{text}")
        if picture is not None:
            self.draw(found, picture)
        return found

    def _measured(self, options: argparse.Namespace, settings: Any) -> dict[str, Any]:
        if missing := self.missing():
            print(missing)
        command = shlex.join(["python", f"benchmarks/{pathlib.Path(self.file).name}", *options.argv])
        where = environment(getattr(settings, "device", torch.device("cpu")))["text"]

        def keep(found: dict[str, Any]) -> None:
            found["made_by"] = f"Made by `{command}` ({where})."
            write(options.json, found)

        found = self.measure(settings, keep=keep)
        keep(found)
        return found


def check_kernels(parser: argparse.ArgumentParser, names: Iterable[str]) -> None:
    """End with an error of the options if one of ``names`` is no kernel's."""
    known = {kernel.name for kernel in kernels()}
    if unknown := sorted(set(names) - known):
        parser.error(f"unknown kernels {', '.join(unknown)}; there are {', '.join(sorted(known))}")


def checked_device(name: str) -> torch.device:
    """The device called ``name``; exits with a message if it is not there."""
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device is available: torch.cuda.is_available() is False; use --device cpu")
    return device


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
    """matplotlib's pyplot, drawing into files; exits with a message if matplotlib is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        raise SystemExit("--png needs matplotlib: pip install matplotlib, or leave --png out")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "savefig.dpi": 150})
    return plt


def save(figure: Any, path: pathlib.Path) -> None:
    """Write a picture and let go of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    pyplot().close(figure)


def plain_ticks(axis: Any, minor: str = "") -> None:
    """Write numbers without exponents on a logarithmic axis; between powers of ten at the digits of ``minor`` alone."""
    plt = pyplot()
    axis.set_major_formatter(plt.FuncFormatter(lambda value, _: f"{value:g}"))
    if minor:
        axis.set_minor_formatter(
            plt.FuncFormatter(lambda value, _: f"{value:g}" if f"{value:g}".strip("0.") in minor else "")
        )


def load_example(name: str) -> ModuleType:
    """``examples/<name>.py`` as a module: examples are files, not a package."""
    spec = importlib.util.spec_from_file_location(f"mfpsn_example_{name}", ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module
