"""The paper's experiments as configs: its hyper-parameters, teachers and judge, which all of its students share.

A file in configs/ names the student and its batch. [P] marks what the paper states, [R] what we chose where it is
silent; docs/paper.md gives the reasons. The paper's values stand here whatever the defaults of ril_jax/config.py are.
"""

from ml_collections import ConfigDict

from ril_jax.config import add_teacher, default_config
from ril_jax.errors import InputError

TEACHERS = {"qwen72b": "Qwen/Qwen2.5-VL-72B-Instruct", "internvl78b": "OpenGVLab/InternVL3-78B-hf"}  # [P]
JUDGE = "Qwen/Qwen2.5-32B-Instruct"  # [P]
MAX_TILES = 6  # [R] of an image under InternVL, its thumbnail not counted; 256 tokens each
_QWEN_PROMPTS = (640, 1024, 1536)  # an image takes 32 to 512 tokens, its question a few hundred more
_TILE_PROMPTS = (640, 1280, 2304, 3840)  # an image of 6 tiles and its thumbnail takes 1792 tokens; the last is for two


def student_config(checkpoint: str, teachers: str, *, micro_batch: int, tensor: int = 1) -> ConfigDict:
    """The config of a student of the paper.

    Args:
      teachers: "qwen72b" or "internvl78b", which are sampled in this run before RIL; "both", half of a question's
        teacher responses each; "cached", whose responses are in config.data.teacher_data.
      micro_batch: questions that are on the devices at once in training; twice as many are sampled together.
      tensor: chips that share a layer's heads, where the machine has so many; weights lie whole on them for sampling.

    Raises InputError for other teachers.
    """
    names = {**{name: (name,) for name in TEACHERS}, "both": tuple(TEACHERS), "cached": ()}
    if teachers not in names:
        raise InputError(f"teacher {teachers!r} is not known; known are {', '.join(names)}")
    c = default_config()
    c.student.checkpoint = checkpoint
    for name in names[teachers]:
        add_teacher(c, name, TEACHERS[name])
    _set_what_the_paper_states(c)
    _set_shapes(c, micro_batch)
    c.mesh.tensor = tensor
    c.sampling.layout = "replicated"
    return c


def set_sampling(c: ConfigDict) -> None:
    """How the paper samples students and teachers: the fields of `c.sampling`."""
    c.sampling.temperature = 1.0  # [P]
    c.sampling.top_p = 0.95  # [P]
    c.sampling.top_k = 50  # [P]
    c.sampling.repetition_penalty = 1.05  # [P]
    c.sampling.max_completion_length = 512  # [R]


def _set_what_the_paper_states(c: ConfigDict) -> None:
    set_sampling(c)
    c.sft.learning_rate, c.sft.final_learning_rate = 1e-5, 1e-6  # [P] linear
    c.collect.num_generations = 16  # [P] responses a question, of the student and of each teacher

    d = c.discriminator
    d.learning_rate, d.final_learning_rate = 1e-5, 1e-6  # [P] linear, before RIL
    d.ril_learning_rate = 1e-6  # [P] constant, in RIL
    d.loss, d.context = "gail", "none"  # [P] Eq. 1, of the response alone

    c.reward.similarity = "binary"  # [P]
    c.reward.similarity_weight = c.reward.answer_weight = 1.0  # [P]
    c.reward.judge.kind, c.reward.judge.model = "openai", JUDGE  # [P] a model judges; say where: judge.base_url

    c.ril.steps = 1000  # [P] about
    c.ril.learning_rate = c.ril.final_learning_rate = 1e-6  # [P] constant
    c.ril.num_generations = c.ril.num_teacher_generations = 4  # [P] G; with two teachers 2 of each [R]
    c.ril.num_iterations = 1  # [P] mu
    c.ril.epsilon, c.ril.beta = 0.2, 0.01  # [P]
    c.ril.loss_type, c.ril.scale_rewards = "dr_grpo", "none"  # [P]
    c.ril.drop_truncated_teachers = True  # [P] overlong filtering


def _set_shapes(c: ConfigDict, micro_batch: int) -> None:
    m = micro_batch
    c.sft.micro_batch_size = c.discriminator.micro_batch_size = c.ril.micro_batch_size = m
    c.collect.batch_size = c.eval.batch_size = 2 * m
    c.data.max_tiles = MAX_TILES
    # The largest images of a question (where as many devices share a micro-batch), of a micro-batch, and of what is
    # sampled together; the last rung is for two images a question.
    of_patches = tuple((2048 * n, n, 2048) for n in (1, m, 2 * m, 4 * m))
    of_tiles = tuple(((MAX_TILES + 1) * n,) for n in (1, m, 2 * m, 4 * m))
    uses = {"InternVL" in model.checkpoint for model in (c.student, *c.teachers.values())}
    c.data.vision_rungs = (of_patches if False in uses else ()) + (of_tiles if True in uses else ())
    prompts = (_QWEN_PROMPTS if False in uses else ()) + (_TILE_PROMPTS if True in uses else ())
    c.data.prompt_buckets = tuple(sorted(set(prompts)))
