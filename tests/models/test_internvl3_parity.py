"""InternVL3 with both kinds of vision tower against transformers: features, logits, loss, gradients, greedy tokens.

Tolerance of logits: 2e-5 absolute at scale 4-5, four times what float32 sums in another order give here.
"""

import copy
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from helpers import hf_internvl, hf_models
from helpers.hf_internvl import KIND_6B, KIND_300M, pack
from helpers.parity import QUICK, assert_gradients_match, build, forward, gradients_by_name, loss_and_gradients

from ril_jax.data.packing import TileRung, pack_prompts
from ril_jax.models.internvl3 import TileInputs, bicubic_matrix
from ril_jax.models.parameters import cast
from ril_jax.sampling.logits import SamplingParams
from ril_jax.sampling.sampler import Sampler

PROMPT_LEN, TILES = 64, 11
MODELS = {
    "InternViT-300M": dict(vision=KIND_300M),
    "InternViT-6B, tied head": dict(vision=KIND_6B, tie=True),
    "fewer patches than positions": dict(vision=KIND_300M | dict(image_size=[84, 84])),
    "more patches than positions, groups of four": dict(
        vision=KIND_6B | dict(image_size=[28, 28]), text=dict(num_key_value_heads=1)
    ),
    "plain rotary positions, sixteen patches a token": dict(
        downsample_ratio=0.25, text=dict(rope_parameters=dict(rope_type="default", rope_theta=1e4))
    ),
}
KINDS = ["InternViT-300M", "InternViT-6B, tied head"]


