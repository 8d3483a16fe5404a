"""What the estimators have in common: fit, codes, scores, draws, files."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyro
import pyro.poutine as poutine
import torch
from sklearn.base import (
    BaseEstimator,
    ClassNamePrefixFeaturesOutMixin,
    TransformerMixin,
)
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from pyrozoo.guides.steady import Steady
from pyrozoo.inference import (
    Batch,
    EnumELBO,
    Observed,
    Result,
    checkpoint,
    pair,
    predict,
    responsibilities,
)
from pyrozoo.inference.modes import evaluating, seeded
from pyrozoo.zoo import catalogue
from pyrozoo.zoo.estimators.values import (
    Array,
    check_count,
    draw_seed,
    moments,
    plain,
    single,
    tuples,
)

SIZES = ("num_clusters", "num_classes")  # what methods call the number of values of y
STARTS = {"vade": {"epochs": 100, "lr": 2e-3, "noise": 0.2}}  # pretraining, as in the experiments
SLICE = 1024  # rows at a time


def methods() -> list[str]:
    """Names of the methods that the estimators can use."""
    return [name for name in catalogue.list_methods() if size_option(name)]


def size_option(name: str) -> str:
    """The option with the number of values of y, or '' where the method does not fit here."""
    options = catalogue.method(name).options
    here = {"latent_dim", "hidden", "likelihood"} <= options.keys()
    return next((size for size in SIZES if size in options and here), "")


class Estimator(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """What the two have in common: everything but the meaning of y."""

    def _fit(self, X: Array, size: int, labels: Any = None) -> None:
        """Fit to rows ``(n, features)``, NaN where missing, and perhaps to labels."""
        for name in ("latent_dim", "num_samples"):
            check_count(name, getattr(self, name))
        if not size_option(self.method):
            raise ValueError(
                f"{self.method} has no finite site y over real columns x (methods that have:"
                f" {', '.join(methods())})"
            )
        if np.isnan(X).all():
            raise ValueError(f"all {X.size} entries of X are missing")
        own = {
            size_option(self.method): size, "latent_dim": self.latent_dim,
            "hidden": self.hidden, "likelihood": self.likelihood,
        }  # fmt: skip
        if twice := own.keys() & (self.options or {}).keys():
            raise ValueError(f"options: {', '.join(sorted(twice))} is a parameter of its own")
        if hasattr(self, "result_"):
            del self.result_  # a fit that fails leaves none
        self.seed_ = draw_seed(self.random_state)
        self._method, self._size, self._options = self.method, size, own | (self.options or {})
        self.mean_, self.scale_ = moments(X, self.likelihood)
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
            state["_packed"] = single(result.parameters), result.history, result.sites
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
        check_count("n_samples", n_samples)
        seed = draw_seed(self.random_state if random_state is None else random_state)
        draws = self.result_.posterior(Batch.of(int(n_samples)), predictive=True, seed=seed)
        x, y = draws["x"][0].double().numpy(), draws["y"][0].long().numpy()
        return x * self.scale_ + self.mean_, self._names(y)

    def save(self, path: str | Path) -> None:
        """Write everything to one safetensors file, without pickle; :meth:`load` reads it.

        Raises:
            TypeError: a parameter cannot be written as JSON; the message names it.
        """
        check_is_fitted(self)
        tensors, lists = single(self.result_.parameters), {}
        for name in ("mean_", "scale_", "labels_"):
            if hasattr(self, name):
                tensors[name] = torch.from_numpy(getattr(self, name))
        for name in ("classes_", "feature_names_in_"):
            if hasattr(self, name):
                array = getattr(self, name)
                lists[name] = [str(array.dtype), plain(name, array.tolist())]
        facts = {
            "kind": type(self).__name__, "lists": lists, "seed": self.seed_,
            "parameters": {k: plain(k, v) for k, v in self.get_params(deep=False).items()},
            "features": self.n_features_in_, "method": self._method, "size": self._size,
            "options": plain("options", self._options),
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
        self = cls(**{name: tuples(value) for name, value in meta["parameters"].items()})
        self.n_features_in_, self.seed_ = meta["features"], meta["seed"]
        self._method, self._size = meta["method"], meta["size"]
        self._options = tuples(meta["options"])
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
