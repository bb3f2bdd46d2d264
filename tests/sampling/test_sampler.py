"""Claims about sampling: greedy is transformers' generate, the filters are its processors, draws are reproducible."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from helpers import hf_models
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ril_jax.data.packing import VisionRung, pack_prompts
from ril_jax.models.hub import load_params
from ril_jax.models.parameters import Network
from ril_jax.models.vlm import VisionLanguageModel
from ril_jax.sampling.logits import RowParams, SamplingParams, choose_row_tokens, choose_tokens, filter_logits
from ril_jax.sampling.sampler import Sampler

BATCH, PROMPT_LEN, MAX_TOKENS, NUM_SAMPLES = 4, 64, 20, 3
RUNG = VisionRung(patches=360, images=4, image_patches=200)
GREEDY = SamplingParams(temperature=0.0)
DRAWN = SamplingParams(temperature=0.8, top_k=60, top_p=0.95, repetition_penalty=1.05)


def prompts_of(seed: int) -> list[hf_models.Prompt]:
    """Three for a batch of four: one image, two images, text only."""
    rng = np.random.default_rng(seed)
    return [
        hf_models.prompt(rng, 5, (6, 8)),
        hf_models.prompt(rng, 4, (10, 12), (4, 4), text_between=1),
        hf_models.prompt(rng, 9),
    ]


@dataclasses.dataclass
class Model:
    """A tiny model, its sampler, and short ways to call both."""

    tiny: hf_models.TinyModel
    sampler: Sampler
    params: dict

    def sample(self, prompts, sampling, *, keys=None, seed=0, num_samples=NUM_SAMPLES):
        rung = RUNG if self.tiny.config.vision is not None else None
        batch = pack_prompts(prompts, self.tiny.config, batch=BATCH, prompt_len=PROMPT_LEN, rung=rung)
        features = None if rung is None else self.sampler.encode(self.params, batch.vision)
        if keys is None:
            keys = jax.random.split(jax.random.PRNGKey(seed), BATCH)
        return jax.tree.map(
            np.asarray,
            self.sampler(
                self.params, batch, features, keys, num_samples=num_samples, max_tokens=MAX_TOKENS, sampling=sampling
            ),
        )


def model_of(tiny, eos_token_ids) -> Model:
    network = Network(lambda: VisionLanguageModel(tiny.config))
    sampler = Sampler(network, tuple(eos_token_ids), hf_models.PAD)
    return Model(tiny, sampler, load_params(tiny.folder, network))


def endless(tiny, p, penalty=1.0):
    return hf_models.generate(
        tiny.hf, p, max_new_tokens=MAX_TOKENS, eos_token_ids=[hf_models.VOCAB - 1], repetition_penalty=penalty
    )


@pytest.fixture(scope="module")
def model(tiny_vl):
    """EOS tokens chosen from what the model says greedily, so that all prompts of seed 0 end, at different steps."""
    eos = {endless(tiny_vl, p)[at] for p, at in zip(prompts_of(0), (3, 7, 14), strict=True)}
    return model_of(tiny_vl, sorted(int(token) for token in eos))


def assert_greedy_equals_generate(model, prompts, sampling):
    out = model.sample(prompts, sampling)
    for b, p in enumerate(prompts):
        reference = hf_models.generate(
            model.tiny.hf, p, max_new_tokens=MAX_TOKENS, eos_token_ids=model.sampler.eos_token_ids,
            repetition_penalty=sampling.repetition_penalty,
        )  # fmt: skip
        for g in range(NUM_SAMPLES):
            np.testing.assert_array_equal(out.token_ids[b, g][out.mask[b, g]], reference)
            np.testing.assert_array_equal(out.mask[b, g], np.arange(MAX_TOKENS) < len(reference))
            np.testing.assert_array_equal(out.token_ids[b, g][~out.mask[b, g]], hf_models.PAD)
            assert out.finished[b, g] == (reference[-1] in model.sampler.eos_token_ids)
    return out


def test_greedy_equals_generate_token_for_token_and_stops_early(model):
    prompts = prompts_of(0)
    out = assert_greedy_equals_generate(model, prompts, GREEDY)
    lengths = out.mask[: len(prompts), 0].sum(-1)
    assert len(set(lengths.tolist())) == len(prompts)  # they end at different steps,
    assert out.finished[: len(prompts)].all()
    assert out.steps == lengths.max() < MAX_TOKENS  # and nothing runs after the last of them.


def test_unrolled_layers_sample_the_same(model, drawn):
    unrolled = Model(model.tiny, dataclasses.replace(model.sampler, unroll=True), model.params)
    out = unrolled.sample(prompts_of(2), DRAWN, seed=3)
    np.testing.assert_array_equal(out.token_ids, drawn.token_ids)
    np.testing.assert_allclose(out.logprobs, drawn.logprobs, atol=1e-5, rtol=0)


def test_greedy_with_a_repetition_penalty_equals_generate(model):
    prompts = prompts_of(1)
    penalised = SamplingParams(temperature=0.0, repetition_penalty=1.05)
    assert_greedy_equals_generate(model, prompts, penalised)
    assert any(np.any(endless(model.tiny, p) != endless(model.tiny, p, penalty=1.05)) for p in prompts)


def test_greedy_of_a_text_only_model_equals_generate(tiny_text):
    rng = np.random.default_rng(5)
    prompts = [hf_models.prompt(rng, n) for n in (4, 11, 30)]
    assert_greedy_equals_generate(model_of(tiny_text, [hf_models.VOCAB - 1]), prompts, GREEDY)


def test_filling_rows_stay_empty(model):
    out = model.sample(prompts_of(0), GREEDY)
    assert not out.mask[3].any()
    assert not out.finished[3].any()
    np.testing.assert_array_equal(out.token_ids[3], hf_models.PAD)
    np.testing.assert_array_equal(out.logprobs[3], 0.0)


@pytest.fixture(scope="module")
def drawn(model):
    return model.sample(prompts_of(2), DRAWN, seed=3)


def test_every_draw_is_what_a_separate_forward_pass_would_draw(model, drawn):
    """Each of the G samples alone: transformers' logits of `[prompt | its tokens]`, our draw with the sample's key."""
    keys = jax.random.split(jax.random.PRNGKey(3), BATCH)
    for b, p in enumerate(prompts_of(2)):
        sample_keys = jax.random.split(keys[b], NUM_SAMPLES)
        for g in range(NUM_SAMPLES):
            tokens = drawn.token_ids[b, g][drawn.mask[b, g]]
            row = hf_models.Prompt(np.concatenate([p.token_ids, tokens]), p.images)
            with torch.no_grad():
                logits = hf_models.logits(model.tiny.hf, row)[0, -len(tokens) - 1 : -1].numpy()
            seen = np.zeros((len(tokens), hf_models.VOCAB), bool)
            for t in range(len(tokens)):
                seen[t, row.token_ids[: len(p.token_ids) + t]] = True
            for t, token in enumerate(tokens):
                choice = choose_tokens(logits[None, t, None], seen[None, t, None], sample_keys[None, None, g], t, DRAWN)
                assert choice[0, 0] == token
            logprobs = torch.log_softmax(torch.tensor(logits), dim=-1).numpy()[np.arange(len(tokens)), tokens]
            np.testing.assert_allclose(drawn.logprobs[b, g][drawn.mask[b, g]], logprobs, atol=2e-5, rtol=0)


def test_samples_of_a_group_differ_and_the_seed_decides_them(model, drawn):
    again = model.sample(prompts_of(2), DRAWN, seed=3)
    other = model.sample(prompts_of(2), DRAWN, seed=4)
    for field in drawn._fields:
        np.testing.assert_array_equal(getattr(again, field), getattr(drawn, field))
    for b in range(3):
        assert len(np.unique(drawn.token_ids[b], axis=0)) == NUM_SAMPLES
        assert np.any(other.token_ids[b] != drawn.token_ids[b])


def test_the_samples_of_a_question_do_not_depend_on_the_rest_of_the_batch(model, drawn):
    keys = jax.random.split(jax.random.PRNGKey(3), BATCH)
    mine, company = prompts_of(2), prompts_of(9)
    out = model.sample([company[0], mine[1], mine[0]], DRAWN, keys=jnp.stack([keys[3], keys[1], keys[0], keys[2]]))
    np.testing.assert_array_equal(out.token_ids[[2, 1]], drawn.token_ids[[0, 1]])
    np.testing.assert_array_equal(out.mask[[2, 1]], drawn.mask[[0, 1]])
    np.testing.assert_allclose(out.logprobs[[2, 1]], drawn.logprobs[[0, 1]], atol=1e-5, rtol=0)


def test_tokens_beyond_the_tokenizer_are_never_drawn(tiny_vl):
    model = model_of(tiny_vl, [hf_models.VOCAB - 1])
    limited = dataclasses.replace(model.sampler, token_limit=40)
    out = Model(tiny_vl, limited, model.params).sample(prompts_of(0), SamplingParams(temperature=3.0), num_samples=8)
    assert out.mask[:3].all()
    assert out.token_ids.max() < 40
    assert len(np.unique(out.token_ids[:3])) == 40


@contextlib.contextmanager
def counted_compilations():
    """A list that grows by one with every program that XLA compiles."""
    events = []

    def listen(name, duration, **_):
        if name == "/jax/core/compile/backend_compile_duration":
            events.append(name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield events
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_image_sizes_within_a_bucket_compile_nothing_new(model):
    rng = np.random.default_rng(6)
    model.sample(prompts_of(0), GREEDY)
    with counted_compilations() as events:
        for sizes in ([(2, 2)], [(8, 8), (2, 24)], [(14, 10), (4, 4), (6, 6)], []):
            model.sample([hf_models.prompt(rng, 2, *sizes, text_between=0)], GREEDY)
        assert not events
        jax.jit(lambda x: x + len(events))(np.zeros(3)).block_until_ready()
        assert events  # the counter counts


# --- filters against transformers' processors ---

FILTERS = [
    SamplingParams(),
    SamplingParams(temperature=0.3),
    SamplingParams(top_k=1),
    SamplingParams(top_k=7),
    SamplingParams(top_k=10_000),
    SamplingParams(top_p=0.9),
    SamplingParams(top_p=1e-6),
    SamplingParams(temperature=1.7, top_k=20, top_p=0.6),
    SamplingParams(temperature=0.6, top_k=50, top_p=0.95, repetition_penalty=1.3),
]


def hf_probabilities(logits, seen_ids, params):
    """Probabilities [B, V] by transformers' processors in the order of its generate."""
    processors = LogitsProcessorList()
    if params.repetition_penalty != 1.0:
        processors.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    processors.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        processors.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1.0:
        processors.append(TopPLogitsWarper(params.top_p))
    return torch.softmax(processors(torch.tensor(seen_ids), torch.tensor(logits)), dim=-1).numpy()


