"""The networks: leading dimensions, the split first layer, likelihoods, tracing and errors."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from pyrozoo.zoo import networks

LEADS = [(), (5,), (3, 5), (2, 1, 5), (0,)]
IMAGE = (2, 7, 4)
F64 = torch.float64


class MatmulRows(TorchDispatchMode):
    """Record (rows, inner) of every matrix product that is computed."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("mm", "bmm", "addmm", "baddbmm"):
            left = args[1] if name in ("addmm", "baddbmm") else args[0]
            self.shapes.append((math.prod(left.shape[:-1]), left.shape[-1]))
        return func(*args, **(kwargs or {}))


class Pair(nn.Module):
    """Two inputs with one batch dimension; refuses anything else."""

    def forward(self, x, y):
        assert x.dim() == y.dim() == 2
        assert len(x) == len(y)
        return torch.stack([x.sum(-1), y.prod(-1)], -1)


def make_networks():
    """Name -> (network, input event shapes, batch-less event shape of the distribution)."""
    return {
        "encoder": (networks.Encoder(6, (8, 7), 3), [(6,)], (3,)),
        "encoder2": (networks.Encoder([6, 2], (8,), 3, "softplus"), [(6,), (2,)], (3,)),
        "linear_encoder": (networks.Encoder([6, 2], (), 3), [(6,), (2,)], (3,)),
        "classifier": (networks.Classifier(6, (8,), 4, nn.PReLU()), [(6,)], ()),
        "decoder": (networks.Decoder([3, 4], (8,), (2, 3)), [(3,), (4,)], (2, 3)),
        "normal": (networks.Decoder(3, (), 5, "normal", "tanh"), [(3,)], (5,)),
        "categorical": (networks.Decoder(3, (8,), 4, "categorical", "silu"), [(3,)], ()),
        "conv_encoder": (networks.ConvEncoder(IMAGE, 3, (4, 5), 8), [IMAGE], (3,)),
        "conv_encoder2": (
            networks.ConvEncoder(IMAGE, 3, (4, 5), 8, "elu", extra_dims=(2,)),
            [IMAGE, (2,)],
            (3,),
        ),
        "conv_decoder": (networks.ConvDecoder(3, IMAGE, channels=(5, 4), hidden=8), [(3,)], IMAGE),
        "conv_decoder2": (
            networks.ConvDecoder(
                [3, 2], IMAGE, networks.Normal(IMAGE, "predicted"), (5, 4), 8, "gelu"
            ),
            [(3,), (2,)],
            IMAGE,
        ),
    }


NAMES = sorted(make_networks())


def summary(d):
    """One tensor with all parameters of a distribution."""
    base = d.base_dist if isinstance(d, dist.Independent) else d
    if hasattr(base, "loc"):
        return torch.stack([base.loc, base.scale], -1)
    return base.logits


@pytest.mark.parametrize("lead", LEADS)
@pytest.mark.parametrize("name", NAMES)
def test_leading_dimensions(name, lead):
    net, events, event_shape = make_networks()[name]
    net = net.double()
    inputs = [torch.rand(*lead, *event, dtype=F64) for event in events]
    with pyro.validation_enabled(0 not in lead):  # torch cannot validate an empty batch
        d = net(*inputs)
    assert d.batch_shape == lead
    assert d.event_shape == event_shape
    value = d.sample()
    assert value.shape == lead + event_shape
    if 0 not in lead:  # torch cannot sum an empty batch over its event either
        log_prob = d.log_prob(value)
        assert log_prob.shape == lead
        assert log_prob.dtype == F64
        # Row by row, the same numbers.
        flat = [x.reshape(-1, *event) for x, event in zip(inputs, events, strict=True)]
        rows = torch.stack([summary(net(*row)) for row in zip(*flat, strict=True)])
        torch.testing.assert_close(summary(d).reshape(rows.shape), rows, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "name", ["encoder2", "linear_encoder", "decoder", "conv_encoder2", "conv_decoder2"]
)
def test_several_inputs_broadcast(name):
    net, (left, right), event_shape = make_networks()[name]
    x, y = torch.rand(5, *left), torch.rand(4, 1, *right)
    d = net(x, y)
    assert d.batch_shape == (4, 5)
    assert d.event_shape == event_shape
    full = net(x.expand(4, 5, *left), y.expand(4, 5, *right))
    torch.testing.assert_close(summary(d), summary(full))


