"""Makers of the methods with several modalities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pyrozoo.guides import ProductOfExperts
from pyrozoo.inference import Batch, SubsetELBO, schedules
from pyrozoo.zoo.model import Method, Model, width
from pyrozoo.zoo.multimodal import MVAE


def mvae(
    batch: Batch,
    *,
    latent_dim: int = 64,
    hidden: Sequence[int] = (512, 512),
    likelihood: str = "bernoulli",
    num_random: int = 0,
    warmup: float = 40.0,
) -> Model:
    """MVAE: a product of experts over the keys ``x_*``, with the bounds of single modalities.

    The divergence of z is warmed up, from zero to one over ``warmup`` epochs, as in the authors'
    code; ``num_random`` subsets of the modalities are drawn for every row in addition.
    """
    widths = {name: width(batch, name) for name in batch.names if name.startswith("x_")}
    if len(widths) < 2:
        raise ValueError(
            f"mvae needs two or more modalities x_<name>, got {', '.join(batch.names)}"
        )
    program = MVAE(widths, latent_dim, hidden, likelihood)
    guide = ProductOfExperts(program, list(widths), hidden=hidden, activation="silu")
    objective = SubsetELBO([[name] for name in widths], num_random=num_random)
    settings: dict[str, Any] = {"epochs": 100, "batch_size": 100, "lr": 1e-3}
    settings["weights"] = {"z": schedules.linear(0.0, 1.0, warmup)}
    return Model("mvae", program, guide, objective, settings=settings)


METHODS = [
    Method(
        "mvae", "Multimodal VAE, product of experts", "multimodal", "core", "wu2018", MVAE, mvae
    ),
]
