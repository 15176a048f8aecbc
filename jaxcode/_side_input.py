"""Marks parts of inputs that are not coded."""

from typing import Any, final

import jax
from jaxtyping import PyTree

from ._pytree import pytree


@final
@pytree(eq=False)
class SideInput:
    """Marks a part of every input that codes must not mix, such as a mask, a length or a position.

    A worker whose coded input is a mixture gets the side input of the input that weighs most in it; one that computes
    an input itself gets that input's own. The model gets the values without the mark.

    Attributes:
        values: Leaves (B, ...), of any dtype.

    >>> import jax.numpy as jnp
    >>> import jaxcode as jc
    >>> predict = jc.coded(lambda x: x["row"] * x["keep"], jc.SplineCode.systematic(num_data=2, num_workers=3))
    >>> predict({"row": jnp.array([1.0, 2.0]), "keep": jc.SideInput(jnp.array([True, False]))})
    Array([1., 0.], dtype=float32)
    """

    values: PyTree[Any]


def is_side_input(node: Any) -> bool:
    """Returns whether a node of a tree is a side input."""
    return isinstance(node, SideInput)


def without_marks(x: PyTree[Any]) -> PyTree[Any]:
    """Replaces the side inputs of a batch by their values."""
    return jax.tree.map(lambda node: node.values if is_side_input(node) else node, x, is_leaf=is_side_input)
