"""Claims about reading benchmark files as they are published."""

import json

import pytest
from helpers.benchmark_files import base64_png, choice, png, write_tsv

from ril_jax.errors import InputError
from ril_jax.evaluation.rows import RowFile


def images(file: RowFile) -> dict[str, tuple[bytes, ...]]:
    return {row.index: pictures for row, pictures in file.read(lambda row: True)}


def test_a_row_has_its_fields_options_and_image(tmp_path):
    file = RowFile.open(write_tsv(tmp_path / "X.tsv", [choice(5, E="nan", hint="")]))
    (row,) = file.rows
    assert (row.index, row.key, row.num_images) == ("5", "X/5", 1)
    assert row.options == {"A": "dog", "B": "cat", "C": "horse", "D": "teddy bear"}
    assert "hint" not in row.fields
    assert images(file) == {"5": (png(5),)}


def test_tabs_quotes_and_line_breaks_in_a_field_are_kept(tmp_path):
    question = 'He said "no",\tthen\nleft\n'
    (row,) = RowFile.open(write_tsv(tmp_path / "X.tsv", [choice(1, question=question)])).rows
    assert row.fields["question"] == question


def test_an_image_may_be_a_list(tmp_path):
    file = RowFile.open(write_tsv(tmp_path / "X.tsv", [choice(1, image=str([base64_png(3), base64_png(4)]))]))
    assert file.rows[0].num_images == 2
    assert images(file)["1"] == (png(3), png(4))


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["lent by a row before", "lent by a row behind"])
def test_an_image_may_be_that_of_another_row(tmp_path, order):
    two = str([base64_png(3), base64_png(4)])
    rows = [choice(1, image=two), choice(1_000_001, image="1")]
    file = RowFile.open(write_tsv(tmp_path / "X.tsv", [rows[i] for i in order]))
    assert [row.num_images for row in file.rows] == [2, 2]
    wanted = list(file.read(lambda row: row.index == "1000001"))
    assert [(row.index, pictures) for row, pictures in wanted] == [("1000001", (png(3), png(4)))]


def test_images_may_lie_beside_the_file(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(png(1))
    (tmp_path / "b.png").write_bytes(png(2))
    row = {"index": 1, "image_path": "['a.png', 'b.png']", "question": "?", "answer": "A"}
    assert images(RowFile.open(write_tsv(tmp_path / "X.tsv", [row])))["1"] == (png(1), png(2))


def test_mm_vet_v2_is_read_from_its_json(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "v2_0_0.jpg").write_bytes(png(1))
    entry = {"question": "What?<IMG>v2_0_0.jpg<IMG> And?", "answer": "x", "capability": ["rec", "ocr"]}
    (tmp_path / "mm-vet-v2.json").write_text(json.dumps({"v2_0": entry}))
    file = RowFile.open(tmp_path / "mm-vet-v2.json")
    assert dict(file.rows[0].fields) == {"question": "What?<image> And?", "answer": "x", "category": "rec,ocr"}
    assert images(file) == {"v2_0": (png(1),)}


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"question": "?", "answer": "A"}], "must name index and image"),
        ([choice(1), choice(1)], "row 2: the index 1 came before"),
        ([choice(1, image="9")], "the image of 1 is that of 9, which has none"),
        ([choice(1, index="")], "row 1 has no `index`"),
        ([], "must name index and image"),
    ],
)
def test_a_bad_file_is_one_line(tmp_path, rows, words):
    with pytest.raises(InputError, match=words):
        RowFile.open(write_tsv(tmp_path / "X.tsv", rows))


def test_a_file_cut_short_is_told(tmp_path):
    path = write_tsv(tmp_path / "X.tsv", [choice(1), choice(2)])
    path.write_bytes(path.read_bytes()[:-60])
    with pytest.raises(InputError, match=r"row 2 has \d+ fields for 9 names"):
        RowFile.open(path)


def test_an_image_that_is_not_base64_is_told(tmp_path):
    file = RowFile.open(write_tsv(tmp_path / "X.tsv", [choice(1, image="?" * 100)]))
    with pytest.raises(InputError, match="row 1: `image` is not base64"):
        images(file)


def test_a_missing_picture_is_told(tmp_path):
    row = {"index": 1, "image_path": "a.png", "question": "?", "answer": "A"}
    with pytest.raises(InputError, match=r"there is no image .*a\.png"):
        images(RowFile.open(write_tsv(tmp_path / "X.tsv", [row])))
