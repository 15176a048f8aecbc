import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxcode as jc
from models import datasets, networks, serialization
from models.convnet import ConvNet
from models.layers import convolution
from models.lenet5 import LeNet5
from models.repvgg import RepVGG, RepVGGConfig
from models.resnet import ResNet, ResNetConfig
from models.serialization import num_parameters
from models.training import Recipe, fit
from models.vit import ViT, ViTConfig

SMALL = {
    "convnet": lambda rngs: ConvNet(3, rngs=rngs),
    "resnet": lambda rngs: ResNet(ResNetConfig((1, 1), (4, 8)), rngs=rngs),
    "resnet, projections": lambda rngs: ResNet(ResNetConfig((1, 1), (4, 8), projects=True), rngs=rngs),
    "repvgg": lambda rngs: RepVGG(RepVGGConfig((1, 2), (4, 4, 8), (1, 1, 2), num_classes=10), rngs=rngs),
    "repvgg, merged": lambda rngs: RepVGG(
        RepVGGConfig((1, 2), (4, 4, 8), (1, 1, 2), num_classes=10, is_merged=True), rngs=rngs
    ),
    "vit": lambda rngs: ViT(ViTConfig(8, 4, 16, 2, 2, 32, num_classes=10), rngs=rngs),
    "vit, mean of tokens": lambda rngs: ViT(
        ViTConfig(8, 4, 16, 2, 2, 32, num_classes=10, has_class_token=False), rngs=rngs
    ),
}


def images(size=3, side=8, seed=0):
    return jnp.asarray(np.random.default_rng(seed).random((size, side, side, 3)), jnp.float32)


@pytest.fixture(scope="module", params=SMALL)
def network(request):
    """A network whose running averages have moved."""
    model = SMALL[request.param](nnx.Rngs(0))
    model.train()
    nnx.jit(lambda model, x: model(x))(model, images(8))
    model.eval()
    return model


def test_a_coded_network_gives_its_answers(network):
    logits = network(images())
    assert logits.shape == (3, 10)
    predict = jc.coded(network, jc.SplineCode.repeated(3, 6))
    np.testing.assert_allclose(predict(images(), np.arange(6) > 0), logits, atol=1e-4)


def test_jacobians_are_the_same_in_both_modes(network):
    predict = jc.coded(network, jc.SplineCode.repeated(2, 4))
    x = images(2)

    def scale(factor):
        return predict(factor * x).sum(axis=0)

    np.testing.assert_allclose(jax.jacfwd(scale)(1.0), jax.jacrev(scale)(1.0), rtol=1e-3, atol=1e-4)


def test_convolutions_and_products_have_the_precision_of_parameters(network):
    graph, params, rest = nnx.split(network, nnx.Param, ...)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    jaxpr = jax.make_jaxpr(lambda x: nnx.merge(graph, params, rest)(x))(images().astype(jnp.bfloat16))
    products = list(_equations(jaxpr.jaxpr, ("conv_general_dilated", "dot_general")))
    assert len(products) >= 3
    assert {variable.aval.dtype for equation in products for variable in equation.invars} == {jnp.dtype("bfloat16")}


def _equations(jaxpr, names):
    for equation in jaxpr.eqns:
        if equation.primitive.name in names:
            yield equation
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from _equations(inner, names)


def test_images_of_a_batch_are_independent_in_evaluation(network):
    x = images(4)
    np.testing.assert_allclose(network(x)[:1], network(x[:1]), atol=1e-5)


def test_saved_weights_are_loaded_bit_for_bit(network, tmp_path):
    path = tmp_path / "new" / "weights.safetensors"
    serialization.save(network, path)
    graph, state = nnx.split(network)
    other = nnx.merge(graph, jax.tree.map(jnp.zeros_like, state))
    serialization.load(other, path)
    logits = [jax.jit(lambda x, model=model: model(x))(images()) for model in (network, other)]
    np.testing.assert_array_equal(*logits)
    with pytest.raises(ValueError, match=r"does not fit LeNet5; missing: conv1\.bias"):
        serialization.load(LeNet5(rngs=nnx.Rngs(0)), path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"weights\.safetensors is damaged"):
        serialization.load(other, path)


def _count(make):
    return num_parameters(nnx.eval_shape(make))


@pytest.mark.parametrize(
    ("make", "num"),
    [
        # The counts of the papers, of torchvision's and of timm's models, with as many classes.
        (lambda: ResNet(ResNetConfig.resnet20(), rngs=nnx.Rngs(0)), 269_722),
        (lambda: ResNet(ResNetConfig.resnet56(), rngs=nnx.Rngs(0)), 853_018),
        (lambda: RepVGG(RepVGGConfig.a0(is_merged=True), rngs=nnx.Rngs(0)), 8_309_384),
        (lambda: RepVGG(RepVGGConfig.a1(is_merged=True), rngs=nnx.Rngs(0)), 12_789_864),
        (lambda: RepVGG(RepVGGConfig.a2(is_merged=True), rngs=nnx.Rngs(0)), 25_499_944),
        (lambda: ViT(ViTConfig.small16(), rngs=nnx.Rngs(0)), 22_050_664),
        (lambda: ViT(ViTConfig.base16(), rngs=nnx.Rngs(0)), 86_567_656),
        (lambda: ConvNet(rngs=nnx.Rngs(0)), 94_186),
    ],
)
def test_the_number_of_parameters_is_the_published_one(make, num):
    assert _count(make) == num


