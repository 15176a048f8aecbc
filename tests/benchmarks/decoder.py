"""Times the decoder for a fresh mask against other splines: `python -m tests.benchmarks.decoder`.

This is the time of a server between the last answer and the first decoded result. The other libraries fit the identity,
at the knots that returned. The unit of interpax's smoothing is another, which makes no difference to its time.
"""

import functools
import sys

import csaps
import interpax
import jax
import jax.numpy as jnp
import numpy as np
from scipy.interpolate import make_smoothing_spline

from jaxcode import SplineCode, nodes
from jaxcode.interpolants.spline import fit_and_evaluate

from .timing import Report, progress, run_script, time_programs

SMOOTHING = 1e-6
SIZES = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
COLUMNS = 64


def measure(report: Report):
    measure_small_masks(report)
    measure_large_mask(report)
    measure_cost_by_size(report)


def measure_small_masks(report):
    num_data, num_workers, count = 20, 64, 64
    code = SplineCode.chebyshev(num_data, num_workers, decoder_smoothing=SMOOTHING)
    rng = np.random.default_rng(0)
    masks = np.stack([rng.permutation(num_workers) >= num_workers // 4 for _ in range(count)])
    on_device = jnp.asarray(masks)
    batched = jax.jit(jax.vmap(code.decoder_matrix))
    # The same number of answers in each, so that interpax can be batched too.
    knots = jnp.asarray(np.stack([code.nodes.workers[mask] for mask in masks]))
    batched_interpax = jax.jit(jax.vmap(lambda t: interpax_values(t, jnp.eye(t.shape[0]), code.nodes.data, 1.0)))
    np.testing.assert_allclose(batched(on_device)[0][:, masks[0]], scipy_matrix(code, masks[0]), atol=1e-5)
    times = time_programs(
        {
            "jaxcode, one compiled program": lambda: batched(on_device),
            "jaxcode, a loop on the host": lambda: [code.decoder_linop(mask) for mask in masks],
            "SciPy, a loop": lambda: [scipy_matrix(code, mask) for mask in masks],
            "csaps, a loop": lambda: [csaps_matrix(code, mask) for mask in masks],
            "interpax, one compiled program": lambda: batched_interpax(knots),
        }
    )
    report.add(
        f"{count} random masks of N={num_workers}, K={num_data}: SciPy / ours",
        times["SciPy, a loop"] / times["jaxcode, one compiled program"],
        lower_limit=10,
    )
    report.add_times(times)


def measure_large_mask(report):
    num_data, num_workers = 20, 1024
    code = SplineCode.chebyshev(num_data, num_workers, decoder_smoothing=SMOOTHING)
    mask = np.random.default_rng(0).permutation(num_workers) >= num_workers // 4
    on_device = jnp.asarray(mask)
    compiled = jax.jit(code.decoder_matrix)
    as_linop = jax.jit(code.decoder_linop)
    times = time_programs(
        {
            "jaxcode, as a matrix": lambda: compiled(on_device),
            "jaxcode, as blocks to apply": lambda: as_linop(on_device),
            "SciPy": lambda: scipy_matrix(code, mask),
            "csaps": lambda: csaps_matrix(code, mask),
        }
    )
    report.add(
        f"one mask of N={num_workers}, K={num_data}: SciPy / ours as a matrix",
        times["SciPy"] / times["jaxcode, as a matrix"],
        lower_limit=3,
    )
    report.add_times(times)


def measure_cost_by_size(report):
    """Times the fit for a fresh mask to a fixed number of columns, and its values at N / 4 points."""
    medians: dict[str, dict[int, float]] = {}
    memory = {}
    for n in progress(SIZES, "N"):
        t, points = nodes.chebyshev_second(n), nodes.chebyshev_first(n // 4)
        mask = np.random.default_rng(0).permutation(n) >= n // 4
        y = jnp.asarray(np.random.default_rng(1).normal(size=(n, COLUMNS)), jnp.float32)
        y_float64 = np.asarray(y, np.float64)
        ours = jax.jit(functools.partial(_fit, t, points))
        compiled = ours.lower(y, jnp.asarray(mask)).compile()
        memory[n] = compiled.memory_analysis().temp_size_in_bytes / n
        on_device, knots = jnp.asarray(mask), jnp.asarray(t[mask])
        programs = {
            "jaxcode": functools.partial(ours, y, on_device),
            "SciPy": functools.partial(scipy_values, t[mask], y_float64[mask], points, SMOOTHING),
            "csaps": functools.partial(csaps_values, t[mask], y_float64[mask], points, 1 / (1 + SMOOTHING)),
            "interpax": functools.partial(jax.jit(interpax_values), knots, y[mask], points, 1 / (1 + SMOOTHING)),
        }
        for name, seconds in time_programs(programs, seconds=1.5).items():
            medians.setdefault(name, {})[n] = float(np.median(seconds))
    ours = medians["jaxcode"]
    large_sizes = [n for n in SIZES if n >= 256]
    report.add(
        f"seconds ~ N^x from N=256 to 8192, {COLUMNS} columns: x",
        np.polyfit(np.log(large_sizes), np.log([ours[n] for n in large_sizes]), 1)[0],
        upper_limit=1.15,
    )
    report.add(
        "bytes of memory ~ N^x from N=256 to 8192: x",
        np.polyfit(np.log(large_sizes), np.log([n * memory[n] for n in large_sizes]), 1)[0],
        upper_limit=1.15,
    )
    report.add("  bytes per knot at N=8192", memory[8192])
    for name, by_size in medians.items():
        report.add(f"  {name} at N=8192", by_size[8192] * 1e3, "ms")
    report.series["seconds against N"] = medians


def _fit(t, points, y, mask):
    return fit_and_evaluate(t, y, points, smoothing=SMOOTHING, returned=mask)


def scipy_matrix(code, mask):
    t = code.nodes.workers[mask]
    return scipy_values(t, np.eye(len(t)), code.nodes.data, len(t) * SMOOTHING)


def csaps_matrix(code, mask):
    t = code.nodes.workers[mask]
    return csaps_values(t, np.eye(len(t)), code.nodes.data, 1 / (1 + len(t) * SMOOTHING))


def scipy_values(t, y, points, smoothing):
    return make_smoothing_spline(t, y, lam=smoothing)(points)


def csaps_values(t, y, points, smooth):
    return csaps.csaps(t, y.T, points, smooth=smooth).T


def interpax_values(t, y, points, smooth):
    return interpax.CubicSmoothingSpline(t, y, smooth, check=False)(points)


if __name__ == "__main__":
    sys.exit(run_script(measure, __doc__))
