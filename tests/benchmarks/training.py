"""Compares an epoch of SAGA on a linear model with scikit-learn's: `python -m tests.benchmarks.training`.

The samples are those of a9a if `JAXCODE_DATA` names a folder that has it, and random ones of its size otherwise. Both
run on one core, as scikit-learn uses one thread.
"""

import os
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse
from sklearn.linear_model import LogisticRegression

from jaxcode import saga
from models.datasets import libsvm

from .timing import run_script, time_programs

RIDGE = 1e-3
EPOCHS = 8


def samples():
    """Returns rows of length 1 and their labels."""
    if "JAXCODE_DATA" in os.environ:
        x, y = libsvm("a9a")
    else:
        rng = np.random.default_rng(0)
        dense = np.zeros((32561, 123))
        np.put_along_axis(dense, np.argsort(rng.random(dense.shape), axis=1)[:, :14], 1.0, axis=1)
        x = scipy.sparse.csr_array(dense)
        y = np.sign(x @ rng.normal(size=123) + 0.1)
    lengths = np.sqrt(np.asarray(x.multiply(x).sum(axis=1)).ravel())
    return scipy.sparse.csr_array(scipy.sparse.diags_array(1 / np.maximum(lengths, 1e-12)) @ x), y


def scikit_learn(x, y):
    """Returns a function that trains by scikit-learn for some epochs, setting up included."""

    def run(epochs):
        model = LogisticRegression(
            C=1 / (RIDGE * len(y)), fit_intercept=False, solver="saga", tol=0.0, max_iter=epochs, random_state=0
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.fit(x, y)

    return run


def distributed_saga(x, y, dtype, **settings):
    """Returns a function that trains by `DistributedSaga` for some epochs."""
    with jax.enable_x64(dtype == np.float64):
        method = saga.DistributedSaga(saga.logistic, 1, len(y), RIDGE, **settings)
        x = saga.SparseRows.from_scipy(x.astype(dtype)) if scipy.sparse.issparse(x) else x.astype(dtype)
        state = method.init(jnp.zeros(123, dtype), (x, y.astype(dtype)))
        key = jax.random.key(0)

    def run(epochs):
        nonlocal state
        with jax.enable_x64(dtype == np.float64):
            for _ in range(epochs):
                state = method.round(state, key)
            jax.block_until_ready(state.params)

    return run


def measure(report):
    x, y = samples()
    runs = {
        "scikit-learn, dense rows, float64": scikit_learn(x.toarray(), y),
        "scikit-learn, sparse rows, float64": scikit_learn(x, y),
        "DistributedSaga, dense rows, float64": distributed_saga(x.toarray(), y, np.float64),
        "DistributedSaga, dense rows, float32": distributed_saga(x.toarray(), y, np.float32),
        "DistributedSaga, sparse rows, float64": distributed_saga(x, y, np.float64),
        "DistributedSaga, sparse rows, float32": distributed_saga(x, y, np.float32),
    }
    # The difference between many epochs and one contains no setting up.
    programs = {}
    for name, run in runs.items():
        programs[name, 1] = lambda run=run: run(1)
        programs[name, EPOCHS] = lambda run=run: run(1 + EPOCHS)
    times = time_programs(programs, seconds=20.0)
    epochs = {name: np.maximum(times[name, EPOCHS] - times[name, 1], 1e-9) / EPOCHS for name in runs}
    report.add_times(epochs)
    for rows in ("dense", "sparse"):
        reference = epochs[f"scikit-learn, {rows} rows, float64"]
        for dtype in ("float64", "float32"):
            ratio = epochs[f"DistributedSaga, {rows} rows, {dtype}"] / reference
            report.add(f"{dtype} to scikit-learn's, {rows} rows", ratio, "x", upper_limit=1.5)


if __name__ == "__main__":
    sys.exit(run_script(measure, __doc__, cores=1))
