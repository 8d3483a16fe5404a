"""Reweighted wake-sleep: one loss in which the program and the guide go different ways.

With K draws z_k of the guide for each row, held fixed, and exact sums over finite sites y ::

    W_yk = p(x, y, z_yk) / q(z_yk | x, y),          v_yk = W_yk / sum_yk W_yk

    program       climbs   log (1/K) sum_yk W_yk                      (a lower bound of log p(x))
    guide, wake   climbs   sum_yk v_yk log q(y, z_yk | x)             at fixed v
    guide, sleep  climbs   log q(y, z | x)                            at (y, z, x) ~ p, a dream

Sites that are summed in the program and not proposed have no log q.  In both phases the guide comes
to cover the posterior: it minimises KL(p(z | x) || q(z | x)) on average over the data, with weights
whose bias vanishes as K grows, or over dreams, without bias.  No derivative goes through a draw:
the guide may draw discrete sites that are not enumerated.

Rows have weights and dreams of their own, so that minibatches are allowed.  A dream has what is
missing in its row missing too, as if it were missing completely at random.

Sources: Jörg Bornschein, Yoshua Bengio, "Reweighted wake-sleep" (2015); Tuan Anh Le, Adam Kosiorek,
N. Siddharth, Yee Whye Teh, Frank Wood, "Revisiting reweighted wake-sleep for models with
stochastic control flow" (2019).
"""

from __future__ import annotations

import math
from typing import Any

import pyro.poutine as poutine
import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyrozoo.inference.batch import Batch
from pyrozoo.inference.bounds.contract import Factor
from pyrozoo.inference.bounds.elbo import Value
from pyrozoo.inference.bounds.importance import ImportanceWeighted
from pyrozoo.inference.bounds.runs import run, sample_sites
from pyrozoo.inference.bounds.terms import Terms
from pyrozoo.inference.bounds.weights import log_weights
from pyrozoo.inference.graph import DATA, Site
from pyrozoo.inference.observing import Observed
from pyrozoo.inference.plan import Plan


class ReweightedWakeSleep(ImportanceWeighted):
    """The importance weighted bound for the program, wake or sleep phase for the guide.

    The value of the loss is minus the bound, which the guide's gradient does not climb.

    Args:
        num_particles: draws of the guide per row, K.
        insomnia: share of the wake phase in the guide's gradient, in [0, 1]; the rest is sleep,
            with one dream for each row.
        options: see :class:`.ImportanceWeighted`; the gradient is the one described in the module.

    Raises (when called):
        ValueError: the guide computes a site (``Delta``), so that the density of a given value is
            not known; or there is to be sleep, and the guide draws a site that the program lacks,
            or the program observes a site itself.
    """

    alpha = 0.0
    _gradients = ("total",)
    _reparameterised = False

    def __init__(self, num_particles: int = 10, insomnia: float = 1.0, **options: Any) -> None:
        super().__init__(num_particles, **options)
        if isinstance(insomnia, bool) or not 0 <= insomnia <= 1:
            raise ValueError(f"insomnia is a number in [0, 1], got {insomnia!r}")
        self.insomnia = float(insomnia)

    def trace(self, p: Observed, q: Observed, batch: Batch) -> Terms:
        """Run the guide, then the program at its draws, held fixed; take the traces apart."""
        plan = p.pairing.plan(batch)
        with _Fixed():
            program, guide = (sample_sites(t) for t in run(p, q, batch, self.num_particles))
        terms = self._terms(plan, program, guide, batch)
        for name, site in guide.items():
            if "_proposal" not in site["infer"] and name not in terms.weight_dims:
                value, plates = terms.plain[name][0]  # - log q, whose gradient is turned round
                value = (1 + self.insomnia) * value.detach() - self.insomnia * value
                terms.plain[name][0] = (value, plates)
        return terms

    def _evaluate_whole(self, p: Observed, q: Observed, batch: Batch) -> Value:
        plan = p.pairing.plan(batch)
        self._check(plan)
        terms = self.trace(p, q, batch)
        credit = [
            Factor(f.name, self.insomnia * (f.value - f.value.detach()), f.plates, f.sums)
            for f in terms.weights
        ]
        weights = log_weights(terms, credit)
        rows = weights.logsumexp(0, keepdim=True) - math.log(self.num_particles)
        if self.insomnia < 1:
            slept = (1 - self.insomnia) * _recall(q, _dream(p, batch, plan), plan)
            rows = rows + slept - slept.detach()
        extra = self._extra(terms, torch.zeros_like(weights))
        return Value(rows, rows.new_zeros(()), extra)

    def _check(self, plan: Plan) -> None:
        super()._check(plan)
        assert plan.guide is not None
        for name, site in plan.guide.sites.items():
            role = plan.roles.get(name, "auxiliary")
            if site.kind != "sample" or role not in ("proposed", "merged", "auxiliary"):
                continue
            if site.fixed:
                raise ValueError(
                    f"the guide computes site {name!r} (a Delta), so that the density of a given"
                    " value, which ReweightedWakeSleep needs, is not known"
                )
            if role == "auxiliary" and self.insomnia < 1:
                raise ValueError(
                    f"the guide's site {name!r} is not in the program's dreams; use insomnia=1"
                )
        for name, site in plan.program.sites.items():
            if site.own is not None and self.insomnia < 1:
                raise ValueError(
                    f"the program observes {name!r} itself, so that it cannot dream; write it"
                    " without obs=, or use insomnia=1"
                )


