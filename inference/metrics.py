"""Scores of clusterings, codes and predicted probabilities against true labels.

Every function takes numpy arrays, torch tensors or nested lists and returns plain Python or numpy
values. Throughout, ``N`` is the number of data, ``K`` the number of clusters, ``labels`` are the
true classes as integers of shape ``(N,)``, ``clusters`` are cluster indices as integers of shape
``(N,)``, and ``responsibilities`` is an array of shape ``(N, K)`` whose rows are probabilities
of the clusters given one datum. The names of labels and clusters carry no meaning, except in
:func:`accuracy` and :func:`calibration_error`, where a prediction has to say the label itself.
"""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from sklearn.metrics.cluster import contingency_matrix
from sklearn.neighbors import KNeighborsClassifier

Array: TypeAlias = NDArray[Any] | torch.Tensor | list[Any] | tuple[Any, ...]
"""What every metric accepts."""

ROW_SUM_TOLERANCE = 5e-3
"""How far from one a row of probabilities may sum, so that half precision passes."""


def accuracy(labels: Array, predicted: Array) -> float:
    """Return the fraction of data whose predicted label is the true label.

    Args:
        labels: True labels, integers of shape ``(N,)``.
        predicted: Predicted labels, integers of shape ``(N,)``, in the same naming.

    Returns:
        A number from 0 to 1, higher is better.
    """
    truth, guess = _paired(labels, predicted, "predicted")
    return float(np.mean(truth == guess))


def confusion(labels: Array, clusters: Array) -> NDArray[np.int64]:
    """Count how many data of each label fall in each cluster (the contingency matrix).

    Args:
        labels: True labels, integers of shape ``(N,)``.
        clusters: Cluster of each datum, integers of shape ``(N,)``.

    Returns:
        Integers of shape ``(distinct labels, distinct clusters)``; rows and columns follow the
        sorted distinct values, and a value that never occurs has no row or column.
    """
    truth, found = _paired(labels, clusters, "clusters")
    return contingency_matrix(truth, found).astype(np.int64)


def match_clusters(labels: Array, clusters: Array) -> dict[int, int]:
    """Name clusters by labels, one to one, so that most data agree (Hungarian algorithm).

    Args:
        labels: True labels, integers of shape ``(N,)``.
        clusters: Cluster of each datum, integers of shape ``(N,)``.

    Returns:
        A dictionary from cluster to label. Where there are more clusters than labels, the
        clusters left over are absent; where there are fewer, some labels name no cluster.

    The assignment is that of H. W. Kuhn, "The Hungarian method for the assignment problem",
    Naval Research Logistics Quarterly 2 (1955).
    """
    truth, found = _paired(labels, clusters, "clusters")
    rows, columns = linear_sum_assignment(contingency_matrix(truth, found), maximize=True)
    pairs = zip(np.unique(found)[columns], np.unique(truth)[rows], strict=True)
    return {int(cluster): int(label) for cluster, label in pairs}


def hungarian_accuracy(labels: Array, clusters: Array) -> float:
    """Return the accuracy under the best one-to-one naming of clusters by labels.

    This is the "unsupervised clustering accuracy" of J. Xie, R. Girshick, A. Farhadi,
    "Unsupervised deep embedding for clustering analysis" (ICML 2016). Data in clusters that
    :func:`match_clusters` leaves without a name count as wrong, so splitting a class over many
    clusters does not pay.

    Args:
        labels: True labels, integers of shape ``(N,)``.
        clusters: Cluster of each datum, integers of shape ``(N,)``; there may be more or fewer
            clusters than labels.

    Returns:
        A number above 0, up to 1, higher is better.
    """
    counts = confusion(labels, clusters)
    rows, columns = linear_sum_assignment(counts, maximize=True)
    return float(counts[rows, columns].sum() / counts.sum())


