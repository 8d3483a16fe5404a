"""Likelihoods of binary, categorical and ordered values, and of counts."""

import math
from collections.abc import Sequence

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor, nn

from pyrozoo.zoo.networks import densities
from pyrozoo.zoo.networks.base import MIN_SCALE, Likelihood, Located, bounded_log


class Bernoulli(Likelihood):
    """Independent Bernoulli entries, parametrised by logits.

    The values may be grey, anywhere in [0, 1]: `log_prob` is then the cross entropy.
    """

    def distribution(self, params: Tensor) -> TorchDistributionMixin:
        """Build the distribution from logits of shape (*, prod(event_shape))."""
        base = dist.Bernoulli(logits=self.unflatten(params), validate_args=False)
        return base.to_event(len(self.event_shape))


class Categorical(Likelihood):
    """A single class index out of `num_classes`; the event shape is ()."""

    def __init__(self, num_classes: int) -> None:
        super().__init__((), num_classes)

    def distribution(self, params: Tensor) -> TorchDistributionMixin:
        """Build the distribution from logits of shape (*, num_classes)."""
        return dist.Categorical(logits=params)


class Ordered(Likelihood):
    """A single level out of `num_levels` ordered ones, 0 the lowest; the event shape is ().

    With learnt, increasing cutpoints c and the network's output f, a cumulative logit:
    P(level <= k) = sigmoid(c_k - f).  All levels are equally probable at f = 0 to begin with.

    Raises:
        ValueError: if there are fewer than two levels.
    """

    def __init__(self, num_levels: int) -> None:
        super().__init__((), 1)
        if num_levels < 2:
            raise ValueError(f"ordered values have at least two levels, got {num_levels}")
        self.raw_cutpoints = nn.Parameter(even_cutpoints(num_levels))

    def distribution(self, params: Tensor) -> TorchDistributionMixin:
        """Build the distribution from locations of shape (*, 1): larger means higher levels."""
        points = cutpoints(self.raw_cutpoints)
        return dist.Categorical(logits=densities.ordered_logits(params.squeeze(-1), points))


class Poisson(Likelihood):
    """Independent counts, parametrised by the logarithm of the mean."""

    def distribution(self, params: Tensor) -> TorchDistributionMixin:
        """Build the distribution from logarithms of shape (*, prod(event_shape))."""
        base = dist.Poisson(bounded_log(self.unflatten(params)).exp())
        return base.to_event(len(self.event_shape))


class NegativeBinomial(Located):
    """Independent counts whose variance is mean + dispersion mean^2.

    Args:
        event_shape: the shape of one observation.
        dispersion: "shared" (one learnt for all entries, starting at 1), "learned" (one for each
            entry), "predicted" (the network puts out its logarithm), or a number.

    Raises:
        ValueError: if `dispersion` is another string or a number that is not positive and finite.
    """

    dispersion: str | float

    def __init__(
        self, event_shape: int | Sequence[int], dispersion: str | float = "learned"
    ) -> None:
        super().__init__(event_shape)
        self.add_number("dispersion", dispersion, 0.0)

    def counts(self, params: Tensor) -> densities.NegativeBinomial:
        """Return the counts of all entries, batch shape (*, event_shape)."""
        raw, dispersion = self.split(params, dispersion=lambda x: bounded_log(x).exp() + 1e-20)
        return densities.NegativeBinomial(bounded_log(raw), dispersion.log())

    def distribution(self, params: Tensor) -> TorchDistributionMixin:
        """Build the distribution; params are logarithms of means, then predicted dispersions."""
        return self.counts(params).to_event(len(self.event_shape))


class ZeroInflatedNegativeBinomial(NegativeBinomial):
    """Independent counts: zero with a probability that the network puts out, else as above.

    Args:
        event_shape: the shape of one observation.
        dispersion: as in `NegativeBinomial`.

    Raises:
        ValueError: if `dispersion` is another string or a number that is not positive and finite.
    """

    def __init__(
        self, event_shape: int | Sequence[int], dispersion: str | float = "learned"
    ) -> None:
        super().__init__(event_shape, dispersion)
        self.num_params += math.prod(self.event_shape)

    def distribution(self, params: Tensor) -> TorchDistributionMixin:
        """Build the distribution; params are those of the counts, then logits of the zeros."""
        size = math.prod(self.event_shape)
        counts = self.counts(params[..., :-size])
        gate = self.unflatten(params[..., -size:])
        fn = densities.ZeroInflatedNegativeBinomial(gate, counts)
        return fn.to_event(len(self.event_shape))


def even_cutpoints(num_levels: int) -> Tensor:
    """Raw cutpoints (num_levels - 1,) at which every level is equally probable for location 0."""
    shares = torch.arange(1, num_levels, dtype=torch.float64) / num_levels
    points = shares.logit()
    gaps = (points[1:] - points[:-1]) - MIN_SCALE
    raw = torch.cat([points[:1], gaps + torch.log(-torch.expm1(-gaps))])
    return raw.to(torch.get_default_dtype())


def cutpoints(raw: Tensor) -> Tensor:
    """Map raw values (*, K - 1), the first cutpoint and then raw gaps, to increasing cutpoints."""
    gaps = F.softplus(raw[..., 1:]) + MIN_SCALE
    return torch.cat([raw[..., :1], raw[..., :1] + gaps.cumsum(-1)], -1)
