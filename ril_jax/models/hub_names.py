"""The names that checkpoints give to parameters: every layout in the wild, mapped to the one that parameters carry."""

import re

# From any layout in the wild to the hub's own; the first pattern that matches is used (hub names match none).
_LAYOUTS = (
    (re.compile(r"^model\.language_model\.(?=embed_tokens|layers|norm)"), "model."),
    (re.compile(r"^language_model\.model\."), "model."),
    (re.compile(r"^language_model\.(?=lm_head)"), ""),
    (re.compile(r"^language_model\.(?=embed_tokens|layers|norm)"), "model."),
    (re.compile(r"^model\.visual\."), "visual."),
    (re.compile(r"^(?=embed_tokens\.|layers\.|norm\.)"), "model."),
)


def hub_name(key: str) -> str:
    """The hub-layout name of a checkpoint key in any of the layouts that transformers has written."""
    for pattern, replacement in _LAYOUTS:
        if pattern.match(key):
            return pattern.sub(replacement, key, count=1)
    return key
