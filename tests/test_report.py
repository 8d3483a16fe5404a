import base64
import math
import re
import struct
from html.parser import HTMLParser

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

from pyrozoo.guides import Amortized, Classifier, ProductOfExperts, Sequential
from pyrozoo.inference import EnumELBO, Result, Tracker, checkpoint, fit, metrics
from pyrozoo.inference.reports import cards, diagnosis, epochs, plots, report
from pyrozoo.zoo import datasets, folders, runs
from pyrozoo.zoo.clustering import VaDE
from pyrozoo.zoo.multimodal import MVAE
from pyrozoo.zoo.semisupervised import M2

DIGITS = datasets.load("digits")
X, Y = DIGITS.x[:160], DIGITS.y[:160]
IMAGES = {"x": (1, 8, 8)}


@pytest.fixture
def coarse(monkeypatch):
    """Draw few pixels, and for light pages only."""
    monkeypatch.setattr(cards, "DPI", 20)
    monkeypatch.setattr(
        cards, "png", lambda figure, dark, png=cards.png: b"" if dark else png(figure)
    )


@pytest.fixture
def blank(monkeypatch):
    """Make the figures, but do not draw them."""
    monkeypatch.setattr(cards, "png", lambda figure, dark: b"")


class Page(HTMLParser):
    """Tags, addresses and words of a page; refuses tags that are not closed."""

    VOID = ("meta", "link", "img", "source")

    def __init__(self, path):
        super().__init__()
        self.text = path.read_text("utf-8")
        self.open, self.tags, self.addresses, self.words, self.images = [], [], [], [], []
        self.feed(self.text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        found = dict(attrs)
        self.addresses += [found[k] for k in ("src", "href", "srcset") if k in found]
        if tag == "img":
            self.images.append(found)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data.strip())

    @property
    def titles(self):
        return re.findall(r"<h2>(.*?)</h2>", self.text)


def train(program, guide, data, **options):
    return fit(program, guide, data, epochs=2, batch_size=64, progress=False, **options)


def vade(x=X, num_clusters=4, latent_dim=3, likelihood="bernoulli", **options):
    torch.manual_seed(0)
    program = VaDE(x.shape[1], num_clusters, latent_dim, (16,), likelihood)
    return train(program, Amortized(program, ["x"], (16,)), {"x": x}, **options)


@pytest.fixture(scope="module")
def fitted():
    return vade(validation=0.2)


