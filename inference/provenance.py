"""Following draws through tensors, where Pyro's marks get lost, and seeing who looks at them."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pyro.ops.provenance import detach_provenance, get_provenance, track_provenance
from torch import Tensor
from torch.overrides import TorchFunctionMode

LIBRARIES = ("torch", "pyro", "pyrozoo", "zuko")  # they may look at values, to check them


class Watch(TorchFunctionMode):
    """Follow draws where Pyro's marks do not: into tensors that are written in place, and sizes.

    Pyro makes plain tuples of sizes, which some distributions do not take.  Also note where a
    program makes a Python number, or a branch, of what it has drawn.
    """

    converters = frozenset(
        getattr(torch.Tensor, name)
        for name in ("__bool__", "__float__", "__int__", "__index__", "item", "tolist", "numpy")
    )
    makers = frozenset((torch.tensor, torch.Tensor.new_tensor))

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, str] = {}
        self._written: dict[int, tuple[Tensor, frozenset[str]]] = {}  # kept, or ids come again

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        names = get_provenance([args, kwargs])
        if names and (func in self.converters or func in self.makers):
            frame = sys._getframe(1)
            if frame.f_globals.get("__name__", "").partition(".")[0] not in LIBRARIES:
                where = f"{Path(frame.f_code.co_filename).name}, line {frame.f_lineno}"
                self.found |= dict.fromkeys(names, where)
        if self._written:
            names |= self._names([args, kwargs])
        if not names:
            return func(*args, **kwargs)
        args, kwargs = _plain(args), _plain(kwargs)
        result = func(*args, **kwargs)
        if (target := _target(func, args, kwargs)) is not None:
            self._note(target, names)
        return _marked(result, names)

    def _names(self, values: Any) -> frozenset[str]:
        """Of all tensors among the values that were written in place."""
        found = frozenset[str]()
        for value in values.values() if isinstance(values, dict) else values:
            if isinstance(value, (list, tuple, dict)):
                found |= self._names(value)
            elif isinstance(value, Tensor):
                for tensor in _with_base(value):
                    found |= self._written.get(id(tensor), (tensor, frozenset[str]()))[1]
        return found

    def _note(self, target: Tensor, names: frozenset[str]) -> None:
        for tensor in _with_base(target):
            before = self._written.get(id(tensor), (tensor, frozenset[str]()))[1]
            self._written[id(tensor)] = (tensor, before | names)


def _plain(value: Any) -> Any:
    """Without marks."""
    if isinstance(value, Tensor):
        return detach_provenance(value)
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    return [*map(_plain, value)] if type(value) is list else _in_tuple(_plain, value)


def _marked(value: Any, names: frozenset[str]) -> Any:
    if isinstance(value, Tensor):
        return track_provenance(value, names)
    mark = functools.partial(_marked, names=names)
    return [*map(mark, value)] if type(value) is list else _in_tuple(mark, value)


def _in_tuple(change: Callable[[Any], Any], value: Any) -> Any:
    """A tuple, or one of torch's with names, with its parts changed; all else as it is."""
    if not isinstance(value, tuple) or isinstance(value, torch.Size):
        return value
    parts = [*map(change, value)]
    return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)


def _target(func: Any, args: Any, kwargs: Any) -> Tensor | None:
    """The tensor that an operation writes to, if any."""
    if isinstance(out := kwargs.get("out"), Tensor):
        return out
    name = getattr(func, "__name__", "")
    writes = name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
    return args[0] if writes and args and isinstance(args[0], Tensor) else None


def _with_base(tensor: Tensor) -> list[Tensor]:
    """A tensor without marks, and what it is a view of."""
    plain = detach_provenance(tensor)
    return [plain] if plain._base is None else [plain, plain._base]
