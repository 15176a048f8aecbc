"""Defines the interface of distributed methods: machines that work for a round, and one sum over them."""

import abc
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, final

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from ..checks import check_count, check_mask, static_value
from ..stragglers import AbstractStragglers
from . import _rounds
from ._samples import check_params, check_samples
from .run import History, run
from .shards import Shards, shard
from .state import Common, Machine, State

# From parameters and one sample to one number.
Loss = Callable[[PyTree[Array], Any], Float[Array, ""]]


class AbstractMethod(abc.ABC):
    r"""Minimises the mean loss of samples that lie on K machines, in rounds of work without communication.

    .. math:: F(w) = \frac{1}{n} \sum_{i=1}^n \phi_i(w) + \frac{\lambda}{2} \|w\|^2

    In a round, every active machine makes some steps from the same parameters, with samples of its own. Then machines
    synchronise by one sum over all of them: of each one's update of the parameters, and of its message. Machines are
    the leading axis of arrays on one device, or are spread over the devices of a mesh; a sum over its axis is then all
    that is communicated.

    A method defines `begin`, `work` and `default_step_size`, is a frozen dataclass and a pytree (`ridge`, `step_size`
    and other numbers are leaves), and calls `check_method` in its `__post_init__`. It is final, and overrides none of
    the methods that are defined here.

    Attributes:
        loss: From parameters and one sample to one number; `LinearLoss` for linear models.
        num_machines: K.
        period: Steps in a round.
        ridge: :math:`\lambda`.
        step_size: The length of every step; None if it is to follow from the data.
        batch_size: Samples in a step, drawn with replacement.
        shard_sizes: The number of samples of each machine, which gets consecutive ones; about equal numbers if None.
        mesh: The mesh over whose first axis machines are spread; None for one device.

    Raises:
        ValueError: If a setting makes no sense, from `check_method`.
    """

    loss: Loss
    num_machines: int
    period: int
    ridge: Any
    step_size: Any
    batch_size: int
    shard_sizes: Sequence[int] | None
    mesh: Mesh | None

    @abc.abstractmethod
    def begin(self, common: Common, machine: Machine) -> tuple[PyTree[Array], Float[Array, "message"]]:
        """Returns a machine's first local state and message.

        Args:
            common: What all machines know; its message_sum is None.
            machine: The machine; its message and local state are None.
        """

    @abc.abstractmethod
    def work(
        self, common: Common, machine: Machine, key: PRNGKeyArray
    ) -> tuple[Float[Array, "d"], PyTree[Array], Float[Array, "message"]]:
        """Computes a machine's part of a round.

        Args:
            common: What all machines know.
            machine: The machine. Where it is not active, samples may be garbage, and its local state must not change.
            key: The machine's key of the round.

        Returns:
            Its update of the parameters, which is added to them; its new local state and its new message.
        """

    @abc.abstractmethod
    def default_step_size(self, params: PyTree[Array], shards: Shards) -> Float[Array, ""]:
        """Returns the step size that follows from the data.

        Raises:
            ValueError: If none follows from the loss.
        """

    @final
    def init(self, params: PyTree[Any], data: PyTree[Any]) -> State:
        """Distributes samples over machines.

        Args:
            params: The first parameters: real numbers.
            data: Samples, leaves (n, ...). For a `LinearLoss` a pair: rows (n, d), dense, `SparseRows`, sparse of SciPy
                or BCOO of JAX; and labels (n,) such as the loss expects, -1 and 1 for `logistic`, integers from 0 for
                `multinomial`, real numbers for `squared`.

        Returns:
            The state before the first round.

        Raises:
            ValueError: If leading axes of data differ, there are fewer samples than machines, shard_sizes do not fit,
                params are empty, labels are not those of the loss, a number is not finite, the loss gives no single
                number, or the step size does not follow from the loss and none was given.
        """
        params, shards, step_size = prepare(self, params, data)
        fields = _rounds.begin(_rounds.transfer(self), params, shards, step_size)
        return _rounds.spread(self, State(**fields, data=shards))

    @final
    def round(
        self, state: State, key: PRNGKeyArray, returned: Bool[Array | np.ndarray, "machines"] | None = None
    ) -> State:
        """Computes one round.

        Args:
            state: The state after the last round.
            key: A key, the same in all rounds.
            returned: Which machines are active in this round, shape (K,), all if not given. Those that are not active
                neither work nor move the parameters; their last messages still count.

        Returns:
            The state after this round.

        Raises:
            ValueError: If the state has another number of machines, or returned is not bool (K,).
        """
        _check_machines(self, state)
        active = np.ones(self.num_machines, bool) if returned is None else returned
        check_mask("returned", active, self.num_machines)
        constants = _rounds.transfer((self, key, active), self.mesh)
        fields = _rounds.advance(constants[0], _rounds.transfer(state), *constants[1:])
        return dataclasses.replace(state, **fields)

    @final
    def run(
        self,
        state: State,
        key: PRNGKeyArray,
        num_rounds: int,
        *,
        every: int = 1,
        stragglers: AbstractStragglers | None = None,
        evaluate: Callable[[PyTree[Array]], PyTree[Any]] | None = None,
        callbacks: Iterable[Callable[[State, dict[str, Any]], Any]] = (),
        checkpoint: str | Path | None = None,
        progress: bool = True,
    ) -> tuple[State, History]:
        """Computes many rounds.

        Args:
            state: The state after the last round.
            key: A round's samples are drawn with it and the round's number: with the same key, two runs of fifty
                rounds are one of a hundred.
            num_rounds: How many more rounds.
            every: The number of rounds after which to record, call back and write a checkpoint.
            stragglers: Draws the machines that miss a round, anew for each; none if not given.
            evaluate: Computes what to record from params, any pytree of numbers; the objective of all samples if not
                given.
            callbacks: Called with the state and the record; if one returns a true value, the run ends.
            checkpoint: A folder. If it holds a checkpoint, the run resumes from it up to the same last round, bit for
                bit as if it had not been interrupted, or returns it if it is of that round or a later one; new
                checkpoints are written there. A checkpoint that cannot be read is deleted with a warning, and the one
                before is used. Samples are not stored. Needs `pip install 'jaxcode[train]'`.
            progress: Whether to show a progress bar on standard error.

        Returns:
            The last state, and what was recorded.

        Raises:
            DivergenceError: If parameters are not finite at a record; or if the objective, which is compared where it
                is recorded and at the end in any case, is not finite, or more than a thousand times as large as
                both that of the first parameters and that of zeros. Take shorter steps.
            ValueError: If num_rounds or every is no count, the state belongs to another method or number of machines,
                or the checkpoint belongs to another method, loss or prox, to other settings or other samples, or none
                can be read.
            ImportError: If checkpoint is given and orbax is not installed.
        """
        _check_state(self, state)
        constants = _rounds.transfer((self, key, stragglers), self.mesh)

        def advance(state, count):
            method, key, stragglers = constants
            count = _rounds.transfer(np.int32(count), self.mesh)
            fields = _rounds.advance_many(method, state, key, count, stragglers)
            return dataclasses.replace(state, **fields)

        return run(
            self,
            _rounds.transfer(state),
            num_rounds,
            advance,
            every=every,
            evaluate=evaluate,
            callbacks=callbacks,
            checkpoint=checkpoint,
            progress=progress,
            distribute=lambda state: _rounds.spread(self, state),
        )

    @final
    def objective(self, params: PyTree[Any], state: State) -> Float[Array, ""]:
        """Returns F of all samples."""
        method, params = _rounds.transfer((self, params), self.mesh)
        return _rounds.objective(method, params, _rounds.transfer(state.data))

    @final
    def floats_per_round(self, state: State) -> int:
        """Returns how many numbers each machine sends in a round, and receives."""
        return sum(np.size(leaf) for leaf in jax.tree.leaves((state.params, state.message_sum)))

    @final
    def samples_per_round(self) -> int:
        """Returns how many gradients of samples all machines compute in a round."""
        return self.num_machines * self.period * self.batch_size


