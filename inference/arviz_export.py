"""A fitted pair as an ArviZ object: ``InferenceData`` (ArviZ 0.x) or ``DataTree`` (1.x).

With g the latent sites that all rows share, l_n those of row n (drawn by the guide, or summed), and
x_n all that is observed in the row, at draws (g, l) of the guide:

===================== ==========================================================================
group                 variables, with dimensions
===================== ==========================================================================
posterior             latent and deterministic sites: ``(chain, draw, data, *)``, those that all
                      rows share ``(chain, draw, *)``
posterior_predictive  leaves, observed or not, generated anew at these draws
log_likelihood        log p(x_n | g), the latent sites of the row integrated out: ``(chain, draw,
                      data)``; only with g, and for rows in which anything is observed
sample_stats          ``log_p`` = log p(g) + sum_n log p(x_n | g), ``log_q`` = log q(g): ``(chain,
                      draw)``; without g those of each row, log p(x_n, l_n) and log q(l_n | x_n)
observed_data         what is known, NaN elsewhere
constant_data         inputs; without g also ``log_evidence``, log p(x_n) of each row
===================== ==========================================================================

Leaving a row out (``loo``, ``compare``) means something only where rows tell of each other, by way
of g; so there is no ``log_likelihood`` without.  It has one variable, called as the observed site,
or ``x+y`` if there are several.  ``loo_approximate_posterior`` of ArviZ 1.x takes ``log_p`` and
``log_q`` as they are, and so corrects for a guide that is not the posterior, as ``loo`` does not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyrozoo.inference.batch import Data
from pyrozoo.inference.comparison.densities import Drawn, draw_with_densities, plates_of
from pyrozoo.inference.evidence import log_evidence
from pyrozoo.inference.graph import DATA
from pyrozoo.inference.observing import Net
from pyrozoo.inference.reading import pad, read_count
from pyrozoo.inference.training.checkpoint import name_of, versions

Labelled = tuple[list[str], Tensor]


def to_arviz(
    program: Net,
    guide: Net,
    data: Data,
    num_draws: int = 500,
    *,
    num_particles: int = 100,
    inputs: Iterable[str] = (),
    batch_size: int = 256,
    seed: int = 0,
    coords: Mapping[str, Sequence[Any]] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
) -> Any:
    """An ArviZ object of a fitted pair: its groups are in the table of the module.

    Dimensions are called as the plates are, ``data`` for the rows, and ``<site>_dim_<i>`` for those
    of an event.  Sites that all rows share are drawn once a draw; finite sites that are summed are
    drawn from their exact conditionals; sites that are known in part keep what is known.

    Args:
        program, guide: the fitted pair.
        data: what is known.
        num_draws: of the guide.
        num_particles: draws of the guide per row (and draw) by which the latent sites of a row are
            integrated, for ``log_likelihood`` and ``log_evidence``; at least 2.
        inputs: names of values that are read but are no sites.
        batch_size: rows at a time.
        seed: of the draws; the global random state is left as it was.
        coords: dimension -> labels, e.g. ``{"data": names}``.
        dims: site -> names of the dimensions of its event.

    Raises:
        ImportError: ArviZ is not installed.
        ValueError: the pair is outside the class of the row-wise bound, there are no rows, or a
            value or an option does not fit.
    """
    arviz, xarray = _libraries()
    num_draws = read_count("num_draws", num_draws)
    num_particles = read_count("num_particles", num_particles, 2)
    options: dict[str, Any] = {"inputs": tuple(inputs), "seed": seed}
    found = draw_with_densities(
        program, guide, data, num_draws, num_particles, batch_size=batch_size, **options
    )
    groups = _groups(found, {name: list(names) for name, names in (dims or {}).items()})
    if not found.shared and not found.refusal:
        evidence = log_evidence(program, guide, data, num_particles, **options).cpu()
        groups["constant_data"]["log_evidence"] = ([DATA], evidence)
    labels = _labels(groups, coords or {})
    made = {
        group: xarray.Dataset(
            {n: (d, value.numpy()) for n, (d, value) in variables.items()},
            coords={d: labels[d] for n in variables for d in variables[n][0]},
        )
        for group, variables in groups.items()
        if variables
    }
    if "log_likelihood" in made:
        made["log_likelihood"] = made["log_likelihood"].isel({DATA: found.known.numpy()})
    attrs = {
        "inference_library": "pyrozoo",
        "inference_library_version": versions().get("pyrozoo", "unknown"),
        "program": name_of(program),
        "guide": name_of(guide),
        "log_likelihood": _meaning(found, num_particles),
    }
    if "InferenceData" in vars(arviz):  # ArviZ 1.x warns where it is asked for
        return arviz.InferenceData(attrs=attrs, **made)
    tree = xarray.DataTree.from_dict(made)
    tree.attrs.update(attrs)
    return tree


def _libraries() -> tuple[Any, Any]:
    try:
        import arviz
        import xarray
    except ImportError as error:
        raise ImportError('to_arviz needs ArviZ: pip install "pyrozoo[arviz]"') from error
    return arviz, xarray


def _rows_observed(found: Drawn) -> list[str]:
    """The observed sites of plate ``"data"``."""
    seen = ("given", "masked", "merged", "own")
    sites = found.plan.program.sites
    return [n for n, role in found.plan.roles.items() if role in seen and sites[n].local]


def _meaning(found: Drawn, num_particles: int) -> str:
    """What the log-likelihood is, or why there is none."""
    if not (observed := _rows_observed(found)):
        return "none: nothing is observed in plate 'data'"
    if found.refusal:
        return f"none: {found.refusal}"
    if not found.shared:
        return (
            "none: no latent site is shared by all rows, so that leaving one out says nothing of"
            " it; constant_data has log_evidence, log p(observed) of every row"
        )
    text = f"log p({', '.join(observed)} of a row | {', '.join(found.shared)})"
    if summed := found.plan.summed:
        text += f"; summed: {', '.join(summed)}"
    if found.integrated:
        names = ", ".join(found.integrated)
        text += f"; integrated by {num_particles} draws of the guide: {names}"
    return text


def _groups(found: Drawn, dims: dict[str, list[str]]) -> dict[str, dict[str, Labelled]]:
    """The variables of each group with the names of their dimensions."""
    plan, sample = found.plan, ["chain", "draw"]
    graph, roles = plan.program, plan.roles
    for name, names in dims.items():
        known = name in roles or name in plan.computed
        event = graph.sites[name].event_shape if known else None
        if event is None or len(names) != len(event):
            what = "no site" if event is None else f"an event of shape {tuple(event)}"
            raise ValueError(f"dims names the dimensions of {what}: {name!r} has {names}")

    def label(name: str, lead: list[str], value: Tensor) -> Labelled:
        site = graph.sites[name]
        event = [f"{name}_dim_{i}" for i in range(len(site.event_shape))]
        plates = [f"{p}_plate" if p in graph.sites else p for p in plates_of(site)]
        return lead + plates + dims.get(name, event), value

    leaves = {n for n in roles if not graph.descendants(n)}
    seen = {n for n, role in roles.items() if role in ("given", "masked", "own")}
    groups: dict[str, dict[str, Labelled]] = {}
    for name, value in found.sites.items():
        if name in leaves and (name in seen or roles[name] == "pruned"):
            group = "posterior_predictive"
        elif name not in seen:
            group = "posterior"
        else:
            continue  # known, and what follows is drawn given it
        groups.setdefault(group, {})[name] = label(name, sample, value.unsqueeze(0))
    for what, density in (("log_p", found.log_p), ("log_q", found.log_q)):
        if density is not None:
            names = sample + [DATA] * (density.dim() - 1)
            groups.setdefault("sample_stats", {})[what] = (names, density.unsqueeze(0))
    observed = _rows_observed(found)
    if found.log_likelihood is not None and observed:
        value = found.log_likelihood.unsqueeze(0)
        groups["log_likelihood"] = {"+".join(observed): ([*sample, DATA], value)}
    groups["observed_data"], groups["constant_data"] = {}, {}
    for name, (value, present) in found.values.items():
        if not bool(present.all()):
            holes = value.new_tensor(torch.nan, dtype=torch.float64)
            value = torch.where(pad(present, value.dim()), value, holes)
        if name in roles:
            groups["observed_data"][name] = label(name, [], value)
        else:
            names = [DATA, *(f"{name}_dim_{i}" for i in range(value.dim() - 1))]
            groups["constant_data"][name] = (names, value)
    return groups


def _labels(
    groups: Mapping[str, Mapping[str, Labelled]], coords: Mapping[str, Sequence[Any]]
) -> dict[str, Any]:
    """Labels of every dimension: those that were given, else numbers."""
    sizes: dict[str, int] = {}
    for variables in groups.values():
        for name, (dims, value) in variables.items():
            for dim, size in zip(dims, value.shape, strict=True):
                if sizes.setdefault(dim, size) != size:
                    raise ValueError(
                        f"dimension {dim!r} has {sizes[dim]} entries, but {size} at {name!r}"
                    )
    for dim, labels in coords.items():
        if sizes.get(dim) != len(labels):
            known = ", ".join(f"{d}: {n}" for d, n in sizes.items())
            raise ValueError(f"coords has {len(labels)} labels of {dim!r} (dimensions: {known})")
    return {dim: np.asarray(coords.get(dim, range(size))) for dim, size in sizes.items()}
