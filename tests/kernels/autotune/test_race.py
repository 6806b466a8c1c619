"""How times come about: races, clocks, budgets, what hangs or fails, several ranks, and what autoselect measures."""

from __future__ import annotations

import itertools
import json
import pathlib
import random
import signal
import subprocess
import sys
import time
import types

import pytest
import torch
from torch import nn

import mfpsn_fx
from mfpsn_fx import MulFreePSN
from mfpsn_fx.kernels.autotune import race as engine
from mfpsn_fx.kernels.autotune.buffers import Pool, last_level_cache
from mfpsn_fx.kernels.autotune.cache import SelectionCache
from mfpsn_fx.kernels.autotune.clock import ClockError, sample
from mfpsn_fx.kernels.autotune.race import Race, Variant, run_races
from mfpsn_fx.kernels.autotune.statistics import choose
from mfpsn_fx.model.results import Candidate, Measured, record_of
from mfpsn_fx.passes import Example, PassContext
from mfpsn_fx.passes.planning.measure_neurons import fastest

CPU = torch.device("cpu")


class Clock:
    """Nanoseconds that pass when work says so, and one microsecond at every look."""

    def __init__(self) -> None:
        self.now, self.log = 0, []

    def __call__(self) -> int:
        self.now += 1000
        return self.now

    def work(self, name: str, ms, jitter: float = 0.0, seed: int = 0):
        draw = random.Random(seed)

        def run():
            self.log.append(name)
            self.now += int(1e6 * ms * (1 + draw.uniform(-jitter, jitter)))

        return run

    def variant(self, name: str, jitter: float = 0.0, rank: int = 0, **parts: float) -> Variant:
        def prepare():
            return {p: self.work(f"{name}.{p}", ms, jitter, seed) for seed, (p, ms) in enumerate(parts.items())}

        return Variant(name, name, prepare, rank=rank)

    def scripted(self, name: str, times, rank: int = 0) -> Variant:
        """Calls that take what ``times`` says, one after the other, and the last for ever after."""
        given, last = iter(times), [0.0]

        def run():
            self.log.append(f"{name}.run")
            last[0] = next(given, last[0])
            self.now += int(1e6 * last[0])

        return Variant(name, name, lambda: {"run": run}, rank=rank)

    @property
    def seconds(self):
        """For the budget's time to be that of the work."""
        return lambda: self.now / 1e9


def compete(clock: Clock, *variants: Variant, default: str = "", **options):
    race = Race("it", variants, default)
    return run_races([race], clock=clock, progress=False, **options).outcomes[0]


def counts(found) -> dict[str, int]:
    return {name: len(outcome.samples["run"]) for name, outcome in found.items()}


def winner(found, *names: str) -> str:
    """Which of ``names``, the highest rank first, is chosen."""
    return names[choose([(found[name].ms("run"), found[name].spread_ms("run")) for name in names])]


