"""Sets up what all tests share: the runtime type checker, the compiler's flags, and a limit on compiled programs."""

import collections
import importlib.metadata
import os
import pathlib

# Most of the tests' time is the compiler's. At jaxlib 0.10's lowest optimisation level it takes a quarter less, and
# with the older of its two ways to emit loops less than half. `make test-optimised` runs the tests of numbers at the
# default level, which users have. Newer jaxlibs are tested at the default level: the levels below take as long (0.12),
# but for the lowest, at which vmapped rational interpolants come out wrong.
if not os.environ.get("JAXCODE_TEST_OPTIMISED"):
    _IS_OLD = [int(part) for part in importlib.metadata.version("jaxlib").split(".")[:2]] < [0, 11]
    _FLAGS = ["--xla_backend_optimization_level=0", "--xla_cpu_use_fusion_emitters=false"] if _IS_OLD else []
    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *_FLAGS])

from jaxtyping import install_import_hook

# Before anything imports jaxcode: every annotated call is checked against its shapes and dtypes.
install_import_hook("jaxcode", "beartype.beartype")

import jax  # noqa: E402
import jaxtyping  # noqa: E402
import pytest  # noqa: E402

# For placements that spread workers over devices; everything else runs on the first.
jax.config.update("jax_num_cpu_devices", 8)


# Of tests with so many cases `make test` leaves every second to `make long`: they are much like the others.
_MANY_CASES = 3


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(config, items):
    """Starts with the tests that wait for other processes, as others run meanwhile, then with the longest files.

    Where JAXCODE_TEST_EVERY is 4, every test runs, but only every fourth case of it.
    """
    cases = collections.defaultdict(list)
    for item in items:
        if item.get_closest_marker("long") is None:
            cases[item.nodeid.split("[")[0]].append(item)
    for alike in cases.values():
        for item in alike[1::2] if len(alike) >= _MANY_CASES else ():
            item.add_marker("long")
    yield
    every, counts, kept = int(os.environ.get("JAXCODE_TEST_EVERY", "1")), collections.Counter(), []
    for item in items:
        test = item.nodeid.split("[")[0]
        if counts[test] % every == 0:
            kept.append(item)
        counts[test] += 1
    dropped = set(items).difference(kept)
    config.hook.pytest_deselected(items=[item for item in items if item in dropped])
    items[:] = kept
    waiting, longest = ("test_ray", "test_http", "test_serve_bench"), ("test_tune", "test_kernel", "test_demo")
    items.sort(key=lambda item: (not item.path.stem.startswith(waiting), not item.path.stem.startswith(longest)))


@pytest.fixture(autouse=True, scope="module")
def _room_for_programs():
    """Drops compiled programs before they are too many: each is mapped to memory, and Linux allows 65,530 mappings."""
    yield
    mappings = pathlib.Path("/proc/self/maps")
    if mappings.exists() and mappings.read_bytes().count(b"\n") > 30_000:
        jax.clear_caches()


@pytest.fixture
def unchecked():
    """Turns the runtime checker off, so that wrong arguments meet the library's own checks, as they do for users."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
