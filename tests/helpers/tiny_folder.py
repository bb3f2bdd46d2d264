"""A tiny Hugging Face folder with random weights and a real tokenizer, made without torch, for runs of the engine."""

import json
from pathlib import Path

import jax
from helpers.tokenizer_folder import build_tokenizer_folder

from ril_jax import sharding
from ril_jax.data.chat import ChatTokenizer
from ril_jax.models import hub
from ril_jax.models.config import ModelConfig, QwenVisionConfig, TextConfig
from ril_jax.pretrained import make_network
from ril_jax.training.state import fresh_params


def build_tiny_folder(folder: Path, *, vision: bool = True, seed: int = 0, ends: int = 12) -> Path:
    """Qwen2.5-VL of one layer, or Qwen2.5 without `vision`; every `ends`-th token id ends a response."""
    build_tokenizer_folder(folder, vision=vision, vocab_size=400, max_pixels=8 * 28 * 28)
    chat = ChatTokenizer.from_pretrained(folder)
    text = TextConfig(
        vocab_size=-(-chat.vocab_size // 16) * 16, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, rms_norm_eps=1e-6, tie_word_embeddings=False,
        mrope_section=(4, 2, 2) if vision else None, max_position_embeddings=1024,
    )  # fmt: skip
    tower = QwenVisionConfig(
        depth=1, hidden_size=16, num_heads=2, intermediate_size=24, out_hidden_size=32, fullatt_block_indexes=(0,)
    )
    tokens = [chat.image_token_id, chat.video_token_id, chat.vision_start_token_id]
    config = ModelConfig("qwen2_5_vl", text, tower, *tokens) if vision else ModelConfig("qwen2", text)
    (folder / "config.json").write_text(json.dumps(config.to_hf()))
    endings = [*range(5, 400, ends), *chat.eos_token_ids]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": endings}))
    network = make_network(config)
    params = fresh_params(network, seed, sharding.make_mesh(), scheme="fan_in")
    hub.save_params(folder, network, {name: 2 * jax.device_get(value) for name, value in params.items()})
    return folder
