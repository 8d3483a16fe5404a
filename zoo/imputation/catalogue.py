"""Makers of the methods that fill holes in tables."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

from pyrozoo.guides import Amortized, Classifier, Part, Sequential
from pyrozoo.inference import Batch, EnumELBO
from pyrozoo.zoo.imputation import HIVAE
from pyrozoo.zoo.imputation.hivae import infer_columns, start_clusters
from pyrozoo.zoo.model import Method, Model, classification, width
from pyrozoo.zoo.networks import Likelihood
from pyrozoo.zoo.networks import likelihood as make_likelihood


def hivae(
    batch: Batch,
    *,
    num_clusters: int = 5,
    latent_dim: int = 10,
    hidden: Sequence[int] = (32,),
    guide_hidden: Sequence[int] = (128,),
    columns: Mapping[str, Likelihood | str] | None = None,
    classifier: bool = True,
    alpha: float = 1.0,
) -> Model:
    """HI-VAE: the cluster is summed over the guide's q(y | x).

    ``columns`` has the likelihood of each view, keys ``x`` or ``x_*``; without it a column of zeros
    and ones is binary, and any other normal.  With ``classifier=False`` the cluster is summed in
    the program.  ``alpha`` weighs the classification term of rows whose cluster is known, relative
    to the bound of all rows.  Small tables are visited more often: at least 800 steps, before the
    clusters are set free and again after.
    """
    asked = dict(columns or {})
    views: dict[str, Likelihood] = {}
    for name in dict.fromkeys([*batch.names, *asked]):
        given = asked.get(name)
        if isinstance(given, Likelihood) and name not in batch:
            views[name] = copy.deepcopy(given)
        elif given is not None:
            views[name] = copy.deepcopy(make_likelihood(given, width(batch, name)))
        elif name == "x" or name.startswith("x_"):
            width(batch, name)
            views[name] = infer_columns(batch[name], batch.present(name))
    program = HIVAE(views, num_clusters, latent_dim, hidden)
    given_sites = list(views)
    if classifier:
        guide: Part = Sequential(
            Classifier(program, "y", given_sites, guide_hidden),
            Amortized(program, [*given_sites, "y"], guide_hidden),
        )
    else:
        guide = Amortized(program, given_sites, guide_hidden)
    objective = classification(batch, alpha) if classifier else EnumELBO()
    size = 128
    epochs = max(20, math.ceil(800 / math.ceil(len(batch) / size)))

    def start(data: Batch, **options: Any) -> None:
        start_clusters(program, guide, data, **{"epochs": epochs, "batch_size": size, **options})

    settings: dict[str, Any] = {"epochs": epochs, "batch_size": size, "lr": 3e-3}
    settings["lr_schedule"] = "cosine"
    return Model("hivae", program, guide, objective, settings=settings, start=start)


METHODS = [
    Method("hivae", "Mixed tables with holes", "imputation", "core", "nazabal2020", HIVAE, hivae),
]
