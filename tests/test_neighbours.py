"""The graph of nearest neighbours, its parts, labels along it, and VaDE that starts there."""

import numpy as np
import pyro
import pytest
import torch
from sklearn.datasets import make_moons
from sklearn.mixture import GaussianMixture

from pyrozoo import zoo
from pyrozoo.inference import Batch, EnumELBO, metrics
from pyrozoo.zoo import datasets
from pyrozoo.zoo.clustering import VaDE
from pyrozoo.zoo.clustering.neighbours import (
    cut_graph,
    neighbour_graph,
    normalised_cut,
    spread_labels,
)

START = {"epochs": 30, "lr": 2e-3, "clusters": "neighbours", "num_neighbors": 10, "balance": 1.0}


@pytest.fixture(scope="module")
def moons():
    return make_moons(600, noise=0.05, random_state=0)


def test_graph_is_symmetric_and_joins_the_nearest(moons):
    points = moons[0]
    graph = neighbour_graph(points, 5).toarray()
    assert (graph == graph.T).all()
    assert set(np.unique(graph)) == {0, 1}
    assert (graph.diagonal() == 0).all()
    assert graph.sum(1).min() >= 5
    distance = np.linalg.norm(points[:, None] - points, axis=-1) + 1e9 * np.eye(len(points))
    nearest = np.argsort(distance, 1)[:, :5]
    assert all(graph[i, nearest[i]].all() for i in range(len(points)))
    mutual = np.zeros_like(graph)
    mutual[np.arange(len(points))[:, None], nearest] = 1
    assert (graph == np.maximum(mutual, mutual.T)).all()


def test_normalised_cut_by_hand(moons):
    graph = neighbour_graph(moons[0], 7)
    clusters = np.random.default_rng(0).integers(3, size=600)
    dense, by_hand = graph.toarray(), 0.0
    for k in range(3):
        inside = clusters == k
        by_hand += dense[inside][:, ~inside].sum() / dense[inside].sum()
    assert normalised_cut(graph, clusters, 3) == pytest.approx(by_hand, rel=1e-12)


def test_parts_are_the_moons_where_a_mixture_fails(moons):
    points, labels = moons
    graph = neighbour_graph(points, 7)
    found = cut_graph(graph, 2)
    assert metrics.hungarian_accuracy(labels, found.clusters) > 0.99
    mixture = GaussianMixture(2, n_init=5, random_state=0).fit_predict(points)
    assert metrics.hungarian_accuracy(labels, mixture) < 0.95
    assert found.cut < normalised_cut(graph, mixture, 2)
    assert found.share.shape == (600, 2)
    assert np.allclose(found.share.sum(1), 1)
    assert (found.share.argmax(1) == found.clusters).mean() > 0.99


@pytest.mark.parametrize("num_clusters", [2, 3, 5, 8])
def test_clusters_that_no_link_joins(num_clusters):
    """As many equal eigenvalues, one of whose vectors alone the iteration finds."""
    labels = np.arange(400) % num_clusters
    points = np.random.default_rng(0).normal(size=(400, 3)) + 30 * labels[:, None]
    found = cut_graph(neighbour_graph(points, 10), num_clusters)
    assert found.cut == 0
    assert metrics.hungarian_accuracy(labels, found.clusters) == 1
    more = cut_graph(neighbour_graph(points, 10), num_clusters + 2)  # of which some are split
    assert all(len(set(labels[more.clusters == k])) == 1 for k in range(num_clusters + 2))


def test_islands_are_no_clusters(moons):
    points, labels = moons
    island = np.full((20, 2), 9.0) + np.random.default_rng(0).normal(size=(20, 2))
    graph = neighbour_graph(np.concatenate([points, island]), 7)
    found = cut_graph(graph, 2, balance=1.0)
    assert metrics.hungarian_accuracy(labels, found.clusters[:600]) > 0.99


def test_labels_spread_as_the_dense_solution(moons):
    points, labels = moons
    graph = neighbour_graph(points, 10)
    known = np.zeros(600, bool)
    known[[np.flatnonzero(labels == k)[j] for k in (0, 1) for j in (0, 1, 2)]] = True
    found = spread_labels(graph, labels, known, 2, alpha=0.9)
    assert (found.clusters == labels).mean() > 0.99
    dense, target = graph.toarray(), np.eye(2)[labels] * known[:, None] / 3
    root = 1 / np.sqrt(dense.sum(1))
    exact = np.linalg.solve(np.eye(600) - 0.9 * root[:, None] * dense * root, target)
    exact /= exact.sum(1, keepdims=True)
    assert np.abs(found.share - exact)[~known].max() < 1e-2
    assert (found.share[known] == np.eye(2)[labels[known]]).all()


def test_a_class_without_labels_takes_the_part_that_is_left():
    digits = datasets.load("digits", split="all")
    x, y = digits.x.numpy(), digits.y.numpy()
    generator = np.random.default_rng(0)
    known = np.zeros(len(y), bool)
    for k in range(8):
        known[generator.choice(np.flatnonzero(y == k), 10, replace=False)] = True
    found = spread_labels(neighbour_graph(x, 10), y, known, 10).clusters
    assert (found == y)[y < 8].mean() > 0.9
    new = y >= 8
    assert np.isin(found[new], (8, 9)).mean() > 0.6


@pytest.mark.parametrize(
    ("codes", "neighbors", "words"),
    [
        (np.zeros(5), 2, "shape"),
        (np.full((5, 2), np.nan), 2, "finite"),
        (np.zeros((5, 2)), 5, "num_neighbors is from 1 to the 5 rows less one, got 5"),
    ],
)
def test_graph_refuses(codes, neighbors, words):
    with pytest.raises(ValueError, match=words):
        neighbour_graph(codes, neighbors)


