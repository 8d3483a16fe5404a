"""Options that several commands take, and how their text is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

Method = Annotated[
    str,
    typer.Argument(
        help="A method, or FILE.py:Class of your own. In a file, the columns that your program"
        ' calls by name, as a site or as batch["age"], are values of that name; the others are its'
        " site x, if it has one, or are left out."
    ),
]
Seed = Annotated[int, typer.Option(help="Of initial parameters, batches and draws.", min=0)]
Root = Annotated[
    str | None,
    typer.Option("--data-root", help="Folder with MNIST/raw and so on.", envvar="ZOO_DATA"),
]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Devices = Annotated[
    str | None, typer.Option(help="Processes, one on each device: a number, or auto.")
]
Data = Annotated[
    str,
    typer.Option(
        help="digits, mnist, fashion_mnist, binary_digits, binary_mnist, coloured_digits,"
        " coloured_mnist; wine, breast_cancer; or a file."
    ),
]
Labels = Annotated[str | None, typer.Option(help="How many training labels are shown, or 'all'.")]
Epochs = Annotated[int | None, typer.Option(help="Passes over the data.", min=1)]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="An option of the method, NAME=VALUE.")
]
Label = Annotated[str | None, typer.Option(help="File: the column of labels.")]
View = Annotated[list[str] | None, typer.Option(help="File: NAME=COLUMN,COLUMN makes x_NAME.")]
Column = Annotated[
    list[str] | None,
    typer.Option(help="File: NAME=KIND (real, count, student_t ..; or low<mid<high)."),
]
Drop = Annotated[list[str] | None, typer.Option(help="File: a column to leave out.")]
Index = Annotated[str | None, typer.Option(help="File: the column that names the rows.")]
Folder = Annotated[Path, typer.Argument(help="A run folder.")]
Program = Annotated[
    str | None, typer.Option(help="FILE.py:Class, for a run of a program of your own.")
]
Overwrite = Annotated[bool, typer.Option(help="Replace an existing file.")]


def source_of(
    data: str,
    label: str | None,
    view: list[str] | None,
    column: list[str] | None,
    drop: list[str] | None,
    index: str | None,
) -> dict[str, Any]:
    """The table ``data`` of a specification: a bundled name, or a file and how it is read."""
    views = {k: v.split(",") for k, v in pairs(view, "--view").items()}
    columns: dict[str, Any] = {}
    for name, kind in pairs(column, "--column").items():
        columns[name] = kind.split("<") if "<" in kind else kind
    given = {"label": label, "views": views, "columns": columns, "drop": drop, "index": index}
    how = {key: value for key, value in given.items() if value}
    if Path(data).suffix:
        return {"file": data, **how}
    return {"name": data, **how}


def pairs(texts: list[str] | None, option: str) -> dict[str, str]:
    """``NAME=VALUE``, each name once."""
    found: dict[str, str] = {}
    for text in texts or []:
        name, equals, value = text.partition("=")
        if not equals or not name or not value:
            raise ValueError(f"{option} takes NAME=VALUE, got {text!r}")
        if name in found:
            raise ValueError(f"{option} {name!r} is given twice: {found[name]!r} and {value!r}")
        found[name] = value
    return found


def assignments(texts: list[str] | None, option: str) -> dict[str, Any]:
    """``NAME=VALUE``, the values parsed."""
    return {name: parsed(value) for name, value in pairs(texts, option).items()}


def parsed(value: str) -> Any:
    """JSON, or else the text itself."""
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def count(labels: str | None) -> int | str | None:
    """How many labels are shown.

    Raises:
        ValueError: neither a number nor ``"all"``.
    """
    if labels is None or labels == "all":
        return labels
    if not labels.isdecimal():
        raise ValueError(f"--labels is a number or 'all', got {labels!r}")
    return int(labels)


def number_of_devices(text: str | None) -> int | str | None:
    """How many processes.

    Raises:
        ValueError: neither a number from 1 nor ``"auto"``.
    """
    if text is None or text == "auto":
        return text
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"--devices is a number from 1, or 'auto', got {text!r}")
    return int(text)


def values_of(text: str) -> list[Any]:
    """``2-5`` or ``2,3,8``."""
    first, dash, last = text.partition("-")
    if dash and first.isdecimal() and last.isdecimal() and int(first) <= int(last):
        if int(last) - int(first) > 1000:
            raise ValueError(f"--values {text} are more than a thousand")
        return list(range(int(first), int(last) + 1))
    try:
        return [json.loads(part) for part in text.split(",")]
    except (ValueError, RecursionError):
        raise ValueError(f"--values is FROM-TO or a list A,B,C, got {text!r}") from None


def check_alone(command: str) -> None:
    """Refuse a command that several processes run together.

    Raises:
        ValueError: they do.
    """
    from pyrozoo.inference import processes

    if processes.running() is not None:
        raise ValueError(f"pyrozoo {command} runs in one process")
