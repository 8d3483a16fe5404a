"""The command ``pyrozoo``."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Deep latent-variable models as Pyro programs: what is observed decides what is learnt.",
)
console = Console()
errors = Console(stderr=True)

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
    str, typer.Option(help="digits, mnist, fashion_mnist, wine, breast_cancer; or a file.")
]
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


@app.command("list")
def list_command(
    task: Annotated[str | None, typer.Option(help="Only methods for this task.")] = None,
) -> None:
    """List the methods."""
    from pyrozoo.zoo import catalogue

    table = Table("method", "what it is", "task", "tier", "paper", box=None)
    for name in catalogue.list_methods(task):
        entry = catalogue.method(name)
        table.add_row(f"[bold]{name}", entry.title, entry.task, entry.tier, entry.paper)
    console.print(table)


@app.command()
def show(
    name: str,
    diagram: Annotated[
        Path | None, typer.Option(help="Write the plate diagram here (.svg, .png, .pdf; graphviz).")
    ] = None,
) -> None:
    """Show a method: equations, sites, options, paper and BibTeX; its plate diagram with
    --diagram."""

    from pyrozoo.zoo import catalogue

    entry = catalogue.method(name)
    console.print(escape(entry.doc), highlight=False)
    example = _example(name)
    model = catalogue.create(name, example, **_small(entry.options))
    lines = model.objective.explain(model.program, model.guide, example)
    console.print("\n[bold]Sites[/bold] when only the data are observed:")
    for line in lines:
        console.print(f"  {escape(line)}", highlight=False)
    console.print("\n[bold]Options[/bold] (--set NAME=VALUE):")
    for option, default in entry.options.items():
        console.print(f"  {option} = {escape(repr(default))}", highlight=False)
    console.print(f"\n[bold]BibTeX[/bold]\n{escape(catalogue.citation(name))}", highlight=False)
    if diagram is not None:
        _draw(model.program, diagram)
        _say("\nplate diagram: ", diagram)
    elif _has_graphviz():
        console.print(f"\nplate diagram: pyrozoo show {name} --diagram {name}.svg")


@app.command()
def train(
    name: Annotated[str, typer.Argument(help="A method, or FILE.py:Class of your own.")],
    data: Data = "digits",
    labels: Annotated[
        str | None, typer.Option(help="How many training labels are shown, or 'all'.")
    ] = None,
    missing: Annotated[
        float | None, typer.Option(help="Share of rows that lack a modality.", min=0, max=1)
    ] = None,
    hidden: Annotated[
        float | None, typer.Option(help="Share of entries to hide and fill in.", min=0, max=1)
    ] = None,
    label: Label = None,
    view: View = None,
    column: Column = None,
    drop: Drop = None,
    index: Index = None,
    test: Annotated[
        float | None, typer.Option(help="Share of labelled rows to hold out.", min=0, max=1)
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the data.", min=1)] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows per step.", min=1)] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.")] = None,
    settings: Settings = None,
    seed: Seed = 0,
    out: Annotated[
        Path | None, typer.Option(help="Run folder; default runs/NAME-DATA-SEED.")
    ] = None,
    data_root: Root = None,
    device: Device = "auto",
    devices: Devices = None,
    compile: Annotated[
        bool, typer.Option("--compile", help="Compile the steps: seconds once, then faster.")
    ] = False,
    resume: Annotated[bool, typer.Option(help="Go on with the run in the folder.")] = False,
) -> None:
    """Fit a method to data, compare it with plain rivals, and write a report.

    Data are a bundled set by name, or a file: .csv, .parquet, .npz or .h5ad; or .npy, .h5, .hdf5
    or .zarr, of which many rows are read from disk during the fit.
    """
    from pyrozoo.inference import processes
    from pyrozoo.zoo import own, runs

    source = _source(data, label, view, column, drop, index)
    cls = own.find_class(name) if ".py" in name else None
    method = Path(name.partition(".py")[0]).name if cls else name
    title = Path(data).stem if "file" in source else data
    folder = out or Path("runs") / f"{method}-{title}-{seed}"
    if (folder / "checkpoint.safetensors").exists() and not resume:
        raise ValueError(f"{folder} already has a run; choose another --out, or --resume it")
    spec = {"method": method, "data": source} if cls else runs.default_spec(name, source)
    spec = runs.with_overrides(
        spec,
        data={"labels": _count(labels), "missing": missing, "hidden": hidden, "test": test},
        fit={"epochs": epochs, "batch_size": batch_size, "lr": lr, "compile": compile or None},
        options=_assignments(settings, "--set"),
    )
    figures = runs.run(
        spec, folder, seed=seed, root=data_root, device=device, devices=_devices(devices),
        resume=resume, make=own.maker(cls) if cls else runs.make_model,
        command=" ".join(["pyrozoo", *sys.argv[1:]]),
    )  # fmt: skip
    if processes.rank():
        return
    _print_figures(method, title, figures)
    _say("run folder  ", folder)
    _say("report      ", folder / "report.html")


@app.command()
def report(
    run: Folder,
    out: Annotated[Path | None, typer.Option(help="Default: report.html in the folder.")] = None,
    program: Program = None,
) -> None:
    """Write the report of a run folder again."""
    from pyrozoo.zoo import folders

    path = folders.write_report(folders.load(run, _maker(program)), out)
    _say("report  ", path)


@app.command()
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
    from pyrozoo.zoo import exports, folders, tables

    fitted = folders.load(run, _maker(program))
    rows, index = _rows(fitted, data, absent)
    found = exports.predict(fitted, rows, num_samples=num_samples, level=level, seed=seed)
    kept = found if out.suffix.lower() == ".npz" else exports.to_frame(fitted, found, index)
    tables.write(kept, out, overwrite=overwrite)
    _say(f"{len(rows):,} rows ({', '.join(found)}) in ", out)


@app.command()
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
    from pyrozoo.zoo import exports, folders, tables

    fitted = folders.load(run, _maker(program))
    values = _assignments(given, "--given")
    found = exports.sample(fitted, rows, given=values, seed=seed)
    kept = found if out.suffix.lower() == ".npz" else exports.to_frame(fitted, found)
    tables.write(kept, out, overwrite=overwrite)
    _say(f"{rows:,} rows ({', '.join(found)}) in ", out)


@app.command()
def sweep(
    name: Annotated[str, typer.Argument(help="A method.")],
    data: Data = "digits",
    option: Annotated[str, typer.Option(help="What is varied.")] = "num_clusters",
    values: Annotated[str, typer.Option(help="From-to (2-12) or a list (5,10,20).")] = "2-12",
    seeds: Annotated[int, typer.Option(help="Fits of each value.", min=1)] = 3,
    label: Label = None,
    view: View = None,
    column: Column = None,
    drop: Drop = None,
    index: Index = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the data.", min=1)] = None,
    settings: Settings = None,
    out: Annotated[Path | None, typer.Option(help="Default runs/sweep-NAME-DATA-OPTION.")] = None,
    data_root: Root = None,
    device: Device = "auto",
) -> None:
    """Choose the number of clusters: held-out bound, and agreement between seeds."""
    from pyrozoo.zoo import runs, sweeps

    _check_alone("sweep")
    source = _source(data, label, view, column, drop, index)
    title = Path(data).stem if "file" in source else data
    folder = out or Path("runs") / f"sweep-{name}-{title}-{option}"
    spec = runs.with_overrides(
        runs.default_spec(name, source),
        fit={"epochs": epochs},
        options=_assignments(settings, "--set"),
    )
    records = sweeps.sweep(
        spec, option, _values(values), folder, seeds=seeds, root=data_root, device=device
    )
    _print_sweep(records, option, f"{name} on {title}")
    _say("plot        ", folder / "sweep.png")


@app.command()
def reproduce(
    name: Annotated[str, typer.Argument(help="An experiment; without one, they are listed.")] = "",
    seeds: Annotated[int, typer.Option(help="How many seeds, from 0.", min=1)] = 5,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("runs/results"),
    rivals: Annotated[bool, typer.Option(help="The baselines on the same data too.")] = True,
    data_root: Root = None,
) -> None:
    """Run an experiment over seeds and store mean, sd and each seed's figures."""
    from pyrozoo.zoo import reproduction, runs

    _check_alone("reproduce")
    if not name:
        for experiment in runs.experiments():
            console.print(experiment, highlight=False)
        return
    path = reproduction.reproduce(name, seeds, out, root=data_root, rivals=rivals)
    console.print(reproduction.table([json.loads(path.read_text())]))
    _say("stored in ", path)


