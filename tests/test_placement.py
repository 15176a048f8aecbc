"""Workers spread over the devices of a program: the values of one device, and what crosses between devices."""

import contextlib
import math
import re
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxcode as jc
from jaxcode import ReplicationCode, SplineCode, UncodedCode, coded, ordering, pipeline, placement, robust

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
        # A size of zero, as in padding with zeros, is outside of its domain.
        return {"logits": linen.Dense(3)(hidden) / x["size"][:, None], "log": jnp.log(x["size"])}


NETWORK = Network()
VARIABLES = NETWORK.init(jax.random.key(0), X)


def mesh(*shape, names=("workers", "model"), kind=AxisType.Auto):
    devices = np.asarray(jax.devices()[: math.prod(shape)]).reshape(shape)
    return jax.sharding.Mesh(devices, names[: len(shape)], axis_types=(kind,) * len(shape))


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


PLACEMENTS = {
    "eight devices": lambda: placement.shard_map(mesh(8)),
    "one device": lambda: placement.shard_map(mesh(1)),
    "one of two axes": lambda: placement.shard_map(mesh(4, 2)),
    "both axes": lambda: placement.shard_map(mesh(4, 2), ("workers", "model")),
    "pmap": lambda: placement.pmap(),
    "pmap, three devices": lambda: placement.pmap(jax.devices()[:3]),
}
each_placement = pytest.mark.parametrize("name", PLACEMENTS)


def assert_close(found, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected)


@each_placement
def test_values_and_derivatives_are_those_of_one_device(name):
    def total(x, variables, **spread):
        results = coded((NETWORK, variables), CODE, **spread)(x, MASK)
        return jnp.sum(jnp.sin(results["logits"])) + jnp.sum(results["log"] ** 2), results

    def derivatives(**spread):
        return jax.jit(jax.value_and_grad(lambda x, v: total(x, v, **spread), (0, 1), has_aux=True))(X, VARIABLES)

    assert_close(derivatives(placement=PLACEMENTS[name]()), derivatives())


@pytest.mark.parametrize("code", [SplineCode.repeated(4, 7), ReplicationCode(2, 16), UncodedCode(3)], ids=str)
@pytest.mark.parametrize("name", ["eight devices", "pmap"])
def test_any_number_of_workers_runs_on_any_number_of_devices(name, code):
    mask = np.arange(code.num_workers) != 1
    assert_close(
        coded((NETWORK, VARIABLES), code, placement=PLACEMENTS[name]())(X, mask),
        coded((NETWORK, VARIABLES), code)(X, mask),
    )


@pytest.mark.parametrize("name", ["eight devices", "pmap"])
def test_it_composes_with_order_defence_and_vmap(name):
    options = {"order": ordering.greedy, "defence": robust.only_finite}
    masks = np.stack([MASK, np.roll(MASK, 1)])

    def predict_all(**spread):
        predict = coded((NETWORK, VARIABLES), CODE, **options, **spread)
        return jax.jit(jax.vmap(lambda mask: predict(X, mask)))(masks)

    assert_close(predict_all(placement=PLACEMENTS[name]()), predict_all())


def test_parameters_may_be_spread_already():
    both = mesh(4, 2)

    def spread(leaf):
        last = PartitionSpec(*[None] * (leaf.ndim - 1), "model")
        return jax.device_put(leaf, NamedSharding(both, last if leaf.shape[-1] % 2 == 0 else PartitionSpec()))

    variables = jax.tree.map(spread, VARIABLES)
    found = coded((NETWORK, variables), CODE, placement=placement.shard_map(both))(X, MASK)
    assert_close(found, coded((NETWORK, VARIABLES), CODE)(X, MASK))


