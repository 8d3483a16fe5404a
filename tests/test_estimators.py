"""The scikit-learn front door: scikit-learn's own checks, exact scores, holes, files, pipelines."""

import copy
import pickle

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal
from sklearn.base import clone
from sklearn.calibration import CalibratedClassifierCV
from sklearn.datasets import load_digits, make_blobs
from sklearn.frozen import FrozenEstimator
from sklearn.metrics import adjusted_rand_score, pairwise_distances_argmin
from sklearn.model_selection import GridSearchCV, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_classifiers_classes, parametrize_with_checks

from pyrozoo.inference import metrics
from pyrozoo.zoo import estimators
from pyrozoo.zoo.estimators import DeepClassifier, DeepClusterer

SMALL = {"latent_dim": 2, "hidden": (8,), "epochs": 1, "num_samples": 2, "random_state": 0}
QUICK = {"epochs": 10, "num_starts": 1, "lr": 1e-2}
GOOD = {"epochs": 20, "num_starts": 3, "lr": 1e-2, "batch_size": 32}
STEPS = {"lr": 0.1, "batch_size": 32}


def small_clusterer(**options):
    return DeepClusterer(**{"num_clusters": 3, "start": QUICK, **SMALL, **options})


def small_classifier(**options):
    return DeepClassifier(**{**SMALL, **STEPS, **options})


def expected_failures(estimator):
    if isinstance(estimator, DeepClassifier) and estimator.unlabelled == -1:
        reason = "uses -1 as a class; here it says that a row has no label, as in semi_supervised"
        return {"check_classifiers_classes": reason}
    return {}


@parametrize_with_checks(
    [small_clusterer(), small_classifier()], expected_failed_checks=expected_failures
)
def test_scikit_learn(estimator, check):
    check(estimator)


def test_minus_one_is_a_class_when_no_label_says_unknown():
    check_classifiers_classes("DeepClassifier", small_classifier(unlabelled=None))


@pytest.fixture(scope="module")
def blobs():
    x, y = make_blobs(120, 4, centers=3, cluster_std=0.7, random_state=1)
    return x * [1.0, 10.0, 0.1, 3.0] + 5.0, y


@pytest.fixture(scope="module")
def clusterer(blobs):
    return small_clusterer(start=GOOD, epochs=5, lr=1e-2).fit(blobs[0])


@pytest.fixture(scope="module")
def classifier(blobs):
    x, y = blobs
    some = np.where(np.arange(len(y)) % 4, -1, y)
    return small_classifier(epochs=3).fit(x, some)


@pytest.fixture(params=["clusterer", "classifier"])
def fitted(request):
    return request.getfixturevalue(request.param)


def holes(x, share, seed=0):
    return np.where(np.random.default_rng(seed).random(x.shape) < share, np.nan, x)


# ---- clusters and classes ------------------------------------------------------------------------


def test_clusters_are_found_with_and_without_holes(blobs, clusterer):
    x, y = blobs
    assert adjusted_rand_score(y, clusterer.labels_) > 0.95
    assert np.array_equal(clusterer.labels_, clusterer.predict(x))
    assert clusterer.predict_proba(x).shape == (120, 3)
    broken = small_clusterer(start=GOOD, lr=1e-2).fit(holes(x, 0.2))
    assert adjusted_rand_score(y, broken.predict(x)) > 0.95
    assert adjusted_rand_score(y, broken.labels_) > 0.8
    nothing = broken.predict_proba(np.full((2, 4), np.nan))
    prior = torch.softmax(broken.result_.program.logits, 0).detach().numpy()
    assert np.allclose(nothing, prior)


