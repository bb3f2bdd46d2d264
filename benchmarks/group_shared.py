"""Training on a group of responses: one row `[prompt | r1 .. rS]` a question against S rows `[prompt | r]`.

    python benchmarks/group_shared.py --repeats=9

Method. Loss and gradient of every decoder parameter through `Qwen2.rows`, float32 on the CPU, text-only network of
random weights, chunked log-probs over the response tokens, remat "full" as in training. Both forms are given the same
prompts and responses, all of full length, and are asserted to give the same loss (1e-5 relative) and gradients (1e-4
of each one's largest entry). The forms alternate in one process; compilation is not counted; medians with min-max,
and the ratio of medians and of minima. The last column is the bound that the token counts give: S (P + R) / (P + S
R).
"""

import argparse
import functools
import os
import statistics
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np

from ril_jax.models.config import TextConfig
from ril_jax.models.parameters import Network
from ril_jax.models.qwen2 import Qwen2
from ril_jax.objectives import chunked_logprobs, sft_loss

# name: (questions B, prompt tokens P, responses S, response tokens R, hidden, intermediate, layers, heads, kv heads,
#        vocabulary)
SIZES = {
    "tiny": (4, 64, 8, 32, 128, 344, 2, 4, 2, 512),
    "middling": (2, 256, 8, 64, 384, 1024, 4, 6, 2, 4096),
    "long prompt": (1, 512, 16, 32, 384, 1024, 4, 6, 2, 4096),
}


def loss(network, prompt_len, num_responses, params, token_ids, positions):
    """Mean negative log-likelihood of the response tokens of rows [prompt | num_responses responses]."""
    decoder = network.bind(params)
    B, T = token_ids.shape
    P, S = prompt_len, num_responses
    R = (T - P) // S
    x = decoder.embed(token_ids)
    hidden, _ = decoder.rows(x, positions, jnp.ones((B, T), bool), prompt_len=P, num_responses=S, remat="full")
    # A response's first token is predicted at the prompt's end, the others at the token before them.
    first = jnp.broadcast_to(hidden[:, None, P - 1 : P], (B, S, 1, hidden.shape[-1]))
    before = jnp.concatenate([first, hidden[:, P:].reshape(B, S, R, -1)[:, :, :-1]], axis=2)
    targets_n = token_ids[:, P:].reshape(-1)
    hidden_nd = before.reshape(len(targets_n), -1)
    head = decoder.head()
    logprobs, _ = chunked_logprobs(hidden_nd, head, targets_n, chunk=512, with_entropy=False, tied=True)
    return sft_loss(logprobs, jnp.ones_like(targets_n, bool))


def rows(prompts, responses):
    """token_ids and positions [B, P + S * R] of prompts [B, P], responses [B, S, R]; each response goes on from P."""
    (B, P), (_, S, R) = prompts.shape, responses.shape
    token_ids = np.concatenate([prompts, responses.reshape(B, S * R)], axis=1)
    positions = np.concatenate([np.arange(P), np.tile(P + np.arange(R), S)])
    return token_ids, np.broadcast_to(positions, token_ids.shape).astype(np.int32)


def measure(size: str, repeats: int) -> str:
    B, P, S, R, D, F, L, N, K, V = SIZES[size]
    config = TextConfig(V, D, F, L, N, K, D // N, 1e-6)
    network = Network(lambda: Qwen2(config))
    params = network.init(jax.random.PRNGKey(0))
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, V, (B, P)).astype(np.int32)
    responses = rng.integers(0, V, (B, S, R)).astype(np.int32)
    inputs = {
        "shared": rows(prompts, responses),
        "apart": rows(np.repeat(prompts, S, axis=0), responses.reshape(B * S, 1, R)),
    }
    steps = {
        "shared": jax.jit(jax.value_and_grad(functools.partial(loss, network, P, S))),
        "apart": jax.jit(jax.value_and_grad(functools.partial(loss, network, P, 1))),
    }
    results = {form: jax.block_until_ready(steps[form](params, *inputs[form])) for form in steps}
    check(results["shared"], results["apart"])
    seconds: dict[str, list[float]] = {form: [] for form in steps}
    for i in range(repeats):
        for form in ("shared", "apart") if i % 2 == 0 else ("apart", "shared"):
            start = time.perf_counter()
            jax.block_until_ready(steps[form](params, *inputs[form]))
            seconds[form].append(1000 * (time.perf_counter() - start))
    shared, apart = seconds["shared"], seconds["apart"]
    spread = lambda x: f"{statistics.median(x):.0f} ({min(x):.0f}-{max(x):.0f})"  # noqa: E731
    ratios = f"{statistics.median(apart) / statistics.median(shared):.2f} | {min(apart) / min(shared):.2f}"
    tokens = f"{inputs['shared'][0].size:,} | {inputs['apart'][0].size:,}"
    bound = S * (P + R) / (P + S * R)
    sizes = f"{size}: B {B}, P {P}, S {S}, R {R}"
    return f"| {sizes} | {tokens} | {spread(shared)} | {spread(apart)} | {ratios} | {bound:.2f} |"


def check(shared, apart) -> None:
    np.testing.assert_allclose(shared[0], apart[0], rtol=1e-5)
    for name, gradient in apart[1].items():
        scale = np.abs(gradient).max()
        np.testing.assert_allclose(shared[1][name], gradient, atol=1e-4 * scale + 1e-7, rtol=0, err_msg=name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", action="append", choices=tuple(SIZES))
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    print(f"{os.cpu_count()} cores, jax {jax.__version__}")
    print("| size | tokens, shared | apart | shared, ms: median (min-max) | apart, ms | medians | minima | bound |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for size in args.size or SIZES:
        print(measure(size, args.repeats), flush=True)


if __name__ == "__main__":
    main()
