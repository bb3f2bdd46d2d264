"""The same quantities from our networks and from transformers: logits, the loss of next tokens, every gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import torch
from helpers import hf_models

from ril_jax.models.hub import load_params
from ril_jax.models.hub_names import hub_name
from ril_jax.models.parameters import Network
from ril_jax.models.vlm import VisionLanguageModel

# Compiling is most of the time of the gradient tests, and XLA's own optimisations are not what they are about.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def build(tiny: hf_models.TinyModel):
    network = Network(lambda: VisionLanguageModel(tiny.config))
    return network, load_params(tiny.folder, network)


def forward(network, params, batch, *, remat="none", unroll=1):
    model = network.bind(params)
    features = model.encode(batch.vision, dtype=jnp.float32, remat=remat, unroll=unroll)
    x = model.embed(batch.token_ids, features, batch.feature_index, dtype=jnp.float32)
    prompt_len = batch.token_ids.shape[1]
    hidden, _ = model.text.rows(x, batch.positions, batch.valid, prompt_len=prompt_len, remat=remat, unroll=unroll)
    return model.text.logits(hidden)


def sft(network, params, batch, **kwargs):
    """Mean next-token loss over every real token of a left-padded batch that is not an image placeholder."""
    logprobs = jax.nn.log_softmax(forward(network, params, batch, **kwargs)[:, :-1])
    targets = batch.token_ids[:, 1:]
    counted = batch.valid[:, 1:] & batch.valid[:, :-1] & (targets != hf_models.IMAGE)
    return -jnp.sum(jnp.take_along_axis(logprobs, targets[..., None], axis=-1)[..., 0] * counted) / counted.sum()


def torch_sft(hf, prompts):
    """The same loss through transformers, one unpadded prompt after another, and its gradients by canonical name."""
    total, count = 0.0, 0
    for p in prompts:
        targets = torch.tensor(p.token_ids[1:]).long()
        keep = targets != hf_models.IMAGE
        logprobs = torch.log_softmax(hf_models.logits(hf, p)[0, :-1], dim=-1)
        total = total - logprobs.gather(1, targets[:, None])[:, 0][keep].sum()
        count += int(keep.sum())
    loss = total / count
    return loss.item(), gradients_by_name(hf, loss)


def gradients_by_name(hf, loss):
    """The gradients of a loss of a transformers model, by canonical name."""
    hf.zero_grad()
    loss.backward()
    return {hub_name(name): parameter.grad.numpy() for name, parameter in hf.named_parameters()}


def assert_gradients_match(network, ours, reference):
    """Every HF parameter, once each; within 1e-5 of its own largest gradient (float32 sums in another order).

    The 1e-7 is for keys' biases: they shift all scores of a query nearly alike, so that their gradient nearly cancels.
    """
    seen = set()
    for name, spec in network.specs.items():
        for layer in range(spec.shape[0]) if spec.stacked else [None]:
            key = spec.hf.format(layer=layer)
            gradient = spec.to_hf(np.asarray(ours[name] if layer is None else ours[name][layer]))
            scale = np.abs(reference[key]).max()
            np.testing.assert_allclose(gradient, reference[key], atol=1e-5 * scale + 1e-7, rtol=0, err_msg=key)
            seen.add(key)
    assert seen == set(reference)


def loss_and_gradients(network, params, batch, **variant):
    step = jax.value_and_grad(functools.partial(sft, network, **variant))
    return jax.jit(step, compiler_options=QUICK)(params, batch)
