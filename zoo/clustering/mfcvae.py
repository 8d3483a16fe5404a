r"""MFCVAE: several clusterings of the same rows at once, one for each facet.

Generative process, for every row::

    c_j ~ Categorical(softmax(logits_j))          the cluster of facet j, one of K_j, j = 1 .. J
    z_j | c_j ~ Normal(loc_j[c_j], scale_j[c_j])  its embedding
    x | z ~ likelihood(ladder(z_1, .., z_J))      the data, from the top facet J down

The guide is q(z_1 | x) .. q(z_J | x), from one trunk that goes up as the decoder comes down.  No
cluster is proposed: each is summed, and as x does not depend on them given z the sums are apart, of
K_1 + .. + K_J terms, with one pass of the decoder.

============== ==============================================================================
observed       what the run is
============== ==============================================================================
x              J clusterings; which facet finds what is not known beforehand
x, some c_j    facet j is named by labels, for all rows or some, the others are discovered
x, all c_j     classification by each p(c_j | z_j)
============== ==============================================================================

Training is progressive: first the top facet's path alone, then the next facet comes in, its gate in
the decoder and the weights of its c_j and z_j rising from zero to one.  Gates and weights are set
from outside (:func:`fade_in`, :func:`open_gates`); the program has a buffer for the gates, and no
schedule.  Which facet has found which attribute is said afterwards, by the best accuracy.

Source: Fabian Falck, Haoting Zhang, Matthew Willetts, George Nicholson, Christopher Yau, Chris
Holmes, "Multi-facet clustering variational autoencoders" (2021).

Deviations: the sums over clusters are exact where the paper puts in the optimal q(c_j | x), which
at one draw, as released, has the same value and gradient; the gate moves once an epoch, to what the
weight reaches at its end, not at every batch; scales are a softplus of another slope; the mixtures
start from at most 10,000 rows.  Known c_j, more than two facets, ``depth`` and ``share`` are
additions, and so is the start with ``clusters="neighbours"``: the top facet's path is trained as an
autoencoder, and its mixture starts at the parts of the codes' graph of nearest neighbours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast, get_args

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from scipy.optimize import linear_sum_assignment
from torch import nn

from pyrozoo.guides import Mean
from pyrozoo.inference import Batch, EnumELBO, fit, predict, schedules
from pyrozoo.inference.training.schedules import Schedule
from pyrozoo.zoo.baselines import Covariance, gmm
from pyrozoo.zoo.clustering.mixture import Mixture
from pyrozoo.zoo.clustering.neighbours import Clusters, neighbour_parts
from pyrozoo.zoo.clustering.pretraining import given_labels
from pyrozoo.zoo.networks import LadderDecoder, inverse_positive_scale

ROWS = 10_000  # at most, from which the mixtures start
SCALE = 0.1  # at which standard deviations start


class MFCVAE(nn.Module):
    """p(c_1, z_1, .., c_J, z_J, x) of the module's docstring.

    Args:
        x_dim: features of a row.
        num_clusters: K_1 .. K_J, or one number for all facets.
        latent_dims: dimensions of z_1 .. z_J; the last facet is the top one.
        hidden: widths of the decoder's rungs, in the same order, or a single one for all.
        likelihood: of x, a name or a module of :mod:`pyrozoo.zoo.networks`.
        activation: of the hidden layers.
        depth: layers of the same width that each rung has.
        share: how much a facet below the top adds in the decoder when its gate is open.
        covariance: of the components of all facets, ``"diag"`` or ``"full"``.

    Raises:
        ValueError: no facet, or the numbers of clusters, dimensions and widths differ.
    """

    def __init__(
        self,
        x_dim: int = 784,
        num_clusters: int | Sequence[int] = (25, 25),
        latent_dims: Sequence[int] = (5, 5),
        hidden: Sequence[int] = (500, 2000),
        likelihood: Any = "bernoulli",
        activation: str = "relu",
        depth: int = 1,
        share: float = 0.1,
        covariance: Covariance = "diag",
    ) -> None:
        super().__init__()
        count = len(latent_dims)
        sizes = each(num_clusters, count, "num_clusters")
        widths = each(hidden, count, "hidden")
        facets = (
            Mixture(size, dim, covariance, SCALE)
            for size, dim in zip(sizes, latent_dims, strict=True)
        )
        self.facets = cast("Sequence[Mixture]", nn.ModuleList(facets))
        self.decoder = LadderDecoder(
            latent_dims, widths, x_dim, likelihood, activation, depth, share
        )

    def forward(self, batch: Batch) -> None:
        """Generate ``len(batch)`` rows."""
        with pyro.plate("data", len(batch)):
            latents = []
            for j, facet in enumerate(self.facets, 1):
                c = pyro.sample(f"c_{j}", dist.Categorical(logits=facet.logits))
                z = pyro.sample(f"z_{j}", facet.component(c))
                latents.append(z)
            pyro.sample("x", self.decoder(*latents))


def each(given: int | Sequence[int], count: int, name: str) -> tuple[int, ...]:
    """One number for each facet; a single one, as a number or in a list, is for all.

    Raises:
        ValueError: there is no facet, or another count of numbers, or one is not positive.
    """
    numbers = (given,) if isinstance(given, int) else tuple(given)
    numbers = numbers * count if len(numbers) == 1 else numbers
    if not count or len(numbers) != count or min(numbers) < 1:
        raise ValueError(
            f"{name} has one positive number for each of {count} facets (latent_dims), or one for"
            f" all, got {given!r}"
        )
    return numbers


def fade_in(num_facets: int, epochs: float) -> dict[str, Schedule]:
    """Weights of c_j and z_j by site, for all facets but the top one.

    They rise from zero to one in a straight line: those of facet J - 1 over the first ``epochs``,
    those of facet J - 2 over the next, and so on.
    """
    weights: dict[str, Schedule] = {}
    for j in range(num_facets - 1, 0, -1):
        rise = schedules.linear(0.0, 1.0, epochs, wait=(num_facets - 1 - j) * epochs)
        weights |= {f"c_{j}": rise, f"z_{j}": rise}
    return weights


def open_gates(program: MFCVAE, weights: Mapping[str, Schedule], epoch: int) -> None:
    """Set the decoder's gates for the epoch that follows so many: to the weights at its end."""
    below = [weights[f"z_{j}"](epoch + 1.0) for j in range(1, len(program.facets))]
    program.decoder.set_gate([*below, 1.0])


