"""Questions on disk: one record a question, as a TFDS data set in ArrayRecord files.

The same form holds the questions that a user brings and, with `responses`, the teacher data set. It is read by
`read_dataset` here, by `tfds.builder_from_directory(folder).as_data_source("train")`, and by grain; TensorFlow is not
needed for any of it. Images are kept as the encoded bytes that came in, never re-encoded.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np

from ril_jax.errors import InputError

SHARD_SIZE = 256 * 2**20  # bytes of records before the next shard is begun
REFUSED_FILE = "refused.jsonl"  # the importer's list of refused rows, beside the shards
SELECTION_FILE = "selection.jsonl"  # what became of every question where some were selected, beside the shards
# TFDS and grain need single-record groups for random access. zstd:1 packs text as well as the default (brotli:6) and
# writes five times as fast; encoded images do not shrink under either.
_WRITER_OPTIONS = "group_size:1,zstd:1"


@dataclass(frozen=True)
class Response:
    """One teacher's answer to a question; `finish_reason` is "stop" or "length", `judge` -1 where nobody judged it."""

    model: str
    text: str
    token_count: int
    finish_reason: str
    judge: float = -1.0


@dataclass(frozen=True)
class Question:
    """One record; `prompt` is text or the JSON of chat messages, `images` encoded files, `extra` a JSON object."""

    id: str
    prompt: str
    images: tuple[bytes, ...]
    solution: str
    responses: tuple[Response, ...] = ()
    extra: str = "{}"


def question_prompt(question: Question) -> str | list[dict[str, Any]]:
    """The prompt as it was asked: a plain string, or the list of chat messages if `prompt` is the JSON of one."""
    messages = parse_messages(question.prompt)
    return question.prompt if messages is None else messages


def plain_prompt(question: Question) -> str:
    """The question as text, for a judge that sees no image."""
    prompt = question_prompt(question)
    if isinstance(prompt, str):
        return prompt
    texts = []
    for message in prompt:
        content = message["content"]
        parts = [content] if isinstance(content, str) else [p["text"] for p in content if p.get("type") == "text"]
        texts.append("\n".join(parts))
    return "\n".join(texts)


def parse_messages(prompt: str) -> list[dict[str, Any]] | None:
    """The chat messages whose JSON `prompt` is, or None for plain text (which may begin with a bracket, too)."""
    if not prompt.lstrip().startswith("["):
        return None
    try:
        value = json.loads(prompt)
    except ValueError:
        return None
    is_messages = isinstance(value, list) and value and all(isinstance(m, dict) and "role" in m for m in value)
    return value if is_messages else None


def write_dataset(
    folder: str | os.PathLike[str],
    questions: Iterable[Question],
    *,
    name: str = "questions",
    shard_size: int = SHARD_SIZE,
    overwrite: bool = False,
) -> int:
    """Write `questions`, in their order, as a TFDS data set that appears at `folder` only when it is complete.

    Holds one question at a time; a shard is closed after `shard_size` bytes. Returns how many were written.
    Raises InputError if `folder` is taken, an id comes twice, or there is no question at all.
    """
    with DatasetWriter(folder, name=name, shard_size=shard_size, overwrite=overwrite) as writer:
        for question in questions:
            writer.add(question)
    return writer.count


def read_dataset(folder: str | os.PathLike[str], split: str = "train") -> QuestionDataset:
    """Open a data set that `write_dataset` or `python -m ril_jax.data` wrote: lazy random access to its questions.

    Raises InputError if there is no such data set, or if a record is damaged (when that record is read).
    """
    return QuestionDataset(folder, split)


def shard_path(folder: str | os.PathLike[str], name: str, number: int, count: int) -> Path:
    """Where shard `number` of `count` lies in a data set of the TFDS name `name`."""
    return Path(folder) / f"{name}-train.array_record-{number:05d}-of-{count:05d}"


def write_shard(path: str | os.PathLike[str], questions: Iterable[Question]) -> int:
    """Write one ArrayRecord file of questions, which may be none; returns the bytes of its records.

    Raises InputError for a question that cannot be stored, OSError where the file cannot be written.
    """
    size = 0
    with _Shard(Path(path), Path(path)) as shard:
        for question in questions:
            record = _serialize(question)
            shard.write(record)
            size += len(record)
    return size


