"""Commands that look at methods: list, show, and compare, which fits several guides to one."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from pyrozoo.zoo.commands.options import (
    Column,
    Data,
    Drop,
    Epochs,
    Index,
    Label,
    Labels,
    Method,
    Root,
    Settings,
    View,
    assignments,
    check_alone,
    count,
    source_of,
)
from pyrozoo.zoo.commands.screen import console, errors, say


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
        say("\nplate diagram: ", diagram)
    elif _has_graphviz():
        console.print(f"\nplate diagram: pyrozoo show {name} --diagram {name}.svg")


def compare(
    name: Method = "",
    truth: Annotated[
        bool, typer.Option("--truth", help="Programs whose posterior is known, in its place.")
    ] = False,
    rung: Annotated[
        list[str] | None, typer.Option(help="With --truth: only this program; repeatable.")
    ] = None,
    data: Data = "digits",
    guides: Annotated[
        str | None, typer.Option(help="Names with commas; 'list' lists them.")
    ] = None,
    objectives: Annotated[
        str | None,
        typer.Option(help="elbo, stl, iwae:K, dreg:K, renyi:ALPHA:K, rws:K, with commas."),
    ] = None,
    labels: Labels = None,
    label: Label = None,
    view: View = None,
    column: Column = None,
    drop: Drop = None,
    index: Index = None,
    seeds: Annotated[int, typer.Option(help="Fits of each guide.", min=1)] = 1,
    epochs: Epochs = None,
    settings: Settings = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Measure with a tenth of the draws.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Default runs/compare-NAME-DATA.")] = None,
    data_root: Root = None,
) -> None:
    """Which guide should I trust?  Fit several to one program, and measure all of them alike.

    Leaves compare.html, compare.csv and compare.tex in the folder.
    """
    from pyrozoo.inference.comparison.measuring import Effort
    from pyrozoo.zoo import comparing, own, runs
    from pyrozoo.zoo.truth import RUNGS

    check_alone("compare")
    if guides == "list":
        for guide in ["default", *comparing.guide_names()]:
            console.print(guide, highlight=False)
        return
    if truth == bool(name):
        raise ValueError("pyrozoo compare takes a method, or --truth")
    effort = Effort().quick() if quick else Effort()
    wanted = guides.split(",") if guides else None
    losses = objectives.split(",") if objectives else None
    tell = lambda line: errors.print(escape(line), highlight=False)  # noqa: E731
    if truth:
        base = out or Path("runs") / "compare-truth"
        for one in rung or list(RUNGS):
            found = comparing.compare_rung(
                one, wanted, losses, seeds=seeds, epochs=epochs, effort=effort, say=tell
            )
            _leave(found, base / one)
        return
    source = source_of(data, label, view, column, drop, index)
    cls = own.find_class(name) if ".py" in name else None
    method = Path(name.partition(".py")[0]).name if cls else name
    spec = {"method": method, "data": source} if cls else runs.default_spec(name, source)
    spec = runs.with_overrides(
        spec, data={"labels": count(labels)}, fit={"epochs": epochs},
        options=assignments(settings, "--set"),
    )  # fmt: skip
    spec = own.with_values(cls, spec, tell) if cls else spec
    found = comparing.compare_method(
        spec, wanted or comparing.USUAL, losses or ["elbo"], seeds=seeds, root=data_root,
        make=own.maker(cls) if cls else None, effort=effort, say=tell,
    )  # fmt: skip
    title = Path(data).stem if "file" in source else data
    _leave(found, out or Path("runs") / f"compare-{method}-{title}")


def _leave(found: Any, folder: Path) -> None:
    """Print a comparison, and leave its page and tables in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    console.print(found.table())
    for note in found.notes():
        console.print(escape(note), highlight=False)
    found.write(folder / "compare.html")
    found.write_csv(folder / "compare.csv")
    (folder / "compare.tex").write_text(found.to_latex(), "utf-8")
    say("page        ", folder / "compare.html")


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
