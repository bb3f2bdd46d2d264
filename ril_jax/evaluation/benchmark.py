"""What a benchmark is: how a row is asked, what a response answers, and what the answer is worth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from ril_jax.errors import InputError
from ril_jax.evaluation.asking import choice_messages, read_choice
from ril_jax.evaluation.numbers import final_answer, same_text
from ril_jax.evaluation.options import match_option
from ril_jax.evaluation.rows import Row

Part = str | int  # of a prompt: a text, or an image by its number from 0

SELECT = "Please select the correct answer from the options above. \n"


class Benchmark:
    """One benchmark; `benchmarks/` has its modules.

    Attributes:
      name: on the command line. title: its column in the paper's table.
      files: the names that its files may have, the first that is there counts; of each tuple one is read.
      source: where prompt and rule come from. rule: the rule in a line.
      judge: whether a model "may" help where the rule finds no answer, "must" grade, or is not asked ("no").
      split: the value of the column `split` that is counted, where there is such a column.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    files: ClassVar[tuple[tuple[str, ...], ...]]
    source: ClassVar[str]
    rule: ClassVar[str]
    judge: ClassVar[Literal["no", "may", "must"]] = "no"
    split: ClassVar[str] = ""

    def counts(self, row: Row) -> bool:
        """Whether a row of the file belongs to the score."""
        return not self.split or row.get("split", self.split) == self.split

    def prompt(self, row: Row) -> list[Part]:
        """The user's message. Raises InputError for a row that lacks what it needs."""
        raise NotImplementedError

    def parse(self, row: Row, response: str) -> str | None:
        """What the response answers, or None where the rule finds no answer."""
        raise NotImplementedError

    def score(self, row: Row, parsed: str) -> float:
        """What the answer is worth, from 0 to 1. Raises InputError for a row without a right answer."""
        raise NotImplementedError

    def judge_messages(self, row: Row, response: str) -> list[dict[str, str]]:
        """What a model is asked about a response that has no parse, or that it must grade."""
        raise NotImplementedError

    def read_judge(self, row: Row, reply: str) -> str | None:
        """The parse that a model's reply gives; None where it gives none."""
        raise NotImplementedError

    def group(self, row: Row) -> str:
        """Rows of one group count as one question, which is right only if all are (circular evaluation)."""
        return row.key

    def categories(self, row: Row) -> list[str]:
        """Under which names the row's score is told apart."""
        return list(dict.fromkeys(row.fields[name] for name in ("l2-category", "category") if name in row.fields))

    def answer(self, row: Row) -> str:
        """The right answer, for people."""
        return row.need("answer")


class MultipleChoice(Benchmark):
    """Options with letters, asked as VLMEvalKit asks; without options the answer's text must be given."""

    source = "VLMEvalKit, vlmeval/dataset/image_mcq.py (prompt); ril_jax/evaluation/options.py (matching)"
    rule = "the one option that the response names, by its letter or its text; a model matches the rest if there is one"
    judge = "may"

    def prompt(self, row: Row) -> list[Part]:
        return [*range(row.num_images), self.text(row)]

    def text(self, row: Row) -> str:
        """Hint, question, options, and what to do with them."""
        hint = f"Hint: {row.fields['hint']}\n" if "hint" in row.fields else ""
        options = "".join(f"{letter}. {text}\n" for letter, text in row.options.items())
        return f"{hint}Question: {row.need('question')}\n" + (f"Options:\n{options}{SELECT}" if options else "")

    def options(self, row: Row) -> dict[str, str]:
        return row.options

    def parse(self, row: Row, response: str) -> str | None:
        if options := self.options(row):
            return match_option(response, options)
        return row.need("answer").strip() if same_text(final_answer(response), row.need("answer")) else None

    def score(self, row: Row, parsed: str) -> float:
        return float(parsed == row.need("answer").strip())

    def judge_messages(self, row: Row, response: str) -> list[dict[str, str]]:
        return choice_messages(row.get("question"), self.options(row) or {"A": row.need("answer")}, response)

    def read_judge(self, row: Row, reply: str) -> str | None:
        if options := self.options(row):
            return read_choice(reply, options)
        return read_choice(reply, {"A": row.need("answer")}) and row.need("answer").strip()

    def answer(self, row: Row) -> str:
        answer = row.need("answer").strip()
        return f"{answer}. {row.options[answer]}" if answer in row.options else answer


def in_place(text: str, num_images: int, marks: Sequence[str], where: str) -> list[Part]:
    """The text with images where `marks[i]` stands for image i; images that no mark names come first.

    Raises InputError for a mark without an image.
    """
    parts: list[Part] = [text]
    used = set()
    for number, mark in enumerate(marks):
        found = [part for part in parts if isinstance(part, str) and mark in part]
        if found and number >= num_images:
            raise InputError(f"{where} names {mark} and has {num_images} images; give the file as it is published")
        if found:
            used.add(number)
            parts = [piece for part in parts for piece in _split(part, mark, number)]
    return [*(i for i in range(num_images) if i not in used), *(part for part in parts if part != "")]


def _split(part: Part, mark: str, number: int) -> list[Part]:
    if not isinstance(part, str):
        return [part]
    pieces: list[Part] = []
    for i, text in enumerate(part.split(mark)):
        pieces += [number, text] if i else [text]
    return pieces
