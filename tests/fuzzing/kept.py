"""Fuzzing run folders."""

import contextlib
import functools
import io
import json
import math
import os
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from fuzzing.core import (
    PACKAGES,
    attempt,
    must,
    mutated,
    pick,
    spoil_json,
)
from pyrozoo.inference import Batch, checkpoint
from pyrozoo.zoo import exports, folders, runs
from pyrozoo.zoo.tasks import Task


@functools.cache
def home():
    """A folder with tables, arrays and two small runs, made once."""
    place = tempfile.TemporaryDirectory()
    path, rng = Path(place.name), np.random.default_rng(0)
    frame = pd.DataFrame(rng.normal(size=(24, 3)), columns=["a", "b", "c"])
    frame["kind"] = np.array(["u", "v"])[np.arange(24) % 2]
    frame.iloc[3, 1] = np.nan
    frame.to_csv(path / "t.csv", index=False)
    frame.drop(columns="kind").head(3).to_parquet(path / "new.parquet")
    images = rng.integers(0, 256, (24, 2, 2)).astype("u1")
    np.savez(path / "d.npz", x=images)
    np.savez(path / "f.npz", x=images.reshape(24, 4).astype("f4") / 255)
    (path / "evil.py").write_text("raise SystemExit('executed')")
    rows = Batch.of({"x": images.reshape(24, 4)})
    labels = torch.arange(24) % 2
    task = Task(rows, labels, rows, labels, {"x": (1, 2, 2)}, ["u", "v"])
    options = {"hidden": [4], "latent_dim": 2, "num_clusters": 2}
    fit = {"epochs": 1, "device": "cpu"}
    spec = {"method": "vade", "data": {"name": "digits"}, "options": options, "fit": fit}
    facts = {"spec": spec, "seed": 0, "command": "pyrozoo", "versions": runs.versions()}
    with torch.random.fork_rng(devices=[]), contextlib.redirect_stderr(io.StringIO()):
        model = runs.make_model(spec, task, 0)
        result = model.fit(task.train, progress=False, start={"epochs": 1}, **fit)
        folders.store(path / "arrays", model, result, task, {"bound": 1.0}, facts)
        data = {"file": str(path / "t.csv"), "label": "kind"}
        spec = {**spec, "data": data, "start": {"epochs": 1}}
        model, result, task, figures = runs.fit_spec(spec, 0, progress=False)
        folders.store(path / "table", model, result, task, figures, {**facts, "spec": spec})
    home.keep = place
    return path


@functools.cache
def _answers(name):
    return _asked(folders.load(home() / name, runs.make_model))


def _asked(run):
    """What a run says."""
    found = exports.predict(run, run.train[:4], num_samples=2)
    return {
        "p_y": found["p_y"], "z": found["z"], "bound": found["bound"],
        "x": exports.sample(run, 2)["x"], "all": run.result.evaluate(run.train)["bound"],
    }  # fmt: skip


def run_folders(rng):
    """Run folders, spoilt in a copy: refused, or read with the same answers and nothing else."""
    name = pick(rng, ["arrays", "table"])
    want = _answers(name)
    with tempfile.TemporaryDirectory() as place:
        folder, outside = Path(place) / "run", Path(place) / "outside"
        shutil.copytree(home() / name, folder)
        outside.write_text("untouched")
        file = pick(rng, ["model.safetensors", "rows.safetensors", "run.json", "metrics.json"])
        path, spoilt, says = folder / file, None, [file, str(folder)]
        how = pick(
            rng, ["bytes", "json", "json", "json", "trick", "trick", "written", "forged", "sound"]
        )
        if how == "bytes":
            new, why = mutated(rng, path.read_bytes())
            path.write_bytes(new)
            spoilt = why if file.endswith("safetensors") else None
        elif how == "json":
            path = folder / pick(rng, ["run.json", "run.json", "run.json", "metrics.json"])
            data = json.loads(path.read_text())
            says += [str(key) for key in spoil_json(rng, data)]
            path.write_text(json.dumps(data))
        elif how == "written":
            path = folder / pick(rng, folders.WRITTEN)
            path.parent.mkdir(exist_ok=True)
            path.unlink(missing_ok=True)
            path.symlink_to(pick(rng, [outside, Path("/nix/outside")]))
            attempt(lambda: folders.check(folder), path.name, spoilt=f"a link for {path.name}")
        elif how == "trick":
            spoilt, says = _trick(rng, folder, path, outside), [path.name, str(folder)]
        elif how == "forged":
            path = folder / pick(rng, ["model.safetensors", "rows.safetensors"])
            spoilt = _forge(rng, path)
            says.append(path.name)
        with watching(folder) as seen:
            run = attempt(lambda: folders.load(folder, runs.make_model), *says, spoilt=spoilt)
            found = attempt(lambda: _asked(run), spoilt=False)
        must(not seen, f"reading a run folder does more: {seen}")
        for key, value in want.items():
            must(
                np.array_equal(found[key], value),
                f"other answers, {key}, after {how} of {path.name}",
            )


