import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.metrics import accuracy_score, root_mean_squared_error

from jaxcode import metrics

from .strict_modes import STRICT_MODES

ERRORS = [metrics.rmse, metrics.mean_error_norm]
each_error = pytest.mark.parametrize("error", ERRORS)


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    targets = rng.normal(size=(3, 20, 5)).astype(np.float32)
    estimates = (targets + rng.normal(size=targets.shape)).astype(np.float32)
    return estimates, targets, rng.integers(5, size=(3, 20))


def drop_rows(estimates, lost):
    return np.where(lost[..., None], np.nan, estimates)


# ---- errors ------------------------------------------------------------------------------------------------


def test_rmse_is_scikit_learns_over_outputs_summed(data):
    estimates, targets, _ = data
    single = root_mean_squared_error(targets.ravel(), estimates.ravel())
    np.testing.assert_allclose(metrics.rmse(estimates, targets), single * np.sqrt(5), rtol=1e-5)


def test_mean_error_norm_is_the_mean_of_numpys_norms(data):
    estimates, targets, _ = data
    expected = np.linalg.norm(estimates - targets, axis=-1).mean()
    np.testing.assert_allclose(metrics.mean_error_norm(estimates, targets), expected, rtol=1e-5)


whole = st.integers(-1000, 1000)


@settings(deadline=None, max_examples=50)
@given(hnp.arrays(np.float32, (2, 4, 3), elements=whole), hnp.arrays(bool, (2, 4)).filter(np.any))
def test_where_selects_inputs(estimates, where):
    targets = np.zeros_like(estimates)
    norms = np.linalg.norm(estimates[where].astype(np.float64), axis=-1)
    rmse, mean = (jax.jit(error)(drop_rows(estimates, ~where), targets, where=where) for error in ERRORS)
    np.testing.assert_allclose(rmse, np.sqrt(np.mean(norms**2)), rtol=1e-5)
    np.testing.assert_allclose(mean, norms.mean(), rtol=1e-5)
    assert mean <= rmse * (1 + 1e-5)


@each_error
def test_a_lost_input_shows_unless_it_does_not_count(data, error):
    estimates, targets, _ = data
    lost = np.arange(20) % 7 == np.zeros((3, 1))
    assert np.isnan(error(drop_rows(estimates, lost), targets))
    assert np.isfinite(error(drop_rows(estimates, lost), targets, where=~lost))
    assert np.isnan(error(estimates, targets, where=np.zeros((3, 20), bool)))


@each_error
def test_gradient_is_right_where_it_exists_and_never_nan(data, error):
    estimates, targets, _ = data
    where = np.arange(20) % 7 != np.zeros((3, 1))
    estimates = np.where(np.arange(20)[:, None] == 1, targets, estimates)  # exact: a kink
    gradient = np.asarray(jax.grad(error)(drop_rows(estimates, ~where), targets, where=where))
    difference = estimates - targets
    norms = np.linalg.norm(difference, axis=-1, keepdims=True)
    scale = (
        np.where(norms == 0, 1, norms) if error is metrics.mean_error_norm else error(estimates, targets, where=where)
    )
    expected = np.where(where[..., None], difference / scale / where.sum(), 0)
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-7)
    assert not np.asarray(jax.grad(error)(targets, targets)).any()


@each_error
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_computed_in_float32(error, dtype):
    # The squares overflow float16 and their sum drowns in bfloat16.
    estimates, targets = jnp.full((3, 1024), 300, dtype), jnp.zeros((3, 1024), dtype)
    with jax.numpy_dtype_promotion("strict"):
        value = error(estimates, targets)
    assert value.dtype == jnp.float32
    assert value == 300 * 32


@each_error
def test_float64_stays(data, error):
    estimates, targets, _ = data
    with jax.enable_x64(True):
        value = error(np.float64(1) + 1e-12 * np.ones((2, 1)), np.ones((2, 1)))
        mixed = error(estimates, np.float64(targets))
    assert value.dtype == mixed.dtype == np.float64
    np.testing.assert_allclose(value, 1e-12, rtol=1e-3)


# ---- classes -----------------------------------------------------------------------------------------------


def test_accuracy_is_scikit_learns(data):
    estimates, _, labels = data
    expected = accuracy_score(labels.ravel(), estimates.argmax(-1).ravel())
    np.testing.assert_allclose(metrics.accuracy(estimates, labels), expected, rtol=1e-6)


def test_relative_accuracy_is_a_ratio(data):
    estimates, targets, labels = data
    decoded, base = (accuracy_score(labels.ravel(), x.argmax(-1).ravel()) for x in (estimates, targets))
    np.testing.assert_allclose(metrics.relative_accuracy(estimates, targets, labels), decoded / base, rtol=1e-6)


def test_agreement_is_accuracy_against_the_base_model(data):
    estimates, targets, _ = data
    expected = accuracy_score(targets.argmax(-1).ravel(), estimates.argmax(-1).ravel())
    np.testing.assert_allclose(metrics.agreement(estimates, targets), expected, rtol=1e-6)


@pytest.mark.parametrize("label", range(3))
@pytest.mark.parametrize("row", [[np.nan] * 3, [1.0, np.nan, 0.0]], ids=["lost", "in part"])
def test_a_row_with_nan_is_never_right(row, label):
    right = np.eye(3)[label]
    outputs, labels = np.array([row, right]), np.array([label, label])
    assert metrics.accuracy(outputs, labels) == 0.5
    assert metrics.relative_accuracy(outputs, np.array([right, right]), labels) == 0.5
    assert metrics.agreement(outputs, np.array([right, right])) == 0.5
    assert metrics.agreement(np.array([right, right]), outputs) == 0.5
    assert metrics.agreement(outputs, outputs) == 0.5


