"""What methods know and remember."""

import dataclasses
from collections.abc import Callable
from typing import Any, final

from jaxtyping import Array, Float, Integer, PyTree

from .._pytree import pytree
from .shards import Shards


@final
@pytree(eq=False)
class State:
    """Where a method is after a round.

    Attributes:
        params: The same on all machines.
        shared: The sum over machines of what each tells all others, shape (p,).
        told: That of each machine, when it last took part, shape (K, p).
        own: What machines keep to themselves, leaves (K, ...).
        step_size: Of every step.
        round: How many rounds there were.
        data: The samples.
    """

    params: PyTree[Array]
    shared: Float[Array, "told"]
    told: Float[Array, "machines told"]
    own: PyTree[Array]
    step_size: Float[Array, ""]
    round: Integer[Array, ""]
    data: Shards

    def moving(self) -> dict[str, Any]:
        """All but the samples, by name."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "data"}


@final
@pytree(eq=False)
class Machine:
    """One machine, or several, with a leading axis.

    Attributes:
        told: What it last told all others, shape (p,).
        own: What it keeps to itself.
        samples: Its samples, leaves (m, ...).
        size: How many of them are its own; those behind are copies of the last.
        share: Its weight among those that take part in the round: of their samples, those that are its own. Zero where
            it does not take part.
    """

    told: Any
    own: Any
    samples: PyTree[Array]
    size: Integer[Array, "*machines"]
    share: Float[Array, "*machines"]


@final
@pytree("unravel", "num_samples", eq=False)
class Common:
    """What all machines know when a round begins.

    Attributes:
        w: The parameters as one vector.
        shared: The sum over machines of what each told, shape (p,).
        step_size: Of every step.
        round: How many rounds there were.
        unravel: From a vector to parameters.
        num_samples: n.
    """

    w: Float[Array, "d"]
    shared: Any
    step_size: Float[Array, ""]
    round: Integer[Array, ""]
    unravel: Callable[[Array], PyTree[Array]]
    num_samples: int
