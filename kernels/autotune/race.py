"""Races: measure variants of one computation in interleaved rounds until the fastest is determined.

Independent of what is computed: kernels, layouts and conversions are compared in the same way.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import random
import time
from collections.abc import Callable, Hashable, Mapping, Sequence

import torch
from tqdm import tqdm

from .cache import SelectionCache
from .clock import ClockError, sample
from .statistics import Summary, estimate, far_behind, relative_noise, spread_of, summarize, undecided

__all__ = ["NOT_REACHED", "Outcome", "Race", "Results", "Variant", "run_races"]

_log = logging.getLogger("mfpsn_fx")

Part = Callable[[], object]

NOT_REACHED = "not measured"  # prefix of the error of a variant that the budget left no time for

_MIN_SAMPLE_MS = 0.2  # shorter samples would show the clock's resolution
_MAX_CALLS = 50


@dataclasses.dataclass(frozen=True)
class Variant:
    """One of several computations with the same result.

    Attributes:
        name: in results and messages, unique in its race.
        key: what its times depend on besides the machine, as JSON-able data.
        prepare: creates the inputs and returns each part, such as ``"forward"``, as a callable without arguments. Parts
            that compile on their first call should have run once when it returns. An exception of ``prepare`` or of a
            part is an error of this variant only.
        cacheable: True if ``key`` is complete, so that times may be cached for other processes.
        rank: in doubt the highest wins, and it is measured first. Variants below 0 are baselines: they are measured
            after the others are decided, while less than half of the time is used.
    """

    name: str
    key: object
    prepare: Callable[[], Mapping[str, Part]]
    cacheable: bool = True
    rank: int = 0


@dataclasses.dataclass(frozen=True)
class Race:
    """Variants that compute the same thing.

    Attributes:
        name: in messages.
        variants: what is compared, their samples interleaved.
        default: the variant that takes precedence over those of any rank; "" for none.
        objectives: the sums of parts to be minimized, e.g. ``(("forward", "backward"), ("eval",))``; empty: the sum of
            all parts. A part that a variant does not have is left out of its sums.
        device: where the variants run.
        group: races of equal groups are measured together, their samples interleaved; None: on its own.
        setup: creates what variants share, such as random data, before the budget starts to run.
    """

    name: str
    variants: tuple[Variant, ...]
    default: str = ""
    objectives: tuple[tuple[str, ...], ...] = ()
    device: torch.device = torch.device("cpu")  # noqa: RUF009
    group: Hashable = None
    setup: Callable[[], object] | None = None

    @property
    def key(self) -> dict:
        """Return what identifies the race in the cache, as JSON-able data."""
        variants = sorted([variant.name, variant.key] for variant in self.variants)
        return {"variants": variants, "default": self.default, "objectives": self.objectives}

    @property
    def precedence(self) -> list[Variant]:
        """Return the variants, the one that wins in doubt first: the default, then by rank, then in the given order."""
        return sorted(self.variants, key=lambda variant: (variant.name != self.default, -variant.rank))


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Result of one variant: the samples of each part in milliseconds, or the error that prevented them.

    ``undersampled``: there are fewer samples than the decision needs, or than a variant that may win must have.
    """

    samples: Mapping[str, tuple[float, ...]] = dataclasses.field(default_factory=dict)
    error: str | None = None
    undersampled: bool = False

    def ms(self, *parts: str) -> float | None:
        """Return the sum of the lowest samples of ``parts`` in milliseconds; None if a part is missing."""
        return self._sum(estimate, parts)

    def spread_ms(self, *parts: str) -> float | None:
        """Return how far below :meth:`ms` the true time may lie, in milliseconds; None if a part is missing.

        That is the sum of :func:`~.statistics.spread_of`. If ``undersampled`` it is the time itself, so that the higher
        rank wins.
        """
        return self._sum(estimate if self.undersampled else spread_of, parts)

    def _sum(self, of: Callable[[Sequence[float]], float], parts: Sequence[str]) -> float | None:
        if any(part not in self.samples for part in parts):
            return None
        return sum(of(self.samples[part]) for part in parts)


@dataclasses.dataclass(frozen=True)
class Results:
    """Results of all races.

    Attributes:
        outcomes: for each race, in order, the outcome of each variant by name.
        measured, kept: the number of variants measured in this run, and of those taken from the cache alone.
        noise: (median − lowest) / lowest of the samples, the median over all parts sampled more than once.
    """

    outcomes: tuple[dict[str, Outcome], ...] = ()
    measured: int = 0
    kept: int = 0
    noise: float | None = None


