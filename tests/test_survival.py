"""Nothing is lost, nothing is silently wrong: kills, full disks, damage, odd numbers, no memory."""

import contextlib
import copy
import errno
import json
import math
import os
import pickle
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import safetensors.torch
import torch
from torch import nn

from pyrozoo import zoo
from pyrozoo.guides import Amortized
from pyrozoo.inference import EnumELBO, Result, SubsetELBO, checkpoint, fit, schedules
from pyrozoo.inference.training.guarding import out_of_memory
from pyrozoo.zoo.clustering import VaDE

resource = pytest.importorskip("resource", reason="kills, forks and limits need Unix")
WIDTH = 6
NAME = "checkpoint.safetensors"


def make(seed=0, clusters=3):
    torch.manual_seed(seed)
    program = VaDE(WIDTH, clusters, 2, (8,))
    return program, Amortized(program, ["x"], (8,))


def rows(count=60):
    generator = torch.Generator().manual_seed(0)
    return torch.rand(count, WIDTH, generator=generator)


def run(pair=None, data=None, **options):
    program, guide = pair or make()
    options = {"epochs": 2, "batch_size": 16, "progress": False, **options}
    return fit(program, guide, {"x": rows()} if data is None else data, **options)


def without_seconds(history):
    return [{k: v for k, v in record.items() if k != "seconds"} for record in history]


def same_files(a, b):
    """Tensors bit for bit, and all facts but the times."""
    (one, facts), (other, others) = checkpoint.load(a), checkpoint.load(b)
    assert one.keys() == other.keys()
    assert [k for k, v in one.items() if not torch.equal(v, other[k])] == []
    facts["history"], others["history"] = map(
        without_seconds, (facts["history"], others["history"])
    )
    assert facts == others
    return facts


def snapshot(pair):
    return {k: v.clone() for k, v in checkpoint.pack_modules(a=pair[0], b=pair[1]).items()}


@contextlib.contextmanager
def untouched(folder, pair):
    """Neither the files of a folder nor the modules change."""
    before, parameters = {p: p.read_bytes() for p in folder.iterdir()}, snapshot(pair)
    yield
    assert {p: p.read_bytes() for p in folder.iterdir()} == before
    now = snapshot(pair)
    assert all(torch.equal(v, now[k]) for k, v in parameters.items())


