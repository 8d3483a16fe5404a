"""Small image data sets, with what the demonstrations and reports do to them first.

:func:`load` returns images as torch tensors; :func:`halves`, :func:`hide_labels` and
:func:`hide_rows` turn them into observations that are split in two or partly missing. A partly
missing observation is a pair ``(values, present)``, where ``present`` is a mask over data and the
values of absent data are zero, so that nothing hidden can leak into training.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from http.client import HTTPException
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

Split: TypeAlias = Literal["train", "test", "all"]

DIGITS = tuple(str(digit) for digit in range(10))
CLOTHES = (
    "t-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
TABLES = ("breast_cancer", "wine")
COLOURS = {
    "white": (1.0, 1.0, 1.0),
    "red": (1.0, 0.0, 0.0),
    "orange": (1.0, 0.5, 0.0),
    "yellow": (1.0, 1.0, 0.0),
    "green": (0.0, 1.0, 0.0),
    "emerald": (0.0, 1.0, 0.5),
    "cyan": (0.0, 1.0, 1.0),
    "blue": (0.0, 0.0, 1.0),
    "violet": (0.5, 0.0, 1.0),
    "magenta": (1.0, 0.0, 1.0),
}
COLOURED = {"coloured_digits": "digits", "coloured_mnist": "mnist"}  # name -> what is tinted
COLOUR_SEED = 0
BINARY = {"binary_digits": "digits", "binary_mnist": "mnist"}  # name -> what is binarised
BINARY_SEED = 0
LABEL_NAMES = {
    "binary_digits": DIGITS,
    "binary_mnist": DIGITS,
    "coloured_digits": DIGITS,
    "coloured_mnist": DIGITS,
    "digits": DIGITS,
    "fashion_mnist": CLOTHES,
    "mnist": DIGITS,
}
TORCHVISION_CLASSES = {"fashion_mnist": "FashionMNIST", "mnist": "MNIST"}
IDX_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
DIGITS_TEST_FRACTION = 0.2
DIGITS_SPLIT_SEED = 0


@dataclass(frozen=True, eq=False)
class Dataset:
    """Labelled images, or one split of them.

    Attributes:
        name: The name given to :func:`load`.
        x: Images, shape ``(N, pixels)``, or ``(N, *image_shape)`` where not flat; uint8 from 0 to
            255, or float32 from 0 to 1.
        y: Labels, int64 of shape ``(N,)``, indices into ``label_names``.
        image_shape: Channels, height and width of one image.
        label_names: What each label means.
        label_sets: Where images are labelled in several ways, all of their labels by name, int64 of
            shape ``(N,)``, ``y`` among them; else empty.
    """

    name: str
    x: Tensor
    y: Tensor
    image_shape: tuple[int, int, int]
    label_names: tuple[str, ...]
    label_sets: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.x)

    def arrays(self) -> dict[str, Tensor]:
        """Return the images and labels as ``{"x": x, "y": y}``."""
        return {"x": self.x, "y": self.y}


def names() -> list[str]:
    """Return the names that :func:`load` knows, sorted."""
    return sorted(LABEL_NAMES)


def load(
    name: str, root: str | Path | None = None, split: Split = "train", flat: bool = True
) -> Dataset:
    """Load one split of a data set.

    ``digits`` comes with scikit-learn: 1797 images of 8 by 8, as float32 pixels divided by 16.
    It has no official split; here a fixed stratified draw gives 1437 training and 360 test
    images, in the order of the whole. ``mnist`` and ``fashion_mnist`` are read by torchvision:
    60,000 training and 10,000 test images of 28 by 28, as uint8 from 0 to 255. Their files are
    taken from ``root``, else from the folder that the environment variable ``ZOO_DATA`` names,
    else from the cache folder, ``ZOO_CACHE`` or ``~/.cache/pyrozoo``, where torchvision
    downloads them if they are in none of these.

    ``coloured_digits`` and ``coloured_mnist`` are the same images, each tinted by one of the ten
    :data:`COLOURS`, which is drawn independently of the digit by a fixed seed: float32 from 0 to 1,
    red, green and blue, with two sets of labels, ``digit`` (which is ``y``) and ``colour``.

    ``binary_digits`` and ``binary_mnist`` have pixels of 0 and 1 (float32), each drawn once with
    the grey value for its probability, by a fixed seed.  This is not the file of binarised MNIST
    that papers share, only its distribution.

    Args:
        name: One of :func:`names`.
        root: The folder that holds ``MNIST/raw`` or ``FashionMNIST/raw``.
        split: ``"train"``, ``"test"``, or ``"all"``, the training images and then the test
            images (for ``digits``, scikit-learn's order).
        flat: Whether one image is a vector, or has the shape ``(channels, height, width)``.

    Returns:
        The images and labels.

    Raises:
        ValueError: The name or split is not known.
        FileNotFoundError: The files are not there and cannot be downloaded; the message says
            which they are and where to put them.
    """
    if not isinstance(name, str) or name not in LABEL_NAMES:
        name = str(name)
        near = get_close_matches(name.lower().replace("-", "_"), names(), n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"expected a data set of {', '.join(names())}, got {name!r}{hint}")
    if split not in get_args(Split):
        raise ValueError(f"expected a split of {', '.join(get_args(Split))}, got {split!r}")
    if name in COLOURED:
        return _coloured(name, root, split, flat)
    if name in BINARY:
        return _binary(name, root, split, flat)
    images, labels = _digits(split) if name == "digits" else _idx_images(name, root, split)
    height, width = images.shape[1:]
    return Dataset(
        name=name,
        x=images.flatten(1) if flat else images.unsqueeze(1),
        y=labels,
        image_shape=(1, height, width),
        label_names=LABEL_NAMES[name],
    )


def table(name: str) -> tuple[Any, str]:
    """Return one of scikit-learn's small tables, and the name of its label column.

    ``wine`` has 178 rows, 13 columns and 3 cultivars; ``breast_cancer`` 569 rows, 30 columns and
    2 diagnoses. Needs pandas.

    Args:
        name: One of :data:`TABLES`.

    Raises:
        ValueError: There is no such table.
    """
    if name not in TABLES:
        raise ValueError(f"expected a table of {', '.join(TABLES)}, got {name!r}")
    from sklearn import datasets

    label = {"wine": "cultivar", "breast_cancer": "diagnosis"}[name]
    bunch = getattr(datasets, f"load_{name}")(as_frame=True)
    return bunch.data.assign(**{label: bunch.target_names[bunch.target]}), label


def halves(
    data: Dataset | Tensor, image_shape: tuple[int, int, int] | None = None
) -> dict[str, Tensor]:
    """Split every image down the middle into two flat observations.

    Args:
        data: A data set, or images of shape ``(N, pixels)`` or ``(N, *image_shape)``.
        image_shape: Channels, height and width of one image; a data set knows its own.

    Returns:
        ``x_left``, the first ``width // 2`` columns of every image, and ``x_right``, the other
        columns, each of shape ``(N, channels * height * columns)``.
    """
    if isinstance(data, Dataset):
        x, shape = data.x, image_shape or data.image_shape
    elif image_shape is None:
        raise ValueError("expected image_shape with a tensor of images, got None")
    else:
        x, shape = data, image_shape
    channels, height, width = shape
    if x.shape[1:] not in ((channels * height * width,), tuple(shape)):
        raise ValueError(f"expected images of shape {tuple(shape)}, got x of {tuple(x.shape)}")
    if width < 2:
        raise ValueError(f"expected images at least 2 pixels wide, got {width}")
    images = x.reshape(len(x), channels, height, width)
    left, right = images[..., : width // 2], images[..., width // 2 :]
    return {"x_left": left.flatten(1), "x_right": right.flatten(1)}


def hide_labels(
    y: Tensor, num_labelled: int, seed: int, balanced: bool = True
) -> tuple[Tensor, Tensor]:
    """Hide all but a few labels, as semi-supervised learning has them.

    Args:
        y: Labels, integers of shape ``(N,)``.
        num_labelled: How many labels to keep.
        seed: Which labels to keep; the same seed keeps the same ones.
        balanced: Whether to keep equally many of each label that occurs in ``y``.

    Returns:
        The labels, int64 with zeros where hidden, and the mask of those kept, bool, each of shape
        ``(N,)``.

    Raises:
        ValueError: There are not as many labels, or not in equal numbers.
    """
    if y.ndim != 1 or y.is_floating_point():
        raise ValueError(f"expected integer labels of shape (N,), got {y.dtype} {tuple(y.shape)}")
    if isinstance(num_labelled, bool) or not isinstance(num_labelled, int | np.integer):
        raise TypeError(f"expected num_labelled to be a whole number, got {num_labelled!r}")
    if not 0 <= num_labelled <= len(y):
        raise ValueError(f"expected num_labelled from 0 to {len(y)}, got {num_labelled}")
    labels = y.cpu().numpy()
    rng = np.random.default_rng(seed)
    if balanced:
        kept = _balanced_draw(labels, num_labelled, rng)
    else:
        kept = rng.choice(len(labels), num_labelled, replace=False)
    return _hide(y.long(), kept)


def hide_rows(x: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Hide a random part of the data.

    Args:
        x: Values of shape ``(N, ...)``.
        fraction: The part of the rows to hide, from 0 to 1, rounded to whole rows.
        seed: Which rows to hide; the same seed hides the same ones.

    Returns:
        The values, with zeros in hidden rows, and the mask of the rows kept, bool of shape
        ``(N,)``.
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"expected fraction from 0 to 1, got {fraction}")
    num_kept = len(x) - round(fraction * len(x))
    return _hide(x, np.random.default_rng(seed).choice(len(x), num_kept, replace=False))


def _digits(split: Split) -> tuple[Tensor, Tensor]:
    """Return scikit-learn's digits as images of shape ``(N, 8, 8)`` and labels."""
    bunch = load_digits()
    images = torch.as_tensor(bunch.images, dtype=torch.float32) / 16
    labels = torch.as_tensor(bunch.target, dtype=torch.int64)
    if split == "all":
        return images, labels
    rows = torch.as_tensor(_digits_rows(split, bunch.target))
    return images[rows], labels[rows]


def _digits_rows(split: Split, target: NDArray[Any]) -> NDArray[np.int64]:
    """Return the rows of the training or test images among all digits."""
    train, test = train_test_split(
        np.arange(len(target)),
        test_size=DIGITS_TEST_FRACTION,
        random_state=DIGITS_SPLIT_SEED,
        stratify=target,
    )
    return np.sort(train if split == "train" else test)


def _rows_of(whole: Dataset, root: str | Path | None, split: Split) -> Tensor:
    """Return which images of a whole data set belong to a split."""
    if split == "all":
        rows = np.arange(len(whole))
    elif whole.name == "digits":
        rows = _digits_rows(split, whole.y.numpy())
    else:
        count = len(load(whole.name, root, "train"))
        rows = np.arange(count) if split == "train" else np.arange(count, len(whole))
    return torch.as_tensor(rows)


def _binary(name: str, root: str | Path | None, split: Split, flat: bool) -> Dataset:
    """Return binarised images: an image is the same in every split."""
    whole = load(BINARY[name], root, "all", flat=flat)
    grey = whole.x / 255 if whole.x.dtype == torch.uint8 else whole.x
    generator = torch.Generator().manual_seed(BINARY_SEED)
    pixels = torch.bernoulli(grey, generator=generator)
    index = _rows_of(whole, root, split)
    return dataclasses.replace(whole, name=name, x=pixels[index], y=whole.y[index])


def _coloured(name: str, root: str | Path | None, split: Split, flat: bool) -> Dataset:
    """Return tinted images: an image keeps its colour in every split."""
    whole = load(COLOURED[name], root, "all", flat=False)
    colour = np.random.default_rng(COLOUR_SEED).integers(len(COLOURS), size=len(whole))
    index = _rows_of(whole, root, split)
    grey = whole.x[index] / 255 if whole.x.dtype == torch.uint8 else whole.x[index]
    labels, colours = whole.y[index], torch.as_tensor(colour)[index]
    tints = torch.tensor(list(COLOURS.values()))[colours]
    x = grey * tints[:, :, None, None]
    return Dataset(
        name=name,
        x=x.flatten(1) if flat else x,
        y=labels,
        image_shape=(3, x.shape[2], x.shape[3]),
        label_names=LABEL_NAMES[name],
        label_sets={"digit": labels, "colour": colours},
    )


def _idx_images(name: str, root: str | Path | None, split: Split) -> tuple[Tensor, Tensor]:
    """Return images of shape ``(N, height, width)`` and labels of a torchvision data set."""
    import torchvision.datasets

    reader = getattr(torchvision.datasets, TORCHVISION_CLASSES[name])
    folder = _folder_with_files(reader, root)
    parts = [reader(folder, train=train) for train in (True, False) if split in _splits(train)]
    images = torch.cat([part.data for part in parts])
    return images, torch.cat([part.targets for part in parts]).long()


def _splits(train: bool) -> tuple[Split, Split]:
    """Return the splits that torchvision's training or test images belong to."""
    return ("train", "all") if train else ("test", "all")


def _folder_with_files(reader: Any, root: str | Path | None) -> Path:
    """Return the first folder that holds a torchvision data set, downloading it at need."""
    cache = Path(os.environ.get("ZOO_CACHE") or Path.home() / ".cache" / "pyrozoo").expanduser()
    given = [Path(folder).expanduser() for folder in (root, os.environ.get("ZOO_DATA")) if folder]
    for folder in (*given, cache):
        if all((folder / reader.__name__ / "raw" / file).is_file() for file in IDX_FILES):
            return folder
    try:
        reader(cache, download=True)
    except (OSError, RuntimeError, HTTPException) as error:
        searched = ", ".join(str(folder) for folder in (*given, cache))
        raise FileNotFoundError(
            f"{reader.__name__} is in none of {searched}, and the download failed "
            f"({type(error).__name__}: {error}). Put the unpacked files {', '.join(IDX_FILES)} in "
            f"{(given or [cache])[0] / reader.__name__ / 'raw'}, or give the folder above "
            f"{reader.__name__} as root or in the environment variable ZOO_DATA."
        ) from error
    return cache


def _balanced_draw(
    labels: NDArray[Any], num_labelled: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Draw equally many rows of each label."""
    classes, counts = np.unique(labels, return_counts=True)
    each, rest = divmod(num_labelled, max(len(classes), 1))
    if rest:
        raise ValueError(
            f"expected num_labelled to be a multiple of the {len(classes)} classes, "
            f"got {num_labelled} (a draw of all rows alike: balanced=False)"
        )
    if each and counts.min() < each:
        raise ValueError(
            f"expected at least {each} data of every class, got {counts.min()} of class "
            f"{classes[counts.argmin()]} (a draw of all rows alike: balanced=False)"
        )
    rows = [rng.choice(np.flatnonzero(labels == label), each, replace=False) for label in classes]
    return np.concatenate(rows) if rows else np.empty(0, dtype=np.int64)


def _hide(values: Tensor, kept: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
    """Zero all rows but those kept, and return the values with their mask."""
    present = torch.zeros(len(values), dtype=torch.bool, device=values.device)
    present[torch.as_tensor(kept, device=values.device)] = True
    mask = present.reshape(-1, *[1] * (values.ndim - 1))
    return torch.where(mask, values, torch.zeros_like(values)), present
