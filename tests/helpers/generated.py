"""A tiny model that answers questions offline: its config, questions with and without images, and their answers."""

import base64
import io
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from ril_jax import generate
from ril_jax.config import serving_config
from ril_jax.data.records import Question, read_dataset

CONFIG = Path(__file__).with_name("generated_config.py")


def generated_config(folder: Path | str, **changes) -> ConfigDict:
    """3 responses a question, 4 questions a shard, few and small programs; `changes` are of the `generate` section."""
    c = serving_config()
    c.checkpoint, c.dtype = str(folder), "float32"
    c.engine.update(
        {"slots": 8, "small_slots": 0, "max_model_len": 128, "page_size": 16, "prefill": ((64, 4),)}
        | {"decode_steps": 4, "attention_block": 64, "feature_rows": 64}
    )
    c.sampling.max_completion_length = 12
    c.generate.update({"num_generations": 3, "questions_per_shard": 4, "concurrency": 3, "model_name": "tiny"})
    c.generate.update({"threads": 2} | changes)
    return c


def write_questions(path: Path, count: int, **extra) -> Path:
    """`count` questions, every third with an image; `extra`: row number -> fields that replace its own."""
    rows = []
    for i in range(count):
        row = {"id": f"q{i}", "prompt": f"Is {i} more than {i * 7 % 5}?", "solution": "yes", "kind": i % 2}
        if i % 3 == 0:
            buffer = io.BytesIO()
            pixels = np.random.default_rng(i).integers(0, 256, (30 + i, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(buffer, "PNG")
            row["images"] = [base64.b64encode(buffer.getvalue()).decode()]
        rows.append(row | extra.get(f"row{i}", {}))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run_here(config: ConfigDict, source: Path, output: Path, *, shard: str = "", summary: bool = False) -> None:
    args = SimpleNamespace(
        config=config, input=str(source), output=str(output), split="train", shard=shard, summary=summary
    )
    assert generate.main(args) == 0


def command(folder: Path | str, source: Path, output: Path, *words: str) -> list[str]:
    config = f"--config={CONFIG}:{folder}"
    return [sys.executable, "-m", "ril_jax.generate", config, f"--input={source}", f"--output={output}", *words]


def begin(environment: dict[str, str], *words) -> subprocess.Popen:
    return subprocess.Popen(
        command(*words), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )


def answers(folder: Path) -> dict[str, Question]:
    return {question.id: question for question in read_dataset(folder)}


def content(folder: Path) -> dict[str, bytes]:
    """Every file that a job leaves, but for the lock, which names a process."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "job.lock"}
