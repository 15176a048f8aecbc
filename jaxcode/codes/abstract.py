"""The interface of codes."""

import abc
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, PyTree

from .._sharding import call_with_auto_axes
from ..checks import warn_not_finite
from ..linops import AbstractLinop, apply_to_tree
from ..nodes import Nodes
from .plan import Plan

# Coded inputs are the same where their weights of all inputs differ by less.
_SAME_INPUT = 1e-6


class AbstractCode(abc.ABC):
    """Encodes K inputs into N coded inputs, and decodes the answers of the workers that returned to K results.

    Both maps are linear: a code prepares two operators (`jaxcode.linops`), and everything else, `jaxcode.coded`,
    servers and tuning, works with these operators. To write a code, make a class that is a frozen dataclass and a
    pytree, declare the attributes below and implement the four methods. This one is complete: it gives a lost input the
    answer of the nearest input that was answered.

    .. code-block:: python

        import jax.numpy as jnp

        import jaxcode as jc
        from jaxcode import checks, linops


        @jc.pytree("num_data", "num_workers")
        class NearestCode(jc.AbstractCode):
            '''Has worker n compute input n K // N; an input's result is the answer nearest to it.'''

            num_data: int
            num_workers: int
            nodes = None
            predicts_error = False

            def encoder_linop(self, plan=None):
                return linops.Gather(self._computed(), self.num_data)

            def decoder_linop(self, returned, plan=None):
                checks.check_mask("returned", returned, self.num_workers)
                distance = abs(jnp.arange(self.num_data)[:, None] - self._computed()[None])
                nearest = jnp.argmin(jnp.where(returned[None], distance, self.num_data), axis=1)
                return linops.Gather(nearest, self.num_workers, defined=self.recovered(returned))

            def recovered(self, returned, plan=None):
                checks.check_mask("returned", returned, self.num_workers)
                return jnp.broadcast_to(jnp.any(returned), (self.num_data,))

            def exact(self, returned, plan=None):
                checks.check_mask("returned", returned, self.num_workers)
                is_computed = self._computed()[None] == jnp.arange(self.num_data)[:, None]
                return jnp.any(is_computed & returned[None], axis=1)

            def _computed(self):
                return jnp.arange(self.num_workers) * self.num_data // self.num_workers

    Attributes:
        num_data: K, how many inputs are encoded together.
        num_workers: N, how many coded inputs they become.
        nodes: Where inputs and workers sit on a curve, for codes that interpolate; None for others.
        predicts_error: Whether there is a method `decode_with_error(y, returned, plan=None)` that gives results and
            their standard errors.
        needs_plan: Whether there is a method `plan(x, risk=None)` that makes the plan of a group, leaves (K, ...),
            without which the code cannot encode, and an attribute `mixes`, whether coded inputs may be sums of inputs.
            `risk`, (K,), is what a wrong result of each input costs.
        adapts: Whether there are methods `adapt(y, returned, plans)`, which completes the plans of several groups by
            what their answers, leaves (N, groups, ...), say; and `join(plans)`, which makes one code and one plan for
            all inputs of several groups, with inputs and workers in the order of rows (K, groups) and (N, groups).
        assigns: Whether each worker computes one input, and a plan's `assignment`, or of a code that needs plans the
            third argument of `plan`, says which.
        inputs_first: Whether worker k < K computes input k, under any plan: these need not wait for the plan.
    """

    num_data: int
    num_workers: int
    nodes: Nodes | None
    predicts_error: bool
    needs_plan: ClassVar[bool] = False
    adapts: ClassVar[bool] = False
    inputs_first: ClassVar[bool] = False
    assigns: bool = False

    @abc.abstractmethod
    def encoder_linop(self, plan: Plan | None = None) -> AbstractLinop:
        """Prepares the operator from inputs to coded inputs.

        Args:
            plan: As for `encode`.

        Returns:
            The operator from K rows to N rows.
        """

    @abc.abstractmethod
    def decoder_linop(self, returned: Bool[ArrayLike, "workers"], plan: Plan | None = None) -> AbstractLinop:
        """Prepares the operator from answers to results.

        With static nodes and a static mask it is prepared on the host, without compilation.

        Args:
            returned: As for `decode`.
            plan: As for `encode`.

        Returns:
            The operator from N rows to K rows.

        Raises:
            ValueError: If returned is not bool (N,).
        """

    @abc.abstractmethod
    def recovered(
        self, returned: Bool[ArrayLike, "workers"], plan: Plan | None = None
    ) -> Bool[Array | np.ndarray, "data"]:
        """Returns which inputs have a result, given which workers returned.

        Args:
            returned: Which workers returned, bool, shape (N,).
            plan: As for `encode`.

        Returns:
            bool, shape (K,); a NumPy array where the mask is static.

        Raises:
            ValueError: If returned is not bool (N,).
        """

    @abc.abstractmethod
    def exact(self, returned: Bool[ArrayLike, "workers"], plan: Plan | None = None) -> Bool[Array | np.ndarray, "data"]:
        """Returns which results are f's answer to the input itself, without any error of coding.

        Arguments, return value and errors as for `recovered`.
        """

    def encode(self, x: PyTree[ArrayLike], plan: Plan | None = None) -> PyTree[Array]:
        """Encodes inputs.

        Args:
            x: Leaves of shape (K, ...). Real numbers where the code mixes inputs (unsigned bytes become float32): a
                NaN makes that feature NaN in every coded input, of which a `RuntimeWarning` tells if it is a NumPy
                array. Of any dtype where it does not.
            plan: The plan of these inputs; None for codes and uses that need none.

        Returns:
            The coded inputs, leaves of shape (N, ...) in the dtype of the inputs.

        Raises:
            ValueError: If a leaf's leading axis is not K, its dtype cannot be mixed, or the code needs a plan and there
                is none.
        """

        def encode(x, code, plan):
            linop = code.encoder_linop(plan)
            warn_not_finite("x", x, lambda: linop.mixes, stacklevel=5)
            return apply_to_tree("x", linop, x, code.num_data)

        return call_with_auto_axes(encode, x, specs=_replicate_rows, code=self, plan=plan)

    def decode(
        self, y: PyTree[ArrayLike], returned: Bool[ArrayLike, "workers"], plan: Plan | None = None
    ) -> PyTree[Array]:
        """Decodes the answers that came.

        Args:
            y: Leaves of shape (N, ...), with dtypes as for `encode`. Rows of workers that did not return are not read,
                whatever they hold.
            returned: Which workers returned, bool, shape (N,).
            plan: The plan with which the inputs were encoded.

        Returns:
            The results, leaves of shape (K, ...) in the dtype of the answers. The result of an input that is not
            `recovered` is its prior mean if there is a prior, else NaN (the lowest number of a signed integer dtype,
            the highest of an unsigned one, False of bool).

        Raises:
            ValueError: If a leaf's leading axis is not N, its dtype cannot be mixed, or returned is not bool (N,).
        """

        def decode(y, code, returned, plan):
            return code._decode(y, returned, plan)

        return call_with_auto_axes(decode, y, specs=_replicate_rows, code=self, returned=returned, plan=plan)

    def encoder_matrix(self, plan: Plan | None = None) -> Float[Array, "workers data"]:
        """Forms the matrix, shape (N, K), that takes inputs to coded inputs; float64 with x64 on, else float32."""
        return self.encoder_linop(plan).matrix()

    def decoder_matrix(
        self, returned: Bool[ArrayLike, "workers"], plan: Plan | None = None
    ) -> Float[Array, "data workers"]:
        """Forms the matrix, shape (K, N), that takes answers to results; float64 with x64 on, else float32.

        Columns of workers that did not return are zero, rows of inputs that are not recovered are NaN.
        """
        return self.decoder_linop(returned, plan).matrix()

    def _decode(self, y, returned, plan):
        if self.adapts and plan is not None:
            plan = adapt_group(self, y, returned, plan)
        return decode_as_planned(self, y, returned, plan)


