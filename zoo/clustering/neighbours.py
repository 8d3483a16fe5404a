"""Clusters to start from: parts of a graph that joins each row to its nearest neighbours.

A mixture of Gaussians asks that clusters are ellipsoids; rows of one class rather lie along a bent
sheet.  Here they are only asked to be joined by neighbours::

    W = 1 where one row is among the other's nearest neighbours       (symmetric)
    cut(clusters) = sum_k (1 - links within k / links of k)           the normalised cut
    uneven(clusters) = ln K - entropy of the clusters' sizes          zero if all are equal

:func:`cut_graph` looks for the K clusters with the least cut: k-means on the leading eigenvectors
of the normalised graph, from several starts and with several numbers of eigenvectors, then each
row joins the majority of its neighbours.  :func:`spread_labels` is for rows of which some are
labelled.  No label is looked at but those given.

Sources: Jianbo Shi, Jitendra Malik, "Normalized cuts and image segmentation" (2000); Andrew Y. Ng,
Michael I. Jordan, Yair Weiss, "On spectral clustering: analysis and an algorithm" (2001); Dengyong
Zhou, Olivier Bousquet, Thomas N. Lal, Jason Weston, Bernhard Schölkopf, "Learning with local and
global consistency" (2003).  That the graph is that of an autoencoder's codes: Ryan McConville, Raul
Santos-Rodriguez, Robert J. Piechocki, Ian Craddock, "N2D: (not too) deep clustering via clustering
the local manifold of an autoencoded embedding" (2020), who use UMAP.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.optimize import linear_sum_assignment
from scipy.sparse.csgraph import connected_components
from scipy.sparse.linalg import LinearOperator, cg, eigsh
from scipy.special import xlogy
from sklearn.cluster import KMeans
from sklearn.neighbors import NearestNeighbors

Array = NDArray[Any]

Clusters: TypeAlias = Literal["mixture", "neighbours"]  # what a method may start from

ROUNDS = 30  # most rounds in which rows join the majority of their neighbours


class Cut(NamedTuple):
    """A partition of a graph.

    Attributes:
        clusters: of each row, ``(N,)``.
        share: of each row's neighbours in each cluster, ``(N, K)``.
        cut: the normalised cut, from 0 to K; less is better.
    """

    clusters: Array
    share: Array
    cut: float


def neighbour_graph(codes: Array, num_neighbors: int = 15) -> Any:
    """The symmetric graph of nearest neighbours, a sparse matrix ``(N, N)`` of zeros and ones.

    Args:
        codes: ``(N, D)``; Euclidean distances are taken.
        num_neighbors: of each row; rows have more where they are the neighbour of others.

    Raises:
        ValueError: codes are no finite matrix, or there are not more rows than neighbours.
    """
    codes = np.asarray(codes)
    if codes.ndim != 2 or not np.isfinite(codes).all():
        raise ValueError(f"codes are finite and of shape (N, D), got {codes.shape}")
    check_neighbors(num_neighbors, len(codes))
    graph = NearestNeighbors(n_neighbors=num_neighbors).fit(codes).kneighbors_graph()
    return graph.maximum(graph.T).tocsr()


def check_neighbors(num_neighbors: int, rows: int) -> None:
    """Refuse a number of neighbours that so many rows do not have (ValueError)."""
    if not 1 <= num_neighbors < rows:
        raise ValueError(
            f"num_neighbors is from 1 to the {rows} rows less one, got {num_neighbors}"
        )


def normalised_cut(graph: Any, clusters: Array, num_clusters: int) -> float:
    """The normalised cut of a partition: from 0, no link between clusters, to K.

    Args:
        graph: symmetric, ``(N, N)``.
        clusters: integers ``(N,)``; a cluster without rows counts one.
        num_clusters: K.
    """
    member = np.eye(num_clusters)[clusters]
    within = (member * (graph @ member)).sum(0)
    links = np.asarray(graph.sum(1)).ravel() @ member
    return float((1 - within / np.maximum(links, 1e-12)).sum())


def cut_graph(
    graph: Any, num_clusters: int, *, num_starts: int = 10, balance: float = 0.0, seed: int = 0
) -> Cut:
    """The partition with the least normalised cut that was found, or the least sum.

    Two partitions may have nearly the same cut: the right one, and one in which a cluster is split
    and two others are joined.  With ``balance`` the least ``cut + balance * uneven`` is taken: it
    prefers clusters of like sizes.

    For each number of eigenvectors from K to K + 5 (K of them would do if clusters hardly touched;
    where one of the first shows a part of a cluster, the next is needed) k-means has
    ``num_starts`` starts.

    Args:
        graph: symmetric, ``(N, N)``, each row with a neighbour.
        num_clusters: K.
        num_starts: of k-means, for each number of eigenvectors.
        balance: weight of the unevenness of sizes, not negative.
        seed: of all of it.

    Raises:
        ValueError: there are not at least K + 6 rows, or ``balance`` is negative.
    """
    if balance < 0:
        raise ValueError(f"balance is not negative, got {balance}")
    most = num_clusters + 5
    if graph.shape[0] <= most:
        raise ValueError(
            f"{num_clusters} clusters need at least {most + 1} rows, got {graph.shape[0]}"
        )
    generator = np.random.default_rng(seed)
    vectors = _leading(graph, num_clusters, most, generator.normal(size=graph.shape[0]))
    found: list[tuple[float, Array]] = []
    for count in range(num_clusters, most + 1):
        some = vectors[:, :count]
        some = some / np.linalg.norm(some, axis=1, keepdims=True).clip(1e-12)
        for _ in range(num_starts):
            start = int(generator.integers(2**31))
            clusters = KMeans(num_clusters, n_init=1, random_state=start).fit(some).labels_
            cost = normalised_cut(graph, clusters, num_clusters)
            found.append((cost + balance * _uneven(clusters, num_clusters), clusters))
    clusters = min(found, key=lambda pair: pair[0])[1]
    for _ in range(ROUNDS):
        before, clusters = clusters, (graph @ np.eye(num_clusters)[clusters]).argmax(1)
        if (before == clusters).all():
            break
    share = graph @ np.eye(num_clusters)[clusters]
    share /= share.sum(1, keepdims=True)
    return Cut(clusters, share, normalised_cut(graph, clusters, num_clusters))


def spread_labels(
    graph: Any, labels: Array, known: Array, num_classes: int, *, alpha: float = 0.99, seed: int = 0
) -> Cut:
    """The classes of all rows, where some are labelled: labels spread along the graph.

    Solves ``F = alpha S F + (1 - alpha) Y`` with the normalised graph S and Y, the one-hot labels
    divided by the number of rows that have the label.  Classes that no row is labelled with take
    the parts of :func:`cut_graph` (of like sizes) that agree least with the labelled ones.

    Args:
        graph: symmetric, ``(N, N)``, each row with a neighbour.
        labels: integers ``(N,)``, read where known.
        known: boolean, ``(N,)``.
        num_classes: K.
        alpha: from 0 to 1, how far labels spread.
        seed: of the partition for classes without labels.

    Returns:
        classes ``(N,)``, those of labelled rows as given; shares ``(N, K)``; and the cut.

    Raises:
        ValueError: no row is known, or a label is not from 0 to K - 1.
    """
    labels, known = np.asarray(labels), np.asarray(known, dtype=bool)
    if not known.any():
        raise ValueError("labels are spread from labelled rows, but none is known")
    if labels[known].min() < 0 or labels[known].max() >= num_classes:
        raise ValueError(f"labels are from 0 to {num_classes - 1}, got {np.unique(labels[known])}")
    given = np.zeros((len(labels), num_classes))
    given[known, labels[known]] = 1
    empty = np.setdiff1d(np.arange(num_classes), labels[known])
    if len(empty):
        parts = cut_graph(graph, num_classes, balance=1.0, seed=seed).clusters
        agreement = given.T @ np.eye(num_classes)[parts]
        _, part = linear_sum_assignment(agreement, maximize=True)
        for k in empty:
            given[(parts == part[k]) & ~known, k] = 1
    system = sparse.identity(len(labels)) - alpha * _normalised(graph)
    given /= given.sum(0)
    share = np.stack([cg(system, y, rtol=1e-5, maxiter=1000)[0] for y in given.T], 1).clip(0)
    share = (share + 1e-12) / (share + 1e-12).sum(1, keepdims=True)
    share[known] = np.eye(num_classes)[labels[known]]
    classes = share.argmax(1)
    return Cut(classes, share, normalised_cut(graph, classes, num_classes))


def neighbour_parts(
    codes: Array,
    num_clusters: int,
    labels: Array | None = None,
    known: Array | None = None,
    *,
    num_neighbors: int = 15,
    num_starts: int = 10,
    balance: float = 0.0,
    seed: int = 0,
) -> Array:
    """The clusters ``(N,)`` of codes by their graph: its parts, or labels that spread along it.

    Args:
        codes: ``(N, D)``.
        num_clusters: K.
        labels, known: see :func:`spread_labels`; without them :func:`cut_graph` finds the parts.
        num_neighbors: of each row in the graph.
        num_starts, balance: see :func:`cut_graph`.
        seed: of all of it.
    """
    graph = neighbour_graph(codes, num_neighbors)
    if labels is not None and known is not None:
        return spread_labels(graph, labels, known, num_clusters, seed=seed).clusters
    found = cut_graph(graph, num_clusters, num_starts=num_starts, balance=balance, seed=seed)
    return found.clusters


def _uneven(clusters: Array, num_clusters: int) -> float:
    """ln K less the entropy of the clusters' sizes, in nats."""
    share = np.bincount(clusters, minlength=num_clusters) / len(clusters)
    return float(np.log(num_clusters) + xlogy(share, share).sum())


