"""Schemas as JSON text, and back; reading trusts nothing."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from pyrozoo.zoo.tables.cells import repeated, some
from pyrozoo.zoo.tables.schema import Field, Label, Schema, Site

FORMAT = 1
TYPES = ("int64", "float32", "uint8")  # of values


def to_json(schema: Schema) -> str:
    """A schema as JSON text."""
    return json.dumps({"format": FORMAT, **asdict(schema)}, allow_nan=False)


def from_json(text: str) -> Schema:
    """Read what :func:`to_json` wrote.

    Raises:
        ValueError: the text is no JSON or no schema; the message says what is wrong with it.
    """
    try:
        data = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse)
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"the schema is no valid JSON: {error}") from error
    if isinstance(data, dict):
        data = {"values": {}, **data}  # older ones have none
    kinds: dict[str, Any] = {"format": int, "sites": list, "label": (dict, None), "dropped": list}
    top = _take(data, "the schema", **kinds, values=dict)
    if top["format"] != FORMAT:
        raise ValueError(f"the schema has format {top['format']}; this version reads {FORMAT}")
    label = None
    if top["label"] is not None:
        found = _take(top["label"], "the label", name=str, levels=list)
        label = Label(found["name"], tuple(found["levels"]))
    if not all(isinstance(name, str) for name in top["dropped"]):
        raise ValueError("the schema: 'dropped' is a list of names")
    if not all(kind in TYPES for kind in top["values"].values()):
        raise ValueError(f"the schema: 'values' are of type {some(TYPES)}")
    return Schema(tuple(map(_site, top["sites"])), label, tuple(top["dropped"]), top["values"])


def _site(data: Any) -> Site:
    site = _take(data, "a site", name=str, columns=list, image_shape=(list, None))
    shape = site["image_shape"]
    if shape is not None and not all(type(size) is int for size in shape):
        raise ValueError(f"site {site['name']!r}: the image shape is a list of whole numbers")
    return Site(
        site["name"],
        tuple(map(_field, site["columns"])),
        None if shape is None else tuple(shape),
    )


def _field(data: Any) -> Field:
    texts = dict.fromkeys(("name", "kind", "likelihood"), str)
    found = _take(data, "a column", **texts, levels=list, center=(int, float), spread=(int, float))
    try:
        center, spread = float(found["center"]), float(found["spread"])
    except OverflowError as error:
        raise ValueError(f"column {found['name']!r}: center or spread is too large") from error
    return Field(
        found["name"], found["kind"], found["likelihood"], tuple(found["levels"]), center, spread
    )


def _take(data: Any, what: str, **types: Any) -> dict[str, Any]:
    """A JSON object with exactly these keys, each of one of its types."""
    if not isinstance(data, dict):
        raise ValueError(f"{what} is a JSON object, got {type(data).__name__}")
    if data.keys() != types.keys():
        missing, unknown = sorted(types.keys() - data.keys()), sorted(data.keys() - types.keys())
        raise ValueError(f"{what}: missing keys {missing}, unknown keys {unknown}")
    for key, expected in types.items():
        allowed = expected if isinstance(expected, tuple) else (expected,)
        if type(data[key]) not in allowed and not (data[key] is None and None in allowed):
            raise ValueError(f"{what}: {key!r} cannot be a {type(data[key]).__name__}")
    return data


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if twice := repeated(key for key, _ in pairs):
        raise ValueError(f"two keys are called {some(twice)}")
    return dict(pairs)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number of JSON")
