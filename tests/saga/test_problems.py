"""Tests losses, parameters and samples of all kinds."""

import dataclasses
from collections import OrderedDict

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse
from flax.core import FrozenDict
from sklearn.linear_model import ElasticNet, LogisticRegression

from jaxcode import saga
from jaxcode.saga import DistributedSaga, SparseRows

from . import problems

KEY = jax.random.key(1)
COLUMNS = np.arange(20)[:, None] % 4


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def train(method, params, data, count):
    return method.run(method.init(params, data), KEY, count, every=count, progress=False)[0].params


@pytest.mark.parametrize("period", [40, 70])
def test_multinomial_with_bias_converges_to_the_optimum(period):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(150, 4))
    labels = np.argmax(x @ rng.normal(size=(4, 3)) + rng.normal(size=(150, 3)), axis=1)
    ridge = 0.05
    # Scikit-learn does not shrink its intercept: a column of ones does the same as our bias.
    ones = np.concatenate([x, np.ones((150, 1))], axis=1)
    reference = LogisticRegression(C=1 / (ridge * 150), fit_intercept=False, tol=1e-12, max_iter=5000).fit(ones, labels)
    method = DistributedSaga(saga.multinomial, 3, period, ridge)
    result = train(method, {"kernel": jnp.zeros((4, 3)), "bias": jnp.zeros(3)}, (x, labels), 20_000 // period)
    np.testing.assert_allclose(result["kernel"], reference.coef_[:, :4].T, atol=1e-6)
    np.testing.assert_allclose(result["bias"], reference.coef_[:, 4], atol=1e-6)


@pytest.mark.parametrize(
    ("batch_size", "period", "count", "settings"),
    [
        (1, 40, 12, {}),
        # Full blocks and a remainder, of dense and of sparse rows, in one fetch and in several.
        (1, 4200, 2, {}),
        # The factor of the last parameters in a step is zero, and negative.
        (1, 100, 3, {"ridge": 4.0, "step_size": 0.25}),
        (1, 100, 3, {"ridge": 4.0, "step_size": 0.35}),
        (1, 100, 3, {"ridge": 0.0, "correction": "frozen"}),
        (1, 100, 3, {"sampling": "lipschitz"}),
        (4, 7, 12, {}),
    ],
)
def test_sparse_rows_give_the_results_of_dense_rows(batch_size, period, count, settings):
    rng = np.random.default_rng(2)
    x = scipy.sparse.random_array((90, 12), density=0.2, rng=rng, format="csr")
    y = np.sign(rng.normal(size=90))
    sparse, dense = SparseRows.from_scipy(x), x.toarray()
    rows = np.zeros((90, 12))
    np.put_along_axis(rows, sparse.indices, 0, axis=1)
    np.add.at(rows, (np.arange(90)[:, None], sparse.indices), sparse.values)
    np.testing.assert_array_equal(rows, dense)
    method = DistributedSaga(saga.logistic, 3, period, batch_size=batch_size, **{"ridge": 0.1, **settings})
    # A loss that is not known to be linear computes one step after the other, from gradients.
    plain = dataclasses.replace(method, loss=lambda w, sample: saga.logistic(w, sample), sampling="uniform")
    with_bias = {"kernel": jnp.zeros(12), "bias": jnp.zeros(())}
    for params in (with_bias,) if settings else (with_bias, jnp.zeros(12)):
        results = [train(method, params, (part, y), count) for part in (sparse, dense)]
        if method.sampling == "uniform":
            step_size = method.init(params, (dense, y)).step_size
            results.append(train(dataclasses.replace(plain, step_size=step_size), params, (dense, y), count))
        for other in results[1:]:
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12), results[0], other)


