"""A mixture of independent normal columns in which entries may be missing: clusters to start from.

Generative process, for every row of features::

    y ~ Categorical(weights)
    f_d | y ~ Normal(mean[y, d], variance[y, d])

Missing entries are left out of the likelihood, which is exact, since features are independent given
the cluster.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from scipy.special import logsumexp
from sklearn.cluster import KMeans

Array = NDArray[Any]

MAX_ROWS = 5000  # to which a mixture is fitted; the others are only assigned
FLOOR = 0.05  # least variance, so that no component shrinks onto a few rows


class Components(NamedTuple):
    """Parameters of a mixture: log-weights ``(K,)``, means and precisions ``(K, F)``."""

    log_weights: Array
    means: Array
    precisions: Array


def cluster_rows(
    features: Any,
    present: Any,
    num_clusters: int,
    labels: Any = None,
    *,
    num_starts: int = 10,
    max_iter: int = 200,
    seed: int = 0,
) -> Array:
    """The most probable cluster of every row, ``(N,)``, by the likeliest of several runs of EM.

    Each run starts from k-means on the features with zeros in place of missing entries.

    Args:
        features: shape ``(N, F)``, on a scale where the centre is zero and a typical spread one.
        present: boolean, shape ``(N, F)``.
        num_clusters: K.
        labels: clusters of the rows where they are known, else -1, shape ``(N,)``; they are kept.
        num_starts: runs of EM.
        max_iter: most steps of EM in a run.
        seed: of the starts, and of the rows that are used if there are more than 5000.

    Raises:
        ValueError: there are fewer rows than clusters.
    """
    known = np.asarray(present, dtype=np.float64)
    x = np.where(known > 0, np.asarray(features, dtype=np.float64), 0.0)
    named = np.full(len(x), -1) if labels is None else np.asarray(labels)
    if len(x) < num_clusters:
        raise ValueError(f"{num_clusters} clusters need as many rows, got {len(x)}")
    rows = np.random.default_rng(seed).permutation(len(x))[:MAX_ROWS]
    fits = [
        _fit(x[rows], known[rows], named[rows], num_clusters, max_iter, seed + start)
        for start in range(num_starts)
    ]
    _, best = max(fits, key=lambda fit: fit[0])
    found = _log_joint(x, known, best).argmax(1)
    return np.where(named >= 0, named, found)


def _fit(
    x: Array, known: Array, named: Array, size: int, max_iter: int, seed: int
) -> tuple[float, Components]:
    """One run of EM: the mean log-likelihood of a row, and the components."""
    labels = KMeans(size, n_init=1, random_state=seed).fit(x).labels_
    certain, sure = named >= 0, np.eye(size)[named]
    share = np.eye(size)[labels]
    share = share[:, linear_sum_assignment(sure[certain].T @ share[certain], maximize=True)[1]]
    score = -np.inf
    for _ in range(max_iter):
        share = np.where(certain[:, None], sure, share)
        components = _maximise(x, known, share)
        log_joint = _log_joint(x, known, components)
        evidence = logsumexp(log_joint, 1)
        share = np.exp(log_joint - evidence[:, None])
        before, score = score, np.where(certain, log_joint[range(len(x)), named], evidence).mean()
        if score - before < 1e-7:
            break
    return float(score), components


def _maximise(x: Array, known: Array, share: Array) -> Components:
    """The likeliest components for these responsibilities, but for a thousandth of a row."""
    weight = share.T @ known + 1e-3
    means = (share.T @ x) / weight
    variances = ((share.T @ x**2) + 1e-3) / weight - means**2
    log_weights = np.log((share.sum(0) + 1e-3) / (len(x) + 1e-3 * share.shape[1]))
    return Components(log_weights, means, 1 / variances.clip(FLOOR))


def _log_joint(x: Array, known: Array, components: Components) -> Array:
    """Log p(y, f) of the known entries of all rows, ``(N, K)``."""
    log_weights, means, precisions = components
    square = x**2 @ precisions.T - 2 * x @ (means * precisions).T
    square = square + known @ (means**2 * precisions).T
    return log_weights - (square + known @ np.log(2 * np.pi / precisions).T) / 2
