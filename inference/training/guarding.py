"""What can go wrong in the steps of a fit, said so that one knows what to do.

A :class:`Guard` stops before a step whose loss or gradient is not finite, and says which sites,
rows or parameters it comes from.  It turns a lack of memory into advice on the batch size, and an
interruption into a word on how to go on.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from pyrozoo.inference.batch import Batch
from pyrozoo.inference.bounds.elbo import EnumELBO
from pyrozoo.inference.observing import Observed
from pyrozoo.inference.training.result import Record

_NO_MEMORY = re.compile(r"can't allocate memory|not enough memory|out of memory|bad_alloc", re.I)


def out_of_memory(error: BaseException | None) -> bool:
    """Whether an error says that there is no memory left, on the CPU or on a GPU."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and bool(_NO_MEMORY.search(str(error)))


def check_leaves(loss: Tensor, parameters: Iterable[Tensor]) -> None:
    """Check that all that asks for a gradient of the loss is trained.

    Raises:
        ValueError: the loss depends on other tensors; with their shapes.
    """
    known = {id(x) for x in parameters}
    seen: set[Any] = set()
    stack, others = [loss.grad_fn], {}
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in known:
            others[id(leaf)] = str(tuple(leaf.shape))
        stack += [following for following, _ in node.next_functions]
    if others:
        raise ValueError(
            f"the loss depends on {len(others)} tensors that ask for a gradient, but are no"
            f" parameters of program and guide, of shape {_listed(others.values())}: they would"
            " never be trained. Of a function only the modules that it is bound to, or closes over,"
            " are found; pass an nn.Module, with nn.Parameter in place of pyro.param"
        )


class Guard:
    """Watches the steps of a fit.

    Args:
        objective: what is minimised.
        p, q: the observed pair.
        parameters: those that are trained, by name.
        rows: the number of each training row in the data set.
        batch_size: rows per step.
        where: says where the last checkpoint is.
        say: prints a line to the user.
    """

    def __init__(
        self,
        objective: EnumELBO,
        p: Observed,
        q: Observed,
        parameters: Mapping[str, nn.Parameter],
        rows: Tensor,
        batch_size: int,
        where: Callable[[], str],
        say: Callable[[str], None],
    ) -> None:
        self.objective, self.p, self.q, self.parameters = objective, p, q, parameters
        self.rows, self.batch_size, self.where, self.say = rows, batch_size, where, say
        self.epoch = self.step = 0  # counted from one; step 0 is what follows an epoch
        self.first = True
        self.devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []

    def __enter__(self) -> Guard:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if isinstance(error, KeyboardInterrupt):
            self.say(f"interrupted {self._when()}; {self.where()}")
        elif out_of_memory(error):
            size = self.batch_size
            advice = f"try batch_size={size // 2}" if size > 1 else "the model itself is too large"
            raise MemoryError(
                f"out of memory {self._when()} with batch_size={size}: {advice}; {self.where()}"
            ) from error

    def begin(self, epoch: int, step: int) -> None:
        """A step begins: remember its random state, so that it can be looked at again."""
        self.epoch, self.step = epoch, step
        self.random = torch.get_rng_state()
        if self.devices:
            self.random_cuda = torch.cuda.get_rng_state()

    def check(self, loss: Tensor, batch: Batch, index: Tensor) -> None:
        """Stop if the loss or the gradient is not finite; to be called before the optimiser's step.

        On a GPU this waits for the step to be computed, once.

        Args:
            loss: a scalar, after back-propagation.
            batch: what it was computed on.
            index: its rows among the training rows.

        Raises:
            FloatingPointError: naming epoch, step, and what is not finite.
            ValueError: as :func:`check_leaves`, at the first step.
        """
        if self.first:
            check_leaves(loss, self.parameters.values())
            self.first = False
        gradients = [x.grad for x in self.parameters.values() if x.grad is not None]
        if loss.is_cuda:
            total = float(loss.detach() + nn.utils.get_total_norm(gradients))
        else:
            total = loss.item() + sum([g.sum().item() for g in gradients])
        if math.isfinite(total):
            return
        if reason := self._reason(loss, batch, index):
            raise FloatingPointError(
                f"{self._when()}: {reason}. The parameters are those before this step; try a"
                f" smaller learning rate, or clip=; {self.where()}"
            )

    def check_record(self, record: Record) -> None:
        """Stop if a figure of an epoch is not finite.

        Raises:
            FloatingPointError: naming epoch and figures.
        """
        bad = [name for name, value in record.items() if not math.isfinite(value)]
        if bad:
            raise FloatingPointError(
                f"epoch {self.epoch}: not finite: {', '.join(bad)}; try a smaller learning rate, or"
                f" clip=; {self.where()}"
            )

    def _when(self) -> str:
        return f"in epoch {self.epoch}" + (f", step {self.step}" if self.step else "")

    def _reason(self, loss: Tensor, batch: Batch, index: Tensor) -> str:
        """What is not finite; '' if only the sum of it all was too large."""
        bad = [name for name, x in self.parameters.items() if not bool(x.isfinite().all())]
        if bad:
            return f"parameters are not finite since an earlier step: {_listed(bad)}"
        if bool(loss.isfinite()):
            grads = {name: x.grad for name, x in self.parameters.items() if x.grad is not None}
            bad = [name for name, grad in grads.items() if not bool(grad.isfinite().all())]
            return f"the gradient is not finite for {_listed(bad)}" if bad else ""
        what = f"the loss is {loss.item():g}"
        weights = {n: float(w) for n, w in self.objective.weights.items()}
        bad = [f"{name!r} is {w:g}" for name, w in weights.items() if not math.isfinite(w)]
        if bad:
            return f"{what}: the weight of {_listed(bad)}"
        if found := self._sites(batch, index):
            return f"{what}: not finite: {'; '.join(found)}"
        return what

    @torch.no_grad()
    def _sites(self, batch: Batch, index: Tensor) -> list[str]:
        """The terms that are not finite at the draws of this step, and their rows."""
        p, q, plan = self.p, self.q, self.p.pairing.plan(batch)
        if self.objective.unsupported(plan):
            return []
        with self._again():
            terms = self.objective.terms(p, q, batch)
        with self._again():
            guide = self.objective.trace(p, q, batch).observed_guide
        terms |= {f"log q({name})": value.mean(0) for name, value in guide.items()}
        bad = {name: ~value.isfinite() for name, value in terms.items()}
        if not any(bool(b.any()) for b in bad.values()):  # it was in other draws, or a subset
            with self._again():
                value = self.objective._evaluate(p, q, batch, plan)
            bad = {"the bound": ~(value.rows + value.extra).mean(0).isfinite()}
        return [
            f"{name} in {self._which(b, index) if b.dim() else 'what all rows share'}"
            for name, b in bad.items()
            if bool(b.any())
        ]

    def _which(self, bad: Tensor, index: Tensor) -> str:
        numbers = self.rows[index.cpu()[bad.expand(len(index)).cpu()]].unique().tolist()
        of = len(index.unique())
        if len(numbers) == of > 1:
            return f"all {of} rows of the step"
        return f"row {numbers[0]}" if len(numbers) == 1 else f"rows {_listed(numbers)}, of {of}"

    @contextlib.contextmanager
    def _again(self) -> Iterator[None]:
        """The random state at the beginning of the step."""
        with torch.random.fork_rng(devices=self.devices):
            torch.set_rng_state(self.random)
            if self.devices:
                torch.cuda.set_rng_state(self.random_cuda)
            yield


def _listed(names: Iterable[Any], most: int = 5) -> str:
    names = [str(name) for name in names]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
