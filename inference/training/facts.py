"""What a checkpoint says beside its tensors: facts of known types, and the settings of the run.

A fit that goes on from a checkpoint is the uninterrupted run only if everything that decides its
course is the same.  :func:`settings_of` collects that, :func:`check_same` compares.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from pyrozoo.inference.batch import Batch
from pyrozoo.inference.bounds.elbo import EnumELBO
from pyrozoo.inference.training.checkpoint import name_of

ENTRIES = 2**24  # of a site, at most, that go into the fingerprint of the data
PIECE = 2**20  # of them at a time


def _number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool)


def _whole(x: Any) -> bool:
    return _number(x) and isinstance(x, int) and x > 0


def _list(x: Any, test: Callable[[Any], bool]) -> bool:
    return isinstance(x, list) and all(test(entry) for entry in x)


def _string(x: Any) -> bool:
    return isinstance(x, str)


def _history(x: Any) -> bool:
    return _list(x, lambda r: isinstance(r, dict) and all(map(_number, r.values()))) and all(
        record.get("epoch") == i + 1 for i, record in enumerate(x)
    )


def _optimizer(x: Any) -> bool:
    plain = x.get("plain") if isinstance(x, dict) else None
    return isinstance(plain, dict) and _list(x.get("groups"), lambda g: isinstance(g, dict))


_FACTS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "kind": ("a string", _string),
    "history": ("a list with a record of numbers for each epoch", _history),
    "sites": ("a list of strings", lambda x: _list(x, _string)),
    "best_epoch": ("an epoch, or null", lambda x: x is None or _whole(x)),
    "num_rows": ("a number of rows, or null", lambda x: x is None or _whole(x)),
    "stopped": ("a string", _string),
    "best_score": ("a number", _number),
    "probe": ("a number", _number),
    "settings": ("a dictionary", lambda x: isinstance(x, dict)),
    "versions": ("a dictionary", lambda x: isinstance(x, dict)),
    "schedules": ("numbers", lambda x: isinstance(x, dict) and all(map(_number, x.values()))),
    "parameters": ("a list of names", lambda x: _list(x, _string)),
    "optimizer": ("a dictionary with groups and slots", _optimizer),
}  # fmt: skip


def check_facts(meta: Mapping[str, Any], where: str | Path, *names: str) -> None:
    """Check that facts of a checkpoint are there and of their types.

    Raises:
        ValueError: naming the file, the fact, what was expected and what came.
    """
    for name in names:
        expected, test = _FACTS[name]
        if name not in meta:
            raise ValueError(f"{where} does not say {name!r} (it says: {', '.join(meta)})")
        if not test(meta[name]):
            raise ValueError(f"{where}: {name!r} is not {expected}, but {str(meta[name])[:80]}")


def settings_of(
    program: Any,
    guide: Any,
    objective: EnumELBO,
    train: Batch,
    held_out: Batch | None,
    optimizer: torch.optim.Optimizer,
    others: Mapping[str, Any],
    **options: Any,
) -> dict[str, Any]:
    """What decides the course of a fit, as JSON: names, data, objective, optimiser and others."""
    settings: dict[str, Any] = {
        "program": name_of(program),
        "guide": name_of(guide),
        "rows": len(train),
        "data": fingerprint(train),
        "held-out rows": None if held_out is None else len(held_out),
        "held-out data": None if held_out is None else fingerprint(held_out),
        "objective": type(objective).__qualname__,
        **{f"objective.{k}": v for k, v in vars(objective).items() if not k.startswith("_")},
        "optimizer": type(optimizer).__qualname__,
    }
    groups = optimizer.state_dict()["param_groups"]
    for i, group in enumerate(groups):
        of = f" of group {i}" if len(groups) > 1 else ""
        settings |= {f"{name}{of}": v for name, v in group.items() if name != "params"}
    return _plain({**others, **settings, **options})


def _plain(value: Any) -> Any:
    """As it comes back from JSON; of what is no number, string or collection only the type."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    if isinstance(value, bool | int | float | str | None):
        return json.loads(json.dumps(value))
    return type(value).__qualname__


def fingerprint(batch: Batch) -> str:
    """A short digest of names, types, shapes and values; of very large data, of some rows."""
    digest = hashlib.blake2b(digest_size=8)
    for name in batch.names:
        alone = batch.drop(*(other for other in batch.names if other != name))
        none = alone[:0]
        parts = [(none.stored(name), Batch.stored)]
        parts += [(none.present(name), Batch.present)]
        for like, get in parts:
            shape = (len(batch), *like.shape[1:])
            digest.update(f"{name} {like.dtype} {shape}".encode())
            step = -(-math.prod(shape) // ENTRIES) or 1
            size = max(1, PIECE // max(1, math.prod(shape[1:])))
            for first in range(0, len(batch), step * size):
                piece = alone[first : first + step * size : step]
                some = get(piece, name).detach().cpu().contiguous()
                digest.update(some.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_same(
    then: Mapping[str, Any], now: Mapping[str, Any], where: str | Path, what: str
) -> None:
    """Refuse to go on with other settings.

    Raises:
        ValueError: naming the file and all that differs, with both values.
    """
    names = [n for n in {**then, **now} if n not in then or n not in now or then[n] != now[n]]
    if names:
        found = [f"{n}: {_shown(then, n)} there, {_shown(now, n)} here" for n in names[:4]]
        more = f"; and {len(names) - 4} more" if len(names) > 4 else ""
        raise ValueError(f"{where} is of a run with other {what}: {'; '.join(found)}{more}")


def _shown(values: Mapping[str, Any], name: str) -> str:
    return repr(values[name]) if name in values else "nothing"