def random_logits(num_rows=6, vocab=200):
    rng = np.random.default_rng(11)
    logits = rng.normal(0, 2.5, (num_rows, vocab)).astype(np.float32)
    seen_ids = rng.integers(0, vocab, (num_rows, 30))
    seen = np.zeros((num_rows, vocab), bool)
    np.put_along_axis(seen, seen_ids, True, axis=1)
    return logits, seen, seen_ids


@pytest.mark.parametrize("params", FILTERS, ids=str)
def test_filtered_distribution_equals_transformers(params):
    logits, seen, seen_ids = random_logits()
    kept, order = filter_logits(logits[:, None], seen[:, None], params)
    probabilities = np.zeros_like(logits)
    tokens = np.broadcast_to(np.arange(logits.shape[1]), kept[:, 0].shape) if order is None else np.asarray(order[:, 0])
    np.put_along_axis(probabilities, tokens, np.asarray(jax.nn.softmax(kept[:, 0])), axis=1)
    reference = hf_probabilities(logits, seen_ids, params)
    np.testing.assert_array_equal(probabilities > 0, reference > 0)
    np.testing.assert_allclose(probabilities, reference, rtol=1e-5, atol=1e-7)


def test_drawn_frequencies_follow_the_filtered_distribution():
    """40,000 draws: each frequency within five standard deviations of transformers' probability."""
    params, n = SamplingParams(temperature=0.9, top_k=12, top_p=0.9, repetition_penalty=1.2), 40_000
    logits, seen, seen_ids = random_logits(num_rows=1, vocab=50)
    keys = jax.random.split(jax.random.PRNGKey(0), n)[None]
    shape = (1, n, logits.shape[1])
    tokens = choose_tokens(
        jnp.broadcast_to(logits[:, None], shape), jnp.broadcast_to(seen[:, None], shape), keys, 5, params
    )
    frequencies = np.bincount(np.asarray(tokens).ravel(), minlength=logits.shape[1]) / n
    expected = hf_probabilities(logits, seen_ids, params)[0]
    assert np.all(np.abs(frequencies - expected) <= 5 * np.sqrt(expected * (1 - expected) / n) + 1e-9)
    assert np.count_nonzero(expected) > 5


