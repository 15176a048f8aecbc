"""Classifiers, embedders and rerankers of integer tokens: with a surrogate, and coded after the embedding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxcode as jc
from jaxcode.stragglers import Uniform
from jaxcode.surrogates import distil
from models import datasets, networks
from models.text_encoder import TextEncoder, TextEncoderConfig

K, N, LATE = 8, 12, Uniform(2)
CODE = jc.ReplicationCode(K, N)
RNG = np.random.default_rng(0)
NUM_TOKENS, LENGTH = 40, 10
TABLE = (2 * RNG.normal(size=(NUM_TOKENS, 6))).astype(np.float32)
MIXER = RNG.normal(size=(6, 6)).astype(np.float32)
WEIGHTS = networks.WEIGHTS / "text_encoder-unicode-0.safetensors"
MASKS = np.stack([LATE.sample(jax.random.key(seed), N) for seed in range(20)])


def make_texts(size, length=LENGTH):
    """Makes texts of different lengths. What is under the padding is no zero: only the mask tells."""
    ids = RNG.integers(NUM_TOKENS, size=(size, length))
    return {"ids": ids, "mask": np.arange(length) < RNG.integers(3, length + 1, size=(size, 1))}


def embed_text(text):
    """Reads pairs of neighbours, so that their order counts, of the tokens that the mask shows."""
    embedded = jnp.asarray(TABLE)[text["ids"]] * text["mask"][..., None]
    pairs = jnp.tanh(embedded[:, :-1] + embedded[:, 1:] @ MIXER)
    return jnp.sum(pairs, axis=1) / jnp.sum(text["mask"], axis=1, keepdims=True)


def rerank(pair):
    """Scores a document for a query, one number each."""
    return jnp.sum(embed_text(pair["query"]) * embed_text(pair["document"]), axis=-1)


MODELS = {
    "classifier": (lambda text: 4 * embed_text(text), make_texts, "disagreement"),
    "embedder": (embed_text, make_texts, "squared_error"),
    "reranker": (rerank, lambda size: {"query": make_texts(size, 6), "document": make_texts(size)}, "squared_error"),
}


@pytest.fixture(scope="module", params=MODELS)
def case(request):
    """A model, a surrogate of it, other inputs, and what a bad guess costs."""
    model, make_inputs, loss = MODELS[request.param]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distil, "_MAX_STEPS", 600)
        prior = jc.surrogate(model, make_inputs(1200), cost=30.0, progress=False)
    return model, prior, make_inputs(15 * K + 3), loss


def measure(loss, results, truth):
    """Computes the loss of results, by which one that is lost loses 1."""
    if loss == "disagreement":
        return 1 - float(jc.metrics.agreement(results, truth))
    return float(jnp.mean(jnp.square(results - truth) / jnp.var(truth, axis=0)))


def test_a_surrogate_with_copies_by_risk_loses_less_than_replication(case):
    model, prior, x, loss = case
    predict = jax.jit(jc.coded(model, CODE, prior=prior, stragglers=LATE, loss=loss))
    truth = jax.jit(model)(x)
    np.testing.assert_allclose(predict(x, np.ones(N, bool)), truth, rtol=1e-5, atol=1e-6)
    lost = np.mean([measure(loss, predict(x, mask), truth) for mask in MASKS])
    assert predict._cache_size() == 1
    lost_by_replication = 1 - np.mean([CODE.recovered(mask) for mask in MASKS])
    assert lost < 0.25 * lost_by_replication
    # Tokens that no input had are guessed too.
    unknown = jax.tree.map(lambda leaf: leaf if leaf.dtype == bool else leaf + NUM_TOKENS, x)
    for values in prior.with_risk(unknown):
        assert np.isfinite(values).all()


@pytest.mark.parametrize("case", ["classifier"], indirect=True)
def test_tuning_tries_copies_of_tokens_alone(case):
    model, prior, x, loss = case
    tuned = jc.tune(model, x, K, N, LATE, prior=prior, loss=loss, num_masks=32, progress=False)
    assert {type(candidate.code) for candidate in tuned.candidates} == {jc.ReplicationCode}
    assert (tuned.prior, tuned.stragglers) == (prior, LATE)


@pytest.mark.parametrize("case", ["reranker"], indirect=True)
def test_a_server_answers_requests_of_tokens(case):
    model, prior, x, loss = case
    with jc.pools.ThreadPool(model, num_workers=N) as pool:
        server = jc.CodedServer(CODE, pool, jc.stop.answers(N - 2), prior=prior, stragglers=LATE, loss=loss)
        prediction = server(x)
    truth = np.asarray(model(x))
    np.testing.assert_allclose(prediction.values[prediction.exact], truth[prediction.exact], rtol=1e-5, atol=1e-6)
    assert np.isfinite(prediction.values).all()


def test_codes_that_mix_are_applied_after_the_embedding():
    """Tokens are embedded where they are; coded inputs are mixtures of embeddings, and workers compute the rest."""
    model = TextEncoder(TextEncoderConfig(NUM_TOKENS, LENGTH, 5, width=16, mlp_width=16), rngs=nnx.Rngs(0))
    tokens = RNG.integers(NUM_TOKENS, size=(2 * K + 1, LENGTH))
    predict = jc.coded(model.body, jc.SplineCode.systematic(K, N))

    @jax.jit
    def classify(tokens, returned):
        return predict(model.embed(tokens), returned)

    results = [classify(tokens, mask) for mask in (np.ones(N, bool), *MASKS[:3])]
    assert classify._cache_size() == 1
    np.testing.assert_allclose(results[0], model(tokens), atol=1e-4)
    assert np.isfinite(results).all()
    with pytest.raises(ValueError, match="code the embeddings"):
        jc.coded(model, jc.SplineCode.systematic(K, N))(tokens)


def test_a_mask_is_coded_as_a_bias_of_attention():
    """A mask cannot be mixed, but what is added to the scores of attention can: a mixture masks in part."""
    query = jnp.asarray(RNG.normal(size=6), jnp.float32)

    def embed(text):
        return {"embedded": jnp.asarray(TABLE)[text["ids"]], "bias": jnp.where(text["mask"], 0.0, -20.0)}

    def body(parts):
        weights = jax.nn.softmax(parts["embedded"] @ query + parts["bias"], axis=1)
        return jnp.einsum("bl,blw->bw", weights, parts["embedded"])

    texts = make_texts(2 * K)
    predict = jc.coded(body, jc.SplineCode.systematic(K, N))
    np.testing.assert_allclose(predict(embed(texts)), body(embed(texts)), atol=1e-4)
    assert np.isfinite(predict(embed(texts), MASKS[0])).all()
    with pytest.raises(ValueError, match=r"mask.* has dtype bool; expected real numbers"):
        jc.coded(lambda text: text["mask"], jc.SplineCode.systematic(K, N))({"mask": texts["mask"]})


def test_embeddings_that_are_coded_in_order_lose_less_than_replication():
    data = datasets.load("unicode")
    network = networks.load_or_train("text_encoder", data, "unicode", WEIGHTS)
    texts = data.x_test[:200]
    truth = jax.jit(network)(texts)
    predict = jax.jit(jc.coded(network.body, jc.SplineCode.repeated(K, N), order=jc.ordering.greedy))
    embedded = network.embed(texts)
    lost = [measure("disagreement", predict(embedded, mask), truth) for mask in MASKS[:6]]
    lost_by_replication = 1 - np.mean([CODE.recovered(mask) for mask in MASKS[:6]])
    assert np.mean(lost) < 0.9 * lost_by_replication
