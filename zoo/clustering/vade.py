r"""VaDE: variational deep embedding, a mixture of Gaussians behind a decoder.

Generative process, for every row::

    y ~ Categorical(softmax(logits))              the cluster, one of K
    z | y ~ Normal(loc[y], scale[y])              its embedding; diagonal or full covariance
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
runs, by likelihood.  Four more are options: full covariances, which hold clusters that lie askew
in the code space; a start from the codes' graph of nearest neighbours; an autoencoder that undoes
small turns and shifts of images, or noise; and noise on what the guide reads in training.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import numpy as np
import pyro
import pyro.distributions as dist
from scipy.optimize import linear_sum_assignment
from sklearn.mixture import GaussianMixture

from pyrozoo.inference import Batch
from pyrozoo.zoo.baselines import Covariance, gmm
from pyrozoo.zoo.clustering.mixture import Mixture
from pyrozoo.zoo.clustering.neighbours import Clusters, neighbour_parts
from pyrozoo.zoo.clustering.pretraining import given_labels, pretrain_autoencoder
from pyrozoo.zoo.networks import Decoder


class VaDE(Mixture):
    """p(y, z, x) of the module's docstring.

    Args:
        x_dim: features of a row.
        num_clusters: K.
        latent_dim: dimension of z.
        hidden: widths of the encoder's hidden layers; the decoder mirrors them.
        likelihood: of x given z, a name or a module of :mod:`pyrozoo.zoo.networks`.
        covariance: of a component, ``"diag"`` or ``"full"``.
    """

    def __init__(
        self,
        x_dim: int = 784,
        num_clusters: int = 10,
        latent_dim: int = 10,
        hidden: Sequence[int] = (500, 500, 2000),
        likelihood: Any = "bernoulli",
        covariance: Covariance = "diag",
    ) -> None:
        super().__init__(num_clusters, latent_dim, covariance)
        self.decoder = Decoder(latent_dim, tuple(reversed(hidden)), x_dim, likelihood)

    def forward(self, batch: Batch) -> None:
        """Generate ``len(batch)`` rows."""
        with pyro.plate("data", len(batch)):
            y = pyro.sample("y", dist.Categorical(logits=self.logits))
            z = pyro.sample("z", self.component(y))
            pyro.sample("x", self.decoder(z))


def start_mixture(
    program: VaDE,
    guide: Any,
    data: Batch,
    *,
    epochs: int = 20,
    batch_size: int = 256,
    lr: float = 1e-3,
    clusters: Clusters = "mixture",
    covariance: Covariance = "full",
    num_starts: int = 10,
    num_neighbors: int = 15,
    balance: float = 0.0,
    seed: int = 0,
    progress: bool = False,
    **settings: Any,
) -> None:
    """Pretrain as an autoencoder, then put the mixture on clusters of its codes.

    The autoencoder is the pair itself with a noiseless guide and only the likelihood in the
    objective.  The components get the weights, means and covariances (variances, where they are
    diagonal) that the codes have under responsibilities of one of these:

    ``clusters="mixture"``: the most likely of ``num_starts`` Gaussian mixtures fitted by EM from
    k-means.  With labels in the data a second mixture starts at the means of the labelled codes,
    and labels count as certain.

    ``clusters="neighbours"``: the parts of the codes' graph of nearest neighbours with the least
    normalised cut, see :mod:`.neighbours`; with labels in the data, these spread along it.

    No other labels are looked at.

    Args:
        program, guide: trained in place.
        data: with x, and perhaps y.
        epochs, batch_size, lr: of the autoencoder.
        clusters: ``"mixture"`` or ``"neighbours"``.
        covariance: ``"full"`` or ``"diag"``, of the mixture on the codes.
        num_starts: mixtures from which the most likely is taken, or runs of k-means for each number
            of eigenvectors of the graph.
        num_neighbors: of each row in the graph.
        balance: how much parts of like sizes are preferred, see :func:`.cut_graph`.
        seed: of all of it.
        progress: show a progress bar.
        settings: further ones of :func:`.pretrain_autoencoder`: noise, degrees, shift,
            image_shape, folder, resume, compile, device.

    Raises:
        ValueError: an option has another value, or there are too few rows.
    """
    if clusters not in get_args(Clusters):
        raise ValueError(f"clusters is 'mixture' or 'neighbours', got {clusters!r}")
    drawn = pretrain_autoencoder(
        program, guide, data, epochs=epochs, batch_size=batch_size, lr=lr, seed=seed,
        progress=progress, **settings,
    )  # fmt: skip
    codes, size = drawn.double().cpu().numpy(), len(program.logits)
    labels, known = given_labels(data)
    if clusters == "neighbours":
        parts = neighbour_parts(codes, size, labels, known, num_neighbors=num_neighbors,
                                num_starts=num_starts, balance=balance, seed=seed)  # fmt: skip
        share = np.eye(size)[parts]
    else:
        mixture = gmm(codes, size, seed, covariance, num_starts)
        share = mixture.predict_proba(codes)
        if labels is not None:
            share = _start_at_labels(mixture, codes, share, labels, known)
    program.set_mixture(share, codes)


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
