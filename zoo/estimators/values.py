"""Values that are checked, scaled, or written as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.preprocessing import StandardScaler
from sklearn.utils import check_random_state
from torch import Tensor

Array = NDArray[Any]


def check_count(name: str, value: Any) -> None:
    """Raise a ValueError unless the value is a positive integer."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ValueError(f"{name} is an integer of at least 1, got {value!r}")


def draw_seed(random_state: Any) -> int:
    """A seed drawn from scikit-learn's idea of a random state."""
    return int(check_random_state(random_state).randint(2**31 - 1))


def moments(X: Array, likelihood: str) -> tuple[Array, Array]:
    """Mean and scale of the columns, ``(features,)``; 0 and 1 where they are used as they are."""
    if likelihood == "bernoulli":
        return np.zeros(X.shape[1]), np.ones(X.shape[1])
    if not isinstance(likelihood, str) or not likelihood.startswith("normal"):
        raise ValueError(
            f"likelihood is 'normal', 'normal(SCALE)' or 'bernoulli', got {likelihood!r}"
        )
    empty = np.isnan(X).all(0)
    scaler = StandardScaler().fit(np.where(empty, 0.0, X))
    return scaler.mean_, scaler.scale_


def single(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters in single precision, in which they were trained: nothing is lost."""
    return {name: v.float() if v.is_floating_point() else v for name, v in tensors.items()}


def plain(name: str, value: Any) -> Any:
    """What JSON can write."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: plain(f"{name}[{key!r}]", v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(name, v) for v in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(
        f"{name}={value!r} cannot be written as JSON; put something plain there with"
        f" set_params before saving, or pickle the estimator"
    )


def tuples(value: Any) -> Any:
    """Lists, which is what JSON makes of tuples, as tuples."""
    if isinstance(value, dict):
        return {key: tuples(v) for key, v in value.items()}
    return tuple(tuples(v) for v in value) if isinstance(value, list) else value