def majority_accuracy(labels: Array, clusters: Array) -> float:
    """Return the accuracy when every cluster is named by its most frequent label (purity).

    Several clusters may take the same label, so the score cannot fall when a cluster is split,
    and it is 1 with one cluster per datum; it is never below :func:`hungarian_accuracy`. The
    definition is that of C. D. Manning, P. Raghavan, H. Schütze, "Introduction to Information
    Retrieval" (2008), section 16.3.

    Args:
        labels: True labels, integers of shape ``(N,)``.
        clusters: Cluster of each datum, integers of shape ``(N,)``.

    Returns:
        A number above 0, up to 1, higher is better.
    """
    counts = confusion(labels, clusters)
    return float(counts.max(axis=0).sum() / counts.sum())


def most_confident_accuracy(labels: Array, responsibilities: Array) -> float:
    """Return the accuracy when one datum names each cluster, the one it holds most firmly.

    Cluster ``k`` takes the label of the single datum with the largest ``responsibilities[:, k]``
    (the first of them on a tie), and every datum the label of its largest responsibility. This
    is the error measure of A. Makhzani et al., "Adversarial autoencoders" (2015), used
    again by N. Dilokthanakul et al., "Deep unsupervised clustering with Gaussian mixture
    variational autoencoders" (2016). It needs one label per cluster, and is as noisy as that.

    Args:
        labels: True labels, integers of shape ``(N,)``.
        responsibilities: Probabilities of the clusters, shape ``(N, K)``.

    Returns:
        A number from 0 to 1, higher is better.
    """
    truth, probabilities = _labelled_rows(labels, responsibilities, "responsibilities")
    names = truth[probabilities.argmax(axis=0)]
    return float(np.mean(names[probabilities.argmax(axis=1)] == truth))


def nmi(labels: Array, clusters: Array) -> float:
    """Return the normalised mutual information of labels and clusters, ``2 I / (H + H')``.

    The mutual information is divided by the arithmetic mean of the two entropies
    (scikit-learn's ``normalized_mutual_info_score``, and its default).

    Args:
        labels: True labels, integers of shape ``(N,)``.
        clusters: Cluster of each datum, integers of shape ``(N,)``.

    Returns:
        A number from 0 (independent) to 1 (the same partition), not corrected for chance; two
        partitions of a single part each score 1.
    """
    truth, found = _paired(labels, clusters, "clusters")
    return float(normalized_mutual_info_score(truth, found, average_method="arithmetic"))


def ari(labels: Array, clusters: Array) -> float:
    """Return the adjusted Rand index: agreement over pairs of data, corrected for chance.

    The definition is that of L. Hubert and P. Arabie, "Comparing partitions", Journal of
    Classification 2 (1985).

    Args:
        labels: True labels, integers of shape ``(N,)``.
        clusters: Cluster of each datum, integers of shape ``(N,)``.

    Returns:
        A number from -0.5 to 1: 1 for the same partition, 0 on average for random ones.
    """
    truth, found = _paired(labels, clusters, "clusters")
    return float(adjusted_rand_score(truth, found))


def clusters_used(clusters: Array) -> int:
    """Count the clusters that at least one datum falls in.

    Args:
        clusters: Either the cluster of each datum, integers of shape ``(N,)``, or
            responsibilities of shape ``(N, K)``, where a datum falls in the cluster with its
            largest responsibility.

    Returns:
        A whole number from 1 to the number of clusters.
    """
    values = _numpy(clusters, "clusters")
    found = (
        _rows(clusters, "responsibilities").argmax(axis=1)
        if values.ndim == 2
        else _integers(clusters, "clusters")
    )
    return len(np.unique(found))


