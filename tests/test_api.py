"""Claims about ril_jax.load, generate and score, against transformers' template, image processor and networks."""

import base64
import io
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import hf_models
from helpers.tokenizer_folder import build_tokenizer_folder
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer

import ril_jax
from ril_jax import api
from ril_jax.data.messages import images_apart
from ril_jax.data.packing import pack_images
from ril_jax.sampling.sampler import Samples

MAX_TOKENS = 20
# The learned part of the tokenizer ends where the placeholder ids of the tiny models begin.
LEARNED, ALL = 285, 294


def picture(height, width):
    rng = np.random.default_rng(height * 1000 + width)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def data_url(image):
    return "data:image/png;base64," + base64.b64encode(png(image)).decode()


WIDE, SMALL = picture(60, 200), picture(57, 61)


def user(*parts):
    return [{"role": "user", "content": list(parts)}]


def text(value):
    return {"type": "text", "text": value}


TEXT_ONLY = [{"role": "system", "content": "Be terse."}, {"role": "user", "content": "How many <image> tags?"}]
ONE_IMAGE = user({"type": "image", "image": WIDE}, text("Which bar is higher?"))
TWO_IMAGES = user(
    text("a "), {"type": "image_url", "image_url": {"url": data_url(SMALL)}}, {"type": "image", "bytes": png(WIDE)}
)
BATCH = [TEXT_ONLY, ONE_IMAGE, TWO_IMAGES]
IMAGES = [[], [WIDE], [SMALL, WIDE]]


