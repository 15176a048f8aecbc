"""Assigns the inputs of a request to groups, and brings results back to the order of the request.

So that few shapes are compiled, the number of groups is rounded up to a power of two. The added groups are copies of
the batch's own. Codes that read all groups together would take these for evidence: for them nothing is rounded.
"""

import dataclasses
from typing import Any, final

import jax
import numpy as np
from jaxtyping import Array, Bool, Int, PyTree

from .._arrays import pad
from ..checks import batch_size, finite_inputs
from ..linops.abstract import undefined_value


@final
@dataclasses.dataclass(frozen=True, eq=False)
class Layout:
    """Holds the places that the inputs of a batch have in its groups.

    Attributes:
        finite: Which inputs are encoded, bool, shape (B,); those with a NaN or an infinite number are not.
        num_data: K.
        num_occupied: How many groups hold inputs, the last one padded with its last input.
        place: The place of each finite input, shape (finite,): input k of group g has place g K + k.
        index: Which finite input each place holds, int32, shape (padded groups * K,).
    """

    finite: Bool[np.ndarray, "batch"]
    num_data: int
    num_occupied: int
    place: Int[np.ndarray, "finite"]
    index: Int[np.ndarray, "places"]

    @property
    def occupied(self) -> Bool[np.ndarray, "data groups"]:
        """Which places hold inputs, the others hold copies of them."""
        occupied = np.zeros(len(self.index), bool)
        occupied[self.place] = True
        return occupied.reshape(-1, self.num_data).T

    def restore(self, results: PyTree[np.ndarray]) -> PyTree[np.ndarray]:
        """Brings results from their places, leaves (places, ...), to the order of the batch, leaves (B, ...).

        Returns:
            Read-only arrays. Results of inputs that are not finite are NaN (the lowest number of an integer dtype).
        """
        return jax.tree.map(lambda leaf: self._restore(leaf, _undefined), results)

    def restore_errors(self, errors: np.ndarray) -> np.ndarray:
        """Brings predicted errors, shape (places,), to the order of the batch; infinite for inputs not finite."""
        return self._restore(errors, lambda dtype: np.inf)

    def restore_mask(self, mask: Bool[np.ndarray, "places"]) -> Bool[np.ndarray, "batch"]:
        """Brings a mask over the places to the order of the batch; False for inputs not finite."""
        return self._restore(mask, lambda dtype: False)

    def _restore(self, rows, missing):
        """Brings rows to the order of the batch; `missing` maps a dtype to the value of rows without a result."""
        if self.finite.all():
            results = rows[self.place]
        else:
            results = np.full((len(self.finite), *rows.shape[1:]), missing(rows.dtype), rows.dtype)
            results[self.finite] = rows[self.place]
        results.flags.writeable = False
        return results


def count_padded_groups(size: int, num_data: int, *, rounds: bool = True) -> int:
    """Returns how many groups are encoded for a batch: those that hold inputs, rounded up to a power of two.

    If `rounds` is False, just those.

    >>> [count_padded_groups(size, num_data=4) for size in (1, 4, 5, 9, 17)]
    [1, 1, 2, 4, 8]
    """
    num_occupied = -(-size // num_data)
    return 1 << (num_occupied - 1).bit_length() if rounds else num_occupied


def fetch_arrays(x: PyTree[Any]) -> PyTree[np.ndarray]:
    """Fetches a batch as NumPy arrays, of JAX's dtypes at the current setting of jax_enable_x64."""

    def fetch(leaf):
        leaf = np.asarray(jax.device_get(leaf))
        # A number too large for single precision becomes infinite, which `find_finite` detects.
        with np.errstate(over="ignore"):
            return leaf.astype(jax.dtypes.canonicalize_dtype(leaf.dtype), copy=False)

    return jax.tree.map(fetch, x)


def find_finite(x: PyTree[Any]) -> Bool[np.ndarray, "batch"]:
    """Finds the inputs of a batch, leaves (B, ...), that have finite numbers only.

    Raises:
        ValueError: If none has, or x is not a batch.
    """
    size = batch_size("x", x)
    finite = finite_inputs(x, size)
    if not finite.any():
        raise ValueError(
            f"x has a NaN or an infinite number in every one of its {size} inputs; expected at least one input of "
            "finite numbers"
        )
    return finite


def pad_inputs(
    x: PyTree[np.ndarray], finite: Bool[np.ndarray, "batch"], num_data: int, *, rounds: bool = True
) -> PyTree[np.ndarray]:
    """Takes the finite inputs of a batch, padded with copies of the last one to the groups that are encoded."""
    size = int(finite.sum())
    rows = num_data * count_padded_groups(size, num_data, rounds=rounds)
    return jax.tree.map(lambda leaf: pad(leaf if size == len(finite) else leaf[finite], rows), x)


def lay_out(
    finite: Bool[np.ndarray, "batch"],
    num_data: int,
    permutation: Int[np.ndarray | Array, "places"] | None,
    *,
    rounds: bool = True,
) -> Layout:
    """Assigns inputs to the places of groups.

    Args:
        finite: Which inputs are encoded.
        num_data: K.
        permutation: A permutation of the padded inputs, of which the padding is removed; their own order if None.
        rounds: As for `count_padded_groups`.

    Returns:
        The layout.

    Raises:
        ValueError: If the permutation names an input twice.
    """
    size = int(finite.sum())
    inputs = np.arange(size)
    if permutation is not None:
        permutation = np.asarray(permutation)
        inputs = permutation[permutation < size]
        if not np.array_equal(np.sort(inputs), np.arange(size)):
            raise ValueError("order did not return a permutation: expected the number of every input, each once")
    place = np.empty(size, np.int64)
    place[inputs] = np.arange(size)
    num_occupied = -(-size // num_data)
    num_groups = count_padded_groups(size, num_data, rounds=rounds)
    index = np.resize(pad(inputs, num_data * num_occupied), num_data * num_groups)
    return Layout(finite, num_data, num_occupied, place, index.astype(np.int32))


def _undefined(dtype):
    with jax.transfer_guard("allow"):
        return jax.device_get(undefined_value(dtype))
