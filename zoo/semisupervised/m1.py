r"""M1: the latent features of an autoencoder, and a classifier that reads them.

Generative process, for every row::

    z ~ Normal(0, I)                              the features
    x | z ~ likelihood(decoder(z))                the data
    y | z ~ Categorical(classifier(z))            the class

The guide is q(z | x); a label that is not known drops out of the bound.

============ ==========================================================================
observed     what the run is
============ ==========================================================================
x            a variational autoencoder
x, y (part)  semi-supervised: all rows shape the features, labelled rows the classifier
x, y         the same with all labels
============ ==========================================================================

Published in two stages: the autoencoder is fitted to all rows without their labels, then the
classifier to draws of the features of labelled rows, with encoder and decoder as they are
(``frozen=True``, the default).  With ``frozen=False`` the fit goes on with all parts.

Source: Diederik P. Kingma, Danilo J. Rezende, Shakir Mohamed, Max Welling, "Semi-supervised
learning with deep generative models" (2014).

Deviations: the second stage is a network under the same bound, where the paper has a transductive
support vector machine, which also uses unlabelled rows; a prediction averages p(y | z) over draws
of z, where the released code takes the mean; latent units that the autoencoder gave up are not
taken away first; weights have no prior; optionally, the divergence is warmed up.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyrozoo.inference import Batch, fit, schedules
from pyrozoo.inference.training.schedules import Schedule
from pyrozoo.zoo.networks import Classifier, Decoder


class M1(nn.Module):
    """p(z, x, y) of the module's docstring.

    Args:
        x_dim: features of a row.
        num_classes: number of classes.
        latent_dim: dimension of z.
        hidden: widths of the encoder's hidden layers; the decoder mirrors them.
        classifier_hidden: widths of the classifier's; ``()`` makes it a logistic regression.
        likelihood: of x given z, a name or a module of :mod:`pyrozoo.zoo.networks`.
        activation: of all hidden layers.
    """

    zeros: Tensor

    def __init__(
        self,
        x_dim: int = 784,
        num_classes: int = 10,
        latent_dim: int = 50,
        hidden: Sequence[int] = (500, 500),
        classifier_hidden: Sequence[int] = (),
        likelihood: Any = "bernoulli",
        activation: str = "softplus",
    ) -> None:
        super().__init__()
        self.register_buffer("zeros", torch.zeros(latent_dim), persistent=False)
        self.decoder = Decoder(latent_dim, tuple(reversed(hidden)), x_dim, likelihood, activation)
        self.classifier = Classifier(latent_dim, classifier_hidden, num_classes, activation)

    def forward(self, batch: Batch) -> None:
        """Generate ``len(batch)`` rows."""
        with pyro.plate("data", len(batch)):
            z = pyro.sample("z", dist.Normal(self.zeros, 1.0).to_event(1))
            pyro.sample("x", self.decoder(z))
            pyro.sample("y", self.classifier(z))


def start_features(
    program: nn.Module,
    guide: nn.Module,
    data: Batch,
    *,
    site: str = "z",
    frozen: Sequence[nn.Module] = (),
    epochs: int = 50,
    batch_size: int = 100,
    lr: float = 1e-3,
    warm_up: float = 0.0,
    weights: Mapping[str, Schedule] | None = None,
    seed: int = 0,
    progress: bool = False,
    **settings: Any,
) -> None:
    """The first stage: fit an autoencoder to x, without labels.

    Args:
        program, guide: of the features and x, trained in place.
        data: with x; whatever else is there is not looked at.
        site: of the features.
        frozen: what is fitted now, and not later.
        epochs, batch_size, lr: of this fit.
        warm_up: epochs in which the weight of the features' divergence rises from zero to one.
        weights: of other terms in this fit, site -> schedule.
        seed: of all of it.
        progress: show a progress bar.
        settings: further ones of this fit: folder, resume, compile, device.

    Raises:
        ValueError: ``warm_up`` is negative, or the features have a weight besides.
    """
    weights = dict(weights or {})
    if warm_up < 0:
        raise ValueError(f"warm_up is a number of epochs, not negative, got {warm_up}")
    if warm_up and site in weights:
        raise ValueError(f"{site!r} is warmed up over {warm_up} epochs, but has a weight, too")
    only_x = data.drop(*(name for name in data.names if name != "x"))
    if warm_up:
        weights[site] = schedules.linear(0.0, 1.0, warm_up)
    with thawed(*frozen):
        fit(
            program, guide, only_x, epochs=epochs, batch_size=batch_size, lr=lr, seed=seed,
            weights=weights, progress=progress, title="features",
            decided_by={"warm_up": warm_up}, **settings,
        )  # fmt: skip


def freeze(*modules: nn.Module, frozen: bool = True) -> None:
    """Keep the parameters of modules out of every later fit, or with ``frozen=False`` in it."""
    for module in modules:
        module.requires_grad_(not frozen)


@contextmanager
def thawed(*modules: nn.Module) -> Iterator[None]:
    """Train frozen modules for a while."""
    freeze(*modules, frozen=False)
    try:
        yield
    finally:
        freeze(*modules)
