"""Programs with a label that may be known in some rows."""

from pyrozoo.zoo.semisupervised.m2 import M2

__all__ = ["M2"]
