"""Claims about checkpoints and configs: every layout in the wild loads, transformers reads ours, bad ones speak."""

import json
import re
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from helpers import hf_models
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as torch_save_file
from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration, Qwen2ForCausalLM

from ril_jax.errors import InputError
from ril_jax.models.config import ModelConfig
from ril_jax.models.hub import SafetensorsFolder, has_own_head, load_params, resolve, save_params
from ril_jax.models.parameters import Network
from ril_jax.models.vlm import VisionLanguageModel


def network_of(config, **kwargs):
    return Network(lambda: VisionLanguageModel(config, **kwargs))


@pytest.fixture(scope="module")
def tensors(tiny_vl):
    return load_file(tiny_vl.folder / "model.safetensors")


@pytest.fixture
def write(tmp_path, tiny_vl):
    """Writes a folder of the tiny model's config and the given tensors."""

    def write(tensors, config=tiny_vl):
        shutil.copy(config.folder / "config.json", tmp_path)
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        return tmp_path

    return write


def assert_same(params, others):
    assert params.keys() == others.keys()
    for name in params:
        np.testing.assert_array_equal(params[name], others[name], err_msg=name)


def renamed(tensors, *rules):
    """The tensors with the first rule (pattern, replacement) that matches a name applied to it."""

    def rename(name):
        for pattern, replacement in rules:
            if re.match(pattern, name):
                return re.sub(pattern, replacement, name)
        return name

    return {rename(name): tensor for name, tensor in tensors.items()}


LAYOUTS = {
    "hub": [],
    "transformers 5 in memory": [(r"model\.", "model.language_model."), (r"visual\.", "model.visual.")],
    "bare base model": [(r"model\.", "language_model.")],
    "text model within": [(r"model\.", "language_model.model."), (r"lm_head", "language_model.lm_head")],
}


def test_the_hub_layout_is_what_transformers_writes(tensors):
    assert "model.layers.0.self_attn.q_proj.weight" in tensors
    assert "visual.blocks.0.attn.qkv.weight" in tensors


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_key_layout_loads_to_the_same_parameters(layout, write, tiny_vl, tensors):
    network = network_of(tiny_vl.config)
    moved = renamed(tensors, *LAYOUTS[layout])
    assert (moved.keys() == tensors.keys()) == (layout == "hub")
    assert_same(load_params(write(moved), network), load_params(tiny_vl.folder, network))


def test_the_layout_of_transformers_own_unconverted_save_loads(tiny_vl, tmp_path):
    tiny_vl.hf.save_pretrained(tmp_path, save_original_format=False)
    assert "model.language_model.norm.weight" in load_file(tmp_path / "model.safetensors")
    network = network_of(tiny_vl.config)
    assert_same(load_params(tmp_path, network), load_params(tiny_vl.folder, network))


def test_the_base_model_alone_of_a_text_checkpoint_loads(tiny_text, tmp_path):
    tiny_text.hf.model.save_pretrained(tmp_path)
    assert "layers.0.input_layernorm.weight" in load_file(tmp_path / "model.safetensors")
    network = network_of(tiny_text.config)
    assert_same(load_params(tmp_path, network), load_params(tiny_text.folder, network))


def test_shards_with_an_index_load_like_one_file(tiny_vl, tmp_path):
    tiny_vl.hf.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    network = network_of(tiny_vl.config)
    assert_same(load_params(tmp_path, network), load_params(tiny_vl.folder, network))


