"""Every released size: parameter counts as published and as transformers counts them, configs as the hub has them."""

import dataclasses
import json
import math

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from ril_jax.errors import InputError
from ril_jax.models.config import ModelConfig
from ril_jax.models.parameters import Network
from ril_jax.models.vlm import VisionLanguageModel

# Billions of parameters, and of those in millions the vision tower's (of InternVL without the projector).
PUBLISHED = {
    **{
        (ModelConfig.qwen2_5, size): (total, 0)
        for size, total in {
            "0.5b": 0.494, "1.5b": 1.544, "3b": 3.086, "7b": 7.616, "14b": 14.770, "32b": 32.764, "72b": 72.706
        }.items()
    },
    (ModelConfig.qwen2_5_vl, "3b"): (3.755, 669),
    (ModelConfig.qwen2_5_vl, "7b"): (8.292, 677),
    (ModelConfig.qwen2_5_vl, "32b"): (33.453, 689),
    (ModelConfig.qwen2_5_vl, "72b"): (73.411, 705),
    (ModelConfig.internvl3, "1b"): (0.938, 304),
    (ModelConfig.internvl3, "2b"): (2.089, 304),
    (ModelConfig.internvl3, "8b"): (7.944, 304),
    (ModelConfig.internvl3, "14b"): (15.117, 304),
    (ModelConfig.internvl3, "38b"): (38.388, 5540),
    (ModelConfig.internvl3, "78b"): (78.408, 5540),
}  # fmt: skip
SIZES = pytest.mark.parametrize(
    ("make", "size"), PUBLISHED, ids=lambda value: value if isinstance(value, str) else value.__name__
)


def network_of(config: ModelConfig) -> Network:
    return Network(lambda: VisionLanguageModel(config))


@SIZES
def test_parameter_counts_are_those_published(make, size):
    network = network_of(make(size))
    total, vision = PUBLISHED[make, size]
    in_tower = sum(
        math.prod(spec.shape) for spec in network.specs.values() if spec.hf.startswith(("visual.", "vision_tower."))
    )
    assert round(network.num_params / 1e9, 3) == total
    assert round(in_tower / 1e6, -1 if vision > 1000 else 0) == vision


@SIZES
def test_transformers_reads_the_config_and_has_the_same_parameters(make, size, tmp_path):
    config = make(size)
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf()))
    hf_config = AutoConfig.from_pretrained(tmp_path)
    auto = AutoModelForCausalLM if config.vision is None else AutoModelForImageTextToText
    with torch.device("meta"):
        hf = auto.from_config(hf_config)
    assert sum(parameter.numel() for parameter in hf.parameters()) == network_of(config).num_params
    hf_config.save_pretrained(tmp_path / "again")
    assert ModelConfig.from_folder(tmp_path) == config
    assert ModelConfig.from_folder(tmp_path / "again") == config


def test_base_models_differ_where_the_released_ones_do():
    differences = {}
    for size in ("0.5b", "1.5b", "3b", "7b", "14b", "32b", "72b"):
        base, instruct = (ModelConfig.qwen2_5(size, instruct=instruct).text for instruct in (False, True))
        assert (instruct.rms_norm_eps, instruct.max_position_embeddings) == (1e-6, 32768)
        differences[size] = (base.rms_norm_eps, base.max_position_embeddings)
        assert dataclasses.replace(base, rms_norm_eps=1e-6, max_position_embeddings=32768) == instruct
    assert {size for size, (eps, _) in differences.items() if eps == 1e-5} == {"14b", "32b", "72b"}
    assert {size for size, (_, length) in differences.items() if length == 131072} == {
        "1.5b",
        "7b",
        "14b",
        "32b",
        "72b",
    }


@pytest.mark.parametrize(
    ("make", "known"),
    [(ModelConfig.qwen2_5, "14b"), (ModelConfig.qwen2_5_vl, "32b"), (ModelConfig.internvl3, "38b")],
    ids=["Qwen2.5", "Qwen2.5-VL", "InternVL3"],
)
def test_a_size_that_was_never_released_is_refused_with_those_that_were(make, known):
    with pytest.raises(InputError, match=f"no size '13b'.*{known}"):
        make("13b")


