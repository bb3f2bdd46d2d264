"""Chat: from messages and images to the token ids a checkpoint was trained on, with its own tokenizer and template."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tokenizers import Tokenizer

from ril_jax.data.families import INTERNVL, INTERNVL_TOKEN_NAMES, OPENGVLAB_TEMPLATE, QWEN
from ril_jax.data.images import PROCESSOR_FILES, PatchedImage, QwenImageProcessor, read_json, read_processor_config
from ril_jax.data.tiles import TiledImage, TileImageProcessor
from ril_jax.errors import InputError

IMAGE_PLACEHOLDER = "<image>"

_END_OF_TURN = "<|im_end|>"
_ROLES = ("system", "user", "assistant", "tool")
_TEXT_PARTS = ("text", "input_text", "output_text")
_IMAGE_PARTS = ("image", "image_url", "input_image")
_VIDEO_PARTS = ("video", "video_url", "input_video")
# Characters that Unicode reserves for use inside a program: they stand in no text that means anything.
_MARKS = tuple(chr(code) for code in range(0xFDD0, 0xFDF0))


@dataclass
class EncodedPrompt:
    """A prompt as the model reads it.

    `token_ids` [P] int32, each image's placeholder repeated once for every token it takes; `images` in the prompt's
    order; `tokens_cut`: how many tokens of text were cut to fit.
    """

    token_ids: np.ndarray
    images: tuple[PatchedImage | TiledImage, ...]
    tokens_cut: int = 0


def chat_messages(
    prompt: str | Sequence[Mapping[str, Any]], num_images: int, *, name: str, break_written: bool = False
) -> list[dict[str, Any]]:
    """Brings a prompt into one form: messages whose content is a list of text and image parts.

    In a string (a prompt, or the content of a user's message) `<image>` stands for an image; a plain prompt without
    one gets its images first. In a text part `<image>` is text. `break_written`: the template itself writes a line
    break after an image, and one that a string has there is left out. Returns fresh dicts: {"role", "content":
    [{"type": "text", "text"} or {"type": "image"}]}. Raises InputError, with `name`, for another form, for videos,
    and if the prompt does not have exactly `num_images` images.
    """
    if isinstance(prompt, str):
        parts = _string_parts(prompt, name=name, break_written=break_written)
        if num_images and not any(part["type"] == "image" for part in parts):
            parts = [{"type": "image"} for _ in range(num_images)] + parts
        messages: list[dict[str, Any]] = [{"role": "user", "content": parts}]
        if not prompt.strip() and not num_images:
            raise InputError(f"{name}: the prompt is empty")
    elif isinstance(prompt, Sequence) and prompt:
        messages = [
            _message(message, name=f"{name}: message {i}", break_written=break_written)
            for i, message in enumerate(prompt)
        ]
    else:
        raise InputError(f"{name}: the prompt must be a string or a non-empty list of chat messages")
    found = sum(part["type"] == "image" for message in messages for part in message["content"])
    if found != num_images:
        raise InputError(
            f"{name}: the prompt has {found} image placeholders and the row {num_images} images; "
            f"write {IMAGE_PLACEHOLDER} once for each image"
        )
    return messages


class ChatTokenizer:
    """A checkpoint's tokenizer, chat template and image processor, as one; picklable.

    What an image becomes is the family's: `<|image_pad|>` for every feature of Qwen2.5-VL between the brackets that its
    template writes; `<img>`, `<IMG_CONTEXT>` for every feature of all tiles, `</img>` for InternVL, in the place of the
    `<IMG_CONTEXT>` or `<image>` of its template. InternVL checkpoints in OpenGVLab's own layout have a template for
    text alone, which nothing uses: their conversations are put together as OpenGVLab's `chat` does it, with its
    system message unless the messages bring one.

    Attributes: `tokenizer` (transformers' own), `image_processor` (None for text-only folders), `vocab_size` (ids that
    the tokenizer knows; the model may have more rows), `eos_token_ids` (any of them ends a response),
    `end_of_turn_token_id`, `pad_token_id`, and `image_token_id`, `video_token_id`, `vision_start_token_id` (None for
    text-only folders, and where the tokenizer has no such token).
    """

    def __init__(
        self,
        tokenizer: Any,
        image_processor: QwenImageProcessor | TileImageProcessor | None,
        *,
        eos_token_ids: Iterable[int] = (),
        pad_token_id: int | None = None,
        video_config: dict[str, Any] | None = None,
        name: str = "tokenizer",
    ) -> None:
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self._name = name
        self._video_config = video_config
        vocab = tokenizer.get_vocab()
        self.vocab_size: int = max(vocab.values()) + 1
        end = vocab.get(_END_OF_TURN, tokenizer.eos_token_id)
        if end is None:
            raise InputError(f"{name}: the tokenizer has neither {_END_OF_TURN} nor an eos_token")
        self.end_of_turn_token_id: int = end
        ends = [end, *eos_token_ids, tokenizer.eos_token_id]
        self.eos_token_ids: tuple[int, ...] = tuple(dict.fromkeys(i for i in ends if i is not None))
        pads = (tokenizer.pad_token_id, pad_token_id, end)
        self.pad_token_id: int = next(i for i in pads if i is not None)
        self.image_token_id: int | None = None
        self.video_token_id: int | None = None
        self.vision_start_token_id: int | None = None
        specials = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        family = self._family = INTERNVL if isinstance(image_processor, TileImageProcessor) else QWEN
        if image_processor is not None:
            if family.token not in vocab or family.start not in vocab:
                raise InputError(
                    f"{name}: the tokenizer has no {family.token} or {family.start}; give a folder of {family.name}"
                )
            self.image_token_id, self.vision_start_token_id = vocab[family.token], vocab[family.start]
            self.video_token_id = vocab.get(family.video)
        self._build_encoders()
        self._written: str = ""  # the placeholder that the template puts for an image
        self._read_template()
        # Leftmost-longest, as tokenizers finds them.
        specials |= {_END_OF_TURN, family.token, family.start, family.video, self._written or family.token}
        ordered = sorted(specials, key=len, reverse=True)
        self._special = re.compile("(" + "|".join(map(re.escape, ordered)) + ")")
        self._longest_special = len(ordered[0])

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        max_tiles: int | None = None,
    ) -> ChatTokenizer:
        """Loads a local HF folder of Qwen2.5-VL, InternVL (either layout), or Qwen2.5 (no processor file: text only).

        `min_pixels` and `max_pixels` replace those of Qwen2.5-VL's image processor, `max_tiles` (unless None or 0) that
        of InternVL's. Raises InputError for a folder without a usable tokenizer or chat template.
        """
        # Advice for users of transformers' own models (PyTorch is missing, ids beyond a small vocabulary) is none here.
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        from transformers import AutoTokenizer  # two seconds to import: only those pay who tokenize

        folder = Path(folder)
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder; give a local HF folder")
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)  # and no question about it
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"{folder}: the tokenizer cannot be loaded ({reason})") from error
        if not getattr(tokenizer, "is_fast", False):
            raise InputError(f"{folder}: no tokenizer.json; save the tokenizer with a current transformers")
        tokenizer.chat_template = _chat_template(folder, tokenizer)
        processor = _image_processor(folder, min_pixels=min_pixels, max_pixels=max_pixels, max_tiles=max_tiles)
        if tokenizer.chat_template is None and not isinstance(processor, TileImageProcessor):
            raise InputError(
                f"{folder}: no chat template (chat_template.jinja or in tokenizer_config.json); give an instruct "
                "checkpoint"
            )
        configs = [read_json(folder / name) for name in ("generation_config.json", "config.json")]
        configs += [config[key] for config in configs for key in ("text_config", "llm_config") if config.get(key)]
        ends = [config.get("eos_token_id") for config in configs]
        pads = [config.get("pad_token_id") for config in configs]
        return cls(
            tokenizer,
            processor,
            eos_token_ids=[i for end in ends for i in (end if isinstance(end, list) else [end]) if i is not None],
            pad_token_id=next((i for i in pads if i is not None), None),
            video_config=_video_config(folder),
            name=str(folder),
        )

    def messages(
        self, prompt: str | Sequence[Mapping[str, Any]], num_images: int, *, name: str
    ) -> list[dict[str, Any]]:
        """Same as `chat_messages`, with what the checkpoint's template needs left out of strings."""
        return chat_messages(prompt, num_images, name=name, break_written=self._break_written)

    def render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True) -> str:
        """The text of the conversation under the checkpoint's template, one placeholder for an image, for people.

        Raises InputError if the template refuses the messages.
        """
        if not self._content_as_parts:
            messages = [{**message, "content": _text_of(message)} for message in messages]
        try:
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except Exception as error:  # templates are programs: jinja2's errors and Python's come out of them
            raise InputError(
                f"{self._name}: the chat template refuses these messages ({' '.join(str(error).split())})"
            ) from error

    def encode_prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        images: Sequence[Image.Image],
        *,
        name: str,
        max_length: int | None = None,
        add_generation_prompt: bool = True,
    ) -> EncodedPrompt:
        """Token ids of the rendered messages, equal to those of the family's processor in HF, and the images' patches.

        A prompt of more than `max_length` tokens loses text from the end of the last user's turn. Special tokens in
        the messages' text are encoded as the plain text they are, never as control tokens or placeholders. Raises
        InputError, with `name`, if the images do not match the placeholders, an image cannot be used, or cutting all
        text of the turn would not be enough.
        """
        messages = self.messages(messages, len(images), name=name)
        sizes = self._image_tokens(images, name=name)
        try:
            ids, cut = self._encode_to_fit(messages, sizes, max_length, add_generation_prompt)
        except InputError as error:
            raise InputError(f"{name}: {error}") from error
        counts = np.ones(len(ids), np.int64)
        if self.image_token_id is not None:
            counts[ids == self.image_token_id] = sizes
        processor = self.image_processor
        patched: tuple[PatchedImage | TiledImage, ...] = ()
        if processor is not None:
            patched = tuple(processor(image) for image in images)
        return EncodedPrompt(np.repeat(ids, counts), patched, cut)

    def encode_messages(
        self, messages: Sequence[Mapping[str, Any]], image_tokens: Sequence[int], *, name: str
    ) -> np.ndarray:
        """Token ids [P] int32 of messages whose images were processed before, to `image_tokens` tokens each."""
        messages = self.messages(messages, len(image_tokens), name=name)
        ids = self._encode(messages, len(image_tokens), True)
        counts = np.ones(len(ids), np.int64)
        if self.image_token_id is not None:
            counts[ids == self.image_token_id] = image_tokens
        return np.repeat(ids, counts)

    def encode_response(self, text: str, *, finished: bool) -> np.ndarray:
        """[R] int32: a response's tokens as the model would produce them after the generation prompt.

        `finished` appends the end-of-turn token; a response cut off by its length limit has none. Special tokens in
        `text` are plain text.
        """
        ids = self._plain.encode(text, add_special_tokens=False).ids
        return np.array([*ids, self.end_of_turn_token_id] if finished else ids, np.int32)

    def encode_text(self, text: str) -> np.ndarray:
        """[P] int32: a text as it is, without a template; special tokens that are written in it are such."""
        return np.array(self._encoder.encode(text, add_special_tokens=False).ids, np.int32)

    def decode(self, token_ids: Iterable[int] | np.ndarray) -> str:
        """The text of token ids, without special tokens; ids that the tokenizer does not know give no text."""
        ids = token_ids.tolist() if isinstance(token_ids, np.ndarray) else [int(i) for i in token_ids]
        return self._encoder.decode(ids, skip_special_tokens=True)

    def save(self, folder: str | Path) -> None:
        """Writes tokenizer, template and processor files that transformers, vLLM and `from_pretrained` read."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save_pretrained(str(folder))
        configs: dict[str, dict[str, Any] | None] = {"video_preprocessor_config.json": self._video_config}
        if self.image_processor is not None:
            configs |= self.image_processor.files()
        if self._family == INTERNVL:  # OpenGVLab's tokenizers do not name the tokens that InternVLProcessor asks for
            video = next((t for t in (INTERNVL.video, QWEN.video) if t in self.tokenizer.get_vocab()), INTERNVL.video)
            saved = read_json(folder / "tokenizer_config.json")
            configs["tokenizer_config.json"] = INTERNVL_TOKEN_NAMES | {"video_token": video} | saved
        for file_name, config in configs.items():
            if config:
                text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
                (folder / file_name).write_text(text, encoding="utf-8")

    def _encode_to_fit(
        self, messages: list[dict[str, Any]], sizes: Sequence[int], max_length: int | None, add_generation_prompt: bool
    ) -> tuple[np.ndarray, int]:
        """Ids with one placeholder an image, and how many tokens were cut to get them under `max_length`."""
        expansion = sum(sizes) - len(sizes)
        ids = self._encode(messages, len(sizes), add_generation_prompt)
        full = length = len(ids) + expansion
        if max_length is None or length <= max_length:
            return ids, 0
        turns = [message["content"] for message in messages if message["role"] == "user"]
        texts = [part for part in turns[-1] if part["type"] == "text"] if turns else []
        for part in reversed(texts):
            while length > max_length and part["text"]:
                part["text"] = self._without_last_tokens(part["text"], length - max_length)
                ids = self._encode(messages, len(sizes), add_generation_prompt)
                length = len(ids) + expansion
        if length > max_length or not any(part["text"].strip() for part in texts):
            smaller = f"smaller images ({self.image_processor.limit}) or " if self.image_processor is not None else ""
            raise InputError(
                f"the prompt takes {full} tokens, {sum(sizes)} of them for images, and cutting the last question's "
                f"text does not bring it to {max_length}; use {smaller}a longer limit"
            )
        return ids, full - length

    def _without_last_tokens(self, text: str, count: int) -> str:
        """`text` less about `count` tokens at its end, and at least one character; never half a character."""
        encoding = self._plain.encode(text, add_special_tokens=False)
        keep = len(encoding.ids) - count
        return text[: min(encoding.offsets[keep][0], len(text) - 1)] if keep > 0 else ""

    def _encode(self, messages: list[dict[str, Any]], num_images: int, add_generation_prompt: bool) -> np.ndarray:
        """[P] int32 of the rendered messages, one placeholder an image.

        The rendered text is encoded whole, as HF does, since byte pairs merge across the template's words and the
        user's. Only if a special token stands in somebody's text is it taken apart at the template's own ones.
        """
        if not any(self._special.search(_text_of(message)) for message in messages):
            rendered = self.render(messages, add_generation_prompt=add_generation_prompt)
            if self._written:
                rendered = rendered.replace(self._written, self._family.expanded)
            ids = self._encoder.encode(rendered, add_special_tokens=False).ids
        else:
            mark = _unused_mark(messages)
            marked = [self._with_marked_specials(message, mark) for message in messages]
            rendered = self.render(marked, add_generation_prompt=add_generation_prompt)
            ids = []
            for i, piece in enumerate(self._special.split(rendered)):
                if i % 2:
                    piece = self._family.expanded if piece == self._written else piece
                    ids.extend(self._encoder.encode(piece, add_special_tokens=False).ids)
                else:
                    ids.extend(self._plain.encode(piece.replace(mark, ""), add_special_tokens=False).ids)
        result = np.array(ids, np.int32)
        images = int((result == self.image_token_id).sum()) if self.image_token_id is not None else 0
        videos = int((result == self.video_token_id).sum()) if self.video_token_id is not None else 0
        if images != num_images or videos:
            raise InputError(
                f"the rendered prompt has {images} image and {videos} video placeholders for {num_images} images; "
                f"is the chat template that of {self._family.name}?"
            )
        return result

    def _with_marked_specials(self, message: dict[str, Any], mark: str) -> dict[str, Any]:
        """A copy in which `mark` breaks every special token of the text, those over two adjacent parts included."""
        parts, before = [], ""
        for part in message["content"]:
            if part["type"] == "text":
                text = part["text"]
                reach = self._longest_special - 1
                tail = before[-reach:]
                crossing = any(
                    match.start() < len(tail) < match.end() for match in self._special.finditer(tail + text[:reach])
                )
                broken = self._special.sub(lambda match: mark.join(match[0]) + mark, text)
                part = {"type": "text", "text": mark + broken if crossing else broken}
                before = tail + text
            else:
                before = ""
            parts.append(part)
        return {**message, "content": parts}

    def _image_tokens(self, images: Sequence[Image.Image], *, name: str) -> list[int]:
        """Placeholder tokens of each image, from its size alone."""
        if images and self.image_processor is None:
            raise InputError(f"{name}: {self._name} is a text-only model and the row has {len(images)} images")
        sizes = []
        for i, image in enumerate(images):
            assert self.image_processor is not None
            try:
                sizes.append(self.image_processor.num_tokens(image.height, image.width))
            except InputError as error:
                raise InputError(f"{name}: image {i}: {error}") from error
        return sizes

    def _read_template(self) -> None:
        """Finds out what the template takes for content and what it writes for an image."""
        self._content_as_parts, self._break_written = True, False
        as_parts = self._reads_parts()
        if self.image_processor is not None:
            self._written = self._written_for_image() if as_parts else ""
            if not self._written and self._family == INTERNVL:
                self.tokenizer.chat_template = OPENGVLAB_TEMPLATE
                as_parts, self._written = True, self._written_for_image()
            if not self._written:
                raise InputError(f"{self._name}: the chat template writes no {self._family.token} for an image")
            texts = [{"type": "text", "text": text} for text in ("a", "\nb")]
            probe = [{"role": "user", "content": [texts[0], {"type": "image"}, texts[1]]}]
            self._break_written = f"{self._written}\n\nb" in self.render(probe)
        self._content_as_parts = as_parts

    def _reads_parts(self) -> bool:
        """Whether the template takes content as a list of parts (Qwen2.5-VL) or as a string (Qwen2.5)."""
        probe = [{"role": "user", "content": [{"type": "text", "text": "probe"}]}]
        try:
            rendered = self.render(probe)
        except InputError:
            return False
        return "probe" in rendered and "'text'" not in rendered

    def _written_for_image(self) -> str:
        """What the template writes for an image, "" if that is nothing known."""
        rendered = self.render([{"role": "user", "content": [{"type": "image"}]}])
        return next((written for written in self._family.written if rendered.count(written) == 1), "")

    def _build_encoders(self) -> None:
        """Two copies of the tokenizer, one of which takes special tokens for text.

        Copies, because transformers changes the settings of its own (truncation, padding, special tokens) at any call.
        """
        serialized = self.tokenizer.backend_tokenizer.to_str()
        self._encoder, self._plain = Tokenizer.from_str(serialized), Tokenizer.from_str(serialized)
        for encoder in (self._encoder, self._plain):
            encoder.no_truncation()
            encoder.no_padding()
        self._plain.encode_special_tokens = True

    def __getstate__(self) -> dict[str, Any]:
        # tokenizers forgets encode_special_tokens when it is pickled.
        return {key: value for key, value in self.__dict__.items() if key not in ("_encoder", "_plain")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._build_encoders()


def _string_parts(text: str, *, name: str, break_written: bool) -> list[dict[str, Any]]:
    """Text and image parts of a string with `<image>` placeholders; empty pieces of text are left out."""
    for token in (QWEN.token, QWEN.video, INTERNVL.token):
        if token in text:
            raise InputError(f"{name}: {token} stands in the prompt; write {IMAGE_PLACEHOLDER} where an image goes")
    parts: list[dict[str, Any]] = []
    for i, piece in enumerate(text.split(IMAGE_PLACEHOLDER)):
        if i:
            parts.append({"type": "image"})
            piece = piece.removeprefix("\n") if break_written else piece
        if piece:
            parts.append({"type": "text", "text": piece})
    return parts


def _message(message: Any, *, name: str, break_written: bool) -> dict[str, Any]:
    """One chat message with its content as clean parts."""
    if not isinstance(message, Mapping):
        raise InputError(f"{name}: a message must be a dict with role and content, not {type(message).__name__}")
    unknown = [key for key, value in message.items() if key not in ("role", "content", "name") and value is not None]
    if unknown:
        raise InputError(f"{name}: field {unknown[0]!r} is not supported; a message has role and content")
    role, content = message.get("role"), message.get("content")
    if role not in _ROLES:
        raise InputError(f"{name}: role {role!r} is none of {', '.join(_ROLES)}")
    if isinstance(content, str):
        parts = [{"type": "text", "text": content}]
        if role == "user":
            parts = _string_parts(content, name=name, break_written=break_written)
    elif isinstance(content, Sequence):
        parts = [_part(part, name=f"{name}, part {i}") for i, part in enumerate(content)]
    else:
        raise InputError(f"{name}: content must be a string or a list of parts, not {type(content).__name__}")
    return {"role": role, "content": parts}


def _part(part: Any, *, name: str) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, Mapping):
        raise InputError(f"{name}: a part must be a dict with a type, not {type(part).__name__}")
    given = {key for key, value in part.items() if value is not None}
    kind = part.get("type")
    if kind is None:  # Qwen's own notation leaves the type out: {"image": ...}, {"text": ...}
        kind = next((key for key in (*_VIDEO_PARTS, *_IMAGE_PARTS, *_TEXT_PARTS) if key in given), None)
    if kind in _VIDEO_PARTS or given.intersection(_VIDEO_PARTS):
        raise InputError(f"{name}: videos are not supported; give single frames as images")
    if kind in _IMAGE_PARTS:
        return {"type": "image"}
    if kind in _TEXT_PARTS and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    raise InputError(f"{name}: a part of type {kind!r} without text or image; known are text, image and image_url")


def _text_of(message: Mapping[str, Any]) -> str:
    return "".join(part["text"] for part in message["content"] if part["type"] == "text")


def _unused_mark(messages: Sequence[Mapping[str, Any]]) -> str:
    used = set(itertools.chain.from_iterable(_text_of(message) for message in messages))
    mark = next((mark for mark in _MARKS if mark not in used), None)
    if mark is None:
        raise InputError("the text holds special tokens and all of Unicode's noncharacters; take either out")
    return mark


def _chat_template(folder: Path, tokenizer: Any) -> str | None:
    """The template that HF's processors would use: chat_template.json, then .jinja, then tokenizer_config.json."""
    template = read_json(folder / "chat_template.json").get("chat_template") or tokenizer.chat_template
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}
    if isinstance(template, Mapping):
        template = template.get("default")
    return template if isinstance(template, str) else None


def _image_processor(
    folder: Path, *, min_pixels: int | None, max_pixels: int | None, max_tiles: int | None
) -> QwenImageProcessor | TileImageProcessor | None:
    """The folder's image processor, of the family that its config.json or else its processor file names."""
    family = read_json(folder / "config.json").get("model_type")
    if family == "internvl_chat":
        return TileImageProcessor.from_pretrained(folder, max_tiles)
    if not any((folder / name).is_file() for name in PROCESSOR_FILES):
        return None
    kind = str(read_processor_config(folder)[1].get("image_processor_type"))
    if family == "internvl" or kind.startswith("GotOcr2"):
        return TileImageProcessor.from_pretrained(folder, max_tiles)
    return QwenImageProcessor.from_pretrained(folder, min_pixels, max_pixels)


def _video_config(folder: Path) -> dict[str, Any] | None:
    """The checkpoint's video settings, which this package does not use and passes on when it saves."""
    nested = read_json(folder / "processor_config.json").get("video_processor")
    return nested or read_json(folder / "video_preprocessor_config.json") or None
