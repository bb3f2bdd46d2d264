"""Claims about the files in configs/: each is valid, holds the paper's values, and describes the released networks."""

import math
from pathlib import Path

import jax
import pytest
from ml_collections import ConfigDict

from ril_jax import cli, sharding
from ril_jax import config as config_lib
from ril_jax.errors import InputError
from ril_jax.models.config import ModelConfig, QwenVisionConfig, TextConfig
from ril_jax.models.parameters import Network
from ril_jax.pretrained import make_network
from ril_jax.rewards.judge import OpenAIJudge, make_judge
from ril_jax.training.batches import Buckets
from ril_jax.training.state import abstract_state, make_optimizer, split_frozen

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.py"))
JUDGE = "reward.judge.base_url=http://judge:8000/v1"
QWEN = [path for path in CONFIGS if path.name.startswith("qwen")]


def released(*, text: tuple, vocab: int, tied: bool) -> ModelConfig:
    """A released Qwen2.5-VL by its published sizes (hidden, feed-forward, layers, heads, key-value heads)."""
    hidden, ff, layers, heads, kv_heads = text
    return ModelConfig(
        family="qwen2_5_vl",
        text=TextConfig(
            vocab_size=vocab, hidden_size=hidden, intermediate_size=ff, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=128, rms_norm_eps=1e-6,
            mrope_section=(16, 24, 24), tie_word_embeddings=tied, max_position_embeddings=128000,
        ),
        vision=QwenVisionConfig(
            depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, out_hidden_size=hidden,
            fullatt_block_indexes=(7, 15, 23, 31),
        ),
        image_token_id=151655, video_token_id=151656, vision_start_token_id=151652, vision_end_token_id=151653,
    )  # fmt: skip


RELEASED = {
    "qwen3b": (released(text=(2048, 11008, 36, 16, 2), vocab=151936, tied=True), 3.755e9, 0.669e9),
    "qwen7b": (released(text=(3584, 18944, 28, 28, 4), vocab=152064, tied=False), 8.292e9, 0.677e9),
}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_is_valid_and_so_is_every_arm_of_it(path):
    config = cli.load_config(str(path), [JUDGE])
    config_lib.validate(config)
    for arm in [*config_lib.ARMS, *(f"teacher_{name}" for name in config.teachers)]:
        config_lib.validate(config_lib.arm_config(config, arm))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_has_no_field_that_the_defaults_lack(path):
    """Users' own names stand in `teachers`, and in `models` and `phases` of `prepare`; everything else is known."""
    known = dotted(config_lib.default_config())
    free = ("teachers.", "prepare.models.")
    found = dotted(cli.load_config(str(path)))
    assert [name for name in found if name not in known and not name.startswith(free)] == []


@pytest.mark.parametrize("path", QWEN, ids=lambda path: path.stem)
def test_released_models_train_with_the_papers_values(path):
    c = cli.load_config(str(path))
    s, ril, d, judge = c.sampling, c.ril, c.discriminator, c.reward.judge
    assert (s.temperature, s.top_p, s.top_k, s.repetition_penalty) == (1.0, 0.95, 50, 1.05)
    assert (ril.num_generations, ril.num_teacher_generations, ril.num_iterations) == (4, 4, 1)
    assert (ril.epsilon, ril.epsilon_high, ril.beta) == (0.2, None, 0.01)
    assert (ril.loss_type, ril.scale_rewards) == ("dr_grpo", "none")
    assert (ril.learning_rate, ril.final_learning_rate, d.ril_learning_rate) == (1e-6, 1e-6, 1e-6)
    for stage in (c.sft, d):
        assert (stage.learning_rate, stage.final_learning_rate) == (1e-5, 1e-6)
    assert (d.enabled, d.frozen, d.loss, d.context) == (True, False, "gail", "none")
    assert (c.reward.similarity, c.reward.similarity_weight, c.reward.answer_weight) == ("binary", 1.0, 1.0)
    assert (judge.kind, judge.model) == ("openai", "Qwen/Qwen2.5-32B-Instruct")
    assert c.collect.num_generations == 16
    assert ril.drop_truncated_teachers
    assert not ril.train_vision
    assert [c.teachers[name].checkpoint for name in c.teachers] == ["Qwen/Qwen2.5-VL-72B-Instruct"]


