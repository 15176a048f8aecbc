"""The code that places workers and reads answers in the space of the inputs."""

import dataclasses

import cloudpickle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.gaussian_process import kernels

import jaxcode as jc
from jaxcode import placement, tuning
from jaxcode.codes.abstract import adapt_group, find_assignment, find_copies
from jaxcode.stragglers import Uniform

from ..strict_modes import STRICT_MODES

K, N = 6, 10
CODE = jc.KernelCode(K, N)
X = np.random.default_rng(0).normal(size=(4 * K - 2, 2)).astype(np.float32)
RETURNED = ~np.isin(np.arange(N), [1, 4, 8])


@jax.jit
def curve(x):
    return {"waves": jnp.sin(x @ jnp.array([[1.0, 0.5], [-0.5, 1.0]])), "sum": jnp.sum(jnp.tanh(x), axis=1)}


def sweep(x):
    """A parameter's effect, smooth on the scale of a group."""
    return jnp.exp(-x) * jnp.sin(3 * x)


def root_mean_square(tree, other):
    return np.sqrt(
        np.mean([np.mean(np.square(a - b)) for a, b in zip(*map(jax.tree.leaves, (tree, other)), strict=True)])
    )


@pytest.mark.parametrize("code", [CODE, jc.KernelCode(K, N, mixes=False)], ids=["mixtures", "copies"])
def test_own_answers_are_results_bit_for_bit(code):
    predict = jc.coded(curve, code)
    for returned in (None, RETURNED):
        exact = np.asarray(predict.exact(X, returned))
        assert exact.all() == (returned is None)
        assert exact.mean() > 0.5
        for result, truth in zip(*map(jax.tree.leaves, (predict(X, returned), curve(X))), strict=True):
            np.testing.assert_array_equal(result[exact], truth[exact])


def test_workers_compute_the_inputs_and_then_copies_or_points_between():
    x = X[:K]
    plan = CODE.plan(x)
    pairs, shares = np.asarray(plan.features.pairs), np.asarray(plan.features.shares)[:, None]
    assert set(shares[:, 0]) <= {0.0, 0.25, 0.5}
    np.testing.assert_array_equal(pairs[:K], np.arange(K)[:, None] + np.zeros((1, 2)))
    np.testing.assert_allclose(CODE.encode(x, plan), (1 - shares) * x[pairs[:, 0]] + shares * x[pairs[:, 1]], rtol=1e-5)
    # The nearer to each other models' answers are correlated, the less others tell.
    is_copy = [
        np.mean(np.ptp(jc.KernelCode(K, 3 * K, length=length).plan(x).features.pairs[K:], axis=1) == 0)
        for length in (1e-3, 0.3)
    ]
    assert is_copy[0] == 1 > is_copy[1]


def test_workers_go_where_results_matter():
    x = np.linspace(0, 1, 12, dtype=np.float32)[:, None]
    code = jc.KernelCode(12, 16)
    for focus in (0, 11):
        risk = np.where(np.arange(12) == focus, 1.0, 1e-6)
        pairs = np.asarray(code.plan(x, risk).features.pairs)[12:]
        assert (abs(pairs[0] - focus) <= 4).all()


def test_the_placement_is_the_best_of_all_candidates():
    """By brute force: the expected variance after each candidate, from scratch."""
    x = X[:K].astype(np.float64)
    length, late = 0.4, 0.2
    code = jc.KernelCode(K, K + 1, length=length, late=late)
    placed = code.plan(x.astype(np.float32)).features
    chosen = (*np.asarray(placed.pairs)[K].tolist(), float(placed.shares[K]))
    extent = max(np.linalg.norm(a - b) for a in x for b in x)

    def covariance(a, b):
        root = 3 * np.linalg.norm(a[:, None] - b[None], axis=2) / (length * extent)
        return (1 + root + 3 * root**2 / 7 + 2 * root**3 / 21 + root**4 / 105) * np.exp(-root)

    def expected_variance(i, j, share):
        sites = np.concatenate([x, [(1 - share) * x[i] + share * x[j]]])
        total = 0
        for k in range(K):
            for others, probability in (
                (np.arange(K + 1) != k, 1 - late),
                (np.isin(np.arange(K + 1), [k, K], invert=True), late),
            ):
                c = covariance(x[k : k + 1], sites[others])
                gram = covariance(sites[others], sites[others]) + 1e-10 * np.eye(others.sum())
                total += probability * (1 + 1e-10 - (c @ np.linalg.solve(gram, c.T))[0, 0])
        return total

    nearest = np.argsort([[np.linalg.norm(a - b) for b in x] for a in x], axis=1)[:, 1:5]
    between = [(i, j, share) for i in range(K) for j in nearest[i].tolist() for share in (0.25, 0.5)]
    costs = {point: expected_variance(*point) for point in [*((i, i, 0.0) for i in range(K)), *between]}
    np.testing.assert_allclose(costs[chosen], min(costs.values()), rtol=1e-4)