def test_infinite_logits_are_predictions():
    assert metrics.accuracy(np.array([[-np.inf, 0.0], [np.inf, 0.0]]), np.array([1, 0])) == 1


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.int64])
@pytest.mark.parametrize("x64", [False, True])
def test_labels_of_any_integer_dtype(data, dtype, x64):
    estimates, _, labels = data
    with jax.enable_x64(x64), jax.numpy_dtype_promotion("strict"):
        np.testing.assert_allclose(
            metrics.accuracy(estimates, labels.astype(dtype)),
            (estimates.argmax(-1) == labels).mean(),
            rtol=1e-6,
        )


# ---- all ---------------------------------------------------------------------------------------------------

CALLS = {
    "rmse": lambda e, t, y: metrics.rmse(e, t),
    "mean_error_norm": lambda e, t, y: metrics.mean_error_norm(e, t, where=y.astype(bool)),
    "accuracy": lambda e, t, y: metrics.accuracy(e, y),
    "relative_accuracy": metrics.relative_accuracy,
    "agreement": lambda e, t, y: metrics.agreement(e, t),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_jit_and_vmap_agree_with_eager(data, call):
    np.testing.assert_allclose(jax.jit(call)(*data), call(*data), rtol=1e-6)
    each = [call(*(x[i] for x in data)) for i in range(3)]
    np.testing.assert_allclose(jax.vmap(call)(*data), each, rtol=1e-6)


@pytest.mark.parametrize("mode", STRICT_MODES)
@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_the_same_in_strict_modes(data, call, on_device, mode):
    data = jax.device_put(data) if on_device else data
    expected = np.asarray(call(*data))
    with STRICT_MODES[mode]():
        found = call(*data)
    np.testing.assert_array_equal(found, expected)


@each_error
@pytest.mark.parametrize("differentiate", [lambda f: f, jax.grad], ids=["value", "gradient"])
def test_inputs_that_do_not_count_are_no_nans_to_debug(data, error, differentiate):
    estimates, targets, _ = data
    lost = np.arange(20) % 7 == np.zeros((3, 1))
    with jax.debug_nans(True):
        found = differentiate(error)(drop_rows(estimates, lost), targets, where=~lost)
    assert np.isfinite(found).all()


def relative_accuracy_on_ones(estimates, targets):
    return metrics.relative_accuracy(estimates, targets, np.ones(len(estimates), int))


@pytest.mark.parametrize("call", [*ERRORS, metrics.agreement, relative_accuracy_on_ones])
@pytest.mark.parametrize("shape", [(4, 2), (3,), (2, 4, 3)])
def test_unlike_shapes_are_named(call, shape):
    # What would broadcast is refused too: an error measured against the wrong targets is silent.
    with pytest.raises(ValueError, match=r"targets has shape .*; expected") as error:
        call(np.ones((4, 3)), np.ones(shape))
    assert "(4, 3)" in str(error.value)
    assert str(shape) in str(error.value)


@each_error
def test_where_must_be_a_mask_over_inputs(unchecked, error):
    for bad in (np.ones((4, 3), bool), np.ones(3, bool), np.ones((), bool)):
        with pytest.raises(ValueError, match=r"where has shape \(.*\); expected \(4,\)"):
            error(np.ones((4, 3)), np.ones((4, 3)), where=bad)
    with pytest.raises(ValueError, match=r"where has dtype float.*; expected bool"):
        error(np.ones((4, 3)), np.ones((4, 3)), where=np.ones(4))


def test_labels_must_be_classes_of_the_inputs(unchecked):
    with pytest.raises(ValueError, match=r"labels has shape \(4, 3\); expected \(4,\)"):
        metrics.accuracy(np.eye(4, 3), np.eye(4, 3, dtype=int))
    with pytest.raises(ValueError, match=r"labels has dtype float.*; expected integer"):
        metrics.accuracy(np.eye(4, 3), np.ones(4))


ROWS = np.eye(4, 3, dtype=np.float32)
CALLS_OF_OUTPUTS = {
    "rmse": ("estimates", lambda bad: metrics.rmse(bad, ROWS)),
    "rmse-targets": ("targets", lambda bad: metrics.rmse(ROWS, bad)),
    "mean_error_norm": ("estimates", lambda bad: metrics.mean_error_norm(bad, ROWS)),
    "accuracy": ("logits", lambda bad: metrics.accuracy(bad, np.arange(4))),
    "relative_accuracy": ("targets", lambda bad: metrics.relative_accuracy(ROWS, bad, np.arange(4))),
    "agreement": ("estimates", lambda bad: metrics.agreement(bad, ROWS)),
}
BAD_OUTPUTS = {
    "bool": (ROWS > 0, "has dtype bool"),
    "complex": (ROWS + 1j, "has dtype complex"),
    "0-d": (np.float32(1), r"has shape \(\)"),
    "a float": (1.0, r"has shape \(\)"),
    "text": ("cat", "is 'cat'"),
    "a tree": ({"a": ROWS}, "is {'a'"),
}


@pytest.mark.parametrize("bad", BAD_OUTPUTS)
@pytest.mark.parametrize("call", CALLS_OF_OUTPUTS)
def test_outputs_that_are_no_rows_of_real_numbers_are_named(unchecked, call, bad):
    (name, run), (value, message) = CALLS_OF_OUTPUTS[call], BAD_OUTPUTS[bad]
    with pytest.raises(ValueError, match=rf"(?s){name} {message}.*; expected .+: "):
        run(value)
