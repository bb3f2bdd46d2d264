"""A small tokenizer in the shape of Qwen2.5-VL's, trained at set-up, so that the embedded default needs no download."""

import json
import unicodedata
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from ril_jax.errors import InputError

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

# How Qwen2's tokenizers split text before byte-pair merging: contractions, words with one leading character (mostly a
# space), single digits, runs of punctuation, white space.
_PRE_TOKENS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Qwen2.5-VL's turns, without its default system prompt: a small model's context is better spent on the image.
_CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] }}{% else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' or 'image' in part or 'image_url' in part -%}
<|vision_start|><|image_pad|><|vision_end|>
{%- elif part['type'] == 'video' or 'video' in part -%}
<|vision_start|><|video_pad|><|vision_end|>
{%- elif 'text' in part -%}
{{ part['text'] }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}
"""


def build_tokenizer(
    folder: str | Path,
    texts: Iterable[str],
    *,
    vocab_size: int = 1024,
    min_pixels: int = 28 * 28,
    max_pixels: int = 12 * 12 * 28 * 28,
) -> Tokenizer:
    """Train a byte-level BPE in which each word of `texts` is one token, and write it as Qwen2.5-VL's files.

    `vocab_size` is an upper bound: merging stops when all words are whole. Special tokens come last, as in Qwen's
    vocabulary. Written are tokenizer.json, tokenizer_config.json with the chat template, preprocessor_config.json
    (images between `min_pixels` and `max_pixels` with sides that are multiples of 28 pass unscaled) and
    generation_config.json; transformers' AutoTokenizer and AutoImageProcessor load the folder.
    Raises InputError if `vocab_size` is too small to hold every word.
    """
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
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
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
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    _write(folder / "tokenizer_config.json", _tokenizer_config(tokenizer))
    _write(folder / "preprocessor_config.json", _preprocessor_config(min_pixels, max_pixels))
    ids = {token: tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}
    end, pad = ids["<|im_end|>"], ids["<|endoftext|>"]
    _write(folder / "generation_config.json", {"eos_token_id": [end, pad], "pad_token_id": pad, "do_sample": False})
    return tokenizer


def _tokenizer_config(tokenizer: Tokenizer) -> dict:
    added = {}
    for token in SPECIAL_TOKENS:
        flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
        added[str(tokenizer.token_to_id(token))] = {"content": token, **flags}
    return {
        "tokenizer_class": "Qwen2Tokenizer",
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
        "bos_token": None,
        "chat_template": _CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 32768,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "unk_token": None,
    }


def _preprocessor_config(min_pixels: int, max_pixels: int) -> dict:
    return {
        "image_processor_type": "Qwen2VLImageProcessor",
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "merge_size": 2,
        "min_pixels": min_pixels,
        "max_pixels": max_pixels,
        "patch_size": 14,
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": min_pixels, "longest_edge": max_pixels},
        "temporal_patch_size": 2,
    }


def _write(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
