"""Programs with several modalities, any of which may be missing."""

from .mvae import MVAE

__all__ = ["MVAE"]
