"""InternVL3-8B as the student, with the paper's settings.

    python -m ril_jax.train --config=configs/internvl8b.py --workdir=runs/internvl8b \\
        --config.data.sft=data/sft --config.data.questions=data/questions --config.data.eval=data/eval \\
        --config.reward.judge.base_url=http://judge:8000/v1

`python -m ril_jax.data` makes the data sets (docs/data.md); the judge is any OpenAI-compatible endpoint that serves
Qwen2.5-32B-Instruct (docs/rewards.md). The collect stage samples the 78B teacher on the same devices, before RIL;
--config=configs/internvl8b.py:qwen72b samples the other family's, and :both the two of them. Where responses are
there already, :cached leaves it out, and --config.data.teacher_data=DIR names the data set that holds them. The
hyper-parameters with their sources stand in ril_jax/paper.py.
"""

from ml_collections import ConfigDict

from ril_jax.paper import student_config


def get_config(teacher: str = "internvl78b") -> ConfigDict:
    """`qwen72b`, `internvl78b` or `both` are sampled in this run; `cached`: their responses are there already."""
    return student_config("OpenGVLab/InternVL3-8B-hf", teacher, micro_batch=4, tensor=4)  # [P] the student
