"""Rows on disk: every format reads what is in memory, and a fit is the same bit for bit."""

import builtins
import functools
import os
import threading

import anndata
import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.sparse
import torch
import zarr

from pyrozoo.guides import Amortized
from pyrozoo.inference import Batch, EnumELBO, Stored, evaluate, fit, predict, responsibilities
from pyrozoo.inference.disk.loading import Reader
from pyrozoo.inference.training.facts import fingerprint
from pyrozoo.inference.training.rows import block_order, epoch_order
from pyrozoo.zoo import tables
from pyrozoo.zoo.clustering import VaDE
from pyrozoo.zoo.tasks import make_task

N, D = 230, 6
FORMATS = (
    "npy", "h5", "h5 in chunks", "zarr", "parquet", "parquet of lists", "h5ad", "h5ad sparse"
)  # fmt: skip


def matrix(dtype=np.uint8):
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (N, D)) * (rng.random((N, D)) < 0.5)
    return x.astype(dtype)


def labels():
    return np.random.default_rng(1).integers(0, 3, N)


def write(folder, kind, x):
    """A file of that kind, opened; x as uint8 or float32."""
    if kind == "npy":
        np.save(folder / "x.npy", x)
        return folder / "x.npy"
    if kind.startswith("h5ad"):
        path = folder / "x.h5ad"
        some = scipy.sparse.csr_matrix(x) if "sparse" in kind else x
        anndata.AnnData(some).write_h5ad(path)
        return path
    if kind.startswith("h5"):
        path = folder / "x.h5"
        how = {"chunks": (32, 3), "compression": "gzip"} if "chunks" in kind else {}
        with h5py.File(path, "w") as file:
            file.create_dataset("x", data=x, **how)
        return path
    if kind == "zarr":
        path = folder / "x.zarr"
        group = zarr.open_group(str(path), mode="w")
        group.create_array("x", data=x, chunks=(32, 3))
        return path
    path = folder / "x.parquet"
    if "lists" in kind:
        flat = pa.array(x.reshape(-1))
        table = pa.table({"x": pa.FixedSizeListArray.from_arrays(flat, D)})
    else:
        table = pa.table({f"c{j}": x[:, j] for j in range(D)})
    pq.write_table(table, path, row_group_size=50)
    return path


def same(a, b):
    assert a.names == b.names
    assert len(a) == len(b)
    for name in a.names:
        assert a.stored(name).dtype == b.stored(name).dtype
        assert torch.equal(a.stored(name), b.stored(name))
        assert a.partly(name) == b.partly(name)
        assert torch.equal(a.present(name), b.present(name))


def make():
    torch.manual_seed(0)
    program = VaDE(D, 3, 2, (8,))
    return program, Amortized(program, ["x"], (8,))


def train(data, **options):
    program, guide = make()
    settings = {"epochs": 2, "batch_size": 32, "progress": False, **options}
    return fit(program, guide, data, **settings)


@functools.cache
def in_memory():
    return train({"x": matrix()}, validation=0.2)


def equal(a, b):
    assert a.sites == b.sites
    assert len(a.history) == len(b.history)
    for one, other in zip(a.history, b.history, strict=True):
        assert {k: v for k, v in one.items() if k != "seconds"} == {
            k: v for k, v in other.items() if k != "seconds"
        }
    for name, value in a.parameters.items():
        assert torch.equal(value, b.parameters[name]), name


@pytest.fixture
def stored(tmp_path):
    np.save(tmp_path / "x.npy", matrix())
    return Stored({"x": np.load(tmp_path / "x.npy", mmap_mode="r")})


# ---- reading -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_reads_what_is_in_memory(tmp_path, kind, dtype):
    x = matrix(dtype)
    rows = tables.open_rows(write(tmp_path, kind, x), {"x": "x"} if "lists" in kind else None).data
    whole = Batch.of({"x": x})
    assert len(rows) == N
    assert rows.names == ("x",)
    assert rows.shape("x") == (N, D)
    same(rows[:], whole)
    for key in (slice(40, 60), slice(200, 500), [5, 229, 5, -1, 0], whole["x"][:, 0] > 0.3, []):
        same(rows[key], whole[key])


