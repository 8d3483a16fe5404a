"""Two processes on a CPU are one: the same steps, whatever their rows know; and both stop, or none."""

import contextlib
import io
import math
import multiprocessing
import os
import socket
import subprocess
import sys

import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import CASES, Empty, Mixture
from torch import nn

from pyrozoo.guides import Amortized, Classifier, Sequential
from pyrozoo.inference import EnumELBO, Result, checkpoint, fit, processes, stage
from pyrozoo.zoo import cli
from pyrozoo.zoo.clustering import VaDE
from pyrozoo.zoo.semisupervised import M2

NAME = "checkpoint.safetensors"
ALL = [
    "vade", "m2", "mvae", "factor analysis", "mixture", "globals", "hivae", "hierarchy"
]  # fmt: skip


# ---- a pair of processes, as torchrun starts them ---------------------------------------------------


def serve(rank, port, pipe):
    """Call functions of this module as the other end of the pipe says."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test",
    }  # fmt: skip
    torch.set_num_threads(1)
    for name, arguments in iter(pipe.recv, None):
        pyro.clear_param_store()
        try:
            answer = globals()[name](*arguments)
        except Exception as error:
            answer = type(error).__name__, str(error), processes.told(error)
        pipe.send(answer)


@pytest.fixture(scope="module")
def both():
    """Call a function in both processes; gives what the first and the second return."""
    context = multiprocessing.get_context("spawn")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pipes, children = [], []
    for rank in range(2):
        mine, theirs = context.Pipe()
        child = context.Process(target=serve, args=(rank, port, theirs), daemon=True)
        child.start()
        pipes.append(mine)
        children.append(child)

    def call(function, *arguments):
        for pipe in pipes:
            pipe.send((function.__name__, arguments))
        if not all(pipe.poll(200) for pipe in pipes):
            for child in children:
                child.kill()
            pytest.fail(f"{function.__name__}{arguments} hangs")
        return [pipe.recv() for pipe in pipes]

    yield call
    for child in children:
        child.kill()


def plain(result, seen=()):
    parameters = {name: value.tolist() for name, value in result.parameters.items()}
    history = [{k: v for k, v in r.items() if k != "seconds"} for r in result.history]
    return {"parameters": parameters, "history": history, "seen": list(seen)}


def watch(result, seen):
    """A callback's note of the parameters, before they are levelled."""
    seen.append({name: value.tolist() for name, value in result.parameters.items()})


def close(a, b, tolerance):
    for name, value in a.items():
        torch.testing.assert_close(
            torch.tensor(value, dtype=torch.float64), torch.tensor(b[name], dtype=torch.float64),
            rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}",
        )  # fmt: skip


# ---- the law: with the same noise, a fit by two processes is that by one ----------------------------


def trained(case, pattern):
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    try:
        program, guide = CASES[case].pair(fresh=True)
        data = next(values for name, values in CASES[case].patterns() if name == pattern)
        seen = []
        result = fit(
            program, guide, data, inputs=["noise"], epochs=3, batch_size=4, lr=1e-2, clip=5.0,
            progress=False, callbacks=[lambda r: watch(r, seen)],
        )  # fmt: skip
        return plain(result, seen)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("case", ALL)
def test_two_processes_are_one(both, case):
    pattern = "some x" if "y" not in CASES[case].widths else "some y"
    pattern = "some of all" if case in ("m2", "mvae", "globals") else pattern
    pattern = pattern if any(n == pattern for n, _ in CASES[case].patterns()) else "complete"
    first, second = both(trained, case, pattern)
    alone = trained(case, pattern)
    assert first == second  # to the last bit, also in the midst of an epoch
    close(first["parameters"], alone["parameters"], 1e-7)
    for mine, theirs in zip(first["history"], alone["history"], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-7)
    assert first["seen"][0] != first["seen"][-1]


