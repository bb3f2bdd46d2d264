"""What a program computes: matrix-product FLOPs of its jaxpr, loops counted as often as they run."""

import math
from typing import Any

import jax


def flops(jaxpr: Any, *, while_trips: int = 1) -> float:
    """Floating-point operations of all matrix products and convolutions of a (closed) jaxpr.

    A scan counts as often as it is long, of a `cond` the dearest branch; a `while` loop, whose length is data,
    counts `while_trips` times.
    """
    total = 0.0
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            total += _dot_flops(equation)
        elif name == "scan":
            total += params["length"] * flops(params["jaxpr"], while_trips=while_trips)
        elif name == "while":
            body = flops(params["body_jaxpr"], while_trips=while_trips)
            total += while_trips * (body + flops(params["cond_jaxpr"], while_trips=while_trips))
        elif name == "cond":
            total += max(flops(branch, while_trips=while_trips) for branch in params["branches"])
        else:
            inner = [p for p in jax.tree.leaves(list(params.values()), is_leaf=_is_jaxpr) if _is_jaxpr(p)]
            # A function with a rule of its own for derivatives carries its own body beside the rule's.
            total += sum(flops(j, while_trips=while_trips) for j in inner[:1])
    return total


def _is_jaxpr(value: Any) -> bool:
    return hasattr(value, "eqns") or hasattr(value, "jaxpr")


def _dot_flops(equation: Any) -> float:
    (contract, _), _ = equation.params["dimension_numbers"]
    lhs = equation.invars[0].aval.shape
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(lhs[i] for i in contract)
