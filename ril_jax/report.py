"""The run's page: `write_report(workdir)` draws everything a run wrote into one self-contained report.html.

    python -m ril_jax.report --workdir=DIR

Reads, as far as they are there: summary.json ({"arms": {name: {"accuracy": x, "interval": [low, high], ...}}, ...}),
metrics/<stage>.jsonl and metrics/<stage>/<arm>.jsonl, stages.json, config.json, samples/**/step_*.json. The page has
no script and no outside resource, and every text in it is escaped: responses are what a model wrote.
"""

from __future__ import annotations

import base64
import html
import io
import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import PIL.Image

from ril_jax import cli
from ril_jax.errors import InputError
from ril_jax.files import write_atomically
from ril_jax.progress import duration
from ril_jax.training.metrics import read_metrics

# Title, and which metrics are drawn in it together. What no chart takes is drawn small, under "more metrics".
CHARTS: tuple[tuple[str, str], ...] = (
    ("held-out accuracy", r"(eval|evaluation|held_?out)\w*/(.*/)?accuracy$"),
    ("answer reward", r"(^|/)rewards/answer/(.*_)?mean$"),
    ("similarity reward", r"(^|/)rewards/similarity/(.*_)?mean$"),
    ("reward", r"(^|/)reward$"),
    ("KL to the reference", r"(^|/)kl$"),
    ("entropy", r"(^|/)entropy$"),
    ("completion length (tokens)", r"completions/mean_length$"),
    ("discriminator accuracy", r"discriminator/accuracy$"),
    ("discriminator loss", r"discriminator/loss$"),
    ("loss", r"(^|/)loss$"),
)
_MOST_POINTS = 400
_MOST_IMAGE_SIDE = 560
_COLORS = 8
_ACCURACY = "held-out accuracy (95 % interval)"


@dataclass(frozen=True)
class Line:
    """One curve: its name, its (step, value) points in order of steps, its colour's number, teacher curves dashed."""

    label: str
    points: Sequence[tuple[float, float]]
    color: int = 0
    dashed: bool = False


@dataclass(frozen=True)
class Chart:
    """Curves that are drawn together; the minor ones are folded away."""

    title: str
    lines: Sequence[Line]
    minor: bool = False


def write_report(workdir: str | os.PathLike[str]) -> Path:
    """Write workdir/report.html and return its path; raises InputError for a missing workdir or a damaged file."""
    workdir = Path(workdir)
    if not workdir.is_dir():
        raise InputError(f"there is no workdir {workdir}")
    summary = _read_json(workdir / "summary.json") or {}
    runs = load_runs(workdir)
    arms = list(dict.fromkeys([*summary.get("arms", {}), *(arm for run in runs.values() for arm in run)]))
    colors = {arm: i % _COLORS for i, arm in enumerate(arms)}
    sections = [
        _summary_section(summary, colors),
        *(_stage_section(stage, by_arm, colors) for stage, by_arm in runs.items()),
        _time_section(_read_json(workdir / "stages.json")),
        _samples_section(workdir / "samples"),
        _config_section(_read_json(workdir / "config.json")),
    ]
    name = _text(workdir.absolute().name)
    body = "\n".join(section for section in sections if section) or "<p>This run has written nothing yet.</p>"
    page = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" '
        f'content="light dark">\n<title>RIL run {name}</title>\n<style>{_STYLE}</style></head>\n'
        f"<body><main><h1>RIL run <em>{name}</em></h1>\n{body}\n</main></body></html>\n"
    )
    path = workdir / "report.html"
    write_atomically(path, page.encode("utf-8", "replace"))
    return path


