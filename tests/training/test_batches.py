"""Claims about ril_jax/training/batches.py: questions of both families become batches of few, known shapes."""

import dataclasses
import io
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from helpers.internvl_folder import build_internvl_folder
from PIL import Image

from ril_jax import sharding
from ril_jax.data.chat import ChatTokenizer
from ril_jax.data.packing import TileRung, VisionRung
from ril_jax.data.records import Question
from ril_jax.errors import InputError
from ril_jax.models.config import InternVisionConfig, ModelConfig, QwenVisionConfig, TextConfig
from ril_jax.training import batches
from ril_jax.training.batches import Buckets, PromptEncoder, flatten_micro

RUNGS = ((256, 8, 144), 4, (12,), [24], [1024, 8, 256, 64, 64])  # of both families, as configs and the command line


def png(height: int, width: int) -> bytes:
    rng = np.random.default_rng(height * 1000 + width)
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


WIDE, SMALL, TALL = png(60, 230), png(30, 31), png(170, 60)  # 4 + 1, 1 and 3 + 1 tiles of 56 pixels


def question(name: str, prompt: str, *images: bytes) -> Question:
    return Question(name, prompt, images, "3")


QUESTIONS = [
    question("two", "<image>\nand <image>: which is larger?", WIDE, SMALL),
    question("none", "How many are three?"),
    question("one", "How many?", TALL),
    question("same", "How many?", SMALL),
    question("text", "What is a circle?"),
]


@pytest.fixture(scope="module", params=["internvl", "qwen2_5_vl"])
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def chat(family, qwen_tokenizer_folder, tmp_path_factory) -> ChatTokenizer:
    if family == "internvl":
        return ChatTokenizer.from_pretrained(build_internvl_folder(tmp_path_factory.mktemp("internvl")))
    return ChatTokenizer.from_pretrained(qwen_tokenizer_folder, max_pixels=36 * 28 * 28)


@pytest.fixture(scope="module")
def model(family, chat) -> ModelConfig:
    text = TextConfig(
        vocab_size=chat.vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=16, rms_norm_eps=1e-6,
    )  # fmt: skip
    vision: InternVisionConfig | QwenVisionConfig
    if family == "internvl":
        vision = InternVisionConfig(
            16, 24, 1, 2, 32, norm="rms_norm", qkv_bias=False, qk_norm=True, image_size=(56, 56)
        )
    else:
        vision = QwenVisionConfig(1, 16, 24, 2, 32, fullatt_block_indexes=(0,))
    return ModelConfig(family, text, vision, image_token_id=chat.image_token_id)


@pytest.fixture(scope="module")
def buckets(model) -> Buckets:
    data = SimpleNamespace(vision_rungs=RUNGS, prompt_buckets=(96, 192), response_buckets=(8, 16))
    return Buckets.from_config(model, data)


@pytest.fixture(scope="module")
def prompts(chat):
    encoder = PromptEncoder(chat, max_length=192)
    return [encoder(q) for q in QUESTIONS]


def test_a_model_takes_the_rungs_of_its_family(buckets, family):
    if family == "internvl":
        assert buckets.rungs == (TileRung(4), TileRung(12), TileRung(24))
    else:
        assert buckets.rungs == (VisionRung(256, 8, 144), VisionRung(1024, 8, 256, 64, 64))


def test_rungs_of_the_other_family_alone_are_refused_and_none_at_all_are_not(model, family):
    other = ((256, 8, 144),) if family == "internvl" else ((12,),)
    fields = {"prompt_buckets": (96,), "response_buckets": (8,)}
    wanted = r"\(tiles,\) for InternVL" if family == "internvl" else r"\(patches, images.*Qwen2.5-VL"
    with pytest.raises(InputError, match=rf"config.data.vision_rungs has no rung of the form {wanted}"):
        Buckets.from_config(model, SimpleNamespace(vision_rungs=other, **fields))
    assert Buckets.from_config(model, SimpleNamespace(vision_rungs=(), **fields)).rungs == ()


def real_patches(prompt, vision) -> np.ndarray:
    """[features, patches of a feature] sums of pixels of each feature of a prompt's images, in placeholders' order."""
    sums = []
    for image in prompt.images:
        if isinstance(vision, QwenVisionConfig):
            sums.append(image.patches.reshape(-1, 4, vision.patch_dim).sum(-1))
        else:
            side = image.grid[1] // 2
            cut = image.patches.sum(-1).reshape(image.num_tiles, side, 2, side, 2)
            sums.append(np.einsum("tarbs->tabrs", cut).reshape(-1, 4))
    return np.concatenate(sums) if sums else np.zeros((0, 4), np.float32)