class _Fixed(Messenger):
    """Hold the draws fixed."""

    def _pyro_post_sample(self, msg: Any) -> None:
        if isinstance(msg["value"], Tensor) and msg["value"].requires_grad:
            msg["value"] = msg["value"].detach()


class _Given(Messenger):
    def __init__(self, values: dict[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.values and "_proposal" not in msg["infer"]:
            msg["value"], msg["done"] = self.values[msg["name"]], True


@torch.no_grad()
def _dream(p: Observed, batch: Batch, plan: Plan) -> tuple[Batch, dict[str, Tensor]]:
    """What the program makes up: a batch with the same pattern, and the values of all sites."""
    with poutine.block():
        trace = poutine.trace(p.module).get_trace(batch.drop(*plan.observed))
    values = {}
    for name, site in sample_sites(trace).items():
        shape = site["fn"].batch_shape + site["fn"].event_shape
        values[name] = site["value"].expand(shape)
    for name in plan.observed:
        value = _rows_first(plan.program.sites[name], values[name])
        batch = batch.replace(name, value.to(batch[name].dtype))
    return batch, values


def _recall(q: Observed, dream: tuple[Batch, dict[str, Tensor]], plan: Plan) -> Tensor:
    """The guide's log-density of what was dreamed, ``(rows,)``."""
    batch, values = dream
    with _Given(values):
        sites = sample_sites(poutine.trace(q).get_trace(batch))
    total = torch.zeros(len(batch), dtype=batch._dtype, device=batch.device)
    for name, site in sites.items():
        if "_proposal" not in site["infer"]:
            value = scale_and_mask(site["fn"].log_prob(site["value"]), mask=site["mask"])
            dim = plan.program.sites[name].dims[DATA]
            total = total + value.movedim(dim, -1).reshape(-1, len(batch)).sum(0)
    return total


def _rows_first(site: Site, value: Tensor) -> Tensor:
    """``(*plates, *event)`` to ``(rows, *inner plates, *event)``."""
    width = value.dim() - len(site.event_shape)
    plates = [DATA, *(plate for plate in site.dims if plate != DATA)]
    sources = [width + site.dims[plate] for plate in plates]
    others = [d for d in range(width) if d not in sources]
    value = value.permute(*sources, *others, *range(width, value.dim()))
    return value.reshape(*value.shape[: len(sources)], *site.event_shape)
