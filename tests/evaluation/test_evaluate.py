"""Claims about the command: by an endpoint whose answers are known, and by a local engine."""

import json
import subprocess
import sys
import time

import pytest
from helpers import processes
from helpers.benchmark_files import choice, write_all, write_tsv
from helpers.evaluated import CONFIG, asked, endpoint, evaluated_config, run, wait_for
from helpers.quick import quick_compilation, quick_environment
from helpers.tiny_folder import build_tiny_folder

from ril_jax import cli, evaluate
from ril_jax.errors import InputError
from ril_jax.evaluation.results import read_results, read_samples
from ril_jax.sampling import local
from ril_jax.sampling.engine import Engine


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_all(tmp_path_factory.mktemp("data"))


@pytest.fixture
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("results")


def cat(messages) -> str:
    """Always the cat, whatever its letter; fourteen charts; and x."""
    text = asked(messages)
    if "cat" in text:
        return "The answer is cat."
    if "in the image" in text:
        return "J"
    if "How many" in text:
        return "It is 14."
    return {"How high?": "14", "What is x?": "x is -1"}.get(text.partition("\n")[0], "the left one, eight")


def test_every_benchmark_is_asked_and_scored(data, folder, capsys):
    with endpoint(cat, "Qwen2.5-VL-7B-Instruct") as (url, service):
        results = run(evaluated_config(url=url), data, folder)
    scores = {name: r["score"] for name, r in results.items()}
    # Rows of the files: the first is a cat, and where there are two the second is a dog or a cat again.
    assert scores == {
        "ai2d": 50, "mmstar": 50, "seedbench": 50, "seedbench2_plus": 50, "realworldqa": 50, "blink": 100,
        "mmbench": 100, "mmbench_cn": 100, "chartqa": 50, "mathvista": 50, "mmmu": 50, "mmmu_pro": 100,
        "mmvet": None, "mmvet_v2": None,
    }  # fmt: skip
    assert (results["mmbench"]["questions"], results["mmbench"]["samples"]) == (2, 3)
    assert results["mathvista"]["by_category"]["arithmetic"] == {"score": 100, "questions": 1}
    assert results["mmmu_pro"]["by_part"] == {
        part: {"score": 100, "questions": 1} for part in ("MMMU_Pro_10c", "MMMU_Pro_V")
    }
    assert {body["temperature"] for body in service.bodies} == {0.0}
    table = capsys.readouterr().out
    assert (folder / "table.txt").read_text() in table
    lines = {line.split("  ")[0]: line for line in table.splitlines()}
    assert lines["AI2D"].split()[-3:] == ["83.9", "84.5", "86.1"]  # base, Dr.GRPO and RIL of the student
    average = sum(s for s in scores.values() if s is not None) / 12
    assert lines["average of 12"].split()[3] == f"{average:.1f}"
    assert "MM-Vet: a model must grade it" in table


def test_images_go_where_the_prompt_has_them(data, folder):
    with endpoint(cat) as (url, service):
        run(evaluated_config(url=url), data, folder, "mmmu", "mmvet_v2")
    by_text = {asked(body["messages"]): body["messages"][0]["content"] for body in service.bodies}
    kinds = {text[:7]: [part["type"] for part in content] for text, content in by_text.items()}
    assert kinds["Compare"] == ["text", "image_url", "text", "image_url"]
    assert kinds["Is \n or"] == ["text", "image_url", "text", "image_url", "text"]


def test_one_wrong_rotation_makes_the_question_wrong(data, folder):
    with endpoint(lambda messages: "B") as (url, _):  # right but for the rotated row
        results = run(evaluated_config(url=url), data, folder, "mmbench")
    assert results["mmbench"]["score"] == 50
    samples = {s.key: s.score for s in read_samples(folder / "mmbench")}
    assert samples == {f"MMBench_DEV_EN_V11/{i}": score for i, score in ((7, 1.0), (8, 1.0), (1000007, 0.0))}


def test_a_sample_tells_what_was_made_of_it(data, folder):
    with endpoint(cat) as (url, _):
        run(evaluated_config(url=url), data, folder, "ai2d")
    sample = read_samples(folder / "ai2d")[1]
    assert sample.prompt.startswith("<image 1>Question: Which animal is it?\nOptions:\nA. dog")
    assert (sample.answer, sample.response, sample.parsed, sample.by) == ("A. dog", "The answer is cat.", "B", "rule")
    assert (sample.score, sample.tokens, sample.finish, sample.categories) == (0.0, 4, "stop", ["animals"])


