"""Answers checked by rule: the final answer is cut out of the response and compared with the solution.

The solution decides how: an option letter, yes/no, one quantity, or else text. When in doubt the answer is wrong, for a
reward that can be had by hedging ("5 or 6", "A, B") is a reward that gets hacked.
"""

import math
import re
import string
import unicodedata
from dataclasses import dataclass
from fractions import Fraction

from ril_jax.errors import InputError

# Strongest first. Each is searched without regard to case; its last match counts, and group 1 runs to the line's end.
DEFAULT_PATTERNS = (
    r"<answer>(.*?)</answer>",
    r"\\(?:boxed|fbox)\s*(\{.*)",
    r"\b(?:final\s+)?(?:answer|option|choice)\s*(?:(?:is|are|would be|=)\s*:?|:)\s*([^\n]+)",
    r"\b(?:so|thus|hence|therefore)\b[\s,:]*([^\n]+)",
)


@dataclass(frozen=True)
class AnswerRules:
    """How a final answer is found, and how near a number is: |answer - solution| <= max(absolute, relative |solution|).

    `patterns` are regular expressions, strongest first, whose group 1 is the answer; with none matching, the last line
    is (and in it, the last number). Raises InputError for a bad pattern or tolerance.
    """

    patterns: tuple[str, ...] = DEFAULT_PATTERNS
    relative_tolerance: float = 1e-6
    absolute_tolerance: float = 1e-9

    def __post_init__(self):
        for pattern in self.patterns:
            try:
                groups = re.compile(pattern).groups
            except re.error as error:
                raise InputError(f"answer pattern {pattern!r} is no regular expression: {error}.") from error
            if groups < 1:
                raise InputError(f"answer pattern {pattern!r} has no group (...) for the answer.")
        for name in ("relative_tolerance", "absolute_tolerance"):
            value = getattr(self, name)
            if not (isinstance(value, int | float) and 0 <= value < math.inf):
                raise InputError(f"{name} of the answer rules is {value!r}: give a number of 0 or more.")


@dataclass(frozen=True)
class FinalAnswer:
    """The part of a response that answers, on one line; `announced` by a pattern, or else just the last line."""

    text: str
    announced: bool


def score_answer(response: str, solution: str, rules: AnswerRules | None = None) -> float:
    """1.0 if the response's final answer is the solution, else 0.0; empty and degenerate responses are 0.0.

    Raises InputError if the solution is empty.
    """
    rules = rules or AnswerRules()
    if not solution.strip():
        raise InputError("solution is empty: give every question one.")
    if is_degenerate(response):
        return 0.0
    answer = extract_answer(response, rules)
    plain_solution = _plain(solution)
    if letter := _solution_letter(plain_solution):
        return float(_answer_letters(answer, response) == {letter})
    if (word := _normalise(plain_solution)) in _YES_NO:
        return float(_yes_no(answer, response) == {word})
    if (quantity := _whole_quantity(plain_solution)) is not None:
        return float(_same_quantity(_answer_quantity(answer), quantity, rules))
    return float(_normalise(plain_solution) in _readings(answer))


def extract_answer(response: str, rules: AnswerRules | None = None) -> FinalAnswer:
    """The final answer of a non-empty response, after the strongest of the rules' patterns that matches."""
    for pattern in (rules or AnswerRules()).patterns:
        text = _last_match(re.compile(pattern, re.IGNORECASE | re.DOTALL), response)
        if text:
            if text.startswith("{"):
                text = _balanced(text)
            return FinalAnswer(" ".join(text.split()), announced=True)
    lines = [line.strip() for line in response.splitlines() if any(c.isalnum() for c in line)]
    return FinalAnswer(lines[-1] if lines else "", announced=False)


def is_degenerate(response: str) -> bool:
    """Whether a response says nothing: empty, punctuation only, one word or letter repeated, or ending in a loop."""
    words = response.split()
    letters = {c for c in response if not c.isspace()}
    if not any(c.isalnum() for c in letters):
        return True
    if len(words) >= 3 and len(set(words)) == 1:
        return True
    if len(letters) == 1 and sum(not c.isspace() for c in response) >= 12:
        return True
    return len(words) >= 16 and len(set(words[-16:])) == 1


