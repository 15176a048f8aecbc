r"""The order in which a batch meets the curve: like beside like, so that the curve through it is short.

A code's error grows with how much f bends along the curve through a group of inputs. In the order of a shuffled batch
the curve jumps from one input to any other; along a short tour through the whole batch it goes from each input to one
like it. An ordering is any function `(x, num_data) -> order`, with `order` a permutation of the batch that is cut into
groups of num_data; `coded(f, code, order=...)` applies it and gives results back in the caller's order.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen, nnx
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from .checks import batch_size, check_count
from .functions import as_pure_function

# From a batch, leaves (B, ...), and K to a permutation of the batch: entry i names the input that comes i-th.
Ordering = Callable[[PyTree[Array], int], Int[Array, "batch"]]
Metric = Callable[[Any, Any], Float[Array, ""]]

# A batch longer than this is cut into parts, whose distances fit in memory one part at a time (16 MB).
MOST_IN_ONE_PATH = 2048
# Every pass tries the moves of every input; a tour stops getting shorter after five to ten.
MOST_PASSES = 16
# Numbers in all derivatives that are kept of a model (256 MB).
_MOST_OF_PROBES = 2**26


def greedy(
    x: PyTree[ArrayLike],
    num_data: int,
    *,
    key: Callable[[PyTree[Array]], PyTree[Array]] | None = None,
    metric: Metric | None = None,
) -> Int[Array, "batch"]:
    """A short path through the batch, cut where its steps are longest.

    A path is laid by greedy nearest neighbour and shortened by 2-opt moves (a stretch of it is walked the other way
    round where that saves length) until none helps. With a step from its end to its beginning it can be cut into groups
    in num_data ways: chosen is the one with the longest steps between groups.

    Batches of more than 2048 are first cut into parts of like inputs, halved again and again across the direction in
    which they differ most, and each part gets a path of its own: memory O(B D + 2048^2), time O(2048 B D).

    Jittable and vmappable; no derivatives pass through an order.

    Args:
        x: The batch, leaves (B, ...), real.
        num_data: K, inputs in a group.
        key: From the batch to the features whose distances count, leaves (B, ...): the model's first layer, a random
            projection. The inputs themselves if not given. For other settings: `functools.partial(greedy, key=...)`.
        metric: The distance of the features of one input to those of another, both without batch axis, to a number
            >= 0. Euclidean over all leaves if not given, as one matrix product.

    Returns:
        int32, shape (B,): a permutation of the batch; groups are num_data consecutive entries, the last may be shorter.
        Inputs with NaN or infinity in their features are far from all others.

    Raises:
        ValueError: If x or the features have no leaves or leading axes that differ, or num_data is not a whole number.

    References:
        Croes, A method for solving traveling-salesman problems, Operations Research 6 (1958), for 2-opt;
        arXiv 2609.00552 for curves that follow the data.

    >>> x = jnp.array([0.0, 9.0, 1.0, 8.0, 2.0, 10.0])[:, None]
    >>> sorted(x[order, 0].tolist() for order in greedy(x, 3).reshape(2, 3))
    [[0.0, 1.0, 2.0], [8.0, 9.0, 10.0]]
    """
    check_count("num_data", num_data)
    size = batch_size("x", x)
    x = jax.tree.map(jnp.asarray, x)
    features = x if key is None else key(x)
    found = batch_size("key(x)", features)
    if found != size:
        raise ValueError(f"key(x) has {found} rows; expected one for each of the {size} inputs in x")
    features = jax.tree.map(jax.lax.stop_gradient, features)
    return _greedy(features, size, min(num_data, size), metric)


def sensitivity(
    f: Callable | nnx.Module | tuple[linen.Module, Mapping[str, Any]],
    x_sample: PyTree[ArrayLike],
    *,
    num_probes: int = 1024,
    model_batch: int = 128,
    key: PRNGKeyArray | None = None,
) -> Callable[[PyTree[Array]], Float[Array, "batch probes"]]:
    r"""What a model sees of its inputs: features for `greedy` whose distances are changes of the model's answers.

    Two inputs are alike, for coding, if the model's answer changes little between them. To first order, and on average
    over the sample, it changes by

    .. math::
        \operatorname{E} \|J (x - x')\|^2 \approx \frac1n \sum_{i=1}^n (v_i^T J(x_i) (x - x'))^2,

    with J the model's derivative at inputs of the sample, and v random directions among its outputs. The features of x
    are the n numbers :math:`v_i^T J(x_i) x / \sqrt n`, a linear map that costs far less than the model.

    Args:
        f: A differentiable model, as `jaxcode.coded` takes it.
        x_sample: Inputs, leaves (B, ...) of real numbers.
        num_probes: n, how many derivatives are taken, each at the cost of two to three runs of the model; fewer for
            inputs so large that they would be more than 2^26 numbers. More resolve more directions.
        model_batch: Inputs that the model is differentiated on at a time.
        key: Random key of the directions.

    Returns:
        A function from a batch to its features, (B, n) in float32: `functools.partial(greedy, key=sensitivity(...))`.

    Raises:
        ValueError: If x_sample has no leaves, leading axes that differ or numbers that are not real.

    References:
        Constantine, Dow and Wang, Active subspace methods in theory and practice, arXiv 1304.2070.

    >>> look = sensitivity(lambda x: x[:, 0] ** 2, jnp.array([[1.0, 5.0], [2.0, 6.0]]), num_probes=4)
    >>> near, far = look(jnp.array([[0.0, 0.0], [0.0, 9.0], [1.0, 0.0]]))[1:]
    >>> bool(jnp.sum(near**2) == 0), bool(jnp.sum(far**2) > 1)
    (True, True)
    """
    check_count("num_probes", num_probes)
    model_batch = check_count("model_batch", model_batch)
    size = batch_size("x_sample", x_sample)
    x = jax.tree.map(jnp.asarray, x_sample)
    for path, leaf in jax.tree_util.tree_leaves_with_path(x):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            name = "x_sample" + jax.tree_util.keystr(path)
            raise ValueError(f"{name} has dtype {leaf.dtype}; expected real numbers, which have derivatives")
    fn, params = as_pure_function(f)
    features = sum(leaf.size for leaf in jax.tree.leaves(x)) // size
    num_probes = max(1, min(num_probes, _MOST_OF_PROBES // features))

    @jax.jit
    def probe(params, x, key):
        answers, pull = jax.vjp(lambda x: fn(params, x), x)
        leaves, structure = jax.tree.flatten(answers)
        keys = jax.random.split(key, len(leaves))
        directions = [jax.random.normal(k, leaf.shape, leaf.dtype) for k, leaf in zip(keys, leaves, strict=True)]
        return pull(jax.tree.unflatten(structure, directions))[0]

    # The sample over and over, in runs of one size, compiled once.
    model_batch = min(model_batch, size)
    keys = jax.random.split(jax.random.key(0) if key is None else key, -(-num_probes // model_batch))
    rows = jnp.arange(len(keys) * model_batch).reshape(-1, model_batch) % size
    rounds = [probe(params, jax.tree.map(lambda leaf, i=i: leaf[i], x), k) for i, k in zip(rows, keys, strict=True)]
    probes = jax.tree.map(lambda *leaves: jnp.concatenate(leaves)[:num_probes].astype(jnp.float32), *rounds)

    def look(x: PyTree[ArrayLike]) -> Float[Array, "batch probes"]:
        def along(leaf, probe):
            leaf = jnp.asarray(leaf)
            rows = leaf.reshape(leaf.shape[0], -1).astype(jnp.float32)
            return jnp.matmul(rows, probe.reshape(num_probes, -1).T, precision=jax.lax.Precision.HIGHEST)

        seen = jax.tree.leaves(jax.tree.map(along, x, probes))
        return functools.reduce(jnp.add, seen) / math.sqrt(num_probes)

    return look


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _greedy(features, size, num_data, metric):
    vectors = _as_vectors(features, size)
    if metric is None:
        features, metric = vectors, _euclidean
    # As many parts as the next power of two; what is missing to equal parts are copies of the last input.
    levels = max(0, math.ceil(math.log2(size / MOST_IN_ONE_PATH)))
    parts = 2**levels
    members = jnp.minimum(jnp.arange(-(-size // parts) * parts, dtype=jnp.int32), size - 1).reshape(1, -1)
    for _ in range(levels):
        members = jax.vmap(lambda part: _halved(part, vectors[part]))(members).reshape(2 * len(members), -1)

    def path_of(part):
        own = jax.tree.map(lambda leaf: leaf[part], features)
        distances = _distances(own, metric)
        # A place as near as can be to everything is where the path begins and the tour closes.
        distances = jnp.pad(distances, (0, 1))
        return part[_shortened(_nearest_neighbours(distances), distances)[1:]]

    path = jax.lax.map(path_of, members).reshape(-1) if levels else path_of(members[0])
    if len(path) > size:
        path = _without_copies(path, size)
    return _cut(path, features, num_data, metric)


def _as_vectors(features, size):
    """All leaves side by side, shape (B, D), about their mean: float32, or wider where they are."""
    leaves = [leaf.reshape(size, -1) for leaf in jax.tree.leaves(features)]
    vectors = jnp.concatenate([leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)) for leaf in leaves], axis=1)
    mean = jnp.mean(vectors, axis=0, where=jnp.isfinite(vectors))
    return vectors - jnp.where(jnp.isfinite(mean), mean, 0)


def _euclidean(a, b):
    return jnp.sqrt(jnp.sum((a - b) ** 2))


def _distances(features, metric):
    """Of every row to every row."""
    if metric is _euclidean:
        inner = jnp.matmul(features, features.T, precision=jax.lax.Precision.HIGHEST)
        squares = jnp.sum(features**2, axis=1)
        return _finite(jnp.sqrt(jnp.maximum(squares[:, None] + squares - 2 * inner, 0)))
    return _finite(jax.vmap(lambda one: jax.vmap(lambda other: metric(one, other))(features))(features))


def _finite(distances):
    """What cannot be measured is farther than what can."""
    known = jnp.isfinite(distances)
    return jnp.where(known, distances, 2 * jnp.max(distances, where=known, initial=0.5))


def _halved(part, vectors):
    """The two halves of a part across the direction in which its vectors differ most, found by power iteration."""
    vectors = jnp.nan_to_num(vectors, posinf=0, neginf=0)
    vectors = vectors - jnp.mean(vectors, axis=0)
    direction = vectors[jnp.argmax(jnp.sum(vectors**2, axis=1))]
    for _ in range(4):
        direction = direction / jnp.maximum(jnp.linalg.norm(direction), jnp.finfo(direction.dtype).tiny)
        direction = (vectors @ direction) @ vectors
    return part[jnp.argsort(vectors @ direction)]


def _nearest_neighbours(distances):
    """From the last, always the nearest of those left."""

    def step(carry, _):
        current, left = carry
        left = left.at[current].set(jnp.inf)
        return (jnp.argmin(distances[current] + left).astype(jnp.int32), left), current

    start = jnp.int32(len(distances) - 1), jnp.zeros(len(distances), distances.dtype)
    return jax.lax.scan(step, start, length=len(distances))[1]


def _shortened(tour, distances):
    """2-opt: for each step of the closed tour in turn the best partner, until a pass finds nothing.

    The first place stays the first.
    """
    size = len(tour)
    place = jnp.arange(size, dtype=jnp.int32)
    least = 1e-6 * jnp.max(distances)

    def lengths(tour):
        return distances[tour, jnp.roll(tour, -1)]

    def try_step(i, carry):
        tour, steps, _ = carry
        # Steps a -> b and c -> d become a -> c and b -> d, all between them walked backwards.
        a, b = tour[i], tour[jnp.where(i + 1 == size, 0, i + 1)]
        saved = steps[i] + steps - distances[a][tour] - jnp.roll(distances[b][tour], -1)
        saved = jnp.where(place == i, 0, saved)

        def walk_backwards():
            j = jnp.argmax(saved).astype(jnp.int32)
            first, last = jnp.minimum(i, j) + 1, jnp.maximum(i, j)
            turned = tour[jnp.where((place >= first) & (place <= last), first + last - place, place)]
            return turned, lengths(turned), jnp.bool_(True)

        # Most steps have no such partner, and looking is far cheaper than walking.
        return jax.lax.cond(jnp.max(saved) > least, walk_backwards, lambda: carry)

    def one_pass(carry):
        tour, steps, _, passes = carry
        return *jax.lax.fori_loop(0, size, try_step, (tour, steps, jnp.bool_(False))), passes + 1

    def unfinished(carry):
        return carry[2] & (carry[3] < MOST_PASSES)

    start = tour, lengths(tour), jnp.bool_(True), jnp.int32(0)
    return jax.lax.while_loop(unfinished, one_pass, start)[0]


def _without_copies(path, size):
    """The path without those that it has visited before; padding has put copies of one input into it."""
    last = path == size - 1
    again = last & (jnp.cumsum(last, dtype=jnp.int32) > 1)
    return path[jnp.argsort(again, stable=True)[:size]]


def _cut(path, features, num_data, metric):
    """The path, closed and turned so that its steps between groups are the longest."""
    size = len(path)
    along = jax.tree.map(lambda leaf: leaf[path], features)
    steps = _finite(jax.vmap(metric)(along, jax.tree.map(lambda leaf: jnp.roll(leaf, -1, axis=0), along)))
    starts = jnp.arange(num_data)[:, None] + jnp.arange(0, size, num_data)
    between = jnp.sum(steps[(starts - 1) % size], axis=1)
    return jnp.roll(path, -jnp.argmax(between))
