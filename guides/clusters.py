"""Guides that take the cluster's proposal from the program's own mixture.

With q(z | given) of another guide, and p(y) p(z | y) read from a run of the program, the cluster of
a row is proposed as

============ ====================================================================================
geometric    q(y | .) = softmax_y(log p(y) + E_q log p(z | y)), the optimum for this q(z | .)
arithmetic   q(y | .) = E_q p(y | z), from a number of draws
nearest      one for the value at which the geometric proposal is largest, zero elsewhere
============ ====================================================================================

For the same q(z | .) the expected bound never falls from arithmetic to geometric to leaving y out
of the guide, where it is summed in the program.  A q(y | .) of its own network is
:class:`.Classifier`.

Sources: arithmetic is the claim of Jiang et al., "Variational deep embedding: an unsupervised and
generative approach to clustering" (2017); geometric is that of Falck et al., "Multi-facet
clustering variational autoencoders" (2021).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn
from torch.distributions import kl_divergence

from pyrozoo.guides.amortized import Drawn
from pyrozoo.guides.inputs import graph_of, local_site
from pyrozoo.inference import Batch
from pyrozoo.inference.graph import DATA, innermost
from pyrozoo.zoo.networks import one_hot

KINDS = ("geometric", "arithmetic", "nearest")


class _Enough(BaseException):  # passes through ``except Exception`` in a program
    pass


class _Listen(Messenger):
    """Remember distributions by site; give some sites a value, and stop after one of them."""

    def __init__(self, values: Mapping[str, Tensor] | None = None, last: str = "") -> None:
        super().__init__()
        self.values, self.last, self.found = dict(values or {}), last, dict[str, Any]()

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.values and not site_is_subsample(msg):
            msg["value"], msg["done"] = self.values[msg["name"]], True

    def _pyro_post_sample(self, msg: Any) -> None:
        self.found[msg["name"]] = msg["fn"]
        if msg["name"] == self.last:
            raise _Enough


def _divergence(q: Any, p: Any) -> Tensor:
    """KL(q || p), of a factorised normal also from a correlated one."""
    if isinstance(p, dist.MultivariateNormal) and isinstance(innermost(q), dist.Normal):
        q = dist.MultivariateNormal(q.mean, scale_tril=q.stddev.diag_embed())
    return kl_divergence(q, p)


class MixturePosterior(nn.Module):
    """Another guide, and y proposed from its q(z | .) and the program's p(y) p(z | y).

    ``geometric`` and ``nearest`` are held fixed in a step.  At the optimum the gradient of the
    expected bound through q(y | .) is zero, so that leaving it out changes no expectation, lowers
    the variance and saves a pass; with weights on single terms it is the optimum of the unweighted
    bound.  ``arithmetic`` is no optimum, and is differentiated through.

    The mixture is read by enumerating y and listening at z, so that any program will do whose y is
    ``Categorical`` and whose p(z | y) has, for ``arithmetic``, a density, and else a closed-form
    divergence.  Other sites that it depends on are those that the other guide has drawn or the
    batch knows.

    Args:
        program: what the guide is for.  It is held, not owned: its parameters are not the guide's.
        guide: proposes z, and not y.
        site: the cluster, a ``Categorical`` site.
        latent: the site whose distribution is the mixture.
        kind: ``"geometric"``, ``"arithmetic"`` or ``"nearest"``.
        num_draws: of z per row, for ``arithmetic``.
        example: a batch on which the program can be run, if it reads inputs.

    Raises:
        ValueError: a site or an option does not fit, named in the message.
    """

    def __init__(
        self,
        program: Any,
        guide: nn.Module,
        site: str = "y",
        latent: str = "z",
        kind: str = "geometric",
        num_draws: int = 16,
        example: Any = None,
    ) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"kind is one of {', '.join(KINDS)}, got {kind!r}")
        if num_draws < 1:
            raise ValueError(f"num_draws is at least 1, got {num_draws}")
        graph = graph_of(program, example)
        fn = local_site(graph, site).fn
        if not isinstance(fn, dist.Categorical):
            raise ValueError(
                f"site {site!r} is expected to be Categorical, not {type(fn).__name__}"
            )
        if site not in local_site(graph, latent).parents:
            raise ValueError(f"site {latent!r} is expected to depend on {site!r}, but does not")
        self._program = (program,)  # a tuple, or its parameters would become ours
        self._above = {
            name
            for name, other in graph.sites.items()
            if other.kind == "sample" and graph.descendants(name) & {site, latent}
        } - {site, latent}
        self.guide, self.site, self.latent = guide, site, latent
        self.kind, self.num_draws, self.num_values = kind, num_draws, int(fn.probs.shape[-1])

    def distribution(self, batch: Batch, proposal: Any, drawn: Mapping[str, Tensor]) -> Any:
        """``q(y | .)``, batch shape ``(*, rows)``.

        Args:
            batch: what is known.
            proposal: q(z | .), batch shape ``(*, rows)``.
            drawn: values of sites that the other guide has drawn, ``(*, rows, *event)``.

        Raises:
            ValueError: the mixture depends on a site that is neither drawn nor known everywhere, or
                there is no closed form for ``geometric``.
        """
        while isinstance(proposal, dist.MaskedDistribution):
            proposal = proposal.base_dist
        log_prior, component = self._mixture(batch, drawn, len(proposal.batch_shape))
        if self.kind == "arithmetic":
            z = proposal.rsample((self.num_draws,)).unsqueeze(1)
            share = (log_prior + component.log_prob(z)).log_softmax(1)
            logits = share.logsumexp(0) - math.log(self.num_draws)
            return dist.Categorical(logits=logits.movedim(0, -1))
        try:
            logits = (log_prior - _divergence(proposal, component)).movedim(0, -1).detach()
        except NotImplementedError:
            raise ValueError(
                f"site {self.latent!r}: no closed-form divergence of {type(proposal).__name__} from"
                f" {type(component).__name__}, use kind='arithmetic'"
            ) from None
        if self.kind == "nearest":
            best = one_hot(logits.argmax(-1), self.num_values, logits.dtype)
            return dist.Categorical(probs=best)
        return dist.Categorical(logits=logits)

    def _mixture(self, batch: Batch, drawn: Mapping[str, Tensor], depth: int) -> tuple[Tensor, Any]:
        """``log p(y)``, and ``p(z | y)`` with batch shape ``(K, *, rows)``: 1 + depth dims."""
        values = {}
        for name in self._above:
            if name not in drawn and (name not in batch or batch.partly(name)):
                raise ValueError(
                    f"sites {self.site!r} and {self.latent!r} depend on {name!r}, which is neither"
                    " drawn by the guide nor known everywhere"
                )
            values[name] = drawn[name] if name in drawn else batch[name]
        each = torch.arange(self.num_values, device=batch.device).reshape(-1, *[1] * depth)
        mixture = _Listen({**values, self.site: each}, self.latent)
        with poutine.block(), contextlib.suppress(_Enough), mixture:
            self._program[0](batch)
        log_prior = mixture.found[self.site].log_prob(each)
        return log_prior, mixture.found[self.latent]

    def forward(self, batch: Batch) -> Drawn:
        """Draw what the other guide proposes, and the cluster; returns the values by name."""
        with _Listen() as heard:
            drawn = dict(self.guide(batch))
        if self.latent not in heard.found:
            raise ValueError(f"the guide does not propose {self.latent!r}")
        fn = self.distribution(batch, heard.found[self.latent], drawn)
        with poutine.block(hide=[DATA]):  # a trace has the plate from the other guide
            rows = pyro.plate(DATA, len(batch))
        with rows:
            return {**drawn, self.site: pyro.sample(self.site, fn)}
