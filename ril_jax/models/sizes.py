"""The sizes in which the families were released, as their `config.json` files state them; numbers only."""

from typing import NamedTuple


class DecoderSize(NamedTuple):
    """A Qwen2.5 decoder; what it leaves out is the same in every size."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int


class InternViTSize(NamedTuple):
    """An InternViT; the 6B has RMSNorm, normed queries and keys, and no bias at queries, keys and values."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    norm: str
    qkv_bias: bool
    qk_norm: bool


QWEN2_5 = {
    "0.5b": DecoderSize(896, 4864, 24, 14, 2),
    "1.5b": DecoderSize(1536, 8960, 28, 12, 2),
    "3b": DecoderSize(2048, 11008, 36, 16, 2),
    "7b": DecoderSize(3584, 18944, 28, 28, 4),
    "14b": DecoderSize(5120, 13824, 48, 40, 8),
    "32b": DecoderSize(5120, 27648, 64, 40, 8),
    "72b": DecoderSize(8192, 29568, 80, 64, 8),
}
QWEN2_5_TIED = {"0.5b", "1.5b", "3b"}  # these have 151,936 rows in their embedding, the others 152,064
QWEN2_5_LONG_BASE = {"1.5b", "7b", "14b", "32b", "72b"}  # base models with 131,072 positions; all others have 32,768
QWEN2_5_COARSE_BASE = {"14b", "32b", "72b"}  # base models with a norm epsilon of 1e-5; all others have 1e-6

QWEN2_5_VL_VISION_FF = {"3b": 3420, "7b": 3420, "32b": 3456, "72b": 3456}

INTERN_VIT = {
    "300m": InternViTSize(1024, 4096, 24, 16, "layer_norm", True, False),
    "6b": InternViTSize(3200, 12800, 45, 25, "rms_norm", False, True),
}
INTERNVL3 = {  # size: (decoder, vision tower)
    "1b": ("0.5b", "300m"),
    "2b": ("1.5b", "300m"),
    "8b": ("7b", "300m"),
    "14b": ("14b", "300m"),
    "38b": ("32b", "6b"),
    "78b": ("72b", "6b"),
}
