"""The import of a user's questions: good rows come out as given, every other row is refused with its reason."""

import base64
import io
import json
import os
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ril_jax.data import __main__ as command
from ril_jax.data import importer
from ril_jax.data.chat import chat_messages
from ril_jax.data.importer import import_questions
from ril_jax.data.records import Question, Response, question_prompt, read_dataset, write_dataset
from ril_jax.errors import InputError


def encoded(color=(9, 80, 200), fmt="PNG", size=(6, 5)):
    stream = io.BytesIO()
    Image.new("RGB", size, color).save(stream, fmt)
    return stream.getvalue()


PNG, JPEG = encoded(), encoded((250, 1, 2), "JPEG")
GOOD = {"prompt": "How many?", "solution": "3"}


def data_url(data, kind="image/png"):
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "in" / "pictures").mkdir(parents=True)
    (tmp_path / "in" / "pictures" / "a.png").write_bytes(PNG)
    (tmp_path / "in" / "b.jpg").write_bytes(JPEG)
    return tmp_path


def run(folder, rows, **options):
    """Import `rows` as one JSONL file: the questions that were written, and the refusals."""
    source = write_jsonl(folder / "in" / "rows.jsonl", rows)
    log = io.StringIO()
    import_questions(source, folder / "out", log=log, num_threads=2, **options)
    return list(read_dataset(folder / "out")), read_refusals(folder / "out")


def read_refusals(output):
    path = output / "refused.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


# ---- rows that are good


def test_a_row_comes_out_as_it_was_given(folder):
    row = {"id": "x1", "prompt": "<image> and <image>?", "images": ["pictures/a.png", "b.jpg"], "solution": "both"}
    questions, refused = run(folder, [{**row, "level": 3, "tags": ["geo", None]}])
    assert refused == []
    assert questions == [
        Question("x1", row["prompt"], (PNG, JPEG), "both", (), '{"level": 3, "tags": ["geo", null]}'),
    ]


@pytest.mark.parametrize("field", ["solution", "answer", "ground_truth"])
def test_the_solution_may_have_three_names(folder, field):
    (question,), _ = run(folder, [{"prompt": "p", field: "42"}])
    assert (question.solution, question.extra) == ("42", "{}")


def test_of_several_solution_fields_the_first_counts_and_the_others_are_kept(folder):
    (question,), _ = run(folder, [{"prompt": "p", "answer": "long way", "ground_truth": "g", "solution": 7}])
    assert question.solution == "7"
    assert json.loads(question.extra) == {"answer": "long way", "ground_truth": "g"}


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        ({"images": ["b.jpg"]}, (JPEG,)),
        ({"image": "b.jpg"}, (JPEG,)),
        ({"images": "b.jpg"}, (JPEG,)),
        ({"images": [data_url(PNG)]}, (PNG,)),
        ({"images": [base64.b64encode(PNG).decode()]}, (PNG,)),
        ({"images": [base64.b64encode(JPEG).decode()]}, (JPEG,)),
        ({"images": [{"path": "b.jpg"}]}, (JPEG,)),
        ({"images": [{"bytes": None, "path": "b.jpg"}]}, (JPEG,)),
        ({"images": [{"bytes": data_url(PNG), "path": "gone.png"}]}, (PNG,)),
        ({"images": ["b.jpg", data_url(PNG), "pictures/../b.jpg"]}, (JPEG, PNG, JPEG)),
        ({"images": []}, ()),
        ({"images": None}, ()),
        ({"image": None, "images": ["b.jpg"]}, (JPEG,)),
        ({}, ()),
    ],
)
def test_images_come_as_paths_data_urls_base64_or_structs(folder, images, expected):
    questions, refused = run(folder, [{**GOOD, **images}])
    assert refused == []
    assert questions[0].images == expected
    assert questions[0].extra == "{}"


def test_absolute_paths_are_the_users_own(folder):
    (question,), _ = run(folder, [{**GOOD, "images": [str(folder / "in" / "b.jpg")]}])
    assert question.images == (JPEG,)


MESSAGES = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Was ist größer: a < b?"}]},
]


