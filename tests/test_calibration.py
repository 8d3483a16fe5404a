"""Calibration against what is known: exact posteriors, guides that are wrong by a known amount, sbi."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import Empty, Mixture
from scipy.stats import norm
from torch import nn

from pyrozoo.inference.comparison import uniformity
from pyrozoo.inference.comparison.calibration import Calibration, sbc

# ---- programs whose posterior is known --------------------------------------------------------------


class Pair(nn.Module):
    """z ~ N(0, I_2), x | z ~ N(z, s^2): the posterior of each z is N(x / (1 + s^2), s^2 / (1 + s^2))."""

    def forward(self, batch):
        with pyro.plate("data", len(batch)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            scale = batch["s"].unsqueeze(-1) if "s" in batch else 0.5
            pyro.sample("x", dist.Normal(z, scale).to_event(1))


class PairGuide(nn.Module):
    """Its posterior, standard deviations times ``stretch``, moved by ``shift`` of them."""

    def __init__(self, stretch=1.0, shift=0.0):
        super().__init__()
        self.stretch, self.shift = stretch, shift

    def forward(self, batch):
        with pyro.plate("data", len(batch)):
            s = batch["s"].unsqueeze(-1) if "s" in batch else torch.tensor(0.5)
            known = batch.present("x").unsqueeze(-1)
            x = batch["x"] if "x" in batch else torch.zeros(len(batch), 2)
            sd = torch.where(known, s / (1 + s**2) ** 0.5, 1.0)
            loc = torch.where(known, x / (1 + s**2), 0.0)
            pyro.sample("z", dist.Normal(loc + self.shift * sd, self.stretch * sd).to_event(1))


def covered(level, stretch, shift=0.0):
    """How often the central interval of a guide that is wrong in this way holds the truth."""
    half = norm.ppf(0.5 + level / 2) * stretch
    return norm.cdf(half + shift) - norm.cdf(-half + shift)


# ---- guides that are right --------------------------------------------------------------------------


def test_an_exact_guide_is_calibrated():
    smallest = []
    for seed in range(6):
        found = sbc(Pair(), PairGuide(), 400, seed=seed)
        assert found.ranks["z"].shape == (400, 2)
        assert found.ranks["z"].min() == 0
        assert found.ranks["z"].max() == 99
        smallest += [found.p_values["z"], found.band_p_values["z"]]
        assert found.p_value > 0.005
        assert abs(found.coverage_at(0.9) - 0.9) < 4 * (0.09 / 800) ** 0.5
        grid, low, high = found.bands(0.999)
        lines = found.ecdf_differences(grid)["z"]
        assert bool(((low <= lines) & (lines <= high)).all())
        regions = found.region_coverage
        assert set(regions) == {"density", "distance"}
        for values in regions.values():
            assert np.abs(values - found.levels).max() < 4 * 0.5 / 20
    assert np.concatenate(smallest).max() > 0.3


def test_the_same_seed_gives_the_same_ranks():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    a, b = (sbc(Pair(), PairGuide(), 50, 9, seed=2) for _ in range(2))
    np.testing.assert_array_equal(a.ranks["z"], b.ranks["z"])
    np.testing.assert_array_equal(a.regions["density"], b.regions["density"])
    assert torch.equal(torch.get_rng_state(), state)
    other = sbc(Pair(), PairGuide(), 50, 9, seed=3)
    assert (a.ranks["z"] != other.ranks["z"]).any()


def test_rows_with_missing_values_and_inputs():
    """Each row has its own noise, and half of them nothing observed: their posterior is the prior."""
    s = torch.linspace(0.2, 2.0, 40)
    known = torch.arange(40) % 2 == 0
    data = {"x": (torch.zeros(40, 2), known), "s": s}
    found = sbc(Pair(), PairGuide(), 800, 49, data=data, inputs=["s"])
    assert found.p_value > 0.01
    wrong = sbc(Pair(), PairGuide(0.5), 800, 49, data=data, inputs=["s"])
    assert wrong.p_value < 1e-3
    halves = [np.arange(800) % 2 == i for i in (0, 1)]
    ranks = [Calibration({"z": wrong.ranks["z"][half]}, 49) for half in halves]
    assert ranks[0].p_value < 1e-3 < ranks[1].p_value  # what nobody sees is drawn from the prior


def test_a_summed_site_is_calibrated_with_ties_broken_at_random():
    torch.manual_seed(0)
    found = sbc(Mixture(3, 2), Empty(), 600, 59)
    assert found.ranks["y"].shape == (600, 1)
    assert found.p_value > 0.01
    assert set(found.regions) == {"distance"}


class MixtureGuide(nn.Module):
    """Proposes y from wrong probabilities: all three alike, whatever x is."""

    def forward(self, batch):
        with pyro.plate("data", len(batch)):
            pyro.sample("y", dist.Categorical(torch.ones(3) / 3))


def test_a_wrong_classifier_is_seen():
    torch.manual_seed(0)
    program = Mixture(3, 2)
    with torch.no_grad():
        program.logits.copy_(torch.tensor([2.0, 0.0, -1.0]))
    assert sbc(program, MixtureGuide(), 600, 59).p_values["y"][0] < 1e-4
    assert sbc(program, MixtureGuide(), 600, 59, importance=True).p_values["y"][0] > 1e-3


# ---- guides that are wrong --------------------------------------------------------------------------


@pytest.mark.parametrize(("stretch", "shift"), [(0.5, 0.0), (1.0, 0.6), (1.8, 0.0)])
def test_a_wrong_guide_is_seen_and_covers_what_theory_says(stretch, shift):
    found = sbc(Pair(), PairGuide(stretch, shift), 600)
    assert bool((found.p_values["z"] < 1e-4).all())
    assert bool((found.band_p_values["z"] < 1e-3).all())
    assert found.p_value < 1e-2
    for level in (0.5, 0.9):
        exact = covered(level, stretch, shift)
        error = (exact * (1 - exact) / 1200) ** 0.5
        assert abs(found.coverage_at(level) - exact) < 4 * error + 0.01
    grid, low, high = found.bands()
    lines = found.ecdf_differences(grid)["z"]
    assert bool(((lines < low) | (lines > high)).any(1).all())
    if shift == 0:  # the ball of two dimensions: a chi-square with two degrees of freedom
        regions = found.region_coverage["density"]
        exact = 1 - (1 - found.levels) ** (stretch**2)
        assert np.abs(regions - exact).max() < 4 * 0.5 / 600**0.5 + 0.01


def test_importance_weights_repair_a_wide_guide():
    wide = PairGuide(1.8, 0.3)
    assert sbc(Pair(), wide, 300, 19).p_value < 1e-3
    assert sbc(Pair(), wide, 300, 19, importance=True).p_value > 0.01


def test_correlations_that_marginal_ranks_miss():
    """Right margins, wrong correlation: only the regions see it."""
    rng = np.random.default_rng(0)
    mix = np.linalg.cholesky([[1.0, 0.95], [0.95, 1.0]])
    truth, draws = rng.standard_normal((3000, 2)) @ mix.T, rng.standard_normal((49, 3000, 2))
    marginal = uniformity.rank(truth, draws)
    assert uniformity.chi_square(marginal, 49).min() > 0.01
    together = uniformity.tarp_ranks(truth, draws)
    assert uniformity.chi_square(together[:, None], 49)[0] < 1e-4


# ---- sites that all rows share ----------------------------------------------------------------------


class Shared(nn.Module):
    """mu ~ N(0, 2^2), w_n ~ N(mu, 1), x_n ~ N(w_n, 1)."""

    def forward(self, batch):
        mu = pyro.sample("mu", dist.Normal(torch.zeros(()), 2.0))
        with pyro.plate("data", len(batch)):
            w = pyro.sample("w", dist.Normal(mu, 1.0))
            pyro.sample("x", dist.Normal(w, 1.0))


class SharedGuide(nn.Module):
    def __init__(self, x, stretch):
        super().__init__()
        precision = 0.25 + len(x) / 2
        self.loc, self.scale = x.sum() / 2 / precision, stretch * precision**-0.5

    def forward(self, batch):
        mu = pyro.sample("mu", dist.Normal(self.loc, self.scale))
        with pyro.plate("data", len(batch)):
            pyro.sample("w", dist.Normal((mu + batch["x"]) / 2, 0.5**0.5))


class SharedAmortized(nn.Module):
    """The same for any data: it reads them all."""

    def __init__(self, stretch):
        super().__init__()
        self.stretch = stretch

    def forward(self, batch):
        return SharedGuide(batch["x"], self.stretch)(batch)


def test_shared_sites_are_looked_at_data_set_by_data_set():
    data, fits = {"x": torch.zeros(5)}, []

    def refit(batch):
        fits.append(len(batch))
        return SharedGuide(batch["x"], 1.0)

    found = sbc(Shared(), None, 40, 19, data=data, refit=refit)
    assert fits == [5] * 40
    assert found.ranks["mu"].shape == (40, 1)
    assert found.p_value > 0.01
    narrow = sbc(Shared(), SharedAmortized(0.2), 60, 19, data=data, seed=1)
    assert narrow.p_value < 1e-2
    assert sbc(Shared(), SharedAmortized(1.0), 60, 19, data=data, seed=1).p_value > 0.01
    local = sbc(Shared(), None, 5, 9, data=data, refit=refit, sites=["w"])
    assert local.ranks["w"].shape == (5, 1)
    with pytest.raises(ValueError, match="how many rows a data set has"):
        sbc(Shared(), PairGuide(), 10)


# ---- what is refused --------------------------------------------------------------------------------


def weighed(batch):
    with pyro.plate("data", len(batch)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("f", -(z**2))
        pyro.sample("x", dist.Normal(z, 1.0))


def test_what_is_refused():
    with pytest.raises(ValueError, match="refit"):
        sbc(Pair(), None)
    with pytest.raises(ValueError, match="'f' is a factor"):
        sbc(weighed, PairGuide())
    with pytest.raises(ValueError, match="'w' is no latent site"):
        sbc(Pair(), PairGuide(), sites=["w"])
    with pytest.raises(ValueError, match="'w' is not a site"):
        sbc(Pair(), PairGuide(), observed=["w"])
    with pytest.raises(ValueError, match="num_draws"):
        sbc(Pair(), PairGuide(), 10, 0)
    with pytest.raises(ValueError, match="seed"):
        sbc(Pair(), PairGuide(), seed=0.5)
    with pytest.raises(ValueError, match="no latent site"):
        sbc(Mixture(), Empty(), observed=["x", "y"])
    with pytest.raises(ValueError, match="level"):
        uniformity.band(10, 9, 1.0)