def _leading(graph: Any, num_clusters: int, count: int, first: Array) -> Array:
    """Leading eigenvectors of the normalised graph, ``(N, count)``, from the iterate ``first``.

    Parts of the graph that no link joins have the same eigenvalue, one, of whose vectors the
    iteration finds a single one.  They are put in by hand for parts of at least half an even share
    of the rows; smaller ones are islands, not clusters.
    """
    matrix = _normalised(graph)
    parts = connected_components(graph)[1]
    large = np.flatnonzero(np.bincount(parts) >= len(parts) / (2 * num_clusters))
    if len(large) < 2:
        return eigsh(matrix, k=count, which="LA", tol=1e-4, v0=first)[1][:, ::-1]
    known = np.sqrt(np.asarray(graph.sum(1))) * (parts[:, None] == large[:count])
    known /= np.linalg.norm(known, axis=0)
    if (left := count - known.shape[1]) == 0:
        return known

    def rest(vector: Array) -> Array:
        return matrix @ vector - 2 * known @ (known.T @ vector)

    others = LinearOperator(matrix.shape, matvec=rest, dtype=matrix.dtype)
    found = eigsh(others, k=left, which="LA", tol=1e-4, v0=first)[1][:, ::-1]
    return np.concatenate([known, found], 1)


def _normalised(graph: Any) -> Any:
    """The graph divided by the roots of the numbers of links at both ends."""
    root = sparse.diags(1 / np.sqrt(np.maximum(np.asarray(graph.sum(1)).ravel(), 1e-12)))
    return root @ graph @ root
