"""Every field of a run with its default and its source; a config file starts from here and changes what it needs.

[P] marks a value that the paper states, [R] one that we chose where it is silent (docs/paper.md gives the reasons).
"""

import copy
from typing import Any

from ml_collections import ConfigDict, config_dict

from ril_jax.errors import InputError
from ril_jax.models import sizes

STAGES = ("prepare", "sft", "collect", "discriminator", "ril")


def default_config() -> ConfigDict:
    """The defaults; paths may contain {workdir}, which the run fills in."""
    c = ConfigDict()
    c.seed = 0
    c.stages = "sft,collect,discriminator,ril"  # what to run, in this order
    c.arms = "ril"  # variants of the ril stage, run one after the other: names of ARMS below, or teacher_<name>
    c.workers = 1  # processes side by side for made models and arms (CPU only); each gets its share of the cores
    c.xla_flags = ""  # added to XLA_FLAGS before the first computation
    c.allow_config_change = False  # go on in a workdir that was made with another config

    c.student = _model()
    c.teachers = ConfigDict()  # name -> _model(); use add_teacher

    c.prepare = ConfigDict()  # the embedded default's own stage; see training/prepare.py
    c.prepare.num_sft, c.prepare.num_questions, c.prepare.num_eval = 2000, 1200, 1000
    c.prepare.sft_mixture = "STUDENT_SFT"
    c.prepare.models = ConfigDict()

    c.data = ConfigDict()
    c.data.sft = ""  # data sets in TFDS form (python -m ril_jax.data writes them)
    c.data.questions = ""  # the RIL questions
    c.data.eval = ""  # held-out questions; "" for none
    c.data.teacher_data = ""  # responses of teachers collected before; "" takes those of the collect stage
    c.data.min_pixels = 32 * 28 * 28  # [R]
    c.data.max_pixels = 512 * 28 * 28  # [R]
    c.data.prompt_buckets = (
        256,
        512,
        1024,
    )  # padded prompt lengths, image tokens counted; longer prompts are cut or refused
    c.data.response_buckets = (128, 256, 512)  # padded response lengths when training
    c.data.max_tiles = 0  # of an image under InternVL, its thumbnail not counted; 0 for the checkpoint's own number
    # Shapes of the packed image buffer, per batch of questions: (patches in all, images, patches in the largest image)
    # for Qwen2.5-VL, (tiles,) for InternVL. A model takes those of its family.
    c.data.vision_rungs = ((16384, 144, 2048), (65536, 144, 2048), (294912, 288, 2048), (16,), (64,), (288,))
    c.data.prefetch = 2  # batches made ahead
    c.data.threads = 8  # that decode images and encode prompts

    c.sampling = ConfigDict()  # of the student in RIL, and of everyone in collect
    c.sampling.temperature = 1.0  # [P]
    c.sampling.top_p = 0.95  # [P]
    c.sampling.top_k = 50  # [P]
    c.sampling.repetition_penalty = 1.05  # [P]
    c.sampling.max_completion_length = 512  # [R]
    # Where the student's weights lie meanwhile: as in "training"; "replicated" over data and fsdp, to which they are
    # gathered once a step and not for every token; or with "tensor" parallelism over fsdp, too.
    c.sampling.layout = "training"
    c.sampling.backend = "batch"  # a batch of groups in one program, or "engine": responses leave when they end
    c.sampling.engine = engine_config()  # for "engine"
    c.sampling.engine.max_model_len = 0  # 0: the longest prompt bucket and max_completion_length

    c.sft = training(batch_size=128, steps=1000, learning_rate=1e-5, final_learning_rate=1e-6)  # lr [P], linear
    c.sft.train_vision = True  # the tower with its projector, which makes its features the decoder's
    c.sft.train_projector = False  # the projector alone, where train_vision is False
    c.sft.responses_per_question = 1  # so many of a question's responses are learned in one row that shares the prompt

    c.collect = ConfigDict()
    c.collect.num_generations = 16  # [P] per question and model
    c.collect.batch_size = 32  # questions sampled together
    c.collect.num_questions = 0  # the first so many of data.questions; 0 for all
    c.collect.layout = "training"  # of a teacher's weights, as sampling.layout of the student's
    c.collect.student = True  # collect the student's responses too (the discriminator is pre-trained on them)

    c.discriminator = training(batch_size=64, steps=300, learning_rate=1e-5, final_learning_rate=1e-6)  # lr [P]
    c.discriminator.enabled = True
    c.discriminator.frozen = False  # True freezes it after pre-training
    c.discriminator.ril_learning_rate = 1e-6  # [P], constant
    c.discriminator.loss = "gail"  # "gail" is Eq. 1; "pairs" is GAD's Bradley-Terry loss
    c.discriminator.context = "none"  # "none" [P]: the response only; "question"; "question_image"
    c.discriminator.prompt_buckets = (256, 640, 1024)

    c.reward = ConfigDict()
    c.reward.similarity = "binary"  # [P]; "continuous", "levels=k", or "score" (GAD's raw score)
    c.reward.similarity_weight = 1.0  # [P]
    c.reward.answer_weight = 1.0  # [P]; 0 drops the judge
    c.reward.judge = ConfigDict()
    c.reward.judge.kind = "rules"  # "rules", "openai", "engine" (a model in this process), or "none"
    c.reward.judge.base_url = ""  # of an OpenAI-compatible endpoint, for "openai": http://host:8000/v1
    c.reward.judge.model = "Qwen/Qwen2.5-32B-Instruct"  # [P]
    c.reward.judge.api_key_env = ""  # environment variable that holds the key
    c.reward.judge.concurrency = 64
    c.reward.judge.max_tokens = 256  # [R]
    c.reward.judge.checkpoint = ""  # of the judge, for "engine": a Hugging Face folder or a hub id
    c.reward.judge.dtype = "bfloat16"  # of the judge, for "engine"
    c.reward.judge.engine = engine_config()  # for "engine"
    c.reward.judge.engine.max_model_len = 2048  # instructions, question, solution, response, and the verdict
    c.reward.judge.connect_timeout = 10.0  # seconds
    c.reward.judge.read_timeout = 120.0
    c.reward.judge.max_wait = 120.0  # longest pause between two tries of an endpoint that does not answer
    c.reward.judge.cache_path = "{workdir}/judge_cache.jsonl"
    c.reward.judge.relative_tolerance = 1e-6  # of numbers, for "rules"
    c.reward.functions = ()  # dotted paths of users' own reward functions
    c.reward.function_weights = ()  # one each; 1.0 by default

    c.ril = training(
        batch_size=144, steps=1000, learning_rate=1e-6, final_learning_rate=1e-6
    )  # 144 [R], lr [P] constant
    c.ril.num_generations = 4  # [P] student responses a question
    c.ril.num_teacher_generations = 4  # [P] teacher responses a question, split evenly among the teachers [R]
    c.ril.num_iterations = 1  # [P] mu
    c.ril.epsilon = 0.2  # [P]
    c.ril.epsilon_high = config_dict.placeholder(float)  # None: the same as epsilon
    c.ril.beta = 0.01  # [P]
    c.ril.loss_type = "dr_grpo"  # [P] constant normaliser; "grpo": mean over each response's length
    c.ril.scale_rewards = "none"  # [P] "none" (Dr.GRPO) or "std" (GRPO)
    c.ril.mask_truncated_completions = False
    c.ril.drop_truncated_teachers = True  # [P] overlong filtering
    c.ril.train_vision = False  # [R] the vision tower is frozen in RIL, and its projector with it
    c.ril.train_projector = False  # True: the projector alone is not
    c.ril.samples_every = 50  # steps between sample tables
    c.ril.samples_count = 4  # questions in one

    c.eval = ConfigDict()
    c.eval.every = 100  # RIL steps; 0 for only before and after
    c.eval.num_questions = 0  # 0 for all
    c.eval.batch_size = 64
    c.eval.sft_every = 0  # SFT steps; 0 for never
    c.eval.keep_best = True  # the model that did best stays in workdir/<stage>/best

    c.mesh = ConfigDict()
    c.mesh.data = 1
    c.mesh.fsdp = -1  # -1: all that is left
    c.mesh.tensor = 1
    c.attention = "auto"  # "auto": Pallas kernels on TPUs, plain XLA elsewhere; "xla" or "pallas" everywhere

    c.checkpoint = ConfigDict()
    c.checkpoint.every = 50  # steps
    c.checkpoint.keep = 2

    c.logging = ConfigDict()
    c.logging.tensorboard = True
    c.logging.wandb = ""  # a project name turns it on
    c.logging.compile_cache = True
    return c


