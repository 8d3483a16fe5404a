"""M1 and M1+M2: bounds by hand, rows through the decoder, two stages, and what labels are worth."""

import math

import pyro
import pytest
import torch
from cases import Case, Replay, elbo
from sklearn.linear_model import LogisticRegression
from test_gmvae import check_laws, count_rows
from twins import encode, kl_to_standard, log_bernoulli, log_normal

from pyrozoo import zoo
from pyrozoo.guides import Amortized, Classifier, Sequential
from pyrozoo.inference import Batch, EnumELBO, Stored, metrics, responsibilities
from pyrozoo.zoo import datasets
from pyrozoo.zoo.clustering.spreading import spread_parts
from pyrozoo.zoo.semisupervised import M1, M1M2
from pyrozoo.zoo.semisupervised.m1m2 import Above, Top

ROWS, K = 7, 3
SMALL = {"hidden": (8,), "latent_dim": 2}


def make():
    program = M1M2(6, K, 2, 3, (8,), (5,))
    return program, Sequential(
        Amortized(program, ["x"], (8,), sites=["z_1"]),
        Classifier(program, "y", ["z_1"], (5,)),
        Amortized(program, ["z_1", "y"], (5,), sites=["z_2"]),
    )


def by_hand(program, guide, data, closed):
    """The bound given each class, ``(rows, K)``, and log q(y | z_1)."""
    x, noise = data["x"], data["noise"]
    loc_1, scale_1 = encode(guide.parts[0].networks["z_1"], x)
    z_1 = loc_1 + scale_1 * noise[:, :2]
    rest = log_bernoulli(x, program.decoder.mlp(z_1)) - log_normal(z_1, loc_1, scale_1)
    values = []
    for k in range(K):
        y = torch.eye(K)[k].expand(ROWS, K)
        loc, scale = encode(guide.parts[2].networks["z_2"], z_1, y)
        z_2 = loc + scale * noise[:, 2:]
        zero = torch.zeros_like(z_2)
        divergence = log_normal(z_2, loc, scale) - log_normal(z_2, zero, zero + 1)
        divergence = kl_to_standard(loc, scale) if closed else divergence
        density = log_normal(z_1, *encode(program.features, z_2, y))
        values.append(density - divergence - math.log(K) + rest)
    return torch.stack(values, 1), guide.parts[1].network.mlp(z_1).log_softmax(-1)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("kl", ["closed", "sampled"])
def test_m1m2_by_hand(kl):
    program, guide = make()
    data = {"x": torch.rand(ROWS, 6), "noise": torch.randn(ROWS, 5)}
    replay, options = Replay(guide), {"kl": kl, "inputs": ("noise",)}
    rows = elbo(**options).per_row(program, replay, data)
    each, log_q = by_hand(program, guide, data, kl == "closed")
    summed = (log_q.exp() * (each - log_q)).sum(1)
    torch.testing.assert_close(rows, summed, rtol=1e-10, atol=1e-12)
    y, known = torch.randint(K, (ROWS,)), torch.arange(ROWS) % 2 == 0
    picked, of_class = (v.gather(1, y.unsqueeze(1)).squeeze(1) for v in (each, log_q))
    right = torch.where(known, picked, summed)
    for split in (False, True):
        objective = elbo(split=split, observed_guide_weights={"y": 1.7}, **options)
        data["y"] = (y, known)
        got = objective.per_row(program, replay, data)
        torch.testing.assert_close(got, right, rtol=1e-10, atol=1e-12)
        loss = objective.differentiable_loss(program, replay, data)
        extra = 1.7 * torch.where(known, of_class, 0.0).mean()
        torch.testing.assert_close(loss, -right.mean() - extra, rtol=1e-10, atol=1e-12)


