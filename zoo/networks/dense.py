"""Encoders, decoders and classifiers on vectors: an `MLP`, and the distribution it describes."""

from collections.abc import Sequence

import pyro.distributions as dist
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor, nn

from pyrozoo.zoo.networks.likelihoods import (
    Likelihood,
    inverse_positive_scale,
    positive_scale,
)
from pyrozoo.zoo.networks.likelihoods import likelihood as make_likelihood
from pyrozoo.zoo.networks.mlp import MLP


class GaussianEncoder(nn.Module):
    """Any trunk, followed by one linear head for the location and one for the scale.

    Training `trunk` and `loc` alone trains the encoder of an autoencoder.

    Args:
        trunk: maps the inputs to features of shape (*, features).
        features: the width of the trunk's output.
        latent_dim: the width of the latent variable.
        init_scale: if given, the scale starts at this constant, with zero weights.

    Attributes:
        trunk: the trunk.
        loc: the `nn.Linear` head of the location.
        raw_scale: the `nn.Linear` head whose output `positive_scale` turns into the scale,
            `softplus(raw) + MIN_SCALE`.

    Raises:
        ValueError: if `init_scale` is not above `MIN_SCALE`.
    """

    def __init__(
        self, trunk: nn.Module, features: int, latent_dim: int, init_scale: float | None = None
    ) -> None:
        super().__init__()
        self.trunk = trunk
        self.loc = nn.Linear(features, latent_dim)
        self.raw_scale = nn.Linear(features, latent_dim)
        if init_scale is not None:
            nn.init.zeros_(self.raw_scale.weight)
            nn.init.constant_(self.raw_scale.bias, inverse_positive_scale(init_scale))

    def forward(self, *inputs: Tensor) -> TorchDistributionMixin:
        """Return a normal distribution with batch shape `*` and event shape (latent_dim,).

        Args:
            inputs: what the trunk wants, such as (*, D); leading dimensions broadcast.

        Raises:
            ValueError: if the trunk does not accept the shapes.
        """
        features = self.trunk(*inputs)
        scale = positive_scale(self.raw_scale(features))
        return dist.Normal(self.loc(features), scale).to_event(1)


class Encoder(GaussianEncoder):
    """A `GaussianEncoder` whose trunk is an `MLP` of one or several inputs.

    Args:
        in_dims: the width of the input, or the widths of several inputs.
        hidden: the widths of the hidden layers; () makes location and scale linear.
        latent_dim: the width of the latent variable.
        activation: a name (see `make_activation`) or a module, copied for each layer.
        init_scale: if given, the scale starts at this constant, with zero weights.

    Raises:
        ValueError: if a width, the activation or `init_scale` is not valid.
    """

    def __init__(
        self,
        in_dims: int | Sequence[int],
        hidden: Sequence[int],
        latent_dim: int,
        activation: str | nn.Module = "relu",
        init_scale: float | None = None,
    ) -> None:
        trunk = MLP(in_dims, hidden, activation=activation)
        super().__init__(trunk, trunk.out_dim, latent_dim, init_scale)


class Decoder(nn.Module):
    """An `MLP` of one or several inputs, followed by a likelihood.

    Args:
        in_dims: the width of the input, or the widths of several inputs.
        hidden: the widths of the hidden layers.
        event_shape: the shape of one observation.
        likelihood: a name or a module; see `pyrozoo.zoo.networks.likelihood`.
        activation: a name (see `make_activation`) or a module, copied for each layer.

    Raises:
        ValueError: if a width, the activation or the likelihood is not valid.
    """

    def __init__(
        self,
        in_dims: int | Sequence[int],
        hidden: Sequence[int],
        event_shape: int | Sequence[int],
        likelihood: str | Likelihood = "bernoulli",
        activation: str | nn.Module = "relu",
    ) -> None:
        super().__init__()
        self.likelihood = make_likelihood(likelihood, event_shape)
        self.mlp = MLP(in_dims, hidden, self.likelihood.num_params, activation)

    def forward(self, *inputs: Tensor) -> TorchDistributionMixin:
        """Return the likelihood, with batch shape `*` and its own event shape.

        Args:
            inputs: tensors of shapes (*, in_dims[0]), (*, in_dims[1]), ...; their leading
                dimensions broadcast.

        Raises:
            ValueError: if the number of inputs, their widths or their leading shapes do not fit.
        """
        return self.likelihood(self.mlp(*inputs))


class Classifier(nn.Module):
    """An `MLP` of one or several inputs that returns a categorical distribution.

    Args:
        in_dims: the width of the input, or the widths of several inputs.
        hidden: the widths of the hidden layers.
        num_classes: the number of classes.
        activation: a name (see `make_activation`) or a module, copied for each layer.

    Raises:
        ValueError: if a width or the activation is not valid.
    """

    def __init__(
        self,
        in_dims: int | Sequence[int],
        hidden: Sequence[int],
        num_classes: int,
        activation: str | nn.Module = "relu",
    ) -> None:
        super().__init__()
        self.mlp = MLP(in_dims, hidden, num_classes, activation)

    def forward(self, *inputs: Tensor) -> dist.Categorical:
        """Return a categorical distribution with batch shape `*` and event shape ().

        Args:
            inputs: tensors of shapes (*, in_dims[0]), (*, in_dims[1]), ...; their leading
                dimensions broadcast.

        Raises:
            ValueError: if the number of inputs, their widths or their leading shapes do not fit.
        """
        return dist.Categorical(logits=self.mlp(*inputs))