def serving_config() -> ConfigDict:
    """The defaults of `ril_jax.serve`, `ril_jax.generate` and `ril_jax.evaluate`: one model in the sampling engine."""
    c = ConfigDict()
    c.checkpoint = ""  # a Hugging Face folder or a hub id
    c.dtype = "bfloat16"
    c.mesh = ConfigDict({"data": 1, "fsdp": 1, "tensor": -1})
    c.attention = "auto"  # "auto": Pallas kernels on TPUs, plain XLA elsewhere; "xla" or "pallas" everywhere
    c.min_pixels, c.max_pixels, c.max_tiles = 0, 0, 0  # of an image; 0 for the checkpoint's own
    c.seed = 0
    c.engine = engine_config()

    c.sampling = ConfigDict()  # of the offline job; of the server under server.default_sampling = "config"
    c.sampling.temperature = 1.0  # [P], as the next three
    c.sampling.top_p = 0.95
    c.sampling.top_k = 50
    c.sampling.repetition_penalty = 1.05
    c.sampling.max_completion_length = 512  # [R]

    c.server = ConfigDict()
    c.server.host = "127.0.0.1"
    c.server.port = 8000
    c.server.model_name = ""  # what clients call the model; "" for the checkpoint's name
    c.server.api_key_env = ""  # environment variable with the key that clients must send; "" for none
    c.server.default_sampling = "openai"  # where a request does not say: plain sampling, or "config": config.sampling
    c.server.max_queue = 1024  # requests that wait; beyond it 429 with Retry-After
    c.server.timeout = 600.0  # seconds for a request, waiting included
    c.server.max_body_bytes = 64 * 2**20
    c.server.max_images = 32  # of a request
    c.server.max_image_pixels = 64_000_000  # of an image before it is resized
    c.server.max_n = 128
    c.server.allowed_image_hosts = ()  # hosts from which image URLs are fetched; none by default, and never files
    c.server.shutdown_grace = 60.0  # seconds that running requests get to finish
    c.server.threads = 8  # that decode images and tokenize prompts

    c.generate = ConfigDict()
    c.generate.num_generations = 16  # [P] responses a question
    c.generate.model_name = ""  # what the responses are filed under; "" for the checkpoint's name
    c.generate.base_url = ""  # an OpenAI-compatible endpoint that samples instead of a local engine
    c.generate.endpoint_model = ""  # which of its models; "" for its only one
    c.generate.api_key_env = ""
    c.generate.concurrency = 64  # questions with the local engine, or requests with the endpoint, at a time
    c.generate.connect_timeout = 10.0  # seconds, of the endpoint; so are the next two
    c.generate.read_timeout = 600.0  # for a whole response
    c.generate.max_wait = 120.0  # longest pause between two tries
    c.generate.retries = 8  # failures of a request, with others answered in between, before its question has failed
    c.generate.threads = 8  # that decode images and tokenize prompts
    c.generate.questions_per_shard = 256  # of an output file, which appears when it is whole

    c.evaluate = ConfigDict()  # benchmarks; how an endpoint is asked stands in `generate`
    c.evaluate.temperature = 0.0  # greedy
    c.evaluate.top_p = 1.0
    c.evaluate.top_k = 0
    c.evaluate.repetition_penalty = 1.0
    c.evaluate.max_tokens = 1024  # of a response
    c.evaluate.bootstrap = 1000  # draws for the 95 % intervals
    c.evaluate.judge = ConfigDict()  # matches, extracts and grades where a benchmark's rule leaves it to a model
    c.evaluate.judge.kind = "none"  # "openai" (an endpoint), "engine" (a model in this process), or "none"
    c.evaluate.judge.base_url = ""  # for "openai"
    c.evaluate.judge.model = ""  # for "openai": which of its models, "" for its only one; its name in the results
    c.evaluate.judge.api_key_env = ""  # for "openai"
    c.evaluate.judge.checkpoint = ""  # for "engine", with the shapes of `engine`
    c.evaluate.judge.dtype = "bfloat16"  # for "engine"
    c.evaluate.judge.max_tokens = 64  # of a reply
    return c


