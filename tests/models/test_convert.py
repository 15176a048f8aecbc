import dataclasses
import re
import sys

import chex
import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from models import serialization
from models.convert import load_checkpoint, main
from models.repvgg import RepVGG, RepVGGConfig, merge_branches
from models.resnet import ResNet, ResNetConfig
from models.vit import ViT

CIFAR_STRIDES = (1, 1, 2, 2, 2)
SMALL_VGG = ((2, 1, 2, 1), (8, 8, 12, 16, 24))
VIT = (16, 4, 24, 2, 3, 40)

# Name: how the PyTorch network is made, height of its images, options of load_checkpoint.
NETWORKS = {
    "resnet20": (lambda nets: nets.ResNet((3, 3, 3), (16, 32, 64)), 32, {}),
    "resnet, torchvision": (lambda nets: nets.ResNet((2, 1, 1), (4, 8, 20), 7, shortcut="downsample"), 16, {}),
    "resnet, two stages": (lambda nets: nets.ResNet((1, 2), (4, 8)), 8, {}),
    "resnet, akamaster": (lambda nets: nets.ResNet((2, 2, 1), (4, 8, 16), head="linear"), 16, {}),
    "resnet, kuangliu": (lambda nets: nets.ResNet((1,) * 4, (4, 8, 8, 16), 9, "linear", "shortcut"), 16, {}),
    "resnet, 11 blocks": (lambda nets: nets.ResNet((11, 1, 1), (4, 8, 16)), 8, {}),
    "repvgg": (lambda nets: nets.RepVGG(*SMALL_VGG), 32, {}),
    "repvgg, merged": (lambda nets: nets.RepVGG(*SMALL_VGG, deploy=True), 32, {"strides": (2,) * 5}),
    "repvgg, cifar": (lambda nets: nets.RepVGG(*SMALL_VGG, CIFAR_STRIDES), 16, {"strides": CIFAR_STRIDES}),
    "vit, timm": (lambda nets: nets.TimmViT(*VIT), 16, {"num_heads": 3}),
    "vit, timm, heads of 64": (lambda nets: nets.TimmViT(8, 4, 128, 1, 2, 64), 8, {}),
    "vit, hugging face": (lambda nets: nets.HuggingFaceViT(*VIT), 16, {"num_heads": 3}),
}


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


@pytest.fixture(scope="module")
def nets(torch):
    from . import torch_networks

    return torch_networks


def _images(height, num=3):
    return np.random.default_rng(1).normal(size=(num, height, height, 3)).astype(np.float32)


def _logits(model, x):
    return np.asarray(nnx.jit(lambda model, x: model(x))(model, x))


@pytest.mark.parametrize("name", NETWORKS)
def test_logits_are_those_of_pytorch(name, tmp_path, torch, nets):
    make, height, options = NETWORKS[name]
    network = nets.randomise(make(nets), 0)
    weights = network.state_dict()
    torch.save(weights, tmp_path / "net.pth")
    save_file({key: tensor.numpy() for key, tensor in weights.items()}, tmp_path / "net.safetensors")
    model = load_checkpoint(tmp_path / "net.pth", **options)
    same = load_checkpoint(tmp_path / "net.safetensors", **options)
    chex.assert_trees_all_equal(nnx.to_pure_dict(nnx.state(model)), nnx.to_pure_dict(nnx.state(same)))
    x = _images(height)
    with torch.no_grad():
        expected = network(torch.from_numpy(x.transpose(0, 3, 1, 2).copy())).numpy()
    logits = _logits(model, x)
    print(f"{name}: {np.abs(logits - expected).max():.1e} of {np.abs(expected).max():.2g}")
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)
    num_parameters = sum(parameter.numel() for parameter in network.parameters())
    assert serialization.num_parameters(model) == num_parameters
    if isinstance(model, ViT):
        assert model.config.epsilon == (1e-12 if "hugging" in name else 1e-6)
    if name == "resnet20":
        assert model.config == ResNetConfig.resnet20()
        assert num_parameters == 269_722


@pytest.mark.parametrize("key", ["state_dict", "model", "model_state_dict", "net"])
def test_wrapped_checkpoints_are_unwrapped(key, tmp_path, torch, nets):
    network = nets.randomise(nets.ResNet((1, 1), (4, 8)), 0)
    parallel = torch.nn.DataParallel(network)
    torch.save({"epoch": 3, key: parallel.state_dict(), "accuracy": torch.tensor(0.9)}, tmp_path / "net.th")
    model = load_checkpoint(str(tmp_path / "net.th"))
    np.testing.assert_array_equal(model.head.kernel[...], network.fc.weight.detach().numpy().T)


