"""Fuzzing the bound and the options of objectives and questions."""

import contextlib
import math

import numpy as np
import torch
from cases import CASES, elbo

from fuzzing.core import (
    NO_COUNT,
    attempt,
    chance,
    closed,
    must,
    pick,
)
from pyrozoo.inference import Batch, EnumELBO, posterior, predict, responsibilities


@contextlib.contextmanager
def doubles():
    """Double precision, in which the laws hold to the last digits."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def some_data(rng, case, rows):
    """Data of a case in which any of the sites may be absent, or known in some rows or entries."""
    data = case.data(int(rng.integers(1000)), rows)
    for name, width in case.widths.items():
        how = pick(
            rng, ["all", "rows", "absent", "entries"] if width else ["all", "rows", "absent"]
        )
        if how == "absent":
            data[name] = pick(rng, [None, (data[name], torch.zeros(rows, dtype=torch.bool))])
        elif how != "all":
            shape = (rows, width) if how == "entries" else (rows,)
            data[name] = (data[name], torch.from_numpy(rng.random(shape) < 0.6))
    return data


def refilled(rng, data, labels):
    """The same data with other values under the masks."""
    other = dict(data)
    for name, given in data.items():
        if isinstance(given, tuple):
            value, known = given
            known = known.reshape(known.shape + (1,) * (value.dim() - known.dim()))
            filler = pick(rng, [math.nan, math.inf, -7.0, 1e30]) if name not in labels else -99
            other[name] = (torch.where(known, value, filler).to(value.dtype), given[1])
    return other


def rows_of(data, index):
    def part(given):
        return tuple(v[index] for v in given) if isinstance(given, tuple) else given[index]

    return {name: None if given is None else part(given) for name, given in data.items()}


def _objective(rng, case):
    options = [{}, {"kl": "sampled"}, {"split": False}, {"free_bits": {"z": 0.1}}]
    without_z = case.name in ("mixture", "globals", "hierarchy")
    return elbo(inputs=("noise",), **pick(rng, options[:3] if without_z else options))


def a_case(rng, name=None):
    """A case of tests/cases.py with its program and guide."""
    case = CASES[name or pick(rng, CASES)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return case, *case.pair()


def bound(rng):
    """The bound of small programs: the laws, and what does not fit its sites."""
    with doubles(), torch.random.fork_rng(devices=[]):
        case, p, q = a_case(rng)
        objective = _objective(rng, case)
        rows = int(rng.integers(1, 7))
        if chance(rng, 0.45):
            fresh = EnumELBO(inputs=("noise",))  # a pair checks the first data of a pattern
            refused_data(rng, case, rows, lambda data: fresh.per_row(p, q, data))
            return
        data = some_data(rng, case, rows)
        values = attempt(lambda: objective.per_row(p, q, data), spoilt=False).detach()
        must(values.shape == (rows,) and bool(values.isfinite().all()), "a finite value per row")
        if not objective.free_bits:  # which count in every row
            empty = [_unknown(data, case, row) for row in range(rows)]
            must(bool((values[torch.tensor(empty)] == 0).all()), "a row without data counts")
        law = pick(rng, ["filler", "permutation", "part", "sum"])
        if law == "filler":
            again = objective.per_row(p, q, refilled(rng, data, case.labels)).detach()
            must(torch.equal(values, again), "values under a mask matter")
        elif law == "permutation":
            order = torch.from_numpy(rng.permutation(rows))
            again = objective.per_row(p, q, rows_of(data, order)).detach()
            must(torch.allclose(again, values[order], 1e-9, 1e-9), "the order of rows matters")
        elif law == "part":
            index = torch.from_numpy(rng.permutation(rows)[: int(rng.integers(1, rows + 1))])
            again = objective.per_row(p, q, Batch.of(data, rows)[index]).detach()
            must(torch.allclose(again, values[index], 1e-9, 1e-9), "other rows matter")
        elif objective.kl == "sampled" or objective.split is False:  # else in expectation
            loss = attempt(lambda: objective.loss(p, q, data), spoilt=False)
            terms = objective.terms(p, q, data)
            total = sum(float(t.detach().sum()) for t in terms.values()) / rows
            must(math.isclose(-total, loss, rel_tol=1e-9, abs_tol=1e-9), "sum of terms")


def _unknown(data, case, row):
    """Whether nothing of a row is known."""
    for name in case.widths:
        given = data[name]
        if isinstance(given, tuple) and bool(given[1][row].any()):
            return False
        if isinstance(given, torch.Tensor):
            return False
    return True


def refused_data(rng, case, rows, call, without=()):
    """Data that do not fit a program."""
    data = case.data(0, rows)
    wide = [n for n, width in case.widths.items() if width]
    x = pick(rng, wide)
    value = data[x]
    wrong = {
        "too wide": {x: torch.cat([value, value], 1)},
        "too narrow": {x: value[:, :1]},
        "a vector": {x: value[:, 0]},
        "a cube": {x: value.unsqueeze(1)},
        "NaN": {
            x: torch.where(value > 0.5, math.nan, value).index_fill(0, torch.tensor(0), math.nan)
        },
        "infinite": {x: value + math.inf},
        "a misspelt site": {x + "s": value},
        "an unknown key": {"covariates": value},
        "a latent site of another shape": {"z" if case.name != "hierarchy" else "z_1": value[:, 0]},
        "other rows": {x: value[:0]},
        "a mask of columns": {x: (value, torch.ones(rows, 1, dtype=torch.bool))},
        "text": {x: value.numpy().astype(str)},
        "beyond the numbers of the program": {x: np.full(value.shape, 1e400, "g") * 1e400},
    }
    if case.name in ("mixture", "globals", "factor analysis"):
        wrong["integers that floats cannot tell apart"] = {x: torch.full(value.shape, 2**53 + 1)}
    says = {"a misspelt site": x + "s", "an unknown key": "covariates"}
    if case.unit:
        wrong["pixels that are not divided"] = {x: (value * 255).round()}
        wrong["whole pixels"] = {x: (value * 255).round().long()}
        wrong["below 0"] = {x: value - 1}
    if case.name in ("mixture", "globals", "hierarchy", "factor analysis"):
        del wrong["a latent site of another shape"]
    if case.globals:
        wrong["a global site"] = {"means": torch.zeros(rows, 3, 4)}
        says["a global site"] = "means"
    for name, k in case.labels.items():
        y = data[name]
        wrong |= {
            "a label too large": {name: y.index_fill(0, torch.tensor(0), k)},
            "a label of -1": {name: y.index_fill(0, torch.tensor(0), -1)},
            "a label too large among others": {
                name: (y.index_fill(0, torch.tensor(0), k + 3), y > -9)
            },
            "labels as a column": {name: y[:, None]},
            "labels as floats": {name: y.double()},
            "labels as booleans": {name: y > 0},
            "labels as one-hot": {name: torch.eye(k)[y]},
        }
        for why in wrong:
            if why.startswith(("a label", "labels")):
                says[why] = name
    why = pick(rng, [why for why in closed("data", wrong) if why not in without])
    name = says.get(why, next(iter(wrong[why])))
    says = [repr(name), f" {name}: ", *(["no rows"] if why == "other rows" else [])]
    attempt(lambda: call({**data, **wrong[why]}), *says, spoilt=why)


def options(rng):
    """Options of the objective and of questions to a fitted pair."""
    with doubles():
        case, program, guide = a_case(rng, "mixture")
        pair = EnumELBO(inputs=("noise",)).pair(program, guide)
        data = case.data(0, 3)
        kinds = {
            "num_particles": [0, -1, 2.5, math.nan, "2", None, True],
            "kl": ["exact", None, 1, True],
            "split": ["yes", None, 2, "no"],
            "num_rows": [0, -5, math.nan, "9", 2.5],
            "weights": [{"q": 1.0}, {"yy": 0.0}, {"x": "1"}, {"x": None}, [1.0], "x"],
            "free_bits": [{"q": 1.0}, {"y": "1"}, ["y"]],
            "observed_guide_weights": [{"q": 1.0}, {"y": "a"}, 3],
        }
        if chance(rng, 0.5):
            each = {f"{n}={v!r}": (n, v) for n, values in kinds.items() for v in values}
            if not (wrong := closed("objective", each)):
                return
            why = pick(rng, wrong)
            name, value = wrong[why]
            says = [name, *value] if isinstance(value, dict) else [name]
            attempt(lambda: EnumELBO(**{name: value}).loss(*pair, data), *says, spoilt=why)
            return
        asked = {
            "num_samples": NO_COUNT, "batch_size": NO_COUNT,
            "seed": [1.5, "a", math.nan, 2**70, True], "site": ["yy", "z", 3, None, ""],
            "observed": ["maybe", None, 1], "level": [0.5],
        }  # fmt: skip
        name = pick(rng, asked)
        value = pick(rng, asked[name])
        function = pick(rng, [posterior, predict, responsibilities])
        given = {"site": "y"} if function is not posterior else {}
        given = {**given, name: value}
        if value is None and name == "seed":
            return
        attempt(
            lambda: function(*pair, data, **given), name, repr(value), spoilt=f"{name}={value!r}"
        )