# --- the judge ---


def judge(messages) -> str:
    text = asked(messages)
    if "[AND]" in text.partition("<question>")[2]:
        return "<answer>0.5</answer>"
    if "[OR]" in text.partition("<question>")[2]:
        return "<answer>1.0</answer>"
    if "feline" in text:
        return "<answer>B</answer>"
    return "<answer>Z</answer>"


def test_a_judge_matches_and_grades_what_the_rules_leave_open(data, folder):
    say = lambda messages: "a feline" if "cat" in asked(messages) else cat(messages)  # noqa: E731
    with endpoint(say) as (url, _), endpoint(judge, "judge/32B") as (judge_url, asked_judge):
        config = evaluated_config(url=url)
        without = run(config, data, folder, "ai2d", "mmvet", "mmvet_v2", "chartqa")
        assert (without["ai2d"]["score"], without["mmvet"]["score"]) == (0, None)
        config.evaluate.judge.update({"kind": "openai", "base_url": judge_url})
        results = run(config, data, folder, "ai2d", "mmvet", "mmvet_v2", "chartqa")
        count = len(asked_judge.bodies)
        assert run(config, data, folder, "ai2d", "mmvet", "mmvet_v2", "chartqa") == results
        assert len(asked_judge.bodies) == count  # what it said is kept
    assert results["ai2d"]["score"] == 50
    assert results["ai2d"]["parsed_by_judge"] == 2
    assert (results["mmvet"]["score"], results["mmvet_v2"]["score"]) == (50, 100)
    assert results["mmvet"]["judge"] == "32B"
    assert count == 3  # one for both animals, which were answered alike, and one each for MM-Vet and its second edition
    assert results["chartqa"]["parsed_by_judge"] == 0


# --- going on ---


def test_a_killed_evaluation_goes_on(data, folder):
    names = ("ai2d", "mmstar", "mathvista")
    with endpoint(cat) as (url, service):
        whole = run(evaluated_config(url=url), data, folder / "whole", *names)
        count = len(service.bodies)
        run(evaluated_config(url=url), data, folder / "parts", "ai2d")
        path = folder / "parts" / "ai2d" / "answers-0-of-1.jsonl"
        path.write_bytes(path.read_bytes()[:-20])  # torn in its last line
        parts = run(evaluated_config(url=url), data, folder / "parts", *names)
    assert parts == whole
    assert len(service.bodies) == 2 * count + 1  # the torn one was asked again, and no other


def test_a_process_killed_at_any_moment_goes_on(tmp_path, folder):
    write_tsv(tmp_path / "AI2D_TEST.tsv", [choice(i, "AB"[i % 2]) for i in range(40)])

    def slowly(messages) -> str:
        time.sleep(0.02)
        return cat(messages)

    with endpoint(slowly) as (url, service):
        words = [f"--config={CONFIG}:{url}", f"--data={tmp_path}", f"--output={folder}", "--benchmarks=ai2d"]
        command = [sys.executable, "-m", "ril_jax.evaluate", *words]
        for least in (5, 20):
            process = subprocess.Popen(command, env=quick_environment(), stdout=subprocess.DEVNULL)
            wait_for(lambda least=least: len(service.bodies) >= least, 60)
            process.kill()
            process.wait()
        kept = len((folder / "ai2d" / "answers-0-of-1.jsonl").read_bytes().splitlines())
        before = len(service.bodies)
        results = run(evaluated_config(url=url), tmp_path, folder, "ai2d")
    assert results["ai2d"]["score"] == 50
    assert 1 <= kept < 40
    assert len(service.bodies) - before <= 41 - kept  # what was kept is not asked again
    assert [sample.key for sample in read_samples(folder / "ai2d")] == [f"AI2D_TEST/{i}" for i in range(40)]


def test_shards_together_are_the_whole(data, folder, capsys):
    with endpoint(cat) as (url, service):
        config = evaluated_config(url=url)
        names = ("ai2d", "mmbench", "mmmu_pro", "mmvet")
        whole = run(config, data, folder / "whole", *names)
        count = len(service.bodies)
        assert run(config, data, folder / "parts", *names, shard="1/2") == {}
        assert "still waits for shard 0/2" in capsys.readouterr().out
        parts = run(config, data, folder / "parts", *names, shard="0/2")
    assert len(service.bodies) == 2 * count
    assert parts == whole
    for name in names:
        assert read_samples(folder / "parts" / name) == read_samples(folder / "whole" / name)


