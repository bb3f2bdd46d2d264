"""Claims about what single tokens are written as."""

import numpy as np
import pytest
from helpers.tokenizer_folder import build_tokenizer_folder
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ril_jax.data.chat import ChatTokenizer
from ril_jax.sampling.server.token_texts import Offsets, TokenTexts

TEXTS = ["How many red circles? größer 🙂 数一数\r\n\t", "<tool_call>a</tool_call>"]
HALVES = [b"\xf0", b"\x9f", b"\x99\x82", b"a", b"\xe2\x82", b"\xac", b""]


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    return ChatTokenizer.from_pretrained(build_tokenizer_folder(tmp_path_factory.mktemp("tokens")))


@pytest.mark.parametrize("text", TEXTS)
def test_the_bytes_of_tokens_make_the_text(chat, text):
    texts = TokenTexts(chat)
    ids = chat.encode_text(text).tolist()
    assert b"".join(texts.encoded(i) for i in ids).decode() == text
    assert texts.join(ids) == text


def test_any_tokens_are_joined_as_the_tokenizer_decodes_them(chat):
    texts = TokenTexts(chat)
    rng = np.random.default_rng(0)
    for _ in range(200):
        ids = rng.integers(0, chat.vocab_size, 12).tolist()
        assert texts.join(i for i in ids if i not in texts.special) == chat.decode(ids)


def test_special_tokens_are_named_and_unknown_ones_are_nothing(chat):
    texts = TokenTexts(chat)
    (end,) = chat.encode_text("<|im_end|>").tolist()
    assert end in texts.special
    assert texts.text(end) == "<|im_end|>"
    assert texts.encoded(chat.vocab_size + 5) == b""


@settings(max_examples=200, deadline=None)
@given(st.lists(st.binary(max_size=5), max_size=12) | st.lists(st.sampled_from(HALVES)))
def test_a_token_begins_at_the_character_of_its_first_byte(pieces):
    whole = b"".join(pieces)
    assume(b"\xed" not in whole)  # of half a surrogate Python decides two bytes late
    offsets, at = Offsets(), 0
    for piece, offset in zip(pieces, offsets.next(pieces), strict=True):
        if piece:
            assert offset == character_of(whole, at)
        at += len(piece)


def character_of(data: bytes, index: int) -> int:
    """The character of `data.decode("utf-8", "replace")` that holds the byte, by walking over the valid stretches."""
    at = character = 0
    while True:
        length = next(n for n in (1, 2, 3, 4, 5) if n == 5 or _is_one(data[at : at + n]) or _broken_at(data, at) == n)
        if at <= index < at + length:
            return character
        at, character = at + length, character + 1


def _is_one(piece: bytes) -> bool:
    try:
        return len(piece.decode()) == 1
    except UnicodeDecodeError:
        return False


def _broken_at(data: bytes, at: int) -> int:
    """How many bytes one replacement character stands for, where no character begins."""
    try:
        data[at : at + 4].decode()
    except UnicodeDecodeError as error:
        return error.end - error.start if error.start == 0 else 0
    return 0