def run_races(
    races: Sequence[Race],
    *,
    budget_s: float = 30.0,
    repeats: int = 5,
    progress: bool | None = None,
    cache: SelectionCache | None = None,
    clock: Callable[[], int] = time.perf_counter_ns,
) -> Results:
    """Measure all races, equal ones once, and return their outcomes.

    Variants are warmed up and sampled once, those of the highest rank first. Then all are sampled in rounds, each in a
    new random order, until :func:`~.statistics.undecided` asks for no more samples. Each variant gets at least
    ``repeats`` samples, except that those of lower rank than the fastest are dropped after two or three if they take
    more than twice as long. A variant of higher rank loses only after twice as many samples, and if it is slower by
    more than its spread. No part gets more than six times ``repeats``. Baselines, of ranks below 0, are measured after
    the others are decided, while less than half of the group's share of the budget is used.

    A group also ends when its share of the budget is used up; unused time goes to the following groups. A variant not
    reached by then has an error that starts with ``NOT_REACHED``, but one of each race is always measured. A variant
    with a run longer than a tenth of the budget (and a second) is run once after the warm-up.

    Cached samples of earlier runs are used. If by these rules they are too few, more are added to them. A variant whose
    first run did not end in an earlier process, which hung or crashed, is not run again and has an error.

    In an initialized process group, rank 0 measures and all ranks take its results: every rank must call this, with
    races of the same names.

    Args:
        races: what to measure.
        budget_s: seconds for all races together.
        repeats: the least number of samples of a variant that may win.
        progress: show a progress bar; None: if stderr is a terminal.
        cache: read for samples of earlier runs and updated with new ones; None for neither.
        clock: of nanoseconds, for devices without events.

    Raises:
        RuntimeError: another rank's races differ from rank 0's, or rank 0 failed.
        ClockError: the clock does not advance.
    """
    if not races:
        return Results()

    def run() -> Results:
        return _run(races, budget_s, repeats, progress, cache, clock)

    group = torch.distributed
    if group.is_available() and group.is_initialized() and group.get_world_size() > 1:
        return _from_rank_0(run, races)
    return run()


def _run(races, budget_s, repeats, progress, cache, clock) -> Results:
    """Measure ``races`` in this process; see :func:`run_races`."""
    texts = [json.dumps([race.key, str(race.device)], sort_keys=True) for race in races]
    groups: dict[Hashable, dict[str, Race]] = {}
    trials: dict[str, list[_Trial]] = {}
    for text, race in zip(texts, races, strict=True):
        if text in trials:
            continue
        old = _cached_outcomes(cache, race)
        trials[text] = [_Trial(text, variant, old.get(variant.name)) for variant in race.precedence]
        if _undecided(race, trials[text], repeats):
            group = ("alone", text) if race.group is None else ("together", race.group)
            groups.setdefault((*group, race.device), {})[text] = race
    if groups:
        for group in groups.values():
            for race in group.values():
                if race.setup is not None:
                    with contextlib.suppress(Exception):  # it fails again in the variants, which record the error
                        race.setup()
        deadline = time.monotonic() + budget_s
        silent = None if progress is None else not progress
        count = sum(len(trials[text]) for group in groups.values() for text in group)
        with tqdm(total=count, desc="autoselect", unit="variant", disable=silent) as bar:
            for index, group in enumerate(groups.values()):
                share = max(0.0, deadline - time.monotonic()) / (len(groups) - index)
                mine = {text: trials[text] for text in group}
                _Group(group, mine, share, budget_s, repeats, cache, clock, bar).run()
    found = {text: _outcomes_of(race, trials[text], budget_s, repeats) for text, race in zip(texts, races, strict=True)}
    every_trial = [trial for of_race in trials.values() for trial in of_race]
    return Results(
        tuple(found[text] for text in texts),
        sum(trial.started for trial in every_trial),
        sum(not trial.started and trial.known for trial in every_trial),
        relative_noise(
            samples for outcomes in found.values() for one in outcomes.values() for samples in one.samples.values()
        ),
    )


