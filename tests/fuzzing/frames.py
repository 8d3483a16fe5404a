"""Fuzzing tables: frames, arrays, files and schemas."""

import csv
import io
import json
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from fuzzing.core import attempt, chance, must, mutated, pick, spoil_json
from pyrozoo.inference import Batch
from pyrozoo.zoo import tables


def a_column(rng, n):
    """A column that a person may have, and what is to be read: its kind, or None if any is right."""
    holes = rng.random(n) < pick(rng, [0.0, 0.0, 0.3])
    holes[:6] = False
    words = np.array(
        pick(rng, [["red", "blue", "green"], ["a,b", 'say "x"', "ü\n"], ["01", "1", "1.0"]])
    )
    levels = rng.integers(0, 3, n)
    levels[:6] = [0, 1, 2, 0, 1, 2]
    kinds = {
        "real": lambda: pd.Series(rng.normal(size=n)),
        "single": lambda: pd.Series(rng.normal(size=n).astype("f4")),
        "large": lambda: pd.Series(rng.normal(size=n) * 1e6),
        "whole": lambda: pd.Series(rng.permutation(n) - 5),
        "count": lambda: pd.Series(rng.permutation(n) * 3),
        "positive": lambda: pd.Series(np.exp(2 * rng.normal(size=n))),
        "nullable": lambda: pd.Series(rng.permutation(n) - 5, dtype="Int64"),
        "bool": lambda: pd.Series(levels > 0),
        "nullable bool": lambda: pd.Series(levels > 0, dtype="boolean"),
        "two": lambda: pd.Series(np.array([7, -2])[(levels > 0).astype(int)]),
        "text": lambda: pd.Series(words[levels], dtype=object),
        "string": lambda: pd.Series(words[levels], dtype="string"),
        "category": lambda: pd.Series(pd.Categorical(words[levels], words)),
        "ordered": lambda: pd.Series(pd.Categorical(words[levels], words[::-1], ordered=True)),
        "few": lambda: pd.Series(np.array([1.5, 2.5, 9.0])[levels]),
    }
    kind = pick(rng, kinds)
    series = kinds[kind]()
    if holes.any() and series.dtype.kind in "ib" and not hasattr(series.dtype, "na_value"):
        series = series.astype(
            pick(rng, [object, {"i": "float64", "b": object}[series.dtype.kind]])
        )
    return series.mask(holes) if holes.any() else series


def a_frame(rng):
    n = int(rng.integers(12, 20))
    names = ["a", "b c", "ü", "x[0]", "1", "sex"]
    frame = pd.DataFrame({name: a_column(rng, n) for name in names[: int(rng.integers(1, 7))]})
    if chance(rng, 0.3):
        frame.index = pd.Index([f"r{i}" for i in range(n)], name=pick(rng, [None, "id"]))
    return frame


def frames(rng):
    """Tables: reading, encoding, decoding and summarising, frames and files."""
    frame, label = a_frame(rng), None
    if chance(rng, 0.3):
        label = "outcome"
        frame[label] = np.array(["ill", "well"])[np.arange(len(frame)) % 2]
    given = frame.copy(deep=True)
    what = pick(rng, ["sound", "sound", "wrong", "new", "file", "arrays", "schema"])
    if chance(rng, 0.02):
        return _h5ad(rng)
    if what == "wrong":
        return _refused_table(rng, frame)
    if what == "arrays":
        return _arrays(rng)
    table = attempt(lambda: tables.read(frame, label=label), spoilt=False)
    pd.testing.assert_frame_equal(frame, given)
    if what == "new":
        return _refused_rows(rng, table, frame.drop(columns=label or []))
    if what == "schema":
        return _spoilt_schema(rng, table.schema)
    x = frame.drop(columns=label or [])
    _check_table(table, x, table)
    schema = attempt(lambda: tables.Schema.from_json(table.schema.to_json()), spoilt=False)
    must(schema == table.schema, "a schema as text")
    again = schema.encode(frame[frame.columns[rng.permutation(len(frame.columns))]])
    must(_same_data(again.data, table.data), "the order of columns")
    rows = rng.permutation(len(frame))[:5]
    part = attempt(lambda: schema.encode(x, rows=rows), spoilt=False)
    _check_table(part, x.iloc[rows], table)
    _check_summary(rng, table)
    if what == "file":
        _files(rng, table, frame)


