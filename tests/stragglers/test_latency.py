"""Latencies of workers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from jaxcode import stragglers as sg

from .cases import LATENCIES, SMALLEST_P_VALUE, draw


@pytest.mark.parametrize(("model", "law"), LATENCIES.values(), ids=LATENCIES)
@pytest.mark.parametrize("x64", [False, True])
def test_latency_follows_its_law(model, law, x64):
    with jax.enable_x64(x64):
        seconds = np.asarray(model.sample(jax.random.key(0), 20_000))
    assert scipy.stats.kstest(seconds, law.cdf).pvalue > SMALLEST_P_VALUE


@pytest.mark.parametrize(("model", "law"), LATENCIES.values(), ids=LATENCIES)
def test_workers_and_draws_are_independent(model, law):
    uniform = law.cdf(np.asarray(draw(model, jax.random.key(0), 2)))
    for pair in (uniform, np.column_stack((uniform[:-1, 0], uniform[1:, 1]))):
        assert scipy.stats.spearmanr(pair).pvalue > SMALLEST_P_VALUE


def test_empirical_draws_each_measurement_equally_often():
    measured = [0.1, 0.2, 0.4, 0.4, np.inf]
    values, counts = np.unique(sg.Empirical(measured).sample(jax.random.key(0), 20_000), return_counts=True)
    np.testing.assert_allclose(values, np.unique(measured), rtol=1e-6)
    assert scipy.stats.chisquare(counts, 4000 * np.array([1, 1, 2, 1])).pvalue > SMALLEST_P_VALUE


def test_workers_of_one_host_correlate_and_others_do_not():
    # All but normal, with variances in the ratio 1 to 3. Seven workers by three: the last host has one.
    model = sg.CorrelatedByHost(sg.LogNormal(1, 0.01), sg.LogNormal(1, 0.01 * 3**0.5), 3)
    seconds = np.asarray(draw(model, jax.random.key(0), 7, 20_000))
    host = np.arange(7) // 3
    expected = np.where(host[:, None] == host, 3 / 4, 0) * (1 - np.eye(7)) + np.eye(7)
    # A normal sample's correlation has standard error (1 - r^2) / sqrt(n).
    error = (1 - expected**2) / np.sqrt(20_000)
    assert (np.abs(np.corrcoef(seconds.T) - expected) <= 5 * error + 1e-6).all()


def test_hosts_are_runs_of_workers_and_nest_into_racks():
    same = sg.LogNormal(1.0, 0.0)
    racks = sg.CorrelatedByHost(same, sg.ShiftedExponential(0, 1), 2)
    seconds = np.asarray(sg.CorrelatedByHost(same, racks, 3).sample(jax.random.key(0), 14))
    runs = np.flatnonzero(np.diff(seconds)) + 1
    assert runs.tolist() == [6, 12]


@pytest.mark.parametrize(
    ("latency", "law"),
    [
        (lambda p: sg.ShiftedExponential(p, 2 * p), lambda p: scipy.stats.expon(p, 2 * p)),
        (lambda p: sg.Pareto(p, 3 * p), lambda p: scipy.stats.pareto(3 * p, scale=p)),
        (lambda p: sg.LogNormal(p, p), lambda p: scipy.stats.lognorm(p, scale=p)),
    ],
    ids=["shifted exponential", "pareto", "lognormal"],
)
def test_latency_differentiates_along_its_quantiles(latency, law):
    key, p, step = jax.random.key(0), 0.5, 1e-5
    with jax.enable_x64(True):
        slope = jax.jacfwd(lambda p: latency(p).sample(key, 20))(p)
        rank = law(p).cdf(np.asarray(latency(p).sample(key, 20)))
    expected = (law(p + step).ppf(rank) - law(p - step).ppf(rank)) / (2 * step)
    np.testing.assert_allclose(slope, expected, rtol=1e-6)


@pytest.mark.parametrize("bad", [[], [0.1, np.nan], [0.1, -0.2], jnp.array([0.1, jnp.nan])])
def test_bad_samples_are_named(bad):
    with pytest.raises(ValueError, match=r"^samples.* (is|has shape) .*; expected .*: "):
        sg.Empirical(bad)


@pytest.mark.parametrize("bad", [0.1, np.ones((2, 1)), jnp.ones((1, 2)), "fast", None, [0.1, "fast"], [[0.1], 0.2]])
def test_samples_have_one_axis_of_numbers(unchecked, bad):
    with pytest.raises(ValueError, match=r"samples (is|has shape) .*; expected"):
        sg.Empirical(bad)


def test_samples_are_copied():
    measured = np.ones(3)
    latency = sg.Empirical(measured)
    measured[:] = 2
    assert (latency.sample(jax.random.key(0), 5) == 1).all()
