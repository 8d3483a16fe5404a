r"""MVAE: several modalities of one latent cause, any of them missing in any row.

Generative process, for every row::

    z ~ Normal(0, I)                              what the modalities share
    x_m | z ~ likelihood_m(decoder_m(z))          for every modality m

The guide is a product of one Gaussian expert per modality and the prior, so that a missing modality
drops out of guide and program alike.  So that each expert also learns to stand alone, the published
objective adds the bounds of single modalities (:class:`pyrozoo.inference.SubsetELBO`).

=================== ==================================================
observed            what the run is
=================== ==================================================
all x_m             a joint autoencoder
some x_m in a row   learns from incomplete rows
one x_m, at test    predicts the others from it
=================== ==================================================

Source: Mike Wu, Noah Goodman, "Multimodal generative models for scalable weakly-supervised
learning" (2018).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyrozoo.inference import Batch
from pyrozoo.zoo.networks import Decoder


class MVAE(nn.Module):
    """p(z, x_1, .., x_M) of the module's docstring.

    Args:
        x_dims: modality -> number of features (``{"x_left": 392, "x_right": 392}``).
        latent_dim: dimension of z.
        hidden: widths of the hidden layers of each decoder.
        likelihood: of all modalities, or modality -> likelihood.
        activation: of the hidden layers.

    Raises:
        ValueError: no modality, or a name that does not begin with ``x_``.
    """

    zeros: Tensor

    def __init__(
        self,
        x_dims: Mapping[str, int],
        latent_dim: int = 64,
        hidden: Sequence[int] = (512, 512),
        likelihood: Any = "bernoulli",
        activation: str = "silu",
    ) -> None:
        super().__init__()
        if not x_dims or not all(name.startswith("x_") for name in x_dims):
            raise ValueError(f"modalities are called x_<name>, got {', '.join(x_dims) or 'none'}")
        self.register_buffer("zeros", torch.zeros(latent_dim), persistent=False)
        self.decoders = nn.ModuleDict()
        for name, width in x_dims.items():
            kind = likelihood[name] if isinstance(likelihood, Mapping) else likelihood
            self.decoders[name] = Decoder(latent_dim, hidden, width, kind, activation)

    def forward(self, batch: Batch) -> None:
        """Generate ``len(batch)`` rows."""
        with pyro.plate("data", len(batch)):
            z = pyro.sample("z", dist.Normal(self.zeros, 1.0).to_event(1))
            for name, decoder in self.decoders.items():
                pyro.sample(name, decoder(z))
