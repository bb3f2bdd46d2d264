"""The drawn task: answers are checked against a solver that only sees the pixels and the question's words."""

import collections
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from ril_jax.data import synthetic
from ril_jax.data.images import QwenImageProcessor
from ril_jax.data.synthetic import CHART_TYPES, COLOURS, GRID_TYPES, SPLITS, STYLES, TYPES, draw, style_of
from ril_jax.errors import InputError

NUMBER = {word: value for value, word in enumerate(synthetic.NUMBERS)}
OPPOSITE = {"left": (0, -1), "right": (0, 1), "above": (-1, 0), "below": (1, 0)}


def see(image: np.ndarray) -> list[list[str]]:
    """Read a picture back: the name of what stands in each 28x28 cell, by colour and by where the colour reaches."""
    assert image.dtype == np.uint8
    assert image.shape[0] % 28 == 0
    assert image.shape[1] % 28 == 0
    lattice = []
    for top in range(0, image.shape[0], 28):
        row = []
        for left in range(0, image.shape[1], 28):
            cell = image[top : top + 28, left : left + 28].astype(int)
            palette = np.array([*COLOURS.values(), (246, 246, 246), (60, 60, 60)])
            nearest = ((cell[:, :, None] - palette) ** 2).sum(-1).argmin(-1)
            inside = nearest[8:, 8:]  # without the ticks of the cell's row and column
            counts = np.bincount(inside.ravel(), minlength=6)[:4]
            if counts.max() < 30:
                row.append("empty")
                continue
            colour = int(counts.argmax())
            mask = nearest == colour
            if mask[26, 8:24].all():  # shapes leave a margin below, bars and their feet stand on the ground
                form = "bar" if mask[20, 10] else "base"
            elif mask[6, 23]:  # the upper right corner is a square's alone
                form = "square"
            else:  # of the other two, a triangle reaches into the lower left corner
                form = "triangle" if mask[23, 6] else "circle"
            row.append(f"{list(COLOURS)[colour]} {form}")
        lattice.append(row)
    return lattice


def solve(lattice: list[list[str]], question: str) -> str:
    """Answer from what was seen and the words alone; fails if the question has no answer or more than one."""
    cells = [cell for row in lattice for cell in row]
    colours = [cell.split()[0] for cell in cells]
    heights = {colour: cells.count(f"{colour} bar") for colour in COLOURS if f"{colour} bar" in cells}
    heights |= {cell.split()[0]: 0 for cell in cells if cell.endswith(" base")}
    if match := re.fullmatch(r"how many more (\w+) than (\w+)\?", question):
        return str(colours.count(match[1]) - colours.count(match[2]))
    if match := re.fullmatch(r"how many (\w+) shapes\?", question):
        return str(colours.count(match[1]))
    if match := re.fullmatch(r"how many (\w+ )?(\w+)s\?", question):
        return str(sum(cell.startswith(match[1] or "") and cell.endswith(match[2]) for cell in cells))
    if question in ("which colour is most common?", "which bar is highest?"):
        counts = heights if "bar" in question else {colour: colours.count(colour) for colour in COLOURS}
        (first, most), (_, second) = sorted(counts.items(), key=lambda item: -item[1])[:2]
        assert most > second, "ambiguous"
        return first
    if match := re.fullmatch(r"value of the (\w+) bar\?", question):
        return str(heights[match[1]])
    if match := re.fullmatch(r"how much higher is (\w+) than (\w+)\?", question):
        return str(heights[match[1]] - heights[match[2]])
    anchor = re.search(r"the (\w+ (?:circle|square|triangle))\?$", question)[1]
    assert cells.count(anchor) == 1, "ambiguous"
    row, col = divmod(cells.index(anchor), len(lattice[0]))
    for step in reversed(re.findall(r"left|right|above|below", question)):
        row, col = row + OPPOSITE[step][0], col + OPPOSITE[step][1]
        assert 0 <= row < len(lattice), "outside"
        assert 0 <= col < len(lattice[0]), "outside"
    return lattice[row][col]


def cell_at(lattice: list[list[str]], name: str) -> str:
    return lattice["abcd".index(name[0])][int(name[1]) - 1]


