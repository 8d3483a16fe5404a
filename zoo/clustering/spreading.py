"""A start from a graph of neighbours: its parts, or labels that spread, are known for a while.

First an autoencoder is trained without labels; its codes are joined to their nearest neighbours;
given labels spread along this graph, or, without any, it is cut into parts (:mod:`.neighbours`);
then the pair is fitted for some epochs as if every row had been labelled so.  The fit that follows
sees the given labels alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyrozoo.guides import Amortized
from pyrozoo.inference import Batch, EnumELBO, fit
from pyrozoo.inference.modes import seeded
from pyrozoo.inference.reading import read_count
from pyrozoo.zoo.clustering.neighbours import check_neighbors, neighbour_parts
from pyrozoo.zoo.clustering.pretraining import given_labels, pretrain_autoencoder, rows_with_x
from pyrozoo.zoo.clustering.vade import VaDE


def start_spread(
    program: nn.Module,
    guide: nn.Module,
    data: Batch,
    *,
    num_classes: int,
    likelihood: str = "bernoulli",
    epochs: int = 10,
    known_epochs: int = 4,
    batch_size: int = 256,
    lr: float = 1e-3,
    alpha: float = 10.0,
    hidden: Sequence[int] = (500, 500, 2000),
    code_dim: int = 10,
    num_neighbors: int = 10,
    balance: float = 0.0,
    noise: float = 0.0,
    degrees: float = 0.0,
    shift: float = 0.0,
    image_shape: Sequence[int] | None = None,
    seed: int = 0,
    progress: bool = False,
    **settings: Any,
) -> None:
    """Spread the labels or cut the graph, then fit the pair to what was found.

    Args:
        program, guide: with sites x and y, trained in place.
        data: with x, and perhaps y in part; rows without x are left out.
        num_classes: how many values y has.
        likelihood: of the autoencoder.
        epochs: of the autoencoder.
        known_epochs: of the fit to what was found.
        batch_size, lr: of both.
        alpha: weight of log q(y | x) in the second, if the guide has it; else zero.
        hidden, code_dim: of the autoencoder.
        num_neighbors: of each row in the graph.
        balance: how much parts of like sizes are preferred, see :func:`.cut_graph`.
        noise, degrees, shift, image_shape: what the autoencoder undoes, see
            :func:`.pretrain_autoencoder`.
        seed: of all of it.
        progress: show progress bars.
        settings: further ones of both fits: folder, resume, compile, device.

    Raises:
        ValueError: there are not more rows than neighbours, or without labels too few to cut the
            graph; or a number of epochs is not positive.
    """
    data = rows_with_x(data)
    check_neighbors(num_neighbors, len(data))
    read_count("known_epochs", known_epochs)
    width = data.shape("x")[-1]
    with seeded(seed):
        autoencoder = VaDE(width, num_classes, code_dim, hidden, likelihood)
        encoder = Amortized(autoencoder, ["x"], hidden)
    codes = pretrain_autoencoder(
        autoencoder, encoder, data, epochs=epochs, batch_size=batch_size, lr=lr, noise=noise,
        degrees=degrees, shift=shift, image_shape=image_shape, seed=seed, progress=progress,
        **settings,
    )  # fmt: skip
    if (folder := settings.get("folder")) is not None:
        settings = {**settings, "folder": Path(folder) / "known"}
    parts = spread_parts(
        data, codes, num_classes, num_neighbors=num_neighbors, balance=balance, seed=seed
    )
    fit(
        program, guide, data.drop("y").add({"y": parts}),
        objective=EnumELBO(observed_guide_weights={"y": alpha} if alpha else {}),
        epochs=known_epochs, batch_size=batch_size, lr=lr, seed=seed, progress=progress,
        title="parts of the graph", **settings,
    )  # fmt: skip


def spread_parts(
    data: Batch,
    codes: Tensor,
    num_classes: int,
    *,
    num_neighbors: int = 10,
    balance: float = 0.0,
    seed: int = 0,
) -> Tensor:
    """The given labels, spread along the graph of codes, or its parts where none is given.

    Args:
        data: perhaps with y in part.
        codes: ``(rows, D)``, of which the nearest neighbours are found.
        num_classes, num_neighbors, balance, seed: see :func:`start_spread`.

    Returns:
        a class for every row, ``(rows,)``.

    Raises:
        ValueError: there are not more rows than neighbours, or without labels too few to cut the
            graph.
    """
    labels, known = given_labels(data)
    parts = neighbour_parts(
        codes.double().cpu().numpy(), num_classes, labels, known, num_neighbors=num_neighbors,
        balance=balance, seed=seed,
    )  # fmt: skip
    return torch.as_tensor(parts, device=data.device).long()
