"""A neural network whose weights are random variables.

weights ~ N(0, 1),  y_i ~ N(f(x_i; weights), 0.2)
"""

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule, PyroSample
from torch import nn

INPUTS = ["x"]
UNITS = 8


class BayesianNetwork(PyroModule):
    def __init__(self):
        super().__init__()
        self.hidden = PyroModule[nn.Linear](1, UNITS)
        self.hidden.weight = PyroSample(dist.Normal(0.0, 2.0).expand([UNITS, 1]).to_event(2))
        self.hidden.bias = PyroSample(dist.Normal(0.0, 2.0).expand([UNITS]).to_event(1))
        self.out = PyroModule[nn.Linear](UNITS, 1)
        self.out.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, UNITS]).to_event(2))
        self.out.bias = PyroSample(dist.Normal(0.0, 1.0).expand([1]).to_event(1))

    def forward(self, batch):
        mean = self.out(self.hidden(batch["x"].unsqueeze(-1)).tanh()).squeeze(-1)
        with pyro.plate("data", len(batch)):
            pyro.sample("y", dist.Normal(mean, 0.2))
        return mean


def simulate(rows, seed):
    g = torch.Generator().manual_seed(seed)
    x = 4 * torch.rand(rows, generator=g) - 2
    return {"x": x, "y": (2 * x).sin() + 0.2 * torch.randn(rows, generator=g)}, {"f": (2 * x).sin()}