def clustering_report(labels: Array, responsibilities: Array) -> dict[str, float]:
    """Score one clustering by every measure of this module that needs only these two inputs.

    Args:
        labels: True labels, integers of shape ``(N,)``.
        responsibilities: Probabilities of the clusters, shape ``(N, K)``; each datum falls in
            the cluster with its largest responsibility.

    Returns:
        ``hungarian_accuracy``, ``majority_accuracy``, ``most_confident_accuracy``, ``nmi``,
        ``ari`` and ``clusters_used``, each as a float under the name of its function.
    """
    truth, probabilities = _labelled_rows(labels, responsibilities, "responsibilities")
    clusters = probabilities.argmax(axis=1)
    return {
        "hungarian_accuracy": hungarian_accuracy(truth, clusters),
        "majority_accuracy": majority_accuracy(truth, clusters),
        "most_confident_accuracy": most_confident_accuracy(truth, probabilities),
        "nmi": nmi(truth, clusters),
        "ari": ari(truth, clusters),
        "clusters_used": float(clusters_used(clusters)),
    }


def knn_error(
    train_latents: Array,
    train_labels: Array,
    test_latents: Array,
    test_labels: Array,
    k: int = 3,
) -> float:
    """Return the error of a k-nearest-neighbour classifier on latent codes.

    Each test code takes the most frequent label among its ``k`` nearest training codes in
    Euclidean distance (scikit-learn's ``KNeighborsClassifier``, uniform weights; a tie goes to
    the smaller label).

    Args:
        train_latents: Codes that vote, shape ``(N, D)``.
        train_labels: Their labels, integers of shape ``(N,)``.
        test_latents: Codes to classify, shape ``(M, D)``.
        test_labels: Their labels, integers of shape ``(M,)``.
        k: How many neighbours vote, from 1 to ``N``.

    Returns:
        The fraction of test codes classified wrongly, from 0 to 1, lower is better.
    """
    train, test = _matrix(train_latents, "train_latents"), _matrix(test_latents, "test_latents")
    train_truth = _integers(train_labels, "train_labels")
    test_truth = _integers(test_labels, "test_labels")
    _same_length(train_truth, train, "train_labels", "train_latents")
    _same_length(test_truth, test, "test_labels", "test_latents")
    if train.shape[1] != test.shape[1]:
        raise ValueError(
            "expected train_latents and test_latents of the same dimension, "
            f"got {train.shape[1]} and {test.shape[1]}"
        )
    k = _count(k, "k", f"from 1 to the {len(train)} training codes", len(train))
    classifier = KNeighborsClassifier(n_neighbors=k).fit(train, train_truth)
    return float(np.mean(classifier.predict(test) != test_truth))


def calibration_error(probabilities: Array, labels: Array, num_bins: int = 15) -> float:
    """Return the expected calibration error (ECE) of the most probable label.

    Data are sorted by the probability of their most probable label into ``num_bins`` bins of
    equal width, ``((m - 1) / M, m / M]``; the error is the mean over data of the distance
    between the accuracy and the mean probability in the datum's bin. See C. Guo, G. Pleiss,
    Y. Sun, K. Q. Weinberger, "On calibration of modern neural networks" (ICML 2017), equation 3.

    Args:
        probabilities: Probabilities of the labels 0 to ``K - 1``, shape ``(N, K)``.
        labels: True labels, integers from 0 to ``K - 1`` of shape ``(N,)``.
        num_bins: How many bins, at least 1.

    Returns:
        A number from 0 to 1, lower is better.
    """
    truth, predicted = _labelled_rows(labels, probabilities, "probabilities")
    classes = predicted.shape[1]
    if truth.min() < 0 or truth.max() >= classes:
        raise ValueError(
            f"expected labels from 0 to {classes - 1}, the columns of probabilities, "
            f"got {truth.min()} to {truth.max()}"
        )
    num_bins = _count(num_bins, "num_bins", "of at least 1")
    confidence = predicted.max(axis=1)
    correct = predicted.argmax(axis=1) == truth
    inner_edges = np.linspace(0, 1, num_bins + 1)[1:-1]
    bins = np.searchsorted(inner_edges, confidence, side="left")
    gaps = np.bincount(bins, weights=correct - confidence, minlength=num_bins)
    return float(np.abs(gaps).sum() / len(truth))


