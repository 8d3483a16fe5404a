"""Clustering."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
from sklearn.base import ClusterMixin
from sklearn.utils.validation import validate_data

from pyrozoo.zoo.estimators.base import Estimator
from pyrozoo.zoo.estimators.values import Array, check_count


class DeepClusterer(ClusterMixin, Estimator):
    """Clustering by a deep latent-variable model, by default VaDE.

    Args:
        num_clusters: K.
        method: one of :func:`methods`.
        latent_dim: dimension of z.
        hidden: widths of the networks' hidden layers.
        likelihood: ``"normal"`` (standardised columns), ``"normal(SCALE)"`` (SCALE in standard
            deviations of the column) or ``"bernoulli"`` (values from 0 to 1, used as they are).
        epochs, batch_size, lr: of the fit.
        start: options of the method's pretraining; default: ``base.STARTS``, else the method's own.
        options: further options of the method (``pyrozoo show NAME``).
        settings: further settings of :func:`pyrozoo.inference.training.fit`.
        num_samples: draws of the guide behind every probability and score.
        device: where it is trained: ``"auto"``, ``"cpu"`` or ``"cuda"``; all else is on the CPU.
        verbose: show progress bars.
        random_state: an integer makes everything repeatable; see scikit-learn's glossary.

    Attributes:
        labels_: cluster of each training row, ``(n,)``.
        result_: the fitted pair and its history, in standardised units, a
            :class:`pyrozoo.inference.Result`.
        mean_, scale_: of the columns, ``(features,)``.
    """

    def __init__(
        self,
        num_clusters: int = 8,
        *,
        method: str = "vade",
        latent_dim: int = 10,
        hidden: Sequence[int] = (256, 256),
        likelihood: str = "normal",
        epochs: int = 100,
        batch_size: int = 256,
        lr: float = 1e-3,
        start: Mapping[str, Any] | None = None,
        options: Mapping[str, Any] | None = None,
        settings: Mapping[str, Any] | None = None,
        num_samples: int = 16,
        device: str = "auto",
        verbose: bool = False,
        random_state: Any = None,
    ) -> None:
        self.num_clusters = num_clusters
        self.method = method
        self.latent_dim = latent_dim
        self.hidden = hidden
        self.likelihood = likelihood
        self.epochs = epochs
        self.batch_size = batch_size
        self.lr = lr
        self.start = start
        self.options = options
        self.settings = settings
        self.num_samples = num_samples
        self.device = device
        self.verbose = verbose
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None) -> Self:
        """Fit to rows ``(n, features)``, NaN where missing; ``y`` is ignored.

        Raises:
            ValueError: parameters or data do not fit, or there are fewer rows than clusters.
        """
        X = validate_data(self, X, dtype=np.float64, ensure_all_finite="allow-nan")
        check_count("num_clusters", self.num_clusters)
        if len(X) < self.num_clusters:
            raise ValueError(
                f"num_clusters={self.num_clusters} needs as many rows, got n_samples={len(X)}"
            )
        self._fit(X, int(self.num_clusters))
        self.labels_ = self._shares(self._batch(X)).argmax(1)
        return self

    def predict(self, X: Any) -> Array:
        """The most probable cluster of each row, ``(n,)``, from 0 to K - 1."""
        return self._shares(self._read(X)).argmax(1)

    def predict_proba(self, X: Any) -> Array:
        """Probabilities of the clusters, ``(n, K)``."""
        return self._shares(self._read(X))

    def score(self, X: Any, y: Any = None) -> float:
        """The mean of :meth:`score_samples`, for model selection on held-out rows."""
        return float(self.score_samples(X).mean(dtype=np.float64))
