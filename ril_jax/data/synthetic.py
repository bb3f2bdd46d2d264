"""The embedded default's task, drawn from a seed: grids of coloured shapes and small bar charts, with questions.

One lattice cell is 28x28 pixels, which is one merged vision token (patch 14, merge 2), and carries one mark. Every cell
also shows where it stands: a light tick on its left edge for the row and on its top edge for the column, as a ruler
would, rows of different shades and columns of different tints (as a plaid would). Qwen2.5-VL sees positions only as
rotations, and small models need minutes to learn them from those alone. Cells have letters, row by row: a, b, c, ...

A response has a manner. `terse` only states the answer. `tally` marks cell after cell, or names the target cell, and
concludes; it carries the computation of counting and comparing. `path` states partial counts, walks from cell to cell
or reads the bars off; it carries that of relations and charts. All three end in "so <answer>". Captions, which are for
pre-training only, tell what a manner looks at: all cells in order, or cells by their letters and bars by their heights.
"""

import hashlib
import io
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property

import numpy as np
from PIL import Image, ImageDraw

from ril_jax.data.records import Question
from ril_jax.errors import InputError

CELL = 28  # pixels; sizes are multiples of it, so that smart_resize leaves every image as it is
COLOURS = {"red": (214, 45, 45), "blue": (35, 95, 220), "green": (25, 200, 60), "yellow": (240, 185, 20)}
SHAPES = ("ring", "square", "triangle")
OBJECTS = tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
STEPS = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}
GRID_TYPES = ("count", "difference", "most", "relation", "two_hop")
CHART_TYPES = ("chart_value", "chart_difference", "chart_highest")
TYPES = GRID_TYPES + CHART_TYPES  # what is asked; "caption" besides is for pre-training only
FAMILIES = ("grid", "chart")
MAX_VALUE = 3  # of a bar, which is the number of rows of a chart

# Shares of the scene space, in percent. A scene belongs to the split that its content hash falls into, whatever the
# seed, so no scene that is tested on is ever trained on, and teachers are asked about scenes that they did not see.
SPLITS = {"pretrain": (0, 40), "sft": (40, 55), "ril": (55, 85), "test": (85, 100)}


@dataclass(frozen=True)
class Scene:
    """A lattice of `rows` x `cols` cells, row by row: "empty", an object ("red ring"), "red bar" or "red base"."""

    family: str
    rows: int
    cols: int
    cells: tuple[str, ...]
    bars: tuple[tuple[str, int], ...] = ()  # charts: colour and height of each bar, left to right

    @cached_property
    def digest(self) -> int:
        content = f"{self.family} {self.rows}x{self.cols} {','.join(self.cells)}"
        return int.from_bytes(hashlib.blake2b(content.encode(), digest_size=8).digest(), "big")

    @property
    def split(self) -> str:
        share = self.digest % 100
        return next(name for name, (low, high) in SPLITS.items() if low <= share < high)

    def cell_name(self, index: int) -> str:
        return "abcdefghijkl"[index]


@dataclass(frozen=True)
class Ask:
    """A question about a scene with its answer; `facts` is what the manners need to work it out."""

    type: str
    text: str
    answer: str
    facts: Mapping


@dataclass(frozen=True)
class SyntheticExample:
    """One drawn question with a response in some manner; the image is rendered and encoded only when it is read."""

    id: str
    scene: Scene
    ask: Ask
    response: str
    style: str

    @property
    def type(self) -> str:
        return self.ask.type

    @cached_property
    def image(self) -> np.ndarray:
        """The picture, [rows*28, cols*28, 3] uint8."""
        return render(self.scene)

    @cached_property
    def question(self) -> Question:
        """The record of this example: PNG bytes in `images`, the question's type and image family in `extra`."""
        buffer = io.BytesIO()
        Image.fromarray(self.image).save(buffer, format="PNG", compress_level=0)  # noise does not compress
        return Question(
            id=self.id,
            prompt=self.ask.text,
            images=(buffer.getvalue(),),
            solution=self.ask.answer,
            extra=json.dumps({"type": self.type, "family": self.scene.family}),
        )


