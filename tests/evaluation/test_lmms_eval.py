"""The field's own tool against our server: lmms-eval, unmodified, on a local task, gives the score that we give.

It wants an environment of its own (it brings torch, pandas and 150 others):
    python -m venv E && E/bin/pip install lmms-eval 'filelock<4.3'    # 0.7.3 reads a part of filelock that 4.3 lacks
    LMMS_EVAL_PYTHON=E/bin/python python -m pytest -m slow tests/evaluation/test_lmms_eval.py
Beside a torch for the CPU alone, the torchvision that comes along fails to import ("operator torchvision::nms does not
exist"); this test needs none: E/bin/pip uninstall torchvision.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.benchmark_files import base64_png, write_tsv
from helpers.evaluated import evaluated_config, run
from helpers.quick import quick_compilation
from helpers.running import running
from helpers.tiny_folder import build_tiny_folder

from ril_jax.evaluation.numbers import final_answer
from ril_jax.evaluation.results import read_samples
from ril_jax.sampling.local import load_engine
from ril_jax.sampling.server.app import Service

PYTHON = os.environ.get("LMMS_EVAL_PYTHON") or (sys.executable if importlib.util.find_spec("lmms_eval") else "")
ROWS = 24
# The prompt is ours (VLMEvalKit's); question, pictures, scorer and the rest are lmms-eval's ChartQA.
TASK = """
task: local_chartqa
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.pictures
doc_to_text: !function utils.chartqa_doc_to_text
doc_to_target: answer
generation_kwargs:
  max_new_tokens: 8
  temperature: 0
  do_sample: false
process_results: !function utils.chartqa_process_results
metric_list:
  - metric: relaxed_overall
    aggregation: mean
    higher_is_better: true
lmms_eval_specific_kwargs:
  default:
    pre_prompt: ""
    post_prompt: "\\nAnswer the question using a single word or phrase."
"""
UTILS = """
import base64, io
from PIL import Image
from lmms_eval.tasks.chartqa.utils import chartqa_doc_to_text
from lmms_eval.tasks.chartqa.utils import chartqa_process_results as theirs

def pictures(doc):
    return [Image.open(io.BytesIO(base64.b64decode(doc["image"]))).convert("RGB")]

def chartqa_process_results(doc, results):
    return {"relaxed_overall": theirs(doc, results)["relaxed_overall"]}
"""


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    folder.mkdir()
    build_tiny_folder(folder, ends=40)
    config = evaluated_config(folder)
    with quick_compilation():
        model, engine = load_engine(config)
    engine.start()
    service = Service(config, model_name="tiny")
    service.open(model, engine)
    with running(service) as address:
        yield address
    engine.close()


@pytest.mark.slow
@pytest.mark.skipif(not PYTHON, reason="name the Python of an environment with lmms-eval in LMMS_EVAL_PYTHON")
def test_lmms_eval_gives_our_score(url, tmp_path):
    rows = [
        {"index": i, "image": base64_png(i), "question": f"How high is bar {i}?", "answer": "no", "split": "human"}
        for i in range(ROWS)
    ]
    config = evaluated_config(url=url)
    write_tsv(tmp_path / "before" / "ChartQA_TEST.tsv", rows)
    run(config, tmp_path / "before", tmp_path / "first", "chartqa")
    # A model without training knows no answer, so what it says becomes the right answer of every second row: where it
    # says one line, which the two parse alike.
    for i, sample in enumerate(read_samples(tmp_path / "first" / "chartqa")):
        if i % 2 and sample.response.strip() and final_answer(sample.response) == sample.response.strip():
            rows[i]["answer"] = sample.response.strip().upper()
    right = [row["index"] for row in rows if row["answer"] != "no"]
    assert ROWS / 6 <= len(right) <= ROWS / 2

    write_tsv(tmp_path / "data" / "ChartQA_TEST.tsv", rows)
    ours = run(config, tmp_path / "data", tmp_path / "ours", "chartqa")["chartqa"]["score"]
    samples = read_samples(tmp_path / "ours" / "chartqa")
    theirs = lmms_eval(url, rows, tmp_path)
    assert theirs["responses"] == [sample.response.strip() for sample in samples]  # it strips them
    assert theirs["scores"] == [sample.score for sample in samples]
    assert 100 * theirs["score"] == pytest.approx(ours, abs=1e-3)
    assert ours == pytest.approx(100 * len(right) / ROWS, abs=1e-3)


def lmms_eval(url: str, rows: list[dict], folder: Path) -> dict:
    """What lmms-eval makes of these rows: its score, and every response with its own."""
    task = folder / "task"
    task.mkdir()
    data = task / "rows.jsonl"
    data.write_text("".join(json.dumps(row | {"type": "human_test"}) + "\n" for row in rows))
    (task / "local_chartqa.yaml").write_text(TASK.format(data=data))
    (task / "utils.py").write_text(UTILS)
    model = f"model_version=tiny,base_url={url}/v1,api_key=none,timeout=120,num_concurrent=4"
    words = [
        PYTHON, "-m", "lmms_eval", "--model", "openai", "--model_args", model, "--tasks", "local_chartqa",
        "--include_path", str(task), "--output_path", str(folder / "theirs"), "--log_samples", "--batch_size", "1",
    ]  # fmt: skip
    environment = os.environ | {"HF_HOME": str(folder / "hf"), "HF_DATASETS_OFFLINE": "1", "WANDB_MODE": "disabled"}
    done = subprocess.run(words, env=environment, cwd=folder, capture_output=True, text=True, timeout=800)
    said = done.stdout[-2000:] + done.stderr[-4000:]
    assert done.returncode == 0, said
    assert (folder / "theirs").exists(), said  # it ends with 0 after an error, too
    (numbers,) = (folder / "theirs").rglob("*results.json")
    (logged,) = (folder / "theirs").rglob("*samples_local_chartqa.jsonl")
    lines = sorted((json.loads(line) for line in logged.read_text().splitlines()), key=lambda line: line["doc_id"])
    return {
        "score": json.loads(numbers.read_text())["results"]["local_chartqa"]["relaxed_overall,none"],
        "responses": ["".join(line["filtered_resps"]) for line in lines],  # a text, or a list of one
        "scores": [line["relaxed_overall"] for line in lines],
    }
