"""Time of an epoch, end to end: ``fit`` against ClustPy, pythae and MultiVae.

    PYTHONPATH=FOLDER ZOO_DATA=DATA python tests/benchmarks mnist mvae

Every library runs its own training loop, data loading included, with batches of the same size,
Adam, and the same networks.  A training loop stands still while the others have their turn.
"""

import tempfile

import torch
from measuring import Case, Turns, absent, measure
from models import DEEP, VAE, mvae, vade
from steps import BF16, has_bf16, pair

from pyrozoo.guides import Amortized
from pyrozoo.inference import fit
from pyrozoo.zoo import datasets

CLUSTPY = "clustpy"
PYTHAE = "pythae cloudpickle imageio pydantic"
MULTIVAE = "multivae pythae nltk regex click joblib torchmetrics lightning-utilities cloudpickle"


def images(options, rows=60000):
    """MNIST in [0, 1], ``(rows, 784)``; random pixels if tiny."""
    if options.tiny:
        return torch.rand(300, 784)
    return datasets.load("mnist", options.root).x[:rows].float() / 255


def ours(model, data, epochs, batch_size, compile=False, bf16=False):
    """A fit that does an epoch whenever it is called."""
    program, guide = pair(model, bf16)

    def run(pause):
        fit(
            program, guide, data, objective=model.objective, epochs=epochs, lr=1e-4,
            batch_size=batch_size, callbacks=[pause], progress=False, compile=compile,
        )  # fmt: skip

    return Turns(run)


def fits(model, data, options, rounds, batch_size, bf16=False):
    found = {"fit": ours(model, data, rounds + 2, batch_size)}
    if options.compile:
        found["fit, compiled"] = ours(model, data, rounds + 2, batch_size, compile=True)
        if bf16:
            low = ours(model, data, rounds + 2, batch_size, compile=True, bf16=True)
            found["fit, compiled" + BF16] = low
    return found


# ---- rivals --------------------------------------------------------------------------------------


def clustpy_vade(x, batch_size, hidden=DEEP):
    """ClustPy's training of VaDE after the start, with its loss as it ships."""
    from clustpy.deep._data_utils import get_dataloader
    from clustpy.deep.vade import _VaDE_Module, _VaDE_VAE

    module, network = _VaDE_Module(10, 10), clustpy_network(_VaDE_VAE, x.shape[1], hidden)
    network.fitted = True
    loader = get_dataloader(x, batch_size, shuffle=True)
    parameters = [*network.parameters(), *module.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=1e-4)
    loss = torch.nn.BCELoss(reduction="sum")
    return lambda: module.fit(
        network, loader, loader, 1, torch.device("cpu"), optimizer, loss, 1.0, 1.0
    )


def clustpy_network(make, x_dim, hidden=DEEP, latent_dim=10):
    return make([x_dim, *hidden, latent_dim], activation_fn=torch.nn.ReLU)


def coders(encoder, decoder):
    """Our networks in pythae's classes; what a pythae or MultiVae model wants."""
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder

    class Encoder(BaseEncoder):
        def __init__(self):
            super().__init__()
            self.network, self.latent_dim = encoder, encoder.loc.out_features

        def forward(self, x):
            normal = self.network(x).base_dist
            return ModelOutput(embedding=normal.loc, log_covariance=2 * normal.scale.log())

    class Decoder(BaseDecoder):
        def __init__(self, squash):
            super().__init__()
            self.network, self.squash = decoder.mlp, squash

        def forward(self, z):
            logits = self.network(z)
            return ModelOutput(reconstruction=logits.sigmoid() if self.squash else logits)

    return Encoder(), Decoder


def quiet(trainer):
    """A trainer without progress bars and reports, ready for ``train_step``."""
    handler = type(trainer.callback_handler)
    trainer.callback_handler = handler([], model=trainer.model)
    return trainer


def pythae_vae(x, batch_size, folder, hidden=DEEP, latent_dim=10):
    """pythae's VAE, the same networks without the mixture."""
    from pythae.data.datasets import BaseDataset
    from pythae.models import VAE as Rival
    from pythae.models import VAEConfig
    from pythae.trainers import BaseTrainer, BaseTrainerConfig

    program = VAE(x.shape[1], latent_dim, hidden)
    guide = Amortized(program, ["x"], hidden)
    encoder, decoder = coders(guide.networks["z"], program.decoder)
    settings = VAEConfig(input_dim=(x.shape[1],), latent_dim=latent_dim, reconstruction_loss="bce")
    rival = Rival(settings, encoder, decoder(squash=True))
    config = BaseTrainerConfig(
        output_dir=folder, per_device_train_batch_size=batch_size, no_cuda=True,
        learning_rate=1e-4,
    )  # fmt: skip
    trainer = BaseTrainer(rival, BaseDataset(x, torch.zeros(len(x))), training_config=config)
    trainer.prepare_training()
    quiet(trainer)
    return lambda: trainer.train_step(1)


