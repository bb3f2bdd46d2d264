"""What a model is: frozen configs with the field names of transformers, read from any `config.json` of the families."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from ril_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """A Qwen2.5 text decoder (HF `Qwen2Config` / `Qwen2_5_VLTextConfig`)."""

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
      *_token_id: ids of the image and video placeholders and of the vision brackets; None for text-only models.
    """

    family: str
    text: TextConfig
    vision: QwenVisionConfig | InternVisionConfig | None = None
    image_token_id: int | None = None
    video_token_id: int | None = None
    vision_start_token_id: int | None = None
    vision_end_token_id: int | None = None

    @classmethod
    def from_folder(cls, folder: str | Path) -> "ModelConfig":
        """Read `config.json` of an HF folder. Raises InputError where it is missing, broken or of another family."""
        return cls.from_hf(_read_json(Path(folder) / "config.json"), name=str(Path(folder) / "config.json"))

    @classmethod
    def from_hf(cls, raw: dict[str, Any], *, name: str = "config.json") -> "ModelConfig":
        """From a parsed `config.json`: flat hub form, nested v5 form, and the mixtures in between."""
        family = raw.get("model_type")
        if family not in ("qwen2_5_vl", "qwen2"):
            raise InputError(f"{name}: model_type {family!r} is not supported; known are 'qwen2_5_vl' and 'qwen2'")
        try:
            text_raw = {**raw, **raw.get("text_config", {})} if family == "qwen2_5_vl" else raw
            text = _text_config(
                text_raw, tie=bool(raw.get("tie_word_embeddings", text_raw.get("tie_word_embeddings", False)))
            )
            if family == "qwen2":
                return cls(family, text)
            return cls(
                family,
                text,
                _vision_config(raw["vision_config"]),
                image_token_id=raw.get("image_token_id", 151655),
                video_token_id=raw.get("video_token_id", 151656),
                vision_start_token_id=raw.get("vision_start_token_id", 151652),
                vision_end_token_id=raw.get("vision_end_token_id", 151653),
            )
        except KeyError as error:
            raise InputError(
                f"{name}: the field {error.args[0]!r} is missing; add it or fetch the file again"
            ) from None

    def to_hf(self) -> dict[str, Any]:
        """A `config.json` in the nested form that transformers 5 writes and every recent release reads."""
        text = dataclasses.asdict(self.text)
        section = text.pop("mrope_section")
        theta = text.pop("rope_theta")
        tie = text.pop("tie_word_embeddings")
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
        if section is not None:
            rope["mrope_section"] = list(section)
        text |= {"hidden_act": "silu", "use_sliding_window": False, "attention_dropout": 0.0, "initializer_range": 0.02}
        text |= {"rope_parameters": rope, "tie_word_embeddings": tie}
        # Readers older than transformers 5 look for these two names.
        text |= {
            "rope_theta": theta,
            "rope_scaling": {"type": "mrope", "mrope_section": list(section)} if section else None,
        }
        if self.family == "qwen2":
            return {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", **text}
        assert self.vision is not None
        vision = dataclasses.asdict(self.vision) | {"model_type": "qwen2_5_vl_vision", "hidden_act": "silu"}
        vision["fullatt_block_indexes"] = list(self.vision.fullatt_block_indexes)
        vision |= {"in_chans": self.vision.in_channels, "spatial_patch_size": self.vision.patch_size}
        return {
            "architectures": ["Qwen2_5_VLForConditionalGeneration"],
            "model_type": "qwen2_5_vl",
            "tie_word_embeddings": tie,
            "image_token_id": self.image_token_id,
            "video_token_id": self.video_token_id,
            "vision_start_token_id": self.vision_start_token_id,
            "vision_end_token_id": self.vision_end_token_id,
            "text_config": {**text, "model_type": "qwen2_5_vl_text"},
            "vision_config": vision,
        }


def _text_config(raw: dict[str, Any], *, tie: bool) -> TextConfig:
    rope = raw.get("rope_parameters") or {}
    scaling = raw.get("rope_scaling") or {}
    section = rope.get("mrope_section") or scaling.get("mrope_section")
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
        tie_word_embeddings=tie,
        max_position_embeddings=raw.get("max_position_embeddings", 32768),
    )


def _vision_config(raw: dict[str, Any]) -> QwenVisionConfig:
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


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; name a Hugging Face model folder") from None
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error}); fetch the file again") from None