def buffer_patches(patches: np.ndarray, vision) -> np.ndarray:
    """The same of a buffer [X, C] or [T, n, C], in the order in which the tower gives its features."""
    if isinstance(vision, QwenVisionConfig):
        return patches.reshape(-1, 4, vision.patch_dim).sum(-1)
    side = int(patches.shape[1] ** 0.5) // 2
    cut = patches.sum(-1).reshape(len(patches), side, 2, side, 2)
    return np.einsum("tarbs->tabrs", cut).reshape(-1, 4)


@pytest.mark.parametrize("shards", [1, 2, 3])
@pytest.mark.parametrize("micro", [2, 3, 6])
def test_every_placeholder_of_every_micro_batch_finds_its_feature(micro, shards, buckets, prompts, model):
    """Rows with several images, one and none; the last micro-batch of two has none, and a buffer all the same."""
    buckets = dataclasses.replace(buckets, shards=shards)
    batch = buckets.pack_prompts(prompts, batch=6, micro=micro)
    num, groups = 6 // micro, shards if micro % shards == 0 else 1
    assert batch.token_ids.shape[:2] == (num, micro)
    assert batch.positions.shape[:3] == (num, 3, micro)
    assert batch.vision.patches.shape[:2] == (num, groups)
    for row, prompt in enumerate(prompts):
        m, b = divmod(row, micro)
        features = buffer_patches(batch.vision.patches[m, b // (micro // groups)], model.vision)
        index = batch.feature_index[m, b]
        np.testing.assert_array_equal(index >= 0, batch.token_ids[m, b] == model.image_token_id)
        np.testing.assert_array_equal(features[index[index >= 0]], real_patches(prompt, model.vision))
        whole = buckets.pack_prompts([prompt], batch=1)
        np.testing.assert_array_equal(batch.positions[m, :, b], whole.positions[0, :, 0])
    np.testing.assert_array_equal(batch.row_valid.reshape(-1), [True] * 5 + [False])


def test_flattened_micro_batches_are_the_whole_batch(buckets, prompts):
    whole = buckets.pack_prompts(prompts, batch=6)._replace(vision=None, feature_index=None)
    parts = flatten_micro(buckets.pack_prompts(prompts, batch=6, micro=2))._replace(feature_index=None)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[0] if a.shape[0] == 1 else a, b), whole, parts)


PARTS = [sharding.Part((0, 2), (0, 2)), sharding.Part((1,), (1,)), sharding.Part((1,), ())]  # two hold the same


@pytest.mark.parametrize("micro", [3, 6])
def test_processes_pack_their_parts_of_the_batch_of_one(micro, buckets, prompts, monkeypatch):
    """Into the same shapes, although one of them has no image, and one the longest prompt and response."""
    buckets = dataclasses.replace(buckets, shards=3)
    rng = np.random.default_rng(0)
    prompts = [*prompts, prompts[1]]
    responses = [[rng.integers(0, 9, size) for size in (int(rng.integers(1, 7)), 5)] for _ in prompts]
    responses[0][0] = rng.integers(0, 9, 20)  # beyond the longest bucket
    whole, answers, tokens = buckets.pack(prompts, responses, batch=6, micro=micro)
    assert tokens == answers.mask.sum()
    needs = {}
    places, owned = [], []
    for part in PARTS:  # first what each needs, then what it packs when it has heard of the others
        mine = dataclasses.replace(buckets, part=part)
        layout = mine.layout(6, micro)
        places.append(layout.positions)
        owned += layout.positions[layout.owned].tolist()
        own = [[items[i] for i in layout.positions] for items in (prompts, responses)]
        needs[part] = mine._needs_of_prompts(own[0], layout) | mine._needs_of_responses(own[1], layout)
    all_needs = list(needs.values())
    monkeypatch.setattr(batches.processes, "gather", lambda mine, _: all_needs)
    assert micro == 6 or [] in [need["rung"] for need in all_needs]
    assert sorted(owned) == list(range(6))
    for part, positions in zip(PARTS, places, strict=True):
        mine = dataclasses.replace(buckets, part=part)
        packed = mine.pack([prompts[i] for i in positions], [responses[i] for i in positions], batch=6, micro=micro)
        groups = micro // 3
        rows = np.concatenate([np.arange(g * groups, (g + 1) * groups) for g in part.held])
        expected = jax.tree.map(lambda leaf: leaf[:, rows], whole._replace(vision=None, positions=None))  # noqa: B023
        jax.tree.map(np.testing.assert_array_equal, packed[0]._replace(vision=None, positions=None), expected)
        np.testing.assert_array_equal(packed[0].positions, whole.positions[:, :, rows])
        images = jax.tree.map(lambda leaf: leaf[:, list(part.held)], whole.vision)  # noqa: B023
        jax.tree.map(np.testing.assert_array_equal, packed[0].vision, images)
        jax.tree.map(np.testing.assert_array_equal, packed[1], jax.tree.map(lambda leaf: leaf[:, rows], answers))  # noqa: B023
        assert packed[2] == tokens
        layout = mine.layout(6, micro)
        flat = flatten_micro(packed[0], layout.groups).token_ids
        np.testing.assert_array_equal(flat, layout.flat(packed[0].token_ids.reshape(-1, flat.shape[-1])))
        np.testing.assert_array_equal(layout.in_order(flat), packed[0].token_ids.reshape(flat.shape))


