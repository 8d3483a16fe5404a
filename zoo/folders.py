"""Run folders: all that is needed to report, predict and sample later, on another machine.

======================== =========================================================================
``checkpoint.safetensors`` state of the fit, to go on from
``model.safetensors``    the parameters that were kept, and the history
``rows.safetensors``     the rows that the report shows, at most 10,000 of each kind
``run.json``             specification, seed, versions, shapes of the sites, columns of a table
``metrics.json``         figures, and those of the rivals
``history.csv``          one line an epoch
``report.html``          the page
======================== =========================================================================

Only these names are read, inside the folder that is given; nothing in them is executed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyrozoo.inference import Batch, Result, checkpoint, report
from pyrozoo.zoo.catalogue import Model
from pyrozoo.zoo.tasks import Task

ROWS = 10_000
FACTS = (
    "spec",
    "seed",
    "command",
    "versions",
    "sites",
    "shapes",
    "images",
    "label_names",
    "schema",
)


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

    @property
    def supervised(self) -> bool:
        """Whether labels were shown."""
        return "y" in self.train

    @property
    def finite(self) -> bool:
        """Whether there is a cluster or label y."""
        return any(line.startswith("y: ") for line in self.result.sites)


def store(
    folder: Path,
    model: Model,
    result: Result,
    task: Task,
    figures: Mapping[str, Any],
    facts: Mapping[str, Any],
) -> None:
    """Write everything but the report."""
    result.save(folder / "model.safetensors")
    result.write_history(folder / "history.csv")
    tensors = _pack("train", task.train, task.labels)
    if not task.transductive:
        tensors |= _pack("test", task.test, task.test_labels)
    checkpoint.save(folder / "rows.safetensors", tensors, {"kind": "rows"})
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
        ValueError: a file is damaged, or belongs to another model.
    """
    facts = _facts(folder)
    schema = None
    if facts["schema"] is not None:
        from pyrozoo.zoo import tables

        schema = tables.Schema.from_json(facts["schema"])
    tensors, _ = checkpoint.load(folder / "rows.safetensors")
    train, labels = _unpack("train", tensors, folder)
    test, test_labels = train, labels
    if any(name.startswith("test.") for name in tensors):
        test, test_labels = _unpack("test", tensors, folder)
    images = {name: tuple(shape) for name, shape in facts["images"].items()}
    task = Task(
        train, labels, test, test_labels, images, facts["label_names"],
        schema=schema, likelihoods=schema.likelihoods if schema else None,
    )  # fmt: skip
    model = make(facts["spec"], task, facts["seed"])
    result = Result(model.program, model.guide, model.objective)
    result.load(folder / "model.safetensors")
    result.sites = facts["sites"]
    figures = _json(folder / "metrics.json")
    return Run(folder, model, result, facts, figures, train, labels, test, test_labels, schema)


def write_report(run: Run, path: Path | None = None) -> Path:
    """Write the page of a run, into its folder by default."""
    path = path or run.folder / "report.html"
    data, labels = _reported(run)
    spec, seconds = run.facts["spec"], run.figures.get("seconds", 0.0)
    source = spec["data"].get("name") or Path(str(spec["data"].get("file"))).name
    facts = {
        "command": run.facts["command"], "seed": str(run.facts["seed"]),
        "seconds of training": f"{seconds:.0f}", **run.facts["versions"],
    }  # fmt: skip
    report.write(
        path, run.result, data, labels=labels, label_names=run.facts["label_names"],
        images={n: tuple(s) for n, s in run.facts["images"].items()},
        cluster="y" if run.finite else None,
        baselines={k: v for k, v in run.figures.items() if isinstance(v, dict)},
        title=f"{spec['method']} on {source}", facts=facts,
        classes=run.supervised and run.finite and labels is not None,
    )  # fmt: skip
    return path


def _reported(run: Run) -> tuple[Batch, Tensor | None]:
    """The rows of the page, and their labels if all are known."""
    if not run.supervised:
        return run.train, run.labels if bool((run.labels >= 0).all()) else None
    known = (run.test_labels >= 0).nonzero().squeeze(-1)
    return run.test[known], run.test_labels[known]


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write JSON beside its final name, then move it there."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=2, default=str) + "\n")
    partial.replace(path)


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} is damaged: expected an object, got {type(value).__name__}")
    return value


def _facts(folder: Path) -> dict[str, Any]:
    path = folder / "run.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is no run folder: it has no run.json")
    facts = _json(path)
    if missing := [k for k in FACTS if k not in facts]:
        raise ValueError(f"{path} is damaged, or of another version: {missing} is missing")
    kinds = {
        "spec": dict, "seed": int, "command": str, "versions": dict, "sites": list,
        "images": dict, "label_names": list,
    }  # fmt: skip
    for key, kind in kinds.items():
        if not isinstance(facts[key], kind):
            found = type(facts[key]).__name__
            raise ValueError(f"{path} is damaged: {key} is a {kind.__name__}, got {found}")
    spec = facts["spec"]
    if not isinstance(spec.get("method"), str) or not isinstance(spec.get("data"), dict):
        raise ValueError(f"{path} is damaged: its specification names no method or no data")
    return facts


def _pack(kind: str, batch: Batch, labels: Tensor) -> dict[str, Tensor]:
    """Rows as tensors by name: all, or some at random, in their order."""
    if len(batch) > ROWS:
        chosen = np.random.default_rng(0).choice(len(batch), ROWS, replace=False)
        index = torch.from_numpy(np.sort(chosen))
        batch, labels = batch[index], labels[index]
    tensors = {f"{kind}.labels": labels}
    for name in batch.names:
        tensors[f"{kind}.value.{name}"] = batch.stored(name)
        if batch.partly(name):
            tensors[f"{kind}.present.{name}"] = batch.present(name)
    return tensors


def _unpack(kind: str, tensors: Mapping[str, Tensor], folder: Path) -> tuple[Batch, Tensor]:
    if f"{kind}.labels" not in tensors:
        raise ValueError(f"{folder / 'rows.safetensors'} is damaged: it has no labels")
    start = f"{kind}.value."
    values: dict[str, Any] = {}
    for key, value in tensors.items():
        if key.startswith(start):
            name = key.removeprefix(start)
            present = tensors.get(f"{kind}.present.{name}")
            values[name] = value if present is None else (value, present)
    labels = tensors[f"{kind}.labels"]
    return Batch.of(values, len(labels)), labels
