"""Measures what coding adds to a model's call: `python -m tests.benchmarks.pipeline`."""

import itertools
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx

import jaxcode as jc
from models.lenet5 import LeNet5

from .timing import Report, progress, race, run_script


def measure(report: Report):
    lenet5(report)
    vision_transformer(report)
    dispatch(report)
    first_call(report)


def lenet5(report):
    """Measures batch 400, K = 20, N = 100, a fifth of the workers late."""
    model, x = LeNet5(rngs=nnx.Rngs(0)), normal(400, 28, 28, 1)
    parts(report, "LeNet5, batch 400, (N, K) = (100, 20)", model, x, jc.SplineCode.chebyshev(20, 100), (5, 100))


def vision_transformer(report):
    """Measures batch 8, K = 8, N = 12, two workers late."""
    model, x = VisionTransformer(nnx.Rngs(0)), normal(8, 224, 224, 3)
    parts(report, "ViT-B/16, batch 8, (N, K) = (12, 8)", model, x, jc.SplineCode.chebyshev(8, 12), (1, 2), rounds=3)


def parts(report, what, model, x, code, at_most, *, rounds=7):
    """Measures the share of a coded call that is not the model's, part by part, and of ordering the batch."""
    predict = jc.coded(model, code)
    groups = -(-x.shape[0] // code.num_data)
    by_group = x.reshape(code.num_data, groups, *x.shape[1:])
    encode, decode = jax.jit(code.encode), jax.jit(code.decode)
    order = jax.jit(lambda x: jc.ordering.greedy(x, code.num_data))
    traced_decoder = jax.jit(code.decoder_linop)
    graph, params = nnx.split(model)
    model_only = jax.jit(lambda params, x: nnx.merge(graph, params)(x))
    coded_inputs = encode(by_group).reshape(groups * code.num_workers, *x.shape[1:])
    answers = model_only(params, coded_inputs).reshape(code.num_workers, groups, -1)
    mask = np.arange(code.num_workers) % 5 != 0
    on_device = jnp.asarray(mask)
    times = race(
        {
            "coded call": lambda: predict(x, mask),
            f"the model alone on {len(coded_inputs)} inputs": lambda: model_only(params, coded_inputs),
            "order": lambda: order(x),
            "encode": lambda: encode(by_group),
            "mask to decoder and decode, compiled": lambda: decode(answers, on_device),
            "mask to decoder in float64, compiled": lambda: traced_decoder(on_device),
            "mask to decoder in float64, on the host": lambda: code.decoder_linop(mask),
        },
        rounds=rounds,
    )
    call_times = times["coded call"]
    coding = times["encode"] + times["mask to decoder and decode, compiled"]
    report.add(f"{what}: encode to decode", 100 * coding / call_times, "%", at_most=at_most[0])
    report.add("  ordering the batch", 100 * times["order"] / call_times, "%", at_most=at_most[1])
    for where in ("compiled", "on the host"):
        share = times[f"mask to decoder in float64, {where}"] / call_times
        report.add(f"  the algebra in float64, {where}", 100 * share, "%", at_most=2)
    report.times(times)


def dispatch(report):
    """Measures a call whose arithmetic takes no time, of a model with ten arrays of parameters.

    Between calls the caller does something else for a while, or calls again immediately. In the second case JAX's
    threads on a CPU are still awake from the last call, if the next begins within some 20 us: the model's are, and
    those of a coded call, which first prepares a decoder for its mask, may not be.
    """
    code = jc.SplineCode.chebyshev(20, 100)
    module = linen.Sequential([linen.Dense(2) for _ in range(5)])
    x, coded_inputs = normal(20, 2), normal(100, 2)
    variables = module.init(jax.random.key(0), x)
    model_only, predict = jax.jit(module.apply), jc.coded((module, variables), code)
    rng = np.random.default_rng(0)
    mask = rng.permutation(100) >= 20
    on_device = jnp.asarray(mask)
    # More masks than are cached, so that each is fresh when its turn comes again.
    fresh = itertools.cycle([rng.permutation(100) >= 20 for _ in range(1000)])
    contenders = {
        "the model alone, 100 inputs": lambda: model_only(variables, coded_inputs),
        "coded call, a mask seen before": lambda: predict(x, mask),
        "coded call, a mask seen before, in a JAX array": lambda: predict(x, on_device),
        "coded call, all workers returned": lambda: predict(x),
        "coded call, a fresh mask": lambda: predict(x, next(fresh)),
    }
    numbers = rng.normal(size=20_000)
    print("dispatch above the model's own:")
    for suffix, between in {"": lambda: np.sort(numbers), ", immediately": None}.items():
        times = race(contenders, between=between)
        base = times["the model alone, 100 inputs"]
        for what in list(times)[1:]:
            at_most = 300 if "fresh" in what else 150
            report.add(f"  {what}{suffix}", (times[what] - base) * 1e6, "us", at_most=at_most)


def first_call(report):
    """Measures the time from nothing compiled to the first result."""
    code = jc.SplineCode.chebyshev(20, 100)
    model, x = LeNet5(rngs=nnx.Rngs(0)), normal(20, 28, 28, 1)
    coded_inputs = normal(100, 28, 28, 1)
    graph, params = nnx.split(model)
    mask = np.arange(100) % 5 != 0
    coded_times, jitted_times = [], []
    for _ in progress(range(9), "first calls"):
        jax.clear_caches()
        start = time.perf_counter()
        predict = jc.coded(model, code)
        jax.block_until_ready(predict(x, mask))
        coded_times.append(time.perf_counter() - start)
        jax.clear_caches()
        start = time.perf_counter()
        jax.block_until_ready(jax.jit(lambda params, x: nnx.merge(graph, params)(x))(params, coded_inputs))
        jitted_times.append(time.perf_counter() - start)
    coded_times, jitted_times = np.asarray(coded_times[1:]), np.asarray(jitted_times[1:])
    report.add("first call of coded LeNet5 / of LeNet5 jitted", coded_times / jitted_times, at_most=2)
    report.times({"coded": coded_times, "jitted": jitted_times})


class VisionTransformer(nnx.Module):
    """Has the sizes of ViT-B/16 (Dosovitskiy et al. 2021), pre-norm, mean-pooled: 17 GFLOP for an image."""

    def __init__(self, rngs: nnx.Rngs, width: int = 768, depth: int = 12, heads: int = 12):
        self.patches = nnx.Conv(3, width, (16, 16), strides=(16, 16), rngs=rngs)
        self.places = nnx.Param(jax.random.normal(rngs.params(), (196, width)) * 0.02)
        self.blocks = nnx.List([Block(width, heads, rngs) for _ in range(depth)])
        self.head = nnx.Linear(width, 1000, rngs=rngs)

    def __call__(self, x):
        x = self.patches(x).reshape(x.shape[0], 196, -1) + self.places[...]
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(axis=1))


class Block(nnx.Module):
    def __init__(self, width: int, heads: int, rngs: nnx.Rngs):
        self.norm1, self.norm2 = nnx.LayerNorm(width, rngs=rngs), nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(heads, width, decode=False, rngs=rngs)
        self.widen, self.narrow = nnx.Linear(width, 4 * width, rngs=rngs), nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.narrow(nnx.gelu(self.widen(self.norm2(x))))


def normal(*shape):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


if __name__ == "__main__":
    sys.exit(run_script(measure, __doc__))
