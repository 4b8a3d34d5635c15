"""Whether a difference is one: intervals, permutation tests and their correction, by SciPy."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

LEVEL, POWER = 0.05, 0.8  # of a test, and what a number of seeds is to reach
_RESAMPLES = 100_000  # of a permutation test with more sign patterns than that: 17 seeds and more
_MOST = 10_000  # seeds, beyond which nobody will go


class Estimate(NamedTuple):
    """A mean over seeds.

    Attributes:
        mean, n: what of.
        deviation: between seeds, with n - 1; None for one seed.
        low, high: 95 % interval of the mean by Student's t; None for one seed.
    """

    mean: float
    n: int
    deviation: float | None
    low: float | None
    high: float | None


def estimate(values: Sequence[float]) -> Estimate:
    """Mean, deviation and interval of some values."""
    from scipy import stats

    n, mean = len(values), statistics.fmean(values)
    if n < 2:
        return Estimate(mean, n, None, None, None)
    deviation = statistics.stdev(values)
    half = float(stats.t.ppf(1 - LEVEL / 2, n - 1)) * deviation / math.sqrt(n)
    return Estimate(mean, n, deviation, mean - half, mean + half)


def p_below(values: Sequence[float], target: float) -> float:
    """One-sided t-test: how likely a mean this far below `target` is if the true mean is the target."""
    from scipy import stats

    if statistics.stdev(values) == 0:  # SciPy has no answer to that
        mean = statistics.fmean(values)
        return 0.0 if mean < target else 1.0
    return float(stats.ttest_1samp(values, target, alternative="less").pvalue)


def p_paired(differences: Sequence[float]) -> float:
    """Two-sided permutation test of paired differences: how likely a mean this far from 0 is if signs are random.

    All 2^n sign patterns are tried up to 100,000, else that many drawn with a fixed seed. With n pairs p is at least
    2 / 2^n.
    """
    import numpy as np
    from scipy import stats

    if len(differences) < 2:
        return 1.0
    test = stats.permutation_test(
        (np.asarray(differences),),
        lambda x, axis: np.mean(x, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=_RESAMPLES,
        rng=np.random.default_rng(0),
    )
    return float(test.pvalue)


def holm(p: Sequence[float]) -> list[float]:
    """Holm's correction of the p-values of several comparisons: each may be compared with the level itself."""
    order = sorted(range(len(p)), key=lambda i: p[i])
    corrected, largest = [0.0] * len(p), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p) - rank) * p[i]))
        corrected[i] = largest
    return corrected


def seeds_needed(difference: float, deviation: float, comparisons: int = 1) -> int | None:
    """Seeds with which a paired test at 5 %, divided by the number of comparisons, would tell with 80 % probability.

    Args:
        difference: the true mean of the paired differences, as far as is known.
        deviation: of the differences, between seeds.
        comparisons: that are made at once.

    Returns:
        At least the number that a permutation test needs to fall below the level; None beyond 10,000.
    """
    from scipy import stats

    level = LEVEL / comparisons
    least = math.ceil(math.log2(2 / level))
    if deviation == 0:
        return least if difference else None

    def power(n: int) -> float:
        edge = stats.t.ppf(1 - level / 2, n - 1)
        centre = min(abs(difference) / deviation * math.sqrt(n), 100.0)  # beyond which SciPy loses its digits
        return float(stats.nct.sf(edge, n - 1, centre))

    low, high = max(2, least), _MOST
    if power(high) < POWER:
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if power(middle) >= POWER else (middle + 1, high)
    return low


class Comparison(NamedTuple):
    """A configuration against the baseline, over the seeds that both have.

    Attributes:
        difference: mean of loss less the baseline's, with deviation and interval; None where no seed is shared.
        p: of the permutation test, corrected by Holm.
        more_seeds: how many more would tell, if the difference is what it seems; 0 where it is told, None beyond 10,000
            and where one seed says nothing about the deviation.
    """

    difference: Estimate | None
    p: float
    more_seeds: int | None

    @property
    def told(self) -> bool:
        """Whether it differs from the baseline, at 5 %."""
        return self.p <= LEVEL


def compare(losses: Sequence[dict[int, float]], baseline: dict[int, float]) -> list[Comparison]:
    """Configurations against a baseline, each as losses by seed."""
    pairs = [[loss - baseline[seed] for seed, loss in one.items() if seed in baseline] for one in losses]
    corrected = holm([p_paired(differences) for differences in pairs])
    found = []
    for differences, p in zip(pairs, corrected, strict=True):
        difference = estimate(differences) if differences else None
        more: int | None = 0
        if p > LEVEL:
            more = None
            if difference is not None and difference.deviation is not None:
                needed = seeds_needed(difference.mean, difference.deviation, len(losses))
                more = None if needed is None else max(1, needed - difference.n)
        found.append(Comparison(difference, p, more))
    return found
