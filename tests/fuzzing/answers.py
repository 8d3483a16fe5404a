"""Fuzzing draws, predictions and responsibilities."""

import functools

import torch
from cases import elbo

from fuzzing.bounds import a_case, doubles, refilled, refused_data, some_data
from fuzzing.core import attempt, chance, must, pick
from pyrozoo.inference import posterior, predict, responsibilities


def posteriors(rng):
    """Draws, predictions and responsibilities."""
    with doubles():
        case, program, guide = a_case(rng)
        pair = elbo(inputs=("noise",), kl="sampled", split=False).pair(program, guide)
        rows = int(rng.integers(0, 7))
        if chance(rng, 0.3):
            asked = pick(
                rng,
                [posterior, functools.partial(predict, site="x_a" if case.name == "mvae" else "x")],
            )
            ask = {"seed": 1, "inputs": ("noise",), "batch_size": pick(rng, [1, 99])}
            if chance(rng, 0.1):
                attempt(lambda: asked(program, guide, case.data(0, 0), **ask), spoilt="no rows")
            refused_data(rng, case, max(rows, 1), lambda data: asked(program, guide, data, **ask))
            return
        rows = max(rows, 1)
        data = some_data(rng, case, rows)
        site = pick(rng, [*case.widths, "z", "z_1", "q", "means"])
        width = case.widths.get(site)
        sound = site in case.widths or (
            site == "z" and case.name not in ("mixture", "globals", "hierarchy")
        )
        sound = sound or (site == "z_1" and case.name == "hierarchy")
        says = () if sound else (repr(site),)
        slices = int(rng.integers(1, 9))
        ask = {"seed": int(rng.integers(9)), "batch_size": slices, "num_samples": 2}
        how = pick(rng, ["responsibilities", "predict", "posterior", "ignore"])
        if how == "posterior":
            predictive, weighted = chance(rng, 0.5), chance(rng, 0.3)
            ask |= {"predictive": predictive, "importance": weighted}
            spoilt = "importance weights with shared sites" if weighted and case.globals else False
            found = attempt(lambda: posterior(*pair, data, **ask), spoilt=spoilt)
            again = posterior(*pair, refilled(rng, data, case.labels), **ask)
            must(found.keys() == again.keys(), "sites")
            for name, draws in found.items():
                must(torch.equal(draws, again[name]), f"draws of {name}: fillers or the seed")
                must(bool(draws.isfinite().all()) and len(draws) == 2, f"draws of {name}")
                if name != "means":
                    must(draws.shape[1] == rows, f"rows of {name}")
                if name in case.labels:
                    inside = (draws >= 0) & (draws < case.labels[name])
                    must(bool(inside.all()), f"range of {name}")
                    _check_known(case, data, name, draws, "a known label is drawn again")
            return
        if how == "responsibilities":
            spoilt = False if site in case.labels else f"{site} is no finite site"
            found = attempt(
                lambda: responsibilities(*pair, data, site, **ask), *says, spoilt=spoilt
            )
            again = responsibilities(*pair, refilled(rng, data, case.labels), site, **ask)
        else:
            ask |= {"observed": "ignore" if how == "ignore" else "keep"}
            spoilt = False if sound else f"{site} is no site of plate data"
            found = attempt(lambda: predict(*pair, data, site, **ask), *says, spoilt=spoilt)
            again = predict(*pair, refilled(rng, data, case.labels), site, **ask)
        must(torch.equal(found, again), "fillers or the seed")
        must(len(found) == rows and bool(found.isfinite().all()), "rows")
        if site in case.labels:
            must(found.shape == (rows, case.labels[site]), "shape")
            must(torch.allclose(found.sum(1), torch.ones(rows), 1e-9), "probabilities sum to one")
            if how != "ignore":
                certain = torch.eye(case.labels[site])
                _check_known(case, data, site, found.argmax(1).expand(2, -1), "a known label")
                value, known = _known(data[site], rows)
                must(
                    bool((found[known] == certain[value[known]]).all()), "a known label is certain"
                )
        elif width:
            must(found.shape == (rows, width), "shape")


def _known(given, rows):
    if given is None:
        return torch.zeros(rows, dtype=torch.long), torch.zeros(rows, dtype=torch.bool)
    return given if isinstance(given, tuple) else (given, torch.ones(rows, dtype=torch.bool))


def _check_known(case, data, name, draws, law):
    value, known = _known(data[name], draws.shape[1])
    must(bool((draws[:, known] == value[known]).all()), law)