def check_method(method: AbstractMethod) -> None:
    """Checks a method's settings, unless they are traced, and makes them hashable.

    Raises:
        ValueError: If one makes no sense.
    """
    for name in ("num_machines", "period", "batch_size"):
        check_count(name, getattr(method, name))
    if not callable(method.loss):
        raise ValueError(f"loss is {method.loss!r}; expected a function of parameters and one sample")
    for name, expected in (("ridge", "0 or more"), ("step_size", "above 0, or None"), ("decay", "0 or more")):
        value = getattr(method, name, None)
        if value is None or static_value(value) is None:
            continue
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise ValueError(f"{name} is {value!r}; expected a number, {expected}") from None
        if not (number >= 0 and np.isfinite(number)) or (name == "step_size" and number == 0):
            raise ValueError(f"{name} is {value!r}; expected a number, {expected}")
        # A Python number has no dtype that could be wider than the parameters'.
        object.__setattr__(method, name, number)
    if method.shard_sizes is not None:
        if not isinstance(method.shard_sizes, Iterable):
            raise ValueError(f"shard_sizes is {method.shard_sizes!r}; expected a number of samples for each machine")
        # The structure of a pytree must be hashable.
        sizes = tuple(check_count(f"shard_sizes[{k}]", size) for k, size in enumerate(method.shard_sizes))
        object.__setattr__(method, "shard_sizes", sizes)
    prox = getattr(method, "prox", None)
    if prox is not None and not callable(prox):
        raise ValueError(f"prox is {prox!r}; expected a function of parameters and a step's length")
    if method.mesh is not None and not isinstance(method.mesh, Mesh):
        raise ValueError(f"mesh is {method.mesh!r}; expected one of jax.make_mesh, or None")
    if method.mesh is not None and method.num_machines % method.mesh.devices.shape[0]:
        raise ValueError(
            f"num_machines is {method.num_machines}, which {method.mesh.devices.shape[0]} devices of mesh's first axis "
            "cannot share; expected a multiple"
        )