@pytest.mark.parametrize("top_k", [3, 150, 0], ids=["few", "many", "all"])
def test_rows_of_one_batch_are_drawn_each_by_its_own_filters(top_k):
    """10,000 draws of each row, beside a greedy one and one without filters."""
    mine = SamplingParams(temperature=0.9, top_k=top_k, top_p=0.9, repetition_penalty=1.2)
    rows, n = [SamplingParams(temperature=0.0, top_k=5), mine, SamplingParams(temperature=1.7)], 10_000
    logits, seen, seen_ids = random_logits(num_rows=len(rows))
    params = RowParams(*(jnp.asarray([getattr(row, name) for row in rows]) for name in RowParams._fields))
    keys = jax.random.split(jax.random.PRNGKey(0), (n, len(rows)))
    draw = jax.jit(
        jax.vmap(lambda keys: choose_row_tokens(logits, seen, keys, jnp.full((len(rows),), 5), params, filtered=True))
    )
    tokens = np.asarray(draw(keys))
    assert (tokens[:, 0] == logits[0].argmax()).all()
    for r in (1, 2):
        frequencies = np.bincount(tokens[:, r], minlength=logits.shape[1]) / n
        expected = hf_probabilities(logits[[r]], seen_ids[[r]], rows[r])[0]
        assert np.all(np.abs(frequencies - expected) <= 5 * np.sqrt(expected * (1 - expected) / n) + 1e-9)
    alone = jnp.asarray([1])
    one = jax.jit(
        jax.vmap(
            lambda keys: choose_row_tokens(
                logits[alone], seen[alone], keys[alone], jnp.full((1,), 5), jax.tree.map(lambda a: a[alone], params),
                filtered=True,
            )
        )
    )  # fmt: skip
    np.testing.assert_array_equal(np.asarray(one(keys[:200]))[:, 0], tokens[:200, 1])


def test_every_step_draws_anew():
    logits = jnp.zeros((1, 1, 1000))
    keys = jax.random.PRNGKey(1)[None, None]
    assert len({int(choose_tokens(logits, None, keys, step, SamplingParams())[0, 0]) for step in range(20)}) > 15
