"""Computes the published experiments as functions of (trials, seed), in float64, for tests and for a command."""

import jax
import jax.numpy as jnp
import numpy as np

import jaxcode as jc

SMOOTHINGS = 10.0 ** np.arange(-9, 0.1, 0.5)
NOISE = 0.1


def wave(x):
    """Computes the function of E1 and of the noisy workers."""
    return x * jnp.sin(x)


def slopes(trials, seed, counts=(120, 180, 240, 360, 480), num_data=10, num_stragglers=5):
    """Computes E1: each code's slope of log mean squared error against log N, and its standard error."""
    results = {}
    for name, make in (("LeTCC", jc.SplineCode.chebyshev), ("BACC", jc.BerrutCode.chebyshev)):
        means = []
        for count in counts:
            key = jax.random.key(seed)
            x, returned = _draw(jax.random.fold_in(key, count), trials, num_data, count, num_stragglers)
            errors = _squared_errors(make(num_data, count), wave, x, jnp.zeros((trials, count)), returned)
            means.append(np.log(float(errors.mean())))
        fit, covariance = np.polyfit(np.log(counts), means, 1, cov=True)
        results[name] = float(fit[0]), float(np.sqrt(covariance[0, 0]))
    return results


def crossover(trials, seed, straggler_counts, num_data=5, num_workers=20, degree=3):
    """Computes E6: {S: mean squared errors of every trial of Lagrange coding, of LeTCC} on random polynomials."""
    codes = (
        jc.LagrangeCode.chebyshev(num_data, num_workers, degree=degree),
        jc.SplineCode.chebyshev(num_data, num_workers),
    )
    results = {}
    for count in straggler_counts:
        key = jax.random.fold_in(jax.random.key(seed), count)
        x, returned = _draw(key, trials, num_data, num_workers, count)
        coefficients = jax.random.normal(jax.random.fold_in(key, 1), (trials, degree + 1))
        noise = jnp.zeros((trials, num_workers))
        results[count] = tuple(
            np.asarray(_squared_errors(code, jnp.polyval, x, noise, returned, coefficients)) for code in codes
        )
    return results


def range_of_means(errors, trials=200):
    """Computes the 5 % and 95 % quantiles of means over `trials` errors: where a run of that size may land."""
    means = np.asarray(errors).reshape(-1, trials).mean(axis=1)
    return tuple(np.quantile(means, [0.05, 0.95]))


def noisy_workers(trials, seed, counts, num_data=10, num_stragglers=5):
    """Computes {N: (mean and standard error of LeTCC at its best smoothing, that smoothing, those of BACC)}."""
    results = {}
    for count in counts:
        key = jax.random.fold_in(jax.random.key(seed), count)
        x, returned = _draw(key, trials, num_data, count, num_stragglers)
        noise = NOISE * jax.random.normal(jax.random.fold_in(key, 1), (trials, count))
        nodes = jc.nodes.chebyshev(num_data, count)

        def with_smoothing(smoothing, nodes=nodes, x=x, noise=noise, returned=returned):
            code = jc.SplineCode(nodes.data, nodes.workers, decoder_smoothing=smoothing)
            return _squared_errors(code, wave, x, noise, returned)

        errors = np.asarray(jax.lax.map(with_smoothing, jnp.asarray(SMOOTHINGS)))
        best = int(np.argmin(errors.mean(axis=1)))
        berrut = _mean(_squared_errors(jc.BerrutCode.chebyshev(num_data, count), wave, x, noise, returned))
        results[count] = _mean(errors[best]), float(SMOOTHINGS[best]), berrut
    return results


def _draw(key, trials, num_data, num_workers, num_stragglers):
    """Draws ascending inputs, uniform on [-1, 1], (trials, K), and masks of those that returned, (trials, N)."""
    keys = jax.random.split(key, 2)
    stragglers = jc.stragglers.Uniform(num_stragglers)
    sample = jax.vmap(lambda trial_key: stragglers.sample(trial_key, num_workers=num_workers))
    x = jnp.sort(jax.random.uniform(keys[0], (trials, num_data), minval=-1.0))
    return x, sample(jax.random.split(keys[1], trials))


def _squared_errors(code, f, x, noise, returned, coefficients=None):
    """Computes every trial's mean squared error; f takes a trial's coefficients first where there are any."""

    def squared_error(x, noise, returned, coefficients):
        worker = f if coefficients is None else lambda z: f(coefficients, z)
        decoded = code.decode(worker(code.encode(x)) + noise, returned)
        return jnp.mean((decoded - worker(x)) ** 2)

    axes = (0, 0, 0, None if coefficients is None else 0)
    return jax.jit(jax.vmap(squared_error, axes))(x, noise, returned, coefficients)


def _mean(samples):
    """Computes the mean and its standard error."""
    samples = np.asarray(samples)
    return float(samples.mean()), float(samples.std(ddof=1) / np.sqrt(len(samples)))
