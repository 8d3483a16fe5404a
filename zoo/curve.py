"""Accuracy against time: one experiment with pretraining of several lengths.

``python -m pyrozoo.zoo.curve EXPERIMENT FOLDER --pretraining 2,5,20`` fits the experiment once for
each length and looks, with labels that no fit sees, after the pretraining and after every epoch;
the time that this takes is not counted.  The lines are kept in ``FOLDER/EXPERIMENT.json``, where
lines that are there are not run again, and drawn in ``FOLDER/EXPERIMENT.png``.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer
from matplotlib.figure import Figure

from pyrozoo.inference import Result, metrics, responsibilities
from pyrozoo.zoo import runs
from pyrozoo.zoo.folders import write_json
from pyrozoo.zoo.reproduction import machine
from pyrozoo.zoo.tasks import make_task

Points = list[tuple[float, float]]  # seconds, accuracy


def curve(spec: runs.Spec, epochs: int, seed: int = 0, root: str | None = None) -> Points:
    """One-to-one accuracy, on all rows that are fitted, and the seconds until then.

    Args:
        spec: of an experiment that clusters without labels.
        epochs: of its pretraining.
        seed: of all of it.
        root: where the data are.
    """
    spec = copy.deepcopy(spec)
    spec["start"]["epochs"] = epochs
    task = make_task(spec["data"], spec["method"], seed, root)
    model = runs.make_model(spec, task, seed)
    points, began, looked = Points(), time.perf_counter(), 0.0
    start = model.start
    assert start is not None

    def look(result: Result | None = None) -> None:
        nonlocal looked
        now = time.perf_counter()
        found = responsibilities(model.program, model.guide, task.train, "y", seed=0)
        known = task.labels >= 0
        report = metrics.clustering_report(task.labels[known], found[known])
        points.append((round(now - began - looked, 1), report["hungarian_accuracy"]))
        looked += time.perf_counter() - now

    def started(*args: Any, **options: Any) -> None:
        start(*args, **options)
        look()

    model.start = started
    model.fit(task.train, seed=seed, start=spec["start"], callbacks=[look], **spec.get("fit", {}))
    return points


def draw(record: dict[str, Any], path: Path) -> None:
    """Draw the lines of a record."""
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    ax = figure.subplots()
    for epochs, points in record["lines"].items():
        seconds, accuracy = zip(*points, strict=True)
        ax.plot([s / 60 for s in seconds], accuracy, "o-", ms=4, label=f"{epochs}")
    ax.set(xlabel="minutes", ylabel="one-to-one accuracy", xlim=(0, None))
    ax.grid(alpha=0.3)
    ax.legend(title="epochs of pretraining", frameon=False)
    ax.set_title(f"{record['experiment']}, seed {record['seed']}", fontsize=10)
    figure.savefig(path, dpi=120)


def main(
    experiment: str, folder: Path, pretraining: str = "2,5,20", seed: int = 0, root: str = ""
) -> None:
    """Fit the experiment once for each length of pretraining; keep and draw accuracy and time."""
    spec = runs.load_experiment(experiment)
    path = folder / f"{experiment}.json"
    lengths: Sequence[int] = [int(word) for word in pretraining.split(",")]
    record: dict[str, Any] = {
        "experiment": experiment,
        "seed": seed,
        "machine": machine(),
        "lines": {},
    }
    if path.exists():
        record = json.loads(path.read_text())
        if record["seed"] != seed:
            raise typer.BadParameter(f"{path} has seed {record['seed']}; move it away")
    folder.mkdir(parents=True, exist_ok=True)
    for epochs in lengths:
        if str(epochs) not in record["lines"]:
            record["lines"][str(epochs)] = curve(spec, epochs, seed, root or None)
            write_json(path, record)
    record["lines"] = dict(sorted(record["lines"].items(), key=lambda line: int(line[0])))
    write_json(path, record)
    draw(record, path.with_suffix(".png"))


if __name__ == "__main__":
    typer.run(main)