class _Trial:
    """State of a variant while it is measured, cached samples included."""

    def __init__(self, race: str, variant: Variant, old: Outcome | None) -> None:
        self.race, self.variant = race, variant
        self.samples: dict[str, list[float]] = {}
        self.error: str | None = None
        if old is not None:
            self.samples = {part: list(values) for part, values in old.samples.items()}
            self.error = None if (old.error or "").startswith(NOT_REACHED) else old.error
        self.runs: Mapping[str, Part] = {}
        self.calls: dict[str, int] = {}
        self.started = False
        self.transient = False  # the error may not recur, such as a lack of memory
        self.too_slow = False  # a run exceeded the limit and is not repeated

    @property
    def known(self) -> bool:
        """Return True if there are samples, or an error that would recur."""
        return bool(self.samples) or self.error is not None

    def parts(self, objective: tuple[str, ...]) -> list[str]:
        """Return the parts of ``objective`` that have samples."""
        return [part for part in objective if part in self.samples]

    def summary(self, objective: tuple[str, ...]) -> Summary:
        """Return the summary of the sum of its parts of ``objective``, of which it has at least one."""
        return summarize([self.samples[part] for part in self.parts(objective)])

    def outcome(self, budget_s: float, undersampled: bool) -> Outcome:
        """Return the variant's outcome as of now."""
        if self.error is not None:
            return Outcome(error=self.error)
        if not self.samples:
            return Outcome(error=f"{NOT_REACHED}: its share of the budget of {budget_s:g} s was used up")
        return Outcome({part: tuple(values) for part, values in self.samples.items()}, undersampled=undersampled)


def _outcomes_of(race: Race, trials: Sequence[_Trial], budget_s: float, repeats: int) -> dict[str, Outcome]:
    """Return the outcomes of ``trials`` by name, in the order of the race's variants."""
    wanted = {id(trial) for trial, _ in _missing_samples(race, trials, repeats)}
    found = {}
    for trial in trials:
        few = any(len(values) < repeats for values in trial.samples.values())
        found[trial.variant.name] = trial.outcome(budget_s, few or id(trial) in wanted)
    return {variant.name: found[variant.name] for variant in race.variants}


def _undecided(race: Race, trials: Sequence[_Trial], repeats: int) -> bool:
    """Return True if ``trials`` have too few samples for a decision."""
    return any(not trial.known for trial in trials) or bool(_missing_samples(race, trials, repeats))


def _missing_samples(race: Race, trials: Sequence[_Trial], repeats: int) -> list[tuple[_Trial, str]]:
    """Return the (trial, part) pairs that need another sample, among trials that have samples."""
    every = tuple({part: None for trial in trials for part in trial.samples})
    wanted: dict[tuple[int, str], tuple[_Trial, str]] = {}
    for objective in race.objectives or (every,):
        able = [trial for trial in trials if trial.error is None and trial.parts(objective)]
        for index in undecided([trial.summary(objective) for trial in able], repeats):
            if not (trial := able[index]).too_slow:
                wanted |= {(id(trial), part): (trial, part) for part in trial.parts(objective)}
    return list(wanted.values())


