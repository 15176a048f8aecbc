import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import networks, serialization, training
from models.datasets import Dataset, load
from models.lenet5 import LeNet5
from models.train import main
from models.training import Recipe, _augment, _mix, accuracy, fit


@pytest.fixture(scope="module")
def digits():
    return load("digits")


def _part(data, num):
    return Dataset(data.x_train[:num], data.y_train[:num], data.x_test, data.y_test, data.class_names)


def test_training_learns_the_digits(digits):
    model = LeNet5(rngs=nnx.Rngs(0))
    before = accuracy(model, digits.x_test, digits.y_test)
    losses = fit(model, digits, Recipe(8), progress=False)
    assert losses.shape == (8,)
    assert losses[0] > 1.0
    assert losses[-1] < 0.1
    assert before < 0.4
    assert accuracy(model, digits.x_test, digits.y_test) >= 0.95


def test_the_seed_decides_the_order_of_the_images(digits):
    def losses(seed):
        return fit(LeNet5(rngs=nnx.Rngs(0)), _part(digits, 192), Recipe(2), seed=seed, progress=False)

    np.testing.assert_array_equal(losses(3), losses(3))
    assert not np.array_equal(losses(3), losses(4))


class _Normalised(nnx.Module):
    """A classifier with running averages and dropout, whose state training must carry along."""

    def __init__(self, rngs):
        self.norm = nnx.BatchNorm(784, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.dense = nnx.Linear(784, 10, rngs=rngs)

    def __call__(self, x):
        return self.dense(self.dropout(self.norm(x.reshape(x.shape[0], -1))))


def test_running_averages_follow_and_the_model_ends_in_evaluation_mode(digits):
    model = _Normalised(nnx.Rngs(0))
    fit(model, digits, Recipe(3), progress=False)
    pixels = digits.x_train.reshape(len(digits.x_train), -1)
    assert model.norm.use_running_average
    assert model.dropout.deterministic
    # 63 steps with momentum 0.99: the average has gone 47 % of its way from 0.
    ratio = np.asarray(model.norm.mean.get_value()).sum() / pixels.mean(axis=0).sum()
    assert ratio == pytest.approx(1 - 0.99**63, rel=0.05)


def test_accuracy_counts_every_image_once(digits):
    model = LeNet5(rngs=nnx.Rngs(0))
    x, y = digits.x_test[:7], digits.y_test[:7]
    expected = float(np.mean(np.argmax(np.asarray(model(jnp.asarray(x))), axis=-1) == y))
    assert accuracy(model, x, y) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": 2000}, "1397"),
        ({"optimizer": "sgd"}, "optimizer must be one of adamw, muon, got 'sgd'"),
        ({"learning_rate": float("nan")}, "learning_rate must be finite"),
        ({"average": 1.0}, r"average must be in \[0, 1\)"),
    ],
)
def test_bad_arguments(digits, arguments, message):
    with pytest.raises(ValueError, match=message):
        fit(LeNet5(rngs=nnx.Rngs(0)), digits, Recipe(**{"epochs": 1, **arguments}), progress=False)


def test_augmented_images_are_shifted_and_mirrored_ones():
    x = np.random.default_rng(0).random((200, 16, 16, 1)).astype(np.float32)
    augmented = np.asarray(_augment(jax.random.key(1), jnp.asarray(x), shift=2, mirror=True))
    padded = np.pad(x, [(0, 0), (2, 2), (2, 2), (0, 0)])
    transformations = set()
    for i, image in enumerate(augmented):
        matches = [
            (row, column, mirrored)
            for row in range(5)
            for column in range(5)
            for mirrored in (False, True)
            if np.array_equal(image, padded[i, row : row + 16, column : column + 16][:, :: -1 if mirrored else 1])
        ]
        assert len(matches) == 1
        transformations.add(matches[0])
    assert len(transformations) > 40


