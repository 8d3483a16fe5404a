"""Fuzzing data sets, tasks, methods made for them, and their rivals."""

import math
import warnings

import numpy as np
import torch

from fuzzing.core import ODD, attempt, chance, must, pick
from fuzzing.kept import home
from pyrozoo.inference import Batch, schedules
from pyrozoo.zoo import baselines, datasets, runs, scoring
from pyrozoo.zoo.tasks import Task, make_task


def data_sets(rng):
    """Data sets, what is hidden of them, tasks, methods made for them, and their rivals."""
    part = pick(rng, [_halved, _hidden, _open_set, _schedules, _rivals, _task, _task, _made, _made])
    part(rng)


def _halved(rng):
    channels, height, width = (int(v) for v in rng.integers(1, 5, 3))
    x = torch.from_numpy(rng.random((3, channels * height * width)))
    shape = (channels, height, width)
    if width < 2 or chance(rng, 0.3):
        wrong = pick(rng, [(channels, height, width + 1), (1, 1, 1), None, (0, 0, 0)])
        attempt(lambda: datasets.halves(x, wrong if width > 1 else shape), spoilt=f"shape {wrong}")
        return
    found = attempt(lambda: datasets.halves(x, shape), spoilt=False)
    left, right = (found[n].reshape(3, channels, height, -1) for n in ("x_left", "x_right"))
    must(torch.equal(torch.cat([left, right], -1).flatten(1), x), "two halves are the whole")


def _hidden(rng):
    n, k = int(rng.integers(1, 12)), int(rng.integers(1, 4))
    y = torch.from_numpy(rng.permutation(np.arange(n * k) % k))
    each = int(rng.integers(0, n + 1))
    wrong = {
        "too many": lambda: datasets.hide_labels(y, n * k + 1, 0),
        "negative": lambda: datasets.hide_labels(y, -1, 0),
        "no whole number": lambda: datasets.hide_labels(y, pick(rng, [0.5, "1", True, None]), 0),
        "floats": lambda: datasets.hide_labels(y.double(), 0, 0),
        "a column": lambda: datasets.hide_labels(y[:, None], 0, 0),
        "a share": lambda: datasets.hide_rows(y, pick(rng, [-0.1, 1.5, math.nan]), 0),
        "a split": lambda: datasets.load("digits", split=pick(rng, ["some", "", None])),
        "a name": lambda: datasets.load(pick(rng, ["digit", "", None, 3, ["digits"]])),
        "a table": lambda: datasets.table(pick(rng, ["vine", "", None])),
    }
    if chance(rng, 0.5):
        why = pick(rng, wrong)
        attempt(wrong[why], spoilt=why)
    value, kept = attempt(lambda: datasets.hide_labels(y, each * k, 1), spoilt=False)
    must(torch.equal(value[kept], y[kept]) and not bool(value[~kept].any()), "labels")
    must(torch.bincount(y[kept], minlength=k).tolist() == [each] * k, "a balanced few")
    share = float(rng.random())
    value, kept = attempt(lambda: datasets.hide_rows(y.double() + 1, share, 1), spoilt=False)
    must(int((~kept).sum()) == round(share * len(y)), "rows hidden")
    must(bool(((value > 0) == kept).all()), "hidden rows are zero")


def _open_set(rng):
    n, k = int(rng.integers(1, 12)), int(rng.integers(2, 5))
    labels, known = torch.from_numpy(rng.integers(0, k, n)), int(rng.integers(1, k))
    perfect = torch.eye(k)[labels]
    found = attempt(lambda: scoring.open_set(labels, perfect, known), spoilt=False)
    must(found["open_accuracy"] == 1, "a perfect answer is perfect")
    mixed = torch.from_numpy(rng.dirichlet(np.ones(k), n))
    found = attempt(lambda: scoring.open_set(labels, mixed, known), spoilt=False)
    must(all(math.isnan(v) or 0 <= v <= 1 for v in found.values()), "range")


def _schedules(rng):
    epochs = pick(rng, [0, -1, 1, 3.5, 10])
    spoilt = f"epochs={epochs}" if epochs <= 0 else False
    made = pick(rng, [
        lambda: schedules.linear(0, 1, epochs), lambda: schedules.cosine(epochs, 0.1),
        lambda: schedules.steps(0.5, epochs),
    ])  # fmt: skip
    schedule = attempt(made, spoilt=spoilt)
    values = [schedule(t) for t in (0.0, 0.5, 3.0, 1e6)]
    must(all(0 <= v <= 1 for v in values), "a schedule stays between its ends")


