"""Qwen2.5-VL and InternVL on the CPU, ours against transformers': forward, forward + backward, greedy generation.

    python benchmarks/hf_cpu.py --size=tiny --size=small --repeats=15
    python benchmarks/hf_cpu.py --size=internvl-300m --size=internvl-6b --repeats=15

Method. Both sides run in this one process, in float32, on the same random weights (transformers writes a folder, we
load it) and the same prompts, a batch of rows `[<vision> image </vision> text]` of one length; sizes stand in
hf_dims.json (tiny and small are Qwen2.5-VL; internvl-300m and -6b have an InternViT of that kind, in the size of tiny,
and images of several tiles). Both use all cores that the process may use (torch.set_num_threads, and XLA's own pool).
transformers runs as it comes: eager, its default attention (sdpa), default cache. Ours includes packing the prompts on
the host, theirs does not include making its tensors. The loss is over the text tokens; each side does it its own way
(transformers through the logits of every token). Compilation is not counted; it happens before the first repeat. The
two sides alternate, so that a busy machine slows both; the ratio is of their medians, with that of their minima beside
it (what is left when nothing else ran). Every measurement asserts that the results agree: logits, loss and each
gradient, tokens. On a machine that is never quiet, --clock=cpu under `taskset -c 0` gives the processor time of one
core instead: it counts no waiting, on others or between threads.
"""

import argparse
import dataclasses
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import jax
import jax.numpy as jnp
import numpy as np
import torch
from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from ril_jax.data.packing import TileRung, VisionRung, pack_prompts
from ril_jax.models.config import ModelConfig
from ril_jax.models.hub import load_params
from ril_jax.models.hub_names import hub_name
from ril_jax.models.parameters import Network
from ril_jax.models.vlm import VisionLanguageModel
from ril_jax.objectives import chunked_logprobs, sft_loss
from ril_jax.sampling.logits import SamplingParams
from ril_jax.sampling.sampler import Sampler

PARTS = ("forward", "forward+backward", "generate")


@dataclasses.dataclass
class Image:
    patches: np.ndarray
    grid: tuple[int, int, int]

    @property
    def num_tokens(self) -> int:
        return len(self.patches) // 4


