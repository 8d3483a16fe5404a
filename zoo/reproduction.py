"""Results: an experiment over seeds, stored as one JSON file, and the table of all of them."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import statistics
import subprocess
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from scipy.stats import spearmanr

from pyrozoo.zoo import runs
from pyrozoo.zoo.baselines import NAMES
from pyrozoo.zoo.folders import write_json
from pyrozoo.zoo.rivals import plain_rivals

HEADLINES = (
    "hungarian_accuracy", "nmi", "test_hungarian_accuracy", "test_nmi", "knn3_error", "knn5_error",
    "knn10_error", "majority_accuracy", "majority_accuracy_digit", "majority_accuracy_colour",
    "test_error", "open_accuracy", "known_accuracy", "new_accuracy", "rmse_hidden", "error_hidden",
    "coverage_hidden", "mse_hidden", "mse_x_left", "mse_x_right", "test_log_evidence",
)  # fmt: skip


def reproduce(
    name: str, seeds: int, folder: Path, root: str | None = None, rivals: bool = True
) -> Path:
    """Run seeds 0 .. ``seeds - 1`` of an experiment.

    Interrupted, it goes on where it was: finished seeds are in the file, and the one in progress
    has a checkpoint beside it.

    With ``rivals`` the baselines run too, on the same rows with the same seed, where there are any.

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
        state = folder / f".{name}-seed{seed}"
        model, _, task, figures = runs.fit_spec(
            spec, seed, root=root, folder=state, resume=True, save_every=5
        )
        if rivals:
            epochs = spec.get("start", {}).get("epochs")
            for rival, row in plain_rivals(model, task, seed, epochs).items():
                figures |= {f"{rival}_{key}": value for key, value in row.items()}
        done[str(seed)] = figures
        write_json(path, _record(name, spec, done))
        shutil.rmtree(state)
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
        "machine": machine(),
        "versions": runs.versions(),
    }


def machine() -> str:
    """The processor, how many of its cores are used, and the GPU if there is one."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(x.partition(":")[2].strip() for x in lines if x.startswith("model name"))
    cores = f"{torch.get_num_threads()} of {os.cpu_count()} cores"
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{name}, {cores}{gpu}, {platform.system()}"


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


COLUMNS = (
    "experiment", "figure", "paper", "ours", "gap", "plain rivals", "rank corr.", "seeds", "seconds"
)  # fmt: skip


SECOND = {"nmi", "knn3_error", "knn5_error", "knn10_error"}


def rows(records: Iterable[dict[str, Any]], *, brief: bool = False) -> list[tuple[str, ...]]:
    """Paper, ours and gap as text, one row a figure: see ``COLUMNS``.

    If ``brief``, those of ``SECOND`` are left out where none was published.
    """
    found: list[tuple[str, ...]] = []
    for record in records:
        published = record["spec"].get("published", {})
        for key in HEADLINES:
            if key not in record["mean"]:
                continue
            if key == "majority_accuracy" and "hungarian_accuracy" in record["mean"]:
                continue  # as many clusters as classes
            if brief and key not in published and key.removeprefix("test_") in SECOND:
                continue
            ours, sd, paper = record["mean"][key], record["sd"][key], published.get(key)
            found.append(
                (
                    record["experiment"],
                    key.replace("_", " "),
                    "" if paper is None else f"{paper:.4g}",
                    f"{ours:.4f}" + ("" if sd is None else f" ± {sd:.4f}"),
                    "" if paper is None else f"{ours - paper:+.4f}",
                    _rivals(record["mean"], key),
                    _correlation(record["seeds"], key),
                    str(len(record["seeds"])),
                    f"{record['mean']['seconds']:.0f}",
                )
            )
    return found


def _rivals(means: dict[str, float], key: str) -> str:
    """What the plain methods reach: ``k-means 0.793, AE+GMM 0.810``."""
    found = [(name, means.get(f"{rival}_{key}")) for rival, name in NAMES.items()]
    return ", ".join(f"{name} {value:.3f}" for name, value in found if value is not None)


def _correlation(seeds: dict[str, dict[str, float]], key: str) -> str:
    """Spearman's rank correlation of the bound and a figure over seeds: would the bound choose?

    Positive where a better bound goes with a better figure, whether more or less of it is better.
    """
    bounds, figures = ([row[name] for row in seeds.values()] for name in ("bound", key))
    if len(seeds) < 3 or len(set(bounds)) == 1 or len(set(figures)) == 1:
        return ""
    sign = 1 if "accuracy" in key or "nmi" in key else -1
    if "coverage" in key:
        return ""
    return f"{round(sign * spearmanr(bounds, figures).statistic, 1) + 0.0:+.1f}"


def table(records: Iterable[dict[str, Any]]) -> Table:
    """The rows for a terminal."""
    out = Table(box=None)
    for i, column in enumerate(COLUMNS):
        out.add_column(column, min_width=31 if i == 0 else None, overflow="fold")
    for row in rows(records):
        out.add_row(*row)
    return out


def markdown(records: Iterable[dict[str, Any]]) -> str:
    """The rows for the README, in brief."""
    lines = [COLUMNS, ("---",) * len(COLUMNS), *rows(records, brief=True)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write_readme(path: Path) -> None:
    """Put the table of all stored results between the markers of a README."""
    text = path.read_text()
    start, end = "<!-- results -->\n", "\n<!-- end -->"
    before, found, rest = text.partition(start)
    if not found or end not in rest:
        raise ValueError(f"{path} has no lines '<!-- results -->' and '<!-- end -->'")
    path.write_text(before + start + markdown(stored()) + end + rest.partition(end)[2])
