"""Users' tables: kinds, files, missing cells, levels, round trips, and every error by its words."""

import datetime
import json
import math
import pickle
import subprocess
import sys
import zipfile
from decimal import Decimal
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_wine

from pyrozoo.inference import Batch
from pyrozoo.zoo import tables
from pyrozoo.zoo.networks import Columns
from pyrozoo.zoo.tables import KINDS, Field, Label, Schema, Site

N = 60


def people(seed: int = 0) -> pd.DataFrame:
    """Sixty rows with a column of every kind that is inferred, and a label."""
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame(
        {
            "height": rng.normal(170, 10, N),
            "income": rng.lognormal(8, 1, N),
            "visits": rng.poisson(6, N),
            "smoker": rng.random(N) < 0.3,
            "colour": rng.choice(["red", "green", "blue"], N),
            "grade": pd.Categorical(
                rng.choice(["low", "mid", "high"], N), ["low", "mid", "high"], ordered=True
            ),
            "stars": rng.integers(1, 6, N),
            "dx": rng.choice(["flu", "cold", "none"], N),
        },
        index=[f"p{i}" for i in range(N)],
    )
    frame.loc["p3", "height"] = np.nan
    frame.loc["p4", ["colour", "dx"]] = None
    return frame


def fields(table: tables.Table, site: str = "x") -> dict[str, Field]:
    return {f.name: f for f in table.schema.site(site).columns}


def kind_of(values, **options) -> str:
    return fields(tables.read(pd.DataFrame({"c": values}), **options))["c"].kind


def value_of(table: tables.Table, site: str = "x") -> torch.Tensor:
    entry = table.data[site]
    return entry if isinstance(entry, torch.Tensor) else entry[0]


def same_data(a: tables.Table, b: tables.Table) -> None:
    assert a.data.keys() == b.data.keys()
    for site in a.data:
        assert torch.equal(value_of(a, site), value_of(b, site))
        if site != "y":
            assert np.array_equal(a.present(site), b.present(site))


# ---- kinds ---------------------------------------------------------------------------------------


def test_every_kind_is_inferred() -> None:
    table = tables.read(people(), label="dx")
    assert {name: f.kind for name, f in fields(table).items()} == {
        "height": "real",
        "income": "positive",
        "visits": "count",
        "smoker": "binary",
        "colour": "categorical",
        "grade": "ordered",
        "stars": "ordered",
    }
    for f in fields(table).values():
        assert f.likelihood == KINDS[f.kind][0]
    assert fields(table)["smoker"].levels == (False, True)
    assert fields(table)["colour"].levels == ("blue", "green", "red")
    assert fields(table)["grade"].levels == ("low", "mid", "high")
    assert fields(table)["stars"].levels == (1, 2, 3, 4, 5)
    assert table.schema.label == Label("dx", ("cold", "flu", "none"))


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([0.5, 1.5, 0.5, None], "binary"),
        ([True, False, None], "binary"),
        (["a", "b", "b"], "binary"),
        (pd.Categorical(["a", "b"], ["b", "a"], ordered=True), "binary"),
        (pd.Categorical(["a", "b", "a"], ["a", "b", "c"]), "categorical"),
        (pd.Categorical([1, 2, 1], [3, 2, 1], ordered=True), "ordered"),
        (["a", "b", "c"] * 2, "categorical"),
        ([0, 1, 2] * 2, "ordered"),
        ([0.5, -1.5, 7.25] * 2, "ordered"),
        ([0, 1, 2, 3, 4, 5] * 9, "count"),
        ([0, 1, 2], "count"),
        ([0.0, 3.0, None, 9.0], "count"),
        (pd.array([0, 3, None, 9], dtype="Int64"), "count"),
        ([Decimal(0), Decimal(3), Decimal(9)], "count"),
        ([-1, 0, 5, 9], "real"),
        ([0.0, 0.5, 1.5, 2.0], "real"),
        (list(np.exp(np.linspace(-3, 3, 9))), "positive"),
        (list(np.linspace(10, 11, 9)), "real"),
    ],
)
def test_rules_of_inference(values, kind: str) -> None:
    assert kind_of(values) == kind


def test_levels_keep_type_and_order() -> None:
    def levels(values) -> tuple:
        found = fields(tables.read(pd.DataFrame({"c": values})))["c"].levels
        return tuple((type(v), v) for v in found)

    assert levels([2, 1, 2]) == ((int, 1), (int, 2))
    assert levels([2.0, 1.0, 2.0]) == ((float, 1.0), (float, 2.0))
    assert levels([2.0, 1.0, None]) == ((int, 1), (int, 2))  # integers, once read with a hole
    assert levels([0.5, None, 1]) == ((float, 0.5), (float, 1.0))
    assert levels(np.array([True, False])) == ((bool, False), (bool, True))
    assert levels(pd.Categorical(["b", "a"], ["b", "a"])) == ((str, "b"), (str, "a"))
    assert levels(np.array(["b", "a"], dtype=np.str_)) == ((str, "a"), (str, "b"))


@pytest.mark.parametrize("likelihood", [name for names in KINDS.values() for name in names])
def test_every_likelihood_can_be_asked_for(likelihood: str) -> None:
    values = {"beta": [0.2, 0.4, 0.9], "continuous_bernoulli": [0.0, 0.5, 1.0]}
    given_values = values.get(likelihood, [1, 2, 1] if likelihood == "bernoulli" else [1, 2, 4])
    table = tables.read(pd.DataFrame({"c": given_values}), columns={"c": likelihood})
    assert fields(table)["c"].likelihood == likelihood
    columns = table.schema.likelihoods()["x"]
    assert isinstance(columns, Columns)
    value = value_of(table)
    distribution = columns(torch.zeros(3, columns.num_params))
    assert distribution.log_prob(value).isfinite().all()
    assert distribution.log_prob(value).shape == (3,)


@pytest.mark.parametrize(
    ("wish", "kind", "levels"),
    [
        ("count", "count", ()),
        ("student_t", "real", ()),
        ("categorical", "categorical", (1, 2, 4)),
        ([4, 2, 1, 0], "ordered", (4, 2, 1, 0)),
        ({"categorical": [1, 2, 3, 4]}, "categorical", (1, 2, 3, 4)),
        ("proportion", None, None),
    ],
)
def test_overrides(wish, kind, levels) -> None:
    frame = pd.DataFrame({"c": [1, 2, 4, 2]})
    if kind is None:
        with pytest.raises(ValueError, match=r"column 'c': beta needs numbers between 0 and 1"):
            tables.read(frame, columns={"c": wish})
        return
    field = fields(tables.read(frame, columns={"c": wish}))["c"]
    assert (field.kind, field.levels) == (kind, levels)


