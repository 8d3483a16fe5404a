"""Programs of one's own on files: the names that a program uses decide what the columns are."""

import json
import re

import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from pyrozoo.zoo import own, tables
from pyrozoo.zoo.cli import app
from pyrozoo.zoo.tasks import make_task

HEAD = """
import pyro
import pyro.distributions as dist
import torch

class Model(torch.nn.Module):
    def __init__(self, hidden=(8,), x_dim=2):
        super().__init__()
        self.b, self.w = torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.ones(x_dim))

    def forward(self, batch):
"""
REGRESSION = """
        s = pyro.sample("s", dist.HalfNormal(1.0))
        with pyro.plate("data", len(batch)):
            k = pyro.sample("k", dist.Categorical(torch.ones(3) / 3))
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            mean = self.b[batch["group"]] + batch["age"] + z
            pyro.sample("y", dist.Normal(mean + k, s))
            pyro.sample("smoker", dist.Bernoulli(logits=z))
            pyro.sample("kind", dist.Categorical(torch.stack([z, -z, 0 * z], -1).softmax(-1)))
"""
VECTOR = """
        with pyro.plate("data", len(batch)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0)).unsqueeze(-1)
            pyro.sample("x", dist.Normal(self.w * z, 1.0).to_event(1))
"""
READS_X = VECTOR.replace(".to_event(1)", '.to_event(1), obs=batch["x"]')
BOTH = VECTOR.replace("self.w * z", 'self.w * z + batch["age"].unsqueeze(-1)')
PAIR = """
        with pyro.plate("data", len(batch)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("u", dist.Normal(z, 1.0))
            pyro.sample("v", dist.Normal(z.unsqueeze(-1) * torch.ones(3), 1.0).to_event(1))
"""
LABELLED = """
        with pyro.plate("data", len(batch)):
            y = pyro.sample("y", dist.Categorical(torch.ones(2) / 2))
            pyro.sample("u", dist.Normal(self.b[y], 1.0))
"""
ROWS = 30


def invoke(*words):
    return CliRunner().invoke(app, [str(w) for w in words], catch_exceptions=True)


def done(*words):
    result = invoke(*words)
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def program(home, body):
    (home / "my.py").write_text(HEAD + body)
    return own.find_class(str(home / "my.py") + ":Model")


def patients():
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(
        {
            "id": [f"p{i}" for i in range(ROWS)],
            "age": rng.normal(size=ROWS),
            "group": rng.integers(0, 3, ROWS),
            "k": pd.array(rng.integers(0, 3, ROWS), dtype="Int64"),
            "y": rng.normal(size=ROWS),
            "smoker": pd.array(rng.random(ROWS) < 0.5, dtype="boolean"),
            "kind": pd.array(rng.integers(0, 3, ROWS), dtype="Int64"),
        }
    )
    for step, name in enumerate(("k", "y", "smoker", "kind"), 2):
        frame.loc[::step, name] = pd.NA
    return frame


def read(cls, file, **data):
    """The specification, the task, the model and what was said."""
    said = []
    spec = own.with_values(
        cls, {"method": "my", "data": {"file": str(file), **data}, "options": {}}, said.append
    )
    task = make_task(spec["data"], "my", 0)
    return spec, task, own.maker(cls)(spec, task, 0), said


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_columns_are_the_sites_and_inputs_of_their_names(home, kind):
    frame = patients()
    tables.write(frame, home / f"t.{kind}")
    spec, task, model, said = read(program(home, REGRESSION), f"t.{kind}")
    assert spec["data"]["values"] == ["age", "group", "k", "y", "smoker", "kind"]
    assert said == ["left out, as Model does not use them: 'id'"]
    assert set(task.train.names) == {"age", "group", "k", "y", "smoker", "kind"}
    assert model.objective.inputs == ("group", "age")
    assert model.guide.given == ("y", "smoker", "kind", "k", "group", "age")
    for name in task.train.names:
        known = frame[name].notna().to_numpy()
        assert (task.train.present(name).numpy() == known).all()
        assert (task.train[name].numpy()[known] == frame[name][known].to_numpy(np.float32)).all()
        floats = name in ("age", "y")
        assert task.train[name].dtype == (torch.float32 if floats else torch.int64)


def test_a_regression_from_the_command_line(home):
    program(home, REGRESSION)
    frame = patients()
    frame.to_csv("t.csv", index=False)
    output = done("train", "./my.py:Model", "--data", "t.csv", "--epochs", 1, "--out", "run")
    assert "left out" in output
    assert "age: input" in output
    assert "smoker: observed; missing in 8 of 30 rows" in output
    assert "my on t.csv" in (home / "run" / "report.html").read_text()
    assert json.loads((home / "run" / "run.json").read_text())["spec"]["data"]["drop"] == ["id"]

    mine = ("--program", "my.py:Model")
    assert "--program FILE.py:Class" in str(invoke("report", "run").exception)
    frame.drop(columns="y").to_csv("new.csv", index=False)
    done("predict", "run", *mine, "--data", "new.csv", "--absent", "--out", "p.csv")
    found = pd.read_csv("p.csv")
    assert (found["y_lower"] < found["y_filled"]).all()
    assert set(found["kind_filled"]) <= {0, 1, 2}
    known = frame["smoker"].notna()
    assert (found["smoker_filled"][known] == frame["smoker"][known].astype(int)).all()
    assert "lacks 'y'" in str(
        invoke("predict", "run", *mine, "--data", "new.csv", "--out", "q.csv").exception
    )
    refused = invoke("sample", "run", *mine, "--out", "s.csv")
    assert "reads group, age, which it does not generate" in str(refused.exception)


