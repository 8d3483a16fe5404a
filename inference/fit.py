"""Fitting a program and a guide to data: one loop.

``fit(program, guide, {"x": images})`` clusters, classifies or imputes depending on which sites the
data hold; nothing else changes.  The data stay in one tensor per site and are sliced by a
permutation, the randomness is the fit's own, and what is evaluated along the way changes no
parameter.
"""

from __future__ import annotations

import csv
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyro
import torch
from lightning_fabric import Fabric
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from pyrozoo.inference import checkpoint
from pyrozoo.inference.batch import Batch, Data
from pyrozoo.inference.elbo import EnumELBO
from pyrozoo.inference.modes import evaluating, seeded
from pyrozoo.inference.observing import Net
from pyrozoo.inference.plan import check_values
from pyrozoo.inference.posterior import posterior, predict, responsibilities
from pyrozoo.inference.schedules import Schedule

Record = dict[str, float]


@dataclass
class Result:
    """A fitted pair: the modules (trained in place), what happened, and shortcuts to what follows.

    ``history`` has one record an epoch: ``epoch``, ``loss`` (the training objective, with its
    weights), ``bound`` (nats per datum, without), one value per term of the bound, ``val_*`` for
    held-out data, ``seconds``.  ``sites`` says in words what was done with each site.
    """

    program: Net
    guide: Net
    objective: EnumELBO
    inputs: tuple[str, ...] = ()
    history: list[Record] = field(default_factory=list)
    sites: list[str] = field(default_factory=list)
    best_epoch: int | None = None
    stopped: str = ""

    @property
    def epoch(self) -> int:
        """Epochs done."""
        return int(self.history[-1]["epoch"]) if self.history else 0

    @property
    def parameters(self) -> dict[str, Tensor]:
        """All parameters by name, detached."""
        return checkpoint.pack_modules(program=self.program, guide=self.guide)

    def evaluate(self, data: Data, num_particles: int = 1, seed: int = 0) -> Record:
        """The bound and its terms on data: see :func:`evaluate`."""
        return evaluate(
            self.program, self.guide, data, self.objective, num_particles=num_particles, seed=seed
        )

    def responsibilities(self, data: Data, site: str = "y", **options: Any) -> Tensor:
        """Probabilities of a finite site, ``(rows, K)``: :func:`.posterior.responsibilities`."""
        return responsibilities(self.program, self.guide, data, site, inputs=self.inputs, **options)

    def predict(self, data: Data, site: str, **options: Any) -> Tensor:
        """Probabilities or means of any site: see :func:`.posterior.predict`."""
        return predict(self.program, self.guide, data, site, inputs=self.inputs, **options)

    def posterior(self, data: Data, num_samples: int = 1, **options: Any) -> dict[str, Tensor]:
        """Draws of every latent site: see :func:`.posterior.posterior`."""
        return posterior(self.program, self.guide, data, num_samples, inputs=self.inputs, **options)

    def save(self, path: str | Path) -> None:
        """Write the parameters, the history and the sites to one safetensors file."""
        facts = {
            "kind": "fitted", "history": self.history, "sites": self.sites,
            "best_epoch": self.best_epoch, "stopped": self.stopped,
        }  # fmt: skip
        checkpoint.save(path, self.parameters, facts)

    def load(self, path: str | Path) -> Result:
        """Read what :meth:`save` wrote into this pair."""
        tensors, meta = checkpoint.load(path)
        checkpoint.unpack_modules(tensors, str(path), program=self.program, guide=self.guide)
        self.history, self.sites = meta["history"], meta["sites"]
        self.best_epoch, self.stopped = meta["best_epoch"], meta["stopped"]
        return self

    def write_history(self, path: str | Path) -> None:
        """Write the history as a CSV table."""
        names = list(dict.fromkeys(name for record in self.history for name in record))
        with Path(path).open("w", newline="") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(self.history)


