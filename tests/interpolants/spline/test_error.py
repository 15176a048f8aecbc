"""Predicted errors: the variances beneath against brute force, coverage and rank, and what few data say."""

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from scipy.interpolate import make_interp_spline
from scipy.stats import spearmanr

import jaxcode as jc
from jaxcode.interpolants.spline import error as posterior
from jaxcode.interpolants.spline import wiener

RNG = np.random.default_rng(0)
KNOTS = np.sort(RNG.uniform(-1, 1, 10))
KNOTS[4] = KNOTS[5]
POINTS = np.sort(np.append(RNG.uniform(-1.1, 1.1, 5), KNOTS[7]))
WEIGHTS = np.array([1, 2, 0, 1, 1, 3, 1, 1, 1, 0.5])
SITES = np.unique(KNOTS[WEIGHTS > 0])
CODE = jc.SplineCode.systematic(6, 12)
MASK = np.arange(12) % 5 != 1
OWN = np.isin(CODE.nodes.data, CODE.nodes.workers[MASK])


def values(code=CODE, scale=1.0):
    t = np.asarray(code.nodes.workers)
    return scale * np.stack([np.sin(3 * t), np.abs(t - 0.1)], axis=1)


def errors(y, returned=MASK, code=CODE):
    return np.asarray(code.decode_with_error(jnp.asarray(y, jnp.float32), returned)[1])


@pytest.mark.parametrize("smoothing", [0.0, 1e-3, 1.0])
def test_unit_variances_are_a_brute_force_gaussian_process(smoothing):
    with jax.enable_x64(True):
        ours = wiener.unit_variances(KNOTS, POINTS, WEIGHTS, smoothing)
    _, theirs = _gaussian_process(KNOTS[WEIGHTS > 0], WEIGHTS[WEIGHTS > 0], POINTS, smoothing)
    np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize(("order", "bent", "smoothing"), [(1, 0, 0), (2, 0, 0), (2, 0, 1e-3), (4, 0, 0), (4, 0.9, 0)])