def mixed_prompts(seed: int = 0, merge: int = 4) -> list[hf_models.Prompt]:
    """Images of one tile and of several, two in a row, and none; 9 tiles in all."""
    rng = np.random.default_rng(seed)
    prompt = functools.partial(hf_internvl.prompt, merge=merge)
    return [prompt(rng, 5, 1), prompt(rng, 7, 3, 2, text_between=0), prompt(rng, 9), prompt(rng, 4, 2, 1)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The models by name, each built once."""
    return functools.cache(lambda name: hf_internvl.save_internvl(tmp_path_factory.mktemp("internvl"), **MODELS[name]))


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_transformers(name, tiny):
    model = tiny(name)
    network, params = build(model)
    prompts = mixed_prompts(merge=model.config.vision.merge_unit)
    ours = jax.jit(functools.partial(forward, network))(params, pack(prompts, prompt_len=PROMPT_LEN, tiles=TILES))
    for b, p in enumerate(prompts):
        with torch.no_grad():
            reference = hf_models.logits(model.hf, p)[0].numpy()
        assert np.abs(reference).max() > 1
        np.testing.assert_allclose(ours[b, PROMPT_LEN - len(p.token_ids) :], reference, atol=2e-5, rtol=0)


def test_what_is_packed_by_hand_here_is_what_packing_makes(tiny):
    prompts = mixed_prompts()
    by_hand = pack(prompts, prompt_len=PROMPT_LEN, tiles=TILES)
    packed = pack_prompts(
        prompts, tiny(KINDS[0]).config, batch=len(prompts), prompt_len=PROMPT_LEN, rung=TileRung(tiles=TILES)
    )
    np.testing.assert_array_equal(packed.vision.patches[:9], by_hand.vision.patches[:9])
    for name in set(packed._fields) - {"vision"}:
        np.testing.assert_array_equal(getattr(packed, name), getattr(by_hand, name), err_msg=name)


def test_rows_of_text_need_no_tiles(tiny):
    model = tiny(KINDS[0])
    network, params = build(model)
    prompts = [mixed_prompts()[2]]
    ours = jax.jit(functools.partial(forward, network))(params, pack(prompts, prompt_len=PROMPT_LEN))
    with torch.no_grad():
        reference = hf_models.logits(model.hf, *prompts)[0].numpy()
    np.testing.assert_allclose(ours[0, -len(reference) :], reference, atol=2e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [56, 140])
def test_features_of_tiles_equal_transformers(kind, size, tiny):
    """140 pixels a side are 25 tokens, and 100 patches for a table of 16 positions."""
    model = tiny(kind)
    network, params = build(model)
    prompt = hf_internvl.prompt(np.random.default_rng(4), 3, 2, 3, size=size)
    inputs = TileInputs(np.concatenate([image.patches for image in prompt.images]))
    ours = jax.jit(lambda p: network.bind(p).encode(inputs, dtype=jnp.float32))(params)
    with torch.no_grad():
        pixels = hf_models.inputs(prompt)["pixel_values"]
        reference = model.hf.model.get_image_features(pixels, return_dict=True).pooler_output.flatten(0, 1).numpy()
    assert len(reference) == 5 * model.config.vision.tile_tokens(size, size)
    np.testing.assert_allclose(ours, reference, atol=1e-5 * np.abs(reference).max(), rtol=0)


SHRUNK = {
    "norms of blocks": {"embeddings": 1e-3},
    "norms of queries and keys": {"q_proj": 1e-3, "k_proj": 1e-3},
    "norm of the projector": {"embeddings": 1e-2, "lambda": 0.0},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("part", SHRUNK)
def test_every_epsilon_is_that_of_transformers(part, kind, tiny, tmp_path):
    """With weights so small that what a norm divides by is about as small as its epsilon."""
    hf = copy.deepcopy(tiny(kind).hf)
    with torch.no_grad():
        for name, parameter in hf.model.vision_tower.named_parameters():
            for pattern, factor in SHRUNK[part].items():
                if pattern in name:
                    parameter *= factor
        hf.save_pretrained(tmp_path)
        prompt = hf_internvl.prompt(np.random.default_rng(4), 3, 3)
        pixels = hf_models.inputs(prompt)["pixel_values"]
        reference = hf.model.get_image_features(pixels, return_dict=True).pooler_output.flatten(0, 1).numpy()
    network, params = build(dataclasses.replace(tiny(kind), folder=tmp_path))
    inputs = TileInputs(prompt.images[0].patches)
    ours = jax.jit(lambda p: network.bind(p).encode(inputs, dtype=jnp.float32), compiler_options=QUICK)(params)
    np.testing.assert_allclose(ours, reference, atol=1e-5 * np.abs(reference).max(), rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_features_in_bfloat16_are_those_in_float32_but_for_rounding(kind, tiny):
    network, params = build(tiny(kind))
    prompt = hf_internvl.prompt(np.random.default_rng(4), 3, 3, size=84)
    inputs = TileInputs(prompt.images[0].patches)
    encode = jax.jit(lambda p, dtype: network.bind(cast(p, dtype)).encode(inputs, dtype=dtype), static_argnums=1)
    exact, rounded = encode(params, jnp.float32), encode(params, jnp.bfloat16)
    assert rounded.dtype == jnp.bfloat16
    error = np.abs(rounded.astype(jnp.float32) - exact)
    assert error.mean() < 0.01 * np.abs(exact).mean()  # a few roundings of 2^-9


@pytest.mark.parametrize("patches", [12, 25])
def test_tiles_that_are_no_squares_of_whole_tokens_are_refused(patches, tiny):
    network, params = build(tiny(KINDS[0]))
    inputs = TileInputs(np.zeros((1, patches, 588), np.float32))
    with pytest.raises(ValueError, match=f"{patches} patches"):
        network.bind(params).encode(inputs, dtype=jnp.float32)


@pytest.mark.parametrize(("size", "new_size"), [(32, 16), (32, 33), (4, 11), (9, 2), (1, 3), (5, 5)])
def test_bicubic_matrix_equals_torch(size, new_size):
    matrix = bicubic_matrix(size, new_size)
    unit = torch.eye(size, dtype=torch.float64)
    images = unit[:, None, :, None].repeat(1, 1, 1, 2)  # each unit vector as an image of two equal columns
    reference = torch.nn.functional.interpolate(images, size=(new_size, 2), mode="bicubic", align_corners=False)
    np.testing.assert_allclose(matrix, reference[:, 0, :, 0].numpy().T, atol=1e-6, rtol=0)


@pytest.fixture(scope="module")
def gradients_of(tiny):
    """Network, parameters, prompts, batch, (loss, gradients) of a kind of tower, each computed once."""

    @functools.cache
    def compute(kind):
        network, params = build(tiny(kind))
        prompts = mixed_prompts(seed=3)
        batch = pack(prompts, prompt_len=PROMPT_LEN, tiles=TILES)
        return network, params, prompts, batch, loss_and_gradients(network, params, batch)

    return compute


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_every_gradient_equal_transformers(kind, tiny, gradients_of):
    network, _, prompts, _, (loss, gradients) = gradients_of(kind)
    hf = tiny(kind).hf
    inputs = hf_models.inputs(*prompts)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    first = mask.argmax(dim=1, keepdim=True) == torch.arange(ids.shape[1])  # predicted from padding
    ignored = (mask == 0) | first | (ids == hf_models.IMAGE)
    hf_loss = hf(**inputs, labels=ids.masked_fill(ignored, -100)).loss
    np.testing.assert_allclose(loss, hf_loss.item(), rtol=2e-6)
    assert_gradients_match(network, gradients, gradients_by_name(hf, hf_loss))


@pytest.mark.parametrize("variant", [dict(remat="full"), dict(remat="dots", unroll=True)], ids=["full", "dots"])
def test_remat_and_unrolled_layers_change_nothing(variant, gradients_of):
    network, params, _, batch, (loss, gradients) = gradients_of(KINDS[1])
    other_loss, other_gradients = loss_and_gradients(network, params, batch, **variant)
    np.testing.assert_allclose(other_loss, loss, rtol=1e-6)
    for name, gradient in gradients.items():
        scale = np.abs(gradient).max()
        np.testing.assert_allclose(other_gradients[name], gradient, atol=1e-5 * scale + 1e-7, rtol=0, err_msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_equals_generate_token_for_token(kind, tiny):
    model, max_tokens = tiny(kind), 16
    network, params = build(model)
    prompts = mixed_prompts(seed=5)
    never = hf_models.VOCAB - 1
    free = [hf_models.generate(model.hf, p, max_new_tokens=max_tokens, eos_token_ids=[never]) for p in prompts]
    assert len({token for tokens in free for token in tokens}) > 8  # they do not just repeat one token
    eos = sorted({int(free[0][4]), int(free[1][9])})
    sampler = Sampler(network, tuple(eos), hf_models.PAD)
    batch = pack(prompts, prompt_len=PROMPT_LEN, tiles=TILES)
    keys = jax.random.split(jax.random.PRNGKey(0), len(prompts))
    out = sampler(
        params, batch, sampler.encode(params, batch.vision), keys, num_samples=2, max_tokens=max_tokens,
        sampling=SamplingParams(temperature=0.0),
    )  # fmt: skip
    ids, mask = np.asarray(out.token_ids), np.asarray(out.mask)
    for b, p in enumerate(prompts):
        reference = hf_models.generate(model.hf, p, max_new_tokens=max_tokens, eos_token_ids=eos)
        for g in range(2):
            np.testing.assert_array_equal(ids[b, g][mask[b, g]], reference)
