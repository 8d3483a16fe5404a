"""Choosing the number of clusters by held-out bound and by agreement between seeds."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from pyrozoo.zoo import sweeps
from pyrozoo.zoo.cli import app


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """Three clear groups in a csv file."""
    home = tmp_path_factory.mktemp("sweep")
    rng = np.random.default_rng(0)
    middle = np.array([[0, 0, 0], [6, 0, -6], [0, 7, 7]])[rng.integers(3, size=150)]
    np.savetxt(
        home / "three.csv",
        middle + rng.normal(size=(150, 3)),
        "%.4f",
        ",",
        header="a,b,c",
        comments="",
    )
    spec = {
        "method": "vade", "data": {"file": str(home / "three.csv")},
        "options": {"hidden": [16], "latent_dim": 2}, "start": {"epochs": 30, "lr": 0.01},
        "fit": {"epochs": 20, "lr": 0.005, "batch_size": 64},
    }  # fmt: skip
    return home, spec


def test_three_groups_are_found_and_nothing_is_fitted_twice(three, monkeypatch):
    home, spec = three
    records = sweeps.sweep(spec, "num_clusters", [3, 9], home / "out", seeds=2, progress=False)
    assert [r["value"] for r in records] == [3, 9]
    assert records[0]["stability"] > 0.9 > records[1]["stability"]
    assert records[0]["clusters_used"] == 3
    assert (home / "out" / "sweep.png").stat().st_size > 5000
    assert json.loads((home / "out" / "sweep.json").read_text())["summary"] == records
    monkeypatch.setattr(sweeps, "_fit", None)  # would fail if called
    again = sweeps.sweep(spec, "num_clusters", [3, 9], home / "out", seeds=2, progress=False)
    assert again == records
    with pytest.raises(ValueError, match="of another sweep"):
        sweeps.sweep({**spec, "fit": {}}, "num_clusters", [1], home / "out", seeds=2)


def test_the_command_prints_a_table(three):
    home, _ = three
    words = ["sweep", "vade", "--data", str(home / "three.csv"), "--values", "2-3", "--seeds", "1"]
    words += ["--set", "hidden=[8]", "--epochs", "1", "--out", str(home / "cli")]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert "best held-out bound: num_clusters = " in done.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--values", "5-2"], "FROM-TO or a list"),
        (["--values", "a,b"], "FROM-TO or a list"),
        (["--option", "clusters"], "no option 'clusters'"),
    ],
)
def test_wrong_sweeps(words, message, tmp_path):
    done = CliRunner().invoke(app, ["sweep", "vade", *words, "--out", str(tmp_path / "s")])
    assert message in str(done.exception)