def load_tfds() -> None:
    """Import what writes data sets. While that lasts, imports of other threads fail (etils makes TFDS's lazy)."""
    _features()


def write_metadata(folder: str | os.PathLike[str], name: str, shard_lengths: Sequence[int], num_bytes: int) -> None:
    """Make a data set of the shards that lie at `shard_path` in `folder`: TFDS's description of them.

    shard_lengths: records of each. num_bytes: of all records.
    """
    import tensorflow_datasets as tfds
    from etils import epath

    template = tfds.core.ShardedFileTemplate(
        data_dir=epath.Path(folder), dataset_name=name, split="train", filetype_suffix="array_record"
    )
    split = tfds.core.SplitInfo(
        name="train", shard_lengths=list(shard_lengths), num_bytes=num_bytes, filename_template=template
    )
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features=_features(),
        split_infos=[split],
        filename_template=template,
        check_data=False,  # the check reads through tf.data, hence TensorFlow
    )


class QuestionDataset(Sequence[Question]):
    """The questions of one split, read from disk when asked for; picklable, and safe to read from several threads."""

    def __init__(self, folder: str | os.PathLike[str], split: str = "train"):
        self.folder, self.split = Path(folder), split
        self._source = RawExamples(folder, split)
        missing = {"id", "prompt", "images", "solution", "responses", "extra"} - set(self._source.fields)
        if missing:
            raise InputError(
                f"{folder}: the data set has no field {', '.join(sorted(missing))}; "
                "import it first: python -m ril_jax.data --input=FOLDER --output=NEW_FOLDER"
            )

    def __len__(self) -> int:
        return len(self._source)

    @overload
    def __getitem__(self, index: int) -> Question: ...
    @overload
    def __getitem__(self, index: slice) -> list[Question]: ...
    def __getitem__(self, index: int | slice) -> Question | list[Question]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        example = self._source[index]
        columns = example["responses"]  # TFDS keeps a sequence of structs as a struct of sequences
        responses = (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))
        return Question(
            id=example["id"],
            prompt=example["prompt"],
            images=tuple(example["images"]),
            solution=example["solution"],
            responses=tuple(Response(**response) for response in responses),
            extra=example["extra"],
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return QuestionDataset, (self.folder, self.split)

    def __repr__(self) -> str:
        return f"QuestionDataset({str(self.folder)!r}, split={self.split!r}, {len(self)} questions)"


class RawExamples(Sequence[dict[str, Any]]):
    """Any TFDS data set's examples as plain Python values: text as str, images as their encoded bytes, no arrays."""

    def __init__(self, folder: str | os.PathLike[str], split: str):
        import tensorflow_datasets as tfds

        self.folder = Path(folder)
        if not is_tfds_folder(folder):
            raise InputError(
                f"{folder} is not a TFDS data set (no dataset_info.json and features.json in it); "
                "name the folder that holds them, or write one with python -m ril_jax.data"
            )
        try:
            builder = tfds.builder_from_directory(self.folder)
        except Exception as error:  # whatever TFDS raises on a file that was cut or edited
            raise InputError(f"{folder}: its TFDS metadata cannot be read ({_line(error)}); write it again") from error
        if split not in builder.info.splits:
            raise InputError(
                f"{folder} has no split {split!r}; its splits are {', '.join(sorted(builder.info.splits))}"
            )
        try:
            self._records = builder.as_data_source(split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)
            # Opening reads no shard, so a missing one would only be found in the middle of a run.
            missing = [p for p in builder.info.splits[split].filepaths if not Path(p).exists()]
            length = len(self._records)
        except Exception as error:
            raise InputError(
                f"{folder}: it cannot be read at random ({_line(error)}); "
                "write it with TFDS file_format='array_record', or give JSONL or parquet"
            ) from error
        if missing:
            raise InputError(
                f"{folder}: shard {Path(missing[0]).name} is missing; copy it again or write the data set again"
            )
        self._length = length
        self._features = _undecoded(builder.info.features)

    @property
    def fields(self) -> list[str]:
        return list(self._features)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: Any) -> Any:
        position = index + len(self) if index < 0 else index
        if not 0 <= position < len(self):
            raise IndexError(f"question {index} of {len(self)}")
        try:
            example = self._features.deserialize_example_np(self._records[int(position)])
        except Exception as error:  # Riegeli reports damage as RuntimeError, a foreign record as anything
            raise InputError(
                f"{self.folder}: record {position} cannot be read ({_line(error)}); write the data set again"
            ) from error
        return _plain(example, self._features)


