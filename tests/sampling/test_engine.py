"""Claims about the engine: tokens are transformers' and the sampler's, and never depend on what else is running."""

import dataclasses
import threading

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from helpers import hf_models
from helpers.engines import DRAWN, FILTERED, GREEDY, SHAPES, make_engine

from ril_jax.errors import InputError
from ril_jax.models import attention, paged
from ril_jax.sampling.requests import Request, Scored, ScoreRequest, Tokens


@pytest.fixture(scope="module")
def engine(tiny_vl):
    with_images = make_engine(tiny_vl)
    yield with_images
    with_images.close()


class Collector:
    """Gathers the news of a request."""

    def __init__(self, n=1):
        self.tokens = [[] for _ in range(n)]
        self.logprobs = [[] for _ in range(n)]
        self.top = [[] for _ in range(n)]
        self.finish = [None] * n
        self.scored = None

    def __call__(self, news):
        if isinstance(news, Scored):
            self.scored = news
            return
        assert isinstance(news, Tokens)
        assert self.finish[news.sample] is None
        self.tokens[news.sample] += news.token_ids
        self.logprobs[news.sample] += news.logprobs
        self.top[news.sample] += news.top or []
        self.finish[news.sample] = news.finish_reason


def run(engine, *requests):
    collectors = [Collector(getattr(r, "n", 1)) for r in requests]
    for request, collector in zip(requests, collectors, strict=True):
        engine.submit(request, collector)
    engine.run_until_idle()
    return collectors


def fresh(engine):
    engine.set_params(engine.params)  # forgets every prefix


def prompts(seed=0):
    rng = np.random.default_rng(seed)
    return [
        hf_models.prompt(rng, 5, (6, 8)),  # one image
        hf_models.prompt(rng, 40, (10, 12), (4, 4), text_between=1),  # two images, several chunks
        hf_models.prompt(rng, 9),  # less than a page over one
        hf_models.prompt(rng, 32),  # exactly a chunk
        hf_models.prompt(rng, 64),  # exactly two
        hf_models.prompt(rng, 1),
    ]


def test_greedy_tokens_are_those_of_transformers_whatever_else_runs(engine, tiny_vl):
    fresh(engine)
    lengths = (20, 11, 37, 5, 20, 30)
    requests = [Request(p, max_tokens=n, sampling=GREEDY) for p, n in zip(prompts(), lengths, strict=True)]
    for request, got in zip(requests, run(engine, *requests), strict=True):
        expected = hf_models.generate(
            tiny_vl.hf, request.prompt, max_new_tokens=request.max_tokens, eos_token_ids=[hf_models.EOS]
        )
        assert got.tokens[0] == expected.tolist()
        ended = expected[-1] == hf_models.EOS
        assert got.finish[0] == ("stop" if ended else "length")


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN, FILTERED], ids=["greedy", "drawn", "filtered"])
def test_a_request_gets_the_same_bits_alone_in_a_crowd_and_from_the_cache(engine, sampling):
    compiled = engine.counter.after_warm
    mine = Request(prompts()[1], n=2, max_tokens=25, sampling=sampling, seed=7, ignore_eos=True)
    fresh(engine)
    (alone,) = run(engine, mine)
    (cached,) = run(engine, mine)
    fresh(engine)
    others = [
        Request(p, n=3, max_tokens=9 + 5 * i, sampling=(FILTERED, GREEDY, DRAWN)[i % 3], seed=i)
        for i, p in enumerate(prompts(3))
    ]
    crowd = run(engine, *others[:3], mine, *others[3:])[3]
    assert engine.counter.after_warm == compiled, [str(c) for c in engine.counter.compilations if c.after]
    for other in (cached, crowd):
        assert other.tokens == alone.tokens
        assert other.logprobs == alone.logprobs
    if sampling.temperature > 0:
        assert alone.tokens[0] != alone.tokens[1]
        (again,) = run(engine, dataclasses.replace(mine, seed=8))
        assert again.tokens != alone.tokens


@pytest.fixture(scope="module")
def other(tiny_vl):
    """The same model behind other programs: fewer slots at a time, and pieces of prompts of half a page."""
    small = make_engine(tiny_vl, dataclasses.replace(SHAPES, small_slots=1, prefill=((4, 6),)))
    yield small
    small.close()


def test_other_programs_give_the_same_greedy_tokens(engine, other):
    assert other.shapes.slot_counts() == (1, 4, 6)
    requests = [Request(p, max_tokens=9 + 6 * i, sampling=GREEDY) for i, p in enumerate(prompts())]
    expected = run(engine, *requests)
    used: set[int] = set()
    decode = other.programs.decode
    other.programs.__dict__["decode"] = lambda slots, full: (used.add(slots), decode(slots, full))[1]
    got = run(other, *requests)
    assert used == {1, 4, 6}  # as requests end, and what is left stands in any of the slots
    assert [c.tokens for c in got] == [c.tokens for c in expected]
    for mine, theirs in zip(got, expected, strict=True):
        np.testing.assert_allclose(mine.logprobs[0], theirs.logprobs[0], atol=1e-5)


