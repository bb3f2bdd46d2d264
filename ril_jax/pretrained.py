"""A Hugging Face model folder as one thing: config, tokenizer with template, image processor, network."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from ril_jax import sharding
from ril_jax.data.chat import ChatTokenizer
from ril_jax.errors import InputError
from ril_jax.models import hub
from ril_jax.models.config import ModelConfig
from ril_jax.models.parameters import Network, Params
from ril_jax.models.tensor_files import SafetensorsFolder
from ril_jax.models.vlm import VisionLanguageModel


@dataclasses.dataclass(frozen=True, eq=False)
class Pretrained:
    """What a checkpoint folder holds, without its weights; `load_params` reads those."""

    folder: Path
    config: ModelConfig
    chat: ChatTokenizer
    network: Network

    @classmethod
    def open(
        cls,
        checkpoint: str | Path,
        *,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        max_tiles: int | None = None,
    ) -> "Pretrained":
        """Open a local folder or a hub id. Raises InputError where a file is missing or of an unknown kind."""
        folder = hub.resolve(checkpoint)
        config = ModelConfig.from_folder(folder)
        # The file decides whether the head is tied, not the flag: both spellings are wrong in the wild.
        text = dataclasses.replace(config.text, tie_word_embeddings=not hub.has_own_head(folder))
        config = dataclasses.replace(config, text=text)
        chat = ChatTokenizer.from_pretrained(folder, min_pixels=min_pixels, max_pixels=max_pixels, max_tiles=max_tiles)
        if chat.image_token_id is not None:  # the tokenizer decides: OpenGVLab's configs name no tokens
            config = dataclasses.replace(config, image_token_id=chat.image_token_id)
        return cls(folder, config, chat, make_network(config))

    def with_config(self, config: ModelConfig) -> "Pretrained":
        """The same folder read as a network of another config, for parameters that are made to fit it."""
        if config == self.config:
            return self
        return dataclasses.replace(self, config=config, network=make_network(config))

    def load_params(
        self, mesh: Mesh, *, dtype: Any = jnp.float32, progress: Callable[[int, int], None] | None = None
    ) -> Params:
        """The weights in `dtype`, each read straight into its sharding."""
        shardings = sharding.param_shardings(self.network.specs, mesh)
        return hub.load_params(self.folder, self.network, dtype=dtype, shardings=shardings, progress=progress)


def make_network(config: ModelConfig, *, head: str = "vocab") -> Network:
    """The network of a config; `head="scalar"` makes it a discriminator."""
    return Network(lambda: VisionLanguageModel(config, head=head))


# What belongs to a checkpoint beside weights and config.json: it is carried over byte for byte.
_CARRIED = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt",
    "added_tokens.json", "special_tokens_map.json", "chat_template.*", "preprocessor_config.json",
    "processor_config.json", "video_preprocessor_config.json", "LICENSE*", "NOTICE*",
)  # fmt: skip


def save_folder(
    folder: str | Path,
    source: Pretrained,
    params: Mapping[str, Any],
    *,
    dtype: Any = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write an HF folder that transformers and vLLM load: weights in the hub layout, and everything around them.

    Parameters that `params` lacks (those that were not trained, or all) are taken from `source.folder`. The weights
    are written in `dtype`, by default that of `params`. Config, tokenizer, template and processor files are those of
    `source.folder`; only a folder in OpenGVLab's form is brought into transformers'. The folder appears, or takes the
    place of one that is there, when it is complete. Where several processes run, all must call this. Raises InputError
    where it cannot be written.
    """
    target = Path(folder)
    unfinished, old = (target.with_name(f".{target.name}.{state}") for state in ("incomplete", "old"))
    is_writer = jax.process_index() == 0
    dtype = np.dtype(next(iter(params.values())).dtype if dtype is None else dtype)
    missing = source.network.specs.keys() - params.keys()
    try:
        if is_writer:
            shutil.rmtree(unfinished, ignore_errors=True)
        hub.save_params(
            unfinished, source.network, params, family=source.config.family, dtype=dtype, progress=progress,
            rest=SafetensorsFolder(source.folder) if missing else None,
        )  # fmt: skip
        if is_writer:
            _write_rest(unfinished, source, dtype)
            shutil.rmtree(old, ignore_errors=True)
            if target.exists():
                target.rename(old)
            unfinished.rename(target)
            shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise InputError(f"{target}: it cannot be written ({error.strerror or error}); name another folder") from error
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"saved {target}")


def _write_rest(folder: Path, source: Pretrained, dtype: np.dtype) -> None:
    original = json.loads((source.folder / "config.json").read_text())
    converted = original["model_type"] == "internvl_chat"  # OpenGVLab's form, and these are not its names any more
    if converted:
        original = source.config.to_hf() | {"dtype": None}
        original["text_config"]["eos_token_id"] = source.chat.end_of_turn_token_id
    # Otherwise the original's spelling is kept, so that whatever read the checkpoint before reads this one too.
    original["tie_word_embeddings"] = source.config.text.tie_word_embeddings
    for part in (original, *(value for value in original.values() if isinstance(value, dict))):
        for key in ("torch_dtype", "dtype"):
            if key in part:
                part[key] = dtype.name
        if "tie_word_embeddings" in part:
            part["tie_word_embeddings"] = source.config.text.tie_word_embeddings
    (folder / "config.json").write_text(json.dumps(original, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if converted or not (source.folder / "tokenizer.json").exists():
        source.chat.save(folder)
    for pattern in ("generation_config.json", "LICENSE*", "NOTICE*") if converted else _CARRIED:
        for path in source.folder.glob(pattern):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)
