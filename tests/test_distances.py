"""Distances between sets of draws, against closed forms and against sbi on the same draws."""

import json
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import sklearn
import torch
from benchmarks.sbi_rival import DRAWS, KEPT
from benchmarks.sbi_rival import draws as shared_draws
from cases import Globals
from scipy.stats import norm

from pyrozoo.inference.comparison.distances import c2st, mmd2, sliced_wasserstein, to_matrix


@pytest.fixture(scope="module")
def sbi():
    return json.loads(KEPT.read_text())


# ---- against sbi ------------------------------------------------------------------------------------


def test_c2st_is_that_of_sbi(sbi):
    """The same folds and trees; a network in floating point may differ on another processor."""
    same = sbi["versions"]["scikit-learn"] == sklearn.__version__
    made = shared_draws()
    found = c2st(made["a"], made["b"], seed=1, classifier="forest")
    assert found == pytest.approx(sbi["c2st_forest"], abs=1e-12 if same else 0.05)
    found = c2st(made["a"], torch.as_tensor(made["b"]), seed=1)
    assert found == pytest.approx(sbi["c2st_mlp"], abs=0.01 if same else 0.05)
    ranks = np.array(sbi["ranks"][0])[:, None]
    found = c2st(ranks, made["uniform"], seed=1, classifier="forest")
    assert found == pytest.approx(sbi["c2st_ranks"][0], abs=1e-12 if same else 0.05)
    assert ranks.max() <= DRAWS


def test_mmd_is_that_of_sbi(sbi):
    made = shared_draws()
    assert mmd2(made["a"], made["b"]) == pytest.approx(sbi["mmd2"], rel=1e-10)
    assert mmd2(made["a"], made["b"], 1.0) == pytest.approx(sbi["mmd2_scale_1"], rel=1e-10)


# ---- against closed forms ---------------------------------------------------------------------------


def test_c2st_approaches_the_best_classifier():
    """N(0, 1) against N(m, 1): no classifier is right more often than Phi(m / 2)."""
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 150, 1))
    assert abs(c2st(a, b + 1.5) - norm.cdf(0.75)) < 4 * 0.5 / 300**0.5
    assert abs(c2st(a, b, classifier="forest") - 0.5) < 4 * 0.5 / 300**0.5
    wide = np.hstack([a, np.ones((150, 1))])  # a column without spread is no ground for division
    assert c2st(wide, wide - [7.0, 0.0], classifier="forest") == 1


def test_the_kernel_distance_of_two_gaussians():
    """E k(a, b) for a ~ N(0, 1), b ~ N(m, 1), h = 1: exp(-m^2 / 6) / sqrt(3)."""
    rng = np.random.default_rng(1)
    exact = 2 * (1 - math.exp(-1 / 6)) / 3**0.5
    found = [
        mmd2(rng.standard_normal((100, 1)), 1 + rng.standard_normal((80, 1)), 1.0)
        for _ in range(200)
    ]
    assert abs(np.mean(found) - exact) < 4 * np.std(found) / 200**0.5
    equal = [mmd2(rng.standard_normal((50, 2)), rng.standard_normal((60, 2))) for _ in range(200)]
    assert abs(np.mean(equal)) < 4 * np.std(equal) / 200**0.5  # unbiased: below zero half the time
    assert min(equal) < 0


def test_transport_of_a_shift():
    rng = np.random.default_rng(2)
    a = rng.standard_normal((300, 1))
    assert sliced_wasserstein(a, a + 2.5) == pytest.approx(2.5)
    wide = rng.standard_normal((200, 3))
    found = sliced_wasserstein(wide, wide + np.array([0.0, 3.0, 4.0]), 4000)
    assert found == pytest.approx(5 * 0.5, rel=0.03)  # the mean of |u_1| on the sphere is 1 / 2
    assert sliced_wasserstein(wide, wide[::-1]) == pytest.approx(0, abs=1e-12)


def test_what_is_refused():
    a = np.zeros((5, 2))
    with pytest.raises(ValueError, match="2 and 3 dimensions"):
        mmd2(a, np.zeros((5, 3)))
    with pytest.raises(ValueError, match="finite numbers"):
        c2st(a, a * np.nan)
    with pytest.raises(ValueError, match="at least 2"):
        sliced_wasserstein(a[:1], a)
    with pytest.raises(ValueError, match="'mlp' or 'forest'"):
        c2st(a, a, classifier="trees")
    with pytest.raises(ValueError, match="bandwidth"):
        mmd2(a, a, -1.0)


# ---- matrices of draws ------------------------------------------------------------------------------


def several(batch):
    rate = pyro.sample("rate", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(batch)):
        y = pyro.sample("y", dist.Categorical(torch.ones(3) / 3))
        share = pyro.sample("share", dist.Dirichlet(torch.ones(3)))
        count = pyro.sample("count", dist.Poisson(rate))
        pyro.sample("x", dist.Normal(share[..., 0] + y + count, 1.0))


def test_a_matrix_of_several_sites():
    draws = {
        "count": torch.arange(8.0).reshape(4, 2),
        "y": torch.tensor([[0, 1], [2, 1], [1, 1], [0, 0]]),
        "rate": torch.tensor([1.0, math.e, 1.0, 2.0]),
        "share": dist.Dirichlet(torch.ones(3)).sample((4, 2)),
    }
    data = {"x": torch.zeros(2)}
    found = to_matrix(draws, 1, several, data)
    assert found.shape == (4, 1 + 3 + 2 + 1)
    np.testing.assert_allclose(found[:, 0], [0, 1, 0, math.log(2)], rtol=1e-6)
    np.testing.assert_array_equal(found[:, 1:4], np.eye(3)[[1, 1, 1, 0]])
    np.testing.assert_array_equal(found[:, -1], [1, 3, 5, 7])
    assert np.isfinite(found).all()
    assert to_matrix(draws, None, several, data).shape == (4, 1)
    with pytest.raises(ValueError, match="'w' is not a site"):
        to_matrix({"w": torch.zeros(4)}, 0, several, data)
    with pytest.raises(ValueError, match="no draws are left"):
        to_matrix({"y": draws["y"]}, None, several, data)


def test_a_matrix_of_shared_sites():
    draws = {"means": torch.randn(5, 3, 4)}
    found = to_matrix(draws, None, Globals(), {"x": torch.zeros(2, 4)})
    np.testing.assert_array_equal(found, draws["means"].reshape(5, 12).double())
