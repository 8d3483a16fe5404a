"""Time of one optimiser step against JAX, jitted: NumPyro, and GenJAX.

    PYTHONPATH=FOLDER python tests/benchmarks numpyro
    PYTHONPATH=OTHER python tests/benchmarks genjax

The programs are written as each library would have it, on the networks and from the parameters of
ours; the states of the optimiser are given back to JAX (``donate_argnums``).  Pixels are binary, as
NumPyro's Bernoulli has no density between zero and one.  GenJAX 0.10 needs JAX 0.5, NumPyro a later
one, so that they want folders of their own.
"""

import math

import torch
from measuring import Case, absent, measure
from models import DEEP, vade, vae
from steps import by_hand, staged_step

from pyrozoo.inference import Batch

NUMPYRO = "jax jaxlib ml_dtypes opt_einsum numpyro multipledispatch"
FUNSOR = "funsor makefun"
GENJAX = (
    "jax==0.5.3 jaxlib==0.5.3 ml_dtypes genjax 'beartype<0.21' deprecated wrapt jaxtyping"
    " wadler-lindig 'penzai<0.3' 'treescope<0.2' ordered-set 'tensorflow-probability<0.26' absl-py"
    " dm-tree decorator gast six toolz"
)
SCAN = 20  # steps in one call


def layers(module):
    """Weights ``(in, out)`` and biases of the linear layers of a network, as JAX arrays."""
    import jax.numpy as jnp

    linear = [layer for layer in module.modules() if isinstance(layer, torch.nn.Linear)]
    return [
        (jnp.array(x.weight.detach().numpy().T), jnp.array(x.bias.detach().numpy())) for x in linear
    ]


def tree(model):
    """The parameters of a VAE or VaDE."""
    import jax.numpy as jnp

    encoder, program = model.guide.networks["z"], model.program
    found = {
        "trunk": layers(encoder.trunk),
        "loc": layers(encoder.loc),
        "raw_scale": layers(encoder.raw_scale),
        "decoder": layers(program.decoder.mlp),
    }
    if hasattr(program, "logits"):
        own = ("logits", "loc", "raw_scale")
        values = {name: jnp.array(getattr(program, name).detach().numpy()) for name in own}
        found |= {f"mixture_{name}": value for name, value in values.items()}
    return found


def perceptron(parameters, x, last=True):
    import jax.numpy as jnp

    for i, (weight, bias) in enumerate(parameters):
        x = x @ weight + bias
        if i + 1 < len(parameters) or not last:
            x = jnp.maximum(x, 0)
    return x


def positive(raw):
    import jax.numpy as jnp

    return softplus(raw) + jnp.float32(1e-4)


def softplus(x):
    """Without custom derivatives, which GenJAX cannot see through."""
    import jax.numpy as jnp

    return jnp.maximum(x, 0) + jnp.log1p(jnp.exp(-jnp.abs(x)))


def encode(parameters, x):
    features = perceptron(parameters["trunk"], x, last=False)
    loc = perceptron(parameters["loc"], features)
    return loc, positive(perceptron(parameters["raw_scale"], features))


# ---- NumPyro -------------------------------------------------------------------------------------