def _check_table(table, frame, learnt):
    """Known cells come back as they were; nothing else is known."""
    batch = Batch.of(table.data, len(frame))
    value = batch["x"] if "x" in batch else torch.zeros(len(frame), frame.shape[1])
    back = table.schema.decode("x", value, index=frame.index)
    present = table.present("x")
    must(list(back.columns) == list(frame.columns), "names of columns")
    for j, (name, field) in enumerate(
        zip(frame.columns, learnt.schema.sites[0].columns, strict=True)
    ):
        known = frame[name].notna().to_numpy(bool)
        must((present[:, j] == known).all(), f"presence of {name}")
        before, after = frame[name][known].tolist(), back[name][known].tolist()
        if field.levels:
            must(before == after, f"levels of {name}: {before} {after}")
        else:
            must(
                np.allclose(np.float64(before), np.float64(after), rtol=1e-6), f"numbers of {name}"
            )


def _check_summary(rng, table):
    value = table.data["x"]
    value, present = value if isinstance(value, tuple) else (value, torch.ones_like(value) > 0)
    noise = torch.from_numpy(rng.normal(size=(5, *value.shape))).float()
    draws = torch.empty(noise.shape)
    for j, field in enumerate(table.schema.sites[0].columns):
        k = len(field.levels)
        draws[:, :, j] = (
            (noise[:, :, j].abs() * 3).floor().clamp(max=k - 1) if k else noise[:, :, j]
        )
    found = attempt(lambda: table.schema.summarise("x", draws, (value, present)), spoilt=False)
    for j, field in enumerate(table.schema.sites[0].columns):
        known = present[:, j].numpy()
        sure = found.probability[field.name].to_numpy()
        if field.levels:
            must((sure[known] == 1).all() and (sure > 0).all(), "probability of what is known")
            continue
        kept = found.value[field.name].to_numpy()[known]
        must((kept == value[known, j].numpy()).all(), "what is known is kept")
        must((found.lower[field.name] <= found.upper[field.name]).all(), "intervals")


def _same_data(a, b):
    flat = [list(d[n] if isinstance(d[n], tuple) else (d[n],)) for d in (a, b) for n in sorted(d)]
    half = len(flat) // 2
    pairs = zip(flat[:half], flat[half:], strict=True)
    return a.keys() == b.keys() and all(
        len(x) == len(y) and all(map(torch.equal, x, y)) for x, y in pairs
    )


def _files(rng, table, frame):
    with tempfile.TemporaryDirectory() as home:
        path = Path(home) / ("t" + pick(rng, [".csv", ".parquet"]))
        attempt(lambda: tables.write(frame, path), spoilt=False)
        index = frame.index.name or (
            0 if path.suffix == ".csv" and frame.index[0] == "r0" else None
        )
        index = None if path.suffix == ".parquet" else index
        found = attempt(lambda: table.schema.encode(path, index=index), spoilt=False)
        must(_same_data(found.data, table.data), f"a {path.suffix} that was written and read")
        spoilt, why = mutated(rng, path.read_bytes())
        path.write_bytes(spoilt)
        sure = why in ("empty", "foreign") or (path.suffix == ".parquet" and why in ("cut",))
        found = attempt(
            lambda: table.schema.encode(path, index=index), str(path), *map(repr, frame.columns),
            spoilt=why if sure else None,
        )  # fmt: skip
        if path.suffix == ".parquet":
            must(_same_data(found.data, table.data), f"a changed .parquet is read: {why}")
            return
        text = path.read_bytes().decode("utf-8-sig")
        must(len(found) == sum(1 for _ in csv_rows(text)) - 1, "rows of a changed file")


def _h5ad(rng):
    """Cut and foreign files; a changed byte inside one can bring the HDF5 library down."""
    frame = pd.DataFrame(rng.normal(size=(12, 2)), columns=["a", "b"])
    with tempfile.TemporaryDirectory() as home:
        path = Path(home) / "t.h5ad"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            attempt(lambda: tables.write(frame, path), spoilt=False)
            found = attempt(lambda: tables.read(path), spoilt=False)
        must(np.array_equal(found.data["x"].numpy(), frame.to_numpy(np.float32)), "an .h5ad")
        raw = path.read_bytes()
        new = {
            "cut": raw[: int(rng.integers(len(raw)))], "empty": b"", "foreign": b"PK\x03\x04" * 99,
            "text": b"a,b\n1,2\n",
        }  # fmt: skip
        why = pick(rng, new)
        path.write_bytes(new[why])
        attempt(lambda: tables.read(path), str(path), spoilt=why)


