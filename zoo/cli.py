"""The command ``pyrozoo``: its parts are in :mod:`pyrozoo.zoo.commands`."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from pyrozoo.zoo.commands import looking, training, using
from pyrozoo.zoo.commands.options import Root
from pyrozoo.zoo.commands.screen import errors

#: What is wrong with an input, a file, an option or the machine, in words.
EXPECTED = (ValueError, TypeError, OSError, FloatingPointError, ImportError, MemoryError)

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Deep latent-variable models as Pyro programs: what is observed decides what is learnt.",
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"pyrozoo {version('pyrozoo')}")
        raise typer.Exit


@app.callback()
def _options(
    wanted: Annotated[
        bool,
        typer.Option("--version", help="Print the version.", callback=_version, is_eager=True),
    ] = False,
) -> None:
    pass


app.command("list")(looking.list_command)
app.command()(looking.show)
app.command()(training.train)
app.command()(using.report)
app.command()(using.predict)
app.command()(using.sample)
app.command()(training.sweep)
app.command()(looking.compare)
app.command()(training.reproduce)
app.command()(training.results)


@app.command()
def bench(
    names: Annotated[
        list[str] | None, typer.Argument(help="Works, or 'all'; without any, they are listed.")
    ] = None,
    rounds: Annotated[int | None, typer.Option(help="Turns of each contestant.", min=1)] = None,
    threads: Annotated[int | None, typer.Option(help="And cores; default: all.", min=1)] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Store the results.")] = None,
    tiny: Annotated[bool, typer.Option("--tiny", help="Only see that they run.")] = False,
    table: Annotated[bool, typer.Option("--table", help="Print what is stored.")] = False,
    data_root: Root = None,
) -> None:
    """Measure speed and memory against named rivals, in a checkout of the repository."""
    folder = Path(__file__).resolve().parents[1] / "tests" / "benchmarks"
    if not (folder / "__main__.py").is_file():
        errors.print(
            "[bold red]error:[/bold red] the benchmarks come with a checkout of the repository,"
            " not with the installed package",
            highlight=False,
        )
        raise typer.Exit(2)
    given = {"rounds": rounds, "threads": threads, "json": json_file, "data-root": data_root}
    options = [f"--{name}={value}" for name, value in given.items() if value is not None]
    flags = [f"--{name}" for name, wanted in (("tiny", tiny), ("table", table)) if wanted]
    command = [sys.executable, str(folder), *(names or []), *options, *flags]
    raise typer.Exit(subprocess.run(command, check=False).returncode)


def _said_by_another(error: BaseException) -> bool:
    """Whether another process of this fit prints the same error."""
    from pyrozoo.inference import processes

    return processes.rank() > 0 and processes.told(error)


def main() -> None:
    """Run the command; expected errors are one line, without a traceback."""
    try:
        app()
    except EXPECTED as error:
        if not _said_by_another(error):
            text = str(error) or type(error).__name__
            errors.print(f"[bold red]error:[/bold red] {escape(text)}", highlight=False)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
