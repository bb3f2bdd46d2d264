"""What RIL minimises, as pure functions of arrays: advantages, Eq. 1 (discriminator), Eq. 2 (student), neighbours.

The order is Algorithm 2's: similarity reward, advantages, discriminator update, student update. Nothing here knows
models, data or configs, and every loss is a sum over a constant, so that adding up micro-batches is exact.
"""

from collections.abc import Mapping
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ril_jax.errors import InputError

HostOrDevice = Array | np.ndarray  # what a caller may give where the result is on the device

# As TRL and verl have it: keeps a group whose rewards are all equal at advantage 0 instead of 0/0.
STD_EPSILON = 1e-4


def similarity_reward(
    logits: HostOrDevice, kind: Literal["binary", "continuous", "levels", "score"] = "binary", levels: int | None = None
) -> Array:
    """R_sim of the discriminator's logits (any shape), float32 in [0, 1]; 1 is "looks like a teacher's".

    With D = sigmoid(logit): "binary" is 1[D < 0.5], strict, so an untrained D (logit 0) rewards nobody; "continuous" is
    1 - D; "levels" rounds 1 - D to `levels` evenly spaced values, 0 and 1 among them, a tie going to the lower one;
    "score" is the raw logit, the reward of `gad_pair_loss` (unbounded, and high for the teacher there). NaN stays NaN.
    Raises InputError for an unknown kind or fewer than 2 levels. Paper section 4.1 and Fig. 6.
    """
    logits = _float32(logits)
    if kind == "score":
        return logits
    if kind == "continuous":
        return jax.nn.sigmoid(-logits)
    if kind == "binary":
        reward = (logits < 0).astype(jnp.float32)
    elif kind == "levels":
        if levels is None or levels < 2:
            raise InputError(f"levels of the similarity reward is {levels}: give 2 or more.")
        reward = jnp.ceil(jax.nn.sigmoid(-logits) * (levels - 1) - 0.5) / (levels - 1)
    else:
        raise InputError(f"similarity reward {kind!r} is unknown: use binary, continuous, levels or score.")
    return jnp.where(jnp.isnan(logits), jnp.nan, reward)


def group_advantages(rewards_bg: HostOrDevice, scale: Literal["none", "std"] = "none") -> Array:
    """A_i = R_i - mean of its group: rewards [B, G'] -> advantages [B, G'], float32; G' is 2G in RIL, else G.

    "none" is Dr.GRPO's and the paper's choice; "std" divides by the group's sample standard deviation (one degree of
    freedom taken off) + 1e-4, which is GRPO as TRL, verl and Tunix have it. Raises InputError for another scale.
    """
    rewards_bg = _float32(rewards_bg)
    advantages_bg: Array = rewards_bg - rewards_bg.mean(axis=-1, keepdims=True)
    if scale == "none":
        return advantages_bg
    if scale != "std":
        raise InputError(f"scale of the advantages is {scale!r}: use 'none' (Dr.GRPO) or 'std' (GRPO).")
    degrees = max(rewards_bg.shape[-1] - 1, 1)
    std_b1 = jnp.sqrt(jnp.sum(advantages_bg**2, axis=-1, keepdims=True) / degrees)
    return advantages_bg / (std_b1 + STD_EPSILON)


def discriminator_loss(student_logits: Array, teacher_logits: Array) -> Array:
    """Eq. 1 as a loss: -mean log D(student) - mean log(1 - D(teacher)), from logits [N] each; a float32 scalar.

    Student -> 1 and teacher -> 0. It is 2 log 2 at zero logits.
    """
    return -jax.nn.log_sigmoid(_float32(student_logits)).mean() - jax.nn.log_sigmoid(-_float32(teacher_logits)).mean()


