"""Makers of the methods that find clusters; those with centres are in :mod:`.embedded`."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, cast

from torch import nn

from pyrozoo.guides import (
    Amortized,
    Classifier,
    Corrupted,
    Ladder,
    MixturePosterior,
    Part,
    Sequential,
)
from pyrozoo.inference import Batch, EnumELBO, Result
from pyrozoo.zoo.baselines import Covariance
from pyrozoo.zoo.clustering import GMVAE, MFCVAE, VAEEM, VaDE
from pyrozoo.zoo.clustering.embedded import EMBEDDED
from pyrozoo.zoo.clustering.mfcvae import each, fade_in, open_gates, start_facets
from pyrozoo.zoo.clustering.pretraining import start_network
from pyrozoo.zoo.clustering.spreading import start_spread
from pyrozoo.zoo.clustering.vade import start_mixture
from pyrozoo.zoo.clustering.vaeem import EStep, StackEncoder, start_kmeans
from pyrozoo.zoo.model import Method, Model, classification, repeats, width
from pyrozoo.zoo.networks.corruption import corruption


def vade(
    batch: Batch,
    *,
    num_clusters: int = 10,
    latent_dim: int = 10,
    hidden: Sequence[int] = (500, 500, 2000),
    likelihood: str = "bernoulli",
    covariance: Covariance = "diag",
    init_scale: float = 0.1,
    labelled_share: float = 0.5,
    cluster: str = "exact",
    noise: float = 0.0,
) -> Model:
    """VaDE: the cluster is summed in the program, the guide is q(z | x).

    Or, with the same program, the guide proposes the cluster, and the bound is looser:
    ``cluster="geometric"`` and ``"arithmetic"`` from the mixture (:class:`.MixturePosterior`),
    ``"network"`` from one, q(y | x), which learns from labels, too, and first what the mixture
    says.

    Rows with a label are visited so often that they make up ``labelled_share`` of an epoch; zero
    visits every row once.  ``noise`` departs from the paper: the sd of noise on what the guide
    reads in training (:class:`.Corrupted`); the autoencoder of the start has its own.
    """
    program = VaDE(width(batch, "x"), num_clusters, latent_dim, hidden, likelihood, covariance)
    encoder = Amortized(program, ["x"], hidden, init_scale=init_scale)
    guide, network = _with_cluster(program, encoder, cluster, hidden)
    repeat = repeats(batch, labelled_share)
    objective = EnumELBO() if network is None else classification(batch, 1.0, repeat)

    def start(data: Batch, **options: Any) -> None:
        start_mixture(program, guide, data, **options)
        if network is not None:
            where = {k: v for k, v in options.items() if k in ("seed", "progress", "device")}
            start_network(program, guide, network, encoder, data, **where)

    settings: dict[str, Any] = {"epochs": 100, "batch_size": 256, "lr": 1e-3, "clip": 100.0}
    if repeat > 1:
        settings["repeat"] = {"y": repeat}
    change = corruption(noise)
    whole = guide if change is None else Corrupted(guide, change)
    return Model("vade", program, whole, objective, settings=settings, start=start)


def _with_cluster(
    program: nn.Module, guide: Part, cluster: str, hidden: Sequence[int]
) -> tuple[nn.Module, nn.Module | None]:
    """A guide of z with a proposal of y, and the network that makes it, if one does."""
    if cluster == "exact":
        return guide, None
    if cluster in ("geometric", "arithmetic"):
        return MixturePosterior(program, guide, kind=cluster), None
    if cluster == "network":
        network = Classifier(program, "y", ["x"], hidden)
        return Sequential(network, guide), network
    raise ValueError(f"cluster is 'exact', 'geometric', 'arithmetic' or 'network', got {cluster!r}")


def mfcvae(
    batch: Batch,
    *,
    num_clusters: int | Sequence[int] = (25, 25),
    latent_dims: Sequence[int] = (5, 5),
    hidden: Sequence[int] = (500, 2000),
    likelihood: str = "bernoulli",
    activation: str = "relu",
    depth: int = 1,
    share: float = 0.1,
    covariance: Covariance = "diag",
    init_scale: float = 0.1,
    fade: float = 127.0,
) -> Model:
    """MFCVAE: the clusters of all facets are summed in the program, the guide is a ladder.

    Lists have one entry a facet, the top one last; ``num_clusters`` and ``hidden`` may have one for
    all; each rung has ``depth`` layers.  After the top facet has been trained alone each of the
    others comes in over ``fade`` epochs, so that the fit should be longer than these.
    """
    program = MFCVAE(
        width(batch, "x"), num_clusters, latent_dims, hidden, likelihood, activation, depth, share,
        covariance,
    )  # fmt: skip
    count = len(latent_dims)
    sites, widths = [f"z_{j + 1}" for j in range(count)], each(hidden, count, "hidden")
    guide = Ladder(program, ["x"], sites, widths, activation, depth, init_scale)
    weights = fade_in(count, fade)

    def start(data: Batch, **options: Any) -> None:
        start_facets(program, guide, data, **options)
        open_gates(program, weights, 0)

    def follow(result: Result) -> None:
        open_gates(cast(MFCVAE, result.program), weights, result.epoch)

    settings: dict[str, Any] = {"epochs": 201, "batch_size": 512, "lr": 5e-4, "weights": weights}
    settings["callbacks"] = [follow]
    return Model("mfcvae", program, guide, settings=settings, start=start)


def gmvae(
    batch: Batch,
    *,
    num_clusters: int = 10,
    latent_dim: int = 64,
    noise_dim: int = 32,
    hidden: Sequence[int] = (500, 500),
    prior_hidden: Sequence[int] = (64,),
    likelihood: str = "bernoulli",
    cluster: str = "exact",
    spread: bool = False,
) -> Model:
    """GMVAE: the cluster is summed in the program, the guide is q(z | x) q(w | x).

    ``cluster="network"`` adds a mean-field q(y | x), over which the cluster is summed then: the
    paper's first version, and a looser bound.  With ``spread``, which departs from the paper, the
    fit starts from the parts of a graph of neighbours (:func:`.start_spread`).
    """
    program = GMVAE(
        width(batch, "x"), num_clusters, latent_dim, noise_dim, hidden, prior_hidden, likelihood
    )
    guide: Part = Amortized(program, ["x"], hidden, structure="independent")
    if cluster == "network":
        guide = Sequential(Classifier(program, "y", ["x"], hidden), guide)
    elif cluster != "exact":
        raise ValueError(f"cluster is 'exact' or 'network', got {cluster!r}")
    settings: dict[str, Any] = {"epochs": 100, "batch_size": 100, "lr": 1e-3, "clip": 100.0}
    start = None
    if spread:
        start = functools.partial(
            start_spread, program, guide, num_classes=num_clusters, likelihood=likelihood,
            alpha=10.0 if cluster == "network" else 0.0,
        )  # fmt: skip
    return Model("gmvae", program, guide, settings=settings, start=start)


def gmvae_two_level(
    batch: Batch,
    *,
    num_clusters: int = 10,
    latent_dim: int = 64,
    hidden: Sequence[int] = (512, 512),
    likelihood: str = "bernoulli",
) -> Model:
    """The other GMVAE: VaDE's program, with the cluster summed over the guide's q(y | x).

    The guide is q(y | x) q(z | x, y); nothing is pretrained.
    """
    program = VaDE(width(batch, "x"), num_clusters, latent_dim, hidden, likelihood)
    guide = Sequential(
        Classifier(program, "y", ["x"], hidden), Amortized(program, ["x", "y"], hidden)
    )
    settings: dict[str, Any] = {"epochs": 100, "batch_size": 100, "lr": 1e-3, "clip": 100.0}
    return Model("gmvae_two_level", program, guide, settings=settings)


def vae_em(
    batch: Batch,
    *,
    num_clusters: int = 10,
    latent_dim: int = 10,
    hidden: Sequence[int] = (200,),
    likelihood: str = "bernoulli",
    activation: str = "relu",
    num_draws: int = 1,
) -> Model:
    """VAE+EM: one autoencoder a cluster, and q(y | x) in proportion to exp of their bounds.

    ``num_draws`` of each latent estimate these bounds; 0 takes the mean of the latent.
    """
    x_dim = width(batch, "x")
    program = VAEEM(x_dim, num_clusters, latent_dim, hidden, likelihood, activation)
    encoder = StackEncoder(num_clusters, x_dim, hidden, latent_dim, activation)
    guide = Sequential(
        EStep(program, encoder, num_draws),
        Amortized(program, ["x", "y"], network={"z": encoder}),
    )
    start = functools.partial(start_kmeans, program, guide)
    settings: dict[str, Any] = {"epochs": 50, "batch_size": 256, "lr": 1e-3}
    return Model("vae_em", program, guide, settings=settings, start=start)


METHODS = [
    Method("vade", "Variational deep embedding", "clustering", "core", "jiang2017", VaDE, vade),
    Method(
        "mfcvae", "Several clusterings, one a facet", "clustering", "core", "falck2021", MFCVAE,
        mfcvae,
    ),
    Method(
        "gmvae", "Mixture moved by noise", "clustering", "maintained", "dilokthanakul2016", GMVAE,
        gmvae,
    ),
    Method(
        "gmvae_two_level", "VaDE with q(y | x)", "clustering", "maintained", "shu2016", VaDE,
        gmvae_two_level,
    ),
    Method(
        "vae_em", "One VAE a cluster, by EM", "clustering", "maintained", "adipoetra2025", VAEEM,
        vae_em,
    ),
    *EMBEDDED,
]  # fmt: skip
