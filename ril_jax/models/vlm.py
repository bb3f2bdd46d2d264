"""A whole model: the text decoder, and the vision tower of its family unless it is text only."""

from typing import Any

import jax.numpy as jnp
from flax import nnx

from ril_jax.models.config import InternVisionConfig, ModelConfig, QwenVisionConfig
from ril_jax.models.internvl3 import InternVisionTower, TileInputs
from ril_jax.models.qwen2 import Qwen2
from ril_jax.models.qwen2_5_vl import VisionInputs, VisionTower


class VisionLanguageModel(nnx.Module):
    """A decoder with or without a vision tower: what the stages and the sampler call.

    `text` is the `Qwen2` decoder; `vision` the tower, None for text-only models.
    """

    def __init__(self, config: ModelConfig, *, head: str = "vocab", vision: bool = True):
        self.config = config
        self.text = Qwen2(config.text, head=head)
        self.vision = make_tower(config.vision) if vision and config.vision is not None else None

    def encode(self, inputs: VisionInputs | TileInputs | None, *, dtype, remat: str = "none", unroll=1):
        """Image features [F, D] in the order of the buffer, or None where there are no images."""
        if inputs is None or self.vision is None:
            return None
        inputs_of_family: Any = inputs
        return self.vision(inputs_of_family, dtype=dtype, remat=remat, unroll=unroll)

    def embed(self, token_ids, features, feature_index, *, dtype):
        """Token embeddings [B, T, D] with image features put in at the placeholders.

        Args:
          token_ids: [B, T]; features: [F, D] or None; feature_index: [B, T] row of `features`, -1 for text.
        """
        x = self.text.embed(token_ids).astype(dtype)
        if features is None:
            return x
        rows = jnp.take(features, jnp.maximum(feature_index, 0), axis=0)
        return jnp.where((feature_index >= 0)[..., None], rows.astype(dtype), x)


def make_tower(config: QwenVisionConfig | InternVisionConfig) -> VisionTower | InternVisionTower:
    """The tower that a vision config describes."""
    return VisionTower(config) if isinstance(config, QwenVisionConfig) else InternVisionTower(config)
