"""The command ``pyrozoo``."""

from __future__ import annotations

import importlib.util
import inspect
import json
import sys
from pathlib import Path
from types import ModuleType
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
        console.print(f"\nplate diagram: {diagram}")
    elif _has_graphviz():
        console.print(f"\nplate diagram: pyrozoo show {name} --diagram {name}.svg")


@app.command()
def train(
    name: Annotated[str, typer.Argument(help="A method, or FILE.py:Class of your own.")],
    data: Annotated[str, typer.Option(help="digits, mnist or fashion_mnist.")] = "digits",
    labels: Annotated[
        str | None, typer.Option(help="How many training labels are shown, or 'all'.")
    ] = None,
    missing: Annotated[
        float | None, typer.Option(help="Share of rows that lack a modality.", min=0, max=1)
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the data.", min=1)] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows per step.", min=1)] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="An option of the method, NAME=VALUE.")
    ] = None,
    seed: Seed = 0,
    out: Annotated[
        Path | None, typer.Option(help="Run folder; default runs/NAME-DATA-SEED.")
    ] = None,
    data_root: Root = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    resume: Annotated[bool, typer.Option(help="Go on with the run in the folder.")] = False,
) -> None:
    """Fit a method to data, compare it with the baselines, and write a report."""
    from pyrozoo.zoo import runs

    own = _own_class(name) if ".py" in name else None
    label = Path(name.partition(".py")[0]).name if own else name
    folder = out or Path("runs") / f"{label}-{data}-{seed}"
    if (folder / "checkpoint.safetensors").exists() and not resume:
        raise ValueError(f"{folder} already has a run; choose another --out, or --resume it")
    spec = {"method": label, "data": {"name": data}} if own else runs.default_spec(name, data)
    shown = _count_labels(labels, data, data_root, spec)
    spec = runs.with_overrides(
        spec,
        data={"labels": shown, "missing": missing},
        fit={"epochs": epochs, "batch_size": batch_size, "lr": lr},
        options=dict(_assignment(s) for s in settings or []),
    )
    model = _own_model(own, spec, seed, data_root) if own else None
    command = " ".join(["pyrozoo", *sys.argv[1:]])
    figures = runs.run(
        spec, folder, seed=seed, root=data_root, device=device, resume=resume, model=model,
        command=command,
    )  # fmt: skip
    _print_figures(label, data, figures)
    console.print(
        f"run folder  {folder}\nreport      [bold]{folder / 'report.html'}", highlight=False
    )


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

    if not name:
        for experiment in runs.experiments():
            console.print(experiment, highlight=False)
        return
    path = reproduction.reproduce(name, seeds, out, root=data_root, rivals=rivals)
    console.print(reproduction.table([json.loads(path.read_text())]))
    console.print(f"stored in {path}", highlight=False)


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


# ---- helpers -------------------------------------------------------------------------------------


def _print_figures(label: str, data: str, figures: dict[str, Any]) -> None:
    rivals = {name: row for name, row in figures.items() if isinstance(row, dict)}
    own = {k: v for k, v in figures.items() if not isinstance(v, dict)}
    table = Table("", *([label, *rivals]), title=f"{label} on {data}", box=None)
    for key, value in own.items():
        if key in ("seconds", "bound"):
            continue
        others = [f"{row[key]:.3f}" if key in row else "" for row in rivals.values()]
        table.add_row(key.replace("_", " "), f"{value:.3f}", *others)
    table.add_row("bound, nats per datum", f"{own['bound']:.2f}", *["" for _ in rivals])
    table.add_row("training, seconds", f"{own['seconds']:.0f}", *["" for _ in rivals])
    console.print(table)


def _assignment(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--set takes NAME=VALUE, got {text!r}")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def _count_labels(labels: str | None, data: str, root: str | None, spec: Any) -> int | None:
    from pyrozoo.zoo import datasets

    if labels is None:
        return None
    if labels == "all":
        return len(datasets.load(data, root, spec["data"].get("split", "train")).y)
    if not labels.isdigit() or labels == "0":
        raise ValueError(f"--labels is a positive number or 'all', got {labels!r}")
    return int(labels)


def _own_class(text: str) -> Any:
    """The class that FILE.py:Class names; the file is yours and is executed."""
    file, _, name = text.rpartition(":")
    path = Path(file)
    if not file or not path.is_file():
        raise ValueError(f"expected FILE.py:Class with an existing file, got {text!r}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = ModuleType(path.stem)
    module.__file__ = str(path)
    module.__spec__ = spec
    sys.modules.setdefault(path.stem, module)
    spec.loader.exec_module(module)
    found = getattr(module, name, None)
    if not inspect.isclass(found):
        classes = [n for n, v in vars(module).items() if inspect.isclass(v)]
        raise ValueError(f"{path} has no class {name!r} (classes: {', '.join(classes)})")
    return found


def _own_model(cls: Any, spec: Any, seed: int, root: str | None) -> Any:
    """A user's program with a guide made for it; ``x_dim`` is passed where the class takes it."""

    from pyrozoo.guides import Amortized
    from pyrozoo.guides.inputs import graph_of
    from pyrozoo.inference.modes import seeded
    from pyrozoo.zoo import runs
    from pyrozoo.zoo.catalogue import Model

    task = runs.make_task(spec, seed, root)
    options = dict(spec.get("options", {}))
    if "x_dim" in inspect.signature(cls).parameters:
        options.setdefault("x_dim", task.train["x"].shape[1])
    with seeded(seed):
        program = cls(**options)
        sites = graph_of(program).sites
        given = [name for name in ("x", "y") if name in sites]
        guide = Amortized(program, given, hidden=options.get("hidden", (256, 256)))
    return Model(spec["method"], program, guide, options=options)


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


def main() -> None:
    """Run the command; expected errors are one line, without a traceback."""
    try:
        app()
    except (ValueError, FileNotFoundError, FloatingPointError, OSError) as error:
        errors.print(f"[bold red]error:[/bold red] {escape(str(error))}", highlight=False)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