def test_a_file_without_a_head_gives_an_untied_network_its_embedding(write, tiny_vl, tensors):
    folder = write({name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"})
    assert not has_own_head(folder)
    assert has_own_head(tiny_vl.folder)
    params = load_params(folder, network_of(tiny_vl.config))
    np.testing.assert_array_equal(params["text.lm_head"], tensors["model.embed_tokens.weight"])


def test_a_tied_network_has_no_head_of_its_own(tiny_text):
    network = network_of(tiny_text.config)
    assert "text.lm_head" not in network.specs
    params = load_params(tiny_text.folder, network)
    assert network.bind(params).text.head() is params["text.embedding"]


def test_a_network_without_vision_loads_the_decoder_of_a_vision_language_checkpoint(tiny_vl):
    network = network_of(tiny_vl.config, vision=False)
    params = load_params(tiny_vl.folder, network)
    assert not any(name.startswith("vision") for name in params)
    np.testing.assert_array_equal(params["text.norm.weight"], tiny_vl.hf.model.language_model.norm.weight.detach())


def test_a_scalar_head_that_no_file_has_starts_at_zero(tiny_vl):
    params = load_params(tiny_vl.folder, network_of(tiny_vl.config, head="scalar"))
    assert not np.any(params["text.score.kernel"])
    assert not np.any(params["text.score.bias"])
    assert params["text.score.kernel"].shape == (64, 1)


@pytest.mark.parametrize("shard_bytes", [5 * 10**9, 60_000])
@pytest.mark.parametrize("kind", ["tiny_vl", "tiny_text"])
def test_what_is_saved_transformers_loads_with_equal_logits(kind, shard_bytes, request, tmp_path):
    tiny = request.getfixturevalue(kind)
    network = network_of(tiny.config)
    save_params(tmp_path, network, load_params(tiny.folder, network), max_shard_bytes=shard_bytes)
    (tmp_path / "config.json").write_text(json.dumps(tiny.config.to_hf()))
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard_bytes < 10**9)
    make = Qwen2_5_VLForConditionalGeneration if kind == "tiny_vl" else Qwen2ForCausalLM
    loaded, info = make.from_pretrained(tmp_path, output_loading_info=True)
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info[problem], problem
    rng = np.random.default_rng(0)
    p = hf_models.prompt(rng, 6, *([(6, 8)] if kind == "tiny_vl" else []))
    with torch.no_grad():
        torch.testing.assert_close(hf_models.logits(loaded.eval(), p), hf_models.logits(tiny.hf, p), rtol=0, atol=0)


def test_saved_and_loaded_parameters_are_the_same_to_the_bit(tiny_vl, tmp_path):
    network = network_of(tiny_vl.config)
    params = load_params(tiny_vl.folder, network, dtype=jnp.bfloat16)
    save_params(tmp_path, network, params)
    assert_same(load_params(tmp_path, network, dtype=jnp.bfloat16), params)


def test_bfloat16_files_load_as_they_are_and_widened(tiny_vl, tmp_path):
    half = Qwen2_5_VLForConditionalGeneration.from_pretrained(tiny_vl.folder, dtype=torch.bfloat16)
    half.save_pretrained(tmp_path)
    network = network_of(tiny_vl.config)
    wide, narrow = load_params(tmp_path, network), load_params(tmp_path, network, dtype=jnp.bfloat16)
    reference = half.lm_head.weight.detach().float().numpy()
    assert wide["text.lm_head"].dtype == jnp.float32
    assert narrow["text.lm_head"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(wide["text.lm_head"], reference)
    np.testing.assert_array_equal(narrow["text.lm_head"].astype(jnp.float32), reference)


# --- what is wrong with a checkpoint is said in one line ---


def refused(match, action):
    with pytest.raises(InputError, match=match) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_missing_and_misshaped_key_is_named_at_once(write, tiny_vl, tensors):
    gone = ["model.layers.1.mlp.up_proj.weight", "visual.merger.mlp.0.bias", "model.norm.weight"]
    bad = {name: tensor for name, tensor in tensors.items() if name not in gone}
    bad["visual.patch_embed.proj.weight"] = np.zeros((32, 3, 2, 14, 7), np.float32)
    bad["model.layers.2.self_attn.k_proj.bias"] = np.zeros(48, np.float32)
    message = refused("does not fit", lambda: load_params(write(bad), network_of(tiny_vl.config)))
    for name in [*gone, "visual.patch_embed.proj.weight [32, 3, 2, 14, 7] instead of [32, 3, 2, 14, 14]"]:
        assert name in message
    assert "model.layers.2.self_attn.k_proj.bias [48] instead of [32]" in message


def test_layers_beyond_the_config_are_named(write, tiny_vl, tensors):
    more = {**tensors, "model.layers.3.input_layernorm.weight": np.ones(64, np.float32)}
    refused(
        r"not known: model\.layers\.3\.input_layernorm", lambda: load_params(write(more), network_of(tiny_vl.config))
    )


@pytest.mark.parametrize("key", ["model.norm.bias", "lm_head.bias", "visual.merger.ln_q.bias", "base_model.lora_A"])
def test_keys_beside_those_of_the_network_are_named(key, write, tiny_vl, tensors):
    more = {**tensors, key: np.ones(64, np.float32)}
    refused(f"not known: {re.escape(key)}$", lambda: load_params(write(more), network_of(tiny_vl.config)))


@pytest.mark.parametrize(
    ("key", "kwargs"),
    [
        ("model.layers.0.self_attn.rotary_emb.inv_freq", {}),
        ("visual.rotary_pos_emb.inv_freq", {}),
        ("score.weight", {}),  # a head that a language model has no use for
        ("lm_head.bias", {"head": "scalar"}),
        ("visual.blocks.9.norm1.weight", {"vision": False}),
        ("multi_modal_projector.linear_1.bias", {}),  # of another family's tower
    ],
)
def test_buffers_and_unused_heads_and_towers_raise_no_alarm(key, kwargs, write, tiny_vl, tensors):
    network = network_of(tiny_vl.config, **kwargs)
    params = load_params(write({**tensors, key: np.ones(64, np.float32)}), network)
    assert_same(params, load_params(tiny_vl.folder, network))


def test_a_key_that_is_wrong_in_many_layers_is_named_once(write, tiny_vl, tensors):
    bad = {name: tensor for name, tensor in tensors.items() if not name.endswith("mlp.up_proj.weight")}
    bad |= {f"visual.blocks.{i}.mlp.up_proj.weight": np.zeros((4, 4), np.float32) for i in (0, 2)}
    message = refused("does not fit", lambda: load_params(write(bad), network_of(tiny_vl.config)))
    assert "missing: model.layers.{0-2}.mlp.up_proj.weight, visual.blocks.1.mlp.up_proj.weight;" in message
    assert "dtype: visual.blocks.{0,2}.mlp.up_proj.weight [4, 4] instead of [48, 32]" in message


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8], ids=str)
def test_weights_of_a_quantized_dtype_are_refused(dtype, tiny_vl, tensors, tmp_path):
    wide = {name: torch.tensor(tensor) for name, tensor in tensors.items()}
    key = "model.layers.1.mlp.gate_proj.weight"
    torch_save_file(wide | {key: wide[key].to(dtype)}, tmp_path / "model.safetensors")
    refused(
        rf"{key} (float8_e4m3fn|int8), which is quantized", lambda: load_params(tmp_path, network_of(tiny_vl.config))
    )


