"""Reads published checkpoints of PyTorch networks into the modules of this folder: `python -m models.convert`.

==================  ==================================================================================================
network             names that are known
==================  ==================================================================================================
residual networks   torchvision's (`layer1.0.conv1.weight`), also with `shortcut` and `linear` for `downsample` and `fc`
RepVGG              the authors', with branches (`stage1.0.rbr_dense.conv.weight`) or merged (`stage1.0.rbr_reparam`)
vision transformer  timm's (`blocks.0.attn.qkv.weight`) and Hugging Face's (`vit.encoder.layer.0.output.dense.weight`)
==================  ==================================================================================================
"""

import argparse
import math
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError
from safetensors.numpy import load_file

from . import serialization
from .repvgg import RepVGG, RepVGGConfig, merge_branches
from .resnet import ResNet, ResNetConfig
from .vit import ViT, ViTConfig

Network = ResNet | RepVGG | ViT

# Names by which each network is recognised.
_PATTERNS = {
    "ResNet": r"layer1\.0\.",
    "RepVGG": r"stage0\.rbr_",
    "ViT of timm": r"blocks\.0\.attn\.",
    "ViT of Hugging Face": r"vit\.",
}
# Each table converts paths in our modules to names in a checkpoint, one regular expression after the other.
_Renames = dict[str, str | Callable[[re.Match], str]]
_LEAVES: _Renames = {r"\.(kernel|scale)$": ".weight", r"\.(mean|var)$": r".running_\1"}
_RESNET: _Renames = {
    r"^stem\.conv": "conv1",
    r"^stem\.norm": "bn1",
    r"^stages\.(\d+)": lambda match: f"layer{int(match[1]) + 1}",
    r"\.first\.conv": ".conv1",
    r"\.first\.norm": ".bn1",
    r"\.second\.conv": ".conv2",
    r"\.second\.norm": ".bn2",
}
_REPVGG: _Renames = {
    r"^stem": "stage0",
    r"^stages\.(\d+)": lambda match: f"stage{int(match[1]) + 1}",
    r"^(stage[\d.]+)\.conv": r"\1.rbr_reparam",
    r"\.dense": ".rbr_dense",
    r"\.pointwise": ".rbr_1x1",
    r"\.identity": ".rbr_identity",
    r"\.norm": ".bn",
    r"^head": "linear",
}
_TIMM: _Renames = {
    r"^class_token": "cls_token",
    r"^position_embedding": "pos_embed",
    r"^patch_embedding": "patch_embed.proj",
    r"\.attention\.qkv": ".attn.qkv",
    r"\.attention\.out": ".attn.proj",
    r"\.dense": ".mlp.fc",
}
_HUGGING_FACE: _Renames = {
    r"^class_token": "vit.embeddings.cls_token",
    r"^position_embedding": "vit.embeddings.position_embeddings",
    r"^patch_embedding": "vit.embeddings.patch_embeddings.projection",
    r"^blocks": "vit.encoder.layer",
    r"\.attention\.qkv": ".attention.attention.qkv",
    r"\.attention\.out": ".attention.output.dense",
    r"\.dense1": ".intermediate.dense",
    r"\.dense2": ".output.dense",
    r"\.norm1": ".layernorm_before",
    r"\.norm2": ".layernorm_after",
    r"^norm": "vit.layernorm",
    r"^head": "classifier",
}


def load_checkpoint(
    path: Path | str, *, num_heads: int | None = None, strides: tuple[int, ...] | None = None
) -> Network:
    """Reads a checkpoint of a PyTorch network into the module of the same architecture, in evaluation mode.

    Architecture and sizes are inferred from the names and shapes of the arrays, but for what they do not determine:
    the number of attention heads, and strides. Convolution kernels (features, channels, height, width) are transposed
    to (height, width, channels, features), and kernels of linear layers (features, inputs) to (inputs, features). All
    weights become float32. Images are given to the module as (batch, height, width, channels), normalised as the
    checkpoint's authors say.

    Args:
        path: A file `.safetensors`, or one that `torch.save` wrote (any other suffix), of the network's `state_dict()`
            or of a dictionary with it under "state_dict", "model_state_dict", "model" or "net".
        num_heads: Attention heads of a vision transformer; a 64th of its width unless given.
        strides: Step in pixels of a RepVGG's stem, then of each stage's first block: 2 unless given, as published for
            images of 224 x 224, with a warning where no branch confirms it; (1, 1, 2, 2, 2) for most networks for
            images of 32 x 32.

    Returns:
        A `ResNet`, `RepVGG` or `ViT`, whose attribute `config` holds the sizes.

    Raises:
        OSError: If the file cannot be read.
        ImportError: If the file is PyTorch's, and PyTorch is not installed.
        ValueError: If the file is damaged, holds other Python objects than tensors, is of an unknown architecture, or
            has names or shapes that the architecture does not have; or if `num_heads` or `strides` do not fit the
            network.

    References:
        He, Zhang, Ren, Sun (2016). Deep residual learning for image recognition. arXiv 1512.03385.
        Ding, Zhang, Ma, Han, Ding, Sun (2021). RepVGG: making VGG-style ConvNets great again. arXiv 2101.03697.
        Dosovitskiy et al. (2021). An image is worth 16x16 words: transformers for image recognition at scale. arXiv
        2010.11929.
    """
    path = Path(path)
    arrays = _read(path)
    try:
        make, renames = _infer(arrays, num_heads, strides)
        # Abstract: the initial weights would only be thrown away.
        model = nnx.eval_shape(make)
        _fill(model, arrays, renames | _LEAVES)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    model.eval()
    return model


