"""Methods x guides on one data set: ``python -m pyrozoo.zoo.matrix FOLDER`` makes the whole table.

Each cell is fitted by itself, from one seed and without pretraining (:func:`.compare_method`), and
leaves ``METHOD-GUIDE.json`` in the folder; cells that are there are not made again.  One cell alone
is ``pyrozoo compare METHOD --data digits --guides GUIDE --epochs 50``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pyrozoo.inference.comparison.measuring import Effort
from pyrozoo.zoo import comparing, runs
from pyrozoo.zoo.catalogue import list_methods

GUIDES = ("default", "mean_field", "full", "student", "autoregressive", "coupling", "delta")
SHOWN = ("elbo", "iwae_1000", "khat_bad")
Cell = dict[str, Any]


def matrix(
    folder: str | Path,
    methods: Sequence[str] | None = None,
    guides: Sequence[str] = GUIDES,
    *,
    data: str = "digits",
    epochs: int = 50,
    seed: int = 0,
    effort: Effort | None = None,
    options: Mapping[str, Any] | None = None,
    root: str | None = None,
    say: Callable[[str], None] | None = None,
) -> str:
    """Make the cells that the folder lacks; the table of all of them in Markdown.

    Args:
        folder: where the cells are.
        methods: of the catalogue; default: all.
        guides: names, see :mod:`.comparing`.
        data: a named data set.
        epochs, seed: of every fit.
        effort: of the measures; default: 1000 particles, no gaps, no calibration.
        options: of the methods, in place of those of their experiments.
        root: folder of the image files.
        say: called with a line about each cell.
    """
    folder, say = Path(folder), say or (lambda line: None)
    folder.mkdir(parents=True, exist_ok=True)
    effort = effort or Effort(num_particles=1000, gap_rows=0, sbc_datasets=0)
    cells = []
    for method in methods or list_methods():
        for guide in guides:
            path = folder / f"{method}-{guide}.json"
            if not path.exists():
                spec = runs.default_spec(method, {"name": data})
                spec = runs.with_overrides(spec, fit={"epochs": epochs}, options=options or {})
                cell = {"method": method, "guide": guide, "data": data, "epochs": epochs,
                        "seed": seed, **_cell(spec, guide, seed, effort, root)}  # fmt: skip
                part = path.with_suffix(".part")
                part.write_text(json.dumps(cell, indent=1), "utf-8")
                part.replace(path)
            cells.append(json.loads(path.read_text("utf-8")))
            say(f"{method}, {guide}: {_shown(cells[-1]) or cells[-1]['reason']}")
    return markdown(cells)


def _cell(spec: runs.Spec, guide: str, seed: int, effort: Effort, root: str | None) -> Cell:
    try:
        found = comparing.compare_method(spec, [guide], seeds=[seed], effort=effort, root=root)
    except (ValueError, TypeError) as error:
        reason = str(error).removeprefix("no guide is left to compare; ")
        return {"figures": {}, "reason": reason.removeprefix(f"{guide}: ")}
    measures = found.cells[0].measures
    return {"figures": measures.figures, "reason": measures.reasons.get("elbo", "")}


def _shown(cell: Cell) -> str:
    """ELBO, and in brackets the importance weighted bound and the share of bad rows."""
    figures = cell["figures"]
    if "elbo" not in figures:
        return ""
    bounds = sorted((k for k in figures if k.startswith("iwae_") and k.count("_") == 1),
                    key=lambda k: int(k.removeprefix("iwae_")))  # fmt: skip
    extra = [f"{figures[bounds[-1]]:.1f}"] if bounds else []
    extra += [f"{100 * figures['khat_bad']:.0f} %"] if "khat_bad" in figures else []
    return f"{figures['elbo']:.1f}" + (f" ({', '.join(extra)})" if extra else "")


def markdown(cells: Sequence[Cell]) -> str:
    """The table, and below it why a cell is empty."""
    guides = list(dict.fromkeys(cell["guide"] for cell in cells))
    table = {(cell["method"], cell["guide"]): cell for cell in cells}
    notes: dict[str, int] = {}
    lines = ["| method | " + " | ".join(guides) + " |", "|---" * (len(guides) + 1) + "|"]
    for method in dict.fromkeys(cell["method"] for cell in cells):
        row = []
        for guide in guides:
            cell = table.get((method, guide))
            if cell is None or (text := _shown(cell)):
                row.append("" if cell is None else text)
            else:
                number = notes.setdefault(cell["reason"], len(notes) + 1)
                row.append(f"[{number}]")
        lines.append(f"| {method} | " + " | ".join(row) + " |")
    first = cells[0]
    lines += [
        "",
        f"Test ELBO in nats per datum (importance weighted bound, rows with k-hat above 0.7) on"
        f" {first['data']}, {first['epochs']} epochs, seed {first['seed']}.",
        *(f"[{number}] {reason}." for reason, number in notes.items()),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(matrix(sys.argv[1], say=lambda line: print(line, file=sys.stderr)))