@pytest.fixture(scope="module")
def page(fitted, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "page.html"
    baselines = {"kmeans": {"hungarian_accuracy": 0.1234, "own_measure": 7.0}}
    scores = report.write(
        path, fitted, {"x": X}, labels=Y, images=IMAGES, baselines=baselines, facts={"seed": 3}
    )
    return Page(path), scores


def test_page_has_every_picture_in_both_modes(page):
    found, _ = page
    assert len(found.images) == 7
    assert found.tags.count("source") == 7
    for image in found.images:
        png = base64.b64decode(image["src"].removeprefix("data:image/png;base64,"), validate=True)
        width, height = struct.unpack(">II", png[16:24])
        assert width == pytest.approx(2 * int(image["width"]), abs=2)
        assert height > 100
        assert len(image["alt"]) > 40
    assert len(found.text) < 3_000_000


def test_page_is_self_contained(page):
    found, _ = page
    assert not {"script", "iframe", "object"} & set(found.tags)
    assert all(address.startswith("data:") for address in found.addresses)
    assert "url(" not in found.text
    assert "@import" not in found.text


def test_figures_are_those_of_metrics_and_on_the_page(page, fitted):
    found, scores = page
    with torch.random.fork_rng():
        torch.manual_seed(0)
        expected = metrics.clustering_report(Y, fitted.responsibilities({"x": X}))
    assert {name: scores[name] for name in expected} == expected
    assert scores["bound"] == fitted.history[fitted.best_epoch - 1]["bound"]
    assert scores["val_bound"] == fitted.history[fitted.best_epoch - 1]["val_bound"]
    for name in ("hungarian_accuracy", "majority_accuracy", "nmi", "ari", "mean_confidence"):
        assert f"{scores[name]:.3f}".replace("-", "\N{MINUS SIGN}") in found.words
    assert {"0.123", "own_measure", "7.000", "seed", "y: summed over 4 values"} <= set(found.words)


def test_writing_changes_nothing_and_repeats_exactly(fitted, coarse, tmp_path):
    before = {k: v.clone() for k, v in fitted.parameters.items()}
    state = torch.get_rng_state()
    first = report.write(tmp_path / "a.html", fitted, {"x": X}, images=IMAGES)
    assert torch.equal(state, torch.get_rng_state())
    assert first == report.write(tmp_path / "b.html", fitted, {"x": X}, images=IMAGES)
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
    assert all(torch.equal(before[k], v) for k, v in fitted.parameters.items())


def test_without_labels_and_without_images(fitted, blank, tmp_path):
    scores = report.write(tmp_path / "page.html", fitted, {"x": X})
    assert set(scores) == {"bound", "val_bound", "mean_confidence", "clusters_used"}
    found = Page(tmp_path / "page.html")
    assert len(found.images) == 6
    assert "Labels against clusters" not in found.titles


@pytest.mark.parametrize("rows", [1, 5])
def test_few_rows_one_latent_dimension_and_many_columns(rows, coarse, tmp_path):
    x = torch.randn(rows, 400)
    result = vade(x, num_clusters=3, latent_dim=1, likelihood="normal")
    labels = np.arange(rows)
    assert report.write(tmp_path / "page.html", result, {"x": x}, labels=labels)["bound"] < 0
    assert len(Page(tmp_path / "page.html").images) == 7


def test_one_cluster_used_and_identical_codes(fitted, blank, tmp_path):
    scores = report.write(tmp_path / "page.html", fitted, {"x": X[:1].expand(9, -1)}, labels=Y[:9])
    assert scores["clusters_used"] == 1
    assert "of 4" in " ".join(Page(tmp_path / "page.html").words)


def test_missing_entries_and_columns(blank, tmp_path):
    known = torch.rand(X.shape, generator=torch.Generator().manual_seed(0)) < 0.7
    known[:, 3], known[5] = False, False
    program = VaDE(64, 3, 2, (16,))
    data = {"x": (X, known)}
    result = train(program, Amortized(program, ["x"], (16,)), data)
    path = tmp_path / "page.html"
    for images in (None, IMAGES):
        assert report.write(path, result, data, images=images)["clusters_used"] <= 3
        assert len(Page(path).images) == 6


def test_no_cluster_and_several_modalities(blank, tmp_path):
    data = datasets.halves(X, (1, 8, 8))
    program = MVAE(dict.fromkeys(data, 32), 2, (16,))
    result = train(program, ProductOfExperts(program, list(data), hidden=(16,)), data)
    some = {**data, "x_left": (data["x_left"], torch.arange(len(X)) % 2 == 0)}
    images = dict.fromkeys(data, (1, 8, 4))
    scores = report.write(tmp_path / "page.html", result, some, labels=Y, images=images)
    assert set(scores) == {"bound"}
    found = Page(tmp_path / "page.html")
    assert {"Samples: x_left", "Rebuilding x_right", "Where the rows lie in z"} <= set(found.titles)
    report.write(tmp_path / "page.html", result, some)  # not as pictures
    assert {"Samples: x_left", "Rebuilding x_right"} <= set(Page(tmp_path / "page.html").titles)


def test_a_classifier_is_scored_without_its_labels(blank, tmp_path):
    program = M2(64, 10, 4, (16,))
    guide = Sequential(
        Classifier(program, "y", ["x"], (16,)), Amortized(program, ["x", "y"], (16,))
    )
    known = torch.arange(len(Y)) < 60
    data = {"x": X, "y": (Y, known)}
    objective = EnumELBO(observed_guide_weights={"y": 10.0})
    result = train(program, guide, data, objective=objective)
    scores = report.write(
        tmp_path / "page.html", result, data, labels=Y, images=IMAGES, classes=True
    )
    probabilities = result.responsibilities({"x": X})
    predicted = probabilities.argmax(1)
    assert scores["accuracy"] == metrics.accuracy(Y, predicted)
    assert scores["accuracy_where_hidden"] == metrics.accuracy(Y[~known], predicted[~known])
    assert scores["calibration_error"] == metrics.calibration_error(probabilities, Y)
    found = Page(tmp_path / "page.html")
    assert len(found.images) == 8
    assert {"Samples of each class", "Labels against predictions"} <= set(found.titles)


def test_a_label_site_below_the_latents(blank, tmp_path):
    class Bottleneck(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(2, 3)

        def forward(self, batch):
            with pyro.plate("data", len(batch)):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                pyro.sample("y", dist.Categorical(logits=self.head(z)))
                pyro.sample("x", dist.Normal(z, 1.0).to_event(1))

    program, y = Bottleneck(), Y % 3
    data = {"x": torch.randn(len(y), 2), "y": y}
    result = train(program, Amortized(program, ["x"], (8,)), data)
    options = {"labels": y, "cluster": "y", "classes": True}
    scores = report.write(tmp_path / "page.html", result, data, **options)
    assert 0 <= scores["accuracy"] <= 1
    assert "Samples: x" in Page(tmp_path / "page.html").titles


def test_everything_given_by_the_user_is_escaped(fitted, coarse, tmp_path):
    evil = "<script>alert('$x_$')</script>"
    result = Result(fitted.program, fitted.guide, fitted.objective)
    result.history, result.sites, result.stopped = fitted.history, [evil], evil
    report.write(
        tmp_path / "page.html", result, {"x": X}, labels=Y, label_names=[evil, "\u4e2d$^", "a\nb"],
        images=IMAGES, baselines={evil: {evil: 1.0}}, title=evil, facts={evil: evil},
        figures={evil: Figure(figsize=(2, 2))},
    )  # fmt: skip
    found = Page(tmp_path / "page.html")
    assert "script" not in found.tags
    assert found.text.count("&lt;script&gt;") >= 8
    assert found.images[-1]["alt"] == evil


def test_no_history_and_no_clusters_to_spare(fitted, blank, tmp_path):
    result = Result(fitted.program, fitted.guide, fitted.objective)
    scores = report.write(tmp_path / "page.html", result, {"x": X}, labels=Y)
    assert "bound" not in scores
    assert "What training did" not in Page(tmp_path / "page.html").titles


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": Y[:3]}, r"labels of shape \(160,\)"),
        ({"images": {"xx": (1, 8, 8)}}, "did you mean 'x'"),
        ({"images": {"x": (1, 8, 9)}}, "which is not"),
        ({"cluster": "z"}, r"no such site 'z' \(sites that fit: y\)"),
        ({"classes": True}, "classes=True needs labels"),
    ],
)
def test_what_does_not_fit_is_named(fitted, blank, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        report.write(tmp_path / "page.html", fitted, {"x": X}, **options)
    assert not (tmp_path / "page.html").exists()


def test_reliability_bins_are_those_of_the_calibration_error():
    probabilities = np.random.default_rng(0).dirichlet([1, 1, 1], 200)
    labels = np.random.default_rng(1).integers(0, 3, 200)
    axes = plots.reliability(probabilities, labels).axes[0]
    points = np.array(axes.lines[1].get_xydata())
    share = (axes.collections[0].get_sizes() - 20) / 400
    error = float(np.abs(points[:, 0] - points[:, 1]) @ share)
    assert error == pytest.approx(metrics.calibration_error(probabilities, labels))


def test_plots_work_on_their_own():
    many = {k: str(k) for k in range(42)}
    colours = {k: plots.COLOURS[k % 20] for k in many}
    ids = np.arange(90) % 42
    assert isinstance(
        plots.codes(np.linspace(0, 1, 90)[:, None], [("t", ids, many, colours)], ["z"]), Figure
    )
    counts = np.eye(42, dtype=int)
    assert isinstance(plots.heat_map(counts, list(many.values()), list(many.values())), Figure)
    colour = np.zeros((3, 3, 16, 16))
    assert isinstance(plots.image_rows([("three channels", colour)], (-1, 1)), Figure)


# ---- what looks wrong, and the epochs ---------------------------------------------------------------

FINE = {
    "loss": 30.0, "bound": -30.0, "y": -2.0, "z": -9.0, "x": -19.0, "used_y": 10.0,
    "largest_y": 0.2, "entropy_y": 0.4, "active_z": 8.0, "grad_norm": 5.0, "grad_norm_max": 9.0,
}  # fmt: skip


def told(*changes, rows=1000, **now):
    """Titles of what is found in records that are fine but for some changes."""
    records = [*changes] or [{}] * 3
    history = [{**FINE, **c, "epoch": i + 1.0} for i, c in enumerate(records)]
    history[-1] |= now
    found = diagnosis.diagnose(history, {"y": 10}, {"z": 10}, rows=rows)
    assert all(f.seen.endswith(".") and f.advice.endswith(".") for f in found)
    return [f.title for f in found]


@pytest.mark.parametrize(
    ("now", "title"),
    [
        (
            {"entropy_y": 0.91 * math.log(10), "used_y": 2.0},
            "The responsibilities of y are uniform",
        ),
        ({"entropy_y": 0.89 * math.log(10)}, None),
        ({"used_y": 4.0}, "The clusters of y collapsed"),
        ({"used_y": 5.0}, None),
        ({"used_y": 4.0, "rows": 19}, None),
        ({"y": -0.009}, "The divergence of y is zero"),
        ({"y": -0.011}, None),
        ({"active_z": 0.0, "z": -0.001}, "The posterior of z collapsed"),
        ({"active_z": 1.0}, None),
        ({"z": -0.001}, "The divergence of z is zero"),
        ({"grad_norm_max": 501.0}, "Gradients exploded"),
        ({"grad_norm_max": 499.0}, None),
    ],
)
def test_what_looks_wrong_is_said_and_only_that(now, title):
    assert told(**now) == ([] if title is None else [title])


def test_a_gradient_that_was_large_at_first_has_not_exploded():
    assert told({"grad_norm": 900.0, "grad_norm_max": 900.0}, {"grad_norm": 2.0}, {}, {}) == []


def test_the_held_out_bound_falls_while_the_training_bound_rises():
    def run(*pairs):
        return told(*({"bound": a, "val_bound": b} for a, b in pairs))

    title = "The held-out bound falls while the training bound rises"
    assert run((-40, -41), (-30, -31), (-25, -33), (-20, -36)) == [title]
    assert run((-40, -41), (-30, -31), (-25, -31.1), (-20, -31.1)) == []
    assert run((-40, -41), (-30, -31), (-31, -33), (-32, -36)) == []  # both fall


def test_what_a_history_lacks_is_not_looked_at():
    old = [{"epoch": 1.0, "loss": 3.0, "bound": -3.0, "y": -1.0, "z": -1.0, "x": -1.0}]
    assert diagnosis.diagnose(old, {}, {"z": 3}) == diagnosis.diagnose([], {"y": 2}) == []
    assert diagnosis.looked_at(old) == diagnosis.looked_at([]) == []
    new = diagnosis.looked_at([{**old[0], "used_y": 2.0, "entropy_y": 0.1, "grad_norm": 1.0}])
    assert new == ["clusters used", "responsibilities", "gradients"]


def test_panels_and_pictures_of_the_epochs():
    history = [{**FINE, "epoch": e + 1.0} for e in range(4)]
    shares = {"y": {e: np.full(10, 0.1) for e in range(1, 5)}}
    figure = epochs.watched(history, {"y": 10}, {"z": 10}, shares, kept=3)
    titles = [ax.get_title(loc="left") for ax in figure.axes]
    assert titles[0] == "y: clusters used, of 10"
    assert len(titles) == 5
    assert figure.axes[2].get_ylabel() == "nats per datum"
    assert figure.axes[3].lines[0].get_ydata().tolist() == [8.0] * 4
    assert len({ax.get_xlim() for ax in figure.axes}) == 1
    assert epochs.watched([{"epoch": 1.0, "bound": -1.0}], {"y": 10}, {}) is None
    codes = {e: np.random.default_rng(e).normal(size=(30, 4)) for e in range(1, 13)}
    codes[3][5] = np.nan
    groups = {e: np.arange(30) % 3 for e in codes}
    names = {k: str(k) for k in range(3)}
    figure = epochs.strip(codes, groups, names, dict(enumerate(plots.COLOURS[:3])), "z")
    assert len(figure.axes) == epochs.PICTURES
    assert figure.axes[-1].get_title(loc="left") == "epoch 12"
    assert len({(*ax.get_xlim(), *ax.get_ylim()) for ax in figure.axes}) == 1
    last = figure.axes[-1].collections[0].get_offsets()
    assert np.asarray(last).mean(0) == pytest.approx([0, 0], abs=1e-12)  # centred where it ends
    narrow = {e: c[:, :1] for e, c in codes.items()}
    assert len(epochs.strip(narrow, groups, {}, {}, "z").axes) == epochs.PICTURES


def test_a_page_says_and_shows_what_was_tracked(blank, tmp_path):
    tracker, path = Tracker(), tmp_path / "page.html"
    result = vade(tracker=tracker)
    report.write(path, result, {"x": X}, labels=Y, track=tracker)
    found = Page(path)
    assert {"Clusters and latents over time", "How z came to be, by cluster"} <= set(found.titles)
    assert len(found.images) == 8
    tracker.labels = Y[tracker.rows]
    report.write(path, result, {"x": X}, labels=Y, track=tracker)
    assert "How z came to be, by label" in Page(path).titles
    assert "used_y" not in Page(path).words  # the table of the history has nats
    healthy = [{**FINE, "epoch": 1.0, "used_y": 4.0}]
    result.history = healthy
    report.write(path, result, {"x": X})
    assert "Nothing stands out" in Page(path).titles
    result.history = [{**healthy[0], "active_z": 0.0, "z": -0.001}]
    report.write(path, result, {"x": X})
    page = Page(path)
    assert "What looks wrong" in page.titles
    assert "The posterior of z collapsed." in page.words


def test_m2_without_labels_is_flagged(blank, tmp_path):
    program = M2(64, 10, 4, (16,))
    guide = Sequential(
        Classifier(program, "y", ["x"], (16,)), Amortized(program, ["x", "y"], (16,))
    )
    result = train(program, guide, {"x": X})
    report.write(tmp_path / "page.html", result, {"x": X})
    assert "The responsibilities of y are uniform." in Page(tmp_path / "page.html").words


def test_run_folders_with_and_without_what_was_tracked(blank, tmp_path):
    spec = {"method": "vade", "data": {"name": "digits", "split": "test"}, "fit": {"epochs": 2}}
    spec |= {"options": {"hidden": [8], "latent_dim": 2}, "start": {"epochs": 1}}
    runs.run(spec, tmp_path / "run", progress=False)
    run = folders.load(tmp_path / "run", runs.make_model)
    assert run.track is not None
    assert torch.equal(run.track.labels, run.labels[run.track.rows])
    assert "How z came to be, by label" in Page(tmp_path / "run" / "report.html").titles
    rows = tmp_path / "run" / "rows.safetensors"
    tensors, meta = checkpoint.load(rows)
    old = {name: value for name, value in tensors.items() if not name.startswith("track.")}
    checkpoint.save(rows, old, meta)
    model, history = tmp_path / "run" / "model.safetensors", run.result.history
    known, facts = checkpoint.load(model)
    terms = ("epoch", "loss", "bound", "x", "y", "z", "seconds")
    facts["history"] = [{name: record[name] for name in terms} for record in history]
    checkpoint.save(model, known, facts)
    again = folders.load(tmp_path / "run", runs.make_model)
    assert again.track is None
    folders.write_report(again)
    found = Page(tmp_path / "run" / "report.html")
    assert "Clusters and latents over time" not in found.titles
    assert any("kept neither clusters nor gradients" in word for word in found.words)
    tensors["track.values.codes.z"] = tensors["track.values.codes.z"][:, :3]
    checkpoint.save(rows, tensors, meta)
    with pytest.raises(ValueError, match=r"rows.safetensors is damaged: what was tracked of 'z'"):
        folders.load(tmp_path / "run", runs.make_model)
