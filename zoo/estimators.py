"""The scikit-learn front door: clustering and classification by a method of the catalogue.

======================= =======================================================================
:class:`DeepClusterer`  y is the cluster, never observed
:class:`DeepClassifier` y is the class, observed where the label is known
======================= =======================================================================

Both take any method with a finite site ``y`` over real columns ``x``.  NaN in ``X`` says that an
entry is missing, in training and afterwards; it is summed out, which is right when data are missing
at random.  For a normal likelihood, columns are standardised on the known entries of the training
rows, and whatever comes back is in their own units.

What an estimator says of a row depends on that row and the parameters alone: the Gaussian draws of
the guide come from one seed, taken from ``random_state`` at fit, and all rows share their noise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyro
import pyro.poutine as poutine
import torch
from numpy.typing import NDArray
from sklearn.base import (
    BaseEstimator,
    ClassifierMixin,
    ClassNamePrefixFeaturesOutMixin,
    ClusterMixin,
    TransformerMixin,
)
from sklearn.preprocessing import StandardScaler
from sklearn.utils import check_random_state, column_or_1d
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from pyrozoo.guides.steady import Steady
from pyrozoo.inference import (
    Batch,
    EnumELBO,
    Observed,
    Result,
    checkpoint,
    metrics,
    pair,
    predict,
    responsibilities,
)
from pyrozoo.inference.modes import evaluating, seeded
from pyrozoo.zoo import catalogue

SIZES = ("num_clusters", "num_classes")  # what methods call the number of values of y
STARTS = {"vade": {"epochs": 100, "lr": 2e-3, "noise": 0.2}}  # pretraining, as in the experiments
SLICE = 1024  # rows at a time

Array = NDArray[Any]


def methods() -> list[str]:
    """Names of the methods that the estimators can use."""
    return [name for name in catalogue.list_methods() if _size_option(name)]


def _size_option(name: str) -> str:
    """The option with the number of values of y, or '' where the method does not fit here."""
    options = catalogue.method(name).options
    here = {"latent_dim", "hidden", "likelihood"} <= options.keys()
    return next((size for size in SIZES if size in options and here), "")


# ---- the estimators ------------------------------------------------------------------------------


class _Estimator(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """What the two have in common: everything but the meaning of y."""

    def _fit(self, X: Array, size: int, labels: Any = None) -> None:
        """Fit to rows ``(n, features)``, NaN where missing, and perhaps to labels."""
        for name in ("latent_dim", "num_samples"):
            _check_count(name, getattr(self, name))
        if not _size_option(self.method):
            raise ValueError(
                f"{self.method} has no finite site y over real columns x (methods that have:"
                f" {', '.join(methods())})"
            )
        if np.isnan(X).all():
            raise ValueError(f"all {X.size} entries of X are missing")
        own = {
            _size_option(self.method): size, "latent_dim": self.latent_dim,
            "hidden": self.hidden, "likelihood": self.likelihood,
        }  # fmt: skip
        if twice := own.keys() & (self.options or {}).keys():
            raise ValueError(f"options: {', '.join(sorted(twice))} is a parameter of its own")
        if hasattr(self, "result_"):
            del self.result_  # a fit that fails leaves none
        self.seed_ = _draw_seed(self.random_state)
        self._method, self._size, self._options = self.method, size, own | (self.options or {})
        self.mean_, self.scale_ = _moments(X, self.likelihood)
        data = self._batch(X)
        if labels is not None:
            data["y"] = labels
        model = catalogue.create(self._method, data, seed=self.seed_, **self._options)
        start = self.start
        if start is None and model.start is not None:
            start = STARTS.get(self.method)
        settings = {
            "epochs": self.epochs, "batch_size": self.batch_size, "lr": self.lr,
            "device": self.device, "progress": self.verbose,
        }  # fmt: skip
        with seeded(self.seed_):  # whatever the pretraining draws
            result = model.fit(
                data, seed=self.seed_, start=start, **settings, **(self.settings or {})
            )
        self._keep(model, result.history, result.sites)

    def _keep(self, model: catalogue.Model, history: Any, sites: Any) -> None:
        """Keep the pair in double precision, so that rounding does not tell rows apart."""
        program, guide = model.program.cpu().double(), model.guide.cpu().double()
        self.result_ = Result(program, guide, EnumELBO(), history=history, sites=sites)
        row = Batch.of(self._batch(self.mean_[None]))
        with torch.no_grad(), seeded(0), poutine.block():
            self._y_in_guide = "y" in poutine.trace(guide).get_trace(row)
        self._steady = Steady(guide)
        self._pair = pair(program, self._steady)  # once, since it keeps what it learns of the graph

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "result_")

    def _restore(self, tensors: Mapping[str, Tensor], history: Any, sites: Any, at: str) -> None:
        """Make the method again, with these parameters."""
        example = {"x": torch.zeros(1, self.n_features_in_)}
        model = catalogue.create(self._method, example, **self._options)
        checkpoint.unpack_modules(tensors, at, program=model.program, guide=model.guide)
        self._keep(model, history, sites)

    def __getstate__(self) -> Any:
        state = dict(super().__getstate__())
        if (result := state.pop("result_", None)) is not None:
            del state["_pair"], state["_steady"]
            state["_packed"] = _single(result.parameters), result.history, result.sites
        return state

    def __setstate__(self, state: Any) -> None:
        super().__setstate__({name: v for name, v in state.items() if name != "_packed"})
        if "_packed" in state:
            tensors, history, sites = state["_packed"]
            self._restore(tensors, history, sites, "the pickled estimator")

    def transform(self, X: Any) -> Array:
        """Means of z under the guide, ``(n, latent_dim)``; a y that it proposes is summed out."""
        data = self._read(X)
        parts = self._parts(data)
        p, q = self._halves()
        means = [predict(p, q, part, "z", num_samples=1, seed=0) for part in parts]
        if len(means) == 1:
            return means[0].numpy()
        share = responsibilities(p, q, data, num_samples=1, seed=0)
        return torch.einsum("nk,knd->nd", share, torch.stack(means)).numpy()

    def score_samples(self, X: Any) -> Array:
        """An estimate of the log evidence of every row, ``(n,)``, in nats.

        It is the importance-weighted bound with ``num_samples`` draws: below the log evidence in
        expectation over draws, and close to it with many.  As rows share the draws, means over rows
        (:meth:`score`) need as many as single rows do.

        The evidence is the density of what is known of the row, in the units of ``X``; with the
        Bernoulli likelihood a probability, where all values are 0 or 1.  A row without any known
        entry has 0.
        """
        data = self._read(X)
        objective = EnumELBO(kl="sampled", split=False)
        p, q = self._halves()
        batches = [Batch.of(part) for part in self._parts(data)]
        rows = len(data["x"][0])
        total = torch.zeros(self.num_samples, len(batches), rows, dtype=torch.float64)
        with torch.no_grad(), evaluating(p, q), pyro.validation_enabled(False), seeded(0):
            for draw, value in np.ndindex(total.shape[:2]):
                self._halves(draw)
                for a in range(0, rows, SLICE):
                    some = batches[value][a : a + SLICE]
                    total[draw, value, a : a + SLICE] = objective.per_row(p, q, some)
        bound = total.logsumexp(0) - math.log(self.num_samples)  # with y in the guide: for each y
        jacobian = data["x"][1].double() @ torch.from_numpy(self.scale_).log()
        return (bound.logsumexp(0) - jacobian).numpy()

    def sample(self, n_samples: int = 1, random_state: Any = None) -> tuple[Array, Array]:
        """Generate rows ``(n_samples, features)``, and the cluster or class of each.

        Args:
            n_samples: how many.
            random_state: of the draws; default: the estimator's, so that an integer there gives the
                same rows every time.
        """
        check_is_fitted(self)
        _check_count("n_samples", n_samples)
        seed = _draw_seed(self.random_state if random_state is None else random_state)
        draws = self.result_.posterior(Batch.of(int(n_samples)), predictive=True, seed=seed)
        x, y = draws["x"][0].double().numpy(), draws["y"][0].long().numpy()
        return x * self.scale_ + self.mean_, self._names(y)

    def save(self, path: str | Path) -> None:
        """Write everything to one safetensors file, without pickle; :meth:`load` reads it.

        Raises:
            TypeError: a parameter cannot be written as JSON; the message names it.
        """
        check_is_fitted(self)
        tensors, lists = _single(self.result_.parameters), {}
        for name in ("mean_", "scale_", "labels_"):
            if hasattr(self, name):
                tensors[name] = torch.from_numpy(getattr(self, name))
        for name in ("classes_", "feature_names_in_"):
            if hasattr(self, name):
                array = getattr(self, name)
                lists[name] = [str(array.dtype), _plain(name, array.tolist())]
        facts = {
            "kind": type(self).__name__, "lists": lists, "seed": self.seed_,
            "parameters": {k: _plain(k, v) for k, v in self.get_params(deep=False).items()},
            "features": self.n_features_in_, "method": self._method, "size": self._size,
            "options": _plain("options", self._options),
            "history": self.result_.history, "sites": self.result_.sites,
        }  # fmt: skip
        checkpoint.save(path, tensors, facts)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what :meth:`save` wrote; sequences among the parameters come back as tuples.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is damaged or holds something else.
        """
        tensors, meta = checkpoint.load(path)
        if meta.get("kind") != cls.__name__:
            raise ValueError(f"{path} holds {meta.get('kind')!r}, not a {cls.__name__}")
        self = cls(**{name: _tuples(value) for name, value in meta["parameters"].items()})
        self.n_features_in_, self.seed_ = meta["features"], meta["seed"]
        self._method, self._size = meta["method"], meta["size"]
        self._options = _tuples(meta["options"])
        for name in tensors.keys() & {"mean_", "scale_", "labels_"}:
            setattr(self, name, tensors[name].numpy())
        for name, (dtype, values) in meta["lists"].items():
            setattr(self, name, np.array(values, dtype=dtype))
        self._restore(tensors, meta["history"], meta["sites"], str(path))
        return self

    def _shares(self, data: Mapping[str, Any]) -> Array:
        p, q = self._halves()
        return responsibilities(p, q, data, num_samples=self.num_samples, seed=0).numpy()

    def _halves(self, draw: int = 0) -> tuple[Observed, Observed]:
        """The pair to ask, with the noise of one draw."""
        self._steady.seed = self.seed_ + draw
        return self._pair

    def _read(self, X: Any) -> dict[str, Any]:
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float64, ensure_all_finite="allow-nan", reset=False)
        return self._batch(X)

    def _batch(self, X: Array) -> dict[str, Any]:
        """Rows in the units of the model, and which entries are known."""
        known = ~np.isnan(X)
        if self._options["likelihood"] == "bernoulli" and known.any():
            low, high = X[known].min(), X[known].max()
            if low < 0 or high > 1:
                raise ValueError(
                    f"likelihood='bernoulli' takes values from 0 to 1, got {low:g} to {high:g};"
                    " likelihood='normal' takes any"
                )
        scaled = np.where(known, (X - self.mean_) / self.scale_, 0.0)
        return {"x": (torch.from_numpy(scaled), torch.from_numpy(known))}

    def _parts(self, data: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The data, or, where the guide would draw y, the data with each value of y in turn."""
        if not self._y_in_guide:
            return [dict(data)]
        ones = torch.ones(len(data["x"][0]), dtype=torch.long)
        return [{**data, "y": k * ones} for k in range(self._size)]

    def _names(self, y: Array) -> Array:
        return y

    @property
    def _n_features_out(self) -> int:
        return int(self._options["latent_dim"])

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        return tags


class DeepClusterer(ClusterMixin, _Estimator):
    """Clustering by a deep latent-variable model, by default VaDE.

    Args:
        num_clusters: K.
        method: one of :func:`methods`.
        latent_dim: dimension of z.
        hidden: widths of the networks' hidden layers.
        likelihood: ``"normal"`` (standardised columns), ``"normal(SCALE)"`` (SCALE in standard
            deviations of the column) or ``"bernoulli"`` (values from 0 to 1, used as they are).
        epochs, batch_size, lr: of the fit.
        start: options of the method's pretraining; default: ``STARTS``, else the method's own.
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
        _check_count("num_clusters", self.num_clusters)
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


class DeepClassifier(ClassifierMixin, _Estimator):
    """Classification by a deep latent-variable model, with few labels or many, by default M2.

    Rows whose label is ``unlabelled`` are used without one: -1 as in
    :mod:`sklearn.semi_supervised`, where labels are integers; for strings choose a string, such as
    ``unlabelled=""``; with ``None`` every label names a class.

    Probabilities are no better calibrated than the model fits; :meth:`calibration_error` says how
    far they are off.  To mend them, wrap the fitted classifier and fit the wrapper to labelled rows
    that were held out: ``CalibratedClassifierCV(FrozenEstimator(classifier), method="isotonic")``
    (the wrapper's own splits would take ``unlabelled`` for a class).  It need not help: on digits
    in short runs it lowered an error of 0.06 to 0.10 (40 labels, three seeds) to 0.03 to 0.06, but
    one of 0.03 to 0.05 (60 labels) about as often raised as lowered; ``method="sigmoid"``,
    scikit-learn's default, raised all six.

    Args:
        unlabelled: the label that stands for none.

    The other arguments and attributes are those of :class:`DeepClusterer`; ``classes_`` are the
    labels in order.
    """

    def __init__(
        self,
        *,
        method: str = "m2",
        unlabelled: Any = -1,
        latent_dim: int = 10,
        hidden: Sequence[int] = (256, 256),
        likelihood: str = "normal",
        epochs: int = 60,
        batch_size: int = 100,
        lr: float = 1e-3,
        start: Mapping[str, Any] | None = None,
        options: Mapping[str, Any] | None = None,
        settings: Mapping[str, Any] | None = None,
        num_samples: int = 16,
        device: str = "auto",
        verbose: bool = False,
        random_state: Any = None,
    ) -> None:
        self.method = method
        self.unlabelled = unlabelled
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

    def fit(self, X: Any, y: Any) -> Self:
        """Fit to rows ``(n, features)``, NaN where missing, and labels ``(n,)``.

        Raises:
            ValueError: parameters or data do not fit, or no row has a label.
        """
        X, y = validate_data(self, X, y, dtype=np.float64, ensure_all_finite="allow-nan")
        check_classification_targets(y)
        known = self._known(y)
        if not known.any():
            raise ValueError(f"all {len(y)} labels are {self.unlabelled!r}, that is, unknown")
        self.classes_, found = np.unique(y[known], return_inverse=True)
        codes = np.zeros(len(y), dtype=np.int64)
        codes[known] = found
        labels = torch.from_numpy(codes), torch.from_numpy(known)
        self._fit(X, len(self.classes_), labels)
        return self

    def predict(self, X: Any) -> Array:
        """The most probable class of each row, ``(n,)``."""
        return self._names(self._shares(self._read(X)).argmax(1))

    def predict_proba(self, X: Any) -> Array:
        """Probabilities of ``classes_``, ``(n, K)``."""
        return self._shares(self._read(X))

    def calibration_error(self, X: Any, y: Any, num_bins: int = 15) -> float:
        """The expected calibration error on rows with a label; those without are left out.

        See :func:`pyrozoo.inference.metrics.calibration_error`.
        """
        probabilities = self.predict_proba(X)
        y = column_or_1d(y)
        if len(y) != len(probabilities):
            raise ValueError(f"got {len(probabilities)} rows, but {len(y)} labels")
        known = self._known(y)
        if strange := set(y[known].tolist()) - set(self.classes_.tolist()):
            raise ValueError(f"labels {sorted(strange)} are not among {self.classes_.tolist()}")
        codes = np.searchsorted(self.classes_, y[known])
        return metrics.calibration_error(probabilities[known], codes, num_bins)

    def _known(self, y: Array) -> NDArray[np.bool_]:
        return np.array([label != self.unlabelled for label in y.tolist()], dtype=bool)

    def _names(self, y: Array) -> Array:
        return self.classes_[y]


# ---- small things --------------------------------------------------------------------------------


def _check_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ValueError(f"{name} is an integer of at least 1, got {value!r}")


def _draw_seed(random_state: Any) -> int:
    return int(check_random_state(random_state).randint(2**31 - 1))


def _moments(X: Array, likelihood: str) -> tuple[Array, Array]:
    """Mean and scale of the columns, ``(features,)``; 0 and 1 where they are used as they are."""
    if likelihood == "bernoulli":
        return np.zeros(X.shape[1]), np.ones(X.shape[1])
    if not isinstance(likelihood, str) or not likelihood.startswith("normal"):
        raise ValueError(
            f"likelihood is 'normal', 'normal(SCALE)' or 'bernoulli', got {likelihood!r}"
        )
    empty = np.isnan(X).all(0)
    scaler = StandardScaler().fit(np.where(empty, 0.0, X))
    return scaler.mean_, scaler.scale_


def _single(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters in single precision, in which they were trained: nothing is lost."""
    return {name: v.float() if v.is_floating_point() else v for name, v in tensors.items()}


def _plain(name: str, value: Any) -> Any:
    """What JSON can write."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _plain(f"{name}[{key!r}]", v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(name, v) for v in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(
        f"{name}={value!r} cannot be written as JSON; put something plain there with"
        f" set_params before saving, or pickle the estimator"
    )


def _tuples(value: Any) -> Any:
    """Lists, which is what JSON makes of tuples, as tuples."""
    if isinstance(value, dict):
        return {key: _tuples(v) for key, v in value.items()}
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value
