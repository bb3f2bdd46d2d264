"""Hugging Face checkpoints in and out: safetensors only, every key layout, tensor by tensor into its sharding.

Reading holds on the host, beside the parameters themselves where those are there, at most one tensor of the file and
the `STAGING` bytes of several smaller ones; writing at most one tensor.
"""

import functools
import math
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from ril_jax.errors import InputError
from ril_jax.models.hub_names import export_name
from ril_jax.models.parameters import Network, Params, ParamSpec
from ril_jax.models.tensor_files import Entry, NewTensor, SafetensorsFolder, write_folder

STAGING = 64 << 20  # bytes of tensors on their way to a device, unless a single one is larger
_ALIGNMENT = 64  # bytes, of what JAX uses on the CPU as it is
_BLOCK = 4 << 20  # bytes that a thread reads at once where it keeps them in another order, or only some
_THREADS = min(8, os.cpu_count() or 1)
_TILE = (256, 256)  # of a transposition on the host: both sides stay in the cache
_UNUSED = ("visual", "vision_tower", "multi_modal_projector", "lm_head", "score")  # of networks with tower or head


class Target(NamedTuple):
    """A place that a tensor of the file goes to: a parameter, and which layer of it (None: all)."""

    name: str
    layer: int | None


def load_params(
    folder: str | Path,
    network: Network,
    *,
    dtype: Any = jnp.float32,
    shardings: Mapping[str, Sharding] | None = None,
    progress: Callable[[int, int], None] | None = None,
    staging: int = STAGING,
) -> Params:
    """Read a checkpoint into the network's parameters, each straight into its sharding and dtype.

    Files are read in order, and of each tensor only what this process's devices hold. Stacked parameters are filled
    layer by layer in place. `progress(done, total)` is called with bytes of the files, at first and after every tensor.
    A file without `lm_head` gives a network with an untied head its embedding (transformers' tie rule); parameters that
    no HF file has (the discriminator's head) keep their initial value, zero.

    Raises: InputError that lists every missing, misshaped and unknown key at once, or names a truncated or corrupt
    shard.
    """
    source = SafetensorsFolder(folder)
    wanted = _targets(source, network)
    here = SingleDeviceSharding(jax.local_devices()[0])
    where = {name: here if shardings is None else shardings[name] for name in network.specs}
    total, done = sum(entry.nbytes for _, entry, _ in wanted), 0
    largest = max(entry.nbytes for _, entry, _ in wanted)
    with ThreadPoolExecutor(_THREADS) as threads:
        loader = _Loader(source, network, np.dtype(dtype), where, staging, largest, threads)
        if progress is not None:
            progress(0, total)
        for key, entry, targets in wanted:
            for target in targets:
                loader.read(key, entry, target)
            done += entry.nbytes
            if progress is not None:
                progress(done, total)
        return loader.finish()


def has_own_head(folder: str | Path) -> bool:
    """Whether the checkpoint holds an `lm_head` of its own; if not, the head is the embedding."""
    return "lm_head.weight" in SafetensorsFolder(folder)


