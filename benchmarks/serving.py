"""The server and its engine against transformers' `generate` in static batches, under 1, 8 and 64 concurrent streams.

    python benchmarks/serving.py --repeats=3

Method. A Qwen2.5-VL of random weights (sizes in hf_dims.json, float32, CPU) is written as a folder; transformers and
`python -m ril_jax.serve`, in a process of its own, load the same one. The requests are chats of 8 to 96 words, every
second one with an image of 112 x 112 pixels, no two alike; each asks for its own number of tokens, drawn from 16 to 256
so that every doubling is as likely, greedily and without an end-of-sequence token. A stream is a client that sends its
next request when it has read the last one to its end; so many run at a time.

- transformers takes the requests in the order in which they come, in batches of as many as there are streams, half and
  a quarter as many, padded on the left, each until its longest answer is done; the best of these sizes is shown.
- `engine`: our engine in this process, without HTTP. `server`: streams over HTTP to the other process; the clients
  live in this one and share the cores with it.

Every answer of all three is asserted to be the same text. Sides alternate; compilation, loading and one untimed turn of
each are not counted; the table shows medians of the repeats, and the percentiles are of all requests of all repeats.
TTFT is from sending a request to its first text; the inter-token time is a request's time from the first text to the
last over its tokens but those of the first text. The last table asks one image question for 8 answers, with n=8 and
with 8 requests at once; what was computed is what /metrics says.
"""

import argparse
import asyncio
import base64
import contextlib
import dataclasses
import io
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import httpx
import jax
import numpy as np
import torch
from ml_collections import ConfigDict
from PIL import Image
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from ril_jax.config import serving_config
from ril_jax.data.chat import EncodedPrompt
from ril_jax.data.tiny_tokenizer import build_tokenizer
from ril_jax.pretrained import Pretrained
from ril_jax.sampling.engine import Engine
from ril_jax.sampling.local import load_engine
from ril_jax.sampling.logits import SamplingParams
from ril_jax.sampling.requests import Request, Tokens

WORDS = [
    a + b + c for a in ("ba", "do", "ki", "mu", "re", "so", "ta", "vi") for b in "lnrst" for c in ("a", "e", "i", "o")
]
STREAMS = (1, 8, 64)
REQUESTS = {1: 16, 8: 64, 64: 256}
HERE = Path(__file__)


@dataclasses.dataclass(frozen=True)
class Question:
    """One request: the chat as a client sends it, the same encoded, and how many tokens it wants."""

    messages: list[dict]
    prompt: EncodedPrompt
    tokens: int


@dataclasses.dataclass
class Run:
    """What one side did with a list of requests: seconds in all, the texts, and of each streamed request its times."""

    seconds: float
    texts: list[str]
    first: list[float] = dataclasses.field(default_factory=list)
    between: list[float] = dataclasses.field(default_factory=list)


def get_config(folder: str = "") -> ConfigDict:
    """The server's config: this file is what --config names."""
    c = serving_config()
    c.checkpoint, c.dtype, c.server.model_name = folder, "float32", "tiny"
    c.engine.update({"slots": 64, "small_slots": 8, "max_model_len": 512, "page_size": 32, "attention_block": 64})
    c.engine.update({"prefill": ((16, 16),), "decode_steps": 8, "feature_rows": 1024})
    return c


# --- the model and the questions ---


