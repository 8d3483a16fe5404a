"""Fuzzing batches."""

import math

import numpy as np
import pandas as pd
import torch
from torch.utils import _pytree

from fuzzing.core import KINDS, a_mask, attempt, chance, copied, laid_out, must, numbers, pick, same
from pyrozoo.inference import Batch


def an_entry(rng, rows):
    """What a person hands over, the values that are to be read, and which of them are known."""
    event = pick(rng, [(), (1,), (3,), (2, 2)])
    kind = pick(rng, KINDS)
    values = numbers(rng, (rows, *event), kind)
    pixels = kind == "u1" and bool(event)
    if pixels and values.size:
        values.flat[0] = 255
    want = values.astype(np.float64 if values.dtype.kind in "fb" or pixels else np.int64)
    want = np.float32(want) / np.float32(255) if pixels else want
    how = pick(rng, ["bare", "pair", "tensors", "masked"])
    known = np.ones(values.shape, bool)
    if how == "bare":
        return laid_out(rng, values), want, known
    mask, known = a_mask(rng, values.shape)
    if pixels and values.size and not (known & (values > 1)).any():
        return values, want, np.ones(values.shape, bool)
    if values.dtype.kind == "f" and values.size:
        values = np.where(known, values, pick(rng, [np.nan, np.inf, 1e4])).astype(values.dtype)
    if how == "masked":
        return np.ma.array(values, mask=~known), want, known
    if how == "tensors" and values.dtype.isnative and values.dtype != np.longdouble:
        return (torch.from_numpy(values.copy()), torch.from_numpy(mask.copy())), want, known
    return (laid_out(rng, values), laid_out(rng, mask)), want, known


def _wrong_entry(rng, rows):
    """What a batch has to refuse, and why."""
    x, mask = rng.normal(size=(rows, 3)), rng.random((rows, 3)) < 0.5
    known = rng.random(rows) < 0.5
    hole = x.copy()
    hole[-1, 0] = pick(rng, [np.nan, np.inf, -np.inf])
    wrong = {
        "NaN or infinite": lambda: hole,
        "NaN where known": lambda: (hole, np.ones(rows, bool)),
        "complex": lambda: pick(rng, [x + 0j, torch.tensor(x) + 0j]),
        "text": lambda: x.astype(str),
        "objects": lambda: x.astype(object),
        "dates": lambda: np.zeros(rows, "M8[D]"),
        "a list": lambda: x.tolist(),
        "a number": lambda: pick(rng, [1.5, 3, True, np.float64(2)]),
        "a word": lambda: "values",
        "a frame": lambda: pick(rng, [pd.DataFrame(x), pd.Series(x[:, 0])]),
        "a scalar array": lambda: pick(rng, [np.array(1.0), torch.tensor(2)]),
        "three parts": lambda: (x, mask, mask),
        "one part": lambda: (x,),
        "a mask of integers": lambda: (x, mask.astype(pick(rng, ["i8", "u1", "f4"]))),
        "a mask with a column": lambda: (x, mask[:, :1]),
        "a mask of columns": lambda: (x, np.array([True, False, True, True] * rows)[: rows + 2]),
        "a mask of more rows": lambda: (x, np.append(known, True)),
        "a mask of too many dimensions": lambda: (x, mask[:, :, None]),
        "a scalar mask": lambda: (x, np.array(True)),
        "a list as mask": lambda: (x, known.tolist()),
        "a masked array with a mask": lambda: (np.ma.array(x, mask=mask), np.ones(rows, bool)),
        "a masked array as mask": lambda: (x, np.ma.array(known, mask=~known)),
        "pixels of 0 and 1": lambda: mask.astype(np.uint8),
        "a sparse tensor": lambda: torch.tensor(x).to_sparse(),
        "a tensor without values": lambda: torch.zeros(rows, 3, device="meta"),
        "a quantised tensor": lambda: torch.tensor(x).float().to(torch.float8_e4m3fn),
        "integers beyond int64": lambda: np.full((rows, 3), 2**63 + 5, np.uint64),
        "large integers in a tensor": lambda: torch.from_numpy(
            np.full((rows, 3), 2**63 + 5, np.uint64)
        ),
        "text in a masked array": lambda: np.ma.array(x.astype(str), mask=mask),
    }
    if mask.any():
        del wrong["pixels of 0 and 1"]
    why = pick(rng, wrong)
    return wrong[why](), why


def batch(rng):
    """Batch.of and its methods."""
    rows = int(rng.integers(0, 6))
    if chance(rng, 0.3):
        _refused_batch(rng, max(rows, 2))
        return
    entries = {f"s{i}": an_entry(rng, rows) for i in range(int(rng.integers(1, 4)))}
    given = {name: entry[0] for name, entry in entries.items()}
    before = {name: copied(value) for name, value in given.items()}
    found = attempt(lambda: Batch.of(given, pick(rng, [None, rows])), spoilt=False)
    must(all(same(before[n], v) for n, v in given.items()), "the input was changed")
    must(len(found) == rows, "rows")
    for name, (_, want, known) in entries.items():
        here = known.any() or not isinstance(given[name], tuple | np.ma.MaskedArray)
        must((name in found) == bool(here), f"{name} in the batch")
        must(found.partly(name) == bool(known.any() and not known.all()), f"partly {name}")
        if name in found:
            _check_value(found, name, want, known, slice(None))
    keys = [
        slice(*(pick(rng, [None, 0, 1, 2, -1]) for _ in range(2))),
        rng.integers(0, rows, int(rng.integers(0, 5))) if rows else np.arange(0),
        rng.random(rows) < 0.5,
        torch.randperm(rows, generator=torch.Generator().manual_seed(1)),
        list(range(rows)),
    ]
    key = pick(rng, keys)
    part = attempt(lambda: found[key], spoilt=False)
    at = key if isinstance(key, slice) else np.asarray(key)
    at = at.astype(int) if not isinstance(at, slice) and at.dtype.kind == "f" else at
    must(len(part) == len(np.arange(rows)[at]), "rows of a part")
    for name in found.names:
        _, want, known = entries[name]
        _check_value(part, name, want, known, at)
    _check_methods(rng, found, entries)