class TestRaces:
    def test_times_are_those_of_the_work(self):
        clock = Clock()
        found = compete(
            clock, clock.variant("a", forward=2.0, backward=3.0), clock.variant("b", forward=3.0, backward=3)
        )
        assert found["a"].ms("forward") == pytest.approx(2.0, rel=1e-3)
        assert found["a"].ms("forward", "backward") == pytest.approx(5.0, rel=1e-3)
        assert found["b"].ms("forward", "backward") == pytest.approx(6.0, rel=1e-3)
        assert found["a"].ms("eval") is None

    def test_those_far_behind_leave_early(self):
        clock = Clock()
        found = compete(
            clock,
            clock.variant("best", 0.2, run=1.0),
            clock.variant("close", 0.2, run=1.5),
            clock.variant("slow", run=23.0),  # as long as other processes may make a short one
            clock.variant("far", run=25.0),
        )
        assert counts(found) == {"best": 5, "close": 5, "slow": 3, "far": 2}

    def test_parts_that_can_decide_nothing_are_not_run(self):
        """Its forward alone takes longer than training with the best: its backward is not looked at."""
        clock = Clock()
        best = clock.variant("best", rank=2, forward=1.0, backward=2.0, eval=3.0)
        slow = clock.variant("slow", rank=1, forward=33.0, backward=99.0, eval=2.0)
        base = clock.variant("base", rank=-1, forward=33.0, backward=99.0, eval=99.0)
        race = Race("it", (best, slow, base), objectives=(("forward", "backward"), ("eval",)))
        found = run_races([race], clock=clock, progress=False).outcomes[0]
        assert "slow.backward" not in clock.log
        assert list(found["slow"].samples) == ["eval"]
        assert list(found["base"].samples) == ["forward", "backward", "eval"]

    def test_a_clear_win_takes_the_fewest_samples(self):
        clock = Clock()
        found = compete(clock, clock.variant("a", run=1.0), clock.variant("b", run=1.5), repeats=7)
        assert {len(outcome.samples["run"]) for outcome in found.values()} == {7}

    def test_objectives_are_decided_apart(self):
        """What is decided in training goes on where it is open in evaluation, and only there."""
        clock = Clock()
        a = clock.variant("a", rank=1, forward=1.0, eval=1.2)
        b = clock.variant("b", forward=1.9, eval=1.0)
        race = Race("it", (a, b), objectives=(("forward",), ("eval",)))
        found = run_races([race], clock=clock, progress=False).outcomes[0]
        assert [len(found["b"].samples[part]) for part in ("forward", "eval")] == [5, 10]

    def test_variants_take_turns(self):
        """Races of one group are interleaved sample by sample; those of another come after."""
        clock = Clock()
        names = [
            Race(n, (clock.variant(f"{n}1", run=1.0), clock.variant(f"{n}2", run=1.5)), group=n[0])
            for n in ("x", "xx", "y")
        ]
        run_races(names, clock=clock, progress=False, repeats=5)
        order = [name.split(".")[0] for name in clock.log]
        assert max(i for i, n in enumerate(order) if n[0] == "x") < min(i for i, n in enumerate(order) if n[0] == "y")
        turns = order[8:24]  # first a call of each to warm up, and a sample
        for start in range(0, 16, 4):
            assert sorted(turns[start : start + 4]) == ["x1", "x2", "xx1", "xx2"]

    def test_alike_races_are_measured_once(self):
        clock, prepared = Clock(), []

        def variant():
            return Variant("a", {"shape": [1]}, lambda: prepared.append(1) or {"run": clock.work("a", 1.0)})

        results = run_races([Race(f"layer {i}", (variant(),)) for i in range(3)], clock=clock, progress=False)
        assert prepared == [1]
        assert results.measured == 1
        assert results.outcomes[0] == results.outcomes[2]

    def test_short_work_is_called_often_enough_for_the_clock(self):
        clock = Clock()
        found = compete(clock, clock.variant("a", run=0.01))
        assert len(clock.log) > 5 * 15
        assert found["a"].ms("run") == pytest.approx(0.01, rel=0.02)

    def test_on_the_real_clock(self):
        x = torch.randn(1 << 14)
        once = Variant("once", 1, lambda: {"run": lambda: x.sin()})
        often = Variant("often", 60, lambda: {"run": lambda: [x.sin() for _ in range(60)]})
        found = run_races([Race("it", (once, often), "often")], progress=False).outcomes[0]
        assert 0 < found["once"].ms("run") < found["often"].ms("run")
        assert found["once"].spread_ms("run") > 0

    def test_nothing_to_measure(self):
        assert run_races([]).measured == 0


