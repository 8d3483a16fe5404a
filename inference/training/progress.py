"""The progress bar of a fit."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn


class Bar:
    """A progress bar: epoch, bound in nats per datum, time left."""

    def __init__(self, show: bool, title: str, shown: str) -> None:
        self.shown = shown  # "bound", or "loss" where the objective is no bound
        self.console = Console(stderr=True) if show else None
        self.title = title
        self.progress: Progress | None = None

    def __enter__(self) -> Bar:
        if self.console is not None:
            self.progress = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                TextColumn("{task.fields[text]}"),
                TimeRemainingColumn(),
                console=self.console,
            )
            self.task = self.progress.add_task(escape(self.title or "fit"), total=1.0, text="")
            self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.progress is not None:
            self.progress.stop()

    def say(self, *lines: str) -> None:
        """Print lines above the bar, or after it; without a bar, none."""
        if self.console is not None:
            for line in lines:
                self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def step(self, done: float) -> None:
        """Show which part of the whole is done."""
        if self.progress is not None:
            self.progress.update(self.task, completed=done)

    def show(self, epoch: int, epochs: int, record: Mapping[str, float]) -> None:
        """Show an epoch's figure."""
        if self.progress is not None:
            name = "val_bound" if "val_bound" in record else self.shown
            text = f"epoch {epoch}/{epochs}  {name} {record[name]:.2f} nats per datum"
            self.progress.update(self.task, text=text)
