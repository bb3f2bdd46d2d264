"""What `python -m ril_jax.export` writes is what transformers loads, and it says the same tokens."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import small_run
from PIL import Image
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

import ril_jax
from ril_jax.data import synthetic
from ril_jax.errors import InputError
from ril_jax.export import export


@pytest.fixture(scope="module")
def exported(trained_workdir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "hf"
    command = [sys.executable, "-m", "ril_jax.export", f"--checkpoint={trained_workdir}", f"--output={folder}"]
    done = subprocess.run(
        [*command, "--dtype=float32"], capture_output=True, text=True, env=small_run.environment(), timeout=300
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_transformers_generates_the_same_tokens_from_an_export(exported):
    theirs, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(exported, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    theirs.eval()
    ours = ril_jax.load(exported, dtype="float32")
    for example in synthetic.RIL.draw(5, 6, split="test"):
        image = Image.fromarray(example.image)
        content = [{"type": "image", "image": image}, {"type": "text", "text": example.ask.text}]
        said = ours.generate([{"role": "user", "content": content}], max_tokens=12)[0].token_ids
        messages = ours.chat.messages(example.ask.text, 1, name="a question")
        prompt = ours.chat.encode_prompt(messages, [image], name="a question")
        ids = torch.tensor(prompt.token_ids)[None].long()
        theirs.model.rope_deltas = None  # stale from the call before
        with torch.no_grad():
            out = theirs.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                mm_token_type_ids=(ids == ours.chat.image_token_id).long(),
                pixel_values=torch.tensor(prompt.images[0].patches),
                image_grid_thw=torch.tensor([prompt.images[0].grid]),
                max_new_tokens=12,
                do_sample=False,
            )
        assert out[0, len(prompt.token_ids) :].tolist() == said


def test_an_export_keeps_the_tokenizer_and_the_template(exported, trained_workdir):
    trained = AutoTokenizer.from_pretrained(trained_workdir / "sft" / "model")
    there = AutoTokenizer.from_pretrained(exported)
    chat = [{"role": "user", "content": "how many rings?"}]
    assert there.get_vocab() == trained.get_vocab()
    assert there.apply_chat_template(chat, tokenize=False) == trained.apply_chat_template(chat, tokenize=False)


def test_bfloat16_is_the_default_and_rounds_the_weights(exported, trained_workdir, tmp_path):
    export(trained_workdir / "sft", tmp_path / "hf")
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "hf", dtype="auto")
    whole = Qwen2_5_VLForConditionalGeneration.from_pretrained(exported)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    for name, p in whole.named_parameters():
        np.testing.assert_array_equal(
            p.detach().bfloat16().float(), dict(model.named_parameters())[name].detach().float()
        )


def test_an_output_that_is_there_and_a_checkpoint_that_is_not_are_refused(exported, tmp_path):
    with pytest.raises(InputError, match="overwrite"):
        export(exported, exported)
    with pytest.raises(InputError, match="no such folder"):
        export(tmp_path / "nothing", tmp_path / "hf")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no model in it"):
        export(tmp_path / "empty", tmp_path / "hf")
