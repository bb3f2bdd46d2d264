"""From a call to what the engine takes: images decoded, texts tokenized. Slow, so it belongs off the event loop."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from ril_jax.data.chat import EncodedPrompt
from ril_jax.data.images import decode_image
from ril_jax.data.messages import images_apart, is_image, is_list
from ril_jax.errors import InputError
from ril_jax.pretrained import Pretrained
from ril_jax.sampling.server.errors import APIError
from ril_jax.sampling.server.fetch import ImageFetcher
from ril_jax.sampling.server.protocol import ChatCall, CompletionCall


class PromptReader:
    """Encodes the prompts of calls for one model; `server` is the `server` section of a config. Thread-safe.

    max_tokens: of a prompt; a text that is longer than so many of the longest tokens is refused without a look.
    """

    def __init__(self, model: Pretrained, server: ConfigDict, max_tokens: int):
        self._model, self._chat = model, model.chat
        self._max_tokens = max_tokens
        self._max_text = max_tokens * max(map(len, self._chat.tokenizer.get_vocab()))
        self._max_images, self._max_pixels = int(server.max_images), int(server.max_image_pixels)
        self._fetch = ImageFetcher(server.allowed_image_hosts, int(server.max_body_bytes))

    def chat(self, call: ChatCall) -> list[EncodedPrompt]:
        """The one prompt of a chat. Raises APIError (400)."""
        contents = [message["content"] for message in call.messages if is_list(message["content"])]
        count = sum(is_image(part) for content in contents for part in content)
        if count > self._max_images:
            raise APIError(400, f"{count} images, and config.server.max_images is {self._max_images}", param="messages")
        texts = [part.get("text") for content in contents for part in content if isinstance(part, Mapping)]
        self._check_length([*(message["content"] for message in call.messages), *texts], "messages")
        try:
            messages, images = images_apart(call.messages, "messages", self._read)
            return [self._chat.encode_prompt(messages, images, name="messages")]
        except InputError as error:
            raise APIError(400, str(error), param="messages") from None

    def completion(self, call: CompletionCall) -> list[EncodedPrompt]:
        """A prompt for each of the call's. Raises APIError (400)."""
        prompts = []
        for prompt in call.prompts:
            if isinstance(prompt, str):
                self._check_length([prompt], "prompt")
                ids = self._chat.encode_text(prompt)
            else:
                vocabulary = self._model.config.text.vocab_size
                wrong = next((i for i in prompt if not 0 <= i < vocabulary), None)
                if wrong is not None:
                    raise APIError(400, f"prompt has the token id {wrong}; the model has {vocabulary}", param="prompt")
                ids = np.array(prompt, np.int32)
            if not len(ids):
                raise APIError(400, "prompt is empty; give at least one token", param="prompt")
            placeholders = (self._chat.image_token_id, self._chat.video_token_id)
            if any(token is not None and (ids == token).any() for token in placeholders):
                raise APIError(
                    400, "prompt has the placeholder of an image; images are for /v1/chat/completions", param="prompt"
                )
            prompts.append(EncodedPrompt(ids, ()))
        return prompts

    def _check_length(self, texts: Sequence[Any], param: str) -> None:
        length = sum(len(text) for text in texts if isinstance(text, str))
        if length > self._max_text:
            raise APIError(
                400, f"{length} characters are more than the {self._max_tokens} tokens of the context", param=param
            )

    def _read(self, source: Any, where: str) -> Image.Image:
        """An image of a client: its bytes or a URL, never a file of this machine."""
        if isinstance(source, str) and source[:5].lower() != "data:":
            if source.split("://", 1)[0].lower() not in ("http", "https"):
                raise InputError(f"{where}: an image is given as a data URL (data:image/png;base64,...)")
            source = self._fetch(source, where)
        elif isinstance(source, Path) or not isinstance(source, str | bytes):
            raise InputError(f"{where}: an image is given as a data URL (data:image/png;base64,...)")
        return decode_image(source, name=where, max_pixels_decoded=self._max_pixels)
