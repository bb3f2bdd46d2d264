"""A small engine over a tiny model."""

import jax.numpy as jnp
from helpers import hf_models

from ril_jax import sharding
from ril_jax.models.hub import load_params
from ril_jax.models.parameters import Network
from ril_jax.models.vlm import VisionLanguageModel
from ril_jax.sampling.engine import Engine
from ril_jax.sampling.engine_programs import EnginePrograms, EngineShapes
from ril_jax.sampling.logits import SamplingParams

GREEDY = SamplingParams(temperature=0.0)
DRAWN = SamplingParams(temperature=1.0)
FILTERED = SamplingParams(temperature=0.9, top_k=40, top_p=0.9, repetition_penalty=1.2)
SHAPES = EngineShapes(
    slots=6, small_slots=0, max_model_len=160, page_size=8, num_pages=140, prefill=((16, 3), (32, 2)), decode_steps=4,
    attention_block=32, feature_rows=192,
)  # fmt: skip


def make_engine(tiny, shapes=SHAPES, eos=(hf_models.EOS,)) -> Engine:
    network = Network(lambda: VisionLanguageModel(tiny.config))
    programs = EnginePrograms(
        network, tiny.config, shapes, sharding.make_mesh(), tuple(eos), tiny.config.text.vocab_size, jnp.float32,
        unroll=True,
    )  # fmt: skip
    engine = Engine(programs, load_params(tiny.folder, network), image_token_id=tiny.config.image_token_id)
    engine.warm_up()
    return engine
