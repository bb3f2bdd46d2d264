"""Every baseline and ablation by config alone: two RIL steps each, on a small workdir."""

import contextlib
import json
import threading
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import jax
import numpy as np
import pytest
from helpers import small_run

from ril_jax import config as config_lib
from ril_jax.compilation import CompileCounter
from ril_jax.data.records import Question, Response
from ril_jax.errors import InputError
from ril_jax.training.collect import response_dataset
from ril_jax.training.metrics import read_metrics
from ril_jax.training.ril import Ril, run_ril
from ril_jax.training.run import Run
from ril_jax.training.stopping import StopSignal

G, B = 4, small_run.BATCH

ALWAYS = {
    "reward", "reward_std", "frac_reward_zero_std", "rewards/spread/mean", "rewards/spread/std",
    "completions/mean_length", "completions/clipped_ratio", "completions/mean_terminated_length",
    "entropy", "kl", "clip_ratio/low_mean", "clip_ratio/high_mean", "sampling/logp_difference_mean",
    "step_time", "num_tokens", "tokens_per_second", "loss", "grad_norm",
}  # fmt: skip
ANSWER = {"rewards/answer/mean", "rewards/answer/std", "judge/error_rate"}
SIMILARITY = {"rewards/similarity/mean", "rewards/similarity/std", "discriminator/accuracy"}
TRAINED = {"discriminator/loss", "discriminator/grad_norm"}

# What each arm has: teachers in its groups, and the metrics beside ALWAYS.
ARMS = {
    "ril": (("a", "b"), ANSWER | SIMILARITY | TRAINED),
    "dr_grpo": ((), ANSWER),
    "grpo": ((), ANSWER),
    "no_discriminator": (("a", "b"), ANSWER),
    "frozen_discriminator": (("a", "b"), ANSWER | SIMILARITY),
    "no_answer_reward": (("a", "b"), SIMILARITY | TRAINED),
    "no_teacher_rows": ((), ANSWER | SIMILARITY | TRAINED),
    "gad": (("a", "b"), SIMILARITY | TRAINED),
    "teacher_a": (("a",), ANSWER | SIMILARITY | TRAINED),
    "teacher_b": (("b",), ANSWER | SIMILARITY | TRAINED),
}


@pytest.fixture(scope="module")
def base(trained_workdir):
    """A run whose programs are compiled once for all tests here; `variant` makes others of it."""
    with StopSignal() as stop:
        run = Run.start(small_run.small_config(**{"ril.steps": 2}), trained_workdir, stop)
        for shared in ("student", "programs", "sampler", "encoder", "buckets"):
            getattr(run, shared)
        yield run
        run.counter.close()


@pytest.fixture
def variant(base, tmp_path):
    """A function: changed fields of the config -> a run with them in its own workdir, sharing compiled programs."""

    def make(**changes) -> Run:
        return small_run.variant(base, tmp_path / f"workdir{len(list(tmp_path.iterdir()))}", changes)

    return make


def metrics_of(run, arm="ril"):
    return read_metrics(run.workdir / "metrics" / f"ril/{arm}.jsonl")


def table_of(run, arm="ril"):
    return json.loads((run.workdir / "samples/ril" / arm / "step_000002.json").read_text())["samples"]


def batch_of(run, count=B):
    return response_dataset(run)[:count]


def test_every_arm_is_tested():
    assert set(ARMS) == set(config_lib.ARMS) | {"teacher_a", "teacher_b"}


