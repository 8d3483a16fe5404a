"""The scikit-learn front door: clustering and classification by a method of the catalogue.

======================= =======================================================================
:class:`DeepClusterer`  y is the cluster, never observed
:class:`DeepClassifier` y is the class, observed where the label is known
======================= =======================================================================

Both take any method with a finite site ``y`` over real columns ``x``.  NaN in ``X`` says that an
entry is missing, in training and afterwards; it is summed out, which is right when data are missing
at random.  For a normal likelihood, columns are standardised on the known entries of the training
rows, and whatever comes back is in their own units.

What an estimator says of a row depends on that row and the parameters alone: the Gaussian draws of
the guide come from one seed, taken from ``random_state`` at fit, and all rows share their noise.
"""

from pyrozoo.zoo.estimators.base import methods
from pyrozoo.zoo.estimators.classify import DeepClassifier
from pyrozoo.zoo.estimators.cluster import DeepClusterer

__all__ = ["DeepClassifier", "DeepClusterer", "methods"]
