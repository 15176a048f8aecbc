"""Codes x node layouts x masks: derivatives of the whole pipeline, in float64 and in the mode of the process."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from .cases import CODES, MASKS, MERGES_SITES, all_masks, each_mask, each_program, in_x64, normal, returned_of

STEP = 1e-5

# Degree 0 is Berrut's, which is here.
each_differentiated = pytest.mark.parametrize("name", [name for name in CODES if name != "floater-hormann-0"])


def pipeline(code, x, returned):
    """Inputs to results, for workers that compute a curve; lost inputs count as zero."""
    decoded = code.decode(jnp.sin(2 * code.encode(x)), returned)
    return jnp.where(code.recovered(returned)[:, None], decoded, 0)


def loss(code, x, returned):
    return jnp.sum(jnp.cos(jnp.arange(2 * code.num_data)).reshape(-1, 2) * pipeline(code, x, returned))


def inputs(name):
    return normal(CODES[name].num_data, 2, dtype=np.float64)


def direction(tree):
    """Moves every number of a tree, each by another amount."""
    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(structure, [normal(*np.shape(v), seed=i, dtype=float) for i, v in enumerate(leaves)])


@in_x64
def gradients_under_each_mask(code, x, masks):
    return jax.vmap(jax.grad(loss, (0, 1)), (None, None, 0))(code, x, masks)


@in_x64
def losses_near(codes, x, masks):
    """Losses of each code (leading axis of its leaves) with its input, under each mask."""
    return jax.vmap(lambda code, x: jax.vmap(lambda mask: loss(code, x, mask))(masks))(codes, x)


@in_x64
def moved(code, x, returned, moves):
    return jax.jvp(lambda code, x: pipeline(code, x, returned), (code, x), moves)


@functools.cache
def gradients(name):
    """Gradients with respect to the code's leaves and the inputs, leading axis the masks."""
    code, x = CODES[name], inputs(name)
    return jax.tree.leaves(gradients_under_each_mask(code, x, all_masks(name)))


@functools.cache
def differences(name):
    """The same by central differences in every coordinate, one-sided where a smoothing is zero."""
    leaves, structure = jax.tree.flatten((CODES[name], inputs(name)))
    flat = np.concatenate([np.ravel(leaf) for leaf in leaves])
    ends = np.cumsum([np.size(leaf) for leaf in leaves])
    smoothing_at_zero = [i for leaf, i in zip(leaves, ends - 1, strict=True) if np.ndim(leaf) == 0 and leaf == 0]
    ahead = np.eye(len(flat)) * STEP
    offsets = np.stack([-2 * ahead, -ahead, ahead, 2 * ahead])
    weights = np.broadcast_to(np.array([1, -8, 8, -1])[:, None] / 12, (4, len(flat))).copy()
    # A smoothing cannot be negative: four points ahead of it (with the one at zero) instead of around it.
    for i in smoothing_at_zero:
        offsets[:, i, i] = np.array([0, 1, 2, 3]) * STEP * 1e-3
        weights[:, i] = np.array([-11, 18, -9, 2]) / 6 * 1e3
    near = (flat + offsets).reshape(-1, len(flat))
    split = [
        part.reshape(-1, *np.shape(leaf)) for part, leaf in zip(np.split(near, ends[:-1], axis=1), leaves, strict=True)
    ]
    losses = losses_near(*jax.tree.unflatten(structure, split), all_masks(name)).reshape(4, len(flat), len(MASKS))
    slopes = np.einsum("sim,si->mi", losses, weights) / STEP
    parts = np.split(slopes, ends[:-1], axis=1)
    return [part.reshape(len(MASKS), *np.shape(leaf)) for part, leaf in zip(parts, leaves, strict=True)]


@each_differentiated
@each_mask
def test_gradients_are_finite_differences(name, mask):
    at = MASKS.index(mask)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path((CODES[name], inputs(name)))]
    for path, gradient, difference in zip(paths, gradients(name), differences(name), strict=True):
        assert np.isfinite(gradient[at]).all(), path
        if name in MERGES_SITES and path == "[0].nodes.workers":
            continue  # workers that share a node cannot be moved apart without changing the order
        size = max(1.0, np.abs(difference[at]).max())
        np.testing.assert_allclose(gradient[at] / size, difference[at] / size, rtol=0, atol=1e-6, err_msg=path)


@each_differentiated
@each_mask
def test_jvp_is_the_transpose_of_vjp(name, mask):
    at, code, x = MASKS.index(mask), CODES[name], inputs(name)
    moves = direction((code, x))
    _, tangent = moved(code, x, returned_of(mask, name), moves)
    cotangent = np.cos(np.arange(tangent.size)).reshape(tangent.shape)
    there = np.sum(cotangent * tangent)
    pairs = zip(gradients(name), jax.tree.leaves(moves), strict=True)
    terms = [gradient[at] * move for gradient, move in pairs]
    np.testing.assert_allclose(there, sum(map(np.sum, terms)), rtol=1e-9, atol=1e-9 * max(map(np.max, map(abs, terms))))


@each_program
def test_jacobians_agree_forwards_backwards_and_rematerialised(name):
    code, x, returned = CODES[name], inputs(name), returned_of("random-third-missing", name)

    @in_x64
    def jacobians(code, x):
        of_x = functools.partial(pipeline, code, returned=returned)
        return [jax.jacfwd(of_x)(x), jax.jacrev(of_x)(x), jax.jacrev(jax.checkpoint(of_x))(x)]

    forward, backward, again = jacobians(code, x)
    assert forward.shape == (code.num_data, 2, code.num_data, 2)
    np.testing.assert_allclose(backward, forward, atol=1e-10)
    np.testing.assert_allclose(again, backward, atol=1e-12)


@each_program
def test_vmap_of_grad_of_jit_in_this_mode(name):
    """Through a code that is closed over: float32 near float64, and garbage is neither read nor moved."""
    code = CODES[name]
    masks, y = all_masks(name), normal(code.num_workers, 2)
    spoilt = np.where(masks[:, :, None], y, np.float32(np.nan))

    @jax.jit
    def size(y, returned):
        decoded = code.decode(y, returned)
        return jnp.sum(jnp.where(code.recovered(returned)[:, None], decoded, 0) ** 2)

    gradient = np.asarray(jax.vmap(jax.grad(size))(spoilt, masks))
    assert gradient.dtype == np.float32
    assert (gradient[~masks] == 0).all()
    for row, returned in zip(gradient, masks, strict=True):
        with jax.enable_x64(True):
            matrix = np.nan_to_num(np.asarray(code.decoder_matrix(returned)))
        expected = 2 * matrix.T @ (matrix @ y)
        scale = max(1, np.max(np.abs(matrix.T) @ (np.abs(matrix) @ np.abs(y))))
        np.testing.assert_allclose(row, expected, rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("name", ["spline-smoothed", "floater-hormann-3-chebyshev"])
def test_gradients_of_a_code_that_is_an_argument_in_this_mode(name):
    """A code can be trained with x64 off: nodes and smoothing are float32, derivatives right to their digits."""
    code, x, mask = CODES[name], inputs(name), "random-third-missing"
    gradient = jax.jit(jax.grad(loss, (0, 1)))(code, x.astype(np.float32), returned_of(mask, name))
    for actual, expected in zip(jax.tree.leaves(gradient), gradients(name), strict=True):
        expected = expected[MASKS.index(mask)]
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4 * max(1, np.abs(expected).max()))
