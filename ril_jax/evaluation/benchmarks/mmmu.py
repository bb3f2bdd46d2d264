"""MMMU, validation: college subjects, options and open questions, by MMMU's own parsing (arXiv 2311.16502)."""

import re

from ril_jax.evaluation.benchmark import MultipleChoice, Part, in_place
from ril_jax.evaluation.benchmarks.chartqa import answers
from ril_jax.evaluation.rows import Row

MARKS = tuple(f"<image {i}>" for i in range(1, 10))
_DIRECT = "Answer with the option's letter from the given choices directly."
_SHORT = "Answer the question using a single word or phrase."
_ENDS = ",.!?;:'"  # that do not count around a response
_INDICATORS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_NUMBERS = (
    r"-?\b\d{1,3}(?:,\d{3})+\b",
    r"-?\d+(?:\.\d+)?[eE][+-]?\d+",
    r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])",
)


class MMMU(MultipleChoice):
    """One deviation: where MMMU draws an option at random for a response that names none, that is no answer here."""

    name, title = "mmmu", "MMMU"
    files = (("MMMU_DEV_VAL.tsv",),)
    split = "validation"
    source = "MMMU, mmmu/configs/llava1.5.yaml (prompt) and mmmu/utils/eval_utils.py (parsing)"
    rule = "MMMU's parsing of letters and of open answers; a model matches the rest if there is one"

    def prompt(self, row: Row) -> list[Part]:
        question, options = row.need("question"), row.options
        listed = "\n".join(f"({letter}) {text}" for letter, text in options.items())
        text = f"{question}\n\n{listed}\n\n{_DIRECT}" if options else f"{question}\n\n{_SHORT}"
        return in_place(text, row.num_images, MARKS, row.where)

    def parse(self, row: Row, response: str) -> str | None:
        if row.options:
            return parse_choice(response, row.options)
        return response.strip() or None

    def score(self, row: Row, parsed: str) -> float:
        if row.options:
            return float(parsed in answers(row))
        return float(open_correct(parsed, answers(row)))


def parse_choice(response: str, options: dict[str, str]) -> str | None:
    """The last option that is named: as "(B)"; if none is, as "B" on its own or "B."; in long texts by its words."""
    text = f" {response.strip().strip(_ENDS).strip()} "
    for forms in (("({})",), (" {} ",), ("{}.",)):
        places = {letter: max(text.rfind(form.format(letter)) for form in forms) for letter in options}
        if max(places.values()) >= 0:
            return max(places, key=lambda letter: places[letter])
    if len(text.split()) > 5:
        places = {letter: text.lower().rfind(option.lower()) for letter, option in options.items()}
        if max(places.values()) >= 0:
            return max(places, key=lambda letter: places[letter])
    return None


def open_correct(response: str, targets: list[str]) -> bool:
    """Whether one of the pieces that may answer holds a target's text, or equals its number to two decimals."""
    wanted = {value for target in targets for value in _normal(target)}
    for value in _candidates(response):
        if isinstance(value, float):
            if value in wanted:
                return True
        elif any(isinstance(target, str) and target in value for target in wanted):
            return True
    return False


def _candidates(response: str) -> set[str | float]:
    """What may answer: the ends of lines behind words such as "is" and "therefore", and the numbers in them."""
    text = response.strip().strip(".").lower()
    lines = text.split("\n")
    pieces = []
    for number, line in enumerate(lines):
        marks = (*_INDICATORS, "=") if number == len(lines) - 1 else _INDICATORS
        tails = [line.split(mark)[-1].strip() for mark in marks if mark in line]
        shortest = min((tail for tail in tails if tail), key=len, default="")
        if shortest.strip(_ENDS):
            pieces.append(shortest)
    pieces = pieces or [text]
    found = [*pieces, *(number for piece in pieces for form in _NUMBERS for number in re.findall(form, piece))]
    return {value for piece in found for value in _normal(piece)}


def _normal(text: str) -> list[str | float]:
    """A number to two decimals, or the text in lower case; a single letter only beside a space."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]
