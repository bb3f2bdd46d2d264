"""What single tokens are written as: their bytes, and where each begins in a text."""

import codecs
import json
from collections.abc import Iterable, Sequence

from ril_jax.data.chat import ChatTokenizer


class TokenTexts:
    """The bytes of each token of a checkpoint's tokenizer; those of special tokens are their names."""

    def __init__(self, chat: ChatTokenizer):
        self._chat = chat
        self._added = {i: token for i, token in chat.tokenizer.added_tokens_decoder.items()}
        self.special = frozenset(i for i, token in self._added.items() if token.special)
        decoder = json.dumps(json.loads(chat.tokenizer.backend_tokenizer.to_str()).get("decoder"))
        self._letters = _byte_letters() if '"ByteLevel"' in decoder else None
        self._known: dict[int, bytes] = {}

    def encoded(self, token_id: int) -> bytes:
        """What the token adds to a text; nothing for an id that the tokenizer does not know."""
        known = self._known.get(token_id)
        if known is None:
            known = self._known[token_id] = self._bytes(token_id)
        return known

    def text(self, token_id: int) -> str:
        """The token as text, with a replacement character for what is only a part of one."""
        return self.encoded(token_id).decode("utf-8", "replace")

    def join(self, token_ids: Iterable[int]) -> str:
        """The text of tokens, special ones written out."""
        return b"".join(self.encoded(i) for i in token_ids).decode("utf-8", "replace")

    def _bytes(self, token_id: int) -> bytes:
        if token_id in self._added:
            return self._added[token_id].content.encode()
        token = self._chat.tokenizer.backend_tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        if self._letters is not None and all(letter in self._letters for letter in token):
            return bytes(self._letters[letter] for letter in token)
        return self._chat.decode([token_id]).encode()


class Offsets:
    """Where tokens begin in a text that is put together from them, in characters."""

    def __init__(self, start: int = 0):
        self._at = start
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def next(self, pieces: Sequence[bytes]) -> list[int]:
        """Where each of these tokens begins: at the character that its first byte is a part of."""
        offsets = []
        for piece in pieces:
            first = self._decoder.decode(piece[:1])
            open_character = bool(self._decoder.getstate()[0])
            offsets.append(self._at + len(first) - (bool(piece) and not open_character))
            self._at += len(first) + len(self._decoder.decode(piece[1:]))
        return offsets


def _byte_letters() -> dict[str, int]:
    """The letters that byte-level tokenizers (GPT-2's `bytes_to_unicode`) write for bytes.

    Printable bytes stand for themselves; the others are the code points from 256 on, in order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
