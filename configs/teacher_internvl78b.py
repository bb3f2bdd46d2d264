"""InternVL3-78B as a teacher: samples the paper's 16 responses a question, offline, or answers as a server.

    python -m ril_jax.generate --config=configs/teacher_internvl78b.py --help  # what else it needs, and every field
    python -m ril_jax.serve --config=configs/teacher_internvl78b.py --help

For 8 chips of 32 GB (v6e-8, one host), each with 18 GiB of weights and 7.5 of key-value cache, or 4 of 95 GB (v5p-8,
with --config.mesh.tensor=4). The 8 key-value heads take 8 chips (mesh.tensor); more of them divide the weights further
(mesh.fsdp). What 8 do not divide, 151,674 words and the 25 heads of the tower, is divided along the embedding.
"""

from ml_collections import ConfigDict

from ril_jax.config import serving_config
from ril_jax.paper import MAX_TILES, TEACHERS, set_sampling


def get_config() -> ConfigDict:
    c = serving_config()
    c.checkpoint = TEACHERS["internvl78b"]  # [P]
    set_sampling(c)
    c.generate.num_generations = 16  # [P]
    c.max_tiles = MAX_TILES  # [R] what the students see
    c.mesh.fsdp, c.mesh.tensor = -1, 8

    # Two images of 1792 tokens with a question, and 512 new tokens. A question's 16 responses share the pages of its
    # prompt: 3072 pages are nearly twice what 8 such questions, which take all slots, can fill.
    c.engine.max_model_len = 4608
    c.engine.slots, c.engine.num_pages = 128, 3072
    c.engine.prefill = ((256, 8), (2048, 1))
    return c
