"""Finite sites without their exact sum: what it saves is seen by taking it away.

============ ======================================================================================
Sampled      ``y ~ q(y | .)``, one value, gradient by the score function: unbiased, noisy
Relaxed      ``y = one_hot(argmax(l + g))``, ``g`` standard Gumbel noise, so that ``y ~ q(y | .)``
             exactly; backwards as if it were ``softmax((l + g) / temperature)``: biased, less noisy
============ ======================================================================================

The value of the bound is unbiased with both.  The exact sum has neither noise nor bias.

Sources: Jang, Gu, Poole, "Categorical reparameterization with Gumbel-softmax" (2017), the
straight-through estimator; Schulman et al., "Gradient estimation using stochastic computation
graphs" (2015), for the score function.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions.utils import clamp_probs

from pyrozoo.guides.inputs import Inputs, first_dtype, graph_of, local_site
from pyrozoo.guides.parts import Drawn, Part
from pyrozoo.inference import Batch
from pyrozoo.inference.graph import DATA
from pyrozoo.zoo.networks import MLP


class StraightThrough(dist.OneHotCategorical):
    """One-hot draws whose gradient is that of a softmax with Gumbel noise.

    Args:
        temperature: of the softmax; small ones have less bias and more noise.
        logits: ``(*, K)``.
    """

    has_rsample = True
    has_enumerate_support = False

    def __init__(self, temperature: float, logits: Tensor, validate_args: Any = None) -> None:
        self.temperature = temperature
        super().__init__(logits=logits, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> StraightThrough:
        """The same with another batch shape."""
        shape = torch.Size(batch_shape) + self.event_shape
        return StraightThrough(self.temperature, self.logits.expand(shape))

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """A one-hot draw ``(sample_shape, *, K)``, through which biased gradients flow."""
        logits = self.logits.expand(self._extended_shape(torch.Size(sample_shape)))
        gumbel = -(-clamp_probs(torch.rand_like(logits)).log()).log()
        soft = ((logits + gumbel) / self.temperature).softmax(-1)
        hard = torch.zeros_like(soft).scatter(-1, soft.argmax(-1, keepdim=True), 1.0)
        return hard + (soft - soft.detach())

    def log_prob(self, value: Tensor) -> Tensor:
        """The log-probability of one-hot values, linear in them."""
        return (value * self.logits).sum(-1)


class Relaxed(Part):
    """``q(y | given)`` for a one-hot site, drawn in place of summed (straight-through).

    The program has to read y as a one-hot vector: an integer that indexes a table has no gradient.

    Args:
        program: what the guide is for.
        site: a ``OneHotCategorical`` site of the program.
        given: sites that are read.
        temperature: see :class:`StraightThrough`.
        hidden, activation: of the network.
        example: a batch on which the program can be run, if it reads inputs.

    Raises:
        ValueError: the site is another than that, or the temperature is not positive.
    """

    def __init__(
        self,
        program: Any,
        site: str,
        given: Sequence[str],
        temperature: float = 0.5,
        hidden: Sequence[int] = (500,),
        activation: str = "relu",
        example: Any = None,
    ) -> None:
        super().__init__()
        graph = graph_of(program, example)
        found = local_site(graph, site)
        fn, self.data_dim = found.fn, found.dims[DATA]
        if not temperature > 0:
            raise ValueError(f"the temperature is positive, got {temperature}")
        if isinstance(fn, dist.Categorical | dist.Bernoulli):
            raise ValueError(
                f"site {site!r} is {type(fn).__name__}: the program reads it as a number that picks"
                " an entry or a branch, through which no gradient flows; write it as"
                " OneHotCategorical to relax it, or leave it out of the guide to sum it exactly"
            )
        if not isinstance(fn, dist.OneHotCategorical):
            raise ValueError(f"site {site!r} is OneHotCategorical, not {type(fn).__name__}")
        self.site, self.temperature = site, temperature
        self.inputs = Inputs(graph, given, site)
        self.network = MLP(self.inputs.widths, hidden, fn.event_shape[0], activation)

    def distribution(self, batch: Batch, drawn: Mapping[str, Tensor] | None = None) -> Any:
        """``q(y | given)``, batch shape ``(*, rows)``, event shape ``(K,)``."""
        logits = self.network(*self.inputs(batch, drawn or {}, first_dtype(self.network)))
        return StraightThrough(self.temperature, logits)

    def inside(self, batch: Batch, drawn: Mapping[str, Tensor]) -> Drawn:
        """Draw the site."""
        return {self.site: pyro.sample(self.site, self.distribution(batch, drawn))}


class _Once(Messenger):
    def __init__(self, sites: Sequence[str]) -> None:
        super().__init__()
        self.sites = sites

    def _pyro_sample(self, msg: Any) -> None:
        if msg["fn"].has_enumerate_support and (not self.sites or msg["name"] in self.sites):
            msg["infer"] = {**msg["infer"], "enumerate": None}


class Sampled(nn.Module):
    """Another guide whose finite sites are drawn, one value each, in place of being enumerated.

    ``EnumELBO`` leaves such guides to Pyro's ``TraceEnum_ELBO`` and says so; the gradient is that
    of the score function, without a baseline.

    Args:
        guide: any guide that proposes finite sites.
        sites: those that are drawn; default: all.
    """

    def __init__(self, guide: nn.Module, sites: Sequence[str] = ()) -> None:
        super().__init__()
        self.guide, self.sites = guide, tuple(sites)

    def forward(self, batch: Batch) -> Any:
        """Draw what the other guide proposes."""
        with _Once(self.sites):
            return self.guide(batch)
