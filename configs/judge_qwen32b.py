"""Qwen2.5-32B-Instruct as the judge: a server that RIL asks whether a response is right (docs/rewards.md).

    python -m ril_jax.serve --config=configs/judge_qwen32b.py --help     # every field
    python -m ril_jax.train ... --config.reward.judge.base_url=http://HOST:8000/v1

For 8 chips of 16 GB (v5e-8) or more: a chip holds 8 GB of weights and 4.4 GB of key-value cache. The 8 key-value heads
take 8 chips (mesh.tensor; 4 for a v5p-8; four chips of 32 GB are too few); more of them divide the weights further
(mesh.fsdp).
"""

from ml_collections import ConfigDict

from ril_jax.config import serving_config
from ril_jax.paper import JUDGE


def get_config() -> ConfigDict:
    c = serving_config()
    c.checkpoint = JUDGE  # [P]
    c.mesh.fsdp, c.mesh.tensor = -1, 8
    c.server.model_name = JUDGE  # what config.reward.judge.model asks for

    # Verdicts are greedy and short [R]; every request says so itself.
    c.sampling.temperature, c.sampling.top_p, c.sampling.top_k = 0.0, 1.0, 0
    c.sampling.repetition_penalty = 1.0
    c.sampling.max_completion_length = 256

    # Instructions, question, solution, a response of 512 tokens, and the verdict.
    c.engine.max_model_len = 2048
    c.engine.slots = 64  # config.reward.judge.concurrency
    c.engine.prefill = ((256, 8), (1024, 4))
    return c
