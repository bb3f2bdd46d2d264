"""Safetensors files: a folder of them is read range by range, and written tensor by tensor.

Files are read, not mapped into memory: pages of a mapping count as memory of the process for as long as it stands,
which for a large checkpoint is all of it.
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from ril_jax.errors import InputError
from ril_jax.models.hub_names import hub_names

INDEX = "model.safetensors.index.json"
_DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_,
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
}  # fmt: skip
_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}
_MOST_AT_ONCE = 1 << 30  # bytes of one read: the system gives less than 2 GiB at a time


class Entry(NamedTuple):
    """Where a tensor stands, under which key, and in which form."""

    path: Path
    key: str
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class SafetensorsFolder:
    """The tensors of an HF folder by canonical name (hub_names.py); nothing is read until it is asked for.

    With an index only the shards that it names count. Raises InputError for shards that are missing, truncated,
    corrupt, or not as the index says, for a tensor that two of them hold, and for quantized weights.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        _refuse_quantized(self.folder)
        self._entries: dict[str, Entry] = {}
        self._files: dict[Path, BinaryIO] = {}
        index = self.folder / INDEX
        weight_map = _read_index(index) if index.exists() else {}
        for path in _shard_paths(self.folder, weight_map):
            header, start = _read_header(path)
            absent = [key for key, file in weight_map.items() if self.folder / file == path and key not in header]
            if absent:
                raise InputError(f"{index}: {', '.join(absent)} should be in {path.name} and is not; fetch both again")
            for key, tensor in header.items():
                if key != "__metadata__":
                    self._add(path, key, tensor, start)

    def _add(self, path: Path, key: str, tensor: dict[str, Any], start: int) -> None:
        if tensor["dtype"] not in _DTYPES:
            raise InputError(f"{path}: tensor {key} has dtype {tensor['dtype']}, which is not supported")
        shape, names, (begin, stop) = tuple(tensor["shape"]), hub_names(key), tensor["data_offsets"]
        if len(names) > 1:  # parts of the rows, and so of the bytes
            shape = (shape[0] // len(names), *shape[1:])
        for i, name in enumerate(names):
            if name in self._entries:
                other = self._entries[name]
                raise InputError(
                    f"{self.folder}: two tensors for {name}: {other.key} in {other.path.name} and {key} in "
                    f"{path.name}; delete the file that does not belong there"
                )
            offset = start + begin + i * (stop - begin) // len(names)
            self._entries[name] = Entry(path, key, np.dtype(_DTYPES[tensor["dtype"]]), shape, offset)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def names(self) -> Iterable[str]:
        return self._entries.keys()

    def entry(self, name: str) -> Entry:
        return self._entries[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[name].shape

    def read(self, name: str) -> np.ndarray:
        """The whole tensor."""
        entry = self._entries[name]
        out = np.empty(entry.shape, entry.dtype)
        self.read_bytes(name, 0, out)
        return out

    def read_bytes(self, name: str, begin: int, out: np.ndarray) -> None:
        """Fill `out`, which must be contiguous, with the tensor's bytes from `begin` on; threads may do so at once."""
        entry = self._entries[name]
        if (file := self._files.get(entry.path)) is None:
            file = self._files.setdefault(entry.path, entry.path.open("rb", buffering=0))
        view, done = out.reshape(-1).view(np.uint8).data, 0
        while done < view.nbytes:
            count = os.preadv(file.fileno(), [view[done : done + _MOST_AT_ONCE]], entry.offset + begin + done)
            if not count:
                raise InputError(f"{entry.path}: it became shorter while it was read; fetch it again")
            done += count


class NewTensor(NamedTuple):
    """A tensor that is to be written."""

    key: str
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_folder(
    folder: Path,
    tensors: Sequence[NewTensor],
    get: Callable[[str], np.ndarray],
    *,
    max_shard_bytes: int,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write `tensors`, each asked of `get` when its turn comes and cast to its dtype, in shards with an index.

    One file without an index where it is not larger than `max_shard_bytes`. `progress(done, total)` is called with
    bytes, at first and after every tensor.
    """
    shards: list[list[NewTensor]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(t.nbytes for t in shards[-1]) + tensor.nbytes > max_shard_bytes:
            shards.append([])
        shards[-1].append(tensor)
    total, done = sum(tensor.nbytes for tensor in tensors), 0
    weight_map = {}
    if progress is not None:
        progress(0, total)
    for number, shard in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        for tensor in _write_file(folder / file, shard, get):
            weight_map[tensor.key] = file
            done += tensor.nbytes
            if progress is not None:
                progress(done, total)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _write_file(path: Path, tensors: list[NewTensor], get: Callable[[str], np.ndarray]) -> Iterator[NewTensor]:
    """Write one file, and yield each tensor once it is in it."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # without it older readers refuse the file
    end = 0
    for tensor in tensors:
        begin, end = end, end + tensor.nbytes
        header[tensor.key] = {
            "dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]
        }  # fmt: skip
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            array = get(tensor.key)
            assert array.shape == tensor.shape, f"{tensor.key} is {array.shape} and should be {tensor.shape}"
            file.write(np.ascontiguousarray(array, tensor.dtype).reshape(-1).view(np.uint8).data)
            yield tensor


def _refuse_quantized(folder: Path) -> None:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError):
        return  # whoever needs the config says what is wrong with it
    found = config.get("quantization_config") or config.get("compression_config")
    if found:
        method = found.get("quant_method", "unknown") if isinstance(found, dict) else found
        raise InputError(
            f"{path}: the weights are quantized (quant_method {method!r}), which is not supported; take the checkpoint "
            "in bfloat16 from which these were made"
        )


def _read_index(path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(path.read_text())["weight_map"]
        if not weight_map or not all(isinstance(file, str) for file in weight_map.values()):
            raise ValueError("its weight_map does not name a file for every tensor")
        return weight_map
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: not a valid index ({error}); fetch the file again") from None


def _shard_paths(folder: Path, weight_map: dict[str, str]) -> list[Path]:
    if weight_map:
        files = sorted(set(weight_map.values()))
        absent = [file for file in files if not (folder / file).exists()]
        if absent:
            raise InputError(
                f"{folder}: shards that the index names are missing: {', '.join(absent)}; fetch them again"
            )
        return [folder / file for file in files]
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        other = (
            "only pickled weights (*.bin), which are never loaded; convert them"
            if any(folder.glob("*.bin"))
            else "none"
        )
        raise InputError(f"{folder}: no *.safetensors files in it ({other})")
    return paths


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file and where its data starts; checks that the data is all there."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise InputError(
                f"{path}: truncated or corrupt (header of {length} bytes in a file of {size}); fetch it again"
            )
        try:
            header = json.loads(file.read(length))
            end = max((entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"), default=0)
            for key, entry in header.items():
                if key != "__metadata__":
                    begin, stop = entry["data_offsets"]
                    known = _DTYPES.get(entry["dtype"])
                    if known is not None and stop - begin != math.prod(entry["shape"]) * np.dtype(known).itemsize:
                        raise ValueError(f"tensor {key} has {stop - begin} bytes for shape {entry['shape']}")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path}: corrupt header ({error}); fetch it again") from None
    if 8 + length + end > size:
        raise InputError(f"{path}: truncated, {size} bytes of {8 + length + end}; fetch it again")
    return header, 8 + length
