"""A wider feed-forward that computes the same, for TPUs that share one whose width leaves lanes empty.

A TPU keeps the last axis of a matrix in lanes of 128. Where a chip's share of the feed-forward is no multiple of them
(29568 of the 72B and 78B models over 4 or 8 chips), the compiler lays the weights out the other way round for prompts
than for decoding, and every decode call begins with a copy of two thirds of the model. Units of zeros, .4 % more here,
add nothing to what the others compute, and no copy is made.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ril_jax.models import attention
from ril_jax.models.config import ModelConfig
from ril_jax.models.parameters import Params

LANES = 128
_AXES = {"gate.kernel": 2, "up.kernel": 2, "down.kernel": 1}  # of [L, D, F] and [L, F, D]


def whole_lanes(config: ModelConfig, tensor: int) -> ModelConfig:
    """The config with a feed-forward of the decoder whose share of each of `tensor` chips fills whole lanes."""
    width = config.text.intermediate_size
    if width % tensor:  # then it is not divided
        return config
    share = -(-width // tensor // LANES) * LANES
    return dataclasses.replace(config, text=dataclasses.replace(config.text, intermediate_size=share * tensor))


def as_served(config: ModelConfig, mesh: Mesh) -> ModelConfig:
    """The config of the network that the engine runs on a mesh: `whole_lanes` where the kernels for TPUs are used."""
    return whole_lanes(config, mesh.shape["tensor"]) if attention.backend() == "pallas" else config


def pad_feed_forward(params: Params, config: ModelConfig, mesh: Mesh) -> Params:
    """Parameters of a config that `whole_lanes` gave from those of the narrower network, which are taken away.

    The zeros stand at the end of each chip's share, so that nothing moves between chips.
    """
    tensor, width = mesh.shape["tensor"], config.text.intermediate_size
    padded = dict(params)
    for name, axis in _AXES.items():
        name = f"text.layers.mlp.{name}"
        old = padded[name]
        if old.shape[axis] != width:
            pad = functools.partial(_pad, axis=axis, shares=tensor, share=width // tensor)
            padded[name] = jax.jit(pad, out_shardings=old.sharding)(old)
            old.delete()
    return padded


def _pad(array, *, axis: int, shares: int, share: int):
    *before, width = array.shape[: axis + 1]
    after = array.shape[axis + 1 :]
    room = [(0, 0)] * len(before) + [(0, 0), (0, share - width // shares)] + [(0, 0)] * len(after)
    apart = jnp.pad(array.reshape(*before, shares, width // shares, *after), room)
    return apart.reshape(*before, shares * share, *after)
