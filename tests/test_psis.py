"""The shape of the tail of importance weights, against closed forms and ArviZ."""

import warnings

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from scipy.stats import genpareto

from pyrozoo.inference.comparison.psis import (
    khat_threshold,
    pareto_khat,
    smoothed,
)


def by_arviz(log_weights):
    """Smoothed log weights and k-hat, ``(P, rows)`` and ``(rows,)``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from arviz import psislw

        smooth, shape = psislw(log_weights.T.numpy().copy())
    return torch.as_tensor(smooth).T, torch.as_tensor(shape)


def heavy(draws, rows=12, seed=0):
    """Log weights with tails from none to far too heavy, ``(draws, rows)``."""
    rng = np.random.default_rng(seed)
    tail = np.linspace(-0.5, 1.4, rows)
    values = [genpareto.rvs(k, size=draws, random_state=rng) for k in tail]
    return torch.as_tensor(np.log(np.array(values)).T)


# ---- the tail ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("draws", [21, 24, 100, 225, 1000, 5000])
def test_k_hat_and_smoothed_weights_are_those_of_arviz(draws):
    some = torch.randn(draws, 4, generator=torch.Generator().manual_seed(1)).double() * 3
    weights = torch.cat([heavy(draws), some - 400, 1e3 * some], 1)
    weights[: draws // 3, 0] = -torch.inf
    smooth, shape = by_arviz(weights)
    torch.testing.assert_close(pareto_khat(weights), shape, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(smoothed(weights), smooth, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(smoothed(weights).logsumexp(0), torch.zeros(20).double())
    again = pareto_khat(weights.T.reshape(4, 5, draws), dim=-1)
    torch.testing.assert_close(again, shape.reshape(4, 5), atol=1e-9, rtol=1e-9)


def test_k_hat_finds_the_shape_of_a_known_tail():
    for shape in (0.2, 0.5, 0.9):
        values = genpareto.rvs(shape, size=(100_000, 3), random_state=3)
        found = pareto_khat(torch.as_tensor(values).log())
        assert bool(((found - shape).abs() < 0.12).all())


def test_a_proposal_that_is_too_narrow_has_the_shape_that_theory_says():
    """Weights N(0, 1) / N(0, s^2) have finite moments up to 1 / (1 - s^2): k = 1 - s^2."""
    for scale in (0.9, 0.6):
        z = scale * torch.randn(200_000, generator=torch.Generator().manual_seed(0)).double()
        weights = dist.Normal(0.0, 1.0).log_prob(z) - dist.Normal(0.0, scale).log_prob(z)
        assert abs(pareto_khat(weights) - (1 - scale**2)) < 0.15  # logarithms slow the tail down


def test_weights_without_a_tail():
    ramp = torch.linspace(-2.0, -1.0, 400)
    assert pareto_khat(torch.full((400,), -3.1)) == -torch.inf
    assert pareto_khat(-900 + 1e-5 * torch.randn(400)) == -torch.inf  # rounding
    half = torch.where(torch.arange(400) % 2 == 0, 0.0, -torch.inf)
    assert pareto_khat(half) == -torch.inf
    torch.testing.assert_close(smoothed(half).exp().sum(), torch.ones(()))
    one = torch.full((400,), -torch.inf)
    one[7] = 2.0
    assert pareto_khat(one) == torch.inf
    assert smoothed(one)[7] == 0
    assert pareto_khat(torch.cat([torch.zeros(396), torch.ones(4)])) == torch.inf
    assert bool(pareto_khat(torch.full((400,), -torch.inf)).isnan())
    for odd in (torch.nan, torch.inf):
        assert bool(pareto_khat(torch.cat([ramp, torch.tensor([odd])])).isnan())
    assert bool(pareto_khat(ramp[:20]).isnan())
    assert bool(pareto_khat(ramp[::15]).isfinite())
    tied = heavy(600)
    tied = (tied * 20).round() / 20
    torch.testing.assert_close(pareto_khat(tied), by_arviz(tied)[1], atol=1e-9, rtol=1e-9)


def test_the_threshold():
    assert khat_threshold(100) == pytest.approx(0.5)
    assert khat_threshold(10**6) == 0.7
    with pytest.raises(ValueError, match="num_particles"):
        khat_threshold(1)
