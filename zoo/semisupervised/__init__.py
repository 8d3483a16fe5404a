"""Programs with a label that may be known in some rows."""

from .m2 import M2

__all__ = ["M2"]
