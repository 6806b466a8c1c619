"""Statistics of timing samples: an estimate, its uncertainty, and whether a choice needs more samples.

Pure functions of numbers: nothing here runs a kernel or reads a clock. Samples are milliseconds.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import NamedTuple

__all__ = [
    "Summary", "beats", "choose", "estimate", "far_behind", "noise_of", "relative_noise", "spread_of", "summarize",
    "undecided",
]  # fmt: skip

_SPREAD_SAMPLES = 5  # with this many samples, the least by default, the spread equals the noise
_MIN_SPREAD = 0.02  # of the estimate: lowest samples of several runs on a quiet machine differ by about that much
# A variant of lower rank is dropped after three samples if it takes over twice the best time, and after two if the
# difference exceeds what other processes explain: on two cores shared with two busy processes, short calls took 4 to
# 120 ms longer, sample after sample
_DROP_RATIO, _FAR_RATIO, _FAR_MARGIN_MS = 2.0, 4.0, 20.0
_TIE = 0.02  # relative: smaller differences are not worth a sample
_MAX_ROUNDS = 6  # in multiples of the least number of samples; what is undecided by then stays so


def estimate(samples: Sequence[float]) -> float:
    """Return the lowest of ``samples``: disturbances add time to a run and never take time away."""
    return min(samples)


def noise_of(samples: Sequence[float]) -> float:
    """Return how far the median of ``samples`` lies above the lowest."""
    return statistics.median(samples) - min(samples)


def relative_noise(several: Iterable[Sequence[float]]) -> float | None:
    """Return the median, over all sequences of more than one sample, of noise / estimate; None if there is none."""
    found = [noise_of(samples) / estimate(samples) for samples in several if len(samples) > 1]
    return statistics.median(found) if found else None


def spread_of(samples: Sequence[float]) -> float:
    """Return how far below the lowest of n ``samples`` the true time may lie: 5/n times their noise, at least 2 %.

    With more samples the spread falls, however large the noise. Where all runs are delayed, by times that are
    exponentially distributed, the true time lies lower still in 16 % of cases for 5 samples and in 5 % for 30. The
    spread of a single sample is the sample itself, since its noise is unknown.
    """
    lowest = estimate(samples)
    if len(samples) == 1:
        return lowest
    return max(_SPREAD_SAMPLES * noise_of(samples) / len(samples), _MIN_SPREAD * lowest)


class Summary(NamedTuple):
    """Estimate and spread of the sum of several parts, and the sample count of the part with the fewest samples."""

    ms: float
    spread: float
    count: int


def summarize(parts: Sequence[Sequence[float]]) -> Summary:
    """Return the summary of the sum of ``parts``, given as the samples of each; there is at least one part."""
    return Summary(sum(map(estimate, parts)), sum(map(spread_of, parts)), min(map(len, parts)))


def beats(new_ms: float, old_ms: float, old_spread: float | None) -> bool:
    """Return True if ``new`` is faster than ``old``, which is of higher rank, by more than the spread of ``old``.

    The spread of ``new`` does not matter: disturbances only add time, so ``new`` takes at most ``new_ms``, however
    much its samples vary, while ``old`` may take ``old_spread`` less than measured.
    """
    return old_ms - new_ms > (old_spread or 0.0)


def choose(times: Sequence[tuple[float, float | None]]) -> int:
    """Return the index of the (milliseconds, spread) to choose; in doubt the first of ``times``, the highest rank.

    That is the first that the lowest time does not beat.
    """
    best = min(ms for ms, _ in times)
    return next(index for index, (ms, spread) in enumerate(times) if not beats(best, ms, spread))


def far_behind(ms: float, best_ms: float) -> bool:
    """Return True if ``ms`` exceeds ``best_ms`` by more than disturbances of a run explain."""
    return ms > _FAR_RATIO * best_ms + _FAR_MARGIN_MS


def undecided(summaries: Sequence[Summary], repeats: int) -> list[int]:
    """Return the indices of ``summaries`` that need another sample before :func:`choose` can decide.

    Args:
        summaries: of all variants, the highest rank first.
        repeats: the least number of samples of a variant that may be chosen.
    """
    if not summaries:
        return []
    best = min(range(len(summaries)), key=lambda index: summaries[index].ms)
    fastest = summaries[best]
    few, rivals = [], []
    for index, one in enumerate(summaries):
        outranks = index < best
        enough_to_drop = min(2 if far_behind(one.ms, fastest.ms) else 3, repeats)
        if not outranks and one.count >= enough_to_drop and one.ms > _DROP_RATIO * fastest.ms:
            continue
        if one.count < repeats:
            few.append(index)
        elif outranks and one.ms - fastest.ms > _TIE * one.ms:
            # In doubt the higher rank wins, so the doubt is reduced by samples; and it gets twice as many before it
            # loses, which a passing disturbance could have caused
            doubtful = one.ms - one.spread <= fastest.ms
            if doubtful or one.count < 2 * repeats:
                rivals.append(index)
    wanted = dict.fromkeys([*few, *rivals, *([best] if rivals else [])])
    return [index for index in wanted if summaries[index].count < max(_MAX_ROUNDS * repeats, 3)]
