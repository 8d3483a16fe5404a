"""HI-VAE: what it is made of, where its clusters start, and what it is worth on tables with holes."""

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from cases import _columns, _mixed_row
from sklearn.datasets import load_wine
from torch import nn

from pyrozoo import zoo
from pyrozoo.guides import Amortized, Classifier, Sequential
from pyrozoo.inference import Batch, EnumELBO, metrics
from pyrozoo.zoo.imputation import HIVAE
from pyrozoo.zoo.imputation.hivae import infer_columns, start_clusters
from pyrozoo.zoo.imputation.mixture import cluster_rows
from pyrozoo.zoo.networks import Column, Columns, Normal

SMALL = {"num_clusters": 3, "latent_dim": 2, "hidden": (4,), "guide_hidden": (4,)}


def test_the_bound_of_entries_is_the_sum_over_clusters_by_hand():
    program = HIVAE({"x": _columns()}, 3, 2, (4,)).double()
    guide = Amortized(program, ["x"], (4,)).double()
    rows = _mixed_row(6, torch.Generator().manual_seed(0))
    known = torch.rand(6, 5) < 0.7
    known[0] = False
    data = Batch.of({"x": (rows, known)})
    torch.manual_seed(3)
    got = EnumELBO(kl="sampled", split=False).per_row(program, guide, data)
    torch.manual_seed(3)
    q = guide.distribution("z", data)
    z = q.rsample()
    joint = []
    for k in range(3):
        cluster = torch.eye(3, dtype=torch.float64)[k].expand(6, 3)
        fn = program.views["x"](program.heads["x"](program.decoder(z), z, cluster))
        density = (fn.base_dist.log_prob(torch.where(known, rows, 1.0)) * known).sum(-1)
        prior = dist.Normal(program.loc[k], 1.0).to_event(1).log_prob(z)
        joint.append(program.logits.log_softmax(0)[k] + prior + density)
    expected = torch.stack(joint).logsumexp(0) - q.log_prob(z)
    assert got[0] == 0
    torch.testing.assert_close(got[1:], expected[1:], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("classifier", [True, False])
def test_entries_may_be_missing_under_both_guides(classifier):
    rows = _mixed_row(7, torch.Generator().manual_seed(0)).float()
    known = torch.rand(7, 5) < 0.6
    known[0] = False
    data = {"x": (rows, known)}
    model = zoo.create("hivae", data, columns={"x": _columns()}, classifier=classifier, **SMALL)
    rows_of = EnumELBO(split=False).per_row
    torch.manual_seed(1)
    first = rows_of(model.program, model.guide, data)
    assert first[0] == 0
    assert first[1:].isfinite().all()
    other = torch.where(known, rows, -3.5)
    torch.manual_seed(1)
    assert torch.equal(first, rows_of(model.program, model.guide, {"x": (other, known)}))


def test_views_may_be_missing_in_any_row():
    rows = _mixed_row(6, torch.Generator().manual_seed(0)).float()
    images = torch.rand(6, 4)
    seen = torch.tensor([1, 1, 0, 0, 1, 0]).bool()
    data = {"x_labs": (rows, seen), "x_scan": (images, torch.tensor([1, 0, 1, 0, 0, 1]).bool())}
    asked = {"x_labs": _columns(), "x_scan": "continuous_bernoulli"}
    model = zoo.create("hivae", data, columns=asked, **SMALL)
    result = model.fit(data, epochs=2, progress=False, device="cpu", start={"epochs": 2})
    assert result.predict({"x_labs": rows}, "x_scan").shape == (6, 4)
    assert result.predict({"x_scan": images}, "x_labs").shape == (6, 5)
    assert result.responsibilities({"x_scan": images}).shape == (6, 3)
    bound = EnumELBO().per_row(model.program, model.guide, data)
    assert bound[3] == 0
    assert (bound[[0, 1, 2, 4, 5]] != 0).all()


def test_columns_are_inferred_and_copied():
    value = torch.tensor([[0.0, 3.0, 5.0], [1.0, 5.0, 5.0], [1.0, 7.0, 5.0], [0.0, 0.0, 5.0]])
    known = torch.ones(4, 3, dtype=torch.bool)
    known[3, 1] = False
    columns = infer_columns(value, known).columns
    assert [c.likelihood for c in columns] == ["bernoulli", "normal", "normal"]
    assert (columns[1].center, columns[2].center, columns[2].spread) == (5.0, 5.0, 1.0)
    assert infer_columns(value, torch.zeros(4, dtype=torch.bool)).columns[0].likelihood == "normal"
    mine = _columns()
    rows = _mixed_row(4, torch.Generator()).float()
    model = zoo.create("hivae", {"x": rows}, columns={"x": mine}, **SMALL)
    assert model.program.views["x"] is not mine
    assert model.program.views["x"].columns == mine.columns


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ({"y": torch.zeros(4, dtype=torch.long)}, {}, "called x or x_<name>, got none"),
        ({"x": torch.zeros(4, 2, 2)}, {}, r"flat rows .*\(2, 2\)"),
        (
            {"x": torch.zeros(4, 3)},
            {"columns": {"x": _columns()}},
            r"shape \(5,\), expected \(3,\)",
        ),
        ({"x": torch.zeros(4, 3)}, {"columns": {"labs": Normal(3)}}, "got x, labs"),
        ({"x": torch.zeros(4, 3)}, {"columns": {"x_b": "normal"}}, "have no 'x_b'"),
    ],
)
def test_wrong_views_are_named(data, options, message):
    with pytest.raises(ValueError, match=message):
        zoo.create("hivae", data, **options)