class _Group:
    """Measures races together, their samples interleaved, within one share of the budget."""

    def __init__(self, races, trials, share_s, budget_s, repeats, cache, clock, bar) -> None:
        self.races: dict[str, Race] = races
        self.trials: dict[str, list[_Trial]] = trials
        self.device = next(iter(races.values())).device
        self.budget_s, self.repeats = budget_s, repeats
        self.cache, self.clock, self.bar = cache, clock, bar
        self.deadline = time.monotonic() + share_s
        self.baseline_deadline = self.deadline - share_s / 2
        self.limit_ms = max(1.0, budget_s / 10) * 1e3

    def run(self) -> None:
        """Measure all trials and write the outcomes to the cache."""
        # the highest rank of each race first, then the second of each, and so on; baselines last
        places = [
            (trial.variant.rank < 0, place, trial)
            for trials in self.trials.values()
            for place, trial in enumerate(trials)
        ]
        pending = [(baseline, trial) for baseline, _, trial in sorted(places, key=lambda one: one[:2])]
        while pending:
            # first samples take at most half of the time left, so that the variants started can be sampled again
            until = time.monotonic() + (self.deadline - time.monotonic()) / 2
            baselines = pending[0][0]
            if baselines:
                self.deadline = min(self.deadline, self.baseline_deadline)
            while pending and pending[0][0] is baselines:
                self._start_if_needed(pending.pop(0)[1])
                self.bar.update()
                if time.monotonic() >= until and not self._out_of_time:
                    break
            self._sample_in_rounds()
        for text, race in self.races.items():
            trials = self.trials[text]
            cacheable = all(variant.cacheable for variant in race.variants) and not any(one.transient for one in trials)
            if self.cache is not None and cacheable and any(trial.started for trial in trials):
                outcomes = _outcomes_of(race, trials, self.budget_s, self.repeats)
                self.cache.put(race.key, self.device, _to_record(outcomes))

    @property
    def _out_of_time(self) -> bool:
        return time.monotonic() >= self.deadline

    def _may_start(self, trial: _Trial) -> bool:
        """Return True if time is left, or no other variant of the race has samples: one of each is always measured."""
        return not self._out_of_time or not any(one.samples for one in self.trials[trial.race] if one is not trial)

    def _start_if_needed(self, trial: _Trial) -> None:
        """Start ``trial`` if it is unknown or needs more samples, and time is left."""
        race = self.races[trial.race]
        wanted = not trial.known or any(
            one is trial for one, _ in _missing_samples(race, self.trials[trial.race], self.repeats)
        )
        if wanted and (self._may_start(trial) if not trial.known else not self._out_of_time):
            self.bar.set_postfix_str(f"{race.name}: {trial.variant.name}", refresh=False)
            self._start(trial)

    def _start(self, trial: _Trial) -> None:
        """Warm up and take a first sample of each part."""
        variant = trial.variant
        marked = self.cache is not None and variant.cacheable and not trial.known
        if marked and (reason := self.cache.unfinished(variant.key, self.device)):
            trial.error = reason
            _log.warning("%s: %s is not measured: %s", self.races[trial.race].name, variant.name, reason)
            return
        trial.started = True

        def start() -> None:
            trial.runs = dict(variant.prepare())
            taken: dict[str, float] = {}
            lowest: dict[str, float] = {}
            for part, run in trial.runs.items():
                if not self._may_start(trial):  # too slow for the time left
                    return
                if self._can_skip(trial, part, lowest):
                    continue
                first = sample(run, 1, self.device, self.clock)
                trial.calls[part] = 1
                taken[part] = self._sample(trial, part)
                lowest[part] = min(first, taken[part])
                trial.too_slow |= taken[part] > self.limit_ms
            for part, ms in taken.items():
                if all(other in taken for objective in self._objectives_with(trial, part) for other in objective):
                    trial.samples.setdefault(part, []).append(ms)

        with self.cache.first_run(variant.key, self.device) if marked else contextlib.nullcontext():
            self._catch_errors(trial, start)

    def _objectives_with(self, trial: _Trial, part: str) -> list[list[str]]:
        """Return the objectives that contain ``part``, each reduced to the parts that ``trial`` has."""
        objectives = self.races[trial.race].objectives
        return [[one for one in objective if one in trial.runs] for objective in objectives if part in objective]

    def _can_skip(self, trial: _Trial, part: str, lowest: Mapping[str, float]) -> bool:
        """Return True if ``part`` can be skipped: its objective's other parts already take far longer than the best.

        ``lowest`` is the faster of two calls of each part. Baselines are never skipped, since tables show their times.
        """
        higher = []
        for other in self.trials[trial.race]:
            if other is trial:
                break
            higher += [other] if other.error is None else []
        objectives = self._objectives_with(trial, part)
        if trial.variant.rank < 0 or trial.samples or not objectives:
            return False
        for objective in objectives:
            costs = [other.summary(objective).ms for other in higher if len(other.parts(objective)) == len(objective)]
            if not costs or not far_behind(sum(lowest.get(one, 0.0) for one in objective), min(costs)):
                return False
        return True

    def _catch_errors(self, trial: _Trial, run: Callable[[], None]) -> None:
        """Call ``run``; an exception becomes the error of ``trial`` and does not affect other trials."""
        try:
            run()
        except ClockError:
            raise
        except Exception as error:
            first = (str(error).strip().splitlines() or [""])[0]
            trial.error = f"{type(error).__name__}: {first}"
            # memory may suffice in another run; other errors of the same arguments recur
            trial.transient = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "memory" in first
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _sample_in_rounds(self) -> None:
        """Sample all trials that need it, in rounds of random order, until none does or time is up."""
        generator = random.Random(0)
        while not self._out_of_time:
            turns = [
                turn
                for text, race in self.races.items()
                for turn in _missing_samples(race, self.trials[text], self.repeats)
            ]
            if not turns:
                return
            generator.shuffle(turns)
            for trial, part in turns:
                if self._out_of_time:
                    return
                if trial.error is not None:
                    continue
                if not trial.started:  # its samples are cached ones of an earlier run
                    self._start(trial)
                elif part in trial.runs:
                    self._catch_errors(trial, lambda trial=trial, part=part: self._add_sample(trial, part))

    def _add_sample(self, trial: _Trial, part: str) -> None:
        trial.samples[part].append(self._sample(trial, part))

    def _sample(self, trial: _Trial, part: str) -> float:
        """Return the milliseconds of one call, measured over as many calls as the clock's resolution demands."""
        ms = sample(trial.runs[part], trial.calls[part], self.device, self.clock)
        calls = min(_MAX_CALLS, math.ceil(_MIN_SAMPLE_MS / ms))
        if calls > 2 * trial.calls[part]:  # the first sample, or the first was disturbed
            trial.calls[part] = calls
            ms = sample(trial.runs[part], calls, self.device, self.clock)
        return ms


