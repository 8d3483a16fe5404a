"""The likelihood of a table: columns of different kinds as one event."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor, nn

from pyrozoo.zoo.networks import densities
from pyrozoo.zoo.networks.base import Likelihood, bounded_log
from pyrozoo.zoo.networks.column import LEVELS, Column
from pyrozoo.zoo.networks.continuous import beta, degrees_of_freedom
from pyrozoo.zoo.networks.discrete import cutpoints, even_cutpoints
from pyrozoo.zoo.networks.features import Features
from pyrozoo.zoo.networks.mixed import Codes, Mixed

#: The smallest scale of a column, as a share of its spread.
MIN_SHARE = 0.03

_SCALED = ("normal", "student_t", "log_normal", "beta")
_DISPERSED = ("negative_binomial", "zero_inflated_negative_binomial")
_NEVER = -1e30  # the logit of a level that a column does not have


class Columns(Likelihood):
    """Independent columns of different kinds: values (*, D) in the users' units, as floats.

    With f the network's outputs for a column, which starts near the training rows where f is 0::

        normal, student_t    location center + spread f, scale spread s
        log_normal           the same for the logarithm
        beta                 mean sigmoid(center + spread f), concentration 4/t^2 + 1/t
                             with t = spread s
        bernoulli            logit f + log-odds of center
        continuous_bernoulli slope f, from where the mean is nearly center
        counts               mean (e^center - 1) e^(spread f), dispersion spread^2 d
        zero-inflated counts and zero with logit g - 2 besides, g another output
        categorical          logits f, one for each level
        ordered              cumulative logits c - f with increasing cutpoints c

    A share s is learnt for each column from 1 down to `MIN_SHARE`, so that the density of a column
    that a network can reproduce does not grow without limit; so are degrees of freedom, dispersions
    d and cutpoints.

    Args:
        columns: what the columns are.

    Attributes:
        features: what networks read of the columns; its buffers hold center and spread.

    Raises:
        ValueError: if there is no column or a name comes twice.
    """

    def __init__(self, columns: Sequence[Column]) -> None:
        features = Features(columns)
        super().__init__(len(features.columns))
        self.features = features
        self.raw_scale, self.raw_df = nn.ParameterDict(), nn.ParameterDict()
        self.raw_cutpoints = nn.ParameterDict()
        self._sizes: dict[str, int] = {}
        for name, group in features.groups.items():
            kind, n = features.kind(name), len(group)
            self._sizes[name] = n
            if kind in _SCALED:
                share = 1 - MIN_SHARE
                self.raw_scale[name] = torch.full((n,), math.log(math.expm1(share)))
            if kind in _DISPERSED:
                self.raw_scale[name] = torch.zeros(n)
            if kind == "student_t":
                self.raw_df[name] = torch.full((n,), math.log(math.expm1(3.0)))
            if kind == "zero_inflated_negative_binomial":
                self._sizes[name] = 2 * n
            if kind in LEVELS:
                self._add_levels(name, [features.columns[i].num_values for i in group])
        self.num_params = sum(self._sizes.values())

    @property
    def columns(self) -> tuple[Column, ...]:
        """What the columns are, as they were given."""
        return self.features.columns

    @property
    def num_features(self) -> int:
        """How many features of a row networks read."""
        return self.features.num_features

    def distribution(self, params: Tensor) -> TorchDistributionMixin:
        """Build the distribution, `Mixed(...).to_event(1)`, from raw outputs (*, num_params)."""
        pieces = params.split(list(self._sizes.values()), -1)
        parts = [self._part(name, raw) for name, raw in zip(self._sizes, pieces, strict=True)]
        return Mixed(self.features, parts).to_event(1)

    def _add_levels(self, name: str, sizes: list[int]) -> None:
        most = max(sizes)
        self.register_buffer(f"_{name}_sizes", torch.tensor(sizes), persistent=False)
        if self.features.kind(name) == "ordered":
            gap = 1e4  # beyond the levels of a column: never
            raw = [F.pad(even_cutpoints(k), (0, most - k), value=gap) for k in sizes]
            self.raw_cutpoints[name] = torch.stack(raw)
            return
        self._sizes[name] = sum(sizes)
        starts = torch.tensor([0, *sizes[:-1]]).cumsum(0).unsqueeze(-1)
        inside = torch.arange(most) < torch.tensor(sizes).unsqueeze(-1)
        index = torch.where(inside, starts + torch.arange(most), sum(sizes))
        self.register_buffer(f"_{name}_logits", index, persistent=False)

    def _part(self, name: str, raw: Tensor) -> Any:
        features, kind = self.features, self.features.kind(name)
        center, spread = (features.take(x, name) for x in (features.center, features.spread))
        if kind == "categorical":
            index = getattr(self, f"_{name}_logits")
            return Codes(F.pad(raw, (0, 1), value=_NEVER)[..., index], self._levels(name))
        if kind == "ordered":
            points = cutpoints(self.raw_cutpoints[name])
            return Codes(densities.ordered_logits(raw, points), self._levels(name))
        if kind == "bernoulli":
            logits = raw + _known_share(center).logit()
            return dist.Bernoulli(logits=logits, validate_args=False)
        if kind == "continuous_bernoulli":
            tilt = 2 * _known_share(center) - 1
            slope = 2 * tilt * (3 - tilt**2) / (1 - tilt**2)  # nearly the inverse of the mean
            return densities.ContinuousBernoulli(raw + slope, validate_args=False)
        if kind in _SCALED:
            return self._scaled(kind, name, center + spread * raw, spread)
        gate = None
        if kind == "zero_inflated_negative_binomial":
            raw, gate = raw.chunk(2, -1)
        log_mean = bounded_log(center.clamp_min(0.01).expm1().log() + spread * raw)
        if kind == "poisson":
            return dist.Poisson(log_mean.exp(), validate_args=False)
        dispersion = bounded_log(self.raw_scale[name]) + 2 * spread.log()
        counts = densities.NegativeBinomial(log_mean, dispersion, validate_args=False)
        if gate is None:
            return counts
        return densities.ZeroInflatedNegativeBinomial(gate - 2, counts, validate_args=False)

    def _scaled(self, kind: str, name: str, loc: Tensor, spread: Tensor) -> Any:
        scale = (spread * (MIN_SHARE + F.softplus(self.raw_scale[name]))).expand_as(loc)
        if kind == "normal":
            return dist.Normal(loc, scale, validate_args=False)
        if kind == "log_normal":
            return dist.LogNormal(loc, scale, validate_args=False)
        if kind == "beta":
            return beta(loc, 4 / scale**2 + 1 / scale)
        df = degrees_of_freedom(self.raw_df[name]).expand_as(loc)
        return dist.StudentT(df, loc, scale, validate_args=False)

    def _levels(self, name: str) -> Tensor:
        return getattr(self, f"_{name}_sizes")


def _known_share(center: Tensor) -> Tensor:
    """The share of ones, (D,), away from 0 and 1; a half where the centre says nothing."""
    known = (center > 0) & (center < 1)
    return torch.where(known, center.clamp(0.01, 0.99), 0.5)
