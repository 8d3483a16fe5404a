"""A straight line through points whose abscissae are measured with noise.

    a, b ~ N(0, 2),  u_i ~ N(0, 1),  x_i ~ N(u_i, 0.7),  y_i ~ N(a + b u_i, 0.3)

Least squares of y on x finds a slope that is too small, by the factor 1 / (1 + 0.7^2).
"""

import pyro
import pyro.distributions as dist
import torch


def program(batch):
    a = pyro.sample("a", dist.Normal(0.0, 2.0))
    b = pyro.sample("b", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(batch)):
        u = pyro.sample("u", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(u, 0.7))
        pyro.sample("y", dist.Normal(a + b * u, 0.3))


def simulate(rows, seed):
    g = torch.Generator().manual_seed(seed)
    u = torch.randn(rows, generator=g)
    x = u + 0.7 * torch.randn(rows, generator=g)
    y = 0.5 + 1.5 * u + 0.3 * torch.randn(rows, generator=g)
    return {"x": x, "y": y}, {"a": 0.5, "b": 1.5, "u": u}


def log_posterior(data, a, b):
    """Log p(a, b, x, y) on a grid: x and y are jointly normal."""
    prior = dist.Normal(0.0, 2.0)
    x, y = data["x"], data["y"]
    var_x, var_y, cov = 1.49, b**2 + 0.09, b
    mean = a.unsqueeze(-1) + (cov / var_x).unsqueeze(-1) * x
    left = (var_y - cov**2 / var_x).sqrt().unsqueeze(-1)
    return prior.log_prob(a) + prior.log_prob(b) + dist.Normal(mean, left).log_prob(y).sum(-1)
