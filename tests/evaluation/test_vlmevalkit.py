"""The field's own tool against our server: VLMEvalKit, unmodified, on local files, gives the scores that we give.

It wants an environment of its own (torch, pandas and 170 others). ms-vlmeval is VLMEvalKit as ModelScope packages it:
    python -m venv E && E/bin/pip install ms-vlmeval
    VLMEVALKIT_PYTHON=E/bin/python python -m pytest -m slow tests/evaluation/test_vlmevalkit.py
"""

import base64
import contextlib
import csv
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from helpers.benchmark_files import write_tsv
from helpers.evaluated import evaluated_config, run
from helpers.quick import quick_compilation
from helpers.running import running
from helpers.tiny_folder import build_tiny_folder
from PIL import Image
from tokenizers import Tokenizer

from ril_jax.evaluation.results import read_samples
from ril_jax.sampling.local import load_engine
from ril_jax.sampling.server.app import Service

PYTHON = os.environ.get("VLMEVALKIT_PYTHON") or (sys.executable if importlib.util.find_spec("vlmeval") else "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="name the Python of an environment with ms-vlmeval in VLMEVALKIT_PYTHON"),
]
ROWS = 24
# Ours, and theirs by a name that their table of checksums does not have: the files are not the published ones.
NAMES = {
    "ai2d": ("AI2D_TEST", "AI2D_LOCAL", "ImageMCQDataset"),
    "mmbench": ("MMBench_DEV_EN_V11", "MMBench_LOCAL", "ImageMCQDataset"),
    "chartqa": ("ChartQA_TEST", "ChartQA_LOCAL", "ImageVQADataset"),
    "mmvet": ("MMVet", "MMVet_LOCAL", "MMVet"),
}


def says_one_letter(folder: Path, said_letters: str) -> None:
    """Change the weights so that a response is one of these letters, by picture and question, and then its end.

    The first channel of the residual stream tells where a response stands: behind the prompt's last token it is low,
    which forbids the end; behind a letter it is high, which forbids all else. The rest is the mean of what was seen,
    in which words count little beside the picture.
    """
    path = folder / "model.safetensors"
    tensors = {name: tensor.copy() for name, tensor in safetensors.numpy.load_file(path).items()}
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    letters = [tokenizer.token_to_id(letter) for letter in said_letters]
    start, end = tokenizer.encode("<|im_start|>assistant\n").ids[-1], tokenizer.token_to_id("<|im_end|>")
    embedding, head = tensors["model.embed_tokens.weight"], tensors["lm_head.weight"]
    said = head[letters] - head[letters].mean(axis=0)  # so that one of them is above 0, where all other tokens are
    said[:, 0] = 0
    head[:] = 0
    head[letters], head[end, 0] = 20 * said, 20
    embedding *= 1e-3
    embedding[letters, 0], embedding[start, 0] = 100, -5
    layer = "model.layers.0."
    tensors[f"{layer}self_attn.v_proj.weight"][:, 0] = 0
    tensors[f"{layer}self_attn.k_proj.weight"][:] = 0
    tensors[f"{layer}mlp.down_proj.weight"][:] = 0
    safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})


def jpeg_proof(seed: int) -> str:
    """A picture whose pixels survive JPEG, as which they send it: blocks of 8 by 8 pixels of one grey each.

    Its side is 112, since they enlarge pictures under 100.
    """
    rng = np.random.default_rng(seed)
    blocks = np.tile(rng.integers(0, 256, (7, 7), dtype=np.uint8), (2, 2))
    pixels = np.repeat(np.repeat(blocks, 8, axis=0), 8, axis=1)
    buffer = io.BytesIO()
    Image.fromarray(np.stack([pixels] * 3, axis=-1)).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


@contextlib.contextmanager
def served(folder: Path, letters: str) -> Iterator[str]:
    """The address of a tiny model that says one of these letters."""
    (folder / "tiny").mkdir()
    build_tiny_folder(folder / "tiny", ends=1000)
    says_one_letter(folder / "tiny", letters)
    described = (folder / "tiny" / "config.json").read_text()
    assert '"max_position_embeddings": 1024' in described
    (folder / "tiny" / "config.json").write_text(described.replace('embeddings": 1024', 'embeddings": 4096'))
    config = evaluated_config(folder / "tiny")
    config.engine.max_model_len = 4096  # their judge's prompt is long
    with quick_compilation():
        model, engine = load_engine(config)
    engine.start()
    service = Service(config, model_name="tiny")
    service.open(model, engine)
    with running(service) as address:
        yield address
    engine.close()


def rows_of_all() -> dict[str, list[dict]]:
    options = {"A": "dog", "B": "cat", "C": "horse", "D": "teddy bear"}
    animal = {"question": "Which animal is it?", "category": "animals", "split": "test"}
    choices = [{"index": i, "image": jpeg_proof(i), **animal, **options, "answer": "ABCD"[i % 4]} for i in range(ROWS)]
    rotated = []
    for i in range(ROWS):  # each twice: as it is, and with the options moved on by one
        row = {"index": i, "image": jpeg_proof(100 + i), **animal, "hint": "Look closely.", **options}
        moved = dict(zip("ABCD", list(options.values())[-1:] + list(options.values())[:3], strict=True))
        rotated += [
            row | {"answer": "ABCD"[i % 4]},
            row | moved | {"index": i + 1_000_000, "answer": "BCDA"[i % 4], "image": str(i)},
        ]
    charts = [
        {"index": i, "image": jpeg_proof(200 + i), "question": f"How high is bar {i}?", "answer": "5"}
        for i in range(ROWS)
    ]
    return {"ai2d": choices, "mmbench": rotated, "chartqa": charts}


