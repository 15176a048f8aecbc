"""Encodes and decodes batches on the host's device: module-level programs, compiled once for all servers alike."""

import functools
from typing import final

import jax
import numpy as np
from jaxtyping import Bool, Float, PyTree

from ..ordering import Ordering
from ..outputs import OutputSpace
from ..pipeline import Grouping, StaticCode, decode, encode, find_decoder, group, predict_errors, ungroup
from ..robust import Defence, Detection
from ._layout import Layout, lay_out


@final
class Codec:
    """Encodes batches and decodes answers, from NumPy arrays to NumPy arrays.

    Args:
        static_code: The code.
        order: As for `jaxcode.coded`.
        output: The space in which answers are decoded, as for `jaxcode.coded`.
        defence: Detects faulty workers, as for `jaxcode.coded`.
        x64: Whether x64 is on where the methods are called.
    """

    def __init__(
        self,
        static_code: StaticCode,
        order: Ordering | None,
        output: OutputSpace,
        defence: Defence | None,
        x64: bool,
    ):
        self._code, self._order, self._output, self._defence, self._x64 = static_code, order, output, defence, x64

    def encode(
        self, padded: PyTree[np.ndarray], finite: Bool[np.ndarray, "batch"]
    ) -> tuple[Layout, PyTree[np.ndarray]]:
        """Encodes a padded batch.

        Args:
            padded: The finite inputs as `pad_inputs` returns them, leaves (places, ...).
            finite: Which inputs of the batch are encoded, shape (B,).

        Returns:
            The layout, and the coded inputs, leaves (N, groups, ...).
        """
        num_data = self._code.code.num_data
        padded = jax.device_put(padded)
        permutation = None if self._order is None else jax.device_get(_permute(self._order, num_data, padded))
        layout = lay_out(finite, num_data, permutation)
        return layout, jax.device_get(_encode(self._code, padded, jax.device_put(layout.index)))

    def decode(
        self, answers: PyTree[np.ndarray], returned: Bool[np.ndarray, "workers"], num_occupied: int
    ) -> tuple[PyTree[np.ndarray], Detection | None, Bool[np.ndarray, "workers"]]:
        """Decodes answers, leaves (N, groups, ...).

        Args:
            answers: What workers answered.
            returned: Which workers returned.
            num_occupied: How many groups hold inputs. The others repeat these, and are no further evidence for the
                defence.

        Returns:
            Results, leaves (places, ...); the detection, None without a defence; and the mask of the workers that the
            results are decoded from.
        """
        detection = None
        if self._defence is not None:
            # A power of two, so that few programs are compiled.
            num_examined = 1 << (num_occupied.bit_length() - 1)
            examined = jax.device_put(jax.tree.map(lambda leaf: leaf[:, :num_examined], answers))
            detection = _detect(self._code, self._output, self._defence, examined, jax.device_put(returned))
            returned = jax.device_get(detection.trusted)
        decoder = find_decoder(self._code, returned.tobytes(), self._x64)
        results = _decode(self._code, self._output, decoder, jax.device_put(answers))
        return jax.device_get(results), detection, returned

    def predict_errors(
        self, answers: PyTree[np.ndarray], returned: Bool[np.ndarray, "workers"]
    ) -> Float[np.ndarray, "places"]:
        """Predicts the error of each result from answers, leaves (N, groups, ...)."""
        errors = _predict_errors(self._code, self._output, jax.device_put(answers), jax.device_put(returned))
        return jax.device_get(errors)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _permute(order, num_data, x):
    """Returns the permutation of a batch, checked by `pipeline.group`."""
    return group(x, num_data, order)[1].permutation


@functools.partial(jax.jit, static_argnums=0)
def _encode(static_code, x, index):
    """Encodes inputs, leaves (inputs, ...), in groups; `index` has the input of each place, shape (places,)."""
    code = static_code.code
    grouped, _ = group(jax.tree.map(lambda leaf: leaf[index], x), code.num_data, None)
    return encode(code, None, grouped)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _decode(static_code, output, decoder, answers):
    """Decodes answers, leaves (N, groups, ...), to results, leaves (places, ...)."""
    code = static_code.code
    results = decode(code, decoder, answers, output)
    num_groups = jax.tree.leaves(results)[0].shape[1]
    return ungroup(results, Grouping(None, code.num_data * num_groups, code.num_data, num_groups))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _detect(static_code, output, defence, answers, returned):
    return defence(static_code.code, output.transform(answers), returned)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _predict_errors(static_code, output, answers, returned):
    """Predicts the errors of results, shape (places,)."""
    return predict_errors(static_code.code, answers, returned, output).T.reshape(-1)
