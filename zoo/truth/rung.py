"""What is known of one program of the ladder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

Draws = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Rung:
    """A program, data that it generated (or that are classic), and its posterior.

    Attributes:
        name, title: for tables.
        program: without a parameter to learn.
        data: sites and inputs.
        given: the sites that an amortised guide reads.
        inputs: the keys of ``data`` that are no sites.
        how: how the truth is known.
        epochs: for which guides are fitted, unless said otherwise.
        log_evidence: log p(observed) in nats, ``(rows,)``; None where it is not known.
        draws: ``draws(n, seed)``: n independent draws of every latent site from the posterior,
            ``(n, rows, *event)``, or ``(n, *event)`` for a site that all rows share.
    """

    name: str
    title: str
    program: nn.Module
    data: dict[str, Any]
    given: tuple[str, ...]
    how: str
    draws: Callable[[int, int], Draws]
    inputs: tuple[str, ...] = ()
    epochs: int = 1000
    log_evidence: Tensor | None = None