def _to_record(outcomes: Mapping[str, Outcome]) -> dict[str, dict]:
    """Return outcomes with all their samples as JSON-able data."""
    return {
        name: {
            "samples": {part: list(ms) for part, ms in one.samples.items()},
            "error": one.error,
            "thin": one.undersampled,
        }
        for name, one in outcomes.items()
    }


def _parse_outcomes(data: Mapping) -> dict[str, Outcome]:
    """Return the outcomes of a record made by :func:`_to_record`, checked, since its file may hold anything."""
    found = {}
    for name, one in data.items():
        samples = {str(part): tuple(float(ms) for ms in values) for part, values in one["samples"].items()}
        if any(not values or not all(0 < ms < math.inf for ms in values) for values in samples.values()):
            raise ValueError(f"{name}: times must be positive numbers")
        error = one["error"]
        if not (samples if error is None else isinstance(error, str)):
            raise ValueError(f"{name}: neither times nor an error")
        found[name] = Outcome(samples, error, bool(one["thin"]))
    return found


def _cached_outcomes(cache: SelectionCache | None, race: Race) -> dict[str, Outcome]:
    """Return the cached outcomes of earlier runs; empty if there are none."""
    if cache is None or not all(variant.cacheable for variant in race.variants):
        return {}

    def read(data: Mapping) -> dict[str, Outcome]:
        found = _parse_outcomes(data)
        if set(found) != {variant.name for variant in race.variants}:
            raise ValueError("its variants do not match its key")
        return found

    return cache.get(race.key, race.device, read) or {}


def _from_rank_0(run: Callable[[], Results], races: Sequence[Race]) -> Results:
    """Measure on rank 0 and return its results on every rank, so that all make the same choice undisturbed."""
    names = [f"{race.name} ({', '.join(variant.name for variant in race.variants)})" for race in races]
    gathered: list[str | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, json.dumps(names))
    for rank, text in enumerate(gathered):  # checked on every rank: none may wait for a rank that has raised
        if (theirs := json.loads(text)) != (first := json.loads(gathered[0])):
            raise RuntimeError(
                f"rank 0 measures for all ranks, but rank {rank} has other layers or kernels: "
                f"{'; '.join(sorted(set(first) ^ set(theirs))[:3]) or 'in another order'}. Convert the same network, "
                "with the same kernels, on every rank"
            )
    box: list[str | None] = [None]
    failed = None
    if torch.distributed.get_rank() == 0:
        try:
            results = run()
            records = [_to_record(outcomes) for outcomes in results.outcomes]
            counts = [results.measured, results.kept, results.noise]
            box = [json.dumps({"records": records, "counts": counts})]
        except Exception as error:  # the other ranks wait for the broadcast below
            failed = error
            box = [json.dumps({"failed": f"{type(error).__name__}: {error}"})]
    torch.distributed.broadcast_object_list(box, src=0)
    if failed is not None:
        raise failed
    results = json.loads(box[0])
    if "failed" in results:
        raise RuntimeError(f"rank 0 could not measure: {results['failed']}")
    return Results(tuple(_parse_outcomes(record) for record in results["records"]), *results["counts"])