def test_few_labels_and_holes(blobs, classifier):
    x, y = blobs
    unseen = np.arange(len(y)) % 4 > 0
    assert classifier.score(x[unseen], y[unseen]) > 0.95
    assert classifier.score(holes(x, 0.2), y) > 0.7
    assert np.allclose(classifier.predict_proba(np.full((1, 4), np.nan)), 1 / 3)
    vade = DeepClassifier(method="vade", start=GOOD, lr=1e-2, **SMALL)
    vade.fit(holes(x, 0.1), np.where(unseen, -1, y))
    assert vade.score(x[unseen], y[unseen]) > 0.95


def test_strings_and_a_single_class(blobs):
    x, y = blobs
    names = np.array(["ash", "beech", "cedar"])[y]
    some = np.where(np.arange(len(y)) % 2, "", names)
    named = small_classifier(unlabelled="").fit(x, some)
    assert named.classes_.tolist() == ["ash", "beech", "cedar"]
    assert np.mean(named.predict(x) == names) > 0.9
    assert set(named.sample(20)[1]) <= set(names)
    kept = small_classifier().fit(x, some)  # -1 marks nothing among strings
    assert kept.classes_.tolist() == ["", "ash", "beech", "cedar"]
    only = small_classifier().fit(x, np.where(y == 1, 7, -1))
    assert only.predict(x[:3]).tolist() == [7, 7, 7]
    with pytest.raises(ValueError, match="all 120 labels are -1"):
        small_classifier().fit(x, np.full(120, -1))


@pytest.fixture(scope="module")
def digits():
    """1,097 rows to train on, 40 of them with a label, and 700 to test on."""
    x, y = load_digits(return_X_y=True)
    train, test, label, truth = train_test_split(x, y, test_size=700, random_state=0, stratify=y)
    known = np.zeros(len(label), dtype=bool)
    known[np.random.RandomState(0).permutation(len(label))[:40]] = True
    model = DeepClassifier(hidden=(64,), epochs=12, lr=5e-3, random_state=0)
    model.fit(train, np.where(known, label, -1))
    scaler = StandardScaler().fit(train)
    means = [scaler.transform(train[known & (label == k)]).mean(0) for k in range(10)]
    nearest = pairwise_distances_argmin(scaler.transform(test), np.stack(means))
    return model, nearest, test, truth


def test_digits_with_few_labels_beat_the_nearest_mean(digits):
    model, nearest, test, truth = digits
    assert model.score(test, truth) > np.mean(nearest == truth) + 0.02


def test_calibration_is_measured_and_can_be_mended(digits):
    model, _, test, truth = digits
    before = model.calibration_error(test[350:], truth[350:])
    wrapped = CalibratedClassifierCV(FrozenEstimator(model), method="isotonic")
    wrapped.fit(test[:350], truth[:350])
    after = metrics.calibration_error(wrapped.predict_proba(test[350:]), truth[350:])
    assert after < before
    ignoring = np.where(np.arange(350) % 2, -1, truth[350:])
    assert model.calibration_error(test[350:], ignoring) == pytest.approx(
        model.calibration_error(test[350::2], truth[350::2])
    )
    with pytest.raises(ValueError, match=r"labels \[77\] are not among"):
        model.calibration_error(test[:2], [77, 1])


# ---- scores and samples --------------------------------------------------------------------------


def linear_components(model, x):
    """log p(x, y) of every row and value of y, ``(n, K)``, of a model with a linear decoder."""
    program, options = model.result_.program, model._options
    size, dim = model._size, options["latent_dim"]
    units = torch.from_numpy(model.scale_)
    probes = torch.cat([torch.zeros(1, dim), torch.eye(dim)]).double()
    total = []
    with torch.no_grad():
        for k in range(size):
            if options.get("num_clusters"):
                loc, scale = program.loc[k], program.scale[k]
                prior = torch.log_softmax(program.logits, 0)[k].item()
                out = program.decoder(probes)
            else:
                loc, scale = torch.zeros(dim).double(), torch.ones(dim).double()
                prior = -np.log(size)
                out = program.decoder(probes, torch.eye(size).double()[[k] * (dim + 1)])
            weight = (out.mean[1:] - out.mean[:1]).T * units[:, None]
            mean = out.mean[0] * units + torch.from_numpy(model.mean_) + weight @ loc
            noise = units * out.stddev[0]
            cov = weight @ torch.diag(scale**2) @ weight.T + torch.diag(noise**2)
            mean, cov = mean.numpy(), cov.numpy()
            rows = []
            for row in x:
                known = ~np.isnan(row)
                part = multivariate_normal(mean[known], cov[np.ix_(known, known)])
                rows.append(prior + part.logpdf(row[known]))
            total.append(rows)
    return np.array(total).T