def write_folder(folder: Path, dims: dict) -> Qwen2_5_VLForConditionalGeneration:
    """transformers' model of these sizes, saved with a tokenizer."""
    tokenizer = build_tokenizer(folder, [" ".join(WORDS)] + [f"{word}\n" for word in WORDS], vocab_size=1500)
    ids = {
        name: tokenizer.token_to_id(f"<|{name}|>") for name in ("image_pad", "video_pad", "vision_start", "vision_end")
    }
    text = dict(dims["text"])
    theta, section, tie = text.pop("rope_theta"), text.pop("mrope_section"), text.pop("tie")
    text |= {"rope_parameters": {"rope_type": "default", "rope_theta": theta, "mrope_section": section}}
    config = Qwen2_5_VLConfig(
        text_config=text | {"tie_word_embeddings": tie, "bos_token_id": 0, "eos_token_id": 1},
        vision_config=dims["vision"] | {"out_hidden_size": text["hidden_size"]},
        tie_word_embeddings=tie, bos_token_id=0, eos_token_id=1,
        image_token_id=ids["image_pad"], video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"], vision_end_token_id=ids["vision_end"],
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 1.5 / parameter[0].numel() ** 0.5)
        # What the tokenizer cannot write is never drawn (our sampler does not, either).
        model.lm_head.weight[tokenizer.get_vocab_size() :] = 0.0
        for token in range(ids["vision_start"] - 3, tokenizer.get_vocab_size()):
            model.lm_head.weight[token] = 0.0
    model.save_pretrained(folder)
    return model


def make_questions(model: Pretrained, count: int, seed: int) -> list[Question]:
    rng = np.random.default_rng(seed)
    questions = []
    for i in range(count):
        text = " ".join(rng.choice(WORDS, rng.integers(8, 97)))
        picture = Image.fromarray(rng.integers(0, 256, (112, 112, 3), dtype=np.uint8)) if i % 2 else None
        questions.append(question(model, text, picture, int(16 * 2 ** rng.uniform(0, 4))))
    return questions


def question(model: Pretrained, text: str, picture: Image.Image | None, tokens: int) -> Question:
    parts, sent = [{"type": "text", "text": text}], [{"type": "text", "text": text}]
    if picture is not None:
        data = io.BytesIO()
        picture.save(data, "PNG")
        url = "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
        parts, sent = [{"type": "image"}, *parts], [{"type": "image_url", "image_url": {"url": url}}, *sent]
    prompt = model.chat.encode_prompt(
        [{"role": "user", "content": parts}], [picture] if picture else [], name="question"
    )
    return Question([{"role": "user", "content": sent}], prompt, tokens)


# --- transformers ---


def run_transformers(hf, model: Pretrained, questions: list[Question], batch: int) -> Run:
    started = time.perf_counter()
    texts = []
    for at in range(0, len(questions), batch):
        part = questions[at : at + batch]
        width, longest = max(len(q.prompt.token_ids) for q in part), max(q.tokens for q in part)
        ids = np.zeros((len(part), width), np.int64)
        mask = np.zeros_like(ids)
        for row, q in enumerate(part):
            length = len(q.prompt.token_ids)
            ids[row, width - length :], mask[row, width - length :] = q.prompt.token_ids, 1
        images = [image for q in part for image in q.prompt.images]
        pixels = {}
        if images:
            pixels["pixel_values"] = torch.tensor(np.concatenate([image.patches for image in images]))
            pixels["image_grid_thw"] = torch.tensor([image.grid for image in images])
        hf.model.rope_deltas = None
        with torch.no_grad():
            out = hf.generate(
                input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask),
                mm_token_type_ids=torch.tensor((ids == model.config.image_token_id) & (mask == 1)).long(),
                max_new_tokens=longest, min_new_tokens=longest, do_sample=False, eos_token_id=None, pad_token_id=0,
                **pixels,
            )  # fmt: skip
        texts += [model.chat.decode(out[row, width : width + q.tokens].numpy()) for row, q in enumerate(part)]
    return Run(time.perf_counter() - started, texts)


# --- the engine in this process ---


