"""Programs whose rows belong to clusters."""

from pyrozoo.zoo.clustering.vade import VaDE

__all__ = ["VaDE"]