def start_facets(
    program: MFCVAE,
    guide: Any,
    data: Batch,
    *,
    epochs: int = 201,
    batch_size: int = 512,
    lr: float = 5e-4,
    scale: float = SCALE,
    clusters: Clusters = "mixture",
    num_starts: int = 1,
    num_neighbors: int = 15,
    balance: float = 0.0,
    seed: int = 0,
    progress: bool = False,
    **settings: Any,
) -> None:
    """Put a mixture on the codes of every facet, then train with the top facet's path alone.

    Meanwhile the gates of the others are closed and the weights of their sites zero.

    With ``clusters="neighbours"`` the top facet's path is trained as an autoencoder instead, the
    pair itself with a noiseless guide, and its mixture is put on the parts of its codes' graph of
    nearest neighbours afterwards (see :mod:`.neighbours`).

    Args:
        program, guide: trained in place; the guide may be untrained.
        data: with x, and perhaps some c_j.
        epochs, batch_size, lr: of the training.
        scale: standard deviation at which all components start.
        clusters: ``"mixture"`` or ``"neighbours"``.
        num_starts: mixtures by EM from k-means, of which the most likely is taken; or runs of
            k-means for each number of eigenvectors of the graph.
        num_neighbors: of each row in the graph.
        balance: how much parts of like sizes are preferred, see :func:`.cut_graph`.
        seed: of all of it.
        progress: show a progress bar.
        settings: further ones of the fit: folder, resume, compile, device.

    Raises:
        ValueError: a facet has more clusters than there are rows, or its known clusters go beyond
            them; or an option has another value.
    """
    if clusters not in get_args(Clusters):
        raise ValueError(f"clusters is 'mixture' or 'neighbours', got {clusters!r}")
    index = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))[:ROWS]
    some: Batch = data[index.to(data.device)]
    for j, facet in enumerate(program.facets, 1):
        codes = predict(program, Mean(guide), some, f"z_{j}", num_samples=1, seed=seed)
        means = _start(codes.double().cpu().numpy(), some, f"c_{j}", len(facet.logits),
                       num_starts, seed)  # fmt: skip
        with torch.no_grad():
            facet.logits.zero_()
            facet.loc.copy_(torch.from_numpy(means))
            facet.raw_scale.fill_(inverse_positive_scale(scale))
            if facet.raw_lower is not None:
                facet.raw_lower.zero_()
    below = range(1, len(program.facets))
    program.decoder.set_gate([*[0.0 for _ in below], 1.0])
    top, graph = len(program.facets), clusters == "neighbours"
    silent = range(1, top + 1) if graph else below
    off = {f"{site}_{j}": 0.0 for j in silent for site in "cz"}
    chosen = {"scale": scale, "num_starts": num_starts, "clusters": clusters}
    top_labels = given_labels(data, f"c_{top}")
    if graph:
        data = data.drop(*(name for name in data.names if name != "x"))
    fit(
        program, Mean(guide) if graph else guide, data, objective=EnumELBO(weights=off),
        epochs=epochs, batch_size=batch_size, lr=lr, seed=seed, progress=progress,
        title="top facet", decided_by=chosen, **settings,
    )  # fmt: skip
    if graph:
        drawn = predict(program, Mean(guide), data, f"z_{top}", num_samples=1, seed=seed)
        points, size = drawn.double().cpu().numpy(), len(program.facets[-1].logits)
        parts = neighbour_parts(
            points, size, *top_labels, num_starts=num_starts,
            num_neighbors=num_neighbors, balance=balance, seed=seed,
        )  # fmt: skip
        program.facets[-1].set_mixture(np.eye(size)[parts], points)


def _start(codes: Any, data: Batch, site: str, size: int, num_starts: int, seed: int) -> Any:
    """Means ``(K, D)`` of a mixture on codes; where clusters are known, theirs, by name."""
    mixture = gmm(codes, size, seed, "diag", num_starts)
    means = mixture.means_
    labels, known = given_labels(data, site)
    if labels is None:
        return means
    share = mixture.predict_proba(codes)
    agreement = np.stack([share[known & (labels == k)].sum(0) for k in range(size)])
    means = means[linear_sum_assignment(agreement, maximize=True)[1]]
    for k in np.unique(labels[known]):
        means[k] = codes[known & (labels == k)].mean(0)
    return means
