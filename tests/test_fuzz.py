"""A short run of the fuzzer, and what it rests on: its oracle, Hypothesis on batches and bounds."""

import json
import os
import pickle
import shutil
import subprocess
import sys

import fuzz
import numpy as np
import pytest
import torch
from fuzzing.bounds import doubles
from fuzzing.core import Bad, Refused, attempt, untouched
from fuzzing.kept import home, watching
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pyrozoo.inference import Batch, EnumELBO
from pyrozoo.zoo import cli, exports, folders, runs, tables
from pyrozoo.zoo.tasks import Task

INPUTS = {
    "batch": 220, "metrics": 150, "bound": 40, "options": 30, "fits": 8, "posteriors": 25,
    "tables": 50, "checkpoints": 30, "data": 40, "folders": 25, "command": 25,
}  # fmt: skip


@pytest.mark.parametrize("target", fuzz.TARGETS)
def test_every_input_works_or_is_refused_with_a_reason(target):
    found = fuzz.run(INPUTS[target], 1000, target, say=lambda line: None)[target]
    assert found["BAD"] == []
    assert found["refused"] > 0
    assert found["worked"] > 0 or target == "options"


def test_the_table_counts_every_input():
    found = fuzz.run(3, 0, "batch", say=lambda line: None)
    assert fuzz.table(found)[-1].split()[:2] == ["all", "3"]


# ---- the oracle itself ------------------------------------------------------------------------------


def _raise(error):
    raise error


@pytest.mark.parametrize(
    ("call", "names", "spoilt"),
    [
        (lambda: 1, (), "spoilt, but accepted"),
        (lambda: _raise(ValueError("site 'x' has two rows")), (), False),
        (lambda: _raise(ValueError("site 'x' has two rows")), ("'y'",), "y"),
        (lambda: _raise(ValueError("x")), ("x",), "too short to help"),
        (lambda: _raise(KeyError("site 'x' has two rows")), ("'x'",), "x"),
        (lambda: len(3), (), "an error that nobody wrote"),
    ],
)
def test_the_oracle_finds_what_is_bad(call, names, spoilt):
    with pytest.raises(Bad):
        attempt(call, *names, spoilt=spoilt)


def test_the_oracle_lets_good_errors_and_sound_inputs_pass():
    with pytest.raises(Refused):
        attempt(lambda: Batch.of({"x": [1.0]}), "'x'", spoilt="a list")
    with pytest.raises(Refused):
        attempt(lambda: Batch.of(-1), spoilt="negative rows")
    assert len(attempt(lambda: Batch.of(3), spoilt=False)) == 3


def test_a_change_of_the_random_state_is_seen():
    with pytest.raises(Bad, match="global state"), torch.random.fork_rng(), untouched():
        torch.randn(1)


def test_the_watch_sees_other_files_and_programs(tmp_path):
    folder, outside = tmp_path / "run", tmp_path / "outside"
    folder.mkdir()
    for path in (folder / "inside", outside):
        path.write_bytes(pickle.dumps(np.arange(3)))
    with watching(folder) as seen:
        (folder / "inside").read_bytes()
    assert seen == []
    with watching(folder) as seen:
        outside.read_bytes()
        pickle.loads((folder / "inside").read_bytes())
        subprocess.run([sys.executable, "-c", ""], check=True)
    assert {event for event, _ in seen} >= {"open", "pickle.find_class", "subprocess.Popen"}


# ---- Hypothesis -------------------------------------------------------------------------------------


ROWS = st.integers(1, 5)


@settings(max_examples=60, deadline=None)
@given(st.data(), ROWS)
def test_a_batch_is_what_is_known_and_zeros(data, rows):
    shape = (rows, *data.draw(st.sampled_from([(), (2,), (2, 1)])))
    value = data.draw(hnp.arrays(np.float64, shape))
    known = data.draw(hnp.arrays(np.bool_, st.sampled_from([shape[:1], shape])))
    full = np.broadcast_to(known.reshape(known.shape + (1,) * (value.ndim - known.ndim)), shape)
    if not np.isfinite(value[full]).all():
        with pytest.raises(ValueError, match="'x'"):
            Batch.of({"x": (value, known)})
        return
    batch = Batch.of({"x": (value, known)})
    assert len(batch) == rows
    assert ("x" in batch) == full.any()
    if "x" not in batch:
        return
    assert (batch["x"].numpy() == np.where(full, value, 0)).all()
    order = data.draw(st.permutations(range(rows)))
    assert (batch[order]["x"].numpy() == np.where(full, value, 0)[order]).all()


