"""A whole model: the text decoder, and the vision tower of its family unless it is text only."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ril_jax import sharding
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
        """Image features [F, D] in the order of the buffer, or None where there are no images.

        Several buffers on a leading axis (one a group of rows, see `embed`) give [groups, F, D].
        """
        if inputs is None or self.vision is None:
            return None
        tower: Any = self.vision

        def one(buffer):
            return tower(buffer, dtype=dtype, remat=remat, unroll=unroll)

        if inputs.patches.ndim == (2 if isinstance(inputs, VisionInputs) else 3):
            return one(inputs)
        if len(inputs.patches) == 1:
            return one(jax.tree.map(lambda a: a[0], inputs))[None]
        encode = jax.vmap(one, spmd_axis_name=sharding.batch_axes(len(inputs.patches)))
        return sharding.constrain(encode(sharding.constrain(inputs, "batch")), "batch")

    def embed(self, token_ids, features, feature_index, *, dtype):
        """Token embeddings [B, T, D] with image features put in at the placeholders.

        Args:
          token_ids: [B, T]; feature_index: [B, T] row of the features, -1 for text.
          features: None; [F, D]; or [groups, F, D], each for an equal share of the rows, in order: rows that lie on
            different devices then read only what was encoded there.
        """
        x = self.text.embed(token_ids).astype(dtype)
        if features is None:
            return x
        index = jnp.maximum(feature_index, 0)
        if features.ndim == 2:
            rows = jnp.take(features, index, axis=0)
        else:
            groups, (B, T) = len(features), token_ids.shape
            rows = jax.vmap(lambda f, i: jnp.take(f, i, axis=0))(features, index.reshape(groups, -1, T))
            rows = rows.reshape(B, T, -1)
        return jnp.where((feature_index >= 0)[..., None], rows.astype(dtype), x)


def make_tower(config: QwenVisionConfig | InternVisionConfig) -> VisionTower | InternVisionTower:
    """The tower that a vision config describes."""
    return VisionTower(config) if isinstance(config, QwenVisionConfig) else InternVisionTower(config)
