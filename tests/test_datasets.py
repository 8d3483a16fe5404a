"""Loading data sets without a network, and hiding parts of them."""

import dataclasses
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.datasets

from pyrozoo.zoo import datasets

CLASSES = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST"}


def write_idx(path: Path, values: np.ndarray) -> None:
    """Write uint8 values in the format of the MNIST files."""
    header = struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape)
    path.write_bytes(header + values.astype(np.uint8).tobytes())


def write_tiny(root: Path, name: str, shift: int = 0) -> None:
    """Write a data set of 12 training and 4 test images of 28 by 28."""
    raw = root / CLASSES[name] / "raw"
    raw.mkdir(parents=True)
    for prefix, count, first in (("train", 12, 0), ("t10k", 4, 100)):
        images = np.arange(first, first + count)[:, None, None] + np.zeros((1, 28, 28)) + shift
        images[:, 0, 1] = 255
        write_idx(raw / f"{prefix}-images-idx3-ubyte", images)
        write_idx(raw / f"{prefix}-labels-idx1-ubyte", np.arange(count) % 10)


@pytest.fixture(autouse=True)
def _nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Look in no folder of this machine, and use no network."""

    def refuse(self: object) -> None:
        raise RuntimeError("no network in tests")

    monkeypatch.delenv("ZOO_DATA", raising=False)
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(torchvision.datasets.MNIST, "download", refuse)


def test_names_are_what_load_offers() -> None:
    assert datasets.names() == [
        "binary_digits", "binary_mnist", "coloured_digits", "coloured_mnist", "digits",
        "fashion_mnist", "mnist",
    ]  # fmt: skip


def test_digits_are_scaled_and_shaped() -> None:
    data = datasets.load("digits", split="all")
    assert data.x.shape == (1797, 64)
    assert data.x.dtype == torch.float32
    assert [data.x.min().item(), data.x.max().item()] == [0.0, 1.0]
    assert torch.equal(data.x * 16, (data.x * 16).round())
    assert data.y.dtype == torch.int64
    assert data.y[:10].tolist() == list(range(10))
    assert data.image_shape == (1, 8, 8)
    assert data.label_names[7] == "7"
    assert len(data) == 1797
    images = datasets.load("digits", split="all", flat=False).x
    assert images.shape == (1797, 1, 8, 8)
    assert torch.equal(images.flatten(1), data.x)


def test_binary_digits_are_drawn_once_from_the_grey_ones() -> None:
    grey, whole = (datasets.load(n, split="all") for n in ("digits", "binary_digits"))
    assert sorted(whole.x.unique().tolist()) == [0, 1]
    sure = (grey.x == 0) | (grey.x == 1)
    assert torch.equal(whole.x[sure], grey.x[sure])
    error = (whole.x - grey.x).sum() / (grey.x * (1 - grey.x)).sum().sqrt()
    assert abs(error) < 4
    parts = [datasets.load("binary_digits", split=s).x for s in ("train", "test")]
    assert sorted(map(tuple, torch.cat(parts).tolist())) == sorted(map(tuple, whole.x.tolist()))
    assert torch.equal(parts[0], datasets.load("binary_digits").x)


def test_digits_split_is_stratified_disjoint_and_fixed() -> None:
    train, test = datasets.load("digits"), datasets.load("digits", split="test")
    whole = datasets.load("digits", split="all")
    assert (len(train), len(test)) == (1437, 360)
    assert abs(train.y.bincount() - 0.8 * whole.y.bincount()).max() < 1
    rows = sorted([*map(tuple, train.x.tolist()), *map(tuple, test.x.tolist())])
    assert rows == sorted(map(tuple, whole.x.tolist()))
    assert torch.equal(test.x, datasets.load("digits", split="test").x)
    # Changing the split changes every reported number, so its first labels are pinned.
    assert test.y[:12].tolist() == [1, 4, 8, 6, 5, 9, 9, 1, 3, 2, 2, 2]


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_idx_files_are_read_from_root(name: str, tmp_path: Path) -> None:
    write_tiny(tmp_path, name)
    train = datasets.load(name, root=tmp_path)
    assert train.x.dtype == torch.uint8
    assert train.x.shape == (12, 784)
    assert train.x[5, :3].tolist() == [5, 255, 5]
    assert train.y.tolist() == [*range(10), 0, 1]
    assert train.y.dtype == torch.int64
    test = datasets.load(name, root=tmp_path, split="test", flat=False)
    assert test.x.shape == (4, 1, 28, 28)
    assert test.x[0, 0, 5, 5] == 100
    assert test.image_shape == (1, 28, 28)
    assert len(test.label_names) == 10
    whole = datasets.load(name, root=str(tmp_path), split="all")
    assert torch.equal(whole.x, torch.cat([train.x, test.x.flatten(1)]))
    assert torch.equal(whole.arrays()["y"], torch.cat([train.y, test.y]))


def test_root_comes_before_the_environment_and_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tiny(tmp_path / "cache", "mnist", shift=1)
    assert datasets.load("mnist").x[0, 0] == 1
    write_tiny(tmp_path / "environment", "mnist", shift=2)
    monkeypatch.setenv("ZOO_DATA", str(tmp_path / "environment"))
    assert datasets.load("mnist").x[0, 0] == 2
    write_tiny(tmp_path / "root", "mnist", shift=3)
    assert datasets.load("mnist", root=tmp_path / "root").x[0, 0] == 3
    assert datasets.load("mnist", root=tmp_path / "empty").x[0, 0] == 2


def test_download_goes_to_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(self: torchvision.datasets.MNIST) -> None:
        write_tiny(Path(self.root), "fashion_mnist", shift=7)

    monkeypatch.setattr(torchvision.datasets.MNIST, "download", download)
    assert datasets.load("fashion_mnist").x[0, 0] == 7
    assert (tmp_path / "cache" / "FashionMNIST" / "raw").is_dir()


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_missing_files_are_named_with_their_folder(name: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        datasets.load(name, root=tmp_path / "mine")
    message = str(caught.value)
    assert all(file in message for file in datasets.IDX_FILES)
    assert str(tmp_path / "mine" / CLASSES[name] / "raw") in message
    assert "no network in tests" in message
    assert "ZOO_DATA" in message


def test_one_missing_file_is_not_a_data_set(tmp_path: Path) -> None:
    write_tiny(tmp_path, "mnist")
    (tmp_path / "MNIST" / "raw" / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(FileNotFoundError, match="t10k-labels-idx1-ubyte"):
        datasets.load("mnist", root=tmp_path)


def test_unknown_names_get_the_nearest() -> None:
    with pytest.raises(
        ValueError,
        match=r"digits, fashion_mnist, mnist, got 'Fashion-MNIST'; did.*"
        "'fashion_mnist'",
    ):
        datasets.load("Fashion-MNIST")
    with pytest.raises(ValueError, match=r"got 'zzz'$"):
        datasets.load("zzz")
    with pytest.raises(ValueError, match="split of train, test, all, got 'valid'"):
        datasets.load("digits", split="valid")  # type: ignore[arg-type]


def test_dataset_is_frozen() -> None:
    data = datasets.load("digits")
    with pytest.raises(dataclasses.FrozenInstanceError):
        data.name = "other"  # type: ignore[misc]


def test_halves_by_hand() -> None:
    images = torch.arange(12).reshape(1, 12)
    assert datasets.halves(images, (1, 3, 4))["x_left"].tolist() == [[0, 1, 4, 5, 8, 9]]
    assert datasets.halves(images, (1, 3, 4))["x_right"].tolist() == [[2, 3, 6, 7, 10, 11]]
    odd = datasets.halves(images, (2, 2, 3))
    assert odd["x_left"].tolist() == [[0, 3, 6, 9]]
    assert odd["x_right"].tolist() == [[1, 2, 4, 5, 7, 8, 10, 11]]


def test_halves_of_a_data_set_are_flat() -> None:
    flat = datasets.halves(datasets.load("digits"))
    square = datasets.halves(datasets.load("digits", flat=False))
    assert flat["x_left"].shape == flat["x_right"].shape == (1437, 32)
    assert all(torch.equal(flat[half], square[half]) for half in flat)


def test_halves_check_the_shape() -> None:
    with pytest.raises(ValueError, match="expected image_shape"):
        datasets.halves(torch.zeros(2, 12))
    with pytest.raises(ValueError, match=r"images of shape \(1, 3, 5\), got x of \(2, 12\)"):
        datasets.halves(torch.zeros(2, 12), (1, 3, 5))
    with pytest.raises(ValueError, match="2 pixels wide, got 1"):
        datasets.halves(torch.zeros(2, 12), (1, 12, 1))


def test_hidden_labels_are_gone_and_balanced() -> None:
    y = datasets.load("digits").y
    kept, present = datasets.hide_labels(y, 50, seed=0)
    assert kept.dtype == torch.int64
    assert present.dtype == torch.bool
    assert y[present].bincount().tolist() == [5] * 10
    assert torch.equal(kept[present], y[present])
    assert kept[~present].eq(0).all()
    assert y.ne(0).sum() > 1000, "the labels given must stay as they were"


def test_hidden_labels_follow_the_seed_alone() -> None:
    y = datasets.load("digits").y
    state = torch.get_rng_state()
    first, again, other = (datasets.hide_labels(y, 50, seed)[1] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(state, torch.get_rng_state())


def test_unbalanced_labels_need_not_divide() -> None:
    y = torch.tensor([0, 0, 0, 0, 3], dtype=torch.int32)
    kept, present = datasets.hide_labels(y, 3, seed=0, balanced=False)
    assert present.sum() == 3
    assert kept.dtype == torch.int64
    assert datasets.hide_labels(y, 2, seed=0)[1][4]
    assert datasets.hide_labels(y, 5, seed=0, balanced=False)[1].all()
    assert not datasets.hide_labels(y, 0, seed=0)[1].any()


@pytest.mark.parametrize(
    ("labels", "num_labelled", "message"),
    [
        ([0, 0, 1, 1], 3, "multiple of the 2 classes, got 3"),
        ([0, 0, 0, 1], 4, "at least 2 data of every class, got 1 of class 1"),
        ([0, 1], 3, "num_labelled from 0 to 2, got 3"),
        ([0, 1], -1, "num_labelled from 0 to 2, got -1"),
        ([0.0, 1.0], 2, "integer labels"),
        ([[0, 1]], 2, "integer labels"),
    ],
)
def test_impossible_labels_are_refused(labels: list[int], num_labelled: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        datasets.hide_labels(torch.tensor(labels), num_labelled, seed=0)


def test_hidden_rows_are_gone() -> None:
    x = torch.arange(1, 61, dtype=torch.uint8).reshape(10, 2, 3)
    kept, present = datasets.hide_rows(x, 0.3, seed=4)
    assert present.sum() == 7
    assert kept.dtype == torch.uint8
    assert torch.equal(kept[present], x[present])
    assert kept[~present].eq(0).all()
    assert torch.equal(present, datasets.hide_rows(x, 0.3, seed=4)[1])
    masks = {tuple(datasets.hide_rows(x, 0.3, seed)[1].tolist()) for seed in range(5)}
    assert len(masks) > 1
    assert datasets.hide_rows(x, 0.0, seed=0)[1].all()
    assert not datasets.hide_rows(x, 1.0, seed=0)[1].any()


@pytest.mark.parametrize("fraction", [-0.1, 1.1, float("nan")])
def test_fractions_are_checked(fraction: float) -> None:
    with pytest.raises(ValueError, match="fraction from 0 to 1"):
        datasets.hide_rows(torch.zeros(3, 2), fraction, seed=0)


def test_absent_values_do_not_leak_through_nan() -> None:
    x = torch.full((4, 2), float("nan"))
    kept, present = datasets.hide_rows(x, 0.5, seed=0)
    assert kept[~present].eq(0).all()
