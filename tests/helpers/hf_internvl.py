"""Tiny random InternVL models with either kind of vision tower, their prompts, and batches packed by hand."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
from helpers.hf_models import EOS, IMAGE, PAD, VISION_END, VISION_START, VOCAB, Prompt, TinyModel, save
from transformers import InternVLConfig, InternVLForConditionalGeneration

from ril_jax.data.packing import PromptBatch
from ril_jax.models.internvl3 import TileInputs

PATCH, TILE = 14, 56
KIND_300M = dict(norm_type="layer_norm", attention_bias=True, use_qk_norm=False, hidden_size=48, num_attention_heads=3)
KIND_6B = dict(norm_type="rms_norm", attention_bias=False, use_qk_norm=True, hidden_size=40, num_attention_heads=5)

# From transformers' names to OpenGVLab's: the inverse of what is under test.
_TO_ORIGINAL = (
    (r"^vision_tower\.embeddings\.cls_token$", "vision_model.embeddings.class_embedding"),
    (r"^vision_tower\.embeddings\.position_embeddings$", "vision_model.embeddings.position_embedding"),
    (r"^vision_tower\.embeddings\.patch_embeddings\.projection", "vision_model.embeddings.patch_embedding"),
    (r"^vision_tower\.encoder\.layer\.", "vision_model.encoder.layers."),
    (r"attention\.projection_layer", "attn.proj"),
    (r"attention\.([qk]_norm)", r"attn.\1"),
    (r"layernorm_before", "norm1"),
    (r"layernorm_after", "norm2"),
    (r"lambda_", "ls"),
    (r"^multi_modal_projector\.layer_norm", "mlp1.0"),
    (r"^multi_modal_projector\.linear_1", "mlp1.1"),
    (r"^multi_modal_projector\.linear_2", "mlp1.3"),
)


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Random pixels [T, 3, size, size] of the T tiles of an image, in the form of `tiles.TiledImage`.

    `merge` patches make one token.
    """

    pixels: np.ndarray
    merge: int = 4

    @property
    def patches(self) -> np.ndarray:
        T, C, size, _ = self.pixels.shape
        n = size // PATCH
        cut = self.pixels.reshape(T, C, n, PATCH, n, PATCH)
        return np.einsum("tcipjq->tijcpq", cut).reshape(T, n * n, C * PATCH * PATCH)

    @property
    def num_tiles(self) -> int:
        return len(self.pixels)

    @property
    def grid(self) -> tuple[int, int, int]:
        side = self.pixels.shape[-1] // PATCH
        return len(self.pixels), side, side

    @property
    def num_tokens(self) -> int:
        return self.num_tiles * (self.pixels.shape[-1] // PATCH) ** 2 // self.merge


def prompt(
    rng: np.random.Generator, num_text: int, *tiles: int, text_between: int = 3, size: int = TILE, merge: int = 4
) -> Prompt:
    """[text, image] for each number of tiles, then text; `text_between=0` puts the images in a row."""
    images = tuple(Tiles(rng.normal(size=(n, 3, size, size)).astype(np.float32), merge) for n in tiles)
    ids: list[int] = []
    for image in images:
        ids += [*rng.integers(10, 280, text_between), VISION_START, *[IMAGE] * image.num_tokens, VISION_END]
    return Prompt(np.array([*ids, *rng.integers(10, 280, num_text)], np.int32), images)


def pack(prompts: list[Prompt], *, prompt_len: int, tiles: int = 0, size: int = TILE) -> PromptBatch:
    """A batch padded on the left; a buffer of `tiles` tiles, of which those that no image fills hold large noise."""
    rows = len(prompts)
    ids, index = np.full((rows, prompt_len), PAD, np.int32), np.full((rows, prompt_len), -1, np.int32)
    valid, positions = np.zeros((rows, prompt_len), bool), np.zeros((rows, prompt_len), np.int32)
    offset = 0
    for b, p in enumerate(prompts):
        row = slice(prompt_len - len(p.token_ids), prompt_len)
        ids[b, row], valid[b, row], positions[b, row] = p.token_ids, True, np.arange(len(p.token_ids))
        count = sum(image.num_tokens for image in p.images)
        index[b, row][p.token_ids == IMAGE] = offset + np.arange(count)
        offset += count
    vision = None
    if tiles:
        n = (size // PATCH) ** 2
        buffer = 100 * np.random.default_rng(0).normal(size=(tiles, n, 3 * PATCH * PATCH)).astype(np.float32)
        filled = np.concatenate([image.patches for p in prompts for image in p.images])
        buffer[: len(filled)] = filled
        vision = TileInputs(buffer)
    next_position = np.array([len(p.token_ids) for p in prompts], np.int32)
    return PromptBatch(ids, np.stack([positions] * 3), valid, index, next_position, np.ones(rows, bool), vision)


def save_internvl(
    folder: Path, *, vision: dict | None = None, text: dict | None = None, tie: bool = False, seed: int = 0, **root: Any
) -> TinyModel:
    """An InternVL of some 100k parameters; `vision` (KIND_300M unless given) and `text` override their fields."""
    text = dict(
        model_type="qwen2", vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-6, max_position_embeddings=512,
        tie_word_embeddings=tie, bos_token_id=PAD, eos_token_id=EOS,
        rope_parameters=dict(rope_type="dynamic", factor=2.0, rope_theta=1e6),
    ) | (text or {})  # fmt: skip
    vision = dict(
        num_hidden_layers=3, intermediate_size=72, image_size=[TILE, TILE], patch_size=[PATCH, PATCH]
    ) | (KIND_300M if vision is None else vision)  # fmt: skip
    root = dict(image_token_id=IMAGE, bos_token_id=PAD, eos_token_id=EOS, tie_word_embeddings=tie) | root
    config = InternVLConfig(text_config=text, vision_config=vision, **root)
    return save(InternVLForConditionalGeneration, config, folder, seed)


def original_layout(tensors):
    """OpenGVLab's: other names, and queries, keys and values of the tower in one tensor."""
    out = {}
    for key, tensor in tensors.items():
        if match := re.match(r"(vision_tower\.encoder\.layer\.\d+)\.attention\.q_proj\.(.*)", key):
            prefix, kind = match.groups()
            key = f"{prefix}.attn.qkv.{kind}"
            tensor = np.concatenate([tensors[f"{prefix}.attention.{x}_proj.{kind}"] for x in "qkv"])
        elif re.search(r"^vision_tower.*\.attention\.[kv]_proj\.", key):
            continue
        for pattern, replacement in _TO_ORIGINAL:
            if not key.startswith("language_model."):
                key = re.sub(pattern, replacement, key)
        out[key] = tensor
    return out


def original_config(config):
    """OpenGVLab's form of a config.json of transformers; it names no tokens."""
    vision = dict(config["vision_config"])
    vision |= {"qkv_bias": vision.pop("attention_bias"), "qk_normalization": vision.pop("use_qk_norm")}
    vision |= {"image_size": vision["image_size"][0], "patch_size": vision["patch_size"][0]}
    rope = config["text_config"]["rope_parameters"]
    text = {key: value for key, value in config["text_config"].items() if key != "rope_parameters"}
    text |= {"rope_theta": rope["rope_theta"], "rope_scaling": {"type": "dynamic", "factor": rope["factor"]}}
    return {
        "model_type": "internvl_chat", "ps_version": "v2", "select_layer": -1, "downsample_ratio": 0.5,
        "tie_word_embeddings": config["tie_word_embeddings"], "llm_config": text, "vision_config": vision,
    }  # fmt: skip
