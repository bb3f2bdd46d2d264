"""Attention by meaning: group rows (training, prefill), decode over a shared prompt cache, vision tiles and segments.

These are the plain XLA forms, and the reference that any kernel is tested against. Query heads are kept as [K, N/K] so
that key-value heads are never repeated. Scores and softmax are float32.
"""

import jax
import jax.numpy as jnp

_MASKED = -1e30  # finite, so that a row with nothing to see gives a uniform average instead of NaN


def group_attention(q, k, v, valid, *, prompt_len: int, num_responses: int):
    """Attention of rows `[prompt | response 1 | ... | response S]`: a token sees prompt and own response, causally.

    Args:
      q: [B, T, N, H]; k, v: [B, T, K, H] with T = prompt_len + S * R, responses all R wide.
      valid: [B, T] bool, False at padding (left, right or within); no token sees padding.
      prompt_len: P. num_responses: S; 0 makes it plain causal attention.

    Returns: [B, T, N, H]. Rows at padding hold finite values without meaning.
    """
    B, T, N, H = q.shape
    K = k.shape[2]
    P, S = prompt_len, num_responses
    q = q.reshape(B, T, K, N // K, H) * (H**-0.5)
    causal_pp = jnp.tril(jnp.ones((P, P), bool))
    mask_bpp = causal_pp & valid[:, None, :P]
    scores = jnp.einsum("btkgh,bskh->bkgts", q[:, :P], k[:, :P], preferred_element_type=jnp.float32)
    probs = _softmax(jnp.where(mask_bpp[:, None, None], scores, _MASKED), v.dtype)
    out_p = jnp.einsum("bkgts,bskh->btkgh", probs, v[:, :P]).reshape(B, P, N, H)
    if S == 0:
        return out_p
    R = (T - P) // S
    q_r = q[:, P:].reshape(B, S, R, K, N // K, H)
    k_r, v_r = (x[:, P:].reshape(B, S, R, K, H) for x in (k, v))
    valid_r = valid[:, P:].reshape(B, S, R)
    causal_rr = jnp.tril(jnp.ones((R, R), bool))
    to_prompt = jnp.einsum("bsrkgh,bpkh->bkgsrp", q_r, k[:, :P], preferred_element_type=jnp.float32)
    to_own = jnp.einsum("bsrkgh,bsukh->bkgsru", q_r, k_r, preferred_element_type=jnp.float32)
    to_prompt = jnp.where(valid[:, None, None, None, None, :P], to_prompt, _MASKED)
    to_own = jnp.where((causal_rr & valid_r[:, :, None, :])[:, None, None], to_own, _MASKED)
    probs = _softmax(jnp.concatenate([to_prompt, to_own], axis=-1), v.dtype)
    out_r = jnp.einsum("bkgsrp,bpkh->bsrkgh", probs[..., :P], v[:, :P])
    out_r = out_r + jnp.einsum("bkgsru,bsukh->bsrkgh", probs[..., P:], v_r)
    return jnp.concatenate([out_p, out_r.reshape(B, S * R, N, H)], axis=1)


def decode_attention(q, k_new, v_new, prompt_k, prompt_v, prompt_valid, own_k, own_v, own_len):
    """One new token per sample attends to its question's prompt cache, its own earlier tokens, and itself.

    The prompt cache is shared by the G samples of a question and never copied. The caller writes k_new, v_new into the
    samples' caches afterwards, so no cache passes through here as an output.

    Args:
      q: [B, G, N, H]; k_new, v_new: [B, G, K, H].
      prompt_k, prompt_v: [B, K, P, H]; prompt_valid: [B, P] bool.
      own_k, own_v: [B, K, G, R, H]; own_len: [] int, how many of R are written (the same for all samples).

    Returns: [B, G, N, H].
    """
    B, G, N, H = q.shape
    K = k_new.shape[2]
    P, R = prompt_k.shape[2], own_k.shape[3]
    # Heads before samples: the order of the caches, so that only the one new token is ever transposed.
    q = jnp.swapaxes(q.reshape(B, G, K, N // K, H) * (H**-0.5), 1, 2)
    k_new, v_new = jnp.swapaxes(k_new, 1, 2), jnp.swapaxes(v_new, 1, 2)
    to_prompt = jnp.einsum("bkgnh,bkph->bkgnp", q, prompt_k, preferred_element_type=jnp.float32)
    to_own = jnp.einsum("bkgnh,bkgrh->bkgnr", q, own_k, preferred_element_type=jnp.float32)
    to_self = jnp.einsum("bkgnh,bkgh->bkgn", q, k_new, preferred_element_type=jnp.float32)[..., None]
    to_prompt = jnp.where(prompt_valid[:, None, None, None, :], to_prompt, _MASKED)
    to_own = jnp.where(jnp.arange(R) < own_len, to_own, _MASKED)
    probs = _softmax(jnp.concatenate([to_prompt, to_own, to_self], axis=-1), v_new.dtype)
    out = jnp.einsum("bkgnp,bkph->bkgnh", probs[..., :P], prompt_v)
    out = out + jnp.einsum("bkgnr,bkgrh->bkgnh", probs[..., P : P + R], own_v)
    out = out + probs[..., -1:] * v_new[:, :, :, None, :]
    return jnp.swapaxes(out, 1, 2).reshape(B, G, N, H)


def full_attention(q, k, v):
    """Every token of a row sees every other: [B, T, N, H] each -> [B, T, N, H]."""
    scores = jnp.einsum("bmnh,btnh->bnmt", q * (q.shape[-1] ** -0.5), k, preferred_element_type=jnp.float32)
    return jnp.einsum("bnmt,btnh->bmnh", _softmax(scores, v.dtype), v)


def segment_attention(q, k, v, index, slot):
    """Full attention within each segment of a packed buffer: windows of the vision tower, or whole frames.

    Args:
      q, k, v: [X, N, H], all images of the batch end to end.
      index: [S, M] int32, row of each segment's m-th member, X where the segment is shorter.
      slot: [X] int32, the inverse: s * M + m of each row, S * M for padding rows.

    Returns: [X, N, H]; zero at padding rows.
    """
    X, N, H = q.shape
    S, M = index.shape
    q, k, v = (permute_rows(x.reshape(X, N * H), index.reshape(-1), slot).reshape(S, M, N, H) for x in (q, k, v))
    scores = jnp.einsum("smnh,stnh->snmt", q * (H**-0.5), k, preferred_element_type=jnp.float32)
    scores = jnp.where((index < X)[:, None, None, :], scores, _MASKED)
    out = jnp.einsum("snmt,stnh->smnh", _softmax(scores, v.dtype), v)
    return permute_rows(out.reshape(S * M, N * H), slot, index.reshape(-1)).reshape(X, N, H)


@jax.custom_vjp
def permute_rows(x, index, inverse):
    """x[index] along axis 0, zero where index == len(x); its gradient is a gather by `inverse`, not a scatter.

    `inverse[i]` is the place j with index[j] == i, or len(index) where there is none.
    """
    return jnp.take(x, index, axis=0, mode="fill", fill_value=0)


def _permute_fwd(x, index, inverse):
    return permute_rows(x, index, inverse), (inverse,)


def _permute_bwd(residuals, g):
    (inverse,) = residuals
    return jnp.take(g, inverse, axis=0, mode="fill", fill_value=0), None, None


permute_rows.defvjp(_permute_fwd, _permute_bwd)


def _softmax(scores, dtype):
    return jax.nn.softmax(scores, axis=-1).astype(dtype)
