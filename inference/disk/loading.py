"""Reading ahead: the next batches come from disk while a step computes.

One thread reads, in the order of the steps, at most ``AHEAD`` batches early.  It is a thread and
not the processes of torch's ``DataLoader``: reading and decompressing leave the interpreter free,
open HDF5 files do not survive a fork, nothing has to be copied between processes, and a DataLoader
draws a number from torch's generator, after which the draws of a step would no longer be those of
the same data in memory.  What is read goes to the device in the thread of the steps, because a
CUDA graph may be captured there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

from torch import Tensor

from pyrozoo.inference.batch import Batch
from pyrozoo.inference.checking import check_values
from pyrozoo.inference.disk.stored import Stored
from pyrozoo.inference.plan import Plan

AHEAD = 2


class Reader:
    """Batches of some rows, one after the other; a context, at whose end nothing is read any more.

    Args:
        rows: in memory, from where they are just taken, or on disk.
    """

    def __init__(self, rows: Batch) -> None:
        self.rows = rows
        self._pool: ThreadPoolExecutor | None = None
        self._waiting: deque[Future[Batch]] = deque()

    def __enter__(self) -> Self:
        if isinstance(self.rows, Stored):
            self._pool = ThreadPoolExecutor(1, "pyrozoo-reader")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        self._pool = None
        self._waiting.clear()

    def batches(self, pieces: Sequence[Tensor]) -> Iterator[Batch]:
        """The rows of each piece, ``(rows,)`` row numbers.

        Raises (from the step on whose batch it is):
            ValueError: the rows cannot be read; the message names the file.
        """
        rows, pool = self.rows, self._pool
        if not isinstance(rows, Stored) or pool is None:
            for index in pieces:
                yield rows[index]
            return
        self._waiting.clear()
        for index in pieces:
            self._waiting.append(pool.submit(rows.read, index))
            if len(self._waiting) > AHEAD:
                yield self._waiting.popleft().result().to(rows.device)
        while self._waiting:
            yield self._waiting.popleft().result().to(rows.device)


def check_rows(plan: Plan, rows: Batch, size: int = 4096) -> None:
    """Check types and ranges of all observed values, piece by piece and in the order on disk.

    Raises:
        ValueError: as :func:`.plan.check_values`; or rows cannot be read.
    """
    if isinstance(rows, Stored):
        pieces = rows.in_order().pieces(size)
    else:
        pieces = (rows[first : first + size] for first in range(0, len(rows), size))
    for piece in pieces:
        check_values(plan, piece)
