"""Side inputs: parts of inputs, such as masks and lengths, that no code mixes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxcode as jc
from jaxcode import stop
from jaxcode.pools import ThreadPool

K, N = 5, 8
LATE = np.isin(np.arange(N), [0, 5])
CODES = {
    "systematic": jc.SplineCode.systematic(K, N),
    "repeated": jc.SplineCode.repeated(K, N),
    "berrut": jc.BerrutCode.systematic(K, N),
    "replication": jc.ReplicationCode(K, N),
    "kernel": jc.KernelCode(K, N),
}
EMBEDDED = np.random.default_rng(0).normal(size=(4 * K, 3, 4)).astype(np.float32)
MASK = np.arange(12 * K).reshape(4 * K, 3) % 4 != 1
LENGTH = (np.arange(4 * K) % 7).astype(np.int32)
X = {"embedded": EMBEDDED, "mask": jc.SideInput(MASK), "length": jc.SideInput(LENGTH)}


def model(x):
    assert x["mask"].dtype == bool
    assert x["length"].dtype == jnp.int32
    return jnp.tanh(jnp.where(x["mask"][..., None], x["embedded"], 0)).sum(axis=1) + x["length"][:, None]


TRUTH = np.asarray(model(jax.tree.map(jnp.asarray, {"embedded": EMBEDDED, "mask": MASK, "length": LENGTH})))


@pytest.mark.parametrize("order", [None, jc.ordering.greedy], ids=["unordered", "ordered"])
@pytest.mark.parametrize("name", CODES)
def test_inputs_that_workers_compute_themselves_have_their_own_side_inputs(name, order):
    predict = jc.coded(model, CODES[name], order=order)
    for returned in (np.ones(N, bool), ~LATE):
        exact = np.asarray(predict.exact(X, returned))
        np.testing.assert_allclose(np.asarray(predict(X, returned))[exact], TRUTH[exact], atol=1e-5)
    assert exact.any()


def test_a_mixture_has_those_of_the_input_that_weighs_most():
    code = jc.SplineCode.chebyshev(K, N)
    group = jax.tree.map(lambda leaf: leaf[:K], X)
    coded = code.encode(group)
    heaviest = np.abs(np.asarray(code.encoder_matrix())).argmax(axis=1)
    np.testing.assert_array_equal(coded["mask"].values, MASK[heaviest])
    np.testing.assert_array_equal(coded["length"].values, LENGTH[heaviest])
    assert coded["length"].values.dtype == np.int32
    assert len(set(heaviest)) > 2


class Network(nnx.Module):
    def __init__(self, rngs):
        self.out = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x, scale):
        return scale * self.out(model(x))


def test_modules_priors_servers_and_tuning_take_them():
    network = Network(nnx.Rngs(0))

    def f(x):
        return network(jax.tree.map(jnp.asarray, x), 2.0)

    truth = f({"embedded": EMBEDDED, "mask": MASK, "length": LENGTH})
    partial = functools.partial(network, scale=2.0)
    for code in (CODES["systematic"], CODES["replication"]):
        np.testing.assert_allclose(jc.coded(partial, code)(X), truth, rtol=1e-5, atol=1e-5)
    many = jax.tree.map(lambda leaf: np.concatenate([leaf] * 10), X)
    prior = jc.surrogate(partial, many, cost=1e3, progress=False)
    returned = np.arange(N) != 0
    filled = jc.coded(partial, CODES["replication"], prior=prior)(X, returned)
    assert np.isfinite(filled).all()
    tuned = jc.tune(
        partial,
        X,
        num_data=K,
        num_workers=N,
        stragglers=jc.stragglers.Uniform(2),
        layouts={name: CODES[name] for name in ("repeated", "kernel")},
        orders={"as given": None},
        progress=False,
    )
    np.testing.assert_allclose(tuned.coded(partial)(X), truth, rtol=1e-4, atol=1e-4)
    with ThreadPool(partial, N) as pool:
        server = jc.CodedServer(CODES["systematic"], pool, stop.answers(N))
        server.warm_up(X)
        np.testing.assert_allclose(server(X).values, truth, rtol=1e-5, atol=1e-5)


def test_derivatives_pass_to_what_is_coded():
    predict = jc.coded(model, CODES["systematic"])

    def loss(embedded):
        return jnp.sum(jnp.square(predict({**X, "embedded": embedded}, ~LATE)))

    slopes = jax.jit(jax.grad(loss))(jnp.asarray(EMBEDDED))
    assert jnp.isfinite(slopes).all()
    assert jnp.any(slopes != 0)


@pytest.mark.parametrize("name", ["systematic", "kernel"])
def test_the_error_of_what_cannot_be_mixed_says_how_to_mark_it(name):
    with pytest.raises(ValueError, match=r"\['mask'\] has dtype bool.*jaxcode\.SideInput"):
        jc.coded(model, CODES[name])({**X, "mask": MASK})
    if name == "systematic":
        with pytest.raises(ValueError, match=r"\['length'\] has dtype int32.*jaxcode\.SideInput"):
            jc.coded(model, CODES[name])({**X, "length": LENGTH})
