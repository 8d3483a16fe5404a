"""bfloat16 inside the networks: float32 outside, close to float32, and staged as well."""

import warnings

import pytest
import torch
from torch import nn

from pyrozoo import zoo
from pyrozoo.inference import EnumELBO, stage
from pyrozoo.zoo.networks import (
    MLP,
    ConvDecoder,
    ConvEncoder,
    Decoder,
    Encoder,
    batched,
    set_precision,
)

NETS = {
    "encoder": lambda: (Encoder([6, 2], (8,), 3), [torch.rand(5, 6), torch.rand(4, 1, 2)]),
    "decoder": lambda: (Decoder(3, (8,), 6), [torch.rand(4, 5, 3)]),
    "images": lambda: (ConvEncoder((1, 8, 8), 3, (4,), 8), [torch.rand(2, 5, 1, 8, 8)]),
    "to images": lambda: (ConvDecoder(3, (1, 8, 8), channels=(4,), hidden=8), [torch.rand(5, 3)]),
}


def low(net):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "this processor has no bfloat16")
        set_precision(net, "bf16")


def parameters_of(distribution):
    base = distribution.base_dist
    return [getattr(base, name) for name in base.arg_constraints if name in base.__dict__]


@pytest.mark.parametrize("name", NETS)
def test_outputs_are_float32_and_near(name):
    torch.manual_seed(0)
    net, inputs = NETS[name]()
    before = parameters_of(net(*inputs))
    low(net)
    after = parameters_of(net(*inputs))
    assert after
    for a, b in zip(before, after, strict=True):
        assert b.dtype == torch.float32
        assert not torch.equal(a, b)
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.02)
    sum(x.sum() for x in after).backward()
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in net.parameters())
    set_precision(net, "float32")
    for a, b in zip(before, parameters_of(net(*inputs)), strict=True):
        assert torch.equal(a, b)


def test_layers_alone_compute_in_bf16():
    seen = []

    class Look(nn.Module):
        def forward(self, x):
            seen.append((x.dtype, torch.is_autocast_enabled("cpu")))
            return x

    net = batched(nn.Sequential(nn.Linear(3, 3), Look()))
    mlp = MLP(3, (4,), 2, activation=Look())
    for layers in (net, mlp):
        low(layers)
        assert layers(torch.rand(2, 4, 3)).dtype == torch.float32
        assert not torch.is_autocast_enabled("cpu")
    assert seen == [(torch.bfloat16, True)] * 2


@pytest.mark.parametrize("name", ["vade", "m2", "mvae", "hivae"])
def test_the_catalogue_takes_it_and_its_loss_is_near(name):
    data = {"x": torch.rand(8, 6)}
    if name == "mvae":
        data = {"x_a": torch.rand(8, 6), "x_b": torch.rand(8, 4)}
    losses = []
    for precision in ("float32", "bf16"):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "this processor has no bfloat16")
            model = zoo.create(name, data, precision=precision)
        assert model.options["precision"] == precision
        torch.manual_seed(0)
        losses.append(model.objective.differentiable_loss(model.program, model.guide, data))
    assert losses[1].dtype == torch.float32
    assert losses[0] != losses[1]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=0.02)


def test_it_is_staged():
    data = {"x": torch.rand(8, 6)}
    model = zoo.create("vade", data, hidden=(8,))
    low(model.program)
    low(model.guide)
    staged = stage(EnumELBO(), model.program, model.guide, data, compile=False)
    assert (staged.how, staged.reason) == ("graph", "")
    torch.manual_seed(0)
    loss = staged(data)
    grads = [x.grad for x in staged.module.parameters()]
    torch.manual_seed(0)
    staged.module.zero_grad()
    eager = staged.objective.differentiable_loss(staged.p, staged.q, data)
    eager.backward()
    torch.testing.assert_close(loss, eager.detach())
    for a, x in zip(grads, staged.module.parameters(), strict=True):
        torch.testing.assert_close(a, x.grad, rtol=1e-2, atol=1e-3)
    set_precision(staged.module, "float32")  # another graph
    staged(data)
    assert staged.graphs == 2


def test_other_precisions_are_refused():
    with pytest.raises(ValueError, match="precision is one of float32, bf16, got 'fp8'"):
        set_precision(MLP(2, (), 2), "fp8")
    with pytest.raises(ValueError, match="precision is one of"):
        zoo.create("vade", {"x": torch.rand(8, 6)}, precision="half")
