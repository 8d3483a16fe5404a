"""What a guide reads: the values of the given sites, together with what is missing."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, cast

import pyro.distributions as dist
import torch
from pyro.distributions import is_validation_enabled
from torch import Tensor, nn

from pyrozoo.inference import Batch
from pyrozoo.inference.graph import DATA, Graph, Site, innermost, read_graph
from pyrozoo.zoo.networks import Features, Mixed, one_hot


def graph_of(program: Any, example: Any = None) -> Graph:
    """The graph of a program, from a run on two rows of ``example`` (default: two empty rows)."""
    batch = Batch.of(2 if example is None else example)
    return read_graph(program, batch[:2])


def local_site(graph: Graph, name: str) -> Site:
    """A site of the program that lies in the data plate and in no other.

    Raises:
        ValueError: there is no such site, or it lies elsewhere.
    """
    site = graph.sites.get(name)
    if site is None or site.kind != "sample":
        names = ", ".join(s.name for s in graph.sites.values() if s.kind == "sample")
        raise ValueError(f"{name!r} is not a site of the program (sites: {names})")
    if set(site.dims) != {DATA}:
        plates = ", ".join(site.dims) or "none"
        raise ValueError(
            f"site {name!r} is expected in plate 'data' and no other, but its plates are: {plates}"
        )
    return site


class Inputs(nn.Module):
    """Turns a batch into vectors ``(*, width)``, one for each given site, and a vector of flags.

    Missing entries are zero.  A categorical site is one-hot, so that a missing one is all zeros;
    any other site has a flag, 1 where known, unless it must be known for ``target`` to matter at
    all: it is the only given site that depends on ``target``.  A row of a table
    (:class:`~pyrozoo.zoo.networks.Mixed`) is read as the features of its columns, zero for a column
    that is missing, followed by one flag for each column.

    Which inputs there are depends on the program and ``given`` alone, never on the data at hand.
    """

    def __init__(self, graph: Graph, given: Sequence[str], target: str | None = None) -> None:
        super().__init__()
        if isinstance(given, str) or not given:
            raise ValueError(f"given is a list of at least one site name, got {given!r}")
        self.given = tuple(given)
        self._sites = {name: local_site(graph, name) for name in given}
        tables = {n: fn for n, s in self._sites.items() if (fn := _table(s)) is not None}
        self.tables = nn.ModuleDict({n: copy.deepcopy(fn.features) for n, fn in tables.items()})
        below = set(graph.descendants(target)) & set(given) if target else set()
        sure = below if len(below) == 1 else set()
        self._flagged = tuple(
            n
            for n, s in self._sites.items()
            if n not in sure and _num_values(s) == 0 and n not in self.tables
        )
        widths = [self._width(s) for s in self._sites.values()]
        self.widths = [*widths, len(self._flagged)] if self._flagged else widths

    def forward(
        self, batch: Batch, drawn: Mapping[str, Tensor], dtype: torch.dtype
    ) -> list[Tensor]:
        """The inputs, in the order of ``given``, flags last.

        Args:
            batch: what is known.
            drawn: values of sites that an earlier part of the guide has drawn, ``(*, rows,
                event)``.
            dtype: of the result.
        """
        values = [
            self.value(name, batch, drawn, dtype).flatten(-n)
            if (n := self._rank(name))
            else self.value(name, batch, drawn, dtype)
            for name in self.given
        ]
        if self._flagged:
            flags = [self._flag(name, batch, drawn) for name in self._flagged]
            values.append(torch.stack(flags, -1).to(dtype))
        return values

    def _width(self, site: Site) -> int:
        if site.name in self.tables:
            return _table(site).num_features + site.event_shape.numel()
        return _num_values(site) or site.event_shape.numel()

    def _rank(self, name: str) -> int:
        return 0 if _num_values(self._sites[name]) else len(self._sites[name].event_shape)

    def _flag(self, name: str, batch: Batch, drawn: Mapping[str, Tensor]) -> Tensor:
        if name in drawn:
            return torch.ones(len(batch), dtype=torch.bool, device=batch.device)
        return batch.present(name).reshape(len(batch), -1).any(1)

    def value(
        self, name: str, batch: Batch, drawn: Mapping[str, Tensor], dtype: torch.dtype
    ) -> Tensor:
        """One site's value, with its event shape (one-hot if categorical, ``(*, 1)`` if scalar).

        That of a table is its features and flags, ``(*, features + columns)``.
        """
        site = self._sites[name]
        if name in self.tables:
            return self._row(name, batch, drawn, dtype)
        count = _num_values(site)
        shape = site.event_shape
        if name in drawn:
            value, present = drawn[name], None
        elif name in batch:
            value, present = batch[name], batch.present(name) if batch.partly(name) else None
        else:
            width = torch.Size([count]) if count else shape or torch.Size([1])
            return torch.zeros(len(batch), *width, dtype=dtype, device=batch.device)
        if count:
            value = one_hot(value.long(), count, dtype)
        elif not shape:
            value = value.unsqueeze(-1)
        value = value.to(dtype)
        if present is not None:
            lead = present.reshape(present.shape + (1,) * (value.dim() - present.dim()))
            value = torch.where(lead, value, torch.zeros_like(value))
        return value

    def _row(
        self, name: str, batch: Batch, drawn: Mapping[str, Tensor], dtype: torch.dtype
    ) -> Tensor:
        table = cast(Features, self.tables[name])
        if name not in drawn and name not in batch:
            width = self._width(self._sites[name])
            return torch.zeros(len(batch), width, dtype=dtype, device=batch.device)
        value = (drawn[name] if name in drawn else batch[name]).to(dtype)
        flags = torch.ones_like(value)
        if name not in drawn and batch.partly(name):
            present = batch.present(name)
            known = present.reshape(present.shape + (1,) * (value.dim() - present.dim()))
            flags = flags * known
            value = torch.where(known, value, table.filler.to(dtype))
        if is_validation_enabled() and not (fits := table.check(value).all(-1)).all():
            raise ValueError(
                f"site {name!r}, {table.explain(value[~fits])}; what is not known is said with a"
                " pair (value, present)"
            )
        return torch.cat([table(value) * flags[..., table.owners], flags], -1)


def _table(site: Site) -> Any:
    """The distribution of a row of a table, else None."""
    fn = innermost(site.fn)
    return fn if isinstance(fn, Mixed) and len(site.event_shape) == 1 else None


def _num_values(site: Site) -> int:
    """The number of categories of a categorical site, else 0."""
    if isinstance(site.fn, dist.Categorical):
        return int(site.fn.probs.shape[-1])
    return 0


def first_dtype(module: nn.Module) -> torch.dtype:
    """The precision of a module's parameters."""
    return next(p.dtype for p in module.parameters() if p.is_floating_point())
