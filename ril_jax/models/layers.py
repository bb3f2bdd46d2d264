"""Building blocks that the decoder and the vision towers share: linear maps, norms, SwiGLU, rotary embedding."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ril_jax.models.parameters import param

REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
_CACHE_BYTES = 32 * 2**20  # of a processor, as `unstack_for_few_rows` takes it


class Linear(nnx.Module):
    """A linear map between possibly factored axes, e.g. [D] -> [N, H]; HF stores it as (prod(out), prod(in))."""

    def __init__(
        self,
        ins: tuple[int, ...],
        outs: tuple[int, ...],
        *,
        axes: tuple[str | None, ...],
        hf: str,
        bias: bool,
        layers: int | None = None,
        hf_shape: tuple[int, ...] | None = None,
        init: str = "normal",
    ):
        n_out, n_in = len(outs), len(ins)
        flat = (int(np.prod(outs)), int(np.prod(ins)))
        perm = (*range(n_out, n_out + n_in), *range(n_out))
        self.kernel = param(
            (*ins, *outs), axes, hf=f"{hf}.weight", layers=layers, init=init,
            hf_shape=flat if hf_shape is None else hf_shape, hf_split=(*outs, *ins), hf_perm=perm,
        )  # fmt: skip
        self.bias = (
            param(outs, axes[n_in:], hf=f"{hf}.bias", layers=layers, init="zeros", hf_shape=flat[:1], hf_split=outs)
            if bias
            else None
        )
        self.ins, self.outs = ins, outs
        self.outputs_first = False

    def put_outputs_first(self) -> None:
        """Hold the kernel as one matrix [prod(outs), prod(ins)] from now on."""
        matrix = self.kernel[...].reshape(math.prod(self.ins), math.prod(self.outs))
        self.kernel, self.outputs_first = nnx.Param(matrix.T), True

    def __call__(self, x):
        n = len(self.ins)
        kernel = self.kernel[...].astype(x.dtype)
        if self.outputs_first:
            leading = x.shape[: x.ndim - n]
            y = jnp.einsum("...i,oi->...o", x.reshape(*leading, -1), kernel).reshape(*leading, *self.outs)
        else:
            y = jax.lax.dot_general(x, kernel, ((tuple(range(x.ndim - n, x.ndim)), tuple(range(n))), ((), ())))
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class RMSNorm(nnx.Module):
    """Root-mean-square norm in float32; the weight multiplies after the cast back (HF `Qwen2RMSNorm`)."""

    def __init__(self, dim: int, *, eps: float, hf: str, layers: int | None = None):
        self.weight = param((dim,), ("norm",), hf=f"{hf}.weight", init="ones", layers=layers)
        self.eps = eps

    def __call__(self, x):
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return self.weight[...].astype(x.dtype) * x32.astype(x.dtype)


class LayerNorm(nnx.Module):
    """Layer norm, all of it in float32 (torch `LayerNorm`)."""

    def __init__(self, dim: int, *, eps: float, hf: str, layers: int | None = None):
        self.weight = param((dim,), ("norm",), hf=f"{hf}.weight", init="ones", layers=layers)
        self.bias = param((dim,), ("norm",), hf=f"{hf}.bias", init="zeros", layers=layers)
        self.eps = eps

    def __call__(self, x):
        x32 = x.astype(jnp.float32)
        x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return (self.weight[...].astype(jnp.float32) * x32 + self.bias[...].astype(jnp.float32)).astype(x.dtype)


class SwiGLU(nnx.Module):
    """down(silu(gate(x)) * up(x)) (HF `Qwen2MLP`)."""

    def __init__(self, dim: int, hidden: int, *, embed: str, ff: str, hf: str, bias: bool, layers: int | None = None):
        self.gate = Linear((dim,), (hidden,), axes=(embed, ff), hf=f"{hf}.gate_proj", bias=bias, layers=layers)
        self.up = Linear((dim,), (hidden,), axes=(embed, ff), hf=f"{hf}.up_proj", bias=bias, layers=layers)
        self.down = Linear((hidden,), (dim,), axes=(ff, embed), hf=f"{hf}.down_proj", bias=bias, layers=layers)

    def __call__(self, x):
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


def rotate(x, cos, sin):
    """Half-split rotary embedding of [..., heads, H] by cos, sin [..., H] (HF `rotate_half`)."""
    half = x.shape[-1] // 2
    cos, sin = cos[..., None, :half], sin[..., None, :half]  # the halves are equal
    x1, x2 = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)


def unstack(layers: nnx.Module) -> list[nnx.Module]:
    """The layers of a stacked module one by one, for straight-line code; XLA copies each out of the stack."""
    graphdef, state = nnx.split(layers)
    count = jax.tree.leaves(state)[0].shape[0]
    return [nnx.merge(graphdef, jax.tree.map(lambda a, i=i: a[i], state)) for i in range(count)]


def unstack_for_few_rows(layers: nnx.Module) -> list[nnx.Module]:
    """`unstack` for a decode loop on the CPU.

    XLA's product of a few rows with a matrix is some 30 % faster with outputs first where the matrix comes from
    memory, and slower where it stays in the processor's cache.
    """
    out = unstack(layers)
    if sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(nnx.state(layers))) > _CACHE_BYTES:
        for layer in out:
            for _, module in nnx.iter_modules(layer):
                if isinstance(module, Linear):
                    module.put_outputs_first()
    return out


def scan_layers(layers: nnx.Module, body, carry, xs=None, *, remat: str = "none", unroll: int | bool = 1):
    """Run `body(layer, carry, x) -> (carry, y)` over the stacked layers of a module.

    Args:
      layers: a module whose parameters all have the layers on axis 0.
      remat: "none", or a key of REMAT_POLICIES: what the backward pass keeps of a layer.
      unroll: passed to `jax.lax.scan`.
    """
    graphdef, state = nnx.split(layers)

    def step(carry, inputs):
        layer_state, x = inputs
        return body(nnx.merge(graphdef, layer_state), carry, x)

    if remat != "none":
        step = jax.checkpoint(step, policy=REMAT_POLICIES[remat], prevent_cse=False)
    return jax.lax.scan(step, carry, (state, xs), unroll=unroll)
