import contextlib
import csv
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxcode.surrogates import distil
from models import datasets
from models.demo import main
from models.plots import plot_request

SMALL = [
    "--num-data",
    "4",
    "--num-workers",
    "9",
    "--num-stragglers",
    "3",
    "--batch-size",
    "40",
    "--num-seeds",
    "2",
]
FILES = {"stragglers.png", "request.png", "tuned.png", "figures.csv", "settings.json"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One small run: its folder and what it printed."""
    out = tmp_path_factory.mktemp("demo") / "new" / "folder"
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        # A surrogate that has hardly learned is enough here.
        patch.setattr(distil, "_MAX_STEPS", 50)
        patch.setattr(distil, "_LEAST_STEPS", 50)
        main([*SMALL, "--out", str(out)])
    return out, printed.getvalue()


def _figures(out):
    with (out / "figures.csv").open(newline="") as file:
        return {(r["scheme"], int(r["num_stragglers"]), r["metric"]): float(r["mean"]) for r in csv.DictReader(file)}


@pytest.mark.long
def test_every_file_is_written_and_named(run):
    out, printed = run
    assert {path.name for path in out.iterdir()} == FILES
    for name in FILES:
        assert str(out / name) in printed
    settings = json.loads((out / "settings.json").read_text())
    assert settings["num_workers"] == 9
    assert settings["straggler_counts"] == [0, 1, 2, 3, 4, 5, 6]


def test_pictures_are_not_blank(run):
    out, _ = run
    for name in ("stragglers.png", "request.png"):
        with Image.open(out / name) as image:
            assert min(image.size) > 300
            assert np.asarray(image.convert("L")).std() > 10


def test_the_table_shows_the_figures_of_the_file(run):
    out, printed = run
    figures = _figures(out)
    names = {"uncoded, 4 workers": "uncoded", "replication": "replication", "LeTCC on logits": "logits"}
    for label, name in names.items():
        line = next(line for line in printed.splitlines() if line.strip().startswith(f"{label}  "))
        numbers = line.replace("±", " ").split()[-10::2]
        metrics = ("accuracy", "relative_accuracy", "agreement", "rmse", "lost")
        assert [float(number) for number in numbers] == pytest.approx(
            [figures[name, 3, metric] for metric in metrics], abs=6e-4
        )


def test_coding_helps_a_trained_network(run):
    figures = _figures(run[0])
    base = json.loads((run[0] / "settings.json").read_text())["base_accuracy"]
    assert base > 0.8
    assert figures["replication", 0, "accuracy"] == pytest.approx(base, abs=1e-6)
    assert figures["ordered", 3, "accuracy"] > figures["uncoded", 3, "accuracy"] + 0.1
    assert figures["ordered", 3, "agreement"] > 0.8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--num-stragglers 59", "--num-stragglers must be from 0 to --num-workers - 2 (58)"),
        ("--num-stragglers -1", "--num-stragglers must be from 0"),
        ("--num-workers 19", "--num-workers must be at least --num-data (20), got 19"),
        ("--num-data 1", "--num-data must be at least 2"),
        ("--num-seeds 1", "--num-seeds must be at least 2"),
        ("--seed -1", "--seed must not be negative"),
        ("--batch-size 19", "--batch-size must be from --num-data (20) to the 400 test images, got 19"),
        ("--batch-size 401", "--batch-size must be from"),
        ("--dataset svhn", "invalid choice: 'svhn'"),
        ("--dataset mnist", datasets.VARIABLE),
        ("--dataset cifar10 --data-dir nowhere", "nowhere does not exist"),
        ("--num-workers many", "invalid int value: 'many'"),
    ],
)
def test_bad_arguments(arguments, message, monkeypatch, tmp_path, capsys):
    monkeypatch.delenv(datasets.VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(arguments.split())
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert message in printed.err.splitlines()[-1]
    assert printed.out == ""


def test_an_output_folder_that_cannot_be_made(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as stopped:
        main(["--out", str(tmp_path / "file")])
    assert stopped.value.code == 2
    assert "file" in capsys.readouterr().err.splitlines()[-1]


def test_errors_of_the_command_have_no_traceback(tmp_path):
    command = [sys.executable, "-m", "models.demo", "--num-stragglers", "60", "--out", str(tmp_path)]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "--num-stragglers must be" in done.stderr


@pytest.mark.parametrize(("num_data", "num_workers", "channels"), [(3, 8, 3), (45, 50, 1), (2, 2, 1)])
def test_requests_of_any_size_can_be_drawn(num_data, num_workers, channels, tmp_path):
    rng = np.random.default_rng(0)
    returned = np.arange(num_workers) % 3 > 0
    # Splines overshoot: coded images leave [0, 1].
    coded = rng.normal(size=(num_workers, 28, 28, channels))
    probabilities = rng.dirichlet(np.ones(10), (2, num_data))
    path = tmp_path / "request.png"
    plot_request(coded[:num_data], coded, returned, *probabilities, tuple("0123456789"), path)
    with Image.open(path) as image:
        assert np.asarray(image.convert("L")).std() > 10
