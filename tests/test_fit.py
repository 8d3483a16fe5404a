"""The loop: it trains what it should, stops when it should, and goes on bit for bit."""

import copy
import json
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyrozoo.guides import Amortized, Classifier, Sequential
from pyrozoo.inference import IWELBO, EnumELBO, checkpoint, evaluate, fit, schedules
from pyrozoo.zoo.clustering import VaDE
from pyrozoo.zoo.semisupervised import M2

WIDTH, K = 6, 3


def make(seed=0):
    torch.manual_seed(seed)
    program = VaDE(WIDTH, K, 2, (8,))
    return program, Amortized(program, ["x", "y"], (8,))


def data(rows=60):
    generator = torch.Generator().manual_seed(0)
    centre = torch.rand(3, WIDTH, generator=generator).round() * 0.8 + 0.1
    y = torch.arange(rows) % 3
    noise = 0.1 * torch.rand(rows, WIDTH, generator=generator)
    return {"x": (centre[y] + noise).clamp(0, 1), "y": y}


def quiet(program, guide, values, **options):
    return fit(program, guide, values, **{"progress": False, "batch_size": 16, **options})


def test_the_bound_rises_and_is_what_evaluate_says():
    program, guide = make()
    result = quiet(program, guide, {"x": data()["x"]}, epochs=30, lr=1e-2)
    bounds = [record["bound"] for record in result.history]
    assert bounds[-1] > bounds[0] + 0.5
    again = evaluate(program, guide, {"x": data()["x"]}, result.objective)
    assert again["bound"] == pytest.approx(bounds[-1], abs=1e-5)
    assert again["bound"] == pytest.approx(sum(v for k, v in again.items() if k != "bound"))
    assert result.sites[0] == "y: summed over 3 values"
    assert result.epoch == 30


@pytest.mark.parametrize("hidden", ["nothing", "half", "all"])
def test_only_the_observed_sites_change(hidden):
    program, guide = make()
    values = data()
    known = torch.arange(60) % 2 == 0
    values["y"] = {"nothing": values["y"], "half": (values["y"], known), "all": None}[hidden]
    result = quiet(program, guide, values, epochs=40, lr=1e-2)
    predicted = result.predict({"x": data()["x"]}, "y").argmax(1)
    agreement = (predicted == data()["y"]).float().mean()
    assert agreement > {"nothing": 0.9, "half": 0.6, "all": 0.0}[hidden]
    half = "y: known in 30 of 60 rows, elsewhere summed over 3 values"
    summed = {"nothing": "y: observed", "half": half, "all": "y: summed"}
    assert result.sites[0].startswith(summed[hidden])


def test_same_seed_same_numbers_and_the_caller_keeps_its_random_state():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    losses = []
    for _ in range(2):
        with torch.random.fork_rng():
            program, guide = make()
        result = quiet(program, guide, {"x": data()["x"]}, epochs=3)
        losses.append([record["loss"] for record in result.history])
    assert losses[0] == losses[1]
    assert torch.equal(torch.rand(3), expected)


class Noisy(VaDE):
    """With layers whose state or noise a careless evaluation would disturb."""

    def __init__(self):
        super().__init__(WIDTH, K, 2, (8,))
        self.dropout = nn.Dropout(0.3)

    def forward(self, batch):
        with pyro.plate("data", len(batch)):
            y = pyro.sample("y", dist.Categorical(logits=self.logits))
            z = pyro.sample("z", dist.Normal(self.loc[y], self.scale[y]).to_event(1))
            pyro.sample("x", self.decoder(self.dropout(z)))


@pytest.mark.parametrize("interrupted_after", [1, 3])
def test_resume_is_bit_equal(tmp_path, interrupted_after):
    def run(folder, epochs, resume=False):
        torch.manual_seed(0)
        program = Noisy()
        guide = Amortized(program, ["x"], (8,))
        options = {
            "lr_schedule": schedules.steps(0.5, 2),
            "weights": {"z": schedules.linear(0.1, 1.0, 4)},
            "validation": 0.2,
            "clip": 1.0,
        }
        result = quiet(
            program,
            guide,
            {"x": data()["x"]},
            epochs=epochs,
            folder=folder,
            resume=resume,
            **options,
        )
        return result

    whole = run(tmp_path / "whole", 5)
    run(tmp_path / "cut", interrupted_after)
    torch.rand(7)  # the caller's own draws in between do not matter
    resumed = run(tmp_path / "cut", 5, resume=True)
    for name, value in whole.parameters.items():
        assert torch.equal(value, resumed.parameters[name]), name
    for a, b in zip(whole.history, resumed.history, strict=True):
        assert {k: v for k, v in a.items() if k != "seconds"} == {
            k: v for k, v in b.items() if k != "seconds"
        }
    assert whole.best_epoch == resumed.best_epoch


