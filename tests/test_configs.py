"""Claims about the files in configs/: each is valid, holds the paper's values, and describes the released networks."""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh
from ml_collections import ConfigDict

from ril_jax import cli, paper, sharding
from ril_jax import config as config_lib
from ril_jax.errors import InputError
from ril_jax.models.config import ModelConfig
from ril_jax.models.parameters import Network
from ril_jax.pretrained import make_network
from ril_jax.rewards.judge import OpenAIJudge, make_judge
from ril_jax.sampling.local import engine_shapes
from ril_jax.training.batches import Buckets
from ril_jax.training.state import abstract_state, make_optimizer, split_frozen

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.py"))
JUDGE = "reward.judge.base_url=http://judge:8000/v1"
# What each names: the checkpoint of the hub, and the released sizes that it has.
STUDENTS = {
    "qwen3b": ("Qwen/Qwen2.5-VL-3B-Instruct", ModelConfig.qwen2_5_vl("3b")),
    "qwen7b": ("Qwen/Qwen2.5-VL-7B-Instruct", ModelConfig.qwen2_5_vl("7b")),
    "internvl1b": ("OpenGVLab/InternVL3-1B-hf", ModelConfig.internvl3("1b")),
    "internvl2b": ("OpenGVLab/InternVL3-2B-hf", ModelConfig.internvl3("2b")),
    "internvl8b": ("OpenGVLab/InternVL3-8B-hf", ModelConfig.internvl3("8b")),
}
SERVED = {
    "teacher_qwen72b": ("Qwen/Qwen2.5-VL-72B-Instruct", ModelConfig.qwen2_5_vl("72b")),
    "teacher_internvl78b": ("OpenGVLab/InternVL3-78B-hf", ModelConfig.internvl3("78b")),
    "judge_qwen32b": ("Qwen/Qwen2.5-32B-Instruct", ModelConfig.qwen2_5("32b")),
}
TEACHERS = {"qwen72b": SERVED["teacher_qwen72b"], "internvl78b": SERVED["teacher_internvl78b"]}
EVALUATED = {"evaluate"}
TRAINED = [path for path in CONFIGS if path.stem not in {*SERVED, *EVALUATED}]


def load(stem: str, *overrides: str, arg: str = "") -> ConfigDict:
    path = CONFIGS[0].parent / f"{stem}.py"
    return cli.load_config(f"{path}:{arg}" if arg else str(path), overrides)


def test_every_role_of_the_paper_has_its_config():
    assert {path.stem for path in CONFIGS} >= STUDENTS.keys() | SERVED.keys()


# --- students ---


@pytest.mark.parametrize("path", TRAINED, ids=lambda path: path.stem)
def test_config_is_valid_and_so_is_every_arm_of_it(path):
    config = cli.load_config(str(path), [JUDGE])
    config_lib.validate(config)
    for arm in [*config_lib.ARMS, *(f"teacher_{name}" for name in config.teachers)]:
        config_lib.validate(config_lib.arm_config(config, arm))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_has_no_field_that_the_defaults_lack(path):
    """Users' own names stand in `teachers`, and in `models` and `phases` of `prepare`; everything else is known."""
    known = dotted(config_lib.default_config() if path in TRAINED else config_lib.serving_config())
    free = ("teachers.", "prepare.models.")
    found = dotted(cli.load_config(str(path)))
    assert [name for name in found if name not in known and not name.startswith(free)] == []


