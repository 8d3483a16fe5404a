"""Programs, guides and data that the laws run over, and noise that is tied to the rows of a batch."""

import math
from dataclasses import dataclass, field
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from torch import nn

from pyrozoo.guides import Amortized, Classifier, ProductOfExperts, Sequential
from pyrozoo.inference import EnumELBO
from pyrozoo.zoo.clustering import VaDE
from pyrozoo.zoo.imputation import HIVAE
from pyrozoo.zoo.multimodal import MVAE
from pyrozoo.zoo.networks import Column, Columns, Decoder
from pyrozoo.zoo.semisupervised import M2

ROWS = 9
NOISE = 16  # width of the noise of a row


# ---- noise that belongs to a row --------------------------------------------------------------------


class GivenNormal(dist.Normal):
    """A normal distribution whose draws are made of given noise."""

    noise: Any = None

    def expand(self, batch_shape, _instance=None):
        new = super().expand(batch_shape, _instance)
        new.noise = self.noise
        return new

    def rsample(self, sample_shape=()):
        return self.loc + self.scale * self.noise


class _Replay(Messenger):
    def __init__(self, owner, batch):
        super().__init__()
        self.owner, self.batch = owner, batch

    def _pyro_sample(self, msg):
        base = getattr(msg["fn"], "base_dist", msg["fn"])
        if not isinstance(base, dist.Normal):
            return
        new = GivenNormal(base.loc, base.scale)
        new.noise = self.owner.draw(msg, self.batch)
        msg["fn"] = new.to_event(len(msg["fn"].event_shape))


class Replay(nn.Module):
    """A guide whose Gaussian draws are made of ``batch["noise"]``, or of a buffer if global."""

    def __init__(self, guide):
        super().__init__()
        self.guide = guide
        self.columns = {}
        self.register_buffer("shared", torch.randn(NOISE))

    def draw(self, msg, batch):
        shape = msg["fn"].event_shape
        if msg["name"] not in self.columns:
            start = sum(width for _, width in self.columns.values())
            self.columns[msg["name"]] = (start, math.prod(shape))
        start, width = self.columns[msg["name"]]
        local = any(f.name == "data" for f in msg["cond_indep_stack"])
        noise = batch["noise"] if local else self.shared
        noise = noise[..., start : start + width]
        return noise.reshape(noise.shape[:-1] + shape)

    def forward(self, batch):
        with _Replay(self, batch):
            return self.guide(batch)


# ---- small programs ---------------------------------------------------------------------------------


class FactorAnalysis(nn.Module):
    """z ~ N(0, I), x | z ~ N(W z + b, diag(s^2)): the evidence is a normal density."""

    def __init__(self, x_dim=5, latent_dim=2):
        super().__init__()
        self.linear = nn.Linear(latent_dim, x_dim)
        self.log_scale = nn.Parameter(0.3 * torch.randn(x_dim))
        self.latent_dim = latent_dim

    def forward(self, batch):
        with pyro.plate("data", len(batch)):
            zero = self.log_scale.new_zeros(self.latent_dim)
            z = pyro.sample("z", dist.Normal(zero, 1.0).to_event(1))
            fn = dist.Normal(self.linear(z), self.log_scale.exp())
            pyro.sample("x", fn.to_event(1))

    def evidence(self, batch):
        weight, noise = self.linear.weight, torch.diag((2 * self.log_scale).exp())
        cov = weight @ weight.T + noise
        present = batch.present("x")
        present = present if present.dim() == 2 else present.unsqueeze(1).expand_as(batch["x"])
        values = []
        for x, known in zip(batch["x"], present, strict=True):
            if not known.any():
                values.append(x.new_zeros(()))
                continue
            part = cov[known][:, known]
            values.append(dist.MultivariateNormal(self.linear.bias[known], part).log_prob(x[known]))
        return torch.stack(values)


class Mixture(nn.Module):
    """y ~ Categorical, x | y ~ N(loc[y], scale[y]): no guide is needed."""

    def __init__(self, num_clusters=3, x_dim=4):
        super().__init__()
        self.logits = nn.Parameter(torch.randn(num_clusters))
        self.loc = nn.Parameter(torch.randn(num_clusters, x_dim))
        self.log_scale = nn.Parameter(0.3 * torch.randn(num_clusters, x_dim))

    def forward(self, batch):
        with pyro.plate("data", len(batch)):
            y = pyro.sample("y", dist.Categorical(logits=self.logits))
            pyro.sample("x", dist.Normal(self.loc[y], self.log_scale.exp()[y]).to_event(1))

    def evidence(self, batch):
        prior = self.logits.log_softmax(-1).expand(len(batch), -1)
        joint = prior
        if "x" in batch:
            fn = dist.Normal(self.loc, self.log_scale.exp()).to_event(1)
            density = fn.log_prob(batch["x"].unsqueeze(1))
            joint = joint + torch.where(batch.present("x").unsqueeze(1), density, 0.0)
        if "y" in batch:
            label = nn.functional.one_hot(batch["y"], len(self.logits)).bool()
            fits = label | ~batch.present("y").unsqueeze(1)
            joint = torch.where(fits, joint, -torch.inf)
        return joint.logsumexp(-1)