# ---- kill -9 -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    home = tmp_path_factory.mktemp("kills")
    command = [sys.executable, str(Path(__file__).with_name("kills.py")), str(home)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr
    return home, json.loads(done.stdout)


@pytest.mark.parametrize(("work", "kills"), [("plain", 12), ("pretrained", 8)])
def test_twenty_kills_change_no_bit(killed, work, kills):
    home, report = killed
    attempts = report[f"{work} cut"]
    assert [a["code"] for a in attempts] == [-9] * kills + [0]
    assert report[f"{work} whole"] == report[f"{work} whole"][:1]
    torn = [f for a in attempts for f in a["files"] if f.endswith(".partial")]
    assert len(set(torn)) >= kills // 4  # killed inside checkpoint.save
    whole, cut = home / work / "whole", home / work / "cut"
    files = {str(p.relative_to(cut)) for p in cut.rglob("*")} - {"start"}
    assert files == {str(p.relative_to(whole)) for p in whole.rglob("*")} - {"start"}
    assert not any(name.endswith(".partial") for name in files)
    facts = same_files(whole / NAME, cut / NAME)
    same_files(whole / "fitted.safetensors", cut / "fitted.safetensors")
    if work == "plain":
        assert facts["best_epoch"] == 1 + max(
            range(24), key=lambda i: facts["history"][i]["val_bound"]
        )
        return
    same_files(whole / "start" / NAME, cut / "start" / NAME)
    seen = [set(a["files"]) for a in attempts[:-1]]
    assert any(f"start/{NAME}" in files and NAME not in files for files in seen)
    assert any(NAME in files for files in seen)


def test_pretraining_is_not_repeated(tmp_path, monkeypatch):
    def model():
        return zoo.create("vade", {"x": rows()}, num_clusters=3, latent_dim=2, hidden=(8,))

    options = {"start": {"epochs": 1, "num_starts": 1}, "batch_size": 16, "progress": False}
    whole = model().fit({"x": rows()}, epochs=3, folder=tmp_path / "whole", **options)
    model().fit({"x": rows()}, epochs=1, folder=tmp_path / "cut", **options)
    with pytest.raises(ValueError, match="start num_starts: 1 there, 2 here"):
        model().fit(
            {"x": rows()}, epochs=3, folder=tmp_path / "cut", resume=True,
            **{**options, "start": {"epochs": 1, "num_starts": 2}},
        )  # fmt: skip
    again = model()
    again.start = None
    monkeypatch.setattr(again, "start", lambda *a, **b: pytest.fail("pretrained again"))
    cut = again.fit({"x": rows()}, epochs=3, folder=tmp_path / "cut", resume=True, **options)
    assert all(torch.equal(v, cut.parameters[k]) for k, v in whole.parameters.items())
    with pytest.raises(FileExistsError, match="resume=True"):
        again.fit({"x": rows()}, epochs=3, folder=tmp_path / "cut", **options)


def test_a_stopped_run_stays_stopped_unless_the_reason_is_gone(tmp_path):
    options = {"folder": tmp_path, "callbacks": [lambda r: r.epoch == 2]}
    first = run(epochs=5, **options)
    again = run(epochs=5, resume=True, **options)
    assert again.history == first.history
    assert again.stopped == "a callback"
    assert run(epochs=5, resume=True, folder=tmp_path).epoch == 5
    with pytest.raises(ValueError, match="5 epochs done, more than epochs=3"):
        run(epochs=3, resume=True, folder=tmp_path)


def test_the_best_state_before_the_interruption_is_still_the_best(tmp_path):
    def fitted(epochs, **options):
        return run(epochs=epochs, validation=0.3, lr=0.3, **options)

    whole = fitted(8)
    assert whole.best_epoch < 6
    fitted(6, folder=tmp_path)
    cut = fitted(8, folder=tmp_path, resume=True)
    assert cut.best_epoch == whole.best_epoch
    assert all(torch.equal(v, cut.parameters[k]) for k, v in whole.parameters.items())


def test_parameters_behind_a_method_are_saved_too(tmp_path):
    def pair():
        program, guide = make()
        return program.forward, guide

    whole = run(pair(), epochs=3)
    assert any(name.startswith("program.0.") for name in whole.parameters)
    run(pair(), epochs=1, folder=tmp_path)
    cut = run(pair(), epochs=3, folder=tmp_path, resume=True)
    assert all(torch.equal(v, cut.parameters[k]) for k, v in whole.parameters.items())


def test_one_objective_for_two_data_sets():
    objective = EnumELBO()
    for count in (60, 30):
        assert run(data={"x": rows(count)}, objective=objective).objective.num_rows == count
    assert objective.num_rows is None


# ---- folders -----------------------------------------------------------------------------------


def fork():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # threads that only wait
        return os.fork()


def in_a_fork(work):
    """Run in a child process; the error that it ended with, or ''."""
    read, write = os.pipe()
    pid = fork()
    if pid == 0:
        text = ""
        try:
            work()
        except BaseException:
            text = traceback.format_exc()
        os.write(write, text.encode()[-4000:])
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as file:
        text = file.read()
    os.waitpid(pid, 0)
    return text


def test_a_second_fit_in_the_folder_is_refused_and_a_killed_one_is_not_in_the_way(tmp_path):
    read, write = os.pipe()
    pid = fork()
    if pid == 0:

        def wait(result):
            os.write(write, b"x")
            time.sleep(60)

        try:
            run(folder=tmp_path, callbacks=[wait])
        except BaseException:
            os.write(write, traceback.format_exc().encode()[-4000:])
        os._exit(1)
    try:
        assert os.read(read, 4000) == b"x"
        pair = make(1)
        for resume in (False, True):
            with (
                untouched(tmp_path, pair),
                pytest.raises(RuntimeError, match=rf"{tmp_path} is in use .*\(process {pid}\)"),
            ):
                run(pair, folder=tmp_path, resume=resume)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(read)
        os.close(write)
    (tmp_path / f".{NAME}.{pid}.partial").write_bytes(b"half")
    assert run(folder=tmp_path, resume=True).epoch == 2
    assert {p.name for p in tmp_path.iterdir()} == {NAME, f".{NAME}.lock"}


def test_a_fit_inside_a_fit_does_not_take_its_folder(tmp_path):
    with pytest.raises(RuntimeError, match="is in use by another fit"):
        run(folder=tmp_path, callbacks=[lambda r: run(folder=tmp_path, resume=True) and None])
    assert run(folder=tmp_path, resume=True).epoch == 2


def test_an_older_run_is_not_overwritten(tmp_path):
    run(folder=tmp_path, epochs=1)
    pair = make(1)
    started = []
    with (
        untouched(tmp_path, pair),
        pytest.raises(FileExistsError, match=f"{NAME} is there already: .*resume=True"),
    ):
        run(pair, folder=tmp_path, start=lambda: started.append(1))
    assert started == []


def test_a_folder_that_cannot_be_written_is_found_before_anything_else(tmp_path):
    (tmp_path / "file").write_text("")
    started = []
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(OSError, match=rf"{folder} cannot be written: (Not a dir|File exists)"):
            run(folder=folder, start=lambda: started.append(1))
    assert started == []


def test_a_read_only_folder():
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home) / "run"
        folder.mkdir()
        Path(home).chmod(0o755)
        folder.chmod(0o555)

        def work():
            if os.getuid() == 0:
                os.setuid(65534)
            run(folder=folder, callbacks=[lambda result: pytest.fail("it was trained")])

        text = f"PermissionError: [Errno 13] {folder} cannot be written: Permission denied"
        assert in_a_fork(work).splitlines()[-1] == text
        assert list(folder.iterdir()) == []
        lock = folder / f".{NAME}.lock"
        lock.touch()
        lock.chmod(0o666)
        assert in_a_fork(work).splitlines()[-1] == text
        assert list(folder.iterdir()) == [lock]


