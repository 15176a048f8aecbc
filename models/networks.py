"""Makes the networks by name, loads those whose weights are stored, and trains those that have none."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from flax import nnx

from . import datasets, serialization
from .convnet import ConvNet
from .datasets import Dataset
from .lenet5 import LeNet5
from .repvgg import RepVGG, RepVGGConfig, merge_branches
from .resnet import ResNet, ResNetConfig
from .text_encoder import TextEncoder, TextEncoderConfig
from .training import Recipe, fit
from .vit import ViT, ViTConfig

ImageShape = tuple[int, int, int]


def _network(module, make_config, *, is_sized: bool = False, **options) -> Callable[..., nnx.Module]:
    """Returns a function that builds a network from the images' shape, the number of classes and random streams."""

    def build(shape, num_classes, rngs):
        size = {"image_size": shape[0]} if is_sized else {}
        return module(make_config(num_channels=shape[-1], num_classes=num_classes, **size, **options), rngs=rngs)

    return build


_CIFAR_STRIDES = (1, 1, 2, 2, 2)

IMAGE_NETWORKS: dict[str, Callable[[ImageShape, int, nnx.Rngs], nnx.Module]] = {
    "lenet5": lambda shape, num_classes, rngs: LeNet5(shape, num_classes, rngs=rngs),
    "convnet": lambda shape, num_classes, rngs: ConvNet(shape[-1], num_classes, rngs=rngs),
    "resnet20": _network(ResNet, ResNetConfig.resnet20),
    "resnet56": _network(ResNet, ResNetConfig.resnet56),
    "repvgg_small": _network(RepVGG, RepVGGConfig.small),
    "repvgg_a0": _network(RepVGG, RepVGGConfig.a0, strides=_CIFAR_STRIDES),
    "repvgg_a1": _network(RepVGG, RepVGGConfig.a1, strides=_CIFAR_STRIDES),
    "repvgg_a2": _network(RepVGG, RepVGGConfig.a2, strides=_CIFAR_STRIDES),
    "vit_tiny": _network(ViT, ViTConfig.tiny, is_sized=True),
}
TEXT_NETWORKS: dict[str, Callable[[tuple[int], int, nnx.Rngs], nnx.Module]] = {
    "text_encoder": lambda shape, num_classes, rngs: TextEncoder(
        TextEncoderConfig(datasets.NUM_TOKENS, *shape, num_classes), rngs=rngs
    ),
}
NETWORKS: dict[str, Callable[..., nnx.Module]] = {**IMAGE_NETWORKS, **TEXT_NETWORKS}
# Weights that are part of the repository, each with a card that says how they were made and how good they are.
WEIGHTS = Path(__file__).parent / "weights"
DEFAULT_NETWORKS = {"digits": "lenet5", "mnist": "lenet5", "cifar10": "resnet20", "unicode": "text_encoder"}

_DIGITS = Recipe(epochs=15)
_MNIST = Recipe(epochs=12, batch_size=128, label_smoothing=0.05, average=0.995, shift=2)
_CIFAR10 = Recipe(
    epochs=36,
    batch_size=128,
    learning_rate=4e-3,
    weight_decay=0.05,
    label_smoothing=0.1,
    average=0.998,
    shift=4,
    mirror=True,
)
_UNICODE = Recipe(epochs=30, batch_size=64, learning_rate=2e-3, weight_decay=0.1, label_smoothing=0.05, average=0.995)
_RECIPES = {
    ("convnet", "mnist"): dataclasses.replace(_MNIST, epochs=8),
    ("resnet20", "cifar10"): dataclasses.replace(_CIFAR10, epochs=24),
    ("repvgg_small", "cifar10"): dataclasses.replace(_CIFAR10, optimizer="muon", teacher="resnet20"),
    ("vit_tiny", "cifar10"): Recipe(
        epochs=26,
        optimizer="muon",
        learning_rate=2e-3,
        weight_decay=0.1,
        average=0.999,
        shift=4,
        mirror=True,
        teacher="resnet20",
    ),
}
_RECIPES_BY_DATASET = {"digits": _DIGITS, "mnist": _MNIST, "cifar10": _CIFAR10, "unicode": _UNICODE}