def _check_value(batch, name, want, known, at):
    value, present = batch[name], batch.present(name)
    must(value.shape == want[at].shape == batch.shape(name), f"{name}: shape")
    must(not value.requires_grad and value.layout == torch.strided, f"{name}: kind of tensor")
    present = present.reshape(present.shape + (1,) * (value.dim() - present.dim()))
    if value.numel():
        must((present.expand(value.shape).numpy() == known[at]).all(), f"{name}: presence")
    wanted = np.where(known, want, 0)[at]
    must((value.double().numpy() == wanted.astype(np.float64)).all(), f"{name}: values")


def _check_methods(rng, batch, entries):
    rows = len(batch)
    must(_equal(batch, _pytree.tree_map(lambda x: x, batch)), "pytree")
    must("rows" in repr(batch), "repr")
    groups = batch.patterns(batch.names)
    index = torch.cat([group for group, _ in groups]) if groups else torch.arange(0)
    must(index.sort().values.tolist() == list(range(rows)), "patterns are a partition")
    for rows_of, names in groups:
        for name in batch.names:
            whole = batch.present(name)[rows_of].reshape(len(rows_of), -1).all(1) if rows else None
            must(whole is None or bool((whole == (name in names)).all()), "a pattern")
    if not batch.names:
        return
    name = pick(rng, batch.names)
    must(name not in batch.drop(name) and len(batch.drop(name)) == rows, "drop")
    shape = batch.shape(name)
    mask, known = a_mask(rng, shape)
    hidden = attempt(lambda: batch.hide(name, torch.from_numpy(mask.copy())), spoilt=False)
    _check_value(hidden, name, entries[name][1], entries[name][2] & known, slice(None))
    value = torch.full(shape, 2.0)
    replaced = attempt(lambda: batch.replace(name, value), spoilt=False)
    _check_value(replaced, name, value.numpy(), entries[name][2], slice(None))
    wrong = {
        "a scalar mask": lambda: batch.hide(name, torch.tensor(True)),
        "a mask of other rows": lambda: batch.hide(name, torch.ones(rows + 1, dtype=torch.bool)),
        "a mask of integers": lambda: batch.hide(name, torch.ones(rows, dtype=torch.long)),
        "an array as mask": lambda: batch.hide(name, np.ones((rows, 77), bool)),
        "a list as mask": lambda: batch.hide(name, [True] * (rows + 1)),
        "a site that is not there": lambda: batch.hide("nix", torch.ones(rows, dtype=torch.bool)),
        "a value of another shape": lambda: batch.replace(name, torch.ones(rows, 77)),
        "no tensor": lambda: batch.replace(name, np.ones(tuple(shape))),
        "a mask of fewer rows": lambda: batch[torch.ones(rows + 1, dtype=torch.bool)],
        "a row that is not there": lambda: batch[pick(rng, [[rows], [-rows - 1], np.array([99])])],
        "a float as index": lambda: batch[pick(rng, [[0.5], torch.tensor([1.0]), 1.5])],
        "a number as index": lambda: batch[0],
        "a nested index": lambda: batch[pick(rng, [[[0]], torch.zeros(1, 1).long(), (("a",), 1)])],
        "text as index": lambda: batch[pick(rng, [("x", "y"), ["s0"], np.array(["s0"])])],
        "nothing as index": lambda: batch[None],
        "another site": lambda: batch["nix"],
        "a type that is no float": lambda: batch.to(dtype=torch.long),
        "iteration": lambda: list(batch),
    }
    if chance(rng, 0.6):
        why = pick(rng, wrong)
        attempt(wrong[why], spoilt=why, also=(KeyError, IndexError))


def _refused_batch(rng, rows):
    site = pick(rng, ["x", "x_left", "y"])
    if chance(rng, 0.7):
        value, why = _wrong_entry(rng, rows)
        others = {"z": np.ones((rows, 2))} if chance(rng, 0.5) else {}
        attempt(lambda: Batch.of({**others, site: value}), repr(site), spoilt=why)
        return
    x = np.ones((rows, 2))
    wrong = {
        "other rows": lambda: Batch.of({site: x, "other": x[1:]}),
        "other rows than said": lambda: Batch.of({site: x}, rows + 1),
        "other rows than a number": lambda: Batch.of(rows, rows + 1),
        "other rows than a batch": lambda: Batch.of(Batch.of({site: x}), rows + 1),
        "negative rows": lambda: Batch.of(*pick(rng, [(-1,), ({}, -1), ({site: None}, -2)])),
        "a fraction of rows": lambda: Batch.of({}, pick(rng, [2.5, math.nan, 3.0])),
        "rows as text": lambda: Batch.of({}, "3"),
        "no rows at all": lambda: Batch.of(pick(rng, [{}, {site: None}])),
        "no dictionary": lambda: Batch.of(pick(rng, [[x], x, None, "x", True, 2.5, {site}])),
        "a name that is no text": lambda: Batch.of({pick(rng, [1, None, (site,)]): x}),
    }
    why = pick(rng, wrong)
    attempt(wrong[why], spoilt=why)


def _equal(a, b):
    return (
        a.names == b.names
        and len(a) == len(b)
        and all(torch.equal(a.stored(n), b.stored(n)) for n in a.names)
        and all(torch.equal(a.present(n), b.present(n)) for n in a.names)
    )