class Empty(nn.Module):
    """A guide that proposes nothing."""

    def forward(self, batch):
        return {}


class Globals(nn.Module):
    """A mixture of which the component means are latent and shared by all rows."""

    def __init__(self, num_clusters=3, x_dim=4):
        super().__init__()
        self.logits = nn.Parameter(torch.randn(num_clusters))
        self.spread = nn.Parameter(torch.randn(()))
        self.shape = (num_clusters, x_dim)

    def forward(self, batch):
        zero = self.logits.new_zeros(self.shape)
        means = pyro.sample("means", dist.Normal(zero, self.spread.exp()).to_event(2))
        with pyro.plate("data", len(batch)):
            y = pyro.sample("y", dist.Categorical(logits=self.logits))
            index = torch.eye(self.shape[0], dtype=zero.dtype)[y]
            loc = (index.unsqueeze(-1) * means).sum(-2)
            pyro.sample("x", dist.Normal(loc, 0.7).to_event(1))


class GlobalsGuide(nn.Module):
    def __init__(self, num_clusters=3, x_dim=4):
        super().__init__()
        self.loc = nn.Parameter(torch.randn(num_clusters, x_dim))
        self.log_scale = nn.Parameter(-torch.ones(num_clusters, x_dim))

    def forward(self, batch):
        pyro.sample("means", dist.Normal(self.loc, self.log_scale.exp()).to_event(2))


class Hierarchy(nn.Module):
    """z_2 ~ N(0, I), z_1 | z_2 ~ N(f(z_2), 1), x | z_1: two levels."""

    def __init__(self, x_dim=5):
        super().__init__()
        self.prior = nn.Linear(2, 3)
        self.decoder = Decoder(3, (6,), x_dim, "normal", "tanh")

    def forward(self, batch):
        with pyro.plate("data", len(batch)):
            zero = self.prior.weight.new_zeros(2)
            z_2 = pyro.sample("z_2", dist.Normal(zero, 1.0).to_event(1))
            z_1 = pyro.sample("z_1", dist.Normal(torch.tanh(self.prior(z_2)), 1.0).to_event(1))
            pyro.sample("x", self.decoder(z_1))


class Ladder(nn.Module):
    """q(z_2 | x) q(z_1 | z_2, x) from the top down, or q(z_1 | x) q(z_2 | z_1) from the bottom up."""

    def __init__(self, x_dim=5, top_down=True):
        super().__init__()
        self.top_down = top_down
        self.first = nn.Linear(x_dim, 2 if top_down else 3)
        self.second = nn.Linear(x_dim + 2, 3) if top_down else nn.Linear(3, 2)
        self.log_scales = nn.Parameter(torch.tensor([-0.5, -0.8]))

    def forward(self, batch):
        x = batch["x"] if "x" in batch else self.first.weight.new_zeros(len(batch), 5)
        a, b = self.log_scales.exp()
        with pyro.plate("data", len(batch)):
            names = ("z_2", "z_1") if self.top_down else ("z_1", "z_2")
            z = pyro.sample(names[0], dist.Normal(self.first(x), a).to_event(1))
            seen = torch.cat([x.expand(z.shape[:-1] + x.shape[-1:]), z], -1) if self.top_down else z
            pyro.sample(names[1], dist.Normal(self.second(seen), b).to_event(1))


# ---- the cases --------------------------------------------------------------------------------------


MADE: dict = {}
PAIRS: dict = {}


def elbo(*args, kind=EnumELBO, **options):
    """An objective that shares its observed pairs with all others, so that graphs are read once."""
    objective = kind(*args, **options)
    objective._pairs = PAIRS.setdefault((objective.inputs, objective.replace), {})
    return objective


