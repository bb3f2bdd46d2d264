"""Claims about the run's page: what it shows, that everything is escaped, that curves have the points they should."""

import io
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser

import PIL.Image
import pytest

from ril_jax.errors import InputError
from ril_jax.report import Line, line_chart, sparkline, terminal_summary, write_report
from ril_jax.training.metrics import MetricsWriter, Sample, SampleResponse, SampleTable

HOSTILE = '<script>alert(1)</script><img src=x onerror="x">&amp;\x00\x1b]0;'


class Page(HTMLParser):
    """The page as a browser takes it: tags with their attributes, and the text outside style."""

    VOID = frozenset({"meta", "img", "br", "line", "rect", "circle", "path"})

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.words, self.open, self.balanced = [], [], [], True
        self.feed(text)
        self.close()
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        self.balanced &= bool(self.open) and self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.words.append(data)

    def of(self, tag, **attributes):
        return [a for t, a in self.tags if t == tag and all(v in (a.get(k) or "") for k, v in attributes.items())]


def image_of(size, color="red", kind="PNG"):
    buffer = io.BytesIO()
    PIL.Image.new("RGB", size, color).save(buffer, format=kind)
    return buffer.getvalue()


@pytest.fixture
def workdir(tmp_path):
    arms = {
        "sft": {"accuracy": 0.56, "interval": [0.51, 0.61], "questions": 400},
        "ril": {"accuracy": 0.85, "interval": [0.81, 0.88], "questions": 400},
    }
    (tmp_path / "summary.json").write_text(json.dumps({"arms": arms, "seed": 7, "notes": ["tuned task", HOSTILE]}))
    (tmp_path / "stages.json").write_text(
        '{"sft": {"seconds": 65.0, "parts": {"compile": 12.0}}, "ril": {"seconds": 35}}'
    )
    (tmp_path / "config.json").write_text(json.dumps({"seed": 7, "name": HOSTILE}))
    with MetricsWriter(tmp_path, "sft", tensorboard=False) as writer:
        for step in range(1, 6):
            writer.write(step, {"loss": 1 / step, "step_time": 0.1})
    for arm, gain in (("ril", 0.04), ("dr_grpo", 0.01)):
        with MetricsWriter(tmp_path, f"ril/{arm}", tensorboard=False) as writer:
            for step in range(1, 13):
                answers = {"rewards/answer/mean": gain * step, "rewards/answer/teacher_mean": 0.9}
                writer.write(step, answers | {"kl": 0.01 * step, "my/metric": step})
    table = SampleTable(tmp_path, "ril", every=1)
    table.write(1, [Sample("old", "an old question", "1")])
    responses = [
        SampleResponse("student", HOSTILE, 0.25, 1.0, f"judge says {HOSTILE}"),
        SampleResponse("teacher <b>", "", 0.75, 0.0),
    ]
    table.write(2, [Sample("q<1>", HOSTILE, "4 & 5", [image_of((20, 10)), image_of((2000, 900), "blue")], responses)])
    return tmp_path


@pytest.fixture
def page(workdir):
    return Page(write_report(workdir).read_text(encoding="utf-8"))


def curves(text):
    """The points of every path that is a curve, in the order of the page."""
    found = re.findall(r'<path class="curve ([^"]*)" d="([^"]*)"', text)
    return [(style, re.findall(r"[ML]-?[\d.]+ -?[\d.]+", d)) for style, d in found]


def test_the_page_shows_summary_times_config_and_latest_samples(page):
    for words in ("0.560 (0.510 to 0.610)", "0.850", "400", "tuned task", "1m05s", "compile 12s", "65 %"):
        assert words in page.text
    assert '"seed": 7' in page.text
    assert "q<1>" in page.text
    assert "4 & 5" in page.text
    assert "(empty)" in page.text
    assert "similarity 0.75" in page.text
    assert "an old question" not in page.text


def test_texts_of_models_are_text_and_never_markup(page, workdir):
    shown = HOSTILE.replace("\x00", "\ufffd").replace("\x1b", "\ufffd")
    assert page.text.count(shown) == 4  # note, question, response, judge; the config shows it as JSON
    assert not page.of("script")
    assert not [a for _, a in page.tags if any(name.startswith("on") for name in a)]
    assert page.balanced
    assert page.open == []
    raw = (workdir / "report.html").read_bytes()
    assert b"\x00" not in raw
    assert b"\x1b" not in raw


def test_the_page_needs_nothing_from_outside(page):
    assert not page.of("link")
    assert not page.of("script")
    sources = [a["src"] for a in page.of("img")]
    assert len(sources) == 2
    assert all(source.startswith("data:image/") for source in sources)
    [policy] = page.of("meta", **{"http-equiv": "Content-Security-Policy"})
    assert "default-src 'none'" in policy["content"]


