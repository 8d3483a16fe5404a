"""Checkpoints: one safetensors file, with everything that is not a tensor as JSON in its header.

A file is written beside its final name and moved there in one step, so that a reader sees the old
checkpoint or the new one.  A digest of the whole file is part of the header: whatever changed since
it was written is found on loading.  Nothing is pickled, and nothing is executed on loading.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from pyrozoo.inference.graph import modules_of

FORMAT = 2
BLANK = b"0" * 64  # in place of the digest while it is computed


def save(path: str | Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Write tensors and JSON-serialisable facts to one file, atomically.

    Raises:
        OSError: the file cannot be written, named; what it held before is still there.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    plain = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    facts = json.dumps({"format": FORMAT, **meta}, allow_nan=True)
    raw = safetensors.torch.save(plain, {"pyrozoo": facts, "digest": BLANK.decode()})
    at = raw.index(b':"' + BLANK + b'"') + 2
    digest = hashlib.blake2b(raw, digest_size=32).hexdigest().encode()
    view = memoryview(raw)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            for piece in (view[:at], digest, view[at + len(BLANK) :]):
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        what = error.strerror or str(error)
        raise OSError(error.errno, f"{path} cannot be written: {what}") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def load(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what :func:`save` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated or changed, is no checkpoint of this library, or one of
            another version.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path}")
    if path.is_dir():
        raise ValueError(f"{path} is a folder, not a checkpoint")
    raw = path.read_bytes()
    try:
        size = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + size])["__metadata__"]
        meta = json.loads(header["pyrozoo"])
        version = meta.get("format")
        if version == FORMAT or "digest" in header:
            _verify(raw, size, header["digest"])
        tensors = safetensors.torch.load(raw)
    except (SafetensorError, KeyError, TypeError, AttributeError, ValueError, RuntimeError) as e:
        raise ValueError(f"{path} is damaged, or no checkpoint of pyrozoo: {e!r}") from e
    if version != FORMAT:
        raise ValueError(f"{path} has format {version}; this version of pyrozoo reads {FORMAT}")
    return tensors, meta


def _verify(raw: bytes, size: int, digest: str) -> None:
    at = raw.index(f':"{digest}"'.encode(), 0, 8 + size) + 2
    view, end = memoryview(raw), at + len(BLANK)
    found = hashlib.blake2b(digest_size=32)
    for piece in (view[:at], BLANK, view[end:]):
        found.update(piece)
    if found.hexdigest() != digest:
        raise ValueError("its content is not what was written")


@functools.cache
def versions() -> dict[str, str]:
    """Versions of what wrote a checkpoint."""
    found = {"torch": str(torch.__version__)}
    for name in ("pyrozoo", "pyro-ppl"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def name_of(net: Any) -> str:
    """What a program or guide is called in a checkpoint: its class, or the name of a function."""
    return str(getattr(net, "__qualname__", type(net).__qualname__))


def _inner(modules: Mapping[str, Any]) -> dict[str, nn.Module]:
    """The modules by name; of a function, those that it holds."""
    found: dict[str, nn.Module] = {}
    for name, net in modules.items():
        if isinstance(net, nn.Module):
            found[name] = net
        else:
            found |= {f"{name}.{i}": module for i, module in enumerate(modules_of(net))}
    return found


def pack_modules(**modules: Any) -> dict[str, Tensor]:
    """Parameters and buffers of several modules, under ``<name>.<parameter>``."""
    return {
        f"{name}.{key}": value
        for name, module in _inner(modules).items()
        for key, value in module.state_dict().items()
    }


def check_modules(
    tensors: Mapping[str, Tensor], where: str, meta: Mapping[str, Any] | None = None, **modules: Any
) -> dict[str, dict[str, Tensor]]:
    """The state of each module among the tensors.

    Raises:
        ValueError: names, shapes or types differ; the message says which, and what ``meta`` says of
            the writer.
    """
    states = {}
    for name, module in _inner(modules).items():
        state = {
            k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")
        }
        mine = module.state_dict()
        missing, extra = sorted(mine.keys() - state.keys()), sorted(state.keys() - mine.keys())
        found = [f"missing {missing[:3]}"] * bool(missing)
        found += [f"unknown {extra[:3]}"] * bool(extra)
        for key in sorted(mine.keys() & state.keys()):
            for what in ("shape", "dtype"):
                theirs, ours = getattr(state[key], what), getattr(mine[key], what)
                if theirs != ours:
                    theirs, ours = (tuple(s) if what == "shape" else s for s in (theirs, ours))
                    found.append(f"{key}: {theirs} for {ours}")
        if found:
            wrote = (meta or {}).get(name)
            by = f" ({wrote}, here {name_of(module)})" if isinstance(wrote, str) else ""
            raise ValueError(f"{where} belongs to another {name}{by}: {'; '.join(found[:4])}")
        states[name] = state
    return states


def unpack_modules(
    tensors: Mapping[str, Tensor], where: str, meta: Mapping[str, Any] | None = None, **modules: Any
) -> None:
    """Load what :func:`pack_modules` made into modules of the same structure.

    Raises:
        ValueError: as :func:`check_modules`; nothing has been changed then.
    """
    states = check_modules(tensors, where, meta, **modules)
    for name, module in _inner(modules).items():
        module.load_state_dict(states[name])


def pack_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state of an optimiser, as tensors and JSON.

    Raises:
        TypeError: its state holds something else.
    """
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {}
    for index, slots in state["state"].items():
        for key, value in slots.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{key}"] = value
            elif isinstance(value, bool | int | float | str | None):
                plain[f"{index}.{key}"] = value
            else:
                found = f"{key!r} is of type {type(value).__name__}"
                raise TypeError(f"the optimiser cannot be saved: {found}")
    groups = [
        {
            k: v.tolist() if isinstance(v, Tensor) else v
            for k, v in g.items()
            if isinstance(v, bool | int | float | str | list | tuple | Tensor | None)
        }
        for g in state["param_groups"]
    ]
    return tensors, {"groups": groups, "plain": plain}


