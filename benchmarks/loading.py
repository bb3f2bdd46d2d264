"""Loading a checkpoint against reading its files: rate in GB/s, and memory of the host above the parameters.

    python benchmarks/loading.py --size=7b --layers=4 --repeats=3

Method. A checkpoint with the tensors of Qwen2.5-VL of that size (its full widths and vocabulary, `--layers` layers of
decoder and tower each) is written in bfloat16 into a temporary folder, in shards of at most 1 GB with an index. The
references are one pass over the shards in order with reads of 16 MiB into one buffer, and the same into an array as
large as the files: parameters on the host take fresh memory, which costs more than reading on many virtual machines,
and no loader does without. Cold means that the files' pages
were given up before (posix_fadvise, after fsync), warm that they had just been read; the disk below may have caches of
its own, which is the same for both sides. Each load is a process of its own, and is timed without importing and
without what a first tiny load compiles or allocates; programs for the large shapes are compiled within the time.
GB are 10^9 bytes of the files. Host memory is the highest resident size while loading (VmHWM, reset before) less the
resident size before, less the parameters, which lie on the host where the device is the CPU; its bound is the largest
tensor of the files plus the fixed buffer that is stated. Every load is checked against the files: a part of each
parameter's last layer.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import ml_dtypes
import numpy as np

from ril_jax.models.config import ModelConfig
from ril_jax.models.hub import load_params
from ril_jax.models.parameters import Network
from ril_jax.models.tensor_files import NewTensor, SafetensorsFolder, write_folder
from ril_jax.models.vlm import VisionLanguageModel

FIXED = 256 << 20  # bytes: staging, small parameters, the compiler, and the heap's own leftovers
READING, KEEPING = "reading the files", "reading them into fresh memory"
WHAT = (READING, KEEPING, "loading as bfloat16", "loading as float32")
BF16 = np.dtype(ml_dtypes.bfloat16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="7b", help="of Qwen2.5-VL")
    parser.add_argument("--layers", type=int, default=4, help="of the decoder and of the tower")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", help="where to write; needs the room of the checkpoint (default: temporary)")
    parser.add_argument("--child", nargs=2, metavar=("CHECKPOINT", "WHAT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args, *args.child)
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        measure(args, Path(folder))


def measure(args: argparse.Namespace, folder: Path) -> None:
    write_checkpoint(folder, network_of(args))
    source = SafetensorsFolder(folder)
    entries = [source.entry(name) for name in source.names()]
    total, largest = sum(e.nbytes for e in entries), max(e.nbytes for e in entries)
    shards = sorted(folder.glob("*.safetensors"))
    print(f"{total / 1e9:.2f} GB in {len(shards)} shards, largest tensor {largest / 1e9:.2f} GB", flush=True)
    print(f"bound of host memory above the parameters: {(largest + FIXED) / 1e9:.2f} GB\n")
    print("| cache | what | GB/s: median (min-max) | share of reading | host memory above the parameters, GB |")
    print("|---|---|---|---|---|")
    for cache in ("cold", "warm"):
        runs: dict[str, list[dict]] = {what: [] for what in WHAT}
        for _ in range(args.repeats):  # they alternate
            for what, results in runs.items():
                forget(shards) if cache == "cold" else read(shards)
                results.append(run_apart(args, folder, what))
        rates = {what: [total / r["seconds"] / 1e9 for r in results] for what, results in runs.items()}
        for what, results in runs.items():
            above = max(r.get("above", 0) for r in results)
            memory = f"{above / 1e9:.2f}" if above else ""
            memory += " **over the bound**" if above > largest + FIXED else ""
            share = statistics.median(rates[what]) / statistics.median(rates[READING])
            print(f"| {cache} | {what} | {spread(rates[what])} | {share:.2f} | {memory} |", flush=True)


def network_of(args: argparse.Namespace) -> Network:
    config = ModelConfig.qwen2_5_vl(args.size)
    config = dataclasses.replace(
        config,
        text=dataclasses.replace(config.text, num_hidden_layers=args.layers),
        vision=dataclasses.replace(config.vision, depth=args.layers),
    )
    return Network(lambda: VisionLanguageModel(config))


def write_checkpoint(folder: Path, network: Network) -> None:
    """Random bytes in the range of real weights; as many as a period long, which no layer's size divides."""
    noise = np.random.default_rng(0).normal(0, 0.02, 16_777_213).astype(BF16)
    tensors = [
        NewTensor(spec.hf.format(layer=layer), spec.hf_shape, BF16)
        for spec in network.specs.values()
        for layer in (range(spec.shape[0]) if spec.stacked else [None])
    ]
    # As files are written in the wild: layer after layer, not parameter after parameter.
    tensors.sort(key=lambda tensor: [int(part) if part.isdigit() else 0 for part in tensor.key.split(".")])
    shapes = {tensor.key: tensor.shape for tensor in tensors}
    begin = 0

    def get(key: str) -> np.ndarray:
        nonlocal begin
        size = int(np.prod(shapes[key]))
        rolled = np.roll(noise, -begin)
        begin = (begin + size) % noise.size
        return np.resize(rolled, size).reshape(shapes[key])

    write_folder(folder, tensors, get, max_shard_bytes=10**9)
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def read(paths: list[Path], *, keep: bool = False) -> float:
    """Seconds of one pass over the files, into one buffer or, to `keep` them, into fresh memory."""
    step = 16 << 20
    out = memoryview(np.empty(sum(path.stat().st_size for path in paths) + step if keep else step, np.uint8).data)
    start, done = time.perf_counter(), 0
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(out[done : done + step]):
                done += count if keep else 0
    return time.perf_counter() - start


def forget(paths: list[Path]) -> None:
    """Let the system drop the files' pages."""
    for path in paths:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def run_apart(args: argparse.Namespace, folder: Path, what: str) -> dict:
    command = [sys.executable, __file__, f"--size={args.size}", f"--layers={args.layers}", "--child", str(folder), what]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def child(args: argparse.Namespace, folder: str, what: str) -> None:
    if what in (READING, KEEPING):
        print(json.dumps({"seconds": read(sorted(Path(folder).glob("*.safetensors")), keep=what == KEEPING)}))
        return
    import jax
    import jax.numpy as jnp

    network = network_of(args)
    jax.jit(lambda x: x @ x)(jnp.ones((8, 8))).block_until_ready()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the highest resident size counts from here
    start = time.perf_counter()
    params = load_params(folder, network, dtype=jnp.dtype(what.split()[-1]))
    seconds = time.perf_counter() - start
    peak = resident("VmHWM")
    on_host = sum(p.nbytes for p in params.values() if all(d.platform == "cpu" for d in p.devices()))
    check(SafetensorsFolder(folder), network, params)
    print(json.dumps({"seconds": seconds, "above": peak - before - on_host}))


def resident(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")


def check(source: SafetensorsFolder, network: Network, params: dict) -> None:
    """The last layer of every parameter is what the file says."""
    for name, spec in network.specs.items():
        value = params[name][-1] if spec.stacked else params[name]
        key = spec.hf.format(layer=spec.shape[0] - 1)
        wanted = spec.from_hf(source.read(key))
        np.testing.assert_array_equal(np.asarray(value[0]), wanted[0].astype(value.dtype), err_msg=name)


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


if __name__ == "__main__":
    main()
