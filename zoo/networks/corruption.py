"""What an autoencoder's encoder reads instead of its input, so that codes do not depend on it.

The program still generates the clean values: a denoising autoencoder, or one that undoes moves.

Source: Pascal Vincent, Hugo Larochelle, Isabelle Lajoie, Yoshua Bengio, Pierre-Antoine Manzagol,
"Stacked denoising autoencoders" (2010).  Moves, for clustering: Xifeng Guo, En Zhu, Xinwang Liu,
Jianping Yin, "Deep embedded clustering with data augmentation" (2018), who have the decoder give
back the moved image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import affine_grid, grid_sample


class Noise(nn.Module):
    """``x + sd * noise``, standard normal noise."""

    def __init__(self, sd: float) -> None:
        super().__init__()
        self.sd = sd

    def forward(self, x: Tensor) -> Tensor:
        """Of the same shape."""
        return x + self.sd * torch.randn_like(x)


class RandomAffine(nn.Module):
    """Images turned about their middle and shifted, each by draws of its own; zero from outside.

    Args:
        image_shape: channels, height, width.
        degrees: the angle is uniform within plus and minus so much.
        shift: so are the shifts down and to the right, in pixels.
    """

    def __init__(self, image_shape: Sequence[int], degrees: float, shift: float) -> None:
        super().__init__()
        self.image_shape, self.degrees, self.shift = tuple(image_shape), degrees, shift

    def forward(self, x: Tensor) -> Tensor:
        """Images ``(rows, features)`` or ``(rows, *image_shape)``, the same shape again.

        Raises:
            ValueError: x are no images of that shape.
        """
        if len(self.image_shape) != 3 or math.prod(x.shape[1:]) != math.prod(self.image_shape):
            raise ValueError(
                f"rows of shape {tuple(x.shape[1:])} are no images of image_shape (channels,"
                f" height, width) = {self.image_shape}"
            )
        draws = 2 * torch.rand(3, len(x), dtype=x.dtype, device=x.device) - 1
        angle = math.radians(self.degrees) * draws[0]
        images = x.reshape(-1, *self.image_shape)
        return move(images, angle, self.shift * draws[1], self.shift * draws[2]).reshape(x.shape)


def move(images: Tensor, angle: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """Turn images about their middle, anticlockwise, then shift them; zero from outside.

    Args:
        images: ``(N, channels, height, width)``, read between pixels by linear interpolation.
        angle: of each image, in radians, ``(N,)``.
        down, right: of each image, in pixels, ``(N,)``.
    """
    height, width = images.shape[-2:]
    cos, sin = torch.cos(angle), torch.sin(angle)
    # Where each pixel comes from: coordinates run from -1 to 1, whatever the sides, y downwards.
    x, y = -2 * right / width, -2 * down / height
    tall = height / width
    source = [cos, -sin * tall, cos * x - sin * tall * y, sin / tall, cos, sin / tall * x + cos * y]
    grid = affine_grid(
        torch.stack(source, -1).reshape(-1, 2, 3), list(images.shape), align_corners=False
    )
    return grid_sample(images, grid, align_corners=False)


def corruption(
    noise: float = 0.0,
    degrees: float = 0.0,
    shift: float = 0.0,
    image_shape: Sequence[int] | None = None,
) -> nn.Module | None:
    """Moves of images, then noise; None without either.

    Args:
        noise: sd of Gaussian noise.
        degrees, shift: see :class:`RandomAffine`.
        image_shape: of the images that are moved: channels, height, width.

    Raises:
        TypeError: one of these is no number.
        ValueError: a number is negative, or images are to be moved but have no shape.
    """
    chosen: dict[str, Any] = {"noise": noise, "degrees": degrees, "shift": shift}
    for name, value in chosen.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{name} is a number, got {value!r}")
        if not (value >= 0 and math.isfinite(value)):
            raise ValueError(f"{name} is not negative, got {value!r}")
    steps: list[nn.Module] = []
    if degrees or shift:
        if image_shape is None:
            raise ValueError("degrees= and shift= move images: give image_shape= (channels, ...)")
        steps.append(RandomAffine(image_shape, degrees, shift))
    if noise:
        steps.append(Noise(noise))
    return nn.Sequential(*steps) if steps else None
