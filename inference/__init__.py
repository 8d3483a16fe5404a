"""Inference: batches, observing, objectives, fitting, posteriors, comparisons, reports."""

from pyrozoo.inference import metrics
from pyrozoo.inference.arviz_export import to_arviz
from pyrozoo.inference.batch import Batch
from pyrozoo.inference.bounds.elbo import EnumELBO
from pyrozoo.inference.bounds.importance import IWELBO, RenyiBound
from pyrozoo.inference.bounds.subsets import SubsetELBO
from pyrozoo.inference.bounds.wake import ReweightedWakeSleep
from pyrozoo.inference.comparison.calibration import sbc
from pyrozoo.inference.comparison.compare import compare
from pyrozoo.inference.comparison.importance import importance_weights
from pyrozoo.inference.comparison.measuring import Effort, measure
from pyrozoo.inference.comparison.psis import pareto_khat
from pyrozoo.inference.comparison.references import nuts
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
    "IWELBO",
    "Batch",
    "Effort",
    "EnumELBO",
    "Observed",
    "RenyiBound",
    "Result",
    "ReweightedWakeSleep",
    "Staged",
    "Stored",
    "SubsetELBO",
    "Tracker",
    "checkpoint",
    "compare",
    "evaluate",
    "fit",
    "fit_seeds",
    "importance_weights",
    "log_evidence",
    "measure",
    "metrics",
    "nuts",
    "observe",
    "pair",
    "pareto_khat",
    "posterior",
    "predict",
    "processes",
    "register",
    "responsibilities",
    "sbc",
    "schedules",
    "stage",
    "to_arviz",
]
