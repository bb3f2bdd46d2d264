"""Claims about the journal of answers."""

import json

import pytest

from ril_jax.errors import InputError
from ril_jax.evaluation.journal import Journal, read_journal


def test_entries_are_there_again(tmp_path):
    path = tmp_path / "a" / "answers.jsonl"
    with Journal.open(path, print) as journal:
        journal.add("x", {"text": "一\n二\u2028三"})
        journal.add("y", {"text": "\ud800"})  # half a surrogate pair, as a model may leave behind
        assert read_journal(path)["x"] == {"text": "一\n二\u2028三"}
    with Journal.open(path, print) as journal:
        assert journal.entries == {"x": {"text": "一\n二\u2028三"}, "y": {"text": "?"}}


@pytest.mark.parametrize("torn", [b'{"key": "y", "te', b'{"key": "y", "text": "b"}', b"\xff\n", b'["y"]\n'])
def test_a_torn_end_is_cut_off_and_told(tmp_path, torn):
    path, told = tmp_path / "answers.jsonl", []
    whole = json.dumps({"key": "x", "text": "a"}).encode() + b"\n"
    path.write_bytes(whole + torn)
    assert read_journal(path) == {"x": {"text": "a"}}
    with Journal.open(path, told.append) as journal:
        assert journal.entries == {"x": {"text": "a"}}
        journal.add("y", {"text": "c"})
    assert told == [f"{path}: {len(torn)} bytes at its end are unreadable; those questions are asked again"]
    assert read_journal(path) == {"x": {"text": "a"}, "y": {"text": "c"}}


def test_two_processes_do_not_write_one_journal(tmp_path):
    path = tmp_path / "answers.jsonl"
    with Journal.open(path, print), pytest.raises(InputError, match="being written by another process"):
        Journal.open(path, print).__enter__()


def test_a_missing_journal_has_no_entries(tmp_path):
    assert read_journal(tmp_path / "none.jsonl") == {}
