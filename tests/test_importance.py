"""Importance weights of rows and of everything, and their bounds, against exact answers."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from cases import Empty, Globals, GlobalsGuide, Mixture
from test_evidence import Exact, Sensors, SensorsGuide, factor_analysis, small_m2, small_vade
from torch import nn

from pyrozoo.guides import Mean
from pyrozoo.inference import Batch, EnumELBO, log_evidence
from pyrozoo.inference.comparison.psis import (
    importance_weights,
    iwae_bounds,
    joint_log_weights,
    pareto_khat,
)

# ---- weights of rows --------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [small_vade, small_m2])
def test_the_mean_weight_is_the_evidence_draw_for_draw(make):
    program, guide, x = make()
    known = torch.tensor([True, False, True, False, True])
    data = {"x": x, "y": (torch.tensor([0, 2, 1, 1, 0]), known)}
    weights = importance_weights(program, guide, data, 60, chunk_size=70, seed=5)
    assert weights.shape == (60, 5)
    found = weights.logsumexp(0) - math.log(60)
    right = log_evidence(program, guide, data, 60, chunk_size=70, seed=5)
    torch.testing.assert_close(found, right, atol=1e-12, rtol=1e-12)
    small = importance_weights(program, guide, data, 60, chunk_size=7, batch_size=2)
    assert small.shape == (60, 5)
    assert len(small.unique()) == small.numel()


def test_an_exact_proposal_has_weights_that_are_all_the_evidence():
    program = factor_analysis()
    x = torch.randn(6, 5, dtype=torch.float64)
    weights = importance_weights(program, Exact(program), {"x": x}, 100)
    exact = program.evidence(Batch.of({"x": x})).detach()
    torch.testing.assert_close(weights, exact.expand(100, 6))
    assert bool((pareto_khat(weights) == -torch.inf).all())
    narrow = importance_weights(program, Exact(program, 0.6), {"x": x}, 1000)
    wide = importance_weights(program, Exact(program, 1.3), {"x": x}, 1000)
    assert pareto_khat(narrow).mean() > 0.4 > 0 > pareto_khat(wide).mean()


def test_weights_of_a_mixture_need_no_draws():
    torch.manual_seed(0)
    program, x = Mixture().double(), torch.randn(5, 4, dtype=torch.float64)
    weights = importance_weights(program, Empty(), {"x": x}, 3)
    exact = program.evidence(Batch.of({"x": x})).detach()
    torch.testing.assert_close(weights, exact.expand(3, 5))


# ---- bounds -----------------------------------------------------------------------------------------


def test_bounds_and_their_errors():
    torch.manual_seed(0)
    weights = torch.randn(40, 7, dtype=torch.float64)
    found = iwae_bounds(weights, (1, 8, 15, 100))
    assert set(found) == {1, 8, 15}
    assert found[1] == pytest.approx((weights.mean().item(), weights.mean(0).std().item() / 7**0.5))
    blocks = torch.stack([weights[i : i + 15].logsumexp(0) - math.log(15) for i in (0, 15)])
    assert found[15][0] == pytest.approx(blocks.mean().item())
    error = (blocks.var(0).sum() / 2).sqrt().item() / 7
    assert iwae_bounds(weights, [15], over="draws")[15][1] == pytest.approx(error)
    alone = iwae_bounds(weights[:, 0], [1, 40])
    assert alone[1][1] == pytest.approx(weights[:, 0].std().item() / 40**0.5)
    assert math.isnan(alone[40][1])
    with pytest.raises(ValueError, match="fewer than any"):
        iwae_bounds(weights, [50])
    with pytest.raises(ValueError, match="'rows' or 'draws'"):
        iwae_bounds(weights, over="both")


def test_bounds_of_log_normal_weights_are_known_and_errors_have_the_right_size():
    generator = torch.Generator().manual_seed(0)
    pairs = []
    for _ in range(60):
        weights = torch.randn(50, 20, generator=generator, dtype=torch.float64) - 0.5
        one, ten = (iwae_bounds(weights, [1, 10], over="draws")[k] for k in (1, 10))
        assert one[0] < ten[0] < 0.05
        pairs.append((one[0] + 0.5) / one[1])
    assert 0.7 < np.std(pairs) < 1.3
    assert abs(np.mean(pairs)) < 0.5


# ---- weights of everything --------------------------------------------------------------------------


def test_joint_weights_are_the_sum_of_those_of_the_rows_where_rows_share_nothing():
    program = factor_analysis()
    x = torch.randn(6, 5, dtype=torch.float64)
    exact = program.evidence(Batch.of({"x": x})).sum().detach()
    for size in (None, 1, 13):
        found = joint_log_weights(program, Exact(program), {"x": x}, 11, chunk_size=size)
        torch.testing.assert_close(found, exact.expand(11))
    rows = importance_weights(program, Exact(program, 1.2), {"x": x}, 9, chunk_size=1000, seed=2)
    found = joint_log_weights(program, Exact(program, 1.2), {"x": x}, 9, chunk_size=1000, seed=2)
    torch.testing.assert_close(found, rows.sum(1))


def test_joint_weights_with_shared_sites_are_those_of_pyro_draw_by_draw():
    torch.manual_seed(0)
    program, guide = Globals().double(), GlobalsGuide().double()
    x = torch.randn(7, 4, dtype=torch.float64)
    drawn = torch.randn(5, 3, 4, dtype=torch.float64)
    found = joint_log_weights(program, guide, {"x": x}, 400, chunk_size=7)
    for value in drawn:  # the weight at one point, by hand, is what the estimate averages
        by_class = dist.Normal(value, 0.7).to_event(1).log_prob(x.unsqueeze(1))
        rows = (by_class + program.logits.log_softmax(-1)).logsumexp(-1)
        prior = dist.Normal(0.0, program.spread.exp()).log_prob(value).sum()
        q = dist.Normal(guide.loc, guide.log_scale.exp()).log_prob(value).sum()
        fixed = Fixed(guide, value)
        weight = joint_log_weights(program, fixed, {"x": x}, 3)
        torch.testing.assert_close(weight, (rows.sum() + prior - q).detach().expand(3))
    bounds = [-7 * EnumELBO(400, kl="sampled").loss(program, guide, {"x": x}) for _ in range(3)]
    assert abs(found.mean() - np.mean(bounds)) < 5 * found.std() / 400**0.5


class Fixed(nn.Module):
    """Draws one value, with the density that another guide has there."""

    def __init__(self, guide, value):
        super().__init__()
        self.guide, self.value = guide, value

    def forward(self, batch):
        fn = dist.Normal(self.guide.loc, self.guide.log_scale.exp()).to_event(2)
        zero = torch.zeros((), dtype=torch.float64)
        a = pyro.sample("a", dist.Normal(zero, 1.0).mask(False), infer={"is_auxiliary": True})
        density = fn.log_prob(self.value) + 0 * a
        value = self.value + 0 * a[..., None, None]
        pyro.sample("means", dist.Delta(value, density, event_dim=2))


class Conjugate(nn.Module):
    """mu ~ N(0, 2^2), x_n | mu ~ N(mu, 1)."""

    def forward(self, batch):
        mu = pyro.sample("mu", dist.Normal(torch.zeros(()).double(), 2.0))
        with pyro.plate("data", len(batch)):
            pyro.sample("x", dist.Normal(mu, 1.0))


class ConjugateGuide(nn.Module):
    def __init__(self, stretch=1.0):
        super().__init__()
        self.stretch = stretch

    def forward(self, batch):
        precision = 0.25 + len(batch)
        pyro.sample("mu", dist.Normal(batch["x"].sum() / precision, self.stretch * precision**-0.5))


def test_joint_weights_of_a_conjugate_program_are_its_evidence():
    x = torch.randn(8, dtype=torch.float64) + 1
    cov = torch.eye(8).double() + 4
    exact = dist.MultivariateNormal(torch.zeros(8).double(), cov).log_prob(x)
    found = joint_log_weights(Conjugate(), ConjugateGuide(), {"x": x}, 30)
    torch.testing.assert_close(found, exact.expand(30))
    wide = joint_log_weights(Conjugate(), ConjugateGuide(1.5), {"x": x}, 20_000)
    assert abs(wide.logsumexp(0) - math.log(20_000) - exact) < 0.03
    assert pareto_khat(wide) < 0
    with pytest.raises(ValueError, match="'mu' is shared by all rows"):
        importance_weights(Conjugate(), ConjugateGuide(), {"x": x}, 3)


class Chain(nn.Module):
    """A hidden Markov chain of five steps in each row, its start shared by all: exact by hand."""

    def forward(self, batch):
        start = pyro.sample("start", dist.Normal(torch.zeros(()).double(), 1.0))
        stay = torch.tensor([[0.9, 0.1], [0.3, 0.7]]).double()
        with pyro.plate("data", len(batch)):
            y = torch.zeros((), dtype=torch.long)
            for t in pyro.markov(range(3)):
                enumerated = {"enumerate": "parallel"}
                y = pyro.sample(f"y_{t}", dist.Categorical(stay[y]), infer=enumerated)
                pyro.sample(f"x_{t}", dist.Normal(start + y, 1.0))


class ChainGuide(nn.Module):
    def forward(self, batch):
        pyro.sample("start", dist.Normal(torch.tensor(0.3).double(), 0.8))


def test_joint_weights_outside_the_class_of_the_bound():
    x = torch.randn(4, 3, dtype=torch.float64)
    data = {f"x_{t}": x[:, t] for t in range(3)}
    found = joint_log_weights(Chain(), ChainGuide(), data, 25, seed=1)
    stay = torch.tensor([[0.9, 0.1], [0.3, 0.7]]).double()
    torch.manual_seed(1)
    for weight in found:
        start = 0.3 + 0.8 * torch.randn((), dtype=torch.float64)
        states = torch.arange(2).double()
        paths = torch.zeros(4, dtype=torch.float64)
        for path in torch.cartesian_prod(*[torch.arange(2)] * 3):
            before, joint = 0, torch.ones(4).double()
            for t, y in enumerate(path):
                joint = joint * stay[before, y]
                joint = joint * dist.Normal(start + states[y], 1.0).log_prob(x[:, t]).exp()
                before = y
            paths = paths + joint
        own = dist.Normal(0.0, 1.0).log_prob(start) - dist.Normal(0.3, 0.8).log_prob(start)
        torch.testing.assert_close(weight, paths.log().sum() + own)
    with pytest.raises(ValueError, match="is scaled"):
        joint_log_weights(poutine.scale(Chain(), scale=2.0), ChainGuide(), data, 2)


def test_plates_within_the_rows_have_joint_weights_too():
    torch.manual_seed(3)
    program, x = Sensors(), torch.randn(5, 4, dtype=torch.float64)
    data = {"x": x}
    rows = importance_weights(program, SensorsGuide(False), data, 6, chunk_size=100)
    found = joint_log_weights(program, SensorsGuide(False), data, 6, chunk_size=100)
    torch.testing.assert_close(found, rows.sum(1))


def test_what_is_refused():
    program, guide, x = small_vade()
    with pytest.raises(ValueError, match="'z' as a point mass"):
        joint_log_weights(program, Mean(guide), {"x": x}, 2)
    with pytest.raises(ValueError, match="seed"):
        joint_log_weights(program, guide, {"x": x}, 2, seed=0.5)
    with pytest.raises(ValueError, match="num_particles"):
        importance_weights(program, guide, {"x": x}, 0)
