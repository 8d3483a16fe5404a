"""The catalogue and the runs: every entry can be made, fitted, scored, cited and shown."""

import json
import re
from importlib.metadata import version

import pytest
import torch

from pyrozoo import zoo
from pyrozoo.inference import metrics
from pyrozoo.zoo import baselines, catalogue, datasets, reproduction, runs
from pyrozoo.zoo.cli import app


@pytest.fixture(scope="module")
def digits():
    return datasets.load("digits", split="train")


SMALL = {"hidden": (64,), "latent_dim": 10}


def test_lists_and_lookups():
    assert {"vade", "m2", "mvae"} <= set(zoo.list_methods())
    assert zoo.list_methods("clustering")[:2] == ["vade", "mfcvae"]
    assert "m2" not in zoo.list_methods("clustering")
    with pytest.raises(ValueError, match="tasks: clustering"):
        zoo.list_methods("cooking")
    with pytest.raises(ValueError, match="did you mean 'vade'"):
        zoo.method("vadee")
    for name in zoo.list_methods():
        entry = zoo.method(name)
        assert entry.tier in ("core", "maintained", "reference")
        citation = zoo.citation(name)
        assert citation.startswith("@")
        assert "title" in citation
        assert "~" in entry.doc
        assert re.search("^Sources?: ", entry.doc, re.MULTILINE)
        assert entry.options


def test_options_are_checked(digits):
    with pytest.raises(ValueError, match=r"no option num_cluster \(.*did you mean 'num_clusters'"):
        zoo.create("vade", {"x": digits.x}, num_cluster=3)
    with pytest.raises(ValueError, match="have no 'x'"):
        zoo.create("vade", {"y": digits.y})
    with pytest.raises(ValueError, match=r"flat rows .*\(1, 8, 8\)"):
        zoo.create("vade", {"x": digits.x.reshape(-1, 1, 8, 8)})
    with pytest.raises(ValueError, match="two or more modalities"):
        zoo.create("mvae", {"x": digits.x})


def test_the_seed_decides_and_the_caller_keeps_its_random_state(digits):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    a, b, c = (zoo.create("m2", {"x": digits.x}, seed=s, hidden=(4,)) for s in (0, 0, 1))
    assert torch.equal(torch.rand(2), expected)
    first = [next(model.program.parameters()) for model in (a, b, c)]
    assert torch.equal(first[0], first[1])
    assert not torch.equal(first[0], first[2])


def test_vade_beats_the_same_mixture_without_a_decoder(digits):
    """Law: every entry clears a rival that is computed in the same test."""
    data = {"x": digits.x}
    model = zoo.create("vade", data, hidden=(128,), latent_dim=10)
    start = {"epochs": 40, "lr": 2e-3, "noise": 0.2, "num_starts": 3}
    result = model.fit(data, epochs=5, progress=False, start=start)
    found = result.responsibilities(data, seed=0).argmax(1)
    mixture = baselines.gmm(digits.x, 10, 0, "diag", n_init=3).predict(digits.x.numpy())
    rival = metrics.hungarian_accuracy(digits.y, mixture)
    assert metrics.hungarian_accuracy(digits.y, found) > rival + 0.02


def test_m2_beats_the_majority_class_and_a_linear_rule(digits):
    labels = datasets.hide_labels(digits.y, 100, seed=0)
    data = {"x": digits.x, "y": labels}
    model = zoo.create("m2", data, hidden=(64,), latent_dim=5, alpha=1.0)
    result = model.fit(data, epochs=12, lr=3e-3, batch_size=100, progress=False)
    test = datasets.load("digits", split="test")
    error = 1 - metrics.accuracy(test.y, result.responsibilities({"x": test.x}).argmax(1))
    majority = 1 - test.y.bincount().max().item() / len(test.y)
    assert error < majority / 3


def test_mvae_beats_the_mean_image():
    options = {"hidden": (64,), "latent_dim": 5, "likelihood": "normal(0.3)", "warmup": 25.0}
    spec = {"method": "mvae", "data": {"name": "digits", "missing": 0.3}, "options": options}
    spec["fit"] = {"epochs": 30, "lr": 4e-3}
    *_, figures = runs.fit_spec(spec, 0, progress=False)
    for side in ("left", "right"):
        assert figures[f"mse_x_{side}"] < 0.9 * figures[f"mean_mse_x_{side}"]


def test_labels_name_the_clusters_of_vade(digits):
    spec = {"method": "vade", "data": {"name": "digits", "labels": 100}, "options": SMALL}
    spec |= {"start": {"epochs": 30, "lr": 3e-3, "noise": 0.2}, "fit": {"epochs": 5}}
    *_, figures = runs.fit_spec(spec, 0, progress=False)
    assert figures["test_error"] < 0.4  # nine tenths, if clusters had no names


def test_hidden_are_filled_in_and_have_no_rival_that_needs_them(tmp_path):
    data = {"name": "digits", "hidden": 0.5}
    spec = {"method": "vade", "data": data, "options": SMALL}
    spec |= {"start": {"epochs": 5, "num_starts": 1}, "fit": {"epochs": 2}}
    figures = runs.run(spec, tmp_path, progress=False)
    assert {"mse_hidden", "mean_mse_hidden", "hungarian_accuracy"} <= set(figures)
    assert "kmeans" not in figures


