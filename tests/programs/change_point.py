"""Counts in time whose rate changes once, at an unknown time.

    change ~ Categorical(1/T),  early, late ~ Gamma(2, 0.5),  x_t ~ Poisson(early or late)

In ``program`` the times are the rows, and the change is one finite site that all rows share; in
``series`` a row is a whole series with a change of its own.
"""

import pyro
import pyro.distributions as dist
import torch

INPUTS = ["time"]
LENGTH = 30


def program(batch):
    change = pyro.sample("change", dist.Categorical(torch.ones(LENGTH)))
    early = pyro.sample("early", dist.Gamma(2.0, 0.5))
    late = pyro.sample("late", dist.Gamma(2.0, 0.5))
    with pyro.plate("data", len(batch)):
        rate = torch.where(batch["time"] < change, early, late)
        pyro.sample("x", dist.Poisson(rate))


def series(batch):
    time = torch.arange(LENGTH)
    with pyro.plate("data", len(batch)):
        change = pyro.sample("change", dist.Categorical(torch.ones(LENGTH)))
        early = pyro.sample("early", dist.Gamma(2.0, 0.5))
        late = pyro.sample("late", dist.Gamma(2.0, 0.5))
        before = time < change.unsqueeze(-1)
        rate = torch.where(before, early.unsqueeze(-1), late.unsqueeze(-1))
        pyro.sample("x", dist.Poisson(rate).to_event(1))


def simulate(seed, change=12, early=2.0, late=7.0):
    """One series, a time a row."""
    g = torch.Generator().manual_seed(seed)
    time = torch.arange(LENGTH)
    x = torch.poisson(torch.where(time < change, early, late), generator=g)
    return {"x": x, "time": time}, {"change": change, "early": early, "late": late}


def log_joint(x):
    """Exact log p(x, change) for one series, ``(T,)``: the rates are integrated out."""
    a, rate = 2.0, 0.5
    total = []
    for change in range(LENGTH):
        value = -torch.tensor(float(LENGTH)).log() - torch.lgamma(x + 1).sum()
        for part in (x[:change], x[change:]):
            n, s = len(part), part.sum()
            value = value + torch.lgamma(a + s) - torch.lgamma(torch.tensor(a))
            value = value + a * torch.tensor(rate).log() - (a + s) * torch.tensor(rate + n).log()
        total.append(value)
    return torch.stack(total)