def test_networks_refuse_the_other_kind_of_inputs():
    digits, unicode = (datasets.load(name) for name in ("digits", "unicode"))
    with pytest.raises(ValueError, match="text_encoder takes no images; expected one of lenet5, convnet"):
        networks.make("text_encoder", digits, seed=0)
    with pytest.raises(ValueError, match="lenet5 takes no texts; expected one of text_encoder"):
        networks.make("lenet5", unicode, seed=0)
    with pytest.raises(ValueError, match=r"texts of 40 tokens, got shape \(1, 39\)"):
        networks.make("text_encoder", unicode, seed=0)(unicode.x_test[:1, :39])
    with pytest.raises(ValueError, match="shift, mirror and mixup are for images, got 2, False and"):
        fit(networks.make("text_encoder", unicode, seed=0), unicode, Recipe(1, shift=2))


@pytest.mark.parametrize(("name", "dataset"), [("convnet", "mnist"), ("resnet20", "cifar10"), ("repvgg_a0", "cifar10")])
def test_networks_are_made_by_name(name, dataset):
    shape = {"mnist": (28, 28, 1), "cifar10": (32, 32, 3)}[dataset]
    model = nnx.eval_shape(lambda: networks.NETWORKS[name](shape, 10, nnx.Rngs(0)))
    graph, state = nnx.split(model)
    logits = jax.eval_shape(lambda state, x: nnx.merge(graph, state)(x), state, jnp.zeros((2, *shape)))
    assert logits.shape == (2, 10)
    assert networks.recipe(name, dataset).epochs > 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ViTConfig.tiny(patch_size=5), "image_size must be a multiple of patch_size, got 32 and 5"),
        (lambda: ViTConfig(8, 4, 16, 2, 5, 32), "num_heads must divide width, got 5 and 16"),
        (lambda: ViTConfig(8, 4, 16, 2, 0, 32), "num_heads must be at least 1, got 0"),
        (lambda: ResNetConfig((3, 3)), r"widths must have an entry for each of the 2 stages.*got \(16, 32, 64\)"),
        (lambda: ResNetConfig((1, 1), (8, 4)), r"widths must not decrease unless projects=True, got \(8, 4\)"),
        (lambda: RepVGGConfig((1, 1), (4, 4), (1, 2, 2)), "widths and strides must have an entry for the stem and"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_transformer_refuses_images_of_another_size():
    model = SMALL["vit"](nnx.Rngs(0))
    for side in (4, 10, 16):
        with pytest.raises(ValueError, match=rf"images of 8 x 8, got shape \(3, {side}, {side}, 3\)"):
            model(images(side=side))


@pytest.mark.parametrize(
    ("size", "stride", "padding"), [(3, 1, 1), (1, 1, 0), (5, 1, 2), (3, 2, 1), (1, 2, 0), (3, 1, 0)]
)
def test_the_faster_gradient_is_xlas(size, stride, padding):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(8, 8, 6, 3)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(size, size, 3, 4)), jnp.float32)
    numbers = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}
    arguments = ((stride, stride), [(padding, padding)] * 2)
    results = []
    for convolve in (convolution, jax.lax.conv_general_dilated):

        def apply(*args, f=convolve):
            return f(*args, *arguments, **numbers)

        value, pullback = jax.vjp(apply, x, kernel)
        _, tangent = jax.jvp(apply, (x, kernel), (jnp.cos(x), jnp.sin(kernel)))
        one_by_one = jax.vmap(lambda x, f=apply: jax.grad(lambda kernel: jnp.sum(f(x[None], kernel) ** 2))(kernel))
        results.append((value, *pullback(jnp.cos(value)), tangent, one_by_one(x)))
    for ours, expected in zip(*results, strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"feature_group_count": 2},
        {"rhs_dilation": (2, 2)},
        {"lhs_dilation": (2, 2)},
        {"dimension_numbers": ("NHWC", "HWOI", "NHWC")},
        {"preferred_element_type": jnp.float64},
    ],
)
def test_other_options_of_convolutions_are_xlas(options):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 6, 6, 4)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(3, 3, 2 if "feature_group_count" in options else 4, 4)), jnp.float32)
    options = {"dimension_numbers": ("NHWC", "HWIO", "NHWC"), **options}
    with jax.enable_x64(True):
        found, expected = (
            convolve(x, kernel, (1, 1), [(1, 1)] * 2, **options)
            for convolve in (convolution, jax.lax.conv_general_dilated)
        )
    np.testing.assert_array_equal(found, expected)
    assert found.dtype == expected.dtype
