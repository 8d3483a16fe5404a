"""Schedules: functions of the epoch (a float that grows during an epoch) for rates and weights."""

from __future__ import annotations

import math
from collections.abc import Callable

Schedule = Callable[[float], float]


def linear(start: float, end: float, epochs: float, wait: float = 0.0) -> Schedule:
    """From ``start`` to ``end`` in a straight line over ``epochs``, after ``wait`` epochs; then
    flat.

    ``linear(0, 1, 10)`` on the weight of a latent site is KL warm-up.
    """
    if epochs <= 0:
        raise ValueError(f"epochs is positive, got {epochs}")
    return lambda epoch: start + (end - start) * min(1.0, max(0.0, (epoch - wait) / epochs))


def steps(factor: float, every: float, floor: float = 0.0) -> Schedule:
    """``factor ** (epoch // every)``, not below ``floor``."""
    if every <= 0:
        raise ValueError(f"every is positive, got {every}")
    return lambda epoch: max(floor, factor ** (epoch // every))


def cosine(epochs: float, floor: float = 0.0) -> Schedule:
    """From one to ``floor`` along half a cosine over ``epochs``."""
    if epochs <= 0:
        raise ValueError(f"epochs is positive, got {epochs}")
    return lambda epoch: (
        floor + (1 - floor) * (1 + math.cos(math.pi * min(1.0, epoch / epochs))) / 2
    )


def read_schedule(given: Schedule | str | None, epochs: float) -> Schedule | None:
    """The schedule that was given, or the one of this name over a fit of so many epochs.

    ``"cosine"`` falls to 0.02 along half a cosine.

    Raises:
        ValueError: there is no schedule of this name, or it is no function.
    """
    if given == "cosine":
        return cosine(epochs, 0.02)
    if isinstance(given, str) or not (given is None or callable(given)):
        raise ValueError(f"lr_schedule is a function of the epoch or 'cosine', got {given!r}")
    return given
