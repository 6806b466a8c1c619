"""Races: variants of one computation, measured side by side until it is clear which is the fastest.

Nothing here knows of neurons: kernels, layouts and conversions are compared in the same way.
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

NOT_REACHED = "not measured"  # how the error of a variant begins that the budget left no time for

_SHORTEST = 0.2  # ms that a sample should last, so that the clock's own grain does not show
_MOST_CALLS = 50


@dataclasses.dataclass(frozen=True)
class Variant:
    """One of several computations with the same result.

    Attributes:
        name: what results and messages call it, unique in its race.
        key: what its times depend on beside the machine, as JSON-able data.
        prepare: makes the inputs and returns each part, such as ``"forward"``, as a callable without arguments. What
            is compiled at the first call should have run once when it returns. An exception of its own, or of a part,
            is an error of this variant only.
        kept: whether ``key`` says enough for times to be kept for other processes.
        rank: in doubt the highest wins, and it is measured first. Those below 0 are baselines: they are measured when
            the others are decided, while less than half of the time is used.
    """

    name: str
    key: object
    prepare: Callable[[], Mapping[str, Part]]
    kept: bool = True
    rank: int = 0


@dataclasses.dataclass(frozen=True)
class Race:
    """Variants that compute the same thing.

    Attributes:
        name: what messages call it.
        variants: measured in turn, sample by sample.
        default: the variant that precedes those of any rank; "": none does.
        objectives: the sums of parts that are to be small, e.g. ``(("forward", "backward"), ("eval",))``; empty: all
            parts together. A part that a variant does not have is left out of its sums.
        device: where it runs.
        group: races with equal groups are measured together, in turn; None: on its own.
        setup: makes what variants share, such as random data, before the time of the budget runs.
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
        """What identifies it, as JSON-able data."""
        variants = sorted([variant.name, variant.key] for variant in self.variants)
        return {"variants": variants, "default": self.default, "objectives": self.objectives}

    @property
    def precedence(self) -> list[Variant]:
        """The variants, the one that wins in doubt first: the default, then by rank, then as they are given."""
        return sorted(self.variants, key=lambda variant: (variant.name != self.default, -variant.rank))


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of a variant: the samples of each part in milliseconds, or why there are none.

    ``thin``: there are fewer than the decision needs, or than one that may win must have.
    """

    samples: Mapping[str, tuple[float, ...]] = dataclasses.field(default_factory=dict)
    error: str | None = None
    thin: bool = False

    def ms(self, *parts: str) -> float | None:
        """The sum of the lowest samples of ``parts``; None if one is missing."""
        return self._sum(estimate, parts)

    def spread_ms(self, *parts: str) -> float | None:
        """How far below :meth:`ms` the true time may lie; None if a part is missing.

        That is the sum of :func:`~.autotune.statistics.spread_of`; of too few samples as much as the time itself: in
        doubt the higher rank wins, and of one that was hardly measured nothing is certain.
        """
        return self._sum(estimate if self.thin else spread_of, parts)

    def _sum(self, of: Callable[[Sequence[float]], float], parts: Sequence[str]) -> float | None:
        if any(part not in self.samples for part in parts):
            return None
        return sum(of(self.samples[part]) for part in parts)


@dataclasses.dataclass(frozen=True)
class Results:
    """What came of all races.

    Attributes:
        outcomes: for each race, in order, that of each variant by name.
        measured, kept: how many variants were measured now, and how many had been, in an earlier run.
        noise: how far the median of the samples lies above the lowest, relative to it, in the middle of all that were
            sampled more than once.
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
    """Measure all races, equal ones once.

    Variants are warmed up and sampled once, those of the highest rank first. Then all are sampled in rounds, each in a
    new random order, until no doubt is left that more samples could take away, as
    :func:`~.autotune.statistics.undecided` says. Each has at least ``repeats`` samples, except those of lower rank than
    the fastest that are far behind, which leave after two or three. One of higher rank that seems slower has twice as
    many, and is slower by more than its spread. What is open after six times ``repeats`` stays so. Baselines, of ranks
    below 0, come when the others are decided, and are measured while less than half of the group's share of the budget
    is used.

    A group also ends when its share of the budget is used up; what it leaves over goes to those after it. A variant not
    reached by then has an error that says so, but one of each race is always measured. A run longer than a tenth of
    the budget (and a second) is its variant's only one after the warm-up.

    Samples that are kept from an earlier run are used. If by these rules they are too few, more are added to them.
    A variant whose first run an earlier process began and did not end, since it hung or crashed and was killed, is not
    run again: its error says so.

    In an initialized process group, rank 0 measures and all ranks take its results: every rank must call, with
    races of the same names.

    Args:
        races: what to measure.
        budget_s: seconds for all of them.
        repeats: the fewest samples of a variant that may win.
        progress: show a progress bar; None: if the terminal is one.
        cache: samples of earlier runs, where new ones are kept too; None: neither.
        clock: of nanoseconds, for devices without events.

    Raises:
        RuntimeError: another rank's results do not fit, or rank 0 failed.
        ClockError: the clock does not go forwards.
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
    texts = [json.dumps([race.key, str(race.device)], sort_keys=True) for race in races]
    groups: dict[Hashable, dict[str, Race]] = {}
    trials: dict[str, list[_Trial]] = {}
    for text, race in zip(texts, races, strict=True):
        if text in trials:
            continue
        old = _recorded(cache, race)
        trials[text] = [_Trial(text, variant, old.get(variant.name)) for variant in race.precedence]
        if _needs(race, trials[text], repeats):
            group = ("alone", text) if race.group is None else ("together", race.group)
            groups.setdefault((*group, race.device), {})[text] = race
    if groups:
        for group in groups.values():
            for race in group.values():
                if race.setup is not None:
                    with contextlib.suppress(Exception):  # it goes wrong again in the variants, which say so
                        race.setup()
        ends = time.monotonic() + budget_s
        silent = None if progress is None else not progress
        count = sum(len(trials[text]) for group in groups.values() for text in group)
        with tqdm(total=count, desc="autoselect", unit="way", disable=silent) as bar:
            for index, group in enumerate(groups.values()):
                share = max(0.0, ends - time.monotonic()) / (len(groups) - index)
                mine = {text: trials[text] for text in group}
                _Group(group, mine, share, budget_s, repeats, cache, clock, bar).run()
    found = {text: _outcomes_of(race, trials[text], budget_s, repeats) for text, race in zip(texts, races, strict=True)}
    everyone = [trial for ours in trials.values() for trial in ours]
    return Results(
        tuple(found[text] for text in texts),
        sum(trial.started for trial in everyone),
        sum(not trial.started and trial.known for trial in everyone),
        relative_noise(
            samples for outcomes in found.values() for one in outcomes.values() for samples in one.samples.values()
        ),
    )


class _Trial:
    """A variant while it is measured, with the samples that were kept of it."""

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
        self.passing = False  # the error may not come again
        self.stopped = False  # a run takes so long that it is not repeated

    @property
    def known(self) -> bool:
        """Whether there are samples, or an error that would come again."""
        return bool(self.samples) or self.error is not None

    def parts(self, objective: tuple[str, ...]) -> list[str]:
        """The parts of ``objective`` that it has."""
        return [part for part in objective if part in self.samples]

    def summary(self, objective: tuple[str, ...]) -> Summary:
        """The sum of its parts of ``objective``, of which it has some."""
        return summarize([self.samples[part] for part in self.parts(objective)])

    def outcome(self, budget_s: float, thin: bool) -> Outcome:
        if self.error is not None:
            return Outcome(error=self.error)
        if not self.samples:
            return Outcome(error=f"{NOT_REACHED}: its share of the budget of {budget_s:g} s was spent")
        return Outcome({part: tuple(values) for part, values in self.samples.items()}, thin=thin)


def _outcomes_of(race: Race, trials: Sequence[_Trial], budget_s: float, repeats: int) -> dict[str, Outcome]:
    """What came of ``trials`` by name, in the order of the race's variants."""
    wanted = {id(trial) for trial, _ in _wanted(race, trials, repeats)}
    found = {}
    for trial in trials:
        few = any(len(values) < repeats for values in trial.samples.values())
        found[trial.variant.name] = trial.outcome(budget_s, few or id(trial) in wanted)
    return {variant.name: found[variant.name] for variant in race.variants}


