"""The measures of one fitted pair: the same for every guide, whatever it was trained with.

======================= ==========================================================================
measure                 what it is
======================= ==========================================================================
``elbo``                evidence bound, nats per datum
``iwae_<k>``            importance weighted bound of k draws, nats per datum; ``iwae_<k>_se`` is its
                        standard error over rows, which are the same for all guides
``khat_bad``            share of rows whose Pareto k-hat is above 0.7: the proposal is no use there
``gap``                 log-evidence - ``elbo``: exact where the evidence is known, else by the
                        tightest bound at hand
``approximation_gap``   what the family costs: log-evidence - bound refined row by row
``amortisation_gap``    what the network costs: refined bound - ``elbo``; the two add up to the gap
                        of the rows that were refined
``sbc_p``               smallest p-value of simulation-based calibration, times the components
``coverage_90``         share of true latents in their central 90 % interval
``c2st``                accuracy of a classifier between draws and a reference: 0.5 is right
``mmd2``                squared maximum mean discrepancy to the reference
``active_<site>``       latent dimensions whose posterior mean differs between rows
======================= ==========================================================================

With sites that all rows share the rows have no evidence of their own: bounds and k-hat are then
those of the data as a whole (the former divided by the rows), as ``joint`` says.  A guide that
proposes a point mass has no density, so that it has neither bound nor weights.

Source of the gaps: Chris Cremer, Xuechen Li, David Duvenaud, "Inference suboptimality in
variational autoencoders" (2018).
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyrozoo.inference.batch import Batch
from pyrozoo.inference.bounds.elbo import EnumELBO
from pyrozoo.inference.comparison import calibration, distances
from pyrozoo.inference.comparison.importance import (
    importance_weights,
    iwae_bounds,
    joint_log_weights,
)
from pyrozoo.inference.comparison.measures import (
    Draws,
    Effort,
    Measures,
    Reference,
    check_truth,
    unobserved,
    words,
)
from pyrozoo.inference.comparison.psis import pareto_khat
from pyrozoo.inference.comparison.refined import ROW, refine
from pyrozoo.inference.observing import Net
from pyrozoo.inference.plan import Plan
from pyrozoo.inference.posterior import posterior
from pyrozoo.inference.training.result import evaluate

__all__ = ["Draws", "Effort", "Measures", "Reference", "measure"]

LEVELS = (1, 10, 100, 1000, 5000)
ABOVE = 1.0  # nats by which a bound exceeds the evidence of rows only if densities are wrong
BAD = 0.7  # k-hat beyond which importance weights are of no use
TOGETHER = 5_000  # rows x draws that are evaluated at once
FEW = 500  # draws, where each of them is a run of its own


@dataclass(frozen=True)
class _Bench:
    """What is measured, and with what effort."""

    program: Net
    guide: Net
    batch: Batch
    effort: Effort
    inputs: tuple[str, ...]
    seed: int

    @property
    def whole(self) -> bool:
        """Whether the guide belongs to these very rows, as its attribute ``rows`` says."""
        return isinstance(getattr(self.guide, "rows", None), int)

    def elbo(self) -> float:
        """The bound in nats per datum."""
        rows, count = len(self.batch), self.effort.elbo_particles
        per = max(1, min(count, TOGETHER // rows))
        size = rows if self.whole else max(1, TOGETHER // per)
        passes = math.ceil(count / per)
        options = EnumELBO(kl="sampled", inputs=self.inputs)  # exact without noise where q is
        records = [
            evaluate(
                self.program, self.guide, self.batch, options, num_particles=per,
                seed=self.seed + 7919 * i, batch_size=size,
            )
            for i in range(passes)
        ]  # fmt: skip
        return sum(record["bound"] for record in records) / passes

    def weights(self, joint: bool, count: int) -> Tensor:
        """Log importance weights, ``(count, rows)``, or ``(count, 1)`` of all rows together."""
        pair = (self.program, self.guide, self.batch)
        options: dict[str, Any] = {"inputs": self.inputs}
        if joint and self.whole:
            options["chunk_size"] = 50 * TOGETHER
        if joint:
            return joint_log_weights(*pair, count, seed=self.seed, **options).unsqueeze(-1)
        if not self.whole:
            return importance_weights(*pair, count, seed=self.seed, **options)
        rows = len(self.batch)
        per = max(1, 50 * TOGETHER // rows)
        options |= {"batch_size": rows, "chunk_size": rows * per}
        return torch.cat([
            importance_weights(*pair, min(per, count - i), seed=self.seed + 7919 * i, **options)
            for i in range(0, count, per)
        ])  # fmt: skip


def measure(
    program: Net,
    guide: Net,
    data: Any,
    *,
    effort: Effort | None = None,
    log_evidence: Tensor | None = None,
    reference: Reference | None = None,
    inputs: tuple[str, ...] = (),
    seed: int = 0,
) -> Measures:
    """Measure a fitted pair on some rows.

    Args:
        program, guide: the pair; neither is changed.
        data: rows to measure on, held out or not.
        effort: how much to spend.
        log_evidence: log p(observed) of each row, where it is known, ``(rows,)``.
        reference: draws from the exact posterior, ``(draws, rows, *event)`` by site, of sites that
            all rows share ``(draws, *event)``; or a function ``(count, seed)`` that makes them.
        inputs: names of values that are read but are no sites.
        seed: of all draws.

    Raises:
        ValueError: data, sites, log-evidence or reference do not fit.
    """
    effort, found = effort or Effort(), Measures()
    objective = EnumELBO(kl="sampled", split=False, inputs=inputs)
    p, _ = objective.pair(program, guide)
    batch = p.pairing.prepare(data)
    check_truth(program, batch, log_evidence, reference, inputs)
    bench = _Bench(program, guide, batch, effort, tuple(inputs), seed)
    plan = p.pairing.plan(batch)
    outside = objective.unsupported(plan)
    found.shared = any(n in plan.roles and not plan.program.sites[n].local for n in plan.proposed)
    if found.shared:
        found.joint = "rows share latent sites"
    elif outside:
        found.joint = f"rows cannot be taken apart ({outside})"
    elif plan.guide is not None and any(
        s.kind == "sample" and not s.local and n not in plan.roles
        for n, s in plan.guide.sites.items()
    ):
        found.joint = "the guide has one density of all rows"
    if point := _point_mass(plan):
        reason = f"the guide proposes {point!r} as a point mass, which has no density"
        found.reasons |= {"elbo": reason, "khat_bad": reason, "approximation_gap": reason}
    else:
        _bounds(found, bench, log_evidence, outside)
        if "elbo" not in found.reasons:
            _gaps(found, bench, log_evidence, outside or _nothing_proposed(plan))
            found.set_gaps(found.evidence, found.refined[-1] if found.refined else math.nan)
    _calibrate(found, bench)
    _compare_draws(found, bench, reference)
    return found


def _point_mass(plan: Plan) -> str:
    """A site that the guide proposes without a density, or ''."""
    sites = {} if plan.guide is None else plan.guide.sites
    for name, site in sites.items():
        role = plan.roles.get(name)
        if role in ("proposed", "merged") and site.fixed and not site.parents - plan.roles.keys():
            return name
    return ""


def _nothing_proposed(plan: Plan) -> str:
    return "" if plan.proposed & plan.roles.keys() else "the guide proposes nothing"


def _bounds(found: Measures, bench: _Bench, exact: Tensor | None, outside: str) -> None:
    """ELBO, importance weighted bounds, k-hat and the log-evidence."""
    joint, rows = bool(found.joint), len(bench.batch) if found.joint else 1
    if not outside:
        found.figures["elbo"] = bench.elbo()
    count = min(bench.effort.num_particles, FEW) if outside else bench.effort.num_particles
    try:
        weights = bench.weights(joint, count)
    except ValueError as error:
        found.reasons["khat_bad"] = words(error)
    else:
        levels = sorted({k for k in LEVELS if k <= count} | {count})
        over_rows = iwae_bounds(weights, levels)
        for k, (value, noise) in iwae_bounds(weights, levels, over="draws").items():
            found.bounds[k] = (value / rows, noise / rows)
            found.figures[f"iwae_{k}"] = value / rows
            if not math.isnan(over_rows[k][1]):
                found.figures[f"iwae_{k}_se"] = over_rows[k][1] / rows
        found.figures.setdefault("elbo", found.figures["iwae_1"])
        found.khat = pareto_khat(weights.double())
        known = found.khat[~found.khat.isnan()]
        if len(known):
            found.figures["khat_bad"] = float((known > BAD).double().mean())
            found.figures["khat_median"] = float(known.median())
        else:
            found.reasons["khat_bad"] = f"{count} draws are too few for a tail"
        found.evidence = found.bounds[max(found.bounds)][0]
    if exact is not None:
        found.evidence = found.figures["log_evidence"] = float(exact.double().mean())
        if found.figures.get("elbo", -math.inf) > found.evidence + ABOVE:
            found.reasons["elbo"] = found.reasons["approximation_gap"] = (
                f"the bound is {found.figures['elbo']:.4g}, above the evidence: a density is wrong"
                " (in float32 at a covariance that is almost singular?), or the evidence is"
            )
            for name in [n for n in found.figures if n == "elbo" or n.startswith("iwae")]:
                del found.figures[name]
            found.bounds.clear()


def _gaps(found: Measures, bench: _Bench, exact: Tensor | None, reason: str) -> None:
    """The bound of the first rows (of all, if they belong together), refined one by one.

    What is not refined is of the family, too: the refined bound is never below it.
    """
    effort, all_rows = bench.effort, bool(found.joint) or bench.whole
    if ROW in bench.batch:
        reason = f"the data have an input called {ROW!r}"
    if reason:
        found.reasons["approximation_gap"] = reason
    if reason or not effort.gap_rows:
        return
    some = bench.batch if all_rows else bench.batch[: effort.gap_rows]
    entire = len(some) == len(bench.batch)
    first = dataclasses.replace(bench, batch=some)
    if not isinstance(bench.guide, nn.Module):
        found.reasons["approximation_gap"] = "the guide is no module"
        return
    try:
        refined = refine(
            bench.program, bench.guide, some, effort.gap_steps, inputs=bench.inputs, seed=bench.seed
        )
    except (ValueError, NotImplementedError) as error:
        found.reasons["approximation_gap"] = words(error)
        return
    numbers = torch.arange(len(some), device=some.device)
    told = Batch({**some._values, ROW: numbers}, some._present, len(some), some._dtype)
    after = dataclasses.replace(first, guide=refined, batch=told, inputs=(*bench.inputs, ROW))
    evidence = -math.inf
    if exact is not None:
        evidence = float(exact[: len(some)].double().mean())
    else:
        with contextlib.suppress(ValueError):  # there is no weight of a draw: no evidence
            weights = after.weights(bool(found.joint), effort.num_particles).double()
            total = float((weights.logsumexp(0) - math.log(len(weights))).mean())
            evidence = total / len(some) if found.joint else total
        if entire:
            evidence = found.evidence = max(evidence, found.evidence)
    before = found.figures["elbo"] if entire else first.elbo()
    found.refined = (len(some), before, max(before, after.elbo()), evidence)


def _calibrate(found: Measures, bench: _Bench) -> None:
    """Simulation-based calibration of the local sites."""
    if found.joint:
        found.reasons["sbc_p"] = f"{found.joint}: each simulated data set needs a fit"
    elif bench.whole:
        found.reasons["sbc_p"] = "the guide belongs to these rows: simulated ones need a fit"
    elif bench.effort.sbc_datasets:
        try:
            found.calibration = calibration.sbc(
                bench.program, bench.guide, bench.effort.sbc_datasets, bench.effort.sbc_draws,
                data=bench.batch, inputs=bench.inputs, seed=bench.seed,
            )  # fmt: skip
        except ValueError as error:
            found.reasons["sbc_p"] = words(error)
            return
        found.figures["sbc_p"] = found.calibration.p_value
        found.figures["coverage_90"] = found.calibration.coverage_at(0.9)


def _compare_draws(found: Measures, bench: _Bench, reference: Reference | None) -> None:
    """C2ST and MMD between draws of the guide and of a reference."""
    if reference is None:
        found.reasons["c2st"] = "no reference posterior is known"
    if reference is None or not bench.effort.reference_rows:
        return
    count = bench.effort.reference_draws
    exact = reference(count, bench.seed) if callable(reference) else reference
    exact = {name: value[:count] for name, value in exact.items()}
    count = min(len(value) for value in exact.values())
    few = bench.effort.reference_rows
    rows = bench.batch if found.joint or bench.whole else bench.batch[:few]
    shown = min(len(rows), few)
    try:
        own = posterior(
            bench.program, bench.guide, rows, count, inputs=bench.inputs, seed=bench.seed,
            batch_size=len(rows),
        )  # fmt: skip
    except ValueError as error:
        found.reasons["c2st"] = words(error)
        return
    names = [name for name in own if name in exact]
    if not names:
        found.reasons["c2st"] = "the reference has none of the latent sites"
        return
    if not found.shared:
        own = {name: own[name][:, :shown] for name in names}
        exact = {name: exact[name][:, :shown] for name in names}
    found.draws, found.reference = {n: own[n] for n in names}, {n: exact[n] for n in names}
    asked = unobserved(rows, bench.inputs)
    scores = []
    for row in [None] if found.shared else range(shown):
        a, b = (
            distances.to_matrix({n: d[n][:count] for n in names}, row, bench.program, asked)
            for d in (own, exact)
        )
        scores.append((distances.c2st(a, b, seed=bench.seed), distances.mmd2(a, b)))
    found.figures["c2st"] = sum(s for s, _ in scores) / len(scores)
    found.figures["mmd2"] = sum(m for _, m in scores) / len(scores)