@pytest.mark.parametrize("kind", [DeepClusterer, DeepClassifier])
def test_scores_come_close_to_the_exact_density(kind, blobs):
    """With a linear decoder the model is a mixture of factor analysers."""
    x, y = blobs
    options = {"latent_dim": 1, "hidden": (), "epochs": 15, "num_samples": 80, **STEPS}
    if kind is DeepClusterer:
        model = DeepClusterer(2, start=QUICK, random_state=0, **options).fit(holes(x, 0.1))
    else:
        model = DeepClassifier(random_state=0, **options).fit(holes(x, 0.1), y % 2)
    rows = holes(x[:30], 0.1)
    parts = linear_components(model, rows)
    exact = np.logaddexp.reduce(parts, axis=1)
    found = model.score_samples(rows)
    few = model.set_params(num_samples=1).score_samples(rows)
    assert np.median(np.abs(found - exact)) < 0.05
    assert np.abs(found - exact).mean() < 0.5 * np.abs(few - exact).mean()
    if kind is DeepClusterer:
        responsibilities = np.exp(parts - exact[:, None])
        model.set_params(num_samples=80)
        assert np.abs(model.predict_proba(rows) - responsibilities).mean() < 0.1


def test_scores_are_densities_in_the_units_of_the_data(blobs):
    x, _ = blobs
    model = small_clusterer().fit(x)
    tenfold = small_clusterer().fit(10 * x)
    rows = holes(x, 0.2)
    known = (~np.isnan(rows)).sum(1)
    expected = model.score_samples(rows) - known * np.log(10)
    assert np.allclose(tenfold.score_samples(10 * rows), expected, rtol=1e-4)
    assert model.score(x) == pytest.approx(model.score_samples(x).mean())
    far = x.mean(0) + 30 * x.std(0)
    assert model.score_samples(far[None]) < model.score_samples(x).min()
    assert model.score_samples(np.full((1, 4), np.nan)) == pytest.approx(0.0)


def test_transform_is_exact_over_the_classes(classifier, blobs):
    x, _ = blobs
    share, total = classifier.predict_proba(x), 0.0
    for k in range(3):
        data = {**classifier._batch(x), "y": torch.full((120,), k)}
        mean = classifier.result_.predict(data, "z", num_samples=1, seed=0).numpy()
        total = total + share[:, k : k + 1] * mean
    assert np.allclose(classifier.transform(x), total)


def test_samples_have_the_units_and_names_of_the_data(fitted, blobs):
    x, _ = blobs
    draws, y = fitted.sample(2000, random_state=1)
    assert draws.shape == (2000, 4)
    assert y.shape == (2000,)
    assert set(y) == {0, 1, 2}
    assert np.all(np.abs(draws.mean(0) - x.mean(0)) < 0.6 * x.std(0))
    again, _ = fitted.sample(5)
    assert np.array_equal(again, fitted.sample(5)[0])
    assert not np.array_equal(again, fitted.sample(5, random_state=2)[0])
    with pytest.raises(ValueError, match="n_samples is an integer of at least 1, got 0"):
        fitted.sample(0)


