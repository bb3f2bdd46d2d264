"""Claims about folders side by side."""

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from helpers.benchmark_files import choice, png, write_tsv
from helpers.evaluated import asked, endpoint, evaluated_config, run
from PIL import Image

from ril_jax import compare
from ril_jax.errors import InputError
from ril_jax.evaluation.comparison import compare as compared
from ril_jax.evaluation.comparison import open_sides, terminal_text
from ril_jax.evaluation.comparison_page import comparison_page
from ril_jax.evaluation.results import Sample, write_results, write_samples

LONG = "a-name-that-goes-on-and-on-" * 4


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two models on the same 6 questions, of which one gains two and loses one; and one on half of them."""
    root = tmp_path_factory.mktemp("compared")
    rows = [choice(i, "AABBCC"[i], question=f"Number {i} <b>?") for i in range(6)]
    write_tsv(root / "data" / "AI2D_TEST.tsv", rows)
    said = {"a": "AXXBCC", "b": "AABXCC"}  # X is no option
    for name, letters in said.items():
        with endpoint(lambda messages, letters=letters: letters[int(asked(messages)[17])], name) as (url, _):
            run(evaluated_config(url=url), root / "data", root / name, "ai2d")
    with endpoint(lambda messages: "A <script>", "c") as (url, _):
        run(evaluated_config(url=url), root / "data", root / "c", "ai2d", limit=3)
    return root


def test_flips_and_differences_are_told(folders):
    (c,) = compared(open_sides([folders / "a", folders / "b"]))
    (d,) = c.differences
    assert c.questions == 6
    assert c.scores == pytest.approx([100 * 4 / 6, 100 * 5 / 6])
    assert [flip.group for flip in d.gained] == ["AI2D_TEST/1", "AI2D_TEST/2"]
    assert [flip.group for flip in d.lost] == ["AI2D_TEST/3"]
    assert d.points == pytest.approx(100 / 6)
    assert d.interval[0] < d.points < d.interval[1]
    assert [sample.response for sample in d.lost[0].samples] == ["B", "X"]


def test_a_folder_beside_itself_has_no_difference(folders, tmp_path):
    for name in ("x", "y"):
        with endpoint(lambda messages: "A", "m") as (url, _):
            run(evaluated_config(url=url), folders / "data", tmp_path / name, "ai2d")
    (c,) = compared(open_sides([tmp_path / "x", tmp_path / "y"]))
    assert (c.differences[0].points, c.differences[0].interval) == (0, (0, 0))
    assert c.differences[0].gained == c.differences[0].lost == []


def test_only_shared_questions_count(folders):
    (c,) = compared(open_sides([folders / "a", folders / "b", folders / "c"]))
    assert c.questions == 3
    assert c.notes == ["3 of 6 questions are in all folders"]
    assert c.scores == pytest.approx([100 / 3, 100, 200 / 3])
    assert [len(lengths) for lengths in c.lengths] == [3, 3, 3]


def test_the_command_prints_a_table_and_writes_a_page(folders, tmp_path, capsys):
    page = tmp_path / "page.html"
    with pytest.raises(SystemExit) as end:
        compare.run(["compare", str(folders / "a"), str(folders / "b"), f"--output={page}"])
    assert end.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith("A  a\nB  b\n")
    (line,) = [line for line in out.splitlines() if line.startswith("AI2D  ")]
    assert line.split()[1:5] == ["6", "66.7", "83.3", "+16.7"]
    assert "AI2D: gained by B: AI2D_TEST/1, AI2D_TEST/2" in out
    assert "AI2D: lost by B: AI2D_TEST/3" in out
    assert str(page) in out
    text = page.read_text()
    assert text.count("<article>") == 3
    assert "Number 3 &lt;b&gt;?" in text
    assert "<b>?" not in text
    shown = [base64.b64decode(data) for data in re.findall(r"data:image/jpeg;base64,([^\"]+)", text)]
    assert [Image.open(io.BytesIO(data)).size for data in shown] == [Image.open(io.BytesIO(png(1))).size] * 3


def test_the_page_does_without_pictures_that_are_gone(folders, tmp_path, capsys):
    sides = [str(folders / name) for name in ("a", "b", "c")]
    with pytest.raises(SystemExit):
        compare.run(["compare", *sides, f"--output={tmp_path / 'p.html'}", f"--data={tmp_path}"])
    text = (tmp_path / "p.html").read_text()
    assert "data:image" not in text
    assert "A &lt;script&gt;" in text
    assert "<script" not in text


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["a"], "name two result folders or more"),
        (["a", "a"], "named twice"),
        (["a", "data"], "holds no results.json"),
    ],
)
def test_a_mistake_is_one_line(folders, names, words):
    with pytest.raises(InputError, match=words):
        open_sides([folders / name for name in names])


def test_labels_tell_folders_apart(tmp_path):
    for name in ("x/results", "y/results"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "results.json").write_text('{"benchmarks": {}}')
    sides = open_sides([tmp_path / "x/results", tmp_path / "y/results"])
    assert [side.label for side in sides] == ["x/results", "y/results"]
    with pytest.raises(InputError, match="have no scored benchmark in common"):
        compared(sides)


def written(folder: Path, scores: dict[str, list[float]]) -> Path:
    """A result folder with these scores, of responses that are hard on a page."""
    for name, values in scores.items():
        (folder / name).mkdir(parents=True)
        prompt = "<image 1>Question: is<image 2><image 3>& larger (than <image 1>)?"
        response = "<b>&amp; \x00 \ud800" + "word " * 2000 + "</pre></div>"
        samples = [
            Sample(f"X/{i}", f"X/{i}", prompt, "B", response, 1234, "stop", "", "B", "rule", value, ["<i>", "b"])
            for i, value in enumerate(values)
        ]
        write_samples(folder / name, samples)
    write_results(folder, folder.name, {name: {"score": 50.0, "data": []} for name in scores}, "")
    return folder


@pytest.fixture
def long_names(tmp_path):
    """Five folders with long names and two benchmarks in common; the first has a third."""
    scores = [{"ai2d": [1.0, 0.0, 0.0, 1.0 * (i > 1)], "realworldqa": [0.0, 1.0 * (i > 0)]} for i in range(5)]
    scores[0]["mmstar"] = [1.0]
    return open_sides([written(tmp_path / f"{LONG}{i}", values) for i, values in enumerate(scores)])


def test_tables_stay_within_100_columns_whatever_the_names(long_names):
    text = terminal_text(long_names, compared(long_names))
    assert text.splitlines()[:5] == [f"{letter}  {LONG}{i}" for i, letter in enumerate("ABCDE")]
    tables = text.split("\n\n")[1:-1]
    assert max(len(line) for table in tables for line in table.splitlines()) <= 100
    heads = " ".join(table.splitlines()[0] for table in tables)
    for column in ("questions", *"ABCDE", *(f"{b} - A" for b in "BCDE"), *(f"tokens {side}" for side in "ABCDE")):
        assert re.search(rf"(?:^|  ){column}(?:  |$)", heads), column
    assert all(len(table.splitlines()) == 5 for table in tables)  # head, rule, two benchmarks, average


def test_the_average_is_over_the_benchmarks_that_all_have(long_names):
    told = compared(long_names)
    assert [c.name for c in told] == ["ai2d", "realworldqa"]
    line = next(line for line in terminal_text(long_names, told).splitlines() if line.startswith("average"))
    assert line.split()[:8] == ["average", "of", "2", "12.5", "37.5", "50.0", "50.0", "50.0"]
    page = comparison_page(long_names, told, samples=1, data=None)
    (row,) = re.findall(r"<tr>(?=<th>average)(.*?)</tr>", page)
    cells = re.findall(r"<th>(.*?)</th>", row)
    assert cells[:10] == ["average of 2", "", "12.5", "37.5", "50.0", "50.0", "50.0", "+25.0", "1", "0"]


class Nesting(HTMLParser):
    """Keeps the tags that are open; anything closed that is not the last one opened is an error."""

    def __init__(self):
        super().__init__()
        self.open, self.seen = [], set()

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs)
        self.seen.add(tag)
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        assert tag == "rect"
        assert "svg" in self.open

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, self.getpos()


def test_the_page_is_well_formed_and_needs_nothing_else(long_names):
    page = comparison_page(long_names, compared(long_names), samples=2, data=None)
    parser = Nesting()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    assert {"table", "pre", "svg", "dl", "article"} <= parser.seen
    assert not {"script", "link", "iframe", "i"} & parser.seen
    assert not re.search(r"(?:href|src)=|url\(|@import", page)
    page.encode()


def test_marks_of_images_stand_apart_from_words(long_names):
    page = comparison_page(long_names, compared(long_names), samples=1, data=None)
    apart = "<image 1> Question: is <image 2> <image 3>& larger (than <image 1>)?"
    assert apart.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;") in page