@pytest.mark.parametrize("stem", STUDENTS)
def test_students_train_with_the_papers_values(stem):
    c = load(stem)
    s, ril, d, judge = c.sampling, c.ril, c.discriminator, c.reward.judge
    assert c.student.checkpoint == STUDENTS[stem][0]
    assert (s.temperature, s.top_p, s.top_k, s.repetition_penalty) == (1.0, 0.95, 50, 1.05)
    assert (ril.num_generations, ril.num_teacher_generations, ril.num_iterations) == (4, 4, 1)
    assert (ril.epsilon, ril.epsilon_high, ril.beta) == (0.2, None, 0.01)
    assert (ril.loss_type, ril.scale_rewards, ril.steps) == ("dr_grpo", "none", 1000)
    assert (ril.learning_rate, ril.final_learning_rate, d.ril_learning_rate) == (1e-6, 1e-6, 1e-6)
    for stage in (c.sft, d):
        assert (stage.learning_rate, stage.final_learning_rate) == (1e-5, 1e-6)
    assert (d.enabled, d.frozen, d.loss, d.context) == (True, False, "gail", "none")
    assert (c.reward.similarity, c.reward.similarity_weight, c.reward.answer_weight) == ("binary", 1.0, 1.0)
    assert (judge.kind, judge.model) == ("openai", "Qwen/Qwen2.5-32B-Instruct")
    assert c.collect.num_generations == 16
    assert ril.drop_truncated_teachers
    assert not ril.train_vision


def test_the_papers_values_stand_whatever_the_defaults_become(monkeypatch):
    def other() -> ConfigDict:
        """Another value in every field that the paper states."""
        c = default()
        c.sampling.update({"temperature": 0.5, "top_p": 0.5, "top_k": 5, "repetition_penalty": 1.5})
        for stage in (c.sft, c.discriminator, c.ril):
            stage.learning_rate = stage.final_learning_rate = 0.5
        c.discriminator.update({"ril_learning_rate": 0.5, "loss": "pairs", "context": "question"})
        c.reward.update({"similarity": "score", "similarity_weight": 0.5, "answer_weight": 0.5})
        c.reward.judge.update({"kind": "none", "model": ""})
        c.ril.update({"num_generations": 2, "num_teacher_generations": 2, "num_iterations": 2, "epsilon": 0.5})
        c.ril.update({"beta": 0.5, "loss_type": "grpo", "scale_rewards": "std", "drop_truncated_teachers": False})
        c.ril.steps = c.collect.num_generations = 2
        return c

    default = config_lib.default_config
    with monkeypatch.context() as patch:
        patch.setattr(paper, "default_config", other)
        changed = load("qwen3b")
    assert changed.to_dict() == load("qwen3b").to_dict()


@pytest.mark.parametrize("stem", STUDENTS)
@pytest.mark.parametrize("teachers", ["", "qwen72b", "internvl78b", "both"])
def test_teachers_are_those_of_the_paper(teachers, stem):
    c = load(stem, JUDGE, arg=teachers)
    config_lib.validate(c)
    same_family = "qwen72b" if stem.startswith("qwen") else "internvl78b"
    names = list(TEACHERS) if teachers == "both" else [teachers or same_family]
    assert {name: model.checkpoint for name, model in c.teachers.items()} == {n: TEACHERS[n][0] for n in names}
    assert c.ril.num_teacher_generations == 4


@pytest.mark.parametrize("stem", STUDENTS)
def test_cached_responses_stand_in_for_the_teacher(stem):
    config = load(stem, "data.teacher_data=data/teachers", JUDGE, arg="cached")
    config_lib.validate(config)
    assert not config.teachers
    for arms in ("ril", "dr_grpo"):  # the second needs no teacher itself, but the discriminator stage does
        with pytest.raises(InputError, match=r"needs responses of a teacher; name config\.data\.teacher_data"):
            config_lib.validate(load(stem, JUDGE, f"arms={arms}", arg="cached"))
    config_lib.validate(load(stem, JUDGE, "arms=dr_grpo,grpo", "stages=sft,ril", arg="cached"))
    with pytest.raises(InputError, match="'gpt' is not known; known are qwen72b, internvl78b, both, cached"):
        load(stem, arg="gpt")


@pytest.mark.parametrize("stem", STUDENTS)
def test_the_judges_address_is_all_that_its_settings_lack(stem):
    config = load(stem, JUDGE, "reward.judge.cache_path=")
    assert isinstance(make_judge(config.reward.judge), OpenAIJudge)
    with pytest.raises(InputError, match="base_url is empty"):  # before the first stage, not at the last one
        config_lib.validate(load(stem))
    config_lib.validate(load(stem, "stages=sft,collect"))


