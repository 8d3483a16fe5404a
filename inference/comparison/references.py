"""Reference posteriors by NUTS, with finite sites summed exactly.

With theta all continuous latent sites, shared by the rows or not, and y the finite ones, the
sampler moves in the unconstrained space, theta = T(u), on ::

    U(u) = -log sum_y p(x, y, T(u)) - log |det dT/du|

and y is then drawn from its exact conditional p(y | x, theta) at every draw.  The sums are those of
the bound (:mod:`..bounds.contract`): all factors are added before one ``logsumexp``.  The program
is written down once as a graph of tensor operations, value and gradient, where that is possible.

Source: Matthew Hoffman, Andrew Gelman, "The No-U-Turn sampler: adaptively setting path lengths in
Hamiltonian Monte Carlo" (2014).
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.poutine as poutine
import torch
from pyro.infer import MCMC
from pyro.infer.mcmc import NUTS as NoUTurn
from pyro.ops.stats import effective_sample_size, split_gelman_rubin
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import biject_to
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg

from pyrozoo.inference.batch import Batch, Data
from pyrozoo.inference.bounds.contract import contract
from pyrozoo.inference.bounds.runs import PARTICLES, nesting, one_by_one, sample_sites
from pyrozoo.inference.bounds.terms import Terms, take_apart
from pyrozoo.inference.drawing import draw_summed, rows_first, with_draws
from pyrozoo.inference.graph import Site
from pyrozoo.inference.modes import evaluating, seeded
from pyrozoo.inference.observing import Net, Observed, observe
from pyrozoo.inference.plan import Plan
from pyrozoo.inference.reading import read_count

Free = dict[str, Tensor]  # site -> its value in the unconstrained space
RADIUS = 2.0  # chains start between -2 and 2 in the unconstrained space
TRIES = 100
TOGETHER = 250  # draws that are looked at in one pass


@dataclass(frozen=True)
class Reference:
    """Draws from a posterior, and how far they can be trusted.

    Attributes:
        draws: site -> ``(chains * draws, rows, *event)``, shared ones ``(chains * draws, *event)``,
            chain after chain; as :func:`.posterior.posterior` returns them.
        r_hat: site -> the largest split R-hat of its entries; 1 when the chains agree.
        ess: site -> the smallest effective number of draws of its entries.
        divergences: draws at which the integrator diverged; none, if all is well.
        num_chains: that were run.
    """

    draws: dict[str, Tensor]
    r_hat: dict[str, float]
    ess: dict[str, float]
    divergences: int
    num_chains: int


def nuts(
    program: Net,
    data: Data,
    *,
    num_samples: int = 1000,
    warmup_steps: int = 500,
    num_chains: int = 1,
    seed: int = 0,
    inputs: Iterable[str] = (),
    target_accept_prob: float = 0.8,
    max_tree_depth: int = 10,
    full_mass: bool = False,
    progress: bool = False,
) -> Reference:
    """Draw from the posterior of all latent sites of a program.

    All rows are sampled together.  Finite sites, inside or outside of plate ``"data"``, are summed;
    if there are no others the draws are independent and exact.  What is missing is marginalised if
    it is a leaf, and else sampled like any latent site.  Scales of training play no part.

    Args:
        program: with its parameters as they are.
        data: what is known.
        num_samples, warmup_steps: per chain.
        num_chains: run one after the other.
        seed: of chain 0; chain k has ``seed + k``.  The global random state is left as it was.
        inputs: names of values that are read but are no sites.
        target_accept_prob, max_tree_depth, full_mass: of the sampler.
        progress: show a bar.

    Raises:
        ValueError: a latent site is discrete without a finite support, or continuous and known in
            part; the program enumerates in a markov context or one value at a time; no start with a
            finite density was found; there are no rows; or a value or an option does not fit.
    """
    num_samples = read_count("num_samples", num_samples, 4)
    warmup_steps = read_count("warmup_steps", warmup_steps, 0)
    num_chains = read_count("num_chains", num_chains)
    p = observe(program, inputs)
    batch = p.pairing.prepare(data)
    if len(batch) == 0:
        raise ValueError("the data have no rows")
    chains: list[dict[str, Tensor]] = []
    divergences = 0
    with evaluating(p), poutine.block(), pyro.validation_enabled(False):
        with seeded(seed):
            plan = p.pairing.plan(batch)
            free = _free(plan)
        for chain in range(num_chains):
            with seeded(seed + chain):
                points: Free = {}
                if free:
                    potential, start = _start(p, batch, plan, free)
                    kernel = NoUTurn(
                        potential_fn=potential,
                        target_accept_prob=target_accept_prob,
                        max_tree_depth=max_tree_depth,
                        full_mass=full_mass,
                    )
                    run = MCMC(
                        kernel, num_samples, warmup_steps, start, disable_progbar=not progress
                    )
                    run.run()
                    points = run.get_samples()
                    divergences += len(run.diagnostics()["divergences"]["chain 0"])
                chains.append(_finish(p, batch, plan, points, num_samples))
    r_hat, ess = {}, {}
    for name in free:
        each = torch.stack([chain[name] for chain in chains]).double()
        r_hat[name] = float(split_gelman_rubin(each).nan_to_num(1.0).max())
        count = effective_sample_size(each).nan_to_num(float(num_chains * num_samples))
        ess[name] = float(count.clamp(min=1.0).min())
    draws = {name: torch.cat([chain[name] for chain in chains]) for name in chains[0]}
    return Reference(draws, r_hat, ess, divergences, num_chains)


def _free(plan: Plan) -> list[str]:
    """The sites to be sampled."""
    free = []
    for name, role in plan.roles.items():
        site = plan.program.sites[name]
        if role in ("given", "masked", "own", "fixed"):
            continue
        if site.infer.get("_markov_depth"):
            raise ValueError(f"site {name!r} lies in a markov context, whose sums NUTS cannot take")
        if name in plan.summed:
            if site.infer.get("enumerate") == "sequential":
                raise ValueError(f"site {name!r} is enumerated one value at a time")
        elif role == "merged":
            raise ValueError(
                f"site {name!r} is continuous, has others below it and is known in part; NUTS needs"
                " it to be known everywhere or nowhere"
            )
        elif not site.continuous:
            raise ValueError(
                f"site {name!r} ({type(site.fn).__name__}) is discrete and has no finite support:"
                " it can be neither sampled by NUTS nor summed"
            )
        else:
            free.append(name)
    return free


class _Constrain(Messenger):
    """Give latent sites the values of points of the unconstrained space; add the log volumes."""

    def __init__(self, points: Free) -> None:
        super().__init__()
        self.points = points
        self.values: dict[str, Tensor] = {}
        self.volume: Any = 0.0

    def _pyro_sample(self, msg: Any) -> None:
        if (point := self.points.get(msg["name"])) is not None:
            transform = biject_to(msg["fn"].support)
            value = transform(point)
            self.volume = self.volume + transform.log_abs_det_jacobian(point, value).sum()
            self.values[msg["name"]] = msg["value"] = value
            msg["done"] = True


def _terms(p: Observed, batch: Batch, plan: Plan, at: _Constrain, draws: int = 0) -> Terms:
    """The terms of the program at some points; with ``draws`` the points are that many."""
    depth = nesting(plan)
    program: Any = EnumMessenger(-1 - depth - bool(draws))(p)
    if draws > 1:
        program = pyro.plate(PARTICLES, draws, dim=-1 - depth)(program)
    sites = sample_sites(poutine.trace(at(program)).get_trace(batch))
    plain = {name: {**site, "scale": 1.0} for name, site in sites.items()}
    return take_apart(plan, plain, {}, len(batch), draws or 1)


def _energy(p: Observed, batch: Batch, plan: Plan, points: Free) -> Tensor:
    """U of the module, a scalar."""
    at = _Constrain(points)
    terms = _terms(p, batch, plan, at)
    total = at.volume
    for parts in terms.plain.values():
        for value, _ in parts:
            total = total + value.sum()
    for group in terms.groups:
        total = total + contract(group, terms.sums, terms.plates).sum()
    return -total


class _Known(torch.autograd.Function):
    """A value whose gradients are known."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], *points: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return None, None, *(grads[0] * g for g in ctx.gradients)


