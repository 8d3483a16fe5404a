"""References by NUTS against closed forms and quadrature; errors are those of the effective draws."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyrozoo.inference.comparison import references
from pyrozoo.inference.comparison.references import nuts
from pyrozoo.inference.observing import observe

F64 = torch.float64


def agrees(draws, weights, values, ess):
    """Mean and standard deviation against those of a density on a grid, to 4.5 standard errors."""
    weights = weights / weights.sum()
    mean = (weights * values).sum()
    sd = (weights * (values - mean) ** 2).sum().sqrt()
    assert abs(draws.mean() - mean) < 4.5 * sd / math.sqrt(ess)
    fourth = (weights * (values - mean) ** 4).sum() / sd**4
    assert abs(draws.var() / sd**2 - 1) < 4.5 * ((fourth - 1) / ess).sqrt()


# ---- exact answers ----------------------------------------------------------------------------------


class Several(nn.Module):
    """A normal mean, a Poisson rate, and a uniform variable whose upper end is latent too."""

    def forward(self, batch):
        m = pyro.sample("m", dist.Normal(torch.zeros((), dtype=F64), 2.0))
        rate = pyro.sample("rate", dist.Gamma(2 * torch.ones((), dtype=F64), 1.0))
        end = pyro.sample("end", dist.Gamma(3 * torch.ones((), dtype=F64), 1.0))
        part = pyro.sample("part", dist.Uniform(torch.zeros((), dtype=F64), end))
        with pyro.plate("data", len(batch)):
            pyro.sample("x", dist.Normal(m, 1.0))
            pyro.sample("k", dist.Poisson(rate))
            pyro.sample("u", dist.Normal(part, 2.0))


def test_shared_sites_of_three_supports():
    torch.manual_seed(0)
    x, u = 1.0 + torch.randn(6, dtype=F64), 2.0 + torch.randn(6, dtype=F64)
    k = torch.tensor([3, 1, 4, 2, 2, 5])
    known = torch.arange(6) != 2
    data = {"x": (x, known), "k": k, "u": u}
    found = nuts(Several(), data, num_samples=150, warmup_steps=80, seed=3)
    assert found.divergences < 5
    assert max(found.r_hat.values()) < 1.05
    assert {n: v.shape for n, v in found.draws.items()} == dict.fromkeys(found.ess, (150,))
    ess = {n: min(v, 150.0) for n, v in found.ess.items()}
    assert min(ess.values()) > 30
    grid = torch.linspace(-6, 6, 4001, dtype=F64)
    density = dist.Normal(0.0, 2.0).log_prob(grid)
    density = density + dist.Normal(grid[:, None], 1.0).log_prob(x[known]).sum(1)
    agrees(found.draws["m"], density.exp(), grid, ess["m"])
    grid = torch.linspace(1e-3, 12, 4001, dtype=F64)
    density = dist.Gamma(2.0 + k.sum(), 7.0).log_prob(grid)
    agrees(found.draws["rate"], density.exp(), grid, ess["rate"])
    end = torch.linspace(0.005, 20, 1500, dtype=F64)[:, None]
    part = torch.linspace(0.005, 20, 1500, dtype=F64)
    density = dist.Gamma(3.0, 1.0).log_prob(end) - end.log()
    density = density + dist.Normal(part[:, None], 2.0).log_prob(u).sum(1)
    joint = density.exp() * (part < end)
    agrees(found.draws["end"], joint.sum(1), end[:, 0], ess["end"])
    agrees(found.draws["part"], joint.sum(0), part, ess["part"])
    assert bool((found.draws["part"] < found.draws["end"]).all())


class Two(nn.Module):
    """y ~ Bernoulli(0.6), z | y ~ N(2 y - 1, 0.7), x | z, y ~ N(z, 1 + y): two components."""

    def forward(self, batch):
        with pyro.plate("data", len(batch)):
            y = pyro.sample("y", dist.Bernoulli(torch.tensor(0.6, dtype=F64)))
            z = pyro.sample("z", dist.Normal(2 * y - 1, 0.7))
            pyro.sample("x", dist.Normal(z, 1 + y))


def test_a_summed_label_and_its_draws_given_the_others():
    x = torch.tensor([-1.0, 0.3, 2.0, 5.0], dtype=F64)
    data = {"x": (x, torch.tensor([True, True, True, False]))}
    found = nuts(Two(), data, num_samples=100, warmup_steps=60, num_chains=2, seed=1)
    assert found.num_chains == 2
    assert found.r_hat["z"] < 1.05
    z, y = found.draws["z"], found.draws["y"]
    assert z.shape == y.shape == (200, 4)
    ess = min(found.ess["z"], 200.0)
    assert ess > 60
    grid = torch.linspace(-7, 9, 4001, dtype=F64)
    for row in range(4):
        joint = torch.stack([
            math.log(p) + dist.Normal(2.0 * k - 1, 0.7).log_prob(grid)
            + (dist.Normal(grid, 1.0 + k).log_prob(x[row]) if row != 3 else 0.0)
            for k, p in ((0, 0.4), (1, 0.6))
        ]).exp()  # fmt: skip
        agrees(z[:, row], joint.sum(0), grid, ess)
        share = float(joint[1].sum() / joint.sum())
        error = math.sqrt(share * (1 - share) / ess)
        assert abs(float(y[:, row].mean()) - share) <= 4.5 * error
        both = float((joint[1] * grid).sum() / joint.sum())  # E[y z]: the two are drawn together
        spread = float((joint[1] * grid**2).sum() / joint.sum()) - both**2
        assert abs(float((y * z)[:, row].mean()) - both) <= 4.5 * math.sqrt(spread / ess)


def test_a_label_that_some_rows_know():
    x, y = torch.tensor([-1.0, 0.3, 2.0], dtype=F64), torch.tensor([1.0, 0.0, 0.0])
    known = torch.tensor([True, False, True])
    p = observe(Two())
    batch = p.pairing.prepare({"x": x, "y": (y, known)})
    z = torch.tensor([0.4, -0.2, 1.0], dtype=F64)
    joint = torch.stack([
        math.log(p) + dist.Normal(2.0 * k - 1, 0.7).log_prob(z)
        + dist.Normal(z, 1.0 + k).log_prob(x) for k, p in ((0, 0.4), (1, 0.6))
    ])  # fmt: skip
    exact = -(joint[1, 0] + joint[:, 1].logsumexp(0) + joint[0, 2])
    found = references._energy(p, batch, p.pairing.plan(batch), {"z": z})
    torch.testing.assert_close(found, exact)
    draws = nuts(Two(), {"x": x, "y": (y, known)}, num_samples=12, warmup_steps=6).draws["y"]
    assert bool((draws[:, known] == y[known]).all())
    assert len(draws[:, 1].unique()) == 2


def test_eight_schools():
    """Rubin, "Estimation in parallel randomized experiments" (1981), as in Bayesian Data Analysis.

    Priors N(0, 5) of the mean and half-Cauchy(5) of tau, as in Stan's case study; the posterior of
    the two is found by quadrature, and has means 4.4 and 3.6.
    """
    y = torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12], dtype=F64)
    sigma = torch.tensor([15.0, 10, 16, 11, 9, 11, 10, 18], dtype=F64)

    def schools(batch):
        error = batch["sigma"] if "sigma" in batch.names else torch.ones(len(batch), dtype=F64)
        mu = pyro.sample("mu", dist.Normal(torch.zeros((), dtype=F64), 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(5 * torch.ones((), dtype=F64)))
        with pyro.plate("data", len(batch)):
            effect = pyro.sample("effect", dist.Normal(torch.zeros((), dtype=F64), 1.0))
            pyro.sample("y", dist.Normal(mu + tau * effect, error))

    data = {"y": y, "sigma": sigma}
    found = nuts(schools, data, num_samples=150, warmup_steps=100, inputs=["sigma"], seed=2)
    mu = torch.linspace(-25, 35, 601, dtype=F64)[:, None]
    tau = torch.linspace(0.02, 80, 4000, dtype=F64)
    density = dist.Normal(0.0, 5.0).log_prob(mu) + dist.HalfCauchy(5.0).log_prob(tau)
    for value, error in zip(y, sigma, strict=True):
        density = density + dist.Normal(mu, (tau**2 + error**2).sqrt()).log_prob(value)
    weights = density.exp()
    assert abs(float((weights * mu).sum() / weights.sum()) - 4.4) < 0.1
    assert abs(float((weights * tau).sum() / weights.sum()) - 3.6) < 0.1
    agrees(found.draws["mu"], weights.sum(1), mu[:, 0], min(found.ess["mu"], 150.0))
    ess = min(found.ess["tau"], 150.0)
    mean = float((weights * tau).sum() / weights.sum())
    sd = math.sqrt(float((weights * (tau - mean) ** 2).sum() / weights.sum()))
    assert abs(float(found.draws["tau"].mean()) - mean) < 4.5 * sd / math.sqrt(ess)
    assert found.draws["effect"].shape == (150, 8)
    assert found.divergences < 10


def test_finite_sites_alone_are_drawn_exactly():
    def change(batch):
        when = pyro.sample("when", dist.Categorical(torch.ones(4, dtype=F64) / 4))
        with pyro.plate("data", len(batch)):
            step = (torch.arange(len(batch)) >= when).double()
            kind = pyro.sample("kind", dist.Bernoulli(torch.tensor(0.3, dtype=F64)))
            pyro.sample("x", dist.Normal(step + kind, 1.0))

    x = torch.tensor([0.2, -0.5, 0.3, 1.4, 0.8, 1.9], dtype=F64)
    found = nuts(change, {"x": x}, num_samples=4000, warmup_steps=0)
    assert found.r_hat == {}
    step = (torch.arange(6) >= torch.arange(4)[:, None]).double()
    by_kind = torch.stack([
        math.log(p) + dist.Normal(step + k, 1.0).log_prob(x) for k, p in ((0, 0.7), (1, 0.3))
    ])  # fmt: skip
    when = by_kind.logsumexp(0).sum(1).softmax(0)
    often = torch.nn.functional.one_hot(found.draws["when"], 4).double().mean(0)
    torch.testing.assert_close(often, when, rtol=0, atol=4.5 * 0.5 / math.sqrt(4000))
    kind = (by_kind.softmax(0)[1] * when[:, None]).sum(0)
    assert found.draws["kind"].shape == (4000, 6)
    torch.testing.assert_close(
        found.draws["kind"].mean(0), kind, rtol=0, atol=4.5 * 0.5 / math.sqrt(4000)
    )


def test_factors_that_disagree_by_far_are_summed_without_loss():
    """Four factors that prefer different values by 120 nats: Pyro's pairwise sums are infinite."""
    shift = math.sqrt(240.0)

    def program(batch):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(batch)):
            y = pyro.sample("y", dist.Bernoulli(0.5))
            for i in range(4):
                loc = shift * (y if i < 2 else 1 - y)
                pyro.sample(f"x_{i}", dist.Normal(loc + a, 1.0))

    p = observe(program)
    batch = p.pairing.prepare({f"x_{i}": torch.zeros(3) for i in range(4)})
    a = torch.tensor(0.1, requires_grad=True)
    energy = references._energy(p, batch, p.pairing.plan(batch), {"a": a})
    (found,) = torch.autograd.grad(energy, a)
    b = a.detach().double().requires_grad_()
    zero = torch.zeros((), dtype=F64)
    by_class = [
        math.log(0.5)
        + sum(
            dist.Normal(shift * (k if i < 2 else 1 - k) + b, 1.0).log_prob(zero) for i in range(4)
        )
        for k in (0, 1)
    ]
    exact = -3 * torch.stack(by_class).logsumexp(0) - dist.Normal(0.0, 1.0).log_prob(b)
    (gradient,) = torch.autograd.grad(exact, b)
    torch.testing.assert_close(energy.double(), exact, rtol=1e-6, atol=0)
    torch.testing.assert_close(found.double(), gradient, rtol=1e-5, atol=0)


