"""The inverse of a program: what each latent site has to read so that nothing is lost.

A program is a directed graph.  Its inverse is found on the undirected one in which sites with a
common child are joined too ("moralised")::

    remove barren sites                     nothing below them is known
    look through Delta sites                their children depend on their parents
    eliminate summed and hidden sites       what they touch is joined
    join what touches a given site that may be missing
    eliminate the proposed sites one by one: what v touches then is what v reads, and is joined

The guide draws in the reverse of the elimination order.  Every independence that the inverse claims
holds in the posterior, so that the true posterior is one of the distributions that it can express.

The order is greedy, fewest new links first, among those that go from the top of the program to the
bottom or from the bottom to the top; of the two the one with fewer reads.  Sites of inner plates
are eliminated before those of outer plates, and globals last: one draw of an outer site serves all
entries.  Where an elimination joins different entries of a plate (``across``), no factorisation
with one network for all entries is exact; the site then reads the other entries pooled.

Source: Webb, Golinski, Zinkov, Siddharth, Rainforth, Teh and Wood, "Faithful inversion of
generative models for effective amortized inference" (2018).
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

from pyrozoo.inference.graph import DATA, Graph

STRUCTURES = ("inverse", "independent", "topological")
NOWHERE: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Read:
    """Why one site reads another, and the plates over whose entries it reads all of them."""

    why: str
    across: frozenset[str] = NOWHERE


@dataclass(frozen=True)
class Factorisation:
    """Which sites a guide draws, in which order, and what each of them reads.

    ``order`` is that of the draws; ``reads`` maps each site to what it reads, given sites first;
    ``notes`` says of other sites what becomes of them.
    """

    order: tuple[str, ...]
    reads: dict[str, dict[str, Read]]
    notes: dict[str, str] = field(default_factory=dict)

    @property
    def parents(self) -> dict[str, tuple[str, ...]]:
        """What each site reads."""
        return {name: tuple(self.reads[name]) for name in self.order}

    def without(self, names: Collection[str], note: str) -> Factorisation:
        """The same, but nobody reads these sites; ``note`` says why."""
        dropped = [n for n in names if any(n in reads for reads in self.reads.values())]
        reads = {
            name: {n: read for n, read in found.items() if n not in names}
            for name, found in self.reads.items()
        }
        notes = self.notes | {n: f"{self.notes.get(n, 'drawn')}; {note}" for n in dropped}
        return Factorisation(self.order, reads, notes)

    def __str__(self) -> str:
        factors = [
            f"q({name} | {', '.join(reads)})" if (reads := self.parents[name]) else f"q({name})"
            for name in self.order
        ]
        lines = [" ".join(factors) or "nothing is proposed"]
        for name in self.order:
            found = [f"{other} ({_reason(read)})" for other, read in self.reads[name].items()]
            lines.append(f"{name}: reads {', '.join(found) if found else 'nothing'}")
        return "\n".join([*lines, *(f"{name}: {note}" for name, note in self.notes.items())])


def _reason(read: Read) -> str:
    if not read.across:
        return read.why
    return f"{read.why}; all entries of plate {', '.join(sorted(read.across))}"


def invert(
    graph: Graph,
    given: Sequence[str],
    proposed: Collection[str],
    structure: str = "inverse",
) -> Factorisation:
    """The factorisation of a guide.

    Args:
        graph: of the unobserved program.
        given: sites that can be read, whether they are known in this data set or not.
        proposed: latent sites that the guide draws; one that is given too reads itself where it is
            known, and is drawn before all others.
        structure: ``"inverse"``; ``"independent"``, each local site reads what is given; or
            ``"topological"``, the program's order, each site reads what is given and the proposed
            sites above it.

    Raises:
        ValueError: there is no such structure.
    """
    if structure not in STRUCTURES:
        raise ValueError(f"structure is one of {', '.join(STRUCTURES)}, got {structure!r}")
    work = _Work(graph, tuple(given), frozenset(proposed))
    if structure != "inverse":
        return work.forward(above=structure == "topological")
    found = [work.inverse(top_down) for top_down in (True, False)]
    return min(found, key=lambda f: sum(map(len, f.reads.values())))


class _Links:
    """An undirected graph whose links know why they are there."""

    def __init__(self, graph: Graph, fixed: Collection[str]) -> None:
        self.graph, self.fixed = graph, fixed  # links between fixed sites serve nobody
        self.links: dict[str, dict[str, Read]] = {}

    def plates(self, name: str) -> frozenset[str]:
        return frozenset(self.graph.sites[name].dims)

    def join(self, a: str, b: str, why: str, across: frozenset[str] = NOWHERE) -> None:
        if a == b and not across:
            return
        for one, other in ((a, b), (b, a)):
            old = self.links.setdefault(one, {}).get(other, Read(why))
            self.links[one][other] = Read(old.why, old.across | across)

    def pairs(self, names: Sequence[str]) -> Iterator[tuple[str, str]]:
        for a, b in itertools.combinations_with_replacement(names, 2):
            if a not in self.fixed or b not in self.fixed:
                yield a, b

    def marry(self, names: Sequence[str], middle: str, why: str) -> None:
        """Join sites that touch ``middle``; entries that share one entry of it are joined too."""
        for a, b in self.pairs(names):
            across = (self.plates(a) & self.plates(b)) - self.plates(middle) - {DATA}
            for other in (a, b):
                if (link := self.links.get(middle, {}).get(other)) is not None:
                    across |= link.across & self.plates(a) & self.plates(b)
            self.join(a, b, why, across)

    def near(self, name: str) -> list[str]:
        return [n for n in self.links.get(name, {}) if n != name]

    def fill(self, name: str) -> int:
        """The number of links that an elimination would add."""
        return sum(a != b and b not in self.links[a] for a, b in self.pairs(self.near(name)))

    def eliminate(self, name: str, why: str) -> dict[str, Read]:
        self.marry(self.near(name), name, why)
        found = self.links.pop(name, {})
        for other in found:
            if other != name:
                del self.links[other][name]
        return found


class _Work:
    """One program, what is given, and what is proposed."""

    def __init__(self, graph: Graph, given: tuple[str, ...], proposed: frozenset[str]) -> None:
        self.graph, self.given, self.proposed = graph, given, proposed
        self.rank = {name: i for i, name in enumerate(graph.sites)}
        self.above = {
            name: frozenset(o for o in graph.sites if name in graph.descendants(o))
            for name in proposed
        }
        self.inputs = [g for g in given if graph.sites[g].infer.get("_input")]
        self.maybe = [
            g for g in given if g not in {*proposed, *self.inputs} and self._sites_below(g)
        ]

    def _sites_below(self, name: str) -> bool:
        kinds = {self.graph.sites[n].kind for n in self.graph.descendants(name)}
        return bool(kinds - {"deterministic"})

    def parents(self, name: str) -> list[str]:
        """What a site depends on; a ``Delta`` that is not given is looked through."""
        found: dict[str, None] = {}
        for other in sorted(self.graph.sites[name].parents, key=self.rank.__getitem__):
            looked = self.graph.sites[other].fixed and other not in {*self.given, *self.proposed}
            found |= dict.fromkeys(self.parents(other) if looked else [other])
        return list(found)

    def anchors(self) -> list[str]:
        """Sites that tell something of what is above them."""
        return [
            name
            for name, site in self.graph.sites.items()
            if site.kind == "factor" or name in self.given or name in self.proposed
            or (site.kind == "sample" and site.own is not None)
        ]  # fmt: skip

    def moral(self) -> tuple[_Links, list[str]]:
        """The moralised graph of what is not barren, and those of its sites that are hidden."""
        anchors = self.anchors()
        kept = set(anchors)
        for name in reversed(list(self.graph.sites)):
            if name in kept and self.graph.sites[name].kind != "deterministic":
                kept.update(self.parents(name))
        silent = {n for n in anchors if n not in self.given and n not in self.proposed}
        silent |= {
            n for n in kept if not self.graph.sites[n].local and n not in self.proposed
        }  # another part of the guide draws it: known, but not read
        certain = set(self.given) - set(self.maybe) - self.proposed
        links = _Links(self.graph, certain)
        for name in self.graph.sites:
            if name not in kept:
                continue
            parents = [n for n in self.parents(name) if n not in silent]
            links.marry(parents, name, f"both are above {name}")
            for other in parents if name not in silent else ():
                links.join(other, name, f"{name} depends on {other}")
        hidden = [
            n for n in self.graph.sites
            if n in kept and n not in silent and n not in self.given and n not in self.proposed
        ]  # fmt: skip
        return links, hidden

    def inverse(self, top_down: bool) -> Factorisation:
        links, hidden = self.moral()
        notes = {}
        for name in hidden:
            summed = self.graph.sites[name].summable
            touched = links.near(name)
            links.eliminate(name, f"joined as {name} is {'summed' if summed else 'hidden'}")
            notes[name] = "summed" if summed else "neither given nor proposed here"
            notes[name] += f"; joins {', '.join(touched)}" if len(touched) > 1 else ""
        for name in self.maybe:
            links.marry(links.near(name), name, f"joined as {name} may be missing")
        reads: dict[str, dict[str, Read]] = {}
        while left := [n for n in self.graph.sites if n in self.proposed and n not in reads]:
            name = self._next(links, left, top_down)
            found = links.eliminate(name, f"joined as {name} is drawn later")
            reads[name] = self._ordered(name, found)
        return self._result(reads, tuple(reversed(reads)), notes)

    def _next(self, links: _Links, left: list[str], top_down: bool) -> str:
        first = min(map(self._level, left))
        level = [n for n in left if self._level(n) == first]
        over = {n: self.above[n] & set(level) for n in level}
        under = {n: {o for o in level if n in self.above[o]} for n in level}
        ready = [n for n in level if not (over if top_down else under)[n]]
        return min(ready, key=lambda n: (links.fill(n) if links.near(n) else 0, self.rank[n]))

    def _level(self, name: str) -> tuple[bool, bool, int]:
        site = self.graph.sites[name]
        return not site.local, name in self.given, -len(site.dims)

    def _ordered(self, name: str, found: dict[str, Read]) -> dict[str, Read]:
        itself = [name] if name in self.given else []
        order = [*(g for g in self.given if g in found or g in itself)]
        order += [n for n in found if n not in self.given and n != name]
        reads = {n: found.get(n, Read("where it is known")) for n in order}
        if (loop := found.get(name)) is not None and self.graph.sites[name].local:
            for other in [n for n in order if loop.across & set(self.graph.sites[n].dims)]:
                read = reads[other]  # what the other entries say comes through what they read
                reads[other] = Read(read.why, read.across | loop.across)
        return reads

    def forward(self, above: bool) -> Factorisation:
        order = tuple(n for n in self.graph.sites if n in self.proposed)
        reads = {}
        for name in order:
            local = self.graph.sites[name].local
            reads[name] = {g: Read("given") for g in self.given if local}
            if above:
                upper = [n for n in order if n in self.above[name] and n not in self.given]
                reads[name] |= {n: Read(f"above {name}") for n in upper}
        order = tuple(sorted(order, key=lambda n: self.graph.sites[n].local))
        return self._result(reads, order, {})

    def _result(
        self, reads: dict[str, dict[str, Read]], order: tuple[str, ...], notes: dict[str, str]
    ) -> Factorisation:
        done: dict[str, dict[str, Read]] = {}
        for name in order:
            found = {n: r for n, r in reads[name].items() if n in self.given or n in done}
            if not self.graph.sites[name].local:
                found = {n: r for n, r in found.items() if not self.graph.sites[n].local}
                notes[name] = "global: parameters in place of a network, the data are not read"
            else:
                found = found or {g: Read("given") for g in self.given}
                found |= {g: Read("an input of the program") for g in self.inputs}
            found = {n: found[n] for n in dict.fromkeys([*self.given, *found]) if n in found}
            done[name] = {n: self._spread(name, n, read) for n, read in found.items()}
        return Factorisation(order, done, notes)

    def _spread(self, name: str, other: str, read: Read) -> Read:
        """The read, with the plates over which one entry of ``name`` reads many."""
        mine, its = set(self.graph.sites[name].dims), set(self.graph.sites[other].dims)
        return Read(read.why, frozenset(((its - mine) | (read.across & its)) - {DATA}))
