"""Wrong answers of faulty workers.

An attack takes correct answers (workers, groups, outputs), the faulty workers, a size in the answers' unit and a
generator, and returns all answers as they are sent.
"""

import numpy as np


def sign_flip(answers, faulty, size, rng):
    """The correct answers with the wrong sign, whatever the size."""
    return _replace(answers, faulty, -answers[faulty])


def constant(answers, faulty, size, rng):
    """One vector per faulty worker, the same in all groups."""
    return _replace(answers, faulty, size * rng.normal(size=(len(faulty), 1, answers.shape[2])))


def noise(answers, faulty, size, rng):
    """Normal noise on every number."""
    return _replace(answers, faulty, answers[faulty] + size * rng.normal(size=answers[faulty].shape))


def shift(answers, faulty, size, rng):
    """One shift per faulty worker, the same in all groups, of either sign by output."""
    return _replace(answers, faulty, answers[faulty] + size * rng.choice([-1, 1], (len(faulty), 1, answers.shape[2])))


def copy(answers, faulty, size, rng):
    """The answers of the worker whose index is N / 2 away."""
    return _replace(answers, faulty, answers[(faulty + len(answers) // 2) % len(answers)])


def collude(answers, faulty, size, rng):
    """All faulty workers answer from one wrong curve: the correct one of other outputs, shifted."""
    return _replace(answers, faulty, np.roll(answers[faulty], 1, axis=2) - size)


def shift_together(answers, faulty, size, rng):
    """One shift per group, the same for all faulty workers."""
    return _replace(answers, faulty, answers[faulty] + size * rng.choice([-1, 1], (1, *answers.shape[1:])))


INDEPENDENT = {"sign-flip": sign_flip, "constant": constant, "noise": noise, "shift": shift, "copy": copy}
COORDINATED = {"collude": collude, "shift-together": shift_together, "flip-together": sign_flip}


def _replace(answers, faulty, wrong):
    sent = answers.copy()
    sent[faulty] = wrong
    return sent