def _last_match(pattern: re.Pattern, text: str) -> str:
    """Group 1 of the last match, which may begin inside an earlier one ("The answer is B. No, the answer is C.")."""
    last, start = "", 0
    while match := pattern.search(text, start):
        last = (match.group(1) or "").strip() or last
        start = max(match.start(1), match.start() + 1)
    return last


# --- text -------------------------------------------------------------------------------------------------------------


def _plain(text: str) -> str:
    """LaTeX and typographic dress taken off: "\\( \\frac{1}{2}\\,\\text{cm} \\)" -> "1/2 cm"."""
    text = unicodedata.normalize("NFKC", text).replace("\u2212", "-").replace("\u2044", "/")
    text = re.sub(r"\\(?:left|right|displaystyle|!)", "", text)
    text = re.sub(r"\\(?:boxed|fbox|text|textbf|textit|mathrm|mathbf|operatorname|mbox)\s*\{([^{}]*)\}", r" \1 ", text)
    mixed = r"(?<![\d.])(\d+)\s*\\[dt]?frac\s*\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}"
    text = re.sub(mixed, r"\1 \2/\3", text)
    text = re.sub(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"\1/\2", text)
    text = re.sub(r"\\[dt]?frac\s*(\d)\s*(\d)", r"\1/\2", text)
    text = re.sub(r"\{,\}", ",", text)
    text = re.sub(r"(?:\\times|\\cdot|×|\*)\s*10\s*\^\s*\{?\s*([+-]?\d+)\s*\}?", r"e\1", text)
    text = re.sub(r"(?<=\d)\s+e(?=[+-]?\d)", "e", text)
    text = re.sub(r"\^\s*\{?\s*(?:\\circ|°)\s*\}?|\\degree\b|°", " degrees ", text)
    text = re.sub(r"\\[()\[\],;: ]|~", " ", text)
    text = re.sub(r"\\([%$#&_])", r"\1", text)
    text = re.sub(r"\*\*|__|`", "", text)
    text = re.sub(r"\$(?=[^$]*\$)([^$]*)\$", r"\1", text)
    return " ".join(text.split())


def _normalise(text: str) -> str:
    """Case, white space, articles at the front and punctuation (but for that between digits) do not count."""
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    text = re.sub(r"(?<=\d)[.:/-](?=\d)", lambda match: f"\0{ord(match.group()):d}\0", text.casefold())
    text = "".join(" " if c in string.punctuation or unicodedata.category(c).startswith("P") else c for c in text)
    text = re.sub(r"\0(\d+)\0", lambda match: chr(int(match.group(1))), text)
    return re.sub(r"^(?:an?|the) (?=.)", "", " ".join(text.split()))


def _readings(answer: FinalAnswer) -> set[str]:
    """What the answer may be as text: all, its first sentence, or in a last line what follows "is" and the like."""
    text = _plain(answer.text)
    readings = {text, _first_sentence(text)}
    if not answer.announced:
        readings.add(re.split(r"\b(?:is|are|has|have|shows?)\b|=", text, flags=re.IGNORECASE)[-1])
    return {_normalise(reading) for reading in readings}


def _first_sentence(text: str) -> str:
    return re.split(r"[.;!?](?=\s|$)|\n", text, maxsplit=1)[0].strip()


def _balanced(text: str) -> str:
    """The inside of the brace group that the text begins with, or all that follows if it is never closed."""
    depth = 0
    for i, c in enumerate(text):
        depth += (c == "{") - (c == "}")
        if depth == 0:
            return text[1:i]
    return text[1:].partition("\n")[0]


# --- yes and no -------------------------------------------------------------------------------------------------------

_YES_NO = ("yes", "no", "true", "false")


