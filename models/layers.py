"""Defines the building block that the convolutional networks share, and a convolution that trains fast on CPUs."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

_DIMENSIONS = ("NHWC", "HWIO", "NHWC")


class ConvBatchNorm(nnx.Module):
    """Applies a convolution without bias, then batch normalisation.

    Images are padded by half the kernel's size on every side, as PyTorch does it; padding "SAME" differs at stride 2.

    Args:
        in_features: Channels of the input.
        out_features: Channels of the output.
        kernel_size: Height and width of the kernel, odd.
        stride: Step between outputs, in pixels.
        rngs: Flax's random streams, for the initial weights.
    """

    def __init__(self, in_features: int, out_features: int, kernel_size: int = 3, stride: int = 1, *, rngs: nnx.Rngs):
        self.conv = nnx.Conv(
            in_features,
            out_features,
            (kernel_size, kernel_size),
            stride,
            padding=kernel_size // 2,
            use_bias=False,
            kernel_init=nnx.initializers.he_normal(),
            conv_general_dilated=convolution,
            rngs=rngs,
        )
        self.norm = nnx.BatchNorm(out_features, momentum=0.9, epsilon=1e-5, rngs=rngs)

    def __call__(self, x: Float[Array, "batch height width channels"]) -> Float[Array, "batch height width channels"]:
        """Computes the features of a batch, at 1/stride of its height and width, in its dtype."""
        # Running averages are float32 and would widen what follows.
        return self.norm(self.conv(x)).astype(x.dtype)


def make_stages(
    make_block: Callable[[int, int, int], nnx.Module],
    in_features: int,
    blocks: Sequence[int],
    widths: Sequence[int],
    strides: Sequence[int],
) -> nnx.List:
    """Makes stages of blocks; the first block of each stage changes sizes.

    Args:
        make_block: From channels of the input, channels of the output and stride to a block.
        in_features: Channels of the first stage's input.
        blocks: Blocks of each stage.
        widths: Channels of each stage.
        strides: Step in pixels of each stage's first block.

    Returns:
        The stages, each a list of its blocks.
    """
    stages = nnx.List()
    for num_blocks, width, stride in zip(blocks, widths, strides, strict=True):
        stage = nnx.List()
        for index in range(num_blocks):
            stage.append(make_block(in_features, width, stride if index == 0 else 1))
            in_features = width
        stages.append(stage)
    return stages


def convolution(
    x: Array,
    kernel: Array,
    strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    *,
    dimension_numbers: lax.ConvGeneralDilatedDimensionNumbers = _DIMENSIONS,
    precision: lax.PrecisionLike = None,
    **options,
) -> Array:
    """Computes `jax.lax.conv_general_dilated`, whose gradient with respect to the kernel is made faster on CPUs.

    XLA's own gradient with respect to a small kernel leaves the caches of a CPU where images are large, and takes
    several times as long as one that is summed over small groups of images. Convolutions with equal strides that pad by
    half of an odd kernel have the faster one, on CPUs; all others, and all other devices, XLA's.

    Args:
        x: Images, (batch, height, width, channels) unless `dimension_numbers` says otherwise.
        kernel: Kernel, (height, width, channels, features).
        strides: Steps between outputs, in pixels.
        padding: Pixels added before and after each of height and width, or a name.
        dimension_numbers: As for `jax.lax.conv_general_dilated`.
        precision: As for `jax.lax.conv_general_dilated`.
        **options: Further arguments of `jax.lax.conv_general_dilated`.

    Returns:
        Features, (batch, rows, columns, features).
    """
    numbers = lax.conv_dimension_numbers(x.shape, kernel.shape, dimension_numbers)
    is_plain = numbers == lax.conv_dimension_numbers(x.shape, kernel.shape, _DIMENSIONS) and all(
        value in (None, 1, (1, 1)) for value in options.values()
    )
    is_centred = len(set(strides)) == 1 and tuple(map(tuple, padding)) == tuple(
        (size // 2, size // 2) for size in kernel.shape[:2] if size % 2
    )
    if jax.default_backend() == "cpu" and is_plain and is_centred:
        return _centred_convolution(strides[0], precision, x, kernel)
    return lax.conv_general_dilated(
        x, kernel, strides, padding, dimension_numbers=dimension_numbers, precision=precision, **options
    )


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _centred_convolution(stride, precision, x, kernel):
    padding = [(size // 2, size // 2) for size in kernel.shape[:2]]
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, dimension_numbers=_DIMENSIONS, precision=precision
    )


@functools.partial(_centred_convolution.defjvp, symbolic_zeros=True)
def _centred_convolution_jvp(stride, precision, primals, tangents):
    (x, kernel), (x_tangent, kernel_tangent) = primals, tangents
    y = _centred_convolution(stride, precision, x, kernel)
    y_tangent = jnp.zeros_like(y)
    if not isinstance(x_tangent, jax.custom_derivatives.SymbolicZero):
        y_tangent = _centred_convolution(stride, precision, x_tangent, kernel)
    if not isinstance(kernel_tangent, jax.custom_derivatives.SymbolicZero):
        y_tangent += _multiply_patches(stride, precision, x, kernel_tangent)
    return y, y_tangent


def _multiply_patches(stride, precision, x, kernel):
    """Computes a convolution as products of patches of images and the kernel, whose transpose stays in the caches.

    Groups have as many images as fit a matrix of 256 patches: fewer are multiplied more slowly, more leave the caches.
    """
    batch, height, width, _ = x.shape
    rows, columns, _, out_features = kernel.shape
    out_height, out_width = -(-height // stride), -(-width // stride)
    num_pixels = out_height * out_width
    num_images = max(n for n in range(1, batch + 1) if batch % n == 0 and (n == 1 or n * num_pixels <= 256))
    padded = jnp.pad(x, ((0, 0), (rows // 2, rows // 2), (columns // 2, columns // 2), (0, 0)))
    # Gradients with respect to the kernel are summed over groups, in float32.
    matrix = kernel.reshape(-1, out_features).astype(jnp.float32)

    # Patches are formed again for the gradient: stored, they would be larger than the images by the kernel's size.
    @jax.checkpoint
    def multiply(matrix, group):
        shifted = [
            group[:, i : i + stride * out_height : stride, j : j + stride * out_width : stride]
            for i in range(rows)
            for j in range(columns)
        ]
        patches = jnp.concatenate(shifted, axis=-1).reshape(num_images * num_pixels, -1)
        return jnp.matmul(patches, matrix, precision=precision, preferred_element_type=jnp.float32).astype(x.dtype)

    groups = padded.reshape(batch // num_images, num_images, *padded.shape[1:])
    _, products = lax.scan(lambda _, group: (None, multiply(matrix, group)), None, groups)
    return products.reshape(batch, out_height, out_width, out_features)