@app.command()
def results(
    readme: Annotated[
        Path | None, typer.Option(help="Write the table into this README, between its markers.")
    ] = None,
) -> None:
    """Print all stored results beside the published figures."""
    from pyrozoo.zoo import reproduction

    console.print(reproduction.table(reproduction.stored()))
    if readme is not None:
        reproduction.write_readme(readme)


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


# ---- helpers -------------------------------------------------------------------------------------


def _say(text: str, path: Path) -> None:
    """A line that ends with a path, which may hold any characters."""
    console.print(f"{escape(text)}[bold]{escape(str(path))}", highlight=False)


def _print_figures(label: str, data: str, figures: dict[str, Any]) -> None:
    rivals = {name: row for name, row in figures.items() if isinstance(row, dict)}
    own = {k: v for k, v in figures.items() if not isinstance(v, dict)}
    table = Table("", *map(escape, [label, *rivals]), title=escape(f"{label} on {data}"), box=None)
    for key, value in own.items():
        if key in ("seconds", "bound"):
            continue
        others = [f"{row[key]:.3f}" if key in row else "" for row in rivals.values()]
        table.add_row(key.replace("_", " "), f"{value:.3f}", *others)
    table.add_row("bound, nats per datum", f"{own['bound']:.2f}", *["" for _ in rivals])
    table.add_row("training, seconds", f"{own['seconds']:.0f}", *["" for _ in rivals])
    console.print(table)


