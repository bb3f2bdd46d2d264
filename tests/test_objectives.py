"""Objectives against float64 numpy restatements, hand-computed cases and the checks that follow from Eq. 2."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ril_jax import objectives
from ril_jax.errors import InputError

EPSILON, BETA, G2, B, L = 0.2, 0.01, 4, 3, 32
NORMALIZER = G2 * B * L


@pytest.fixture
def batch():
    """Rows of very different lengths, log-ratios on both sides of the clip range, advantages of both signs."""
    rng = np.random.default_rng(0)
    rows, tokens = G2 * B, 11
    new = rng.uniform(-3.0, -0.1, (rows, tokens))
    lengths = rng.integers(1, tokens + 1, rows)
    return {
        "new": new,
        "old": new + rng.normal(0, 0.3, (rows, tokens)),
        "ref": new + rng.normal(0, 0.5, (rows, tokens)),
        "advantages": rng.normal(0, 1, rows),
        "mask": (np.arange(tokens) < lengths[:, None]).astype(np.float64),
    }


def eq2_in_numpy(new, old, ref, advantages, mask, *, low, high, beta, normalizer, length_mean=False):
    """Eq. 2 token by token in float64, with its gradient by hand."""
    loss, grad, kl, ratio, clipped_low, clipped_high = 0.0, np.zeros_like(new), 0.0, 0.0, 0, 0
    for i, t in zip(*np.nonzero(mask), strict=True):
        weight = 1.0 / mask[i].sum() if length_mean else 1.0
        a, rho = advantages[i], np.exp(new[i, t] - old[i, t])
        log_ratio = ref[i, t] - new[i, t]
        k3 = np.exp(log_ratio) - log_ratio - 1
        clipped = min(max(rho, 1 - low), 1 + high)
        loss -= weight * (min(rho * a, clipped * a) - beta * k3) / normalizer
        inside = rho * a <= clipped * a
        grad[i, t] = -weight * (inside * rho * a - beta * (1 - np.exp(log_ratio))) / normalizer
        kl, ratio = kl + k3, ratio + rho
        clipped_low += rho < 1 - low and a < 0
        clipped_high += rho > 1 + high and a > 0
    n = mask.sum()
    return (
        loss,
        grad,
        {
            "kl": kl / n,
            "ratio_mean": ratio / n,
            "clip_ratio/low_mean": clipped_low / n,
            "clip_ratio/high_mean": clipped_high / n,
            "num_tokens": n,
        },
    )


@partial(jax.jit, static_argnames=("beta", "normalizer", "epsilon_high", "loss_type"))
def step(new, old, ref, advantages, mask, **options):
    def loss(new):
        return objectives.policy_loss(new, old, ref, advantages, mask, epsilon=EPSILON, **options)

    return jax.value_and_grad(loss, has_aux=True)(new)


def loss_and_grad(batch, *, old="old", ref="ref", beta=BETA, normalizer=NORMALIZER, **options):
    fixed = {name: jnp.asarray(value, jnp.float32) for name, value in batch.items()}
    (value, metrics), grad = step(
        fixed["new"],
        fixed[old] if old else None,
        fixed[ref] if ref else None,
        fixed["advantages"],
        fixed["mask"],
        beta=beta,
        normalizer=normalizer,
        **options,
    )
    return value, grad, metrics


# Float32 sums of about 60 terms of order one: 1e-5 relative is far above rounding and far below any wrong term.
CLOSE = {"rtol": 1e-5, "atol": 1e-7}


@pytest.mark.parametrize("epsilon_high", [None, 0.28])
@pytest.mark.parametrize("loss_type", ["dr_grpo", "grpo"])
def test_policy_loss_gradient_and_metrics_equal_eq2_in_float64(batch, loss_type, epsilon_high):
    normalizer = NORMALIZER if loss_type == "dr_grpo" else G2 * B
    value, grad, metrics = loss_and_grad(batch, normalizer=normalizer, loss_type=loss_type, epsilon_high=epsilon_high)
    expected, expected_grad, expected_metrics = eq2_in_numpy(
        **batch,
        low=EPSILON,
        high=epsilon_high or EPSILON,
        beta=BETA,
        normalizer=normalizer,
        length_mean=loss_type == "grpo",
    )
    np.testing.assert_allclose(value, expected, **CLOSE)
    np.testing.assert_allclose(grad, expected_grad, **CLOSE)
    assert metrics.keys() == expected_metrics.keys()
    for name in metrics:
        np.testing.assert_allclose(metrics[name], expected_metrics[name], err_msg=name, **CLOSE)
    assert expected_metrics["clip_ratio/low_mean"] > 0
    assert expected_metrics["clip_ratio/high_mean"] > 0


def test_policy_loss_of_one_token_by_hand():
    # rho = 1.5 is clipped to 1.2 for A = 2: 2.4. ref - new = log 2: k3 = 2 - log 2 - 1 = 0.306853. beta = 0.1, /4.
    value, metrics = objectives.policy_loss(
        jnp.log(jnp.array([[0.3]])),
        jnp.log(jnp.array([[0.2]])),
        jnp.log(jnp.array([[0.6]])),
        jnp.array([2.0]),
        jnp.array([[True]]),
        epsilon=0.2,
        beta=0.1,
        normalizer=4.0,
    )
    np.testing.assert_allclose(value, -(2.4 - 0.1 * 0.30685282) / 4, rtol=1e-6)
    np.testing.assert_allclose(metrics["kl"], 0.30685282, rtol=1e-5)
    assert metrics["clip_ratio/high_mean"] == 1
    assert metrics["num_tokens"] == 1


def test_equal_rewards_leave_only_the_kl_gradient(batch):
    batch["advantages"] = np.asarray(objectives.group_advantages(jnp.full((B, G2), 2.0))).ravel()
    value, grad, metrics = loss_and_grad(batch)
    np.testing.assert_allclose(value, BETA * metrics["kl"] * metrics["num_tokens"] / NORMALIZER, **CLOSE)
    kl_grad = BETA * (1 - np.exp(batch["ref"] - batch["new"])) * batch["mask"] / NORMALIZER
    np.testing.assert_allclose(grad, kl_grad, **CLOSE)
    without_kl = loss_and_grad(batch, beta=0.0, ref=None)
    assert without_kl[0] == 0
    assert not np.any(without_kl[1])


@pytest.mark.parametrize("old", ["new", None])
def test_ratio_is_exactly_one_at_mu_1(batch, old):
    _, _, metrics = loss_and_grad(batch, old=old)
    assert metrics["ratio_mean"] == 1.0
    assert metrics["clip_ratio/low_mean"] == metrics["clip_ratio/high_mean"] == 0


def test_old_logprobs_may_be_left_out_at_mu_1(batch):
    given, left_out = loss_and_grad(batch, old="new"), loss_and_grad(batch, old=None)
    assert given[0] == left_out[0]
    np.testing.assert_array_equal(given[1], left_out[1])


def test_gradient_at_mu_1_is_that_of_advantage_weighted_log_likelihood(batch):
    _, grad, _ = loss_and_grad(batch, old="new", beta=0.0, ref=None)
    np.testing.assert_allclose(grad, -batch["advantages"][:, None] * batch["mask"] / NORMALIZER, **CLOSE)


@pytest.mark.parametrize("loss_type", ["dr_grpo", "grpo"])
@pytest.mark.parametrize("garbage", [0.0, -1e30, np.nan, -np.inf])
def test_extra_padding_changes_nothing(batch, garbage, loss_type):
    padded = {name: np.pad(x, ((0, 0), (0, 5)), constant_values=garbage) for name, x in batch.items() if x.ndim == 2}
    padded["mask"] = np.pad(batch["mask"], ((0, 0), (0, 5)))
    padded["old"][:, -5:] = 3.0
    value, grad, metrics = loss_and_grad(batch, loss_type=loss_type)
    padded_value, padded_grad, padded_metrics = loss_and_grad({**batch, **padded}, loss_type=loss_type)
    np.testing.assert_allclose(padded_value, value, **CLOSE)
    np.testing.assert_array_equal(padded_grad[:, :-5], grad)
    assert not np.any(padded_grad[:, -5:])
    for name in metrics:
        np.testing.assert_allclose(padded_metrics[name], metrics[name], **CLOSE)


@pytest.mark.parametrize("loss_type", ["dr_grpo", "grpo"])
def test_splitting_into_micro_batches_changes_nothing(batch, loss_type):
    value, grad, metrics = loss_and_grad(batch, loss_type=loss_type)
    parts = [
        loss_and_grad({name: x[rows] for name, x in batch.items()}, loss_type=loss_type)
        for rows in (slice(0, 2), slice(2, 3), slice(3, None))
    ]
    np.testing.assert_allclose(sum(p[0] for p in parts), value, rtol=1e-5)
    np.testing.assert_array_equal(np.concatenate([p[1] for p in parts]), grad)
    combined = objectives.combine_metrics(jax.tree.map(lambda *x: jnp.stack(x), *(p[2] for p in parts)))
    assert combined.keys() == metrics.keys()
    for name in metrics:
        np.testing.assert_allclose(combined[name], metrics[name], rtol=1e-5)


def test_a_batch_without_a_single_token_is_zero_and_finite(batch):
    batch["mask"] = np.zeros_like(batch["mask"])
    for loss_type in ("dr_grpo", "grpo"):
        value, grad, metrics = loss_and_grad(batch, loss_type=loss_type)
        assert value == 0
        assert not np.any(grad)
        assert all(metrics[name] == 0 for name in metrics)


def test_advantages_and_reference_receive_no_gradient(batch):
    x = {name: jnp.asarray(value, jnp.float32) for name, value in batch.items()}

    def loss(old, ref, advantages):
        return objectives.policy_loss(x["new"], old, ref, advantages, x["mask"], epsilon=0.2, beta=0.1, normalizer=1.0)[
            0
        ]

    for grad in jax.grad(loss, argnums=(0, 1, 2))(x["old"], x["ref"], x["advantages"]):
        assert not np.any(grad)


def test_beta_without_a_reference_and_unknown_names_are_refused(batch):
    with pytest.raises(InputError, match="ref_logprobs"):
        loss_and_grad(batch, ref=None)
    with pytest.raises(InputError, match="dr_grpo"):
        loss_and_grad(batch, loss_type="bnpo")
    with pytest.raises(InputError, match="std"):
        objectives.group_advantages(jnp.zeros((1, 2)), scale="batch")
    with pytest.raises(InputError, match="binary"):
        objectives.similarity_reward(jnp.zeros(2), "ternary")
    with pytest.raises(InputError, match="levels"):
        objectives.similarity_reward(jnp.zeros(2), "levels", levels=1)


def test_advantages_by_hand():
    rewards = jnp.array([[2.0, 0.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    np.testing.assert_array_equal(objectives.group_advantages(rewards), [[1, -1, 0, 0], [0, 0, 0, 0]])
    # Sample variance of the first group: (1 + 1) / 3.
    std = np.sqrt(2 / 3) + 1e-4
    scaled = objectives.group_advantages(rewards, scale="std")
    np.testing.assert_allclose(scaled, [[1 / std, -1 / std, 0, 0], [0, 0, 0, 0]], rtol=1e-6)
    np.testing.assert_array_equal(objectives.group_advantages(jnp.array([[3.0]]), scale="std"), [[0]])


def test_advantages_equal_numpy_in_float64():
    rewards = np.random.default_rng(1).uniform(0, 2, (5, 8))
    centred = rewards - rewards.mean(1, keepdims=True)
    np.testing.assert_allclose(objectives.group_advantages(jnp.asarray(rewards)), centred, atol=1e-6)
    scaled = centred / (rewards.std(1, ddof=1, keepdims=True) + 1e-4)
    np.testing.assert_allclose(objectives.group_advantages(jnp.asarray(rewards), "std"), scaled, atol=1e-5)


def test_discriminator_loss_equals_eq1_in_float64():
    rng = np.random.default_rng(2)
    student, teacher = rng.normal(0, 3, 16), rng.normal(0, 3, 16)
    d_student, d_teacher = 1 / (1 + np.exp(-student)), 1 / (1 + np.exp(-teacher))
    expected = -np.mean(np.log(d_student) + np.log(1 - d_teacher))
    loss, grads = jax.value_and_grad(objectives.discriminator_loss, argnums=(0, 1))(
        jnp.asarray(student, jnp.float32), jnp.asarray(teacher, jnp.float32)
    )
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    np.testing.assert_allclose(grads[0], -(1 - d_student) / 16, rtol=1e-4)
    np.testing.assert_allclose(grads[1], d_teacher / 16, rtol=1e-4)


def test_discriminator_loss_by_hand_and_far_out():
    zeros = jnp.zeros(3)
    np.testing.assert_allclose(objectives.discriminator_loss(zeros, zeros), 2 * np.log(2), rtol=1e-6)
    far = jnp.array([1e4])
    assert objectives.discriminator_loss(far, -far) == 0
    assert objectives.discriminator_loss(-far, far) == 2e4
    assert np.all(np.isfinite(jax.grad(objectives.discriminator_loss)(-far, far)))


def test_gad_pair_loss_equals_numpy_and_wants_pairs():
    rng = np.random.default_rng(3)
    student, teacher = rng.normal(size=7), rng.normal(size=7)
    expected = np.mean(np.log1p(np.exp(student - teacher)))
    np.testing.assert_allclose(objectives.gad_pair_loss(student, teacher), expected, rtol=1e-6)
    # The teacher ahead by log 3: sigmoid = 3/4.
    by_hand = objectives.gad_pair_loss(jnp.array([0.0]), jnp.log(jnp.array([3.0])))
    np.testing.assert_allclose(by_hand, np.log(4 / 3), rtol=1e-6)
    with pytest.raises(InputError, match="one teacher response"):
        objectives.gad_pair_loss(jnp.zeros(2), jnp.zeros(3))


def test_discriminator_accuracy_uses_the_reward_rule():
    assert objectives.discriminator_accuracy(jnp.zeros(4), jnp.zeros(4)) == 0.5
    accuracy = objectives.discriminator_accuracy(jnp.array([1.0, -1.0]), jnp.array([-1.0, -2.0, -3.0, 4.0]))
    assert accuracy == 0.5 * 0.5 + 0.5 * 0.75


def test_similarity_rewards_by_hand():
    logits = jnp.array([-5.0, -0.1, 0.0, 0.1, 5.0, jnp.nan])
    np.testing.assert_array_equal(objectives.similarity_reward(logits), [1, 1, 0, 0, 0, np.nan])
    expected = 1 / (1 + np.exp(np.array([-5.0, -0.1, 0.0, 0.1, 5.0, np.nan])))
    np.testing.assert_allclose(objectives.similarity_reward(logits, "continuous"), expected, rtol=1e-6)
    np.testing.assert_array_equal(objectives.similarity_reward(logits, "levels", 3), [1, 0.5, 0.5, 0.5, 0, np.nan])
    np.testing.assert_array_equal(objectives.similarity_reward(logits, "score"), logits)


@pytest.mark.parametrize("levels", [2, 3, 11])
def test_levels_are_evenly_spaced_include_0_and_1_and_two_levels_are_the_binary_rule(levels):
    logits = jnp.linspace(-12, 12, 2001)
    reward = np.asarray(objectives.similarity_reward(logits, "levels", levels))
    np.testing.assert_allclose(np.unique(reward), np.linspace(0, 1, levels), atol=1e-6)
    assert np.all(np.diff(reward) <= 0)
    assert np.max(np.abs(reward - 1 / (1 + np.exp(np.asarray(logits, np.float64))))) <= 0.5 / (levels - 1) + 1e-6
    if levels == 2:
        np.testing.assert_array_equal(reward, objectives.similarity_reward(logits))


def test_sft_loss_is_the_masked_mean_and_adds_up_over_micro_batches(batch):
    expected = -(batch["new"] * batch["mask"]).sum() / batch["mask"].sum()
    logprobs, mask = jnp.asarray(batch["new"], jnp.float32), jnp.asarray(batch["mask"])
    np.testing.assert_allclose(objectives.sft_loss(logprobs, mask), expected, rtol=1e-6)
    total = batch["mask"].sum()
    halves = (slice(0, 5), slice(5, None))
    parts = [objectives.sft_loss(logprobs[rows], mask[rows], normalizer=total) for rows in halves]
    np.testing.assert_allclose(sum(parts), expected, rtol=1e-6)
    by_hand = objectives.sft_loss(jnp.array([[-1.0, -2.0], [-4.0, np.nan]]), jnp.array([[0, 1], [1, 0]]))
    assert by_hand == 3.0


def dense_logprobs(hidden, head, targets):
    log_p = jax.nn.log_softmax(hidden @ head, axis=-1)
    return jnp.take_along_axis(log_p, targets[:, None], axis=1)[:, 0], -(jnp.exp(log_p) * log_p).sum(-1)


def head_problem(n=23, d=6, v=37, dtype=np.float64):
    rng = np.random.default_rng(4)
    return (
        rng.normal(size=(n, d)).astype(dtype),
        rng.normal(size=(d, v)).astype(dtype),
        rng.integers(0, v, n).astype(np.int32),
        rng.normal(size=(2, n)).astype(dtype),
    )


@cache
def dense_in_float64():
    hidden, head, targets, weights = head_problem()

    def loss(hidden, head):
        out = dense_logprobs(hidden, head, targets)
        return (jnp.stack(out) * weights).sum(), out

    with jax.enable_x64(True):
        (_, out), grads = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(hidden, head)
        return jax.tree.map(np.asarray, (out, grads))


@pytest.mark.parametrize(("chunk", "tied"), [(1, False), (8, False), (8, True), (23, True), (100, False)])
def test_chunked_logprobs_entropies_and_gradients_equal_the_dense_ones(chunk, tied):
    hidden, head, targets, weights = head_problem()
    dense, dense_grads = dense_in_float64()
    ours = jnp.asarray(head.T if tied else head, jnp.float32)

    def chunked(h, w):
        out = objectives.chunked_logprobs(h, w, jnp.asarray(targets), chunk=chunk, tied=tied)
        return (jnp.stack(out) * weights.astype(np.float32)).sum(), out

    (_, out), (d_hidden, d_head) = jax.jit(jax.value_and_grad(chunked, (0, 1), has_aux=True))(
        jnp.asarray(hidden, jnp.float32), ours
    )
    # Float32 against float64 over 37 logits of order a few: 1e-5 leaves one digit of room.
    for got, expected in zip((*out, d_hidden, d_head.T if tied else d_head), (*dense, *dense_grads), strict=True):
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, expected, atol=2e-5)


def test_chunked_logprobs_of_two_words_by_hand():
    hidden, head = jnp.array([[1.0]]), jnp.log(jnp.array([[3.0, 1.0]]))
    logprobs, entropy = objectives.chunked_logprobs(hidden, head, jnp.array([1]), chunk=4)
    np.testing.assert_allclose(logprobs, [np.log(0.25)], rtol=1e-6)
    np.testing.assert_allclose(entropy, [-0.75 * np.log(0.75) - 0.25 * np.log(0.25)], rtol=1e-6)


def test_entropy_can_be_left_out():
    hidden, head, targets, _ = head_problem(dtype=np.float32)
    with_it, _ = objectives.chunked_logprobs(hidden, head, targets, chunk=8)
    without, entropy = objectives.chunked_logprobs(hidden, head, targets, chunk=8, with_entropy=False)
    assert entropy is None
    np.testing.assert_array_equal(with_it, without)
    with pytest.raises(InputError, match="chunk"):
        objectives.chunked_logprobs(hidden, head, targets, chunk=0)


def test_bfloat16_head_gradient_is_summed_over_chunks_in_float32():
    # 512 equal contributions: summed in bfloat16 the total would stick at 256 times one of them.
    hidden = jnp.ones((512, 1), jnp.bfloat16)
    head = jnp.zeros((1, 2), jnp.float32)
    targets = jnp.zeros(512, jnp.int32)

    def loss(head):
        return objectives.chunked_logprobs(hidden, head, targets, chunk=1)[0].sum()

    value, grad = jax.value_and_grad(loss)(head)
    assert grad.dtype == jnp.float32
    np.testing.assert_allclose(value, -512 * np.log(2), rtol=1e-6)
    np.testing.assert_allclose(grad, [[256.0, -256.0]])


def test_tokens_by_vocabulary_never_exists_forward_or_backward():
    n, d, v, chunk = 512, 8, 4096, 32
    hidden, head = jnp.ones((n, d), jnp.float32), jnp.full((d, v), 0.01, jnp.float32)
    targets = jnp.zeros(n, jnp.int32)

    def training_step(logprobs):
        return jax.jit(jax.value_and_grad(lambda h, w: sum(x.sum() for x in logprobs(h, w)), (0, 1)))

    def temporary_bytes(compiled):
        return compiled.lower(hidden, head).compile().memory_analysis().temp_size_in_bytes

    chunked = training_step(lambda h, w: objectives.chunked_logprobs(h, w, targets, chunk=chunk))
    dense = training_step(lambda h, w: dense_logprobs(h, w, targets))
    assert temporary_bytes(dense) >= n * v * 4
    # A few arrays of [chunk, V] and of the head's size, against [N, V] = 16 chunks.
    assert temporary_bytes(chunked) < n * v * 4 / 2
    jaxpr = jax.make_jaxpr(chunked)(hidden, head)
    assert max(_sizes(jaxpr.jaxpr)) == chunk * v


def _sizes(jaxpr):
    for eqn in jaxpr.eqns:
        yield from (int(np.prod(var.aval.shape)) for var in eqn.outvars)
        for inner in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            if hasattr(inner, "eqns"):
                yield from _sizes(inner)
            elif hasattr(inner, "jaxpr"):
                yield from _sizes(inner.jaxpr)
