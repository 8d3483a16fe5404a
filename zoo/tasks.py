"""Tasks: the table ``data`` of a specification becomes what is observed, and what is for scoring.

=================== ==============================================================================
``name``            a named data set: images (``digits``, ``mnist``, ``fashion_mnist``, and with a
                    colour besides the digit ``coloured_digits``, ``coloured_mnist``) or a table
                    (``wine``, ``breast_cancer``)
``file``            or a file of your own: .csv, .parquet, .npz, .h5ad, see :mod:`.tables`; or
                    .npy, .h5, .hdf5, .zarr, whose rows stay on disk, see :mod:`.tables.lazy`
``split``           of a named data set of images: ``train`` (default), ``test``, ``all``
``labels``          how many training labels are shown, or ``"all"``; by default none, and for a
                    semi-supervised method 100 of a named data set, all that a file has
``hidden_classes``  so many classes, the last ones, have no labelled row
``missing``         share of training rows that lack one half, for a multimodal method on images
``hidden``          share of entries that are hidden at random, to be filled in
``label`` ``views`` ``columns`` ``drop`` ``index`` ``values``
                    of a file: how it is read, see :func:`.tables.read`
``test``            of a file: share of the labelled rows that is held out (default 0.2 where
                    labels are shown, else none)
=================== ==============================================================================
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyrozoo.inference import Batch
from pyrozoo.inference.reading import fill
from pyrozoo.zoo import datasets
from pyrozoo.zoo.catalogue import list_methods, method

ON_DISK = (".npy", ".h5", ".hdf5", ".zarr")
MANY = 10_000  # rows from which on they are not read into memory
SETTINGS = (
    "name", "file", "split", "labels", "hidden_classes", "missing", "hidden", "label", "views",
    "columns", "drop", "index", "values", "test",
)  # fmt: skip


@dataclass(frozen=True)
class Task:
    """The data of a run: what is observed in training, and what is only for scoring."""

    train: Batch
    labels: Tensor  # of the training rows, shown or not; -1 where nobody knows
    test: Batch
    test_labels: Tensor
    images: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    label_names: list[str] = field(default_factory=list)
    truth: dict[str, Tensor] = field(default_factory=dict)  # test rows before entries were hidden
    schema: Any = None  # of a table, see tables.Schema
    likelihoods: Callable[[], Mapping[str, Any]] | None = None  # of the sites of a table
    known_classes: int | None = None  # with hidden classes: those that have labelled rows
    summary: tuple[str, ...] = ()  # what was read from a table, for people
    label_sets: Mapping[str, Tensor] = field(default_factory=dict)  # of test rows, if several

    @property
    def transductive(self) -> bool:
        """Whether the rows for scoring are the rows of training."""
        return self.test is self.train


def make_task(
    data: Mapping[str, Any], method_name: str, seed: int, root: str | Path | None = None
) -> Task:
    """Load the data of a specification and hide what it says.

    Args:
        data: the table ``data``, see the module.
        method_name: of the catalogue (or of your own), for what is shown by default.
        seed: of what is hidden and held out.
        root: folder of the image files.

    Raises:
        ValueError: a setting is unknown, or does not fit the data or the method.
        FileNotFoundError: there is no such file.
    """
    if unknown := set(data) - set(SETTINGS):
        raise ValueError(
            f"unknown settings of the data: {', '.join(sorted(unknown))} (known:"
            f" {', '.join(SETTINGS)})"
        )
    if ("name" in data) == ("file" in data):
        raise ValueError("the data have either a name (of a bundled data set) or a file")
    _check_settings(data)
    kind = method(method_name).task if method_name in list_methods() else "own"
    if "file" in data and Path(data["file"]).suffix.lower() in ON_DISK:
        return _on_disk(data, kind, seed)
    if "file" in data or data["name"] in datasets.TABLES:
        return _table(data, kind, seed)
    without = ["label", "views", "columns", "drop", "index", "values", "test"]
    without += ["labels", "hidden_classes", "hidden"] if kind == "multimodal" else ["missing"]
    if given := [key for key in without if key in data]:
        what = f"{data['name']}, a set of images,"
        raise ValueError(f"{what} has no {', '.join(given)} for {method_name}")
    split = data.get("split", "train")
    train = datasets.load(data["name"], root, split)
    test = datasets.load(data["name"], root, "test") if split == "train" else train
    if kind == "multimodal":
        return _halves(train, test, data.get("missing", 0.0), seed)
    labels = data.get("labels", 100 if kind == "semisupervised" else None)
    known = len(train.label_names) - data.get("hidden_classes", 0)
    shown = {"x": train.x, **_shown_labels(train.y, labels, known, len(train.label_names), seed)}
    tested = {"x": test.x}
    truth = {}
    if share := data.get("hidden", 0.0):
        generator = np.random.default_rng(seed)
        shown = _hide(shown, share, generator)
        truth = {"x": Batch.of({"x": test.x})["x"]}
        tested = _hide(tested, share, generator)
    rows = Batch.of(shown)
    same = train is test and "y" not in shown
    return Task(
        rows,
        train.y,
        rows if same else Batch.of(tested),
        test.y,
        {"x": train.image_shape},
        list(train.label_names),
        truth,
        known_classes=_known_classes(train.label_names, data),
        label_sets=test.label_sets,
    )


def _check_settings(data: Mapping[str, Any]) -> None:
    """Check the types and ranges of settings.

    Raises:
        ValueError: naming the setting.
    """
    for key, words in (
        ("name", "a name"), ("split", "a name"), ("file", "a path"), ("label", "a name")
    ):  # fmt: skip
        kinds = (str, os.PathLike) if key == "file" else str
        if data.get(key) is not None and not isinstance(data[key], kinds):
            raise ValueError(f"{key} is {words}, got {data[key]!r}")
    for key in ("missing", "hidden", "test"):
        share = data.get(key, 0.0)
        number = isinstance(share, int | float) and not isinstance(share, bool)
        if not number or not (0 <= share < 1 or (key == "missing" and share == 1)):
            raise ValueError(f"{key} is a share between 0 and 1, got {share!r}")
    for key in ("labels", "hidden_classes"):
        count = data.get(key, 0)
        whole = isinstance(count, int) and not isinstance(count, bool) and count >= 0
        if not whole and (key != "labels" or count not in ("all", None)):
            words = "a count or 'all'" if key == "labels" else "a count"
            raise ValueError(f"{key} is {words}, got {count!r}")


def _known_classes(names: Any, data: Mapping[str, Any]) -> int | None:
    hidden = data.get("hidden_classes", 0)
    return len(names) - hidden if hidden else None


def _shown_labels(
    y: Tensor, labels: Any, known_classes: int, classes: int, seed: int
) -> dict[str, Any]:
    """The labels that training sees: none, all, or a balanced few of some classes."""
    if labels in (None, 0):
        if known_classes < classes:
            raise ValueError("hidden_classes needs labels to be shown: set labels")
        return {}
    if known_classes < 1:
        raise ValueError(f"hidden_classes leaves none of the {classes} classes")
    known = y >= 0
    eligible = known & (y < known_classes)
    if labels == "all" or labels == int(known.sum()):
        return {"y": (y.clamp(min=0), eligible)} if not bool(eligible.all()) else {"y": y}
    _, kept = datasets.hide_labels(y[eligible], labels, seed)
    present = torch.zeros(len(y), dtype=torch.bool)
    present[eligible.nonzero().squeeze(-1)[kept]] = True
    return {"y": (fill(y.clamp(min=0), present), present)}


def _hide(values: Mapping[str, Any], share: float, generator: Any) -> dict[str, Any]:
    """Hide a share of the known entries of every site that is no label."""
    if not 0 < share < 1:
        raise ValueError(f"hidden is a share between 0 and 1, got {share}")
    hidden = dict(values)
    for name, given in values.items():
        if name == "y":
            continue
        value, known = given if isinstance(given, tuple) else (torch.as_tensor(given), None)
        keep = torch.from_numpy(generator.random(tuple(value.shape)) >= share)
        if known is not None:
            known = torch.as_tensor(known)
            keep &= known.reshape(known.shape + (1,) * (keep.dim() - known.dim()))
        hidden[name] = (value, keep)
    return hidden


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
    tested = Batch.of(dict(datasets.halves(test)))
    return Task(Batch.of(shown), train.y, tested, test.y, images, names)


def _table(data: Mapping[str, Any], kind: str, seed: int) -> Task:
    """A table, named or a file: fitted on all rows, but for labelled ones that are held out."""
    from pyrozoo.zoo import tables

    if given := [key for key in ("split", "missing") if key in data]:
        raise ValueError(f"a table has no {', '.join(given)}")
    source, label = data.get("file"), data.get("label")
    if "name" in data:
        source, label = datasets.table(data["name"])
    how = ("views", "columns", "drop", "index", "values")
    options = {key: data[key] for key in how if key in data}
    if data.get("hidden") and data.get("values"):
        raise ValueError("hidden is for the columns of x; values of a program of your own are not")
    table = tables.read(source, label=label, **options)
    y = torch.full((len(table.index),), -1) if table.labels is None else table.labels
    y = torch.as_tensor(y).long()
    labels = data.get("labels", "all" if kind == "semisupervised" else None)
    if labels not in (None, 0) and not bool((y >= 0).any()):
        raise ValueError("labels are to be shown, but the data have none: name their column, label")
    names = [str(level) for level in table.schema.label.levels] if table.schema.label else []
    label_site = {"y"} if table.schema.label else set()
    values = {name: given for name, given in table.data.items() if name not in label_site}
    truth = {}
    if share := data.get("hidden", 0.0):
        truth = {n: _nan_where_missing(n, v) for n, v in values.items()}
        values = _hide(values, share, np.random.default_rng(seed))
    images = {s.name: _image(s.image_shape) for s in table.schema.sites if s.image_shape}
    rows, held = _split(y, data.get("test", 0.2 if labels not in (None, 0) else 0.0), seed)
    classes = len(names) - data.get("hidden_classes", 0)
    shown = _shown_labels(y[rows], labels, classes, len(names), seed)
    train = Batch.of({**_rows(values, rows), **shown}, len(rows))
    test, scored = (Batch.of(_rows(values, held)), held) if len(held) else (train, rows)
    return Task(
        train,
        y[rows],
        test,
        y[scored],
        images,
        names,
        {n: v[scored] for n, v in truth.items()},
        table.schema,
        table.schema.likelihoods,
        _known_classes(names, data),
        tuple(table.summary()),
    )


def _on_disk(data: Mapping[str, Any], kind: str, seed: int) -> Task:
    """Arrays by site: fitted on all rows; what is more than ``MANY`` of them stays on disk."""
    from pyrozoo.zoo import tables

    others = ("split", "missing", "hidden", "views", "columns", "drop", "index", "values")
    if given := [key for key in others if key in data]:
        raise ValueError(
            f"{data['file']}, a file of arrays, has no {', '.join(given)}; convert it to .npz or"
            " .parquet, which are read as tables"
        )
    opened = tables.open_rows(data["file"], label=data.get("label"))
    rows, names = opened.data, list(opened.label_names)
    y = torch.full((len(rows),), -1)
    if "y" in rows:
        known = rows.present("y")
        only = rows.drop(*(name for name in rows.names if name != "y"))
        y = torch.where(known, only[:]["y"], -1)
    labels = data.get("labels", "all" if kind == "semisupervised" else None)
    if labels not in (None, 0) and "y" not in rows:
        raise ValueError("labels are to be shown, but the data have none: name their array, label")
    rows = rows.drop("y")
    mine, held = _split(y, data.get("test", 0.2 if labels not in (None, 0) else 0.0), seed)
    classes = len(names) - data.get("hidden_classes", 0)
    shown = _shown_labels(y[mine], labels, classes, len(names), seed)
    train: Batch = (rows.select(mine) if len(held) else rows).add(shown)
    train = train[:] if len(train) <= MANY else train
    test: Batch = rows.select(held) if len(held) else train
    test = test[:] if len(held) and len(held) <= MANY else test
    return Task(
        train, y[mine], test, y[held] if len(held) else y,
        label_names=names, known_classes=_known_classes(names, data),
    )  # fmt: skip


def _image(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Channels, height and width."""
    channels, height, width = (1,) * (3 - len(shape)) + tuple(shape)
    return channels, height, width


def _nan_where_missing(name: str, given: Any) -> Tensor:
    batch = Batch.of({name: given})
    value, present = batch[name], batch.present(name)
    present = present.reshape(present.shape + (1,) * (value.dim() - present.dim()))
    return torch.where(present, value, torch.nan)


def _split(y: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Rows for training and, of those with a label, a share that is held out."""
    if not share:
        return torch.arange(len(y)), torch.arange(0)
    if not 0 < share < 1:
        raise ValueError(f"test is a share between 0 and 1, got {share}")
    known = (y >= 0).nonzero().squeeze(-1).numpy()
    if len(known) < 2:
        raise ValueError(f"holding out needs two labelled rows or more, got {len(known)}")
    count = min(max(1, round(share * len(known))), len(known) - 1)
    held = np.random.default_rng(seed + 1).permutation(known)[:count]
    mine = np.setdiff1d(np.arange(len(y)), held)
    return torch.from_numpy(mine), torch.from_numpy(np.sort(held))


def _rows(values: Mapping[str, Any], rows: Tensor) -> dict[str, Any]:
    def some(given: Any) -> Any:
        return tuple(v[rows] for v in given) if isinstance(given, tuple) else given[rows]

    return {name: some(given) for name, given in values.items()}
