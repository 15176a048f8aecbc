"""Measures encoding and decoding without a model: E5, their time, and E9, pictures of coded inputs."""

import time

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float64
from matplotlib.figure import Figure

import jaxcode as jc

from ..plots import COLORS, draw_mosaic, tidy
from .results import Finding, Result

# N, K, S, the shape of an input and the classes of the paper's three networks.
_SIZES = {
    "LeNet5 on MNIST": (100, 20, 60, (28, 28, 1), 10),
    "RepVGG on CIFAR-10": (60, 20, 20, (32, 32, 3), 10),
    "ViT-base on ImageNet-1K": (20, 8, 3, (224, 224, 3), 1000),
}
_COLORS = {"LeTCC": COLORS["letcc"], "BACC": COLORS["bacc"]}


def e5(is_quick: bool, seed: int) -> Result:
    """Measures the time that encoding and decoding one request take."""
    findings, rows = [], []
    figure = Figure(figsize=(5 * len(_SIZES), 3.8), layout="constrained")
    for axes, (name, sizes) in zip(figure.subplots(1, len(_SIZES)), _SIZES.items(), strict=True):
        num_workers, num_data, *_ = sizes
        times = _milliseconds(*sizes, repeats=10 if is_quick else 200, seed=seed)
        for i, (scheme, values) in enumerate(times.items()):
            encoding, decoding = np.median(values, axis=0)
            axes.barh(i, encoding, color=_COLORS[scheme])
            axes.barh(i, decoding, left=encoding, color=_COLORS[scheme], alpha=0.5)
            rows += [
                (name, num_workers, num_data, scheme, part, *map(float, np.quantile(values[:, j], (0.5, 0.25, 0.75))))
                for j, part in enumerate(("encode", "decode"))
            ]
        ratio, low, high = np.quantile(times["LeTCC"].sum(axis=1) / times["BACC"].sum(axis=1), (0.5, 0.25, 0.75))
        texts = [f"{scheme} {np.median(values.sum(axis=1)):.2f} ms" for scheme, values in times.items()]
        findings.append(
            Finding(
                f"encode and decode, {name}, (N, K, S) = {sizes[:3]}",
                "on par with BACC",
                f"{', '.join(texts)}: {ratio:.2f} times (quartiles {low:.2f} to {high:.2f})",
                "jitted calls, in turns; the encoder's matrix is part of the program, the decoder's is computed for "
                "new stragglers every time; no smoothing",
            )
        )
        axes.set(xlabel="milliseconds a request", title=f"{name}\n(N, K, S) = {sizes[:3]}")
        axes.set_yticks(range(len(times)), list(times))
        tidy(axes)
    columns = ("sizes_of", "num_workers", "num_data", "scheme", "part", "median_ms", "quartile_1_ms", "quartile_3_ms")
    figure.suptitle("encode (full colour), then decode")
    return Result("E5", "Time to encode and decode", tuple(findings), columns, rows, figure)


def _milliseconds(
    num_workers: int,
    num_data: int,
    num_stragglers: int,
    shape: tuple[int, ...],
    num_classes: int,
    *,
    repeats: int,
    seed: int,
) -> dict[str, Float64[np.ndarray, "repeats 2"]]:
    """Times encoding and decoding by both codes, in turns, each decoding with new stragglers."""
    keys = jax.random.split(jax.random.key(seed), 3)
    inputs = jax.random.uniform(keys[0], (num_data, *shape))
    answers = jax.random.uniform(keys[1], (num_workers, num_classes))
    sample = jax.vmap(lambda key: jc.stragglers.Uniform(num_stragglers).sample(key, num_workers=num_workers))
    masks = list(sample(jax.random.split(keys[2], repeats + 1)))
    calls = {}
    for scheme, make in (("LeTCC", jc.SplineCode), ("BACC", jc.BerrutCode)):
        code = make.chebyshev(num_data=num_data, num_workers=num_workers)
        calls[scheme] = jax.jit(code.encode), jax.jit(code.decode)
    times = {scheme: np.zeros((repeats + 1, 2)) for scheme in calls}
    for i, mask in enumerate(masks):
        for scheme, (encode, decode) in calls.items():
            for j, call in enumerate((lambda f=encode: f(inputs), lambda f=decode, mask=mask: f(answers, mask))):
                start = time.perf_counter()
                jax.block_until_ready(call())
                times[scheme][i, j] = 1000 * (time.perf_counter() - start)
    # The first call compiles.
    return {scheme: values[1:] for scheme, values in times.items()}


