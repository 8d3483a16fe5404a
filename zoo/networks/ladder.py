"""A decoder of several latents that enter one above the other, each through a gate."""

import itertools
from collections.abc import Sequence

import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor, nn

from pyrozoo.zoo.networks.likelihoods import Likelihood
from pyrozoo.zoo.networks.likelihoods import likelihood as make_likelihood
from pyrozoo.zoo.networks.mlp import MLP


class LadderDecoder(nn.Module):
    """A decoder with one rung for each latent, the last latent on top.

    With r_j hidden layers on z_j and s_j layers of the backbone, from the top down ::

        h_J = gate_J r_J(z_J),    h_j = s_(j+1)(h_(j+1)) + share gate_j r_j(z_j),    x ~ s_1(h_1)

    A latent whose gate is zero has no part in x, and what is on its rung gets no gradient.

    Args:
        latent_dims: widths of the latents z_1 .. z_J, the top one last.
        hidden: widths of the rungs, in the same order.
        event_shape: the shape of one observation.
        likelihood: a name or a module; see `pyrozoo.zoo.networks.likelihood`.
        activation: a name (see `make_activation`) or a module, copied for each layer.
        depth: layers of the same width that each r_j and s_j has.
        share: how much a rung below the top adds when its gate is open.

    Attributes:
        gate: buffer of shape (J,), ones at first; see `set_gate`.

    Raises:
        ValueError: if there is no latent, or not one width of a rung for each, or a width, the
            activation or the likelihood is not valid.

    Source: Zhao, Song, Ermon, "Learning hierarchical features from deep generative models" (2017);
    the fixed share is that of the code of Falck et al., "Multi-facet clustering variational
    autoencoders" (2021).
    """

    gate: Tensor

    def __init__(
        self,
        latent_dims: Sequence[int],
        hidden: Sequence[int],
        event_shape: int | Sequence[int],
        likelihood: str | Likelihood = "bernoulli",
        activation: str | nn.Module = "relu",
        depth: int = 1,
        share: float = 0.1,
    ) -> None:
        super().__init__()
        if not latent_dims or len(latent_dims) != len(hidden):
            raise ValueError(
                f"expected one width of a rung for each latent, got {len(hidden)} for"
                f" {len(latent_dims)}"
            )
        self.share = share
        self.likelihood = make_likelihood(likelihood, event_shape)
        self.rungs = nn.ModuleList(
            MLP(width, (rung,) * depth, activation=activation)
            for width, rung in zip(latent_dims, hidden, strict=True)
        )
        bottom = MLP(hidden[0], (hidden[0],) * depth, self.likelihood.num_params, activation)
        steps = [
            MLP(above, (below,) * depth, activation=activation)
            for below, above in itertools.pairwise(hidden)
        ]
        self.backbone = nn.ModuleList([bottom, *steps])
        self.register_buffer("gate", torch.ones(len(hidden)))

    def forward(self, *latents: Tensor) -> TorchDistributionMixin:
        """Return the likelihood, with batch shape `*` and its own event shape.

        Args:
            latents: tensors of shapes (*, latent_dims[0]), (*, latent_dims[1]), ...; their leading
                dimensions broadcast.

        Raises:
            ValueError: if the number of latents, their widths or their leading shapes do not fit.
        """
        if len(latents) != len(self.rungs):
            raise ValueError(f"expected {len(self.rungs)} latents, got {len(latents)}")
        *below, top = zip(self.gate, self.rungs, latents, strict=True)
        gate, rung, z = top
        out = self.backbone[-1](gate * rung(z))
        for step, (gate, rung, z) in zip(self.backbone[-2::-1], below[::-1], strict=True):
            out = step(out + self.share * gate * rung(z))
        return self.likelihood(out)

    @torch.no_grad()
    def set_gate(self, values: Sequence[float]) -> None:
        """Move the gates to these values, the first latent's first, in place.

        In place, so that a staged loss sees it; as a buffer, so that it is saved with the
        parameters.

        Raises:
            ValueError: if there is not one value for each latent.
        """
        if len(values) != len(self.gate):
            raise ValueError(f"expected {len(self.gate)} gates, got {len(values)}")
        self.gate.copy_(torch.as_tensor(values, dtype=self.gate.dtype))