def _trick(rng, folder, path, outside):
    """Put something else in the place of a file; gives what is wrong."""
    ways = ["link", "device", "folder", "missing", "loop", "relative"]
    how = pick(rng, [*ways, "pipe"] if hasattr(os, "mkfifo") else ways)
    shutil.copy(path, outside)
    path.unlink()
    if how == "link":
        path.symlink_to(outside)
    elif how == "relative":
        path.symlink_to(Path("..") / "outside")
    elif how == "device":
        path.symlink_to("/dev/zero")
    elif how == "folder":
        path.mkdir()
    elif how == "pipe":
        os.mkfifo(path)
    elif how == "loop":
        path.symlink_to(path.name)
    return f"{how} in place of {path.name}"


def _forge(rng, path):
    """A file with a sound digest that was never written so; gives what is wrong."""
    tensors, meta = checkpoint.load(path)
    meta.pop("format")
    name = pick(rng, tensors)
    value = tensors[name]
    change = {
        "a tensor is lost": lambda: tensors.pop(name),
        "another shape": lambda: tensors.update({name: torch.cat([value, value])}),
        "another type": lambda: tensors.update({name: value.to(torch.complex64)}),
        "a scalar": lambda: tensors.update({name: torch.tensor(1.0)}),
        "NaN": lambda: tensors.update({name: torch.full(value.shape, math.nan)}),
    }
    if path.name == "model.safetensors":
        change["other values"] = lambda: tensors.update({name: value + 1})
        change["no history"] = lambda: meta.pop("history")
        change["a text as history"] = lambda: meta.update(history="x")
        change["numbers as sites"] = lambda: meta.update(sites=[1, 2])
    why = pick(rng, change)
    change[why]()
    checkpoint.save(path, tensors, meta)
    return f"{why} ({name})"


_FORBIDDEN = (
    "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "pickle.find_class",
    "socket.connect", "socket.getaddrinfo", "urllib.Request", "marshal.loads",
)  # fmt: skip
_WATCH = {}


def _hook(event, words):
    if "folder" not in _WATCH:
        return
    if event in _FORBIDDEN:
        _WATCH["seen"].append((event, str(words)[:200]))
    elif event in ("open", "compile") and not isinstance(words[0 if event == "open" else 1], int):
        name = words[0] if event == "open" else words[1]
        path = os.path.realpath(os.fsdecode(name)) if isinstance(name, str | bytes) else str(name)
        if not path.startswith(_WATCH["places"]):
            _WATCH["seen"].append((event, path))


@contextlib.contextmanager
def watching(folder):
    """Note what is opened outside of a folder and of the installation, and what is executed."""
    if "hook" not in _WATCH:
        sys.addaudithook(_hook)
    seen = []
    installed = {sys.prefix, sys.base_prefix, *filter(None, sys.path), *PACKAGES}
    places = tuple({os.path.realpath(p) + os.sep for p in installed if p != "."})
    _WATCH.update(hook=True, seen=seen, places=(os.path.realpath(folder), *places))
    _WATCH["folder"] = folder
    try:
        yield seen
    finally:
        del _WATCH["folder"]
