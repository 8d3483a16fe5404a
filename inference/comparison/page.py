"""The page of a comparison, ``compare.html``: the table, the plots, and how to read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyrozoo.inference.comparison import pictures, tables
from pyrozoo.inference.reports.cards import Card
from pyrozoo.inference.reports.report import render, wide

if TYPE_CHECKING:
    from pyrozoo.inference.comparison.outcome import Comparison

HIGHER = ("elbo",)
LOWER = ("gap", "approximation_gap", "khat_bad", "mmd2", "ms_per_step")
COSTS = ("ms_per_step", "seconds_to_target", "parameters")


def write(path: str | Path, found: Comparison) -> None:
    """Write the page of a comparison; it needs no other file."""
    records = found.records()
    cells = {c.name: c for c in reversed(found.cells) if c.result is not None}  # the first seed's
    cells = {name: cells[name] for name in found.names if name in cells}
    cards = [
        Card(kind, title, figure) for kind, title, figure in pictures.all_of(cells, found.target)
    ]
    shown = [r for r in records if not r["reason"]]
    columns = tables.headings(shown)
    evidence = {r["log_evidence"] for r in shown if "log_evidence" in r}
    costs = {k: h for k, h in columns.items() if k in COSTS or k.startswith("active_")}
    hidden = {*costs, *(["log_evidence"] if len(evidence) == 1 else [])}
    factorisations: dict[str, list[str]] = {}  # text -> guides that have it
    for name, cell in cells.items():
        text = getattr(cell.result.guide, "factorisation", None) if cell.result else None
        if text is not None:
            factorisations.setdefault(str(text), []).append(name)
    page = render(
        "comparison.html",
        found=found,
        records=records,
        columns=columns,
        parts=[{k: h for k, h in columns.items() if k not in hidden}, *([costs] if costs else [])],
        evidence=evidence.pop() if len(evidence) == 1 else None,
        seeds=max(r["seeds"] for r in records),
        notes=found.notes(),
        cards=cards,
        wide=wide(cards),
        best=_best(shown, columns),
        cell=tables.cell,
        label=tables.label,
        factorisations=factorisations,
        counts={
            "guide": len({c.guide for c in found.cells}),
            "objective": len({c.objective for c in found.cells}),
        },
    )
    Path(path).write_text(page, "utf-8")


def _best(records: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> dict[str, str]:
    """Column -> the guide that is best there, where it is clear what is better."""
    found = {}
    for key in columns:
        values = {tables.label(r): r[key] for r in records if key in r}
        if len(values) < 2 or not (key in HIGHER or key in LOWER or key.startswith("iwae_")):
            continue
        pick = min if key in LOWER else max
        found[key] = pick(values, key=lambda name: values[name])
    return found