def save_params(
    folder: str | Path,
    network: Network,
    params: Mapping[str, Any],
    *,
    family: str = "qwen2_5_vl",
    dtype: Any = None,
    rest: SafetensorsFolder | None = None,
    max_shard_bytes: int = 5 * 10**9,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write the network's parameters in the family's hub layout, in shards with an index where one would be too large.

    `params` are arrays of JAX or numpy in any sharding; those that it lacks are taken from the checkpoint `rest`.
    Everything is written in `dtype`, by default that of `params`; `progress` is called as by `load_params`. Where
    several processes run, all must call this; the first one writes. Raises InputError where `rest` does not fit the
    network.
    """
    if rest is not None:
        _targets(rest, network)
    if dtype is None:
        dtype = next(iter(params.values())).dtype
    tensors, places = [], {}
    for name, spec in network.specs.items():
        for key, layer in _keys(spec):
            exported = export_name(key, family)
            tensors.append(NewTensor(exported, spec.hf_shape, np.dtype(dtype)))
            places[exported] = (key, Target(name, layer))

    def get(exported: str) -> np.ndarray:
        key, (name, layer) = places[exported]
        if name in params:
            return _to_host(network.specs[name], params[name], layer)
        assert rest is not None, f"no value for {name}"
        return rest.read(key)

    if jax.process_index() == 0:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_folder(folder, tensors, get, max_shard_bytes=max_shard_bytes, progress=progress)
    else:  # what is spread over processes is brought together by all of them
        for tensor in tensors:
            if places[tensor.key][1].name in params:
                get(tensor.key)


def resolve(name: str | Path) -> Path:
    """A local folder as it is; else a hub id, `owner/model` or `owner/model@revision`, is downloaded.

    What is fetched: safetensors, configs, tokenizer and processor files, licence. Raises InputError without a network
    and a copy from before.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    parts = re.fullmatch(r"([\w-][\w.-]*/[\w.-]+)(?:@([\w./-]+))?", str(name))
    if parts is None:
        raise InputError(
            f"checkpoint {name}: no such folder; name a Hugging Face folder or a hub id 'owner/model[@revision]'"
        )
    from huggingface_hub import snapshot_download

    patterns = ["*.safetensors", "*.json", "*.jinja", "*.txt", "LICENSE*"]
    try:
        return Path(snapshot_download(parts[1], revision=parts[2], allow_patterns=patterns))
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"checkpoint {name}: no such folder, and the hub could not give it ({reason})") from None


# --- reading ---------------------------------------------------------------------------------------------------------


