"""InternVL3 checkpoints: every layout of keys gives the same parameters, and what we write transformers loads."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest
import torch
from helpers import hf_internvl, hf_models
from helpers.hf_internvl import original_config, original_layout
from safetensors.numpy import load_file, save_file
from transformers import InternVLForConditionalGeneration

from ril_jax.errors import InputError
from ril_jax.models.config import ModelConfig
from ril_jax.models.hub import load_params, save_params
from ril_jax.models.parameters import Network
from ril_jax.models.vlm import VisionLanguageModel


def in_memory(tensors):
    """As `state_dict()` has it in transformers 5, and as `save_original_format=False` writes it."""
    out = {}
    for key, tensor in tensors.items():
        key = re.sub(r"^language_model\.model\.", "language_model.", key)
        out[key.removeprefix("language_model.") if key == "language_model.lm_head.weight" else f"model.{key}"] = tensor
    return out


def base_model(tensors):
    """As the model without its head has it."""
    return {key.removeprefix("model."): value for key, value in in_memory(tensors).items() if "lm_head" not in key}


LAYOUTS = {"in memory": in_memory, "OpenGVLab": original_layout}


@pytest.fixture(scope="module", params=["InternViT-300M, untied", "InternViT-6B, tied"])
def tiny(request, tmp_path_factory):
    vision = hf_internvl.KIND_300M if "300M" in request.param else hf_internvl.KIND_6B
    folder = tmp_path_factory.mktemp("internvl")
    return hf_internvl.save_internvl(folder, vision=vision, tie=request.param.endswith(", tied"))


@pytest.fixture
def tensors(tiny):
    return load_file(tiny.folder / "model.safetensors")


@pytest.fixture
def write(tmp_path):
    def write(tensors, name="checkpoint"):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
        return tmp_path / name

    return write


def network_of(config):
    return Network(lambda: VisionLanguageModel(config))


def assert_same(params, others):
    assert params.keys() == others.keys()
    jax.tree.map(np.testing.assert_array_equal, params, others)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_parameters(layout, tiny, tensors, write):
    network = network_of(tiny.config)
    renamed = LAYOUTS[layout](tensors)
    assert set(renamed) & set(tensors) <= {key for key in tensors if key.startswith("language_model.")}
    assert_same(load_params(write(renamed), network), load_params(tiny.folder, network))


def test_the_layouts_written_here_are_those_of_transformers(tiny, tensors, tmp_path):
    assert in_memory(tensors).keys() | {"lm_head.weight"} == tiny.hf.state_dict().keys() | {"lm_head.weight"}
    assert base_model(tensors).keys() == tiny.hf.model.state_dict().keys()


def test_a_base_model_gives_the_same_body_and_its_embedding_as_head(tiny, tensors, write):
    network = network_of(tiny.config)
    params, body = load_params(tiny.folder, network), load_params(write(base_model(tensors)), network)
    if "text.lm_head" in params:
        params["text.lm_head"] = params["text.embedding"]
    assert_same(body, params)


def test_opengvlabs_config_is_the_same_model(tiny):
    raw = json.loads((tiny.folder / "config.json").read_text())
    config = ModelConfig.from_hf(original_config(raw))
    assert (config.vision_start_token_id, config.vision_end_token_id, config.image_token_id) == (151665, 151666, 151667)
    assert dataclasses.replace(config, image_token_id=hf_models.IMAGE) == tiny.config


def test_a_fused_tensor_of_the_wrong_shape_is_named(tiny, tensors, write):
    bad = original_layout(tensors)
    key = "vision_model.encoder.layers.1.attn.qkv.weight"
    width = bad[key].shape[1]
    bad[key] = np.zeros((3 * width - 6, width), np.float32)
    with pytest.raises(InputError, match=rf"layer\.1\.attention\.q_proj\.weight \[{width - 2}, {width}\] instead of"):
        load_params(write(bad), network_of(tiny.config))


@pytest.mark.parametrize("layout", ["transformers", "OpenGVLab"])
def test_what_is_saved_transformers_loads_with_equal_logits(layout, tiny, tensors, write, tmp_path):
    network = network_of(tiny.config)
    source = tiny.folder if layout == "transformers" else write(original_layout(tensors))
    save_params(tmp_path / "out", network, load_params(source, network), family=tiny.config.family)
    (tmp_path / "out" / "config.json").write_text(json.dumps(tiny.config.to_hf()))
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == tensors.keys()  # the hub's names
    loaded, info = InternVLForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info[problem], problem
    p = hf_internvl.prompt(np.random.default_rng(0), 6, 2, 1)
    with torch.no_grad():
        torch.testing.assert_close(hf_models.logits(loaded.eval(), p), hf_models.logits(tiny.hf, p), rtol=0, atol=0)


@pytest.mark.parametrize("layout", ["transformers", "OpenGVLab"])
def test_the_decoder_alone_loads_as_the_body_of_a_discriminator(layout, tiny, tensors, write):
    network = Network(lambda: VisionLanguageModel(tiny.config, head="scalar", vision=False))
    params = load_params(write(original_layout(tensors)) if layout == "OpenGVLab" else tiny.folder, network)
    whole = load_params(tiny.folder, network_of(tiny.config))
    body = {name: value for name, value in params.items() if not name.startswith("text.score.")}
    assert len(params) == len(body) + 2
    assert_same(body, {name: value for name, value in whole.items() if name in body})
