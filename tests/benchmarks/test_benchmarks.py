"""The benchmarks run, at a tiny size and uncompiled; nothing is asserted of their times."""

import importlib
import json
import math
import subprocess
import sys
from pathlib import Path

import measuring
import models
import pyro
import pytest
import showing
import steps
import torch
import twins
from typer.testing import CliRunner

from pyrozoo.inference import Batch, SubsetELBO
from pyrozoo.zoo import cli

TINY = measuring.Options(tiny=True, compile=False, threads=1)


@pytest.mark.parametrize(
    ("module", "function", "ours"),
    [
        ("steps", "small_steps", {"by hand", "TraceEnum_ELBO", "EnumELBO", "staged"}),
        ("epochs", "mvae_epochs", {"fit"}),
        ("seeds", "seeds", {"at once", "one after another"}),
    ],
)
def test_a_work_runs(module, function, ours, capsys):
    with pyro.validation_enabled(False):
        for case in getattr(importlib.import_module(module), function)(TINY):
            assert ours <= set(case.times)
            assert all(len(times) == 2 and min(times) > 0 for times in case.times.values())
            showing.show(json.loads(json.dumps(case.record())))
            assert case.title in capsys.readouterr().out


@pytest.mark.parametrize("make", [models.vade, models.vae, models.m2])
def test_the_contestants_compute_the_same_loss(make):
    torch.manual_seed(0)
    model = make(1000, (8,), 3, 12)
    program, guide = model.program, model.guide
    with torch.no_grad():
        right = model.objective.loss(program, guide, model.data)
        for loss in model.by_hand.values():
            assert abs(loss(program, guide, model.data).item() - right) < 0.15
    step = steps.staged_step(model, Batch.of(model.data), compile=False)
    with pyro.validation_enabled(False):
        assert abs(step().item() - right) < 0.15


def test_repeated_rows_give_the_bound_without_repeating():
    torch.manual_seed(0)
    model, noise = models.m2(5, (8,), 3, 12, 4), torch.randn(5, 3)
    classifier, encoder = models.nets(model.guide)
    x = model.data["x"]
    once = twins.m2_unlabelled(model.program, encoder, classifier, x, noise)
    many = models.m2_repeated(model.program, classifier, encoder, x, noise.repeat(4, 1))
    torch.testing.assert_close(many, once)


def test_numpyro_has_the_same_loss():
    pytest.importorskip("numpyro", exc_type=ImportError)
    import jax_rivals

    torch.manual_seed(0)
    for make in (models.vade, models.vae):
        model = make(1000, (8,), 3, 12, binary=True)
        right = model.objective.loss(model.program, model.guide, model.data)
        for value in jax_rivals.numpyro_losses(model).values():
            assert abs(value - right) < 0.15


def test_genjax_has_the_same_loss():
    pytest.importorskip("genjax", exc_type=ImportError)
    import jax
    import jax.numpy as jnp
    import jax_rivals

    torch.manual_seed(0)
    model = models.vae(1000, (8,), 3, 12, binary=True)
    right = model.objective.loss(model.program, model.guide, model.data)
    gradient, loss = jax_rivals.genjax_bound(model)
    given = (jax.random.PRNGKey(0), jax_rivals.tree(model), jnp.array(model.data["x"].numpy()))
    assert abs(float(loss(*given)) - right) < 0.15
    model.objective.differentiable_loss(model.program, model.guide, model.data).backward()
    ours = list(model.program.decoder.mlp.parameters())[-1].grad.numpy()
    assert abs(gradient(*given)["decoder"][-1][1] - ours).max() < 0.02


def test_multivae_has_the_same_loss(tmp_path):
    pytest.importorskip("multivae.models", exc_type=ImportError)
    import epochs

    torch.manual_seed(0)
    model = models.mvae(2000, (6, 6), (8,), 3)
    assert isinstance(model.objective, SubsetELBO)
    right = model.objective.loss(model.program, model.guide, model.data)
    with pyro.validation_enabled(False):  # its Bernoulli refuses grey pixels
        trainer = epochs.multivae_mvae(model, model.data, 2000, str(tmp_path))
        inputs = next(iter(trainer.train_loader))
        assert abs(trainer.model(inputs).loss.item() - right) < 0.15


