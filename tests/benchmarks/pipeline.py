"""Measures what coding adds to a model's call: `python -m tests.benchmarks.pipeline`."""

import itertools
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx

import jaxcode as jc
from jaxcode.pipeline import decode, encode, group, plan_groups
from models.lenet5 import LeNet5

from .timing import Report, progress, run_script, time_programs


def measure(report: Report):
    measure_lenet5(report)
    measure_vision_transformer(report)
    measure_prior(report)
    measure_dispatch(report)
    measure_first_call(report)


def measure_lenet5(report):
    """Measures LeNet5: batch 400, K = 20, N = 100, twenty workers late."""
    model, x = LeNet5(rngs=nnx.Rngs(0)), normal(400, 28, 28, 1)
    measure_parts(report, "LeNet5, batch 400, (N, K) = (100, 20)", model, x, jc.SplineCode.chebyshev(20, 100), (5, 100))


def measure_vision_transformer(report):
    """Measures ViT-B/16: batch 8, K = 8, N = 12, three workers late."""
    model, x = VisionTransformer(nnx.Rngs(0)), normal(8, 224, 224, 3)
    code = jc.SplineCode.chebyshev(8, 12)
    measure_parts(report, "ViT-B/16, batch 8, (N, K) = (12, 8)", model, x, code, (1, 2), rounds=3)


