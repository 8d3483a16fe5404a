"""Refined guides: what a network proposes for a row, corrected for that very row.

With ``lambda(x)`` the parameters that an amortised guide gives to a site, row n is proposed as ::

    q_n(z) = q(z; lambda(x_n) + delta_n),      delta_n = argmax of the row's own bound, from zero

in the same family, program and networks fixed.  With ``L`` the bound, its shortfall falls apart::

    log p(x) - L[q] = (log p(x) - L[q_n]) + (L[q_n] - L[q]) = approximation gap + amortisation gap

Sources: Kim et al., "Semi-amortized variational autoencoders" (2018); Cremer, Li, Duvenaud,
"Inference suboptimality in variational autoencoders" (2018).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from pyrozoo.inference.batch import Batch, Data
from pyrozoo.inference.bounds.elbo import EnumELBO
from pyrozoo.inference.graph import DATA, read_graph
from pyrozoo.inference.modes import evaluating, seeded
from pyrozoo.inference.observing import Net

ROW = "row"  # an input that says which rows a batch holds
_FINITE = (dist.Categorical, dist.OneHotCategorical, dist.Bernoulli)


def _shapes(fn: Any) -> dict[str, torch.Size] | None:
    """The shape of each correction, plates included; None if the family is not known."""
    if isinstance(
        fn, torch.distributions.Independent | torch.distributions.TransformedDistribution
    ):
        return _shapes(fn.base_dist)
    if isinstance(fn, _FINITE):
        return {"logits": fn.logits.shape}
    if isinstance(fn, dist.NegativeBinomial):
        return {"concentration": fn.logits.shape, "logits": fn.logits.shape}
    if isinstance(fn, torch.distributions.MultivariateNormal):
        return {"loc": fn.loc.shape, "tril": fn.scale_tril.shape}
    if isinstance(fn, torch.distributions.LowRankMultivariateNormal):
        return {"loc": fn.loc.shape, "scale": fn.loc.shape, "factor": fn.cov_factor.shape}
    if isinstance(fn, torch.distributions.StudentT):
        return {"loc": fn.loc.shape, "scale": fn.loc.shape, "df": fn.loc.shape}
    if isinstance(fn, torch.distributions.Normal) or hasattr(fn, "moved"):
        return {"loc": fn.loc.shape, "scale": fn.loc.shape}
    return None


def _shifted(fn: Any, by: dict[str, Tensor]) -> Any:
    """The same family, corrected: locations in units of the scale, scales by a factor exp(.)."""
    if isinstance(fn, torch.distributions.Independent):
        return _shifted(fn.base_dist, by).to_event(fn.reinterpreted_batch_ndims)
    if isinstance(fn, torch.distributions.TransformedDistribution):
        return dist.TransformedDistribution(_shifted(fn.base_dist, by), fn.transforms)
    if isinstance(fn, _FINITE):
        return type(fn)(logits=fn.logits + by["logits"])
    if isinstance(fn, dist.NegativeBinomial):
        concentration = fn.total_count * by["concentration"].exp()
        return dist.NegativeBinomial(concentration, logits=fn.logits + by["logits"])
    if isinstance(fn, torch.distributions.MultivariateNormal):
        loc = fn.loc + (fn.scale_tril @ by["loc"].unsqueeze(-1)).squeeze(-1)
        diagonal = by["tril"].diagonal(dim1=-2, dim2=-1).exp().diag_embed()
        return dist.MultivariateNormal(
            loc, scale_tril=fn.scale_tril @ (by["tril"].tril(-1) + diagonal)
        )
    if isinstance(fn, torch.distributions.LowRankMultivariateNormal):
        scale = fn.cov_diag.sqrt()
        factor = fn.cov_factor + scale.unsqueeze(-1) * by["factor"]
        variance = fn.cov_diag * (2 * by["scale"]).exp()
        return dist.LowRankMultivariateNormal(fn.loc + scale * by["loc"], factor, variance)
    loc, scale = fn.loc + fn.scale * by["loc"], fn.scale * by["scale"].exp()
    if isinstance(fn, torch.distributions.StudentT):
        return dist.StudentT(2 + (fn.df - 2) * by["df"].exp(), loc, scale)
    if hasattr(fn, "moved"):  # a flow
        return fn.moved(loc, scale)
    return dist.Normal(loc, scale)


class _Correct(Messenger):
    """Corrects the distributions of a guide's sites; remembers the finite ones' values."""

    def __init__(self, owner: Refined, rows: Tensor | None) -> None:
        super().__init__()
        self.owner, self.rows, self.drawn = owner, rows, dict[str, Tensor]()

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.owner.corrected:
            by = self.owner.corrections(msg["name"], self.drawn, self.rows)
            msg["fn"] = _shifted(msg["fn"], by)

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["name"] in self.owner.picking:
            one_hot = bool(msg["fn"].event_shape)
            self.drawn[msg["name"]] = msg["value"].argmax(-1) if one_hot else msg["value"].long()


class Refined(nn.Module):
    """Another guide with a correction of every site's parameters for each row; at first none.

    Normals (also with a covariance, full or of low rank), Student's t, their transforms to other
    supports, negative binomials and finite sites are corrected in all their parameters; of a flow
    the location and the scale around it; point masses stay.  A site that depends on finite sites of
    the guide has a correction for each of their values.  Global sites are corrected too.

    Rows are told by their position in ``data``; a batch with an input ``"row"`` (integers) says
    itself which rows it holds, for minibatches and slices: pass ``inputs=["row"]`` on.

    Args:
        guide: any guide; its parameters are those of this guide too.
        data: the rows, as the guide reads them.

    Attributes:
        offsets: the corrections, ``(*values of finite parents, *plates, *event)`` by site and
            parameter.
        corrected: site -> the parameters that are corrected.
        picking: the finite sites whose values pick a correction.

    Raises:
        ValueError: a site's distribution is of no family named above.  When called: another number
            of rows.

    Source: see the module.
    """

    def __init__(self, guide: nn.Module, data: Data) -> None:
        super().__init__()
        batch = Batch.of(data)
        self.guide, self.rows = guide, len(batch)
        self.offsets = nn.ParameterDict()
        self.corrected: dict[str, list[str]] = {}
        self._plates: dict[str, tuple[torch.Size, int | None]] = {}
        self._finite: dict[str, list[str]] = {}
        self.picking: set[str] = set()
        sites = read_graph(guide, batch).sites
        like = next((p for p in guide.parameters() if p.is_floating_point()), torch.zeros(()))
        for name, site in sites.items():
            if site.kind != "sample" or site.fixed:
                continue
            shapes = _shapes(site.fn)
            if shapes is None:
                raise ValueError(
                    f"site {name!r}: a {type(site.fn).__name__} cannot be refined; normals (full,"
                    " of low rank), Student's t, flows, their transforms and finite sites can"
                )
            plates = torch.Size(site.fn.batch_shape)
            parents = [n for n in sites if n in site.parents and isinstance(sites[n].fn, _FINITE)]
            counts = [len(sites[n].fn.enumerate_support(expand=False)) for n in parents]
            self._finite[name], self.corrected[name] = parents, list(shapes)
            self.picking.update(parents)
            self._plates[name] = plates, site.dims.get(DATA)
            for which, shape in shapes.items():
                zero = like.new_zeros([*counts, *shape])
                self.offsets[self._key(name, which)] = nn.Parameter(zero.detach())

    @staticmethod
    def _key(name: str, which: str) -> str:
        return f"{name}_{which}".replace(".", "_")

    def corrections(
        self, name: str, drawn: dict[str, Tensor], rows: Tensor | None
    ) -> dict[str, Tensor]:
        """The corrections of a site by parameter, ``(*, *plates, *event)``, at drawn values."""
        plates, data_dim = self._plates[name]
        index = [drawn[n] for n in self._finite[name]]
        for i, size in enumerate(plates):
            at = torch.arange(size, device=self._device(name))
            if rows is not None and i - len(plates) == data_dim:
                at = rows
            index.append(at.reshape(-1, *[1] * (len(plates) - 1 - i)))
        tables = {w: self.offsets[self._key(name, w)] for w in self.corrected[name]}
        return {w: table[tuple(index)] if index else table for w, table in tables.items()}

    def _device(self, name: str) -> torch.device:
        return self.offsets[self._key(name, self.corrected[name][0])].device

    def forward(self, batch: Batch) -> Any:
        """Draw what the other guide proposes, corrected."""
        rows = batch[ROW].long() if ROW in batch else None
        if rows is None and len(batch) != self.rows:
            raise ValueError(
                f"the guide was refined for {self.rows} rows, but the batch has {len(batch)}; a"
                f" batch of some of them says which with an input {ROW!r}"
            )
        with _Correct(self, rows):
            return self.guide(batch)


def refine(
    program: Net,
    guide: nn.Module,
    data: Data,
    steps: int = 300,
    lr: float = 0.1,
    num_particles: int = 8,
    *,
    objective: EnumELBO | None = None,
    inputs: Iterable[str] = (),
    seed: int = 0,
) -> Refined:
    """A guide for exactly these rows, each corrected by gradient steps on its own bound.

    Program and guide are run in evaluation mode and stay as they are, their gradients too; the
    global random state as well.  Adam, with a rate that falls to zero over the second half of the
    steps, whose iterates are averaged.

    Args:
        program, guide: the fitted pair.
        data: the rows.
        steps: gradient steps, each on all rows at once.
        lr: the rate at the start.
        num_particles: draws of the guide per row and step.
        objective: another bound than ``EnumELBO(num_particles, inputs=inputs)``.
        inputs: names of values that are read but are no sites.
        seed: of the draws.

    Raises:
        ValueError: see :class:`Refined`; or the guide has no site that could be refined.
    """
    objective = objective or EnumELBO(num_particles, split=False, inputs=tuple(inputs))
    batch = objective.pair(program, guide)[0].pairing.prepare(data)
    refined = Refined(guide, batch)
    offsets = list(refined.offsets.values())
    if not offsets:
        raise ValueError("the guide has no site that could be refined")
    optimizer = torch.optim.Adam(offsets, lr)
    means = [torch.zeros_like(parameter) for parameter in offsets]
    with evaluating(program, refined), seeded(seed):
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = lr * min(1.0, 2 * (1 - step / steps))
            loss = objective.differentiable_loss(program, refined, batch) * len(batch)
            grads = torch.autograd.grad(loss, offsets, allow_unused=True)
            for parameter, grad in zip(offsets, grads, strict=True):
                parameter.grad = grad
            optimizer.step()
            share = max(1, step - steps // 2)
            for mean, parameter in zip(means, offsets, strict=True):
                mean.lerp_(parameter.detach(), 1 / share)
    for mean, parameter in zip(means, offsets, strict=True):
        parameter.grad = None
        with torch.no_grad():
            parameter.copy_(mean)
    return refined
