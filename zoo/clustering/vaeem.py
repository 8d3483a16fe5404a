r"""VAE+EM: a mixture of variational autoencoders, one for each cluster.

Generative process, for every row::

    y ~ Categorical(uniform)                      the cluster, one of K
    z ~ Normal(0, I)                              what varies within it
    x | y, z ~ likelihood(decoder_y(z))           the data: every cluster has its own decoder

The guide is q(y | x) q(z | x, y), with an encoder for each cluster as well.  q(y | x) has no
parameters, it is the E-step: with L_k(x) the bound of autoencoder k ::

    q(y = k | x)  proportional to  p(y = k) exp L_k(x)

which turns sum_y q(y | x) (log p(y) + L_y - log q(y | x)) into log sum_y p(y) exp L_y, its largest
value.  Its gradient, the M-step, is that of the autoencoders weighed by q(y | x).

============ =================================================================
observed     what the run is
============ =================================================================
x            clustering
x, y (part)  semi-supervised: a known row trains the autoencoder of its class
x, y         one autoencoder a class; classification by their bounds
============ =================================================================

Source: Michael Adipoetra, Ségolène Martin, "Deep generative clustering with VAEs and
expectation-maximization" (2025).

Deviations (from the abstract and a summary; the text with its settings was not at hand): E-step and
M-step alternate with every batch, and the E-step takes noise of its own (L is a draw), so that its
q(y | x) is the maximum only on average, and the bound a bound in any case.  The clusters start from
k-means, see :func:`start_kmeans`.  All encoders, and all decoders, are one stack of matrices.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from torch import Tensor, nn
from torch.distributions import kl_divergence

from pyrozoo.guides import Part
from pyrozoo.inference import Batch, fit
from pyrozoo.inference.partial import observed_entries
from pyrozoo.zoo.baselines import check_clusters
from pyrozoo.zoo.networks import likelihood as make_likelihood
from pyrozoo.zoo.networks import make_activation, positive_scale
from pyrozoo.zoo.networks.precision import computing_in


class Stack(nn.Module):
    """K multilayer perceptrons of one shape, one for each cluster, as one batched product.

    Where y has all clusters in a dimension of their own, as under enumeration, network k runs on
    the rows of cluster k alone.  Otherwise all K run on all rows, and then one is picked.

    Args:
        size: K.
        in_dim, hidden, out_dim: widths of the layers of each.
        activation: of the hidden layers.
    """

    def __init__(
        self, size: int, in_dim: int, hidden: Sequence[int], out_dim: int, activation: str = "relu"
    ) -> None:
        super().__init__()
        self.size, self.precision = size, "float32"
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for before, after in pairwise([in_dim, *hidden, out_dim]):
            reach = before**-0.5  # as nn.Linear starts
            self.weights.append(
                nn.Parameter(torch.empty(size, before, after).uniform_(-reach, reach))
            )
            self.biases.append(nn.Parameter(torch.empty(size, 1, after).uniform_(-reach, reach)))
        self.activation = make_activation(activation)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Map x ``(*, in_dim)`` and y ``(*)``, whose shapes broadcast, to ``(*, out_dim)``."""
        lead = torch.broadcast_shapes(x.shape[:-1], y.shape)
        x = x.expand(*lead, x.shape[-1])
        if y.dim() == len(lead) > 1 and y.shape[0] == y.numel() <= self.size:
            out = self._run(x.reshape(len(y), -1, x.shape[-1]), y.flatten())
        else:
            rows = x.reshape(-1, x.shape[-1])
            every = self._run(rows.expand(self.size, *rows.shape), None)
            row = torch.arange(len(rows), device=x.device)
            out = every[y.expand(lead).reshape(-1), row]
        return out.reshape(*lead, out.shape[-1])

    def _run(self, h: Tensor, which: Tensor | None) -> Tensor:
        """Rows ``(networks, rows, in_dim)`` through all networks, or these ``(networks,)``."""
        dtype = h.dtype
        with computing_in(self.precision, h.device):
            for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
                h = self.activation(h) if i else h
                if which is not None:
                    weight, bias = weight[which], bias[which]
                h = torch.baddbmm(bias, h, weight)
        return h.to(dtype)


class StackEncoder(nn.Module):
    """q(z | x, y) of every cluster: a :class:`Stack` whose outputs are location and scale."""

    def __init__(
        self,
        size: int,
        x_dim: int,
        hidden: Sequence[int],
        latent_dim: int,
        activation: str = "relu",
    ) -> None:
        super().__init__()
        self.stack = Stack(size, x_dim, hidden, 2 * latent_dim, activation)

    def forward(self, x: Tensor, one_hot: Tensor) -> Any:
        """A normal with batch shape ``*`` for x ``(*, x_dim)`` and one-hot clusters ``(*, K)``."""
        loc, raw_scale = self.stack(x, one_hot.argmax(-1)).chunk(2, -1)
        return dist.Normal(loc, positive_scale(raw_scale)).to_event(1)


