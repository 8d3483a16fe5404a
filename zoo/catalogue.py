"""The catalogue: the one place where program, default guide and default objective of a method meet.

A maker takes a batch, for its shapes and for what is observed in it, and the method's options, and
returns a :class:`Model`.  :func:`create` is the public way to call one::

    model = zoo.create("vade", {"x": images}, num_clusters=10)
    result = model.fit({"x": images})
"""

from __future__ import annotations

import copy
import difflib
import functools
import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

from torch import nn

from pyrozoo.guides import (
    Amortized,
    Classifier,
    Ladder,
    Mean,
    MixturePosterior,
    Part,
    ProductOfExperts,
    Sequential,
)
from pyrozoo.inference import Batch, EnumELBO, Result, SubsetELBO, fit, schedules
from pyrozoo.inference.batch import Data
from pyrozoo.inference.modes import seeded
from pyrozoo.zoo.baselines import Covariance
from pyrozoo.zoo.clustering import DCN, DEC, GMVAE, MFCVAE, VAEEM, VaDE
from pyrozoo.zoo.clustering.dcn import follow_centres
from pyrozoo.zoo.clustering.dec import INPUTS, follow_targets, set_target
from pyrozoo.zoo.clustering.mfcvae import each, fade_in, open_gates, start_facets
from pyrozoo.zoo.clustering.pretraining import start_centres, start_network
from pyrozoo.zoo.clustering.vade import start_mixture
from pyrozoo.zoo.clustering.vaeem import EStep, StackEncoder, start_kmeans
from pyrozoo.zoo.imputation import HIVAE
from pyrozoo.zoo.imputation.hivae import infer_columns, start_clusters
from pyrozoo.zoo.multimodal import MVAE
from pyrozoo.zoo.networks import ConvClassifier, Likelihood, set_precision
from pyrozoo.zoo.networks import likelihood as make_likelihood
from pyrozoo.zoo.semisupervised import M1, M1M2, M2
from pyrozoo.zoo.semisupervised.m1 import freeze, start_features
from pyrozoo.zoo.semisupervised.m1m2 import Features
from pyrozoo.zoo.semisupervised.spreading import start_spread


