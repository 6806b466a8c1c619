"""What samples say, against distributions of which the answer is known. No clock, no kernels."""

from __future__ import annotations

import itertools
import random
import statistics

import pytest

from mfpsn_fx.kernels.autotune.statistics import (
    Summary,
    beats,
    choose,
    estimate,
    far_behind,
    noise_of,
    relative_noise,
    spread_of,
    summarize,
    undecided,
)

DRAWS = 4000


def delayed(count: int, scale: float = 0.5, seed: int = 0) -> list[list[float]]:
    """Runs of a true time of 1, all delayed, by times that are exponentially distributed with mean ``scale``."""
    draw = random.Random(seed)
    return [[1 + draw.expovariate(1 / scale) for _ in range(count)] for _ in range(DRAWS)]


class TestEstimates:
    def test_the_low_end_is_the_estimate(self):
        samples = [1.2, 1.0, 7.0]
        assert estimate(samples) == 1.0
        assert noise_of(samples) == pytest.approx(0.2)

    @pytest.mark.parametrize("count", [1, 5, 30])
    def test_the_lowest_of_n_exponential_delays_is_an_nth_of_their_mean(self, count):
        excess = statistics.mean(map(estimate, delayed(count))) - 1
        assert excess == pytest.approx(0.5 / count, rel=0.06)

    @pytest.mark.parametrize("count", [5, 15])
    def test_noise_of_exponential_delays(self, count):
        """The k-th lowest of n is expected at the sum of 1/n, 1/(n-1), … of k terms, times the mean."""
        middle = sum(1 / (count - k) for k in range((count + 1) // 2))
        found = statistics.mean(map(noise_of, delayed(count)))
        assert found == pytest.approx(0.5 * (middle - 1 / count), rel=0.03)

    def test_noise_of_uniform_delays(self):
        draw = random.Random(0)
        found = [noise_of([draw.uniform(1, 3) for _ in range(5)]) for _ in range(DRAWS)]
        assert statistics.mean(found) == pytest.approx(2 * (3 - 1) / 6, rel=0.03)  # order statistics of 5 in (0, 2)

    def test_a_stall_moves_neither_estimate_nor_noise(self):
        assert estimate([1.0, 1.1, 1.2, 400.0, 1.3]) == 1.0
        assert noise_of([1.0, 1.1, 1.2, 400.0, 1.3]) == pytest.approx(0.2)

    def test_relative_noise_is_that_of_the_middle_one(self):
        assert relative_noise([[1.0], [2.0, 3.0, 2.4], [1.0, 1.1, 9.0], [4.0, 4.0]]) == pytest.approx(0.1)
        assert relative_noise([[1.0]]) is None


class TestSpread:
    def test_it_falls_with_samples_and_not_below_two_percent(self):
        few, many = [1.0, 1.4, 1.5, 1.6, 1.9], [1.0, 1.4, 1.5, 1.6, 1.9] * 4
        assert spread_of(few) == pytest.approx(noise_of(few))
        assert spread_of(many) == pytest.approx(noise_of(many) / 4)
        assert spread_of([2.0] * 5) == pytest.approx(0.04)
        assert spread_of([3.0]) == 3.0  # what it hides is not known

    def test_the_true_time_lies_within_it(self):
        """Of runs that are all delayed: mostly, and more so of many, as the docstring says."""
        missed = [
            sum(estimate(samples) - spread_of(samples) > 1 for samples in delayed(count)) / DRAWS
            for count in (5, 10, 30)
        ]
        assert missed == sorted(missed, reverse=True)
        assert missed[0] == pytest.approx(0.16, abs=0.02)
        assert missed[-1] == pytest.approx(0.05, abs=0.02)

    def test_a_sum_of_parts(self):
        forward, backward = [1.0, 1.4, 1.5, 1.6, 1.9], [2.0, 2.0]
        found = summarize([forward, backward])
        assert found == (3.0, pytest.approx(0.5 + 0.04), 2)


class TestChoice:
    def test_only_the_spread_of_the_higher_rank_counts(self):
        assert beats(0.97, 1.0, 0.02)
        assert not beats(0.99, 1.0, 0.02)
        assert beats(0.99, 1.0, None)
        assert not beats(1.0, 1.0, 0.0)

    @pytest.mark.parametrize(
        ("times", "chosen"),
        [
            ([(1.0, 0.1), (0.95, 0.0)], 0),
            ([(1.0, 0.1), (0.85, 5.0)], 1),
            ([(9.0, 0.1), (1.0, 0.1), (0.95, 0.0)], 1),
            ([(9.0, 0.1), (2.0, 0.1), (1.0, None)], 2),
            ([(1.0, None), (1.0, None)], 0),
        ],
    )
    def test_in_doubt_the_first(self, times, chosen):
        assert choose(times) == chosen

    def test_far_behind_allows_for_what_other_processes_add(self):
        assert not far_behind(24.0, 1.0)
        assert far_behind(24.1, 1.0)
        assert not far_behind(4000.0, 1000.0)


class TestUndecided:
    def exact(self, *times: tuple[float, int]) -> list[Summary]:
        """Summaries of times without noise."""
        return [Summary(ms, 0.02 * ms, count) for ms, count in times]

    def test_nothing_is_decided(self):
        assert undecided([], 5) == []

    def test_all_need_the_fewest_samples(self):
        assert undecided(self.exact((1.0, 4), (1.5, 5), (1.5, 4)), 5) == [0, 2]

    @pytest.mark.parametrize(
        ("ms", "count", "open_"), [(2.1, 3, False), (2.1, 2, True), (1.9, 3, True), (99, 2, False)]
    )
    def test_a_lower_rank_leaves_early_if_it_is_far_behind(self, ms, count, open_):
        assert undecided(self.exact((1.0, 5), (ms, count)), 5) == [1] * open_

    def test_a_higher_rank_does_not_leave_early(self):
        assert undecided(self.exact((99.0, 3), (1.0, 5)), 5) == [0]

    def test_a_higher_rank_is_slower_only_after_twice_as_many(self):
        assert undecided(self.exact((1.5, 9), (1.0, 9)), 5) == [0, 1]
        assert undecided(self.exact((1.5, 10), (1.0, 10)), 5) == []
        assert undecided(self.exact((1.01, 5), (1.0, 5)), 5) == []  # less than 2 % is a tie

    def test_doubt_is_sampled_up_to_six_times_the_fewest(self):
        noisy = [Summary(1.5, 0.9, 29), Summary(1.0, 0.02, 30)]
        assert undecided(noisy, 5) == [0]
        assert undecided([noisy[0]._replace(count=30), noisy[1]], 5) == []

    def sampled(self, draws, repeats: int = 5) -> tuple[int, int]:
        """The choice, and the number of rounds, if each round takes a sample of each that needs one."""
        samples = [[next(one)] for one in draws]
        for count in itertools.count(1):
            wanted = undecided([summarize([one]) for one in samples], repeats)
            if not wanted:
                return choose([(estimate(one), spread_of(one)) for one in samples]), count
            for index in wanted:
                samples[index].append(next(draws[index]))
        raise AssertionError

    @pytest.mark.parametrize(("new", "least", "most"), [(0.5, 0.97, 1.0), (1.0, 0.0, 0.1), (1.2, 0.0, 0.01)])
    def test_a_noisy_race_ends_right(self, new, least, most):
        """The higher rank takes 1, its challenger ``new``; both are delayed by a fifth of that in the mean."""
        draw, runs = random.Random(1), 500

        def times(ms):
            while True:
                yield ms * (1 + draw.expovariate(5))

        found = [self.sampled([times(1.0), times(new)]) for _ in range(runs)]
        assert least <= sum(choice for choice, _ in found) / runs <= most
        assert max(rounds for _, rounds in found) <= 30
