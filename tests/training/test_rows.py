"""The updates on rows `[prompt | response 1 | ... | response S]`: equal to the unshared form, whatever the packing.

The reference writes every response as a sequence of its own, `[prompt + response]`, under plain causal attention, with
all logits at once and the losses restated here. Everything is float32 on the CPU, where sums of a few thousand products
taken in another order differ by some 1e-6 of the largest value: hence the tolerances.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ril_jax import objectives, sharding
from ril_jax.data.chat import ChatTokenizer, EncodedPrompt
from ril_jax.data.images import PatchedImage
from ril_jax.data.packing import VisionRung, pack_prompts
from ril_jax.data.records import Question
from ril_jax.models.config import ModelConfig, QwenVisionConfig, TextConfig
from ril_jax.pretrained import make_network
from ril_jax.rewards.discriminator import DiscriminatorPrompts, initial_params
from ril_jax.training import discriminator as discriminator_lib
from ril_jax.training import ril as ril_lib
from ril_jax.training.batches import Buckets
from ril_jax.training.programs import Programs
from ril_jax.training.state import TrainState, init_state, make_update, split_frozen, split_micro

B, G, S, R = 4, 2, 4, 7  # questions, student responses, all responses, padded response length
EPSILON, BETA = 0.2, 0.05
PATCH_DIM = 3 * 2 * 14 * 14
RUNG = VisionRung(384, 10, 64)


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """Some sixty programs are compiled here and each runs once: XLA's passes would take most of the time."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def chat(qwen_tokenizer_folder):
    return ChatTokenizer.from_pretrained(qwen_tokenizer_folder)


