"""Time to accuracy: VaDE on MNIST, ours and ClustPy's, to 70 % and to 75 %.

    PYTHONPATH=FOLDER ZOO_DATA=DATA python tests/benchmarks/accuracy.py [--seeds 3] [--only ours]

Both pretrain an autoencoder of the same network for the same number of epochs, put the best of ten
Gaussian mixtures on its codes, and train VaDE, each with its own loss, rates and clipping, batches
of 256.  After the mixture and after every epoch the clusters of all rows, at one draw of z, are
compared with the labels (Hungarian accuracy); both stop as soon as the highest target is reached,
or at the same number of epochs.  The clock counts training, mixtures and compilation, and stands
still during that comparison.

Interrupted, the same command goes on where it was: every epoch leaves a checkpoint in ``--folder``.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from epochs import CLUSTPY, clustpy_network
from measuring import Case, Options, absent
from models import DEEP

from pyrozoo.inference import Batch, fit, metrics, responsibilities
from pyrozoo.zoo import catalogue, datasets
from pyrozoo.zoo.clustering.vade import start_mixture

TARGETS = (0.70, 0.75)


class Clock:
    """Seconds of training and the accuracies reached, kept in a file.

    ``curve`` has [seconds, stage, epoch, accuracy or None], one entry an epoch.
    """

    def __init__(self, path, most_epochs):
        self.path, self.most_epochs = path, most_epochs
        self.curve = json.loads(path.read_text())["curve"] if path.exists() else []
        self.go()

    def go(self):
        self._since = time.perf_counter()

    def note(self, stage, epoch, accuracy=None):
        """Stop the clock, ask for the accuracy, write it down, go on; True if all is done."""
        now = time.perf_counter() - self._since
        order = ("autoencoder", "start", "fit")
        here = (order.index(stage), epoch)
        self.curve = [x for x in self.curve if (order.index(x[1]), x[2]) < here]
        spent = self.curve[-1][0] if self.curve else 0.0
        value = None if accuracy is None else accuracy()
        self.curve.append([spent + now, stage, epoch, value])
        self.path.write_text(json.dumps({"curve": self.curve, "done": self.done}))
        self.go()
        return self.done

    @property
    def done(self):
        if not self.curve:
            return False
        _, stage, epoch, value = self.curve[-1]
        reached = value is not None and value >= TARGETS[-1]
        return reached or (stage == "fit" and epoch >= self.most_epochs)

    def seconds(self, target):
        """When the target was reached; None if never."""
        found = (x[0] for x in self.curve if x[3] is not None and x[3] >= target)
        return next(found, None)


def run_ours(data, seed, folder, clock, pretrain, hidden, compile=True):
    """VaDE as the catalogue has it."""
    x, labels = data
    model = catalogue.create("vade", {"x": x}, seed=seed, hidden=hidden)
    program, guide = model.program, model.guide
    settings = {"compile": compile, "resume": True, "progress": False, "seed": seed}

    def accuracy():
        shares = responsibilities(program, guide, {"x": x}, num_samples=1, seed=0)
        return metrics.hungarian_accuracy(labels, shares.argmax(1))

    if not (folder / "fit").exists():
        start_mixture(
            program, guide, Batch.of({"x": x}), epochs=pretrain, batch_size=256,
            folder=folder / "start",
            callbacks=[lambda result: clock.note("autoencoder", result.epoch) and None], **settings,
        )  # fmt: skip
        if clock.note("start", 0, accuracy):
            return
    fit(
        program, guide, {"x": x}, folder=folder / "fit",
        callbacks=[lambda result: clock.note("fit", result.epoch, accuracy)],
        **{**model.settings, **settings, "epochs": clock.most_epochs, "batch_size": 256},
    )  # fmt: skip


def run_clustpy(data, seed, folder, clock, pretrain, hidden):
    """The steps of ClustPy's ``VaDE.fit``, an epoch at a time."""
    from clustpy.deep._data_utils import get_dataloader
    from clustpy.deep._encoding_utils import encode_batchwise
    from clustpy.deep.vade import _VaDE_Module, _vade_predict_batchwise, _VaDE_VAE
    from sklearn.mixture import GaussianMixture

    x, labels = data
    torch.manual_seed(seed)
    network, cpu = clustpy_network(_VaDE_VAE, x.shape[1], hidden), torch.device("cpu")
    train, test = (get_dataloader(x, 256, shuffle=shuffle) for shuffle in (True, False))
    bce, path = torch.nn.BCELoss(reduction="sum"), folder / "state.pt"
    module = _VaDE_Module(10, 10)
    pretraining = torch.optim.Adam(network.parameters(), lr=1e-3)
    training = torch.optim.Adam([*network.parameters(), *module.parameters()], lr=1e-4)
    parts = {"network": network, "module": module, "one": pretraining, "two": training}
    stage, epoch = "autoencoder", 0
    if path.exists():
        found = torch.load(path, weights_only=True)
        stage, epoch = found.pop("at")
        torch.set_rng_state(found.pop("draws"))
        for name, part in parts.items():
            part.load_state_dict(found[name])

    def save(*at):
        state = {name: part.state_dict() for name, part in parts.items()}
        new = path.with_suffix(".new")
        torch.save({**state, "at": at, "draws": torch.get_rng_state()}, new)
        new.replace(path)

    def accuracy():
        clusters = _vade_predict_batchwise(test, network, module)
        return metrics.hungarian_accuracy(labels, torch.as_tensor(clusters))

    clock.go()
    if stage == "autoencoder":
        for number in range(epoch, pretrain):
            network.train()
            for batch in train:
                loss, _ = network.loss(batch, bce, cpu)
                pretraining.zero_grad()
                loss.backward()
                pretraining.step()
            clock.note("autoencoder", number + 1)
            save("autoencoder", number + 1)
            clock.go()
        network.eval()
        network.fitted = True
        codes = encode_batchwise(test, network)
        mixture = GaussianMixture(10, covariance_type="diag", n_init=10, random_state=seed)
        mixture.fit(codes)
        own = _VaDE_Module(10, 10, mixture.weights_, mixture.means_, mixture.covariances_)
        module.load_state_dict(own.state_dict())
        stage, epoch = "fit", 0
        if clock.note("start", 0, accuracy):
            return
        save("fit", 0)
    network.fitted = True
    for number in range(epoch, clock.most_epochs):
        clock.go()
        module.fit(network, test, train, 1, cpu, training, bce, 1.0, 1.0)
        if clock.note("fit", number + 1, accuracy):
            return
        save("fit", number + 1)