def csv_rows(text):
    return filter(None, csv.reader(io.StringIO(text, newline="")))


def _arrays(rng):
    n = 8
    x, images = rng.normal(size=(n, 2)), rng.integers(0, 256, (n, 3, 3)).astype("u1")
    y, known = np.arange(n) % 2, rng.random(n) < 0.7
    known[:4] = True
    arrays = {"x": x, "x_b": images, "x_b_present": known, "y": y, "y_present": known}
    wrong = {
        "": {},
        "x": {"x": x[:, 0]}, "rows": {"x": x[1:]}, "z": {"z": x}, "x_c": {"x_c": x.astype(str)},
        "x_d": {"x_d": x + 0j}, "x_b": {"x_b": images[:, 0, 0]}, "x_e": {"x_e": x.astype(object)},
        "x_b_present": {"x_b_present": known[:3]}, "y": {"y": y + 0.5}, "y ": {"y": y[:, None]},
        "y_present": {"y_present": y}, "x_f": {"x_f": np.ma.array(x, mask=x > 0)},
        "infinite": {"x": np.where(x > 0, x, np.inf)}, "x_g": {"x_g": [[1.0, 2.0]] * n},
        "x_b  ": {"x_b": (images > 9).astype("u1")}, "x_h": {"x_h": np.float64(1)},
    }  # fmt: skip
    why = pick(rng, wrong) if chance(rng, 0.6) else ""
    given = {**arrays, **wrong[why]}
    table = attempt(lambda: tables.read(given), why.strip(), spoilt=why or False)
    with tempfile.TemporaryDirectory() as home:
        path = Path(home) / "t.npz"
        attempt(lambda: tables.write(given, path), spoilt=False)
        found = attempt(lambda: tables.read(path), spoilt=False)
        must(_same_data(found.data, table.data), "an .npz that was written and read")
        spoilt, why = mutated(rng, path.read_bytes())
        path.write_bytes(spoilt)
        found = attempt(lambda: tables.read(path), str(path), spoilt=None)
        must(_same_data(found.data, table.data), f"a changed .npz is read as something else: {why}")