def draw(
    seed: int,
    n: int,
    *,
    split: str,
    kinds: Sequence[str] = FAMILIES,
    type_weights: Mapping[str, float] | None = None,
    style_weights: Mapping[str, float] | None = None,
) -> list[SyntheticExample]:
    """Draw `n` examples of `split` ("pretrain", "sft", "ril" or "test"), the same ones for the same seed.

    `kinds` restricts the image families, `type_weights` (default: all of TYPES alike) and `style_weights` (default:
    terse) need not sum to one. Shorter draws are prefixes of longer ones. Test draws hold no scene and question twice.
    Raises InputError for unknown names, weights that are all zero, or more distinct test questions than there are.
    """
    types = _weights(type_weights or dict.fromkeys(TYPES, 1.0), _DRAWERS, "type_weights")
    types = {name: weight for name, weight in types.items() if name == "caption" or _family_of(name) in kinds}
    styles = _weights(style_weights or {"terse": 1.0}, STYLES, "style_weights")
    if split not in SPLITS:
        raise InputError(f"split {split!r} is unknown: use one of {', '.join(SPLITS)}")
    if unknown := set(kinds) - set(FAMILIES):
        raise InputError(f"kinds: {sorted(unknown)[0]!r} is unknown: use {', '.join(FAMILIES)}")
    if not types:
        raise InputError(f"type_weights: none of the types has an image of the kinds {', '.join(kinds)}")
    rng = random.Random(f"{split}/{seed}")  # a string is hashed: streams of different splits are unrelated
    examples: list[SyntheticExample] = []
    seen: set[tuple[int, str]] = set()
    for index in range(n):
        (type_,) = rng.choices(list(types), list(types.values()))
        (style,) = rng.choices(list(styles), list(styles.values()))
        for _ in range(5000):
            scene, ask = _DRAWERS[type_](rng, kinds)
            key = (scene.digest, ask.text)
            if scene.split == split and not (split == "test" and key in seen):
                break
        else:
            raise InputError(f"split {split!r} has no more questions of type {type_!r}: draw at most {index} examples")
        seen.add(key)
        response = STYLES[style](scene, ask)
        examples.append(SyntheticExample(f"{split}-{seed}-{index:06d}", scene, ask, response, style))
    return examples


@dataclass(frozen=True)
class Mixture:
    """Shares of question types and manners, as `draw` takes them."""

    type_weights: Mapping[str, float] = field(default_factory=lambda: dict.fromkeys(TYPES, 1.0))
    style_weights: Mapping[str, float] = field(default_factory=lambda: {"terse": 1.0})

    def draw(self, seed: int, n: int, *, split: str) -> list[SyntheticExample]:
        """`draw` with this mixture's weights."""
        return draw(seed, n, split=split, type_weights=self.type_weights, style_weights=self.style_weights)


_ALL = dict.fromkeys(TYPES, 1.0)
# Small models sit on a plateau before they look at the image: pictures are only described at first.
CAPTIONS = Mixture({"caption": 1.0})
# The common start: every skill (RIL passes on manners, not perception), more of those that take longer to learn.
BASE = Mixture(
    {
        **{"caption": 3.0, "relation": 1.5, "two_hop": 1.5, "count": 1.5, "difference": 1.2, "most": 0.5},
        **{"chart_value": 1.0, "chart_difference": 0.8, "chart_highest": 0.4},
    }
)
# The student after SFT answers tersely. The rare other manners are what its own samples can discover, and the size of
# Dr.GRPO's gain hangs on their share: with 5 % of each, Dr.GRPO alone finds them.
STUDENT_SFT = Mixture(_ALL, {"terse": 98.0, "tally": 1.0, "path": 1.0})
# Two teachers with complementary strengths: each has its own manner; a has seen little of relations, b of counting.
TEACHER_A = Mixture(
    {
        **{"caption": 2.0, "count": 1.5, "difference": 1.5, "most": 0.5, "relation": 0.15, "two_hop": 0.15},
        **{"chart_value": 0.7, "chart_difference": 0.8, "chart_highest": 0.3},
    },
    {"tally": 1.0},
)
TEACHER_B = Mixture(
    {
        **{"caption": 2.0, "count": 0.15, "difference": 0.15, "most": 0.3, "relation": 2.0, "two_hop": 2.0},
        **{"chart_value": 1.0, "chart_difference": 0.8, "chart_highest": 0.4},
    },
    {"path": 1.0},
)
# What RIL trains and tests on: all types alike. The responses of its examples (terse) are not used.
RIL = Mixture()


