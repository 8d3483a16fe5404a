"""Contexts that put something back as it was: evaluation mode, the random state."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


@contextlib.contextmanager
def evaluating(*nets: Any) -> Iterator[None]:
    """Put the modules among ``nets`` into evaluation mode; afterwards each is as it was."""
    modules = [m for net in nets if isinstance(net, nn.Module) for m in net.modules()]
    training = [m for m in modules if m.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw from this seed inside; afterwards the caller's random state is as it was."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