@pytest.mark.parametrize("as_text", [False, True])
def test_chat_messages_are_stored_in_the_form_that_the_tokenizer_takes(folder, as_text):
    prompt = json.dumps(MESSAGES) if as_text else MESSAGES
    (question,), refused = run(folder, [{"prompt": prompt, "images": ["b.jpg"], "solution": "b"}])
    assert refused == []
    assert question.prompt.startswith("[")
    assert chat_messages(question_prompt(question), 1, name="q") == chat_messages(MESSAGES, 1, name="q")


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": data_url(PNG)}},
        {"type": "image_url", "image_url": data_url(PNG)},
        {"type": "image", "image": "pictures/a.png"},
        {"type": "image", "image": None, "path": "pictures/a.png"},
    ],
)
def test_images_inside_messages_are_taken_out_of_them(folder, part):
    prompt = [{"role": "user", "content": [part, {"type": "text", "text": "What is it?"}]}]
    (question,), refused = run(folder, [{"prompt": prompt, "solution": "blue"}])
    assert refused == []
    assert question.images == (PNG,)
    assert question_prompt(question)[0]["content"][0] == {"type": "image"}
    assert "base64" not in question.prompt


def test_a_text_that_begins_with_a_bracket_stays_text(folder):
    (question,), _ = run(folder, [{"prompt": "[1, 2] sum?", "solution": 3}])
    assert question_prompt(question) == "[1, 2] sum?"


def test_ids_default_to_file_and_line_and_do_not_depend_on_other_rows(folder):
    questions, refused = run(folder, [GOOD, b"", b"{broken", {**GOOD, "id": 17}, {**GOOD, "id": None}])
    assert [question.id for question in questions] == ["rows-1", "17", "rows-5"]
    assert [(r["id"], r["line"]) for r in refused] == [("rows-3", 3)]


def test_a_byte_order_mark_and_windows_line_ends_are_no_obstacle(folder):
    (folder / "in" / "rows.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n\r\n")
    import_questions(folder / "in" / "rows.jsonl", folder / "out", log=io.StringIO())
    assert len(read_dataset(folder / "out")) == 1


def test_teacher_responses_in_our_form_are_kept_and_others_stay_as_further_columns(folder):
    ours = {"model": "t", "text": "so 3", "token_count": 4, "finish_reason": "stop", "judge": 1.0}
    questions, _ = run(folder, [{**GOOD, "responses": [ours]}, {**GOOD, "responses": ["so 3"]}])
    assert questions[0].responses == (Response("t", "so 3", 4, "stop", 1.0),)
    assert questions[0].extra == "{}"
    assert questions[1].responses == ()
    assert json.loads(questions[1].extra) == {"responses": ["so 3"]}


# ---- rows that are refused


def nested(prompt):
    return {"prompt": prompt, "solution": "1"}


