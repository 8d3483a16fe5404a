"""Plain rivals of a fitted method, on the same rows and with the same scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from pyrozoo.inference import Stored, metrics
from pyrozoo.zoo import baselines
from pyrozoo.zoo.catalogue import Model
from pyrozoo.zoo.scoring import NUMERIC, agreement, entries, label_sets, table_errors
from pyrozoo.zoo.tasks import Task

LABELLED = 10_000  # rows for logistic regression


def plain_rivals(
    model: Model, task: Task, seed: int, epochs: int | None = None
) -> dict[str, dict[str, float]]:
    """Plain methods on the same rows, where there are any for the task.

    Images to cluster: k-means and a mixture, on pixels and on codes of an autoencoder.  Tables:
    each of scikit-learn's imputers, followed by a mixture of Gaussians with as many components.
    Facets: k-means with the clusters of the largest, fitted to the training rows.  Labels of all
    classes on complete rows: logistic regression on the labelled ones, at most ``LABELLED``.  None
    for rows on disk.
    """
    clusters = model.options.get("num_clusters")
    if isinstance(task.train, Stored):
        return {}
    if "y" in task.train:
        return _classifiers(task)
    known = task.labels >= 0
    labels = task.labels if bool(known.all()) else None
    if task.schema is not None:
        return _imputers(task, clusters, labels, seed)
    plain = task.train.names == ("x",) and not task.train.partly("x")
    if not plain or clusters is None:
        return {}
    if "latent_dims" in model.options:
        largest = max(clusters) if isinstance(clusters, Sequence) else clusters
        return {"kmeans": _one_clustering(task, largest, seed)}
    options = {key: model.options[key] for key in ("hidden", "latent_dim") if key in model.options}
    return baselines.clustering_baselines(
        task.train["x"], labels, clusters, seed=seed, epochs=epochs or 20, **options
    )


def _classifiers(task: Task) -> dict[str, dict[str, float]]:
    """Logistic regression on the labelled rows, scored as the method is."""
    shown, known = task.train.present("y"), task.test_labels >= 0
    plain = {"x", "y"} >= {*task.train.names, *task.test.names} and not task.train.partly("x")
    plain = plain and not task.test.partly("x") and task.known_classes is None
    if not plain or not bool(known.any()) or not 0 < int(shown.sum()) <= LABELLED:
        return {}
    train = task.train["x"][shown].flatten(1).float().cpu().numpy()
    test = task.test["x"][known].flatten(1).float().cpu().numpy()
    labels = task.train["y"][shown].cpu().numpy()
    if len(np.unique(labels)) < 2:
        return {}
    scaled = None if task.images else StandardScaler()  # pixels are in one unit
    fitted = make_pipeline(scaled, LogisticRegression(max_iter=2000)).fit(train, labels)
    found = np.zeros((len(test), 1 + int(max(labels.max(), task.test_labels.max()))))
    found[:, fitted.classes_] = fitted.predict_proba(test)
    probabilities, truth = torch.as_tensor(found), task.test_labels[known]
    return {
        "logistic": {
            "test_error": 1 - metrics.accuracy(truth, probabilities.argmax(1)),
            "calibration_error": metrics.calibration_error(probabilities, truth),
        }
    }


def _one_clustering(task: Task, size: int, seed: int) -> dict[str, float]:
    """What k-means on the training rows says of the test rows, for each set of labels."""
    train, test = (rows["x"].flatten(1).float().cpu().numpy() for rows in (task.train, task.test))
    clusters = KMeans(size, n_init=10, random_state=seed).fit(train).predict(test)
    figures: dict[str, float] = {}
    for name, labels, known in label_sets(task):
        figures |= agreement(labels, clusters[known], size, name)
    return figures


def _imputers(
    task: Task, clusters: int | None, labels: Tensor | None, seed: int
) -> dict[str, dict[str, float]]:
    columns = [c for site in task.schema.sites for c in site.columns]
    if not task.transductive or not columns or any(c.kind not in NUMERIC for c in columns):
        return {}
    values = torch.cat([task.train[s.name].double() for s in task.schema.sites], 1)
    known = torch.cat([entries(task.train, s.name) for s in task.schema.sites], 1)
    table: NDArray[Any] = np.where(known.numpy(), values.numpy(), np.nan)
    found = {}
    for name, full in baselines.imputers(table, seed).items():
        figures: dict[str, float] = {}
        if task.truth:
            figures |= table_errors(torch.from_numpy(full), task)
        if clusters is not None and labels is not None:
            spread = (full - full.mean(0)) / full.std(0).clip(1e-12)
            mixture = baselines.gmm(spread, clusters, seed)
            figures |= metrics.clustering_report(labels, mixture.predict_proba(spread))
        found[name] = figures
    return found
