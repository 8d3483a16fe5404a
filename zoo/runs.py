"""Runs: a specification, as an experiment file has it, becomes data, a fit, figures and a folder.

A specification is a dictionary with the tables of the files in ``zoo/experiments``: ``method``,
``data`` (name, split, labels, missing), ``options`` of the method, ``start`` (pretraining),
``fit``, and ``published`` figures.
"""

from __future__ import annotations

import copy
import json
import platform
import time
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyrozoo.inference import Batch, Result, metrics, report
from pyrozoo.zoo import baselines, datasets
from pyrozoo.zoo.catalogue import Model, create, list_methods, method

Spec = dict[str, Any]
TABLES = ("method", "data", "options", "start", "fit", "published")


@dataclass(frozen=True)
class Task:
    """The data of a run: what is observed in training, and what is only for scoring."""

    train: dict[str, Any]
    labels: Tensor  # of the training rows, whether shown to the training or not
    test: dict[str, Any]
    test_labels: Tensor
    images: dict[str, tuple[int, int, int]]
    label_names: list[str] = field(default_factory=list)
    truth: Tensor | None = None  # x of the test rows, without holes


def experiments() -> list[str]:
    """Names of the experiment files."""
    folder = files("pyrozoo.zoo") / "experiments"
    return sorted(
        f.name.removesuffix(".toml") for f in folder.iterdir() if f.name.endswith(".toml")
    )


def load_experiment(name: str) -> Spec:
    """The specification in an experiment file.

    Raises:
        ValueError: there is no such experiment, or the file has unknown tables.
    """
    if name not in experiments():
        raise ValueError(
            f"no experiment is called {name!r} (there are: {', '.join(experiments())})"
        )
    text = (files("pyrozoo.zoo") / "experiments" / f"{name}.toml").read_text()
    spec = tomllib.loads(text)
    if unknown := set(spec) - set(TABLES):
        raise ValueError(f"{name}: unknown tables {', '.join(sorted(unknown))}")
    return spec


def default_spec(name: str, data: str) -> Spec:
    """What ``pyrozoo train NAME --data DATA`` runs: the experiment for the two, if there is one."""
    for experiment in experiments():
        spec = load_experiment(experiment)
        if spec["method"] == name and spec["data"]["name"] == data:
            return spec
    return {"method": name, "data": {"name": data}}


def make_task(spec: Spec, seed: int, root: str | None = None) -> Task:
    """Load the data of a specification and hide what it says.

    ``hidden_pixels`` is the share of entries of x that are hidden, in training and test rows alike;
    ``labels`` is how many training labels are shown (default: none, or 100 for a method whose task
    is semi-supervised); ``missing`` the share of training rows that lack one of the two halves of a
    multimodal method.
    """
    settings = dict(spec["data"])
    name = settings.pop("name")
    split, labels = settings.pop("split", "train"), settings.pop("labels", None)
    missing, pixels = settings.pop("missing", 0.0), settings.pop("hidden_pixels", 0.0)
    if settings:
        raise ValueError(f"unknown settings of the data: {', '.join(settings)}")
    train = datasets.load(name, root, split)
    test = datasets.load(name, root, "test") if split == "train" else train
    kind = method(spec["method"]).task if spec["method"] in list_methods() else "own"
    if kind == "multimodal":
        return _halves(train, test, missing, seed)
    shown: dict[str, Any] = {"x": train.x}
    if labels is None and kind == "semisupervised":
        labels = 100
    if labels is not None:
        everything = labels in ("all", len(train.y))
        shown["y"] = train.y if everything else datasets.hide_labels(train.y, labels, seed)
    tested: dict[str, Any] = {"x": test.x}
    if pixels:
        generator = np.random.default_rng(seed)
        for values, rows in ((shown, train.x), (tested, test.x)):
            values["x"] = (rows, torch.from_numpy(generator.random(rows.shape) >= pixels))
    images = {"x": train.image_shape}
    return Task(shown, train.y, tested, test.y, images, list(train.label_names), test.x)


