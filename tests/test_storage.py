"""Surrogates and results of tuning in files."""

import json
import pickle

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from flax import nnx

import jaxcode as jc
from jaxcode import _storage
from jaxcode.stragglers import Uniform
from jaxcode.surrogates import distil

from .surrogates.cases import curve, line_surrogate

RNG = np.random.default_rng(0)
VECTORS = RNG.normal(size=(600, 4)).astype(np.float32)
IMAGES = RNG.uniform(size=(600, 8, 8, 1)).astype(np.float32)
TOKENS = RNG.integers(30, size=(600, 6))
PAIRS = {
    "ids": TOKENS,
    "mask": TOKENS > 9,
    "other": TOKENS[:, 0],
    "set": TOKENS[:, 1] > 9,
    "weight": np.float32(TOKENS[:, 0]),
}


def _classify(x):
    return {"scores": jnp.tanh(x[:, :3] * 2)}


def _distil(kind):
    options = {"cost": 1e3, "progress": False}
    return {
        "linear": lambda: (jc.surrogate(_classify, VECTORS[:100], **options), VECTORS),
        "vectors": lambda: (jc.surrogate(lambda x: jnp.sin(3 * x), VECTORS, **options), VECTORS),
        "few images": lambda: (jc.surrogate(lambda x: x.mean(axis=(1, 2)), IMAGES[:90], **options), IMAGES),
        "images": lambda: (jc.surrogate(lambda x: x.max(axis=(1, 2)), IMAGES, cost=5.0, progress=False), IMAGES),
        "tokens": lambda: (jc.surrogate(lambda x: jnp.sin(x[:, :2]), TOKENS, **options), TOKENS),
        "pairs": lambda: (jc.surrogate(lambda x: jnp.sin(x["ids"][:, 0] + x["weight"]), PAIRS, **options), PAIRS),
    }[kind]()


@pytest.mark.parametrize("kind", ["linear", "vectors", "few images", "images", "tokens", "pairs"])
def test_surrogates_come_back_from_files(kind, tmp_path, monkeypatch):
    # What they have learned does not matter here.
    monkeypatch.setattr(distil, "_LEAST_STEPS", 10)
    monkeypatch.setattr(distil, "_MAX_STEPS", 10)
    prior, x = _distil(kind)
    prior.save(tmp_path / "prior.safetensors")
    loaded = jc.load_surrogate(tmp_path / "prior.safetensors")
    for found, expected in zip(loaded.with_risk(x), prior.with_risk(x), strict=True):
        chex.assert_trees_all_equal(found, expected)
    assert (loaded.losses, loaded.cost) == (prior.losses, prior.cost)
    assert jax.tree.structure(loaded.layout) == jax.tree.structure(prior.layout)
    # Nothing is left over from writing.
    assert [path.name for path in tmp_path.iterdir()] == ["prior.safetensors"]


@pytest.mark.parametrize("name", ["model", "features"])
def test_what_the_user_made_is_given_again(name, tmp_path):
    def make(seed, width=8):
        rngs = nnx.Rngs(seed)
        return nnx.Sequential(nnx.Linear(4, width, rngs=rngs), nnx.tanh, nnx.Linear(width, 4, rngs=rngs))

    prior = jc.surrogate(jnp.sin, VECTORS[:100], progress=False, **{name: make(0)})
    path = tmp_path / "prior.safetensors"
    prior.save(path)
    loaded = jc.load_surrogate(path, **{name: make(1)})
    np.testing.assert_array_equal(loaded(VECTORS), prior(VECTORS))
    with pytest.raises(ValueError, match=f"{name} is None"):
        jc.load_surrogate(path)
    with pytest.raises(ValueError, match=f"{name} has parameters of shapes"):
        jc.load_surrogate(path, **{name: make(0, width=9)})


@pytest.mark.parametrize("case", ["copies", "curve", "plain"])
def test_results_of_tuning_come_back_from_files_and_pickles(case, tmp_path):
    x = RNG.normal(size=(60, 2)).astype(np.float32)
    options = {
        "copies": {"prior": line_surrogate(), "layouts": {"copies": jc.ReplicationCode(5, 8)}},
        "curve": {"prior": line_surrogate(), "layouts": {"one": jc.SplineCode.systematic(5, 8)}},
        "plain": {"layouts": {"one": jc.LagrangeCode.chebyshev(5, 8)}, "batch_size": 60},
    }[case]
    tuned = jc.tune(curve, x, 5, 8, Uniform(2), progress=False, **options)
    tuned.save(tmp_path / "folder")
    returned = np.arange(8) > 1
    for loaded in (jc.load_tuned(tmp_path / "folder"), pickle.loads(pickle.dumps(tuned))):
        np.testing.assert_array_equal(loaded.coded(curve)(x, returned), tuned.coded(curve)(x, returned))
        assert str(loaded) == str(tuned)


def test_orders_of_ones_own_cannot_be_saved(tmp_path):
    tuned = jc.tune(
        jnp.sin,
        VECTORS[:40],
        5,
        8,
        Uniform(1),
        orders={"own": lambda x, num_data: jnp.arange(x.shape[0])},
        layouts={"one": jc.SplineCode.systematic(5, 8)},
        progress=False,
    )
    with pytest.raises(ValueError, match=r"object\.order is <function.*cannot be saved"):
        tuned.save(tmp_path)


def _write(path, text, version="1"):
    safetensors.numpy.save_file({}, path, {"jaxcode": version, "object": text})


BROKEN = {
    "no safetensors": (lambda path: path.write_bytes(b"pickle?"), "is no safetensors file"),
    "another program's": (
        lambda path: safetensors.numpy.save_file({"a": np.zeros(2)}, path),
        "was not written by this version of jaxcode",
    ),
    "a later version's": (lambda path: _write(path, "{}", "2"), "was not written by this version"),
    "another object": (lambda path: _storage.save(path, Uniform(1)), "holds a Uniform; expected a Surrogate"),
    "another class": (lambda path: _write(path, json.dumps({"class": "os.system", "fields": {}})), "is damaged"),
    "a missing field": (lambda path: _write(path, json.dumps({"class": "Surrogate", "fields": {}})), "is damaged"),
    "a missing array": (lambda path: _write(path, json.dumps({"array": "a", "shape": [2]})), "is damaged"),
    "no JSON": (lambda path: _write(path, "{"), "is damaged"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_files_that_are_no_surrogates_are_refused(case, tmp_path):
    write, message = BROKEN[case]
    path = tmp_path / "prior.safetensors"
    write(path)
    with pytest.raises(ValueError, match=message):
        jc.load_surrogate(path)


def test_a_file_that_is_not_there():
    with pytest.raises(OSError, match="nowhere"):
        jc.load_surrogate("nowhere.safetensors")