def gad_pair_loss(student_scores: Array, teacher_scores: Array) -> Array:
    """Bradley-Terry loss over pairs of the same question: mean of -log sigmoid(teacher - student), scores [N] each.

    The score is *high* for the teacher, other than Eq. 1's logit; pair it with `similarity_reward(kind="score")`.
    Raises InputError when the two are not paired one to one. GAD, arXiv 2511.10643.
    """
    if student_scores.shape != teacher_scores.shape:
        raise InputError(
            f"GAD's loss wants one teacher response a student response, not {teacher_scores.shape} "
            f"for {student_scores.shape}."
        )
    margin = _float32(teacher_scores) - _float32(student_scores)
    return -jax.nn.log_sigmoid(margin).mean()


def discriminator_accuracy(student_logits: HostOrDevice, teacher_logits: HostOrDevice) -> Array:
    """Share of logits [N] each that the binary rule (below 0: a teacher) tells right, both sides weighing half."""
    return 0.5 * (student_logits >= 0).mean(dtype=jnp.float32) + 0.5 * (teacher_logits < 0).mean(dtype=jnp.float32)


def policy_loss(
    new_logprobs: Array,
    old_logprobs: Array | None,
    ref_logprobs: Array | None,
    advantages: Array,
    mask: Array,
    *,
    epsilon: float,
    beta: float,
    normalizer: float | Array,
    epsilon_high: float | None = None,
    loss_type: Literal["dr_grpo", "grpo"] = "dr_grpo",
) -> tuple[Array, dict[str, Array]]:
    """Eq. 2 as a loss: -(masked sum of min(rho A, clip(rho) A) - beta k3) / normalizer, and its metrics.

    Log-probs and mask [rows, tokens] (any float dtype, mask also bool), advantages [rows]; all sums in float32. What
    stands under mask 0 is never read, be it NaN. `old_logprobs=None` means pi_old = pi (mu = 1: the same value and
    gradient without a second pass); `ref_logprobs=None` is allowed with beta 0 only. The clip range is
    [1 - epsilon, 1 + epsilon_high], with epsilon_high = epsilon if not given.

    `normalizer` is a constant of the whole optimiser step, so the losses of its micro-batches simply add up:
    "dr_grpo" 2G * B * L, with L the generation budget and never the padded width; "grpo" takes the mean over each
    response's own tokens first, and then `normalizer` is the number of rows, 2G * B.

    Metrics, float32 scalars: `num_tokens` (mask count), and means over those tokens: `kl` (k3; only with
    ref_logprobs), `ratio_mean`, `clip_ratio/low_mean`, `clip_ratio/high_mean`. `combine_metrics` merges micro-batches.
    Raises InputError for an unknown loss_type or beta without a reference. Paper Eq. 2, Dr.GRPO (arXiv 2503.20783).
    """
    if beta != 0 and ref_logprobs is None:
        raise InputError(f"beta is {beta} but there are no reference log-probs: give ref_logprobs or set beta to 0.")
    token_mask = jnp.asarray(mask, bool)
    new = _masked(new_logprobs, token_mask)
    old = jax.lax.stop_gradient(new if old_logprobs is None else _masked(old_logprobs, token_mask))
    advantage = jax.lax.stop_gradient(_float32(advantages))[:, None]
    low, high = 1.0 - epsilon, 1.0 + (epsilon if epsilon_high is None else epsilon_high)

    rho = jnp.exp(new - old)
    surrogate = jnp.minimum(rho * advantage, jnp.clip(rho, low, high) * advantage)
    measured = {
        "ratio_mean": rho,
        "clip_ratio/low_mean": (rho < low) & (advantage < 0),
        "clip_ratio/high_mean": (rho > high) & (advantage > 0),
    }
    if ref_logprobs is not None:
        log_ratio = jax.lax.stop_gradient(_masked(ref_logprobs, token_mask)) - new
        k3 = jnp.expm1(log_ratio) - log_ratio
        surrogate = surrogate - beta * k3
        measured["kl"] = k3

    weights = token_mask.astype(jnp.float32)
    if loss_type == "grpo":
        weights = weights / jnp.maximum(weights.sum(axis=-1, keepdims=True), 1.0)
    elif loss_type != "dr_grpo":
        raise InputError(f"loss_type {loss_type!r} is unknown: use 'dr_grpo' or 'grpo'.")
    loss = -jnp.sum(weights * surrogate) / normalizer

    num_tokens = token_mask.sum(dtype=jnp.float32)
    metrics = {
        name: jnp.sum(jnp.where(token_mask, jax.lax.stop_gradient(value), 0.0), dtype=jnp.float32)
        / jnp.maximum(num_tokens, 1.0)
        for name, value in measured.items()
    }
    return loss, {**metrics, "num_tokens": num_tokens}


