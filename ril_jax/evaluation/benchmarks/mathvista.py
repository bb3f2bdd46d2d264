"""MathVista, testmini: mathematics in pictures; options, numbers, lists and texts (arXiv 2310.02255)."""

import ast

from ril_jax.errors import InputError
from ril_jax.evaluation.asking import read_value, value_messages
from ril_jax.evaluation.benchmark import Benchmark, Part
from ril_jax.evaluation.numbers import final_answer, last_list, last_number, same_text
from ril_jax.evaluation.options import match_option
from ril_jax.evaluation.rows import LETTERS, Row


class MathVista(Benchmark):
    """The published question says itself in which form it wants the answer ("Hint: ..."), and lists its choices."""

    name, title = "mathvista", "MathVista"
    files = (("MathVista_MINI.tsv",),)
    source = (
        "VLMEvalKit, vlmeval/dataset/image_base.py (prompt); MathVista, evaluation/{extract_answer,calculate_score}.py"
    )
    rule = (
        "the option, number, list or text that the response ends in or announces equals the answer; decimals are "
        "rounded as the question asks; a model extracts the rest if there is one"
    )
    judge = "may"

    def prompt(self, row: Row) -> list[Part]:
        return [*range(row.num_images), row.need("question")]

    def parse(self, row: Row, response: str) -> str | None:
        kind = _kind(row)
        if kind == "choice":
            return match_option(response, _choices(row))
        answer = final_answer(response)
        if kind == "list":
            values = last_list(answer) or last_list(response)
            return None if values is None else str(values)
        if kind == "text":
            return answer or None
        number = last_number(answer)
        return None if number is None else repr(number)

    def score(self, row: Row, parsed: str) -> float:
        kind, answer = _kind(row), row.need("answer").strip()
        if kind == "choice":
            return float(parsed == _right_letter(row))
        if kind == "list":
            return float(_as_list(parsed) == _as_list(answer))
        if kind == "text":
            return float(same_text(parsed, answer))
        given, wanted = last_number(parsed), last_number(answer)
        if wanted is None:
            raise InputError(f"{row.where}: the answer {answer!r} is no number; give the file as it is published")
        if given is None:
            return 0.0
        places = int(float(row.get("precision", "0") or 0)) if kind == "float" else 0
        if kind == "integer":
            return float(given == wanted)
        return float(round(given, places) == round(wanted, places))

    def judge_messages(self, row: Row, response: str) -> list[dict[str, str]]:
        return value_messages(row.need("question"), response)

    def read_judge(self, row: Row, reply: str) -> str | None:
        value = read_value(reply)
        return None if value is None else self.parse(row, value)

    def categories(self, row: Row) -> list[str]:
        skills = row.get("skills")
        try:
            listed = [str(skill) for skill in ast.literal_eval(skills)] if skills.startswith("[") else [skills]
        except (ValueError, SyntaxError):
            listed = [skills]
        return [name for name in (row.get("task"), *listed) if name]


def _kind(row: Row) -> str:
    if row.get("question_type") == "multi_choice":
        return "choice"
    kind = row.get("answer_type", "text")
    return kind if kind in ("integer", "float", "list") else "text"


def _choices(row: Row) -> dict[str, str]:
    try:
        choices = ast.literal_eval(row.need("choices"))
        return {letter: str(text) for letter, text in zip(LETTERS, choices, strict=False)}
    except (ValueError, SyntaxError, TypeError) as error:
        raise InputError(f"{row.where}: `choices` is no list; give the file as it is published") from error


def _right_letter(row: Row) -> str:
    if "answer_option" in row.fields:
        return row.fields["answer_option"].strip()
    answer = row.need("answer").strip()
    found = [letter for letter, text in _choices(row).items() if text.strip() == answer]
    if not found:
        raise InputError(f"{row.where}: the answer {answer!r} is none of its choices; give the file as it is published")
    return found[0]


def _as_list(text: str) -> list[float | str]:
    return [float(v) if isinstance(v, int | float) else str(v) for v in last_list(text) or []]