def test_a_race_goes_on_where_it_was(tmp_path, monkeypatch):
    import accuracy

    torch.manual_seed(0)
    data = (torch.rand(120, 16), torch.arange(120) % 10)
    race = {"data": data, "pretrain": 1, "hidden": (8,), "compile": False, "only": "ours"}
    real, calls = accuracy.metrics.hungarian_accuracy, []

    def fails_once(labels, clusters):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(labels, clusters)

    monkeypatch.setattr(accuracy.metrics, "hungarian_accuracy", fails_once)
    with pytest.raises(KeyboardInterrupt):
        accuracy.race(tmp_path, 1, most_epochs=3, **race)
    short = json.loads((tmp_path / "ours-seed0" / "curve.json").read_text())["curve"]
    longer = accuracy.race(tmp_path, 1, most_epochs=3, **race)["ours"][0].curve
    assert longer[:3] == short
    assert [entry[1:3] for entry in longer] == [
        ["autoencoder", 1], ["start", 0], ["fit", 1], ["fit", 2], ["fit", 3],
    ]  # fmt: skip
    seconds = [entry[0] for entry in longer]
    assert seconds == sorted(seconds)


def test_exponent_of_a_power():
    sizes = [1.0, 2.0, 4.0, 8.0]
    found = measuring.exponent(sizes, [3 * x**1.5 for x in sizes])
    assert math.isclose(found["slope"], 1.5)
    assert math.isclose(found["last"], 1.5)
    assert abs(found["error"]) < 1e-9


def test_a_loop_takes_turns():
    seen = []

    def run(pause):
        for i in range(3):
            seen.append(i)
            if pause():
                return
        raise ValueError("one epoch too many")

    loop = measuring.Turns(run)
    loop()
    assert seen == [0]
    loop()
    assert seen == [0, 1]
    loop.close()
    assert seen == [0, 1]
    fails = measuring.Turns(run)
    for _ in range(3):
        fails()
    with pytest.raises(ValueError, match="one epoch too many"):
        fails()


def test_the_table_has_every_ratio():
    case = measuring.Case("a", "ms a step", {"x": [1.0, 1.0], "y": [2.0, 4.0]}, [("x", "y", 0.5)])
    record = {"cases": [case.record()], "circumstances": measuring.circumstances(TINY)}
    text = showing.markdown([record])
    assert "| a | x: 1 ms | y: 3 ms | 0.38 (0.31..0.44) | <= 0.5 |" in text
    assert "torch " in text


def test_the_command_runs_in_a_checkout_only(tmp_path, monkeypatch):
    assert CliRunner().invoke(cli.app, ["bench"]).exit_code == 0
    assert CliRunner().invoke(cli.app, ["bench", "vad"]).exit_code == 2
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "pyrozoo" / "zoo" / "cli.py"))
    monkeypatch.setattr(cli.subprocess, "run", lambda *_, **__: pytest.fail("something ran"))
    assert CliRunner().invoke(cli.app, ["bench"]).exit_code == 2


def test_results_are_stored(tmp_path):
    path = tmp_path / "r.json"
    given = ["small", "--tiny", "--no-compile", "--rounds=2", "--threads=1", f"--json={path}"]
    folder = str(Path(__file__).parent)
    subprocess.run([sys.executable, folder, *given], check=True, capture_output=True)
    record = json.loads(path.read_text())
    assert record["work"] == "small"
    assert record["circumstances"]["threads"] == record["circumstances"]["cores_used"] == 1
    assert record["cases"][0]["ratios"][0]["most"] == 0.8
    assert "| staged: " in showing.markdown([record])


def test_the_command_lists_the_works():
    folder = Path(__file__).parent
    run = subprocess.run([sys.executable, str(folder)], capture_output=True, text=True, check=True)
    assert run.stdout.startswith("  vade ")
    wrong = subprocess.run([sys.executable, str(folder), "vad"], capture_output=True, text=True)
    assert wrong.returncode == 2
    assert "no work is called vad" in wrong.stderr


def test_the_readme_has_the_stored_results():
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    shown = readme.partition("<!-- bench -->\n")[2].partition("\n<!-- end bench -->")[0]
    assert shown == showing.markdown(showing.stored())
