"""The page of a comparison: one HTML file without script or outside resource, in which every text is escaped."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ril_jax.errors import InputError
from ril_jax.evaluation.comparison import Compared, Flip, Side, averages
from ril_jax.evaluation.results import Sample
from ril_jax.evaluation.rows import RowFile
from ril_jax.evaluation.tasks import thumbnail

_BINS, _WIDTH, _HEIGHT = 24, 240, 60


def comparison_page(sides: Sequence[Side], compared: Sequence[Compared], *, samples: int, data: Path | None) -> str:
    """The page. samples: flipped questions shown for each benchmark and folder, as many gained as lost.

    data: where the benchmarks' files are, if not where they were; a question whose picture is not found has none.
    """
    sections = [
        f"<h2>Scores</h2>{_scores(sides, compared)}",
        f"<h2>Response lengths</h2>{''.join(_lengths(sides, c) for c in compared)}",
        *(_flips(sides, c, samples, data) for c in compared),
    ]
    title = _text(" and ".join(side.label for side in sides))
    legend = "".join(f"<div><dt>{side.letter}</dt><dd>{_text(side.label)}</dd></div>" for side in sides)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" '
        f'content="light dark">\n<title>{title}</title>\n<style>{_STYLE}</style></head>\n'
        f"<body><main><h1>Results side by side</h1>\n<dl>{legend}</dl>\n"
        + "\n".join(sections)
        + "\n</main></body></html>\n"
    )


def _scores(sides: Sequence[Side], compared: Sequence[Compared]) -> str:
    """The table, with a row for the average where there are several benchmarks; its columns go by letters."""
    head = ["benchmark", "questions", *(side.letter for side in sides)]
    for side in sides[1:]:
        head += [f"{side.letter} \u2212 {sides[0].letter}", "gained", "lost"]
    rows = []
    for c in compared:
        cells = [_text(c.title), f"{c.questions:,}", *(f"{score:.1f}" for score in c.scores)]
        for d in c.differences:
            sure = d.interval[0] > 0 or d.interval[1] < 0
            points = f"{d.points:+.1f} <small>({d.interval[0]:+.1f} to {d.interval[1]:+.1f})</small>"
            cells += [f"<b>{points}</b>" if sure else points, str(len(d.gained)), str(len(d.lost))]
        rows.append("".join(f"<td>{cell}</td>" for cell in cells))
    if len(compared) > 1:
        means = averages(compared)
        cells = [f"average of {len(compared)}", "", *(f"{mean:.1f}" for mean in means)]
        for i, mean in enumerate(means[1:]):
            told = [c.differences[i] for c in compared]
            cells += [f"{mean - means[0]:+.1f}", str(sum(len(d.gained) for d in told))]
            cells.append(str(sum(len(d.lost) for d in told)))
        rows.append("".join(f"<th>{cell}</th>" for cell in cells))
    lines = "".join(f"<tr>{row}</tr>" for row in ("".join(f"<th>{name}</th>" for name in head), *rows))
    return (
        f'<div class="wide"><table>{lines}</table></div><p><small>over the benchmarks that all folders have, and the '
        "questions that all of them answered; differences with their 95 % interval, by drawing questions anew, bold "
        "where it leaves out 0</small></p>"
    )


def _lengths(sides: Sequence[Side], c: Compared) -> str:
    longest = max(max(lengths, default=0) for lengths in c.lengths) + 1
    figures = []
    for side, lengths, cut in zip(sides, c.lengths, c.cut_off, strict=True):
        counts, _ = np.histogram(lengths, bins=_BINS, range=(0, longest))
        step = _WIDTH / _BINS
        bars = "".join(
            f'<rect x="{i * step:.1f}" y="{_HEIGHT * (1 - n / counts.max()):.1f}" width="{step - 1:.1f}" '
            f'height="{_HEIGHT * n / counts.max():.1f}"/>'
            for i, n in enumerate(counts)
            if n
        )
        middle, most = np.percentile(lengths, (50, 90))
        figures.append(
            f"<figure><figcaption>{side.letter}</figcaption>"
            f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img"><title>0 to {longest - 1} tokens</title>{bars}</svg>'
            f"<small>mean {np.mean(lengths):.1f} tokens, median {middle:.0f}, 90\u00a0% within {most:.0f}, longest "
            f"{max(lengths)}; {cut / len(lengths):.1%} cut off</small></figure>"
        )
    return f'<h3>{_text(c.title)}</h3><div class="row">{"".join(figures)}</div>'


def _flips(sides: Sequence[Side], c: Compared, most: int, data: Path | None) -> str:
    parts = []
    chosen = [
        (f"{word} by {_name(side)}", _few(flips, most))
        for side, d in zip(sides[1:], c.differences, strict=True)
        for word, flips in (("gained", d.gained), ("lost", d.lost))
        if flips
    ]
    pictures = _pictures(c, {flip.samples[0].key for _, flips in chosen for flip in flips}, data)
    for words, flips in chosen:
        cards = "".join(_card(sides, flip, pictures.get(flip.samples[0].key, [])) for flip in flips)
        parts.append(f"<h3>{words}</h3>{cards}")
    return f"<h2>{_text(c.title)}: what flipped</h2>{''.join(parts) or '<p>nothing</p>'}"


def _few(flips: Sequence[Flip], most: int) -> list[Flip]:
    """Spread evenly over all of them, so that they are not all of one category."""
    if len(flips) <= most:
        return list(flips)
    return [flips[i * len(flips) // most] for i in range(most)]


def _card(sides: Sequence[Side], flip: Flip, pictures: Sequence[str]) -> str:
    first = flip.samples[0]
    images = "".join(f'<img alt="" src="{url}">' for url in pictures)
    responses = "".join(_response(side, sample) for side, sample in zip(sides, flip.samples, strict=True))
    return (
        f'<article><div class="row">{images}<div><small>{_text(first.key)} {_text(", ".join(first.categories))}</small>'
        f"<pre>{_text(_marks_apart(first.prompt))}</pre><p><b>Answer:</b> {_text(first.answer)}</p></div></div>"
        f"{responses}</article>"
    )


def _response(side: Side, sample: Sample) -> str:
    good = "right" if (sample.score or 0) >= 1 else "wrong"
    said = f"read as {sample.parsed!r} by the {sample.by}" if sample.by else "no answer found"
    text = _text(sample.response) or f"<i>({_text(sample.failed) or 'empty'})</i>"
    return (
        f'<div class="response {good}"><header><b>{_name(side)}</b> <span>score {sample.score or 0:.2g}, '
        f"{_text(said)}, {sample.tokens} token{'s' * (sample.tokens != 1)}</span></header><pre>{text}</pre></div>"
    )


def _pictures(c: Compared, keys: set[str], data: Path | None) -> dict[str, list[str]]:
    """Thumbnails as data URLs by key, of files that are still there."""
    found: dict[str, list[str]] = {}
    for path in c.data:
        path = data / path.name if data else path
        if not keys or not path.is_file():
            continue
        try:
            for row, images in RowFile.open(path).read(lambda row: row.key in keys):
                found[row.key] = [thumbnail(image, f"{row.where}, image {i + 1}") for i, image in enumerate(images)]
        except InputError:  # the file has changed meanwhile: the page tells the rest
            continue
    return found


def _marks_apart(prompt: str) -> str:
    """Space between the marks of images and the words beside them, which stand close where the prompt has no text."""
    prompt = re.sub(r"(<image \d+>)(?=[\w<])", r"\1 ", prompt)
    return re.sub(r"(?<=\w)(?=<image \d+>)", " ", prompt)


def _name(side: Side) -> str:
    """Its letter and its label, escaped."""
    return f"{side.letter}: {_text(side.label)}"


def _text(value: object) -> str:
    """Escaped for HTML; characters that HTML does not allow become a replacement mark."""
    clean = re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]", "\ufffd", str(value))
    return html.escape(clean, quote=True)


_STYLE = """
:root{--ink:#1c2128;--soft:#59636e;--page:#fff;--card:#f6f8fa;--rule:#d1d9e0;--bar:#2563eb;--good:#1a7f37;--bad:#cf222e}
@media(prefers-color-scheme:dark){:root{--ink:#e6e9ed;--soft:#9aa4ae;--page:#14181d;--card:#1e242b;--rule:#39424c;
--bar:#7aa2ff;--good:#4ac26b;--bad:#ff7b72}}
*{box-sizing:border-box}body{margin:0;background:var(--page);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
main{max-width:1100px;margin:0 auto;padding:1rem}h1{font-size:1.4rem;overflow-wrap:anywhere}
h2{font-size:1.15rem;margin:2rem 0 .6rem;border-bottom:1px solid var(--rule)}h3{font-size:1rem;margin:1rem 0 .3rem}
.wide{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.3rem 0 .3rem 1.2rem;text-align:right;white-space:nowrap}
:is(th,td):first-child{padding-left:0;text-align:left}
th{color:var(--soft);font-weight:500}tr+tr :is(th,td){border-top:1px solid var(--rule)}
tr+tr th{color:var(--ink);font-weight:600;border-top-width:2px}
dl{margin:0}dl div{display:flex;gap:.7rem}dt{font-weight:600}dd{margin:0;overflow-wrap:anywhere}
small,header span{color:var(--soft)}.row{display:flex;flex-wrap:wrap;gap:1rem}.row>div{flex:1 1 260px;min-width:0}
figure{margin:0;background:var(--card);border-radius:8px;padding:.6rem;width:260px}svg{width:100%;height:auto}
rect{fill:var(--bar)}figcaption{font-weight:600;font-size:.85rem}
article{background:var(--card);border-radius:8px;padding:.8rem;margin:.8rem 0}
pre{white-space:pre-wrap;overflow-wrap:anywhere;font:inherit;margin:.3rem 0;max-height:18.75rem;overflow-y:auto}
p{margin:.3rem 0}
img{max-width:min(100%,280px);height:auto;align-self:start;border-radius:4px;background:#fff}
.response{border-left:3px solid var(--bad);margin:.6rem 0 0;padding:.1rem 0 .1rem .7rem}.right{border-color:var(--good)}
header{font-size:.85rem}
"""
