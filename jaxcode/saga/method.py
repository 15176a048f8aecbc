"""What distributed methods have in common: machines that work for a round, and one sum over them."""

import abc
import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from ..checks import check_count, check_mask, is_concrete
from ..stragglers import AbstractStragglers
from .linear import LinearLoss, checked_samples, smoothness
from .run import History, run
from .shards import Shards, shard
from .state import Common, Machine, State

# Of parameters and one sample.
Loss = Callable[[PyTree[Array], Any], Float[Array, ""]]


def check_method(method: "AbstractMethod") -> None:
    """Refuses numbers that make no sense, where they are known."""
    for name in ("num_machines", "period", "batch_size"):
        check_count(name, getattr(method, name))
    if not callable(method.loss):
        raise ValueError(f"loss is {method.loss!r}; expected a function of parameters and one sample")
    for name, least in (("ridge", "0 or more"), ("step_size", "above 0, or None"), ("decay", "0 or more")):
        value = getattr(method, name, None)
        if value is None or not is_concrete(value):
            continue
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise ValueError(f"{name} is {value!r}; expected a number, {least}") from None
        if not (number >= 0 and np.isfinite(number)) or (name == "step_size" and number == 0):
            raise ValueError(f"{name} is {value!r}; expected a number, {least}")
        # Of no dtype of its own, which might be wider than the parameters'.
        object.__setattr__(method, name, number)
    if method.shard_sizes is not None:
        if not isinstance(method.shard_sizes, Iterable):
            raise ValueError(f"shard_sizes is {method.shard_sizes!r}; expected a number of samples for each machine")
        # Part of the structure of a pytree, which must be hashable.
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