@pytest.mark.parametrize("path", QWEN, ids=lambda path: path.stem)
def test_cached_responses_stand_in_for_the_teacher(path):
    config = cli.load_config(f"{path}:cached", ["data.teacher_data=data/teachers", JUDGE])
    config_lib.validate(config)
    assert not config.teachers
    for arms in ("ril", "dr_grpo"):  # the second needs no teacher itself, but the discriminator stage does
        with pytest.raises(InputError, match=r"needs responses of a teacher; name config\.data\.teacher_data"):
            config_lib.validate(cli.load_config(f"{path}:cached", [JUDGE, f"arms={arms}"]))
    config_lib.validate(cli.load_config(f"{path}:cached", [JUDGE, "arms=dr_grpo,grpo", "stages=sft,ril"]))
    with pytest.raises(InputError, match="'gpt' is not known"):
        cli.load_config(f"{path}:gpt")


@pytest.mark.parametrize("path", QWEN, ids=lambda path: path.stem)
def test_the_judges_address_is_all_that_its_settings_lack(path):
    config = cli.load_config(str(path), [JUDGE, "reward.judge.cache_path="])
    assert isinstance(make_judge(config.reward.judge), OpenAIJudge)
    with pytest.raises(InputError, match="base_url is empty"):  # before the first stage, not at the last one
        config_lib.validate(cli.load_config(str(path)))
    config_lib.validate(cli.load_config(str(path), ["stages=sft,collect"]))


@pytest.mark.parametrize("path", QWEN, ids=lambda path: path.stem)
def test_buckets_hold_the_largest_image_of_every_question(path):
    """What is on the device at a time: a micro-batch when training, a whole batch in collect and eval."""
    c = cli.load_config(str(path))
    tokens = c.data.max_pixels // 28**2
    assert tokens == 512
    assert max(c.data.prompt_buckets) >= 2 * tokens + 256
    assert max(c.data.response_buckets) == c.sampling.max_completion_length == 512
    rungs = Buckets.from_config(RELEASED[path.stem][0], c.data).rungs
    for questions in (c.sft.micro_batch_size, c.ril.micro_batch_size, c.collect.batch_size, c.eval.batch_size):
        assert any(
            r.patches >= 4 * tokens * questions and r.images >= questions and r.image_patches >= 4 * tokens
            for r in rungs
        )


@pytest.mark.parametrize("name", RELEASED)
def test_student_has_the_published_number_of_parameters(name):
    model, total, tower = RELEASED[name]
    network = make_network(model)
    assert network.num_params == pytest.approx(total, abs=0.5e6)  # published in units of a million
    assert tower_size(network) == pytest.approx(tower, abs=0.5e6)


@pytest.mark.parametrize("path", QWEN, ids=lambda path: path.stem)
def test_training_state_of_ril_keeps_moments_of_the_decoder_alone(path):
    """The state as shapes, without memory: two moments for every parameter that is trained, none for the tower."""
    network, c = make_network(RELEASED[path.stem][0]), cli.load_config(str(path))
    trained, frozen = split_frozen(network.abstract(), train_vision=c.ril.train_vision)
    state = abstract_state(trained, make_optimizer(c.ril), sharding.make_mesh(fsdp=1))
    trained_size = sum(math.prod(leaf.shape) for leaf in trained.values())
    opt_size = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state.opt))
    assert trained_size == network.num_params - tower_size(network)
    assert 2 * trained_size <= opt_size <= 2 * trained_size + 10
    assert frozen
    assert all(key.startswith("vision.") for key in frozen)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_no_field_is_hidden_behind_a_method_of_the_config(path):
    """ConfigDict gives its own methods first: a field named `update` or `keys` would always read as true."""
    names = {name.rpartition(".")[2] for name in dotted(cli.load_config(str(path)))}
    assert sorted(names & set(dir(ConfigDict))) == []


def tower_size(network: Network) -> int:
    return sum(math.prod(spec.shape) for key, spec in network.specs.items() if key.startswith("vision."))


def dotted(config: ConfigDict, prefix: str = "") -> set[str]:
    names: set[str] = set()
    for key, value in config.items():
        names.add(prefix + key)
        if isinstance(value, ConfigDict):
            names |= dotted(value, f"{prefix}{key}.")
    return names