@dataclass
class Case:
    """A pair (made under a seed) and complete data; ``partial`` are the sites that may be missing."""

    name: str
    make: Any
    widths: dict  # site -> features, 0 for a label
    labels: dict = field(default_factory=dict)  # site -> K
    unit: bool = True  # features in [0, 1]
    globals: bool = False
    draw: Any = None  # (rows, generator) -> values of x, if they are not plain numbers

    def pair(self, fresh=False):
        """Program and guide, the same in every test but for those that change their parameters."""
        if fresh or self.name not in MADE:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                program, guide = self.make()
            pair = program.double(), Replay(guide).double()
            if fresh:
                return pair
            MADE[self.name] = pair
        return MADE[self.name]

    def data(self, seed=0, rows=ROWS):
        generator = torch.Generator().manual_seed(seed)
        data = {"noise": torch.randn(rows, NOISE, generator=generator, dtype=torch.float64)}
        for name, width in self.widths.items():
            if name == "x" and self.draw:
                data[name] = self.draw(rows, generator)
            elif width:
                sampler = torch.rand if self.unit else torch.randn
                data[name] = sampler(rows, width, generator=generator, dtype=torch.float64)
            else:
                data[name] = torch.randint(self.labels[name], (rows,), generator=generator)
        return data

    def patterns(self, seed=0):
        """Complete data; each site unknown; each partly known; all partly known."""
        full = self.data(seed)
        generator = torch.Generator().manual_seed(seed + 1)
        masks = {n: torch.rand(ROWS, generator=generator) < 0.6 for n in self.widths}
        for i, mask in enumerate(masks.values()):
            mask[0], mask[1 + i] = False, True  # the first row knows nothing
        yield "complete", full
        for name in self.widths:
            if len(self.widths) > 1:
                yield f"no {name}", {n: v for n, v in full.items() if n != name}
            yield f"some {name}", {**full, name: (full[name], masks[name])}
        pairs = {n: (full[n], mask) for n, mask in masks.items()}
        yield "some of all", {"noise": full["noise"], **pairs}


def _vade():
    program = VaDE(6, 3, 2, (8,))
    return program, Amortized(program, ["x"], (8,))


def _vade_classifier():
    program = VaDE(6, 3, 2, (8,))
    parts = [Classifier(program, "y", ["x"], (8,)), Amortized(program, ["x", "y"], (8,))]
    return program, Sequential(*parts)


def _m2():
    program = M2(6, 4, 3, (8,))
    parts = [Classifier(program, "y", ["x"], (8,)), Amortized(program, ["x", "y"], (8,))]
    return program, Sequential(*parts)


def _m2_summed():
    program = M2(6, 4, 3, (8,))
    return program, Amortized(program, ["x"], (8,))


def _mvae():
    program = MVAE({"x_a": 6, "x_b": 4}, 3, (8,))
    return program, ProductOfExperts(program, ["x_a", "x_b"], hidden=(8,))


def _factor_analysis():
    program = FactorAnalysis()
    return program, Amortized(program, ["x"], (8,))


def _mixed_row(rows, generator):
    """Values of the columns of :func:`_columns`, ``(rows, 5)``."""
    uniform = torch.rand(rows, 5, generator=generator, dtype=torch.float64)
    real, coin, level, count, size = uniform.unbind(1)
    coin, level, count = (coin < 0.4), (3 * level).floor(), (6 * count**2).floor()
    return torch.stack([5 + 4 * real, coin.double(), level, count, (3 * size).exp()], 1)


def _columns():
    return Columns(
        [
            Column("real", "normal", center=7.0, spread=1.2),
            Column("coin", "bernoulli", center=0.4),
            Column("level", "categorical", 3),
            Column("count", "poisson", center=0.8, spread=0.6),
            Column("size", "log_normal", center=1.5, spread=0.9),
        ]
    )


def _hivae():
    program = HIVAE({"x": _columns()}, 3, 2, (8,), "tanh")
    parts = [Classifier(program, "y", ["x"], (8,)), Amortized(program, ["x", "y"], (8,))]
    return program, Sequential(*parts)


def _hivae_summed():
    program = HIVAE({"x": _columns()}, 3, 2, (8,), "tanh")
    return program, Amortized(program, ["x"], (8,))


CASES = {
    case.name: case
    for case in [
        Case("vade", _vade, {"x": 6, "y": 0}, {"y": 3}),
        Case("vade, q(y|x)", _vade_classifier, {"x": 6, "y": 0}, {"y": 3}),
        Case("m2", _m2, {"x": 6, "y": 0}, {"y": 4}),
        Case("m2, y summed", _m2_summed, {"x": 6, "y": 0}, {"y": 4}),
        Case("mvae", _mvae, {"x_a": 6, "x_b": 4}),
        Case("factor analysis", _factor_analysis, {"x": 5}, unit=False),
        Case("mixture", lambda: (Mixture(), Empty()), {"x": 4, "y": 0}, {"y": 3}, unit=False),
        Case(
            "globals",
            lambda: (Globals(), GlobalsGuide()),
            {"x": 4, "y": 0},
            {"y": 3},
            unit=False,
            globals=True,
        ),
        Case("hivae", _hivae, {"x": 5, "y": 0}, {"y": 3}, draw=_mixed_row),
        Case("hivae, y summed", _hivae_summed, {"x": 5, "y": 0}, {"y": 3}, draw=_mixed_row),
        Case("hierarchy", lambda: (Hierarchy(), Ladder()), {"x": 5}, unit=False),
    ]
}