def test_a_quantized_checkpoint_is_refused_before_anything_is_read(write, tensors):
    folder = write(tensors)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps(config))
    for action in (SafetensorsFolder, has_own_head):
        refused(r"config\.json: the weights are quantized \(quant_method 'fp8'\)", lambda act=action: act(folder))


@pytest.mark.parametrize("keep", [0, 5, 100, 0.5, 0.999])
def test_a_truncated_shard_is_named(keep, write, tensors):
    folder = write(tensors)
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: keep if isinstance(keep, int) else int(keep * len(data))])
    refused(r"model\.safetensors: truncated", lambda: SafetensorsFolder(folder))


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header.replace(b'"dtype"', b'"dtypo"', 1),
        lambda header: b"[" + header[1:],
        lambda header: header.replace(b'"data_offsets":[0,', b'"data_offsets":[4,', 1),
        lambda header: b"[]" + b" " * (len(header) - 2),
    ],
    ids=["field", "syntax", "offsets", "no object"],
)
def test_a_corrupt_header_is_named(change, write, tensors):
    folder = write(tensors)
    path = folder / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = change(data[8 : 8 + length])
    assert len(header) == length
    assert header != data[8 : 8 + length]
    path.write_bytes(data[:8] + header + data[8 + length :])
    refused(r"model\.safetensors: corrupt header", lambda: SafetensorsFolder(folder))


