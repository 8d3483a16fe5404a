r"""GMVAE: a Gaussian mixture whose components are moved and stretched by a noise of each row.

Generative process, for every row::

    y ~ Categorical(uniform)                      the cluster, one of K
    w ~ Normal(0, I)                              what varies within every cluster
    z | w, y ~ Normal(loc_y(w), scale_y(w))       its embedding: one head a cluster on a layer
    x | z ~ likelihood(decoder(z))                the data

The guide is q(z | x) q(w | x).  The cluster is not proposed but summed, log sum_y p(y) p(z | w, y)
at each draw of z and w; the decoder never sees the sum.

============ =================================================================
observed     what the run is
============ =================================================================
x            clustering
x, y (part)  semi-supervised: known rows see the density of their own component
x, y         classification by p(y | z, w)
============ =================================================================

Given w the embedding is a Gaussian mixture; with w integrated out its components have any shape.
The graph is that of M1+M2 (y, z_2 = w, z_1 = z), with one head a cluster where that has a network
that reads the label.

Source: Nat Dilokthanakul, Pedro A. M. Mediano, Marta Garnelo, Matthew C. H. Lee, Hugh Salimbeni,
Kai Arulkumaran, Murray Shanahan, "Deep unsupervised clustering with Gaussian mixture variational
autoencoders" (2016).

Deviations: q(z | x) and q(w | x) are two networks, where the paper has two heads on one trunk, and
fully connected, where it has convolutions for pictures.  The later version of the paper puts
q(y) = p(y | z, w) at the draws, whose bound is the sum here; the first one proposes a mean-field
q(y | x), which is the catalogue's option ``cluster="network"``.  Neither the consistency term of
the first version nor the minimum information (free bits on y) of the second is added: the sum is
exact, and the loss stays a bound.  With ``spread`` the catalogue starts from the parts of a graph
of neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyrozoo.inference import Batch
from pyrozoo.zoo.networks import MLP, Decoder, positive_scale


class GMVAE(nn.Module):
    """p(y, w, z, x) of the module's docstring.

    Args:
        x_dim: features of a row.
        num_clusters: K.
        latent_dim: dimension of z.
        noise_dim: dimension of w.
        hidden: widths of the encoder's hidden layers; the decoder mirrors them.
        prior_hidden: widths of the hidden layers, of tanh, between w and the components.
        likelihood: of x given z, a name or a module of :mod:`pyrozoo.zoo.networks`.
    """

    zeros: Tensor

    def __init__(
        self,
        x_dim: int = 784,
        num_clusters: int = 10,
        latent_dim: int = 200,
        noise_dim: int = 150,
        hidden: Sequence[int] = (500, 500),
        prior_hidden: Sequence[int] = (500,),
        likelihood: Any = "bernoulli",
    ) -> None:
        super().__init__()
        self.num_clusters, self.latent_dim = num_clusters, latent_dim
        self.register_buffer("zeros", torch.zeros(noise_dim), persistent=False)
        heads = num_clusters * 2 * latent_dim
        self.components = MLP(noise_dim, prior_hidden, heads, "tanh")
        self.decoder = Decoder(latent_dim, tuple(reversed(hidden)), x_dim, likelihood)

    def component(self, w: Tensor, y: Tensor) -> Any:
        """p(z | w, y) for w ``(*, rows, noise_dim)`` and y ``(*, rows)``: the heads are run once
        for each w, and then picked."""
        heads = self.components(w).reshape(-1, self.num_clusters, 2 * self.latent_dim)
        row = torch.arange(len(heads), device=w.device).reshape(w.shape[:-1])
        loc, raw_scale = heads[row, y].chunk(2, -1)
        return dist.Normal(loc, positive_scale(raw_scale)).to_event(1)

    def forward(self, batch: Batch) -> None:
        """Generate ``len(batch)`` rows."""
        with pyro.plate("data", len(batch)):
            uniform = self.zeros.new_zeros(self.num_clusters)
            y = pyro.sample("y", dist.Categorical(logits=uniform))
            w = pyro.sample("w", dist.Normal(self.zeros, 1.0).to_event(1))
            z = pyro.sample("z", self.component(w, y))
            pyro.sample("x", self.decoder(z))
