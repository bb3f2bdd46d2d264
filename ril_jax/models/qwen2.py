"""The Qwen2.5 text decoder, the body of every model here (HF `Qwen2Model`, `Qwen2_5_VLTextModel`)."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ril_jax import sharding
from ril_jax.models import attention
from ril_jax.models.config import TextConfig
from ril_jax.models.layers import Linear, RMSNorm, SwiGLU, rotate, scan_layers
from ril_jax.models.parameters import param


class DecoderLayers(nnx.Module):
    """All decoder layers, stacked; inside `scan_layers` an instance of this class holds one layer."""

    def __init__(self, config: TextConfig):
        c = config
        D, N, K, H, L = c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim, c.num_hidden_layers
        hf = "model.layers.{layer}."
        self.attn_norm = RMSNorm(D, eps=c.rms_norm_eps, hf=hf + "input_layernorm", layers=L)
        self.q = Linear(
            (D,), (N, H), axes=("embed", "heads", "head_dim"), hf=hf + "self_attn.q_proj", bias=True, layers=L
        )
        self.k = Linear(
            (D,), (K, H), axes=("embed", "kv_heads", "head_dim"), hf=hf + "self_attn.k_proj", bias=True, layers=L
        )
        self.v = Linear(
            (D,), (K, H), axes=("embed", "kv_heads", "head_dim"), hf=hf + "self_attn.v_proj", bias=True, layers=L
        )
        self.o = Linear(
            (N, H), (D,), axes=("heads", "head_dim", "embed"), hf=hf + "self_attn.o_proj", bias=False, layers=L
        )
        self.mlp_norm = RMSNorm(D, eps=c.rms_norm_eps, hf=hf + "post_attention_layernorm", layers=L)
        self.mlp = SwiGLU(D, c.intermediate_size, embed="embed", ff="ff", hf=hf + "mlp", bias=False, layers=L)

    def __call__(self, x, rope, attend):
        """One layer: x [..., D], rope (cos, sin) [..., H]; `attend(q, k, v) -> (out, y)`. Returns (x, y)."""
        h = self.attn_norm(x)
        q, k, v = rotate(self.q(h), *rope), rotate(self.k(h), *rope), self.v(h)
        out, y = attend(q, k, v)
        x = x + self.o(out)
        return x + self.mlp(self.mlp_norm(x)), y


class Qwen2(nnx.Module):
    """Token embedding, decoder layers, final norm and head.

    `head` is "vocab" (the language model), "scalar" (the discriminator's linear head d x 1, of zeros) or "none".
    """

    def __init__(self, config: TextConfig, *, head: str = "vocab"):
        self.config = config
        D, V = config.hidden_size, config.vocab_size
        self.embedding = param((V, D), ("vocab", "embed"), hf="model.embed_tokens.weight")
        self.layers = DecoderLayers(config)
        self.norm = RMSNorm(D, eps=config.rms_norm_eps, hf="model.norm")
        own_head = head == "vocab" and not config.tie_word_embeddings
        self.lm_head = param((V, D), ("vocab", "embed"), hf="lm_head.weight") if own_head else None
        scalar = head == "scalar"
        self.score = Linear((D,), (1,), axes=("embed", None), hf="score", bias=True, init="zeros") if scalar else None

    def embed(self, token_ids):
        """[...] int32 -> [..., D]."""
        return jnp.take(self.embedding[...], token_ids, axis=0)

    def head(self):
        """The head as [V, D], the layout of the embedding; a tied model gives its embedding."""
        return self.embedding[...] if self.lm_head is None else self.lm_head[...]

    def logits(self, hidden):
        """[..., D] -> [..., V] float32, for single positions; batches go through `objectives.chunked_logprobs`."""
        return jnp.einsum("...d,vd->...v", hidden, self.head().astype(hidden.dtype), preferred_element_type=jnp.float32)

    def rope(self, positions, dtype, lengths=None):
        """cos, sin [B, T, H] of positions [B, T] (1-D rotary) or [3, B, T] (M-RoPE: time, height, width).

        `lengths` [B, T]: how long the text was once each token had entered it, which dynamic NTK scaling goes by (HF
        `_compute_dynamic_ntk_parameters`); None for tokens that enter one by one, as in decoding. Computed in float32,
        then cast to the activations' dtype as HF does (`Qwen2_5_VLRotaryEmbedding`).
        """
        c = self.config
        inv = jnp.asarray(
            1.0 / c.rope_theta ** (np.arange(0, c.head_dim, 2, dtype=np.float32) / c.head_dim), jnp.float32
        )
        if c.rope_dynamic_factor is not None:
            # theta * s ** (H / (H - 2)) in place of theta, with s exactly 1 up to the length of pre-training.
            lengths = (positions if positions.ndim == 2 else positions[0]) + 1 if lengths is None else lengths
            beyond = jnp.maximum(lengths - c.max_position_embeddings, 0)
            stretch = 1.0 + c.rope_dynamic_factor / c.max_position_embeddings * beyond
            inv = inv * stretch[..., None] ** (-np.arange(0, c.head_dim, 2, dtype=np.float32) / (c.head_dim - 2))
        if positions.ndim == 2:
            angles = positions.astype(jnp.float32)[..., None] * inv
        elif c.mrope_section is None:
            angles = positions[0].astype(jnp.float32)[..., None] * inv
        else:
            axis = np.concatenate([np.full(n, i % 3) for i, n in enumerate(c.mrope_section)])
            angles = jnp.moveaxis(positions.astype(jnp.float32)[axis], 0, -1) * inv
        angles = jnp.concatenate([angles, angles], axis=-1)
        return jnp.cos(angles).astype(dtype), jnp.sin(angles).astype(dtype)

    def rows(self, x, positions, valid, *, prompt_len: int, num_responses: int = 0, remat: str = "none", unroll=1,
             keep_cache: bool = False):  # fmt: skip
        """Hidden states of rows `[prompt | response 1 | ... | response S]` after the final norm.

        Args:
          x: [B, T, D] embeddings; positions: [3, B, T] or [B, T]; valid: [B, T] bool.
          prompt_len, num_responses: see `attention.group_attention`.
          keep_cache: also return keys and values of all layers, each [L, B, T, K, H] (prefill).

        Returns: (hidden [B, T, D], cache or None).
        """
        x = sharding.constrain(x, "batch")
        rope = self.rope(positions, x.dtype, _row_lengths(positions, valid, prompt_len))

        def attend(q, k, v):
            out = attention.group_attention(q, k, v, valid, prompt_len=prompt_len, num_responses=num_responses)
            return out, ((k, v) if keep_cache else None)

        x, cache = scan_layers(
            self.layers,
            lambda layer, x, _: layer(sharding.constrain(x, "batch"), rope, attend),
            x,
            remat=remat,
            unroll=unroll,
        )
        return self.norm(x), cache

    def decode(self, x, positions, prompt_cache, prompt_valid, own_cache, own_len, *, layers=None):
        """One token for every sample of every question.

        Args:
          x: [B, G, D]; positions: [B, G] (the three M-RoPE axes are equal after the prompt).
          prompt_cache: (k, v) each [L, B, K, P, H]; prompt_valid: [B, P]; own_cache: (k, v) each [L, B, K, G, R, H].
          own_len: [] int.
          layers: the layers one by one (`layers.unstack`) instead of a scan over them; the caches are then lists of L.

        Returns: (hidden [B, G, D], the new token's (k, v), each [L, B, K, G, H]).
        """
        x = sharding.constrain(x, "batch")
        rope = self.rope(positions, x.dtype)

        def body(layer, x, caches):
            (pk, pv), (ok, ov) = caches

            def attend(q, k, v):
                out = attention.decode_attention(q, k, v, pk, pv, prompt_valid, ok, ov, own_len)
                return out, (jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2))

            return layer(x, rope, attend)

        if layers is None:
            x, new = scan_layers(self.layers, body, x, (prompt_cache, own_cache))
            return self.norm(x), new
        new = []
        for layer, *caches in zip(layers, prompt_cache, own_cache, strict=True):
            x, written = body(layer, x, caches)
            new.append(written)
        return self.norm(x), new


def _row_lengths(positions, valid, prompt_len: int):
    """How long the text was once each token of `[prompt | response 1 | ...]` had entered it, int [B, T].

    A prompt enters as a whole and a response token by token, as in sampling: a row's log-probabilities are those of its
    samples, whatever else the row holds.
    """
    positions = positions if positions.ndim == 2 else positions[0]
    prompt = jnp.max(jnp.where(valid, positions, 0)[:, :prompt_len], axis=1, keepdims=True) + 1
    return jnp.where(jnp.arange(positions.shape[1]) < prompt_len, prompt, positions + 1)


def last_hidden(hidden, last):
    """hidden [B, T, D] at index last [B] -> [B, D]."""
    return jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]


def stop_gradient(params):
    """The same parameters, opaque to differentiation."""
    return jax.tree.map(jax.lax.stop_gradient, params)
