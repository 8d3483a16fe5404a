"""What an autoencoder's encoder reads instead of its input."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyrozoo import zoo
from pyrozoo.guides import Amortized, Corrupted, Mean
from pyrozoo.inference import Batch, EnumELBO, responsibilities
from pyrozoo.zoo.clustering.pretraining import pretrain_autoencoder
from pyrozoo.zoo.clustering.vade import VaDE
from pyrozoo.zoo.networks.corruption import RandomAffine, corruption, move


def one(value):
    return torch.tensor([value], dtype=torch.float64)


def images(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("turns", [0, 1, 2, 3])
def test_quarter_turns_are_exact(turns):
    x = images(1, 2, 5, 5)
    moved = move(x, one(turns * math.pi / 2), one(0.0), one(0.0))
    torch.testing.assert_close(moved, torch.rot90(x, turns, (-2, -1)))


def test_a_half_turn_of_an_oblong():
    x = images(1, 1, 4, 7)
    moved = move(x, one(math.pi), one(0.0), one(0.0))
    torch.testing.assert_close(moved, x.flip(-2, -1))


def test_a_turn_of_an_oblong_keeps_lengths():
    x = torch.zeros(1, 1, 5, 9, dtype=torch.float64)
    x[..., 2, 6] = 1  # two to the right of the middle
    moved = move(x, one(math.pi / 2), one(0.0), one(0.0))
    expected = torch.zeros_like(x)
    expected[..., 0, 4] = 1  # two above it
    torch.testing.assert_close(moved, expected)


def test_whole_shifts_are_exact_and_follow_the_turn():
    x = images(1, 3, 4, 6)
    moved = move(x, one(0.0), one(1.0), one(-2.0))
    expected = torch.zeros_like(x)
    expected[..., 1:, :-2] = x[..., :-1, 2:]
    torch.testing.assert_close(moved, expected)
    x = images(1, 1, 5, 5)
    first = move(x, one(math.pi / 2), one(0.0), one(0.0))
    both = move(x, one(math.pi / 2), one(1.0), one(-1.0))
    torch.testing.assert_close(both, move(first, one(0.0), one(1.0), one(-1.0)))


def test_images_move_on_their_own_within_the_range():
    shift = RandomAffine((1, 9, 9), 0.0, 2.0)
    x = torch.zeros(500, 81)
    x[:, 40] = 1.0
    torch.manual_seed(0)
    moved = shift(x)
    assert moved.shape == x.shape
    middle = moved.reshape(-1, 9, 9)
    torch.testing.assert_close(middle.sum((1, 2)), torch.ones(500))
    place = torch.arange(9.0) - 4
    for dim in (1, 2):
        mean = (middle.sum(3 - dim) * place).sum(1)  # linear interpolation keeps the centre of mass
        assert mean.abs().max() <= 2 + 1e-5
        assert mean.std() == pytest.approx(2 / math.sqrt(3), rel=0.1)


def test_the_guide_alone_reads_moved_images_and_in_training_alone():
    seen = {}

    class Guide(torch.nn.Module):
        def forward(self, batch):
            seen.update(x=batch["x"], y=batch["y"])

    data = Batch.of({"x": images(6, 16).float(), "y": torch.arange(6)})
    guide = Corrupted(Guide(), corruption(0.0, 20.0, 1.0, (1, 4, 4)))
    guide.train()(data)
    assert not torch.allclose(seen["x"], data["x"])
    assert seen["y"].equal(data["y"])
    guide.eval()(data)
    assert seen["x"].equal(data["x"])


class Line(torch.nn.Module):
    def forward(self, batch):
        with pyro.plate("data", len(batch)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5))


class Exact(torch.nn.Module):
    def forward(self, batch):
        with pyro.plate("data", len(batch)):
            pyro.sample("z", dist.Normal(batch["x"] / 1.25, math.sqrt(0.2)))


def test_the_gap_of_a_corrupted_exact_posterior_has_a_closed_form():
    x = torch.randn(4000)
    evidence = dist.Normal(0.0, math.sqrt(1.25)).log_prob(x).mean()
    guide = Corrupted(Exact(), corruption(0.3))
    loss = EnumELBO(num_particles=20).loss(Line(), guide, {"x": x})
    # KL(q(z | x + 0.3 e) || p(z | x)) = (0.3 e / 1.25)^2 / (2 * 0.2)
    assert loss + evidence == pytest.approx((0.3 / 1.25) ** 2 / 0.4, rel=0.1)
    exact = EnumELBO(kl="sampled").loss(Line(), guide.eval(), {"x": x})
    assert exact == pytest.approx(-float(evidence), rel=1e-5)


def test_vade_with_noise_answers_without():
    x = torch.rand(60, 6, generator=torch.Generator().manual_seed(0))
    model = zoo.create("vade", {"x": x}, hidden=(8,), latent_dim=2, num_clusters=3, noise=0.2)
    model.fit({"x": x}, epochs=2, start={"epochs": 2}, progress=False)
    first, again = (
        responsibilities(model.program, Mean(model.guide), {"x": x}, seed=seed) for seed in (0, 1)
    )
    assert torch.equal(first, again)
    assert any(isinstance(m, Corrupted) for m in model.guide.modules())
    plain = zoo.create("vade", {"x": x}, hidden=(8,), latent_dim=2, num_clusters=3)
    assert not any(isinstance(m, Corrupted) for m in plain.guide.modules())


def test_codes_depend_less_on_moves_that_were_undone():
    middle = torch.randint(0, 5, (600, 2), generator=torch.Generator().manual_seed(0)) + 2.0
    rows, cols = torch.meshgrid(torch.arange(9.0), torch.arange(9.0), indexing="ij")
    # One image of a bar or a dot; where it lies is what moves undo.
    kind = torch.arange(600) % 2
    width = torch.where(kind == 0, 0.6, 2.0)[:, None, None]
    x = torch.exp(-((rows - 4) ** 2) / 2 - ((cols - 4) ** 2) / 2 / width**2)
    far = move(x[:, None], torch.zeros(600), middle[:, 0] - 4, middle[:, 1] - 4).flatten(1)
    data = Batch.of({"x": x.flatten(1)})
    spread = []
    for shift in (0.0, 2.0):
        torch.manual_seed(0)
        program = VaDE(81, 2, 2, (32,), "normal(0.3)")
        guide = Amortized(program, ["x"], (32,))
        pretrain_autoencoder(program, guide, data, epochs=60, batch_size=100, lr=3e-3,
                             shift=shift, image_shape=(1, 9, 9))  # fmt: skip
        with torch.no_grad():
            codes = Mean(guide).eval()(Batch.of({"x": far}))["z"]
        within = torch.stack([codes[kind == k].var(0).sum() for k in (0, 1)]).mean()
        between = (codes[kind == 0].mean(0) - codes[kind == 1].mean(0)).square().sum()
        spread.append(float(within / between))
    assert spread[1] < spread[0] / 4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"noise": -1.0}, "noise is not negative, got -1.0"),
        ({"degrees": math.nan}, "degrees is not negative, got nan"),
        ({"shift": 1.0}, "give image_shape"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(ValueError, match=words):
        corruption(**options)


@pytest.mark.parametrize("noise", ["much", None, True])
def test_what_is_no_number(noise):
    with pytest.raises(TypeError, match=f"noise is a number, got {noise!r}"):
        zoo.create("vade", {"x": torch.rand(9, 6)}, noise=noise)


def test_rows_that_are_no_such_images():
    with pytest.raises(ValueError, match=r"shape \(15,\).*image_shape.*\(1, 4, 4\)"):
        RandomAffine((1, 4, 4), 10.0, 0.0)(torch.rand(3, 15))
    assert corruption() is None