def limit_files(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def test_a_disk_that_is_full_at_the_start(tmp_path):
    pair, text = make(), f"{tmp_path / NAME} cannot be written: File too large"

    def work():
        limit_files(5000)
        before = snapshot(pair)
        try:
            run(pair, folder=tmp_path)
        finally:
            now = snapshot(pair)
            assert all(torch.equal(v, now[k]) for k, v in before.items())

    assert in_a_fork(work).splitlines()[-1] == f"OSError: [Errno 27] {text}"
    assert {p.name for p in tmp_path.iterdir()} == {f".{NAME}.lock"}


def test_a_disk_that_fills_up_keeps_the_older_checkpoint(tmp_path):
    def fill(result):
        if result.epoch == 2:
            limit_files(5000)

    text = in_a_fork(lambda: run(epochs=3, folder=tmp_path, callbacks=[fill]))
    assert f"{NAME} cannot be written: File too large" in text.splitlines()[-1]
    assert {p.name for p in tmp_path.iterdir()} == {NAME, f".{NAME}.lock"}
    assert len(checkpoint.load(tmp_path / NAME)[1]["history"]) == 1
    cut = run(epochs=3, folder=tmp_path, resume=True)
    whole = run(epochs=3)
    assert all(torch.equal(v, cut.parameters[k]) for k, v in whole.parameters.items())


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_write_that_fails_says_where(tmp_path, monkeypatch, code):
    path = tmp_path / "a.safetensors"
    checkpoint.save(path, {"x": torch.zeros(2)}, {})
    before = path.read_bytes()

    def fail(descriptor):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(checkpoint.os, "fsync", fail)
    with pytest.raises(OSError, match=f"{path} cannot be written: {os.strerror(code)}") as caught:
        checkpoint.save(path, {"x": torch.ones(2)}, {})
    assert caught.value.errno == code
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


# ---- damaged and foreign checkpoints -------------------------------------------------------------


def test_any_flipped_bit_and_any_missing_end_is_damage(tmp_path):
    path = tmp_path / "a.safetensors"
    checkpoint.save(path, {"x": torch.arange(3.0)}, {"kind": "fitted", "note": 'a "0" b'})
    whole = path.read_bytes()
    tensors, facts = checkpoint.load(path)
    assert tensors["x"].tolist() == [0, 1, 2]
    assert facts == {"format": checkpoint.FORMAT, "kind": "fitted", "note": 'a "0" b'}
    changed = [
        bytes([*whole[:i], whole[i] ^ 1 << b, *whole[i + 1 :]])
        for i in range(len(whole))
        for b in range(8)
    ]
    for broken in [*changed, *(whole[:i] for i in range(len(whole))), whole + b" "]:
        path.write_bytes(broken)
        with pytest.raises(ValueError, match="damaged"):
            checkpoint.load(path)


def test_what_is_no_checkpoint(tmp_path):
    path = tmp_path / NAME
    for content in (
        pickle.dumps({"x": 1}),
        b"",
        b"[]" * 500,
        b"\xff" * 100,
        (10**9).to_bytes(8, "little") + b"{}",
        (200_000).to_bytes(8, "little") + b"[" * 200_000,
        safetensors.torch.save({"x": torch.zeros(1)}),
        safetensors.torch.save({"x": torch.zeros(1)}, {"pyrozoo": "{}"}) + b"x",
    ):
        path.write_bytes(content)
        pair = make()
        with (
            untouched(tmp_path, pair),
            pytest.raises(ValueError, match="damaged, or no checkpoint"),
        ):
            checkpoint.load(path)
    torch.save({"x": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="damaged, or no checkpoint"):
        run(folder=tmp_path, resume=True)
    path.write_bytes(safetensors.torch.save({"x": torch.zeros(1)}, {"pyrozoo": '{"format": 1}'}))
    with pytest.raises(ValueError, match="has format 1; this version of pyrozoo reads 2"):
        run(folder=tmp_path, resume=True)
    path.unlink()
    path.mkdir()
    with pytest.raises(ValueError, match="is a folder, not a checkpoint"):
        run(folder=tmp_path, resume=True)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stored")
    run(folder=folder, epochs=1)
    return checkpoint.load(folder / NAME)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"history": None}, "does not say 'history'"),
        ({"history": 3}, "'history' is not a list with a record"),
        ({"history": [{"epoch": "1"}]}, "'history'"),
        ({"history": [{"epoch": 1, "bound": True}]}, "'history'"),
        ({"history": [{"epoch": 7.0, "bound": 1.0}]}, "'history'"),
        ({"sites": ["x", 1]}, "'sites' is not a list of strings"),
        ({"best_score": "x"}, "'best_score' is not a number"),
        ({"best_epoch": 1.5}, "'best_epoch'"),
        ({"stopped": 0}, "'stopped'"),
        ({"probe": []}, "'probe'"),
        ({"settings": []}, "'settings'"),
        ({"settings": {}}, "other settings: program: nothing there, 'VaDE' here"),
        ({"schedules": {"lr": "x"}}, "'schedules'"),
        ({"parameters": {}}, "'parameters'"),
        ({"parameters": []}, "parameters in another order"),
        ({"versions": 1}, "'versions'"),
        ({"optimizer": {}}, "'optimizer'"),
        ({"optimizer": {"groups": [], "plain": {}}}, r"groups of \[\] parameters, not \[13\]"),
        ({"optimizer": ("lr", "abc")}, "its optimiser has lr='abc'"),
        ({"optimizer": ("betas", [0.9])}, "its optimiser has betas="),
        ({"optimizer": ("__class__", 1)}, "its optimiser has __class__=1"),
        ({"kind": "fitted"}, "not the state of a fit"),
        ({"probe": 0.0}, "of another program or guide: .* rows was 0, here it is"),
    ],
)
def test_facts_of_other_types_are_refused(tmp_path, stored, change, message):
    tensors, facts = stored
    facts = copy.deepcopy(facts)
    for name, value in change.items():
        if isinstance(value, tuple):
            facts[name]["groups"][0][value[0]] = value[1]
        else:
            facts[name] = value
        if value is None:
            del facts[name]
    checkpoint.save(tmp_path / NAME, tensors, facts)
    pair = make(1)
    before = snapshot(pair)
    with pytest.raises(ValueError, match=message):
        run(pair, folder=tmp_path, resume=True)
    now = snapshot(pair)
    assert all(torch.equal(v, now[k]) for k, v in before.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimizer.99.step": torch.zeros(())}, "slot '99.step'"),
        ({"optimizer.x": torch.zeros(())}, "slot 'x'"),
        ({"random.torch": torch.zeros(3)}, "no random state 'torch'"),
        ({"random.order": None}, "no random state 'order'"),
        ({"best.program.loc": torch.zeros(2)}, "best state .* belongs to another program"),
        ({"program.loc": torch.zeros(3, 2).double()}, "loc: torch.float64 for torch.float32"),
        ({"guide.more": torch.zeros(3)}, "another guide .*unknown"),
    ],
)
def test_tensors_that_do_not_belong_are_refused(tmp_path, stored, change, message):
    tensors = {k: v for k, v in {**stored[0], **change}.items() if v is not None}
    checkpoint.save(tmp_path / NAME, tensors, stored[1])
    pair = make(1)
    before = snapshot(pair)
    with pytest.raises(ValueError, match=message):
        run(pair, folder=tmp_path, resume=True)
    now = snapshot(pair)
    assert all(torch.equal(v, now[k]) for k, v in before.items())


