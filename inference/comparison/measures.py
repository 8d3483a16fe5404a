"""What is measured of a fitted pair, with what effort, and what is known of the truth."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from pyrozoo.inference.batch import Batch
from pyrozoo.inference.graph import read_graph
from pyrozoo.inference.observing import Net
from pyrozoo.inference.reading import read_count

Draws = Mapping[str, Tensor]
Reference = Draws | Callable[[int, int], Draws]


@dataclass(frozen=True)
class Effort:
    """How much is spent on the measures of one pair.

    Attributes:
        num_particles: draws of the guide per row for the importance weights.
        elbo_particles: for the bound.
        gap_rows: rows that are refined one by one; none: no parts of the gap.
        gap_steps: of the refinement.
        sbc_datasets: rows that are simulated for the calibration; none: no calibration.
        sbc_draws: draws per simulated row.
        reference_rows: rows whose draws are compared with the reference; none: no comparison.
        reference_draws: draws each.

    Raises:
        ValueError: a number is not whole, or too small.
    """

    num_particles: int = 5000
    elbo_particles: int = 100
    gap_rows: int = 100
    gap_steps: int = 300
    sbc_datasets: int = 500
    sbc_draws: int = 99
    reference_rows: int = 5
    reference_draws: int = 1000

    def __post_init__(self) -> None:
        least = {"gap_rows": 0, "sbc_datasets": 0, "reference_rows": 0, "reference_draws": 10}
        for name, value in dataclasses.asdict(self).items():
            read_count(name, value, least.get(name, 1))

    def quick(self) -> Effort:
        """The same with a tenth of everything, to see that it runs."""
        values = {k: max(1, v // 10) if v else 0 for k, v in vars(self).items()}
        return Effort(**{**values, "sbc_draws": 19, "reference_draws": 200})


@dataclass
class Measures:
    """What was measured of one pair, and what its plots need.

    Attributes:
        figures: the measures of the module's table, by name; what does not apply is absent.
        reasons: measure -> why it is absent.
        joint: why bounds and k-hat are those of all rows together ('' if they are not).
        bounds: draws -> (importance weighted bound, its standard error over draws: of these very
            rows, NaN with one block of draws), nats per datum.
        khat: of every row ``(rows,)``, or of all together ``(1,)``.
        calibration: of the simulated rows.
        draws, reference: of the guide, and of the reference, for the rows that were compared.
        shared: whether these are of sites that all rows share.
        evidence: log-evidence of the rows, exact or the tightest bound, nats per datum.
        refined: of the rows that were refined: their number, bound before, bound after, and
            log-evidence, nats per datum.
    """

    figures: dict[str, float] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    joint: str = ""
    bounds: dict[int, tuple[float, float]] = field(default_factory=dict)
    khat: Tensor | None = None
    calibration: Any = None
    draws: dict[str, Tensor] = field(default_factory=dict)
    reference: dict[str, Tensor] = field(default_factory=dict)
    shared: bool = False
    evidence: float = -math.inf
    refined: tuple[int, float, float, float] | None = None

    def set_gaps(self, evidence: float, part: float) -> None:
        """Gap and its parts, for these log-evidences of all rows and of the refined ones."""
        if "elbo" in self.figures and math.isfinite(evidence):
            self.figures["gap"] = evidence - self.figures["elbo"]
        if self.refined is not None:
            _, before, after, _ = self.refined
            self.figures["amortisation_gap"] = after - before
            if math.isfinite(part):
                self.figures["approximation_gap"] = part - after


def check_truth(
    program: Net,
    batch: Batch,
    log_evidence: Tensor | None,
    reference: Reference | None,
    inputs: tuple[str, ...] = (),
) -> None:
    """Raise a ValueError if a log-evidence or draws do not fit the program and its rows."""
    rows = len(batch)
    if log_evidence is not None and log_evidence.shape != (rows,):
        raise ValueError(
            f"log_evidence is expected for each measured row, ({rows},), got"
            f" {tuple(log_evidence.shape)}"
        )
    if reference is None:
        return
    draws = reference(2, 0) if callable(reference) else reference
    if not isinstance(draws, Mapping) or not draws:
        raise ValueError(f"reference is draws by site, or a function, got {draws!r}")
    sites = read_graph(program, unobserved(batch, inputs)).sites
    for name, value in draws.items():
        if name not in sites:
            raise ValueError(f"reference: {name!r} is not a site (sites: {', '.join(sites)})")
        if sites[name].local and (value.dim() < 2 or value.shape[1] != rows):
            raise ValueError(
                f"reference: draws of {name!r} are expected as (draws, {rows} rows, ...), got"
                f" {tuple(value.shape)}"
            )


def words(error: Exception) -> str:
    """What an error says, without the full stop and what Pyro adds of its traces."""
    text = str(error).partition("\nTrace Shapes:")[0]
    return " ".join(text.split()).rstrip(".")


def unobserved(batch: Batch, inputs: tuple[str, ...]) -> Batch:
    """The rows with their inputs alone."""
    return batch.drop(*(n for n in batch.names if n not in inputs))
