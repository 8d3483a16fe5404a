"""Commands that use a run folder: report, predict, sample."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pyrozoo.zoo.commands.options import Folder, Overwrite, Program, Seed, assignments
from pyrozoo.zoo.commands.screen import say


def report(
    run: Folder,
    out: Annotated[Path | None, typer.Option(help="Default: report.html in the folder.")] = None,
    program: Program = None,
) -> None:
    """Write the report of a run folder again."""
    from pyrozoo.zoo import folders

    path = folders.write_report(_load(run, program), out)
    say("report  ", path)


def predict(
    run: Folder,
    data: Annotated[Path, typer.Option(help="A file with the columns (or sites) of training.")],
    out: Annotated[Path, typer.Option(help="Where to: .csv, .parquet, .npz or .h5ad.")],
    level: Annotated[float, typer.Option(help="Of the intervals of what is filled in.")] = 0.9,
    num_samples: Annotated[int, typer.Option(help="Draws per row.", min=2)] = 200,
    absent: Annotated[
        bool, typer.Option("--absent", help="Columns that the file lacks are all missing.")
    ] = False,
    program: Program = None,
    overwrite: Overwrite = False,
    seed: Seed = 0,
) -> None:
    """Clusters or labels, embeddings, bounds and filled-in entries of new rows."""
    from pyrozoo.zoo import exports, tables

    fitted = _load(run, program)
    rows, index = _rows(fitted, data, absent)
    found = exports.predict(fitted, rows, num_samples=num_samples, level=level, seed=seed)
    kept = found if out.suffix.lower() == ".npz" else exports.to_frame(fitted, found, index)
    tables.write(kept, out, overwrite=overwrite)
    say(f"{len(rows):,} rows ({', '.join(found)}) in ", out)


def sample(
    run: Folder,
    out: Annotated[Path, typer.Option(help="Where to: .csv, .parquet, .npz or .h5ad.")],
    rows: Annotated[int, typer.Option(help="How many.", min=1)] = 100,
    given: Annotated[
        list[str] | None, typer.Option(help="SITE=VALUE of a finite site, such as y=3.")
    ] = None,
    program: Program = None,
    overwrite: Overwrite = False,
    seed: Seed = 0,
) -> None:
    """Generate rows from a fitted program."""
    from pyrozoo.zoo import exports, tables

    fitted = _load(run, program)
    if inputs := fitted.result.inputs:
        raise ValueError(
            f"the program reads {', '.join(inputs)}, which it does not generate: rows are drawn by"
            " result.posterior(rows, predictive=True) in Python, of rows that have these"
        )
    values = assignments(given, "--given")
    found = exports.sample(fitted, rows, given=values, seed=seed)
    kept = found if out.suffix.lower() == ".npz" else exports.to_frame(fitted, found)
    tables.write(kept, out, overwrite=overwrite)
    say(f"{rows:,} rows ({', '.join(found)}) in ", out)


def _load(run: Path, program: str | None) -> Any:
    from pyrozoo.zoo import folders, own, runs

    if program is not None:
        return folders.load(run, own.maker(own.find_class(program)))

    def make(spec: Any, task: Any, seed: int) -> Any:
        if not runs.known_method(spec["method"]):
            raise ValueError(
                f"the run is of a program of your own, {spec['method']}: name it again with"
                " --program FILE.py:Class"
            )
        return runs.make_model(spec, task, seed)

    return folders.load(run, make)


def _rows(run: Any, path: Path, absent: bool) -> tuple[Any, Any]:
    """The rows of a file in the form of a run's training data, and their index."""
    from pyrozoo.inference import Batch
    from pyrozoo.zoo import exports, tables

    if run.schema is not None:
        index = run.facts["spec"]["data"].get("index")
        table = run.schema.encode(path, index=index, absent="missing" if absent else "error")
        return Batch.of(table.data, len(table.index)), table.index
    if path.suffix.lower() != ".npz":
        sites = ", ".join(run.facts["shapes"])
        raise ValueError(f"the run was trained on arrays: expected a .npz with {sites}, got {path}")
    source = tables.load(path)
    return exports.read_arrays(run, source), source.frame.index
