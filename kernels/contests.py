"""Contests: ways to compute one thing, measured side by side until it is clear which is the fastest.

Nothing here knows of neurons: kernels, layouts, conversions and whole networks are compared alike.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import random
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence

import torch
from tqdm import tqdm

from .selection_cache import SelectionCache
from .timing import machine_noise, sample, spread_of
from .watchdog import Hung, Watchdog

__all__ = ["NOT_REACHED", "Contest", "Entrant", "Outcome", "Results", "beats", "run_contests"]

_log = logging.getLogger("mfpsn_fx")

Part = Callable[[], object]

NOT_REACHED = "not measured"  # how the error of an entrant begins that the budget left no time for

_SHORTEST = 0.2  # ms that a sample should last, so that the clock's own grain does not show
_MOST_CALLS = 50
_LONG = 50.0  # ms: a run this long needs no other before it, and is a sample at once
_WIDE = 2.0  # times the best: a loser by a wide margin
_TIE = 0.02  # of the best: what is known this well and differs by less may stay undecided
_MOST = 6  # times the fewest samples: a contest that is open by then stays so


@dataclasses.dataclass(frozen=True)
class Entrant:
    """One way to compute something.

    Attributes:
        name: what results and messages call it, unique in its contest.
        key: what its times depend on beside the machine, as JSON-able data.
        prepare: makes the inputs and returns each part, such as ``"forward"``, as a callable without arguments. What
            is compiled at the first call should have run once when it returns. Whatever it or a part raises is an
            error of this entrant only.
        kept: whether ``key`` says enough for times to be kept for other processes.
    """

    name: str
    key: object
    prepare: Callable[[], Mapping[str, Part]]
    kept: bool = True


@dataclasses.dataclass(frozen=True)
class Contest:
    """Entrants that compute the same thing.

    Attributes:
        name: what messages call it.
        entrants: measured in turn, sample by sample.
        default: the entrant that stands unless another is clearly faster; it is measured first.
        objectives: the sums of parts that are to be small, e.g. ``(("forward", "backward"), ("eval",))``; empty: all
            parts together. A part that an entrant does not have is left out of its sums.
        device: where it runs.
        heat: contests with equal heats are measured together, so that their entrants compare as well as those of one
            contest; None: on its own.
    """

    name: str
    entrants: tuple[Entrant, ...]
    default: str = ""
    objectives: tuple[tuple[str, ...], ...] = ()
    device: torch.device = torch.device("cpu")  # noqa: RUF009
    heat: Hashable = None

    @property
    def key(self) -> dict:
        """What identifies it, as JSON-able data."""
        entrants = [[entrant.name, entrant.key] for entrant in self.entrants]
        return {"entrants": entrants, "default": self.default, "objectives": self.objectives}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of an entrant: the samples of each part in milliseconds, or why there are none.

    ``noise`` is the relative noise of single samples on the machine when they were taken.
    """

    samples: Mapping[str, tuple[float, ...]] = dataclasses.field(default_factory=dict)
    error: str | None = None
    noise: float = 0.0

    def ms(self, *parts: str) -> float | None:
        """The sum of the medians of ``parts``; None if one is missing."""
        if any(part not in self.samples for part in parts):
            return None
        return sum(statistics.median(self.samples[part]) for part in parts)

    def spread_ms(self, *parts: str) -> float | None:
        """Half the width of the interval in which :meth:`ms` lies with 95 %; None if a part is missing."""
        if any(part not in self.samples for part in parts):
            return None
        return math.hypot(*(spread_of(self.samples[part], self.noise) for part in parts))


@dataclasses.dataclass(frozen=True)
class Results:
    """What came of all contests.

    Attributes:
        outcomes: for each contest, in order, that of each entrant by name.
        measured, kept: how many entrants were measured now, and how many had been, in an earlier run.
        noise: relative noise of single samples: of now, or the most that was noted with results that were kept.
    """

    outcomes: tuple[dict[str, Outcome], ...] = ()
    measured: int = 0
    kept: int = 0
    noise: float | None = None


def beats(new_ms: float, new_spread: float | None, old_ms: float, old_spread: float | None) -> bool:
    """Whether ``new`` is faster than ``old`` by more than the spread of the two."""
    return old_ms - new_ms > math.hypot(new_spread or 0.0, old_spread or 0.0)