def labels_on_one_side(repeat, batch_size):
    """Labels of three rows of thirty, so that most shares of a batch have none."""
    torch.manual_seed(0)
    program = M2(6, 3, 2, (8,))
    guide = Sequential(Classifier(program, "y", ["x"], (8,)), Amortized(program, ["x", "y"], (8,)))
    y, x = torch.arange(30) % 3, torch.rand(30, 6, generator=torch.Generator().manual_seed(0))
    objective = EnumELBO(observed_guide_weights={"y": 1.0})
    seen = []
    result = fit(
        program, guide, {"x": x, "y": (y, torch.arange(30) < 3)}, objective=objective, epochs=2,
        batch_size=batch_size, repeat={"y": repeat}, progress=False,
        callbacks=[lambda r: watch(r, seen)],
    )  # fmt: skip
    return plain(result, seen)


@pytest.mark.parametrize(("repeat", "batch_size"), [(1, 1), (2, 4), (5, 40)])
def test_labels_in_the_rows_of_one_process(both, repeat, batch_size):
    first, second = both(labels_on_one_side, repeat, batch_size)
    assert first == second
    assert all(math.isfinite(record["loss"]) for record in first["history"])


class Halting(nn.Module):
    """With a parameter that only rows with a label use, and one that nobody does."""

    def __init__(self):
        super().__init__()
        self.loc = nn.Parameter(torch.tensor([0.5, -0.5], dtype=torch.float64))
        self.extra = nn.Parameter(torch.ones((), dtype=torch.float64))
        self.never = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, batch):
        known = batch.present("y")
        with pyro.plate("data", len(batch)):
            y = pyro.sample("y", dist.Bernoulli(torch.full((), 0.3, dtype=torch.float64)))
            loc = torch.where(y > 0.5, *self.loc)
            if bool(known.any()):
                loc = loc + self.extra * known
            pyro.sample("x", dist.Normal(loc, 1.0))


def unused():
    x = torch.linspace(-1, 2, 12, dtype=torch.float64)
    known = torch.arange(12) == 5
    program = Halting()
    result = fit(
        program, Empty(), {"x": x, "y": ((x > 0).double(), known)}, epochs=3, batch_size=4,
        optimizer=lambda xs: torch.optim.SGD(xs, lr=0.1, weight_decay=0.5, momentum=0.9),
        progress=False,
    )  # fmt: skip
    return {**plain(result), "no gradient": program.never.grad is None}


def test_a_parameter_that_one_process_or_none_uses(both):
    first, second = both(unused)
    alone = unused()
    assert first == second
    assert first["no gradient"]
    assert first["parameters"]["program.never"] == 1.0  # not even decayed
    assert first["parameters"]["program.extra"] != 1.0
    close(first["parameters"], alone["parameters"], 1e-12)