def e9(images: Float[np.ndarray, "images height width channels"], dataset: str) -> Result:
    """Draws coded inputs of LeTCC and BACC, and measures how rough they are.

    Args:
        images: Images of the request, in their order; the first 30 are used.
        dataset: Their name.
    """
    num_workers, num_data = 70, 30
    size = {"num_data": num_data, "num_workers": num_workers}
    inputs = jnp.asarray(images[:num_data])
    codes = {"LeTCC": jc.SplineCode.chebyshev(**size), "BACC": jc.BerrutCode.chebyshev(**size)}
    coded = {"inputs": inputs} | {name: code.encode(inputs) for name, code in codes.items()}
    columns = 14
    heights = [-(-len(pictures) // columns) for pictures in coded.values()]
    figure = Figure(figsize=(columns * 0.75, sum(heights) * 0.75 + 1.5), layout="constrained")
    measured = {}
    low, high = min(map(jnp.min, coded.values())), max(map(jnp.max, coded.values()))
    for axes, (name, pictures), rows in zip(
        figure.subplots(3, 1, height_ratios=heights), coded.items(), heights, strict=True
    ):
        # All in one range, since what is darker or lighter than any input is what the figure is about.
        draw_mosaic(axes, (np.asarray(pictures) - low) / (high - low), rows, columns)
        measured[name] = _roughness(np.asarray(pictures, np.float64))
        label = f"{num_data} inputs" if name == "inputs" else f"{num_workers} coded inputs of {name}"
        axes.set_title(f"{label}; column by column, one range of greys for all", loc="left", fontsize=10)
    findings = [
        Finding(
            f"coded images of {name}, {dataset}, (N, K) = {num_workers, num_data}",
            published,
            f"{_share_of_far_inputs(codes[name]):.0%} of the weights are those of other inputs than the four nearest; "
            f"mean squared step between pixels {np.mean(measured[name]) / np.mean(measured['inputs']):.2f} times the "
            f"inputs'; pixels from {np.min(coded[name]):.2f} to {np.max(coded[name]):.2f}, inputs' from 0 to 1",
            "weights fall exponentially with the distance of nodes"
            if name == "LeTCC"
            else "weights fall as the reciprocal of the distance, with alternating signs: faint traces of every input",
        )
        for name, published in (("LeTCC", "no high-frequency noise"), ("BACC", "high-frequency noise"))
    ]
    rows = [(name, i, float(value)) for name, values in measured.items() for i, value in enumerate(values)]
    return Result("E9", "Coded inputs", tuple(findings), ("images", "index", "roughness"), rows, figure)


def _share_of_far_inputs(code: jc.InterpolatingCode) -> float:
    """Computes the share of absolute encoder weights that are not those of the four inputs nearest to a worker."""
    weights = abs(np.asarray(code.encoder_matrix()))
    distance = abs(np.asarray(code.nodes.workers)[:, None] - np.asarray(code.nodes.data))
    rank = np.argsort(np.argsort(distance, axis=1), axis=1)
    return float(weights[rank >= 4].sum() / weights.sum())


def _roughness(images: Float64[np.ndarray, "images height width channels"]) -> Float64[np.ndarray, "images"]:
    """Computes the mean squared difference between neighbouring pixels."""
    vertical, horizontal = (np.mean(np.diff(images, axis=axis) ** 2, axis=(1, 2, 3)) for axis in (1, 2))
    return vertical + horizontal
