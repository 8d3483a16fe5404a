"""Run folders: all that is needed to report, predict and sample later, on another machine.

======================== =========================================================================
``checkpoint.safetensors`` state of the fit, to go on from
``model.safetensors``    the parameters that were kept, and the history
``rows.safetensors``     the rows that the report shows, at most 10,000 of each kind, and what was
                         tracked of the epochs
``run.json``             specification, seed, versions, shapes of the sites, columns of a table
``metrics.json``         figures, and those of the rivals
``history.csv``          one line an epoch
``report.html``          the page
======================== =========================================================================

Only these names are read, inside the folder that is given: links that lead out of it are refused.
Nothing in them is executed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyrozoo.inference import Batch, Result, Tracker, checkpoint
from pyrozoo.inference.graph import read_graph
from pyrozoo.inference.reports import report
from pyrozoo.zoo.baselines import NAMES
from pyrozoo.zoo.catalogue import Model
from pyrozoo.zoo.safety import inside, read_facts, read_figures, write_json
from pyrozoo.zoo.tasks import Task

__all__ = ["Run", "check", "load", "store", "write_json", "write_report"]

ROWS = 10_000
PROBED = 32  # rows whose bound is stored, to see that a model that was read is the same
STATE = ("checkpoint.safetensors", ".checkpoint.safetensors.lock")
WRITTEN = (
    *STATE, *(f"start/{name}" for name in STATE), "model.safetensors", "rows.safetensors",
    "run.json", "run.partial", "metrics.json", "metrics.partial", "history.csv", "report.html",
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """A run folder that was read: the fitted pair, and what it was fitted to."""

    folder: Path
    model: Model
    result: Result
    facts: dict[str, Any]
    figures: dict[str, Any]
    train: Batch
    labels: Tensor
    test: Batch
    test_labels: Tensor
    schema: Any
    track: Tracker | None = None

    @property
    def supervised(self) -> bool:
        """Whether labels were shown."""
        return self.finite and "y" in self.train and bool((self.labels >= 0).any())

    @property
    def finite(self) -> bool:
        """Whether there is a cluster or label y, and no other site of that name."""
        site = read_graph(self.result.program, self.train[:2]).sites.get("y")
        return site is not None and site.kind == "sample" and site.local and site.summable


def store(
    folder: Path,
    model: Model,
    result: Result,
    task: Task,
    figures: Mapping[str, Any],
    facts: Mapping[str, Any],
    track: Tracker | None = None,
) -> None:
    """Write everything but the report."""
    check(folder)
    result.save(folder / "model.safetensors")
    result.write_history(folder / "history.csv")
    rows, labels = _some(task.train, task.labels)
    tensors = _pack("train", rows, labels)
    if not task.transductive:
        tensors |= _pack("test", *_some(task.test, task.test_labels))
    if track is not None:
        track.labels = task.labels[track.rows]
        tensors |= {f"track.{name}": value for name, value in track.pack().items()}
    meta = {"kind": "rows", "torch": str(torch.__version__), "probe": _probe(result, rows)}
    checkpoint.save(folder / "rows.safetensors", tensors, meta)
    write_json(folder / "metrics.json", figures)
    everything = {
        **facts,
        "sites": result.sites,
        "shapes": {n: list(task.train.shape(n)[1:]) for n in task.train.names},
        "images": task.images,
        "label_names": task.label_names,
        "schema": None if task.schema is None else task.schema.to_json(),
    }
    write_json(folder / "run.json", everything)


def load(folder: Path, make: Callable[[Any, Task, int], Model]) -> Run:
    """Read a run folder.

    Args:
        folder: of the run.
        make: makes the untrained model from the specification, rows of the same shapes, and a seed.

    Raises:
        FileNotFoundError: the folder, or one of its files, is missing.
        ValueError: a file is damaged, leads out of the folder, or belongs to another model.
    """
    facts = read_facts(folder)
    schema = None
    if facts["schema"] is not None:
        from pyrozoo.zoo import tables

        try:
            schema = tables.Schema.from_json(facts["schema"])
        except ValueError as error:
            raise ValueError(f"{folder / 'run.json'} is damaged: {error}") from error
    path = inside(folder, "rows.safetensors")
    tensors, meta = checkpoint.load(path)
    train, labels = _unpack("train", tensors, path)
    test, test_labels = train, labels
    if any(name.startswith("test.") for name in tensors):
        test, test_labels = _unpack("test", tensors, path)
    track = _track(tensors, path)
    images = {name: tuple(shape) for name, shape in facts["images"].items()}
    task = Task(
        train, labels, test, test_labels, images, facts["label_names"],
        schema=schema, likelihoods=schema.likelihoods if schema else None,
    )  # fmt: skip
    try:
        model = make(facts["spec"], task, facts["seed"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder}: {error}") from error
    result = Result(model.program, model.guide, model.objective, model.objective.inputs)
    result.load(inside(folder, "model.safetensors"))
    if bad := [n for n, v in result.parameters.items() if bool(v.isnan().any())]:
        raise ValueError(f"{folder / 'model.safetensors'} has NaN in {', '.join(bad[:4])}")
    _check_probe(result, train, meta, folder)
    figures = read_figures(inside(folder, "metrics.json"))
    rows = (train, labels, test, test_labels)
    return Run(folder, model, result, facts, figures, *rows, schema, track)


def check(folder: Path) -> None:
    """Check that what is to be written into a folder stays there.

    Raises:
        ValueError: one of its files is a link that leads out of it.
    """
    for name in WRITTEN:
        inside(folder, name)


def _probe(result: Result, rows: Batch) -> float | None:
    """The bound of a few rows; None for a model that is not on the CPU, whose draws are others."""
    if any(value.device.type != "cpu" for value in result.parameters.values()):
        return None
    return result.evaluate(rows[:PROBED])["bound"]


def _check_probe(result: Result, rows: Batch, meta: Mapping[str, Any], folder: Path) -> None:
    """Check that the parameters that were read mean in this program what they meant."""
    then = meta.get("probe")
    if not isinstance(then, float) or meta.get("torch") != str(torch.__version__):
        return
    try:
        now = _probe(result, rows)
    except ValueError as error:
        raise ValueError(f"{folder} has a model that does not fit its rows: {error}") from error
    if now is not None and not np.isclose(now, then, 1e-4, 1e-4, equal_nan=True):
        raise ValueError(
            f"{folder} belongs to another program: with its parameters the bound of its first rows"
            f" was {then:g}, here it is {now:g}; its run.json, or the program, was changed"
        )


def write_report(run: Run, path: Path | None = None) -> Path:
    """Write the page of a run, into its folder by default."""
    path = path or inside(run.folder, "report.html")
    data, labels = _reported(run)
    spec, seconds = run.facts["spec"], run.figures.get("seconds", 0.0)
    source = spec["data"].get("name") or Path(str(spec["data"].get("file"))).name
    facts = {
        "command": run.facts["command"], "seed": str(run.facts["seed"]),
        "seconds, with the start": f"{seconds:.0f}", **run.facts["versions"],
    }  # fmt: skip
    report.write(
        path, run.result, data, labels=labels, label_names=run.facts["label_names"],
        images={n: tuple(s) for n, s in run.facts["images"].items()}, columns=_names(run),
        cluster="y" if run.finite else None,
        baselines={NAMES.get(k, k): v for k, v in run.figures.items() if isinstance(v, dict)},
        title=f"{spec['method']} on {source}", facts=facts,
        classes=run.supervised and run.finite and labels is not None, track=run.track,
    )  # fmt: skip
    return path


def _names(run: Run) -> dict[str, list[str]]:
    sites = run.schema.sites if run.schema is not None else ()
    return {site.name: [c.name for c in site.columns] for site in sites if site.columns}


def _reported(run: Run) -> tuple[Batch, Tensor | None]:
    """The rows of the page, and their labels if all are known."""
    if not run.supervised:
        return run.train, run.labels if bool((run.labels >= 0).all()) else None
    known = (run.test_labels >= 0).nonzero().squeeze(-1)
    return run.test[known], run.test_labels[known]


def _some(batch: Batch, labels: Tensor) -> tuple[Batch, Tensor]:
    """All rows, or some at random, in their order."""
    if len(batch) <= ROWS:
        return batch, labels
    chosen = np.random.default_rng(0).choice(len(batch), ROWS, replace=False)
    index = torch.from_numpy(np.sort(chosen))
    return batch[index], labels[index]


def _pack(kind: str, batch: Batch, labels: Tensor) -> dict[str, Tensor]:
    """Rows as tensors by name."""
    tensors = {f"{kind}.labels": labels}
    for name in batch.names:
        tensors[f"{kind}.value.{name}"] = batch.stored(name)
        if batch.partly(name):
            tensors[f"{kind}.present.{name}"] = batch.present(name)
    return tensors


def _track(tensors: Mapping[str, Tensor], path: Path) -> Tracker | None:
    """What was tracked of the epochs; None in a folder without."""
    found = {k.removeprefix("track."): v for k, v in tensors.items() if k.startswith("track.")}
    try:
        return Tracker.unpack(found) if found else None
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def _unpack(kind: str, tensors: Mapping[str, Tensor], path: Path) -> tuple[Batch, Tensor]:
    labels = tensors.get(f"{kind}.labels")
    if labels is None or labels.dim() != 1 or labels.dtype != torch.int64:
        raise ValueError(f"{path} is damaged: it has no labels, one a row")
    start = f"{kind}.value."
    values: dict[str, Any] = {}
    for key, value in tensors.items():
        if key.startswith(start):
            name = key.removeprefix(start)
            present = tensors.get(f"{kind}.present.{name}")
            values[name] = value if present is None else (value, present)
    try:
        return Batch.of(values, len(labels)), labels
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
