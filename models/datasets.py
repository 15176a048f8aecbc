"""Loads images, texts and other samples from files on disk. Nothing is downloaded."""

import collections
import gzip
import io
import os
import sys
import unicodedata
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Float64, Int32, Shaped, UInt8

IMAGE_NAMES = ("digits", "mnist", "cifar10")
NAMES = (*IMAGE_NAMES, "unicode")
VARIABLE = "JAXCODE_DATA"
# Of texts: tokens of each, and how many different ones there are, that of padding, 0, included.
TEXT_LENGTH = 40
_ALPHABET = " -0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
NUM_TOKENS = len(_ALPHABET) + 1

_CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_CIFAR10_TRAIN = tuple(f"data_batch_{i}.bin" for i in range(1, 6))
_MNIST_HELP = (
    "MNIST needs either mnist.npz (arrays x_train, y_train, x_test, y_test) or the four files "
    "train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte "
    "(plain or with .gz), as published by LeCun, Cortes and Burges (http://yann.lecun.com/exdb/mnist). "
    "Put them in one folder"
)
_CIFAR10_HELP = (
    "CIFAR-10 needs either the binary version (cifar-10-binary.tar.gz from "
    "https://www.cs.toronto.edu/~kriz/cifar.html, unpacked: data_batch_1.bin to data_batch_5.bin and "
    "test_batch.bin, or the folder cifar-10-batches-bin that holds them) or cifar10_train_jpeg.npz and "
    "cifar10_test_jpeg.npz (arrays jpeg, offsets, labels). Put them in one folder"
)

Inputs = Float32[np.ndarray, "inputs height width channels"] | Int32[np.ndarray, "inputs length"]


@dataclass(frozen=True)
class Dataset:
    """Holds inputs and labels, split into a training and a test part.

    Attributes:
        x_train: Training inputs: images, channels last, float32 from 0 (black) to 1 (full intensity); or texts, int32
            tokens.
        y_train: Their classes, int32 in [0, number of classes).
        x_test: Test inputs, as `x_train`.
        y_test: Their classes.
        class_names: The name of each class.
    """

    x_train: Inputs
    y_train: Int32[np.ndarray, "train"]
    x_test: Inputs
    y_test: Int32[np.ndarray, "test"]
    class_names: tuple[str, ...]

    @property
    def noun(self) -> str:
        """What the inputs are: "images" or "texts"."""
        return "texts" if np.issubdtype(self.x_train.dtype, np.integer) else "images"


def load(name: str, data_dir: str | Path | None = None) -> Dataset:
    """Loads a data set by name.

    * `"digits"`: the 1797 handwritten digits that scikit-learn ships, 8 x 8 enlarged to 28 x 28 (cubic),
      in a fixed shuffle, split into 1397 training and 400 test images. Needs no files.
    * `"mnist"`: 28 x 28 x 1, from idx files (plain or gzip) or `mnist.npz`.
    * `"cifar10"`: 32 x 32 x 3, from the binary batches or from JPEG images in `.npz`: image i is the file
      `jpeg[offsets[i]:offsets[i + 1]]` (uint8) of class `labels[i]`. Needs Pillow.
    * `"unicode"`: names of characters in Unicode 3.2, a version that every Python has, without their first word, which
      is the class: of "GREEK SMALL LETTER ALPHA" the text is "SMALL LETTER ALPHA" and the class "GREEK". The words by
      which at least 100 names begin are the classes. A text is 40 tokens, one for each letter, cut or padded by token
      0. In a fixed shuffle; 2,000 are test texts. "LETTER KA" is in several scripts, and no classifier names all of
      them right. Needs no files.

    Pixels are divided by their highest value, so that they lie in [0, 1]; no mean is subtracted. Pickles are
    never read.

    Args:
        name: One of `NAMES`.
        data_dir: Folder with the files; by default the environment variable `JAXCODE_DATA` names it.

    Returns:
        The data set, in the order of the files (digits and unicode: a fixed shuffle).

    Raises:
        FileNotFoundError: If the files do not exist; the message says which, and where they come from.
        ValueError: If the name is unknown, or a file is damaged or not in the format its name says.

    References:
        LeCun, Bottou, Bengio, Haffner (1998) for MNIST; Krizhevsky (2009), Learning multiple layers of
        features from tiny images, for CIFAR-10; Alpaydin and Kaynak (1998), Optical recognition of
        handwritten digits, for digits.
    """
    if name == "digits":
        return _digits()
    if name == "unicode":
        return _unicode()
    if name == "mnist":
        return _mnist(_folder(data_dir, _MNIST_HELP))
    if name == "cifar10":
        return _cifar10(_folder(data_dir, _CIFAR10_HELP))
    raise ValueError(f"unknown data set {name!r}; known are {', '.join(NAMES)}")


