"""A hidden Markov model of short sequences, one sequence a row.

    y_1 ~ Categorical(1/K),  y_t ~ Categorical(A_y_(t-1)),  x_t ~ N(m_y_t, s)

The loop is a plain one, or ``pyro.markov``.
"""

import pyro
import pyro.distributions as dist
import torch
from pyro.ops.indexing import Vindex
from torch import nn

STATES, LENGTH = 2, 6


class HiddenMarkov(nn.Module):
    def __init__(self, markov=False):
        super().__init__()
        self.markov = markov
        self.transition = nn.Parameter(torch.zeros(STATES, STATES))
        self.mean = nn.Parameter(torch.tensor([-0.5, 0.5]))
        self.log_scale = nn.Parameter(torch.zeros(()))

    def forward(self, batch):
        steps = range(LENGTH)
        probs = self.transition.softmax(-1)
        with pyro.plate("data", len(batch)):
            y = None
            for t in pyro.markov(steps) if self.markov else steps:
                p = torch.ones(STATES) if y is None else Vindex(probs)[..., y, :]
                y = pyro.sample(f"y_{t}", dist.Categorical(p), infer={"enumerate": "parallel"})
                pyro.sample(f"x_{t}", dist.Normal(self.mean[y], self.log_scale.exp()))

    def log_evidence(self, x):
        """The exact log p(x) by the forward algorithm, ``(rows,)``."""
        emission = dist.Normal(self.mean, self.log_scale.exp()).log_prob(x.unsqueeze(-1))
        alpha = emission[:, 0] - torch.tensor(float(STATES)).log()
        for t in range(1, LENGTH):
            step = alpha.unsqueeze(-1) + self.transition.log_softmax(-1)
            alpha = step.logsumexp(-2) + emission[:, t]
        return alpha.logsumexp(-1)


def simulate(rows, seed):
    g = torch.Generator().manual_seed(seed)
    transition = torch.tensor([[0.9, 0.1], [0.2, 0.8]])
    y = torch.randint(STATES, (rows, 1), generator=g)
    for _ in range(1, LENGTH):
        y = torch.cat([y, torch.multinomial(transition[y[:, -1]], 1, generator=g)], -1)
    x = torch.tensor([-1.5, 1.5])[y] + torch.randn(rows, LENGTH, generator=g)
    return {f"x_{t}": x[:, t] for t in range(LENGTH)}, {"transition": transition, "y": y, "x": x}
