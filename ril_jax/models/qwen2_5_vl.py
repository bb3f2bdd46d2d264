"""The vision tower of Qwen2.5-VL: windowed attention and the patch merger.

Contents are arrays: the images of a batch come as one patch buffer in window order, with index tables that were
computed on the host (`data/packing.py`). No shape depends on the size of an image.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ril_jax.models import attention
from ril_jax.models.config import QwenVisionConfig
from ril_jax.models.layers import Linear, RMSNorm, SwiGLU, rotate, scan_layers, unstack


class VisionInputs(NamedTuple):
    """All images of a batch, packed; X patches in window order (merge groups of 4 stay together), X divisible by 4.

    patches: [X, 3*2*14*14] float; positions: [X, 2] int32 (row, column of the patch in its image)
    window_index: [W, S] int32 and window_slot: [X] int32; frame_index: [I, M] int32 and frame_slot: [X] int32:
    the two segmentations, as `attention.window_attention` takes them.
    """

    patches: jax.Array
    positions: jax.Array
    window_index: jax.Array
    window_slot: jax.Array
    frame_index: jax.Array
    frame_slot: jax.Array


class VisionBlocks(nnx.Module):
    """All blocks of the tower, stacked (HF `Qwen2_5_VLVisionBlock`)."""

    def __init__(self, c: QwenVisionConfig):
        D, N, L, hf = c.hidden_size, c.num_heads, c.depth, "visual.blocks.{layer}."
        H = D // N
        self.norm1 = RMSNorm(D, eps=1e-6, hf=hf + "norm1", layers=L)
        self.norm2 = RMSNorm(D, eps=1e-6, hf=hf + "norm2", layers=L)
        axes = ("vision_embed", None, "vision_heads", "head_dim")
        self.qkv = Linear((D,), (3, N, H), axes=axes, hf=hf + "attn.qkv", bias=True, layers=L)
        self.proj = Linear(
            (N, H), (D,), axes=("vision_heads", "head_dim", "vision_embed"), hf=hf + "attn.proj", bias=True, layers=L
        )
        self.mlp = SwiGLU(
            D, c.intermediate_size, embed="vision_embed", ff="vision_ff", hf=hf + "mlp", bias=True, layers=L
        )

    def __call__(self, x, rope, attend):
        q, k, v = (a[:, 0] for a in jnp.split(self.qkv(self.norm1(x)), 3, axis=1))
        q, k = (rotate(a.astype(jnp.float32), *rope).astype(a.dtype) for a in (q, k))
        x = x + self.proj(attend(q, k, v))
        return x + self.mlp(self.norm2(x))


class VisionTower(nnx.Module):
    """Patches -> one feature per 2x2 merge group (HF `Qwen2_5_VisionTransformerPretrainedModel`)."""

    def __init__(self, config: QwenVisionConfig):
        c = self.config = config
        D, unit = c.hidden_size, c.merge_unit
        conv = (D, c.in_channels, c.temporal_patch_size, c.patch_size, c.patch_size)
        self.patch_embed = Linear(
            (c.patch_dim,), (D,), axes=(None, "vision_embed"), hf="visual.patch_embed.proj", bias=False, hf_shape=conv
        )
        self.blocks = VisionBlocks(c)
        self.merger_norm = RMSNorm(D, eps=1e-6, hf="visual.merger.ln_q")
        wide = unit * D
        self.merger_in = Linear(
            (wide,), (wide,), axes=("vision_embed", "vision_ff"), hf="visual.merger.mlp.0", bias=True
        )
        self.merger_out = Linear(
            (wide,), (c.out_hidden_size,), axes=("vision_ff", "embed"), hf="visual.merger.mlp.2", bias=True
        )

    def __call__(self, inputs: VisionInputs, *, dtype, remat: str = "none", unroll=1):
        """Features [X / 4, D of the text decoder], in window order."""
        c = self.config
        rope = self._rope(inputs.positions)
        x = self.patch_embed(inputs.patches.astype(dtype))

        def windows(q, k, v):
            return attention.window_attention(q, k, v, inputs.window_index, inputs.window_slot)

        def frames(q, k, v):
            return attention.frame_attention(q, k, v, inputs.frame_index, inputs.frame_slot)

        full = np.isin(np.arange(c.depth), c.fullatt_block_indexes)
        if unroll is True or c.depth <= 4:  # the kind of every block is known while tracing
            for block, is_full in zip(unstack(self.blocks), full, strict=True):
                x = block(x, rope, frames if is_full else windows)
        else:

            def body(block, x, is_full):
                attend = lambda q, k, v: jax.lax.cond(is_full, frames, windows, q, k, v)  # noqa: E731
                return block(x, rope, attend), None

            x, _ = scan_layers(self.blocks, body, x, jnp.asarray(full), remat=remat)
        x = self.merger_norm(x).reshape(-1, c.merge_unit * c.hidden_size)
        return self.merger_out(jax.nn.gelu(self.merger_in(x), approximate=False))

    def _rope(self, positions):
        """cos, sin [X, H] float32 of (row, column), half-split (HF `Qwen2_5_VisionRotaryEmbedding`)."""
        head_dim = self.config.hidden_size // self.config.num_heads
        half = head_dim // 2
        inv = jnp.asarray(1.0 / 10000.0 ** (np.arange(0, half, 2, dtype=np.float32) / half), jnp.float32)
        angles = (positions.astype(jnp.float32)[:, :, None] * inv).reshape(-1, half)
        angles = jnp.concatenate([angles, angles], axis=-1)
        return jnp.cos(angles), jnp.sin(angles)
