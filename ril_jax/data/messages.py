"""Chat messages in OpenAI's form: their images taken out, so that what is left is text and placeholders."""

import base64
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from PIL import Image

from ril_jax.errors import InputError

Messages = Sequence[Mapping[str, Any]]

_IMAGE_KINDS = ("image", "image_url", "input_image")
_IMAGE_SOURCES = ("image", "image_url", "path", "url", "bytes", "data", "base64")


def images_apart(
    conversation: Messages, name: str, read: Callable[[Any, str], Image.Image]
) -> tuple[list[Any], list[Image.Image]]:
    """The messages with bare image parts, and their images in order; other faults are left to the chat tokenizer.

    An image part has its image under "image", "image_url" (also {"url": ...}), "path", "url", "bytes", "data" or
    "base64". `read(source, where)` makes an image of what stands there: bytes, a text or a `Path` (of a file:// URL),
    or what else a caller in Python may have put in. Raises InputError, with message and part, for a part without one.
    """
    messages, images = [], []
    for i, message in enumerate(conversation):
        content: Any = message.get("content") if isinstance(message, Mapping) else None
        if isinstance(content, str):  # here "<image>" in a text is text: images come as parts
            message = {**message, "content": [{"type": "text", "text": content}]}
        elif is_list(content):
            parts = []
            for j, part in enumerate(content):
                if is_image(part):
                    where = f"{name}: message {i}, part {j}"
                    images.append(read(image_source(part, where), where))
                    part = {"type": "image"}
                parts.append(part)
            message = {**message, "content": parts}
        messages.append(message)
    return messages, images


def is_image(part: Any) -> bool:
    """Whether a part of a message's content is an image."""
    if not isinstance(part, Mapping):
        return False
    kind = part.get("type")
    return kind in _IMAGE_KINDS or (kind is None and any(part.get(key) is not None for key in _IMAGE_KINDS))


def image_source(part: Mapping[str, Any], where: str) -> Any:
    """What `read` of `images_apart` is given of an image part."""
    key = next((key for key in _IMAGE_SOURCES if part.get(key) is not None), None)
    if key is None:
        raise InputError(f"{where}: an image part without an image; give it under one of {', '.join(_IMAGE_SOURCES)}")
    source = part[key]
    if isinstance(source, Mapping):
        source = source.get("url")
    if isinstance(source, str) and key in ("data", "base64") and source[:5].lower() != "data:":
        try:
            return base64.b64decode("".join(source.split()), validate=True)
        except ValueError as error:
            raise InputError(f"{where}: {key!r} is not valid base64 ({error})") from None
    if isinstance(source, str) and source[:7].lower() == "file://":
        try:
            return Path(unquote(urlsplit(source).path))
        except ValueError as error:
            raise InputError(f"{where}: not a file URL ({error})") from None
    return source


def is_list(value: Any) -> bool:
    """Whether it is a sequence of things, and no text."""
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)
