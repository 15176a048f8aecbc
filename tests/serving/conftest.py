"""Sets up a pool of twelve threads for the tests of a module, and its faults."""

import pytest

from jaxcode import pools

from ..pools.faults import Faults, wait_until
from .servers import f


@pytest.fixture(scope="module")
def _shared():
    faults = Faults()
    with pools.ThreadPool(f, 12, interceptor=faults) as pool:
        yield pool, faults


@pytest.fixture
def pool(_shared):
    return _shared[0]


@pytest.fixture
def faults(_shared):
    pool, faults = _shared
    wait_until(lambda: pool.states() == ["idle"] * 12)
    yield faults
    faults.release()
