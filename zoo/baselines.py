"""Plain clustering methods, the rivals that reports show beside the models on the same data.

These are scikit-learn's k-means and Gaussian mixture, on the data themselves or on the codes of
a small autoencoder. The data are ``x`` of shape ``(N, columns)``, numpy or torch, where uint8 is
read as ``x / 255``. Every function takes a seed, gives the same result for the same seed on one
machine, and leaves the global random state alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture
from torch import Tensor, nn
from torch.nn import functional

from pyrozoo.inference import metrics

Array: TypeAlias = NDArray[Any] | Tensor
Covariance: TypeAlias = Literal["full", "diag"]
Loss: TypeAlias = Literal["bernoulli", "mse"]

ENCODE_BATCH = 4096
NAMES = {  # as tables show them
    "kmeans": "k-means", "gmm": "GMM", "ae_kmeans": "AE+k-means", "ae_gmm": "AE+GMM",
    "logistic": "logistic regression",
    "mean": "mean", "knn": "knn", "iterative": "iterative",
}  # fmt: skip


class Autoencoder(nn.Module):
    """A fully connected autoencoder with rectified hidden layers and a mirrored decoder.

    Args:
        num_inputs: Columns of the data.
        hidden: Widths of the encoder's hidden layers; the decoder has them in reverse.
        latent_dim: Dimension of the codes.
        loss: ``"bernoulli"``, cross-entropy of outputs in (0, 1), or ``"mse"``, squared error of
            unbounded outputs.
    """

    def __init__(
        self, num_inputs: int, hidden: Sequence[int], latent_dim: int, loss: Loss = "bernoulli"
    ) -> None:
        super().__init__()
        self.loss = loss
        self.encoder = _mlp([num_inputs, *hidden, latent_dim])
        self.decoder = _mlp([latent_dim, *reversed(hidden), num_inputs])

    def forward(self, x: Tensor) -> Tensor:
        """Return the decoder's outputs, logits for the Bernoulli loss, of floating-point data."""
        return self.decoder(self.encoder(x))

    def encode(self, x: Array) -> Tensor:
        """Return the codes of data, shape ``(N, latent_dim)``, without gradients, on the CPU."""
        device = next(self.parameters()).device
        with torch.no_grad():
            batches = _tensor(x).split(ENCODE_BATCH)
            return torch.cat([self.encoder(_unit(batch, device)).cpu() for batch in batches])

    def decode(self, codes: Tensor) -> Tensor:
        """Return the data that codes stand for, shape ``(N, columns)``."""
        outputs = self.decoder(codes)
        return outputs.sigmoid() if self.loss == "bernoulli" else outputs

    def error(self, x: Tensor, noisy: Tensor) -> Tensor:
        """Return the mean over data of the loss of rebuilding ``x`` from ``noisy``."""
        outputs = self(noisy)
        if self.loss == "bernoulli":
            total = functional.binary_cross_entropy_with_logits(outputs, x, reduction="sum")
        else:
            total = functional.mse_loss(outputs, x, reduction="sum")
        return total / len(x)


def kmeans(x: Array, num_clusters: int, seed: int) -> NDArray[np.float64]:
    """Cluster data by k-means, the best of ten starts.

    Args:
        x: Data, shape ``(N, columns)``.
        num_clusters: How many clusters.
        seed: The seed of the starts.

    Returns:
        Responsibilities of shape ``(N, num_clusters)`` that are 0 or 1.
    """
    clusters = _fit_kmeans(_data(x), num_clusters, seed).labels_
    return np.eye(num_clusters)[clusters]


def gmm(
    x: Array, num_clusters: int, seed: int, covariance: Covariance = "full", n_init: int = 10
) -> GaussianMixture:
    """Fit a mixture of Gaussians, the likeliest of several k-means starts.

    Args:
        x: Data, shape ``(N, columns)``.
        num_clusters: How many components.
        seed: The seed of the starts.
        covariance: ``"full"``, or ``"diag"`` for data of many columns.
        n_init: How many starts.

    Returns:
        scikit-learn's mixture; ``predict_proba`` gives responsibilities, and ``score`` the mean
        log-likelihood, of data that have been scaled as these were (uint8 by 255).
    """
    data = _data(x)
    check_clusters(num_clusters, len(data))
    mixture = GaussianMixture(
        num_clusters, covariance_type=covariance, n_init=n_init, max_iter=500, random_state=seed
    )
    return mixture.fit(data.astype(np.float64))


