"""Makers of the methods that say how probable data are."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from pyrozoo.guides import Amortized
from pyrozoo.inference import IWELBO, Batch, EnumELBO, fit
from pyrozoo.zoo.density import VAE
from pyrozoo.zoo.model import Method, Model, width


def vae(
    batch: Batch,
    *,
    latent_dim: int = 50,
    hidden: Sequence[int] = (200, 200),
    likelihood: str = "bernoulli",
    activation: str = "tanh",
    objective: str = "elbo",
    num_particles: int = 1,
) -> Model:
    """VAE: one guide q(z | x), whatever the objective (``"elbo"``, ``"iwae"``, ``"dreg"``).

    With another objective than ``"elbo"`` a start with ``epochs`` fits by the evidence bound first,
    which takes a fraction of the time of many draws.
    """
    objectives: dict[str, Callable[[int], EnumELBO]] = {
        "elbo": EnumELBO,
        "iwae": IWELBO,
        "dreg": functools.partial(IWELBO, gradient="dreg"),
    }
    if objective not in objectives:
        raise ValueError(f"objective is one of {', '.join(objectives)}, got {objective!r}")
    program = VAE(width(batch, "x"), latent_dim, hidden, likelihood, activation)
    guide = Amortized(program, ["x"], hidden, activation)
    settings: dict[str, Any] = {"epochs": 100, "batch_size": 100, "lr": 1e-3}

    def start(data: Batch, *, epochs: int = 0, **options: Any) -> None:
        if epochs:
            chosen = {"batch_size": 100, "lr": 1e-3, "lr_schedule": "cosine", **options}
            fit(program, guide, data, epochs=epochs, title="evidence bound", **chosen)

    return Model(
        "vae", program, guide, objectives[objective](num_particles), settings=settings,
        start=None if objective == "elbo" else start,
    )  # fmt: skip


METHODS = [
    Method("vae", "Variational autoencoder", "density", "core", "burda2016", VAE, vae),
]