@pytest.mark.parametrize("teachers", ["qwen72b", "internvl78b", "both", "cached"])
@pytest.mark.parametrize("stem", STUDENTS)
def test_buckets_hold_the_largest_images_of_every_question(stem, teachers):
    """Of the student and of every teacher that is sampled: of a micro-batch, and of all that is sampled together."""
    c = load(stem, arg=teachers)
    assert max(c.data.response_buckets) == c.sampling.max_completion_length == 512
    models = [STUDENTS[stem][1], *(TEACHERS[name][1] for name in c.teachers)]
    for model in models:
        rungs = Buckets.from_config(model, c.data).rungs
        if model.family == "internvl":
            tiles = c.data.max_tiles + 1  # with the thumbnail
            tokens = tiles * model.vision.tile_tokens(448, 448)
        else:
            tokens = c.data.max_pixels // 28**2
            assert tokens == 512
        assert max(c.data.prompt_buckets) >= 2 * tokens + 256
        for questions in {1, c.sft.micro_batch_size, c.ril.micro_batch_size, c.collect.batch_size, c.eval.batch_size}:
            for images in {1, 2} if questions > 1 else {1}:
                n = images * questions
                assert any(
                    r.tiles >= n * tiles
                    if model.family == "internvl"
                    else r.patches >= 4 * tokens * n and r.images >= n and r.image_patches >= 4 * tokens
                    for r in rungs
                ), (questions, images)
    # Shapes are compiled: there are none that only a family could use that is not there.
    assert {len(rung) == 1 for rung in c.data.vision_rungs} == {model.family == "internvl" for model in models}


# --- what is trained and served, as shapes ---

MESH = AbstractMesh((1, 8, 2), ("data", "fsdp", "tensor"))


def on_mesh(network: Network, mesh: AbstractMesh, dtype) -> dict[str, jax.ShapeDtypeStruct]:
    where = sharding.param_shardings(network.specs, mesh)
    return {
        name: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=where[name])
        for name, p in network.abstract(dtype).items()
    }


def bytes_of(tree) -> tuple[int, int]:
    """Of all arrays, and of the part that one device holds."""
    leaves = jax.tree.leaves(tree)
    whole = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
    return whole, sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


@pytest.mark.parametrize("stem", STUDENTS)
def test_state_of_ril_keeps_moments_of_the_decoder_alone_and_lies_in_parts(stem):
    """Master weights and two moments of what is trained, the tower's weights besides: 12 and 4 bytes a parameter."""
    network, c = make_network(STUDENTS[stem][1]), load(stem)
    tower = sum(math.prod(spec.shape) for key, spec in network.specs.items() if key.startswith("vision."))
    trained, frozen = split_frozen(on_mesh(network, MESH, jnp.float32), train_vision=c.ril.train_vision)
    assert all(key.startswith("vision.") for key in frozen)
    state = abstract_state(trained, make_optimizer(c.ril), MESH)
    whole, part = bytes_of(state)
    assert 12 * (network.num_params - tower) <= whole <= 12 * (network.num_params - tower) + 100
    assert bytes_of(frozen)[0] == 4 * tower
    # 16 devices: what does not divide (odd vocabularies, two key-value heads, norms) takes some room on each.
    assert part < 1.35 * whole / 16


@pytest.mark.parametrize("stem", STUDENTS)
def test_discriminator_has_the_students_decoder_and_a_head_for_one_number(stem):
    model = STUDENTS[stem][1]
    network, student = make_network(model, head="scalar"), make_network(model)
    body = [name for name in student.specs if not name.startswith("vision.") and name != "text.lm_head"]
    assert set(body) | {"text.score.kernel", "text.score.bias"} <= set(network.specs)
    state = abstract_state(
        {k: p for k, p in on_mesh(network, MESH, jnp.float32).items() if not k.startswith("vision.")},
        make_optimizer(load(stem).discriminator), MESH,
    )  # fmt: skip
    size = sum(math.prod(student.specs[name].shape) for name in body) + model.text.hidden_size + 1
    assert 12 * size <= bytes_of(state)[0] <= 12 * size + 100