class TestRank:
    """In doubt the highest rank wins; what is doubtful is sampled more often."""

    def test_the_highest_is_measured_first(self):
        clock = Clock()
        names = {"low": 1, "base": -1, "high": 7, "middle": 3}
        compete(clock, *(clock.variant(name, rank=rank, run=1.0 + rank / 9) for name, rank in names.items()))
        first = list(dict.fromkeys(name.split(".")[0] for name in clock.log))
        assert first == ["high", "middle", "low", "base"]
        # the baseline comes when the others are decided
        rounds = [name for name in clock.log if name != "base.run"]
        assert clock.log[: len(rounds)] == rounds

    def test_a_default_precedes_all_ranks(self):
        clock = Clock()
        compete(clock, clock.variant("high", rank=7, run=1.0), clock.variant("low", rank=1, run=1.0), default="low")
        assert clock.log[0] == "low.run"

    @pytest.mark.parametrize(("new", "chosen"), [(0.99, "old"), (0.97, "new")])
    def test_what_is_within_two_percent_changes_nothing(self, new, chosen):
        clock = Clock()
        found = compete(clock, clock.variant("old", rank=1, run=1.0), clock.variant("new", run=new))
        assert winner(found, "old", "new") == chosen
        assert set(counts(found).values()) == {5 if chosen == "old" else 10}

    @pytest.mark.parametrize("names", ["ab", "ba"])
    def test_of_equal_ranks_the_first_wins(self, names):
        clock = Clock()
        race = Race("it", tuple(clock.variant(name, rank=3, run=1.0) for name in names))
        assert [variant.name for variant in race.precedence] == list(names)

    def test_a_stall_of_the_higher_rank_costs_nothing(self):
        """The flaw as it was: 1.0 and 40 have the median 20.5, with which it left; so wide a spread kept it, too."""
        clock = Clock()
        found = compete(clock, clock.scripted("old", [1, 1, 40.0, 1], 1), clock.variant("new", run=0.25))
        assert found["old"].samples["run"].count(pytest.approx(40, rel=1e-3)) == 1
        assert found["old"].ms("run") == pytest.approx(1.0, rel=1e-2)
        assert winner(found, "old", "new") == "new"

    def test_a_stall_of_the_challenger_costs_nothing(self):
        clock = Clock()
        found = compete(clock, clock.variant("old", rank=1, run=1.0), clock.scripted("new", [0.25, 30.0, 0.25]))
        assert winner(found, "old", "new") == "new"

    def test_noise_of_its_own_does_not_keep_the_higher_rank(self):
        """Three runs of four are delayed: more samples are taken until the delays hide no longer what is beneath."""
        clock = Clock()
        noisy = itertools.cycle([1.0, 3.5, 2.5, 4.0])
        found = compete(clock, clock.scripted("old", noisy, 1), clock.variant("new", run=0.6))
        assert counts(found)["old"] > 5
        assert winner(found, "old", "new") == "new"

    def test_noise_of_its_own_does_not_drop_the_higher_rank(self):
        """Delayed in its first five samples, it may still be the fastest: it is sampled until that shows."""
        clock = Clock()
        times = [4.0, 3.0, 6.0, 2.5, 7.0, 9.0, *[0.5] * 99]
        found = compete(clock, clock.scripted("old", times, 1), clock.variant("new", run=1.0))
        assert counts(found)["old"] > 5
        assert winner(found, "old", "new") == "old"

    def test_a_lower_rank_delayed_in_its_first_samples_is_sampled_on(self):
        clock = Clock()
        times = [4.0, 3.0, 6.0, *[0.5] * 99]
        found = compete(clock, clock.variant("old", rank=1, run=1.0), clock.scripted("new", times))
        assert winner(found, "old", "new") == "new"

    @pytest.mark.parametrize("script", [[60.0, 0.25], [60.0, 60.0, 0.25], [0.25, 60.0, 0.25]])
    def test_long_first_calls_are_not_believed(self, script):
        clock = Clock()
        found = compete(clock, clock.variant("old", rank=1, run=1.0), clock.scripted("new", script))
        assert found["new"].ms("run") == pytest.approx(0.25, rel=1e-2)
        assert counts(found)["new"] >= 5
        assert winner(found, "old", "new") == "new"

    def test_long_runs_are_compared_by_several_samples(self):
        clock = Clock()
        found = compete(
            clock, clock.scripted("old", [80.0, 120.0, 80.0], 1), clock.scripted("new", [60.0, 110.0, 60.0])
        )
        assert counts(found) == {"old": 10, "new": 10}
        assert winner(found, "old", "new") == "new"
        found = compete(clock, clock.scripted("old", [60.0, 90.0, 60.0], 1), clock.scripted("new", [80.0]))
        assert counts(found) == {"old": 5, "new": 5}
        assert winner(found, "old", "new") == "old"

    def test_the_highest_rank_fails_or_cannot_run(self):
        clock = Clock()

        def broken():
            raise RuntimeError("odd size")

        variants = (Variant("high", "high", broken, rank=9), clock.variant("middle", rank=5, run=1.0))
        found = compete(clock, *variants, clock.variant("low", run=1.0), budget_s=0)
        assert found["high"].error == "RuntimeError: odd size"
        assert counts({"middle": found["middle"]}) == {"middle": 1}  # in its place, though there is no time
        assert found["low"].error.startswith("not measured")

    def test_a_baseline_alone_is_measured(self):
        clock = Clock()
        assert counts(compete(clock, clock.variant("base", rank=-1, run=1.0), budget_s=0)) == {"base": 1}


