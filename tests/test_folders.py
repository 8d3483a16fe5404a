"""A run folder is enough: to report, predict and sample, from the command line."""

import json
import re
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from pyrozoo.zoo import datasets, exports, folders, runs
from pyrozoo.zoo.cli import app

SMALL = {"hidden": [8], "latent_dim": 2}


def invoke(*words):
    return CliRunner().invoke(app, [str(w) for w in words], catch_exceptions=True)


@pytest.fixture(scope="module")
def wine(tmp_path_factory):
    """A csv file with holes, and a run on it."""
    home = tmp_path_factory.mktemp("wine")
    frame, label = datasets.table("wine")
    x = frame.drop(columns=label)
    x = x.mask(np.random.default_rng(0).random(x.shape) < 0.2)
    table = x.assign(**{label: frame[label]}).rename_axis("bottle")
    table.to_csv(home / "wine.csv")
    words = ["--label", label, "--index", "bottle", "--epochs", 3, "--set", "hidden=[8]"]
    words += ["--set", "latent_dim=2", "--out", home / "run"]
    done = invoke("train", "vade", "--data", home / "wine.csv", *words)
    assert done.exit_code == 0, done.output
    return home


def test_a_run_reads_back_bit_for_bit(wine):
    run = folders.load(wine / "run", runs.make_model)
    assert run.facts["spec"]["options"] == SMALL
    assert not run.supervised
    assert len(run.train) == 178
    again = folders.load(wine / "run", runs.make_model)
    for name, value in run.result.parameters.items():
        assert torch.equal(value, again.result.parameters[name])
    first, second = (r.result.responsibilities(r.train, seed=0) for r in (run, again))
    assert torch.equal(first, second)


def test_the_folder_moves_and_needs_no_data(wine, tmp_path):
    shutil.copytree(wine / "run", tmp_path / "moved")
    (tmp_path / "moved" / "report.html").unlink()
    spec = json.loads((tmp_path / "moved" / "run.json").read_text())
    spec["spec"]["data"]["file"] = "/nowhere/else.csv"  # never opened
    (tmp_path / "moved" / "run.json").write_text(json.dumps(spec))
    done = invoke("report", tmp_path / "moved")
    assert done.exit_code == 0, done.output
    page = (tmp_path / "moved" / "report.html").read_text()
    assert "vade on else.csv" in page


def test_predict_fills_in_what_is_missing_and_keeps_what_is_known(wine):
    out = wine / "filled.csv"
    words = ("predict", wine / "run", "--data", wine / "wine.csv", "--out", out)
    done = invoke(*words, "--num-samples", 50)
    assert done.exit_code == 0, done.output
    given, found = (pd.read_csv(p, index_col="bottle") for p in (wine / "wine.csv", out))
    assert list(found.index) == list(given.index)
    columns = [c for c in given.columns if c != "cultivar"]
    known = given[columns].notna()
    assert found[columns].notna().all(axis=None)
    close = np.isclose(found[columns], given[columns], rtol=1e-6)
    assert (close == known.to_numpy()).all()
    lower, upper = (found[[f"{c}_{k}" for c in columns]].to_numpy() for k in ("lower", "upper"))
    assert (lower <= upper).all()
    assert ((upper - lower > 0) == ~known.to_numpy()).mean() > 0.999
    assert np.isfinite(found["bound"]).all()
    shares = found[[f"p(y={k})" for k in range(3)]]
    assert np.allclose(shares.sum(axis=1), 1, atol=1e-5)
    assert (found["y"] == shares.to_numpy().argmax(1)).all()
    again = invoke(*words)
    assert "exists" in str(again.exception)


def test_predict_says_what_a_file_lacks(wine, tmp_path):
    table = pd.read_csv(wine / "wine.csv").drop(columns="ash")
    table.to_csv(tmp_path / "less.csv", index=False)
    done = invoke(
        "predict", wine / "run", "--data", tmp_path / "less.csv", "--out", tmp_path / "o.csv"
    )
    assert "lacks 'ash'" in str(done.exception)
    words = ("--out", tmp_path / "o.csv", "--absent")
    done = invoke("predict", wine / "run", "--data", tmp_path / "less.csv", *words)
    assert done.exit_code == 0, done.output
    assert pd.read_csv(tmp_path / "o.csv")["ash"].notna().all()


@pytest.mark.parametrize("suffix", ["csv", "parquet", "npz"])
def test_sample_writes_rows_of_a_cluster(wine, suffix):
    out = wine / f"drawn.{suffix}"
    done = invoke("sample", wine / "run", "--out", out, "--rows", 7, "--given", "y=1")
    assert done.exit_code == 0, done.output
    if suffix == "npz":
        with np.load(out) as drawn:
            assert drawn["x"].shape == (7, 13)
            assert (drawn["y"] == 1).all()
        return
    drawn = pd.read_csv(out) if suffix == "csv" else pd.read_parquet(out)
    assert len(drawn) == 7
    assert (drawn["y"] == 1).all()
    assert drawn["alcohol"].between(5, 25).all()