def run_contests(
    contests: Sequence[Contest],
    *,
    budget_s: float = 30.0,
    repeats: int = 5,
    progress: bool | None = None,
    cache: SelectionCache | None = None,
    hang_s: float = 120.0,
    clock: Callable[[], int] = time.perf_counter_ns,
) -> Results:
    """Measure all contests, those that are alike once.

    Of each heat, every entrant is warmed up; then all are sampled in turn, in an order drawn anew for each round, until
    in each objective the best is faster than every other by more than the spread of the two (:func:`spread_of`), or
    differs by less than 2 % and is known that well. Each has at least ``repeats`` samples by then, except those slower
    than twice the best, which leave after two, or one long one. It also ends when the heat's share of the budget is
    spent; what a heat leaves over goes to those behind it. An entrant not reached by then has an error that says so.
    A run longer than a tenth of the budget (and a second) is its entrant's only one.

    In an initialised process group, rank 0 measures and all ranks take its results: every rank must call, with
    contests of the same names.

    Args:
        contests: what to measure.
        budget_s: seconds for all of them.
        repeats: the fewest samples of an entrant that may win.
        progress: show a progress bar; None: if the terminal is one.
        cache: results of earlier runs, where new ones are kept too; None: neither.
        hang_s: a run longer than this is broken off, if it runs in Python, and recorded as hanging either way
            (:class:`~.watchdog.Watchdog` says what can be broken off).
        clock: of nanoseconds, for devices without events.

    Raises:
        RuntimeError: another rank's results do not fit, or rank 0 failed.
    """
    if not contests:
        return Results()

    def run() -> Results:
        return _run(contests, budget_s, repeats, progress, cache, hang_s, clock)

    group = torch.distributed
    if group.is_available() and group.is_initialized() and group.get_world_size() > 1:
        return _from_rank_0(run, contests)
    return run()


def _run(contests, budget_s, repeats, progress, cache, hang_s, clock) -> Results:
    texts = [json.dumps([contest.key, str(contest.device)], sort_keys=True) for contest in contests]
    found: dict[str, dict[str, Outcome]] = {}
    heats: dict[Hashable, dict[str, Contest]] = {}
    noises: list[float] = []
    kept = 0
    for text, contest in zip(texts, contests, strict=True):
        if text in found or any(text in heat for heat in heats.values()):
            continue
        old = _kept(cache, contest, budget_s, repeats)
        if old is None:
            heat = ("alone", text) if contest.heat is None else ("together", contest.heat)
            heats.setdefault((*heat, contest.device), {})[text] = contest
        else:
            found[text] = old
            kept += len(old)
            noises += [outcome.noise for outcome in old.values()]
    count = sum(len(contest.entrants) for heat in heats.values() for contest in heat.values())
    if heats:
        ends = time.monotonic() + budget_s
        noise = {
            device: machine_noise(device, clock) for device in {c.device for h in heats.values() for c in h.values()}
        }
        noises += noise.values()
        silent = None if progress is None else not progress
        dog = Watchdog(hang_s)
        try:
            with tqdm(total=count, desc="autoselect", unit="way", disable=silent) as bar:
                for index, heat in enumerate(heats.values()):
                    device = next(iter(heat.values())).device
                    share = max(0.0, ends - time.monotonic()) / (len(heats) - index)
                    run = _Heat(heat, device, share, budget_s, repeats, noise[device], dog, cache, clock, bar)
                    found |= run.outcomes()
        finally:
            dog.close()
    return Results(tuple(found[text] for text in texts), count, kept, max(noises, default=None))


class _Runner:
    """An entrant while it is measured."""

    def __init__(self, contest: str, entrant: Entrant) -> None:
        self.contest, self.entrant = contest, entrant
        self.parts: Mapping[str, Part] = {}
        self.calls: dict[str, int] = {}
        self.warm: dict[str, float] = {}
        self.samples: dict[str, list[float]] = {}
        self.error: str | None = None
        self.passing = False  # the error may not come again
        self.stopped = False

    def cost(self, objective: tuple[str, ...]) -> float | None:
        """Milliseconds; None where it has none of the parts, or an error."""
        parts = [part for part in objective if part in self.parts]
        if self.error is not None or not parts or any(not self._values(part) for part in parts):
            return None
        return sum(statistics.median(self._values(part)) for part in parts)

    def spread(self, objective: tuple[str, ...], noise: float) -> float:
        return math.hypot(*(spread_of(self._values(part), noise) for part in objective if part in self.parts))

    def least(self, objective: tuple[str, ...]) -> int:
        """Samples of the part that has the fewest."""
        return min(len(self.samples[part]) for part in objective if part in self.parts)

    def long(self, objective: tuple[str, ...]) -> bool:
        """Whether a run takes so long that another costs more than it tells."""
        return any(self.samples[part] and self.samples[part][0] > _LONG for part in objective if part in self.parts)

    def _values(self, part: str) -> Sequence[float]:
        return self.samples.get(part) or ([self.warm[part]] if part in self.warm else [])

    def outcome(self, noise: float) -> Outcome:
        if self.error is not None:
            return Outcome(error=self.error, noise=noise)
        return Outcome({part: tuple(self._values(part)) for part in self.parts}, noise=noise)