def combine_metrics(metrics_m: Mapping[str, Array]) -> dict[str, Array]:
    """Merges the metrics of M micro-batches, each stacked to [M], into those of the whole: weighted by `num_tokens`."""
    tokens_m = metrics_m["num_tokens"]
    total = tokens_m.sum()
    means = {
        name: jnp.sum(value_m * tokens_m) / jnp.maximum(total, 1.0)
        for name, value_m in metrics_m.items()
        if name != "num_tokens"
    }
    return {**means, "num_tokens": total}


def sft_loss(logprobs: Array, mask: Array, *, normalizer: float | Array | None = None) -> Array:
    """Mean negative log-likelihood of the response tokens: log-probs and mask [rows, tokens] -> float32 scalar.

    `normalizer` is the token count of the whole optimiser step when this is one of its micro-batches; without it, the
    mask's own count.
    """
    token_mask = jnp.asarray(mask, bool)
    if normalizer is None:
        normalizer = jnp.maximum(token_mask.sum(dtype=jnp.float32), 1.0)
    return -jnp.sum(_masked(logprobs, token_mask)) / normalizer


def chunked_logprobs(
    hidden_nd: Array,
    head: Array,
    targets_n: HostOrDevice,
    *,
    chunk: int,
    with_entropy: bool = True,
    tied: bool = False,
) -> tuple[Array, Array | None]:
    """Log-probs of targets [N] int32 and entropies (nats) under softmax(hidden @ head), float32 [N] each.

    hidden [N, D]; head [D, V], or the embedding table [V, D] if `tied`. Logits exist for `chunk` tokens at a time, in
    the forward pass and in the backward pass, which computes them again: never [N, V]. Products are in hidden's dtype
    with float32 accumulation; the log-sum-exp and the head's gradient over chunks are float32. N need not be a multiple
    of `chunk`. The entropy is differentiable, and None if `with_entropy` is False. Raises InputError for chunk < 1.

    A chunk takes every (N / chunk)-th token, so where N is sharded over devices each of them has its share of every
    chunk; for that, choose N a multiple of `chunk` and `chunk` a multiple of the devices.
    """
    if chunk < 1:
        raise InputError(f"the chunk of log-probs is {chunk} tokens: give 1 or more.")
    logprobs_n, entropy_n = _chunked_logprobs(min(chunk, hidden_nd.shape[0]) or 1, tied, hidden_nd, head, targets_n)
    return logprobs_n, entropy_n if with_entropy else None


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _chunked_logprobs(chunk: int, tied: bool, hidden_nd: Array, head: Array, targets_n: Array) -> tuple[Array, Array]:
    return _chunked_logprobs_fwd(chunk, tied, hidden_nd, head, targets_n)[0]


