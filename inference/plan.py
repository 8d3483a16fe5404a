"""The plan: what happens to every site of a program under one observation pattern.

=========== =====================================================================================
role        treatment
=========== =====================================================================================
given       observed in every row
masked      a leaf known in some rows or entries: the others are marginalised, that is, left out
merged      has children and is known in part: fixed where known, summed or proposed elsewhere
summed      finite, unknown and not proposed: enumerated, one dimension
proposed    drawn by the guide
fixed       a ``Delta``: computed by the program
pruned      neither it nor anything that depends on it is observed: it drops out
own         the program itself observes it (``obs=`` or ``poutine.condition``)
free        not observed, no guide at hand (for sampling and MCMC)
=========== =====================================================================================

A site *counts* in a row if it, or something that depends on it, is observed there; elsewhere it is
masked in program and guide.  This is exact when data are missing at random.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyrozoo.inference.batch import Batch, Extent
from pyrozoo.inference.checking import check_guide, check_key
from pyrozoo.inference.graph import Graph, Site, turned_into_python


@dataclass(frozen=True)
class Plan:
    """What happens to every site under one observation pattern (see the table of the module)."""

    program: Graph
    guide: Graph | None
    roles: dict[str, str]
    observed: tuple[str, ...]  # keys of the batch that are sites
    inputs: tuple[str, ...]
    cache: dict[str, Any] = field(default_factory=dict)  # for what others derive from the plan

    @property
    def proposed(self) -> frozenset[str]:
        """Sites that the guide draws."""
        sites = self.guide.sites.values() if self.guide else ()
        return frozenset(s.name for s in sites if s.kind == "sample")

    @property
    def computed(self) -> frozenset[str]:
        """Deterministic sites of the program."""
        sites = self.program.sites.values()
        return frozenset(s.name for s in sites if s.kind == "deterministic")

    @property
    def summed(self) -> tuple[str, ...]:
        """Sites that are enumerated in the program."""
        return tuple(
            name
            for name, role in self.roles.items()
            if role == "summed" or (role == "merged" and self._sum(name))
        )

    def _sum(self, name: str) -> bool:
        return name not in self.proposed and self.program.sites[name].summable

    def deciders(self, name: str) -> tuple[str, ...] | None:
        """Keys whose presence decides in which rows a site counts; None: it counts everywhere."""
        below = self.program.descendants(name) | {name}
        for other in below:
            if self.program.sites[other].kind == "factor" or self.roles.get(other) == "own":
                return None
        return tuple(key for key in self.observed if key in below)

    def counts(self, name: str, batch: Batch) -> bool | Tensor:
        """True, False, or a mask over its plates: where it, or a descendant, is observed."""
        deciders = self.deciders(name)
        if deciders is None:
            return True
        site = self.program.sites[name]
        mask: bool | Tensor = False
        for key in deciders:
            if not batch.partly(key) or not site.local:
                return True
            mask = mask | _presence(self.program.sites[key], batch.present(key), site.dims)
        return mask

    def counts_auxiliary(self, name: str, batch: Batch) -> bool | Tensor:
        """The same for a site of the guide alone: where a site below it in the guide is drawn.

        Without any below it, the rows in which anything is observed.
        """
        assert self.guide is not None
        site = self.guide.sites[name]
        below = [n for n in self.guide.descendants(name) if n in self.roles]
        mask: bool | Tensor = False
        for other in below or self.roles:
            counts = self._drawn(other, batch) if below else self.counts(other, batch)
            outside = set(self.program.sites[other].dims) - set(site.dims)
            if outside and isinstance(counts, Tensor):
                if below:
                    raise ValueError(
                        f"the guide draws {name!r} once for all of plate {outside.pop()!r}, but"
                        f" {other!r} is not to be proposed in every row"
                    )
                counts = _any(counts, self.program.sites[other], site.dims)
            mask = counts if counts is True or mask is False else mask | counts
            if mask is True:
                break
        return mask

    def _drawn(self, name: str, batch: Batch) -> bool | Tensor:
        """Where the guide's draw of a site matters: it counts and is not known."""
        if self.roles[name] in ("given", "masked"):
            return False
        counts = self.counts(name, batch)
        site, present = self.program.sites[name], batch.present(name)
        if self.roles[name] == "merged" and present.dim() <= len(site.dims):
            counts = ~site.to_plates(present, 0) & counts
        return counts

    def describe(self, batch: Batch) -> list[str]:
        """One line a site, for people: where it is known, and what is done about it elsewhere.

        One more line if there are rows in which nothing is observed.
        """
        lines = []
        for name, site in self.program.sites.items():
            if site.kind != "sample":
                continue
            lines.append(f"{name}: {self._line(site, self.roles[name], batch)}")
        for name in self.guide.sites if self.guide else ():
            if name not in self.program.sites:
                lines.append(f"{name}: auxiliary, drawn by the guide")
        for name in self.inputs:
            if name in batch:
                missing = f", {_missing(batch.extent(name))}" if batch.partly(name) else ""
                lines.append(f"{name}: input{missing}")
        if self.guide is not None and all(self.deciders(n) is not None for n in self.roles):
            known = torch.zeros(len(batch), dtype=torch.bool, device=batch.device)
            for key in self.observed:
                known |= batch.extent(key).rows
            if empty := int((~known).sum()):
                what = f"{empty:,} of {len(batch):,} rows have nothing observed"
                lines.append(f"{what}: they count zero")
        return lines

    def _line(self, site: Site, role: str, batch: Batch) -> str:
        extent = batch.extent(site.name)
        how = "proposed by the guide"
        if site.name in self.summed:
            how = f"summed over {_size(site)} values"
        elif self.guide is not None and site.name in self.proposed:
            proposal = self.guide.sites[site.name]
            how += f", summed over {_size(proposal)} values" if proposal.summable else ""
        count, rows = int(extent.rows.sum()), len(extent.rows)
        known = f"known in {count:,} of {rows:,} rows, elsewhere {how}"
        if extent.by_entry:
            known = f"observed; {_missing(extent)}: there {how}"
        return {
            "given": "observed",
            "masked": f"observed; {_missing(extent)}: left out of the bound",
            "merged": known,
            "summed": how,
            "proposed": how,
            "pruned": "not observed, nor anything that depends on it: left out",
            "fixed": "computed by the program",
            "own": "observed by the program itself",
            "free": "drawn from its prior",
        }[role]


