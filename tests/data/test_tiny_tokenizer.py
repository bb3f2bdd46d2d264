"""The tokenizer trained at set-up: loads as the released ones do, and each word of the task is one token."""

import json

import numpy as np
import pytest
from helpers.internvl_folder import HF_TEMPLATE, Reference
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer
from transformers.models.qwen2 import Qwen2Tokenizer

from ril_jax.data import synthetic
from ril_jax.data.chat import ChatTokenizer
from ril_jax.data.families import INTERNVL, QWEN
from ril_jax.data.tiles import TileImageProcessor
from ril_jax.data.tiny_tokenizer import SPECIAL_TOKENS as SPECIAL_TOKENS_OF
from ril_jax.data.tiny_tokenizer import build_tokenizer
from ril_jax.errors import InputError

SPECIAL_TOKENS = SPECIAL_TOKENS_OF[QWEN]
TILES = TileImageProcessor(tile_size=28)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer(folder, synthetic.vocabulary_texts())
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def internvl_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("internvl_tokenizer")
    build_tokenizer(folder, synthetic.vocabulary_texts(), images=TILES)
    return folder


def responses(examples):
    """Every response that any manner gives to the examples, each once."""
    return {manner(example.scene, example.ask) for example in examples for manner in synthetic.STYLES.values()}


def test_each_word_of_every_question_and_response_is_one_token(tokenizer):
    examples = synthetic.BASE.draw(99, 3000, split="pretrain")
    for text in {e.ask.text for e in examples} | responses(examples):
        assert len(tokenizer(text)["input_ids"]) == len(text.replace("?", " ?").split(" ")), text


def test_no_response_is_longer_than_fourteen_tokens_with_its_end(tokenizer):
    drawn = synthetic.RIL.draw(5, 2000, split="ril") + synthetic.BASE.draw(5, 2000, split="pretrain")
    lengths = [len(tokenizer(text + "<|im_end|>")["input_ids"]) for text in responses(drawn)]
    assert max(lengths) <= 14


@pytest.mark.parametrize(
    "text",
    [
        "tally + . . - so two",
        "walk above b left a so red",
        "Don't SPLIT 'these, café cafe\u0301 12345  two  spaces \n\n newlines\t",
        "日本語 and 🙂🙂, ١٢٣",
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>x<|im_end|>",
    ],
)
def test_encoding_equals_the_qwen2_class_built_from_vocabulary_and_merges(folder, text):
    built = build_tokenizer(folder / "again", synthetic.vocabulary_texts())
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    reference = Qwen2Tokenizer(vocab=model["vocab"], merges=merges)
    reference.add_special_tokens({"additional_special_tokens": list(SPECIAL_TOKENS)})
    expected = reference.convert_ids_to_tokens(reference(text)["input_ids"])
    assert built.encode(text, add_special_tokens=False).tokens == expected