def measure_parts(report, name, model, x, code, upper_limits, *, rounds=7):
    """Measures the share of a coded call that is not the model's, part by part, and of ordering the batch."""
    predict = jc.coded(model, code)
    groups = -(-x.shape[0] // code.num_data)
    by_group = x.reshape(code.num_data, groups, *x.shape[1:])
    encode_group, decode_group = jax.jit(code.encode), jax.jit(code.decode)
    order = jax.jit(lambda x: jc.ordering.greedy(x, code.num_data))
    traced_decoder = jax.jit(code.decoder_linop)
    graph, params = nnx.split(model)
    model_only = jax.jit(lambda params, x: nnx.merge(graph, params)(x))
    coded_inputs = encode_group(by_group).reshape(groups * code.num_workers, *x.shape[1:])
    answers = model_only(params, coded_inputs).reshape(code.num_workers, groups, -1)
    mask = np.arange(code.num_workers) % 5 != 0
    on_device = jnp.asarray(mask)
    times = time_programs(
        {
            "coded call": lambda: predict(x, mask),
            f"the model alone on {len(coded_inputs)} inputs": lambda: model_only(params, coded_inputs),
            "order": lambda: order(x),
            "encode": lambda: encode_group(by_group),
            "mask to decoder and decode, compiled": lambda: decode_group(answers, on_device),
            "mask to decoder in float64, compiled": lambda: traced_decoder(on_device),
            "mask to decoder in float64, on the host": lambda: code.decoder_linop(mask),
        },
        rounds=rounds,
    )
    call_times = times["coded call"]
    coding = times["encode"] + times["mask to decoder and decode, compiled"]
    report.add(f"{name}: encode to decode", 100 * coding / call_times, "%", upper_limit=upper_limits[0])
    report.add("  ordering the batch", 100 * times["order"] / call_times, "%", upper_limit=upper_limits[1])
    for place in ("compiled", "on the host"):
        share = times[f"mask to decoder in float64, {place}"] / call_times
        report.add(f"  the algebra in float64, {place}", 100 * share, "%", upper_limit=2)
    report.add_times(times)


def measure_prior(report):
    """Measures LeNet5 with a prior, N = 30, K = 20, copies by risk; and what the same takes of a call of ViT-B/16."""
    model, x = LeNet5(rngs=nnx.Rngs(0)), normal(400, 28, 28, 1)
    code, stragglers = jc.ReplicationCode(20, 30), jc.stragglers.Uniform(5)
    prior = jc.surrogate(model, np.asarray(normal(600, 28, 28, 1)))
    predict = jc.coded(model, code, prior=prior, stragglers=stragglers, loss="disagreement")
    guess = jax.jit(lambda prior, x: prior.with_risk(x, "disagreement"))
    mask = np.arange(30) % 6 != 0
    times = time_programs(
        {
            "coded call with a prior": lambda: predict(x, mask),
            "surrogate": lambda: guess(prior, x),
            **prior_programs(code, prior, stragglers, x, num_classes=10),
        }
    )
    report_prior(report, "LeNet5, batch 400, (N, K) = (30, 20), prior", times, "coded call with a prior", 5)
    report.add("  the surrogate", 100 * times["surrogate"] / times["coded call with a prior"], "%")
    report.add_times(times)
    model, x = VisionTransformer(nnx.Rngs(0)), normal(8, 224, 224, 3)
    code = jc.ReplicationCode(8, 12)
    graph, params = nnx.split(model)
    model_only = jax.jit(lambda params, x: nnx.merge(graph, params)(x))
    coded_inputs = jnp.concatenate([x, x[:4]])
    times = time_programs(
        {
            "the model alone on 12 inputs": lambda: model_only(params, coded_inputs),
            **prior_programs(code, prior, jc.stragglers.Uniform(3), x, num_classes=1000),
        },
        rounds=3,
    )
    report_prior(report, "ViT-B/16, batch 8, (N, K) = (12, 8), prior", times, "the model alone on 12 inputs", 1)
    report.add_times(times)


def prior_programs(code, prior, stragglers, x, num_classes):
    """Makes the programs of a call with a prior but for the model's and the surrogate's."""
    planner = jc.allocation.PriorPlanner(prior, jc.allocation.lost_probability(stragglers, code.num_workers), "loss")
    size = len(x)
    risk = jnp.abs(normal(size))
    guesses = jc.allocation.Guesses(normal(size, num_classes), risk, risk)

    @jax.jit
    def plan_and_encode(x, guesses):
        order = jc.allocation.spread(guesses.risk, code.num_data)
        (x, guesses), _ = group((x, guesses), code.num_data, lambda tree, num_data: order)
        plans = plan_groups(code, planner, x, guesses, np.ones(x.shape[:2], bool))
        return encode(code, None, x, plans), plans

    @jax.jit
    def decode_planned(answers, returned, plans):
        return decode(code, None, answers, jc.outputs.as_returned, returned, plans)

    coded_inputs, plans = plan_and_encode(x, guesses)
    answers = normal(*coded_inputs.shape[:2], num_classes)
    returned = jnp.arange(code.num_workers) % 6 != 0
    return {
        "allocate and encode": lambda: plan_and_encode(x, guesses),
        "decode with a prior": lambda: decode_planned(answers, returned, plans),
    }


def report_prior(report, name, times, call, upper_limit):
    coding = times["allocate and encode"] + times["decode with a prior"]
    report.add(f"{name}: allocate to decode", 100 * coding / times[call], "%", upper_limit=upper_limit)


def measure_dispatch(report):
    """Measures calls of a model whose arithmetic takes no time and whose parameters are ten arrays.

    Between calls the caller computes something else for a while, or calls again immediately. In the second case JAX's
    threads on a CPU are still awake from the last call, if the next begins within some 20 us. This is so for the model
    alone; a coded call first prepares a decoder for its mask, and threads may sleep until it has.
    """
    code = jc.SplineCode.chebyshev(20, 100)
    module = linen.Sequential([linen.Dense(2) for _ in range(5)])
    x, coded_inputs = normal(20, 2), normal(100, 2)
    variables = module.init(jax.random.key(0), x)
    model_only, predict = jax.jit(module.apply), jc.coded((module, variables), code)
    rng = np.random.default_rng(0)
    mask = rng.permutation(100) >= 20
    on_device = jnp.asarray(mask)
    # More masks than are cached, so that each is fresh again when all others have been used.
    fresh_masks = itertools.cycle([rng.permutation(100) >= 20 for _ in range(1000)])
    programs = {
        "the model alone, 100 inputs": lambda: model_only(variables, coded_inputs),
        "coded call, a mask seen before": lambda: predict(x, mask),
        "coded call, a mask seen before, in a JAX array": lambda: predict(x, on_device),
        "coded call, all workers returned": lambda: predict(x),
        "coded call, a fresh mask": lambda: predict(x, next(fresh_masks)),
    }
    numbers = rng.normal(size=20_000)
    print("dispatch above the model's own:")
    for suffix, prepare in {"": lambda: np.sort(numbers), ", immediately": None}.items():
        times = time_programs(programs, prepare=prepare)
        base = times["the model alone, 100 inputs"]
        for name in list(times)[1:]:
            upper_limit = 300 if "fresh" in name else 150
            report.add(f"  {name}{suffix}", (times[name] - base) * 1e6, "us", upper_limit=upper_limit)


def measure_first_call(report):
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
    report.add("first call of coded LeNet5 / of LeNet5 jitted", coded_times / jitted_times, upper_limit=2)
    report.add_times({"coded": coded_times, "jitted": jitted_times})


class VisionTransformer(nnx.Module):
    """Classifies images by a ViT-B/16 (Dosovitskiy et al. 2021), pre-norm, mean-pooled: 17 GFLOP for an image."""

    def __init__(self, rngs: nnx.Rngs, width: int = 768, depth: int = 12, heads: int = 12):
        self.patches = nnx.Conv(3, width, (16, 16), strides=(16, 16), rngs=rngs)
        self.positions = nnx.Param(jax.random.normal(rngs.params(), (196, width)) * 0.02)
        self.blocks = nnx.List([Block(width, heads, rngs) for _ in range(depth)])
        self.head = nnx.Linear(width, 1000, rngs=rngs)

    def __call__(self, x):
        x = self.patches(x).reshape(x.shape[0], 196, -1) + self.positions[...]
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
