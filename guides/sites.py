"""The sites of a program, as a guide looks them up."""

from __future__ import annotations

import difflib
from typing import Any

from pyrozoo.inference import Batch
from pyrozoo.inference.graph import DATA, Graph, Site, read_graph


def graph_of(program: Any, example: Any = None) -> Graph:
    """The graph of a program, from a run on two rows of ``example`` (default: two empty rows)."""
    batch = Batch.of(2 if example is None else example)
    return read_graph(program, batch[:2])


def local_site(graph: Graph, name: str) -> Site:
    """A site of the program that lies in the data plate and in no other.

    Raises:
        ValueError: there is no such site, or it lies elsewhere.
    """
    site = row_site(graph, name)
    if set(site.dims) != {DATA}:
        raise ValueError(
            f"site {name!r} is expected in plate 'data' and no other, but its plates are:"
            f" {', '.join(site.dims)}"
        )
    return site


def row_site(graph: Graph, name: str) -> Site:
    """A site of the program that lies in the data plate, and perhaps in others.

    Raises:
        ValueError: there is no such site, or it lies elsewhere.
    """
    site = graph.sites.get(name)
    if site is None or site.kind != "sample":
        names = [s.name for s in graph.sites.values() if s.kind == "sample"]
        near = difflib.get_close_matches(name, names, 1)
        hint = f". Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{name!r} is not a site of the program (sites: {', '.join(names)}){hint}")
    if not site.local:
        plates = ", ".join(site.dims) or "none"
        raise ValueError(f"site {name!r} is expected in plate 'data', but its plates are: {plates}")
    return site