def evaluate(
    program: Net,
    guide: Net,
    data: Data,
    objective: EnumELBO | None = None,
    *,
    num_particles: int = 1,
    seed: int = 0,
    batch_size: int = 1024,
) -> Record:
    """The bound and its terms in nats per datum, with all weights one and in evaluation mode.

    The draws are seeded and the global random state is left as it was, so that the same parameters
    give the same numbers.
    """
    options = objective or EnumELBO()
    plain = EnumELBO(
        num_particles, kl=options.kl, split=False, inputs=options.inputs, replace=options.replace
    )
    p, q = plain.pair(program, guide)
    batch = p.pairing.prepare(data)
    rows = options.num_rows or len(batch)
    sums: dict[str, float] = {}
    with torch.no_grad(), evaluating(p, q), pyro.validation_enabled(False), seeded(seed):
        for start in range(0, len(batch), batch_size):
            piece = batch[start : start + batch_size]
            for name, term in plain.terms(p, q, piece).items():
                share = term.sum() if term.dim() else term * (len(piece) / rows)
                sums[name] = sums.get(name, 0.0) + float(share) / len(batch)
    return {"bound": sum(sums.values()), **sums}


def fit(
    program: Net,
    guide: Net,
    data: Data,
    *,
    objective: EnumELBO | None = None,
    epochs: int = 100,
    batch_size: int = 256,
    lr: float = 1e-3,
    lr_schedule: Schedule | None = None,
    weights: Mapping[str, Schedule] | None = None,
    repeat: Mapping[str, int] | None = None,
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None,
    clip: float | None = None,
    validation: Data | float | None = None,
    patience: int | None = None,
    seed: int = 0,
    inputs: Iterable[str] = (),
    callbacks: Sequence[Callable[[Result], bool | None]] = (),
    folder: str | Path | None = None,
    resume: bool = False,
    save_every: int = 1,
    device: str = "auto",
    progress: bool = True,
    title: str = "",
) -> Result:
    """Fit a program and a guide to data by stochastic gradient ascent on the enumerated bound.

    Args:
        program: what generates the data; a module is trained in place.
        guide: what proposes the latent sites.
        data: a dictionary of site name -> tensor, array, masked array, ``(value, present)`` or
            None.
        objective: the bound and its options; default :class:`EnumELBO`, whose ``num_rows`` is set
            here.
        epochs: passes over the data, in total (those before a resume included).
        batch_size: rows per step.
        lr: learning rate; Adam (fused), unless ``optimizer`` makes another from the parameters.
        lr_schedule: factor on the rate as a function of the epoch, see :mod:`.schedules`.
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
        folder: where checkpoints go (``checkpoint.safetensors``); none by default.
        resume: go on from the checkpoint in ``folder`` if there is one, bit for bit.
        save_every: epochs between checkpoints.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        progress: show a progress bar and the sites.
        title: what the progress bar says.

    Returns:
        the result, with history and parameters; ``program`` and ``guide`` are trained.

    Raises:
        ValueError: data, sites or options do not fit, named in the message.
        FloatingPointError: the loss is no longer finite; the message names the terms.
    """
    _check_options(epochs, batch_size, lr, patience, resume, folder)
    objective = objective or EnumELBO()
    objective.inputs = tuple(dict.fromkeys([*objective.inputs, *inputs]))
    p, q = objective.pair(program, guide)
    train, held_out = _hold_out(p.pairing.prepare(data), validation, p.pairing, seed)
    if len(train) == 0:
        raise ValueError("there are no rows to fit")
    objective.num_rows = objective.num_rows or len(train)
    visits = _visits(train, repeat or {})
    plan = p.pairing.plan(train[:batch_size])
    for start in range(0, len(train), 4096):
        check_values(plan, train[start : start + 4096])
    result = Result(program, guide, objective, objective.inputs)
    result.sites = _describe(objective, p, q, train)

    fabric = Fabric(accelerator=device, devices=1)
    module = objective(p, q)
    parameters = [x for x in module.parameters() if x.requires_grad]
    if not parameters:
        raise ValueError("neither the program nor the guide has a parameter to train")
    make = optimizer or (lambda xs: torch.optim.Adam(xs, lr=lr, fused=True))
    engine = make(parameters)
    module, engine = fabric.setup(module, engine)
    train, held_out = fabric.to_device(train), fabric.to_device(held_out)
    base_rates = [group["lr"] for group in engine.param_groups]
    scheduled = {name: torch.ones((), device=fabric.device) for name in weights or {}}

    shown = "loss" if 0 in objective.weights.values() else "bound"
    objective.weights.update(scheduled)
    generator = torch.Generator().manual_seed(seed)
    state = _State(generator)
    path = None if folder is None else Path(folder) / "checkpoint.safetensors"
    with seeded(seed), pyro.validation_enabled(False), _bar(progress, title, shown) as bar:
        if path is not None and resume and path.exists():
            state.load(path, result, engine)
        if progress and bar.console:
            bar.say(result.sites)
        for epoch in range(result.epoch, epochs):
            started, total = time.perf_counter(), torch.zeros((), device=fabric.device)
            order = visits[torch.randperm(len(visits), generator=generator)].to(train.device)
            pieces = order.split(batch_size)
            for step, index in enumerate(pieces):
                now = epoch + step / len(pieces)
                if lr_schedule is not None:
                    for group, rate in zip(engine.param_groups, base_rates, strict=True):
                        group["lr"] = rate * lr_schedule(now)
                for name, schedule in (weights or {}).items():
                    scheduled[name].fill_(schedule(now))
                loss = module(train[index])
                engine.zero_grad()
                fabric.backward(loss)
                if clip is not None:
                    nn.utils.clip_grad_norm_(parameters, clip)
                engine.step()
                total += loss.detach() * len(index)
                bar.step((epoch + (step + 1) / len(pieces)) / epochs)
            mean = float(total) / len(visits)
            record = {"epoch": epoch + 1.0, "loss": mean}
            sample = train if len(train) <= 1000 else train[:1000]
            record |= evaluate(program, guide, sample, objective)
            _check_finite(record, epoch + 1)
            if held_out is not None:
                scores = evaluate(program, guide, held_out, objective)
                record |= {f"val_{name}": value for name, value in scores.items()}
            record["seconds"] = time.perf_counter() - started
            result.history.append(record)
            bar.show(epoch + 1, epochs, record)
            score = record.get("val_bound", -mean)
            if score > state.best_score:
                state.best_score, result.best_epoch = score, epoch + 1
                if held_out is not None:
                    state.best = checkpoint.pack_modules(program=program, guide=guide)
                    state.best = {k: v.detach().clone() for k, v in state.best.items()}
            asked = [callback(result) for callback in callbacks]
            if any(answer is True for answer in asked):
                result.stopped = "a callback"
            elif patience is not None and epoch + 1 - (result.best_epoch or 0) >= patience:
                result.stopped = f"no better bound for {patience} epochs"
            last = epoch + 1 == epochs or bool(result.stopped)
            if path is not None and (last or (epoch + 1) % save_every == 0):
                state.save(path, result, engine)
            if result.stopped:
                break
    if state.best:
        checkpoint.unpack_modules(state.best, "the best state", program=program, guide=guide)
    for name in scheduled:
        objective.weights.pop(name)
    return result