class Reference:
    """transformers on one conversation: template, tokenizer, image processor and network."""

    def __init__(self, tiny, folder):
        self.tiny = tiny
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.processor = AutoImageProcessor.from_pretrained(folder, backend="pil") if tiny.config.vision else None
        self.eos_token_ids = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]

    def prompt(self, messages, images):
        rendered = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        patched = []
        for image in images:
            out = self.processor(image, return_tensors="np")
            grid = tuple(out["image_grid_thw"][0].tolist())
            patched.append(hf_models.Image(out["pixel_values"], grid))
            rendered = rendered.replace("<|image_pad|>", "<|unused|>" * (len(out["pixel_values"]) // 4), 1)
        ids = self.tokenizer(rendered.replace("<|unused|>", "<|image_pad|>"))["input_ids"]
        return hf_models.Prompt(np.array(ids, np.int32), tuple(patched))

    def greedy(self, messages, images, eos_token_ids=None, **kwargs):
        return hf_models.generate(
            self.tiny.hf, self.prompt(messages, images), max_new_tokens=MAX_TOKENS,
            eos_token_ids=eos_token_ids or self.eos_token_ids, **kwargs,
        ).tolist()  # fmt: skip

    def logprobs(self, messages, images, ids):
        prompt = self.prompt(messages, images)
        row = hf_models.Prompt(np.concatenate([prompt.token_ids, np.array(ids, np.int32)]), prompt.images)
        with torch.no_grad():
            logits = hf_models.logits(self.tiny.hf, row)[0, -len(ids) - 1 : -1]
        return torch.log_softmax(logits, dim=-1)[torch.arange(len(ids)), torch.tensor(ids)].numpy()


def make_folder(folder, *, vision):
    """A whole HF folder; its EOS tokens hold one that the model says early after one of the conversations."""
    save = hf_models.save_qwen2_5_vl if vision else hf_models.save_qwen2
    sizes = {"vocab_size": ALL, "num_hidden_layers": 2}
    extra = {"text": sizes, "vision": {"depth": 2}} if vision else sizes
    tiny = save(folder, **extra)
    build_tokenizer_folder(folder, vision=vision, vocab_size=LEARNED)
    reference = Reference(tiny, folder)
    assert not vision or reference.tokenizer.convert_tokens_to_ids("<|image_pad|>") == hf_models.IMAGE
    endless = reference.greedy(TEXT_ONLY, [], eos_token_ids=[ALL - 1])
    path = folder / "generation_config.json"
    reference.eos_token_ids = [*json.loads(path.read_text())["eos_token_id"], hf_models.EOS, endless[5]]
    path.write_text(json.dumps({"eos_token_id": reference.eos_token_ids, "pad_token_id": hf_models.PAD}))
    return reference


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("api_vl"), vision=True)


@pytest.fixture(scope="module")
def model(reference):
    return ril_jax.load(reference.tiny.folder, dtype="float32")


@pytest.fixture(scope="module")
def text_reference(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("api_text"), vision=False)


@pytest.fixture(scope="module")
def text_model(text_reference):
    return ril_jax.load(text_reference.tiny.folder, dtype="float32")


@pytest.fixture(scope="module")
def greedy(model):
    return model.generate(BATCH, max_tokens=MAX_TOKENS)


def test_a_greedy_batch_equals_generate_of_each_conversation(greedy, reference):
    assert [len(completions) for completions in greedy] == [1, 1, 1]
    for messages, images, (completion,) in zip(BATCH, IMAGES, greedy, strict=True):
        expected = reference.greedy(messages, images)
        assert completion.token_ids == expected
        ended = expected[-1] in reference.eos_token_ids
        assert completion.finish_reason == ("stop" if ended else "length")
        assert completion.text == reference.tokenizer.decode(expected, skip_special_tokens=True)
    assert {completion.finish_reason for (completion,) in greedy} == {"stop", "length"}


SAMPLING = dict(n=3, max_tokens=MAX_TOKENS, temperature=1.5, top_k=20, repetition_penalty=1.3, seed=5)


@pytest.fixture(scope="module")
def drawn(model):
    return model.generate(BATCH, **SAMPLING)


def test_the_logprobs_of_a_completion_are_the_raw_models(greedy, drawn, reference):
    for messages, images, one, several in zip(BATCH, IMAGES, greedy, drawn, strict=True):
        for completion in one + several:
            expected = reference.logprobs(messages, images, completion.token_ids)
            np.testing.assert_allclose(completion.logprobs, expected, atol=1e-4, rtol=0)


def test_draws_are_reproducible_and_independent_of_the_batch(model, drawn):
    assert model.generate(BATCH, **SAMPLING) == drawn
    for completions in drawn:
        assert len({tuple(completion.token_ids) for completion in completions}) == 3
    other_seed = model.generate(BATCH, **SAMPLING | {"seed": 6})
    assert all(a[0].token_ids != b[0].token_ids for a, b in zip(drawn, other_seed, strict=True))
    other_company = user({"type": "image", "image": picture(60, 201)}, {"image": SMALL}, text("What else?"))
    moved = model.generate([ONE_IMAGE, other_company, ONE_IMAGE], **SAMPLING)
    assert [c.token_ids for c in moved[0]] == [c.token_ids for c in moved[2]] == [c.token_ids for c in drawn[1]]


def test_score_equals_log_softmax_of_transformers(model, reference):
    responses = ["There are three red circles.", " größer\n\n🙂 <|im_end|>", "12"]
    scores = model.score(BATCH, responses)
    for messages, images, response, score in zip(BATCH, IMAGES, responses, scores, strict=True):
        assert model.chat.decode(score.token_ids) == response
        assert reference.eos_token_ids[0] not in score.token_ids
        expected = reference.logprobs(messages, images, score.token_ids)
        np.testing.assert_allclose(score.logprobs, expected, atol=1e-4, rtol=0)


def test_max_tokens_cuts_within_a_bucket(model, greedy):
    cut = model.generate(BATCH, max_tokens=4)
    for (short,), (long,) in zip(cut, greedy, strict=True):
        assert short.token_ids == long.token_ids[:4]
        assert len(short.logprobs) == 4
        assert short.finish_reason == "length"


def test_greedy_gives_n_equal_completions(model, greedy):
    repeated = model.generate(BATCH, n=3, max_tokens=MAX_TOKENS)
    assert repeated == [completions * 3 for completions in greedy]


def test_a_text_only_model_equals_transformers(text_model, text_reference):
    """One conversation, not a batch of one."""
    (completion,) = text_model.generate(TEXT_ONLY, max_tokens=MAX_TOKENS)
    assert completion.token_ids == text_reference.greedy(TEXT_ONLY, [])
    assert completion.finish_reason == "stop"
    score = text_model.score(TEXT_ONLY, completion.text)
    expected = text_reference.logprobs(TEXT_ONLY, [], score.token_ids)
    np.testing.assert_allclose(score.logprobs, expected, atol=1e-4, rtol=0)


class Echo:
    """In the sampler's place: never ends; its first two tokens say which prompt (by length) and which key it saw."""

    def __init__(self):
        self.shapes = []

    def __call__(self, params, batch, features, keys, *, num_samples, max_tokens, sampling):
        shape = (len(keys), num_samples, max_tokens)
        self.shapes.append((*batch.token_ids.shape, *shape[1:]))
        ids = np.full(shape, ALL - 1, np.int32)
        ids[:, :, 0] = batch.valid.sum(-1)[:, None]
        ids[:, :, 1] = np.asarray(keys)[:, :1] % 200
        return Samples(ids, np.ones(shape, bool), np.zeros(shape, np.float32), np.zeros(shape[:2], bool), max_tokens)


@pytest.fixture
def echo(text_model, monkeypatch):
    monkeypatch.setattr(text_model, "_sampler", Echo())
    return text_model._sampler


def length(model, messages):
    return len(model._encode(messages, "p").token_ids)


def test_what_does_not_fit_at_once_runs_in_several(text_model, echo, monkeypatch):
    """At most four samples at a time, and those of one conversation in rounds of at most two."""
    monkeypatch.setattr(api, "_MAX_SAMPLES", 4)
    monkeypatch.setattr(api, "_SAMPLES_OF_ONE", 2)
    conversations = [[{"role": "user", "content": "&" * count}] for count in (3, 90, 1, 5, 2)]
    results = text_model.generate(conversations, n=3, temperature=1.0, max_tokens=50)
    for messages, completions in zip(conversations, results, strict=True):
        assert [c.token_ids[0] for c in completions] == [length(text_model, messages)] * 3
        keys = [c.token_ids[1] for c in completions]
        assert keys[0] == keys[1] != keys[2]  # a key a round, which the sampler splits
        assert [(len(c.token_ids), c.finish_reason) for c in completions] == [(50, "length")] * 3
    widths = [shape[1] for shape in echo.shapes]
    assert echo.shapes == [(b, p, 2, 64) for b, p in zip([2, 2, 2, 2, 1, 1], widths, strict=True)]
    assert widths == sorted(widths, reverse=True)
    assert widths[0] > widths[2]


def test_a_response_ends_with_the_context(text_model, echo):
    """A prompt that leaves three of 512 positions, beside one that leaves more."""
    short, full = [{"role": "user", "content": "&"}], [{"role": "user", "content": "&"}]
    missing = 509 - length(text_model, full)
    full[0]["content"] = "&" + "7" * missing
    assert length(text_model, full) == 509
    (a,), (b,) = text_model.generate([short, full], max_tokens=MAX_TOKENS)
    assert (len(a.token_ids), a.finish_reason) == (MAX_TOKENS, "length")
    assert (len(b.token_ids), b.finish_reason) == (3, "length")
    full[0]["content"] += "777"
    with pytest.raises(ril_jax.InputError, match="takes 512 tokens, too many for the model's 512 positions"):
        text_model.generate(full)


def test_an_image_may_come_in_every_form(tmp_path):
    path = tmp_path / "a picture.png"
    path.write_bytes(png(SMALL))
    encoded = base64.b64encode(png(SMALL)).decode()
    parts = [
        {"type": "image", "image": SMALL}, {"type": "image", "image": png(SMALL)}, {"type": "image", "image": path},
        {"type": "image", "image": str(path)}, {"type": "image", "image": data_url(SMALL)}, {"image": SMALL},
        {"type": "image_url", "image_url": {"url": data_url(SMALL), "detail": "high"}},
        {"type": "image_url", "image_url": {"url": str(path)}}, {"type": "image_url", "image_url": data_url(SMALL)},
        {"type": "input_image", "image_url": data_url(SMALL)}, {"type": "image", "path": str(path)},
        {"type": "image", "url": data_url(SMALL)}, {"type": "image", "url": path.as_uri()},
        {"type": "image", "bytes": png(SMALL)}, {"type": "image", "data": encoded},
        {"type": "image", "base64": encoded},
    ]  # fmt: skip
    messages, images = images_apart(user(*parts, text("a")), "messages", api._read_image)
    assert messages == user(*[{"type": "image"}] * len(parts), text("a"))
    assert len(images) == len(parts)
    for image in images:
        np.testing.assert_array_equal(np.asarray(image), np.asarray(SMALL))


def test_vision_buffers_are_few_and_large_enough(model):
    """Every rung holds its images, and 300 images of any size take few shapes."""
    vision, rungs = model.config.vision, set()
    rng = np.random.default_rng(0)
    for _ in range(300):
        height, width = (2 * rng.integers(1, 17, 2)).tolist()
        image = hf_models.Image(np.zeros((height * width, hf_models.PATCH_DIM), np.float32), (1, height, width))
        rung = api._rung([hf_models.Prompt(np.zeros(1, np.int32), (image,))], model.config)
        packed = pack_images([image], vision, rung)
        assert np.count_nonzero(packed.window_index < rung.patches) == height * width
        assert np.count_nonzero(packed.frame_index < rung.patches) == height * width
        rungs.add(rung)
    assert len(rungs) <= 8


BAD = {
    "a string": ("Hello", {}, "messages must be"),
    "no messages": ([], {}, "messages must be"),
    "a batch with an empty conversation": ([TEXT_ONLY, []], {}, "conversation 1: the prompt must be"),
    "a bad role": ([{"role": "human", "content": "a"}], {}, "role 'human'"),
    "no content": ([{"role": "user"}], {}, "content must be"),
    "a mixture": ([TEXT_ONLY, TEXT_ONLY[0]], {}, "messages must be"),
    "a web address": (
        user({"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}),
        {},
        "messages: message 0, part 0: images are not fetched",
    ),
    "no such file": (user(text("a"), {"type": "image", "image": "nowhere.png"}), {}, "part 1: the image file cannot"),
    "an image part without one": (user({"type": "image"}), {}, "part 0: an image part without an image"),
    "bad base64": (user({"type": "image", "data": "%%"}), {}, "not valid base64"),
    "a video": (user({"type": "video", "video": "a.mp4"}), {}, "videos are not supported"),
    "a long prompt": (
        [TEXT_ONLY, user(text("circle " * 600))],
        {},
        "conversation 1: the prompt takes .* 512 positions",
    ),
    "n": (TEXT_ONLY, {"n": 0}, "n is 0"),
    "max_tokens": (TEXT_ONLY, {"max_tokens": 1.5}, "max_tokens is 1.5"),
    "seed": (TEXT_ONLY, {"seed": -1}, "seed is -1"),
    "temperature": (TEXT_ONLY, {"temperature": -0.1}, "temperature is -0.1"),
    "not a number": (TEXT_ONLY, {"temperature": float("nan")}, "temperature is nan"),
    "top_p": (TEXT_ONLY, {"top_p": 0}, "top_p is 0"),
    "top_k": (TEXT_ONLY, {"top_k": -1}, "top_k is -1"),
    "repetition_penalty": (TEXT_ONLY, {"repetition_penalty": 0.0}, "repetition_penalty is 0"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_named(kind, model):
    messages, arguments, message = BAD[kind]
    with pytest.raises(ril_jax.InputError, match=message) as error:
        model.generate(messages, **arguments)
    assert "\n" not in str(error.value)


def test_score_refuses_what_does_not_match_or_fit(model, text_model):
    for messages, response in [(TEXT_ONLY, ["a"]), (BATCH, "a"), (BATCH, ["a"]), ([TEXT_ONLY], [b"a"])]:
        with pytest.raises(ril_jax.InputError, match="response must be"):
            model.score(messages, response)
    with pytest.raises(ril_jax.InputError, match="the response 600, too many for the model's 512 positions"):
        text_model.score(TEXT_ONLY, "&" * 600)
    with pytest.raises(ril_jax.InputError, match="text-only model"):
        text_model.generate(ONE_IMAGE)


def test_load_refuses_bad_arguments(tmp_path, reference):
    with pytest.raises(ril_jax.InputError, match="dtype 'int8' is not supported"):
        ril_jax.load(reference.tiny.folder, dtype="int8")
    with pytest.raises(ril_jax.InputError, match="no such folder"):
        ril_jax.load(tmp_path / "nothing")


def test_import_is_lazy_and_starts_no_backend():
    """In a fresh process: `import ril_jax` brings neither jax nor transformers, and the API no backend and no torch."""
    script = (
        "import sys, ril_jax\n"
        "assert not {'jax', 'numpy', 'transformers', 'PIL'} & set(sys.modules)\n"
        "assert {'load', 'objectives', '__version__'} <= set(dir(ril_jax))\n"
        "assert ril_jax.__version__ and not hasattr(ril_jax, 'nothing')\n"
        "ril_jax.load, ril_jax.Completion, ril_jax.Score, ril_jax.objectives.policy_loss\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge.backends_are_initialized()\n"
        "assert not {'torch', 'tensorflow', 'ril_jax.training'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
