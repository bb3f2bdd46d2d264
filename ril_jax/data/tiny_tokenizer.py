"""A small tokenizer in the shape of Qwen2.5-VL's or InternVL3's, trained at set-up, so that nothing is downloaded."""

import json
import unicodedata
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from ril_jax.data.families import INTERNVL, INTERNVL_TOKEN_NAMES, QWEN, Family
from ril_jax.data.images import QwenImageProcessor
from ril_jax.data.tiles import TileImageProcessor
from ril_jax.errors import InputError

_TURNS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
SPECIAL_TOKENS = {  # of each family, as far as a small model needs them
    QWEN: (*_TURNS, "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
    INTERNVL: (*_TURNS, *INTERNVL_TOKEN_NAMES.values()),
}

# How Qwen2's tokenizers split text before byte-pair merging: contractions, words with one leading character (mostly a
# space), single digits, runs of punctuation, white space.
_PRE_TOKENS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# The turns of both families, without Qwen's default system prompt: a small model's context is better spent on images.
_CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] }}{% else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' or 'image' in part or 'image_url' in part -%}
{{ 'IMAGE' }}
{%- elif part['type'] == 'video' or 'video' in part -%}
{{ 'VIDEO' }}
{%- elif 'text' in part -%}
{{ part['text'] }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}
"""
_WRITTEN = {  # what the template puts for an image and for a video, jinja strings
    QWEN: ("<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|><|video_pad|><|vision_end|>"),
    INTERNVL: ("<IMG_CONTEXT>\\n", "<video>\\n"),
}


def build_tokenizer(
    folder: str | Path,
    texts: Iterable[str],
    *,
    vocab_size: int = 1024,
    images: QwenImageProcessor | TileImageProcessor | None = None,
) -> Tokenizer:
    """Train a byte-level BPE in which each word of `texts` is one token, and write it as a released model's files.

    `vocab_size` is an upper bound: merging stops when all words are whole. Special tokens come last, as in the released
    vocabularies. `images` decides the family whose tokens and template are written, and how images are processed:
    Qwen2.5-VL's (by default without scaling images whose sides are multiples of 28), or InternVL3's in the `-hf` form.
    Written are tokenizer.json, tokenizer_config.json with the chat template, the processor's files and
    generation_config.json; transformers' AutoTokenizer and AutoImageProcessor load the folder.
    Raises InputError if `vocab_size` is too small to hold every word.
    """
    images = images or QwenImageProcessor(min_pixels=28 * 28, max_pixels=12 * 12 * 28 * 28)
    family = INTERNVL if isinstance(images, TileImageProcessor) else QWEN
    specials = SPECIAL_TOKENS[family]
    texts = [unicodedata.normalize("NFC", text) for text in texts]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PRE_TOKENS), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(specials),
        min_frequency=1,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    words = {word for text in set(texts) for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)}
    split = sorted(word for word in words if tokenizer.token_to_id(word) is None)
    if split:
        raise InputError(
            f"vocab_size {vocab_size} is too small: {len(split)} words of the texts are not single tokens,"
            f" {split[0]!r} among them; raise it by about {4 * len(split)}"
        )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    _write(folder / "tokenizer_config.json", _tokenizer_config(tokenizer, family))
    for name, content in images.files().items():
        _write(folder / name, content)
    ids = {token: tokenizer.token_to_id(token) for token in specials}
    end, pad = ids["<|im_end|>"], ids["<|endoftext|>"]
    _write(folder / "generation_config.json", {"eos_token_id": [end, pad], "pad_token_id": pad, "do_sample": False})
    return tokenizer


def _tokenizer_config(tokenizer: Tokenizer, family: Family) -> dict:
    specials = SPECIAL_TOKENS[family]
    image, video = _WRITTEN[family]
    added = {}
    for token in specials:
        flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
        added[str(tokenizer.token_to_id(token))] = {"content": token, **flags}
    named = INTERNVL_TOKEN_NAMES if family == INTERNVL else {}
    return {
        "tokenizer_class": "Qwen2Tokenizer",
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "additional_special_tokens": list(specials[1:]),
        "bos_token": None,
        "chat_template": _CHAT_TEMPLATE.replace("IMAGE", image).replace("VIDEO", video),
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 32768,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "unk_token": None,
        **named,
    }


def _write(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
