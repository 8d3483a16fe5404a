"""Programs whose rows belong to clusters."""

from pyrozoo.zoo.clustering.dcn import DCN
from pyrozoo.zoo.clustering.dec import DEC
from pyrozoo.zoo.clustering.gmvae import GMVAE
from pyrozoo.zoo.clustering.mfcvae import MFCVAE
from pyrozoo.zoo.clustering.vade import VaDE
from pyrozoo.zoo.clustering.vaeem import VAEEM

__all__ = ["DCN", "DEC", "GMVAE", "MFCVAE", "VAEEM", "VaDE"]