def libsvm(name: str, data_dir: str | Path | None = None) -> tuple[Any, Float64[np.ndarray, "samples"]]:
    """Loads a set of LIBSVM's collection: sparse samples of two classes.

    Args:
        name: The file's name, such as `"a9a"`: LIBSVM's own text, plain or with .gz, or an `.npz` of a CSR matrix
            (arrays data, indices, indptr, shape) and its labels y.
        data_dir: The folder; the environment variable `JAXCODE_DATA` if not given.

    Returns:
        Samples, a sparse SciPy array (n, d) of float64, and their labels, -1 or 1.

    Raises:
        FileNotFoundError: If the file does not exist, or no folder is named.
        ValueError: If it cannot be read, or has labels other than -1 and 1.
    """
    import scipy.sparse
    from sklearn.datasets import load_svmlight_file

    help_text = (
        f"{name} is at https://www.csie.ntu.edu.tw/~cjlin/libsvmtools/datasets/binary.html. Put it in one folder"
    )
    folder = _folder(data_dir, help_text)
    path = folder / f"{name}.npz"
    if path.exists():
        *parts, shape, y = _read_npz(path, ("data", "indices", "indptr", "shape", "y"))
        x = scipy.sparse.csr_array(tuple(parts), shape=tuple(shape.tolist()))
    else:
        path = _find(name, [folder], help_text)
        x, y = load_svmlight_file(str(path))
    y = np.asarray(y, np.float64)
    if set(np.unique(y)) != {-1.0, 1.0}:
        raise ValueError(f"{path} has labels {np.unique(y)[:4]}; expected -1 and 1")
    return scipy.sparse.csr_array(x, dtype=np.float64), y


def _folder(data_dir: str | Path | None, help_text: str) -> Path:
    folder = data_dir or os.environ.get(VARIABLE)
    if not folder:
        raise FileNotFoundError(f"{help_text} and name it: set the environment variable {VARIABLE}, or data_dir.")
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"the data folder {folder} does not exist. {help_text}.")
    return Path(folder)


def _digits() -> Dataset:
    import jax
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    x = np.asarray(images, np.float32)[order].reshape(-1, 8, 8, 1) / 16
    # Cubic interpolation overshoots at edges, by up to a tenth of the range.
    x = np.clip(jax.image.resize(x, (len(x), 28, 28, 1), "cubic"), 0, 1).astype(np.float32)
    y = np.asarray(labels, np.int32)[order]
    return Dataset(x[:1397], y[:1397], x[1397:], y[1397:], tuple("0123456789"))


def _unicode() -> Dataset:
    names = [unicodedata.ucd_3_2_0.name(chr(code), "") for code in range(sys.maxunicode + 1)]
    # Names of ideographs and of whole syllables of Hangul have a rule and no text.
    names = [name for name in names if " " in name and not name.startswith(("CJK UNIFIED", "CJK COMPAT", "HANGUL SYL"))]
    pairs = [name.split(" ", 1) for name in names]
    counts = collections.Counter(first for first, _ in pairs)
    class_names = tuple(sorted(first for first, count in counts.items() if count >= 100))
    pairs = [(first, rest) for first, rest in pairs if first in class_names]
    x = np.zeros((len(pairs), TEXT_LENGTH), np.int32)
    for row, (_, rest) in zip(x, pairs, strict=True):
        tokens = [_ALPHABET.index(letter) + 1 for letter in rest[:TEXT_LENGTH]]
        row[: len(tokens)] = tokens
    y = np.array([class_names.index(first) for first, _ in pairs], np.int32)
    order = np.random.default_rng(0).permutation(len(pairs))
    x, y = x[order], y[order]
    return Dataset(x[2000:], y[2000:], x[:2000], y[:2000], class_names)


def _mnist(folder: Path) -> Dataset:
    path = folder / "mnist.npz"
    if path.exists():
        keys = ("x_train", "y_train", "x_test", "y_test")
        x_train, y_train, x_test, y_test = _read_npz(path, keys)
        if x_train.ndim == 3:
            x_train, x_test = x_train[..., None], x_test[..., None]
        parts = [(x_train, y_train, path), (x_test, y_test, path)]
    else:
        folders = [folder, folder / "mnist", folder / "MNIST" / "raw"]
        parts = []
        for part in ("train", "t10k"):
            images = _find(f"{part}-images-idx3-ubyte", folders, _MNIST_HELP)
            labels = _find(f"{part}-labels-idx1-ubyte", folders, _MNIST_HELP)
            parts.append((_read_idx(images, 3)[..., None], _read_idx(labels, 1), images))
    return _dataset(parts, (28, 28, 1), tuple("0123456789"))


def _cifar10(folder: Path) -> Dataset:
    if (folder / "cifar10_train_jpeg.npz").exists():
        paths = (folder / "cifar10_train_jpeg.npz", folder / "cifar10_test_jpeg.npz")
        if not paths[1].exists():
            raise FileNotFoundError(f"{paths[1]} is missing, {paths[0].name} is there. {_CIFAR10_HELP}.")
        parts = [(*_read_jpegs(path), path) for path in paths]
    else:
        folders = [folder, folder / "cifar-10-batches-bin"]
        train = [_find(name, folders, _CIFAR10_HELP) for name in _CIFAR10_TRAIN]
        test = _find("test_batch.bin", folders, _CIFAR10_HELP)
        batches = [_read_cifar_batch(path) for path in train]
        x_train, y_train = (np.concatenate(arrays) for arrays in zip(*batches, strict=True))
        parts = [(x_train, y_train, train[0]), (*_read_cifar_batch(test), test)]
    return _dataset(parts, (32, 32, 3), _CIFAR10_CLASSES)


