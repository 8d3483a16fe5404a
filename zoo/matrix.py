"""Tables of many guides: methods x guides on one data set, and the ladder of truth x guides.

``python -m pyrozoo.zoo.matrix FOLDER [--truth]`` makes a whole table.  Each cell is fitted by
itself, from one seed, methods without pretraining (:func:`.compare_method`), and leaves
``ROW-GUIDE.json`` in the folder; cells that are there are not made again.  One cell alone is
``pyrozoo compare METHOD --data digits --guides GUIDE --epochs 50``, or ``pyrozoo compare --truth
--rung RUNG --guides GUIDE``.

The tables of the README are made of the cells in ``zoo/experiments/guides``, by
``python -m pyrozoo.zoo.matrix --readme README.md``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pyrozoo.inference.comparison.measuring import Effort
from pyrozoo.inference.comparison.outcome import Comparison
from pyrozoo.zoo import comparing, runs
from pyrozoo.zoo.catalogue import list_methods
from pyrozoo.zoo.truth import RUNGS

GUIDES = ("default", "mean_field", "full", "coupling")
LADDER_GUIDES = ("mean_field", "full", "coupling")
OPTIONS = {"hivae": {"columns": {"x": "bernoulli"}}}  # pixels are no mixed table
STORE = Path(__file__).parent / "experiments" / "guides"
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
) -> list[Cell]:
    """Make the cells of methods that the folder lacks; all of them, see :func:`markdown`.

    Args:
        folder: where the cells are.
        methods: of the catalogue; default: all.
        guides: names, see :mod:`.comparing`.
        data: a named data set.
        epochs, seed: of every fit.
        effort: of the measures; default: 1000 particles, no gaps, no calibration.
        options: of the methods, in place of :data:`OPTIONS` and those of their experiments.
        root: folder of the image files.
        say: called with a line about each cell.
    """
    effort = effort or Effort(num_particles=1000, gap_rows=0, sbc_datasets=0)

    def compare(method: str, guide: str) -> Comparison:
        spec = runs.default_spec(method, {"name": data})
        chosen = {**OPTIONS.get(method, {}), **(options or {})}
        spec = runs.with_overrides(spec, fit={"epochs": epochs}, options=chosen)
        return comparing.compare_method(spec, [guide], seeds=[seed], effort=effort, root=root)

    facts = {"table": "matrix", "data": data, "epochs": epochs, "seed": seed}
    return _fill(Path(folder), methods or list_methods(), guides, compare, facts, say)


def ladder(
    folder: str | Path,
    rungs: Sequence[str] | None = None,
    guides: Sequence[str] = LADDER_GUIDES,
    *,
    epochs: int | None = None,
    effort: Effort | None = None,
    say: Callable[[str], None] | None = None,
) -> list[Cell]:
    """The same for programs whose posterior is known, see :mod:`.truth`.

    Args:
        folder: where the cells are.
        rungs: of the ladder; default: all.
        guides: names, see :mod:`.comparing`.
        epochs: of every fit; default: those of the rung.
        effort: of the measures; default: as :func:`.compare`, but no gaps of single rows and no
            calibration.
        say: called with a line about each cell.
    """
    effort = effort or Effort(gap_rows=0, sbc_datasets=0)

    def compare(rung: str, guide: str) -> Comparison:
        return comparing.compare_rung(rung, [guide], epochs=epochs, effort=effort)

    facts = {"table": "ladder", "seed": 0}
    return _fill(Path(folder), rungs or list(RUNGS), guides, compare, facts, say)


def _fill(
    folder: Path,
    rows: Sequence[str],
    guides: Sequence[str],
    compare: Callable[[str, str], Comparison],
    facts: Mapping[str, Any],
    say: Callable[[str], None] | None,
) -> list[Cell]:
    folder.mkdir(parents=True, exist_ok=True)
    cells = []
    for row in rows:
        for guide in guides:
            path = folder / f"{row}-{guide}.json"
            if not path.exists():
                cell = {**facts, "row": row, "guide": guide, **_cell(compare, row, guide)}
                part = path.with_suffix(".part")
                part.write_text(json.dumps(cell, indent=1), "utf-8")
                part.replace(path)
            cells.append(json.loads(path.read_text("utf-8")))
            if say is not None:
                say(f"{row}, {guide}: {_shown(cells[-1]) or cells[-1]['reason']}")
    return cells


def _cell(compare: Callable[[str, str], Comparison], row: str, guide: str) -> Cell:
    try:
        found = compare(row, guide).cells[0]
    except (ValueError, TypeError) as error:
        reason = str(error).removeprefix("no guide is left to compare; ")
        return {"figures": {}, "reason": reason.removeprefix(f"{guide}: ")}
    figures, reasons = found.measures.figures, found.measures.reasons
    return {"figures": figures, "reason": found.reason or reasons.get("elbo", "")}


def _shown(cell: Cell) -> str:
    figures = cell["figures"]
    return _rung(figures) if cell["table"] == "ladder" else _bound(figures)


def _bound(figures: Mapping[str, float]) -> str:
    """ELBO, and in brackets the importance weighted bound and the share of bad rows."""
    if "elbo" not in figures:
        return ""
    bounds = sorted((k for k in figures if k.startswith("iwae_") and k.count("_") == 1),
                    key=lambda k: int(k.removeprefix("iwae_")))  # fmt: skip
    extra = [f"{figures[bounds[-1]]:.1f}"] if bounds else []
    extra += [f"{100 * figures['khat_bad']:.0f} %"] if "khat_bad" in figures else []
    return f"{figures['elbo']:.1f}" + (f" ({', '.join(extra)})" if extra else "")


def _rung(figures: Mapping[str, float]) -> str:
    """The gap, where the evidence is known, and the accuracy of telling draws from true ones."""
    gap = [f"{abs(figures['gap']):.4f}"] if "gap" in figures else []
    return " / ".join(gap + ([f"{figures['c2st']:.2f}"] if "c2st" in figures else []))


NOTES = {
    "matrix": "Test ELBO in nats per datum (importance weighted bound of 1,000 draws, rows with"
    " k-hat above 0.7) on {data}, {epochs} epochs, seed {seed}.",
    "ladder": "Log-evidence (known on the first five, else the tightest bound at hand) less ELBO,"
    " in nats per datum / accuracy of a classifier between draws of the guide and of the posterior"
    " (0.5 is right), seed {seed}.",
}


def markdown(cells: Sequence[Cell]) -> str:
    """The table of cells, below it what they show, and why some are empty."""
    guides = list(dict.fromkeys(cell["guide"] for cell in cells))
    table = {(cell["row"], cell["guide"]): cell for cell in cells}
    notes: dict[str, int] = {}
    first = "method" if cells[0]["table"] == "matrix" else "program"
    lines = [f"| {first} | " + " | ".join(guides) + " |", "|---" * (len(guides) + 1) + "|"]
    for name in dict.fromkeys(cell["row"] for cell in cells):
        row = []
        for guide in guides:
            cell = table.get((name, guide))
            if cell is None or (text := _shown(cell)):
                row.append("" if cell is None else text)
            else:
                number = notes.setdefault(cell["reason"], len(notes) + 1)
                row.append(f"[{number}]")
        lines.append(f"| {name} | " + " | ".join(row) + " |")
    what = " ".join(f"[{number}] {reason}." for reason, number in notes.items())
    return "\n".join([*lines, "", f"{NOTES[cells[0]['table']].format(**cells[0])} {what}".strip()])


def stored(name: str) -> list[Cell]:
    """The cells of ``"matrix"`` or ``"ladder"`` that lie in the package."""
    cells: list[Cell] = json.loads((STORE / f"{name}.json").read_text("utf-8"))
    return cells


def write_readme(path: Path) -> None:
    """Put the stored tables between their markers in a README."""
    text = path.read_text("utf-8")
    for name in ("ladder", "matrix"):
        start, end = f"<!-- {name} -->\n", f"\n<!-- end {name} -->"
        before, found, rest = text.partition(start)
        if not found or end not in rest:
            raise ValueError(f"{path} has no lines {start.strip()!r} and {end.strip()!r}")
        text = before + start + markdown(stored(name)) + end + rest.partition(end)[2]
    path.write_text(text, "utf-8")


def _main(folder: str, *options: str) -> None:
    if folder == "--readme":
        write_readme(Path(options[0]))
        return
    make = ladder if "--truth" in options else matrix
    print(markdown(make(folder, say=lambda line: print(line, file=sys.stderr))))


if __name__ == "__main__":
    _main(*sys.argv[1:])
