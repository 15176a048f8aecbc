"""Reads and changes the smoothings of a code."""

import dataclasses
from typing import TypeVar

import numpy as np
from jax.typing import ArrayLike

from ..codes import AbstractCode

Code = TypeVar("Code", bound=AbstractCode)


def smoothing_of(code: AbstractCode, side: str) -> float | None:
    """Reads the smoothing of one of a code's interpolants.

    Args:
        code: Any code.
        side: "encoder" or "decoder".

    Returns:
        The smoothing; None where a code has no such interpolant, or one without smoothing.
    """
    smoothing = getattr(getattr(code, side, None), "smoothing", None)
    return None if smoothing is None else float(np.asarray(smoothing))


def with_smoothing(code: Code, **smoothings: ArrayLike) -> Code:
    """Changes smoothings of a code's interpolants.

    Args:
        code: A code whose interpolants have them.
        **smoothings: By side, "encoder" or "decoder"; may be traced.

    Returns:
        The code with these smoothings.
    """
    interpolants = {
        side: dataclasses.replace(getattr(code, side), smoothing=smoothing) for side, smoothing in smoothings.items()
    }
    return dataclasses.replace(code, **interpolants)  # pyright: ignore[reportArgumentType]
