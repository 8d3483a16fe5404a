"""Programs with a label that may be known in some rows."""

from pyrozoo.zoo.semisupervised.m1 import M1
from pyrozoo.zoo.semisupervised.m1m2 import M1M2
from pyrozoo.zoo.semisupervised.m2 import M2

__all__ = ["M1", "M1M2", "M2"]