def test_bfloat16_is_read_from_pytorch(tmp_path, torch, nets):
    network = nets.ResNet((1,), (4,)).bfloat16()
    torch.save(network.state_dict(), tmp_path / "net.pt")
    model = load_checkpoint(tmp_path / "net.pt")
    np.testing.assert_array_equal(model.head.kernel[...], network.fc.weight.detach().float().numpy().T)
    assert model.head.kernel[...].dtype == np.float32


class _Object:
    pass


def test_other_objects_than_tensors_are_refused(tmp_path, torch):
    torch.save({"state_dict": {}, "args": _Object()}, tmp_path / "net.pt")
    with pytest.raises(ValueError, match=r"net.pt is damaged, or holds something else than a dict.*state_dict"):
        load_checkpoint(tmp_path / "net.pt")


def test_damaged_files_are_refused(tmp_path, torch):
    torch.save({"fc.weight": torch.zeros(100)}, tmp_path / "whole.pt")
    whole = (tmp_path / "whole.pt").read_bytes()
    for content in (b"", b"not a checkpoint", whole[:200], whole[: len(whole) // 2]):
        (tmp_path / "net.pt").write_bytes(content)
        with pytest.raises(ValueError, match=r"net.pt is damaged"):
            load_checkpoint(tmp_path / "net.pt")
    torch.save(torch.zeros(3), tmp_path / "net.pt")
    with pytest.raises(ValueError, match="something else than a dictionary of tensors"):
        load_checkpoint(tmp_path / "net.pt")


# From here on without PyTorch.


def _norm(name, width, rng):
    arrays = {f"{name}.{leaf}": rng.normal(size=width) for leaf in ("weight", "bias", "running_mean")}
    arrays |= {f"{name}.running_var": rng.uniform(0.5, 2, width), f"{name}.num_batches_tracked": np.array(7)}
    return {key: array if array.ndim == 0 else array.astype(np.float32) for key, array in arrays.items()}


def _resnet_arrays(blocks=(1, 2), widths=(4, 8)):
    rng = np.random.default_rng(0)
    arrays = {"conv1.weight": rng.normal(size=(widths[0], 3, 3, 3)), **_norm("bn1", widths[0], rng)}
    width = widths[0]
    for stage, (num_blocks, out_width) in enumerate(zip(blocks, widths, strict=True), 1):
        for block in range(num_blocks):
            for index in (1, 2):
                name = f"layer{stage}.{block}"
                arrays[f"{name}.conv{index}.weight"] = rng.normal(size=(out_width, width, 3, 3))
                arrays |= _norm(f"{name}.bn{index}", out_width, rng)
                width = out_width
    arrays |= {"fc.weight": rng.normal(size=(10, width)), "fc.bias": rng.normal(size=10)}
    return {key: array.astype(np.float32) if array.ndim else array for key, array in arrays.items()}


def _repvgg_arrays(strides=(2, 2, 2), is_merged=False):
    rng = np.random.default_rng(0)
    widths, arrays, in_width = (4, 4, 4), {}, 3
    for name, width, stride in zip(("stage0", "stage1.0", "stage2.0"), widths, strides, strict=True):
        if is_merged:
            arrays[f"{name}.rbr_reparam.weight"] = rng.normal(size=(width, in_width, 3, 3))
            arrays[f"{name}.rbr_reparam.bias"] = rng.normal(size=width)
        else:
            for branch, size in (("rbr_dense", 3), ("rbr_1x1", 1)):
                arrays[f"{name}.{branch}.conv.weight"] = rng.normal(size=(width, in_width, size, size))
                arrays |= _norm(f"{name}.{branch}.bn", width, rng)
            if stride == 1 and width == in_width:
                arrays |= _norm(f"{name}.rbr_identity", width, rng)
        in_width = width
    arrays |= {"linear.weight": rng.normal(size=(10, 4)), "linear.bias": np.zeros(10)}
    return {key: array.astype(np.float32) if array.ndim else array for key, array in arrays.items()}


def _vit_arrays(width=24, tokens=5):
    rng = np.random.default_rng(0)
    shapes = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, tokens, width),
        "patch_embed.proj.weight": (width, 3, 4, 4),
        "patch_embed.proj.bias": (width,),
        "head.weight": (10, width),
        "head.bias": (10,),
    }
    for layer, out, size in (("attn.qkv", 3 * width, width), ("attn.proj", width, width), ("mlp.fc1", 32, width)):
        shapes |= {f"blocks.0.{layer}.weight": (out, size), f"blocks.0.{layer}.bias": (out,)}
    shapes |= {"blocks.0.mlp.fc2.weight": (width, 32), "blocks.0.mlp.fc2.bias": (width,)}
    for layer in ("norm", "blocks.0.norm1", "blocks.0.norm2"):
        shapes |= {f"{layer}.weight": (width,), f"{layer}.bias": (width,)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.fixture
def load(tmp_path):
    def load(arrays, **options):
        path = tmp_path / "net.safetensors"
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, path)
        return load_checkpoint(path, **options)

    return load


