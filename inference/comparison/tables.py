"""The measures of a comparison as a table: for the terminal, for LaTeX, as CSV."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from html import escape as _html
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

#: figure -> heading; figures that start like ``iwae_`` and ``active_`` come by their own names
COLUMNS = {
    "elbo": "ELBO",
    "log_evidence": "evidence",
    "gap": "gap",
    "approximation_gap": "gap: family",
    "amortisation_gap": "gap: network",
    "khat_bad": "k-hat > 0.7",
    "sbc_p": "SBC p",
    "coverage_90": "90 % covers",
    "c2st": "C2ST",
    "mmd2": "MMD²",
    "ms_per_step": "ms a step",
    "seconds_to_target": "s to target",
    "parameters": "parameters",
}


def headings(records: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The columns that some record has, in order: figure -> heading."""
    present = {key for record in records for key in record}
    found: dict[str, str] = {}
    for key, heading in COLUMNS.items():
        if key in present:
            found[key] = heading
        if key == "elbo" and (bounds := _bounds(present)):
            found[bounds[-1]] = f"IWAE {bounds[-1].removeprefix('iwae_')}"
        if key == "mmd2":
            found |= {k: f"active {k.removeprefix('active_')}" for k in sorted(present)
                      if k.startswith("active_") and not k.endswith("_sd")}  # fmt: skip
    return found


def _bounds(present: Iterable[str]) -> list[str]:
    """The importance weighted bounds of more than one draw, by the number of draws."""
    names = [k for k in present if k.startswith("iwae_") and k.count("_") == 1 and k != "iwae_1"]
    return sorted(names, key=lambda k: int(k.removeprefix("iwae_")))


def number(key: str, value: Any) -> str:
    """A figure as people write it."""
    if key == "parameters":
        return f"{value:,.0f}"
    if key.startswith("active_"):
        return f"{value:.3g}"
    if key in ("khat_bad", "coverage_90"):
        return f"{100 * value:.0f} %"
    if key == "sbc_p":
        return "< 0.001" if value < 1e-3 else f"{value:.3f}"
    if key == "mmd2":
        return f"{value:.4f}"
    if key in ("ms_per_step", "seconds_to_target"):
        return f"{value:.1f}"
    return f"{value:.3f}"


def cell(record: Mapping[str, Any], key: str) -> str:
    """A figure with its standard deviation over seeds, or its standard error over rows."""
    if key not in record:
        return ""
    text = number(key, record[key])
    spread = record.get(f"{key}_sd", record.get(f"{key}_se"))
    if spread is None or key in ("parameters", "sbc_p"):
        return text
    return f"{text} ± {number(key, spread)}"


def label(record: Mapping[str, Any]) -> str:
    """The guide, and the objective where it is not the evidence bound."""
    return record["guide"] + ("" if record["objective"] == "ELBO" else f", {record['objective']}")


def rich_table(title: str, records: Sequence[Mapping[str, Any]]) -> Table:
    """For the terminal: a line for each measure, a column for each guide that was measured."""
    shown = [r for r in records if not r["reason"]]
    table = Table(title=escape(title), box=None)
    table.add_column("", no_wrap=True)
    for record in shown:
        table.add_column(escape(label(record)), justify="right")
    for key, heading in headings(records).items():
        table.add_row(escape(heading), *(escape(cell(record, key)) for record in shown))
    return table


def html(title: str, records: Sequence[Mapping[str, Any]]) -> str:
    """The same for a notebook."""
    shown = [r for r in records if not r["reason"]]
    lines = [("", *(label(record) for record in shown))]
    lines += [(h, *(cell(r, key) for r in shown)) for key, h in headings(records).items()]
    body = "".join(
        "<tr><th style='text-align:left'>" + _html(first) + "</th>"
        + "".join(f"<td style='text-align:right'>{_html(text)}</td>" for text in rest) + "</tr>"
        for first, *rest in lines
    )  # fmt: skip
    return f"<table><caption>{_html(title)}</caption>{body}</table>"


def latex(records: Sequence[Mapping[str, Any]]) -> str:
    """A ``tabular``; guides that do not apply are left out."""
    columns = headings(records)
    lines = [rf"\begin{{tabular}}{{l{'r' * len(columns)}}}", r"\hline"]
    lines.append(" & ".join(["guide", *map(_tex, columns.values())]) + r" \\ \hline")
    for record in records:
        if not record["reason"]:
            values = [_tex(cell(record, key)) for key in columns]
            lines.append(" & ".join([_tex(label(record)), *values]) + r" \\")
    return "\n".join([*lines, r"\hline", r"\end{tabular}", ""])


_TEX = str.maketrans({
    "\\": r"\textbackslash{}", "±": r"$\pm$", "²": "$^2$", "<": "$<$", ">": "$>$", "|": "$|$",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    **{sign: "\\" + sign for sign in "%_&#${}"},
})  # fmt: skip


def _tex(text: str) -> str:
    return text.translate(_TEX)


def write_csv(path: str | Path, cells: Iterable[Any]) -> None:
    """One line for each guide, objective and seed, all figures."""
    rows = [
        {"guide": c.guide, "objective": c.objective, "seed": c.seed, "reason": c.reason,
         **c.measures.figures}
        for c in cells
    ]  # fmt: skip
    names = list(dict.fromkeys(key for row in rows for key in row))
    with Path(path).open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