def numpyro_programs(start):
    """Name -> model, guide and objective, in NumPyro."""
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist
    from numpyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO

    def normal(loc, scale):
        return dist.Normal(loc, scale).to_event(1)

    def guide(x):
        names = ("trunk", "loc", "raw_scale")
        own = {name: numpyro.param(name, start[name]) for name in names}
        with numpyro.plate("data", len(x)):
            numpyro.sample("z", normal(*encode(own, x)))

    def decode(z, x):
        logits = perceptron(numpyro.param("decoder", start["decoder"]), z)
        numpyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    def mixture():
        names = ("mixture_logits", "mixture_loc", "mixture_raw_scale")
        logits, loc, raw = (numpyro.param(name, start[name]) for name in names)
        return logits, loc, positive(raw)

    def vae(x):
        zeros = jnp.zeros(start["loc"][0][1].shape)
        with numpyro.plate("data", len(x)):
            decode(numpyro.sample("z", normal(zeros, 1.0)), x)

    def by_hand(x):
        logits, loc, scale = mixture()
        prior = dist.MixtureSameFamily(dist.Categorical(logits=logits), normal(loc, scale))
        with numpyro.plate("data", len(x)):
            decode(numpyro.sample("z", prior), x)

    def enumerated(x):
        logits, loc, scale = mixture()
        with numpyro.plate("data", len(x)):
            y = numpyro.sample(
                "y", dist.Categorical(logits=logits), infer={"enumerate": "parallel"}
            )
            decode(numpyro.sample("z", normal(loc[y], scale[y])), x)

    if "mixture_logits" not in start:
        return {"NumPyro": (vae, guide, TraceMeanField_ELBO())}
    found = {"NumPyro, cluster summed by hand": (by_hand, guide, Trace_ELBO())}
    if not absent("funsor", how=FUNSOR):
        found["NumPyro, enumerated by funsor"] = (enumerated, guide, TraceEnum_ELBO(1))
    return found


def numpyro_losses(model, repeats=1):
    """Name -> the loss in nats per datum at the model's parameters."""
    import jax
    import jax.numpy as jnp

    x, found = jnp.array(model.data["x"].numpy()), {}
    start = tree(model)
    for name, (program, guide, elbo) in numpyro_programs(start).items():
        keys = jax.random.split(jax.random.PRNGKey(0), repeats)
        values = [elbo.loss(key, start, program, guide, x) for key in keys]
        found[name] = float(sum(values)) / repeats / len(x)
    return found


def numpyro_steps(model, lr=1e-4):
    """Name -> a step of ``svi.update``; and of many in one call of ``lax.scan``."""
    import jax
    import jax.numpy as jnp
    from numpyro.infer import SVI
    from numpyro.optim import Adam

    x, found = jnp.array(model.data["x"].numpy()), {}
    for name, (program, guide, elbo) in numpyro_programs(tree(model)).items():
        svi = SVI(program, guide, Adam(lr), elbo)

        def many(state, x, svi=svi):
            return jax.lax.scan(lambda s, _: svi.update(s, x), state, None, length=SCAN)

        state = jax.tree.map(jnp.copy, svi.init(jax.random.PRNGKey(0), x))
        found[name] = caller(jax.jit(svi.update, donate_argnums=0), state, x)
        state = jax.tree.map(jnp.copy, svi.init(jax.random.PRNGKey(0), x))
        found[name + in_one_call()] = caller(jax.jit(many, donate_argnums=0), state, x)
    return found


def in_one_call():
    return f", {SCAN} steps in a call"


def caller(update, state, x):
    """A function that does an update and waits for it."""
    import jax

    def step():
        nonlocal state
        state, loss = update(state, x)
        jax.block_until_ready((state, loss))

    return step


# ---- GenJAX --------------------------------------------------------------------------------------


def genjax_bound(model):
    """The gradient estimator of the loss, and the loss: functions of key, parameters and x."""
    import genjax
    import jax
    import jax.numpy as jnp
    from genjax import ChoiceMapBuilder as C
    from genjax.adev import expectation
    from genjax.inference import vi

    def draw(key, loc, scale):
        return loc + scale * jax.random.normal(key, loc.shape)

    def log_normal(z, loc, scale):
        half = 0.5 * math.log(2 * math.pi)
        return jnp.sum(-0.5 * ((z - loc) / scale) ** 2 - jnp.log(scale) - half)

    def toss(key, logits):
        return jax.random.bernoulli(key, jax.nn.sigmoid(logits)).astype(jnp.float32)

    normals = genjax.exact_density(draw, log_normal, "normals")
    pixels = genjax.exact_density(toss, lambda x, a: jnp.sum(x * a - softplus(a)), "pixels")
    latent_dim = model.program.zeros.numel()

    @genjax.gen
    def program(parameters, like):
        ones = jnp.ones((len(like), latent_dim))
        z = normals(0 * ones, ones) @ "z"
        return pixels(perceptron(parameters["decoder"], z)) @ "x"

    @genjax.gen
    def guide(parameters, x):
        return vi.mv_normal_diag_reparam(*encode(parameters, x)) @ "z"

    def loss(key, parameters, x):
        drawn = guide.simulate(key, (parameters, x))
        both = drawn.get_choices() | C["x"].set(x)
        return (drawn.get_score() - program.assess(both, (parameters, x))[0]) / len(x)

    def gradient(key, parameters, x):
        leaves, shape = jax.tree.flatten(parameters)
        inside, outside = jax.random.split(key)

        @expectation
        def value(*leaves):
            return loss(inside, jax.tree.unflatten(shape, leaves), x)

        return jax.tree.unflatten(shape, value.grad_estimate(outside, tuple(leaves)))

    return gradient, loss


