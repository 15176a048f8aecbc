import jax.numpy as jnp

import jaxcode as jc
from jaxcode import checks, linops


@jc.pytree("num_data", "num_workers")
class NearestCode(jc.AbstractCode):
    """Has worker n compute input n K // N; an input's result is the answer nearest to it."""

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
