"""The starts that clustering methods share: an autoencoder made of the pair itself, and centres."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from torch import Tensor, nn

from pyrozoo.guides import Corrupted, Mean
from pyrozoo.inference import Batch, EnumELBO, Stored, fit, predict, responsibilities
from pyrozoo.zoo.baselines import check_clusters
from pyrozoo.zoo.clustering.neighbours import neighbour_parts
from pyrozoo.zoo.networks.corruption import corruption


def pretrain_autoencoder(
    program: nn.Module,
    guide: nn.Module,
    data: Batch,
    *,
    epochs: int = 20,
    batch_size: int = 256,
    lr: float = 1e-3,
    noise: float = 0.0,
    degrees: float = 0.0,
    shift: float = 0.0,
    image_shape: Sequence[int] | None = None,
    seed: int = 0,
    progress: bool = False,
    silent: Iterable[str] = ("y", "z"),
    **settings: Any,
) -> Tensor:
    """Train a pair as an autoencoder and give the codes of all rows, ``(rows, D)``.

    The guide is noiseless and only the likelihood is in the objective.

    Args:
        program, guide: trained in place, but for what only the silent sites depend on.
        data: with x; labels are not looked at.
        epochs, batch_size, lr: of its fit.
        noise: sd of the noise on what the guide reads (a denoising autoencoder).
        degrees, shift: how far the images that the guide reads are turned, to either side, and
            shifted, in pixels (an autoencoder that undoes moves).
        image_shape: channels, height and width, where images are moved.
        seed: of all of it.
        progress: show a progress bar.
        silent: sites whose terms are left out.
        settings: further ones of the fit: folder, resume, compile, device.
    """
    change = corruption(noise, degrees, shift, image_shape)
    chosen = {"noise": noise, "degrees": degrees, "shift": shift}
    only_x = data.drop(*(name for name in data.names if name != "x"))
    fit(
        program, Mean(guide if change is None else Corrupted(guide, change)), only_x,
        objective=EnumELBO(weights=dict.fromkeys(silent, 0.0)), epochs=epochs,
        batch_size=batch_size, lr=lr, seed=seed, progress=progress, title="autoencoder",
        decided_by=chosen, **settings,
    )  # fmt: skip
    return predict(program, Mean(guide), only_x, "z", num_samples=1, seed=seed)


def given_labels(data: Batch, site: str = "y") -> tuple[Any, Any]:
    """The labels and where they are known, arrays ``(rows,)``, of rows in memory or on disk.

    Both are None where no row has one.

    Args:
        data: perhaps with the site.
        site: of the labels.
    """
    known = data.present(site).cpu().numpy()
    if not known.any():
        return None, None
    alone = data.drop(*(name for name in data.names if name != site))
    pieces = alone.pieces() if isinstance(alone, Stored) else [alone]
    return torch.cat([piece[site] for piece in pieces]).cpu().numpy(), known


def rows_with_x(data: Batch) -> Batch:
    """The rows that have some x: the others have no code that says anything of them."""
    rows = data.extent("x").rows
    if bool(rows.all()):
        return data
    return data.select(rows) if isinstance(data, Stored) else data[rows]


def start_centres(
    program: Any,
    guide: Mean,
    data: Batch,
    *,
    clusters: Literal["kmeans", "neighbours"] = "kmeans",
    num_starts: int = 20,
    num_neighbors: int = 15,
    balance: float = 0.0,
    seed: int = 0,
    **options: Any,
) -> None:
    """Pretrain as an autoencoder, then put the centres ``program.loc`` on clusters of its codes.

    ``clusters="kmeans"``: of ``num_starts`` runs of k-means the one with the least squared
    distance.  With labels in the data each centre gets the number of a label, one to one, so that
    most labelled rows agree.

    ``clusters="neighbours"``, which departs from the papers: the means of the parts of the codes'
    graph of nearest neighbours, see :mod:`.neighbours`; with labels in the data, these spread along
    it.

    No other labels are looked at.

    Args:
        program: with centres ``loc``, ``(K, D)``.
        guide: of z, noiseless.
        data: with x, and perhaps y.
        clusters: ``"kmeans"`` or ``"neighbours"``.
        num_starts: runs of k-means; on the graph, for each number of its eigenvectors.
        num_neighbors: of each row in the graph.
        balance: how much parts of like sizes are preferred, see :func:`.cut_graph`.
        seed: of all of it.
        options: of :func:`pretrain_autoencoder`.

    Raises:
        ValueError: an option has another value, or there are too few rows.
    """
    if clusters not in ("kmeans", "neighbours"):
        raise ValueError(f"clusters is 'kmeans' or 'neighbours', got {clusters!r}")
    drawn = pretrain_autoencoder(program, guide.guide, data, seed=seed, **options)
    codes, size = drawn.cpu().numpy(), len(program.loc)
    check_clusters(size, len(codes))
    labels, known = given_labels(data)
    if clusters == "neighbours":
        codes = codes.astype(np.float64)
        parts = neighbour_parts(
            codes, size, labels, known, num_neighbors=num_neighbors, num_starts=num_starts,
            balance=balance, seed=seed,
        )  # fmt: skip
        share = np.eye(size)[parts]
        centres = share.T @ codes / np.maximum(share.sum(0), 1.0)[:, None]
    else:
        found = KMeans(size, n_init=num_starts, random_state=seed).fit(codes)
        centres = found.cluster_centers_
        if labels is not None:
            agreement = np.zeros((size, size))  # label, cluster
            np.add.at(agreement, (labels[known], found.labels_[known]), 1)
            centres = centres[linear_sum_assignment(agreement, maximize=True)[1]]
    with torch.no_grad():
        program.loc.copy_(torch.as_tensor(centres))


def start_network(
    program: nn.Module,
    guide: nn.Module,
    network: nn.Module,
    encoder: nn.Module,
    data: Batch,
    *,
    steps: int = 200,
    batch_size: int = 64,
    lr: float = 3e-3,
    seed: int = 0,
    progress: bool = False,
    **settings: Any,
) -> None:
    """Train q(y | x) to name the cluster that the mixture finds most likely, and nothing else.

    A network that does not know yet what the mixture says would pull it apart, and by the bound
    alone it would merge clusters.

    Args:
        program, guide: the pair.
        network: the part of the guide that proposes y.
        encoder: the part that proposes z.
        data: with x, and perhaps y, which counts as certain.
        steps: at least so many, in whole epochs.
        batch_size, lr, seed, progress: of its fit.
        settings: further ones: device.
    """
    share = responsibilities(program, Mean(encoder), data, num_samples=1, seed=seed)
    objective = EnumELBO(
        weights=dict.fromkeys(("x", "y", "z"), 0.0), observed_guide_weights={"y": 1.0}
    )
    own = {id(x) for x in network.parameters()}
    others = [x for net in (program, guide) for x in net.parameters()]
    others = [x for x in others if id(x) not in own and x.requires_grad]
    for x in others:
        x.requires_grad_(False)
    try:
        fit(
            program, guide, data.drop("y").add({"y": share.argmax(1)}), objective=objective, lr=lr,
            epochs=math.ceil(steps / math.ceil(len(data) / batch_size)), batch_size=batch_size,
            seed=seed, progress=progress, title="q(y | x)", **settings,
        )  # fmt: skip
    finally:
        for x in others:
            x.requires_grad_(True)