def _check_options(
    epochs: int, batch_size: int, lr: float, patience: int | None, resume: bool, folder: Any
) -> None:
    for name, value in (("epochs", epochs), ("batch_size", batch_size), ("lr", lr)):
        if not value > 0 or not math.isfinite(value):
            raise ValueError(f"{name} is positive, got {value}")
    if patience is not None and patience < 1:
        raise ValueError(f"patience is at least one epoch, got {patience}")
    if resume and folder is None:
        raise ValueError("resume=True needs the folder of the run")


def _hold_out(
    batch: Batch, validation: Data | float | None, pairing: Any, seed: int
) -> tuple[Batch, Batch | None]:
    if validation is None:
        return batch, None
    if isinstance(validation, float):
        if not 0 < validation < 1:
            raise ValueError(f"validation is data, or a fraction between 0 and 1, got {validation}")
        order = torch.randperm(len(batch), generator=torch.Generator().manual_seed(seed + 1))
        count = max(1, round(validation * len(batch)))
        return batch[order[count:]], batch[order[:count]]
    return batch, pairing.prepare(validation)


def _visits(batch: Batch, repeat: Mapping[str, int]) -> Tensor:
    """The rows of one epoch, ``(visits,)``: all of them, some more than once."""
    rows = [torch.arange(len(batch))]
    for name, times in repeat.items():
        if name not in batch or times < 1:
            raise ValueError(f"repeat={{{name!r}: {times}}}: a site of the data and a count from 1")
        known = batch.present(name).reshape(len(batch), -1).any(1).cpu().nonzero().squeeze(-1)
        rows.append(known.repeat(times - 1))
    return torch.cat(rows)


