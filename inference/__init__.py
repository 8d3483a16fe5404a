"""Inference: batches, observing, objectives, fitting, posteriors, metrics, reports."""

from pyrozoo.inference import metrics, schedules
from pyrozoo.inference.batch import Batch
from pyrozoo.inference.elbo import EnumELBO
from pyrozoo.inference.evidence import log_evidence
from pyrozoo.inference.fit import fit
from pyrozoo.inference.observing import Observed, observe, pair, register
from pyrozoo.inference.posterior import posterior, predict, responsibilities
from pyrozoo.inference.result import Result, evaluate
from pyrozoo.inference.seeds import fit_seeds
from pyrozoo.inference.staging import Staged, stage
from pyrozoo.inference.stored import Stored
from pyrozoo.inference.subsets import SubsetELBO

__all__ = [
    "Batch",
    "EnumELBO",
    "Observed",
    "Result",
    "Staged",
    "Stored",
    "SubsetELBO",
    "evaluate",
    "fit",
    "fit_seeds",
    "log_evidence",
    "metrics",
    "observe",
    "pair",
    "posterior",
    "predict",
    "register",
    "responsibilities",
    "schedules",
    "stage",
]