BROKEN_ROWS = {
    "json": (b'{"prompt": "p", ', "not valid JSON"),
    "no object": (b'["prompt"]', "a list where a JSON object"),
    "not utf8": (b'{"prompt": "\xff", "solution": "1"}', "not UTF-8"),
    "no prompt": ({"question": "p", "solution": "1"}, "no `prompt` among its fields (question, solution)"),
    "null prompt": ({"prompt": None, "solution": "1"}, "no `prompt`"),
    "empty prompt": ({"prompt": "  ", "solution": "1"}, "empty"),
    "prompt number": ({"prompt": 5, "solution": "1"}, "`prompt` is a number"),
    "no messages": (nested([]), "prompt"),
    "no role": (nested([{"content": "hi"}]), "role"),
    "empty messages": (nested([{"role": "system", "content": "be kind"}, {"role": "user", "content": ""}]), "empty"),
    "answer last": (nested([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]), "the assistant"),
    "video part": (nested([{"role": "user", "content": [{"type": "video", "video": "v.mp4"}]}]), "video"),
    "video url": (nested([{"role": "user", "content": [{"type": "video_url", "video_url": {"url": "v"}}]}]), "video"),
    "video column": ({**GOOD, "videos": ["v.mp4"]}, "`videos` holds video"),
    "odd part": (nested([{"role": "user", "content": [{"type": "audio", "audio": "x"}]}]), "audio"),
    "no solution": ({"prompt": "p"}, "no solution; give one of the fields solution, answer, ground_truth"),
    "empty solution": ({"prompt": "p", "solution": " \n"}, "`solution` is empty"),
    "null solution": ({"prompt": "p", "answer": None}, "no solution"),
    "solution list": ({"prompt": "p", "answer": ["a"]}, "`answer` is a list"),
    "solution bool": ({"prompt": "p", "answer": True}, "true or false"),
    "solution nan": (b'{"prompt": "p", "answer": NaN}', "not a number"),
    "empty id": ({**GOOD, "id": ""}, "`id` is empty"),
    "id list": ({**GOOD, "id": [1]}, "`id` is a list"),
    "missing file": ({**GOOD, "images": ["gone.png"]}, "(gone.png): no such file"),
    "folder": ({**GOOD, "images": ["pictures"]}, "no such file"),
    "not an image": ({**GOOD, "images": ["rows.jsonl"]}, "(rows.jsonl)"),
    "truncated": ({**GOOD, "images": [data_url(PNG[:40])]}, "`images` 1"),
    "second truncated": ({**GOOD, "images": ["b.jpg", data_url(PNG[:40])]}, "`images` 2"),
    "broken base64": ({**GOOD, "images": ["data:image/png;base64,%%%"]}, "base64 is broken"),
    "no base64": ({**GOOD, "images": ["data:image/svg+xml,<svg/>"]}, "without base64"),
    "http": ({**GOOD, "images": ["https://x.org/a.png"]}, "download it"),
    "bucket": ({**GOOD, "image": "gs://bucket/a.png"}, "download it"),
    "file url": ({**GOOD, "image": "file:///a.png"}, "give its path"),
    "http in messages": (
        nested([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x/a"}}]}]),
        "URL",
    ),
    "null image": ({**GOOD, "images": [None]}, "nothing (null)"),
    "empty struct": ({**GOOD, "images": [{"bytes": None, "path": None}]}, "neither bytes nor a path"),
    "null byte": ({**GOOD, "images": ["a\0b.png"]}, "no such file"),
    "very long path": ({**GOOD, "images": ["a/" * 9000]}, "no such file"),
    "both columns": ({**GOOD, "image": "b.jpg", "images": ["b.jpg"]}, "`images` and in `image`"),
    "column and messages": (
        {**nested([{"role": "user", "content": [{"type": "image", "image": "b.jpg"}]}]), "images": ["b.jpg"]},
        "`images` and in the messages",
    ),
    "more placeholders": ({**nested("<image> <image> ?"), "images": ["b.jpg"]}, "2 image placeholders and the row 1"),
    "fewer placeholders": ({**nested("<image> ?"), "images": ["b.jpg"] * 2}, "1 image placeholders and the row 2"),
    "placeholder alone": (nested("<image> ?"), "1 image placeholders and the row 0"),
    "messages without": (
        {**nested([{"role": "user", "content": "what?"}]), "images": ["b.jpg"]},
        "0 image placeholders",
    ),
    "surrogate": (b'{"prompt": "p \\ud800", "solution": "1"}', "surrogate"),
    "bad finish": (
        {**GOOD, "responses": [{"model": "m", "text": "t", "token_count": 1, "finish_reason": "tired"}]},
        "finish_reason 'tired'",
    ),
}


@pytest.mark.parametrize("case", BROKEN_ROWS)
def test_a_broken_row_is_refused_with_its_reason_and_the_others_are_kept(folder, case):
    row, reason = BROKEN_ROWS[case]
    questions, refused = run(folder, [GOOD, row, {**GOOD, "id": "last"}])
    assert [question.id for question in questions] == ["rows-1", "last"]
    (refusal,) = refused
    assert reason in refusal["reason"]
    assert "\n" not in refusal["reason"]
    assert (refusal["file"], refusal["line"]) == ("rows.jsonl", 2)


def test_a_duplicate_id_is_refused_with_the_place_of_the_first(folder):
    questions, refused = run(
        folder, [{**GOOD, "id": "a"}, {**GOOD, "id": "b"}, {"prompt": "q", "answer": 1, "id": "a"}]
    )
    assert [question.id for question in questions] == ["a", "b"]
    assert refused[0]["id"] == "a"
    assert "duplicate id, first used at rows.jsonl:1" in refused[0]["reason"]


def test_a_refused_row_does_not_occupy_its_id(folder):
    questions, refused = run(folder, [{"id": "a", "prompt": "", "answer": "1"}, {**GOOD, "id": "a"}])
    assert [question.id for question in questions] == ["a"]
    assert len(refused) == 1


def test_order_is_kept_though_rows_are_checked_in_threads(folder):
    rows = [
        {**GOOD, "id": i, **({"images": [data_url(encoded(size=(700, 700)))]} if i % 7 == 0 else {})} for i in range(60)
    ]
    questions, _ = run(folder, rows)
    assert [question.id for question in questions] == [str(i) for i in range(60)]


# ---- parquet, folders, TFDS


def test_parquet_as_hugging_face_writes_it(folder):
    table = pa.table(
        {
            "prompt": ["<image> one?", "two?", "three?"],
            "images": pa.array(
                [[{"bytes": PNG, "path": "x.png"}], [], None],
                pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
            ),
            "answer": ["1", "", "3"],
            "score": [0.5, 1.5, float("nan")],
        }
    )
    pq.write_table(table, folder / "in" / "train-00000.parquet")
    import_questions(folder / "in" / "train-00000.parquet", folder / "out", log=io.StringIO())
    first, third = read_dataset(folder / "out")
    assert first == Question("train-00000-1", "<image> one?", (PNG,), "1", (), '{"score": 0.5}')
    assert (third.id, third.images, third.extra) == ("train-00000-3", (), '{"score": null}')
    (refusal,) = read_refusals(folder / "out")
    assert (refusal["line"], refusal["reason"].split(";")[0]) == (2, "`answer` is empty")


def test_rows_are_counted_and_can_be_read_in_part(tmp_path):
    """JSONL with blank lines and a broken one, parquet and TFDS: the same rows under the same places, however read."""
    folder = tmp_path / "in"
    lines = [json.dumps({**GOOD, "id": "j0"}).encode(), b"", b"not JSON", json.dumps({**GOOD, "id": "j2"}).encode()]
    write_jsonl(folder / "a.jsonl", lines)
    (folder / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + (folder / "a.jsonl").read_bytes())
    ids = [f"p{i}" for i in range(70)]
    pq.write_table(pa.table({"id": ids, "prompt": ["p"] * 70, "solution": ["s"] * 70}), folder / "b.parquet")
    write_dataset(tmp_path / "set", [Question(f"t{i}", "p", (), "1") for i in range(5)])
    for source, count in ((folder, 73), (folder / "a.jsonl", 3), (folder / "b.parquet", 70), (tmp_path / "set", 5)):
        rows = list(importer.read_rows(source))
        assert importer.count_rows(source) == len(rows) == count
        assert [row.index for row in rows] == list(range(count))
        assert list(importer.read_rows(source, wanted=lambda i: i % 3 == 1)) == rows[1::3]
    assert [path.name for path in importer.input_files(folder)] == ["a.jsonl", "b.parquet"]
    assert [path.suffix for path in importer.input_files(tmp_path / "set")] == [".array_record-00000-of-00001"]


def test_parquet_with_messages_paths_and_plain_bytes(folder):
    text = {"type": "text", "text": "which?"}
    prompt = [{"role": "user", "content": [{"type": "image", "text": None}, text]}]
    table = pa.table({"prompt": [prompt, prompt], "solution": [1, 2], "image": pa.array([PNG, JPEG], pa.binary())})
    pq.write_table(table, folder / "in" / "a.parquet", row_group_size=1)
    import_questions(folder / "in" / "a.parquet", folder / "out", log=io.StringIO())
    questions = list(read_dataset(folder / "out"))
    assert [question.images for question in questions] == [(PNG,), (JPEG,)]
    assert question_prompt(questions[0]) == [{"role": "user", "content": [{"type": "image"}, text]}]


def test_a_folder_is_read_file_by_file_with_paths_beside_each_file(tmp_path):
    write_jsonl(tmp_path / "in" / "b.jsonl", [GOOD])
    write_jsonl(tmp_path / "in" / "a" / "rows.jsonl", [{**GOOD, "images": ["here.png"]}])
    (tmp_path / "in" / "a" / "here.png").write_bytes(PNG)
    pq.write_table(pa.table({"prompt": ["p"], "solution": ["s"]}), tmp_path / "in" / "b.parquet")
    write_jsonl(tmp_path / "in" / ".hidden.jsonl", [GOOD])
    (tmp_path / "in" / "readme.txt").write_text("not a question")
    import_questions(tmp_path / "in", tmp_path / "in" / "out", log=io.StringIO())
    questions = list(read_dataset(tmp_path / "in" / "out"))
    assert [question.id for question in questions] == ["a/rows-1", "b.jsonl-1", "b.parquet-1"]
    assert questions[0].images == (PNG,)


def test_an_earlier_output_inside_the_folder_is_no_input(folder):
    write_jsonl(folder / "in" / "rows.jsonl", [GOOD, b"{"])
    for _ in range(2):
        summary = import_questions(folder / "in", folder / "in" / "out", overwrite=True, log=io.StringIO())
        assert (summary.written, summary.refused) == (1, 1)


def test_importing_our_own_data_set_changes_nothing(folder):
    questions = [
        Question("a", "<image>?", (JPEG,), "1", (Response("t", "one", 1, "stop", 1.0),), '{"level": 2}'),
        Question("b", json.dumps([{"role": "user", "content": [{"type": "text", "text": "b?"}]}]), (), "2"),
    ]
    write_dataset(folder / "first", questions)
    import_questions(folder / "first", folder / "second", log=io.StringIO())
    assert list(read_dataset(folder / "second")) == questions


def test_a_foreign_tfds_data_set_is_imported_with_its_images_untouched(tmp_path):
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets import features as tf
    from tensorflow_datasets import folder_dataset
    from tensorflow_datasets.core import SplitInfo

    features = tf.FeaturesDict(
        {"prompt": tf.Text(), "image": tf.Image(), "answer": tf.Scalar(dtype=np.int64), "tag": tf.Text()}
    )
    (tmp_path / "in").mkdir()
    writer = ArrayRecordWriter(str(tmp_path / "in" / "their-test.array_record-00000-of-00001"), "group_size:1")
    for number in range(2):
        example = {"prompt": "how many?", "image": JPEG, "answer": number, "tag": "ü"}
        writer.write(features.serialize_example(features.encode_example(example)))
    writer.close()
    split = SplitInfo(name="test", shard_lengths=[2], num_bytes=1, filename_template=None)
    folder_dataset.write_metadata(data_dir=tmp_path / "in", features=features, split_infos=[split], check_data=False)

    with pytest.raises(InputError, match="no split 'train'; its splits are test"):
        import_questions(tmp_path / "in", tmp_path / "out", log=io.StringIO())
    import_questions(tmp_path / "in", tmp_path / "out", split="test", log=io.StringIO())
    assert read_dataset(tmp_path / "out")[1] == Question("in-2", "how many?", (JPEG,), "1", (), '{"tag": "ü"}')


# ---- the command


def call(capsys, *arguments):
    try:
        status = command.main([str(argument) for argument in arguments])
    except SystemExit as error:  # argparse
        status = error.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_the_command_writes_lists_what_it_refused_and_exits_with_0(folder, capsys):
    source = write_jsonl(folder / "in" / "rows.jsonl", [GOOD, {"id": "bad", "prompt": "p"}])
    status, out, err = call(capsys, f"--input={source}", f"--output={folder / 'out'}")
    assert status == 0
    assert "wrote 1 questions" in out
    assert "refused 1 rows" in out
    assert "refused rows.jsonl:2 (id bad): no solution" in err
    assert [r["id"] for r in read_refusals(folder / "out")] == ["bad"]


def test_strict_writes_nothing_if_a_row_is_refused(folder, capsys):
    source = write_jsonl(folder / "in" / "rows.jsonl", [GOOD, {"id": "bad", "prompt": "p"}, b"{"])
    status, out, err = call(capsys, f"--input={source}", f"--output={folder / 'out'}", "--strict")
    assert (status, out) == (2, "")
    assert "rows.jsonl:2" in err
    assert "rows.jsonl:3" in err
    assert "2 of 3 rows are refused" in err
    assert sorted(path.name for path in folder.iterdir()) == ["in"]
    write_jsonl(source, [GOOD])
    assert call(capsys, f"--input={source}", f"--output={folder / 'out'}", "--strict")[0] == 0


def test_no_good_row_exits_with_2_and_writes_nothing(folder, capsys):
    source = write_jsonl(folder / "in" / "rows.jsonl", [b"{", b"}"])
    status, _, err = call(capsys, f"--input={source}", f"--output={folder / 'out'}")
    assert status == 2
    assert "none of its 2 rows can be used" in err
    assert not (folder / "out").exists()


def test_a_taken_output_is_refused_before_any_work_unless_overwrite(folder, capsys):
    source = write_jsonl(folder / "in" / "rows.jsonl", [GOOD, b"{"])
    arguments = (f"--input={source}", f"--output={folder / 'out'}")
    assert call(capsys, *arguments)[0] == 0
    status, _, err = call(capsys, *arguments)
    assert status == 2
    assert "--overwrite" in err
    assert "refused rows.jsonl" not in err
    write_jsonl(source, [GOOD, GOOD])
    assert call(capsys, *arguments, "--overwrite")[0] == 0
    assert len(read_dataset(folder / "out")) == 2
    assert not (folder / "out" / "refused.jsonl").exists(), "the earlier import's list is gone with it"


UNUSABLE = {
    "missing": (lambda folder: folder / "gone.jsonl", "does not exist"),
    "other suffix": (lambda folder: folder / "in" / "b.jpg", "neither .jsonl nor .parquet"),
    "folder without": (lambda folder: folder / "in" / "pictures", "holds no .jsonl and no .parquet"),
    "empty file": (lambda folder: write_jsonl(folder / "in" / "rows.jsonl", [b""]), "holds no rows"),
    "broken parquet": (lambda folder: write_jsonl(folder / "in" / "a.parquet", [b"PAR1"]), "cannot be read as parquet"),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_an_unusable_input_is_one_line_and_exit_status_2(folder, capsys, case):
    make, reason = UNUSABLE[case]
    status, _, err = call(capsys, f"--input={make(folder)}", f"--output={folder / 'out'}")
    assert status == 2
    assert reason in err
    assert "Traceback" not in err
    assert err.strip().splitlines()[-1].startswith("error: ")
    assert not (folder / "out").exists()


def test_parquet_without_a_prompt_column_names_those_it_has(folder, capsys):
    pq.write_table(pa.table({"question": ["p"], "answer": ["1"]}), folder / "in" / "a.parquet")
    status, _, err = call(capsys, f"--input={folder / 'in' / 'a.parquet'}", f"--output={folder / 'out'}")
    assert status == 2
    assert "no column `prompt`, only question, answer" in err


def test_a_terminal_sees_progress_with_rate_and_eta(folder, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    clock = iter(range(1000))
    monkeypatch.setattr(importer.time, "monotonic", lambda: float(next(clock)))
    log = Terminal()
    source = write_jsonl(folder / "in" / "rows.jsonl", [GOOD] * 10)
    import_questions(source, folder / "out", log=log, num_threads=1)
    assert "rows/s, ETA 0:" in log.getvalue()
    assert "10 rows checked, 0 refused" in log.getvalue()


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="root may read any file")
def test_an_image_without_read_permission_is_named(folder):
    (folder / "in" / "b.jpg").chmod(0)
    _, refused = run(folder, [GOOD, {**GOOD, "images": ["b.jpg"]}])
    assert "may not be read" in refused[0]["reason"]
