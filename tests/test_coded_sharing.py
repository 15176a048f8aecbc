"""What coded models share and where they go: traces are counted; they are pytrees, pickled, copied, differentiated."""

import copy
import functools
import pickle
import subprocess
import sys

import cloudpickle
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import jaxcode as jc
from jaxcode import checks, ordering, outputs, pipeline, placement, robust

from .codes.nearest_code import NearestCode

K, N = 4, 9
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(6, 3)), jnp.float32)
MASKS = [np.arange(N) != lost for lost in range(N)]
locate = functools.partial(robust.error_locator, num_faulty=1)
traces = []


class Network(nnx.Module):
    """A model that counts how often it is traced."""

    def __init__(self, rngs):
        self.hidden = nnx.Linear(3, 5, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.out = nnx.Linear(5, 2, rngs=rngs)

    def __call__(self, x):
        traces.append(x.shape)
        return self.out(self.dropout(jnp.tanh(self.hidden(x))))


class LinenNetwork(linen.Module):
    @linen.compact
    def __call__(self, x):
        traces.append(x.shape)
        return linen.Dense(2)(jnp.tanh(linen.Dense(5)(x)))


def spline(decoder_smoothing=1e-3):
    return jc.SplineCode.systematic(K, N, decoder_smoothing=decoder_smoothing)


def traced_times(call):
    """How often models are traced by a call."""
    before = len(traces)
    jax.block_until_ready(call())
    return len(traces) - before


def prior_of_zero(code, group):
    return jc.Plan(prior=jc.Prior(jnp.zeros((code.num_workers, 2)), jnp.zeros((code.num_data, 2))))


OPTIONS = {
    "plain": dict,
    "ordered": lambda: {"order": ordering.greedy},
    "leave one out": lambda: {"defence": robust.leave_one_out},
    "error locator": lambda: {"defence": locate},
    "finite, of probabilities": lambda: {"defence": robust.only_finite, "output": outputs.probabilities},
    "planned": lambda: {"planner": prior_of_zero},
    "shard_map": lambda: {"placement": placement.shard_map(jax.make_mesh((8,), ("workers",)))},
    "pmap": lambda: {"placement": placement.pmap()},
}
each_option = pytest.mark.parametrize("option", OPTIONS)


# ---- traces ------------------------------------------------------------------------------------------------


@each_option
def test_masks_codes_and_options_made_anew_trace_nothing(option):
    """Everything that `coded` takes is made again at each call, as a program does that calls it in a loop."""
    model = Network(nnx.Rngs(0))

    def call(returned):
        return jc.coded(model, spline(), **OPTIONS[option]())(X, returned)

    call(MASKS[0])
    for returned in MASKS[1:4]:
        assert traced_times(lambda returned=returned: call(returned)) == 0
        assert traced_times(lambda returned=returned: call(jnp.asarray(returned))) == 0


@each_option
def test_a_training_step_traces_nothing(option):
    model = Network(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    model.eval()
    before = jc.coded(model, spline(), **OPTIONS[option]())(X, MASKS[0])
    model.train()
    gradient = nnx.grad(lambda model: jnp.sum(model(X) ** 2))(model)
    optimizer.update(model, gradient)
    after = []
    assert traced_times(lambda: after.append(jc.coded(model, spline(), **OPTIONS[option]())(X, MASKS[0]))) == 0
    assert not np.allclose(before, after[0])


def test_new_variables_of_a_linen_module_trace_nothing():
    variables = [LinenNetwork().init(jax.random.key(seed), X) for seed in range(2)]
    results = []
    counts = [
        traced_times(lambda v=v: results.append(jc.coded((LinenNetwork(), v), spline())(X, MASKS[0])))
        for v in variables
    ]
    assert counts == [1, 0]
    assert not np.allclose(*results)


def test_other_codes_are_traced():
    model = Network(nnx.Rngs(0))
    others = [
        spline(5e-3),
        spline(2e-3),
        jc.SplineCode.chebyshev(K, N),
        jc.BerrutCode.systematic(K, N),
        NearestCode(K, N),
    ]
    assert [traced_times(lambda c=c: jc.coded(model, c)(X, MASKS[0])) for c in others] == [1] * len(others)


def test_a_mask_on_an_accelerator_is_not_fetched(monkeypatch):
    """The second device plays an accelerator: its masks go into the program, are never read, and retrace nothing."""
    accelerator = jax.devices()[1]
    in_host_memory = checks._in_host_memory

    def excludes_accelerator(leaf):
        return in_host_memory(leaf) and not (isinstance(leaf, jax.Array) and leaf.devices() == {accelerator})

    monkeypatch.setattr(checks, "_in_host_memory", excludes_accelerator)
    model, code = Network(nnx.Rngs(0)), spline()
    predict = jax.device_put(jc.coded(model, code), accelerator)
    x = jax.device_put(X, accelerator)
    calls = []
    expected = [jc.coded(model, code)(X, returned) for returned in MASKS[:3]]
    prepared = pipeline._prepare_decoder.cache_info()
    for returned, results in zip(MASKS, expected, strict=False):
        there = jax.device_put(returned, accelerator)
        assert checks.static_value(there) is None
        calls.append(traced_times(lambda there=there: predict(x, there)))
        np.testing.assert_allclose(predict(x, there), results, atol=1e-5)
    assert calls == [1, 0, 0]
    assert pipeline._prepare_decoder.cache_info() == prepared


@pytest.mark.parametrize("name", ["recovered", "exact", "decoder_matrix"])
@pytest.mark.parametrize("code", [spline(0.0), jc.BerrutCode.repeated(K, N), jc.ReplicationCode(K, N)], ids=str)
def test_nothing_fetches_a_mask_from_an_accelerator(monkeypatch, name, code):
    expected = np.asarray(getattr(code, name)(MASKS[0]))
    monkeypatch.setattr(checks, "_in_host_memory", lambda leaf: not isinstance(leaf, jax.Array))
    found = getattr(code, name)(jnp.asarray(MASKS[0]))
    assert isinstance(found, jax.Array)
    np.testing.assert_allclose(np.asarray(found), expected, atol=1e-6)


# ---- as a pytree -------------------------------------------------------------------------------------------


def loss(predict):
    return jnp.sum(jnp.sin(predict(X, MASKS[2])))


def test_it_is_an_argument_of_jit():
    predict = jc.coded(Network(nnx.Rngs(0)), spline())
    call = jax.jit(lambda predict, x, returned: predict(x, returned))
    np.testing.assert_allclose(call(predict, X, MASKS[1]), predict(X, MASKS[1]), atol=1e-5)
    other = jc.coded(Network(nnx.Rngs(1)), spline())
    assert traced_times(lambda: call(other, X, MASKS[3])) == 0
    np.testing.assert_allclose(call(other, X, MASKS[3]), other(X, MASKS[3]), atol=1e-5)


def test_its_leaves_are_the_parameters():
    model = Network(nnx.Rngs(0))
    doubled = jax.tree.map(lambda leaf: 2 * leaf, jc.coded(LINEAR, spline()))
    np.testing.assert_allclose(doubled(X), 2 * jc.coded(LINEAR, spline())(X), rtol=1e-4, atol=1e-5)
    sizes = [np.shape(leaf) for leaf in jax.tree.leaves(nnx.state(model))]
    assert [np.shape(leaf) for leaf in jax.tree.leaves(jc.coded(model, spline()))] == sizes


LINEAR = nnx.Linear(3, 2, rngs=nnx.Rngs(0))


def test_it_may_be_donated():
    predict = jax.tree.map(jnp.array, jc.coded(LINEAR, spline()))
    expected = predict(X, MASKS[0])

    @functools.partial(jax.jit, donate_argnums=0)
    def step(predict):
        return jax.tree.map(lambda leaf: leaf / 2, predict)

    halved = step(predict)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(predict))
    np.testing.assert_allclose(2 * halved(X, MASKS[0]), expected, rtol=1e-4, atol=1e-5)


def test_it_is_differentiated_with_respect_to_its_parameters():
    predict = jc.coded(LINEAR, spline())
    gradient = jax.grad(loss)(predict)
    assert jax.tree.structure(gradient) == jax.tree.structure(predict)
    direction = jax.tree.map(lambda leaf: jnp.cos(jnp.arange(leaf.size).reshape(leaf.shape)), predict)
    moved = [loss(jax.tree.map(lambda p, d, s=s: p + s * d, predict, direction)) for s in (-1e-2, 1e-2)]
    slope = sum(jax.tree.leaves(jax.tree.map(lambda g, d: jnp.sum(g * d), gradient, direction)))
    np.testing.assert_allclose((moved[1] - moved[0]) / 2e-2, slope, rtol=1e-2)


def test_it_is_mapped_over_parameters():
    models = [jc.coded(nnx.Linear(3, 2, rngs=nnx.Rngs(seed)), spline()) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *models)
    together = jax.vmap(lambda predict: predict(X, MASKS[1]))(stacked)
    np.testing.assert_allclose(together, [predict(X, MASKS[1]) for predict in models], atol=1e-5)


# ---- copies and other processes ----------------------------------------------------------------------------

OTHER_PROCESS = """
import pickle, sys
import jax
import numpy as np
predict, x, returned = pickle.load(sys.stdin.buffer)
again = pickle.loads(pickle.dumps(predict)) if sys.argv[1] == "twice" else predict
assert again.setting == predict.setting and hash(again.setting) == hash(predict.setting)
pickle.dump(np.asarray(again(x, returned)), sys.stdout.buffer)
"""


def in_another_process(predict, argument="once"):
    sent = cloudpickle.dumps((predict, np.asarray(X), MASKS[1]))
    command = [sys.executable, "-c", OTHER_PROCESS, argument]
    return pickle.loads(subprocess.run(command, input=sent, capture_output=True, check=True, timeout=300).stdout)


@pytest.mark.parametrize("code", [spline(), jc.LagrangeCode.repeated(K, N), jc.ReplicationCode(K, N)], ids=str)
def test_it_travels_to_another_process(code):
    predict = jc.coded(lambda x: jnp.tanh(x), code, defence=robust.only_finite)
    np.testing.assert_allclose(in_another_process(predict), predict(X, MASKS[1]), atol=1e-6)


def test_modules_travel_and_come_again():
    predict = jc.coded(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), spline(), order=ordering.greedy, output=outputs.logits)
    predict(X, MASKS[0])  # what is cached does not travel
    np.testing.assert_allclose(in_another_process(predict, "twice"), predict(X, MASKS[1]), atol=1e-5)


