"""Guides: how the unknown is proposed, independent of any one program."""

from pyrozoo.guides.amortized import Amortized
from pyrozoo.guides.auto import Auto
from pyrozoo.guides.auxiliary import Auxiliary
from pyrozoo.guides.clusters import MixturePosterior
from pyrozoo.guides.experts import Classifier, ProductOfExperts
from pyrozoo.guides.ladder import Ladder
from pyrozoo.guides.parts import Corrupted, Mean, Part, Sequential
from pyrozoo.guides.relaxed import Relaxed, Sampled
from pyrozoo.inference.comparison.refined import Refined, refine

__all__ = [
    "Amortized",
    "Auto",
    "Auxiliary",
    "Classifier",
    "Corrupted",
    "Ladder",
    "Mean",
    "MixturePosterior",
    "Part",
    "ProductOfExperts",
    "Refined",
    "Relaxed",
    "Sampled",
    "Sequential",
    "refine",
]
