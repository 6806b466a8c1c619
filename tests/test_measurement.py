"""How times come about: contests, clocks, budgets, what hangs or fails, several ranks, and what autoselect measures."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import pathlib
import random
import subprocess
import sys
import time

import pytest
import torch
from torch import nn

import mfpsn_fx
from mfpsn_fx import MulFreePSN
from mfpsn_fx.kernels import contests as engine
from mfpsn_fx.kernels.contests import Contest, Entrant, run_contests
from mfpsn_fx.kernels.selection_cache import SelectionCache
from mfpsn_fx.kernels.timing import ClockError, machine_noise, sample, spread_of
from mfpsn_fx.kernels.working_set import Pool, last_level_cache
from mfpsn_fx.model.record import Candidate, Measured
from mfpsn_fx.passes.autoselect import fastest

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

    def entrant(self, name: str, jitter: float = 0.0, **parts: float) -> Entrant:
        def prepare():
            return {p: self.work(f"{name}.{p}", ms, jitter, seed) for seed, (p, ms) in enumerate(parts.items())}

        return Entrant(name, name, prepare)


def compete(clock: Clock, *entrants: Entrant, default: str = "", **options):
    contest = Contest("it", entrants, default)
    return run_contests([contest], clock=clock, progress=False, **options).outcomes[0]


class TestContests:
    def test_times_are_those_of_the_work(self):
        clock = Clock()
        found = compete(
            clock, clock.entrant("a", forward=2.0, backward=3.0), clock.entrant("b", forward=3.0, backward=3)
        )
        assert found["a"].ms("forward") == pytest.approx(2.0, rel=1e-3)
        assert found["a"].ms("forward", "backward") == pytest.approx(5.0, rel=1e-3)
        assert found["b"].ms("forward", "backward") == pytest.approx(6.0, rel=1e-3)
        assert found["a"].ms("eval") is None

    def test_losers_leave_early_and_close_rivals_stay(self):
        clock = Clock()
        found = compete(
            clock,
            clock.entrant("best", 0.2, run=1.0),
            clock.entrant("rival", 0.2, run=1.05),
            clock.entrant("clear", run=1.6),
            clock.entrant("slow", run=9.0),
            clock.entrant("long", run=90.0),
        )
        counts = {name: len(outcome.samples["run"]) for name, outcome in found.items()}
        assert counts["long"] == 1
        assert counts["slow"] == 2
        assert counts["clear"] == 5
        assert 5 < counts["rival"] <= 30
        assert counts["best"] == counts["rival"]

    def test_a_clear_win_takes_the_fewest_samples(self):
        clock = Clock()
        found = compete(clock, clock.entrant("a", run=1.0), clock.entrant("b", run=1.5), repeats=7)
        assert {len(outcome.samples["run"]) for outcome in found.values()} == {7}

    def test_objectives_are_decided_apart(self):
        """What is decided in training goes on where it is open in evaluation, and only there."""
        clock = Clock()
        a = clock.entrant("a", 0.3, forward=1.0, eval=1.0)
        b = clock.entrant("b", 0.3, forward=1.9, eval=1.0)
        contest = Contest("it", (a, b), objectives=(("forward",), ("eval",)))
        found = run_contests([contest], clock=clock, progress=False).outcomes[0]
        assert len(found["b"].samples["eval"]) > len(found["b"].samples["forward"]) >= 5

    def test_entrants_take_turns(self):
        """Contests of one heat are interleaved sample by sample; those of another come after."""
        clock = Clock()
        names = [
            Contest(n, (clock.entrant(f"{n}1", run=1.0), clock.entrant(f"{n}2", run=1.5)), heat=n[0])
            for n in ("x", "xx", "y")
        ]
        run_contests(names, clock=clock, progress=False, repeats=5)
        order = [name.split(".")[0] for name in clock.log]
        assert max(i for i, n in enumerate(order) if n[0] == "x") < min(i for i, n in enumerate(order) if n[0] == "y")
        turns = order[8:28]  # two calls of each first, to warm up
        for start in range(0, 20, 4):
            assert sorted(turns[start : start + 4]) == ["x1", "x2", "xx1", "xx2"]

    def test_alike_contests_are_measured_once(self):
        clock, prepared = Clock(), []

        def entrant():
            return Entrant("a", {"shape": [1]}, lambda: prepared.append(1) or {"run": clock.work("a", 1.0)})

        results = run_contests([Contest(f"layer {i}", (entrant(),)) for i in range(3)], clock=clock, progress=False)
        assert prepared == [1]
        assert results.measured == 1
        assert results.outcomes[0] == results.outcomes[2]

    def test_short_work_is_called_often_enough_for_the_clock(self):
        clock = Clock()
        found = compete(clock, clock.entrant("a", run=0.01))
        assert len(clock.log) > 5 * 15
        assert found["a"].ms("run") == pytest.approx(0.01, rel=0.02)

    def test_on_the_real_clock(self):
        x = torch.randn(1 << 14)
        once = Entrant("once", 1, lambda: {"run": lambda: x.sin()})
        often = Entrant("often", 60, lambda: {"run": lambda: [x.sin() for _ in range(60)]})
        found = run_contests([Contest("it", (once, often), "often")], progress=False).outcomes[0]
        # on a machine under load the spread may be wider than the lead; the medians of work this different are not
        assert 0 < found["once"].ms("run") < found["often"].ms("run")
        assert found["once"].spread_ms("run") > 0

    def test_nothing_to_measure(self):
        assert run_contests([]).measured == 0


class TestBudget:
    def test_spent_at_once(self):
        clock = Clock()
        found = compete(clock, clock.entrant("new", run=1.0), clock.entrant("old", run=2.0), default="old", budget_s=0)
        assert len(found["old"].samples["run"]) == 1
        assert found["new"].error == "not measured: its share of the budget of 0 s was spent"

    def test_seconds(self):
        """Four heats of work that varies share what there is, by the clock on the wall."""
        draw = random.Random(0)
        work = lambda: time.sleep(draw.uniform(0.002, 0.006))  # noqa: E731
        contests = [
            Contest(f"{i}", tuple(Entrant(f"{i}{j}", [i, j], lambda: {"run": work}) for j in range(4)))
            for i in range(4)
        ]
        started = time.monotonic()
        results = run_contests(contests, budget_s=0.8, repeats=100, progress=False)
        assert time.monotonic() - started < 3  # of the six that 100 samples of all would take
        assert all(len(o.samples["run"]) > 2 for outcomes in results.outcomes for o in outcomes.values())

    def test_a_long_run_is_the_only_one(self):
        clock = Clock()
        found = compete(clock, clock.entrant("a", run=2500.0), clock.entrant("b", run=2400.0), budget_s=20)
        assert clock.log == ["a.run", "b.run"]
        assert found["a"].ms("run") == pytest.approx(2500)


class TestClocks:
    def test_backwards_now_and_then(self):
        clock = Clock()
        run = clock.work("a", 1.0)
        looks = iter([5_000_000, 1_000_000, 1_000_000, 1_000_000])
        assert sample(run, 1, CPU, lambda: next(looks, None) or clock()) == pytest.approx(1.0, rel=1e-2)
        assert len(clock.log) == 3

    def test_never_forwards(self):
        with pytest.raises(ClockError, match="did not go forwards"):
            sample(lambda: None, 1, CPU, lambda: 0)
        with pytest.raises(ClockError):
            compete(lambda: 0, Entrant("a", 1, lambda: {"run": lambda: None}))

    def test_noise(self):
        quiet, loud = Clock(), Clock()
        draw = random.Random(0)
        assert machine_noise(CPU, quiet) < 1e-6
        assert machine_noise(CPU, lambda: loud() + draw.randrange(100_000)) > 0.05

    def test_spread_shrinks_with_samples_and_not_below_the_noise(self):
        few, many = [1.0, 1.1, 0.9], [1.0, 1.1, 0.9] * 12
        assert spread_of(many) == pytest.approx(spread_of(few) / math.sqrt(12))
        assert spread_of([1.0, 1.0], noise=0.1) == pytest.approx(1.96 * 1.2533 * 0.1 / math.sqrt(2))

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
    def test_events(self):
        x = torch.ones(1 << 24, device="cuda")
        assert 1e-3 < sample(lambda: x.add(1), 5, x.device) < 10


class TestFaults:
    def broken(self, error):
        def prepare():
            raise error

        return Entrant("broken", "broken", prepare)

    @pytest.mark.parametrize(
        "error", [RuntimeError("odd size"), torch.OutOfMemoryError("too big"), MemoryError("too big")]
    )
    def test_what_raises_is_out_and_the_others_stay(self, error, tmp_path):
        clock, cache = Clock(), SelectionCache(tmp_path)
        for measured in (2, 0 if type(error) is RuntimeError else 2):  # memory may be there another time
            contest = Contest("it", (self.broken(error), clock.entrant("a", run=1.0)))
            results = run_contests([contest], clock=clock, cache=cache, progress=False)
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

        found = run_contests([Contest("it", (Entrant("a", 1, lambda: {"run": run}),))], progress=False).outcomes[0]
        assert found["a"].error == "ValueError: no more"

    def test_a_loop_in_python_is_broken_off_and_not_tried_again(self, tmp_path, caplog):
        clock, started = Clock(), []

        def hang():
            started.append(1)
            while True:
                with contextlib.suppress(Exception):  # a kernel that swallows errors
                    sum(range(100))

        contest = Contest("layer", (Entrant("hangs", "h", lambda: {"run": hang}), clock.entrant("a", run=1.0)))
        for reason in ("hangs: it did not return within 0.5 s", "within 0.5 s in an earlier run"):
            # kept with another entrant, too
            results = run_contests([contest], clock=clock, cache=SelectionCache(tmp_path), progress=False, hang_s=0.5)
            assert reason in results.outcomes[0]["hangs"].error
            assert results.outcomes[0]["a"].ms("run") == pytest.approx(1.0, rel=1e-2)
            contest = Contest("layer", (*contest.entrants, clock.entrant("b", run=1.0)))
        assert started == [1]
        assert "layer: hangs did not return within 0.5 s" in caplog.text

    def test_native_code_cannot_be_broken_off_but_is_recorded_while_it_runs(self, tmp_path):
        cache, seen = SelectionCache(tmp_path), []
        entrant = Entrant("native", "n", lambda: {"run": lambda: (time.sleep(1.0), seen.append(cache.hung("n", CPU)))})
        contest = Contest("layer", (entrant,))
        found = run_contests([contest], cache=cache, progress=False, hang_s=0.5).outcomes[0]
        assert found["native"].error == "hangs: it did not return within 0.5 s"
        assert cache.hung("n", CPU).startswith("hangs: it did not return within 0.5 s in an earlier run")

    def test_interrupts_pass(self):
        def prepare():
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run_contests([Contest("it", (Entrant("a", 1, prepare),))], progress=False)


class TestWorkingSet:
    def test_windows_pass_the_last_level_cache(self):
        state = torch.get_rng_state()
        pool = Pool("cpu")
        windows = pool.windows((64, 1024), (1024, 1), torch.float32)
        assert windows is pool.windows((64, 1024), (1024, 1), torch.float32)
        size = 64 * 1024 * 4
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
    def test_a_newcomer_must_win_by_more_than_the_spread(self, evaluation):
        close = self.measured(shifted_add=(10.0, 1.0), new=(9.0, 1.0))
        clear = self.measured(shifted_add=(10.0, 1.0), new=(8.0, 1.0))
        assert fastest(close, "time_first", evaluation=evaluation).kernel == "shifted-add"
        assert fastest(clear, "time_first", evaluation=evaluation).kernel == "new"
        assert fastest(self.measured(a=(10.0, 1.0), b=(9.9, 1.0)), "time_first").kernel == "b"

    def test_time_last_must_win_by_more_than_the_spread(self, net, example, distorted):
        pipeline = mfpsn_fx.planning_pipeline((example,), repeats=1, progress=False)
        for late, layout in ((0.98, "time_first"), (0.5, "time_last")):
            distorted(lambda problem, name, late=late: [late if problem.layout == "time_last" else 1.0] * 3, 1e-9, 0.05)
            model = mfpsn_fx.convert(net, example, repeats=1, progress=False)
            assert {row.layout for row in mfpsn_fx.selection(pipeline(model)).rows} == {layout}


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
        assert f"{table.measured} ways measured, medians; this machine's noise: {table.noise:.1%}" in str(table)
        for candidate in model.a.measured["a"].candidates:
            if candidate.error is None:
                samples = dict(candidate.samples)
                assert candidate.forward_ms == pytest.approx(
                    torch.tensor(samples["forward"]).double().quantile(0.5).item()
                )
                assert len(samples["eval"]) >= 2
                assert candidate.spread_ms > 0
        assert mfpsn_fx.Selection.from_json(table.to_json()) == table

    def test_bad_options(self, net, example):
        for budget in (-1, "3", True, float("nan")):
            with pytest.raises(ValueError, match="budget_s must be a number of seconds"):
                mfpsn_fx.convert(net, example, budget_s=budget)


RANKS = """
import sys, torch, mfpsn_fx
from mfpsn_fx.kernels import contests
from mfpsn_fx.model import MulFreePSN
rank = int(sys.argv[1])
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
if rank:
    def fail(*_):
        raise AssertionError("rank 1 measured")
    contests._run = fail
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
            contests._run = lambda *_: 1 / 0
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
    results = run_contests([Contest("it", (clock.entrant("a", run=1.0),))], clock=clock, progress=False)
    record = engine._record(results.outcomes[0], 5, 30.0, False)
    assert engine._outcomes(json.loads(json.dumps(record))["outcomes"]) == {
        "a": results.outcomes[0]["a"].__class__(
            {"run": tuple(float(f"{ms:.5g}") for ms in results.outcomes[0]["a"].samples["run"])},
            None,
            results.outcomes[0]["a"].noise,
        )
    }
