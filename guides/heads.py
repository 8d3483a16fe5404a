"""What all families of proposals share: raw outputs of a network, or free parameters; and a KL.

The divergence of a normal with a covariance C and mean m from independent normals, which neither
Pyro nor torch has, is exact and used wherever an objective asks for closed forms::

    KL = sum_i [ ((C_ii + (m_i - l_i)^2) / s_i^2 + log 2 pi) / 2 + log s_i ] - entropy(C)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Independent, LowRankMultivariateNormal, MultivariateNormal, Normal
from torch.distributions.kl import register_kl

from pyrozoo.zoo.networks import MLP


class Heads(nn.Module):
    """Raw outputs by name, ``(*, width)``: linear in the features of the inputs, or parameters.

    Args:
        in_dims: widths of the inputs; none for plain parameters.
        widths: name -> width of each output.
        hidden, activation: of the trunk, see :class:`~pyrozoo.zoo.networks.MLP`.
    """

    def __init__(
        self,
        in_dims: Sequence[int],
        widths: Mapping[str, int],
        hidden: Sequence[int] = (),
        activation: str = "relu",
    ) -> None:
        super().__init__()
        self.trunk = MLP(in_dims, hidden, activation=activation) if in_dims else None
        self.features = self.trunk.out_dim if self.trunk else 0
        self.heads = nn.ModuleDict()
        self.free = nn.ParameterDict()
        for name, width in widths.items():
            if self.trunk:
                self.heads[name] = nn.Linear(self.features, width)
            else:
                self.free[name] = nn.Parameter(torch.zeros(width))

    def start(self, name: str, value: float) -> None:
        """Let an output start at a constant, whatever the inputs."""
        if self.trunk:
            head: Any = self.heads[name]
            nn.init.zeros_(head.weight)
            nn.init.constant_(head.bias, value)
        else:
            nn.init.constant_(self.free[name], value)

    def forward(self, *inputs: Tensor) -> tuple[dict[str, Tensor], Tensor | None]:
        """Every output, and the features that they are read from (None without inputs)."""
        if self.trunk is None:
            return dict(self.free.items()), None
        features = self.trunk(*inputs)
        return {name: head(features) for name, head in self.heads.items()}, features


@register_kl(MultivariateNormal, Independent)  # type: ignore[untyped-decorator]
@register_kl(LowRankMultivariateNormal, Independent)  # type: ignore[untyped-decorator]
def _kl_correlated_normal(p: Any, q: Any) -> Tensor:
    """From a correlated normal to independent ones."""
    if not isinstance(q.base_dist, Normal) or q.reinterpreted_batch_ndims != 1:
        raise NotImplementedError
    loc, scale = q.base_dist.loc, q.base_dist.scale
    second = (p.variance + (p.loc - loc) ** 2) / scale**2
    cross = 0.5 * (second + math.log(2 * math.pi)) + scale.log()
    return cross.sum(-1) - p.entropy()