@pytest.fixture
def sharded(tiny_vl, tmp_path):
    """The tiny model in shards with an index."""
    tiny_vl.hf.save_pretrained(tmp_path, max_shard_size="100KB")
    return tmp_path


def test_shards_that_the_index_names_and_that_are_not_there_are_named(sharded):
    gone = sorted(sharded.glob("*.safetensors"))[1:3]
    for path in gone:
        path.unlink()
    message = refused("index names are missing", lambda: SafetensorsFolder(sharded))
    assert all(path.name in message for path in gone)


def test_a_tensor_that_two_shards_hold_is_named_with_both(sharded):
    first, second, *_ = sorted(sharded.glob("*.safetensors"))
    key, tensor = next(iter(load_file(first).items()))
    save_file(load_file(second) | {key: tensor}, second, metadata={"format": "pt"})
    message = refused(rf"two tensors for {key}", lambda: SafetensorsFolder(sharded))
    assert first.name in message
    assert second.name in message


def test_a_tensor_under_two_names_is_refused(write, tensors):
    both = {**tensors, "model.language_model.norm.weight": tensors["model.norm.weight"]}
    message = refused("two tensors for model.norm.weight", lambda: SafetensorsFolder(write(both)))
    assert "model.language_model.norm.weight in model.safetensors" in message


def test_a_shard_that_the_index_does_not_name_is_ignored(sharded, tiny_vl):
    save_file({"model.norm.weight": np.zeros(64, np.float32)}, sharded / "model-old.safetensors")
    (sharded / "broken.safetensors").write_bytes(b"no safetensors at all")
    network = network_of(tiny_vl.config)
    assert_same(load_params(sharded, network), load_params(tiny_vl.folder, network))


def test_a_tensor_that_is_not_in_the_shard_of_the_index_is_named(sharded):
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    file = index["weight_map"]["model.norm.weight"]
    index["weight_map"]["model.nowhere.weight"] = file
    path.write_text(json.dumps(index))
    refused(rf"index\.json: model\.nowhere\.weight should be in {file}", lambda: SafetensorsFolder(sharded))


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"weight_map": {}}', '{"weight_map": {"model.norm.weight": 1}}'])
def test_a_broken_index_is_named(text, write, tensors):
    folder = write(tensors)
    (folder / "model.safetensors.index.json").write_text(text)
    refused(r"index\.json: not a valid index", lambda: SafetensorsFolder(folder))


def test_pickled_weights_are_never_loaded(tmp_path):
    torch.save({"model.norm.weight": torch.ones(4)}, tmp_path / "pytorch_model.bin")
    refused(
        r"no \*\.safetensors.*pickled weights \(\*\.bin\), which are never loaded", lambda: SafetensorsFolder(tmp_path)
    )


def test_an_empty_folder_and_a_missing_folder_are_named(tmp_path):
    refused(re.escape(str(tmp_path)), lambda: SafetensorsFolder(tmp_path))
    refused("nowhere: no such folder", lambda: resolve(tmp_path / "nowhere"))
    refused("no such file", lambda: ModelConfig.from_folder(tmp_path))


# --- hub ids ---


