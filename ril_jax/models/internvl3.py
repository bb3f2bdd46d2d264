"""The vision side of InternVL3: InternViT (300M and 6B) over tiles, pixel shuffle, and the projector.

The tiles of all images of a batch come as one buffer; which token takes which feature is the index tables' matter
(`data/packing.py`). No shape depends on the size of an image, only on how many tiles the buffer has.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ril_jax.models import attention
from ril_jax.models.config import InternVisionConfig
from ril_jax.models.layers import LayerNorm, Linear, RMSNorm, scan_layers
from ril_jax.models.parameters import param


class TileInputs(NamedTuple):
    """All tiles of a batch, T of them, square and of one size; those that only fill the buffer may hold anything.

    patches: [T, n, 3*14*14] float, the n patches of a tile row by row, each in the order (channel, row, column).
    """

    patches: jax.Array


class InternVisionBlocks(nnx.Module):
    """All blocks of InternViT, stacked (HF `InternVLVisionLayer`)."""

    def __init__(self, c: InternVisionConfig):
        D, N, F, L = c.hidden_size, c.num_attention_heads, c.intermediate_size, c.num_hidden_layers
        H, hf = D // N, "vision_tower.encoder.layer.{layer}."
        norm = {"layer_norm": LayerNorm, "rms_norm": RMSNorm}[c.norm]

        def heads(name: str) -> Linear:
            axes = ("vision_embed", "vision_heads", "head_dim")
            return Linear((D,), (N, H), axes=axes, hf=hf + f"attention.{name}_proj", bias=c.qkv_bias, layers=L)

        def over_all_heads(name: str) -> RMSNorm | None:
            return RMSNorm(D, eps=1e-6, hf=hf + f"attention.{name}_norm", layers=L) if c.qk_norm else None

        def layer_scale(name: str) -> nnx.Param:
            return param((D,), ("norm",), hf=hf + name, init="constant", scale=0.1, layers=L)

        self.norm1 = norm(D, eps=c.layer_norm_eps, hf=hf + "layernorm_before", layers=L)
        self.q, self.k, self.v = heads("q"), heads("k"), heads("v")
        self.q_norm, self.k_norm = over_all_heads("q"), over_all_heads("k")
        self.proj = Linear(
            (N, H), (D,), axes=("vision_heads", "head_dim", "vision_embed"), hf=hf + "attention.projection_layer",
            bias=True, layers=L,
        )  # fmt: skip
        self.scale1 = layer_scale("lambda_1")
        self.norm2 = norm(D, eps=c.layer_norm_eps, hf=hf + "layernorm_after", layers=L)
        self.fc1 = Linear((D,), (F,), axes=("vision_embed", "vision_ff"), hf=hf + "mlp.fc1", bias=True, layers=L)
        self.fc2 = Linear((F,), (D,), axes=("vision_ff", "vision_embed"), hf=hf + "mlp.fc2", bias=True, layers=L)
        self.scale2 = layer_scale("lambda_2")

    def __call__(self, x):
        """x [T, 1 + n, D] -> [T, 1 + n, D]."""
        h = self.norm1(x)
        q, k, v = self.q(h), self.k(h), self.v(h)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = (norm(a.reshape(x.shape)).reshape(a.shape) for norm, a in ((self.q_norm, q), (self.k_norm, k)))
        x = x + self.scale1[...].astype(x.dtype) * self.proj(attention.full_attention(q, k, v))
        h = self.fc2(jax.nn.gelu(self.fc1(self.norm2(x)), approximate=False))
        return x + self.scale2[...].astype(x.dtype) * h


class InternVisionTower(nnx.Module):
    """Tiles -> features of the text decoder's width (HF `InternVLVisionModel` and `InternVLMultiModalProjector`)."""

    def __init__(self, config: InternVisionConfig):
        c = self.config = config
        D, out, hf = c.hidden_size, c.out_hidden_size, "vision_tower.embeddings."
        positions = 1 + math.prod(c.grid)
        self.patch_embed = Linear(
            (c.patch_dim,), (D,), axes=(None, "vision_embed"), hf=hf + "patch_embeddings.projection", bias=True,
            hf_shape=(D, 3, c.patch_size, c.patch_size),
        )  # fmt: skip
        self.cls_token = param((D,), ("vision_embed",), hf=hf + "cls_token", hf_shape=(1, 1, D), hf_split=(D,))
        self.positions = param(
            (positions, D), ("vision_positions", "vision_embed"), hf=hf + "position_embeddings",
            hf_shape=(1, positions, D), hf_split=(positions, D),
        )  # fmt: skip
        self.blocks = InternVisionBlocks(c)
        wide, hf = c.merge_unit * D, "multi_modal_projector."
        self.projector_norm = LayerNorm(wide, eps=1e-5, hf=hf + "layer_norm")
        self.projector_in = Linear((wide,), (out,), axes=("vision_embed", "vision_ff"), hf=hf + "linear_1", bias=True)
        self.projector_out = Linear((out,), (out,), axes=("vision_ff", "embed"), hf=hf + "linear_2", bias=True)

    def __call__(self, inputs: TileInputs, *, dtype, remat: str = "none", unroll=1):
        """Features [T * tokens of a tile, D of the text decoder], tile by tile, each row by row."""
        c, r = self.config, self.config.downsample
        T, n, _ = inputs.patches.shape
        side = math.isqrt(n)
        if side * side != n or side % r:
            raise ValueError(f"tiles of {n} patches are not squares with a side that {r} divides")
        x = self.patch_embed(inputs.patches.astype(dtype))
        cls = jnp.broadcast_to(self.cls_token[...].astype(dtype), (T, 1, c.hidden_size))
        x = jnp.concatenate([cls, x], axis=1) + self._positions(side).astype(dtype)
        x, _ = scan_layers(self.blocks, lambda block, x, _: (block(x), None), x, remat=remat, unroll=unroll)
        # Pixel shuffle "v2": the r x r patches of a square, row by row, become one feature.
        x = x[:, 1:].reshape(T, side // r, r, side // r, r, c.hidden_size)
        x = jnp.einsum("tirjsd->tijrsd", x).reshape(-1, c.merge_unit * c.hidden_size)
        return self.projector_out(jax.nn.gelu(self.projector_in(self.projector_norm(x)), approximate=False))

    def _positions(self, side: int):
        """The position table [1 + side * side, D], interpolated where the tiles are not of the table's size."""
        table, (height, width) = self.positions[...], self.config.grid
        if (side, side) == (height, width):
            return table
        grid = table[1:].astype(jnp.float32).reshape(height, width, -1)
        rows, columns = bicubic_matrix(height, side), bicubic_matrix(width, side)
        grid = jnp.einsum("ip,jq,pqd->ijd", rows, columns, grid)
        return jnp.concatenate([table[:1].astype(jnp.float32), grid.reshape(side * side, -1)])


def bicubic_matrix(size: int, new_size: int) -> np.ndarray:
    """Bicubic interpolation of `size` samples to `new_size` as a matrix [new_size, size] float32.

    Cubic convolution with a = -0.75, half-pixel centres, no antialiasing, border samples repeated: what
    `torch.nn.functional.interpolate(mode="bicubic", align_corners=False)` does along each axis.
    """
    a = -0.75
    centre = (np.arange(new_size) + 0.5) * size / new_size - 0.5
    first = np.floor(centre).astype(int)
    out = np.zeros((new_size, size), np.float64)
    for tap in range(-1, 3):
        d = np.abs(centre - first - tap)
        near = ((a + 2) * d - (a + 3)) * d * d + 1
        far = a * (((d - 5) * d + 8) * d - 4)
        np.add.at(out, (np.arange(new_size), np.clip(first + tap, 0, size - 1)), np.where(d <= 1, near, far))
    return out.astype(np.float32)
