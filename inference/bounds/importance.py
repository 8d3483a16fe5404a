"""Bounds from several draws for each row, by importance weights.

With K draws of the guide and ``w_k = p(x, z_k) / q(z_k | x)``, a row of the bound is ::

    IWELBO        log (1/K) sum_k w_k                                (K = 1: the evidence bound)
    RenyiBound    1 / (1 - alpha) log (1/K) sum_k w_k^(1 - alpha)    (0: IWELBO, 1: the average)

Finite sites are summed exactly inside: with y summed in the program ``w_k = sum_y p(x, y, z_k) /
q(z_k | x)``; with y enumerated by the guide the bound is that of each class, averaged ::

    sum_y q(y | x) [ log (1/K) sum_k p(x, y, z_yk) / q(z_yk | x, y)  -  log q(y | x) ]

with draws for each class.  It is at most log p(x), tends to ``log p(x) - KL(q(y | x) || p(y | x))``
and gives the classifier its gradient.  A q(y | .) that depends on draws, or lies in a plate inside
a row, is averaged inside: ``log w_k = E_q(y | .) [log p(x, y, z_k) - log q(y, z_k | x)]``, by
Jensen's inequality a bound as well.  (``log_evidence`` leaves q(y | x) out: there nothing is
trained.)

================== ================ ======================================= ========= ============
objective          program's grad.  guide's gradient                        bound     draws need
================== ================ ======================================= ========= ============
EnumELBO           of the bound     total, or path alone ("stl")            yes       rsample
IWELBO             of the bound     total, unbiased, noisy for large K      yes       rsample
.. "stl"           of the bound     path, weights v_k: biased for K > 1     yes       rsample
.. "dreg"          of the bound     path, weights v_k^2: unbiased           yes       rsample
RenyiBound         of the bound     total                                   alpha>=0  rsample
ReweightedWake-    of IWELBO        minus KL(p(z | x) || q), weighted       its       nothing
Sleep              (1)              draws; or on dreams (:mod:`.wake`)      value (2)
================== ================ ======================================= ========= ============

``v_k = w_k / sum_j w_j``; the gradients are those of :mod:`.gradients`, which says why.  (1) with
``w_k = sum_y p(x, y, z_yk) / q(z_yk | x, y)``, without q(y | x).  (2) The guide does not climb it.

Every row has weights of its own, so that minibatches are allowed; latent sites that all rows share
have none and raise.  What is evaluated, ``evaluate`` and ``log_evidence``, does not depend on the
objective of the training.

Sources: Yuri Burda, Roger Grosse, Ruslan Salakhutdinov, "Importance weighted autoencoders" (2016);
Yingzhen Li, Richard Turner, "Renyi divergence variational inference" (2016).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from pyro.distributions.util import scale_and_mask
from pyro.infer import TraceEnum_ELBO
from torch import Tensor

from pyrozoo.inference.batch import Batch
from pyrozoo.inference.bounds.contract import add, contract, sum_out
from pyrozoo.inference.bounds.elbo import EnumELBO, Value, active
from pyrozoo.inference.bounds.gradients import cut_draws, detach_densities
from pyrozoo.inference.bounds.runs import nesting
from pyrozoo.inference.bounds.terms import Terms, same_scale
from pyrozoo.inference.observing import Observed
from pyrozoo.inference.plan import Plan


class ImportanceWeighted(EnumELBO):
    """What objectives with importance weights have in common.

    :meth:`terms` takes the evidence bound of the same draws apart.

    Args:
        num_particles: draws of the guide per row, K (for a site that depends on one which the guide
            enumerates, K for each of its values).
        gradient: see :mod:`.gradients`.
        observed_guide_weights, num_rows, split, inputs, replace: as in :class:`.EnumELBO`.

    Raises (when called):
        ValueError: a latent site is shared by all rows, a term is weighted or a site is scaled, or
            the program or guide is outside the class of the row-wise bound.
    """

    alpha: float

    def __init__(
        self,
        num_particles: int = 10,
        *,
        gradient: str = "total",
        observed_guide_weights: Mapping[str, float | Tensor] | None = None,
        num_rows: int | None = None,
        split: bool | str = "auto",
        inputs: tuple[str, ...] = (),
        replace: tuple[str, ...] = (),
    ) -> None:
        super().__init__(
            num_particles,
            gradient=gradient,
            observed_guide_weights=observed_guide_weights,
            num_rows=num_rows,
            split=split,
            inputs=inputs,
            replace=replace,
        )

    def _closed_form(self, plan: Plan, p: Observed, q: Observed, batch: Batch) -> dict[str, str]:
        return {}

    def _stock(self, reason: str, plan: Plan, batch: Batch) -> TraceEnum_ELBO:
        raise ValueError(f"{type(self).__name__} is not available here: {reason}")

    def _evaluate_whole(self, p: Observed, q: Observed, batch: Batch) -> Value:
        self._check(p.pairing.plan(batch))
        apart = self.gradient == "dreg" and torch.is_grad_enabled()
        terms, cut = self._cut(p, q, batch) if apart else (self.trace(p, q, batch), {})
        weights, shared = _log_weights(terms)
        rows = _average(terms, _power_mean(terms, weights, self.alpha))
        if cut and weights.requires_grad:
            rows = rows + _through_draws(terms, weights, rows, cut)
        zeros = rows.new_zeros(()).expand(self.num_particles, len(batch))
        return Value(rows, shared, self._extra(terms, zeros))

    def _cut(
        self, p: Observed, q: Observed, batch: Batch
    ) -> tuple[Terms, dict[str, tuple[Tensor, Tensor]]]:
        program, guide, cut = cut_draws(p, q, batch, self.num_particles)
        terms = self._terms(p.pairing.plan(batch), program, guide, batch)
        detach_densities(terms, p, q, batch, guide)
        return terms, cut

    def _check(self, plan: Plan) -> None:
        assert plan.guide is not None
        if weights := active(self.weights):
            raise ValueError(
                f"the term of {next(iter(weights))!r} has a weight, but importance weights are"
                " those of the whole density; weights of single terms are for EnumELBO"
            )
        for name, site in plan.guide.sites.items():
            latent = plan.roles.get(name, "auxiliary") in ("proposed", "merged", "auxiliary")
            if site.kind == "sample" and latent and not site.local:
                raise ValueError(
                    f"site {name!r} is shared by all rows, which therefore have no importance"
                    " weights of their own; use EnumELBO (gradient='stl' works too), or fix its"
                    " value with pyro.poutine.condition(program, data={...}) and leave it out of"
                    " the guide"
                )
        for site in (*plan.program.sites.values(), *plan.guide.sites.values()):
            if site.kind == "sample" and not same_scale(site.scale, 1.0):
                raise ValueError(
                    f"site {site.name!r} has a poutine.scale, with which there are no importance"
                    " weights; use EnumELBO"
                )


class IWELBO(ImportanceWeighted):
    """The importance weighted bound: ``log (1/K) sum_k w_k`` in every row, see the module.

    It grows with the number of draws and tends to log p(x).  The total gradient of the guide loses
    its signal as K grows (Rainforth et al., "Tighter variational bounds are not necessarily
    better", 2018); that of ``gradient="dreg"`` does not.  Source: Yuri Burda, Roger Grosse, Ruslan
    Salakhutdinov, "Importance weighted autoencoders" (2016).

    Args:
        num_particles: draws of the guide per row, K.
        gradient: of the guide: ``"total"``, ``"stl"`` or ``"dreg"``, see :mod:`.gradients`.
        observed_guide_weights, num_rows, split, inputs, replace: as in :class:`.EnumELBO`.
    """

    alpha = 0.0
    _gradients = ("total", "stl", "dreg")


class RenyiBound(ImportanceWeighted):
    """``log (1/K) sum_k w_k^(1 - alpha) / (1 - alpha)`` in every row, see the module.

    Between :class:`IWELBO` (alpha = 0) and the evidence bound averaged over K draws (alpha = 1);
    larger alpha are lower bounds that seek a mode, negative ones no bounds.

    Args:
        alpha: the order of the divergence.
        num_particles: draws of the guide per row, K.
        options: see :class:`ImportanceWeighted`; the gradient is ``"total"``.
    """

    _gradients = ("total",)

    def __init__(self, alpha: float = 0.5, num_particles: int = 10, **options: Any) -> None:
        super().__init__(num_particles, **options)
        if isinstance(alpha, bool) or not math.isfinite(alpha):
            raise ValueError(f"alpha is a finite number, got {alpha!r}")
        self.alpha = float(alpha)

    @property
    def is_bound(self) -> bool:
        """Whether the loss is (minus) a lower bound of the evidence."""
        return self.alpha >= 0 and super().is_bound


def _outer(terms: Terms) -> set[str]:
    """The sites that the guide enumerates before any draw, once for a row."""
    graph, roles = terms.plan.guide, terms.plan.roles
    assert graph is not None
    inner = {f.name for f in terms.weights if not f.plates <= terms.plates}
    for name, site in graph.sites.items():
        drawn = roles.get(name, "auxiliary") in ("proposed", "merged", "auxiliary")
        if site.kind == "sample" and drawn and name not in terms.weight_dims:
            inner.add(name)
    for name in tuple(inner):
        inner |= graph.descendants(name)
    return terms.weight_dims.keys() - inner


def _restricted(terms: Terms, names: set[str]) -> Terms:
    """The terms as if only these sites were enumerated by the guide."""
    dims = frozenset(terms.weight_dims[n] for n in names)
    some = [replace(f, sums=f.sums & dims) for f in terms.weights if f.name in names]
    own = {n: d for n, d in terms.weight_dims.items() if n in names}
    return replace(terms, weights=some, weight_dims=own)


def _log_weights(terms: Terms) -> tuple[Tensor, Tensor]:
    """``log w`` of every draw in every class, and what sites that all rows share add.

    The first has the dims of the terms: the classes, left of the particles, left of the plates.
    """
    inside = _restricted(terms, terms.weight_dims.keys() - _outer(terms))
    parts = [part for parts in terms.plain.values() for part in parts]
    for group, counts in zip(terms.groups, terms.counts, strict=True):
        value = contract(group, terms.sums, terms.plates)
        value = scale_and_mask(value, mask=None if counts is True else counts)
        parts.append((value, terms.plates))
    zero = torch.zeros((), dtype=parts[0][0].dtype if parts else None)
    local, shared = [zero], [zero]
    for value, plates in parts:
        if terms.data_dim in plates:
            local.append(sum_out(inside.weigh(value), plates - terms.plates))
        else:
            shared.append(terms.to_rows(value, plates).mean())
    return add(local), add(shared)


def _particles(terms: Terms) -> int:
    return -1 - nesting(terms.plan)


def _has_particles(terms: Terms, value: Tensor) -> bool:
    return terms.num_particles > 1 and -_particles(terms) <= value.dim()


def _power_mean(terms: Terms, weights: Tensor, alpha: float) -> Tensor:
    """``log (1/K) sum_k w_k^(1 - alpha) / (1 - alpha)``, the dim of the particles kept."""
    if not _has_particles(terms, weights):
        return weights
    dim = _particles(terms)
    if alpha == 1:
        return weights.mean(dim, keepdim=True)
    total = ((1 - alpha) * weights).logsumexp(dim, keepdim=True)
    return (total - math.log(weights.shape[dim])) / (1 - alpha)


def _average(terms: Terms, value: Tensor) -> Tensor:
    """The mean over the guide's classes, ``(1, rows)``."""
    outside = _restricted(terms, _outer(terms))
    for i, factor in enumerate(outside.weights):
        if _has_particles(terms, factor.value):  # they are the same for all particles
            first = factor.value.narrow(_particles(terms), 0, 1)
            outside.weights[i] = replace(factor, value=first)
    value = outside.weigh(value)
    if value.dim() < -terms.data_dim:
        value = value.reshape((1,) * (-terms.data_dim - value.dim()) + value.shape)
    return value.movedim(terms.data_dim, -1).reshape(1, -1).expand(1, terms.rows)


def _through_draws(
    terms: Terms, weights: Tensor, rows: Tensor, cut: dict[str, tuple[Tensor, Tensor]]
) -> Tensor:
    """Zero, ``(rows,)``, with the doubly reparameterised gradient through the draws."""
    share = weights.new_ones(())
    if _has_particles(terms, weights):
        share = weights.detach().softmax(_particles(terms))
    (by_weight,) = torch.autograd.grad(rows.sum(), weights, retain_graph=True)
    copies = [copy for _, copy in cut.values()]
    grads = torch.autograd.grad(
        weights, copies, by_weight * share, retain_graph=True, allow_unused=True
    )
    total, graph = weights.new_zeros(terms.rows), terms.plan.guide
    assert graph is not None
    for (name, (draw, _)), grad in zip(cut.items(), grads, strict=True):
        if grad is not None:
            value = (draw - draw.detach()) * grad.detach()
            dim = terms.data_dim - len(graph.sites[name].event_shape)
            total = total + value.movedim(dim, -1).reshape(-1, terms.rows).sum(0)
    return total