def test_center_and_spread_are_those_of_known_training_rows_on_the_scale_of_networks() -> None:
    frame = people()
    table = tables.read(frame, rows=np.arange(40), drop=["dx"])
    train = frame.iloc[:40]
    for name, scale in [("height", lambda x: x), ("income", np.log), ("visits", np.log1p)]:
        seen = scale(train[name].dropna().to_numpy(dtype=float))
        assert fields(table)[name].center == pytest.approx(seen.mean(), rel=1e-12)
        assert fields(table)[name].spread == pytest.approx(seen.std(), rel=1e-12)
    share = train["smoker"].mean()
    assert fields(table)["smoker"].center == pytest.approx(share)
    assert (fields(table)["grade"].center, fields(table)["grade"].spread) == (0.0, 1.0)
    odds = tables.read(pd.DataFrame({"c": [0.1, 0.5, 0.9]}), columns={"c": "beta"})
    assert fields(odds)["c"].center == pytest.approx(0, abs=1e-12)
    assert fields(odds)["c"].spread == pytest.approx(math.log(9) * math.sqrt(2 / 3))


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        ([1, 2, 3, -4, 5.5], {"columns": {"c": "count"}}, r"'c': negative_binomial needs whole numbers from 0 to 16777216 .*got -4, 5\.5 in rows 3, 4$"),
        ([1, 2, 2**24 + 1], {}, r"'c': .*got 16777217 in row 2; subtract a constant, change the unit"),
        ([0.5, 1.5, 0.0], {"columns": {"c": "positive"}}, r"'c': log_normal needs numbers above 0, got 0 in row 2"),
        ([0.5, 1e-60, 3.0], {"columns": {"c": "positive"}}, r"'c': log_normal needs numbers above 0, got 1e-60"),
        ([0.5, 1.0, 0.2], {"columns": {"c": "beta"}}, r"'c': beta needs numbers between 0 and 1, without them, got 1 in row 1"),
        ([0.5, 1.1, 0.2], {"columns": {"c": "continuous_bernoulli"}}, r"'c': continuous_bernoulli needs numbers from 0 to 1, got 1\.1"),
        ([1, 2, 3], {"columns": {"c": "binary"}}, r"'c' cannot be binary: it has 3 values, 1, 2, 3"),
        (["a", "b", "c"] * 2, {"columns": {"c": "count"}}, r"'c' cannot be count: that takes numbers, and it holds text, such as 'a', 'b'"),
        ([True, False], {"columns": {"c": "real"}}, r"'c' cannot be real: .* holds bool"),
        (["a", "b", "c"], {"columns": {"c": "ordered"}}, r"'c': text has no order of its own; give the levels from low to high"),
        (["a", "b", "d"], {"columns": {"c": ["a", "b"]}}, r"'c': unknown level 'd' in row 2; the levels are 'a', 'b'"),
        ([1, 2, 3], {"columns": {"c": "counts"}}, r"'c': expected a kind \('real', .*got 'counts'"),
        ([1, 2, 3], {"columns": {"c": {"count": [1, 2, 3]}}}, r"'c': expected a kind .*got \{'count'"),
        ([1, 2, 3], {"columns": {"c": 3}}, r"'c': expected a kind .*got 3"),
        ([1, 2, 3], {"columns": {"c": [1, 2, 3, 3]}}, r"'c' needs two or more different levels"),
        ([1, 2, 3], {"columns": {"c": [1, 2, 3, None]}}, r"'c': levels are text, finite numbers or booleans, got None"),
        ([f"id{i}" for i in range(9)], {}, r"'c' has 9 distinct values in 9 rows and looks like an identifier or free text; leave it out \(drop=\[\.\.\.\]\)"),
        ([f"id{i}" for i in range(51)] * 3, {}, r"'c' has 51 distinct values in 153 rows and looks like"),
        (pd.Categorical([f"id{i}" for i in range(51)]), {}, r"'c' has 51 distinct values in 51 rows"),
        (["1.5", "2", "-3", "<4"], {}, r"'c' has 4 .*; most of it is numbers, but not '<4'$"),
        ([1.0, np.inf, -np.inf, 2.0], {}, r"'c' has infinite numbers in rows 1, 2"),
        (pd.Series([1, 10**400, 2], dtype=object), {}, r"'c' has infinite numbers in row 1"),
        (pd.to_datetime(["2020-01-01", None]), {}, r"'c' holds dates or times; make it a number first"),
        ([datetime.date(2020, 1, 1), None], {}, r"'c' holds dates or times"),
        (pd.period_range("2020", periods=2, freq="D"), {}, r"'c' holds dates or times"),
        ([1, "a", None], {}, r"'c' mixes cells of type int and str; make them all one type"),
        ([True, 2.5], {}, r"'c' mixes cells of type bool and float"),
        ([[1], [2]], {}, r"'c' holds cells of type list; a column holds numbers, booleans or text"),
        ([b"a", b"b"], {}, r"'c' holds cells of type bytes"),
        ([1j, 2j], {}, r"'c' holds complex numbers"),
        ([2**60, 2**60 + 2**20], {}, r"'c': integers beyond 2\*\*53 cannot be told apart as levels, rows 0, 1"),
        ([1.7e9, 1.7e9 + 3, 1.7e9 + 7.5], {}, r"'c': float32 loses how its values differ, which are near 1\.7e\+09 and vary by 3\.77; subtract a constant \(1\.7e\+09\)"),
        ([1e-12, -2.2e-12, 3.5e-12], {}, r"'c': float32 loses how .* or change the unit first"),
        ([1.5, 1e39, -2.5], {}, r"'c': normal needs numbers within the range of float32, got .*row 1"),
        ([5, 5, None], {}, r"one value or none: 'c' \(only 5\); leave them out with drop=\[\.\.\.\], or all such columns with constant='drop'"),
        ([None, None], {}, r"one value or none: 'c' \(no value\)"),
        ([7], {}, r"one value or none: 'c' \(only 7\)"),
        ([], {}, r"the data frame has no rows to learn from"),
    ],
)  # fmt: skip
def test_columns_that_cannot_be(values, options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tables.read(pd.DataFrame({"c": values}), **options)


def test_the_rule_of_float32_is_a_ratio_of_ten_thousand() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(0, 1, 500)
    assert kind_of(values + 5e3) == "real"
    with pytest.raises(ValueError, match="float32 loses"):
        kind_of(values + 3e4)
    heavy = np.append(values, 1e9)
    assert kind_of(heavy, columns={"c": "student_t"}) == "real"


def test_useless_columns_can_be_dropped_and_may_come_again() -> None:
    frame = pd.DataFrame({"a": [1.5, 2.25, 4.0], "b": [1, 1, 1], "c": [None, None, None]})
    table = tables.read(frame, constant="drop")
    assert (table.schema.columns, table.schema.dropped) == (("a",), ("b", "c"))
    same_data(table.schema.encode(frame[["b", "a"]]), table)
    with pytest.raises(ValueError, match="no columns are left for site 'x'"):
        tables.read(frame[["b", "c"]], constant="drop")
    with pytest.raises(ValueError, match="constant is 'error' or 'drop'"):
        tables.read(frame, constant="ignore")


# ---- reading -------------------------------------------------------------------------------------


def test_table_is_what_a_batch_takes() -> None:
    frame = people()
    table = tables.read(frame, label="dx")
    batch = Batch.of(table.data)
    assert len(batch) == len(table) == N
    assert batch.shape("x") == (N, 7)
    assert int((~batch.present("x")).sum()) == 2
    assert int((~batch.present("y")).sum()) == 1
    assert batch["x"].dtype == torch.float32
    assert table.labels is not None
    assert table.labels[4] == -1
    names = table.schema.label.levels
    assert [names[c] for c in table.labels if c >= 0] == frame["dx"].dropna().tolist()
    assert table.index.equals(frame.index)
    height = batch["x"][:, 0].numpy()
    assert np.array_equal(height[5:], frame["height"].to_numpy(dtype=np.float32)[5:])
    assert height[3] == 0


def test_summary_says_what_is_missing() -> None:
    frame = people()[["height", "visits", "dx"]].copy()
    frame.loc["p9", ["height"]] = np.nan
    frame["visits"] = frame["visits"].astype("Int64").mask(frame.index == "p9")
    lines = tables.read(frame, label="dx").summary()
    assert lines == [
        "x: 60 rows, 2 columns (1 real, 1 count); 3 of 120 entries missing; 2 rows incomplete,"
        " 1 with nothing known",
        "y: 60 rows, label 'dx' of 3 classes ('cold', 'flu', 'none'); 1 of 60 unlabelled",
    ]


@pytest.mark.parametrize(
    "missing",
    [
        pd.DataFrame({"c": [1.5, None, 4.0, 9.25]}),
        pd.DataFrame({"c": pd.array([1.5, None, 4.0, 9.25], dtype="Float64")}),
        pd.DataFrame({"c": pd.array([1.5, np.nan, 4.0, 9.25], dtype="Float64")}),
        pd.DataFrame({"c": [1.5, pd.NA, 4.0, 9.25]}, dtype=object),
        pd.DataFrame({"c": [1.5, pd.NaT, 4.0, 9.25]}, dtype=object),
        pd.DataFrame({"c": [Decimal("1.5"), Decimal("NaN"), Decimal(4), Decimal("9.25")]}),
    ],
)
def test_every_spelling_of_missing(missing: pd.DataFrame) -> None:
    table = tables.read(missing, columns={"c": "real"})
    assert table.present("x")[:, 0].tolist() == [True, False, True, True]
    assert value_of(table)[:, 0].tolist() == [1.5, 0.0, 4.0, 9.25]


def test_views_become_sites() -> None:
    frame = people()
    views = {"body": ["height", "smoker"], "survey": ["stars", "grade"]}
    table = tables.read(frame, label="dx", views=views, drop=["income", "visits", "colour"])
    assert [s.name for s in table.schema.sites] == ["x_body", "x_survey"]
    assert tuple(fields(table, "x_survey")) == ("stars", "grade")
    assert set(table.data) == {"x_body", "x_survey", "y"}
    assert set(table.schema.likelihoods()) == {"x_body", "x_survey"}
    assert len(table.summary()) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"views": {"a": ["height"]}, "drop": ["dx", "visits"]}, r"columns in no view: 'income', 'smoker', 'colour', 'grade', 'stars'"),
        ({"views": {"a": ["height"], "b": ["height"]}}, r"columns in two views: 'height'"),
        ({"views": {"a": ["hight"]}}, r"views names 'hight', which is no column .*did you mean 'height'\?"),
        ({"views": {"a": ["dx"]}, "label": "dx"}, r"views have columns that are the label or dropped: 'dx'"),
        ({"views": {"a b": ["height"]}}, r"names of letters, digits and _, got 'a b'"),
        ({"views": {"a": "height"}}, r"views are name -> list of columns.*got 'a': 'height'"),
        ({"views": {"a": []}}, r"views are name -> list of columns"),
        ({"drop": ["hight"]}, r"drop names 'hight'.*did you mean 'height'"),
        ({"columns": {"hight": "real"}}, r"columns names 'hight'"),
        ({"label": "d"}, r"label names 'd', which is no column"),
        ({"label": "dx", "drop": ["dx"]}, r"'dx' is the label and asked for as something else"),
        ({"label": "dx", "columns": {"dx": "categorical"}}, r"'dx' is the label and asked for"),
        ({"drop": ["dx"], "columns": {"dx": "categorical"}}, r"'dx' is dropped and asked for"),
        ({"rows": [True, False]}, r"has 60 rows, the mask of rows 2"),
        ({"rows": [0, 60]}, r"has rows 0 to 59, got 60"),
        ({"rows": [-1]}, r"has rows 0 to 59, got -1"),
        ({"rows": [0.5]}, r"rows are a vector of booleans or of row numbers"),
        ({"rows": []}, r"has no rows to learn from"),
        ({"index": "hight"}, r"no column 'hight' for the index"),
        ({"index": 99}, r"no column number 99; there are 8"),
    ],
)  # fmt: skip
def test_what_was_asked_for_must_make_sense(options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tables.read(people(), **options)


def test_names_of_columns_are_text_and_differ() -> None:
    with pytest.raises(ValueError, match=r"two columns are called 'a'"):
        tables.read(pd.DataFrame([[1, 2], [3, 4]], columns=["a", "a"]))
    with pytest.raises(ValueError, match=r"names of columns are text, got 0, 1; rename them"):
        tables.read(pd.DataFrame([[1, 2], [3, 4]]))


@pytest.mark.parametrize("source", [3, [1, 2], pd.Series([1, 2]), np.zeros((3, 2)), None])
def test_other_sources_are_refused(source) -> None:
    with pytest.raises(TypeError, match="expected a path, a pandas data frame or a dictionary"):
        tables.read(source)


def test_lists_of_columns_are_lists() -> None:
    with pytest.raises(TypeError, match="drop is a list of columns, got the text 'dx'"):
        tables.read(people(), drop="dx")
    with pytest.raises(TypeError, match="drop is a list of columns, got the text 'dx'"):
        tables.read(people(), drop=["dx"]).schema.encode(people(), drop="dx")


@pytest.mark.parametrize(
    ("values", "levels", "labels"),
    [
        ([3, 1, 3, -1], (1, 3), [1, 0, 1, -1]),
        ([3.0, 1.0, None, -1.0], (1, 3), [1, 0, -1, -1]),
        (["b", "a", None, "b"], ("a", "b"), [1, 0, -1, 1]),
        ([True, False, None, True], (False, True), [1, 0, -1, 1]),
        (pd.Categorical(["b", "a", None, "b"], ["b", "a", "z"]), ("a", "b"), [1, 0, -1, 1]),
    ],
)
def test_labels(values, levels, labels) -> None:
    frame = pd.DataFrame({"x": [0.5, 1.25, 3.0, 9.0], "l": values})
    table = tables.read(frame, label="l")
    assert table.schema.label == Label("l", levels)
    assert [type(v) for v in table.schema.label.levels] == [type(v) for v in levels]
    assert table.labels.tolist() == labels
    assert value_of(table, "y").tolist() == [max(c, 0) for c in labels]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([0.5, 1.0, 2.0, 1.0], r"'l' holds numbers such as 0\.5; labels are classes"),
        (["a", "b", "c", "d"], r"'l' has 4 classes in 4 rows; it looks like an identifier"),
        ([1, -1, 1, -1], r"'l' needs two classes or more, got 1; -1 means unlabelled"),
        ([None] * 4, r"'l' needs two classes or more, got none"),
        (pd.to_datetime(["2020-01-01"] * 4), r"'l' holds dates"),
    ],
)
def test_labels_that_cannot_be(values, message: str) -> None:
    frame = pd.DataFrame({"x": [0.5, 1.25, 3.0, 9.0], "l": values})
    with pytest.raises(ValueError, match=message):
        tables.read(frame, label="l")