def test_experiments_are_well_formed():
    for name in runs.experiments():
        assert re.fullmatch(r"[a-z]+\d{4}_[a-z0-9]+_[a-z0-9_]+", name)
        spec = runs.load_experiment(name)
        entry = zoo.method(spec["method"])
        assert set(spec.get("options", {})) <= set(entry.options)
        assert spec["data"]["name"] in (*datasets.names(), *datasets.TABLES)
        assert name.startswith(entry.paper)
    with pytest.raises(ValueError, match="no experiment is called 'none'"):
        runs.load_experiment("none")


def test_reproduce_goes_on_and_stores_what_it_says(tmp_path, monkeypatch):
    spec = {
        "method": "m2", "data": {"name": "digits", "labels": 50}, "options": {"hidden": [8]},
        "fit": {"epochs": 1}, "published": {"test_error": 0.1},
    }  # fmt: skip
    monkeypatch.setattr(runs, "load_experiment", lambda name: spec)
    path = reproduction.reproduce("some2000_m2_digits", 1, tmp_path)
    first = json.loads(path.read_text())
    path = reproduction.reproduce("some2000_m2_digits", 2, tmp_path)
    record = json.loads(path.read_text())
    assert record["seeds"]["0"] == first["seeds"]["0"]
    assert set(record["seeds"]) == {"0", "1"}
    errors = [record["seeds"][s]["test_error"] for s in "01"]
    assert record["mean"]["test_error"] == pytest.approx(sum(errors) / 2)
    assert record["command"] == "pyrozoo reproduce some2000_m2_digits --seeds 2"
    assert {"python", "torch", "pyro-ppl"} <= set(record["versions"])
    spec["fit"] = {"epochs": 2}
    with pytest.raises(ValueError, match="other settings"):
        reproduction.reproduce("some2000_m2_digits", 2, tmp_path)


def test_stored_results_belong_to_their_experiments():
    for record in reproduction.stored():
        assert record["spec"] == json.loads(json.dumps(runs.load_experiment(record["experiment"])))
        for key, mean in record["mean"].items():
            values = [row[key] for row in record["seeds"].values()]
            assert mean == pytest.approx(sum(values) / len(values))


def test_a_run_folder_has_everything(tmp_path):
    spec = {"method": "vade", "data": {"name": "digits", "split": "test"}, "options": SMALL}
    spec |= {"start": {"epochs": 2}, "fit": {"epochs": 2}}
    figures = runs.run(spec, tmp_path / "run", progress=False, command="pyrozoo train vade")
    names = {p.name for p in (tmp_path / "run").iterdir()}
    assert names == {
        ".checkpoint.safetensors.lock", "checkpoint.safetensors", "history.csv", "metrics.json",
        "model.safetensors", "report.html", "rows.safetensors", "run.json", "start",
    }  # fmt: skip
    stored = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert stored == json.loads(json.dumps(figures))
    assert {"kmeans", "ae_gmm", "hungarian_accuracy"} <= set(stored)
    page = (tmp_path / "run" / "report.html").read_text()
    assert page.count("<img") + page.count("<svg") >= 5


OWN = """
import pyro
import pyro.distributions as dist
import torch
from torch import nn
from pyrozoo.zoo.networks import Decoder

class Model(nn.Module):
    def __init__(self, x_dim=64):
        super().__init__()
        self.decoder = Decoder(3, (16,), x_dim)

    def forward(self, batch):
        with pyro.plate("data", len(batch)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("x", self.decoder(z))
"""


def invoke(*words):
    from typer.testing import CliRunner

    return CliRunner().invoke(app, list(words), catch_exceptions=True)


def test_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "vade" in invoke("list").output
    assert version("pyrozoo") in invoke("--version").output
    shown = invoke("show", "m2").output
    for part in (
        "Categorical",
        "summed over",
        "@inproceedings",
        "alpha",
    ):
        assert part in shown
    (tmp_path / "my.py").write_text(OWN)
    done = invoke("train", "./my.py:Model", "--epochs", "1", "--out", "own")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "own" / "report.html").exists()
    again = invoke("train", "./my.py:Model", "--epochs", "1", "--out", "own")
    assert "already has a run" in str(again.exception)
    more = invoke("train", "./my.py:Model", "--epochs", "2", "--out", "own", "--resume")
    assert more.exit_code == 0, more.output
    assert len((tmp_path / "own" / "history.csv").read_text().splitlines()) == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("train", "vadee"), "did you mean 'vade'"),
        (("train", "vade", "--data", "digit"), "did you mean 'digits'|digits"),
        (("train", "vade", "--labels", "many"), "a number or 'all'"),
        (("train", "vade", "--set", "num_clusters"), "NAME=VALUE"),
        (("train", "vade", "--set", "clusters=3"), "no option clusters"),
        (("train", "./none.py:Model"), "existing file"),
        (("show", "nothing"), "no method is called"),
        (("reproduce", "nothing"), "no experiment is called"),
    ],
)
def test_wrong_commands_say_what_is_wrong(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = invoke(*words)
    assert result.exit_code != 0
    assert re.search(message, str(result.exception)), result.exception
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").iterdir())


def test_the_catalogue_is_loaded_lazily():
    assert "Model" in dir(zoo)
    assert zoo.create is catalogue.create
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        zoo.nothing  # noqa: B018
