"""Data sets on disk: what is written comes back, TFDS and grain read it, and it appears whole or not at all."""

import io
import os
import pickle
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from ril_jax.data import records
from ril_jax.data.records import (
    DatasetWriter,
    Question,
    Response,
    question_prompt,
    read_dataset,
    write_dataset,
)
from ril_jax.errors import InputError


def encoded(color, fmt="PNG", mode="RGB"):
    stream = io.BytesIO()
    Image.new(mode, (5, 4), color).save(stream, fmt)
    return stream.getvalue()


def make_questions(count, responses=0):
    images = [encoded((200, 10, 30)), encoded((0, 99, 0), "JPEG"), encoded(7, mode="P")]
    return [
        Question(
            id=f"q{i}",
            prompt=f"Wie viele Äpfel? {i}" if i % 2 else '[{"role": "user", "content": "how many?"}]',
            images=tuple(images[: i % 4]),
            solution=str(i),
            responses=tuple(Response(f"teacher{r}", f"höchstens {r}\n", r, "stop", 0.0) for r in range(responses)),
            extra='{"level": "hard"}',
        )
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher") / "set"
    assert write_dataset(folder, iter(make_questions(9, responses=3)), name="My set", shard_size=1500) == 9
    return folder


def test_questions_come_back_as_they_were_written(teacher_folder):
    expected = make_questions(9, responses=3)
    dataset = read_dataset(teacher_folder)
    assert len(dataset) == 9
    assert list(dataset) == expected
    assert dataset[-2] == expected[-2]
    assert dataset[2:5] == expected[2:5]
    with pytest.raises(IndexError):
        dataset[9]


def test_images_are_kept_byte_for_byte(teacher_folder):
    stored = read_dataset(teacher_folder)[3].images
    assert stored == (encoded((200, 10, 30)), encoded((0, 99, 0), "JPEG"), encoded(7, mode="P"))


def test_tfds_reads_it_as_a_data_source(teacher_folder):
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(teacher_folder)
    assert builder.info.splits["train"].num_examples == 9
    assert builder.info.splits["train"].num_shards > 1
    source = builder.as_data_source("train")
    example = source[1]
    assert len(source) == 9
    assert example["id"] == b"q1"
    assert example["prompt"].decode() == "Wie viele Äpfel? 1"
    np.testing.assert_array_equal(example["images"][0], np.full((4, 5, 3), (200, 10, 30), np.uint8))
    assert example["responses"]["token_count"] == [0, 1, 2]
    assert example["responses"]["finish_reason"] == [b"stop"] * 3
    assert source[0]["images"] == []


def test_grain_reads_its_shards(teacher_folder):
    import grain

    shards = sorted(str(path) for path in teacher_folder.glob("*.array_record*"))
    assert len(grain.sources.ArrayRecordDataSource(shards)) == 9
    batches = grain.MapDataset.source(read_dataset(teacher_folder)).batch(3, batch_fn=list)
    assert batches[1] == make_questions(9, responses=3)[3:6]


def test_neither_writing_nor_reading_needs_tensorflow(tmp_path):
    script = (
        "import sys\n"
        "from ril_jax.data.records import *\n"
        "assert 'tensorflow_datasets' not in sys.modules, 'importing the module alone stays cheap'\n"
        f"write_dataset({str(tmp_path / 'set')!r}, [Question('a', 'b', (), 'c')])\n"
        f"assert list(read_dataset({str(tmp_path / 'set')!r})) == [Question('a', 'b', (), 'c')]\n"
        "assert 'tensorflow' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_shards_hold_about_the_bytes_asked_for_and_every_question_once(tmp_path):
    questions = [Question(f"q{i}", "x" * 1000, (), "1") for i in range(20)]
    write_dataset(tmp_path / "set", questions, name="big", shard_size=6500)
    shards = sorted(path.name for path in (tmp_path / "set").glob("*.array_record*"))
    assert shards == [f"big-train.array_record-{i:05d}-of-00004" for i in range(4)]
    assert [question.id for question in read_dataset(tmp_path / "set")] == [f"q{i}" for i in range(20)]


def test_questions_are_written_while_they_are_produced(tmp_path):
    sizes = []

    def produce(writer):
        for i in range(12):
            sizes.append(sum(path.stat().st_size for path in writer.staging.iterdir()))
            yield Question(f"q{i}", "p", (os.urandom(100_000),), "1")

    with DatasetWriter(tmp_path / "set", shard_size=250_000) as writer:
        for question in produce(writer):
            writer.add(question)
    assert sizes[6] > 400_000, "closed shards are on disk while later questions are still to come"


def test_a_dataset_pickles_and_reads_from_many_threads(teacher_folder):
    from concurrent.futures import ThreadPoolExecutor

    dataset = pickle.loads(pickle.dumps(read_dataset(teacher_folder)))
    order = [i % 9 for i in range(90)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(dataset.__getitem__, order)) == [make_questions(9, responses=3)[i] for i in order]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("How many?", "How many?"),
        ("[1, 2, 3] has which sum?", "[1, 2, 3] has which sum?"),
        ("[1, 2, 3]", "[1, 2, 3]"),
        ("[]", "[]"),
        ('[{"role": "user", "content": "hi"}]', [{"role": "user", "content": "hi"}]),
    ],
)
def test_question_prompt_tells_messages_from_text(prompt, expected):
    assert question_prompt(Question("a", prompt, (), "1")) == expected