def constant(value):
    return lambda epoch: value


SETTINGS = {"weights": {"z": constant(0.5)}, "lr_schedule": constant(1.0)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.1}, "settings: lr: 0.001 there, 0.1 here$"),
        ({"batch_size": 8}, "settings: batch_size: 16 there, 8 here$"),
        ({"seed": 1}, "settings: seed: 0 there, 1 here$"),
        ({"clip": 1.0}, "clip: None there, 1.0 here$"),
        ({"data": {"x": rows(61)}}, "rows: 60 there, 61 here; data: '[0-9a-f]{16}' there"),
        ({"data": {"x": rows() * 0.99}}, "settings: data: '[0-9a-f]{16}' there, '[0-9a-f]{16}' here$"),
        ({"validation": 0.1}, "held-out rows: None there, 6 here"),
        ({"repeat": {"x": 2}}, r"repeat: {} there, {'x': 2} here"),
        ({"objective": EnumELBO(2)}, "objective.num_particles: 1 there, 2 here"),
        ({"objective": EnumELBO(weights={"y": 2.0})}, r"objective.weights: {} there, {'y': 2.0} here"),
        ({"optimizer": lambda xs: torch.optim.SGD(xs, 1e-3)}, "optimizer: 'Adam' there, 'SGD' here"),
        ({"weights": None}, r"schedules: \['lr', 'weight of z'\] there, \['lr'\] here"),
        ({"weights": {"z": constant(1.0)}}, "weight of z in epoch 1: 0.5 there, 1.0 here"),
        ({"lr_schedule": constant(0.1)}, "schedules: lr in epoch 1: 1.0 there, 0.1 here"),
        ({"decided_by": {"likelihood": "normal"}}, "likelihood: nothing there, 'normal' here"),
        ({"device": "cpu", "pair": make(clusters=4)}, r"another program \(VaDE.*\(3,\) for \(4,\)"),
    ],
)  # fmt: skip
def test_going_on_with_other_settings_is_refused(tmp_path, options, message):
    run(folder=tmp_path, epochs=1, **SETTINGS)
    pair = options.pop("pair", None) or make(1)
    with untouched(tmp_path, pair), pytest.raises(ValueError, match=message):
        run(pair, folder=tmp_path, resume=True, **{**SETTINGS, **options})


