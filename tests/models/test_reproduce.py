import csv

import numpy as np
import pytest
from flax import nnx
from matplotlib.figure import Figure

import jaxcode as jc
from models import datasets, reproduce
from models.comparison import METRICS, Comparison, Scheme
from models.experiments import classifier_results, coding
from models.experiments.classifier_results import CASES, Classifiers, _ten_times_off
from models.experiments.classifiers import SMOOTHINGS, BestSmoothings, Sensitivity
from models.experiments.results import Finding, Result, write

SCHEMES = ("letcc", "bacc", "bacc_fixed", "replication", "nearest", "nearest_of_request", "tuned")


def test_results_are_collected(tmp_path):
    for name in ("E2", "E1"):
        finding = Finding("|x|", "-3", "-3.3", "smooth")
        write(Result(name, "Slopes", (finding,), ("x", "y"), [("a", 1 / 3)], Figure()), tmp_path, "command")
    text = (tmp_path / "README.md").read_text()
    assert text.index("## E1. Slopes") < text.index("## E2. Slopes")
    assert "| \\|x\\| | -3 | -3.3 | smooth |" in text
    assert "`command`, " in text
    assert list(csv.reader((tmp_path / "E1.csv").open())) == [["x", "y"], ["a", "0.333333"]]
    assert (tmp_path / "E2.png").exists()
    # Written again, it is there once.
    write(Result("E1", "Errors", (finding,), ("x", "y"), [("b", 2.0)], Figure()), tmp_path, "command")
    text = (tmp_path / "README.md").read_text()
    assert text.count("## E1. Errors") == 1
    assert "## E1. Slopes" not in text
    assert "## E2. Slopes" in text
    (tmp_path / "README.md").write_text("# Something else")
    with pytest.raises(ValueError, match="is of something else"):
        write(Result("E1", "Errors", (finding,), ("x",), [], Figure()), tmp_path, "command")


def _comparison(model, data, setting, *, seed, **options):
    """Makes a comparison in which LeTCC's errors are .9 of BACC's and .5 of those with the signs of all workers."""
    code = jc.UncodedCode(setting.num_data)
    schemes = tuple(Scheme(name, name, code, "softmax") for name in SCHEMES)
    shape = (len(schemes), len(setting.straggler_counts), 3)
    errors = np.broadcast_to(np.array([0.9, 1, 1.8, 0.95, 0.2, 0.3, 0.1])[:, None, None], shape).astype(np.float32)
    values = {metric: errors for metric in METRICS} | {"relative_accuracy": 1 - errors / 10}
    return Comparison(schemes, setting.straggler_counts, values, np.ones(3, np.float32))


@pytest.fixture
def classifiers(monkeypatch):
    model, data = nnx.Linear(2, 3, rngs=nnx.Rngs(0)), datasets.load("digits")
    monkeypatch.setattr(classifier_results, "against_stragglers", _comparison)
    monkeypatch.setattr(Classifiers, "_load_uncached", lambda self, case: (model, data))
    monkeypatch.setattr(Classifiers, "cases", CASES)
    return Classifiers(is_quick=False, seed=0)


def _is_rectangular(result):
    return result.rows and all(len(row) == len(result.columns) for row in result.rows)


def test_gains_are_relative_to_bacc(classifiers):
    result = classifiers.e2()
    assert len(result.findings) == 3 * sum(len(case.settings) for case in CASES)
    errors, squares, accuracies = result.findings[:3]
    assert (errors.published, squares.published, accuracies.published) == ("-15 %", "", "+2 %")
    assert errors.ours.startswith("-10.0 ± 0.0 %; beside BACC with the signs of all workers -50.0 ± 0.0 %")
    # .91 and .90 of the model's accuracy
    assert accuracies.ours.startswith("+1.1 ± 0.0 %")
    assert errors.reason == "weights of our own; 9 parameters"
    assert _is_rectangular(result)


