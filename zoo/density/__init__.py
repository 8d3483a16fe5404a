"""Densities: programs that say how probable data are."""

from pyrozoo.zoo.density.vae import VAE

__all__ = ["VAE"]
