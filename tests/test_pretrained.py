"""A checkpoint in OpenGVLab's own form, opened and written again: the folder that comes out is transformers' in all."""

import json

import numpy as np
import pytest
import torch
from helpers import hf_internvl
from helpers.internvl_folder import build_internvl_folder
from PIL import Image
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoTokenizer, InternVLForConditionalGeneration

from ril_jax import sharding
from ril_jax.models.config import ModelConfig
from ril_jax.pretrained import Pretrained, save_folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """In transformers' form, with the image token of the folder's tokenizer."""
    folder = build_internvl_folder(tmp_path_factory.mktemp("tokenizer"))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return hf_internvl.save_internvl(
        tmp_path_factory.mktemp("internvl"),
        vision=hf_internvl.KIND_6B,
        text=dict(vocab_size=tokenizer.get_vocab_size() + 8),
        image_token_id=tokenizer.token_to_id("<IMG_CONTEXT>"),
    )


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    """The same in OpenGVLab's form."""
    folder = build_internvl_folder(tmp_path_factory.mktemp("opengvlab"), layout="opengvlab")
    config = hf_internvl.original_config(json.loads((tiny.folder / "config.json").read_text()))
    (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | config))
    tensors = hf_internvl.original_layout(load_file(tiny.folder / "model.safetensors"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def written(folder, tmp_path_factory):
    model = Pretrained.open(folder)
    out = tmp_path_factory.mktemp("written") / "hf"
    save_folder(out, model, model.load_params(sharding.make_mesh()))
    return out


def test_transformers_loads_what_is_written(tiny, written):
    loaded, info = InternVLForConditionalGeneration.from_pretrained(written, output_loading_info=True)
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info[problem], problem
    there = tiny.hf.state_dict()
    assert loaded.state_dict().keys() == there.keys()
    for name, tensor in loaded.state_dict().items():
        torch.testing.assert_close(tensor, there[name], rtol=0, atol=0, msg=name)
    tokenizer = AutoTokenizer.from_pretrained(written)
    assert loaded.config.image_token_id == tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    assert loaded.config.text_config.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert loaded.dtype == torch.float32


def test_we_read_the_same_model_and_prompts_from_it(folder, written):
    before, after = Pretrained.open(folder), Pretrained.open(written)
    assert ModelConfig.from_folder(written).image_token_id == before.chat.image_token_id
    assert after.config == before.config
    image = Image.effect_noise((150, 90), 64).convert("RGB")
    prompts = [
        chat.encode_prompt(chat.messages("<image>how many?", 1, name="a question"), [image], name="a question")
        for chat in (before.chat, after.chat)
    ]
    np.testing.assert_array_equal(*(prompt.token_ids for prompt in prompts))
    np.testing.assert_array_equal(*(prompt.images[0].patches for prompt in prompts))