def _needs(race: Race, trials: Sequence[_Trial], repeats: int) -> bool:
    """Whether what is known of ``trials`` is too little, by the rules by which they are sampled."""
    return any(not trial.known for trial in trials) or bool(_wanted(race, trials, repeats))


def _wanted(race: Race, trials: Sequence[_Trial], repeats: int) -> list[tuple[_Trial, str]]:
    """Who needs another sample of which part, of those that have samples."""
    every = tuple({part: None for trial in trials for part in trial.samples})
    wanted: dict[tuple[int, str], tuple[_Trial, str]] = {}
    for objective in race.objectives or (every,):
        able = [trial for trial in trials if trial.error is None and trial.parts(objective)]
        for index in undecided([trial.summary(objective) for trial in able], repeats):
            if not (trial := able[index]).stopped:
                wanted |= {(id(trial), part): (trial, part) for part in trial.parts(objective)}
    return list(wanted.values())


class _Group:
    """Races measured together."""

    def __init__(self, races, trials, share_s, budget_s, repeats, cache, clock, bar) -> None:
        self.races: dict[str, Race] = races
        self.trials: dict[str, list[_Trial]] = trials
        self.device = next(iter(races.values())).device
        self.budget_s, self.repeats = budget_s, repeats
        self.cache, self.clock, self.bar = cache, clock, bar
        self.ends = time.monotonic() + share_s
        self.half_time = self.ends - share_s / 2
        self.limit_ms = max(1.0, budget_s / 10) * 1e3

    def run(self) -> None:
        # the highest ranks of all races before the others, baselines last
        places = [
            (trial.variant.rank < 0, place, trial)
            for trials in self.trials.values()
            for place, trial in enumerate(trials)
        ]
        pending = [(baseline, trial) for baseline, _, trial in sorted(places, key=lambda one: one[:2])]
        while pending:
            # half of what is left at the most, so that those which were started can be sampled, too
            until = time.monotonic() + (self.ends - time.monotonic()) / 2
            baselines = pending[0][0]
            if baselines:
                self.ends = min(self.ends, self.half_time)
            while pending and pending[0][0] is baselines:
                self._start_if_needed(pending.pop(0)[1])
                self.bar.update()
                if time.monotonic() >= until and not self._over:
                    break
            self._sample_in_turn()
        for text, race in self.races.items():
            trials = self.trials[text]
            usable = not any(trial.passing for trial in trials) and all(variant.kept for variant in race.variants)
            if self.cache is not None and usable and any(trial.started for trial in trials):
                outcomes = _outcomes_of(race, trials, self.budget_s, self.repeats)
                self.cache.put(race.key, self.device, _record(outcomes))

    @property
    def _over(self) -> bool:
        return time.monotonic() >= self.ends

    def _may_start(self, trial: _Trial) -> bool:
        """Whether there is time; there always is for one of each race."""
        return not self._over or not any(one.samples for one in self.trials[trial.race] if one is not trial)

    def _start_if_needed(self, trial: _Trial) -> None:
        race = self.races[trial.race]
        wanted = not trial.known or any(one is trial for one, _ in _wanted(race, self.trials[trial.race], self.repeats))
        if wanted and (self._may_start(trial) if not trial.known else not self._over):
            self.bar.set_postfix_str(f"{race.name}: {trial.variant.name}", refresh=False)
            self._start(trial)

    def _start(self, trial: _Trial) -> None:
        """Warm up, and take a first sample of each part."""
        variant = trial.variant
        marked = self.cache is not None and variant.kept and not trial.known
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
                if not self._may_start(trial):  # too slow for what is left
                    return
                if self._leaves(trial, part, lowest):
                    continue
                first = sample(run, 1, self.device, self.clock)
                trial.calls[part] = 1
                taken[part] = self._sample(trial, part)
                lowest[part] = min(first, taken[part])
                trial.stopped |= taken[part] > self.limit_ms
            for part, ms in taken.items():
                if all(other in taken for objective in self._with(trial, part) for other in objective):
                    trial.samples.setdefault(part, []).append(ms)

        with self.cache.first_run(variant.key, self.device) if marked else contextlib.nullcontext():
            self._guarded(trial, start)

    def _with(self, trial: _Trial, part: str) -> list[list[str]]:
        """The objectives that need ``part``, each as the parts of them that ``trial`` has."""
        objectives = self.races[trial.race].objectives
        return [[one for one in objective if one in trial.runs] for objective in objectives if part in objective]

    def _leaves(self, trial: _Trial, part: str, lowest: Mapping[str, float]) -> bool:
        """Whether ``part`` need not be measured, since the other parts of its objective took too long already.

        ``lowest`` is the faster of two calls of each. Baselines stay: of them a ratio is wanted.
        """
        higher = []
        for other in self.trials[trial.race]:
            if other is trial:
                break
            higher += [other] if other.error is None else []
        objectives = self._with(trial, part)
        if trial.variant.rank < 0 or trial.samples or not objectives:
            return False
        for objective in objectives:
            costs = [other.summary(objective).ms for other in higher if len(other.parts(objective)) == len(objective)]
            if not costs or not far_behind(sum(lowest.get(one, 0.0) for one in objective), min(costs)):
                return False
        return True

    def _guarded(self, trial: _Trial, run: Callable[[], None]) -> None:
        """Run on behalf of ``trial``; an exception disqualifies it, and no other."""
        try:
            run()
        except ClockError:
            raise
        except Exception as error:
            first = (str(error).strip().splitlines() or [""])[0]
            trial.error = f"{type(error).__name__}: {first}"
            # memory may be there another time; what a kernel does with its arguments it does again
            trial.passing = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "memory" in first
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _sample_in_turn(self) -> None:
        draw = random.Random(0)
        while not self._over:
            turns = [
                turn for text, race in self.races.items() for turn in _wanted(race, self.trials[text], self.repeats)
            ]
            if not turns:
                return
            draw.shuffle(turns)
            for trial, part in turns:
                if self._over:
                    return
                if trial.error is not None:
                    continue
                if not trial.started:  # its samples are from an earlier run
                    self._start(trial)
                elif part in trial.runs:
                    self._guarded(trial, lambda trial=trial, part=part: self._take(trial, part))

    def _take(self, trial: _Trial, part: str) -> None:
        trial.samples[part].append(self._sample(trial, part))

    def _sample(self, trial: _Trial, part: str) -> float:
        """Milliseconds of a call, of as many in a row as the clock needs."""
        ms = sample(trial.runs[part], trial.calls[part], self.device, self.clock)
        calls = min(_MOST_CALLS, math.ceil(_SHORTEST / ms))
        if calls > 2 * trial.calls[part]:  # it is the first, or what made the first one long is over
            trial.calls[part] = calls
            ms = sample(trial.runs[part], calls, self.device, self.clock)
        return ms