def test_arrays_are_transposed(load):
    arrays = _resnet_arrays()
    model = load(arrays)
    assert isinstance(model, ResNet)
    assert model.config == ResNetConfig((1, 2), (4, 8))
    np.testing.assert_array_equal(model.stem.conv.kernel[...], arrays["conv1.weight"].transpose(2, 3, 1, 0))
    np.testing.assert_array_equal(model.stages[1][1].second.norm.var[...], arrays["layer2.1.bn2.running_var"])
    np.testing.assert_array_equal(model.stages[0][0].first.norm.scale[...], arrays["layer1.0.bn1.weight"])
    np.testing.assert_array_equal(model.head.kernel[...], arrays["fc.weight"].T)
    arrays = _vit_arrays()
    model = load(arrays, num_heads=3)
    assert isinstance(model, ViT)
    assert (model.config.image_size, model.config.patch_size, model.config.mlp_width) == (8, 4, 32)
    attention = model.blocks[0].attention
    np.testing.assert_array_equal(attention.qkv.kernel[...], arrays["blocks.0.attn.qkv.weight"].T)
    np.testing.assert_array_equal(attention.out.kernel[...], arrays["blocks.0.attn.proj.weight"].T)


@pytest.mark.parametrize("is_merged", [False, True])
def test_strides_that_nothing_confirms_are_warned_of(is_merged, load, recwarn):
    arrays = _repvgg_arrays(is_merged=is_merged)
    load(arrays)
    messages = [str(warning.message) for warning in recwarn]
    assert any("strides are not given" in message for message in messages) == is_merged
    load(arrays, strides=(2, 2, 2))
    assert len(recwarn) == len(messages)


def test_the_module_is_in_evaluation_mode(load):
    model = load(_resnet_arrays())
    mean = np.asarray(model.stem.norm.mean[...])
    model(_images(8))
    np.testing.assert_array_equal(model.stem.norm.mean[...], mean)
    assert not any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(nnx.state(model)))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_all_floating_point_numbers_become_float32(dtype, load):
    arrays = {name: array.astype(dtype) for name, array in _resnet_arrays().items()}
    model = load(arrays)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(model.head.kernel[...], arrays["fc.weight"].T.astype(np.float32))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_are_dropped(prefix, load):
    load({prefix + name: array for name, array in _resnet_arrays().items()})


def test_missing_and_left_over_names_and_wrong_shapes_are_listed(load):
    arrays = _resnet_arrays()
    del arrays["layer2.1.bn2.running_var"], arrays["bn1.weight"]
    arrays |= {"layer1.0.se.weight": np.zeros(3, np.float32), "fc.bias": np.zeros(11, np.float32)}
    with pytest.raises(ValueError, match=r"net.safetensors: does not fit ResNetConfig") as error:
        load(arrays)
    assert "missing: bn1.weight, layer2.1.bn2.running_var;" in str(error.value)
    assert "left over: layer1.0.se.weight;" in str(error.value)
    assert "wrong: fc.bias is float32(11,), must be float32(10,)" in str(error.value)


def test_long_lists_of_names_end_in_their_number(load):
    arrays = _resnet_arrays() | {f"extra.{index:02}": np.zeros(1, np.float32) for index in range(13)}
    with pytest.raises(ValueError, match=r"left over: extra.00, .*extra.09 and 3 more \(13 in all\)$"):
        load(arrays)


def _without(arrays, *names):
    return {name: array for name, array in arrays.items() if name not in names}


def _first_projection():
    return _resnet_arrays() | {"layer1.0.downsample.0.weight": np.zeros((4, 4, 1, 1), np.float32)}


