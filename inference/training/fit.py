"""Fitting a program and a guide to data: one loop.

``fit(program, guide, {"x": images})`` clusters, classifies or imputes depending on which sites the
data hold; nothing else changes.  The data stay in one tensor per site, or on disk
(:mod:`.stored`), and are sliced by a permutation, the randomness is the fit's own, and what is
evaluated along the way changes no parameter.
"""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from pyrozoo.inference.batch import Batch, Data
from pyrozoo.inference.bounds.elbo import EnumELBO, own_copy
from pyrozoo.inference.disk.loading import Reader
from pyrozoo.inference.modes import seeded
from pyrozoo.inference.observing import Net
from pyrozoo.inference.reading import read_count
from pyrozoo.inference.staging.staged import Staged, stage
from pyrozoo.inference.training import checkpoint, processes
from pyrozoo.inference.training.facts import settings_of
from pyrozoo.inference.training.guarding import Guard, out_of_memory
from pyrozoo.inference.training.progress import Bar
from pyrozoo.inference.training.result import Record, Result, evaluate
from pyrozoo.inference.training.rows import epoch_order, make_ready, mixing
from pyrozoo.inference.training.schedules import Schedule, read_schedule
from pyrozoo.inference.training.state import State
from pyrozoo.inference.training.tracking import ROWS, Norms, Tracker, Watch


