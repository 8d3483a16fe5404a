"""What the catalogue is made of, and what its makers share.

A maker takes a batch, for its shapes and for what is observed in it, and the method's options, and
returns a :class:`Model`; the makers of a family are in its ``catalogue.py``, each with a
:class:`Method` that says what it is.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from pyrozoo.inference import Batch, EnumELBO, Result, fit
from pyrozoo.inference.batch import Data


def width(batch: Batch, name: str) -> int:
    """The features of a value.

    Raises:
        ValueError: the data lack it, or its rows are not flat.
    """
    if name not in batch:
        raise ValueError(
            f"the data have no {name!r} (they have: {', '.join(batch.names) or 'none'})"
        )
    shape = batch[:1][name].shape[1:]
    if len(shape) != 1:
        raise ValueError(f"{name!r} is expected as flat rows (rows, features), got {tuple(shape)}")
    return int(shape[0])


def repeats(batch: Batch, share: float) -> int:
    """How often a labelled row is visited in an epoch, so that these make up a share of it.

    Raises:
        ValueError: the share is not from 0 to below 1.
    """
    if not 0 <= share < 1:
        raise ValueError(f"labelled_share is from 0 to below 1, got {share}")
    labelled = int(batch.present("y").sum())
    if not labelled:
        return 1
    return max(1, round(share / (1 - share) * (len(batch) - labelled) / labelled))


def classification(batch: Batch, alpha: float, repeat: int = 1) -> EnumELBO:
    """The bound, and log q(y | .) of the labelled rows at ``alpha`` times the bound of all rows."""
    objective = EnumELBO()
    if labelled := int(batch.present("y").sum()):
        objective.observed_guide_weights["y"] = alpha * len(batch) / (labelled * repeat)
    return objective


@dataclass
class Model:
    """A method made for one data set: both halves, the objective, and how it is usually fitted.

    ``start`` is what happens before the fit (pretraining), called with the data, a seed, whether to
    show progress, and those settings of the fit that say how and where it runs; ``settings`` are
    the defaults of :func:`pyrozoo.inference.training.fit` for this method.  ``prepare`` turns the
    data into those that the fit sees, and gives what is called with the result after every epoch
    (targets made anew, centres moved).
    """

    method: str
    program: nn.Module
    guide: nn.Module
    objective: EnumELBO = field(default_factory=EnumELBO)
    options: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    start: Callable[..., None] | None = None
    prepare: Callable[[Batch], tuple[Batch, Callable[[Result], None]]] | None = None

    def fit(
        self,
        data: Data,
        *,
        seed: int = 0,
        progress: bool = True,
        start: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> Result:
        """Pretrain, where the method does, then fit: see :func:`pyrozoo.inference.training.fit`.

        With ``folder`` the pretraining leaves checkpoints, too, in its subfolder ``start``;
        ``resume=True`` goes on with whichever was interrupted.

        Args:
            data: what is observed.
            seed: of the pretraining and the fit; the networks were initialised by :func:`create`.
            progress: show progress bars.
            start: options of the pretraining.
            settings: options of the fit, in place of the method's defaults; callbacks are called
                after those of the method.
        """
        batch, chosen = Batch.of(data), {**self.settings, **settings}
        own = list(self.settings.get("callbacks", ()))
        if self.prepare is not None:
            batch, follow = self.prepare(batch)
            own.append(follow)
        chosen["callbacks"] = [*own, *settings.get("callbacks", ())]
        if start and self.start is None:
            raise ValueError(f"{self.method} has no pretraining, but got {', '.join(start)}")
        decided_by = {f"option {name}": value for name, value in self.options.items()}
        decided_by |= {f"start {name}": value for name, value in (start or {}).items()}
        return fit(
            self.program, self.guide, batch, objective=self.objective, seed=seed,
            progress=progress, title=self.method, decided_by=decided_by,
            start=self._pretraining(batch, seed, progress, start or {}, chosen), **chosen,
        )  # fmt: skip

    def _pretraining(
        self,
        batch: Batch,
        seed: int,
        progress: bool,
        options: Mapping[str, Any],
        chosen: Mapping[str, Any],
    ) -> Callable[[], None] | None:
        """The pretraining, with checkpoints of its own in the folder ``start`` of the fit's."""
        if (start := self.start) is None:
            return None
        folder = chosen.get("folder")
        where: dict[str, Any] = {"seed": seed, "progress": progress}
        where |= {name: chosen[name] for name in ("compile", "device", "devices") if name in chosen}
        if folder is not None:
            where |= {"folder": Path(folder) / "start", "resume": chosen.get("resume", False)}
        return lambda: start(batch, **{**where, **options})


@dataclass(frozen=True)
class Method:
    """An entry of the catalogue."""

    name: str
    title: str
    task: str
    tier: str
    paper: str  # a key of references.bib
    program: type[nn.Module]
    make: Callable[..., Model]

    @property
    def doc(self) -> str:
        """What the file of the method says of it: equations, regimes, source, deviations."""
        module = inspect.getmodule(self.program)
        return inspect.getdoc(module) or ""

    @property
    def options(self) -> dict[str, Any]:
        """Its options and their defaults."""
        parameters = inspect.signature(self.make).parameters.values()
        own = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
        return {**own, "precision": "float32"}
