"""Fuzzing fits."""

import math
import os
import tempfile
from pathlib import Path

import torch
from cases import CASES, Empty, FactorAnalysis, Mixture

from fuzzing.bounds import refused_data
from fuzzing.core import attempt, chance, closed, copied, must, pick, same
from pyrozoo.guides import Amortized
from pyrozoo.inference import EnumELBO, Result, fit, schedules


def fits(rng):
    """A fit of one epoch: finite, repeatable, alone with its random state; options and data."""

    def made():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            if name == "mixture":
                return Mixture(), Empty()
            program = FactorAnalysis()
            return program, Amortized(program, ["x"], (4,))

    name = pick(rng, ["mixture", "mixture", "factor analysis"])
    case, rows = CASES[name], int(rng.integers(1, 13))
    data = {n: v.float() if v.is_floating_point() else v for n, v in case.data(1, rows).items()}
    del data["noise"]
    with tempfile.TemporaryDirectory() as home:
        if name == "mixture" and chance(rng, 0.5):
            data = {**data, "y": (data["y"], torch.from_numpy(rng.random(rows) < 0.5))}
        sound = {
            "batch_size": pick(rng, [1, 3, 100]), "epochs": 1, "lr": pick(rng, [1e-3, 0.1]),
            "clip": pick(rng, [None, 1.0]), "patience": pick(rng, [None, 1]), "seed": 5,
            "lr_schedule": pick(rng, [None, schedules.cosine(2)]), "device": "cpu", "progress": False,
            "weights": pick(rng, [None, {"x": schedules.linear(0, 1, 2)}]),
            "folder": pick(rng, [None, None, Path(home) / "run"]), "save_every": pick(rng, [1, 3]),
            "validation": pick(rng, [None, 0.3]) if rows > 2 else None,
        }  # fmt: skip
        no_number = ["a", None, [1]]
        wrong = {
            "epochs": [0, -1, 1.5, math.nan, math.inf, True, *no_number],
            "batch_size": [0, -3, 2.5, math.nan, math.inf, True, *no_number],
            "lr": [0.0, -1e-3, math.nan, math.inf, *no_number],
            "clip": [-1.0, 0.0, math.nan, "a"],
            "patience": [0, -1, math.nan, 1.5, "a"],
            "validation": [0.0, 1.0, 1.5, -0.1, math.nan, 1, True, "x", [0.1], {"xx": data["x"]},
                           {"x": data["x"][:, :2]}, {}, {"x": data["x"] * math.nan}],
            "seed": [1.5, "a", None, 2**70, math.nan],
            "inputs": ["noise", 3],
            "repeat": [{"y": 0}, {"xx": 2}, {"x": 1.5}, {"x": "a"}, {"x": -1}, ["x"], {"x": math.nan}],
            "weights": [{"xx": schedules.linear(0, 1, 2)}, {"x": 1.0}, {"x": None}, ["x"]],
            "lr_schedule": [0.5, "cosine"],
            "save_every": [0, -1, 1.5, "a"],
            "device": ["gpu", "tpu:9", 3, None, ""],
            "resume": [True, "yes"],
            "callbacks": [[1], 3, ["a"], lambda result: None],
            "optimizer": ["adam", 3, lambda parameters: None],
            "objective": ["elbo", EnumELBO, 3],
            "folder": ["\0", 3, str(Path(home) / "file" / "run")],
            "start": [3, "yes"],
        }  # fmt: skip
        (Path(home) / "file").write_text("")
        if chance(rng, 0.4):
            each = {f"{n}={_short(v)}": (n, v) for n, values in wrong.items() for v in values}
            each = closed("fit", each)
            why = pick(rng, each)
            option, value = each[why]
            given = {**sound, option: value}
            if option in ("resume", "start"):
                given["folder"] = None
            says = [option, repr(value), *(value if isinstance(value, dict) else [str(value)])]
            attempt(lambda: fit(*made(), data, **given), *says, spoilt=why)
        if chance(rng, 0.3):
            refused_data(
                rng, case, max(rows, 2), lambda d: fit(*made(), _singles(d), **sound),
                without=("an unknown key",),
            )  # fmt: skip
        program, guide = made()
        before = {n: copied(v) for n, v in data.items()}
        result = attempt(lambda: fit(program, guide, data, **sound), spoilt=False)
        must(isinstance(result, Result) and result.epoch == 1, "one epoch")
        must(all(map(math.isfinite, result.history[0].values())), "history")
        must(all(bool(v.isfinite().all()) for v in result.parameters.values()), "parameters")
        must(all(same(before[n], v) for n, v in data.items()), "the data were changed")
        sound["folder"] = Path(home) / "again" if sound["folder"] else None
        again = fit(*made(), data, **sound)
        must(
            all(torch.equal(v, again.parameters[n]) for n, v in result.parameters.items()),
            "the same seed gives something else",
        )


def _short(value):
    """A value as a word, the same in every run."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {_short(v)}" for k, v in value.items()) + "}"
    if isinstance(value, torch.Tensor):
        return "NaN" if bool(value.isnan().any()) else f"(.., {value.shape[-1]})"
    if isinstance(value, list):
        return str(list(map(_short, value)))
    if callable(value):
        return getattr(value, "__name__", "function").strip("<>")
    return "a path" if isinstance(value, str) and os.sep in value else repr(value)


def _singles(data):
    return {n: v.float() if isinstance(v, torch.Tensor) and v.dtype == torch.float64 else v
            for n, v in data.items() if n != "noise"}  # fmt: skip
