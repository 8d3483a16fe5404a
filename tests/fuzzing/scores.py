"""Fuzzing the metrics, against their definitions."""

import functools
import math

import numpy as np
import torch

from fuzzing.core import NO_COUNT, attempt, chance, laid_out, must, pick
from pyrozoo.inference import metrics


def some_form(rng, values):
    """Values as an array of another type or layout, a tensor, or nested lists."""
    how = pick(rng, ["array", "small", "tensor", "list", "tuple", "read-only", "reversed"])
    if how == "small" and values.dtype.kind == "i":
        return values.astype(pick(rng, ["i1", "u1", "u8", ">i2"]))
    if how == "small":
        return values.astype(pick(rng, ["f4", ">f8"]))
    if how in ("tensor", "list", "tuple"):
        return {"tensor": torch.tensor, "list": np.ndarray.tolist, "tuple": lambda v: tuple(v)}[
            how
        ](values)
    return laid_out(rng, values)


def scores(rng):
    """The metrics, against their definitions."""
    n, k = int(rng.integers(1, 12)), int(rng.integers(1, 5))
    labels, clusters = rng.integers(0, pick(rng, [1, 3]), n), rng.integers(0, k, n)
    shares = np.float64(np.float32(rng.dirichlet(np.ones(k), n)))
    form = functools.partial(some_form, rng)
    two = {
        "accuracy": "predicted", "confusion": "clusters", "match_clusters": "clusters",
        "hungarian_accuracy": "clusters", "majority_accuracy": "clusters", "nmi": "clusters",
        "ari": "clusters",
    }  # fmt: skip
    shared = {
        "most_confident_accuracy": "responsibilities",
        "clustering_report": "responsibilities",
    }
    name = pick(rng, [*two, *shared, "clusters_used", "calibration_error", "knn_error"])
    function = getattr(metrics, name)
    if chance(rng, 0.4):
        _refused_metric(rng, name, two.get(name) or shared.get(name))
    elif name in two:
        found = attempt(lambda: function(form(labels), form(clusters)), spoilt=False)
        _check_metric(name, found, labels, clusters)
        names = rng.permutation(k)  # of the clusters, which mean nothing
        if name not in ("accuracy", "confusion", "match_clusters"):
            must(math.isclose(found, function(labels, names[clusters]), abs_tol=1e-9), "names")
    elif name in shared:
        found = attempt(lambda: function(form(labels), form(shares)), spoilt=False)
        values = found.values() if isinstance(found, dict) else [found]
        order = rng.permutation(k)
        again = function(labels, shares[:, order])
        if isinstance(found, dict):
            must(found.pop("clusters_used") == len(set(shares.argmax(1))), "clusters used")
            again.pop("clusters_used")
            again = list(again.values())
        must(all(-0.5 - 1e-9 <= v <= 1 + 1e-9 for v in values), "range")
        must(np.allclose(list(values), again), "names of clusters")
    elif name == "clusters_used":
        given = pick(rng, [clusters, shares])
        want = len(set((clusters if given is clusters else shares.argmax(1)).tolist()))
        must(attempt(lambda: function(form(given)), spoilt=False) == want, "clusters used")
    elif name == "calibration_error":
        bins = int(rng.integers(1, 20))
        truth = rng.integers(0, k, n)
        found = attempt(lambda: function(form(shares), form(truth), bins), spoilt=False)
        confidence, right = shares.max(1), shares.argmax(1) == truth
        want = sum(
            abs((right[inside] - confidence[inside]).sum()) / n
            for m in range(bins)
            if (inside := (confidence > m / bins) & (confidence <= (m + 1) / bins)).any()
        )
        must(math.isclose(found, want, abs_tol=2e-3), f"calibration error {found} for {want}")
    else:
        codes, others = rng.normal(size=(n, 2)), rng.normal(size=(3, 2))
        found = attempt(
            lambda: function(form(codes), form(labels), form(others), [0, 1, 0], n), spoilt=False
        )
        most = np.bincount(labels).argmax()
        must(math.isclose(found, np.mean(most != np.array([0, 1, 0]))), "all neighbours vote")


