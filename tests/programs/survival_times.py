"""Weibull survival times, some of which are censored: known only to be longer than the follow-up.

    b ~ N(0, 1),  shape ~ LogNormal(0, 0.5),  t_i ~ Weibull(exp(b c_i), shape)

In ``factored`` a censored row adds the log of its survival function as a factor; in ``program`` a
distribution of its own knows which rows are censored.
"""

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine

INPUTS = ["c", "censored"]


class CensoredWeibull(dist.Weibull):
    """Log-density of a time, or log-probability of a longer one where it is censored."""

    def __init__(self, scale, concentration, censored):
        super().__init__(scale, concentration)
        self.censored = censored

    def expand(self, batch_shape, _instance=None):
        scale, shape = self.scale.expand(batch_shape), self.concentration.expand(batch_shape)
        return CensoredWeibull(scale, shape, self.censored)

    def log_prob(self, value):
        survival = -((value / self.scale) ** self.concentration)
        return torch.where(self.censored, survival, super().log_prob(value))


def program(batch):
    b = pyro.sample("b", dist.Normal(0.0, 1.0))
    shape = pyro.sample("shape", dist.LogNormal(0.0, 0.5))
    with pyro.plate("data", len(batch)):
        scale = (b * batch["c"]).exp()
        pyro.sample("t", CensoredWeibull(scale, shape, batch["censored"].bool()))


def factored(batch):
    b = pyro.sample("b", dist.Normal(0.0, 1.0))
    shape = pyro.sample("shape", dist.LogNormal(0.0, 0.5))
    censored = batch["censored"].bool()
    with pyro.plate("data", len(batch)):
        scale = (b * batch["c"]).exp()
        with poutine.mask(mask=~censored):
            pyro.sample("t", dist.Weibull(scale, shape))
        with poutine.mask(mask=censored):
            pyro.factor("longer", -((batch["followed"] / scale) ** shape))


def simulate(rows, seed):
    g = torch.Generator().manual_seed(seed)
    c = torch.randn(rows, generator=g)
    b, shape = 0.8, 1.5
    time = (b * c).exp() * (-torch.rand(rows, generator=g).log()) ** (1 / shape)
    end = 2 * torch.rand(rows, generator=g)
    t = torch.minimum(time, end).clamp(min=1e-3)
    return {"t": t, "c": c, "censored": time > end}, {"b": b, "shape": shape}