def _yes_no(answer: FinalAnswer, response: str) -> set[str]:
    """The yes/no words of the answer, or where it has none, of the whole response ("Yes. The bar is red")."""
    said = set(_normalise(answer.text).split()).intersection(_YES_NO)
    return said or set(_normalise(response).split()).intersection(_YES_NO)


# --- option letters ---------------------------------------------------------------------------------------------------

_SOLUTION_LETTER = re.compile(r"\(?([A-J])\)?(?:[.):]\s*.*)?|\(([a-j])\)|(?:option|choice)\s+\(?([A-Ja-j])\)?\.?")
# A letter that is certainly one: bracketed, labelled ("B." or "B)" before something), after "option", or alone.
_CERTAIN_LETTERS = (
    re.compile(r"\(\s*([A-Ja-j])\s*\)"),
    re.compile(r"(?<![\w'])([A-J])[.):](?=\s*\S)"),
    re.compile(r"\b(?:[Oo]ption|[Cc]hoice|[Ll]etter)s?\s+\(?([A-Ja-j])\b"),
    re.compile(r"(?:\bor|\band|[,/&])\s*\(?([A-J])\b(?!['’])"),
)
_BARE_LETTER = re.compile(r"(?<![\w'’-])([A-J])(?![\w'’-])")


def _solution_letter(solution: str) -> str | None:
    match = _SOLUTION_LETTER.fullmatch(solution)
    return next((group for group in match.groups() if group), "").upper() if match else None


def _answer_letters(answer: FinalAnswer, response: str) -> set[str]:
    """The option letters that the answer names; two of them answer nothing."""
    whole = _plain(response)
    if re.fullmatch(r"(?:\W*\b[A-Ja-j]\b\W*|\W*\b(?:and|or|option|choice)\b\W*)+", whole):
        return set(re.findall(r"\b[A-J]\b", re.sub(r"\b(?:and|or|option|choice)\b", "", whole, flags=re.I).upper()))
    text = _plain(answer.text)
    if alone := re.fullmatch(r"\W*([A-Ja-j])\W*", text):
        return {alone.group(1).upper()}
    leading = re.match(r"\W*([A-J])(?:[.):,;]|\s*[-–—=]\s|\s*$|\s+(?:because|since|as|for|is)\b)", text)
    letters = {leading.group(1)} if leading else set()
    for pattern in _CERTAIN_LETTERS:
        letters.update(letter.upper() for letter in pattern.findall(text))
    # "or C" names a second option only beside a first one; bare letters count where nothing better was found.
    bare = [m.group(1) for m in _BARE_LETTER.finditer(text) if not _is_word(text, m)]
    if not letters or not leading:
        letters.update(bare)
    return letters


def _is_word(text: str, match: re.Match) -> bool:
    """Whether a bare "A" or "I" is the article or the pronoun: a lower-case word follows, other than a conjunction."""
    following = re.match(r"\s+([a-z]+)", text[match.end() :])
    conjunctions = ("or", "and", "because", "since", "as", "is", "for")
    return match.group(1) in "AI" and following is not None and following.group(1) not in conjunctions


# --- quantities -------------------------------------------------------------------------------------------------------

_NUMBER = (
    r"(?<![\w.])(?:(?<![\d)])[-+]\s?)?[$€£¥]?\s?"
    r"(?:\d+\s+\d+\s?/\s?\d+|(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:[eE][+-]?\d+)?(?:\s?/\s?\d+(?:\.\d+)?)?"
    r"|\.\d+(?:[eE][+-]?\d+)?)"
)
_QUANTITY = re.compile(
    rf"({_NUMBER})(?![\d]|,\d|\.\d)\s?(%|percent\b|[A-Za-zµμΩ]+(?:\s?\^?\s?\{{?[23²³]\}}?)?(?![\w]))?"
)
_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
_UNITS = {
    name: names.split()[0]
    for names in (
        "mm millimeter millimetre",
        "cm centimeter centimetre",
        "m meter metre",
        "km kilometer kilometre",
        "in inch inches",
        "ft foot feet",
        "mile mi",
        "mg milligram",
        "g gram",
        "kg kilogram",
        "lb pound lbs",
        "ml milliliter millilitre",
        "l liter litre",
        "ms millisecond",
        "s second sec",
        "min minute",
        "h hour hr",
        "day",
        "week",
        "month",
        "year",
        "degree deg",
        "dollar usd",
        "euro eur",
        "cent",
        "thousand",
        "million",
        "billion",
        "n newton",
        "j joule",
        "w watt",
        "v volt",
        "a ampere amp",
        "hz hertz",
        "pa pascal",
        "k kelvin",
    )
    for name in names.split()
}


