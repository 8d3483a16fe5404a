"""Several processes, one on each device, that fit together through Lightning Fabric.

Every process draws the same permutation of the rows and takes its part of each batch.  After the
backward pass, or a staged step, losses and gradients are averaged with the parts' shares of the
rows, all parameters in one reduction ::

    L = sum_r (n_r / n) L_r,        L_r = mean of the rows of process r + shared_r / N

so that a step is that of one process on the whole batch.  Rows that differ in what they know make
no difference, and a process may have none.  Noise is drawn by each process for itself, also that of
global latents: ``shared_r``, and the rows given its draw, have the same expectation everywhere and
the shares add up to one, so that the mean is unbiased, with as many draws as processes.

Parameters, and buffers such as the statistics of BatchNorm, are those of the first process at the
start and after each epoch; in between every process normalises by its own rows.  The first process
alone evaluates, shows progress and writes.  What fails in one process is raised in all.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
import torch.distributed as c10d
from lightning_fabric import Fabric
from lightning_fabric.strategies.ddp import DDPStrategy
from lightning_fabric.utilities.exceptions import MisconfigurationException

from pyrozoo.inference.training.sharing import Processes, told

__all__ = ["Processes", "alone", "rank", "running", "start", "told"]

_ALONE = ContextVar("_ALONE", default=False)
_CLI = ("LT_CLI_USED", "LT_DEVICES", "LT_NUM_NODES", "LT_STRATEGY")  # of `fabric run`


def rank() -> int:
    """The number of this process among those that fit together, from 0, once they have begun to."""
    return c10d.get_rank() if _initialized() else 0


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Fits inside run in this process only; for what just one of several processes does."""
    token = _ALONE.set(True)
    try:
        yield
    finally:
        _ALONE.reset(token)


def start(device: str = "auto", devices: int | str | None = None) -> Processes:
    """The processes of a fit.

    Args:
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        devices: how many processes, or ``"auto"``, one on each GPU.  Default: those that torchrun,
            SLURM, ``fabric run`` or an earlier call have started; else one.  Where none runs yet,
            Fabric runs the present command again, once for each further process.

    Raises:
        ValueError: it is no number of processes, another one than was started, or more than there
            are GPUs; or this is a notebook.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is 'cuda', but torch sees no GPU here; use 'cpu' or 'auto'")
    if devices is not None and devices != "auto" and (type(devices) is not int or devices < 1):
        raise ValueError(f"devices is a number from 1, or 'auto', got {devices!r}")
    there = None if _ALONE.get() else running()
    if there is not None and devices != 1:
        here, nodes = there
        if devices not in (None, "auto", here):
            raise ValueError(f"devices={devices}, but {here} processes were started on this node")
        return Processes(_launched(device, here, nodes))
    with _hidden(_CLI if running() is not None else ()):
        single = Fabric(accelerator=device, devices=1)
    if devices == "auto":
        devices = int(single.accelerator.auto_device_count())
    if devices in (None, 1) or _ALONE.get():
        return Processes(single)
    assert isinstance(devices, int)
    return Processes(_launched(device, devices, 1))


class _Processes(DDPStrategy):
    """Fabric's processes and collectives, with the modules left as they are."""

    def setup_module(self, module: Any) -> Any:
        return module


def _launched(device: str, devices: int, nodes: int) -> Fabric:
    """Fabric with all processes at work."""
    if hasattr(sys, "ps1"):
        raise ValueError("several processes run a script, or a command, and no notebook")
    log = logging.getLogger("lightning_fabric")
    level = log.level
    log.setLevel(logging.WARNING)
    try:
        fabric = Fabric(accelerator=device, devices=devices, num_nodes=nodes, strategy=_Processes())
        if "LT_CLI_USED" not in os.environ:  # else `fabric run` has launched them
            fabric.launch()
    except MisconfigurationException as error:
        raise ValueError(f"devices={devices}: {error}") from error
    finally:
        log.setLevel(level)
    return fabric


def running() -> tuple[int, int] | None:
    """Processes on this node, and nodes, where several run already; else None."""
    found = os.environ
    if c10d.is_available() and c10d.is_torchelastic_launched():
        size = int(found["WORLD_SIZE"])
        here = int(found.get("LOCAL_WORLD_SIZE", size))
    elif int(found.get("SLURM_STEP_NUM_TASKS", 1)) > 1:  # under srun, not in the batch script
        size = int(found["SLURM_STEP_NUM_TASKS"])
        here = int(found.get("SLURM_NTASKS_PER_NODE", size // int(found.get("SLURM_NNODES", 1))))
    elif _initialized():
        here = size = c10d.get_world_size()
        if "LOCAL_RANK" not in found:
            raise ValueError("the processes were started without torchrun, SLURM or fabric run")
    else:
        return None
    return (here, size // here) if size > 1 else None


def _initialized() -> bool:
    return c10d.is_available() and c10d.is_initialized()


@contextlib.contextmanager
def _hidden(names: Iterable[str]) -> Iterator[None]:
    """Without these variables of the environment."""
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(before)
