"""The discriminator D (paper section 4.1, Fig. 3): what it reads, and the network that reads it.

Input is the response inside a chat prompt of our own words, read out at the last token of the generation prompt. The
rows of one question share everything before the response, so they are packed as
`[shared beginning | row 1 | row 2 | ...]`.
"""

import functools
from collections.abc import Sequence

import numpy as np
from jax.sharding import Mesh

from ril_jax import sharding
from ril_jax.data.chat import ChatTokenizer, EncodedPrompt
from ril_jax.data.records import Question, parse_messages
from ril_jax.models.config import ModelConfig
from ril_jax.models.parameters import Network, Params
from ril_jax.models.vlm import VisionLanguageModel
from ril_jax.pretrained import make_network

SYSTEM = (
    "You are a discriminator. A response stands between the <response> tags. "
    "Answer 0 if a teacher wrote it and 1 if a student wrote it."
)
QUESTION = "The question was:"
OPTIONS = "Who wrote this response? 0: teacher, 1: student."


def make_discriminator(config: ModelConfig, *, context: str) -> Network:
    """The student's architecture with a scalar head; the tower is left out where D sees no image."""
    if context == "question_image":
        return make_network(config, head="scalar")
    return Network(lambda: VisionLanguageModel(config, head="scalar", vision=False))


def initial_params(network: Network, pi_init: Params, mesh: Mesh) -> Params:
    """D starts from pi_init's weights with a zero head, so D(o) is exactly 0.5 for everything.

    Copies: D's state is donated at every update, and pi_init must outlive it.
    """
    head = {name: np.zeros(spec.shape, np.float32) for name, spec in network.specs.items() if name not in pi_init}
    head = sharding.put(head, mesh)
    return {name: pi_init[name].copy() if name in pi_init else head[name] for name in network.specs}


class DiscriminatorPrompts:
    """Turns responses into D's rows with the student's tokenizer.

    context: "none" (the response only), "question", or "question_image".
    """

    def __init__(self, chat: ChatTokenizer, *, context: str, max_response: int):
        self.chat = chat
        self.context = context
        self.max_response = max_response
        self._row = functools.lru_cache(maxsize=65536)(self._encode)
        empty, dot = self._encode("", None), self._encode(".", None)
        self._suffix = _common(empty[::-1], dot[::-1])  # tokens after the response that do not depend on it
        # Room for what a row has beside the response: the suffix, and tokens that merge at the response's borders.
        self.extra = self._suffix + 4

    def rows(
        self, question: Question, prompt: EncodedPrompt, responses: Sequence[str]
    ) -> tuple[EncodedPrompt, list[np.ndarray]]:
        """(the shared beginning with the question's images, the rest of each row); the suffix is always in the rest."""
        context = None if self.context == "none" else _question_text(question)
        images = prompt.images if self.context == "question_image" else ()
        sizes = tuple(image.num_tokens for image in images)
        rows = [self._row(text, context, sizes) for text in responses]
        shared = min(len(row) for row in rows) - self._suffix
        first = rows[0]
        for row in rows[1:]:
            shared = min(shared, _common(first, row))
        rests = [self._fit(row[shared:]) for row in rows]
        return EncodedPrompt(np.asarray(first[:shared], np.int32), images), rests

    def _fit(self, rest: tuple[int, ...]) -> np.ndarray:
        room = self.max_response + self.extra
        if len(rest) > room:
            rest = rest[: room - self._suffix] + rest[-self._suffix :]
        return np.asarray(rest, np.int32)

    def _encode(self, response: str, question: str | None, image_tokens: tuple[int, ...] = ()) -> tuple[int, ...]:
        content: list[dict] = []
        if question is not None:
            content.append({"type": "text", "text": f"{QUESTION}\n"})
            content += [{"type": "image"} for _ in image_tokens]
            content.append({"type": "text", "text": f"{question}\n"})
        content.append({"type": "text", "text": f"{OPTIONS}\n<response>\n{response}\n</response>"})
        system = {"role": "system", "content": [{"type": "text", "text": SYSTEM}]}
        messages = [system, {"role": "user", "content": content}]
        ids = self.chat.encode_messages(messages, image_tokens, name="a discriminator prompt")
        return tuple(ids.tolist())


def _question_text(question: Question) -> str:
    """The question's text without its placeholders."""
    messages = parse_messages(question.prompt)
    if messages is None:
        return question.prompt.replace("<image>", "").strip()
    texts = []
    for message in messages:
        content = message["content"]
        if isinstance(content, str):
            texts.append(content.replace("<image>", ""))
        else:
            texts += [part["text"] for part in content if part.get("type") == "text"]
    return "\n".join(text.strip() for text in texts if text.strip())


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning."""
    count = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        count += 1
    return count