@pytest.mark.parametrize(
    ("name", "repository", "revision"),
    [
        ("Qwen/Qwen2.5-VL-3B-Instruct", "Qwen/Qwen2.5-VL-3B-Instruct", None),
        ("Qwen/Qwen2.5-VL-3B-Instruct@main", "Qwen/Qwen2.5-VL-3B-Instruct", "main"),
        ("a_b/c.d@refs/pr/7", "a_b/c.d", "refs/pr/7"),
    ],
)
def test_a_hub_id_is_fetched_at_its_revision(name, repository, revision, monkeypatch, tmp_path):
    asked = []

    def download(repo_id, *, revision, allow_patterns):
        asked.append((repo_id, revision))
        assert {"*.safetensors", "*.json", "*.jinja"} <= set(allow_patterns)
        assert not any("bin" in pattern for pattern in allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert resolve(name) == tmp_path
    assert asked == [(repository, revision)]


@pytest.mark.parametrize("name", ["model", "a/b/c", "./a/b", "/a/b", "a/b@", "a/b@x y", "-/../b@main"])
def test_what_is_neither_a_folder_nor_a_hub_id_is_named(name, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("the hub was asked"))
    refused(re.escape(f"checkpoint {name}: no such folder"), lambda: resolve(name))


def test_a_hub_that_cannot_be_reached_is_told_in_one_line(monkeypatch):
    def download(*_, **__):
        raise OSError("no route\nto the hub")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    refused(r"a/b@main: no such folder, and the hub could not give it \(no route\)", lambda: resolve("a/b@main"))


# --- configs ---

HUB_CONFIG = {
    # The flat form of the hub's released folders, with the fields of their vision configs.
    "architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl", "attention_dropout": 0.0,
    "bos_token_id": 151643, "eos_token_id": 151645, "vision_start_token_id": 151652, "vision_end_token_id": 151653,
    "vision_token_id": 151654, "image_token_id": 151655, "video_token_id": 151656, "hidden_act": "silu",
    "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 11008, "max_position_embeddings": 128000,
    "max_window_layers": 70, "num_attention_heads": 16, "num_hidden_layers": 36, "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": True,
    "torch_dtype": "bfloat16", "use_cache": True, "use_sliding_window": False, "vocab_size": 151936,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vision_config": {
        "depth": 32, "hidden_act": "silu", "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16,
        "in_chans": 3, "out_hidden_size": 2048, "patch_size": 14, "spatial_merge_size": 2, "spatial_patch_size": 14,
        "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31], "tokens_per_second": 2, "temporal_patch_size": 2,
    },
}  # fmt: skip


def test_flat_and_nested_configs_are_the_same_model(tmp_path):
    flat = ModelConfig.from_hf(HUB_CONFIG)
    assert flat == ModelConfig.qwen2_5_vl("3b")
    assert flat.text.tie_word_embeddings
    assert (flat.text.head_dim, flat.vision.fullatt_block_indexes) == (128, (7, 15, 23, 31))
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "config.json").write_text(json.dumps(HUB_CONFIG))
    # transformers reads the flat form and writes the nested one.
    AutoConfig.from_pretrained(tmp_path / "flat").save_pretrained(tmp_path / "nested")
    nested = json.loads((tmp_path / "nested" / "config.json").read_text())
    assert "hidden_size" not in nested
    assert "rope_scaling" not in nested["text_config"]
    assert ModelConfig.from_folder(tmp_path / "nested") == flat


def test_half_nested_configs_of_older_releases_are_the_same_model():
    fields = {"hidden_size", "num_hidden_layers", "vocab_size", "rope_scaling", "rope_theta", "rms_norm_eps"}
    half = {key: value for key, value in HUB_CONFIG.items() if key not in fields}
    half["text_config"] = {key: HUB_CONFIG[key] for key in fields}
    half["text_config"]["rope_scaling"] = {"type": "default", "rope_type": "default", "mrope_section": [16, 24, 24]}
    assert ModelConfig.from_hf(half) == ModelConfig.from_hf(HUB_CONFIG)


def test_the_config_we_write_is_read_back_by_us_and_by_transformers(tmp_path):
    config = ModelConfig.from_hf(HUB_CONFIG)
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf()))
    assert ModelConfig.from_folder(tmp_path) == config
    AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path / "again")
    assert ModelConfig.from_folder(tmp_path / "again") == config


def test_another_family_is_refused_by_name():
    refused("config.json: model_type 'llama' is not supported", lambda: ModelConfig.from_hf({"model_type": "llama"}))


@pytest.mark.parametrize("field", ["rms_norm_eps", "num_key_value_heads", "vision_config"])
def test_a_missing_field_is_named(field):
    raw = {key: value for key, value in HUB_CONFIG.items() if key != field}
    refused(f"config.json: the field '{field}' is missing", lambda: ModelConfig.from_hf(raw))


def test_a_config_that_is_no_json_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{")
    refused(r"config\.json: not valid JSON", lambda: ModelConfig.from_folder(tmp_path))
