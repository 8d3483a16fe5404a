"""How a batch of any size, in any pattern, becomes inputs of fixed shapes for a staged step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pyrozoo.inference.batch import Batch


class Inputs(NamedTuple):
    """What a step reads besides parameters and buffers, all of it tensors."""

    batches: list[Batch]  # one, or one for each group of rows
    shares: list[Tensor]  # of each row in the mean over rows; of padding none
    shared: Tensor  # share of the global sites
    weights: dict[str, Tensor]
    observed_guide_weights: dict[str, Tensor]


@dataclass(frozen=True)
class Layout:
    """Groups of rows that know the same, each of a fixed size; one group, where none are split.

    What is missing in a group is padded with rows that have no share in the loss; what is too much
    goes into another pass.
    """

    names: tuple[str, ...]  # rows are split by whether they know these
    sizes: dict[tuple[str, ...], int]  # what a group knows -> its size
    full: Tensor  # the shares of a batch that fits as it is
    coupled: bool  # rows depend on each other, so that none can be added

    @staticmethod
    def of(batch: Batch, names: tuple[str, ...] = (), coupled: bool = False) -> Layout:
        """Sizes for batches like this one: of a group, two standard deviations above its rows."""
        rows = len(batch)
        found = {known: len(index) for index, known in batch.patterns(names)}
        sizes = {}
        for i in range(2 ** len(names)):
            known = tuple(n for j, n in enumerate(names) if i >> j & 1)
            mean = found.get(known, 0)
            spare = 2 * math.sqrt(max(mean, 4) * (1 - mean / rows)) if names else 0
            sizes[known] = min(rows, math.ceil(mean + spare))
        dtype = batch._dtype or torch.get_default_dtype()
        full = torch.full((rows,), 1 / rows, dtype=dtype, device=batch.device)
        return Layout(names, sizes, full, coupled)

    def takes(self, batch: Batch) -> bool:
        """Whether a batch can be brought into this form."""
        return len(batch) == len(self.full) or (len(batch) > 0 and not self.coupled)

    def passes(self, batch: Batch) -> Iterator[tuple[list[Batch], list[Tensor]]]:
        """Batches and shares, until every row has been in one."""
        if not self.names and len(batch) == len(self.full):
            yield [batch], [self.full]
            return
        groups = {known: index for index, known in batch.patterns(self.names)}
        none = torch.zeros(0, dtype=torch.long, device=batch.device)
        rows = {known: groups.get(known, none) for known in self.sizes}
        for i in range(max(-(-len(rows[known]) // size) for known, size in self.sizes.items())):
            parts, shares = [], []
            for known, size in self.sizes.items():
                index = rows[known][i * size : (i + 1) * size]
                spare = rows[known][:1] if len(rows[known]) else none.new_zeros(1)
                part = batch[torch.cat([index, spare.expand(size - len(index))])]
                part = part.drop(*(n for n in self.names if n not in known))
                for name in known:
                    part = part.full(name)
                share = self.full.new_zeros(size)
                share[: len(index)] = 1 / len(batch)
                parts.append(part)
                shares.append(share)
            yield parts, shares