class AbstractMethod(abc.ABC):
    r"""Minimises the mean loss of samples that lie on K machines, in rounds of work without communication.

    .. math:: F(w) = \frac{1}{n} \sum_{i=1}^n \phi_i(w) + \frac{\lambda}{2} \|w\|^2

    A round: every machine goes some steps from the same parameters, with samples of its own; then one sum over all
    machines, of how far each went and of what each has to tell the others. Machines are the leading axis of arrays on
    one device, or spread over those of a mesh, a sum over whose axis is then all that is communicated.

    Attributes:
        loss: Of parameters and one sample; `LinearLoss` for linear models.
        num_machines: K.
        period: Steps in a round.
        ridge: :math:`\lambda`.
        step_size: Of every step; None where it follows from the data.
        batch_size: Samples in a step, drawn with replacement.
        shard_sizes: How many samples each machine has, one run of consecutive ones each; about equally many if None.
        mesh: Over whose first axis machines are spread; None for one device.
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
    def _begin(self, common: Common, machine: Machine) -> tuple[Any, Array]:
        """What a machine keeps to itself and what it tells all others at first."""

    @abc.abstractmethod
    def _work(self, common: Common, machine: Machine, key: PRNGKeyArray) -> tuple[Float[Array, "d"], Any, Array]:
        """How far it goes, what it keeps to itself and what it tells; if it is not here, it keeps what it has."""

    def init(self, params: PyTree[Array], data: PyTree[Any]) -> State:
        """Spreads samples over machines.

        Args:
            params: Where to begin.
            data: Samples, leaves (n, ...).

        Returns:
            The state before the first round.

        Raises:
            ValueError: If leading axes of data differ, there are fewer samples than machines, shard_sizes do not fit,
                or the step size does not follow from the loss and none was given.
        """
        params, shards, step_size = self._prepare(params, data)
        return self._spread(State(**begin(self, params, shards, step_size), data=shards))

    def round(self, state: State, key: PRNGKeyArray, returned: Bool[Array, "machines"] | None = None) -> State:
        """One round.

        Args:
            state: Where the last one ended.
            key: The same for all rounds.
            returned: Which machines take part, shape (K,), all if not given. Those that do not neither work nor move
                the others; what they told them before still counts.

        Returns:
            Where this one ended.

        Raises:
            ValueError: If the state is of another number of machines, or returned is not bool (K,).
        """
        self._check_machines(state)
        if returned is None:
            returned = jnp.ones(self.num_machines, bool)
        check_mask("returned", returned, self.num_machines)
        return dataclasses.replace(state, **_round(self, state, key, returned))

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
        """Many rounds.

        Args:
            state: Where to begin.
            key: A round's samples are drawn with it and the round's number: with the same key, twice fifty rounds are
                a hundred.
            num_rounds: How many more.
            every: After how many rounds each to record, call back and leave a checkpoint.
            stragglers: Who misses a round, drawn anew for each; nobody if not given.
            evaluate: What to record of params, any pytree of numbers; the objective, of all samples, if not given.
            callbacks: Called with the state and the record; where one returns a true value, the run ends.
            checkpoint: A folder. If it holds a checkpoint, the run goes on from there up to the same last round, bit
                for bit as if it had not been interrupted, or stays where the checkpoint is if that is farther; new ones
                are left there. Samples are not stored.
            progress: Whether to show a bar on standard error.

        Returns:
            The last state, and what was recorded.

        Raises:
            ValueError: If a number is none, the state is of another method or number of machines, or the checkpoint is
                of another method, other settings or other samples.
        """
        self._check_state(state)
        return run(
            self,
            state,
            num_rounds,
            lambda state, count: dataclasses.replace(state, **_rounds(self, state, key, count, stragglers)),
            every=every,
            evaluate=evaluate,
            callbacks=callbacks,
            checkpoint=checkpoint,
            progress=progress,
            place=self._spread,
        )

    def objective(self, params: PyTree[Array], state: State) -> Float[Array, ""]:
        """F, of all samples."""
        return _objective(self, params, state.data)

    def floats_per_round(self, state: State) -> int:
        """How many numbers each machine sends in a round, and receives."""
        return ravel_pytree(state.params)[0].size + state.shared.size

    def samples_per_round(self) -> int:
        """How many gradients of samples all machines compute in a round."""
        return self.num_machines * self.period * self.batch_size

    def _check_machines(self, state):
        machines = state.told.shape[0]
        if machines != self.num_machines:
            raise ValueError(
                f"state is of {machines} machines, but num_machines is {self.num_machines}; expected a state that "
                "began with this method's init"
            )

    def _check_state(self, state):
        self._check_machines(state)
        expected = jax.eval_shape(begin, self, state.params, state.data, state.step_size)["own"]
        found, wanted = (jax.tree.map(np.shape, own) for own in (state.own, expected))
        if found != wanted:
            raise ValueError(
                f"state has machines keep arrays of shapes {found}, but {type(self).__name__} has them keep {wanted}; "
                "expected a state that began with this method's init"
            )

    def _prepare(self, params, data):
        """Parameters, samples on machines and step size."""
        params = jax.tree.map(jnp.asarray, params)
        for path, leaf in jax.tree.leaves_with_path(params):
            if not jnp.issubdtype(leaf.dtype, jnp.floating):
                raise ValueError(f"params{jax.tree_util.keystr(path)} has dtype {leaf.dtype}; expected real numbers")
        if isinstance(self.loss, LinearLoss):
            data = checked_samples(params, data)
        shards = shard(data, self.num_machines, self.shard_sizes)
        step_size = self._default_step_size(params, shards) if self.step_size is None else self.step_size
        return params, shards, jnp.asarray(step_size, ravel_pytree(params)[0].dtype)

    def _default_step_size(self, params, shards):
        return default_step(jnp.max(self._smoothness(params, shards.samples)) + self.ridge)

    def _smoothness(self, params, samples):
        """L_i of samples (..., d)."""
        curvature = self.loss.curvature if isinstance(self.loss, LinearLoss) else None
        if curvature is None:
            raise ValueError(
                "step_size is None; expected a number, as it does not follow from this loss: try 1 / (3 L)"
            )
        x, _ = samples
        return smoothness(curvature, params, x)

    def _spread(self, state):
        """Puts what is a machine's own, and what it told, where the machine is, if machines are on several devices."""
        mesh = self.mesh
        if mesh is None:
            return state

        def place(path, _):
            by_machine = path[0].name in ("told", "own") or [key.name for key in path[:2]] == ["data", "samples"]
            return NamedSharding(mesh, PartitionSpec(*[mesh.axis_names[0]] * by_machine))

        return jax.device_put(state, jax.tree.map_with_path(place, state))