def vocabulary_texts(seed: int = 0) -> list[str]:
    """Texts that hold each word of the task, written as it is used: what the tiny tokenizer is trained on.

    Other seeds draw other examples, in which words are common to other degrees: their tokenizers number them otherwise.
    """
    examples = [
        e
        for style in STYLES
        for e in draw(seed, 700, split="pretrain", type_weights=BASE.type_weights, style_weights={style: 1.0})
    ]
    words = [*COLOURS, *SHAPES, *NUMBERS, "empty", "system", "user", "assistant"]
    words += [f" {word}" for word in words] + [f" {row}" for row in "abcdefghijkl"] + list("0123456789")
    return [example.ask.text for example in examples] + [example.response for example in examples] + words


def style_of(response: str) -> str | None:
    """The manner that a response is written in ("terse", "tally" or "path") by its first word, None for any other."""
    first = (response.split() or [""])[0]
    openings = {"so": "terse", "tally": "tally", "cell": "tally", "colours": "tally", "shapes": "tally"}
    openings |= dict.fromkeys(("rows", "counts", "bars", "find", "walk", "cells"), "path")
    return openings.get(first)


# ---------------------------------------------------------------------------------------------------------- manners


def _caption_tally(scene: Scene, ask: Ask) -> str:
    """Colours or shapes of the cells in order, of the first nine where a chart has more."""
    part = 1 if scene.family == "grid" and ask.facts["shapes"] else 0
    marked = ["." if cell == "empty" or cell.endswith("base") else cell.split()[part] for cell in scene.cells[:9]]
    return f"{('colours', 'shapes')[part]} {' '.join(marked)}"


def _caption_path(scene: Scene, ask: Ask) -> str:
    """Some cells by their letters, or the heights of the bars."""
    if scene.family == "chart":
        return "bars " + " ".join(f"{colour} {NUMBERS[height]}" for colour, height in scene.bars)
    listed = [f"{scene.cell_name(c)} {_colour(scene.cells[c])}" for c in ask.facts["cells"]]
    return f"cells {' '.join(listed)}"


def _colour(cell: str) -> str:
    return "." if cell == "empty" else cell.split()[0]


def _terse(scene: Scene, ask: Ask) -> str:
    return f"so {ask.answer}"


def _tally(scene: Scene, ask: Ask) -> str:
    if ask.type == "caption":
        return _caption_tally(scene, ask)
    facts = ask.facts
    if ask.type in ("relation", "two_hop"):
        return f"cell {scene.cell_name(facts['cells'][-1])} so {ask.answer}"
    if ask.type == "count":
        marks = ["+" if _matches(cell, facts["what"]) else "." for cell in scene.cells]
    elif ask.type == "difference":
        signs = {facts["plus"]: "+", facts["minus"]: "-"}
        marks = [signs.get(cell.split()[0], ".") for cell in scene.cells]
    elif ask.type == "most":
        marks = ["." if cell == "empty" else cell[0] for cell in scene.cells]  # r b g y
    elif ask.type == "chart_highest":  # row after row from the top, until a bar is met
        met = next(index for index, cell in enumerate(scene.cells) if cell != "empty")
        marks = ["."] * met + [ask.answer]
    else:  # chart_value, chart_difference: each cell of a bar's column, bottom up
        heights, marks = dict(scene.bars), []
        for sign, colour in zip("+-", facts["bars"], strict=False):
            marks += [sign] * heights[colour] + ["."] * (MAX_VALUE - heights[colour])
    return f"tally {' '.join(marks)} so {ask.answer}"


