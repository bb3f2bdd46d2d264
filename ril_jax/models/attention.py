"""Attention by meaning: group rows (training, prefill), decode over a shared prompt cache, vision tiles and segments.

The one interface that the networks call, and the one place where a backend is chosen: plain XLA (`attention_xla.py`,
every platform, the reference), or JAX's Pallas kernels for TPUs (`attention_pallas.py`). Decode over a paged cache
stands in `paged.py` and asks `backend` too.
"""

import contextlib
from collections.abc import Iterator
from types import ModuleType

import jax

from ril_jax import sharding
from ril_jax.errors import InputError
from ril_jax.models import attention_xla

BACKENDS = ("auto", "xla", "pallas")
_chosen = "auto"


def use(backend: str) -> None:
    """From here on programs are traced with this backend; "auto" takes the kernels on TPUs and XLA elsewhere.

    "pallas" on a CPU runs the kernels interpreted, which is for tests: it is slow. Raises InputError for other names.
    """
    global _chosen
    if backend not in BACKENDS:
        raise InputError(f"config.attention={backend!r} is not known; use one of {', '.join(BACKENDS)}")
    _chosen = backend


def chosen() -> str:
    """What was told to `use`, "auto" until then."""
    return _chosen


def backend() -> str:
    """ "xla" or "pallas", by what was chosen and by the devices of the mesh in use (absent ones too, as in a plan).

    Raises InputError where the kernels were asked for and the devices are neither TPUs nor a CPU.
    """
    platform = sharding.platform()
    if _chosen == "pallas" and platform not in ("tpu", "cpu"):
        raise InputError(
            f"config.attention='pallas': these kernels are for TPUs, not for a {platform}; use auto or xla"
        )
    if _chosen == "auto":
        # A kernel cannot be divided over devices that no mesh names.
        known = sharding.mesh_in_use() is not None or jax.device_count() == 1
        return "pallas" if platform == "tpu" and known else "xla"
    return _chosen


@contextlib.contextmanager
def kernels() -> Iterator[None]:
    """Around calls of JAX's kernels for TPUs: they are interpreted where the mesh's platform is another."""
    if sharding.platform() == "tpu":
        yield
        return
    from jax.experimental.pallas import tpu as pltpu  # loaded where it is used

    with pltpu.force_tpu_interpret_mode():
        yield


def group_attention(q, k, v, valid, *, prompt_len: int, num_responses: int):
    """Attention of rows `[prompt | response 1 | ... | response S]`: a token sees prompt and own response, causally.

    Args:
      q: [B, T, N, H]; k, v: [B, T, K, H] with T = prompt_len + S * R, responses all R wide.
      valid: [B, T] bool, False at padding (left, right or within); no token sees padding.
      prompt_len: P. num_responses: S; 0 makes it plain causal attention.

    Returns: [B, T, N, H]. Rows at padding hold finite values without meaning.
    """
    return _forms().group_attention(q, k, v, valid, prompt_len=prompt_len, num_responses=num_responses)


def decode_attention(q, k_new, v_new, prompt_k, prompt_v, prompt_valid, own_k, own_v, own_len):
    """One new token per sample attends to its question's prompt cache, its own earlier tokens, and itself.

    The prompt cache is shared by the G samples of a question and never copied. The caller writes k_new, v_new into the
    samples' caches afterwards, so no cache passes through here as an output. XLA on every platform: it is bound by
    reading the caches, which plain products do once.

    Args:
      q: [B, G, N, H]; k_new, v_new: [B, G, K, H].
      prompt_k, prompt_v: [B, K, P, H]; prompt_valid: [B, P] bool.
      own_k, own_v: [B, K, G, R, H]; own_len: [] int, how many of R are written (the same for all samples).

    Returns: [B, G, N, H].
    """
    return attention_xla.decode_attention(q, k_new, v_new, prompt_k, prompt_v, prompt_valid, own_k, own_v, own_len)


def full_attention(q, k, v):
    """Every token of a row sees every other: [B, T, N, H] each -> [B, T, N, H].

    For tiles of some 1,000 patches. XLA writes and reads the scores, B * N * T^2 float32: 67 MB for a tile in 16 heads,
    a quarter of a millisecond at 819 GB/s, where the products are 0.02 ms at 197 TFLOP/s; a kernel keeps them on chip.
    """
    return _forms().full_attention(q, k, v)


def window_attention(q, k, v, index, slot):
    """Full attention within each window of a packed buffer, as dense batched windows: at most 64 patches each.

    XLA on every platform: the scores of a window are small beside its share of the layer's other products.

    Args:
      q, k, v: [X, N, H], all images of the batch end to end.
      index: [S, M] int32, row of each segment's m-th member, X where the segment is shorter.
      slot: [X] int32, the inverse: s * M + m of each row, S * M for padding rows.

    Returns: [X, N, H]; zero at padding rows.
    """
    return attention_xla.segment_attention(q, k, v, index, slot)


def frame_attention(q, k, v, index, slot):
    """Full attention within each frame of a packed buffer, in which a frame's rows lie side by side.

    Arguments and result as of `window_attention`; rows at padding hold finite values without meaning.
    """
    return _forms().frame_attention(q, k, v, index, slot)


def _forms() -> ModuleType:
    if backend() == "xla":
        return attention_xla
    from ril_jax.models import attention_pallas  # Pallas is loaded where it is used

    return attention_pallas