def test_small_images_are_embedded_as_they_are_and_large_ones_smaller(page):
    import base64

    small, large = [base64.b64decode(a["src"].split(",", 1)[1]) for a in page.of("img")]
    assert small == image_of((20, 10))
    assert PIL.Image.open(io.BytesIO(large)).size == (560, 252)


def test_a_missing_image_leaves_a_note_not_a_failure(workdir):
    for path in (workdir / "samples" / "images").iterdir():
        path.unlink()
    assert Page(write_report(workdir).read_text()).text.count("cannot be shown: FileNotFoundError") == 2


def test_every_arm_is_a_curve_with_one_point_a_step_and_teachers_are_dashed(page, workdir):
    text = (workdir / "report.html").read_text(encoding="utf-8")
    sft, ril = text.split("<h2>Stage ril</h2>")
    assert [len(points) for _, points in curves(sft)] == [5]
    answer, rest = ril.split("KL to the reference</figcaption>", 1)
    assert "answer reward</figcaption>" in answer
    assert [("dashed" in style, len(points)) for style, points in curves(answer)] == [(False, 12), (True, 12)] * 2
    kl, more = rest.split("1 more metric<", 1)
    assert [len(points) for _, points in curves(kl)] == [12, 12]
    assert [len(points) for _, points in curves(more)] == [12, 12]
    for words in ("ril, student", "ril, teacher", "dr_grpo, student", "my/metric"):
        assert words in page.text
    assert "step_time" not in page.text
    assert "time/unix" not in page.text


def test_an_arm_has_one_colour_in_the_table_and_in_all_charts(workdir):
    text = write_report(workdir).read_text(encoding="utf-8")
    fill = re.search(r"<td>ril</td>.*?fill (c\d)", text).group(1)
    keys = set(re.findall(r'key (c\d)[^"]*"></i>ril', text))
    assert keys == {fill}
    assert set(re.findall(r'key (c\d)[^"]*"></i>dr_grpo', text)).isdisjoint(keys)


def test_a_curve_lies_where_its_values_are():
    [(_, points)] = curves(line_chart([Line("a", [(0, 0.0), (1, 1.0), (2, 0.5)])], "t"))
    xy = [tuple(map(float, point[1:].split())) for point in points]
    (x0, y0), (x1, y1), (x2, y2) = xy
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert y1 < y2 < y0  # SVG counts downwards
    assert y2 == pytest.approx((y0 + y1) / 2, abs=0.2)


def test_values_that_are_not_finite_leave_a_gap():
    values = [(0, 1.0), (1, 2.0), (2, math.nan), (3, math.inf), (4, 1.5), (5, 1.0)]
    [(_, points)] = curves(line_chart([Line("a", values)], "t"))
    assert [point[0] for point in points] == ["M", "L", "M", "L"]
    assert "no finite value" in line_chart([Line("a", [(0, math.nan)])], "t")


def test_constant_single_and_long_curves_can_be_drawn():
    assert len(curves(line_chart([Line("a", [(0, 0.0), (9, 0.0)])], "t"))[0][1]) == 2
    assert "<circle" in line_chart([Line("a", [(3, 5.0)])], "t")
    chart = line_chart([Line("a", [(i, float(i % 7)) for i in range(10_001)])], "t")
    assert len(curves(chart)[0][1]) == 400
    assert 'class="mean' in chart


def test_sparkline_follows_the_values():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert sparkline([1.0, math.nan, 1.0]) == "▁·▁"
    assert len(sparkline(list(range(1000)))) == 24
    assert sparkline([]) == ""


def test_terminal_summary_holds_accuracies_curves_and_times(workdir):
    text = terminal_summary(workdir)
    assert re.search(r"ril +0\.850 \(0\.810 to 0\.880\)", text)
    # one scale for all curves of a chart: teachers at 0.9, one arm rises half way, the other stays low
    assert re.search(r"answer reward, ril, student +▁▂.*▅  0\.04 to 0\.48", text)
    assert re.search(r"answer reward, dr_grpo, student +▁{7}▂{5}  0\.01 to 0\.12", text)
    assert re.search(r"answer reward, ril, teacher +█{12}  0\.9 to 0\.9", text)
    assert "time: 1m40s (sft 1m05s, ril 35s)" in text


def test_an_empty_workdir_has_a_page_and_a_missing_one_is_refused(tmp_path):
    assert "nothing yet" in write_report(tmp_path).read_text()
    with pytest.raises(InputError, match="no workdir"):
        write_report(tmp_path / "none")
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(InputError, match=r"summary\.json"):
        write_report(tmp_path)


def test_the_command_writes_the_page_and_prints_the_summary(workdir):
    words = [sys.executable, "-m", "ril_jax.report", f"--workdir={workdir}"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "0.850" in done.stdout
    assert (workdir / "report.html").exists()
