"""Gradients by the guide's parameters through its draws alone.

The guide's draws z = z(noise, phi) are reparameterised, so that a bound of ``w = p(x, z) / q(z)``
depends on phi through z and through the density q.  With ``D_k`` the derivative of ``log w_k``
through the draw z_k alone, with phi fixed inside q, and ``v_k = w_k / sum_j w_j`` ::

    total    sum_k v_k (D_k - d log q(z_k) / d phi)      the derivative of what is computed
    stl      sum_k v_k D_k                               sticking the landing
    dreg     sum_k v_k^2 D_k                             doubly reparameterised

For one draw, where the mean of ``d log q / d phi`` is zero, ``stl`` and ``dreg`` are the same and
unbiased; for more, ``dreg`` has the mean of ``total`` and ``stl`` has not.  Both vanish, draw by
draw, where q is the exact posterior.

For q with phi fixed the guide is run a second time, on detached parameters and at its own draws,
which stay attached: so what it draws later is still a function of what it drew before.  Sites that
are summed exactly, and those that the guide computes (``Delta``), have no draw; they keep their
whole derivative.

Sources: Geoffrey Roeder, Yuhuai Wu, David Duvenaud, "Sticking the landing: simple, lower-variance
gradient estimators for variational inference" (2017); George Tucker, Dieterich Lawson, Shixiang Gu,
Chris Maddison, "Doubly reparameterized gradient estimators for Monte Carlo objectives" (2019).
"""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

import pyro
import pyro.poutine as poutine
import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.func import functional_call

from pyrozoo.inference.batch import Batch
from pyrozoo.inference.bounds.runs import check_draws, enumerating, in_particles, sample_sites
from pyrozoo.inference.bounds.terms import Terms
from pyrozoo.inference.observing import Observed
from pyrozoo.inference.plan import Plan

Sites = dict[str, Any]  # of a trace


def detach_densities(terms: Terms, p: Observed, q: Observed, batch: Batch, guide: Sites) -> None:
    """Put densities of the guide's draws in which its parameters are fixed into the terms.

    Args:
        terms: of these draws, without closed forms.
        p, q: the pair; the guide may read the program's parameters, which are fixed there as well.
        batch: what it was run on.
        guide: its sites; the draws are attached.

    Raises:
        ValueError: the guide draws noise that is no site of its own.
    """
    names, checked = _drawn(terms.plan, guide), f"draws its sites only {_training(q)}"
    if not names or (checked in terms.plan.cache and not torch.is_grad_enabled()):
        return
    values = {n: s["value"] for n, s in guide.items()}
    for name in names:  # new objects: a flow that remembers its draws must not know them again
        values[name] = values[name].view_as(values[name])
    given = {n: {**s, "value": values[n]} for n, s in guide.items()}
    before = _random_state(batch) if checked not in terms.plan.cache else []
    with _quiet(), poutine.block(hide_types=["param"]), _Detached(), _Given(given):
        net = in_particles(_fixed(p, q), terms.plan, terms.num_particles)
        again = sample_sites(poutine.trace(net).get_trace(batch))
    if any(not torch.equal(*pair) for pair in zip(before, _random_state(batch), strict=False)):
        raise ValueError(
            "this gradient runs the guide twice, which draws noise that is no site (Dropout, for"
            " example) and so is another guide the second time; use gradient='total'"
        )
    terms.plan.cache[checked] = True
    for name in names:
        site = again[name]
        value = scale_and_mask(site["fn"].log_prob(values[name]), site["scale"], site["mask"])
        terms.plain[name][0] = (-value, terms.plain[name][0][1])


def cut_draws(
    p: Observed, q: Observed, batch: Batch, num_particles: int
) -> tuple[Sites, Sites, dict[str, tuple[Tensor, Tensor]]]:
    """Run both halves at draws of which the gradient is taken apart.

    Returns:
        the sites of the program and of the guide, at draws from which no gradient flows on; and
        for each site the guide's own draw, attached, and this copy.
    """
    check_draws(p, batch, num_particles)
    plan = p.pairing.plan(batch)
    p_in, q_in = (enumerating(net, plan, num_particles) for net in (p, q))
    guide = sample_sites(poutine.trace(q_in).get_trace(batch))
    names, cut = _drawn(plan, guide), {}
    for name in names:
        if (value := guide[name]["value"]).requires_grad:
            cut[name] = (value, value.detach() + 0 * value)  # a leaf would pass for a parameter
    found = {n: {**s, "value": cut[n][1]} if n in cut else s for n, s in guide.items()}
    assert plan.guide is not None
    if any(plan.guide.descendants(n).intersection(found).difference(names) for n in cut):
        with _Given({n: found[n] for n in names}):  # what follows from a draw, from its copy
            found = sample_sites(poutine.trace(q_in).get_trace(batch))
    with _Given(found):
        program = poutine.trace(p_in).get_trace(batch)
    return sample_sites(program), found, cut


def _drawn(plan: Plan, guide: Sites) -> list[str]:
    """The sites that the guide draws: neither enumerated, nor computed, nor observed."""
    assert plan.guide is not None
    return [
        name
        for name, site in guide.items()
        if site["infer"].get("_enumerate_dim") is None
        and "_proposal" not in site["infer"]
        and not plan.guide.sites[name].fixed
    ]


class _Given(Messenger):
    """Give sites the values that they had in another run."""

    def __init__(self, sites: Sites) -> None:
        super().__init__()
        self.sites = sites

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.sites and not msg["is_observed"]:
            site = self.sites[msg["name"]]
            msg["value"], msg["infer"], msg["done"] = site["value"], site["infer"], True


class _Detached(Messenger):
    """Detach parameters that are kept in Pyro's store."""

    def _pyro_post_param(self, msg: Any) -> None:
        msg["value"] = msg["value"].detach()


class _Fixed(nn.Module):
    """The guide, among all parameters that it may read."""

    def __init__(self, p: Observed, q: Observed) -> None:
        super().__init__()
        self.p, self.q = p, q

    def forward(self, batch: Batch) -> Any:
        return self.q(batch)


def _fixed(p: Observed, q: Observed) -> Any:
    """The guide as a function of a batch, with parameters that are constants."""
    module = _Fixed(p, q)
    values = {name: x.detach() for name, x in module.named_parameters()}
    values |= {f"q.{name}": x.clone() for name, x in q.named_buffers()}  # may be written to
    return lambda batch: functional_call(module, values, (batch,))


def _quiet() -> Any:
    """Pyro warns of registered parameters that are constants."""
    if len(pyro.get_param_store()):
        return warnings.catch_warnings(action="ignore")
    return contextlib.nullcontext()


def _training(q: Observed) -> bool:
    return any(module.training for module in q.modules() if module is not q)


def _random_state(batch: Batch) -> list[Tensor]:
    states = [torch.get_rng_state()]
    if batch.device.type == "cuda":
        states.append(torch.cuda.get_rng_state(batch.device))
    return states
