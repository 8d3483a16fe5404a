"""Convolutional encoders and decoders of images; normalisation layers are left out on purpose."""

import itertools
import math
from collections.abc import Sequence

import pyro.distributions as dist
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor, nn

from pyrozoo.zoo.networks.batched import batched
from pyrozoo.zoo.networks.dense import GaussianEncoder
from pyrozoo.zoo.networks.likelihoods import Likelihood
from pyrozoo.zoo.networks.likelihoods import likelihood as make_likelihood
from pyrozoo.zoo.networks.mlp import MLP, make_activation


class ConvEncoder(GaussianEncoder):
    """Strided convolutions, one hidden layer, and the heads of a `GaussianEncoder`.

    Args:
        image_shape: (C, H, W) with H, W >= 4; each convolution halves H and W, rounding up.
        latent_dim: the width of the latent variable.
        channels: the channels after each convolution.
        hidden: the width of the hidden layer.
        activation: a name (see `make_activation`) or a module, copied for each layer.
        init_scale: if given, the scale starts at this constant, with zero weights.
        extra_dims: the widths of further inputs, such as a one-hot class. They join the image
            at the hidden layer, so that the convolutions are not repeated for each class.

    Raises:
        ValueError: if a shape, a width, the activation or `init_scale` is not valid.
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        latent_dim: int,
        channels: Sequence[int] = (32, 64),
        hidden: int = 256,
        activation: str | nn.Module = "relu",
        init_scale: float | None = None,
        extra_dims: Sequence[int] = (),
    ) -> None:
        trunk = _ConvTrunk(image_shape, channels, hidden, activation, extra_dims)
        super().__init__(trunk, hidden, latent_dim, init_scale)


class _ConvTrunk(nn.Module):
    """Map images (*, C, H, W), and further inputs, to features (*, hidden)."""

    def __init__(
        self,
        image_shape: Sequence[int],
        channels: Sequence[int],
        hidden: int,
        activation: str | nn.Module,
        extra_dims: Sequence[int],
    ) -> None:
        super().__init__()
        self.image_shape = tuple(image_shape)
        sizes = _sizes(image_shape, channels)
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise((image_shape[0], *channels)):
            conv = nn.Conv2d(before, after, kernel_size=3, stride=2, padding=1)
            layers += [conv, make_activation(activation)]
        self.conv = batched(nn.Sequential(*layers), event_dims=3)
        self.mlp = MLP(
            (channels[-1] * math.prod(sizes[-1]), *extra_dims), (hidden,), activation=activation
        )

    def forward(self, image: Tensor, *extra: Tensor) -> Tensor:
        if tuple(image.shape[-3:]) != self.image_shape:
            expected = ", ".join(str(n) for n in self.image_shape)
            raise ValueError(f"expected images of shape (*, {expected}), got {tuple(image.shape)}")
        return self.mlp(self.conv(image).flatten(-3), *extra)


class ConvClassifier(nn.Module):
    """Strided convolutions, one hidden layer, and the logits of a categorical distribution.

    Args:
        image_shape: (C, H, W) with H, W >= 4.
        num_classes: the number of classes.
        channels, hidden, activation: as for `ConvEncoder`.
        flat: the images come as flat rows (*, C * H * W).

    Raises:
        ValueError: if a shape, a width or the activation is not valid.
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        num_classes: int,
        channels: Sequence[int] = (32, 64),
        hidden: int = 256,
        activation: str | nn.Module = "relu",
        flat: bool = False,
    ) -> None:
        super().__init__()
        self.flat = flat
        self.trunk = _ConvTrunk(image_shape, channels, hidden, activation, ())
        self.logits = nn.Linear(hidden, num_classes)

    def forward(self, image: Tensor) -> TorchDistributionMixin:
        """Return a categorical distribution with batch shape `*`.

        Args:
            image: (*, C, H, W), or (*, C * H * W) if flat.

        Raises:
            ValueError: if the image has another shape.
        """
        if self.flat and image.shape[-1] == math.prod(self.trunk.image_shape):
            image = image.unflatten(-1, self.trunk.image_shape)
        return dist.Categorical(logits=self.logits(self.trunk(image)))


class ConvDecoder(nn.Module):
    """Two dense layers and strided transposed convolutions, followed by a likelihood.

    Args:
        latent_dim: the width of the input, or the widths of several inputs.
        image_shape: (C, H, W) with H, W >= 4.
        likelihood: a name or a module; see `pyrozoo.zoo.networks.likelihood`.
        channels: the channels before each transposed convolution.
        hidden: the width of the hidden layer.
        activation: a name (see `make_activation`) or a module, copied for each layer.

    Raises:
        ValueError: if a shape, a width, the activation or the likelihood is not valid.
    """

    def __init__(
        self,
        latent_dim: int | Sequence[int],
        image_shape: Sequence[int],
        likelihood: str | Likelihood = "bernoulli",
        channels: Sequence[int] = (64, 32),
        hidden: int = 256,
        activation: str | nn.Module = "relu",
    ) -> None:
        super().__init__()
        sizes = _sizes(image_shape, channels)[::-1]
        self.likelihood = make_likelihood(likelihood, image_shape)
        out_channels, left_over = divmod(self.likelihood.num_params, math.prod(sizes[-1]))
        if left_over:
            raise ValueError(
                f"the likelihood wants {self.likelihood.num_params} parameters, which is not a "
                f"whole number of channels of size {sizes[-1]}"
            )
        self.first_shape = (channels[0], *sizes[0])
        widths = (hidden, math.prod(self.first_shape))
        self.mlp = MLP(latent_dim, widths, activation=activation)
        layers: list[nn.Module] = []
        maps = itertools.pairwise((*channels, out_channels))
        for (before, after), size in zip(maps, sizes[1:], strict=True):
            # From ceil(n / 2), a stride of 2 arrives at the odd size; one more row if n is even.
            padding = (1 - size[0] % 2, 1 - size[1] % 2)
            conv = nn.ConvTranspose2d(before, after, 3, stride=2, padding=1, output_padding=padding)
            layers += [conv, make_activation(activation)]
        self.conv = batched(nn.Sequential(*layers[:-1]), event_dims=3)

    def forward(self, *inputs: Tensor) -> TorchDistributionMixin:
        """Return the distribution of the image, with batch shape `*` and event shape (C, H, W).

        Args:
            inputs: tensors of shape (*, latent_dim), one for each width in `latent_dim`; their
                leading dimensions broadcast.

        Raises:
            ValueError: if the number of inputs, their widths or their leading shapes do not fit.
        """
        features = self.mlp(*inputs)
        maps = features.reshape(features.shape[:-1] + self.first_shape)
        return self.likelihood(self.conv(maps).flatten(-3))


def _sizes(image_shape: Sequence[int], channels: Sequence[int]) -> list[tuple[int, int]]:
    """Return (H, W) and its size after each halving, rounded up."""
    if len(image_shape) != 3 or min(image_shape[1:]) < 4 or image_shape[0] < 1:
        raise ValueError(f"expected an image shape (C, H >= 4, W >= 4), got {tuple(image_shape)}")
    if not channels:
        raise ValueError("expected the channels of at least one convolution, got none")
    height, width = image_shape[1:]
    sizes = [(height, width)]
    for _ in channels:
        height, width = -(-height // 2), -(-width // 2)
        sizes.append((height, width))
    return sizes
