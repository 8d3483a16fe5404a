"""The bound of all modalities together, plus the bounds of chosen and of random subsets of them.

A guide that takes any subset of the modalities is only trained on the subsets that occur.  Adding
the bound of each subset S to that of the complete row makes every expert learn to stand alone ::

    ELBO(x) + sum_S ELBO(x_S)

where ``ELBO(x_S)`` proposes from, and reconstructs, S only.  All of it is one pass over a batch
that is repeated once per subset, with what lies outside the subset hidden.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from pyro.infer import TraceEnum_ELBO
from torch import Tensor

from pyrozoo.inference.batch import Batch
from pyrozoo.inference.bounds.contract import add
from pyrozoo.inference.bounds.elbo import EnumELBO, Value, coupled_layer
from pyrozoo.inference.observing import Observed
from pyrozoo.inference.plan import Plan


class SubsetELBO(EnumELBO):
    """``EnumELBO`` of all that is observed, plus one for each subset of the modalities.

    In each row a subset means those of its sites that the row knows.  A subset that is then empty,
    or equal to one that the row has already (all it knows is the first), adds nothing, so that
    incomplete rows are not counted twice.  Sites that are no modalities, such as labels, stay as
    they are in every term.  The loss is the mean over the rows of the batch; :attr:`is_bound` is
    false.

    :meth:`per_row` sums over the subsets, :meth:`terms` takes apart the bound of all modalities
    alone.

    Args:
        subsets: lists of sites, e.g. ``[["x_left"], ["x_right"]]``.
        num_random: how many subsets are drawn in addition, for every row and call anew: first their
            size, uniformly, then which.
        modalities: what random subsets are drawn from; default: the sites of ``subsets``, else
            every observed site that is called ``x_...``.
        options: of :class:`.EnumELBO`.

    Source: Mike Wu, Noah Goodman, "Multimodal generative models for scalable weakly-supervised
    learning" (2018).
    """

    def __init__(
        self,
        subsets: Iterable[Sequence[str]] = (),
        num_random: int = 0,
        modalities: Sequence[str] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.subsets = [tuple(subset) for subset in subsets]
        if any(isinstance(subset, str) for subset in subsets) or not all(self.subsets):
            raise ValueError(f"subsets are lists of at least one site name, got {subsets!r}")
        if num_random < 0:
            raise ValueError(f"num_random is at least 0, got {num_random}")
        self.num_random = num_random
        self.modalities = None if modalities is None else tuple(modalities)

    @property
    def is_bound(self) -> bool:
        """Never: the subsets count the same row several times."""
        return False

    def _evaluate(self, p: Observed, q: Observed, batch: Batch, plan: Plan) -> Value:
        names = self._names(batch, plan)
        chosen, live = self._choose(batch, names)
        if layer := coupled_layer(p.module, q.module):
            raise ValueError(f"rows cannot be repeated: layer {layer} couples the rows of a batch")
        batch, found = batch.sharing(), []
        listed = [names, *([n for n in names if n in subset] for subset in self.subsets)]
        for i, inside in enumerate(listed):
            if i and (not inside or inside in listed[:i]):
                continue
            part = batch.drop(*(n for n in names if n not in inside))
            value = super()._evaluate(p, q, part, p.pairing.plan(part))
            found.append(value if i == 0 else _where(live[i : i + 1], value))
        if names and self.num_random:
            stacked = _repeat(batch, self.num_random)
            for i, name in enumerate(names):
                stacked = stacked.hide(name, chosen[len(listed) :, :, i].reshape(-1))
            value = super()._evaluate(p, q, stacked, p.pairing.plan(stacked))
            value = value._replace(shared=value.shared * self.num_random)
            found.append(_where(live[len(listed) :], value))
        return Value(*(add(values) for values in zip(*found, strict=True)))

    def _names(self, batch: Batch, plan: Plan) -> list[str]:
        listed = dict.fromkeys(self.modalities or [n for subset in self.subsets for n in subset])
        for name in [*listed, *(n for subset in self.subsets for n in subset)]:
            if name not in plan.program.sites or name not in listed:
                of = ", ".join(plan.program.sites if name in listed else listed)
                raise ValueError(f"{name!r} is not a modality (there are: {of})")
        names = list(listed) or [n for n in plan.observed if n.startswith("x_")]
        return [n for n in names if n in batch]

    def _choose(self, batch: Batch, names: list[str]) -> tuple[Tensor, Tensor]:
        """What a copy sees, ``(copies, rows, modalities)``; where it counts, ``(copies, rows)``."""
        rows, device = len(batch), batch.device
        if not names:
            every = torch.ones(1, rows, dtype=torch.bool, device=device)
            return every.unsqueeze(-1), every
        listed = [[True] * len(names), *([n in s for n in names] for s in self.subsets)]
        fixed = torch.tensor(listed, device=device).unsqueeze(1).expand(-1, rows, -1)
        size = torch.randint(1, len(names) + 1, (self.num_random, rows, 1), device=device)
        rank = torch.rand(self.num_random, rows, len(names), device=device).argsort(-1)
        known = torch.stack([batch.present(n).reshape(rows, -1).any(-1) for n in names], -1)
        chosen = torch.cat([fixed, rank < size]) & known
        same = (chosen.unsqueeze(0) == chosen.unsqueeze(1)).all(-1)  # (copies, copies, rows)
        earlier = torch.ones(len(same), len(same), dtype=torch.bool, device=device).tril(-1)
        repeated = (same & earlier.unsqueeze(-1)).any(1)
        live = chosen.any(-1) & ~repeated
        first = torch.ones(1, rows, dtype=torch.bool, device=device)  # with labels alone, too
        return chosen, torch.cat([first, live[1:]])

    def _stock(self, reason: str, plan: Plan, batch: Batch) -> TraceEnum_ELBO:
        raise ValueError(f"subsets of the modalities are not available here: {reason}")


def _repeat(batch: Batch, copies: int) -> Batch:
    """All rows, several times over; reads no value."""

    def tile(x: Tensor) -> Tensor:
        return x.repeat(copies, *(1 for _ in x.shape[1:]))

    values = {n: tile(batch.stored(n)) for n in batch.names}
    present = {n: tile(batch.present(n)) for n in batch.names if batch.partly(n)}
    return Batch(values, present, copies * len(batch), batch._dtype)


def _where(live: Tensor, value: Value) -> Value:
    """The sum over copies, ``(copies, rows)``, of what counts."""

    def total(x: Tensor) -> Tensor:
        x = x.reshape(-1, *live.shape)
        return torch.where(live, x, x.new_zeros(())).sum(1)

    return Value(total(value.rows), value.shared, total(value.extra))
