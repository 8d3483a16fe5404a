"""A mixture of Gaussians over latents, as the programs of this family have it."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyrozoo.zoo.baselines import Covariance
from pyrozoo.zoo.networks import inverse_positive_scale, positive_scale


class Mixture(nn.Module):
    """K Gaussians in D dimensions: ``logits`` (K,), ``loc`` (K, D), ``scale``.

    Args:
        num_clusters: K.
        latent_dim: D.
        covariance: of a component, ``"diag"`` or ``"full"``.
        scale: at which all standard deviations start.
    """

    def __init__(
        self,
        num_clusters: int,
        latent_dim: int,
        covariance: Covariance = "diag",
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        if covariance not in get_args(Covariance):
            raise ValueError(f"covariance is 'diag' or 'full', got {covariance!r}")
        self.logits = nn.Parameter(torch.zeros(num_clusters))
        self.loc = nn.Parameter(torch.randn(num_clusters, latent_dim))
        raw_scale = inverse_positive_scale(scale)
        self.raw_scale = nn.Parameter(torch.full((num_clusters, latent_dim), raw_scale))
        self.raw_lower = None
        if covariance == "full":
            self.raw_lower = nn.Parameter(torch.zeros(num_clusters, latent_dim, latent_dim))

    @property
    def scale(self) -> Tensor:
        """Standard deviations ``(K, latent_dim)``, or with full covariances their Cholesky factors
        ``(K, latent_dim, latent_dim)``."""
        scale = positive_scale(self.raw_scale)
        return scale if self.raw_lower is None else self.raw_lower.tril(-1) + scale.diag_embed()

    def component(self, y: Tensor) -> Any:
        """p(z | y), with the batch shape of ``y``."""
        if self.raw_lower is None:
            return dist.Normal(self.loc[y], self.scale[y]).to_event(1)
        return dist.MultivariateNormal(self.loc[y], scale_tril=self.scale[y])

    @torch.no_grad()
    def set_mixture(self, share: Any, codes: Any) -> None:
        """Start at the weights, means and covariances that responsibilities give codes.

        Args:
            share: ``(rows, K)``.
            codes: ``(rows, latent_dim)``.
        """
        total = share.sum(0) + 1e-9
        self.logits.copy_(torch.as_tensor(np.log(total / total.sum())))
        for k, weight in enumerate(share.T / total[:, None]):
            mean = weight @ codes
            spread = (codes - mean).T @ (weight[:, None] * (codes - mean))
            floor = 1e-6  # EM may shrink a component onto a few points
            self.loc[k] = torch.as_tensor(mean)
            scale = np.sqrt(spread.diagonal().clip(floor))
            if self.raw_lower is not None:
                lower = np.linalg.cholesky(spread + floor * np.eye(len(mean)))
                self.raw_lower[k], scale = torch.as_tensor(lower), lower.diagonal()
            self.raw_scale[k] = torch.tensor([inverse_positive_scale(s) for s in scale.tolist()])