@pytest.mark.parametrize("kind", FORMATS)
def test_a_fit_is_the_fit_in_memory(tmp_path, kind):
    path = write(tmp_path, kind, matrix())
    rows = tables.open_rows(path, {"x": "x"} if "lists" in kind else None).data
    equal(train(rows, validation=0.2), in_memory())


def test_arrays_of_the_libraries_themselves(tmp_path):
    x = matrix(np.int16)
    with h5py.File(write(tmp_path, "h5", x), "r") as file:
        group = zarr.open_group(str(write(tmp_path, "zarr", x)), mode="r")
        rows = Stored({"x": file["x"], "x_2": group["x"], "y": torch.from_numpy(labels())})
        same(rows[[9, 3]], Batch.of({"x": x, "x_2": x, "y": labels()})[[9, 3]])
        assert "x.h5/x" in repr(rows)


def test_selections_are_composed_without_reading(stored):
    order = torch.randperm(N)
    some = stored.select(order).select(slice(10, 40)).select([3, 1])
    same(some[:], Batch.of({"x": matrix()})[order[10:40][[3, 1]]])
    same(some.in_order()[:], Batch.of({"x": matrix()})[order[10:40][[3, 1]].sort().values])
    assert isinstance(some, Stored)


def test_integers_booleans_and_big_endian_numbers_are_read_as_in_memory():
    data = {"a": np.arange(5, dtype=">i2"), "b": np.eye(5, dtype=bool), "c": np.ones(5, ">f8")}
    same(Stored(data)[[4, 2]], Batch.of(data)[[4, 2]])


def test_sites_from_memory_are_added_to_selected_rows(stored):
    index, known = torch.randperm(N)[:100], torch.arange(100) % 4 > 0
    y = torch.from_numpy(labels())[:100]
    some = stored.select(index)
    for given in (y, (y, known), (y, torch.zeros(100, dtype=torch.bool))):
        whole = Batch.of({"x": matrix()[index.numpy()], "y": given})
        same(some.add({"y": given})[:], whole)
        same(some.add({"y": given})[[40, 7]], whole[[40, 7]])
    with pytest.raises(ValueError, match="selected more than once"):
        stored.select([1, 1]).add({"y": y[:2]})


# ---- presence ------------------------------------------------------------------------------------

MASKS = {
    "rows": np.arange(N) % 3 > 0,
    "entries": np.random.default_rng(2).random((N, D)) < 0.7,
    "rows by entry": np.repeat((np.arange(N) % 2 > 0)[:, None], D, 1),
    "all": np.ones((N, D), bool),
}


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("kind", MASKS)
def test_what_is_missing_is_as_in_memory(tmp_path, kind, on_disk):
    x, mask = matrix(), MASKS[kind]
    whole, given = Batch.of({"x": (x, mask)}), mask
    if on_disk:
        np.save(tmp_path / "mask.npy", mask)
        given = np.load(tmp_path / "mask.npy", mmap_mode="r")
    rows = Stored({"x": (x, given)})
    same(rows[:], whole)
    same(rows[[7, 3]], whole[[7, 3]])
    assert rows.mask_dims("x") == whole.mask_dims("x")
    some = torch.arange(20, 50)
    for a, b in ((rows, whole), (rows.select(some), whole[some])):
        assert torch.equal(a.extent("x").rows, b.extent("x").rows)
        assert a.extent("x")[1:] == b.extent("x")[1:]
    equal(train(rows, validation=0.25), train({"x": (x, mask)}, validation=0.25))


def test_a_site_that_is_nowhere_known_is_not_observed():
    rows = Stored({"x": matrix(), "y": (labels(), np.zeros(N, bool))})
    assert rows.names == ("x",)
    assert not rows.present("y").any()


def test_rows_with_labels_are_visited_again():
    known = np.arange(N) % 5 == 0
    data = {"x": matrix(), "y": (labels(), known)}
    equal(train(Stored(data), repeat={"y": 3}), train(data, repeat={"y": 3}))


