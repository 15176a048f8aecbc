"""Models of vectors, of many kinds, on which codes are compared."""

import dataclasses
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Float

from jaxcode.functions import Model

_DIMENSION, _NUM_OUTPUTS, _NUM_CLASSES = 64, 6, 10
_HIDDEN = (128, 128)


@dataclasses.dataclass(frozen=True)
class Case:
    """Holds a model, and how its inputs are drawn.

    Attributes:
        f: The model, of vectors.
        draw: From a generator and a number to so many inputs, in no order.
        losses: What is tuned for and measured, "squared_error" or "disagreement".
    """

    f: Model
    draw: Callable[[np.random.Generator, int], Float[np.ndarray, "batch features"]]
    losses: tuple[str, ...] = ("squared_error",)


def linear(seed: int) -> Case:
    """Makes a random linear model of 64 normal numbers."""
    return Case(nnx.Linear(_DIMENSION, _NUM_OUTPUTS, rngs=nnx.Rngs(seed)), _draw_normal)


def wide_perceptron(seed: int) -> Case:
    """Makes a random perceptron of 64 normal numbers, in which inputs have no neighbours."""
    return Case(_make_perceptron(seed, (_DIMENSION, *_HIDDEN, _NUM_OUTPUTS)), _draw_normal)


def surface_perceptron(seed: int) -> Case:
    """Makes a random perceptron of inputs near a surface of three dimensions."""
    return Case(_make_perceptron(seed + 1, (_DIMENSION, *_HIDDEN, _NUM_OUTPUTS)), _make_surface(seed))


def autoencoder(seed: int) -> Case:
    """Trains an autoencoder on inputs near a surface of three dimensions."""
    near_surface = _make_surface(seed)
    return Case(_train_autoencoder(seed, near_surface), near_surface)


def periodic(seed: int) -> Case:
    """Makes a sum of waves of one number, of which up to eight lie in its range."""
    rng = np.random.default_rng((seed, 3))
    frequency = rng.uniform(1, 8, size=(4, _NUM_OUTPUTS)).astype(np.float32)
    phase = rng.uniform(0, 2 * np.pi, size=(4, _NUM_OUTPUTS)).astype(np.float32)

    def wave(x):
        return jnp.sum(jnp.sin(2 * np.pi * x[:, :, None] * frequency + phase), axis=1)

    return Case(wave, lambda rng, count: _draw_uniform(rng, count, 1))


def jumps(seed: int) -> Case:
    """Makes a function of two numbers that jumps at lines, and is linear between them."""
    rng = np.random.default_rng((seed, 4))
    normals = rng.normal(size=(2, 8, _NUM_OUTPUTS)).astype(np.float32)
    offsets = np.einsum("d,djo->jo", rng.uniform(0.3, 0.7, size=2), normals).astype(np.float32)
    heights = rng.normal(size=(8, _NUM_OUTPUTS)).astype(np.float32)

    def jump(x):
        sides = jnp.einsum("bd,djo->bjo", x, normals) - offsets
        return jnp.sum(heights * jnp.where(sides > 0, 1 + 0.3 * sides, 0.0), axis=1)

    return Case(jump, lambda rng, count: _draw_uniform(rng, count, 2))


def untrained_classifier(seed: int) -> Case:
    """Makes a random classifier of 64 normal numbers, whose classes are arbitrary."""
    model = _make_perceptron(seed + 2, (_DIMENSION, *_HIDDEN, _NUM_CLASSES))
    return Case(model, _draw_normal, ("squared_error", "disagreement"))


# By name, how the case of a seed is made.
CASES: dict[str, Callable[[int], Case]] = {
    "linear": linear,
    "perceptron, wide input": wide_perceptron,
    "perceptron, surface": surface_perceptron,
    "autoencoder": autoencoder,
    "periodic": periodic,
    "jumps": jumps,
    "untrained classifier": untrained_classifier,
}


def _draw_normal(rng, count):
    return rng.normal(size=(count, _DIMENSION)).astype(np.float32)


def _draw_uniform(rng, count, dimension):
    return rng.uniform(size=(count, dimension)).astype(np.float32)


def _make_surface(seed, dimension=3, noise=0.02):
    """Makes a generator of inputs near a random curved surface of a few dimensions."""
    weights = np.random.default_rng((seed, 1)).normal(size=(dimension + 1, _DIMENSION))

    def draw(rng, count):
        place = rng.uniform(-1, 1, size=(count, dimension))
        points = np.sin(1.5 * place @ weights[1:] + np.pi * weights[0])
        return (points + noise * rng.normal(size=points.shape)).astype(np.float32)

    return draw


def _make_perceptron(seed, widths):
    """Makes an untrained perceptron, with biases."""
    rngs, layers = nnx.Rngs(seed), []
    weights, biases = jax.nn.initializers.he_normal(), jax.nn.initializers.normal(0.5)
    for sizes in itertools.pairwise(widths):
        layers += [nnx.Linear(*sizes, kernel_init=weights, bias_init=biases, rngs=rngs), jax.nn.relu]
    return nnx.Sequential(*layers[:-1])


def _train_autoencoder(seed, draw, num_steps=600):
    """Trains an autoencoder, with a bottleneck of four numbers, on inputs from a generator."""
    encoder, decoder = _make_perceptron(seed, (_DIMENSION, 128, 4)), _make_perceptron(seed, (4, 128, _DIMENSION))
    graph, params = nnx.split(nnx.Sequential(encoder, decoder))
    optimizer = optax.adam(2e-3)
    batches = jnp.asarray(draw(np.random.default_rng((seed, 2)), 4096)).reshape(32, 128, _DIMENSION)

    def loss(params, x):
        return jnp.mean((nnx.merge(graph, params)(x) - x) ** 2)

    def step(carry, i):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params, batches[i % 32]), state)
        return (optax.apply_updates(params, updates), state), None

    steps = jnp.arange(num_steps)
    (params, _), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, steps))((params, optimizer.init(params)))
    return nnx.merge(graph, params)
