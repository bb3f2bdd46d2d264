"""The plain XLA forms of attention: what every platform can run, and the reference that any kernel is tested against.

Query heads are kept as [K, N/K] so that key-value heads are never repeated. Scores and softmax are float32. Arguments
and results are those of `models/attention.py`.
"""

import jax
import jax.numpy as jnp

MASKED = -1e30  # finite, so that a row with nothing to see gives a uniform average instead of NaN


def group_attention(q, k, v, valid, *, prompt_len: int, num_responses: int):
    """Prompt and responses apart, so that no score is computed that the mask would drop."""
    B, T, N, H = q.shape
    K = k.shape[2]
    P, S = prompt_len, num_responses
    q = q.reshape(B, T, K, N // K, H) * (H**-0.5)
    causal_pp = jnp.tril(jnp.ones((P, P), bool))
    mask_bpp = causal_pp & valid[:, None, :P]
    scores = jnp.einsum("btkgh,bskh->bkgts", q[:, :P], k[:, :P], preferred_element_type=jnp.float32)
    probs = _softmax(jnp.where(mask_bpp[:, None, None], scores, MASKED), v.dtype)
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
    to_prompt = jnp.where(valid[:, None, None, None, None, :P], to_prompt, MASKED)
    to_own = jnp.where((causal_rr & valid_r[:, :, None, :])[:, None, None], to_own, MASKED)
    probs = _softmax(jnp.concatenate([to_prompt, to_own], axis=-1), v.dtype)
    out_r = jnp.einsum("bkgsrp,bpkh->bsrkgh", probs[..., :P], v[:, :P])
    out_r = out_r + jnp.einsum("bkgsru,bsukh->bsrkgh", probs[..., P:], v_r)
    return jnp.concatenate([out_p, out_r.reshape(B, S * R, N, H)], axis=1)


def decode_attention(q, k_new, v_new, prompt_k, prompt_v, prompt_valid, own_k, own_v, own_len):
    """Scores against prompt, own tokens and the new token itself under one softmax; no cache is copied."""
    B, G, N, H = q.shape
    K = k_new.shape[2]
    P, R = prompt_k.shape[2], own_k.shape[3]
    # Heads before samples: the order of the caches, so that only the one new token is ever transposed.
    q = jnp.swapaxes(q.reshape(B, G, K, N // K, H) * (H**-0.5), 1, 2)
    k_new, v_new = jnp.swapaxes(k_new, 1, 2), jnp.swapaxes(v_new, 1, 2)
    to_prompt = jnp.einsum("bkgnh,bkph->bkgnp", q, prompt_k, preferred_element_type=jnp.float32)
    to_own = jnp.einsum("bkgnh,bkgrh->bkgnr", q, own_k, preferred_element_type=jnp.float32)
    to_self = jnp.einsum("bkgnh,bkgh->bkgn", q, k_new, preferred_element_type=jnp.float32)[..., None]
    to_prompt = jnp.where(prompt_valid[:, None, None, None, :], to_prompt, MASKED)
    to_own = jnp.where(jnp.arange(R) < own_len, to_own, MASKED)
    probs = _softmax(jnp.concatenate([to_prompt, to_own, to_self], axis=-1), v_new.dtype)
    out = jnp.einsum("bkgnp,bkph->bkgnh", probs[..., :P], prompt_v)
    out = out + jnp.einsum("bkgnr,bkgrh->bkgnh", probs[..., P : P + R], own_v)
    out = out + probs[..., -1:] * v_new[:, :, :, None, :]
    return jnp.swapaxes(out, 1, 2).reshape(B, G, N, H)


def full_attention(q, k, v):
    """[B, T, N, H] each; all scores at once."""
    scores = jnp.einsum("bmnh,btnh->bnmt", q * (q.shape[-1] ** -0.5), k, preferred_element_type=jnp.float32)
    return jnp.einsum("bnmt,btnh->bmnh", _softmax(scores, v.dtype), v)


def segment_attention(q, k, v, index, slot):
    """Segments as the rows of a batch, each padded to the longest: windows of the vision tower, or whole frames."""
    X, N, H = q.shape
    S, M = index.shape
    q, k, v = (permute_rows(x.reshape(X, N * H), index.reshape(-1), slot).reshape(S, M, N, H) for x in (q, k, v))
    scores = jnp.einsum("smnh,stnh->snmt", q * (H**-0.5), k, preferred_element_type=jnp.float32)
    scores = jnp.where((index < X)[:, None, None, :], scores, MASKED)
    out = jnp.einsum("snmt,stnh->smnh", _softmax(scores, v.dtype), v)
    return permute_rows(out.reshape(S * M, N * H), slot, index.reshape(-1)).reshape(X, N, H)


frame_attention = segment_attention


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
