"""Two views of the same clusters, each with a latent of its own; in some rows a view is missing.

y ~ Categorical(pi)
w_a, w_b ~ N(0, 1)
x_a ~ N(m_y + u w_a, s_a),  x_b ~ Bernoulli(sigmoid(n_y + v w_b))
"""

import pyro
import pyro.distributions as dist
import torch
from torch import nn

CLUSTERS, WIDTH_A, WIDTH_B = 3, 2, 12


class TwoViews(nn.Module):
    def __init__(self):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(CLUSTERS))
        self.mean = nn.Parameter(torch.randn(CLUSTERS, WIDTH_A))
        self.u = nn.Parameter(0.1 * torch.randn(WIDTH_A))
        self.log_scale = nn.Parameter(torch.zeros(()))
        self.rate = nn.Parameter(0.1 * torch.randn(CLUSTERS, WIDTH_B))
        self.v = nn.Parameter(0.1 * torch.randn(WIDTH_B))

    def forward(self, batch):
        with pyro.plate("data", len(batch)):
            y = pyro.sample("y", dist.Categorical(logits=self.logits))
            w_a = pyro.sample("w_a", dist.Normal(0.0, 1.0)).unsqueeze(-1)
            w_b = pyro.sample("w_b", dist.Normal(0.0, 1.0)).unsqueeze(-1)
            a = dist.Normal(self.mean[y] + self.u * w_a, self.log_scale.exp())
            pyro.sample("x_a", a.to_event(1))
            pyro.sample("x_b", dist.Bernoulli(logits=self.rate[y] + self.v * w_b).to_event(1))


def simulate(rows, seed):
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(CLUSTERS, (rows,), generator=g)
    mean = torch.tensor([[0.0, 0.0], [0.0, 3.0], [3.0, 0.0]])
    direction = torch.tensor([0.7, 0.7])
    x_a = mean[y] + direction * torch.randn(rows, 1, generator=g)
    x_a = x_a + 0.5 * torch.randn(rows, WIDTH_A, generator=g)
    logits = 4 * torch.eye(CLUSTERS).repeat_interleave(WIDTH_B // CLUSTERS, 1)[y] - 2
    logits = logits + 0.5 * torch.randn(rows, 1, generator=g)
    x_b = (torch.rand(rows, WIDTH_B, generator=g) < logits.sigmoid()).float()
    seen = torch.randint(3, (rows,), generator=g)  # a alone, b alone, both
    return {"x_a": (x_a, seen != 1), "x_b": (x_b, seen != 0)}, {"y": y, "seen": seen}