@pytest.mark.parametrize(
    ("stem", "chips", "memory"),
    [("teacher_qwen72b", 8, 32e9), ("teacher_internvl78b", 8, 32e9), ("judge_qwen32b", 8, 16e9)],
)
def test_served_models_fit_the_chips_that_their_configs_name(stem, chips, memory):
    """Weights and key-value cache of a chip on the config's mesh, with a tenth of the memory left for the work."""
    checkpoint, model = SERVED[stem]
    c, text = load(stem), model.text
    assert c.checkpoint == checkpoint
    assert f"For {chips} chips of {memory / 1e9:.0f} GB" in (CONFIGS[0].parent / f"{stem}.py").read_text()
    assert (c.mesh.data, c.mesh.fsdp) == (1, -1)
    mesh = AbstractMesh((1, chips // c.mesh.tensor, c.mesh.tensor), ("data", "fsdp", "tensor"))
    whole, part = bytes_of(on_mesh(make_network(model), mesh, jnp.dtype(c.dtype)))
    assert whole > 60e9
    assert text.num_key_value_heads % c.mesh.tensor == 0  # else every chip holds all of the cache
    shapes = engine_shapes(c.engine, max_positions=text.max_position_embeddings)
    heads = text.num_key_value_heads // c.mesh.tensor
    cache = 4 * text.num_hidden_layers * heads * text.head_dim * shapes.num_pages * shapes.page_size
    assert part + cache < 0.9 * memory
    # All slots can be taken by questions of the longest prompt, whose responses share its pages.
    samples = c.generate.num_generations if stem.startswith("teacher") else 1
    response = c.sampling.max_completion_length // shapes.page_size + 1
    prompt = -(-(shapes.max_model_len - c.sampling.max_completion_length) // shapes.page_size)
    assert shapes.num_pages > shapes.slots / samples * (prompt + samples * response)


@pytest.mark.parametrize("stem", SERVED)
def test_served_models_take_the_longest_prompt_of_a_student(stem):
    c = load(stem)
    model = SERVED[stem][1]
    image = {
        "qwen2_5_vl": c.max_pixels // 28**2,
        "internvl": (c.max_tiles + 1) * 256,
        "qwen2": 0,
    }[model.family]
    assert c.engine.max_model_len >= 2 * image + 256 + c.sampling.max_completion_length
    assert c.engine.feature_rows >= 8 * image
    if model.family != "qwen2":
        s = c.sampling
        assert (s.temperature, s.top_p, s.top_k, s.repetition_penalty) == (1.0, 0.95, 50, 1.05)
        assert s.max_completion_length == load("qwen3b").sampling.max_completion_length
        assert c.generate.num_generations == 16
        limits = load("internvl8b").data if model.family == "internvl" else load("qwen7b").data
        assert image == (limits.max_tiles + 1) * 256 or (c.min_pixels, c.max_pixels) == (
            limits.min_pixels,
            limits.max_pixels,
        )
    else:
        assert (c.sampling.temperature, c.server.model_name) == (0.0, load("qwen3b").reward.judge.model)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_no_field_is_hidden_behind_a_method_of_the_config(path):
    """ConfigDict gives its own methods first: a field named `update` or `keys` would always read as true."""
    names = {name.rpartition(".")[2] for name in dotted(cli.load_config(str(path)))}
    assert sorted(names & set(dir(ConfigDict))) == []


def dotted(config: ConfigDict, prefix: str = "") -> set[str]:
    names: set[str] = set()
    for key, value in config.items():
        names.add(prefix + key)
        if isinstance(value, ConfigDict):
            names |= dotted(value, f"{prefix}{key}.")
    return names