def terminal_summary(workdir: str | os.PathLike[str]) -> str:
    """The run in plain text: held-out accuracy of each arm, curves as sparklines, seconds per stage."""
    workdir = Path(workdir)
    summary = _read_json(workdir / "summary.json") or {}
    lines: list[str] = []
    arms: Mapping[str, Any] = summary.get("arms", {})
    if arms:
        lines.append(_ACCURACY)
        width = max(map(len, arms))
        for name, row in arms.items():
            lines.append(f"  {name:<{width}}  {_accuracy_words(row)}")
    for stage, by_arm in load_runs(workdir).items():
        lines.append(f"{stage}: first to last, over the steps")
        charts = [chart for chart in charts_of(by_arm) if not chart.minor]
        width = max([len(f"{c.title}, {line.label}") for c in charts for line in c.lines], default=0)
        for chart in charts:
            together = [value for line in chart.lines for _, value in line.points]  # arms are drawn on one scale
            for line in chart.lines:
                values = [value for _, value in line.points]
                name = f"{chart.title}, {line.label}"
                curve = sparkline(values, scale=together)
                lines.append(f"  {name:<{width}}  {curve}  {values[0]:.4g} to {values[-1]:.4g}")
    stages = _read_json(workdir / "stages.json") or {}
    if stages:
        total = sum(entry["seconds"] for entry in stages.values())
        words = ", ".join(f"{name} {duration(entry['seconds'])}" for name, entry in stages.items())
        lines.append(f"time: {duration(total)} ({words})")
    return "\n".join(lines)


def sparkline(values: Sequence[float], *, width: int = 24, scale: Sequence[float] | None = None) -> str:
    """Values as at most `width` block characters, from the lowest to the highest of `scale` (default: of themselves).

    More values than `width` are drawn by the means of equal parts; what is not finite shows as a dot.
    """
    buckets = [[v for v in part if math.isfinite(v)] for part in _split(list(values), width)]
    means = [sum(part) / len(part) if part else math.nan for part in buckets]
    finite = [v for v in (means if scale is None else scale) if math.isfinite(v)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 0.0)
    blocks = "▁▂▃▄▅▆▇█"
    unit = (len(blocks) - 1) / (high - low) if high > low else 0.0
    return "".join("·" if math.isnan(m) else blocks[round((m - low) * unit)] for m in means)


# --- what a run wrote ------------------------------------------------------------------------------------------------

Curves = dict[str, list[tuple[float, float]]]  # metric name -> (step, value) in order


def load_runs(workdir: Path) -> dict[str, dict[str, Curves]]:
    """{stage: {arm: {metric: points}}}; a stage without arms has one of its own name. No wall-clock metrics."""
    root = workdir / "metrics"
    runs: dict[str, dict[str, Curves]] = {}
    for path in sorted(root.rglob("*.jsonl"), key=lambda p: p.stat().st_mtime):
        stage, _, arm = path.relative_to(root).with_suffix("").as_posix().partition("/")
        curves: Curves = {}
        for row in read_metrics(path, wall_clock=False):
            for name, value in row.items():
                if name != "step" and isinstance(value, int | float):
                    curves.setdefault(name, []).append((row["step"], float(value)))
        if curves:
            runs.setdefault(stage, {})[arm or stage] = curves
    return runs


def charts_of(by_arm: Mapping[str, Curves], colors: Mapping[str, int] | None = None) -> list[Chart]:
    """The charts of one stage that have data, those of CHARTS first; every other metric gets a minor one of its own."""
    colors = colors or {}
    charts: list[Chart] = []
    taken: set[str] = set()
    names = list(dict.fromkeys(name for curves in by_arm.values() for name in curves))
    for title, pattern in CHARTS:
        chosen = [name for name in names if re.search(pattern, name) and name not in taken]
        taken.update(chosen)
        if chosen:
            charts.append(Chart(title, _lines(chosen, by_arm, colors)))
    charts += [Chart(name, _lines([name], by_arm, colors), minor=True) for name in names if name not in taken]
    return charts


def _lines(names: Sequence[str], by_arm: Mapping[str, Curves], colors: Mapping[str, int]) -> list[Line]:
    lines = []
    for arm, curves in by_arm.items():
        for name in names:
            if name not in curves:
                continue
            teacher = "teacher" in name
            who = ("teacher" if teacher else "student") if "rewards/" in name else ""
            others = [n for n in names if ("teacher" in n) == teacher]
            label = ", ".join(filter(None, [arm, who, name if len(others) > 1 else ""]))
            lines.append(Line(label, curves[name], colors.get(arm, 0), teacher))
    return lines