def main(argv: Sequence[str] | None = None) -> None:
    """Converts a checkpoint to a file that `serialization.load` reads.

    Args:
        argv: Arguments; the command line's unless given.

    Raises:
        SystemExit: With code 2 if an argument or the checkpoint is invalid.
    """
    parser = argparse.ArgumentParser(
        prog="python -m models.convert", description="Converts a checkpoint of a PyTorch network to this folder's form."
    )
    parser.add_argument("checkpoint", type=Path, help="file of a ResNet for CIFAR, a RepVGG or a vision transformer")
    parser.add_argument("out", type=Path, help="file to write, .safetensors")
    parser.add_argument("--num-heads", type=int, metavar="n", help="attention heads (default: width / 64)")
    parser.add_argument("--strides", type=_integers, metavar="n,n,...", help="RepVGG's strides (default: 2,2,2,2,2)")
    parser.add_argument("--merge", action="store_true", help="merge RepVGG's branches into the form for inference")
    args = parser.parse_args(argv)
    if args.out.suffix != ".safetensors" or args.out.resolve() == args.checkpoint.resolve():
        parser.error(
            f"argument out: must be another file than the checkpoint, with suffix .safetensors, got {args.out}"
        )
    try:
        model = load_checkpoint(args.checkpoint, num_heads=args.num_heads, strides=args.strides)
        if args.merge:
            if not isinstance(model, RepVGG):
                raise ValueError(f"argument --merge: only a RepVGG has branches to merge, got a {type(model).__name__}")
            model = merge_branches(model)
        serialization.save(model, args.out)
    except (OSError, ValueError, ImportError) as error:
        parser.error(str(error))
    print(f"{args.out}: {serialization.num_parameters(model):,} parameters, {model.config}")


def _integers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be integers with commas between, got {text!r}") from error


def _read(path: Path) -> dict[str, np.ndarray]:
    if path.suffix == ".safetensors":
        try:
            arrays = load_file(path)
        # AttributeError: numbers of a format that NumPy lacks, such as 8-bit floating point.
        except (SafetensorError, AttributeError) as error:
            raise ValueError(f"{path} is not a safetensors file that NumPy reads, or a damaged one: {error}") from error
    else:
        arrays = _read_torch(path)
    for prefix in ("module.", "_orig_mod.") * 2:
        if all(name.startswith(prefix) for name in arrays):
            arrays = {name.removeprefix(prefix): array for name, array in arrays.items()}
    # jnp's predicate knows bfloat16. Others, such as quantised weights, are left for the check of dtypes.
    return {
        name: array.astype(np.float32) if jnp.issubdtype(array.dtype, jnp.floating) else array
        for name, array in arrays.items()
        if name.rpartition(".")[-1] != "num_batches_tracked"
    }


def _read_torch(path: Path) -> dict[str, np.ndarray]:
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(f"{path} is read by PyTorch, which is not installed; run `pip install torch`") from error
    try:
        tree = torch.load(path, map_location="cpu", weights_only=True)
        for key in ("net", "model", "model_state_dict", "state_dict") * 2:
            if isinstance(tree, dict) and isinstance(tree.get(key), dict):
                tree = tree[key]
        tensors = {name: value for name, value in dict(tree).items() if isinstance(value, torch.Tensor)}
        # NumPy has no bfloat16.
        return {
            str(name): (value.float() if value.is_floating_point() else value).detach().numpy()
            for name, value in tensors.items()
        }
    except OSError:
        raise
    # Damaged files end in errors of many classes.
    except Exception as error:
        raise ValueError(
            f"{path} is damaged, or holds something else than a dictionary of tensors (other Python objects may run "
            "code when they are read); save `model.state_dict()` with `torch.save`"
        ) from error