PAIR: list = []  # of a mixture, made once


@settings(max_examples=25, deadline=None)
@given(st.data(), ROWS)
def test_the_bound_of_a_mixture_is_its_evidence_whatever_is_known(data, rows):
    from cases import Empty, Mixture

    with doubles():
        if not PAIR:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                program = Mixture().double()
            PAIR.extend([program, *EnumELBO().pair(program, Empty())])
        program, p, q = PAIR
        number = st.floats(-20, 20)
        x = data.draw(hnp.arrays(np.float64, (rows, 4), elements=number))
        y = data.draw(hnp.arrays(np.int64, rows, elements=st.integers(0, 2)))
        here, shown = (data.draw(hnp.arrays(np.bool_, rows)) for _ in range(2))
        batch = Batch.of({"x": (x, here), "y": (y, shown)})
        bound = EnumELBO().per_row(p, q, batch)
        known = torch.from_numpy(here | shown)
        evidence = torch.where(known, program.evidence(batch), 0.0)
        torch.testing.assert_close(bound, evidence, rtol=1e-9, atol=1e-9)


# ---- what the fuzzer found, one by one --------------------------------------------------------------


def load(name):
    return folders.load(home() / name, runs.make_model)


def test_floats_of_a_run_on_pixels_are_pixels_and_no_levels():
    run = load("arrays")
    bytes_, floats = (
        exports.read_arrays(run, tables.load(home() / name)) for name in ("d.npz", "f.npz")
    )
    assert torch.allclose(bytes_["x"], floats["x"].float(), atol=1e-6)
    one_row = exports.read_arrays(run, tables.load({"x": np.full((1, 2, 2), 3, np.uint8)}))
    assert torch.allclose(one_row["x"], torch.full((1, 4), 3 / 255))


def test_a_value_that_does_not_fit_a_later_slice_is_refused():
    run = load("table")
    data = {"x": torch.zeros(4, 3), "y": torch.tensor([0, 1, 0, 7])}
    for batch_size in (2, 9):
        with pytest.raises(ValueError, match=r"'y' takes values in 0..1"):
            run.result.predict(data, "z", batch_size=batch_size)


def test_another_likelihood_for_the_same_parameters_is_refused(tmp_path):
    shutil.copytree(home() / "arrays", tmp_path / "run")
    path = tmp_path / "run" / "run.json"
    facts = json.loads(path.read_text())
    facts["spec"]["options"]["likelihood"] = "continuous_bernoulli"
    path.write_text(json.dumps(facts))
    with pytest.raises(ValueError, match="belongs to another program"):
        folders.load(tmp_path / "run", runs.make_model)


def test_a_run_of_which_only_some_rows_are_kept_is_read(tmp_path, monkeypatch):
    run = load("table")
    task = Task(run.train, run.labels, run.train, run.labels, schema=run.schema)
    monkeypatch.setattr(folders, "ROWS", 7)
    (tmp_path / "run").mkdir()
    folders.store(tmp_path / "run", run.model, run.result, task, run.figures, run.facts)
    assert len(folders.load(tmp_path / "run", runs.make_model).train) == 7


@pytest.mark.skipif(not hasattr(os, "symlink"), reason="no links")
def test_a_report_is_not_written_through_a_link(tmp_path):
    shutil.copytree(home() / "arrays", tmp_path / "run")
    (tmp_path / "mine").write_text("untouched")
    (tmp_path / "run" / "report.html").symlink_to(tmp_path / "mine")
    run = folders.load(tmp_path / "run", runs.make_model)
    with pytest.raises(ValueError, match="leads out of the folder"):
        folders.write_report(run)
    assert (tmp_path / "mine").read_text() == "untouched"


@pytest.mark.parametrize("error", [*cli.EXPECTED, FileNotFoundError, ModuleNotFoundError])
def test_the_command_says_what_is_wrong_in_one_line(error, monkeypatch, capsys):
    monkeypatch.setattr(cli, "app", lambda: _raise(error("the site [x] is misspelt")))
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 1
    out = capsys.readouterr()
    assert out.out == ""
    assert "the site [x] is misspelt" in out.err
    assert "Traceback" not in out.err


def test_a_defect_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(cli, "app", lambda: _raise(KeyError("a defect")))
    with pytest.raises(KeyError):
        cli.main()
