"""Programs that cannot do with a dimension of draws: draws go one by one, with the same results."""

import functools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.ops.indexing import Vindex
from torch import nn

from pyrozoo import zoo
from pyrozoo.guides import Amortized
from pyrozoo.inference import (
    IWELBO,
    Effort,
    EnumELBO,
    ReweightedWakeSleep,
    compare,
    fit,
    log_evidence,
    nuts,
    pair,
    posterior,
    predict,
    responsibilities,
    to_arviz,
)
from pyrozoo.inference.batch import Batch
from pyrozoo.inference.bounds.runs import one_by_one
from pyrozoo.inference.comparison.importance import joint_log_weights
from pyrozoo.inference.modes import seeded
from pyrozoo.zoo import datasets


class Means(nn.Module):
    """Two means that all rows share; a row has one of them."""

    def __init__(self, index):
        super().__init__()
        self.index = index

    def forward(self, batch):
        mu = pyro.sample("mu", dist.Normal(torch.tensor([-2.0, 2.0]), 1.0).to_event(1))
        with pyro.plate("data", len(batch)):
            k = pyro.sample("k", dist.Categorical(torch.tensor([0.3, 0.7])))
            pyro.sample("x", dist.Normal(self.index(mu, k), 0.5))


def sticks(right):
    def program(batch):
        with pyro.plate("sticks", 2):
            v = pyro.sample("v", dist.Beta(1.0, 2.0))
        pad = torch.nn.functional.pad
        weights = pad(v, (0, 1), value=1.0) * pad(1 - v, (1, 0), value=1.0).cumprod(-1)
        with pyro.plate("data", len(batch)):
            if right:
                weights = weights.unsqueeze(-2)
            k = pyro.sample("k", dist.Categorical(weights))
            pyro.sample("x", dist.Normal(torch.tensor([-4.0, 0.0, 4.0])[k], 0.5))

    return program


def line(dim):
    def program(batch):
        with pyro.plate("data", len(batch)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            loc = torch.stack([z, 2 * z], dim)
            pyro.sample("x", dist.Normal(loc, 0.3).to_event(1))

    return program


def right(mu, k):
    return Vindex(mu)[..., k]


TWINS = {
    "x[..., k]": (Means(lambda mu, k: mu[..., k]), Means(right)),
    "x[k]": (Means(lambda mu, k: mu[k]), Means(right)),
    "weights": (sticks(False), sticks(True)),
    "dim=1": (line(1), line(-1)),
}
VALUES = {"dim=1": torch.randn(7, 2, generator=torch.Generator().manual_seed(0))}


def data(name):
    return {"x": VALUES.get(name, torch.tensor([-2.1, 1.8, 2.2, -1.7, 0.3, 2.0, 1.1]))}


@functools.cache
def pairs(name):
    """The program that cannot, and the one that can, with the same guide."""
    wrong, good = TWINS[name]
    with seeded(0):  # whichever test asks first
        guide = Amortized(good, ["x"], hidden=(8,))
    fit(good, guide, data(name), epochs=60, lr=0.03, progress=False)
    return wrong, good, guide


@pytest.mark.parametrize("name", TWINS)
def test_it_is_found_out(name):
    wrong, good, guide = pairs(name)
    batch = Batch.of(data(name))
    before = torch.get_rng_state()
    assert one_by_one(pair(wrong, guide)[0], batch)
    assert not one_by_one(pair(good, guide)[0], batch)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
def test_sizes_that_coincide_do_not_hide_it(size):
    for program in (TWINS["x[k]"][0], TWINS["x[..., k]"][0]):
        guide = Amortized(program, ["x"], hidden=(8,))
        assert one_by_one(pair(program, guide)[0], Batch.of({"x": torch.randn(size)}))


@pytest.mark.parametrize("name", TWINS)
def test_bounds_and_terms_are_those_of_single_draws(name):
    wrong, good, guide = pairs(name)
    x, objective = data(name), functools.partial(EnumELBO, kl="sampled")
    for count in (2, 3, 7):
        torch.manual_seed(1)
        value = objective(count).loss(wrong, guide, x)
        torch.manual_seed(1)
        singles = [objective().loss(good, guide, x) for _ in range(count)]
        assert value == pytest.approx(sum(singles) / count, rel=1e-5)
        torch.manual_seed(1)
        terms = objective(count).terms(wrong, guide, x)
        shared = [float(t.detach()) / 7 for t in terms.values() if not t.dim()]
        total = sum(shared) + sum(float(t.detach().mean()) for t in terms.values() if t.dim())
        assert -total == pytest.approx(value, rel=1e-5)
    loss = objective(3).differentiable_loss(wrong, guide, x)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in guide.parameters())


