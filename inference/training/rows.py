"""Which rows a fit visits, in which order, and which it holds out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyrozoo.inference.batch import Batch, Data
from pyrozoo.inference.bounds.elbo import EnumELBO
from pyrozoo.inference.disk.loading import check_rows
from pyrozoo.inference.disk.stored import Stored
from pyrozoo.inference.observing import Observed


class Rows(NamedTuple):
    """The rows of a fit, checked."""

    train: Batch
    held_out: Batch | None
    numbers: Tensor  # of the training rows, in the data
    visits: Tensor  # see :func:`visits_of`
    sites: list[str]  # what is done with each site, in words


def make_ready(
    objective: EnumELBO,
    p: Observed,
    q: Observed,
    data: Data,
    validation: Data | float | None,
    repeat: Mapping[str, int],
    seed: int,
    batch_size: int,
) -> Rows:
    """Divide and check the rows of a fit; the objective is told their number.

    Raises:
        ValueError: data, sites or options do not fit, or there are no rows.
    """
    train, held_out, numbers = hold_out(p.pairing.prepare(data), validation, p.pairing, seed)
    if len(train) == 0:
        raise ValueError("there are no rows to fit")
    objective.num_rows = objective.num_rows or len(train)
    visits = visits_of(train, repeat)
    for part in (train,) if held_out is None else (train, held_out):
        check_rows(p.pairing.plan(part[:batch_size]), part)
    with torch.no_grad():
        objective.explain(p, q, train[:batch_size])  # runs both halves once; not on all rows
        sites = objective.explain(p, q, train)
    return Rows(train, held_out, numbers, visits, sites)


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
        held, kept = order[:count], order[count:]
        if not isinstance(batch, Stored):
            return batch[kept], batch[held], kept
        if batch.by_blocks:  # read through from beginning to end
            held, kept = held.sort().values, kept.sort().values
        return batch.select(kept), batch.select(held), kept
    return batch, pairing.prepare(validation), numbers


def visits_of(batch: Batch, repeat: Mapping[str, int]) -> Tensor:
    """The rows of one epoch, ``(visits,)``: all of them, some more than once."""
    rows = [torch.arange(len(batch))]
    for name, times in repeat.items():
        if name not in batch or times < 1:
            raise ValueError(f"repeat={{{name!r}: {times}}}: a site of the data and a count from 1")
        known = batch.extent(name).rows.cpu().nonzero().squeeze(-1)
        rows.append(known.repeat(times - 1))
    return torch.cat(rows)


def epoch_order(
    batch: Batch, visits: Tensor, generator: torch.Generator, batch_size: int = 1
) -> Tensor:
    """The visits of one epoch in the order in which they are made.

    Rows in memory that are all in one batch stay as they are: what all rows share may have an entry
    for each.
    """
    if isinstance(batch, Stored):
        if batch.by_blocks:
            return block_order(visits, batch.blocks_of(visits), batch.window, generator)
        return visits[torch.randperm(len(visits), generator=generator)]
    order = torch.randperm(len(visits), generator=generator)
    return (visits[order] if batch_size < len(visits) else visits).to(batch.device)


def mixing(batch: Batch) -> dict[str, str]:
    """What decides the order besides the seed, as a setting of a run; nothing in memory."""
    if not isinstance(batch, Stored) or not batch.by_blocks or batch.starts is None:
        return {}
    return {"shuffle": f"{batch.window} of {len(batch.starts)} blocks"}


def block_order(visits: Tensor, blocks: Tensor, window: int, generator: torch.Generator) -> Tensor:
    """Mix rows that can only be read in blocks.

    The blocks are put in a random order; then the rows of each ``window`` of them that follow one
    another are mixed.  Every visit is made once, so that the loss of an epoch is an average over
    all rows, as before.  But a step sees rows of one window only: its gradient is that of the
    window in expectation, and those of the steps of a window resemble each other as far as rows of
    a block do.  In a file without any order nothing is lost.  In a file that is sorted (by class,
    by donor, by day) with blocks of one kind, a step sees at most ``window`` kinds, gradients vary
    more, and parameters follow the windows: shuffle the file once, or take a larger window, or
    ``shuffle="rows"``.

    Args:
        visits: rows, ``(visits,)``.
        blocks: the block of each, ``(visits,)``.
        window: blocks that are mixed together.
        generator: of the order.

    Returns:
        the visits in another order, ``(visits,)``.
    """
    grouped = blocks.argsort(stable=True)
    ends = torch.bincount(blocks).cumsum(0)
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    parts = []
    for some in torch.randperm(len(ends), generator=generator).split(window):
        rows = torch.cat([grouped[starts[b] : ends[b]] for b in some.tolist()])
        parts.append(rows[torch.randperm(len(rows), generator=generator)])
    return visits[torch.cat(parts)]
