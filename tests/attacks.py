"""What lying workers send instead of their answers.

An attack takes honest answers (groups, workers, outputs), who lies, a size in the answers' own units and a generator,
and returns what is sent.
"""

import numpy as np


def sign_flip(answers, liars, size, rng):
    """The right answers with the wrong sign, whatever the size."""
    return _with(answers, liars, -answers[:, liars])


def constant(answers, liars, size, rng):
    """One vector to every question, another from every liar."""
    return _with(answers, liars, size * rng.normal(size=(1, len(liars), answers.shape[2])))


def noise(answers, liars, size, rng):
    return _with(answers, liars, answers[:, liars] + size * rng.normal(size=answers[:, liars].shape))


def shift(answers, liars, size, rng):
    """Every answer off by the same, up in some outputs and down in others."""
    return _with(answers, liars, answers[:, liars] + size * rng.choice([-1, 1], (1, len(liars), answers.shape[2])))


def copy(answers, liars, size, rng):
    """Another worker's answers, half of all workers away."""
    return _with(answers, liars, answers[:, (liars + answers.shape[1] // 2) % answers.shape[1]])


def collude(answers, liars, size, rng):
    """All liars the same wrong curve: what is right for other outputs."""
    return _with(answers, liars, np.roll(answers[:, liars], 1, axis=2) - size)


def shift_together(answers, liars, size, rng):
    """All liars off by the same in each group."""
    return _with(answers, liars, answers[:, liars] + size * rng.choice([-1, 1], (len(answers), 1, answers.shape[2])))


ALONE = {"sign-flip": sign_flip, "constant": constant, "noise": noise, "shift": shift, "copy": copy}
TOGETHER = {"collude": collude, "shift-together": shift_together, "flip-together": sign_flip}


def _with(answers, liars, lies):
    sent = answers.copy()
    sent[:, liars] = lies
    return sent
