"""Claims about the routes, asked by OpenAI's own client: results are transformers', and in OpenAI's form."""

import base64
import io
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import openai
import pytest
from helpers import hf_models
from helpers.served import assert_idle, data_url, image_part, picture, running
from PIL import Image

USER = [{"role": "system", "content": "Be terse."}, {"role": "user", "content": "How many <image> tags?"}]
WIDE, SMALL = picture(60, 90), picture(57, 61)
MAX_TOKENS = 20


def user(*parts):
    return [{"role": "user", "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]}]


def greedy(client, messages, **fields):
    return client.chat.completions.create(
        model="tiny", messages=messages, temperature=0, **{"max_tokens": MAX_TOKENS} | fields
    )


def test_a_greedy_chat_is_that_of_transformers(client, reference):
    prompt = reference.prompt(USER)
    expected = reference.greedy(prompt, MAX_TOKENS)
    got = greedy(client, USER)
    (choice,) = got.choices
    assert choice.message.content == reference.text(expected)
    assert choice.message.role == "assistant"
    assert choice.finish_reason == ("stop" if expected[-1] in reference.eos_token_ids else "length")
    assert (got.usage.prompt_tokens, got.usage.completion_tokens) == (len(prompt.token_ids), len(expected))
    assert got.usage.total_tokens == len(prompt.token_ids) + len(expected)
    assert (got.object, got.model) == ("chat.completion", "tiny")


@pytest.mark.parametrize(
    ("kind", "options"), [("PNG", {}), ("JPEG", {"quality": 90}), ("WEBP", {"lossless": True}), ("WEBP", {})]
)
def test_images_may_be_png_jpeg_and_webp_and_several(client, reference, kind, options):
    urls = [data_url(image, kind, **options) for image in (WIDE, SMALL)]
    seen = [Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB") for url in urls]
    bare = user({"type": "image"}, "Which is ", {"type": "image"}, "higher?")
    expected = reference.greedy(reference.prompt(bare, *seen), MAX_TOKENS)
    # `detail` and other fields are sent by VLMEvalKit.
    parts = [image_part(urls[0], detail="low"), "Which is ", image_part(urls[1], max_dynamic_patch=6), "higher?"]
    got = greedy(client, user(*parts))
    assert got.choices[0].message.content == reference.text(expected)
    assert got.usage.completion_tokens == len(expected)


def test_a_stream_is_the_whole_in_pieces(client):
    drawn = dict(model="tiny", messages=USER, max_tokens=30, n=3, seed=11, temperature=1.2, top_p=0.9)
    whole = client.chat.completions.create(**drawn)
    texts, roles, finishes, usage = [""] * 3, [0] * 3, [None] * 3, []
    for chunk in client.chat.completions.create(**drawn, stream=True, stream_options={"include_usage": True}):
        assert chunk.object == "chat.completion.chunk"
        assert not usage  # it is the last
        if not chunk.choices:
            usage.append(chunk.usage)
            continue
        assert chunk.usage is None
        (choice,) = chunk.choices
        assert finishes[choice.index] is None
        roles[choice.index] += choice.delta.role == "assistant"
        texts[choice.index] += choice.delta.content or ""
        finishes[choice.index] = choice.finish_reason
    assert texts == [choice.message.content for choice in whole.choices]
    assert finishes == [choice.finish_reason for choice in whole.choices]
    assert roles == [1, 1, 1]
    assert usage[0].model_dump() == whole.usage.model_dump()


def test_a_stream_ends_with_done_and_without_usage_that_nobody_asked_for(served):
    body = {"model": "tiny", "messages": USER, "max_tokens": 3, "stream": True}
    with httpx.stream("POST", f"{served.url}/v1/chat/completions", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert all(chunk["choices"] and "usage" not in chunk for chunk in chunks)
    assert len({chunk["id"] for chunk in chunks}) == 1


def test_seeds_and_n(client):
    fields = dict(model="tiny", messages=USER, max_tokens=12, n=4, extra_body={"ignore_eos": True})

    def texts(**more):
        return [c.message.content for c in client.chat.completions.create(**fields, **more).choices]

    assert texts(seed=5) == texts(seed=5)
    assert texts(seed=-5) == texts(seed=-5) != texts(seed=5)
    assert len(set(texts(seed=5))) == 4
    assert texts() != texts()  # absent: drawn anew each time
    got = greedy(client, USER, n=4)
    assert len({choice.message.content for choice in got.choices}) == 1
    assert [choice.index for choice in got.choices] == [0, 1, 2, 3]
    assert got.usage.completion_tokens == 4 * greedy(client, USER).usage.completion_tokens


def test_absent_sampling_fields_are_openais_defaults(client, served):
    """Not those of config.sampling, whose repetition penalty would change greedy answers, unless the config says so."""
    expected = greedy(client, USER, extra_body={"repetition_penalty": 1.0, "top_k": 0}).choices[0].message.content
    assert greedy(client, USER).choices[0].message.content == expected
    with running(served.service(default_sampling="config")) as url:
        other = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        penalised = greedy(client, USER, extra_body={"repetition_penalty": 1.05}).choices[0].message.content
        assert greedy(other, USER).choices[0].message.content == penalised


def test_repetition_penalty_is_that_of_transformers(client, reference):
    expected = reference.greedy(reference.prompt(USER), MAX_TOKENS, repetition_penalty=1.4)
    got = greedy(client, USER, extra_body={"repetition_penalty": 1.4})
    assert got.choices[0].message.content == reference.text(expected)
    assert got.usage.completion_tokens == len(expected)


def test_logprobs_of_a_chat_are_the_models_with_one_entry_a_token(client, reference):
    got = greedy(client, USER, logprobs=True, top_logprobs=4)
    content = got.choices[0].logprobs.content
    prompt = reference.prompt(USER)
    ids = reference.greedy(prompt, MAX_TOKENS)
    expected = reference.logprobs(prompt, ids)
    assert len(content) == got.usage.completion_tokens == len(ids)
    for t, entry in enumerate(content):
        np.testing.assert_allclose(entry.logprob, expected[t, ids[t]].item(), atol=1e-4)
        best = expected[t].topk(4).values.numpy()
        np.testing.assert_allclose([top.logprob for top in entry.top_logprobs], best, atol=1e-4)
        assert entry.top_logprobs[0].logprob == entry.logprob  # greedy, and the very same number
    ended = [entry for entry in content if entry.token not in ("<|im_end|>", "<|endoftext|>")]
    joined = b"".join(bytes(entry.bytes) for entry in ended).decode("utf-8", "replace")
    assert joined == got.choices[0].message.content
    streamed = [
        entry.logprob
        for chunk in greedy(client, USER, logprobs=True, stream=True)
        for entry in (chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else [])
    ]
    assert streamed == [entry.logprob for entry in content]
    assert greedy(client, USER, logprobs=False).choices[0].logprobs is None


def test_a_stop_string_ends_the_text_before_it(client):
    full = greedy(client, USER, max_tokens=60, extra_body={"ignore_eos": True})
    text = full.choices[0].message.content
    at = next(i for i in range(8, len(text) - 3) if "\ufffd" not in text[i : i + 3] and text.find(text[i : i + 3]) == i)
    fields = dict(max_tokens=60, stop=["never there", text[at : at + 3]], extra_body={"ignore_eos": True})
    got = greedy(client, USER, **fields, logprobs=True)
    assert got.choices[0].message.content == text[:at]
    assert got.choices[0].finish_reason == "stop"
    assert got.usage.completion_tokens < full.usage.completion_tokens
    assert len(got.choices[0].logprobs.content) == got.usage.completion_tokens
    streamed = [c.choices[0].delta.content or "" for c in greedy(client, USER, **fields, stream=True)]
    assert "".join(streamed) == text[:at]


def test_max_tokens_is_clipped_to_what_the_context_leaves(client, served):
    context = served.engine.shapes.max_model_len
    for name in ("max_tokens", "max_completion_tokens"):
        got = client.chat.completions.create(
            model="tiny", messages=USER, temperature=0, extra_body={"ignore_eos": True}, **{name: 32768}
        )
        assert got.choices[0].finish_reason == "length"
        assert got.usage.total_tokens == context
    absent = client.chat.completions.create(model="tiny", messages=USER, extra_body={"ignore_eos": True})
    assert absent.usage.total_tokens == context
    completion = client.completions.create(model="tiny", prompt="How", extra_body={"ignore_eos": True})
    assert completion.usage.completion_tokens == 16
    with pytest.raises(openai.BadRequestError, match=r"the prompt takes \d+ tokens") as error:
        client.completions.create(model="tiny", prompt=[5] * context)
    assert error.value.code == "context_length_exceeded"


def test_echo_scores_prompts_as_lm_eval_asks(client, served, reference):
    """`local-completions` of lm-evaluation-harness: token ids, echo, logprobs 1, max_tokens 1 of which it drops it."""
    rows = [reference.tokenizer("Which bar is higher, größer 🙂")["input_ids"], [40, 41, 290 - 8, 42] * 20, [50]]
    got = client.completions.create(
        model="tiny", prompt=rows, temperature=0, max_tokens=1, logprobs=1, seed=1234, echo=True
    )
    assert [choice.index for choice in got.choices] == [0, 1, 2]
    for choice, row in zip(got.choices, rows, strict=True):
        told = choice.logprobs
        assert len(told.tokens) == len(told.token_logprobs) == len(told.top_logprobs) == len(row) + 1
        assert told.token_logprobs[0] is None
        assert told.top_logprobs[0] is None
        if len(row) > 1:
            expected = reference.logprobs(hf_models.Prompt(np.array(row[:1], np.int32)), row[1:])
            picked = expected[np.arange(len(row) - 1), row[1:]].numpy()
            np.testing.assert_allclose(told.token_logprobs[1:-1], picked, atol=1e-4)
            best = expected.max(-1).values.numpy()
            np.testing.assert_allclose([max(top.values()) for top in told.top_logprobs[1:-1]], best, atol=1e-4)
        # It says that a token was the greedy one where the two numbers are equal.
        assert told.token_logprobs[-1] == max(told.top_logprobs[-1].values())
    scored = client.completions.create(model="tiny", prompt=rows, max_tokens=0, logprobs=1, echo=True)
    assert scored.usage.completion_tokens == 0
    for choice, both, row in zip(scored.choices, got.choices, rows, strict=True):
        assert choice.finish_reason == "length"
        assert choice.text == served.model.chat.decode(row)
        assert choice.logprobs.token_logprobs == both.logprobs.token_logprobs[:-1]


def test_text_offsets_cut_the_text_into_its_tokens(client):
    prompt = "Zähle: größer als fünf 🙂; 数一数"
    for stream in (False, True):
        answer = client.completions.create(
            model="tiny", prompt=prompt, max_tokens=20, temperature=0, logprobs=0, echo=True, stream=stream,
            extra_body={"ignore_eos": True},
        )  # fmt: skip
        text, offsets, tokens = "", [], []
        for chunk in answer if stream else [answer]:
            text += chunk.choices[0].text
            if chunk.choices[0].logprobs:
                offsets += chunk.choices[0].logprobs.text_offset
                tokens += chunk.choices[0].logprobs.tokens
        assert text.startswith(prompt)
        assert offsets[0] == 0
        assert offsets == sorted(offsets)
        for start, end, token in zip(offsets, [*offsets[1:], len(text)], tokens, strict=True):
            if "\ufffd" not in token:  # a whole character or more
                assert text[start:end] == token


def test_completions_of_several_prompts_come_in_order(client, served, reference):
    prompts = ["How many", "Which bar", "What is left"]
    got = client.completions.create(model="tiny", prompt=prompts, n=2, max_tokens=8, temperature=0, echo=True)
    assert [choice.index for choice in got.choices] == list(range(6))
    for i, choice in enumerate(got.choices):
        ids = np.array(reference.tokenizer(prompts[i // 2])["input_ids"], np.int32)
        expected = reference.greedy(hf_models.Prompt(ids), 8)
        assert choice.text == prompts[i // 2] + reference.text(expected)
        assert choice.logprobs is None
    assert got.usage.prompt_tokens == sum(len(reference.tokenizer(p)["input_ids"]) for p in prompts)


def test_special_tokens_in_a_raw_prompt_are_such_and_in_a_chat_are_text(client, reference):
    raw = "<|im_start|>user\nHow?<|im_end|>\n<|im_start|>assistant\n"
    ids = reference.tokenizer(raw)["input_ids"]
    by_text = client.completions.create(model="tiny", prompt=raw, max_tokens=12, temperature=0)
    by_ids = client.completions.create(model="tiny", prompt=ids, max_tokens=12, temperature=0)
    assert by_text.usage.prompt_tokens == len(ids)
    assert by_text.choices[0].text == by_ids.choices[0].text
    chat = greedy(client, user("<|im_end|>"))
    assert chat.usage.prompt_tokens > greedy(client, user("")).usage.prompt_tokens + 2


def test_concurrent_clients_each_get_what_they_get_alone(served):
    client = served.client()
    urls = [data_url(picture(40 + 9 * i, 80)) for i in range(4)]

    def ask(i):
        messages = user(image_part(urls[i % 4]), f"What is {i}?") if i % 2 else user(f"How many {'x' * i}")
        fields = dict(temperature=0.0 if i % 3 else 1.0, seed=i, max_tokens=5 + 3 * i, logprobs=i % 5 == 0)
        return client.chat.completions.create(model="tiny", messages=messages, n=1 + i % 2, **fields)

    alone = [ask(i) for i in range(16)]
    with ThreadPoolExecutor(16) as pool:
        crowd = list(pool.map(ask, range(16)))
    for a, b in zip(alone, crowd, strict=True):
        assert [c.model_dump() for c in a.choices] == [c.model_dump() for c in b.choices]
        assert a.usage == b.usage
    assert_idle(served.engine)
    assert served.engine.counter.after_warm == 0


def test_what_evaluation_kits_send_is_served(served, reference):
    """Bodies as lmms-eval, VLMEvalKit and lm-evaluation-harness write them, with the fields that only they have."""
    url = data_url(WIDE, "JPEG", quality=95)
    bodies = [
        {
            "messages": user("Which bar is higher?", image_part(data_url(WIDE))),
            "model": "tiny", "max_completion_tokens": 4096, "temperature": 0, "top_p": None,
        },
        {
            "model": "tiny", "n": 1, "temperature": 0, "max_tokens": 32768, "dataset": "MMBench_DEV_EN",
            "messages": [
                {"role": "system", "content": [{"type": "text", "text": "Be terse."}]},
                *user(image_part(url, detail="low"), "Answer:"),
            ],
        },
        {
            "messages": [{"role": "user", "content": "How many?", "type": "text"}],
            "model": str(reference.folder), "max_tokens": 256, "temperature": 0, "stop": ["\n\n", "<|im_end|>"],
            "seed": 1234,
        },
    ]  # fmt: skip
    for body in bodies:
        response = httpx.post(
            f"{served.url}/v1/chat/completions", content=json.dumps(body),
            headers={"Content-Type": "application/json", "Authorization": "Bearer sk-123456"}, timeout=60,
        )  # fmt: skip
        assert response.status_code == 200, response.text
        assert isinstance(response.json()["choices"][0]["message"]["content"].strip(), str)
        assert response.json()["usage"]["completion_tokens"] > 0
    listed = httpx.get(f"{served.url}/v1/models").json()
    assert [model["id"] for model in listed["data"]] == ["tiny"]
    assert httpx.get(f"{served.url}/v1/models/tiny").json() == listed["data"][0]


def test_metrics_count_what_was_done(served):
    def read():
        text = httpx.get(f"{served.url}/metrics").text
        return {k: float(v) for k, v in (line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#")}

    before = read()
    got = greedy(served.client(), user("Count this"), n=2, max_tokens=7)
    after = read()
    grown = {name: after[name] - before.get(name, 0.0) for name in after}
    assert grown['ril_requests_total{endpoint="chat",status="200"}'] == 1
    assert grown["ril_prompt_tokens_total"] == got.usage.prompt_tokens
    assert grown["ril_completion_tokens_total"] == got.usage.completion_tokens
    assert grown["ril_time_to_first_token_seconds_count"] == 1
    assert grown["ril_request_seconds_count"] == 1
    assert grown["ril_inter_token_seconds_count"] >= 1
    assert 0 < grown["ril_time_to_first_token_seconds_sum"] <= grown["ril_request_seconds_sum"]
    assert after["ril_cache_use_ratio"] == after["ril_samples_running"] == after["ril_requests_waiting"] == 0
    assert after["ril_ready"] == 1
    assert after["ril_unexpected_compilations_total"] == 0
    again = greedy(served.client(), user("Count this"), n=2, max_tokens=7)
    assert again.choices == got.choices
    assert read()["ril_prefix_chunks_found_total"] > after["ril_prefix_chunks_found_total"]


def test_requests_of_one_connection_do_not_wait_for_each_others_streams(served):
    """A stream that is not read to its end holds up nobody."""
    client = served.client()
    stream = client.chat.completions.create(model="tiny", messages=USER, stream=True, extra_body={"ignore_eos": True})
    next(stream)
    done = threading.Event()
    thread = threading.Thread(target=lambda: (greedy(client, USER), done.set()))
    thread.start()
    assert done.wait(20)
    thread.join()
    stream.close()
    assert_idle(served.engine)
