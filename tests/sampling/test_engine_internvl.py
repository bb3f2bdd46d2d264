"""Claims about the engine over InternVL: images of many tiles come and go in a small feature store, tokens stay."""

import dataclasses

import numpy as np
import pytest
from helpers import hf_internvl, hf_models
from helpers.engines import GREEDY, SHAPES, make_engine
from helpers.quick import quick_compilation

from ril_jax.sampling.requests import Request

# A tile has 4 features, and an image takes the rows of 1, 2, 4 or 8 tiles: two images of a chunk fill the store.
# One decode program, so that the same computation has the same bits.
SMALL_STORE = dataclasses.replace(SHAPES, slots=4, small_slots=0, prefill=((16, 2), (32, 2)), feature_rows=48)
MAX_TOKENS = 12


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    vision = hf_internvl.KIND_300M | {"num_hidden_layers": 1}
    return hf_internvl.save_internvl(tmp_path_factory.mktemp("internvl"), vision=vision)


@pytest.fixture(scope="module")
def engine(tiny):
    with quick_compilation():
        made = make_engine(tiny, SMALL_STORE)
        yield made
    made.close()


def prompts():
    rng = np.random.default_rng(28)
    one = hf_internvl.prompt(rng, 5, 3)
    row = hf_internvl.prompt(rng, 4, 5, 3, text_between=0)  # the second image lies in two chunks
    again = hf_internvl.prompt(rng, 6, 3, 3, 3)
    again = hf_models.Prompt(again.token_ids, (row.images[1], one.images[0], row.images[1]))  # one of them twice
    three = hf_internvl.prompt(rng, 20, 2, 5, 1)
    return [one, row, again, three, hf_internvl.prompt(rng, 9), hf_internvl.prompt(rng, 32)]


def run(engine, order, rng):
    """(tokens, logprobs) of each prompt, submitted in this order, some of them while others run."""
    engine.set_params(engine.params)  # forgets every prefix and image
    asked, out = prompts(), {i: ([], []) for i in order}
    waiting, more = list(order), True
    while waiting or more:
        for _ in range(min(rng.integers(1, 4), len(waiting))):
            i = waiting.pop(0)

            def notify(news, got=out[i]):
                got[0].extend(news.token_ids)
                got[1].extend(news.logprobs)

            engine.submit(Request(asked[i], max_tokens=MAX_TOKENS, sampling=GREEDY), notify)
        more = engine.step()
    return out


def test_greedy_tokens_are_those_of_transformers_whatever_else_runs(engine, tiny):
    """In these prompts' responses the two best tokens are never nearer than 0.013 in log-probability; rounding does
    less than 1e-5."""
    rng = np.random.default_rng(1)
    alone = {i: run(engine, [i], rng)[i] for i in range(6)}
    for i, prompt in enumerate(prompts()):
        expected = hf_models.generate(tiny.hf, prompt, max_new_tokens=MAX_TOKENS, eos_token_ids=[hf_models.EOS])
        assert alone[i][0] == expected.tolist()
    for _ in range(8):
        encoded = engine.stats.images_encoded
        assert run(engine, rng.permutation(6).tolist(), rng) == alone
        assert engine.stats.images_encoded - encoded > 6  # there are 6, so some were overwritten and came again
    assert engine.counter.after_warm == 0