@pytest.mark.parametrize("settings", [{}, {"ridge": 4.0, "step_size": 0.25}, {"correction": "frozen"}])
def test_wide_sparse_rows_give_the_results_of_dense_rows(settings):
    rng = np.random.default_rng(3)
    x = scipy.sparse.random_array((90, 600), density=0.004, rng=rng, format="csr")
    sparse, dense = SparseRows.from_scipy(x), x.toarray()
    assert sparse.num_columns > 64 * sparse.indices.shape[1]
    method = DistributedSaga(saga.multinomial, 3, 100, **{"ridge": 0.1, **settings})
    params = {"kernel": jnp.asarray(rng.normal(size=(600, 4))), "bias": jnp.zeros(4)}
    labels = rng.integers(0, 4, 90)
    result, expected = (train(method, params, (part, labels), 3) for part in (sparse, dense))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12), result, expected)


def test_the_proximal_operator_of_the_l1_norm():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(200, 10))
    y = x @ np.where(np.arange(10) < 3, 1.0, 0.0) + 0.1 * rng.normal(size=200)
    strength, ridge = 0.2, 0.1
    reference = ElasticNet(
        alpha=strength + ridge, l1_ratio=strength / (strength + ridge), fit_intercept=False, tol=1e-14, max_iter=100_000
    ).fit(x, y)
    method = DistributedSaga(saga.squared, 4, 25, ridge, prox=saga.soft_threshold(strength))
    result = np.asarray(train(method, jnp.zeros(10), (x, y), 1500))
    np.testing.assert_allclose(result, reference.coef_, atol=1e-8)
    assert (result[reference.coef_ == 0] == 0).all()


def test_any_tree_of_parameters_and_samples():
    rng = np.random.default_rng(4)
    data = {"x": rng.normal(size=(60, 3)), "y": rng.normal(size=60)}

    def loss(params, sample):
        hidden = jnp.tanh(sample["x"] @ params["in"]["kernel"] + params["in"]["bias"])
        return 0.5 * (hidden @ params["out"] - sample["y"]) ** 2

    params = {"in": {"kernel": 0.3 * jnp.ones((3, 2)), "bias": jnp.arange(2.0)}, "out": jnp.ones(2)}
    method = DistributedSaga(loss, 3, 20, 0.01, step_size=0.05)
    state = method.init(params, data)
    result = method.run(state, KEY, 1500, every=1500, progress=False)[0].params
    assert jax.tree.structure(result) == jax.tree.structure(params)
    gradient = jax.grad(lambda params: method.objective(params, state))(result)
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(gradient)) < 1e-8


@pytest.mark.parametrize(
    "loss", [saga.logistic, lambda w, s: jax.nn.softplus(-s[1] * (s[0] @ w))], ids=["slopes", "gradients"]
)
@pytest.mark.parametrize("batch_size", [1, 2])
def test_float32_parameters_stay_float32_with_x64(loss, batch_size):
    x, y = (part.astype(np.float32) for part in problems.classes(64, 4))
    method = DistributedSaga(loss, 4, 8, 0.1, step_size=0.4, batch_size=batch_size)
    state = method.init(jnp.zeros(4, jnp.float32), (x, y))
    state = method.run(state, KEY, 100, progress=False, every=100)[0]
    dtypes = {leaf.dtype for leaf in jax.tree.leaves((state.params, state.messages, state.local))}
    assert dtypes == {np.dtype(np.float32)}
    assert problems.distance(state.params, problems.logistic_optimum(x, y, 0.1)) < 1e-8


def test_sums_of_machines_do_not_drift_in_a_million_updates():
    """Float32, with steps too long to converge."""
    with jax.enable_x64(False):
        x, y = (part.astype(np.float32) for part in problems.classes(256, 4))
        method = DistributedSaga(saga.logistic, 8, 64, 1e-3, step_size=30.0)
        state = method.run(method.init(jnp.zeros(4), (x, y)), KEY, 2000, every=2000, progress=False)[0]
        slopes = np.asarray(state.local["table"], np.float64)
        assert np.abs(slopes).max() > 0.1  # it has not converged
        exact = np.einsum("km,kmd->kd", slopes, x.reshape(8, 32, 4).astype(np.float64))
        assert np.abs(np.asarray(state.messages, np.float64) - exact).max() < 1e-4