def _rivals(rng):
    n, k = int(rng.integers(2, 10)), int(rng.integers(1, 4))
    x = rng.normal(size=(n, 2)).astype(pick(rng, ["f4", "f8"]))
    if chance(rng, 0.6):
        wrong = {
            "more clusters than rows": lambda: baselines.kmeans(x, n + 1, 0),
            "more components than rows": lambda: baselines.gmm(x, n + 1, 0),
            "no clusters": lambda: baselines.kmeans(x, 0, 0),
            "NaN": lambda: baselines.kmeans(x * math.nan, 2, 0),
            "infinite": lambda: baselines.gmm(x + math.inf, 2, 0),
            "a vector": lambda: baselines.kmeans(x[:, 0], 1, 0),
            "no rows": lambda: baselines.kmeans(x[:0], 1, 0),
            "no pixels": lambda: baselines.train_autoencoder(x + 5, (2,), 1, 1),
            "no epochs": lambda: baselines.train_autoencoder(x, (2,), 1, 0, loss="mse"),
            "a loss": lambda: baselines.train_autoencoder(x, (2,), 1, 1, loss="mae"),
            "an empty column": lambda: baselines.imputers(np.where([True, False], math.nan, x), 0),
        }
        why = pick(rng, wrong)
        attempt(wrong[why], spoilt=why)
    if k <= len(x):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # scikit-learn's, of few points
            found = attempt(lambda: baselines.kmeans(x, k, 0), spoilt=False)
        must(found.shape == (n, k) and (found.sum(1) == 1).all(), "one cluster a row")


def _task(rng):
    sound = {"file": str(home() / "t.csv"), "label": "kind"}
    wrong = {
        "labels": [-1, 2.5, "some", True, 99, [1], math.nan], "hidden_classes": [-1, 1.5, True, "1"],
        "hidden": [-0.1, 1.0, 2, math.nan, "0.5", True, None, [0.5]],
        "test": [-0.1, 1.0, math.nan, "0.5", True, None], "missing": [0.5, 0.0, "x"],
        "split": ["train", 3], "label": ["nix", 3, ["kind"], "a"], "drop": [["nix"], "a", "kind", 3],
        "views": [{"p": ["nix"]}, {"p": "a"}, {"p": ["a"], "q": ["a"]}, ["a"], 3],
        "columns": [{"nix": "real"}, {"a": "nix"}, {"a": "count"}, ["a"], 3],
        "index": ["nix", 99, 1.5], "file": ["nix.csv", 3, "", "t.txt", None], "name": ["digits", None, 3],
        "nix": [1], "Labels": ["all"],
    }  # fmt: skip
    method = pick(rng, ["vade", "m2", "own"])
    if chance(rng, 0.6):
        key = pick(rng, wrong)
        value = pick(rng, wrong[key])
        data = {**sound, key: value}
        if key == "hidden_classes":
            data["labels"] = "all"
        says = [key, repr(value), str(value), "num_labelled"]
        says += list(map(repr, value)) if isinstance(value, dict | list) else []
        attempt(lambda: make_task(data, method, 0), *says, spoilt=f"{key}={value!r}")
        return
    labels = pick(rng, [None, 0, 2, 8, "all"])
    data = {**sound, "labels": labels, "hidden": pick(rng, [0, 0.3]), "test": pick(rng, [0, 0.25])}
    data = {k: v for k, v in data.items() if v is not None or k == "labels"}
    task = attempt(lambda: make_task(data, method, 0), spoilt=False)
    held = round(0.25 * 24) if data["test"] else 0
    must(len(task.train) == 24 - held and len(task.labels) == len(task.train), "rows of training")
    must(len(task.test) == (held or 24) and "y" not in task.test.drop("y"), "rows of the test")
    shown = int(task.train.present("y").sum())
    must(shown == {None: 0, 0: 0, "all": 24 - held}.get(labels, labels), "labels that are shown")
    known = task.train.present("y")
    if "y" in task.train:
        must(torch.equal(task.train["y"][known], task.labels[known]), "labels are true")
        must(not bool(task.train["y"][~known].any()), "no label leaks")
    if data["hidden"]:
        hidden = ~task.train.present("x")
        must(not bool(task.train["x"][hidden].any()), "no hidden value leaks")


def _made(rng):
    rows = Batch.of({"x": torch.rand(6, 4, generator=torch.Generator().manual_seed(0))})
    views = Batch.of({"x_a": rows["x"], "x_b": rows["x"]})
    method = pick(rng, ["vade", "m2", "mvae", "hivae"])
    given = views if method == "mvae" else rows
    task = Task(given, torch.full((6,), -1), given, torch.full((6,), -1))
    accepted = runs.method(method).options
    small = {k: v for k, v in (("hidden", [3]), ("latent_dim", 2)) if k in accepted}
    name = pick(rng, [*accepted, "nix"])
    value = pick(rng, [*ODD, [4], 2, 0.5, False, [0], [4, 2.5], "nix", 10**7])
    options = {**small, name: value}
    sure = name == "nix" or (
        value is not None
        and isinstance(accepted.get(name), bool | int | float)
        and isinstance(value, str | list | dict)
    )
    says = [name, repr(value), *(map(repr, value) if isinstance(value, dict) else [])]
    model = attempt(
        lambda: runs.make_model({"method": method, "options": options}, task, 0), *says,
        spoilt=f"{name}={value!r}" if sure else None,
    )  # fmt: skip
    must(model.options[name] == value or value is None, "the option is kept")
    attempt(lambda: model.objective.explain(model.program, model.guide, given), spoilt=False)