class Normal(nn.Module):
    """z ~ N(0, 1), x ~ N(shift(a) + z, scale): small enough to go wrong on purpose."""

    def __init__(self, scale=1.0, width=1):
        super().__init__()
        self.a = nn.Parameter(torch.zeros(width))
        self.scale = scale

    def shift(self):
        return self.a

    def forward(self, batch):
        with pyro.plate("data", len(batch)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(self.a)), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.shift() + z, self.scale).to_event(1))


class Free(nn.Module):
    """q(z), whatever x is."""

    def __init__(self, width=1):
        super().__init__()
        self.b = nn.Parameter(torch.zeros(width))

    def forward(self, batch):
        with pyro.plate("data", len(batch)):
            pyro.sample("z", dist.Normal(self.b.expand(len(batch), -1), 1.0).to_event(1))


def small(program=None, **options):
    program = program or Normal()
    data = options.pop("data", {"x": torch.linspace(-1, 1, 60).reshape(60, 1)})
    return run((program, Free(len(program.a))), data, **options)


def test_a_program_that_differs_in_no_parameter_is_found(tmp_path):
    small(folder=tmp_path, epochs=1)
    with pytest.raises(ValueError, match="of another program or guide"):
        small(Normal(scale=1.1), folder=tmp_path, resume=True)
    assert small(folder=tmp_path, resume=True).epoch == 2


