"""The batch that made a loss NaN, kept for whoever looks for the reason."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ril_jax.files import write_atomically
from ril_jax.training.checkpoints import is_key, leaf_name


def save_failed_batch(folder: str | os.PathLike[str], arrays: Any, note: Mapping[str, Any]) -> Path:
    """Keep the batch that made a step fail: its arrays as .npz (bfloat16 as float32) and `note` beside it as .json.

    arrays: pytree of arrays, named by their path in it. note: JSON-able; `note["step"]` names the files if it is there.
    Returns the path of the .npz. Of an array that is spread over processes the part of this one is kept.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"failed_batch_step{note['step']}" if "step" in note else "failed_batch"
    number = len(list(folder.glob(f"{stem}*.npz")))
    path = folder / (f"{stem}.npz" if number == 0 else f"{stem}_{number}.npz")
    kept, dtypes = {}, {}
    for key, leaf in jax.tree_util.tree_flatten_with_path(arrays)[0]:
        leaf = jax.random.key_data(leaf) if isinstance(leaf, jax.Array) and is_key(leaf) else leaf
        array = _here(leaf)
        dtypes[leaf_name(key)] = str(array.dtype)
        # numpy writes the types of ml_dtypes (bfloat16, float8) as raw bytes that it cannot read back.
        kept[leaf_name(key)] = array if array.dtype.isbuiltin == 1 else array.astype(np.float32)
    with path.open("wb") as file:
        np.savez(file, **kept)  # type: ignore[arg-type]
    words = json.dumps({**note, "dtypes": dtypes}, indent=2, default=str) + "\n"
    write_atomically(path.with_suffix(".json"), words.encode())
    return path


def _here(leaf: Any) -> np.ndarray:
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
        return np.asarray(leaf)
    starts = lambda shard: tuple(part.start or 0 for part in shard.index)  # noqa: E731
    shards = {starts(shard): shard for shard in leaf.addressable_shards}
    if len(shards) == 1:
        return np.asarray(next(iter(shards.values())).data)
    (axis,) = [i for i in range(leaf.ndim) if len({start[i] for start in shards}) > 1]
    return np.concatenate([np.asarray(shards[start].data) for start in sorted(shards)], axis)
