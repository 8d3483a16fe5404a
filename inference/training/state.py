"""Where a fit stands, its folder and the lock on it: what a fit needs to go on bit for bit."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor

from pyrozoo.inference.training import checkpoint
from pyrozoo.inference.training.facts import check_facts, check_same
from pyrozoo.inference.training.result import Result
from pyrozoo.inference.training.schedules import Schedule

NAME = "checkpoint.safetensors"


@contextlib.contextmanager
def claim(folder: str | Path | None, resume: bool) -> Iterator[Path | None]:
    """Hold the lock of a run folder; gives the path of its checkpoint (None without a folder).

    What a process that was killed left half-written is removed; its lock is gone with it.

    Raises:
        FileExistsError: there is a checkpoint, and ``resume`` is false.
        OSError: the folder cannot be written.
        RuntimeError: another fit is at work in the folder.
    """
    if folder is None:
        yield None
        return
    folder = Path(folder)
    path, lock_path = folder / NAME, folder / f".{NAME}.lock"
    lock = FileLock(lock_path, timeout=0)
    with _written(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    try:
        if path.exists() and not resume:
            raise FileExistsError(
                f"{path} is there already: go on with it by resume=True, or choose another folder"
            )
        if type(lock) is FileLock:  # else the file says it by itself
            with contextlib.suppress(OSError):
                lock_path.write_text(str(os.getpid()))
        with _written(folder):
            (folder / f".{NAME}.test.partial").touch()
            for partial in folder.glob(f".{NAME}.*.partial"):
                partial.unlink(missing_ok=True)
        yield path
    finally:
        lock.release()


@contextlib.contextmanager
def _written(folder: Path) -> Iterator[None]:
    """Errors of the system, and a lock that is held, with the folder that they are about."""
    try:
        yield
    except Timeout as error:
        holder = _holder(Path(error.lock_file))
        raise RuntimeError(f"{folder} is in use by another fit{holder}") from None
    except OSError as error:
        what = error.strerror or str(error)
        raise OSError(error.errno, f"{folder} cannot be written: {what}") from error


def _holder(lock_path: Path) -> str:
    try:
        pid = lock_path.read_text().split()[0]
    except (OSError, ValueError, IndexError):
        return ""
    return f" (process {pid})" if pid.isdigit() else ""


@dataclass
class State:
    """What a resumed fit needs beyond the parameters, and how it is saved."""

    path: Path | None
    result: Result
    engine: Any
    settings: dict[str, Any]
    parameters: list[str]  # names, in the order of the optimiser
    schedules: Mapping[str, Schedule]
    generator: torch.Generator  # of the permutations
    probe: Callable[[], float]  # a figure of some rows, to see that a restored model is the same
    best_score: float = -math.inf
    best: dict[str, Tensor] = field(default_factory=dict)
    saved: int | None = None  # epoch
    writes: bool = True  # of several processes one does

    @property
    def nets(self) -> dict[str, Any]:
        """Program and guide by the names that a checkpoint has for them."""
        return {"program": self.result.program, "guide": self.result.guide}

    def keep_best(self) -> None:
        """Remember the parameters as the best so far."""
        self.best = {k: v.detach().clone() for k, v in self.result.parameters.items()}

    def describe(self) -> str:
        """Where the last checkpoint is, in words."""
        if self.path is None:
            return "there is no checkpoint, since no folder= was given"
        return (
            f"the checkpoint of epoch {self.saved} is in {self.path}; resume=True goes on from it"
        )

    def save(self) -> None:
        """Write the checkpoint, if there is a folder."""
        if self.path is None:
            return
        if not self.writes:
            self.saved = self.result.epoch
            return
        tensors, slots = checkpoint.pack_optimizer(self.engine)
        random = {"torch": torch.get_rng_state(), "order": self.generator.get_state()}
        if torch.cuda.is_available():
            random["cuda"] = torch.cuda.get_rng_state()
        everything = {
            **self.result.parameters,
            **{f"optimizer.{k}": v for k, v in tensors.items()},
            **{f"random.{k}": v for k, v in random.items()},
            **{f"best.{k}": v for k, v in self.best.items()},
        }
        facts = {
            "kind": "training",
            "history": self.result.history,
            "sites": self.result.sites,
            "best_score": self.best_score,
            "best_epoch": self.result.best_epoch,
            "stopped": self.result.stopped,
            "num_rows": self.result.objective.num_rows,
            "optimizer": slots,
            "parameters": self.parameters,
            "settings": self.settings,
            "schedules": self._rates(self.result.epoch),
            "probe": self.probe(),
            **{name: checkpoint.name_of(net) for name, net in self.nets.items()},
            "versions": checkpoint.versions(),
        }
        checkpoint.save(self.path, everything, facts)
        self.saved = self.result.epoch

    def load(self, epochs: int) -> None:
        """Go on from the checkpoint; whatever is wrong with it, nothing has been changed then."""
        assert self.path is not None
        path, where = self.path, str(self.path)
        tensors, meta = checkpoint.load(path)
        if meta.get("kind") != "training":
            raise ValueError(f"{path} has parameters, but not the state of a fit to go on from")
        check_facts(
            meta, path, "history", "sites", "best_score", "best_epoch", "stopped", "optimizer",
            "parameters", "settings", "schedules", "probe", "versions",
        )  # fmt: skip
        checkpoint.check_modules(tensors, where, meta, **self.nets)
        check_same(meta["settings"], self.settings, path, "settings")
        done = len(meta["history"])
        if done > epochs:
            raise ValueError(f"{path} has {done} epochs done, more than epochs={epochs}")
        check_same(meta["schedules"], self._rates(done), path, "schedules")
        if meta["parameters"] != self.parameters:
            raise ValueError(f"{path} has the parameters in another order: {meta['parameters']}")
        best, random = _part(tensors, "best"), _part(tensors, "random")
        if best:
            checkpoint.check_modules(best, f"the best state in {path}", meta, **self.nets)
        _check_random(random, where)
        checkpoint.unpack_optimizer(
            self.engine, _part(tensors, "optimizer"), meta["optimizer"], where
        )
        before = {k: v.clone() for k, v in self.result.parameters.items()}
        checkpoint.unpack_modules(tensors, where, meta, **self.nets)
        probe, same = self.probe(), meta["versions"].get("torch") == str(torch.__version__)
        if same and not np.allclose(probe, meta["probe"], 1e-4, 1e-4, equal_nan=True):
            checkpoint.unpack_modules(before, "the state before", **self.nets)
            raise ValueError(
                f"{path} is of another program or guide: with its parameters the bound of the first"
                f" rows was {meta['probe']:g}, here it is {probe:g}"
            )
        torch.set_rng_state(random["torch"])
        self.generator.set_state(random["order"])
        if "cuda" in random and torch.cuda.is_available():
            torch.cuda.set_rng_state(random["cuda"])
        self.best, self.best_score, self.saved = best, meta["best_score"], done
        self.result.history, self.result.best_epoch = meta["history"], meta["best_epoch"]
        self.result.stopped = meta["stopped"]

    def _rates(self, epochs: int) -> dict[str, float]:
        """What the schedules said at the start of each epoch that is done."""
        return {
            f"{name} in epoch {epoch + 1}": float(schedule(float(epoch)))
            for name, schedule in self.schedules.items()
            for epoch in range(epochs)
        }


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    start = f"{prefix}."
    return {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}


def _check_random(random: Mapping[str, Tensor], where: str) -> None:
    for name in ("torch", "order"):
        try:
            torch.Generator().set_state(random[name])
        except (KeyError, RuntimeError, TypeError) as error:
            raise ValueError(f"{where} has no random state {name!r}: {error}") from error
