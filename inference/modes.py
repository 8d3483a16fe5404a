"""Evaluation mode as a context that restores every flag."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

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
