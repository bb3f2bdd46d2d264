"""Hugging Face checkpoints in and out: safetensors only, every key layout, tensor by tensor into its sharding."""

import json
import math
import mmap
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from ril_jax.errors import InputError
from ril_jax.models.hub_names import export_name, hub_names
from ril_jax.models.parameters import Network, Params, ParamSpec

_DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_,
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
}  # fmt: skip


class SafetensorsFolder:
    """The tensors of an HF folder by hub-layout name, memory-mapped; nothing is read until it is asked for."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._entries: dict[str, tuple[Path, np.dtype, tuple[int, ...], int]] = {}
        self._maps: dict[Path, mmap.mmap] = {}
        for path in _shard_paths(self.folder):
            header, start = _read_header(path)
            for key, entry in header.items():
                if key == "__metadata__":
                    continue
                if entry["dtype"] not in _DTYPES:
                    raise InputError(f"{path}: tensor {key} has dtype {entry['dtype']}, which is not supported")
                dtype, shape = np.dtype(_DTYPES[entry["dtype"]]), tuple(entry["shape"])
                names, (begin, stop) = hub_names(key), entry["data_offsets"]
                if len(names) > 1:  # parts of the rows, and so of the bytes
                    shape = (shape[0] // len(names), *shape[1:])
                for i, name in enumerate(names):
                    self._entries[name] = (path, dtype, shape, start + begin + i * (stop - begin) // len(names))

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def names(self) -> Iterable[str]:
        return self._entries.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[name][2]

    def read(self, name: str) -> np.ndarray:
        """A view of the file's bytes; copy it to keep it."""
        path, dtype, shape, offset = self._entries[name]
        if path not in self._maps:
            with path.open("rb") as file:
                self._maps[path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return np.frombuffer(self._maps[path], dtype, math.prod(shape), offset).reshape(shape)


def load_params(
    folder: str | Path,
    network: Network,
    *,
    dtype: Any = jnp.float32,
    shardings: Mapping[str, jax.sharding.Sharding] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Params:
    """Read a checkpoint into the network's parameters, each straight into its sharding and dtype.

    A file without `lm_head` gives a network with an untied head its embedding (transformers' tie rule); parameters that
    no HF file has (the discriminator's head) keep their initial value, zero.

    Raises: InputError that lists every missing and misshaped key at once, or names a truncated or corrupt shard.
    """
    source = SafetensorsFolder(folder)
    aliases = {}
    if "lm_head.weight" not in source and "model.embed_tokens.weight" in source:
        aliases["lm_head.weight"] = "model.embed_tokens.weight"
    _check_keys(source, network, aliases)
    params: Params = {}
    for i, (name, spec) in enumerate(network.specs.items()):
        array_dtype = np.dtype(dtype)

        def read(index, spec=spec, array_dtype=array_dtype):
            return _read_slice(source, spec, index, array_dtype, aliases)

        if shardings is None:
            params[name] = jnp.asarray(read((slice(None),) * len(spec.shape)))
        else:
            params[name] = jax.make_array_from_callback(spec.shape, shardings[name], read)
        if progress is not None:
            progress(i + 1, len(network.specs))
    return params


def has_own_head(folder: str | Path) -> bool:
    """Whether the checkpoint holds an `lm_head` of its own; if not, the head is the embedding."""
    return "lm_head.weight" in SafetensorsFolder(folder)


def save_params(
    folder: str | Path,
    network: Network,
    params: Mapping[str, Any],
    *,
    family: str = "qwen2_5_vl",
    max_shard_bytes: int = 5 * 10**9,
):
    """Write the parameters in the family's hub layout, in shards with an index where one file would be too large."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    sizes = []
    for name, spec in network.specs.items():
        if not spec.hf:
            continue
        itemsize = np.dtype(params[name].dtype).itemsize
        for layer in range(spec.shape[0]) if spec.stacked else [None]:
            sizes.append((name, layer, math.prod(spec.hf_shape) * itemsize))
    shards: list[list[tuple[str, int | None]]] = [[]]
    room = max_shard_bytes
    for name, layer, size in sizes:
        if size > room and shards[-1]:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append((name, layer))
        room -= size
    weight_map = {}
    for i, shard in enumerate(shards):
        file = "model.safetensors" if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        tensors = {}
        for name, layer in shard:
            spec, value = network.specs[name], params[name]
            key = export_name(spec.hf if layer is None else spec.hf.format(layer=layer), family)
            tensors[key] = spec.to_hf(np.asarray(value if layer is None else value[layer]))
            weight_map[key] = file
        save_file(tensors, folder / file, metadata={"format": "pt"})
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(size for *_, size in sizes)}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True))


def resolve(name: str | Path) -> Path:
    """A local folder as it is; anything else is a hub id and is downloaded (safetensors, configs, tokenizer files)."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if len(Path(name).parts) != 2 or str(name).startswith((".", "/", "~")):
        raise InputError(f"checkpoint {name}: no such folder; name a Hugging Face folder or a hub id 'owner/model'")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(name), allow_patterns=["*.safetensors", "*.json", "*.jinja", "*.txt"]))
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"checkpoint {name}: no such folder, and the hub could not give it ({reason})") from None


def _read_slice(source, spec: ParamSpec, index, dtype, aliases) -> np.ndarray:
    if not spec.hf or (spec.hf.startswith("score.") and spec.hf not in source):
        return np.zeros(_sliced_shape(spec.shape, index), dtype)
    if not spec.stacked:
        return spec.from_hf(source.read(aliases.get(spec.hf, spec.hf)))[index].astype(dtype)
    layers = range(*index[0].indices(spec.shape[0]))
    out = np.empty(_sliced_shape(spec.shape, index), dtype)
    for i, layer in enumerate(layers):
        out[i] = spec.from_hf(source.read(spec.hf.format(layer=layer)))[index[1:]]
    return out


def _sliced_shape(shape, index) -> tuple[int, ...]:
    return tuple(len(range(*part.indices(size))) for part, size in zip(index, shape, strict=True))


def _check_keys(source: SafetensorsFolder, network: Network, aliases: Mapping[str, str]) -> None:
    missing, misshaped, wanted = [], [], set()
    for spec in network.specs.values():
        if not spec.hf or (spec.hf.startswith("score.") and spec.hf not in source):
            continue
        for layer in range(spec.shape[0]) if spec.stacked else [None]:
            key = spec.hf if layer is None else spec.hf.format(layer=layer)
            wanted.add(key)
            key = aliases.get(key, key)
            if key not in source:
                missing.append(key)
            elif source.shape(key) != spec.hf_shape:
                misshaped.append(f"{key} {list(source.shape(key))} instead of {list(spec.hf_shape)}")
    # Heads and towers that this network does not use are no fault; further layers are.
    known = {pattern for spec in network.specs.values() if (pattern := spec.hf.partition("{layer}")[0]) != spec.hf}
    extra = sorted(k for k in source.names() if k not in wanted and k.startswith(tuple(known)) and "inv_freq" not in k)
    problems = []
    if missing:
        problems.append(f"missing: {', '.join(sorted(missing))}")
    if misshaped:
        problems.append(f"of the wrong shape: {', '.join(sorted(misshaped))}")
    if extra:
        problems.append(f"not known: {', '.join(extra)}")
    if problems:
        raise InputError(f"{source.folder}: the checkpoint does not fit its config.json; {'; '.join(problems)}")


def _shard_paths(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError) as error:
            raise InputError(f"{index}: not a valid index ({error}); fetch the file again") from None
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
