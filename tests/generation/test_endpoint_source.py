"""Claims about a teacher behind an endpoint: what it is asked, what it answers, and what becomes of failures."""

import base64
import io
import re
from collections import Counter

import numpy as np
import pytest
from helpers.generated import answers, generated_config, run_here, write_questions
from PIL import Image

from ril_jax.data.records import Question
from ril_jax.errors import InputError
from ril_jax.generation.endpoint_source import data_url, openai_messages
from ril_jax.generation.engine_source import EngineSource
from ril_jax.generation.outcomes import sample_seed
from ril_jax.sampling.gather import run_each


def asking(made, **changes):
    config = generated_config(made.folder, **{"base_url": made.url, "max_wait": 0.05} | changes)
    config.checkpoint = ""
    return config


def asked_about(body):
    content = body["messages"][-1]["content"]
    return content if isinstance(content, str) else "".join(p.get("text", "") for p in content)


def test_every_sample_is_what_the_model_draws_from_its_seed(made, tmp_path):
    """The engine, asked directly for the same prompts, seeds and settings, gives texts, counts and reasons."""
    config = asking(made, num_generations=2)
    run_here(config, write_questions(tmp_path / "q.jsonl", 4), tmp_path / "out")
    found = answers(tmp_path / "out")
    source = EngineSource(made.another_engine(), made.model.chat, config, name="tiny")  # for its prompts
    requests = {}
    for question in found.values():
        request = source.prepare(question)
        for i in range(2):
            seed = sample_seed(config.seed, question.id, i)
            fields = {"max_tokens": request.max_tokens, "sampling": request.sampling}
            requests[question.id, i] = type(request)(request.prompt, n=1, seed=seed, **fields)
    source.close()
    engine = made.another_engine()
    results = dict(run_each(engine, made.model.chat, requests.items(), in_flight=4))
    for (id_, i), (result,) in results.items():
        response = found[id_].responses[i]
        expected = (result.text, len(result.token_ids), result.finish_reason)
        assert (response.text, response.token_count, response.finish_reason) == expected
    assert {r.model for q in found.values() for r in q.responses} == {"tiny"}
    engine.close()


def test_images_and_turns_go_out_as_they_came():
    image = Image.fromarray(np.zeros((30, 40, 3), np.uint8))
    encoded = {}
    for kind, options in (("JPEG", {}), ("BMP", {}), ("TIFF", {})):
        image.save(buffer := io.BytesIO(), kind, **options)
        encoded[kind] = buffer.getvalue()
    image.putpixel((0, 0), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(buffer := io.BytesIO(), "PNG", exif=exif)
    turned = buffer.getvalue()

    def decoded(url):
        header, _, payload = url.partition(",")
        return header, base64.b64decode(payload)

    assert decoded(data_url(encoded["JPEG"], name="it")) == ("data:image/jpeg;base64", encoded["JPEG"])
    for data in (encoded["BMP"], encoded["TIFF"], turned):
        header, sent = decoded(data_url(data, name="it"))
        assert header == "data:image/png;base64"
        assert sent != data
    upright = Image.open(io.BytesIO(decoded(data_url(turned, name="it"))[1]))
    assert upright.size == (30, 40)
    assert upright.getpixel((29, 0)) == (255, 0, 0)

    question = Question("q", "look <image> and <image>?", (encoded["JPEG"], encoded["BMP"]), "1")
    (message,) = openai_messages(question)
    assert [part["type"] for part in message["content"]] == ["text", "image_url", "text", "image_url", "text"]
    assert message["content"][1]["image_url"]["url"].startswith("data:image/jpeg")
    plain = Question("q", '[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]', (), "1")
    assert openai_messages(plain) == [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"},
    ]  # fmt: skip


def test_a_busy_and_failing_endpoint_is_asked_again_until_it_answers(made, tmp_path):
    questions = write_questions(tmp_path / "q.jsonl", 4)
    run_here(asking(made), questions, tmp_path / "calm")
    made.recorder.reset()
    tries = Counter()

    def answer(body):
        tries[body["seed"]] += 1
        status = {1: 429, 2: 500, 3: 503}.get(tries[body["seed"]], 0) if body["seed"] % 2 else 0
        return (status, {"error": {"message": "busy"}}) if status else None

    made.recorder.answer = answer
    run_here(asking(made), questions, tmp_path / "busy")
    assert {tries[seed] for seed in tries if seed % 2} == {4}
    assert answers(tmp_path / "busy") == answers(tmp_path / "calm")


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ((400, {"error": {"message": "too long"}}), "the endpoint answers 400: .*too long"),
        ((500, {"error": {"message": "odd"}}), r"the endpoint answers 500: .*odd.*, 2 times"),
        (
            (200, {"choices": [{"message": {"content": "x"}, "finish_reason": "content_filter"}]}),
            "ended sample . by 'content_filter'",
        ),
    ],
    ids=["refused", "fails", "filtered"],
)
def test_a_question_that_is_not_answered_is_told_and_the_others_are(made, tmp_path, capsys, answer, reason):
    made.recorder.answer = lambda body: answer if "Is 2 more" in asked_about(body) else None
    run_here(asking(made, retries=2), write_questions(tmp_path / "q.jsonl", 6), tmp_path / "out")
    assert sorted(answers(tmp_path / "out")) == ["q0", "q1", "q3", "q4", "q5"]
    out = capsys.readouterr().out
    assert "5 of 6 rows answered" in out
    (line,) = [line for line in out.splitlines() if line.startswith("failed q2: ")]
    assert re.search(reason, line)


def test_where_nobody_is_let_in_one_line_says_so(made, tmp_path):
    made.recorder.answer = lambda body: (401, {"error": {"message": "no key"}})
    with pytest.raises(InputError, match=r"endpoint .*/v1/chat/completions answers 401: .*no key"):
        run_here(asking(made), write_questions(tmp_path / "q.jsonl", 3), tmp_path / "out")
    made.recorder.answer = lambda body: (200, {"text": "hello"})
    with pytest.raises(InputError, match="does not answer as OpenAI's API does"):
        run_here(asking(made), tmp_path / "q.jsonl", tmp_path / "out")


def test_an_endpoint_that_does_not_count_is_counted_for(made, tmp_path):
    given = {"choices": [{"message": {"content": "three circles"}, "finish_reason": "length"}]}
    made.recorder.answer = lambda body: (200, given)
    questions = write_questions(tmp_path / "q.jsonl", 2)
    with pytest.raises(InputError, match=r"tells no usage; name the model's folder or hub id in config\.checkpoint"):
        run_here(asking(made), questions, tmp_path / "out")
    config = asking(made)
    config.checkpoint = str(made.folder)
    run_here(config, questions, tmp_path / "out")
    tokens = len(made.model.chat.tokenizer("three circles")["input_ids"])
    assert {r.token_count for q in answers(tmp_path / "out").values() for r in q.responses} == {tokens}


@pytest.mark.parametrize(
    ("field", "value", "line"),
    [
        ("base_url", "host:8000", "config.generate.base_url is 'host:8000': give an address like"),
        ("api_key_env", "NO_SUCH_KEY", "config.generate.api_key_env names NO_SUCH_KEY, which is not set: export it"),
        ("retries", 0, "config.generate.retries is 0: give a number above 0"),
        ("endpoint_model", "another", "answers 404: .*another"),
    ],
)
def test_settings_that_cannot_work_give_one_line(made, tmp_path, field, value, line):
    with pytest.raises(InputError, match=line):
        run_here(asking(made, **{field: value}), write_questions(tmp_path / "q.jsonl", 1), tmp_path / "out")