@pytest.mark.parametrize("dtype", [np.uint8, bool, np.float16, np.float64])
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_samples_of_any_dtype_give_the_same_results(dtype, sparse):
    """Pixels, counts and flags, whose products would overflow in their dtype."""
    x = np.random.default_rng(5).integers(0, 2 if dtype is bool else 256, (40, 6)).astype(dtype)
    y = np.where(np.arange(40) % 3 == 0, 1, -1)
    method = DistributedSaga(saga.logistic, 2, 33, 0.1)

    def params_from(dtype):
        rows = x.astype(dtype)
        if sparse:
            rows = SparseRows(np.tile(np.arange(6), (40, 1)), rows, 6)
        return train(method, jnp.zeros(6, jnp.float32), (rows, y), 5)

    narrow = params_from(dtype)
    assert narrow.dtype == jnp.float32
    np.testing.assert_array_equal(narrow, params_from(np.float32))


def test_settings_of_a_wider_dtype_do_not_widen_parameters():
    x, y = problems.classes(40, 3)
    params = jnp.zeros(3, jnp.bfloat16)
    for batch_size in (1, 2):
        method = DistributedSaga(saga.logistic, 2, 8, np.float64(0.1), step_size=np.float64(0.2), batch_size=batch_size)
        assert train(method, params, (x, y), 3).dtype == jnp.bfloat16
    method = saga.FederatedAveraging(saga.logistic, 2, 8, np.float64(0.1), decay=np.float64(0.2))
    assert train(method, params, (x, y), 3).dtype == jnp.bfloat16


@pytest.mark.parametrize("mapping", [dict, OrderedDict, FrozenDict])
def test_parameters_keep_their_order(mapping):
    x, y = problems.classes(40, 3)
    params = mapping([("kernel", jnp.arange(3.0)), ("bias", jnp.ones(()))])
    linear, plain = (
        train(DistributedSaga(loss, 2, 8, 0.1, step_size=0.2), params, (x, y), 3)
        for loss in (saga.logistic, lambda params, sample: saga.logistic(params, sample))
    )
    assert type(linear) is mapping
    for name in params:
        np.testing.assert_allclose(linear[name], plain[name], rtol=1e-10)


@pytest.mark.parametrize("sampling", ["uniform", "lipschitz"])
def test_machines_may_have_only_zeros(sampling):
    x, y = problems.classes(40, 3)
    for data in ((np.where(np.arange(40)[:, None] < 20, 0, x), y), (0 * x, y)):
        result = train(DistributedSaga(saga.logistic, 2, 8, sampling=sampling), jnp.zeros(3), data, 5)
        assert np.isfinite(result).all()


def test_duplicate_entries_are_added_up():
    x = scipy.sparse.csr_array((np.ones(20), np.zeros(20, int), [0, 20]), shape=(1, 2))
    rows = SparseRows.from_scipy(x)
    np.testing.assert_array_equal(rows.values, [[20.0]])
    assert x.nnz == 20


@pytest.mark.parametrize("loss", [saga.logistic, saga.multinomial, saga.squared])
def test_losses_can_be_pickled(loss):
    cloudpickle = pytest.importorskip("ray.cloudpickle")
    copy = cloudpickle.loads(cloudpickle.dumps(loss))
    margin, y = (jnp.arange(3.0), 1) if loss is saga.multinomial else (0.3, 1.0)
    np.testing.assert_array_equal(jax.grad(copy.margin_loss)(margin, y), jax.grad(loss.margin_loss)(margin, y))


def test_the_objective_is_that_of_all_samples():
    x, y = problems.classes(50, 4)
    method = DistributedSaga(saga.logistic, 7, 5, 0.1)
    w = jnp.arange(4.0)
    result = float(method.objective(w, method.init(jnp.zeros(4), (x, y))))
    assert result == pytest.approx(problems.logistic_objective(np.asarray(w), x, y, 0.1), rel=1e-12)