# --- the files as they lie on the hub, without the fields that say nothing of the network ---

QWEN_TEXT = {
    "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645, "hidden_act": "silu",
    "initializer_range": 0.02, "model_type": "qwen2", "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True, "use_sliding_window": False,
}  # fmt: skip
DIMS_1B = {
    "hidden_size": 896, "intermediate_size": 4864, "max_position_embeddings": 32768, "max_window_layers": 70,
    "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2, "sliding_window": None,
    "vocab_size": 151674, "rope_scaling": {"factor": 2.0, "rope_type": "dynamic", "type": "dynamic"},
}  # fmt: skip
DIMS_38B = DIMS_1B | {
    "hidden_size": 5120, "intermediate_size": 27648, "num_attention_heads": 40, "num_hidden_layers": 64,
    "num_key_value_heads": 8,
}  # fmt: skip
VIT_300M = {
    "attention_dropout": 0.0, "hidden_act": "gelu", "hidden_size": 1024, "intermediate_size": 4096,
    "layer_norm_eps": 1e-06, "norm_type": "layer_norm", "num_attention_heads": 16, "num_channels": 3,
    "num_hidden_layers": 24,
}  # fmt: skip
VIT_6B = VIT_300M | {
    "hidden_size": 3200, "intermediate_size": 12800, "norm_type": "rms_norm", "num_attention_heads": 25,
    "num_hidden_layers": 45,
}  # fmt: skip


def hf_form(text: dict, vision: dict, *, bias: bool, qk_norm: bool) -> dict:
    return {
        "architectures": ["InternVLForConditionalGeneration"], "downsample_ratio": 0.5, "image_seq_length": 256,
        "image_token_id": 151667, "model_type": "internvl", "projector_hidden_act": "gelu",
        "text_config": {**QWEN_TEXT, **text}, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "vision_config": {
            **vision, "attention_bias": bias, "image_size": [448, 448], "layer_scale_init_value": 0.1,
            "model_type": "internvl_vision", "patch_size": [14, 14], "projection_dropout": 0.0,
            "use_absolute_position_embeddings": True, "use_mask_token": False, "use_mean_pooling": True,
            "use_qk_norm": qk_norm,
        },
        "vision_feature_layer": -1, "vision_feature_select_strategy": "default",
    }  # fmt: skip


def opengvlab_form(text: dict, vision: dict, *, bias: bool, qk_norm: bool) -> dict:
    return {
        "architectures": ["InternVLChatModel"], "downsample_ratio": 0.5, "dynamic_image_size": True,
        "force_image_size": 448, "llm_config": {**QWEN_TEXT, **text, "eos_token_id": 151643, "moe_config": None},
        "max_dynamic_patch": 12, "min_dynamic_patch": 1, "model_type": "internvl_chat", "pad2square": False,
        "ps_version": "v2", "select_layer": -1, "system_message": None, "template": "internvl2_5",
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_backbone_lora": 0, "use_llm_lora": 0,
        "use_thumbnail": True,
        "vision_config": {
            **vision, "drop_path_rate": 0.1, "dropout": 0.0, "image_size": 448, "initializer_factor": 0.1,
            "model_type": "intern_vit_6b", "patch_size": 14, "qk_normalization": qk_norm, "qkv_bias": bias,
            "use_flash_attn": True,
        },
    }  # fmt: skip


INTERNVL = {
    "1b": dict(text=DIMS_1B, vision=VIT_300M, bias=True, qk_norm=False),
    "38b": dict(text=DIMS_38B, vision=VIT_6B, bias=False, qk_norm=True),
}