def test_processes_of_one_run_share_the_questions(data, folder):
    """Both started by the same command, without --shard; the first writes the scores of all, and prints them once."""
    names = ("ai2d", "mmbench", "mmmu_pro", "mmvet")
    with endpoint(cat) as (url, service):
        whole = run(evaluated_config(url=url), data, folder / "whole", *names)
        count = len(service.bodies)
        words = [f"--config={CONFIG}:{url}", f"--data={data}", f"--output={folder / 'parts'}"]
        command = [sys.executable, "-m", "ril_jax.evaluate", *words, f"--benchmarks={','.join(names)}"]
        with processes.started(folder, command, 2, quick_environment()) as group:
            assert group.wait(120) == [0, 0], group.said()
            said = group.said()
    assert len(service.bodies) == 2 * count
    assert read_results(folder / "parts")["benchmarks"] == whole
    assert sorted(path.name for path in (folder / "parts" / "ai2d").glob("answers-*")) == [
        "answers-0-of-2.jsonl", "answers-1-of-2.jsonl",
    ]  # fmt: skip
    assert ["AI2D" in text for text in said] == [True, False]


def test_answers_of_another_model_are_refused(data, folder):
    with endpoint(cat, "one") as (url, _):
        run(evaluated_config(url=url), data, folder, "ai2d")
    with endpoint(cat, "two") as (url, _), pytest.raises(InputError, match='model was "one" and is "two" now'):
        run(evaluated_config(url=url), data, folder, "ai2d")


def test_a_changed_file_is_refused(tmp_path, folder):
    write_tsv(tmp_path / "AI2D_TEST.tsv", [choice(1)])
    with endpoint(cat) as (url, _):
        run(evaluated_config(url=url), tmp_path, folder, "ai2d")
        write_tsv(tmp_path / "AI2D_TEST.tsv", [choice(1, question="Which one?")])
        with pytest.raises(InputError, match="ai2d has other answers: data was"):
            run(evaluated_config(url=url), tmp_path, folder, "ai2d")


def test_a_limit_counts_questions_with_their_rotations(data, folder, capsys):
    with endpoint(cat) as (url, _):
        results = run(evaluated_config(url=url), data, folder, "mmbench", limit=1)
        assert (results["mmbench"]["questions"], results["mmbench"]["samples"]) == (1, 2)
        assert "MMBench: the first 1 of 2 questions" in capsys.readouterr().out
        results = run(evaluated_config(url=url), data, folder, "mmbench")
    assert results["mmbench"]["samples"] == 3


def test_the_summary_tells_what_is_there(data, folder, capsys):
    with endpoint(cat) as (url, service):
        config = evaluated_config(url=url)
        run(config, data, folder, "ai2d", shard="0/2")
        count = len(service.bodies)
        capsys.readouterr()
        assert run(config, data, folder, "ai2d", shard="0/2", summary=True) == {}
        assert len(service.bodies) == count
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("AI2D")]
    assert line.split()[:2] == ["AI2D", "100.0"]


def test_an_empty_response_answers_nothing(data, folder):
    with endpoint(lambda messages: "") as (url, _):
        results = run(evaluated_config(url=url), data, folder, "ai2d", "chartqa", "mathvista")
    assert {name: (r["score"], r["unparsed"]) for name, r in results.items()} == {
        name: (0, 2) for name in ("ai2d", "chartqa", "mathvista")
    }


# --- mistakes ---


@pytest.mark.parametrize(
    ("changes", "flags", "words"),
    [
        ({}, {"limit": -1}, "--limit=-1"),
        ({}, {"paper": "GPT"}, "--paper=GPT is no student"),
        ({}, {"shard": "2/2"}, "--shard=2/2 is no part"),
        ({"max_tokens": 0}, {}, "config.evaluate.max_tokens is 0"),
        ({"bootstrap": 0}, {}, "config.evaluate.bootstrap is 0"),
        ({"judge": {"kind": "gpt"}}, {}, "config.evaluate.judge.kind is 'gpt'; use none, openai or engine"),
        ({"judge": {"kind": "openai"}}, {}, "config.evaluate.judge.base_url is empty"),
        ({"judge": {"kind": "engine"}}, {}, "config.evaluate.judge.checkpoint is empty"),
    ],
)
def test_a_mistake_is_one_line(data, folder, changes, flags, words):
    with pytest.raises(InputError, match=words):
        run(evaluated_config(url="http://127.0.0.1:1", **changes), data, folder, "ai2d", **flags)