@pytest.mark.parametrize("clone", [copy.copy, copy.deepcopy, lambda p: pickle.loads(cloudpickle.dumps(p))])
def test_copies_share_what_is_compiled(clone):
    variables = LinenNetwork().init(jax.random.key(0), X)
    predict = jc.coded((LinenNetwork(), variables), spline(), defence=robust.only_finite)
    predict(X, MASKS[0])
    results = []
    assert traced_times(lambda: results.append(clone(predict)(X, MASKS[1]))) == 0
    np.testing.assert_array_equal(results[0], predict(X, MASKS[1]))


def test_representations_are_short():
    plain = jc.coded(jnp.sin, jc.SplineCode.chebyshev(100, 200))
    assert repr(plain) == "Coded(code=InterpolatingCode(num_data=100, num_workers=200), parameters=0)"
    chosen = jc.coded(LINEAR, jc.ReplicationCode(2, 4), order=ordering.greedy, output=outputs.logits)
    expected = "Coded(code=ReplicationCode(num_data=2, num_workers=4), parameters=8, order=greedy, output=logits)"
    assert repr(chosen) == expected
    assert len(repr(jc.coded(LINEAR, spline(), **OPTIONS["shard_map"]()))) < 300
    assert repr(plain.setting.static_code) == "StaticCode(InterpolatingCode(num_data=100, num_workers=200))"