def test_a_row_is_answered_alone_as_among_others(fitted, blobs):
    many = holes(np.tile(blobs[0], (10, 1)), 0.1)
    for ask in (fitted.predict_proba, fitted.transform, fitted.score_samples):
        whole = ask(many)
        assert np.allclose(ask(many[1150:1151]), whole[1150:1151], rtol=1e-9)
        assert np.allclose(ask(many[::-1]), whole[::-1], rtol=1e-9)


# ---- parameters, files, random state -------------------------------------------------------------


def test_everything_repeats_and_no_global_state_moves(blobs):
    x, y = blobs
    torch.manual_seed(3)
    np.random.seed(3)  # noqa: NPY002
    states = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    for make in (small_clusterer, small_classifier):
        first, second, other = (make(random_state=s).fit(x, y) for s in (0, 0, 1))
        for ask in ("predict_proba", "transform", "score_samples"):
            assert np.array_equal(getattr(first, ask)(x), getattr(second, ask)(x))
        assert not np.allclose(first.transform(x), other.transform(x))
        first.sample(3)
    assert torch.equal(states[0], torch.get_rng_state())
    assert np.array_equal(states[1], np.random.get_state()[1])  # noqa: NPY002


def test_files_and_copies_answer_bit_for_bit(fitted, blobs, tmp_path):
    rows = holes(blobs[0], 0.2)
    path = tmp_path / "model.safetensors"
    fitted.save(path)
    loaded = type(fitted).load(path)
    for twin in (loaded, copy.deepcopy(fitted), pickle.loads(pickle.dumps(fitted))):
        for ask in ("predict", "predict_proba", "transform", "score_samples"):
            assert np.array_equal(getattr(twin, ask)(rows), getattr(fitted, ask)(rows)), ask
        assert np.array_equal(twin.sample(3)[0], fitted.sample(3)[0])
        assert twin.result_.history == fitted.result_.history
        assert twin.get_params() == fitted.get_params()
    other = DeepClassifier if isinstance(fitted, DeepClusterer) else DeepClusterer
    with pytest.raises(ValueError, match=f"not a {other.__name__}"):
        other.load(path)
    assert not hasattr(clone(fitted), "result_")


def test_files_keep_names_and_refuse_what_json_cannot_hold(blobs, tmp_path):
    pd = pytest.importorskip("pandas")
    x, y = blobs
    frame = pd.DataFrame(x, columns=list("abcd"))
    names = np.array(["ash", "beech", "cedar"], dtype=object)[y]
    model = small_classifier(options={"alpha": np.float64(3.0)}).fit(frame, names)
    model.save(tmp_path / "a.safetensors")
    loaded = DeepClassifier.load(tmp_path / "a.safetensors")
    assert loaded.feature_names_in_.tolist() == list("abcd")
    assert np.array_equal(loaded.predict(frame), model.predict(frame))
    assert loaded.options == {"alpha": 3.0}
    model.set_params(random_state=np.random.RandomState(0))
    with pytest.raises(TypeError, match="random_state=RandomState"):
        model.save(tmp_path / "b.safetensors")


def test_what_was_fitted_survives_new_parameters(clusterer, blobs, tmp_path):
    twin = copy.deepcopy(clusterer).set_params(num_clusters=7, latent_dim=5, likelihood="bernoulli")
    twin.save(tmp_path / "a.safetensors")
    loaded = DeepClusterer.load(tmp_path / "a.safetensors")
    for model in (twin, loaded, pickle.loads(pickle.dumps(twin))):
        assert np.array_equal(model.predict_proba(blobs[0]), clusterer.predict_proba(blobs[0]))
        assert model.transform(blobs[0]).shape == (120, 2)


# ---- frames, pipelines, searches -----------------------------------------------------------------