@pytest.mark.usefixtures("double")
def test_features_may_be_observed_in_place_of_x():
    program, guide = make()
    program.active[1] = 0.0
    above = Above(Sequential(*guide.parts[1:]), program)
    z_1, y = torch.randn(ROWS, 2), torch.randint(K, (ROWS,))
    data = {"z_1": z_1, "y": y, "noise": torch.randn(ROWS, 3)}
    objective = elbo(kl="closed", inputs=("noise",))
    rows = objective.per_row(program, Replay(above), data)
    torch.testing.assert_close(objective.per_row(Top(program), Replay(above), data), rows)
    label = torch.eye(K)[y]
    loc, scale = encode(guide.parts[2].networks["z_2"], z_1 * above.active, label)
    found, width = encode(program.features, loc + scale * data["noise"], label)
    kept = log_normal(z_1[:, :1], found[:, :1], width[:, :1])
    alone = log_normal(z_1[:, 1:], torch.zeros(ROWS, 1), torch.ones(ROWS, 1))
    right = kept + alone - kl_to_standard(loc, scale) - math.log(K)
    torch.testing.assert_close(rows, right, rtol=1e-10, atol=1e-12)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("observed", ["nothing", "some", "all"])
def test_the_decoder_and_encoder_of_x_run_once_a_row(observed):
    program, guide = make()
    found = {"decoder": [], "encoder": [], "classifier": [], "features": []}
    count_rows(program.decoder.mlp, found["decoder"])
    count_rows(guide.parts[0].networks["z_1"].trunk, found["encoder"])
    count_rows(guide.parts[1].network.mlp, found["classifier"])
    count_rows(program.features.trunk, found["features"])
    data = {"x": torch.rand(ROWS, 6)}
    if observed != "nothing":
        data["y"] = (
            torch.zeros(ROWS).long(),
            torch.arange(ROWS) < (2 if observed == "some" else ROWS),
        )
    objective = EnumELBO()
    objective.differentiable_loss(program, guide, data)  # reads graphs, too
    for rows in found.values():
        rows.clear()
    objective.differentiable_loss(program, guide, data)
    assert found["decoder"] == found["encoder"] == found["classifier"] == [ROWS]
    assert found["features"] == [ROWS * (1 if observed == "all" else K)]


@pytest.mark.usefixtures("double")
def test_m1_by_hand():
    program = M1(6, K, 2, (8,), (4,))
    guide = Amortized(program, ["x"], (8,))
    x, y, known = torch.rand(ROWS, 6), torch.randint(K, (ROWS,)), torch.arange(ROWS) % 2 == 0
    data = {"x": x, "y": (y, known), "noise": torch.randn(ROWS, 2)}
    rows = elbo(inputs=("noise",)).per_row(program, Replay(guide), data)
    loc, scale = encode(guide.networks["z"], x)
    z = loc + scale * data["noise"]
    label = program.classifier.mlp(z).log_softmax(-1).gather(1, y.unsqueeze(1)).squeeze(1)
    right = log_bernoulli(x, program.decoder.mlp(z)) - kl_to_standard(loc, scale)
    right = right + torch.where(known, label, 0.0)
    torch.testing.assert_close(rows, right, rtol=1e-10, atol=1e-12)


def _m1():
    program = M1(6, K, 2, (8,), (4,))
    return program, Amortized(program, ["x"], (8,))


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("make", [make, _m1])
def test_laws(monkeypatch, make):
    check_laws(monkeypatch, Case(make.__name__, make, {"x": 6, "y": 0}, {"y": K}))


def some_data():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(30, 6, generator=generator)
    return {"x": x, "y": (torch.arange(30) % K, torch.arange(30) < 9)}