@dataclass
class Model:
    """A method made for one data set: both halves, the objective, and how it is usually fitted.

    ``start`` is what happens before the fit (pretraining), called with the data, a seed, whether to
    show progress, and those settings of the fit that say how and where it runs; ``settings`` are
    the defaults of :func:`pyrozoo.inference.training.fit` for this method.  ``prepare`` turns the
    data into those that the fit sees, and gives what is called with the result after every epoch
    (targets made anew, centres moved).
    """

    method: str
    program: nn.Module
    guide: nn.Module
    objective: EnumELBO = field(default_factory=EnumELBO)
    options: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    start: Callable[..., None] | None = None
    prepare: Callable[[Batch], tuple[Batch, Callable[[Result], None]]] | None = None

    def fit(
        self,
        data: Data,
        *,
        seed: int = 0,
        progress: bool = True,
        start: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> Result:
        """Pretrain, where the method does, then fit: see :func:`pyrozoo.inference.training.fit`.

        With ``folder`` the pretraining leaves checkpoints, too, in its subfolder ``start``;
        ``resume=True`` goes on with whichever was interrupted.

        Args:
            data: what is observed.
            seed: of the pretraining and the fit; the networks were initialised by :func:`create`.
            progress: show progress bars.
            start: options of the pretraining.
            settings: options of the fit, in place of the method's defaults; callbacks are called
                after those of the method.
        """
        batch, chosen = Batch.of(data), {**self.settings, **settings}
        own = list(self.settings.get("callbacks", ()))
        if self.prepare is not None:
            batch, follow = self.prepare(batch)
            own.append(follow)
        chosen["callbacks"] = [*own, *settings.get("callbacks", ())]
        if start and self.start is None:
            raise ValueError(f"{self.method} has no pretraining, but got {', '.join(start)}")
        decided_by = {f"option {name}": value for name, value in self.options.items()}
        decided_by |= {f"start {name}": value for name, value in (start or {}).items()}
        return fit(
            self.program, self.guide, batch, objective=self.objective, seed=seed,
            progress=progress, title=self.method, decided_by=decided_by,
            start=self._pretraining(batch, seed, progress, start or {}, chosen), **chosen,
        )  # fmt: skip

    def _pretraining(
        self,
        batch: Batch,
        seed: int,
        progress: bool,
        options: Mapping[str, Any],
        chosen: Mapping[str, Any],
    ) -> Callable[[], None] | None:
        """The pretraining, with checkpoints of its own in the folder ``start`` of the fit's."""
        if (start := self.start) is None:
            return None
        folder = chosen.get("folder")
        where = {name: chosen[name] for name in ("compile", "device", "devices") if name in chosen}
        if folder is not None:
            where |= {"folder": Path(folder) / "start", "resume": chosen.get("resume", False)}
        return lambda: start(batch, seed=seed, progress=progress, **where, **options)


@dataclass(frozen=True)
class Method:
    """An entry of the catalogue."""

    name: str
    title: str
    task: str
    tier: str
    paper: str  # a key of references.bib
    make: Callable[..., Model]

    @property
    def doc(self) -> str:
        """What the file of the method says of it: equations, regimes, source, deviations."""
        module = inspect.getmodule(self.program)
        return inspect.getdoc(module) or ""

    @property
    def program(self) -> type[nn.Module]:
        """The class of its program."""
        return _PROGRAMS[self.name]

    @property
    def options(self) -> dict[str, Any]:
        """Its options and their defaults."""
        parameters = inspect.signature(self.make).parameters.values()
        own = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
        return {**own, "precision": "float32"}


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
) -> Model:
    """VaDE: the cluster is summed in the program, the guide is q(z | x).

    Or, with the same program, the guide proposes the cluster, and the bound is looser:
    ``cluster="geometric"`` and ``"arithmetic"`` from the mixture (:class:`.MixturePosterior`),
    ``"network"`` from one, q(y | x), which learns from labels, too, and first what the mixture
    says.

    Rows with a label are visited so often that they make up ``labelled_share`` of an epoch; zero
    visits every row once.
    """
    program = VaDE(_width(batch, "x"), num_clusters, latent_dim, hidden, likelihood, covariance)
    encoder = Amortized(program, ["x"], hidden, init_scale=init_scale)
    guide, network = _with_cluster(program, encoder, cluster, hidden)
    objective, repeat = EnumELBO(), _repeat(batch, labelled_share)
    if network is not None and (labelled := int(batch.present("y").sum())):
        objective.observed_guide_weights["y"] = len(batch) / (labelled * repeat)

    def start(data: Batch, **options: Any) -> None:
        start_mixture(program, guide, data, **options)
        if network is not None:
            where = {k: v for k, v in options.items() if k in ("seed", "progress", "device")}
            start_network(program, guide, network, encoder, data, **where)

    settings: dict[str, Any] = {"epochs": 100, "batch_size": 256, "lr": 1e-3, "clip": 100.0}
    if repeat > 1:
        settings["repeat"] = {"y": repeat}
    return Model("vade", program, guide, objective, settings=settings, start=start)


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
    weight = gamma * _width(batch, "x")
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
    program = DEC(_width(batch, "x"), num_clusters, latent_dim, hidden, likelihood, dof, len(batch))
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
    program = DCN(_width(batch, "x"), num_clusters, latent_dim, hidden, likelihood, weight)
    inner: nn.Module = Amortized(program, ["x"], hidden)
    if assignment == "hard":
        inner = MixturePosterior(program, inner, kind="nearest")
    elif assignment != "soft":
        raise ValueError(f"assignment is 'hard' or 'soft', got {assignment!r}")
    guide = Mean(inner)

    def start(data: Batch, **options: Any) -> None:
        start_centres(program, guide, data, **options)

    settings: dict[str, Any] = {"epochs": 50, "batch_size": 256, "lr": 1e-3}
    return Model(
        "dcn", program, guide, settings=settings, start=start,
        prepare=lambda data: follow_centres(program, guide, data),
    )  # fmt: skip


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
    init_scale: float = 0.1,
    fade: float = 127.0,
) -> Model:
    """MFCVAE: the clusters of all facets are summed in the program, the guide is a ladder.

    Lists have one entry a facet, the top one last; ``num_clusters`` and ``hidden`` may have one for
    all; each rung has ``depth`` layers.  After the top facet has been trained alone each of the
    others comes in over ``fade`` epochs, so that the fit should be longer than these.
    """
    program = MFCVAE(
        _width(batch, "x"), num_clusters, latent_dims, hidden, likelihood, activation, depth, share
    )
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


