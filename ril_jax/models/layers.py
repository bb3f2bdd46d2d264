"""Building blocks that the decoder and the vision towers share: linear maps, RMSNorm, SwiGLU, rotary embedding."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ril_jax.models.parameters import param

REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


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
        self.num_in = n_in

    def __call__(self, x):
        n = self.num_in
        kernel = self.kernel[...].astype(x.dtype)
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
    turned = jnp.concatenate([-x[..., half:], x[..., :half]], axis=-1)
    return x * cos[..., None, :] + turned * sin[..., None, :]


def unstack(layers: nnx.Module) -> list[nnx.Module]:
    """The layers of a stacked module one by one, for straight-line code; XLA copies each out of the stack."""
    graphdef, state = nnx.split(layers)
    count = jax.tree.leaves(state)[0].shape[0]
    return [nnx.merge(graphdef, jax.tree.map(lambda a, i=i: a[i], state)) for i in range(count)]


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
