"""Fuzzing the command."""

import contextlib
import os
import shutil
import tempfile
from pathlib import Path
from unittest import mock

import torch
from typer.testing import CliRunner

from fuzzing.core import (
    Bad,
    Refused,
    attempt,
    chance,
    must,
    on_purpose,
    pick,
)
from fuzzing.kept import home
from pyrozoo.zoo import folders
from pyrozoo.zoo.cli import app

WORDS = [
    "", "nix", "-1", "0", "1.5", "nan", "1e400", "[]", "{}", "null", "true", "../x", "/", "[/x]",
    "99999999999999999999", "a=b", "--", "=", "x=", "=x", "y=3", "hidden=[[", "\0", "ü", "a,b",
    "2-1", "0-3", "-", "t.csv", "arrays", "evil.py:Class", "evil.py", "nix.py:X", "a=a=a", "1e3",
    "hidden=[4]", "latent_dim=2", "all", "cpu", "vade", "*", "~", "%s", "$x", "a<b<c", "real",
]  # fmt: skip


def _lines(rng):
    """A sound line for the command, in the folder of :func:`home`."""
    small = ["--set", "hidden=[4]", "--set", "latent_dim=2", "--device", "cpu"]
    clusters = ["--set", "num_clusters=2"]
    table = ["--data", "t.csv", "--label", "kind", "--epochs", "1"]
    lines = {
        "list": ["list", "--task", "clustering"],
        "show": ["show", pick(rng, ["vade", "m2", "mvae", "hivae"])],
        "train": ["train", "vade", *table, *small, *clusters, "--out", "OUT"],
        "train m2": ["train", "m2", *table, *small, "--out", "OUT", "--test", "0.2"],
        "train arrays": ["train", "vade", "--data", "d.npz", "--epochs", "1", *small, *clusters,
                         "--out", "OUT", "--hidden", "0.2"],
        "train views": ["train", "mvae", "--data", "t.csv", "--view", "p=a,b", "--view", "q=c",
                        "--drop", "kind", "--epochs", "1", *small, "--out", "OUT"],
        "predict": ["predict", "table", "--data", "t.csv", "--out", "OUT.csv", "--num-samples", "3"],
        "predict new": ["predict", "table", "--data", "new.parquet", "--out", "OUT.npz",
                        "--num-samples", "3", "--level", "0.5", "--seed", "3"],
        "predict arrays": ["predict", "arrays", "--data", "d.npz", "--out", "OUT.csv"],
        "sample": ["sample", "table", "--out", "OUT.parquet", "--rows", "3", "--given", "y=1"],
        "sample arrays": ["sample", "arrays", "--out", "OUT.npz", "--rows", "2"],
        "sweep": ["sweep", "vade", "--data", "t.csv", "--drop", "kind", "--values", "2-3",
                  "--seeds", "1", "--epochs", "1", *small, "--out", "OUT"],
        "report": ["report", "table", "--out", "OUT.html"],
        "results": ["results"],
    }  # fmt: skip
    cheap = ["list", "show", "predict", "predict new", "predict arrays", "sample", "sample arrays"]
    return lines[pick(rng, [*lines, *cheap, *cheap])]


def command(rng):
    """The command, with a word changed, lost, doubled or put elsewhere."""
    line, spoilt = _lines(rng), None
    how = pick(rng, ["sound", "change", "change", "change", "change", "lose", "double", "known"])
    at = int(rng.integers(1, len(line))) if len(line) > 1 else 0
    with tempfile.TemporaryDirectory() as place:
        for name in ("t.csv", "new.parquet", "d.npz", "f.npz", "evil.py"):
            shutil.copy(home() / name, place)
        for name in ("table", "arrays"):
            shutil.copytree(home() / name, Path(place) / name)
        word = line[at]
        if how == "change":
            line[at] = word = pick(rng, WORDS)
            if "=" in line[at] and chance(rng, 0.5):
                line[at] = line[at].partition("=")[0] + "=" + pick(rng, WORDS)
        elif how == "lose":
            del line[at]
        elif how == "double":
            line.insert(at, word)
        elif how == "known":
            line, word = _known_line(rng)
            spoilt = " ".join(line)
        line = [w.replace("OUT", "out") for w in line]
        before = Path.cwd()
        os.chdir(place)
        quiet = mock.patch.object(folders, "write_report", lambda run, path=None: path)
        try:
            drawn = how == "known" or chance(rng, 0.02)
            with contextlib.nullcontext() if drawn else quiet, torch.random.fork_rng(devices=[]):
                done = CliRunner().invoke(app, line)
        finally:
            os.chdir(before)
        if isinstance(done.exception, SystemExit):
            must(how != "sound", f"a sound line was refused: {line}: {done.output[-300:]}")
            must(done.exit_code == 2, f"{line}: {done.output[-300:]}")
            raise Refused(done.output[-80:])
        names = [w for w in (word, word.partition("=")[0], word.partition("=")[2]) if len(w) > 2]
        names = names or [""]  # too short to be looked for

        def again():
            if done.exception is not None:
                raise done.exception

        try:
            attempt(again, *names, spoilt=False if how == "sound" else spoilt)
        except Bad as error:
            if done.exception is not None and on_purpose(done.exception) and how != "sound":
                raise Refused(str(done.exception)) from error
            raise Bad(f"{line}: {error}") from error


