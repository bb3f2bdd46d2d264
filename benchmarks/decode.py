"""Decoding by the engine against the memory bandwidth of the device: tokens a second, and their share of the floor.

    python benchmarks/decode.py --size=qwen2_5_vl:7b --slots=32 --slots=64 --context=1024      # a GPU or a TPU
    python benchmarks/decode.py --size=tiny --slots=8 --context=256                            # a CPU

Method. A model of a released size (or `tiny`, of hf_dims.json) with random weights, in bfloat16 on an accelerator and
float32 on a CPU, is decoded by the engine's own program: all slots are taken, every row has `--context` tokens in its
own pages, greedy, no end-of-sequence. A call draws `--steps` tokens a slot; the host reads each call's tokens, as the
engine does. The floor of a step is the bytes that it cannot avoid reading, the decoder's weights once and every row's
keys and values once, over the bandwidth: that of a copy of 1 GiB (256 MiB on a CPU), measured in the same run (bytes
read and written), or `--bandwidth` in GB/s. The first call is not counted; medians (min-max) of `--repeats` calls.
"""

import argparse
import json
import math
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from ril_jax import cli, sharding
from ril_jax.models.config import ModelConfig
from ril_jax.models.parameters import Params
from ril_jax.pretrained import make_network
from ril_jax.sampling.engine_programs import Control, EnginePrograms, EngineShapes, empty_control

PAGE = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="qwen2_5_vl:7b", help="family:size of a released model, or tiny")
    parser.add_argument("--slots", type=int, action="append", help="responses at once; may be given several times")
    parser.add_argument("--context", type=int, default=1024, help="tokens of each row before the first step")
    parser.add_argument("--steps", type=int, default=16, help="tokens a call")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--bandwidth", type=float, help="GB/s of the device; measured if not given")
    args = parser.parse_args()
    cli.look_for_no_absent_tpu()
    device = jax.devices()[0]
    on_cpu = device.platform == "cpu"
    dtype = jnp.dtype(jnp.float32 if on_cpu else jnp.bfloat16)
    config = model_config(args.size)
    mesh = sharding.make_mesh(tensor=-1, fsdp=1)
    sharding.use(mesh)
    network = make_network(config)
    params = random_params(network, dtype, mesh)
    bandwidth = args.bandwidth * 1e9 if args.bandwidth else measured_bandwidth(1 << 28 if on_cpu else 1 << 30)
    print(f"{args.size}, {dtype.name}, {device.device_kind} x {mesh.size}, jax {jax.__version__}")
    print(f"bandwidth {bandwidth / 1e9:.0f} GB/s ({'given' if args.bandwidth else 'a copy, this run'})\n")
    print("| slots | ms a step | tokens/s | GB a step | floor, ms | share of the bandwidth |")
    print("|---|---|---|---|---|---|")
    for slots in args.slots or [32, 64]:
        measure(args, config, network, params, mesh, slots, bandwidth * mesh.size, dtype)


def model_config(size: str) -> ModelConfig:
    if size != "tiny":
        family, _, name = size.partition(":")
        return getattr(ModelConfig, family)(name)
    dims = json.loads((Path(__file__).parent / "hf_dims.json").read_text())["tiny"]
    text = dict(dims["text"], tie_word_embeddings=dims["text"]["tie"])
    vision = dims["vision"] | {"out_hidden_size": text["hidden_size"]}
    ids = {name: value for name, value in dims.items() if name.endswith("_token_id")}
    return ModelConfig.from_hf({"model_type": "qwen2_5_vl", "text_config": text, "vision_config": vision, **ids})


def random_params(network, dtype, mesh) -> Params:
    """Small random values, made on the device in the compute dtype; a scan's layers are one array."""
    shardings = sharding.param_shardings(network.specs, mesh)
    params = {}
    for i, (name, spec) in enumerate(sorted(network.specs.items())):
        if name.startswith("vision."):  # decoding does not read the tower
            params[name] = jax.jit(lambda s=spec: jnp.zeros(s.shape, dtype), out_shardings=shardings[name])()
            continue
        scale = 0.5 / math.sqrt(max(spec.shape[-1], 1))
        make = jax.jit(
            lambda key, s=spec, c=scale: (c * jax.random.normal(key, s.shape, jnp.float32)).astype(dtype),
            out_shardings=shardings[name],
        )
        params[name] = make(jax.random.key(i))
    return jax.block_until_ready(params)


def measured_bandwidth(size: int) -> float:
    """Bytes a second of one device: an array of `size` bytes read and written again."""
    array = jnp.zeros((size // 4,), jnp.float32)
    copy = jax.jit(lambda a: a + 1)
    jax.block_until_ready(copy(array))
    times = []
    for _ in range(10):
        start = time.perf_counter()
        jax.block_until_ready(copy(array))
        times.append(time.perf_counter() - start)
    return 2 * size / min(times)


def measure(args, config: ModelConfig, network, params, mesh, slots: int, bandwidth: float, dtype) -> None:
    calls = args.repeats + 1
    length = args.context + args.steps * calls
    width = -(-length // PAGE)
    shapes = EngineShapes(
        slots=slots, small_slots=0, max_model_len=length, page_size=PAGE, num_pages=slots * width + 1,
        prefill=((PAGE, 1),), decode_steps=args.steps, attention_block=256, feature_rows=64,
    )  # fmt: skip
    vocab = config.text.vocab_size
    on_cpu = sharding.platform() == "cpu"
    programs = EnginePrograms(network, config, shapes, mesh, (vocab,), vocab, dtype, unroll=on_cpu)
    decode, state = programs.decode(slots, False), programs.new_state()
    control = full_control(slots, width, args)
    times = []
    for call in range(calls):
        start = time.perf_counter()
        state, drawn = decode(params, state, control)
        tokens = jax.device_get(drawn)
        times.append(time.perf_counter() - start)
        assert tokens.mask.all(), "a row has stopped"
        control.length[:] += args.steps
        control.position[:] += args.steps
        control.drawn[:] += args.steps
        assert call or np.isfinite(tokens.logprobs).all()
    step = [1e3 * t / args.steps for t in times[1:]]
    read = bytes_of_a_step(config, network, slots, args.context + args.steps * calls / 2, dtype)
    floor = 1e3 * read / bandwidth
    middle = statistics.median(step)
    rate = f"{1e3 * slots / middle:,.0f}"
    print(
        f"| {slots} | {middle:.2f} ({min(step):.2f}-{max(step):.2f}) | {rate} | {read / 1e9:.2f} | {floor:.2f} | "
        f"{floor / middle:.0%} |",
        flush=True,
    )


def full_control(slots: int, width: int, args) -> Control:
    control = empty_control(slots, width)
    control.tables[:] = 1 + np.arange(slots * width).reshape(slots, width)
    control.length[:] = control.position[:] = args.context
    control.limit[:] = 2**30
    control.active[:] = control.ignore_eos[:] = True
    control.params.temperature[:] = 0.0  # type: ignore[index]
    return control._replace(steps=np.int32(args.steps))


def bytes_of_a_step(config: ModelConfig, network, slots: int, context: float, dtype) -> float:
    """The decoder's weights but for the embedding table (of which a step reads its rows), and the cache."""
    text = config.text
    weights = sum(math.prod(s.shape) for n, s in network.specs.items() if not n.startswith("vision."))
    if not text.tie_word_embeddings:
        weights -= text.vocab_size * text.hidden_size
    cache = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * slots * context
    return (weights + cache) * dtype.itemsize


if __name__ == "__main__":
    main()
