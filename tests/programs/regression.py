"""Regression with a slope per group and covariates that are missing here and there.

    mu ~ N(0, 1),  tau ~ HalfNormal(1),  b ~ N(0, 1)
    slope_g ~ N(mu, tau)                                     for every group g
    x_i ~ N(m, s)                                            two covariates
    y_i ~ N(slope_g(i) x_i1 + b x_i2, 0.3)

The covariates are a site, so that their missing entries are latent; the group of a row is an input.
"""

import pyro
import pyro.distributions as dist
import torch
from torch import nn

GROUPS = 5
INPUTS = ["group"]


class Regression(nn.Module):
    def __init__(self):
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(2))
        self.log_scale = nn.Parameter(torch.zeros(2))

    def forward(self, batch):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        tau = pyro.sample("tau", dist.HalfNormal(1.0))
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        with pyro.plate("groups", GROUPS):
            slope = pyro.sample("slope", dist.Normal(mu, tau))
        with pyro.plate("data", len(batch)):
            x = pyro.sample("x", dist.Normal(self.loc, self.log_scale.exp()).to_event(1))
            mean = slope[..., batch["group"]] * x[..., 0] + b * x[..., 1]
            pyro.sample("y", dist.Normal(mean, 0.3))


def simulate(rows, seed, missing=0.3):
    g = torch.Generator().manual_seed(seed)
    slope, b = torch.tensor([-1.0, 0.0, 0.5, 1.0, 2.0]), -1.0
    group = torch.randint(GROUPS, (rows,), generator=g)
    x = torch.tensor([0.5, -0.5]) + torch.randn(rows, 2, generator=g)
    y = slope[group] * x[:, 0] + b * x[:, 1] + 0.3 * torch.randn(rows, generator=g)
    present = torch.rand(rows, 2, generator=g) > missing
    return {"x": (x, present), "y": y, "group": group}, {"slope": slope, "b": b, "x": x}
