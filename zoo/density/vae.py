r"""VAE: data that are generated from a vector of standard normal latents.

Generative process, for every row::

    z ~ Normal(0, I)                              the latents
    x | z ~ likelihood(decoder(z))                the data

The guide is q(z | x).  With one draw the objective is the evidence bound; with ``num_particles``
of them and ``objective="iwae"`` it is the importance weighted bound, an average of the weights
p(x, z) / q(z | x) inside the logarithm, and with ``"dreg"`` the same bound by gradients that stay
precise with many draws.

============ =================================
observed     what the run is
============ =================================
x            density estimation
x (part)     filling in the entries that miss
============ =================================

Source: Diederik P. Kingma, Max Welling, "Auto-encoding variational Bayes" (2014); Yuri Burda, Roger
Grosse, Ruslan Salakhutdinov, "Importance weighted autoencoders" (2016), whose network of one
stochastic layer is the default here; George Tucker, Dieterich Lawson, Shixiang Gu, Chris Maddison,
"Doubly reparameterized gradient estimators for Monte Carlo objectives" (2019).
"""

from __future__ import annotations

from collections.abc import Sequence

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyrozoo.inference import Batch
from pyrozoo.zoo.networks import Decoder


class VAE(nn.Module):
    """p(z, x) of the module's docstring.

    Args:
        x_dim: features of a row.
        latent_dim: dimension of z.
        hidden: widths of the encoder's hidden layers; the decoder mirrors them.
        likelihood: of x given z, a name or a module of :mod:`pyrozoo.zoo.networks`.
        activation: of the hidden layers.
    """

    zeros: Tensor

    def __init__(
        self,
        x_dim: int,
        latent_dim: int = 50,
        hidden: Sequence[int] = (200, 200),
        likelihood: str = "bernoulli",
        activation: str = "tanh",
    ) -> None:
        super().__init__()
        self.register_buffer("zeros", torch.zeros(latent_dim))
        self.decoder = Decoder(latent_dim, tuple(reversed(hidden)), x_dim, likelihood, activation)

    def forward(self, batch: Batch) -> None:
        """Generate the rows of a batch."""
        with pyro.plate("data", len(batch)):
            z = pyro.sample("z", dist.Normal(self.zeros, 1.0).to_event(1))
            pyro.sample("x", self.decoder(z))