def test_result_load_checks_too(tmp_path):
    path, pair = tmp_path / "m.safetensors", make()
    result = run(pair)
    checkpoint.save(path, result.parameters, {"kind": "fitted", "history": [], "sites": 1})
    with pytest.raises(ValueError, match="'sites' is not a list of strings, but 1"):
        result.load(path)
    result.save(path)
    again = Result(*pair, EnumELBO()).load(path)
    assert again.objective.num_rows == result.objective.num_rows == 60
    assert again.history == result.history
    tensors, facts = checkpoint.load(path)
    checkpoint.save(path, tensors, {**facts, "num_rows": 0.5})
    with pytest.raises(ValueError, match=r"'num_rows' is not a number of rows, or null, but 0\.5"):
        result.load(path)
    result.save(path)
    assert checkpoint.load(path)[1]["versions"]["torch"] == str(torch.__version__)
    program, guide = make(1, clusters=4)
    before = snapshot((program, guide))
    with pytest.raises(
        ValueError, match=r"program \(VaDE, here VaDE\): loc: \(3, 2\) for \(4, 2\)"
    ):
        Result(program, guide, EnumELBO()).load(path)
    now = snapshot((program, guide))
    assert all(torch.equal(v, now[k]) for k, v in before.items())


# ---- numbers that are not finite -----------------------------------------------------------------


def with_huge(*numbers):
    x = torch.linspace(-1, 1, 60).reshape(60, 1)
    x[list(numbers)] = 1e30  # finite, its square is not
    return {"x": x}


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ((17,), "x in row 17"),
        ((3, 17, 41), "x in rows 3, 17, 41, of 60"),
        (range(10, 20), "x in rows 10, 11, 12, 13, 14 and 5 more, of 60"),
        (range(60), "x in all 60 rows of the step"),
    ],
)
def test_an_infinite_loss_stops_before_the_step_and_names_site_and_rows(numbers, text):
    program = Normal()
    with pytest.raises(FloatingPointError) as caught:
        small(program, data=with_huge(*numbers), batch_size=64)
    assert str(caught.value) == (
        f"in epoch 1, step 1: the loss is inf: not finite: {text}. The parameters are those before"
        " this step; try a smaller learning rate, or clip=; there is no checkpoint, since no folder="
        " was given"
    )
    assert program.a.item() == 0


def test_it_stops_at_the_step_and_keeps_the_checkpoint(tmp_path):
    """Rows are those of the data, with rows held out and others visited twice."""
    train = torch.randperm(60, generator=torch.Generator().manual_seed(1))[6:]
    bad = train[7].item()
    program = Normal()
    seen = []

    class Watched(torch.optim.SGD):
        def step(self, *args, **options):
            super().step(*args, **options)
            seen.append(program.a.item())

    with pytest.raises(
        FloatingPointError, match=rf"in epoch 1, step (\d+): .*x in row {bad}\."
    ) as e:
        small(
            program, data=with_huge(bad), batch_size=5, validation=0.1, repeat={"x": 2},
            optimizer=lambda xs: Watched(xs, lr=0.1), folder=tmp_path,
        )  # fmt: skip
    step = int(re.search(r"step (\d+)", str(e.value))[1])
    assert len(seen) == step - 1
    assert program.a.item() == ([0, *seen])[-1]
    assert f"the checkpoint of epoch 0 is in {tmp_path / NAME}; resume=True" in str(e.value)
    checkpoint.load(tmp_path / NAME)


def test_the_rows_are_those_at_the_draws_of_the_step():
    bad = []

    class Chance(Normal):
        def forward(self, batch):
            with pyro.plate("data", len(batch)):
                z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
                far = z > 1
                if torch.is_grad_enabled() and self.training and len(batch) == 60:
                    bad.append(far[:, 0].nonzero()[:, 0].tolist())
                loc = torch.where(far, torch.tensor(math.inf), self.a + z)
                pyro.sample("x", dist.Normal(loc, 1.0).to_event(1))

    with pytest.raises(FloatingPointError) as caught:
        small(Chance(), batch_size=60)
    numbers = bad[-1]
    first = ", ".join(map(str, numbers[:5]))
    assert len(numbers) > 5
    assert f"x in rows {first} and {len(numbers) - 5} more, of 60" in str(caught.value)


