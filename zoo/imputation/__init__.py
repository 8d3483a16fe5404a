"""Programs of tables with holes and columns of different kinds."""

from pyrozoo.zoo.imputation.hivae import HIVAE

__all__ = ["HIVAE"]