# ---- new data ------------------------------------------------------------------------------------


def test_encode_ignores_the_order_of_columns_and_keeps_the_index() -> None:
    frame = people()
    table = tables.read(frame, label="dx")
    shuffled = frame[sorted(frame.columns)].iloc[::-1]
    new = table.schema.encode(shuffled)
    assert new.index.equals(shuffled.index)
    assert torch.equal(value_of(new), value_of(table).flip(0))
    assert new.labels.tolist() == table.labels.tolist()[::-1]
    some_rows = table.schema.encode(shuffled, rows=np.arange(N) < 5)
    assert some_rows.index.tolist() == shuffled.index[:5].tolist()


def test_encode_without_label_without_rows_and_of_one_row() -> None:
    frame = people()
    schema = tables.read(frame, label="dx").schema
    new = schema.encode(frame.drop(columns="dx"))
    assert new.labels is None
    assert set(new.data) == {"x"}
    empty = schema.encode(frame.iloc[:0])
    assert len(empty) == 0
    assert value_of(empty).shape == (0, 7)
    assert len(Batch.of(empty.data)) == 0
    assert empty.summary()[0].startswith("x: 0 rows, 7 columns")
    assert schema.decode("x", value_of(empty), empty.index).shape == (0, 7)
    assert schema.summarise("x", np.zeros((3, 0, 7))).value.shape == (0, 7)
    one = schema.encode(frame.iloc[[5]])
    assert value_of(one).shape == (1, 7)
    assert len(Batch.of(one.data)) == 1
    unlabelled = schema.encode(frame.assign(dx=None))
    assert (unlabelled.labels == -1).all()
    assert "y" not in Batch.of(unlabelled.data)