def test_vlmevalkit_gives_our_scores(tmp_path):
    with served(tmp_path, "ABCDE01") as url:  # E to 1 are no options of the rows
        compare_scores(url, tmp_path)


def compare_scores(url: str, tmp_path: Path) -> None:
    rows = rows_of_all()
    config = evaluated_config(url=url)
    for name, kept in rows.items():
        write_tsv(tmp_path / "before" / f"{NAMES[name][0]}.tsv", kept)
    run(config, tmp_path / "before", tmp_path / "first", *rows)
    # A model without training knows no answer, so what it says becomes the right answer of every second question.
    for name, kept in rows.items():
        said = {sample.key.split("/")[1]: sample.response for sample in read_samples(tmp_path / "first" / name)}
        for row in kept:
            if row["index"] % 2 and (name == "chartqa" or said[str(row["index"])] in "ABCD"):
                row["answer"] = said[str(row["index"])].lower() if name == "chartqa" else said[str(row["index"])]
        assert len(set(said.values())) >= 3
        write_tsv(tmp_path / "data" / f"{NAMES[name][0]}.tsv", kept)

    ours = run(config, tmp_path / "data", tmp_path / "ours", *rows)
    vlmevalkit(url, tmp_path, rows, "--judge=exact_matching")
    for name in rows:
        results = tmp_path / "theirs" / "tiny" / f"tiny_{NAMES[name][1]}"
        responses = {row["index"]: row["prediction"] for row in table(results.with_suffix(".tsv"))}
        samples = {sample.key.split("/")[1]: sample.response for sample in read_samples(tmp_path / "ours" / name)}
        assert responses == samples, name
        (row,) = table(results.with_name(f"{results.name}_acc.csv"))
        whole = 1 if name == "chartqa" else 100  # options are scored from 0 to 1
        assert whole * float(row["Overall"]) == pytest.approx(ours[name]["score"], abs=1e-3), name
        assert 10 < ours[name]["score"] < 90
    assert all(ours[name]["unparsed"] for name in ("ai2d", "mmbench"))  # some answers are no options


def test_our_server_is_their_judge(tmp_path):
    categories = "rec,ocr,know,gen,spat,math"  # they divide by the number of rows of each
    rows = [
        {"index": i, "image": jpeg_proof(i), "question": f"What is {i}?", "answer": "x<AND>y", "category": categories}
        for i in range(8)
    ]
    write_tsv(tmp_path / "data" / "MMVet.tsv", rows)
    with served(tmp_path, "01") as url:
        judge = {"OPENAI_API_BASE": f"{url}/v1/chat/completions", "OPENAI_API_KEY": "sk-none"}
        vlmevalkit(url, tmp_path, ("mmvet",), "--judge=tiny", **judge)
    graded = table(tmp_path / "theirs" / "tiny" / "tiny_MMVet_LOCAL_tiny.tsv")
    assert [(int(row["index"]), row["log"]) for row in graded] == [(i, "Succeed") for i in range(8)]
    (overall,) = (row for row in table(*tmp_path.glob("theirs/tiny/*_score.csv")) if row["Category"] == "Overall")
    scores = [float(row["score"]) for row in graded]
    assert set(scores) <= {0.0, 1.0}
    assert float(overall["acc"]) == pytest.approx(100 * np.mean(scores))


def vlmevalkit(url: str, folder: Path, names: Iterable[str], *words: str, **variables: str) -> None:
    """Have VLMEvalKit evaluate these benchmarks of folder/data, into folder/theirs/tiny."""
    home = folder / "LMUData"
    home.mkdir()
    for name in names:
        shutil.copy(folder / "data" / f"{NAMES[name][0]}.tsv", home / f"{NAMES[name][1]}.tsv")
    model = {"class": "GPT4V", "model": "tiny", "api_base": f"{url}/v1/chat/completions", "key": "sk-none"}
    model |= {"temperature": 0, "max_tokens": 8, "img_size": -1, "img_detail": "high", "timeout": 120, "retry": 2}
    data = {NAMES[name][1]: {"class": NAMES[name][2], "dataset": NAMES[name][1]} for name in names}
    (folder / "vlmevalkit.json").write_text(json.dumps({"model": {"tiny": model}, "data": data}))
    command = [PYTHON, "-m", "vlmeval", "--config=vlmevalkit.json", f"--work-dir={folder / 'theirs'}", *words]
    environment = os.environ | {"LMUData": str(home), "PRED_FORMAT": "tsv", "EVAL_FORMAT": "csv"} | variables
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "combination failed" not in done.stdout, done.stdout[-4000:]  # which does not end it


def table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ","))