def test_what_did_not_return_is_not_read():
    plan = jax.jit(CODE.plan)(X[:K])
    answers = curve(CODE.encode(X[:K], plan))
    spoiled = jax.tree.map(lambda leaf: leaf.at[~RETURNED].set(jnp.nan), answers)

    @jax.jit
    def decode(answers):
        return CODE.decode(answers, RETURNED, plan)

    for spoiled_leaf, leaf in zip(*map(jax.tree.leaves, (decode(spoiled), decode(answers))), strict=True):
        np.testing.assert_array_equal(spoiled_leaf, leaf)

    gradient = jax.jit(jax.grad(lambda answers: sum(map(jnp.sum, jax.tree.leaves(decode(answers))))))(spoiled)
    for leaf in jax.tree.leaves(gradient):
        assert np.isfinite(leaf).all()
        assert (np.asarray(leaf)[~RETURNED] == 0).all()


def test_one_program_for_all_masks():
    traces = []

    def f(x):
        traces.append(x.shape)
        return jnp.sin(x)

    predict = jc.coded(f, CODE)
    for seed in range(4):
        predict(X, np.random.default_rng(seed).permutation(N) > 2)
    assert len(traces) == 1


def test_derivatives_are_right():
    x = X[:K].astype(np.float64)
    with jax.enable_x64(True):

        def total(x):
            return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(jc.coded(curve, CODE)(x, RETURNED)))

        direction = np.random.default_rng(1).normal(size=x.shape)
        forward = jax.jvp(total, (x,), (direction,))[1]
        step = 1e-6
        difference = (total(x + step * direction) - total(x - step * direction)) / (2 * step)
        np.testing.assert_allclose(forward, difference, rtol=1e-5)
        np.testing.assert_allclose(np.sum(jax.grad(total)(x) * direction), difference, rtol=1e-5)


def test_who_computes_the_same_is_read_from_the_encoder():
    for code in (jc.ReplicationCode(K, N), jc.KernelCode(K, N, mixes=False), jc.KernelCode(K, N, length=1e-3)):
        plan = code.plan(X[:K]) if code.needs_plan else None
        coded = np.asarray(code.encode(X[:K], plan))
        same = np.array([[(a == b).all() for a in coded] for b in coded]) & ~np.eye(N, dtype=bool)
        assert same.any()
        np.testing.assert_array_equal(find_copies(code, plan), same)
        np.testing.assert_array_equal(X[:K][find_assignment(code, plan)], coded)
    # Points between the same inputs are not the same.
    plan = CODE.plan(X[:K])
    shares = jnp.where(plan.features.shares > 0, jnp.linspace(0.1, 0.4, N), 0)
    plan = dataclasses.replace(plan, features=plan.features._replace(shares=shares))
    assert not find_copies(CODE, plan)[K + 1 :].any()


def test_transformations_agree():
    masks = np.stack([RETURNED, np.roll(RETURNED, 3), np.ones(N, bool)])
    predict = jc.coded(curve, CODE)
    expected = jax.tree.map(lambda *leaves: np.stack(leaves), *(predict(X, mask) for mask in masks))
    mapped = jax.jit(jax.vmap(predict, in_axes=(None, 0)))(X, masks)
    mesh = jax.make_mesh((2,), ("workers",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jc.coded(curve, CODE, placement=placement.shard_map(mesh))
    for others in (mapped, jax.tree.map(lambda *leaves: np.stack(leaves), *(spread(X, mask) for mask in masks))):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), others, expected)


def test_near_inputs_of_one_number_stay_apart_under_vmap():
    """XLA computes a product over one number for each of its uses, and may round each in another way."""
    x = np.linspace(0.3, 1.3, 20, dtype=np.float32)[:, None]
    masks = np.stack([np.roll(np.arange(30) % 6 != 0, shift) for shift in range(6)])
    for mixes in (True, False):
        predict = jc.coded(sweep, jc.KernelCode(20, 30, mixes=mixes))
        results = jax.jit(jax.vmap(predict, (None, 0)))(x, masks)
        np.testing.assert_allclose(results, np.broadcast_to(sweep(x), results.shape), atol=1e-3)