def _print_sweep(records: list[dict[str, Any]], option: str, title: str) -> None:
    from pyrozoo.zoo import sweeps

    top = sweeps.best(records)
    table = Table(
        option, "held-out bound", "", "stability", "", "clusters used", title=escape(title),
        box=None,
    )  # fmt: skip
    for record in records:
        cells = ["" if record[k] is None else f"{record[k]:.3f}" for k in ("bound", "stability")]
        spread = [
            "" if record[k] is None else f"± {record[k]:.3f}" for k in ("bound_sd", "stability_sd")
        ]
        used = "" if record["clusters_used"] is None else f"{record['clusters_used']:.1f}"
        row = [escape(str(record["value"])), cells[0], spread[0], cells[1], spread[1], used]
        table.add_row(*row, style="bold" if record is top else "")
    console.print(table)
    console.print(
        escape(
            f"best held-out bound: {option} = {top['value']}; a stability near 1 says that seeds"
            " agree"
        ),
        highlight=False,
    )


def _source(
    data: str,
    label: str | None,
    view: list[str] | None,
    column: list[str] | None,
    drop: list[str] | None,
    index: str | None,
) -> dict[str, Any]:
    """The table ``data`` of a specification: a bundled name, or a file and how it is read."""
    views = {k: v.split(",") for k, v in _pairs(view, "--view").items()}
    columns: dict[str, Any] = {}
    for name, kind in _pairs(column, "--column").items():
        columns[name] = kind.split("<") if "<" in kind else kind
    given = {"label": label, "views": views, "columns": columns, "drop": drop, "index": index}
    how = {key: value for key, value in given.items() if value}
    if Path(data).suffix:
        return {"file": data, **how}
    return {"name": data, **how}


def _pairs(texts: list[str] | None, option: str) -> dict[str, str]:
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


def _assignments(texts: list[str] | None, option: str) -> dict[str, Any]:
    return {name: _parsed(value) for name, value in _pairs(texts, option).items()}


def _parsed(value: str) -> Any:
    """JSON, or else the text itself."""
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _count(labels: str | None) -> int | str | None:
    if labels is None or labels == "all":
        return labels
    if not labels.isdecimal():
        raise ValueError(f"--labels is a number or 'all', got {labels!r}")
    return int(labels)


def _devices(text: str | None) -> int | str | None:
    if text is None or text == "auto":
        return text
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"--devices is a number from 1, or 'auto', got {text!r}")
    return int(text)


def _values(text: str) -> list[Any]:
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


def _maker(program: str | None) -> Any:
    from pyrozoo.zoo import own, runs

    if program is not None:
        return own.maker(own.find_class(program))

    def make(spec: Any, task: Any, seed: int) -> Any:
        if not runs.known_method(spec["method"]):
            raise ValueError(
                f"the run is of a program of your own, {spec['method']}: name it again with"
                " --program FILE.py:Class"
            )
        return runs.make_model(spec, task, seed)

    return make


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


def _example(name: str) -> dict[str, Any]:
    import torch

    keys = ("x_left", "x_right") if name == "mvae" else ("x",)
    return {key: torch.rand(4, 16) for key in keys}


def _small(options: dict[str, Any]) -> dict[str, Any]:
    return {"hidden": (8,)} if "hidden" in options else {}


def _has_graphviz() -> bool:
    import shutil

    return importlib.util.find_spec("graphviz") is not None and shutil.which("dot") is not None


def _draw(program: Any, path: Path) -> None:
    import pyro

    from pyrozoo.inference import Batch

    if not _has_graphviz():
        raise ValueError(
            "the plate diagram needs graphviz: the Python package and the program 'dot'"
        )
    graph = pyro.render_model(program, model_args=(Batch.of(4),), render_distributions=True)
    path.write_bytes(graph.pipe(format=path.suffix.lstrip(".") or "svg"))


#: What is wrong with an input, a file, an option or the machine, in words.
EXPECTED = (ValueError, TypeError, OSError, FloatingPointError, ImportError, MemoryError)


def _said_by_another(error: BaseException) -> bool:
    """Whether another process of this fit prints the same error."""
    from pyrozoo.inference import processes

    return processes.rank() > 0 and processes.told(error)


def _check_alone(command: str) -> None:
    from pyrozoo.inference import processes

    if processes.running() is not None:
        raise ValueError(f"pyrozoo {command} runs in one process")


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
