"""The programs that are timed, and their losses written by hand, on the same networks."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import nn

from pyrozoo.guides import Amortized, Classifier, ProductOfExperts, Sequential
from pyrozoo.inference import EnumELBO, SubsetELBO
from pyrozoo.zoo.clustering import VaDE
from pyrozoo.zoo.multimodal import MVAE
from pyrozoo.zoo.networks import Decoder
from pyrozoo.zoo.semisupervised import M2

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import twins

DEEP = (500, 500, 2000)


@dataclass
class Model:
    """A program, a guide and an objective, with data of random pixels.

    Attributes:
        by_hand: name -> the loss without Pyro, a function of program, guide and data.
    """

    name: str
    program: nn.Module
    guide: nn.Module
    data: dict[str, Any]
    by_hand: dict[str, Callable[..., torch.Tensor]] = field(default_factory=dict)
    objective: EnumELBO = field(default_factory=EnumELBO)


class VAE(nn.Module):
    """z ~ Normal(0, I), x | z ~ Bernoulli(decoder(z))."""

    def __init__(self, x_dim, latent_dim, hidden):
        super().__init__()
        self.register_buffer("zeros", torch.zeros(latent_dim))
        self.decoder = Decoder(latent_dim, tuple(reversed(hidden)), x_dim)

    def forward(self, batch):
        with pyro.plate("data", len(batch)):
            z = pyro.sample("z", dist.Normal(self.zeros, 1.0).to_event(1))
            pyro.sample("x", self.decoder(z))


def pixels(rows, x_dim, binary=False):
    x = torch.rand(rows, x_dim)
    return (x > 0.5).float() if binary else x


def named(kind, x_dim, hidden, latent_dim, rows, more=""):
    widths = "-".join(map(str, (x_dim, *hidden, latent_dim)))
    return f"{kind} {widths}, batch {rows}{more}"


def vade(rows, hidden=DEEP, latent_dim=10, x_dim=784, num_clusters=10, binary=False):
    program = VaDE(x_dim, num_clusters, latent_dim, hidden)
    guide = Amortized(program, ["x"], hidden)

    def by_hand(program, guide, data):
        noise = torch.randn(len(data["x"]), latent_dim)
        return -twins.vade(program, guide, data["x"], noise).mean()

    data = {"x": pixels(rows, x_dim, binary)}
    return Model(
        named("VaDE", x_dim, hidden, latent_dim, rows), program, guide, data, {"by hand": by_hand}
    )


def vae(rows, hidden=DEEP, latent_dim=10, x_dim=784, binary=False):
    program = VAE(x_dim, latent_dim, hidden)
    guide = Amortized(program, ["x"], hidden)

    def by_hand(program, guide, data):
        loc, scale = twins.encode(guide.networks["z"], data["x"])
        z = loc + scale * torch.randn_like(loc)
        fit = twins.log_bernoulli(data["x"], program.decoder.mlp(z))
        return (twins.kl_to_standard(loc, scale) - fit).mean()

    data = {"x": pixels(rows, x_dim, binary)}
    return Model(
        named("VAE", x_dim, hidden, latent_dim, rows), program, guide, data, {"by hand": by_hand}
    )


def m2(rows, hidden=(500,), latent_dim=50, x_dim=784, num_classes=10, labelled=False):
    """M2 without labels, or with half of them."""
    program = M2(x_dim, num_classes, latent_dim, hidden)
    parts = [Classifier(program, "y", ["x"], hidden), Amortized(program, ["x", "y"], hidden)]
    data = {"x": pixels(rows, x_dim)}
    if labelled:
        data["y"] = (torch.randint(num_classes, (rows,)), torch.arange(rows) % 2 == 0)

    def split(program, guide, data):
        classifier, encoder = nets(guide)
        noise = torch.randn(len(data["x"]), latent_dim)
        if labelled:
            return -twins.m2(program, guide, data["x"], noise, *data["y"], alpha=0.1).mean()
        return -twins.m2_unlabelled(program, encoder, classifier, data["x"], noise).mean()

    def repeated(program, guide, data):
        noise = torch.randn(len(data["x"]) * num_classes, latent_dim)
        return -m2_repeated(program, *nets(guide), data["x"], noise).mean()

    by_hand = {"by hand": split}
    if not labelled:
        by_hand = {"by hand, x repeated": repeated, "by hand": split}
    more = ", half labelled" if labelled else ", no labels"
    return Model(
        named("M2", x_dim, hidden, latent_dim, rows, more), program, Sequential(*parts), data,
        by_hand, EnumELBO(observed_guide_weights={"y": 0.1} if labelled else None),
    )  # fmt: skip


def nets(guide):
    return guide.parts[0].network, guide.parts[1].networks["z"]


def m2_repeated(program, classifier, encoder, x, noise):
    """The bound of unlabelled rows as published code has it: every row K times, with a one-hot
    label beside it, through plain linear layers.

    ``noise`` is ``(K rows, latent_dim)``, all rows of one class after the other.
    """
    log_q = classifier.mlp(x).log_softmax(-1)
    num_classes = log_q.shape[1]
    y = torch.eye(num_classes).repeat_interleave(len(x), 0)
    repeated = x.repeat(num_classes, 1)
    features = plain(encoder.trunk, torch.cat([repeated, y], 1))
    loc, scale = encoder.loc(features), F.softplus(encoder.raw_scale(features)) + 1e-4
    z = loc + scale * noise
    logits = plain(program.decoder.mlp, torch.cat([z, y], 1))
    fit = -F.binary_cross_entropy_with_logits(logits, repeated, reduction="none").sum(-1)
    values = fit - twins.kl_to_standard(loc, scale) - torch.log(torch.tensor(float(num_classes)))
    values = values.reshape(num_classes, len(x)).T
    return (log_q.exp() * (values - log_q)).sum(-1)


def plain(mlp, inputs):
    """A multilayer perceptron whose first layer sees all inputs joined."""
    return mlp.rest(F.linear(inputs, mlp.first.weight, mlp.first.bias))


def mvae(rows, widths=(392, 392), hidden=(512, 512), latent_dim=64, subsets=True):
    """MVAE with the bounds of single modalities."""
    x_dims = {f"x_{i}": width for i, width in enumerate(widths)}
    program = MVAE(x_dims, latent_dim, hidden)
    guide = ProductOfExperts(program, list(x_dims), hidden=hidden, activation="silu")
    data = {name: pixels(rows, width) for name, width in x_dims.items()}
    objective = SubsetELBO([[name] for name in x_dims]) if subsets else EnumELBO()
    name = f"MVAE {len(widths)} x {widths[0]}-{'-'.join(map(str, hidden))}-{latent_dim}"
    return Model(f"{name}, batch {rows}", program, guide, data, objective=objective)
