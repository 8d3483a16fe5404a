"""Inference: batches, observing, objectives, fitting, posteriors, metrics, reports."""

from pyrozoo.inference import metrics
from pyrozoo.inference.batch import Batch
from pyrozoo.inference.bounds.elbo import EnumELBO
from pyrozoo.inference.bounds.subsets import SubsetELBO
from pyrozoo.inference.disk.stored import Stored
from pyrozoo.inference.evidence import log_evidence
from pyrozoo.inference.observing import Observed, observe, pair, register
from pyrozoo.inference.posterior import posterior, predict, responsibilities
from pyrozoo.inference.seeds.fit_seeds import fit_seeds
from pyrozoo.inference.staging.staged import Staged, stage
from pyrozoo.inference.training import checkpoint, processes, schedules
from pyrozoo.inference.training.fit import fit
from pyrozoo.inference.training.result import Result, evaluate
from pyrozoo.inference.training.tracking import Tracker

__all__ = [
    "Batch",
    "EnumELBO",
    "Observed",
    "Result",
    "Staged",
    "Stored",
    "SubsetELBO",
    "Tracker",
    "checkpoint",
    "evaluate",
    "fit",
    "fit_seeds",
    "log_evidence",
    "metrics",
    "observe",
    "pair",
    "posterior",
    "predict",
    "processes",
    "register",
    "responsibilities",
    "schedules",
    "stage",
]
