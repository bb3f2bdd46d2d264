"""Runs in a process of its own with 8 virtual devices: samples, log-probs, SFT and policy updates on one mesh.

python -m helpers.sharded FOLDER data,fsdp,tensor OUTPUT.npz
"""

import dataclasses
import os
import sys
from typing import Any

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
import numpy as np
import optax
from helpers import hf_internvl, hf_models
from jax.sharding import Mesh

from ril_jax import sharding
from ril_jax.data.packing import TileRung, VisionRung
from ril_jax.models import attention, paged_writes
from ril_jax.models.config import ModelConfig
from ril_jax.models.hub import load_params
from ril_jax.pretrained import make_network
from ril_jax.sampling.logits import SamplingParams
from ril_jax.sampling.sampler import Sampler
from ril_jax.training import ril as ril_lib
from ril_jax.training.batches import Buckets, flatten_features, flatten_micro, put
from ril_jax.training.programs import Programs
from ril_jax.training.state import init_state, make_update, split_frozen, split_micro

B, G, S, R, MICRO = 16, 2, 4, 8, 8


def main(folder: str, sizes: str, output: str) -> None:
    data, fsdp, tensor = map(int, sizes.split(","))
    count = data * fsdp * tensor
    mesh = Mesh(np.asarray(jax.devices()[:count]).reshape(data, fsdp, tensor), ("data", "fsdp", "tensor"))
    sharding.use(mesh)
    config = ModelConfig.from_folder(folder)
    network = make_network(config)
    params = load_params(folder, network, shardings=sharding.param_shardings(network.specs, mesh))
    rungs = (VisionRung(400, 10, 120), VisionRung(1600, 20, 120), TileRung(8), TileRung(32))
    kind = TileRung if config.family == "internvl" else VisionRung
    rungs = tuple(rung for rung in rungs if isinstance(rung, kind))
    buckets = Buckets(config, (48,), (R,), rungs, sharding.num_shards(mesh))
    programs = Programs(network, jnp.float32, remat="full", chunk=64)
    rng = np.random.default_rng(0)
    make: Any = hf_internvl.prompt if config.family == "internvl" else hf_models.prompt
    images: Any = [(), ((4, 4),), ((6, 8),), ((4, 4), (4, 6))]
    images = [(), (1,), (2,), (1, 1)] if config.family == "internvl" else images
    prompts = [make(rng, 6, *images[i % 4]) for i in range(B)]
    out = {}

    packed = buckets.pack_prompts(prompts, batch=B, micro=MICRO)
    vision, packed = put(packed.vision, mesh), packed._replace(vision=None)
    features = programs.encode(params, vision)
    sampler = Sampler(network, (1,), 0)
    keys = np.random.default_rng(1).integers(0, 2**32, (B, 2), dtype=np.uint32)
    layout = buckets.layout(B, MICRO)
    for name, sampling in (("greedy", SamplingParams(temperature=0.0)), ("drawn", SamplingParams())):
        samples = sampler(
            params, put(flatten_micro(packed, layout.groups), mesh, micro=False), flatten_features(features),
            put(layout.flat(keys), mesh, micro=False), num_samples=G, max_tokens=R, sampling=sampling,
        )  # fmt: skip
        drawn = [layout.in_order(np.asarray(values)) for values in (samples.token_ids, samples.logprobs)]
        out[name], out[name + "_logprobs"] = drawn

    if fsdp > 1:
        for kind in ("replicated", "tensor"):
            where = sharding.sampling_mesh(mesh, kind)
            with jax.transfer_guard("disallow_explicit"):
                moved = jax.block_until_ready(programs.move(params, where))
            parts = [p.size // int(np.prod(p.sharding.shard_shape(p.shape))) for p in moved.values()]
            out[f"{kind}_parts"] = np.asarray(parts)
            samples = dataclasses.replace(sampler, mesh=where)(
                moved, put(flatten_micro(packed, layout.groups), mesh, micro=False), flatten_features(features),
                put(layout.flat(keys), mesh, micro=False), num_samples=G, max_tokens=R, sampling=SamplingParams(),
            )  # fmt: skip
            out[kind] = layout.in_order(np.asarray(samples.token_ids))

    responses = [[rng.integers(10, 280, rng.integers(2, R + 1)).astype(np.int32) for _ in range(S)] for _ in range(B)]
    answers = buckets.pack_responses(responses, batch=B, micro=MICRO)
    per_row = [rng.normal(size=(B, G, R)).astype(np.float32), rng.normal(size=(B, S)).astype(np.float32)]
    per_row = [split_micro(values, B // MICRO) for values in per_row]
    rows = put((packed, answers, answers.mask, *per_row), mesh)
    ref, entropy = programs.score(params, rows[0], rows[1], features)
    out["score"], out["entropy"] = np.where(answers.mask, ref, 0), np.where(answers.mask, entropy, 0)

    optimizer = optax.sgd(1.0)
    normalizer = np.full((B // MICRO,), B * S * R, np.float32)
    trained, frozen = split_frozen(params, train_vision=True)
    update = ril_lib._policy_update(programs, optimizer, G, 0.2, None, 0.04, "dr_grpo")
    batch = (*rows, features, vision, ref + 0.1, ref - 0.1, normalizer)
    state, metrics = update(init_state({n: p.copy() for n, p in trained.items()}, optimizer, mesh), frozen, batch)
    for name, value in metrics.items():
        out[f"ril/{name}"] = np.asarray(value)
    for name, value in state.params.items():
        assert value.sharding.is_equivalent_to(params[name].sharding, value.ndim), name
        out[f"ril_step/{name}"] = np.asarray(value) - np.asarray(params[name])

    update = make_update(programs.sft_loss, optimizer)
    whole = (rows[0]._replace(vision=vision), rows[1], normalizer)
    state, metrics = update(init_state({n: p.copy() for n, p in params.items()}, optimizer, mesh), {}, whole)
    out["sft/loss"] = np.asarray(metrics["loss"])
    for name, value in state.params.items():
        out[f"sft_step/{name}"] = np.asarray(value) - np.asarray(params[name])

    attention.use("pallas")
    pools = (jnp.zeros((2, 6, 8, 128)),) * 2
    new = (jnp.asarray(rng.normal(size=(2, 1, 2, 128)), jnp.float32),) * 2
    out["pages"] = np.asarray(paged_writes.write(pools, new, jnp.asarray([[2], [5]]), jnp.asarray([[3], [7]]))[1])
    np.savez(output, **out)


if __name__ == "__main__":
    main(*sys.argv[1:])