def recipe(name: str, dataset: str) -> Recipe:
    """Returns the settings by which a network is trained on a data set."""
    return _RECIPES.get((name, dataset), _RECIPES_BY_DATASET[dataset])


def make(name: str, data: Dataset, *, seed: int) -> nnx.Module:
    """Makes an untrained network for the inputs and classes of a data set.

    Args:
        name: A name in `NETWORKS`.
        data: The data set.
        seed: Seed of the weights.

    Raises:
        ValueError: If the network does not take images of this size, or takes no images or no texts at all.
    """
    fitting = TEXT_NETWORKS if data.noun == "texts" else IMAGE_NETWORKS
    if name not in fitting:
        raise ValueError(f"{name} takes no {data.noun}; expected one of {', '.join(fitting)}")
    return fitting[name](data.x_train.shape[1:], len(data.class_names), nnx.Rngs(seed))


def stages(model: nnx.Module) -> tuple[Callable, Callable]:
    """Splits a network into what is computed where the inputs are, whose results can be mixed, and what workers do.

    Args:
        model: The network.

    Returns:
        The methods `embed` and `body` of a network of texts. Images can be mixed: the first stage returns them, the
        second is the network.
    """
    if hasattr(model, "embed"):
        return model.embed, model.body  # pyright: ignore[reportAttributeAccessIssue]
    return _return_inputs, model


def _return_inputs(x):
    return x


def weights_path(name: str, dataset: str, folder: Path) -> Path:
    """Finds the file with a network's weights: in `models/weights` if it is there, otherwise in a folder.

    Args:
        name: A name in `NETWORKS`.
        dataset: What it is trained on.
        folder: Where the file is, or is to be written, if the repository has none.
    """
    path = WEIGHTS / f"{name}-{dataset}-0.safetensors"
    return path if path.exists() else folder.absolute() / path.name


def load_or_train(name: str, data: Dataset, dataset: str, path: Path) -> nnx.Module:
    """Loads a trained network from the file of its weights; if there is none, trains it and writes the file.

    Args:
        name: A name in `NETWORKS`.
        data: The inputs and labels to train on.
        dataset: Their name, which decides how the network is trained.
        path: The file of the weights.

    Returns:
        The network, in evaluation mode; a RepVGG in the form for inference.

    Raises:
        ValueError: If the weights are those of another network.
    """
    model = make(name, data, seed=0)
    if path.exists():
        serialization.load(model, path)
        print(f"Weights of {name} from {path.name}.", flush=True)
    else:
        settings = recipe(name, dataset)
        teacher = load_teacher(settings, data, dataset, path.parent)
        print(f"Training {name} on {len(data.x_train):,} {data.noun} of {dataset}, once: {path}", flush=True)
        fit(model, data, settings, teacher=teacher)
        serialization.save(model, path)
    return merge_branches(model) if isinstance(model, RepVGG) else model


def load_stored(name: str, data: Dataset, dataset: str, folder: Path) -> nnx.Module:
    """Loads a network as `load_or_train` does, with the repository's weights, or else from its file in a folder.

    Args:
        name: A name in `NETWORKS`.
        data: The inputs and labels to train on, if it has no weights yet.
        dataset: Their name.
        folder: Where the file is, or is to be written, if the repository has none.
    """
    return load_or_train(name, data, dataset, weights_path(name, dataset, folder))


def load_teacher(recipe: Recipe, data: Dataset, dataset: str, folder: Path) -> nnx.Module | None:
    """Loads the network that a recipe names as teacher, or trains it; None if it names none.

    Args:
        recipe: The recipe.
        data: The inputs and labels to train on.
        dataset: Their name.
        folder: Where the teacher's weights are, or are to be written, if the repository has none.

    Raises:
        ValueError: If there is no such network.
    """
    if not recipe.teacher:
        return None
    if recipe.teacher not in NETWORKS:
        raise ValueError(f"teacher must be one of {', '.join(NETWORKS)}, got {recipe.teacher!r}")
    return load_stored(recipe.teacher, data, dataset, folder)


def digits() -> nnx.Module:
    """Loads a LeNet5 trained on scikit-learn's digits."""
    return load_stored("lenet5", datasets.load("digits"), "digits", Path("out"))
