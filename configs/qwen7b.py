"""Qwen2.5-VL-7B as the student, with the paper's settings.

What the paper states are the defaults of ril_jax/config.py, each with its source; here are models and shapes.

    python -m ril_jax.train --config=configs/qwen7b.py --workdir=runs/qwen7b \\
        --config.data.sft=data/sft --config.data.questions=data/questions --config.data.eval=data/eval \\
        --config.reward.judge.base_url=http://judge:8000/v1

`python -m ril_jax.data` makes the data sets (docs/data.md); the judge is any OpenAI-compatible endpoint that serves
Qwen2.5-32B-Instruct (docs/rewards.md). The collect stage samples the 72B teacher on the same devices, before RIL.
Where its responses are there already, --config=configs/qwen7b.py:cached leaves it out, and
--config.data.teacher_data=DIR names the data set that holds them.
"""

from ml_collections import ConfigDict

from ril_jax.config import add_teacher, default_config
from ril_jax.errors import InputError


def get_config(teacher: str = "qwen72b") -> ConfigDict:
    """`qwen72b` samples the teacher in this run, `cached` takes its responses from config.data.teacher_data."""
    if teacher not in ("qwen72b", "cached"):
        raise InputError(f"teacher {teacher!r} is not known; known are qwen72b (the default) and cached")
    c = default_config()
    c.student.checkpoint = "Qwen/Qwen2.5-VL-7B-Instruct"  # [P]
    if teacher == "qwen72b":
        add_teacher(c, "qwen72b", "Qwen/Qwen2.5-VL-72B-Instruct")  # [P]

    # An image takes 32 to 512 tokens (data.min_pixels, data.max_pixels), its question a few hundred more.
    c.data.prompt_buckets = (640, 1024, 1536)
    # The images of 4 questions (a micro-batch) or of 8 (collect, eval); the last rung is for two images a question.
    c.data.vision_rungs = ((8192, 4, 2048), (16384, 8, 2048), (32768, 16, 2048))
    c.sft.micro_batch_size = c.discriminator.micro_batch_size = c.ril.micro_batch_size = 4
    c.collect.batch_size = c.eval.batch_size = 8

    c.reward.judge.kind = "openai"  # [P] Qwen2.5-32B-Instruct, the default of judge.model; say where: judge.base_url
    return c