def test_a_batch_that_processes_cannot_share_is_refused(buckets):
    with pytest.raises(InputError, match=r"batch of 4 questions cannot be spread over 3 devices.*multiple of 3"):
        dataclasses.replace(buckets, shards=3, part=PARTS[0]).layout(4)


@pytest.mark.parametrize("tensor", [1, 2])
def test_every_share_of_a_batch_is_owned_by_one_process(tensor, monkeypatch):
    """Chips of a host need not be neighbours in the order of devices: on a v5e:4x4 they are 0, 1, 4 and 5."""
    hosts = np.array([0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 3, 3, 2, 2, 3, 3]).reshape(1, 16 // tensor, tensor)
    devices = np.vectorize(lambda host: SimpleNamespace(process_index=host), otypes=[object])(hosts)
    mesh = SimpleNamespace(devices=devices, shape={"data": 1, "fsdp": 16 // tensor, "tensor": tensor})
    monkeypatch.setattr(sharding.processes, "count", lambda: 4)
    parts = []
    for index in range(4):
        monkeypatch.setattr(sharding.processes, "index", lambda index=index: index)
        parts.append(sharding.part(mesh))
    assert parts[0].held == ((0, 1, 4, 5) if tensor == 1 else (0, 2))
    assert all(part.held == part.owned for part in parts)
    assert sorted(i for part in parts for i in part.owned) == list(range(16 // tensor))


def test_batch_of_text_alone_has_no_images(buckets, prompts):
    batch = buckets.pack_prompts([prompts[1], prompts[4]], batch=2, micro=1)
    assert batch.vision is None
    assert (batch.feature_index == -1).all()


def test_shapes_do_not_depend_on_the_sizes_of_images(buckets, chat):
    encoder = PromptEncoder(chat, max_length=192)
    shapes = set()
    for height, width in ((30, 31), (60, 170), (170, 60), (56, 56), (100, 100)):
        prompt = encoder(question(f"{height}x{width}", "How many?", png(height, width), SMALL))
        batch = buckets.pack_prompts([prompt], batch=1)
        shapes.add(tuple(leaf.shape for leaf in jax.tree.leaves(batch)))
    # Two rungs are small enough to be needed here, and one length of prompts.
    assert len(shapes) <= 2


def test_batch_over_every_rung_is_refused_with_the_mend(buckets, chat, family):
    encoder = PromptEncoder(chat, max_length=192)
    many = [encoder(question(f"q{i}", "How many?", WIDE, png(57, 300 + i))) for i in range(12)]
    limit = "max_tiles" if family == "internvl" else "max_pixels"
    with pytest.raises(InputError, match=rf"a batch has 24 images with .*config.data.vision_rungs.*{limit}"):
        buckets.pack_prompts(many, batch=12)


def test_encoder_names_the_question_and_keeps_what_it_encoded(chat):
    encoder = PromptEncoder(chat, max_length=192)
    first = encoder(QUESTIONS[0])
    assert encoder(QUESTIONS[0]) is first
    with pytest.raises(InputError, match="question bad, image 1: "):
        encoder(question("bad", "What?", SMALL, b"no image"))
    tight = PromptEncoder(chat, max_length=192, cache_bytes=first.images[0].nbytes)
    assert tight(QUESTIONS[0]) is not tight(QUESTIONS[0])  # larger than the cache: encoded each time


def test_too_long_prompt_is_refused_with_the_familys_limit(chat, family):
    limit = "max_tiles" if family == "internvl" else "max_pixels"
    with pytest.raises(InputError, match=rf"question two: .*smaller images \({limit}\)"):
        PromptEncoder(chat, max_length=24)(QUESTIONS[0])
