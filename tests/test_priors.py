"""Coded models with a prior: what is lost is guessed, and copies go where guesses are worst."""

import cloudpickle
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcode as jc
from jaxcode import allocation, placement
from jaxcode.stragglers import Uniform

from .surrogates.cases import curve, line_surrogate

K, N = 5, 8
CODE = jc.ReplicationCode(K, N)
PRIOR = line_surrogate()
X = np.random.default_rng(0).normal(size=(3 * K - 1, 2)).astype(np.float32)
LATE = np.isin(np.arange(N), [1, 3, 6])
CODES = {
    "replication": CODE,
    "uncoded": jc.UncodedCode(K),
    "spline": jc.SplineCode.systematic(K, N),
    "berrut": jc.BerrutCode.chebyshev(K, N),
    "lagrange": jc.LagrangeCode.chebyshev(K, N),
    "kernel": jc.KernelCode(K, N),
    "kernel, copies": jc.KernelCode(K, N, mixes=False),
}


@pytest.mark.parametrize("name", ["replication", "uncoded"])
@pytest.mark.parametrize("allocates", [True, False])
def test_results_are_the_models_own_if_nobody_is_late(name, allocates):
    predict = jc.coded(curve, CODES[name], prior=PRIOR, stragglers=Uniform(1) if allocates else None)
    np.testing.assert_allclose(predict(X), jax.jit(curve)(X), rtol=1e-6)


@pytest.mark.parametrize("allocates", [True, False])
def test_lost_inputs_are_guessed_and_all_others_are_the_models_own(allocates):
    predict = jc.coded(curve, CODE, prior=PRIOR, stragglers=Uniform(3) if allocates else None)
    results, guesses, truth = (np.asarray(values) for values in (predict(X, ~LATE), PRIOR(X), jax.jit(curve)(X)))
    is_guess = np.isclose(results, guesses, rtol=1e-6).all(axis=1)
    is_own = np.isclose(results, truth, rtol=1e-6).all(axis=1)
    assert (is_guess | is_own).all()
    assert is_guess.any()
    assert is_own.sum() >= K


@pytest.mark.parametrize(
    ("name", "order"),
    [*((name, None) for name in CODES), ("replication", jc.ordering.greedy), ("spline", jc.ordering.greedy)],
)
def test_what_is_exact_is_told(name, order):
    """Whatever is said to be exact is; of copies and guesses, all that is not said to be exact is a guess."""
    code = CODES[name]
    returned = np.arange(code.num_workers) % 3 != 1
    stragglers = Uniform(2) if name == "replication" else None
    predict = jc.coded(curve, code, prior=PRIOR, stragglers=stragglers, order=order)
    exact = np.asarray(predict.exact(X, returned))
    assert exact.shape == (len(X),)
    results, truth, guesses = (np.asarray(values) for values in (predict(X, returned), curve(X), PRIOR(X)))
    np.testing.assert_allclose(results[exact], truth[exact], atol=1e-5)
    if name in ("replication", "uncoded"):
        assert 0 < exact.sum() < len(X)
        np.testing.assert_allclose(results[~exact], guesses[~exact], rtol=1e-6)
    assert predict.exact(X).all() or name in ("berrut", "lagrange")
    plain = jc.coded(curve, code, order=order)
    np.testing.assert_allclose(plain(X, returned)[plain.exact(X, returned)], truth[plain.exact(X, returned)], atol=1e-5)


def test_copies_go_to_the_riskiest_inputs():
    """Of one group: those of the largest first number, as the prior says."""
    x = X[:K]
    risk = np.asarray(PRIOR.with_risk(x)[1])
    plan = allocation.plan(CODE, x, prior=PRIOR, stragglers=Uniform(2))
    copies = np.bincount(plan.assignment, minlength=K)
    assert (np.diff(copies[np.argsort(risk)]) >= 0).all()
    assert np.ptp(copies) > 0
    results = CODE.decode(curve(CODE.encode(x, plan)), ~LATE, plan)
    coded = jc.coded(curve, CODE, prior=PRIOR, stragglers=Uniform(2))
    np.testing.assert_allclose(coded(x, ~LATE), results, rtol=1e-6)


def test_allocation_lowers_the_loss():
    """Of guesses whose error is what the prior says, over all sets of two late workers of eight."""
    x = jnp.asarray(np.random.default_rng(1).normal(size=(20 * K, 2)), jnp.float32)
    prior = line_surrogate()

    def model(x):
        return prior(x) + jnp.sqrt(prior.with_risk(x)[1])[:, None]

    masks = np.array([~np.isin(np.arange(N), [i, j]) for i in range(N) for j in range(i)])
    losses = []
    for stragglers in (None, Uniform(2)):
        predict = jc.coded(model, CODE, prior=prior, stragglers=stragglers)
        results = jax.jit(jax.vmap(predict, (None, 0)))(x, masks)
        losses.append(float(jnp.mean(jnp.square(results - model(x)))))
    assert losses[1] < 0.9 * losses[0]


@pytest.mark.parametrize("name", ["spline", "berrut", "lagrange"])
def test_what_a_prior_explains_is_not_decoded(name):
    """A prior that is right leaves nothing to decode, whoever returned."""
    right = line_surrogate()
    predict = jc.coded(right, CODES[name], prior=right)
    for returned in (~LATE, np.arange(N) == 2, np.zeros(N, bool)):
        np.testing.assert_allclose(predict(X, returned), right(X), rtol=1e-5, atol=1e-5)


