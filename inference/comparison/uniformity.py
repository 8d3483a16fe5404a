"""Whether ranks are uniform, and what intervals cover: statistics of ranks alone.

A rank r of a true value among L exchangeable draws is uniform on 0..L if they are draws of its
posterior.  With N ranks, ``F(z) = #(r < z (L + 1)) / N`` at ``z = j / (L + 1)`` is a binomial share
of probability z, from which the band of :func:`band` is made: all of F lies inside with the stated
probability, not each point by itself.

Sources: Teemu Säilynoja, Paul-Christian Bürkner, Aki Vehtari, "Graphical test for discrete
uniformity and its applications in goodness-of-fit evaluation and multiple sample comparison"
(2022); Pablo Lemos, Adam Coogan, Yashar Hezaveh, Laurence Perreault-Levasseur, "Sampling-based
accuracy testing of posterior estimators for general inference" (2023).
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binom, chisquare

Ranks: TypeAlias = NDArray[np.int64]
Floats: TypeAlias = NDArray[np.float64]

POINTS = 100  # at most, at which a band looks
SIMULATED = 4000  # sets of uniform ranks behind a band


class Band(NamedTuple):
    """Where the ECDF of uniform ranks, minus the diagonal, lies everywhere."""

    grid: Floats  # (points,) in (0, 1)
    low: Floats
    high: Floats


def rank(truth: Any, draws: Any, seed: int = 0) -> Ranks:
    """Ranks of true values ``(*)`` among draws ``(L, *)``: 0..L, ties broken at random.

    Raises:
        ValueError: some are not numbers.
    """
    truth, draws = np.asarray(truth), np.asarray(draws)
    if np.isnan(truth).any() or np.isnan(draws).any():
        raise ValueError("some draws are not numbers (NaN), so that nothing can be ranked")
    ties = (draws == truth).sum(0)
    return (draws < truth).sum(0) + np.random.default_rng(seed).integers(0, ties, endpoint=True)


def chi_square(ranks: Ranks, num_draws: int) -> Floats:
    """p-values ``(C,)`` of ranks ``(N, C)``: a chi-square test on at most 20 bins.

    There are fewer if a bin would expect less than 10 ranks, and never more than L + 1.  NaN with
    fewer than 20 ranks.
    """
    bins = min(20, len(ranks) // 10, num_draws + 1)
    if bins < 2:
        return np.full(ranks.shape[1], np.nan)
    parts = np.array_split(np.arange(num_draws + 1), bins)
    expected = np.array([len(part) for part in parts]) * len(ranks) / (num_draws + 1)
    of_rank = np.repeat(np.arange(bins), [len(part) for part in parts])
    counts = np.stack([np.bincount(of_rank[c], minlength=bins) for c in ranks.T], 1)
    return np.asarray(chisquare(counts, expected[:, None]).pvalue)


def ecdf_difference(ranks: Ranks, num_draws: int, grid: Floats) -> Floats:
    """``F(z) - z`` at the points of a grid, ``(C, points)``, of ranks ``(N, C)``."""
    steps = np.rint(grid * (num_draws + 1))
    return (ranks[..., None] < steps).mean(0) - grid


def band(num_ranks: int, num_draws: int, level: float = 0.95) -> Band:
    """The simultaneous band of N uniform ranks on 0..L, found by simulation.

    The bounds at each point are quantiles of a binomial; their common probability is the one that
    contains the whole of ``level`` of 4000 simulated sets of ranks.  At most 100 points of the L
    that there are.

    Raises:
        ValueError: the level is not between 0 and 1.
    """
    if not 0 < level < 1:
        raise ValueError(f"level is a probability between 0 and 1, got {level}")
    steps = _steps(num_draws)
    grid = steps / (num_draws + 1)
    worst = _simulated(num_ranks, num_draws)
    tail = worst[int((1 - level) * len(worst))] / 2
    low, high = (binom.ppf(t, num_ranks, grid) / num_ranks - grid for t in (tail, 1 - tail))
    return Band(grid, low, high)


def band_test(ranks: Ranks, num_draws: int) -> Floats:
    """p-values ``(C,)`` of ranks ``(N, C)``: one minus the level of the band that just fits.

    Simulated, so never below 1 / 4001.
    """
    steps = _steps(num_draws)
    counts = (ranks[..., None] < steps).sum(0)
    worst = _simulated(len(ranks), num_draws)
    table = _tails(len(ranks), num_draws)
    own = table[np.arange(len(steps)), counts].min(-1)
    return (1 + np.searchsorted(worst, own, "right")) / (1 + len(worst))


def central_coverage(ranks: Ranks, num_draws: int, levels: Any) -> Floats:
    """How often central intervals contain the truth, ``(levels, C)``, of ranks ``(N, C)``.

    Ranks are spread evenly over their cell ``[r, r + 1] / (L + 1)``, so that uniform ranks have
    exactly the nominal coverage, whatever L is.
    """
    half = np.asarray(levels, float)[:, None, None] / 2
    return _within(ranks, num_draws, 0.5 - half, 0.5 + half)


def upper_coverage(ranks: Ranks, num_draws: int, levels: Any) -> Floats:
    """The same for the regions from above: how often the truth is among the top share of draws."""
    level = np.asarray(levels, float)[:, None, None]
    return _within(ranks, num_draws, 1 - level, np.ones_like(level))


def _within(ranks: Ranks, num_draws: int, low: Floats, high: Floats) -> Floats:
    cell = 1 / (num_draws + 1)
    start = ranks * cell
    overlap = np.minimum(high, start + cell) - np.maximum(low, start)
    return np.asarray((overlap.clip(0, cell) / cell).mean(1))


def tarp_ranks(truth: Any, draws: Any, references: Any = None, seed: int = 0) -> Ranks:
    """How many draws are farther from a random point than the truth, ``(N,)``, in 0..L (TARP).

    Uniform if the draws are those of the posterior, of all components together; a test of one
    random direction that marginal ranks, which see no correlations, do not make.

    Args:
        truth: ``(N, D)``.
        draws: ``(L, N, D)``.
        references: points of the same shape as the truth; default: uniform in its box.
        seed: of these points, and of ties.

    Every component is scaled by the range of the truth.
    """
    truth, draws = np.asarray(truth, float), np.asarray(draws, float)
    low, width = truth.min(0), np.ptp(truth, 0)
    width = np.where(width > 0, width, 1)
    if references is None:
        references = low + width * np.random.default_rng(seed).random(truth.shape)
    points = (np.asarray(references, float) - low) / width
    far = [np.linalg.norm(points - (value - low) / width, axis=-1) for value in (truth, draws)]
    return rank(-far[0], -far[1], seed)


def _steps(num_draws: int) -> NDArray[np.int64]:
    count = min(num_draws, POINTS)
    return np.unique(np.rint(np.linspace(1, num_draws, count)).astype(np.int64))


@functools.lru_cache(maxsize=16)
def _tails(num_ranks: int, num_draws: int) -> Floats:
    """Twice the smaller tail of every count at every point, ``(points, N + 1)``."""
    counts = np.arange(num_ranks + 1)
    grid = _steps(num_draws)[:, None] / (num_draws + 1)
    below = binom.cdf(counts, num_ranks, grid)
    return 2 * np.minimum(below, binom.sf(counts - 1, num_ranks, grid))


@functools.lru_cache(maxsize=16)
def _simulated(num_ranks: int, num_draws: int) -> Floats:
    """The smallest tail of each of many sets of uniform ranks, ascending."""
    steps = _steps(num_draws)
    shares = np.diff(steps, prepend=0, append=num_draws + 1) / (num_draws + 1)
    rng, table = np.random.default_rng(0), _tails(num_ranks, num_draws)
    counts = rng.multinomial(num_ranks, shares, size=SIMULATED)[:, :-1].cumsum(1)
    return np.sort(table[np.arange(len(steps)), counts].min(1))