def _path(scene: Scene, ask: Ask) -> str:
    if ask.type == "caption":
        return _caption_path(scene, ask)
    facts = ask.facts
    if ask.type in ("relation", "two_hop"):
        names = [scene.cell_name(cell) for cell in facts["cells"]]
        walk = " ".join(f"{step.split()[0]} {name}" for step, name in zip(facts["steps"], names[1:], strict=True))
        return f"walk {walk} so {ask.answer}"
    if ask.type == "count":
        rows = [scene.cells[start : start + scene.cols] for start in range(0, len(scene.cells), scene.cols)]
        counts = [NUMBERS[sum(_matches(cell, facts["what"]) for cell in row)] for row in rows]
        return f"rows {' '.join(counts)} so {ask.answer}"
    if ask.type in ("difference", "most"):
        colours = [facts["plus"], facts["minus"]] if ask.type == "difference" else list(COLOURS)
        counts = [f"{colour} {NUMBERS[_count(scene, colour)]}" for colour in colours]
        return f"counts {' '.join(counts)} so {ask.answer}"
    heights = dict(scene.bars)
    if ask.type == "chart_value":
        (colour,) = facts["bars"]
        return f"find {NUMBERS[list(heights).index(colour) + 1]} height {NUMBERS[heights[colour]]} so {ask.answer}"
    read = heights if ask.type == "chart_highest" else facts["bars"]
    return f"bars {' '.join(f'{colour} {NUMBERS[heights[colour]]}' for colour in read)} so {ask.answer}"


STYLES: dict[str, Callable[[Scene, Ask], str]] = {"terse": _terse, "tally": _tally, "path": _path}


def _matches(cell: str, what: str) -> bool:
    """Whether a cell's object has the colour or shape `what`."""
    return what in cell.split()


def _count(scene: Scene, what: str) -> int:
    return sum(_matches(cell, what) for cell in scene.cells)


# -------------------------------------------------------------------------------------------- scenes with questions
# Each draws the answer first, so that every type's answers are balanced, and then a scene around it.


def _grid_shape(rng: random.Random) -> tuple[int, int]:
    # Always three columns: the i-th mark of a tally then means the same cell in every grid.
    return (3, 3) if rng.random() < 0.75 else (2, 3)


def _grid(rng: random.Random, rows: int, cols: int, placed: Sequence[str], others: Sequence[str]) -> Scene:
    """`placed` in random cells, the rest filled from `others` or left empty."""
    cells = list(placed)
    cells += [rng.choice(others) if rng.random() < 0.65 else "empty" for _ in range(rows * cols - len(cells))]
    rng.shuffle(cells)
    return Scene("grid", rows, cols, tuple(cells))


def _draw_count(rng: random.Random, kinds: Sequence[str]) -> tuple[Scene, Ask]:
    what = rng.choice([*COLOURS, *SHAPES])
    name = f"{what} shapes" if what in COLOURS else f"{what}s"
    rows, cols = _grid_shape(rng)
    number = rng.randrange(5)
    matching = [thing for thing in OBJECTS if _matches(thing, what)]
    others = [thing for thing in OBJECTS if not _matches(thing, what)]
    scene = _grid(rng, rows, cols, rng.choices(matching, k=number), others)
    return scene, Ask("count", f"how many {name}?", NUMBERS[number], {"what": what})


