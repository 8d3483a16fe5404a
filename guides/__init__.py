"""Guides: how the unknown is proposed, independent of any one program."""

from pyrozoo.guides.amortized import Amortized, Classifier, Mean, Part, ProductOfExperts, Sequential
from pyrozoo.guides.clusters import MixturePosterior
from pyrozoo.guides.ladder import Ladder

__all__ = [
    "Amortized",
    "Classifier",
    "Ladder",
    "Mean",
    "MixturePosterior",
    "Part",
    "ProductOfExperts",
    "Sequential",
]