def test_models_of_one_structure_share_a_program():
    predict = jc.coded(curve, CODE, prior=PRIOR, stragglers=Uniform(2))
    jitted = jax.jit(lambda predict, x, returned: predict(x, returned))
    for prior in (PRIOR, line_surrogate(slope=3.0)):
        for mask in (~LATE, LATE):
            jitted(jc.coded(curve, CODE, prior=prior, stragglers=Uniform(2)), X, mask)
    assert jitted._cache_size() == 1
    np.testing.assert_allclose(jitted(predict, X, ~LATE), predict(X, ~LATE), rtol=1e-6)


@pytest.mark.parametrize("place", ["shard_map", "pmap"])
@pytest.mark.parametrize("name", ["replication", "spline"])
def test_placements_agree(place, name):
    """Also on what a sequential test says of the workers."""
    mesh = jax.make_mesh((4,), ("workers",))
    where = {"shard_map": placement.shard_map(mesh), "pmap": placement.pmap(jax.devices()[:4])}[place]
    stragglers = Uniform(3) if name == "replication" else None
    defence = jc.robust.SequentialTest() if name == "replication" else None
    options = {"prior": PRIOR, "stragglers": stragglers, "defence": defence}
    expected = jc.coded(curve, CODES[name], **options).inspect(X, ~LATE)
    found = jc.coded(curve, CODES[name], **options, placement=where).inspect(X, ~LATE)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, expected)


@pytest.mark.parametrize("name", ["replication", "spline"])
def test_derivatives_pass_to_inputs_and_to_the_prior(name):
    with jax.enable_x64(True):
        stragglers = Uniform(3) if name == "replication" else None
        x = jnp.asarray(X[:K], jnp.float64)
        prior = line_surrogate(dtype=np.float64)
        predict = jc.coded(curve, CODES[name], prior=prior, stragglers=stragglers)

        def loss(predict, x):
            return jnp.sum(jnp.sin(predict(x, ~LATE)))

        slopes, x_slopes = jax.jit(jax.grad(loss, (0, 1)))(predict, x)
        weights = slopes.prior_planner.prior.predictor.weights
        assert jnp.all(jnp.isfinite(weights))
        # Where all but lines is decoded, which line is the prior hardly matters.
        assert name == "spline" or jnp.any(weights[:, :2] != 0)
        # The guesses are computed in float32, and that is how far differences resolve them.
        step, direction = 1e-3, np.cos(np.arange(x.size)).reshape(x.shape)
        difference = (loss(predict, x + step * direction) - loss(predict, x - step * direction)) / (2 * step)
        np.testing.assert_allclose(jnp.sum(x_slopes * direction), difference, rtol=1e-2, atol=1e-2)


def test_integer_tokens_need_no_mixing():
    tokens = np.random.default_rng(0).integers(50, size=(4 * K, 12))
    table = np.random.default_rng(1).normal(size=(50, 3)).astype(np.float32)

    def model(tokens):
        return jnp.asarray(table)[tokens].mean(axis=1)

    prior = jc.surrogate(model, np.concatenate([tokens] * 20), cost=1e3, progress=False)
    predict = jc.coded(model, CODE, prior=prior, stragglers=Uniform(2), loss="disagreement")
    np.testing.assert_allclose(predict(tokens), jax.jit(model)(tokens), rtol=1e-6)
    errors = np.asarray(predict(tokens, ~LATE)) - model(tokens)
    assert np.isfinite(errors).all()
    assert np.mean(errors**2) < 0.1 * np.var(model(tokens))


def test_coded_models_with_priors_are_pickled():
    predict = jc.coded(curve, CODE, prior=PRIOR, stragglers=Uniform(2))
    np.testing.assert_array_equal(cloudpickle.loads(cloudpickle.dumps(predict))(X, ~LATE), predict(X, ~LATE))


@pytest.mark.usefixtures("unchecked")
def test_arguments_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"stragglers is Uniform.* without a prior"):
        jc.coded(curve, CODE, stragglers=Uniform(1))
    with pytest.raises(ValueError, match="prior is given beside planner"):
        jc.coded(curve, CODE, prior=PRIOR, planner=lambda code, group: jc.Plan())
    with pytest.raises(ValueError, match="prior is <function curve"):
        jc.coded(curve, CODE, prior=curve)
    with pytest.raises(ValueError, match="stragglers is given for InterpolatingCode"):
        jc.coded(curve, CODES["spline"], prior=PRIOR, stragglers=Uniform(1))


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("name", ["replication", "spline"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_strict_modes(name, x64, dtype):
    stragglers = Uniform(3) if name == "replication" else None
    defence = jc.robust.SequentialTest() if name == "replication" else None
    options = {"prior": PRIOR, "stragglers": stragglers, "defence": defence}
    # The prior's own parameters are in float32.
    predict = jax.device_put(jc.coded(curve, CODES[name], **options))
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"), jax.enable_x64(x64):
        made = jc.coded(curve, CODES[name], **options)
        assert repr(made) == repr(predict)
        x, returned = jax.device_put((X.astype(dtype), ~LATE))
        with jax.transfer_guard("disallow"):
            results = predict(x, returned)
        truth = curve(x)
    assert results.dtype == truth.dtype
    np.testing.assert_allclose(results, predict(X, ~LATE), atol=0.02)