def test_missing_values_of_parquet_are_missing(tmp_path):
    frame = pd.DataFrame(matrix(np.float64), columns=list("abcdef"))
    frame.loc[3, "b"] = None
    path = tmp_path / "x.parquet"
    frame.to_parquet(path, row_group_size=100)
    known = frame.notna().to_numpy()
    same(tables.open_rows(path).data[:], Batch.of({"x": (frame.fillna(0).to_numpy(), known)}))


# ---- files ---------------------------------------------------------------------------------------


def test_sites_of_an_hdf5_file_by_name(tmp_path):
    path = tmp_path / "some.hdf5"
    with h5py.File(path, "w") as file:
        file["x_a"], file["x_b"], file["y"] = matrix(), matrix(np.float32), labels() * 2 - 1
        file["x_a_present"] = MASKS["rows"]
        file["deep/images"] = matrix()
    opened = tables.open_rows(path)
    y = labels()
    whole = {"x_a": (matrix(), MASKS["rows"]), "x_b": matrix(np.float32)}
    same(opened.data[:], Batch.of({**whole, "y": ((y - 1).clip(0), y > 0)}))
    assert opened.label_names == ("1", "3")
    same(tables.open_rows(path, {"x": "deep/images"}).data[:], Batch.of({"x": matrix()}))
    with pytest.raises(ValueError, match=r"some.hdf5: no dataset 'images' for 'x' .*'x_a'"):
        tables.open_rows(path, {"x": "images"})


def test_labels_of_h5ad_and_parquet(tmp_path):
    kinds = np.array(["b", "a", "c"])[labels()]
    frame = pd.DataFrame({"kind": pd.Categorical(kinds, ["c", "b", "a", "never"])})
    frame.index = frame.index.astype(str)
    anndata.AnnData(matrix(np.float32), obs=frame).write_h5ad(tmp_path / "x.h5ad")
    table = pd.DataFrame(matrix(np.float32), columns=list("abcdef")).assign(kind=kinds)
    table.to_parquet(tmp_path / "x.parquet")
    y = np.array([1, 0, 2])[labels()]
    for name in ("x.h5ad", "x.parquet"):
        opened = tables.open_rows(tmp_path / name, label="kind")
        assert opened.label_names == ("a", "b", "c")
        same(opened.data[:], Batch.of({"x": matrix(np.float32), "y": y}))
        with pytest.raises(ValueError, match=f"{name}: no column 'other'"):
            tables.open_rows(tmp_path / name, label="other")
    with pytest.raises(ValueError, match=r"column 'kind' is expected to hold numbers .* got"):
        tables.open_rows(tmp_path / "x.parquet")


def test_several_npy_files(tmp_path):
    np.save(tmp_path / "x.npy", matrix())
    np.save(tmp_path / "y.npy", np.where(MASKS["rows"], labels(), -1))
    opened = tables.open_rows({"x": tmp_path / "x.npy", "y": tmp_path / "y.npy"})
    y = (np.where(MASKS["rows"], labels(), 0), MASKS["rows"])
    same(opened.data[:], Batch.of({"x": matrix(), "y": y}))


@pytest.mark.parametrize(
    ("kind", "library", "extra"),
    [("h5", "h5py", "storage"), ("zarr", "zarr", "storage"), ("parquet", "pyarrow", "storage"),
     ("h5ad", "anndata.io", "anndata")],
)  # fmt: skip
def test_a_missing_library_is_named_with_its_extra(tmp_path, monkeypatch, kind, library, extra):
    path = write(tmp_path, kind, matrix())
    real = tables.cells.importlib.import_module

    def without(name, *args):
        if name.partition(".")[0] == library.partition(".")[0]:
            raise ModuleNotFoundError(name)
        return real(name, *args)

    monkeypatch.setattr(tables.cells.importlib, "import_module", without)
    wanted = rf'{library.partition(".")[0]}: pip install "pyrozoo\[{extra}\]"'
    with pytest.raises(ImportError, match=wanted):
        tables.open_rows(path)


def test_opening_imports_no_library_that_is_not_needed(tmp_path, monkeypatch):
    path, real = write(tmp_path, "npy", matrix()), builtins.__import__

    def guarded(name, *args, **kwargs):
        assert name.partition(".")[0] not in ("h5py", "zarr", "pyarrow", "anndata"), name
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", guarded)
    assert len(tables.open_rows(path).data) == N


