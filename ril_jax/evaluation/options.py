"""Which option a response chooses: its letter, or the text of one option. Two letters, or none, choose nothing.

Strict where the field's kits guess: VLMEvalKit takes the only capital that stands alone, in a text of more than four
words if it is among the last four, so that "A spider sits there." is A; MMMU draws an option at random where it finds
none (docs/evaluation.md compares). Here an answer that is announced ("the answer is", a box, "答案是") counts before
all else, then a response that is nothing but a choice, then its last line and its first. What stays open may be put to
a model.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping

_TAGGED = (
    re.compile(r"<answer>(.*?)</answer>", re.I | re.S),
    re.compile(r"\\(?:boxed|fbox)\s*\{((?:[^{}]|\{[^{}]*\})*)\}"),
)
_ANNOUNCED = re.compile(
    r"\b(?:answers?|options?|choices?)\s*(?:(?:is|are|would\s+be|should\s+be|must\s+be)\b\s*:?|:|=)\s*([^\n]*)"
    r"|(?:答案|选项|选择)\s*(?:应该是|应为|应是|就是|是|为)?\s*[:：]?\s*([^\n]+)"
    r"|(?:故选|应选|因此选|所以选|我选|选)\s*[:：]?\s*([^\n]+)",
    re.I,
)
_REFUSED = re.compile(
    r"\b(?:none\s+of\s+(?:the\s+)?(?:options|choices|these)|cannot\s+(?:be\s+determined|determine|answer)|can't\s+(?:help|assist|answer)"
    r"|unable\s+to)\b|无法(?:确定|判断|回答)",
    re.I,
)
_LABEL = re.compile(r"\(?[A-Z]\)?\s*[.):：、]")
_AND = r"\s*(?:\bor\b|\band\b|/|,|、|，|&|和|或|及|与)\s*"
_CONJUNCTIONS = ("or", "and", "because", "since", "as", "is", "for", "which", "with")
_NOT = re.compile(r"(?:\b(?:not|no|never|neither|nor|without)|n't|不是|没有|并非|不)\s*(?:an?|the)?\s*$", re.I)


def match_option(response: str, options: Mapping[str, str]) -> str | None:
    """The letter of the one option that `response` chooses; None where it chooses none or several."""
    text = _plain(response)
    for segment in _segments(text):
        letters = _letters(segment, options)
        if len(letters) == 1:
            return letters.pop()
        if letters:
            return None
        texts = _options_in(segment, options, announced=segment != text)
        if len(texts) == 1:
            return texts.pop()
        if texts:
            return None
    return None


def _segments(text: str) -> list[str]:
    """Where the answer may stand, the likeliest first; where it is announced, there only."""
    for pattern in _TAGGED:
        if found := pattern.findall(text):
            return [_plain(found[-1])]
    lines = [line.strip() for line in text.splitlines() if any(c.isalnum() for c in line)]
    if not lines:
        return []
    whole = lines[0] if len(lines) == 1 else text
    if re.fullmatch(r"\W*(?:(?:the\s+)?(?:option|choice)\s+)?\(?[A-Za-z]\)?\W*", whole, re.I):
        return [whole]
    last, start = "", 0
    while match := _ANNOUNCED.search(text, start):
        last = next((group for group in match.groups() if group), "").strip() or last
        start = max(match.end() - len(match[match.lastindex]) if match.lastindex else match.end(), match.start() + 1)
    if any(c.isalnum() for c in last):
        return [last]
    labelled = [line for line in lines if _LABEL.match(line)]
    if len(labelled) > 1:  # the options themselves are repeated, one a line
        lines = [line for line in lines if line not in labelled]
    elif len(lines) > 1 and labelled == lines[:1]:
        return labelled
    return list(dict.fromkeys([*lines[-1:], *lines[:1]]))


def _letters(text: str, options: Mapping[str, str]) -> set[str]:
    """The letters that a piece of text names as choices."""
    known = "".join(options)
    if not known:
        return set()
    some, small = f"[{known}]", f"[{known}{known.lower()}]"
    if alone := re.fullmatch(rf"\W*(?:(?:option|choice|选项)\s*)?({small})\W*", text, re.I):
        return {alone[1].upper()}
    if re.fullmatch(rf"\W*{small}\W*(?:(?:{_AND}|\s)\W*{small}\W*)+", text) or re.fullmatch(rf"{some}{{2,}}", text):
        return {c.upper() for c in re.sub(r"\b(?:or|and)\b", "", text, flags=re.I) if c.upper() in options}
    certain = {
        letter.upper()
        for pattern in (
            rf"[(\[]\s*({small})\s*[)\]]",
            rf"\b(?:options?|choices?|letters?|answers?)\s+[(\"']?({small})(?![\w'’])",
            rf"(?<![\w'’(-])({some})[.):：、](?=\s*\S)(?![A-Za-z]\.)",
            rf"选项?\s*({some})(?![A-Za-z])",
        )
        for letter in re.findall(pattern, text, re.I if "option" in pattern else 0)
    }
    leading = re.match(rf"[^\w(]*\(?({some})\)?(?=[\s.):,;：、，。；]|$)", text)
    if leading and not _is_word(text, leading):
        both = re.match(rf"\)?{_AND}\(?({some})(?![\w'’])", text[leading.end() :])
        return {leading[1], both[1]} if both else {leading[1]}
    if certain:
        return certain
    return {
        m[1] for m in re.finditer(rf"(?<![\w'’-])({some})(?![\w'’-])", _apart(text)) if not _is_word(_apart(text), m)
    }


def _apart(text: str) -> str:
    """Chinese has no spaces: put some around its characters, so that a letter stands alone."""
    return re.sub(r"([\u3400-\u9fff])", r" \1 ", text)


def _is_word(text: str, match: re.Match) -> bool:
    """Whether "A" or "I" is the article or the pronoun: a lower-case word follows that is no conjunction."""
    following = re.match(r"\s+([a-z]+)", text[match.end(1) :])
    return match[1] in "AI" and following is not None and following[1] not in _CONJUNCTIONS


def _options_in(text: str, options: Mapping[str, str], *, announced: bool) -> set[str]:
    """The options whose text stands in `text`; of two, one of which is part of the other, the longer."""
    said = normalise(text)
    texts = {letter: normalise(option) for letter, option in options.items()}
    if equal := {letter for letter, option in texts.items() if option and option == said}:
        return equal
    if not announced and (len(said) > 2 * sum(map(len, texts.values())) or _REFUSED.search(text)):
        return set()
    found = {}
    for letter, option in texts.items():
        if option and (at := _find(said, option)) >= 0 and not _NOT.search(said[:at]):
            found[letter] = option
    return {
        a
        for a, option in found.items()
        if not any(option != other and _find(other, option) >= 0 for other in found.values())
    }


def _find(text: str, part: str) -> int:
    match = re.search(rf"(?<![a-z0-9.]){re.escape(part)}(?![a-z0-9]|\.\d)", text)
    return match.start() if match else -1


def normalise(text: str) -> str:
    """Case, white space, articles at the front, and punctuation around words do not count."""
    text = _plain(text).casefold()
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    text = re.sub(r"[\"“”‘’`!?;:,，。；：！？()\[\]{}]|\.(?!\d)", " ", text)
    return re.sub(r"^(?:an?|the) (?=.)", "", " ".join(text.split()))


def _plain(text: str) -> str:
    """LaTeX and Markdown dress taken off; wide letters and brackets as narrow ones."""
    text = unicodedata.normalize("NFKC", text)
    text = re.sub(r"\\(?:text|textbf|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\*\*|__|`|\\[()\[\]]", "", text)
    text = re.sub(r"\$([^$\n]*)\$", r"\1", text)
    return text.strip()
