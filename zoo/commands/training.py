"""Commands that fit: train, sweep, reproduce; and results, which prints what was stored."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from pyrozoo.zoo.commands.options import (
    Column,
    Data,
    Device,
    Devices,
    Drop,
    Epochs,
    Index,
    Label,
    Labels,
    Method,
    Root,
    Seed,
    Settings,
    View,
    assignments,
    check_alone,
    count,
    number_of_devices,
    source_of,
    values_of,
)
from pyrozoo.zoo.commands.screen import console, errors, say


def train(
    name: Method,
    data: Data = "digits",
    labels: Labels = None,
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
    epochs: Epochs = None,
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

    source = source_of(data, label, view, column, drop, index)
    cls = own.find_class(name) if ".py" in name else None
    method = Path(name.partition(".py")[0]).name if cls else name
    title = Path(data).stem if "file" in source else data
    folder = out or Path("runs") / f"{method}-{title}-{seed}"
    if (folder / "checkpoint.safetensors").exists() and not resume:
        raise ValueError(f"{folder} already has a run; choose another --out, or --resume it")
    spec = {"method": method, "data": source} if cls else runs.default_spec(name, source)
    spec = runs.with_overrides(
        spec,
        data={"labels": count(labels), "missing": missing, "hidden": hidden, "test": test},
        fit={"epochs": epochs, "batch_size": batch_size, "lr": lr, "compile": compile or None},
        options=assignments(settings, "--set"),
    )
    if cls:
        spec = own.with_values(cls, spec, lambda line: errors.print(escape(line), highlight=False))
    figures = runs.run(
        spec, folder, seed=seed, root=data_root, device=device, devices=number_of_devices(devices),
        resume=resume, make=own.maker(cls) if cls else runs.make_model,
        command=" ".join(["pyrozoo", *sys.argv[1:]]),
    )  # fmt: skip
    if processes.rank():
        return
    _print_figures(method, title, figures)
    say("run folder  ", folder)
    say("report      ", folder / "report.html")


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
    epochs: Epochs = None,
    settings: Settings = None,
    out: Annotated[Path | None, typer.Option(help="Default runs/sweep-NAME-DATA-OPTION.")] = None,
    data_root: Root = None,
    device: Device = "auto",
) -> None:
    """Choose the number of clusters: held-out bound, and agreement between seeds."""
    from pyrozoo.zoo import runs, sweeps

    check_alone("sweep")
    source = source_of(data, label, view, column, drop, index)
    title = Path(data).stem if "file" in source else data
    folder = out or Path("runs") / f"sweep-{name}-{title}-{option}"
    spec = runs.with_overrides(
        runs.default_spec(name, source),
        fit={"epochs": epochs},
        options=assignments(settings, "--set"),
    )
    records = sweeps.sweep(
        spec, option, values_of(values), folder, seeds=seeds, root=data_root, device=device
    )
    _print_sweep(records, option, f"{name} on {title}")
    say("plot        ", folder / "sweep.png")


def reproduce(
    name: Annotated[str, typer.Argument(help="An experiment; without one, they are listed.")] = "",
    seeds: Annotated[int, typer.Option(help="How many seeds, from 0.", min=1)] = 5,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("runs/results"),
    rivals: Annotated[bool, typer.Option(help="The baselines on the same data too.")] = True,
    data_root: Root = None,
) -> None:
    """Run an experiment over seeds and store mean, sd and each seed's figures."""
    from pyrozoo.zoo import reproduction, runs

    check_alone("reproduce")
    if not name:
        for experiment in runs.experiments():
            console.print(experiment, highlight=False)
        return
    path = reproduction.reproduce(name, seeds, out, root=data_root, rivals=rivals)
    console.print(reproduction.table([json.loads(path.read_text())]))
    say("stored in ", path)


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


def _print_figures(label: str, data: str, figures: dict[str, Any]) -> None:
    rivals = {name: row for name, row in figures.items() if isinstance(row, dict)}
    own = {k: v for k, v in figures.items() if not isinstance(v, dict)}
    table = Table("", *map(escape, [label, *rivals]), title=escape(f"{label} on {data}"), box=None)
    for key, value in own.items():
        if key in ("seconds", "bound"):
            continue
        digits = 0 if "clusters_used" in key else 3
        others = [f"{row[key]:.{digits}f}" if key in row else "" for row in rivals.values()]
        table.add_row(key.replace("_", " "), f"{value:.{digits}f}", *others)
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