def test_processes_are_brute_force_gaussian_processes_and_know_each_site_from_the_others(order, bent, smoothing):
    with jax.enable_x64(True):
        found = wiener.find_sites(jnp.asarray(KNOTS), jnp.asarray(WEIGHTS))
        # Beside others, which must not matter.
        orders, shares = np.array([3, order]), np.array([0.5, bent])
        processes = jax.jit(
            lambda found: wiener.integrated_processes(
                found, jnp.asarray(POINTS), orders, shares, jnp.array([0.1, smoothing])
            )
        )(found)
        rows, variance = (np.asarray(a[1]) for a in processes)
    n, p, noise = len(SITES), len(POINTS), float(smoothing)
    weights = np.array([WEIGHTS[(t == KNOTS) & (WEIGHTS > 0)].sum() for t in SITES])
    means, variances = _gaussian_process(SITES, weights, POINTS, noise, order, bent)
    np.testing.assert_allclose(rows[:p, :n], means, rtol=1e-7, atol=1e-7)
    np.testing.assert_allclose(variance[:p], variances, rtol=1e-7, atol=1e-15)
    assert (rows[:p, n:] == 0).all()
    for i in range(n):
        others = np.arange(n) != i
        means, variances = _gaussian_process(SITES[others], weights[others], SITES[[i]], noise, order, bent)
        np.testing.assert_allclose(rows[p + i, :n][others], means[0], rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(rows[p + i, i], 0, atol=1e-9)
        np.testing.assert_allclose(variance[p + i], variances[0] + noise / weights[i], rtol=1e-6)


def _gaussian_process(knots, weights, points, smoothing, order=2, bent=0.0):
    """Posterior means and variances with 150 digits: Brownian motion integrated from -2 on, with a wild start."""
    ends = 2 * POINTS[0] - POINTS[1], 2 * POINTS[-1] - POINTS[-2]
    around = np.convolve(np.concatenate([ends[:1], POINTS, ends[1:]]), [0.5, 0, -0.5], "valid")
    with mpmath.workdps(150):

        def covariance(s, t):
            s, t = mpmath.mpf(float(s)) + 2, mpmath.mpf(float(t)) + 2
            low, apart = min(s, t), abs(s - t)
            terms = (
                mpmath.binomial(order - 1, j) * apart ** (order - 1 - j) * low ** (order + j) / (order + j)
                for j in range(order)
            )
            even = sum(terms)
            jumps = 0
            for place, share in zip(POINTS, around, strict=True):
                at = mpmath.mpf(float(place)) + 2
                if at < low:
                    jumps += mpmath.mpf(float(share)) * ((s - at) * (t - at)) ** (order - 1)
            of_noise = ((1 - mpmath.mpf(bent)) * even + mpmath.mpf(bent) * jumps) / mpmath.factorial(order - 1) ** 2
            return of_noise + mpmath.mpf(10) ** 40 * sum((s * t) ** j for j in range(order))

        # Noise so small that it is none, but knots at one place do not make the matrix singular.
        noise = mpmath.mpf(smoothing) + mpmath.mpf(10) ** -40
        n = len(knots)
        among = mpmath.matrix(n, n)
        for i in range(n):
            for j in range(n):
                among[i, j] = covariance(knots[i], knots[j]) + (noise / mpmath.mpf(float(weights[i])) if i == j else 0)
        inverse = among**-1
        means, variances = [], []
        for p in points:
            to = mpmath.matrix([covariance(p, t) for t in knots])
            mean = to.T * inverse
            means.append([float(mean[j]) for j in range(n)])
            variances.append(float(covariance(p, p) - (mean * to)[0]))
    return np.array(means), np.array(variances)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_posterior_means_are_scipys_natural_splines(order):
    inside = np.linspace(SITES[0], SITES[-1], 7)
    y = np.sin(3 * SITES)
    ends = [(order + i, 0.0) for i in range(order - 1)]
    theirs = make_interp_spline(SITES, y, k=2 * order - 1, bc_type=(ends, ends) if ends else None)(inside)
    with jax.enable_x64(True):
        found = wiener.find_sites(jnp.asarray(KNOTS), jnp.asarray(WEIGHTS))
        settings = np.array([order]), np.zeros(1), jnp.zeros(1)
        rows = jax.jit(lambda found: wiener.integrated_processes(found, jnp.asarray(inside), *settings).rows)(found)
        ours = rows[0, : len(inside), : len(SITES)] @ y
    np.testing.assert_allclose(ours, theirs, atol=1e-9)


FUNCTIONS = {
    "sine": np.sin,
    "x sin x": lambda x: x * np.sin(2 * x),
    "exponential": np.exp,
    "Runge": lambda x: 1 / (1 + 9 * x**2),
    "logistic": lambda x: 1 / (1 + np.exp(-3 * x)),
    "waves": lambda x: sum(np.exp(-0.4 * j) * np.sin(j * x + j * j) for j in range(1, 12)),
    "hyperbolic network": lambda x: np.tanh(np.sin(4 * np.arange(9) + np.tanh(2 * x[..., None] + np.arange(9)))).sum(
        -1
    ),
}


UNIFORM = np.linspace(-1, 1, 14)[1:-1], np.linspace(-1, 1, 36)
LAYOUTS = {
    "chebyshev": (jc.SplineCode.chebyshev(12, 36), 6),
    "systematic": (jc.SplineCode.systematic(12, 36), 6),
    "uniform": (jc.SplineCode(*UNIFORM), 6),
    "repeated": (jc.SplineCode.repeated(12, 18), 5),
    # Between data nodes the curve is smooth on the scale of the gaps between workers, but not at them.
    "ten times as many workers": (jc.SplineCode.chebyshev(8, 80), 20),
}


@pytest.mark.long
def test_intervals_hold_nine_truths_of_ten_and_errors_rank_the_true_ones():
    rng = np.random.default_rng(1)
    layouts, functions, ranks = {}, {}, []
    with jax.enable_x64(True):
        # One feature at a time: each is judged alone.
        predict = jax.jit(
            jax.vmap(
                lambda t, y, p, w: jax.vmap(lambda c: posterior.predicted_errors(t, c[:, None], p, w)[:, 0], 1, 1)(y),
                (None, None, None, 0),
            )
        )
        for layout, (code, lost) in LAYOUTS.items():
            encoder, alpha, beta = np.asarray(code.encoder_matrix()), code.nodes.data, code.nodes.workers
            masks = np.stack([np.isin(np.arange(len(beta)), rng.permutation(len(beta))[lost:]) for _ in range(8)])
            decoders = np.stack([np.asarray(code.decoder_matrix(mask)) for mask in masks])
            for name, f in FUNCTIONS.items():
                # Smooth along the nodes, and not.
                even = 2 * alpha[:, None] * rng.uniform(0.6, 1, 4)
                x = np.append(even, np.sort(rng.uniform(-2, 2, even.shape), axis=0), axis=1)
                y = f(encoder @ x)
                error = np.asarray(predict(beta, jnp.asarray(y), alpha, masks))
                true = np.abs(decoders @ y - f(x))
                for mask, e, t in zip(masks, error, true, strict=True):
                    live = ~np.isin(alpha, beta[mask])
                    held = (t <= 1.645 * e)[live].ravel()
                    layouts.setdefault(layout, []).append(held)
                    functions.setdefault(name, []).append(held)
                    if live.sum() > 6:
                        ranks += [spearmanr(t[:, j], e[:, j])[0] for j in range(8)]
    layouts, functions = ({k: np.concatenate(v).mean() for k, v in d.items()} for d in (layouts, functions))
    assert 0.85 <= np.mean(list(layouts.values())) <= 0.95, layouts
    # Highest where workers sit at the data nodes themselves and closely between.
    assert min(layouts.values()) >= 0.85, layouts
    assert max(layouts.values()) <= 0.97, layouts
    assert min(functions.values()) >= 0.84, functions
    assert max(functions.values()) <= 0.95, functions
    assert np.mean(ranks) > 0.8


def test_an_answer_to_the_input_itself_is_exact_and_others_are_not():
    error = errors(values())
    assert OWN.any()
    assert (~OWN).any()
    assert (error[OWN] == 0).all()
    assert (error[~OWN] > 0).all()


def test_results_are_those_of_decode_and_errors_are_like_them():
    y = {"logits": jnp.asarray(values(), jnp.bfloat16), "image": jnp.arange(12, dtype=jnp.uint8)}
    results, error = CODE.decode_with_error(y, MASK)
    expected = CODE.decode(y, MASK)
    for name in y:
        np.testing.assert_array_equal(results[name], expected[name])
        assert error[name].dtype == results[name].dtype
        assert error[name].shape == results[name].shape
        assert (error[name] >= 0).all()


def test_errors_have_the_unit_of_the_answers():
    error = errors(values())
    np.testing.assert_allclose(errors(values(scale=1e12)), 1e12 * error, rtol=1e-4)
    np.testing.assert_allclose(errors(values(scale=1e-12)), 1e-12 * error, rtol=1e-4)


def test_straight_lines_have_no_error_and_no_say():
    line = 3 - 2 * np.asarray(CODE.nodes.workers)
    with jax.enable_x64(True):
        alone, _ = (np.asarray(CODE.decode_with_error(jnp.stack([c, c], 1), MASK)[1]) for c in (line, line))
        beside = np.asarray(CODE.decode_with_error(jnp.stack([values()[:, 0], line], 1), MASK)[1])
        twice = np.asarray(CODE.decode_with_error(jnp.stack([values()[:, 0]] * 2, 1), MASK)[1])
    assert alone.max() < 1e-12
    assert beside[:, 1].max() < 1e-9
    assert np.all(beside[~OWN, 0] > 0.3 * twice[~OWN, 0])
    assert np.all(beside[~OWN, 0] < 3 * twice[~OWN, 0])
    assert (errors(np.zeros((12, 2))) == 0).all()


def test_rows_that_did_not_return_are_not_read():
    y = values()
    for poison in (np.nan, np.inf, 1e30):
        np.testing.assert_array_equal(errors(np.where(MASK[:, None], y, poison)), errors(y))


@pytest.mark.parametrize("count", range(7))
def test_few_answers_say_what_they_can(count):
    returned = np.isin(np.arange(12), np.argsort(np.abs(np.arange(12) - 5.2))[:count])
    own = np.isin(CODE.nodes.data, CODE.nodes.workers[returned])
    error = errors(values(), returned)
    assert not np.isnan(error).any()
    if count < 2:
        assert np.isinf(error).all()
    else:
        assert (error[own] == 0).all()
        assert (error[~own] > 0).all()
        assert np.isinf(error[~own]).all() == (count == 2)


def test_workers_at_one_node_count_as_one_with_their_mean():
    code = jc.SplineCode.repeated(6, 12)
    returned = np.isin(np.arange(12), [0, 1, 2, 5, 6, 9])
    y = values(code) + RNG.normal(size=(12, 2))
    single = np.stack([y[[0, 1]].mean(0), y[2], y[5], y[6], y[9]])
    sites = code.nodes.workers[[0, 2, 5, 6, 9]]
    assert len(np.unique(sites)) == 5
    with jax.enable_x64(True):
        merged = code.decode_with_error(jnp.asarray(y), returned)[1]
        filled = np.append(sites, np.linspace(1.5, 2, 7))
        rows = np.concatenate([single, np.full((7, 2), np.nan)])
        expected = posterior.predicted_errors(filled, jnp.asarray(rows), code.nodes.data, np.arange(12) < 5)
    np.testing.assert_allclose(merged, expected, rtol=1e-9, atol=1e-12)


def test_vmap_over_masks_is_a_loop():
    masks = np.stack([MASK, ~MASK, np.ones(12, bool), np.arange(12) < 2])
    y = jnp.asarray(values(), jnp.float32)
    together = jax.jit(jax.vmap(lambda m: CODE.decode_with_error(y, m)[1]))(masks)
    for mask, error in zip(masks, together, strict=True):
        np.testing.assert_allclose(error, errors(values(), mask), rtol=1e-5, atol=1e-6)


@pytest.mark.long
def test_derivatives_are_finite_and_agree_with_finite_differences():
    masks = np.stack([MASK, np.ones(12, bool), np.arange(12) < 2, np.arange(12) < 4])
    t = np.asarray(CODE.nodes.workers)
    data = [values(), np.zeros((12, 2)), np.stack([t, 1 + t], 1)]
    smoothings = np.array([0.0, 1e-4])

    prepare, judge = posterior._prepare.__wrapped__, posterior._judge.__wrapped__

    def total(smoothing, beta, alpha, y, mask):
        # Beneath `in_float64`, whose own derivatives have their own tests and double the time to compile.
        known = prepare(beta, alpha, mask, smoothing)
        error = judge(*known, jnp.where(mask[:, None], y, jnp.nan), alpha, mask, smoothing, 1e-16)
        return jnp.sum(jnp.where(jnp.isfinite(error), error, 0))

    with jax.enable_x64(True):
        slopes = jax.jit(jax.value_and_grad(total, (0, 1, 2, 3)))
        for smoothing in smoothings:
            for y in data:
                for mask in masks:
                    found = slopes(smoothing, t, CODE.nodes.data, y, mask)
                    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))
        at = (1e-4, t, CODE.nodes.data, values())
        _, slope = slopes(*at, MASK)
        for which in range(4):
            direction = np.random.default_rng(which).normal(size=np.shape(at[which]))
            step = 1e-6 if which else 1e-7
            above, below = (
                slopes(*at[:which], at[which] + sign * step * direction, *at[which + 1 :], MASK)[0] for sign in (1, -1)
            )
            numeric = float(above - below) / (2 * step)
            assert np.sum(np.asarray(slope[which]) * direction) == pytest.approx(numeric, rel=1e-4, abs=1e-6)