class TestBudget:
    @pytest.fixture
    def clock(self, monkeypatch):
        """The budget's seconds are those of the work."""
        clock = Clock()
        monkeypatch.setattr(engine, "time", types.SimpleNamespace(monotonic=clock.seconds))
        return clock

    def test_spent_at_once(self):
        clock = Clock()
        found = compete(clock, clock.variant("new", run=1.0), clock.variant("old", run=2.0), default="old", budget_s=0)
        assert len(found["old"].samples["run"]) == 1
        assert found["new"].error == "not measured: its share of the budget of 0 s was used up"

    def test_seconds(self, clock):
        """Four groups of work that varies share what there is, and overrun it by a run or two each at the most."""
        races = [Race(f"{i}", tuple(clock.variant(f"{i}{j}", jitter=0.5, run=4.0) for j in range(4))) for i in range(4)]
        results = run_races(races, budget_s=0.8, repeats=100, progress=False, clock=clock)
        assert 0.5 < clock.seconds() < 0.8 + 4 * 2 * 0.006  # of the six that 100 samples of all would take
        assert all(len(o.samples["run"]) > 2 for outcomes in results.outcomes for o in outcomes.values())

    def test_a_run_of_a_tenth_of_the_budget_is_the_only_one_after_the_warm_up(self, clock):
        found = compete(clock, clock.variant("a", run=2500.0), clock.variant("b", run=2400.0), budget_s=20)
        assert clock.log == ["a.run", "a.run", "b.run", "b.run"]
        assert found["a"].ms("run") == pytest.approx(2500)

    def test_a_long_first_call_alone_is_not_a_long_run(self, clock):
        found = compete(clock, clock.scripted("a", [2500.0, 1.0]), clock.variant("b", run=2.0), budget_s=20)
        assert counts(found) == {"a": 5, "b": 5}

    def test_shared_data_is_made_before_the_time_runs(self, clock):
        def setup():
            clock.now += 50 * 10**9

        variants = clock.variant("a", run=1.0), clock.variant("b", run=2.0)
        results = run_races([Race("it", variants, setup=setup)], budget_s=1, clock=clock, progress=False)
        assert counts(results.outcomes[0]) == {"a": 5, "b": 5}

    def test_data_that_cannot_be_made_is_the_variants_fault(self, clock):
        def setup():
            raise MemoryError("too big")

        found = run_races([Race("it", (clock.variant("a", run=1.0),), setup=setup)], clock=clock, progress=False)
        assert found.outcomes[0]["a"].error is None

    def test_a_short_one_reaches_the_highest_ranks_of_all_layouts(self, clock):
        races = [
            Race(
                name,
                (clock.variant(f"{name} low", rank=1, run=400.0), clock.variant(f"{name} high", rank=2, run=20.0)),
                group="one",
            )
            for name in ("first", "last")
        ]
        results = run_races(races, budget_s=0.1, clock=clock, progress=False)
        for name, found in zip(("first", "last"), results.outcomes, strict=True):
            assert found[f"{name} high"].ms("run") == pytest.approx(20, rel=1e-2)
        assert results.outcomes[1]["last low"].error.startswith("not measured")

    def test_a_baseline_takes_no_more_than_half_of_the_budget(self, clock):
        """The others take 120 ms: half of 0.2 s leaves nothing, half of 0.4 s a little, half of 2 s enough."""
        for budget_s, samples, seconds in ((0.2, 0, 0.12), (0.4, 2, 0.21), (2.0, 5, 0.3)):
            clock.log.clear()
            started = clock.seconds()
            a, base = clock.variant("a", rank=1, run=20.0), clock.variant("base", rank=-1, run=30.0)
            found = compete(clock, a, base, budget_s=budget_s)
            assert counts({"a": found["a"]}) == {"a": 5}
            assert clock.seconds() - started == pytest.approx(seconds, abs=0.001)
            if samples:
                assert counts(found)["base"] == samples
            else:
                assert "base.run" not in clock.log
                assert found["base"].error.startswith("not measured")

    def test_a_baseline_too_slow_for_what_is_left_is_not_run_whole(self, clock):
        variants = clock.variant("a", rank=1, run=20.0), clock.variant("base", rank=-1, forward=300.0, backward=300.0)
        found = compete(clock, *variants, budget_s=0.4)
        assert found["base"].error.startswith("not measured")
        assert clock.log.count("base.forward") == 2
        assert "base.backward" not in clock.log