def _infer(arrays, num_heads, strides) -> tuple[Callable[[], Network], _Renames]:
    """Infers a network's architecture and sizes; returns a function that makes it, and its table of names."""
    network = next((name for name, pattern in _PATTERNS.items() if any(map(re.compile(pattern).match, arrays))), None)
    if network is None:
        names = ", ".join(list(arrays)[:5]) or "none"
        raise ValueError(
            f"unknown architecture; the first names are {names}. Known are torchvision's names of residual networks "
            "(layer1.0.conv1.weight), the authors' of RepVGG (stage1.0.rbr_dense.conv.weight), and timm's "
            "(blocks.0.attn.qkv.weight) and Hugging Face's (vit.encoder.layer.0...) of vision transformers"
        )
    if num_heads is not None and not network.startswith("ViT"):
        raise ValueError(f"num_heads is for vision transformers, got {num_heads} for a {network}; leave it out")
    if strides is not None and network != "RepVGG":
        raise ValueError(f"strides are for RepVGG, got {strides} for a {network}; leave them out")
    if network == "ResNet":
        return _resnet(arrays)
    return _repvgg(arrays, strides) if network == "RepVGG" else _vit(arrays, num_heads, network == "ViT of timm")


def _resnet(arrays):
    head = "linear" if "linear.weight" in arrays else "fc"
    shortcut = "shortcut" if any(".shortcut." in name for name in arrays) else "downsample"
    blocks = _num_blocks(arrays, r"layer(\d+)\.(\d+)\.")
    firsts = [f"layer{stage + 1}.0" for stage in range(len(blocks))]
    projected = {name.partition(f".{shortcut}.")[0] for name in arrays if f".{shortcut}." in name}
    if unknown := sorted(projected - set(firsts[1:])):
        raise ValueError(
            f"{', '.join(unknown[:10])}: has a {shortcut} with weights; `ResNet` has one only in the first block of "
            "each stage but the first, where sizes change"
        )
    config = ResNetConfig(
        blocks,
        tuple(_shape(arrays, f"{first}.conv1.weight", 4)[0] for first in firsts),
        _shape(arrays, "conv1.weight", 4)[1],
        _shape(arrays, f"{head}.weight", 2)[0],
        bool(projected),
    )
    renames = _RESNET | {
        r"\.shortcut\.conv": f".{shortcut}.0",
        r"\.shortcut\.norm": f".{shortcut}.1",
        r"^head": head,
    }
    return lambda: ResNet(config, rngs=nnx.Rngs(0)), renames


def _repvgg(arrays, strides):
    is_merged = any(".rbr_reparam." in name for name in arrays)
    kernel = "rbr_reparam.weight" if is_merged else "rbr_dense.conv.weight"
    blocks = _num_blocks(arrays, r"stage(\d+)\.(\d+)\.")
    firsts = ["stage0", *(f"stage{stage + 1}.0" for stage in range(len(blocks)))]
    shapes = [_shape(arrays, f"{first}.{kernel}", 4) for first in firsts]
    if strides is None and (is_merged or shapes[1][0] != shapes[1][1]):
        warnings.warn(
            f"strides are not given, and nothing in the checkpoint tells them: assuming {(2,) * len(firsts)}, those of "
            "networks for images of 224 x 224; most for 32 x 32 need strides=(1, 1, 2, 2, 2)",
            stacklevel=4,
        )
    strides = (2,) * len(firsts) if strides is None else tuple(strides)
    if len(strides) != len(firsts) or min(strides) < 1:
        raise ValueError(f"strides must be {len(firsts)} positive integers, of stem and stages, got {strides}")
    for first, shape, stride in zip(firsts, shapes, strides, strict=True):
        if is_merged or shape[0] != shape[1]:
            continue
        has_identity = any(name.startswith(f"{first}.rbr_identity.") for name in arrays)
        if has_identity != (stride == 1):
            raise ValueError(
                f"{first} has {'an' if has_identity else 'no'} identity branch (rbr_identity), so its stride is "
                f"{'1' if has_identity else 'not 1'}, got {stride} in strides={strides}; pass the network's strides"
            )
    config = RepVGGConfig(
        blocks,
        tuple(shape[0] for shape in shapes),
        strides,
        shapes[0][1],
        _shape(arrays, "linear.weight", 2)[0],
        is_merged,
    )
    return lambda: RepVGG(config, rngs=nnx.Rngs(0)), _REPVGG


