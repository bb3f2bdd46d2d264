"""One row of a user's questions: from its fields as they were read to a `Question`, or to the reason why not.

`check_row` goes through the fields in the order of `Question`. Each helper takes its own fields out of the row; what
is left at the end becomes `extra`.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ril_jax.data.chat import chat_messages
from ril_jax.data.images import decode_image
from ril_jax.data.records import Question, Response, parse_messages
from ril_jax.errors import InputError

SOLUTION_FIELDS = ("solution", "answer", "ground_truth")  # the first that is there counts
IMAGE_FIELDS = ("images", "image")
VIDEO_FIELDS = ("videos", "video")
_PART_IMAGE_KEYS = ("image", "image_url", "url", "path")  # where a chat message's image part may hold the image itself
# How image files begin; a string that is base64 of one of these is an image, any other string is a path.
_MAGIC = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"RIFF", b"BM", b"II*\x00", b"MM\x00*", b"\x00\x00\x00")


@dataclass(frozen=True)
class Row:
    """One row of the input as it was read: its fields, or the reason why it could not be read."""

    file: str
    number: int  # the line of a JSONL file or the row of a table, counted from 1
    default_id: str
    folder: Path  # what relative image paths start from
    progress: float  # share of the input read up to here, 0 to 1
    fields: dict[str, Any] | None = None
    error: str = ""
    index: int = 0  # its place among all rows of the input, from 0


@dataclass(frozen=True)
class Refusal:
    """A row that was not imported, and why."""

    id: str
    file: str
    line: int
    reason: str


def check_row(row: Row) -> Question | Refusal:
    """The row as a question, or the refusal that says what is wrong with it; every image is decoded once."""
    id_ = row.default_id
    try:
        if row.fields is None:
            raise InputError(row.error)
        fields = {key: value for key, value in row.fields.items() if value is not None}
        id_ = _take_id(fields, row.default_id)
        _refuse_video_fields(fields)
        prompt, embedded = _take_prompt(fields)
        images = _take_images(fields, embedded, row.folder)
        prompt_text = _check_prompt(prompt, len(images))
        solution = _take_solution(fields)
        responses = _take_responses(fields)
        question = Question(id_, prompt_text, tuple(images), solution, responses, _extra(fields))
        for field in ("id", "prompt", "solution", "extra"):
            _check_encodable(getattr(question, field), field)
        for response in responses:
            _check_encodable(response.model + response.text, "responses")
        return question
    except InputError as error:
        return Refusal(id_, row.file, row.number, str(error))


def _take_id(fields: dict[str, Any], default: str) -> str:
    value = fields.pop("id", default)
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise InputError(f"`id` is {_kind(value)}; give text or a whole number, or leave it out")
    if not str(value).strip():
        raise InputError("`id` is empty; give one, or leave it out")
    return str(value)


def _refuse_video_fields(fields: dict[str, Any]) -> None:
    for field in VIDEO_FIELDS:
        if fields.get(field):
            raise InputError(f"`{field}` holds video, which is not supported; give single frames as images")


def _take_prompt(fields: dict[str, Any]) -> tuple[str | list[dict[str, Any]], list[Any]]:
    """The prompt as text or messages, and the images that stand inside the messages."""
    if "prompt" not in fields:
        raise InputError(f"no `prompt` among its fields ({', '.join(fields) or 'none'}); add it or rename the field")
    value = fields.pop("prompt")
    if isinstance(value, str):
        messages = parse_messages(value)
        if messages is None:
            return value, []
        value = messages
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise InputError(f"`prompt` is {_kind(value)}; give text, or chat messages as a list of objects")
    contents = [message["content"] for message in value if isinstance(message.get("content"), list)]
    parts = [part for content in contents for part in content if isinstance(part, dict)]
    found = [part[key] for part in parts for key in _PART_IMAGE_KEYS if part.get(key) is not None]
    return value, [item["url"] if isinstance(item, dict) and item.get("url") else item for item in found]


def _check_prompt(prompt: str | list[dict[str, Any]], num_images: int) -> str:
    """The prompt as it is stored: the string as it came, or the JSON of the messages in their one form."""
    messages = chat_messages(prompt, num_images, name="`prompt`")
    if messages[-1]["role"] != "user":
        raise InputError(f"`prompt` ends with a message of the {messages[-1]['role']}; end it with the user's question")
    asked = [part.get("text", "") for message in messages if message["role"] == "user" for part in message["content"]]
    if not num_images and not "".join(asked).strip():
        raise InputError("`prompt` is empty; write the question")
    return prompt if isinstance(prompt, str) else json.dumps(messages, ensure_ascii=False)


def _take_images(fields: dict[str, Any], embedded: list[Any], folder: Path) -> list[bytes]:
    given = [field for field in IMAGE_FIELDS if fields.get(field) not in (None, [], "")]
    values = {field: fields.pop(field, None) for field in IMAGE_FIELDS}
    if len(given) > 1 or (given and embedded):
        other = f"`{given[1]}`" if len(given) > 1 else "the messages"
        raise InputError(f"images stand in `{given[0]}` and in {other}; give them in one place")
    where = f"`{given[0]}`" if given else "`prompt`"
    listed = values[given[0]] if given else embedded
    listed = list(listed) if isinstance(listed, list | tuple) else [listed]
    return [_image_bytes(value, f"{where} {number + 1}", folder) for number, value in enumerate(listed)]


def _image_bytes(value: Any, where: str, folder: Path) -> bytes:
    if isinstance(value, dict):  # how Hugging Face's parquet files hold an image
        found = [value[key] for key in ("bytes", "path") if value.get(key) is not None]
        if not found:
            raise InputError(f"{where} has neither bytes nor a path; give one of them")
        value = found[0]
    if isinstance(value, str):
        data, name = _image_of_text(value, where, folder)
    elif isinstance(value, bytes | bytearray | memoryview):
        data, name = bytes(value), where
    else:
        raise InputError(f"{where} is {_kind(value)}; give a path, the bytes of an image file, or a data URL")
    decode_image(data, name=name)
    return data


def _image_of_text(value: str, where: str, folder: Path) -> tuple[bytes, str]:
    if value.startswith("data:"):
        header, comma, payload = value.partition(",")
        if not comma or not header.endswith(";base64"):
            raise InputError(f"{where} is a data URL without base64 data; write data:image/png;base64,...")
        try:
            return base64.b64decode("".join(payload.split()), validate=True), where
        except (binascii.Error, ValueError) as error:
            raise InputError(f"{where} is a data URL whose base64 is broken ({error}); write it again") from error
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", value):
        raise InputError(f"{where} is a URL ({_short(value)}), and nothing is fetched; download it and give its path")
    path = folder / value
    name = f"{where} ({_short(value)})"
    try:
        if path.is_file():
            return path.read_bytes(), name
    except (OSError, ValueError) as error:  # a string that can be no path, or a file that may not be read
        if isinstance(error, PermissionError):
            raise InputError(f"{name}: the file may not be read; give it read permission") from error
    decoded = _image_of_base64(value)
    if decoded is not None:
        return decoded, where
    if not value:
        raise InputError(f"{where} is empty; give a path or the image's bytes")
    raise InputError(f"{name}: no such file in {folder}; correct the path, which is relative to the file with the rows")


def _image_of_base64(value: str) -> bytes | None:
    try:
        data = base64.b64decode("".join(value.split()), validate=True)
    except (binascii.Error, ValueError):
        return None
    return data if data.startswith(_MAGIC) else None


def _take_solution(fields: dict[str, Any]) -> str:
    field = next((name for name in SOLUTION_FIELDS if name in fields), None)
    if field is None:
        raise InputError(f"no solution; give one of the fields {', '.join(SOLUTION_FIELDS)}")
    value = fields.pop(field)
    if isinstance(value, bool) or not isinstance(value, str | int | float) or value != value:
        raise InputError(f"`{field}` is {_kind(value)}; give it as text or a number")
    if not str(value).strip():
        raise InputError(f"`{field}` is empty; write the right answer, or leave the row out")
    return str(value)


def _take_responses(fields: dict[str, Any]) -> tuple[Response, ...]:
    """Teachers' responses, if the row has them in our form; a field of that name in another form stays in `extra`."""
    values = fields.get("responses")
    needed = {"model", "text", "token_count", "finish_reason"}
    if not isinstance(values, list) or not all(isinstance(v, dict) and needed <= set(v) for v in values):
        return ()
    del fields["responses"]
    try:
        responses = [
            Response(
                str(v["model"]), str(v["text"]), int(v["token_count"]), v["finish_reason"], float(v.get("judge", -1))
            )
            for v in values
        ]
    except (TypeError, ValueError) as error:
        raise InputError(
            f"`responses` cannot be read ({_line(error)}); give token_count and judge as numbers"
        ) from error
    for response in responses:
        if response.finish_reason not in ("stop", "length"):
            raise InputError(f"`responses` has the finish_reason {response.finish_reason!r}; use stop or length")
        if not 0 <= response.token_count < 2**31:
            raise InputError(f"`responses` has the token_count {response.token_count}; give the number of its tokens")
    return tuple(responses)


def _extra(fields: dict[str, Any]) -> str:
    earlier = fields.get("extra")  # of a data set that was imported before
    if isinstance(earlier, str):
        try:
            earlier = json.loads(earlier)
        except ValueError:
            earlier = None
    if isinstance(earlier, dict):
        fields = {**earlier, **{key: value for key, value in fields.items() if key != "extra"}}
    return json.dumps(_jsonable(fields), ensure_ascii=False, sort_keys=True)


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    if isinstance(value, bytes):
        return base64.b64encode(value).decode("ascii")
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None  # JSON has no such numbers
    if value is None or isinstance(value, str | int | float):
        return value
    return str(value)  # dates, decimals


def _check_encodable(text: str, field: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"`{field}` holds half a surrogate pair (character {error.start}); write it as UTF-8"
        ) from error


def _kind(value: Any) -> str:
    if value is None:
        return "nothing (null)"
    if isinstance(value, float) and value != value:
        return "not a number"
    names = {bool: "true or false", str: "text", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), f"of type {type(value).__name__}")


def _short(text: str, limit: int = 80) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
