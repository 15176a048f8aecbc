import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcode as jc
from jaxcode import ReplicationCode, SplineCode, stragglers, tuning

from .cases import LATE, K, N, inputs, root_mean_square, sample_masks


def expected_variance(code, seed=9):
    """The posterior variance of a brute-force Gaussian process, a mean over straggler sets and inputs."""
    found = []
    for mask in np.asarray(sample_masks(100, seed)):
        knots, points = code.nodes.workers[mask].astype(np.longdouble), code.nodes.data

        # Vague straight lines and an integrated Wiener process that begins at the left.
        def kernel(s, t):
            low, high = np.minimum(s[:, None], t) + 1, np.maximum(s[:, None], t) + 1
            return low**2 * (3 * high - low) / 6 + 1e4 * (1 + s[:, None] * t)

        gram = np.float64(kernel(knots, knots)) + 1e-9 * np.eye(len(knots))
        solved = np.linalg.solve(gram, np.float64(kernel(knots, points)))
        found.append(np.mean(np.diagonal(kernel(points, points)) - np.sum(kernel(knots, points) * solved, axis=0)))
    return float(np.mean(found))


def test_nodes_move_to_where_the_posterior_varies_less():
    code = SplineCode.chebyshev(K, N)
    moved = tuning.optimise_nodes(code, LATE, steps=40, progress=False)
    assert expected_variance(moved) < 0.8 * expected_variance(code)
    assert (np.diff(moved.nodes.workers) >= 0).all()
    np.testing.assert_array_equal(moved.nodes.data, code.nodes.data)


@pytest.mark.parametrize("with_model", [False, True])
def test_masks_with_fewer_than_two_answers_do_not_count(with_model):
    code = SplineCode.chebyshev(4, 6)
    x = np.linspace(-2, 2, 8, dtype=np.float32)[:, None]
    arguments = {"f": bent_sine, "x_sample": x} if with_model else {}
    # Of 256 masks, about 28 leave fewer than two answers.
    moved = tuning.optimise_nodes(code, stragglers.Independent(0.5), steps=20, progress=False, **arguments)
    assert moved is not code
    assert np.isfinite(moved.nodes.workers).all()


def bent_sine(x):
    return x * jnp.sin(3 * x)


@pytest.mark.parametrize(
    "code",
    [
        pytest.param(SplineCode.chebyshev(K, N), marks=pytest.mark.long),
        pytest.param(jc.FloaterHormannCode.chebyshev(K, N, degree=2), marks=pytest.mark.long),
    ],
    ids=["spline", "Floater-Hormann"],
)
def test_nodes_move_to_where_a_model_errs_less(code):
    x = jnp.linspace(-2, 2, 2 * K)[:, None]
    moved = tuning.optimise_nodes(code, LATE, f=bent_sine, x_sample=x, steps=40, progress=False)
    before, after = (
        root_mean_square(jc.coded(bent_sine, code), bent_sine, x, sample_masks(40)) for code in (code, moved)
    )
    assert after < 0.9 * before


def test_without_a_step_the_code_is_the_same():
    code = SplineCode.chebyshev(K, N)
    assert tuning.optimise_nodes(code, LATE, steps=0, progress=False) is code


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("with_model", [False, True])
def test_strict_promotion_of_dtypes_and_ranks(x64, with_model):
    code = SplineCode.chebyshev(K, N)
    arguments = {"f": bent_sine, "x_sample": np.linspace(-2, 2, 2 * K, dtype=np.float32)[:, None]}
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"), jax.enable_x64(x64):
        moved = tuning.optimise_nodes(code, LATE, steps=2, progress=False, **(arguments if with_model else {}))
    assert moved.num_workers == N


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"code": ReplicationCode(K, N)}, "code is .* expected one with nodes that can be moved"),
        (
            {"code": jc.BerrutCode.chebyshev(K, N)},
            "code.decoder is Berrut.*no posterior variance; expected jaxcode.interpolants.Spline",
        ),
        ({"f": jnp.sin}, "f and x_sample go together"),
        ({"f": jnp.sin, "x_sample": inputs(3)}, "at least num_data, 5"),
        ({"code": SplineCode(np.arange(5.0), np.arange(8.0))}, "expected nodes on"),
    ],
)
def test_nodes_that_cannot_be_moved(unchecked, arguments, message):
    with pytest.raises(ValueError, match=message):
        tuning.optimise_nodes(**({"code": SplineCode.chebyshev(K, N), "stragglers": LATE} | arguments), progress=False)