@pytest.mark.parametrize("order", [None, ordering.greedy], ids=["unordered", "ordered"])
@pytest.mark.parametrize("spec", [PartitionSpec(), PartitionSpec("workers")], ids=["replicated", "by input"])
def test_wide_data_cross_between_devices_once(spec, order):
    """Inputs once, unless they are replicated; coded inputs once; answers once. Nothing else that is wide."""
    code, features, batch = SplineCode.systematic(20, 30), (32, 8), 400
    x = jax.device_put(jnp.ones((batch, *features)), NamedSharding(mesh(8), spec))
    mask = np.arange(30) % 6 != 1
    predict = coded(
        lambda b: jnp.tanh(jnp.tile(b, (1, 1, 4))), code, order=order, placement=placement.shard_map(mesh(8))
    )
    found = _collectives(jax.jit(lambda x: predict(x, mask)).lower(x).compile().as_text())
    # Per device, in numbers; workers are 32 on eight devices.
    groups, width = batch // 20, math.prod(features)
    inputs = [batch * width // 8] if spec else []
    wide = sorted([*inputs, groups * 32 * width // 8, 4 * groups * 32 * width // 8])
    assert sorted(size for kind, size in found if kind == "all-to-all") == wide
    rest = [size for kind, size in found if kind != "all-to-all"]
    # The order is found from every input's distance to every other.
    assert sum(rest) <= (batch * batch + 2 * batch if order else 1)


def _collectives(program):
    """Yields the kind of each exchange between devices, and how many numbers each device gets."""
    kinds = "all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute"
    for line in program.splitlines():
        if match := re.search(rf"= (.*?) ({kinds})(?:-start)?\(", line):
            shapes = re.findall(r"\[([\d,]*)\]", match[1])
            yield match[2], sum(math.prod(int(size) for size in shape.split(",") if size) for shape in shapes)


def test_narrow_answers_cross_once_too():
    predict = coded((NETWORK, VARIABLES), CODE, placement=placement.shard_map(mesh(8)))
    found = list(_collectives(jax.jit(lambda x: predict(x, MASK)).lower(X).compile().as_text()))
    assert sum(size for kind, size in found if kind == "all-reduce") <= 4 * 20


# ---- kinds of mesh axes ------------------------------------------------------------------------------------

BATCH = np.asarray(RNG.normal(size=(16, 16)), "float32")
WEIGHTS = jnp.asarray(RNG.normal(size=(16, 4)), "float32")
SPECS = {
    "unplaced": None,
    "replicated": PartitionSpec(),
    "by input": PartitionSpec("workers"),
    "by feature": PartitionSpec(None, "workers"),
}


def linear(batch):
    return jnp.tanh(batch @ WEIGHTS)


def place(spec, mesh):
    return jnp.asarray(BATCH) if spec is None else jax.device_put(BATCH, NamedSharding(mesh, spec))


@pytest.mark.parametrize("name", ["vmap", "shard_map", "pmap"])
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("is_set", [False, True], ids=["mesh not set", "mesh set"])
def test_explicit_axes_change_no_value(name, spec, is_set):
    explicit = mesh(8, kind=AxisType.Explicit)
    makers = {"vmap": placement.vmap, "shard_map": lambda: placement.shard_map(explicit), "pmap": placement.pmap}
    x, order = place(SPECS[spec], explicit), ordering.greedy if spec == "by input" else None
    with jax.set_mesh(explicit) if is_set else contextlib.nullcontext():
        found = coded(linear, CODE, order=order, placement=makers[name]())(x, MASK)
    assert_close(found, coded(linear, CODE, order=order)(jnp.asarray(BATCH), MASK))
    if spec == "by input":
        assert found.sharding.spec == PartitionSpec("workers", None)


@pytest.mark.parametrize("name", ["shard_map", "pmap"])
def test_automatic_axes_may_be_set(name):
    automatic = mesh(8)
    with jax.set_mesh(automatic):
        spread = placement.shard_map(automatic) if name == "shard_map" else placement.pmap()
        found = coded(linear, CODE, placement=spread)(jnp.asarray(BATCH), MASK)
    assert_close(found, coded(linear, CODE)(jnp.asarray(BATCH), MASK))


def test_inside_of_manual_axes_each_device_answers_its_own_inputs():
    manual = mesh(4)

    def predict(x):
        return coded(linear, CODE)(x, MASK)

    spread = jax.shard_map(predict, mesh=manual, in_specs=PartitionSpec("workers"), out_specs=PartitionSpec("workers"))
    expected = np.concatenate([predict(jnp.asarray(share)) for share in np.split(BATCH, 4)])
    assert_close(jax.jit(spread)(BATCH), expected)


def test_derivatives_pass_through_explicit_axes():
    explicit = mesh(8, kind=AxisType.Explicit)

    def total(x, **options):
        return jnp.sum(jnp.sin(coded(linear, CODE, **options)(x, MASK)))

    expected = jax.grad(total)(jnp.asarray(BATCH))
    with jax.set_mesh(explicit):
        x = place(PartitionSpec("workers"), explicit)
        found = jax.jit(jax.grad(lambda x: total(x, placement=placement.shard_map(explicit))))(x)
    assert_close(found, expected)


@pytest.mark.parametrize("code", [CODE, ReplicationCode(5, 12)], ids=["spline", "replication"])
@pytest.mark.parametrize("spec", [PartitionSpec(None, "workers"), PartitionSpec()], ids=["by feature", "replicated"])
def test_codes_encode_and_decode_along_explicit_axes(code, spec):
    explicit = mesh(8, kind=AxisType.Explicit)
    x = jax.device_put(BATCH[:5], NamedSharding(explicit, spec))
    sent = code.encode(x)
    results = jax.jit(lambda sent: code.decode(sent, MASK))(sent)
    assert sent.sharding.spec == results.sharding.spec == PartitionSpec(None, *spec[1:2] or [None])
    assert_close(sent, code.encode(BATCH[:5]))
    expected = code.decode(code.encode(BATCH[:5]), MASK)
    assert_close(results, expected)
    # Traced masks, nodes and plans pass into the program too.
    assert_close(jax.jit(lambda code, sent, mask: code.decode(sent, mask))(code, sent, MASK), expected)
    assert_close(jax.jit(lambda code, x: code.encode(x))(code, x), sent)
    plan = jc.Plan(prior=jc.Prior(workers=np.asarray(sent) / 2, data=BATCH[:5] / 2))
    planned = jax.jit(lambda sent, plan, mask: code.decode(sent, mask, plan))(sent, jax.device_put(plan), MASK)
    assert_close(planned, code.decode(np.asarray(sent), MASK, plan))


def test_a_decoder_used_within_a_mesh_is_used_outside_of_it():
    explicit, predict = mesh(8, kind=AxisType.Explicit), coded(linear, CODE)
    expected = [predict(BATCH, returned) for returned in (MASK, ~MASK)]
    pipeline._prepare_decoder.cache_clear()
    for mode in ("allow", "disallow"):
        for returned, results in zip((MASK, ~MASK), expected, strict=True):
            with jax.set_mesh(explicit), jax.transfer_guard(mode):
                x = place(PartitionSpec(None, None), explicit)
                for _ in range(3):
                    assert_close(predict(x, returned), results)
            alone = jax.device_put(BATCH, jax.devices()[3])
            for _ in range(3):
                found = predict(alone, returned)
                assert found.devices() == alone.devices()
                assert_close(found, results)


def test_pmap_over_part_of_a_mesh_that_is_set_is_refused():
    predict = coded(linear, CODE, placement=placement.pmap(jax.devices()[:3]))
    with jax.set_mesh(mesh(8)), pytest.raises(ValueError, match=r"pmap over 3 devices inside a mesh of 8.*leave out"):
        predict(jnp.asarray(BATCH), MASK)


# ---- arguments and hosts -----------------------------------------------------------------------------------


def test_an_axis_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"axis is 'rows'.*'workers', 'model'"):
        placement.shard_map(mesh(4, 2), "rows")
    with pytest.raises(ValueError, match=r"axis is \(\)"):
        placement.shard_map(mesh(4, 2), ())


def test_two_processes_make_one_mesh():
    """As on two hosts: each has its own devices, and both run the same program."""
    port = free_port()
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.two_hosts", str(port), str(number)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, text in zip(processes, outputs, strict=True):
        assert process.returncode == 0, text
        assert "8 devices, the values of one: True" in text, text
