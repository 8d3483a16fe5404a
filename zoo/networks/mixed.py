"""The distribution of a row of a table whose columns are of different kinds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from pyrozoo.zoo.networks.features import Features


class Codes(TorchDistribution):
    """Categories of several columns: values are codes, as floats, and columns differ in levels.

    Args:
        logits: shape (*, n, K); those beyond the levels of a column are very negative.
        sizes: levels of each column, shape (n,).
    """

    arg_constraints = {}  # noqa: RUF012

    def __init__(self, logits: Tensor, sizes: Tensor) -> None:
        self.logits, self.sizes = logits, sizes
        super().__init__(logits.shape[:-1], validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        """Return the same distribution with another batch shape."""
        shape = torch.Size(batch_shape)
        return Codes(self.logits.expand(shape + self.logits.shape[-1:]), self.sizes)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-probability of codes of shape (*, n)."""
        index, logits = value.long().unsqueeze(-1), self.logits.log_softmax(-1)
        lead = torch.broadcast_shapes(index.shape[:-1], logits.shape[:-1])
        logits = logits.expand(lead + logits.shape[-1:])
        return logits.gather(-1, index.expand((*lead, 1))).squeeze(-1)

    @property
    def mean(self) -> Tensor:
        """The most probable code: codes have no mean."""
        return self.logits.argmax(-1).to(self.logits.dtype)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draw codes of shape sample_shape + batch_shape."""
        draw = dist.Categorical(logits=self.logits, validate_args=False).sample(sample_shape)
        return draw.to(self.logits.dtype)


class _EveryColumn(constraints.Constraint):
    """What each column takes; checks (*, D) values one by one."""

    def __init__(self, features: Features) -> None:
        self.features = features
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        return self.features.check(value)

    def placeholder(self, value: Tensor) -> Tensor:
        """A row of values that every column takes."""
        return self.features.filler.to(value)

    def explain(self, rows: Tensor) -> str:
        """What is wrong with rows of values, (n, D)."""
        return self.features.explain(rows)

    def __repr__(self) -> str:
        kinds = dict.fromkeys(c.likelihood for c in self.features.columns)
        return f"{len(self.features.columns)} columns ({', '.join(kinds)})"


class Mixed(TorchDistribution):
    """Independent columns of different kinds: batch shape (*, D), event shape ().

    Masks of single entries are those of any factorised distribution.  `Columns` makes it, with
    `.to_event(1)`, so that a row is one event.

    Args:
        features: the columns.
        parts: one distribution a group of the columns, each of batch shape (*, n).
    """

    arg_constraints = {}  # noqa: RUF012

    def __init__(
        self, features: Features, parts: Sequence[Any], validate_args: bool | None = None
    ) -> None:
        self.features, self.parts = features, tuple(parts)
        lead = torch.broadcast_shapes(*(part.batch_shape[:-1] for part in self.parts))
        shape = torch.Size([*lead, len(features.columns)])
        super().__init__(shape, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        """Return the same distribution with another batch shape (*, D)."""
        shape = torch.Size(batch_shape)
        if shape[-1:] != self.batch_shape[-1:]:
            raise ValueError(f"expected a shape (*, {self.batch_shape[-1]}), got {tuple(shape)}")
        parts = [part.expand(shape[:-1] + part.batch_shape[-1:]) for part in self.parts]
        new = Mixed(self.features, parts, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @constraints.dependent_property
    def support(self) -> Any:
        """What each column takes."""
        return _EveryColumn(self.features)

    @property
    def num_features(self) -> int:
        """How many features a row has."""
        return self.features.num_features

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-density or log-probability of each column, (*, D), of values (*, D)."""
        if self._validate_args:
            self._validate_sample(value)
        groups = zip(self.features.groups, self.parts, strict=True)
        return self.features.put([p.log_prob(self.features.take(value, g)) for g, p in groups])

    @property
    def mean(self) -> Tensor:
        """The mean of each column, (*, D); the most probable code of one with levels."""
        return self.features.put([part.mean for part in self.parts])

    def average(self) -> Tensor:
        """The mean over the first dimension, kept with size one: shape (1, *, D).

        Of a column with levels it is the most probable code of the averaged probabilities, where
        a mean of codes would say nothing.
        """
        return self.features.put([_average(part) for part in self.parts])

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draw values of shape sample_shape + (*, D), in the units of the columns."""
        with torch.no_grad():
            return self.features.put([part.sample(torch.Size(sample_shape)) for part in self.parts])


def _average(part: Any) -> Tensor:
    if isinstance(part, Codes):
        probabilities = part.logits.softmax(-1).mean(0, keepdim=True)
        return probabilities.argmax(-1).to(probabilities.dtype)
    return part.mean.mean(0, keepdim=True)
