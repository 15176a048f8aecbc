"""Tests that parameters, samples and labels that make no sense are refused, and that sparse samples are accepted."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse
from jax.experimental import sparse

from jaxcode import saga
from jaxcode.saga import DistributedSaga

from . import problems

X, Y = problems.classes(24, 3)
CLASSES = np.arange(24) % 3
KINDS = [DistributedSaga, saga.FederatedAveraging, saga.MinibatchSgd, saga.Scaffold]
KERNELS = {saga.logistic: np.zeros(3), saga.squared: np.zeros(3), saga.multinomial: np.zeros((3, 3))}
IDS = {saga.logistic: "logistic", saga.squared: "squared", saga.multinomial: "multinomial"}


def generic(w, sample):
    x, y = sample
    return jax.nn.softplus(-y * (x @ w))


def init(loss, y, x=X, params=None, kind=DistributedSaga, **settings):
    params = KERNELS[loss] if params is None else params
    return kind(loss, 2, 5, 0.1, **settings).init(params, (x, y))


def with_nan(array, value=np.nan):
    array = np.array(array, np.float32)
    array.flat[4] = value
    return array


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("loss", "y", "message"),
    [
        (saga.logistic, (Y > 0).astype(int), r"y has the values 0, 1; expected -1 and 1"),
        (saga.logistic, (Y > 0).astype(float), r"y has the values 0.0, 1.0; expected -1 and 1"),
        (saga.logistic, CLASSES, r"y has the values 0, 1, 2; expected -1 and 1"),
        (saga.logistic, 0.5 * Y, r"y has the values -0.5, 0.5; expected -1 and 1"),
        (saga.logistic, Y.astype(np.int8).astype(np.uint8), r"y has dtype uint8, which has no -1; expected -1 and 1"),
        (saga.logistic, Y > 0, r"y has dtype bool, which has no -1; expected -1 and 1"),
        (saga.logistic, with_nan(Y), r"y has the values -1.0, 1.0, nan; expected -1 and 1"),
        (saga.logistic, Y[:, None], r"y has shape \(24, 1\); expected -1 and 1, .*, shape \(n,\): y.ravel\(\)"),
        (saga.logistic, np.where(Y > 0, "spam", "ham"), r"y has dtype <U4; expected -1 and 1"),
        (saga.logistic, 1.0, r"y has shape \(\); expected -1 and 1"),
        (saga.logistic, Y[:7], r"y has shape \(7,\); expected \(24, \.\.\.\), of the same length as x"),
        (saga.multinomial, CLASSES + 1, r"y has the values 1, 2, 3; expected .* from 0 to 2"),
        (saga.multinomial, CLASSES - 1, r"y has the values -1, 0, 1; expected .* from 0 to 2"),
        (saga.multinomial, CLASSES.astype(float), r"y has dtype float64; expected .*y.astype\(int\)"),
        (saga.multinomial, CLASSES > 0, r"y has dtype bool; expected the class of each sample"),
        (saga.multinomial, np.eye(3)[CLASSES], r"y has shape \(24, 3\); expected the class of each sample"),
        (saga.squared, with_nan(Y), r"y\[4\] is nan; expected finite numbers"),
        (saga.squared, with_nan(Y, np.inf), r"y\[4\] is inf; expected finite numbers"),
        (saga.squared, Y > 0, r"y has dtype bool; expected a finite real number"),
        (saga.squared, Y[:, None], r"y has shape \(24, 1\); expected a finite real number .*y.ravel\(\)"),
    ],
)
@pytest.mark.parametrize("convert", [np.asarray, lambda y: y if np.asarray(y).dtype.kind == "U" else jnp.asarray(y)])
def test_labels_of_another_problem_are_refused(kind, loss, y, message, convert):
    if convert is not np.asarray:
        message = message.replace("float64", r"float\d\d")
    with pytest.raises(ValueError, match=message):
        init(loss, convert(y), kind=kind)


@pytest.mark.parametrize("loss", [saga.LinearLoss(lambda m, y: 0.5 * (m - y) ** 2, 1.0), generic])
def test_labels_of_any_loss_must_give_one_number(loss, unchecked):
    params = np.zeros(3)
    with pytest.raises(ValueError, match=r"loss gives float32\[1\] for one sample .*such as that of y, \(n,\)"):
        init(loss, Y[:, None], params=params, step_size=0.1)
    with pytest.raises(ValueError, match=r"\[4\] is nan; expected finite numbers"):
        init(loss, with_nan(Y), params=params, step_size=0.1)


def test_labels_are_accepted_in_every_dtype_that_has_them():
    """The first state is that of int32 labels; traced labels are not refused."""
    for loss, y, dtypes in (
        (saga.logistic, Y, (np.int8, np.int64, np.float16, np.float64, jnp.bfloat16, list)),
        (saga.multinomial, CLASSES, (np.uint8, np.int64, list)),
        (saga.squared, CLASSES, (np.uint8, np.int32, np.float64, list)),
    ):
        expected = init(loss, y.astype(np.int32))
        for dtype in dtypes:
            state = init(loss, y.tolist() if dtype is list else y.astype(dtype))
            chex.assert_trees_all_equal(state, expected)
        traced = jax.jit(lambda y, loss=loss: init(loss, y).message_sum)(y.astype(np.int32))
        np.testing.assert_allclose(traced, expected.message_sum, rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (with_nan(X), r"x\[1, 1\] is nan; expected finite numbers"),
        (with_nan(X, -np.inf), r"x\[1, 1\] is -inf; expected finite numbers"),
        (jnp.asarray(with_nan(X)), r"x\[1, 1\] is nan; expected finite numbers"),
        (1e300 * X, r"x\[0, 0\] is -?inf; expected finite numbers"),
        (scipy.sparse.csr_array(with_nan(X)), r"x.values\[1, 1\] is nan; expected finite numbers"),
        (X + 1j, r"x has dtype complex128; expected real numbers"),
        (X.astype(str), r"x has dtype <U\d+; expected real numbers"),
        (X[:, 0], r"x has shape \(24,\); expected \(n, 3\)"),
        (scipy.sparse.csr_array(X[:, :2]), r"x has shape \(24, 2\); expected \(n, 3\)"),
        (sparse.BCOO.fromdense(X[0]), r"x is a BCOO of shape \(3,\) .*; expected a matrix"),
        (sparse.BCOO.fromdense(X, n_dense=1), r"x is a BCOO .*n_dense=1; expected a matrix"),
        (sparse.COO.fromdense(jnp.asarray(X)), r"x is a COO .*; expected a BCOO or BCSR"),
    ],
)
def test_rows_that_make_no_sense_are_refused(kind, x, message):
    with pytest.raises(ValueError, match=message):
        init(saga.logistic, Y, x, kind=kind)


def test_sparse_rows_of_two_shapes_are_refused(unchecked):
    rows = saga.SparseRows(np.zeros((24, 2), int), np.ones((24, 1)), 3)
    with pytest.raises(ValueError, match=r"x.indices has shape \(24, 2\); expected \(24, 1\)"):
        init(saga.logistic, Y, rows)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "convert",
    [
        scipy.sparse.csr_matrix,
        scipy.sparse.csc_array,
        scipy.sparse.coo_array,
        scipy.sparse.lil_array,
        sparse.BCOO.fromdense,
        lambda x: sparse.BCOO.fromdense(x, nse=60),
        lambda x: sparse.BCOO.fromdense(x, n_batch=1),
        sparse.BCSR.fromdense,
        lambda x: sparse.BCOO.from_scipy_sparse(scipy.sparse.csr_array(x)),
    ],
    ids=["csr", "csc", "coo", "lil", "BCOO", "padded BCOO", "batched BCOO", "BCSR", "BCOO of SciPy"],
)
def test_sparse_arrays_are_accepted(kind, convert):
    x = np.where(np.abs(X) > 0.5, X, 0).astype(np.float32)
    dense, state = init(saga.logistic, Y, x, kind=kind), init(saga.logistic, Y, convert(x), kind=kind)
    rows = state.data.samples[0]
    assert isinstance(rows, saga.SparseRows)
    assert rows.num_columns == 3
    np.testing.assert_allclose(state.step_size, dense.step_size, rtol=1e-6)
    key, method = jax.random.key(0), kind(saga.logistic, 2, 5, 0.1)
    np.testing.assert_allclose(method.round(state, key).params, method.round(dense, key).params, rtol=1e-4, atol=1e-6)


def test_a_traced_bcoo_is_refused():
    with pytest.raises(ValueError, match="x is a traced BCOO; expected SparseRows under jit"):
        jax.jit(lambda x: init(saga.logistic, Y, x).params)(sparse.BCOO.fromdense(X))


@pytest.mark.parametrize("convert", [scipy.sparse.csr_array, sparse.BCOO.fromdense])
def test_sparse_arrays_are_refused_for_losses_that_are_not_linear(convert):
    with pytest.raises(
        ValueError, match=r"data\[0\] is a sparse .*; expected dense arrays unless loss is a LinearLoss"
    ):
        init(generic, Y, convert(X), params=np.zeros(3), step_size=0.1)


@pytest.mark.parametrize("loss", [saga.logistic, generic])
@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({}, r"params is \{\}; expected at least one number"),
        (None, r"params is None; expected at least one number"),
        (np.zeros(0), r"params is array\(\[\].*\); expected at least one number"),
        ({"w": np.zeros((0, 3))}, r"expected at least one number"),
        (np.zeros(3, int), r"params has dtype int64; expected real numbers in floating point"),
        (3, r"params has dtype int64; expected real numbers in floating point"),
        ({"kernel": True}, r"params\['kernel'\] has dtype bool; expected real numbers"),
        (np.zeros(3, complex), r"params has dtype complex128; expected real numbers"),
        ("zeros", r"params has dtype <U5; expected real numbers"),
        (with_nan(np.zeros(5)), r"params\[4\] is nan; expected finite numbers"),
    ],
)
def test_parameters_that_make_no_sense_are_refused(loss, params, message):
    with pytest.raises(ValueError, match=message):
        DistributedSaga(loss, 2, 5, step_size=0.1).init(params, (X, Y))


@pytest.mark.parametrize(
    ("loss", "params", "message"),
    [
        (saga.logistic, 0.0, r"params has shape \(\); expected \(d,\)"),
        (saga.logistic, [0.0, 0.0, 0.0], r"params is a list; expected an array, or a 'kernel' and a 'bias'"),
        (saga.logistic, np.zeros((3, 2)), r"params has a kernel of shape \(d, classes\); expected \(d,\)"),
        (saga.squared, np.zeros((3, 2)), r"params has a kernel of shape \(d, classes\); expected \(d,\)"),
        (saga.multinomial, np.zeros(3), r"params has a kernel of shape \(d,\); expected \(d, classes\)"),
        (saga.logistic, {"kernel": np.zeros(3)}, r"params has \['kernel'\]; expected"),
    ],
)
def test_parameters_of_another_model_are_refused(loss, params, message):
    with pytest.raises(ValueError, match=message):
        init(loss, Y if loss is not saga.multinomial else CLASSES, params=params)


@pytest.mark.parametrize("x64", [False, True], ids=["float32", "float64"])
def test_python_numbers_are_parameters(x64):
    """Of the default dtype, and not of the weak one that Python's numbers have."""
    with jax.enable_x64(x64):

        def loss(params, sample):
            x, y = sample
            return 0.5 * (params["slope"] * x[0] + params["offset"][0] - y) ** 2

        method = DistributedSaga(loss, 2, 8, step_size=0.1)
        state = method.init({"slope": 0.0, "offset": [0.5]}, (X, Y))
        state, _ = method.run(state, jax.random.key(0), 2, progress=False)
        for leaf in jax.tree.leaves(state.params):
            assert leaf.dtype == (np.float64 if x64 else np.float32)
            assert not leaf.weak_type


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ((X.astype(object), Y), r"data\[0\] has dtype object; expected numbers"),
        ({"x": X, "y": np.where(Y > 0, "spam", "ham")}, r"data\['y'\] has dtype <U4; expected numbers"),
        ({"x": with_nan(X)}, r"data\['x'\]\[1, 1\] is nan; expected finite numbers"),
        ((), r"data is \(\); expected at least one array"),
        ((X, Y[:5]), "of the same length"),
    ],
)
def test_samples_of_any_loss_are_checked(data, message):
    with pytest.raises(ValueError, match=message):
        DistributedSaga(lambda w, sample: jnp.sum(w), 2, 5, step_size=0.1).init(np.zeros(3), data)


@pytest.mark.parametrize("params", [{}, None, np.zeros(0, np.float32)])
def test_the_transformation_needs_parameters(params):
    with pytest.raises(ValueError, match=r"expected at least one number"):
        saga.scale_by_saga(3).init(params)
