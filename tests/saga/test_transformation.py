"""Tests SAGA as a transformation of optax."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxcode import saga

from . import problems

N, D = 60, 4
X, Y = problems.classes(N, D)


def loss(params, x, y):
    return jax.nn.softplus(-y * (x @ params["w"] + params["b"])) + 0.05 * (params["w"] @ params["w"] + params["b"] ** 2)


def begin():
    return {"w": jnp.zeros(D), "b": jnp.zeros(())}


def train(optimizer, steps, batch=None, seed=0):
    """Trains by stochastic steps as a user would write them."""
    x, y = jnp.asarray(X), jnp.asarray(Y)

    def step(carry, index):
        params, state = carry
        gradient = jax.grad(loss) if batch is None else jax.vmap(jax.grad(loss), (None, 0, 0))
        updates, state = optimizer.update(gradient(params, x[index], y[index]), state, params, index=index)
        return (optax.apply_updates(params, updates), state), None

    shape = (steps,) if batch is None else (steps, batch)
    index = jax.random.randint(jax.random.key(seed), shape, 0, N)
    params = begin()
    return jax.jit(lambda carry: jax.lax.scan(step, carry, index)[0])((params, optimizer.init(params)))


def test_estimates_are_those_of_the_paper():
    rng = np.random.default_rng(0)
    transformation = saga.scale_by_saga(5)
    table, state = np.zeros((5, 3)), transformation.init(jnp.zeros(3))
    for _ in range(30):
        j, gradient = int(rng.integers(5)), rng.normal(size=3).astype(np.float32)
        expected = gradient - table[j] + table.mean(0)
        estimate, state = transformation.update(gradient, state, index=j)
        table[j] = gradient
        np.testing.assert_allclose(estimate, expected, atol=1e-6)
        np.testing.assert_allclose(state.table, table, atol=1e-7)


@pytest.mark.parametrize("batch", [None, 1, 8])
def test_saga_converges_where_sgd_does_not(batch):
    with jax.enable_x64(True):
        ones = np.concatenate([X, np.ones((N, 1))], axis=1)
        optimum = problems.logistic_optimum(ones, Y, 0.1)
        params, _ = train(saga.saga(0.5, N), 6000, batch)
        assert problems.distance(np.append(params["w"], params["b"]), optimum) < 1e-14
        if batch is None:
            params, _ = train(optax.with_extra_args_support(optax.sgd(0.5)), 6000)
            assert problems.distance(np.append(params["w"], params["b"]), optimum) > 1e-4


def test_a_sample_drawn_twice_in_a_minibatch_is_one_entry_of_the_table():
    transformation = saga.scale_by_saga(3)
    state = transformation.init(jnp.zeros(2))
    gradients = jnp.array([[1.0, 2.0], [1.0, 2.0], [5.0, 5.0]])
    estimate, state = transformation.update(gradients, state, index=jnp.array([2, 2, 0]))
    np.testing.assert_allclose(estimate, gradients.mean(0))
    np.testing.assert_allclose(state.total, [6.0, 7.0])
    np.testing.assert_allclose(state.table, [[5, 5], [0, 0], [1, 2]])


def test_with_schedules_clipping_masks_and_flax():
    steps = 3000
    schedule = optax.join_schedules([optax.constant_schedule(0.5), optax.constant_schedule(0.25)], [1500])
    params, _ = train(optax.chain(optax.clip_by_global_norm(10.0), saga.saga(schedule, N)), steps)
    expected, _ = train(saga.saga(0.5, N), 6000)
    np.testing.assert_allclose(params["w"], expected["w"], atol=1e-5)
    # SAGA applies to w only; b stays zero.
    parts = optax.partition({"saga": saga.saga(0.5, N), "none": optax.set_to_zero()}, {"w": "saga", "b": "none"})
    params, _ = train(parts, 500)
    assert params["b"] == 0
    assert params["w"].any()
    masked, _ = train(optax.masked(saga.saga(0.5, N), {"w": True, "b": False}), 1)
    assert masked["w"].any()

    model = nnx.Linear(D, 1, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, saga.saga(0.5, N), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, index):
        def of_sample(model):
            return jax.nn.softplus(-jnp.asarray(Y)[index] * model(jnp.asarray(X)[index])[0])

        value, gradient = nnx.value_and_grad(of_sample)(model)
        optimizer.update(model, gradient, index=index)
        return value

    for index in np.random.default_rng(0).integers(N, size=300):
        step(model, optimizer, int(index))
    correct = np.sign(np.asarray(model(jnp.asarray(X)))[:, 0]) == Y
    assert correct.mean() > 0.85


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_a_narrow_table_keeps_the_mean_accurate(dtype):
    optimizer = saga.saga(0.5, N, table_dtype=dtype)
    params, state = train(optimizer, 4000)
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(state[0].table))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves((state[0].total, params)))
    for total, table in zip(jax.tree.leaves(state[0].total), jax.tree.leaves(state[0].table), strict=True):
        np.testing.assert_allclose(total, np.sum(np.asarray(table, np.float64), axis=0), rtol=1e-5, atol=1e-5)
    expected, _ = train(saga.saga(0.5, N), 4000)
    np.testing.assert_allclose(params["w"], expected["w"], atol=0.05)


def test_sums_do_not_drift_in_a_million_updates():
    """A plain sum drifts where gradients never converge, as with augmented data."""
    n, steps = 100, 1_000_000
    transformation = saga.scale_by_saga(n)

    @jax.jit
    def run(state, key):
        def step(t, carry):
            state, plain = carry
            index = t % n
            gradient = 1 + jax.random.normal(jax.random.fold_in(key, t), (2,))
            plain = plain + (gradient - state.table[index])
            return transformation.update(gradient, state, index=index)[1], plain

        return jax.lax.fori_loop(0, steps, step, (state, state.total))

    state, plain = run(transformation.init(jnp.zeros(2)), jax.random.key(0))
    exact = np.sum(np.asarray(state.table, np.float64), axis=0)
    drift = np.abs(np.asarray(state.total, np.float64) + np.asarray(state.compensation, np.float64) - exact).max()
    assert drift < 1e-8
    assert np.abs(np.asarray(plain, np.float64) - exact).max() > 1e-4


@pytest.mark.parametrize("batch", [(), (4,)], ids=["one", "minibatch"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sums_are_those_of_the_table(dtype, batch):
    n = 100
    transformation = saga.scale_by_saga(n)

    @jax.jit
    def run(state, key):
        def step(t, state):
            index = jax.random.randint(jax.random.fold_in(key, t), batch, 0, n)
            gradients = 1 + jax.random.normal(jax.random.fold_in(key, t), (n, 2), dtype)
            return transformation.update(gradients[index], state, index=index)[1]

        return jax.lax.fori_loop(0, 20_000, step, state)

    state = run(transformation.init(jnp.zeros(2, dtype)), jax.random.key(0))
    assert state.table.dtype == dtype
    exact = np.sum(np.asarray(state.table, np.float64), axis=0)
    np.testing.assert_allclose(np.asarray(state.total, np.float64) + np.asarray(state.compensation), exact, atol=1e-4)


def test_state_can_be_donated():
    transformation = saga.scale_by_saga(2)
    update = jax.jit(lambda g, state: transformation.update(g, state, index=0)[1], donate_argnums=1)
    state = update(jnp.ones(3), transformation.init(jnp.zeros(3)))
    np.testing.assert_array_equal(state.table, [[1, 1, 1], [0, 0, 0]])


def test_arguments_that_make_no_sense_are_refused(unchecked):
    transformation = saga.scale_by_saga(3)
    state = transformation.init({"w": jnp.zeros(2)})
    for call, message in (
        (lambda: saga.scale_by_saga(0), "num_samples is 0"),
        (lambda: saga.scale_by_saga(3, table_dtype=int), "table_dtype is <class 'int'>"),
        (lambda: transformation.update({}, state, index=0), r"updates are a tree .* expected .*'w'"),
        (lambda: transformation.update({"w": jnp.zeros(2)}, state, index=0.5), "expected the number of one sample"),
        (lambda: transformation.update({"w": jnp.zeros(2)}, state, index=3), "index is 3; expected .* from 0 to 2"),
        (lambda: transformation.update({"w": jnp.zeros((2, 2))}, state, index=[0, -1]), "from 0 to 2"),
        (lambda: transformation.update({"w": jnp.zeros((0, 2))}, state, index=np.zeros(0, int)), "at least one"),
        (lambda: transformation.update({"w": jnp.zeros(3)}, state, index=0), r"updates\['w'\] has shape \(3,\)"),
        (lambda: transformation.update({"w": jnp.zeros(2)}, state, index=np.array([0, 1])), "a gradient for each"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="index"):
        transformation.update({"w": jnp.zeros(2)}, state)
