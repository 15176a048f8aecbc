"""Loads trained networks from files, and trains those that have none."""

from pathlib import Path

from flax import nnx

from . import datasets, weights
from .datasets import Dataset
from .lenet5 import LeNet5
from .resnet import ResNet14
from .train import fit

NETWORKS = {"lenet5": LeNet5, "resnet14": ResNet14}
DEFAULT_NETWORKS = {"digits": "lenet5", "mnist": "lenet5", "cifar10": "resnet14"}
_TRAINING = {
    "digits": {"epochs": 15, "batch_size": 64},
    "mnist": {"epochs": 4, "batch_size": 128},
    "cifar10": {"epochs": 10, "batch_size": 128, "augment": True},
}


def load_or_train(name: str, data: Dataset, dataset: str, path: Path, *, seed: int) -> nnx.Module:
    """Loads a trained network from the file of its weights; if there is none, trains it and writes the file.

    Args:
        name: A name in `NETWORKS`.
        data: The images and labels to train on.
        dataset: Their name, which decides how the network is trained.
        path: The file of the weights.
        seed: Seed of the initial weights and of the order of the images.

    Returns:
        The network, in evaluation mode.

    Raises:
        ValueError: If the weights are those of another network.
    """
    height, width, channels = data.x_train.shape[1:]
    model = NETWORKS[name]((height, width, channels), len(data.class_names), rngs=nnx.Rngs(seed))
    if path.exists():
        weights.load(model, path)
        print(f"Weights of {name} from {path}.", flush=True)
    else:
        print(f"Training {name} on {len(data.x_train):,} images of {dataset}, once: {path}", flush=True)
        fit(model, data, seed=seed, **_TRAINING[dataset])
        weights.save(model, path)
    return model


def digits() -> nnx.Module:
    """Loads a LeNet5 trained on scikit-learn's digits; trains it, in seconds, if there is no file of its weights."""
    data = datasets.load("digits")
    return load_or_train("lenet5", data, "digits", Path("out/lenet5-digits-0.safetensors").absolute(), seed=0)
