"""A guide whose draws are the same for a row whatever its neighbours are."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from pyrozoo.inference import Batch


class _RowNormal(dist.Normal):
    """A normal whose draws have the same noise in every row."""

    generator: torch.Generator
    inner: int  # dimensions of the event, right of the rows

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        new = super().expand(batch_shape, _instance)
        new.generator, new.inner = self.generator, self.inner
        return new

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        shape = list(self._extended_shape(torch.Size(sample_shape)))
        shape[-1 - self.inner] = 1
        noise = torch.randn(shape, generator=self.generator, dtype=self.loc.dtype)
        return self.loc + self.scale * noise


class _Share(Messenger):
    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.generator = generator

    def _pyro_sample(self, msg: Any) -> None:
        fn = msg["fn"]
        inner = fn.event_dim if isinstance(fn, dist.Independent) else 0
        base = fn.base_dist if inner else fn
        if type(base) is dist.Normal and len(base.batch_shape) > inner:
            shared = _RowNormal(base.loc, base.scale, validate_args=False)
            shared.generator, shared.inner = self.generator, inner
            msg["fn"] = shared.to_event(inner)


class Steady(nn.Module):
    """Another guide whose Gaussian draws come from a seed, with the same noise in every row."""

    def __init__(self, guide: Any) -> None:
        super().__init__()
        self.guide, self.seed = guide, 0

    def forward(self, batch: Batch) -> Any:
        """Draw, each row with the same noise."""
        with _Share(torch.Generator().manual_seed(self.seed)):
            return self.guide(batch)