def _start(
    p: Observed, batch: Batch, plan: Plan, free: list[str]
) -> tuple[Callable[[Free], Tensor], Free]:
    """The function U, and a point at which it is finite."""
    one: Any = poutine.trace(p).get_trace(batch)  # one value of each site, also below summed ones
    all_values: Any = poutine.trace(EnumMessenger(-1 - nesting(plan))(p)).get_trace(batch)
    like: Free = {}
    for name in free:
        value, support = one.nodes[name]["value"], one.nodes[name]["fn"].support
        try:
            like[name] = biject_to(support).inv(value)
        except NotImplementedError:
            raise ValueError(f"site {name!r}: NUTS has no way to sample from {support}") from None
        if biject_to(all_values.nodes[name]["fn"].support)(like[name]).shape != value.shape:
            raise ValueError(f"the support of site {name!r} depends on a site that is summed")

    def both(*points: Tensor) -> list[Tensor]:
        with torch.enable_grad():
            leaves = [point.detach().requires_grad_() for point in points]
            value = _energy(p, batch, plan, dict(zip(free, leaves, strict=True)))
            return [value.detach(), *torch.autograd.grad(value, leaves)]

    function: Callable[..., list[Tensor]] = both
    for _ in range(TRIES):
        start = {n: (2 * torch.rand_like(v) - 1) * RADIUS for n, v in like.items()}
        if all(bool(v.isfinite().all()) for v in both(*start.values())):
            break
    else:
        raise ValueError(f"no start with a finite density was found in {TRIES} tries")
    with warnings.catch_warnings(), contextlib.suppress(Exception):  # else as it is
        warnings.simplefilter("ignore")  # of the tracer's own
        graph = _fold(make_fx(both)(*start.values()))
        other = [v + 0.1 * torch.randn_like(v) for v in start.values()]
        pairs = zip(graph(*other), both(*other), strict=True)
        if all(torch.allclose(a, b, rtol=1e-4, equal_nan=True) for a, b in pairs):
            function = graph

    def potential(points: Free) -> Tensor:
        ordered = [points[name] for name in free]
        value, *gradients = function(*(point.detach() for point in ordered))
        return _Known.apply(value, gradients, *ordered)

    return potential, start


