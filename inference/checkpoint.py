"""Checkpoints: one safetensors file, with everything that is not a tensor as JSON in its header.

A file is written beside its final name and moved there in one step, so that a reader sees the old
checkpoint or the new one.  Nothing is pickled, and nothing is executed on loading.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

FORMAT = 1


def save(path: str | Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Write tensors and JSON-serialisable facts to one file, atomically."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    plain = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    header = {"pyrozoo": json.dumps({"format": FORMAT, **meta}, allow_nan=True)}
    try:
        save_file(plain, partial, metadata=header)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            partial.unlink()


def load(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what :func:`save` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, is no checkpoint of this library, or of a later version.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        meta = json.loads(header["pyrozoo"])
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is damaged, or no checkpoint of pyrozoo: {error}") from error
    if meta.get("format") != FORMAT:
        raise ValueError(f"{path} has format {meta.get('format')}; this version reads {FORMAT}")
    return tensors, meta


def pack_modules(**modules: Any) -> dict[str, Tensor]:
    """Parameters and buffers of several modules, under ``<name>.<parameter>``."""
    return {
        f"{name}.{key}": value
        for name, module in modules.items()
        if isinstance(module, nn.Module)
        for key, value in module.state_dict().items()
    }


def unpack_modules(tensors: Mapping[str, Tensor], where: str, **modules: Any) -> None:
    """Load what :func:`pack_modules` made into modules of the same structure.

    Raises:
        ValueError: names or shapes differ; nothing has been changed then.
    """
    states = {}
    for name, module in modules.items():
        if not isinstance(module, nn.Module):
            continue
        state = {
            k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")
        }
        mine = module.state_dict()
        missing, extra = sorted(mine.keys() - state.keys()), sorted(state.keys() - mine.keys())
        other = [k for k in mine.keys() & state.keys() if mine[k].shape != state[k].shape]
        if missing or extra or other:
            found = [f"missing {missing[:3]}"] * bool(missing) + [f"unknown {extra[:3]}"] * bool(
                extra
            )
            found += [f"{k}: {tuple(state[k].shape)} for {tuple(mine[k].shape)}" for k in other[:3]]
            raise ValueError(f"{where} belongs to another {name}: {'; '.join(found)}")
        states[name] = state
    for name, state in states.items():
        modules[name].load_state_dict(state)


def pack_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state of an optimiser, as tensors and JSON."""
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {}
    for index, slots in state["state"].items():
        for key, value in slots.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{key}"] = value
            else:
                plain[f"{index}.{key}"] = value
    groups = [
        {
            k: v
            for k, v in g.items()
            if isinstance(v, bool | int | float | str | list | tuple | None)
        }
        for g in state["param_groups"]
    ]
    return tensors, {"groups": groups, "plain": plain}


def unpack_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]
) -> None:
    """Restore the state of an optimiser over the same parameters."""
    state: dict[int, dict[str, Any]] = {}
    for name, value in [*tensors.items(), *meta["plain"].items()]:
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = value
    groups = optimizer.state_dict()["param_groups"]
    merged = [{**mine, **saved} for mine, saved in zip(groups, meta["groups"], strict=True)]
    for group in merged:
        for key, value in group.items():
            if isinstance(value, list) and key != "params":
                group[key] = tuple(value)  # JSON has no tuples
    optimizer.load_state_dict({"state": state, "param_groups": merged})