@pytest.mark.parametrize("kind", ["npy", "h5", "zarr", "parquet", "h5ad"])
def test_a_damaged_file_is_refused(tmp_path, kind):
    path = write(tmp_path, kind, matrix())
    whole = path / "zarr.json" if path.is_dir() else path
    whole.write_bytes(whole.read_bytes()[: whole.stat().st_size // 3])
    with pytest.raises(ValueError, match=rf"x\.{kind}.* cannot be read"):
        tables.open_rows(path)


# ---- what does not fit ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "error", "match"),
    [
        ({"x": [[1.0]]}, TypeError, "'x': expected an array that is read by rows .* got list"),
        ({"x": np.array(["a"])}, TypeError, "'x': expected numbers or booleans"),
        ({"x": np.array(1.0)}, ValueError, "'x': values have the rows first"),
        ({"x": matrix(), "y": labels()[:9]}, ValueError, "same number of rows, got 'x': 230; 'y'"),
        ({"x": (matrix(), np.ones((N, 2), bool))}, ValueError, r"'x': the mask .* \(230, 2\)"),
        ({"x": (matrix(), np.ones(N))}, ValueError, "'x': the mask .* got float64"),
        ({"x": (matrix() > 9).astype(np.uint8)}, ValueError, "'x': uint8 arrays are read as pix"),
        ({}, ValueError, "nothing is observed"),
        (7, TypeError, "a dictionary of site"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_said(data, error, match):
    with pytest.raises(error, match=match):
        Stored(data)


def test_rows_of_another_width_than_the_site(tmp_path):
    np.save(tmp_path / "x.npy", matrix()[:, :4])
    with pytest.raises(ValueError, match=r"site 'x' has rows of shape \(6,\), got \(4,\)"):
        train(tables.open_rows(tmp_path / "x.npy").data)


def test_nan_is_refused_with_the_file(tmp_path):
    x = matrix(np.float32) / 255
    x[200, 1] = np.nan
    np.save(tmp_path / "x.npy", x)
    with pytest.raises(ValueError, match=r"x\.npy: 'x': 1 NaN entries"):
        train(tables.open_rows(tmp_path / "x.npy").data)


def test_values_out_of_range_are_found_in_every_row(tmp_path):
    y = labels()
    y[N - 1] = 7
    with pytest.raises(ValueError, match=r"site 'y' takes values in 0\.\.2, but 1 of"):
        train(Stored({"x": matrix(), "y": y}))


def test_whole_values_are_refused(stored):
    program, guide = make()
    for ask in (
        lambda: stored["x"],
        lambda: stored.stored("x"),
        lambda: EnumELBO().loss(program, guide, stored),
        lambda: stored.replace("x", torch.zeros(N, D)),
    ):
        with pytest.raises(TypeError, match=r"230 rows that are on disk: read some of them first"):
            ask()
    with pytest.raises(KeyError, match="'y' is not observed"):
        stored.shape("y")


# ---- fits ----------------------------------------------------------------------------------------


def test_what_follows_a_fit_reads_in_slices(tmp_path, stored):
    result = train({"x": matrix()})
    whole = {"x": matrix()}
    assert result.evaluate(stored) == result.evaluate(whole)
    pair = result.program, result.guide
    assert evaluate(*pair, stored, batch_size=50) == evaluate(*pair, whole, batch_size=50)
    for size in (50, 1000):
        for ask in (responsibilities, predict):
            options = {"site": "y", "seed": 3, "batch_size": size}
            assert torch.equal(ask(*pair, stored, **options), ask(*pair, whole, **options))
    rebuilt = predict(*pair, stored, "x", observed="ignore", seed=0)
    assert torch.equal(rebuilt, predict(*pair, whole, "x", observed="ignore", seed=0))


def test_a_fit_goes_on_bit_for_bit_from_disk_and_from_memory(tmp_path, stored):
    alone = train(stored, epochs=4, validation=0.2)
    for second in (stored, {"x": matrix()}):
        folder = tmp_path / type(second).__name__
        train(stored, epochs=2, validation=0.2, folder=folder)
        equal(train(second, epochs=4, validation=0.2, folder=folder, resume=True), alone)


def test_other_rows_are_noticed_on_going_on(tmp_path, stored):
    train(stored, folder=tmp_path / "run")
    x = matrix()
    x[100, 2] ^= 255
    with pytest.raises(ValueError, match="other settings: data"):
        train(Stored({"x": x}), epochs=3, folder=tmp_path / "run", resume=True)


@pytest.mark.parametrize("entries", [50, 2**24])
@pytest.mark.parametrize("kind", MASKS)
def test_the_fingerprint_is_that_of_memory(monkeypatch, kind, entries):
    monkeypatch.setattr("pyrozoo.inference.training.facts.ENTRIES", entries)
    data = {"x": (matrix(), MASKS[kind]), "y": labels()}
    assert fingerprint(Stored(data)) == fingerprint(Batch.of(data))


def in_blocks(folder, **options):
    path = write(folder, "parquet", matrix())
    return tables.open_rows(path, shuffle="blocks", window=2 * 50 * D, **options).data


def test_blocks_are_mixed_by_window():
    visits, blocks = torch.arange(100, 200), torch.arange(100) // 10
    order = block_order(visits, blocks, 3, torch.Generator().manual_seed(0))
    assert torch.equal(order.sort().values, visits)
    again = block_order(visits, blocks, 3, torch.Generator().manual_seed(0))
    other = block_order(visits, blocks, 3, torch.Generator().manual_seed(1))
    assert torch.equal(order, again)
    assert not torch.equal(order, other)
    first = (order[:30] - 100) // 10
    assert len(first.unique()) == 3
    assert len((order[:10] - 100).div(10, rounding_mode="floor").unique()) > 1


def test_every_row_is_visited_once_and_few_blocks_are_read(tmp_path):
    rows = in_blocks(tmp_path)
    assert rows.by_blocks
    assert rows.window == 2
    assert rows.starts.tolist() == [0, 50, 100, 150, 200]
    (source,) = rows._sources()
    read = []
    source._kept.clear()
    whole = source.array.__getitem__
    source.array = type("Counted", (), {"__getitem__": lambda _, s: read.append(s) or whole(s)})()
    order = epoch_order(rows, torch.arange(N), torch.Generator().manual_seed(0))
    got = torch.cat([rows[index].stored("x") for index in order.split(16)])
    assert torch.equal(got, torch.from_numpy(matrix())[order])
    assert len(read) == 5
    assert torch.equal(order.sort().values, torch.arange(N))


def test_a_fit_in_blocks_is_repeatable_and_goes_on(tmp_path):
    rows = in_blocks(tmp_path)
    alone = train(rows, epochs=4, validation=0.2)
    equal(train(rows, epochs=4, validation=0.2), alone)
    train(rows, epochs=2, validation=0.2, folder=tmp_path / "run")
    equal(train(rows, epochs=4, validation=0.2, folder=tmp_path / "run", resume=True), alone)
    other = tables.open_rows(tmp_path / "x.parquet", shuffle="rows").data
    with pytest.raises(ValueError, match="shuffle"):
        train(other, epochs=4, validation=0.2, folder=tmp_path / "run", resume=True)


def test_files_that_fit_into_the_window_are_mixed_as_in_memory(tmp_path):
    assert not tables.open_rows(write(tmp_path, "parquet", matrix())).data.by_blocks
    with pytest.raises(ValueError, match="none of the arrays is read in blocks"):
        Stored({"x": matrix()}, shuffle="blocks")


# ---- the command's task --------------------------------------------------------------------------


def test_a_task_leaves_many_rows_on_disk(tmp_path, monkeypatch):
    path = tmp_path / "x.h5"
    y = np.where(MASKS["rows"], labels(), -1)
    with h5py.File(path, "w") as file:
        file["x"], file["kind"] = matrix(), y
    data = {"file": path, "label": "kind"}
    with pytest.raises(ValueError, match="sites are x or x_<view>"):
        make_task({"file": path}, "vade", 0)
    small = make_task({**data}, "m2", 0)
    monkeypatch.setattr("pyrozoo.zoo.tasks.MANY", 20)
    large = make_task({**data}, "m2", 0)
    assert isinstance(large.train, Stored)
    assert not isinstance(small.train, Stored)
    assert large.label_names == ["0", "1", "2"]
    same(large.train[:], small.train)
    same(large.test[:], small.test)
    assert torch.equal(large.labels, small.labels)
    assert torch.equal(large.test_labels, small.test_labels)
    assert len(large.test) == round(0.2 * int((y >= 0).sum()))
    assert not large.test.partly("x")
    assert "y" not in large.test
    everything = make_task(data, "vade", 0)
    assert everything.transductive
    assert len(everything.train) == N
    assert torch.equal(everything.labels, torch.from_numpy(y))
    with pytest.raises(ValueError, match=r"has no hidden; convert it"):
        make_task({**data, "hidden": 0.1}, "vade", 0)


# ---- reading ahead, and files that change --------------------------------------------------------


class Failing:
    """An array that cannot be read after some time."""

    def __init__(self, after, error):
        self.array, self.left, self.error = matrix(), after, error
        self.shape, self.dtype, self.where = self.array.shape, self.array.dtype, "far/away.dat"

    def __getitem__(self, rows):
        self.left -= 1
        if self.left < 0:
            raise self.error
        return self.array[rows]


def readers():
    return [t for t in threading.enumerate() if t.name.startswith("pyrozoo-reader")]


def test_an_error_of_the_reader_arrives_with_the_file():
    rows = Stored({"x": Failing(8, OSError("the disk is gone"))})
    with pytest.raises(ValueError, match=r"far/away.dat: 'x': rows .* read: the disk is gone"):
        train(rows, epochs=100)
    assert not readers()


def test_no_thread_is_left_after_an_interruption(stored):
    def interrupt(result):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(stored, callbacks=[interrupt])
    assert not readers()
    with Reader(stored) as reader:
        next(reader.batches(torch.arange(N).split(10)))
        assert len(readers()) == 1
    assert not readers()


def test_batches_come_in_their_order_and_not_too_early(stored):
    asked, read = [], stored.read
    stored.read = lambda index: asked.append(index) or read(index)
    pieces = torch.randperm(N).split(10)
    with Reader(stored) as reader:
        for i, batch in enumerate(reader.batches(pieces)):
            same(batch, Batch.of({"x": matrix()})[pieces[i]])
            assert len(asked) <= i + 3
    assert len(asked) == len(pieces)


@pytest.mark.parametrize("kind", ["npy", "h5", "h5 in chunks", "parquet", "h5ad sparse"])
def test_a_file_that_is_cut_or_changed_is_noticed(tmp_path, kind):
    path = write(tmp_path, kind, matrix())
    rows = tables.open_rows(path).data
    (source,) = rows._sources()
    source.keep, before = 0, path.read_bytes()
    source._kept.clear()
    os.truncate(path, 100)
    with pytest.raises(ValueError, match=rf"x\.{kind[:2]}.*'x': the file was changed .* now has 1"):
        train(rows)
    path.write_bytes(before)
    os.utime(path, ns=(1, 1))
    with pytest.raises(ValueError, match="and another time"):
        rows[:3]
    path.unlink()
    with pytest.raises(ValueError, match="the file is not there any more"):
        rows[:3]


def test_a_file_that_changes_during_a_fit_stops_it(tmp_path, stored):
    def cut(result):
        os.truncate(tmp_path / "x.npy", 200)

    with pytest.raises(ValueError, match=r"x\.npy: 'x': the file was changed"):
        train(stored, epochs=5, callbacks=[cut], folder=tmp_path / "run")
    assert (tmp_path / "run" / "checkpoint.safetensors").exists()


def test_a_cut_file_of_zarr_is_noticed(tmp_path):
    path = write(tmp_path, "zarr", matrix())
    chunk = path / "x" / "c" / "0" / "0"
    rows = tables.open_rows(path).data
    (source,) = rows._sources()
    source._kept.clear()
    chunk.write_bytes(chunk.read_bytes()[:5])
    with pytest.raises(ValueError, match=r"x\.zarr/x: 'x': rows 0 to 2 cannot be read"):
        rows[:3]