def test_mixed_images_and_targets_have_the_same_share():
    x = jnp.eye(16)[:, :, None, None]
    mixed, targets = _mix(jax.random.key(0), x, jnp.eye(16), 1.0)
    np.testing.assert_allclose(mixed[:, :, 0, 0], targets, atol=1e-7)
    np.testing.assert_allclose(targets.sum(axis=1), 1, atol=1e-6)
    assert len(np.unique(np.round(np.asarray(targets), 5))) > 2


class _Hidden(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(4, 8, (3, 3), rngs=rngs)
        self.dense = nnx.Linear(20, 30, rngs=rngs)
        self.last = nnx.Linear(30, 10, rngs=rngs)


def test_muon_takes_orthogonal_steps_of_adams_size():
    params = nnx.state(_Hidden(nnx.Rngs(0)), nnx.Param)
    rng = np.random.default_rng(0)
    grads = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), params)
    recipe = Recipe(1, optimizer="muon", learning_rate=0.1, warmup_epochs=0)
    optimizer = training._optimizer(recipe, 100, num_classes=10)
    steps, _ = optimizer.update(grads, optimizer.init(params), params)
    steps = nnx.to_pure_dict(steps)
    for kernel in (steps["conv"]["kernel"].reshape(36, 8), steps["dense"]["kernel"]):
        # Newton and Schulz's polynomial of this optimizer takes singular values to between 0.7 and 1.2 or so.
        size = 0.1 * 0.2 * np.sqrt(max(kernel.shape))
        singular = np.linalg.svd(kernel, compute_uv=False)
        assert np.all((0.6 * size < singular) & (singular < 1.3 * size))
    # The first step of Adam with Nesterov's momentum is the sign of the gradient, of one size for all parameters.
    size = np.abs(steps["dense"]["bias"]).mean()
    assert 0.1 <= size < 0.2
    for step in (steps["last"]["kernel"], steps["dense"]["bias"]):
        np.testing.assert_allclose(np.abs(step), size, rtol=1e-3)


