"""Claims about load, generate and score for InternVL3, from pictures to tokens, against transformers.

Both layouts of a checkpoint are opened: that of transformers, and OpenGVLab's own with the same weights.
"""

import json

import numpy as np
import pytest
import torch
from helpers import hf_internvl, hf_models
from helpers.internvl_folder import Reference, build_internvl_folder
from PIL import Image
from safetensors.numpy import load_file, save_file
from transformers import AutoImageProcessor, AutoTokenizer

import ril_jax

VOCAB, MAX_TOKENS = 496, 12
RESPONSE = "There are 12 red circles.\n"


def picture(height, width):
    rng = np.random.default_rng(height * 1000 + width)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


WIDE, SMALL = picture(60, 200), picture(57, 61)  # 3 + 1 tiles and 1 of 56 pixels


def user(*parts):
    return [{"role": "user", "content": list(parts)}]


def text(value):
    return {"type": "text", "text": value}


def image(value):
    return {"type": "image", "image": value}


CONVERSATIONS = [
    (user(text("How many are there?")), []),
    (user(image(WIDE), text("Which bar is higher?")), [WIDE]),
    (user(text("a "), image(SMALL), image(WIDE), text("b")), [SMALL, WIDE]),
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The folder in the layout of transformers, and the model that is in it."""
    folder = build_internvl_folder(tmp_path_factory.mktemp("internvl"))
    return hf_internvl.save_internvl(
        folder, text={"vocab_size": VOCAB}, vision=hf_internvl.KIND_6B,
        image_token_id=AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids("<IMG_CONTEXT>"),
    )  # fmt: skip


@pytest.fixture(scope="module")
def reference(tiny):
    images = AutoImageProcessor.from_pretrained(tiny.folder, backend="pil")
    return Reference(images, AutoTokenizer.from_pretrained(tiny.folder), 4)


@pytest.fixture(scope="module")
def model(tiny):
    return ril_jax.load(tiny.folder, dtype="float32")


def inputs(reference, messages, images):
    """What InternVLProcessor hands to the model."""
    rendered = reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    out = reference(images=images or None, text=[rendered], return_tensors="np")
    return {name: torch.tensor(value) for name, value in out.items()}


def logprobs(hf, given, ids):
    """Of `ids` after the prompt."""
    row = torch.cat([given["input_ids"], torch.tensor([ids])], dim=1)
    with torch.no_grad():
        logits = hf(**{**given, "input_ids": row, "attention_mask": torch.ones_like(row)}).logits[0, -len(ids) - 1 : -1]
    return torch.log_softmax(logits, dim=-1)[torch.arange(len(ids)), torch.tensor(ids)].numpy()


def test_scores_of_a_mixed_batch_equal_transformers(model, tiny, reference):
    scores = model.score([messages for messages, _ in CONVERSATIONS], [RESPONSE] * 3)
    ids = reference.tokenizer(RESPONSE)["input_ids"]
    for (messages, images), score in zip(CONVERSATIONS, scores, strict=True):
        assert score.token_ids == ids
        expected = logprobs(tiny.hf, inputs(reference, messages, images), ids)
        # float32 sums taken in another order, on log-probabilities of scale 10
        np.testing.assert_allclose(score.logprobs, expected, atol=5e-5, rtol=0)


def test_greedy_responses_equal_transformers_token_for_token(model, tiny, reference):
    responses = model.generate([messages for messages, _ in CONVERSATIONS], max_tokens=MAX_TOKENS)
    for (messages, images), (response,) in zip(CONVERSATIONS, responses, strict=True):
        given = inputs(reference, messages, images)
        with torch.no_grad():
            out = tiny.hf.generate(
                **given, max_new_tokens=MAX_TOKENS, do_sample=False, eos_token_id=list(model.chat.eos_token_ids),
                pad_token_id=hf_models.PAD, repetition_penalty=1.0,
                suppress_tokens=list(range(len(reference.tokenizer), VOCAB)),  # ids that the tokenizer does not know
            )  # fmt: skip
        assert response.token_ids == out[0, given["input_ids"].shape[1] :].tolist()


def test_opengvlab_layout_gives_the_same_scores(tiny, reference, tmp_path):
    folder = build_internvl_folder(tmp_path, layout="opengvlab")
    config = json.loads((tiny.folder / "config.json").read_text())
    tiling = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**tiling, **hf_internvl.original_config(config)}))
    save_file(hf_internvl.original_layout(load_file(tiny.folder / "model.safetensors")), folder / "model.safetensors")
    model = ril_jax.load(folder, dtype="float32", max_tiles=2)
    messages, images = CONVERSATIONS[2]
    prompt = model.chat.encode_prompt(messages, images, name="prompt").token_ids
    assert "InternVL" in model.chat.tokenizer.decode(prompt)  # of its own system message
    pixels = reference.image_processor(images, crop_to_patches=True, max_patches=2, return_tensors="pt")["pixel_values"]
    assert len(pixels) == 1 + 3
    given = {"input_ids": torch.tensor(prompt)[None].long(), "pixel_values": pixels}
    score = model.score(messages, RESPONSE)
    expected = logprobs(tiny.hf, given, score.token_ids)
    np.testing.assert_allclose(score.logprobs, expected, atol=5e-5, rtol=0)
