"""Networks that return distributions: encoders, decoders, classifiers and likelihoods.

Every network accepts any number of leading dimensions on every input, because enumeration and
particle dimensions arrive on the left and are meant to broadcast. `*` stands for them in shapes.
"""

from pyrozoo.zoo.networks.batched import Batched, batched, broadcast_leading
from pyrozoo.zoo.networks.conv import ConvClassifier, ConvDecoder, ConvEncoder
from pyrozoo.zoo.networks.dense import Classifier, Decoder, Encoder, GaussianEncoder
from pyrozoo.zoo.networks.likelihoods import (
    MIN_SCALE,
    Bernoulli,
    Categorical,
    Likelihood,
    Normal,
    inverse_positive_scale,
    likelihood,
    positive_scale,
)
from pyrozoo.zoo.networks.mlp import MLP, SplitLinear, make_activation, one_hot

__all__ = [
    "MIN_SCALE",
    "MLP",
    "Batched",
    "Bernoulli",
    "Categorical",
    "Classifier",
    "ConvClassifier",
    "ConvDecoder",
    "ConvEncoder",
    "Decoder",
    "Encoder",
    "GaussianEncoder",
    "Likelihood",
    "Normal",
    "SplitLinear",
    "batched",
    "broadcast_leading",
    "inverse_positive_scale",
    "likelihood",
    "make_activation",
    "one_hot",
    "positive_scale",
]