def test_sample_refuses_what_it_does_not_know(wine):
    for given in ("y=3", "q=1", "y"):
        done = invoke("sample", wine / "run", "--out", wine / "no.csv", "--given", given)
        assert done.exit_code != 0
        assert isinstance(done.exception, ValueError), done.exception
    assert not (wine / "no.csv").exists()


def test_labels_of_a_table_are_held_out_and_reported(wine):
    words = ["--label", "cultivar", "--index", "bottle", "--labels", "all", "--epochs", 3]
    words += ["--set", "hidden=[8]", "--set", "latent_dim=2", "--out", wine / "labelled"]
    done = invoke("train", "vade", "--data", wine / "wine.csv", *words)
    assert done.exit_code == 0, done.output
    figures = json.loads((wine / "labelled" / "metrics.json").read_text())
    assert {"test_error", "calibration_error"} <= set(figures)
    run = folders.load(wine / "labelled", runs.make_model)
    assert len(run.test) == 36
    found = exports.predict(run, run.test, num_samples=5)
    frame = exports.to_frame(run, found)
    assert set(frame["y"]) <= {"class_0", "class_1", "class_2"}
    assert "p(y=class_1)" in frame


def test_arrays_come_in_and_go_out(tmp_path):
    x = datasets.load("digits", split="test").x.numpy()
    present = np.random.default_rng(0).random(x.shape) > 0.1
    whole = (x * 255).astype(np.uint8).reshape(-1, 8, 8)
    np.savez(tmp_path / "digits.npz", x=whole)
    words = ("--epochs", 1, "--set", "hidden=[8]", "--out", tmp_path / "run")
    done = invoke(
        "train", "vade", "--data", tmp_path / "digits.npz", *words, "--set", "num_clusters=4"
    )
    assert done.exit_code == 0, done.output
    np.savez(tmp_path / "holes.npz", x=whole, x_present=present.reshape(-1, 8, 8))
    out = tmp_path / "out.npz"
    done = invoke("predict", tmp_path / "run", "--data", tmp_path / "holes.npz", "--out", out)
    assert done.exit_code == 0, done.output
    with np.load(out) as found:
        assert found["x_filled"].shape == x.shape
        assert np.allclose(found["x_filled"][present], whole.reshape(x.shape)[present] / 255)
        assert found["p_y"].shape == (360, 4)


OWN = """
import pyro, pyro.distributions as dist, torch
from torch import nn
from pyrozoo.zoo.networks import Decoder

class Model(nn.Module):
    def __init__(self, x_dim=64, latent_dim=3):
        super().__init__()
        self.latent_dim = latent_dim
        self.decoder = Decoder(latent_dim, (16,), x_dim)

    def forward(self, batch):
        with pyro.plate("data", len(batch)):
            z = pyro.sample("z", dist.Normal(torch.zeros(self.latent_dim), 1.0).to_event(1))
            pyro.sample("x", self.decoder(z))
"""


def test_a_program_of_ones_own_is_named_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.py").write_text(OWN)
    done = invoke("train", "./my.py:Model", "--epochs", 1, "--out", "run", "--set", "latent_dim=2")
    assert done.exit_code == 0, done.output
    done = invoke("sample", "run", "--out", "drawn.npz", "--rows", 3)
    assert re.search("--program FILE.py:Class", str(done.exception))
    done = invoke("sample", "run", "--out", "drawn.npz", "--rows", 3, "--program", "my.py:Model")
    assert done.exit_code == 0, done.output
    with np.load("drawn.npz") as drawn:
        assert drawn["z"].shape == (3, 2)
    done = invoke("report", "run", "--program", "my.py:Model", "--out", "again.html")
    assert (tmp_path / "again.html").exists()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("run.json", None, "is no run folder"),
        ("run.json", "{", "run.json is damaged"),
        ("run.json", "[]", "run.json is damaged"),
        ("run.json", "{}", "run.json is damaged"),
        ("metrics.json", "nonsense", "metrics.json is damaged"),
        ("metrics.json", None, "metrics.json"),
        ("model.safetensors", "nonsense", "model.safetensors is damaged"),
        ("rows.safetensors", None, "rows.safetensors"),
    ],
)
def test_damaged_folders(wine, tmp_path, name, text, message):
    shutil.copytree(wine / "run", tmp_path / "run")
    (tmp_path / "run" / name).unlink()
    if text is not None:
        (tmp_path / "run" / name).write_text(text)
    done = invoke("report", tmp_path / "run")
    assert done.exit_code != 0
    assert isinstance(done.exception, ValueError | FileNotFoundError)
    assert re.search(message, str(done.exception))


def test_a_model_of_another_run_is_refused(wine, tmp_path):
    shutil.copytree(wine / "run", tmp_path / "run")
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    facts["spec"]["options"]["latent_dim"] = 3
    (tmp_path / "run" / "run.json").write_text(json.dumps(facts))
    done = invoke("report", tmp_path / "run")
    assert "belongs to another program" in str(done.exception)
