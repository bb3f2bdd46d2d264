"""Qwen2.5-VL-72B as a teacher: samples the paper's 16 responses a question, offline, or answers as a server.

    python -m ril_jax.generate --config=configs/teacher_qwen72b.py --help  # what else it needs, and every field
    python -m ril_jax.serve --config=configs/teacher_qwen72b.py --help

For 8 chips of 32 GB (v6e-8, one host), each with 17 GiB of weights and 7.5 of key-value cache, or 4 of 95 GB (v5p-8,
with --config.mesh.tensor=4). The 8 key-value heads take 8 chips (mesh.tensor); more of them divide the weights further
(mesh.fsdp).
"""

from ml_collections import ConfigDict

from ril_jax.config import serving_config
from ril_jax.paper import TEACHERS, set_sampling


def get_config() -> ConfigDict:
    c = serving_config()
    c.checkpoint = TEACHERS["qwen72b"]  # [P]
    set_sampling(c)
    c.generate.num_generations = 16  # [P]
    c.mesh.fsdp, c.mesh.tensor = -1, 8
    c.min_pixels, c.max_pixels = 32 * 28 * 28, 512 * 28 * 28  # [R] what the students see

    # Two images of 512 tokens with a long question, and 512 new tokens. A question's 16 responses share the pages of
    # its prompt: 3072 pages are twice what 8 such questions, which take all slots, can fill.
    c.engine.max_model_len = 2560
    c.engine.slots, c.engine.num_pages = 128, 3072
    c.engine.prefill = ((256, 8), (1024, 2))
    return c