def test_a_missing_file_is_named(tmp_path, folder):
    with pytest.raises(InputError, match=r"has no AI2D_TEST\.tsv; put it there, or leave ai2d out"):
        run(evaluated_config(url="http://127.0.0.1:1"), tmp_path, folder, "ai2d")


def test_the_command_line_has_its_flags(tmp_path):
    path = tmp_path / "c.py"
    path.write_text("from ril_jax.config import serving_config as get_config\n")
    words = ["evaluate", f"--config={path}", "--data=D", "--output=O", "--benchmarks=ai2d,chartqa", "--limit=3"]
    args = cli.parse_arguments(words, required=("config", "data", "output"), flags=evaluate.FLAGS)
    assert (args.benchmarks, args.limit, args.summary) == (["ai2d", "chartqa"], 3, False)


# --- a model in this process ---


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """A tiny model, loaded and compiled once, and what gives further engines over its programs."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    folder.mkdir()
    build_tiny_folder(folder)
    with quick_compilation():
        model, engine = local.load_engine(evaluated_config(folder))

    def load(config, **kwargs):
        with engine.counter.expected():
            image_token_id = model.chat.image_token_id
            return model, Engine(engine.programs, engine.params, image_token_id=image_token_id, counter=engine.counter)

    return folder, load


def test_the_engine_answers_and_so_does_its_judge(data, folder, loaded, monkeypatch):
    model, load = loaded
    monkeypatch.setattr(local, "load_engine", load)
    config = evaluated_config(model, judge={"kind": "engine", "checkpoint": str(model), "dtype": "float32"})
    config.evaluate.judge.max_tokens = 8
    names = ("blink", "mmvet", "mmmu")
    results = run(config, data, folder / "a", *names)
    parts = [run(config, data, folder / "b", *names, shard=f"{i}/2") for i in (0, 1)]
    assert set(results) == set(names)
    assert parts == [{}, results]  # whatever is with the engine at the same time
    texts = [sample.response for name in results for sample in read_samples(folder / "a" / name)]
    assert len(texts) == 5
    assert any(texts)
    assert results["mmvet"]["judge"] == "tiny"
    replies = (folder / "a" / "mmvet" / "judge-tiny-0-of-1.jsonl").read_text().splitlines()
    assert [type(json.loads(line)["text"]) for line in replies] == [str]


@pytest.mark.slow
def test_two_processes_evaluate_with_a_model_each(data, folder, loaded, monkeypatch):
    """A judge after it, too: with several devices in the run, each process uses its own."""
    model, load = loaded
    monkeypatch.setattr(local, "load_engine", load)
    judge = {"kind": "engine", "checkpoint": str(model), "dtype": "float32", "max_tokens": 8}
    names = ("blink", "mmvet", "mmmu")
    whole = run(evaluated_config(model, judge=judge), data, folder / "whole", *names)
    words = [f"--config={CONFIG}", f"--checkpoint={model}", f"--data={data}", f"--output={folder / 'parts'}"]
    words += [f"--config.evaluate.judge.{field}={value}" for field, value in judge.items()]
    command = [sys.executable, "-m", "ril_jax.evaluate", *words, f"--benchmarks={','.join(names)}"]
    with processes.started(folder, command, 2, quick_environment()) as group:
        assert group.wait(400) == [0, 0], group.said()
    assert read_results(folder / "parts")["benchmarks"] == whole


@pytest.mark.parametrize(
    ("checkpoint", "name"),
    [("W/ril/ril/model", "W/ril/ril/model"), ("W/ril/ril/best", "W/ril/ril/best"), ("W/Qwen2.5-VL-7B", "")],
)
def test_a_run_s_model_is_called_by_its_place(tmp_path, checkpoint, name):
    assert evaluate._student(evaluated_config(tmp_path / checkpoint)).generate.model_name == name