class Shared(nn.Module):
    def forward(self, batch):
        theta = pyro.sample("theta", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        with pyro.plate("data", len(batch)):
            pyro.sample("x", dist.Normal(theta, 1.0).to_event(1))


X = torch.randn(40, 1, generator=torch.Generator().manual_seed(3)) + 1.5


def shared_by_all():
    torch.manual_seed(0)
    program, seen = Shared(), []
    guide = Amortized(program, ["x"])
    fit(
        program, guide, {"x": X}, epochs=60, lr=0.05, batch_size=25, progress=False,
        callbacks=[lambda r: seen.append(float(torch.rand(())))],
    )  # fmt: skip
    scale = nn.functional.softplus(guide.raw["theta_scale"])
    return guide.raw["theta_loc"].item(), scale.item(), seen[0]


def test_global_latents_are_counted_once_and_drawn_by_each(both):
    first, second = both(shared_by_all)
    assert first[:2] == second[:2]
    assert first[2] != second[2]
    assert first[0] == pytest.approx(float(X.sum() / 41), abs=0.1)
    assert first[1] == pytest.approx(41**-0.5, rel=0.3)


def staged_step():
    """The gradient of a staged step on half a batch each, averaged; and of the whole, eagerly."""
    torch.set_default_dtype(torch.float64)
    try:
        program, guide = CASES["m2"].pair(fresh=True)
        data = next(values for name, values in CASES["m2"].patterns() if name == "some y")
        objective = EnumELBO(inputs=("noise",), num_rows=9)
        p, q = objective.pair(program, guide)
        whole = p.pairing.prepare(data)
        module = objective(p, q)
        parameters = list(module.parameters())
        objective.differentiable_loss(p, q, whole).backward()
        right = [x.grad.clone() for x in parameters]
        ranks = processes.start("cpu")
        index = ranks.share(torch.arange(9))
        staged = stage(objective, p, q, whole[index], compile=False)
        with ranks.step(parameters, len(index) / 9) as mine:
            mine.loss = staged(whole[index])
        errors = [float((x.grad - g).abs().max()) for x, g in zip(parameters, right, strict=True)]
        return staged.how, max(errors), float(mine.loss)
    finally:
        torch.set_default_dtype(torch.float32)


def test_gradients_are_averaged_after_the_graph(both):
    first, second = both(staged_step)
    assert first[0] == "graph"
    assert max(first[1], second[1]) < 1e-10
    assert first[2] == second[2]


# ---- seeds, stops and errors ------------------------------------------------------------------------


def pixels(rows=60):
    generator = torch.Generator().manual_seed(0)
    centre = torch.rand(3, 6, generator=generator).round() * 0.8 + 0.1
    return centre[torch.arange(rows) % 3] + 0.1 * torch.rand(rows, 6, generator=generator)


def small(seed=0):
    torch.manual_seed(seed)
    program = VaDE(6, 3, 2, (8,))
    return program, Amortized(program, ["x"], (8,))


def clustered(options):
    # each process makes other parameters: those of the first one count
    program, guide = small(processes.rank())
    result = fit(program, guide, {"x": pixels()}, batch_size=16, progress=False, **options)
    return plain(result)


def test_the_bound_is_that_of_one_process(both):
    first, second = both(clustered, {"epochs": 10, "lr": 1e-2})
    assert first == second
    assert both(clustered, {"epochs": 10, "lr": 1e-2})[0] == first
    alone = clustered({"epochs": 10, "lr": 1e-2})
    bounds = [run["history"][-1]["bound"] for run in (first, alone)]
    assert bounds[0] == pytest.approx(bounds[1], abs=0.1)
    assert first["parameters"] != alone["parameters"]  # other noise


def test_resume(both, tmp_path):
    options = {"lr": 1e-2, "validation": 0.2}
    whole, _ = both(clustered, {**options, "epochs": 4, "folder": str(tmp_path / "whole")})
    both(clustered, {**options, "epochs": 2, "folder": str(tmp_path / "cut")})
    again = {**options, "epochs": 4, "folder": str(tmp_path / "cut"), "resume": True}
    first, second = both(clustered, again)
    assert first == second == whole
    assert {p.name for p in (tmp_path / "cut").iterdir()} == {NAME, f".{NAME}.lock"}
    program, guide = small(5)
    read = Result(program, guide, EnumELBO()).load(tmp_path / "cut" / NAME)
    last = checkpoint.load(tmp_path / "whole" / NAME)[0]
    assert all(torch.equal(value, last[name]) for name, value in read.parameters.items())
    with pytest.raises(ValueError, match="processes: 2 there, nothing here"):
        clustered({**again, "epochs": 5})
    for answer in both(clustered, {**again, "resume": False}):
        assert answer[0] == "FileExistsError"
        assert answer[2]


def stopping(decider):
    program, guide = small()
    answers = [lambda r: processes.rank() == decider and r.epoch == 2]
    result = fit(
        program, guide, {"x": pixels()}, epochs=4, batch_size=16, progress=False,
        callbacks=answers,
    )  # fmt: skip
    return result.epoch, result.stopped


def test_the_first_process_decides(both):
    assert both(stopping, 0) == [(2, "a callback")] * 2
    assert both(stopping, 1) == [(4, "")] * 2


def failing(where):
    """A row that cannot be; or a failure in one process before, within or after an epoch."""
    torch.manual_seed(0)
    program, data = Mixture(2, 3), torch.randn(30, 3, generator=torch.Generator().manual_seed(0))

    def fail(*_):
        if processes.rank() == int(where[-1]):
            raise KeyError(where)

    if where == "row":
        data[7] = 1e30
    before = {name: value.clone() for name, value in program.state_dict().items()}
    try:
        fit(
            program, Empty(), {"x": data}, epochs=2, batch_size=30, progress=False, lr=1e-2,
            start=fail if where.startswith("start") else None,
            callbacks=[fail] if where.startswith("callback") else [],
            lr_schedule=None, seed=processes.rank() if where == "seed" else 0,
        )  # fmt: skip
    except Exception as error:
        same = all(torch.equal(value, before[n]) for n, value in program.state_dict().items())
        return type(error).__name__, str(error), processes.told(error), same
    return "nothing", "", False, False


@pytest.mark.parametrize("where", ["row", "start 0", "start 1", "callback 0", "callback 1", "seed"])
def test_what_fails_in_one_process_fails_in_both(both, where):
    first, second = both(failing, where)
    assert first[2]
    assert second[2]
    kinds = {first[0], second[0]}
    if where == "row":
        assert kinds == {"FloatingPointError"}
        assert "row 7" in first[1]
        assert "row 7" in second[1]
        assert ("(in process" in first[1]) != ("(in process" in second[1])
        assert first[3]
        assert second[3]
    elif where == "seed":
        assert kinds == {"ValueError"}
        assert "seed: 0 there, 1 here" in second[1]
    else:
        assert kinds == {"KeyError", "RuntimeError"}
        assert where in first[1]
        assert where in second[1]


def one_of_two():
    if processes.rank():
        return None
    with processes.alone():
        return clustered({"epochs": 1})


def test_one_process_can_fit_alone(both):
    first, second = both(one_of_two)
    assert first == clustered({"epochs": 1})
    assert second is None


def numbered(devices):
    return processes.start("cpu", devices).size


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_a_gpu_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="torch sees no GPU here; use 'cpu' or 'auto'"):
        processes.start("cuda")


