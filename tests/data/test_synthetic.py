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
from ril_jax.data.synthetic import (
    CHART_TYPES,
    COLOURS,
    FAMILIES,
    GRID_TYPES,
    SPLITS,
    STYLES,
    TYPES,
    Scene,
    draw,
    style_of,
)
from ril_jax.errors import InputError

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
NUMBER = {word: value for value, word in enumerate(WORDS)}
MOVES = {"left": (0, -1), "right": (0, 1), "above": (-1, 0), "below": (1, 0)}
LETTERS = "abcdefghi"  # the names of a grid's cells, row by row


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
            # Backgrounds differ from cell to cell, but none comes near the palette: a pixel is painted if it does.
            masks = np.linalg.norm(cell[:, :, None] - np.array(list(COLOURS.values())), axis=-1) < 45
            painted = masks.any((0, 1))
            if not painted.any():
                row.append("empty")
                continue
            assert painted.sum() == 1, "more than one colour"
            colour = int(painted.argmax())
            mask = masks[:, :, colour]
            if mask[26, 8:24].all():  # shapes leave a margin below, bars and their feet stand on the ground
                form = "bar" if mask[20, 10] else "base"
            elif not mask[13:17, 13:17].any():  # a ring has a hole
                form = "ring"
            else:  # the upper right corner is a square's alone, the lower left one also a triangle's
                assert mask[23, 6]
                form = "square" if mask[6, 23] else "triangle"
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
        return word(colours.count(match[1]) - colours.count(match[2]))
    if match := re.fullmatch(r"how many (red|blue|green|yellow) shapes\?", question):
        return word(colours.count(match[1]))
    if match := re.fullmatch(r"how many (ring|square|triangle)s\?", question):
        return word(sum(cell.endswith(match[1]) for cell in cells))
    if question in ("which colour is most common?", "which bar is highest?"):
        counts = heights if "bar" in question else {colour: colours.count(colour) for colour in COLOURS}
        (first, most), (_, second) = sorted(counts.items(), key=lambda item: -item[1])[:2]
        assert most > second, "ambiguous"
        return first
    if match := re.fullmatch(r"value of the (\w+) bar\?", question):
        return word(heights[match[1]])
    if match := re.fullmatch(r"how much higher is (\w+) than (\w+)\?", question):
        return word(heights[match[1]] - heights[match[2]])
    hop = r"(?:left of|right of|above|below)"
    match = re.fullmatch(rf"which colour is ({hop}(?: the cell {hop})*) cell ([a-i])\?", question)
    row, col = place(lattice, match[2])
    for step in reversed(re.findall(r"left|right|above|below", match[1])):
        row, col = row + MOVES[step][0], col + MOVES[step][1]
        assert 0 <= row < len(lattice), "outside"
        assert 0 <= col < len(lattice[0]), "outside"
    return lattice[row][col].split()[0]


def word(number: int) -> str:
    assert number >= 0, "no word for it"
    return WORDS[number]


def place(lattice: list[list[str]], name: str) -> tuple[int, int]:
    """Row and column of the cell that a letter names."""
    return divmod(LETTERS.index(name), len(lattice[0]))


def colour_at(lattice: list[list[str]], name: str) -> str:
    row, col = place(lattice, name)
    return lattice[row][col].split()[0]


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
            assert opening == ("cell", "walk")
            (target,) = tally
            assert colour_at(lattice, target) == answer
            here = example.ask.text.removesuffix("?")[-1]
            for step, name in zip(path[::2], path[1::2], strict=True):
                (row, col), (down, right) = place(lattice, here), MOVES[step]
                assert place(lattice, name) == (row + down, col + right)
                here = name
            assert here == target
            assert path[::2] == re.findall(r"left|right|above|below", example.ask.text)[::-1]
            assert len(path) == (2 if type_ == "relation" else 4)
        elif type_ in ("count", "difference"):
            assert len(tally) == len(cells)
            assert tally.count("+") - tally.count("-") == NUMBER[answer]
            numbers = [NUMBER[token] for token in path if token in NUMBER]
            assert NUMBER[answer] == (sum(numbers) if type_ == "count" else numbers[0] - numbers[1])
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
            assert tally.count("+") == NUMBER[answer]
            column = [row[NUMBER[path[0]] - 1] for row in lattice]
            assert column[-1].split()[0] in example.ask.text.split()
            assert path[1:] == ["height", answer]
        else:
            assert tally.count("+") - tally.count("-") == NUMBER[answer]
            assert NUMBER[path[1]] - NUMBER[path[3]] == NUMBER[answer]


