import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcode import SplineCode, coded, outputs

from .strict_modes import STRICT_MODES

K, N = 4, 8
WEIGHTS = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
X = jnp.asarray(np.random.default_rng(1).normal(size=(K, 3)), jnp.float32)
RETURNED = np.arange(N) != 3


def logits_of(x):
    return jnp.tanh(x @ WEIGHTS)


def probabilities_of(x):
    return jax.nn.softmax(logits_of(x))


SPACES = [outputs.as_returned, outputs.probabilities, outputs.logits]


@pytest.mark.parametrize("space", SPACES, ids=lambda s: s.name)
def test_results_in_the_space_of_answers_are_the_answers(space):
    y = jax.nn.log_softmax(logits_of(X)) if space is outputs.probabilities else probabilities_of(X)
    np.testing.assert_allclose(space.inverse_transform(space.transform(y)), y, atol=1e-6)


def test_decoding_is_done_in_the_space():
    code = SplineCode.chebyshev(K, N)
    answers = code.encode(X)
    found = coded(logits_of, code, output=outputs.probabilities)(X, RETURNED)
    decoded = code.decode(probabilities_of(answers), RETURNED)
    np.testing.assert_allclose(jnp.exp(found), jnp.maximum(decoded, 0), atol=1e-6)
    found = coded(probabilities_of, code, output=outputs.logits)(X, RETURNED)
    decoded = code.decode(jnp.log(probabilities_of(answers)), RETURNED)
    np.testing.assert_allclose(found, jax.nn.softmax(decoded), atol=1e-6)
    assert not np.allclose(found, code.decode(probabilities_of(answers), RETURNED), atol=1e-4)


def test_probabilities_of_zero_have_finite_logits():
    certain = jnp.array([[1.0, 0.0], [0.0, 1.0]])
    logits = outputs.logits.transform(certain)
    assert np.isfinite(logits).all()
    np.testing.assert_array_equal(outputs.logits.inverse_transform(logits), certain)


@pytest.mark.parametrize("mode", STRICT_MODES)
@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("space", SPACES, ids=lambda s: s.name)
def test_the_same_in_strict_modes(space, on_device, mode):
    y = {"a": np.asarray(probabilities_of(X)), "b": np.eye(5, dtype=np.float32)}
    y = jax.device_put(y) if on_device else y
    expected = jax.tree.map(np.asarray, [f(y) for f in (space.transform, space.inverse_transform)])
    with STRICT_MODES[mode]():
        found = [f(y) for f in (space.transform, space.inverse_transform)]
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_float64_of_numpy_has_finite_logits():
    assert np.isfinite(outputs.logits.transform(np.eye(3))).all()


@pytest.mark.parametrize("bad", [np.eye(3, dtype=bool), np.arange(3), jnp.float32(1), 0.5, "cat"])
@pytest.mark.parametrize("space", SPACES[1:], ids=lambda s: s.name)
def test_what_has_no_classes_is_named(unchecked, space, bad):
    for f, name in ((space.transform, "answers|outputs"), (space.inverse_transform, "results|outputs")):
        with pytest.raises(ValueError, match=rf"({name})\['a'\] (has|is) .*; expected"):
            f({"a": bad})
