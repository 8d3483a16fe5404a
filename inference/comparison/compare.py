"""Which guide should I trust?  One program, several guides, the same budget and the same measures.

``compare(program, {"mean field": make_one, "flow": make_other}, data, epochs=200)`` fits each guide
with each objective from each seed, measures all of them alike (:mod:`.measuring`) and gives a table
to print, to paste or to store, and a page to look at.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from pyrozoo.inference.batch import Batch, Data
from pyrozoo.inference.bounds.elbo import EnumELBO
from pyrozoo.inference.comparison.measures import (
    Effort,
    Reference,
    check_truth,
    words,
)
from pyrozoo.inference.comparison.measuring import measure
from pyrozoo.inference.comparison.outcome import Cell, Comparison
from pyrozoo.inference.comparison.references import nuts
from pyrozoo.inference.graph import modules_of
from pyrozoo.inference.modes import seeded
from pyrozoo.inference.observing import Net, observe
from pyrozoo.inference.training.fit import fit
from pyrozoo.inference.training.result import Result

Guide = nn.Module | Callable[[Any], nn.Module]
Objective = EnumELBO | Callable[[], EnumELBO]


def compare(
    program: Net,
    guides: Mapping[str, Guide],
    data: Data,
    *,
    objectives: Mapping[str, Objective] | None = None,
    test: Data | None = None,
    learn: str = "both",
    log_evidence: Tensor | None = None,
    reference: Reference | str | None = None,
    effort: Effort | None = None,
    seeds: int | Iterable[int] = 1,
    target: float | None = None,
    inputs: Iterable[str] = (),
    title: str = "",
    say: Callable[[str], None] | None = None,
    **settings: Any,
) -> Comparison:
    """Fit several guides to one program and data, and measure all of them alike.

    Args:
        program: what generates the data; each cell has a copy of it.
        guides: name -> a guide (copied, together with the program if it refers to it), or a
            function that makes one from the program.  A guide that does not fit the program has the
            reason in place of figures.
        data: what is observed in training.
        objectives: name -> an objective, or a function that makes one; default ``{"ELBO":
            EnumELBO}``.  They decide how the guides are trained, not how they are measured.
        test: rows to measure on, some thousand at most; default: ``data``.
        learn: ``"both"`` fits the program's parameters, too, each copy its own; ``"guide"`` leaves
            them as they are.
        log_evidence: log p(observed) of each measured row, where it is known.  Where it is not, and
            all guides have the same program (nothing of it is learnt), gaps are taken to what
            the weights of the guide with the best bound give.
        reference: draws from the exact posterior of the measured rows, a function ``(count, seed)``
            that makes them, or ``"nuts"``; it needs a program that is not learnt.
        effort: how much to spend on measuring.
        seeds: how many, or which; of the guides' initial parameters, the fit and all draws.
        target: bound for ``seconds_to_target``; default: the least of the best bounds reached.
        inputs: names of values that are read but are no sites.
        title: default: the name of the program.
        say: called with a line about each cell, such as ``print``.
        settings: of :func:`pyrozoo.inference.fit`, the same for all: ``epochs``, ``batch_size``,
            ``lr``...

    Returns:
        a :class:`.Comparison`: ``table()``, ``to_latex()``, ``write_csv()``, ``write()`` (a page),
        ``to_arviz()``; ``cells`` holds the fitted guides and their measures, bounds in nats per
        datum.

    Raises:
        TypeError, ValueError: an option, the data, the log-evidence or the reference do not fit, or
            nothing could be fitted.
    """
    inputs, say = tuple(inputs), say or (lambda line: None)
    losses: Any = {"ELBO": EnumELBO} if objectives is None else objectives
    numbers = _check(guides, losses, learn, seeds)
    frozen = _copies(program, learn)[0]
    learnt = any(p.requires_grad for p in _parameters(frozen))
    measured = data if test is None else test
    truth = _truth(frozen, measured, log_evidence, reference, learnt, inputs, numbers[0])
    settings.setdefault("progress", False)
    cells = [Cell(g, label, seed) for g in guides for label in losses for seed in numbers]
    for cell in cells:
        try:
            loss = losses[cell.objective]
            _fit(cell, program, guides[cell.guide], data, loss, learn, inputs, settings)
        except Exception as error:  # of this guide; the others go on
            cell.reason = f"not fitted, {_why(error)}"
        try:
            if cell.result is not None:
                _measure(cell, measured, effort, log_evidence, truth, inputs)
        except Exception as error:
            cell.reason = f"not measured, {_why(error)}"
        shown = cell.measures.figures.get("elbo", math.nan)
        line = cell.reason or f"ELBO {shown:.3f} nats per datum"
        say(f"{cell.name}, seed {cell.seed}: {line}")
    done = [c for c in cells if not c.reason]
    if not done:
        reasons = dict.fromkeys(f"{c.name}: {c.reason}" for c in cells)
        raise ValueError("no guide is left to compare; " + "; ".join(reasons))
    rows = len(Batch.of(measured))
    if not learnt and log_evidence is None:
        _share_evidence(done, rows)
    name = getattr(program, "__name__", type(program).__name__)
    found = Comparison(title or name, cells, rows)
    _race(found, done, target)
    return found


def _check(
    guides: Mapping[str, Guide],
    objectives: Mapping[str, Objective],
    learn: str,
    seeds: int | Iterable[int],
) -> list[int]:
    """The seeds, if the options fit."""
    if learn not in ("both", "guide"):
        raise ValueError(f"learn is 'both' or 'guide', got {learn!r}")
    for what, named in (("guides", guides), ("objectives", objectives)):
        if not isinstance(named, Mapping):
            raise TypeError(f"{what} are a dictionary of names, got {type(named).__name__}")
        for name, value in named.items():
            if not callable(value) and not isinstance(value, EnumELBO):
                raise TypeError(f"{what}: {name!r} is nothing that could be used, got {value!r}")
    if not guides:
        raise ValueError("there is no guide to compare")
    numbers = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    whole = all(isinstance(n, int) and not isinstance(n, bool) for n in numbers)
    if isinstance(seeds, bool) or not numbers or not whole or len(set(numbers)) < len(numbers):
        raise ValueError(f"seeds are a positive number, or different whole numbers, got {seeds!r}")
    return numbers


def _truth(
    program: Net,
    measured: Data,
    log_evidence: Tensor | None,
    reference: Reference | str | None,
    learnt: bool,
    inputs: tuple[str, ...],
    seed: int,
) -> Reference | None:
    """The reference, run if it is to be run."""
    if isinstance(reference, str) and reference != "nuts":
        raise ValueError(f"reference is draws, a function or 'nuts', got {reference!r}")
    if reference is not None and learnt:
        raise ValueError("a reference needs learn='guide': else each guide has its own program")
    if reference == "nuts":
        reference = nuts(program, measured, inputs=inputs, seed=seed).draws
    assert not isinstance(reference, str)
    batch = observe(program, inputs).pairing.prepare(measured)
    check_truth(program, batch, log_evidence, reference, inputs)
    return reference


def _why(error: Exception) -> str:
    text = words(error)
    usual = (ValueError, TypeError, NotImplementedError, FloatingPointError, ImportError)
    return text if text and isinstance(error, usual) else f"{type(error).__name__}: {text}"


def _parameters(*nets: Any) -> list[nn.Parameter]:
    return list({id(p): p for n in nets for m in modules_of(n) for p in m.parameters()}.values())


def _copies(program: Net, learn: str, guide: Any = None) -> tuple[Any, Any]:
    """Copies of both, in which the guide refers to the program's copy; frozen, if it is to be."""
    own, made = copy.deepcopy((program, guide if isinstance(guide, nn.Module) else None))
    if learn == "guide":
        for parameter in _parameters(own):
            parameter.requires_grad_(False)
    return own, made


