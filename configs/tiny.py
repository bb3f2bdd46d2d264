"""The embedded default: data, tokenizer, student and two teachers are drawn and trained here, in minutes on two cores.

    python -m ril_jax.train --config=configs/tiny.py --workdir=runs/tiny

The student answers tersely; teacher a marks cell after cell (good at counting and comparing), teacher b walks and reads
off (good at relations and charts). All are real Qwen2.5-VL networks, and reach RIL the way the 72B ones do: as HF
folders whose responses are collected offline.
"""

from ml_collections import ConfigDict

from ril_jax.config import add_teacher, default_config, made_model, phase

BATCH = 16  # questions a step everywhere, so that few programs are compiled


def get_config() -> ConfigDict:
    c = default_config()
    c.stages = "prepare,sft,collect,discriminator,ril"
    c.arms = "ril,dr_grpo,no_discriminator,frozen_discriminator"
    c.workers = 2
    c.xla_flags = "--xla_backend_optimization_level=1"  # halves the time to compile for a tenth of the speed

    c.prepare.num_sft, c.prepare.num_questions, c.prepare.num_eval = 2000, 1200, 1000
    c.prepare.models.student = _model(hidden_size=64, num_heads=4, num_kv_heads=2)
    c.prepare.models.student.phases.b_answer = _answer("BASE", steps=4000, manners=("tally", "path"))
    c.prepare.models.teacher = _model(hidden_size=80, num_heads=5, num_kv_heads=5)
    for name, mixture, steps in (("a", "TEACHER_A", 2200), ("b", "TEACHER_B", 1600)):
        teacher = c.prepare.models[f"teacher_{name}"] = made_model(base="teacher")
        teacher.phases.b_answer = _answer(mixture, steps=steps)
        add_teacher(c, name, "{workdir}/prepare/teacher_" + name, dtype="float32", remat="none")

    c.student.checkpoint = "{workdir}/prepare/student"
    c.student.dtype, c.student.remat, c.student.logprob_chunk = "float32", "none", 8192

    c.data.sft, c.data.questions, c.data.eval = (f"{{workdir}}/prepare/data/{n}" for n in ("sft", "questions", "eval"))
    c.data.min_pixels, c.data.max_pixels = 28 * 28, 112 * 112
    c.data.prompt_buckets, c.data.response_buckets = (32,), (14,)
    # Images of at most 48 patches, one window each: for a step, and for a batch of collect or evaluation.
    c.data.vision_rungs = (
        (BATCH * 40, BATCH, 48, BATCH, 48),
        (BATCH * 48, BATCH, 48, BATCH, 48),
        (4800, 100, 48, 100, 48),
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


def _model(**size) -> ConfigDict:
    """A network trained from nothing, which at first describes pictures only."""
    model = made_model(num_layers=2, rope_theta=100.0, intermediate_size=3 * size["hidden_size"], **size)
    manners = ("tally", "path")
    model.phases.a_describe = phase(
        "CAPTIONS", num_examples=6000, manners=manners, steps=400, final_learning_rate=3e-3, **_RATES
    )
    return model


def _answer(mixture: str, *, steps: int, manners: tuple[str, ...] = ()) -> ConfigDict:
    """Learning to work out answers."""
    return phase(mixture, num_examples=12000, manners=manners, steps=steps, final_learning_rate=3e-4, **_RATES)
