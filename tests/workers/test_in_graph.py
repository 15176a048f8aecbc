"""Workers spread over the devices of a program: the values of one device, and what crosses between devices."""

import math
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxcode import ReplicationCode, SplineCode, UncodedCode, coded, ordering, robust, workers

from .faults import free_port

RNG = np.random.default_rng(0)
CODE = SplineCode.systematic(5, 12)
MASK = np.arange(12) % 5 != 1
X = {
    "image": jnp.asarray(RNG.normal(size=(17, 16, 3)), "float32"),
    "size": jnp.asarray(RNG.uniform(1, 2, 17), "float32"),
}


class Network(linen.Module):
    @linen.compact
    def __call__(self, x):
        hidden = jnp.tanh(linen.Dense(8)(x["image"].reshape(len(x["size"]), -1)))
        # Outside of its domain where there is nothing: a size of zero.
        return {"logits": linen.Dense(3)(hidden) / x["size"][:, None], "log": jnp.log(x["size"])}


NETWORK = Network()
VARIABLES = NETWORK.init(jax.random.key(0), X)


def mesh(*shape, names=("workers", "model")):
    devices = np.asarray(jax.devices()[: math.prod(shape)]).reshape(shape)
    return jax.sharding.Mesh(devices, names[: len(shape)], axis_types=(AxisType.Auto,) * len(shape))


MAPS = {
    "eight devices": lambda: workers.shard_map(mesh(8)),
    "one device": lambda: workers.shard_map(mesh(1)),
    "one of two axes": lambda: workers.shard_map(mesh(4, 2)),
    "both axes": lambda: workers.shard_map(mesh(4, 2), ("workers", "model")),
    "pmap": lambda: workers.pmap(),
    "pmap, three devices": lambda: workers.pmap(jax.devices()[:3]),
}
each_map = pytest.mark.parametrize("name", MAPS)


def close(found, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected)


@each_map
def test_values_and_derivatives_are_those_of_one_device(name):
    def total(x, variables, **spread):
        results = coded((NETWORK, variables), CODE, **spread)(x, MASK)
        return jnp.sum(jnp.sin(results["logits"])) + jnp.sum(results["log"] ** 2), results

    def derivatives(**spread):
        return jax.jit(jax.value_and_grad(lambda x, v: total(x, v, **spread), (0, 1), has_aux=True))(X, VARIABLES)

    close(derivatives(workers=MAPS[name]()), derivatives())


@pytest.mark.parametrize("code", [SplineCode.repeated(4, 7), ReplicationCode(2, 16), UncodedCode(3)], ids=str)
@pytest.mark.parametrize("name", ["eight devices", "pmap"])
def test_any_number_of_workers_runs_on_any_number_of_devices(name, code):
    mask = np.arange(code.num_workers) != 1
    close(coded((NETWORK, VARIABLES), code, workers=MAPS[name]())(X, mask), coded((NETWORK, VARIABLES), code)(X, mask))


@pytest.mark.parametrize("name", ["eight devices", "pmap"])
def test_it_composes_with_order_defence_and_vmap(name):
    options = {"order": ordering.greedy, "defence": robust.only_finite}
    masks = np.stack([MASK, np.roll(MASK, 1)])

    def predicted(**spread):
        predict = coded((NETWORK, VARIABLES), CODE, **options, **spread)
        return jax.jit(jax.vmap(lambda mask: predict(X, mask)))(masks)

    close(predicted(workers=MAPS[name]()), predicted())


def test_parameters_may_be_spread_already():
    both = mesh(4, 2)

    def spread(leaf):
        last = PartitionSpec(*[None] * (leaf.ndim - 1), "model")
        return jax.device_put(leaf, NamedSharding(both, last if leaf.shape[-1] % 2 == 0 else PartitionSpec()))

    variables = jax.tree.map(spread, VARIABLES)
    found = coded((NETWORK, variables), CODE, workers=workers.shard_map(both))(X, MASK)
    close(found, coded((NETWORK, VARIABLES), CODE)(X, MASK))


@pytest.mark.parametrize("order", [None, ordering.greedy], ids=["as it is", "ordered"])
@pytest.mark.parametrize("spec", [PartitionSpec(), PartitionSpec("workers")], ids=["everywhere", "by input"])
def test_wide_data_cross_between_devices_once(spec, order):
    """Inputs once, where they do not lie everywhere; coded inputs once; answers once. Nothing else that is wide."""
    code, features, batch = SplineCode.systematic(20, 30), (32, 8), 400
    x = jax.device_put(jnp.ones((batch, *features)), NamedSharding(mesh(8), spec))
    mask = np.arange(30) % 6 != 1
    predict = coded(lambda b: jnp.tanh(jnp.tile(b, (1, 1, 4))), code, order=order, workers=workers.shard_map(mesh(8)))
    found = _collectives(jax.jit(lambda x: predict(x, mask)).lower(x).compile().as_text())
    # Per device, in numbers; workers are 32 on eight devices.
    groups, width = batch // 20, math.prod(features)
    inputs = [batch * width // 8] if spec else []
    wide = sorted([*inputs, groups * 32 * width // 8, 4 * groups * 32 * width // 8])
    assert sorted(size for kind, size in found if kind == "all-to-all") == wide
    rest = [size for kind, size in found if kind != "all-to-all"]
    # What the order is found from: every input's distance from every other.
    assert sum(rest) <= (batch * batch + 2 * batch if order else 1)


def _collectives(program):
    """What devices exchange: kinds, and how many numbers each device gets."""
    kinds = "all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute"
    for line in program.splitlines():
        if match := re.search(rf"= (.*?) ({kinds})(?:-start)?\(", line):
            shapes = re.findall(r"\[([\d,]*)\]", match[1])
            yield match[2], sum(math.prod(int(size) for size in shape.split(",") if size) for shape in shapes)


def test_narrow_answers_cross_once_too():
    predict = coded((NETWORK, VARIABLES), CODE, workers=workers.shard_map(mesh(8)))
    found = list(_collectives(jax.jit(lambda x: predict(x, MASK)).lower(X).compile().as_text()))
    assert sum(size for kind, size in found if kind == "all-reduce") <= 4 * 20


def test_an_axis_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"axis is 'rows'.*'workers', 'model'"):
        workers.shard_map(mesh(4, 2), "rows")
    with pytest.raises(ValueError, match=r"axis is \(\)"):
        workers.shard_map(mesh(4, 2), ())


def test_two_processes_make_one_mesh():
    """As on two hosts: each has its own devices, and both run the same program."""
    port = free_port()
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.workers.two_hosts", str(port), str(number)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in range(2)
    ]
    try:
        said = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, text in zip(processes, said, strict=True):
        assert process.returncode == 0, text
        assert "8 devices, the values of one: True" in text, text
