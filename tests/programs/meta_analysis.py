"""A meta-analysis with random effects: one study a row, with its known standard error.

    mu ~ N(0, 5),  tau ~ HalfNormal(5),  theta_i ~ N(mu, tau),  effect_i ~ N(theta_i, se_i)

The standard errors are inputs.
"""

import pyro
import pyro.distributions as dist
import torch

INPUTS = ["se"]


def program(batch):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfNormal(5.0))
    with pyro.plate("data", len(batch)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("effect", dist.Normal(theta, batch["se"]))


def simulate(rows, seed, mu=2.0, tau=1.0):
    g = torch.Generator().manual_seed(seed)
    se = 0.5 + torch.rand(rows, generator=g)
    theta = mu + tau * torch.randn(rows, generator=g)
    effect = theta + se * torch.randn(rows, generator=g)
    return {"effect": effect, "se": se}, {"mu": mu, "tau": tau, "theta": theta}


def exact_means(data):
    """Posterior means of mu and tau by quadrature."""
    mu, tau = torch.meshgrid(
        torch.linspace(-3, 7, 401), torch.linspace(0.005, 6, 400), indexing="ij"
    )
    scale = (tau.unsqueeze(-1) ** 2 + data["se"] ** 2).sqrt()
    log_p = dist.Normal(mu.unsqueeze(-1), scale).log_prob(data["effect"]).sum(-1)
    log_p = log_p + dist.Normal(0.0, 5.0).log_prob(mu) + dist.HalfNormal(5.0).log_prob(tau)
    weight = (log_p - log_p.logsumexp((0, 1))).exp()
    return float((weight * mu).sum()), float((weight * tau).sum())
