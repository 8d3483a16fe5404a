"""A classifier for one finite site, and a product of one Gaussian per modality."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyrozoo.guides.inputs import Inputs, first_dtype, graph_of, local_site
from pyrozoo.guides.parts import Drawn, Part
from pyrozoo.inference import Batch
from pyrozoo.zoo import networks


class Classifier(Part):
    """``q(y | given)`` for a finite site: summed exactly where it is unknown, as in M2.

    Args:
        program: what the guide is for.
        site: a ``Categorical`` site of the program.
        given: sites that are read.
        hidden, activation: of the network.
        network: a module of your own, from the given values to a distribution.
        example: a batch on which the program can be run, if it reads inputs.
    """

    def __init__(
        self,
        program: Any,
        site: str,
        given: Sequence[str],
        hidden: Sequence[int] = (500,),
        activation: str = "relu",
        network: nn.Module | None = None,
        example: Any = None,
    ) -> None:
        super().__init__()
        graph = graph_of(program, example)
        fn = local_site(graph, site).fn
        if not isinstance(fn, dist.Categorical):
            raise ValueError(
                f"site {site!r} is expected to be Categorical, not {type(fn).__name__}"
            )
        self.site, self.given = site, tuple(given)
        self.inputs = Inputs(graph, given, site)
        self._own = network is not None
        self.network = network or networks.Classifier(
            self.inputs.widths, hidden, fn.probs.shape[-1], activation
        )

    def distribution(self, batch: Batch, drawn: Mapping[str, Tensor] | None = None) -> Any:
        """``q(y | given)``, batch shape ``(*, rows)``."""
        dtype = first_dtype(self.network)
        if self._own:
            values = [self.inputs.value(g, batch, drawn or {}, dtype) for g in self.given]
        else:
            values = self.inputs(batch, drawn or {}, dtype)
        return self.network(*values)

    def inside(self, batch: Batch, drawn: Mapping[str, Tensor]) -> Drawn:
        """Draw the site (under an enumerating objective: all its values)."""
        return {self.site: pyro.sample(self.site, self.distribution(batch, drawn))}


class ProductOfExperts(Part):
    """A Gaussian whose precision is the sum of the precisions of the experts that see something.

    With ``T_m`` the precision of the expert of modality m, zero in rows where m is missing::

        T = 1 + sum_m T_m,    q(z | given) = Normal(sum_m T_m loc_m / T, T^(-1/2))

    The one is the prior, a standard normal; a row without any modality falls back to it.

    Args:
        program: what the guide is for.
        given: the modalities, one expert each.
        site: the shared latent site.
        hidden, activation: of each expert.
        network: modality -> a module of your own that returns a Normal (``.to_event(1)``).
        example: a batch on which the program can be run, if it reads inputs.

    Source: Wu and Goodman, "Multimodal generative models for scalable weakly-supervised learning"
    (2018).
    """

    def __init__(
        self,
        program: Any,
        given: Sequence[str],
        site: str = "z",
        hidden: Sequence[int] = (512, 512),
        activation: str = "relu",
        network: Mapping[str, nn.Module] | None = None,
        example: Any = None,
    ) -> None:
        super().__init__()
        graph = graph_of(program, example)
        latent_dim = local_site(graph, site).event_shape.numel()
        self.site, self.given = site, tuple(given)
        self.inputs = nn.ModuleDict({m: Inputs(graph, [m], site) for m in given})
        self.experts = nn.ModuleDict(
            {
                m: (network or {}).get(m)
                or networks.Encoder(
                    cast(Inputs, self.inputs[m]).widths, hidden, latent_dim, activation
                )
                for m in given
            }
        )
        self._own = frozenset(network or {})

    def distribution(self, batch: Batch, drawn: Mapping[str, Tensor] | None = None) -> Any:
        """``q(z | given)``, batch shape ``(*, rows)``."""
        precision: Any = 1.0
        weighted: Any = 0.0
        for name in self.given:
            present = batch.present(name).reshape(len(batch), -1).any(1)
            known = (present | torch.full_like(present, name in (drawn or {}))).unsqueeze(-1)
            normal = self._normal(name, batch, drawn or {})
            share = known / normal.scale**2
            precision = precision + share
            weighted = weighted + share * normal.loc
        return dist.Normal(weighted / precision, precision**-0.5).to_event(1)

    def _normal(self, name: str, batch: Batch, drawn: Mapping[str, Tensor]) -> Any:
        """What the expert of a modality says, ``(*, rows, D)``."""
        expert, inputs = self.experts[name], cast(Inputs, self.inputs[name])
        dtype = first_dtype(expert)

        def run() -> Any:
            if name in self._own:
                return expert(inputs.value(name, batch, drawn, dtype)).base_dist
            return expert(*inputs(batch, drawn, dtype)).base_dist

        return run() if name in drawn else batch.once((id(self), name), run)

    def inside(self, batch: Batch, drawn: Mapping[str, Tensor]) -> Drawn:
        """Draw the shared latent site."""
        return {self.site: pyro.sample(self.site, self.distribution(batch, drawn))}