def run_engine(engine: Engine, model: Pretrained, questions: list[Question], streams: int) -> Run:
    """A submission takes the place of each request that ends, from the engine's own thread, as the news come."""
    tokens: list[list[int]] = [[] for _ in questions]
    waiting = iter(range(len(questions)))
    done, left = threading.Event(), [len(questions)]

    def submit() -> None:
        i = next(waiting, None)
        if i is not None:
            request = Request(
                questions[i].prompt, max_tokens=questions[i].tokens, sampling=SamplingParams(temperature=0.0),
                ignore_eos=True,
            )  # fmt: skip
            engine.submit(request, partial(hear, i))

    def hear(i: int, news: Tokens) -> None:
        assert not news.error, news.error
        tokens[i] += news.token_ids
        if news.finish_reason:
            left[0] -= 1
            submit()
            if not left[0]:
                done.set()

    started = time.perf_counter()
    for _ in range(streams):
        submit()
    done.wait()
    seconds = time.perf_counter() - started
    return Run(seconds, [model.chat.decode(ids) for ids in tokens])


# --- the server in a process of its own ---


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "ril_jax.serve", f"--config={HERE}:{folder}", f"--port={port}"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        while True:
            assert process.poll() is None, "the server did not start"
            with contextlib.suppress(httpx.ConnectError):
                if httpx.get(f"{url}/ready").status_code == 200:
                    break
            time.sleep(0.5)
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def run_server(url: str, questions: list[Question], streams: int) -> Run:
    return asyncio.run(_run_server(url, questions, streams))


async def _run_server(url: str, questions: list[Question], streams: int) -> Run:
    run = Run(0.0, [""] * len(questions))
    waiting = iter(range(len(questions)))
    limits = httpx.Limits(max_connections=streams, max_keepalive_connections=streams)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits, trust_env=False) as http:

        async def stream() -> None:
            for i in waiting:
                await ask(i)

        async def ask(i: int) -> None:
            body = {
                "model": "tiny", "messages": questions[i].messages, "max_tokens": questions[i].tokens, "temperature": 0,
                "stream": True, "ignore_eos": True, "logprobs": False,
            }  # fmt: skip
            sent, first, last, pieces = time.perf_counter(), 0.0, 0.0, []
            async with http.stream("POST", "/v1/chat/completions", json=body) as response:
                assert response.status_code == 200, await response.aread()
                async for line in response.aiter_lines():
                    if not line.startswith("data: {"):
                        continue
                    text = json.loads(line[6:])["choices"][0]["delta"].get("content")
                    if text:
                        last = time.perf_counter()
                        first = first or last
                        pieces.append(text)
            run.texts[i] = "".join(pieces)
            run.first.append(first - sent)
            steps = get_config().engine.decode_steps
            if questions[i].tokens > steps:
                run.between.append((last - first) / (questions[i].tokens - steps))

        started = time.perf_counter()
        await asyncio.gather(*(stream() for _ in range(streams)))
        run.seconds = time.perf_counter() - started
    return run


# --- one image question, eight answers ---


def ask_for_eight(url: str, asked: Question, *, together: bool) -> tuple[float, dict[str, float]]:
    body = {
        "model": "tiny", "messages": asked.messages, "max_tokens": asked.tokens, "temperature": 1, "ignore_eos": True,
        "n": 8 if together else 1,
    }  # fmt: skip

    async def ask() -> None:
        async with httpx.AsyncClient(base_url=url, timeout=600, trust_env=False) as http:
            bodies = [body | {"seed": seed} for seed in range(1 if together else 8)]
            responses = await asyncio.gather(*(http.post("/v1/chat/completions", json=b) for b in bodies))
            choices = [choice for response in responses for choice in response.json()["choices"]]
            assert len(choices) == 8

    before = metrics(url)
    started = time.perf_counter()
    asyncio.run(ask())
    seconds = time.perf_counter() - started
    after = metrics(url)
    return seconds, {name: after[name] - before.get(name, 0) for name in after}


def metrics(url: str) -> dict[str, float]:
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


# --- the tables ---


