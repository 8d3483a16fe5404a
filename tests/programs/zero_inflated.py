"""Counts with more zeros than a Poisson distribution has.

    idle_i ~ Bernoulli(sigmoid(a_0 + a c_i)),  x_i ~ Poisson(exp(b_0 + b c_i)), or 0 if idle

The covariates c are inputs; the coefficients are parameters, written with ``pyro.param``, or those
of a module.
"""

import pyro
import pyro.distributions as dist
import torch
from torch import nn

INPUTS = ["c"]


def program(batch):
    a = pyro.param("a", torch.zeros(2))
    b = pyro.param("b", torch.zeros(2))
    counts(batch, a[0] + a[1] * batch["c"], b[0] + b[1] * batch["c"])


class ZeroInflated(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.rate = nn.Linear(1, 1), nn.Linear(1, 1)

    def forward(self, batch):
        c = batch["c"].unsqueeze(-1)
        counts(batch, self.gate(c).squeeze(-1), self.rate(c).squeeze(-1))


def counts(batch, gate, log_rate):
    with pyro.plate("data", len(batch)):
        idle = pyro.sample("idle", dist.Bernoulli(logits=gate))
        rate = torch.where(idle == 1, torch.tensor(1e-6), log_rate.exp())
        pyro.sample("x", dist.Poisson(rate))


def simulate(rows, seed):
    g = torch.Generator().manual_seed(seed)
    c = torch.randn(rows, generator=g)
    idle = torch.rand(rows, generator=g) < (-0.5 + c).sigmoid()
    x = torch.where(idle, 0.0, torch.poisson((1.0 + 0.5 * c).exp(), generator=g))
    return {"x": x, "c": c}, {
        "a": torch.tensor([-0.5, 1.0]),
        "b": torch.tensor([1.0, 0.5]),
        "idle": idle,
    }