@dataclass(frozen=True)
class _Quantity:
    value: float
    percent: bool
    unit: str | None  # canonical name of a known unit, with its power; None if unknown or absent


def _whole_quantity(text: str) -> _Quantity | None:
    """The text as one quantity and nothing else, its unit known; "3 red circles" is text."""
    match = _QUANTITY.fullmatch(text.strip().rstrip("."))
    if not match:
        return None
    quantity = _quantity(match)
    unit_word = match.group(2)
    return quantity if quantity and (unit_word is None or quantity.percent or quantity.unit) else None


def _answer_quantity(answer: FinalAnswer) -> _Quantity | None:
    """The one quantity of an announced answer, or the last one of a last line that is more than a list of numbers.

    Several different ones answer nothing.
    """
    text = _plain(answer.text)
    if answer.announced:
        text = _first_sentence(text)
    text = text.rsplit("=", 1)[-1]
    single = answer.announced or re.fullmatch(r"(?:[^A-Za-z]|\bor\b|\band\b)*", text)
    found = [quantity for match in _QUANTITY.finditer(text) if (quantity := _quantity(match))]
    if not found:
        first = (_normalise(text).split() or [""])[0]
        return _Quantity(float(_WORDS.index(first)), False, None) if first in _WORDS else None
    if single and len({(q.value, q.percent) for q in found}) > 1:
        return None
    return found[-1]


def _quantity(match: re.Match) -> _Quantity | None:
    number, word = match.group(1), match.group(2) or ""
    currency = {"$": "dollar", "€": "euro"}.get(next((c for c in number if c in "$€£¥"), ""))
    number = re.sub(r"[$€£¥,]", "", number)
    number = re.sub(r"\s*/\s*", "/", re.sub(r"^([-+])\s+", r"\1", number.strip()))
    sign = -1 if number.startswith("-") else 1
    try:
        parts = [_fraction(part) for part in number.lstrip("+-").split()]
        value = float(sum(parts)) * sign
    except (ZeroDivisionError, OverflowError, ValueError):
        return None
    if not math.isfinite(value):
        return None
    percent = word == "%" or word == "percent"
    return _Quantity(value, percent, None if percent else _unit(word) or currency)


def _fraction(text: str) -> Fraction | float:
    numerator, _, denominator = text.partition("/")
    if not denominator:
        return float(numerator)
    return Fraction(numerator) / Fraction(denominator)


def _unit(word: str) -> str | None:
    match = re.fullmatch(r"([A-Za-zµμΩ]+)\s?\^?\s?\{?([23²³]?)\}?", word)
    if not match:
        return None
    name, power = match.group(1).lower(), match.group(2)
    known = _UNITS.get(name) or (_UNITS.get(name[:-1]) if name.endswith("s") else None)
    return known + unicodedata.normalize("NFKC", power) if known else None


def _same_quantity(answer: _Quantity | None, solution: _Quantity, rules: AnswerRules) -> bool:
    """Equal within tolerance, units not contradicting; a percent sign may be missing, and 50 % is also 0.5."""
    if answer is None or (answer.unit and solution.unit and answer.unit != solution.unit):
        return False

    def close(a: float, b: float) -> bool:
        return abs(a - b) <= max(rules.absolute_tolerance, rules.relative_tolerance * abs(b))

    if close(answer.value, solution.value):
        return True
    if answer.percent == solution.percent:
        return False
    answer_value, solution_value = (q.value / 100 if q.percent else q.value for q in (answer, solution))
    return close(answer_value, solution_value)