def _numpy(values: Array, name: str) -> NDArray[Any]:
    """Turn any accepted input into a numpy array, in double precision if it is floating."""
    if isinstance(values, np.ma.MaskedArray):
        raise ValueError(f"expected {name} without a mask; select the data that are known first")
    try:
        if isinstance(values, torch.Tensor):
            values = values.detach().cpu()
            return (values.double() if values.is_floating_point() else values).numpy()
        array = np.asarray(values)
    except (ValueError, TypeError) as error:
        raise ValueError(f"expected {name} to be an array: {error}") from error
    return array.astype(np.float64) if array.dtype.kind == "f" else array


def _count(value: int, name: str, expected: str, top: float = math.inf) -> int:
    """Check and return a whole number from 1."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"expected {name} {expected}, got {value!r}")
    if not 1 <= value <= top:
        raise ValueError(f"expected {name} {expected}, got {value}")
    return int(value)


def _integers(values: Array, name: str) -> NDArray[np.int64]:
    """Check and return a non-empty vector of integers."""
    array = _numpy(values, name)
    if array.ndim != 1:
        raise ValueError(f"expected {name} of shape (N,), got shape {array.shape}")
    if array.size == 0:
        raise ValueError(f"expected {name} of at least one datum, got none")
    if array.dtype.kind not in "iub":
        raise ValueError(f"expected {name} to be integers, got {array.dtype}")
    if array.dtype.kind == "u" and array.max() > np.iinfo(np.int64).max:
        raise ValueError(f"expected {name} below 2**63, got {array.max()}")
    return array.astype(np.int64)


def _matrix(values: Array, name: str) -> NDArray[np.float64]:
    """Check and return a non-empty matrix of finite numbers."""
    array = _numpy(values, name)
    if array.ndim != 2:
        raise ValueError(f"expected {name} of shape (N, columns), got shape {array.shape}")
    if array.size == 0:
        raise ValueError(f"expected {name} of at least one row and column, got {array.shape}")
    if array.dtype.kind not in "fiub":
        raise ValueError(f"expected {name} to be numbers, got {array.dtype}")
    bad = int(np.count_nonzero(~np.isfinite(array)))
    if bad:
        raise ValueError(f"expected {name} to be finite, got {bad} NaN or infinite entries")
    return array.astype(np.float64)


def _rows(values: Array, name: str) -> NDArray[np.float64]:
    """Check and return a matrix whose rows are probabilities."""
    matrix = _matrix(values, name)
    if matrix.min() < 0:
        raise ValueError(f"expected {name} of at least 0, got {matrix.min():g}")
    sums = matrix.sum(axis=1)
    worst = int(np.abs(sums - 1).argmax())
    if abs(sums[worst] - 1) > ROW_SUM_TOLERANCE:
        raise ValueError(f"expected rows of {name} to sum to 1, got {sums[worst]:g} in row {worst}")
    return matrix


def _same_length(first: NDArray[Any], second: NDArray[Any], name: str, other: str) -> None:
    """Check that two arrays speak of the same number of data."""
    if len(first) != len(second):
        raise ValueError(
            f"expected {name} and {other} of the same length, got {len(first)} and {len(second)}"
        )


def _paired(labels: Array, other: Array, name: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Check and return labels with a second vector of integers of the same length."""
    truth, second = _integers(labels, "labels"), _integers(other, name)
    _same_length(truth, second, "labels", name)
    return truth, second


def _labelled_rows(
    labels: Array, rows: Array, name: str
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Check and return labels with a matrix of probabilities of the same length."""
    truth, probabilities = _integers(labels, "labels"), _rows(rows, name)
    _same_length(truth, probabilities, "labels", name)
    return truth, probabilities
