"""What several processes share in a fit: batches, gradients, decisions and failures."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as c10d
from lightning_fabric import Fabric
from torch import Tensor, nn

from pyrozoo.inference.training.facts import check_same
from pyrozoo.inference.training.state import claim

T = TypeVar("T")
_TOLD = "raised in all processes of the fit"
_KINDS = (
    FileExistsError, FileNotFoundError, OSError, FloatingPointError, MemoryError, TypeError,
    ValueError,
)  # fmt: skip


def told(error: BaseException) -> bool:
    """Whether an error is raised in all processes, so that one of them may say it for all."""
    notes = getattr(error, "__notes__", ())
    return _TOLD in notes or (error.__cause__ is not None and told(error.__cause__))


@dataclass
class Step:
    """What a process finds in a step."""

    loss: Tensor = field(default_factory=lambda: torch.zeros(()))  # of no rows


@dataclass
class Processes:
    """The processes of a fit, as one of them sees them; with only one, nothing is ever waited for.

    Every method is called by all of them.
    """

    fabric: Fabric

    @property
    def size(self) -> int:
        """How many there are."""
        return self.fabric.world_size

    @property
    def first(self) -> bool:
        """Whether this is the one that shows and writes."""
        return self.fabric.global_rank == 0

    @property
    def facts(self) -> dict[str, int]:
        """What decides the numbers of a fit."""
        return {} if self.size == 1 else {"processes": self.size}

    @property
    def words(self) -> list[str]:
        """How many there are, in words, if there are several."""
        return [] if self.size == 1 else [f"  {self.size} processes share every batch"]

    def share(self, index: Tensor) -> Tensor:
        """This process' part of the rows of a batch."""
        return index if self.size == 1 else index.tensor_split(self.size)[self.fabric.global_rank]

    def tell(self, value: Any) -> Any:
        """What the first process has."""
        return value if self.size == 1 else self.fabric.broadcast(value)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """What fails in one process fails in all; they wait for each other at the end."""
        failed: Exception | None = None
        try:
            yield
        except Exception as error:
            if self.size == 1 or told(error):
                raise
            failed = error
        if self.size > 1:
            self._stop(self._sum(self._flags(failed)).tolist(), failed)

    def once(self, function: Callable[[], T]) -> T:
        """What the first process gets from a function that it alone calls."""
        with self.together():
            found = function() if self.first else None
        return self.tell(found)

    def each(self, function: Callable[[], T]) -> T:
        """What the first process gets from a function that all call."""
        with self.together():
            found = function()
        return self.tell(found)

    @contextlib.contextmanager
    def step(self, parameters: Sequence[nn.Parameter], share: float) -> Iterator[Step]:
        """A step: afterwards the loss and ``.grad`` are those of the whole batch.

        Inside, the loss of this process' rows is put into what is given, and its gradient into
        ``.grad``.  A gradient that is None everywhere stays so; where it is None it counts as zero.

        Args:
            parameters: those that are trained.
            share: of this process in the rows of the batch.

        Raises:
            Exception: what was raised inside, or in another process.
        """
        mine = Step()
        if self.size == 1:
            yield mine
            return
        failed: Exception | None = None
        for x in parameters:
            x.grad = None
        try:
            yield mine
        except Exception as error:
            failed = error
        self._average(mine, parameters, 0.0 if failed else share, failed)

    def level(self, tensors: Iterable[Tensor]) -> None:
        """Give all processes the values that the first one has."""
        if self.size > 1:
            for x in tensors:
                value = x.detach().contiguous()
                c10d.broadcast(value, 0)
                x.detach().copy_(value)

    def reseed(self, seed: int, epoch: int) -> None:
        """Draw noise of this process' own in an epoch; with one process, go on as it was."""
        if self.size > 1:
            key = np.random.SeedSequence([seed, epoch, self.fabric.global_rank])
            torch.manual_seed(int(key.generate_state(1, np.uint64)[0] >> 1))

    def same(self, settings: Mapping[str, Any]) -> None:
        """Check that all processes fit the same.

        Raises:
            ValueError: naming what differs from the first one.
        """
        theirs = self.tell(dict(settings))
        with self.together():
            check_same(theirs, settings, "the first process", "settings")

    @contextlib.contextmanager
    def claim(self, folder: str | Path | None, resume: bool) -> Iterator[tuple[Path | None, bool]]:
        """The first process holds the lock of a folder; gives its checkpoint, and if it is there.

        Raises:
            Exception: as :func:`.state.claim`.
        """
        with contextlib.ExitStack() as stack:
            path: Path | None = None
            with self.together():
                if self.first:
                    path = stack.enter_context(claim(folder, resume))
            yield self.tell((path, path is not None and path.exists()))

    # ---- collectives -----------------------------------------------------------------------------

    def _average(
        self, mine: Step, parameters: Sequence[nn.Parameter], share: float, failed: Any
    ) -> None:
        dtype = torch.float32
        for x in parameters:
            dtype = torch.promote_types(dtype, x.dtype)
        grads = [x.grad if share else None for x in parameters]
        loss = mine.loss if share else torch.zeros(())
        used = torch.tensor([float(g is not None) for g in grads])
        head = torch.cat([self._flags(failed), used]).to(self.fabric.device, dtype)
        tail = [
            torch.zeros_like(x) if g is None else g for g, x in zip(grads, parameters, strict=True)
        ]
        vector = torch.cat([
            head,
            loss.detach().reshape(1).to(head) * share,
            *(g.detach().reshape(-1).to(head) * share for g in tail),
        ])  # fmt: skip
        vector = self._sum(vector)
        found = vector[: len(head)].tolist()
        self._stop(found[: self.size], failed)
        mine.loss = vector[len(head)]
        pieces = vector[len(head) + 1 :].split([x.numel() for x in parameters])
        for x, piece, count in zip(parameters, pieces, found[self.size :], strict=True):
            if count:
                x.grad = torch.empty_like(x) if x.grad is None else x.grad
                x.grad.copy_(piece.view_as(x))

    def _flags(self, failed: Exception | None) -> Tensor:
        flags = torch.zeros(self.size)
        flags[self.fabric.global_rank] = float(failed is not None)
        return flags

    def _sum(self, vector: Tensor) -> Tensor:
        found = vector.to(self.fabric.device)
        c10d.all_reduce(found)  # Fabric's own waits for all processes once more
        return found

    def _stop(self, flags: list[float], failed: Exception | None) -> None:
        """Raise what a process raised, in all of them."""
        if not any(flags):
            return
        source = flags.index(max(flags))
        name, text = self.fabric.broadcast((_kind(failed), str(failed)), source)
        kinds = {kind.__name__: kind for kind in _KINDS}
        error = failed or kinds.get(name, RuntimeError)(f"{text} (in process {source})")
        error.add_note(_TOLD)
        raise error


def _kind(error: Exception | None) -> str:
    return next((kind.__name__ for kind in _KINDS if isinstance(error, kind)), "RuntimeError")
