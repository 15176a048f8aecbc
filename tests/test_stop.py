"""Policies: when each says stop, alone and combined."""

import numpy as np
import pytest

from jaxcode import stop


def progress(answers=0, elapsed=0.0, errors=None):
    return stop.Progress(np.arange(6) < answers, elapsed, None if errors is None else lambda: np.asarray(errors))


@pytest.mark.parametrize(
    ("policy", "state", "reached"),
    [
        (stop.answers(3), progress(2, 9.0), False),
        (stop.answers(3), progress(3), True),
        (stop.deadline(0.2), progress(6, 0.19), False),
        (stop.deadline(0.2), progress(0, 0.2), True),
        (stop.error_below(0.1), progress(errors=[0.1, 0.0]), True),
        (stop.error_below(0.1), progress(errors=[0.2, 0.0]), False),
        (stop.error_below(0.1, share=0.5), progress(errors=[0.2, 0.0]), True),
        (stop.error_below(0.1), progress(errors=[np.inf, 0.0]), False),
        (stop.error_below(0.1), progress(), False),
        (stop.answers(3) | stop.deadline(0.2), progress(3), True),
        (stop.answers(3) | stop.deadline(0.2), progress(2, 0.3), True),
        (stop.answers(3) & stop.deadline(0.2), progress(3), False),
        (stop.answers(3) & stop.deadline(0.2), progress(3, 0.3), True),
        ((stop.answers(6) | stop.deadline(0.2)) & stop.error_below(0.1), progress(3, 0.3, [0.0]), True),
        ((stop.answers(6) | stop.deadline(0.2)) & stop.error_below(0.1), progress(6, 0.1, [1.0]), False),
    ],
)
def test_each_stops_when_it_should(policy, state, reached):
    assert policy.reached(state) is reached


def test_an_error_is_computed_only_where_it_decides():
    def never():
        raise AssertionError

    state = stop.Progress(np.ones(6, bool), 0.0, never)
    assert (stop.answers(3) | stop.error_below(0.1)).reached(state)
    assert not (stop.deadline(1.0) & stop.error_below(0.1)).reached(state)


def test_moments_are_those_of_all_parts():
    assert ((stop.deadline(0.2) | stop.answers(3)) & stop.deadline(0.5)).moments() == (0.2, 0.5)


def test_what_can_never_be_is_refused(unchecked):
    for wrong in (
        lambda: stop.answers(0),
        lambda: stop.answers(2.5),
        lambda: stop.deadline(0),
        lambda: stop.deadline(float("nan")),
        lambda: stop.error_below(-1.0),
        lambda: stop.error_below(1.0, share=0.0),
        lambda: (stop.answers(7) | stop.deadline(1.0)).check(6, True),
        lambda: (stop.answers(6) & stop.error_below(1.0)).check(6, False),
    ):
        with pytest.raises(ValueError, match="expected"):
            wrong()
    (stop.answers(6) & stop.error_below(1.0)).check(6, True)
