"""The seeds of :func:`.fit_seeds` that are fitted at once, and their loop."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Generator, Tensor

from pyrozoo.inference.batch import Batch, Data
from pyrozoo.inference.bounds.elbo import EnumELBO
from pyrozoo.inference.modes import seeded
from pyrozoo.inference.observing import Net
from pyrozoo.inference.seeds.together import NotCompiled, NotTraced, Together
from pyrozoo.inference.staging.staged import Staged
from pyrozoo.inference.training import checkpoint
from pyrozoo.inference.training.fit import stored_name, why_stop
from pyrozoo.inference.training.guarding import Guard
from pyrozoo.inference.training.progress import Bar
from pyrozoo.inference.training.result import Record, Result, evaluate
from pyrozoo.inference.training.rows import epoch_order, make_ready
from pyrozoo.inference.training.schedules import Schedule
from pyrozoo.inference.training.tracking import ROWS, Watch


@dataclass
class Member:
    """One of the seeds."""

    seed: int
    result: Result
    staged: Staged
    rows: Tensor  # numbers of its training rows in the data
    visits: Tensor  # which of them are visited in an epoch
    sample: Batch  # training rows that the bound of an epoch is taken of
    held_out: Batch | None
    guard: Guard
    order: Generator
    draws: Generator
    best: dict[str, Tensor] = field(default_factory=dict)
    best_score: float = -math.inf


@dataclass(frozen=True)
class Training:
    """Options of :func:`.fit_seeds` that all seeds share."""

    epochs: int
    batch_size: int
    lr: float
    lr_schedule: Schedule | None
    weights: Mapping[str, Schedule]
    scheduled: Mapping[str, Tensor]  # the weights as the objective has them
    clip: float | None
    patience: int | None
    callbacks: Sequence[Callable[[Result], bool | None]]
    compile: bool


def member(
    seed: int,
    program: Net,
    guide: Net,
    whole: Batch,
    objective: EnumELBO,
    batch_size: int,
    repeat: Mapping[str, int],
    validation: Data | float | None,
) -> Member:
    """A seed, with its rows checked as in a fit of its own.

    Raises:
        ValueError: data, sites or options do not fit.
    """
    p, q = objective.pair(program, guide)
    result = Result(program, guide, objective, objective.inputs)
    train, held_out, rows, visits, result.sites = make_ready(
        objective, p, q, whole, validation, repeat, seed, batch_size
    )
    if held_out is not None:
        held_out = held_out.to(whole.device)
    staged = Staged(objective, p, q, compile=False)
    names = {stored_name(n): x for n, x in staged.module.named_parameters() if x.requires_grad}
    if not names:
        raise ValueError("neither the program nor the guide has a parameter to train")
    guard = Guard(
        objective, p, q, names, rows, batch_size, lambda: "no checkpoint is kept", lambda _: None
    )
    guard.first = False  # what it would look for now is looked for by the tracer
    order, draws = Generator().manual_seed(seed), Generator(whole.device).manual_seed(seed)
    sample = train if len(train) <= ROWS else train[:ROWS]
    return Member(seed, result, staged, rows, visits, sample, held_out, guard, order, draws)


def at_once(team: Sequence[Member], whole: Batch, batch_size: int) -> Together:
    """The steps of all seeds as one graph.

    Raises:
        ValueError, NotTraced: as :class:`.Together`.
    """
    if len({len(m.visits) for m in team}) > 1:
        raise NotTraced("of rows that are repeated, the seeds hold out more or fewer")
    batches = []
    for m in team:
        some = torch.randperm(len(m.visits), generator=Generator().manual_seed(m.seed))
        batches.append(whole[m.rows[m.visits[some[:batch_size]]]])
    steps = Together([m.staged for m in team], batches, [m.seed for m in team])
    if steps.layout.coupled and len(team[0].visits) % len(batches[0]):
        raise NotTraced("a layer couples the rows of a batch, and the last batch is smaller")
    return steps


def run(
    team: Sequence[Member], whole: Batch, steps: Together, training: Training, bar: Bar
) -> None:
    """Fit all seeds; each stops when a fit of its own would.

    Raises:
        FloatingPointError, RuntimeError: see :func:`.fit_seeds`.
    """
    epochs, lead = training.epochs, team[0].guard
    lead.say = bar.say
    with bar, lead, steps:
        engine = torch.optim.Adam(steps.parameters, lr=training.lr, fused=True)
        bar.say(*(f"  {line}" for line in team[0].result.sites))
        if training.compile:
            try:
                steps.compile()
            except NotCompiled as error:
                warnings.warn(f"not compiled: {error}", stacklevel=3)
        bar.say(f"{len(team)} seeds at once, {steps.describe()}")
        for epoch in range(epochs):
            began = time.perf_counter()
            if (seed := steps.changed()) is not None:
                raise RuntimeError(
                    f"seed {seed}: a number in a module, or an option of the objective, was changed"
                    " during the fit; fit_seeds(..., together=False) allows it"
                )
            means = _epoch(team, whole, steps, engine, training, bar, epoch)
            running = [i for i, m in enumerate(team) if not m.result.stopped]
            lead.begin(epoch + 1, 0)
            found = [_figures(team[i], epoch, means[i]) for i in running]
            seconds = (time.perf_counter() - began) / len(running)
            bar.show(
                epoch + 1, epochs, {k: sum(r[k] for r in found) / len(found) for k in found[0]}
            )
            for i, record in zip(running, found, strict=True):
                if _finish(team[i], {**record, "seconds": seconds}, training):
                    steps.release(i)
            if all(m.result.stopped for m in team):
                break
    for m in team:
        if m.best:
            program, guide = m.result.program, m.result.guide
            checkpoint.unpack_modules(m.best, "the best state", program=program, guide=guide)


def _epoch(
    team: Sequence[Member],
    whole: Batch,
    steps: Together,
    engine: torch.optim.Optimizer,
    training: Training,
    bar: Bar,
    epoch: int,
) -> list[Record]:
    """Visit all rows once; gives the mean loss of each seed, and the norms of its gradients."""
    size = training.batch_size
    orders = [m.rows[epoch_order(m.sample, m.visits, m.order, size).cpu()] for m in team]
    pieces = torch.stack(orders).to(whole.device).split(size, 1)
    total = torch.zeros(len(team), device=whole.device)
    norms, largest = (torch.zeros_like(total, dtype=torch.float64) for _ in range(2))
    draws = [m.draws for m in team]
    for number, index in enumerate(pieces):
        now = epoch + number / len(pieces)
        if training.lr_schedule is not None:
            for group in engine.param_groups:
                group["lr"] = training.lr * training.lr_schedule(now)
        for name, schedule in training.weights.items():
            training.scheduled[name].fill_(schedule(now))
        team[0].guard.epoch, team[0].guard.step = epoch + 1, number + 1
        before = [g.get_state() for g in draws]
        losses, squares = steps.gradients(whole, index, draws)
        if not bool((losses + squares).isfinite().all()):
            for i, m in enumerate(team):
                if not m.result.stopped:
                    steps.gradients_of(i)
                    _check(m, losses[i], whole[index[i]], index[i], before[i], epoch, number)
        if training.clip is not None:
            factors = (training.clip / (squares.sqrt() + 1e-6)).clamp(max=1.0)
            for x in steps.parameters:
                if x.grad is not None:
                    x.grad.mul_(factors.reshape(-1, *[1] * (x.dim() - 1)))
        engine.step()
        total += losses * index.shape[1]
        norms += squares.sqrt()
        largest = torch.maximum(largest, squares.sqrt().to(largest))
        bar.step((epoch + (number + 1) / len(pieces)) / training.epochs)
    return [
        {"loss": loss / len(orders[0]), "grad_norm": norm / len(pieces), "grad_norm_max": top}
        for loss, norm, top in zip(total.tolist(), norms.tolist(), largest.tolist(), strict=True)
    ]


def _check(
    m: Member, loss: Tensor, batch: Batch, rows: Tensor, random: Tensor, epoch: int, number: int
) -> None:
    """Say what is not finite in a step of a seed, which is looked at again on its own."""
    with seeded(0):
        (torch.cuda if loss.is_cuda else torch).set_rng_state(random)
        m.guard.begin(epoch + 1, number + 1)
    local = torch.full((int(m.rows.max()) + 1,), -1).index_put((m.rows,), torch.arange(len(m.rows)))
    try:
        m.guard.check(loss, batch, local[rows.cpu()])
    except FloatingPointError as error:
        raise FloatingPointError(f"seed {m.seed}: {error}") from error


def _figures(m: Member, epoch: int, means: Record) -> Record:
    """The record of an epoch but for its time."""
    program, guide, objective = m.result.program, m.result.guide, m.result.objective
    record, watch = {"epoch": epoch + 1.0, "loss": means["loss"]}, Watch()
    record |= evaluate(program, guide, m.sample, objective, watch=watch)
    if m.held_out is not None:
        found = evaluate(program, guide, m.held_out, objective)
        record |= {f"val_{name}": value for name, value in found.items()}
    m.guard.begin(epoch + 1, 0)
    try:
        m.guard.check_record(record)
    except FloatingPointError as error:
        raise FloatingPointError(f"seed {m.seed}: {error}") from error
    watched = {**watch.figures(), **means}
    return record | {name: value for name, value in watched.items() if name not in record}


def _finish(m: Member, record: Record, training: Training) -> bool:
    """Note an epoch; whether it was the last."""
    result = m.result
    result.history.append(record)
    better = record.get("val_bound", -record["loss"])
    if better > m.best_score:
        m.best_score, result.best_epoch = better, result.epoch
        if m.held_out is not None:
            m.best = {k: v.detach().clone() for k, v in result.parameters.items()}
    result.stopped = why_stop(result, training.callbacks, training.patience)
    return bool(result.stopped)
