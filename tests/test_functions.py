"""A callable, an nnx module and a linen module compute the same when they have the same weights."""

import functools

import cloudpickle
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from flax.training import train_state

from jaxcode import SplineCode, coded
from jaxcode.functions import as_pure_function, check_answers

CODE = SplineCode.chebyshev(4, 9)
RETURNED = np.arange(9) != 4


class Linen(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.BatchNorm(use_running_average=True)(linen.Dense(5)(x))
        return linen.Dense(3)(linen.Dropout(0.5, deterministic=True)(jnp.tanh(x)))


class Nnx(nnx.Module):
    def __init__(self, rngs, width=5):
        self.first = nnx.Linear(2, width, rngs=rngs)
        self.norm = nnx.BatchNorm(width, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.last = nnx.Linear(width, 3, rngs=rngs)

    def __call__(self, x):
        return self.last(self.dropout(jnp.tanh(self.norm(self.first(x)))))


def inputs(count=4):
    return np.random.default_rng(0).normal(size=(count, 2)).astype(np.float32)


def trained_module():
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


def evaluate_in_numpy(variables, x):
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
    module, x = trained_module(), inputs()
    module.train()
    fn, params = as_pure_function(KINDS[kind](module))
    np.testing.assert_allclose(fn(params, x), evaluate_in_numpy(as_linen(module), x), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(fn(params, x), fn(params, x))


@pytest.mark.parametrize("kind", ["nnx", "linen"])
def test_all_kinds_decode_the_same(kind):
    module, x = trained_module(), inputs()
    expected = CODE.decode(
        jnp.float32(evaluate_in_numpy(as_linen(module), np.asarray(CODE.encode(jnp.asarray(x))))), RETURNED
    )
    found = coded(KINDS[kind](module), CODE)(jnp.asarray(x), RETURNED)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_parameters_are_pytrees():
    module = trained_module()
    assert as_pure_function(jnp.sin)[1] == ()
    for kind in ("nnx", "linen"):
        leaves = jax.tree.leaves(as_pure_function(KINDS[kind](module))[1])
        assert {leaf.shape for leaf in leaves} >= {(2, 5), (5, 3), (5,), (3,)}


# ---- the user's nnx module ---------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_an_nnx_module_is_left_as_it_was(training):
    module = trained_module()
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
    module, x = trained_module(), jnp.asarray(inputs())
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
    module, x = trained_module(), jnp.asarray(inputs())
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
        variables = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), as_linen(trained_module()))
        x, step = inputs().astype(np.float64), 1e-6
        gradient = jax.jit(jax.grad(linen_loss))(variables, x)
        loss = jax.jit(linen_loss)
        for layer, name in (("Dense_0", "kernel"), ("Dense_1", "bias"), ("BatchNorm_0", "scale")):
            leaf = variables["params"][layer][name]
            move = np.cos(np.arange(leaf.size)).reshape(leaf.shape)

            def loss_at(distance, layer=layer, name=name, leaf=leaf, move=move):
                changed = {**variables["params"][layer], name: leaf + distance * move}
                return float(loss({**variables, "params": {**variables["params"], layer: changed}}, x))

            slope = (loss_at(step) - loss_at(-step)) / (2 * step)
            np.testing.assert_allclose(np.sum(np.asarray(gradient["params"][layer][name]) * move), slope, rtol=1e-6)


def test_an_nnx_module_made_outside_and_used_inside_nnx_jit():
    module, x = trained_module(), jnp.asarray(inputs())

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


# ---- functions as static arguments -------------------------------------------------------------------------


class Scaled(linen.Module):
    """A linen module whose fields may not be hashable."""

    scale: np.ndarray | float

    def __call__(self, x):
        return x * self.scale


def double(x):
    return 2 * x


def train(module):
    """Updates parameters, running averages and random state in one step of training."""
    module.train()
    optimizer = nnx.Optimizer(module, optax.adam(0.1), wrt=nnx.Param)
    gradient = nnx.grad(lambda module: jnp.sum(module(jnp.asarray(inputs())) ** 2))(module)
    optimizer.update(module, gradient)
    return module


def deeper_module():
    module = Nnx(nnx.Rngs(0))
    module.last = nnx.Sequential(nnx.Linear(5, 5, rngs=nnx.Rngs(0)), nnx.Linear(5, 3, rngs=nnx.Rngs(0)))
    return module


def module_of_other_rate():
    module = Nnx(nnx.Rngs(0))
    module.dropout = nnx.Dropout(0.1, rngs=nnx.Rngs(0))
    return module


UNHASHABLE = Scaled(np.full(2, 3.0, np.float32))
SAME_STRUCTURE = {
    "nnx": (lambda: Nnx(nnx.Rngs(0)), lambda: Nnx(nnx.Rngs(1))),
    "nnx-trained": (lambda: Nnx(nnx.Rngs(0)), lambda: train(Nnx(nnx.Rngs(0)))),
    "nnx-evaluating": (lambda: Nnx(nnx.Rngs(0)), lambda: nnx.view(Nnx(nnx.Rngs(0)), deterministic=True)),
    "linen": (lambda: (Linen(), as_linen(trained_module())), lambda: (Linen(), as_linen(train(trained_module())))),
    "linen-unhashable": (lambda: (UNHASHABLE, {}), lambda: (UNHASHABLE, {})),
    "callable": (lambda: double, lambda: double),
}
OTHER_STRUCTURE = {
    "nnx-width": (lambda: Nnx(nnx.Rngs(0)), lambda: Nnx(nnx.Rngs(0), width=6)),
    "nnx-depth": (lambda: Nnx(nnx.Rngs(0)), deeper_module),
    "nnx-rate": (lambda: Nnx(nnx.Rngs(0)), module_of_other_rate),
    "linen": (lambda: (Scaled(2.0), {}), lambda: (Scaled(3.0), {})),
    "linen-class": (lambda: (Linen(), as_linen(trained_module())), lambda: (linen.Dense(3), {})),
    "linen-unhashable": (lambda: (UNHASHABLE, {}), lambda: (Scaled(np.full(2, 3.0, np.float32)), {})),
    "callable": (lambda: jnp.tanh, lambda: jnp.sin),
    "kinds": (lambda: (Scaled(2.0), {}), lambda: Scaled(2.0).__call__),
}


def traces():
    """A jitted function that runs a model given as a static argument, and the list of models that it traced."""
    traced = []

    @functools.partial(jax.jit, static_argnums=0)
    def run(fn, params, x):
        traced.append(fn)
        return fn(params, x)

    return run, traced


@pytest.mark.parametrize("case", SAME_STRUCTURE)
def test_models_of_one_structure_are_traced_once(case):
    run, traced = traces()
    x = jnp.asarray(inputs())
    models = [as_pure_function(make()) for make in SAME_STRUCTURE[case]]
    (first, _), (second, _) = models
    assert first == second
    assert hash(first) == hash(second)
    for fn, params in models:
        np.testing.assert_allclose(run(fn, params, x), fn(params, x), rtol=1e-5, atol=1e-6)
    assert len(traced) == 1


@pytest.mark.parametrize("case", OTHER_STRUCTURE)
def test_models_of_different_structure_are_unequal(case):
    first, second = (as_pure_function(make())[0] for make in OTHER_STRUCTURE[case])
    assert first != second
    assert len({first, second}) == 2


@pytest.mark.parametrize("case", SAME_STRUCTURE)
def test_functions_can_be_sent_to_other_processes(case):
    fn, params = as_pure_function(SAME_STRUCTURE[case][1]())
    received, received_params = cloudpickle.loads(cloudpickle.dumps((fn, params)))
    x = jnp.asarray(inputs())
    np.testing.assert_array_equal(received(received_params, x), fn(params, x))
    assert (received == fn) == (case != "linen-unhashable")
    assert hash(received) == hash(cloudpickle.loads(cloudpickle.dumps(fn))) or case == "linen-unhashable"


# ---- answers -----------------------------------------------------------------------------------------------

FLOATS = {"row": jnp.ones((4, 3)), "number": np.ones(4), "half": jnp.ones((4, 1), jnp.bfloat16)}
INTEGERS = {"classes": np.arange(4), "bytes": jnp.ones((4, 2), jnp.uint8), "mask": np.ones(4, bool)}
BAD_ANSWERS = {
    "a-float": (1.5, r"f's result is 1\.5; expected an array with the batch of 4"),
    "an-integer": (3, "f's result is 3; expected an array"),
    "a-list-of-floats": ([1.0, 2.0], r"f's result\[0\] is 1\.0; expected an array"),
    "text": ({"class": "cat"}, r"f's result\['class'\] is 'cat'; expected an array"),
    "nothing": (None, "f's result is None; expected at least one array"),
    "an-empty-tuple": ((), r"f's result is \(\); expected at least one array"),
    "a-scalar": (jnp.float32(1), r"f's result has shape \(\) for a batch of 4; expected the batch"),
    "a-numpy-scalar": (np.float64(1), r"f's result has shape \(\) for a batch of 4"),
    "a-shape": ([jax.ShapeDtypeStruct((3, 4), np.float32)], r"f's result\[0\] has shape \(3, 4\) for a batch of 4"),
    "complex": (np.ones(4, complex), "f's result has dtype complex128; expected real numbers"),
    "dates": (np.zeros(4, "datetime64[s]"), "f's result has dtype datetime64.*; expected real numbers"),
}


@pytest.mark.parametrize("allow_integers", [False, True])
@pytest.mark.parametrize("case", BAD_ANSWERS)
def test_answers_that_cannot_be_decoded_are_named(unchecked, case, allow_integers):
    answers, message = BAD_ANSWERS[case]
    with pytest.raises(ValueError, match=message):
        check_answers(answers, 4, allow_integers=allow_integers)


def test_answers_of_integers_pass_only_where_they_are_allowed():
    check_answers(FLOATS, 4)
    check_answers(jax.eval_shape(lambda: FLOATS), 4)
    check_answers(FLOATS | INTEGERS, 4, allow_integers=True)
    for name, leaf in INTEGERS.items():
        with pytest.raises(ValueError, match=rf"f's result\['{name}'\] has dtype .*; expected .*: return logits"):
            check_answers({name: leaf}, 4)


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
    "a-train-state": (
        train_state.TrainState.create(apply_fn=Linen().apply, params={}, tx=optax.identity()),
        "f is a TrainState; expected its module and variables",
    ),
    "a-pair-of-functions": ((jnp.sin, jnp.cos), "expected a callable"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(unchecked, case):
    f, message = REFUSED[case]
    for takes in (as_pure_function, lambda f: coded(f, CODE)):
        with pytest.raises(ValueError, match=message):
            takes(f)


# ---- models as people write them -----------------------------------------------------------------------------------


class Flexible(nnx.Module):
    """Has an option, a second method and a counter."""

    def __init__(self, rngs, counts=False):
        self.layer = nnx.Linear(2, 3, rngs=rngs)
        self.calls = nnx.Variable(jnp.zeros((), jnp.int32))
        self.counts = counts

    def __call__(self, x, *, scale=1.0, doubled=False):
        if self.counts:
            self.calls[...] += 1
        return self.layer(x) * scale * (2 if doubled else 1)

    def negative(self, x):
        return -self.layer(x)


def test_further_arguments_are_parameters_if_they_are_arrays():
    module = Flexible(nnx.Rngs(0))
    fn, params = as_pure_function(functools.partial(module, scale=jnp.float32(3), doubled=True))
    np.testing.assert_allclose(fn(params, inputs()), 6 * module.layer(inputs()), rtol=1e-6)
    assert any(np.shape(leaf) == () and leaf == 3 for leaf in jax.tree.leaves(params))
    other, _ = as_pure_function(functools.partial(module, scale=jnp.float32(5), doubled=True))
    assert other == fn
    assert hash(other) == hash(fn)
    assert as_pure_function(functools.partial(module, scale=jnp.float32(3), doubled=False))[0] != fn


def test_a_partial_of_a_function_of_parameters():
    def apply(weights, x, *, power):
        return (x @ weights["kernel"]) ** power

    weights = {"kernel": np.ones((2, 3), np.float32)}
    predict = coded(functools.partial(apply, weights, power=2), CODE)
    assert sum(map(np.size, jax.tree.leaves(predict.params))) == 6
    np.testing.assert_allclose(
        predict(inputs()), coded(lambda x: (x @ weights["kernel"]) ** 2, CODE)(inputs()), rtol=1e-5
    )
    clone = cloudpickle.loads(cloudpickle.dumps(as_pure_function(functools.partial(apply, weights, power=2))[0]))
    np.testing.assert_allclose(clone(((), [weights["kernel"]]), inputs()), apply(weights, inputs(), power=2))


def test_a_partial_of_a_linen_module():
    class Doubled(linen.Module):
        @linen.compact
        def __call__(self, x, train):
            return linen.Dense(3)(x) * (0 if train else 2)

    module = Doubled()
    variables = module.init(jax.random.key(0), inputs(), train=False)
    fn, params = as_pure_function(functools.partial(module.apply, variables, train=False))
    np.testing.assert_allclose(fn(params, inputs()), module.apply(variables, inputs(), train=False))
    assert len(jax.tree.leaves(params)) == 2


def test_graph_and_state_and_methods_are_models():
    module = Flexible(nnx.Rngs(0))
    for model, sign in ((nnx.split(module), 1), (module.negative, -1)):
        predict = coded(model, CODE)
        np.testing.assert_allclose(predict(inputs()), sign * coded(module, CODE)(inputs()), rtol=1e-6)
        assert sum(map(np.size, jax.tree.leaves(predict.params))) == 10


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["plain", "jit"])
def test_a_call_that_changes_the_model_is_refused(transform):
    module = Flexible(nnx.Rngs(0), counts=True)
    with pytest.raises(
        ValueError, match=r"f changed its state \['?\.?calls.* in a call; expected a module whose state"
    ):
        transform(lambda x: coded(module, CODE)(x))(inputs())
    assert module.calls[...] == 0


def test_modules_and_large_arrays_closed_over_are_warned_of():
    module, table = Flexible(nnx.Rngs(0)), np.zeros((2, 2**20), np.float32)
    with pytest.warns(UserWarning, match="f closes over module, whose 10 numbers become constants.*pass module itself"):
        coded(lambda x: module(x), CODE)
    with pytest.warns(UserWarning, match="f closes over table, whose 2,097,152 numbers"):
        coded(lambda x: x @ table, CODE)


def test_messages_are_short(unchecked):
    state = nnx.state(Flexible(nnx.Rngs(0)))
    with pytest.raises(ValueError, match="expected a callable, an nnx module") as error:
        as_pure_function((state, [state] * 20))
    assert len(str(error.value)) < 500
