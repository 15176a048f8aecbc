import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcode as jc
from jaxcode import SplineCode, outputs
from jaxcode.tuning.answers import AnswerCache, BatchedModel
from jaxcode.tuning.evaluation import Evaluator
from jaxcode.tuning.losses import squared_error
from jaxcode.tuning.smoothing import smoothing_of, with_smoothing

from .cases import WEIGHTS, K, inputs, sample_masks

ALPHA = np.array([-1.0, 0.0, 0.5, 1.0])


def _square(_, x):
    return x**2


def _encoded_squares(code, x):
    return np.asarray(code.encode(jnp.asarray(x)) ** 2)


def test_the_model_runs_once_on_what_several_codes_ask():
    model = BatchedModel(_square, (), 12)
    x = np.asarray(inputs(12)).reshape(4, 3, 4)
    cache = AnswerCache(model, x, x**2)

    def answers(workers, num_groups):
        return cache.answers(SplineCode(ALPHA, np.array(workers)), num_groups)

    np.testing.assert_array_equal(answers([-1.0, 0.0, 0.0, 1.0], 3), x[[0, 1, 1, 3]] ** 2)
    np.testing.assert_array_equal(cache.answers(jc.ReplicationCode(4, 9), 2), x[np.arange(9) % 4, :2] ** 2)
    assert model.count == 0
    answers([-0.5, 0.0, 0.7], 2)
    assert model.count == 4
    found = answers([-0.5, 0.2, 0.7], 3)
    assert model.count == 4 + 2 + 3
    np.testing.assert_allclose(found, _encoded_squares(SplineCode(ALPHA, np.array([-0.5, 0.2, 0.7])), x), 1e-5, 1e-6)


def test_answers_are_those_of_the_code_that_asks():
    """Nodes are the same, encoders are not: a curve's answers are of no use to another."""
    x = np.asarray(inputs(12)).reshape(4, 3, 4)
    cache = AnswerCache(BatchedModel(_square, (), 7), x, x**2)
    layout = jc.nodes.systematic(ALPHA, 7)
    encoders = jc.interpolants.Spline(), jc.interpolants.Berrut(), jc.interpolants.Spline(0.3)
    for encoder in encoders:
        code = jc.InterpolatingCode(layout, encoder)
        np.testing.assert_allclose(cache.answers(code, 3), _encoded_squares(code, x), rtol=1e-5, atol=1e-5)
    # Without smoothing, workers at data nodes compute the inputs themselves: those answers are shared.
    assert cache._model.count == 3 * (2 * 3 + 7)


@pytest.mark.parametrize("layout", ["chebyshev", "repeated"])
@pytest.mark.parametrize("space", [outputs.as_returned, outputs.probabilities])
def test_the_error_has_derivatives_by_both_smoothings(layout, space):
    code = getattr(SplineCode, layout)(K, 20)
    rng = np.random.default_rng(0)
    x = {"a": rng.normal(size=(K, 3, 4)).astype(np.float32), "b": rng.integers(0, 9, (K, 3), np.uint8)}
    # More coded inputs than the model runs on at a time.
    model = BatchedModel(lambda _, x: jnp.tanh(x["a"] @ WEIGHTS) + 0.1 * x["b"][:, None], (), 7)
    targets = rng.normal(size=(K, 3, 3)).astype(np.float32)
    masks = sample_masks(8, seed=0, num_workers=20)
    evaluator = Evaluator(masks, squared_error, 5)
    cache = AnswerCache(model, x, targets)

    def smooth_code(encoder, decoder):
        smooth = with_smoothing(code, encoder=np.exp(encoder), decoder=np.exp(decoder))
        return smooth, cache.answers(smooth, 3)

    def square(*logarithms):
        smooth, answers = smooth_code(*logarithms)
        return evaluator.measure(smooth, [space], answers, targets)[0].rmse ** 2

    for encoder, decoder in ((-5.0, -9.0), (-8.0, -6.0)):
        smooth, answers = smooth_code(encoder, decoder)
        found, decoder_slope, answer_slopes = evaluator.squared_error_slopes(smooth, space, answers, targets)
        assert found == pytest.approx(square(encoder, decoder), rel=1e-5)
        slope = (square(encoder, decoder + 0.05) - square(encoder, decoder - 0.05)) / 0.1
        assert decoder_slope == pytest.approx(slope, rel=0.02)
        slope = (square(encoder + 0.05, decoder) - square(encoder - 0.05, decoder)) / 0.1
        assert cache.encoder_slope(smooth, answer_slopes) == pytest.approx(slope, rel=0.02)


def test_smoothing_is_asked_for():
    code = jc.InterpolatingCode(jc.nodes.chebyshev(K, 9), jc.interpolants.Berrut(), jc.interpolants.Spline(0.5))
    assert (smoothing_of(code, "encoder"), smoothing_of(code, "decoder")) == (None, 0.5)
    assert smoothing_of(jc.ReplicationCode(K, 9), "decoder") is None
    changed = with_smoothing(code, decoder=0.25)
    assert smoothing_of(changed, "decoder") == 0.25
    assert jax.tree.structure(changed) == jax.tree.structure(code)