def test_pieces_of_one_prompt_share_calls(engine, other):
    """32 tokens are eight pieces of four, six of which go into the first call. Pages of eight are what is kept."""
    assert (other.shapes.chunk, other.shapes.page_size, other.shapes.segment) == (4, 8, 8)
    fresh(other)
    first, second = prompts()[3], prompts()[2]
    longer = dataclasses.replace(first, token_ids=np.concatenate([first.token_ids, second.token_ids]))
    for prompt, calls, computed in ((first, 2, 32), (first, 0, 0), (longer, 1, 9)):
        before = dataclasses.replace(other.stats)
        request = Request(prompt, max_tokens=9, sampling=GREEDY)
        assert run(other, request)[0].tokens == run(engine, request)[0].tokens
        assert other.stats.prefill_calls - before.prefill_calls == calls
        assert other.stats.prefilled_tokens - before.prefilled_tokens == computed


def test_joining_in_the_middle_changes_nothing(engine):
    first, second = (Request(p, max_tokens=40, sampling=DRAWN, seed=3, ignore_eos=True) for p in prompts(5)[:2])
    fresh(engine)
    expected = [run(engine, r)[0].tokens for r in (first, second)]
    fresh(engine)
    a, b = Collector(), Collector()
    engine.submit(first, a)
    for _ in range(4):
        engine.step()
    assert 0 < len(a.tokens[0]) < 40
    engine.submit(second, b)
    engine.run_until_idle()
    assert [a.tokens, b.tokens] == expected


def test_logprobs_are_those_of_the_raw_model(engine, tiny_vl):
    asked = Request(prompts()[0], max_tokens=12, sampling=FILTERED, top_logprobs=5, ignore_eos=True)
    for seed in range(20):
        request = dataclasses.replace(asked, seed=seed)
        (got,) = run(engine, request)
        if max(got.tokens[0]) < hf_models.IMAGE:  # a drawn placeholder would ask transformers for an image
            break
    whole = hf_models.Prompt(
        np.concatenate([request.prompt.token_ids, got.tokens[0]]).astype(np.int32), request.prompt.images
    )
    with torch.no_grad():
        logits = tiny_vl.hf(**hf_models._with_types(tiny_vl.hf, hf_models.inputs(whole))).logits[0]
    expected = torch.log_softmax(logits, -1)[len(request.prompt.token_ids) - 1 : -1]
    np.testing.assert_allclose(got.logprobs[0], expected[np.arange(12), got.tokens[0]].numpy(), atol=2e-5)
    best = expected.topk(5)
    for t, (ids, logprobs) in enumerate(got.top[0]):
        np.testing.assert_allclose(logprobs, best.values[t].numpy(), atol=2e-5)
        assert ids[0] == best.indices[t, 0]


def test_scores_are_those_of_the_raw_model(engine, tiny_vl):
    for p in prompts()[:3]:
        (got,) = run(engine, ScoreRequest(p, first=3, top_logprobs=2))
        with torch.no_grad():
            logits = tiny_vl.hf(**hf_models._with_types(tiny_vl.hf, hf_models.inputs(p))).logits[0]
        expected = torch.log_softmax(logits, -1)[np.arange(len(p.token_ids) - 1), p.token_ids[1:]][2:]
        np.testing.assert_allclose(got.scored.logprobs, expected.numpy(), atol=2e-5)
        assert len(got.scored.top) == len(got.scored.logprobs)


def test_samples_of_a_request_share_the_image_and_the_prompt(engine):
    fresh(engine)
    before = dataclasses.replace(engine.stats)
    request = Request(prompts()[1], n=6, max_tokens=4, sampling=DRAWN, ignore_eos=True)
    run(engine, request)
    stats = engine.stats
    assert stats.prefilled_tokens - before.prefilled_tokens == len(request.prompt.token_ids)
    assert stats.images_encoded - before.images_encoded == 2
    run(engine, dataclasses.replace(request, seed=5))  # the same prompt again: nothing is computed for it
    assert stats.prefilled_tokens - before.prefilled_tokens == len(request.prompt.token_ids)


def test_the_same_placeholders_of_another_image_share_nothing(engine):
    first = prompts()[0]
    other = hf_models.Prompt(first.token_ids, (hf_models.image(np.random.default_rng(99), 6, 8),))
    fresh(engine)
    expected = run(engine, Request(other, max_tokens=15, sampling=GREEDY))[0].logprobs
    fresh(engine)
    run(engine, Request(first, max_tokens=15, sampling=GREEDY))
    assert run(engine, Request(other, max_tokens=15, sampling=GREEDY))[0].logprobs == expected