@pytest.mark.parametrize("name", ["m1", "m1m2"])
def test_frozen_parts_learn_in_the_first_stage_only_also_after_a_resume(name, tmp_path):
    data, start = some_data(), {"epochs": 2, "lr": 1e-2}

    def run(folder, epochs, **options):
        model = zoo.create(name, data, num_classes=K, **SMALL)
        before = [x.clone() for x in model.program.decoder.parameters()]
        result = model.fit(
            data, epochs=epochs, progress=False, start=start, folder=folder, **options
        )
        assert not any(x.requires_grad for x in model.program.decoder.parameters())
        return model, before, result

    model, before, whole = run(tmp_path / "whole", 3)
    after = model.program.decoder.parameters()
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    _, _, one = run(tmp_path / "parts", 1)
    stage = {key: value.clone() for key, value in one.parameters.items()}
    _, _, resumed = run(tmp_path / "parts", 3, resume=True)
    assert resumed.epoch == 3
    for key, value in whole.parameters.items():
        assert torch.equal(value, resumed.parameters[key]), key
    encoder = "guide.networks.z" if name == "m1" else "guide.parts.0."
    for key, value in stage.items():
        same = torch.equal(value, whole.parameters[key])
        assert same == (key.startswith(("program.decoder", encoder)) or key.endswith("active")), key


def test_without_freezing_all_parts_go_on_and_without_labels_m1_has_one_stage():
    data = some_data()
    for name in ("m1", "m1m2"):
        model = zoo.create(name, data, num_classes=K, frozen=False, **SMALL)
        assert all(x.requires_grad for x in model.program.parameters())
    alone = zoo.create("m1", {"x": data["x"]}, num_classes=K, **SMALL)
    assert alone.start is None
    assert all(x.requires_grad for x in alone.program.decoder.parameters())


@pytest.mark.parametrize(("name", "options"), [("m2", {"style_weight": 1.0}), ("m1m2", {})])
def test_without_labels_the_class_stays_unused(name, options):
    """The documented failure: the bound gets better while q(y | .) goes to uniform."""
    digits = datasets.load("digits", split="test")
    data = {"x": digits.x}
    model = zoo.create(name, data, hidden=(32,), latent_dim=10, **options)
    start = {"epochs": 1} if model.start else None
    result = model.fit(data, epochs=6, lr=4e-3, batch_size=30, progress=False, start=start)
    found = result.responsibilities(data, seed=0)
    entropy = -(found * found.clamp_min(1e-12).log()).sum(1).mean()
    assert entropy > 0.95 * math.log(10)
    assert metrics.majority_accuracy(digits.y, found.argmax(1)) < 0.5
    assert result.history[-1]["bound"] > result.history[0]["bound"] + 0.5


def test_fifty_labels_are_worth_more_than_to_a_logistic_regression():
    """Law: every entry clears a rival that is computed in the same test."""
    digits, test = (datasets.load("digits", split=s) for s in ("train", "test"))
    data = Batch.of({"x": digits.x, "y": datasets.hide_labels(digits.y, 50, seed=0)})
    known = data.present("y")
    linear = LogisticRegression(max_iter=1000).fit(data["x"][known], data["y"][known])
    rival = 1 - linear.score(test.x, test.y)
    options = {"hidden": (128,), "latent_dim": 10, "style_dim": 5, "style_hidden": (64,)}
    options |= {"likelihood": "normal(0.15)", "activation": "relu", "alpha": 1.0, "frozen": False}
    model = zoo.create("m1m2", data, **options)
    start = {"epochs": 20, "lr": 4e-3, "batch_size": 50}
    result = model.fit(data, epochs=12, lr=5e-3, batch_size=50, progress=False, start=start)
    found = result.responsibilities({"x": test.x}, seed=0)
    error = 1 - metrics.accuracy(test.y, found.argmax(1))
    assert error < rival


def test_m1_beats_the_majority_class():
    """Law: every entry clears a rival that is computed in the same test."""
    digits, test = (datasets.load("digits", split=s) for s in ("train", "test"))
    data = {"x": digits.x, "y": datasets.hide_labels(digits.y, 100, seed=0)}
    options = {"hidden": (64,), "latent_dim": 10, "likelihood": "normal(0.15)"}
    model = zoo.create("m1", data, activation="relu", **options)
    start = {"epochs": 10, "lr": 3e-3}
    result = model.fit(data, epochs=4, lr=3e-2, progress=False, start=start)
    found = result.responsibilities({"x": test.x}, seed=0)
    error = 1 - metrics.accuracy(test.y, found.argmax(1))
    majority = 1 - test.y.bincount().max().item() / len(test.y)
    assert error < majority / 2