@pytest.mark.parametrize("name", ["e3", "e4"])
def test_curves_say_for_how_many_stragglers_letcc_is_better(classifiers, name):
    result = getattr(classifiers, name)()
    assert result.findings[0].ours == (
        "of 7 S, beyond chance: LeTCC better and worse for 7 and 0 (BACC), 7 and 0 (BACC with the signs of all "
        "workers), 7 and 0 (replication), 0 and 7 (replication + nearest image of the request), 0 and 7 (replication + "
        "nearest image of the batch); the tuned code better and worse for 7 and 0 (replication), 7 and 0 (replication "
        "+ nearest image of the request), 7 and 0 (replication + nearest image of the batch)"
    )
    assert _is_rectangular(result)


def test_best_smoothings_are_listed_with_what_one_pair_costs(classifiers, monkeypatch):
    costs = np.zeros((7, 2))
    costs[3] = 0.02
    found = BestSmoothings(np.tile([0.0, 1e-6], (7, 1)), (0.0, 1e-6), costs)
    monkeypatch.setattr(classifier_results, "best_smoothings", lambda *_, **__: found)
    result = classifiers.e7()
    assert result.findings[0].ours == (
        "encoder none for every S, decoder 1e-06 for every S; one pair for all S (none, 1e-06) costs +0.3 % on "
        "average, and at most +2.0 ± 0.0 %, at S = 20"
    )
    assert result.rows[0][1:6] == (100, 60, 5, 0.0, 1e-6)
    assert _is_rectangular(result)


def test_costs_of_other_smoothings_are_relative_to_the_best_positive_one(classifiers, monkeypatch):
    increases = np.broadcast_to(0.03 * abs(np.arange(len(SMOOTHINGS)) - 5.0), (2, len(SMOOTHINGS)))[:, :, None]
    measured = Sensitivity((SMOOTHINGS[5], 0.0), (SMOOTHINGS[5],) * 2, np.repeat(increases, 2, axis=2))
    expected = "best positive 1e-09; beside it a tenth +3.0 ± 0.0 %, ten times +3.0 ± 0.0 %, none +15.0 ± 0.0 %"
    assert _ten_times_off(measured, 0) == expected
    assert _ten_times_off(measured, 1) == f"best is none; {expected}"
    monkeypatch.setattr(classifier_results, "sensitivity", lambda *_, **__: measured)
    result = classifiers.e8()
    assert result.findings[0].published == "about +3 %"
    assert len(result.rows) == 2 * 2 * len(SMOOTHINGS)
    assert _is_rectangular(result)


def test_cases_whose_images_are_missing_are_left_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(datasets.VARIABLE, str(tmp_path))
    (case,) = Classifiers(is_quick=True, seed=0).cases
    assert (case.network, case.dataset) == ("lenet5", "digits")
    printed = capsys.readouterr().out
    assert "lenet5 on mnist is left out: " in printed
    assert "vit_tiny on cifar10 is left out: " in printed


@pytest.mark.long
def test_both_codes_are_timed_with_the_papers_sizes():
    result = coding.e5(is_quick=True, seed=0)
    assert [finding.published for finding in result.findings] == ["on par with BACC"] * 3
    assert len(result.rows) == 3 * 2 * 2
    assert _is_rectangular(result)
    assert all(0 < row[6] <= row[5] <= row[7] for row in result.rows)


def test_roughness_is_the_squared_step_between_pixels():
    board = np.indices((4, 4)).sum(axis=0) % 2
    images = np.stack([board, np.full((4, 4), 0.5)])[..., None].astype(float)
    np.testing.assert_allclose(coding._roughness(images), [2, 0])


def test_pictures_without_files_are_of_digits(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv(datasets.VARIABLE, raising=False)
    reproduce.main(["E9", "--out", str(tmp_path)])
    assert "coded images of LeTCC, digits, (N, K) = (70, 30)" in capsys.readouterr().out
    rows = list(csv.reader((tmp_path / "E9.csv").open()))
    assert len(rows) == 1 + 30 + 70 + 70
    assert (tmp_path / "E9.png").stat().st_size > 10_000


def test_unknown_experiments_are_named(capsys):
    with pytest.raises(SystemExit) as error:
        reproduce.main(["E10"])
    assert error.value.code == 2
    assert "'E10'" in capsys.readouterr().err