def _record(outcomes: Mapping[str, Outcome]) -> dict[str, dict]:
    """Outcomes with all their samples, as JSON-able data."""
    return {
        name: {"samples": {part: list(ms) for part, ms in one.samples.items()}, "error": one.error, "thin": one.thin}
        for name, one in outcomes.items()
    }


def _outcomes(data: Mapping) -> dict[str, Outcome]:
    """Check and read what :func:`_record` wrote: it may come from anywhere."""
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


def _recorded(cache: SelectionCache | None, race: Race) -> dict[str, Outcome]:
    """Outcomes of earlier runs; empty if there are none."""
    if cache is None or not all(variant.kept for variant in race.variants):
        return {}

    def read(data: Mapping) -> dict[str, Outcome]:
        found = _outcomes(data)
        if set(found) != {variant.name for variant in race.variants}:
            raise ValueError("other variants than the key says")
        return found

    return cache.get(race.key, race.device, read) or {}


def _from_rank_0(run: Callable[[], Results], races: Sequence[Race]) -> Results:
    """Rank 0's results on every rank: all choose the same, and no rank's measuring disturbs another's."""
    names = [f"{race.name} ({', '.join(variant.name for variant in race.variants)})" for race in races]
    gathered: list[str | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, json.dumps(names))
    for rank, text in enumerate(gathered):  # looked at on every rank: none may wait for one that has raised
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
            records = [_record(outcomes) for outcomes in results.outcomes]
            counts = [results.measured, results.kept, results.noise]
            box = [json.dumps({"records": records, "counts": counts})]
        except Exception as error:  # the others wait: they must hear of it
            failed = error
            box = [json.dumps({"failed": f"{type(error).__name__}: {error}"})]
    torch.distributed.broadcast_object_list(box, src=0)
    if failed is not None:
        raise failed
    results = json.loads(box[0])
    if "failed" in results:
        raise RuntimeError(f"rank 0 could not measure: {results['failed']}")
    return Results(tuple(_outcomes(record) for record in results["records"]), *results["counts"])
