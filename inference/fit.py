"""Fitting a program and a guide to data: one loop.

``fit(program, guide, {"x": images})`` clusters, classifies or imputes depending on which sites the
data hold; nothing else changes.  The data stay in one tensor per site and are sliced by a
permutation, the randomness is the fit's own, and what is evaluated along the way changes no
parameter.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyro
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from pyrozoo.inference import checkpoint
from pyrozoo.inference.batch import Batch, Data
from pyrozoo.inference.elbo import EnumELBO
from pyrozoo.inference.modes import seeded
from pyrozoo.inference.observing import Net
from pyrozoo.inference.plan import check_values
from pyrozoo.inference.progress import Bar
from pyrozoo.inference.result import Record, Result, evaluate
from pyrozoo.inference.schedules import Schedule


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
    with seeded(seed), pyro.validation_enabled(False), Bar(progress, title, shown) as bar:
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
