"""Makers of the methods that pull embeddings towards centres: DEC, IDEC and DCN."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from torch import nn

from pyrozoo.guides import Amortized, Mean, MixturePosterior
from pyrozoo.inference import Batch, EnumELBO
from pyrozoo.zoo.clustering import DCN, DEC
from pyrozoo.zoo.clustering.dcn import follow_centres
from pyrozoo.zoo.clustering.dec import INPUTS, follow_targets, set_target
from pyrozoo.zoo.clustering.pretraining import start_centres
from pyrozoo.zoo.model import Method, Model, width


def dec(
    batch: Batch,
    *,
    num_clusters: int = 10,
    latent_dim: int = 10,
    hidden: Sequence[int] = (500, 500, 2000),
    likelihood: str = "normal(0.7071)",
    dof: float = 1.0,
    update_every: int = 1,
) -> Model:
    """DEC: sharpened targets alone, made anew every ``update_every`` epochs."""
    model = _deep_embedded(batch, num_clusters, latent_dim, hidden, likelihood, dof, update_every)
    model.method, model.objective = "dec", EnumELBO(weights={"x": 0.0})
    return model


def idec(
    batch: Batch,
    *,
    num_clusters: int = 10,
    latent_dim: int = 10,
    hidden: Sequence[int] = (500, 500, 2000),
    likelihood: str = "normal(0.7071)",
    dof: float = 1.0,
    update_every: int = 1,
    gamma: float = 0.1,
) -> Model:
    """IDEC: DEC with the likelihood of x.

    The targets weigh ``gamma`` relative to the squared error of one feature, that is, gamma times
    the number of features in nats.
    """
    model = _deep_embedded(batch, num_clusters, latent_dim, hidden, likelihood, dof, update_every)
    weight = gamma * width(batch, "x")
    model.method, model.objective = "idec", EnumELBO(weights={"y": weight, "target": weight})
    return model


def _deep_embedded(
    batch: Batch,
    num_clusters: int,
    latent_dim: int,
    hidden: Sequence[int],
    likelihood: str,
    dof: float,
    update_every: int,
) -> Model:
    """DEC's program and guide, without an objective of its own."""
    program = DEC(width(batch, "x"), num_clusters, latent_dim, hidden, likelihood, dof, len(batch))
    guide = Mean(Amortized(program, ["x"], hidden))

    def start(data: Batch, **options: Any) -> None:
        start_centres(program, guide, data, **options)
        set_target(program, guide, data)

    settings: dict[str, Any] = {"epochs": 50, "batch_size": 256, "lr": 1e-3, "inputs": INPUTS}
    return Model(
        "", program, guide, settings=settings, start=start,
        prepare=lambda data: follow_targets(program, guide, data, update_every),
    )  # fmt: skip


def dcn(
    batch: Batch,
    *,
    num_clusters: int = 10,
    latent_dim: int = 10,
    hidden: Sequence[int] = (500, 500, 2000),
    likelihood: str = "normal(0.7071)",
    weight: float = 1.0,
    assignment: str = "hard",
) -> Model:
    """DCN: the nearest centre; with ``assignment="soft"`` the cluster is summed in the program.

    ``weight`` is that of the squared distance to the centre, in nats.
    """
    program = DCN(width(batch, "x"), num_clusters, latent_dim, hidden, likelihood, weight)
    inner: nn.Module = Amortized(program, ["x"], hidden)
    if assignment == "hard":
        inner = MixturePosterior(program, inner, kind="nearest")
    elif assignment != "soft":
        raise ValueError(f"assignment is 'hard' or 'soft', got {assignment!r}")
    guide = Mean(inner)
    settings: dict[str, Any] = {"epochs": 50, "batch_size": 256, "lr": 1e-3}
    return Model(
        "dcn", program, guide, settings=settings,
        start=functools.partial(start_centres, program, guide),
        prepare=lambda data: follow_centres(program, guide, data),
    )  # fmt: skip


EMBEDDED = [
    Method("dec", "Deep embedded clustering", "clustering", "reference", "xie2016", DEC, dec),
    Method("idec", "DEC with a decoder", "clustering", "reference", "guo2017", DEC, idec),
    Method("dcn", "Embedding for k-means", "clustering", "reference", "yang2017", DCN, dcn),
]