def m2(
    batch: Batch,
    *,
    num_classes: int = 10,
    latent_dim: int = 50,
    hidden: Sequence[int] = (500,),
    likelihood: str = "bernoulli",
    activation: str = "relu",
    classifier: str = "mlp",
    alpha: float = 30.0,
    style_weight: float = 3.0,
    style_epochs: float = 4.0,
    labelled_share: float = 0.1,
    spread: bool = False,
) -> Model:
    """M2: the label is summed over the guide's q(y | x).

    ``alpha`` weighs the classification term, relative to the bound of all rows.  The divergence of
    the style starts with ``style_weight`` and comes down to one over ``style_epochs``: while style
    is expensive, the decoder has to use the class.  Rows with a label are visited so often that
    they make up ``labelled_share`` of an epoch.  ``classifier="conv"`` makes q(y | x)
    convolutional, for square pictures.  With ``spread`` the fit starts from labels that were
    spread along a graph of neighbours (:func:`.start_spread`).  All five depart from the paper,
    where alpha is 0.1, the weight of the style one throughout, every row is visited once, and
    nothing is pretrained.
    """
    program = M2(_width(batch, "x"), num_classes, latent_dim, hidden, likelihood, activation)
    network = None
    if classifier == "conv":
        side = math.isqrt(_width(batch, "x"))
        network = ConvClassifier((1, side, side), num_classes, (16, 32), flat=True)
    elif classifier != "mlp":
        raise ValueError(f"classifier is 'mlp' or 'conv', got {classifier!r}")
    guide = Sequential(
        Classifier(program, "y", ["x"], hidden, activation, network),
        Amortized(program, ["x", "y"], hidden, activation),
    )
    objective, repeat = EnumELBO(), _repeat(batch, labelled_share)
    if labelled := int(batch.present("y").sum()):
        objective.observed_guide_weights["y"] = alpha * len(batch) / (labelled * repeat)
    settings: dict[str, Any] = {"epochs": 20, "batch_size": 100, "lr": 1e-3}
    settings["weights"] = {"z": schedules.linear(style_weight, 1.0, style_epochs)}
    if repeat > 1:
        settings["repeat"] = {"y": repeat}
    start = None
    if spread:
        start = functools.partial(
            start_spread, program, guide, num_classes=num_classes, likelihood=likelihood
        )
    return Model("m2", program, guide, objective, settings=settings, start=start)


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
    widths = {name: _width(batch, name) for name in batch.names if name.startswith("x_")}
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
            views[name] = copy.deepcopy(make_likelihood(given, _width(batch, name)))
        elif name == "x" or name.startswith("x_"):
            _width(batch, name)
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
    objective = EnumELBO()
    if classifier and (labelled := int(batch.present("y").sum())):
        objective.observed_guide_weights["y"] = alpha * len(batch) / labelled
    size = 128
    epochs = max(20, math.ceil(800 / math.ceil(len(batch) / size)))

    def start(data: Batch, **options: Any) -> None:
        start_clusters(program, guide, data, **{"epochs": epochs, "batch_size": size, **options})

    settings: dict[str, Any] = {"epochs": epochs, "batch_size": size, "lr": 3e-3}
    settings["lr_schedule"] = schedules.cosine(epochs, 0.02)
    return Model("hivae", program, guide, objective, settings=settings, start=start)


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
) -> Model:
    """GMVAE: the cluster is summed in the program, the guide is q(z | x) q(w | x).

    ``cluster="network"`` adds a mean-field q(y | x), over which the cluster is summed then: the
    paper's first version, and a looser bound.
    """
    program = GMVAE(
        _width(batch, "x"), num_clusters, latent_dim, noise_dim, hidden, prior_hidden, likelihood
    )
    guide: Part = Amortized(program, ["x"], hidden)
    if cluster == "network":
        guide = Sequential(Classifier(program, "y", ["x"], hidden), guide)
    elif cluster != "exact":
        raise ValueError(f"cluster is 'exact' or 'network', got {cluster!r}")
    settings: dict[str, Any] = {"epochs": 100, "batch_size": 100, "lr": 1e-3, "clip": 100.0}
    return Model("gmvae", program, guide, settings=settings)


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
    program = VaDE(_width(batch, "x"), num_clusters, latent_dim, hidden, likelihood)
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
    width = _width(batch, "x")
    program = VAEEM(width, num_clusters, latent_dim, hidden, likelihood, activation)
    encoder = StackEncoder(num_clusters, width, hidden, latent_dim, activation)
    guide = Sequential(
        EStep(program, encoder, num_draws),
        Amortized(program, ["x", "y"], network={"z": encoder}),
    )

    def start(data: Batch, **options: Any) -> None:
        start_kmeans(program, guide, data, **options)

    settings: dict[str, Any] = {"epochs": 50, "batch_size": 256, "lr": 1e-3}
    return Model("vae_em", program, guide, settings=settings, start=start)