def mixes_inputs(code: AbstractCode) -> bool:
    """Returns whether a code's coded inputs are sums of inputs, which need real numbers."""
    return code.mixes if code.needs_plan else code.encoder_linop().mixes  # pyright: ignore[reportAttributeAccessIssue]


def find_assignment(code: AbstractCode, plan: Plan | None = None) -> Int[Array, "workers"]:
    """Returns which input each worker computes, or weighs most."""
    return jnp.argmax(code.encoder_matrix(plan), axis=1).astype(jnp.int32)


def find_copies(code: AbstractCode, plan: Plan | None = None) -> Bool[Array, "workers workers"]:
    """Returns which pairs of different workers have the same coded input."""
    return _find_equal(code.encoder_matrix(plan))


@jax.jit
def _find_equal(rows):
    """Returns which pairs of different rows are equal, one row at a time."""
    distances = jax.lax.map(lambda row: jnp.max(jnp.abs(rows - row[None]), axis=1), rows)
    return (distances <= _SAME_INPUT) & ~np.eye(len(rows), dtype=bool)


def adapt_group(code: AbstractCode, y: PyTree[ArrayLike], returned: Bool[ArrayLike, "workers"], plan: Plan) -> Plan:
    """Completes the plan of one group by what its answers, leaves (N, ...), say."""
    plans = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], plan)
    answers = jax.tree.map(lambda leaf: jnp.asarray(leaf)[:, None], y)
    plans = code.adapt(answers, returned, plans)  # pyright: ignore[reportAttributeAccessIssue]
    return jax.tree.map(lambda leaf: leaf[0], plans)


def decode_as_planned(
    code: AbstractCode, y: PyTree[ArrayLike], returned: Bool[ArrayLike, "workers"], plan: Plan | None
) -> PyTree[Array]:
    """Decodes answers by a plan that is complete, as `AbstractCode.decode` does."""
    linop = code.decoder_linop(returned, plan)
    if plan is None or plan.prior is None:
        return apply_to_tree("y", linop, y, code.num_workers)
    # Where results are copies of answers, the difference would only add errors of rounding.
    residuals = plan.prior.residuals(y) if linop.mixes else y
    decoded = apply_to_tree("y", linop, residuals, code.num_workers)
    return plan.prior.complete(decoded, code.recovered(returned, plan), adds=linop.mixes)


def _replicate_rows(specs):
    """Returns specs that shard features as those of the data, with every row on each device."""
    return jax.tree.map(
        lambda spec: PartitionSpec(None, *spec[1:]), specs, is_leaf=lambda node: isinstance(node, PartitionSpec)
    )