@pytest.mark.parametrize("mode", STRICT_MODES)
def test_strict_modes(mode):
    x, returned = jax.device_put(X), jax.device_put(RETURNED)
    predict = jc.coded(curve, CODE)
    with STRICT_MODES[mode]():
        jax.block_until_ready(predict(x, returned))


def test_answers_of_other_groups_tell_about_each_other():
    predict = jc.coded(curve, CODE)
    x = np.random.default_rng(2).uniform(-1, 1, size=(20 * K, 2)).astype(np.float32)
    together = predict(x, RETURNED)
    apart = [predict(x[i : i + K], RETURNED) for i in range(0, len(x), K)]
    apart = jax.tree.map(lambda *leaves: np.concatenate(leaves), *apart)
    assert root_mean_square(together, curve(x)) < 0.3 * root_mean_square(apart, curve(x))


def test_many_groups_are_decoded_in_blocks(monkeypatch):
    x = np.random.default_rng(2).uniform(-1, 1, size=(20 * K - 1, 2)).astype(np.float32)
    one_block = jc.coded(curve, CODE)(x, RETURNED)
    monkeypatch.setattr("jaxcode.pipeline._BLOCK", 7 * N)
    blocks = jc.coded(lambda x: curve(x), CODE)(x, RETURNED)
    assert root_mean_square(blocks, curve(x)) < 3 * root_mean_square(one_block, curve(x)) + 1e-3


@pytest.mark.long
def test_sweeps_are_decoded_better_than_by_splines_and_copies():
    """Twenty values of a parameter: at most .35 of the error of what else there is; never more with few workers."""
    for num_data, num_workers, num_late, end, share in (
        (20, 30, 5, 3.0, 0.35),
        (8, 12, 2, 1.8, 1.0),
        (20, 24, 3, 1.8, 1.0),
    ):
        codes = {
            "kernel": jc.KernelCode(num_data, num_workers, late=num_late / num_workers),
            "copies": jc.KernelCode(num_data, num_workers, mixes=False),
            "spline": jc.SplineCode.mixed(num_data, num_workers, num_workers - num_data),
            "LeTCC": jc.SplineCode.chebyshev(num_data, num_workers),
        }
        x = np.linspace(0.2, end, num_data, dtype=np.float32)[:, None]
        masks = np.stack([np.random.default_rng(i).permutation(num_workers) >= num_late for i in range(64)])
        errors = {}
        for name, code in codes.items():
            results = jax.vmap(jc.coded(sweep, code), (None, 0))(x, masks)
            errors[name] = float(jnp.sqrt(jnp.mean((results - sweep(x)) ** 2)))
        assert errors["kernel"] <= share * min(errors["copies"], errors["spline"], errors["LeTCC"]), errors


def test_predicted_errors_hold_the_truth():
    code = jc.KernelCode(16, 24)
    rng = np.random.default_rng(0)
    inside = []

    @jax.jit
    def decode(weight, x, returned):
        plan = code.plan(x)
        answers = jnp.sin(code.encode(x, plan) @ weight)
        return *code.decode_with_error(answers, returned, plan), code.exact(returned, plan)

    for _ in range(20):
        weight = rng.normal(size=(2, 5)).astype(np.float32)
        x = rng.uniform(-1, 1, size=(16, 2)).astype(np.float32)
        results, errors, exact = decode(weight, x, rng.permutation(24) >= 6)
        exact = np.asarray(exact)
        assert (np.asarray(errors)[exact] == 0).all()
        inside.append((abs(results - np.sin(x @ weight)) <= 1.645 * errors)[~exact])
    assert 0.8 < np.concatenate(inside).mean() <= 0.99


def test_features_decide_what_is_near():
    """Of inputs with a first number that nothing depends on, the second one alone is read."""
    x = np.stack([1e3 * np.random.default_rng(0).normal(size=12), np.linspace(0, 1, 12)], axis=1).astype(np.float32)
    errors = []
    for features in (None, jc.ordering.sensitivity(lambda x: sweep(x[:, 1]), x)):
        predict = jc.coded(lambda x: sweep(x[:, 1]), jc.KernelCode(12, 16, features=features))
        errors.append(root_mean_square(predict(x, np.arange(16) > 2), sweep(x[:, 1])))
    assert errors[1] < 0.1 * errors[0]