def test_new_weights_drop_what_the_old_ones_computed(engine):
    request = Request(prompts()[0], max_tokens=15, sampling=GREEDY, ignore_eos=True)
    old = engine.params
    before = run(engine, request)[0].logprobs
    with engine.counter.expected():
        engine.set_params({name: value * 1.05 for name, value in old.items()})
    changed = run(engine, request)[0].logprobs
    engine.set_params(old)
    assert changed != before
    assert run(engine, request)[0].logprobs == before


def test_pages_come_back_and_a_full_cache_only_waits(tiny_vl):
    engine = make_engine(tiny_vl, dataclasses.replace(SHAPES, num_pages=20))
    free = engine._cache.available
    requests = [
        Request(p, n=2, max_tokens=30, sampling=DRAWN, seed=i, ignore_eos=True)
        for i, p in enumerate(prompts()[:4] + prompts(1)[:4])
    ]
    for got in run(engine, *requests):
        assert [len(tokens) for tokens in got.tokens] == [30, 30]
    assert engine._cache.available == free
    assert engine._reserved == 0
    jobs = [Collector(2) for _ in requests]
    submitted = [engine.submit(r, c) for r, c in zip(requests, jobs, strict=True)]
    for _ in range(3):
        engine.step()
    for job in submitted[::2]:
        engine.cancel(job)
    engine.cancel(submitted[1], 0)
    engine.run_until_idle()
    assert all(c.finish == ["cancelled"] * 2 or "length" in c.finish for c in jobs[::2])
    assert jobs[1].finish == ["cancelled", "length"]
    assert all(c.finish == ["length"] * 2 for c in jobs[3::2])
    assert engine._cache.available == free
    with pytest.raises(InputError, match="the cache has 19; lower max_tokens"):
        engine.submit(Request(prompts()[4], max_tokens=155), Collector())
    engine.close()


def test_a_prompt_beyond_the_context_is_refused(engine):
    long = hf_models.prompt(np.random.default_rng(0), 160)
    with pytest.raises(InputError, match="takes 160 tokens, and the engine's context is 160"):
        engine.submit(Request(long), Collector())
    (got,) = run(engine, Request(hf_models.prompt(np.random.default_rng(0), 150), max_tokens=999, ignore_eos=True))
    assert len(got.tokens[0]) == 10
    assert got.finish == ["length"]


def test_a_thread_serves_many_callers(tiny_vl):
    engine = make_engine(tiny_vl)
    engine.start()
    done = [threading.Event() for _ in range(12)]
    collectors = [Collector() for _ in done]

    def caller(i):
        def notify(news):
            collectors[i](news)
            if news.finish_reason:
                done[i].set()

        engine.submit(Request(prompts(i)[i % 6], max_tokens=10, sampling=GREEDY, ignore_eos=True), notify)

    threads = [threading.Thread(target=caller, args=(i,)) for i in range(12)]
    for thread in threads:
        thread.start()
    assert all(event.wait(60) for event in done)
    engine.close()
    assert all(len(c.tokens[0]) == 10 for c in collectors)


def test_scanned_layers_give_the_same_tokens(engine, tiny_vl):
    scanned = make_engine(tiny_vl)
    scanned.programs = dataclasses.replace(scanned.programs, unroll=False)
    requests = [Request(p, max_tokens=20, sampling=GREEDY) for p in prompts()]
    expected = [c.tokens for c in run(engine, *requests)]
    assert [c.tokens for c in run(scanned, *requests)] == expected
    scanned.close()


def test_attention_by_the_kernel_of_the_tpu_equals_the_plain_one():
    rng = np.random.default_rng(0)
    B, N, K, H, page, pages = 3, 8, 2, 128, 16, 12
    pool = paged.PagePool(*(jnp.asarray(rng.normal(size=(K, pages, page, H)), jnp.float32) for _ in range(2)))
    tables = jnp.asarray(rng.permutation(np.arange(1, pages))[:9].reshape(B, 3), jnp.int32)
    context = jnp.asarray([5, 48, 17], jnp.int32)
    q = jnp.asarray(rng.normal(size=(B, 1, N, H)), jnp.float32)
    scaled = q * H**-0.5
    plain = paged.paged_attention(scaled, pool, tables, (context - 1)[:, None], context, block=32)
    out = np.zeros((B, N, H))
    for b in range(B):
        k, v = (np.asarray(p)[:, np.asarray(tables[b])].reshape(K, -1, H)[:, : int(context[b])] for p in pool)
        for n in range(N):
            s = np.asarray(q[b, 0, n], np.float64) @ k[n // (N // K)].T.astype(np.float64) * H**-0.5
            p = np.exp(s - s.max())
            out[b, n] = p / p.sum() @ v[n // (N // K)]
    np.testing.assert_allclose(plain[:, 0], out, atol=1e-5)
    attention.use("pallas")
    kernel = paged.paged_attention(scaled, pool, tables, (context - 1)[:, None], context, block=32)
    np.testing.assert_allclose(kernel[:, 0], out, atol=1e-2)  # the kernel multiplies in bfloat16
