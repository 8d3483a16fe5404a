"""Files that somebody else may have written: paths that stay inside, and JSON of known types."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def _texts(x: Any) -> bool:
    return isinstance(x, list) and all(isinstance(v, str) for v in x)


def _shapes(x: Any, rank: int | None = None) -> bool:
    return isinstance(x, dict) and all(
        isinstance(v, list) and all(type(n) is int and n > 0 for n in v) and rank in (None, len(v))
        for v in x.values()
    )


def _is_spec(x: Any) -> bool:
    if not isinstance(x, dict) or not isinstance(x.get("method"), str):
        return False
    file = x.get("data", {}).get("file", "") if isinstance(x.get("data"), dict) else None
    return isinstance(file, str) and isinstance(x.get("options", {}), dict)


#: what run.json holds: key -> what it is, in words, and a test of it
FACTS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "spec": ("a specification with a method, data and options", _is_spec),
    "seed": ("a whole number from 0", lambda x: type(x) is int and 0 <= x < 2**63),
    "command": ("text", lambda x: isinstance(x, str)),
    "versions": ("an object of texts", lambda x: isinstance(x, dict) and _texts([*x.values()])),
    "sites": ("a list of texts", _texts),
    "shapes": ("an object of shapes", _shapes),
    "images": ("an object of channels, heights and widths", lambda x: _shapes(x, 3)),
    "label_names": ("a list of texts", _texts),
    "schema": ("text, or null", lambda x: x is None or isinstance(x, str)),
}


def inside(folder: Path, name: str) -> Path:
    """The path of a file in a folder.

    Raises:
        ValueError: it is a link that leads out of the folder, or no plain file.
    """
    path = folder / name
    real = Path(os.path.realpath(path))
    if not real.is_relative_to(os.path.realpath(folder)):
        raise ValueError(f"{path} is a link that leads out of the folder, to {real}")
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is no plain file")
    return path


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write JSON beside its final name, then move it there."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=2, default=str) + "\n", "utf-8")
    partial.replace(path)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ValueError: the file is damaged, named.
    """
    try:
        value = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} is damaged: expected an object, got {type(value).__name__}")
    return value


def read_figures(path: Path) -> dict[str, Any]:
    """Figures by name, and those of the rivals by their names."""
    figures = read_json(path)
    for key, value in figures.items():
        row = value if isinstance(value, dict) else {key: value}
        if any(isinstance(v, bool) or not isinstance(v, int | float) for v in row.values()):
            raise ValueError(f"{path} is damaged: {key} is no figure, but {value!r}")
    return figures


def read_facts(folder: Path) -> dict[str, Any]:
    """The facts in ``run.json`` of a run folder.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or a fact is of another type, named.
    """
    path = inside(folder, "run.json")
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is no run folder: it has no run.json")
    facts = read_json(path)
    if missing := [k for k in FACTS if k not in facts]:
        raise ValueError(f"{path} is damaged, or of another version: {missing} is missing")
    for key, (words, fits) in FACTS.items():
        if not fits(facts[key]):
            raise ValueError(f"{path} is damaged: {key} is {words}, got {str(facts[key])[:80]}")
    return facts
