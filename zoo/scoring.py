"""Scores of a fitted method on its task."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pyrozoo.guides import Mean
from pyrozoo.inference import Batch, Result, metrics, predict
from pyrozoo.zoo.tasks import Task

DRAWS, LEVEL = 200, 0.9
PERMUTATIONS = 20  # of labels, for what an accuracy is by chance
NUMERIC = ("real", "positive", "count", "proportion")


def score(result: Result, task: Task, num_particles: int = 0) -> dict[str, float]:
    """The figures of a fitted method; which ones depends on what was observed.

    Several modalities of images: for each the mean squared error of predicting it from the others
    on test rows, beside that of the training mean (``mse_*``, ``mean_mse_*``).  Labels shown: the
    share of test rows whose most probable label is wrong (``test_error``), and the calibration
    error; with hidden classes also :func:`open_set`.  A finite site ``y`` and no labels: the
    clustering metrics on the rows that it was fitted to, and where test rows are others, on these,
    too (``test_*``, clusters matched on the test rows), and :func:`neighbours`.  Hidden pixels: the
    mean squared error of predicting them on test rows, beside that of the training mean.  Hidden
    entries of a table: :func:`imputation`.  Facets ``c_1``, ``c_2``..: :func:`facets`.  With
    ``num_particles``: ``test_log_evidence`` of the test rows, from so many draws, in nats per row.
    """
    figures: dict[str, float] = {}
    finite = any(line.startswith("y: ") for line in result.sites)
    known = task.test_labels >= 0
    if finite and "y" in task.train and bool(known.any()):
        probabilities = result.responsibilities(task.test.drop("y"), seed=0)[known]
        labels = task.test_labels[known]
        if task.known_classes is None:
            figures["test_error"] = 1 - metrics.accuracy(labels, probabilities.argmax(1))
            figures["calibration_error"] = metrics.calibration_error(probabilities, labels)
        else:
            figures |= open_set(labels, probabilities, task.known_classes)
    elif finite and bool((task.labels >= 0).any()):
        known = task.labels >= 0
        probabilities = result.responsibilities(task.train, seed=0)[known]
        figures |= metrics.clustering_report(task.labels[known], probabilities)
        known = task.test_labels >= 0
        if not task.transductive and bool(known.any()):
            probabilities = result.responsibilities(task.test, seed=0)[known]
            report = metrics.clustering_report(task.test_labels[known], probabilities)
            figures |= {f"test_{name}": value for name, value in report.items()}
            figures |= neighbours(result, task)
    if any(line.startswith("c_1: ") for line in result.sites):
        figures |= facets(result, task)
    if task.truth and task.schema is not None:
        figures |= imputation(result, task)
    elif task.truth:
        figures |= _pixels(result, task)
    if task.images and len(task.test.names) > 1 and "x" not in task.test:
        figures |= _cross_errors(result, task)
    if num_particles:
        figures["test_log_evidence"] = float(result.log_evidence(task.test, num_particles).mean())
    return figures


def neighbours(result: Result, task: Task) -> dict[str, float]:
    """Errors of k nearest neighbours on the means of z, if the guide proposes it.

    Training rows with a label vote; the errors are those of the labelled test rows.

    Returns:
        ``knn3_error``, ``knn5_error`` and ``knn10_error``.
    """
    if not any(line.startswith("z: proposed") for line in result.sites):
        return {}
    codes, known = [], []
    for batch, labels in ((task.train, task.labels), (task.test, task.test_labels)):
        guide = Mean(cast(nn.Module, result.guide))
        means = predict(result.program, guide, batch, "z", num_samples=1, seed=0)
        codes.append(means[labels >= 0].flatten(1))
        known.append(labels[labels >= 0])
    return {
        f"knn{k}_error": metrics.knn_error(codes[0], known[0], codes[1], known[1], k)
        for k in (3, 5, 10)
        if k <= len(codes[0])
    }


def open_set(labels: Tensor, probabilities: Tensor, known_classes: int) -> dict[str, float]:
    """Accuracies where the last classes had no labelled row.

    A class with labelled rows has to be named; the others have to be found: each of the remaining
    values of y is matched with one of them, one to one, so that most rows agree (Hungarian).

    Args:
        labels: true classes, ``(rows,)``.
        probabilities: ``(rows, K)``, the first ``known_classes`` columns in the order of classes.
        known_classes: how many classes had labelled rows.

    Returns:
        ``open_accuracy`` over all rows, ``known_accuracy`` and ``new_accuracy`` of the rows of
        classes with and without labelled rows, and ``new_recall``, the share of rows of new classes
        that were given no known label.
    """
    found = probabilities.argmax(1).numpy()
    truth = np.asarray(labels)
    new, fresh = truth >= known_classes, found >= known_classes
    both = new & fresh
    matched = metrics.match_clusters(truth[both], found[both]) if both.any() else {}
    named = np.array([matched.get(int(k), -1) if k >= known_classes else k for k in found])
    right = named == truth
    return {
        "open_accuracy": float(right.mean()),
        "known_accuracy": float(right[~new].mean()) if (~new).any() else float("nan"),
        "new_accuracy": float(right[new].mean()) if new.any() else float("nan"),
        "new_recall": float(fresh[new].mean()) if new.any() else float("nan"),
    }


def facets(result: Result, task: Task) -> dict[str, float]:
    """How well the clusters of each facet agree with each set of labels, on test rows.

    Every cluster of a facet is named by its majority label among the test rows, as Falck et al.
    (2021) do, and so is each set of labels given to a facet: the one of the best accuracy.  A row
    is in the cluster that is most probable on average over draws of the guide; they take the mean
    of q for the draw.

    Returns:
        For each facet c_j and set of labels ``majority_accuracy_c_j_<set>``, with
        ``chance_c_j_<set>``, the mean of what it is if the labels are permuted, and
        ``clusters_used_c_j``; for each set what :func:`agreement` says of the best facet, and
        ``facet_<set>``, its j.  No ``_<set>`` where rows are labelled in one way only.
    """
    found = {}
    for site in [line.partition(":")[0] for line in result.sites if line.startswith("c_")]:
        probabilities = result.responsibilities(task.test.drop(site), site, seed=0)
        found[site] = (probabilities.argmax(1).cpu().numpy(), probabilities.shape[1])
    figures = {f"clusters_used_{s}": float(metrics.clusters_used(c)) for s, (c, _) in found.items()}
    for name, labels, known in label_sets(task):
        generator = np.random.default_rng(0)
        for site, (clusters, _) in found.items():
            right = metrics.majority_accuracy(labels, clusters[known])
            chance = [
                metrics.majority_accuracy(generator.permutation(labels), clusters[known])
                for _ in range(PERMUTATIONS)
            ]
            figures[f"majority_accuracy_{site}{name}"] = right
            figures[f"chance_{site}{name}"] = float(np.mean(chance))
        best = max(found, key=lambda s: figures[f"majority_accuracy_{s}{name}"])
        clusters, size = found[best]
        figures |= agreement(labels, clusters[known], size, name)
        figures[f"facet{name}"] = float(best.removeprefix("c_"))
    return figures


def agreement(labels: Any, clusters: Any, size: int, suffix: str = "") -> dict[str, float]:
    """Majority accuracy and NMI, and with as many clusters as labels the one-to-one accuracy.

    Args:
        labels, clusters: of each row, integers of shape ``(rows,)``.
        size: how many clusters there are, used or not.
        suffix: of the names of the figures.
    """
    figures = {
        f"majority_accuracy{suffix}": metrics.majority_accuracy(labels, clusters),
        f"nmi{suffix}": metrics.nmi(labels, clusters),
    }
    if size == len(np.unique(labels)):
        figures[f"hungarian_accuracy{suffix}"] = metrics.hungarian_accuracy(labels, clusters)
    return figures


def label_sets(task: Task) -> list[tuple[str, NDArray[Any], NDArray[Any]]]:
    """Suffix, labels of the test rows that have one, and which these are, of each set."""
    sets = {f"_{n}": v for n, v in task.label_sets.items()} or {"": task.test_labels}
    arrays = [(name, np.asarray(v.cpu())) for name, v in sets.items()]
    return [(name, v[v >= 0], v >= 0) for name, v in arrays if (v >= 0).any()]


def imputation(result: Result, task: Task) -> dict[str, float]:
    """How well hidden entries of a table are filled in.

    Returns:
        ``rmse_hidden``, the root of the mean squared error of numeric entries in standard
        deviations of their column, ``error_hidden``, the share of wrong levels, and
        ``coverage_hidden``, the share of hidden numeric entries in their central 90 % interval.
    """
    draws = result.posterior(task.test, DRAWS, predictive=True, importance=True, seed=0)
    guess, inside = [], []
    for name in task.truth:
        some = draws[name].double()
        low, high = (torch.quantile(some, q, 0) for q in ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
        truth = task.truth[name].double()
        inside.append((truth >= low) & (truth <= high))
        middle = some.mean(0)
        levels = ~_numeric_columns(task.schema.site(name))
        middle[:, levels] = some[:, :, levels].mode(0).values
        guess.append(middle)
    error = table_errors(torch.cat(guess, 1), task)
    where = _hidden(task) & _numeric(task)
    if bool(where.any()):
        error["coverage_hidden"] = float(torch.cat(inside, 1)[where].double().mean())
    return error


def table_errors(guess: Tensor, task: Task) -> dict[str, float]:
    """Errors of a guess of all entries, in those that were hidden: see :func:`imputation`."""
    truth = torch.cat([task.truth[n].double() for n in task.truth], 1)
    hidden, numeric = _hidden(task), _numeric(task)
    known = torch.cat([entries(task.train, n) for n in task.truth], 1)
    values = torch.cat([task.train[n].double() for n in task.truth], 1)
    count = known.sum(0).clamp(min=2)
    mean = (values * known).sum(0) / count
    spread = (((values - mean) * known).square().sum(0) / count).sqrt()
    spread = torch.where(spread > 1e-12, spread, 1.0)  # a pixel may be black in every row
    figures = {}
    if bool((hidden & numeric).any()):
        scaled = ((guess - truth) / spread).square()
        figures["rmse_hidden"] = float(scaled[hidden & numeric].mean().sqrt())
    if bool((hidden & ~numeric).any()):
        figures["error_hidden"] = float((guess != truth)[hidden & ~numeric].double().mean())
    return figures


def entries(batch: Batch, name: str) -> Tensor:
    """Presence of every entry, ``(rows, columns)``."""
    present = batch.present(name)
    shape = (*present.shape, *[1] * (2 - present.dim()))
    return present.reshape(shape).expand(batch.shape(name))


def _hidden(task: Task) -> Tensor:
    """Entries that were hidden although somebody knows them, ``(rows, columns of all sites)``."""
    hidden = [~entries(task.test, n) & ~t.isnan() for n, t in task.truth.items()]
    return torch.cat(hidden, 1)


def _numeric(task: Task) -> Tensor:
    return torch.cat([_numeric_columns(task.schema.site(n)) for n in task.truth]).unsqueeze(0)


def _numeric_columns(site: Any) -> Tensor:
    """Which columns of a site are numbers, ``(columns,)``; pixels are."""
    if not site.columns:
        return torch.ones(site.width, dtype=torch.bool)
    return torch.tensor([c.kind in NUMERIC for c in site.columns])


def _pixels(result: Result, task: Task) -> dict[str, float]:
    truth, hidden = task.truth["x"], ~task.test.present("x")
    mean = task.train["x"].sum(0) / task.train.present("x").sum(0).clamp(min=1)
    guess = result.predict(task.test, "x", num_samples=100, seed=0)
    return {
        "mse_hidden": float((guess - truth).square()[hidden].mean()),
        "mean_mse_hidden": float((mean - truth).square()[hidden].mean()),
    }


def _cross_errors(result: Result, task: Task) -> dict[str, float]:
    figures = {}
    for name in task.test.names:
        guess = result.predict(task.test, name, observed="ignore", num_samples=100, seed=0)
        known = task.train[name][task.train.present(name)]
        truth = task.test[name]
        figures[f"mse_{name}"] = float((guess - truth).square().mean())
        figures[f"mean_mse_{name}"] = float((known.mean(0) - truth).square().mean())
    return figures