def _describe(objective: EnumELBO, p: Any, q: Any, batch: Batch) -> list[str]:
    with torch.no_grad():
        return objective.explain(p, q, batch)


def _check_finite(record: Record, epoch: int) -> None:
    bad = [name for name, value in record.items() if not math.isfinite(value)]
    if bad:
        raise FloatingPointError(
            f"epoch {epoch}: not finite: {', '.join(bad)}; try a smaller learning rate or clip="
        )


@dataclass
class _State:
    """What a resumed fit needs beyond the parameters."""

    generator: torch.Generator
    best_score: float = -math.inf
    best: dict[str, Tensor] = field(default_factory=dict)

    def save(self, path: Path, result: Result, engine: Any) -> None:
        tensors, slots = checkpoint.pack_optimizer(engine)
        random = {"torch": torch.get_rng_state(), "order": self.generator.get_state()}
        if torch.cuda.is_available():
            random["cuda"] = torch.cuda.get_rng_state()
        everything = {
            **result.parameters,
            **{f"optimizer.{k}": v for k, v in tensors.items()},
            **{f"random.{k}": v for k, v in random.items()},
            **{f"best.{k}": v for k, v in self.best.items()},
        }
        facts = {
            "kind": "training",
            "history": result.history,
            "sites": result.sites,
            "optimizer": slots,
            "best_score": self.best_score,
            "best_epoch": result.best_epoch,
            "stopped": result.stopped,
        }
        checkpoint.save(path, everything, facts)

    def load(self, path: Path, result: Result, engine: Any) -> None:
        tensors, meta = checkpoint.load(path)
        if meta.get("kind") != "training":
            raise ValueError(f"{path} has parameters, but not the state of a fit to go on from")
        checkpoint.unpack_modules(tensors, str(path), program=result.program, guide=result.guide)
        part = {
            prefix: {
                k.removeprefix(f"{prefix}."): v
                for k, v in tensors.items()
                if k.startswith(f"{prefix}.")
            }
            for prefix in ("optimizer", "random", "best")
        }
        checkpoint.unpack_optimizer(engine, part["optimizer"], meta["optimizer"])
        torch.set_rng_state(part["random"]["torch"])
        self.generator.set_state(part["random"]["order"])
        if "cuda" in part["random"]:
            torch.cuda.set_rng_state(part["random"]["cuda"])
        self.best, self.best_score = part["best"], meta["best_score"]
        result.history, result.best_epoch = meta["history"], meta["best_epoch"]
        result.stopped = meta["stopped"]


class _bar:
    """A progress bar: epoch, bound in nats per datum, time left."""

    def __init__(self, show: bool, title: str, shown: str) -> None:
        self.shown = shown  # "bound", or "loss" where the objective is no bound
        self.console = Console(stderr=True) if show else None
        self.title = title
        self.progress: Progress | None = None

    def __enter__(self) -> _bar:
        if self.console is not None:
            self.progress = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                TextColumn("{task.fields[text]}"),
                TimeRemainingColumn(),
                console=self.console,
            )
            self.task = self.progress.add_task(self.title or "fit", total=1.0, text="")
            self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.progress is not None:
            self.progress.stop()

    def say(self, lines: Iterable[str]) -> None:
        assert self.console is not None
        for line in lines:
            self.console.print(f"  {line}", highlight=False)

    def step(self, done: float) -> None:
        if self.progress is not None:
            self.progress.update(self.task, completed=done)

    def show(self, epoch: int, epochs: int, record: Record) -> None:
        if self.progress is not None:
            name = "val_bound" if "val_bound" in record else self.shown
            text = f"epoch {epoch}/{epochs}  {name} {record[name]:.2f} nats per datum"
            self.progress.update(self.task, text=text)
