"""Results: an experiment over seeds, stored as one JSON file, and the table of all of them."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import Any

from rich.table import Table

from pyrozoo.zoo import runs

HEADLINE = {
    "clustering": "hungarian_accuracy",
    "semisupervised": "test_error",
    "multimodal": "mse_x_right",
}


def reproduce(name: str, seeds: int, folder: Path, root: str | None = None) -> Path:
    """Run seeds 0 .. ``seeds - 1`` of an experiment; finished seeds in the file are not run again.

    Returns:
        the JSON file: for each figure the mean, the sd (of the sample) and each seed's value.
    """
    spec = runs.load_experiment(name)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    done: dict[str, dict[str, float]] = {}
    if path.exists():
        old = json.loads(path.read_text())
        if old["spec"] != json.loads(json.dumps(spec)):
            raise ValueError(f"{path} was made with other settings; move it away to start again")
        done = old["seeds"]
    for seed in range(seeds):
        if str(seed) in done:
            continue
        *_, figures = runs.fit_spec(spec, seed, root=root)
        done[str(seed)] = figures
        runs._write_json(path, _record(name, spec, done))
    return path


def _record(name: str, spec: runs.Spec, done: dict[str, dict[str, float]]) -> dict[str, Any]:
    figures = next(iter(done.values()))
    columns = {key: [row[key] for row in done.values()] for key in figures}
    return {
        "experiment": name,
        "command": f"pyrozoo reproduce {name} --seeds {len(done)}",
        "spec": spec,
        "mean": {key: statistics.fmean(column) for key, column in columns.items()},
        "sd": {
            key: statistics.stdev(column) if len(column) > 1 else None
            for key, column in columns.items()
        },
        "seeds": done,
        "commit": _commit(),
        "machine": f"{platform.machine()}, {platform.system()}",
        "versions": runs.versions(),
    }


def _commit() -> str:
    try:
        found = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],
            capture_output=True, text=True, check=True, cwd=Path(__file__).parent,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()


def stored() -> list[dict[str, Any]]:
    """All results in ``zoo/experiments/results``."""
    folder = files("pyrozoo.zoo") / "experiments" / "results"
    if not folder.is_dir():
        return []
    names = sorted(f.name for f in folder.iterdir() if f.name.endswith(".json"))
    return [json.loads((folder / name).read_text()) for name in names]


def table(records: Iterable[dict[str, Any]]) -> Table:
    """Paper, ours and gap, one row an experiment."""
    out = Table("experiment", "figure", "paper", "ours", "gap", "seeds", "seconds", box=None)
    for record in records:
        published = record["spec"].get("published", {})
        shown = list(published) or [k for k in HEADLINE.values() if k in record["mean"]]
        for key in shown:
            ours, sd = record["mean"][key], record["sd"][key]
            paper = published.get(key)
            out.add_row(
                record["experiment"], key.replace("_", " "),
                "" if paper is None else f"{paper:.4g}",
                f"{ours:.4f}" + (f" ± {sd:.4f}" if sd is not None else ""),
                "" if paper is None else f"{ours - paper:+.4f}",
                str(len(record["seeds"])), f"{record['mean']['seconds']:.0f}",
            )  # fmt: skip
    return out