def _vit(arrays, num_heads, is_timm):
    renames = (_TIMM if is_timm else _HUGGING_FACE) | _LEAVES

    def shape(path, ndim):
        return _shape(arrays, _rename(path, renames), ndim)

    width, num_channels, patch_size, _ = shape("patch_embedding.kernel", 4)
    tokens = shape("position_embedding", 3)[1]
    side = math.isqrt(max(tokens - 1, 0))
    if side**2 + 1 != tokens:
        raise ValueError(f"{tokens} position embeddings are not those of a class token and a square of patches")
    if num_heads is None and width % 64:
        raise ValueError(f"num_heads cannot be inferred from a width of {width}, which is no multiple of 64; pass it")
    num_heads = width // 64 if num_heads is None else num_heads
    if num_heads < 1:
        raise ValueError(f"num_heads must be at least 1, got {num_heads}")
    config = ViTConfig(
        image_size=side * patch_size,
        patch_size=patch_size,
        width=width,
        depth=sum(_num_blocks(arrays, r"(blocks)\.(\d+)\." if is_timm else r"vit\.encoder\.(layer)\.(\d+)\.")),
        num_heads=num_heads,
        mlp_width=shape("blocks.0.dense1.kernel", 2)[0],
        num_channels=num_channels,
        num_classes=shape("head.kernel", 2)[0],
        epsilon=1e-6 if is_timm else 1e-12,
    )
    return lambda: ViT(config, rngs=nnx.Rngs(0)), renames


def _num_blocks(arrays, pattern: str) -> tuple[int, ...]:
    """Counts the blocks of each stage. Where indices have gaps, `_fill` reports the missing blocks."""
    blocks = {match.groups() for match in map(re.compile(pattern).match, arrays) if match}
    stages = [stage for stage, _ in blocks]
    return tuple(stages.count(stage) for stage in sorted(set(stages), key=lambda stage: (len(stage), stage)))


def _shape(arrays, name: str, ndim: int) -> tuple[int, ...]:
    if name not in arrays:
        raise ValueError(f"missing: {name}, from which sizes are inferred")
    if arrays[name].ndim != ndim:
        raise ValueError(f"wrong shape: {name} has shape {arrays[name].shape}, must have {ndim} axes")
    return arrays[name].shape


def _fill(model: Network, arrays: dict[str, np.ndarray], renames: _Renames) -> None:
    """Replaces all weights and running averages of a module, which may be abstract, by a checkpoint's."""
    state = nnx.state(model, (nnx.Param, nnx.BatchStat))
    tree = nnx.to_pure_dict(state)
    leaves = {serialization.path_name(key): leaf.shape for key, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    names = {path: _names(path, renames) for path in leaves}
    expected = {
        name: f"float32{_torch_shape(shape, len(names[path]))}"
        for path, shape in leaves.items()
        for name in names[path]
    }
    found = {name: f"{array.dtype}{array.shape}" for name, array in arrays.items()}
    if problems := serialization.compare_names(found, expected):
        raise ValueError(f"does not fit {model.config}; {problems}")

    def weights(key, leaf):
        array = np.concatenate([arrays[name] for name in names[serialization.path_name(key)]])
        if array.ndim == 4:
            array = array.transpose(2, 3, 1, 0)
        return jnp.asarray(array.T if array.ndim == 2 else array)

    nnx.replace_by_pure_dict(state, jax.tree_util.tree_map_with_path(weights, tree))
    nnx.update(model, state)


def _torch_shape(shape: tuple[int, ...], num_parts: int) -> tuple[int, ...]:
    """Converts the shape of an array of our modules to that of PyTorch's, or of each of its parts."""
    if len(shape) in (2, 4):
        shape = (shape[-1], shape[-2], *shape[:-2])
    return (shape[0] // num_parts, *shape[1:])


def _names(path: str, renames: _Renames) -> list[str]:
    """Lists the checkpoint's arrays that are concatenated into one of ours: three for Hugging Face's attention."""
    name = _rename(path, renames)
    if ".attention.attention.qkv." not in name:
        return [name]
    return [name.replace(".qkv.", f".{part}.") for part in ("query", "key", "value")]


def _rename(path: str, renames: _Renames) -> str:
    for pattern, replacement in renames.items():
        path = re.sub(pattern, replacement, path)
    return path


if __name__ == "__main__":
    main()
