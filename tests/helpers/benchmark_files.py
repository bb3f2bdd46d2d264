"""Small files of exactly the form in which the benchmarks are published."""

import base64
import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image


def png(seed: int, size: int = 56) -> bytes:
    """The bytes of a small picture."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def base64_png(seed: int) -> str:
    return base64.b64encode(png(seed)).decode()


def write_tsv(path: Path, rows: Sequence[Mapping[str, object]]) -> Path:
    """As pandas writes it: tabs, quotes where needed, nothing where there is no value."""
    path.parent.mkdir(parents=True, exist_ok=True)
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(names)
        writer.writerows([row.get(name, "") for name in names] for row in rows)
    return path


def choice(index: int, answer: str = "B", /, **changes) -> dict[str, object]:
    """A row of a benchmark with options."""
    options = {"A": "dog", "B": "cat", "C": "horse", "D": "teddy bear"}
    row = {"index": index, "image": base64_png(index), "question": "Which animal is it?", **options, "answer": answer}
    return {**row, "category": "animals", **changes}


def write_all(folder: Path) -> Path:
    """A file for each of the 14 benchmarks, of two to four rows."""
    for name in ("AI2D_TEST", "MMStar", "SEEDBench_IMG", "SEEDBench2_Plus", "RealWorldQA"):
        write_tsv(folder / f"{name}.tsv", [choice(1), choice(2, "A")])
    write_tsv(folder / "BLINK.tsv", [choice(1), choice(2, image=str([base64_png(3), base64_png(4)]))])
    for name in ("MMBench_DEV_EN_V11", "MMBench_DEV_CN_V11"):
        lent = [choice(1_000_007, "C", image="7", A="teddy bear", B="dog", C="cat", D="horse")]
        write_tsv(folder / f"{name}.tsv", [choice(7, hint="It is small."), choice(8), *lent])
    write_tsv(
        folder / "ChartQA_TEST.tsv",
        [
            {"index": i, "image": base64_png(i), "question": "How high?", "answer": a, "split": s}
            for i, (a, s) in enumerate([("14", "test_human"), ("['Yes', 'yes it is']", "test_augmented")])
        ],
    )
    math = {"question": "Hint: Please answer with an integer.\nQuestion: How many?", "task": "geometry"}
    write_tsv(
        folder / "MathVista_MINI.tsv",
        [
            {"index": 1, "image": base64_png(1), **math, "answer": "14", "question_type": "free_form"}
            | {"answer_type": "integer", "skills": "['arithmetic', 'geometry']"},
            {"index": 2, "image": base64_png(2), **math, "answer": "8/11", "question_type": "multi_choice"}
            | {"answer_type": "text", "choices": "['3/11', '8/11']", "answer_option": "B", "skills": "['geometry']"},
        ],
    )
    vet = {"question": "What is x?", "answer": "-1<AND>-5", "category": "ocr,math"}
    write_tsv(folder / "MMVet.tsv", [{"index": 0, "image": base64_png(1), **vet}])
    (folder / "images").mkdir(exist_ok=True)
    for name in ("v2_0_0.png", "v2_0_1.png"):
        (folder / "images" / name).write_bytes(png(int(name[5])))
    question = "Compare<IMG>v2_0_0.png<IMG> with <IMG>v2_0_1.png"
    entry = {"question": question, "answer": "the left<OR>left", "capability": ["rec", "seq"], "added_in": "v2"}
    (folder / "mm-vet-v2.json").write_text(json.dumps({"v2_0": entry}))
    two = str([base64_png(5), base64_png(6)])
    write_tsv(
        folder / "MMMU_DEV_VAL.tsv",
        [
            choice(1, split="dev"),
            choice(2, split="validation", image=two, question="Is <image 2> or <image 1> larger?", category="Math"),
            {"index": 3, "image": base64_png(3), "question": "<image 1> Value?", "answer": "['8', 'eight']"}
            | {"split": "validation", "category": "Art"},
        ],
    )
    write_tsv(folder / "MMMU_Pro_10c.tsv", [choice(1, question="See <image 1>.", E="cow", F="hen")])
    picture = {"index": 1, "image": base64_png(9), "answer": "J", "category": "Art"}
    write_tsv(folder / "MMMU_Pro_V.tsv", [picture])
    return folder