class DatasetWriter:
    """Writes a data set shard by shard into a hidden folder beside `folder`, and renames it when the block ends well.

    Used as a context manager; `staging` is where further files of the data set may be put meanwhile. If the block
    raises, `folder` is as it was before.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        name: str = "questions",
        shard_size: int = SHARD_SIZE,
        overwrite: bool = False,
    ):
        self.folder = Path(os.path.abspath(folder))
        self.name = dataset_name(name)
        self.shard_size = shard_size
        self.overwrite = overwrite
        self.count = 0
        _check_replaceable(self.folder, overwrite)
        self.staging = self.folder.parent / f".{self.folder.name}.incomplete-{uuid.uuid4().hex[:8]}"
        self._ids: set[str] = set()
        self._shard_lengths: list[int] = []
        self._shard_bytes = 0
        self._total_bytes = 0
        self._shard: _Shard | None = None

    def __enter__(self) -> DatasetWriter:
        try:
            self.staging.mkdir(parents=True)
        except OSError as error:
            raise OSError(f"{self.folder} cannot be written: {error.strerror}") from error
        return self

    def add(self, question: Question) -> None:
        """Append one question; raises InputError if its id was added before or a field cannot be stored."""
        if question.id in self._ids:
            raise InputError(f"question id {question.id!r} comes twice; give every question an id of its own")
        record = _serialize(question)
        if self._shard is None or self._shard_bytes + len(record) > self.shard_size:
            self._begin_shard()
        assert self._shard is not None
        self._shard.write(record)
        self._ids.add(question.id)
        self._shard_lengths[-1] += 1
        self._shard_bytes += len(record)
        self._total_bytes += len(record)
        self.count += 1

    def __exit__(self, error_type: Any, error: Any, traceback: Any) -> None:
        try:
            self._end_shard(discard=error_type is not None)
            if error_type is None:
                if not self.count:
                    raise InputError(f"{self.folder}: there is no question to write; give at least one")
                self._write_metadata()
                self._publish()
        finally:
            shutil.rmtree(self.staging, ignore_errors=True)

    def _begin_shard(self) -> None:
        self._end_shard()
        self._shard = _Shard(self.staging / f"shard-{len(self._shard_lengths)}", self.folder)
        self._shard_lengths.append(0)
        self._shard_bytes = 0

    def _end_shard(self, discard: bool = False) -> None:
        shard, self._shard = self._shard, None
        if shard is not None:
            shard.close(discard)

    def _write_metadata(self) -> None:
        count = len(self._shard_lengths)
        for number in range(count):
            os.rename(self.staging / f"shard-{number}", shard_path(self.staging, self.name, number, count))
        write_metadata(self.staging, self.name, self._shard_lengths, self._total_bytes)

    def _publish(self) -> None:
        if self.overwrite and self.folder.exists():
            old = self.folder.parent / f".{self.folder.name}.replaced-{uuid.uuid4().hex[:8]}"
            os.rename(self.folder, old)
            try:
                os.rename(self.staging, self.folder)
            except OSError:
                os.rename(old, self.folder)
                raise
            shutil.rmtree(old)
        else:
            try:
                os.rename(self.staging, self.folder)  # takes the place of an empty folder, too
            except OSError as error:
                raise OSError(f"{self.folder} appeared while it was being written: {error.strerror}") from error


class _Shard:
    """One ArrayRecord file that is being written; what goes wrong is told of `named`, as OSError."""

    def __init__(self, path: Path, named: Path):
        from array_record.python import array_record_module

        self._named = named
        self._writer = array_record_module.ArrayRecordWriter(str(path), _WRITER_OPTIONS)

    def write(self, record: bytes) -> None:
        try:
            self._writer.write(record)
        except RuntimeError as error:
            raise self._error(error) from error

    def close(self, discard: bool = False) -> None:
        try:
            self._writer.close()
        except RuntimeError as error:  # a full disk is noticed here at the latest
            if not discard:
                raise self._error(error) from error

    def __enter__(self) -> _Shard:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(discard=kind is not None)

    def _error(self, error: Exception) -> OSError:
        return OSError(f"{self._named} cannot be written: {_line(error)}")


def is_tfds_folder(folder: str | os.PathLike[str]) -> bool:
    """Whether `folder` itself holds a TFDS data set's metadata."""
    return all((Path(folder) / name).is_file() for name in ("dataset_info.json", "features.json"))


