"""Programs whose rows belong to clusters."""

from .vade import VaDE

__all__ = ["VaDE"]