@pytest.mark.parametrize("name", TWINS)
def test_posterior_and_predictions_agree(name):
    wrong, good, guide = pairs(name)
    x, count = data(name), 400
    found, right = (posterior(p, guide, x, count, predictive=True, seed=0) for p in (wrong, good))
    assert found.keys() == right.keys()
    for site, value in right.items():
        assert found[site].shape == value.shape
        error = value.float().std(0) / math.sqrt(count / 2)
        gap = (found[site].float().mean(0) - value.float().mean(0)).abs()
        assert (gap <= 5 * error + 0.02).all()
    means = [predict(p, guide, x, "x", num_samples=200, seed=0) for p in (wrong, good)]
    assert torch.allclose(*means, atol=0.25)
    if name != "dim=1":
        probs = [responsibilities(p, guide, x, "k", num_samples=200, seed=0) for p in (wrong, good)]
        assert probs[0].shape == probs[1].shape
        assert torch.allclose(*probs, atol=0.05)


def test_importance_resampling_one_by_one():
    wrong, _, guide = pairs("dim=1")
    x = data("dim=1")["x"]
    draws = posterior(wrong, guide, {"x": x}, 2000, importance=True, seed=0)["z"]
    variance = 1 / (1 + 5 / 0.09)
    mean = variance * (x[:, 0] + 2 * x[:, 1]) / 0.09
    assert draws.shape == (2000, 7)
    assert torch.allclose(draws.mean(0), mean, atol=0.05)
    again = predict(wrong, guide, {"x": x}, "x", num_samples=500, importance=True, seed=0)
    assert torch.allclose(again, torch.stack([mean, 2 * mean], -1), atol=0.1)


def test_evidence_one_by_one():
    wrong, _, guide = pairs("dim=1")
    x = data("dim=1")["x"]
    covariance = torch.tensor([[1.09, 2.0], [2.0, 4.09]])
    exact = dist.MultivariateNormal(torch.zeros(2), covariance).log_prob(x)
    found = log_evidence(wrong, guide, {"x": x}, 2000, seed=0)
    assert torch.allclose(found, exact, atol=0.1)


@pytest.mark.parametrize("name", ["x[..., k]", "x[k]", "weights"])
def test_joint_weights_one_by_one(name):
    wrong, good, guide = pairs(name)
    values = [joint_log_weights(p, guide, data(name), 500, seed=0) for p in (wrong, good)]
    assert values[0].shape == values[1].shape == (500,)
    ours, theirs = (v.logsumexp(0) - math.log(500) for v in values)
    assert ours == pytest.approx(float(theirs), abs=0.3)


@pytest.mark.parametrize("name", TWINS)
def test_everything_else_runs_on_them(name):
    wrong, _, guide = pairs(name)
    x = data(name)
    stored = to_arviz(wrong, guide, x, num_draws=20, seed=0)
    assert stored["posterior"].sizes["draw"] == 20
    effort = Effort(30, 5, 4, 5, sbc_datasets=8, sbc_draws=7, reference_rows=0)
    found = compare(
        wrong, {"own": functools.partial(Amortized, given=["x"], hidden=(8,))}, x, effort=effort,
        epochs=3, progress=False,
    )  # fmt: skip
    assert not found.cells[0].reason, found.cells[0].reason
    assert math.isfinite(found.records()[0]["elbo"])


@pytest.mark.parametrize("name", ["x[..., k]", "x[k]"])
def test_nuts_draws_what_is_summed(name):
    wrong, good, _ = pairs(name)
    x = data(name)
    found, right = (
        nuts(p, x, num_samples=150, warmup_steps=100, num_chains=1, seed=0) for p in (wrong, good)
    )
    assert found.draws["k"].shape == right.draws["k"].shape
    gap = found.draws["mu"].mean(0) - right.draws["mu"].mean(0)
    assert gap.abs().max() < 0.3
    assert (found.draws["k"].float().mean(0) - right.draws["k"].float().mean(0)).abs().max() < 0.2


@pytest.mark.parametrize(
    "objective", [IWELBO(4), IWELBO(4, gradient="dreg"), ReweightedWakeSleep(4)]
)
def test_objectives_that_need_all_draws_say_what_to_write(objective):
    wrong, _, guide = pairs("dim=1")
    with pytest.raises(ValueError, match=r"4 draws at once are not possible: .*; write .*dim=-1"):
        objective.differentiable_loss(wrong, guide, data("dim=1"))


@pytest.mark.parametrize("method", zoo.list_methods())
def test_no_method_of_the_catalogue_is_run_one_by_one(method):
    x = datasets.load("digits", split="train").x[:30]
    given = {"x_left": x[:, :32], "x_right": x[:, 32:]} if method == "mvae" else {"x": x}
    model = zoo.create(method, given)
    ready, _ = pair(model.program, model.guide)
    reason = one_by_one(ready, Batch.of(given))
    assert not reason


@pytest.mark.parametrize("family", ["mean_field", "full"])
def test_draws_at_the_edge_of_a_support_count_as_equal(family):
    def program(batch):
        with pyro.plate("data", len(batch)):
            p = pyro.sample("p", dist.Dirichlet(torch.ones(3)))
            u = pyro.sample("u", dist.Beta(torch.ones(()), 1.0))
            pyro.sample("x", dist.Normal(p * u.unsqueeze(-1), 0.2).to_event(1))

    x = torch.rand(20, 3)
    guide = Amortized(program, ["x"], hidden=(4,), family=family, init_scale=15.0)
    assert not one_by_one(pair(program, guide)[0], Batch.of({"x": x}))
