r"""HI-VAE: tables with missing entries and columns of different kinds.

Generative process, for every row::

    y ~ Categorical(softmax(logits))                  the cluster, one of K
    z | y ~ Normal(loc[y], 1)                         what the columns share
    h = decoder(z)                                    read by every view
    x_d | z, y ~ likelihood_d(head(h, z, y))          for every column d of every view

============================ ===============================================================
observed                     what the run is
============================ ===============================================================
x with holes                 imputation and clustering
x_a, x_b, each in some rows  the same, with several tables about the same rows
x, y (part)                  semi-supervised: known rows see the density of their own cluster
x, y                         imputation given the label, and a classifier q(y | x)
============================ ===============================================================

The guide is q(y | x) q(z | x, y), as in the paper, or q(z | x) with the cluster summed in the
program.

Source: Alfredo Nazabal, Pablo M. Olmos, Zoubin Ghahramani, Isabel Valera, "Handling incomplete
heterogeneous data using VAEs" (2020).

Deviations: the sum over clusters is exact, where the paper draws a relaxed sample; columns are
scaled once, by their known training values, not in each batch; the noise of a column does not
depend on the cluster; mixing weights are learnt, not uniform; h is one vector for all columns, not
a part for each, and the heads read z besides, so that a column can be linear in it; the guide is
told which entries are missing; the clusters start from a mixture fitted to the known entries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyrozoo.inference import Batch, EnumELBO, fit, schedules
from pyrozoo.zoo.imputation.mixture import cluster_rows
from pyrozoo.zoo.networks import MLP, Column, Columns, Likelihood, SplitLinear, one_hot


class HIVAE(nn.Module):
    """p(y, z, x) of the module's docstring.

    Args:
        views: site -> the likelihood of the rows observed there, one vector each: ``{"x":
            Columns(..)}``, or several, called ``x_<name>``.
        num_clusters: K.
        latent_dim: dimension of z.
        hidden: widths of the decoder's hidden layers; () makes the columns linear in z.
        activation: of the hidden layers.

    Raises:
        ValueError: no view, or one of another name.
    """

    def __init__(
        self,
        views: Mapping[str, Likelihood],
        num_clusters: int = 5,
        latent_dim: int = 10,
        hidden: Sequence[int] = (32,),
        activation: str = "relu",
    ) -> None:
        super().__init__()
        if not views or not all(name == "x" or name.startswith("x_") for name in views):
            raise ValueError(f"a view is called x or x_<name>, got {', '.join(views) or 'none'}")
        self.logits = nn.Parameter(torch.zeros(num_clusters))
        self.loc = nn.Parameter(torch.randn(num_clusters, latent_dim))
        self.decoder = MLP(latent_dim, hidden, activation=activation)
        self.views, self.heads = nn.ModuleDict(views), nn.ModuleDict()
        for name, view in views.items():
            widths = [self.decoder.out_dim, latent_dim, num_clusters]
            self.heads[name] = SplitLinear(widths, view.num_params)

    def forward(self, batch: Batch) -> None:
        """Generate ``len(batch)`` rows."""
        with pyro.plate("data", len(batch)):
            y = pyro.sample("y", dist.Categorical(logits=self.logits))
            z = pyro.sample("z", dist.Normal(self.loc[y], 1.0).to_event(1))
            h, cluster = self.decoder(z), one_hot(y, len(self.logits), z.dtype)
            for name, view in self.views.items():
                pyro.sample(name, view(self.heads[name](h, z, cluster)))


def start_clusters(
    program: HIVAE,
    guide: Any,
    data: Batch,
    *,
    epochs: int = 100,
    batch_size: int = 128,
    lr: float = 3e-3,
    num_starts: int = 10,
    seed: int = 0,
    progress: bool = False,
    **settings: Any,
) -> None:
    """Cluster the rows by a mixture, then train the pair as if these clusters were known.

    The mixture is fitted to the known entries of the features of all views; see :mod:`.mixture`.
    Clusters that the data know are kept.  The weight of the divergence of z rises from zero to one
    meanwhile, so that no dimension of z is given up before it is used.

    Args:
        program, guide: trained in place.
        data: with a view, and perhaps y.
        epochs, batch_size, lr: of the training.
        num_starts: runs of EM, of which the likeliest is taken.
        seed: of all of it.
        progress: show a progress bar.
        settings: further ones of the training's fit: folder, resume, compile, device.

    Raises:
        ValueError: y has values beyond the clusters, or there are fewer rows than clusters.
    """
    values = {name: (data[name], data.present(name)) for name in data.names if name != "y"}
    read = [_features(view, data, name) for name, view in program.views.items() if name in data]
    labels = None
    if "y" in data:
        labels = torch.where(data.present("y"), data["y"].long(), -1).cpu().numpy()
        if labels.max() >= len(program.logits):
            raise ValueError(
                f"site 'y' takes values in 0..{len(program.logits) - 1}, got {labels.max()}"
            )
    clusters = cluster_rows(
        np.concatenate([features for features, _ in read], 1),
        np.concatenate([present for _, present in read], 1),
        len(program.logits), labels, num_starts=num_starts, seed=seed,
    )  # fmt: skip
    fit(
        program, guide, {**values, "y": clusters}, epochs=epochs, batch_size=batch_size, lr=lr,
        objective=EnumELBO(observed_guide_weights={"y": 1.0}), seed=seed, progress=progress,
        weights={"z": schedules.linear(0.0, 1.0, epochs)}, title="known clusters", **settings,
    )  # fmt: skip


@torch.no_grad()
def _features(view: nn.Module, data: Batch, name: str) -> tuple[Any, Any]:
    """Features of a view, about zero with a spread of one, and which are known: ``(rows, F)``."""
    value, present = data[name], data.present(name)
    known = present.reshape(present.shape + (1,) * (value.dim() - present.dim())).expand_as(value)
    if isinstance(view, Columns):
        features = view.features
        value = torch.where(known, value, features.filler).to(features.center)
        return features(value).cpu().numpy(), known[:, features.owners].cpu().numpy()
    count = known.sum(0).clamp_min(1)
    centred = torch.where(known, value - (value * known).sum(0) / count, 0.0)
    spread = (centred.square().sum(0) / count).sqrt().clamp_min(1e-3)
    return (centred / spread).cpu().numpy(), known.cpu().numpy()


def infer_columns(value: Tensor, present: Tensor) -> Columns:
    """Columns for numbers ``(rows, D)``: binary if all known ones are 0 or 1, else normal.

    Args:
        value: shape ``(rows, D)``.
        present: boolean, shape ``(rows,)`` or ``(rows, D)``.
    """
    known = present.reshape(len(value), -1).expand_as(value)
    columns = []
    for i in range(value.shape[1]):
        found = value[:, i][known[:, i]]
        binary = bool(((found == 0) | (found == 1)).all()) and len(found) > 0
        columns.append(Column.of(str(i), "bernoulli" if binary else "normal", found.cpu()))
    return Columns(columns)
