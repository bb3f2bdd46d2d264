"""Tiny random transformers models, saved as the folders they would be on the hub: the reference of the parity tests.

transformers traps that are dealt with here: `mm_token_type_ids` must be given (without it positions are silently 1-D),
and `rope_deltas` is module state that survives from one call to the next.
"""

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Config, Qwen2ForCausalLM

from ril_jax.models.config import ModelConfig

torch.set_num_threads(1)
logging.getLogger("transformers").setLevel(logging.ERROR)

VOCAB, IMAGE, VIDEO, VISION_START, VISION_END, PAD, EOS = 300, 290, 291, 292, 293, 0, 7
PATCH_DIM = 3 * 2 * 14 * 14


@dataclasses.dataclass(frozen=True)
class Image:
    """Random patches in the form of `images.PatchedImage`."""

    patches: np.ndarray
    grid: tuple[int, int, int]

    @property
    def pixels(self) -> np.ndarray:
        """What transformers calls `pixel_values`."""
        return self.patches


@dataclasses.dataclass(frozen=True)
class Prompt:
    """Token ids and images in the form of `chat.EncodedPrompt`."""

    token_ids: np.ndarray
    images: tuple[Any, ...] = ()


@dataclasses.dataclass(frozen=True)
class TinyModel:
    """A transformers model in eval mode, the folder it was saved in, and the folder's config as ril_jax reads it."""

    hf: Any
    folder: Path
    config: ModelConfig


def image(rng: np.random.Generator, height: int, width: int) -> Image:
    """An image of height x width patches (both even)."""
    return Image(rng.normal(size=(height * width, PATCH_DIM)).astype(np.float32), (1, height, width))


def prompt(rng: np.random.Generator, num_text: int, *sizes: tuple[int, int], text_between: int = 3) -> Prompt:
    """[text, image] for each size, then text; `text_between=0` puts the images in a row."""
    images = tuple(image(rng, *size) for size in sizes)
    ids: list[int] = []
    for im in images:
        ids += [*rng.integers(10, 280, text_between), VISION_START, *[IMAGE] * (len(im.patches) // 4), VISION_END]
    return Prompt(np.array([*ids, *rng.integers(10, 280, num_text)], np.int32), images)


def save_qwen2_5_vl(folder: Path, *, text: dict | None = None, vision: dict | None = None, tie: bool = False, seed=0):
    """A Qwen2.5-VL of some 100k parameters; `text` and `vision` override fields of its two configs."""
    text = dict(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, rms_norm_eps=1e-6, max_position_embeddings=512, tie_word_embeddings=tie,
        bos_token_id=PAD, eos_token_id=EOS,
        rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[2, 3, 3]),
    ) | (text or {})  # fmt: skip
    vision = dict(
        depth=3, hidden_size=32, num_heads=2, intermediate_size=48, out_hidden_size=text["hidden_size"],
        fullatt_block_indexes=[1], window_size=112, patch_size=14, tokens_per_second=2,
    ) | (vision or {})  # fmt: skip
    config = Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, image_token_id=IMAGE, video_token_id=VIDEO,
        vision_start_token_id=VISION_START, vision_end_token_id=VISION_END, tie_word_embeddings=tie,
        bos_token_id=PAD, eos_token_id=EOS,
    )  # fmt: skip
    return save(Qwen2_5_VLForConditionalGeneration, config, folder, seed)


def save_qwen2(folder: Path, *, tie: bool = False, seed: int = 0, **fields: Any) -> TinyModel:
    """A text-only Qwen2.5."""
    fields = dict(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, rms_norm_eps=1e-6, max_position_embeddings=512, tie_word_embeddings=tie,
        bos_token_id=PAD, eos_token_id=EOS, rope_parameters=dict(rope_type="default", rope_theta=1e6),
    ) | fields  # fmt: skip
    return save(Qwen2ForCausalLM, Qwen2Config(**fields), folder, seed)


def inputs(*prompts: Prompt) -> dict[str, torch.Tensor]:
    """What transformers' forward and generate want of these prompts, padded on the left."""
    width = max(len(p.token_ids) for p in prompts)
    ids = torch.full((len(prompts), width), PAD, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for b, p in enumerate(prompts):
        ids[b, width - len(p.token_ids) :] = torch.tensor(p.token_ids)
        mask[b, width - len(p.token_ids) :] = 1
    out = {"input_ids": ids, "attention_mask": mask}
    images = [im for p in prompts for im in p.images]
    if images:
        out["pixel_values"] = torch.tensor(np.concatenate([im.pixels for im in images]))
        if isinstance(images[0], Image):
            out["image_grid_thw"] = torch.tensor([im.grid for im in images])
    return out


def logits(hf: Any, *prompts: Prompt) -> torch.Tensor:
    """[B, T, V] of left-padded prompts, differentiable."""
    return hf(**_with_types(hf, inputs(*prompts))).logits


def generate(hf: Any, p: Prompt, *, max_new_tokens: int, eos_token_ids: Sequence[int], repetition_penalty: float = 1.0):
    """Greedy tokens of one prompt, up to and including EOS."""
    kwargs = _with_types(hf, inputs(p))
    with torch.no_grad():
        out = hf.generate(
            **kwargs, max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=list(eos_token_ids),
            pad_token_id=PAD, repetition_penalty=repetition_penalty,
        )  # fmt: skip
    return out[0, len(p.token_ids) :].numpy()


def _with_types(hf: Any, kwargs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    if not isinstance(hf, Qwen2_5_VLForConditionalGeneration):
        return kwargs
    hf.model.rope_deltas = None
    return {**kwargs, "mm_token_type_ids": (kwargs["input_ids"] == IMAGE).long()}


def save(make: type, config: Any, folder: Path, seed: int) -> TinyModel:
    """A random model of `config`, and the folder it is saved in."""
    # Larger weights than transformers' 0.02: logits of scale 3, so that greedy tokens vary and errors show.
    generator = torch.Generator().manual_seed(seed)
    model = make(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            scale, mean = (0.15, 0.0) if parameter.ndim > 1 else (0.1, 0.0)
            parameter.normal_(mean, scale, generator=generator)
        for name, parameter in model.named_parameters():
            if "norm" in name or "ln_q" in name or "lambda" in name:
                parameter += 1.0
    model.save_pretrained(folder)
    return TinyModel(model, Path(folder), ModelConfig.from_folder(folder))