def test_balance_prefers_parts_of_like_sizes():
    digits = datasets.load("digits", split="all")
    graph = neighbour_graph(digits.x.numpy(), 10)
    plain, even = cut_graph(graph, 10), cut_graph(graph, 10, balance=1.0)
    assert plain.cut < even.cut < normalised_cut(graph, digits.y.numpy(), 10) + 0.1
    sizes = (np.bincount(found.clusters, minlength=10) for found in (plain, even))
    assert np.std(next(sizes)) > np.std(next(sizes))
    assert metrics.hungarian_accuracy(digits.y, plain.clusters) < 0.9
    assert metrics.hungarian_accuracy(digits.y, even.clusters) > 0.95
    with pytest.raises(ValueError, match="balance is not negative, got -1"):
        cut_graph(graph, 10, balance=-1.0)


def test_parts_and_labels_refuse(moons):
    graph = neighbour_graph(moons[0][:12], 3)
    with pytest.raises(ValueError, match="10 clusters need at least 16 rows, got 12"):
        cut_graph(graph, 10)
    with pytest.raises(ValueError, match="none is known"):
        spread_labels(graph, np.zeros(12, int), np.zeros(12, bool), 2)
    with pytest.raises(ValueError, match="labels are from 0 to 1"):
        spread_labels(graph, np.full(12, 5), np.ones(12, bool), 2)


def test_full_covariance_bound_by_hand(double):
    """EnumELBO of the full-covariance VaDE is the explicit logsumexp over components."""
    torch.manual_seed(0)
    program = VaDE(6, 3, 2, (5,), covariance="full")
    with torch.no_grad():
        program.raw_lower.normal_()
        program.raw_scale.normal_()
    guide = zoo.create("vade", {"x": torch.rand(4, 6)}, latent_dim=2, hidden=[5]).guide
    x = torch.rand(4, 6)
    with pyro.poutine.trace() as tape, pyro.plate("data", 4):
        guide.inside(Batch.of({"x": x}), {})
    z, q = tape.trace.nodes["z"]["value"].detach(), tape.trace.nodes["z"]["fn"]
    joint = torch.stack(
        [
            program.logits.log_softmax(0)[k]
            + torch.distributions.MultivariateNormal(
                program.loc[k], program.scale[k] @ program.scale[k].T
            ).log_prob(z)
            for k in range(3)
        ]
    )
    by_hand = joint.logsumexp(0) + program.decoder(z).log_prob(x) - q.log_prob(z)

    def replayed(batch):
        return pyro.poutine.replay(guide, tape.trace)(batch)

    rows = EnumELBO(kl="sampled").per_row(program, replayed, {"x": x})
    torch.testing.assert_close(rows, by_hand, rtol=1e-10, atol=1e-10)


def test_full_without_correlations_is_diagonal():
    diagonal, full = VaDE(6, 3, 2, (5,)), VaDE(6, 3, 2, (5,), covariance="full")
    full.load_state_dict(diagonal.state_dict(), strict=False)
    y, z = torch.arange(3), torch.randn(3, 2)
    torch.testing.assert_close(
        full.component(y).log_prob(z), diagonal.component(y).log_prob(z), rtol=1e-5, atol=1e-5
    )
    with pytest.raises(ValueError, match="covariance is 'diag' or 'full', got 'tied'"):
        VaDE(6, 3, 2, (5,), covariance="tied")


@pytest.mark.parametrize("covariance", ["diag", "full"])
def test_mixture_starts_at_weighted_moments(covariance):
    generator = np.random.default_rng(0)
    codes, share = generator.normal(size=(50, 2)) @ [[2, 1], [0, 1]], generator.random((50, 3))
    share /= share.sum(1, keepdims=True)
    program = VaDE(6, 3, 2, (5,), covariance=covariance)
    program.set_mixture(share, codes)
    weights = share.sum(0) / 50
    np.testing.assert_allclose(program.logits.softmax(0).detach().numpy(), weights, rtol=1e-4)
    for k in range(3):
        np.testing.assert_allclose(
            program.loc[k].detach().numpy(), np.average(codes, 0, share[:, k]), rtol=1e-4
        )
        exact = np.cov(codes.T, aweights=share[:, k], ddof=0)
        scale = program.scale[k].detach().numpy()
        if covariance == "full":
            np.testing.assert_allclose(scale @ scale.T, exact, rtol=1e-3)
        else:
            np.testing.assert_allclose(scale**2, exact.diagonal(), rtol=1e-3)


def test_vade_from_neighbours_clusters_and_follows_labels():
    digits = datasets.load("digits", split="all")
    model = zoo.create("vade", {"x": digits.x}, hidden=[64], covariance="full")
    result = model.fit({"x": digits.x}, epochs=2, progress=False, start=START)
    found = result.responsibilities({"x": digits.x}).argmax(1)
    assert metrics.hungarian_accuracy(digits.y, found) > 0.7
    data = {"x": digits.x, "y": datasets.hide_labels(digits.y, 50, 0)}
    model = zoo.create("vade", data, hidden=[64], covariance="full")
    result = model.fit(data, epochs=2, progress=False, start=START)
    named = result.responsibilities({"x": digits.x}).argmax(1)
    assert metrics.accuracy(digits.y, named) > 0.8
    with pytest.raises(ValueError, match="clusters is 'mixture' or 'neighbours', got 'umap'"):
        model.fit(data, progress=False, start={"clusters": "umap"})