class Kink(Normal):
    """A finite value whose gradient is not."""

    def shift(self):
        return self.a.abs().sqrt()


@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_gradient_that_is_not_finite_names_the_parameter(clip):
    program = Kink()
    with pytest.raises(FloatingPointError, match=r"gradient is not finite for program\.a\. The"):
        small(program, clip=clip)
    assert program.a.item() == 0


def test_parameters_that_a_step_itself_broke_are_named():
    data = {"x": torch.full((60, 1), 100.0)}
    with pytest.raises(FloatingPointError, match=r"step 2: parameters are not finite .*program\.a"):
        small(data=data, optimizer=lambda xs: torch.optim.SGD(xs, lr=1e38))


def test_finite_gradients_whose_sum_is_not_are_no_error():
    class Steep(Normal):
        def shift(self):
            return self.a * 1e30

    result = small(Steep(width=40), data={"x": torch.ones(8, 40)}, epochs=1, batch_size=8, clip=1.0)
    assert math.isfinite(result.history[0]["loss"])


def test_weights_and_classification_terms_are_named():
    with pytest.raises(FloatingPointError, match="the loss is nan: the weight of 'z' is nan"):
        small(weights={"z": lambda epoch: math.nan})

    class Program(nn.Module):
        def forward(self, batch):
            with pyro.plate("data", len(batch)):
                y = pyro.sample("y", dist.Categorical(torch.ones(2)))
                pyro.sample("x", dist.Normal(y.double().float(), 1.0))

    class Guide(nn.Module):
        def __init__(self):
            super().__init__()
            self.b = nn.Parameter(torch.zeros(()))

        def forward(self, batch):
            logits = torch.stack([self.b, self.b - math.inf]).expand(len(batch), 2)
            with pyro.plate("data", len(batch)):
                pyro.sample("y", dist.Categorical(logits=logits), infer={"enumerate": "parallel"})

    objective = EnumELBO(observed_guide_weights={"y": 1.0})
    y = torch.zeros(6, dtype=torch.long)
    y[4] = 1
    with pytest.raises(FloatingPointError, match=r"loss is inf: not finite: log q\(y\) in row 4"):
        run((Program(), Guide()), {"x": torch.zeros(6), "y": y}, objective=objective)


def test_what_only_a_subset_shows_is_found_by_rows():
    class Two(Normal):
        def forward(self, batch):
            with pyro.plate("data", len(batch)):
                z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
                pyro.sample("x_1", dist.Normal(self.a + z, 1.0).to_event(1))
                pyro.sample("x_2", dist.Normal(self.a + z, 1.0).to_event(1))

    class Guide(nn.Module):
        def forward(self, batch):
            known = batch.present("x_1").float() if "x_1" in batch else torch.zeros(len(batch))
            with pyro.plate("data", len(batch)):
                loc = (1 / known).unsqueeze(-1)
                pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))

    data = {"x_1": torch.zeros(6, 1), "x_2": torch.zeros(6, 1)}
    objective = SubsetELBO([["x_1"], ["x_2"]])
    with pytest.raises(
        FloatingPointError, match=r"the loss is (inf|nan): .*the bound in all 6 rows"
    ):
        run((Two(), Guide()), data, objective=objective)


def test_outside_the_row_wise_bound_no_rows_are_named():
    class Program(Normal):
        def forward(self, batch):
            with pyro.plate("data", len(batch)):
                y = pyro.sample(
                    "y", dist.Categorical(torch.ones(2)), infer={"enumerate": "sequential"}
                )
                pyro.sample("x", dist.Normal(self.a * y.unsqueeze(-1), 1.0).to_event(1))

    class Guide(nn.Module):
        def forward(self, batch):
            pass

    message = r"in epoch 1, step 1: the loss is inf\. The parameters are"
    with (
        pytest.warns(UserWarning, match="falling back to Pyro's TraceEnum_ELBO"),
        pytest.raises(FloatingPointError, match=message),
    ):
        run((Program(), Guide()), with_huge(3), batch_size=60)


def test_parameters_that_nobody_would_train_are_found():
    def program(batch):
        a = pyro.param("a", torch.zeros(1))
        with pyro.plate("data", len(batch)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(a + z, 1.0).to_event(1))

    hidden = {"guide": Free()}

    def guide(batch):
        hidden["guide"](batch)

    data = {"x": torch.ones(6, 1)}
    for pair in ((program, Free()), (Normal(), guide)):
        with pytest.raises(
            ValueError, match=r"1 tensors .* shape \(1,\): they would never be trained"
        ):
            run(pair, data)
    frozen = Normal()
    frozen.a.requires_grad_(False)
    assert run((frozen, Free()), data).epoch == 2