# ---- appearing whole or not at all


def test_nothing_appears_if_the_questions_fail_midway(tmp_path):
    def questions():
        yield from make_questions(3)
        raise RuntimeError("the teacher is gone")

    with pytest.raises(RuntimeError, match="teacher is gone"):
        write_dataset(tmp_path / "set", questions())
    assert list(tmp_path.iterdir()) == []


def test_a_failed_overwrite_leaves_the_old_data_set(tmp_path):
    write_dataset(tmp_path / "set", make_questions(2))
    with pytest.raises(InputError, match="'q0' comes twice"):
        write_dataset(tmp_path / "set", make_questions(1) * 2, overwrite=True)
    assert list(read_dataset(tmp_path / "set")) == make_questions(2)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_overwriting_must_be_asked_for_and_replaces_everything(tmp_path):
    write_dataset(tmp_path / "set", make_questions(9), name="old", shard_size=500)
    with pytest.raises(InputError, match="--overwrite"):
        write_dataset(tmp_path / "set", make_questions(1))
    write_dataset(tmp_path / "set", make_questions(1), name="new", overwrite=True)
    assert list(read_dataset(tmp_path / "set")) == make_questions(1)
    assert not list((tmp_path / "set").glob("old*"))
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_overwriting_never_deletes_what_is_no_part_of_a_data_set(tmp_path):
    write_dataset(tmp_path / "set", make_questions(1))
    (tmp_path / "set" / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match=r"thesis\.tex"):
        write_dataset(tmp_path / "set", make_questions(1), overwrite=True)
    assert (tmp_path / "set" / "thesis.tex").read_text() == "years of work"


def test_a_folder_that_appeared_meanwhile_is_not_replaced(tmp_path):
    def questions():
        yield from make_questions(1)
        (tmp_path / "set").mkdir()
        (tmp_path / "set" / "other.txt").write_text("of another run")

    with pytest.raises(OSError, match="appeared while"):
        write_dataset(tmp_path / "set", questions())
    assert (tmp_path / "set" / "other.txt").exists()


def test_a_full_disk_raises_and_leaves_nothing(tmp_path):
    script = (
        "import os, resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))\n"
        "from ril_jax.data.records import *\n"
        "try:\n"
        "    questions = (Question(str(i), 'p', (os.urandom(100_000),), 's') for i in range(20))\n"
        f"    write_dataset({str(tmp_path / 'set')!r}, questions)\n"
        "except OSError as error:\n"
        "    sys.exit(0 if 'set cannot be written' in str(error) else 3)\n"
        "sys.exit(4)\n"
    )
    assert subprocess.run([sys.executable, "-c", script], timeout=120).returncode == 0
    assert list(tmp_path.iterdir()) == []


def test_an_empty_data_set_is_refused(tmp_path):
    with pytest.raises(InputError, match="no question"):
        write_dataset(tmp_path / "set", [])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("field", ["prompt", "solution"])
def test_text_that_utf8_cannot_hold_is_named(tmp_path, field):
    question = replace(make_questions(1)[0], **{field: "\ud800"})
    with pytest.raises(InputError, match="'q0' cannot be stored"):
        write_dataset(tmp_path / "set", [question])


def test_images_that_are_not_encoded_bytes_are_refused(tmp_path):
    with pytest.raises(InputError, match="'q0': images must be"):
        write_dataset(tmp_path / "set", [replace(make_questions(1)[0], images=(np.zeros((2, 2, 3), np.uint8),))])


# ---- reading what is not right


def test_a_folder_that_is_no_data_set_is_named(tmp_path):
    with pytest.raises(InputError, match="is not a TFDS data set"):
        read_dataset(tmp_path)


def test_a_missing_split_is_named_with_those_there_are(teacher_folder):
    with pytest.raises(InputError, match="no split 'test'; its splits are train"):
        read_dataset(teacher_folder, "test")


def test_a_missing_shard_is_found_when_the_data_set_is_opened(tmp_path):
    write_dataset(tmp_path / "set", make_questions(9), name="x", shard_size=500)
    shard = sorted((tmp_path / "set").glob("*.array_record*"))[1]
    shard.unlink()
    with pytest.raises(InputError, match=f"{shard.name}"):
        read_dataset(tmp_path / "set")


@pytest.mark.parametrize(
    "damage", [lambda data: data[: len(data) // 2], lambda data: data[:100] + bytes(len(data) - 100)]
)
def test_a_damaged_shard_gives_one_line(tmp_path, damage):
    write_dataset(tmp_path / "set", [Question("a", "b", (os.urandom(300_000),), "c")])
    (shard,) = (tmp_path / "set").glob("*.array_record*")
    shard.write_bytes(damage(shard.read_bytes()))
    with pytest.raises(InputError, match="record 0 cannot be read") as caught:
        read_dataset(tmp_path / "set")[0]
    assert "\n" not in str(caught.value)


def test_damaged_metadata_gives_one_line(tmp_path):
    write_dataset(tmp_path / "set", make_questions(1))
    (tmp_path / "set" / "features.json").write_text("{")
    with pytest.raises(InputError, match="metadata cannot be read") as caught:
        read_dataset(tmp_path / "set")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "expected"), [("My Data-7", "my_data_7"), ("7b", "questions_7b"), ("___", "questions"), ("a", "a")]
)
def test_any_name_becomes_one_that_tfds_takes(given, expected):
    assert records.dataset_name(given) == expected
