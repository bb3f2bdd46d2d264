"""A Hugging Face model folder as one thing: config, tokenizer with template, image processor, network."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from ril_jax import sharding
from ril_jax.data.chat import ChatTokenizer
from ril_jax.models import hub
from ril_jax.models.config import ModelConfig
from ril_jax.models.parameters import Network, Params
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

    def load_params(
        self, mesh: Mesh, *, dtype: Any = jnp.float32, progress: Callable[[int, int], None] | None = None
    ) -> Params:
        """The weights in `dtype`, each read straight into its sharding."""
        shardings = sharding.param_shardings(self.network.specs, mesh)
        return hub.load_params(self.folder, self.network, dtype=dtype, shardings=shardings, progress=progress)


def make_network(config: ModelConfig, *, head: str = "vocab") -> Network:
    """The network of a config; `head="scalar"` makes it a discriminator."""
    return Network(lambda: VisionLanguageModel(config, head=head))


def save_folder(folder: str | Path, source: Pretrained, params: Any, *, network: Network | None = None) -> None:
    """Write an HF folder: weights in the hub layout, config, tokenizer, template, processor and generation config.

    Generation config and licence come from `source.folder` as they are. The folder appears when it is complete.
    """
    target = Path(folder)
    folder = target.with_name(f".{target.name}.incomplete")
    if folder.exists():
        shutil.rmtree(folder)
    hub.save_params(folder, network or source.network, params, family=source.config.family)
    original = json.loads((source.folder / "config.json").read_text())
    if original["model_type"] == "internvl_chat":  # OpenGVLab's form, and these are not its names any more
        original = source.config.to_hf() | {"dtype": None}
        original["text_config"]["eos_token_id"] = source.chat.end_of_turn_token_id
    # Otherwise the original's spelling is kept, so that whatever read the checkpoint before reads this one too.
    original["tie_word_embeddings"] = source.config.text.tie_word_embeddings
    dtype = str(next(iter(params.values())).dtype)
    for key in ("torch_dtype", "dtype"):
        if key in original:
            original[key] = dtype
    (folder / "config.json").write_text(json.dumps(original, indent=2) + "\n")
    source.chat.save(folder)
    for name in ("generation_config.json", "LICENSE"):
        if (source.folder / name).exists():
            (folder / name).write_bytes((source.folder / name).read_bytes())
    if target.exists():
        shutil.rmtree(target)
    folder.rename(target)
