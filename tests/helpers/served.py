"""A tiny Qwen2.5-VL folder to serve, a config for it, and what transformers says of the same requests."""

import base64
import contextlib
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from helpers import hf_models
from helpers.running import running as running
from helpers.tokenizer_folder import build_tokenizer_folder
from ml_collections import ConfigDict
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer

from ril_jax.config import serving_config
from ril_jax.sampling.engine import Engine

# The learned part of the tokenizer ends where the placeholder ids of the tiny models begin.
_LEARNED, _ALL = 285, 294


class Reference:
    """transformers' template, tokenizer, image processor and network, in one folder with `served_config` around it."""

    def __init__(self, folder: Path):
        self.folder = folder
        sizes = {"vocab_size": _ALL, "num_hidden_layers": 2}
        self.tiny = hf_models.save_qwen2_5_vl(folder, text=sizes, vision={"depth": 2})
        build_tokenizer_folder(folder, vocab_size=_LEARNED, max_pixels=8 * 28 * 28)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
        assert self.tokenizer.convert_tokens_to_ids("<|image_pad|>") == hf_models.IMAGE
        path = folder / "generation_config.json"
        self.eos_token_ids = [*json.loads(path.read_text())["eos_token_id"], hf_models.EOS]
        path.write_text(json.dumps({"eos_token_id": self.eos_token_ids, "pad_token_id": hf_models.PAD}))

    def prompt(self, messages: list[dict], *images: Image.Image) -> hf_models.Prompt:
        """Messages in transformers' form, images as bare parts."""
        rendered = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        patched = []
        for image in images:
            out = self.processor(image, return_tensors="np")
            patched.append(hf_models.Image(out["pixel_values"], tuple(out["image_grid_thw"][0].tolist())))
            rendered = rendered.replace("<|image_pad|>", "<|unused|>" * (len(out["pixel_values"]) // 4), 1)
        ids = self.tokenizer(rendered.replace("<|unused|>", "<|image_pad|>"))["input_ids"]
        return hf_models.Prompt(np.array(ids, np.int32), tuple(patched))

    def greedy(self, prompt: hf_models.Prompt, max_tokens: int, **kwargs) -> list[int]:
        """Token ids, the end-of-sequence token among them."""
        return hf_models.generate(
            self.tiny.hf, prompt, max_new_tokens=max_tokens, eos_token_ids=self.eos_token_ids, **kwargs
        ).tolist()

    def logprobs(self, prompt: hf_models.Prompt, ids: list[int]) -> torch.Tensor:
        """[R, V] log-probabilities of each place of `ids`, which follow the prompt."""
        row = hf_models.Prompt(np.concatenate([prompt.token_ids, np.array(ids, np.int32)]), prompt.images)
        with torch.no_grad():
            logits = hf_models.logits(self.tiny.hf, row)[0, -len(ids) - 1 : -1]
        return torch.log_softmax(logits, dim=-1)

    def text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)


def served_config(folder: Path, **changes) -> ConfigDict:
    """A config with an engine of few and small programs; `changes` are fields of its `server` section."""
    c = serving_config()
    c.checkpoint, c.dtype = str(folder), "float32"
    c.server.model_name = "tiny"
    c.engine.update(
        {"slots": 8, "small_slots": 0, "max_model_len": 256, "page_size": 16, "prefill": ((32, 4),)}
        | {"decode_steps": 4, "attention_block": 64, "feature_rows": 64}
    )
    c.server.update(changes)
    return c


def picture(height: int, width: int) -> Image.Image:
    rng = np.random.default_rng(height * 1000 + width)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def data_url(image: Image.Image, kind: str = "PNG", **options) -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return f"data:image/{kind.lower()};base64," + base64.b64encode(buffer.getvalue()).decode()


def image_part(url: str, **details) -> dict:
    return {"type": "image_url", "image_url": {"url": url, **details}}


def wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    """Until it is true, which it must be in time."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.01)


def assert_idle(engine: Engine) -> None:
    """Nothing waits or runs (after a moment), and every page and slot has come back."""
    wait_for(lambda: engine.num_waiting == 0 and engine.num_running == 0)
    assert engine.cache_use == 0
    assert engine._reserved == 0


class Gate:
    """Stops an engine between two of its steps while it is closed."""

    def __init__(self, engine: Engine):
        self._open = threading.Event()
        self._open.set()
        step = engine.step

        def gated() -> bool:
            self._open.wait()
            return step()

        engine.step = gated  # type: ignore[method-assign]

    @contextlib.contextmanager
    def closed(self) -> Iterator[None]:
        self._open.clear()
        try:
            yield
        finally:
            self._open.set()