# ---- where clusters start ---------------------------------------------------------------------------


def blobs(rows=150, seed=0):
    generator = np.random.default_rng(seed)
    labels = generator.integers(3, size=rows)
    means = np.array([[2, 0, -2, 1], [-2, 1, 0, -1], [0, -2, 2, 0]])
    return means[labels] + generator.normal(size=(rows, 4)) * 0.7, labels, generator


def test_the_mixture_finds_clusters_in_spite_of_holes():
    x, labels, generator = blobs()
    known = generator.random(x.shape) > 0.3
    found = cluster_rows(np.where(known, x, 1e3), known, 3, num_starts=3)
    rows = known.any(1)
    assert metrics.hungarian_accuracy(labels[rows], found[rows]) > 0.9
    again = cluster_rows(np.where(known, x, -7.0), known, 3, num_starts=3)
    assert np.array_equal(found, again)  # whatever stands in a hole
    with pytest.raises(ValueError, match="3 clusters need as many rows, got 2"):
        cluster_rows(x[:2], known[:2], 3)


def test_known_clusters_keep_their_names():
    x, labels, generator = blobs()
    some = np.where(generator.random(len(x)) < 0.1, labels, -1)
    found = cluster_rows(x, np.ones_like(x, dtype=bool), 3, some, num_starts=2)
    assert (found == labels).mean() > 0.9
    wrong = some.copy()
    wrong[0] = (labels[0] + 1) % 3
    assert cluster_rows(x, np.ones_like(x, dtype=bool), 3, wrong, num_starts=2)[0] == wrong[0]


def test_labels_beyond_the_clusters_are_refused_before_training():
    x = torch.tensor(blobs()[0], dtype=torch.float32)
    model = zoo.create("hivae", {"x": x}, **SMALL)
    data = Batch.of({"x": x, "y": torch.full((len(x),), 3)})
    with pytest.raises(ValueError, match=r"'y' takes values in 0\.\.2, got 3"):
        start_clusters(model.program, model.guide, data, epochs=1)