@pytest.fixture(scope="module")
def config(chat):
    """Grouped queries, an untied head, and windowed vision blocks before a full one."""
    text = TextConfig(
        vocab_size=-(-chat.vocab_size // 8) * 8, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, rms_norm_eps=1e-6, rope_theta=1e4,
        mrope_section=(2, 1, 1),
    )  # fmt: skip
    vision = QwenVisionConfig(
        depth=2, hidden_size=16, intermediate_size=24, num_heads=2, out_hidden_size=32, fullatt_block_indexes=(1,)
    )
    image, start = chat.image_token_id, chat.vision_start_token_id
    return ModelConfig("qwen2_5_vl", text, vision, image, chat.video_token_id, start, start + 1)


@pytest.fixture(scope="module")
def network(config):
    return make_network(config)


@pytest.fixture(scope="module")
def params(network):
    return random_params(network, 0)


@pytest.fixture(scope="module")
def programs(network):
    return Programs(network, jnp.float32, remat="none", chunk=16)


@pytest.fixture(scope="module")
def batch(config):
    """Four questions: an image, a larger one of several windows, none, and two; with responses of many lengths."""
    rng = np.random.default_rng(0)
    sizes = [[(4, 4)], [(10, 6)], [], [(2, 4), (6, 2)]]
    prompts = [random_prompt(rng, config, 4 + 3 * i, images) for i, images in enumerate(sizes)]
    lengths = rng.integers(1, R + 1, (B, S))
    lengths[0, 0], lengths[1, 2] = 1, R
    responses = [[rng.integers(10, 250, n).astype(np.int32) for n in row] for row in lengths]
    rewards = rng.integers(0, 3, (B, S)).astype(np.float32)
    assert (np.ptp(rewards, axis=1) > 0).all()
    return dataclasses.make_dataclass("Batch", ["prompts", "responses", "advantages", "old_shift", "ref_shift"])(
        prompts,
        responses,
        np.asarray(objectives.group_advantages(rewards)),
        rng.normal(scale=0.3, size=(B, S, R)).astype(np.float32),
        rng.normal(scale=0.5, size=(B, S, R)).astype(np.float32),
    )


def random_params(network, seed):
    """Random everywhere, biases and norms too, so that nothing is left out by being zero."""
    rng = np.random.default_rng(seed)
    scales = {"zeros": 0.1, "ones": 0.1, "normal": 0.15}
    return {
        name: jnp.asarray((spec.init == "ones") + scales[spec.init] * rng.normal(size=spec.shape), jnp.float32)
        for name, spec in network.specs.items()
    }


def random_prompt(rng, config, num_text, sizes):
    ids, images = list(rng.integers(10, 250, 2)), []
    for h, w in sizes:
        images.append(PatchedImage(rng.normal(size=(h * w, PATCH_DIM)).astype(np.float32), (1, h, w)))
        ids += [config.vision_start_token_id, *[config.image_token_id] * (h * w // 4), config.vision_end_token_id]
    return EncodedPrompt(np.array([*ids, *rng.integers(10, 250, num_text)], np.int32), tuple(images))


@functools.cache
def recorder() -> optax.GradientTransformation:
    """Clipped gradient descent that keeps the gradients as its state."""
    step = optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(0.1))
    zeros = lambda params: jax.tree.map(jnp.zeros_like, params)  # noqa: E731
    return optax.GradientTransformation(zeros, lambda g, _, p: (step.update(g, step.init(p), p)[0], g))


# --- the three updates, packed in any way -----------------------------------------------------------------------------


def buckets_of(config, prompt_len=40, response_len=R):
    return Buckets(config, (prompt_len,), (response_len,), (RUNG,))


def update_policy(
    programs, params, batch, *, micro=B, rows=None, train_vision=False,
    prompt_len=40, response_len=R,
):  # fmt: skip
    """The policy update of RIL; `rows` = [(question, [responses])] if not all responses of a question stand in one."""
    rows = rows or [(b, list(range(S))) for b in range(B)]
    count, slots = len(rows), len(rows[0][1])
    micro = min(micro * count // B, count)
    buckets = buckets_of(programs.network.bind(programs.network.abstract()).config, prompt_len, response_len)
    trained, frozen = split_frozen(params, train_vision=train_vision)
    prompts = buckets.pack_prompts([batch.prompts[b] for b, _ in rows], batch=count, micro=micro)
    features = programs.encode(params, prompts.vision)
    tower = prompts.vision if train_vision else None
    prompts = prompts._replace(vision=None)
    responses = buckets.pack_responses(
        [[batch.responses[b][s] for s in slots] for b, slots in rows], batch=count, micro=micro
    )
    logprobs, _ = programs.score(params, prompts, responses, features)

    def pick(values):
        values = np.stack([values[b, slots] for b, slots in rows])
        values = np.pad(values, [(0, 0)] * 2 + [(0, response_len - R)] * (values.ndim - 2))
        return split_micro(values, count // micro)

    old, ref = logprobs + pick(batch.old_shift), logprobs + pick(batch.ref_shift)
    normalizer = np.full((count // micro,), B * S * 8, np.float32)
    optimizer = recorder()
    update = ril_lib._policy_update(programs, optimizer, min(G, slots), EPSILON, None, BETA, "dr_grpo")
    state = init_state({n: p.copy() for n, p in trained.items()}, optimizer, sharding.make_mesh())
    sampled = split_micro(np.zeros((count, min(G, slots), response_len), np.float32), count // micro)
    advantages = pick(batch.advantages)
    micro_batches = (prompts, responses, responses.mask, sampled, advantages, features, tower, old, ref, normalizer)
    return update(state, frozen, micro_batches)


def update_sft(programs, params, batch, *, micro=B, prompt_len=40, response_len=R):
    buckets = buckets_of(programs.network.bind(programs.network.abstract()).config, prompt_len, response_len)
    prompts = buckets.pack_prompts(batch.prompts, batch=B, micro=micro)
    responses = buckets.pack_responses(batch.responses, batch=B, micro=micro)
    optimizer = recorder()
    state = init_state({n: p.copy() for n, p in params.items()}, optimizer, sharding.make_mesh())
    normalizer = np.full((B // micro,), responses.mask.sum(), np.float32)
    return make_update(programs.sft_loss, optimizer)(state, {}, (prompts, responses, normalizer))


def update_discriminator(programs, params, batch, *, micro=B, loss="gail", prompt_len=40, response_len=R):
    buckets = buckets_of(programs.network.bind(programs.network.abstract()).config, prompt_len, response_len)
    prompts = buckets.pack_prompts(batch.prompts, batch=B, micro=micro)
    responses = buckets.pack_responses(batch.responses, batch=B, micro=micro)
    trained, frozen = split_frozen(params, train_vision=False)
    optimizer = recorder()
    state = init_state({n: p.copy() for n, p in trained.items()}, optimizer, sharding.make_mesh())
    update = discriminator_lib._make_update(programs, optimizer, loss, G)
    return update(state, frozen, (prompts, responses, np.full((B // micro,), B // micro, np.float32)))


@pytest.fixture(scope="module")
def d_programs(config):
    network = make_network(config, head="scalar")
    return Programs(network, jnp.float32, remat="none", chunk=16)


@pytest.fixture(scope="module")
def d_params(d_programs):
    return random_params(d_programs.network, 1)


UPDATES = {"policy": update_policy, "sft": update_sft, "discriminator": update_discriminator}


@pytest.fixture
def of_kind(programs, params, d_programs, d_params):
    """(programs, params) of an update by its name."""
    return lambda kind: (d_programs, d_params) if kind == "discriminator" else (programs, params)


@pytest.fixture(scope="module")
def whole_batch(programs, params, d_programs, d_params, batch):
    """(state, metrics) of each update with the whole batch at once."""
    results = {}
    for kind, update in UPDATES.items():
        of = (d_programs, d_params) if kind == "discriminator" else (programs, params)
        results[kind] = update(*of, batch)
    return results


# --- the unshared form, restated --------------------------------------------------------------------------------------


def unshared_hidden(network, params, config, batch):
    """Final hidden states [B*S, T, D] of every `prompt + response` as a row of its own, padded on the left."""
    sequences = [
        EncodedPrompt(np.concatenate([prompt.token_ids, response]), prompt.images)
        for prompt, row in zip(batch.prompts, batch.responses, strict=True)
        for response in row
    ]
    rung = VisionRung(4 * 384, 40, 64)
    packed = pack_prompts(sequences, config, batch=B * S, prompt_len=48, rung=rung)
    model = network.bind(params)
    features = model.encode(packed.vision, dtype=jnp.float32)
    x = model.embed(packed.token_ids, features, packed.feature_index, dtype=jnp.float32)
    hidden, _ = model.text.rows(x, packed.positions, packed.valid, prompt_len=48)
    return model, hidden, packed.token_ids


def unshared_logprobs(network, params, config, batch):
    """Log-probs of all response tokens, a list of [length] in the order of (question, response)."""
    model, hidden, ids = unshared_hidden(network, params, config, batch)
    logprobs = jax.nn.log_softmax(model.text.logits(hidden))[:, :-1]
    chosen = jnp.take_along_axis(logprobs, ids[:, 1:, None], axis=-1)[..., 0]
    lengths = [len(response) for row in batch.responses for response in row]
    return [chosen[i, -n:] for i, n in enumerate(lengths)]


def unshared_policy_loss(params, old, ref, *, network, config, batch):
    total = 0.0
    for i, new in enumerate(unshared_logprobs(network, params, config, batch)):
        b, s = divmod(i, S)
        advantage = batch.advantages[b, s]
        ratio = jnp.exp(new - old[i])
        clipped = jnp.clip(ratio, 1 - EPSILON, 1 + EPSILON)
        k3 = jnp.exp(ref[i] - new) - (ref[i] - new) - 1
        total += jnp.sum(jnp.minimum(ratio * advantage, clipped * advantage) - BETA * k3)
    return -total / (B * S * 8)


def assert_same_gradients(ours, theirs, *, tolerance=5e-6):
    assert set(ours) == set(theirs)
    largest = max(float(jnp.abs(g).max()) for g in theirs.values())
    for name, gradient in theirs.items():
        assert float(jnp.abs(gradient).max()) > 0, f"{name} has no gradient: the test would not see it"
        np.testing.assert_allclose(ours[name], gradient, rtol=1e-3, atol=tolerance * largest, err_msg=name)


def with_gradient(gradients):
    """Without what has no gradient at all, such as the biases of the tower's keys in a window of one."""
    return {n: g for n, g in gradients.items() if float(jnp.abs(g).max()) > 0}


def test_group_loss_and_gradients_equal_the_unshared_form(programs, params, network, config, batch, whole_batch):
    plain = jax.jit(lambda p: unshared_logprobs(network, p, config, batch))(params)
    shift = lambda values: [x + values.reshape(-1, R)[i, : len(x)] for i, x in enumerate(plain)]  # noqa: E731
    old, ref = shift(batch.old_shift), shift(batch.ref_shift)

    def loss(params):
        return unshared_policy_loss(params, old, ref, network=network, config=config, batch=batch)

    value, gradients = jax.jit(jax.value_and_grad(loss))(params)
    state, metrics = whole_batch["policy"]
    np.testing.assert_allclose(metrics["loss"], value, rtol=2e-5)
    clipped = metrics["clip_ratio/low_mean"] + metrics["clip_ratio/high_mean"]
    assert clipped > 0, "nothing is clipped: the test would not see the clip"
    assert_same_gradients(state.opt, {n: g for n, g in gradients.items() if not n.startswith("vision.")})

    # With the tower in training each micro-batch encodes its own images.
    state, metrics = update_policy(programs, params, batch, train_vision=True, micro=1)
    np.testing.assert_allclose(metrics["loss"], value, rtol=2e-5)
    assert_same_gradients({n: state.opt[n] for n in with_gradient(gradients)}, with_gradient(gradients))


def test_one_row_of_s_responses_equals_s_rows_of_one(programs, params, batch, whole_batch):
    apart = [(b, [s]) for b in range(B) for s in range(S)]
    rung = dataclasses.replace(RUNG, patches=4 * RUNG.patches, images=4 * RUNG.images)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "RUNG", rung)
        state, metrics = update_policy(programs, params, batch, rows=apart)
    together, shared_metrics = whole_batch["policy"]
    np.testing.assert_allclose(metrics["loss"], shared_metrics["loss"], rtol=2e-5)
    for name in ("kl", "ratio_mean", "clip_ratio/low_mean", "clip_ratio/high_mean", "tokens"):
        np.testing.assert_allclose(metrics[name], shared_metrics[name], rtol=2e-5, err_msg=name)
    assert_same_gradients(together.opt, state.opt)


def test_sft_loss_and_gradients_equal_the_unshared_form_vision_tower_included(
    params, network, config, batch, whole_batch
):
    def loss(params):
        rows = unshared_logprobs(network, params, config, batch)
        return -jnp.concatenate(rows).mean()

    value, gradients = jax.jit(jax.value_and_grad(loss))(params)
    state, metrics = whole_batch["sft"]
    np.testing.assert_allclose(metrics["loss"], value, rtol=2e-5)
    assert any(name.startswith("vision.") for name in gradients)
    assert_same_gradients({n: state.opt[n] for n in with_gradient(gradients)}, with_gradient(gradients))


def test_discriminator_loss_and_gradients_equal_those_of_rows_alone(d_programs, d_params, config, batch, whole_batch):
    trained, frozen = split_frozen(d_params, train_vision=False)

    def loss(trained):
        model, hidden, _ = unshared_hidden(d_programs.network, trained | frozen, config, batch)
        logits = model.text.score(hidden[:, -1])[:, 0].reshape(B, S)
        student, teacher = jax.nn.sigmoid(logits[:, :G]), jax.nn.sigmoid(logits[:, G:])
        return -jnp.log(student).mean() - jnp.log(1 - teacher).mean()  # Eq. 1, maximised there

    value, gradients = jax.jit(jax.value_and_grad(loss))(trained)
    state, metrics = whole_batch["discriminator"]
    np.testing.assert_allclose(metrics["loss"], value, rtol=2e-5)
    assert_same_gradients(state.opt, gradients)


# --- what must not matter ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "micro"), [("policy", 2), ("policy", 1), ("sft", 1), ("discriminator", 1)])
def test_micro_batches_make_the_same_update_as_the_whole_batch(kind, micro, of_kind, batch, whole_batch):
    state, metrics = UPDATES[kind](*of_kind(kind), batch, micro=micro)
    whole, whole_metrics = whole_batch[kind]
    assert set(metrics) == set(whole_metrics)
    for name, value in whole_metrics.items():
        np.testing.assert_allclose(metrics[name], value, rtol=3e-5, atol=1e-6, err_msg=name)
    for name, value in whole.params.items():
        np.testing.assert_allclose(state.params[name], value, rtol=0, atol=1e-6, err_msg=name)
        moved = np.abs(np.asarray(value) - np.asarray(of_kind(kind)[1][name])).max()
        assert moved > 2e-6 or name.endswith("k.bias"), f"{name} hardly moves: the test would not see a wrong update"


FORMS = [("policy", "full", 1), ("sft", "dots", True)]


@pytest.mark.parametrize(("kind", "remat", "unroll"), FORMS)
def test_remat_and_unrolled_layers_change_nothing(kind, remat, unroll, of_kind, batch, whole_batch):
    programs, params = of_kind(kind)
    state, metrics = UPDATES[kind](dataclasses.replace(programs, remat=remat, unroll=unroll), params, batch)
    whole, whole_metrics = whole_batch[kind]
    np.testing.assert_allclose(metrics["loss"], whole_metrics["loss"], rtol=1e-5)
    assert_close_gradients(state, whole)


@pytest.mark.parametrize("kind", ["policy", "discriminator"])
def test_larger_buckets_change_nothing(kind, of_kind, batch, whole_batch):
    padding = {"prompt_len": 56, "response_len": 12}
    state, metrics = UPDATES[kind](*of_kind(kind), batch, **padding)
    whole, whole_metrics = whole_batch[kind]
    for name, value in whole_metrics.items():
        np.testing.assert_allclose(metrics[name], value, rtol=3e-5, atol=1e-6, err_msg=name)
    assert_close_gradients(state, whole)


def assert_close_gradients(state: TrainState, whole: TrainState) -> None:
    largest = max(float(jnp.abs(g).max()) for g in whole.opt.values())
    for name, gradient in whole.opt.items():
        np.testing.assert_allclose(state.opt[name], gradient, rtol=1e-3, atol=5e-6 * largest, err_msg=name)


def test_filling_rows_of_a_batch_count_for_nothing(programs, params, batch, config):
    """Two questions in a batch of four rows score as in a batch of two."""
    buckets = buckets_of(config)

    def score(count):
        prompts = buckets.pack_prompts(batch.prompts[:2], batch=count)
        responses = buckets.pack_responses(batch.responses[:2], batch=count)
        features = programs.encode(params, prompts.vision)
        logprobs, entropy = programs.score(params, prompts, responses, features)
        return [np.where(responses.mask, x, 0.0)[0, :2] for x in (logprobs, entropy)]

    for two, four in zip(score(2), score(4), strict=True):
        assert np.isfinite(four).all()
        np.testing.assert_allclose(four, two, rtol=1e-5, atol=1e-6)


# --- frozen tower, and D ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["policy", "discriminator"])
def test_a_frozen_vision_tower_has_neither_gradient_nor_optimiser_state(kind, of_kind, whole_batch):
    everything = set(of_kind(kind)[1])
    tower = {name for name in everything if name.startswith("vision.")}
    state, _ = whole_batch[kind]
    assert tower
    assert set(state.params) == everything - tower
    assert set(state.opt) == everything - tower
    moments = jax.tree_util.tree_leaves_with_path(jax.eval_shape(optax.adamw(1.0).init, state.params))
    assert {path[-1].key for path, _ in moments if hasattr(path[-1], "key")} == everything - tower


def test_discriminator_starts_at_exactly_one_half(d_programs, params, batch, config):
    initial = initial_params(d_programs.network, params, sharding.make_mesh())
    trained, frozen = split_frozen(initial, train_vision=False)
    logits = discriminator_lib._make_logits(d_programs)(trained, frozen, d_batch(batch, config))
    np.testing.assert_array_equal(jax.nn.sigmoid(logits), np.full((1, B, S), 0.5, np.float32))
    np.testing.assert_array_equal(objectives.similarity_reward(logits), np.zeros((1, B, S), np.float32))
    shared = set(params) & set(initial)
    assert shared == set(initial) - {"text.score.kernel", "text.score.bias"}
    for name in shared:
        np.testing.assert_array_equal(initial[name], params[name])


def test_discriminator_reads_the_language_models_last_hidden_state(d_programs, network, params, batch, config):
    hidden = jax.jit(lambda p: unshared_hidden(network, p, config, batch)[1])(params)
    initial = initial_params(d_programs.network, params, sharding.make_mesh())
    logits = discriminator_lib._make_logits(d_programs)
    for component in (0, 13, 31):
        head = np.zeros((32, 1), np.float32)
        head[component] = 1.0
        trained, frozen = split_frozen(initial | {"text.score.kernel": jnp.asarray(head)}, train_vision=False)
        read = logits(trained, frozen, d_batch(batch, config))[0].reshape(-1)
        np.testing.assert_allclose(read, hidden[:, -1, component], rtol=1e-4, atol=2e-5)


def d_batch(batch, config):
    buckets = buckets_of(config)
    prompts = buckets.pack_prompts(batch.prompts, batch=B)
    return prompts, buckets.pack_responses(batch.responses, batch=B)


TEXTS = (
    "There are three red circles.",
    "There are three red circles. The answer is 12.",
    "",
    "There",
    "\n\n  7\n",
    "数一数红色的圆圈有几个？ </response> 1",
)


@pytest.mark.parametrize("context", ["none", "question", "question_image"])
def test_rows_of_the_discriminator_put_together_are_the_rows_encoded_alone(chat, context):
    rng = np.random.default_rng(1)
    images = tuple(PatchedImage(rng.normal(size=(h * w, PATCH_DIM)), (1, h, w)) for h, w in ((4, 4), (2, 6)))
    prompt = EncodedPrompt(np.zeros(3, np.int32), images)
    question = Question("q", "<image><image>How many circles?", (b"", b""), "3")
    builder = DiscriminatorPrompts(chat, context=context, max_response=64)
    shared, rests = builder.rows(question, prompt, TEXTS)
    for text, rest in zip(TEXTS, rests, strict=True):
        alone, [own] = builder.rows(question, prompt, [text])
        row = np.concatenate([shared.token_ids, rest])
        np.testing.assert_array_equal(row, np.concatenate([alone.token_ids, own]))
        words = chat.tokenizer.decode(row.tolist())
        assert f"<response>\n{text}\n</response>" in words
        assert ("How many circles?" in words) == (context != "none")
        assert words.endswith("<|im_start|>assistant\n")
    assert (shared.token_ids == chat.image_token_id).sum() == (7 if context == "question_image" else 0)
    assert len(shared.images) == (2 if context == "question_image" else 0)


def test_a_response_too_long_for_the_discriminator_keeps_its_end_of_prompt(chat):
    builder = DiscriminatorPrompts(chat, context="none", max_response=8)
    prompt, question = EncodedPrompt(np.zeros(3, np.int32), ()), Question("q", "How many?", (), "3")
    _, rests = builder.rows(question, prompt, ["five " * 40, "5"])
    assert len(rests[0]) == 8 + builder.extra
    assert chat.tokenizer.decode(rests[0].tolist()).endswith("</response><|im_end|>\n<|im_start|>assistant\n")


def test_a_state_with_a_loss_that_is_not_finite_stays_as_it_was(programs, params, batch):
    poisoned = dataclasses.replace(batch, advantages=np.full((B, S), np.nan, np.float32))
    state, metrics = update_policy(programs, params, poisoned)
    assert not metrics["finite"]
    for name, value in state.params.items():
        np.testing.assert_array_equal(value, params[name])