def engine_config() -> ConfigDict:
    """The shapes of the sampling engine (sampling/engine_programs.py); they decide memory and what is compiled."""
    c = ConfigDict()
    c.slots = 64  # responses that are decoded at once
    c.small_slots = 0  # a decode program for so many, one for four times as many ...: quicker for few; 0 for none
    c.max_model_len = 4096  # tokens of prompt and response together
    c.page_size = 64  # tokens a page of the key-value cache
    c.num_pages = 0  # of the cache; 0 for as many as all slots can fill
    c.prefill = (
        (128, 8),
        (512, 2),
    )  # (tokens, rows) of each prefill program; a prompt is cut into pieces of the most tokens, each a row of a call
    c.decode_steps = 8  # tokens that are drawn between two looks of the host
    c.attention_block = 256  # tokens that attention reads at a time
    c.feature_rows = 16384  # image features kept on the device; an image may take as many
    return c


def training(*, batch_size: int, steps: int, learning_rate: float, final_learning_rate: float) -> ConfigDict:
    """The fields that every stage with an optimiser has. batch_size counts questions a step."""
    c = ConfigDict()
    c.batch_size = batch_size
    c.micro_batch_size = 0  # questions at a time on the device; 0 for the whole batch
    c.steps = steps
    c.learning_rate = learning_rate
    c.final_learning_rate = final_learning_rate  # reached linearly
    c.warmup_steps = 0
    c.weight_decay = 0.0  # [R]
    c.max_grad_norm = 1.0  # [R]
    c.adam_b1 = 0.9
    c.adam_b2 = 0.999
    return c