# ---- shapes, seeds ----------------------------------------------------------------------------------


class Plated(nn.Module):
    """Shared sites in a plate of their own, a simplex, states of the sensors of a row."""

    def forward(self, batch):
        with pyro.plate("topics", 3, dim=-2):
            pyro.sample("a", dist.Dirichlet(torch.ones(2)))
        with pyro.plate("data", len(batch), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            with pyro.plate("sensors", 4, dim=-2):
                y = pyro.sample("y", dist.Bernoulli(0.3))
                pyro.sample("x", dist.Normal(z.sum(-1) + y, 0.5))


def test_shapes_are_those_of_posterior_and_seeds_repeat():
    torch.manual_seed(0)
    data, options = {"x": torch.randn(5, 4)}, {"num_samples": 6, "warmup_steps": 4}
    state = torch.get_rng_state()
    found = nuts(Plated(), data, seed=1, **options)
    again = nuts(Plated(), data, seed=1, **options)
    other = nuts(Plated(), data, seed=2, **options)
    assert torch.equal(torch.get_rng_state(), state)
    shapes = {name: tuple(value.shape) for name, value in found.draws.items()}
    assert shapes == {"a": (6, 3, 2), "z": (6, 5, 2), "y": (6, 5, 4)}
    torch.testing.assert_close(found.draws["a"].sum(-1), torch.ones(6, 3))
    assert all(torch.equal(found.draws[n], again.draws[n]) for n in shapes)
    assert not torch.equal(found.draws["z"], other.draws["z"])
    assert not any(value.requires_grad for value in found.draws.values())


# ---- what is refused --------------------------------------------------------------------------------


class Below(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def forward(self, batch):
        with pyro.plate("data", len(batch)):
            if self.kind == "count":
                z = pyro.sample("z", dist.Poisson(3.0))
            elif self.kind == "sequential":
                z = pyro.sample("z", dist.Bernoulli(0.4), infer={"enumerate": "sequential"})
            elif self.kind == "support":
                y = pyro.sample("y", dist.Bernoulli(0.4))
                z = pyro.sample("z", dist.Uniform(0.0, 1 + y))
            else:
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0))


def test_what_is_refused():
    x = torch.randn(4)
    with pytest.raises(ValueError, match=r"'z' \(Poisson\) is discrete and has no finite support"):
        nuts(Below("count"), {"x": x})
    with pytest.raises(ValueError, match="'z' is enumerated one value at a time"):
        nuts(Below("sequential"), {"x": x})
    with pytest.raises(
        ValueError, match="the support of site 'z' depends on a site that is summed"
    ):
        nuts(Below("support"), {"x": x})
    known = torch.tensor([True, False, True, False])
    with pytest.raises(ValueError, match="'z' is continuous, has others below it and is known in"):
        nuts(Below(""), {"x": x, "z": (x, known)})
    with pytest.raises(ValueError, match="no rows"):
        nuts(Below(""), {"x": x[:0]})
    with pytest.raises(ValueError, match="num_samples is at least 4"):
        nuts(Below(""), {"x": x}, num_samples=3)
    with pytest.raises(ValueError, match="not a site"):
        nuts(Below(""), {"v": x})
