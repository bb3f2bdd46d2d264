"""Claims about a sample's text as its tokens come, and about configs of engines."""

import numpy as np
import pytest
from helpers.tokenizer_folder import build_tokenizer_folder
from hypothesis import given, settings
from hypothesis import strategies as st

from ril_jax.config import engine_config
from ril_jax.data.chat import ChatTokenizer
from ril_jax.errors import InputError
from ril_jax.sampling.local import TextStream, engine_shapes


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    return ChatTokenizer.from_pretrained(build_tokenizer_folder(tmp_path_factory.mktemp("text")))


def pushed(stream, ids, sizes):
    """The pieces that come of pushing ids in runs of these sizes, over and over."""
    pieces, at, turn = [], 0, 0
    while at < len(ids):
        size = sizes[turn % len(sizes)]
        pieces.append(stream.push(ids[at : at + size], last=at + size >= len(ids)))
        at, turn = at + size, turn + 1
    return pieces


SIZES = st.lists(st.integers(1, 9), min_size=1, max_size=4)
ALPHABET = st.sampled_from([*"abc .\n", "🙂", "😀", "größer", "数一数", "<|im_end|>", "the answer"])


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 10**6), length=st.integers(1, 200), sizes=SIZES)
def test_the_pieces_make_the_text_of_all_tokens(chat, seed, length, sizes):
    """Any tokens: halves of characters that never become whole, special tokens and ids that nobody knows among them."""
    ids = np.random.default_rng(seed).integers(0, chat.vocab_size + 3, length).tolist()
    stream = TextStream(chat)
    assert "".join(pushed(stream, ids, sizes)) == chat.decode(ids) == stream.text
    assert stream.token_ids == ids
    assert not stream.stopped


@settings(max_examples=150, deadline=None)
@given(parts=st.lists(ALPHABET, min_size=1, max_size=60), stop=st.lists(ALPHABET, min_size=1, max_size=3), sizes=SIZES)
def test_a_stop_string_cuts_the_text_where_it_is_first_complete(chat, parts, stop, sizes):
    text = "".join(parts).replace("<|im_end|>", "")
    stop = [s for s in stop if s != "<|im_end|>"]
    ids = chat.encode_response(text, finished=False).tolist()
    stream = TextStream(chat, stop)
    got = "".join(pushed(stream, ids, sizes))
    ends = [text.find(s) + len(s) for s in stop if s in text]
    assert stream.stopped == bool(ends)
    if not ends:
        assert got == text
        return
    # The tokens up to the first one with which some stop string is complete, and no more.
    seen = chat.decode(stream.token_ids)
    assert any(s in seen for s in stop)
    assert not any(s in chat.decode(stream.token_ids[:-1]) for s in stop)
    assert got == seen[: min(seen.find(s) for s in stop if s in seen)]


def test_nothing_is_sent_that_a_stop_string_may_take_back(chat):
    ids = chat.encode_response("one END two ENDING", finished=False).tolist()
    stream = TextStream(chat, ["ENDING"])
    sent = ""
    for token in ids:
        sent += stream.push([token])
        assert "one END two ENDING".startswith(sent)
        assert "ENDI" not in sent
    assert sent == "one END two "
    assert stream.stopped
    assert stream.push([5, 6], last=True) == ""


def test_half_a_character_waits_for_its_other_half(chat):
    ids = chat.encode_response("a😀", finished=False).tolist()
    halves = next(i for i in range(1, len(ids)) if chat.decode(ids[:i]).endswith("\ufffd"))
    stream = TextStream(chat)
    assert stream.push(ids[:halves]) == "a"
    assert stream.push(ids[halves:]) == "😀"
    broken = TextStream(chat)
    broken.push(ids[:halves])
    assert broken.push([], last=True) == "\ufffd"


def test_a_stop_string_that_is_a_special_token_stops_at_the_token(chat):
    (start,) = chat.encode_text("<|im_start|>").tolist()
    ids = [*chat.encode_text("yes").tolist(), start, *chat.encode_text("no").tolist()]
    assert TextStream(chat).push(ids, last=True) == "yesno"
    stream = TextStream(chat, ["<|im_start|>"])
    assert stream.push(ids) == "yes"
    assert stream.stopped
    assert stream.token_ids == ids[: ids.index(start) + 1]


def test_what_was_held_back_comes_with_the_end(chat):
    ids = chat.encode_response("so it E", finished=False).tolist()
    stream = TextStream(chat, ["END"])
    assert stream.push(ids) == "so it "
    assert stream.push([], last=True) == "E"
    assert not stream.stopped


@pytest.mark.parametrize(
    ("field", "value", "line"),
    [
        ("slots", 0, "config.engine.slots is 0"),
        ("max_model_len", 10**6, "the model has 4096 positions; lower it"),
        ("prefill", ((100, 2),), "100 tokens, is no multiple of page_size, 64"),
        ("attention_block", 100, "attention_block, 100, is no multiple of page_size"),
        ("prefill", (), "at least one"),
    ],
)
def test_shapes_that_cannot_be_are_refused(field, value, line):
    config = engine_config()
    config[field] = value
    with pytest.raises(InputError, match=line):
        engine_shapes(config, max_positions=4096)


def test_a_cache_is_as_large_as_all_slots_need_unless_told():
    config = engine_config()
    shapes = engine_shapes(config, max_positions=4096)
    assert shapes.num_pages == 64 * (4096 // 64 + 1) + 1
    config.num_pages = 77
    assert engine_shapes(config, max_positions=4096).num_pages == 77
