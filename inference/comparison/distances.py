"""How far two sets of draws are apart: a classifier, a kernel, transport.

All take draws ``(P, D)`` and ``(Q, D)``, tensors or arrays, and return a number.  :func:`to_matrix`
makes such a matrix of the draws of :func:`~pyrozoo.inference.posterior.posterior`.

Sources: David Lopez-Paz, Maxime Oquab, "Revisiting classifier two-sample tests" (2017), as used by
Jan-Matthis Lueckmann et al., "Benchmarking simulation-based inference" (2021); Arthur Gretton et
al., "A kernel two-sample test" (2012); Nicolas Bonneel et al., "Sliced and Radon Wasserstein
barycenters of measures" (2015).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial.distance import cdist, pdist
from scipy.stats import wasserstein_distance
from sklearn.ensemble import RandomForestClassifier
from sklearn.model_selection import KFold, cross_val_score
from sklearn.neural_network import MLPClassifier
from torch import Tensor
from torch.distributions import biject_to

from pyrozoo.inference.batch import Batch, Data
from pyrozoo.inference.graph import Site, read_graph
from pyrozoo.inference.observing import Net
from pyrozoo.inference.reading import read_count

Draws = Tensor | NDArray[Any]
Matrix = NDArray[np.float64]


def c2st(a: Draws, b: Draws, folds: int = 5, seed: int = 0, classifier: str = "mlp") -> float:
    """How often a classifier tells the two sets apart: 0.5 if not at all, 1 if always.

    Cross-validated accuracy, after both are centred and scaled by the first.  With n draws in each
    set and nothing to tell, the accuracy is about 0.5 with a standard deviation of at least
    ``0.5 / sqrt(2 n)``; that folds share their training data adds to it (24 pairs of 100 normal
    draws in two dimensions, ``"forest"``: 0.503 +- 0.045, where the formula says 0.035).  Use sets
    of one size: of others, guessing the larger is right more than half the time.

    Args:
        a, b: draws, ``(P, D)`` and ``(Q, D)``.
        folds: of the cross-validation.
        seed: of the folds and of the classifier.
        classifier: ``"mlp"``, two hidden layers of 10 D units as in the benchmark of Lueckmann et
            al.; or ``"forest"``, scikit-learn's random forest, the default of sbi.

    Raises:
        ValueError: the sets do not fit together, or an option is unknown.
    """
    first, second = _pair(a, b)
    folds = read_count("folds", folds, 2)
    width = 10 * first.shape[1]
    if classifier == "mlp":
        model: Any = MLPClassifier(
            hidden_layer_sizes=(width, width),
            max_iter=1000,
            early_stopping=True,
            n_iter_no_change=50,
            random_state=seed,
        )
    elif classifier == "forest":
        model = RandomForestClassifier(random_state=seed)
    else:
        raise ValueError(f"classifier is 'mlp' or 'forest', got {classifier!r}")
    scale = first.std(0, ddof=1)
    scale = np.where(scale < 1e-14, 1, scale)
    values = (np.concatenate([first, second]) - first.mean(0)) / scale
    labels = np.repeat([0.0, 1.0], [len(first), len(second)])
    splits = KFold(folds, shuffle=True, random_state=seed)
    return float(cross_val_score(model, values, labels, cv=splits, scoring="accuracy").mean())


def mmd2(a: Draws, b: Draws, bandwidth: float | str = "median") -> float:
    """Squared maximum mean discrepancy: unbiased, so that it is about 0 (or below) if all is equal.

    The kernel is ``exp(-|a - b|^2 / (2 h^2))``.

    Args:
        a, b: draws, ``(P, D)`` and ``(Q, D)``; at least two each.
        bandwidth: h, or ``"median"``: the median distance of two draws of both sets together (the
            lower one, if there are two).

    Raises:
        ValueError: the sets do not fit together, or the bandwidth is not positive.
    """
    first, second = _pair(a, b)
    within, other, between = pdist(first), pdist(second), cdist(first, second)
    if bandwidth == "median":
        every = np.concatenate([within, between.ravel(), other])
        middle = (len(every) - 1) // 2
        h = max(float(np.partition(every, middle)[middle]), 1e-8)
    else:
        h = float(bandwidth)
    if not h > 0:
        raise ValueError(f"bandwidth is positive or 'median', got {bandwidth!r}")
    kernels = (np.exp(-0.5 * (d / h) ** 2).mean() for d in (within, other, between))
    return float(next(kernels) + next(kernels) - 2 * next(kernels))


def sliced_wasserstein(a: Draws, b: Draws, num_directions: int = 100, seed: int = 0) -> float:
    """The 1-Wasserstein distance of the sets along random directions, averaged over these.

    In one dimension it is the distance itself.  In the units of the draws; of two sets that a shift
    v takes into each other, ``|v|`` times the mean of ``|u_1|`` over unit vectors u.
    """
    first, second = _pair(a, b)
    count = 1 if first.shape[1] == 1 else read_count("num_directions", num_directions)
    directions = np.random.default_rng(seed).standard_normal((first.shape[1], count))
    directions /= np.linalg.norm(directions, axis=0)
    both = zip((first @ directions).T, (second @ directions).T, strict=True)
    return float(np.mean([wasserstein_distance(x, y) for x, y in both]))


def to_matrix(
    draws: Mapping[str, Tensor], row: int | None, program: Net, data: Data
) -> NDArray[np.float64]:
    """Draws of several sites as one matrix ``(P, D)``, sites in the order of the program.

    Continuous sites are moved to the unconstrained space; a finite site of scalar values becomes
    one column per value, of zeros and ones; other discrete sites stay as they are.

    Args:
        draws: site -> ``(P, rows, *event)``, or ``(P, *event)`` for sites that all rows share.
        row: the row that is looked at; None: the sites that all rows share alone.
        program: what they are draws of.
        data: a batch on which it runs.

    Raises:
        ValueError: no site is left, or a name is no site of the program.
    """
    sites = read_graph(program, Batch.of(data)).sites
    if unknown := set(draws) - sites.keys():
        raise ValueError(f"{min(unknown)!r} is not a site (sites: {', '.join(sites)})")
    columns = []
    for name, site in sites.items():
        if name not in draws or (site.local and row is None):
            continue
        value = draws[name][:, row] if site.local else draws[name]
        columns.append(_columns(site, value.detach(), row).reshape(len(value), -1))
    if not columns:
        raise ValueError("no draws are left: say which row, or which sites all rows share")
    return torch.cat([c.double() for c in columns], 1).cpu().numpy()


def _columns(site: Site, value: Tensor, row: int | None) -> Tensor:
    if site.summable and not site.event_shape:
        support = site.fn.enumerate_support(expand=False).flatten()
        return value.unsqueeze(-1) == support
    if not site.continuous:
        return value
    return biject_to(site.fn.support).inv(value)


def _pair(a: Draws, b: Draws) -> tuple[Matrix, Matrix]:
    first, second = (
        np.asarray(x.detach().cpu() if isinstance(x, Tensor) else x, np.float64) for x in (a, b)
    )
    for x in (first, second):
        if x.ndim != 2 or len(x) < 2 or not np.isfinite(x).all():
            raise ValueError(
                f"draws are finite numbers of shape (at least 2, dimensions), got {x.shape}"
            )
    if first.shape[1] != second.shape[1]:
        raise ValueError(f"draws have {first.shape[1]} and {second.shape[1]} dimensions")
    return first, second
