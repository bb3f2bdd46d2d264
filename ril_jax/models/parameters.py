"""One description of a parameter, and the networks that are made of such descriptions.

A `ParamSpec` says everything that is to be known of a parameter: shape, logical axes, initialiser, and the name and
layout that it has in a Hugging Face checkpoint. Flax NNX modules hold specs (`nnx.Param(spec=...)`) and say what is
computed; a `Network` splits such a module once. What crosses `jax.jit` is a flat dict {"text.layers.q.kernel": array},
with the layers stacked on the leading axis; inside the jitted function `Network.bind` puts the arrays back into the
module.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

Params = dict[str, jax.Array]
_TABLES = {"vocab", "vision_positions"}  # axes whose rows are looked up, not summed over


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """Shape, logical axes, initialiser and HF identity of one parameter.

    Attributes:
      shape: our shape; a stacked parameter has the layers in front.
      axes: one logical axis name (or None) per dimension; `sharding.py` maps them to mesh axes.
      init: "normal" (std 0.02 unless `scale`), "zeros", "ones" or "constant" (`scale`).
      hf: name in the hub layout, with `{layer}` for stacked parameters; "" for parameters that no HF checkpoint has.
      hf_shape: shape of the tensor in the file (of one layer).
      hf_split, hf_perm: ours (of one layer) = tensor.reshape(hf_split).transpose(hf_perm).
      scale: standard deviation of "normal", value of "constant".
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: str
    hf: str
    hf_shape: tuple[int, ...]
    hf_split: tuple[int, ...]
    hf_perm: tuple[int, ...]
    scale: float = 0.02

    @property
    def stacked(self) -> bool:
        return bool(self.axes) and self.axes[0] == "layers"

    def from_hf(self, tensor: np.ndarray) -> np.ndarray:
        """One HF tensor (of one layer) in our layout; a view where numpy can."""
        return tensor.reshape(self.hf_split).transpose(self.hf_perm)

    def to_hf(self, array: np.ndarray) -> np.ndarray:
        """The inverse of `from_hf`, contiguous."""
        return np.ascontiguousarray(array.transpose(np.argsort(self.hf_perm))).reshape(self.hf_shape)


def param(
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    *,
    hf: str,
    init: str = "normal",
    layers: int | None = None,
    hf_shape: tuple[int, ...] | None = None,
    hf_split: tuple[int, ...] | None = None,
    hf_perm: tuple[int, ...] | None = None,
    scale: float = 0.02,
) -> nnx.Param:
    """An abstract `nnx.Param` that carries its `ParamSpec`; with `layers`, stacked on a leading axis."""
    hf_shape = shape if hf_shape is None else hf_shape
    hf_split = hf_shape if hf_split is None else hf_split
    hf_perm = tuple(range(len(hf_split))) if hf_perm is None else hf_perm
    full, names = (shape, axes) if layers is None else ((layers, *shape), ("layers", *axes))
    spec = ParamSpec(full, names, init, hf, hf_shape, hf_split, hf_perm, scale)
    return nnx.Param(jax.ShapeDtypeStruct(full, jnp.float32), spec=spec)


class Network:
    """An NNX module split once into its structure and the specs of its parameters.

    `Network(lambda: Qwen2_5_VL(config))`; then `network.bind(params)` gives the module with arrays in it.
    """

    def __init__(self, make: Callable[[], nnx.Module]):
        module = make()
        self.graphdef, state = nnx.split(module)
        self._variables = {".".join(map(str, path)): (path, variable) for path, variable in nnx.to_flat_state(state)}
        self.specs: dict[str, ParamSpec] = {
            name: variable.get_metadata()["spec"] for name, (_, variable) in self._variables.items()
        }

    def bind(self, params: Mapping[str, Any]) -> Any:
        """The module with `params` in it; call it inside jit. Raises KeyError for a missing parameter."""
        state = nnx.from_flat_state(
            [(path, variable.replace(params[name])) for name, (path, variable) in self._variables.items()]
        )
        return nnx.merge(self.graphdef, state)

    def abstract(self, dtype: Any = jnp.float32) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of all parameters in `dtype`, without memory."""
        return {name: jax.ShapeDtypeStruct(spec.shape, dtype) for name, spec in self.specs.items()}

    def init(self, key: jax.Array, dtype: Any = jnp.float32, *, scheme: str = "normal") -> Params:
        """Fresh parameters, each from its own key (by name, so that the order of definition does not matter).

        scheme: "normal" is HF's, std 0.02 throughout; "fan_in" draws matrices with std 1/sqrt(inputs) and tables of
        embeddings with 0.1, without which a network of a few hundred thousand parameters takes long to learn to see.
        """
        stds = {name: spec.scale if scheme == "normal" else _fan_in_std(spec) for name, spec in self.specs.items()}
        return {name: _init_one(spec, _named_key(key, name), dtype, stds[name]) for name, spec in self.specs.items()}

    @property
    def num_params(self) -> int:
        return sum(math.prod(spec.shape) for spec in self.specs.values())


def cast(params: Mapping[str, jax.Array], dtype: Any) -> Params:
    """The parameters in the compute dtype; differentiable, a no-op where they are in it."""
    return {name: value.astype(dtype) for name, value in params.items()}


def layer_params(module: nnx.Module) -> tuple[Any, Any]:
    """Split a stacked-layers module into (graphdef, state with a leading layer axis) for `jax.lax.scan`."""
    return nnx.split(module)


def _named_key(key: jax.Array, name: str) -> jax.Array:
    return jax.random.fold_in(key, hash_name(name))


@functools.cache
def hash_name(name: str) -> int:
    """A hash of a name that is the same in every process (Python's own is salted)."""
    value = 2166136261
    for byte in name.encode():
        value = ((value ^ byte) * 16777619) & 0xFFFFFFFF
    return value


def _fan_in_std(spec: ParamSpec) -> float:
    return 0.1 if _TABLES & set(spec.axes) else math.prod(spec.hf_shape[1:]) ** -0.5


def _init_one(spec: ParamSpec, key: jax.Array, dtype: Any, std: float) -> jax.Array:
    if spec.init == "zeros":
        return jnp.zeros(spec.shape, dtype)
    if spec.init == "ones":
        return jnp.ones(spec.shape, dtype)
    if spec.init == "constant":
        return jnp.full(spec.shape, spec.scale, dtype)
    return (jax.random.normal(key, spec.shape, jnp.float32) * std).astype(dtype)
