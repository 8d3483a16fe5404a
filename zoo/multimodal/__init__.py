"""Programs with several modalities, any of which may be missing."""

from pyrozoo.zoo.multimodal.mvae import MVAE

__all__ = ["MVAE"]
