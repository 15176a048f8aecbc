"""Defines the state of methods and of their machines between rounds."""

import dataclasses
from collections.abc import Callable
from typing import Any, final

from jaxtyping import Array, Bool, Float, Integer, PyTree

from .._pytree import pytree
from .shards import Shards


@final
@pytree(eq=False)
class State:
    """Holds a method's state between two rounds.

    Attributes:
        params: The parameters, the same on all machines.
        message_sum: The sum of all machines' messages, shape (p,).
        messages: The message of each machine when it was last active, shape (K, p).
        local: The local state of machines, which is never communicated, leaves (K, ...).
        step_size: The length of every step.
        round: The number of rounds so far.
        data: The samples.
    """

    params: PyTree[Array]
    message_sum: Float[Array, "message"]
    messages: Float[Array, "machines message"]
    local: PyTree[Array]
    step_size: Float[Array, ""]
    round: Integer[Array, ""]
    data: Shards

    def without_data(self) -> dict[str, Any]:
        """Returns all fields but the samples, by name: what rounds change and checkpoints store."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "data"}


@final
@pytree(eq=False)
class Machine:
    """Holds the data of one machine in a round, or of several machines with a leading axis.

    Attributes:
        message: What it last sent to all others, shape (p,).
        local: Its local state.
        samples: Its samples, leaves (m, ...).
        size: How many of them are samples; the rest are padding.
        weight: Its share of the samples of all machines that are active in the round; zero where it is not active.
    """

    message: Any
    local: Any
    samples: PyTree[Array]
    size: Integer[Array, "*machines"]
    weight: Float[Array, "*machines"]

    @property
    def active(self) -> Bool[Array, "*machines"]:
        """Whether it takes part in the round."""
        return self.weight > 0


@final
@pytree("unravel", "num_samples", eq=False)
class Common:
    """Holds the data that all machines share when a round begins.

    Attributes:
        w: The parameters as one vector.
        message_sum: The sum of all machines' messages, shape (p,).
        step_size: The length of every step.
        round: The number of rounds so far.
        unravel: From such a vector to parameters.
        num_samples: n.
    """

    w: Float[Array, "d"]
    message_sum: Any
    step_size: Float[Array, ""]
    round: Integer[Array, ""]
    unravel: Callable[[Array], PyTree[Array]]
    num_samples: int
