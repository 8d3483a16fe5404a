"""A random walk with friction that is seen through noise, one series a row.

z_1 ~ N(0, 1),  z_t ~ N(phi z_(t-1), q),  x_t ~ N(z_t, r)
"""

import pyro
import pyro.distributions as dist
import torch
from torch import nn

LENGTH = 5


class StateSpace(nn.Module):
    def __init__(self):
        super().__init__()
        self.phi = nn.Parameter(torch.tensor(0.3))
        self.log_q = nn.Parameter(torch.tensor(0.0))
        self.log_r = nn.Parameter(torch.tensor(0.0))

    def forward(self, batch):
        with pyro.plate("data", len(batch)):
            z = pyro.sample("z_0", dist.Normal(0.0, 1.0))
            pyro.sample("x_0", dist.Normal(z, self.log_r.exp()))
            for t in range(1, LENGTH):
                z = pyro.sample(f"z_{t}", dist.Normal(self.phi * z, self.log_q.exp()))
                pyro.sample(f"x_{t}", dist.Normal(z, self.log_r.exp()))

    def log_evidence(self, x):
        """The exact log p(x): x is jointly normal, ``(rows,)``."""
        q, r = (2 * self.log_q).exp(), (2 * self.log_r).exp()
        move = torch.eye(LENGTH) - self.phi * torch.ones(LENGTH - 1).diag(-1)
        back = torch.linalg.inv(move)
        noise = torch.cat([torch.ones(1), q.expand(LENGTH - 1)])
        cov = back @ noise.diag() @ back.T + r * torch.eye(LENGTH)
        return dist.MultivariateNormal(torch.zeros(LENGTH), cov).log_prob(x)


def simulate(rows, seed):
    g = torch.Generator().manual_seed(seed)
    z = [torch.randn(rows, generator=g)]
    for _ in range(1, LENGTH):
        z.append(0.9 * z[-1] + 0.5 * torch.randn(rows, generator=g))
    x = torch.stack(z, -1) + 0.5 * torch.randn(rows, LENGTH, generator=g)
    return {f"x_{t}": x[:, t] for t in range(LENGTH)}, {"phi": 0.9, "x": x, "z": torch.stack(z, -1)}