class TestKeptSamples:
    """What is kept says how many samples it rests on; what is too little is added to."""

    @pytest.fixture
    def clock(self, monkeypatch):
        clock = Clock()
        monkeypatch.setattr(engine, "time", types.SimpleNamespace(monotonic=clock.seconds))
        return clock

    def run(self, clock, tmp_path, *variants, **options):
        race = Race("it", variants)
        results = run_races([race], clock=clock, cache=SelectionCache(tmp_path), progress=False, **options)
        record = json.loads(next(tmp_path.glob("times-*")).read_text())["record"]
        return results, any(kept["thin"] for kept in record.values())

    def test_to_the_bit(self, clock, tmp_path):
        variants = clock.variant("a", 0.3, run=1.0), clock.variant("b", 0.3, run=1 / 3)
        first, thin = self.run(clock, tmp_path, *variants)
        clock.log.clear()
        second, _ = self.run(clock, tmp_path, *variants)
        assert clock.log == []
        assert first.outcomes == second.outcomes
        assert (first.noise, first.measured, first.kept) == (second.noise, second.kept, second.measured)
        assert not thin

    def test_one_cut_short_is_measured_again(self, clock, tmp_path):
        """The flaw as it was: one stalled sample of the faster was kept as if it had been measured five times."""
        fast = clock.scripted("fast", [0.25, 30.0, 0.25])
        first, thin = self.run(clock, tmp_path, clock.variant("high", rank=1, run=1.0), fast, budget_s=0.03)
        assert thin
        assert winner(first.outcomes[0], "high", "fast") == "high"
        again, thin = self.run(clock, tmp_path, clock.variant("high", rank=1, run=1.0), fast, budget_s=0.03)
        assert not thin
        assert winner(again.outcomes[0], "high", "fast") == "fast"
        samples = again.outcomes[0]["fast"].samples["run"]
        assert samples[0] == first.outcomes[0]["fast"].samples["run"][0]  # added to, not thrown away
        clock.log.clear()
        last, _ = self.run(clock, tmp_path, clock.variant("high", rank=1, run=1.0), fast, budget_s=300)
        assert clock.log == []
        assert last.outcomes == again.outcomes

    def test_in_doubt_for_want_of_time_the_higher_rank_wins(self, clock, tmp_path):
        """Disturbed in all of its samples when the time is out, and found to be the faster when there is more."""
        high = clock.scripted("high", [30.0] * 8 + [0.5], 1)
        variants = high, clock.variant("low", run=1.0)
        first, _ = self.run(clock, tmp_path, *variants, budget_s=0.2)
        assert min(counts(first.outcomes[0]).values()) >= 5
        assert winner(first.outcomes[0], "high", "low") == "high"
        again, _ = self.run(clock, tmp_path, *variants, budget_s=0.2)
        assert again.outcomes[0]["high"].ms("run") < again.outcomes[0]["low"].ms("run")

    def test_without_time_it_is_used_as_it_is(self, clock, tmp_path):
        variants = clock.variant("high", rank=1, run=1.0), clock.variant("low", run=0.5)
        first, _ = self.run(clock, tmp_path, *variants, budget_s=0)
        clock.log.clear()
        again, _ = self.run(clock, tmp_path, *variants, budget_s=0)
        assert clock.log == []
        assert again.outcomes == first.outcomes
        assert (again.measured, again.kept) == (0, 1)

    def test_those_not_reached_are_measured_and_no_others(self, clock, tmp_path):
        variants = clock.variant("high", rank=1, run=1.0), clock.variant("base", rank=-1, run=30.0)
        self.run(clock, tmp_path, *variants, budget_s=0.004)
        clock.log.clear()
        self.run(clock, tmp_path, *variants, budget_s=1.0)
        assert clock.log.count("high.run") == 1 + 2  # a warm-up, and what was missing of five
        clock.log.clear()
        variants = *variants, clock.variant("other", run=3.0)
        self.run(clock, tmp_path / "other", *variants, budget_s=0.05)
        assert set(clock.log) == {"high.run", "other.run", "base.run"}

    def test_more_repeats_add_to_what_is_there(self, clock, tmp_path):
        variants = clock.variant("a", run=1.0), clock.variant("b", run=2.0)
        self.run(clock, tmp_path, *variants, repeats=3)
        clock.log.clear()
        results, _ = self.run(clock, tmp_path, *variants, repeats=5)
        assert len(clock.log) == 2 * 3  # a warm-up and two samples
        assert counts(results.outcomes[0]) == {"a": 5, "b": 5}

    def test_one_far_behind_is_not_started_again(self, clock, tmp_path):
        variants = clock.variant("a", run=1.0), clock.variant("far", run=100.0)
        self.run(clock, tmp_path, *variants, repeats=3)
        clock.log.clear()
        results, _ = self.run(clock, tmp_path, *variants, repeats=5)
        assert "far.run" not in clock.log
        assert (results.measured, results.kept) == (1, 1)


class TestClocks:
    def test_backwards_now_and_then(self):
        clock = Clock()
        run = clock.work("a", 1.0)
        looks = iter([5_000_000, 1_000_000, 1_000_000, 1_000_000])
        assert sample(run, 1, CPU, lambda: next(looks, None) or clock()) == pytest.approx(1.0, rel=1e-2)
        assert len(clock.log) == 3

    def test_never_forwards(self):
        with pytest.raises(ClockError, match="did not advance"):
            sample(lambda: None, 1, CPU, lambda: 0)
        with pytest.raises(ClockError):
            compete(lambda: 0, Variant("a", 1, lambda: {"run": lambda: None}))

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
    def test_events(self):
        x = torch.ones(1 << 24, device="cuda")
        assert 1e-3 < sample(lambda: x.add(1), 5, x.device) < 10


