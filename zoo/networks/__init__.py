"""Networks that return distributions: encoders, decoders, classifiers and likelihoods.

Every network accepts any number of leading dimensions on every input, because enumeration and
particle dimensions arrive on the left and are meant to broadcast. `*` stands for them in shapes.
"""

from pyrozoo.zoo.networks.batched import Batched, batched, broadcast_leading
from pyrozoo.zoo.networks.column import Column
from pyrozoo.zoo.networks.columns import Columns
from pyrozoo.zoo.networks.conv import ConvClassifier, ConvDecoder, ConvEncoder
from pyrozoo.zoo.networks.dense import Classifier, Decoder, Encoder, GaussianEncoder
from pyrozoo.zoo.networks.features import Features
from pyrozoo.zoo.networks.ladder import LadderDecoder
from pyrozoo.zoo.networks.likelihoods import (
    MIN_SCALE,
    Bernoulli,
    Beta,
    Categorical,
    ContinuousBernoulli,
    Likelihood,
    LogNormal,
    NegativeBinomial,
    Normal,
    Ordered,
    Poisson,
    StudentT,
    ZeroInflatedNegativeBinomial,
    inverse_positive_scale,
    likelihood,
    positive_scale,
)
from pyrozoo.zoo.networks.mixed import Mixed
from pyrozoo.zoo.networks.mlp import MLP, SplitLinear, make_activation, one_hot
from pyrozoo.zoo.networks.precision import set_precision

__all__ = [
    "MIN_SCALE",
    "MLP",
    "Batched",
    "Bernoulli",
    "Beta",
    "Categorical",
    "Classifier",
    "Column",
    "Columns",
    "ContinuousBernoulli",
    "ConvClassifier",
    "ConvDecoder",
    "ConvEncoder",
    "Decoder",
    "Encoder",
    "Features",
    "GaussianEncoder",
    "LadderDecoder",
    "Likelihood",
    "LogNormal",
    "Mixed",
    "NegativeBinomial",
    "Normal",
    "Ordered",
    "Poisson",
    "SplitLinear",
    "StudentT",
    "ZeroInflatedNegativeBinomial",
    "batched",
    "broadcast_leading",
    "inverse_positive_scale",
    "likelihood",
    "make_activation",
    "one_hot",
    "positive_scale",
    "set_precision",
]