def _read_json(path: Path) -> Any:
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error}): delete it or bring back a copy") from error


# --- curves ----------------------------------------------------------------------------------------------------------

_W, _H, _LEFT, _RIGHT, _TOP, _BOTTOM = 480, 230, 52, 10, 10, 26


def line_chart(lines: Sequence[Line], title: str) -> str:
    """An inline SVG of the curves: one path a line, in which a value that is not finite leaves a gap.

    A curve of more than 400 points is drawn by the means of 400 equal parts. A curve of more than 30 is drawn thin,
    under its running mean.
    """
    drawn = [(line, _thinned(line.points)) for line in lines]
    finite = [(x, y) for _, points in drawn for x, y in points if math.isfinite(y)]
    if not finite:
        return f'<svg viewBox="0 0 {_W} {_H}" role="img"><title>{_text(title)}: no finite value</title></svg>'
    x_low, x_high = min(x for x, _ in finite), max(x for x, _ in finite)
    y_low, y_high = min(y for _, y in finite), max(y for _, y in finite)
    if x_high == x_low:
        x_low, x_high = x_low - 1, x_high + 1
    margin = (y_high - y_low) * 0.06 or abs(y_high) * 0.1 or 0.5
    y_low, y_high = y_low - margin, y_high + margin

    def at(x: float, y: float) -> tuple[float, float]:
        across = _LEFT + (x - x_low) / (x_high - x_low) * (_W - _LEFT - _RIGHT)
        return across, _H - _BOTTOM - (y - y_low) / (y_high - y_low) * (_H - _TOP - _BOTTOM)

    parts = [f'<svg viewBox="0 0 {_W} {_H}" role="img"><title>{_text(title)}</title>']
    for tick in _ticks(y_low, y_high, 4):
        _, y = at(x_low, tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_W - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:.4g}</text>')
    for tick in _ticks(x_low, x_high, 5):
        x, _ = at(tick, y_low)
        parts.append(f'<text x="{x:.1f}" y="{_H - 8}" text-anchor="middle">{tick:.6g}</text>')
    for line, points in drawn:
        style = f"c{line.color}" + (" dashed" if line.dashed else "")
        many = len(points) > 30
        parts.append(_path(points, at, f"curve {style}" + (" faint" if many else "")))
        if many:
            parts.append(_path(_running_mean(points), at, f"mean {style}"))
        inside = [(x, y) for x, y in points if math.isfinite(y)]
        if len(inside) == 1:
            x, y = at(*inside[0])
            parts.append(f'<circle class="{style}" cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>')
    return "".join(parts) + "</svg>"


def _path(points: Sequence[tuple[float, float]], at: Any, style: str) -> str:
    words, pen_down = [], False
    for x, y in points:
        if not math.isfinite(y):
            pen_down = False
            continue
        across, down = at(x, y)
        words.append(f"{'L' if pen_down else 'M'}{across:.1f} {down:.1f}")
        pen_down = True
    return f'<path class="{style}" d="{" ".join(words)}"/>'


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    if len(points) <= _MOST_POINTS:
        return list(points)
    parts = _split(list(points), _MOST_POINTS)
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts]