def _find(name: str, folders: list[Path], help_text: str) -> Path:
    for folder in folders:
        for path in (folder / name, folder / f"{name}.gz"):
            if path.exists():
                return path
    raise FileNotFoundError(f"{name} is not in {folders[0]}. {help_text}.")


def _read_idx(path: Path, ndim: int) -> UInt8[np.ndarray, "..."]:
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path} is damaged, not a whole gzip file ({error}); fetch it again") from error
    # The format: two zero bytes, 0x08 for unsigned bytes, the number of axes, each axis as big-endian int32.
    magic = bytes((0, 0, 8, ndim))
    header = 4 + 4 * ndim
    if len(data) < header or data[:4] != magic:
        raise ValueError(f"{path} is not an idx file: it begins {data[:4].hex()}, expected {magic.hex()}")
    shape = tuple(int(size) for size in np.frombuffer(data, ">u4", ndim, offset=4))
    expected = header + int(np.prod(shape, dtype=object))
    if len(data) != expected:
        raise ValueError(f"{path} has {len(data)} bytes, its header asks for {expected}; fetch it again")
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


def _read_cifar_batch(
    path: Path,
) -> tuple[UInt8[np.ndarray, "images 32 32 3"], UInt8[np.ndarray, "images"]]:
    data = np.fromfile(path, np.uint8)
    record = 1 + 3 * 32 * 32
    if len(data) == 0 or len(data) % record:
        raise ValueError(f"{path} has {len(data)} bytes, expected a multiple of {record}; fetch it again")
    data = data.reshape(-1, record)
    return data[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), data[:, 0]


def _read_jpegs(path: Path) -> tuple[UInt8[np.ndarray, "images 32 32 3"], Shaped[np.ndarray, "images"]]:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("JPEG images need Pillow: pip install 'jaxcode[models]'") from error

    jpeg, offsets, labels = _read_npz(path, ("jpeg", "offsets", "labels"))
    offsets = offsets.astype(np.int64)
    is_complete = len(offsets) == len(labels) + 1 and offsets[0] == 0 and offsets[-1] == len(jpeg)
    if not is_complete or np.any(np.diff(offsets) < 0):
        raise ValueError(f"{path} is damaged: offsets do not cut jpeg into one piece for each label")
    images = np.empty((len(labels), 32, 32, 3), np.uint8)
    for i in range(len(labels)):
        try:
            file = io.BytesIO(jpeg[offsets[i] : offsets[i + 1]].tobytes())
            with Image.open(file, formats=["JPEG"]) as image:
                if image.size != (32, 32):
                    width, height = image.size
                    raise ValueError(f"{path}: image {i} is {width} x {height}, expected 32 x 32")
                images[i] = np.asarray(image.convert("RGB"))
        except OSError as error:
            raise ValueError(f"{path} is damaged: image {i} is not a whole JPEG ({error})") from error
    return images, labels


def _read_npz(path: Path, keys: tuple[str, ...]) -> list[Shaped[np.ndarray, "..."]]:
    try:
        archive = np.load(path, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise ValueError("it holds a single array")
        with archive:
            missing = [key for key in keys if key not in archive.files]
            if missing:
                raise ValueError(f"it has no {', '.join(missing)}, only {', '.join(archive.files)}")
            return [archive[key] for key in keys]
    except (ValueError, EOFError, OSError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} cannot be read as an .npz file of {', '.join(keys)}: {error}") from error


def _dataset(
    parts: list[tuple[Shaped[np.ndarray, "..."], Shaped[np.ndarray, "..."], Path]],
    image_shape: tuple[int, int, int],
    class_names: tuple[str, ...],
) -> Dataset:
    arrays = []
    for x, y, path in parts:
        if x.dtype != np.uint8 or x.shape[1:] != image_shape:
            raise ValueError(f"{path}: images are {x.dtype} {x.shape[1:]}, expected uint8 {image_shape}")
        if y.shape != x.shape[:1] or not np.issubdtype(y.dtype, np.integer) or len(y) == 0:
            raise ValueError(f"{path}: {len(x)} images, but labels are {y.dtype} of shape {y.shape}")
        if y.min() < 0 or y.max() >= len(class_names):
            last = len(class_names) - 1
            raise ValueError(f"{path}: labels run from {y.min()} to {y.max()}, expected 0 to {last}")
        arrays += [x.astype(np.float32) / 255, y.astype(np.int32)]
    x_train, y_train, x_test, y_test = arrays
    return Dataset(x_train, y_train, x_test, y_test, class_names)