def test_how_many(both, monkeypatch):
    assert both(numbered, None) == both(numbered, "auto") == both(numbered, 2) == [2, 2]
    assert both(numbered, 1) == [1, 1]
    assert "devices=3, but 2 processes were started" in both(numbered, 3)[0][1]
    assert numbered(None) == numbered(1) == numbered("auto") == 1
    for wrong in (0, -1, True, 1.5, "two"):
        with pytest.raises(ValueError, match="devices is a number from 1, or 'auto'"):
            numbered(wrong)
    assert processes.running() is None
    monkeypatch.setenv("SLURM_NTASKS", "16")  # in a batch script, before srun
    assert processes.running() is None
    for name, value in {"STEP_NUM_TASKS": 16, "NTASKS_PER_NODE": 8, "NNODES": 2}.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    assert processes.running() == (8, 2)


# ---- the command ------------------------------------------------------------------------------------


def test_train_with_two_processes(tmp_path):
    script = tmp_path / "pyrozoo"
    script.write_text("from pyrozoo.zoo.cli import main; main()")
    options = [f"--set={x}" for x in ("hidden=[8]", "latent_dim=2", "num_clusters=3")]
    done = subprocess.run(
        [sys.executable, str(script), "train", "vade", "--data", "wine", "--device", "cpu",
         "--devices", "2", "--epochs", "2", "--out", "run", *options],
        capture_output=True, text=True, timeout=400, cwd=tmp_path, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("2 processes share every batch") == 2  # the pretraining, and the fit
    assert done.stdout.count("run folder") == 1
    names = {p.name for p in (tmp_path / "run").iterdir()}
    assert names >= {"model.safetensors", "metrics.json", "report.html", "start", NAME}
    assert len((tmp_path / "run" / "history.csv").read_text().splitlines()) == 3


def refused(*arguments):
    sys.argv = ["pyrozoo", *arguments]
    said = io.StringIO()
    with contextlib.redirect_stderr(said), pytest.raises(SystemExit):
        cli.main()
    return said.getvalue()


def test_an_error_of_the_command_is_said_once(both):
    first, second = both(refused, "train", "vade", "--data", "none.csv")
    assert "none.csv" in first
    assert second == ""
    assert all("runs in one process" in said for said in both(refused, "sweep", "vade"))
    assert "a number from 1, or 'auto'" in refused("train", "vade", "--devices", "0")
