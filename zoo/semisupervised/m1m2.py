r"""M1+M2: two layers of latent variables, with the class above the features.

Generative process, for every row::

    y ~ Categorical(uniform)                      the class
    z_2 ~ Normal(0, I)                            the style
    z_1 | y, z_2 ~ Normal(loc(z_2, y), scale(z_2, y))    the features
    x | z_1 ~ likelihood(decoder(z_1))            the data

The guide is q(z_1 | x) q(y | z_1) q(z_2 | z_1, y).  The features are drawn before the class is
summed, so that only the small networks between y, z_2 and z_1 are run for every class, and encoder
and decoder of x once a row.

============ ==========================================================================
observed     what the run is
============ ==========================================================================
x, y         a conditional autoencoder, and a classifier through the term below
x, y (part)  semi-supervised, the published use
x            an autoencoder; q(y | z_1) has nothing that names or separates classes
z_1, y       what is above features that are data (:class:`Top` is this without the decoder)
============ ==========================================================================

On rows whose label is known, q(y | z_1) is no part of the bound; it learns from the classification
term alpha log q(y | z_1), the objective's ``observed_guide_weights={"y": alpha}``.

Published in two stages: M1, an autoencoder of z_1 and x with a standard normal prior, is fitted to
all rows without their labels (:class:`Features` shares decoder and encoder with the pair here);
then everything above z_1 is fitted to draws of the features, with encoder and decoder as they are
(``frozen=True``, the default).  With ``frozen=False`` the fit goes on with all parts.  A frozen
encoder and decoder are still run forward at every step, without gradients: features are drawn anew
each time, and the reported bound is that of x.

Source: Diederik P. Kingma, Danilo J. Rezende, Shakir Mohamed, Max Welling, "Semi-supervised
learning with deep generative models" (2014).

As in the released code, what stands above z_1 leaves out the features that M1 gave up, whose mean
hardly differs between rows: they stay standard normal, and the guide reads zeros in their place.

Deviations: Adam at 1e-3 and far fewer passes; weights have no prior and start larger; q(y | x)
averages q(y | z_1) over draws of z_1, where the released code takes the mean of z_1; optionally,
M1's divergence is warmed up, and the second stage starts from labels that were spread along a graph
of the features (:func:`start_above_spread`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyrozoo.guides import Mean
from pyrozoo.guides.parts import Drawn, Part
from pyrozoo.inference import Batch, EnumELBO, fit, posterior, predict
from pyrozoo.inference.reading import read_count
from pyrozoo.zoo.clustering.neighbours import check_neighbors
from pyrozoo.zoo.clustering.spreading import spread_parts
from pyrozoo.zoo.networks import Decoder, Encoder, one_hot
from pyrozoo.zoo.semisupervised.m1 import start_features


class M1M2(nn.Module):
    """p(y, z_2, z_1, x) of the module's docstring.

    Args:
        x_dim: features of a row.
        num_classes: number of classes.
        latent_dim: dimension of the features z_1.
        style_dim: dimension of the style z_2.
        hidden: widths of the encoder's hidden layers; the decoder mirrors them.
        style_hidden: widths of the hidden layers of p(z_1 | y, z_2).
        likelihood: of x given z_1, a name or a module of :mod:`pyrozoo.zoo.networks`.
        activation: of all hidden layers.

    ``active`` is 1 for features that depend on y and z_2, ``(latent_dim,)``; the others, 0, are
    standard normal.
    """

    zeros: Tensor
    active: Tensor

    def __init__(
        self,
        x_dim: int = 784,
        num_classes: int = 10,
        latent_dim: int = 50,
        style_dim: int = 50,
        hidden: Sequence[int] = (500, 500),
        style_hidden: Sequence[int] = (300,),
        likelihood: Any = "bernoulli",
        activation: str = "softplus",
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.register_buffer("zeros", torch.zeros(style_dim), persistent=False)
        self.register_buffer("active", torch.ones(latent_dim))
        self.features = Encoder([style_dim, num_classes], style_hidden, latent_dim, activation)
        self.decoder = Decoder(latent_dim, tuple(reversed(hidden)), x_dim, likelihood, activation)

    def forward(self, batch: Batch) -> None:
        """Generate ``len(batch)`` rows."""
        with pyro.plate("data", len(batch)):
            pyro.sample("x", self.decoder(self.draw_features()))

    def draw_features(self) -> Tensor:
        """y, z_2 and z_1, inside the plate; gives z_1, ``(*, rows, latent_dim)``."""
        uniform = self.zeros.new_zeros(self.num_classes)
        y = pyro.sample("y", dist.Categorical(logits=uniform))
        z_2 = pyro.sample("z_2", dist.Normal(self.zeros, 1.0).to_event(1))
        found = self.features(z_2, one_hot(y, self.num_classes, z_2.dtype))
        loc, scale = found.mean * self.active, torch.where(self.active > 0, found.stddev, 1.0)
        return pyro.sample("z_1", dist.Normal(loc, scale).to_event(1))


class Features(nn.Module):
    """z_1 ~ Normal(0, I), x | z_1 by the decoder of a program: M1, for the first stage."""

    def __init__(self, program: M1M2) -> None:
        super().__init__()
        self.decoder = program.decoder
        self.latent_dim = program.features.loc.out_features

    def forward(self, batch: Batch) -> None:
        """Generate ``len(batch)`` rows."""
        with pyro.plate("data", len(batch)):
            zeros = next(self.decoder.parameters()).new_zeros(self.latent_dim)
            z_1 = pyro.sample("z_1", dist.Normal(zeros, 1.0).to_event(1))
            pyro.sample("x", self.decoder(z_1))


class Top(nn.Module):
    """y, z_2 and z_1, without x: what is above the features, for features that are observed."""

    def __init__(self, program: M1M2) -> None:
        super().__init__()
        self.program = program

    def forward(self, batch: Batch) -> None:
        """Generate ``len(batch)`` rows."""
        with pyro.plate("data", len(batch)):
            self.program.draw_features()


class Above(Part):
    """A part of the guide that reads the features with zeros in place of those not active.

    Args:
        guide: the other part, which is given z_1.
        program: whose ``active`` it keeps a copy of, see :meth:`leave_out`.
    """

    active: Tensor

    def __init__(self, guide: Part, program: M1M2) -> None:
        super().__init__()
        self.guide, self.data_dim = guide, guide.data_dim
        self.register_buffer("active", program.active.clone())

    def leave_out(self, program: M1M2, means: Tensor, least: float = 0.1) -> None:
        """Keep, here and in the program, units whose mean has an sd above ``least`` over rows.

        All are kept where none has.

        Args:
            program: the other half.
            means: of q(z_1 | x), ``(rows, latent_dim)``.
        """
        active = means.std(0) > least
        for own in (self.active, program.active):
            own.copy_(active if bool(active.any()) else torch.ones_like(own))

    def inside(self, batch: Batch, drawn: Mapping[str, Tensor]) -> Drawn:
        """Draw what the other part draws; where z_1 is observed it is not among the drawn."""
        z_1 = drawn["z_1"] if "z_1" in drawn else batch["z_1"]
        return self.guide.inside(batch, {**drawn, "z_1": z_1 * self.active})


def start_above(
    program: M1M2, encoder: nn.Module, above: Above, data: Batch, *, seed: int = 0, **options: Any
) -> Tensor:
    """The first stage, after which what is above leaves out the features that it gave up.

    Args:
        program, encoder: trained in place; the encoder is the guide's part for z_1.
        above: the guide's other part.
        data: with x in every row.
        seed: of all of it.
        options: see :func:`.start_features`.

    Returns:
        the means of the other features, ``(rows, D)``.
    """
    below = Features(program)
    start_features(below, encoder, data, site="z_1", seed=seed, **options)
    only_x = data.drop(*(name for name in data.names if name != "x"))
    means = predict(below, Mean(encoder), only_x, "z_1", num_samples=1, seed=seed)
    above.leave_out(program, means)
    return means[:, program.active > 0]


def start_above_spread(
    program: M1M2,
    encoder: nn.Module,
    above: Above,
    data: Batch,
    *,
    known_epochs: int = 10,
    draws: int = 5,
    alpha: float = 1.0,
    num_neighbors: int = 10,
    batch_size: int = 100,
    lr: float = 1e-3,
    seed: int = 0,
    progress: bool = False,
    warm_up: float = 0.0,
    epochs: int = 50,
    frozen: Sequence[nn.Module] = (),
    **settings: Any,
) -> None:
    """The first stage, then labels that were spread along a graph of its features for a while.

    Each row's features are joined to their nearest neighbours, the given labels spread along this
    graph, and what is above the features is fitted as if every row had been labelled so.  Here z_1
    is observed: recorded draws of it, and x is not.  The fit that follows sees x and the given
    labels alone.

    Args:
        program, encoder, above: trained in place, see :func:`start_above`.
        data: with x in every row, and perhaps y in part; without any label the graph is cut into
            parts.
        known_epochs: of the fit to what was found.
        draws: of each row's features, all of which an epoch of it visits.
        alpha: weight of log q(y | z_1) in it.
        num_neighbors: of each row in the graph.
        batch_size, lr: of both fits.
        seed: of all of it.
        progress: show progress bars.
        warm_up, epochs, frozen: of the first stage, see :func:`.start_features`.
        settings: further ones of both fits: folder, resume, compile, device, lr_schedule.

    Raises:
        ValueError: there are not more rows than neighbours, or without labels too few to cut the
            graph; or a number of epochs or draws is not positive.
    """
    check_neighbors(num_neighbors, len(data))
    for name, count in {"known_epochs": known_epochs, "draws": draws}.items():
        read_count(name, count)
    both = {"batch_size": batch_size, "lr": lr, "seed": seed, "progress": progress, **settings}
    codes = start_above(
        program, encoder, above, data, warm_up=warm_up, epochs=epochs, frozen=frozen, **both
    )
    parts = spread_parts(data, codes, program.num_classes, num_neighbors=num_neighbors, seed=seed)
    only_x = data.drop(*(name for name in data.names if name != "x"))
    z_1 = posterior(Features(program), encoder, only_x, num_samples=draws, seed=seed)["z_1"]
    if (folder := settings.get("folder")) is not None:
        both["folder"] = Path(folder) / "known"
    fit(
        Top(program), above, {"z_1": z_1.flatten(0, 1), "y": parts.repeat(draws)},
        objective=EnumELBO(observed_guide_weights={"y": alpha} if alpha else {}),
        epochs=known_epochs, title="labels spread", **both,
    )  # fmt: skip
