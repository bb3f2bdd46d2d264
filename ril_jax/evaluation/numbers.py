"""Numbers in answers: relaxed accuracy as ChartQA has it, and the extraction and equality of MathVista's values."""

from __future__ import annotations

import ast
import re
import unicodedata

from ril_jax.evaluation.options import normalise

_TAGGED = (
    re.compile(r"<answer>(.*?)</answer>", re.I | re.S),
    re.compile(r"\\(?:boxed|fbox)\s*\{((?:[^{}]|\{[^{}]*\})*)\}"),
)
_ANNOUNCED = re.compile(
    r"\b(?:final\s+)?(?:answer|result|value)\s*(?:(?:is|are|would\s+be|=)\s*:?|:)\s*([^\n]+)"
    r"|(?:答案|结果)\s*(?:应该是|应为|是|为)?\s*[:：]?\s*([^\n]+)",
    re.I,
)
_CONCLUDED = re.compile(r"\b(?:so|thus|hence|therefore)\b[\s,:]+(?=\S)|(?:因此|所以)[，,\s]*(?=\S)", re.I)
_NUMBER = r"[-+]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?|[-+]?\.\d+"
_FRACTION = rf"({_NUMBER})\s?/\s?(\d+(?:\.\d+)?)"
_VALUE = re.compile(rf"(?<![A-Za-z0-9_.])(?:{_FRACTION}|({_NUMBER}))(?![\d])(?!\.\d)")
_WORDS = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
    "twenty",
]


def final_answer(response: str) -> str:
    """What a response gives as its answer, on one line: boxed or tagged, announced, or its last line from "so" on."""
    text = unicodedata.normalize("NFKC", response)
    for pattern in _TAGGED:
        if found := pattern.findall(text):
            return _undressed(found[-1])
    last, start = "", 0
    while match := _ANNOUNCED.search(text, start):
        last = (match[1] or match[2] or "").strip() or last
        start = max(match.start(match.lastindex or 0), match.start() + 1)
    if last:
        return _undressed(re.split(r"(?<=\D)[.;。；](?=\s|$)|(?<=\d)[.;。；](?=\s+[A-Z]|\s*$)", last, maxsplit=1)[0])
    lines = [line for line in text.splitlines() if line.strip()]
    return _undressed(_CONCLUDED.split(lines[-1])[-1]) if lines else ""


def relaxed_correct(answer: str, target: str, *, tolerance: float = 0.05) -> bool:
    """Relaxed accuracy: numbers within 5 % of the target's value, texts equal but for case.

    ChartQA (arXiv 2203.10244, section 5.1) as pix2struct and VLMEvalKit have it: a percent sign divides by 100 on
    either side. Beyond them, thousands commas, a currency sign, a unit behind the number and a full stop at the end do
    not count, and numbers equal a target of 0 by value.
    """
    answer, target = answer.strip(), target.strip()
    given, wanted = chart_value(answer), chart_value(target)
    if given is not None and wanted is not None:
        return abs(given - wanted) <= tolerance * abs(wanted)
    return bool(answer) and _text(answer) == _text(target)


def chart_value(text: str) -> float | None:
    """The value of a text that is one number, with a currency sign, a percent sign or a unit perhaps."""
    text = unicodedata.normalize("NFKC", text).replace("\u2212", "-").strip().rstrip(".").strip()
    match = re.fullmatch(rf"([-+]?)\s?[$€£¥]?\s?({_NUMBER})\s?(%|percent|[A-Za-zµ°][\w°²³/]*)?", text)
    if match is None or (re.fullmatch(r"[-+].*", match[2]) and match[1]):
        return None
    value = float(match[2].replace(",", "")) * (-1 if match[1] == "-" else 1)
    return value / 100 if match[3] in ("%", "percent") else value


def last_number(text: str) -> float | None:
    """The last number of a text ("x = 14", "$1.45", "3/4", "fourteen"); None where there is none."""
    text = _undressed(unicodedata.normalize("NFKC", text)).replace("\u2212", "-")
    text = re.sub(r"(?<=[\w)])-(?=[\d.])", " ", text)  # 2007-2008 holds no negative number
    found = list(_VALUE.finditer(text))
    if found:
        match = found[-1]
        if match[1]:
            bottom = float(match[2])
            return float(match[1].replace(",", "")) / bottom if bottom else None
        return float(match[3].replace(",", ""))
    words = [word for word in re.findall(r"[a-z]+", text.lower()) if word in _WORDS]
    return float(_WORDS.index(words[-1])) if words else None


def last_list(text: str) -> list[float | str] | None:
    """The last bracketed list of a text: [2007, 2008]."""
    for found in reversed(re.findall(r"\[[^\[\]]*\]", text)):
        try:
            values = ast.literal_eval(found)
        except (ValueError, SyntaxError, MemoryError):
            continue
        if isinstance(values, list) and values:
            return values
    return None


def _undressed(text: str) -> str:
    """LaTeX and Markdown taken off a line."""
    text = re.sub(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"\1/\2", text)
    text = re.sub(r"\\(?:text|textbf|mathrm|mathbf|mbox)\s*\{([^{}]*)\}", r" \1", text)
    text = re.sub(r"\\[()\[\],;!: ]|\*\*|`|\{,\}", lambda match: "," if match[0] == "{,}" else " ", text)
    text = re.sub(r"\\([%$#&])", r"\1", text)
    text = re.sub(r"\$([^$\n]*)\$", r"\1", text)
    return " ".join(text.split())


def _text(text: str) -> str:
    return " ".join(text.casefold().rstrip(".").split())


def same_text(a: str, b: str) -> bool:
    """Equal but for case, white space, punctuation and an article in front."""
    return bool(normalise(a)) and normalise(a) == normalise(b)