@pytest.mark.parametrize("text", ["so 3", "  leading, trailing  \n", "café 🙂 日本語", "tally + . so one"])
def test_any_text_survives_encoding_and_decoding(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_special_tokens_stand_last_and_are_single_tokens(tokenizer):
    ids = [tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS]
    assert ids == list(range(len(tokenizer) - len(SPECIAL_TOKENS), len(tokenizer)))
    assert tokenizer("".join(SPECIAL_TOKENS))["input_ids"] == ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == ""
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token == "<|endoftext|>"


def test_generation_config_names_end_and_pad(folder, tokenizer):
    config = json.loads((folder / "generation_config.json").read_text())
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in config["eos_token_id"]
    assert config["pad_token_id"] == tokenizer.pad_token_id


def test_chat_template_writes_system_turns_images_and_the_generation_prompt(tokenizer):
    messages = [
        {"role": "system", "content": "be short"},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": " how many rings? "}]},
        {"role": "assistant", "content": "so 2"},
        {"role": "user", "content": [{"type": "text", "text": "and\n"}, {"type": "image"}]},
    ]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt == (
        "<|im_start|>system\nbe short<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|> how many rings? <|im_end|>\n"
        "<|im_start|>assistant\nso 2<|im_end|>\n"
        "<|im_start|>user\nand\n<|vision_start|><|image_pad|><|vision_end|><|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    without = tokenizer.apply_chat_template(messages[1:2], tokenize=False)
    assert without == "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|> how many rings? <|im_end|>\n"


def test_the_image_processor_leaves_the_pictures_at_their_size(folder):
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    for example in synthetic.RIL.draw(0, 30, split="ril"):
        grid = processor(example.image, return_tensors="np")["image_grid_thw"]
        height, width = example.image.shape[:2]
        np.testing.assert_array_equal(grid, [[1, height // 14, width // 14]])


def test_a_vocabulary_too_small_for_the_words_is_refused(tmp_path):
    with pytest.raises(InputError, match="vocab_size 300 is too small"):
        build_tokenizer(tmp_path, synthetic.vocabulary_texts(), vocab_size=300)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- InternVL


def test_internvl_form_differs_in_special_tokens_alone(folder, internvl_folder):
    ours, qwen = (AutoTokenizer.from_pretrained(f) for f in (internvl_folder, folder))
    text = "how many red rings? so 3\n"
    assert ours(text)["input_ids"] == qwen(text)["input_ids"]
    special = SPECIAL_TOKENS_OF[INTERNVL]
    ids = [ours.convert_tokens_to_ids(token) for token in special]
    assert ids == list(range(len(ours) - len(special), len(ours)))
    assert ours("".join(special))["input_ids"] == ids
    assert ours.decode(ids, skip_special_tokens=True) == ""


def test_internvl_template_writes_what_the_released_one_writes(internvl_folder):
    tokenizer = AutoTokenizer.from_pretrained(internvl_folder)
    released = AutoTokenizer.from_pretrained(internvl_folder, chat_template=HF_TEMPLATE)
    for messages in (
        [{"role": "user", "content": "how many rings?"}],
        [
            {"role": "system", "content": "be short"},
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": " how many rings? "}]},
            {"role": "assistant", "content": "so 2"},
            {"role": "user", "content": [{"type": "text", "text": "and\n"}, {"type": "image"}, {"type": "video"}]},
        ],
    ):
        for add in (True, False):
            ours, theirs = (
                t.apply_chat_template(messages, tokenize=False, add_generation_prompt=add)
                for t in (tokenizer, released)
            )
            assert ours == theirs


def test_internvl_folder_is_read_by_internvl_processor_and_by_the_chat_alike(internvl_folder):
    hf = Reference(
        AutoImageProcessor.from_pretrained(internvl_folder, backend="pil"),
        AutoTokenizer.from_pretrained(internvl_folder),
        json.loads((internvl_folder / "processor_config.json").read_text())["image_seq_length"],
    )
    chat = ChatTokenizer.from_pretrained(internvl_folder)
    assert chat.image_processor == TILES
    for example in synthetic.RIL.draw(0, 20, split="ril"):
        image = Image.fromarray(example.image)
        messages = chat.messages(example.ask.text, 1, name="question")
        rendered = hf.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        out = hf(images=[image], text=[rendered], return_tensors="np")
        encoded = chat.encode_prompt(messages, [image], name="question")
        assert encoded.token_ids.tolist() == out["input_ids"][0].tolist()
        # Tiles of a cell each, unscaled, and the thumbnail.
        height, width = example.image.shape[:2]
        assert encoded.images[0].num_tokens == height * width // 28**2 + 1
        cells = example.image.reshape(height // 28, 28, width // 28, 28, 3).swapaxes(1, 2).reshape(-1, 28, 28, 3)
        pixels = encoded.images[0].source.reshape(-1, 2, 2, 3, 14, 14)
        np.testing.assert_array_equal(np.einsum("tijcpq->tipjqc", pixels).reshape(-1, 28, 28, 3)[:-1], cells)
