"""Tests of uniformity: the band by simulation, coverage by counting, and sbi on the same draws."""

import json
import math

import numpy as np
import pytest
from benchmarks.sbi_rival import BINS, DRAWS, KEPT, posterior
from benchmarks.sbi_rival import draws as shared_draws
from scipy.stats import binom, chisquare, kstest, norm

from pyrozoo.inference.comparison import uniformity

# ---- uniformity -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "draws"), [(250, 99), (60, 9), (40, 1000)])
def test_the_band_holds_all_of_an_ecdf_as_often_as_it_says(count, draws):
    ranks = np.random.default_rng(5).integers(0, draws, (count, 2000), endpoint=True)
    for level in (0.95, 0.8):
        grid, low, high = uniformity.band(count, draws, level)
        lines = uniformity.ecdf_difference(ranks, draws, grid)
        share = ((low - 1e-9 <= lines) & (lines <= high + 1e-9)).all(1).mean()
        error = (level * (1 - level)) ** 0.5 * (1 / 2000 + 1 / uniformity.SIMULATED) ** 0.5
        assert level - 4 * error < share < level + 4 * error + (0.06 if count < 100 else 0.02)
    p_values = uniformity.band_test(ranks, draws)
    assert abs((p_values <= 0.05).mean() - 0.05) < 0.03
    grid, low, _ = uniformity.band(count, draws)
    single = binom.ppf(0.025, count, grid) / count - grid  # a point by itself may vary less
    assert bool((low <= single + 1e-12).all())


def test_chi_square_p_values_are_those_of_scipy():
    ranks = np.random.default_rng(1).integers(0, 99, (300, 3), endpoint=True)
    ranks[:, 1] = ranks[:, 1] ** 2 // 99
    found = uniformity.chi_square(ranks, 99)
    right = [chisquare(np.bincount(r // 5, minlength=20)).pvalue for r in ranks.T]
    np.testing.assert_allclose(found, right)
    assert found[1] < 1e-10
    uneven = uniformity.chi_square(np.random.default_rng(2).integers(0, 8, (2000, 400)), 7)
    assert kstest(uneven, "uniform").pvalue > 1e-3
    assert bool(np.isnan(uniformity.chi_square(ranks[:19], 99)).all())


def test_coverage_of_uniform_ranks_is_nominal_exactly():
    ranks = np.arange(10)[:, None]
    levels = [0.03, 0.5, 0.95]
    for coverage in (uniformity.central_coverage, uniformity.upper_coverage):
        np.testing.assert_allclose(coverage(ranks, 9, levels)[:, 0], levels)
    assert uniformity.central_coverage(np.array([[0]]), 9, [0.7])[0, 0] == 0
    assert uniformity.upper_coverage(np.array([[9]]), 9, [0.2])[0, 0] == pytest.approx(1)


def test_ties_are_broken_evenly():
    ranks = uniformity.rank(np.zeros(20_000), np.zeros((4, 20_000)))
    assert chisquare(np.bincount(ranks, minlength=5)).pvalue > 1e-3
    draws = np.array([[0.0], [1.0], [1.0], [2.0]])
    assert {int(uniformity.rank([1.0], draws, seed)[0]) for seed in range(50)} == {1, 2, 3}
    with pytest.raises(ValueError, match="NaN"):
        uniformity.rank([1.0], draws * math.nan)


# ---- against sbi ------------------------------------------------------------------------------------


def test_ranks_coverage_and_tarp_are_those_of_sbi():
    sbi, made = json.loads(KEPT.read_text()), shared_draws()
    ranks = uniformity.rank(made["truth"], made["draws"])
    np.testing.assert_array_equal(ranks.T, sbi["ranks"])
    p_values = [kstest(r / DRAWS, "uniform").pvalue for r in ranks.T]
    np.testing.assert_allclose(p_values, sbi["ks_p_values"], rtol=1e-5)
    loc, scale = posterior(made["x"])
    density = [norm.logpdf(v, loc, scale).sum(-1) for v in (made["truth"], made["draws"])]
    np.testing.assert_array_equal(uniformity.rank(*density), sbi["density_ranks"])
    tarp = uniformity.tarp_ranks(made["truth"], made["draws"], made["references"])
    inside = (DRAWS - tarp) / DRAWS  # sbi: the share of draws that are nearer than the truth
    alpha, ecp = np.array(sbi["tarp_alpha"]), np.array(sbi["tarp_ecp"])
    assert len(alpha) == BINS + 1
    between = np.abs(alpha[1:-1, None] - inside).min(1) > 1e-6  # edges that no value lies on
    own = (inside <= alpha[1:-1, None]).mean(1)
    assert between.sum() > 10
    np.testing.assert_allclose(own[between], ecp[1:-1][between], atol=1e-6)