def default_step(smoothness: Float[Array, ""]) -> Float[Array, ""]:
    """1 / (3 L); 1 where nothing depends on it."""
    return 1 / (3 * jnp.where(smoothness > 0, smoothness, 1 / 3))


# What follows takes samples and does not return them: XLA would copy them.
@jax.jit
def begin(method: AbstractMethod, params: PyTree[Array], shards: Shards, step_size: Float[Array, ""]) -> dict[str, Any]:
    """The state before the first round, without samples."""
    w, unravel = ravel_pytree(params)
    rounds = jnp.zeros((), int)
    common = Common(w, None, step_size, rounds, unravel, shards.num_samples)
    machines = Machine(None, None, shards.samples, shards.sizes, shards.sizes / shards.num_samples)
    own, told = jax.vmap(functools.partial(method._begin, common))(machines)
    return {
        "params": params,
        "shared": jnp.sum(told, axis=0),
        "told": told,
        "own": own,
        "step_size": step_size,
        "round": rounds,
    }


@jax.jit
def _round(method: AbstractMethod, state: State, key, returned) -> dict[str, Any]:
    w, unravel = ravel_pytree(state.params)
    data = state.data

    def work(everywhere, told, own, samples, numbers):
        """What some machines do; sums over them, and what each keeps."""
        w, shared, step_size, rounds, sizes, returned, key = everywhere
        common = Common(w, shared, step_size, rounds, unravel, data.num_samples)
        here = sizes * returned
        share = (here / jnp.maximum(jnp.sum(here), 1)).astype(w.dtype)
        of_round = jax.random.fold_in(key, rounds)

        def go(told, own, samples, number):
            machine = Machine(told, own, samples, sizes[number], share[number])
            move, own, tells = method._work(common, machine, jax.random.fold_in(of_round, number))
            here = machine.share > 0
            return jnp.where(here, machine.share * move, 0), own, jnp.where(here, tells, told)

        moves, own, told = jax.vmap(go)(told, own, samples, numbers)
        return jnp.concatenate([jnp.sum(moves, axis=0), jnp.sum(told, axis=0)]), own, told

    everywhere = w, state.shared, state.step_size, state.round, data.sizes, returned, key
    by_machine = state.told, state.own, data.samples, jnp.arange(method.num_machines)
    if method.mesh is None:
        sums, own, told = work(everywhere, *by_machine)
    else:
        axis = method.mesh.axis_names[0]

        def on_device(*arguments):
            sums, own, told = work(*arguments)
            return jax.lax.psum(sums, axis), own, told

        same, split = PartitionSpec(), PartitionSpec(axis)
        # Checked, gradients with respect to what is the same everywhere would be summed over machines.
        spread = jax.shard_map(
            on_device,
            mesh=method.mesh,
            in_specs=(same, split, split, split, split),
            out_specs=(same, split, split),
            check_vma=False,
        )
        sums, own, told = spread(everywhere, *by_machine)
    params = unravel(w + sums[: w.size])
    after = {"params": params, "shared": sums[w.size :], "told": told, "own": own, "round": state.round + 1}
    return {**state.moving(), **after}


@jax.jit
def _rounds(method, state, key, count, stragglers):
    def go(_, moving):
        now = dataclasses.replace(state, **moving)
        returned = jnp.ones(method.num_machines, bool)
        if stragglers is not None:
            # Machines draw their samples with the numbers before.
            of_round = jax.random.fold_in(jax.random.fold_in(key, now.round), method.num_machines)
            returned = stragglers.sample(of_round, method.num_machines)
        return _round(method, now, key, returned)

    return jax.lax.fori_loop(0, count, go, state.moving())


@jax.jit
def _objective(method: AbstractMethod, params, data: Shards):
    own = jnp.arange(jax.tree.leaves(data.samples)[0].shape[1]) < data.sizes[:, None]
    losses = jax.vmap(jax.vmap(lambda sample: method.loss(params, sample)))(data.samples)
    w, _ = ravel_pytree(params)
    return jnp.sum(jnp.where(own, losses, 0)) / data.num_samples + method.ridge / 2 * jnp.vdot(w, w)
