"""Batches: every way to say what is known, and what is refused."""

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils import _pytree

from pyrozoo.inference import Batch

X = np.arange(12.0).reshape(4, 3)
KNOWN = np.array([True, False, True, True])
ENTRIES = np.array([[True] * 3, [True, False, True], [False] * 3, [True] * 3])


def same(a: Batch, b: Batch) -> bool:
    return (
        a.names == b.names
        and len(a) == len(b)
        and all(torch.equal(a[n], b[n]) and a.partly(n) == b.partly(n) for n in a.names)
        and all(torch.equal(a.present(n), b.present(n)) for n in a.names)
    )


@pytest.mark.parametrize(
    "array",
    [
        X,
        np.asfortranarray(X),
        X[::-1].copy()[::-1],
        np.repeat(X, 2, axis=1)[:, ::2],
        X.astype(">f8"),
        X.astype(np.longdouble),
        np.rec.fromarrays([X, np.zeros((4, 3), "i1")], names="v,pad")["v"],
        torch.tensor(X),
        torch.tensor(X.T).T,
        torch.tensor(X, requires_grad=True),
        torch.nn.Parameter(torch.tensor(X)),
    ],
    ids=[
        "c",
        "fortran",
        "negative",
        "strided",
        "big-endian",
        "longdouble",
        "record",
        "tensor",
        "t",
        "grad",
        "parameter",
    ],
)
def test_a_value_is_read_whatever_its_layout(array: Any) -> None:
    batch = Batch.of({"x": array})
    assert batch["x"].tolist() == X.tolist()
    assert batch["x"].dtype == torch.float64
    assert not batch["x"].requires_grad
    assert len(batch) == 4
    assert batch.present("x").tolist() == [True] * 4
    assert not batch.partly("x")


def test_a_read_only_array_is_copied() -> None:
    array = X.copy()
    array.flags.writeable = False
    assert Batch.of({"x": array})["x"].tolist() == X.tolist()


@pytest.mark.parametrize("dtype", ["i1", "i2", ">i4", "i8", "u1", "u2", "u4", "u8"])
def test_integers_become_long(dtype: str) -> None:
    value = Batch.of({"y": np.array([0, 3, 1], dtype=dtype)})["y"]
    assert value.dtype == torch.int64
    assert value.tolist() == [0, 3, 1]


def test_booleans_become_floats() -> None:
    value = Batch.of({"x": np.array([[True, False]])})["x"]
    assert value.dtype == torch.get_default_dtype()
    assert value.tolist() == [[1.0, 0.0]]


def test_masks_per_row_and_per_entry() -> None:
    rows = Batch.of({"x": (X, KNOWN)})
    assert rows.present("x").tolist() == KNOWN.tolist()
    assert rows["x"][1].tolist() == [0, 0, 0]
    assert rows.partly("x")
    entries = Batch.of({"x": (X, torch.tensor(ENTRIES))})
    assert entries.present("x").tolist() == ENTRIES.tolist()
    assert entries["x"].tolist() == np.where(ENTRIES, X, 0).tolist()


def test_masked_arrays() -> None:
    dirty = np.where(ENTRIES, X, np.nan)
    batch = Batch.of({"x": np.ma.masked_invalid(dirty), "z": np.ma.array(X)})
    assert same(batch, Batch.of({"x": (X, ENTRIES), "z": X}))
    reverse = Batch.of({"x": np.ma.masked_invalid(dirty.astype(">f8"))[::-1]})
    assert reverse.present("x").tolist() == ENTRIES[::-1].tolist()
    assert reverse["x"].tolist() == np.where(ENTRIES, X, 0)[::-1].tolist()


def test_a_mask_of_entries_that_misses_whole_rows_is_a_mask_of_rows() -> None:
    whole = np.broadcast_to(KNOWN[:, None], X.shape)
    assert same(Batch.of({"x": (X, whole)}), Batch.of({"x": (X, KNOWN)}))
    assert same(Batch.of({"x": np.ma.array(X, mask=~whole)}), Batch.of({"x": (X, KNOWN)}))


def test_all_true_is_no_mask_and_all_false_is_absent() -> None:
    batch = Batch.of(
        {
            "x": (X, np.ones(4, bool)),
            "e": (X, np.ones((4, 3), bool)),
            "y": (X, np.zeros(4, bool)),
            "z": np.ma.masked_all((4, 3)),
            "n": None,
        }
    )
    assert batch.names == ("x", "e")
    assert not batch.partly("x")
    assert not batch.partly("e")
    assert "y" not in batch
    assert batch.present("y").tolist() == [False] * 4
    assert batch.present("never heard of").tolist() == [False] * 4
    assert same(batch, Batch.of({"x": X, "e": X}))


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.booleans(), min_size=1, max_size=6),
    st.sampled_from([float("nan"), float("inf"), 7.0, -1e300]),
)
def test_what_is_under_a_mask_is_erased(known: list[bool], filler: float) -> None:
    value = np.ones((len(known), 2))
    value[~np.array(known)] = filler
    a, b = (Batch.of({"x": (v, np.array(known))}) for v in (value, np.ones_like(value)))
    assert same(a, b)


