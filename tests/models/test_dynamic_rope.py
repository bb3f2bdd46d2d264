"""Dynamic NTK scaling against transformers, on both sides of `max_position_embeddings`, which is 24 here.

transformers keeps the longest length it has seen; a call with one token makes it forget.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from helpers import hf_internvl, hf_models
from helpers.hf_internvl import pack
from helpers.parity import build, forward

from ril_jax.data.packing import ResponseBatch
from ril_jax.models.parameters import Network
from ril_jax.models.rows import response_logprobs
from ril_jax.models.vlm import VisionLanguageModel
from ril_jax.sampling.logits import SamplingParams
from ril_jax.sampling.sampler import Sampler

LIMIT, PROMPT_LEN, MAX_TOKENS = 24, 48, 20


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Its theta is small, and its factor large, so that what scaling does is plain to see."""
    text = dict(
        max_position_embeddings=LIMIT, rope_parameters=dict(rope_type="dynamic", factor=4.0, rope_theta=100.0)
    )  # fmt: skip
    return hf_internvl.save_internvl(tmp_path_factory.mktemp("dynamic"), text=text)


@pytest.fixture(scope="module")
def prompts():
    """10 tokens, as many as the limit, one more, twice as many, and 36 with an image."""
    rng = np.random.default_rng(0)
    text = [hf_internvl.prompt(rng, n) for n in (10, LIMIT, LIMIT + 1, 2 * LIMIT)]
    return [*text, hf_internvl.prompt(rng, 19, 3)]


@pytest.fixture(scope="module")
def batch(prompts):
    return pack(prompts, prompt_len=PROMPT_LEN, tiles=4)


def forgetful(hf):
    with torch.no_grad():
        hf(input_ids=torch.tensor([[1]]))
    return hf


def test_logits_of_rows_below_and_beyond_the_limit_equal_transformers(tiny, prompts, batch):
    network, params = build(tiny)
    ours = jax.jit(functools.partial(forward, network))(params, batch)
    for b, p in enumerate(prompts):
        with torch.no_grad():
            reference = hf_models.logits(forgetful(tiny.hf), p)[0].numpy()
        np.testing.assert_allclose(ours[b, PROMPT_LEN - len(p.token_ids) :], reference, atol=2e-5, rtol=0)


def test_it_is_in_effect_beyond_the_limit_and_nowhere_else(tiny, prompts, batch):
    network, params = build(tiny)
    text = dataclasses.replace(tiny.config.text, rope_dynamic_factor=None)
    plain = Network(lambda: VisionLanguageModel(dataclasses.replace(tiny.config, text=text)))
    scaled, unscaled = (np.asarray(jax.jit(functools.partial(forward, n))(params, batch)) for n in (network, plain))
    for b, p in enumerate(prompts):
        row = slice(PROMPT_LEN - len(p.token_ids), None)
        difference = np.abs(scaled[b, row] - unscaled[b, row]).max()
        assert (difference == 0) if len(p.token_ids) <= LIMIT else (difference > 1e-2)


@pytest.fixture(scope="module")
def greedy(tiny, batch):
    network, params = build(tiny)
    sampler = Sampler(network, (hf_models.VOCAB - 1,), hf_models.PAD)
    features = sampler.encode(params, batch.vision)
    keys = jax.random.split(jax.random.PRNGKey(0), len(batch.token_ids))
    sampling = SamplingParams(temperature=0.0)
    return sampler(params, batch, features, keys, num_samples=1, max_tokens=MAX_TOKENS, sampling=sampling), features


def test_greedy_across_the_limit_equals_generate_token_for_token(tiny, prompts, greedy):
    out, _ = greedy
    ids, mask = np.asarray(out.token_ids), np.asarray(out.mask)
    for b, p in enumerate(prompts):
        reference = hf_models.generate(
            forgetful(tiny.hf), p, max_new_tokens=MAX_TOKENS, eos_token_ids=[hf_models.VOCAB - 1]
        )
        np.testing.assert_array_equal(ids[b, 0][mask[b, 0]], reference)


def test_rows_of_training_have_the_log_probabilities_of_sampling(tiny, batch, greedy):
    """Two responses a row, one cut short of the limit: what a response sees does not depend on the others."""
    network, params = build(tiny)
    out, features = greedy
    ids = np.repeat(np.asarray(out.token_ids), 2, axis=1)
    mask = np.repeat(np.asarray(out.mask), 2, axis=1)
    mask[:, 0, 5:] = False
    logprobs, _ = jax.jit(
        lambda p: response_logprobs(network.bind(p), batch, ResponseBatch(ids, mask), features, dtype=jnp.float32)
    )(params)
    sampled = np.repeat(np.asarray(out.logprobs), 2, axis=1)
    np.testing.assert_allclose(np.asarray(logprobs)[mask], sampled[mask], atol=2e-5, rtol=0)
