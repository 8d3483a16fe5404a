"""The measures of clusterings and predictions, on cases counted by hand and under their laws."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyrozoo.inference import metrics

LABELS = [0, 0, 0, 1, 1, 2]
CLUSTERS = [5, 5, 7, 7, 7, 7]
RESPONSIBILITIES = [[0.6, 0.4], [0.7, 0.3], [0.9, 0.1], [0.2, 0.8], [0.45, 0.55], [0.3, 0.7]]

pairs = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), min_size=1, max_size=40)


def test_confusion_counts_labels_in_clusters() -> None:
    counts = metrics.confusion(LABELS, CLUSTERS)
    assert counts.tolist() == [[2, 1], [0, 2], [0, 1]]
    assert counts.dtype == np.int64


def test_accuracies_by_hand() -> None:
    # Cluster 5 is label 0 (2 right), cluster 7 is label 1 (2 right of 4).
    assert metrics.match_clusters(LABELS, CLUSTERS) == {5: 0, 7: 1}
    assert metrics.hungarian_accuracy(LABELS, CLUSTERS) == 4 / 6
    assert metrics.majority_accuracy(LABELS, CLUSTERS) == 4 / 6


def test_one_to_one_differs_from_majority_when_a_class_is_split() -> None:
    labels, clusters = [4, 4, 4, 9], [0, 1, 1, 2]
    assert metrics.hungarian_accuracy(labels, clusters) == 3 / 4
    assert metrics.majority_accuracy(labels, clusters) == 1.0
    assert metrics.match_clusters(labels, clusters) == {1: 4, 2: 9}


def test_hungarian_is_not_greedy() -> None:
    # The largest cell (3) must be given up: 2 + 2 > 3 + 0.
    labels, clusters = [0] * 5 + [1] * 2, [0, 0, 0, 1, 1, 0, 0]
    assert metrics.confusion(labels, clusters).tolist() == [[3, 2], [2, 0]]
    assert metrics.match_clusters(labels, clusters) == {0: 1, 1: 0}
    assert metrics.hungarian_accuracy(labels, clusters) == 4 / 7


def test_most_confident_takes_the_name_from_one_datum() -> None:
    # Column 0 peaks at datum 2, column 1 at datum 3: labels 1 and 0, so all but one are wrong.
    labels = [0, 0, 1, 0, 1, 1]
    assert metrics.most_confident_accuracy(labels, RESPONSIBILITIES) == 2 / 6
    assert metrics.majority_accuracy(labels, np.argmax(RESPONSIBILITIES, axis=1)) == 4 / 6


def test_most_confident_names_a_cluster_by_a_datum_outside_it() -> None:
    rows = [[0.5, 0.3, 0.2], [0.1, 0.8, 0.1]]
    assert metrics.most_confident_accuracy([3, 8], rows) == 1.0
    assert metrics.clusters_used(rows) == 2


def test_nmi_by_hand_is_normalised_by_the_arithmetic_mean() -> None:
    labels, clusters = [0, 0, 1, 1], [0, 0, 0, 1]
    label_entropy = math.log(2)
    cluster_entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    joint = -(0.5 * math.log(0.5) + 2 * 0.25 * math.log(0.25))
    mutual = label_entropy + cluster_entropy - joint
    expected = 2 * mutual / (label_entropy + cluster_entropy)
    assert metrics.nmi(labels, clusters) == pytest.approx(expected)


def test_ari_by_hand() -> None:
    # Pairs together: in both 1, in labels 2, in clusters 3, of 6; expected 2 * 3 / 6 = 1.
    assert metrics.ari([0, 0, 1, 1], [0, 0, 0, 1]) == pytest.approx((1 - 1) / (2.5 - 1))
    # In both 2, in labels 4, in clusters 2, of 10; expected 4 * 2 / 10 = 0.8.
    assert metrics.ari([0, 0, 0, 1, 1], [0, 0, 2, 1, 1]) == pytest.approx((2 - 0.8) / (3 - 0.8))
    # Crossed partitions: as discordant as can be.
    assert metrics.ari([0, 0, 1, 1], [0, 1, 0, 1]) == pytest.approx(-0.5)


def test_clusters_used_counts_both_kinds_of_input() -> None:
    assert metrics.clusters_used([3, 3, 9]) == 2
    assert metrics.clusters_used(RESPONSIBILITIES) == 2
    assert metrics.clusters_used([[0.6, 0.4, 0.0]] * 3) == 1


def test_accuracy_does_not_rename() -> None:
    assert metrics.accuracy([0, 1, 2, 2], [0, 1, 2, 1]) == 0.75
    assert metrics.accuracy([0, 1], [1, 0]) == 0.0


def test_knn_error_by_hand() -> None:
    train, labels = [[0.0], [1.0], [2.0], [10.0], [11.0]], [0, 0, 0, 1, 1]
    assert metrics.knn_error(train, labels, [[0.5], [10.5]], [0, 1], k=1) == 0.0
    # Three neighbours of 10.5 are 11, 10 and 2: labels 1, 1, 0.
    assert metrics.knn_error(train, labels, [[0.5], [10.5]], [1, 1]) == 0.5
    assert metrics.knn_error(train, labels, [[0.5], [10.5]], [0, 1], k=5) == 0.5


def test_calibration_error_by_hand() -> None:
    probabilities = [[0.9, 0.1], [0.9, 0.1], [0.4, 0.6], [0.3, 0.7]]
    # Four bins: 0.9, 0.9 share the last (half right); 0.6 and 0.7 the third (both right).
    expected = 0.5 * abs(0.5 - 0.9) + 0.5 * abs(1 - 0.65)
    assert metrics.calibration_error(probabilities, [0, 1, 1, 1], 4) == pytest.approx(expected)
    # One bin: three right of four, mean confidence 0.775.
    assert metrics.calibration_error(probabilities, [0, 1, 1, 1], 1) == pytest.approx(0.025)


def test_calibration_bins_are_closed_on_the_right() -> None:
    # 0.5 falls in (0, 0.5]; one bin with 0.6 would cancel: (0 - 0.5) + (1 - 0.6) = -0.1.
    probabilities = [[0.5, 0.5], [0.6, 0.4]]
    assert metrics.calibration_error(probabilities, [1, 0], 2) == pytest.approx(0.45)
    assert metrics.calibration_error(probabilities, [1, 0], 1) == pytest.approx(0.05)


def test_calibration_error_at_its_ends() -> None:
    certain = np.eye(3)[[0, 1, 2]]
    assert metrics.calibration_error(certain, [0, 1, 2]) == 0.0
    assert metrics.calibration_error(certain, [1, 2, 0]) == 1.0


def test_report_agrees_with_its_parts() -> None:
    clusters = np.argmax(RESPONSIBILITIES, axis=1)
    labels = [0, 0, 1, 1, 1, 0]
    report = metrics.clustering_report(labels, torch.tensor(RESPONSIBILITIES))
    assert report == {
        "hungarian_accuracy": metrics.hungarian_accuracy(labels, clusters),
        "majority_accuracy": metrics.majority_accuracy(labels, clusters),
        "most_confident_accuracy": metrics.most_confident_accuracy(labels, RESPONSIBILITIES),
        "nmi": metrics.nmi(labels, clusters),
        "ari": metrics.ari(labels, clusters),
        "clusters_used": 2.0,
    }
    assert all(type(value) is float for value in report.values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_torch_inputs_of_any_precision(dtype: torch.dtype) -> None:
    rows = torch.tensor(RESPONSIBILITIES, dtype=dtype, requires_grad=True)
    labels = torch.tensor([0, 0, 1, 0, 1, 1], dtype=torch.uint8)
    assert metrics.most_confident_accuracy(labels, rows) == 2 / 6
    assert metrics.accuracy(labels, labels.long()) == 1.0


@settings(deadline=None, max_examples=60)
@given(pairs, st.permutations(range(5)), st.permutations(range(4)))
def test_names_do_not_matter(
    data: list[tuple[int, int]], cluster_names: list[int], label_names: list[int]
) -> None:
    labels, clusters = np.array(data).T
    renamed = np.array(cluster_names)[clusters]
    relabelled = np.array(label_names)[labels]
    for measure in (
        metrics.hungarian_accuracy,
        metrics.majority_accuracy,
        metrics.nmi,
        metrics.ari,
    ):
        assert measure(relabelled, renamed) == pytest.approx(measure(labels, clusters), abs=1e-9)
    assert metrics.clusters_used(renamed) == metrics.clusters_used(clusters)
    assert metrics.hungarian_accuracy(labels, clusters) == pytest.approx(
        metrics.hungarian_accuracy(clusters, labels)
    )


@settings(deadline=None, max_examples=60)
@given(pairs)
def test_bounds_and_order(data: list[tuple[int, int]]) -> None:
    labels, clusters = np.array(data).T
    hungarian = metrics.hungarian_accuracy(labels, clusters)
    assert 0 < hungarian <= metrics.majority_accuracy(labels, clusters) <= 1
    assert -1e-9 <= metrics.nmi(labels, clusters) <= 1 + 1e-9
    assert -0.5 - 1e-9 <= metrics.ari(labels, clusters) <= 1 + 1e-9
    assert metrics.hungarian_accuracy(labels, labels) == 1.0
    matched = metrics.match_clusters(labels, clusters)
    named = np.array([matched.get(int(cluster), -1) for cluster in clusters])
    assert metrics.accuracy(labels, named) == pytest.approx(hungarian)
    assert len(set(matched.values())) == len(matched)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000), st.permutations(range(4)))
def test_most_confident_does_not_see_cluster_names(seed: int, order: list[int]) -> None:
    rng = np.random.default_rng(seed)
    rows, labels = rng.dirichlet(np.ones(4), size=12), rng.integers(0, 3, 12)
    expected = metrics.clustering_report(labels, rows)
    assert metrics.clustering_report(labels, rows[:, order]) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("hungarian_accuracy", ([0, 1], [0]), "labels and clusters of the same length, got 2 and"),
        ("majority_accuracy", ([], []), "labels of at least one datum"),
        ("nmi", ([0.5, 1.0], [0, 1]), "labels to be integers, got float64"),
        ("ari", ([0, 1], ["a", "b"]), "clusters to be integers, got <U1"),
        ("confusion", ([[0, 1]], [0, 1]), r"labels of shape \(N,\), got shape \(1, 2\)"),
        ("accuracy", ([0, 1], [0, 1, 2]), "labels and predicted of the same length"),
        ("match_clusters", ([0, 1], [0.0, 1.0]), "clusters to be integers"),
        ("most_confident_accuracy", ([0], [[math.nan, 1]]), "to be finite, got 1 NaN"),
        ("most_confident_accuracy", ([0], [[0.5, 0.4]]), "to sum to 1, got 0.9 in row 0"),
        ("most_confident_accuracy", ([0], [[1.5, -0.5]]), "of at least 0, got -0.5"),
        ("most_confident_accuracy", ([0], [0]), r"of shape \(N, columns\), got shape \(1,\)"),
        ("clustering_report", ([0, 1], [[1.0, 0.0]]), "same length, got 2 and 1"),
        ("clustering_report", ([0], [["a", "b"]]), "responsibilities to be numbers, got <U1"),
        ("clusters_used", ([[0.5, 0.6]],), "to sum to 1, got 1.1"),
        ("clusters_used", ([[]],), "at least one row and column"),
        ("calibration_error", ([[0.5, 0.5]], [2]), "labels from 0 to 1, .* got 2 to 2"),
        ("calibration_error", ([[0.5, 0.5]], [1], 0), "num_bins of at least 1, got 0"),
        ("knn_error", ([[0.0]], [0], [[0.0, 1.0]], [0], 1), "dimension, got 1 and 2"),
        ("knn_error", ([[0.0]], [0], [[0.0]], [0]), "k from 1 to the 1 training codes, got 3"),
        ("knn_error", ([[0.0]], [0, 1], [[0.0]], [0], 1), "train_labels and train_latents"),
        ("knn_error", ([[0.0]], [0], [[math.inf]], [0], 1), "test_latents to be finite"),
    ],
)
def test_bad_input_is_named(name: str, arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        getattr(metrics, name)(*arguments)
