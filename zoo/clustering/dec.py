r"""DEC and IDEC: deep embedded clustering, by targets that sharpen its own assignments.

One program for both, for every row::

    z flat                                        its embedding: no density, a free parameter
    y | z ~ Categorical(softmax(logits))          the cluster, one of K
    logits[k] = -(dof + 1) / 2 log(1 + |z - loc[k]|^2 / dof)
    x | z ~ likelihood(decoder(z))                the data
    factor: sum_k target[k] log p(y = k | z)      a soft label, held fixed

and one guide, z = encoder(x) without noise.  The targets of all rows i are made anew after every
epoch, or every few, from the assignments q[i, k] = p(y_i = k | z_i)::

    target[i, k]  proportional to  q[i, k]^2 / sum_j q[j, k]

DEC leaves the term of x out (weight zero, the decoder stays as it was pretrained), IDEC keeps it.

============ =================================================================
observed     what the run is
============ =================================================================
x            clustering
x, y (part)  known rows have a certain label and a certain target
============ =================================================================

This is self-training and no bound on the evidence: the targets come from the model itself, and z
has no density.  The kernel is that of a t distribution in one dimension; in more it cannot be
normalised, so that p(y | z) is the posterior of no mixture.  What ``fit`` calls the bound is the
log-likelihood of x given z plus that of the soft labels, with unit weights.

Sources: DEC: Junyuan Xie, Ross Girshick, Ali Farhadi, "Unsupervised deep embedding for clustering
analysis" (2016).  IDEC: Xifeng Guo, Long Gao, Xinwang Liu, Jianping Yin, "Improved deep embedded
clustering with local structure preservation" (2017).

Deviations: Adam where DEC has SGD; rows are shuffled; targets are made anew by epochs, not by
steps; the autoencoder is trained end to end, not layer by layer; the fit has a given length, where
the papers stop once labels hardly change; clusters are read from p(y | z).  An option is a start
from the codes' graph of nearest neighbours (:func:`.start_centres`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyrozoo.inference import Batch, Result, responsibilities
from pyrozoo.zoo.networks import Decoder

INPUTS = ("row",)


class DEC(nn.Module):
    """p(y, x | z) of the module's docstring, and soft labels for the rows of one data set.

    The value ``row``, if the batch has it, says which targets are those of the batch; without it
    there is no factor.

    Args:
        x_dim: features of a row.
        num_clusters: K.
        latent_dim: dimension of z.
        hidden: widths of the encoder's hidden layers; the decoder mirrors them.
        likelihood: of x given z, a name or a module of :mod:`pyrozoo.zoo.networks`.
        dof: degrees of freedom of the kernel.
        rows: of the data set.
    """

    target: Tensor

    def __init__(
        self,
        x_dim: int = 784,
        num_clusters: int = 10,
        latent_dim: int = 10,
        hidden: Sequence[int] = (500, 500, 2000),
        likelihood: Any = "normal(0.7071)",
        dof: float = 1.0,
        rows: int = 0,
    ) -> None:
        super().__init__()
        if dof <= 0:
            raise ValueError(f"dof is positive, got {dof}")
        self.dof = dof
        self.loc = nn.Parameter(torch.randn(num_clusters, latent_dim))
        self.decoder = Decoder(latent_dim, tuple(reversed(hidden)), x_dim, likelihood)
        self.register_buffer("target", torch.full((rows, num_clusters), 1 / num_clusters))

    def assign(self, z: Tensor) -> Any:
        """p(y | z) for z ``(*, D)``, batch shape ``*``."""
        distance = (z.unsqueeze(-2) - self.loc).square().sum(-1)
        return dist.Categorical(logits=-(self.dof + 1) / 2 * (distance / self.dof).log1p())

    def forward(self, batch: Batch) -> None:
        """Generate ``len(batch)`` rows."""
        zero = self.loc.new_zeros(self.loc.shape[1])
        with pyro.plate("data", len(batch)):
            z = pyro.sample("z", dist.Normal(zero, 1.0).to_event(1).mask(False))
            y = self.assign(z)
            pyro.sample("y", y)
            if "row" in batch:
                pyro.factor("target", (self.target[batch["row"]] * y.logits).sum(-1))
            pyro.sample("x", self.decoder(z))


def sharpen(share: Tensor) -> Tensor:
    """The targets ``(N, K)`` of assignments ``(N, K)`` whose rows add up to one; theirs do, too."""
    weight = share.square() / share.sum(0).clamp_min(torch.finfo(share.dtype).tiny)
    return weight / weight.sum(1, keepdim=True)


def set_target(program: DEC, guide: nn.Module, data: Batch) -> None:
    """Make the targets of all rows anew.

    Raises:
        ValueError: the program has targets for another number of rows.
    """
    if len(data) != len(program.target):
        raise ValueError(f"the program has {len(program.target)} targets, got {len(data)} rows")
    data = data.drop("row").to(program.loc.device)
    share = responsibilities(program, guide, data, num_samples=1, seed=0)
    program.target.copy_(sharpen(share))


def follow_targets(
    program: DEC, guide: nn.Module, data: Batch, every: int = 1
) -> tuple[Batch, Callable[[Result], None]]:
    """The data with the number of each ``row``, and what makes the targets anew after an epoch.

    Args:
        program: gets room for targets of these rows.
        guide: q(z | x).
        data: what is observed.
        every: so many epochs.

    Raises:
        ValueError: ``every`` is less than one.
        TypeError: the rows are on disk.
    """
    if every < 1:
        raise ValueError(f"targets are made anew every 1 epoch or more, got {every}")
    if type(data) is not Batch:
        raise TypeError("the targets need rows in memory, but these are on disk")
    if len(data) != len(program.target):
        program.target = program.target.new_full(
            (len(data), len(program.loc)), 1 / len(program.loc)
        )

    def follow(result: Result) -> None:
        if result.epoch % every == 0:
            set_target(program, guide, data)

    values = {name: (data.stored(name), data.present(name)) for name in data.names}
    return Batch.of({**values, "row": torch.arange(len(data))}), follow
