"""What notebooks and scripts call: `load` a model, `generate` responses to chat messages, `score` a given response.

Conversations of any length and with any images are packed into few shapes, powers of two, so that few programs are
compiled; a batch that would not fit at once runs in several.
"""

import dataclasses
import hashlib
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from ril_jax import sharding
from ril_jax.data.chat import EncodedPrompt
from ril_jax.data.images import decode_image
from ril_jax.data.messages import Messages, images_apart, is_list
from ril_jax.data.packing import PromptBatch, Rung, TileRung, VisionRung, pack_prompts, pack_responses, window_order
from ril_jax.errors import InputError
from ril_jax.models.config import InternVisionConfig, ModelConfig
from ril_jax.models.parameters import Params
from ril_jax.models.rows import response_logprobs
from ril_jax.pretrained import Pretrained
from ril_jax.sampling.logits import SamplingParams
from ril_jax.sampling.sampler import Sampler

_DTYPES = ("bfloat16", "float32", "float16")
_MIN_PROMPT, _MIN_RESPONSE, _MIN_PATCHES = 64, 32, 256
# What runs at once, so that a 7B model and its work fit an accelerator of 24 GB: tokens in the key-value caches,
# samples (each has [V] logits), and attention scores a head of the prompts and of the images. One conversation always
# runs.
_MAX_CACHED, _MAX_SAMPLES, _MAX_SCORES = 2**16, 2**8, 2**24
_SAMPLES_OF_ONE = 64


@dataclasses.dataclass(frozen=True)
class Completion:
    """One response.

    Attributes:
      text: decoded, without special tokens.
      token_ids: what was drawn; the last one is the end-of-sequence token if `finish_reason` is "stop".
      logprobs: one for each token of `token_ids`, of the raw model at temperature 1, whatever the sampling filters.
      finish_reason: "stop", or "length" where `max_tokens` or the model's context ended first.
    """

    text: str
    token_ids: list[int]
    logprobs: list[float]
    finish_reason: Literal["stop", "length"]


@dataclasses.dataclass(frozen=True)
class Score:
    """The tokens of a given response, without an end-of-sequence token, and the log-probability of each."""

    token_ids: list[int]
    logprobs: list[float]


def load(
    checkpoint: str | Path,
    dtype: str = "bfloat16",
    mesh: Mesh | None = None,
    *,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    max_tiles: int | None = None,
) -> "Model":
    """Load a Hugging Face folder or hub id of Qwen2.5-VL, InternVL3 or Qwen2.5 (text only).

    Args:
      dtype: "bfloat16", "float32" or "float16", of weights and computation.
      mesh: with axes data, fsdp and tensor (`sharding.make_mesh`); by default the weights are spread over all devices.
      min_pixels, max_pixels: replace those of Qwen2.5-VL's image processor; a lower max_pixels makes images take fewer
        tokens. max_tiles does the same for InternVL3; its thumbnail is not counted.

    Raises InputError where the folder, a file in it, or an argument cannot be used.
    """
    from ril_jax.progress import of_bytes

    name = dtype if isinstance(dtype, str) else str(jnp.dtype(dtype))
    if name not in _DTYPES:
        raise InputError(f"dtype {name!r} is not supported; use one of {', '.join(_DTYPES)}")
    if mesh is not None and not {"data", "fsdp", "tensor"} <= set(mesh.axis_names):
        raise InputError(f"mesh has the axes {mesh.axis_names}; make it with ril_jax.sharding.make_mesh")
    pretrained = Pretrained.open(checkpoint, min_pixels=min_pixels, max_pixels=max_pixels, max_tiles=max_tiles)
    mesh = mesh or sharding.make_mesh()
    params = pretrained.load_params(mesh, dtype=jnp.dtype(name), progress=of_bytes(f"load {Path(checkpoint).name}"))
    return Model(pretrained, params, jnp.dtype(name), mesh)