class VAEEM(nn.Module):
    """p(y, z, x) of the module's docstring.

    Args:
        x_dim: features of a row.
        num_clusters: K.
        latent_dim: dimension of z.
        hidden: widths of the hidden layers of each encoder; the decoders mirror them.
        likelihood: of x, a name or a module of :mod:`pyrozoo.zoo.networks`.
        activation: of the hidden layers.
    """

    zeros: Tensor

    def __init__(
        self,
        x_dim: int = 784,
        num_clusters: int = 10,
        latent_dim: int = 10,
        hidden: Sequence[int] = (200,),
        likelihood: Any = "bernoulli",
        activation: str = "relu",
    ) -> None:
        super().__init__()
        self.num_clusters = num_clusters
        self.register_buffer("zeros", torch.zeros(latent_dim), persistent=False)
        self.likelihood = make_likelihood(likelihood, x_dim)
        widths = tuple(reversed(hidden))
        outputs = self.likelihood.num_params
        self.decoders = Stack(num_clusters, latent_dim, widths, outputs, activation)

    def forward(self, batch: Batch) -> None:
        """Generate ``len(batch)`` rows."""
        with pyro.plate("data", len(batch)):
            uniform = self.zeros.new_zeros(self.num_clusters)
            y = pyro.sample("y", dist.Categorical(logits=uniform))
            z = pyro.sample("z", dist.Normal(self.zeros, 1.0).to_event(1))
            pyro.sample("x", self.likelihood(self.decoders(z, y)))


class EStep(Part):
    """q(y | x) of the module's docstring, without parameters of its own and without gradients.

    Args:
        program: a :class:`VAEEM`, whose decoders are read and not owned.
        encoder: of z given x and y, shared with the part of the guide that proposes z.
        num_draws: of z, over which L is averaged; 0 takes the mean of z.

    Raises:
        ValueError: ``num_draws`` is negative.
    """

    def __init__(self, program: VAEEM, encoder: StackEncoder, num_draws: int = 1) -> None:
        super().__init__()
        if num_draws < 0:
            raise ValueError(f"num_draws is zero or more, got {num_draws}")
        self.encoder, self.num_draws = encoder, num_draws
        self._program = (program,)  # not as a submodule: its parameters belong to the program

    @torch.no_grad()
    def bounds(self, batch: Batch) -> Tensor:
        """L of every row and cluster, ``(rows, K)``; zero in rows without x."""
        (program,) = self._program
        present = batch.present("x")
        known = present.reshape(len(batch), -1).expand(len(batch), batch["x"].shape[-1])
        x = torch.where(known, batch["x"], 0.0).to(program.zeros.dtype)
        y = torch.arange(program.num_clusters, device=x.device).reshape(-1, 1, 1)
        q = self.encoder.stack(x, y)
        loc, raw_scale = q.chunk(2, -1)  # (K, 1, rows, latent_dim)
        normal = dist.Normal(loc, positive_scale(raw_scale))
        shape = (program.num_clusters, max(1, self.num_draws), *loc.shape[2:])
        z = normal.loc + normal.scale * self.noise(shape).to(x)
        fn = program.likelihood(program.decoders(z, y))
        if batch.partly("x"):
            fn = observed_entries(fn, known, "site 'x'")
        divergence = kl_divergence(normal, dist.Normal(0.0 * loc, 1.0)).sum(-1)
        value = fn.log_prob(x).mean(1) - divergence.squeeze(1)
        return torch.where(known.any(-1), value, 0.0).T

    def noise(self, shape: Sequence[int]) -> Tensor:
        """Standard normal noise; zeros if the mean is taken."""
        return torch.randn(*shape) if self.num_draws else torch.zeros(*shape)

    def inside(self, batch: Batch, drawn: Any) -> dict[str, Tensor]:
        """Draw the cluster (under an enumerating objective: all of them)."""
        (program,) = self._program
        logits = program.zeros.new_zeros(len(batch), program.num_clusters)
        if "x" in batch:
            logits = self.bounds(batch)
        return {"y": pyro.sample("y", dist.Categorical(logits=logits))}


def start_kmeans(
    program: VAEEM,
    guide: nn.Module,
    data: Batch,
    *,
    epochs: int = 10,
    batch_size: int = 256,
    lr: float = 1e-3,
    num_starts: int = 10,
    seed: int = 0,
    progress: bool = False,
    **settings: Any,
) -> None:
    """Train each autoencoder on one of K clusters of k-means, as if they were known.

    From random networks the first autoencoder that is a little better takes most rows.  Known
    labels are kept; clusters are named by them, one to one, so that most known rows agree.

    Args:
        program, guide: trained in place.
        data: with x, and perhaps y; missing entries are zero for k-means.
        epochs, batch_size, lr: of this fit.
        num_starts: runs of k-means, of which the tightest is taken.
        seed: of all of it.
        progress: show a progress bar.
        settings: further ones of this fit: folder, resume, compile, device.
    """
    present = data.present("x")
    x = torch.where(present.reshape(len(data), -1), data["x"], 0.0).cpu().numpy()
    size = program.num_clusters
    check_clusters(size, len(data))
    found = KMeans(size, n_init=num_starts, random_state=seed).fit(x).labels_
    if "y" in data:
        labels, known = data["y"].cpu().numpy(), data.present("y").cpu().numpy()
        agreement = np.zeros((size, size))
        np.add.at(agreement, (found[known], labels[known]), 1)
        found = np.where(known, labels, linear_sum_assignment(agreement, maximize=True)[1][found])
    named = {"x": (data["x"], present), "y": found.astype(np.int64)}
    fit(
        program, guide, named, epochs=epochs, batch_size=batch_size, lr=lr, seed=seed,
        progress=progress, title="known clusters", **settings,
    )  # fmt: skip