def _missing(extent: Extent) -> str:
    """How much is missing, of rows or of entries in how many rows, in words."""
    where = f"missing in {extent.lacking:,} of {len(extent.rows):,} rows"
    if not extent.by_entry:
        return where
    return f"{extent.missing:,} of {extent.total:,} entries {where}"


def _presence(site: Site, present: Tensor, dims: dict[str, int]) -> Tensor:
    """A mask of presence over some plates: true where any entry below them is present."""
    lead = len(site.dims)
    if present.dim() > lead:
        present = present.reshape(*present.shape[:lead], -1).any(-1)
    return _any(site.to_plates(present, 0), site, dims)


def _any(mask: Tensor, site: Site, dims: dict[str, int]) -> Tensor:
    """Reduce a mask over the plates of a site to those of another."""
    for plate, dim in site.dims.items():
        if plate not in dims and -dim <= mask.dim():
            mask = mask.any(dim, keepdim=True)
    return mask


def make_plan(
    graph: Graph,
    guide: Graph | None,
    batch: Batch,
    inputs: tuple[str, ...],
    replace: tuple[str, ...],
) -> Plan:
    """Decide the role of every site (see the table of the module)."""
    for key in batch.names:
        check_key(key, graph, inputs, batch, replace)
    observed = tuple(key for key in batch.names if key in graph.sites)
    roles: dict[str, str] = {}
    plan = Plan(graph, guide, roles, observed, inputs)
    for name, site in graph.sites.items():  # those that the program observes decide what counts
        if site.kind == "sample" and site.own is not None and name not in observed:
            roles[name] = "own"
    if guide is not None:
        check_guide(graph, guide, roles, batch)
    for name, site in graph.sites.items():
        if site.kind != "sample" or name in roles:
            continue
        leaf = not graph.descendants(name)
        if leaf and name in graph.turned and name not in observed:
            raise ValueError(turned_into_python(name, graph.turned[name]))
        if name in observed:
            roles[name] = "given" if not batch.partly(name) else "masked" if leaf else "merged"
        elif guide is not None and plan.deciders(name) == ():
            roles[name] = "pruned"
        elif name in plan.proposed:
            roles[name] = "proposed"
        elif site.fixed:
            roles[name] = "fixed"
        elif site.summable:
            roles[name] = "summed"
        else:
            roles[name] = "free"
        unknown = roles[name] == "free" or (roles[name] == "merged" and not site.summable)
        if guide is not None and unknown and name not in plan.proposed:
            proposed = ", ".join(guide.sites) or "nothing"
            raise ValueError(
                f"site {name!r} ({type(site.fn).__name__}) is not observed everywhere, cannot be"
                f" summed and is not proposed by the guide (which proposes: {proposed}); the guide"
                f" draws it with pyro.sample({name!r}, ...)"
            )
        if roles[name] == "merged" and batch.present(name).dim() > len(site.dims) and site.summable:
            raise ValueError(f"site {name!r}: single entries of a summed site cannot be missing")
    for name in plan.summed:
        _size(graph.sites[name])
    return plan


def _size(site: Site) -> int:
    """Over how many values a finite site is summed."""
    try:
        return len(site.fn.enumerate_support(expand=False))
    except NotImplementedError as error:
        raise ValueError(
            f"site {site.name!r} ({type(site.fn).__name__}) is not observed everywhere, and cannot"
            f" be summed as its rows have different numbers of values ({error}); write it as a"
            " Categorical over the largest number, with log-probability -inf where there are fewer"
        ) from error
