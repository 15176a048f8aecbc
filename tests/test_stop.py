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


REFUSED = {
    "no-answers": (lambda: stop.answers(0), "number is 0; expected a whole number"),
    "half-an-answer": (lambda: stop.answers(2.5), "number is 2.5; expected a whole number"),
    "no-time": (lambda: stop.deadline(0), "seconds is 0; expected a positive number"),
    "nan": (lambda: stop.deadline(float("nan")), "seconds is nan; expected"),
    "text": (lambda: stop.deadline("soon"), "seconds is 'soon'; expected"),
    "a-bool": (lambda: stop.deadline(True), "seconds is True; expected"),
    "an-array": (lambda: stop.deadline(np.ones(2)), r"seconds is array\(.*; expected"),
    "nothing": (lambda: stop.error_below(None), "tolerance is None; expected"),
    "negative": (lambda: stop.error_below(-1.0), "tolerance is -1.0; expected"),
    "no-share": (lambda: stop.error_below(1.0, share=0.0), "share is 0.0; expected"),
    "share-above-one": (lambda: stop.error_below(1.0, share=1.5), "share is 1.5; expected"),
    "too-many-answers": (
        lambda: (stop.answers(7) | stop.deadline(1.0)).check(6, True),
        r"stop has answers\(7\) with 6 workers; expected",
    ),
    "no-predicted-error": (
        lambda: (stop.answers(6) & stop.error_below(1.0)).check(6, False),
        "stop has error_below with a code that predicts no error; expected",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(unchecked, case):
    make, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        make()


def test_a_policy_that_can_be_reached_passes():
    (stop.answers(6) & stop.error_below(1.0)).check(6, True)


def test_policies_of_equal_settings_are_equal():
    assert stop.answers(3) | stop.deadline(0.2) == stop.answers(3) | stop.deadline(0.2)
    assert hash(stop.answers(3) | stop.deadline(0.2)) == hash(stop.answers(3) | stop.deadline(0.2))
    assert stop.answers(3) | stop.deadline(0.2) != stop.answers(3) & stop.deadline(0.2)