@pytest.mark.parametrize("type_", TYPES)
def test_answers_follow_from_the_pixels_and_the_question_alone(type_):
    for example in draw(7, 150, split="ril", type_weights={type_: 1}):
        lattice = see(example.image)
        assert tuple(cell for row in lattice for cell in row) == example.scene.cells
        assert solve(lattice, example.ask.text) == example.ask.answer


@pytest.mark.parametrize("type_", TYPES)
def test_every_manner_carries_the_computation_to_its_answer(type_):
    for example in draw(11, 150, split="ril", type_weights={type_: 1}):
        lattice, answer = see(example.image), example.ask.answer
        cells = [cell for row in lattice for cell in row]
        said = {style: manner(example.scene, example.ask) for style, manner in STYLES.items()}
        for style, response in said.items():
            assert response.endswith(f"so {answer}")
            assert response.count("so ") == 1
            assert style_of(response) == style
        tally, path = (said[style].split(" so ")[0].split() for style in ("tally", "path"))
        opening, tally, path = (tally[0], path[0]), tally[1:], path[1:]
        if type_ in ("relation", "two_hop"):
            assert opening == ("cell", "find")
            assert cell_at(lattice, tally[-1]) == answer
            anchor, walk = cell_at(lattice, path[0]), path[1:]
            assert example.ask.text.endswith(f"the {anchor}?")
            here = path[0]
            for step, name in zip(walk[::2], walk[1::2], strict=True):
                moved = ("abcd".index(name[0]) - "abcd".index(here[0]), int(name[1]) - int(here[1]))
                assert moved == OPPOSITE[step]
                here = name
            assert cell_at(lattice, here) == answer
            assert len(walk) == (2 if type_ == "relation" else 4)
        elif type_ in ("count", "difference"):
            assert len(tally) == len(cells)
            assert tally.count("+") - tally.count("-") == int(answer)
            numbers = [NUMBER[word] for word in path if word in NUMBER]
            assert int(answer) == (sum(numbers) if type_ == "count" else numbers[0] - numbers[1])
            if type_ == "count":
                assert [tally[i : i + 3].count("+") for i in range(0, len(tally), 3)] == numbers
        elif type_ == "most":
            assert tally == ["." if cell == "empty" else cell[0] for cell in cells]
            assert collections.Counter(mark for mark in tally if mark != ".").most_common(1)[0][0] == answer[0]
            assert {c: NUMBER[n] for c, n in zip(path[::2], path[1::2], strict=True)} == {
                colour: sum(cell.startswith(colour) for cell in cells) for colour in COLOURS
            }
        elif type_ == "chart_highest":
            assert tally == ["." if cell == "empty" else cell.split()[0] for cell in cells[: len(tally)]]
            assert max(zip(path[1::2], path[::2], strict=True), key=lambda pair: NUMBER[pair[0]])[1] == answer
            assert path[::2] == [cell.split()[0] for cell in lattice[-1]]
        elif type_ == "chart_value":
            assert len(tally) == len(lattice)
            assert tally.count("+") == int(answer)
            column = [row[int(path[0]) - 1] for row in lattice]
            assert column[-1].split()[0] in example.ask.text
            assert NUMBER[path[-1]] == int(answer)
        else:
            assert tally.count("+") - tally.count("-") == int(answer)
            assert NUMBER[path[1]] - NUMBER[path[3]] == int(answer)


@pytest.mark.parametrize("split", ["ril", "test"])
@pytest.mark.parametrize("type_", TYPES)
def test_guessing_the_most_frequent_answer_is_right_in_less_than_30_percent(type_, split):
    answers = collections.Counter(example.ask.answer for example in draw(3, 500, split=split, type_weights={type_: 1}))
    assert answers.most_common(1)[0][1] / 500 < 0.30


def test_scenes_of_one_split_occur_in_no_other_whatever_the_seed():
    everything = {**dict.fromkeys(TYPES, 1), "caption": 1}
    seen = {split: set() for split in SPLITS}
    for split in SPLITS:
        weights = dict.fromkeys(TYPES, 1) if split == "test" else everything
        for seed in (0, 1):
            for example in draw(seed, 2500 if split != "test" else 600, split=split, type_weights=weights):
                seen[split].add((example.scene.rows, example.scene.cols, example.scene.cells))
    for split in SPLITS:
        others = set().union(*(scenes for other, scenes in seen.items() if other != split))
        assert seen[split]
        assert not seen[split] & others