def unpack_optimizer(
    optimizer: torch.optim.Optimizer,
    tensors: Mapping[str, Tensor],
    meta: Mapping[str, Any],
    where: str,
) -> None:
    """Restore the state of an optimiser over the same parameters.

    Raises:
        ValueError: it is the state of another optimiser; nothing has been changed then.
    """
    groups, saved = optimizer.state_dict()["param_groups"], meta["groups"]
    sizes = [[len(g.get("params", ())) for g in some] for some in (saved, groups)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"{where}: its optimiser has groups of {sizes[0]} parameters, not {sizes[1]}"
        )
    state: dict[int, dict[str, Any]] = {}
    for name, value in [*tensors.items(), *meta["plain"].items()]:
        index, _, key = name.partition(".")
        if not index.isdecimal() or int(index) >= sum(sizes[1]) or not key:
            raise ValueError(f"{where}: its optimiser has a slot {name!r}")
        state.setdefault(int(index), {})[key] = value
    merged = []
    for mine, theirs in zip(groups, saved, strict=True):
        group = dict(mine)
        for key, value in theirs.items():
            if key not in mine or not _alike(mine[key], value):
                raise ValueError(f"{where}: its optimiser has {key}={value!r}")
            if isinstance(mine[key], Tensor):
                value = torch.as_tensor(value).to(mine[key])
            group[key] = tuple(value) if isinstance(mine[key], tuple) else value
        merged.append(group)
    optimizer.load_state_dict({"state": state, "param_groups": merged})


def _alike(mine: Any, saved: Any) -> bool:
    """Whether a value from JSON can stand for an option of an optimiser."""
    if isinstance(mine, list | tuple):
        return (
            isinstance(saved, list)
            and len(mine) == len(saved)
            and all(_alike(a, b) for a, b in zip(mine, saved, strict=True))
        )
    if isinstance(mine, bool | str | None) or isinstance(saved, bool | str | list | None):
        return type(mine) is type(saved)
    return isinstance(saved, int | float)