class _Linear(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(784, 10, rngs=rngs)

    def __call__(self, x):
        return self.dense(x.reshape(x.shape[0], -1))


class _Always(nnx.Module):
    """Says that every image is of one class."""

    def __call__(self, x):
        return 100.0 * jax.nn.one_hot(jnp.full(len(x), 3), 10)


def test_half_of_the_targets_are_the_teachers_probabilities(digits):
    model = _Linear(nnx.Rngs(0))
    fit(model, digits, Recipe(10, teacher="always"), teacher=_Always(), progress=False)
    probabilities = jax.nn.softmax(model(digits.x_train))
    is_three = digits.y_train == 3
    # Of images of other classes, half of the probability is the teacher's class and the other half their own.
    assert jnp.mean(probabilities[~is_three, 3]) == pytest.approx(0.5, abs=0.05)
    own = probabilities[jnp.arange(len(is_three)), digits.y_train]
    assert jnp.mean(own[~is_three]) == pytest.approx(0.5, abs=0.1)
    assert jnp.mean(own[is_three]) > 0.8


def test_the_teacher_is_the_one_that_the_recipe_names(digits, tmp_path):
    with pytest.raises(ValueError, match="teacher must be the network that the recipe names"):
        fit(LeNet5(rngs=nnx.Rngs(0)), digits, Recipe(1, teacher="lenet5"), progress=False)
    with pytest.raises(ValueError, match=r"teacher must be one of lenet5, convnet, .*, got 'lenet6'"):
        networks.load_teacher(Recipe(1, teacher="lenet6"), digits, "digits", tmp_path)
    teacher = networks.load_teacher(Recipe(1, teacher="lenet5"), digits, "digits", tmp_path)
    assert accuracy(teacher, digits.x_test, digits.y_test) > 0.95
    assert networks.load_teacher(Recipe(1), digits, "digits", tmp_path) is None


_RECIPE = Recipe(
    3,
    batch_size=64,
    optimizer="muon",
    weight_decay=0.1,
    label_smoothing=0.1,
    mixup=0.2,
    average=0.9,
    shift=1,
    mirror=True,
)


class _Interrupted(Exception):
    pass


@pytest.mark.long
def test_an_interrupted_run_resumes_to_the_same_weights(digits, tmp_path, monkeypatch):
    data = _part(digits, 192)
    models = [_Normalised(nnx.Rngs(0)) for _ in range(3)]
    whole = fit(models[0], data, _RECIPE, seed=5, progress=False)
    save = training._Checkpoints.save

    def save_and_stop(self, epoch, state):
        save(self, epoch, state)
        if epoch == 2:
            self.close()
            raise _Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(training._Checkpoints, "save", save_and_stop)
        with pytest.raises(_Interrupted):
            fit(models[1], data, _RECIPE, seed=5, progress=False, checkpoint=tmp_path / "run")
    resumed = fit(models[2], data, _RECIPE, seed=5, progress=False, checkpoint=tmp_path / "run")
    np.testing.assert_array_equal(resumed, whole)
    state, expected = (nnx.to_pure_dict(nnx.state(model, (nnx.Param, nnx.BatchStat))) for model in models[::2])
    chex.assert_trees_all_equal(state, expected)
    with pytest.raises(ValueError, match="is of another run"):
        fit(models[1], data, _RECIPE, seed=6, progress=False, checkpoint=tmp_path / "run")


def test_a_batch_over_all_devices_gives_the_same_losses(digits, monkeypatch):
    assert len(jax.devices()) > 1
    data = _part(digits, 192)
    many = fit(LeNet5(rngs=nnx.Rngs(0)), data, Recipe(2), progress=False)
    monkeypatch.setattr(jax, "devices", lambda: jax.local_devices()[:1])
    one = fit(LeNet5(rngs=nnx.Rngs(0)), data, Recipe(2), progress=False)
    np.testing.assert_allclose(many, one, rtol=1e-4)


def test_bfloat16_learns_too(digits):
    model = _Normalised(nnx.Rngs(0))
    losses = fit(model, digits, Recipe(4), progress=False, dtype=jnp.bfloat16)
    assert losses[-1] < 0.3
    assert model.dense.kernel.dtype == jnp.float32


def test_the_command_writes_weights_and_a_card(tmp_path, capsys, digits):
    out = tmp_path / "weights"
    main(["lenet5", "--dataset", "digits", "--epochs", "2", "--label-smoothing", "0.05", "--out", str(out)])
    card = json.loads((out / "lenet5-digits-0.json").read_text())
    assert card["recipe"]["epochs"] == 2
    assert card["recipe"]["label_smoothing"] == 0.05
    assert card["command"] == "python -m models.train lenet5 --dataset digits --epochs 2 --label-smoothing 0.05"
    model = networks.make("lenet5", digits, seed=1)
    serialization.load(model, out / "lenet5-digits-0.safetensors")
    assert accuracy(model, digits.x_test, digits.y_test) == pytest.approx(card["accuracy"], abs=1e-4)
    assert sorted(path.name for path in out.iterdir()) == ["lenet5-digits-0.json", "lenet5-digits-0.safetensors"]
    assert "Accuracy" in capsys.readouterr().out


def test_without_orbax_there_are_no_checkpoints(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    main(["lenet5", "--dataset", "digits", "--epochs", "1", "--out", str(tmp_path)])
    assert "No checkpoints are written: orbax is not installed" in capsys.readouterr().out
    assert (tmp_path / "lenet5-digits-0.safetensors").exists()
    with pytest.raises(SystemExit):
        main(["lenet5", "--dataset", "digits", "--epochs", "1", "--out", str(tmp_path), "--resume"])
    assert "argument --resume: needs orbax" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "epochs must be at least 1"),
        (["--batch-size", "5000"], "1397 training images"),
        (["--seed", "-1"], "argument --seed: must be a whole number, 0 or more, got '-1'"),
        (["--optimizer", "sgd"], "invalid choice: 'sgd'"),
    ],
)
def test_bad_arguments_of_the_command_exit_with_two(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        main(["lenet5", "--dataset", "digits", "--out", str(tmp_path), *arguments])
    assert error.value.code == 2
    assert message in capsys.readouterr().err
