"""Claims about the model that did best on held-out questions."""

import json
import shutil

import jax
import numpy as np
import pytest
from helpers import small_run
from helpers.tiny_folder import build_tiny_folder

from ril_jax import sharding
from ril_jax.errors import InputError
from ril_jax.models.hub import load_params
from ril_jax.pretrained import Pretrained
from ril_jax.training import ril, sft
from ril_jax.training.best import BestModel


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    folder.mkdir()
    model = Pretrained.open(build_tiny_folder(folder, vision=False))
    return model, model.load_params(sharding.make_mesh(), dtype=np.float32)


def weights(folder, model) -> dict[str, np.ndarray]:
    return jax.device_get(load_params(folder, model.network))


def times(params, factor: float) -> dict:
    return {name: factor * value for name, value in params.items()}


def same(there: dict, here: dict) -> bool:
    return there.keys() == here.keys() and all(np.array_equal(there[name], here[name]) for name in there)


def test_the_best_is_kept_and_the_first_of_equals(student, tmp_path):
    model, params = student
    best = BestModel(tmp_path, model)
    assert best.facts() == {}
    assert [best.offer(step, a, times(params, step)) for step, a in ((1, 0.25), (2, 0.5), (3, 0.5), (4, 0.0))] == [
        True, True, False, False,
    ]  # fmt: skip
    assert same(weights(tmp_path / "best", model), jax.device_get(times(params, 2)))
    assert best.facts() == {"best_step": 2, "best_accuracy": 0.5}


def test_what_an_earlier_start_kept_counts(student, tmp_path):
    model, params = student
    BestModel(tmp_path, model).offer(2, 0.5, params)
    again = BestModel(tmp_path, model)
    assert not again.offer(2, 0.5, times(params, 2))
    assert again.offer(4, 0.75, times(params, 4))
    assert json.loads((tmp_path / "best.json").read_text()) == {"step": 4, "accuracy": 0.75}


def test_a_model_that_does_worst_is_still_the_best_of_one(student, tmp_path):
    model, params = student
    assert BestModel(tmp_path, model).offer(1, 0.0, params)


def test_damaged_facts_are_told(student, tmp_path):
    model, params = student
    BestModel(tmp_path, model).offer(2, 0.5, params)
    (tmp_path / "best.json").write_text("{")
    with pytest.raises(InputError, match=r"best\.json is damaged"):
        BestModel(tmp_path, model)


def planned(monkeypatch, stage, accuracies: list[float]) -> list[dict]:
    """Evaluations of a stage give these accuracies, one after the other; returns the parameters that they saw."""
    seen: list[dict] = []

    def evaluate(run, params, questions, judge):
        assert len(questions) == 6
        seen.append({name: np.array(value) for name, value in params.items()})
        return {"accuracy": accuracies[len(seen) - 1]}

    monkeypatch.setattr(stage, "evaluate", evaluate)
    return seen


def logged(workdir, label: str) -> dict[int, float]:
    lines = [json.loads(line) for line in (workdir / "metrics" / f"{label}.jsonl").read_text().splitlines()]
    return {line["step"]: line["eval/accuracy"] for line in lines if "eval/accuracy" in line}


def test_ril_keeps_its_best(workdir, monkeypatch):
    seen = planned(monkeypatch, ril, [0.5, 0.25, 0.5])
    config = small_run.small_config(**{"eval.every": 2, "allow_config_change": True})
    small_run.train_here(workdir, config, "ril")
    stage = workdir / "ril" / "ril"
    assert logged(workdir, "ril/ril") == {2: 0.5, 4: 0.25}
    assert json.loads((stage / "best.json").read_text()) == {"step": 2, "accuracy": 0.5}
    done = json.loads((stage / "done.json").read_text())
    assert (done["accuracy"], done["best_step"], done["best_accuracy"]) == (0.5, 2, 0.5)
    model = Pretrained.open(stage / "best")
    assert same(weights(stage / "best", model), seen[0])
    assert same(weights(stage / "model", model), seen[2])
    assert not same(seen[0], seen[2])


def test_sft_is_evaluated_where_it_is_asked_for(workdir, monkeypatch):
    seen = planned(monkeypatch, sft, [0.25, 0.75, 0.5])
    shutil.rmtree(workdir / "sft")
    changes = {"eval.sft_every": 2, "sft.steps": 6, "allow_config_change": True}
    small_run.train_here(workdir, small_run.small_config(**changes), "sft")
    assert logged(workdir, "sft") == {2: 0.25, 4: 0.75, 6: 0.5}
    assert json.loads((workdir / "sft" / "done.json").read_text()) == {
        "steps": 6, "best_step": 4, "best_accuracy": 0.75,
    }  # fmt: skip
    model = Pretrained.open(workdir / "sft" / "best")
    assert same(weights(workdir / "sft" / "best", model), seen[1])
