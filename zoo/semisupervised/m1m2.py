r"""M1+M2: two layers of latent variables, with the class above the features.

Generative process, for every row::

    y ~ Categorical(uniform)                      the class
    z_2 ~ Normal(0, I)                            the style
    z_1 | y, z_2 ~ Normal(loc(z_2, y), scale(z_2, y))    the features
    x | z_1 ~ likelihood(decoder(z_1))            the data

The guide is q(z_1 | x) q(y | z_1) q(z_2 | z_1, y).  The features are drawn before the class is
summed, so that only the small networks between y, z_2 and z_1 are run for every class, and encoder
and decoder of x once a row.

============ ==========================================================================
observed     what the run is
============ ==========================================================================
x, y         a conditional autoencoder, and a classifier through the term below
x, y (part)  semi-supervised, the published use
x            an autoencoder; q(y | z_1) has nothing that names or separates classes
============ ==========================================================================

On rows whose label is known, q(y | z_1) is no part of the bound; it learns from the classification
term alpha log q(y | z_1), the objective's ``observed_guide_weights={"y": alpha}``.

Published in two stages: M1, an autoencoder of z_1 and x with a standard normal prior, is fitted to
all rows without their labels (:class:`Features` shares decoder and encoder with the pair here);
then everything above z_1 is fitted to draws of the features, with encoder and decoder as they are
(``frozen=True``, the default).  With ``frozen=False`` the fit goes on with all parts.  A frozen
encoder and decoder are still run forward at every step, without gradients: features are drawn anew
each time, and the reported bound is that of x.

Source: Diederik P. Kingma, Danilo J. Rezende, Shakir Mohamed, Max Welling, "Semi-supervised
learning with deep generative models" (2014).

As in the released code, q(y | z_1) does not read the features that M1 gave up, which are noise
(:class:`ActiveUnits`).

Deviations: Adam at 1e-3 and far fewer passes; weights have no prior and start larger; z_1 keeps the
features that M1 gave up, where the released code takes them away; q(y | x) averages q(y | z_1) over
draws of z_1, where it takes the mean of z_1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyrozoo.inference import Batch
from pyrozoo.zoo.networks import Decoder, Encoder, one_hot


class M1M2(nn.Module):
    """p(y, z_2, z_1, x) of the module's docstring.

    Args:
        x_dim: features of a row.
        num_classes: number of classes.
        latent_dim: dimension of the features z_1.
        style_dim: dimension of the style z_2.
        hidden: widths of the encoder's hidden layers; the decoder mirrors them.
        style_hidden: widths of the hidden layers of p(z_1 | y, z_2).
        likelihood: of x given z_1, a name or a module of :mod:`pyrozoo.zoo.networks`.
        activation: of all hidden layers.
    """

    zeros: Tensor

    def __init__(
        self,
        x_dim: int = 784,
        num_classes: int = 10,
        latent_dim: int = 50,
        style_dim: int = 50,
        hidden: Sequence[int] = (500, 500),
        style_hidden: Sequence[int] = (300,),
        likelihood: Any = "bernoulli",
        activation: str = "softplus",
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.register_buffer("zeros", torch.zeros(style_dim), persistent=False)
        self.features = Encoder([style_dim, num_classes], style_hidden, latent_dim, activation)
        self.decoder = Decoder(latent_dim, tuple(reversed(hidden)), x_dim, likelihood, activation)

    def forward(self, batch: Batch) -> None:
        """Generate ``len(batch)`` rows."""
        with pyro.plate("data", len(batch)):
            uniform = self.zeros.new_zeros(self.num_classes)
            y = pyro.sample("y", dist.Categorical(logits=uniform))
            z_2 = pyro.sample("z_2", dist.Normal(self.zeros, 1.0).to_event(1))
            z_1 = pyro.sample("z_1", self.features(z_2, one_hot(y, self.num_classes, z_2.dtype)))
            pyro.sample("x", self.decoder(z_1))


class Features(nn.Module):
    """z_1 ~ Normal(0, I), x | z_1 by the decoder of a program: M1, for the first stage."""

    def __init__(self, program: M1M2) -> None:
        super().__init__()
        self.decoder = program.decoder
        self.latent_dim = program.features.loc.out_features

    def forward(self, batch: Batch) -> None:
        """Generate ``len(batch)`` rows."""
        with pyro.plate("data", len(batch)):
            zeros = next(self.decoder.parameters()).new_zeros(self.latent_dim)
            z_1 = pyro.sample("z_1", dist.Normal(zeros, 1.0).to_event(1))
            pyro.sample("x", self.decoder(z_1))


class ActiveUnits(nn.Module):
    """A network that reads the features that tell rows apart, and zeros in place of the others.

    Args:
        network: of the features, ``(*, size)``.
        size: how many there are; all are read before :meth:`look`.
    """

    keep: Tensor

    def __init__(self, network: nn.Module, size: int) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("keep", torch.ones(size))

    def look(self, means: Tensor, least: float = 0.1) -> None:
        """Read the units whose mean has an sd above ``least`` over rows; all, if none has.

        Args:
            means: of q(z_1 | x), ``(rows, size)``.
        """
        active = means.std(0) > least
        self.keep.copy_(active if bool(active.any()) else torch.ones_like(self.keep))

    def forward(self, z_1: Tensor) -> Any:
        """What the network says of the features, ``(*, size)``."""
        return self.network(z_1 * self.keep)