def test_settings_that_make_no_sense_are_refused(unchecked):
    x, y = problems.classes(20, 3)
    good = DistributedSaga(saga.logistic, 2, 5)
    state = good.init(jnp.zeros(3), (x, y))
    unknown = saga.LinearLoss(lambda margin, y: jnp.exp(-margin * y))
    for call, message in (
        (lambda: DistributedSaga(saga.logistic, 0, 5), "num_machines is 0"),
        (lambda: DistributedSaga(saga.logistic, 2, 0), "period is 0"),
        (lambda: DistributedSaga(saga.logistic, 2, 5, batch_size=0), "batch_size is 0"),
        (lambda: DistributedSaga(saga.logistic, 2, 5, -1.0), r"ridge is -1\.0"),
        (lambda: DistributedSaga(saga.logistic, 2, 5, step_size=0.0), r"step_size is 0\.0"),
        (lambda: DistributedSaga(saga.logistic, 2, 5, correction="none"), "expected one of 'anchored', 'own'"),
        (lambda: DistributedSaga(saga.logistic, 2, 5, sampling="often"), "expected 'uniform' or 'lipschitz'"),
        (lambda: DistributedSaga(unknown, 2, 5, sampling="lipschitz"), "no LinearLoss whose curvature is known"),
        (lambda: DistributedSaga("logistic", 2, 5), "loss is 'logistic'"),
        (lambda: saga.Scaffold(saga.logistic, 2, 5, decay=-1.0), "decay is"),
        (lambda: DistributedSaga(unknown, 2, 5).init(jnp.zeros(3), (x, y)), "step_size is None"),
        (lambda: good.init(jnp.zeros(3), (x, y[:5])), "of the same length"),
        (lambda: DistributedSaga(saga.logistic, 2, 5, np.ones(2)), "ridge is array"),
        (lambda: DistributedSaga(saga.logistic, 2, 5, prox=3.0), r"prox is 3\.0; expected a function"),
        (lambda: DistributedSaga(saga.logistic, 2, 5, mesh=3), "mesh is 3; expected"),
        (lambda: DistributedSaga(saga.logistic, 2, 5, shard_sizes=10), "shard_sizes is 10"),
        (lambda: DistributedSaga(saga.logistic, 2, 5, shard_sizes=[10.5, 9.5]), r"shard_sizes\[0\] is 10\.5"),
        (lambda: DistributedSaga(saga.logistic, 21, 5).init(jnp.zeros(3), (x, y)), "num_machines is 21 for 20 samples"),
        (lambda: good.init(jnp.zeros(3, int), (x, y)), "params has dtype int"),
        (lambda: good.init(jnp.zeros(4), (x, y)), r"x has shape \(20, 3\); expected \(n, 4\)"),
        (lambda: good.init(jnp.zeros(3), {"x": x, "y": y}), "data is a dict; expected a pair"),
        (lambda: good.init({"kernel": jnp.zeros(3)}, (x, y)), r"params has \['kernel'\]; expected"),
        (lambda: good.init({"kernel": jnp.zeros(3), "bias": jnp.zeros(2)}, (x, y)), r"params has shape \(\(3,\), \(2"),
        (lambda: good.init(jnp.zeros(3), (SparseRows(COLUMNS, np.ones((20, 1)), 3), y)), "x.indices is from 0 to 3"),
        (lambda: good.init(jnp.zeros(3), (SparseRows(COLUMNS + 0.5, np.ones((20, 1)), 3), y)), "x.indices has dtype"),
        (lambda: DistributedSaga(saga.logistic, 2, 5, shard_sizes=(3, 4)).init(jnp.zeros(3), (x, y)), "together all"),
        (lambda: good.round(state, KEY, jnp.ones(3, bool)), "returned has shape"),
        (lambda: good.run(state, KEY, -1), "num_rounds is -1"),
        (lambda: good.run(state, KEY, 5, every=0), "every is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