def test_absent_columns() -> None:
    frame = people()
    schema = tables.read(frame, label="dx").schema
    part = frame.drop(columns=["grade", "height"])
    with pytest.raises(ValueError, match=r"lacks 'grade', 'height'; .*absent='missing'"):
        schema.encode(part)
    new = schema.encode(part, absent="missing")
    assert new.present("x").any(0).tolist() == [False, True, True, True, True, False, True]
    with pytest.raises(ValueError, match="absent is 'error' or 'missing', got 'ok'"):
        schema.encode(part, absent="ok")


def test_unknown_columns() -> None:
    frame = people()
    schema = tables.read(frame, label="dx", drop=["stars"]).schema
    more = frame.assign(extra=1, other=2)
    with pytest.raises(ValueError, match=r"has 'extra', 'other', which the model does not know"):
        schema.encode(more)
    same_data(schema.encode(more, drop=["extra", "other"]), schema.encode(frame))


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("colour", "pink", r"column 'colour': unknown level 'pink' in row 'p7'; the levels are 'blue', 'green', 'red'; if it has more of them, read the training data with columns=\{'colour': \{\"categorical\": \[\.\.\.\]\}\}"),
        ("stars", 9, r"column 'stars': unknown level 9 in row 'p7'"),
        ("smoker", "yes", r"column 'smoker': unknown level 'yes' in row"),
        ("dx", "plague", r"column 'dx': unknown level 'plague' in row 'p7'; the levels are 'cold', 'flu', 'none'$"),
        ("visits", -1, r"column 'visits': negative_binomial needs whole numbers .*got -1 in row 'p7'"),
        ("income", 0.0, r"column 'income': log_normal needs numbers above 0, got 0 in row 'p7'"),
        ("height", "tall", r"column 'height': expected numbers \(real\), got text in row"),
        ("height", True, r"column 'height': expected numbers \(real\), got booleans in row"),
        ("height", np.inf, r"column 'height' has infinite numbers in row 'p7'"),
    ],
)  # fmt: skip
def test_cells_that_the_model_does_not_know(column: str, value, message: str) -> None:
    frame = people()
    schema = tables.read(frame, label="dx").schema
    new = frame.copy()
    if isinstance(value, str | bool) and column not in ("colour", "dx"):
        new[column] = value  # the whole column is of another type
    else:
        new.loc["p7", column] = value
    with pytest.raises(ValueError, match=message):
        schema.encode(new)


def test_many_rows_are_named_in_part() -> None:
    frame = pd.DataFrame({"c": ["a", "b"] * 20})
    schema = tables.read(frame).schema
    with pytest.raises(ValueError, match=r"'z' in rows 0, 1, 2, 3, 4 and 35 more; the levels"):
        schema.encode(pd.DataFrame({"c": ["z"] * 40}))


def test_read_only_and_strided_input_is_not_touched() -> None:
    base = np.random.default_rng(0).normal(size=(10, 8))
    view = base[::2, ::-2]
    view.setflags(write=False)
    before = base.copy()
    table = tables.read({"x": view})
    assert torch.equal(value_of(table), torch.from_numpy(view.astype(np.float32)))
    value_of(table).zero_()
    assert np.array_equal(base, before)
    pixels = np.arange(48, dtype=np.uint8).reshape(3, 4, 4)[:, ::-1]
    pixels.setflags(write=False)
    table = tables.read({"x": pixels})
    assert value_of(table)[0].tolist() == pixels[0].flatten().tolist()
    value_of(table).zero_()
    assert pixels.any()
    frame = pd.DataFrame(base, columns=list("abcdefgh"))
    value_of(tables.read(frame)).zero_()
    assert np.array_equal(frame.to_numpy(), before)


# ---- arrays --------------------------------------------------------------------------------------


