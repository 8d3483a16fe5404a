"""A mixture of factor analysers.

    y ~ Categorical(pi),  z ~ N(0, I),  x ~ N(m_y + W_y z, s)

Source: Zoubin Ghahramani, Geoffrey Hinton, "The EM algorithm for mixtures of factor analyzers"
(1996).
"""

import pyro
import pyro.distributions as dist
import torch
from torch import nn

CLUSTERS, FACTORS, WIDTH = 3, 1, 4


class FactorAnalysers(nn.Module):
    def __init__(self):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(CLUSTERS))
        self.mean = nn.Parameter(torch.randn(CLUSTERS, WIDTH))
        self.loading = nn.Parameter(0.1 * torch.randn(CLUSTERS, WIDTH, FACTORS))
        self.log_scale = nn.Parameter(torch.zeros(WIDTH))

    def forward(self, batch):
        with pyro.plate("data", len(batch)):
            y = pyro.sample("y", dist.Categorical(logits=self.logits))
            z = pyro.sample("z", dist.Normal(torch.zeros(FACTORS), 1.0).to_event(1))
            loc = self.mean[y] + (self.loading[y] @ z.unsqueeze(-1)).squeeze(-1)
            pyro.sample("x", dist.Normal(loc, self.log_scale.exp()).to_event(1))

    def log_evidence(self, x):
        """The exact log p(x), ``(rows,)``."""
        noise = (2 * self.log_scale).exp().diag_embed()
        mixed = dist.MultivariateNormal(
            self.mean, noise + self.loading @ self.loading.transpose(-1, -2)
        )
        return (self.logits.log_softmax(-1) + mixed.log_prob(x.unsqueeze(1))).logsumexp(-1)


def simulate(rows, seed):
    g = torch.Generator().manual_seed(seed)
    mean = torch.tensor([[2.0, 0, 0, 0], [-1, 2, 0, 0], [-1, -2, 0, 0]])
    loading = torch.tensor([[0, 0, 2.0, 0], [0, 0, 0, 2], [0, 0, -1.5, 1.5]])
    y = torch.randint(CLUSTERS, (rows,), generator=g)
    z = torch.randn(rows, 1, generator=g)
    x = mean[y] + loading[y] * z + 0.4 * torch.randn(rows, WIDTH, generator=g)
    return {"x": x}, {"y": y, "z": z}