def test_guides_of_a_regression_are_compared(home):
    program(home, REGRESSION)
    patients().drop(columns=["id", "k", "kind"]).to_csv("t.csv", index=False)
    words = ("--epochs", 1, "--quick", "--guides", "default", "--out", "found")
    output = done("compare", "./my.py:Model", "--data", "t.csv", *words)
    assert re.search(r"ELBO +-\d", output)
    assert (home / "found" / "compare.html").exists()


def test_arrays_are_the_sites_of_their_names(home):
    rng = np.random.default_rng(0)
    u, v = rng.normal(size=ROWS), rng.normal(size=(ROWS, 3))
    u[:4], known = np.nan, rng.random((ROWS, 3)) < 0.7
    np.savez("t.npz", u=u, v=v, v_present=known, w=np.arange(ROWS))
    _, task, model, said = read(program(home, PAIR), "t.npz")
    assert said == ["left out, as Model does not use them: 'w'"]
    assert model.objective.inputs == ()
    assert task.train["v"].shape == (ROWS, 3)
    assert (task.train.present("v").numpy() == known).all()
    assert int((~task.train.present("u")).sum()) == 4
    done("train", "./my.py:Model", "--data", "t.npz", "--epochs", 1, "--out", "run")
    mine = ("--program", "my.py:Model")
    done("report", "run", *mine, "--out", "again.html")
    assert (home / "again.html").exists()
    done("predict", "run", *mine, "--data", "t.npz", "--out", "p.npz")
    with np.load("p.npz") as found:
        assert np.allclose(found["v_filled"][known], v[known])
    done("sample", "run", *mine, "--rows", 5, "--out", "s.csv")
    assert list(pd.read_csv("s.csv")) == ["z", "u", "v[0]", "v[1]", "v[2]"]


@pytest.mark.parametrize("body", [VECTOR, READS_X])
def test_a_vector_x_is_made_of_all_columns(home, body):
    table = pd.DataFrame(np.random.default_rng(0).normal(size=(ROWS, 3)), columns=["x", "a", "b"])
    table.to_csv("t.csv", index=False)
    spec, task, model, said = read(program(home, body), "t.csv")
    assert spec["data"] == {"file": "t.csv"}
    assert said == []
    assert model.options["x_dim"] == 3
    assert np.allclose(task.train["x"], table)
    assert task.schema.columns == ("x", "a", "b")


def test_a_vector_x_is_made_of_what_is_not_called_by_name(home):
    table = pd.DataFrame(np.random.default_rng(0).normal(size=(ROWS, 3)), columns=["a", "age", "b"])
    table.to_csv("t.csv", index=False)
    cls = program(home, BOTH)
    _, task, model, said = read(cls, "t.csv")
    assert (said, model.options["x_dim"], model.objective.inputs) == ([], 2, ("age",))
    assert np.allclose(task.train["x"], table[["a", "b"]])
    _, task, _, said = read(cls, "t.csv", drop=["b"], label=None)
    assert task.train.shape("x") == (ROWS, 1)
    rng = np.random.default_rng(0)
    np.savez("t.npz", x=table[["a", "b"]], age=table["age"], y=rng.integers(0, 2, ROWS))
    _, task, model, _ = read(cls, "t.npz")
    assert set(task.train.names) == {"x", "age"}
    assert bool((task.labels >= 0).all())  # for scores: y is no site of this program


@pytest.mark.parametrize(
    ("body", "columns", "message"),
    [
        (PAIR, "a,b", r"calls no column of t.csv by its name \(columns: 'a', 'b'; sites: 'z', 'u'"),
        (BOTH, "a,b", r"reads batch\['age'\], but t.csv has no such column \(columns: 'a', 'b'\)"),
        (PAIR.replace("(z,", '(batch["x"],'), "u,b", r"reads batch\['x'\], but t.csv has no such"),
    ],
)
def test_names_that_do_not_meet(home, body, columns, message):
    (home / "t.csv").write_text(columns + "\n1,2.5\n2,3.5\n3,4.5\n4,6.5\n")
    with pytest.raises(ValueError, match=message):
        read(program(home, body), "t.csv")


def test_text_is_no_value_but_for_labels(home):
    (home / "t.csv").write_text("u,y\n" + "1.5,low\n2.5,high\n" * 5)
    cls = program(home, LABELLED)
    with pytest.raises(ValueError, match="column 'y' holds text, such as 'high', 'low'"):
        read(cls, "t.csv")
    _, task, model, _ = read(cls, "t.csv", label="y", labels=4)
    assert task.label_names == ["high", "low"]
    assert int(task.train.present("y").sum()) == 4
    assert model.guide.given == ("u", "y")


def test_hidden_entries_are_those_of_x(home):
    patients().to_csv("t.csv", index=False)
    with pytest.raises(ValueError, match="hidden is for the columns of x"):
        read(program(home, REGRESSION), "t.csv", hidden=0.1)


def test_a_schema_keeps_the_names_of_values():
    table = tables.read({"a": np.arange(4), "b": np.ones((4, 2))}, values=["a", "b"])
    text = table.schema.to_json()
    again = tables.Schema.from_json(text)
    assert again == table.schema
    assert again.values == {"a": "int64", "b": "float32"}
    new = again.encode({"a": np.arange(2), "b": np.ones((2, 2), np.int64)})
    assert new.data["b"].dtype == torch.float32
    older = {k: v for k, v in json.loads(text).items() if k != "values"}
    with pytest.raises(ValueError, match="one site or more"):
        tables.Schema.from_json(json.dumps(older))
    with pytest.raises(ValueError, match="'values' are of type"):
        tables.Schema.from_json(json.dumps({**older, "values": {"a": "text"}}))
