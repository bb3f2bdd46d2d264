"""What `python -m ril_jax.export` writes is what transformers loads, and it says the same tokens."""

import errno
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import hf_models, small_run
from helpers.tokenizer_folder import build_tokenizer_folder
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

import ril_jax
from ril_jax.data import synthetic
from ril_jax.errors import InputError
from ril_jax.export import export
from ril_jax.models import tensor_files
from ril_jax.models.config import ModelConfig


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
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("keep me")
    with pytest.raises(InputError, match="not a model folder, so --overwrite does not replace it"):
        export(exported, tmp_path / "notes", overwrite=True)


# --- of a checkpoint as it comes from the hub ---

CARRIED = {
    "added_tokens.json": "{}",
    "special_tokens_map.json": '{"eos_token":   "<|im_end|>"}',  # spacing of its own
    "merges.txt": "#version: 0.2\n",
    "vocab.json": "{}",
    "video_preprocessor_config.json": '{"fps": 2.0}',
    "LICENSE": "as it was",
}


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A small Qwen2.5-VL with the files of a released one, a flat config.json in bfloat16, and what is not its own."""
    folder = build_tokenizer_folder(tmp_path_factory.mktemp("released"), template_file="chat_template.json")
    tiny = hf_models.save_qwen2_5_vl(tmp_path_factory.mktemp("model"), text=dict(vocab_size=640))
    raw = json.loads((tiny.folder / "config.json").read_text())
    text = raw.pop("text_config")
    rope = text.pop("rope_parameters")
    flat = {**text, **raw, "torch_dtype": "bfloat16", "rope_theta": rope["rope_theta"]}
    flat["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    (folder / "config.json").write_text(json.dumps(flat))
    assert ModelConfig.from_folder(folder) == tiny.config
    (folder / "model.safetensors").write_bytes((tiny.folder / "model.safetensors").read_bytes())
    for name, content in CARRIED.items():
        (folder / name).write_text(content)
    (folder / "optimizer.pt").write_bytes(b"of another program")
    return folder


def test_tokenizer_processor_and_licence_are_carried_over_byte_for_byte(released, tmp_path):
    export(released, tmp_path / "hf", dtype="float32")
    there, here = ({path.name: path.read_bytes() for path in f.iterdir()} for f in (released, tmp_path / "hf"))
    assert there.keys() - here.keys() == {"optimizer.pt"}
    assert here.keys() <= there.keys()
    assert CARRIED.keys() | {"tokenizer.json", "chat_template.json", "preprocessor_config.json"} <= here.keys()
    assert {name for name in here if here[name] != there[name]} <= {"config.json", "model.safetensors"}


def test_the_config_keeps_its_spelling_and_tells_the_dtype(released, tmp_path):
    export(released, tmp_path / "hf", dtype="float32")
    there, here = (json.loads((f / "config.json").read_text()) for f in (released, tmp_path / "hf"))
    assert "text_config" not in here
    assert here == there | {"torch_dtype": "float32", "dtype": "float32", "vision_config": here["vision_config"]}
    assert there["torch_dtype"] == "bfloat16"
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "hf", dtype="auto")
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_an_export_that_fails_leaves_what_was_there(released, tmp_path, monkeypatch):
    export(released, tmp_path / "hf")
    before = {path.name: path.read_bytes() for path in (tmp_path / "hf").iterdir()}

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")
        yield

    with monkeypatch.context() as patch:
        patch.setattr(tensor_files, "_write_file", full)
        with pytest.raises(InputError, match=r"hf: it cannot be written \(No space left on device\)") as caught:
            export(released, tmp_path / "hf", dtype="float32", overwrite=True)
    assert "\n" not in str(caught.value)
    assert {path.name: path.read_bytes() for path in (tmp_path / "hf").iterdir()} == before


def test_an_export_replaces_the_whole_folder(released, tmp_path):
    export(released, tmp_path / "hf")
    (tmp_path / "hf" / "stale.json").write_text("{}")
    (tmp_path / ".hf.incomplete").mkdir()
    (tmp_path / ".hf.incomplete" / "model.safetensors").write_bytes(b"of a run that was killed")
    export(released, tmp_path / "hf", dtype="float32", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    assert not (tmp_path / "hf" / "stale.json").exists()
    export(tmp_path / "hf", tmp_path / "hf", overwrite=True)  # onto itself
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    assert {tensor.dtype for tensor in load_file(tmp_path / "hf" / "model.safetensors").values()} == {torch.bfloat16}
