"""Comparisons by name: guides and objectives as the command line says them, methods, the ladder.

=================== ==============================================================================
guide               what it is
=================== ==============================================================================
``default``         the method's own
``mean_field`` ..   :class:`~pyrozoo.guides.Amortized` with this family, see
                    :mod:`~pyrozoo.guides.families`
``independent`` ..  the same with this structure: ``independent``, ``topological``
``auto_normal`` ..  an autoguide of Pyro, not amortised: ``auto_normal``, ``auto_mvn``,
                    ``auto_iaf``, ``auto_delta``
=================== ==============================================================================

Objectives are ``elbo``, ``stl``, ``iwae:K``, ``dreg:K``, ``renyi:ALPHA:K`` and ``rws:K`` with K
draws.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from pyrozoo.guides import Amortized
from pyrozoo.guides.auto import Auto
from pyrozoo.guides.families import FAMILIES
from pyrozoo.inference import Batch, EnumELBO
from pyrozoo.inference.bounds.importance import IWELBO, RenyiBound
from pyrozoo.inference.bounds.wake import ReweightedWakeSleep
from pyrozoo.inference.comparison.compare import Guide, compare
from pyrozoo.inference.comparison.measuring import Effort
from pyrozoo.inference.comparison.outcome import Comparison
from pyrozoo.zoo import truth

STRUCTURES = ("independent", "topological")
AUTOGUIDES = {
    "auto_normal": "AutoNormal",
    "auto_mvn": "AutoMultivariateNormal",
    "auto_iaf": "AutoIAFNormal",
    "auto_delta": "AutoDelta",
}
USUAL = ("default", "mean_field", "full", "student", "coupling")  # for a method


def guide_names() -> list[str]:
    """The names of guides that any program may be given."""
    return [*FAMILIES, *STRUCTURES, *AUTOGUIDES]


def named_guides(
    names: Sequence[str],
    data: Any,
    given: Sequence[str] | None = None,
    hidden: Sequence[int] = (256, 256),
    inputs: Sequence[str] = (),
    default: nn.Module | None = None,
) -> dict[str, Guide]:
    """Guides by name, as :func:`.compare` takes them.

    Args:
        names: see the table of the module.
        data: rows, for the shapes, and for autoguides, which have parameters for each of them.
        given: sites that an amortised guide reads; default: what the program generates last.
        hidden: widths of its networks.
        inputs: keys of the data that are read but are no sites.
        default: what ``default`` is.

    Raises:
        ValueError: there is no such name.
    """
    known = [*guide_names(), *(["default"] if default is not None else [])]
    found: dict[str, Guide] = {}
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"no guide is called {name!r} (guides: {', '.join(known)}){hint}")
        options: dict[str, Any] = {"given": given, "hidden": hidden, "example": data}
        if name == "default":
            assert default is not None
            found[name] = default
        elif name in FAMILIES:
            found[name] = functools.partial(_amortized, family=name, **options)
        elif name in STRUCTURES:
            found[name] = functools.partial(_amortized, structure=name, **options)
        else:
            found[name] = functools.partial(
                _auto, name=AUTOGUIDES[name], data=data, inputs=tuple(inputs)
            )
    return found


def _amortized(program: nn.Module, **options: Any) -> nn.Module:
    return Amortized(program, **options)


def _auto(program: nn.Module, name: str, data: Any, inputs: tuple[str, ...]) -> nn.Module:
    return Auto(program, name, data, inputs=inputs)


def named_objectives(
    texts: Sequence[str], num_particles: int = 1
) -> dict[str, Callable[[], EnumELBO]]:
    """Objectives by name, such as ``iwae:16``; ``elbo`` and ``stl`` average so many particles.

    Raises:
        ValueError: there is no such objective, or its numbers do not fit.
    """
    found: dict[str, Callable[[], EnumELBO]] = {}
    for text in texts:
        name, *numbers = text.split(":")
        try:
            found[_shown(name, numbers)] = _objective(name, numbers, num_particles)
        except (KeyError, IndexError, ValueError):
            raise ValueError(
                "an objective is elbo, stl, iwae:K, dreg:K, renyi:ALPHA:K or rws:K with a whole"
                f" number K of draws, got {text!r}"
            ) from None
    return found


def _shown(name: str, numbers: Sequence[str]) -> str:
    return "ELBO" if name == "elbo" else " ".join([name.upper(), *numbers])


def _objective(name: str, numbers: Sequence[str], num_particles: int) -> Callable[[], EnumELBO]:
    counts = {"elbo": 0, "stl": 0, "iwae": 1, "dreg": 1, "renyi": 2, "rws": 1}
    if len(numbers) != counts[name]:
        raise ValueError
    if name == "elbo":
        return functools.partial(EnumELBO, num_particles)
    if name == "stl":
        return functools.partial(EnumELBO, num_particles, gradient="stl")
    draws = int(numbers[-1])
    if name == "renyi":
        return functools.partial(RenyiBound, float(numbers[0]), draws)
    if name == "rws":
        return functools.partial(ReweightedWakeSleep, draws)
    gradient = "dreg" if name == "dreg" else "total"
    return functools.partial(IWELBO, draws, gradient=gradient)


# ---- methods of the catalogue --------------------------------------------------------------------


def compare_method(
    spec: Mapping[str, Any],
    guides: Sequence[str],
    objectives: Sequence[str] = ("elbo",),
    *,
    seeds: int | Iterable[int] = 1,
    root: str | None = None,
    make: Callable[..., Any] | None = None,
    effort: Effort | None = None,
    rows: int = 500,
    say: Callable[[str], None] | None = None,
) -> Comparison:
    """Compare guides on a method (or a program of your own) and its data.

    Without pretraining, and with the objectives as named, not the method's own (its weights of
    labels, its schedules): each cell starts from the same random program, and fits both halves.

    Args:
        spec: as :func:`.runs.run` takes it.
        guides, objectives: names, see the module.
        seeds: how many, or which.
        root: folder of the image files.
        make: how the model is made; default: by the catalogue.
        effort: see :class:`.Effort`.
        rows: test rows to measure on, at most.
        say: called with a line about each cell.

    Raises:
        ValueError: the method has no posterior, a name is unknown, or the data do not fit.
    """
    from pyrozoo.zoo import runs
    from pyrozoo.zoo.catalogue import list_methods, method
    from pyrozoo.zoo.tasks import make_task

    task = make_task(spec["data"], spec["method"], 0, root)
    options = method(spec["method"]).options if spec["method"] in list_methods() else {}
    changes = {"frozen": False} if "frozen" in options else {}  # nothing has been pretrained
    spec = runs.with_overrides(dict(spec), options=changes)
    model = (make or runs.make_model)(spec, task, 0)
    if model.prepare is not None:
        raise ValueError(
            "the method makes its targets or centres anew in every epoch and draws nothing: it has"
            " no posterior, so that no guides can be compared"
        )
    leaves = [n for n in task.train.names if n != "y" or make is not None]
    settings: dict[str, Any] = {"epochs": 100, "batch_size": 256, "lr": 1e-3}
    settings |= {k: v for k, v in model.settings.items() if k in ("epochs", "batch_size", "lr")}
    settings |= spec.get("fit", {})
    hidden = model.options.get("hidden", (256, 256))
    return compare(
        model.program,
        named_guides(guides, task.train, leaves, hidden, model.objective.inputs, model.guide),
        task.train,
        objectives=named_objectives(objectives),
        test=task.test[:rows],
        seeds=seeds,
        effort=effort,
        inputs=model.objective.inputs,
        title=f"{spec['method']} on {spec['data'].get('name') or Path(spec['data']['file']).stem}",
        say=say,
        **settings,
    )


# ---- the ladder of truth -------------------------------------------------------------------------


def compare_rung(
    name: str,
    guides: Sequence[str] | None = None,
    objectives: Sequence[str] | None = None,
    *,
    seeds: int = 1,
    epochs: int | None = None,
    lr: float = 5e-3,
    num_particles: int = 16,
    hidden: Sequence[int] = (64, 64),
    effort: Effort | None = None,
    say: Callable[[str], None] | None = None,
) -> Comparison:
    """Compare guides on a program whose posterior is known (see :mod:`.truth`).

    Without ``epochs`` it has those of the rung.

    The learning rate falls to zero in the course of the fit; every step sees all rows, with
    ``num_particles`` draws of each for the bounds: few draws settle on one of two modes,
    and sticking the landing (the default, where all latents are local) is without noise where the
    guide is right.
    """
    from pyrozoo.inference import schedules

    rung = truth.rung(name)
    batch = Batch.of(rung.data)
    small, epochs = len(batch) <= 100, rung.epochs if epochs is None else epochs
    names = guides or [n for n in guide_names() if small or n not in AUTOGUIDES]
    losses = objectives or (["stl"] if rung.log_evidence is not None else ["elbo"])
    return compare(
        rung.program,
        named_guides(names, batch, [*rung.given, *rung.inputs], hidden, rung.inputs),
        batch,
        objectives=named_objectives(losses, num_particles),
        learn="guide",
        log_evidence=rung.log_evidence,
        reference=rung.draws,
        effort=effort,
        seeds=seeds,
        inputs=rung.inputs,
        title=rung.title,
        say=say,
        epochs=epochs,
        batch_size=len(batch),
        lr=lr,
        lr_schedule=schedules.cosine(epochs),
    )
