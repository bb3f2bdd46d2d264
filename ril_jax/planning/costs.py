"""What a program computes: matrix-product FLOPs of its jaxpr, loops counted as often as they run."""

import math
import re
from typing import Any

import jax

from ril_jax.models import attention_pallas


def flops(jaxpr: Any, *, while_trips: int = 1) -> float:
    """Floating-point operations of all matrix products and convolutions of a (closed) jaxpr.

    A scan counts as often as it is long, of a `cond` the dearest branch; a `while` loop, whose length is data,
    counts `while_trips` times. What a `shard_map` divides counts once for every share, a Pallas kernel once a
    step of its grid, but for the steps of a splash kernel whose blocks the mask empties.
    """
    return _flops(jaxpr, while_trips, None)


def _flops(jaxpr: Any, while_trips: int, blocks: tuple[int, int] | None) -> float:
    """`blocks`: (blocks that are not empty, blocks of a row) of the splash kernel that this is part of, or None."""
    total = 0.0
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name, params = equation.primitive.name, equation.params
        if found := _BLOCKS.search(str(equation.source_info.name_stack)):
            blocks = int(found[1]), int(found[2])
        if name == "dot_general":
            total += _dot_flops(equation)
        elif name == "scan":
            total += params["length"] * _flops(params["jaxpr"], while_trips, blocks)
        elif name == "while":
            parts = (params["body_jaxpr"], params["cond_jaxpr"])
            total += while_trips * sum(_flops(part, while_trips, blocks) for part in parts)
        elif name == "cond":
            total += max(_flops(branch, while_trips, blocks) for branch in params["branches"])
        elif name == "shard_map":
            shares = math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
            total += shares * _flops(params["jaxpr"], while_trips, blocks)
        elif name == "pallas_call":
            total += _kernel_steps(params["grid_mapping"].grid, blocks) * _flops(params["jaxpr"], while_trips, None)
        else:
            inner = [p for p in jax.tree.leaves(list(params.values()), is_leaf=_is_jaxpr) if _is_jaxpr(p)]
            # A function with a rule of its own for derivatives carries its own body beside the rule's.
            total += sum(_flops(j, while_trips, blocks) for j in inner[:1])
    return total


_BLOCKS = re.compile(attention_pallas.blocks_scope(r"(\d+)", r"(\d+)"))


def _kernel_steps(grid: tuple[int, ...], blocks: tuple[int, int] | None) -> float:
    """Steps that compute: all, or of a table of [blocks of a row, grid's last axis] those that are not empty."""
    if blocks is None:
        return math.prod(grid)
    computed, in_row = blocks
    return math.prod(grid) * computed / (in_row * grid[-1])


def _is_jaxpr(value: Any) -> bool:
    return hasattr(value, "eqns") or hasattr(value, "jaxpr")


def _dot_flops(equation: Any) -> float:
    (contract, _), _ = equation.params["dimension_numbers"]
    lhs = equation.invars[0].aval.shape
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(lhs[i] for i in contract)