@dataclasses.dataclass
class Tiles:
    pixels: np.ndarray  # [tiles, 3, side, side]

    @property
    def patches(self) -> np.ndarray:
        tiles, channels, side, _ = self.pixels.shape
        cut = self.pixels.reshape(tiles, channels, side // 14, 14, side // 14, 14)
        return np.einsum("tcipjq->tijcpq", cut).reshape(tiles, -1, channels * 14 * 14)

    @property
    def num_tiles(self) -> int:
        return len(self.pixels)

    @property
    def num_tokens(self) -> int:
        return self.num_tiles * (self.pixels.shape[-1] // 28) ** 2


@dataclasses.dataclass
class Prompt:
    token_ids: np.ndarray
    images: tuple[Image | Tiles, ...]


class Theirs:
    """transformers' model and the tensors of the batch."""

    def __init__(self, dims: dict, prompts: list[Prompt], folder: Path):
        torch.manual_seed(0)
        self.tiled = "tiles" in dims
        kind = InternVLForConditionalGeneration if self.tiled else Qwen2_5_VLForConditionalGeneration
        self.model = kind(hf_config(dims)).eval()
        with torch.no_grad():
            for parameter in self.model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0, 1.5 / parameter[0].numel() ** 0.5)
        self.model.save_pretrained(folder)
        ids = torch.tensor(np.stack([p.token_ids for p in prompts])).long()
        images = [im for p in prompts for im in p.images]
        self.inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if self.tiled:
            self.inputs["pixel_values"] = torch.tensor(np.concatenate([im.pixels for im in images]))
        else:
            self.inputs["pixel_values"] = torch.tensor(np.concatenate([im.patches for im in images]))
            self.inputs["image_grid_thw"] = torch.tensor([im.grid for im in images])
            self.inputs["mm_token_type_ids"] = (ids == dims["image_token_id"]).long()
        self.labels = torch.where(ids >= dims["image_token_id"], -100, ids)
        self.new_tokens = dims["new_tokens"]

    def forward(self):
        self.forget()
        with torch.no_grad():
            return self.model(**self.inputs).logits.numpy()

    def backward(self):
        self.forget()
        self.model.zero_grad(set_to_none=True)
        loss = self.model(**self.inputs, labels=self.labels, use_cache=False).loss
        loss.backward()
        return loss.item()

    def forget(self):
        if not self.tiled:
            self.model.model.rope_deltas = None  # state of Qwen2.5-VL that survives a call

    def gradients(self):
        return {hub_name(name): parameter.grad.numpy() for name, parameter in self.model.named_parameters()}

    def generate(self):
        self.model.model.rope_deltas = None
        n = self.new_tokens
        with torch.no_grad():
            out = self.model.generate(
                **self.inputs, max_new_tokens=n, min_new_tokens=n, do_sample=False, eos_token_id=None, pad_token_id=0
            )
        return out[:, -n:].numpy()


class Ours:
    """ril_jax's programs over the same folder."""

    def __init__(self, dims: dict, prompts: list[Prompt], folder: Path, unroll: int | bool):
        self.unroll = unroll
        self.config = ModelConfig.from_folder(folder)
        self.network = Network(lambda: VisionLanguageModel(self.config))
        self.params = load_params(folder, self.network)
        self.prompts, self.num_text, self.new_tokens = prompts, dims["n_text"], dims["new_tokens"]
        self.rung = exact_rung(prompts, self.config)
        self.sampler = Sampler(self.network, eos_token_ids=(-1,), pad_token_id=0, unroll=self.unroll)
        self._forward = jax.jit(self._logits)
        self._backward = jax.jit(jax.value_and_grad(self._loss))

    def pack(self):
        length = len(self.prompts[0].token_ids)
        return pack_prompts(self.prompts, self.config, batch=len(self.prompts), prompt_len=length, rung=self.rung)

    def forward(self):
        return np.asarray(self._forward(self.params, self.pack()))

    def backward(self):
        self.last = jax.block_until_ready(self._backward(self.params, self.pack()))
        return float(self.last[0])

    def gradients(self):
        out = {}
        for name, spec in self.network.specs.items():
            for layer in range(spec.shape[0]) if spec.stacked else [None]:
                array = np.asarray(self.last[1][name] if layer is None else self.last[1][name][layer])
                out[spec.hf.format(layer=layer)] = spec.to_hf(array)
        return out

    def generate(self):
        batch = self.pack()
        features = self.sampler.encode(self.params, batch.vision)
        keys = jax.random.split(jax.random.PRNGKey(0), len(self.prompts))
        out = self.sampler(
            self.params, batch, features, keys,
            num_samples=1, max_tokens=self.new_tokens, sampling=SamplingParams(temperature=0.0),
        )  # fmt: skip
        return np.asarray(out.token_ids)[:, 0]

    def _hidden(self, params, batch):
        model = self.network.bind(params)
        features = model.encode(batch.vision, dtype=jnp.float32, unroll=self.unroll)
        x = model.embed(batch.token_ids, features, batch.feature_index, dtype=jnp.float32)
        hidden, _ = model.text.rows(x, batch.positions, batch.valid, prompt_len=x.shape[1], unroll=self.unroll)
        return model.text, hidden

    def _logits(self, params, batch):
        text, hidden = self._hidden(params, batch)
        return text.logits(hidden)

    def _loss(self, params, batch):
        text, hidden = self._hidden(params, batch)
        hidden, targets = hidden[:, -self.num_text - 1 : -1], batch.token_ids[:, -self.num_text :]
        hidden_nd, targets_n = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
        logprobs, _ = chunked_logprobs(hidden_nd, text.head(), targets_n, chunk=512, with_entropy=False, tied=True)
        return sft_loss(logprobs, jnp.ones_like(targets_n, bool))


def exact_rung(prompts: list[Prompt], config: ModelConfig) -> VisionRung | TileRung:
    """The bucket of exactly these images, as a run over images of one size would configure it."""
    count, image = len(prompts), prompts[0].images[0]
    if isinstance(image, Tiles):
        return TileRung(image.num_tiles * count)
    patches = len(image.patches)
    size = min((config.vision.window_size // config.vision.patch_size) ** 2, patches)
    return VisionRung(patches * count, count, patches, windows=patches * count // size, window_patches=size)


def hf_config(dims: dict) -> Qwen2_5_VLConfig | InternVLConfig:
    text = dict(dims["text"])
    theta, tie = text.pop("rope_theta"), text.pop("tie")
    text |= {"bos_token_id": 0, "eos_token_id": 1}
    tokens = {key: value for key, value in dims.items() if key.endswith("_token_id")}
    if "tiles" in dims:
        rope = {"rope_type": "dynamic", "factor": text.pop("rope_dynamic_factor"), "rope_theta": theta}
        text |= {"model_type": "qwen2", "tie_word_embeddings": tie, "rope_parameters": rope}
        return InternVLConfig(text_config=text, vision_config=dims["vision"], tie_word_embeddings=tie, **tokens)
    text["rope_parameters"] = {
        "rope_type": "default", "rope_theta": theta, "mrope_section": text.pop("mrope_section")
    }  # fmt: skip
    return Qwen2_5_VLConfig(
        text_config=text | {"tie_word_embeddings": tie},
        vision_config=dims["vision"] | {"out_hidden_size": text["hidden_size"]},
        tie_word_embeddings=tie, bos_token_id=0, eos_token_id=1, **tokens,
    )  # fmt: skip


def make_prompts(dims: dict) -> list[Prompt]:
    rng = np.random.default_rng(0)
    prompts = []
    for _ in range(dims["batch"]):
        image = make_image(dims, rng)
        placeholders = [dims["image_token_id"]] * image.num_tokens
        vision = [dims["vision_start_token_id"], *placeholders, dims["vision_end_token_id"]]
        text = rng.integers(10, dims["image_token_id"], dims["n_text"])
        prompts.append(Prompt(np.array([*vision, *text], np.int32), (image,)))
    return prompts


def make_image(dims: dict, rng: np.random.Generator) -> Image | Tiles:
    if "tiles" in dims:
        side = dims["tile_size"]
        return Tiles(rng.normal(size=(dims["tiles"], 3, side, side)).astype(np.float32))
    h, w = (side // dims["vision"]["patch_size"] for side in dims["image_hw"])
    return Image(rng.normal(size=(h * w, 3 * 2 * 14 * 14)).astype(np.float32), (1, h, w))


def check_gradients(ours: Ours, theirs: Theirs) -> None:
    mine, reference = ours.gradients(), theirs.gradients()
    assert mine.keys() == reference.keys()
    for name, gradient in reference.items():
        scale = np.abs(gradient).max()
        assert np.abs(mine[name] - gradient).max() <= 1e-4 * scale + 1e-7, name


def measure(ours, theirs, check, repeats: int, clock) -> tuple[list[float], list[float]]:
    """Seconds of each repeat of the two sides, alternating; `check(a, b)` on the results of every repeat."""
    ours(), theirs()
    seconds: tuple[list[float], list[float]] = ([], [])
    for i in range(repeats):
        results = [None, None]
        for side in (0, 1) if i % 2 == 0 else (1, 0):
            start = clock()
            results[side] = (ours, theirs)[side]()
            seconds[side].append(clock() - start)
        check(*results)
    return seconds


def close(tolerance: float):
    def check(a, b):
        assert np.abs(np.asarray(a) - np.asarray(b)).max() <= tolerance, np.abs(np.asarray(a) - np.asarray(b)).max()

    return check


def equal(a, b):
    assert np.array_equal(a, b), (a != b).sum()


def row(size: str, part: str, seconds) -> str:
    mine, other = ([1000 * s for s in side] for side in seconds)
    spread = lambda x: f"{statistics.median(x):.1f} ({min(x):.1f}-{max(x):.1f})"  # noqa: E731
    medians = statistics.median(other) / statistics.median(mine)
    return f"| {size} | {part} | {spread(mine)} | {spread(other)} | {medians:.2f} | {min(other) / min(mine):.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    all_dims = json.loads((Path(__file__).parent / "hf_dims.json").read_text())
    parser.add_argument("--size", action="append", choices=tuple(all_dims))
    parser.add_argument("--part", action="append", choices=PARTS)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--layers", choices=("unrolled", "scanned"), default="unrolled", help="how ours are compiled")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    args = parser.parse_args()
    clock = {"wall": time.perf_counter, "cpu": time.process_time}[args.clock]
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(cores)
    print(f"{cores} cores, {args.clock} time, torch {torch.__version__}, jax {jax.__version__}")
    print("| size | part | ours, ms: median (min-max) | transformers, ms | ratio of medians | of minima |")
    print("| --- | --- | --- | --- | --- | --- |")
    for size in args.size or all_dims:
        prompts = make_prompts(all_dims[size])
        with tempfile.TemporaryDirectory() as folder:
            theirs = Theirs(all_dims[size], prompts, Path(folder))
            ours = Ours(all_dims[size], prompts, Path(folder), args.layers == "unrolled" or 1)
        for part in args.part or PARTS:
            if part == "forward":
                seconds = measure(ours.forward, theirs.forward, close(1e-3), args.repeats, clock)
            elif part == "forward+backward":
                seconds = measure(ours.backward, theirs.backward, close(1e-4), args.repeats, clock)
                check_gradients(ours, theirs)
            else:
                seconds = measure(ours.generate, theirs.generate, equal, args.repeats, clock)
            print(row(size, part, seconds), flush=True)


if __name__ == "__main__":
    main()