def _running_mean(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    reach = max(2, len(points) // 20)
    means = []
    for i, (x, _) in enumerate(points):
        near = [y for _, y in points[max(0, i - reach) : i + reach + 1] if math.isfinite(y)]
        means.append((x, sum(near) / len(near) if near else math.nan))
    return means


def _split(values: list[Any], count: int) -> list[list[Any]]:
    """At most `count` consecutive parts of nearly equal length, none of them empty."""
    count = min(count, len(values))
    return [values[i * len(values) // count : (i + 1) * len(values) // count] for i in range(count)]


def _ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers between low and high, about `about` of them."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough * 0.999)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


# --- sections --------------------------------------------------------------------------------------------------------


def _text(value: Any) -> str:
    """Escaped for HTML text and attributes; characters that HTML does not allow become a replacement mark."""
    clean = re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]", "\ufffd", str(value))
    return html.escape(clean, quote=True)


def _summary_section(summary: Mapping[str, Any], colors: Mapping[str, int]) -> str:
    if not summary:
        return ""
    arms: Mapping[str, Mapping[str, Any]] = summary.get("arms", {})
    parts = []
    if arms:
        shown = {"accuracy", "interval"}
        spread = {name: _spread(row) for name, row in arms.items()}
        further = list(dict.fromkeys(key for row in spread.values() for key in row if key not in shown))
        head = "".join(f"<th>{_text(name.replace('_', ' '))}</th>" for name in ("arm", _ACCURACY, "", *further))
        rows = []
        for name, row in arms.items():
            cells = [_text(name), _text(_accuracy_words(row)), _accuracy_bar(row, colors.get(name, 0))]
            cells += [_text(_value_words(spread[name].get(key, ""))) for key in further]
            rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
        parts.append(f'<div class="wide"><table><tr>{head}</tr>{"".join(rows)}</table></div>')
    rest = {key: value for key, value in summary.items() if key != "arms"}
    if rest:
        items = "".join(
            f"<dt>{_text(k.replace('_', ' '))}</dt><dd>{_text(_value_words(v))}</dd>" for k, v in rest.items()
        )
        parts.append(f"<dl>{items}</dl>")
    return f"<section><h2>Summary</h2>{''.join(parts)}</section>"


def _spread(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row with what its tables hold (accuracy by type) as columns of their own."""
    flat: dict[str, Any] = {}
    for key, value in row.items():
        flat |= value if isinstance(value, Mapping) else {key: value}
    return flat


def _accuracy_words(row: Mapping[str, Any]) -> str:
    accuracy = row.get("accuracy")
    if accuracy is None:
        return "-"
    interval = row.get("interval")
    around = f" ({interval[0]:.3f} to {interval[1]:.3f})" if interval else ""
    return f"{accuracy:.3f}{around}"


def _accuracy_bar(row: Mapping[str, Any], color: int) -> str:
    accuracy = row.get("accuracy")
    if accuracy is None:
        return ""
    low, high = row.get("interval") or (accuracy, accuracy)
    return (
        f'<svg class="bar" viewBox="0 0 120 14" role="img"><title>{accuracy:.3f}</title>'
        f'<rect class="back" width="120" height="14" rx="3"/>'
        f'<rect class="fill c{color}" width="{120 * accuracy:.1f}" height="14" rx="3"/>'
        f'<line class="whisker" x1="{120 * low:.1f}" x2="{120 * high:.1f}" y1="7" y2="7"/></svg>'
    )


def _value_words(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return "; ".join(value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _stage_section(stage: str, by_arm: Mapping[str, Curves], colors: Mapping[str, int]) -> str:
    charts = charts_of(by_arm, colors)
    major = "".join(_figure(chart) for chart in charts if not chart.minor)
    minor = [_figure(chart) for chart in charts if chart.minor]
    more = ""
    if minor:
        title = f"{len(minor)} more metric{'s' if len(minor) > 1 else ''}"
        more = f'<details><summary>{title}</summary><div class="charts">{"".join(minor)}</div></details>'
    return f'<section><h2>Stage {_text(stage)}</h2><div class="charts">{major}</div>{more}</section>'


def _figure(chart: Chart) -> str:
    legend = []
    for line in chart.lines:
        last = f"{line.points[-1][1]:.4g}" if line.points else "-"
        style = f"key c{line.color}" + (" dashed" if line.dashed else "")
        legend.append(f'<span><i class="{style}"></i>{_text(line.label)} <b>{last}</b></span>')
    return (
        f"<figure><figcaption>{_text(chart.title)}</figcaption>{line_chart(chart.lines, chart.title)}"
        f'<div class="legend">{"".join(legend)}</div></figure>'
    )


def _time_section(stages: Mapping[str, Any] | None) -> str:
    if not stages:
        return ""
    total = sum(entry["seconds"] for entry in stages.values())
    rows = []
    for name, entry in stages.items():
        parts = ", ".join(f"{part} {duration(value)}" for part, value in entry.get("parts", {}).items())
        share = f"{100 * entry['seconds'] / total if total else 0:.0f} %"
        cells = (name, duration(entry["seconds"]), share, parts)
        rows.append("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in cells) + "</tr>")
    rows.append(f"<tr><td>total</td><td>{duration(total)}</td><td></td><td></td></tr>")
    head = "<tr><th>stage</th><th>time</th><th>share</th><th>of which</th></tr>"
    return f'<section><h2>Time</h2><div class="wide"><table>{head}{"".join(rows)}</table></div></section>'


def _config_section(config: Mapping[str, Any] | None) -> str:
    if config is None:
        return ""
    text = _text(json.dumps(config, indent=2, ensure_ascii=False))
    return f"<section><h2>Config</h2><details><summary>config.json</summary><pre>{text}</pre></details></section>"


def _samples_section(root: Path) -> str:
    latest: dict[Path, Path] = {}
    for path in sorted(root.rglob("step_*.json")):  # the names sort by step
        latest[path.parent] = path
    parts = []
    for path in latest.values():
        table = _read_json(path)
        title = f"{table['stage']}, step {table['step']}"
        cards = "".join(_sample_card(sample, root) for sample in table["samples"])
        parts.append(f"<h3>{_text(title)}</h3>{cards}")
    return f"<section><h2>Samples</h2>{''.join(parts)}</section>" if parts else ""


def _sample_card(sample: Mapping[str, Any], root: Path) -> str:
    images = "".join(_image(root / "images" / Path(name).name) for name in sample.get("images", ()))
    responses = "".join(_response(response) for response in sample.get("responses", ()))
    return (
        f'<article><div class="question">{images}<div><small>{_text(sample["id"])}</small>'
        f"<p>{_text(sample['question'])}</p><p><strong>Solution:</strong> {_text(sample['solution'])}</p></div></div>"
        f"{responses}</article>"
    )


def _response(response: Mapping[str, Any]) -> str:
    numbers = ((name, response.get(name)) for name in ("similarity", "answer", "advantage"))
    chips = "".join(f"<span>{name} {value:.3g}</span>" for name, value in numbers if value is not None)
    judge = f"<p><small>judge: {_text(response['judge'])}</small></p>" if response.get("judge") else ""
    text = _text(response["text"]) or "<i>(empty)</i>"
    who = "student" if response["model"] == "student" else "teacher"
    return (
        f'<div class="response {who}"><header><b>{_text(response["model"])}</b>{chips}</header>'
        f"<p>{text}</p>{judge}</div>"
    )


def _image(path: Path) -> str:
    try:
        with PIL.Image.open(path) as image:
            data, kind = path.read_bytes(), "png" if image.format == "PNG" else "jpeg"
            if max(image.size) > _MOST_IMAGE_SIDE:
                image.thumbnail((_MOST_IMAGE_SIDE, _MOST_IMAGE_SIDE))
                buffer = io.BytesIO()
                image.convert("RGB").save(buffer, format="JPEG", quality=85)
                data, kind = buffer.getvalue(), "jpeg"
    except OSError as error:  # a page with one gap is better than none, and the gap says what is missing
        return f"<p><small>image {_text(path.name)} cannot be shown: {_text(type(error).__name__)}</small></p>"
    return f'<img alt="" src="data:image/{kind};base64,{base64.b64encode(data).decode()}">'


def _palette(colors: Iterable[str]) -> str:
    return "".join(f"--c{i}:{color};" for i, color in enumerate(colors))


_LIGHT = _palette(["#2563eb", "#c2410c", "#0f766e", "#9333ea", "#a16207", "#be185d", "#0369a1", "#57606a"])
_DARK = _palette(["#7aa2ff", "#ff9558", "#4fd1b5", "#c99bff", "#e3b341", "#ff8fb1", "#6cc7ff", "#a8b1bb"])
_STYLE = (
    f":root{{--ink:#1c2128;--soft:#59636e;--page:#fff;--card:#f6f8fa;--rule:#d1d9e0;{_LIGHT}}}"
    "@media(prefers-color-scheme:dark){"
    f":root{{--ink:#e6e9ed;--soft:#9aa4ae;--page:#14181d;--card:#1e242b;--rule:#39424c;{_DARK}}}}}"
    + "".join(f".c{i}{{--c:var(--c{i})}}" for i in range(_COLORS))
    + """
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
main{max-width:1100px;margin:0 auto;padding:1rem}h1{font-size:1.5rem}h1 em{font-style:normal;color:var(--soft)}
h2{font-size:1.15rem;margin:2rem 0 .6rem;border-bottom:1px solid var(--rule);padding-bottom:.3rem}
h3{font-size:1rem}.wide{overflow-x:auto}table{border-collapse:collapse}
th,td{padding:.3rem .9rem .3rem 0;text-align:left;vertical-align:top}th{color:var(--soft);font-weight:500}
tr+tr td{border-top:1px solid var(--rule)}td{font-variant-numeric:tabular-nums}
dl{display:grid;grid-template-columns:auto 1fr;gap:.2rem 1rem}dt{color:var(--soft)}
dd{margin:0;overflow-wrap:anywhere}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,320px),1fr));gap:1rem}
figure{margin:0;background:var(--card);border-radius:8px;padding:.7rem;max-width:560px;min-width:0}
figcaption{font-weight:600;font-size:.9rem;overflow-wrap:anywhere}
figure svg{width:100%;height:auto;display:block}svg text{fill:var(--soft);font:12px system-ui,sans-serif}
.grid{stroke:var(--rule)}path{fill:none;stroke:var(--c)}path{stroke-width:2;stroke-linejoin:round}
path.faint{stroke-width:1;opacity:.35}circle{fill:var(--c)}path.dashed{stroke-dasharray:5 4}
.legend{display:flex;flex-wrap:wrap;gap:.1rem .9rem;font-size:.8rem}
.key{display:inline-block;width:1.1rem;border-top:3px solid var(--c);margin:0 .3rem .25em 0}
.key.dashed{border-top-style:dashed}.bar{width:120px;height:14px;margin-top:.3rem}.back{fill:var(--rule)}
.fill{fill:var(--c)}.whisker{stroke:var(--ink);stroke-width:2}details{margin:.8rem 0}
summary{cursor:pointer;color:var(--soft)}
pre{overflow-x:auto;background:var(--card);padding:.8rem;border-radius:8px;font-size:.8rem}
article{background:var(--card);border-radius:8px;padding:.8rem;margin:.8rem 0}
article p{margin:.3rem 0;overflow-wrap:anywhere}.question{display:flex;flex-wrap:wrap;gap:1rem}
.question>div{flex:1 1 240px;min-width:0}.question p{white-space:pre-wrap}
img{max-width:min(100%,280px);height:auto;align-self:start;border-radius:4px;background:#fff}
small{color:var(--soft)}.response{border-left:3px solid var(--c0);margin:.6rem 0 0;padding:.1rem 0 .1rem .7rem}
.response.teacher{border-color:var(--c1)}.response>p{white-space:pre-wrap}
.response header{display:flex;flex-wrap:wrap;gap:.2rem .8rem;font-size:.85rem}
.response header span{color:var(--soft);font-variant-numeric:tabular-nums}
"""
)


def main(args: SimpleNamespace) -> None:
    """Write the page of a workdir and print the summary."""
    path = write_report(args.workdir)
    print(terminal_summary(args.workdir))
    print(f"report: {path}")


if __name__ == "__main__":
    cli.run(main, required=("workdir",))
