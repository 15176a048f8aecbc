import gzip
import io
import os
import struct
import zlib

import numpy as np
import pytest

from models import datasets

RNG = np.random.default_rng(0)
MNIST_FILES = {
    "train-images-idx3-ubyte": RNG.integers(0, 256, (6, 28, 28), np.uint8),
    "train-labels-idx1-ubyte": RNG.integers(0, 10, 6, np.uint8),
    "t10k-images-idx3-ubyte": RNG.integers(0, 256, (4, 28, 28), np.uint8),
    "t10k-labels-idx1-ubyte": RNG.integers(0, 10, 4, np.uint8),
}


def _idx(array):
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def _write_mnist(folder, suffix=""):
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in MNIST_FILES.items():
        data = _idx(array)
        (folder / f"{name}{suffix}").write_bytes(gzip.compress(data) if suffix else data)


def _check_mnist(data):
    assert data.x_train.shape == (6, 28, 28, 1)
    assert data.x_train.dtype == np.float32
    assert data.y_train.dtype == np.int32
    np.testing.assert_array_equal(np.rint(data.x_train[..., 0] * 255), MNIST_FILES["train-images-idx3-ubyte"])
    np.testing.assert_array_equal(data.y_train, MNIST_FILES["train-labels-idx1-ubyte"])
    np.testing.assert_array_equal(np.rint(data.x_test[..., 0] * 255), MNIST_FILES["t10k-images-idx3-ubyte"])
    np.testing.assert_array_equal(data.y_test, MNIST_FILES["t10k-labels-idx1-ubyte"])


def _npz(path, **changes):
    train, test = MNIST_FILES["train-images-idx3-ubyte"], MNIST_FILES["t10k-images-idx3-ubyte"]
    arrays = {"x_train": train[..., None], "y_train": np.arange(6), "x_test": test, "y_test": np.arange(4)}
    arrays |= {"x_test": test[..., None]} | changes
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})


def test_digits_are_real_and_in_a_fixed_shuffle_and_split():
    from sklearn.datasets import load_digits

    data = datasets.load("digits")
    assert data.x_train.shape == (1397, 28, 28, 1)
    assert data.x_test.shape == (400, 28, 28, 1)
    assert data.x_train.dtype == np.float32
    assert data.x_train.min() == 0
    assert data.x_train.max() == 1
    np.testing.assert_array_equal(data.x_test, datasets.load("digits").x_test)
    original = load_digits()
    labels = np.concatenate([data.y_train, data.y_test])
    np.testing.assert_array_equal(np.bincount(labels), np.bincount(original.target))
    # Every class is tested, and the split does not follow the file, which lists the digits by writer.
    assert np.bincount(data.y_test, minlength=10).min() > 20
    # Labels belong to their images: enlarging keeps the mean intensity of every class.
    intensities = {label: original.images[original.target == label].mean() / 16 for label in range(10)}
    for label, mean in intensities.items():
        enlarged = np.concatenate([data.x_train[data.y_train == label], data.x_test[data.y_test == label]]).mean()
        assert enlarged == pytest.approx(mean, abs=0.02)


def test_names_in_unicode_are_the_same_with_every_python():
    data = datasets.load("unicode")
    assert (data.x_train.shape, data.x_test.shape, data.noun) == ((6827, 40), (2000, 40), "texts")
    texts = ["".join(datasets._ALPHABET[token - 1] for token in row if token) for row in data.x_test[:3]]
    words = [data.class_names[label] for label in data.y_test[:3]]
    assert texts == ["SMALL LETTER Y WITH DOT ABOVE", "CAPITAL THETA SYMBOL", "SANS-SERIF BOLD CAPITAL NU"]
    assert words == ["LATIN", "GREEK", "MATHEMATICAL"]
    assert data.x_train.max() < datasets.NUM_TOKENS
    contents = b"".join(getattr(data, name).tobytes() for name in ("x_train", "y_train", "x_test", "y_test"))
    assert zlib.crc32(contents) == 2999571081


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("inside", ["", "mnist", "MNIST/raw"])
def test_mnist_from_idx_files(tmp_path, suffix, inside):
    _write_mnist(tmp_path / inside, suffix)
    _check_mnist(datasets.load("mnist", tmp_path))


def test_mnist_from_npz_with_and_without_channel_axis(tmp_path):
    labels = {
        "y_train": MNIST_FILES["train-labels-idx1-ubyte"],
        "y_test": MNIST_FILES["t10k-labels-idx1-ubyte"],
    }
    _npz(tmp_path / "mnist.npz", **labels)
    _check_mnist(datasets.load("mnist", tmp_path))
    flat = {
        "x_train": MNIST_FILES["train-images-idx3-ubyte"],
        "x_test": MNIST_FILES["t10k-images-idx3-ubyte"],
    }
    _npz(tmp_path / "mnist.npz", **labels, **flat)
    _check_mnist(datasets.load("mnist", tmp_path))