def _refused_table(rng, frame):
    n = len(frame)
    columns = {
        "dates": pd.date_range("2020", periods=n), "times": pd.to_timedelta(np.arange(n), "s"),
        "complex": np.arange(n) + 1j, "lists": [[1]] * n, "mixed": ["a", 1] * (n // 2) + ["a"] * (n % 2),
        "infinite": np.where(np.arange(n) == 2, np.inf, np.arange(n) + 0.5),
        "constant": np.ones(n), "empty": np.full(n, np.nan), "none": [None] * n,
        "identifier": [f"id{i}" for i in range(n)], "too large": 1e40 * rng.normal(size=n),
        "numbers as text": [str(i + 0.5) for i in range(n)], "close": 1e9 + np.arange(n) * 1e-3,
    }  # fmt: skip
    wishes = {
        "count": np.arange(n) - 1, "poisson": np.arange(n) + 0.5, "log_normal": np.arange(n),
        "beta": np.arange(n) / 5, "binary": np.arange(n) % 3, "ordered": np.array(["a", "b"])[np.arange(n) % 2],
        "nothing": np.arange(n), "real": np.array(["a", "b"])[np.arange(n) % 2],
    }  # fmt: skip
    how = pick(rng, ["column", "wish", "option", "frame"])
    if how == "column" and chance(rng, 0.2):
        frame["bad one"] = pick(
            rng,
            [
                ["only"] * n,
                [-1, 3] * (n // 2) + [3] * (n % 2),
                [2.5, 1] * (n // 2) + [1] * (n % 2),
                list(range(n)),
            ],
        )
        attempt(lambda: tables.read(frame, label="bad one"), "'bad one'", spoilt="a label")
    if how == "column":
        why = pick(rng, columns)
        frame["bad one"] = columns[why]
        attempt(lambda: tables.read(frame), "'bad one'", spoilt=why)
    elif how == "wish":
        why = pick(rng, wishes)
        frame["bad one"] = wishes[why]
        given = {
            "bad one": pick(rng, [why, why, {why: ["a", "q"]}, [1, 2, 3], 7, None, {}, {"a": 1}])
        }
        spoilt = f"wish {given}" if given["bad one"] is not None else None
        attempt(lambda: tables.read(frame, columns=given), "'bad one'", spoilt=spoilt)
    elif how == "option":
        name = frame.columns[0]
        options = {
            "label": {"label": "nix"}, "label too fine": {"label": name, "drop": [name]},
            "drop": {"drop": ["nix"]}, "drop text": {"drop": name}, "columns": {"columns": {"nix": "real"}},
            "views": {"views": {"a": ["nix"]}}, "view text": {"views": {"a": name}},
            "view name": {"views": {"a/b": [name]}}, "views list": {"views": [name]},
            "twice": {"views": {"a": [name], "b": [name]}}, "constant": {"constant": "keep"},
            "rows": {"rows": [n]}, "row mask": {"rows": np.ones(n + 1, bool)}, "no rows": {"rows": []},
            "rows float": {"rows": [0.5]}, "index": {"index": "nix"}, "index number": {"index": 99},
            "columns list": {"columns": ["real"]}, "views none": {"views": {}},
            "label number": {"label": 3}, "index float": {"index": 0.5}, "columns text": {"columns": "real"},
        }  # fmt: skip
        why = pick(rng, options)
        attempt(lambda: tables.read(frame, **options[why]), spoilt=why)
    else:
        twice = pd.concat([frame, frame], axis=1)
        numbered = frame.set_axis(range(frame.shape[1]), axis=1)
        levels = pd.concat({"a": frame}, axis=1)
        wrong = {
            "two columns of one name": twice, "numbers as names": numbered, "two levels": levels,
            "no rows": frame.iloc[:0], "no columns": frame[[]], "a series": frame.iloc[:, 0],
            "an array": frame.to_numpy(), "a list": [1, 2], "nothing": None, "no file": "nix.csv",
            "a folder": ".", "another type": "nix.txt", "an empty name": frame.set_axis(["", *frame.columns[1:]], axis=1),
        }  # fmt: skip
        why = pick(rng, wrong)
        attempt(lambda: tables.read(wrong[why]), spoilt=why)


def _refused_rows(rng, table, frame):
    """New rows that do not fit a schema."""
    name = pick(rng, frame.columns)
    field = next(f for f in table.schema.sites[0].columns if f.name == name)
    wrong = {
        "a column is absent": frame.drop(columns=name),
        "a column too many": frame.assign(extra=1.0),
        "infinite": frame.assign(**{name: np.inf}),
        "dates": frame.assign(**{name: pd.Timestamp("2020")}),
    }
    if field.levels:
        wrong["a new level"] = frame.assign(**{name: "quite new"})
        wrong["a new number"] = frame.assign(**{name: 77})
    else:
        wrong["text"] = frame.assign(**{name: "many"})
        wrong["numbers as text"] = frame.assign(**{name: "1.5"})
        wrong["booleans"] = frame.assign(**{name: True})
        wrong["too large"] = frame.assign(**{name: 1e300})
    if field.kind == "count":
        wrong["negative"] = frame.assign(**{name: -1})
        wrong["a fraction"] = frame.assign(**{name: 0.5})
        wrong["a large count"] = frame.assign(**{name: 2**25})
    if field.kind == "positive":
        wrong["zero"] = frame.assign(**{name: 0.0})
    if frame.shape[1] == 1:
        del wrong["a column is absent"]
    why = pick(rng, wrong)
    says = "extra" if why == "a column too many" else repr(name)
    attempt(lambda: table.schema.encode(wrong[why]), says, spoilt=why)


def _spoilt_schema(rng, schema):
    """A schema as JSON, changed: refused, or another schema that is sound."""
    if chance(rng, 0.3):
        text, _ = mutated(rng, schema.to_json().encode())
        found = attempt(
            lambda: tables.Schema.from_json(text.decode("utf-8", "replace")), spoilt=None
        )
    else:
        data = json.loads(schema.to_json())
        spoil_json(rng, data)
        found = attempt(lambda: tables.Schema.from_json(json.dumps(data)), spoilt=None)
    must(tables.Schema.from_json(found.to_json()) == found, "a schema as text")
    attempt(found.likelihoods, spoilt=None)
