"""The published experiments as functions of (trials, seed), in float64; the tests check them, a command prints them."""

import jax
import jax.numpy as jnp
import numpy as np

import jaxcode as jc

SMOOTHINGS = 10.0 ** np.arange(-9, 0.1, 0.5)
NOISE = 0.1


def wave(x):
    """The function of E1 and of the noisy case."""
    return x * jnp.sin(x)


def slopes(trials, seed, counts=(120, 180, 240, 360, 480), num_data=10, num_stragglers=5):
    """E1: slope of log mean squared error against log N and its standard error, for each code."""
    found = {}
    for name, make in (("LeTCC", jc.SplineCode.chebyshev), ("BACC", jc.BerrutCode.chebyshev)):
        means = []
        for count in counts:
            key = jax.random.key(seed)
            x, returned = _draw(jax.random.fold_in(key, count), trials, num_data, count, num_stragglers)
            errors = _squared_errors(make(num_data, count), wave, x, jnp.zeros((trials, count)), returned)
            means.append(np.log(float(errors.mean())))
        fit, covariance = np.polyfit(np.log(counts), means, 1, cov=True)
        found[name] = float(fit[0]), float(np.sqrt(covariance[0, 0]))
    return found


def crossover(trials, seed, straggler_counts, num_data=5, num_workers=20, degree=3):
    """E6: {S: mean squared errors of every trial of Lagrange coding, of LeTCC} on random polynomials."""
    codes = (
        jc.LagrangeCode.chebyshev(num_data, num_workers, degree=degree),
        jc.SplineCode.chebyshev(num_data, num_workers),
    )
    found = {}
    for count in straggler_counts:
        key = jax.random.fold_in(jax.random.key(seed), count)
        x, returned = _draw(key, trials, num_data, num_workers, count)
        coefficients = jax.random.normal(jax.random.fold_in(key, 1), (trials, degree + 1))
        silence = jnp.zeros((trials, num_workers))
        found[count] = tuple(
            np.asarray(_squared_errors(code, jnp.polyval, x, silence, returned, coefficients)) for code in codes
        )
    return found


def range_of_means(errors, trials=200):
    """The 5 % and 95 % quantiles of the mean over `trials` of them: where a run of that size may land."""
    means = np.asarray(errors).reshape(-1, trials).mean(axis=1)
    return tuple(np.quantile(means, [0.05, 0.95]))


def noisy(trials, seed, counts, num_data=10, num_stragglers=5):
    """Noisy workers: {N: (mean and standard error of LeTCC at its best smoothing, that smoothing, those of BACC)}."""
    found = {}
    for count in counts:
        key = jax.random.fold_in(jax.random.key(seed), count)
        x, returned = _draw(key, trials, num_data, count, num_stragglers)
        noise = NOISE * jax.random.normal(jax.random.fold_in(key, 1), (trials, count))
        spline = jc.SplineCode.chebyshev(num_data, count)

        def with_smoothing(smoothing, spline=spline, x=x, noise=noise, returned=returned):
            code = jc.SplineCode(spline.nodes.data, spline.nodes.workers, decoder_smoothing=smoothing)
            return _squared_errors(code, wave, x, noise, returned)

        tried = np.asarray(jax.lax.map(with_smoothing, jnp.asarray(SMOOTHINGS)))
        best = int(np.argmin(tried.mean(axis=1)))
        berrut = _mean(_squared_errors(jc.BerrutCode.chebyshev(num_data, count), wave, x, noise, returned))
        found[count] = _mean(tried[best]), float(SMOOTHINGS[best]), berrut
    return found


def _draw(key, trials, num_data, num_workers, num_stragglers):
    """Inputs uniform on [-1, 1] in ascending order, and straggler sets: (trials, K) and (trials, N)."""
    keys = jax.random.split(key, 2)
    stragglers = jc.stragglers.Uniform(num_stragglers)
    sample = jax.vmap(lambda one: stragglers.sample(one, num_workers=num_workers))
    x = jnp.sort(jax.random.uniform(keys[0], (trials, num_data), minval=-1.0))
    return x, sample(jax.random.split(keys[1], trials))


def _squared_errors(code, f, x, noise, returned, coefficients=None):
    """Mean squared error of every trial; f is given a trial's coefficients first where there are any."""

    def one(x, noise, returned, coefficients):
        worker = f if coefficients is None else lambda z: f(coefficients, z)
        decoded = code.decode(worker(code.encode(x)) + noise, returned)
        return jnp.mean((decoded - worker(x)) ** 2)

    axes = (0, 0, 0, None if coefficients is None else 0)
    return jax.jit(jax.vmap(one, axes))(x, noise, returned, coefficients)


def _mean(samples):
    samples = np.asarray(samples)
    return float(samples.mean()), float(samples.std(ddof=1) / np.sqrt(len(samples)))
