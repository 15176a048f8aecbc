"""Codes refuse arguments that make no sense, and say which, what they were and what was expected."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcode import BerrutCode, BSplineCode, FloaterHormannCode, LagrangeCode, ReplicationCode, SplineCode, UncodedCode

from .cases import CODES, each_program

each_family = pytest.mark.parametrize("name", ["berrut", "replication", "uncoded"])

UP = np.array([-1.0, 0.0, 1.0])

CONSTRUCTED = {
    "nodes-not-ascending": (lambda: SplineCode(UP[::-1], UP), "data_nodes.*ascending"),
    "data-nodes-equal": (lambda: SplineCode(np.array([0.0, 0.0, 1.0]), UP), r"data_nodes\[0:2\].*no two equal"),
    "workers-descending": (lambda: SplineCode(UP, UP[::-1]), "worker_nodes.*ascending"),
    "workers-equal-for-berrut": (lambda: BerrutCode(UP, np.array([0.0, 0.0, 1.0])), "worker_nodes.*no two equal"),
    "workers-equal-for-fh": (lambda: FloaterHormannCode(UP, np.array([0.0, 1.0, 1.0])), "worker_nodes.*no two equal"),
    "workers-equal-for-lagrange": (lambda: LagrangeCode(UP, np.array([0.0, 1.0, 1.0])), "worker_nodes.*no two equal"),
    "workers-equal-for-bspline": (lambda: BSplineCode(UP, np.array([0.0, 1.0, 1.0])), "worker_nodes.*no two equal"),
    "one-node": (lambda: SplineCode(np.array([0.0]), UP), r"data_nodes has shape \(1,\).*at least 2"),
    "matrix-of-nodes": (lambda: SplineCode(UP[:, None], UP), r"data_nodes has shape \(3, 1\)"),
    "nan-node": (lambda: SplineCode(UP, np.array([0.0, np.nan])), "worker_nodes.*finite"),
    "complex-nodes": (lambda: SplineCode(UP, UP * 1j), "worker_nodes has dtype complex128"),
    "strings": (lambda: SplineCode(["a", "b"], UP), "data_nodes"),
    "negative-smoothing": (lambda: SplineCode(UP, UP, 0.0, -1.0), r"decoder_smoothing is -1\.0.*0"),
    "infinite-smoothing": (lambda: SplineCode(UP, UP, np.inf), "encoder_smoothing is inf.*finite"),
    "nan-smoothing": (lambda: SplineCode(UP, UP, np.nan), "encoder_smoothing is nan"),
    "vector-smoothing": (lambda: SplineCode(UP, UP, np.zeros(3)), r"encoder_smoothing has shape \(3,\)"),
    "text-smoothing": (lambda: SplineCode(UP, UP, "little"), "encoder_smoothing is 'little'"),
    "one-input": (lambda: SplineCode.chebyshev(1, 5), "num_data is 1.*at least 2"),
    "half-an-input": (lambda: SplineCode.chebyshev(2.5, 5), r"num_data is 2\.5.*whole"),
    "one-worker": (lambda: BerrutCode.chebyshev(2, 1), "num_workers is 1"),
    "fewer-workers-than-data": (lambda: SplineCode.systematic(5, 4), "num_workers is 4.*5 data nodes"),
    "fewer-workers-than-data-repeated": (lambda: SplineCode.repeated(5, 4), "num_workers is 4.*5 data nodes"),
    "negative-degree": (lambda: FloaterHormannCode.chebyshev(3, 6, degree=-1), "degree is -1.*at least 0"),
    "degree-not-whole": (lambda: FloaterHormannCode.chebyshev(3, 6, degree=1.5), r"degree is 1\.5"),
    "degree-true": (lambda: FloaterHormannCode.chebyshev(3, 6, degree=True), "degree is True"),
    "lagrange-degree-zero": (lambda: LagrangeCode.chebyshev(3, 6, degree=0), "degree is 0.*at least 1"),
    "unknown-encoder": (lambda: BSplineCode.chebyshev(3, 6, encoder="spline"), "encoder is 'spline'.*berrut"),
    "replication-too-few": (lambda: ReplicationCode(5, 4), "num_workers is 4.*5"),
    "replication-not-whole": (lambda: ReplicationCode(2.0, 4), r"num_data is 2\.0"),
    "uncoded-none": (lambda: UncodedCode(0), "num_data is 0"),
}


@pytest.mark.parametrize("call", CONSTRUCTED)
def test_constructors_refuse(unchecked, call):
    construct, message = CONSTRUCTED[call]
    with pytest.raises(ValueError, match=message):
        construct()


@each_family
def test_encode_refuses(unchecked, name):
    code = CODES[name]
    bad = {
        r"x has shape \(7, 2\).*leading axis of 5": jnp.ones((7, 2)),
        r"x\['a'\]\[1\] has shape \(\)": {"a": [jnp.ones(5), jnp.ones(())]},
        "x has dtype complex64.*real": jnp.ones(5, jnp.complex64),
        "x has dtype bool.*real": jnp.ones(5, bool),
    }
    for message, x in bad.items():
        with pytest.raises(ValueError, match=message):
            code.encode(x)


@each_family
def test_decode_refuses(unchecked, name):
    code = CODES[name]
    n = code.num_workers
    y, returned = jnp.ones((n, 2)), np.ones(n, bool)
    bad = {
        rf"y has shape \({n + 1}, 2\).*leading axis of {n}": (jnp.ones((n + 1, 2)), returned),
        "y has dtype complex64": (y.astype(jnp.complex64), returned),
        rf"returned has shape \({n + 1},\).*\({n},\)": (y, np.ones(n + 1, bool)),
        r"returned has shape \(\)": (y, True),
        "returned has dtype int.*expected bool": (y, np.ones(n, int)),
        "returned has dtype float": (y, np.ones(n)),
    }
    for message, arguments in bad.items():
        with pytest.raises(ValueError, match=message):
            code.decode(*arguments)


def test_masks_are_checked_under_jit(unchecked):
    with pytest.raises(ValueError, match="returned has dtype int"):
        jax.jit(CODES["berrut"].decode)(jnp.ones(12), np.ones(12, int))


@each_program
def test_masks_are_checked_wherever_they_go(unchecked, name):
    code = CODES[name]
    for reads_mask in (code.decoder_matrix, code.recovered):
        with pytest.raises(ValueError, match="returned has dtype int"):
            reads_mask(np.ones(code.num_workers, int))


@each_family
def test_the_callers_mask_is_the_callers(name):
    """Compiled programs run later than they are called, on the array itself if it is well aligned."""
    code = CODES[name]
    returned = np.arange(code.num_workers) != 1
    decoder = code.decoder_map(returned)
    before = np.asarray(decoder.matrix())
    returned[:] = ~returned
    np.testing.assert_array_equal(decoder.matrix(), before)