def fit(
    program: Net,
    guide: Net,
    data: Data,
    *,
    objective: EnumELBO | None = None,
    epochs: int = 100,
    batch_size: int = 256,
    lr: float = 1e-3,
    lr_schedule: Schedule | str | None = None,
    weights: Mapping[str, Schedule] | None = None,
    repeat: Mapping[str, int] | None = None,
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None,
    clip: float | None = None,
    validation: Data | float | None = None,
    patience: int | None = None,
    seed: int = 0,
    inputs: Iterable[str] = (),
    callbacks: Sequence[Callable[[Result], bool | None]] = (),
    tracker: Tracker | None = None,
    folder: str | Path | None = None,
    resume: bool = False,
    save_every: int = 1,
    start: Callable[[], None] | None = None,
    decided_by: Mapping[str, Any] | None = None,
    compile: bool = False,
    device: str = "auto",
    devices: int | str | None = None,
    progress: bool = True,
    title: str = "",
) -> Result:
    """Fit a program and a guide to data by stochastic gradient ascent on the enumerated bound.

    Args:
        program: what generates the data; a module is trained in place.
        guide: what proposes the latent sites.
        data: a dictionary of site name -> tensor, array, masked array, ``(value, present)`` or
            None; or rows on disk, :class:`.Stored`, which are read ahead while a step computes.
        objective: the bound and its options; default :class:`EnumELBO`.  The result has a copy
            whose ``num_rows`` is that of the training rows.
        epochs: passes over the data, in total (those before a resume included).
        batch_size: rows per step.
        lr: learning rate; Adam (fused), unless ``optimizer`` makes another from the parameters.
        lr_schedule: factor on the rate as a function of the epoch, see :mod:`.schedules`, or
            ``"cosine"``: it falls to 0.02 in the course of the fit.
        weights: site -> schedule of the weight of its term (KL warm-up: ``{"z": linear(0, 1,
            10)}``).
        repeat: site -> how often in an epoch the rows that know it are visited; they count as often
            in the objective.  For few labels among many rows.
        optimizer: parameters -> torch optimiser, in place of Adam with ``lr``.
        clip: largest norm of the gradient.
        validation: held-out data, or the fraction of rows to hold out; then the parameters with the
            best held-out bound are kept.
        patience: stop after so many epochs without a better bound (held-out, else of the training
            rows).
        seed: of the permutation, the draws and the held-out rows; the global state is left alone.
        inputs: names of values that are read but are no sites.
        callbacks: plain functions, called with the result after every epoch; returning True stops.
            On resuming a run that had stopped they are asked again.
        tracker: keeps latents and clusters of some rows for a report, see :mod:`.tracking`; of
            several processes the first one's.
        folder: where checkpoints go (``checkpoint.safetensors``); none by default.  One fit at a
            time; the first is written before the first step.
        resume: go on from the checkpoint in ``folder`` if there is one, bit for bit (but for the
            ``seconds``).  Only ``epochs``, ``patience``, ``callbacks`` and what does not decide the
            numbers may differ from the interrupted run.
        save_every: epochs between checkpoints.
        start: called before the first epoch, when there is no checkpoint to go on from
            (pretraining).
        decided_by: what else decides the numbers, by name, such as options that the program was
            made with: a resumed fit needs the same.
        compile: stage the loss and its gradient and compile them, see :mod:`.staging`: 10 to 60
            seconds once, then faster steps.  Where that cannot be done, a warning says why.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        devices: how many processes share each batch, one on each device, or ``"auto"``, one on each
            GPU; see :mod:`.processes`.  Default: those that torchrun, SLURM or ``fabric run``
            started, else one.  All of them call callbacks; the first one's answer counts.
        progress: show a progress bar and the sites.
        title: what the progress bar says.

    Returns:
        the result, with history and parameters; ``program`` and ``guide`` are trained.

    Raises:
        ValueError: data, sites or options do not fit, named in the message; or the checkpoint is
            damaged, or of a run with other settings.
        FileExistsError: the folder has a checkpoint and ``resume`` is false.
        OSError: the folder cannot be written.
        RuntimeError: another fit is at work in the folder.
        FloatingPointError: the loss or its gradient is not finite.  Raised before the parameters
            are touched; names the step, and the sites, rows or parameters that it comes from.  On a
            GPU every step is waited for, to see this.
        MemoryError: there is not enough; the message has a smaller batch size.

    Whatever is raised, the last checkpoint stays.
    """
    check_options(epochs, batch_size, lr, patience, resume, folder)
    lr_schedule = read_schedule(lr_schedule, epochs)
    objective = own_copy(objective, inputs)
    p, q = objective.pair(program, guide)
    result = Result(program, guide, objective, objective.inputs)
    train, held_out, rows, visits, result.sites = make_ready(
        objective, p, q, data, validation, repeat or {}, seed, batch_size
    )
    ranks = processes.start(device, devices)
    fabric = ranks.fabric
    module = objective(p, q)
    names = {stored_name(n): x for n, x in module.named_parameters() if x.requires_grad}
    if not names:
        raise ValueError(
            "neither the program nor the guide has a parameter to train (pyro.param is not seen"
            " here: make it an nn.Parameter of a module, or fit with pyro.infer.SVI)"
        )

    with ranks.claim(folder, resume) as (path, going_on):
        if start is not None and not going_on:
            with ranks.together():
                start()
        parameters = list(names.values())
        make = optimizer or (lambda xs: torch.optim.Adam(xs, lr=lr, fused=True))
        engine = make(parameters)
        if not isinstance(engine, torch.optim.Optimizer):
            raise TypeError(
                "optimizer is a function that makes a torch optimiser of the parameters, such as"
                f" lambda xs: torch.optim.Adam(xs, lr=1e-3), but gave {type(engine).__name__}"
            )
        base_rates = [group["lr"] for group in engine.param_groups]
        schedules = {f"weight of {name}": schedule for name, schedule in (weights or {}).items()}
        schedules |= {} if lr_schedule is None else {"lr": lr_schedule}
        settings = {} if path is None and ranks.size == 1 else settings_of(
            program, guide, objective, train, held_out, engine, batch_size=batch_size, clip=clip,
            seed=seed, repeat=repeat or {}, schedules=sorted(schedules), device=fabric.device.type,
            others={
                **(decided_by or {}), **({"compile": True} if compile else {}), **ranks.facts,
                **mixing(train),
            },
        )  # fmt: skip
        ranks.same({**settings, **{n: list(x.shape) for n, x in names.items()}, "epochs": epochs})
        module, engine = fabric.setup(module, engine)
        values = [*module.parameters(), *module.buffers()]
        ranks.level(values)
        train, held_out = fabric.to_device(train), fabric.to_device(held_out)
        scheduled = {name: torch.ones((), device=fabric.device) for name in weights or {}}
        generator = torch.Generator().manual_seed(seed)
        state = State(
            path, result, engine, settings, list(names), schedules, generator,
            lambda: evaluate(p, q, train[:32], objective)["bound"], writes=ranks.first,
        )  # fmt: skip
        shown = "loss" if 0 in objective.weights.values() else "bound"
        bar = Bar(progress and ranks.first, title, shown)
        guard = Guard(objective, p, q, names, rows, batch_size, state.describe, bar.say)
        norms = Norms(fabric.device)
        staged: Staged | None = None

        def step_of(batches: Iterator[Batch], index: Tensor, share: float) -> Tensor:
            """A step of the optimiser on this process' share of a batch; gives the whole's loss."""
            if staged is not None and fabric.device.type == "cuda" and ranks.size == 1:
                batch = next(batches)
                check = functools.partial(guard.check, batch=batch, index=index)
                loss = staged.step(batch, engine.optimizer, clip, check)
                if clip is None:  # else the gradient is clipped already
                    norms.add(parameters)
                return loss
            with ranks.step(parameters, share) as mine:
                if len(index):
                    batch = next(batches)
                    if staged is None:
                        mine.loss = module(batch)
                        engine.zero_grad()
                        fabric.backward(mine.loss)
                    else:
                        mine.loss = staged(batch)
                    guard.check(mine.loss, batch, index)
            norm = norms.add(parameters)
            if clip is not None:
                nn.utils.clip_grads_with_norm_(parameters, clip, norm)
            engine.step()
            return mine.loss.detach()

        def run_epoch(epoch: int) -> float:
            """Visit all rows once; gives the mean loss."""
            total = torch.zeros((), device=fabric.device)
            pieces = epoch_order(train, visits, generator, batch_size).split(batch_size)
            shares = [ranks.share(piece) for piece in pieces]
            batches = reader.batches([index for index in shares if len(index)])
            for step, (piece, index) in enumerate(zip(pieces, shares, strict=True)):
                now = epoch + step / len(pieces)
                if lr_schedule is not None:
                    for group, rate in zip(engine.param_groups, base_rates, strict=True):
                        group["lr"] = rate * lr_schedule(now)
                for name, schedule in (weights or {}).items():
                    scheduled[name].fill_(schedule(now))
                guard.begin(epoch + 1, step + 1)
                total += len(piece) * step_of(batches, index, len(index) / len(piece))
                bar.step((epoch + (step + 1) / len(pieces)) / epochs)
            return float(total) / len(visits)

        def figures(epoch: int, mean: float, started: float) -> Record:
            """The record of an epoch."""
            record, watch = {"epoch": epoch + 1.0, "loss": mean}, Watch()
            record |= score(train if len(train) <= ROWS else train[:ROWS], watch)
            if held_out is not None:
                record |= {f"val_{name}": value for name, value in score(held_out).items()}
            guard.check_record(record)
            watched = {**watch.figures(), **norms.figures()}
            record |= {name: value for name, value in watched.items() if name not in record}
            if tracker is not None:
                tracker.note(epoch + 1, rows[:ROWS], watch)
            return {**record, "seconds": time.perf_counter() - started}

        def score(batch: Batch, watch: Watch | None = None) -> Record:
            """The bound of a batch, in slices of a step's size if there is no memory for more."""
            try:
                return evaluate(p, q, batch, objective, watch=watch)
            except (MemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
            return evaluate(p, q, batch, objective, batch_size=batch_size, watch=watch)

        unchecked, weighted = pyro.validation_enabled(False), with_weights(objective, scheduled)
        with seeded(seed), unchecked, weighted, guard, bar, Reader(train) as reader:
            bar.say(title or "fit", *(f"  {line}" for line in result.sites), *ranks.words)
            if going_on:
                with ranks.together():
                    state.load(epochs)
                if result.stopped:
                    result.stopped = ranks.each(lambda: why_stop(result, callbacks, patience))
                bar.say(f"going on after epoch {result.epoch}")
            else:
                with ranks.together():
                    state.save()
            if compile and result.epoch < epochs and not result.stopped:
                some = torch.randperm(len(visits), generator=torch.Generator().manual_seed(seed))
                example = train[ranks.share(visits[some[:batch_size]]).to(train.device)]
                with ranks.together():
                    staged = stage(objective, p, q, example)
                bar.say(staged.describe())
            while result.epoch < epochs and not result.stopped:
                epoch, started = result.epoch, time.perf_counter()
                ranks.reseed(seed, epoch)
                mean = run_epoch(epoch)
                guard.begin(epoch + 1, 0)
                record = ranks.once(functools.partial(figures, epoch, mean, started))
                result.history.append(record)
                bar.show(epoch + 1, epochs, record)
                better = record.get("val_bound", -mean)
                if better > state.best_score:
                    state.best_score, result.best_epoch = better, epoch + 1
                    if held_out is not None:
                        state.keep_best()
                result.stopped = ranks.each(lambda: why_stop(result, callbacks, patience))
                ranks.level(values)
                if epoch + 1 == epochs or result.stopped or (epoch + 1) % save_every == 0:
                    with ranks.together():
                        state.save()
    if state.best:
        checkpoint.unpack_modules(state.best, "the best state", program=program, guide=guide)
    return result


@contextlib.contextmanager
def with_weights(objective: EnumELBO, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Give the objective these weights; afterwards it has its own again."""
    before = dict(objective.weights)
    objective.weights.update(weights)
    try:
        yield
    finally:
        objective.weights.clear()
        objective.weights.update(before)


def why_stop(
    result: Result, callbacks: Iterable[Callable[[Result], bool | None]], patience: int | None
) -> str:
    """Why the fit stops after this epoch ('' if it goes on)."""
    asked = [callback(result) for callback in callbacks]
    if any(answer is True for answer in asked):
        return "a callback"
    if patience is not None and result.epoch - (result.best_epoch or 0) >= patience:
        return f"no better bound for {patience} epochs"
    return ""


def stored_name(parameter: str) -> str:
    """``program.<name>`` or ``guide.<name>``, as a checkpoint has it."""
    half, _, rest = parameter.partition(".")
    rest = rest.removeprefix("module.").removeprefix("inside.")
    return f"{'guide' if half == 'guide' else 'program'}.{rest}"


def check_options(
    epochs: int, batch_size: int, lr: float, patience: int | None, resume: bool, folder: Any
) -> None:
    """Raise ValueError where an option of a fit is out of its range."""
    read_count("epochs", epochs)
    read_count("batch_size", batch_size)
    if not lr > 0 or not math.isfinite(lr):
        raise ValueError(f"lr is positive, got {lr}")
    if patience is not None and patience < 1:
        raise ValueError(f"patience is at least one epoch, got {patience}")
    if resume and folder is None:
        raise ValueError("resume=True needs the folder of the run")
