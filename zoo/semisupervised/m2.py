r"""M2: a class-conditional autoencoder whose label may be unknown.

Generative process, for every row::

    y ~ Categorical(uniform)                      the class
    z ~ Normal(0, I)                              the style
    x | y, z ~ likelihood(decoder(z, y))          the data

The guide is q(y | x) q(z | x, y); where y is unknown it is summed over the guide's probabilities.

============ ==========================================================================
observed     what the run is
============ ==========================================================================
x, y         a conditional autoencoder, and a classifier through the term below
x, y (part)  semi-supervised, the published use
x            collapses: nothing asks the decoder to use y, and q(y | x) turns uniform
============ ==========================================================================

On rows whose label is known, q(y | x) is no part of the bound; it learns from the classification
term alpha log q(y | x), the objective's ``observed_guide_weights={"y": alpha}``.

Source: Diederik P. Kingma, Danilo J. Rezende, Shakir Mohamed, Max Welling, "Semi-supervised
learning with deep generative models" (2014).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyrozoo.inference import Batch
from pyrozoo.zoo.networks import Decoder, one_hot


class M2(nn.Module):
    """p(y, z, x) of the module's docstring.

    Args:
        x_dim: features of a row.
        num_classes: number of classes.
        latent_dim: dimension of the style z.
        hidden: widths of the decoder's hidden layers.
        likelihood: of x, a name or a module of :mod:`pyrozoo.zoo.networks`.
        activation: of the hidden layers.
    """

    zeros: Tensor

    def __init__(
        self,
        x_dim: int = 784,
        num_classes: int = 10,
        latent_dim: int = 50,
        hidden: Sequence[int] = (500,),
        likelihood: Any = "bernoulli",
        activation: str = "softplus",
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.register_buffer("zeros", torch.zeros(latent_dim), persistent=False)
        self.decoder = Decoder([latent_dim, num_classes], hidden, x_dim, likelihood, activation)

    def forward(self, batch: Batch) -> None:
        """Generate ``len(batch)`` rows."""
        with pyro.plate("data", len(batch)):
            uniform = self.zeros.new_zeros(self.num_classes)
            y = pyro.sample("y", dist.Categorical(logits=uniform))
            z = pyro.sample("z", dist.Normal(self.zeros, 1.0).to_event(1))
            pyro.sample("x", self.decoder(z, one_hot(y, self.num_classes, z.dtype)))
