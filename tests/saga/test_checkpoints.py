"""Tests checkpoints: how runs resume, and how checkpoints of other problems and damaged ones are handled."""

import dataclasses
import subprocess
import sys
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from jaxcode import saga, stragglers
from jaxcode.saga import DistributedSaga
from jaxcode.saga._digests import function_digest

from .test_run import DATA, KEY, METHOD, METHODS, begin


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_interrupted_runs_resume_bit_for_bit(tmp_path, method):
    late = stragglers.Independent(0.3)
    uninterrupted, _ = method.run(begin(method), KEY, 10, every=2, stragglers=late, progress=False)

    def stop_early(state, record):
        return record["rounds"] == 6

    folder = tmp_path / "new" / "folder"
    settings = {"every": 2, "stragglers": late, "checkpoint": folder, "progress": False}
    interrupted, history = method.run(begin(method), KEY, 10, callbacks=[stop_early], **settings)
    assert int(interrupted.round) == 6
    assert history.rounds.tolist() == [0, 2, 4, 6]
    resumed, history = method.run(begin(method), KEY, 10, **settings)
    assert history.rounds.tolist() == [6, 8, 10]
    chex.assert_trees_all_equal(resumed, uninterrupted)
    # All rounds are done.
    repeated, history = method.run(begin(method), KEY, 10, **settings)
    assert history.rounds.tolist() == [10]
    chex.assert_trees_all_equal(repeated, uninterrupted)


def logistic_like(params, sample):
    return saga.logistic(params, sample)


def scale(factor):
    """Returns a loss with a constant in its closure."""
    return lambda params, sample: factor * saga.logistic(params, sample)


def with_array(array):
    return lambda params, sample: saga.logistic(params, sample) + jnp.sum(jnp.asarray(array))


def huber(delta):
    return saga.LinearLoss(lambda margin, y: jnp.where(jnp.abs(margin - y) < delta, (margin - y) ** 2, delta), 1.0)


def box(size):
    return lambda params, step_size: jnp.clip(params, -size, size)


GENERIC = {"step_size": 0.1}
PROX = {"prox": saga.soft_threshold(0.1)}


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({}, {"loss": saga.squared}, "another loss"),
        ({"loss": huber(1.0)}, {"loss": huber(1.5)}, "another loss"),
        ({"loss": scale(1.0), **GENERIC}, {"loss": scale(1.5), **GENERIC}, "another loss"),
        ({"loss": with_array(np.arange(9.0)), **GENERIC}, {"loss": with_array(np.ones(9)), **GENERIC}, "another loss"),
        ({}, PROX, "another prox"),
        (PROX, {"prox": saga.soft_threshold(0.2)}, "another prox"),
        (PROX, {"prox": box(1.0)}, "another prox"),
        ({"prox": box(1.0)}, {"prox": box(2.0)}, "another prox"),
        ({}, {"step_size": 0.01}, "another method or other settings"),
        ({}, {"ridge": 0.3}, "another method or other settings"),
        ({}, {"correction": "own"}, "another method or other settings"),
        ({}, {"period": 17}, "another method or other settings"),
        ({}, {"num_machines": 4}, "another method or other samples"),
    ],
)
def test_a_checkpoint_of_another_method_is_refused(tmp_path, first, second, message):
    first, second = (dataclasses.replace(METHOD, **settings) for settings in (first, second))
    first.run(begin(first), KEY, 1, checkpoint=tmp_path, progress=False)
    with pytest.raises(ValueError, match=f"checkpoint .* is of {message}"):
        second.run(begin(second), KEY, 1, checkpoint=tmp_path, progress=False)
    # The first method still accepts it.
    state, _ = first.run(begin(first), KEY, 1, checkpoint=tmp_path, progress=False)
    assert int(state.round) == 1


def test_a_checkpoint_of_other_samples_is_refused(tmp_path):
    METHOD.run(begin(METHOD), KEY, 2, checkpoint=tmp_path, progress=False)
    x, y = DATA
    for data in ((x, -y), (x[::-1], y), (x, y[::-1])):
        state = METHOD.init(jnp.zeros(6), data)
        with pytest.raises(ValueError, match="other samples"):
            METHOD.run(state, KEY, 2, checkpoint=tmp_path, progress=False)