def _model() -> ConfigDict:
    c = ConfigDict()
    c.checkpoint = ""  # HF folder or hub id
    c.dtype = "bfloat16"  # compute [R]; master weights and moments are float32
    c.remat = "full"  # "none", "full" or "dots": what the backward pass keeps
    c.logprob_chunk = 1024  # tokens whose [V] logits stand at the same time
    return c


def add_teacher(config: ConfigDict, name: str, checkpoint: str, **fields: Any) -> None:
    """Add a teacher of that name to a config."""
    config.teachers[name] = _model()
    config.teachers[name].checkpoint = checkpoint
    for field, value in fields.items():
        config.teachers[name][field] = value


def made_model(**fields: Any) -> ConfigDict:
    """One model of config.prepare.models, made in the workdir by the prepare stage.

    `base`: name of the model that it goes on from, "" for a new one. `family`: "qwen2_5_vl" or "internvl".
    `phases`: name -> what it learns, in order: the fields of `training` and `mixture` (a name in data/synthetic.py),
    `num_examples`, `split`.
    """
    c = ConfigDict()
    c.base = ""
    c.family = "qwen2_5_vl"
    c.vocabulary_seed = 0  # of the texts that its tokenizer is trained on; another one numbers the words differently
    c.hidden_size, c.num_layers, c.num_heads, c.num_kv_heads, c.intermediate_size = 64, 3, 4, 2, 192
    c.vision_hidden_size, c.vision_depth, c.vision_heads, c.vision_intermediate_size = 48, 2, 3, 144
    c.vision_kind = "300m"  # which InternViT an InternVL has: "300m", or "6b" with its other norms
    c.rope_theta = 10000.0
    c.phases = ConfigDict()
    c.update(fields)
    return c


