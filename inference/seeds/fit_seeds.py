"""Fitting a program and a guide with several seeds, small ones all at once.

A step of a small model is mostly Python, calls of small operations and the optimiser.
:func:`fit_seeds` makes the steps of all seeds one step on stacked parameters (:mod:`.together`).
Every seed keeps its own parameters, permutations, draws and held-out rows, so that its numbers are
those of a staged fit of its own, but for rounding.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pyro
import torch
from lightning_fabric import Fabric

from pyrozoo.inference.batch import Batch, Data
from pyrozoo.inference.bounds.elbo import EnumELBO, own_copy
from pyrozoo.inference.disk.stored import Stored
from pyrozoo.inference.graph import modules_of
from pyrozoo.inference.modes import seeded
from pyrozoo.inference.observing import Net
from pyrozoo.inference.seeds.team import Training, at_once, member, run
from pyrozoo.inference.seeds.together import NotTraced
from pyrozoo.inference.training.fit import check_options, fit, with_weights
from pyrozoo.inference.training.progress import Bar
from pyrozoo.inference.training.result import Result
from pyrozoo.inference.training.schedules import Schedule, read_schedule

MOST_FLOPS = 10**9  # in a step of one seed: above, matrix products take nearly all of the time
_ALONE = "seeds are fitted one after another"


def fit_seeds(
    make: Callable[[int], tuple[Net, Net]],
    data: Data,
    *,
    seeds: Iterable[int] = range(5),
    objective: EnumELBO | None = None,
    epochs: int = 100,
    batch_size: int = 256,
    lr: float = 1e-3,
    lr_schedule: Schedule | str | None = None,
    weights: Mapping[str, Schedule] | None = None,
    repeat: Mapping[str, int] | None = None,
    clip: float | None = None,
    validation: Data | float | None = None,
    patience: int | None = None,
    inputs: Iterable[str] = (),
    callbacks: Sequence[Callable[[Result], bool | None]] = (),
    start: Callable[[int, Any, Any], None] | None = None,
    compile: bool = False,
    together: bool | str = "auto",
    device: str = "auto",
    progress: bool = True,
    title: str = "",
) -> list[Result]:
    """Fit pairs of one architecture to the same data, one for each seed.

    Args:
        make: seed -> program and guide, new ones in every call.  It is called with torch's random
            state at the seed.
        data: as in :func:`.fit`; in memory, for all at once.
        seeds: of the parameters, permutations, draws and held-out rows.
        objective, epochs, batch_size, lr, lr_schedule, weights, repeat, clip, validation, inputs,
            device, progress, title: as in :func:`.fit`.  The optimiser is a fused Adam, gradients
            are clipped for each seed, and nothing is written to a folder.
        patience, callbacks: as in :func:`.fit`, for each seed; one that stops stays as it is while
            the others go on.
        start: called with seed, program and guide before the first epoch, for one seed after the
            other (pretraining).
        compile: compile the graph of the steps, once for all seeds: 10 to 60 seconds.
        together: all seeds at once, or one after another.  ``"auto"``: at once, if there are two
            or more and a step of one has at most ``MOST_FLOPS`` multiplications and additions.
            What cannot be run at once is fitted one after another, and a warning says why.

    Returns:
        the results in the order of the seeds, each as that of :func:`.fit`; the ``seconds`` of an
        epoch are an equal share of the time that all took.

    Raises:
        ValueError: no seed, or one twice; the pairs differ in a parameter, or share one, named in
            the message; or as :func:`.fit`.
        TypeError: a seed is no whole number, or ``make`` returns no pair.
        FloatingPointError: as :func:`.fit`, with the seed.
        RuntimeError: a number in a module was changed during the fit, all at once.
    """
    check_options(epochs, batch_size, lr, patience, False, None)
    lr_schedule = read_schedule(lr_schedule, epochs)
    if together not in (True, False, "auto"):
        raise ValueError(f"together is True, False or 'auto', got {together!r}")
    pairs, inputs = _pairs(make, seeds), tuple(inputs)

    def one_by_one() -> list[Result]:
        """Every seed by a fit of its own."""
        return [
            fit(
                *pair,
                data,
                objective=objective,
                epochs=epochs,
                batch_size=batch_size,
                lr=lr,
                lr_schedule=lr_schedule,
                weights=weights,
                repeat=repeat,
                clip=clip,
                validation=validation,
                patience=patience,
                seed=seed,
                inputs=inputs,
                callbacks=callbacks,
                compile=compile,
                device=device,
                progress=progress,
                start=None if start is None else functools.partial(start, seed, *pair),
                title=f"{title or 'fit'}, seed {seed}",
            )
            for seed, pair in pairs.items()
        ]

    if len(pairs) == 1 or together is False:
        return one_by_one()
    shared = own_copy(objective, inputs)
    whole = _prepared(pairs, data, shared, device)
    if isinstance(whole, Stored):
        warnings.warn(f"{_ALONE}: the rows are read from disk", stacklevel=2)
        return one_by_one()
    team = [
        member(seed, *pair, whole, own_copy(shared), batch_size, repeat or {}, validation)
        for seed, pair in pairs.items()
    ]
    if start is not None:
        for seed, pair in pairs.items():
            start(seed, *pair)
        start = None
    scheduled = {name: torch.ones((), device=whole.device) for name in weights or {}}
    bar = Bar(progress, title, "loss" if 0 in shared.weights.values() else "bound")
    with pyro.validation_enabled(False), with_weights(shared, scheduled):
        try:
            steps = at_once(team, whole, batch_size)
            if together is True or steps.flops <= MOST_FLOPS:
                training = Training(
                    epochs, batch_size, lr, lr_schedule, weights or {}, scheduled, clip, patience,
                    callbacks, compile,
                )  # fmt: skip
                run(team, whole, steps, training, bar)
                return [m.result for m in team]
            bar.say(f"{_ALONE}: a step of one has {steps.flops:.1e} operations")
        except NotTraced as error:
            warnings.warn(f"{_ALONE}: {error}", stacklevel=2)
    return one_by_one()


def _pairs(make: Callable[[int], Any], seeds: Iterable[int]) -> dict[int, tuple[Net, Net]]:
    """Program and guide of every seed."""
    pairs: dict[int, tuple[Net, Net]] = {}
    for seed in seeds:
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(f"seeds are whole numbers, got {seed!r}")
        if seed in pairs:
            raise ValueError(f"seed {seed} is there twice")
        with seeded(seed):
            pair = make(seed)
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise TypeError(f"make(seed) returns a program and a guide, got {type(pair).__name__}")
        pairs[seed] = (pair[0], pair[1])
    if not pairs:
        raise ValueError("there is no seed to fit")
    return pairs


def _prepared(
    pairs: Mapping[int, tuple[Net, Net]], data: Data, objective: EnumELBO, device: str
) -> Batch:
    """The data on the device, where all modules are put, too."""
    where = Fabric(accelerator=device, devices=1).device
    for pair in pairs.values():
        for module in (m for net in pair for m in modules_of(net)):
            module.to(where)
    p, _ = objective.pair(*next(iter(pairs.values())))
    batch = p.pairing.prepare(data)
    return batch if isinstance(batch, Stored) else batch.to(where)