def test_the_same_functions_under_other_names_have_the_same_digest():
    shapes = jnp.zeros(6), (jnp.zeros(6), jnp.zeros(()))

    def renamed(w, pair):
        return saga.logistic(w, pair)

    assert not np.array_equal(*(function_digest(f, *shapes) for f in (scale(1.0), scale(1.5))))
    np.testing.assert_array_equal(*(function_digest(f, *shapes) for f in (logistic_like, renamed)))
    np.testing.assert_array_equal(*(function_digest(scale(0.5), *shapes) for _ in range(2)))


def test_digests_are_the_same_in_every_process():
    program = (
        "import jax, jax.numpy as jnp; from jaxcode import saga; from jaxcode.saga import _digests as f;"
        "s = jnp.zeros(6), (jnp.zeros(6), jnp.zeros(()));"
        "print(f.function_digest(jax.value_and_grad(saga.logistic), *s),"
        "f.function_digest(saga.soft_threshold(0.1), jnp.zeros(6), jnp.zeros(())))"
    )
    processes = [subprocess.run([sys.executable, "-c", program], capture_output=True, text=True) for _ in range(2)]
    assert processes[0].returncode == 0, processes[0].stderr
    assert processes[0].stdout == processes[1].stdout


def truncate(folder):
    """Halves every file."""
    for file in folder.rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def truncate_arrays(folder):
    for file in folder.rglob("d/*"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip_byte(folder):
    """Changes a byte in the middle of every file with arrays."""
    for file in folder.rglob("d/*"):
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 0xFF
        file.write_bytes(content)


def delete_files(folder):
    for file in folder.rglob("*"):
        if file.is_file():
            file.unlink()


DAMAGES = [truncate, truncate_arrays, flip_byte, delete_files]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoints_are_replaced_by_the_one_before(tmp_path, damage):
    uninterrupted, _ = METHOD.run(begin(METHOD), KEY, 6, every=2, progress=False)
    METHOD.run(begin(METHOD), KEY, 4, every=2, checkpoint=tmp_path, progress=False)
    damage(tmp_path / "4")
    with pytest.warns(UserWarning, match=r"4 cannot be read .*resumes from round 2"):
        state, history = METHOD.run(begin(METHOD), KEY, 6, every=2, checkpoint=tmp_path, progress=False)
    assert history.rounds.tolist() == [2, 4, 6]
    chex.assert_trees_all_equal(jax.device_get(state), jax.device_get(uninterrupted))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        _, history = METHOD.run(begin(METHOD), KEY, 6, every=2, checkpoint=tmp_path, progress=False)
    assert history.rounds.tolist() == [6]


@pytest.mark.parametrize("damage", DAMAGES)
def test_checkpoints_that_are_all_damaged_are_an_error(tmp_path, damage):
    METHOD.run(begin(METHOD), KEY, 2, checkpoint=tmp_path, progress=False)
    for step in ("1", "2"):
        damage(tmp_path / step)
    with pytest.raises(ValueError, match=r"cannot be read .*delete it to start from the beginning"):
        METHOD.run(begin(METHOD), KEY, 2, checkpoint=tmp_path, progress=False)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_machines_on_devices_resume(tmp_path, axis_type):
    mesh = jax.make_mesh((4,), ("machines",), axis_types=(axis_type,))
    method = dataclasses.replace(METHOD, mesh=mesh)
    uninterrupted, _ = METHOD.run(begin(METHOD), KEY, 4, progress=False)
    method.run(begin(method), KEY, 2, checkpoint=tmp_path, progress=False)
    state, history = method.run(begin(method), KEY, 4, checkpoint=tmp_path, progress=False)
    assert history.rounds.tolist() == [2, 3, 4]
    chex.assert_trees_all_close(jax.device_get(state.params), jax.device_get(uninterrupted.params), rtol=1e-10)
    # A run on one device resumes from it, too.
    _, history = METHOD.run(begin(METHOD), KEY, 4, checkpoint=tmp_path, progress=False)
    assert history.rounds.tolist() == [4]


def test_states_that_have_diverged_are_not_stored(tmp_path):
    method = DistributedSaga(saga.squared, 8, 16, step_size=1e3)
    with pytest.raises(saga.DivergenceError):
        method.run(begin(method), KEY, 50, checkpoint=tmp_path, progress=False)
    assert not [folder for folder in tmp_path.iterdir() if folder.name.isdigit()]


def test_a_missing_orbax_is_an_error_that_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    with pytest.raises(ImportError, match=r"pip install 'jaxcode\[train\]'"):
        METHOD.run(begin(METHOD), KEY, 2, checkpoint=tmp_path, progress=False)
    METHOD.run(begin(METHOD), KEY, 2, progress=False)