def _fold(graph: GraphModule) -> GraphModule:
    """The graph without what does not depend on its inputs, which is computed once."""
    values: dict[Node, Any] = {}
    for node in list(graph.graph.nodes):
        changed = any(_mutates(user) for user in node.users)
        if node.op == "get_attr":
            values[node] = getattr(graph, str(node.target))
        elif node.op != "call_function" or changed or _mutates(node):
            continue
        elif node.target in (torch.ops.aten.alias.default, torch.ops.aten.detach.default):
            node.replace_all_uses_with(node.args[0])
        elif all(source in values for source in node.all_input_nodes):
            args, options = map_arg((node.args, node.kwargs), values.__getitem__)
            if isinstance(value := node.target(*args, **options), Tensor):
                graph.register_buffer(f"_folded_{len(values)}", value)
                with graph.graph.inserting_before(node):
                    new = graph.graph.get_attr(f"_folded_{len(values)}")
                values[new] = value
                node.replace_all_uses_with(new)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def _mutates(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def _finish(
    p: Observed, batch: Batch, plan: Plan, points: Free, num_samples: int
) -> dict[str, Tensor]:
    """All latent sites at the draws of a chain, ``(draws, ...)`` by name; finite ones are drawn."""
    pieces: list[dict[str, Tensor]] = []
    depth, sites = nesting(plan), plan.program.sites
    together = 1 if one_by_one(p, batch) else TOGETHER
    for start in range(0, num_samples, together):
        some = {n: v[start : start + together] for n, v in points.items()}
        count = min(together, num_samples - start)
        if count > 1:
            some = {n: _spread(sites[n], v, depth) for n, v in some.items()}
        else:
            some = {n: v[0] for n, v in some.items()}
        at = _Constrain(some)
        terms = _terms(p, batch, plan, at, count)
        found = {n: with_draws(v, depth, len(sites[n].event_shape)) for n, v in at.values.items()}
        found |= draw_summed(terms, depth)
        pieces.append(
            {n: rows_first(sites[n], found[n]).detach() for n in plan.roles if n in found}
        )
    return {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}


def _spread(site: Site, points: Tensor, depth: int) -> Tensor:
    """``(draws, *plates, *)`` with the draws left of all plates of the program."""
    event = len(biject_to(site.fn.support).inverse_shape(site.event_shape))
    gap = (1,) * (depth - (points.dim() - 1 - event))
    return points.reshape(len(points), *gap, *points.shape[1:])
