"""Makes classes frozen dataclasses that are pytrees to JAX's transformations."""

import dataclasses
import operator
from collections.abc import Callable
from typing import TypeVar, dataclass_transform

import jax

Class = TypeVar("Class")


@dataclass_transform(frozen_default=True)
def pytree(*static: str, eq: bool = True) -> Callable[[type[Class]], type[Class]]:
    """Makes a class a frozen dataclass and a pytree, whose leaves are all fields but the static ones.

    Unlike `jax.tree_util.register_dataclass`, rebuilding an object from its leaves does not run the constructor and its
    checks: JAX puts tracers, and placeholders of other types, in place of leaves.

    Args:
        *static: Names of fields that are part of the structure; their values must be hashable.
        eq: Whether objects with equal fields are equal. Must be False where fields are arrays, whose comparison has no
            single truth value.

    Returns:
        A class decorator.
    """

    def decorate(cls):
        cls = dataclasses.dataclass(frozen=True, eq=eq)(cls)
        leaves = [field.name for field in dataclasses.fields(cls) if field.name not in static]
        get_values, get_constants = _make_getter(leaves), _make_getter(static)

        def flatten(obj):
            return get_values(obj), get_constants(obj)

        def flatten_with_keys(obj):
            values, constants = flatten(obj)
            return [(jax.tree_util.GetAttrKey(name), v) for name, v in zip(leaves, values, strict=True)], constants

        def unflatten(constants, values):
            obj = object.__new__(cls)
            for name, value in (*zip(leaves, values, strict=True), *zip(static, constants, strict=True)):
                object.__setattr__(obj, name, value)
            return obj

        jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
        return cls

    return decorate


def _make_getter(names):
    """Returns a fast function from an object to the tuple of its fields: every call of a jitted function runs it."""
    if not names:
        return lambda obj: ()
    get = operator.attrgetter(*names)
    return get if len(names) > 1 else lambda obj: (get(obj),)