def test_frames_go_in_and_out(blobs):
    pd = pytest.importorskip("pandas")
    frame = pd.DataFrame(holes(blobs[0], 0.1), columns=list("abcd"))
    frame["a"] = frame["a"].astype("Float64")
    model = small_clusterer().set_output(transform="pandas")
    codes = model.fit_transform(frame)
    assert codes.columns.tolist() == ["deepclusterer0", "deepclusterer1"]
    assert codes.columns.tolist() == model.get_feature_names_out().tolist()
    assert codes.index.equals(frame.index)
    assert model.feature_names_in_.tolist() == list("abcd")
    with pytest.raises(ValueError, match="feature names"):
        model.predict(frame.rename(columns={"a": "z"}))


def test_pipelines_and_searches(blobs):
    x, y = blobs
    pipeline = make_pipeline(StandardScaler(), small_classifier())
    search = GridSearchCV(pipeline, {"deepclassifier__latent_dim": [1, 2]}, cv=2).fit(x, y)
    assert search.best_score_ > 0.8
    assert search.score(x, y) > 0.9
    search = GridSearchCV(small_clusterer(**STEPS), {"epochs": [1, 6]}, cv=2).fit(x)
    assert search.best_params_ == {"epochs": 6}


# ---- what is refused -----------------------------------------------------------------------------


def test_bernoulli_takes_values_from_0_to_1():
    x = (np.random.default_rng(0).random((40, 6)) < 0.5).astype(float)
    model = small_clusterer(likelihood="bernoulli").fit(x)
    assert set(np.unique(model.sample(30)[0])) == {0.0, 1.0}
    assert np.all(model.score_samples(x) < 0)
    assert np.array_equal(model.mean_, np.zeros(6))
    for act in (small_clusterer(likelihood="bernoulli").fit, model.predict):
        with pytest.raises(ValueError, match="from 0 to 1, got 0 to 3"):
            act(3 * x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_clusters": 200}, "num_clusters=200 needs as many rows, got n_samples=120"),
        ({"num_clusters": 0}, "num_clusters is an integer of at least 1, got 0"),
        ({"latent_dim": 2.5}, "latent_dim is an integer of at least 1, got 2.5"),
        ({"num_samples": True}, "num_samples is an integer"),
        ({"method": "mvae"}, "mvae has no finite site y"),
        ({"method": "vadee"}, "did you mean 'vade'"),
        ({"likelihood": "poisson"}, "likelihood is 'normal'"),
        ({"options": {"init_scal": 1.0}}, "did you mean 'init_scale'"),
        ({"options": {"latent_dim": 3}}, "latent_dim is a parameter of its own"),
        ({"epochs": 0}, "epochs is at least 1"),
    ],
)
def test_bad_parameters_are_named(options, message, blobs):
    with pytest.raises(ValueError, match=message):
        small_clusterer(**options).fit(blobs[0])


def test_bad_data_are_named(blobs):
    x, y = blobs
    with pytest.raises(ValueError, match="all 480 entries of X are missing"):
        small_clusterer().fit(np.full_like(x, np.nan))
    with pytest.raises(ValueError, match="infinity"):
        small_clusterer().fit(np.where(x > 0, np.inf, x))
    with pytest.raises(TypeError, match="sample_weight"):
        small_classifier().fit(x, y, sample_weight=np.ones(120))
    with pytest.raises(ValueError, match="has no pretraining"):
        small_classifier(start={"epochs": 3}).fit(x, y)


def test_odd_columns(blobs):
    """One column that nobody knows, one that never varies."""
    x, _ = blobs
    odd = np.c_[x, np.full(120, np.nan), np.full(120, 3.0)]
    model = small_clusterer().fit(odd)
    assert np.array_equal(model.mean_[4:], [0.0, 3.0])
    assert np.array_equal(model.scale_[4:], [1.0, 1.0])
    assert np.isfinite(model.score_samples(odd)).all()
    assert small_clusterer().fit(x[:4, :1]).labels_.shape == (4,)


def test_methods_are_those_with_a_finite_site_and_columns():
    assert {"vade", "m2"} <= set(estimators.methods())
    assert "mvae" not in estimators.methods()