class _Loader:
    """Parameters that are being filled.

    Small ones are put together on the host and placed at the end. Of a large one each tensor goes through a buffer to
    the devices by itself, and is written into the stacked array there. Devices also transpose and cast, which costs
    them nothing; only where the "device" is this host's CPU, whose compiler transposes slowly, the host transposes
    while reading. The buffer holds the largest tensor or several small ones, and is used again and again: on many
    machines touching fresh memory takes longer than reading the file.
    """

    def __init__(
        self,
        source: SafetensorsFolder,
        network: Network,
        dtype: np.dtype,
        shardings: Mapping[str, Sharding],
        staging: int,
        largest: int,
        threads: ThreadPoolExecutor,
    ):
        """`staging`: bytes on their way, and of what is put together on the host; `largest`: of the largest tensor."""
        self._source, self._specs, self._dtype, self._shardings = source, network.specs, dtype, shardings
        self._small = {
            name: aligned_empty(spec.shape, dtype) for name, spec in _smallest(network.specs, dtype.itemsize, staging)
        }
        for values in self._small.values():
            values.fill(0)
        self._params: Params = {}
        size = max(staging, largest) + _ALIGNMENT * jax.local_device_count()
        self._buffer, self._staging = aligned_empty((size,), np.dtype(np.uint8)), staging
        self._used, self._under_way = 0, set[str]()
        self._threads, self._own = threads, threading.local()

    def read(self, key: str, entry: Entry, target: Target) -> None:
        """Read one tensor of the file to where it belongs."""
        name, spec = target.name, self._specs[target.name]
        if name in self._small:
            values = spec.from_hf(self._source.read(key))
            self._small[name][... if target.layer is None else target.layer] = values
            return
        full = self._shardings[name]
        here = _transposes_here(full)
        perm = tuple(range(len(spec.hf_perm))) if here else spec.hf_perm
        if target.layer is not None:
            piece = self._piece(key, entry, spec, _without_layers(full), transpose=here, keep=False)
            stack = self._params.get(name)
            if stack is None:
                stack = _zeros(full, spec.shape, self._dtype)()
            self._params[name] = _place(full, perm)(stack, piece, np.int32(target.layer))
        elif here and entry.dtype == self._dtype:
            self._params[name] = self._piece(key, entry, spec, full, transpose=here, keep=True)
        else:
            piece = self._piece(key, entry, spec, full, transpose=here, keep=False)
            self._params[name] = _convert(full, perm, self._dtype)(piece)
        self._under_way.add(name)

    def finish(self) -> Params:
        """All parameters, in the network's order."""
        for name, values in self._small.items():
            self._params[name] = jax.make_array_from_callback(values.shape, self._shardings[name], values.__getitem__)
        return jax.block_until_ready({name: self._params[name] for name in self._specs})

    def _piece(
        self, key: str, entry: Entry, spec: ParamSpec, sharding: Sharding, *, transpose: bool, keep: bool
    ) -> jax.Array:
        """One tensor on the devices, in the file's order of axes (split) or, if `transpose`, in the parameter's.

        It is in the buffer, where the host is the device, unless `keep`.
        """
        shape = tuple(spec.hf_split[axis] for axis in spec.hf_perm) if transpose else spec.hf_split
        if not transpose:
            sharding = _permuted(sharding, spec.hf_perm)
        dtype = np.dtype(np.float32) if entry.dtype == np.float64 else entry.dtype
        axes = np.argsort(spec.hf_perm) if transpose else np.arange(len(shape))
        # The parts of this process, by where they begin and end; devices may share one.
        ranges = dict.fromkeys(
            _ranges(index, shape) for index in sharding.addressable_devices_indices_map(shape).values()
        )
        shapes = [tuple(stop - start for start, stop in part) for part in ranges]
        parts = [aligned_empty(shape, dtype) for shape in shapes] if keep else self._in_buffer(shapes, dtype)
        by_ranges = dict(zip(ranges, parts, strict=True))
        views = [(tuple(part[a] for a in axes), values.transpose(axes)) for part, values in by_ranges.items()]
        self._fill(key, entry, spec.hf_split, views)
        return jax.make_array_from_callback(shape, sharding, lambda index: by_ranges[_ranges(index, shape)])

    def _in_buffer(self, shapes: list[tuple[int, ...]], dtype: np.dtype) -> list[np.ndarray]:
        """Room for arrays in the buffer; waits for what was there where it is full."""
        sizes = [math.prod(shape) * dtype.itemsize for shape in shapes]
        strides = [-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes]
        # No more of the buffer is touched than two of these need: one is read while the other is on its way.
        room = min(self._buffer.size, max(self._staging, 2 * sum(strides)))
        if self._used + sum(strides) > room:
            jax.block_until_ready([self._params[name] for name in self._under_way])
            self._used, self._under_way = 0, set()
        arrays = []
        for shape, size, stride in zip(shapes, sizes, strides, strict=True):
            arrays.append(self._buffer[self._used : self._used + size].view(dtype).reshape(shape))
            self._used += stride
        return arrays

    def _fill(self, key: str, entry: Entry, shape: tuple[int, ...], views: list[tuple[tuple, np.ndarray]]) -> None:
        """Fill each view with its ranges of the tensor, seen as `shape`; what several need is read once."""
        row_bytes = entry.nbytes // shape[0]
        first, last = min(ranges[0][0] for ranges, _ in views), max(ranges[0][1] for ranges, _ in views)
        whole_rows = all(r == (0, size) for r, size in zip(views[0][0][1:], shape[1:], strict=True))
        as_it_is = views[0][1].flags.c_contiguous and views[0][1].dtype == entry.dtype
        step = max(1, _BLOCK // row_bytes)

        def read(begin: int) -> None:
            end = min(begin + step, last)
            if len(views) == 1 and whole_rows and as_it_is:
                self._source.read_bytes(key, begin * row_bytes, views[0][1][begin - first : end - first])
                return
            if not hasattr(self._own, "block") or self._own.block.size < step * row_bytes:
                self._own.block = np.empty(step * row_bytes, np.uint8)
            rows = self._own.block[: (end - begin) * row_bytes].view(entry.dtype).reshape(end - begin, *shape[1:])
            self._source.read_bytes(key, begin * row_bytes, rows)
            for ((start, stop), *others), view in views:
                low, high = max(begin, start), min(end, stop)
                if low < high:
                    columns = tuple(slice(*r) for r in others)
                    _copy(view[low - start : high - start], rows[(slice(low - begin, high - begin), *columns)])

        for _ in self._threads.map(read, range(first, last, step)):
            pass


def _transposes_here(sharding: Sharding) -> bool:
    devices: set[Any] = sharding.device_set
    return all(device.platform == "cpu" for device in devices)


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An empty array that JAX can use on the CPU as it is, without a copy."""
    nbytes = math.prod(shape) * dtype.itemsize
    raw = np.empty(nbytes + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + nbytes].view(dtype).reshape(shape)


def _copy(to: np.ndarray, rows: np.ndarray) -> None:
    """to[...] = rows, in tiles where the two run along different axes."""
    if to.dtype == rows.dtype:  # numpy copies its own types without the interpreter's lock
        to, rows = (a.view(f"u{a.itemsize}") for a in (to, rows))
    along_to, along_rows = int(np.argmin(to.strides)), rows.ndim - 1
    if along_to == along_rows:
        to[...] = rows
        return
    to, rows = (np.moveaxis(a, (along_to, along_rows), (-2, -1)) for a in (to, rows))
    height, width = _TILE
    for others in np.ndindex(rows.shape[:-2]):
        for i in range(0, rows.shape[-2], height):
            for j in range(0, rows.shape[-1], width):
                tile = (*others, slice(i, i + height), slice(j, j + width))
                to[tile] = rows[tile]


def _smallest(specs: Mapping[str, ParamSpec], itemsize: int, room: int) -> Iterator[tuple[str, ParamSpec]]:
    """The smallest parameters that fit into `room` bytes together, and those that no file has, which are tiny."""
    for name, spec in sorted(specs.items(), key=lambda item: math.prod(item[1].shape)):
        room -= math.prod(spec.shape) * itemsize
        if room >= 0 or not spec.hf or spec.hf.startswith("score."):
            yield name, spec


def _ranges(index: tuple[slice, ...] | None, shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    assert index is not None
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))


def _without_layers(sharding: Sharding) -> Sharding:
    """The sharding of one layer of a stacked parameter, whose layers are not spread."""
    if isinstance(sharding, NamedSharding):
        assert not sharding.spec or sharding.spec[0] is None, "the layers of a stacked parameter are never sharded"
        return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    return sharding


def _permuted(sharding: Sharding, perm: tuple[int, ...]) -> Sharding:
    """The sharding in which x has to lie so that x.transpose(perm) lies in `sharding`."""
    if isinstance(sharding, NamedSharding):
        parts = [*sharding.spec, *[None] * (len(perm) - len(sharding.spec))]
        return NamedSharding(sharding.mesh, PartitionSpec(*(parts[i] for i in np.argsort(perm))))
    return sharding


# One program for each shape and sharding; the caches keep jit from building them again for the next checkpoint.


@functools.cache
def _zeros(sharding: Sharding, shape: tuple[int, ...], dtype: np.dtype):
    def zeros():
        return jnp.zeros(shape, dtype)

    return jax.jit(zeros, out_shardings=sharding)


@functools.cache
def _place(sharding: Sharding, perm: tuple[int, ...]):
    def place(stack, tensor, layer):
        return jax.lax.dynamic_update_index_in_dim(stack, tensor.transpose(perm).astype(stack.dtype), layer, axis=0)

    return jax.jit(place, donate_argnums=0, out_shardings=sharding)


@functools.cache
def _convert(sharding: Sharding, perm: tuple[int, ...], dtype: np.dtype):
    def convert(tensor):
        return tensor.transpose(perm).astype(dtype)

    return jax.jit(convert, out_shardings=sharding)


# --- keys ------------------------------------------------------------------------------------------------------------


def _keys(spec: ParamSpec) -> Iterator[tuple[str, int | None]]:
    """The canonical keys of a parameter in a file, with the layer that each is; none where no file has it."""
    if not spec.hf:
        return
    if not spec.stacked:
        yield spec.hf, None
        return
    for layer in range(spec.shape[0]):
        yield spec.hf.format(layer=layer), layer


def _targets(source: SafetensorsFolder, network: Network) -> list[tuple[str, Entry, list[Target]]]:
    """What is to be read, in the order of the files. Raises InputError for keys that do not fit."""
    missing, misfit = [], []
    found: dict[str, list[Target]] = {}
    for name, spec in network.specs.items():
        for key, layer in _keys(spec):
            if key.startswith("score.") and key not in source:
                continue  # a head that starts at zero
            if key == "lm_head.weight" and key not in source:
                key = "model.embed_tokens.weight"
            if key not in source:
                missing.append(key)
                continue
            entry = source.entry(key)
            if entry.shape != spec.hf_shape:
                misfit.append((key, f"{list(entry.shape)} instead of {list(spec.hf_shape)}"))
            elif not jnp.issubdtype(entry.dtype, jnp.floating) or entry.dtype.itemsize < 2:
                misfit.append((key, f"{entry.dtype}, which is quantized"))
            found.setdefault(key, []).append(Target(name, layer))
    roots = {_root(spec.hf) for spec in network.specs.values()}
    unused = [root for root in _UNUSED if root not in roots]
    extra = [k for k in source.names() if k not in found and _root(k) not in unused and "inv_freq" not in k]
    problems = []
    if missing:
        problems.append(f"missing: {', '.join(_by_layer((key, '') for key in missing))}")
    if misfit:
        problems.append(f"of the wrong shape or dtype: {', '.join(_by_layer(misfit))}")
    if extra:
        problems.append(f"not known: {', '.join(_by_layer((key, '') for key in extra))}")
    if problems:
        raise InputError(f"{source.folder}: the checkpoint does not fit its config.json; {'; '.join(problems)}")
    entries = [(key, source.entry(key), targets) for key, targets in found.items()]
    return sorted(entries, key=lambda item: (item[1].path, item[1].offset))


def _root(key: str) -> str:
    return key.partition(".")[0]


def _by_layer(keys) -> list[str]:
    """Keys with what is to be said of each, in order; those that differ in the layer alone become one."""
    groups: dict[tuple[str, str, str], list[int]] = {}
    for key, words in sorted(set(keys)):
        parts = re.fullmatch(r"(.*?\.)(\d+)(\..*)", key)
        before, number, after = parts.groups() if parts else (key, "-1", "")
        groups.setdefault((before, after, words), []).append(int(number))
    named = []
    for (before, after, words), layers in groups.items():
        inner = "" if layers == [-1] else _spans(sorted(layers))
        named.append(f"{before}{inner}{after} {words}".rstrip())
    return named


def _spans(numbers: list[int]) -> str:
    """3 for one number, {0-27} or {0-3,7} for several."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and spans[-1][-1] == number - 1:
            spans[-1] = [spans[-1][0], number]
        else:
            spans.append([number])
    return str(numbers[0]) if len(numbers) == 1 else f"{{{','.join('-'.join(map(str, span)) for span in spans)}}}"


# --- writing ---------------------------------------------------------------------------------------------------------


def _to_host(spec: ParamSpec, value: Any, layer: int | None) -> np.ndarray:
    """One tensor of a checkpoint, in the file's layout, as an array of the host."""
    if isinstance(value, jax.Array) and not _is_on_host(value):
        # A new array, since an array keeps the copy that the host has asked of it for as long as it lives.
        return np.asarray(_tensor(value.sharding, spec, layer is not None)(value, np.int32(layer or 0)))
    value = np.asarray(value)
    return spec.to_hf(value if layer is None else value[layer])


def _is_on_host(value: jax.Array) -> bool:
    return len(value.devices()) == 1 and all(device.platform == "cpu" for device in value.devices())


@functools.cache
def _tensor(sharding: Sharding, spec: ParamSpec, of_layer: bool):
    def tensor(value, layer):
        one = jax.lax.dynamic_index_in_dim(value, layer, 0, keepdims=False) if of_layer else jnp.copy(value)
        return one.transpose(np.argsort(spec.hf_perm)).reshape(spec.hf_shape)

    mesh = getattr(sharding, "mesh", None)
    everywhere = sharding if mesh is None else NamedSharding(mesh, PartitionSpec())
    return jax.jit(tensor, out_shardings=everywhere)
