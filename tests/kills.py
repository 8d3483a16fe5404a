"""Fits that are killed again and again; test_survival.py runs it as ``python kills.py FOLDER``.

One process imports everything, then forks a child for each attempt and kills it: soon after its
start, in the middle of writing a checkpoint, or some epochs later.  The child of the next attempt
goes on.  What was done is printed as JSON.
"""

import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import torch

from pyrozoo import zoo
from pyrozoo.guides import Amortized
from pyrozoo.inference import checkpoint, fit, schedules
from pyrozoo.zoo.clustering import VaDE

EPOCHS = 24


def rows():
    generator = torch.Generator().manual_seed(0)
    centre = torch.rand(3, 6, generator=generator).round() * 0.8 + 0.1
    noise = 0.1 * torch.rand(60, 6, generator=generator)
    return {"x": (centre[torch.arange(60) % 3] + noise).clamp(0, 1)}


def plain(folder):
    """A fit with everything that has a state."""
    torch.manual_seed(0)
    program = VaDE(6, 3, 2, (8,))
    result = fit(
        program, Amortized(program, ["x"], (8,)), rows(), epochs=EPOCHS, batch_size=16, lr=0.1,
        lr_schedule=schedules.steps(0.9, 2), weights={"z": schedules.linear(0.1, 1.0, 20)},
        validation=0.2, patience=EPOCHS, clip=1.0, folder=folder, resume=True, progress=False,
    )  # fmt: skip
    result.save(folder / "fitted.safetensors")


def pretrained(folder):
    """A method with pretraining: an autoencoder, a mixture on its codes, then the fit."""
    model = zoo.create("vade", rows(), num_clusters=3, latent_dim=2, hidden=(8,))
    result = model.fit(
        rows(), start={"epochs": 2, "num_starts": 2, "noise": 0.1}, epochs=16, batch_size=16,
        folder=folder, resume=True, progress=False,
    )  # fmt: skip
    result.save(folder / "fitted.safetensors")


class Slow:
    """A file that is written in small parts, with time between them."""

    def __init__(self, file):
        self.file = file
        self.flush, self.fileno = file.flush, file.fileno

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def write(self, piece):
        for start in range(0, len(piece), 4096):
            self.file.write(piece[start : start + 4096])
            self.file.flush()
            time.sleep(0.003)


def attempt(work, folder):
    """Start a child that goes on with the fit; gives its process id."""
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    code, usual = 1, Path.open
    Path.open = lambda path, mode="r", **options: (
        Slow(usual(path, mode)) if ".partial" in path.name else usual(path, mode, **options)
    )
    try:
        work(folder)
        code = 0
    except BaseException:
        traceback.print_exc()
    os._exit(code)


def wait_for(condition, pid):
    """Wait until a condition holds; false if the child has ended before."""
    while not condition():
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return False
        time.sleep(0.001)
    return True


def kill(pid, folder, how):
    """Kill a child: "soon", in the middle of a "write", or some epochs "later"."""

    def written():
        return {(p, p.stat().st_ino) for p in folder.rglob("checkpoint.safetensors")}

    if how == "write":
        wait_for(lambda: any(folder.rglob(f".*.{pid}.partial")), pid)
        time.sleep(random.uniform(0, 0.01))
    elif how == "later":
        for _ in range(random.randint(1, 2)):
            before = written()
            wait_for(lambda before=before: written() != before, pid)
        time.sleep(random.uniform(0, 0.03))
    else:
        time.sleep(random.uniform(0, 0.15))
    os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def files(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def run(work, folder, kills):
    """Kill so often, then let it end."""
    seen = []
    for i in range(kills):
        pid = attempt(work, folder)
        code = kill(pid, folder, ["write", "later", "soon", "later"][i % 4])
        for path in folder.rglob("checkpoint.safetensors"):
            checkpoint.load(path)
        seen.append({"code": code, "files": files(folder)})
    code = os.waitstatus_to_exitcode(os.waitpid(attempt(work, folder), 0)[1])
    seen.append({"code": code, "files": files(folder)})
    return seen


if __name__ == "__main__":
    torch.set_num_threads(1)
    random.seed(0)
    home = Path(sys.argv[1])
    report = {}
    for work, kills in ((plain, 12), (pretrained, 8)):
        work(home / work.__name__ / "warm")  # what a process does once, the children then need not
        for name, count in (("whole", 0), ("cut", kills)):
            (home / work.__name__ / name).mkdir(parents=True)
            report[f"{work.__name__} {name}"] = run(work, home / work.__name__ / name, count)
    print(json.dumps(report))