def test_a_known_process_and_mean_decode_as_scikit_learn_does():
    x, mean, (length, nugget) = X[:K].astype(np.float64), {"waves": np.array([0.3, -0.2]), "sum": 0.1}, (1.5, 0.2)
    mean = jax.tree.map(np.float32, mean)
    process = jc.interpolants.kernel.Process(0.5, length, nugget)
    code = jc.KernelCode(K, N, mixes=False, process=process, mean=mean)
    # The copies of input 1 are workers 1 and 7, those of input 4 worker 4 alone.
    returned = ~np.isin(np.arange(N), [1, 4, 7])
    plan = code.plan(X[:K])
    results = code.decode(curve(code.encode(X[:K], plan)), returned, plan)
    kernel, lost = kernels.Matern(length, nu=0.5), np.isin(np.arange(K), [1, 4])
    np.testing.assert_array_equal(code.exact(returned, plan), ~lost)
    weights = np.linalg.solve(kernel(x[~lost]) + nugget * np.eye((~lost).sum()), kernel(x[~lost], x[lost])).T
    for result, truth, centre in zip(*map(jax.tree.leaves, (results, curve(X[:K]), mean)), strict=True):
        np.testing.assert_array_equal(result[~lost], truth[~lost])
        expected = centre + np.tensordot(weights, np.float64(truth[~lost]) - centre, 1)
        np.testing.assert_allclose(result[lost], expected, rtol=1e-4, atol=1e-6)
    # Without midpoints a plan may say who computes what.
    assignment = np.array([*range(K), 1, 1, 4, 1], np.int32)
    moved = code.plan(X[:K], None, assignment)
    np.testing.assert_array_equal(code.encode(X[:K], moved), X[assignment])
    again = code.decode(curve(code.encode(X[:K], moved)), np.isin(np.arange(N), [1, 4, 6, 7], invert=True), moved)
    np.testing.assert_array_equal(again["sum"], curve(X[:K])["sum"])


def test_further_copies_of_answers_do_not_make_errors_smaller():
    once, twice = (jc.KernelCode(K, count, mixes=False) for count in (K, 2 * K))
    late = np.arange(K) == 2
    x = X[:K]
    errors = [
        code.decode_with_error(curve(code.encode(x, code.plan(x))), mask, code.plan(x))[1]
        for code, mask in ((once, ~late), (twice, np.tile(~late, 2)))
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), *errors)
    assert errors[0]["sum"][2] > 0


def test_an_error_that_a_prior_expects_counts_as_twenty_answers():
    code, x = jc.KernelCode(K, N, mixes=False), X[:K]
    plan, values = code.plan(x), curve(X[:K])["sum"]
    answers = code.encode(values, plan)
    mask = np.arange(N) % K != 2
    guesses = values + 0.1 * np.float32([-1, 1] * K)[:K]
    expected = []
    for size in (0.0, 0.1, 1.0):
        prior = jc.Prior(code.encode(guesses, plan), guesses, np.full(K, size, np.float32))
        expected.append(code.decode_with_error(answers, mask, dataclasses.replace(plan, prior=prior))[1])
    np.testing.assert_array_equal(np.array(expected)[:, mask[:K]], 0)
    low, middle, high = np.array(expected)[:, 2]
    assert low < middle < high
    assert (high**2 - low**2) / (middle**2 - low**2) == pytest.approx(100, rel=1e-3)


def test_copies_go_where_a_prior_is_unsure():
    x = np.random.default_rng(0).normal(size=(300, 2)).astype(np.float32)
    prior = jc.surrogate(curve, x, cost=10.0, progress=False)
    code = jc.KernelCode(K, N, mixes=False)
    plan = jc.allocation.plan(code, X[:K], prior=prior, stragglers=Uniform(3))
    expected = jc.allocation.plan(jc.ReplicationCode(K, N), X[:K], prior=prior, stragglers=Uniform(3)).assignment
    np.testing.assert_array_equal(plan.features.pairs[:, 0], expected)
    with pytest.raises(ValueError, match="stragglers is given for KernelCode"):
        jc.allocation.plan(CODE, X[:K], prior=prior, stragglers=Uniform(3))


