"""The embedded default: everything is drawn and trained here, in minutes on two cores.

python -m ril_jax.train --config=configs/tiny.py --workdir=runs/tiny
"""

from ml_collections import ConfigDict

from ril_jax.config import add_teacher, default_config, made_model, phase


def get_config() -> ConfigDict:
    c = default_config()
    c.stages = "prepare,sft,collect,discriminator,ril"
    c.arms = "dr_grpo,ril"

    c.prepare.models.student_base = made_model()
    c.prepare.models.student_base.phases.base = phase(
        "BASE", num_examples=6000, batch_size=32, steps=100, learning_rate=2e-3, final_learning_rate=2e-4
    )
    c.prepare.models.teacher_base = made_model(hidden_size=96, num_heads=6, intermediate_size=288)
    c.prepare.models.teacher_base.phases.base = phase(
        "BASE", num_examples=6000, batch_size=32, steps=100, learning_rate=2e-3, final_learning_rate=2e-4
    )
    for name, mixture in (("a", "TEACHER_A"), ("b", "TEACHER_B")):
        c.prepare.models[f"teacher_{name}"] = made_model(base="teacher_base")
        c.prepare.models[f"teacher_{name}"].phases.manner = phase(
            mixture, num_examples=2000, batch_size=32, steps=50, learning_rate=1e-3, final_learning_rate=1e-4
        )
        add_teacher(c, name, "{workdir}/prepare/teacher_" + name, dtype="float32", remat="none")

    c.student.checkpoint = "{workdir}/prepare/student_base"
    c.student.dtype, c.student.remat, c.student.logprob_chunk = "float32", "none", 4096

    c.data.sft, c.data.questions, c.data.eval = (f"{{workdir}}/prepare/data/{n}" for n in ("sft", "questions", "eval"))
    c.data.min_pixels, c.data.max_pixels = 28 * 28, 112 * 112
    c.data.prompt_buckets, c.data.response_buckets = (32,), (14,)
    # Images of at most 48 patches: one window each. The first rung is for a RIL step, the others for batches of 32 to 64.
    c.data.vision_rungs = ((16 * 40, 16, 48, 16, 48), (32 * 40, 32, 48, 32, 48), (64 * 40, 64, 48, 64, 48))

    c.sampling.max_completion_length = 14
    c.sampling.top_p, c.sampling.top_k, c.sampling.repetition_penalty = 1.0, 0, 1.0

    c.sft.update(dict(batch_size=32, steps=100, learning_rate=5e-4, final_learning_rate=5e-5))
    c.collect.batch_size = 64
    c.discriminator.update(dict(batch_size=16, steps=40, learning_rate=3e-4, final_learning_rate=3e-4))
    c.discriminator.ril_learning_rate = 3e-5
    c.discriminator.prompt_buckets = (96,)
    c.ril.update(dict(batch_size=16, steps=60, learning_rate=2e-4, final_learning_rate=2e-4))
    c.eval.every, c.eval.batch_size = 0, 64
    c.checkpoint.every = 100
    return c