def table(hf, model: Pretrained, engine: Engine, url: str, streams: int, repeats: int) -> None:
    """The rows of one number of streams. Each turn has questions of its own, so that no prompt is in our cache."""
    questions = partial(make_questions, model, REQUESTS[streams])
    trial = {size: run_transformers(hf, model, questions(seed=streams), size).seconds for size in batches(streams)}
    best = min(trial, key=lambda size: trial[size])
    sides: dict[str, Callable[[list[Question]], Run]] = {
        f"transformers, batches of {best}": lambda asked: run_transformers(hf, model, asked, best),
        "engine": lambda asked: run_engine(engine, model, asked, streams),
        "server": lambda asked: run_server(url, asked, streams),
    }
    runs: dict[str, list[Run]] = {name: [] for name in sides}
    tokens = []
    for turn in range(repeats + 1):
        asked = questions(seed=1000 * streams + turn)
        done = {name: sides[name](asked) for name in (list(sides) if turn % 2 else reversed(sides))}
        reference, *others = done.values()
        for other in others:
            assert_equal(reference.texts, other.texts)
        if turn:
            tokens.append(sum(q.tokens for q in asked))
            for name, run in done.items():
                runs[name].append(run)
    base = next(iter(runs.values()))
    for name, side in runs.items():
        rate = statistics.median(REQUESTS[streams] / run.seconds for run in side)
        speed = statistics.median(count / run.seconds for count, run in zip(tokens, side, strict=True))
        ratio = statistics.median(theirs.seconds / ours.seconds for theirs, ours in zip(base, side, strict=True))
        first, between = ([v for run in side for v in getattr(run, field)] for field in ("first", "between"))
        print(
            f"| {streams} | {name} | {rate:.1f} | {speed:.0f} | {ratio:.2f} | {percentiles(first)} | "
            f"{percentiles(between)} |",
            flush=True,
        )


def batches(streams: int) -> list[int]:
    return [2**i for i in range(streams.bit_length()) if 4 * 2**i >= streams]


def assert_equal(expected: list[str], texts: list[str]) -> None:
    different = [i for i, (a, b) in enumerate(zip(expected, texts, strict=True)) if a != b]
    assert not different, f"requests {different} have other texts"


def percentiles(values: list[float]) -> str:
    if not values:
        return "-"
    ordered = sorted(1000 * value for value in values)
    return f"{statistics.median(ordered):.1f} / {ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]:.1f}"


def eight(model: Pretrained, url: str, repeats: int) -> None:
    print("\n| 8 answers to one image question | ms | images encoded | prompt tokens computed | of |")
    print("|---|---|---|---|---|")
    rng = np.random.default_rng(8)
    for together in (True, False):
        seconds, grown = [], {}
        for turn in range(repeats + 1):
            picture = Image.fromarray(rng.integers(0, 256, (112, 112, 3), dtype=np.uint8))
            asked = question(model, " ".join(rng.choice(WORDS, 64)), picture, 64)
            took, grown = ask_for_eight(url, asked, together=together)
            seconds += [took] if turn else []
        encoded, computed = grown["ril_engine_images_encoded_total"], grown["ril_engine_prefilled_tokens_total"]
        print(
            f"| {'n=8' if together else '8 requests'} | {percentiles(seconds).split()[0]} | {encoded:.0f} | "
            f"{computed:.0f} | {grown['ril_engine_prompt_tokens_total']:.0f} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--streams", type=int, action="append", choices=STREAMS)
    args = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    dims = json.loads((HERE.parent / "hf_dims.json").read_text())["tiny"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        hf = write_folder(folder, dims)
        model, engine = load_engine(get_config(name))
        engine.start()
        with serving(folder) as url:
            load = f"load {os.getloadavg()[0]:.1f} at the start"
            cores = len(os.sched_getaffinity(0))
            print(f"{cores} cores, {load}, torch {torch.__version__}, jax {jax.__version__}")
            print(
                "| streams | side | requests/s | tokens/s | of transformers' | TTFT, ms, p50 / p99 | inter-token, ms |"
            )
            print("|---|---|---|---|---|---|---|")
            for streams in args.streams or STREAMS:
                table(hf, model, engine, url, streams, args.repeats)
            eight(model, url, args.repeats)
        engine.close()


if __name__ == "__main__":
    main()