@pytest.mark.parametrize("name", NAMES)
def test_gradient_reaches_every_parameter(name):
    net, events, _ = make_networks()[name]
    d = net(*(torch.randn(16, *event) for event in events))
    value = d.sample()
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        value = value + 0.5  # off the mean, so that scales get a gradient too
    d.log_prob(value).sum().backward()
    for parameter_name, parameter in net.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.abs().sum() > 0, parameter_name


@pytest.mark.parametrize("name", NAMES)
def test_make_fx_trace_equals_eager(name):
    net, events, _ = make_networks()[name]

    def call(*inputs):
        d = net(*inputs)
        value = torch.zeros(d.batch_shape + d.event_shape)
        return summary(d), d.log_prob(value)

    first = [torch.rand(3, 5, *event) for event in events]
    second = [torch.rand(3, 5, *event) for event in events]
    with pyro.validation_enabled(False):  # validation looks at values
        traced = make_fx(call)(*first)
        for got, expected in zip(traced(*second), call(*second), strict=True):
            torch.testing.assert_close(got, expected)
        assert not torch.allclose(traced(*first)[0], traced(*second)[0])


def test_split_layer_equals_concatenation():
    torch.manual_seed(1)
    split = networks.MLP([6, 2, 3], (8, 7), 4, "tanh").double()
    torch.manual_seed(1)
    whole = nn.Sequential(
        nn.Linear(11, 8), nn.Tanh(), nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 4)
    ).double()
    # The same random numbers in the same order: the initialisation is that of one nn.Linear.
    for got, expected in zip(split.parameters(), whole.parameters(), strict=True):
        assert torch.equal(got, expected)
    x, y, z = (
        torch.randn(5, 6, dtype=F64),
        torch.randn(4, 1, 2, dtype=F64),
        torch.randn(3, dtype=F64),
    )
    joint = torch.cat([x.expand(4, 5, 6), y.expand(4, 5, 2), z.expand(4, 5, 3)], -1)
    torch.testing.assert_close(split(x, y, z), whole(joint), rtol=0, atol=1e-12)
    split(x, y, z).square().sum().backward()
    whole(joint).square().sum().backward()
    for got, expected in zip(split.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(got.grad, expected.grad, rtol=0, atol=1e-11)


def test_split_layer_computes_the_big_half_once():
    mlp = networks.MLP([50, 10], (8,), 4)
    x, y = torch.randn(32, 50), torch.eye(10).unsqueeze(1)
    with MatmulRows() as record:
        out = mlp(x, y)
    assert out.shape == (10, 32, 4)
    # x on 32 rows, the classes on 10, and only the small last layer on all 320.
    assert sorted(record.shapes) == [(10, 10), (32, 50), (320, 8)]
    with MatmulRows() as record:
        out.sum().backward()
    # Backward, the gradient of the columns of x is (8, 32) @ (32, 50), or its transpose.
    assert (320, 50) not in record.shapes
    assert all(320 not in shape or 8 in shape or 4 in shape for shape in record.shapes)


def test_conv_encoder_convolves_once_for_all_classes():
    net = networks.ConvEncoder(IMAGE, 3, (4, 5), 8, extra_dims=(2,))
    rows = []
    net.trunk.conv.net.register_forward_hook(lambda module, args, out: rows.append(len(out)))
    assert net(torch.rand(6, *IMAGE), torch.eye(2).unsqueeze(1)).batch_shape == (2, 6)
    assert rows == [6]


@pytest.mark.parametrize("activation", ["relu", "softplus", "tanh", "silu", "gelu", "elu"])
def test_activations_by_name(activation):
    mlp = networks.MLP(3, (4,), 2, activation)
    x = torch.randn(5, 3)
    middle = getattr(torch.nn.functional, activation)(mlp.first(x))
    torch.testing.assert_close(mlp(x), mlp.rest[-1](middle))


def test_mlp_trunk_and_copied_activation():
    mlp = networks.MLP(3, (4, 5), activation=nn.PReLU())
    assert mlp.out_dim == 5
    assert isinstance(mlp.rest[-1], nn.PReLU)
    assert mlp.rest[0] is not mlp.rest[-1]
    x, y = torch.randn(4, 3), torch.randn(2, 1, 2)
    joined = networks.MLP([3, 2], ())
    assert joined.out_dim == 5
    assert torch.equal(joined(x, y), torch.cat([x.expand(2, 4, 3), y.expand(2, 4, 2)], -1))


@pytest.mark.parametrize(
    ("shapes", "got"),
    [
        ([(5, 6)], r"\(5, 6\)"),
        ([(5, 6), (5, 3)], r"\(5, 6\), \(5, 3\)"),
        ([(5, 6), (5, 2), (5, 2)], r"\(5, 2\), \(5, 2\)"),
        ([(5, 6), ()], r"\(5, 6\), \(\)"),
        ([], "nothing"),
    ],
)
@pytest.mark.parametrize("hidden", [(8,), ()])
def test_wrong_inputs_are_named(shapes, got, hidden):
    inputs = [torch.zeros(shape) for shape in shapes]
    for net in (networks.Encoder([6, 2], hidden, 3), networks.Classifier([6, 2], hidden, 3)):
        with pytest.raises(ValueError, match=r"shapes \(\*, 6\), \(\*, 2\); got .*" + got):
            net(*inputs)


@pytest.mark.parametrize("hidden", [(8,), ()])
def test_leading_dimensions_that_do_not_broadcast(hidden):
    with pytest.raises(ValueError, match=r"do not broadcast: \(5,\), \(4,\)"):
        networks.Encoder([6, 2], hidden, 3)(torch.zeros(5, 6), torch.zeros(4, 2))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: networks.MLP([], (8,), 3), "in_dims"),
        (lambda: networks.MLP([6, 0], (8,), 3), "in_dims"),
        (lambda: networks.MLP(6, (0,), 3), "widths"),
        (lambda: networks.MLP(6, (8,), 3, "swish"), "swish"),
        (lambda: networks.Encoder(6, (8,), 3, init_scale=0.0), "scale"),
        (lambda: networks.Normal(3, "fixed"), "fixed"),
        (lambda: networks.Normal(3, -1.0), "positive"),
        (lambda: networks.likelihood("gamma", 3), "gamma"),
        (lambda: networks.likelihood("categorical", (3, 3)), "num_classes"),
        (lambda: networks.Decoder(3, (8,), 5, networks.Bernoulli(4)), r"\(4,\), expected \(5,\)"),
        (lambda: networks.ConvEncoder((1, 3, 8), 3), "image shape"),
        (lambda: networks.ConvEncoder((8, 8), 3), "image shape"),
        (lambda: networks.ConvDecoder(3, (1, 8, 8), channels=()), "at least one"),
        (lambda: networks.batched(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))), "'1'"),
    ],
)
def test_bad_construction(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_likelihood_spec_of_another_type():
    with pytest.raises(TypeError, match="Linear"):
        networks.likelihood(nn.Linear(2, 2), 2)


@pytest.mark.parametrize("shape", [(4, 5, 6), (5, 6), (2, 6, 5)])
def test_conv_encoder_wrong_image(shape):
    with pytest.raises(ValueError, match=r"shape \(\*, 2, 5, 6\), got"):
        networks.ConvEncoder((2, 5, 6), 3)(torch.zeros(shape))


@pytest.mark.parametrize("size", [(4, 4), (5, 4), (7, 9), (28, 28), (13, 6)])
@pytest.mark.parametrize("levels", [1, 2, 3])
def test_conv_sizes(size, levels):
    shape, channels = (3, *size), (4,) * levels
    z = networks.ConvEncoder(shape, 2, channels, 8)(torch.rand(2, *shape)).sample()
    assert z.shape == (2, 2)
    decoder = networks.ConvDecoder(2, shape, "normal", channels, 8)
    assert decoder(z).sample().shape == (2, *shape)


def test_conv_decoder_refuses_a_partial_channel():
    class Odd(networks.Likelihood):
        def __init__(self):
            super().__init__(IMAGE, num_params=3)

    with pytest.raises(ValueError, match="whole number of channels"):
        networks.ConvDecoder(3, IMAGE, Odd())


@pytest.mark.parametrize("event_shape", [(), (3,), (2, 3)])
def test_bernoulli_likelihood(event_shape):
    net = networks.Bernoulli(event_shape)
    assert net.num_params == math.prod(event_shape)
    params = torch.randn(4, 5, net.num_params)
    grey = torch.rand(4, 5, *event_shape)
    with pyro.validation_enabled(True):
        got = net(params).log_prob(grey)
    p = params.reshape(grey.shape).sigmoid()
    expected = grey * p.log() + (1 - grey) * (1 - p).log()
    torch.testing.assert_close(got, expected.reshape(4, 5, -1).sum(-1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("event_shape", [(), (3,), (2, 3)])
@pytest.mark.parametrize("scale", ["shared", "learned", "predicted", 0.3, 2])
def test_normal_likelihood(event_shape, scale):
    net = networks.Normal(event_shape, scale)
    size = math.prod(event_shape)
    assert net.num_params == (2 * size if scale == "predicted" else size)
    params = torch.randn(4, 5, net.num_params)
    d = net(params)
    assert d.event_shape == event_shape
    base = d.base_dist if event_shape else d
    torch.testing.assert_close(base.loc, params[..., :size].reshape(base.loc.shape))
    if scale == "predicted":
        raw = params[..., size:].reshape(base.scale.shape)
        torch.testing.assert_close(base.scale, networks.positive_scale(raw))
    else:
        expected = torch.full_like(base.scale, 1.0 if scale in ("shared", "learned") else scale)
        torch.testing.assert_close(base.scale, expected)
    shapes = [tuple(p.shape) for p in net.parameters()]
    assert shapes == {"shared": [()], "learned": [event_shape]}.get(scale, [])


def test_likelihood_specs():
    assert isinstance(networks.likelihood("bernoulli", 3), networks.Bernoulli)
    assert networks.likelihood("normal", [2, 3]).event_shape == (2, 3)
    categorical = networks.likelihood("categorical", 4)
    assert categorical.event_shape == ()
    assert categorical.num_params == 4
    module = networks.Normal((2, 3), 0.5)
    assert networks.likelihood(module, (2, 3)) is module
    decoder = networks.Decoder(3, (8,), (), networks.Categorical(4))
    assert decoder(torch.randn(5, 3)).log_prob(torch.arange(5) % 4).shape == (5,)
    with pytest.raises(ValueError, match=r"\(\*, 6\), got \(7, 5\)"):
        module(torch.zeros(7, 5))


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_scales_neither_overflow_nor_vanish(dtype):
    raw = torch.tensor([-1e6, -100.0, 0.0, 100.0, 1e6], dtype=dtype, requires_grad=True)
    scale = networks.positive_scale(raw)
    assert torch.isfinite(scale).all()
    assert (scale >= networks.MIN_SCALE * (1 - 1e-6)).all()
    scale.sum().backward()
    assert torch.isfinite(raw.grad).all()


@pytest.mark.parametrize("scale", [2e-4, 0.01, 1.0, 50.0])
def test_init_scale(scale):
    encoder = networks.Encoder(6, (8,), 3, init_scale=scale).double()
    d = encoder(torch.randn(5, 6, dtype=F64))
    torch.testing.assert_close(
        d.base_dist.scale, torch.full((5, 3), scale, dtype=F64), rtol=1e-4, atol=0
    )
    d.log_prob(torch.randn(5, 3, dtype=F64)).sum().backward()
    assert encoder.raw_scale.weight.grad.abs().sum() > 0


def test_encoder_submodules_are_the_encoder():
    encoder = networks.Encoder(6, (8, 7), 3)
    x = torch.randn(5, 6)
    features = encoder.trunk(x)
    assert features.shape == (5, 7)
    torch.testing.assert_close(encoder.loc(features), encoder(x).base_dist.loc)
    scale = networks.positive_scale(encoder.raw_scale(features))
    torch.testing.assert_close(scale, encoder(x).base_dist.scale)


def test_batched_flattens_once():
    conv = networks.batched(nn.Conv2d(2, 3, 3, padding=1), event_dims=3)
    x = torch.randn(4, 1, 5, 2, 6, 7)
    out = conv(x)
    assert out.shape == (4, 1, 5, 3, 6, 7)
    torch.testing.assert_close(out[2, 0], conv.net(x[2, 0]))
    assert conv(x[0, 0, 0]).shape == (3, 6, 7)
    pair = networks.batched(Pair())
    x, y = torch.randn(5, 3), torch.randn(4, 1, 2)
    expected = torch.stack([x.sum(-1).expand(4, 5), y.prod(-1).expand(4, 5)], -1)
    torch.testing.assert_close(pair(x, y), expected)
    torch.testing.assert_close(
        pair(y, x), torch.stack([y.sum(-1) + 0 * x[:, 0], x.prod(-1) + 0 * y[..., 0]], -1)
    )


def test_batched_mixed_event_dims():
    class Scaled(nn.Module):
        def forward(self, image, scale):
            assert image.shape[:-3] == scale.shape == (image.shape[0],)
            return image * scale[:, None, None, None]

    net = networks.batched(Scaled(), event_dims=(3, 0))
    image, scale = torch.randn(5, 1, 2, 2), torch.randn(4, 1)
    torch.testing.assert_close(net(image, scale), image * scale[..., None, None, None])
    with pytest.raises(ValueError, match="expected 2 inputs, got 1"):
        net(image)
    with pytest.raises(ValueError, match="at least"):
        net(image[0, 0], scale)
    with pytest.raises(ValueError, match="do not broadcast"):
        net(image, torch.randn(3))


def test_batched_errors():
    with pytest.raises(TypeError, match="tuple"):
        networks.batched(nn.LSTM(3, 2), event_dims=2)(torch.randn(2, 5, 3))
    net = networks.batched(nn.BatchNorm1d(3).eval())
    assert net(torch.randn(4, 5, 3)).shape == (4, 5, 3)
    net.train()
    with pytest.raises(ValueError, match="BatchNorm1d"):
        net(torch.randn(4, 5, 3))
    with pytest.raises(ValueError, match="BatchNorm2d"):
        networks.batched(nn.BatchNorm2d(3, track_running_stats=False).eval())


@pytest.mark.parametrize("shape", [(), (4,), (2, 1, 3)])
def test_one_hot(shape):
    index = torch.randint(0, 5, shape)
    got = networks.one_hot(index, 5)
    assert got.dtype == torch.get_default_dtype()
    assert torch.equal(got, nn.functional.one_hot(index, 5).to(got.dtype))
    assert networks.one_hot(index, 5, dtype=F64).dtype == F64
    traced = make_fx(lambda i: networks.one_hot(i, 5))(index)
    other = (index + 2) % 5
    assert torch.equal(traced(other), networks.one_hot(other, 5))


@pytest.mark.parametrize("index", [-1, 5])
def test_one_hot_out_of_range(index):
    with pytest.raises(IndexError):
        networks.one_hot(torch.tensor([0, index]), 5)


def test_enumeration_in_a_model():
    """A parallel enumeration equals the sum over classes by hand."""
    torch.manual_seed(2)
    decoder = networks.Decoder([2, 3], (8,), 4).double()
    x, z = torch.rand(5, 4, dtype=F64), torch.randn(5, 2, dtype=F64)

    def model():
        with pyro.plate("data", 5):
            y = pyro.sample(
                "y", dist.Categorical(torch.ones(3, dtype=F64)), infer={"enumerate": "parallel"}
            )
            pyro.sample("x", decoder(z, networks.one_hot(y, 3, F64)), obs=x)

    loss = pyro.infer.TraceEnum_ELBO(max_plate_nesting=1).loss(model, lambda: None)
    by_hand = torch.stack(
        [decoder(z, networks.one_hot(torch.full((5,), k), 3, F64)).log_prob(x) for k in range(3)]
    )
    assert loss == pytest.approx(-(by_hand.logsumexp(0) - math.log(3)).sum().item(), rel=1e-10)


def test_conv_classifier_reads_pictures_and_flat_rows():
    net = networks.ConvClassifier((1, 7, 5), 3, (4, 8), 16, flat=True)
    pictures = torch.rand(2, 6, 1, 7, 5)
    found = net(pictures)
    assert found.batch_shape == (2, 6)
    assert found.logits.shape == (2, 6, 3)
    torch.testing.assert_close(net(pictures.flatten(-3)).logits, found.logits)
    with pytest.raises(ValueError, match=r"expected images of shape \(\*, 1, 7, 5\)"):
        net(torch.rand(2, 1, 5, 7))