def train_autoencoder(
    x: Array,
    hidden: Sequence[int] = (256, 256),
    latent_dim: int = 10,
    epochs: int = 100,
    batch_size: int = 256,
    lr: float = 2e-3,
    seed: int = 0,
    loss: Loss = "bernoulli",
    noise: float = 0.0,
    progress: Callable[[int, float], None] | None = None,
    device: str | torch.device = "cpu",
) -> Autoencoder:
    """Train an autoencoder with Adam.

    Args:
        x: Data, shape ``(N, columns)``; from 0 to 1, or uint8, for the Bernoulli loss.
        hidden: Widths of the encoder's hidden layers.
        latent_dim: Dimension of the codes.
        epochs: How many passes over the data.
        batch_size: How many data make one step.
        lr: Adam's learning rate.
        seed: The seed of the weights, of the order of data, and of the noise.
        loss: ``"bernoulli"`` or ``"mse"``, see :class:`Autoencoder`.
        noise: Standard deviation of Gaussian noise on the encoder's input (denoising).
        progress: Called after each epoch with its number, from 1, and its mean loss.
        device: Where to train; the data stay where they are and go there in batches.

    Returns:
        The trained autoencoder, in evaluation mode.
    """
    data = _tensor(x)
    _check_training(data, epochs, batch_size, loss)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = Autoencoder(data.shape[1], hidden, latent_dim, loss).to(device)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for epoch in range(1, epochs + 1):
        total = 0.0
        for rows in torch.randperm(len(data), generator=generator).split(batch_size):
            batch = _unit(data[rows.to(data.device)], device)
            noisy = batch
            if noise:
                noisy = batch + noise * torch.randn(batch.shape, generator=generator).to(device)
            error = model.error(batch, noisy)
            optimizer.zero_grad()
            error.backward()
            optimizer.step()
            total += error.item() * len(rows)
        if progress is not None:
            progress(epoch, total / len(data))
    return model.eval()


def clustering_baselines(
    x: Array,
    labels: Array | None,
    num_clusters: int,
    seed: int = 0,
    hidden: Sequence[int] = (256, 256),
    latent_dim: int = 10,
    epochs: int = 100,
    device: str | torch.device = "cpu",
) -> dict[str, dict[str, float]]:
    """Score k-means and a Gaussian mixture, on the data and on codes of an autoencoder.

    Args:
        x: Data, shape ``(N, columns)``, from 0 to 1 or uint8.
        labels: True labels for the scores, integers of shape ``(N,)``; no method sees them.
        num_clusters: How many clusters.
        seed: The seed of everything.
        hidden: Widths of the encoder's hidden layers.
        latent_dim: Dimension of the codes.
        epochs: How long to train the autoencoder.
        device: Where to train the autoencoder.

    Returns:
        Under ``"kmeans"``, ``"gmm"`` (diagonal covariances, one start, as data may have many
        columns), ``"ae_kmeans"`` and ``"ae_gmm"`` (full ones, the likeliest of ten starts), the
        entries of :func:`pyrozoo.inference.metrics.clustering_report`, or ``clusters_used`` alone
        where there are no labels. Besides, for k-means ``mean_squared_distance`` to the nearest
        centre, and for mixtures ``log_likelihood``, the mean over data of the log density, which
        can be compared only between mixtures on the same data or codes.
    """
    model = train_autoencoder(x, hidden, latent_dim, epochs, seed=seed, device=device)
    found = {}
    for prefix, rows in (("", _data(x)), ("ae_", model.encode(x).double().numpy())):
        centres = _fit_kmeans(rows, num_clusters, seed)
        found[f"{prefix}kmeans"] = {
            **_scores(labels, np.eye(num_clusters)[centres.labels_]),
            "mean_squared_distance": float(centres.inertia_ / len(rows)),
        }
        mixture = (
            gmm(rows, num_clusters, seed) if prefix else gmm(rows, num_clusters, seed, "diag", 1)
        )
        found[f"{prefix}gmm"] = {
            **_scores(labels, mixture.predict_proba(rows)),
            "log_likelihood": float(mixture.score(rows)),
        }
    return found


