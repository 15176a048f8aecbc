"""The command that compares what tuning chooses with cheap remedies for lost answers."""

import csv

import numpy as np
import pytest
from scipy.spatial.distance import cdist
from sklearn.kernel_ridge import KernelRidge

from models import regret

RNG = np.random.default_rng(0)
X, TARGETS = RNG.normal(size=(12, 3)), RNG.normal(size=(12, 2))
IS_LOST = RNG.uniform(size=(4, 12)) < 0.2


def test_guesses_are_those_of_scikit_learn():
    found = regret.guess_by_ridge(X, TARGETS, IS_LOST, 0.5, 0.01)
    gamma = 1 / (2 * 0.5**2 * np.median(cdist(X, X) ** 2))
    for lost, guesses in zip(IS_LOST, found, strict=True):
        mean = TARGETS[~lost].mean(axis=0)
        ridge = KernelRidge(alpha=0.01, kernel="rbf", gamma=gamma).fit(X[~lost], TARGETS[~lost] - mean)
        np.testing.assert_allclose(guesses, mean + ridge.predict(X), rtol=1e-8)
    nearest = regret.guess_from_nearest(X, TARGETS, IS_LOST)
    for lost, guesses in zip(IS_LOST, nearest, strict=True):
        np.testing.assert_array_equal(guesses, TARGETS[~lost][np.argmin(cdist(X, X[~lost]), axis=1)])


def test_regret_is_against_the_best_baseline_of_its_kind():
    losses = {"mean": np.full(5, 4.0), "surrogate": np.full(5, 1.0)}
    tuned = {True: np.full(5, 1.21), False: np.full(5, 4.0)}
    row = regret.Row("case", (12, 8, 2), 8, "squared_error", losses, tuned, {True: "", False: ""})
    assert (row.best(True), row.best(False)) == ("surrogate", "mean")
    np.testing.assert_allclose(row.regret(True), 10.0)
    np.testing.assert_allclose(row.regret(False), 0.0)


@pytest.mark.long
def test_the_command_measures_every_scheme(tmp_path, capsys):
    small = ["--requests=3", "--batches=2", "--sets=2", "--batch=16", "--tune=64", "--learn=60", "--setting=9,8,1"]
    regret.main([*small, "--case=linear", "--case=jumps", f"--out={tmp_path}"])
    output = capsys.readouterr().out
    assert "exact" in next(line for line in output.splitlines() if line.startswith("linear"))
    with (tmp_path / "figures.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 2 * 8
    errors = {(row["case"], row["B"], row["scheme"]): float(row["error"]) for row in rows}
    assert errors["linear", "8", "tuned without a surrogate"] < 1e-4 < errors["linear", "8", "mean"]


@pytest.mark.parametrize("arguments", [["--sets=1"], ["--tune=300"]])
def test_bad_arguments(arguments, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        regret.main([*arguments, f"--out={tmp_path}"])
    assert arguments[0].split("=")[0] in capsys.readouterr().err
