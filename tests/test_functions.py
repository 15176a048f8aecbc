"""A callable, an nnx module and a linen module compute the same when they have the same weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from jaxcode import SplineCode, coded
from jaxcode.functions import as_pure_function

CODE = SplineCode.chebyshev(4, 9)
RETURNED = np.arange(9) != 4


class Linen(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.BatchNorm(use_running_average=True)(linen.Dense(5)(x))
        return linen.Dense(3)(linen.Dropout(0.5, deterministic=True)(jnp.tanh(x)))


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(2, 5, rngs=rngs)
        self.norm = nnx.BatchNorm(5, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.last = nnx.Linear(5, 3, rngs=rngs)

    def __call__(self, x):
        return self.last(self.dropout(jnp.tanh(self.norm(self.first(x)))))


def inputs(count=4):
    return np.random.default_rng(0).normal(size=(count, 2)).astype(np.float32)


def trained():
    """An nnx module whose running averages are not what they began as."""
    module = Nnx(nnx.Rngs(0))
    module.norm.mean[...] = jnp.linspace(-1.0, 1.0, 5, dtype=jnp.float32)
    module.norm.var[...] = jnp.linspace(0.5, 2.0, 5, dtype=jnp.float32)
    return module


def as_linen(module):
    """The same weights as linen variables."""
    params = {
        "Dense_0": {"kernel": module.first.kernel[...], "bias": module.first.bias[...]},
        "BatchNorm_0": {"scale": module.norm.scale[...], "bias": module.norm.bias[...]},
        "Dense_1": {"kernel": module.last.kernel[...], "bias": module.last.bias[...]},
    }
    return {
        "params": params,
        "batch_stats": {"BatchNorm_0": {"mean": module.norm.mean[...], "var": module.norm.var[...]}},
    }


def by_hand(variables, x):
    """What the module computes in evaluation mode, in NumPy."""
    p, stats = variables["params"], variables["batch_stats"]["BatchNorm_0"]
    hidden = x @ p["Dense_0"]["kernel"] + p["Dense_0"]["bias"]
    hidden = (hidden - stats["mean"]) / np.sqrt(np.asarray(stats["var"]) + 1e-5)
    hidden = np.tanh(hidden * p["BatchNorm_0"]["scale"] + p["BatchNorm_0"]["bias"])
    return hidden @ p["Dense_1"]["kernel"] + p["Dense_1"]["bias"]


KINDS = {
    "callable": lambda module: lambda x: Linen().apply(as_linen(module), x),
    "nnx": lambda module: module,
    "linen": lambda module: (Linen(), as_linen(module)),
    "linen-frozen": lambda module: (Linen(), linen.FrozenDict(as_linen(module))),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


@each_kind
def test_all_kinds_evaluate_the_same(kind):
    module, x = trained(), inputs()
    module.train()
    fn, params = as_pure_function(KINDS[kind](module))
    np.testing.assert_allclose(fn(params, x), by_hand(as_linen(module), x), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(fn(params, x), fn(params, x))


@pytest.mark.parametrize("kind", ["nnx", "linen"])
def test_all_kinds_decode_the_same(kind):
    module, x = trained(), inputs()
    expected = CODE.decode(jnp.float32(by_hand(as_linen(module), np.asarray(CODE.encode(jnp.asarray(x))))), RETURNED)
    found = coded(KINDS[kind](module), CODE)(jnp.asarray(x), RETURNED)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_parameters_are_pytrees():
    module = trained()
    assert as_pure_function(jnp.sin)[1] == ()
    for kind in ("nnx", "linen"):
        leaves = jax.tree.leaves(as_pure_function(KINDS[kind](module))[1])
        assert {leaf.shape for leaf in leaves} >= {(2, 5), (5, 3), (5,), (3,)}


# ---- the user's nnx module ---------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_an_nnx_module_is_left_as_it_was(training):
    module = trained()
    (module.train if training else module.eval)()
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(module, nnx.Not(nnx.RngState))))
    coded(module, CODE)(jnp.asarray(inputs()), RETURNED)
    assert module.dropout.deterministic is not training
    assert module.norm.use_running_average is not training
    after = nnx.to_pure_dict(nnx.state(module, nnx.Not(nnx.RngState)))
    jax.tree.map(np.testing.assert_array_equal, before, after)
    if training:  # its dropout still drops
        assert not np.array_equal(module(inputs()), module(inputs()))


def test_parameters_are_those_of_the_moment():
    module, x = trained(), jnp.asarray(inputs())
    predict = coded(module, CODE)
    before = predict(x, RETURNED)
    module.last.bias[...] = module.last.bias[...] + 1
    np.testing.assert_array_equal(predict(x, RETURNED), before)
    np.testing.assert_allclose(coded(module, CODE)(x, RETURNED), before + 1, atol=1e-4)


# ---- gradients with respect to parameters ------------------------------------------------------------------


def linen_loss(variables, x):
    return jnp.sum(coded((Linen(), variables), CODE)(x, RETURNED) ** 2)


def nnx_loss(module, x):
    return jnp.sum(coded(module, CODE)(x, RETURNED) ** 2)


def linen_gradient(module, x):
    return jax.jit(jax.grad(linen_loss))(as_linen(module), x)["params"]


def test_nnx_gradients_are_linens():
    module, x = trained(), jnp.asarray(inputs())
    expected = linen_gradient(module, x)
    found = nnx.jit(nnx.grad(nnx_loss))(module, x)
    named = {"Dense_0": found.first, "BatchNorm_0": found.norm, "Dense_1": found.last}
    for layer, names in (("Dense_0", ["kernel", "bias"]), ("BatchNorm_0", ["scale"]), ("Dense_1", ["kernel", "bias"])):
        for name in names:
            gradient = expected[layer][name]
            assert np.abs(gradient).max() > 1e-3
            np.testing.assert_allclose(named[layer][name][...], gradient, rtol=1e-4, atol=1e-5)


def test_linen_gradients_are_finite_differences():
    with jax.enable_x64(True):
        variables = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), as_linen(trained()))
        x, step = inputs().astype(np.float64), 1e-6
        gradient = jax.jit(jax.grad(linen_loss))(variables, x)
        loss = jax.jit(linen_loss)
        for layer, name in (("Dense_0", "kernel"), ("Dense_1", "bias"), ("BatchNorm_0", "scale")):
            leaf = variables["params"][layer][name]
            move = np.cos(np.arange(leaf.size)).reshape(leaf.shape)

            def moved(by, layer=layer, name=name, leaf=leaf, move=move):
                changed = {**variables["params"][layer], name: leaf + by * move}
                return float(loss({**variables, "params": {**variables["params"], layer: changed}}, x))

            slope = (moved(step) - moved(-step)) / (2 * step)
            np.testing.assert_allclose(np.sum(np.asarray(gradient["params"][layer][name]) * move), slope, rtol=1e-6)


def test_an_nnx_module_made_outside_and_used_inside_nnx_jit():
    module, x = trained(), jnp.asarray(inputs())

    @nnx.jit
    def closed_over(x):
        return coded(module, CODE)(x, RETURNED)

    @nnx.jit
    def given(module, x):
        return coded(module, CODE)(x, RETURNED)

    expected = coded(module, CODE)(x, RETURNED)
    np.testing.assert_allclose(closed_over(x), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(given(module, x), expected, rtol=1e-5, atol=1e-6)
    predict = coded(module, CODE)
    np.testing.assert_allclose(jax.jit(predict)(x, RETURNED), expected, rtol=1e-5, atol=1e-6)


# ---- bad arguments -----------------------------------------------------------------------------------------

REFUSED = {
    "a-number": (3, "f is 3; expected a callable"),
    "nothing": (None, "f is None"),
    "an-nnx-class": (Nnx, "f is <class .*Nnx.*not its class"),
    "a-linen-class": (Linen, "f is <class .*Linen"),
    "linen-without-variables": (Linen(), "linen Linen without variables; expected the pair"),
    "linen-with-an-array": ((Linen(), np.ones(3)), r"\(linen module, ndarray\); expected the variables"),
    "linen-with-none": ((Linen(), None), r"\(linen module, NoneType\)"),
    "a-triple": ((Linen(), {}, {}), "expected a callable"),
    "a-pair-of-functions": ((jnp.sin, jnp.cos), "expected a callable"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(unchecked, case):
    f, message = REFUSED[case]
    for takes in (as_pure_function, lambda f: coded(f, CODE)):
        with pytest.raises(ValueError, match=message):
            takes(f)
