"""What a model is: frozen configs with the field names of transformers, read from any `config.json` of the families."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ril_jax.errors import InputError
from ril_jax.models import sizes


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """A Qwen2.5 text decoder (HF `Qwen2Config` / `Qwen2_5_VLTextConfig`).

    Attributes:
      mrope_section: frequencies that turn with time, height and width (M-RoPE); None for one-dimensional positions.
      rope_dynamic_factor: of dynamic NTK scaling, in effect beyond `max_position_embeddings`; None for none.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float = 1_000_000.0
    mrope_section: tuple[int, ...] | None = None
    rope_dynamic_factor: float | None = None
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 32768


@dataclasses.dataclass(frozen=True)
class QwenVisionConfig:
    """The Qwen2.5-VL vision tower (HF `Qwen2_5_VLVisionConfig`)."""

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    out_hidden_size: int
    fullatt_block_indexes: tuple[int, ...]
    patch_size: int = 14
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2
    window_size: int = 112
    in_channels: int = 3
    tokens_per_second: int = 2

    @property
    def patch_dim(self) -> int:
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def merge_unit(self) -> int:
        """Patches that make one feature."""
        return self.spatial_merge_size**2


@dataclasses.dataclass(frozen=True)
class InternVisionConfig:
    """InternViT with its pixel shuffle and projector (HF `InternVLVisionConfig` and fields of `InternVLConfig`).

    Attributes:
      image_size: (height, width) in pixels that the position table is made for; tiles of another size interpolate it.
      norm: "layer_norm" (300M) or "rms_norm" (6B), of the blocks.
      qk_norm: whether queries and keys are normed, over their full width before the split into heads (6B).
      downsample: patches along each axis that pixel shuffle makes one feature of.
      out_hidden_size: width of the text decoder.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    out_hidden_size: int
    norm: str
    qkv_bias: bool
    qk_norm: bool
    image_size: tuple[int, int] = (448, 448)
    patch_size: int = 14
    layer_norm_eps: float = 1e-6
    downsample: int = 2

    @property
    def patch_dim(self) -> int:
        return 3 * self.patch_size**2

    @property
    def merge_unit(self) -> int:
        """Patches that make one feature."""
        return self.downsample**2

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the position table."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    def tile_tokens(self, height: int, width: int) -> int:
        """Features, and so placeholder tokens, of one tile of height x width pixels."""
        step = self.patch_size * self.downsample
        return (height // step) * (width // step)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A whole model: text decoder, and a vision tower unless it is text only.

    Attributes:
      family: "qwen2_5_vl", "qwen2" or "internvl".
      *_token_id: ids of the image and video placeholders and of the brackets around them; None where there are none.
    """

    family: str
    text: TextConfig
    vision: QwenVisionConfig | InternVisionConfig | None = None
    image_token_id: int | None = None
    video_token_id: int | None = None
    vision_start_token_id: int | None = None
    vision_end_token_id: int | None = None

    @classmethod
    def qwen2_5(cls, size: str, *, instruct: bool = True) -> "ModelConfig":
        """Qwen2.5 "0.5b" to "72b", instruct or base. Raises InputError for a size that was never released."""
        base = not instruct
        text = _sized_text(
            size, "Qwen2.5",
            rms_norm_eps=1e-5 if base and size in sizes.QWEN2_5_COARSE_BASE else 1e-6,
            max_position_embeddings=131072 if base and size in sizes.QWEN2_5_LONG_BASE else 32768,
        )  # fmt: skip
        return cls("qwen2", text)

    @classmethod
    def qwen2_5_vl(cls, size: str) -> "ModelConfig":
        """Qwen2.5-VL "3b", "7b", "32b" or "72b". Raises InputError for a size that was never released."""
        ff = _of_size(size, sizes.QWEN2_5_VL_VISION_FF, "Qwen2.5-VL")
        text = _sized_text(
            size, "Qwen2.5-VL", rms_norm_eps=1e-6, max_position_embeddings=128000, mrope_section=(16, 24, 24)
        )
        vision = QwenVisionConfig(
            depth=32, hidden_size=1280, intermediate_size=ff, num_heads=16, out_hidden_size=text.hidden_size,
            fullatt_block_indexes=(7, 15, 23, 31),
        )  # fmt: skip
        return cls("qwen2_5_vl", text, vision, **_QWEN_VL_TOKENS)

    @classmethod
    def internvl3(cls, size: str) -> "ModelConfig":
        """InternVL3 "1b", "2b", "8b", "14b", "38b" or "78b". Raises InputError for a size that was never released."""
        decoder, tower = _of_size(size, sizes.INTERNVL3, "InternVL3")
        text = _sized_text(
            decoder, "Qwen2.5", rms_norm_eps=1e-6, max_position_embeddings=32768, rope_dynamic_factor=2.0
        )
        text = dataclasses.replace(text, vocab_size=151674, tie_word_embeddings=False)
        vision = InternVisionConfig(**sizes.INTERN_VIT[tower]._asdict(), out_hidden_size=text.hidden_size)
        return cls("internvl", text, vision, **_INTERNVL_TOKENS)

    @classmethod
    def from_folder(cls, folder: str | Path) -> "ModelConfig":
        """Read `config.json` of an HF folder. Raises InputError where it is missing, broken or of another family."""
        return cls.from_hf(_read_json(Path(folder) / "config.json"), name=str(Path(folder) / "config.json"))

    @classmethod
    def from_hf(cls, raw: dict[str, Any], *, name: str = "config.json") -> "ModelConfig":
        """From a parsed `config.json`: flat hub form, nested v5 form, the mixtures in between, and OpenGVLab's form.

        Raises InputError for another family, a missing field, or a value that the networks here do not compute.
        """
        family = raw.get("model_type")
        if family not in _READERS:
            raise InputError(f"{name}: model_type {family!r} is not supported; known are {', '.join(_READERS)}")
        try:
            return _READERS[family](raw, name)
        except KeyError as error:
            raise InputError(
                f"{name}: the field {error.args[0]!r} is missing; add it or fetch the file again"
            ) from None

    def to_hf(self) -> dict[str, Any]:
        """A `config.json` in the nested form that transformers 5 writes and every recent release reads."""
        text = _text_to_hf(self.text)
        if self.family == "qwen2":
            return {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", **text}
        tokens = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        common = {"tie_word_embeddings": self.text.tie_word_embeddings}
        common |= {field: getattr(self, field) for field in tokens if getattr(self, field) is not None}
        if isinstance(self.vision, QwenVisionConfig):
            vision = dataclasses.asdict(self.vision) | {"model_type": "qwen2_5_vl_vision", "hidden_act": "silu"}
            vision["fullatt_block_indexes"] = list(self.vision.fullatt_block_indexes)
            vision |= {"in_chans": self.vision.in_channels, "spatial_patch_size": self.vision.patch_size}
            return {
                "architectures": ["Qwen2_5_VLForConditionalGeneration"],
                "model_type": "qwen2_5_vl",
                **common,
                "text_config": {**text, "model_type": "qwen2_5_vl_text"},
                "vision_config": vision,
            }
        assert isinstance(self.vision, InternVisionConfig)
        return {
            "architectures": ["InternVLForConditionalGeneration"],
            "model_type": "internvl",
            **common,
            "image_seq_length": self.vision.tile_tokens(*self.vision.image_size),
            "downsample_ratio": 1 / self.vision.downsample,
            "projector_hidden_act": "gelu",
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "default",
            "text_config": {**text, "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]},
            "vision_config": _intern_vision_to_hf(self.vision),
        }


_QWEN_VL_TOKENS = {
    "image_token_id": 151655, "video_token_id": 151656, "vision_start_token_id": 151652, "vision_end_token_id": 151653
}  # fmt: skip
_INTERNVL_TOKENS = {"image_token_id": 151667, "vision_start_token_id": 151665, "vision_end_token_id": 151666}


def _of_size(size: str, table: Mapping[str, Any], family: str) -> Any:
    if size not in table:
        raise InputError(f"{family} has no size {size!r}; it has {', '.join(table)}")
    return table[size]


def _sized_text(size: str, family: str, **fields: Any) -> TextConfig:
    decoder = _of_size(size, sizes.QWEN2_5, family)
    tied = size in sizes.QWEN2_5_TIED
    return TextConfig(
        **decoder._asdict(), head_dim=decoder.hidden_size // decoder.num_attention_heads,
        vocab_size=151936 if tied else 152064, tie_word_embeddings=tied, **fields,
    )  # fmt: skip


def _read_qwen2(raw: dict[str, Any], name: str) -> ModelConfig:
    return ModelConfig("qwen2", _text_from_hf(raw, name, tie=bool(raw.get("tie_word_embeddings", False))))


def _read_qwen2_5_vl(raw: dict[str, Any], name: str) -> ModelConfig:
    text = {**raw, **raw.get("text_config", {})}
    tie = bool(raw.get("tie_word_embeddings", text.get("tie_word_embeddings", False)))
    tokens = {field: raw.get(field, default) for field, default in _QWEN_VL_TOKENS.items()}
    vision = _qwen_vision_from_hf(raw["vision_config"], name)
    return ModelConfig("qwen2_5_vl", _text_from_hf(text, name, tie=tie), vision, **tokens)


def _read_internvl(raw: dict[str, Any], name: str) -> ModelConfig:
    """The `-hf` form (HF `InternVLConfig`)."""
    _refuse_unless(
        raw, name, vision_feature_layer=(-1, [-1]), vision_feature_select_strategy=("default",),
        projector_hidden_act=("gelu",),
    )  # fmt: skip
    vision = dict(raw["vision_config"])
    _refuse_unless(
        vision, f"{name}: vision_config", use_mean_pooling=(True,), use_absolute_position_embeddings=(True,),
        use_mask_token=(False,),
    )  # fmt: skip
    return _internvl(raw, raw["text_config"], vision, name)


def _read_internvl_chat(raw: dict[str, Any], name: str) -> ModelConfig:
    """OpenGVLab's own form."""
    _refuse_unless({"ps_version": "v1", **raw}, name, select_layer=(-1,), ps_version=("v2",))
    vision = dict(raw["vision_config"])
    vision |= {"attention_bias": vision["qkv_bias"], "use_qk_norm": vision["qk_normalization"]}
    return _internvl(raw, raw["llm_config"], vision, name)


def _internvl(raw: dict[str, Any], text: dict[str, Any], vision: dict[str, Any], name: str) -> ModelConfig:
    tie = bool(raw.get("tie_word_embeddings", text.get("tie_word_embeddings", False)))
    tokens = {field: raw.get(field, default) for field, default in _INTERNVL_TOKENS.items()}
    text_config = _text_from_hf(text, name, tie=tie)
    return ModelConfig("internvl", text_config, _intern_vision_from_hf(raw, vision, text_config, name), **tokens)


_READERS: dict[str, Callable[[dict[str, Any], str], ModelConfig]] = {
    "qwen2_5_vl": _read_qwen2_5_vl,
    "qwen2": _read_qwen2,
    "internvl": _read_internvl,
    "internvl_chat": _read_internvl_chat,
}


def _text_from_hf(raw: dict[str, Any], name: str, *, tie: bool) -> TextConfig:
    _refuse_unless(
        raw, name, model_type=("qwen2", "qwen2_5_vl", "qwen2_5_vl_text"), hidden_act=("silu",),
        use_sliding_window=(False,),
    )  # fmt: skip
    rope = {**(raw.get("rope_scaling") or {}), **(raw.get("rope_parameters") or {})}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    section = rope.get("mrope_section")
    if kind not in (("default", "mrope") if section else ("default", "dynamic")):
        raise InputError(
            f"{name}: rotary positions of type {kind!r}{' with M-RoPE' if section else ''} are not supported; "
            "known are 'default', 'mrope' and 'dynamic'; take rope_scaling out to use the model without it"
        )
    heads = raw["num_attention_heads"]
    return TextConfig(
        vocab_size=raw["vocab_size"],
        hidden_size=raw["hidden_size"],
        intermediate_size=raw["intermediate_size"],
        num_hidden_layers=raw["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=raw["num_key_value_heads"],
        head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
        rms_norm_eps=raw["rms_norm_eps"],
        rope_theta=float(rope.get("rope_theta") or raw.get("rope_theta") or 1e6),
        mrope_section=tuple(section) if section else None,
        rope_dynamic_factor=float(rope["factor"]) if kind == "dynamic" else None,
        tie_word_embeddings=tie,
        max_position_embeddings=raw.get("max_position_embeddings", 32768),
    )


def _text_to_hf(text: TextConfig) -> dict[str, Any]:
    fields = dataclasses.asdict(text)
    section, factor, theta = (fields.pop(key) for key in ("mrope_section", "rope_dynamic_factor", "rope_theta"))
    kind: dict[str, Any] = {"rope_type": "default" if factor is None else "dynamic"}
    if factor is not None:
        kind["factor"] = factor
    if section is not None:
        kind["mrope_section"] = list(section)
    fields |= {"hidden_act": "silu", "use_sliding_window": False, "attention_dropout": 0.0, "initializer_range": 0.02}
    fields["rope_parameters"] = {**kind, "rope_theta": theta}
    # Readers older than transformers 5 look for these two names.
    old_kind = "mrope" if section is not None else kind["rope_type"]
    plain = section is None and factor is None
    return fields | {"rope_theta": theta, "rope_scaling": None if plain else {**kind, "type": old_kind}}


def _qwen_vision_from_hf(raw: dict[str, Any], name: str) -> QwenVisionConfig:
    _refuse_unless(raw, f"{name}: vision_config", hidden_act=("silu",))
    return QwenVisionConfig(
        depth=raw["depth"],
        hidden_size=raw["hidden_size"],
        intermediate_size=raw["intermediate_size"],
        num_heads=raw["num_heads"],
        out_hidden_size=raw["out_hidden_size"],
        fullatt_block_indexes=tuple(raw["fullatt_block_indexes"]),
        patch_size=raw.get("patch_size", raw.get("spatial_patch_size", 14)),
        temporal_patch_size=raw.get("temporal_patch_size", 2),
        spatial_merge_size=raw.get("spatial_merge_size", 2),
        window_size=raw.get("window_size", 112),
        in_channels=raw.get("in_channels", raw.get("in_chans", 3)),
        tokens_per_second=raw.get("tokens_per_second", 2),
    )


def _intern_vision_from_hf(
    root: dict[str, Any], raw: dict[str, Any], text: TextConfig, name: str
) -> InternVisionConfig:
    _refuse_unless(
        raw, f"{name}: vision_config", norm_type=("layer_norm", "rms_norm"), hidden_act=("gelu",), num_channels=(3,)
    )
    _refuse_unless(root, name, downsample_ratio=(0.5, 0.25, 1.0))
    downsample = round(1 / root.get("downsample_ratio", 0.5))
    patch, _ = _square(raw["patch_size"], "patch_size", name)
    image_size = _square(raw["image_size"], "image_size", name)
    if image_size[0] % (patch * downsample):
        raise InputError(f"{name}: image_size {image_size[0]} is no multiple of {patch * downsample}, a token's pixels")
    return InternVisionConfig(
        hidden_size=raw["hidden_size"],
        intermediate_size=raw["intermediate_size"],
        num_hidden_layers=raw["num_hidden_layers"],
        num_attention_heads=raw["num_attention_heads"],
        out_hidden_size=text.hidden_size,
        norm=raw["norm_type"],
        qkv_bias=raw["attention_bias"],
        qk_norm=raw["use_qk_norm"],
        image_size=image_size,
        patch_size=patch,
        layer_norm_eps=raw["layer_norm_eps"],
        downsample=downsample,
    )


def _intern_vision_to_hf(vision: InternVisionConfig) -> dict[str, Any]:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "layer_norm_eps")
    return {
        "model_type": "internvl_vision",
        "architectures": ["InternVLVisionModel"],
        **{name: getattr(vision, name) for name in names},
        "norm_type": vision.norm,
        "attention_bias": vision.qkv_bias,
        "use_qk_norm": vision.qk_norm,
        "image_size": list(vision.image_size),
        "patch_size": [vision.patch_size, vision.patch_size],
        "num_channels": 3,
        "hidden_act": "gelu",
        "layer_scale_init_value": 0.1,
        "use_absolute_position_embeddings": True,
        "use_mask_token": False,
        "use_mean_pooling": True,
    }


def _refuse_unless(raw: dict[str, Any], name: str, **supported: tuple[Any, ...]) -> None:
    """Raise InputError where a field is there with a value that the networks do not compute."""
    for field, values in supported.items():
        if field in raw and raw[field] not in values:
            known = " or ".join(map(repr, values))
            raise InputError(f"{name}: {field} {raw[field]!r} is not supported; it must be {known}")


def _square(value: Any, field: str, name: str) -> tuple[int, int]:
    """A size that a config gives as one number or as (height, width)."""
    height, width = value if isinstance(value, list | tuple) else (value, value)
    if height != width:
        raise InputError(f"{name}: vision_config: {field} {value} is not a square, which is not supported")
    return height, width


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; name a Hugging Face model folder") from None
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error}); fetch the file again") from None