def test_arrays_of_all_sorts(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x_a = rng.normal(size=(9, 3)).astype(">f8")
    x_a[2, 1] = np.nan
    present = np.ones(9, dtype=bool)
    present[4] = False
    images = rng.integers(0, 256, (9, 2, 3), dtype=np.uint8)
    arrays = {
        "x_a": x_a,
        "x_a_present": present,
        "x_b": rng.random((9, 2)) < 0.5,
        "x_b_present": np.arange(18).reshape(9, 2) != 5,
        "x_c": images,
        "x_c_present": np.arange(54).reshape(9, 2, 3) != 7,
        "y": np.array([0, 5, 5, -1, 0, 0, 5, -1, 0], dtype=np.int8),
    }
    path = tables.write(arrays, tmp_path / "a.npz")
    table = tables.read(path)
    same_data(tables.read({k: torch.from_numpy(v.astype(v.dtype.newbyteorder("="))) for k, v in arrays.items()}), table)  # fmt: skip
    assert [s.name for s in table.schema.sites] == ["x_a", "x_b", "x_c"]
    assert tuple(fields(table, "x_a")) == ("x_a[0]", "x_a[1]", "x_a[2]")
    assert {f.kind for f in fields(table, "x_b").values()} == {"binary"}
    assert table.schema.site("x_c").image_shape == (2, 3)
    assert table.present("x_a").sum() == 27 - 3 - 1
    assert table.present("x_b").sum() == 17
    assert table.present("x_c").sum() == 53
    assert table.labels.tolist() == [0, 1, 1, -1, 0, 0, 1, -1, 0]
    assert table.schema.label == Label("y", (0, 5))
    pixels = value_of(table, "x_c")
    assert pixels.dtype == torch.uint8
    assert torch.equal(pixels, torch.from_numpy(images.reshape(9, 6)))
    assert table.schema.likelihoods()["x_c"] == "bernoulli"
    assert "x_c: 9 rows, 2 x 3 pixels; 1 of 54 entries missing" in table.summary()[2]
    batch = Batch.of(table.data)
    shown = table.schema.images("x_c", batch["x_c"])
    assert shown.shape == (9, 2, 3)
    known = np.arange(54).reshape(9, 2, 3) != 7
    assert np.array_equal(shown[known], images[known])
    same_data(Schema.from_json(table.schema.to_json()).encode(path), table)
    alone = table.schema.encode({"x_a": x_a}, absent="missing")
    assert not alone.present("x_c").any()


def test_a_site_of_arrays_stands_for_its_columns() -> None:
    x = np.arange(12.0).reshape(4, 3) ** 2
    assert {f.kind for f in fields(tables.read({"x": x})).values()} == {"count"}
    table = tables.read({"x": x}, columns={"x": "student_t", "x[1]": "count"})
    assert [f.kind for f in fields(table).values()] == ["real", "count", "real"]
    assert tables.read({"x": x}, drop=["x[1]"]).schema.columns == ("x[0]", "x[2]")
    both = tables.read({"x_a": x, "x_b": x, "x_c": (x * 2).astype(np.uint8)}, drop=["x_a", "x_c"])
    assert [s.name for s in both.schema.sites] == ["x_b"]
    assert len(both.schema.encode({"x_b": x, "x_a": x})) == 4


def test_black_images_are_read_as_a_batch_would() -> None:
    images = np.full((3, 4), 255, dtype=np.uint8)
    schema = tables.read({"x": images}).schema
    black = schema.encode({"x": np.eye(3, 4, dtype=np.uint8)})
    assert torch.equal(Batch.of(black.data)["x"], torch.eye(3, 4) / 255)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({}, r"no array x or x_<view>"),
        ({"y": np.arange(3)}, r"no array x or x_<view>"),
        ({"z": np.zeros((3, 2))}, r"expected arrays x or x_<view>, y, and <site>_present, got 'z'"),
        ({"x": np.eye(3), "x_b_present": np.ones(3, bool)}, r"got 'x_b_present'"),
        ({"x": np.eye(3), "y": np.arange(4)}, r"same number of rows, got \{'x': 3, 'y': 4\}"),
        ({"x": np.eye(3), "y": np.zeros(3)}, r"'y' is expected to hold whole numbers \(N,\)"),
        ({"x": np.eye(3), "y": np.zeros((3, 1), int)}, r"'y' is expected to hold whole numbers"),
        ({"x": np.zeros(3)}, r"'x' has shape \(3,\) and type float64; expected columns"),
        ({"x": np.zeros((3, 2, 2))}, r"'x' has shape \(3, 2, 2\) .*or images as uint8"),
        ({"x": np.zeros((3, 0))}, r"'x' has shape \(3, 0\)"),
        ({"x": np.float64(3)}, r"'x' is no array but float64"),
        ({"x": np.array(3)}, r"'x' is a single number"),
        ({"x": np.array([["a"]])}, r"'x' has type <U1; arrays hold numbers or booleans"),
        ({"x": np.array([[{}]])}, r"'x' has type object"),
        ({"x": np.ma.masked_array(np.eye(3))}, r"'x' is a masked array; give x and x_present"),
        ({"x": np.eye(3), "x_present": np.ones(3)}, r"'x_present' is expected to hold booleans of shape \(3,\) or \(3, 3\), got float64"),
        ({"x": np.eye(3), "x_present": np.ones(2, bool)}, r"'x_present' .* got bool \(2,\)"),
        ({"x": np.ones(3, np.uint8)}, r"'x' holds bytes, so images"),
        ({"x": np.ones((3, 2), np.uint8)}, r"pixels from 0 to 255, but the largest is 1; store yes/no as booleans"),
        ({"x": np.full((3, 2), 9, np.uint8), "x_present": np.zeros(3, bool)}, r"'x' is known in no row"),
        ({"x": np.eye(3), "y": np.full(3, -1)}, r"'y' needs two classes or more, got none"),
        ({3: np.eye(3)}, r"3 is no array"),
    ],
)  # fmt: skip
def test_arrays_that_cannot_be(arrays, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tables.read(arrays)


def test_arrays_bring_their_own_views_label_and_index() -> None:
    arrays = {"x": np.arange(12.0).reshape(4, 3) ** 2}
    with pytest.raises(ValueError, match="arrays bring their own views and their label 'y'"):
        tables.read(arrays, views={"a": ["x[0]"]})
    with pytest.raises(ValueError, match="arrays bring their own views and their label 'y'"):
        tables.read(arrays, label="x[0]")
    with pytest.raises(ValueError, match=r"index is for \.csv and \.parquet files"):
        tables.read(arrays, index=0)
    schema = tables.read({"x": np.full((3, 2, 2), 9, np.uint8)}).schema
    with pytest.raises(
        ValueError, match=r"'x' has images of shape \(4,\), the model knows \(2, 2\)"
    ):
        schema.encode({"x": np.full((3, 4), 9, np.uint8)})
    with pytest.raises(ValueError, match=r"lacks 'x'"):
        schema.encode(pd.DataFrame({"a": [1]}), drop=["a"])


# ---- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".h5ad", ".CSV"])
def test_frames_survive_files(suffix: str, tmp_path: Path) -> None:
    frame = people()
    schema = tables.read(frame, label="dx").schema
    path = tables.write(frame, tmp_path / f"people{suffix}")
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    options = {"index": 0} if suffix.lower() == ".csv" else {}
    new = schema.encode(path, **options)
    same_data(new, schema.encode(frame))
    assert new.index.tolist() == frame.index.tolist()
    assert new.labels.tolist() == schema.encode(frame).labels.tolist()


def test_a_csv_can_be_learnt_from_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(
        "\ufeffid,size,code,flag,n,kind\n"
        'a,1.5,01,True,3,"u, v"\n'
        "b,NA,02,False,,w\n"
        "\n"
        'c,2.25,01,,7,"u, v"\n'
        "d,-4,null,True,11,w\n"
    )
    table = tables.read(path, index="id", columns={"code": ["01", "02"]}, label="kind")
    assert table.index.tolist() == ["a", "b", "c", "d"]
    assert table.index.name == "id"
    assert {n: (f.kind, f.levels) for n, f in fields(table).items()} == {
        "size": ("real", ()),
        "code": ("ordered", ("01", "02")),
        "flag": ("binary", (False, True)),
        "n": ("count", ()),
    }
    assert (~table.present("x")).sum(0).tolist() == [1, 1, 1, 1]
    new = tmp_path / "b.csv"
    new.write_text("code,flag,n,size,id,kind\n02,False,4,1,z,w\n")  # "02" is text here too
    assert value_of(table.schema.encode(new, index="id")).tolist() == [[1.0, 1.0, 0.0, 4.0]]


def test_one_column_of_a_csv_with_holes(tmp_path: Path) -> None:
    frame = pd.DataFrame({"c": [1.5, None, 2.5, 7.0]})
    path = tables.write(frame, tmp_path / "a.csv")
    assert tables.read(path).present("x")[:, 0].tolist() == [True, False, True, True]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n3\n", r"line 3 has 1 fields, the first line 2"),
        ("a,b\n1,2,3\n3,4,5\n", r"line 2 has 3 fields, the first line 2"),
        ("a,a\n1,2\n3,4\n", r"two columns are called 'a'"),
        (",b\n1,2\n3,4\n", r"column 0 has no name; .*say index=0"),
        ("", r"No columns to parse from file"),
        ('a,b\n1,"2\n3,4\n', r"EOF inside string"),
        ("a,b\n1,\0\n", r"line 2 has a null byte"),
    ],
)
def test_damaged_csv(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"bad\.csv cannot be read: .*{message}"):
        tables.read(path)


