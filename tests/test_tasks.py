"""What a specification shows to training, hides from it, and keeps for scoring."""

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from pyrozoo import zoo
from pyrozoo.zoo import datasets, scoring
from pyrozoo.zoo.rivals import plain_rivals
from pyrozoo.zoo.tasks import make_task


def test_images_without_labels_are_scored_where_they_were_fitted():
    task = make_task({"name": "digits", "split": "all"}, "vade", 0)
    assert task.transductive
    assert len(task.train) == 1797
    assert task.train.names == ("x",)
    assert task.images == {"x": (1, 8, 8)}


def test_a_semisupervised_method_sees_a_hundred_labels():
    task = make_task({"name": "digits"}, "m2", 0)
    assert int(task.train.present("y").sum()) == 100
    assert "y" not in task.test
    assert not task.transductive


def test_hidden_classes_have_no_labelled_row():
    task = make_task({"name": "digits", "labels": 70, "hidden_classes": 3}, "vade", 0)
    shown = task.train["y"][task.train.present("y")]
    assert torch.equal(shown.unique(), torch.arange(7))
    assert shown.bincount().tolist() == [10] * 7
    truth = task.labels[task.train.present("y")]
    assert torch.equal(shown, truth)
    assert task.known_classes == 7
    everything = make_task({"name": "digits", "labels": "all", "hidden_classes": 3}, "vade", 0)
    assert torch.equal(everything.train.present("y"), everything.labels < 7)


def test_hidden_entries_differ_by_seed_and_leave_the_truth():
    a, b = (make_task({"name": "digits", "hidden": 0.3}, "vade", seed) for seed in (0, 1))
    assert not torch.equal(a.train.present("x"), b.train.present("x"))
    share = 1 - a.train.present("x").double().mean()
    assert share == pytest.approx(0.3, abs=0.01)
    assert torch.equal(a.truth["x"], datasets.load("digits", split="test").x)


@pytest.fixture
def frame():
    rng = np.random.default_rng(0)
    table = pd.DataFrame(
        rng.normal(size=(60, 4)), columns=list("abcd"), index=[f"r{i}" for i in range(60)]
    )
    table["kind"] = np.where(table["a"] > 0, "up", "down")
    table.loc["r3", "b"] = np.nan
    table.loc["r5", "kind"] = None
    return table


def test_a_table_has_views_holes_and_labels_apart(frame, tmp_path):
    path = tmp_path / "table.csv"
    frame.rename_axis("id").to_csv(path)
    data = {"file": str(path), "label": "kind", "index": "id", "hidden": 0.2}
    data["views"] = {"left": ["a", "b"], "right": ["c", "d"]}
    task = make_task(data, "vade", 0)
    assert task.transductive
    assert task.train.names == ("x_left", "x_right")
    assert task.label_names == ["down", "up"]
    assert int(task.labels[5]) == -1
    assert torch.isnan(task.truth["x_left"]).sum() == 1
    hidden = scoring._hidden(task)
    assert not hidden[3, 1]  # nobody knows it
    assert 0.1 < hidden.double().mean() < 0.3
    supervised = make_task({**data, "labels": "all"}, "vade", 0)
    assert len(supervised.test) == 12  # a fifth of the 59 labelled rows
    assert len(supervised.train) == 48
    assert bool((supervised.test_labels >= 0).all())
    assert int(supervised.train.present("y").sum()) == 47


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"name": "digits", "holes": 0.2}, "unknown settings of the data: holes"),
        ({}, "either a name .* or a file"),
        ({"name": "digits", "file": "a.csv"}, "either a name .* or a file"),
        ({"name": "digits", "label": "y"}, "has no label"),
        ({"name": "digits", "hidden": 1.5}, "share between 0 and 1, got 1.5"),
        ({"name": "digits", "hidden_classes": 3}, "needs labels to be shown"),
        ({"name": "wine", "split": "all"}, "a table has no split"),
        ({"name": "wine", "labels": "all", "test": 1.0}, "share between 0 and 1, got 1.0"),
        ({"file": "none.csv"}, "none.csv"),
    ],
)
def test_settings_that_do_not_fit(data, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        make_task(data, "vade", 0)


def test_open_set_names_known_classes_and_matches_new_ones():
    labels = torch.tensor([0, 0, 1, 1, 2, 2, 2, 3])
    found = torch.tensor([0, 1, 1, 1, 3, 3, 0, 2])  # 2 is called 3, and 3 is called 2
    figures = scoring.open_set(labels, torch.eye(4)[found], known_classes=2)
    assert figures["known_accuracy"] == 3 / 4
    assert figures["new_accuracy"] == 3 / 4
    assert figures["new_recall"] == 3 / 4
    assert figures["open_accuracy"] == 6 / 8
    swapped = scoring.open_set(torch.tensor([0, 1]), torch.eye(2)[torch.tensor([1, 0])], 2)
    assert swapped["open_accuracy"] == 0  # known classes are not matched


def test_labelled_rows_have_a_plain_rival():
    data = {"name": "digits", "labels": 100}
    task = make_task(data, "m2", 0)
    model = zoo.create("m2", task.train, hidden=(8,), latent_dim=2)
    found = plain_rivals(model, task, 0)
    shown = task.train.present("y")
    fitted = LogisticRegression(max_iter=2000).fit(task.train["x"][shown], task.train["y"][shown])
    by_hand = 1 - fitted.score(task.test["x"], task.test_labels)
    assert found["logistic"]["test_error"] == pytest.approx(by_hand)
    assert 0 < found["logistic"]["calibration_error"] < 0.5
    assert (
        plain_rivals(model, make_task({**data, "labels": 70, "hidden_classes": 3}, "m2", 0), 0)
        == {}
    )
