"""Modes of JAX that refuse what it otherwise does silently."""

import jax

STRICT_MODES = {
    "dtype promotion": lambda: jax.numpy_dtype_promotion("strict"),
    "rank promotion": lambda: jax.numpy_rank_promotion("raise"),
    "transfer guard": lambda: jax.transfer_guard("disallow"),
    "nans": lambda: jax.debug_nans(True),
}
