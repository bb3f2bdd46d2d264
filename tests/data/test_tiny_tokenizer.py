"""The tokenizer trained at set-up: loads as Qwen's classes do, and each word of the task is one token."""

import json

import numpy as np
import pytest
from transformers import AutoImageProcessor, AutoTokenizer
from transformers.models.qwen2 import Qwen2Tokenizer

from ril_jax.data import synthetic
from ril_jax.data.tiny_tokenizer import SPECIAL_TOKENS, build_tokenizer
from ril_jax.errors import InputError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer(folder, synthetic.vocabulary_texts())
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


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