def test_the_environment_variable_names_the_folder(tmp_path, monkeypatch):
    _write_mnist(tmp_path)
    monkeypatch.setenv(datasets.VARIABLE, str(tmp_path))
    _check_mnist(datasets.load("mnist"))


@pytest.mark.parametrize("inside", ["", "cifar-10-batches-bin"])
def test_cifar10_from_binary_batches(tmp_path, inside):
    folder = tmp_path / inside
    folder.mkdir(exist_ok=True)
    images, labels = RNG.integers(0, 256, (12, 32, 32, 3), np.uint8), RNG.integers(0, 10, 12, np.uint8)
    for i in range(6):
        name = "test_batch.bin" if i == 5 else f"data_batch_{i + 1}.bin"
        records = [bytes([labels[j]]) + images[j].transpose(2, 0, 1).tobytes() for j in (2 * i, 2 * i + 1)]
        (folder / name).write_bytes(b"".join(records))
    data = datasets.load("cifar10", tmp_path)
    assert data.class_names[3] == "cat"
    np.testing.assert_array_equal(np.rint(data.x_train * 255), images[:10])
    np.testing.assert_array_equal(data.y_train, labels[:10])
    np.testing.assert_array_equal(np.rint(data.x_test * 255), images[10:])
    np.testing.assert_array_equal(data.y_test, labels[10:])


def _jpegs(colours, size=(32, 32)):
    from PIL import Image

    files = []
    for colour in colours:
        buffer = io.BytesIO()
        Image.new("RGB", size, colour).save(buffer, "JPEG", quality=95)
        files.append(buffer.getvalue())
    offsets = np.cumsum([0] + [len(file) for file in files])
    return {"jpeg": np.frombuffer(b"".join(files), np.uint8), "offsets": offsets}


def test_cifar10_from_jpegs(tmp_path):
    colours = [(250, 0, 0), (0, 0, 250), (0, 128, 0)]
    np.savez(tmp_path / "cifar10_train_jpeg.npz", **_jpegs(colours), labels=np.array([3, 1, 2]))
    np.savez(tmp_path / "cifar10_test_jpeg.npz", **_jpegs(colours[::-1]), labels=np.array([2, 1, 3]))
    data = datasets.load("cifar10", tmp_path)
    for i, colour in enumerate(colours):
        np.testing.assert_allclose(data.x_train[i], np.broadcast_to(np.array(colour) / 255, (32, 32, 3)), atol=0.02)
    np.testing.assert_array_equal(data.y_train, [3, 1, 2])
    np.testing.assert_array_equal(data.x_test, data.x_train[::-1])


def test_unknown_name():
    with pytest.raises(ValueError, match=r"'svhn'.*digits, mnist, cifar10"):
        datasets.load("svhn")


