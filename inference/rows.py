"""Which rows a fit visits, and which it holds out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pyrozoo.inference.batch import Batch, Data


def hold_out(
    batch: Batch, validation: Data | float | None, pairing: Any, seed: int
) -> tuple[Batch, Batch | None, Tensor]:
    """Training rows, held-out rows, and the numbers of the training rows in the data."""
    numbers = torch.arange(len(batch))
    if validation is None:
        return batch, None, numbers
    if isinstance(validation, float):
        if not 0 < validation < 1:
            raise ValueError(f"validation is data, or a fraction between 0 and 1, got {validation}")
        order = torch.randperm(len(batch), generator=torch.Generator().manual_seed(seed + 1))
        count = max(1, round(validation * len(batch)))
        return batch[order[count:]], batch[order[:count]], order[count:]
    return batch, pairing.prepare(validation), numbers


def visits_of(batch: Batch, repeat: Mapping[str, int]) -> Tensor:
    """The rows of one epoch, ``(visits,)``: all of them, some more than once."""
    rows = [torch.arange(len(batch))]
    for name, times in repeat.items():
        if name not in batch or times < 1:
            raise ValueError(f"repeat={{{name!r}: {times}}}: a site of the data and a count from 1")
        known = batch.present(name).reshape(len(batch), -1).any(1).cpu().nonzero().squeeze(-1)
        rows.append(known.repeat(times - 1))
    return torch.cat(rows)