def test_figures_of_an_epoch_are_checked():
    held_out = {"x": torch.full((4, 1), 1e30)}
    with pytest.raises(FloatingPointError, match="epoch 1: not finite: val_bound, val_x; try"):
        small(validation=held_out)


# ---- memory, interruptions -----------------------------------------------------------------------


class Failing(Normal):
    """Raises an error in the training steps of the second epoch."""

    error = None
    largest = None

    def forward(self, batch):
        super().forward(batch)
        if self.error is not None and torch.is_grad_enabled() and self.training:
            raise self.error
        if self.largest is not None and len(batch) > self.largest:
            torch.empty(2**60, dtype=torch.uint8)


def failing_later(program, error):
    def callback(result):
        program.error = error

    return callback


def allocate():
    try:
        torch.empty(2**60, dtype=torch.uint8)
    except RuntimeError as error:
        return error


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
        allocate(),
        MemoryError(),
    ],
    ids=["cuda", "cpu", "real", "python"],
)
def test_out_of_memory_names_a_smaller_batch_and_keeps_the_checkpoint(tmp_path, error):
    program = Failing()
    with pytest.raises(MemoryError) as caught:
        small(program, folder=tmp_path, callbacks=[failing_later(program, error)])
    assert str(caught.value) == (
        "out of memory in epoch 2, step 1 with batch_size=16: try batch_size=8; the checkpoint of"
        f" epoch 1 is in {tmp_path / NAME}; resume=True goes on from it"
    )
    assert out_of_memory(caught.value.__cause__)
    assert isinstance(caught.value.__cause__, type(error))
    program.error = None
    assert small(program, folder=tmp_path, resume=True).epoch == 2


def test_out_of_memory_with_one_row_and_other_errors():
    program = Failing()
    with pytest.raises(MemoryError, match="batch_size=1: the model itself is too large"):
        small(program, batch_size=1, callbacks=[failing_later(program, MemoryError())])
    program = Failing()
    error = RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        small(program, callbacks=[failing_later(program, error)])
    assert not out_of_memory(error)
    assert not out_of_memory(ValueError("out of memory"))


def test_evaluation_takes_slices_where_all_rows_are_too_many():
    program = Failing()
    program.largest = 16
    assert small(program).epoch == 2


def test_an_interruption_says_how_to_go_on(tmp_path, capsys):
    def interrupt(result):
        if result.epoch == 2:
            raise KeyboardInterrupt

    options = {"epochs": 3, "folder": tmp_path}
    objective = EnumELBO()
    weights = {"z": schedules.linear(0, 1, 2)}
    with pytest.raises(KeyboardInterrupt):
        run(callbacks=[interrupt], progress=True, objective=objective, weights=weights, **options)
    text = " ".join(capsys.readouterr().err.split())
    assert "y: summed over 3 values" in text
    assert "interrupted in epoch 2; the checkpoint of epoch 1 is in" in text
    assert "resume=True goes on from it" in text
    assert text.rindex("interrupted") > text.rindex("nats per datum")  # the bar is closed
    assert objective.weights == {}
    cut = run(resume=True, objective=objective, weights=weights, **options)
    whole = run(epochs=3, weights=weights)
    assert all(torch.equal(v, cut.parameters[k]) for k, v in whole.parameters.items())
    with pytest.raises(KeyboardInterrupt):
        run(callbacks=[interrupt], epochs=3)
    assert capsys.readouterr().err == ""


def test_the_first_lines_say_what_was_missing():
    present = torch.ones(60, WIDTH, dtype=torch.bool)
    present[:4, :2] = False
    present[7:9] = False
    result = run(data={"x": (rows(), present)}, epochs=1)
    assert result.sites == [
        "y: summed over 3 values",
        "z: proposed by the guide; KL sampled (the program's z depends on y, which is summed)",
        "x: observed; 20 of 360 entries missing in 6 of 60 rows: left out of the bound",
        "2 of 60 rows have nothing observed: they count zero",
    ]
