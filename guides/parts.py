"""Guides made of parts: one after the other, without their noise, or with noise in what they read.

Every part is a module with ``forward(batch)``, proposes sites under their own names, and returns
the drawn values by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import pyro
import pyro.distributions as dist
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from pyrozoo.inference import Batch
from pyrozoo.inference.graph import DATA

Drawn = dict[str, Tensor]


class Part(nn.Module):
    """A guide that can follow others in :class:`Sequential`: override ``inside`` (and
    ``outside``).

    ``data_dim`` is the tensor dimension of plate ``"data"``, the program's.
    """

    data_dim = -1

    def outside(self) -> Drawn:
        """Draw the sites outside plate ``"data"``."""
        return {}

    def inside(self, batch: Batch, drawn: Mapping[str, Tensor]) -> Drawn:
        """Draw the sites in plate ``"data"``, given what earlier parts have drawn."""
        raise NotImplementedError

    def forward(self, batch: Batch) -> Drawn:
        """Draw every site that it proposes; returns the values by name."""
        values = self.outside()
        with pyro.plate(DATA, len(batch), dim=self.data_dim):
            return values | self.inside(batch, values)


class Sequential(Part):
    """Several guides, one after the other; each may be *given* the sites that were drawn before.

    ``Sequential(Classifier(p, "y", ["x"]), Amortized(p, ["x", "y"]))`` is q(y | x) q(z | x, y).
    """

    def __init__(self, *parts: Part) -> None:
        super().__init__()
        for part in parts:
            if not isinstance(part, Part):
                raise TypeError(
                    f"a part of a sequential guide is a Part, not {type(part).__name__}"
                )
        self.parts = nn.ModuleList(parts)
        self.data_dim = min((part.data_dim for part in parts), default=-1)

    def outside(self) -> Drawn:
        """Draw the global sites of all parts."""
        values: Drawn = {}
        for part in self.parts:
            values |= cast(Part, part).outside()
        return values

    def inside(self, batch: Batch, drawn: Mapping[str, Tensor]) -> Drawn:
        """Draw the local sites of all parts."""
        values: Drawn = {}
        for part in self.parts:
            values |= cast(Part, part).inside(batch, {**drawn, **values})
        return values


class _Means(Messenger):
    def _pyro_sample(self, msg: Any) -> None:
        if msg["type"] == "sample" and isinstance(msg["fn"], dist.Independent | dist.Normal):
            fn = msg["fn"]
            if isinstance(getattr(fn, "base_dist", fn), dist.Normal):
                msg["fn"] = dist.Delta(fn.mean, event_dim=fn.event_dim)


class Mean(nn.Module):
    """Another guide without its noise: each Gaussian site is a point mass at its mean.

    With the weights of the latent terms at zero, the bound under this guide is the reconstruction
    of an autoencoder.  The parameters are those of the other guide.
    """

    def __init__(self, guide: nn.Module) -> None:
        super().__init__()
        self.guide = guide

    def forward(self, batch: Batch) -> Any:
        """Draw, without noise in the latent sites."""
        with _Means():
            return self.guide(batch)


class Corrupted(nn.Module):
    """Another guide that reads corrupted values in training; the program generates the clean ones.

    Proposals then depend less on what the corruption changes.  The objective of the training is the
    mean over corruptions of the bound under q(z | corrupted x), and so itself a bound on the
    evidence.  Outside of training the guide is the other one, whose parameters it has.

    Source: Daniel Jiwoong Im, Sungjin Ahn, Roland Memisevic, Yoshua Bengio, "Denoising criterion
    for variational auto-encoding framework" (2017).

    Args:
        guide: any guide.
        corruption: a module through which floating-point values pass, all rows at once.
    """

    def __init__(self, guide: nn.Module, corruption: nn.Module) -> None:
        super().__init__()
        self.guide, self.corruption = guide, corruption

    def forward(self, batch: Batch) -> Any:
        """Draw as the other guide does, in training given corrupted values."""
        if self.training:
            for name in batch.names:
                if (value := batch[name]).is_floating_point():
                    batch = batch.replace(name, self.corruption(value))
        return self.guide(batch)