def test_a_finished_run_is_not_changed_by_resuming(tmp_path):
    program, guide = make()
    first = quiet(program, guide, {"x": data()["x"]}, epochs=2, folder=tmp_path)
    before = {k: v.clone() for k, v in first.parameters.items()}
    again = quiet(program, guide, {"x": data()["x"]}, epochs=2, folder=tmp_path, resume=True)
    assert again.epoch == 2
    assert all(torch.equal(before[k], v) for k, v in again.parameters.items())


def test_save_and_load(tmp_path):
    program, guide = make()
    result = quiet(program, guide, {"x": data()["x"]}, epochs=2)
    result.save(tmp_path / "model.safetensors")
    other, other_guide = make(1)
    loaded = quiet(other, other_guide, {"x": data()["x"]}, epochs=1).load(
        tmp_path / "model.safetensors"
    )
    assert all(torch.equal(v, result.parameters[k]) for k, v in loaded.parameters.items())
    assert loaded.history == result.history
    assert evaluate(other, other_guide, {"x": data()["x"]}) == evaluate(
        program, guide, {"x": data()["x"]}
    )


def test_a_checkpoint_of_another_model_changes_nothing(tmp_path):
    program, guide = make()
    quiet(program, guide, {"x": data()["x"]}, epochs=1).save(tmp_path / "a.safetensors")
    other = VaDE(WIDTH, K + 1, 2, (8,))
    before = {k: v.clone() for k, v in other.state_dict().items()}
    tensors, _ = checkpoint.load(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"another program.*logits: \(3,\) for \(4,\)"):
        checkpoint.unpack_modules(tensors, "a.safetensors", program=other)
    assert all(torch.equal(v, before[k]) for k, v in other.state_dict().items())


