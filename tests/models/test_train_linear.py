"""Tests the training of linear models by every method: the table, the files and the optimum."""

import csv
import os

import jax
import numpy as np
import pytest
from PIL import Image

from jaxcode import saga
from models import datasets, train_linear
from models.train_linear import main


@pytest.fixture(autouse=True)
def _restore_precision():
    before = jax.config.jax_enable_x64
    yield
    jax.config.update("jax_enable_x64", before)


@pytest.mark.long
def test_training_prints_a_table_and_writes_files(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train_linear, "_STEP_SIZES", {"saga": (0.3, 1.0), "sgd": (1.0,)})
    monkeypatch.setattr(train_linear, "_DECAYS", {"saga": (0.0,), "sgd": (0.0, 0.03)})
    main(
        [
            "--period",
            "8",
            "--epochs",
            "80",
            "--patience",
            "2",
            "--machines",
            "4",
            "--seeds",
            "1",
            "--out",
            str(tmp_path),
        ]
    )
    printed = capsys.readouterr().out
    with (tmp_path / "breast_cancer.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    last = {row["method"]: float(row["suboptimality"]) for row in rows}
    assert len(last) == 6
    # Scikit-learn finds the same optimum, and no method goes below it.
    assert abs(last["distributed SAGA, anchored"]) < 1e-8
    assert min(float(row["suboptimality"]) for row in rows) > -1e-10
    assert min(last[name] for name in ("FedAvg", "SCAFFOLD", "minibatch SGD", "local SAGA, averaged")) > 1e-7
    line = next(line for line in printed.splitlines() if line.startswith("distributed SAGA, anchored  "))
    reached = [
        row for row in rows if row["method"] == "distributed SAGA, anchored" and float(row["suboptimality"]) <= 1e-6
    ]
    assert line.split()[-2] == f"{float(reached[0]['floats']):.2e}"
    assert "SCAFFOLD sends more than" in printed
    with Image.open(tmp_path / "breast_cancer.png") as image:
        assert np.asarray(image.convert("L")).std() > 10


def test_the_optimum_of_many_classes():
    with jax.enable_x64(True):
        problem = train_linear.load("digits", None, 1e-2)
        x, y = problem.data
        assert x.shape == (1797, 64)
        assert (np.diff(y) >= 0).all()
        assert 0.5 < problem.minimum < 2.0


needs_data = pytest.mark.skipif("JAXCODE_DATA" not in os.environ, reason="JAXCODE_DATA names no folder of data")


@pytest.mark.long
@needs_data
@pytest.mark.parametrize("name", ["a9a", "w8a"])
def test_thirty_epochs_on_real_sets_sorted_by_label(name):
    with jax.enable_x64(True):
        problem = train_linear.load(name, None, 1e-3)

        def gap(method):
            state = method.init(problem.params, problem.data)
            state, _ = method.run(state, jax.random.key(0), num_rounds, every=num_rounds, progress=False)
            return float(method.objective(state.params, state)) - problem.minimum

        settings = {"num_machines": 8, "period": 64, "ridge": 1e-3}
        num_rounds = 30 * len(problem.data[1]) // (8 * 64)
        assert abs(gap(saga.DistributedSaga(problem.loss, **settings))) <= 1e-6
        assert gap(saga.DistributedSaga(problem.loss, correction="local", **settings)) >= 5e-5
        assert gap(saga.FederatedAveraging(problem.loss, **settings)) >= 5e-5


@needs_data
@pytest.mark.parametrize(("name", "shape"), [("a9a", (32561, 123)), ("w8a", (49749, 300))])
def test_real_sets_of_libsvm(name, shape):
    x, y = datasets.libsvm(name)
    assert x.shape == shape
    assert set(np.unique(y)) == {-1, 1}


def test_text_files_of_libsvm(tmp_path):
    (tmp_path / "small").write_text("+1 1:0.5 3:2\n-1 2:1\n")
    x, y = datasets.libsvm("small", tmp_path)
    np.testing.assert_array_equal(x.toarray(), [[0.5, 0, 2], [0, 1, 0]])
    np.testing.assert_array_equal(y, [1, -1])
    (tmp_path / "other").write_text("3 1:0.5\n-1 2:1\n")
    with pytest.raises(ValueError, match="expected -1 and 1"):
        datasets.libsvm("other", tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "a9a", "--data-dir", "nowhere"], "nowhere does not exist"),
        (["--machines", "0"], "num_machines is 0"),
        (["--ridge", "-1"], "--ridge is -1.0; expected a number above 0"),
    ],
)
def test_bad_arguments_end_without_a_traceback(arguments, message, capsys, unchecked, tmp_path):
    with pytest.raises(SystemExit) as caught:
        main([*arguments, "--out", str(tmp_path)])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