def test_csv_in_another_encoding(tmp_path: Path) -> None:
    path = tmp_path / "bad.csv"
    path.write_bytes("größe,b\n1,2\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"bad\.csv cannot be read: .*utf-8"):
        tables.read(path)


@pytest.mark.parametrize("suffix", [".parquet", ".npz", ".h5ad"])
def test_truncated_and_foreign_files(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"bad{suffix}"
    data = people() if suffix != ".npz" else {"x": np.random.default_rng(0).normal(size=(99, 9))}
    whole = tables.write(data, path).read_bytes()
    for content in (whole[: len(whole) // 2], whole[: len(whole) - 40], b"", b"no such format" * 9):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"bad\{suffix} cannot be read: ."):
            tables.read(path)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    path = tmp_path / "bad.npz"
    path.write_bytes(pickle.dumps({"x": np.zeros((3, 2))}))
    with pytest.raises(ValueError, match=r"bad\.npz cannot be read"):
        tables.read(path)
    np.savez(path, x=np.array([[object()]]))
    with pytest.raises(
        ValueError, match=r"bad\.npz cannot be read: Object arrays cannot be loaded"
    ):
        tables.read(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x", b"text")
    with pytest.raises(ValueError, match=r"bad\.npz cannot be read: 'x' is no array but bytes"):
        tables.read(path)
    with path.open("wb") as file:
        np.save(file, np.zeros((3, 2)))
    with pytest.raises(ValueError, match=r"bad\.npz cannot be read: it holds one array without a"):
        tables.read(path)


def test_missing_files_and_other_extensions(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no file .*none\.csv"):
        tables.read(tmp_path / "none.csv")
    known = r"expected a file of type \.csv, \.parquet, \.npz, \.h5ad"
    with pytest.raises(ValueError, match=known):
        tables.read(tmp_path / "a.xlsx")
    with pytest.raises(ValueError, match=known):
        tables.write(people(), tmp_path / "a.pkl")


def write_h5ad(path: Path, matrix, **obs) -> None:
    rows, genes = matrix.shape
    index = [f"cell{i}" for i in range(rows)]
    anndata.AnnData(
        matrix,
        obs=pd.DataFrame(obs, index=index),
        var=pd.DataFrame(index=[f"g{j}" for j in range(genes)]),
    ).write_h5ad(path)


@pytest.mark.parametrize("sparse", [False, True])
def test_h5ad_counts_and_obs(sparse: bool, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    counts = rng.poisson(0.7, (40, 5)).astype(np.float32)
    counts[:, 4] = counts[:, 4] > 0
    path = tmp_path / "cells.h5ad"
    batch, kind = np.where(rng.random(40) < 0.5, "u", "v"), rng.choice(["T", "B"], 40)
    matrix = scipy.sparse.csr_matrix(counts) if sparse else counts
    write_h5ad(path, matrix, batch=batch, kind=kind, note=rng.normal(size=40))
    table = tables.read(path, label="kind", columns={"batch": "categorical"})
    assert [f.kind for f in fields(table).values()] == ["count"] * 5 + ["categorical"]
    assert torch.equal(value_of(table)[:, :5], torch.from_numpy(counts))
    assert table.schema.label == Label("kind", ("B", "T"))
    assert table.index.tolist() == [f"cell{i}" for i in range(40)]
    same_data(table.schema.encode(path), table)
    views = {"rna": [f"g{j}" for j in range(5)], "other": ["note"]}
    assert fields(tables.read(path, views=views), "x_other")["note"].kind == "real"
    with pytest.raises(ValueError, match=r"index is for \.csv and \.parquet"):
        tables.read(path, index="kind")


def test_h5ad_that_points_elsewhere_or_lacks_parts(tmp_path: Path) -> None:
    path = tmp_path / "a.h5ad"
    write_h5ad(path, np.random.default_rng(0).normal(size=(9, 3)))
    tables.read(path)
    with h5py.File(path, "a") as file:
        file["obs/far"] = h5py.ExternalLink("other.h5", "/x")
    with pytest.raises(
        ValueError, match=r"a\.h5ad cannot be read: obs/far is kept in another file"
    ):
        tables.read(path)
    with h5py.File(path, "a") as file:
        del file["obs/far"], file["X"]
        file.create_dataset("X", (9, 3), dtype="f8", external=[(tmp_path / "raw", 0, 216)])
    with pytest.raises(ValueError, match=r"X is kept in another file"):
        tables.read(path)
    with h5py.File(path, "a") as file:
        del file["X"]
    with pytest.raises(ValueError, match=r"a\.h5ad cannot be read: it has no X"):
        tables.read(path)


def test_write_is_atomic_and_never_overwrites_unasked(tmp_path: Path) -> None:
    frame = pd.DataFrame({"a": [1, 2]})
    path = tables.write(frame, tmp_path / "a.csv")
    with pytest.raises(FileExistsError, match=r"a\.csv exists; say overwrite=True"):
        tables.write(frame, path)
    assert path.read_text() == "a\n1\n2\n"
    tables.write(frame + 1, path, overwrite=True)
    assert path.read_text() == "a\n2\n3\n"
    with pytest.raises(ValueError, match=r"'x' is no array of numbers or booleans"):
        tables.write({"x": np.array([{}])}, tmp_path / "a.npz")
    with pytest.raises(ValueError, match=r"column 'a' has text that reads as missing in a \.csv, 'NA' in row 1"):  # fmt: skip
        tables.write(pd.DataFrame({"a": ["x", "NA"]}), path, overwrite=True)
    assert path.read_text() == "a\n2\n3\n"
    assert [p.name for p in tmp_path.iterdir()] == ["a.csv"]
    with pytest.raises(FileNotFoundError, match="no folder"):
        tables.write(frame, tmp_path / "none" / "a.csv")
    with pytest.raises(TypeError, match=r"\.csv files hold a pandas data frame, got dict"):
        tables.write({"x": np.eye(2)}, tmp_path / "b.csv")
    with pytest.raises(TypeError, match=r"\.npz files hold a dictionary of arrays, got DataFrame"):
        tables.write(frame, tmp_path / "b.npz")
    with pytest.raises(ValueError, match="two columns are called 'a'"):
        tables.write(pd.concat([frame, frame], axis=1), tmp_path / "b.csv")


def test_a_csv_keeps_an_index_that_says_something(tmp_path: Path) -> None:
    frame = pd.DataFrame({"a": [1.5, 2.5, 9.0]}, index=[3, 4, 8])
    path = tables.write(frame, tmp_path / "a.csv")
    with pytest.raises(ValueError, match="column 0 has no name"):
        tables.read(path)
    assert tables.read(path, index=0).index.tolist() == [3, 4, 8]


# ---- back to the user's columns ------------------------------------------------------------------


def test_decode_gives_the_columns_back() -> None:
    frame = people()
    table = tables.read(frame, label="dx")
    back = table.schema.decode("x", value_of(table), table.index)
    assert back.columns.tolist() == list(table.schema.columns)
    assert back.index.equals(frame.index)
    for name, dtype in [("height", "float32"), ("visits", "float32"), ("smoker", "bool")]:
        assert back[name].dtype == dtype
    assert back["grade"].cat.ordered
    assert not back["colour"].cat.ordered
    known = pd.DataFrame(table.present("x"), frame.index, back.columns)
    for name in back:
        seen = back[name][known[name]].tolist()
        meant = frame[name][known[name]]
        assert (
            seen == (meant.astype("float32") if back[name].dtype == "float32" else meant).tolist()
        )
    labels = table.schema.decode("y", value_of(table, "y"))["dx"]
    assert labels[table.labels >= 0].tolist() == frame["dx"].dropna().tolist()
    means = table.schema.decode("x", np.array([[170, 5, 2.5, 1, 2, 0, 4]]))
    assert means["visits"].tolist() == [2.5]
    assert means["stars"].tolist() == [5]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([[0.5, 1.5]], r"column 'c': expected codes 0 \.\. 2, got 1\.5 in row 0"),
        ([[0.5, 3.0]], r"column 'c': expected codes 0 \.\. 2, got 3\.0"),
        ([[0.5, -1.0]], r"column 'c': expected codes 0 \.\. 2, got -1\.0"),
        ([[0.5, np.nan]], r"column 'c': expected codes 0 \.\. 2, got nan"),
        ([[np.inf, 1.0]], r"column 'a': expected finite numbers, got inf in row 0"),
        ([[0.5]], r"site 'x': expected numbers of shape \(rows, 2\), got float64 \(1, 1\)"),
        ([0.5, 1.0], r"expected numbers of shape \(rows, 2\)"),
        ([["a", "b"]], r"expected numbers of shape \(rows, 2\), got <U1"),
    ],
)
def test_decode_takes_only_what_there_can_be(values, message: str) -> None:
    schema = Schema((Site("x", (Field("a", "real", "normal"), Field("c", "categorical", "categorical", ("u", "v", "w")))),))  # fmt: skip
    with pytest.raises(ValueError, match=message):
        schema.decode("x", values)
    with pytest.raises(ValueError, match=r"the index has 3 labels for 1 rows"):
        schema.decode("x", [[0.5, 1.0]], index=[1, 2, 3])
    with pytest.raises(ValueError, match=r"no site 'z' \(sites: 'x'\)"):
        schema.decode("z", [[0.5, 1.0]])


def test_summarise_means_intervals_levels_and_probabilities() -> None:
    rng = np.random.default_rng(0)
    frame = people()
    table = tables.read(frame, label="dx")
    draws = np.repeat(value_of(table).numpy()[None], 200, 0)
    draws[:, 3, 0] = rng.normal(100, 5, 200)
    draws[:150, 4, 4], draws[150:, 4, 4] = 2, 1  # colour: red, red, red, green
    summary = table.schema.summarise("x", torch.from_numpy(draws), table.data["x"], index=table.index)  # fmt: skip
    column = draws[:, 3, 0].astype(np.float64)
    assert summary.value.loc["p3", "height"] == pytest.approx(column.mean(), rel=1e-6)
    assert summary.lower.loc["p3", "height"] == pytest.approx(np.quantile(column, 0.05), rel=1e-6)
    assert summary.upper.loc["p3", "height"] == pytest.approx(np.quantile(column, 0.95), rel=1e-6)
    assert np.isnan(summary.probability.loc["p3", "height"])
    assert summary.value.loc["p4", "colour"] == "red"
    assert pd.isna(summary.lower.loc["p4", "colour"])
    assert pd.isna(summary.upper.loc["p4", "colour"])
    assert summary.probability.loc["p4", "colour"] == 0.75
    known = table.present("x")
    for name, j in zip(table.schema.columns, range(7), strict=True):
        for part in (summary.value, summary.lower, summary.upper):
            seen = part[name][known[:, j]]
            expected = frame[name][known[:, j]]
            if seen.dtype == "float32":
                expected = expected.astype("float32")
            assert seen.tolist() == expected.tolist()
    assert (summary.probability["colour"][known[:, 4]] == 1).all()
    assert summary.probability["height"].isna().all()


def test_summarise_ordered_binary_and_label() -> None:
    site = Site("x", (Field("o", "ordered", "ordered", ("a", "b", "c", "d")), Field("b", "binary", "bernoulli", (3, 7)), Field("f", "binary", "bernoulli", (False, True)), Field("g", "binary", "bernoulli", (0.5, 2))))  # fmt: skip
    schema = Schema((site,), Label("l", ("no", "yes", "so")))
    draws = np.array([[[0, 1, 1, 1]], [[1, 1, 1, 0]], [[1, 0, 0, 0]], [[3, 1, 1, 0]]])
    summary = schema.summarise("x", draws, level=0.5)
    assert summary.value.iloc[0].tolist() == ["b", 7, True, 0.5]
    assert (summary.lower.loc[0, "o"], summary.upper.loc[0, "o"]) == ("a", "b")
    assert summary.probability.iloc[0].tolist() == [0.5, 0.75, 0.75, 0.75]
    assert summary.lower[["b", "f", "g"]].isna().to_numpy().all()
    assert [str(summary.lower[c].dtype) for c in "bfg"] == ["Int64", "boolean", "float64"]
    partly = schema.summarise("x", draws, (np.array([[0, 0, 0, 1.0]]), np.array([True])))
    assert partly.value.iloc[0].tolist() == ["a", 3, False, 2.0]
    label = schema.summarise("y", np.array([[1, 0], [1, 2], [0, 2]]))
    assert label.value["l"].tolist() == ["yes", "so"]
    assert label.probability["l"].tolist() == pytest.approx([2 / 3, 2 / 3])


def test_summarise_refuses() -> None:
    table = tables.read(people(), drop=["dx"])
    draws = value_of(table)[None]
    with pytest.raises(ValueError, match="there is no draw"):
        table.schema.summarise("x", draws[:0])
    with pytest.raises(ValueError, match="level is between 0 and 1, got 1"):
        table.schema.summarise("x", draws, level=1)
    with pytest.raises(ValueError, match=r"expected numbers of shape \(draws, rows, 7\)"):
        table.schema.summarise("x", draws[0])
    with pytest.raises(ValueError, match=r"the draws have shape \(\.\., 60, 7\), what is known"):
        table.schema.summarise("x", draws, value_of(table)[:5])
    bad = draws.clone()
    bad[0, 9, 5] = 0.5
    with pytest.raises(ValueError, match=r"column 'grade': expected codes 0 \.\. 2, got 0\.5 in row 9"):  # fmt: skip
        table.schema.summarise("x", bad)
    with pytest.raises(ValueError, match=r"column 'grade': expected codes 0 \.\. 2, got 0\.5 in row 9"):  # fmt: skip
        table.schema.summarise("x", draws, bad[0])
    pixels = tables.read({"x": np.full((3, 4), 9, np.uint8)}).schema
    with pytest.raises(ValueError, match="site 'x' has pixels, not columns; use images"):
        pixels.summarise("x", np.zeros((2, 3, 4)))
    with pytest.raises(ValueError, match="pixels are numbers from 0 to 1"):
        pixels.images("x", np.full((3, 4), 2.0))
    with pytest.raises(ValueError, match="site 'x' has columns; use decode"):
        table.schema.images("x", np.zeros((3, 7)))


# ---- schemas as text -----------------------------------------------------------------------------


def test_schema_round_trip() -> None:
    schema = tables.read(people(), label="dx", drop=["income"]).schema
    assert Schema.from_json(schema.to_json()) == schema
    images = tables.read({"x": np.full((3, 1, 2, 2), 9, np.uint8)}).schema
    assert Schema.from_json(images.to_json()) == images


def edited(*path, value) -> str:
    schema = json.loads(tables.read(people(), label="dx", drop=["income"]).schema.to_json())
    place = schema
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return json.dumps(schema)


FIRST = ("sites", 0, "columns", 0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"no valid JSON"),
        ("[" * 100_000, r"no valid JSON"),
        ("[]", r"the schema is a JSON object, got list"),
        ("{}", r"the schema: missing keys"),
        ('{"a": 1, "a": 2}', r"two keys are called 'a'"),
        (edited("more", value=1), r"unknown keys \['more'\]"),
        (edited("format", value=2), r"format 2; this version reads 1"),
        (edited("format", value=True), r"'format' cannot be a bool"),
        (edited("sites", value={}), r"'sites' cannot be a dict"),
        (edited("sites", value=[]), r"one site or more"),
        (edited("sites", 0, "name", value="z"), r"called x or x_<view>, got 'z'"),
        (edited("sites", 0, "columns", value=[]), r"has columns, or an image shape"),
        (edited("sites", 0, "image_shape", value=[2, 2]), r"has columns, or an image shape"),
        (edited("sites", 0, value={"name": "x", "columns": [], "image_shape": [0, 2]}), r"no image shape"),
        (edited("sites", 0, value={"name": "x", "columns": [], "image_shape": ["2"]}), r"list of whole numbers"),
        (edited(*FIRST, "evil", value=1), r"a column: .*unknown keys \['evil'\]"),
        (edited(*FIRST, "name", value=3), r"'name' cannot be a int"),
        (edited(*FIRST, "name", value=""), r"empty name"),
        (edited(*FIRST, "name", value="visits"), r"two columns of the schema are called 'visits'"),
        (edited(*FIRST, "name", value="dx"), r"two columns of the schema are called 'dx'"),
        (edited(*FIRST, "kind", value="odd"), r"no kind 'odd' with likelihood 'normal'"),
        (edited(*FIRST, "likelihood", value="beta"), r"no kind 'real' with likelihood 'beta'"),
        (edited(*FIRST, "spread", value=0), r"spread above 0, got 0.0 and 0.0|spread above 0"),
        (edited(*FIRST, "spread", value=10**400), r"too large"),
        (edited(*FIRST, "center", value="0"), r"'center' cannot be a str"),
        (edited(*FIRST, "center", value=math.nan), r"NaN is no number of JSON"),
        (edited(*FIRST, "levels", value=["a", "b"]), r"real columns have no levels"),
        (edited("sites", 0, "columns", 2, "levels", value=[False, True, "a"]), r"is binary, with 3 levels"),
        (edited("sites", 0, "columns", 3, "levels", value=["a", None]), r"levels are text, .*got None"),
        (edited("sites", 0, "columns", 3, "levels", value=["a", ["b"]]), r"levels are text, .*got \['b'\]"),
        (edited("sites", 0, "columns", 3, "levels", value=["a", "a"]), r"two or more different levels"),
        (edited("sites", 0, "columns", 3, "levels", value=[1, True]), r"two or more different levels"),
        (edited("label", value=[]), r"'label' cannot be a list"),
        (edited("label", "levels", value=["a"]), r"label 'dx' needs two or more"),
        (edited("dropped", value=[1]), r"'dropped' is a list of names"),
    ],
)  # fmt: skip
def test_untrusted_schemas(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Schema.from_json(text)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(json_values, st.integers(0, 11))
def test_any_change_of_a_schema_is_read_or_refused(value, where: int) -> None:
    places = [("format",), ("sites",), ("label",), ("dropped",), ("sites", 0), FIRST]
    places += [
        (*FIRST, key) for key in ("name", "kind", "likelihood", "levels", "center", "spread")
    ]
    site = Site("x", (Field("a", "real", "normal"), Field("b", "binary", "bernoulli", ("u", "v"))))
    data = json.loads(Schema((site,), Label("l", (1, 2))).to_json())
    place = data
    for key in places[where][:-1]:
        place = place[key]
    place[places[where][-1]] = value
    try:
        schema = Schema.from_json(json.dumps(data))
    except ValueError:
        return
    assert Schema.from_json(schema.to_json()) == schema


# ---- whole round trips ---------------------------------------------------------------------------


def optional(values: st.SearchStrategy, size: int) -> st.SearchStrategy:
    return st.lists(st.none() | values, min_size=size, max_size=size)


@st.composite
def frames(draw: st.DrawFn) -> pd.DataFrame:
    size = draw(st.integers(4, 9))
    name = st.text(min_size=1, max_size=4)
    floats = st.floats(-1e4, 1e4, width=32).map(lambda v: round(v * 64) / 64)
    kinds = [
        floats,
        st.integers(0, 2**20),
        st.booleans(),
        st.sampled_from(["a", "b", "ü"]),
        st.sampled_from([0.5, 2.5]),
    ]
    columns = {}
    for column in draw(st.lists(name, min_size=1, max_size=5, unique=True)):
        cells = draw(optional(draw(st.sampled_from(kinds)), size))
        series = pd.Series(cells, dtype=object)
        columns[column] = series if draw(st.booleans()) else series.infer_objects()
    index = draw(st.lists(st.text(max_size=3), min_size=size, max_size=size))
    return pd.DataFrame(columns).set_axis(pd.Index(index, dtype=object), axis=0)


def read_or_reason(frame: pd.DataFrame) -> tables.Table | str:
    try:
        return tables.read(frame, constant="drop")
    except ValueError as error:
        return str(error)


@settings(max_examples=80, deadline=None)
@given(frames())
def test_known_cells_come_back_equal(frame: pd.DataFrame) -> None:
    table = read_or_reason(frame)
    if isinstance(table, str):
        words = ("no columns are left", "looks like an identifier", "float32 loses")
        assert any(word in table for word in words), table
        return
    new = Schema.from_json(table.schema.to_json()).encode(frame)
    same_data(new, table)
    back = table.schema.decode("x", value_of(new), new.index)
    assert back.index.equals(frame.index)
    for j, name in enumerate(table.schema.columns):
        known = frame[name].notna().to_numpy()
        assert np.array_equal(known, new.present("x")[:, j])
        assert back[name][known].tolist() == frame[name][known].tolist()
    holes = back.reset_index(drop=True).where(pd.DataFrame(new.present("x"), columns=back.columns))
    same_data(table.schema.encode(holes), new)


def test_wine_from_a_file(tmp_path: Path) -> None:
    frame = load_wine(as_frame=True).frame
    frame["target"] = frame["target"].map({0: "Barolo", 1: "Grignolino", 2: "Barbera"})
    rng = np.random.default_rng(0)
    frame.loc[rng.choice(178, 20, replace=False), "target"] = None
    frame.loc[rng.choice(178, 10, replace=False), "ash"] = np.nan
    path = tables.write(frame, tmp_path / "wine.csv")
    order = rng.permutation(178)
    train = tables.read(path, label="target", rows=order[:120])
    test = train.schema.encode(path, rows=order[120:])
    kinds = {f.name: f.kind for f in fields(train).values()}
    assert kinds["proline"] == "count"  # whole numbers
    assert kinds["color_intensity"] == "positive"
    assert set(kinds.values()) <= {"real", "positive", "count"}
    assert len(train) + len(test) == 178
    assert int((~train.present("x")).sum() + (~test.present("x")).sum()) == 10
    assert int((train.labels < 0).sum() + (test.labels < 0).sum()) == 20
    likelihood = train.schema.likelihoods()["x"]
    batch = Batch.of(train.data)
    rows = likelihood(torch.zeros(1, likelihood.num_params)).log_prob(batch["x"][batch.present("x").all(1)])  # fmt: skip
    assert rows.isfinite().all()
    back = test.schema.decode("x", value_of(test), test.index)
    full = test.present("x").all(1)
    original = frame.iloc[order[120:]].drop(columns="target").astype("float32")
    assert back[full].equals(original[full])


# ---- libraries -----------------------------------------------------------------------------------


def test_libraries_are_imported_late() -> None:
    code = (
        "import sys; from pyrozoo.zoo import tables;"
        "tables.Schema((tables.Site('x', image_shape=(2, 2)),)).to_json();"
        "sys.exit(any(m in sys.modules for m in ('pandas', 'pyarrow', 'anndata', 'h5py')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("module", "suffix", "extra"),
    [
        ("pandas", ".csv", "tables"),
        ("pyarrow", ".parquet", "tables"),
        ("anndata", ".h5ad", "anndata"),
    ],
)
def test_a_missing_library_names_its_extra(module, suffix, extra, tmp_path, monkeypatch) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(b"")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        ImportError, match=rf'tables need {module}: pip install "pyrozoo\[{extra}\]"'
    ):
        tables.read(path)
