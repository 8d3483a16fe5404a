r"""DCN: deep clustering network, an embedding that is friendly to k-means.

Generative process, for every row::

    y ~ Categorical(uniform)                      the cluster, one of K
    z | y ~ Normal(loc[y], scale)                 its embedding: one fixed spread for all clusters
    x | z ~ likelihood(decoder(z))                the data

with scale^2 = 1 / (2 weight), so that -log p(z | y) is weight |z - loc[y]|^2 and a constant.  It is
fitted by maximum a posteriori: the guide has z = encoder(x) without noise and y certain, the
nearest centre.  It is VaDE with point masses for both and with fixed, equal spreads.  Networks are
trained by gradients, centres by running means: after every epoch, with r[i, k] one if centre k is
nearest to z_i, n[k] += sum_i r[i, k] and loc[k] += sum_i r[i, k] (z_i - loc[k]) / n[k].

With y left out of the guide it is summed in the program: soft assignments r, which turn into hard
ones as the scale goes to zero.

============ =================================================================
observed     what the run is
============ =================================================================
x            clustering
x, y (part)  known rows stay with their centre
============ =================================================================

The objective is log p(x, z, y) at the points, a MAP estimate and no bound on the evidence: it can
be raised without end by shrinking z and spreading the decoder's first layer.

Source: Bo Yang, Xiao Fu, Nicholas D. Sidiropoulos, Mingyi Hong, "Towards k-means-friendly spaces:
simultaneous deep learning and clustering" (2017).  With squared errors, ``likelihood =
"normal(0.7071)"``, the paper's lambda is twice the weight.

Deviations: assignments are those of the current embedding in every step, and centres move after an
epoch, where the paper moves both after every batch; Adam; rows are shuffled; the counts n start at
100 as in the authors' code, but there is no further k-means every ten epochs; the autoencoder is
trained end to end, not layer by layer.  An option is a start from the codes' graph of nearest
neighbours (:func:`.start_centres`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyrozoo.inference import Batch, Result, predict, responsibilities
from pyrozoo.zoo.networks import Decoder

COUNT = 100.0  # rows that each centre has seen at the start


class DCN(nn.Module):
    """p(y, z, x) of the module's docstring.

    Args:
        x_dim: features of a row.
        num_clusters: K.
        latent_dim: dimension of z.
        hidden: widths of the encoder's hidden layers; the decoder mirrors them.
        likelihood: of x given z, a name or a module of :mod:`pyrozoo.zoo.networks`.
        weight: of the squared distance between z and its centre, in nats.
    """

    logits: Tensor
    loc: Tensor
    count: Tensor

    def __init__(
        self,
        x_dim: int = 784,
        num_clusters: int = 10,
        latent_dim: int = 10,
        hidden: Sequence[int] = (500, 500, 2000),
        likelihood: Any = "normal(0.7071)",
        weight: float = 1.0,
    ) -> None:
        super().__init__()
        if weight <= 0:
            raise ValueError(f"weight is positive, got {weight}")
        self.scale = (2 * weight) ** -0.5
        self.register_buffer("logits", torch.zeros(num_clusters))
        self.register_buffer("loc", torch.randn(num_clusters, latent_dim))
        self.register_buffer("count", torch.full((num_clusters,), COUNT))
        self.decoder = Decoder(latent_dim, tuple(reversed(hidden)), x_dim, likelihood)

    def forward(self, batch: Batch) -> None:
        """Generate ``len(batch)`` rows."""
        with pyro.plate("data", len(batch)):
            y = pyro.sample("y", dist.Categorical(logits=self.logits))
            z = pyro.sample("z", dist.Normal(self.loc[y], self.scale).to_event(1))
            pyro.sample("x", self.decoder(z))


@torch.no_grad()
def move_centres(program: DCN, guide: nn.Module, data: Batch) -> None:
    """One step of the running means, with the codes and assignments of all rows."""
    data = data.to(program.loc.device)
    share = responsibilities(program, guide, data, num_samples=1, seed=0).to(program.loc.dtype)
    codes = predict(program, guide, data, "z", num_samples=1, seed=0)
    total = share.sum(0)
    program.count += total
    program.loc += (share.T @ codes - total[:, None] * program.loc) / program.count[:, None]


def follow_centres(
    program: DCN, guide: nn.Module, data: Batch
) -> tuple[Batch, Callable[[Result], None]]:
    """The data as they are, and what moves the centres after an epoch."""

    def follow(result: Result) -> None:
        move_centres(program, guide, data)

    return data, follow