class _Heat:
    """Contests measured together."""

    def __init__(self, contests, device, share_s, budget_s, repeats, noise, dog, cache, clock, bar) -> None:
        self.contests: dict[str, Contest] = contests
        self.device, self.budget_s, self.repeats, self.noise = device, budget_s, repeats, noise
        self.dog, self.cache, self.clock, self.bar = dog, cache, clock, bar
        self.ends = time.monotonic() + share_s
        self.limit_ms = max(1.0, budget_s / 10) * 1e3
        self.runners = {text: [_Runner(text, e) for e in contest.entrants] for text, contest in contests.items()}

    def outcomes(self) -> dict[str, dict[str, Outcome]]:
        for text, contest in self.contests.items():
            # the default first: it is measured even if the time is out
            for runner in sorted(self.runners[text], key=lambda r: r.entrant.name != contest.default):
                self.bar.set_postfix_str(f"{contest.name}: {runner.entrant.name}", refresh=False)
                self._warm_up(runner, contest)
                self.bar.update()
        self._sample_in_turn()
        found = {}
        for text, contest in self.contests.items():
            found[text] = {r.entrant.name: r.outcome(self.noise) for r in self.runners[text]}
            passing = any(r.passing for r in self.runners[text])
            if self.cache is not None and not passing and all(e.kept for e in contest.entrants):
                spent = any(r.error == self._not_reached for r in self.runners[text])
                self.cache.put(contest.key, self.device, _record(found[text], self.repeats, self.budget_s, spent))
        return found

    @property
    def _late(self) -> bool:
        return time.monotonic() >= self.ends

    @property
    def _not_reached(self) -> str:
        return f"{NOT_REACHED}: its share of the budget of {self.budget_s:g} s was spent"

    def _warm_up(self, runner: _Runner, contest: Contest) -> None:
        entrant = runner.entrant
        if self._late and entrant.name != contest.default:
            runner.error = self._not_reached
            return
        if self.cache is not None and entrant.kept and (reason := self.cache.hung(entrant.key, self.device)):
            runner.error = reason
            return

        def start() -> None:
            runner.parts = dict(entrant.prepare())
            for part, run in runner.parts.items():
                runner.samples[part] = []
                first = sample(run, 1, self.device, self.clock)
                if first > _LONG:
                    runner.samples[part].append(first)
                    runner.calls[part] = 1
                else:
                    once = runner.warm[part] = sample(run, 1, self.device, self.clock)
                    runner.calls[part] = max(1, min(_MOST_CALLS, math.ceil(_SHORTEST / once)))
                runner.stopped |= first > self.limit_ms

        self._guarded(runner, start)

    def _guarded(self, runner: _Runner, run: Callable[[], None]) -> None:
        """Run on behalf of ``runner``; whatever goes wrong is its own fault and nobody else's."""
        try:
            with self.dog.watching(lambda: self._hangs(runner)):
                run()
        except Hung:
            runner.error = f"hangs: it did not return within {self.dog.limit_s:g} s"
        except Exception as error:
            first = (str(error).strip().splitlines() or [""])[0]
            runner.error = f"{type(error).__name__}: {first}"
            # memory may be there another time; what a kernel does with its arguments it does again
            runner.passing = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "memory" in first
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _hangs(self, runner: _Runner) -> None:
        """From the watchdog's thread: leave a trace, since the process may have to be killed."""
        name = f"{self.contests[runner.contest].name}: {runner.entrant.name}"
        _log.warning("%s did not return within %g s while being measured", name, self.dog.limit_s)
        if self.cache is not None and runner.entrant.kept:
            self.cache.mark_hung(runner.entrant.key, self.device, self.dog.limit_s)

    def _sample_in_turn(self) -> None:
        draw, rounds = random.Random(0), 0
        while rounds < max(_MOST * self.repeats, 3) and not self._late:
            turns = [
                turn for text, contest in self.contests.items() for turn in self._open(self.runners[text], contest)
            ]
            if not turns:
                return
            draw.shuffle(turns)
            for runner, part in turns:
                if self._late:
                    return
                if runner.error is None:
                    self._guarded(runner, lambda runner=runner, part=part: self._take(runner, part))
            rounds += 1

    def _take(self, runner: _Runner, part: str) -> None:
        runner.samples[part].append(sample(runner.parts[part], runner.calls[part], self.device, self.clock))

    def _open(self, runners: list[_Runner], contest: Contest) -> list[tuple[_Runner, str]]:
        """Who needs another sample of what."""
        every = tuple({part: None for runner in runners for part in runner.parts})
        wanted: dict[tuple[int, str], tuple[_Runner, str]] = {}
        for objective in contest.objectives or (every,):
            costs = {runner: cost for runner in runners if (cost := runner.cost(objective)) is not None}
            for runner in self._contenders(costs, objective):
                if not runner.stopped:
                    wanted |= {(id(runner), p): (runner, p) for p in objective if p in runner.parts}
        return list(wanted.values())

    def _contenders(self, costs: dict[_Runner, float], objective: tuple[str, ...]) -> list[_Runner]:
        """Those who need more samples for the objective to be decided."""
        if not costs:
            return []
        best = min(costs, key=costs.get)
        spread = {runner: runner.spread(objective, self.noise) for runner in costs}
        few, rivals = [], []
        for runner, cost in costs.items():
            count = runner.least(objective)
            if cost > _WIDE * costs[best] and (runner.long(objective) or count >= min(2, self.repeats)):
                continue
            if count < self.repeats:
                few.append(runner)
            elif runner is not best and cost - costs[best] <= math.hypot(spread[runner], spread[best]):
                known = max(spread[runner], spread[best]) <= _TIE * costs[best]
                if not (known and cost - costs[best] <= _TIE * costs[best]):
                    rivals.append(runner)
        return [*dict.fromkeys([*few, *rivals, *([best] if rivals else [])])]


