"""The embedded default in two families: an InternVL student, a Qwen2.5-VL teacher and an InternVL teacher.

    python -m ril_jax.train --config=configs/tiny_internvl.py --workdir=runs/tiny_internvl
    python -m ril_jax.train --config=configs/tiny_internvl.py:qwen --workdir=runs/tiny_mixed

The task is that of configs/tiny.py. To InternVL every cell of a picture is a tile, and so one token. What teachers say
reaches the student as text: each of the three models has a tokenizer of its own, in which words have other numbers.
"""

from ml_collections import ConfigDict

from ril_jax.config import add_teacher, default_config, made_model, phase
from ril_jax.errors import InputError

BATCH = 16  # questions a step everywhere, so that few programs are compiled
FAMILIES = {"internvl": "internvl", "qwen": "qwen2_5_vl"}


def get_config(student: str = "internvl") -> ConfigDict:
    """`internvl` or `qwen`: the student's family. The teachers are the same: a is Qwen2.5-VL, b is InternVL."""
    if student not in FAMILIES:
        raise InputError(f"student {student!r} is not known; known are internvl (the default) and qwen")
    c = default_config()
    c.stages = "prepare,sft,collect,discriminator,ril"
    c.arms = "ril,dr_grpo"
    c.workers = 2
    c.xla_flags = "--xla_backend_optimization_level=1"  # halves the time to compile for a tenth of the speed

    c.prepare.num_sft, c.prepare.num_questions, c.prepare.num_eval = 2000, 1200, 1000
    models = c.prepare.models
    models.student = _model(FAMILIES[student], vocabulary_seed=0, hidden_size=64, num_heads=4, num_kv_heads=2)
    models.student.phases.b_answer = _answer("BASE", steps=4000, manners=("tally", "path"))
    teachers = (
        ("a", "TEACHER_A", 2200, dict(family="qwen2_5_vl", vocabulary_seed=1)),
        ("b", "TEACHER_B", 1600, dict(family="internvl", vocabulary_seed=2, vision_kind="6b")),
    )
    for name, mixture, steps, kind in teachers:
        teacher = models[f"teacher_{name}"] = _model(hidden_size=80, num_heads=5, num_kv_heads=5, **kind)
        teacher.phases.b_answer = _answer(mixture, steps=steps)
        add_teacher(c, name, "{workdir}/prepare/teacher_" + name, dtype="float32", remat="none")

    c.student.checkpoint = "{workdir}/prepare/student"
    c.student.dtype, c.student.remat, c.student.logprob_chunk = "float32", "none", 8192

    c.data.sft, c.data.questions, c.data.eval = (f"{{workdir}}/prepare/data/{n}" for n in ("sft", "questions", "eval"))
    c.data.min_pixels, c.data.max_pixels = 28 * 28, 112 * 112
    c.data.prompt_buckets, c.data.response_buckets = (36,), (14,)
    # Qwen2.5-VL: images of at most 48 patches, one window each; InternVL: at most 12 tiles and a thumbnail. The first
    # of each hold a step in the mean, the second any step, the third a batch of collect or evaluation.
    c.data.vision_rungs = (
        (BATCH * 40, BATCH, 48, BATCH, 48),
        (BATCH * 48, BATCH, 48, BATCH, 48),
        (4800, 100, 48, 100, 48),
        (BATCH * 11,),
        (BATCH * 13,),
        (1300,),
    )
    c.data.threads = 2

    c.sampling.max_completion_length = 14
    c.sampling.top_p, c.sampling.top_k, c.sampling.repetition_penalty = 1.0, 0, 1.0  # 14 tokens repeat by design

    c.sft.update({"batch_size": BATCH, "steps": 250, "learning_rate": 1e-3, "final_learning_rate": 1e-4})
    c.collect.batch_size = 100
    c.discriminator.update({"batch_size": BATCH, "steps": 60, "learning_rate": 3e-4, "final_learning_rate": 3e-4})
    c.discriminator.ril_learning_rate = 5e-6  # slow, so that the student does not swing between manners in its wake
    c.discriminator.prompt_buckets = (64,)
    c.ril.update({"batch_size": BATCH, "steps": 400, "learning_rate": 3e-4, "final_learning_rate": 3e-5})
    c.eval.every, c.eval.batch_size = 100, 100
    c.checkpoint.every = 100
    return c


_RATES = {"warmup_steps": 30, "adam_b2": 0.98, "batch_size": BATCH, "learning_rate": 3e-3}


def _model(family: str, **fields) -> ConfigDict:
    """A network trained from nothing, which at first describes pictures only."""
    size = dict(num_layers=2, rope_theta=100.0, intermediate_size=3 * fields["hidden_size"])
    model = made_model(family=family, **size, **fields)
    manners = ("tally", "path")
    model.phases.a_describe = phase(
        "CAPTIONS", num_examples=6000, manners=manners, steps=400, final_learning_rate=3e-3, **_RATES
    )
    return model


def _answer(mixture: str, *, steps: int, manners: tuple[str, ...] = ()) -> ConfigDict:
    """Learning to work out answers."""
    return phase(mixture, num_examples=12000, manners=manners, steps=steps, final_learning_rate=3e-4, **_RATES)
