"""What a fit returns, and the evaluation of a pair on data."""

from __future__ import annotations

import copy
import csv
import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor

from pyrozoo.inference.batch import Data
from pyrozoo.inference.bounds.elbo import EnumELBO
from pyrozoo.inference.evidence import log_evidence
from pyrozoo.inference.modes import evaluating, seeded
from pyrozoo.inference.observing import Net
from pyrozoo.inference.posterior import posterior, predict, responsibilities
from pyrozoo.inference.training import checkpoint
from pyrozoo.inference.training.facts import check_facts
from pyrozoo.inference.training.tracking import Watch

Record = dict[str, float]


@dataclass
class Result:
    """A fitted pair: the modules (trained in place), what happened, and shortcuts to what follows.

    ``history`` has one record an epoch: ``epoch``, ``loss`` (the training objective, with its
    weights), ``bound`` (nats per datum, without), one value per term of the bound, ``val_*`` for
    held-out data, what is watched (:mod:`.tracking`: clusters used, entropies, active units, norms
    of the gradient), ``seconds``.  ``sites`` says in words what was done with each site.
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

    def log_evidence(self, data: Data, num_particles: int = 1000, **options: Any) -> Tensor:
        """Estimates of log p(observed) of every row, ``(rows,)``: see :mod:`.evidence`."""
        return log_evidence(
            self.program, self.guide, data, num_particles, inputs=self.inputs, **options
        )

    def save(self, path: str | Path) -> None:
        """Write the parameters, the history and the sites to one safetensors file."""
        facts = {
            "kind": "fitted", "history": self.history, "sites": self.sites,
            "best_epoch": self.best_epoch, "stopped": self.stopped,
            "num_rows": self.objective.num_rows,
            "program": checkpoint.name_of(self.program), "guide": checkpoint.name_of(self.guide),
            "versions": checkpoint.versions(),
        }  # fmt: skip
        checkpoint.save(path, self.parameters, facts)

    def load(self, path: str | Path) -> Result:
        """Read what :meth:`save` wrote, or the checkpoint of a fit, into this pair.

        Raises:
            ValueError: the file is damaged, or of another pair; nothing has been changed then.
        """
        tensors, meta = checkpoint.load(path)
        check_facts(meta, path, "history", "sites", "best_epoch", "stopped", "num_rows")
        checkpoint.unpack_modules(tensors, str(path), meta, program=self.program, guide=self.guide)
        self.history, self.sites = meta["history"], meta["sites"]
        self.best_epoch, self.stopped = meta["best_epoch"], meta["stopped"]
        if self.objective.num_rows is None:
            self.objective = copy.copy(self.objective)
            self.objective.num_rows = meta["num_rows"]
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
    watch: Watch | None = None,
) -> Record:
    """The bound and its terms in nats per datum, with all weights one and in evaluation mode.

    The draws are seeded and the global random state is left as it was, so that the same parameters
    give the same numbers.  ``watch`` has a look at what is computed, see :mod:`.tracking`.
    """
    options = objective or EnumELBO()
    plain = EnumELBO(
        num_particles, kl=options.kl, split=False, inputs=options.inputs, replace=options.replace
    )
    plain._reparameterised = False  # there is no gradient
    p, q = plain.pair(program, guide)
    batch = p.pairing.prepare(data)
    rows = options.num_rows or len(batch)
    if len(batch) and plain.unsupported(p.pairing.plan(batch[:batch_size])):
        with torch.no_grad(), evaluating(p, q), pyro.validation_enabled(False), seeded(seed):
            return {"bound": -plain.loss(p, q, batch)}
    sums: dict[str, float] = {}
    if watch is not None:
        watch.clear()
    look = plain.terms if watch is None else functools.partial(watch.terms, plain)
    with torch.no_grad(), evaluating(p, q), pyro.validation_enabled(False), seeded(seed):
        for start in range(0, len(batch), batch_size):
            piece = batch[start : start + batch_size]
            for name, term in look(p, q, piece).items():
                share = term.sum() if term.dim() else term * (len(piece) / rows)
                sums[name] = sums.get(name, 0.0) + float(share) / len(batch)
    return {"bound": sum(sums.values()), **sums}