INVALID = {
    "empty": (dict, {}, "unknown architecture; the first names are none"),
    "unknown": (
        lambda: {"features.0.weight": np.zeros(3), "features.0.bias": np.zeros(3)},
        {},
        "the first names are features.0.bias, features.0.weight. Known are .*layer1.0.conv1.weight.*rbr.*timm.*Hugging",
    ),
    "no head": (lambda: _without(_resnet_arrays(), "fc.weight"), {}, "missing: fc.weight"),
    "flat kernel": (
        lambda: _resnet_arrays() | {"conv1.weight": np.zeros(3, np.float32)},
        {},
        r"conv1.weight has shape \(3,\), must have 4 axes",
    ),
    "block missing": (
        lambda: {name: array for name, array in _resnet_arrays((3, 1)).items() if "layer1.1." not in name},
        {},
        r"missing: layer1.1.bn1.bias, .*left over: layer1.2.bn1.bias",
    ),
    "kernel 7 x 7": (
        lambda: _resnet_arrays() | {"conv1.weight": np.zeros((4, 3, 7, 7), np.float32)},
        {},
        r"conv1.weight is float32\(4, 3, 7, 7\), must be float32\(4, 3, 3, 3\)",
    ),
    "quantised": (
        lambda: _resnet_arrays() | {"fc.bias": np.zeros(10, np.int8)},
        {},
        r"fc.bias is int8\(10,\), must be float32\(10,\)",
    ),
    "shortcut in the first stage": (_first_projection, {}, r"layer1.0: has a downsample .* each stage but the first"),
    "heads of a ResNet": (_resnet_arrays, {"num_heads": 2}, "num_heads is for vision transformers, got 2 for a ResNet"),
    "strides of a ResNet": (_resnet_arrays, {"strides": (1,)}, r"strides are for RepVGG, got \(1,\)"),
    "identity": (
        lambda: _repvgg_arrays((1, 1, 2)),
        {},
        r"stage1.0 has an identity branch \(rbr_identity\), so its stride is 1, got 2 in strides=\(2, 2, 2\)",
    ),
    "no identity": (
        _repvgg_arrays,
        {"strides": (2, 2, 1)},
        r"stage2.0 has no identity branch \(rbr_identity\), so its stride is not 1, got 1",
    ),
    "number of strides": (_repvgg_arrays, {"strides": CIFAR_STRIDES}, r"strides must be 3 positive integers.*got \(1"),
    "stride 0": (_repvgg_arrays, {"strides": (0, 2, 2)}, r"strides must be 3 positive integers"),
    "heads unknown": (_vit_arrays, {}, "num_heads cannot be inferred from a width of 24"),
    "heads not a divisor": (_vit_arrays, {"num_heads": 5}, "num_heads must divide width, got 5 and 24"),
    "no heads": (_vit_arrays, {"num_heads": 0}, "num_heads must be at least 1, got 0"),
    "patches in no square": (lambda: _vit_arrays(tokens=6), {"num_heads": 3}, "6 position embeddings"),
    "no qkv bias": (
        lambda: _without(_vit_arrays(), "blocks.0.attn.qkv.bias"),
        {"num_heads": 3},
        "missing: blocks.0.attn.qkv.bias$",
    ),
    "qkv of two parts": (
        lambda: _vit_arrays() | {"blocks.0.attn.qkv.bias": np.zeros(48, np.float32)},
        {"num_heads": 3},
        r"blocks.0.attn.qkv.bias is float32\(48,\), must be float32\(72,\)",
    ),
}


@pytest.mark.parametrize("case", INVALID)
def test_checkpoints_that_do_not_fit_are_refused(case, load):
    make, options, message = INVALID[case]
    with pytest.raises(ValueError, match=message):
        load(make(), **options)


def test_damaged_safetensors_are_refused(tmp_path):
    header = b'{"fc.bias":{"dtype":"F8_E4M3","shape":[4],"data_offsets":[0,4]}}'
    for content in (b"", b"not a checkpoint", len(header).to_bytes(8, "little") + header + bytes(4)):
        (tmp_path / "net.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match=r"net.safetensors is not a safetensors file that NumPy reads, or a dam"):
            load_checkpoint(tmp_path / "net.safetensors")
    with pytest.raises(FileNotFoundError):
        load_checkpoint(tmp_path / "none.safetensors")


def test_without_pytorch_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match="pip install torch"):
        load_checkpoint(tmp_path / "net.pth")


