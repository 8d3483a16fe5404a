"""What a guide reads: the values of the given sites, together with what is missing.

A site in the plates of the target is read entry by entry, one further out is broadcast.  One
further in is pooled (:mod:`.pooling`), or read as one vector where the entries are told apart: a
global latent lies in their plate.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import pyro.distributions as dist
import torch
from pyro.distributions import is_validation_enabled
from torch import Tensor, nn

from pyrozoo.guides.pooling import Pool
from pyrozoo.guides.sites import graph_of, local_site, row_site
from pyrozoo.inference import Batch
from pyrozoo.inference.graph import DATA, Graph, Site, innermost
from pyrozoo.zoo.networks import Features, Mixed, one_hot

__all__ = ["Inputs", "first_dtype", "graph_of", "local_site", "row_site"]


class Inputs(nn.Module):
    """Turns a batch into vectors ``(*, width)``, one for each given site, and a vector of flags.

    Missing entries are zero.  A categorical site is one-hot, so that a missing one is all zeros;
    any other site has a flag, 1 where known, unless it must be known for ``target`` to matter at
    all: it is the only given site that depends on ``target``.  A row of a table
    (:class:`~pyrozoo.zoo.networks.Mixed`) is read as the features of its columns, zero for a column
    that is missing, followed by one flag for each column.

    Which inputs there are depends on the program and ``given`` alone, never on the data at hand.

    Args:
        graph: of the program.
        given: sites that are read from the batch.
        target: the site that they are read for; default: one in plate ``"data"``.
        drawn: sites that the guide itself has drawn before; globals are read unconstrained.
        across: read site -> plates over all of whose entries it is read, if not those that the
            target is not in.
        observable: everything given to the guide, if it is more than ``given``.
        unconstrain: global site -> bijection from the unconstrained space.
        hidden, activation: of the network that pools entries.
    """

    def __init__(
        self,
        graph: Graph,
        given: Sequence[str],
        target: str | None = None,
        *,
        drawn: Sequence[str] = (),
        across: Mapping[str, frozenset[str]] | None = None,
        observable: Sequence[str] | None = None,
        unconstrain: Mapping[str, Any] | None = None,
        hidden: Sequence[int] = (64,),
        activation: str = "relu",
    ) -> None:
        super().__init__()
        if isinstance(given, str) or not (given or drawn):
            raise ValueError(f"given is a list of at least one site name, got {given!r}")
        self.given, self.drawn = tuple(given), tuple(drawn)
        self._target = target if target in given else None
        self._sites = {name: row_site(graph, name) for name in given}
        self._sites |= {name: graph.sites[name] for name in drawn}
        self._unconstrain = dict(unconstrain or {})
        tables = {n: fn for n, s in self._sites.items() if (fn := _table(s)) is not None}
        self.tables = nn.ModuleDict({n: copy.deepcopy(fn.features) for n, fn in tables.items()})
        mine = set(graph.sites[target].dims) if target else {DATA}
        self._depth = (
            max((-d for d in graph.sites[target].dims.values()), default=1) if target else 1
        )
        self._place(graph, mine, across or {})
        below = set(graph.descendants(target)) & set(observable or given) if target else set()
        sure = below if len(below) == 1 else set()
        self._flagged = tuple(
            n
            for n in self._direct
            if n in given and n not in sure and n != self._target
            and _num_values(self._sites[n]) == 0 and n not in self.tables
            and not self._sites[n].infer.get("_input")
        )  # fmt: skip
        widths = [self._width(self._sites[n]) for n in self._direct]
        if self._target:
            widths.append(self._width(self._sites[self._target]))
        widths += [self._flat_width(n) for n in self._flat]
        self.pools = nn.ModuleDict()
        for over, names in self._pooled.items():
            inside = [self._width(self._sites[n]) for n in names]
            flags = sum(n in self.given for n in names)
            inside += [flags] if flags else []
            self.pools["_".join(over)] = Pool(inside, hidden, activation)
            widths.append(cast(Pool, self.pools["_".join(over)]).width)
        self.widths = [*widths, len(self._flagged)] if self._flagged else widths

    def _place(self, graph: Graph, mine: set[str], across: Mapping[str, frozenset[str]]) -> None:
        """Sort the sites into those read as they are, as one vector, and pooled."""
        told = {p for s in graph.sites.values() if not s.local for p in s.dims}
        self._direct: list[str] = []
        self._flat: dict[str, tuple[str, ...]] = {}
        self._pooled: dict[tuple[str, ...], list[str]] = {}
        for name, site in self._sites.items():
            over = frozenset(across.get(name, ())) | (set(site.dims) - mine)
            if over <= mine and (site.local or not over):
                self._direct.append(name)
            if over and (over <= told or not site.local):
                self._flat[name] = tuple(sorted(over))
            elif over:
                self._pooled.setdefault(tuple(sorted(over)), []).append(name)

    def forward(
        self, batch: Batch, drawn: Mapping[str, Tensor], dtype: torch.dtype
    ) -> list[Tensor]:
        """The inputs, in the order of ``given`` and ``drawn``, flags last.

        Args:
            batch: what is known.
            drawn: values of sites that the guide, or an earlier part of it, has drawn,
                ``(*, rows, event)``.
            dtype: of the result.
        """
        values = [self._vector(name, batch, drawn, dtype) for name in self._direct]
        if self._target:
            values.append(self._entries(self._target, batch).to(dtype))
        for name, over in self._flat.items():
            values.append(self._trim(self._flattened(name, over, batch, drawn, dtype)))
        for over, names in self._pooled.items():
            values.append(self._trim(self._pool(over, names, batch, drawn, dtype)))
        if self._flagged:
            flags = [self._flag(name, batch, drawn) for name in self._flagged]
            values.append(torch.stack(torch.broadcast_tensors(*flags), -1).to(dtype))
        return values

    def _width(self, site: Site) -> int:
        if site.name in self.tables:
            return _table(site).num_features + site.event_shape.numel()
        if site.name in self._unconstrain:
            return self._unconstrain[site.name].inverse_shape(site.event_shape).numel()
        return _num_values(site) or site.event_shape.numel()

    def _flat_width(self, name: str) -> int:
        site = self._sites[name]
        entries = 1
        for plate in self._flat[name]:
            entries *= site.sizes[plate]
        return entries * (self._width(site) + (name in self.given))

    def _rank(self, name: str) -> int:
        site = self._sites[name]
        if name in self._unconstrain:
            return len(self._unconstrain[name].inverse_shape(site.event_shape))
        return 0 if _num_values(site) else len(site.event_shape)

    def _vector(
        self, name: str, batch: Batch, drawn: Mapping[str, Tensor], dtype: torch.dtype
    ) -> Tensor:
        value = self.value(name, batch, drawn, dtype)
        return value.flatten(-n) if (n := self._rank(name)) else value

    def _flattened(
        self, name: str, over: Iterable[str], batch: Batch, drawn: Mapping[str, Tensor], dtype: Any
    ) -> Tensor:
        """All entries of some plates as one vector, with a flag each if they are given."""
        site = self._sites[name]
        value = self._vector(name, batch, drawn, dtype)
        if name in self.given:
            flag = self._flag(name, batch, drawn).unsqueeze(-1).to(dtype)
            flag = flag.expand(torch.broadcast_shapes(flag.shape, (*value.shape[:-1], 1)))
            value = torch.cat([value.expand(*flag.shape[:-1], -1), flag], -1)
        for plate in over:
            dim = site.dims[plate] - 1
            shape = [*value.shape]
            shape[dim] = site.sizes[plate]
            value = torch.cat(value.expand(shape).split(1, dim), -1)
        return value

    def _pool(
        self,
        over: Iterable[str],
        names: Sequence[str],
        batch: Batch,
        drawn: Mapping[str, Tensor],
        dtype: Any,
    ) -> Tensor:
        values = [self._vector(n, batch, drawn, dtype) for n in names]
        flags = [self._flag(n, batch, drawn).to(dtype) for n in names if n in self.given]
        if flags:
            together = torch.stack(torch.broadcast_tensors(*flags), -1)
            values, present = [*values, together], together.amax(-1, keepdim=True)
        else:
            present = values[0].new_ones(1)
        dims = {self._sites[n].dims[plate] - 1 for n in names for plate in over}
        return cast(Pool, self.pools["_".join(over)])(values, present, sorted(dims))

    def _trim(self, value: Tensor) -> Tensor:
        """Drop dims of size one to the left of the plates of the target."""
        while value.dim() > self._depth + 1 and value.shape[0] == 1:
            value = value[0]
        return value

    def _flag(self, name: str, batch: Batch, drawn: Mapping[str, Tensor]) -> Tensor:
        """Where a given site is known, over its plates."""
        site = self._sites[name]
        lead = len(site.dims)
        if name in drawn:
            ones = torch.ones((len(batch),) + (1,) * (lead - 1), dtype=torch.bool)
            return self._aligned(site, ones.to(batch.device), 0)
        present = batch.present(name)
        if lead == 1:
            return self._aligned(site, present.reshape(len(batch), -1).any(1), 0)
        if present.dim() > lead:
            present = present.flatten(lead).any(-1)
        return self._aligned(site, present, 0)

    def _entries(self, name: str, batch: Batch) -> Tensor:
        """Which entries of the event of the target are known: ``(*, entries)``."""
        site = self._sites[name]
        present = batch.present(name)
        lead, event = len(site.dims), site.event_shape
        missing = lead + len(event) - present.dim()
        present = present.reshape(present.shape + (1,) * missing)
        present = present.expand(*present.shape[:lead], *event)
        rank = len(event)
        aligned = self._aligned(site, present, rank)
        return aligned.flatten(-rank) if rank else aligned.unsqueeze(-1)

    def _aligned(self, site: Site, value: Tensor, rank: int) -> Tensor:
        """``(rows, *inner plates, *event)`` with the plates where the program has them."""
        return value if site.dims == {DATA: -1} else site.to_plates(value, rank)

    def value(
        self, name: str, batch: Batch, drawn: Mapping[str, Tensor], dtype: torch.dtype
    ) -> Tensor:
        """One site's value, with its event shape (one-hot if categorical, ``(*, 1)`` if scalar).

        That of a table is its features and flags, ``(*, features + columns)``.  The plates are
        where the program has them.
        """
        site = self._sites[name]
        if name in self.drawn and name not in drawn:
            raise ValueError(f"site {name!r} is read by this proposal and has to be drawn before")
        if name in self._unconstrain:
            return self._free(name, drawn[name].to(dtype))
        if name in self.tables:
            return self._row(name, batch, drawn, dtype)
        count = _num_values(site)
        shape = torch.Size([count]) if count else site.event_shape or torch.Size([1])
        if name in drawn:
            value, present = drawn[name], None
        elif name in batch:
            value, present = batch[name], batch.present(name) if batch.partly(name) else None
        else:
            if site.own is not None:
                raise ValueError(
                    f"the program observes {name!r} itself, but the batch, from which a guide"
                    f" reads, has no {name!r}: put it there, too"
                )
            zero = torch.zeros(len(batch), *shape, dtype=dtype, device=batch.device)
            return self._aligned(site, zero, len(shape))
        if count:
            value = one_hot(value.long(), count, dtype)
        elif not site.event_shape:
            value = value.unsqueeze(-1)
        value = value.to(dtype)
        if present is not None:
            lead = present.reshape(present.shape + (1,) * (value.dim() - present.dim()))
            value = torch.where(lead, value, torch.zeros_like(value))
        return value if name in drawn else self._aligned(site, value, len(shape))

    def _free(self, name: str, value: Tensor) -> Tensor:
        """A global value on the unconstrained space."""
        value = self._unconstrain[name].inv(value)
        return value if self._rank(name) else value.unsqueeze(-1)

    def _row(
        self, name: str, batch: Batch, drawn: Mapping[str, Tensor], dtype: torch.dtype
    ) -> Tensor:
        table = cast(Features, self.tables[name])
        if name not in drawn and name not in batch:
            width = self._width(self._sites[name])
            zero = torch.zeros(len(batch), width, dtype=dtype, device=batch.device)
            return self._aligned(self._sites[name], zero, 1)
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
        features = torch.cat([table(value) * flags[..., table.owners], flags], -1)
        return features if name in drawn else self._aligned(self._sites[name], features, 1)


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