def _draw_difference(rng: random.Random, kinds: Sequence[str]) -> tuple[Scene, Ask]:
    plus, minus = rng.sample(list(COLOURS), 2)
    rows, cols = _grid_shape(rng)
    difference = rng.randrange(4)
    fewer = rng.randint(0, min(2, (rows * cols - difference) // 2))
    counts = {plus: fewer + difference, minus: fewer}
    placed = [f"{colour} {rng.choice(SHAPES)}" for colour, count in counts.items() for _ in range(count)]
    scene = _grid(rng, rows, cols, placed, [thing for thing in OBJECTS if thing.split()[0] not in counts])
    return scene, Ask(
        "difference", f"how many more {plus} than {minus}?", NUMBERS[difference], {"plus": plus, "minus": minus}
    )


def _draw_most(rng: random.Random, kinds: Sequence[str]) -> tuple[Scene, Ask]:
    rows, cols = _grid_shape(rng)
    winner = rng.choice(list(COLOURS))
    while True:
        top = rng.randint(2, 4)
        counts = {colour: top if colour == winner else rng.randrange(top) for colour in COLOURS}
        if sum(counts.values()) <= rows * cols:
            break
    cells = [f"{colour} {rng.choice(SHAPES)}" for colour, count in counts.items() for _ in range(count)]
    cells += ["empty"] * (rows * cols - len(cells))
    rng.shuffle(cells)
    return Scene("grid", rows, cols, tuple(cells)), Ask("most", "which colour is most common?", winner, {})


@cache
def _walks(rows: int, cols: int, hops: int) -> list[tuple[tuple[int, ...], tuple[str, ...]]]:
    """All walks inside the lattice that never come back to their first cell: (cells, steps)."""
    walks: list[tuple[tuple[int, ...], tuple[str, ...]]] = [((cell,), ()) for cell in range(rows * cols)]
    for _ in range(hops):
        longer = []
        for cells, steps in walks:
            for step, (down, right) in STEPS.items():
                row, col = cells[-1] // cols + down, cells[-1] % cols + right
                if 0 <= row < rows and 0 <= col < cols and row * cols + col not in cells:
                    longer.append(((*cells, row * cols + col), (*steps, step)))
        walks = longer
    return walks


def _draw_walk(rng: random.Random, hops: int) -> tuple[Scene, Ask]:
    rows, cols = _grid_shape(rng)
    cells, steps = rng.choice(_walks(rows, cols, hops))
    answer = rng.choice([*COLOURS, "empty"])
    scene_cells = [rng.choice(OBJECTS) if rng.random() < 0.65 else "empty" for _ in range(rows * cols)]
    scene_cells[cells[-1]] = rng.choice([thing for thing in (*OBJECTS, "empty") if answer in thing.split()])
    scene = Scene("grid", rows, cols, tuple(scene_cells))
    where = " ".join(f"{step} the cell" for step in reversed(steps)).removesuffix("the cell")
    text = f"which colour is {where}cell {scene.cell_name(cells[0])}?"
    type_ = "relation" if hops == 1 else "two_hop"
    return scene, Ask(type_, text, answer, {"cells": cells, "steps": steps})


def _chart(bars: Sequence[tuple[str, int]]) -> Scene:
    cells = []
    for row in range(MAX_VALUE):
        level = MAX_VALUE - row  # the height of a bar that just reaches this row
        for colour, height in bars:
            base = f"{colour} base" if level == 1 else "empty"  # a bar of height zero still shows its foot
            cells.append(f"{colour} bar" if height >= level else base)
    return Scene("chart", MAX_VALUE, len(bars), tuple(cells), tuple(bars))


def _bar_colours(rng: random.Random) -> list[str]:
    return rng.sample(list(COLOURS), (4 if rng.random() < 0.25 else 3))


def _draw_chart_value(rng: random.Random, kinds: Sequence[str]) -> tuple[Scene, Ask]:
    bars = [(colour, rng.randint(0, MAX_VALUE)) for colour in _bar_colours(rng)]
    colour, height = rng.choice(bars)
    return _chart(bars), Ask("chart_value", f"value of the {colour} bar?", NUMBERS[height], {"bars": (colour,)})


def _draw_chart_difference(rng: random.Random, kinds: Sequence[str]) -> tuple[Scene, Ask]:
    heights = {colour: rng.randint(0, MAX_VALUE) for colour in _bar_colours(rng)}
    plus, minus = rng.sample(list(heights), 2)
    difference = rng.randint(0, MAX_VALUE)
    heights[minus] = rng.randint(0, MAX_VALUE - difference)
    heights[plus] = heights[minus] + difference
    text = f"how much higher is {plus} than {minus}?"
    return _chart(list(heights.items())), Ask("chart_difference", text, NUMBERS[difference], {"bars": (plus, minus)})


def _draw_chart_highest(rng: random.Random, kinds: Sequence[str]) -> tuple[Scene, Ask]:
    colours = _bar_colours(rng)
    winner, top = rng.choice(colours), rng.randint(2, MAX_VALUE)
    bars = [(colour, top if colour == winner else rng.randrange(top)) for colour in colours]
    return _chart(bars), Ask("chart_highest", "which bar is highest?", winner, {})


def _draw_caption(rng: random.Random, kinds: Sequence[str]) -> tuple[Scene, Ask]:
    """What stands where: a dense signal to learn to see from. The manner chooses what is told."""
    if rng.choice(kinds) == "chart":
        scene = _chart([(colour, rng.randint(0, MAX_VALUE)) for colour in _bar_colours(rng)])
    else:
        rows, cols = _grid_shape(rng)
        scene = _grid(rng, rows, cols, (), OBJECTS)
    # Five cells: a run of them, which teaches that letters name cells, or any.
    first = rng.randrange(len(scene.cells) - 4)
    cells = list(range(first, first + 5)) if rng.random() < 0.5 else rng.sample(range(len(scene.cells)), 5)
    facts = {"cells": cells, "shapes": rng.random() < 0.5}
    return scene, Ask("caption", "describe the picture", scene.family, facts)


_DRAWERS: dict[str, Callable[[random.Random, Sequence[str]], tuple[Scene, Ask]]] = {
    "count": _draw_count,
    "difference": _draw_difference,
    "most": _draw_most,
    "relation": lambda rng, kinds: _draw_walk(rng, 1),
    "two_hop": lambda rng, kinds: _draw_walk(rng, 2),
    "chart_value": _draw_chart_value,
    "chart_difference": _draw_chart_difference,
    "chart_highest": _draw_chart_highest,
    "caption": _draw_caption,
}


def _family_of(type_: str) -> str:
    return "chart" if type_ in CHART_TYPES else "grid"


def _weights(weights: Mapping[str, float], known: Mapping, what: str) -> dict[str, float]:
    if unknown := [name for name in weights if name not in known]:
        raise InputError(f"{what}: {unknown[0]!r} is unknown: use {', '.join(known)}")
    if min(weights.values(), default=0) < 0 or sum(weights.values()) <= 0:
        raise InputError(f"{what}: weights must not be negative, and not all zero")
    return {name: float(weight) for name, weight in weights.items() if weight > 0}


# ---------------------------------------------------------------------------------------------------------- pictures


def render(scene: Scene) -> np.ndarray:
    """The scene's picture, [rows*28, cols*28, 3] uint8, with slight pixel noise that its content seeds."""
    rows = []
    for row in range(scene.rows):
        names = scene.cells[row * scene.cols : (row + 1) * scene.cols]
        rows.append(np.concatenate([_sprite(name, row, col) for col, name in enumerate(names)], axis=1))
    picture = np.concatenate(rows, axis=0)
    noise, (height, width) = _noise(), picture.shape[:2]
    top, left = scene.digest % (len(noise) - height), scene.digest // 1024 % (len(noise) - width)
    return np.clip(picture + noise[top : top + height, left : left + width], 0, 255).astype(np.uint8)


@cache
def _sprite(name: str, row: int, col: int) -> np.ndarray:
    scale = 4  # drawn large and shrunk, for smooth edges
    shade, tint = (70, 120, 170)[row], ((30, 0, -30), (0, 0, 0), (-30, 0, 30), (0, 30, 0))[col]
    picture = Image.new("RGB", (CELL * scale, CELL * scale), tuple(shade + t for t in tint))
    pen = ImageDraw.Draw(picture)

    def box(left: float, top: float, right: float, bottom: float) -> list[float]:
        return [left * scale, top * scale, right * scale - 1, bottom * scale - 1]

    if name != "empty":
        colour, form = name.split()
        fill = COLOURS[colour]
        if form == "ring":
            pen.ellipse(box(4, 4, 26, 26), outline=fill, width=6 * scale)
        elif form == "square":
            pen.rectangle(box(5, 5, 25, 25), fill=fill)
        elif form == "triangle":
            pen.polygon([(15 * scale, 4 * scale), (4 * scale, 25 * scale), (26 * scale, 25 * scale)], fill=fill)
        elif form == "bar":
            pen.rectangle(box(6, 4, 25, CELL), fill=fill)  # a gap above each unit, so that units can be counted
        else:  # the foot of a bar of height zero
            pen.rectangle(box(6, CELL - 4, 25, CELL), fill=fill)
    pen.rectangle(box(0, 7 * row, 4, 7 * row + 7), fill=(250, 250, 250))
    pen.rectangle(box(7 * col, 0, 7 * col + 7, 4), fill=(250, 250, 250))
    return np.asarray(picture.resize((CELL, CELL), Image.Resampling.BOX), np.int16)


@cache
def _noise() -> np.ndarray:
    return np.rint(np.random.default_rng(0).normal(0, 4, (512, 512, 1))).astype(np.int16)