def test_erasing_leaves_the_callers_array_alone() -> None:
    array = X.copy()
    Batch.of({"x": (array, KNOWN)})
    assert array.tolist() == X.tolist()


def test_nan_and_infinity_raise_with_counts() -> None:
    bad = X.copy()
    bad[0, 0] = bad[2, 1] = bad[2, 2] = np.nan
    with pytest.raises(ValueError, match=r"'x': 3 NaN entries in 2 of 4 rows.*\(value, present\)"):
        Batch.of({"x": bad})
    bad = np.where(np.isnan(bad), np.inf, X)
    with pytest.raises(ValueError, match="'x': 3 infinite entries in 2 of 4 rows"):
        Batch.of({"x": torch.tensor(bad)})
    bad[0, 0] = np.nan
    with pytest.raises(ValueError, match="'x': 3 NaN or infinite entries in 2 of 4 rows"):
        Batch.of({"x": bad})
    with pytest.raises(ValueError, match="1 NaN entries in 1 of 4 rows"):
        Batch.of({"x": (np.where(X == 0, np.nan, X), KNOWN)})  # a NaN that is said to be present


@pytest.mark.parametrize(
    ("data", "error", "text"),
    [
        ({"x": X, "y": X[:2]}, ValueError, "same number of rows, got x: 4, y: 2"),
        ({"x": X, "y": (X[:2], np.zeros(2, bool))}, ValueError, "x: 4, y: 2"),
        ({"x": (X, KNOWN.astype(int))}, TypeError, "'x': the mask .* is boolean, got torch.int64"),
        (
            {"x": (X, KNOWN[:3])},
            ValueError,
            r"'x': the mask has shape \(3,\), but the values \(4, 3\)",
        ),
        ({"x": (X, np.ones((4, 2), bool))}, ValueError, r"mask has shape \(4, 2\)"),
        ({"x": (X, np.array(True))}, ValueError, r"mask has shape \(\)"),
        ({"x": (X, KNOWN, KNOWN)}, TypeError, "'x': a tuple is .* got 3 parts"),
        ({"x": [1.0, 2.0]}, TypeError, "'x': expected a tensor.* got list"),
        ({"x": "abc"}, TypeError, "got str"),
        ({"x": 3.0}, TypeError, "got float"),
        ({"x": (X, [True] * 4)}, TypeError, "got list"),
        (
            {"x": np.array(["a", None], object)},
            TypeError,
            "'x': cannot read an array of type object",
        ),
        ({"x": np.array(["a", "b"])}, TypeError, "cannot read an array of type <U1"),
        ({"x": np.ma.array(["a", "b"], mask=[0, 1])}, TypeError, "cannot read"),
        ({"x": np.ones(2, complex)}, TypeError, "complex"),
        ({"x": torch.ones(2, dtype=torch.cfloat)}, TypeError, "'x': complex"),
        ({"x": torch.tensor(1.0)}, ValueError, "'x': values have the rows first, got a scalar"),
        ({3: X}, TypeError, "site names are strings, got 3"),
        ({}, ValueError, "say how many rows"),
        ({"x": None}, ValueError, "say how many rows"),
        ([X], TypeError, "expected a Batch or a dictionary .* got list"),
        (True, TypeError, "got bool"),
        (-1, ValueError, "at least 0 rows"),
    ],
)
def test_what_cannot_be_read(data: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        Batch.of(data)


def test_rows_without_values() -> None:
    for batch in (Batch.of(5), Batch.of({}, rows=5), Batch.of({"x": None}, rows=5)):
        assert len(batch) == 5
        assert batch.names == ()
        assert batch.device.type == "cpu"
        assert len(batch[1:3]) == 2
    with pytest.raises(ValueError, match="rows: 5, x: 4"):
        Batch.of({"x": X}, rows=5)
    assert len(Batch.of({"x": X[:0], "y": (X[:0, 0], KNOWN[:0])})) == 0
    assert Batch.of(batch) is batch


# ---- pixels --------------------------------------------------------------------------------------


def test_bytes_with_an_event_are_pixels() -> None:
    image = np.array([[0, 51], [255, 102]], np.uint8)
    batch = Batch.of({"x": image})
    assert torch.equal(batch["x"], torch.tensor([[0, 0.2], [1, 0.4]]))
    exact = batch.to(dtype=torch.float64)["x"]
    assert torch.equal(exact, torch.tensor(image, dtype=torch.float64) / 255)
    assert batch[1:]["x"].tolist() == batch["x"][1:].tolist()
    assert batch.to(dtype=torch.float64)[1:]["x"].dtype == torch.float64
    assert "uint8" in repr(batch)  # stored as bytes until asked for
    hidden = Batch.of({"x": (image, np.array([True, False]))})
    assert torch.equal(hidden["x"], torch.tensor([[0, 0.2], [0, 0]]))


@pytest.mark.parametrize("known", [None, [True, True], [True, False]])
def test_bytes_of_zeros_and_ones_are_refused(known: list[bool] | None) -> None:
    image: Any = np.array([[0, 1], [1, 1]], np.uint8)
    with pytest.raises(
        ValueError, match=r"'x': uint8 arrays are read as pixels .* largest value is 1"
    ):
        Batch.of({"x": image if known is None else (image, np.array(known))})


# ---- parts of a batch ----------------------------------------------------------------------------


@pytest.fixture
def batch() -> Batch:
    return Batch.of({"x": (X, ENTRIES), "y": (np.arange(4), KNOWN), "z": X[:, 0]})


@pytest.mark.parametrize(
    "index",
    [
        slice(1, 3),
        slice(None, None, 2),
        slice(-2, None),
        [2, 0, 2],
        range(1, 3),
        [],
        np.array([3, 1]),
        np.array([3, 1])[::-1],
        np.array([3, 1], np.uint8),
        np.array([False, True, True, False]),
        torch.tensor([-1, 0]),
        torch.tensor([0, 1], dtype=torch.uint8),
        torch.tensor([True, False, False, True]),
        torch.zeros(4, dtype=torch.bool),
    ],
    ids=str,
)
def test_rows_of_a_batch(batch: Batch, index: Any) -> None:
    part = batch[index]
    rows = np.arange(4)[
        np.asarray(index, dtype=None if len(index) else int)
        if not isinstance(index, slice)
        else index
    ]
    assert len(part) == len(rows)
    assert part.names == batch.names
    for name in batch.names:
        assert torch.equal(part[name], batch[name][rows.tolist()])
        assert torch.equal(part.present(name), batch.present(name)[rows.tolist()])
        assert part.partly(name) == batch.partly(name)  # although every row of a part may be known


@pytest.mark.parametrize(
    "index", [3, 1.5, torch.tensor(1), torch.tensor([1.0]), torch.eye(2).bool(), None]
)
def test_indices_that_are_refused(batch: Batch, index: Any) -> None:
    with pytest.raises(TypeError, match="index a batch by"):
        batch[index]


def test_a_mask_of_another_length_is_refused(batch: Batch) -> None:
    with pytest.raises(IndexError, match="a mask of 3 rows does not fit a batch of 4"):
        batch[torch.ones(3, dtype=torch.bool)]
    with pytest.raises(IndexError, match="a mask of 3 rows"):
        Batch.of(4)[np.ones(3, bool)]


def test_a_missing_value_names_what_is_there(batch: Batch) -> None:
    with pytest.raises(KeyError, match=r"'w' is not observed in this batch \(observed: x, y, z\)"):
        batch["w"]
    with pytest.raises(KeyError, match="observed: nothing"):
        Batch.of(2)["w"]


def test_add_gives_more_sites_or_other_values_of_them() -> None:
    batch = Batch.of({"x": torch.rand(3, 2), "y": (torch.tensor([0, 1, 2]), torch.arange(3) != 1)})
    more = batch.add({"y": torch.tensor([2, 2, 2]), "w": (torch.ones(3), torch.arange(3) < 1)})
    assert more.names == ("x", "y", "w")
    assert more["x"] is batch["x"]
    assert more["y"].tolist() == [2, 2, 2]
    assert not more.partly("y")
    assert more.present("w").tolist() == [True, False, False]
    assert batch.partly("y")
    with pytest.raises(ValueError, match="not rows=3"):
        batch.add(Batch.of({"z": torch.ones(4)}))


def test_drop_hide_and_full(batch: Batch) -> None:
    assert batch.drop("x", "unknown").names == ("y", "z")
    keep = torch.tensor([True, True, False, False])
    hidden = batch.hide("y", keep)
    assert hidden.present("y").tolist() == [True, False, False, False]
    assert hidden["y"].tolist() == [0, 0, 0, 0]
    assert batch["y"].tolist() == [0, 0, 2, 3]  # the batch itself is as it was
    assert batch.hide("z", keep)["z"].tolist() == [0, 3, 0, 0]
    assert batch.hide("x", keep).present("x").tolist() == (ENTRIES & keep.numpy()[:, None]).tolist()
    assert batch.hide("z", torch.zeros(4, dtype=torch.bool)).partly("z")
    assert batch.full("y").present("y").tolist() == [True] * 4
    assert batch.partly("y")


def test_hiding_entries() -> None:
    square = Batch.of(
        {"x": torch.ones(3, 3), "y": (torch.ones(3, 3), torch.tensor([True, True, False]))}
    )
    keep = torch.tensor([[True, False, True]] * 3)
    assert torch.equal(square.hide("x", keep).present("x"), keep)
    expected = keep & torch.tensor([[True], [True], [False]])
    assert torch.equal(square.hide("y", keep).present("y"), expected)
    for wrong in (
        torch.ones(2, dtype=torch.bool),
        torch.ones(3),
        torch.ones(3, 4, dtype=torch.bool),
    ):
        with pytest.raises(ValueError, match=r"'x': expected a boolean mask of shape \(3,\)"):
            square.hide("x", wrong)


def test_patterns(batch: Batch) -> None:
    groups = batch.patterns(["x", "y"])
    found = {names: rows.tolist() for rows, names in groups}
    # row 1 lacks one entry of x, row 2 all of them: both count as not (fully) known
    assert found == {("x", "y"): [0, 3], (): [1], ("y",): [2]}
    assert torch.cat([rows for rows, _ in groups]).sort().values.tolist() == [0, 1, 2, 3]
    ((rows, names),) = batch.patterns([])
    assert (rows.tolist(), names) == ([0, 1, 2, 3], ())


def test_to(batch: Batch) -> None:
    moved = batch.to("cpu", torch.float32)
    assert moved["x"].dtype == torch.float32
    assert moved["y"].dtype == torch.int64
    assert moved.present("y").dtype == torch.bool
    assert batch["x"].dtype == torch.float64
    assert batch.to("meta").device.type == "meta"
    assert batch.to("meta").present("y").device.type == "meta"


def test_round_trips(batch: Batch) -> None:
    leaves, spec = _pytree.tree_flatten(batch.to(dtype=torch.float32))
    assert len(leaves) == 5
    back = _pytree.tree_unflatten(leaves, spec)
    assert same(back, batch.to(dtype=torch.float32))
    doubled = _pytree.tree_map(lambda t: t if t.dtype == torch.bool else t * 2, {"b": batch})["b"]
    assert torch.equal(doubled["x"], batch["x"] * 2)
    assert torch.equal(doubled.present("x"), batch.present("x"))
    _, other = _pytree.tree_flatten(batch.to(dtype=torch.float32)[:2])
    assert other != spec  # the number of rows is part of the structure
    for clone in (pickle.loads(pickle.dumps(batch)), copy.deepcopy(batch), copy.copy(batch)):
        assert same(clone, batch)


def test_a_loader_with_lists_of_indices(batch: Batch) -> None:
    sampler = torch.utils.data.BatchSampler(
        torch.utils.data.SequentialSampler(range(4)), 3, drop_last=False
    )
    loader: Any = torch.utils.data.DataLoader(batch, batch_size=None, sampler=sampler)  # type: ignore[arg-type]
    assert [len(part) for part in loader] == [3, 1]


def test_a_batch_is_a_read_only_table(batch: Batch) -> None:
    with pytest.raises(TypeError, match=r"iterate over batch\.names"):
        iter(batch)
    with pytest.raises(TypeError, match="does not support item assignment"):
        batch["x"] = X  # type: ignore[index]
    with pytest.raises(AttributeError):
        batch.rows = 3  # type: ignore[attr-defined]
    assert "x" in batch
    assert 0 not in batch


def test_repr_says_what_is_missing(batch: Batch) -> None:
    text = repr(batch)
    assert "4 rows" in text
    assert "x: (4, 3) float64, 4 of 12 missing" in text
    assert "y: (4,) int64, 1 of 4 missing" in text
    assert repr(Batch.of(2)) == "Batch(2 rows; nothing observed)"


def test_what_is_computed_once_is_kept_for_what_a_batch_drops():
    batch = Batch.of({"a": torch.ones(3), "b": torch.ones(3)})
    assert batch.once("key", object) is not batch.once("key", object)
    shared = batch.sharing()
    first = shared.once("key", object)
    assert shared.drop("a").once("key", object) is first
    assert shared.once("other", object) is not first
    hidden = shared.hide("a", torch.tensor([True, False, True]))
    assert hidden.once("key", object) is not first
    assert shared[:2].once("key", object) is not first
    assert batch.sharing().once("key", object) is not first
