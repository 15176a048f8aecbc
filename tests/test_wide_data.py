"""Operations on wide data, counted in the program that JAX lowers: each array is read once, in its own dtype."""

import collections
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcode import BerrutCode, SplineCode, coded

FEATURES = 150_528
CODES = {"spline": SplineCode.systematic(20, 60), "berrut": BerrutCode.chebyshev(20, 60)}
MANY = SplineCode.chebyshev(200, 600)
# Operations that pass arrays on, or move the block that a loop works on.
PASSING = {"while", "return", "call", "reshape", "dynamic_slice", "dynamic_update_slice", "optimization_barrier"}
FORBIDDEN = {"transpose", "gather", "scatter", "sort", "concatenate", "pad", "reverse", "copy"}

each_code = pytest.mark.parametrize("name", CODES)
each_dtype = pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])


def operations(function, *arguments, least):
    """Counts the operations with an operand or result of at least so many numbers, and collects their dtypes."""
    count, dtypes = collections.Counter(), set()
    for line in jax.jit(function).lower(*arguments).as_text().splitlines():
        named = re.search(r'(?:^\s*|= )"?(?:stablehlo\.|chlo\.|func\.(?!func))?(\w+)', line)
        types = [t.split("x") for t in re.findall(r"tensor<([^>]*)>", line)]
        wide = [t[-1] for t in types if math.prod(int(size) for size in t[:-1]) >= least]
        if wide and not line.lstrip().startswith("func.func"):
            count[_name(named.group(1), line, types)] += 1
            dtypes |= set(wide)
    return count, dtypes - {"i1"}


def _name(name, line, types):
    """An operation's name; a transpose that moves axes of length one only is a reshape."""
    order = re.search(r"(?:dims|permutation) = (?:array<i64: |\[)([\d, ]+)", line)
    if name != "transpose" or order is None:
        return name
    moved = [axis for axis in map(int, order.group(1).split(",")) if types[0][axis] != "1"]
    return name if moved != sorted(moved) else "reshape"


def arithmetic(count):
    return {name: times for name, times in count.items() if name not in PASSING}


def zeros(rows, dtype, features=FEATURES):
    return jnp.zeros((rows, features), dtype)


def test_the_count_sees_what_it_should():
    def wasteful(x):
        return (x.T.astype(jnp.float32) @ jnp.ones((20, 3))).T[::-1]

    count, dtypes = operations(wasteful, zeros(20, "bfloat16"), least=3 * FEATURES)
    assert {"transpose", "convert", "dot_general", "reverse"} <= set(count)
    assert dtypes == {"bf16", "f32"}


def test_a_transpose_that_moves_no_data_is_none():
    count, _ = operations(lambda x: jnp.swapaxes(x, 0, 1), jnp.zeros((1, 20, FEATURES)), least=20 * FEATURES)
    assert not set(count) & FORBIDDEN


@each_code
@each_dtype
def test_encoding_is_one_product(name, dtype):
    count, dtypes = operations(CODES[name].encode, zeros(20, dtype), least=20 * FEATURES)
    narrow = dtype != "float32"
    assert arithmetic(count) == {"dot_general": 1} | ({"convert": 1} if narrow else {})
    # The sum is float32 before it is rounded to what the data are.
    assert dtypes <= {"f32", {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}[dtype]}


@each_code
def test_decoding_is_one_product_and_a_check_of_one_row(name):
    count, dtypes = operations(CODES[name].decode, zeros(60, "float32"), np.ones(60, bool), least=20 * FEATURES)
    # The slice is the row that is checked; loops repeat what a NaN in an absent row has spoilt, usually nothing.
    assert arithmetic(count) == {"dot_general": 1, "slice": 1}
    assert dtypes == {"f32"}


@each_code
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_data_are_decoded_without_wider_copies(name, dtype):
    count, dtypes = operations(CODES[name].decode, zeros(60, dtype), np.ones(60, bool), least=60 * FEATURES)
    assert not set(count) & (FORBIDDEN | {"convert"})
    assert dtypes == {{"bfloat16": "bf16", "float16": "f16"}[dtype]}


@each_code
@each_dtype
def test_a_coded_call_multiplies_twice(name, dtype):
    returned = np.arange(60) % 3 != 0
    count, dtypes = operations(
        coded(lambda x: x, CODES[name]), zeros(20, dtype), jnp.asarray(returned), least=20 * FEATURES
    )
    assert not set(count) & FORBIDDEN
    assert "f64" not in dtypes
    if dtype == "float32":
        assert arithmetic(count) == {"dot_general": 2, "slice": 1}


@each_dtype
def test_many_workers_go_block_by_block(dtype):
    for function, arguments in (
        (MANY.encode, [zeros(200, dtype, 4096)]),
        (MANY.decode, [zeros(600, dtype, 4096), np.ones(600, bool)]),
    ):
        count, dtypes = operations(function, *arguments, least=200 * 4096)
        assert not set(count) & (FORBIDDEN | {"convert"})
        assert "f64" not in dtypes
        if dtype == "float32":
            assert arithmetic(count) == {"broadcast_in_dim": 1}  # where the results go


@each_code
def test_memory_at_its_peak_is_hardly_more_than_inputs_and_outputs(name):
    code = CODES[name]
    for function, arguments in (
        (code.encode, [zeros(20, "float32")]),
        (code.decode, [zeros(60, "float32"), np.ones(60, bool)]),
    ):
        used = jax.jit(function).lower(*arguments).compile().memory_analysis()
        assert used.temp_size_in_bytes <= 0.3 * (used.argument_size_in_bytes + used.output_size_in_bytes)