def test_units_that_the_features_gave_up_are_left_out_above(tmp_path):
    x = torch.rand(200, 1, generator=torch.Generator().manual_seed(0)).expand(200, 6).contiguous()
    data = {"x": x, "y": ((x[:, 0] > 0.5).long(), torch.arange(200) < 20)}
    options = {"num_classes": 2, "hidden": (8,), "latent_dim": 4, "likelihood": "normal(0.1)"}
    model = zoo.create("m1m2", data, **options)
    above = model.guide.parts[1]
    assert isinstance(above, Above)
    assert above.active.all()
    start = {"epochs": 40, "lr": 1e-2}
    settings = {"epochs": 1, "progress": False, "folder": tmp_path, "start": start}
    model.fit(data, **settings)
    batch = Batch.of(data)
    means = model.guide.parts[0].distribution("z_1", batch).mean
    active = means.std(0) > 0.1
    assert 1 <= active.sum() < 4  # a line of pictures
    for found in (above.active, model.program.active):
        assert found.equal(active.float())
    trace = pyro.poutine.trace(model.program).get_trace(Batch.of({"x": (x, x > 2)}))
    z_1 = trace.nodes["z_1"]["fn"]
    assert (z_1.mean[:, ~active] == 0).all()
    assert (z_1.stddev[:, ~active] == 1).all()
    assert (z_1.mean[:, active].std(0) > 0).all()
    seen = []
    for z in (means, torch.where(active, means, 100.0)):
        torch.manual_seed(0)
        with pyro.plate("data", 200):
            seen.append(above.inside(batch, {"z_1": z}))
    assert torch.equal(seen[0]["z_2"], seen[1]["z_2"])
    again = zoo.create("m1m2", data, **options)
    again.fit(data, **{**settings, "epochs": 2, "resume": True})  # without the first stage
    for found in (again.guide.parts[1].active, again.program.active):
        assert found.equal(active.float())
    above.leave_out(model.program, torch.zeros(5, 4))
    assert above.active.all()