def phase(
    mixture: str, *, num_examples: int, manners: tuple[str, ...] = (), split: str = "pretrain", **fields: Any
) -> ConfigDict:
    """One phase of a made model: its responses are in all of `manners`, or in those that the mixture draws."""
    settings = {name: fields.pop(name) for name in ("warmup_steps", "adam_b2") if name in fields}
    c = training(**fields)
    c.update(settings)
    c.train_vision, c.train_projector = True, False
    c.mixture, c.num_examples, c.split, c.manners = mixture, num_examples, split, manners
    c.responses_per_question = max(len(manners), 1)
    return c


# The paper's baselines and ablations as changes of the config, by name.
ARMS: dict[str, dict[str, Any]] = {
    "ril": {},
    "dr_grpo": {"ril.num_teacher_generations": 0, "discriminator.enabled": False},
    "grpo": {
        "ril.num_teacher_generations": 0,
        "discriminator.enabled": False,
        "ril.loss_type": "grpo",
        "ril.scale_rewards": "std",
    },
    "no_discriminator": {"discriminator.enabled": False},
    "frozen_discriminator": {"discriminator.frozen": True},
    "no_answer_reward": {"reward.answer_weight": 0.0},
    "no_teacher_rows": {"ril.num_teacher_generations": 0},
    "gad": {"discriminator.loss": "pairs", "reward.similarity": "score", "reward.answer_weight": 0.0},
}


def arm_config(config: ConfigDict, arm: str) -> ConfigDict:
    """The config of one arm. Raises InputError for an unknown name."""
    changed = ConfigDict(copy.deepcopy(config.to_dict()))
    if arm.startswith("teacher_") and arm.removeprefix("teacher_") in config.teachers:
        name = arm.removeprefix("teacher_")
        changed.teachers = ConfigDict({name: changed.teachers[name]})
        return changed
    if arm not in ARMS:
        teachers = [f"teacher_{name}" for name in config.teachers]
        raise InputError(f"config.arms: {arm!r} is not known; known are {', '.join([*ARMS, *teachers])}")
    for field, value in ARMS[arm].items():
        section, _, leaf = field.partition(".")
        changed[section][leaf] = value
    return changed


def validate(config: ConfigDict) -> None:
    """Check what no single stage can: names, choices, numbers. Raises InputError that names the field and the mend."""
    for stage in stages(config):
        if stage not in STAGES:
            raise InputError(f"config.stages: {stage!r} is not known; known are {', '.join(STAGES)}")
    _choice(config, "discriminator.context", ("none", "question", "question_image"))
    _choice(config, "discriminator.loss", ("gail", "pairs"))
    _choice(config, "ril.loss_type", ("dr_grpo", "grpo"))
    _choice(config, "ril.scale_rewards", ("none", "std"))
    _choice(config, "reward.judge.kind", ("rules", "openai", "engine", "none"))
    _choice(config, "student.dtype", ("bfloat16", "float32"))
    _choice(config, "sampling.layout", ("training", "replicated", "tensor"))
    _choice(config, "collect.layout", ("training", "replicated", "tensor"))
    _choice(config, "sampling.backend", ("batch", "engine"))
    _choice(config, "attention", ("auto", "xla", "pallas"))
    _validate_rungs(config)
    for model in ("student", *(f"teachers.{name}" for name in config.teachers)):
        _choice(config, f"{model}.remat", ("none", "full", "dots"))
    for name in config.prepare.models:
        _choice(config, f"prepare.models.{name}.family", ("qwen2_5_vl", "internvl"))
        _choice(config, f"prepare.models.{name}.vision_kind", tuple(sizes.INTERN_VIT))
    for stage in ("sft", "discriminator", "ril"):
        batch, micro = config[stage].batch_size, config[stage].micro_batch_size
        if batch <= 0 or micro < 0 or (micro and batch % micro):
            raise InputError(f"config.{stage}.micro_batch_size={micro} must divide config.{stage}.batch_size={batch}")
    if config.ril.num_generations + config.ril.num_teacher_generations < 2:
        raise InputError("config.ril.num_generations: a group needs at least two responses")
    if config.teachers and config.ril.num_teacher_generations % len(config.teachers):
        raise InputError(
            f"config.ril.num_teacher_generations={config.ril.num_teacher_generations} does not split evenly among "
            f"{len(config.teachers)} teachers"
        )
    for arm in arms(config):
        _validate_arm(arm, arm_config(config, arm), stages(config))