class TestFaults:
    def broken(self, error):
        def prepare():
            raise error

        return Variant("broken", "broken", prepare)

    @pytest.mark.parametrize(
        "error", [RuntimeError("odd size"), torch.OutOfMemoryError("too big"), MemoryError("too big")]
    )
    def test_what_raises_is_out_and_the_others_stay(self, error, tmp_path):
        clock, cache = Clock(), SelectionCache(tmp_path)
        for measured in (2, 0 if type(error) is RuntimeError else 2):  # memory may be there another time
            race = Race("it", (self.broken(error), clock.variant("a", run=1.0)))
            results = run_races([race], clock=clock, cache=cache, progress=False)
            assert results.measured == measured
            found = results.outcomes[0]
            assert found["broken"].error == f"{type(error).__name__}: {error}"
            assert found["a"].ms("run") == pytest.approx(1.0, rel=1e-2)

    def test_raising_later(self):
        calls = []

        def run():
            calls.append(1)
            time.sleep(0.001)
            if len(calls) > 3:
                raise ValueError("no more")

        found = run_races([Race("it", (Variant("a", 1, lambda: {"run": run}),))], progress=False).outcomes[0]
        assert found["a"].error == "ValueError: no more"

    def test_one_during_whose_first_run_the_process_was_killed_is_named_and_not_run_again(self, tmp_path, caplog):
        """Two minutes pass by the date of the mark that the killed process left."""
        done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
        assert done.returncode == -signal.SIGKILL
        (mark,) = tmp_path.glob("started-*")
        data = json.loads(mark.read_text())
        assert data["key"]["what"] == "hangs"  # the one before it returned, and the one after it was not begun
        mark.write_text(json.dumps({**data, "started": data["started"] - 300}))
        clock = Clock()
        variants = clock.variant("first", rank=2, run=1.0), clock.variant("hangs", rank=1, run=1.0)
        for others in ((), (clock.variant("last", run=1.0),)):  # in other company, too
            race = Race("layer", (*variants, *others))
            found = run_races([race], clock=clock, cache=SelectionCache(tmp_path), progress=False).outcomes[0]
            assert found["hangs"].error.startswith("its first run, on 20")
            assert found["first"].ms("run") == pytest.approx(1.0, rel=1e-2)
        assert "hangs.run" not in clock.log
        assert "layer: hangs is not measured: its first run, on 20" in caplog.text

    def test_only_first_runs_are_marked(self, tmp_path):
        cache, clock, marks = SelectionCache(tmp_path), Clock(), []

        def prepare():
            return {"run": lambda: (clock.work("a", 1.0)(), marks.append(len(list(tmp_path.glob("started-*")))))}

        for repeats in (3, 5):  # the second time with what is known from the first
            run_races([Race("it", (Variant("a", "a", prepare),))], clock=clock, cache=cache, repeats=repeats)
        assert marks == [1, 1, 0, 0, 0, 0, 0]

    def test_interrupts_pass(self):
        def prepare():
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run_races([Race("it", (Variant("a", 1, prepare),))], progress=False)


class TestWorkingSet:
    def test_windows_pass_the_last_level_cache(self):
        state = torch.get_rng_state()
        pool = Pool("cpu")
        windows = pool.windows((256, 1024), (1024, 1), torch.float32)
        assert windows is pool.windows((256, 1024), (1024, 1), torch.float32)
        size = 256 * 1024 * 4
        first = next(windows)
        starts = [first.data_ptr()]
        while (window := next(windows)).data_ptr() != first.data_ptr():
            starts.append(window.data_ptr())
        assert len(starts) * size >= min(2 * last_level_cache(CPU), 256 << 20) - size
        assert min(b - a for a, b in itertools.pairwise(starts)) >= size
        assert first.std() == pytest.approx(1, rel=0.05)
        assert torch.equal(torch.get_rng_state(), state)

    def test_strides_and_dtypes(self):
        pool = Pool("cpu")
        for stride, dtype in (((1, 3), torch.bfloat16), ((0, 1), torch.float32), ((8, 2), torch.float64)):
            window = next(pool.windows((3, 4), stride, dtype))
            assert (window.shape, window.stride(), window.dtype) == ((3, 4), stride, dtype)

    def test_larger_than_the_pool(self):
        pool = Pool("cpu")
        pool._buffer = lambda dtype, need: torch.zeros(need, dtype=dtype)
        assert next(pool.windows((5, 7), (7, 1), torch.float32)).shape == (5, 7)

    def test_size_of_the_cache_is_found_or_guessed(self, monkeypatch):
        assert last_level_cache(CPU) >= 1 << 18
        monkeypatch.setattr(pathlib.Path, "glob", lambda self, pattern: iter(()))
        assert last_level_cache.__wrapped__(CPU) == 32 << 20