def dataset_name(name: str) -> str:
    """`name` as TFDS wants it: lower-case words joined by underscores, beginning with a letter."""
    words = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
    return words if words[:1].isalpha() else f"questions_{words}".rstrip("_")


def _check_replaceable(folder: Path, overwrite: bool) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise InputError(f"{folder} is a file; name a folder to write the data set to")
    entries = sorted(entry.name for entry in folder.iterdir())
    if not entries:
        return
    if not overwrite:
        raise InputError(
            f"{folder} is not empty; give --overwrite (overwrite=True) to replace it, or name another folder"
        )
    lists = f"{re.escape(REFUSED_FILE)}|{re.escape(SELECTION_FILE)}"
    ours = re.compile(rf"dataset_info\.json|features\.json|{lists}|.*\.array_record-\d+-of-\d+")
    foreign = [entry for entry in entries if not ours.fullmatch(entry)]
    if foreign:
        raise InputError(f"{folder} also holds {foreign[0]}, which is no part of a data set; name another folder")


def _serialize(question: Question) -> bytes:
    example = {
        "id": question.id,
        "prompt": question.prompt,
        "images": list(question.images),
        "solution": question.solution,
        "responses": [asdict(response) for response in question.responses],
        "extra": question.extra,
    }
    if not all(isinstance(image, bytes) for image in question.images):
        # Anything else TFDS would encode anew, arrays even through TensorFlow.
        raise InputError(f"question {question.id!r}: images must be the bytes of image files")
    features = _features()
    try:
        return features.serialize_example(features.encode_example(example))
    except (TypeError, ValueError, RuntimeError) as error:  # TFDS turns half a surrogate pair into a RuntimeError
        raise InputError(f"question {question.id!r} cannot be stored: {_line(error)}") from error


@functools.cache
def _features() -> Any:
    from tensorflow_datasets import features as tf

    return tf.FeaturesDict(
        {
            "id": tf.Text(doc="Unique in the data set."),
            "prompt": tf.Text(doc="Plain text, or the JSON of chat messages (then it begins with a bracket)."),
            "images": tf.Sequence(tf.Image(doc="The encoded file as it came in.")),
            "solution": tf.Text(),
            "responses": tf.Sequence(
                {
                    "model": tf.Text(),
                    "text": tf.Text(),
                    "token_count": tf.Scalar(np.int32),
                    "finish_reason": tf.Text(doc="stop or length"),
                    "judge": tf.Scalar(np.float32, doc="0 or 1, or -1 where nobody judged it."),
                }
            ),
            "extra": tf.Text(doc="The further columns, as a JSON object."),
        }
    )


def _undecoded(feature: Any) -> Any:
    """`feature` with its images left as bytes; TFDS's own SkipDecoding has no numpy form inside a Sequence."""
    from tensorflow_datasets import features as tf

    if isinstance(feature, tf.FeaturesDict):
        return tf.FeaturesDict({key: _undecoded(value) for key, value in feature.items()})
    if isinstance(feature, tf.Sequence):
        return tf.Sequence(_undecoded(feature.feature), length=feature._length)
    if isinstance(feature, tf.Image):
        return tf.Tensor(shape=(), dtype=np.object_)
    return feature


def _plain(value: Any, feature: Any = None) -> Any:
    from tensorflow_datasets import features as tf

    if isinstance(value, dict):
        inner = getattr(feature, "feature", feature)
        return {k: _plain(v, inner[k] if isinstance(inner, tf.FeaturesDict) else None) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v, getattr(feature, "feature", feature)) for v in value]
    if isinstance(value, bytes):
        innermost = feature
        while isinstance(innermost, tf.Sequence):
            innermost = innermost.feature
        return value.decode("utf-8") if isinstance(innermost, tf.Text) else value
    if hasattr(value, "tolist"):  # numpy arrays and scalars
        return _plain(value.tolist(), feature)
    return value


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