def _validate_rungs(config: ConfigDict) -> None:
    """The shapes of data.vision_rungs, for either family, and the limits of an image."""
    for field, least in (("min_pixels", 1), ("max_pixels", 1), ("max_tiles", 0)):
        value = config.data[field]
        if value is not None and (not isinstance(value, int) or value < least):
            raise InputError(f"config.data.{field}={value!r} must be a whole number of at least {least}")
    for i, rung in enumerate(config.data.vision_rungs):
        sizes = list(rung) if isinstance(rung, list | tuple) else [rung]
        where = f"config.data.vision_rungs[{i}]={rung!r}"
        whole = all(isinstance(size, int) and not isinstance(size, bool) for size in sizes)
        if not whole or len(sizes) not in (1, 3, 4, 5) or min(sizes[:3]) < 1 or min(sizes) < 0:
            raise InputError(
                f"{where} must be whole numbers: (tiles,) for InternVL, or for Qwen2.5-VL (patches, images, patches in "
                "the largest image) and perhaps windows, patches in a window"
            )
        if len(sizes) > 1 and (sizes[0] % 4 or sizes[2] % 4):
            raise InputError(f"{where}: numbers of patches must be multiples of 4, the patches of a token")


def _validate_arm(arm: str, config: ConfigDict, stages: list[str]) -> None:
    """What would end an arm only after hours of stages before it."""
    wants = ["config.stages: 'discriminator'"] if "discriminator" in stages else []
    if "ril" in stages and (config.ril.num_teacher_generations or config.discriminator.enabled):
        wants.append(f"config.arms: {arm!r}")
    if wants and not config.teachers and not config.data.teacher_data:
        raise InputError(
            f"{wants[-1]} needs responses of a teacher; name config.data.teacher_data, or add one with add_teacher"
        )
    judge = config.reward.judge
    if "ril" in stages and judge.kind == "engine" and config.reward.answer_weight and not judge.checkpoint:
        raise InputError(
            "config.reward.judge.checkpoint is empty; name the judge's Hugging Face folder or hub id, or set "
            "config.reward.judge.kind=rules"
        )
    if "ril" in stages and judge.kind == "openai" and config.reward.answer_weight and not judge.base_url:
        raise InputError(
            "config.reward.judge.base_url is empty; name the judge's endpoint, such as http://host:8000/v1, or set "
            "config.reward.judge.kind=rules"
        )


def stages(config: ConfigDict) -> list[str]:
    return [part.strip() for part in config.stages.split(",") if part.strip()]


def arms(config: ConfigDict) -> list[str]:
    return [part.strip() for part in config.arms.split(",") if part.strip()]


def _choice(config: ConfigDict, field: str, known: tuple[str, ...]) -> None:
    value: Any = config
    for part in field.split("."):
        value = value[part]
    if value not in known:
        raise InputError(f"config.{field}={value!r} is not known; use one of {', '.join(known)}")