@pytest.mark.parametrize("family", FAMILIES)
def test_captions_tell_what_their_manner_looks_at(family):
    told = set()
    for example in draw(13, 150, split="pretrain", kinds=(family,), type_weights={"caption": 1}):
        lattice = see(example.image)
        cells = [cell for row in lattice for cell in row]
        said = {style: manner(example.scene, example.ask) for style, manner in STYLES.items()}
        assert {style_of(response): response for response in said.values()} == said
        assert example.ask.text == "describe the picture"
        assert said["terse"] == f"so {family}"
        subject, *listed = said["tally"].split()
        part = ("colours", "shapes").index(subject)
        hidden = [cell == "empty" or cell.endswith(" base") for cell in cells]
        words = ["." if bare else cell.split()[part] for cell, bare in zip(cells, hidden, strict=True)]
        assert listed == words[:9]  # all cells of a grid
        told.add(subject)
        subject, *listed = said["path"].split()
        pairs = list(zip(listed[::2], listed[1::2], strict=True))
        if family == "grid":
            assert subject == "cells"
            assert len(dict(pairs)) == 5
            assert pairs == [(name, colour_at(lattice, name).replace("empty", ".")) for name, _ in pairs]
            told |= {name for name, _ in pairs}
        else:
            assert subject == "bars"
            feet = [cell.split()[0] for cell in lattice[-1]]
            assert pairs == [(colour, word(cells.count(f"{colour} bar"))) for colour in feet]
    assert told == ({"colours", "shapes", *LETTERS} if family == "grid" else {"colours"})


def test_every_place_of_the_lattice_has_a_background_of_its_own_that_is_no_colour_of_an_object():
    picture = synthetic.render(Scene("chart", 3, 4, ("empty",) * 12)).astype(int)
    patches = picture.reshape(3, 28, 4, 28, 3).transpose(0, 2, 1, 3, 4)[:, :, 8:, 8:]
    backgrounds = patches.reshape(12, -1, 3).mean(1)
    between = np.linalg.norm(backgrounds[:, None] - backgrounds, axis=-1)
    assert between[~np.eye(12, dtype=bool)].min() > 25
    assert np.linalg.norm(backgrounds[:, None] - np.array(list(COLOURS.values())), axis=-1).min() > 80


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
    assert {e.type for e in synthetic.CAPTIONS.draw(0, 300, split="pretrain")} == {"caption"}
    base = collections.Counter(e.type for e in synthetic.BASE.draw(0, n, split="pretrain"))
    assert set(base) == {*TYPES, "caption"}
    assert base["caption"] / n == pytest.approx(3 / 11.4, abs=0.03)
    assert base["relation"] / n == pytest.approx(1.5 / 11.4, abs=0.025)
    assert base["chart_highest"] / n == pytest.approx(0.4 / 11.4, abs=0.013)
    ril = collections.Counter(e.type for e in synthetic.RIL.draw(0, n, split="ril"))
    assert set(ril) == set(TYPES)
    assert all(share / n == pytest.approx(1 / 8, abs=0.025) for share in ril.values())
    counting, walking = ("count", "difference"), ("relation", "two_hop")
    teachers = (("tally", synthetic.TEACHER_A, counting, walking), ("path", synthetic.TEACHER_B, walking, counting))
    for style, teacher, strong, weak in teachers:
        examples = teacher.draw(0, n, split="pretrain")
        assert {e.style for e in examples} == {style}
        types = collections.Counter(e.type for e in examples)
        assert set(types) == {*TYPES, "caption"}
        assert min(types[type_] for type_ in strong) > 5 * max(types[type_] for type_ in weak)


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
