"""How many animals live at a site, from repeated counts that miss some of them.

    p ~ Beta(2, 2),  n_i ~ Poisson(rate),  x_ij ~ Binomial(n_i, p)

Source: Andrew Royle, "N-mixture models for estimating population size from spatially replicated
counts" (2004).

In ``truncated`` n is at most 40, so that it can be summed exactly.
"""

import pyro
import pyro.distributions as dist
import torch
from torch import nn

VISITS, LARGEST = 3, 40


class Abundance(nn.Module):
    def __init__(self, truncated=True):
        super().__init__()
        self.truncated = truncated
        self.log_rate = nn.Parameter(torch.tensor(1.0))
        self.logit = nn.Parameter(torch.tensor(0.0))

    def forward(self, batch):
        rate = self.log_rate.exp()
        with pyro.plate("data", len(batch)):
            if self.truncated:
                logits = dist.Poisson(rate).log_prob(torch.arange(LARGEST + 1.0))
                n = pyro.sample("n", dist.Categorical(logits=logits)).float()
            else:
                n = pyro.sample("n", dist.Poisson(rate))
            logits = self.logit.expand(VISITS)
            seen = dist.Binomial(n.unsqueeze(-1), logits=logits, validate_args=False)
            pyro.sample("x", seen.to_event(1))

    def log_evidence(self, x):
        """The exact log p(x) with n at most 40, ``(rows,)``."""
        n = torch.arange(LARGEST + 1.0)
        prior = dist.Poisson(self.log_rate.exp()).log_prob(n).log_softmax(-1)
        value = x.unsqueeze(1)
        possible = (value <= n.unsqueeze(-1)).all(-1)
        total = torch.maximum(n.unsqueeze(-1), value)
        each = dist.Binomial(total, logits=self.logit).log_prob(value).sum(-1)
        return (prior + each).where(possible, -torch.inf).logsumexp(-1)


def simulate(rows, seed):
    g = torch.Generator().manual_seed(seed)
    n = torch.poisson(torch.full((rows,), 6.0), generator=g)
    animals = torch.rand(rows, VISITS, 40, generator=g) < 0.4
    real = torch.arange(40) < n[:, None, None]
    return {"x": (animals & real).sum(-1).float()}, {"n": n, "rate": 6.0, "p": 0.4}
