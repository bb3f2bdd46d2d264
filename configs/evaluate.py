"""Any model of the three families on the paper's benchmarks (docs/evaluation.md): greedy, images as in training.

    python -m ril_jax.evaluate --config=configs/evaluate.py --checkpoint=DIR --data=FOLDER --output=DIR \\
        --config.evaluate.judge.kind=openai --config.evaluate.judge.base_url=http://judge:8000/v1

For a model of up to 8 billion parameters on 4 chips of 16 GB or more. DIR is a Hugging Face folder, a hub id, or what
training left in its workdir (ril/ril/model). MM-Vet and MM-Vet v2 need the judge, options and MathVista may use it.
"""

from ml_collections import ConfigDict

from ril_jax.config import serving_config
from ril_jax.paper import MAX_TILES


def get_config() -> ConfigDict:
    c = serving_config()
    c.mesh.fsdp, c.mesh.tensor = -1, 1
    c.min_pixels, c.max_pixels = 32 * 28 * 28, 512 * 28 * 28  # [R] what students are trained with
    c.max_tiles = MAX_TILES  # [R]

    # Four images of InternVL (BLINK) take 7168 tokens; of Qwen2.5-VL, 2048.
    c.engine.max_model_len = 8704
    c.engine.slots, c.engine.num_pages = 64, 2560
    c.engine.prefill = ((256, 8), (2048, 1))
    c.generate.concurrency = 128
    return c
