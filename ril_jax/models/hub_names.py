"""The names that checkpoints give to parameters: every layout in the wild, and the one that parameters carry.

Parameters carry canonical names: the decoder's as a text-only Qwen2.5 has them (`model.layers.0...`, `lm_head.weight`),
the towers' as the hub has them (`visual...` of Qwen2.5-VL; `vision_tower...`, `multi_modal_projector...` of InternVL).
"""

import re

_ORIGINAL_LAYER, _HF_LAYER = r"^vision_model\.encoder\.layers\.(\d+)\.", r"vision_tower.encoder.layer.\1."
# From any layout to the canonical names; the first pattern that matches is used (canonical names match none).
_LAYOUTS = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        # What transformers has written: in memory of release 5, InternVL on the hub, base models without a head.
        (r"^model\.language_model\.(?=embed_tokens|layers|norm)", "model."),
        (r"^language_model\.model\.", "model."),
        (r"^language_model\.(?=lm_head)", ""),
        (r"^language_model\.(?=embed_tokens|layers|norm)", "model."),
        (r"^model\.(?=visual\.|vision_tower\.|multi_modal_projector\.)", ""),
        (r"^(?=embed_tokens\.|layers\.|norm\.)", "model."),
        # OpenGVLab's own layout of InternVL.
        (r"^vision_model\.embeddings\.class_embedding$", "vision_tower.embeddings.cls_token"),
        (r"^vision_model\.embeddings\.position_embedding$", "vision_tower.embeddings.position_embeddings"),
        (r"^vision_model\.embeddings\.patch_embedding\.", "vision_tower.embeddings.patch_embeddings.projection."),
        (_ORIGINAL_LAYER + r"norm1\.", _HF_LAYER + "layernorm_before."),
        (_ORIGINAL_LAYER + r"norm2\.", _HF_LAYER + "layernorm_after."),
        (_ORIGINAL_LAYER + r"attn\.proj\.", _HF_LAYER + "attention.projection_layer."),
        (_ORIGINAL_LAYER + r"attn\.(?=[qk]_norm\.)", _HF_LAYER + "attention."),
        (_ORIGINAL_LAYER + r"ls(?=[12]$)", _HF_LAYER + "lambda_"),
        (_ORIGINAL_LAYER + r"(?=mlp\.)", _HF_LAYER),
        (r"^mlp1\.0\.", "multi_modal_projector.layer_norm."),
        (r"^mlp1\.1\.", "multi_modal_projector.linear_1."),
        (r"^mlp1\.3\.", "multi_modal_projector.linear_2."),
    )
)
# Tensors that hold several parameters, one after another in equal parts of their rows.
_FUSED = ((re.compile(_ORIGINAL_LAYER + r"attn\.qkv\."), tuple(f"{_HF_LAYER}attention.{x}_proj." for x in "qkv")),)


def hub_name(key: str) -> str:
    """The canonical name of a checkpoint key that stands for one parameter, in any of the layouts."""
    for pattern, replacement in _LAYOUTS:
        if pattern.match(key):
            return pattern.sub(replacement, key, count=1)
    return key


def hub_names(key: str) -> tuple[str, ...]:
    """The canonical names of what a checkpoint key holds; of n names each has one n-th of the rows, in turn."""
    for pattern, replacements in _FUSED:
        if pattern.match(key):
            return tuple(pattern.sub(replacement, key, count=1) for replacement in replacements)
    return (hub_name(key),)


def export_name(name: str, family: str) -> str:
    """The name that the hub's checkpoints of `ModelConfig.family` give to the parameter of a canonical name."""
    if family == "internvl" and name.startswith(("model.", "lm_head.")):
        return f"language_model.{name}"
    return name
