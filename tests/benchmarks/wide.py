"""Times encoders and decoders of wide data against a plain matrix product: `python -m tests.benchmarks.wide`.

Measures also the figures behind `MAX_ENTRIES_IN_MATRIX` in `jaxcode/interpolants/spline/linop.py`.
"""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np

from jaxcode import SplineCode
from jaxcode.interpolants.spline import linop

from .timing import Report, progress, run_script, time_programs

SMOOTHING = 1e-6
FEATURES = 150_528  # 224 x 224 x 3


def measure(report: Report):
    measure_images(report, jnp.float32)
    measure_images(report, jnp.bfloat16)
    measure_images(report, jnp.float16)
    measure_many_workers(report)
    measure_matrix_and_blocks(report)


def measure_images(report, dtype):
    """Times the coding of 20 images of 224 x 224 x 3 for 60 workers, a third of which did not return."""
    num_data, num_workers = 20, 60
    code = SplineCode.chebyshev(num_data, num_workers, decoder_smoothing=SMOOTHING)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(num_data, FEATURES)), dtype)
    y = jnp.asarray(rng.normal(size=(num_workers, FEATURES)), dtype)
    mask = np.arange(num_workers) % 3 != 0
    encode, decode, on_device = jax.jit(code.encode), jax.jit(code.decode), jnp.asarray(mask)
    encoder_matrix = code.encoder_matrix().astype(dtype)
    decoder_matrix = code.decoder_matrix(mask).astype(dtype)
    matmul = jax.jit(functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST))
    copy = jax.jit(jnp.copy)
    times = time_programs(
        {
            "encode": lambda: encode(x),
            "jnp.matmul, (60, 20) (20, 150528)": lambda: matmul(encoder_matrix, x),
            "decode, from a fresh mask": lambda: decode(y, on_device),
            "jnp.matmul, (20, 60) (60, 150528)": lambda: matmul(decoder_matrix, y),
            "copy of (60, 150528)": lambda: copy(y),
        },
        seconds=8,
    )
    name = jnp.dtype(dtype).name
    for operation, ours, theirs, compiled, args in (
        ("encode", "encode", "jnp.matmul, (60, 20) (20, 150528)", encode, (x,)),
        ("decode", "decode, from a fresh mask", "jnp.matmul, (20, 60) (60, 150528)", decode, (y, on_device)),
    ):
        ratio = times[ours] / times[theirs]
        report.add(f"{operation} (20, {FEATURES}) and 60, {name}: ours / matmul", ratio, upper_limit=1.15)
        # No limit for narrow data on CPUs, which widen them to multiply them, in a plain product too.
        memory_limit = 1.3 if dtype == jnp.float32 or jax.default_backend() != "cpu" else None
        memory = _memory(compiled, *args)
        report.add(f"  memory at its peak / inputs and outputs: {operation}", memory, upper_limit=memory_limit)
    report.add_times(times)


def measure_many_workers(report):
    """Times blocks against one matrix where there are many knots."""
    num_data, num_workers, features = 1024, 4096, 4096
    code = SplineCode.chebyshev(num_data, num_workers, decoder_smoothing=SMOOTHING)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(num_data, features)), jnp.float32)
    y = jnp.asarray(rng.normal(size=(num_workers, features)), jnp.float32)
    mask = np.arange(num_workers) % 3 != 0
    encode, decode, on_device = jax.jit(code.encode), jax.jit(code.decode), jnp.asarray(mask)
    encoder_matrix, decoder_matrix = code.encoder_matrix(), code.decoder_matrix(mask)
    matmul = jax.jit(functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST))
    times = time_programs(
        {
            "encode": lambda: encode(x),
            "jnp.matmul, (4096, 1024) (1024, 4096)": lambda: matmul(encoder_matrix, x),
            "decode, from a fresh mask": lambda: decode(y, on_device),
            "jnp.matmul, (1024, 4096) (4096, 4096)": lambda: matmul(decoder_matrix, y),
        },
        seconds=10,
    )
    names = list(times)
    for ours, theirs in zip(names[::2], names[1::2], strict=True):
        report.add(
            f"{ours.split(',')[0]}, N=4096, K=1024, d=4096: matmul / ours", times[theirs] / times[ours], lower_limit=5
        )
    report.add_times(times)


def measure_matrix_and_blocks(report):
    """Times the decoding of wide data from a fresh mask by one matrix and by blocks, K = N / 3."""
    columns = 65_536
    medians: dict[str, dict[int, float]] = {"one matrix": {}, "blocks": {}}
    limit = linop.MAX_ENTRIES_IN_MATRIX
    for n in progress((96, 192, 288, 384, 480, 768, 1152), "N"):
        code = SplineCode.chebyshev(n // 3, n, decoder_smoothing=SMOOTHING)
        y = jnp.asarray(np.random.default_rng(0).normal(size=(n, columns)), jnp.float32)
        mask = jnp.asarray(np.arange(n) % 3 != 0)
        programs = {}
        for form, most in (("one matrix", 10**9), ("blocks", 0)):
            linop.MAX_ENTRIES_IN_MATRIX = most
            try:
                decode = jax.jit(functools.partial(code.decode)).lower(y, mask).compile()
            finally:
                linop.MAX_ENTRIES_IN_MATRIX = limit
            programs[form] = functools.partial(decode, y, mask)
        for form, seconds in time_programs(programs, seconds=1).items():
            medians[form][n + n // 3] = float(np.median(seconds))
    for size in medians["blocks"]:
        chosen, other = ("one matrix", "blocks") if size <= limit else ("blocks", "one matrix")
        report.add(
            f"n + p = {size}, {columns} columns: {chosen} / {other}", medians[chosen][size] / medians[other][size]
        )
    report.series["seconds against n + p"] = medians


def _memory(compiled, *args):
    analysis = compiled.lower(*args).compile().memory_analysis()
    input_and_output = analysis.argument_size_in_bytes + analysis.output_size_in_bytes
    return (input_and_output + analysis.temp_size_in_bytes) / input_and_output


if __name__ == "__main__":
    sys.exit(run_script(measure, __doc__))