def imputers(table: NDArray[Any], seed: int) -> dict[str, NDArray[np.float64]]:
    """Complete a numeric table by scikit-learn's imputers.

    Columns are standardised first, and scaled back. A column without any value is refused.

    Args:
        table: Numbers, shape ``(N, columns)``, NaN where missing.
        seed: The seed of the iterative imputer.

    Returns:
        Under ``"mean"``, ``"knn"`` (five neighbours) and ``"iterative"`` (chained Bayesian ridge
        regressions, at most 30 rounds) the completed table.
    """
    from sklearn.experimental import enable_iterative_imputer  # noqa: F401
    from sklearn.impute import IterativeImputer, KNNImputer, SimpleImputer

    empty = np.isnan(table).all(0)
    if table.ndim != 2 or empty.any():
        raise ValueError(
            f"expected (N, columns) with values in each, got none in {np.where(empty)}"
        )
    mean, spread = np.nanmean(table, 0), np.nanstd(table, 0).clip(1e-12)
    found = {}
    for name, imputer in {
        "mean": SimpleImputer(),
        "knn": KNNImputer(n_neighbors=5),
        "iterative": IterativeImputer(max_iter=30, random_state=seed),
    }.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            found[name] = imputer.fit_transform((table - mean) / spread) * spread + mean
    return found


def check_clusters(num_clusters: int, rows: int) -> None:
    """Check that there are as many rows as clusters, of which there is at least one.

    Raises:
        ValueError: there are not; naming ``num_clusters``.
    """
    if not 1 <= num_clusters <= rows:
        raise ValueError(f"num_clusters is from 1 to the {rows} rows, got {num_clusters}")


def _scores(labels: Array | None, responsibilities: NDArray[np.float64]) -> dict[str, float]:
    """Score a clustering, by what needs no labels where there are none."""
    if labels is None:
        return {"clusters_used": float(metrics.clusters_used(responsibilities))}
    return metrics.clustering_report(labels, responsibilities)


def _fit_kmeans(data: NDArray[Any], num_clusters: int, seed: int) -> KMeans:
    """Fit k-means, the best of ten starts."""
    check_clusters(num_clusters, len(data))
    return KMeans(num_clusters, n_init=10, random_state=seed).fit(data)


def _mlp(sizes: Sequence[int]) -> nn.Sequential:
    """Return linear layers with rectifiers between them."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _tensor(x: Array) -> Tensor:
    """Return data as a tensor; numpy arrays are copied, for torch warns of read-only ones."""
    return x.detach() if isinstance(x, Tensor) else torch.tensor(x)


def _unit(x: Tensor, device: str | torch.device) -> Tensor:
    """Return data in single precision, uint8 divided by 255."""
    values = x.to(device=device, dtype=torch.float32)
    return values / 255 if x.dtype == torch.uint8 else values


def _data(x: Array) -> NDArray[Any]:
    """Return data for scikit-learn: a matrix of finite floats, uint8 divided by 255."""
    values = _tensor(x)
    _check_data(values)
    return _unit(values, "cpu").numpy()


def _check_data(x: Tensor) -> None:
    """Check that data are a non-empty matrix of finite numbers."""
    if x.ndim != 2 or x.numel() == 0:
        raise ValueError(f"expected data of shape (N, columns), got {tuple(x.shape)}")
    if not x.isfinite().all():
        raise ValueError("expected finite data, got NaN or infinite entries")


def _check_training(x: Tensor, epochs: int, batch_size: int, loss: str) -> None:
    """Check what an autoencoder is trained with."""
    _check_data(x)
    if epochs < 1 or batch_size < 1:
        raise ValueError(
            f"expected epochs and batch_size of at least 1, got {epochs} and {batch_size}"
        )
    if loss not in ("bernoulli", "mse"):
        raise ValueError(f"expected a loss of bernoulli or mse, got {loss!r}")
    if loss == "bernoulli" and x.dtype != torch.uint8 and (x.min() < 0 or x.max() > 1):
        raise ValueError(
            f"expected data from 0 to 1 for the Bernoulli loss, got {x.min():g} to {x.max():g}"
        )