@pytest.mark.parametrize("is_matrix", [False, True])
def test_a_metric_scales_the_features_but_not_the_inputs(is_matrix):
    scales = np.array([0.2, 3.0], np.float32)
    code = jc.KernelCode(K, N, metric=np.diag(scales) if is_matrix else scales)
    plan, scaled_plan = code.plan(X[:K]), CODE.plan(X[:K] * scales)
    np.testing.assert_array_equal(plan.features.pairs, scaled_plan.features.pairs)
    answers = curve(code.encode(X[:K], plan))
    results, expected = code.decode(answers, RETURNED, plan), CODE.decode(answers, RETURNED, scaled_plan)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), results, expected)


def test_a_process_that_is_given_is_not_fitted():
    plan = CODE.plan(X[:K])
    answers = curve(CODE.encode(X[:K], plan))
    fitted = adapt_group(CODE, answers, RETURNED, plan)
    code = jc.KernelCode(K, N, process=jax.tree.map(np.asarray, fitted.features.process))
    # The same workers, wherever the process would place them.
    given = dataclasses.replace(
        plan, features=plan.features._replace(process=code.plan(X[:K]).features.process, pairs=plan.features.pairs)
    )
    found, expected = (c.decode_with_error(answers, RETURNED, p) for c, p in ((code, given), (CODE, plan)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found, expected)


def test_tuning_chooses_it_for_a_sweep_and_saves_it(tmp_path):
    starts = np.random.default_rng(0).uniform(0, 1, 8)
    x = np.concatenate([np.linspace(a, a + 1.5, 8) for a in starts]).astype(np.float32)[:, None]
    layouts = tuning.standard_layouts(8, 12) | tuning.kernel_layouts(8, 12, late=2 / 12)
    tuned = jc.tune(sweep, x, 8, 12, Uniform(2), layouts=layouts, progress=False, num_masks=32)
    assert isinstance(tuned.code, jc.KernelCode), tuned
    tuned.save(tmp_path)
    loaded = jc.load_tuned(tmp_path)
    expected = tuned.coded(sweep)(x, np.arange(12) > 1)
    np.testing.assert_array_equal(loaded.coded(sweep)(x, np.arange(12) > 1), expected)
    again = cloudpickle.loads(cloudpickle.dumps(tuned.coded(sweep)))
    np.testing.assert_array_equal(again(x, np.arange(12) > 1), expected)


@pytest.mark.long
def test_tuning_measures_what_coded_computes():
    x = np.random.default_rng(0).uniform(-1, 1, (36, 2)).astype(np.float32)
    tuned = jc.tune(curve, x, K, N, Uniform(3), batch_size=18, layouts={"kernel": CODE}, num_masks=8, progress=False)
    masks = jax.vmap(lambda key: Uniform(3).sample(key, N))(jax.random.split(jax.random.key(0), 8))
    predict = tuned.coded(curve)
    squares = [
        tuning.squared_error(predict(x[i : i + 18], mask), curve(x[i : i + 18])) for mask in masks for i in (0, 18)
    ]
    np.testing.assert_allclose(tuned.candidates[0].loss, np.mean(squares), rtol=0.02)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_workers": 3}, "num_workers is 3; expected at least num_data, 6"),
        ({"length": 0.0}, "length is 0.0; expected a number above 0"),
        ({"length": np.ones(2)}, "length is .*; expected a number above 0"),
        ({"late": 2}, "late is 2; expected a share"),
        ({"process": 0.3}, "process is 0.3; expected a Process"),
        ({"metric": 1.0}, "metric is 1.0; expected finite numbers"),
        ({"metric": np.array([1.0, np.nan])}, "metric is .*; expected finite numbers"),
    ],
)
def test_errors_name_the_argument(unchecked, arguments, message):
    with pytest.raises(ValueError, match=message):
        jc.KernelCode(**({"num_data": K, "num_workers": N} | arguments))


def test_errors_of_plans():
    with pytest.raises(ValueError, match="plan is None; expected"):
        CODE.encode(X[:K])
    with pytest.raises(ValueError, match="plan is None; expected"):
        CODE.encoder_matrix()
    with pytest.raises(ValueError, match="expected a group of num_data, 6"):
        CODE.plan(X)
    with pytest.raises(ValueError, match="dtype bool; expected real numbers"):
        jc.KernelCode(2, 3).plan(np.arange(2, dtype=np.int32) > 0)
    with pytest.raises(ValueError, match="features returned shape"):
        jc.KernelCode(2, 3, features=jnp.sum).plan(X[:2])
    with pytest.raises(ValueError, match=r"metric has shape .*; expected a row for each of 2 features"):
        jc.KernelCode(2, 3, metric=np.ones(3)).plan(X[:2])
