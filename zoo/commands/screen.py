"""Where the commands print: results to the output, errors and progress beside it."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.markup import escape

console = Console()
errors = Console(stderr=True)


def say(text: str, path: Path) -> None:
    """A line that ends with a path, which may hold any characters."""
    console.print(f"{escape(text)}[bold]{escape(str(path))}", highlight=False)
