"""ApproxIFER's error locator."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxcode.robust import error_locator

from . import attacks
from .cases import GROUPS, LAYOUTS, OUTPUTS, choose_anywhere, correct_answers, random_mask, rng


@pytest.mark.parametrize("layout", ["berrut", "chebyshev"])
def test_the_faulty_workers_are_flagged(layout):
    code = LAYOUTS[layout]
    answers = np.sin(2 * code.nodes.workers[:, None, None] + rng(2).normal(size=(GROUPS, OUTPUTS)))
    for seed in range(4):
        returned = random_mask(seed)
        faulty = choose_anywhere(np.flatnonzero(returned), 2, rng(seed))
        sent = attacks.noise(answers, faulty, 2.0, rng(seed))
        detection = error_locator(code, jnp.asarray(sent, jnp.float32), returned, num_faulty=2)
        np.testing.assert_array_equal(np.flatnonzero(detection.flagged), np.sort(faulty))


def test_as_many_as_asked_for_are_flagged_even_if_none_is_faulty():
    code = LAYOUTS["berrut"]
    answers = jnp.asarray(correct_answers(code), jnp.float32)
    assert np.sum(error_locator(code, answers, random_mask(3), num_faulty=2).flagged) == 2