def race(folder, seeds, pretrain=20, most_epochs=60, only="", data=None, hidden=DEEP, compile=True):
    """Run what has not been run; name -> clocks, one a seed."""
    runs = {"ours": run_ours}
    if missing := absent("clustpy.deep", how=CLUSTPY):
        print(missing)
    else:
        runs["ClustPy"] = run_clustpy
    clocks = {}
    for name in [name for name in runs if only in name]:
        for seed in range(seeds):
            place = Path(folder) / f"{name}-seed{seed}"
            place.mkdir(parents=True, exist_ok=True)
            clock = Clock(place / "curve.json", most_epochs)
            if not clock.done:
                more = {"compile": compile} if name == "ours" else {}
                runs[name](data, seed, place, clock, pretrain, hidden, **more)
            clocks.setdefault(name, []).append(clock)
            last = clock.curve[-1]
            print(f"{name}, seed {seed}: {last[3]:.3f} after {last[0]:.0f} s", flush=True)
    return clocks


def draw(clocks, path):
    """Accuracy against seconds of training."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    for colour, (name, found) in zip(("C0", "C1"), clocks.items(), strict=False):
        for i, clock in enumerate(found):
            points = [(x[0] / 60, x[3]) for x in clock.curve if x[3] is not None]
            axes.plot(*zip(*points, strict=True), ".-", color=colour, label="" if i else name)
    for target in TARGETS:
        axes.axhline(target, color="grey", lw=0.5)
    axes.set(xlabel="minutes of training", ylabel="clustering accuracy")
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def cases(clocks):
    """A case for each target: a time for every seed."""
    for target in TARGETS:
        times, notes = {}, []
        for name, found in clocks.items():
            seconds = [clock.seconds(target) for clock in found]
            if None in seconds:
                best = max(x[3] for clock in found for x in clock.curve if x[3] is not None)
                reached = sum(x is not None for x in seconds)
                notes.append(f"{name} got there in {reached} of {len(seconds)}; best {best:.3f}")
            else:
                times[name] = seconds
        title = f"VaDE on MNIST to {target:.0%}"
        yield Case(title, "s of training", times, [("ours", "ClustPy", None)], notes=notes)


def accuracy(options, folder="runs/accuracy", **choices):
    """Time of VaDE on MNIST to 70 % and 75 %, against ClustPy's: hours; goes on where it was."""
    images = datasets.load(
        "digits" if options.tiny else "mnist", options.root, "train" if options.tiny else "all"
    )
    x = images.x if images.x.is_floating_point() else images.x.float() / 255
    if options.tiny:
        choices = {"pretrain": 1, "most_epochs": 2, "hidden": (8,), "compile": False, **choices}
    clocks = race(folder, options.times(3), data=(x, images.y), **choices)
    draw(clocks, Path(folder) / "accuracy.png")
    yield from cases(clocks)


if __name__ == "__main__":
    from showing import show

    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--folder", default="runs/accuracy")
    parser.add_argument("--only", default="", help="ours or ClustPy")
    parser.add_argument("--pretrain", type=int, default=20, help="epochs of the autoencoder")
    parser.add_argument("--most-epochs", type=int, default=60)
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args()
    own = {"only": given.only}
    if not given.tiny:
        own |= {"pretrain": given.pretrain, "most_epochs": given.most_epochs}
    for found in accuracy(Options(given.seeds, tiny=given.tiny), given.folder, **own):
        show(found.record())
