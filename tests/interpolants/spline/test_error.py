"""Predicted errors of smoothing splines: coverage and rank, units, few data, masks and derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import spearmanr

import jaxcode as jc
from jaxcode.interpolants.spline.error import _prepare, _standard_errors, predict_errors

RNG = np.random.default_rng(0)
CODE = jc.SplineCode.systematic(6, 12)
MASK = np.arange(12) % 5 != 1
OWN = np.isin(CODE.nodes.data, CODE.nodes.workers[MASK])


def values(code=CODE, scale=1.0):
    t = np.asarray(code.nodes.workers)
    return scale * np.stack([np.sin(3 * t), np.abs(t - 0.1)], axis=1)


def errors(y, returned=MASK, code=CODE):
    return np.asarray(code.decode_with_error(jnp.asarray(y, jnp.float32), returned)[1])


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
def test_intervals_cover_nine_truths_of_ten_and_predicted_errors_rank_true_ones():
    rng = np.random.default_rng(1)
    layouts, functions, ranks = {}, {}, []
    with jax.enable_x64(True):
        # One feature at a time: each is judged alone.
        predict = jax.jit(
            jax.vmap(
                lambda t, y, p, w: jax.vmap(lambda c: predict_errors(t, c[:, None], p, w)[:, 0], 1, 1)(y),
                (None, None, None, 0),
            )
        )
        for layout, (code, lost) in LAYOUTS.items():
            encoder, alpha, beta = np.asarray(code.encoder_matrix()), code.nodes.data, code.nodes.workers
            masks = np.stack([np.isin(np.arange(len(beta)), rng.permutation(len(beta))[lost:]) for _ in range(8)])
            decoders = np.stack([np.asarray(code.decoder_matrix(mask)) for mask in masks])
            for name, f in FUNCTIONS.items():
                # Inputs that are smooth along the nodes, and random ones in ascending order.
                even = 2 * alpha[:, None] * rng.uniform(0.6, 1, 4)
                x = np.append(even, np.sort(rng.uniform(-2, 2, even.shape), axis=0), axis=1)
                y = f(encoder @ x)
                error = np.asarray(predict(beta, jnp.asarray(y), alpha, masks))
                true = np.abs(decoders @ y - f(x))
                for mask, e, t in zip(masks, error, true, strict=True):
                    live = ~np.isin(alpha, beta[mask])
                    covered = (t <= 1.645 * e)[live].ravel()
                    layouts.setdefault(layout, []).append(covered)
                    functions.setdefault(name, []).append(covered)
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


@pytest.mark.parametrize("scale", [1e-90, 1e90])
def test_errors_do_not_depend_on_the_unit_of_the_nodes(scale):
    y = jnp.asarray(values(), jnp.float32)
    with jax.enable_x64(True):
        expected = predict_errors(CODE.nodes.workers, y, CODE.nodes.data, MASK)
        found = predict_errors(scale * CODE.nodes.workers, y, scale * CODE.nodes.data, MASK)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)


def test_straight_lines_have_no_error_and_no_weight_in_the_evidence():
    line = 3 - 2 * np.asarray(CODE.nodes.workers)
    with jax.enable_x64(True):
        of_lines = np.asarray(CODE.decode_with_error(jnp.stack([line, line], 1), MASK)[1])
        with_line = np.asarray(CODE.decode_with_error(jnp.stack([values()[:, 0], line], 1), MASK)[1])
        without_line = np.asarray(CODE.decode_with_error(jnp.stack([values()[:, 0]] * 2, 1), MASK)[1])
    assert of_lines.max() < 1e-12
    assert with_line[:, 1].max() < 1e-9
    assert np.all(with_line[~OWN, 0] > 0.3 * without_line[~OWN, 0])
    assert np.all(with_line[~OWN, 0] < 3 * without_line[~OWN, 0])
    assert (errors(np.zeros((12, 2))) == 0).all()


def test_rows_that_did_not_return_are_not_read():
    y = values()
    for garbage in (np.nan, np.inf, 1e30):
        np.testing.assert_array_equal(errors(np.where(MASK[:, None], y, garbage)), errors(y))


@pytest.mark.parametrize("count", range(7))
def test_few_answers_give_wide_or_infinite_errors(count):
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
        expected = predict_errors(filled, jnp.asarray(rows), code.nodes.data, np.arange(12) < 5)
    np.testing.assert_allclose(merged, expected, rtol=1e-9, atol=1e-12)


def test_vmap_over_masks_is_a_loop():
    masks = np.stack([MASK, ~MASK, np.ones(12, bool), np.arange(12) < 2])
    y = jnp.asarray(values(), jnp.float32)
    mapped = jax.jit(jax.vmap(lambda m: CODE.decode_with_error(y, m)[1]))(masks)
    for mask, error in zip(masks, mapped, strict=True):
        np.testing.assert_allclose(error, errors(values(), mask), rtol=1e-5, atol=1e-6)


@pytest.mark.long
def test_derivatives_are_finite_and_agree_with_finite_differences():
    masks = np.stack([MASK, np.ones(12, bool), np.arange(12) < 2, np.arange(12) < 4])
    t = np.asarray(CODE.nodes.workers)
    data = [values(), np.zeros((12, 2)), np.stack([t, 1 + t], 1)]
    smoothings = np.array([0.0, 1e-4])

    prepare, standard_errors = _prepare.__wrapped__, _standard_errors.__wrapped__

    def total(smoothing, beta, alpha, y, mask):
        # Beneath `in_float64`, whose own derivatives have their own tests and double the time to compile.
        known = prepare(beta, alpha, mask, smoothing)
        found = standard_errors(*known, jnp.where(mask[:, None], y, jnp.nan), alpha, mask, smoothing, 1e-16)
        return jnp.sum(jnp.where(jnp.isfinite(found), found, 0))

    with jax.enable_x64(True):
        slopes = jax.jit(jax.value_and_grad(total, (0, 1, 2, 3)))
        for smoothing in smoothings:
            for y in data:
                for mask in masks:
                    found = slopes(smoothing, t, CODE.nodes.data, y, mask)
                    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))
        arguments = (1e-4, t, CODE.nodes.data, values())
        _, slope = slopes(*arguments, MASK)
        for which in range(4):
            direction = np.random.default_rng(which).normal(size=np.shape(arguments[which]))
            step = 1e-6 if which else 1e-7
            above, below = (
                slopes(*arguments[:which], arguments[which] + sign * step * direction, *arguments[which + 1 :], MASK)[0]
                for sign in (1, -1)
            )
            numeric = float(above - below) / (2 * step)
            assert np.sum(np.asarray(slope[which]) * direction) == pytest.approx(numeric, rel=1e-4, abs=1e-6)
