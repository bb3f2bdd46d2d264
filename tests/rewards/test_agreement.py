"""Claims about measuring rules and judge by people's labels, after hand-computed cases."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.small_run import environment

import ril_jax
from ril_jax import cli
from ril_jax.errors import InputError
from ril_jax.rewards import __main__ as command
from ril_jax.rewards.agreement import Agreement
from ril_jax.rewards.judge import JudgeItem

ROOT = Path(ril_jax.__file__).parents[1]


def test_figures_are_those_computed_by_hand():
    """Cohen's kappa: observed 35/50, by chance (25*30 + 25*20)/50^2 = 0.5, so (0.7 - 0.5)/(1 - 0.5) = 0.4."""
    first = [True] * 20 + [True] * 5 + [False] * 10 + [False] * 15
    second = [True] * 20 + [False] * 5 + [True] * 10 + [False] * 15
    found = Agreement.of(first, second)
    assert found == Agreement(20, 5, 10, 15)
    assert found.accuracy == pytest.approx(0.7)
    assert found.precision == pytest.approx(20 / 25)
    assert found.recall == pytest.approx(20 / 30)
    assert found.kappa == pytest.approx(0.4)
    assert Agreement.of([True], [True]).kappa is None  # nothing to agree on beyond chance
    assert Agreement.of([False], [False]).precision is None
    assert Agreement.of([], []).accuracy is None


ROWS = [
    {"id": "same", "prompt": "How many?", "solution": "5", "response": "The answer is 5.", "label": 1},
    {"id": "word", "prompt": "How many?", "solution": "five", "response": "The answer is 5.", "label": True},
    {"id": "off", "prompt": "How many?", "solution": 5, "response": "The answer is 6.", "label": 0},
    {"id": "lenient", "prompt": "How many?", "solution": "5", "response": "5, and I am certain", "label": "false"},
    {"id": "babble", "prompt": "How many?", "solution": "5", "response": "<answer>5</answer> I say", "label": "1"},
]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def judged(item: JudgeItem) -> str:
    """A judge's words: it takes 5 for five, says nonsense of what babbles, and calls the rest wrong."""
    if item.endswith("I say"):
        return "Hm."
    return f"<answer>{int('is 5' in item or 'certain' in item)}</answer>"


@pytest.fixture
def endpoint():
    """A judge over HTTP, from what stands between the tags of the response."""
    import uvicorn
    from helpers.running import running
    from starlette.applications import Starlette
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    assert uvicorn
    bodies = []

    async def chat(request):
        body = await request.json()
        bodies.append(body)
        user = body["messages"][-1]["content"]
        response = user.split("<response-")[1].split(">\n", 1)[1].split("\n</response-")[0]
        return JSONResponse({"choices": [{"message": {"content": judged(response)}, "finish_reason": "stop"}]})

    app = Starlette(routes=[Route("/v1/chat/completions", chat, methods=["POST"])])
    with running(SimpleNamespace(app=app, close=lambda: None)) as url:
        yield url, bodies


def run(source, *overrides, **flags):
    config = cli.load_config(str(ROOT / "configs" / "qwen7b.py"), overrides)
    given = {"workdir": None, "input": str(source), "output": None, "listed": 20}
    assert command.main(SimpleNamespace(config=config, **given | flags)) == 0


def table(out):
    names = ("rules by label", "judge by label", "rules by judge")
    return {line[:14].strip(): line[14:].split() for line in out.splitlines() if line.startswith(names)}


def test_rules_and_judge_are_measured_by_labels(tmp_path, endpoint, capsys):
    """Rules say 1 0 0 ? 1 and the judge 1 1 0 1 -, of labels 1 1 0 0 1; one verdict cannot be read."""
    url, bodies = endpoint
    source = write(tmp_path / "rows.jsonl", ROWS)
    override = f"reward.judge.base_url={url}"
    run(source, override, output=str(tmp_path / "verdicts.jsonl"), workdir=tmp_path / "run")
    out = capsys.readouterr().out
    verdicts = {line["id"]: line for line in map(json.loads, (tmp_path / "verdicts.jsonl").open())}
    assert {id_: (v["label"], v["judge"]) for id_, v in verdicts.items()} == {
        "same": (1, 1), "word": (1, 1), "off": (0, 0), "lenient": (0, 1), "babble": (1, 0),
    }  # fmt: skip
    rules = {id_: v["rules"] for id_, v in verdicts.items()}
    assert (rules["same"], rules["word"], rules["off"], rules["babble"]) == (1, 0, 0, 1)
    assert verdicts["babble"]["error"]
    assert "the judge gave 1 verdicts that cannot be read; they count as wrong" in out
    found = table(out)
    # judge by label: both right 2, judge alone 1, label alone 1, neither 1; chance (3*3 + 2*2)/25
    assert found["judge by label"] == ["0.600", "0.667", "0.667", f"{(0.6 - 13 / 25) / (1 - 13 / 25):.3f}", *"2111"]
    assert found["rules by label"][4:] == ["2", str(rules["lenient"]), "1", str(2 - rules["lenient"])]
    apart = [id_ for id_, v in verdicts.items() if len({v["label"], v["rules"], v["judge"]}) > 1]
    assert f"not of one opinion: {len(apart)}" in out
    assert all(f"\n  {id_}: label" in out for id_ in apart)
    assert "\n  same: " not in out
    asked = len(bodies)
    run(source, override, workdir=tmp_path / "run", listed=1)  # verdicts that could be read are in the run's cache
    assert len(bodies) == asked + 1
    assert "the first 1:" in capsys.readouterr().out


def test_rules_alone_are_measured_without_a_model(tmp_path, capsys):
    run(write(tmp_path / "rows.jsonl", ROWS[:3]), "reward.judge.kind=rules")
    out = capsys.readouterr().out
    assert list(table(out)) == ["rules by label"]
    assert table(out)["rules by label"] == ["0.667", "1.000", "0.500", "0.400", "1", "0", "1", "1"]
    assert "word: label 1, rules 0; solution 'five'" in out


@pytest.mark.parametrize(
    ("row", "line"),
    [
        ({"label": 2}, r"rows.jsonl:1: `label` is 2; give 1 \(right\) or 0 \(wrong\)"),
        ({"label": None}, "rows.jsonl:1 has no label; give prompt, solution, response and label"),
        ({"response": None, "solution": None}, "has no solution and no response"),
        ({"response": 5}, "`response` is 5; give it as text"),
        ({"solution": " "}, "`solution` is empty"),
        ({"prompt": [{"role": "user"}]}, "`prompt` is neither text nor chat messages"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(tmp_path, row, line):
    with pytest.raises(InputError, match=line):
        run(write(tmp_path / "rows.jsonl", [ROWS[0] | row]), "reward.judge.kind=rules")


def test_the_command_line(tmp_path):
    source = write(tmp_path / "rows.jsonl", ROWS[:2])
    program = [sys.executable, "-m", "ril_jax.rewards"]
    words = ["agreement", f"--config={ROOT / 'configs' / 'qwen7b.py'}", f"--input={source}"]
    done = subprocess.run(
        [*program, *words, "--config.reward.judge.kind=rules"], capture_output=True, text=True, env=environment()
    )
    assert done.returncode == 0, done.stderr
    assert "2 responses, 2 of them right by label, 1 by rules" in done.stdout
    done = subprocess.run(program, capture_output=True, text=True, env=environment())
    assert done.returncode == 2
    assert done.stderr.startswith("error: name the command: python -m ril_jax.rewards agreement")
