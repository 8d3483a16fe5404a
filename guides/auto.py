"""Pyro's autoguides: parameters of their own for every row, for reference.

An autoguide proposes all continuous latent sites of an *observed* program at once, on the
unconstrained space, without any network: ``q(u) = q(u; lambda)`` with ``u`` the sites of all rows.
Finite sites are left out and summed.  So these guides belong to one data set and see all its rows
in every step.

================= ================================================================================
AutoNormal        one normal for each number; the only one whose bound has a value per row
AutoDelta         a point mass (in the constrained space)
all others        ONE joint auxiliary site outside plate ``"data"`` has the density of all rows, so
                  that the bound as a whole is exact, but its rows, without that density, mean
                  nothing on their own, and there is no evidence of a row (:attr:`Auto.by_row`)
================= ================================================================================
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import pyro
import pyro.poutine as poutine
import torch
from pyro.infer import autoguide
from torch import nn

from pyrozoo.inference import Batch, observe
from pyrozoo.inference.batch import Data
from pyrozoo.inference.graph import modules_of
from pyrozoo.inference.observing import Net

AUTOGUIDES = (
    "AutoNormal",
    "AutoDelta",
    "AutoDiagonalNormal",
    "AutoMultivariateNormal",
    "AutoLowRankMultivariateNormal",
    "AutoIAFNormal",
)


class Auto(nn.Module):
    """One of Pyro's autoguides for the rows of a data set, usable as any other guide.

    Args:
        program: what the guide is for.
        kind: one of :data:`AUTOGUIDES`, or a class of autoguides.
        data: what is observed, all rows: it decides which sites are latent.
        inputs, replace: see :func:`~pyrozoo.inference.pair`.
        options: of the autoguide, for example ``init_scale`` or ``rank``.

    Attributes:
        guide: the autoguide.
        by_row: whether single rows of the bound have a meaning.

    Raises:
        ValueError: there is no such autoguide, nothing continuous is latent, or a site is known in
            some rows only while others depend on it.  When called: not as many rows as in ``data``.
    """

    def __init__(
        self,
        program: Net,
        kind: str | type[autoguide.AutoGuide],
        data: Data,
        *,
        inputs: Iterable[str] = (),
        replace: Iterable[str] = (),
        **options: Any,
    ) -> None:
        super().__init__()
        if isinstance(kind, str) and kind not in AUTOGUIDES:
            raise ValueError(
                f"no autoguide is called {kind!r} (autoguides: {', '.join(AUTOGUIDES)})"
            )
        made = getattr(autoguide, kind) if isinstance(kind, str) else kind
        observed = observe(program, inputs, replace)
        batch = observed.pairing.prepare(data)
        plan = observed.pairing.plan(batch)
        counting = [n for n in plan.roles if plan.deciders(n) != ()]
        sites = [n for n in counting if not plan.program.sites[n].summable]
        if partly := [n for n in sites if plan.roles[n] == "merged"]:
            raise ValueError(
                f"site {partly[0]!r} is known in some rows only, and others depend on it:"
                " autoguides propose a site everywhere or nowhere"
            )
        latent = [n for n in sites if plan.roles[n] == "free"]
        if not latent:
            raise ValueError("no continuous latent site is left to an autoguide")
        self.rows = len(batch)
        self.by_row = issubclass(made, autoguide.AutoNormal | autoguide.AutoDelta)
        with _by_itself(batch._dtype):
            self.guide = made(poutine.block(observed, expose=latent), **options)
            with poutine.block(), torch.no_grad():
                self.guide(batch)
        for parameter in self.guide.parameters():
            parameter.requires_grad_(True)
        device = next((p.device for m in modules_of(program) for p in m.parameters()), None)
        self.guide.to(device)

    def forward(self, batch: Batch) -> Any:
        """Draw every continuous latent site of all rows."""
        if len(batch) != self.rows:
            raise ValueError(
                f"an autoguide has parameters for each of its {self.rows} rows, but the batch has"
                f" {len(batch)}: minibatches need an amortised guide"
            )
        with _by_itself(None), poutine.block(hide_types=["param"]):
            return self.guide(batch)


@contextlib.contextmanager
def _by_itself(dtype: torch.dtype | None) -> Iterator[None]:
    """Parameters belong to the module, not to Pyro's store, and are made in this precision."""
    before = torch.get_default_dtype()
    with pyro.settings.context(module_local_params=True):
        try:
            torch.set_default_dtype(dtype or before)
            yield
        finally:
            torch.set_default_dtype(before)
