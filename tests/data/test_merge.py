"""Claims about joining data sets of responses by id: nothing is lost, doubled or mixed up without a word."""

import collections
from dataclasses import replace

import pytest

from ril_jax.data.merge import Concatenation, merge_responses, open_responses, part_name
from ril_jax.data.records import Question, Response, read_dataset, write_dataset
from ril_jax.errors import InputError


def by_teacher(name, ids, finish="stop"):
    return [
        Question(id_, f"what is {id_}?", (), id_, (Response(name, f"{name} on {id_}", 3, finish, 1.0),)) for id_ in ids
    ]


def texts(questions):
    return {question.id: [response.text for response in question.responses] for question in questions}


def test_responses_are_joined_by_id_whatever_the_order(tmp_path):
    write_dataset(tmp_path / "b", by_teacher("b", "zyx"))
    merged = merge_responses([by_teacher("a", "xyz"), read_dataset(tmp_path / "b"), by_teacher("c", "yxz")])
    assert merged.models == ["a", "b", "c"]
    assert len(merged) == 3
    for _ in range(2):  # it can be gone through again
        assert texts(merged) == {id_: [f"{name} on {id_}" for name in "abc"] for id_ in "xyz"}
        assert [question.prompt for question in merged] == ["what is x?", "what is y?", "what is z?"]


@pytest.mark.parametrize(("first", "second", "lacking"), [("xyz", "xz", "b"), ("xz", "xyz", "a")])
def test_missing_responses_are_listed_whichever_side_lacks_them(first, second, lacking):
    with pytest.raises(InputError, match=rf"^{lacking} has no response to 1 of the 3 questions: y;"):
        merge_responses([by_teacher("a", first), by_teacher("b", second)])


@pytest.mark.parametrize(("missing", "kept"), [("keep", "xyzw"), ("drop", "xz")])
def test_questions_with_missing_responses_are_kept_or_dropped_and_told(missing, kept):
    merged = merge_responses([by_teacher("a", "xyz"), by_teacher("b", "xzw")], missing=missing)
    assert merged.missing == {"y": ["b"], "w": ["a"]}
    assert [question.id for question in merged] == list(kept)
    assert len(merged) == len(kept)


def test_a_model_that_is_missing_inside_one_data_set_is_found():
    both = [replace(q, responses=(*q.responses, Response("b", "b too", 2, "stop"))) for q in by_teacher("a", "xy")]
    with pytest.raises(InputError, match="b has no response to 1 of the 3 questions: z"):
        merge_responses([[*both, *by_teacher("a", "z")]])


def test_overlong_responses_are_left_out_and_their_questions_lack_them():
    cut = by_teacher("b", "x", "length") + by_teacher("b", "y")
    merged = merge_responses([by_teacher("a", "xy"), cut], drop_overlong=True, missing="keep")
    assert texts(merged) == {"x": ["a on x"], "y": ["a on y", "b on y"]}
    assert merged.missing == {"x": ["b"]}
    assert merged.num_overlong == 1
    with pytest.raises(InputError, match="b has no response to 1 of the 2 questions: x"):
        merge_responses([by_teacher("a", "xy"), cut], drop_overlong=True)
    assert texts(merge_responses([by_teacher("a", "xy"), cut])) == {i: [f"{m} on {i}" for m in "ab"] for i in "xy"}


def test_an_id_that_comes_twice_is_refused():
    with pytest.raises(InputError, match="data set 1: question id 'x' comes twice"):
        merge_responses([by_teacher("a", "xy"), by_teacher("b", "xyx")])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"solution": "other"}, "solution"),
        ({"prompt": "else?"}, "prompt"),
        ({"images": (b"a picture",)}, "images"),
        ({"images": (b"a picture",), "solution": "other"}, "images and solution"),
    ],
)
def test_another_question_under_the_same_id_is_refused_by_id_and_field(change, named):
    changed = [replace(q, **change) if q.id == "y" else q for q in by_teacher("b", "xy")]
    with pytest.raises(InputError, match=rf"under the id 'y' \(it differs in {named}\)"):
        merge_responses([by_teacher("a", "xy"), changed])


def test_further_columns_of_all_data_sets_are_kept():
    one, two = by_teacher("a", "x"), by_teacher("b", "x")
    merged = merge_responses([[replace(one[0], extra='{"k": 1, "o": 2}')], [replace(two[0], extra='{"k": 3, "p": 4}')]])
    assert next(iter(merged)).extra == '{"k": 1, "o": 2, "p": 4}'


def test_the_same_data_set_under_two_names_is_refused():
    with pytest.raises(InputError, match="data set 1 holds the same responses as data set 0"):
        merge_responses([by_teacher("a", "xyz"), by_teacher("a", "zx")])
    more = [replace(q, responses=(Response("a", f"again {q.id}", 2, "stop"),)) for q in by_teacher("a", "xyz")]
    assert texts(merge_responses([by_teacher("a", "xyz"), more]))["x"] == ["a on x", "again x"]


def test_merging_reads_lazily():
    class Counted(collections.UserList):
        reads = 0

        def __getitem__(self, index):
            Counted.reads += 1
            return super().__getitem__(index)

    merged = iter(merge_responses([Counted(by_teacher("a", "xyz")), by_teacher("b", "xyz")]))
    after_check = Counted.reads
    next(merged)
    assert Counted.reads == after_check + 1


def test_the_parts_of_a_job_are_one_data_set(tmp_path):
    for i, ids in enumerate(("xz", "y")):
        write_dataset(tmp_path / part_name(i, 2), by_teacher("a", ids))
    joined = open_responses(tmp_path)
    assert isinstance(joined, Concatenation)
    assert [question.id for question in joined] == ["x", "z", "y"]
    assert [question.id for question in joined[1:]] == ["z", "y"]
    assert texts(merge_responses([joined, by_teacher("b", "xyz")]))["y"] == ["a on y", "b on y"]


def test_a_part_that_is_missing_unfinished_or_of_another_job_is_named(tmp_path):
    for i in (0, 2):
        write_dataset(tmp_path / part_name(i, 3), by_teacher("a", "xyz"[i]))
    with pytest.raises(InputError, match=r"lacks 1 of its 3 parts, such as shard-00001-of-00003; run --shard=1/3"):
        open_responses(tmp_path)
    unfinished = tmp_path / part_name(1, 3)
    unfinished.mkdir()
    (unfinished / "job.json").write_text("{}")
    with pytest.raises(InputError, match="shard-00001-of-00003 is not finished"):
        open_responses(tmp_path)
    (tmp_path / part_name(0, 2)).mkdir()
    with pytest.raises(InputError, match="parts of 2 and of 3"):
        open_responses(tmp_path)
