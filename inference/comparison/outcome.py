"""What a comparison found: cells of guide, objective and seed; their table, notes and files."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pyrozoo.inference.batch import Data
from pyrozoo.inference.comparison import tables
from pyrozoo.inference.comparison.measures import Measures
from pyrozoo.inference.training.result import Result


@dataclass
class Cell:
    """One guide, fitted by one objective from one seed.

    ``reason`` says why there is no result, or no measure of it; ``late``, that training did not
    reach the target bound.
    """

    guide: str
    objective: str
    seed: int
    result: Result | None = None
    measures: Measures = field(default_factory=Measures)
    reason: str = ""
    late: bool = False

    @property
    def name(self) -> str:
        """The guide, and the objective where it is another than the evidence bound."""
        return self.guide if self.objective == "ELBO" else f"{self.guide}, {self.objective}"


@dataclass
class Comparison:
    """What :func:`compare` returns.

    Attributes:
        title: of the program.
        cells: one for each guide, objective and seed.
        rows: how many were measured.
        target: the bound that ``seconds_to_target`` waits for, nats per datum.
    """

    title: str
    cells: list[Cell]
    rows: int
    target: float = math.nan

    @property
    def joint(self) -> bool:
        """Whether bounds and k-hat are those of all rows together."""
        return any(cell.measures.joint for cell in self.cells)

    @property
    def names(self) -> list[str]:
        """One for each guide and objective."""
        return list(dict.fromkeys(cell.name for cell in self.cells))

    def records(self) -> list[dict[str, Any]]:
        """One dictionary for each guide and objective: means over seeds, ``<figure>_sd``.

        A figure that some seeds lack is left out.
        """
        found = []
        for name in self.names:
            cells = [c for c in self.cells if c.name == name]
            record: dict[str, Any] = {
                "guide": cells[0].guide, "objective": cells[0].objective, "seeds": len(cells),
                "reason": next((c.reason for c in cells if c.reason), ""),
            }  # fmt: skip
            for key in dict.fromkeys(k for c in cells for k in c.measures.figures):
                values = [c.measures.figures[key] for c in cells if key in c.measures.figures]
                if len(values) < len(cells):
                    continue
                record[key] = statistics.fmean(values)
                if len(values) > 1:
                    record[f"{key}_sd"] = statistics.stdev(values)
            found.append(record)
        return found

    def notes(self) -> list[str]:
        """What has to be said of the figures: what is joint, what does not apply and why."""
        notes = []
        for why in dict.fromkeys(c.measures.joint for c in self.cells if c.measures.joint):
            names = list(dict.fromkeys(c.name for c in self.cells if c.measures.joint == why))
            who = "" if len(names) == len(self.names) else f" of {', '.join(names)}"
            notes.append(
                f"{why[0].upper()}{why[1:]}: bounds and k-hat{who} are those of all {self.rows}"
                " rows together, the bounds divided by the rows."
            )
        some = sorted({c.measures.refined[0] for c in self.cells if c.measures.refined})
        if some and some[0] < self.rows:
            notes.append(
                f"The parts of the gap are those of the first {some[0]} of {self.rows} rows, so"
                " that they do not add up to the gap of all."
            )
        for name in self.names:
            cells = [c for c in self.cells if c.name == name]
            for reason in dict.fromkeys(c.reason for c in cells if c.reason):
                seeds = [str(c.seed) for c in cells if c.reason == reason]
                which = "" if len(seeds) == len(cells) else f", seed {', '.join(seeds)}"
                notes.append(f"{name}{which}: {reason}.")
            late = [c for c in cells if c.late]
            if late and not math.isnan(self.target):
                notes.append(
                    f"{name}: {len(late)} of {len(cells)} fits did not reach the target bound of"
                    f" {self.target:.3f} nats per datum."
                )
        lacking: dict[tuple[str, str], list[str]] = {}
        for cell in self.cells:
            for key, reason in cell.measures.reasons.items():
                names = lacking.setdefault((key, reason), [])
                if cell.name not in names:
                    names.append(cell.name)
        grouped: dict[tuple[str, tuple[str, ...]], list[str]] = {}
        for (key, reason), names in lacking.items():
            heading = "parts of the gap" if key == "approximation_gap" else tables.COLUMNS[key]
            grouped.setdefault((reason, tuple(names)), []).append(heading)
        for (reason, lacked), headings in grouped.items():
            guides = "all guides" if len(lacked) == len(self.names) else ", ".join(lacked)
            notes.append(f"No {', '.join(headings)} for {guides}: {reason}.")
        return notes

    def table(self) -> Any:
        """The measures as a table for the terminal (:class:`rich.table.Table`)."""
        return tables.rich_table(self.title, self.records())

    def _repr_html_(self) -> str:
        return tables.html(self.title, self.records())

    def to_latex(self) -> str:
        """The same as a LaTeX tabular."""
        return tables.latex(self.records())

    def write_csv(self, path: str | Path) -> None:
        """All figures, one line for each guide, objective and seed."""
        tables.write_csv(path, self.cells)

    def write(self, path: str | Path) -> None:
        """A self-contained page, ``compare.html``: table, plots, and how to read them."""
        from pyrozoo.inference.comparison.page import write

        write(path, self)

    def to_arviz(self, data: Data, num_draws: int = 500, seed: int = 0) -> dict[str, Any]:
        """An ArviZ object for each guide and objective (first seed), for ``az.compare``."""
        from pyrozoo.inference.arviz_export import to_arviz

        return {
            cell.name: to_arviz(
                cell.result.program,
                cell.result.guide,
                data,
                num_draws,
                inputs=cell.result.inputs,
                seed=seed,
            )
            for cell in self.cells
            if cell.result is not None and cell.seed == self.cells[0].seed
        }