@pytest.mark.parametrize("size", INTERNVL)
def test_every_form_of_an_internvl_config_is_the_released_size(size, tmp_path):
    fields, config = INTERNVL[size], ModelConfig.internvl3(size)
    released = hf_form(**fields)
    assert ModelConfig.from_hf(released) == config
    assert ModelConfig.from_hf(opengvlab_form(**fields)) == config
    as_numbers = {**released, "vision_config": released["vision_config"] | {"image_size": 448, "patch_size": 14}}
    assert ModelConfig.from_hf(as_numbers) == config
    # As transformers 5 writes it again, with the rotary fields under another name.
    (tmp_path / "config.json").write_text(json.dumps(released))
    AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert "rope_scaling" not in again["text_config"]
    assert ModelConfig.from_hf(again) == config


@pytest.mark.parametrize("instruct", [True, False])
def test_a_released_text_config_is_the_released_size(instruct, tmp_path):
    """The flat form as it is, and as transformers 5 writes it again."""
    flat = QWEN_TEXT | {
        "architectures": ["Qwen2ForCausalLM"], "hidden_size": 8192, "intermediate_size": 29568,
        "max_position_embeddings": 32768 if instruct else 131072, "max_window_layers": 70, "num_attention_heads": 64,
        "num_hidden_layers": 80, "num_key_value_heads": 8, "rms_norm_eps": 1e-06 if instruct else 1e-05,
        "sliding_window": 131072, "vocab_size": 152064,
    }  # fmt: skip
    config = ModelConfig.qwen2_5("72b", instruct=instruct)
    assert ModelConfig.from_hf(flat) == config
    (tmp_path / "config.json").write_text(json.dumps(flat))
    AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path / "again")
    assert ModelConfig.from_folder(tmp_path / "again") == config


# --- what the networks do not compute is refused by name ---

HF_1B, OPENGVLAB_1B = hf_form(**INTERNVL["1b"]), opengvlab_form(**INTERNVL["1b"])
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


@pytest.mark.parametrize(
    ("raw", "part", "field", "value"),
    [
        (HF_1B, None, "vision_feature_layer", -2),
        (HF_1B, None, "vision_feature_select_strategy", "full"),
        (HF_1B, None, "projector_hidden_act", "relu"),
        (HF_1B, None, "downsample_ratio", 0.3),
        (HF_1B, "vision_config", "norm_type", "batch_norm"),
        (HF_1B, "vision_config", "hidden_act", "gelu_pytorch_tanh"),
        (HF_1B, "vision_config", "use_mean_pooling", False),
        (HF_1B, "vision_config", "use_absolute_position_embeddings", False),
        (HF_1B, "vision_config", "image_size", [448, 224]),
        (HF_1B, "vision_config", "image_size", 434),
        (HF_1B, "vision_config", "patch_size", [14, 16]),
        (HF_1B, "text_config", "model_type", "qwen3"),
        (HF_1B, "text_config", "hidden_act", "gelu"),
        (HF_1B, "text_config", "use_sliding_window", True),
        (HF_1B, "text_config", "rope_scaling", YARN),
        (OPENGVLAB_1B, None, "ps_version", "v1"),
        (OPENGVLAB_1B, None, "select_layer", -4),
        (OPENGVLAB_1B, "llm_config", "model_type", "internlm2"),
    ],
    ids=lambda value: None if isinstance(value, dict | list) else str(value),
)
def test_what_is_not_computed_is_refused_in_one_line(raw, part, field, value):
    changed = {**raw, field: value} if part is None else {**raw, part: raw[part] | {field: value}}
    shown = "yarn" if value is YARN else field
    with pytest.raises(InputError, match=f"^config.json: .*{shown}") as caught:
        ModelConfig.from_hf(changed)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("raw", "part", "field"),
    [
        (HF_1B, None, "text_config"),
        (HF_1B, "vision_config", "norm_type"),
        (OPENGVLAB_1B, None, "llm_config"),
        (OPENGVLAB_1B, "vision_config", "qk_normalization"),
    ],
    ids=lambda value: None if isinstance(value, dict) else str(value),
)
def test_a_missing_field_is_named(raw, part, field):
    without = lambda fields: {key: value for key, value in fields.items() if key != field}  # noqa: E731
    changed = without(raw) if part is None else {**raw, part: without(raw[part])}
    with pytest.raises(InputError, match=f"config.json: the field '{field}' is missing"):
        ModelConfig.from_hf(changed)
