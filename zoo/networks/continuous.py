"""Likelihoods of real, positive and unit-interval entries, which are independent of each other."""

import math
from collections.abc import Sequence

import pyro.distributions as dist
import torch.nn.functional as F
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor

from pyrozoo.zoo.networks import densities
from pyrozoo.zoo.networks.base import (
    MIN_SCALE,
    Likelihood,
    Located,
    inverse_positive_scale,
    positive_scale,
)


class Normal(Located):
    """Independent normal entries.

    Args:
        event_shape: the shape of one observation.
        scale: "shared" (one learnt scale for all entries, starting at 1), "learned" (one for each
            entry of the event; an entry that never varies drives its scale to the floor),
            "predicted" (the network puts out a scale beside each location), or a number (fixed).

    Raises:
        ValueError: if `scale` is another string or a number that is not positive and finite.
    """

    scale: str | float

    def __init__(self, event_shape: int | Sequence[int], scale: str | float = "shared") -> None:
        super().__init__(event_shape)
        self.add_number("scale", scale, inverse_positive_scale(1.0))

    def distribution(self, params: Tensor) -> TorchDistributionMixin:
        """Build the distribution; with predicted scales, params are all locations, then scales."""
        loc, scale = self.split(params, scale=positive_scale)
        return dist.Normal(loc, scale).to_event(len(self.event_shape))


class StudentT(Located):
    """Independent entries of Student's t distribution: heavy tails, for data with outliers.

    Args:
        event_shape: the shape of one observation.
        df: degrees of freedom, "shared" or "learned" (see `scale`; above 2, so that there is a
            variance, and starting at 5), "predicted", or a number above 1.
        scale: as in `Normal`.

    Raises:
        ValueError: if `df` or `scale` is none of these.
    """

    df: str | float
    scale: str | float

    def __init__(
        self,
        event_shape: int | Sequence[int],
        df: str | float = "shared",
        scale: str | float = "shared",
    ) -> None:
        super().__init__(event_shape)
        self.add_number("scale", scale, inverse_positive_scale(1.0))
        self.add_number("df", df, math.log(math.expm1(3.0)), least=1.0)

    def distribution(self, params: Tensor) -> TorchDistributionMixin:
        """Build the distribution; params are all locations, predicted scales, predicted dfs."""
        loc, scale, df = self.split(params, scale=positive_scale, df=degrees_of_freedom)
        return dist.StudentT(df, loc, scale).to_event(len(self.event_shape))


class LogNormal(Located):
    """Independent positive entries whose logarithms are normal.

    Args:
        event_shape: the shape of one observation.
        scale: of the logarithms, as in `Normal`.

    Raises:
        ValueError: if `scale` is another string or a number that is not positive and finite.
    """

    scale: str | float

    def __init__(self, event_shape: int | Sequence[int], scale: str | float = "shared") -> None:
        super().__init__(event_shape)
        self.add_number("scale", scale, inverse_positive_scale(1.0))

    def distribution(self, params: Tensor) -> TorchDistributionMixin:
        """Build the distribution; params are the medians' logarithms, then predicted scales."""
        loc, scale = self.split(params, scale=positive_scale)
        return dist.LogNormal(loc, scale).to_event(len(self.event_shape))


class Beta(Located):
    """Independent entries above 0 and below 1, parametrised by mean and concentration.

    A value of exactly 0 or 1 has no finite density and is refused; see `ContinuousBernoulli`.

    Args:
        event_shape: the shape of one observation.
        concentration: the sum of both parameters, "shared", "learned" (starting at 2, where an
            even mean is uniform), "predicted", or a number.

    Raises:
        ValueError: if `concentration` is another string or number.
    """

    concentration: str | float

    def __init__(
        self, event_shape: int | Sequence[int], concentration: str | float = "shared"
    ) -> None:
        super().__init__(event_shape)
        self.add_number("concentration", concentration, inverse_positive_scale(2.0))

    def distribution(self, params: Tensor) -> TorchDistributionMixin:
        """Build the distribution; params are logits of the means, then predicted concentrations."""
        logits, concentration = self.split(params, concentration=positive_scale)
        return beta(logits, concentration).to_event(len(self.event_shape))


class ContinuousBernoulli(Likelihood):
    """Independent entries in [0, 1], grey pixels for example, with a normalised density.

    Unlike the cross entropy of `Bernoulli` on grey values, it is a density, so that bounds can be
    compared with those of other densities.
    """

    def distribution(self, params: Tensor) -> TorchDistributionMixin:
        """Build the distribution from raw slopes of shape (*, prod(event_shape)); 0 is uniform."""
        base = densities.ContinuousBernoulli(self.unflatten(params))
        return base.to_event(len(self.event_shape))


def degrees_of_freedom(raw: Tensor) -> Tensor:
    """Map raw values to degrees of freedom above 2."""
    return 2 + MIN_SCALE + F.softplus(raw)


def beta(logits: Tensor, concentration: Tensor) -> densities.Beta:
    """Return beta distributions with these logits of the mean and concentrations, shapes (*)."""
    tiny = 1e-20  # neither parameter may round to zero
    ones = concentration * logits.sigmoid() + tiny
    zeros = concentration * (-logits).sigmoid() + tiny
    return densities.Beta(ones, zeros)
