"""Claims about groups by the engine: they are the sampler's, copy no weights, and leave no memory behind."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import hf_models
from helpers.engines import DRAWN, FILTERED, GREEDY, make_engine

from ril_jax.data.packing import VisionRung, pack_prompts
from ril_jax.sampling.rollouts import EngineSampler
from ril_jax.sampling.sampler import Sampler

B, G, R = 5, 3, 18
ENDS = (hf_models.EOS, *range(100, 120))


@dataclasses.dataclass(frozen=True)
class Chat:
    """Of a tokenizer, what the sampler asks for."""

    pad_token_id: int = 3

    def decode(self, ids) -> str:
        return " ".join(map(str, ids))


@pytest.fixture(scope="module")
def engine(tiny_vl):
    engine = make_engine(tiny_vl, eos=ENDS)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def params(engine):
    return engine.params


def prompts():
    rng = np.random.default_rng(0)
    return [
        hf_models.prompt(rng, 5, (6, 8)),
        hf_models.prompt(rng, 9),
        hf_models.prompt(rng, 4, (10, 12), (4, 4), text_between=1),
        hf_models.prompt(rng, 33),
        hf_models.prompt(rng, 1),
    ]


def keys(seed=0):
    return np.random.default_rng(seed).integers(0, 2**32, (B, 2), dtype=np.uint32)


def sample(engine, params, *, sampling, order=range(B), **fields):
    order = list(order)
    sampler = EngineSampler(engine, Chat(), **fields)
    asked = [prompts()[i] for i in order]
    return sampler(params, asked, keys()[order], num_samples=G, max_tokens=R, sampling=sampling)


def test_greedy_groups_are_those_of_the_sampler(engine, params, tiny_vl):
    got = sample(engine, params, sampling=GREEDY)
    batch = pack_prompts(prompts(), tiny_vl.config, batch=B, prompt_len=64, rung=VisionRung(360, 4, 200))
    sampler = Sampler(engine.programs.network, ENDS, Chat.pad_token_id)
    features = sampler.encode(params, batch.vision)
    expected = sampler(params, batch, features, keys(), num_samples=G, max_tokens=R, sampling=GREEDY)
    for name in ("token_ids", "mask", "finished"):
        np.testing.assert_array_equal(getattr(got, name), getattr(expected, name), err_msg=name)
    np.testing.assert_allclose(got.logprobs, expected.logprobs, atol=2e-5)
    assert got.finished.any()
    assert not got.finished.all()


@pytest.mark.parametrize("sampling", [DRAWN, FILTERED], ids=["drawn", "filtered"])
def test_a_question_gets_the_same_group_in_any_order_and_batch(engine, params, sampling):
    whole = sample(engine, params, sampling=sampling)
    part = [4, 0, 2]
    again = sample(engine, params, sampling=sampling, order=part)
    for name in ("token_ids", "mask", "logprobs", "finished"):
        np.testing.assert_array_equal(getattr(again, name), getattr(whole, name)[part], err_msg=name)
    assert len({tuple(row) for row in whole.token_ids.reshape(B * G, R)}) == B * G


def test_new_weights_are_taken_where_they_lie(engine, params):
    """Nothing goes through the host: neither when the engine takes them, nor later."""
    with engine.counter.expected():
        changed = jax.block_until_ready({name: value * 1.05 for name, value in params.items()})
        before = sample(engine, params, sampling=GREEDY)
        with jax.transfer_guard("disallow_explicit"):
            engine.set_params(changed)
        assert all(engine.params[name] is value for name, value in changed.items())
        after = sample(engine, changed, sampling=GREEDY)
    assert (after.logprobs != before.logprobs).any()
    fresh = sample(engine, params, sampling=GREEDY)
    np.testing.assert_array_equal(fresh.logprobs, before.logprobs)  # what the others computed is forgotten


def test_between_calls_the_cache_is_no_memory_and_nothing_compiles_again(engine, params):
    sample(engine, params, sampling=DRAWN)
    assert sum(engine.memory.values()) == 0
    mine = {id(value) for value in params.values()}
    shape = engine.programs.abstract_state().pool.k.shape
    assert not [a for a in jax.live_arrays() if a.shape == shape and id(a) not in mine and a.dtype == jnp.float32]
    compiled = engine.counter.after_warm
    with pytest.raises(RuntimeError, match="the engine sleeps; give it weights"):
        engine.submit(None, print)
    sample(engine, params, sampling=DRAWN)
    assert engine.counter.after_warm == compiled


def test_being_asked_to_stop_leaves_an_engine_that_can_be_used(engine, params):
    expected = sample(engine, params, sampling=DRAWN)
    turns = iter(range(4))

    def stop():
        if next(turns, None) is None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample(engine, params, sampling=DRAWN, before_step=stop)
    assert not engine.num_running
    np.testing.assert_array_equal(sample(engine, params, sampling=DRAWN).token_ids, expected.token_ids)
