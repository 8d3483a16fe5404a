"""Makers of the methods that learn a label which some rows have."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

from pyrozoo.guides import Amortized, Classifier, Sequential
from pyrozoo.inference import Batch, schedules
from pyrozoo.zoo.clustering.pretraining import rows_with_x
from pyrozoo.zoo.clustering.spreading import start_spread
from pyrozoo.zoo.model import Method, Model, classification, repeats, width
from pyrozoo.zoo.networks import ConvClassifier
from pyrozoo.zoo.semisupervised import M1, M1M2, M2
from pyrozoo.zoo.semisupervised.m1 import freeze, start_features
from pyrozoo.zoo.semisupervised.m1m2 import Above, start_above, start_above_spread

SPREADING = {"known_epochs", "draws", "alpha", "num_neighbors"}  # options of start_above_spread


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
    program = M2(width(batch, "x"), num_classes, latent_dim, hidden, likelihood, activation)
    network = None
    if classifier == "conv":
        side = math.isqrt(width(batch, "x"))
        network = ConvClassifier((1, side, side), num_classes, (16, 32), flat=True)
    elif classifier != "mlp":
        raise ValueError(f"classifier is 'mlp' or 'conv', got {classifier!r}")
    guide = Sequential(
        Classifier(program, "y", ["x"], hidden, activation, network),
        Amortized(program, ["x", "y"], hidden, activation),
    )
    repeat = repeats(batch, labelled_share)
    objective = classification(batch, alpha, repeat)
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
        width(batch, "x"), num_classes, latent_dim, hidden, classifier_hidden, likelihood,
        activation,
    )  # fmt: skip
    guide = Amortized(program, ["x"], hidden, activation)
    settings: dict[str, Any] = {"epochs": 50, "batch_size": 100, "lr": 1e-3}
    if not bool(batch.present("y").any()):
        return Model("m1", program, guide, settings=settings)
    if (repeat := repeats(batch, labelled_share)) > 1:
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
    spread: bool = False,
) -> Model:
    """M1+M2: features of x first, then class and style above them, summed over q(y | z_1).

    With ``frozen`` encoder and decoder stay as the first stage left them.  ``alpha`` weighs the
    classification term, relative to the bound of all rows.  Rows with a label are visited so often
    that they make up ``labelled_share`` of an epoch.  With ``spread``, which is not in the paper,
    the second stage starts from labels that were spread along a graph of neighbours of the
    features (:func:`.start_above_spread`).
    """
    program = M1M2(
        width(batch, "x"), num_classes, latent_dim, style_dim, hidden, style_hidden, likelihood,
        activation,
    )  # fmt: skip
    encoder = Amortized(program, ["x"], hidden, activation, sites=["z_1"])
    above = Above(
        Sequential(
            Classifier(program, "y", ["z_1"], style_hidden, activation),
            Amortized(program, ["z_1", "y"], style_hidden, activation, sites=["z_2"]),
        ),
        program,
    )
    guide = Sequential(encoder, above)
    repeat = repeats(batch, labelled_share)
    objective = classification(batch, alpha, repeat)
    fixed = (program.decoder, encoder) if frozen else ()
    freeze(*fixed)

    def start(data: Batch, **options: Any) -> None:
        data, begin = rows_with_x(data), start_above_spread if spread else start_above
        if needless := set() if spread else SPREADING & set(options):
            raise ValueError(
                f"start {', '.join(sorted(needless))}: only where labels spread (spread=True); an"
                " experiment of m1m2 without it has no such setting"
            )
        begin(program, encoder, above, data, frozen=fixed, **options)

    settings: dict[str, Any] = {"epochs": 50, "batch_size": 100, "lr": 1e-3}
    if repeat > 1:
        settings["repeat"] = {"y": repeat}
    return Model("m1m2", program, guide, objective, settings=settings, start=start)


METHODS = [
    Method(
        "m2", "Class-conditional VAE, label in part", "semisupervised", "core", "kingma2014", M2,
        m2,
    ),
    Method("m1", "VAE, then a classifier", "semisupervised", "core", "kingma2014", M1, m1),
    Method("m1m2", "Class above the features", "semisupervised", "core", "kingma2014", M1M2, m1m2),
]  # fmt: skip