def multivae_mvae(model, data, batch_size, folder):
    """MultiVae's MVAE on our networks: the joint bound and that of each modality."""
    from multivae.data.datasets.base import MultimodalBaseDataset
    from multivae.models import MVAE, MVAEConfig
    from multivae.trainers import BaseTrainer, BaseTrainerConfig

    program, guide = pair(model)
    pairs = {m: coders(guide.experts[m], program.decoders[m]) for m in data}
    config = MVAEConfig(
        n_modalities=len(data), latent_dim=program.zeros.numel(), warmup=0,
        input_dims={m: (x.shape[1],) for m, x in data.items()},
        decoders_dist=dict.fromkeys(data, "bernoulli"),
    )  # fmt: skip
    rival = MVAE(
        config,
        encoders={m: encoder for m, (encoder, _) in pairs.items()},
        decoders={m: decoder(squash=False) for m, (_, decoder) in pairs.items()},
    )
    trainer = BaseTrainer(
        rival, MultimodalBaseDataset(data),
        training_config=BaseTrainerConfig(
            output_dir=folder, per_device_train_batch_size=batch_size, no_cuda=True,
            learning_rate=1e-4,
        ),
    )  # fmt: skip
    return quiet(trainer)


# ---- works ---------------------------------------------------------------------------------------


def run(title, loops, rounds, rows, ratios, notes, folders=None):
    times = measure(loops, rounds, warm_up=1, scale=1.0)
    for loop in reversed(loops.values()):
        if isinstance(loop, Turns):
            loop.close()
    if folders is not None:
        folders.cleanup()
    return Case(title, "s an epoch", times, ratios, rows, notes)


def mnist_epochs(options):
    """VaDE on MNIST end to end, against ClustPy's VaDE and pythae's VAE."""
    x, rounds, batch_size = images(options), options.times(5), 256
    folders = tempfile.TemporaryDirectory()
    torch.manual_seed(0)
    hidden = (8,) if options.tiny else DEEP
    model = vade(1, hidden)
    loops = fits(model, {"x": x}, options, rounds, batch_size, bf16=has_bf16() or options.tiny)
    notes = [f"{len(x):,} images, batch {batch_size}"]
    if missing := absent("clustpy.deep", how=CLUSTPY):
        notes.append(missing)
    else:
        loops["ClustPy VaDE"] = clustpy_vade(x, batch_size, hidden)
    if missing := absent("pythae.models", how=PYTHAE):
        notes.append(missing)
    else:
        loops["pythae VAE"] = pythae_vae(x, batch_size, folders.name, hidden)
    ratios = [
        (name, rival, most)
        for rival in ("ClustPy VaDE", "pythae VAE")
        for name, most in (("fit", None), ("fit, compiled", 1 / 1.5), ("fit, compiled" + BF16, 0.5))
    ]
    yield run("VaDE on MNIST, an epoch", loops, rounds, len(x), ratios, notes, folders)


def mvae_epochs(options):
    """MVAE on the halves of MNIST, against MultiVae's MVAE."""
    x, rounds, batch_size = images(options), options.times(5), 256
    folders = tempfile.TemporaryDirectory()
    torch.manual_seed(0)
    data = {"x_0": x[:, :392].contiguous(), "x_1": x[:, 392:].contiguous()}
    model = mvae(1, hidden=(8,), latent_dim=3) if options.tiny else mvae(1)
    loops = fits(model, data, options, rounds, batch_size)
    notes = [f"{len(x):,} images, batch {batch_size}"]
    if missing := absent("multivae.models", how=MULTIVAE):
        notes.append(missing)
    else:
        trainer = multivae_mvae(model, data, batch_size, folders.name)
        loops["MultiVae MVAE"] = lambda: trainer.train_step(1)
    ratios = [("fit, compiled", "MultiVae MVAE", 1 / 1.5), ("fit", "MultiVae MVAE", None)]
    yield run("MVAE on halves of MNIST, an epoch", loops, rounds, len(x), ratios, notes, folders)