def m1(
    batch: Batch,
    *,
    num_classes: int = 10,
    latent_dim: int = 50,
    hidden: Sequence[int] = (500, 500),
    classifier_hidden: Sequence[int] = (),
    likelihood: str = "bernoulli",
    activation: str = "softplus",
    frozen: bool = True,
    labelled_share: float = 0.5,
) -> Model:
    """M1: an autoencoder of x first, then a classifier that reads its features.

    With ``frozen`` encoder and decoder stay as the first stage left them.  Rows with a label are
    visited so often that they make up ``labelled_share`` of an epoch.  Without labels in the data
    there is one stage, the autoencoder.
    """
    program = M1(
        _width(batch, "x"), num_classes, latent_dim, hidden, classifier_hidden, likelihood,
        activation,
    )  # fmt: skip
    guide = Amortized(program, ["x"], hidden, activation)
    settings: dict[str, Any] = {"epochs": 50, "batch_size": 100, "lr": 1e-3}
    if not bool(batch.present("y").any()):
        return Model("m1", program, guide, settings=settings)
    if (repeat := _repeat(batch, labelled_share)) > 1:
        settings["repeat"] = {"y": repeat}
    fixed = (program.decoder, guide) if frozen else ()
    freeze(*fixed)

    def start(data: Batch, **options: Any) -> None:
        start_features(program, guide, data, frozen=fixed, **options)

    return Model("m1", program, guide, settings=settings, start=start)


def m1m2(
    batch: Batch,
    *,
    num_classes: int = 10,
    latent_dim: int = 50,
    style_dim: int = 50,
    hidden: Sequence[int] = (500, 500),
    style_hidden: Sequence[int] = (300,),
    likelihood: str = "bernoulli",
    activation: str = "softplus",
    alpha: float = 0.1,
    frozen: bool = True,
    labelled_share: float = 0.1,
) -> Model:
    """M1+M2: features of x first, then class and style above them, summed over q(y | z_1).

    With ``frozen`` encoder and decoder stay as the first stage left them.  ``alpha`` weighs the
    classification term, relative to the bound of all rows.  Rows with a label are visited so often
    that they make up ``labelled_share`` of an epoch.
    """
    program = M1M2(
        _width(batch, "x"), num_classes, latent_dim, style_dim, hidden, style_hidden, likelihood,
        activation,
    )  # fmt: skip
    encoder = Amortized(program, ["x"], hidden, activation, sites=["z_1"])
    guide = Sequential(
        encoder,
        Classifier(program, "y", ["z_1"], style_hidden, activation),
        Amortized(program, ["z_1", "y"], style_hidden, activation, sites=["z_2"]),
    )
    objective, repeat = EnumELBO(), _repeat(batch, labelled_share)
    if labelled := int(batch.present("y").sum()):
        objective.observed_guide_weights["y"] = alpha * len(batch) / (labelled * repeat)
    fixed = (program.decoder, encoder) if frozen else ()
    freeze(*fixed)
    below = Features(program)

    def start(data: Batch, **options: Any) -> None:
        start_features(below, encoder, data, frozen=fixed, **options)

    settings: dict[str, Any] = {"epochs": 50, "batch_size": 100, "lr": 1e-3}
    if repeat > 1:
        settings["repeat"] = {"y": repeat}
    return Model("m1m2", program, guide, objective, settings=settings, start=start)


