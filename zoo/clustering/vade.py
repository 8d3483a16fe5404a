r"""VaDE: variational deep embedding, a mixture of Gaussians behind a decoder.

Generative process, for every row::

    y ~ Categorical(softmax(logits))              the cluster, one of K
    z | y ~ Normal(loc[y], scale[y])              its embedding
    x | z ~ likelihood(decoder(z))                the data

The cluster is not proposed but summed: ``log sum_y p(y) p(z | y)`` at each draw of z ~ q(z | x).

============ =================================================================
observed     what the run is
============ =================================================================
x            clustering
x, y (part)  semi-supervised: known rows see the density of their own component
x, y         classification by p(y | z)
y            the mixing weights alone
============ =================================================================

Source: Zhuxi Jiang, Yin Zheng, Huachun Tan, Bangsheng Tang, Hanning Zhou, "Variational deep
embedding: an unsupervised and generative approach to clustering" (2017).

Deviations: the sum over clusters is exact, where the released loss mixes responsibilities at one
draw with an expectation in closed form; weights are logits and scales a softplus, where raw
parameters could leave their range; the mixture starts from the best of several k-means-seeded EM
runs, by likelihood.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from scipy.optimize import linear_sum_assignment
from sklearn.mixture import GaussianMixture
from torch import Tensor, nn

from pyrozoo.guides import Mean
from pyrozoo.inference import Batch, EnumELBO, fit, predict
from pyrozoo.zoo.baselines import Covariance, gmm
from pyrozoo.zoo.networks import Decoder, inverse_positive_scale, positive_scale


class VaDE(nn.Module):
    """p(y, z, x) of the module's docstring.

    Args:
        x_dim: features of a row.
        num_clusters: K.
        latent_dim: dimension of z.
        hidden: widths of the encoder's hidden layers; the decoder mirrors them.
        likelihood: of x given z, a name or a module of :mod:`pyrozoo.zoo.networks`.
    """

    def __init__(
        self,
        x_dim: int = 784,
        num_clusters: int = 10,
        latent_dim: int = 10,
        hidden: Sequence[int] = (500, 500, 2000),
        likelihood: Any = "bernoulli",
    ) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(num_clusters))
        self.loc = nn.Parameter(torch.randn(num_clusters, latent_dim))
        raw_scale = inverse_positive_scale(1.0)
        self.raw_scale = nn.Parameter(torch.full((num_clusters, latent_dim), raw_scale))
        self.decoder = Decoder(latent_dim, tuple(reversed(hidden)), x_dim, likelihood)

    @property
    def scale(self) -> Tensor:
        """Standard deviations of the components, ``(K, latent_dim)``."""
        return positive_scale(self.raw_scale)

    def forward(self, batch: Batch) -> None:
        """Generate ``len(batch)`` rows."""
        with pyro.plate("data", len(batch)):
            y = pyro.sample("y", dist.Categorical(logits=self.logits))
            z = pyro.sample("z", dist.Normal(self.loc[y], self.scale[y]).to_event(1))
            pyro.sample("x", self.decoder(z))

    @torch.no_grad()
    def set_mixture(self, weights: Any, means: Any, scales: Any) -> None:
        """Start the mixture at these weights ``(K,)``, means and standard deviations ``(K, D)``."""
        self.logits.copy_(torch.as_tensor(weights).log())
        self.loc.copy_(torch.as_tensor(means))
        floor = 1e-3  # EM may shrink a component onto a few points
        scales = torch.as_tensor(scales).clamp_min(floor)
        raw = [[inverse_positive_scale(s) for s in row] for row in scales.tolist()]
        self.raw_scale.copy_(torch.tensor(raw))


def start_mixture(
    program: VaDE,
    guide: Any,
    data: Batch,
    *,
    epochs: int = 20,
    batch_size: int = 256,
    lr: float = 1e-3,
    noise: float = 0.0,
    covariance: Covariance = "full",
    num_starts: int = 10,
    seed: int = 0,
    progress: bool = False,
    **settings: Any,
) -> None:
    """Pretrain as an autoencoder, then put the mixture on its codes.

    The autoencoder is the pair itself with a noiseless guide and only the likelihood in the
    objective.  The mixture is the most likely of ``num_starts`` Gaussian mixtures fitted by EM from
    k-means; of a full-covariance mixture the components' own variances are taken.  With labels in
    the data a second mixture starts at the means of the labelled codes, and labels count as
    certain; without any, none are looked at.

    Args:
        program, guide: trained in place.
        data: with x, and perhaps y.
        epochs, batch_size, lr: of the autoencoder.
        noise: sd of the noise on what its encoder reads (a denoising autoencoder).
        covariance: ``"full"`` or ``"diag"``, of the mixture on the codes.
        num_starts: mixtures from which the most likely is taken.
        seed: of all of it.
        progress: show a progress bar.
        settings: further ones of the autoencoder's fit: folder, resume, compile, device.
    """
    only_x = data.drop(*(name for name in data.names if name != "x"))
    reconstruction = EnumELBO(weights={"y": 0.0, "z": 0.0})
    fit(
        program, Mean(guide, noise), only_x, objective=reconstruction, epochs=epochs,
        batch_size=batch_size, lr=lr, seed=seed, progress=progress, title="autoencoder",
        decided_by={"noise": noise}, **settings,
    )  # fmt: skip
    drawn = predict(program, Mean(guide), only_x, "z", num_samples=1, seed=seed)
    codes = drawn.double().cpu().numpy()
    mixture = gmm(codes, len(program.logits), seed, covariance, num_starts)
    share = mixture.predict_proba(codes)
    if "y" in data:
        labels, known = (v.cpu().numpy() for v in (data["y"], data.present("y")))
        share = _start_at_labels(mixture, codes, share, labels, known)
    total = share.sum(0)[:, None] + 1e-9
    means = share.T @ codes / total
    scales = np.sqrt((share.T @ codes**2 / total - means**2).clip(0))
    program.set_mixture(share.mean(0) + 1e-9, means, scales)


def _start_at_labels(mixture: Any, codes: Any, share: Any, labels: Any, known: Any) -> Any:
    """Responsibilities ``(rows, K)`` of a mixture that starts where the labelled rows are.

    The component of a class without labelled rows starts where the mixture without labels has one
    that agrees with none of the others.
    """
    size = share.shape[1]
    agreement = np.stack([share[known & (labels == k)].sum(0) for k in range(size)])
    means = mixture.means_[linear_sum_assignment(agreement, maximize=True)[1]]
    for k in np.unique(labels[known]):
        means[k] = codes[known & (labels == k)].mean(0)
    again = GaussianMixture(
        size,
        covariance_type=mixture.covariance_type,
        means_init=means,
        max_iter=500,
        random_state=0,
    )
    share = again.fit(codes).predict_proba(codes)
    share[known] = np.eye(size)[labels[known]]
    return share
