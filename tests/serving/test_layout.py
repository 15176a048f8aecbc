"""Tests the places of inputs in the groups that are encoded."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxcode.serving._layout import count_padded_groups, fetch_arrays, find_finite, lay_out, pad_inputs


@pytest.mark.parametrize("num_data", [1, 2, 5])
@pytest.mark.parametrize("size", [1, 2, 5, 9, 11, 16, 23])
@pytest.mark.parametrize("is_ordered", [False, True])
@pytest.mark.parametrize("num_missing", [0, 1])
def test_results_come_back_to_their_inputs(num_data, size, is_ordered, num_missing):
    rng = np.random.default_rng(size)
    x = {
        "a": rng.normal(size=(size + num_missing, 2)).astype(np.float32),
        "b": np.arange(size + num_missing, dtype=np.int32),
    }
    x["a"][:num_missing] = np.nan
    finite = find_finite(x)
    padded = pad_inputs(x, finite, num_data)
    places = num_data * count_padded_groups(size, num_data)
    assert padded["a"].shape == (places, 2)
    permutation = rng.permutation(places) if is_ordered else None
    layout = lay_out(finite, num_data, permutation)
    in_places = {name: leaf[layout.index] for name, leaf in padded.items()}
    restored = layout.restore(in_places)
    np.testing.assert_array_equal(restored["a"], x["a"])
    np.testing.assert_array_equal(restored["b"][num_missing:], x["b"][num_missing:])
    assert (restored["b"][:num_missing] == np.iinfo(np.int32).min).all()
    # The groups that hold inputs are those of the ordered batch, the others repeat them.
    groups = layout.index.reshape(-1, num_data)
    order = np.arange(size) if permutation is None else permutation[permutation < size]
    ordered = groups[: layout.num_occupied].reshape(-1)
    np.testing.assert_array_equal(ordered[:size], order)
    assert (ordered[size:] == order[-1]).all()
    for number in range(layout.num_occupied, len(groups)):
        np.testing.assert_array_equal(groups[number], groups[number % layout.num_occupied])


def test_the_number_of_groups_is_a_power_of_two_below_twice_what_is_needed():
    for num_data in (1, 3, 8):
        for size in range(1, 100):
            groups, needed = count_padded_groups(size, num_data), -(-size // num_data)
            assert needed <= groups < 2 * needed
            assert groups & (groups - 1) == 0


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_an_input_is_finite_if_all_its_numbers_are(dtype):
    x = fetch_arrays(
        {"a": jnp.asarray([[1, 2], [np.inf, 1], [0, 0], [0, 0]], dtype), "b": jnp.asarray([0, 0, np.nan, 1], dtype)}
    )
    np.testing.assert_array_equal(find_finite(x), [True, False, False, True])


def test_a_permutation_that_names_an_input_twice_raises():
    with pytest.raises(ValueError, match="order did not return a permutation"):
        lay_out(np.ones(3, bool), 2, np.array([0, 0, 2, 3]))
