"""Coloured digits: what they are, and how clusters are scored against two sets of labels."""

import dataclasses

import pytest
import torch

from pyrozoo import zoo
from pyrozoo.inference import Batch, metrics
from pyrozoo.zoo import datasets, runs, scoring
from pyrozoo.zoo.rivals import plain_rivals
from pyrozoo.zoo.tasks import Task, make_task


def test_a_coloured_digit_is_the_grey_one_times_its_colour():
    grey, data = (datasets.load(n, split="all", flat=False) for n in ("digits", "coloured_digits"))
    assert data.x.shape == (1797, 3, 8, 8)
    assert data.image_shape == (3, 8, 8)
    assert data.x.dtype == torch.float32
    assert (data.x.min(), data.x.max()) == (0, 1)
    assert torch.equal(data.x.amax(1), grey.x[:, 0])  # every colour has a full channel
    tints = torch.tensor(list(datasets.COLOURS.values()))[data.label_sets["colour"]]
    assert torch.equal(data.x, grey.x * tints[:, :, None, None])
    assert torch.equal(data.label_sets["digit"], grey.y)
    assert torch.equal(data.y, grey.y)
    flat = datasets.load("coloured_digits", split="all")
    assert torch.equal(flat.x, data.x.flatten(1))


def test_colours_are_well_separated_and_independent_of_the_digit():
    tints = torch.tensor(list(datasets.COLOURS.values()))
    assert len(tints) == 10
    assert torch.pdist(tints).min() >= 0.5
    sets = datasets.load("coloured_digits", split="all").label_sets
    assert metrics.nmi(sets["digit"], sets["colour"]) < 0.02
    assert sets["colour"].bincount(minlength=10).min() > 140


def test_an_image_keeps_its_colour_in_every_split():
    train, test, whole = (
        datasets.load("coloured_digits", split=s) for s in ("train", "test", "all")
    )
    assert (len(train), len(test)) == (1437, 360)
    rows = sorted([*map(tuple, train.x.tolist()), *map(tuple, test.x.tolist())])
    assert rows == sorted(map(tuple, whole.x.tolist()))
    assert torch.equal(train.y, datasets.load("digits").y)
    again = datasets.load("coloured_digits")
    assert torch.equal(train.label_sets["colour"], again.label_sets["colour"])
    assert datasets.load("digits").label_sets == {}


def test_mnist_is_tinted_in_the_same_way(monkeypatch):
    def images(name, root, split):
        count = {"train": 12, "test": 4, "all": 16}[split]
        first = 12 if split == "test" else 0
        x = torch.arange(first, first + count, dtype=torch.uint8)[:, None, None] * 10
        return x.expand(count, 28, 28), torch.arange(first, first + count) % 10

    monkeypatch.setattr(datasets, "_idx_images", images)
    train, test, whole = (
        datasets.load("coloured_mnist", split=s) for s in ("train", "test", "all")
    )
    assert train.image_shape == (3, 28, 28)
    assert torch.equal(torch.cat([train.x, test.x]), whole.x)
    torch.testing.assert_close(whole.x.amax(1), torch.arange(16) * 10 / 255)


def test_a_task_has_the_labels_of_its_test_rows():
    task = make_task({"name": "coloured_digits"}, "mfcvae", 0)
    assert task.train.names == ("x",)
    assert set(task.label_sets) == {"digit", "colour"}
    assert all(len(v) == len(task.test) == 360 for v in task.label_sets.values())
    assert make_task({"name": "digits"}, "mfcvae", 0).label_sets == {}


# ---- scores -----------------------------------------------------------------------------------------


class Known:
    """A result whose facets find what they are told."""

    def __init__(self, **found):
        self.found = found
        self.sites = [f"{site}: summed over {k} values" for site, (_, k) in found.items()]

    def responsibilities(self, data, site, **options):
        clusters, size = self.found[site]
        return torch.eye(size)[clusters]