def _randomised(config, seed=0):
    model = nnx.eval_shape(lambda: RepVGG(config, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(seed)

    def draw(key, leaf):
        name = jax.tree_util.keystr(key, simple=True, separator=".")
        if name.endswith("var"):
            return rng.uniform(0.2, 3, leaf.shape).astype(np.float32)
        if name.endswith("kernel"):
            return (rng.normal(size=leaf.shape) / np.prod(leaf.shape[:-1]) ** 0.5).astype(np.float32)
        return rng.normal(1.0 if name.endswith("scale") else 0.0, 0.3, leaf.shape).astype(np.float32)

    state = nnx.state(model)
    nnx.replace_by_pure_dict(state, jax.tree_util.tree_map_with_path(draw, nnx.to_pure_dict(state)))
    nnx.update(model, state)
    model.eval()
    return model


@pytest.mark.parametrize(
    "config",
    [
        RepVGGConfig.small(),
        dataclasses.replace(RepVGGConfig.small(), strides=(2, 2, 2, 2, 2)),
        dataclasses.replace(RepVGGConfig.small(), strides=CIFAR_STRIDES),
        pytest.param(RepVGGConfig.a0(), marks=pytest.mark.long),
        pytest.param(RepVGGConfig.a0(strides=CIFAR_STRIDES), marks=pytest.mark.long),
    ],
    ids=["small", "small, imagenet", "small, cifar", "a0", "a0, cifar"],
)
def test_merged_branches_compute_the_same(config):
    model = _randomised(config)
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model)))
    merged = merge_branches(model)
    assert merged.config == dataclasses.replace(config, is_merged=True)
    x = _images(16, 2)
    expected, logits = _logits(model, x), _logits(merged, x)
    scale = np.abs(expected).max()
    print(f"{config}: {np.abs(logits - expected).max() / scale:.1e}")
    assert 1e-3 < scale < 1e6
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * scale)
    after = nnx.to_pure_dict(nnx.state(model))
    jax.tree.map(np.testing.assert_array_equal, before, after)
    merged.head.bias[...] += 1
    np.testing.assert_array_equal(model.head.bias[...], before["head"]["bias"])
    with pytest.raises(ValueError, match="model must have branches, got one with is_merged=True"):
        merge_branches(merged)


def test_the_command_writes_what_serialization_reads(tmp_path, capsys):
    arrays = _repvgg_arrays((1, 1, 2))
    save_file(arrays, tmp_path / "net.safetensors")
    out = tmp_path / "folder" / "merged.safetensors"
    main([str(tmp_path / "net.safetensors"), str(out), "--strides", "1,1,2", "--merge"])
    printed = capsys.readouterr().out
    assert "RepVGGConfig(blocks=(1, 1), widths=(4, 4, 4), strides=(1, 1, 2)" in printed
    assert "458 parameters" in printed
    loaded = load_checkpoint(tmp_path / "net.safetensors", strides=(1, 1, 2))
    model = RepVGG(dataclasses.replace(loaded.config, is_merged=True), rngs=nnx.Rngs(1))
    serialization.load(model, out)
    np.testing.assert_allclose(_logits(model, _images(8)), _logits(loaded, _images(8)), rtol=1e-4, atol=1e-4)


def test_the_command_converts_vision_transformers(tmp_path, capsys):
    save_file(_vit_arrays(), tmp_path / "net.safetensors")
    main([str(tmp_path / "net.safetensors"), str(tmp_path / "out.safetensors"), "--num-heads", "3"])
    assert "num_heads=3" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["net.safetensors", "net.safetensors"], "argument out: must be another file than the checkpoint"),
        (["net.safetensors", "out.pth"], "argument out: .* with suffix .safetensors, got out.pth"),
        (["net.safetensors", "out.safetensors", "--merge"], "argument --merge: only a RepVGG has branches to merge"),
        (["net.safetensors", "out.safetensors", "--strides", "1,x"], "argument --strides: must be integers"),
        (["net.safetensors", "out.safetensors", "--num-heads", "4"], "num_heads is for vision transformers"),
        (["none.safetensors", "out.safetensors"], "none.safetensors"),
        (["merged.safetensors", "out.safetensors", "--merge"], "model must have branches"),
    ],
)
def test_bad_arguments_end_the_command(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_file(_resnet_arrays(), "net.safetensors")
    save_file(_repvgg_arrays(is_merged=True), "merged.safetensors")
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2
    assert re.search(message, capsys.readouterr().err.replace("\n", " "))
    assert not (tmp_path / "out.safetensors").exists()