class Model:
    """A loaded model; make one with `load`.

    Attributes: `config` (its sizes), `chat` (tokenizer, template and image processor), `params` (the weights by name).
    """

    def __init__(self, pretrained: Pretrained, params: Params, dtype: Any, mesh: Mesh):
        self.config: ModelConfig = pretrained.config
        self.chat = pretrained.chat
        self.params = params
        # Straight-line code on CPU, where a scan would copy each layer's weights every time.
        unroll = True if mesh.devices.flat[0].platform == "cpu" else 1
        self._sampler = Sampler(
            pretrained.network,
            self.chat.eos_token_ids,
            self.chat.pad_token_id,
            dtype=dtype,
            unroll=unroll,
            token_limit=self.chat.vocab_size,
        )

        def score(params, prompts, responses, features):
            model = pretrained.network.bind(params)
            logprobs, _ = response_logprobs(model, prompts, responses, features, dtype=dtype, unroll=unroll)
            return logprobs

        self._score = jax.jit(score)

    def generate(
        self,
        messages: Messages | Sequence[Messages],
        n: int = 1,
        max_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
    ) -> list[Completion] | list[list[Completion]]:
        """`n` responses to a conversation, or to each of a batch of conversations.

        Args:
          messages: OpenAI chat messages, or a list of such lists. An image part has its image (PIL image, bytes, path
            or base64 data URL) under "image", "image_url" (also {"url": ...}), "path", "url", "bytes", "data" or
            "base64".
          temperature: 0 is greedy; then the `n` responses are the same. top_k 0 and top_p 1 are off.
          seed: the draws depend on it, `n`, `max_tokens` and the conversation alone: not on what else is in the batch,
            nor on the place in it, so a conversation that stands in a batch twice gets the same responses twice.

        Returns: `n` completions; for a batch a list of them for every conversation.

        Raises InputError for bad arguments, messages or images, and a prompt that fills the model's context.
        """
        n, max_tokens, seed = _integer("n", n, 1), _integer("max_tokens", max_tokens, 1), _integer("seed", seed, 0)
        sampling = _sampling_params(temperature, top_p, top_k, repetition_penalty)
        conversations, is_batch = _conversations(messages)
        prompts = [self._encode(conversation, name) for name, conversation in conversations]
        context = self.config.text.max_position_embeddings
        room = [context - len(prompt.token_ids) for prompt in prompts]
        for (name, _), left in zip(conversations, room, strict=True):
            if left < 1:
                raise _too_long(name, f"the prompt takes {context - left} tokens", context)

        drawn = 1 if sampling.temperature == 0.0 else n
        rounds = math.ceil(drawn / min(_SAMPLES_OF_ONE, max(1, _MAX_CACHED // _power_of_two(max_tokens))))
        group = math.ceil(drawn / rounds)
        length = _power_of_two(min(max_tokens, max(room)), _MIN_RESPONSE)
        results: list[list[Completion]] = [[] for _ in prompts]
        for rows, batch, features in self._chunks(prompts, lambda b, p: _fits(b, p, group, length)):
            keys = np.zeros((rounds, len(batch.row_valid), 2), np.uint32)
            for b, row in enumerate(rows):
                keys[:, b] = _keys(seed, prompts[row], rounds)
            for round_keys in keys:
                samples = self._sampler(
                    self.params, batch, features, round_keys, num_samples=group, max_tokens=length, sampling=sampling
                )
                samples = jax.device_get(samples)
                for b, row in enumerate(rows):
                    limit = min(max_tokens, room[row])
                    results[row] += [self._completion(samples, b, g, limit) for g in range(group)]
        results = [(row * n)[:n] for row in results]
        return results if is_batch else results[0]

    def score(self, messages: Messages | Sequence[Messages], response: str | Sequence[str]) -> Score | list[Score]:
        """Log-probability of every token of `response` after the conversation and the generation prompt.

        The response is encoded as plain text, and no end-of-sequence token is appended or scored. Its tokens may differ
        from those that `generate` drew for the same text, which need not be the tokenizer's own split.

        Args:
          messages: as of `generate`. response: a text; for a batch of conversations a list with one for each.

        Returns: a `Score`, or a list of them. Temperature 1, no filters; natural logarithm.

        Raises InputError as `generate` does, and where prompt and response together exceed the model's context.
        """
        conversations, is_batch = _conversations(messages)
        responses = [response] if isinstance(response, str) else list(response)
        if is_batch == isinstance(response, str) or len(responses) != len(conversations):
            raise InputError("response must be a string for one conversation, and a list of as many for a batch")
        if bad := [type(text).__name__ for text in responses if not isinstance(text, str)]:
            raise InputError(f"response must be text, not {bad[0]}")
        prompts = [self._encode(conversation, name) for name, conversation in conversations]
        tokens = [self.chat.encode_response(text, finished=False) for text in responses]
        context = self.config.text.max_position_embeddings
        for (name, _), prompt, ids in zip(conversations, prompts, tokens, strict=True):
            if len(prompt.token_ids) + len(ids) > context:
                found = f"the prompt takes {len(prompt.token_ids)} tokens and the response {len(ids)}"
                raise _too_long(name, found, context)

        length = _power_of_two(max(len(ids) for ids in tokens), _MIN_RESPONSE)
        scores: dict[int, Score] = {}
        for rows, batch, features in self._chunks(prompts, lambda b, p: _fits(b, p + length, 1, 0)):
            size = len(batch.row_valid)
            packed = pack_responses([[tokens[row]] for row in rows], batch=size, response_len=length)
            logprobs = jax.device_get(self._score(self.params, batch, packed, features))
            for b, row in enumerate(rows):
                scores[row] = Score(tokens[row].tolist(), logprobs[b, 0, : len(tokens[row])].tolist())
        results = [scores[row] for row in range(len(prompts))]
        return results if is_batch else results[0]

    def _encode(self, conversation: Messages, name: str) -> EncodedPrompt:
        messages, images = images_apart(conversation, name, _read_image)
        return self.chat.encode_prompt(messages, images, name=name)

    def _chunks(
        self, prompts: Sequence[EncodedPrompt], fits: Callable[[int, int], bool]
    ) -> Iterator[tuple[list[int], PromptBatch, jax.Array | None]]:
        """(which prompts, their arrays, their image features) of one program call after the other, longest first."""
        for rows in _split(prompts, self.config, fits):
            chunk = [prompts[row] for row in rows]
            longest = max(len(prompt.token_ids) for prompt in chunk)
            batch = pack_prompts(
                chunk,
                self.config,
                batch=_power_of_two(len(chunk)),
                prompt_len=_power_of_two(longest, _MIN_PROMPT),
                rung=_rung(chunk, self.config),
            )
            features = None if batch.vision is None else self._sampler.encode(self.params, batch.vision)
            yield rows, batch._replace(vision=None), features

    def _completion(self, samples, b: int, g: int, limit: int) -> Completion:
        mask = samples.mask[b, g]
        ids, logprobs = samples.token_ids[b, g][mask][:limit], samples.logprobs[b, g][mask][:limit]
        finished = samples.finished[b, g] and mask.sum() <= limit
        return Completion(self.chat.decode(ids), ids.tolist(), logprobs.tolist(), "stop" if finished else "length")


# --- shapes ---


def _power_of_two(count: int, least: int = 1) -> int:
    return max(least, 1 << (count - 1).bit_length() if count > 1 else 1)


def _fits(rows: int, prompt_len: int, group: int, length: int) -> bool:
    """Whether so many prompts of that width, each with `group` samples of `length` tokens, may run at once."""
    return (
        rows * (prompt_len + group * length) <= _MAX_CACHED
        and rows * group <= _MAX_SAMPLES
        and rows * prompt_len**2 <= _MAX_SCORES
    )


def _split(
    prompts: Sequence[EncodedPrompt], config: ModelConfig, fits: Callable[[int, int], bool]
) -> Iterator[list[int]]:
    """Indices of the prompts in chunks that fit, of like length where there are several."""
    chunk: list[int] = []
    for row in sorted(range(len(prompts)), key=lambda row: -len(prompts[row].token_ids)):
        wider = [*chunk, row]
        width = _power_of_two(len(prompts[wider[0]].token_ids), _MIN_PROMPT)
        rung = _rung([prompts[i] for i in wider], config)
        if chunk and not (fits(_power_of_two(len(wider)), width) and _scores(rung) <= _MAX_SCORES):
            yield chunk
            wider = [row]
        chunk = wider
    yield chunk


def _scores(rung: Rung | None) -> int:
    """Attention scores a head of the images in a layer that attends to whole images."""
    if rung is None:
        return 0
    if isinstance(rung, TileRung):
        return rung.tiles * rung.tile_patches**2
    return rung.images * rung.image_patches**2


def _rung(prompts: Sequence[EncodedPrompt], config: ModelConfig) -> Rung | None:
    """The image buffer for these prompts, every size a power of two; None without images."""
    images = [image for prompt in prompts for image in prompt.images]
    if not images:
        return None
    assert config.vision is not None  # text-only models refuse images when they are encoded
    if isinstance(config.vision, InternVisionConfig):
        return TileRung(_power_of_two(sum(image.grid[0] for image in images)), math.prod(images[0].grid[1:]))
    sizes = [math.prod(image.grid) for image in images]
    windows = sum(len(window_order(image.grid[1], image.grid[2], config.vision)[1]) for image in images)
    patches = _power_of_two(sum(sizes), _MIN_PATCHES)
    return VisionRung(
        patches=patches,
        images=_power_of_two(len(images)),
        image_patches=_power_of_two(max(sizes), _MIN_PATCHES),
        windows=_power_of_two(windows, patches // 32),  # a full window holds 64 patches, those at the edges fewer
    )


def _keys(seed: int, prompt: EncodedPrompt, count: int) -> np.ndarray:
    """[count, 2] uint32: PRNG keys from the seed and what the conversation holds."""
    digest = hashlib.blake2b(prompt.token_ids.tobytes(), digest_size=16)
    for image in prompt.images:
        digest.update(np.asarray(image.grid, np.int64).tobytes())
        digest.update(image.patches.tobytes())
    content = np.frombuffer(digest.digest(), np.uint32).tolist()
    return np.random.SeedSequence([*content, seed]).generate_state(2 * count).reshape(count, 2)


# --- what the caller gives ---


def _integer(name: str, value: Any, least: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if number < least or isinstance(value, bool):
        raise InputError(f"{name} is {value!r}; give a whole number of at least {least}")
    return number


def _sampling_params(temperature: float, top_p: float, top_k: int, repetition_penalty: float) -> SamplingParams:
    top_k = _integer("top_k", top_k, 0)
    numbers = {"temperature": temperature, "top_p": top_p, "repetition_penalty": repetition_penalty}
    for name, value in numbers.items():
        try:
            numbers[name] = float(value)
        except (TypeError, ValueError):
            raise InputError(f"{name} is {value!r}; give a number") from None
        if not math.isfinite(numbers[name]):
            raise InputError(f"{name} is {value!r}; give a finite number")
    if numbers["temperature"] < 0:
        raise InputError(f"temperature is {temperature!r}; give 0 (greedy) or more")
    if not 0 < numbers["top_p"] <= 1:
        raise InputError(f"top_p is {top_p!r}; give more than 0 and at most 1 (off)")
    if numbers["repetition_penalty"] <= 0:
        raise InputError(f"repetition_penalty is {repetition_penalty!r}; give more than 0; 1 is off")
    if numbers["temperature"] == 0:  # the filters change nothing, and each other setting would be compiled anew
        return SamplingParams(0.0, repetition_penalty=numbers["repetition_penalty"])
    return SamplingParams(top_k=top_k, **numbers)


def _conversations(messages: Any) -> tuple[list[tuple[str, Messages]], bool]:
    """Named conversations, and whether it was a batch that was given."""
    if is_list(messages) and messages:
        if all(isinstance(message, Mapping) for message in messages):
            return [("messages", messages)], False
        if all(is_list(conversation) for conversation in messages):
            return [(f"conversation {i}", conversation) for i, conversation in enumerate(messages)], True
    raise InputError(
        'messages must be a non-empty list like [{"role": "user", "content": "..."}], or a list of such lists'
    )


def _read_image(source: Any, where: str) -> Image.Image:
    return decode_image(source, name=where)


def _too_long(name: str, found: str, context: int) -> InputError:
    return InputError(
        f"{name}: {found}, too many for the model's {context} positions; shorten the text, or give fewer or smaller "
        f"images (max_pixels of ril_jax.load)"
    )