_METHODS = {
    m.name: m
    for m in [
        Method("vade", "Variational deep embedding", "clustering", "core", "jiang2017", vade),
        Method(
            "mfcvae", "Several clusterings, one a facet", "clustering", "core", "falck2021", mfcvae
        ),
        Method(
            "m2", "Class-conditional VAE, label in part", "semisupervised", "core", "kingma2014", m2
        ),
        Method("mvae", "Multimodal VAE, product of experts", "multimodal", "core", "wu2018", mvae),
        Method("hivae", "Mixed tables with holes", "imputation", "core", "nazabal2020", hivae),
        Method(
            "gmvae",
            "Mixture moved by noise",
            "clustering",
            "maintained",
            "dilokthanakul2016",
            gmvae,
        ),
        Method(
            "gmvae_two_level",
            "VaDE with q(y | x)",
            "clustering",
            "maintained",
            "shu2016",
            gmvae_two_level,
        ),
        Method(
            "vae_em",
            "One VAE a cluster, by EM",
            "clustering",
            "maintained",
            "adipoetra2025",
            vae_em,
        ),
        Method("dec", "Deep embedded clustering", "clustering", "reference", "xie2016", dec),
        Method("idec", "DEC with a decoder", "clustering", "reference", "guo2017", idec),
        Method("dcn", "Embedding for k-means", "clustering", "reference", "yang2017", dcn),
        Method("m1", "VAE, then a classifier", "semisupervised", "core", "kingma2014", m1),
        Method("m1m2", "Class above the features", "semisupervised", "core", "kingma2014", m1m2),
    ]
}
_PROGRAMS: dict[str, type[nn.Module]] = {
    "vade": VaDE,
    "mfcvae": MFCVAE,
    "m2": M2,
    "mvae": MVAE,
    "hivae": HIVAE,
    "gmvae": GMVAE,
    "gmvae_two_level": VaDE,
    "vae_em": VAEEM,
    "dec": DEC,
    "idec": DEC,
    "dcn": DCN,
    "m1": M1,
    "m1m2": M1M2,
}


def list_methods(task: str | None = None) -> list[str]:
    """Names of all methods, or of those for a task.

    Raises:
        ValueError: there is no such task.
    """
    tasks = sorted({m.task for m in _METHODS.values()})
    if task is not None and task not in tasks:
        raise ValueError(f"no method is for {task!r}; tasks: {', '.join(tasks)}")
    return [m.name for m in _METHODS.values() if task in (None, m.task)]


def method(name: str) -> Method:
    """The entry of a method.

    Raises:
        ValueError: there is no such method; the message has the nearest name.
    """
    if name not in _METHODS:
        near = difflib.get_close_matches(name, _METHODS, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"no method is called {name!r} (methods: {', '.join(_METHODS)}){hint}")
    return _METHODS[name]


def create(name: str, data: Data, *, seed: int = 0, **options: Any) -> Model:
    """Make a method for a data set: its program, its default guide and its default objective.

    Args:
        name: see :func:`list_methods`.
        data: a dictionary of arrays by site, for the shapes and for what is observed.
        seed: of the networks' initial parameters; the global random state is left alone.
        options: of the method, see ``pyrozoo show NAME``; for all of them ``precision``, which is
            ``"float32"`` or, inside the networks alone, ``"bf16"``.

    Raises:
        ValueError: no such method or option, or the data lack a site that it needs.
    """
    entry = method(name)
    if unknown := set(options) - set(entry.options):
        near = difflib.get_close_matches(sorted(unknown)[0], entry.options, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"{name} has no option {', '.join(sorted(unknown))}"
            f" (options: {', '.join(entry.options)}){hint}"
        )
    batch = Batch.of(data)
    with seeded(seed):
        model = entry.make(batch, **{k: v for k, v in options.items() if k != "precision"})
    model.options = {**entry.options, **options}
    if (precision := model.options["precision"]) != "float32":
        set_precision(model.program, precision)
        set_precision(model.guide, precision)
    return model


def citation(name: str) -> str:
    """The BibTeX entry of a method's paper."""
    text = (files("pyrozoo.zoo") / "references.bib").read_text()
    entry = re.search(rf"^@\w+{{{method(name).paper},.*?^}}", text, re.MULTILINE | re.DOTALL)
    if entry is None:
        raise LookupError(f"references.bib has no entry {method(name).paper}")
    return entry.group()


def _repeat(batch: Batch, share: float) -> int:
    """How often a labelled row is visited in an epoch, so that these make up a share of it."""
    if not 0 <= share < 1:
        raise ValueError(f"labelled_share is from 0 to below 1, got {share}")
    labelled = int(batch.present("y").sum())
    if not labelled:
        return 1
    return max(1, round(share / (1 - share) * (len(batch) - labelled) / labelled))


def _width(batch: Batch, name: str) -> int:
    if name not in batch:
        raise ValueError(
            f"the data have no {name!r} (they have: {', '.join(batch.names) or 'none'})"
        )
    shape = batch[:1][name].shape[1:]
    if len(shape) != 1:
        raise ValueError(f"{name!r} is expected as flat rows (rows, features), got {tuple(shape)}")
    return int(shape[0])