def _fit(
    cell: Cell,
    program: Net,
    guide: Guide,
    data: Data,
    objective: Objective,
    learn: str,
    inputs: tuple[str, ...],
    settings: Mapping[str, Any],
) -> None:
    own, made = _copies(program, learn, guide)
    with seeded(cell.seed):
        made = guide(own) if made is None else made
        loss = copy.copy(objective) if isinstance(objective, EnumELBO) else objective()
    trained = [p for p in _parameters(own, made) if p.requires_grad]
    if trained:
        cell.result = fit(
            own, made, data, objective=loss, seed=cell.seed, inputs=inputs, **settings
        )
    else:
        cell.result = Result(own, made, loss, inputs)
    theirs = {id(p) for p in _parameters(own)}
    figures = cell.measures.figures
    figures["parameters"] = float(sum(p.numel() for p in _parameters(made) if id(p) not in theirs))
    if history := cell.result.history:
        steps = math.ceil(len(Batch.of(data)) / settings.get("batch_size", 256))
        figures["ms_per_step"] = 1e3 * statistics.median(r["seconds"] for r in history) / steps
        last = history[-1]
        figures |= {k: last[k] for k in last if k.startswith("active_")}


def _measure(
    cell: Cell,
    measured: Data,
    effort: Effort | None,
    log_evidence: Tensor | None,
    reference: Reference | None,
    inputs: tuple[str, ...],
) -> None:
    assert cell.result is not None
    costs = cell.measures.figures
    cell.measures = measure(
        cell.result.program, cell.result.guide, measured, effort=effort,
        log_evidence=log_evidence, reference=reference, inputs=inputs, seed=cell.seed,
    )  # fmt: skip
    cell.measures.figures |= costs


def _share_evidence(cells: Iterable[Cell], rows: int) -> None:
    """All have the same evidence: that by the weights of the guide with the best bound."""
    found = [c.measures for c in cells if "elbo" in c.measures.figures]
    if not found:
        return
    best = max(found, key=lambda m: m.figures["elbo"])
    evidence = max(best.evidence, best.figures["elbo"])
    parts: dict[int, tuple[float, float]] = {}  # rows -> best refined bound, log-evidence
    for measures in found:
        if measures.refined is not None:
            some, _, after, part = measures.refined
            parts[some] = max(parts.get(some, (-math.inf, -math.inf)), (after, max(after, part)))
    parts[rows] = (0.0, evidence)
    for measures in found:
        some = measures.refined[0] if measures.refined else rows
        measures.set_gaps(evidence, parts[some][1])


def _race(found: Comparison, cells: Iterable[Cell], target: float | None) -> None:
    """Seconds of training until the bound of the training rows first reached the target."""
    racing = [c for c in cells if c.result and c.result.history and "elbo" in c.measures.figures]
    if not racing:
        return
    best = [max(r["bound"] for r in c.result.history) for c in racing if c.result]
    found.target = min(best) if target is None else target
    for cell in racing:
        assert cell.result is not None
        passed, cell.late = 0.0, True
        for record in cell.result.history:
            passed += record["seconds"]
            if record["bound"] >= found.target:
                cell.measures.figures["seconds_to_target"] = passed
                cell.late = False
                break
