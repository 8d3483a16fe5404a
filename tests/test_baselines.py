"""The plain clustering methods, on blobs that they must find and on the digits."""

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.mixture import GaussianMixture

from pyrozoo.inference import metrics
from pyrozoo.zoo import baselines, datasets

LABELS = np.arange(90) % 3


def blobs(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return 90 data in three well-separated groups of 6 columns, from 0 to 1 (or to 255)."""
    rng = np.random.default_rng(0)
    centres = np.kron(np.eye(3), [0.8, 0.8]) + 0.1
    x = np.clip(centres[LABELS] + 0.03 * rng.standard_normal((90, 6)), 0, 1)
    return torch.tensor(np.round(x * 255) if dtype == torch.uint8 else x).to(dtype)


def small(x: Any, **options: Any) -> baselines.Autoencoder:
    """Train a small autoencoder for a short while."""
    settings = {"hidden": (16,), "latent_dim": 2, "epochs": 30, "batch_size": 32, "lr": 1e-2}
    return baselines.train_autoencoder(x, **{**settings, **options})


def test_kmeans_finds_blobs() -> None:
    rows = baselines.kmeans(blobs(), 3, seed=0)
    assert rows.shape == (90, 3)
    assert set(np.unique(rows)) == {0.0, 1.0}
    assert metrics.clustering_report(LABELS, rows)["hungarian_accuracy"] == 1.0


@pytest.mark.parametrize("covariance", ["full", "diag"])
def test_gmm_finds_blobs(covariance: baselines.Covariance) -> None:
    mixture = baselines.gmm(blobs().numpy(), 3, seed=0, covariance=covariance, n_init=3)
    assert isinstance(mixture, GaussianMixture)
    assert mixture.covariances_.shape == ((3, 6, 6) if covariance == "full" else (3, 6))
    assert metrics.hungarian_accuracy(LABELS, mixture.predict(blobs().numpy())) == 1.0


def test_the_likeliest_start_is_kept() -> None:
    x = datasets.load("digits", split="test").x[:, 20:28]
    gains = []
    for seed in range(4):
        one, eight = (baselines.gmm(x, 6, seed, "diag", n_init) for n_init in (1, 8))
        gains.append(eight.lower_bound_ - one.lower_bound_)
    assert min(gains) >= 0
    assert max(gains) > 0.01


def test_uint8_is_read_as_pixels_over_255() -> None:
    pixels = blobs(torch.uint8)
    scaled = pixels.float() / 255
    assert np.array_equal(baselines.kmeans(pixels, 3, 0), baselines.kmeans(scaled, 3, 0))
    assert baselines.gmm(pixels, 3, 0).means_.max() <= 1
    codes = small(pixels).encode(pixels)
    assert torch.equal(codes, small(scaled).encode(scaled))
    assert codes.dtype == torch.float32


@pytest.mark.parametrize("loss", ["bernoulli", "mse"])
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_autoencoder_learns(loss: baselines.Loss, noise: float) -> None:
    seen: list[tuple[int, float]] = []
    model = small(blobs(), loss=loss, noise=noise, progress=lambda *step: seen.append(step))
    assert [epoch for epoch, _ in seen] == list(range(1, 31))
    assert seen[-1][1] < seen[0][1]
    codes = model.encode(blobs().numpy())
    assert codes.shape == (90, 2)
    assert not codes.requires_grad
    rebuilt = model.decode(codes)
    assert (rebuilt - blobs()).square().mean() < 0.25 * blobs().var()
    assert not model.training


def test_reported_loss_is_the_mean_over_data() -> None:
    seen: list[float] = []
    model = small(blobs(), lr=0.0, epochs=1, loss="mse", progress=lambda _, loss: seen.append(loss))
    squares = (model.decode(model.encode(blobs())) - blobs()).square().sum(1)
    assert seen == [pytest.approx(squares.mean().item(), rel=1e-5)]


def test_denoising_rebuilds_the_clean_data() -> None:
    seen: list[float] = []
    small(blobs(), lr=0.0, epochs=1, loss="mse", noise=5.0, progress=lambda _, e: seen.append(e))
    # Rebuilding the noise itself would cost about 6 columns * 5 ** 2 = 150.
    assert seen[0] < 50


def test_bernoulli_outputs_are_probabilities() -> None:
    outputs = small(blobs(), epochs=1).decode(torch.linspace(-100, 100, 80).reshape(40, 2))
    assert outputs.min() >= 0
    assert outputs.max() <= 1


def test_architecture_follows_the_arguments() -> None:
    model = baselines.Autoencoder(6, (5, 4), 3)
    shapes = [tuple(weight.shape) for weight in model.parameters() if weight.ndim == 2]
    assert shapes == [(5, 6), (4, 5), (3, 4), (4, 3), (5, 4), (6, 5)]


def test_encoding_in_batches_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small(blobs(), epochs=1)
    whole = model.encode(blobs())
    monkeypatch.setattr(baselines, "ENCODE_BATCH", 7)
    assert torch.allclose(model.encode(blobs()), whole, atol=1e-6)


def test_seed_decides_everything_and_global_state_is_untouched() -> None:
    torch_state = torch.get_rng_state()
    numpy_state = np.random.get_state(legacy=False)  # noqa: NPY002
    first, again, other = (small(blobs(), seed=s, noise=0.1).encode(blobs()) for s in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)
    torch.rand(3)
    moved = torch.get_rng_state()
    report = baselines.clustering_baselines(blobs(), LABELS, 3, 5, (16,), 2, 3)
    assert torch.equal(moved, torch.get_rng_state())
    torch.rand(3)
    assert report == baselines.clustering_baselines(blobs(), LABELS, 3, 5, (16,), 2, 3)
    torch.set_rng_state(torch_state)
    assert torch.equal(first, small(blobs(), seed=3, noise=0.1).encode(blobs()))
    assert torch.equal(torch_state, torch.get_rng_state())
    np.testing.assert_equal(np.random.get_state(legacy=False), numpy_state)  # noqa: NPY002


def test_read_only_numpy_is_taken_without_a_warning() -> None:
    x = blobs().numpy()
    x.flags.writeable = False
    codes = small(x, epochs=2).encode(x)
    assert baselines.kmeans(codes, 3, 0).shape == (90, 3)


def test_without_labels_only_what_needs_none() -> None:
    report = baselines.clustering_baselines(blobs(), None, 3, 0, (16,), 2, 20)
    assert list(report) == ["kmeans", "gmm", "ae_kmeans", "ae_gmm"]
    for name, own in (("kmeans", "mean_squared_distance"), ("gmm", "log_likelihood")):
        assert set(report[name]) == set(report[f"ae_{name}"]) == {"clusters_used", own}
    assert report["kmeans"]["clusters_used"] == 3.0
    means = np.stack([blobs().numpy()[k == LABELS].mean(0) for k in range(3)])
    within = np.square(blobs().numpy() - means[LABELS]).sum(1).mean()
    assert report["kmeans"]["mean_squared_distance"] == pytest.approx(within, rel=1e-4)


def test_baselines_on_the_digits() -> None:
    data = datasets.load("digits", split="all")
    report = baselines.clustering_baselines(data.x, data.y, 10)
    assert report["kmeans"]["hungarian_accuracy"] == pytest.approx(0.79, abs=0.03)
    # Five seeds gave 0.78 to 0.84, and NMI 0.80 to 0.83; one epoch gives 0.70 and 0.66.
    assert report["gmm"]["hungarian_accuracy"] == pytest.approx(0.71, abs=0.1)
    assert report["ae_kmeans"]["hungarian_accuracy"] > report["gmm"]["hungarian_accuracy"]
    assert report["ae_gmm"]["hungarian_accuracy"] > 0.75
    assert report["ae_gmm"]["nmi"] > 0.77
    assert report["ae_gmm"]["clusters_used"] == 10.0


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (torch.zeros(3), {}, r"shape \(N, columns\), got \(3,\)"),
        (torch.zeros(0, 4), {}, r"got \(0, 4\)"),
        (torch.tensor([[0.5, float("nan")]]), {}, "finite data"),
        (torch.tensor([[0.5, 16.0]]), {}, "from 0 to 1 for the Bernoulli loss, got 0.5 to 16"),
        (torch.zeros(3, 4), {"epochs": 0}, "got 0 and 32"),
        (torch.zeros(3, 4), {"batch_size": 0}, "got 30 and 0"),
        (torch.zeros(3, 4), {"loss": "huber"}, "bernoulli or mse, got 'huber'"),
    ],
)
def test_bad_training_input_is_named(
    x: torch.Tensor, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        small(x, **options)


def test_bad_data_are_named_before_clustering() -> None:
    for method in (baselines.kmeans, baselines.gmm):
        with pytest.raises(ValueError, match="finite data"):
            method(torch.tensor([[0.5, float("inf")]]), 1, 0)