def _known_line(rng):
    """A line that has to be refused, and the word that the error is to contain."""
    lines = [
        ("train nix", "nix"), ("train vade --data nix", "nix"), ("train vade --data nix.csv", "nix.csv"),
        ("train vade --data t.csv --label nix", "nix"), ("train vade --data t.csv --set nix=1", "nix"),
        ("train vade --data t.csv --label kind --set num_clusters=99", "num_clusters"),
        ("train vade --data t.csv --label kind --set num_clusters=0", "num_clusters"),
        ("train vade --data t.csv --label kind --set num_clusters=2.5", "num_clusters"),
        ("train vade --data t.csv --label kind --set latent_dim=-1", "latent_dim"),
        ("train vade --data t.csv --label kind --set latent_dim=x", "latent_dim"),
        ("train vade --data t.csv --label kind --set hidden=4", "hidden"),
        ("train vade --data t.csv --label kind --set hidden=[0]", "hidden"),
        ("train vade --data t.csv --label kind --set init_scale=nan", "init_scale"),
        ("train vade --data t.csv --label kind --set latent_dim=2 --set latent_dim=3", "latent_dim"),
        ("train vade --data t.csv --label kind --labels some", "some"),
        ("train vade --data t.csv --label kind --labels 999", "999"),
        ("train vade --data t.csv --label kind --column a=nix", "nix"),
        ("train vade --data t.csv --label kind --column a=real --column a=student_t", "--column"),
        ("train vade --data t.csv --label kind --column a=count", "count"),
        ("train vade --data t.csv --label kind --column nix=real", "nix"),
        ("train vade --data t.csv --label kind --drop nix", "nix"),
        ("train vade --data t.csv --label kind --missing 0.5", "missing"),
        ("train vade --data digits --missing 0.5", "missing"),
        ("train vade --data digits --label kind", "label"),
        ("train mvae --data digits --labels 10", "labels"),
        ("train mvae --data digits --hidden 0.5", "hidden"),
        ("train vade --data t.csv --index nix", "nix"),
        ("train vade --data t.csv --view p=a --view p=b", "--view"),
        ("train vade --data t.csv --label kind --out evil.py", "evil.py"),
        ("train evil.py.txt:X", "evil.py.txt"), ("train nix.py:X --data t.csv", "nix.py"),
        ("predict nix --data t.csv --out o.csv", "nix"),
        ("predict table --data nix.csv --out o.csv", "nix.csv"),
        ("predict table --data d.npz --out o.csv", "d.npz"),
        ("predict arrays --data t.csv --out o.csv", "t.csv"),
        ("predict table --data t.csv --out o.txt", "o.txt"),
        ("predict table --data t.csv --out t.csv", "t.csv"),
        ("predict table --data t.csv --out nix/o.csv", "nix"),
        ("predict table --data t.csv --out o.csv --level 1.5", "1.5"),
        ("sample table --out o.csv --given y=9", "y"), ("sample table --out o.csv --given y=x", "y"),
        ("sample table --out o.csv --given y=0.5", "y"), ("sample table --out o.csv --given q=1", "q"),
        ("sample table --out o.csv --given z=1", "z"), ("sample table --out o.csv --given y=true", "y"),
        ("sample table --out o.csv --given y=1 --given y=0", "--given"),
        ("sweep vade --data t.csv --option nix", "nix"),
        ("sweep vade --data t.csv --drop kind --values 2-x", "2-x"),
        ("sweep vade --data t.csv --drop kind --values true", "num_clusters"),
        ("sweep vade --data t.csv --drop kind --values 99", "num_clusters"),
        ("report nix", "nix"), ("report table --out nix/o.html", "nix"),
        ("show nix", "nix"), ("list --task nix", "nix"), ("reproduce nix", "nix"),
        ("results --readme nix.md", "nix.md"), ("results --readme t.csv", "t.csv"),
    ]  # fmt: skip
    line, word = pick(rng, lines)
    return line.split(), word