def _halves(train: datasets.Dataset, test: datasets.Dataset, missing: float, seed: int) -> Task:
    channels, height, width = train.image_shape
    images: dict[str, tuple[int, int, int]] = {
        "x_left": (channels, height, width // 2),
        "x_right": (channels, height, width - width // 2),
    }
    shown: dict[str, Any] = datasets.halves(train)
    if missing:
        generator = np.random.default_rng(seed)
        lost = generator.random(len(train.x)) < missing
        left = generator.random(len(train.x)) < 0.5
        shown = {
            "x_left": (shown["x_left"], torch.from_numpy(~(lost & left))),
            "x_right": (shown["x_right"], torch.from_numpy(~(lost & ~left))),
        }
    names = list(train.label_names)
    return Task(shown, train.y, dict(datasets.halves(test)), test.y, images, names)


def score(result: Result, task: Task) -> dict[str, float]:
    """The figures of a fitted method; which ones depends on what was observed.

    Several modalities: for each the mean squared error of predicting it from the others on test
    rows, beside that of the training mean (``mse_*``, ``mean_mse_*``).  Labels shown: the share of
    test rows whose most probable label is wrong (``test_error``), and the calibration error.  A
    finite site ``y`` and no labels: the clustering metrics on the rows that it was fitted to.
    Hidden
    pixels: the mean squared error of predicting them on test rows, beside that of the training
    mean.
    """
    if "x" not in task.train:
        return _cross_errors(result, task)
    figures: dict[str, float] = {}
    if any(line.startswith("y: ") for line in result.sites):
        if "y" in task.train:
            probabilities = result.responsibilities(task.test, seed=0)
            figures["test_error"] = 1 - metrics.accuracy(task.test_labels, probabilities.argmax(1))
            figures["calibration_error"] = metrics.calibration_error(
                probabilities, task.test_labels
            )
        else:
            figures |= metrics.clustering_report(
                task.labels, result.responsibilities(task.train, seed=0)
            )
    test = Batch.of(task.test)
    if test.partly("x") and task.truth is not None:
        hidden, train = ~test.present("x"), Batch.of(task.train)
        mean = train["x"].sum(0) / train.present("x").sum(0)
        for name, guess in (
            ("mse", result.predict(test, "x", num_samples=100, seed=0)),
            ("mean_mse", mean),
        ):
            figures[f"{name}_hidden"] = float((guess - task.truth).square()[hidden].mean())
    return figures


def _cross_errors(result: Result, task: Task) -> dict[str, float]:
    train, test = Batch.of(task.train), Batch.of(task.test)
    figures = {}
    for name in test.names:
        guess = result.predict(test, name, observed="ignore", num_samples=100, seed=0)
        known = train[name][train.present(name)]
        truth = test[name]
        figures[f"mse_{name}"] = float((guess - truth).square().mean())
        figures[f"mean_mse_{name}"] = float((known.mean(0) - truth).square().mean())
    return figures


def versions() -> dict[str, str]:
    """Versions of what a figure depends on."""
    names = ["pyrozoo", "pyro-ppl", "torch", "numpy", "scikit-learn"]
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def fit_spec(
    spec: Spec,
    seed: int,
    *,
    root: str | None = None,
    progress: bool = True,
    model: Model | None = None,
    **fit_options: Any,
) -> tuple[Model, Result, Task, dict[str, float]]:
    """Load, create, fit and score one seed of a specification."""
    task = make_task(spec, seed, root)
    if model is None:
        model = create(spec["method"], task.train, seed=seed, **spec.get("options", {}))
    settings = {**spec.get("fit", {}), **fit_options}
    start = spec.get("start") if model.start is not None else None
    began = time.perf_counter()
    result = model.fit(task.train, seed=seed, progress=progress, start=start, **settings)
    seconds = time.perf_counter() - began
    figures = {**score(result, task), "bound": result.history[-1]["bound"]}
    return model, result, task, {**figures, "seconds": seconds}


def run(
    spec: Spec,
    folder: Path,
    *,
    seed: int = 0,
    root: str | None = None,
    device: str = "auto",
    resume: bool = False,
    progress: bool = True,
    model: Model | None = None,
    command: str = "",
) -> dict[str, Any]:
    """Train, compare with the baselines, and leave a run folder.

    The folder has ``checkpoint.safetensors``, ``history.csv``, ``metrics.json``, ``run.json`` (the
    specification and the versions) and ``report.html``.
    """
    model, result, task, figures = fit_spec(
        spec, seed, root=root, progress=progress, model=model, folder=folder, resume=resume,
        device=device, save_every=10,
    )  # fmt: skip
    rivals = rivals_of(model, spec, task, seed)
    facts = {
        "command": command, "seed": str(seed), "seconds of training": f"{figures['seconds']:.0f}",
        **versions(),
    }  # fmt: skip
    finite = any(line.startswith("y: ") for line in result.sites)
    supervised = "y" in task.train
    data, labels = (task.test, task.test_labels) if supervised else (task.train, task.labels)
    report.write(
        folder / "report.html", result, data, labels=labels, label_names=task.label_names,
        images=task.images, cluster="y" if finite else None, baselines=rivals,
        title=f"{model.method} on {spec['data']['name']}", facts=facts,
        classes=supervised and finite,
    )  # fmt: skip
    everything = {**figures, **rivals}
    result.write_history(folder / "history.csv")
    _write_json(folder / "metrics.json", everything)
    _write_json(
        folder / "run.json",
        {**spec, "seed": seed, "command": command, "versions": versions(), "sites": result.sites},
    )
    return everything


def rivals_of(model: Model, spec: Spec, task: Task, seed: int) -> dict[str, dict[str, float]]:
    """k-means and autoencoder + mixture for a clustering method, on the same rows."""
    batch = Batch.of(task.train)
    plain = batch.names == ("x",) and not batch.partly("x")
    if not plain or "num_clusters" not in model.options:
        return {}
    options = {key: model.options[key] for key in ("hidden", "latent_dim") if key in model.options}
    epochs = spec.get("start", {}).get("epochs", 20)
    clusters = model.options["num_clusters"]
    return baselines.clustering_baselines(
        task.train["x"], task.labels, clusters, seed=seed, epochs=epochs, **options
    )


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=2, default=str) + "\n")
    partial.replace(path)


def with_overrides(spec: Spec, **tables: Mapping[str, Any]) -> Spec:
    """A copy of a specification with some entries of its tables replaced (None: left alone)."""
    new = copy.deepcopy(spec)
    for table, entries in tables.items():
        for key, value in entries.items():
            if value is not None:
                new.setdefault(table, {})[key] = value
    return new
