"""Inference: batches, observing, objectives, fitting, posteriors, metrics, reports."""

from .batch import Batch
from .elbo import EnumELBO
from .observing import Observed, observe, pair, register

__all__ = ["Batch", "EnumELBO", "Observed", "observe", "pair", "register"]
