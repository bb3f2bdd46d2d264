"""Claims about runs whose groups the engine samples: the stages are the same, resumable, and compile nothing late."""

import json
import shutil

import numpy as np
import pytest
from helpers import small_run

from ril_jax.errors import InputError
from ril_jax.rewards.judge import RulesJudge
from ril_jax.sampling.engine import Engine
from ril_jax.training import rewards, ril
from ril_jax.training.metrics import read_metrics
from ril_jax.training.run import Stopped

SHAPES = {"slots": 6, "small_slots": 0, "page_size": 16, "prefill": ((64, 4),), "decode_steps": 4, "feature_rows": 256}


def config(folder, **changes):
    c = small_run.small_config(**{"sampling.backend": "engine", "data.teacher_data": f"{folder}/teachers"})
    c.sampling.engine.update(SHAPES)
    for field, value in changes.items():
        small_run.set_field(c, field, value)
    return c


@pytest.fixture(scope="module")
def finished(trained_workdir, tmp_path_factory):
    """The student's responses collected, and ril, by one engine; the teachers' responses are there."""
    folder = tmp_path_factory.mktemp("engine")
    skip = shutil.ignore_patterns("collect", "responses", "ril")
    workdir = shutil.copytree(trained_workdir, folder / "workdir", ignore=skip)
    shutil.copytree(trained_workdir / "responses", folder / "teachers")
    small_run.train_here(workdir, config(folder, allow_config_change=True), "collect,ril")
    return workdir


def outcome(workdir):
    metrics = read_metrics(workdir / "metrics" / "ril" / "ril.jsonl", wall_clock=False)
    return metrics, (workdir / "ril" / "ril" / "model" / "model.safetensors").read_bytes()


def test_all_stages_run_on_the_engine(finished):
    parts = sorted((finished / "collect").rglob("part-*.json"))
    assert {part.parent.name for part in parts} == {"student"}
    rows = [row for part in parts for row in json.loads(part.read_text()).values()]
    assert all(len(row) == 4 and all(r["token_count"] > 0 for r in row) for row in rows)
    assert len({r["text"] for row in rows for r in row}) > len(rows)  # samples of a group differ
    metrics, _ = outcome(finished)
    assert len(metrics) == 6
    # Sampler and trainer are one model: what the engine says of its tokens is what the update finds.
    assert max(row["sampling/logp_difference_mean"] for row in metrics) < 1e-4
    assert all(np.isfinite(row["loss"]) for row in metrics)


def test_a_run_that_stops_goes_on_to_the_same_end(finished, tmp_path, monkeypatch):
    workdir = shutil.copytree(finished, tmp_path / "workdir", ignore=shutil.ignore_patterns("ril"))
    made = ril.Ril.step

    def step(self, number, questions):
        if number == 4:
            self.run.stop.received = 15
        return made(self, number, questions)

    with monkeypatch.context() as patch:
        patch.setattr(ril.Ril, "step", step)
        with pytest.raises(Stopped):
            small_run.train_here(workdir, config(finished.parent), "ril")
    assert not (workdir / "ril" / "ril" / "done.json").exists()
    small_run.train_here(workdir, config(finished.parent), "ril")
    assert outcome(workdir) == outcome(finished)


def test_a_judge_beside_it_gets_responses_as_they_end_and_changes_nothing(finished, tmp_path, monkeypatch):
    class Threaded(RulesJudge):
        overlaps = True
        calls: list[int] = []  # noqa: RUF012

        def __call__(self, questions):
            self.calls.append(len(questions))
            return super().__call__(questions)

    monkeypatch.setattr(rewards, "make_judge", lambda *_, **__: Threaded())
    workdir = shutil.copytree(finished, tmp_path / "workdir", ignore=shutil.ignore_patterns("ril"))
    small_run.train_here(workdir, config(finished.parent), "ril")
    assert outcome(workdir) == outcome(finished)
    c = config(finished.parent)
    answers = c.ril.steps * c.ril.batch_size * (c.ril.num_generations + c.ril.num_teacher_generations)
    assert sum(Threaded.calls) == answers  # each once
    assert len(Threaded.calls) > 2 * c.ril.steps  # more often than teachers, then the student


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("max_model_len", 20, "max_model_len=20 is less than the longest"),
        ("page_size", 24, "config.sampling.engine.prefill's .* is no multiple of page_size"),
    ],
)
def test_shapes_that_hold_no_response_are_refused(finished, tmp_path, field, value, words):
    workdir = shutil.copytree(finished, tmp_path / "workdir", ignore=shutil.ignore_patterns("ril"))
    with pytest.raises(InputError, match=words):
        small_run.train_here(
            workdir, config(finished.parent, **{f"sampling.engine.{field}": value, "allow_config_change": True}), "ril"
        )


def test_the_engine_reads_the_weights_that_are_trained(finished, tmp_path, monkeypatch):
    """No copy of them: in float32 its arrays are those of the train state."""
    trained, taken = [], []
    sample, set_params = ril.Ril.sample, Engine.set_params

    def recorded_sample(self, *args):
        trained.append(dict(self.state.student.params))
        return sample(self, *args)

    def recorded_set_params(self, params):
        set_params(self, params)
        taken.append(dict(self.params))

    monkeypatch.setattr(ril.Ril, "sample", recorded_sample)
    monkeypatch.setattr(Engine, "set_params", recorded_set_params)
    workdir = shutil.copytree(finished, tmp_path / "workdir", ignore=shutil.ignore_patterns("ril"))
    small_run.train_here(workdir, config(finished.parent, **{"ril.steps": 2, "allow_config_change": True}), "ril")
    assert len(trained) == 2
    assert all(trained[0][name] is not value for name, value in trained[1].items())
    for params in trained:
        assert any(all(given[name] is value for name, value in params.items()) for given in taken)