@pytest.mark.parametrize("arm", ARMS)
def test_arm_runs_and_reports_what_it_has_and_nothing_else(arm, variant):
    teachers, metrics = ARMS[arm]
    run = variant(arms=arm)
    result = run_ril(run, arm)
    assert 0 <= result["accuracy"] <= 1
    assert result["questions"] == 6
    assert (run.workdir / "ril" / arm / "model" / "model.safetensors").exists()

    rows = metrics_of(run, arm)
    assert [row["step"] for row in rows] == [1, 2]
    parts = {name.split("/")[1] for name in ALWAYS | metrics if name.startswith("rewards/")}
    expected = ALWAYS | metrics | ({f"rewards/{part}/teacher_mean" for part in parts} if teachers else set())
    for row in rows:
        assert set(row) == expected | {"step", "time/unix", "ratio_mean"}
        assert all(np.isfinite(value) for value in row.values())
        assert row["ratio_mean"] == 1.0  # mu = 1: pi_old is pi, exactly
        assert row["sampling/logp_difference_mean"] < 1e-5  # sampler and trainer compute one model in float32
        assert row["grad_norm"] > 0
    student_tokens = rows[-1]["completions/mean_length"] * B * G
    assert (rows[-1]["num_tokens"] > student_tokens) if teachers else (rows[-1]["num_tokens"] == student_tokens)

    for sample in table_of(run, arm):
        models = [response["model"] for response in sample["responses"]]
        assert models == ["student"] * G + [name for name in teachers for _ in range(G // len(teachers))]
        assert sum(response["advantage"] for response in sample["responses"]) == pytest.approx(0, abs=1e-5)
        has = {name for name in ("similarity", "answer") if sample["responses"][0][name] is not None}
        assert has == {name for name in ("similarity", "answer") if f"rewards/{name}/mean" in metrics}
        assert (run.workdir / "samples" / sample["images"][0]).exists()


@pytest.mark.parametrize("kind", ["continuous", "levels=4"])
def test_similarity_reward_comes_in_the_steps_that_were_asked_for(kind, variant):
    run = variant(reward__similarity=kind)
    run_ril(run, "ril")
    values = {r["similarity"] for sample in table_of(run) for r in sample["responses"]}
    assert 0 <= min(values) <= max(values) <= 1
    if kind == "continuous":
        assert len(values) > 4
    else:
        assert {round(value * 3, 5) for value in values} <= {0, 1, 2, 3}


@pytest.mark.parametrize("context", ["question", "question_image"])
def test_discriminator_can_see_the_question_and_its_image(context, variant):
    changes = {"discriminator.context": context, "discriminator.prompt_buckets": (160,)}
    run = variant(**changes)
    ril, blind = Ril(run, "ril"), Ril(variant(**{"discriminator.prompt_buckets": (160,)}), "ril")
    questions = batch_of(run)
    values, group, _ = ril.step(1, questions)
    assert np.isfinite(values["discriminator/loss"])
    # The same responses under another question: only a discriminator that sees it can tell.
    turned = [*questions[1:], questions[0]]
    names = {name for name in ril.state.discriminator.params if name.startswith("vision.")}
    assert not names, "the tower is frozen"
    assert any(name.startswith("vision.") for name in ril.d_frozen) == (context == "question_image")
    for which, sees in ((ril, True), (blind, False)):
        small_run.set_field(which.config, "discriminator.frozen", True)
        straight, _ = which.discriminate(2, questions, group, 1)
        crossed, _ = which.discriminate(2, turned, group, 1)
        assert (np.abs(straight - crossed).max() > 1e-7) == sees


def test_mu_updates_student_and_discriminator_that_often(variant):
    run = variant(ril__num_iterations=2)
    ril = Ril(run, "ril")
    values, _, _ = ril.step(1, batch_of(run))
    assert int(ril.state.student.step) == 2
    assert int(ril.state.discriminator.step) == 2
    assert values["ratio_mean"] != 1.0  # at the second update pi is no longer pi_old
    assert values["ratio_mean"] == pytest.approx(1.0, abs=0.1)


def test_truncated_completions_are_masked_if_asked(variant):
    """The same samples in both runs: only their place in the loss differs."""
    plain, masked = variant(), variant(ril__mask_truncated_completions=True)
    values, group, _ = Ril(plain, "ril").step(1, batch_of(plain))
    masked_values, masked_group, _ = Ril(masked, "ril").step(1, batch_of(masked))
    lengths = np.array([[len(tokens) for tokens in row] for row in group.tokens])
    np.testing.assert_array_equal(group.finished, masked_group.finished)
    assert not group.finished.all()
    assert values["num_tokens"] == lengths.sum()
    assert masked_values["num_tokens"] == lengths[:, G:].sum() + lengths[:, :G][group.finished].sum()


def test_micro_batches_change_no_metric(variant):
    whole, parts = variant(), variant(ril__micro_batch_size=2)
    values, group, _ = Ril(whole, "ril").step(1, batch_of(whole))
    micro_values, micro_group, _ = Ril(parts, "ril").step(1, batch_of(parts))
    assert micro_group.texts == group.texts
    assert set(values) == set(micro_values)
    for name, value in values.items():
        # KL is 0 up to rounding in the first step, where pi is pi_ref.
        assert micro_values[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


def test_discriminator_is_trained_unless_frozen(variant):
    run = variant()
    for arm, moves in (("ril", True), ("frozen_discriminator", False)):
        ril = Ril(run, arm)
        before = jax.device_get(ril.state.discriminator.params)
        ril.step(1, batch_of(run))
        after = jax.device_get(ril.state.discriminator.params)
        assert any((after[name] != before[name]).any() for name in before) == moves


def test_vision_tower_is_frozen_unless_asked(variant):
    for trained in (False, True):
        run = variant(ril__train_vision=trained)
        ril = Ril(run, "dr_grpo")
        before = jax.device_get(ril.state.student.params | ril.frozen)
        ril.step(1, batch_of(run))
        after = jax.device_get(ril.state.student.params | ril.frozen)
        moved = {name for name in before if (after[name] != before[name]).any()}
        assert any(name.startswith("text.") for name in moved)
        assert any(name.startswith("vision.") for name in moved) == trained


def test_teachers_are_drawn_evenly_without_replacement_and_again_after_a_restart(variant):
    run = variant()
    responses = [Response(name, f"{name}{i}", 1, "stop") for name in ("b", "a", "student") for i in range(6)]
    question = Question("q", "?", (), "1", tuple(responses))
    ril, again = Ril(run, "ril"), Ril(run, "ril")
    seen = set()
    for step in range(1, 30):
        drawn = [response.text for response in ril.draw_teachers(step, 0, question)]
        assert [text[0] for text in drawn] == ["a", "a", "b", "b"]
        assert len(set(drawn)) == 4
        assert drawn == [response.text for response in again.draw_teachers(step, 0, question)]
        seen.add(tuple(drawn))
    assert len(seen) > 10  # fresh each time
    one = [response.text for response in Ril(run, "teacher_b").draw_teachers(1, 0, question)]
    assert {text[0] for text in one} == {"b"}
    assert len(set(one)) == 4
    with pytest.raises(InputError, match="question q has no cached response of teacher 'a'"):
        ril.draw_teachers(1, 0, Question("q", "?", (), "1", tuple(responses[:6])))


def test_nothing_is_compiled_after_the_first_steps(variant):
    run = variant()
    ril, questions = Ril(run, "ril"), batch_of(run, 8)
    with CompileCounter() as counter:
        for step in range(1, 6):
            ril.step(step, questions[step - 1 : step - 1 + B])
            if step == 2:
                counter.warm("ril")
        assert counter.after_warm == 0, [str(c) for c in counter.compilations if c.after]


# --- a judge over HTTP ---


@contextlib.contextmanager
def judge_server(bodies):
    """An OpenAI-like endpoint: by the text of the request it says 1 or 0, and why."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            bodies.append(body)
            verdict = zlib.crc32(body["messages"][-1]["content"].encode()) % 2
            reply = {"choices": [{"message": {"content": f"Counted again. <answer>{verdict}</answer>"}}]}
            payload = json.dumps(reply).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(payload)))
            self.end_headers()
            self.wfile.write(payload)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.shutdown()
        server.server_close()


def test_an_openai_judge_grades_the_group(variant):
    bodies = []
    with judge_server(bodies) as url:
        run = variant(reward__judge__kind="openai", reward__judge__base_url=url)
        run_ril(run, "ril")
    assert bodies
    for row in metrics_of(run):
        assert row["judge/error_rate"] == 0.0
        assert row["judge/requests"] > 0
        assert 0 < row["rewards/answer/mean"] < 1
    words = {r["judge"] for sample in table_of(run) for r in sample["responses"]}
    assert "Counted again." in words
