"""Claims about the wider feed-forward: it computes the same, and widths that fill their lanes stay."""

import jax.numpy as jnp
import numpy as np
import pytest

from ril_jax import sharding
from ril_jax.models import lanes
from ril_jax.models.config import ModelConfig
from ril_jax.models.hub import load_params
from ril_jax.models.layers import unstack
from ril_jax.pretrained import make_network


def test_zeros_stand_at_the_end_of_each_share():
    array = jnp.arange(2 * 6.0).reshape(1, 2, 6) + 1
    wide = np.asarray(lanes._pad(array, axis=2, shares=2, share=5))
    assert wide[0, 0].tolist() == [1, 2, 3, 0, 0, 4, 5, 6, 0, 0]
    tall = np.asarray(lanes._pad(array.transpose(0, 2, 1), axis=1, shares=2, share=5))
    np.testing.assert_array_equal(tall, wide.transpose(0, 2, 1))


@pytest.mark.parametrize(
    ("size", "tensor", "width"),
    [("72b", 4, 29696), ("72b", 8, 29696), ("7b", 4, 18944), ("7b", 8, 19456), ("3b", 2, 11008), ("72b", 5, 29568)],
)
def test_the_width_of_a_share(size, tensor, width):
    assert lanes.whole_lanes(ModelConfig.qwen2_5_vl(size), tensor).text.intermediate_size == width


def test_the_wider_feed_forward_gives_the_same(tiny_vl):
    network, wide = make_network(tiny_vl.config), lanes.whole_lanes(tiny_vl.config, 1)
    assert (tiny_vl.config.text.intermediate_size, wide.text.intermediate_size) == (96, 128)
    params = load_params(tiny_vl.folder, network)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, tiny_vl.config.text.hidden_size)), jnp.float32)

    def outputs(network, params):
        return [np.asarray(layer.mlp(x)) for layer in unstack(network.bind(params).text.layers)]

    expected = outputs(network, params)
    wider = make_network(wide)
    padded = lanes.pad_feed_forward(params, wide, sharding.make_mesh())
    assert {name: spec.shape for name, spec in wider.specs.items()} == {name: a.shape for name, a in padded.items()}
    assert params["text.layers.mlp.gate.kernel"].is_deleted()
    np.testing.assert_allclose(outputs(wider, padded), expected, atol=1e-6)