@pytest.fixture(scope="module")
def rings():
    """Two circles of eight-dimensional points, two labels each."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(400) % 2
    angle, radius = 2 * math.pi * torch.rand(400, generator=generator), 1.0 + 2.0 * y
    flat = torch.stack([radius * angle.cos(), radius * angle.sin()], 1)
    turn = torch.linalg.qr(torch.randn(8, 8, generator=generator))[0][:2]
    return Batch.of({"x": flat @ turn, "y": (y, torch.arange(400) < 4)}), y


def test_labels_spread_along_the_features(rings, tmp_path):
    data, y = rings
    options = {"num_classes": 2, "hidden": (64,), "latent_dim": 4, "likelihood": "normal(0.1)"}
    options |= {"style_dim": 2, "style_hidden": (32,), "activation": "relu", "spread": True}
    start = {"epochs": 60, "known_epochs": 12, "lr": 5e-3, "batch_size": 50, "warm_up": 5}
    linear = LogisticRegression().fit(data["x"][:4], y[:4])

    def run(folder, resume):
        model = zoo.create("m1m2", data, **options)
        result = model.fit(
            data, epochs=1, lr=1e-3, progress=False, start=start, folder=folder, resume=resume
        )
        return result

    result = run(tmp_path / "a", False)
    found = result.responsibilities({"x": data["x"]}, seed=0).argmax(1)
    assert metrics.accuracy(y, found) > max(0.95, linear.score(data["x"], y))
    (tmp_path / "a" / "checkpoint.safetensors").unlink()
    stages = [tmp_path / "a" / "start", tmp_path / "a" / "start" / "known"]
    written = [(stage / "checkpoint.safetensors").stat().st_mtime_ns for stage in stages]
    again = run(tmp_path / "a", True)
    after = [(stage / "checkpoint.safetensors").stat().st_mtime_ns for stage in stages]
    assert after == written  # both stages come from their checkpoints
    for key, value in result.parameters.items():
        assert torch.equal(value, again.parameters[key]), key
    plain = zoo.create("m1m2", data, **{**options, "spread": False})
    with pytest.raises(ValueError, match="start known_epochs: only where labels spread"):
        plain.fit(data, epochs=1, progress=False, start=start)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"known_epochs": 0}, "known_epochs is at least 1, got 0"),
        ({"draws": 0}, "draws is at least 1, got 0"),
        ({"num_neighbors": 400}, "num_neighbors is from 1 to the 400 rows less one, got 400"),
        ({"warm_up": -1}, "warm_up is a number of epochs, not negative, got -1"),
        ({"warm_up": 2, "weights": {"z_1": lambda epoch: 1.0}}, "'z_1' is warmed up over 2 epochs"),
    ],
)
def test_bad_options_of_the_start_are_found_before_it(rings, options, words):
    data, _ = rings
    model = zoo.create("m1m2", data, num_classes=2, spread=True, likelihood="normal", **SMALL)
    before = [x.clone() for x in model.program.parameters()]
    with pytest.raises(ValueError, match=words):
        model.start(data, **{"epochs": 1, **options})
    assert all(torch.equal(a, b) for a, b in zip(before, model.program.parameters(), strict=True))


@pytest.mark.parametrize("method", ["m2", "m1m2"])
def test_labels_spread_on_disk_and_to_no_row_without_x(rings, method):
    data, y = rings
    known, seen = torch.arange(400) < 4, torch.arange(400) < 300
    some = {"x": (data["x"], seen), "y": (y, known)}
    epochs = {"epochs": 2, "known_epochs": 1}
    found = []
    for rows in (some, Stored(some), {n: (v[:300], m[:300]) for n, (v, m) in some.items()}):
        options = {**SMALL, "num_classes": 2, "spread": True, "likelihood": "normal(0.1)"}
        model = zoo.create(method, rows if isinstance(rows, Stored) else Batch.of(rows), **options)
        model.start(rows if isinstance(rows, Stored) else Batch.of(rows), **epochs)
        found.append(list(model.program.parameters()))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("stored", [False, True])
def test_given_labels_are_kept_and_the_others_follow_their_neighbours(stored):
    codes = torch.cat([torch.randn(30, 2), torch.randn(30, 2) + 20.0])
    y, known = (torch.arange(60) < 30).long(), torch.arange(60) % 29 == 0
    data = Stored({"y": (y, known)}) if stored else Batch.of({"y": (y, known)})
    assert spread_parts(data, codes, 2).equal(y)
    y[29], known[29] = 0, True  # as given, though its neighbours are of another class
    data = Stored({"y": (y, known)}) if stored else Batch.of({"y": (y, known)})
    assert spread_parts(data, codes, 2)[known].equal(y[known])


def test_the_divergence_of_the_features_is_warmed_up():
    seen = []
    for warm_up in (0.0, 1e6):  # hardly any divergence: the features say more
        model = zoo.create("m1", some_data(), num_classes=K, **SMALL)
        model.start(Batch.of(some_data()), epochs=200, lr=1e-2, warm_up=warm_up)
        seen.append(model.guide.distribution("z", Batch.of(some_data())).stddev.mean())
    assert seen[1] < 0.5 * seen[0]


def test_responsibilities_average_over_draws_of_the_features():
    x = torch.rand(6, 12)
    model = zoo.create("m1m2", {"x": x}, hidden=[8], latent_dim=3, style_dim=2, style_hidden=[6])
    encoder, classifier = model.guide.parts[0], model.guide.parts[1].guide.parts[0]
    batch = Batch.of({"x": x})
    z_1 = encoder.distribution("z_1", batch).sample((4000,))
    exact = classifier.distribution(batch, {"z_1": z_1}).probs.mean(0)
    found = responsibilities(model.program, model.guide, {"x": x}, num_samples=4000, seed=0)
    torch.testing.assert_close(found, exact, rtol=0, atol=5e-3)
    once = responsibilities(model.program, model.guide, {"x": x}, num_samples=1, seed=0)
    assert (once - exact).abs().max() > 1e-2
