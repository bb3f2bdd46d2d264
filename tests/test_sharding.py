"""Claims about the table of shardings: what divides, and what is done where it does not."""

import math

import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from ril_jax import sharding
from ril_jax.models.config import ModelConfig
from ril_jax.pretrained import make_network

AXES = ("data", "fsdp", "tensor")


def specs(config: ModelConfig, *sizes: int):
    network = make_network(config)
    mesh = AbstractMesh(sizes, AXES)
    return network.specs, {name: spec.spec for name, spec in sharding.param_shardings(network.specs, mesh).items()}


@pytest.mark.parametrize(
    ("sizes", "embedding", "query"),
    [
        ((1, 1, 8), PartitionSpec(None, "tensor"), PartitionSpec(None, "tensor")),
        ((1, 2, 4), PartitionSpec(None, ("fsdp", "tensor")), PartitionSpec(None, ("fsdp", "tensor"))),
        ((2, 2, 1), PartitionSpec(None, "fsdp"), PartitionSpec(None, "fsdp")),
    ],
)
def test_what_tensor_does_not_divide_is_divided_along_the_embedding(sizes, embedding, query):
    """151,674 words and 25 heads of the 78B teacher; 64 heads of its decoder divide."""
    _, where = specs(ModelConfig.internvl3("78b"), *sizes)
    assert where["text.embedding"] == where["text.lm_head"] == embedding
    assert where["vision.blocks.q.kernel"] == query
    assert ("tensor" in where["text.layers.q.kernel"]) == (sizes[2] > 1)


def test_a_word_list_that_divides_is_divided():
    _, where = specs(ModelConfig.qwen2_5_vl("72b"), 1, 2, 8)
    assert where["text.embedding"] == PartitionSpec("tensor", "fsdp")


def test_eight_chips_hold_the_78b_teacher_in_equal_parts():
    """Beside what no axis divides (norms and biases) nothing is held by all."""
    shapes, where = specs(ModelConfig.internvl3("78b"), 1, 1, 8)
    whole = sum(math.prod(spec.shape) for name, spec in shapes.items() if not any(where[name]))
    assert whole < 0.001 * sum(math.prod(spec.shape) for spec in shapes.values())