def genjax_steps(model, lr=1e-4):
    """Name -> a step of Adam on GenJAX's estimate of the gradient."""
    import jax
    import jax.numpy as jnp
    from jax.example_libraries.optimizers import adam

    x = jnp.array(model.data["x"].numpy())
    gradient, _ = genjax_bound(model)
    start, apply, read = adam(lr)

    def update(state, x):
        count, key, inside = state
        key, now = jax.random.split(key)
        inside = apply(count, gradient(now, read(inside), x), inside)
        return (count + 1, key, inside), None

    def many(state, x):
        return jax.lax.scan(lambda s, _: update(s, x), state, None, length=SCAN)

    def fresh():
        return jax.tree.map(jnp.copy, (jnp.array(0), jax.random.PRNGKey(0), start(tree(model))))

    return {
        "GenJAX": caller(jax.jit(update, donate_argnums=0), fresh(), x),
        "GenJAX" + in_one_call(): caller(jax.jit(many, donate_argnums=0), fresh(), x),
    }


# ---- works ---------------------------------------------------------------------------------------


def case(model, rivals, options, usual):
    """A round is as many steps as one scan has, by everyone."""
    batch, notes = Batch.of(model.data).to(dtype=torch.float32), []
    loss = model.by_hand["by hand"]
    ours = {"by hand": by_hand(model, loss)}
    ours["staged"] = staged_step(model, batch, options.compile, say=notes.append)
    steps = {
        name: step if name.endswith(in_one_call()) else repeated(step)
        for name, step in (ours | rivals).items()
    }
    times = measure(steps, options.times(usual), warm_up=2)
    times = {name: [x / SCAN for x in values] for name, values in times.items()}
    ratios = [("staged", name, 1.1) for name in rivals] + [("staged", "by hand", None)]
    return Case(model.name + ", binary pixels", "ms a step", times, ratios, notes=notes)


def repeated(step):
    def steps():
        for _ in range(SCAN):
            step()

    return steps


def numpyro_works(options):
    """VaDE and a VAE against NumPyro, jitted."""
    if missing := absent("numpyro", how=NUMPYRO):
        print(missing)
        return
    if missing := absent("funsor", how=FUNSOR):
        print(missing)
    deep, flat = ((8,), (8,)) if options.tiny else (DEEP, (128,))
    size = {"x_dim": 12} if options.tiny else {}
    torch.manual_seed(0)
    for model in (
        vade(7 if options.tiny else 256, deep, 3 if options.tiny else 10, binary=True, **size),
        vae(7 if options.tiny else 256, deep, 3 if options.tiny else 10, binary=True, **size),
        vae(7 if options.tiny else 64, flat, 3 if options.tiny else 16, binary=True, **size),
    ):
        yield case(model, numpyro_steps(model), options, usual=10)


def genjax_works(options):
    """A VAE against GenJAX, jitted."""
    if missing := absent("genjax", how=GENJAX):
        print(missing)
        return
    torch.manual_seed(0)
    sizes = [(7, (8,), 3, 12)] if options.tiny else [(256, DEEP, 10), (64, (128,), 16)]
    for size in sizes:
        model = vae(*size, binary=True)
        yield case(model, genjax_steps(model), options, usual=10)
