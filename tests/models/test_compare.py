import contextlib
import csv
import io

import numpy as np
import pytest
from PIL import Image

import models.compare
from jaxcode.surrogates import distil
from models.compare import main

SMALL = ["--setting", "6,4,1", "--batch-size", "40", "--num-batches", "2", "--num-sets", "3"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Runs the command with few schemes; returns its folder and what it printed."""
    out = tmp_path_factory.mktemp("compare")
    all_schemes = models.compare._schemes

    def some_schemes(num_data, num_workers, tune):
        """Leaves out most schemes: compiling them all takes a minute."""
        names = "uncoded", "replication", "nercc", "lcc", "tuned"
        schemes = tuple(s for s in all_schemes(num_data, num_workers, tune) if s.name in names)
        assert len(schemes) == 5
        return schemes

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.setattr(models.compare, "_schemes", some_schemes)
        patch.setattr(distil, "_MAX_STEPS", 500)
        main([*SMALL, "--out", str(out)])
    return out, printed.getvalue()


def _figures(out):
    with (out / "figures.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {(row["scheme"], row["metric"]): float(row["mean"]) for row in rows if row["batch_size"] == "40"}


@pytest.mark.long
def test_the_tuned_code_loses_less_than_replication(run):
    figures = _figures(run[0])
    assert 1 - figures["tuned", "agreement"] < 0.6 * (1 - figures["replication", "agreement"])
    assert figures["nercc", "agreement"] > figures["uncoded", "agreement"]


@pytest.mark.long
def test_tables_show_the_figures_of_the_file(run):
    out, printed = run
    figures = _figures(out)
    single, batches = printed.split("BATCHES OF 40 IMAGES")
    for text in (single, batches):
        lines = [line.split() for line in text.splitlines() if line.startswith("replication  ")]
        assert len(lines) == 5
    for line, metric in zip(lines, ("agreement", "accuracy", "relative_accuracy", "rmse"), strict=False):
        assert float(line[1]) == pytest.approx(figures["replication", metric], abs=6e-5)
    lost = (1 - figures["tuned", "agreement"]) / (1 - figures["replication", "agreement"])
    assert f"{lost:.3f}" in batches
    assert figures["tuned_with_prior", "agreement"] >= figures["replication", "agreement"]


@pytest.mark.long
def test_pictures_are_not_blank(run):
    for name in ("loss.png", "tuned-6-4-1-4.png", "tuned-6-4-1-40.png"):
        with Image.open(run[0] / name) as image:
            assert np.asarray(image.convert("L")).std() > 10
    assert "replication" in (run[0] / "tuned-6-4-1-40.txt").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--setting", "3,4,1"], "2 <= K <= N"),
        (["--setting", "12"], "expected three numbers N,K,S"),
        (["--batch-size", "39"], "two requests"),
        (["--num-sets", "1"], "at least 2"),
        (["--dataset", "unicode", "--network", "lenet5"], "lenet5 takes no texts; expected one of text_encoder"),
    ],
)
def test_bad_arguments_exit_with_two(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        main([*arguments, "--out", str(tmp_path)])
    assert error.value.code == 2
    assert message in capsys.readouterr().err