def _record(outcomes: Mapping[str, Outcome], repeats: int, budget_s: float, spent: bool) -> dict:
    return {
        "repeats": repeats,
        "budget_s": budget_s,
        "spent": spent,
        "outcomes": {
            name: {
                "samples": {part: [float(f"{ms:.5g}") for ms in values] for part, values in outcome.samples.items()},
                "error": outcome.error,
                "noise": outcome.noise,
            }
            for name, outcome in outcomes.items()
        },
    }


def _outcomes(data: Mapping) -> dict[str, Outcome]:
    """What :func:`_record` wrote, looked at closely: it may come from anywhere."""
    found = {}
    for name, one in data.items():
        samples = {str(part): tuple(float(ms) for ms in values) for part, values in one["samples"].items()}
        if any(not values or not all(0 < ms < math.inf for ms in values) for values in samples.values()):
            raise ValueError(f"{name}: times must be positive numbers")
        error, noise = one["error"], float(one["noise"])
        if not (samples if error is None else isinstance(error, str)) or not 0 <= noise < math.inf:
            raise ValueError(f"{name}: neither times nor an error")
        found[name] = Outcome(samples, error, noise)
    return found


def _kept(cache: SelectionCache | None, contest: Contest, budget_s: float, repeats: int) -> dict[str, Outcome] | None:
    """Outcomes of an earlier run that took at least as many samples, and as much time if that was short."""
    if cache is None or not all(entrant.kept for entrant in contest.entrants):
        return None

    def read(data: Mapping) -> dict[str, Outcome] | None:
        found = _outcomes(data["outcomes"])
        if set(found) != {entrant.name for entrant in contest.entrants}:
            raise ValueError("other entrants than the key says")
        if data["repeats"] < repeats or (data["spent"] and data["budget_s"] < budget_s):
            return None
        return {entrant.name: found[entrant.name] for entrant in contest.entrants}

    return cache.get(contest.key, contest.device, read)


def _from_rank_0(run: Callable[[], Results], contests: Sequence[Contest]) -> Results:
    """Rank 0's results on every rank: all choose alike, and no rank's measuring disturbs another's."""
    names = [f"{contest.name} ({', '.join(entrant.name for entrant in contest.entrants)})" for contest in contests]
    told: list[str | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(told, json.dumps(names))
    for rank, text in enumerate(told):  # looked at on every rank: none may wait for one that has raised
        if (theirs := json.loads(text)) != (first := json.loads(told[0])):
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
            records = [_record(outcomes, 0, 0.0, False)["outcomes"] for outcomes in results.outcomes]
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