@pytest.mark.parametrize(("name", "file"), [("mnist", "train-images-idx3-ubyte"), ("cifar10", "data_batch_1.bin")])
def test_missing_files_are_named_with_their_source(tmp_path, monkeypatch, name, file):
    monkeypatch.delenv(datasets.VARIABLE, raising=False)
    with pytest.raises(FileNotFoundError, match=rf"{file}[\s\S]*{datasets.VARIABLE}"):
        datasets.load(name)
    with pytest.raises(FileNotFoundError, match=rf"{file} is not in .*http"):
        datasets.load(name, tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        datasets.load(name, tmp_path / "nowhere")


def test_one_missing_file_of_many_is_named(tmp_path):
    _write_mnist(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(FileNotFoundError, match="t10k-labels-idx1-ubyte is not in"):
        datasets.load("mnist", tmp_path)
    np.savez(tmp_path / "cifar10_train_jpeg.npz", **_jpegs([(0, 0, 0)]), labels=np.array([0]))
    with pytest.raises(FileNotFoundError, match=r"cifar10_test_jpeg\.npz is missing"):
        datasets.load("cifar10", tmp_path)


IMAGES = _idx(MNIST_FILES["train-images-idx3-ubyte"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not an idx file"),
        (b"\x00\x00\x0d\x03" + IMAGES[4:], "begins 00000d03"),
        (_idx(MNIST_FILES["train-labels-idx1-ubyte"]), "begins 00000801"),
        (IMAGES[:-1], "asks for"),
        (IMAGES + b"\x00", "asks for"),
        (IMAGES[:4] + b"\xff" * 12 + IMAGES[16:], "asks for"),
        (_idx(np.zeros((6, 27, 28), np.uint8)), "images are uint8"),
        (_idx(np.zeros((5, 28, 28), np.uint8)), "5 images, but labels"),
    ],
)
def test_damaged_idx_files(tmp_path, content, message):
    _write_mnist(tmp_path)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        datasets.load("mnist", tmp_path)


@pytest.mark.parametrize(
    "content",
    [b"", b"no gzip", gzip.compress(IMAGES)[:-20], gzip.compress(IMAGES)[:12] + b"xx"],
    ids=["empty", "not gzip", "cut off", "overwritten"],
)
def test_damaged_gzip_files(tmp_path, content):
    _write_mnist(tmp_path, ".gz")
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(content)
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte(\.gz is damaged|\.gz is not an idx file)"):
        datasets.load("mnist", tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y_test": None}, "it has no y_test"),
        ({"y_train": np.arange(5)}, "6 images, but labels"),
        ({"y_train": np.arange(6) + 5}, "labels run from 5 to 10"),
        ({"y_train": np.arange(6) / 2}, "labels are float64"),
        ({"x_train": np.zeros((6, 28, 28, 1), np.float32)}, "expected uint8"),
        ({"x_train": np.zeros((6, 3, 28, 28), np.uint8)}, "expected uint8"),
    ],
)
def test_npz_files_that_hold_something_else(tmp_path, changes, message):
    _npz(tmp_path / "mnist.npz", **changes)
    with pytest.raises(ValueError, match=message):
        datasets.load("mnist", tmp_path)


class _Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_pickles_are_never_loaded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _npz(tmp_path / "mnist.npz", x_train=np.array([_Bomb()], dtype=object))
    with pytest.raises(ValueError, match="allow_pickle"):
        datasets.load("mnist", tmp_path)
    assert not (tmp_path / "exploded").exists()


def test_truncated_npz_files(tmp_path):
    path = tmp_path / "mnist.npz"
    _npz(path)
    archive = path.read_bytes()
    for content in (b"", archive[: len(archive) // 2], b"text"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"mnist\.npz cannot be read"):
            datasets.load("mnist", tmp_path)
    np.save(tmp_path / "single.npy", np.zeros(3))
    path.write_bytes((tmp_path / "single.npy").read_bytes())
    with pytest.raises(ValueError, match="a single array"):
        datasets.load("mnist", tmp_path)


@pytest.mark.parametrize("length", [0, 3072, 3074])
def test_truncated_cifar_batches(tmp_path, length):
    for name in [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]:
        (tmp_path / name).write_bytes(bytes(3073))
    (tmp_path / "data_batch_3.bin").write_bytes(bytes(length))
    with pytest.raises(ValueError, match=rf"data_batch_3\.bin has {length} bytes"):
        datasets.load("cifar10", tmp_path)


def test_damaged_jpegs(tmp_path):
    good = _jpegs([(1, 2, 3), (9, 9, 9)])
    labels = np.array([0, 1])
    np.savez(tmp_path / "cifar10_test_jpeg.npz", **good, labels=labels)

    def load(**changes):
        np.savez(tmp_path / "cifar10_train_jpeg.npz", **(good | {"labels": labels} | changes))
        return datasets.load("cifar10", tmp_path)

    assert len(load().x_train) == 2
    with pytest.raises(ValueError, match="offsets"):
        load(labels=np.array([0]))
    with pytest.raises(ValueError, match="offsets"):
        load(offsets=good["offsets"] + 1)
    with pytest.raises(ValueError, match="image 1 is not a whole JPEG"):
        load(
            jpeg=np.concatenate([good["jpeg"][: good["offsets"][1]], np.zeros_like(good["jpeg"][good["offsets"][1] :])])
        )
    with pytest.raises(ValueError, match="image 0 is 16 x 32"):
        load(**_jpegs([(1, 2, 3), (9, 9, 9)], size=(16, 32)))


needs_data = pytest.mark.skipif(
    not os.environ.get(datasets.VARIABLE), reason=f"real data only where {datasets.VARIABLE} names its folder"
)


@needs_data
def test_real_mnist():
    data = datasets.load("mnist")
    assert (len(data.x_train), len(data.x_test)) == (60_000, 10_000)
    # Counts of the digits 0 and 1 in the original training set, and its published mean intensity.
    assert np.bincount(data.y_train)[:2].tolist() == [5923, 6742]
    assert data.x_train.mean() == pytest.approx(0.1307, abs=1e-4)


@needs_data
@pytest.mark.long
def test_real_cifar10():
    data = datasets.load("cifar10")
    assert data.x_train.shape[1:] == (32, 32, 3)
    assert len(data.x_test) == 10_000
    assert np.bincount(data.y_test).tolist() == [1000] * 10
    # The published mean of the red, green and blue channels.
    np.testing.assert_allclose(data.x_test.mean(axis=(0, 1, 2)), [0.494, 0.485, 0.450], atol=0.01)