def prepare(
    method: AbstractMethod, params: PyTree[Any], data: PyTree[Any]
) -> tuple[PyTree[Array], Shards, Float[Array, ""]]:
    """Returns checked parameters, samples divided among machines, and the step size in the parameters' dtype."""
    params = check_params(params)
    data = check_samples(method.loss, params, data)
    shards = shard(data, method.num_machines, method.shard_sizes)
    return params, shards, _step_size(_rounds.transfer(method), params, shards)


@jax.jit
def _step_size(method, params, shards):
    dtype = jnp.result_type(*jax.tree.leaves(params))
    method = _rounds.cast(method, dtype)
    step_size = method.default_step_size(params, shards) if method.step_size is None else method.step_size
    return step_size.astype(dtype)


def local_shapes(method: AbstractMethod, state: State) -> PyTree[jax.ShapeDtypeStruct]:
    """Returns the shapes and dtypes of machines' local states."""
    arguments = _rounds.shapes_of((state.params, state.data, state.step_size))
    return jax.eval_shape(_rounds.begin, method, *arguments)["local"]


def _check_machines(method, state):
    machines = state.messages.shape[0]
    if machines != method.num_machines:
        raise ValueError(
            f"state is of {machines} machines, but num_machines is {method.num_machines}; expected a state that "
            "began with this method's init"
        )


def _check_state(method, state):
    _check_machines(method, state)
    expected = local_shapes(method, state)
    shapes, expected_shapes = (jax.tree.map(np.shape, local) for local in (state.local, expected))
    if shapes != expected_shapes:
        raise ValueError(
            f"state has local states of shapes {shapes}, but those of {type(method).__name__} have {expected_shapes}; "
            "expected a state that began with this method's init"
        )