@pytest.fixture
def two_ways():
    generator = torch.Generator().manual_seed(0)
    digit, colour = torch.randint(4, (2, 400), generator=generator)
    x = Batch.of({"x": torch.zeros(400, 2)})
    return Task(x, digit, x, digit, label_sets={"digit": digit, "colour": colour})


def test_each_facet_is_scored_against_each_set_of_labels(two_ways):
    digit, colour = two_ways.label_sets.values()
    wrong = torch.where(torch.arange(400) < 40, (digit + 1) % 4, digit)
    figures = scoring.facets(Known(c_1=(colour, 4), c_2=(wrong, 5)), two_ways)
    assert figures["majority_accuracy_c_1_colour"] == 1
    assert figures["majority_accuracy_c_2_digit"] == pytest.approx(0.9)
    assert (figures["facet_digit"], figures["facet_colour"]) == (2, 1)
    assert figures["majority_accuracy_digit"] == figures["majority_accuracy_c_2_digit"]
    assert figures["hungarian_accuracy_colour"] == 1
    assert "hungarian_accuracy_digit" not in figures  # five clusters for four digits
    assert (figures["clusters_used_c_1"], figures["clusters_used_c_2"]) == (4, 4)
    assert figures["nmi_colour"] == pytest.approx(1)
    for pair in ("c_1_digit", "c_2_colour"):
        accuracy, chance = (figures[f"{w}_{pair}"] for w in ("majority_accuracy", "chance"))
        assert 0.25 < chance < 0.35
        assert accuracy == pytest.approx(chance, abs=0.04)


def test_one_set_of_labels_has_no_name_and_unknown_ones_do_not_count(two_ways):
    labels = torch.where(torch.arange(400) < 100, -1, two_ways.test_labels)
    task = dataclasses.replace(two_ways, label_sets={}, test_labels=labels)
    junk = torch.where(torch.arange(400) < 100, 0, two_ways.test_labels)
    figures = scoring.facets(Known(c_1=(junk, 4), c_2=(torch.zeros(400).long(), 3)), task)
    assert figures["majority_accuracy"] == figures["hungarian_accuracy"] == figures["nmi"] == 1
    assert figures["facet"] == 1
    most = labels[100:].bincount().max().item() / 300
    assert figures["majority_accuracy_c_2"] == pytest.approx(most)
    nothing = dataclasses.replace(task, test_labels=torch.full((400,), -1))
    assert set(scoring.facets(Known(c_1=(junk, 4)), nothing)) == {"clusters_used_c_1"}


def test_a_short_run_beats_one_clustering_by_k_means():
    """Law: every entry clears a rival that is computed in the same test."""
    spec = {"method": "mfcvae", "data": {"name": "coloured_digits"}}
    spec["options"] = {
        "num_clusters": [20, 20], "latent_dims": [8, 3], "hidden": [64], "share": 1.0,
        "likelihood": "normal(0.1)", "fade": 6.0,
    }  # fmt: skip
    spec["start"] = {"epochs": 12, "lr": 5e-3, "batch_size": 128}
    spec["fit"] = {"epochs": 20, "lr": 5e-3, "batch_size": 128, "device": "cpu"}
    model, _, task, figures = runs.fit_spec(spec, 0, progress=False)
    rival = plain_rivals(model, task, 0)["kmeans"]
    assert {"majority_accuracy_digit", "nmi_colour", "bound"} <= set(figures)
    assert figures["majority_accuracy_colour"] > rival["majority_accuracy_colour"] + 0.05
    assert figures["majority_accuracy_digit"] > rival["majority_accuracy_digit"]
    assert figures["facet_colour"] == 2


def test_facets_take_one_number_of_clusters_for_all():
    task = make_task({"name": "coloured_digits"}, "mfcvae", 0)
    model = runs.make_model({"method": "mfcvae", "options": {"hidden": [4]}}, task, 0)
    assert [len(f.logits) for f in model.program.facets] == [10, 10]  # as many as label names
    assert zoo.method("mfcvae").options["num_clusters"] == (25, 25)
