"""Qwen2.5-VL-3B as the student, with the paper's settings.

    python -m ril_jax.train --config=configs/qwen3b.py --workdir=runs/qwen3b \\
        --config.data.sft=data/sft --config.data.questions=data/questions --config.data.eval=data/eval \\
        --config.reward.judge.base_url=http://judge:8000/v1

`python -m ril_jax.data` makes the data sets (docs/data.md); the judge is any OpenAI-compatible endpoint that serves
Qwen2.5-32B-Instruct (docs/rewards.md). The collect stage samples the 72B teacher on the same devices, before RIL;
--config=configs/qwen3b.py:internvl78b samples the other family's, and :both the two of them. Where responses are
there already, :cached leaves it out, and --config.data.teacher_data=DIR names the data set that holds them. The
hyper-parameters with their sources stand in ril_jax/paper.py.
"""

from ml_collections import ConfigDict

from ril_jax.paper import student_config


def get_config(teacher: str = "qwen72b") -> ConfigDict:
    """`qwen72b`, `internvl78b` or `both` are sampled in this run; `cached`: their responses are there already."""
    return student_config("Qwen/Qwen2.5-VL-3B-Instruct", teacher, micro_batch=8, tensor=2)  # [P] the student
