"""Tests that the networks of `models/weights` are what their cards say."""

import json
import os

import pytest

from models import datasets, networks, serialization
from models.training import Recipe, accuracy, fit

CARDS = sorted(networks.WEIGHTS.glob("*.json"))


def test_every_file_has_a_card_and_all_are_small():
    files = sorted(networks.WEIGHTS.glob("*.safetensors"))
    assert [path.stem for path in files] == [path.stem for path in CARDS]
    assert {"lenet5-digits-0", "lenet5-mnist-0"} <= {path.stem for path in files}
    assert sum(path.stat().st_size for path in files) < 12e6


def _cases():
    """Lists the cards; 10,000 inputs through a large network take long."""
    marks = [() if path.stem.startswith(("lenet5", "text_encoder")) else (pytest.mark.long,) for path in CARDS]
    return [pytest.param(path, id=path.stem, marks=mark) for path, mark in zip(CARDS, marks, strict=True)]


@pytest.mark.parametrize("path", _cases())
def test_weights_score_what_their_card_says(path):
    card = json.loads(path.read_text())
    if card["dataset"] not in ("digits", "unicode") and not os.environ.get(datasets.VARIABLE):
        pytest.skip(f"{card['dataset']} is not here: {datasets.VARIABLE} is not set")
    data = datasets.load(card["dataset"])
    model = networks.make(card["network"], data, seed=1)
    serialization.load(model, networks.WEIGHTS / f"{path.stem}.safetensors")
    # Sums in another order may change the class of one image or two.
    assert accuracy(model, data.x_test, data.y_test) == pytest.approx(card["accuracy"], abs=2.5 / len(data.x_test))
    assert serialization.num_parameters(model) == card["parameters"]
    assert path.stem == f"{card['network']}-{card['dataset']}-{card['seed']}"
    assert card["command"].startswith(f"python -m models.train {card['network']} --dataset {card['dataset']}")
    assert (len(data.x_train), len(data.x_test)) == (card["training_inputs"], card["test_inputs"])
    if len(card["command"].split()) == 6:
        assert networks.recipe(card["network"], card["dataset"]) == Recipe(**card["recipe"])


def test_a_network_without_weights_is_trained_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(networks, "WEIGHTS", tmp_path / "none")
    monkeypatch.setattr(networks, "fit", lambda model, data, recipe, teacher: fit(model, data, networks.Recipe(1)))
    data = datasets.load("digits")
    path = networks.weights_path("lenet5", "digits", tmp_path)
    assert path == tmp_path / "lenet5-digits-0.safetensors"
    models = [networks.load_or_train("lenet5", data, "digits", path) for _ in range(2)]
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("Training lenet5 on 1,397 images of digits, once")
    assert printed[1] == "Weights of lenet5 from lenet5-digits-0.safetensors."
    scores = [accuracy(model, data.x_test, data.y_test) for model in models]
    assert scores[0] == scores[1] > 0.2