def test_the_start_trains_both_halves_and_is_reproducible():
    x = torch.tensor(blobs()[0], dtype=torch.float32)
    states = []
    for _ in range(2):
        model = zoo.create("hivae", {"x": x}, **SMALL)
        before = [p.clone() for p in nn.ModuleList([model.program, model.guide]).parameters()]
        start_clusters(
            model.program, model.guide, Batch.of({"x": x}), epochs=2, num_starts=1, seed=1
        )
        after = list(nn.ModuleList([model.program, model.guide]).parameters())
        assert all(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
        states.append([p.detach().clone() for p in after])
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


# ---- what it is worth -------------------------------------------------------------------------------


def test_it_fills_in_better_than_means_and_finds_the_kinds_of_wine():
    """Law: every entry clears a rival that is computed in the same test."""
    x, labels = load_wine(return_X_y=True)
    known = np.random.default_rng(0).random(x.shape) >= 0.2
    data = {"x": np.ma.MaskedArray(x.astype("float32"), ~known)}
    model = zoo.create("hivae", data, num_clusters=3)
    short = {"epochs": 100, "num_starts": 3}
    result = model.fit(data, epochs=30, lr=3e-3, progress=False, device="cpu", start=short)
    filled = result.predict(data, "x", num_samples=50, seed=0).numpy()
    spread = x.std(0)
    means = np.ma.MaskedArray(x, ~known).mean(0)
    error = (((filled - x) / spread)[~known] ** 2).mean()
    rival = (((means - x) / spread)[~known] ** 2).mean()
    assert error < 0.7 * rival
    found = result.responsibilities(data, seed=0)
    assert metrics.hungarian_accuracy(labels, found.argmax(1)) > 0.9


def test_mixed_columns_are_filled_in_better_than_by_the_commonest_value():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(300, generator=generator)
    noise = torch.randn(300, 5, generator=generator)
    rows = torch.stack(
        [
            10 + 4 * hidden + noise[:, 0],
            (hidden + 0.3 * noise[:, 1] > 0).float(),
            (hidden + 0.3 * noise[:, 2] > 0.4).float()
            + (hidden + 0.3 * noise[:, 2] > -0.4).float(),
            torch.poisson((1 + hidden).exp(), generator=generator),
            (2 + hidden + 0.2 * noise[:, 4]).exp(),
        ],
        1,
    )
    known = torch.rand(300, 5, generator=generator) > 0.2
    kinds = ["normal", "bernoulli", "categorical", "poisson", "log_normal"]
    columns = Columns(
        [
            Column.of(kind, kind, rows[:, i][known[:, i]], 3 * (kind == "categorical"))
            for i, kind in enumerate(kinds)
        ]
    )
    data = {"x": (rows, known)}
    model = zoo.create("hivae", data, columns={"x": columns}, num_clusters=2, latent_dim=2)
    result = model.fit(
        data, epochs=20, progress=False, device="cpu", start={"epochs": 50, "num_starts": 2}
    )
    draws = result.posterior(data, 50, predictive=True, seed=0)["x"]
    for i, kind in enumerate(kinds):
        hole, seen = ~known[:, i], rows[:, i][known[:, i]]
        if kind in ("bernoulli", "categorical"):
            right = (draws[:, hole, i].mode(0).values == rows[hole, i]).float().mean()
            assert right > (rows[hole, i] == seen.mode().values).float().mean() + 0.1, kind
        else:
            scale = (
                torch.log1p
                if kind == "poisson"
                else torch.log
                if kind == "log_normal"
                else torch.clone
            )
            guess = scale(draws[:, hole, i].median(0).values)
            error = (guess - scale(rows[hole, i])).square().mean()
            rival = (scale(seen).mean() - scale(rows[hole, i])).square().mean()
            assert error < 0.6 * rival, kind


def test_the_guide_of_the_paper_and_the_other():
    x = torch.tensor(blobs()[0], dtype=torch.float32)
    a = zoo.create("hivae", {"x": x}, **SMALL).guide
    assert isinstance(a, Sequential)
    assert isinstance(a.parts[0], Classifier)
    assert isinstance(zoo.create("hivae", {"x": x}, classifier=False, **SMALL).guide, Amortized)
    y = (torch.zeros(len(x), dtype=torch.long), torch.arange(len(x)) < 15)
    part = zoo.create("hivae", {"x": x, "y": y}, **SMALL)
    assert part.objective.observed_guide_weights == {"y": 10.0}
    assert zoo.create("hivae", {"x": x}, **SMALL).objective.is_bound