class TestChoice:
    def measured(self, **times):
        return Measured((2, 3, 4), "float32", "cpu", tuple(
            Candidate("time_first", name.replace("_", "-"), ms / 2, ms / 2, ms, None, spread, spread)
            for name, (ms, spread) in times.items()
        ))  # fmt: skip

    @pytest.mark.parametrize("evaluation", [False, True])
    def test_in_doubt_the_higher_rank_is_chosen(self, evaluation):
        """``fused-cpp`` ranks above ``shifted-add``, and both above a kernel that nobody has ranked."""
        for times, wanted in (
            ({"shifted_add": (10.0, 1.0), "new": (9.0, 1.0)}, "shifted-add"),
            ({"shifted_add": (10.0, 1.0), "new": (8.9, 1.0)}, "new"),
            ({"shifted_add": (10.0, 1.0), "new": (8.9, 50.0)}, "new"),  # at the most so long, however noisy
            ({"fused_cpp": (10.0, 2.0), "shifted_add": (9.0, 0.1), "new": (8.9, 0.1)}, "fused-cpp"),
            ({"fused_cpp": (20.0, 2.0), "shifted_add": (9.0, 0.2), "new": (8.9, 0.1)}, "shifted-add"),
            ({"a": (10.0, 1.0), "b": (9.9, 1.0)}, "a"),
            ({"b": (9.9, 1.0), "a": (10.0, 1.0)}, "b"),
        ):
            assert fastest(self.measured(**times), "time_first", evaluation=evaluation).kernel == wanted

    def test_time_last_must_win_by_more_than_the_spread(self, net, example, distorted):
        pipeline = mfpsn_fx.planning_pipeline(repeats=1, progress=False)
        for late, layout in ((0.99, "time_first"), (0.5, "time_last")):
            distorted(lambda problem, name, late=late: [late if problem.layout == "time_last" else 1.0] * 3, 1e-9)
            model = mfpsn_fx.convert(net, example, repeats=1, progress=False)
            table = mfpsn_fx.selection(pipeline(model, PassContext(Example((example,)))))
            assert {row.layout for row in table.rows} == {layout}