def test_damaged_checkpoints(tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    program, guide = make()
    quiet(program, guide, {"x": data()["x"]}, epochs=1, folder=tmp_path)
    whole = path.read_bytes()
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {path.name, f".{path.name}.lock"}  # no partial file stays
    for broken in (whole[: len(whole) // 2], b"", b"nonsense" * 100):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match="damaged, or no checkpoint"):
            quiet(program, guide, {"x": data()["x"]}, epochs=2, folder=tmp_path, resume=True)
    checkpoint.save(path, {}, {"format": 99})
    with pytest.raises(ValueError, match="format 99"):
        checkpoint.load(path)
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        checkpoint.load(tmp_path / "none")


def test_weights_follow_their_schedule_and_are_gone_afterwards():
    program, guide = make()
    objective = EnumELBO()
    seen = []

    def watch(result):
        seen.append(float(result.objective.weights["z"]))

    quiet(
        program, guide, {"x": data()["x"]}, objective=objective, epochs=4, batch_size=60,
        weights={"z": schedules.linear(0.0, 1.0, 4)}, callbacks=[watch],
    )  # fmt: skip
    assert seen == pytest.approx([0.0, 0.25, 0.5, 0.75])
    assert objective.weights == {}


def test_learning_rate_schedule():
    program, guide = make()
    rates = []

    def optimizer(parameters):
        engine = torch.optim.SGD(parameters, lr=0.1)
        rates.append(engine)
        return engine

    quiet(
        program, guide, {"x": data()["x"]}, epochs=3, optimizer=optimizer,
        lr_schedule=schedules.steps(0.1, 1),
    )  # fmt: skip
    assert rates[0].param_groups[0]["lr"] == pytest.approx(0.1 * 0.1**2)


def test_a_schedule_by_its_name_lasts_as_long_as_the_fit():
    program, guide = make()
    twin, twin_guide = copy.deepcopy(program), copy.deepcopy(guide)
    quiet(program, guide, {"x": data()["x"]}, epochs=3, lr_schedule="cosine")
    own = schedules.cosine(3, 0.02)
    quiet(twin, twin_guide, {"x": data()["x"]}, epochs=3, lr_schedule=own)
    for a, b in zip(program.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="function of the epoch or 'cosine', got 'linear'"):
        quiet(program, guide, {"x": data()["x"]}, epochs=1, lr_schedule="linear")


def test_callbacks_and_patience_stop():
    program, guide = make()
    result = quiet(
        program, guide, {"x": data()["x"]}, epochs=50, callbacks=[lambda r: r.epoch == 3]
    )
    assert (result.epoch, result.stopped) == (3, "a callback")
    program, guide = make()
    result = quiet(
        program, guide, {"x": data()["x"]}, epochs=400, lr=0.3, patience=3, validation=0.3
    )
    assert result.epoch < 400
    assert "3 epochs" in result.stopped


def test_the_best_held_out_state_is_kept():
    program, guide = make()
    values = data()
    result = quiet(
        program, guide, {"x": values["x"][:9]}, epochs=60, lr=0.05, batch_size=8,
        validation={"x": values["x"][30:]},
    )  # fmt: skip
    scores = [record["val_bound"] for record in result.history]
    assert result.best_epoch == 1 + max(range(60), key=lambda i: scores[i])
    now = evaluate(program, guide, {"x": values["x"][30:]}, result.objective)["bound"]
    assert now == pytest.approx(max(scores), abs=1e-5)
    assert max(scores) > scores[-1]


def test_global_latents_are_weighted_by_all_rows():
    class Program(nn.Module):
        def forward(self, batch):
            theta = pyro.sample("theta", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            with pyro.plate("data", len(batch)):
                pyro.sample("x", dist.Normal(theta, 1.0).to_event(1))

    x = torch.randn(40, 1) + 1.5
    program = Program()
    guide = Amortized(program, ["x"])
    quiet(program, guide, {"x": x}, epochs=150, lr=0.02)
    posterior_mean, posterior_sd = float(x.sum() / 41), 41**-0.5
    assert guide.raw["theta_loc"].item() == pytest.approx(posterior_mean, abs=0.1)
    scale = nn.functional.softplus(guide.raw["theta_scale"]).item()
    assert scale == pytest.approx(posterior_sd, rel=0.3)


def test_bytes_stay_bytes_until_the_batch():
    program, guide = make()
    pixels = (data()["x"] * 255).round().to(torch.uint8)
    result = quiet(program, guide, {"x": pixels}, epochs=1)
    floats = evaluate(program, guide, {"x": pixels.float() / 255}, result.objective)
    assert evaluate(program, guide, {"x": pixels}, result.objective) == pytest.approx(floats)


def test_an_infinite_loss_stops_and_names_the_term():
    program, guide = make()
    with torch.no_grad():
        program.loc.fill_(math.nan)
    with pytest.raises((FloatingPointError, ValueError), match=r"not finite: .*z|nan"):
        quiet(program, guide, {"x": data()["x"]}, epochs=1)


def test_m2_learns_from_labels_through_the_classification_term():
    torch.manual_seed(0)
    program = M2(WIDTH, K, 2, (8,))
    classifier = Classifier(program, "y", ["x"], (8,))
    guide = Sequential(classifier, Amortized(program, ["x", "y"], (8,)))
    values = data()
    known = torch.arange(60) < 15
    objective = EnumELBO(observed_guide_weights={"y": 1.0})
    result = quiet(
        program, guide, {"x": values["x"], "y": (values["y"], known)}, objective=objective,
        epochs=60, lr=1e-2,
    )  # fmt: skip
    predicted = result.responsibilities({"x": values["x"]}).argmax(1)
    assert (predicted == values["y"]).float().mean() > 0.95


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs is at least 1, got 0"),
        ({"batch_size": -1}, "batch_size is at least 1"),
        ({"lr": math.nan}, "lr is positive"),
        ({"patience": 0}, "patience"),
        ({"resume": True}, "folder"),
        ({"validation": 1.5}, "between 0 and 1"),
    ],
)
def test_wrong_options(options, message):
    program, guide = make()
    with pytest.raises(ValueError, match=message):
        quiet(program, guide, {"x": data()["x"]}, **{"epochs": 1, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 1.5}, r"epochs is a whole number, got 1\.5"),
        ({"objective": "iwae:5"}, "such as IWELBO.*got 'iwae:5'"),
        ({"objective": IWELBO}, "such as IWELBO.*got <class"),
        ({"objective": pyro.infer.Trace_ELBO()}, "such as IWELBO.*Trace_ELBO"),
        ({"optimizer": pyro.optim.Adam({"lr": 1e-3})}, "makes a torch optimiser .*gave NoneType"),
    ],
)
def test_options_of_another_type(options, message):
    program, guide = make()
    with pytest.raises(TypeError, match=message):
        quiet(program, guide, {"x": data()["x"]}, **{"epochs": 1, **options})


def test_values_are_checked_in_all_rows_not_only_in_the_first_batch():
    program, guide = make()
    y = data()["y"].clone()
    y[50] = 7
    with pytest.raises(ValueError, match="'y'"):
        quiet(program, guide, {"x": data()["x"], "y": y}, epochs=1)


def test_history_is_a_table(tmp_path):
    program, guide = make()
    result = quiet(program, guide, {"x": data()["x"]}, epochs=2)
    result.write_history(tmp_path / "history.csv")
    lines = (tmp_path / "history.csv").read_text().splitlines()
    assert lines[0].startswith("epoch,loss,bound")
    assert len(lines) == 3
    assert json.dumps(result.history)


def test_schedules():
    assert [schedules.linear(0, 1, 10, wait=5)(e) for e in (0, 5, 10, 15, 99)] == [0, 0, 0.5, 1, 1]
    assert [schedules.steps(0.5, 10, 0.2)(e) for e in (0, 9.9, 10, 99)] == [1, 1, 0.5, 0.2]
    assert schedules.cosine(10)(0) == pytest.approx(1)
    assert schedules.cosine(10, 0.1)(20) == pytest.approx(0.1)
    for make_schedule in (lambda: schedules.linear(0, 1, 0), lambda: schedules.steps(0.5, 0)):
        with pytest.raises(ValueError, match="positive"):
            make_schedule()
