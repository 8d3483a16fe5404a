"""M2 from labels that spread along the graph of neighbours of an autoencoder's codes."""

import pytest
import torch
from sklearn.datasets import make_blobs, make_moons
from sklearn.linear_model import LogisticRegression

from pyrozoo import zoo
from pyrozoo.inference import Batch, metrics, responsibilities
from pyrozoo.zoo.clustering.spreading import start_spread

OPTIONS = {"num_classes": 2, "latent_dim": 2, "hidden": [32], "likelihood": "normal(0.2)"}
START = {"epochs": 20, "known_epochs": 20, "hidden": [32], "code_dim": 2}
START |= {"batch_size": 50, "lr": 1e-2}


@pytest.fixture(scope="module")
def moons():
    x, y = make_moons(600, noise=0.07, random_state=0)
    x, y = torch.tensor(x, dtype=torch.float32), torch.tensor(y)
    known = torch.zeros(600, dtype=torch.bool)
    known[[int(i) for k in (0, 1) for i in (y == k).nonzero()[:3]]] = True
    return Batch.of({"x": x, "y": (torch.where(known, y, 0), known)}), y


def test_six_labels_follow_the_moons(moons):
    data, y = moons
    known = data.present("y")
    linear = LogisticRegression().fit(data["x"][known], data["y"][known])
    model = zoo.create("m2", data, spread=True, style_weight=1.0, **OPTIONS)
    result = model.fit(data, epochs=2, lr=3e-4, progress=False, start=START)
    found = result.responsibilities({"x": data["x"]}, seed=0).argmax(1)
    assert metrics.accuracy(y, found) > max(0.97, linear.score(data["x"], y))


def test_the_given_labels_are_kept_and_a_start_is_resumed(moons, tmp_path):
    data, _ = moons

    def run(folder, resume):
        model = zoo.create("m2", data, spread=True, **OPTIONS)
        options = {**START, "epochs": 2, "known_epochs": 2}
        model.fit(data, epochs=1, progress=False, start=options, folder=folder, resume=resume)
        return [
            p.detach().clone() for p in (*model.program.parameters(), *model.guide.parameters())
        ]

    first = run(tmp_path / "a", False)
    (tmp_path / "a" / "checkpoint.safetensors").unlink()
    again = run(tmp_path / "a", True)  # autoencoder and spread labels come from their checkpoints
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert (tmp_path / "a" / "start" / "known" / "checkpoint.safetensors").exists()


@pytest.mark.parametrize("method", ["m2", "gmvae"])
def test_without_any_label_it_finds_the_parts(method):
    x, y = make_blobs(400, centers=[[-3.0, 0.0], [3.0, 0.0]], random_state=0)
    data, y = Batch.of({"x": torch.tensor(x, dtype=torch.float32)}), torch.tensor(y)
    options = {**OPTIONS, **({"num_clusters": 2} if method == "gmvae" else {})}
    if method == "gmvae":
        options.pop("num_classes", None)
    model = zoo.create(method, data, spread=True, **options)
    start_spread(
        model.program, model.guide, data, num_classes=2, seed=0,
        likelihood=options["likelihood"], alpha=10.0 if method == "m2" else 0.0, **START,
    )  # fmt: skip
    found = responsibilities(model.program, model.guide, data, seed=0).argmax(1)
    assert max(metrics.accuracy(y, found), metrics.accuracy(y, 1 - found)) > 0.9
