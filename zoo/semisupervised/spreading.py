"""A start for few labels: they spread along a graph of neighbours, and count as known for a while.

First an autoencoder is trained without labels; its codes are joined to their nearest neighbours;
the given labels spread along this graph (:mod:`pyrozoo.zoo.clustering.neighbours`); then the pair
is fitted for some epochs as if every row had been labelled so.  The fit that follows sees the given
labels alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pyrozoo.guides import Amortized
from pyrozoo.inference import Batch, EnumELBO, fit
from pyrozoo.inference.modes import seeded
from pyrozoo.zoo.clustering import VaDE
from pyrozoo.zoo.clustering.neighbours import neighbour_graph, spread_labels
from pyrozoo.zoo.clustering.pretraining import pretrain_autoencoder


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
    seed: int = 0,
    progress: bool = False,
    **settings: Any,
) -> None:
    """Spread the labels, then fit the pair to the spread ones.

    Args:
        program, guide: with sites x and y, trained in place.
        data: with x, and y in part.
        num_classes: how many values y has.
        likelihood: of the autoencoder.
        epochs: of the autoencoder.
        known_epochs: of the fit to spread labels.
        batch_size, lr: of both.
        alpha: weight of log q(y | x) in the second.
        hidden, code_dim: of the autoencoder.
        num_neighbors: of each row in the graph.
        seed: of all of it.
        progress: show progress bars.
        settings: further ones of both fits: folder, resume, compile, device.

    Raises:
        ValueError: no row has a label, or there are fewer rows than neighbours.
    """
    known = data.present("y").cpu().numpy()
    if not known.any():
        raise ValueError("site 'y': labels are spread from labelled rows, but none is known")
    width = data.shape("x")[-1]
    with seeded(seed):
        autoencoder = VaDE(width, num_classes, code_dim, hidden, likelihood)
        encoder = Amortized(autoencoder, ["x"], hidden)
    codes = pretrain_autoencoder(
        autoencoder, encoder, data, epochs=epochs, batch_size=batch_size, lr=lr, seed=seed,
        progress=progress, **settings,
    )  # fmt: skip
    graph = neighbour_graph(codes.cpu().numpy(), num_neighbors)
    spread = spread_labels(graph, data["y"].cpu().numpy(), known, num_classes, seed=seed)
    if (folder := settings.get("folder")) is not None:
        settings = {**settings, "folder": Path(folder) / "known"}
    classes = torch.as_tensor(spread.clusters).to(data["y"])
    fit(
        program, guide, data.full("y").replace("y", classes),
        objective=EnumELBO(observed_guide_weights={"y": alpha}), epochs=known_epochs,
        batch_size=batch_size, lr=lr, seed=seed, progress=progress, title="spread labels",
        **settings,
    )  # fmt: skip