class Doubled(nn.Module):
    """Neurons whose inputs are transposed, and contiguous; the second use of a module in autocast of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = MulFreePSN(3), MulFreePSN(3, dilation=2)

    def forward(self, x):
        y = self.a(x.transpose(0, 1))
        return y, self.b(y.contiguous() + 1)


class TestWhatIsMeasured:
    x = torch.randn(5, 4, 3, 2)

    def asked(self, distorted, run):
        asked = distorted(lambda problem, name: [1.0] * 3)
        run()
        return {(p.order, p.dilation, p.layout): p for p, _ in asked}

    def test_strides(self, distorted):
        asked = self.asked(distorted, lambda: mfpsn_fx.convert(Doubled(), self.x, repeats=1, progress=False))
        assert asked[2, 1, "time_first"].strides == [6, 24, 2, 1]
        assert asked[2, 1, "time_first"].shape == (4, 5, 3, 2)
        assert asked[2, 2, "time_first"].strides == [30, 6, 2, 1]
        assert asked[2, 1, "time_last"].strides == [24, 8, 4, 1]  # contiguous, as a conversion leaves it

    def test_planning_again_from_time_last(self, distorted):
        model = mfpsn_fx.convert(Doubled(), self.x, layout="time_last", repeats=1, progress=False)
        asked = self.asked(distorted, lambda: mfpsn_fx.plan(model, self.x, repeats=1, progress=False))
        assert asked[2, 1, "time_first"].strides == [6, 24, 2, 1]
        assert asked[2, 2, "time_first"].strides == [30, 6, 2, 1]

    def test_autocast(self, distorted):
        def run():
            with torch.autocast("cpu", dtype=torch.bfloat16):
                mfpsn_fx.convert(Doubled(), self.x, repeats=1, progress=False)

        assert {p.dtype for p in self.asked(distorted, run).values()} == {"bfloat16"}
        model = mfpsn_fx.convert(Doubled().double(), self.x.double(), repeats=1, progress=False)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            asked = self.asked(distorted, lambda: mfpsn_fx.plan(model, self.x.double(), repeats=1, progress=False))
        assert {p.dtype for p in asked.values()} == {"float64"}

    def test_in_dynamos_graphs(self, distorted, monkeypatch):
        monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", lambda gm, inputs, **_: gm)

        class Inner(Doubled):
            def forward(self, x):
                with torch.autocast("cpu", dtype=torch.float16):
                    y = self.a(x.transpose(0, 1))
                return y.float(), self.b(x)

        compiled = torch.compile(Inner(), backend="mfpsn_fx")
        asked = self.asked(distorted, lambda: compiled(self.x))
        assert asked[2, 1, "time_first"].dtype == "float16"
        assert asked[2, 1, "time_first"].strides == [6, 24, 2, 1]
        assert asked[2, 2, "time_first"].dtype == "float32"

    def test_times_and_noise_are_shown(self, one_thread):
        model = mfpsn_fx.convert(Doubled(), self.x, repeats=2, progress=False)
        table = mfpsn_fx.selection(model)
        assert table.noise > 0
        assert f"{table.measured} cases measured, lowest of their samples; noise: {table.noise:.1%}" in str(table)
        for candidate in record_of(model).measured["a"].candidates:
            if candidate.error is None:
                samples = dict(candidate.samples)
                assert candidate.forward_ms == min(samples["forward"])
                assert len(samples["eval"]) >= 2
                assert candidate.spread_ms > 0
        assert mfpsn_fx.Selection.from_json(table.to_json()) == table

    def test_bad_options(self, net, example):
        for budget in (-1, "3", True, float("nan")):
            with pytest.raises(ValueError, match="budget_s must be a number of seconds"):
                mfpsn_fx.convert(net, example, budget_s=budget)


KILLED = """
import os, signal, sys, torch
from mfpsn_fx.kernels.autotune.race import Race, Variant, run_races
from mfpsn_fx.kernels.autotune.cache import SelectionCache
kill = lambda: os.kill(os.getpid(), signal.SIGKILL)
runs = {"first": lambda: torch.ones(99).sum(), "hangs": kill, "last": kill}
variants = tuple(Variant(name, name, lambda run=run: {"run": run}) for name, run in runs.items())
run_races([Race("layer", variants)], cache=SelectionCache(sys.argv[1]), progress=False)
"""


RANKS = """
import sys, torch, mfpsn_fx
from mfpsn_fx.kernels.autotune import race
from mfpsn_fx.model import MulFreePSN
rank = int(sys.argv[1])
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
if rank:
    def fail(*_):
        raise AssertionError("rank 1 measured")
    race._run = fail
torch.manual_seed(rank)
def model(channels=3):
    return torch.nn.Sequential(MulFreePSN(channels), torch.nn.ReLU(), MulFreePSN(channels, dilation=2))
# the last batch of a rank may be smaller: the selection is rank 0's all the same
table = mfpsn_fx.selection(mfpsn_fx.convert(model(), torch.randn(6, 5 - rank, 3, 4), repeats=2, progress=False))
print([(r.layer, r.layout, r.kernel, r.eval_kernel, r.forward_ms, r.backward_ms, r.eval_ms) for r in table.rows])
for layers in (model() if rank == 0 else model()[:1], "fail"):
    if layers == "fail":
        layers = model()
        if rank == 0:
            race._run = lambda *_: 1 / 0
    try:
        mfpsn_fx.convert(layers, torch.randn(6, 5, 3, 4), repeats=1, progress=False)
        print("converted")
    except Exception as error:
        print(f"{type(error).__name__}: {error}")
torch.distributed.barrier()  # a rank that is gone first has now and then taken the other's threads down with it
torch.distributed.destroy_process_group()
"""


def test_rank_0_measures_for_all(tmp_path):
    command = [sys.executable, "-c", RANKS]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "store")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for rank in (0, 1)
    ]
    first, second = (rank.communicate(timeout=120) for rank in ranks)
    assert [rank.returncode for rank in ranks] == [0, 0], first[1] + second[1]
    first, second = first[0].splitlines(), second[0].splitlines()
    assert first[0] == second[0]
    assert "'0', 'time" in first[0]
    assert first[1] == second[1]
    assert "RuntimeError: rank 0 measures for all ranks, but rank 1 has other layers or kernels: 2, time" in second[1]
    assert first[2].startswith("ZeroDivisionError")
    assert second[2] == "RuntimeError: rank 0 could not measure: ZeroDivisionError: division by zero"


def test_what_a_rank_sends_is_json():
    clock = Clock()
    results = run_races([Race("it", (clock.variant("a", run=1.0),))], clock=clock, progress=False)
    record = engine._to_record(results.outcomes[0])
    assert engine._parse_outcomes(json.loads(json.dumps(record))) == results.outcomes[0]