def _chunked_logprobs_fwd(chunk, tied, hidden_nd, head, targets_n):
    head_in = head.astype(hidden_nd.dtype)

    def body(_, inputs):
        hidden_cd, targets_c = inputs
        logits_cv = _logits(hidden_cd, head_in, tied)
        lse_c = jax.nn.logsumexp(logits_cv, axis=-1)
        logprobs_c = jnp.sum(jnp.where(_one_hot(targets_c, logits_cv), logits_cv, 0.0), axis=-1) - lse_c
        entropy_c = lse_c - jnp.sum(jnp.exp(logits_cv - lse_c[:, None]) * logits_cv, axis=-1)
        return None, (logprobs_c, entropy_c, lse_c)

    _, per_chunk = jax.lax.scan(body, None, (_split(hidden_nd, chunk), _split(targets_n, chunk)))
    logprobs_n, entropy_n, lse_n = (_join(x, len(targets_n)) for x in per_chunk)
    return (logprobs_n, entropy_n), (hidden_nd, head, targets_n, lse_n, entropy_n)


def _chunked_logprobs_bwd(chunk, tied, residuals, cotangents):
    hidden_nd, head, targets_n, lse_n, entropy_n = residuals
    head_in = head.astype(hidden_nd.dtype)

    def body(head_grad, inputs):
        hidden_cd, targets_c, lse_c, entropy_c, d_logprobs_c, d_entropy_c = inputs
        logits_cv = _logits(hidden_cd, head_in, tied)
        log_p_cv = logits_cv - lse_c[:, None]
        p_cv = jnp.exp(log_p_cv)
        # d logprob / d logits = one_hot - p, and d entropy / d logits = -p (log p + entropy).
        d_logits_cv = d_logprobs_c[:, None] * (_one_hot(targets_c, logits_cv) - p_cv)
        d_logits_cv -= d_entropy_c[:, None] * p_cv * (log_p_cv + entropy_c[:, None])
        d_logits_cv = d_logits_cv.astype(hidden_cd.dtype)
        to_hidden, to_head = ("cv,vd->cd", "cv,cd->vd") if tied else ("cv,dv->cd", "cv,cd->dv")
        d_hidden_cd = jnp.einsum(to_hidden, d_logits_cv, head_in, preferred_element_type=jnp.float32)
        head_grad += jnp.einsum(to_head, d_logits_cv, hidden_cd, preferred_element_type=jnp.float32)
        return head_grad, d_hidden_cd.astype(hidden_cd.dtype)

    per_token = (hidden_nd, targets_n, lse_n, entropy_n, *cotangents)
    head_grad, d_hidden = jax.lax.scan(
        body, jnp.zeros(head.shape, jnp.float32), tuple(_split(x, chunk) for x in per_token)
    )
    return _join(d_hidden, len(targets_n)), head_grad.astype(head.dtype), None


_chunked_logprobs.defvjp(_chunked_logprobs_fwd, _chunked_logprobs_bwd)


def _logits(hidden_cd: Array, head: Array, tied: bool) -> Array:
    return jnp.einsum("cd,vd->cv" if tied else "cd,dv->cv", hidden_cd, head, preferred_element_type=jnp.float32)


def _one_hot(targets_c: Array, logits_cv: Array) -> Array:
    # A comparison instead of a gather: it fuses into the reduction and stays local where V is sharded.
    return targets_c[:, None] == jnp.arange(logits_cv.shape[-1], dtype=targets_c.dtype)


def _split(x: Array, chunk: int) -> Array:
    """[N, ...] -> [chunks, chunk, ...], zero-padded, token i in chunk i % chunks."""
    chunks = -(-x.shape[0] // chunk)
    x = jnp.pad(x, [(0, chunks * chunk - x.shape[0])] + [(0, 0)] * (x.ndim - 1))
    return jnp.moveaxis(x.reshape(chunk, chunks, *x.shape[1:]), 1, 0)


def _join(x: Array, n: int) -> Array:
    """The inverse of `_split`."""
    return jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:])[:n]


def _masked(x: Array, token_mask: Array) -> Array:
    # Before the exponential, not after: an infinity under the mask would turn its zero gradient into NaN.
    return jnp.where(token_mask, _float32(x), 0.0)


def _float32(x: HostOrDevice) -> Array:
    return jnp.asarray(x, jnp.float32)