def test_every_share_of_the_scene_space_belongs_to_exactly_one_split():
    owners = [sum(low <= share < high for low, high in SPLITS.values()) for share in range(100)]
    assert owners == [1] * 100


def test_the_same_seed_draws_the_same_examples_and_longer_draws_extend_shorter_ones():
    mixture = synthetic.BASE
    first, again, longer = (mixture.draw(5, n, split="pretrain") for n in (40, 40, 90))
    other = mixture.draw(6, 40, split="pretrain")
    assert [e.question for e in first] == [e.question for e in again] == [e.question for e in longer[:40]]
    assert [e.response for e in first] == [e.response for e in longer[:40]]
    assert [e.scene for e in first] != [e.scene for e in other]
    assert len({e.id for e in longer}) == 90


def test_the_record_holds_the_picture_losslessly_and_names_its_type():
    for example in draw(2, 40, split="test"):
        question = example.question
        (data,) = question.images
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))), example.image)
        assert question.id == example.id
        assert question.prompt == example.ask.text
        assert question.solution == example.ask.answer
        family = "chart" if example.type in CHART_TYPES else "grid"
        assert json.loads(question.extra) == {"type": example.type, "family": family}


def test_images_pass_the_processor_unscaled_at_one_merged_token_a_cell():
    processor = QwenImageProcessor(min_pixels=28 * 28, max_pixels=12 * 12 * 28 * 28)
    sizes = {example.image.shape[:2] for example in synthetic.BASE.draw(0, 300, split="pretrain")}
    assert sizes == {(56, 84), (84, 84), (84, 112)}
    for height, width in sizes:
        assert processor.grid(height, width) == (1, height // 14, width // 14)


def test_test_questions_are_drawn_once_and_running_out_of_them_is_said():
    drawn = draw(0, 900, split="test", type_weights={"chart_highest": 1, "chart_value": 1})
    assert len({(e.scene.cells, e.ask.text) for e in drawn}) == 900
    with pytest.raises(InputError, match="chart_highest"):
        draw(0, 5000, split="test", type_weights={"chart_highest": 1})


def test_presets_draw_the_shares_that_they_state():
    n = 4000
    student = collections.Counter(e.style for e in synthetic.STUDENT_SFT.draw(0, n, split="sft"))
    assert student["terse"] / n == pytest.approx(0.98, abs=0.01)  # 4.5 standard errors
    assert student["tally"] / n == pytest.approx(0.01, abs=0.008)
    assert student["path"] / n == pytest.approx(0.01, abs=0.008)
    base = collections.Counter(e.type for e in synthetic.BASE.draw(0, n, split="pretrain"))
    assert base["caption"] / n == pytest.approx(0.2, abs=0.03)
    teachers = {"tally": synthetic.TEACHER_A, "path": synthetic.TEACHER_B}
    for style, teacher in teachers.items():
        examples = teacher.draw(0, n, split="pretrain")
        assert {e.style for e in examples} == {style, "caption"}
        types = collections.Counter(e.type for e in examples)
        strong, weak = ("count", "two_hop") if style == "tally" else ("two_hop", "count")
        assert types[strong] > 5 * types[weak] > 0


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"split": "train"}, "train"),
        ({"split": "ril", "type_weights": {"counts": 1}}, "counts"),
        ({"split": "ril", "style_weights": {"tersely": 1}}, "tersely"),
        ({"split": "ril", "style_weights": {"terse": 0}}, "style_weights"),
        ({"split": "ril", "kinds": ("photo",)}, "photo"),
        ({"split": "ril", "kinds": ("chart",), "type_weights": {"count": 1}}, "type_weights"),
    ],
)
def test_unknown_names_and_empty_choices_are_refused_by_name(arguments, named):
    with pytest.raises(InputError, match=named):
        draw(0, 3, **arguments)


def test_kinds_restrict_the_image_families():
    assert {e.type for e in draw(0, 200, split="ril", kinds=("grid",))} == set(GRID_TYPES)
    everything = {**dict.fromkeys(TYPES, 1), "caption": 1}
    charts = draw(0, 200, split="ril", kinds=("chart",), type_weights=everything)
    assert {e.scene.family for e in charts} == {"chart"}
    assert {e.type for e in charts} == {*CHART_TYPES, "caption"}
