"""Guides: how the unknown is proposed, independent of any one program."""

from pyrozoo.guides.amortized import Amortized, Classifier, Mean, Part, ProductOfExperts, Sequential

__all__ = ["Amortized", "Classifier", "Mean", "Part", "ProductOfExperts", "Sequential"]