def _check_metric(name, found, labels, clusters):
    table = np.array(
        [[((clusters == c) & (labels == l)).sum() for c in np.unique(clusters)]
         for l in np.unique(labels)]
    )  # fmt: skip
    if name == "accuracy":
        must(found == np.mean(labels == clusters), "accuracy")
    elif name == "confusion":
        must(found.dtype == np.int64 and np.array_equal(found, table), "confusion")
    elif name == "match_clusters":
        must(len(set(found.values())) == len(found) == min(table.shape), "one to one")
    elif name == "majority_accuracy":
        must(math.isclose(found, table.max(0).sum() / len(labels)), "majority accuracy")
    else:
        must(-0.5 - 1e-9 <= found <= 1 + 1e-9, "range")


def _refused_metric(rng, name, second):
    n = 6
    labels, shares = rng.integers(0, 2, n), rng.dirichlet(np.ones(3), n)
    vectors = {
        "floats": labels + 0.0, "text": labels.astype(str), "two dimensions": labels[:, None],
        "none": labels[:0], "a scalar": np.array(1), "complex": labels + 0j,
        "objects": labels.astype(object), "ragged": [[0], [1, 2], 0, 1, 1, 0],
        "masked": np.ma.array(labels, mask=labels == 0), "sparse": torch.ones(n).long().to_sparse(),
        "large": np.full(n, 2**63 + 1, np.uint64), "None": None, "a word": "labels",
        "fewer": labels[:-1],
    }  # fmt: skip
    tables = {
        "NaN": np.where(np.eye(n, 3) > 0, np.nan, shares), "negative": shares - 1,
        "sums": shares * 1.1, "a vector": shares[:, 0], "cube": shares[:, :, None],
        "no columns": shares[:, :0], "text": shares.astype(str), "ragged": [[1.0], [0.5, 0.5]] * 3,
        "masked": np.ma.array(shares, mask=shares > 0.4), "complex": shares + 0j,
        "infinite": np.full((n, 3), np.inf), "fewer": shares[1:], "logits": np.log(shares),
    }  # fmt: skip
    vector, table = pick(rng, vectors), pick(rng, tables)
    swap = chance(rng, 0.5)
    if name == "clusters_used":
        wrong = pick(rng, [vectors, tables])
        why = pick(rng, set(wrong) - {"fewer", "two dimensions", "a vector"})
        attempt(lambda: metrics.clusters_used(wrong[why]), spoilt=f"clusters: {why}")
    elif name == "knn_error":
        codes = np.ones((n, 2))
        wrong = {
            "k": lambda: metrics.knn_error(codes, labels, codes, labels, pick(rng, [*NO_COUNT, 7])),
            "train_labels": lambda: metrics.knn_error(codes, vectors[vector], codes, labels),
            "test_labels": lambda: metrics.knn_error(codes, labels, codes, vectors[vector]),
            "train_latents": lambda: metrics.knn_error(codes * math.nan, labels, codes, labels),
            "test_latents": lambda: metrics.knn_error(codes, labels, codes[:, :1], labels),
        }
        why = pick(rng, wrong)
        attempt(wrong[why], why, spoilt=f"{why}: {vector}")
    elif name == "calibration_error":
        wrong = {
            "labels": lambda: metrics.calibration_error(shares, vectors[vector]),
            "probabilities": lambda: metrics.calibration_error(tables[table], labels),
            "num_bins": lambda: metrics.calibration_error(shares, labels, pick(rng, NO_COUNT)),
            "from 0 to 2": lambda: metrics.calibration_error(shares, labels + pick(rng, [-5, 3])),
        }
        why = pick(rng, wrong)
        attempt(wrong[why], why, spoilt=f"{why}: {vector}, {table}")
    elif second == "responsibilities":
        call, why = (
            ((vectors[vector], shares), vector) if swap else ((labels, tables[table]), table)
        )
        of = "labels" if swap else second
        attempt(lambda: getattr(metrics, name)(*call), of, spoilt=f"{of}: {why}")
    else:
        call = (vectors[vector], labels) if swap else (labels, vectors[vector])
        of = "labels" if swap else second
        attempt(lambda: getattr(metrics, name)(*call), of, spoilt=f"{of}: {vector}")
