"""What samples of a time say: an estimate, how far it can be trusted, and whether more samples are needed to choose.

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

_DOUBT = 5  # so that five samples, the fewest by default, are known to their noise
_LEAST_SPREAD = 0.02  # of the estimate: lowest samples of several runs on a quiet machine differ by about that much
# One of lower rank leaves after three samples if it is slower than twice the best, and after two if by more than other
# processes explain: on two cores beside two busy ones, short calls took 4 to 120 ms longer, sample after sample
_WIDE, _FAR, _STALL = 2.0, 4.0, 20.0
_TIE = 0.02  # relative: what differs by less is not worth a sample
_MOST = 6  # times the fewest samples: what is open by then stays so


def estimate(samples: Sequence[float]) -> float:
    """The lowest of ``samples``: whatever disturbs a run adds time to it, nothing takes time away."""
    return min(samples)


def noise_of(samples: Sequence[float]) -> float:
    """How far the median of ``samples`` lies above the lowest."""
    return statistics.median(samples) - min(samples)


def relative_noise(several: Iterable[Sequence[float]]) -> float | None:
    """The noise relative to the estimate, in the middle of all that have more than one sample; None if none has."""
    found = [noise_of(samples) / estimate(samples) for samples in several if len(samples) > 1]
    return statistics.median(found) if found else None


def spread_of(samples: Sequence[float]) -> float:
    """How far below the lowest of n ``samples`` the true time may lie: 5/n times their noise, and at least 2 %.

    Five samples are known to their noise, and with more of them the spread falls, however large the noise. Where all
    runs are delayed, by times that are exponentially distributed, the true time lies lower still in 16 % of cases for 5
    samples and in 5 % for 30. A single sample says nothing of what it hides: its spread is itself.
    """
    lowest = estimate(samples)
    if len(samples) == 1:
        return lowest
    return max(_DOUBT * noise_of(samples) / len(samples), _LEAST_SPREAD * lowest)


class Summary(NamedTuple):
    """The sum of several parts: its estimate and spread, and the number of samples of the part with the fewest."""

    ms: float
    spread: float
    count: int


def summarize(parts: Sequence[Sequence[float]]) -> Summary:
    """The sum of parts with the samples ``parts``, of which there is at least one."""
    return Summary(sum(map(estimate, parts)), sum(map(spread_of, parts)), min(map(len, parts)))


def beats(new_ms: float, old_ms: float, old_spread: float | None) -> bool:
    """Return True if ``new`` is faster than ``old``, which is of higher rank, by more than the spread of ``old``.

    The spread of ``new`` does not matter: time is only ever added, so ``new`` takes ``new_ms`` at the most, however
    much its samples vary, while ``old`` may take ``old_spread`` less than was seen.
    """
    return old_ms - new_ms > (old_spread or 0.0)


def choose(times: Sequence[tuple[float, float | None]]) -> int:
    """Return the index of the (milliseconds, spread) to choose; in doubt the first of ``times``, the highest rank.

    That is the first which the lowest does not beat.
    """
    best = min(ms for ms, _ in times)
    return next(index for index, (ms, spread) in enumerate(times) if not beats(best, ms, spread))


def far_behind(ms: float, best_ms: float) -> bool:
    """Return True if ``ms`` is so much longer than ``best_ms`` that what disturbs a run does not explain it."""
    return ms > _FAR * best_ms + _STALL


def undecided(summaries: Sequence[Summary], repeats: int) -> list[int]:
    """Return the indices of those that need another sample before :func:`choose` can choose among ``summaries``.

    Args:
        summaries: the highest rank first.
        repeats: the fewest samples of one that may be chosen.
    """
    if not summaries:
        return []
    best = min(range(len(summaries)), key=lambda index: summaries[index].ms)
    fastest = summaries[best]
    few, rivals = [], []
    for index, one in enumerate(summaries):
        outranks = index < best
        early = min(2 if far_behind(one.ms, fastest.ms) else 3, repeats)
        if not outranks and one.count >= early and one.ms > _WIDE * fastest.ms:
            continue
        if one.count < repeats:
            few.append(index)
        elif outranks and one.ms - fastest.ms > _TIE * one.ms:
            # in doubt it wins: so let there be none, and let none lose by what disturbed it for a while
            doubtful = one.ms - one.spread <= fastest.ms
            if doubtful or one.count < 2 * repeats:
                rivals.append(index)
    wanted = dict.fromkeys([*few, *rivals, *([best] if rivals else [])])
    return [index for index in wanted if summaries[index].count < max(_MOST * repeats, 3)]
