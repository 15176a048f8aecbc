"""Runs one of two processes that compute a coded model over the devices of both, given a port and its number."""

import sys

import jax
import jax.numpy as jnp
import numpy as np

from jaxcode import SplineCode, coded, ordering, placement


def main(port: str, number: str) -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 4)
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=int(number))
    mesh = jax.make_mesh((8,), ("workers",), axis_types=(jax.sharding.AxisType.Auto,))
    x = np.random.default_rng(0).normal(size=(40, 16)).astype(np.float32)
    mask = np.arange(30) % 6 != 1
    code = SplineCode.systematic(20, 30)

    def f(batch):
        return jnp.tanh(batch @ jnp.ones((16, 3)))

    def predict(x, **options):
        return coded(f, code, order=ordering.greedy, **options)(x, mask)

    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    found = jax.jit(lambda x: predict(x, placement=placement.shard_map(mesh)), out_shardings=replicated)(x)
    expected = predict(x)
    error = np.abs(np.asarray(found.addressable_data(0)) - np.asarray(expected)).max()
    print(f"{jax.device_count()} devices, the values of one: {error < 1e-6}")


if __name__ == "__main__":
    main(*sys.argv[1:])
