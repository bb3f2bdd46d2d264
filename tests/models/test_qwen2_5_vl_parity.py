"""Qwen2.5-VL and Qwen2.5 against transformers: logits, loss, every gradient; and their own variants against each other.

Tolerance of logits: 2e-5 absolute at scale 3-5, ten times what float32 sums in another order give here.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from helpers import hf_models
from helpers.parity import QUICK, assert_gradients_match, build, forward, loss_and_gradients, torch_sft

from ril_jax.data.packing import VisionRung, pack_prompts

RUNG = VisionRung(patches=360, images=6, image_patches=200)
PROMPT_LEN = 96

CONFIGS = {
    "straight vision blocks, grouped queries, untied": dict(),
    "scanned vision blocks, one key-value head, tied, small windows": dict(
        tie=True,
        text=dict(num_key_value_heads=1, num_hidden_layers=2),
        vision=dict(depth=6, fullatt_block_indexes=[2, 5], window_size=56),
    ),
    "only full vision blocks, as many key-value heads as heads": dict(
        text=dict(num_key_value_heads=4, num_hidden_layers=2, rms_norm_eps=1e-5),
        vision=dict(depth=2, fullatt_block_indexes=[0, 1], window_size=168),
    ),
    "only windows, larger than most images": dict(
        text=dict(num_hidden_layers=1), vision=dict(depth=2, fullatt_block_indexes=[], window_size=168)
    ),
}


def mixed_prompts(seed: int = 0) -> list[hf_models.Prompt]:
    """Images smaller than, as large as and larger than a window; two in a row; none."""
    rng = np.random.default_rng(seed)
    return [
        hf_models.prompt(rng, 5, (6, 8)),
        hf_models.prompt(rng, 7, (10, 18), (4, 4), text_between=0),
        hf_models.prompt(rng, 9),
        hf_models.prompt(rng, 4, (8, 8), (2, 10)),
    ]


def batch_of(prompts, tiny, *, prompt_len=PROMPT_LEN, rung=RUNG):
    rung = rung if tiny.config.vision is not None else None
    return pack_prompts(prompts, tiny.config, batch=len(prompts), prompt_len=prompt_len, rung=rung)


def padded_right(batch, prompts):
    """The same rows with their padding moved from the left to the right."""
    shift = [PROMPT_LEN - len(p.token_ids) for p in prompts]
    roll = lambda x: np.stack([np.roll(row, -s, axis=-1) for row, s in zip(x, shift, strict=True)])  # noqa: E731
    return batch._replace(
        token_ids=roll(batch.token_ids),
        positions=np.stack([roll(axis) for axis in batch.positions]),
        valid=roll(batch.valid),
        feature_index=roll(batch.feature_index),
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_transformers(name, tmp_path):
    tiny = hf_models.save_qwen2_5_vl(tmp_path, **CONFIGS[name])
    network, params = build(tiny)
    prompts = mixed_prompts()
    left = batch_of(prompts, tiny)
    compiled = jax.jit(functools.partial(forward, network))
    ours_left, ours_right = compiled(params, left), compiled(params, padded_right(left, prompts))
    with torch.no_grad():
        as_batch = hf_models.logits(tiny.hf, *prompts).numpy()
    for b, p in enumerate(prompts):
        n = len(p.token_ids)
        with torch.no_grad():
            alone = hf_models.logits(tiny.hf, p)[0].numpy()
        assert np.abs(alone).max() > 1
        np.testing.assert_allclose(ours_left[b, PROMPT_LEN - n :], alone, atol=2e-5, rtol=0)
        np.testing.assert_allclose(ours_left[b, PROMPT_LEN - n :], as_batch[b, -n:], atol=2e-5, rtol=0)
        np.testing.assert_allclose(ours_right[b, :n], alone, atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("tie", "eps"), [(False, 1e-6), (True, 1e-6), (False, 0.1)], ids=["untied", "tied", "an epsilon that shows"]
)
def test_text_only_logits_equal_transformers(tie, eps, tmp_path):
    tiny = hf_models.save_qwen2(tmp_path, tie=tie, rms_norm_eps=eps, num_attention_heads=8, num_key_value_heads=2)
    network, params = build(tiny)
    rng = np.random.default_rng(2)
    prompts = [hf_models.prompt(rng, n) for n in (3, 17, 30)]
    ours = jax.jit(functools.partial(forward, network))(params, batch_of(prompts, tiny, prompt_len=32))
    for b, p in enumerate(prompts):
        with torch.no_grad():
            reference = hf_models.logits(tiny.hf, p)[0].numpy()
        np.testing.assert_allclose(ours[b, 32 - len(p.token_ids) :], reference, atol=2e-5, rtol=0)


@pytest.fixture(scope="module")
def deep_vl(tmp_path_factory):
    """A tied head, and enough vision blocks for the scanned path."""
    folder = tmp_path_factory.mktemp("deep_vl")
    return hf_models.save_qwen2_5_vl(folder, tie=True, text=dict(num_hidden_layers=2), vision=dict(depth=5))


@pytest.fixture(scope="module")
def deep_gradients(deep_vl):
    network, params = build(deep_vl)
    prompts = mixed_prompts(seed=3)
    batch = batch_of(prompts, deep_vl)
    return network, params, prompts, batch, loss_and_gradients(network, params, batch)


def test_loss_and_every_gradient_equal_torch(tiny_vl):
    network, params = build(tiny_vl)
    prompts = mixed_prompts(seed=3)
    loss, gradients = loss_and_gradients(network, params, batch_of(prompts, tiny_vl))
    torch_loss, torch_gradients = torch_sft(tiny_vl.hf, prompts)
    np.testing.assert_allclose(loss, torch_loss, rtol=2e-6)
    assert_gradients_match(network, gradients, torch_gradients)


def test_loss_and_every_gradient_equal_torch_with_scanned_vision_and_tied_head(deep_vl, deep_gradients):
    network, _, prompts, _, (loss, gradients) = deep_gradients
    torch_loss, torch_gradients = torch_sft(deep_vl.hf, prompts)
    np.testing.assert_allclose(loss, torch_loss, rtol=2e-6)
    assert_gradients_match(network, gradients, torch_gradients)


@pytest.mark.parametrize(
    "variant",
    [dict(remat="full"), dict(remat="dots", unroll=True)],
    ids=lambda v: "-".join(f"{k}={x}" for k, x in v.items()),
)
def test_remat_and_unrolled_layers_change_nothing(variant, deep_gradients):
    network, params, _, batch, (loss, gradients) = deep_gradients
    other_loss, other_gradients = loss_and_gradients(network, params, batch, **variant)
    np.testing.assert_allclose(other_loss, loss, rtol=1e-6)
    for name, gradient in gradients.items():
        scale = np.abs(gradient).max()
        np.testing.assert_allclose(other_gradients[name], gradient, atol=1e-5 * scale + 1e-7, rtol=0, err_msg=name)


def test_scanned_vision_blocks_equal_straight_ones(deep_vl):
    network, params = build(deep_vl)
    prompts = mixed_prompts(seed=5)
    vision = batch_of(prompts, deep_vl).vision

    def encode(unroll, params):
        return network.bind(params).encode(vision, dtype=jnp.float32, unroll=unroll)

    features = []
    for unroll in (1, True):
        traced = jax.jit(functools.partial(encode, unroll), compiler_options=QUICK).trace(params)
        assert ("cond[" in str(traced.jaxpr)) == (unroll is not True)
        features.append(np.asarray(traced.lower().compile()(params)))
    num_features = sum(len(im.patches) for p in prompts for im in p.images) // 4
    scanned, straight = (x[:num_features] for x in features)
    np.testing.assert_allclose(scanned, straight, atol=1e-5 * np.abs(straight).max(), rtol=0)


def test_vision_features_do_not_depend_on_their_place_in_the_buffer(tiny_vl):
    network, params = build(tiny_vl)
    prompts = mixed_prompts(seed=6)
    encode = jax.jit(lambda batch: network.bind(params).encode(batch.vision, dtype=jnp.float32))
    forwards, backwards = batch_of(prompts, tiny_vl), batch_of(prompts[::-1], tiny_vl)
    a, b = np.asarray(encode(forwards)), np.asarray(encode(backwards))
    for row in range(len(prompts)):
        index, other = forwards.feature_index[row], backwards.feature_index[-1 - row]
        np.testing.assert_allclose(a[index[index >= 0]], b[other[other >= 0]], atol=1e-5, rtol=0)


def test_group_row_equals_separate_rows(tiny_vl):
    """`[prompt | r1 .. rS]` in one row gives the hidden states of S rows `[prompt | r]`, with ragged responses."""
    network, params = build(tiny_vl)
    rng = np.random.default_rng(7)
    prompts = mixed_prompts(seed=7)
    B, S, R, P = len(prompts), 3, 9, PROMPT_LEN
    batch = batch_of(prompts, tiny_vl)
    responses = rng.integers(10, 280, (B, S, R)).astype(np.int32)
    lengths = rng.integers(1, R + 1, (B, S))
    mask = np.arange(R) < lengths[..., None]
    own_positions = (batch.next_position[:, None, None] + np.arange(R)) * np.ones((B, S, 1), np.int32)

    @jax.jit
    def hidden(params, token_ids, positions, valid, index, num_responses_of_rows):
        model = network.bind(params)
        features = model.encode(batch.vision, dtype=jnp.float32)
        x = model.embed(token_ids, features, index, dtype=jnp.float32)
        S = num_responses_of_rows.shape[0]
        return model.text.rows(x, positions, valid, prompt_len=P, num_responses=S)[0]

    def rows(tokens, own, own_mask):
        """[B', S', R] responses after the prompts of `batch`, each prompt repeated B'/B times."""
        repeat = lambda x, axis=0: np.repeat(x, tokens.shape[0] // B, axis=axis)  # noqa: E731
        flat = lambda x: x.reshape(x.shape[0], -1)  # noqa: E731
        index = np.pad(repeat(batch.feature_index), ((0, 0), (0, flat(tokens).shape[1])), constant_values=-1)
        positions = np.concatenate([repeat(batch.positions, 1), np.stack([flat(own)] * 3)], axis=2)
        token_ids = np.concatenate([repeat(batch.token_ids), flat(tokens)], axis=1)
        valid = np.concatenate([repeat(batch.valid), flat(own_mask)], axis=1)
        return np.asarray(hidden(params, token_ids, positions, valid, index, np.zeros(tokens.shape[1])))

    shared = rows(responses, own_positions, mask)
    apart = rows(*(x.reshape(B * S, 1, R) for x in (responses, own_positions, mask)))
    apart_responses = apart[:, P:].reshape(B, S, R, -1)
    np.testing.assert_allclose(shared[:, P:].reshape(B, S, R, -1)[mask], apart_responses[mask], atol=2e-5, rtol=0)
    apart_prompts = apart[:, :P].reshape(B, S, P, -1)[:, 0]
    np.testing.assert_allclose(shared[:, :P][batch.valid], apart_prompts[batch.valid], atol=2e-5, rtol=0)
    # Against transformers too: a row [prompt | response] is a longer prompt.
    for b, s in ((0, 0), (1, S - 1)):
        p = hf_models.Prompt(
            np.concatenate([prompts[b].token_ids, responses[b, s, : lengths[b, s]]]), prompts[b].images
        )
        with torch.no_grad():
            reference = hf_models.logits(tiny_vl.hf, p)[0, -lengths[b, s] :].numpy()
        ours = network.bind(params).text.logits(apart_responses[b, s, : lengths[b, s]])
        np.testing.assert_allclose(ours, reference, atol=2e-5, rtol=0)
