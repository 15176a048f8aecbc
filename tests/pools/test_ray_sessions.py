"""Tests several pools that share one Ray cluster, with the real Ray."""

import pytest

from jaxcode import pools, stop

from .faults import FileFaults, listening_addresses, wait_until
from .test_ray import BATCH, LIMIT, is_in_cluster, jnp


@pytest.mark.long
def test_a_pool_outlives_the_one_that_started_ray_and_ends_it(tmp_path, recwarn):
    faults = FileFaults(tmp_path)
    first = pools.RayPool(jnp.sin, 1, progress=False)
    import ray  # after the pool has imported it, which sets the environment that Ray reads then

    with pools.RayPool(jnp.sin, 2, interceptor=faults, progress=False) as second:
        second.run(BATCH[:2], stop.answers(2), time_limit=LIMIT)
        first.close()
        faults.kill(1)
        # The death is noticed when the worker is called.
        assert second.run(BATCH[:2], stop.answers(2), time_limit=LIMIT).returned.all()
        assert second.counters()["restarts"] == 1
        wait_until(lambda: second.states() == ["idle"] * 2)
        assert second.run(BATCH[:2], stop.answers(2), time_limit=LIMIT).returned.all()
        assert all(address.is_loopback for address in listening_addresses(is_in_cluster))
        # Without Ray, workers cannot be started again, and no other cluster is started for them.
        ray.shutdown()
        with pytest.raises(pools.NotEnoughAnswers, match="Ray has been shut down"):
            second.run(BATCH[:2], stop.answers(2), time_limit=5.0)
        wait_until(lambda: second.states() == ["quarantined"] * 2)
        assert not ray.is_initialized()
    assert not ray.is_initialized()
    assert not [warning for warning in recwarn if "fork" in str(warning.message)]
