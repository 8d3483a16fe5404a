"""What looks wrong in a history, said in words, with what to try.

=============================== ====================================================================
it is said                      when
=============================== ====================================================================
responsibilities are uniform    mean entropy above 0.9 ln K
clusters collapsed              rows name fewer than K / 2 of them (and are not uniform)
the posterior collapsed         no dimension, or fewer than a tenth, is active
a site costs nothing            its divergence is below 0.01 nats per datum (and none of the above)
gradients exploded              a step's norm is 100 times the median of the epochs before it
the held-out bound falls        by over 2 % of its rise, and 0.1 % of itself, since its best epoch,
                                while the training bound has risen
=============================== ====================================================================

Active units, entropies and norms are those of :mod:`pyrozoo.inference.training.tracking`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

Record = Mapping[str, float]

UNIFORM, USED, ACTIVE, FREE, EXPLODED, FALLEN = 0.9, 0.5, 0.1, 0.01, 100.0, 0.02


@dataclass(frozen=True)
class Finding:
    """Something that looks wrong."""

    title: str
    seen: str  # the figures that it comes from
    advice: str


def diagnose(
    history: Sequence[Record],
    clusters: Mapping[str, int] | None = None,
    dims: Mapping[str, int] | None = None,
    *,
    rows: int = 1000,
    kept: int | None = None,
) -> list[Finding]:
    """Look for what often goes wrong.

    Args:
        history: one record an epoch, as in :class:`pyrozoo.inference.Result`.  What it lacks is not
            looked at.
        clusters: finite latent site -> number of its values, K.
        dims: continuous latent site -> number of its dimensions.
        rows: that were watched; of fewer than 2 K nobody expects all clusters.
        kept: the epoch whose parameters were kept; default: the last.

    Returns:
        what was found, sites first; nothing for a healthy run.
    """
    if not history:
        return []
    now = next((r for r in history if r["epoch"] == kept), history[-1])
    found: list[Finding] = []
    for name, size in (clusters or {}).items():
        found += _finite(name, size, now, rows)
    for name, size in (dims or {}).items():
        found += _continuous(name, size, now)
    return [*found, *_gradients(history), *_held_out(history, kept)]


def looked_at(history: Sequence[Record]) -> list[str]:
    """What the last record allows to be judged, in words."""
    now = history[-1] if history else {}
    kinds = {
        "used": "clusters used", "entropy": "responsibilities", "active": "active units",
        "grad_norm": "gradients", "val_bound": "the held-out bound",
    }  # fmt: skip
    names = {n.removesuffix(f"_{site}") for n in now for site in now} | set(now)
    return [words for kind, words in kinds.items() if kind in names]


def _finite(name: str, size: int, now: Record, rows: int) -> Iterator[Finding]:
    entropy, used, top = now.get(f"entropy_{name}"), now.get(f"used_{name}"), math.log(size)
    if size < 2 or entropy is None or used is None:
        return
    if entropy > UNIFORM * top:
        yield Finding(
            f"The responsibilities of {name} are uniform",
            f"Their mean entropy is {entropy:.2f} of at most {top:.2f} nats (ln {size}): the model"
            f" does not tell rows apart by {name}.",
            f"Show values of {name}, or more of them, start from pretrained clusters, or make other"
            " latents dearer or narrower at first, so that the decoder has a reason to use it.",
        )
    elif used < USED * size and rows >= 2 * size:
        yield Finding(
            f"The clusters of {name} collapsed",
            f"Rows name only {used:.0f} of {size}; the largest holds"
            f" {now.get(f'largest_{name}', 1.0):.0%} of them.",
            f"Start from pretrained clusters, let the divergence of {name} rise slowly"
            f' (weights={{"{name}": linear(0, 1, 10)}}), try other seeds, or ask for fewer.',
        )
    elif 0 <= -now.get(name, math.nan) < FREE:
        yield _costs_nothing(name, now)


def _continuous(name: str, size: int, now: Record) -> Iterator[Finding]:
    active, term = now.get(f"active_{name}"), now.get(name, math.nan)
    if active is not None and active < max(1, ACTIVE * size):
        cost = "" if math.isnan(term) else f", and its term is {_signed(term)} nats per datum"
        yield Finding(
            f"The posterior of {name} collapsed",
            f"{active:.0f} of {size} dimensions vary between rows{cost}: the decoder does without"
            f" {name}.",
            f'Let its divergence rise slowly (weights={{"{name}": linear(0, 1, 10)}}) or leave it'
            f' some nats (free_bits={{"{name}": 2.0}}), train longer, or weaken the decoder.',
        )
    elif -FREE < term < FREE:
        yield _costs_nothing(name, now)


def _costs_nothing(name: str, now: Record) -> Finding:
    return Finding(
        f"The divergence of {name} is zero",
        f"Its term is {_signed(now[name])} nats per datum: what is inferred of it is its prior.",
        f'Let it rise slowly (weights={{"{name}": linear(0, 1, 10)}}), or drop the site.',
    )


def _gradients(history: Sequence[Record]) -> Iterator[Finding]:
    worst, where = 0.0, 0
    norms = [r["grad_norm"] for r in history if "grad_norm" in r]
    tops = [(r["grad_norm_max"], int(r["epoch"])) for r in history if "grad_norm_max" in r]
    for i, (top, epoch) in enumerate(tops[2:], 2):
        before = median(norms[:i])
        if before > 0 and top / before > max(worst, EXPLODED):
            worst, where = top / before, epoch
    if where:
        yield Finding(
            "Gradients exploded",
            f"In epoch {where} a step's gradient was {worst:,.0f} times as large as the median of"
            " the epochs before.",
            "Lower the learning rate or clip (clip=10.0); check the data for extreme values, and"
            " scales of the model that go to zero.",
        )


def _held_out(history: Sequence[Record], kept: int | None) -> Iterator[Finding]:
    some = [r for r in history if "val_bound" in r and "bound" in r]
    if len(some) < 3:
        return
    best, last = max(some, key=lambda r: r["val_bound"]), some[-1]
    fallen = best["val_bound"] - last["val_bound"]
    risen = max(best["val_bound"] - some[0]["val_bound"], 0.0)
    least = max(FALLEN * risen, 1e-3 * abs(best["val_bound"]))
    if fallen > least and last["bound"] > best["bound"]:
        was = f"; the parameters of epoch {kept} were kept" if kept is not None else ""
        yield Finding(
            "The held-out bound falls while the training bound rises",
            f"It was best in epoch {best['epoch']:.0f} and has lost {fallen:.2f} nats per datum"
            f" since; the training bound gained {last['bound'] - best['bound']:.2f}{was}.",
            "The model overfits: stop earlier (patience=10), use smaller networks or fewer latent"
            " dimensions, or more data.",
        )


def _signed(value: float) -> str:
    return f"{value:.3f}".replace("-", "\N{MINUS SIGN}")
